"""Rounding to NF4 and the plan: bitsandbytes' own format, a smaller error, a knapsack that is solved."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes")
import bitsandbytes.functional as bnb
from helpers import make_plugin, manager_with, tiny_model

import sloth_plugins as sloth
from sloth_plugins.quantization import Choice, Options, QuantizationPlan
from sloth_plugins.quantization import rounding as r
from sloth_plugins.quantization.plan import Offer, Survey, nf4_bytes, solve

CODES = r.Codes(torch.device("cpu"))


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a few loud channels and correlations, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, width // 4, generator=generator) @ torch.randn(
        width // 4, width, generator=generator
    )
    loud = 1 + 20 * (torch.rand(width, generator=generator) > 0.95)
    return (base / width**0.5 + 0.3 * torch.randn(tokens, width, generator=generator)) * loud


def weight(n: int, k: int, seed: int = 1) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / 10).bfloat16().float()


def expanded(rounded: r.Rounded, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return r.expand_tensors(r.tensors_of(rounded, "w", dtype, CODES), "w").float()


@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (7, 192), (300, 64)])
def test_plain_rounding_is_bitsandbytes_own(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    packed, state = bnb.quantize_4bit(w.bfloat16(), compress_statistics=True, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state).float()
    (rounded,) = r.round_plainly([w], 64, CODES)
    tensors = r.tensors_of(rounded, "w", torch.bfloat16, CODES)
    wanted = {f"w.{name}" for name in state.as_dict(packed=True)} | {"w"}
    assert set(tensors) == wanted
    for name, value in state.as_dict(packed=True).items():
        assert tensors[f"w.{name}"].dtype == value.dtype and tensors[f"w.{name}"].dim() == value.dim(), name
    assert tensors["w"].shape == packed.shape and tensors["w"].dtype == packed.dtype
    # A weight in the middle of two values may go either way.
    assert (expanded(rounded) == theirs).float().mean() > 0.995


@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_stored_expands_to_the_formula(blocksize: int, dtype: torch.dtype) -> None:
    x = correlated(200, 128)
    (rounded,) = r.round_calibrated(
        [weight(80, 128)], x.T @ x, None, blocksize=blocksize, dtype=dtype, codes=CODES
    )
    flat = rounded.nested.reshape(-1).long()
    outer = rounded.outer.repeat_interleave(256)[: flat.numel()]
    scale = (CODES.nested[flat] * outer + rounded.offset).view(80, 128 // blocksize, 1)
    formula = (CODES.nf4[rounded.nibbles.long()].view(80, -1, blocksize) * scale).view(80, 128).to(dtype)
    assert torch.equal(expanded(rounded, dtype), formula.float())


def loss(w: torch.Tensor, rounded: r.Rounded, x: torch.Tensor) -> float:
    return (x @ (expanded(rounded) - w).T).square().sum().item()


def test_calibrated_rounding_has_a_smaller_error_and_sweeps_and_small_blocks_help() -> None:
    x, w = correlated(2000, 256), weight(96, 256)
    (plain,) = r.round_plainly([w], 64, CODES)

    def calibrated(**options: int) -> float:
        given = {"blocksize": 64, **options}
        (rounded,) = r.round_calibrated([w], x.T @ x, None, dtype=torch.bfloat16, codes=CODES, **given)  # type: ignore[arg-type]
        return loss(w, rounded, x)

    once, swept, small = calibrated(sweeps=0), calibrated(sweeps=2), calibrated(blocksize=32)
    assert once < 0.5 * loss(w, plain, x)
    assert swept < 0.95 * once
    assert small < 0.95 * swept
    assert calibrated(sweeps=4) < swept


def test_weights_that_share_their_input_are_rounded_as_if_alone() -> None:
    x, some = correlated(500, 128), [weight(64, 128, 1), weight(32, 128, 2)]
    options = dict(blocksize=64, dtype=torch.bfloat16, codes=CODES)
    joint = r.round_calibrated(some, x.T @ x, None, **options)  # type: ignore[arg-type]
    for w, together in zip(some, joint, strict=True):
        (alone,) = r.round_calibrated([w], x.T @ x, None, **options)  # type: ignore[arg-type]
        assert (expanded(alone) == expanded(together)).float().mean() > 0.98
        assert loss(w, together, x) == pytest.approx(loss(w, alone, x), rel=0.05)


def test_drift_makes_up_for_what_the_input_lost() -> None:
    original = correlated(2000, 128)
    x = original + 0.1 * original.roll(1, dims=1)
    w = weight(64, 128)

    def distance(drift: torch.Tensor | None) -> float:
        (rounded,) = r.round_calibrated([w], x.T @ x, drift, blocksize=64, dtype=torch.bfloat16, codes=CODES)
        return (x @ expanded(rounded).T - original @ w.T).square().sum().item()

    assert distance((original - x).T @ x) < 0.3 * distance(None)


def test_odd_inputs_dead_channels_zero_blocks_and_few_tokens() -> None:
    x, w = correlated(3, 128), weight(64, 128)
    x[:, 5:40] = 0
    w[3] = 0
    w[10, 64:] = 0
    (rounded,) = r.round_calibrated([w], x.T @ x, None, blocksize=64, dtype=torch.bfloat16, codes=CODES)
    got = expanded(rounded)
    assert torch.isfinite(got).all() and got[3].abs().max() < 1e-3 * w.abs().max()
    (plain,) = r.round_plainly([w], 64, CODES)
    assert loss(w, rounded, x) < loss(w, plain, x)


def test_without_its_kernel_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth_kernels import nf4_rounding

    x, w = correlated(200, 128), weight(48, 128)
    codes, real = r.Codes(torch.device("cpu")), nf4_rounding.round_block
    assert not codes._fused  # nor in Triton's interpreter
    options = dict(blocksize=64, dtype=torch.bfloat16)
    (expected,) = r.round_calibrated([w], x.T @ x, None, codes=codes, **options)  # type: ignore[arg-type]

    def broken(*args: object, fused: bool = True) -> torch.Tensor:
        if fused:
            raise RuntimeError("no such\n instruction")
        return real(*args, fused=False)  # type: ignore[arg-type]

    monkeypatch.setattr(nf4_rounding, "round_block", broken)
    codes._fused = True
    with pytest.warns(UserWarning, match="RuntimeError: no such instruction") as warned:
        (found,) = r.round_calibrated([w], x.T @ x, None, codes=codes, **options)  # type: ignore[arg-type]
    assert len(warned) == 1 and torch.equal(found.nibbles, expected.nibbles)
    assert torch.equal(found.nested, expected.nested)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:the rounding kernel failed")
@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_the_loss_is_as_small_and_the_bits_are_the_same(blocksize: int, dtype: torch.dtype) -> None:
    gpu = torch.device("cuda")
    some = [weight(200, 512, 1).to(gpu), weight(33, 512, 2).to(gpu)]
    x = correlated(2000, 512).to(gpu)
    hessian, fused, plain = x.T @ x, r.Codes(gpu), r.Codes(gpu)
    assert fused._fused
    plain._fused = False

    def rounded(codes: r.Codes) -> list[r.Rounded]:
        return r.round_calibrated(some, hessian, None, blocksize=blocksize, dtype=dtype, codes=codes)

    for w, one, again, other in zip(some, rounded(fused), rounded(fused), rounded(plain), strict=True):
        for field in ("nibbles", "nested", "outer"):
            assert torch.equal(getattr(one, field), getattr(again, field)), field
        assert one.offset == again.offset
        losses = []
        for found in (one, other):
            error = r.expand(found, dtype, fused).double() - w.double()
            losses.append(((error @ hessian.double()) * error).sum().item())
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
        tensors = r.tensors_of(one, "w", dtype, fused)
        assert all(tensor.device.type == "cpu" for tensor in tensors.values())
        there = r.expand(one, dtype, fused)
        assert there.device.type == "cuda" and there.dtype == dtype
        assert torch.equal(there, r.expand_tensors(tensors, "w", gpu))
        on_cpu = r.expand_tensors(tensors, "w")
        if dtype == torch.float16:  # bitsandbytes rounds it another way there
            torch.testing.assert_close(there.cpu(), on_cpu, rtol=2**-10, atol=0)
        else:
            assert torch.equal(there.cpu(), on_cpu)
    assert fused._fused


# The plan


def brute_force(offers: list[Offer], budget: int) -> float:
    sums = [
        (sum(way[1] for way in ways), sum(way[2] for way in ways))
        for ways in itertools.product(*(offer.ways for offer in offers))
    ]
    return min(kl for size, kl in sums if size <= budget)


def test_the_knapsack_is_solved() -> None:
    random.seed(0)
    for _ in range(20):
        offers = []
        for i in range(6):
            kl, size = random.random(), random.randint(50, 200)
            ways = ((64, size, kl), (32, size + size // 20, 0.8 * kl), (None, 4 * size, 0.0))
            offers.append(Offer(module=f"m{i}", kl=kl, ways=ways))
        least = sum(offer.ways[0][1] for offer in offers)
        budget = int(least * random.choice([1.0, 1.02, 1.1, 1.7, 5]))
        choices = solve(offers, budget)
        assert [choice.module for choice in choices] == [offer.module for offer in offers]
        assert sum(choice.bytes for choice in choices) <= budget
        kls = {None: 0.0, 32: 0.8, 64: 1.0}
        got = sum((choice.kl or 0) * kls[choice.blocksize] for choice in choices)
        assert got == pytest.approx(brute_force(offers, budget))
    with pytest.raises(ValueError, match=f"allowed is {least} or more"):
        solve(offers, least - 1)


def test_a_survey_gives_plans_for_bytes_and_for_a_kl(tmp_path: Path) -> None:
    generator = random.Random(1)
    offers = tuple(
        Offer(module=f"m{i}", kl=kl, ways=((None, 4 * size, 0.0), (64, size, kl), (32, size + 9, kl / 2)))
        for i, (kl, size) in enumerate((generator.random(), generator.randint(50, 200)) for _ in range(8))
    )
    fixed = Offer(module="f", kl=None, ways=((None, 77, 0.0),), reason="keep names it")
    survey = Survey(offers=(*offers, fixed), others=("lm_head",), rest_bytes=1000, rows=3)
    survey.save(tmp_path / "survey.json")
    assert Survey.load(tmp_path / "survey.json") == survey
    least = survey.plan(survey.uniform_bytes)
    assert survey.uniform_bytes == 1077 + sum(offer.ways[1][1] for offer in offers)
    assert least.ratio == least.budget == 1.0 and least.expected_kl == sum(offer.kl or 0 for offer in offers)
    for share in (0.9, 0.5, 0.1):
        kl = share * least.expected_kl
        found = survey.plan_for(kl)
        assert found.expected_kl is not None and found.expected_kl <= kl
        smaller = survey.plan(found.total_bytes - 2)  # the search ends at a ten-thousandth of the bytes
        assert smaller.expected_kl is not None and smaller.expected_kl > kl
    assert survey.plan_for(1e-9).skip_modules == [*(offer.module for offer in offers), "f", "lm_head"]


def plan(**changes: object) -> QuantizationPlan:
    values: dict[str, object] = dict(
        budget=1.1,
        uniform_bytes=1000,
        total_bytes=1090,
        choices=(
            Choice(module="model.layers.0.a", bits=4, blocksize=64, bytes=10, kl=0.1),
            Choice(module="model.layers.1.a", bits=16, blocksize=None, bytes=30, reason="why"),
        ),
        others=("lm_head",),
    )
    return QuantizationPlan(**{**values, **changes})  # type: ignore[arg-type]


def test_a_plan_is_saved_loaded_and_handed_to_transformers(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    assert QuantizationPlan.load(tmp_path / "plan.json") == plan()
    config = plan().to_bnb_config()
    assert config.llm_int8_skip_modules == ["model.layers.1.a", "lm_head"]
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant and config.load_in_4bit
    small = plan(choices=(Choice(module="m", bits=4, blocksize=32, bytes=10),))
    with pytest.raises(ValueError, match="blocksize=32 in the plan"):
        small.to_bnb_config()
    (tmp_path / "wrong.json").write_text('{"format": 1, "budget": 1}')
    for name in ("wrong.json", "not_there.json"):
        with pytest.raises(ValueError, match=name):
            QuantizationPlan.load(tmp_path / name)


def test_bytes_are_those_that_bitsandbytes_stores() -> None:
    for shape in ((64, 64), (300, 192)):
        (rounded,) = r.round_plainly([weight(*shape)], 64, CODES)
        tensors = r.tensors_of(rounded, "w", torch.bfloat16, CODES)
        assert sum(t.nbytes for t in tensors.values()) == pytest.approx(nf4_bytes(shape, 64), abs=64)


def test_a_model_in_memory_is_planned_and_stays_as_it_is() -> None:
    model = tiny_model("qwen3", hidden_size=64, intermediate_size=128, head_dim=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [[1, *random.Random(i).choices(range(4, 90), k=30)] for i in range(8)]
    found = sloth.plan_quantization(model, rows, 1.4)
    assert found.budget == 1.4 and 1.0 < found.ratio <= 1.4
    assert all(choice.kl is not None and choice.kl >= 0 for choice in found.choices)
    kept = [choice.module for choice in found.choices if choice.bits == 16]
    assert kept and found.skip_modules == [*kept, "lm_head"]
    assert found.to_bnb_config().llm_int8_skip_modules == found.skip_modules
    assert found.expected_kl and found.measured_kl and 0.2 < found.measured_kl / found.expected_kl < 5
    assert sloth.plan_quantization(model, rows, 1.0).ratio == 1.0
    limit = int(1.2 * found.uniform_bytes)
    assert 0.95 * limit < sloth.plan_quantization(model, rows, f"{limit} B").total_bytes <= limit
    with pytest.raises(ValueError, match=rf"budget='1 KB': allowed are {found.uniform_bytes} bytes"):
        sloth.plan_quantization(model, rows, "1 KB")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plugins_plan_comes_first() -> None:
    third = manager_with(third=make_plugin(sloth_plan_quantization=lambda budget: plan(budget=budget)))
    model = tiny_model("llama")
    assert sloth.plan_quantization(model, [], 1.2, manager=third) == plan(budget=1.2)
    wrong = manager_with(third=make_plugin(sloth_plan_quantization=lambda: "8 bits"))
    with pytest.raises(TypeError, match="allowed is a QuantizationPlan"):
        sloth.plan_quantization(model, [], 1.2, manager=wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0.99}, "budget=0.99: allowed is a ratio"),
        ({"budget": float("nan")}, "budget=nan: allowed"),
        ({"block_sizes": (16,)}, r"block_sizes=\(16,\): allowed are 64, 32"),
        ({"block_sizes": (32,)}, "lists with 64"),
        ({"budget": "12 stones"}, "budget='12 stones': allowed are bytes"),
        ({"target_kl": 0}, "target_kl=0: allowed is a positive number"),
        ({"target_kl": 0.1, "budget": 1.1}, "target_kl=0.1 with budget=1.1: allowed is one of them"),
        ({"samples": 0}, "samples=0"),
        ({"row_tokens": 1}, "row_tokens=1"),
        ({"drift_share": 2.0}, "drift_share=2.0"),
    ],
)
def test_wrong_options_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**values)  # type: ignore[arg-type]


def test_text_needs_a_tokenizer_and_tokens() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError, match="give their tokenizer="):
        sloth.plan_quantization(model, ["some text"])
    with pytest.raises(ValueError, match="calibration is empty"):
        sloth.plan_quantization(model, [])
