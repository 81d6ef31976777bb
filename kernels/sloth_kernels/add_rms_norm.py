"""Residual addition and RMSNorm in one pass forward and one pass backward.

    summed = (x + residual).to(promote(x.dtype, residual.dtype))
    y      = rms_norm(summed, weight)         formula and rounding orders as in rms_norm.py [1]

With dy the gradient of y and dsummed that of summed (either may be absent), roundings taken as the identity:

    dsum    = dsummed + rstd * (g - xhat * mean(g * xhat)),  g = dy * (weight + offset),  xhat = summed * rstd
    dweight = sum over rows of dy * xhat      weight.dtype, summed in float32

dsum is the gradient of x and of residual alike (cast where their dtypes differ).
Shapes: x, residual, y, summed, dsum (..., N); weight, dweight (N,); rstd (...), float32. float32, bfloat16,
float16; N up to 16,384. Saved: summed (an output, which the model keeps anyway) and rstd. The kernels are
those of rms_norm.py.

Bytes that must move (N columns, bf16): forward 8N a row, backward 8N a row.

`rms_norm_beside` is the norm of a layer's input, which the layer also adds to something later: the backward
adds both gradients in its one pass, where autograd would add them in one of its own (6N bytes a row).

[1] arXiv:1910.07467
"""

# Torch.autograd.Function is untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch

from sloth_kernels._library import differentiable_gradients, register_op, run_op, wants_graph
from sloth_kernels.rms_norm import (
    KERNEL_DTYPES,
    check_norm_arguments,
    has_float64,
    launch_bwd,
    launch_fwd,
    result_dtype,
    rms_norm_fwd,
    rms_norm_reference,
)


def add_rms_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, summed, rstd = launch_fwd(x, residual, weight, eps, offset, cast_before_weight, out_dtype)
    assert summed is not None
    return y, summed, rstd


def add_rms_norm_bwd(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_bwd(dy, dsummed, summed, weight, rstd, offset, weight_grad)


def _fwd_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    in_dtype = torch.promote_types(x.dtype, residual.dtype)
    dtype = result_dtype(in_dtype, None if weight is None else weight.dtype, cast_before_weight, out_dtype)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=in_dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def _bwd_fake(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dweight = weight.new_empty(weight.shape) if weight is not None and weight_grad else summed.new_empty(0)
    return summed.new_empty(summed.shape), dweight


register_op(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps, float offset,"
    " bool cast_before_weight, ScalarType? out_dtype) -> (Tensor, Tensor, Tensor)",
    add_rms_norm_fwd,
    _fwd_fake,
)
register_op(
    "add_rms_norm_bwd(Tensor dy, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor rstd, float offset,"
    " bool weight_grad) -> (Tensor, Tensor)",
    add_rms_norm_bwd,
    _bwd_fake,
)


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        cast_before_weight: bool,
        out_dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, summed, rstd = run_op(
            torch.ops.sloth.add_rms_norm_fwd,
            add_rms_norm_fwd,
            x,
            residual,
            weight,
            eps,
            offset,
            cast_before_weight,
            out_dtype,
        )
        ctx.save_for_backward(summed, weight, rstd)
        ctx.options = {
            "eps": eps,
            "offset": offset,
            "cast_before_weight": cast_before_weight,
            "out_dtype": out_dtype,
        }
        ctx.dtypes = (x.dtype, residual.dtype)
        # An unused output would otherwise cost a tensor of zeros, written and read. Dynamo lacks the method.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return y, summed

    @staticmethod
    def backward(
        ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x_dtype, residual_dtype = ctx.dtypes
        dsum, dweight = _both_gradients(ctx, dy, dsummed, ctx.needs_input_grad[2])
        dx = dresidual = None
        if dsum is not None:
            dx, dresidual = dsum.to(x_dtype), dsum.to(residual_dtype)
        return dx, dresidual, dweight, None, None, None, None


def _both_gradients(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, weight_grad: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dsum, dweight) of a function that has saved summed, weight and rstd."""
    summed, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dsummed, None
    if wants_graph():
        reference = functools.partial(rms_norm_reference, **ctx.options)
        dsum, dweight = differentiable_gradients(reference, (summed, weight), [dy])
        if dsummed is not None:
            dsum = dsummed if dsum is None else dsum + dsummed
        return dsum, dweight
    dsum, dweight = run_op(
        torch.ops.sloth.add_rms_norm_bwd,
        add_rms_norm_bwd,
        dy,
        dsummed,
        summed,
        weight,
        rstd,
        ctx.options["offset"],
        weight_grad,
    )
    return dsum, dweight if weight_grad else None


class _RMSNormBeside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = run_op(torch.ops.sloth.rms_norm_fwd, rms_norm_fwd, x, weight, *options.values())
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(
        ctx: Any, dy: torch.Tensor | None, dx: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return *_both_gradients(ctx, dy, dx, ctx.needs_input_grad[1]), None


def rms_norm_beside(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`rms_norm` of x, x) with one pass for the gradient that x gets through both; arguments as there."""
    if has_float64(x, weight):
        y = rms_norm_reference(
            x, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight, out_dtype=out_dtype
        )
        return y, x
    check_norm_arguments("rms_norm_beside", x, [("weight", weight)], out_dtype)
    options = {"eps": eps, "offset": offset, "cast_before_weight": cast_before_weight, "out_dtype": out_dtype}
    return _RMSNormBeside.apply(x, weight, options)  # type: ignore[no-any-return]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual, and its RMSNorm over the last dimension, by the kernel.

    Args:
        x, residual: (..., N), one shape, float32, bfloat16 or float16, any strides; N up to 16,384.
            Float64 goes to the reference.
        weight: (N,), any of these dtypes, or None.
        eps, offset, cast_before_weight, out_dtype: as in `rms_norm`, where x.dtype is that of the sum.

    Returns:
        (y, summed), both (..., N) and contiguous: the norm of the sum, and the sum in
        promote_types(x.dtype, residual.dtype).

    Raises:
        ValueError: for a dtype, shape or width that the kernel does not take.
    """
    if has_float64(x, residual, weight):
        return add_rms_norm_reference(
            x,
            residual,
            weight,
            eps=eps,
            offset=offset,
            cast_before_weight=cast_before_weight,
            out_dtype=out_dtype,
        )
    check_norm_arguments("add_rms_norm", x, [("weight", weight)], out_dtype)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
    if residual.dtype not in KERNEL_DTYPES:
        raise ValueError(f"add_rms_norm: residual is {residual.dtype}, expected one of {KERNEL_DTYPES}")
    if residual.device != x.device:
        raise ValueError(f"add_rms_norm: residual is on {residual.device}, x on {x.device}")
    return AddRMSNormFunction.apply(  # type: ignore[no-any-return]
        x, residual, weight, eps, offset, cast_before_weight, out_dtype
    )


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain PyTorch: the CPU path and the truth. Float64 stays float64 throughout."""
    summed = x + residual
    y = rms_norm_reference(
        summed, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight, out_dtype=out_dtype
    )
    return y, summed
