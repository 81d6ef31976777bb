"""Residual addition with RMSNorm: both outputs and every gradient against eager and float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from norm_cases import COMPILE_BACKEND, DTYPES, EPS, SHAPES, poison, views
from sloth_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm_beside
from sloth_kernels.rms_norm import rms_norm, rms_norm_reference
from three_way import check

__all__ = ["poison"]
ORDERS = [
    pytest.param({"cast_before_weight": True}, id="llama"),
    pytest.param({"offset": 1.0}, id="gemma"),
]


def compare(inputs: dict[str, torch.Tensor | None], **settings: Any) -> None:
    options = {name: settings.pop(name) for name in ("frozen", "upstream") if name in settings}
    settings.setdefault("eps", EPS)
    wide = {name: value for name, value in settings.items() if name != "out_dtype"}
    check(
        partial(add_rms_norm, **settings),
        partial(add_rms_norm_reference, **settings),
        inputs,
        truth=partial(add_rms_norm_reference, **wide),
        **options,
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(
    shape: tuple[int, ...], dtype: torch.dtype, order: dict[str, Any], device: torch.device, poison: None
) -> None:
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    compare({"x": x, "residual": residual, "weight": weight}, **order)
    compare({"x": x, "residual": residual, "weight": weight}, frozen=["weight"], **order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_beside_its_input(
    shape: tuple[int, ...], dtype: torch.dtype, order: dict[str, Any], device: torch.device, poison: None
) -> None:
    """Outputs, and a gradient that comes through both, either or the input alone."""
    x, weight = (torch.randn(size, dtype=dtype, device=device) for size in (shape, shape[-1:]))
    settings = {"eps": EPS, **order}

    def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm_reference(x, weight, **settings), x.view_as(x)

    for frozen in ([], ["weight"]):
        check(partial(rms_norm_beside, **settings), both, {"x": x, "weight": weight}, frozen=frozen)
    leaf = x.clone().requires_grad_()
    y, same = rms_norm_beside(leaf, weight, **settings)
    assert same.data_ptr() == leaf.data_ptr() and same is not leaf
    assert torch.equal(y, rms_norm(x, weight, **settings))
    given = torch.randn_like(x)
    (alone,) = torch.autograd.grad(y, leaf, given, retain_graph=True)
    (want,) = torch.autograd.grad(rms_norm(leaf, weight, **settings), leaf, given)
    assert torch.equal(alone, want)
    (through,) = torch.autograd.grad(same, leaf, given)
    assert torch.equal(through, given)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_alone_gives_the_same_bits_of_the_sum(
    shape: tuple[int, ...], dtype: torch.dtype, order: dict[str, Any], device: torch.device, poison: None
) -> None:
    """As checkpointing needs it to make the norm's output again."""
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    y, summed = add_rms_norm(x, residual, weight, eps=EPS, **order)
    alone = rms_norm(summed, weight, eps=EPS, **order)
    assert alone.dtype == y.dtype and alone.stride() == y.stride()
    assert torch.equal(alone.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize("frozen", [[], ["weight"]])
def test_one_output_without_gradient(
    unused: int, frozen: list[str], device: torch.device, poison: None
) -> None:
    x, residual, dy = (torch.randn(5, 48, device=device) for _ in range(3))
    upstream = [None if i == unused else dy for i in range(2)]
    inputs = {"x": x, "residual": residual, "weight": torch.randn(48, device=device)}
    if unused == 0:
        # Autograd then gives the weight no gradient in either; the residual path is the identity.
        frozen = ["weight"]
    compare(inputs, upstream=upstream, frozen=frozen)


def test_unused_norm_gives_the_weight_no_gradient(device: torch.device) -> None:
    x, residual = (torch.randn(5, 48, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(48, device=device, requires_grad=True)
    _, summed = add_rms_norm(x, residual, weight, eps=EPS)
    summed.sum().backward()
    assert weight.grad is None
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
    assert residual.grad is not None and residual.grad.data_ptr() != x.grad.data_ptr()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("out_dtype", [None, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, None])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    order: dict[str, Any],
    device: torch.device,
) -> None:
    x = torch.randn(5, 48, dtype=dtype, device=device)
    residual = torch.randn(5, 48, dtype=residual_dtype, device=device)
    weight = None if weight_dtype is None else torch.randn(48, dtype=weight_dtype, device=device)
    compare({"x": x, "residual": residual, "weight": weight}, out_dtype=out_dtype, **order)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_is_that_of_eager(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (torch.randn(9, 96, dtype=dtype, device=device) for _ in range(2))
    _, summed = add_rms_norm(x, residual, None, eps=EPS)
    assert torch.equal(summed, x + residual)


VIEWS = list(views(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_inputs_and_gradients(view: str, device: torch.device, poison: None) -> None:
    weight = torch.randn(32, device=device)
    odd = views(device, torch.float32)[view]
    plain = torch.randn(odd.shape, device=device)
    before = odd.clone()
    compare({"x": odd, "residual": plain, "weight": weight}, upstream=[plain, odd])
    compare({"x": plain, "residual": odd, "weight": weight}, upstream=[odd, plain])
    assert torch.equal(odd, before)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.float16, 3e4)])
def test_magnitudes(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    x, residual = ((torch.rand(5, 96, device=device) * 2 - 1).mul(scale).to(dtype) for _ in range(2))
    compare({"x": x, "residual": residual, "weight": torch.randn(96, dtype=dtype, device=device)})


def test_empty(device: torch.device) -> None:
    x, residual = (torch.randn(0, 96, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(96, device=device, requires_grad=True)
    y, summed = add_rms_norm(x, residual, weight, eps=EPS)
    assert y.shape == summed.shape == (0, 96)
    (y + summed).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


def test_opcheck(device: torch.device) -> None:
    x, residual, dy, dsummed = (torch.randn(3, 2, 16, device=device) for _ in range(4))
    weight = torch.randn(16, device=device)
    ops = torch.ops.sloth
    torch.library.opcheck(ops.add_rms_norm_fwd.default, (x, residual.half(), weight, EPS, 1.0, True, None))
    torch.library.opcheck(
        ops.add_rms_norm_fwd.default, (x.half(), residual.half(), None, EPS, 0.0, False, torch.float32)
    )
    _, summed, rstd = ops.add_rms_norm_fwd(x, residual, weight, EPS, 1.0, True, None)
    torch.library.opcheck(ops.add_rms_norm_bwd.default, (dy, dsummed, summed, weight, rstd, 1.0, True))
    torch.library.opcheck(ops.add_rms_norm_bwd.default, (dy, None, summed, None, rstd, 1.0, False))


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(frozen: bool, device: torch.device) -> None:
    def step(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, summed = add_rms_norm(x * 2, residual, weight, eps=EPS)
        return y.sin() + summed

    results = []
    start = [
        torch.randn(4, 32, device=device),
        torch.randn(4, 32, device=device),
        torch.randn(32, device=device),
    ]
    for function in (step, torch.compile(step, fullgraph=True, backend=COMPILE_BACKEND)):
        x, residual, weight = (t.clone().requires_grad_() for t in start)
        weight.requires_grad_(not frozen)
        y = function(x, residual, weight)
        y.sum().backward()
        results.append((y.detach(), x.grad, residual.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1])
    assert (results[1][3] is None) == frozen


def test_refusals(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match="residual has shape"):
        add_rms_norm(x, x[:1], None, eps=EPS)
    with pytest.raises(ValueError, match="residual is"):
        add_rms_norm(x, x.long(), None, eps=EPS)
