"""gated_activation and gated_activation_packed against eager and float64."""

from functools import partial

import pytest
import torch
from sloth_kernels import gated_activation as op
from sloth_kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_packed,
    gated_activation_packed_reference,
    gated_activation_reference,
)
from three_way import check

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SHAPES = [(1, 1), (3, 7), (2, 3, 96), (3, 2049)] + ([(257, 4096), (64, 14336), (33, 11008)] if GPU else [])


def _randn(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def _check(activation: str, gate: torch.Tensor, up: torch.Tensor, **options) -> None:
    check(
        partial(gated_activation, activation=activation),
        partial(gated_activation_reference, activation=activation),
        {"gate": gate, "up": up},
        **options,
    )


def _check_packed(activation: str, gate_up: torch.Tensor, **options) -> None:
    check(
        partial(gated_activation_packed, activation=activation),
        partial(gated_activation_packed_reference, activation=activation),
        {"gate_up": gate_up},
        **options,
    )


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(op.torch, name, poisoned)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, activation, device, monkeypatch):
    _poison(monkeypatch)
    gate = _randn(*shape, dtype=dtype, device=device, scale=3.0)
    _check(activation, gate, _randn(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_accuracy(shape, dtype, activation, device, monkeypatch):
    _poison(monkeypatch)
    _check_packed(activation, _randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, scale=3.0))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, 3, 200)[..., :96],  # a slice of a joint buffer
        lambda x: x.view(2, 3, 200).transpose(0, 1),
        lambda x: x.view(2, 200, 3).transpose(1, 2),  # last dim not contiguous
        lambda x: x.view(1200)[3:],  # storage not aligned to 16 bytes
    ],
    ids=["slice", "rows transposed", "columns strided", "unaligned"],
)
def test_strided_inputs(view, device):
    gate = view(_randn(1200, dtype=torch.float32, device=device))
    up = view(_randn(1200, dtype=torch.float32, device=device, scale=2.0))
    _check("silu", gate, up)
    _check("gelu", gate, up.contiguous())
    if gate.shape[-1] % 2 == 0:
        _check_packed("silu", gate)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_gradients(activation, device):
    gate, up = (_randn(3, 50, dtype=torch.float32, device=device, scale=s) for s in (1.0, 2.0))
    for upstream in (
        torch.ones((), device=device).expand(3, 50),
        _randn(50, 3, dtype=torch.float32, device=device).t(),
        _randn(3, 80, dtype=torch.float32, device=device)[:, 7:57],
    ):
        _check(activation, gate, up, upstream=[upstream])
        _check_packed(activation, torch.cat((gate, up), dim=-1), upstream=[upstream])


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(dtypes, device):
    gate = _randn(3, 40, dtype=dtypes[0], device=device)
    _check("silu", gate, _randn(3, 40, dtype=dtypes[1], device=device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_magnitudes(activation, device):
    gate = torch.tensor(
        [1e4, -1e4, 300.0, -300.0, 88.0, -88.0, 20.0, -20.0, 9.0, -9.0, 0.0, -0.0], device=device
    )
    up = torch.linspace(-1e4, 1e4, gate.numel(), device=device)
    _check(activation, gate, up)
    half = torch.tensor([60000.0, -60000.0, 4000.0, -4000.0, 12.0, -12.0], device=device, dtype=torch.float16)
    _check(activation, half, torch.ones_like(half))
    # Eager's gelu_tanh gradient is NaN here; ours must not be.
    extreme = torch.tensor([3e38, -3e38, 1e30, -1e30], device=device, requires_grad=True)
    y = gated_activation(extreme, torch.ones_like(extreme), activation=activation)
    (gradient,) = torch.autograd.grad(y.sum(), extreme)
    torch.testing.assert_close(y, extreme.clamp(min=0).detach())
    torch.testing.assert_close(gradient, torch.tensor([1.0, 0.0, 1.0, 0.0], device=device))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 6)], ids=str)
def test_empty(shape, device):
    gate = torch.empty(shape, device=device, requires_grad=True)
    y = gated_activation(gate, torch.empty(shape, device=device), activation="silu")
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), gate)[0].shape == shape
    packed = torch.empty((*shape[:-1], 2 * shape[-1]), device=device, requires_grad=True)
    y = gated_activation_packed(packed, activation="gelu")
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), packed)[0].shape == packed.shape


def test_only_one_input_takes_a_gradient(device):
    gate, up = (_randn(2, 9, dtype=torch.float32, device=device, scale=s) for s in (1.0, 2.0))
    _check("silu", gate, up, frozen=("up",))
    _check("silu", gate, up, frozen=("gate",))


def test_saved_tensors_and_gradient_are_not_written_over(device):
    gate, up, grad = (_randn(3, 33, dtype=torch.float32, device=device, scale=s) for s in (1.0, 2.0, 3.0))
    copies = [x.clone() for x in (gate, up, grad)]
    gated_activation(gate.requires_grad_(), up, activation="gelu_tanh").backward(grad)
    for x, copy in zip((gate, up, grad), copies, strict=True):
        assert torch.equal(x.detach(), copy)


def test_float64_goes_to_the_reference(device):
    gate, up = (_randn(2, 5, dtype=torch.float64, device=device, scale=s) for s in (1.0, 2.0))
    torch.testing.assert_close(
        gated_activation(gate, up, activation="gelu"),
        gated_activation_reference(gate, up, activation="gelu"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula_of_the_docstring(activation):
    """The hand-derived slopes against autograd of the reference, in float64."""
    g = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    y = gated_activation_reference(g, torch.ones_like(g), activation=activation)
    (expected,) = torch.autograd.grad(y.sum(), g)
    g = g.detach()
    if activation == "silu":
        s = torch.sigmoid(g)
        slope = s * (1 + g * (1 - s))
    elif activation == "gelu":
        cdf = (1 + torch.erf(g / 2**0.5)) / 2
        slope = cdf + g * torch.exp(-g * g / 2) / (2 * torch.pi) ** 0.5
    else:
        scale = 2 * (2 / torch.pi) ** 0.5
        s = torch.sigmoid(scale * (g + 0.044715 * g**3))
        slope = s + g * s * (1 - s) * scale * (1 + 3 * 0.044715 * g**2)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


def test_arguments():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"'relu'.*'silu', 'gelu_tanh', 'gelu'"):
        gated_activation(x, x, activation="relu")
    with pytest.raises(ValueError, match="'relu'"):
        gated_activation_packed(x, activation="relu")
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 2\)"):
        gated_activation(x, x[:, :2], activation="silu")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        gated_activation_packed(x[:, :3], activation="silu")


def test_opcheck(device):
    gate, up, grad = (torch.randn(3, 10, device=device) for _ in range(3))
    packed = torch.randn(3, 20, device=device)
    torch.library.opcheck(torch.ops.sloth.gated_activation_fwd, (gate, up, "silu"))
    torch.library.opcheck(torch.ops.sloth.gated_activation_bwd, (grad, gate, up, "gelu"))
    torch.library.opcheck(torch.ops.sloth.gated_activation_packed_fwd, (packed, "silu"))
    torch.library.opcheck(torch.ops.sloth.gated_activation_packed_bwd, (grad, packed, "gelu_tanh"))


def test_compile(device):
    def step(gate, up, packed):
        return gated_activation(gate * 1, up, activation="silu") + gated_activation_packed(
            packed * 1, activation="gelu"
        )

    inputs = [torch.randn(3, n, device=device, requires_grad=True) for n in (10, 10, 20)]
    expected = torch.autograd.grad(step(*inputs).square().sum(), inputs)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs).square().sum(), inputs), expected)
