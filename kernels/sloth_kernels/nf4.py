"""Expansion of bitsandbytes' 4-bit weights [1] to the dtype of a matmul, in one launch.

    scale[j] = absmax[j]                                        float32, one for each block of weights
    scale[j] = code2[absmax[j]] * absmax2[j // 256] + offset    nested ("double") quantization [1]
    w[i]     = code[nibble[i]] * scale[i // blocksize]          float32, rounded once to the stored dtype

The result is bit-equal to `bitsandbytes.functional.dequantize_4bit`: multiplication and addition of a nested
scale are rounded apart (no fused multiply-add), as its two kernels do.

Storage: byte i holds weight 2i in its high nibble and 2i + 1 in its low one, row after row of (N, K);
K must be even here. Bytes that must move for a bf16 result: 2.5 a weight, and 1/64 for nested scales.

`Extension` does it for several weights at once, each with the low-rank factors of an adapter beside it, as
the matmuls of `lora` want them.

[1] Dettmers et al., QLoRA, arXiv:2305.14314
"""

# Triton is untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from sloth_kernels._library import INTERPRETED, Launcher, launch, tl, triton

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# One 32-bit word a thread is one 16-byte store of bf16 results; four such words before the first use.
WARPS = 4
TILE = WARPS * 32
WORDS = 4 * TILE  # a program
PACK_BLOCK = 1024
_MOST_TABLES = 100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FourBit:
    """A weight (N, K) in bitsandbytes' 4-bit storage: its packed bytes and its `QuantState`.

    packed: N * K / 2 bytes of any shape and any dtype (`bnb_4bit_quant_storage`), contiguous.
    """

    packed: torch.Tensor
    state: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.state.shape
        return n, k

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device


class Source(Protocol):
    """Where the packed bytes of a weight are read from, in the place of its own memory."""

    together: Any
    """The same for weights of which one `read` is enough, if they are read together."""

    def packed(self) -> torch.Tensor:
        """The bytes (uint8), where they may be read by what the current stream is given next."""

    def read(self) -> None:
        """To be called once that has been launched."""


SOURCES: weakref.WeakValueDictionary[int, Source] = weakref.WeakValueDictionary()
"""By the address of a weight's own memory, which is slow to read: the host's."""


def refuse(weight: FourBit) -> str | None:
    """Why the kernel can't expand this weight, or None."""
    state = weight.state
    if getattr(state, "quant_type", None) not in ("nf4", "fp4"):
        return f"quant_type {getattr(state, 'quant_type', None)!r}: only nf4 and fp4 are expanded"
    if len(state.shape) != 2 or state.shape[1] % 2:
        return f"shape {tuple(state.shape)}: only (N, K) with an even K is expanded"
    if state.blocksize not in BLOCKSIZES:
        return f"blocksize {state.blocksize}: allowed are {', '.join(map(str, BLOCKSIZES))}"
    if state.shape[0] * state.shape[1] >= 2**32:
        return f"shape {tuple(state.shape)}: 2^32 weights and more are not expanded"
    if weight.packed.numel() * weight.packed.element_size() * 2 != state.shape[0] * state.shape[1]:
        return "its packed bytes do not fit its shape"
    return None


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    out_ptr,
    total,
    out_stride,
    HALF_K: tl.constexpr,
    HALF_BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK bytes a program, to any dtype; ROUND is the dtype that bitsandbytes rounds to first."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    byte = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = _scale(
        at, inside, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, HALF_BLOCKSIZE, BLOCKSIZE2, NESTED
    )
    even = (tl.load(code_ptr + (byte >> 4)) * scale).to(ROUND)
    odd = (tl.load(code_ptr + (byte & 15)) * scale).to(ROUND)
    row = at // HALF_K
    column = at - row * HALF_K
    to = out_ptr + row.to(tl.int64) * out_stride + 2 * column
    tl.store(to, even.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(to + 1, odd.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale(  # type: ignore[no-untyped-def]
    at,
    inside,
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    A_BLOCK: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
):
    """The scales of what is stored at `at`; A_BLOCK of that have one scale."""
    block = at // A_BLOCK
    if NESTED:
        coded = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=inside, other=0.0)
        scale = tl.load(code2_ptr + coded) * outer + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _weight(word, SHIFT: tl.constexpr, scale, code_ptr):  # type: ignore[no-untyped-def]
    """The weight at bits SHIFT to SHIFT + 3 of each word, in float32."""
    return tl.load(code_ptr + ((word >> SHIFT) & 15)) * scale


@triton.jit
def _store_words(  # type: ignore[no-untyped-def]
    at, inside, word, scale, code_ptr, out_ptr, out_stride, A_ROW: tl.constexpr, ROUND: tl.constexpr
):
    """Eight weights of each word into rows of out, `out_stride` apart."""
    row = at // A_ROW
    column = at - row * A_ROW
    # Joined before they are rounded: two by two, then, by one instruction.
    even = tl.join(
        tl.join(_weight(word, 4, scale, code_ptr), _weight(word, 20, scale, code_ptr)),
        tl.join(_weight(word, 12, scale, code_ptr), _weight(word, 28, scale, code_ptr)),
    )
    odd = tl.join(
        tl.join(_weight(word, 0, scale, code_ptr), _weight(word, 16, scale, code_ptr)),
        tl.join(_weight(word, 8, scale, code_ptr), _weight(word, 24, scale, code_ptr)),
    )
    weights = tl.reshape(tl.join(even, odd), (word.shape[0], 8)).to(ROUND)
    to = out_ptr + (row.to(tl.int64) * out_stride + column * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(to, weights, mask=inside[:, None])


@triton.jit
def _expand_words(  # type: ignore[no-untyped-def]
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    out_ptr,
    first,
    total,
    out_stride,
    A_ROW: tl.constexpr,
    A_BLOCK: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    """Four tiles of words from `first` on: all loads, then all stores."""
    a0 = first + tl.arange(0, TILE)
    a1 = a0 + TILE
    a2 = a1 + TILE
    a3 = a2 + TILE
    i0 = a0 < total
    i1 = a1 < total
    i2 = a2 < total
    i3 = a3 < total
    w0 = tl.load(packed_ptr + a0, mask=i0, other=0)
    w1 = tl.load(packed_ptr + a1, mask=i1, other=0)
    w2 = tl.load(packed_ptr + a2, mask=i2, other=0)
    w3 = tl.load(packed_ptr + a3, mask=i3, other=0)
    s0 = _scale(a0, i0, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, A_BLOCK, BLOCKSIZE2, NESTED)
    s1 = _scale(a1, i1, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, A_BLOCK, BLOCKSIZE2, NESTED)
    s2 = _scale(a2, i2, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, A_BLOCK, BLOCKSIZE2, NESTED)
    s3 = _scale(a3, i3, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, A_BLOCK, BLOCKSIZE2, NESTED)
    _store_words(a0, i0, w0, s0, code_ptr, out_ptr, out_stride, A_ROW, ROUND)
    _store_words(a1, i1, w1, s1, code_ptr, out_ptr, out_stride, A_ROW, ROUND)
    _store_words(a2, i2, w2, s2, code_ptr, out_ptr, out_stride, A_ROW, ROUND)
    _store_words(a3, i3, w3, s3, code_ptr, out_ptr, out_stride, A_ROW, ROUND)


@triton.jit
def _expand_16_bit_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    out_ptr,
    total,
    out_stride,
    A_ROW: tl.constexpr,
    A_BLOCK: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    """Four tiles of words a program."""
    _expand_words(
        packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True),
        absmax_ptr,
        code_ptr,
        absmax2_ptr,
        code2_ptr,
        offset_ptr,
        out_ptr,
        tl.program_id(0) * (4 * TILE),
        total,
        out_stride,
        A_ROW,
        A_BLOCK,
        BLOCKSIZE2,
        NESTED,
        ROUND,
        TILE,
    )


# Columns of a table of `Extension`: the first programs of a part, then its pointers, then its numbers.
_FIELDS = (
    *("expand_from", "b_from", "a_from"),
    *("packed", "absmax", "code", "absmax2", "code2", "offset", "a", "b"),
    *("start", "width", "column", "rank", "padded", "a_stride", "b_stride"),
)


@triton.jit
def _extend_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    out_ptr,
    n,
    out_stride,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    ROUND: tl.constexpr,
    FACTOR: tl.constexpr,
    PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A share of one part: of its weight, of b beside it, or of a below the weights."""
    program = tl.program_id(0)
    part = 0
    for i in tl.static_range(1, PARTS):
        part += (program >= tl.load(table_ptr + i * FIELDS)).to(tl.int32)
    own = table_ptr + part * FIELDS
    b_from = tl.load(own + 1)
    a_from = tl.load(own + 2)
    start = tl.load(own + 11)
    if program < b_from:
        if NESTED:
            absmax_ptr = tl.load(own + 4).to(tl.pointer_type(tl.uint8))
        else:
            absmax_ptr = tl.load(own + 4).to(tl.pointer_type(tl.float32))
        width = tl.load(own + 12)
        _expand_words(
            tl.load(own + 3).to(tl.pointer_type(tl.int32)),
            absmax_ptr,
            tl.load(own + 5).to(tl.pointer_type(tl.float32)),
            tl.load(own + 6).to(tl.pointer_type(tl.float32)),
            tl.load(own + 7).to(tl.pointer_type(tl.float32)),
            tl.load(own + 8).to(tl.pointer_type(tl.float32)),
            out_ptr + start * out_stride,
            (program - tl.load(own)).to(tl.int32) * (4 * TILE),
            (width * (K // 8)).to(tl.int32),
            out_stride,
            K // 8,
            BLOCKSIZE // 8,
            BLOCKSIZE2,
            NESTED,
            ROUND,
            TILE,
        )
    elif program < a_from:
        width = tl.load(own + 12)
        first = tl.load(own + 13)
        rank = tl.load(own + 14)
        b_ptr = tl.load(own + 10).to(tl.pointer_type(FACTOR))
        at = (program - b_from) * BLOCK + tl.arange(0, BLOCK)
        row = at // COLUMNS
        column = at - row * COLUMNS
        filled = (row < width) & (column >= first) & (column < first + rank)
        b = tl.load(b_ptr + row * tl.load(own + 17) + column - first, mask=filled, other=0.0)
        b_to = out_ptr + (start + row) * out_stride + K + column
        tl.store(b_to, b.to(out_ptr.dtype.element_ty), mask=row < width)
    else:
        a_first = tl.load(own + 13)
        a_rank = tl.load(own + 14)
        padded = tl.load(own + 15)
        a_ptr = tl.load(own + 9).to(tl.pointer_type(FACTOR))
        a_at = (program - a_from) * BLOCK + tl.arange(0, BLOCK)
        a_row = a_at // K
        k = a_at - a_row * K
        a = tl.load(a_ptr + a_row * tl.load(own + 16) + k, mask=a_row < a_rank, other=0.0)
        to = out_ptr + (n + a_first + a_row).to(tl.int64) * out_stride + k
        tl.store(to, a.to(out_ptr.dtype.element_ty), mask=a_row < padded)


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def expand_4bit(weight: FourBit, out: torch.Tensor) -> torch.Tensor:
    """Write the weight (N, K) into `out` (N, K), whose rows may lie any distance apart; returns `out`.

    Values are rounded to the dtype that the weight had before quantization, then to out's. On a device
    without the kernel bitsandbytes expands. Raises ValueError for another shape and what `refuse` names.
    """
    if tuple(out.shape) != tuple(weight.shape):
        raise ValueError(f"out {tuple(out.shape)}: expected the weight's shape {tuple(weight.shape)}")
    if (reason := refuse(weight)) is not None:
        raise ValueError(reason)
    if not out.numel():
        return out
    if not (out.is_cuda or INTERPRETED) or out.stride(1) != 1:
        return out.copy_(expand_4bit_reference(weight))
    state = weight.state
    n, k = out.shape
    inner = state.state2
    nested = (state.absmax,) * 3 if inner is None else (inner.absmax, inner.code, state.offset)
    source = SOURCES.get(weight.packed.data_ptr()) if SOURCES else None
    packed = weight.packed.view(torch.uint8) if source is None else source.packed()
    tensors = packed, state.absmax, state.code, *nested, out
    shared = dict(
        BLOCKSIZE2=1 if inner is None else inner.blocksize,
        NESTED=inner is not None,
        ROUND=_TRITON_DTYPES[state.dtype],
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    if out.dtype == state.dtype and _in_words(weight):
        launch(
            _expand_16_bit_kernel,
            (-(-n * k // (8 * WORDS)),),
            *tensors,
            n * k // 8,
            out.stride(0),
            A_ROW=k // 8,
            A_BLOCK=state.blocksize // 8,
            TILE=TILE,
            **shared,
        )
    else:
        launch(
            _expand_kernel,
            (-(-n * k // (2 * WORDS)),),
            *tensors,
            n * k // 2,
            out.stride(0),
            HALF_K=k // 2,
            HALF_BLOCKSIZE=state.blocksize // 2,
            BLOCK=WORDS,
            **shared,
        )
    if source is not None:
        source.read()
    return out


def _in_words(weight: FourBit) -> bool:
    """Whether a weight is of 16 bits and can be read as 32-bit words that lie in one row each."""
    state = weight.state
    words = state.shape[1] % 8 == 0 and weight.packed.data_ptr() % 4 == 0
    return words and state.dtype in (torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """A weight of an `Extension`, and the columns of its adapter among those of all.

    column: where they begin; padded: how many there are, with zeros.
    """

    weight: FourBit
    column: int
    padded: int


class _Table(NamedTuple):
    """What one way to fill an extension needs: the table itself is (parts, fields), int64."""

    table: torch.Tensor
    programs: int
    rows: int
    launcher: Launcher


@functools.lru_cache(4096)
def _extender(
    k: int,
    columns: int,
    blocksize: int,
    outer_blocksize: int | None,
    dtype: torch.dtype,
    factor: torch.dtype,
    parts: int,
) -> Launcher:
    """The kernel, which all extensions of a kind share; outer_blocksize: of nested scales."""
    return Launcher(
        _extend_kernel,
        K=k,
        COLUMNS=columns,
        BLOCKSIZE=blocksize,
        BLOCKSIZE2=1 if outer_blocksize is None else outer_blocksize,
        NESTED=outer_blocksize is not None,
        ROUND=_TRITON_DTYPES[dtype],
        FACTOR=_TRITON_DTYPES[factor],
        PARTS=parts,
        FIELDS=len(_FIELDS),
        TILE=TILE,
        BLOCK=PACK_BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


class Extension:
    """Fills a buffer with [W_i | b_i] of several weights, one below the other, and the a_i below these.

    One launch. Made once for a group of weights; what may move in memory is looked up at each `fill`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = parts[0].weight
        self.k = first.shape[1]
        self.parts, self.state = parts, first.state
        self.packed = [part.weight.packed for part in parts]
        self.states = [part.weight.state for part in parts]
        self.columns = sum(part.padded for part in parts)
        inner = first.state.state2
        self.stored = operator.attrgetter("absmax", "code", *(() if inner is None else _NESTED))
        self.alike = all(self._like_first(part.weight) for part in parts)
        # By all addresses, and whether weights are expanded. Dtypes and shapes of factors are those of the
        # projections' adapters.
        self.tables: dict[tuple[int, ...], _Table | None] = {}

    def _like_first(self, weight: FourBit) -> bool:
        """Whether one launch can expand it with the first."""
        state, outer, inner = weight.state, weight.state.state2, self.state.state2
        return (
            refuse(weight) is None
            and _in_words(weight)
            and weight.shape[1] == self.k
            and (state.dtype, state.blocksize) == (self.state.dtype, self.state.blocksize)
            and (outer is None) == (inner is None)
            and (outer is None or outer.blocksize == inner.blocksize)
        )

    def fill(
        self,
        out: torch.Tensor,
        factors: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
        *,
        weights: bool = True,
    ) -> bool:
        """Fill `out`, (sum of N_i + columns, at least K + columns).

        factors: a (rank, K) and b (N, rank) of each part's adapter, or None for both. b_i stands in the
        columns of its part, zeros beside it, and a_i in their rows. Nothing is written right of the a_i.
        weights: False where the W_i are in `out` already.

        Returns False, with nothing written, where the parts differ in what one launch must have in common
        (blocks, dtype of a and b), are not stored in out's dtype, or can't be expanded in 32-bit words.
        """
        if not self.alike or out.dtype != self.state.dtype or not (out.is_cuda or INTERPRETED):
            return False
        low = [t for pair in factors for t in pair if t is not None]
        with _PLAINLY():  # bitsandbytes' Params4bit looks at each call otherwise
            packed = [*map(_POINTER, self.packed)]
            sources: list[Source] = []
            if SOURCES and weights:
                found = [SOURCES.get(address) for address in packed]
                sources = [source for source in found if source is not None]
                packed = [
                    address if source is None else source.packed().data_ptr()
                    for address, source in zip(packed, found, strict=True)
                ]
            stored = [t for state in self.states for t in self.stored(state)]
            key = (weights, *packed, *map(_POINTER, stored), *map(_POINTER, low))
        known = self.tables.get(key)
        if known is None:
            if key in self.tables:
                return False
            if len(self.tables) >= _MOST_TABLES:
                self.tables.clear()
            known = self.tables[key] = self._table(factors, out, weights, packed)
            if known is None:
                return False
        table, programs, n, launcher = known
        if programs:
            launcher((programs, 1, 1), (table, out), (n, out.stride(0)))
        for source in {id(source.together): source for source in sources}.values():
            source.read()
        return True

    def _table(
        self,
        factors: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
        out: torch.Tensor,
        weights: bool,
        packed: Sequence[int],
    ) -> _Table | None:
        """None where `fill` can't.

        packed: the address of each part's bytes.
        """
        low = [t for pair in factors for t in pair if t is not None]
        unlike = len({t.dtype for t in low}) > 1 or any(t.stride(1) != 1 for t in low)
        if unlike or out.stride(0) % 8 or out.data_ptr() % 16:
            return None
        rows: list[list[int]] = []
        programs = start = 0
        for (weight, column, padded), (a, b), address in zip(self.parts, factors, packed, strict=True):
            n, k = weight.shape
            state, outer = weight.state, weight.state.state2
            expand_from = programs
            b_from = expand_from + (-(-n * k // (8 * WORDS)) if weights else 0)
            a_from = b_from + -(-n * self.columns // PACK_BLOCK)
            programs = a_from + -(-padded * k // PACK_BLOCK)
            nested = (0, 0, 0) if outer is None else (outer.absmax, outer.code, state.offset)
            pointers = (state.absmax, state.code, *nested, a, b)
            addresses = [address, *(t.data_ptr() if isinstance(t, torch.Tensor) else 0 for t in pointers)]
            of_low = (0, 0, 0) if a is None or b is None else (a.shape[0], a.stride(0), b.stride(0))
            rows.append([expand_from, b_from, a_from, *addresses, start, n, column])
            rows[-1] += [of_low[0], padded, *of_low[1:]]
            start += n
        inner = self.state.state2
        launcher = _extender(
            *(self.k, max(1, self.columns), self.state.blocksize, None if inner is None else inner.blocksize),
            *(self.state.dtype, low[0].dtype if low else torch.float32, len(self.parts)),
        )
        table = torch.tensor(rows, dtype=torch.int64).to(out.device)
        return _Table(table, programs, start, launcher)


_PLAINLY = torch._C.DisableTorchFunctionSubclass
_POINTER = torch.Tensor.data_ptr
_NESTED = ("state2.absmax", "state2.code", "offset")


def expand_4bit_reference(weight: FourBit) -> torch.Tensor:
    """The weight (N, K) as bitsandbytes expands it, in the dtype that it had before quantization."""
    import bitsandbytes.functional as bnb

    source = SOURCES.get(weight.packed.data_ptr()) if SOURCES else None
    stored = weight.packed if source is None else source.packed()
    packed = stored.reshape(-1, 1)  # not (1, n), which bitsandbytes takes for a transposed weight
    result: torch.Tensor = bnb.dequantize_4bit(packed, weight.state)
    if source is not None:
        source.read()
    return result
