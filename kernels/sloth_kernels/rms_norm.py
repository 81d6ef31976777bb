"""RMSNorm in one pass forward and one pass backward [1].

    rstd = 1 / sqrt(mean(x^2) + eps)        one float32 a row, saved for the backward
    xhat = x * rstd                         float32
    w    = weight + offset                  float32; 1 where weight is None
    y    = w * xhat.to(x.dtype)             cast_before_weight (Llama [2]): in promote(x.dtype, weight.dtype)
    y    = (w * xhat).to(x.dtype)           otherwise (Gemma [3] with offset 1, OLMo2 with offset 0)

With g = dy * w, all in float32 and every rounding treated as the identity:

    dx      = rstd * (g - xhat * mean(g * xhat))      x.dtype
    dweight = sum over rows of dy * xhat              weight.dtype, summed in float32

Shapes: x, y, dx (..., N); weight, dweight (N,); rstd (...). float32, bfloat16, float16; N up to 16,384.
The backward recomputes xhat from x, so that only x (which the model keeps anyway) and rstd are saved.

Bytes that must move (N columns, bf16): forward 4N a row, backward 6N a row; the rest is negligible.

[1] Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467
[2] Touvron et al., LLaMA, arXiv:2302.13971
[3] Gemma Team, Gemma, arXiv:2403.08295
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sloth_kernels._library import (
    Launcher,
    differentiable_gradients,
    launch,
    register_op,
    run_op,
    tl,
    triton,
    wants_graph,
)

MAX_WIDTH = 16_384
# The interpreter has no multiprocessors; two keep its persistent loops and partial sums under test.
INTERPRETER_MULTIPROCESSORS = 2
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def row_offset(  # type: ignore[no-untyped-def]
    row, size1, size2, stride0, stride1, stride2, LEVELS: tl.constexpr
):
    """Where a row starts; row counts through (size0, size1, size2), of which the last LEVELS are in use."""
    if LEVELS == 1:
        offset = row.to(tl.int64) * stride2
    elif LEVELS == 2:
        offset = (row // size2).to(tl.int64) * stride1 + (row % size2).to(tl.int64) * stride2
    else:
        outer = row // size2
        offset = (row % size2).to(tl.int64) * stride2 + (outer % size1).to(tl.int64) * stride1
        offset += (outer // size1).to(tl.int64) * stride0
    return offset


@triton.jit
def rms_norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    rows,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    residual_stride0,
    residual_stride1,
    residual_stride2,
    eps,
    OFFSET: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    LEVELS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """ROWS rows a program; they stay in registers between the sum of squares and the product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    mask = col < N  # with one row a program there is no row too many
    if ROWS > 1:
        mask = mask & (row < rows)
    at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2, LEVELS) + col
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        # Asked for before the reduction, whose barrier no load moves across, so that it does not wait twice.
        weight = tl.load(weight_ptr + col, mask=col < N, other=0.0)
    out_at = row.to(tl.int64) * N + col
    if HAS_RESIDUAL:
        at = row_offset(row, size1, size2, residual_stride0, residual_stride1, residual_stride2, LEVELS) + col
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        summed = (x + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + out_at, summed, mask=mask)
        # Statistics are those of the rounded sum, which is what the next block and the backward see.
        x = summed.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / N + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd
    if CAST_BEFORE_WEIGHT:
        # To the dtype of what is normalised: the sum's, where there is a residual.
        if HAS_RESIDUAL:
            y = y.to(summed_ptr.dtype.element_ty).to(tl.float32)
        else:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        y *= weight.to(tl.float32) + OFFSET
    tl.store(y_ptr + out_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_per_row(ptr, first, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(ROWS, 1), loaded as a vector: each thread would repeat a (ROWS, 1) load for every column it has."""
    row = first + tl.arange(0, ROWS)
    return tl.load(ptr + row, mask=row < rows, other=0.0)[:, None]


@triton.jit
def rms_norm_bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    dsummed_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    size1,
    size2,
    dy_stride0,
    dy_stride1,
    dy_stride2,
    dsummed_stride0,
    dsummed_stride1,
    dsummed_stride2,
    x_stride0,
    x_stride1,
    x_stride2,
    OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DSUMMED: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    LEVELS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of ROWS rows, a grid apart. The sum over a program's rows stays in registers and is written once.

    PREFETCH keeps memory busy through the reduction: the next tile's loads go out before this tile is used.
    Without it, a wide row's weight is read again for each tile, from the cache: its registers go to the row.
    """
    col = tl.arange(0, BLOCK_N)[None, :]
    in_row = tl.arange(0, ROWS)[:, None]
    start = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    KEEP_WEIGHT: tl.constexpr = PREFETCH or ROWS > 1
    if HAS_WEIGHT and KEEP_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32) + OFFSET
    if WEIGHT_GRAD:
        dweight = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if PREFETCH:
        row = start + in_row
        mask = (row < rows) & (col < N)
        at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2, LEVELS) + col
        next_x = tl.load(x_ptr + at, mask=mask, other=0.0)
        at = row_offset(row, size1, size2, dy_stride0, dy_stride1, dy_stride2, LEVELS) + col
        next_dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
        next_rstd = load_per_row(rstd_ptr, start, rows, ROWS)
        if HAS_DSUMMED:
            at = (
                row_offset(row, size1, size2, dsummed_stride0, dsummed_stride1, dsummed_stride2, LEVELS) + col
            )
            next_dsummed = tl.load(dsummed_ptr + at, mask=mask, other=0.0)
    for first in range(start, rows, step):
        row = first + in_row
        if PREFETCH:
            x = next_x.to(tl.float32)
            dy = next_dy.to(tl.float32)
            rstd = next_rstd
            if HAS_DSUMMED:
                dsummed = next_dsummed
            row += step
            ahead = step
        else:
            ahead = 0
        mask = (row < rows) & (col < N)
        at = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2, LEVELS) + col
        loaded_x = tl.load(x_ptr + at, mask=mask, other=0.0)
        at = row_offset(row, size1, size2, dy_stride0, dy_stride1, dy_stride2, LEVELS) + col
        loaded_dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
        loaded_rstd = load_per_row(rstd_ptr, first + ahead, rows, ROWS)
        if HAS_DSUMMED:
            at = (
                row_offset(row, size1, size2, dsummed_stride0, dsummed_stride1, dsummed_stride2, LEVELS) + col
            )
            loaded_dsummed = tl.load(dsummed_ptr + at, mask=mask, other=0.0)
        if PREFETCH:
            next_x = loaded_x
            next_dy = loaded_dy
            next_rstd = loaded_rstd
            if HAS_DSUMMED:
                next_dsummed = loaded_dsummed
            row -= step
            mask = (row < rows) & (col < N)
        else:
            x = loaded_x.to(tl.float32)
            dy = loaded_dy.to(tl.float32)
            rstd = loaded_rstd
            if HAS_DSUMMED:
                dsummed = loaded_dsummed
        if HAS_WEIGHT and not KEEP_WEIGHT:
            weight = tl.load(weight_ptr + col, mask=col < N, other=0.0).to(tl.float32) + OFFSET
        xhat = x * rstd
        if WEIGHT_GRAD:
            dweight += dy * xhat
        if HAS_WEIGHT:
            dy *= weight
        dx = rstd * (dy - xhat * (tl.sum(dy * xhat, axis=1, keep_dims=True) / N))
        if HAS_DSUMMED:
            dx += dsummed.to(tl.float32)
        tl.store(dx_ptr + (row.to(tl.int64) * N + col), dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + col, total, mask=col < N)


@triton.jit
def sum_partials_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    first_ptr,
    second_ptr,
    programs,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """first[n] = sum over p of partial[0, p, n], second of partial[1]; fixed order, float32, one rounding."""
    which = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, programs, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)[:, None]
        at = (which * programs + row).to(tl.int64) * N + col
        total += tl.load(partial_ptr + at, mask=(row < programs) & (col < N), other=0.0)
    summed = tl.sum(total, axis=0, keep_dims=True)
    if which == 0:
        tl.store(first_ptr + col, summed.to(first_ptr.dtype.element_ty), mask=col < N)
    else:
        tl.store(second_ptr + col, summed.to(second_ptr.dtype.element_ty), mask=col < N)


class Rows(NamedTuple):
    """Tensors of one shape (..., N) as rows: a row index counts through (size0, size1, size2)."""

    tensors: tuple[torch.Tensor | None, ...]
    rows: int
    width: int
    sizes: tuple[int, int]
    strides: tuple[tuple[int, int, int], ...]
    levels: int


def as_rows(*tensors: torch.Tensor | None) -> Rows:
    """Common row addressing of tensors of one shape; one that three strides cannot address is copied.

    Leading dimensions are merged where they are adjacent in memory in every tensor. A transposed view or a
    slice of a joint buffer needs no copy; a last dimension with another stride than 1 (an expanded gradient)
    does.
    """
    first = tensors[0]
    assert first is not None
    if first.shape[-1] != 1:
        tensors = tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)
    geometry = _row_geometry(first.shape, tuple(None if t is None else t.stride() for t in tensors))
    if geometry is None:
        tensors = tuple(None if t is None else t.contiguous() for t in tensors)
        geometry = _row_geometry(first.shape, tuple(None if t is None else t.stride() for t in tensors))
        assert geometry is not None
    return Rows(tensors, *geometry)


@functools.lru_cache(maxsize=4096)
def _row_geometry(
    shape: torch.Size, strides: tuple[tuple[int, ...] | None, ...]
) -> tuple[int, int, tuple[int, int], tuple[tuple[int, int, int], ...], int] | None:
    """(rows, width, sizes, strides, levels) of Rows; None where three strides do not address the rows."""
    present = [s for s in strides if s is not None]
    sizes: list[int] = []
    merged: list[list[int]] = []
    for dim in reversed(range(len(shape) - 1)):
        if shape[dim] == 1:
            continue
        here = [s[dim] for s in present]
        if sizes and all(h == s * sizes[0] for h, s in zip(here, merged[0], strict=True)):
            # The inner of the two merged dimensions keeps the strides.
            sizes[0] *= shape[dim]
        else:
            sizes.insert(0, shape[dim])
            merged.insert(0, here)
    if len(sizes) > 3:
        return None
    padding = 3 - len(sizes)
    levels = max(1, len(sizes))
    sizes = [1] * padding + sizes
    triples: list[tuple[int, int, int]] = []
    index = 0
    for each in strides:
        if each is None:
            triples.append((0, 0, 0))
        else:
            s0, s1, s2 = [0] * padding + [level[index] for level in merged]
            triples.append((s0, s1, s2))
            index += 1
    rows = sizes[0] * sizes[1] * sizes[2]
    assert rows < 2**31, "row indices are 32-bit"
    return rows, shape[-1], (sizes[1], sizes[2]), tuple(triples), levels


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The shape of one program's work, and how many programs there are."""

    rows: int
    block_n: int
    num_warps: int
    programs: int
    prefetch: bool = False


@functools.lru_cache(maxsize=4096)
def row_tile(rows: int, width: int, *, tile_elements: int = 2048, per_thread: int = 16) -> Tile:
    """One tile a program: 2,048 elements or one row, 16 a thread (two 16-byte loads in flight in bf16).

    At N = 4096 that is one row and eight warps. Measured on an H200 in bf16, forward: 32 elements a thread
    cost 1 % at N = 4096 and, in tiles of 4,096 elements, 3 % at N = 128; LayerNorm, with its two sums, wants
    them.
    """
    block_n = next_power_of_2(width)
    # No taller than the work, so that a decoding step with a handful of rows does not idle in masked lanes.
    tile_rows = min(max(1, tile_elements // block_n), next_power_of_2(rows))
    num_warps = max(1, min(16, tile_rows * block_n // (32 * per_thread)))
    return Tile(rows=tile_rows, block_n=block_n, num_warps=num_warps, programs=-(-rows // tile_rows))


@functools.lru_cache(maxsize=4096)
def persistent_tile(rows: int, width: int, device: torch.device) -> Tile:
    """A loop over tiles in each program: 16 elements a thread and 512 threads a multiprocessor.

    The partial sums are then 4.3 MB at N = 4096 on 132 multiprocessors, 2 % of the bytes that must move and
    within L2; and a thread has 128 registers for x, dy, weight, the sum and the prefetched tile. Above 8,192
    columns a row needs 32 elements a thread, and there is no room to prefetch.
    """
    block_n = next_power_of_2(width)
    tile_rows = min(max(1, 2048 // block_n), next_power_of_2(rows))
    num_warps = max(1, min(16, tile_rows * block_n // 512))
    programs = min(-(-rows // tile_rows), multiprocessors(device) * max(1, 16 // num_warps))
    return Tile(
        rows=tile_rows, block_n=block_n, num_warps=num_warps, programs=programs, prefetch=block_n <= 8192
    )


def sum_partials(
    partial: torch.Tensor, dtypes: Sequence[torch.dtype | None], like: torch.Tensor
) -> list[torch.Tensor]:
    """One gradient (N,) for each of `dtypes`: the k-th of those present sums partial[k] over programs.

    partial is (K, programs, N) float32 with K 1 or 2, summed in one launch. A dtype of None gives no
    elements.
    """
    kinds, programs, width = partial.shape
    summed = [torch.empty(width, dtype=dtype, device=partial.device) for dtype in dtypes if dtype is not None]
    assert len(summed) == kinds and kinds in (1, 2)
    # 64-byte runs of columns: enough programs to fill the chip, and a column's partials in flight at once.
    block_n = 16
    grid = (-(-width // block_n), kinds)
    block_p = min(512, next_power_of_2(programs))
    launch(
        sum_partials_kernel,
        grid,
        partial,
        summed[0],
        summed[-1],
        programs,
        width,
        block_p,
        block_n,
        num_warps=8,
    )
    results = iter(summed)
    return [no_gradient(like) if dtype is None else next(results) for dtype in dtypes]


def result_dtype(
    x: torch.dtype, weight: torch.dtype | None, cast_before_weight: bool, out_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of y."""
    if out_dtype is not None:
        return out_dtype
    return torch.promote_types(x, weight) if cast_before_weight and weight is not None else x


def has_float64(*tensors: torch.Tensor | None) -> bool:
    """True where the reference computes: the kernels stop at float32."""
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def check_norm_arguments(
    name: str,
    x: torch.Tensor,
    vectors: Sequence[tuple[str, torch.Tensor | None]],
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ValueError where a norm kernel cannot take these arguments."""
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension")
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"{name}: the last dimension of x is {width}, at most {MAX_WIDTH} is supported")
    for what, dtype in [("x", x.dtype), ("out_dtype", out_dtype)]:
        if dtype is not None and dtype not in KERNEL_DTYPES:
            raise ValueError(f"{name}: {what} is {dtype}, expected one of {KERNEL_DTYPES}")
    for what, vector in vectors:
        if vector is None:
            continue
        if vector.shape != (width,):
            raise ValueError(f"{name}: {what} has shape {tuple(vector.shape)}, expected ({width},)")
        if vector.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{name}: {what} is {vector.dtype}, expected one of {KERNEL_DTYPES}")
        if vector.device != x.device:
            raise ValueError(f"{name}: {what} is on {vector.device}, x on {x.device}")


@functools.lru_cache(maxsize=4096, typed=True)
def _forward(
    rows: int,
    width: int,
    levels: int,
    has_weight: bool,
    has_residual: bool,
    offset: float,
    cast_before_weight: bool,
) -> tuple[tuple[int, int, int], Launcher]:
    """(the grid, the kernel) of a forward."""
    tile = row_tile(rows, width)
    launcher = Launcher(
        rms_norm_fwd_kernel,
        OFFSET=offset,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        HAS_WEIGHT=has_weight,
        HAS_RESIDUAL=has_residual,
        LEVELS=levels,
        N=width,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return (tile.programs, 1, 1), launcher


@functools.lru_cache(maxsize=4096, typed=True)
def _backward(
    rows: int,
    width: int,
    levels: int,
    has_weight: bool,
    has_dsummed: bool,
    offset: float,
    weight_grad: bool,
    device: torch.device,
) -> tuple[tuple[int, int, int], Launcher]:
    """(the grid, the kernel) of a backward."""
    tile = persistent_tile(rows, width, device) if weight_grad else row_tile(rows, width)
    launcher = Launcher(
        rms_norm_bwd_kernel,
        OFFSET=offset,
        HAS_WEIGHT=has_weight,
        HAS_DSUMMED=has_dsummed,
        WEIGHT_GRAD=weight_grad,
        PREFETCH=tile.prefetch,
        LEVELS=levels,
        N=width,
        ROWS=tile.rows,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )
    return (tile.programs, 1, 1), launcher


def launch_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y, x + residual (None without a residual) and rstd."""
    in_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = result_dtype(in_dtype, None if weight is None else weight.dtype, cast_before_weight, out_dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = None if residual is None else torch.empty(x.shape, dtype=in_dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, summed, rstd
    rows = as_rows(x, residual)
    grid, launcher = _forward(
        *(rows.rows, rows.width, rows.levels, weight is not None, residual is not None),
        *(offset, cast_before_weight),
    )
    launcher(
        grid,
        (*rows.tensors, None if weight is None else weight.contiguous(), y, summed, rstd),
        (rows.rows, *rows.sizes, *rows.strides[0], *rows.strides[1], eps),
    )
    return y, summed, rstd


def launch_bwd(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (+ dsummed) in x.dtype, and dweight; dweight has no elements where it is not asked for."""
    assert weight is not None or not weight_grad
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, no_gradient(x) if weight is None or not weight_grad else torch.zeros_like(weight)
    rows = as_rows(dy, dsummed, x)
    grid, launcher = _backward(
        *(rows.rows, rows.width, rows.levels, weight is not None, dsummed is not None),
        *(offset, weight_grad, x.device),
    )
    partial = None
    if weight_grad:
        partial = torch.empty(1, grid[0], rows.width, dtype=torch.float32, device=x.device)
    launcher(
        grid,
        (*rows.tensors, None if weight is None else weight.contiguous(), rstd, dx, partial),
        (rows.rows, *rows.sizes, *rows.strides[0], *rows.strides[1], *rows.strides[2]),
    )
    if partial is None or weight is None:
        return dx, no_gradient(x)
    return dx, sum_partials(partial, [weight.dtype], x)[0]


def no_gradient(x: torch.Tensor) -> torch.Tensor:
    """An op must return a tensor: one without elements, and so without memory, stands for "not asked for"."""
    return torch.empty(0, dtype=x.dtype, device=x.device)


def rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = launch_fwd(x, None, weight, eps, offset, cast_before_weight, out_dtype)
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_bwd(dy, None, x, weight, rstd, offset, weight_grad)


def _fwd_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = result_dtype(x.dtype, None if weight is None else weight.dtype, cast_before_weight, out_dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dweight = weight.new_empty(weight.shape) if weight is not None and weight_grad else x.new_empty(0)
    return x.new_empty(x.shape), dweight


register_op(
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps, float offset, bool cast_before_weight,"
    " ScalarType? out_dtype) -> (Tensor, Tensor)",
    rms_norm_fwd,
    _fwd_fake,
)
register_op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, bool weight_grad)"
    " -> (Tensor, Tensor)",
    rms_norm_bwd,
    _bwd_fake,
)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        cast_before_weight: bool,
        out_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        y, rstd = run_op(
            torch.ops.sloth.rms_norm_fwd, rms_norm_fwd, x, weight, eps, offset, cast_before_weight, out_dtype
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        ctx.options = {
            "eps": eps,
            "offset": offset,
            "cast_before_weight": cast_before_weight,
            "out_dtype": out_dtype,
        }
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if wants_graph():
            reference = functools.partial(rms_norm_reference, **ctx.options)
            return *differentiable_gradients(reference, (x, weight), [dy]), None, None, None, None
        weight_grad = ctx.needs_input_grad[1]
        dx, dweight = run_op(
            torch.ops.sloth.rms_norm_bwd, rms_norm_bwd, dy, x, weight, rstd, ctx.offset, weight_grad
        )
        return dx, dweight if weight_grad else None, None, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dimension, by the kernel; see the module docstring for the formula.

    Args:
        x: (..., N), float32, bfloat16 or float16, any strides; N up to 16,384. Float64 goes to the reference.
        weight: (N,), any of these dtypes, or None for none (`offset` has then no meaning).
        eps: added to the mean of squares.
        offset: added to weight in float32: 1 for Gemma's zero-centred weights.
        cast_before_weight: round xhat to x.dtype before the product with the weight, as Llama does.
        out_dtype: of the result; rounded to it straight from the float32 product.

    Returns:
        (..., N), contiguous, in `out_dtype`; without it in promote_types(x.dtype, weight.dtype) if
        cast_before_weight, else in x.dtype.

    Raises:
        ValueError: for a dtype, shape or width that the kernel does not take.
    """
    if has_float64(x, weight):
        return rms_norm_reference(
            x, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight, out_dtype=out_dtype
        )
    check_norm_arguments("rms_norm", x, [("weight", weight)], out_dtype)
    return RMSNormFunction.apply(x, weight, eps, offset, cast_before_weight, out_dtype)  # type: ignore[no-any-return]


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`rms_norm` in plain PyTorch: the CPU path and the truth. Float64 stays float64 throughout."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    y = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_before_weight:
        y = y.to(x.dtype).to(wide)
    if weight is not None:
        y = y * (weight.to(wide) + offset)
    weight_dtype = None if weight is None else weight.dtype
    return y.to(result_dtype(x.dtype, weight_dtype, cast_before_weight, out_dtype))
