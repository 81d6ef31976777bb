"""Adapters that give back what quantization took: the best of their rank, in files that plain PEFT loads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn

from sloth_plugins.quantization.lora_init import adapter_tensors, check_rank, lora_factors, save_adapter

NAME = "model.layers.0.mlp.up_proj"


def problem(n: int, k: int, *, dead: int = 0, tokens: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what rounding to few values makes of it, and X^T X of inputs of very different sizes."""
    generator = torch.Generator().manual_seed(n * k + dead)
    weight = torch.randn(n, k, generator=generator) * 0.05
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x *= torch.logspace(-2, 1, k)
    x[:, k - dead :] = 0
    return weight, (weight / 0.03).round() * 0.03, x.T @ x


def loss(residual: Tensor, hessian: Tensor) -> float:
    return torch.trace(residual.double() @ hessian.double() @ residual.double().T).item()


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    plain = hessian.double()
    return plain + damping * plain.diagonal().mean() * torch.eye(len(plain), dtype=torch.float64)


def best(residual: Tensor, hessian: Tensor, rank: int) -> float:
    """The least loss of any update of this rank: singular values beyond it, in the weighted norm."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.svdvals(residual.double() @ root)[rank:].square().sum().item()


SHAPES = [(48, 40), (40, 48), (200, 96), (96, 200), (333, 130), (130, 333)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("dead", [0, 7])
def test_it_is_the_truncated_svd_of_the_weighted_norm(shape: tuple[int, int], rank: int, dead: int) -> None:
    weight, quantized, hessian = problem(*shape, dead=dead)
    a, b = lora_factors(NAME, weight, quantized, hessian, rank)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    assert a.dtype == b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous()
    residual, metric = weight - quantized, damped(hessian)
    least = best(residual, metric, rank)
    assert loss(residual - b @ a, metric) == pytest.approx(least, rel=1e-3)
    assert loss(residual - b @ a, metric) < loss(residual, metric)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_no_other_update_of_the_rank_is_better(shape: tuple[int, int]) -> None:
    weight, quantized, hessian = problem(*shape)
    residual, metric = weight - quantized, damped(hessian)
    a, b = (factor.double() for factor in lora_factors(NAME, weight, quantized, hessian, 4))
    found = loss(residual - b @ a, metric)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            other_a, other_b = (
                factor + size * factor.std() * torch.randn(factor.shape, generator=generator).double()
                for factor in (a, b)
            )
            assert loss(residual - other_b @ other_a, metric) > found * (1 - 1e-6)


def test_weighting_is_worth_it_and_plain_is_loftq() -> None:
    weight, quantized, hessian = problem(120, 80)
    residual = (weight - quantized).double()
    weighted, plain = (
        residual - torch.matmul(*reversed(lora_factors(NAME, weight, quantized, metric, 6))).double()
        for metric in (hessian, None)
    )
    assert loss(weighted, hessian) < 0.9 * loss(plain, hessian)
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    torch.testing.assert_close(residual - plain, u[:, :6] * s[:6] @ v[:6], rtol=0, atol=1e-4)
    down, up = lora_factors(NAME, weight, quantized, hessian, 6, damping=1e6)  # hides all that H says
    torch.testing.assert_close(up @ down, (residual - plain).float(), rtol=0, atol=1e-3)
    a, b = lora_factors(NAME, weight, quantized, None, 6)
    torch.testing.assert_close(a.double().norm(dim=1), s[:6].sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(b.double().norm(dim=0), s[:6].sqrt(), rtol=1e-3, atol=0)


def test_inputs_that_never_came_get_no_noise() -> None:
    """Without damping, too: no root of a singular H is inverted."""
    weight, quantized, hessian = problem(150, 90, dead=30, tokens=40)
    a, b = lora_factors(NAME, weight, quantized, hessian, 8, damping=0.0)
    residual = weight - quantized
    assert loss(residual - b @ a, hessian) == pytest.approx(best(residual, hessian, 8), rel=1e-3)
    assert (residual - b @ a).norm() <= residual.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype: torch.dtype) -> None:
    weight, quantized, hessian = problem(100, 70)
    weight, quantized = weight.to(dtype), quantized.to(dtype)
    given = lora_factors(NAME, weight, quantized, hessian, 4)
    widened = lora_factors(NAME, weight.float(), quantized.float(), hessian, 4)
    assert all(torch.equal(one, other) for one, other in zip(given, widened, strict=True))
    assert given[0].dtype == torch.float32


def test_the_same_bits_again_whatever_else_is_drawn() -> None:
    weight, quantized, hessian = (tensor.double() for tensor in problem(333, 130))
    before = weight.clone(), hessian.clone()
    first = lora_factors(NAME, weight, quantized, hessian, 5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = lora_factors(NAME, weight, quantized, hessian, 5)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("shape", [(333, 130), (40, 48)], ids=str)
def test_what_lost_nothing_starts_as_peft_starts(shape: tuple[int, int]) -> None:
    weight, _, hessian = problem(*shape)
    a, b = lora_factors(NAME, weight, weight, hessian, 4)
    fresh = nn.Linear(shape[1], 4, bias=False).weight  # kaiming_uniform_(a=sqrt(5)), as PEFT's A
    assert not b.any() and a.abs().max() <= fresh.abs().max() * 1.1
    assert a.std().item() == pytest.approx(fresh.std().item(), rel=0.2)
    assert not torch.equal(a, lora_factors(f"{NAME}s", weight, weight, hessian, 4)[0])


def test_a_residual_of_smaller_rank_is_given_back_whole() -> None:
    weight, _, hessian = problem(333, 130)
    removed = torch.outer(torch.arange(333.0), torch.arange(130.0)) * 1e-4
    a, b = lora_factors(NAME, weight, weight - removed, hessian, 4)
    torch.testing.assert_close(b @ a, removed, rtol=1e-3, atol=1e-4)
    assert a.norm(dim=1).min() > 0


@pytest.mark.parametrize("rank", [0, -1, 41, 4.0, True])
def test_a_rank_that_does_not_fit_is_one_sentence(rank: Any) -> None:
    weight, quantized, hessian = problem(48, 40)
    with pytest.raises(ValueError, match=rf"^lora_init={rank!r}: allowed is a rank from 1 to 40, .*{NAME}$"):
        lora_factors(NAME, weight, quantized, hessian, rank)


def test_the_narrowest_linear_bounds_the_rank() -> None:
    shapes = {"q": (64, 64), "k": (32, 64), "down": (64, 128)}
    check_rank(32, shapes)
    with pytest.raises(ValueError, match="from 1 to 32, the smaller side of k"):
        check_rank(33, shapes)
    lora_factors("k", *problem(48, 40), 40)


@pytest.mark.parametrize("broken", ["weight", "hessian"])
def test_what_is_not_finite_is_one_sentence(broken: str) -> None:
    weight, quantized, hessian = problem(48, 40)
    (weight if broken == "weight" else hessian)[0, 0] = torch.inf
    with pytest.raises(ValueError, match=f"^{NAME}: .*finite"):
        lora_factors(NAME, weight, quantized, hessian, 4)


# Files

peft = pytest.importorskip("peft", reason="PEFT is not installed")
IDS = torch.tensor([[1, 10, 20, 30, 40], [2, 5, 9, 70, 3]])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def rounded_model() -> tuple[Any, Any, dict[str, Tensor]]:
    """A model, one with coarse weights in its layers, and each linear's X^T X in it."""
    original, coarse = (tiny_model("llama", hidden_size=64, head_dim=16) for _ in range(2))
    hessians: dict[str, Tensor] = {}
    for name, module in linears(coarse).items():
        if name != "lm_head":
            module.weight.data = (module.weight.data / 0.02).round() * 0.02
            module.register_forward_hook(
                lambda m, args, out, name=name: hessians.update(
                    {name: args[0].flatten(0, -2).T @ args[0].flatten(0, -2)}
                )
            )
    with torch.no_grad():
        coarse(torch.arange(3, 103)[None])
    for module in linears(coarse).values():
        module._forward_hooks.clear()
    return original, coarse, hessians


def factors_of(original: Any, coarse: Any, hessians: dict[str, Tensor], rank: int = 6) -> dict[str, Any]:
    return {
        name: lora_factors(name, linears(original)[name].weight, linears(coarse)[name].weight, hessian, rank)
        for name, hessian in hessians.items()
    }


def saved(directory: Path, factors: dict[str, Any], model: Any, **options: Any) -> Path:
    tensors = {key: t for name, pair in factors.items() for key, t in adapter_tensors(name, *pair).items()}
    save_adapter(directory, tensors, linears(model), "OUT", **options)
    return directory


def test_plain_peft_loads_it_with_our_values(tmp_path: Path) -> None:
    original, coarse, hessians = rounded_model()
    factors = factors_of(original, coarse, hessians)
    with torch.no_grad():
        truth, without = original(IDS).logits, coarse(IDS).logits
    saved(tmp_path, factors, coarse)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted({name.rpartition(".")[2] for name in factors})
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (6, 6, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "OUT" and "sloth" not in json.dumps(config)

    model = peft.PeftModel.from_pretrained(coarse, tmp_path, is_trainable=True)
    state = peft.get_peft_model_state_dict(model)
    assert len(state) == 2 * len(factors)
    for name, pair in factors.items():
        for key, tensor in adapter_tensors(name, *pair).items():
            assert torch.equal(state[key], tensor)
    merged = tiny_model("llama", hidden_size=64, head_dim=16)
    for name, (a, b) in factors.items():
        linears(merged)[name].weight.data = (
            model.get_base_model().get_submodule(name).base_layer.weight + b @ a
        )
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(logits, merged(IDS).logits)
    assert (logits - truth).norm() < 0.9 * (without - truth).norm()

    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(factors) and all(grad.any() for grad in gradients.values())


def test_only_what_was_given_gets_an_adapter(tmp_path: Path) -> None:
    original, coarse, hessians = rounded_model()
    factors = factors_of(original, coarse, hessians)
    del factors["model.layers.1.mlp.down_proj"], factors["model.layers.0.self_attn.v_proj"]
    saved(tmp_path, factors, coarse)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert "q_proj" in targets and "model.layers.0.mlp.down_proj" in targets and "down_proj" not in targets
    state = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(coarse, tmp_path))
    assert set(state) == {key for name, pair in factors.items() for key in adapter_tensors(name, *pair)}


def test_the_same_files_again_in_any_order_and_in_16_bits(tmp_path: Path) -> None:
    original, coarse, hessians = rounded_model()
    factors = factors_of(original, coarse, hessians)
    turned = dict(reversed(factors_of(original, coarse, hessians).items()))
    first, again = saved(tmp_path / "first", factors, coarse), saved(tmp_path / "again", turned, coarse)
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    half = saved(tmp_path / "half", factors, coarse, dtype=torch.bfloat16) / "adapter_model.safetensors"
    assert half.stat().st_size < 0.6 * (first / half.name).stat().st_size
    model = peft.PeftModel.from_pretrained(coarse, tmp_path / "half")
    assert torch.isfinite(model(IDS).logits).all()


def test_no_layer_is_further_from_what_it_was() -> None:
    """In the weighted norm, for each linear; more rank is never worse."""
    original, coarse, hessians = rounded_model()
    for name, hessian in hessians.items():
        residual = linears(original)[name].weight.data - linears(coarse)[name].weight.data
        losses = [loss(residual, damped(hessian))]
        for rank in (1, 4, 16, 32):
            a, b = lora_factors(name, residual, torch.zeros_like(residual), hessian, rank)
            losses.append(loss(residual - b @ a, damped(hessian)))
        assert all(later < earlier for earlier, later in itertools.pairwise(losses)), name


def test_on_a_checkpoint_in_4_bits(tmp_path: Path) -> None:
    """Through bitsandbytes: what is loaded is what was saved, it trains, and it is nearer to the original."""
    transformers = pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    wide = dict(hidden_size=64, intermediate_size=128, head_dim=16)
    original = tiny_model("llama", dtype=torch.bfloat16, **wide)
    original.save_pretrained(tmp_path / "model")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "model", quantization_config=config).save_pretrained(tmp_path / "out")
    coarse = load(tmp_path / "out")
    factors = {
        name: lora_factors(
            name,
            original.get_submodule(name).weight,
            bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state),
            None,
            32,
        )
        for name, module in coarse.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert len(factors) == 14
    saved(tmp_path / "adapter", factors, coarse)
    with torch.no_grad():
        without = coarse(IDS).logits.float()
    model = peft.PeftModel.from_pretrained(load(tmp_path / "out"), tmp_path / "adapter", is_trainable=True)
    plain = peft.get_peft_model(
        load(tmp_path / "out"),
        peft.LoraConfig(r=32, lora_alpha=32, target_modules=list(factors), task_type="CAUSAL_LM"),
    )
    tensors = {key: t for name, pair in factors.items() for key, t in adapter_tensors(name, *pair).items()}
    peft.set_peft_model_state_dict(plain, tensors)
    with torch.no_grad():
        truth, logits = original(IDS).logits.float(), model.eval()(IDS).logits.float()
        assert torch.equal(logits, plain.eval()(IDS).logits.float())
    assert (logits - truth).norm() < 0.8 * (without - truth).norm()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
