"""lora_linear and lora_mlp: every output and gradient against eager and float64, over every base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sloth_kernels import lora as op
from sloth_kernels.gated_activation import gated_activation_reference
from sloth_kernels.lora import (
    Adapter,
    Expanded,
    Projection,
    lora_linear,
    lora_linear_reference,
    lora_mlp,
    lora_mlp_reference,
)
from sloth_kernels.low_rank import (
    MOST_ACTIVATED_COLUMNS,
    Dropout,
    activated_narrow,
    activated_tall,
    dropped,
    narrow_matmul,
    tall_matmul,
)
from sloth_kernels.nf4 import FourBit
from three_way import WAYS, check
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sloth_plugins.numerics import relative_error

GPU = torch.cuda.is_available()
BASES = ["dense", "nf4", "fp4", "nf4 plain", "mixed"]


def randn(
    *shape: int, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def stored(weight: torch.Tensor, base: str, i: int) -> Any:
    """A weight on its base: 4-bit of one kind or another, or as it is."""
    if base == "dense" or (base == "mixed" and i % 2):
        return weight
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    quant_type = "fp4" if base == "fp4" else "nf4"
    packed, state = functional.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=base != "nf4 plain"
    )
    return FourBit(packed=packed, state=state)


class Case:
    """Projections of widths `ns` on an input of width `k`, and their tensors by name for `check`."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        base: str = "dense",
        k: int = 64,
        ns: Sequence[int] = (64, 96, 32),
        ranks: Sequence[int] = (8, 5, 0),
        ks: Sequence[int] | None = None,
        adapter_dtype: torch.dtype | None = None,
        low_bias: bool = False,
        bias: bool = False,
        scaling: float = 0.5,
        rows: tuple[int, ...] = (3, 11),
    ) -> None:
        self.ranks, self.scaling = ranks, scaling
        ks = ks or [k] * len(ns)
        make = dict(device=device, dtype=dtype)
        own = dict(device=device, dtype=adapter_dtype or dtype)
        self.weights = [
            stored(randn(n, w, seed=i, scale=w**-0.5, **make), base, i)
            for i, (n, w) in enumerate(zip(ns, ks, strict=True))
        ]
        self.inputs: dict[str, torch.Tensor | None] = {"x": randn(*rows, k, seed=99, **make)}
        for i, (n, w, r) in enumerate(zip(ns, ks, ranks, strict=True)):
            if r:
                self.inputs[f"a{i}"] = randn(r, w, seed=10 + i, scale=w**-0.5, **own)
                self.inputs[f"b{i}"] = randn(n, r, seed=20 + i, scale=r**-0.5, **own)
                if low_bias:
                    self.inputs[f"low_bias{i}"] = randn(n, seed=30 + i, **own)
            if bias:
                self.inputs[f"bias{i}"] = randn(n, seed=40 + i, **make)

    def projections(self, tensors: dict[str, Any]) -> list[Projection]:
        made = []
        for i, (weight, rank) in enumerate(zip(self.weights, self.ranks, strict=True)):
            adapter = None
            if rank:
                a, b, low = (tensors.get(f"{name}{i}") for name in ("a", "b", "low_bias"))
                adapter = Adapter(a=a, b=b, bias=low, scaling=self.scaling)
            made.append(Projection(weight=weight, bias=tensors.get(f"bias{i}"), adapter=adapter))
        return made

    def linear(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda x, **tensors: function(x, self.projections(tensors), **options)

    def mlp(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda x, **tensors: function(x, *self.projections(tensors), **options)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(op.torch, "empty", poisoned)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_linear(fused, dtype, base, device):
    case = Case(device, dtype, base=base)
    check(case.linear(lora_linear, fused=fused), case.linear(lora_linear_reference), case.inputs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_mlp(fused, dtype, base, device):
    case = Case(device, dtype, base=base, ns=(128, 128, 64), ks=(64, 64, 128), ranks=(8, 4, 16))
    options = dict(activation="silu")
    check(case.mlp(lora_mlp, fused=fused, **options), case.mlp(lora_mlp_reference, **options), case.inputs)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("ranks", [(1, 0, 0), (0, 0, 0), (16, 16, 16), (3, 130, 64), (256, 0, 1)], ids=str)
def test_ranks(ranks, base, device):
    case = Case(device, torch.float32, base=base, ranks=ranks)
    check(case.linear(lora_linear), case.linear(lora_linear_reference), case.inputs)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_biases_and_activations(activation, base, device):
    make = dict(base=base, ns=(128, 128, 64), ks=(64, 64, 128), ranks=(8, 0, 4), bias=True, low_bias=True)
    case = Case(device, torch.float32, **make)
    options = dict(activation=activation)
    check(case.mlp(lora_mlp, **options), case.mlp(lora_mlp_reference, **options), case.inputs)
    case = Case(device, torch.float32, base=base, bias=True, low_bias=True, rows=(1,))
    check(case.linear(lora_linear), case.linear(lora_linear_reference), case.inputs)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("fused", "dtype"), [way for way in WAYS if way.values[1] != torch.float32])
def test_float32_adapters_of_a_narrower_base(fused, dtype, autocast, base, device):
    if autocast and device.type == "cpu" and dtype == torch.float16 and not fused:
        pytest.skip("PyTorch's CPU autocast to float16 is no training mode")
    case = Case(device, dtype, base=base, adapter_dtype=torch.float32)
    with torch.autocast(device.type, dtype=dtype) if autocast else nullcontext():
        check(case.linear(lora_linear, fused=fused), case.linear(lora_linear_reference), case.inputs)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_only_what_is_needed(base, device):
    """Frozen adapters, an input without a gradient, an output that nothing uses."""
    case = Case(device, torch.float32, base=base)
    run = case.linear(lora_linear), case.linear(lora_linear_reference)
    check(*run, case.inputs, frozen=["a0", "b1"])
    ups = [randn(3, 11, n, seed=5 + n, dtype=torch.float32, device=device) for n in (64, 96, 32)]
    check(*run, case.inputs, frozen=["x"], upstream=[*ups[:2], None])
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
    outputs = run[0](**leaves)
    used = torch.autograd.grad(outputs[0], list(leaves.values()), ups[0], allow_unused=True)
    plain = torch.autograd.grad(run[1](**leaves)[0], list(leaves.values()), ups[0], allow_unused=True)
    for got, want in zip(used, plain, strict=True):
        torch.testing.assert_close(torch.zeros_like(got) if want is None else want, got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_second_derivatives(base, device):
    case = Case(device, torch.float32, base=base, ns=(64,), ranks=(4,))
    results = []
    for function in (lora_linear, lora_linear_reference):
        leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
        (y,) = case.linear(function)(**leaves)
        first = torch.autograd.grad(y.pow(2).sum(), list(leaves.values()), create_graph=True)
        total = sum(g.pow(2).sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, list(leaves.values()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_second_backward(base, device):
    case = Case(device, torch.float32, base=base, ns=(128, 128, 64), ks=(64, 64, 128), ranks=(8, 4, 16))
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
    y = case.mlp(lora_mlp, activation="silu")(**leaves)
    first, second = (torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MLP = dict(ns=(128, 128, 64), ks=(64, 64, 128))


def with_dropout(case: Case, tensors: dict[str, Any], rate: float) -> list[Projection]:
    """The case's projections with dropout before each adapter."""
    made = []
    for projection in case.projections(tensors):
        own = projection.adapter
        adapter = own and Adapter(a=own.a, b=own.b, scaling=own.scaling, bias=own.bias, dropout=rate)
        made.append(Projection(weight=projection.weight, bias=projection.bias, adapter=adapter))
    return made


@pytest.mark.parametrize("base", ["dense", "nf4", "mixed"])
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
@pytest.mark.parametrize(
    ("own", "bias"),
    [(None, True), (None, False), (torch.float32, True)],
    ids=["biases", "", "float32 adapters and biases"],
)
def test_an_mlp_in_tiles(own, bias, fused, dtype, base, device):
    """Tiles of 12 and of the 9 that are left, each with masks of its own."""
    case = Case(device, dtype, base=base, ranks=(8, 4, 16), adapter_dtype=own, bias=bias, **MLP)

    def tiled(x, **tensors):
        torch.manual_seed(5)
        given = with_dropout(case, tensors, 0.3)
        return lora_mlp(x, *given, activation="silu", fused=fused, tile=12)

    def reference(x, **tensors):
        torch.manual_seed(5)
        given = with_dropout(case, tensors, 0.3)
        parts = x.reshape(-1, x.shape[-1]).split(12)
        return torch.cat([lora_mlp_reference(part, *given, activation="silu") for part in parts]).view(
            *x.shape[:-1], -1
        )

    check(tiled, reference, case.inputs)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("low_bias", [True, False], ids=["biases", ""])
@pytest.mark.parametrize("ranks", [(8, 4, 16), (0, 5, 0)], ids=str)
def test_one_tile_is_the_same_bits_and_keeps_x_alone(ranks, low_bias, fused, base, device, monkeypatch):
    case = Case(device, torch.float32, base=base, ranks=ranks, low_bias=low_bias, **MLP)
    results, kept, in_place, activated = [], [], [], op.activated_tall

    def watched(dgate, dup, grad, gate, up, *others, **options):
        in_place.append(all(a.data_ptr() == b.data_ptr() for a, b in ((dgate, gate), (dup, up))))
        return activated(dgate, dup, grad, gate, up, *others, **options)

    monkeypatch.setattr(op, "activated_tall", watched)
    for tile in (None, 33, 40):
        leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
        torch.manual_seed(5)
        given = with_dropout(case, leaves, 0.3)
        wide: list[int] = []

        def pack(tensor, wide=wide):
            wide.append(tensor.shape[-1])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = lora_mlp(leaves["x"], *given, activation="silu", fused=fused, tile=tile)
        kept.append(wide.count(128))
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(leaves.values()), retain_graph=True)])
        again = torch.autograd.grad(y.pow(2).sum(), list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(results[-1][1:], again, strict=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    adapters = sum(t is not None and t.shape[-1] == 128 for t in case.inputs.values())
    # Gate and up are one tensor behind 4-bit weights; biases keep them apart, and so their gradients, which
    # else take their place where nobody else has them.
    extended = base == "nf4" and fused and op.takes(case.inputs["x"])
    assert kept == [adapters + (0 if extended and not low_bias else 2), adapters, adapters]
    again = not (extended and low_bias)
    assert in_place == [False, False, again, again, again, again]


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("ranks", [(8, 4, 16), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("tile", [33, 12])
def test_a_repetition_makes_no_low_rank_product_again(tile, ranks, fused, base, device, monkeypatch):
    """Under torch's checkpointing, in two backwards: the bits of a call by itself."""
    case = Case(device, torch.float32, base=base, ranks=ranks, **MLP)
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
    given = with_dropout(case, leaves, 0.3)
    made, low_rank = [], op._down_low_rank

    def watched(*args):
        made.append(low_rank(*args))
        return made[-1]

    monkeypatch.setattr(op, "_down_low_rank", watched)
    calls: list[bool] = []

    def layer(x, **options):
        return lora_mlp(x, *given, activation="silu", fused=fused, tile=tile, **options)

    def repeated(x):
        calls.append(True)
        return layer(x, output=len(calls) == 1, repeated=True) + x

    torch.manual_seed(5)
    y = layer(leaves["x"]) + leaves["x"]
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, list(leaves.values()), grad)
    made.clear()
    torch.manual_seed(5)
    again = checkpoint(repeated, leaves["x"], use_reentrant=False)
    parts = 3 if tile == 12 else 1
    assert torch.equal(again, y) and len(made) == parts
    for times in (2, 3):
        got = torch.autograd.grad(again, list(leaves.values()), grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and len(calls) == times
    assert not any(p is not None for p in made[parts:])


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("biased", [True, False], ids=["biases", ""])
def test_gradients_take_the_place_of_gate_and_up(biased, fused, base, device, monkeypatch):
    """Where nobody else has these: with the bits that they have elsewhere, in a second backward, too."""
    case = Case(device, torch.float32, base=base, ranks=(8, 4, 16), low_bias=biased, **MLP)
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
    given = with_dropout(case, leaves, 0.3)
    in_place, activated = [], op.activated_tall

    def watched(dgate, dup, grad, gate, up, *others, **options):
        in_place.append(dgate.data_ptr() == gate.data_ptr() and dup.data_ptr() == up.data_ptr())
        return activated(dgate, dup, grad, gate, up, *others, **options)

    monkeypatch.setattr(op, "activated_tall", watched)

    def run(x):
        return lora_mlp(x, *given, activation="silu", fused=fused)

    def gradients(y, **options):
        return torch.autograd.grad(y.pow(2).sum(), list(leaves.values()), **options)

    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(tensor):
        held.append((tensor, tensor.detach().clone()))
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        want = gradients(run(leaves["x"]))
    assert in_place == [False]
    # As bytes: columns that nobody has written to yet may be NaN.
    parts = ([t.detach().contiguous().view(torch.uint8) for t in pair] for pair in held)
    assert all(torch.equal(now, then) for now, then in parts)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def under_a_mode(x):
        with Mode():
            return run(x)

    def under_ours(x):
        def pack(tensor):
            return tensor

        pack.private = True
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return run(x)

    def checkpointed(x):
        return checkpoint(run, x, use_reentrant=False)

    alone = not (base == "nf4" and fused and op.takes(case.inputs["x"]) and biased)
    for function, expected in (
        (run, alone),
        (under_ours, alone),
        (checkpointed, alone),
        (under_a_mode, False),
    ):
        in_place.clear()
        torch.manual_seed(5)
        y = function(leaves["x"])
        for options in ({"retain_graph": True}, {"retain_graph": True}, {}):
            assert all(torch.equal(a, b) for a, b in zip(gradients(y, **options), want, strict=True))
        assert in_place == [expected] * 3


@pytest.mark.parametrize(
    ("base", "tile"),
    [("nf4", None), ("nf4 plain", None), ("nf4", 12), ("nf4", 40), ("mixed", 40), ("dense", 40)],
)
def test_weights_that_stay_expanded(base, tile, device, monkeypatch):
    """The same bits from pass to pass, with new adapters, weights changed in place, others, dropped ones."""
    if tile is None:
        case = Case(device, torch.float32, base=base)
        function: Any = lora_linear
    else:
        case = Case(device, torch.float32, base=base, ranks=(8, 4, 16), **MLP)
        function = lambda x, given, **options: (  # noqa: E731
            lora_mlp(x, *given, activation="silu", tile=None if tile == 40 else tile, **options),
        )
    filled: list[bool] = []
    fill = op.Extension.fill

    def counted(self: Any, out: Any, factors: Any, *, weights: bool = True) -> bool:
        filled.append(weights)
        return fill(self, out, factors, weights=weights)

    monkeypatch.setattr(op.Extension, "fill", counted)

    def passes(expanded: Any) -> list[torch.Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
        ys = function(leaves["x"], case.projections(leaves), expanded=expanded)
        total = sum(y.pow(2).sum() for y in ys)
        return [*ys, *torch.autograd.grad(total, list(leaves.values()))]

    def same() -> None:
        for one, other in zip(passes(kept), passes(None), strict=True):
            assert torch.equal(one, other)

    kept = Expanded()
    groups = 1 if tile is None else 2
    for step in range(3):
        filled.clear()
        for name, t in case.inputs.items():
            if t is not None and name[0] in "ab":
                case.inputs[name] = t * 1.5
        same()
        if base in ("nf4", "nf4 plain"):
            mine = filled[: len(filled) // 2]
            assert mine.count(True) == (groups if step == 0 else 0) and mine.count(False) >= groups
            assert all(filled[len(filled) // 2 :])
    if base == "dense":
        assert kept.first.joint is None
        return
    first = case.weights[0]
    assert isinstance(first, FourBit)
    first.packed.copy_(first.packed.flip(0))
    same()
    first.state.absmax.copy_(first.state.absmax.flip(0))
    same()
    # Another weight of the same shape, which may get the place of the first in memory.
    new = stored(randn(*first.shape, seed=77, dtype=torch.float32, device=device), base, 0)
    case.weights[0] = new
    del first
    same()
    held = kept.first.joint
    kept.clear()
    assert kept.first.joint is None and (held is None) == (base == "mixed")
    same()


def test_second_derivatives_of_an_mlp_in_tiles(device):
    case = Case(device, torch.float32, base="nf4", ranks=(4, 4, 8), **MLP)
    results = []
    for function, options in ((lora_mlp, dict(tile=12)), (lora_mlp_reference, {})):
        leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
        y = case.mlp(function, activation="silu", **options)(**leaves)
        first = torch.autograd.grad(y.pow(2).sum(), list(leaves.values()), create_graph=True)
        total = sum(g.pow(2).sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, list(leaves.values()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


RATES = [pytest.param(rates, id=str(rates)) for rates in ((0.5, 0.5, 0.5), (0.5, 0.0, 0.2), (0.1, 0.1, 0.0))]


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_dropout(fused, dtype, base, rates, device):
    """The same zeros in forward and backward: gradients are those of the function with these zeros."""
    narrow, wide = None, torch.float32  # of the adapters, which then compute in it
    for mlp, ranks, own in ((False, (8, 5, 8), narrow), (True, (4, 8, 8), narrow), (True, (8, 8, 5), wide)):
        sizes = dict(ns=(128, 128, 64), ks=(64, 64, 128)) if mlp else {}
        case = Case(device, dtype, base=base, ranks=ranks, adapter_dtype=own, **sizes)

        def projections(tensors, case=case):
            for projection, rate in zip(case.projections(tensors), rates, strict=True):
                adapter = projection.adapter
                own = Adapter(a=adapter.a, b=adapter.b, scaling=0.5, dropout=rate)
                yield Projection(weight=projection.weight, adapter=own)

        def run(function, mlp=mlp, projections=projections, **options):
            def call(x, **tensors):
                torch.manual_seed(5)
                given = list(projections(tensors))
                return (
                    function(x, *given, activation="silu", **options)
                    if mlp
                    else function(x, given, **options)
                )

            return call

        ours, reference = (lora_mlp, lora_mlp_reference) if mlp else (lora_linear, lora_linear_reference)
        check(run(ours, fused=fused), run(reference), case.inputs)


def test_dropout_differs_from_call_to_call(device):
    case = Case(device, torch.float32)
    adapter = Adapter(a=case.inputs["a0"], b=case.inputs["b0"], scaling=1.0, dropout=0.5)
    torch.manual_seed(5)
    first, second = (
        lora_linear(case.inputs["x"], [Projection(weight=case.weights[0], adapter=adapter)]) for _ in range(2)
    )
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_is_of_the_asked_rate_and_independent(fused, device):
    """Over rows, columns, adapters and neighbours: the rate, the scale, and no correlation."""
    n, p = 512, 0.25
    x = torch.ones(n, n, device=device, dtype=torch.float16)
    eye = torch.eye(n, device=device, dtype=torch.float16)
    torch.manual_seed(0)
    masks = Dropout(p=p, seeds=torch.randint(2**62, (2,), device=device), width=n)
    kept = narrow_matmul(x, torch.cat([eye, eye]), dropout=masks, fused=fused)
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3, rel=1e-3)]
    zeros = (kept == 0).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(zeros.mean().item() - p) < 5 * spread / zeros.numel() ** 0.5
    for dim in (0, 1):
        means = zeros.mean(dim)
        expected = spread / zeros.shape[dim] ** 0.5
        assert (means - p).abs().max() < 5 * expected
        assert 0.85 < means.std().item() / expected < 1.15
    one, other = zeros.chunk(2, 1)
    for first, second in (
        *((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:-64], one[64:])),
        (one[:, :-128], one[:, 128:]),
    ):
        correlation = ((first - p) * (second - p)).mean().item() / spread**2
        assert abs(correlation) < 5 / first.numel() ** 0.5


SMALL = [(1, 1, 1), (5, 64, 3), (130, 257, 20), (67, 96, 200)]
LARGE = [(t, 4096, r) for t in (1, 64, 2062) for r in (16, 48, 64, 96, 128, 256)]


@pytest.mark.parametrize("shape", SMALL + [pytest.param(s, marks=pytest.mark.gpu) for s in LARGE], ids=str)
@pytest.mark.parametrize(("fused", "dtype"), WAYS[:3])
def test_narrow_and_tall(fused, dtype, shape, device):
    t, k, r = shape
    x = randn(t, k + 3, seed=1, dtype=dtype, device=device)[:, :k]
    w = randn(k, r, seed=2, dtype=dtype, device=device).t()
    copy = torch.full((t, k + r + 2), float("nan"), dtype=dtype, device=device)
    p = narrow_matmul(x, w, copy[:, :k], copy[:, k : k + r])
    tolerance = 2e-3 if dtype == torch.float16 else 2e-2 if dtype == torch.bfloat16 else 1e-5
    wanted = x.double() @ w.double().t()
    torch.testing.assert_close(p.double(), wanted, rtol=tolerance, atol=tolerance * k**0.5)
    assert torch.equal(copy[:, :k], x) and torch.equal(copy[:, k : k + r], p)
    assert copy[:, k + r :].isnan().all()
    for transposed in (False, True):
        got = tall_matmul(x, p, transposed=transposed, dtype=torch.float32)
        want = x.double().t() @ p.double()
        want = want.t() if transposed else want
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


OF_MLPS = [(1, 1, 1, 8), (5, 64, 3, 8), (130, 257, 20, 24), (67, 96, 32, 32), (67, 96, 65, 72)]
LARGE_MLPS = [
    (1, 14336, 16, 16),
    (64, 14336, 96, 96),
    *((2062, 14336, r, max(8, r)) for r in (4, 16, 32, 64)),
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "shape", OF_MLPS + [pytest.param(s, marks=pytest.mark.gpu) for s in LARGE_MLPS], ids=str
)
@pytest.mark.parametrize(("fused", "dtype"), WAYS[:3])
def test_activated_narrow(fused, dtype, shape, activation, dropout, device):
    """Against float64 from the y that it stores, which is checked by itself; where y is not stored, the same
    bits. Memory is full of NaN, gate and up lie in one buffer, and w is another dtype's."""
    t, n, rank, columns = shape
    both = randn(t, 2 * n + 5, seed=1, dtype=dtype, device=device)
    gate, up = both[:, :n], both[:, n : 2 * n]
    w = randn(rank, n + 1, seed=2, dtype=torch.float32, device=device)[:, :n]
    torch.manual_seed(3)
    masks = None
    if dropout:
        masks = Dropout(p=dropout, seeds=torch.randint(2**62, (1,), device=device), width=columns)
    out = torch.full((t, n + columns + 3), float("nan"), dtype=dtype, device=device)
    hidden, extension = out[:, :n], out[:, n : n + columns]
    options = dict(activation=activation, scale=0.5, dropout=masks, fused=fused)
    p = activated_narrow(gate, up, w, columns, hidden, extension, **options)
    assert torch.equal(extension, p) and out[:, n + columns :].isnan().all()
    tolerance = 2e-3 if dtype == torch.float16 else 2e-2 if dtype == torch.bfloat16 else 1e-5
    y = gated_activation_reference(gate.double(), up.double(), activation=activation)
    torch.testing.assert_close(hidden.double(), y, rtol=tolerance, atol=tolerance)
    kept = hidden.double() if masks is None else dropped(hidden.double(), masks, 0)
    wanted = 0.5 * kept @ w.to(dtype).double().t()
    torch.testing.assert_close(
        p[:, :rank].double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item()
    )
    # Of a few columns left out of 14,336 the largest sum says nothing.
    limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(hidden, y) < limit and relative_error(p[:, :rank], wanted) < limit
    assert not p[:, rank:].any()
    assert torch.equal(activated_narrow(gate, up, w, columns, **options), p)
    if columns <= MOST_ACTIVATED_COLUMNS and fused:
        assert torch.equal(p, activated_narrow(gate, up, w.to(dtype), columns, **options))


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_a_small_update_survives(size, device):
    """Eager adds a small term to an output that is rounded already; what is lost there is kept here."""
    dtype, k, n = torch.bfloat16, 512, 512
    fused = GPU  # PyTorch's operators keep it as well: the low-rank term first, the matmul added to it
    x = randn(256, k, seed=1, dtype=dtype, device=device)
    weight = stored(randn(n, k, seed=2, dtype=dtype, device=device, scale=k**-0.5), "nf4", 0)
    a = randn(16, k, seed=3, dtype=dtype, device=device, scale=k**-0.5)
    b = randn(n, 16, seed=4, dtype=dtype, device=device, scale=size)
    on = [Projection(weight=weight, adapter=Adapter(a=a, b=b, scaling=1.0))]
    base = op.expand_4bit_reference(weight).double()
    term = x.double() @ a.double().t() @ b.double().t()

    def kept(y: torch.Tensor) -> float:
        return float(((y.double() - x.double() @ base.t()) * term).sum() / (term * term).sum())

    ours = kept(lora_linear(x, on, fused=fused)[0])
    eager = kept(lora_linear_reference(x, on)[0])
    assert 0.9 < ours < 1.1
    if size == 1e-4:
        assert eager < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 96, 192])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_the_same_bits_each_time(tokens, rank, device):
    """Kernels whose tensor cores read shared memory while it is filled again, if they can."""
    make = dict(dtype=torch.bfloat16, device=device)
    x = torch.randn(tokens, 4096, **make)
    a = torch.randn(rank, 4096, **make)
    copies = [torch.empty(tokens, 4096 + 256, **make) for _ in range(2)]

    def narrow(copy):
        return narrow_matmul(x, a, copy[:, :4096], copy[:, 4096 : 4096 + rank])

    want = narrow(copies[0])
    assert relative_error(want, x.double() @ a.double().t()) < 4e-3
    for _ in range(100):
        copies[1].fill_(float("nan"))
        assert torch.equal(narrow(copies[1]), want)
        assert torch.equal(copies[1][:, : 4096 + rank], copies[0][:, : 4096 + rank])
    if rank > 64:
        return
    gate, up, grad = (torch.randn(tokens, 4096, **make) for _ in range(3))
    q, p = torch.randn(tokens, rank, **make), torch.randn(tokens, 2 * rank, **make)
    masks = Dropout(p=0.1, seeds=torch.randint(2**62, (1,), device=device), width=rank)

    def tall(dropout):
        out = torch.empty(2, tokens, 4096, **make)
        own = (a, [p[:, :rank], p[:, rank:]])
        found = activated_tall(
            *(*out, grad, gate, up, q, *own), activation="silu", dtype=torch.float32, dropout=dropout
        )
        return [*out, *found]

    def activated(dropout):
        hidden = torch.empty(tokens, 4096, **make)
        return [hidden, activated_narrow(gate, up, a, rank, hidden, activation="silu", dropout=dropout)]

    for dropout in (None, masks):
        for made in (tall, activated):
            first = made(dropout)
            for _ in range(50):
                assert all(torch.equal(one, other) for one, other in zip(made(dropout), first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("rows", [(2, 1031), (1, 1)], ids=str)
def test_real_shapes(rows, base, device):
    make = dict(base=base, k=4096, rows=rows, adapter_dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        case = Case(device, torch.bfloat16, ns=(4096, 1024, 1024), ranks=(16, 16, 64), **make)
        check(case.linear(lora_linear), case.linear(lora_linear_reference), case.inputs)
        widths = dict(ns=(6144, 6144, 4096), ks=(4096, 4096, 6144), ranks=(16, 16, 16))
        case = Case(device, torch.bfloat16, **widths, **make)
        options = dict(activation="silu")
        check(case.mlp(lora_mlp, **options), case.mlp(lora_mlp_reference, **options), case.inputs)


def test_bad_input(device):
    case = Case(device, torch.float32)
    projections = case.projections(case.inputs)
    x = case.inputs["x"]
    with pytest.raises(ValueError, match="expected x"):
        lora_linear(x[..., :5], projections)
    with pytest.raises(ValueError, match="projections is empty"):
        lora_linear(x, [])
    wrong = Adapter(a=case.inputs["a0"], b=case.inputs["b1"], scaling=1.0)
    with pytest.raises(ValueError, match="adapter 0"):
        lora_linear(x, [Projection(weight=case.weights[0], adapter=wrong)])
    wild = Adapter(a=case.inputs["a0"], b=case.inputs["b0"], scaling=1.0, dropout=1.0)
    with pytest.raises(ValueError, match=r"dropout=1.0: allowed is 0 <= dropout < 1"):
        lora_linear(x, [Projection(weight=case.weights[0], adapter=wild)])
    with pytest.raises(ValueError, match="activation 'relu'"):
        lora_mlp(x, *projections, activation="relu")
    with pytest.raises(ValueError, match="tile=0: allowed is a whole number from 1"):
        lora_mlp(x, *projections, activation="silu", tile=0)
    with pytest.raises(ValueError, match="expected \\(I, K\\)"):
        lora_mlp(x, *projections, activation="silu")


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
def test_no_tokens(rows, device):
    case = Case(device, torch.float32, rows=rows)
    leaves = {name: t.clone().requires_grad_() for name, t in case.inputs.items() if t is not None}
    outputs = case.linear(lora_linear)(**leaves)
    assert [tuple(y.shape) for y in outputs] == [(*rows, n) for n in (64, 96, 32)]
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), list(leaves.values()))
    assert all(not g.any() for g in gradients)
