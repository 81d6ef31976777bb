"""RMSNorm of queries and keys over the head dim [1, 2], then rotary position embedding [3], in one launch.

For each row x (one head of one token) of q with its weight w, and of k with its own, with an offset o and the
rotation T of rope.py:

    rstd = rsqrt(mean(x^2) + eps)      xhat = x * rstd      y = T(xhat * (w + o))

    h = T'(dy)                         dw = sum over rows of h * xhat
    g = h * (w + o)                    dx = rstd * (g - xhat * mean(g * xhat))

Shapes: q (B, Hq, S, D), k (B, Hk, S, D) for unsqueeze_dim=1, (B, S, H, D) for unsqueeze_dim=2; weights (D,);
cos, sin (B or 1, S, R). bf16, fp16 or fp32 in any mixture; float32 from load to store, so that the normalised
row is not rounded before it is rotated. Only q and k are saved: backward needs their rows anyway, and rstd
comes with them. Bytes that must move, in bf16: 4 * (Hq + Hk) * D a token forward, 6 * (Hq + Hk) * D backward.

[1] Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467
[2] Henry et al., Query-Key Normalization for Transformers, arXiv:2010.04245
[3] Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864
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
    multiprocessors,
    no_gradient,
    rms_norm_reference,
    sum_partials,
)
from sloth_kernels.rope import (
    TILE_ELEMENTS,
    check_rope_arguments,
    head_tiles,
    last_contiguous,
    load_pairs,
    load_raw_pairs,
    load_rest,
    load_rotation,
    needs_reference,
    result_dtype,
    rope_reference,
    rotary_strides,
    store_pairs,
    store_rest,
    tile_rows,
    token_strides,
    warps_for,
)

# Where weight gradients are summed, programs loop over rows; as many are resident at 128 registers a thread.
WARPS_PER_MULTIPROCESSOR = 16
# Elements of q in a tile of the backward, which holds x, its gradient and the sums at once.
BACKWARD_TILE_ELEMENTS = 2048


@triton.jit
def _load_weight(  # type: ignore[no-untyped-def]
    ptr,
    offset,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """weight + offset in the three parts of a row, each (1, columns)."""
    row = tl.zeros((1, 1), tl.int32)
    first, second = load_pairs(ptr, row, row == 0, R, BLOCK_HALF, INTERLEAVED, "evict_last")
    rest = 0.0
    if R < D:
        rest = load_rest(ptr, row, row == 0, R, D, BLOCK_REST, "evict_last") + offset
    return first + offset, second + offset, rest


@triton.jit
def _norm_rotate(  # type: ignore[no-untyped-def]
    y_ptr,
    y_rows,
    live,
    x1,
    x2,
    x_rest,
    w1,
    w2,
    w_rest,
    c1,
    c2,
    t1,
    t2,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True)
    if R < D:
        squares += tl.sum(x_rest * x_rest, axis=1, keep_dims=True)
    rstd = tl.rsqrt(squares / D + eps)
    n1 = x1 * rstd * w1
    n2 = x2 * rstd * w2
    store_pairs(y_ptr, y_rows, live, n1 * c1 + n2 * t1, n2 * c2 + n1 * t2, R, BLOCK_HALF, INTERLEAVED)
    if R < D:
        store_rest(y_ptr, y_rows, live, x_rest * rstd * w_rest, R, D, BLOCK_REST)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    yq_ptr,
    yk_ptr,
    tokens,
    seq_len,
    eps,
    offset,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    yq_stride_b,
    yq_stride_s,
    yq_stride_h,
    yk_stride_b,
    yk_stride_s,
    yk_stride_h,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    REPEAT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    block = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    qb, qs, q_token, qh, q_live = tile_rows(block, tile, tokens, seq_len, HQ, BLOCK_T, BLOCK_HQ)
    kb, ks, k_token, kh, k_live = tile_rows(block, tile, tokens, seq_len, HK, BLOCK_T, BLOCK_HK)
    q_rows = qb * q_stride_b + qs * q_stride_s + qh * q_stride_h
    k_rows = kb * k_stride_b + ks * k_stride_s + kh * k_stride_h
    # As in rope.py: everything that comes from device memory is asked for before anything waits.
    q1, q2 = load_pairs(q_ptr, q_rows, q_live, R, BLOCK_HALF, INTERLEAVED, "")
    k1, k2 = load_pairs(k_ptr, k_rows, k_live, R, BLOCK_HALF, INTERLEAVED, "")
    q_rest = 0.0
    k_rest = 0.0
    if R < D:
        q_rest = load_rest(q_ptr, q_rows, q_live, R, D, BLOCK_REST, "")
        k_rest = load_rest(k_ptr, k_rows, k_live, R, D, BLOCK_REST, "")
    w1, w2, w_rest = _load_weight(q_weight_ptr, offset, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    cos_rows = qb * cos_stride_b + qs * cos_stride_s
    sin_rows = qb * sin_stride_b + qs * sin_stride_s
    c1, c2, t1, t2 = load_rotation(
        cos_ptr, sin_ptr, cos_rows, sin_rows, q_token, R, BLOCK_HALF, INTERLEAVED, REPEAT, False
    )
    y_rows = qb * yq_stride_b + qs * yq_stride_s + qh * yq_stride_h
    _norm_rotate(
        yq_ptr,
        y_rows,
        q_live,
        q1,
        q2,
        q_rest,
        w1,
        w2,
        w_rest,
        c1,
        c2,
        t1,
        t2,
        eps,
        D,
        R,
        INTERLEAVED,
        BLOCK_HALF,
        BLOCK_REST,
    )
    w1, w2, w_rest = _load_weight(k_weight_ptr, offset, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    cos_rows = kb * cos_stride_b + ks * cos_stride_s
    sin_rows = kb * sin_stride_b + ks * sin_stride_s
    c1, c2, t1, t2 = load_rotation(
        cos_ptr, sin_ptr, cos_rows, sin_rows, k_token, R, BLOCK_HALF, INTERLEAVED, REPEAT, False
    )
    y_rows = kb * yk_stride_b + ks * yk_stride_s + kh * yk_stride_h
    _norm_rotate(
        yk_ptr,
        y_rows,
        k_live,
        k1,
        k2,
        k_rest,
        w1,
        w2,
        w_rest,
        c1,
        c2,
        t1,
        t2,
        eps,
        D,
        R,
        INTERLEAVED,
        BLOCK_HALF,
        BLOCK_REST,
    )


@triton.jit
def _row_gradients(  # type: ignore[no-untyped-def]
    dx_ptr,
    dx_rows,
    live,
    x1,
    x2,
    x_rest,
    g1,
    g2,
    g_rest,
    w1,
    w2,
    w_rest,
    c1,
    c2,
    t1,
    t2,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Store dx; return the terms h * xhat of dw in the three parts of a row."""
    h1 = g1 * c1 + g2 * t1
    h2 = g2 * c2 + g1 * t2
    d1 = h1 * w1
    d2 = h2 * w2
    # Two sums that do not wait for each other: mean(g * xhat) is the second one times rstd / D.
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True)
    products = tl.sum(d1 * x1 + d2 * x2, axis=1, keep_dims=True)
    if R < D:
        d_rest = g_rest * w_rest
        squares += tl.sum(x_rest * x_rest, axis=1, keep_dims=True)
        products += tl.sum(d_rest * x_rest, axis=1, keep_dims=True)
    # Rows that do not exist must add 0 to dw, also where eps = 0 makes their rstd infinite.
    rstd = tl.where(live, tl.rsqrt(squares / D + eps), 0.0)
    # In this order rstd**2 is never formed, which would underflow for large x.
    along = products * rstd / D * rstd
    dx1 = rstd * (d1 - x1 * along)
    dx2 = rstd * (d2 - x2 * along)
    store_pairs(dx_ptr, dx_rows, live, dx1, dx2, R, BLOCK_HALF, INTERLEAVED)
    rest_terms = 0.0
    if R < D:
        store_rest(dx_ptr, dx_rows, live, rstd * (d_rest - x_rest * along), R, D, BLOCK_REST)
        rest_terms = g_rest * (x_rest * rstd)
    return h1 * (x1 * rstd), h2 * (x2 * rstd), rest_terms


@triton.jit
def _store_partial(  # type: ignore[no-untyped-def]
    ptr,
    sum1,
    sum2,
    sum_rest,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * D + tl.zeros((1, 1), tl.int64)
    first = tl.sum(sum1, axis=0, keep_dims=True)
    second = tl.sum(sum2, axis=0, keep_dims=True)
    store_pairs(ptr, row, row >= 0, first, second, R, BLOCK_HALF, INTERLEAVED)
    if R < D:
        store_rest(ptr, row, row >= 0, tl.sum(sum_rest, axis=0, keep_dims=True), R, D, BLOCK_REST)


@triton.jit
def _load_raw(  # type: ignore[no-untyped-def]
    ptr,
    rows,
    live,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """The three parts of each row as they are stored."""
    first, second = load_raw_pairs(ptr, rows, live, R, BLOCK_HALF, INTERLEAVED, "")
    rest = first
    if R < D:
        columns = tl.arange(0, BLOCK_REST)[None, :]
        rest = tl.load(ptr + rows + columns + R, mask=live & (columns < D - R), other=0.0)
    return first, second, rest


@triton.jit
def _float32(parts):  # type: ignore[no-untyped-def]
    first, second, rest = parts
    return first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _load_tiles(  # type: ignore[no-untyped-def]
    q_ptr,
    gq_ptr,
    k_ptr,
    gk_ptr,
    work,
    tokens,
    seq_len,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    gq_stride_b,
    gq_stride_s,
    gq_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    gk_stride_b,
    gk_stride_s,
    gk_stride_h,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """q, its gradient, k and its gradient of one tile, as they are stored."""
    block = work // TILES
    tile = work % TILES
    b, s, _, h, live = tile_rows(block, tile, tokens, seq_len, HQ, BLOCK_T, BLOCK_HQ)
    rows = b * q_stride_b + s * q_stride_s + h * q_stride_h
    q = _load_raw(q_ptr, rows, live, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    rows = b * gq_stride_b + s * gq_stride_s + h * gq_stride_h
    gq = _load_raw(gq_ptr, rows, live, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    b, s, _, h, live = tile_rows(block, tile, tokens, seq_len, HK, BLOCK_T, BLOCK_HK)
    rows = b * k_stride_b + s * k_stride_s + h * k_stride_h
    k = _load_raw(k_ptr, rows, live, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    rows = b * gk_stride_b + s * gk_stride_s + h * gk_stride_h
    gk = _load_raw(gk_ptr, rows, live, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    return q, gq, k, gk


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    gq_ptr,
    gk_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dq_ptr,
    dk_ptr,
    q_partial_ptr,
    k_partial_ptr,
    tokens,
    seq_len,
    eps,
    offset,
    gq_stride_b,
    gq_stride_s,
    gq_stride_h,
    gk_stride_b,
    gk_stride_s,
    gk_stride_h,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    dq_stride_b,
    dq_stride_s,
    dq_stride_h,
    dk_stride_b,
    dk_stride_s,
    dk_stride_h,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    REPEAT: tl.constexpr,
    Q_WEIGHT_GRAD: tl.constexpr,
    K_WEIGHT_GRAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HQ: tl.constexpr,
    BLOCK_HK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # One sum for every row of the tile, folded at the end: no exchange between threads in the loop.
    if Q_WEIGHT_GRAD:
        q_sum1 = tl.zeros((BLOCK_T * BLOCK_HQ, BLOCK_HALF), tl.float32)
        q_sum2 = tl.zeros((BLOCK_T * BLOCK_HQ, BLOCK_HALF), tl.float32)
        q_sum_rest = tl.zeros((BLOCK_T * BLOCK_HQ, BLOCK_REST), tl.float32)
    if K_WEIGHT_GRAD:
        k_sum1 = tl.zeros((BLOCK_T * BLOCK_HK, BLOCK_HALF), tl.float32)
        k_sum2 = tl.zeros((BLOCK_T * BLOCK_HK, BLOCK_HALF), tl.float32)
        k_sum_rest = tl.zeros((BLOCK_T * BLOCK_HK, BLOCK_REST), tl.float32)
    if PREFETCH:
        # A loop of few programs hides nothing by itself: the next tile's loads go out before this one's use.
        q_raw, gq_raw, k_raw, gk_raw = _load_tiles(
            q_ptr,
            gq_ptr,
            k_ptr,
            gk_ptr,
            tl.program_id(0),
            tokens,
            seq_len,
            q_stride_b,
            q_stride_s,
            q_stride_h,
            gq_stride_b,
            gq_stride_s,
            gq_stride_h,
            k_stride_b,
            k_stride_s,
            k_stride_h,
            gk_stride_b,
            gk_stride_s,
            gk_stride_h,
            HQ,
            HK,
            D,
            R,
            INTERLEAVED,
            TILES,
            BLOCK_T,
            BLOCK_HQ,
            BLOCK_HK,
            BLOCK_HALF,
            BLOCK_REST,
        )
    for work in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T) * TILES, tl.num_programs(0)):
        block = work // TILES
        tile = work % TILES
        qb, qs, q_token, qh, q_live = tile_rows(block, tile, tokens, seq_len, HQ, BLOCK_T, BLOCK_HQ)
        kb, ks, k_token, kh, k_live = tile_rows(block, tile, tokens, seq_len, HK, BLOCK_T, BLOCK_HK)
        if PREFETCH:
            q1, q2, q_rest = _float32(q_raw)
            gq1, gq2, gq_rest = _float32(gq_raw)
            k1, k2, k_rest = _float32(k_raw)
            gk1, gk2, gk_rest = _float32(gk_raw)
        # Past the last tile every row is masked.
        q_raw, gq_raw, k_raw, gk_raw = _load_tiles(
            q_ptr,
            gq_ptr,
            k_ptr,
            gk_ptr,
            work + tl.num_programs(0) if PREFETCH else work,
            tokens,
            seq_len,
            q_stride_b,
            q_stride_s,
            q_stride_h,
            gq_stride_b,
            gq_stride_s,
            gq_stride_h,
            k_stride_b,
            k_stride_s,
            k_stride_h,
            gk_stride_b,
            gk_stride_s,
            gk_stride_h,
            HQ,
            HK,
            D,
            R,
            INTERLEAVED,
            TILES,
            BLOCK_T,
            BLOCK_HQ,
            BLOCK_HK,
            BLOCK_HALF,
            BLOCK_REST,
        )
        if not PREFETCH:
            q1, q2, q_rest = _float32(q_raw)
            gq1, gq2, gq_rest = _float32(gq_raw)
            k1, k2, k_rest = _float32(k_raw)
            gk1, gk2, gk_rest = _float32(gk_raw)
        w1, w2, w_rest = _load_weight(q_weight_ptr, offset, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
        cos_rows = qb * cos_stride_b + qs * cos_stride_s
        sin_rows = qb * sin_stride_b + qs * sin_stride_s
        c1, c2, t1, t2 = load_rotation(
            cos_ptr, sin_ptr, cos_rows, sin_rows, q_token, R, BLOCK_HALF, INTERLEAVED, REPEAT, True
        )
        dx_rows = qb * dq_stride_b + qs * dq_stride_s + qh * dq_stride_h
        terms1, terms2, terms_rest = _row_gradients(
            dq_ptr,
            dx_rows,
            q_live,
            q1,
            q2,
            q_rest,
            gq1,
            gq2,
            gq_rest,
            w1,
            w2,
            w_rest,
            c1,
            c2,
            t1,
            t2,
            eps,
            D,
            R,
            INTERLEAVED,
            BLOCK_HALF,
            BLOCK_REST,
        )
        if Q_WEIGHT_GRAD:
            q_sum1 += terms1
            q_sum2 += terms2
            if R < D:
                q_sum_rest += terms_rest
        w1, w2, w_rest = _load_weight(k_weight_ptr, offset, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
        cos_rows = kb * cos_stride_b + ks * cos_stride_s
        sin_rows = kb * sin_stride_b + ks * sin_stride_s
        c1, c2, t1, t2 = load_rotation(
            cos_ptr, sin_ptr, cos_rows, sin_rows, k_token, R, BLOCK_HALF, INTERLEAVED, REPEAT, True
        )
        dx_rows = kb * dk_stride_b + ks * dk_stride_s + kh * dk_stride_h
        terms1, terms2, terms_rest = _row_gradients(
            dk_ptr,
            dx_rows,
            k_live,
            k1,
            k2,
            k_rest,
            gk1,
            gk2,
            gk_rest,
            w1,
            w2,
            w_rest,
            c1,
            c2,
            t1,
            t2,
            eps,
            D,
            R,
            INTERLEAVED,
            BLOCK_HALF,
            BLOCK_REST,
        )
        if K_WEIGHT_GRAD:
            k_sum1 += terms1
            k_sum2 += terms2
            if R < D:
                k_sum_rest += terms_rest
    if Q_WEIGHT_GRAD:
        _store_partial(q_partial_ptr, q_sum1, q_sum2, q_sum_rest, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    if K_WEIGHT_GRAD:
        _store_partial(k_partial_ptr, k_sum1, k_sum2, k_sum_rest, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)


def _shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
    strided_tokens: bool,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[int, int, dict[str, int], dict[str, int | bool]]:
    """(tokens, sequence length, tile sizes, all constexpr arguments that both kernels take)."""
    seq_len = q.shape[3 - unsqueeze_dim]
    tokens = q.shape[0] * seq_len
    q_heads, k_heads, dim, rotary = q.shape[unsqueeze_dim], k.shape[unsqueeze_dim], q.shape[3], cos.shape[2]
    tiles = head_tiles(
        max(tokens, 1), q_heads, k_heads, dim, rotary, strided_tokens and q_heads > 1, tile_elements
    )
    constants: dict[str, int | bool] = {
        "HQ": q_heads,
        "HK": k_heads,
        "D": dim,
        "R": rotary,
        "INTERLEAVED": layout != "half",
        "REPEAT": layout == "interleaved_repeat",
        **tiles,
    }
    return tokens, seq_len, tiles, constants


def qk_norm_rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    layout: str,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch norm and rotation of q and k, to q_dtype and k_dtype, in the inputs' memory order."""
    q, k, q_weight, k_weight, cos, sin = (last_contiguous(x) for x in (q, k, q_weight, k_weight, cos, sin))
    q_out, k_out = torch.empty_like(q, dtype=q_dtype), torch.empty_like(k, dtype=k_dtype)
    strides = [token_strides(x, unsqueeze_dim) for x in (q, k, q_out, k_out)]
    tokens, seq_len, tiles, constants = _shapes(
        q, k, cos, layout, unsqueeze_dim, any(s < h for _, s, h in strides[::2])
    )
    if tokens:
        launch(
            _forward_kernel,
            (-(-tokens // tiles["BLOCK_T"]) * tiles["TILES"],),
            q,
            k,
            q_weight,
            k_weight,
            cos,
            sin,
            q_out,
            k_out,
            tokens,
            seq_len,
            eps,
            offset,
            *strides[0],
            *strides[1],
            *rotary_strides(cos),
            *rotary_strides(sin),
            *strides[2],
            *strides[3],
            num_warps=warps_for(tiles, 32),
            **constants,
        )
    return q_out, k_out


def _fwd_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    layout: str,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(last_contiguous(q), dtype=q_dtype),
        torch.empty_like(last_contiguous(k), dtype=k_dtype),
    )


def qk_norm_rope_bwd(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    layout: str,
    unsqueeze_dim: int,
    q_weight_grad: bool,
    k_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch (dq, dk, dq_weight, dk_weight); a weight gradient that is not asked for is an empty tensor."""
    grad_q, grad_k, q, k = (last_contiguous(x) for x in (grad_q, grad_k, q, k))
    q_weight, k_weight, cos, sin = (last_contiguous(x) for x in (q_weight, k_weight, cos, sin))
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    strides = [token_strides(x, unsqueeze_dim) for x in (grad_q, grad_k, q, k, dq, dk)]
    tokens, seq_len, tiles, constants = _shapes(
        q, k, cos, layout, unsqueeze_dim, any(s < h for _, s, h in strides[::2]), BACKWARD_TILE_ELEMENTS
    )
    # Half the elements a thread of the forward: x, its gradient and the sums are live at once.
    num_warps = warps_for(tiles, 16)
    programs = work = -(-tokens // tiles["BLOCK_T"]) * tiles["TILES"]
    if q_weight_grad or k_weight_grad:
        programs = min(work, WARPS_PER_MULTIPROCESSOR // num_warps * multiprocessors(q.device))
    dim = q.shape[3]
    wanted = (q_weight_grad, k_weight_grad)
    partial = torch.empty(
        (sum(wanted), programs, dim) if any(wanted) else (0,), dtype=torch.float32, device=q.device
    )
    parts = iter(partial)
    partials = [next(parts) if each else None for each in wanted]
    if tokens:
        launch(
            _backward_kernel,
            (programs,),
            grad_q,
            grad_k,
            q,
            k,
            q_weight,
            k_weight,
            cos,
            sin,
            dq,
            dk,
            *partials,
            tokens,
            seq_len,
            eps,
            offset,
            *strides[0],
            *strides[1],
            *strides[2],
            *strides[3],
            *rotary_strides(cos),
            *rotary_strides(sin),
            *strides[4],
            *strides[5],
            Q_WEIGHT_GRAD=q_weight_grad,
            K_WEIGHT_GRAD=k_weight_grad,
            PREFETCH=any(wanted),
            num_warps=num_warps,
            **constants,
        )
    weights = (q_weight, k_weight)
    dtypes = [weight.dtype if each else None for weight, each in zip(weights, wanted, strict=True)]
    if not any(wanted):
        return dq, dk, no_gradient(q_weight), no_gradient(k_weight)
    if not tokens:
        zeros = [
            torch.zeros_like(w) if each else no_gradient(w) for w, each in zip(weights, wanted, strict=True)
        ]
        return dq, dk, zeros[0], zeros[1]
    dq_weight, dk_weight = sum_partials(partial, dtypes, q_weight)
    return dq, dk, dq_weight, dk_weight


def _bwd_fake(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    layout: str,
    unsqueeze_dim: int,
    q_weight_grad: bool,
    k_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(last_contiguous(q)),
        torch.empty_like(last_contiguous(k)),
        q_weight.new_empty(q.shape[3] if q_weight_grad else 0),
        k_weight.new_empty(q.shape[3] if k_weight_grad else 0),
    )


register_op(
    "qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " float eps, float offset, str layout, int unsqueeze_dim, ScalarType q_dtype, ScalarType k_dtype)"
    " -> (Tensor, Tensor)",
    qk_norm_rope_fwd,
    _fwd_fake,
)
register_op(
    "qk_norm_rope_bwd(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight,"
    " Tensor cos, Tensor sin, float eps, float offset, str layout, int unsqueeze_dim, bool q_weight_grad,"
    " bool k_weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    qk_norm_rope_bwd,
    _bwd_fake,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        offset: float,
        layout: str,
        unsqueeze_dim: int,
        q_dtype: torch.dtype,
        k_dtype: torch.dtype,
    ) -> Any:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.arguments = (eps, offset, layout, unsqueeze_dim)
        return run_op(
            torch.ops.sloth.qk_norm_rope_fwd,
            qk_norm_rope_fwd,
            q,
            k,
            q_weight,
            k_weight,
            cos,
            sin,
            eps,
            offset,
            layout,
            unsqueeze_dim,
            q_dtype,
            k_dtype,
        )

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> Any:
        _, _, need_q_weight, need_k_weight, *_ = ctx.needs_input_grad
        if wants_graph():
            eps, offset, layout, unsqueeze_dim = ctx.arguments
            reference = functools.partial(
                qk_norm_rope_reference, eps=eps, offset=offset, layout=layout, unsqueeze_dim=unsqueeze_dim
            )
            gradients = differentiable_gradients(reference, ctx.saved_tensors, [grad_q, grad_k])
            return *gradients, *(None,) * 6
        dq, dk, dq_weight, dk_weight = run_op(
            torch.ops.sloth.qk_norm_rope_bwd,
            qk_norm_rope_bwd,
            grad_q,
            grad_k,
            *ctx.saved_tensors,
            *ctx.arguments,
            need_q_weight,
            need_k_weight,
        )
        return (
            dq,
            dk,
            dq_weight if need_q_weight else None,
            dk_weight if need_k_weight else None,
            *(None,) * 8,
        )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
) -> None:
    check_rope_arguments(q, k, cos, sin, layout, unsqueeze_dim)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[3:]:
            raise ValueError(f"{name} {tuple(weight.shape)}: expected ({q.shape[3]},), the last dim of q")


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    layout: str = "half",
    unsqueeze_dim: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of every head of queries and keys, then rope(); one launch forward and one backward.

    Weight gradients are computed only for weights that require them, summed in a fixed order in float32.

    Args:
        q, k, cos, sin, layout, unsqueeze_dim, out_dtype: as for `rope`.
        q_weight, k_weight: (D,), float32, bfloat16 or float16.
        eps: added to the mean of squares.
        offset: added to the weights in float32: 1 for Gemma's zero-centred weights.
        cast_before_weight: eager's order of roundings. Here it decides only the dtype of the result: that of
            the norm is promote_types(x.dtype, weight.dtype) if true, else x.dtype; then cos promotes it.

    Returns:
        q and k, normalised and rotated, in the memory order of q and k.

    Raises:
        ValueError: for another layout, unsqueeze_dim or shape.
    """
    _check(q, k, q_weight, k_weight, cos, sin, layout, unsqueeze_dim)
    if needs_reference(cos, sin, q, k, q_weight, k_weight):
        return qk_norm_rope_reference(
            q,
            k,
            q_weight,
            k_weight,
            cos,
            sin,
            eps=eps,
            offset=offset,
            cast_before_weight=cast_before_weight,
            layout=layout,
            unsqueeze_dim=unsqueeze_dim,
            out_dtype=out_dtype,
        )
    q_dtype, k_dtype = (
        result_dtype(
            torch.promote_types(x.dtype, weight.dtype) if cast_before_weight else x.dtype, cos, sin, out_dtype
        )
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    q_out, k_out = _QKNormRope.apply(
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        float(eps),
        float(offset),
        layout,
        unsqueeze_dim,
        q_dtype,
        k_dtype,
    )
    return q_out, k_out


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    layout: str = "half",
    unsqueeze_dim: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`qk_norm_rope` in plain PyTorch: `rms_norm_reference` of q and of k, then `rope_reference`."""
    _check(q, k, q_weight, k_weight, cos, sin, layout, unsqueeze_dim)
    q, k = (
        rms_norm_reference(x, weight, eps=eps, offset=offset, cast_before_weight=cast_before_weight)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return rope_reference(q, k, cos, sin, layout=layout, unsqueeze_dim=unsqueeze_dim, out_dtype=out_dtype)
