"""LoRA on the CPU: fused and PEFT's own forward give the same loss, gradients and files; else a reason."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import hashlib
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CountingKernels,
    ForwardCalls,
    batch,
    forwards,
    in_float64,
    loss_and_gradients,
    make_plugin,
    manager_with,
    no_further,
    no_sloth_warnings,
    patched_ops,
    reasons,
    tiny_model,
)
from torch import nn

import sloth_plugins as sloth
from sloth_plugins import lora as planning

peft = pytest.importorskip("peft", reason="peft is not installed")
from lora_models import ATTENTION, LAYER, accelerate, counted, in_4bit, lora, randomize, wide  # noqa: E402


def assert_same(some: Any, others: Any, truth: Callable[[], dict[str, torch.Tensor]] | None = None) -> None:
    """(loss, gradients) of two models, to float32's rounding; what is further apart is held against `truth`,
    if it is given."""
    torch.testing.assert_close(some[0], others[0], rtol=1e-5, atol=0)
    assert some[1].keys() == others[1].keys()
    scale = max(g.norm() for g in others[1].values())
    for name, gradient in others[1].items():
        error = (some[1][name] - gradient).norm()
        close = error <= 1e-5 * max(gradient.norm(), 1e-2 * scale)
        assert close or (truth is not None and no_further(some[1][name], gradient, truth()[name])), (
            name,
            float(error),
            float(gradient.norm()),
        )


def fused_equals_peft(model: Any) -> None:
    """The fused path runs everywhere, gives what PEFT gives, and goes away without a trace."""
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    acceleration = accelerate(model)
    with ForwardCalls(acceleration).watching() as calls:
        fused = loss_and_gradients(model, ids)
    calls.check()
    acceleration.undo()
    assert not forwards(model)
    assert_same(fused, plain, functools.cache(lambda: in_float64(model, ids)))
    again = loss_and_gradients(model, ids)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][name], g) for name, g in plain[1].items())


FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "glm4", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family == "qwen3_moe" else "all-linear"
    model = lora(tiny_model(family), target_modules=targets)
    fused_equals_peft(model)
    report = accelerate(model).report
    assert not [op for _, op in reasons(report) if op.startswith("lora")]
    ops = patched_ops(report)
    layers = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    mlps = {n for n, op in ops.items() if op == "lora_mlp"}
    assert layers and all(ops.get(n) == "lora_linear" or n.rpartition(".")[0] in mlps for n in layers)
    assert bool(mlps) == (family not in ("phi3", "glm4", "qwen3_moe"))


@pytest.mark.parametrize(
    ("targets", "linear", "mlp"),
    [
        (["q_proj", "v_proj"], 1, 0),
        (["q_proj", "k_proj", "v_proj"], 1, 0),
        (["q_proj", "k_proj", "v_proj", "o_proj"], 2, 0),
        (["up_proj"], 0, 1),
        ("all-linear", 2, 1),
    ],
)
def test_a_group_is_one_call_of_the_kernel(targets: Any, linear: int, mlp: int) -> None:
    model = lora(tiny_model("llama"), target_modules=targets)
    layers = 2
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    with counted(model) as calls:
        assert_same(loss_and_gradients(model, ids), plain)
        assert (calls["lora_linear"], calls["lora_mlp"]) == (layers * linear, layers * mlp)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank 1": dict(r=1),
    "rank 5": dict(r=5),
    "rank 16": dict(r=16),
    "rslora": dict(r=8, use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 2, "up_proj": 7}, alpha_pattern={"v_proj": 32}),
    "bias of all": dict(bias="all"),
    "modules_to_save": dict(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    "head": dict(target_modules=["lm_head", "o_proj"]),
    "pissa": dict(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_peft(options: dict[str, Any]) -> None:
    fused_equals_peft(lora(tiny_model("qwen2"), **options))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_bias_of_lora() -> None:
    fused_equals_peft(lora(tiny_model("qwen2"), lora_bias=True))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_4bit_bases(quant_type: str, nested: bool) -> None:
    model = lora(in_4bit(wide("qwen2"), quant_type=quant_type, compress_statistics=nested))
    fused_equals_peft(model)
    assert set(patched_ops(accelerate(model).report).values()) >= {"lora_linear", "lora_mlp"}


def test_4bit_siblings_without_lora_join() -> None:
    model = lora(in_4bit(wide()), target_modules=["q_proj", "v_proj"])
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    with counted(model) as calls:
        assert_same(loss_and_gradients(model, ids), plain)
        assert calls["lora_linear"] == 2 and calls["lora_mlp"] == 0
    assert patched_ops(accelerate(model).report)[f"{ATTENTION}.k_proj"] == "lora_linear"


def test_few_rows_without_grad_are_left_to_bitsandbytes() -> None:
    model = lora(in_4bit(wide()))
    q, mlp = model.get_submodule(f"{ATTENTION}.q_proj"), model.get_submodule(f"{LAYER}.mlp")
    with counted(model) as calls:

        def ran(rows: int) -> tuple[int, int]:
            calls.clear()
            x = torch.randn(1, rows, 64)
            torch.testing.assert_close(q(x), own(q, x))
            mlp(x)
            return calls["lora_linear"], calls["lora_mlp"]

        assert ran(planning.FEW_ROWS) == ran(1) == (1, 1)
        with torch.no_grad():
            assert ran(1) == ran(planning.FEW_ROWS) == (0, 0)
            assert ran(planning.FEW_ROWS + 1) == (1, 1)
    dense = lora(wide())
    with counted(dense) as calls, torch.no_grad():
        dense.get_submodule(f"{ATTENTION}.q_proj")(torch.randn(1, 1, 64))
        assert calls["lora_linear"] == 1


def test_4bit_layers_are_not_repacked_for_inference() -> None:
    """As bitsandbytes does in eval mode, for good, on the CPUs where the flag is set."""
    model = lora(in_4bit(wide("qwen2"), compute_dtype=None)).eval()
    bases: list[Any] = [m.base_layer for m in model.modules() if hasattr(m, "lora_A")]
    for base in bases:
        base.support_avx512bf16_for_cpu = True
        base.bias = base.bias if base.bias is None else nn.Parameter(base.bias.bfloat16())
    packed = [base.weight.data.clone() for base in bases]
    report = accelerate(model).report
    assert not [text for text in reasons(report).values() if "packed" in text]
    for base, before in zip(bases, packed, strict=True):
        assert torch.equal(base.weight.data, before)
        assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
        assert base.support_avx512bf16_for_cpu and base.compute_dtype is None
        assert not base.compute_type_is_set
        assert base.bias is None or base.bias.dtype == torch.bfloat16


def test_rope_stays_where_adapters_are_float32_and_activations_bfloat16() -> None:
    """A kernel that rounds otherwise moves their float32 gradients by bfloat16's roundings."""
    spec = next(spec for spec in CountingKernels().sloth_register_kernels() if spec.op == "rope")

    def rope(*tensors: torch.Tensor, **options: Any) -> Any:
        outputs = spec.function(*(t.float() for t in tensors), **options)
        return tuple(y.to(t.dtype) for y, t in zip(outputs, tensors, strict=False))

    model = lora(in_4bit(wide(dtype=torch.bfloat16), compute_dtype=torch.bfloat16))
    adapters = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert adapters == {torch.float32}
    offered = make_plugin(sloth_register_kernels=lambda: [dataclasses.replace(spec, function=rope)])
    report = accelerate(model, manager=manager_with(other=offered)).report
    assert patched_ops(report)[ATTENTION] == "rope", reasons(report)


def test_large_weights_are_verified_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "ELEMENTS", 64 * 64)
    for model in (lora(in_4bit(wide())), lora(wide())):
        report = accelerate(model).report
        assert {"lora_linear", "lora_mlp"} <= set(patched_ops(report).values())
        assert not [op for _, op in reasons(report) if op.startswith("lora")]


# The adapters' state, read at each call


def both(change: Callable[[Any], None], **options: Any) -> tuple[Any, Any]:
    """A plain and an accelerated model, the change made after acceleration."""
    plain, fused = (lora(tiny_model("llama"), **options) for _ in range(2))
    accelerate(fused)
    for model in (plain, fused):
        change(model)
    return plain, fused


def add_second(model: Any) -> None:
    torch.manual_seed(11)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_alpha=5))
    randomize(model)


def use_second(model: Any) -> None:
    add_second(model)
    model.set_adapter("second")


def delete_first(model: Any) -> None:
    use_second(model)
    model.delete_adapter("default")


def scale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 0.3


def freeze_a(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "add_adapter": add_second,
    "set_adapter": use_second,
    "delete_adapter": delete_first,
    "scaling": scale,
    "frozen A": freeze_a,
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_after_acceleration(change: Callable[[Any], None]) -> None:
    plain, fused = both(change)
    ids = batch(plain)
    with no_sloth_warnings():
        assert_same(loss_and_gradients(fused, ids), loss_and_gradients(plain, ids))


def test_an_adapter_of_other_shapes_is_proven_when_first_met(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[int] = []
    prove = planning._prove
    monkeypatch.setattr(planning, "_prove", lambda *args: (proofs.append(1), prove(*args))[1])
    plain, fused = both(lambda model: None, target_modules=["q_proj", "v_proj", "up_proj"])
    ids = batch(plain)

    def same(expected: int) -> None:
        proofs.clear()
        state = torch.get_rng_state()
        want = loss_and_gradients(plain, ids)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            assert_same(loss_and_gradients(fused, ids), want)
        assert len(proofs) == expected
        torch.set_rng_state(state)

    def each(change: Callable[[Any], Any]) -> None:
        for model in (plain, fused):
            torch.manual_seed(11)
            change(model)
            randomize(model)

    targets = ["q_proj", "v_proj", "up_proj"]
    same(0)
    each(lambda m: m.add_adapter("twin", peft.LoraConfig(r=4, target_modules=targets)))
    each(lambda m: m.set_adapter("twin"))
    same(0)  # the same shapes
    each(lambda m: m.add_adapter("third", peft.LoraConfig(r=6, target_modules=targets)))
    each(lambda m: m.set_adapter("third"))
    same(2)  # one for the linear groups, one for the MLPs
    same(0)
    each(lambda m: m.set_adapter("default"))
    each(lambda m: m.delete_adapter("third"))
    same(0)
    each(lambda m: m.add_adapter("third", peft.LoraConfig(r=6, target_modules=["v_proj"])))
    each(lambda m: m.set_adapter("third"))
    same(0)


def test_an_adapter_that_fails_its_proof_is_left_to_peft() -> None:
    def add(model: Any) -> None:
        torch.manual_seed(11)
        model.add_adapter("second", peft.LoraConfig(r=6, target_modules="all-linear"))
        randomize(model)
        model.set_adapter("second")

    def broken(function: Any, error: Any) -> Any:
        def run(x: Any, *projections: Any, **options: Any) -> Any:
            result = function(x, *projections, **options)
            first = projections[0] if not isinstance(projections[0], list) else projections[0][0]
            if first.adapter is not None and first.adapter.a.shape[0] == 6:
                if error is not None:
                    raise error
                result = tuple(y * 1.01 for y in result) if isinstance(result, tuple) else result * 1.01
            return result

        return run

    for error, why in ((None, "less accurate than the contract"), (ValueError("no six"), "no six")):
        plugin = CountingKernels()
        offered = [
            dataclasses.replace(spec, function=broken(spec.function, error))
            for spec in plugin.sloth_register_kernels()
            if spec.op in ("lora_linear", "lora_mlp")
        ]
        manager = manager_with(broken=make_plugin(sloth_register_kernels=lambda: offered))  # noqa: B023
        plain, fused = (lora(tiny_model("llama")) for _ in range(2))
        acceleration = sloth.accelerate(fused, manager=manager)
        ids = batch(plain)
        assert_same(loss_and_gradients(fused, ids), loss_and_gradients(plain, ids))
        assert plugin.calls["lora_mlp"]
        add(plain)
        add(fused)
        with pytest.warns(UserWarning, match=why) as caught:
            found = loss_and_gradients(fused, ids)
        ours = [w for w in caught if str(w.message).startswith("sloth:")]
        assert len(ours) <= 3  # q k v, o, the MLP; not one a layer
        assert_same(found, loss_and_gradients(plain, ids))
        assert why in reasons(acceleration.report)[f"{ATTENTION}.q_proj", "lora_linear"]
        assert why in reasons(acceleration.report)[f"{LAYER}.mlp", "lora_mlp"]
        plugin.calls.clear()
        with no_sloth_warnings():
            loss_and_gradients(fused, ids)
        assert not plugin.calls["lora_mlp"] and not plugin.calls["lora_linear"]
        for model in (plain, fused):
            model.set_adapter("default")
        assert_same(loss_and_gradients(fused, ids), loss_and_gradients(plain, ids))
        assert plugin.calls["lora_mlp"] == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_proof_in_a_checkpointed_forward_disturbs_nothing(reentrant: bool) -> None:
    plain, fused = (lora(tiny_model("llama"), lora_dropout=0.3) for _ in range(2))
    for model in (plain, fused):
        model.enable_input_require_grads()
        model.train()
    ids = batch(plain)
    accelerate(plain)
    options = dict(r=3, lora_dropout=0.3, target_modules="all-linear")
    for model in (fused, plain):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        accelerate(model)
        torch.manual_seed(11)
        model.add_adapter("second", peft.LoraConfig(**options))
        randomize(model)
        model.set_adapter("second")
    accelerate(plain)  # proves it now, `fused` does in the forward
    with no_sloth_warnings():
        assert_same(loss_and_gradients(fused, ids), loss_and_gradients(plain, ids))


def test_disabled_and_merged_adapters() -> None:
    plain, fused = both(lambda model: None)
    ids = batch(plain)
    with torch.no_grad():
        active = plain(input_ids=ids).logits
        with plain.disable_adapter(), fused.disable_adapter():
            off = plain(input_ids=ids).logits
            torch.testing.assert_close(fused(input_ids=ids).logits, off)
        assert (active - off).abs().max() > 1e-3
        torch.testing.assert_close(fused(input_ids=ids).logits, active)
        fused.merge_adapter()
        torch.testing.assert_close(fused(input_ids=ids).logits, active, rtol=1e-4, atol=1e-5)
        with fused.disable_adapter():  # PEFT unmerges
            torch.testing.assert_close(fused(input_ids=ids).logits, off, rtol=1e-4, atol=1e-5)


def test_two_active_adapters_run_in_peft_and_that_is_said_once() -> None:
    def two(model: Any) -> None:
        add_second(model)
        model.base_model.set_adapter(["default", "second"])

    plain, fused = both(two)
    ids = batch(plain)
    with pytest.warns(UserWarning, match="sloth: several adapters are active at once") as caught:
        found = loss_and_gradients(fused, ids)
    assert len([w for w in caught if str(w.message).startswith("sloth:")]) <= 6  # one a patch at most
    assert_same(found, loss_and_gradients(plain, ids))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sloth:")
        loss_and_gradients(fused, ids)


def test_adapter_names_go_to_peft() -> None:
    plain, fused = both(add_second)
    ids = batch(plain)
    plain.eval(), fused.eval()
    with torch.no_grad():
        names = ["default", "second"]
        want = plain(input_ids=ids, adapter_names=names).logits
        assert torch.equal(fused(input_ids=ids, adapter_names=names).logits, want)


def test_dora_is_left_to_peft_with_the_reason() -> None:
    model = lora(tiny_model("llama"), use_dora=True, target_modules=["q_proj"])
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    report = accelerate(model).report
    assert reasons(report)[f"{ATTENTION}.q_proj", "lora_linear"] == "adapter 'default' is DoRA: left to PEFT"
    assert "lora_linear" not in patched_ops(report).values()
    assert_same(loss_and_gradients(model, ids), plain)
    with pytest.raises(sloth.SlothError, match="DoRA"):
        sloth.accelerate(lora(tiny_model("llama"), use_dora=True), strict=True)


def test_other_reasons() -> None:
    model = lora(tiny_model("llama"), target_modules=["q_proj", "embed_tokens", "o_proj"])
    model.get_submodule(f"{ATTENTION}.q_proj").base_layer.weight.requires_grad_(True)
    report = accelerate(model).report
    found = reasons(report)
    assert found[f"{ATTENTION}.q_proj", "lora_linear"] == "its base weight is trainable"
    assert "embedding" in found["base_model.model.model.embed_tokens", "lora_linear"]
    assert patched_ops(report)[f"{ATTENTION}.o_proj"] == "lora_linear"
    ia3 = peft.get_peft_model(tiny_model("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    assert any("no LoRA layer" in text for text in reasons(accelerate(ia3).report).values())


@pytest.mark.parametrize("op", ["lora_linear", "lora_mlp", "gated_mlp"])
def test_each_op_can_be_switched_off(op: str) -> None:
    model = lora(tiny_model("llama"))
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    ops = patched_ops(accelerate(model, disable=[op]).report)
    assert op not in ops.values()
    if op != "lora_linear":
        assert ops[f"{LAYER}.mlp.gate_proj"] == ops[f"{LAYER}.mlp.down_proj"] == "lora_linear"
    expected = {"lora_linear": "lora_mlp", "lora_mlp": "gated_mlp", "gated_mlp": None}
    assert ops.get(f"{LAYER}.mlp") == expected[op]
    assert_same(loss_and_gradients(model, ids), plain)


def test_without_verification() -> None:
    model = lora(tiny_model("llama"))
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    report = accelerate(model, verify=False).report
    assert patched_ops(report)[f"{LAYER}.mlp.gate_proj"] == "lora_linear"
    assert_same(loss_and_gradients(model, ids), plain)


def test_a_plan_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = lora(tiny_model("llama"))
    ops = patched_ops(sloth.plan(model))
    assert ops[f"{LAYER}.mlp"] == "lora_mlp" and ops[f"{ATTENTION}.q_proj"] == "lora_linear"


# Dropout, checkpointing, files, copies


def test_dropout_in_training_and_none_in_eval() -> None:
    model = lora(tiny_model("llama", num_hidden_layers=1), lora_dropout=0.4, target_modules=["q_proj"])
    layer = model.get_submodule(f"{ATTENTION}.q_proj")
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    base = layer.base_layer(x)
    model.eval()
    want = layer(x)
    with counted(model) as calls, torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        model.train()
        torch.manual_seed(0)
        draws = torch.stack([layer(x) for _ in range(600)])
        assert calls["lora_linear"] == 601
    term, mean = (want - base).detach(), draws.mean(0) - base.detach()
    assert (draws[0] != draws[1]).any()
    assert (mean - term).norm() / term.norm() < 0.12  # sqrt(p / (1 - p) / 600), with room
    assert (draws.std(0)).mean() > 0.1 * term.abs().mean()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("of_4bit", [False, True])
def test_gradient_checkpointing(reentrant: bool, dropout: float, of_4bit: bool) -> None:
    """4-bit layers too have few rows here: they must drop in the first forward what is dropped again."""
    model = lora(in_4bit(wide()) if of_4bit else tiny_model("llama"), lora_dropout=dropout)
    model.enable_input_require_grads()
    model.train()
    ids = batch(model)
    accelerate(model)
    whole = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    accelerate(model)
    assert_same(loss_and_gradients(model, ids), whole)


def test_files_are_peft_s_to_the_byte(tmp_path: Path) -> None:
    model = lora(tiny_model("llama"))

    def saved(name: str) -> dict[str, str]:
        model.save_pretrained(tmp_path / name)
        files = (tmp_path / name).iterdir()
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    keys, before = list(model.state_dict()), saved("before")
    accelerate(model)
    loss_and_gradients(model, batch(model))
    assert list(model.state_dict()) == keys and saved("after") == before


@pytest.mark.parametrize("of_4bit", [False, True])
def test_deep_copies_share_nothing(of_4bit: bool) -> None:
    model = lora(in_4bit(wide()) if of_4bit else tiny_model("llama"))
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    accelerate(model)
    clone = copy.deepcopy(model)
    assert_same(loss_and_gradients(clone, ids), plain)
    with torch.no_grad():
        for p in clone.parameters():
            if p.requires_grad:
                p.zero_()
    assert_same(loss_and_gradients(model, ids), plain)
    q, other = (m.get_submodule(f"{ATTENTION}.q_proj") for m in (model, clone))
    x = torch.randn(1, 3, q.in_features)
    q(x)  # waits for k and v
    torch.testing.assert_close(other(x), type(other).forward(other, x))
    accelerate(clone)
    assert patched_ops(accelerate(clone).report)[f"{ATTENTION}.q_proj"] == "lora_linear"


def test_nothing_keeps_the_model_alive() -> None:
    model = lora(tiny_model("llama"))
    accelerate(model)
    loss_and_gradients(model, batch(model))
    gone = weakref.ref(model.get_submodule(f"{ATTENTION}.q_proj"))
    del model
    gc.collect()
    assert gone() is None


# Groups


def projections() -> tuple[Any, tuple[Any, Any, Any]]:
    model = lora(tiny_model("llama"))
    return model, tuple(model.get_submodule(f"{ATTENTION}.{n}_proj") for n in "qkv")


def own(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return type(layer).forward(layer, x)


def test_any_order_other_tensors_and_siblings_that_are_not_called() -> None:
    model, (q, k, v) = projections()
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    with counted(model) as calls:

        def check(layers: list[tuple[Any, torch.Tensor]], kernel_calls: int) -> None:
            calls.clear()
            for layer, given in layers:
                torch.testing.assert_close(layer(given), own(layer, given))
            assert calls["lora_linear"] == kernel_calls

        check([(q, x), (k, x), (v, x)], 1)
        check([(v, x), (q, x), (k, x)], 1)
        check([(q, y), (k, y)], 1)  # v is not called
        check([(q, x), (k, x), (v, x)], 1)
        check([(q, x), (k, y), (v, y), (q, y)], 2)  # k starts a group of its own tensor
        check([(q, x), (q, x), (k, x), (v, x)], 2)  # called twice: the second time alone
        q(x)
        x.add_(1.0)  # the same object with other values
        check([(k, x), (q, x), (v, x)], 1)
        q(x)
        with torch.no_grad():
            assert not k(x).requires_grad
        with torch.inference_mode():
            z = torch.randn(2, 3, 32)
            check([(q, z), (k, z)], 2)


def test_gradients_where_a_sibling_is_not_used() -> None:
    model, (q, _, v) = projections()
    x = torch.randn(2, 3, 32, requires_grad=True)
    parameters = [q.lora_A["default"].weight, q.lora_B["default"].weight, v.lora_B["default"].weight, x]
    want = torch.autograd.grad(own(q, x).square().sum() + own(v, x).sum(), parameters)
    accelerate(model)
    found = torch.autograd.grad(q(x).square().sum() + v(x).sum(), parameters)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_forward_that_raises_leaves_a_right_model() -> None:
    model, (_, k, _) = projections()
    ids = batch(model)
    plain = loss_and_gradients(model, ids)
    with counted(model) as calls:

        def fail(module: nn.Module, args: Any) -> None:
            raise RuntimeError("no k today")

        handle = k.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no k today"):
            model(input_ids=ids)
        handle.remove()
        calls.clear()
        assert_same(loss_and_gradients(model, ids), plain)
        assert calls["lora_linear"] == 4
    group = next(
        cell.cell_contents
        for outer in k.__dict__["forward"].__func__.__closure__
        if callable(outer.cell_contents)
        for cell in getattr(outer.cell_contents, "__closure__", None) or ()
        if isinstance(cell.cell_contents, planning._Group)
    )
    assert group.x is None and not group.results


def test_hooks_on_what_is_passed_over_are_called() -> None:
    for name in ("self_attn.k_proj.base_layer", "mlp.up_proj", "mlp.down_proj.lora_A.default"):
        model = lora(tiny_model("llama"))
        ids = batch(model)
        plain = loss_and_gradients(model, ids)
        accelerate(model)
        seen: list[Any] = []
        handle = model.get_submodule(f"{LAYER}.{name}").register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        assert_same(loss_and_gradients(model, ids), plain)
        handle.remove()
        assert len(seen) == 1, name


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    plain, fused = both(lambda model: model.eval())
    ids = batch(plain)
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(fused.generate(**given), plain.generate(**given))


def test_bf16_autocast_keeps_dtypes() -> None:
    for make in (lambda: tiny_model("llama"), lambda: in_4bit(wide(), compute_dtype=torch.bfloat16)):
        model = lora(make(), target_modules=["q_proj", "k_proj"])
        q = model.get_submodule(f"{ATTENTION}.q_proj")
        accelerate(model)
        x = torch.randn(2, 3, q.in_features)
        for given in (x, x.bfloat16()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found, want = q(given), own(q, given)
            assert found.dtype == want.dtype
            torch.testing.assert_close(found.float(), want.float(), rtol=2e-2, atol=2e-2)


def test_under_torch_compile_peft_s_code_is_traced() -> None:
    model = lora(tiny_model("llama"))
    q = model.get_submodule(f"{ATTENTION}.q_proj")
    x = torch.randn(2, 3, 32)
    accelerate(model)
    compiled = torch.compile(lambda x: q(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), own(q, x))
