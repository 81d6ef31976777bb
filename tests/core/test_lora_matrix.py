"""What PEFT's LoRA can be x what its base can be: fused by the contract, or left to PEFT with the reason.

Truth is the same model in float64, its 4-bit weights expanded: every output and every gradient of the fused
model has an error of at most 1.5 times eager PEFT's.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ForwardCalls, batch, counting_kernels, loss_and_gradients, patched_ops, reasons
from torch import nn

from sloth_plugins.numerics import Comparison, relative_error

peft = pytest.importorskip("peft", reason="peft is not installed")
from lora_models import ATTENTION, accelerate, in_4bit, lora, randomize, wide  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOW = (torch.bfloat16, torch.float16)
Change = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def not_watched() -> Iterator[None]:
    """A test that fails must not leave every later one slow."""
    yield
    sys.setprofile(None)


# Bases


@dataclass(frozen=True, kw_only=True)
class Base:
    """The dtype of the model's own weights, and how its linear layers are stored, if otherwise."""

    dtype: torch.dtype = torch.float32
    four_bit: dict[str, Any] | None = None

    def model(self, device: str, family: str = "qwen2") -> Any:
        """One layer with biases at q, k and v."""
        model = wide(family, num_hidden_layers=1, dtype=self.dtype)
        if self.four_bit is not None:
            model = in_4bit(model, compute_dtype=self.dtype, **self.four_bit)
        return model.to(device)


BASES = {
    "fp32": Base(),
    "bf16": Base(dtype=torch.bfloat16),
    "fp16": Base(dtype=torch.float16),
    "nf4": Base(four_bit=dict(quant_type="nf4", compress_statistics=False)),
    "nf4 nested": Base(four_bit=dict(quant_type="nf4", compress_statistics=True)),
    "fp4": Base(four_bit=dict(quant_type="fp4", compress_statistics=False)),
    "nf4 nested, bf16": Base(dtype=torch.bfloat16, four_bit=dict(quant_type="nf4")),
    "nf4 stored as bf16": Base(
        dtype=torch.bfloat16, four_bit=dict(quant_type="nf4", quant_storage=torch.bfloat16)
    ),
}


# Features


def nothing(model: Any) -> None:
    pass


def add(name: str, *, then: Change = nothing, **options: Any) -> Change:
    """Adds an adapter."""

    def change(model: Any) -> None:
        torch.manual_seed(11)
        model.add_adapter(name, peft.LoraConfig(**{"r": 3, "target_modules": "all-linear", **options}))
        randomize(model)
        then(model)

    return change


def use(*names: str) -> Change:
    return lambda model: model.base_model.set_adapter(list(names))


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes] and None


def cast(dtype: torch.dtype) -> Change:
    def change(model: Any) -> None:
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(dtype)

    return change


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Options of LoraConfig; changes before and after acceleration; what is expected.

    left: a pattern of the reason, in the report or in a warning, for which nothing is fused. rounds: bf16 may
    round too much for the proof; then that is the reason. full: needs weights that are not
    quantized. cuda: PEFT itself needs a GPU for it, and weights that are not quantized. batches: in 16 bits,
    how many are compared as one; where an adapter has one column, a few of its elements decide over a few.
    """

    options: dict[str, Any] = field(default_factory=dict)
    before: Change = nothing
    after: Change = nothing
    left: str | None = None
    full: bool = False
    cuda: bool = False
    batches: int = 4


QV = ["q_proj", "v_proj"]
FEATURES: dict[str, Feature] = {
    "rank 1": Feature(options=dict(r=1), batches=32),
    **{f"rank {r}": Feature(options=dict(r=r)) for r in (4, 7, 64, 256)},
    "alpha": Feature(options=dict(lora_alpha=37)),
    "rslora": Feature(options=dict(r=8, use_rslora=True)),
    "patterns": Feature(options=dict(rank_pattern={"q_proj": 2, "up_proj": 7}, alpha_pattern={"v_proj": 32})),
    "lora_bias": Feature(options=dict(lora_bias=True)),
    "trained base bias": Feature(options=dict(bias="all")),
    "DoRA": Feature(options=dict(use_dora=True), left="is DoRA"),
    "q, v": Feature(options=dict(target_modules=QV)),
    "k, o, gate": Feature(options=dict(target_modules=["k_proj", "o_proj", "gate_proj"])),
    "down": Feature(options=dict(target_modules=["down_proj"])),
    "first of two": Feature(before=add("second")),
    "second of two": Feature(before=both(add("second"), use("second"))),
    "two at once": Feature(
        before=both(add("second"), use("default", "second")), left="several adapters are active at once"
    ),
    "disabled": Feature(after=lambda model: model.base_model.disable_adapter_layers()),
    "disabled and enabled": Feature(
        after=lambda model: (
            model.base_model.disable_adapter_layers(),
            model.base_model.enable_adapter_layers(),
        )
    ),
    "merged": Feature(after=lambda model: model.merge_adapter()),
    "merged and unmerged": Feature(after=lambda model: (model.merge_adapter(), model.unmerge_adapter())),
    "modules_to_save": Feature(options=dict(target_modules=QV, modules_to_save=["lm_head"])),
    "embeddings and head": Feature(options=dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "PiSSA": Feature(options=dict(init_lora_weights="pissa"), full=True),
    "LoftQ": Feature(
        options=dict(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)), cuda=True
    ),
    "OLoRA": Feature(options=dict(init_lora_weights="olora")),
    "adapters in bf16": Feature(before=cast(torch.bfloat16)),
    "adapters in fp16": Feature(before=cast(torch.float16)),
    "adapters in fp32": Feature(before=cast(torch.float32)),
    "set_adapter": Feature(before=add("second", target_modules=QV), after=use("second")),
    "add_adapter": Feature(after=both(add("second", r=6), use("second"))),
    "add_adapter, other targets": Feature(
        options=dict(target_modules=["q_proj", "down_proj"]),
        after=both(add("second", target_modules=["q_proj", "v_proj"]), use("second")),
    ),
    "delete_adapter": Feature(
        before=add("second"), after=both(use("second"), lambda model: model.delete_adapter("default"))
    ),
}


def float64(model: Any) -> Any:
    """A copy in float64, 4-bit weights expanded."""
    double = copy.deepcopy(model)
    for name, module in list(double.named_modules()):
        if type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer"):
            import bitsandbytes.functional as bnb

            weight: Any = module.weight
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = bnb.dequantize_4bit(weight.data, weight.quant_state)
            linear.weight.requires_grad_(False)
            if module.bias is not None:
                linear.bias = module.bias
            double.set_submodule(name, linear)
    return double.double()


def measured(model: Any, batches: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`_measured` of several batches together: with one, a few roundings of a small adapter decide."""
    found = [_measured(model, ids) for ids in batches]
    return {name: torch.cat([one[name].flatten() for one in found]) for name in found[0]}


def _measured(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of all parameters of a kind (A, B, biases, saved modules) as one vector."""
    with torch.no_grad():
        tensors = {"logits": model(input_ids=ids).logits}
    if not model(input_ids=ids).logits.requires_grad:  # merged or disabled
        return tensors
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, gradient in sorted(loss_and_gradients(model, ids)[1].items()):
        kind = next((kind for kind in ("_A.", "_B.", "bias") if kind in name), "other")
        kinds.setdefault(kind, []).append(gradient)
    return tensors | {kind: torch.cat([g.flatten() for g in found]) for kind, found in kinds.items()}


def hold_to_contract(fused: dict[str, Any], eager: dict[str, Any], truth: dict[str, Any]) -> None:
    """Each one's error is at most 1.5 times eager's + 1e-6."""
    assert fused.keys() == eager.keys() == truth.keys()
    for name, want in truth.items():
        assert fused[name].dtype == eager[name].dtype, name
        errors = [relative_error(given[name], want) for given in (fused, eager)]
        result = Comparison(tensor=name, error=errors[0], eager_error=errors[1])
        assert result.passed, str(result)


def seeded(base: Base, feature: Feature, device: str) -> Any:
    model = lora(base.model(device), **feature.options)
    feature.before(model)
    return model.train()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Merge lora module to 4-bit")
@pytest.mark.filterwarnings("ignore:Unmerge lora module to 4-bit", "ignore:Adapter .* was active")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_fused_by_the_contract_or_left_with_the_reason(base: Base, feature: Feature, device: str) -> None:
    if feature.cuda and (device == "cpu" or base.four_bit is not None):
        pytest.skip("PEFT makes this start on a GPU, from weights that are not quantized")
    if feature.full and base.four_bit is not None and device == "cuda" and "quant_storage" in base.four_bit:
        pytest.skip("PEFT takes the packed bytes for a weight, and decomposes them")
    if feature.full and base.four_bit is not None:
        with pytest.raises((TypeError, RuntimeError)):  # PEFT's own: it needs a weight to decompose
            seeded(base, feature, device)
        return
    plain = seeded(base, feature, device)
    model = seeded(base, feature, device)
    with counting_kernels() as calls:
        acceleration = accelerate(model)
        watch = ForwardCalls(acceleration)
        feature.after(plain)
        feature.after(model)
        count = feature.batches if base.dtype in LOW else 1
        ids = [batch(plain, rows=2, tokens=32, seed=seed) for seed in range(count)]
        truth, eager = measured(float64(plain), ids), measured(plain, ids)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(input_ids=ids[0])  # adapters that are new are proven here
        calls.clear()
        with watch.watching():
            fused = measured(model, ids)
    hold_to_contract(fused, eager, truth)
    ran = calls["lora_linear"] + calls["lora_mlp"]
    said = " ".join([*reasons(acceleration.report).values(), *(str(w.message) for w in caught)])
    lora_sites = {name for name, op in patched_ops(acceleration.report).items() if op.startswith("lora_")}
    original = set(watch.original) & lora_sites
    if feature.left is not None:
        assert re.search(feature.left, said) and not ran
    else:
        assert ran and not original, original


# Dropout


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp32", "bf16", "nf4 nested"])
def test_dropout(name: str, device: str) -> None:
    """Zeros at the asked rate, the same for a seed, and the same ones in the backward."""
    rate = 0.25
    feature = Feature(options=dict(lora_dropout=rate, target_modules=["o_proj"], r=64, lora_alpha=64))
    model = seeded(BASES[name], feature, device)
    layer: Any = model.get_submodule(f"{ATTENTION}.o_proj")
    wide_input = layer.in_features
    with torch.no_grad():  # x A^T B^T = x: what is dropped can be read off
        layer.lora_A["default"].weight.copy_(torch.eye(wide_input))
        layer.lora_B["default"].weight.copy_(torch.eye(wide_input))
    with counting_kernels() as calls:
        accelerate(model)
        calls.clear()
        x = torch.ones(40, 50, wide_input, device=device, dtype=BASES[name].dtype, requires_grad=True)
        draws = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            y = layer(x)
            draws.append(y.detach())
        assert calls["lora_linear"] == 3
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with torch.no_grad():
        term = (draws[0] - layer.base_layer(x)).float()
    kept = term > 0.5
    assert abs(kept.float().mean().item() - (1 - rate)) < 5e-3  # sqrt(p (1 - p) / 128,000) = 0.0012
    rows, columns = kept.float().mean((0, 1)), kept.float().mean(2)
    assert (rows - (1 - rate)).abs().max() < 0.06 and columns.std() < 0.09  # no stripes
    torch.testing.assert_close(term[kept].mean().item(), 1 / (1 - rate), rtol=2e-2, atol=0)
    torch.manual_seed(0)
    layer.lora_A["default"].weight.requires_grad_(False)
    layer(x).float().sum().backward()
    with torch.no_grad():
        reference = torch.ones_like(x, requires_grad=False)
        weight = float64(model).get_submodule(f"{ATTENTION}.o_proj").base_layer.weight
        base_gradient = weight.sum(0).expand_as(reference)
    assert x.grad is not None
    passed = (x.grad.double() - base_gradient).float() > 0.5
    assert torch.equal(passed, kept)


# Bases that are left to PEFT


class FakeBase(nn.Linear):
    """Stands in for a quantized layer of a library that is not installed."""


def fake_base(kind: str, module: str) -> nn.Module:
    made: Any = type(kind, (FakeBase,), {"__module__": module})
    layer = made(32, 32, bias=False)
    layer.requires_grad_(False)
    return layer


def peft_class(name: str, module: str) -> Any:
    """PEFT's own class; where PEFT does not define it without the library, PEFT's Linear under that name."""
    import importlib

    found = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name, None)
    if found is not None:
        return found
    from peft.tuners.lora.layer import Linear

    return type(name, (Linear,), {"__module__": f"peft.tuners.lora.{module}"})


LEFT = {
    "GPTQ": ("GPTQLoraLinear", "gptq", "QuantLinear", "gptqmodel.nn_modules"),
    "AWQ": ("AwqLoraLinear", "awq", "WQLinear_GEMM", "awq.modules"),
    "torchao": ("TorchaoLoraLinear", "torchao", "Linear", "torchao.quantization"),
    "HQQ": ("HqqLoraLinear", "hqq", "HQQLinear", "hqq.core.quantize"),
    "EETQ": ("EetqLoraLinear", "eetq", "EetqLinear", "eetq.modules"),
    "AQLM": ("AqlmLoraLinear", "aqlm", "QuantizedLinear", "aqlm.inference"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_quantized_bases_of_other_libraries_are_left_to_peft(kind: str) -> None:
    """PEFT's own class of LoRA layer over a base that stands in for the library's."""
    layer_class, module, base_class, base_module = LEFT[kind]
    model = lora(wide(num_hidden_layers=1), target_modules=["o_proj"])
    made = peft_class(layer_class, module)
    config = peft.LoraConfig(r=4, target_modules=["o_proj"])
    layer = made.__new__(made)
    nn.Module.__init__(layer)
    from peft.tuners.lora.layer import LoraLayer

    base = fake_base(base_class, base_module)
    LoraLayer.__init__(layer, base)
    layer.fan_in_fan_out = False
    layer._active_adapter = "default"
    layer.update_layer("default", 4, lora_alpha=8, config=config)
    model.set_submodule(f"{ATTENTION}.o_proj", layer)
    report = accelerate(model).report
    assert layer_class in reasons(report)[f"{ATTENTION}.o_proj", "lora_linear"]
    assert f"{ATTENTION}.o_proj" not in patched_ops(report)


def test_llm_int8_is_left_to_peft() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = wide(num_hidden_layers=1)
    o = model.model.layers[0].self_attn.o_proj
    new = bnb.nn.Linear8bitLt(o.in_features, o.out_features, bias=False, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(o.weight.data, requires_grad=False, has_fp16_weights=False)
    model.model.layers[0].self_attn.o_proj = new.to("cpu")
    model.is_loaded_in_8bit = True
    adapted = lora(model, target_modules=["o_proj", "q_proj"])
    assert type(adapted.get_submodule(f"{ATTENTION}.o_proj")).__name__ == "Linear8bitLt"
    report = accelerate(adapted).report
    assert "Linear8bitLt" in reasons(report)[f"{ATTENTION}.o_proj", "lora_linear"]
    assert patched_ops(report)[f"{ATTENTION}.q_proj"] == "lora_linear"


def test_fan_in_fan_out_is_left_to_peft() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=104, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = lora(model, target_modules=["c_attn"], fan_in_fan_out=True)
    ids = batch(adapted)
    plain = loss_and_gradients(adapted.eval(), ids)
    report = accelerate(adapted).report
    (reason,) = {text for (_, op), text in reasons(report).items() if op == "lora_linear"}
    assert "fan_in_fan_out" in reason
    fused = loss_and_gradients(adapted, ids)
    assert all(torch.allclose(fused[1][name], g, rtol=1e-4, atol=1e-6) for name, g in plain[1].items())


# Files


def trained(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        ids = batch(model, seed=step, tokens=24)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp32", "bf16", "nf4 nested"])
def test_adapter_files_after_training_are_plain_peft_s(name: str, device: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    feature = Feature(options=dict(modules_to_save=["lm_head"], rank_pattern={"q_proj": 2}))
    plain, fused = (seeded(BASES[name], feature, device) for _ in range(2))
    accelerate(fused)
    for folder, model in (("plain", plain), ("fused", fused)):
        trained(model).save_pretrained(tmp_path / folder)
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "fused")]
    kinds = [{key: (tuple(t.shape), t.dtype) for key, t in file.items()} for file in files]
    assert kinds[0] == kinds[1]
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("plain", "fused")]
    assert names[0] == names[1]
    loaded = peft.PeftModel.from_pretrained(BASES[name].model(device), tmp_path / "fused").eval()
    ids = batch(plain, tokens=32)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.float() for model in (fused, loaded))
        start = seeded(BASES[name], feature, device).eval()(input_ids=ids).logits.float()
    tolerance = 2e-2 if BASES[name].dtype in LOW else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert (ours - start).abs().max() > 2 * tolerance  # it did learn


# A small update


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bf16", "nf4 nested, bf16"])
def test_the_share_of_a_small_update_that_survives(
    name: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """<y - y_base, t> / |t|^2 of the true LoRA term t, where |t| is a thousandth of |y| as in first steps.

    y_base is what the base layer gives in its dtype. With K extended by the rank (Triton kernels, 4-bit
    weights) the whole sum is rounded once; eager rounds the base's output first. Over weights in 16 bits the
    matmul adds to the LoRA term: rounded once on a CPU, while cuBLAS rounds its part before, as eager does.
    """
    model = seeded(BASES[name], Feature(options=dict(target_modules=["o_proj"], r=16)), device)
    layer: Any = model.get_submodule(f"{ATTENTION}.o_proj")
    double: Any = float64(model).get_submodule(f"{ATTENTION}.o_proj")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, layer.in_features, generator=generator).to(device, torch.bfloat16)
    with torch.no_grad():
        base = double.base_layer(x.double())
        size = (double(x.double()) - base).norm() / base.norm()
        for each in (layer, double):
            each.lora_B["default"].weight.mul_(1e-3 / size.item())
        double.lora_B["default"].weight.copy_(layer.lora_B["default"].weight)
        true = double(x.double()) - base
        rounded = layer.base_layer(x).double()

        def share(y: torch.Tensor) -> float:
            return float(((y.double() - rounded) * true).sum() / true.square().sum())

        with torch.autocast(device, dtype=torch.bfloat16):
            eager = share(layer(x))
            accelerate(model)
            ours = share(layer(x))
    with capsys.disabled():
        print(f"\n{name} on {device}: {eager:.2f} of a small LoRA term survives in eager, {ours:.2f} in ours")
    assert ours >= 0.9 * eager
    assert ours > 0.8 or (device == "cuda" and name == "bf16")
