"""Rounding of one block of a weight's columns to NF4, one column after another, in one launch.

Two rules, each for the rows of a weight apart, for columns c = 0 .. B - 1 in this order, with q_c the 4-bit
value nearest to w_c that `scale` allows, rounded to the dtype that the weight is expanded to:

    spreading [1]    w_c      = own_c - sum_{j<c} matrix[j, c] passed_j
                     passed_c = (w_c - q_c) / matrix[c, c]
    descent          w_c      = own_c - (slope_c + sum_{j<c} matrix[j, c] passed_j) / matrix[c, c]
                     passed_c = q_c - own_c

spreading is GPTQ's, with the upper Cholesky factor of an inverse Hessian; descent is a sweep of coordinate
descent, with the Hessian and the gradient (half of it) of what is to be made small.

    nibble[c, n] = table[round((w_c[n] / scale[n] + 1) * (STEPS - 1) / 2)]     for STEPS values from -1 to 1
    q_c[n]       = code[nibble[c, n]] * scale[n]                              float32, rounded to the dtype

Shapes: everything is transposed, (B, N), for a block of B columns of a weight with N rows: own, slope and
what is written. matrix (B, B), scale (N,), table (STEPS,), code (16,). All float32 but table (int64) and the
nibbles (uint8). Bytes that must move: 13 a weight, 17 in descent.

A thread has a row and keeps all its `passed` in registers; PyTorch takes some 20 launches a column. The
same input gives the same bits. Sums have another order than PyTorch's, so a value that lies in the middle of
two may go the other way; all later ones of its row then make up for it.

[1] Frantar et al., GPTQ, arXiv:2210.17323
"""

# Triton is untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch

from sloth_kernels._library import INTERPRETED, launch, tl, triton

# A warp, and a row a thread: the sum over earlier columns then stays within a thread.
BLOCK_N = 32
WARPS = 1
# A block of zeros may have the scale 0; a division by this gives any nibble, and all of them stand for 0.
_LEAST_SCALE = 1e-30


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]
    own_ptr,
    slope_ptr,
    columns_ptr,
    scale_ptr,
    table_ptr,
    code_ptr,
    nibbles_ptr,
    values_ptr,
    passed_ptr,
    n,
    DESCENT: tl.constexpr,
    ROUND: tl.constexpr,
    STEPS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows of the weight; columns (B, B): row c is column c of the matrix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < n
    earlier = tl.arange(0, BLOCKSIZE)
    scale = tl.load(scale_ptr + at, mask=inside, other=1.0)
    half: tl.constexpr = (STEPS - 1) / 2
    nonzero = tl.where(tl.abs(scale) < LEAST, LEAST, scale)
    steps_a_unit = tl.div_rn(tl.full((BLOCK_N,), half, tl.float32), nonzero)
    passed = tl.zeros((BLOCKSIZE, BLOCK_N), tl.float32)
    for c in range(BLOCKSIZE):
        weights = tl.load(columns_ptr + c * BLOCKSIZE + earlier)
        middle = tl.zeros((BLOCK_N,), tl.float32) + tl.load(columns_ptr + c * BLOCKSIZE + c)
        total = tl.sum(passed * weights[:, None], axis=0)
        own = tl.load(own_ptr + at, mask=inside, other=0.0)
        if DESCENT:
            wanted = own - tl.div_rn(tl.load(slope_ptr + at, mask=inside, other=0.0) + total, middle)
        else:
            wanted = own - total
        step = tl.minimum(tl.maximum(wanted * steps_a_unit + (half + 0.5), 0.0), STEPS - 1.0)
        nibble = tl.load(table_ptr + step.to(tl.int32)).to(tl.int32)
        value = (tl.load(code_ptr + nibble) * scale).to(ROUND).to(tl.float32)
        carried = value - own if DESCENT else tl.div_rn(wanted - value, middle)
        tl.store(nibbles_ptr + at, nibble.to(tl.uint8), mask=inside)
        tl.store(values_ptr + at, value, mask=inside)
        tl.store(passed_ptr + at, carried, mask=inside)
        passed = tl.where(earlier[:, None] == c, carried[None, :], passed)
        at += n


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def round_block(
    own: torch.Tensor,
    matrix: torch.Tensor,
    slope: torch.Tensor | None,
    scale: torch.Tensor,
    table: torch.Tensor,
    code: torch.Tensor,
    dtype: torch.dtype,
    nibbles: torch.Tensor,
    values: torch.Tensor,
    *,
    fused: bool = True,
) -> torch.Tensor:
    """Round a block's columns into `nibbles` and `values`, both (B, N) and apart from own; returns `passed`.

    own: (B, N), what is rounded; with slope (B, N) by descent from it, without by spreading. matrix: (B, B);
    scale: (N,); table, code: see above; dtype: what weights are expanded to. Columns of a matrix may lie any
    distance apart; own, slope, nibbles and values are contiguous. Raises ValueError where they are not, and
    for a B that is no power of 2. Without a GPU, or `fused`, it is `round_block_reference`.
    """
    blocksize, n = own.shape
    tensors = [own, nibbles, values] if slope is None else [own, nibbles, values, slope]
    for tensor in tensors:
        if tensor.shape != own.shape or not tensor.is_contiguous():
            shape, expected = tuple(tensor.shape), tuple(own.shape)
            raise ValueError(f"{shape}: expected contiguous tensors of shape {expected}")
    if blocksize & (blocksize - 1):
        raise ValueError(f"blocksize {blocksize}: allowed are powers of 2")
    if not (fused and (own.is_cuda or INTERPRETED)):
        return round_block_reference(own, matrix, slope, scale, table, code, dtype, nibbles, values)
    passed = torch.empty_like(own)
    if n:
        launch(
            _round_kernel,
            (-(-n // BLOCK_N),),
            own,
            own if slope is None else slope,
            matrix.T.contiguous(),
            scale.contiguous(),
            table,
            code,
            nibbles,
            values,
            passed,
            n,
            DESCENT=slope is not None,
            ROUND=_TRITON_DTYPES[dtype],
            STEPS=table.numel(),
            LEAST=_LEAST_SCALE,
            BLOCKSIZE=blocksize,
            BLOCK_N=BLOCK_N,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return passed


def nearest_nibbles(values: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of 16 values, int64; `scale` broadcasts and may be negative."""
    half = (table.numel() - 1) / 2
    nonzero = torch.where(scale.abs() < _LEAST_SCALE, torch.full_like(scale, _LEAST_SCALE), scale)
    steps = (values * (half / nonzero)).add_(half + 0.5).clamp_(0, table.numel() - 1)
    return table[steps.to(torch.int64)]


def round_block_reference(
    own: torch.Tensor,
    matrix: torch.Tensor,
    slope: torch.Tensor | None,
    scale: torch.Tensor,
    table: torch.Tensor,
    code: torch.Tensor,
    dtype: torch.dtype,
    nibbles: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """`round_block` in plain PyTorch, in own's dtype."""
    passed = torch.empty_like(own)
    left = own.clone() if slope is None else slope.clone()
    for column in range(own.shape[0]):
        middle = matrix[column, column]
        wanted = left[column] if slope is None else own[column] - left[column] / middle
        nibble = nearest_nibbles(wanted, scale, table)
        nibbles[column] = nibble
        values[column] = (code[nibble] * scale).to(dtype)
        later = slice(column + 1, None)
        if slope is None:
            passed[column] = (wanted - values[column]) / middle
            left[later].addr_(matrix[column, later], passed[column], alpha=-1)
        else:
            passed[column] = values[column] - own[column]
            left[later].addr_(matrix[column, later], passed[column])
    return passed
