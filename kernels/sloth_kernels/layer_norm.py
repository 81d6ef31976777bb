"""LayerNorm in one pass forward and one pass backward [1].

    mean = mean(x),  rstd = 1 / sqrt(mean((x - mean)^2) + eps)    one float32 each a row, saved
    xhat = (x - mean) * rstd                                      float32
    y    = (xhat * weight + bias).to(x.dtype)                     rounded once; weight 1 and bias 0 where None

With g = dy * weight, all in float32 and every rounding treated as the identity:

    dx      = rstd * (g - mean(g) - xhat * mean(g * xhat))        x.dtype
    dweight = sum over rows of dy * xhat                          weight.dtype, summed in float32
    dbias   = sum over rows of dy                                 bias.dtype, summed in float32

Shapes: x, y, dx (..., N); weight, bias, dweight, dbias (N,); mean, rstd (...). float32, bfloat16, float16;
N up to 16,384. The backward recomputes xhat from x, so that only x, mean and rstd are saved.

Bytes that must move (N columns, bf16): forward 4N a row, backward 6N a row.

[1] Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch

from sloth_kernels._library import (
    differentiable_gradients,
    launch,
    register_op,
    run_op,
    tl,
    triton,
    wants_graph,
)
from sloth_kernels.rms_norm import (
    as_rows,
    check_norm_arguments,
    has_float64,
    load_per_row,
    no_gradient,
    persistent_tile,
    row_offset,
    row_tile,
    sum_partials,
)

# With two sums a row, fewer and busier threads are faster (see row_tile).
TWO_SUMS = {"tile_elements": 4096, "per_thread": 32}


@triton.jit
def layer_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """ROWS rows a program; they stay in registers through the mean, the variance and the product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (col < N)
    at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2, LEVELS) + col
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # Asked for before the reductions, whose barriers no load moves across.
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < N, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=col < N, other=0.0)
    mean = tl.sum(x, axis=1, keep_dims=True) / N
    # The variance is taken about the mean: E[x^2] - mean^2 cancels where the mean is large.
    x = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / N + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd
    if HAS_WEIGHT:
        y *= weight.to(tl.float32)
    if HAS_BIAS:
        y += bias.to(tl.float32)
    tl.store(y_ptr + (row.to(tl.int64) * N + col), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    size1,
    size2,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    x_stride0,
    x_stride1,
    x_stride2,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    LEVELS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of ROWS rows, a grid apart; each sum over a program's rows is written once (see rms_norm.py)."""
    col = tl.arange(0, BLOCK_N)[None, :]
    in_row = tl.arange(0, ROWS)[:, None]
    start = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    KEEP_WEIGHT: tl.constexpr = PREFETCH or ROWS > 1
    if HAS_WEIGHT and KEEP_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    if WEIGHT_GRAD:
        dweight = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if BIAS_GRAD:
        dbias = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if PREFETCH:
        row = start + in_row
        mask = (row < rows) & (col < N)
        at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2, LEVELS) + col
        next_x = tl.load(x_ptr + at, mask=mask, other=0.0)
        at = row_offset(row, size1, size2, dy_stride0, dy_stride1, dy_stride2, LEVELS) + col
        next_dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
        next_mean = load_per_row(mean_ptr, start, rows, ROWS)
        next_rstd = load_per_row(rstd_ptr, start, rows, ROWS)
    for first in range(start, rows, step):
        row = first + in_row
        if PREFETCH:
            x = next_x.to(tl.float32)
            dy = next_dy.to(tl.float32)
            mean = next_mean
            rstd = next_rstd
            row += step
            ahead = step
        else:
            ahead = 0
        mask = (row < rows) & (col < N)
        at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2, LEVELS) + col
        loaded_x = tl.load(x_ptr + at, mask=mask, other=0.0)
        at = row_offset(row, size1, size2, dy_stride0, dy_stride1, dy_stride2, LEVELS) + col
        loaded_dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
        loaded_mean = load_per_row(mean_ptr, first + ahead, rows, ROWS)
        loaded_rstd = load_per_row(rstd_ptr, first + ahead, rows, ROWS)
        if PREFETCH:
            next_x = loaded_x
            next_dy = loaded_dy
            next_mean = loaded_mean
            next_rstd = loaded_rstd
            row -= step
            mask = (row < rows) & (col < N)
        else:
            x = loaded_x.to(tl.float32)
            dy = loaded_dy.to(tl.float32)
            mean = loaded_mean
            rstd = loaded_rstd
        if HAS_WEIGHT and not KEEP_WEIGHT:
            weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32)
        # Masked lanes hold xhat = -mean * rstd, but dy = 0 there, and xhat enters every sum only times dy.
        xhat = (x - mean) * rstd
        if WEIGHT_GRAD:
            dweight += dy * xhat
        if BIAS_GRAD:
            dbias += dy
        if HAS_WEIGHT:
            dy *= weight
        mean_g = tl.sum(dy, axis=1, keep_dims=True) / N
        mean_gx = tl.sum(dy * xhat, axis=1, keep_dims=True) / N
        dx = rstd * (dy - mean_g - xhat * mean_gx)
        tl.store(dx_ptr + (row.to(tl.int64) * N + col), dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * N + col
    if WEIGHT_GRAD:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0, keep_dims=True), mask=col < N)
    if BIAS_GRAD:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0, keep_dims=True), mask=col < N)


def layer_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, mean, rstd
    rows = as_rows(x)
    tile = row_tile(rows.rows, rows.width, **TWO_SUMS)
    launch(
        layer_norm_fwd_kernel,
        (tile.programs,),
        rows.tensors[0],
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        mean,
        rstd,
        rows.rows,
        *rows.sizes,
        *rows.strides[0],
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        LEVELS=rows.levels,
        N=rows.width,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return y, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias; dbias is asked for by its dtype. One that is not asked for has no elements."""
    assert weight is not None or not weight_grad
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight_dtype = weight.dtype if weight is not None and weight_grad else None
    dtypes = (weight_dtype, bias_dtype)
    width = x.shape[-1]
    if x.numel() == 0:
        dweight, dbias = (
            no_gradient(x) if dtype is None else torch.zeros(width, dtype=dtype, device=x.device)
            for dtype in dtypes
        )
        return dx, dweight, dbias
    rows = as_rows(dy, x)
    summing = weight_grad or bias_dtype is not None
    tile = persistent_tile(rows.rows, width, x.device) if summing else row_tile(rows.rows, width, **TWO_SUMS)
    wanted = [dtype is not None for dtype in dtypes]
    partial = torch.empty(sum(wanted), tile.programs, width, dtype=torch.float32, device=x.device)
    parts = iter(partial)
    partials = [next(parts) if each else None for each in wanted]
    launch(
        layer_norm_bwd_kernel,
        (tile.programs,),
        *rows.tensors,
        None if weight is None else weight.contiguous(),
        mean,
        rstd,
        dx,
        *partials,
        rows.rows,
        *rows.sizes,
        *rows.strides[0],
        *rows.strides[1],
        HAS_WEIGHT=weight is not None,
        WEIGHT_GRAD=weight_grad,
        BIAS_GRAD=bias_dtype is not None,
        PREFETCH=tile.prefetch,
        LEVELS=rows.levels,
        N=width,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    if not summing:
        return dx, no_gradient(x), no_gradient(x)
    dweight, dbias = sum_partials(partial, dtypes, x)
    return dx, dweight, dbias


def _fwd_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), mean, rstd


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dweight = weight.new_empty(weight.shape) if weight is not None and weight_grad else x.new_empty(0)
    dbias = x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[-1], dtype=bias_dtype)
    return x.new_empty(x.shape), dweight, dbias


register_op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_fwd,
    _fwd_fake,
)
register_op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool weight_grad,"
    " ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    layer_norm_bwd,
    _bwd_fake,
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        out_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        y, mean, rstd = run_op(
            torch.ops.sloth.layer_norm_fwd, layer_norm_fwd, x, weight, bias, eps, out_dtype
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        # The bias itself is not needed in the backward, only what its gradient looks like.
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = {"eps": eps, "out_dtype": out_dtype}
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        _, weight_grad, bias_grad, *_ = ctx.needs_input_grad
        if wants_graph():
            # Nothing depends on the value of the bias, so zeros stand for it.
            bias = x.new_zeros(x.shape[-1], dtype=ctx.bias_dtype).requires_grad_() if bias_grad else None
            reference = functools.partial(layer_norm_reference, **ctx.options)
            return *differentiable_gradients(reference, (x, weight, bias), [dy]), None, None
        dx, dweight, dbias = run_op(
            torch.ops.sloth.layer_norm_bwd,
            layer_norm_bwd,
            dy,
            x,
            weight,
            mean,
            rstd,
            weight_grad,
            ctx.bias_dtype if bias_grad else None,
        )
        return dx, dweight if weight_grad else None, dbias if bias_grad else None, None, None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension, by the kernel; see the module docstring for the formula.

    Args:
        x: (..., N), float32, bfloat16 or float16, any strides; N up to 16,384. Float64 goes to the reference.
        weight, bias: (N,), any of these dtypes, or None for none.
        eps: added to the variance.
        out_dtype: of the result (default x.dtype); rounded to it straight from float32.

    Returns:
        (..., N), contiguous.

    Raises:
        ValueError: for a dtype, shape or width that the kernel does not take.
    """
    if has_float64(x, weight, bias):
        return layer_norm_reference(x, weight, bias, eps=eps, out_dtype=out_dtype)
    check_norm_arguments("layer_norm", x, [("weight", weight), ("bias", bias)], out_dtype)
    return LayerNormFunction.apply(x, weight, bias, eps, out_dtype)  # type: ignore[no-any-return]


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`layer_norm` in plain PyTorch: the CPU path and the truth. Float64 stays float64 throughout."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype or x.dtype)
