"""RMSNorm kernel: every output and gradient against eager and float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from norm_cases import COMPILE_BACKEND, DTYPES, EPS, SHAPES, poison, views
from sloth_kernels.rms_norm import (
    as_rows,
    multiprocessors,
    persistent_tile,
    rms_norm,
    rms_norm_reference,
    row_tile,
)
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
        partial(rms_norm, **settings),
        partial(rms_norm_reference, **settings),
        inputs,
        truth=partial(rms_norm_reference, **wide),
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
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    # With one column dx is what eps leaves of it, and with a small eps that is rounding noise in eager too.
    order = {**order, "eps": 0.5 if shape[-1] == 1 else EPS}
    compare({"x": x, "weight": weight}, **order)
    compare({"x": x, "weight": weight}, frozen=["weight"], **order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("out_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    order: dict[str, Any],
    device: torch.device,
) -> None:
    x = torch.randn(5, 48, dtype=dtype, device=device)
    weight = None if weight_dtype is None else torch.randn(48, dtype=weight_dtype, device=device)
    compare({"x": x, "weight": weight}, out_dtype=out_dtype, **order)
    expected = out_dtype or (
        torch.promote_types(dtype, weight_dtype) if weight_dtype and "cast_before_weight" in order else dtype
    )
    assert rms_norm(x, weight, eps=EPS, out_dtype=out_dtype, **order).dtype == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_order_is_that_of_eager(dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit but for the last bit of rstd; the two orders differ in far more elements than that."""
    x = torch.randn(64, 96, dtype=dtype, device=device)
    weight = torch.randn(96, dtype=dtype, device=device)
    for order in (True, False):
        got, expected = (
            f(x, weight, eps=EPS, cast_before_weight=order) for f in (rms_norm, rms_norm_reference)
        )
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        else:
            assert (got != expected).float().mean() < 0.01


def test_reference_is_what_transformers_computes(device: torch.device) -> None:
    x = torch.randn(8, 96, dtype=torch.float16, device=device)
    weight = torch.randn(96, dtype=torch.float16, device=device)
    xhat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    llama = rms_norm_reference(x, weight, eps=EPS, cast_before_weight=True)
    assert torch.equal(llama, weight * xhat.to(x.dtype))
    gemma = rms_norm_reference(x, weight, eps=EPS, offset=1.0)
    assert torch.equal(gemma, (xhat * (1.0 + weight.float())).to(x.dtype))


def test_formula_of_the_gradient() -> None:
    """The derivation in the module docstring against autograd through the reference, in float64."""
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 9, dtype=torch.float64)
    dx, dweight = torch.autograd.grad(rms_norm_reference(x, weight, eps=EPS, offset=1.0), [x, weight], dy)
    with torch.no_grad():
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        xhat = x * rstd
        g = dy * (weight + 1)
        torch.testing.assert_close(dx, rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
        torch.testing.assert_close(dweight, (dy * xhat).sum(0))


VIEWS = list(views(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_x_and_of_its_gradient(
    dtype: torch.dtype, view: str, device: torch.device, poison: None
) -> None:
    weight = torch.randn(64, dtype=dtype, device=device)[::2]
    odd = views(device, dtype)[view]
    plain = torch.randn(odd.shape, dtype=dtype, device=device)
    before = odd.clone()
    compare({"x": odd, "weight": weight})
    compare({"x": plain, "weight": weight}, upstream=[odd])
    compare({"x": odd, "weight": weight}, upstream=[odd], frozen=["weight"])
    assert torch.equal(odd, before)


def test_what_three_strides_address_is_not_copied(device: torch.device) -> None:
    odd = views(device, torch.float32)
    for name in ("slice of a joint buffer", "heads before tokens", "expanded rows"):
        rows = as_rows(odd[name], torch.empty(2, 3, 4, 32, device=device))
        assert rows.tensors[0] is odd[name]
        assert rows.rows == 24
    assert as_rows(torch.empty(2, 3, 4, 32)).levels == 1
    four_strides = torch.randn(2, 3, 4, 5, 8, device=device).permute(3, 2, 1, 0, 4)
    assert as_rows(four_strides).levels == 1
    compare({"x": four_strides, "weight": torch.randn(8, device=device)})


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e4), (torch.float16, 3e4), (torch.float32, 1e-3)]
)
def test_magnitudes(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    x = (torch.rand(5, 96, device=device) * 2 - 1).mul(scale).to(dtype)
    weight = torch.randn(96, dtype=dtype, device=device)
    compare({"x": x, "weight": weight})
    compare({"x": x, "weight": weight * 1e3}, cast_before_weight=True, frozen=["weight"])


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (0,), (3, 0)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    y = rms_norm(x, weight, eps=EPS)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


def test_frozen_weight_costs_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 96, device=device, requires_grad=True)
    weight = torch.randn(96, device=device)
    y = rms_norm(x, weight, eps=EPS)
    made: list[int] = []
    real = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        made.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", counted)
    (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert weight.grad is None
    assert [n for n in made if n] == [dx.numel()]


def test_gradients_are_deterministic_and_inputs_untouched(device: torch.device) -> None:
    x = torch.randn(40, 96, device=device, requires_grad=True)
    weight = torch.randn(96, device=device, requires_grad=True)
    dy = torch.randn(40, 96, device=device)
    copies = [t.detach().clone() for t in (x, weight, dy)]
    y = rms_norm(x, weight, eps=EPS)
    first, second = (torch.autograd.grad(y, [x, weight], dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, weight, dy), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 3, 16, dtype=dtype, device=device).transpose(0, 1)
    weight = torch.randn(16, device=device)
    dy = torch.randn(3, 2, 16, dtype=dtype, device=device)
    ops = torch.ops.sloth
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, weight, EPS, 1.0, True, None))
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, None, EPS, 0.0, False, torch.float16))
    rstd = ops.rms_norm_fwd(x, weight, EPS, 1.0, True, None)[1]
    torch.library.opcheck(ops.rms_norm_bwd.default, (dy, x, weight, rstd, 1.0, True))
    torch.library.opcheck(ops.rms_norm_bwd.default, (dy, x, None, rstd, 1.0, False))


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(frozen: bool, device: torch.device) -> None:
    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x * 2, weight, eps=EPS, cast_before_weight=True).sin()

    results = []
    x0, weight0 = torch.randn(4, 32, device=device), torch.randn(32, device=device)
    for function in (step, torch.compile(step, fullgraph=True, backend=COMPILE_BACKEND)):
        x, weight = x0.clone().requires_grad_(), weight0.clone().requires_grad_(not frozen)
        y = function(x, weight)
        y.sum().backward()
        results.append((y.detach(), x.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1])
    assert (results[1][2] is None) == frozen


def test_float64_goes_to_the_reference(device: torch.device) -> None:
    x = torch.randn(2, 8, dtype=torch.float64, device=device)
    assert torch.equal(rms_norm(x, None, eps=EPS), rms_norm_reference(x, None, eps=EPS))


def test_refusals(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match="shape"):
        rms_norm(x, torch.ones(7, device=device), eps=EPS)
    with pytest.raises(ValueError, match="int64"):
        rms_norm(x.long(), None, eps=EPS)
    with pytest.raises(ValueError, match="16384"):
        rms_norm(torch.empty(1, 16385, device=device), None, eps=EPS)


@pytest.mark.parametrize(
    ("rows", "width"), [(8192, 4096), (8192 * 32, 128), (1, 96), (8192, 16384), (8192, 5120)]
)
def test_tiles_fit(rows: int, width: int) -> None:
    cpu = torch.device("cpu")
    for tile in (row_tile(rows, width), persistent_tile(rows, width, cpu)):
        assert tile.block_n >= width
        assert tile.programs * tile.rows >= rows or tile.programs >= multiprocessors(cpu)
        assert tile.rows * tile.block_n <= tile.num_warps * 32 * 32 or tile.num_warps == 16
