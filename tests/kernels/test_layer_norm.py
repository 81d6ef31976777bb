"""LayerNorm kernel: every output and gradient against eager and float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from norm_cases import COMPILE_BACKEND, DTYPES, EPS, SHAPES, poison, views
from sloth_kernels.layer_norm import layer_norm, layer_norm_reference
from three_way import check

__all__ = ["poison"]


def compare(inputs: dict[str, torch.Tensor | None], **settings: Any) -> None:
    options = {name: settings.pop(name) for name in ("frozen", "upstream") if name in settings}
    settings.setdefault("eps", EPS)
    wide = {name: value for name, value in settings.items() if name != "out_dtype"}
    check(
        partial(layer_norm, **settings),
        partial(layer_norm_reference, **settings),
        inputs,
        truth=partial(layer_norm_reference, **wide),
        **options,
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 1)])
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, poison: None) -> None:
    x = torch.randn(shape, dtype=dtype, device=device)
    weight, bias = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))
    # Interpreted, a wide row costs a program for every 16 columns of the sum.
    single = [["weight"], ["bias"]] if x.shape[-1] < 1000 else []
    for frozen in ([], *single, ["weight", "bias"]):
        compare({"x": x, "weight": weight, "bias": bias}, frozen=frozen)


def test_one_column(device: torch.device, poison: None) -> None:
    """xhat is 0 whatever x is: y is the bias, and x and weight have no gradient."""
    x = torch.randn(3, 1, device=device, requires_grad=True)
    weight, bias = (torch.randn(1, device=device, requires_grad=True) for _ in range(2))
    y = layer_norm(x, weight, bias, eps=EPS)
    assert torch.equal(y, bias.expand(3, 1))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))
    assert bias.grad is not None and torch.equal(bias.grad, torch.full_like(bias, 3))


@pytest.mark.parametrize("out_dtype", [None, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("weight_dtype", "bias_dtype"),
    [(torch.float32, torch.float16), (torch.float16, None), (None, torch.float32), (None, None)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    x = torch.randn(5, 48, dtype=dtype, device=device)
    weight = None if weight_dtype is None else torch.randn(48, dtype=weight_dtype, device=device)
    bias = None if bias_dtype is None else torch.randn(48, dtype=bias_dtype, device=device)
    compare({"x": x, "weight": weight, "bias": bias}, out_dtype=out_dtype)
    assert layer_norm(x, weight, bias, eps=EPS, out_dtype=out_dtype).dtype == (out_dtype or dtype)


def test_reference_is_layer_norm(device: torch.device) -> None:
    x = torch.randn(8, 96, dtype=torch.float64, device=device)
    weight, bias = (torch.randn(96, dtype=torch.float64, device=device) for _ in range(2))
    expected = torch.nn.functional.layer_norm(x, (96,), weight, bias, EPS)
    torch.testing.assert_close(layer_norm_reference(x, weight, bias, eps=EPS), expected)


def test_formula_of_the_gradient() -> None:
    """The derivation in the module docstring against autograd through the reference, in float64."""
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(4, 9, dtype=torch.float64)
    gradients = torch.autograd.grad(layer_norm_reference(x, weight, bias, eps=EPS), [x, weight, bias], dy)
    with torch.no_grad():
        rstd = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
        xhat = (x - x.mean(-1, keepdim=True)) * rstd
        g = dy * weight
        dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
        torch.testing.assert_close(gradients, (dx, (dy * xhat).sum(0), dy.sum(0)))


VIEWS = list(views(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_x_and_of_its_gradient(view: str, device: torch.device, poison: None) -> None:
    weight, bias = (torch.randn(64, device=device)[::2] for _ in range(2))
    odd = views(device, torch.float32)[view]
    plain = torch.randn(odd.shape, device=device)
    before = odd.clone()
    if view != "one number":  # A row of equal numbers has no direction: xhat is rounding noise, in eager too.
        compare({"x": odd, "weight": weight, "bias": bias})
    compare({"x": plain, "weight": weight, "bias": bias}, upstream=[odd])
    assert torch.equal(odd, before)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.float16, 3e4)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_magnitudes(dtype: torch.dtype, scale: float, shift: float, device: torch.device) -> None:
    """With a shift the mean is as large as the spread: a variance of E[x^2] - mean^2 would cancel."""
    x = (torch.rand(5, 96, device=device) * 2 - 1 + shift).mul(scale).to(dtype)
    weight, bias = (torch.randn(96, dtype=dtype, device=device) for _ in range(2))
    compare({"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.randn(96, device=device, requires_grad=True) for _ in range(2))
    y = layer_norm(x, weight, bias, eps=EPS)
    assert y.shape == shape
    y.sum().backward()
    for vector in (weight, bias):
        assert vector.grad is not None and torch.equal(vector.grad, torch.zeros_like(vector))


def test_opcheck(device: torch.device) -> None:
    x = torch.randn(2, 3, 16, device=device).transpose(0, 1)
    weight, bias = torch.randn(16, device=device), torch.randn(16, device=device, dtype=torch.float16)
    dy = torch.randn(3, 2, 16, device=device)
    ops = torch.ops.sloth
    torch.library.opcheck(ops.layer_norm_fwd.default, (x, weight, bias, EPS, None))
    torch.library.opcheck(ops.layer_norm_fwd.default, (x, None, None, EPS, torch.float16))
    _, mean, rstd = ops.layer_norm_fwd(x, weight, bias, EPS, None)
    torch.library.opcheck(ops.layer_norm_bwd.default, (dy, x, weight, mean, rstd, True, torch.float16))
    torch.library.opcheck(ops.layer_norm_bwd.default, (dy, x, None, mean, rstd, False, None))


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(frozen: bool, device: torch.device) -> None:
    def step(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return layer_norm(x * 2, weight, bias, eps=EPS).sin()

    results = []
    start = [
        torch.randn(4, 32, device=device),
        torch.randn(32, device=device),
        torch.randn(32, device=device),
    ]
    for function in (step, torch.compile(step, fullgraph=True, backend=COMPILE_BACKEND)):
        x, weight, bias = (t.clone().requires_grad_() for t in start)
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        y = function(x, weight, bias)
        y.sum().backward()
        results.append((y.detach(), x.grad, weight.grad, bias.grad))
    torch.testing.assert_close(results[0], results[1])
    assert (results[1][2] is None) == frozen
