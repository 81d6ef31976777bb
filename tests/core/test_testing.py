"""check_kernel: what is right passes, and each kind of wrong fails with words that tell what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import manager_with

from sloth_plugins.settings import OPS
from sloth_plugins.specs import KernelSpec
from sloth_plugins.testing import SAMPLES, check_kernel

# Their arguments are lists of projections, not tensors: tests/kernels/test_lora.py is their gate.
WITHOUT_SAMPLES = {"lora_linear", "lora_mlp"}
BUILT_IN = {spec.name: spec for spec in manager_with().kernels() if spec.op not in WITHOUT_SAMPLES}
REFERENCES = {spec.op: spec.reference for spec in BUILT_IN.values()}
rms_norm = REFERENCES["rms_norm"]


def spec_of(function: Callable[..., Any], op: str = "rms_norm", **changes: Any) -> KernelSpec:
    """A third party's kernel that brings `function` as its own reference too."""
    values: dict[str, Any] = {
        "op": op,
        "name": f"test.{op}",
        "backend": "test",
        "function": function,
        "reference": function,
        "device_types": frozenset({"cpu", "cuda"}),
    }
    return KernelSpec(**{**values, **changes})


def test_every_op_that_can_be_disabled_has_samples_and_kernels() -> None:
    assert set(OPS) - WITHOUT_SAMPLES == set(SAMPLES) == set(REFERENCES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_kernels_pass(name: str, device: torch.device) -> None:
    spec = BUILT_IN[name]
    if spec.unavailable() is not None or device.type not in spec.device_types:
        pytest.skip(f"{name} can't run on {device}: {spec.unavailable()}")
    comparisons = check_kernel(spec, device=device)
    tensors = {comparison.tensor.rsplit(", ", 1)[1] for comparison in comparisons}
    assert {"output 0"} < tensors and any(tensor.startswith("gradient of") for tensor in tensors)
    dtypes = {comparison.tensor.split(",")[0] for comparison in comparisons}
    bf16 = device.type == "cuda" or spec.backend == "torch"
    assert dtypes == {"float32", "float16"} | ({"bfloat16"} if bf16 else set())


def test_dtypes_are_the_callers_choice() -> None:
    comparisons = check_kernel(BUILT_IN["sloth.torch.rms_norm"], device="cpu", dtypes=[torch.float16])
    assert {comparison.tensor.split(",")[0] for comparison in comparisons} == {"float16"}


# Deliberately wrong kernels: name -> (op, function, what the message must hold)


class _WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, options: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return rms_norm(x, weight, **options)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            w = None if weight is None else weight.detach().requires_grad_()
            leaves = [leaf for leaf in (x, w) if leaf is not None]
            gradients = torch.autograd.grad(rms_norm(x, w, **ctx.options), leaves, dy)
        return -gradients[0], gradients[1] if len(gradients) > 1 else None, None


def wrong_sign(x: Any, weight: Any, **options: Any) -> Any:
    return _WrongSign.apply(x, weight, options)


def wrong_eps(x: Any, weight: Any, *, eps: float, **options: Any) -> Any:
    return rms_norm(x, weight, eps=1e-6, **options)


def no_weight_gradient(x: Any, weight: Any, **options: Any) -> Any:
    return rms_norm(x, None if weight is None else weight.detach(), **options)


def wrong_dtype(x: Any, weight: Any, **options: Any) -> Any:
    return rms_norm(x, weight, **options).float()


def gives_nan(x: Any, weight: Any, **options: Any) -> Any:
    y = rms_norm(x, weight, **options)
    return torch.where(torch.arange(y.shape[-1], device=y.device) == 3, float("nan"), y)


def ignores_offset(x: Any, weight: Any, *, offset: float = 0.0, **options: Any) -> Any:
    return rms_norm(x, weight, **options)


def overflows(x: Any, weight: Any, **options: Any) -> Any:
    """Squares in the input's dtype: right for small rows, infinite for large ones in float16."""
    mean = x.pow(2).mean(-1, keepdim=True).float()
    y = x.float() * torch.rsqrt(mean + options["eps"])
    w = 1.0 if weight is None else weight.float() + options.get("offset", 0.0)
    reference = rms_norm(x.detach(), weight, **options)
    return (y * w).to(reference.dtype)


def assumes_contiguous(x: Any, weight: Any, **options: Any) -> Any:
    """Reads x's memory in the order of its addresses."""
    if x.numel():
        x = x.as_strided(x.shape, torch.empty(x.shape).stride())
    return rms_norm(x, weight, **options)


def overwrites_input(x: Any, weight: Any, **options: Any) -> Any:
    y = rms_norm(x, weight, **options)
    x.data.mul_(2)
    return y


def raises_on_odd(x: Any, weight: Any, **options: Any) -> Any:
    if x.shape[-1] % 2:
        raise RuntimeError("the width must be even")
    return rms_norm(x, weight, **options)


def two_outputs(x: Any, weight: Any, **options: Any) -> Any:
    y = rms_norm(x, weight, **options)
    return y, y


def without_out_dtype(
    x: Any, weight: Any, *, eps: float, offset: float = 0.0, cast_before_weight: bool = False
) -> Any:
    return rms_norm(x, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight)


def swapped_halves(gate: Any, up: Any, *, activation: str) -> Any:
    reference = REFERENCES["gated_mlp"]
    return (
        reference(gate, up, activation=activation)
        if up is None
        else reference(up, gate, activation=activation)
    )


def one_gelu(gate: Any, up: Any, *, activation: str) -> Any:
    return REFERENCES["gated_mlp"](gate, up, activation="gelu" if activation == "gelu_tanh" else activation)


def rotates_everything(q: Any, k: Any, cos: Any, sin: Any, **options: Any) -> Any:
    return REFERENCES["rope"](q, k, cos, sin, **{**options, "layout": "half"})


def q_norm_for_both(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, **options: Any) -> Any:
    return REFERENCES["qk_norm_rope"](q, k, q_weight, q_weight + 0 * k_weight, cos, sin, **options)


def forgets_residual(x: Any, residual: Any, weight: Any, **options: Any) -> Any:
    y, _ = REFERENCES["add_rms_norm"](x, residual, weight, **options)
    return y, x + 0 * residual


def uncentred(x: Any, weight: Any, bias: Any, *, eps: float, out_dtype: Any = None) -> Any:
    y = rms_norm(x, weight, eps=eps, out_dtype=out_dtype)
    return y if bias is None else (y + bias).to(y.dtype)


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "wrong sign in a gradient": ("rms_norm", wrong_sign, "gradient of x: 2.00e+00"),
    "wrong eps": ("rms_norm", wrong_eps, "a large eps"),
    "missing weight gradient": ("rms_norm", no_weight_gradient, "gradient of weight: missing"),
    "wrong dtype": ("rms_norm", wrong_dtype, "float32 where the reference gives"),
    "NaN": ("rms_norm", gives_nan, "output 0: inf"),
    "no offset": ("rms_norm", ignores_offset, "Gemma"),
    "overflow": ("rms_norm", overflows, "float16, large"),
    "contiguous only": ("rms_norm", assumes_contiguous, "slice of a buffer"),
    "writes over its input": ("rms_norm", overwrites_input, "writes over its input x"),
    "raises": ("rms_norm", raises_on_odd, "RuntimeError: the width must be even"),
    "two outputs": ("rms_norm", two_outputs, "2 outputs where the reference has 1"),
    "missing argument": ("rms_norm", without_out_dtype, "takes no argument 'out_dtype'"),
    "gate for up": ("gated_mlp", swapped_halves, "silu"),
    "one gelu for both": ("gated_mlp", one_gelu, "gelu_tanh"),
    "one layout for all": ("rope", rotates_everything, "interleaved"),
    "q's weight for k": ("qk_norm_rope", q_norm_for_both, "gradient of k_weight"),
    "no residual": ("add_rms_norm", forgets_residual, "output 1"),
    "not centred": ("layer_norm", uncentred, "output 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_kernels_fail(case: str) -> None:
    op, function, text = WRONG[case]
    with pytest.raises(AssertionError) as caught:
        check_kernel(spec_of(function, op), device="cpu", dtypes=[torch.float32, torch.float16])
    assert text in str(caught.value), str(caught.value)


def test_a_third_partys_own_reference_is_not_trusted() -> None:
    """`wrong_eps` agrees with itself perfectly, and fails all the same."""
    spec = spec_of(wrong_eps)
    assert spec.function is spec.reference
    with pytest.raises(AssertionError, match="a large eps"):
        check_kernel(spec, device="cpu")


def test_what_cannot_be_checked_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"op='mine.conv': check_kernel has samples for rms_norm"):
        check_kernel(spec_of(rms_norm, op="mine.conv"))
    with pytest.raises(ValueError, match="no driver today"):
        check_kernel(spec_of(rms_norm, unavailable=lambda: "no driver today"))
    with pytest.raises(ValueError, match="is to be checked in none"):
        check_kernel(spec_of(rms_norm), dtypes=[])
    with pytest.raises(ValueError, match="device='cpu'"):
        check_kernel(dataclasses.replace(spec_of(rms_norm), device_types=frozenset({"cuda"})), device="cpu")
