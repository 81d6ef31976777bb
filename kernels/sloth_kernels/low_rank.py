"""Matmuls with few columns, as LoRA [1] has them, each in one pass over its large operand.

    narrow_matmul    P  = D(x) W^T            x (T, K), W (R, K)     -> (T, R)
    tall_matmul      G  = y^T D(p)            y (T, N), p (T, R)     -> (N, R) or (R, N)
    masked_add       x + D(q W)               q (T, R), W (R, K)     -> (T, K)

and a gated MLP's middle, y = act(gate) * up, with those that read the same tensors:

    activated_narrow    D(y) W^T, and y for who wants it
    activated_tall      dgate, dup, and D(y)^T q, dgate^T p, dup^T p

so that no pass over y, and no second one over dgate and dup, is needed.

D is dropout [2]: D(x) = x * keep / (1 - p). keep is a hash of row, column and seed, so a mask is never
stored and both directions see the same one; every adapter has its own seed. Kernels multiply their float32
sums, not x.

Shapes: matrices with adjoining columns and rows any distance apart. Sums are kept in float32 and split over
programs; the last program to arrive at a tile adds its parts, in a fixed order.

[1] Hu et al., LoRA, arXiv:2106.09685
[2] Srivastava et al., Dropout, JMLR 15 (2014)
"""

# Triton is untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sloth_kernels._library import INTERPRETED, Launcher, launch, tl, triton
from sloth_kernels.gated_activation import (
    _activate,
    gated_activation_bwd_into,
    gated_activation_fwd_into,
)
from sloth_kernels.rms_norm import INTERPRETER_MULTIPROCESSORS, multiprocessors

# A program's columns. With 128, and x stored on the way, Triton 3.6 gives wrong products on an H200.
MOST_COLUMNS = 64
FEWEST_COLUMNS = 16  # of a tensor core's tile
# Of activated_narrow, whose rows of w are read once for every 32 of gate's; with more, y is read once more.
MOST_ACTIVATED_COLUMNS = 32
MOST_SPLITS = 16
MOST_TILES = 2**15
# (rows, columns, warps, stages) of a program's tile, measured on an H200, that of activated_narrow on an H100
# (benchmarks/NOTES.md).
TILES = {
    "narrow": (64, 128, 4, 3),
    "activated_narrow": (32, 128, 4, 3),
    "tall": (64, 64, 4, 4),
    "activated_tall": (16, 64, 4, 5),
    "masked_add": (32, 128, 4, 1),
}
_WORD = 2**32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dropout:
    """Dropout of the inputs of adapters that lie side by side, `width` columns each.

    p: probability of a zero, 0 < p < 1; seeds: int64, one an adapter, on the device of the matrices.
    """

    p: float
    seeds: torch.Tensor
    width: int

    @property
    def threshold(self) -> int:
        """Hashes below it are dropped."""
        return min(_WORD - 1, round(self.p * _WORD))

    @property
    def scale(self) -> float:
        """What is kept is multiplied with it."""
        return 1.0 / (1.0 - self.p)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """32 bits of x (int64), mixed."""
    x = x & (_WORD - 1)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & (_WORD - 1)
    x = ((x ^ (x >> 15)) * 0x846CA68B) & (_WORD - 1)
    return x ^ (x >> 16)


def dropped(x: torch.Tensor, dropout: Dropout, i: int) -> torch.Tensor:
    """D(x) of adapter i in plain PyTorch, with the mask of the kernels. x: (..., K)."""
    rows = x.reshape(-1, x.shape[-1])
    t, k = rows.shape
    seed = dropout.seeds[i]
    row = _mixed(torch.arange(t, device=x.device) + seed)
    column = _mixed(torch.arange(k, device=x.device) + (seed >> 32))
    hashed = ((row[:, None] ^ column) * 0x9E3779B1) & (_WORD - 1)
    hashed = ((hashed ^ (hashed >> 15)) * 0x846CA68B) & (_WORD - 1)
    keep = hashed >= dropout.threshold
    return torch.where(keep, rows * dropout.scale, torch.zeros_like(rows)).view(x.shape)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep(row, column, seed, threshold):  # type: ignore[no-untyped-def]
    """Which elements of a tile are kept; row (BT,), column (BK,)."""
    rows = _mix((row.to(tl.int64) + seed).to(tl.uint32))
    columns = _mix((column.to(tl.int64) + (seed >> 32)).to(tl.uint32))
    hashed = (rows[:, None] ^ columns[None, :]) * 0x9E3779B1
    hashed = (hashed ^ (hashed >> 15)) * 0x846CA68B  # with one multiplication some rows are alike
    return hashed >= threshold.to(tl.uint32)


@triton.jit
def _folded(total, part_ptr, at, inside, size, split, counter_ptr, tile, splits, MANY: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """(the sum of this tile's parts; whether this program is the one to write it).

    part (splits, size) float32; at: the tile's elements there. The counter is 0 before and after.
    """
    last = True
    if MANY:
        wide_size = tl.cast(size, tl.int64)
        tl.store(part_ptr + split * wide_size + at, total, mask=inside)
        tl.debug_barrier()  # all of the program's stores before its arrival
        last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == splits - 1
        if last:
            total = tl.zeros_like(total)
            for i in range(splits):
                total += tl.load(part_ptr + i * wide_size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)
    return total, last


@triton.jit
def _narrow_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    out_ptr,
    copy_ptr,
    extension_ptr,
    seeds_ptr,
    part_ptr,
    counter_ptr,
    T,
    K,
    R,
    k_split,
    splits,
    x_stride,
    w_stride_r,
    w_stride_k,
    copy_stride,
    extension_stride,
    threshold,
    scale,
    MANY: tl.constexpr,
    COPY: tl.constexpr,
    EXTEND: tl.constexpr,
    DROP: tl.constexpr,
    SLOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of D(x) @ w.T for BLOCK_T rows and the columns of one adapter (SLOT of them, or a block of
    these). x is copied on the way where COPY, the result written a second time where EXTEND."""
    blocks: tl.constexpr = (SLOT + BLOCK_R - 1) // BLOCK_R
    slot = tl.program_id(0) // blocks
    own = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = slot * SLOT + own
    filled = (own < SLOT) & (column < R)
    split = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    wide_row = row.to(tl.int64)[:, None]
    if DROP:
        seed = tl.load(seeds_ptr + slot)
    for start in range(0, k_split, BLOCK_K):
        k = split * k_split + start + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < T) & (k[None, :] < K)
        x = tl.load(x_ptr + wide_row * x_stride + k[None, :], mask=inside, other=0.0)
        w_at = w_ptr + column.to(tl.int64)[None, :] * w_stride_r + k.to(tl.int64)[:, None] * w_stride_k
        w = tl.load(w_at, mask=filled[None, :] & (k[:, None] < K), other=0.0)
        if COPY:  # noqa: SIM102  (it is known when this is compiled)
            if tl.program_id(0) == 0:
                # Loaded a second time, from the cache: with another use, x gets a buffer too few in shared
                # memory (Triton 3.6), and is overwritten while the tensor cores still read it.
                again = tl.load(
                    x_ptr + wide_row * x_stride + k[None, :], mask=inside, other=0.0, cache_modifier=".cg"
                )
                tl.store(copy_ptr + wide_row * copy_stride + k[None, :], again, mask=inside)
        if DROP:
            x = tl.where(_keep(row, k, seed, threshold), x, 0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    at = wide_row * R + column[None, :]
    mask = (row[:, None] < T) & filled[None, :]
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    total, last = _folded(total, part_ptr, at, mask, T * R, split, counter_ptr, tile, splits, MANY)
    if last:
        result = (total * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, result, mask=mask)
        if EXTEND:
            to = extension_ptr + wide_row * extension_stride + column[None, :]
            tl.store(to, result, mask=mask)


@triton.jit
def _tall_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    p_ptr,
    out_ptr,
    seeds_ptr,
    part_ptr,
    counter_ptr,
    T,
    N,
    R,
    y_stride,
    p_stride,
    out_stride_n,
    out_stride_r,
    t_split,
    splits,
    threshold,
    scale,
    MANY: tl.constexpr,
    DROP: tl.constexpr,
    SLOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of D(y).T @ p for BLOCK_N columns of y: (N, R) or (R, N)."""
    blocks: tl.constexpr = (SLOT + BLOCK_R - 1) // BLOCK_R
    slot = tl.program_id(0) // blocks
    own = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = slot * SLOT + own
    filled = (own < SLOT) & (column < R)
    split = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    end = tl.minimum(T, (split + 1) * t_split)
    if DROP:
        seed = tl.load(seeds_ptr + slot)
    for start in range(split * t_split, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        wide_row = row.to(tl.int64)[:, None]
        inside = (row[:, None] < end) & (n[None, :] < N)
        y = tl.load(y_ptr + wide_row * y_stride + n[None, :], mask=inside, other=0.0)
        p_at = p_ptr + wide_row * p_stride + column[None, :]
        p = tl.load(p_at, mask=(row[:, None] < end) & filled[None, :], other=0.0)
        if DROP:
            y = tl.where(_keep(row, n, seed, threshold), y, 0.0)
        total = tl.dot(tl.trans(y), p, total, input_precision=PRECISION)
    at = n.to(tl.int64)[:, None] * out_stride_n + column.to(tl.int64)[None, :] * out_stride_r
    mask = (n[:, None] < N) & filled[None, :]
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    total, last = _folded(total, part_ptr, at, mask, N * R, split, counter_ptr, tile, splits, MANY)
    if last:
        tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_add_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    q_ptr,
    w_ptr,
    out_ptr,
    seeds_ptr,
    T,
    K,
    x_stride,
    q_stride,
    w_stride,
    threshold,
    scale,
    SLOTS: tl.constexpr,
    SLOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out (contiguous) = x + the sum over adapters of D(q @ w)."""
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    wide_row = row.to(tl.int64)[:, None]
    inside = (row[:, None] < T) & (k[None, :] < K)
    total = tl.load(x_ptr + wide_row * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        seed = tl.load(seeds_ptr + slot)
        term = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
        for start in tl.static_range(0, SLOT, BLOCK_R):
            own = start + tl.arange(0, BLOCK_R)
            column = slot * SLOT + own
            at = q_ptr + wide_row * q_stride + column[None, :]
            q = tl.load(at, mask=(row[:, None] < T) & (own[None, :] < SLOT), other=0.0)
            at = w_ptr + column.to(tl.int64)[:, None] * w_stride + k[None, :]
            w = tl.load(at, mask=(own[:, None] < SLOT) & (k[None, :] < K), other=0.0)
            term = tl.dot(q, w, term, input_precision=PRECISION)
        total += tl.where(_keep(row, k, seed, threshold), term * scale, 0.0)
    tl.store(out_ptr + wide_row * K + k[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activated_narrow_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    w_ptr,
    out_ptr,
    hidden_ptr,
    extension_ptr,
    seeds_ptr,
    part_ptr,
    counter_ptr,
    T,
    N,
    R,
    rank,
    n_split,
    splits,
    gate_stride,
    up_stride,
    w_stride_r,
    w_stride_n,
    hidden_stride,
    extension_stride,
    threshold,
    scale,
    MANY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXTEND: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of D(y) @ w.T for BLOCK_T rows, y = act(gate) * up; w has `rank` rows, the result R columns.
    y is stored where HIDDEN, the result written a second time where EXTEND."""
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_R)
    wide_row = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    dtype = gate_ptr.dtype.element_ty
    if DROP:
        seed = tl.load(seeds_ptr)
    for start in range(0, n_split, BLOCK_N):
        n = split * n_split + start + tl.arange(0, BLOCK_N)
        inside = (row[:, None] < T) & (n[None, :] < N)
        g = tl.load(gate_ptr + wide_row * gate_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + wide_row * up_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        w_at = w_ptr + column.to(tl.int64)[None, :] * w_stride_r + n.to(tl.int64)[:, None] * w_stride_n
        w = tl.load(w_at, mask=(column[None, :] < rank) & (n[:, None] < N), other=0.0)
        activated, _ = _activate(g, ACTIVATION)
        y = (activated * u).to(dtype)
        if HIDDEN:
            tl.store(hidden_ptr + wide_row * hidden_stride + n[None, :], y, mask=inside)
        if DROP:
            y = tl.where(_keep(row, n, seed, threshold), y, 0.0)
        total = tl.dot(y, w.to(dtype), total, input_precision=PRECISION)
    at = wide_row * R + column[None, :]
    mask = (row[:, None] < T) & (column[None, :] < R)
    tile = tl.program_id(0)
    total, last = _folded(total, part_ptr, at, mask, T * R, split, counter_ptr, tile, splits, MANY)
    if last:
        result = (total * scale).to(dtype)
        tl.store(out_ptr + at, result, mask=mask)
        if EXTEND:
            to = extension_ptr + wide_row * extension_stride + column[None, :]
            tl.store(to, result, mask=mask)


@triton.jit
def _activated_tall_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    q_ptr,
    p_gate_ptr,
    p_up_ptr,
    w_ptr,
    out_ptr,
    seeds_ptr,
    part_ptr,
    counter_ptr,
    T,
    N,
    grad_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    q_stride,
    p_stride,
    w_stride,
    t_split,
    splits,
    threshold,
    scale,
    MANY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    RANK: tl.constexpr,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dgate, dup for BLOCK_N columns and a share of the rows, and that share of three products.

    out (RANK * N + N * RANK_GATE + N * RANK_UP): q.T @ D(y), dgate.T @ p_gate, dup.T @ p_up. Where DROP,
    grad gets D(q @ w) first.
    """
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_R)
    dtype = dgate_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    total_gate = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if DROP:
        seed = tl.load(seeds_ptr)
        w_at = w_ptr + column.to(tl.int64)[:, None] * w_stride + n[None, :]
        w = tl.load(w_at, mask=(column[:, None] < RANK) & (n[None, :] < N), other=0.0)
    end = tl.minimum(T, (split + 1) * t_split)
    for start in range(split * t_split, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        wide_row = row.to(tl.int64)[:, None]
        inside = (row[:, None] < end) & (n[None, :] < N)
        dy = tl.load(grad_ptr + wide_row * grad_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate_ptr + wide_row * gate_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + wide_row * up_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        activated, slope = _activate(g, ACTIVATION)
        if RANK > 0:
            q_at = q_ptr + wide_row * q_stride + column[None, :]
            q_filled = (row[:, None] < end) & (column[None, :] < RANK)
            q = tl.load(q_at, mask=q_filled, other=0.0)
            y = activated * u
            if DROP:
                keep = _keep(row, n, seed, threshold)
                again = tl.load(q_at, mask=q_filled, other=0.0, cache_modifier=".cg")  # see _narrow_kernel
                dy += tl.where(keep, tl.dot(again, w, input_precision=PRECISION) * scale, 0.0)
                y = tl.where(keep, y, 0.0)
            total = tl.dot(tl.trans(y.to(dtype)), q, total, input_precision=PRECISION)
        dup = (dy * activated).to(dtype)
        dgate = (dy * u * slope).to(dtype)
        tl.store(dgate_ptr + wide_row * dgate_stride + n[None, :], dgate, mask=inside)
        tl.store(dup_ptr + wide_row * dup_stride + n[None, :], dup, mask=inside)
        if RANK_GATE > 0:
            p_at = p_gate_ptr + wide_row * p_stride + column[None, :]
            p = tl.load(p_at, mask=(row[:, None] < end) & (column[None, :] < RANK_GATE), other=0.0)
            total_gate = tl.dot(tl.trans(dgate), p, total_gate, input_precision=PRECISION)
        if RANK_UP > 0:
            p_at = p_up_ptr + wide_row * p_stride + column[None, :]
            p = tl.load(p_at, mask=(row[:, None] < end) & (column[None, :] < RANK_UP), other=0.0)
            total_up = tl.dot(tl.trans(dup), p, total_up, input_precision=PRECISION)
    wide_n = n.to(tl.int64)[:, None]
    wide_column = column.to(tl.int64)[None, :]
    filled = n[:, None] < N
    size = N * (RANK + RANK_GATE + RANK_UP)
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    if RANK > 0:
        at = wide_column * N + wide_n
        mask = filled & (column[None, :] < RANK)
        total, last = _folded(total, part_ptr, at, mask, size, split, counter_ptr, tile, splits, MANY)
        if last:
            tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)
    if RANK_GATE > 0:
        at_gate = RANK * tl.cast(N, tl.int64) + wide_n * RANK_GATE + wide_column
        mask_gate = filled & (column[None, :] < RANK_GATE)
        total_gate, last_gate = _folded(
            total_gate, part_ptr, at_gate, mask_gate, size, split, counter_ptr, tiles + tile, splits, MANY
        )
        if last_gate:
            result_gate = total_gate.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at_gate, result_gate, mask=mask_gate)
    if RANK_UP > 0:
        at_up = (RANK + RANK_GATE) * tl.cast(N, tl.int64) + wide_n * RANK_UP + wide_column
        mask_up = filled & (column[None, :] < RANK_UP)
        total_up, last_up = _folded(
            total_up, part_ptr, at_up, mask_up, size, split, counter_ptr, 2 * tiles + tile, splits, MANY
        )
        if last_up:
            result_up = total_up.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at_up, result_up, mask=mask_up)


def takes(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take tensors like this one; cuBLAS is as good for float32."""
    if INTERPRETED and not x.is_cuda:  # which gets bfloat16 wrong
        return x.dtype in (torch.float32, torch.float16)
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def ceil_div(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def _columns(r: int) -> int:
    return max(FEWEST_COLUMNS, min(MOST_COLUMNS, 1 << max(0, r - 1).bit_length()))


def _splits(device: torch.device, programs: int, length: int, block: int) -> tuple[int, int]:
    """(how many shares, their length) of a sum over `length`, so that the card has work for two rounds.

    A power of two, so that shares stay aligned.
    """
    many = INTERPRETER_MULTIPROCESSORS if INTERPRETED else 2 * multiprocessors(device)
    most = max(1, min(many // max(1, programs), length // (4 * block), MOST_SPLITS))
    splits = 1 << (most.bit_length() - 1)
    return splits, ceil_div(ceil_div(length, splits), block) * block


class _Tiling(NamedTuple):
    """How a sum is split over programs: the grid, and a program's tile."""

    grid: tuple[int, int, int]
    splits: int
    share: int
    slot: int
    block: tuple[int, int, int]

    @property
    def tiles(self) -> int:
        """Tiles of the result."""
        return self.grid[0] * self.grid[1]


def _tiling(
    tile: tuple[int, int], device: torch.device, rows: int, length: int, r: int, slot: int
) -> _Tiling:
    """Of (rows, r) sums over `length`; tile: rows, length; slot: columns of an adapter."""
    block_rows, block_length = tile
    block_r = _columns(slot)
    tiles = ceil_div(rows, block_rows)
    column_blocks = ceil_div(r, slot) * ceil_div(slot, block_r)
    splits, share = _splits(device, tiles * column_blocks, length, block_length)
    block = block_rows, block_length, block_r
    return _Tiling((column_blocks, tiles, splits), splits, share, slot, block)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@functools.lru_cache(4096)
def _narrow(
    tile: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    k: int,
    r: int,
    slot: int,
    copy: bool,
    extend: bool,
    drop: bool,
) -> tuple[_Tiling, Launcher]:
    """Of x (t, k) and w (r, k); tile: rows, length, warps, stages."""
    tiling = _tiling(tile[:2], device, t, k, r, slot)
    return tiling, Launcher(
        _narrow_kernel,
        MANY=tiling.splits > 1,
        COPY=copy,
        EXTEND=extend,
        DROP=drop,
        SLOT=slot,
        PRECISION=_precision(dtype),
        BLOCK_T=tiling.block[0],
        BLOCK_K=tiling.block[1],
        BLOCK_R=tiling.block[2],
        num_warps=tile[2],
        num_stages=tile[3],
    )


@functools.lru_cache(4096)
def _tall(
    tile: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    n: int,
    r: int,
    slot: int,
    drop: bool,
) -> tuple[_Tiling, Launcher]:
    """Of y (t, n) and p (t, r); tile: length, rows, warps, stages."""
    tiling = _tiling((tile[1], tile[0]), device, n, t, r, slot)
    return tiling, Launcher(
        _tall_kernel,
        MANY=tiling.splits > 1,
        DROP=drop,
        SLOT=slot,
        PRECISION=_precision(dtype),
        BLOCK_T=tiling.block[1],
        BLOCK_N=tiling.block[0],
        BLOCK_R=tiling.block[2],
        num_warps=tile[2],
        num_stages=tile[3],
    )


@functools.lru_cache(4096)
def _activated_narrow(
    tile: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    n: int,
    r: int,
    activation: str,
    stored: bool,
    extend: bool,
    drop: bool,
) -> tuple[tuple[int, int], int, Launcher]:
    """(the grid, a split's columns, the kernel) of gate (t, n) and a result (t, r); tile: rows, columns,
    warps, stages."""
    block_t, block_n, warps, stages = tile
    block_r = _columns(r)
    if block_r > FEWEST_COLUMNS:  # for the shared memory of small GPUs, since w may be float32
        block_n //= 2
    tiles = ceil_div(t, block_t)
    splits, share = _splits(device, tiles, n, block_n)
    launcher = Launcher(
        _activated_narrow_kernel,
        MANY=splits > 1,
        ACTIVATION=activation,
        HIDDEN=stored,
        EXTEND=extend,
        DROP=drop,
        PRECISION=_precision(dtype),
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=warps,
        num_stages=stages,
    )
    return (tiles, splits), share, launcher


@functools.lru_cache(4096)
def _activated(
    tile: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    t: int,
    n: int,
    ranks: tuple[int, ...],
    activation: str,
    drop: bool,
) -> tuple[tuple[int, int], int, Launcher]:
    """(the grid, a split's rows, the kernel) of gate (t, n); tile: rows, columns, warps, stages."""
    block_t, block_n, warps, stages = tile
    tiles = ceil_div(n, block_n)
    splits, share = _splits(device, tiles // 4, t, block_t)
    rank, rank_gate, rank_up = ranks
    launcher = Launcher(
        _activated_tall_kernel,
        MANY=splits > 1,
        ACTIVATION=activation,
        DROP=drop,
        RANK=rank,
        RANK_GATE=rank_gate,
        RANK_UP=rank_up,
        PRECISION=_precision(dtype),
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_R=_columns(max(ranks)),
        num_warps=warps,
        num_stages=stages,
    )
    return (tiles, splits), share, launcher


def _parts(like: torch.Tensor, splits: int, size: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(room for the parts of `size` sums; counters, all 0, of at least `tiles` tiles)."""
    device = like.device
    stream = torch._C._cuda_getCurrentRawStream(device.index) if like.is_cuda else 0
    counters = _COUNTERS.get((device, stream))
    if counters is None or counters.numel() < tiles:
        # Kernels of one stream run one after another, and each leaves zeros.
        counters = torch.zeros(max(MOST_TILES, tiles), dtype=torch.int32, device=device)
        _COUNTERS[device, stream] = counters
    if splits == 1:
        return counters, counters  # no parts
    return torch.empty((splits, size), dtype=torch.float32, device=device), counters


_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def _dropout_arguments(
    dropout: Dropout | None, like: torch.Tensor, columns: int
) -> tuple[torch.Tensor, int, float, int]:
    """(seeds, threshold, scale, columns an adapter)."""
    if dropout is None:
        return like, 0, 1.0, columns
    return dropout.seeds, dropout.threshold, dropout.scale, dropout.width


def narrow_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    copy: torch.Tensor | None = None,
    extension: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    fused: bool = True,
) -> torch.Tensor:
    """scale * D(x) @ w.T for a w of few rows, in one pass over x.

    x: (T, K) with adjoining columns; w: (R, K), any strides; copy: (T, K), gets x; extension: (T, R), gets
    the result too. fused: False for PyTorch's operators. Returns (T, R) contiguous, in x.dtype, accumulated
    in float32.
    """
    (t, k), r = x.shape, w.shape[0]
    if not (fused and takes(x)) or not x.numel():
        zero = x.new_zeros(1)  # scaled before the sum is rounded
        if dropout is None:
            result = torch.addmm(zero, x, w.t(), beta=0, alpha=scale)
        else:
            result = torch.empty((t, r), dtype=x.dtype, device=x.device)
            for i, start in enumerate(range(0, r, dropout.width)):
                own = slice(start, start + dropout.width)
                result[:, own] = torch.addmm(zero, dropped(x, dropout, i), w[own].t(), beta=0, alpha=scale)
        if copy is not None:
            copy.copy_(x)
        if extension is not None:
            extension.copy_(result)
        return result
    seeds, threshold, keep_scale, slot = _dropout_arguments(dropout, x, r)
    copies, extends = copy is not None, extension is not None
    tiling, launcher = _narrow(
        TILES["narrow"], x.device, x.dtype, t, k, r, slot, copies, extends, dropout is not None
    )
    part, counters = _parts(x, tiling.splits, t * r, tiling.tiles)
    result = torch.empty((t, r), dtype=x.dtype, device=x.device)
    tensors = (
        *(x, w, result, x if copy is None else copy, result if extension is None else extension),
        *(seeds, part, counters),
    )
    scalars = (
        *(t, k, r, tiling.share, tiling.splits, x.stride(0), *w.stride()),
        0 if copy is None else copy.stride(0),
        0 if extension is None else extension.stride(0),
        threshold,
        float(scale * keep_scale),
    )
    launcher(tiling.grid, tensors, scalars)
    return result


def tall_matmul(
    y: torch.Tensor,
    p: torch.Tensor,
    *,
    transposed: bool,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
    fused: bool = True,
) -> torch.Tensor:
    """D(y).T @ p for a p of few columns, in one pass over y.

    y: (T, N), p: (T, R), adjoining columns. Returns (N, R), or (R, N) where `transposed`, in `dtype`,
    accumulated in float32. fused: False for PyTorch's operators.
    """
    (t, n), r = y.shape, p.shape[1]
    shape = (r, n) if transposed else (n, r)
    if not (fused and takes(y)) or not y.numel():
        if dropout is None:
            low = y.t().float() @ p.float()
        else:
            starts = range(0, r, dropout.width)
            low = torch.cat(
                [
                    dropped(y, dropout, i).t().float() @ p[:, start : start + dropout.width].float()
                    for i, start in enumerate(starts)
                ],
                1,
            )
        return (low.t() if transposed else low).to(dtype).contiguous()
    seeds, threshold, scale, slot = _dropout_arguments(dropout, y, r)
    tiling, launcher = _tall(TILES["tall"], y.device, y.dtype, t, n, r, slot, dropout is not None)
    part, counters = _parts(y, tiling.splits, n * r, tiling.tiles)
    result = torch.empty(shape, dtype=dtype, device=y.device)
    strides = (1, n) if transposed else (r, 1)
    scalars = (
        *(t, n, r, y.stride(0), p.stride(0), *strides, tiling.share, tiling.splits),
        *(threshold, scale),
    )
    launcher(tiling.grid, (y, p, result, seeds, part, counters), scalars)
    return result


def masked_add(
    x: torch.Tensor, q: torch.Tensor, w: torch.Tensor, dropout: Dropout, *, fused: bool = True
) -> torch.Tensor:
    """x + D(q @ w), summed over the adapters, each with its mask; rounded once.

    x: (T, K); q: (T, R), w: (R, K), R a multiple of dropout.width. Returns (T, K) contiguous, in x.dtype.
    """
    (t, k), r, width = x.shape, q.shape[1], dropout.width
    if not (fused and takes(x) and q.dtype == w.dtype == x.dtype) or not x.numel():
        total = x.float()
        for i, start in enumerate(range(0, r, width)):
            own = slice(start, start + width)
            total = total + dropped(q[:, own].float() @ w[own].float(), dropout, i)
        return total.to(x.dtype)
    block_t, block_k, warps, stages = TILES["masked_add"]
    out = torch.empty((t, k), dtype=x.dtype, device=x.device)
    launch(
        _masked_add_kernel,
        (ceil_div(k, block_k), ceil_div(t, block_t)),
        x,
        q,
        w,
        out,
        dropout.seeds,
        t,
        k,
        x.stride(0),
        q.stride(0),
        w.stride(0),
        dropout.threshold,
        dropout.scale,
        SLOTS=r // width,
        SLOT=width,
        PRECISION=_precision(x.dtype),
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_R=_columns(width),
        num_warps=warps,
        num_stages=stages,
    )
    return out


def activated_narrow(
    gate: torch.Tensor,
    up: torch.Tensor,
    w: torch.Tensor,
    columns: int,
    hidden: torch.Tensor | None = None,
    extension: torch.Tensor | None = None,
    *,
    activation: str,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    fused: bool = True,
) -> torch.Tensor:
    """scale * D(y) @ w.T for y = act(gate) * up and a w of few rows, in one pass over gate and up.

    gate, up: (T, N) with adjoining columns, of one dtype, to which w (R', N), of any strides, is rounded;
    columns: R, at least R', with zeros in the rest; hidden: (T, N), gets y; extension: (T, R), gets the
    result too. dropout: of one adapter, whose width is R. fused: False for PyTorch's operators. Returns
    (T, R) contiguous, in gate's dtype, accumulated in float32. More than MOST_ACTIVATED_COLUMNS take a pass
    over y.
    """
    (t, n), rank = gate.shape, w.shape[0]
    takes_all = fused and takes(gate) and up.dtype == gate.dtype and columns <= MOST_ACTIVATED_COLUMNS
    if not takes_all or not gate.numel():
        if hidden is None:
            hidden = torch.empty((t, n), dtype=gate.dtype, device=gate.device)
        gated_activation_fwd_into(hidden, gate, up, activation, fused=fused)
        rows = w.to(gate.dtype)
        if rank < columns:
            rows = torch.cat([rows, rows.new_zeros(columns - rank, n)])
        return narrow_matmul(hidden, rows, None, extension, scale=scale, dropout=dropout, fused=fused)
    seeds, threshold, keep_scale, _ = _dropout_arguments(dropout, gate, columns)
    stored, extends = hidden is not None, extension is not None
    grid, share, launcher = _activated_narrow(
        *(TILES["activated_narrow"], gate.device, gate.dtype, t, n, columns, activation),
        *(stored, extends, dropout is not None),
    )
    tiles, splits = grid
    part, counters = _parts(gate, splits, t * columns, tiles)
    result = torch.empty((t, columns), dtype=gate.dtype, device=gate.device)
    tensors = (
        *(gate, up, w, result, gate if hidden is None else hidden),
        *(result if extension is None else extension, seeds, part, counters),
    )
    scalars = (
        *(t, n, columns, rank, share, splits, gate.stride(0), up.stride(0), *w.stride()),
        0 if hidden is None else hidden.stride(0),
        0 if extension is None else extension.stride(0),
        threshold,
        float(scale * keep_scale),
    )
    launcher(grid, tensors, scalars)
    return result


def activated_tall(
    dgate: torch.Tensor,
    dup: torch.Tensor,
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    q: torch.Tensor | None,
    w: torch.Tensor | None,
    p: Sequence[torch.Tensor | None],
    *,
    activation: str,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
    fused: bool = True,
) -> list[torch.Tensor | None]:
    """The gradients of y = act(gate) * up, into `dgate` and `dup`, and with y computed again, in `dtype`,

        [q.T @ D(y) (R, N), dgate.T @ p[0] (N, R'), dup.T @ p[1] (N, R'')]

    with None where q or p is None. dgate may be gate, and dup then up.

    grad, gate, up, dgate, dup: (T, N); q: (T, R); p: (T, R') and (T, R''), slices of one buffer.
    dropout: grad is the gradient without the way through the adapter; D(q @ w), w (R, N), is added here.
    """
    (t, n), low = gate.shape, [q, *p]
    ranks = tuple(0 if item is None else item.shape[1] for item in low)
    present = [item for item in low if item is not None]
    same = all(item.dtype == gate.dtype for item in (grad, up, dgate, dup, *present))
    if not (fused and takes(gate) and same) or not gate.numel() or max(ranks) > MOST_COLUMNS or not present:
        if dropout is not None:
            assert q is not None and w is not None
            grad = masked_add(grad, q, w, dropout, fused=fused)
        y = torch.empty((t, n), dtype=gate.dtype, device=gate.device)
        gated_activation_bwd_into(dgate, dup, y, grad, gate, up, activation, fused=fused)
        found: list[torch.Tensor | None] = []
        for large, small, drop in ((y, q, dropout), (dgate, p[0], None), (dup, p[1], None)):
            found.append(
                None
                if small is None
                else tall_matmul(
                    large.to(small.dtype),
                    small,
                    transposed=large is y,
                    dtype=dtype,
                    dropout=drop,
                    fused=fused,
                )
            )
        return found
    seeds, threshold, scale, _ = _dropout_arguments(dropout, gate, 0)
    grid, share, launcher = _activated(
        TILES["activated_tall"], gate.device, gate.dtype, t, n, ranks, activation, dropout is not None
    )
    tiles, splits = grid
    sizes = [n * rank for rank in ranks]
    part, counters = _parts(gate, splits, sum(sizes), 3 * tiles)
    flat = torch.empty(sum(sizes), dtype=dtype, device=gate.device)
    q_or, gate_or, up_or = (gate if item is None else item for item in low)
    strides = {item.stride(0) for item in p if item is not None} or {0}
    assert len(strides) == 1
    tensors = (
        *(grad, gate, up, dgate, dup, q_or, gate_or, up_or),
        *(gate if w is None else w, flat, seeds, part, counters),
    )
    scalars = (
        *(t, n, grad.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0)),
        *(q_or.stride(0), strides.pop(), 0 if w is None else w.stride(0)),
        *(share, splits, threshold, scale),
    )
    launcher(grid, tensors, scalars, repeatable=dgate is not gate)
    q_part, gate_part, up_part = flat.split_with_sizes(sizes)
    return [
        q_part.view(ranks[0], n) if ranks[0] else None,
        gate_part.view(n, ranks[1]) if ranks[1] else None,
        up_part.view(n, ranks[2]) if ranks[2] else None,
    ]
