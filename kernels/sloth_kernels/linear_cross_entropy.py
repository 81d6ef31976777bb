"""The head of a language model and its loss [1, 2], without ever holding the logits of all tokens.

For hidden states h (T, H), a weight W (V, H), a bias b (V,) and one label y a row:

    a       = h W^T + b                       (T, V), a chunk of rows at a time, rounded to the dtype of h
    z       = s a, or C tanh(s a / C) where logits are soft-capped; float32 from here on
    lse     = log sum_j exp(z_j)
    loss    = lse - (1 - e) z_y - e / V sum_j z_j + c lse^2        e: label smoothing, c: z-loss [3]
    dz_j    = g (p_j (1 + 2 c lse) - (1 - e) [j = y] - e / V),     p_j = exp(z_j - lse)
    da      = dz dz/da,  dz/da = s, or s (1 - (z / C)^2); rounded to the dtype of h
    dh      = da W,   dW = da^T h,   db = sum_rows da

    log p_y = z_y - lse, with z over the temperature        (`linear_log_probs`: minus the loss)
    entropy = lse - sum_j p_j z_j,     d entropy / dz_j = -p_j (z_j - lse + entropy)

One buffer holds the logits of a chunk. One launch a chunk makes losses of them and, in place, gradients: a
pass that reads (online softmax [4]) and one that reads and writes, 6 bytes a logit in bf16. A mean or a sum
knows its gradient g in the forward, which therefore does all the work of the backward; where each row has a
gradient of its own, the backward computes the logits again.

Ignored rows write zeros and are read by nobody, but they go through the matmuls. Their number is known to the
device, and a matmul's shape to the host: to learn it, the host would wait for every kernel in flight, in each
micro-batch, and the GPU would idle while the backward is launched. Moving them behind the others (a sort of
the mask, no wait) leaves the shapes as they are; a matmul kernel that reads the number on the device would
have to beat cuBLAS by more than the ignored share. So nothing here waits for the device (tested), and who
knows the labels on the host gives `hidden[kept]` and `labels[kept]`: sum and mean are the same.

Gradients that wait for the backward's scalar wait in float32 and are rounded once, except dW of a 16-bit
weight, for which that would take more memory than all the rest. It adds up in its own dtype, and each sum is
rounded: with shares c1 <= c2 <= ... <= 1 of the tokens in it, the error is sqrt(c1 + c2 + ... + 1) times that
of one matmul (measured: 1.2 for two equal chunks, 1.5 for four, 2 for eight). It is kept below
MOST_ROUNDINGS, sqrt(2.2) = 1.48, in one of three ways, by what they cost (`_weight_sums`):

    Lent    dW's memory is free until dW is made, and holds the logits of H tokens; with the buffer, of n > H.
            They lie there transposed, (V, n), the first rows in dW's memory behind a free front, the rest in
            the buffer; losses and gradients are made down their columns. Then dW of all n tokens is one
            matmul for each block of its rows, from the front on: rows [i, j) end at jH, and the logits that
            are still to be read begin at front + in, so that blocks grow as they go. The other tokens follow
            in chunks. At H = 4,096 and 8,192 tokens that is n = 6,144 and one chunk, two sums, error
            sqrt(0.75 + 1) = 1.32. The front's first use is for float32 sums over both parts of V.
    Chunks  The first chunk is the smallest. The last ones, if need be in both ways, go into one matmul: the
            gradients of the last chunk's logits are there, and those of the chunks before it are computed
            again from their lse, for a few columns at a time, at most 0.3 of a matmul.
    Wide    dW adds up in float32 (many tokens; float16, see HALF_SHIFT).

Where a float32 dh would leave too little memory for the first way, dh has the dtype of h: a scalar that is no
power of two then rounds it once more, which makes its error sqrt(2) times as large, and not more.

[1] Hsu et al., Liger Kernel, arXiv:2410.10989: gradients in the forward
[2] Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009
[3] Chowdhery et al., PaLM, arXiv:2204.02311
[4] Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sloth_kernels._library import (
    HAS_TRITON,
    INTERPRETED,
    differentiable_gradients,
    tl,
    triton,
    wants_graph,
)
from sloth_kernels.gated_activation import as_matrix
from sloth_kernels.nf4 import FourBit, expand_4bit, expand_4bit_reference
from sloth_kernels.rms_norm import multiprocessors

Weight = torch.Tensor | FourBit
REDUCTIONS = ("mean", "sum", "none")
# The buffer of logits, and what else is held meanwhile.
LOGITS_BYTES = 600 * 2**20
CPU_LOGITS_BYTES = 2**26
ROW_MULTIPLE = 128
# The tiles that cuBLAS takes for large matmuls, and rows that hide reading the weight behind computing.
TILE_ROWS, TILE_COLUMNS = 128, 256
FEWEST_ROWS = 1024
# From how many times the tiles of a gradient of hidden states its sum over the vocabulary is shared out.
LEAST_SHARES = 2
# What a chunk costs beside its rounds of tiles: as long as such a round over so many columns of the
# vocabulary (0.1 ms on an H200, from 3 and 12 chunks of the same tokens). And what memory is worth: with half
# of the rows, rounds and chunks may take 2^0.25 times as long.
CHUNK_COLUMNS = 8192
ROWS_EXPONENT = 0.25
# For sums of dW in 16 bits, see above: c1 + c2 + ... + 1, and the share of the tokens computed again.
MOST_ROUNDINGS = 2.2
MOST_AGAIN = 0.3
# Columns of logits that are computed again at a time; the rows of dW that one matmul makes.
AGAIN_COLUMNS = 2048
# The same with logits in dW's memory, where nothing is computed again: everything but a few hundred kB.
LENT_BYTES = 610 * 2**20
# Rows of dW whose memory holds no logits, so that there is where dW may begin, and room for float32 sums: of
# gradients of hidden states half as many rows.
FRONT_ROWS = 2048
# An addition to dW reads and writes it once more: as long as a matmul with so many tokens (700 TFLOP/s,
# 4.2 TB/s).
ADD_TOKENS = 320
# Transposed logits: rows of the vocabulary and tokens of a tile, programs that sum, tiles of a program that
# makes gradients, and float32 numbers that sums over the vocabulary need for each token at least.
COLUMN_TILE = (16, 128)
COLUMN_PROGRAMS = 24  # a multiprocessor
COLUMN_REPEATS = 8
COLUMN_SUMS = 9
# Rows of the buffer begin at multiples of this many elements, for cuBLAS and for vectors of 16 bytes.
COLUMN_MULTIPLE = 64
SLAB_BYTES = 2**26
MOST_COLUMNS = 4096
COLUMNS_PER_THREAD = 16
# Matrix products of 16-bit numbers into float32 (torch 2.8).
OUT_DTYPE = hasattr(torch.ops.aten.addmm, "dtype_out")
# No label: what is ignored where nothing is.
NEVER = -(2**63)
# float16 gradients of logits are kept 2^7 times their size before the mean, so that small ones are not lost;
# their sums over tokens (dW) would overflow, and are float32.
HALF_SHIFT = 2.0**7


class _Head(NamedTuple):
    """What a pass over the rows computes. z = outer * a, or outer * tanh(inner * a) where inner is not 0."""

    outer: float
    inner: float
    ignore_index: int
    smoothing: float
    z_loss: float
    entropy: bool
    top1: bool
    logits_dtype: torch.dtype
    fused: bool


@dataclass(kw_only=True, slots=True)
class _Rows:
    """What is known of each row (T,): float32, and int64 ids. The gradient of the loss may be one number."""

    loss: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    grad_entropy: torch.Tensor | None = None

    def part(self, rows: slice) -> _Rows:
        """Those of a chunk."""
        values = (getattr(self, name) for name in self.__slots__)
        parts = [v if v is None or v.dim() == 0 else v[rows] for v in values]
        return _Rows(**dict(zip(self.__slots__, parts, strict=True)))


@triton.jit
def _logit(a, outer, inner, CAPPED: tl.constexpr, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(z, dz/da); the compiler drops what the caller does not use."""
    if CAPPED:
        x = a * inner
        e = tl.exp(-2.0 * tl.abs(x))
        r = 1.0 / (1.0 + e)
        t = (1.0 - e) * r
        t = tl.where(x < 0.0, -t, t)
        # 1 - e loses digits near 0, where the series is exact.
        q = x * x
        series = x * (1.0 + q * (-0.3333333333333333 + q * (0.13333333333333333 - q * 0.05396825396825397)))
        t = tl.where(tl.abs(x) < 0.2, series, t)
        z = outer * t
        slope = (outer * inner) * (4.0 * e * r * r)
    elif SCALED:
        z = a * outer
        slope = outer
    else:
        z = a
        slope = outer
    return z, slope


@triton.jit
def _online(m, s, u, z, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """One more logit for each lane: maximum m, s = sum exp(z - m), u = sum exp(z - m) (z - m)."""
    larger = tl.maximum(m, z)
    shrink = tl.exp(m - larger)
    e = tl.exp(z - larger)
    if ENTROPY:
        u = (u + (m - larger) * s) * shrink + tl.where(e > 0.0, e * (z - larger), 0.0)
    return larger, s * shrink + e, u


@triton.jit
def _loss(  # type: ignore[no-untyped-def]
    top, log_sum, own, total, classes, smoothing, z_loss, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr
):
    """(loss, lse) of a maximum, the logarithm of its sum, the label's logit and the sum of all."""
    lse = top + log_sum
    loss = (top - own) + log_sum
    if SMOOTHING:
        loss += smoothing * (own - total / classes)
    if Z_LOSS:
        loss += z_loss * lse * lse
    return loss, lse


@triton.jit
def _logit_gradient(  # type: ignore[no-untyped-def]
    a,
    hit,
    base,
    rise,
    grad,
    lse,
    entropy,
    grad_entropy,
    classes,
    outer,
    inner,
    smoothing,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
):
    """da of logits a: exp(z - base) rise is p times what it is worth, `hit` says which is the label's."""
    z, slope = _logit(a, outer, inner, CAPPED, SCALED)
    p = tl.exp(z - base)
    d = p * rise
    if ENTROPY_GRADIENT:
        d -= tl.where(p > 0.0, grad_entropy * p * (z - lse + entropy), 0.0)
    if SMOOTHING:
        d -= grad * smoothing / classes
        d -= tl.where(hit, grad * (1.0 - smoothing), 0.0)
    else:
        d -= tl.where(hit, grad, 0.0)
    if CAPPED or SCALED:
        d *= slope
    return d


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    out_ptr,
    labels_ptr,
    loss_ptr,
    lse_ptr,
    entropy_ptr,
    top1_ptr,
    grad_ptr,
    grad_entropy_ptr,
    V,
    first,
    classes,
    logits_stride,
    out_stride,
    grad_stride,
    ignore_index,
    outer,
    inner,
    smoothing,
    z_loss,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP1: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss and the like (FORWARD), its gradient (BACKWARD), which may replace the logits.

    Its V columns are those from `first` on of all the `classes`; FORWARD wants all of them.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * logits_stride
    out_ptr += row * out_stride
    blocks = (V + BLOCK - 1) // BLOCK
    if label == ignore_index:
        if FORWARD:
            tl.store(loss_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
        if BACKWARD:
            for i in range(0, blocks):
                column = i * BLOCK + lane
                zero = tl.zeros((BLOCK,), dtype=tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + column, zero, mask=column < V)
    else:
        if FORWARD:
            # Read before anything is written: the sums below wait for every thread.
            inside = (label >= 0) & (label < V)
            own = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
            own, _own_slope = _logit(own, outer, inner, CAPPED, SCALED)
            # A maximum and a sum for each lane, brought together at the end: no barrier in the loop.
            m = tl.full((BLOCK,), -1.0e38, dtype=tl.float32)
            s = tl.zeros((BLOCK,), dtype=tl.float32)
            u = tl.zeros((BLOCK,), dtype=tl.float32)  # sum of exp(z - m) (z - m)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
            index = lane
            for i in range(0, blocks):
                column = i * BLOCK + lane
                a = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
                z, _slope = _logit(a, outer, inner, CAPPED, SCALED)
                if SMOOTHING:
                    total += tl.where(column < V, z, 0.0)
                z = tl.where(column < V, z, float("-inf"))
                if TOP1:
                    index = tl.where(z > best, column, index)
                    best = tl.maximum(best, z)
                m, s, u = _online(m, s, u, z, ENTROPY)
            top = tl.max(m, axis=0)
            weight = tl.exp(m - top)
            sum_exp = tl.sum(s * weight, axis=0)
            log_sum = tl.log(sum_exp)
            total = tl.sum(total, axis=0)
            loss, lse = _loss(top, log_sum, own, total, V, smoothing, z_loss, SMOOTHING, Z_LOSS)
            tl.store(loss_ptr + row, loss)
            tl.store(lse_ptr + row, lse)
            if ENTROPY:
                entropy = log_sum - tl.sum((u + (m - top) * s) * weight, axis=0) / sum_exp
                tl.store(entropy_ptr + row, entropy)
            if TOP1:
                first = tl.min(tl.where(best == tl.max(best, axis=0), index, V), axis=0)
                tl.store(top1_ptr + row, first.to(tl.int64))
        else:
            lse = tl.load(lse_ptr + row)
        if BACKWARD:
            grad = tl.load(grad_ptr + row * grad_stride)
            rise = grad
            if Z_LOSS:
                rise = grad * (1.0 + 2.0 * z_loss * lse)
            if FORWARD:
                rise = rise / sum_exp
                base = top
            else:
                base = lse
            entropy = 0.0
            grad_entropy = 0.0
            if ENTROPY_GRADIENT:
                entropy = tl.load(entropy_ptr + row)
                grad_entropy = tl.load(grad_entropy_ptr + row)
            # Backwards: what was read last may still be in a cache.
            for i in range(0, blocks):
                column = (blocks - 1 - i) * BLOCK + lane
                a = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
                d = _logit_gradient(
                    a,
                    column + first == label,
                    base,
                    rise,
                    grad,
                    lse,
                    entropy,
                    grad_entropy,
                    classes,
                    outer,
                    inner,
                    smoothing,
                    CAPPED,
                    SCALED,
                    SMOOTHING,
                    ENTROPY_GRADIENT,
                )
                tl.store(out_ptr + column, d.to(out_ptr.dtype.element_ty), mask=column < V)


@triton.jit
def _column_sums_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    m_ptr,
    s_ptr,
    total_ptr,
    V,
    tokens,
    stride,
    share,
    outer,
    inner,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of transposed logits (V, tokens), `share` rows: each token's maximum, sum of exp, sum.

    What is behind the tokens, up to the stride, is read as well: aligned vectors.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, V)
    m = tl.full((BLOCK_V, BLOCK_T), -1.0e38, dtype=tl.float32)
    s = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
    total = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
    for i in range(0, (end - begin + BLOCK_V - 1) // BLOCK_V):
        row = (begin + i * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = (row < end)[:, None] & (token < stride)[None, :]
        a = tl.load(logits_ptr + row[:, None] * stride + token[None, :], mask=mask, other=0.0)
        z, _slope = _logit(a.to(tl.float32), outer, inner, CAPPED, SCALED)
        if SMOOTHING:
            total += tl.where(mask, z, 0.0)
        m, s, _u = _online(m, s, s, tl.where(mask, z, float("-inf")), False)
    top = tl.max(m, axis=0)
    to = tl.program_id(1) * tokens + token
    tl.store(m_ptr + to, top, mask=token < tokens)
    tl.store(s_ptr + to, tl.sum(s * tl.exp(m - top[None, :]), axis=0), mask=token < tokens)
    if SMOOTHING:
        tl.store(total_ptr + to, tl.sum(total, axis=0), mask=token < tokens)


@triton.jit
def _column_losses_kernel(  # type: ignore[no-untyped-def]
    first_ptr,
    second_ptr,
    labels_ptr,
    m_ptr,
    s_ptr,
    total_ptr,
    loss_ptr,
    lse_ptr,
    split,
    V,
    tokens,
    stride,
    parts,
    ignore_index,
    outer,
    inner,
    smoothing,
    z_loss,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Losses of the parts' sums. The first `split` rows of the transposed logits are at one place."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < tokens
    maxima = tl.full((BLOCK_V, BLOCK_T), -1.0e38, dtype=tl.float32)
    sums = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
    totals = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
    for i in range(0, (parts + BLOCK_V - 1) // BLOCK_V):
        part = i * BLOCK_V + tl.arange(0, BLOCK_V)
        at = part[:, None] * tokens + token[None, :]
        there = (part < parts)[:, None] & mask[None, :]
        m = tl.load(m_ptr + at, mask=there, other=-1.0e38)
        larger = tl.maximum(maxima, m)
        s = tl.load(s_ptr + at, mask=there, other=0.0)
        sums = sums * tl.exp(maxima - larger) + s * tl.exp(m - larger)
        maxima = larger
        if SMOOTHING:
            totals += tl.load(total_ptr + at, mask=there, other=0.0)
    top = tl.max(maxima, axis=0)
    sum_exp = tl.sum(sums * tl.exp(maxima - top[None, :]), axis=0)
    total = tl.sum(totals, axis=0)
    label = tl.load(labels_ptr + token, mask=mask, other=0)
    kept = mask & (label != ignore_index)
    nan = float("nan")
    near = kept & (label >= 0) & (label < split)
    far = kept & (label >= split) & (label < V)
    own = tl.load(first_ptr + label * stride + token, mask=near, other=nan).to(tl.float32)
    other = tl.load(second_ptr + (label - split) * stride + token, mask=far, other=nan).to(tl.float32)
    own, _slope = _logit(tl.where(far, other, own), outer, inner, CAPPED, SCALED)
    loss, lse = _loss(top, tl.log(sum_exp), own, total, V, smoothing, z_loss, SMOOTHING, Z_LOSS)
    tl.store(loss_ptr + token, tl.where(kept, loss, 0.0), mask=mask)
    tl.store(lse_ptr + token, tl.where(kept, lse, 0.0), mask=mask)


@triton.jit
def _column_gradients_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    lse_ptr,
    entropy_ptr,
    grad_ptr,
    grad_entropy_ptr,
    V,
    first,
    classes,
    tokens,
    stride,
    grad_stride,
    share,
    ignore_index,
    outer,
    inner,
    smoothing,
    z_loss,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients in the place of `share` rows of transposed logits: rows `first` to `first` + V of them.

    What is behind the tokens becomes 0.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, V)
    inside = token < tokens
    label = tl.load(labels_ptr + token, mask=inside, other=0)
    kept = inside & (label != ignore_index)
    lse = tl.load(lse_ptr + token, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + token * grad_stride, mask=inside, other=0.0)
    rise = grad
    if Z_LOSS:
        rise = grad * (1.0 + 2.0 * z_loss * lse)
    entropy = lse
    grad_entropy = grad
    if ENTROPY_GRADIENT:
        entropy = tl.load(entropy_ptr + token, mask=inside, other=0.0)
        grad_entropy = tl.load(grad_entropy_ptr + token, mask=inside, other=0.0)
    for i in range(0, (end - begin + BLOCK_V - 1) // BLOCK_V):
        row = (begin + i * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = (row < end)[:, None] & (token < stride)[None, :]
        at = logits_ptr + row[:, None] * stride + token[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        d = _logit_gradient(
            a,
            (row + first)[:, None] == label[None, :],
            lse[None, :],
            rise[None, :],
            grad[None, :],
            lse[None, :],
            entropy[None, :],
            grad_entropy[None, :],
            classes,
            outer,
            inner,
            smoothing,
            CAPPED,
            SCALED,
            SMOOTHING,
            ENTROPY_GRADIENT,
        )
        d = tl.where(kept[None, :], d, 0.0)
        tl.store(at, d.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    factor_ptr,
    total,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = factor x, one number on the device; in place nothing is moved where that is 1."""
    factor = tl.load(factor_ptr)
    if (not IN_PLACE) or factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < total, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < total)


def _fused(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take tensors like this one."""
    if INTERPRETED and not x.is_cuda:  # which gets bfloat16 wrong
        return x.dtype in (torch.float32, torch.float16)
    return x.is_cuda and HAS_TRITON


def _rows_pass(
    head: _Head,
    logits: torch.Tensor,
    out: torch.Tensor | None,
    labels: torch.Tensor,
    rows: _Rows,
    first: int = 0,
    classes: int = 0,
) -> None:
    """Fill what `rows` has of loss, lse, entropy and top1, or read its lse; `out` gets gradients of logits.

    logits, out: (n, V), the columns adjoining; they may be the same. Where lse is read, the columns may be
    some of `classes` (0: all), from `first` on.
    """
    forward = rows.loss is not None
    n, v = logits.shape
    classes = classes or v
    if not head.fused:
        _rows_torch(head, logits, out, labels, rows, first, classes)
        return
    block = max(32, min(MOST_COLUMNS, 1 << max(0, v - 1).bit_length()))
    target = logits if out is None else out
    # Never read: any pointer in the place of what is not there.
    loss, lse, entropy, top1, grad, grad_entropy = (
        labels if x is None else x
        for x in (rows.loss, rows.lse, rows.entropy, rows.top1, rows.grad, rows.grad_entropy)
    )
    with torch.cuda.device_of(logits):
        # Not by launch(), which repeats a launch once: this kernel writes over what it reads.
        _rows_kernel[(n,)](
            logits,
            target,
            labels,
            loss,
            lse,
            entropy,
            top1,
            grad,
            grad_entropy,
            v,
            first,
            classes,
            logits.stride(0),
            target.stride(0),
            0 if grad.dim() == 0 else grad.stride(0),
            head.ignore_index,
            head.outer,
            head.inner,
            head.smoothing,
            head.z_loss,
            CAPPED=head.inner != 0,
            SCALED=head.outer != 1,
            SMOOTHING=head.smoothing != 0,
            Z_LOSS=head.z_loss != 0,
            ENTROPY=forward and head.entropy,
            TOP1=forward and head.top1,
            FORWARD=forward,
            BACKWARD=out is not None,
            ENTROPY_GRADIENT=rows.grad_entropy is not None,
            BLOCK=block,
            num_warps=max(1, block // (32 * COLUMNS_PER_THREAD)),
        )


def _logits_torch(head: _Head, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """(z, dz/da)."""
    z = logits.float()
    if head.inner:
        t = torch.tanh(z * head.inner)
        return head.outer * t, head.outer * head.inner * (1 - t * t)
    return z if head.outer == 1 else z * head.outer, head.outer


def _loss_torch(head: _Head, lse: torch.Tensor, own: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    loss = lse - own
    if mean is not None:
        loss += head.smoothing * (own - mean)
    if head.z_loss:
        loss += head.z_loss * lse * lse
    return loss


def _rows_torch(
    head: _Head,
    logits: torch.Tensor,
    out: torch.Tensor | None,
    labels: torch.Tensor,
    rows: _Rows,
    first: int,
    classes: int,
) -> None:
    """`_rows_pass` by PyTorch's operators."""
    z, slope = _logits_torch(head, logits)
    v = z.shape[1]
    ignored = labels == head.ignore_index
    own = labels - first
    inside = (own >= 0) & (own < v)
    column = own.where(inside, 0)[:, None]
    if rows.loss is not None:
        assert rows.lse is not None
        rows.lse.copy_(z.logsumexp(1))
        chosen = z.gather(1, column)[:, 0].where(inside, torch.nan)
        loss = _loss_torch(head, rows.lse, chosen, z.mean(1) if head.smoothing else None)
        rows.loss.copy_(loss.masked_fill_(ignored, 0))
        if rows.entropy is not None:
            logarithms = z - rows.lse[:, None]
            terms = torch.where(logarithms.isneginf(), 0.0, logarithms.exp() * logarithms)
            rows.entropy.copy_(-terms.sum(1))
        if rows.top1 is not None:
            rows.top1.copy_(logits.argmax(1) if head.outer > 0 else z.argmax(1))
    if out is None:
        return
    assert rows.lse is not None and rows.grad is not None
    logarithms = z - rows.lse[:, None]
    grad = rows.grad.expand(labels.shape)
    rise = grad * (1 + 2 * head.z_loss * rows.lse) if head.z_loss else grad
    d = logarithms.exp()
    if rows.grad_entropy is not None:
        assert rows.entropy is not None
        change = rows.grad_entropy[:, None] * d * (logarithms + rows.entropy[:, None])
        d = d * rise[:, None] - torch.where(d > 0, change, 0.0)
    else:
        d *= rise[:, None]
    if head.smoothing:
        d -= (grad * (head.smoothing / classes))[:, None]
    d.scatter_add_(1, column, torch.where(inside, grad * (head.smoothing - 1), 0.0)[:, None])
    if head.inner or head.outer != 1:
        d *= slope
    out.copy_(d.masked_fill_(ignored[:, None], 0))


def _columns_pass(
    head: _Head,
    pieces: Sequence[torch.Tensor],
    labels: torch.Tensor,
    rows: _Rows,
    scratch: torch.Tensor,
) -> None:
    """`_rows_pass` of transposed logits, whose gradients take their place; fills no entropy and top1.

    pieces: two, (n, tokens) and (V - n, tokens), of the same strides, tokens adjoining, and finite numbers of
    nobody's behind them, up to the stride. scratch: float32, COLUMN_SUMS numbers for each token at least, of
    anything.
    """
    near, far = pieces
    split, tokens = near.shape
    v = split + far.shape[0]
    if not head.fused:
        _columns_torch(head, pieces, labels, rows)
        return
    stride = near.stride(0)
    flags = dict(CAPPED=head.inner != 0, SCALED=head.outer != 1, SMOOTHING=head.smoothing != 0)
    block = dict(BLOCK_V=COLUMN_TILE[0], BLOCK_T=COLUMN_TILE[1], num_warps=4)
    tiles = _ceil(tokens, COLUMN_TILE[1])
    with torch.cuda.device_of(near):
        if rows.loss is not None:
            most = min(
                _ceil(COLUMN_PROGRAMS * max(1, _processors(near.device)), tiles),
                scratch.numel() // (3 * tokens) - 2,
            )
            share = _ceil(_ceil(v, most), COLUMN_TILE[0]) * COLUMN_TILE[0]
            counts = [_ceil(piece.shape[0], share) for piece in pieces]
            m, s, total = scratch[: 3 * sum(counts) * tokens].view(3, sum(counts), tokens)
            done = 0
            for piece, count in zip(pieces, counts, strict=True):
                _column_sums_kernel[(tiles, count)](
                    piece,
                    m[done:],
                    s[done:],
                    total[done:],
                    piece.shape[0],
                    tokens,
                    stride,
                    share,
                    head.outer,
                    head.inner,
                    **flags,
                    **block,
                )
                done += count
            _column_losses_kernel[(tiles,)](
                near,
                far,
                labels,
                m,
                s,
                total,
                rows.loss,
                rows.lse,
                split,
                v,
                tokens,
                stride,
                done,
                head.ignore_index,
                head.outer,
                head.inner,
                head.smoothing,
                head.z_loss,
                **flags,
                Z_LOSS=head.z_loss != 0,
                **block,
            )
        assert rows.grad is not None
        entropy, grad_entropy = (
            (labels, labels) if rows.grad_entropy is None else (rows.entropy, rows.grad_entropy)
        )
        share = COLUMN_REPEATS * COLUMN_TILE[0]
        for first, piece in zip((0, split), pieces, strict=True):
            # Not by launch(), as above.
            _column_gradients_kernel[(tiles, _ceil(piece.shape[0], share))](
                piece,
                labels,
                rows.lse,
                entropy,
                rows.grad,
                grad_entropy,
                piece.shape[0],
                first,
                v,
                tokens,
                stride,
                0 if rows.grad.dim() == 0 else rows.grad.stride(0),
                share,
                head.ignore_index,
                head.outer,
                head.inner,
                head.smoothing,
                head.z_loss,
                **flags,
                Z_LOSS=head.z_loss != 0,
                ENTROPY_GRADIENT=rows.grad_entropy is not None,
                **block,
            )


def _columns_torch(head: _Head, pieces: Sequence[torch.Tensor], labels: torch.Tensor, rows: _Rows) -> None:
    """`_columns_pass` by PyTorch's operators, some rows of the vocabulary at a time."""
    slabs: list[tuple[int, torch.Tensor]] = []
    v = 0
    for piece in pieces:
        for slab in piece.split(max(1, SLAB_BYTES // (16 * labels.numel()))):
            slabs.append((v, slab.t()))
            v += slab.shape[0]
    if rows.loss is not None:
        assert rows.lse is not None
        rows.lse.fill_(-torch.inf)
        own = torch.full_like(rows.lse, torch.nan)
        total = torch.zeros_like(rows.lse)
        for first, slab in slabs:
            z, _ = _logits_torch(head, slab)
            torch.logaddexp(rows.lse, z.logsumexp(1), out=rows.lse)
            total += z.sum(1)
            column = labels - first
            inside = (column >= 0) & (column < z.shape[1])
            here = z.gather(1, column.where(inside, 0)[:, None])[:, 0]
            own = here.where(inside, own)
        loss = _loss_torch(head, rows.lse, own, total / v if head.smoothing else None)
        rows.loss.copy_(loss.masked_fill_(labels == head.ignore_index, 0))
    known = dataclasses.replace(rows, loss=None)
    for first, slab in slabs:
        _rows_torch(head, slab, slab, labels, known, first, v)


def spare_bytes(most_bytes: int, device: torch.device) -> int:
    """What logits may take of so many bytes: at most a quarter of what a GPU has left."""
    if device.type != "cuda":
        return CPU_LOGITS_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    if free < 4 * most_bytes:
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(most_bytes, free // 4)


def most_rows(row_bytes: int, beside_bytes: int, device: torch.device) -> int:
    """Rows that a chunk may have beside what else is held: a multiple of ROW_MULTIPLE, at least one."""
    return _rows_in(spare_bytes(LOGITS_BYTES, device), row_bytes, beside_bytes)


def _rows_in(most_bytes: int, row_bytes: int, beside_bytes: int) -> int:
    most_bytes = max(most_bytes - beside_bytes, most_bytes // 2)
    return max(1, most_bytes // (row_bytes * ROW_MULTIPLE)) * ROW_MULTIPLE


@functools.lru_cache(4096)
def frozen_head_bytes(tokens: int, k: int, v: int, itemsize: int, processors: int) -> int:
    """The most that the loss of a frozen head takes: a chunk's logits, the gradient of the hidden states in
    float32, and shares of its sums, on a GPU of so many multiprocessors with memory to spare.

    k: width of the hidden states; v: the vocabulary; itemsize: of an element of both.
    """
    row_bytes = _ceil(v, COLUMN_MULTIPLE) * COLUMN_MULTIPLE * itemsize
    shared = v if itemsize == 2 and OUT_DTYPE else 0
    shared_bytes = _shared_bytes(processors) if shared else 0
    most = _rows_in(LOGITS_BYTES, row_bytes, tokens * k * (4 - itemsize) + shared_bytes)
    rows = min(tokens, chunk_rows(tokens, most, k, processors, v, bool(shared)))
    slab_bytes = 0 if OUT_DTYPE or itemsize == 4 else SLAB_BYTES
    return rows * row_bytes + tokens * k * 4 + max(shared_bytes, slab_bytes)


def _shared_bytes(processors: int) -> int:
    """What sums take that are shared out."""
    return 4 * processors * TILE_ROWS * TILE_COLUMNS


def chunk_rows(
    tokens: int, most: int, width: int = 0, processors: int = 0, v: int = 0, shared: bool = False
) -> int:
    """Rows of a chunk: a multiple of ROW_MULTIPLE, as few chunks as may be, all about as long.

    With the width of the hidden states, a GPU's multiprocessors and the vocabulary: from FEWEST_ROWS on,
    those that are fast and few. What depends on them is the gradient of the hidden states. It sums over the
    vocabulary, so each of its rounds of tiles is long, and one that fills half of the card is half wasted,
    unless the sum may be `shared` out. And each chunk has its launches, and their ends, as the card empties.
    """
    even = _ceil(_ceil(tokens, _ceil(tokens, most)), ROW_MULTIPLE) * ROW_MULTIPLE
    if not processors or tokens <= FEWEST_ROWS or most <= FEWEST_ROWS:
        return even

    def of_chunk(rows: int) -> float:
        return _ceil(_tiles(rows, width), processors) / shares(rows, width, v if shared else 0, processors)

    def cost(rows: int) -> float:
        rounds = tokens // rows * of_chunk(rows) + (of_chunk(tokens % rows) if tokens % rows else 0)
        columns: float = (rounds * v + _ceil(tokens, rows) * CHUNK_COLUMNS) * rows**ROWS_EXPONENT
        return columns

    return min(range(FEWEST_ROWS, most + 1, ROW_MULTIPLE), key=cost)


def shares(rows: int, width: int, v: int, processors: int) -> int:
    """Equal parts of the vocabulary whose products make the gradient of so many hidden states at once.

    As many as fill a GPU of so many multiprocessors with tiles, from LEAST_SHARES on; else 1.
    """
    most = processors // _tiles(rows, width)
    fitting = (n for n in range(most, LEAST_SHARES - 1, -1) if v % (n * COLUMN_MULTIPLE) == 0)
    return next(fitting, 1) if v else 1


def _tiles(rows: int, width: int) -> int:
    return _ceil(rows, TILE_ROWS) * _ceil(width, TILE_COLUMNS)


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


class _Lent(NamedTuple):
    """Where the logits of the first `tokens` are: transposed, in dW's memory and in the buffer.

    Row by row of the vocabulary, `stride` elements apart: the first `split` rows in dW's memory, from element
    `offset` on, the others in the buffer. `sums`: gradients of hidden states that are summed at once.
    """

    tokens: int
    stride: int
    split: int
    offset: int
    sums: int

    def blocks(self, v: int, k: int) -> Iterator[slice]:
        """Rows of dW (v, k) in the order in which to make them: none lies on logits that are read later."""
        end = 0
        while end < v:
            start, end = end, v
            if start < self.split:
                end = min(self.split, (self.offset + start * self.stride) // k)
                assert end > start
                if end - start > ROW_MULTIPLE and end < self.split:
                    end -= (end - start) % ROW_MULTIPLE
            yield slice(start, end)


class _Sums(NamedTuple):
    """How a 16-bit dW adds up: first the tokens of `lent`, then so many `rows` in each chunk."""

    rows: int
    again: int = 0  # chunks before the last whose logits are computed again
    wide: bool = False  # dW is float32
    lent: _Lent | None = None
    exact: bool = True  # the gradient of hidden states is float32 where it waits for the backward's scalar


def _lend(tokens: int, k: int, v: int, most: int, sums: int) -> _Lent | None:
    """None if dW's memory and a buffer of so many elements do not hold the logits of so many tokens."""
    stride = _ceil(tokens, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    front = max(FRONT_ROWS, 2 * sums)
    split = min((v - front) * k // stride, v - front) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    offset = (v * k - split * stride) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    if split <= 0 or (v - split) * stride > most or offset < 2 * COLUMN_SUMS * tokens:
        return None
    return _Lent(tokens, stride, split, offset, sums)


@functools.lru_cache(maxsize=4096)
def _lent_sums(
    tokens: int, k: int, v: int, most: int, exact: bool, most_again: float, processors: int, shared: int
) -> tuple[float, _Sums] | None:
    """The sums of dW that cost least with a buffer of `most` elements, and what they cost in tokens.

    None where there are none within MOST_ROUNDINGS that compute at most such a share of the tokens again.
    """
    width = _ceil(v, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    longest = min(most // (width * ROW_MULTIPLE), _ceil(tokens, ROW_MULTIPLE)) * ROW_MULTIPLE
    for chunks in range(_ceil(tokens, longest) if longest else 1):
        found = []
        # The longest first: then the first sum is short, and it is in all others.
        for count in range(longest if chunks else 1, 0, -ROW_MULTIPLE):
            first = tokens - chunks * count
            if first <= 0:
                continue
            sums = 0 if exact else min(first, chunk_rows(first, FRONT_ROWS, k, processors, v))
            lent = _lend(first, k, v, most, sums)
            if lent is None:
                break
            # Those of `added` sums are rounded on their way to the last one.
            fitting = (
                again
                for again in range(min(max(1, chunks), int(most_again * tokens / count) + 1))
                for added in [chunks - again]
                if added * first + count * added * (added - 1) / 2 <= (MOST_ROUNDINGS - 1) * tokens
            )
            again = next(fitting, None)
            if again is None:
                continue
            parts = shares(count, k, shared, processors)
            beside = max(
                (again + 1) * count * AGAIN_COLUMNS if again else 0, 2 * parts * count * k if parts > 1 else 0
            )
            if chunks and count * width + beside > most:
                continue
            cost: float = again * count
            for rows in [first] if exact else [sums] * (first // sums) + [first % sums]:
                cost += _waste(rows, k, processors)
            cost += chunks * _waste(count, k, processors, shared) + (chunks - again) * ADD_TOKENS
            found.append((cost, _Sums(count if chunks else 0, again, False, lent, exact)))
        if found:
            return min(found, key=lambda x: x[0])
    return None


def _waste(rows: int, k: int, processors: int, shared: int = 0) -> float:
    """By what the rounds of tiles of a gradient of so many hidden states are more than full: in rows."""
    if not processors or not rows:
        return 0.0
    rounds = _ceil(_tiles(rows, k), processors) / shares(rows, k, shared, processors)
    return rounds * processors * TILE_ROWS * TILE_COLUMNS / k - rows


def _weight_sums(
    tokens: int, k: int, v: int, most: int, elements: int, excess: int, exact: bool, machine: tuple[int, int]
) -> _Sums:
    """How a 16-bit dW adds up: in chunks of `most` rows, or with logits in dW's memory if that is better.

    elements: of the buffer, of which `excess` go to a float32 gradient of hidden states if it is `exact`.
    machine: multiprocessors, and v where sums over it may be shared out.
    """
    count, again, wide = _weight_chunks(tokens, most)
    chunks = _ceil(tokens, count)
    cost = float(again * count + (chunks - 1 - again) * ADD_TOKENS)
    for rows in [tokens - (chunks - 1) * count] + [count] * (chunks - 1):
        cost += _waste(rows, k, machine[0], machine[1])
    # Rather another rounding of the gradient of hidden states than logits computed again.
    ways = [(exact, 0.0), (exact, MOST_AGAIN)]
    if exact and (again or wide):
        ways.insert(1, (False, 0.0))
    for precise, most_again in ways:
        left = elements - (excess if precise else 0)
        found = _lent_sums(tokens, k, v, left, precise, most_again, *machine)
        if found is not None and (wide or found[0] < cost):
            return found[1]
    return _Sums(count, again, wide)


def _weight_chunks(tokens: int, most: int) -> tuple[int, int, bool]:
    """How a 16-bit dW adds up: (rows of a chunk, chunks whose logits are computed again, in float32)."""
    chunks = _ceil(tokens, most)
    first = tokens - (chunks - 1) * most
    for again in range(chunks):
        sums = [(first + i * most) / tokens for i in range(chunks - 1 - again)]
        if sum(sums) + 1 <= MOST_ROUNDINGS:
            break
    if again * most > MOST_AGAIN * tokens:
        return chunk_rows(tokens, most), 0, True
    return most, again, False


def _scale(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, fused: bool) -> torch.Tensor:
    """factor x in `dtype`, rounded once; in x itself if that is its dtype. factor: float32, one number.

    x: contiguous.
    """
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if fused and x.numel():
        with torch.cuda.device_of(x):
            # Not by launch(), as above.
            _scale_kernel[(_ceil(x.numel(), 4096),)](
                x, out, factor, x.numel(), IN_PLACE=out is x, BLOCK=4096, num_warps=8
            )
        return out
    parts = (t.view(-1).split(SLAB_BYTES // 4) for t in (x, out))
    for part, scaled in zip(*parts, strict=True):
        scaled.copy_(part.float() * factor)
    return out


def _product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    """out = left @ right, or out += it where `add`. Where `out` is float32 and they are not, it is exact."""
    if out.dtype == left.dtype:
        if add:
            torch.addmm(out, left, right, out=out)
        else:
            torch.mm(left, right, out=out)
    elif out.is_cuda and OUT_DTYPE and out.dtype == torch.float32:
        if add:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif out.is_cuda:  # rounded after all: matmuls of wider copies would take many times as long
        size = max(1, SLAB_BYTES // (right.shape[1] * left.element_size()))
        for part, own in zip(out.split(size), left.split(size), strict=True):
            product = torch.mm(own, right)
            part.add_(product) if add else part.copy_(product)
    else:  # wider copies of a slab at a time
        size = max(1, SLAB_BYTES // (out.dtype.itemsize * (left.shape[0] + right.shape[1])))
        for some, others in zip(left.split(size, 1), right.split(size), strict=True):
            torch.addmm(out, some.to(out.dtype), others.to(out.dtype), beta=int(add), out=out)
            add = True


def _shared_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, parts: int) -> None:
    """out = left @ right of 16-bit numbers, with the sum in so many products, added up in float32."""
    lefts, rights = left.unflatten(1, (parts, -1)).transpose(0, 1), right.unflatten(0, (parts, -1))
    if out.is_cuda:
        products = torch.bmm(lefts, rights, out_dtype=torch.float32)
    else:
        products = torch.bmm(lefts.float(), rights.float())
    # The last addition rounds, without another pass.
    torch.add(products[0] if parts == 2 else products[:-1].sum(0), products[-1], out=out)


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, else 0."""
    return multiprocessors(device) if device.type == "cuda" else 0


def _logits_into(
    out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out = hidden @ weight.T + bias."""
    if bias is not None and out.dtype == hidden.dtype:
        torch.addmm(bias, hidden, weight.t(), out=out)
        return
    _product(out, hidden, weight.t(), False)
    if bias is not None:
        out += bias


def _matrix(space: torch.Tensor, rows: int, columns: int, width: int) -> torch.Tensor:
    """(rows, columns), `width` elements from row to row, for anything, in a row of memory."""
    matrix = space[: rows * width].view(rows, width)
    matrix[:, columns:] = 0  # matmuls of bfloat16 on a CPU let a NaN in there reach their results
    return matrix[:, :columns]


class _Gradients(NamedTuple):
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def _pass(
    head: _Head,
    hidden: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    rows: _Rows,
    needs: Sequence[bool],
    exact: bool = False,
) -> _Gradients:
    """All rows, chunk by chunk: fills `rows`, returns those gradients of hidden, weight and bias in `needs`.

    hidden: (..., H); bias in its dtype. weight: any dtype. `exact`: that of hidden in float32, and that of
    weight as well where it adds up so.
    """
    hidden, labels = as_matrix(hidden), labels.reshape(-1).contiguous()
    (tokens, k), v, dtype = hidden.shape, weight.shape[0], hidden.dtype
    if isinstance(weight, FourBit) and head.fused:
        dense = expand_4bit(weight, torch.empty((v, k), dtype=dtype, device=hidden.device))
    elif isinstance(weight, FourBit):
        dense = expand_4bit_reference(weight).to(dtype)
    else:
        dense = weight.detach().to(dtype)
    backward = any(needs)
    width = _ceil(v, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    same = head.logits_dtype == dtype
    row_bytes = width * (dtype.itemsize if same else 2 * head.logits_dtype.itemsize + dtype.itemsize)
    narrow = needs[1] and isinstance(weight, torch.Tensor) and weight.dtype == dtype and dtype.itemsize == 2
    # Beside the buffer: what a float32 dh has more than dh; a slab that is computed again, or shares of sums.
    excess_bytes = tokens * k * (4 - dtype.itemsize) if needs[0] and exact else 0
    processors = _processors(hidden.device)
    shared = v if dtype.itemsize == 2 and OUT_DTYPE else 0
    again_bytes = 2 * min(tokens, LOGITS_BYTES // row_bytes) * AGAIN_COLUMNS * dtype.itemsize
    shared_bytes = _shared_bytes(processors) if needs[0] and shared else 0
    beside_bytes = excess_bytes + max(again_bytes if narrow else 0, shared_bytes)
    most = most_rows(row_bytes, beside_bytes, hidden.device)
    if not narrow or (exact and dtype == torch.float16):  # see HALF_SHIFT
        plan = _Sums(chunk_rows(tokens, most, k, processors, v, bool(shared)), wide=narrow)
    elif same and bias is None:  # cuBLAS rounds a product before it adds a bias that lies across its rows
        elements, excess = (
            n // dtype.itemsize for n in (spare_bytes(LENT_BYTES, hidden.device), excess_bytes)
        )
        plan = _weight_sums(tokens, k, v, most, elements, excess, exact, (processors, shared))
    else:
        plan = _Sums(*_weight_chunks(tokens, most))
    count, again, wide, lent, precise = plan
    count = min(count, tokens)
    dh = dw = db = None
    if needs[0]:
        dh_dtype = torch.float32 if exact and precise else dtype
        dh = torch.empty((tokens, k), dtype=dh_dtype, device=hidden.device)
    if needs[1]:
        assert isinstance(weight, torch.Tensor)
        dw = torch.empty((v, k), dtype=torch.float32 if wide else weight.dtype, device=hidden.device)
    if needs[2]:
        db = torch.zeros(v, dtype=torch.float32, device=hidden.device)
    needed = count * width
    if lent is not None:
        needed = max(needed, (v - lent.split) * lent.stride)
    space = torch.empty(needed, dtype=head.logits_dtype, device=hidden.device)
    start = end = 0
    if lent is not None:
        end = lent.tokens
        own = slice(0, end)
        assert dw is not None
        _first_sum(head, hidden[own], dense, labels[own], rows.part(own), lent, space, dh, dw)
    logits = out = _matrix(space, count, v, width)
    if not same:
        other = torch.empty(count * width if backward else 0, dtype=dtype, device=hidden.device)
        out = _matrix(other, count if backward else 0, v, width)
        del other
    # The rows before this one add to dW chunk by chunk, the rest at once.
    summed = max(0, tokens - (again + 1) * count) if again else tokens
    while end < tokens:
        # The remainder first: sums that are rounded are then short for longer.
        start, end = end, end + ((tokens - 1) % count + 1 if end == 0 else count)
        h, a = hidden[start:end], logits[: end - start]
        _logits_into(a, h, dense, bias)
        d = out[: end - start] if backward else None
        _rows_pass(head, a, d, labels[start:end], rows.part(slice(start, end)))
        if d is None:
            continue
        if dh is not None:
            if (parts := shares(end - start, k, shared, processors)) > 1:
                _shared_product(dh[start:end], d, dense, parts)
            else:
                _product(dh[start:end], d, dense, False)
        if dw is not None and start < summed:
            _product(dw, d.t(), h, start > 0)
        if db is not None:
            db += d.sum(0, dtype=torch.float32)
    if again:
        assert dw is not None
        last = out[: end - start]
        rest = dataclasses.replace(rows.part(slice(summed, start)), loss=None)
        for first in range(0, v, AGAIN_COLUMNS):
            columns = slice(first, min(first + AGAIN_COLUMNS, v))
            part = dense[columns]
            d = torch.empty((tokens - summed, len(part)), dtype=dtype, device=hidden.device)
            mine = d[: start - summed]
            a = mine if same else torch.empty_like(mine, dtype=head.logits_dtype)
            _logits_into(a, hidden[summed:start], part, None if bias is None else bias[columns])
            _rows_pass(head, a, mine, labels[summed:start], rest, first, v)
            d[start - summed :].copy_(last[:, columns])
            _product(dw[columns], d.t(), hidden[summed:], summed > 0)
    del space, logits, out
    if dw is not None and not exact:
        assert isinstance(weight, torch.Tensor)
        dw = dw.to(weight.dtype)
    return _Gradients(dh, dw, db)


def _first_sum(
    head: _Head,
    hidden: torch.Tensor,
    dense: torch.Tensor,
    labels: torch.Tensor,
    rows: _Rows,
    lent: _Lent,
    space: torch.Tensor,
    dh: torch.Tensor | None,
    dw: torch.Tensor,
) -> None:
    """Losses of those tokens, their part of dh, and dW of them alone: logits are in dW's memory."""
    (tokens, k), v = hidden.shape, dense.shape[0]
    if rows.loss is None:
        # The forward's logits were another matmul's, maybe rounded otherwise: with their log-sum-exp these
        # would make probabilities whose sum is not 1. So these get their own.
        loss, lse = torch.empty((2, tokens), dtype=torch.float32, device=hidden.device)
        rows = dataclasses.replace(rows, loss=loss, lse=lse)
    memory = dw.view(-1)
    inside, outside = memory[lent.offset :], space
    pieces = [
        _matrix(inside, lent.split, tokens, lent.stride),
        _matrix(outside, v - lent.split, tokens, lent.stride),
    ]
    scratch = memory[: lent.offset].view(torch.float32)
    places = slice(0, lent.split), slice(lent.split, v)
    for place, a in zip(places, pieces, strict=True):
        torch.mm(dense[place], hidden.t(), out=a)
    _columns_pass(head, pieces, labels, rows, scratch)
    if dh is not None:
        for some in (slice(i, i + (lent.sums or tokens)) for i in range(0, tokens, lent.sums or tokens)):
            out = dh[:tokens][some]
            total = out if out.dtype == torch.float32 else scratch[: out.numel()].view(out.shape)
            for place, d in zip(places, pieces, strict=True):
                _product(total, d[:, some].t(), dense[place], place.start > 0)
            if total is not out:
                out.copy_(total)
    for block in lent.blocks(v, k):
        beyond = block.start - lent.split
        d = pieces[0][block] if beyond < 0 else pieces[1][beyond:]
        torch.mm(d, hidden, out=dw[block])


class _LinearCrossEntropy(torch.autograd.Function):
    """(loss, entropy, top1) of rows; entropy and top1 are empty where the head has them not."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        count: torch.Tensor | None,
        head: _Head,
        reference: Any,
    ) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            needs = ctx.needs_input_grad[:3]
            rows, gradients, factor = _forward(head, hidden, weight, bias, labels, count, needs)
        assert rows.loss is not None
        ctx.head, ctx.reference, ctx.gradients, ctx.factor = head, reference, gradients, factor
        ctx.weight = None if isinstance(weight, torch.Tensor) else weight
        dense = weight if isinstance(weight, torch.Tensor) else None
        ctx.save_for_backward(hidden, dense, bias, labels, count, rows.lse, rows.entropy)
        ctx.set_materialize_grads(False)
        loss = rows.loss.view(labels.shape) if count is None else rows.loss.sum() / count
        return loss, *(None if x is None else x.view(labels.shape) for x in (rows.entropy, rows.top1))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        hidden, dense, bias, labels, count, lse, entropy = ctx.saved_tensors
        weight = dense if ctx.weight is None else ctx.weight
        grad, grad_entropy = grads[:2]
        if grad is None and grad_entropy is None:
            return (None,) * 7
        if wants_graph():
            function = functools.partial(_differentiable, ctx.reference, ctx.weight, labels)
            given = [g for g in (grad, grad_entropy) if g is not None]
            wanted = [i for i, g in enumerate((grad, grad_entropy)) if g is not None]
            chosen = functools.partial(function, wanted)
            return *differentiable_gradients(chosen, (hidden, dense, bias), given), *[None] * 4
        needs = ctx.needs_input_grad[:3]
        found, ctx.gradients = ctx.gradients, None
        with torch.autocast(hidden.device.type, enabled=False):
            if found is not None:
                factor, fused = grad * ctx.factor, ctx.head.fused
                dtypes = hidden.dtype, None if dense is None else dense.dtype, torch.float32
                found = [
                    x if x is None or dtype is None else _scale(x, factor, dtype, fused)
                    for x, dtype in zip(found, dtypes, strict=True)
                ]
            else:  # each row has a gradient of its own, or this graph is gone through for another time
                if grad is None:
                    grad = hidden.new_zeros((), dtype=torch.float32)
                each = grad.float() / count if count is not None else grad.float()
                each = each if each.dim() == 0 else each.reshape(-1)
                rows = _Rows(lse=lse, entropy=entropy, grad=each)
                if grad_entropy is not None:
                    rows.grad_entropy = grad_entropy.float().reshape(-1).contiguous()
                found = _pass(ctx.head, hidden, weight, bias, labels, rows, needs)
        dh, dw, db = found
        dh = None if dh is None else dh.view(hidden.shape)
        db = None if db is None else db.to(bias.dtype)
        return dh, dw, db, None, None, None, None


def _forward(
    head: _Head,
    hidden: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    count: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[_Rows, _Gradients | None, torch.Tensor | None]:
    """What each row has; for sum / count also its gradients, but for a factor, and that factor."""
    new = functools.partial(torch.empty, labels.numel(), device=hidden.device)
    rows = _Rows(loss=new(dtype=torch.float32), lse=new(dtype=torch.float32))
    if head.entropy:
        rows.entropy = new(dtype=torch.float32)
    if head.top1:
        rows.top1 = new(dtype=torch.int64)
    factor = None
    if count is None:
        needs = (False,) * 3
    elif any(needs):
        if hidden.dtype == torch.float16:
            # 1 / count = grad * factor; factor is a power of two, so that it rounds nothing.
            mantissa, exponent = torch.frexp(count)
            rows.grad = (0.5 * HALF_SHIFT) / mantissa
            factor = torch.ldexp(torch.full_like(count, 2 / HALF_SHIFT), -exponent)
        else:
            rows.grad, factor = 1 / count, torch.ones_like(count)
    found = _pass(head, hidden, weight, bias, labels, rows, needs, exact=True)
    return rows, found if any(needs) else None, factor


def _differentiable(
    reference: Any,
    packed: FourBit | None,
    labels: torch.Tensor,
    wanted: list[int],
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The outputs `wanted` of a reference, as a function of the saved tensors."""
    dense = packed if weight is None else weight.to(hidden.dtype)
    outputs = reference(hidden, dense, labels, bias=bias)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return tuple(outputs[i] for i in wanted)


def _apply(
    head: _Head,
    hidden: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    count: torch.Tensor | None,
    reference: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if torch.compiler.is_compiling():  # the size of chunks and the kernel's launches are no part of a graph
        run: Any = torch.compiler.disable(_apply)
        arguments = hidden, weight, bias, labels, count
        return run(head, *arguments, reference)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():  # which a Function's needs_input_grad does not tell
        hidden, bias = hidden.detach(), None if bias is None else bias.detach()
        weight = weight.detach() if isinstance(weight, torch.Tensor) else weight
    result: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, count, head, reference
    )
    return result


def _head(
    hidden: torch.Tensor,
    *,
    softcap: float | None,
    scale: float,
    fused: bool,
    temperature: float = 1.0,
    ignore_index: int = NEVER,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy: bool = False,
    top1: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> _Head:
    dtype = logits_dtype or hidden.dtype
    if dtype not in (hidden.dtype, torch.float32):
        raise ValueError(
            f"logits_dtype={dtype}: allowed are None, {hidden.dtype} (the matmul's) and torch.float32"
        )
    outer = (scale if softcap is None else softcap) / temperature
    inner = 0.0 if softcap is None else scale / softcap
    return _Head(
        float(outer),
        float(inner),
        ignore_index,
        float(smoothing),
        float(z_loss),
        entropy,
        top1,
        dtype,
        fused and _fused(hidden),
    )


def _cast(
    hidden: torch.Tensor, weight: Weight, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
    """hidden, bias and the dtype of the matmul, as F.linear takes them under autocast and outside."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), None if bias is None else bias.to(dtype), dtype
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, torch.Tensor) and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} of {tensor.dtype} and hidden of {hidden.dtype}: expected one dtype outside autocast"
            )
    return hidden, bias, hidden.dtype


def _check(
    hidden: torch.Tensor,
    weight: Weight,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> None:
    v, k = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != k or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {(v, k)} and labels {tuple(labels.shape)}: "
            f"expected (..., {k}), ({v}, {k}) and (...)"
        )
    if bias is not None and tuple(bias.shape) != (v,):
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({v},)")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels of {labels.dtype}: expected torch.int64")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap!r}: allowed are None and numbers above 0")


def _check_loss(reduction: str, label_smoothing: float, num_items: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: allowed are {', '.join(map(repr, REDUCTIONS))}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}: allowed is 0 <= label_smoothing <= 1")
    if num_items is not None and reduction != "sum":
        raise ValueError(f"num_items with reduction={reduction!r}: it divides the sum, reduction='sum'")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: Weight,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: int | float | torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    fused: bool = True,
) -> torch.Tensor:
    """Cross-entropy of the logits `hidden @ weight.T + bias`, a chunk of tokens at a time.

    Args:
        hidden: (..., H), any strides; float32, bfloat16 or float16 (float64 goes to the reference). Already
            shifted: row i is scored against labels[i].
        weight: (V, H), in hidden's dtype unless autocast is on, or a FourBit (frozen).
        labels: (...) int64. Rows of `ignore_index` add nothing; a row of another label outside [0, V) is NaN.
        bias: (V,).
        reduction: "mean" over the labels that are not ignored (NaN where there are none), "sum" or "none".
        label_smoothing: as `F.cross_entropy` has it.
        softcap, scale: logits become softcap * tanh(scale * logits / softcap), or scale * logits.
        z_loss: adds z_loss * logsumexp(logits)^2 to the loss of each token.
        num_items: divides the "sum": the labels of all micro-batches of an optimizer step. A number, or a
            tensor of one element (on hidden's device it costs no synchronisation).
        logits_dtype: what logits are rounded to; None for the dtype of the matmul (autocast's, or hidden's),
            torch.float32 to keep the matmul's accumulator. Their gradients have the matmul's dtype anyway.
        fused: False for PyTorch's operators instead of the Triton kernel, on any device.

    Returns:
        float32 (), or (...) for "none". Gradients reach hidden, weight and bias.

    Raises:
        ValueError: for shapes, dtypes and values that are not allowed.
    """
    _check(hidden, weight, labels, bias, softcap)
    _check_loss(reduction, label_smoothing, num_items)
    options: dict[str, Any] = dict(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        scale=scale,
        z_loss=z_loss,
        num_items=num_items,
        logits_dtype=logits_dtype,
    )
    reference: Any = functools.partial(linear_cross_entropy_reference, **options)
    if hidden.dtype == torch.float64 or not hidden.numel():
        return linear_cross_entropy_reference(hidden, weight, labels, bias=bias, **options)
    hidden, bias, _ = _cast(hidden, weight, bias)
    head = _head(
        hidden,
        softcap=softcap,
        scale=scale,
        fused=fused,
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        z_loss=z_loss,
        logits_dtype=logits_dtype,
    )
    count = None
    if reduction == "mean":
        count = (labels != ignore_index).sum().float()
    elif reduction == "sum":
        if isinstance(num_items, torch.Tensor) and num_items.device.type != "cpu":
            count = num_items.detach().reshape(()).to(hidden.device, torch.float32)
        else:
            number = 1.0 if num_items is None else float(num_items)
            count = torch.full((), number, dtype=torch.float32, device=hidden.device)
    return _apply(head, hidden, weight, bias, labels, count, reference)[0]


def linear_log_probs(
    hidden: torch.Tensor,
    weight: Weight,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    top1: bool = False,
    fused: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probabilities of `ids` under softmax(logits / temperature), a chunk of tokens at a time.

    Args:
        hidden, weight, bias, softcap, scale, fused: see `linear_cross_entropy`.
        ids: (...) int64; a row of an id outside [0, V) is NaN.
        temperature: above 0; divides the logits after softcap and scale.
        entropy: also the entropy of each row's distribution, differentiable.
        top1: also the id of each row's largest logit, the first of equals.

    Returns:
        Log-probabilities (...) float32. With `entropy` or `top1` a tuple: log-probabilities, then entropy
        (...) float32, then top-1 ids (...) int64, as far as they were asked for. Gradients reach hidden,
        weight and bias, for any incoming gradient; the backward computes the logits again.

    Raises:
        ValueError: for shapes, dtypes and values that are not allowed.
    """
    _check(hidden, weight, ids, bias, softcap)
    _check_temperature(temperature)
    options: dict[str, Any] = dict(
        temperature=temperature, softcap=softcap, scale=scale, entropy=entropy, top1=top1
    )
    reference: Any = functools.partial(linear_log_probs_reference, **options)
    if hidden.dtype == torch.float64 or not hidden.numel():
        return linear_log_probs_reference(hidden, weight, ids, bias=bias, **options)
    hidden, bias, _ = _cast(hidden, weight, bias)
    head = _head(hidden, fused=fused, **options)
    loss, *others = _apply(head, hidden, weight, bias, ids, None, functools.partial(_negated, reference))
    results = -loss, *(x for x in others if x is not None)
    return results[0] if len(results) == 1 else results


def _negated(reference: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    outputs = reference(*args, **kwargs)
    first, *rest = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return -first, *rest


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: allowed are numbers above 0")


def _logits(
    hidden: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(T, V) in float32 (float64 for float64), with the roundings of a model's own head before that."""
    hidden, bias, computed = _cast(hidden, weight, bias)
    dense = expand_4bit_reference(weight) if isinstance(weight, FourBit) else weight
    dense = dense.to(computed)
    if dtype is not None and computed != torch.float64:
        hidden, dense = hidden.to(dtype), dense.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden, dense, bias).reshape(-1, dense.shape[0])
    if scale != 1:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: Weight,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    num_items: int | float | torch.Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain PyTorch over full logits; float64 for float64."""
    _check(hidden, weight, labels, bias, softcap)
    _check_loss(reduction, label_smoothing, num_items)
    logits = _logits(hidden, weight, bias, softcap, scale, logits_dtype)
    flat = labels.reshape(-1)
    loss = F.cross_entropy(
        logits,
        flat,
        ignore_index=ignore_index,
        reduction="none" if z_loss else reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss:
        kept = flat != ignore_index
        loss = loss + torch.where(kept, z_loss * torch.logsumexp(logits, -1).square(), 0.0)
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / kept.sum()
    if num_items is not None:
        loss = loss / num_items
    return loss.view(labels.shape) if reduction == "none" else loss


def linear_log_probs_reference(
    hidden: torch.Tensor,
    weight: Weight,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    top1: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`linear_log_probs` in plain PyTorch over full logits; float64 for float64."""
    _check(hidden, weight, ids, bias, softcap)
    _check_temperature(temperature)
    logits = _logits(hidden, weight, bias, softcap, scale) / temperature
    logarithms = logits.log_softmax(-1)
    results = [logarithms.gather(1, ids.reshape(-1, 1))[:, 0]]
    if entropy:
        # A probability of 0 adds 0, not 0 * -inf.
        results.append(-torch.where(logarithms.isneginf(), 0.0, logarithms.exp() * logarithms).sum(-1))
    if top1:
        results.append(logits.detach().argmax(-1))
    results = [x.view(ids.shape) for x in results]
    return results[0] if len(results) == 1 else tuple(results)
