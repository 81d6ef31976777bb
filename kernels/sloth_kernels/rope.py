"""Rotary position embedding of queries and keys, both in one launch [1].

With c and s the cosine and sine of a token's position (R columns, R <= D) and a pair (a, b) of columns of x,

    y[a] = x[a] * c[a] - x[b] * s[a]          dx[a] = dy[a] * c[a] + dy[b] * s[b]
    y[b] = x[b] * c[b] + x[a] * s[b]          dx[b] = dy[b] * c[b] - dy[a] * s[a]

and y = x, dx = dy in the columns R..D. Layouts differ in which columns pair up, and which columns of c and s
they read:

    "half"                pairs (j, j + R/2), c[j] and c[j + R/2]         Llama, Qwen, Mistral, Gemma
    "interleaved"         pairs (2j, 2j + 1), c[2j] and c[2j + 1]         Cohere
    "interleaved_repeat"  pairs (2j, 2j + 1), c[j] for both              GLM-4

Shapes: q (B, Hq, S, D), k (B, Hk, S, D) for unsqueeze_dim=1, (B, S, H, D) for unsqueeze_dim=2; cos, sin
(B or 1, S, R). bf16, fp16 or fp32 in any mixture; arithmetic in float32, one rounding. Only cos and sin are
saved. Bytes that must move, in bf16: 4 * (Hq + Hk) * D a token, forward and backward alike.

[1] Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch

from sloth_kernels._library import (
    Launcher,
    differentiable_gradients,
    register_op,
    run_op,
    tl,
    triton,
    wants_graph,
)

LAYOUTS = ("half", "interleaved", "interleaved_repeat")
# Elements of q that a program holds at a time: 4 warps x 32 a thread, four 16-byte loads of bf16 in flight.
TILE_ELEMENTS = 4096
# Below this many programs a launch leaves multiprocessors idle, so tokens are spread thinner.
MIN_PROGRAMS = 1056


# A tile is (rows, columns); a row is one head of one token. Its R rotary columns are held as two tiles, the
# first and the second member of each pair: with that the rotation is elementwise in every layout.


@triton.jit
def load_raw_pairs(  # type: ignore[no-untyped-def]
    ptr,
    rows,
    mask,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Both members of each pair as stored, 0 where masked; `rows` (n, 1): element offsets of the rows."""
    if INTERLEAVED:
        # Whole rows are loaded and split in registers: loads of every second element would not be vectorised.
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        inside = mask & (columns < R)
        x = tl.load(ptr + rows + columns, mask=inside, other=0.0, eviction_policy=POLICY)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK_HALF, 2)))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        inside = mask & (columns < R // 2)
        at = ptr + rows + columns
        first = tl.load(at, mask=inside, other=0.0, eviction_policy=POLICY)
        second = tl.load(at + R // 2, mask=inside, other=0.0, eviction_policy=POLICY)
    return first, second


@triton.jit
def load_pairs(  # type: ignore[no-untyped-def]
    ptr,
    rows,
    mask,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POLICY: tl.constexpr,
):
    """load_raw_pairs in float32."""
    first, second = load_raw_pairs(ptr, rows, mask, R, BLOCK_HALF, INTERLEAVED, POLICY)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(  # type: ignore[no-untyped-def]
    ptr, rows, mask, first, second, R: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        joined = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK_HALF))
        tl.store(ptr + rows + columns, joined.to(ptr.dtype.element_ty), mask=mask & (columns < R))
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        inside = mask & (columns < R // 2)
        at = ptr + rows + columns
        tl.store(at, first.to(ptr.dtype.element_ty), mask=inside)
        tl.store(at + R // 2, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_rest(  # type: ignore[no-untyped-def]
    ptr, rows, mask, R: tl.constexpr, D: tl.constexpr, BLOCK_REST: tl.constexpr, POLICY: tl.constexpr
):
    """The columns R..D that are not rotated, in float32, 0 where masked."""
    columns = tl.arange(0, BLOCK_REST)[None, :]
    inside = mask & (columns < D - R)
    return tl.load(ptr + rows + columns + R, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def store_rest(  # type: ignore[no-untyped-def]
    ptr, rows, mask, rest, R: tl.constexpr, D: tl.constexpr, BLOCK_REST: tl.constexpr
):
    columns = tl.arange(0, BLOCK_REST)[None, :]
    tl.store(ptr + rows + columns + R, rest.to(ptr.dtype.element_ty), mask=mask & (columns < D - R))


@triton.jit
def load_rotation(  # type: ignore[no-untyped-def]
    cos_ptr,
    sin_ptr,
    cos_rows,
    sin_rows,
    mask,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    REPEAT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """(c1, c2, t1, t2) such that the pair (x1, x2) turns into (x1*c1 + x2*t1, x2*c2 + x1*t2)."""
    if REPEAT:
        columns = tl.arange(0, BLOCK_HALF)[None, :]
        inside = mask & (columns < R // 2)
        c1 = tl.load(cos_ptr + cos_rows + columns, mask=inside, other=0.0).to(tl.float32)
        s1 = tl.load(sin_ptr + sin_rows + columns, mask=inside, other=0.0).to(tl.float32)
        c2 = c1
        s2 = s1
    else:
        c1, c2 = load_pairs(cos_ptr, cos_rows, mask, R, BLOCK_HALF, INTERLEAVED, "evict_last")
        s1, s2 = load_pairs(sin_ptr, sin_rows, mask, R, BLOCK_HALF, INTERLEAVED, "evict_last")
    if BACKWARD:
        t1 = s2
        t2 = -s1
    else:
        t1 = -s1
        t2 = s2
    return c1, c2, t1, t2


@triton.jit
def tile_rows(  # type: ignore[no-untyped-def]
    block, tile, tokens, seq_len, H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):
    """(batch, position, token mask, head, row mask) of a tile's rows, each (rows, 1).

    The first three are (1, 1) where BLOCK_T is 1, so that cos and sin are loaded once for all heads. For
    several tokens each row loads its own, from L1: a broadcast over heads would go through shared memory.
    """
    row = tl.arange(0, BLOCK_T * BLOCK_H)[:, None]
    if BLOCK_T == 1:
        token = block + tl.zeros((1, 1), tl.int32)
        head = tile * BLOCK_H + row
    else:
        token = block * BLOCK_T + row // BLOCK_H
        head = tile * BLOCK_H + row % BLOCK_H
    # Divided while 32 bits wide, which is several times cheaper; 64 bits wide before strides multiply it.
    batch = (token // seq_len).to(tl.int64)
    position = (token % seq_len).to(tl.int64)
    return batch, position, token < tokens, head.to(tl.int64), (token < tokens) & (head < H)


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    yq_ptr,
    yk_ptr,
    tokens,
    seq_len,
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
    BACKWARD: tl.constexpr,
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
    # All loads of q and k come before the first use, and before cos and sin, which come from a cache and may
    # pass through shared memory: what is issued after that barrier would wait for it.
    q1, q2 = load_pairs(q_ptr, q_rows, q_live, R, BLOCK_HALF, INTERLEAVED, "")
    k1, k2 = load_pairs(k_ptr, k_rows, k_live, R, BLOCK_HALF, INTERLEAVED, "")
    if R < D:
        q_rest = load_rest(q_ptr, q_rows, q_live, R, D, BLOCK_REST, "")
        k_rest = load_rest(k_ptr, k_rows, k_live, R, D, BLOCK_REST, "")
    cos_rows = qb * cos_stride_b + qs * cos_stride_s
    sin_rows = qb * sin_stride_b + qs * sin_stride_s
    c1, c2, t1, t2 = load_rotation(
        cos_ptr, sin_ptr, cos_rows, sin_rows, q_token, R, BLOCK_HALF, INTERLEAVED, REPEAT, BACKWARD
    )
    yq_rows = qb * yq_stride_b + qs * yq_stride_s + qh * yq_stride_h
    store_pairs(yq_ptr, yq_rows, q_live, q1 * c1 + q2 * t1, q2 * c2 + q1 * t2, R, BLOCK_HALF, INTERLEAVED)
    cos_rows = kb * cos_stride_b + ks * cos_stride_s
    sin_rows = kb * sin_stride_b + ks * sin_stride_s
    c1, c2, t1, t2 = load_rotation(
        cos_ptr, sin_ptr, cos_rows, sin_rows, k_token, R, BLOCK_HALF, INTERLEAVED, REPEAT, BACKWARD
    )
    yk_rows = kb * yk_stride_b + ks * yk_stride_s + kh * yk_stride_h
    store_pairs(yk_ptr, yk_rows, k_live, k1 * c1 + k2 * t1, k2 * c2 + k1 * t2, R, BLOCK_HALF, INTERLEAVED)
    if R < D:
        store_rest(yq_ptr, yq_rows, q_live, q_rest, R, D, BLOCK_REST)
        store_rest(yk_ptr, yk_rows, k_live, k_rest, R, D, BLOCK_REST)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dim is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_strides(x: torch.Tensor, unsqueeze_dim: int) -> tuple[int, int, int]:
    """Strides of (batch, position, head)."""
    strides = x.stride()
    return strides[0], strides[3 - unsqueeze_dim], strides[unsqueeze_dim]


@functools.lru_cache(maxsize=4096)
def head_tiles(
    tokens: int,
    q_heads: int,
    k_heads: int,
    dim: int,
    rotary: int,
    strided_tokens: bool,
    tile_elements: int = TILE_ELEMENTS,
) -> dict[str, int]:
    """Tile sizes: BLOCK_T tokens x (BLOCK_HQ + BLOCK_HK) heads, in TILES programs that share all heads.

    strided_tokens: (B, H, S, D) memory, where a head's neighbouring tokens adjoin and heads lie far apart.
    """
    block_half = next_power_of_2(rotary // 2)
    # 1 instead of 0, which is no shape; nothing uses it then.
    block_rest = next_power_of_2(dim - rotary) if rotary < dim else 1
    width = 2 * block_half + block_rest * (rotary < dim)
    # Rounded down to a power of two.
    fitting_heads = 1 << max(0, (tile_elements // width).bit_length() - 1)
    heads = max(q_heads, k_heads)
    block_t = 4 if strided_tokens and fitting_heads >= 8 else 1
    limit = fitting_heads // block_t
    if next_power_of_2(heads) <= limit:
        block_h = next_power_of_2(heads)
    else:
        # Odd head counts (40, 14): the block that leaves fewest lanes idle, the larger one on a tie.
        block_h = min(
            (b for b in (limit, limit // 2, limit // 4) if b), key=lambda b: (-(-heads // b) * b, -b)
        )
    tiles = -(-heads // block_h)
    while block_t * block_h * 2 <= fitting_heads and tokens // (2 * block_t) >= MIN_PROGRAMS:
        block_t *= 2
    return {
        "TILES": tiles,
        "BLOCK_T": block_t,
        "BLOCK_HQ": next_power_of_2(-(-q_heads // tiles)),
        "BLOCK_HK": next_power_of_2(-(-k_heads // tiles)),
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
    }


def warps_for(tiles: dict[str, int], elements_per_thread: int) -> int:
    """Warps such that a thread holds about that many elements of the larger of the q and k tiles."""
    heads = max(tiles["BLOCK_HQ"], tiles["BLOCK_HK"])
    rest = tiles["BLOCK_REST"] if tiles["BLOCK_REST"] > 1 else 0
    elements = tiles["BLOCK_T"] * heads * (2 * tiles["BLOCK_HALF"] + rest)
    return min(16, next_power_of_2(-(-elements // (32 * elements_per_thread))))


def rotary_strides(x: torch.Tensor) -> tuple[int, int]:
    """(batch, position) strides of cos or sin, 0 for a batch of one that serves all."""
    return (0 if x.shape[0] == 1 else x.stride(0)), x.stride(1)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
    backward: bool,
) -> None:
    batch, seq_len = q.shape[0], q.shape[3 - unsqueeze_dim]
    tokens = batch * seq_len
    if tokens == 0:
        return
    assert tokens < 2**31, "token indices are 32-bit"
    strides = [token_strides(x, unsqueeze_dim) for x in (q, k, q_out, k_out)]
    heads = q.shape[unsqueeze_dim], k.shape[unsqueeze_dim]
    strided_tokens = any(s < h for _, s, h in (strides[0], strides[2])) and heads[0] > 1
    grid, launcher = _rotation(
        *(tokens, *heads, q.shape[3], cos.shape[2]),
        *(strided_tokens, layout, backward),
    )
    scalars = (
        *(tokens, seq_len, *strides[0], *strides[1]),
        *(*rotary_strides(cos), *rotary_strides(sin), *strides[2], *strides[3]),
    )
    launcher(grid, (q, k, cos, sin, q_out, k_out), scalars)


@functools.lru_cache(maxsize=4096)
def _rotation(
    tokens: int,
    q_heads: int,
    k_heads: int,
    dim: int,
    rotary: int,
    strided_tokens: bool,
    layout: str,
    backward: bool,
) -> tuple[tuple[int, int, int], Launcher]:
    """(the grid, the kernel)."""
    tiles = head_tiles(tokens, q_heads, k_heads, dim, rotary, strided_tokens)
    launcher = Launcher(
        _rope_kernel,
        HQ=q_heads,
        HK=k_heads,
        D=dim,
        R=rotary,
        INTERLEAVED=layout != "half",
        REPEAT=layout == "interleaved_repeat",
        BACKWARD=backward,
        num_warps=warps_for(tiles, 32),
        **tiles,
    )
    return (-(-tokens // tiles["BLOCK_T"]) * tiles["TILES"], 1, 1), launcher


def result_dtype(
    x_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, out_dtype: torch.dtype | None
) -> torch.dtype:
    """What eager's x * cos + rotate_half(x) * sin gives, unless out_dtype says otherwise."""
    if out_dtype is not None:
        return out_dtype
    return torch.promote_types(torch.promote_types(x_dtype, cos.dtype), sin.dtype)


def rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the rotation of q and k; the outputs have the inputs' memory order."""
    q, k, cos, sin = (last_contiguous(x) for x in (q, k, cos, sin))
    q_out, k_out = _rope_fwd_fake(q, k, cos, sin, layout, unsqueeze_dim, out_dtype)
    _launch(q, k, cos, sin, q_out, k_out, layout, unsqueeze_dim, False)
    return q_out, k_out


def _rope_fwd_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # empty_like keeps strides of dense tensors, and the order of dims in memory of slices.
    q, k = last_contiguous(q), last_contiguous(k)
    return (
        torch.empty_like(q, dtype=result_dtype(q.dtype, cos, sin, out_dtype)),
        torch.empty_like(k, dtype=result_dtype(k.dtype, cos, sin, out_dtype)),
    )


def rope_bwd(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    q_strides: list[int],
    k_strides: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the rotation back; dq and dk get the strides asked for, whatever those of grad_q and grad_k."""
    grad_q, grad_k, cos, sin = (last_contiguous(x) for x in (grad_q, grad_k, cos, sin))
    dq, dk = _rope_bwd_fake(
        grad_q, grad_k, cos, sin, layout, unsqueeze_dim, q_dtype, k_dtype, q_strides, k_strides
    )
    _launch(grad_q, grad_k, cos, sin, dq, dk, layout, unsqueeze_dim, True)
    return dq, dk


def _rope_bwd_fake(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    unsqueeze_dim: int,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    q_strides: list[int],
    k_strides: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_strided(grad_q.shape, q_strides, dtype=q_dtype, device=grad_q.device),
        torch.empty_strided(grad_k.shape, k_strides, dtype=k_dtype, device=grad_k.device),
    )


register_op(
    "rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, str layout, int unsqueeze_dim,"
    " ScalarType? out_dtype) -> (Tensor, Tensor)",
    rope_fwd,
    _rope_fwd_fake,
)
register_op(
    "rope_bwd(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, str layout, int unsqueeze_dim,"
    " ScalarType q_dtype, ScalarType k_dtype, SymInt[] q_strides, SymInt[] k_strides) -> (Tensor, Tensor)",
    rope_bwd,
    _rope_bwd_fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: str,
        unsqueeze_dim: int,
        out_dtype: torch.dtype | None,
    ) -> Any:
        q_out, k_out = run_op(
            torch.ops.sloth.rope_fwd, rope_fwd, q, k, cos, sin, layout, unsqueeze_dim, out_dtype
        )
        ctx.save_for_backward(cos, sin)
        # dq in the memory order of q: the projection's backward then takes it as a matrix without a copy.
        ctx.arguments = (layout, unsqueeze_dim, q.dtype, k.dtype, q_out.stride(), k_out.stride())
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        if wants_graph():
            # Linear in q and k: their values play no part, so zeros stand for them.
            layout, unsqueeze_dim, q_dtype, k_dtype, *_ = ctx.arguments
            q = torch.zeros_like(grad_q, dtype=q_dtype, requires_grad=True)
            k = torch.zeros_like(grad_k, dtype=k_dtype, requires_grad=True)
            reference = functools.partial(rope_reference, layout=layout, unsqueeze_dim=unsqueeze_dim)
            gradients = differentiable_gradients(reference, (q, k, cos, sin), [grad_q, grad_k])
            return *gradients, None, None, None
        dq, dk = run_op(torch.ops.sloth.rope_bwd, rope_bwd, grad_q, grad_k, cos, sin, *ctx.arguments)
        return dq, dk, None, None, None, None, None


def check_rope_arguments(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, unsqueeze_dim: int
) -> None:
    """Raise ValueError for arguments that rope() cannot take."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: allowed are {', '.join(map(repr, LAYOUTS))}")
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim {unsqueeze_dim!r}: allowed are 1 (B, H, S, D) and 2 (B, S, H, D)")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have 4 dims")
    batch, seq_len, dim = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[3]) != (batch, seq_len, dim):
        raise ValueError(f"k {tuple(k.shape)} may differ from q {tuple(q.shape)} only in the number of heads")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] != seq_len or x.shape != cos.shape:
            raise ValueError(
                f"{name} {tuple(x.shape)}: expected ({batch} or 1, {seq_len}, R), the same for both"
            )
    rotary = cos.shape[2]
    if rotary % 2 or not 0 < rotary <= dim:
        raise ValueError(f"cos has {rotary} columns: expected an even number from 2 to {dim}")


def needs_reference(cos: torch.Tensor, sin: torch.Tensor, *others: torch.Tensor) -> bool:
    """True for what the kernels do not compute: a gradient of cos or sin, and float64."""
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return True
    return any(x.dtype == torch.float64 for x in (cos, sin, *others))


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    unsqueeze_dim: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions; one launch forward and one backward.

    Args:
        q: (B, Hq, S, D) for unsqueeze_dim=1, (B, S, Hq, D) for unsqueeze_dim=2; any strides, read in place
            where the last dim is contiguous. float32, bfloat16 or float16.
        k: the same with Hk heads.
        cos, sin: (B or 1, S, R), rows already gathered by position; R even and at most D. The columns R..D of
            q and k pass through. Where cos or sin require a gradient, and in float64, the reference computes.
        layout: "half", "interleaved" or "interleaved_repeat", see the module.
        out_dtype: of both results.

    Returns:
        q and k rotated, in their memory order; without out_dtype in promote_types(x.dtype, cos.dtype).

    Raises:
        ValueError: for another layout, unsqueeze_dim or shape.
    """
    check_rope_arguments(q, k, cos, sin, layout, unsqueeze_dim)
    if needs_reference(cos, sin, q, k):
        return rope_reference(q, k, cos, sin, layout=layout, unsqueeze_dim=unsqueeze_dim, out_dtype=out_dtype)
    q_out, k_out = _Rope.apply(q, k, cos, sin, layout, unsqueeze_dim, out_dtype)
    return q_out, k_out


def _rotate_pairs(x: torch.Tensor, layout: str) -> torch.Tensor:
    """(-b, a) for every pair (a, b)."""
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    unsqueeze_dim: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` in plain PyTorch, with eager's roundings: x * cos + rotated(x) * sin in the promoted dtype."""
    check_rope_arguments(q, k, cos, sin, layout, unsqueeze_dim)
    rotary = cos.shape[2]
    if layout == "interleaved_repeat":
        cos, sin = (x[..., : rotary // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    results = []
    for x in (q, k):
        rotated, rest = x[..., :rotary], x[..., rotary:]
        y = rotated * cos + _rotate_pairs(rotated, layout) * sin
        if rest.shape[-1]:
            y = torch.cat((y, rest.to(y.dtype)), dim=-1)
        results.append(y if out_dtype is None else y.to(out_dtype))
    return results[0], results[1]
