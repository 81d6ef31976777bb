"""LoRA [1] linear layers that share an input, and whole gated MLPs of them, over frozen weights.

For projections i of one input x (T, K), with weights W_i (N_i, K), adapters A_i (r_i, K), B_i (N_i, r_i) and
scalings s_i:

    P_i  = x A_i^T                       (T, r_i), kept for the backward
    y_i  = x W_i^T + s_i P_i B_i^T + bias_i
    Q_i  = s_i dy_i B_i                  (T, r_i)
    dB_i = s_i dy_i^T P_i                accumulated in float32, written in the parameter's dtype
    dA_i = Q_i^T x                       likewise
    dx   = sum_i dy_i W_i + Q_i A_i

4-bit weights [2] are expanded for each pass, and there the low-rank term rides in the same matmul: with K
extended by the ranks,

    y  = [x, P] @ [W, sB]^T              one rounding, from float32, of the whole sum
    dx = [dy, Q] @ [W; A]

so that no pass over an output remains, and a small update is not lost against an already rounded output.
Weights in 16 or 32 bits stay where they are: the low-rank term is written first and the matmul adds to it.

The MLP, y = down(act(gate(x)) * up(x)), keeps gate and up, and computes their product again in the backward.

[1] Hu et al., LoRA, arXiv:2106.09685
[2] Dettmers et al., QLoRA, arXiv:2305.14314
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sloth_kernels._library import (
    INTERPRETED,
    differentiable_gradients,
    launch,
    tl,
    triton,
    wants_graph,
)
from sloth_kernels.gated_activation import (
    ACTIVATIONS,
    as_matrix,
    gated_activation_bwd_into,
    gated_activation_fwd_into,
    gated_activation_reference,
)
from sloth_kernels.nf4 import FourBit, expand_4bit, expand_4bit_reference
from sloth_kernels.rms_norm import INTERPRETER_MULTIPROCESSORS, multiprocessors

Weight = torch.Tensor | FourBit
# A slot of an adapter in a group's buffers: ranks are padded with zeros so that rows stay 16-byte aligned.
RANK_ALIGNMENT = 8
ROW_ALIGNMENT = 64
# A program's columns. With 128, and x stored on the way, Triton 3.6 gives wrong products on an H200.
MOST_COLUMNS = 64
TENSORS_A_PROJECTION = 4  # a, b, adapter bias, bias


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """One LoRA: y += scaling * dropout(x) @ a.T @ b.T + scaling * bias.

    a: (r, K), b: (N, r), bias: (N,) or None; float32, bfloat16 or float16. dropout: probability of a zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0
    bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Projection:
    """A frozen linear layer with at most one LoRA. weight: (N, K), a tensor or a FourBit; bias: (N,)."""

    weight: Weight
    bias: torch.Tensor | None = None
    adapter: Adapter | None = None


class _Slot(NamedTuple):
    """What a group knows of one projection: rows of the joint weight, columns of the joint low-rank term."""

    weight: Weight
    start: int
    width: int
    column: int
    padded: int
    rank: int
    scaling: float
    dropout: float
    seed: int


class _Group(NamedTuple):
    """Projections of one input.

    extended: the low-rank terms ride in the matmuls of expanded weights. wide: the small matmuls run in
    float32, as eager's do outside autocast where adapters are float32 and activations are not. fused: Triton
    kernels are used, else PyTorch's operators.
    """

    slots: tuple[_Slot, ...]
    k: int
    n: int
    columns: int
    extended: bool
    wide: bool
    fused: bool

    @property
    def row(self) -> int:
        """Elements from row to row of an extended weight or input."""
        return self.k + -(-self.columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


# Small matmuls: x (T, K) with a few columns, and their transposes


@triton.jit
def _narrow_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    part_ptr,
    copy_ptr,
    T,
    R,
    x_stride,
    w_stride_r,
    w_stride_k,
    copy_stride,
    K: tl.constexpr,
    K_SPLIT: tl.constexpr,
    COPY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of x @ w.T for BLOCK_T rows: part (splits, T, R) float32; x is copied on the way where COPY."""
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    wide_row = row.to(tl.int64)[:, None]
    for start in range(0, K_SPLIT, BLOCK_K):
        k = split * K_SPLIT + start + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < T) & (k[None, :] < K)
        x = tl.load(x_ptr + wide_row * x_stride + k[None, :], mask=inside, other=0.0)
        at = w_ptr + column.to(tl.int64)[None, :] * w_stride_r + k.to(tl.int64)[:, None] * w_stride_k
        w = tl.load(at, mask=(column[None, :] < R) & (k[:, None] < K), other=0.0)
        if COPY:
            tl.store(copy_ptr + wide_row * copy_stride + k[None, :], x, mask=inside)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    to = part_ptr + (split.to(tl.int64) * T + wide_row) * R + column[None, :]
    tl.store(to, total, mask=(row[:, None] < T) & (column[None, :] < R))


@triton.jit
def _fold_kernel(  # type: ignore[no-untyped-def]
    part_ptr,
    out_ptr,
    copy_ptr,
    T,
    R,
    copy_stride,
    SPLITS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (T, R) = sum of part (SPLITS, T, R), and the same into rows copy_stride apart."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < T * R
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part_ptr + split * (T * R) + at, mask=inside, other=0.0)
    value = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, value, mask=inside)
    if COPY:
        row = at // R
        tl.store(copy_ptr + row.to(tl.int64) * copy_stride + (at - row * R), value, mask=inside)


@triton.jit
def _tall_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    p_ptr,
    part_ptr,
    T,
    N,
    R,
    y_stride,
    p_stride,
    part_stride_n,
    part_stride_r,
    T_SPLIT,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A share of y.T @ p for BLOCK_N columns of y: part (splits, N, R) or (splits, R, N), float32."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    end = tl.minimum(T, (split + 1) * T_SPLIT)
    for start in range(split * T_SPLIT, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        wide_row = row.to(tl.int64)[:, None]
        y = tl.load(
            y_ptr + wide_row * y_stride + n[None, :], mask=(row[:, None] < end) & (n[None, :] < N), other=0.0
        )
        p = tl.load(
            p_ptr + wide_row * p_stride + column[None, :],
            mask=(row[:, None] < end) & (column[None, :] < R),
            other=0.0,
        )
        total = tl.dot(tl.trans(y), p, total, input_precision=PRECISION)
    to = part_ptr + split.to(tl.int64) * N * R + n.to(tl.int64)[:, None] * part_stride_n
    tl.store(to + column[None, :] * part_stride_r, total, mask=(n[:, None] < N) & (column[None, :] < R))


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    rows_ptr,
    columns_ptr,
    scaling,
    rank,
    a_stride,
    b_stride,
    rows_stride,
    columns_stride,
    first,
    last,
    N,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a (rank, K) into rows, scaling * b into rows [first, last) of N; zeros in the rest of both."""
    a_programs: tl.constexpr = (PADDED * K + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < a_programs:
        at = program * BLOCK + tl.arange(0, BLOCK)
        row = at // K
        k = at - row * K
        value = tl.load(a_ptr + row.to(tl.int64) * a_stride + k, mask=row < rank, other=0.0).to(tl.float32)
        to = rows_ptr + row.to(tl.int64) * rows_stride + k
        tl.store(to, value.to(rows_ptr.dtype.element_ty), mask=at < PADDED * K)
    else:
        at = (program - a_programs) * BLOCK + tl.arange(0, BLOCK)
        row = at // PADDED
        column = at - row * PADDED
        own = (row >= first) & (row < last) & (column < rank)
        value = tl.load(b_ptr + (row - first).to(tl.int64) * b_stride + column, mask=own, other=0.0)
        value = value.to(tl.float32) * scaling
        to = columns_ptr + row.to(tl.int64) * columns_stride + column
        tl.store(to, value.to(columns_ptr.dtype.element_ty), mask=row < N)


def _fused(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take tensors like this one; cuBLAS is as good for float32."""
    if INTERPRETED and not x.is_cuda:  # which gets bfloat16 wrong
        return x.dtype in (torch.float32, torch.float16)
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _splits(x: torch.Tensor, programs: int, length: int, block: int) -> tuple[int, int]:
    """(how many shares, their length) of a sum over `length`, so that the card has work for two rounds."""
    many = INTERPRETER_MULTIPROCESSORS if INTERPRETED else 2 * multiprocessors(x.device)
    splits = max(1, min(many // max(1, programs), length // (4 * block), 16))
    share = _ceil(_ceil(length, splits), block) * block
    return _ceil(length, share), share


def narrow_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    copy: torch.Tensor | None = None,
    extension: torch.Tensor | None = None,
    *,
    fused: bool = True,
) -> torch.Tensor:
    """x @ w.T for a w of few rows, in one pass over x.

    x: (T, K) with adjoining columns; w: (R, K), any strides; copy: (T, K), gets x; extension: (T, R), gets
    the result too. fused: see `lora_linear`. Returns (T, R) contiguous, in x.dtype, accumulated in float32.
    """
    if not (fused and _fused(x)) or not x.numel():
        result = x @ w.t()
        if copy is not None:
            copy.copy_(x)
        if extension is not None:
            extension.copy_(result)
        return result
    (t, k), r = x.shape, w.shape[0]
    block_t, block_k = 64, 128 if x.element_size() == 2 else 64
    block_r = max(16, min(MOST_COLUMNS, _power(r)))
    tiles = -(-t // block_t)
    splits, share = _splits(x, tiles, k, block_k)
    part = torch.empty((splits, t, r), dtype=torch.float32, device=x.device)
    result = torch.empty((t, r), dtype=x.dtype, device=x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    with torch.cuda.device_of(x):
        launch(
            _narrow_kernel,
            (tiles, splits, -(-r // block_r)),
            x,
            w,
            part,
            x if copy is None else copy,
            t,
            r,
            x.stride(0),
            w.stride(0),
            w.stride(1),
            0 if copy is None else copy.stride(0),
            K=k,
            K_SPLIT=share,
            COPY=copy is not None,
            PRECISION=precision,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            num_warps=4,
        )
        launch(
            _fold_kernel,
            (-(-t * r // 1024),),
            part,
            result,
            result if extension is None else extension,
            t,
            r,
            0 if extension is None else extension.stride(0),
            SPLITS=splits,
            COPY=extension is not None,
            BLOCK=1024,
            num_warps=4,
        )
    return result


def tall_matmul(
    y: torch.Tensor, p: torch.Tensor, *, transposed: bool, dtype: torch.dtype, fused: bool = True
) -> torch.Tensor:
    """y.T @ p for a p of few columns, in one pass over y.

    y: (T, N), p: (T, R), adjoining columns. Returns (N, R), or (R, N) where `transposed`, in `dtype`,
    accumulated in float32. fused: see `lora_linear`.
    """
    if not (fused and _fused(y)) or not y.numel():
        left, right = (p, y) if transposed else (y, p)
        return (left.t().float() @ right.float()).to(dtype)
    (t, n), r = y.shape, p.shape[1]
    block_t, block_n, block_r = 64, 64, max(16, min(MOST_COLUMNS, _power(r)))
    tiles = -(-n // block_n)
    splits, share = _splits(y, tiles, t, block_t)
    shape = (splits, r, n) if transposed else (splits, n, r)
    part = torch.empty(shape, dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        launch(
            _tall_kernel,
            (tiles, splits, -(-r // block_r)),
            y,
            p,
            part,
            t,
            n,
            r,
            y.stride(0),
            p.stride(0),
            1 if transposed else r,
            n if transposed else 1,
            share,
            PRECISION="ieee" if y.dtype == torch.float32 else "tf32",
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            BLOCK_R=block_r,
            num_warps=4,
        )
    return (part[0] if splits == 1 else part.sum(0)).to(dtype)


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _pack(
    rows: torch.Tensor,
    columns: torch.Tensor,
    slot: _Slot,
    a: torch.Tensor,
    b: torch.Tensor,
    first: int,
    fused: bool,
) -> None:
    """a into rows (padded, K), scaling * b into columns (n, padded) from row `first` on; zeros elsewhere."""
    last = first + slot.width
    if not (fused and _fused(rows)) or a.stride(1) != 1 or b.stride(1) != 1:
        rows[: slot.rank] = a
        rows[slot.rank :] = 0
        columns.zero_()
        columns[first:last, : slot.rank] = b * slot.scaling
        return
    (padded, k), n, block = rows.shape, columns.shape[0], 1024
    with torch.cuda.device_of(rows):
        launch(
            _pack_kernel,
            (-(-padded * k // block) + -(-n * padded // block),),
            a,
            b,
            rows,
            columns,
            float(slot.scaling),
            slot.rank,
            a.stride(0),
            b.stride(0),
            rows.stride(0),
            columns.stride(0),
            first,
            last,
            n,
            K=k,
            PADDED=padded,
            BLOCK=block,
            num_warps=4,
        )


# Groups


class _Buffers(NamedTuple):
    """A group's weights for one pass: joint (extended), or the low-rank factors alone."""

    joint: torch.Tensor | None
    rows: torch.Tensor
    columns: tuple[torch.Tensor, ...]


def _dense(weight: Weight, dtype: torch.dtype, fused: bool) -> torch.Tensor:
    """A weight (N, K) in `dtype`, the tensor itself where it has that."""
    if isinstance(weight, FourBit):
        if fused and (weight.device.type == "cuda" or INTERPRETED):
            return expand_4bit(weight, torch.empty(weight.shape, dtype=dtype, device=weight.device))
        return expand_4bit_reference(weight).to(dtype)
    return weight.detach().to(dtype)


def _buffers(group: _Group, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> _Buffers:
    """Expand and pack what a pass over a group needs."""
    joint = None
    if group.extended:
        joint = torch.empty((group.n + group.columns, group.row), dtype=x.dtype, device=x.device)
        for slot in group.slots:
            assert isinstance(slot.weight, FourBit)
            expand_4bit(slot.weight, joint[slot.start : slot.start + slot.width, : group.k])
        rows = joint[group.n :, : group.k]
        columns = tuple(
            joint[: group.n, group.k + slot.column : group.k + slot.column + slot.padded]
            for slot in group.slots
        )
    else:
        dtype = torch.float32 if group.wide else x.dtype
        rows = torch.empty((group.columns, group.k), dtype=dtype, device=x.device)
        columns = tuple(
            torch.empty((slot.width, slot.padded), dtype=dtype, device=x.device) for slot in group.slots
        )
    for i, slot in enumerate(group.slots):
        a, b = tensors[i * TENSORS_A_PROJECTION], tensors[i * TENSORS_A_PROJECTION + 1]
        if slot.rank:
            assert a is not None and b is not None
            part = rows[slot.column : slot.column + slot.padded]
            _pack(part, columns[i], slot, a, b, slot.start if group.extended else 0, group.fused)
    return _Buffers(joint, rows, columns)


def _dropped(x: torch.Tensor, slot: _Slot) -> torch.Tensor:
    """x with the zeros of this slot's seed, the same ones whenever it is asked."""
    generator = torch.Generator(device=x.device).manual_seed(slot.seed)
    zeros = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    zeros.bernoulli_(slot.dropout, generator=generator)
    return (x * (1.0 / (1.0 - slot.dropout))).masked_fill_(zeros, 0.0)


def _low_rank(
    group: _Group, buffers: _Buffers, x: torch.Tensor, extended_x: torch.Tensor | None, filled: bool
) -> torch.Tensor:
    """P (T, columns): x A^T of all adapters in one pass, or adapter by adapter where there is dropout."""
    if not any(slot.dropout for slot in group.slots):
        if extended_x is None:
            return narrow_matmul(x.float() if group.wide else x, buffers.rows, fused=group.fused)
        copy = None if filled else extended_x[:, : group.k]
        tail = extended_x[:, group.k : group.k + group.columns]
        return narrow_matmul(x, buffers.rows, copy, tail, fused=group.fused)
    p = torch.empty((x.shape[0], group.columns), dtype=buffers.rows.dtype, device=x.device)
    for slot in group.slots:
        if slot.rank:
            source = _dropped(x, slot) if slot.dropout else x
            own = slice(slot.column, slot.column + slot.padded)
            p[:, own] = narrow_matmul(source.to(p.dtype), buffers.rows[own], fused=group.fused)
    if extended_x is not None:
        if not filled:
            extended_x[:, : group.k] = x
        extended_x[:, group.k : group.k + group.columns] = p
    return p


def _group_forward(
    group: _Group,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    *,
    together: bool = False,
    extended_x: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """([y_i], P); `together` puts the outputs of an extended group into one buffer. x: (T, K).

    extended_x: (T, row) whose first K columns are x already.
    """
    buffers = _buffers(group, x, tensors)
    biases = [_bias(slot, tensors, i, x.dtype) for i, slot in enumerate(group.slots)]
    p = None
    if group.extended:
        assert buffers.joint is not None
        width = group.k + group.columns
        left = x
        if group.columns:
            filled = extended_x is not None
            if extended_x is None:
                extended_x = torch.empty((x.shape[0], group.row), dtype=x.dtype, device=x.device)
            p = _low_rank(group, buffers, x, extended_x, filled)
            left = extended_x[:, :width]
        if together and not any(bias is not None for bias in biases):
            y = left @ buffers.joint[: group.n, :width].t()
            return [y[:, slot.start : slot.start + slot.width] for slot in group.slots], p
        outputs = []
        for slot, bias in zip(group.slots, biases, strict=True):
            right = buffers.joint[slot.start : slot.start + slot.width, :width].t()
            outputs.append(left @ right if bias is None else torch.addmm(bias, left, right))
        return outputs, p
    if group.columns:
        p = _low_rank(group, buffers, x, None, False)
    outputs = []
    for i, (slot, bias) in enumerate(zip(group.slots, biases, strict=True)):
        weight = _dense(slot.weight, x.dtype, group.fused).t()
        if slot.rank:
            assert p is not None
            y = (p[:, slot.column : slot.column + slot.padded] @ buffers.columns[i].t()).to(x.dtype)
            if bias is not None:
                y += bias
            y.addmm_(x, weight)
        else:
            y = x @ weight if bias is None else torch.addmm(bias, x, weight)
        outputs.append(y)
    return outputs, p


def _bias(
    slot: _Slot, tensors: Sequence[torch.Tensor | None], i: int, dtype: torch.dtype
) -> torch.Tensor | None:
    low, base = tensors[i * TENSORS_A_PROJECTION + 2], tensors[i * TENSORS_A_PROJECTION + 3]
    if low is None:
        return None if base is None else base.to(dtype)
    total = low.float() * slot.scaling
    return (total if base is None else total + base.float()).to(dtype)


def _gradient_buffer(group: _Group, rows: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, n and the low-rank columns): where the gradients of all outputs lie side by side."""
    width = group.n + -(-group.columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty((rows, width), dtype=like.dtype, device=like.device)


class _Pass(NamedTuple):
    """What a group's backward has once it knows the gradients of its outputs."""

    grads: list[torch.Tensor]
    q: torch.Tensor | None
    dx: torch.Tensor | None


def _input_gradient(
    group: _Group,
    rows: int,
    like: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    *,
    needs_x: bool,
    joint: torch.Tensor | None = None,
) -> _Pass:
    """dx (rows, K) and Q from the gradients of the outputs; `joint`: the buffer where these lie already."""
    buffers = _buffers(group, like, tensors)
    dropout = any(slot.dropout for slot in group.slots)
    given = [
        torch.zeros((rows, slot.width), dtype=like.dtype, device=like.device) if g is None else g
        for slot, g in zip(group.slots, grads, strict=True)
    ]
    q: torch.Tensor | None = None
    dx: torch.Tensor | None = None
    if group.extended:
        assert buffers.joint is not None
        end = group.n + group.columns
        if joint is not None and group.columns:
            factors = buffers.joint[: group.n, group.k : group.k + group.columns].t()
            q = narrow_matmul(joint[:, : group.n], factors, extension=joint[:, group.n : end])
        elif joint is None and (group.columns or len(group.slots) > 1):
            joint = _gradient_buffer(group, rows, like)
            for slot, g, factors in zip(group.slots, given, buffers.columns, strict=True):
                own = slice(slot.start, slot.start + slot.width)
                if slot.rank:  # Q, and the gradient's way into the buffer, in one pass
                    low = slice(group.n + slot.column, group.n + slot.column + slot.padded)
                    narrow_matmul(g, factors[own].t(), joint[:, own], joint[:, low])
                else:
                    joint[:, own] = g
            q = joint[:, group.n : end] if group.columns else None
        if needs_x and joint is None:
            dx = given[0] @ buffers.joint[: group.n, : group.k]
        elif needs_x:
            assert joint is not None
            width = group.n if dropout else end
            dx = joint[:, :width] @ buffers.joint[:width, : group.k]
    else:
        if group.columns:
            q = torch.empty((rows, group.columns), dtype=buffers.rows.dtype, device=like.device)
            for i, slot in enumerate(group.slots):
                if slot.rank:
                    target = q[:, slot.column : slot.column + slot.padded]
                    factors = buffers.columns[i].t()
                    target.copy_(narrow_matmul(given[i].to(q.dtype), factors, fused=group.fused))
            if needs_x and not dropout:
                dx = (q @ buffers.rows).to(like.dtype)
        if needs_x:
            for slot, g in zip(group.slots, given, strict=True):
                weight = _dense(slot.weight, like.dtype, group.fused)
                dx = g @ weight if dx is None else dx.addmm_(g, weight)
    if dropout and dx is not None:
        assert q is not None
        for slot in group.slots:
            if slot.rank:
                columns = slice(slot.column, slot.column + slot.padded)
                term = (q[:, columns] @ buffers.rows[columns]).to(like.dtype)
                dx += _dropped(term, slot) if slot.dropout else term
    return _Pass(given, q, dx)


def _adapter_gradients(
    group: _Group,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    p: torch.Tensor | None,
    done: _Pass,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """dA, dB, dbias of every adapter and of the layers' own biases, as far as they are needed. x: (T, K)."""
    result: list[torch.Tensor | None] = [None] * len(tensors)
    dropout = any(slot.dropout for slot in group.slots)
    q = done.q
    together: torch.Tensor | None = None
    wanted = [
        tensors[i * TENSORS_A_PROJECTION] for i in range(len(group.slots)) if needs[i * TENSORS_A_PROJECTION]
    ]
    if q is not None and wanted and not dropout:
        dtypes = {a.dtype for a in wanted if a is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        together = tall_matmul(x.to(q.dtype), q, transposed=True, dtype=dtype, fused=group.fused)
    for i, slot in enumerate(group.slots):
        first = i * TENSORS_A_PROJECTION
        a, b = tensors[first], tensors[first + 1]
        grad = done.grads[i]
        if slot.rank:
            assert a is not None and b is not None and p is not None and q is not None
            own = slice(slot.column, slot.column + slot.rank)
            if needs[first + 1]:
                low, wide = p[:, own], grad.to(p.dtype)
                db = tall_matmul(wide, low, transposed=False, dtype=torch.float32, fused=group.fused)
                result[first + 1] = (db if slot.scaling == 1 else db.mul_(slot.scaling)).to(b.dtype)
            if needs[first] and together is not None:
                result[first] = together[own].to(a.dtype)
            elif needs[first]:
                source = _dropped(x, slot) if slot.dropout else x
                low, wide = q[:, own], source.to(q.dtype)
                result[first] = tall_matmul(wide, low, transposed=True, dtype=a.dtype, fused=group.fused)
        for offset, scale in ((2, slot.scaling), (3, 1.0)):
            target = tensors[first + offset]
            if needs[first + offset] and target is not None:
                result[first + offset] = (grad.sum(0, dtype=torch.float32) * scale).to(target.dtype)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: _Group, *tensors: torch.Tensor | None) -> Any:
        outputs, p = _group_forward(group, as_matrix(x), tensors)
        ctx.group = group
        ctx.save_for_backward(x, p, *tensors)
        ctx.set_materialize_grads(False)
        shaped = tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)
        needs, step = ctx.needs_input_grad, TENSORS_A_PROJECTION
        if not needs[0]:
            ctx.mark_non_differentiable(
                *(y for i, y in enumerate(shaped) if not any(needs[2 + i * step : 2 + (i + 1) * step]))
            )
        return shaped

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        x, p, *tensors = ctx.saved_tensors
        group, needs = ctx.group, ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return None, None, *([None] * len(tensors))
        if wants_graph():
            filled = [
                x.new_zeros(*x.shape[:-1], slot.width) if g is None else g
                for slot, g in zip(group.slots, grads, strict=True)
            ]
            reference = functools.partial(_flat_reference, group)
            dx, *rest = differentiable_gradients(reference, (x, *tensors), filled)
            return dx, None, *rest
        rows = as_matrix(x)
        flat = [None if g is None else as_matrix(g) for g in grads]
        done = _input_gradient(group, rows.shape[0], rows, tensors, flat, needs_x=needs[0])
        found = _adapter_gradients(group, rows, tensors, p, done, needs[2:])
        return None if done.dx is None else done.dx.view(x.shape), None, *found


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        first: _Group,
        last: _Group,
        activation: str,
        *tensors: torch.Tensor | None,
    ) -> Any:
        rows = as_matrix(x)
        ours, theirs = tensors[:-TENSORS_A_PROJECTION], tensors[-TENSORS_A_PROJECTION:]
        (gate, up), p = _group_forward(first, rows, ours, together=True)
        extended = torch.empty(
            (rows.shape[0], last.row if last.extended else last.k), dtype=x.dtype, device=x.device
        )
        hidden = extended[:, : last.k]
        gated_activation_fwd_into(hidden, gate, up, activation, fused=first.fused)
        (y,), p_last = _group_forward(last, hidden, theirs, extended_x=extended if last.extended else None)
        ctx.first, ctx.last, ctx.activation = first, last, activation
        ctx.save_for_backward(x, p, gate, up, p_last, *tensors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, p, gate, up, p_last, *tensors = ctx.saved_tensors
        first, last = ctx.first, ctx.last
        if wants_graph():
            reference = functools.partial(_flat_mlp_reference, first, last, ctx.activation)
            dx, *rest = differentiable_gradients(reference, (x, *tensors), [grad])
            return dx, None, None, None, *rest
        shape, x, grad = x.shape, as_matrix(x), as_matrix(grad)
        ours, theirs = tensors[:-TENSORS_A_PROJECTION], tensors[-TENSORS_A_PROJECTION:]
        needs = ctx.needs_input_grad
        tail = _input_gradient(last, x.shape[0], x, theirs, [grad], needs_x=True)
        assert tail.dx is not None
        joint = _gradient_buffer(first, x.shape[0], x) if first.extended else None
        width = gate.shape[1]
        if joint is None:
            dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        else:
            dgate, dup = joint[:, :width], joint[:, width : 2 * width]
        hidden = torch.empty((x.shape[0], last.k), dtype=x.dtype, device=x.device)
        outputs = dgate, dup, hidden
        gated_activation_bwd_into(*outputs, tail.dx, gate, up, ctx.activation, fused=first.fused)
        tail = tail._replace(dx=None)
        found_last = _adapter_gradients(last, hidden, theirs, p_last, tail, needs[-TENSORS_A_PROJECTION:])
        del hidden, tail
        done = _input_gradient(first, x.shape[0], x, ours, [dgate, dup], needs_x=needs[0], joint=joint)
        found = _adapter_gradients(first, x, ours, p, done, needs[4:-TENSORS_A_PROJECTION])
        return None if done.dx is None else done.dx.view(shape), None, None, None, *found, *found_last


# The public functions


def _check(x: torch.Tensor, projections: Sequence[Projection]) -> None:
    if not projections:
        raise ValueError("projections is empty: expected at least one")
    for i, projection in enumerate(projections):
        n, k = projection.weight.shape
        if x.dim() == 0 or x.shape[-1] != k:
            raise ValueError(f"x {tuple(x.shape)} and weight {i} {(n, k)}: expected x (..., {k})")
        adapter = projection.adapter
        if adapter is None:
            continue
        a, b = adapter.a, adapter.b
        if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0], a.shape[0]) != (k, n, b.shape[1]):
            raise ValueError(
                f"adapter {i}: a {tuple(a.shape)} and b {tuple(b.shape)}: expected (r, {k}) and ({n}, r)"
            )
        if not 0 <= adapter.dropout < 1:
            raise ValueError(f"adapter {i}: dropout={adapter.dropout!r}: allowed is 0 <= dropout < 1")


def _group(x: torch.Tensor, projections: Sequence[Projection], fused: bool) -> _Group:
    slots: list[_Slot] = []
    start = column = 0
    for projection in projections:
        adapter = projection.adapter
        n = projection.weight.shape[0]
        rank = 0 if adapter is None else adapter.a.shape[0]
        padded = -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT
        dropout = 0.0 if adapter is None else adapter.dropout
        # From the CPU's generator, which checkpointing sets back: a recomputed forward drops the same.
        seed = int(torch.randint(2**62, ())) if dropout else 0
        scaling = 1.0 if adapter is None else float(adapter.scaling)
        slots.append(_Slot(projection.weight, start, n, column, padded, rank, scaling, dropout, seed))
        start, column = start + n, column + padded
    adapters = [p.adapter for p in projections if p.adapter is not None]
    dtypes = {t.dtype for adapter in adapters for t in (adapter.a, adapter.b)}
    wide = (
        torch.float32 in dtypes and x.dtype != torch.float32 and not torch.is_autocast_enabled(x.device.type)
    )
    k = x.shape[-1]
    extended = fused and _fused(x) and k % 8 == 0 and not wide
    extended = extended and all(isinstance(p.weight, FourBit) for p in projections)
    return _Group(tuple(slots), k, start, column, extended, wide, fused)


def _tensors(projections: Sequence[Projection]) -> list[torch.Tensor | None]:
    flat: list[torch.Tensor | None] = []
    for projection in projections:
        adapter = projection.adapter
        factors = (None, None, None) if adapter is None else (adapter.a, adapter.b, adapter.bias)
        flat += [*factors, projection.bias]
    return flat


def lora_linear(
    x: torch.Tensor, projections: Sequence[Projection], *, fused: bool = True
) -> tuple[torch.Tensor, ...]:
    """All of `projections` of one input, each y = x W.T + bias + scaling * dropout(x) A.T B.T.

    Args:
        x: (..., K) in the dtype to compute in: float32, bfloat16 or float16 (float64 goes to the reference).
        projections: frozen weights of one width K; 4-bit ones may stand beside others. Adapters may be
            float32 beside a narrower x. Where autocast is off their small matmuls then run in float32.
        fused: False for PyTorch's operators instead of Triton kernels, on any device.

    Returns:
        One (..., N_i) a projection, in x.dtype. Gradients reach x, A, B and biases, never a weight.

    Raises:
        ValueError: for shapes that don't fit, and a dropout outside [0, 1).
    """
    _check(x, projections)
    if x.dtype == torch.float64 or not x.numel():
        return lora_linear_reference(x, projections)
    result: tuple[torch.Tensor, ...] = _LoraLinear.apply(
        x, _group(x, projections, fused), *_tensors(projections)
    )
    return result


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str,
    fused: bool = True,
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) as one function; keeps x, gate(x) and up(x) for the backward.

    Args:
        x: (..., K), see `lora_linear`.
        gate, up: (I, K); down: (N, I).
        activation: "silu", "gelu_tanh" or "gelu" (by erf).
        fused: see `lora_linear`.

    Returns:
        (..., N) in x.dtype.

    Raises:
        ValueError: for another activation, shapes that don't fit, and a dropout outside [0, 1).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: allowed are {', '.join(map(repr, ACTIVATIONS))}")
    _check(x, [gate, up])
    inner = gate.weight.shape[0]
    if up.weight.shape[0] != inner or down.weight.shape[1] != inner:
        raise ValueError(
            f"gate {tuple(gate.weight.shape)}, up {tuple(up.weight.shape)}, down {tuple(down.weight.shape)}: "
            "expected (I, K), (I, K) and (N, I)"
        )
    _check(x.new_empty(0, inner), [down])
    if x.dtype == torch.float64 or not x.numel():
        return lora_mlp_reference(x, gate, up, down, activation=activation)
    first = _group(x, [gate, up], fused)
    last = _group(x.new_empty(0, inner), [down], fused)
    result: torch.Tensor = _LoraMLP.apply(x, first, last, activation, *_tensors([gate, up, down]))
    return result


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    slot: _Slot,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    low_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """One projection in plain PyTorch, with eager's roundings."""
    y = F.linear(x, weight.detach().to(x.dtype), None if bias is None else bias.to(x.dtype))
    if a is None or b is None:
        return y
    source = _dropped(x, slot) if slot.dropout else x
    dtype = torch.promote_types(x.dtype, a.dtype)
    low = F.linear(source.to(dtype), a.to(dtype))
    low = F.linear(low, b.to(dtype), None if low_bias is None else low_bias.to(dtype))
    return (y + low * slot.scaling).to(x.dtype)


def _flat_reference(
    group: _Group, x: torch.Tensor, *tensors: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    step = TENSORS_A_PROJECTION
    return tuple(
        _linear(x, _stored(slot.weight), slot, *tensors[i * step : (i + 1) * step])
        for i, slot in enumerate(group.slots)
    )


def _flat_mlp_reference(
    first: _Group, last: _Group, activation: str, x: torch.Tensor, *tensors: torch.Tensor | None
) -> torch.Tensor:
    gate, up = _flat_reference(first, x, *tensors[:-TENSORS_A_PROJECTION])
    hidden = gated_activation_reference(gate, up, activation=activation)
    return _flat_reference(last, hidden, *tensors[-TENSORS_A_PROJECTION:])[0]


def _stored(weight: Weight) -> torch.Tensor:
    return expand_4bit_reference(weight) if isinstance(weight, FourBit) else weight


def lora_linear_reference(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """`lora_linear` in plain PyTorch, right in float64."""
    _check(x, projections)
    return _flat_reference(_group(x, projections, False), x, *_tensors(projections))


def lora_mlp_reference(
    x: torch.Tensor, gate: Projection, up: Projection, down: Projection, *, activation: str
) -> torch.Tensor:
    """`lora_mlp` in plain PyTorch, right in float64."""
    first = _group(x, [gate, up], False)
    last = _group(x.new_empty(0, down.weight.shape[1]), [down], False)
    return _flat_mlp_reference(first, last, activation, x, *_tensors([gate, up, down]))
