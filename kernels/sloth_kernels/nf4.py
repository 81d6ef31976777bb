"""Expansion of bitsandbytes' 4-bit weights [1] to the dtype of a matmul, in one launch.

    scale[j] = absmax[j]                                        float32, one for each block of weights
    scale[j] = code2[absmax[j]] * absmax2[j // 256] + offset    nested ("double") quantization [1]
    w[i]     = code[nibble[i]] * scale[i // blocksize]          float32, rounded once to the stored dtype

The result is bit-equal to `bitsandbytes.functional.dequantize_4bit`: multiplication and addition of a nested
scale are rounded apart (no fused multiply-add), as its two kernels do.

Storage: byte i holds weight 2i in its high nibble and 2i + 1 in its low one, row after row of (N, K);
K must be even here. Bytes that must move for a bf16 result: 2.5 a weight, and 1/64 for nested scales.

[1] Dettmers et al., QLoRA, arXiv:2305.14314
"""

# Triton is untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sloth_kernels._library import INTERPRETED, launch, tl, triton

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Four bytes a thread are one 16-byte store of bf16 results; several such loads before the first use.
WARPS = 4
UNROLL = 4


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
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """BLOCK * UNROLL bytes a program; ROUND is the dtype that bitsandbytes rounds to first."""
    first = tl.program_id(0) * (BLOCK * UNROLL)
    for i in tl.static_range(UNROLL):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        inside = at < total
        byte = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
        block = at // HALF_BLOCKSIZE
        if NESTED:
            coded = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
            outer = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=inside, other=0.0)
            scale = tl.load(code2_ptr + coded) * outer + tl.load(offset_ptr)
        else:
            scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        even = (tl.load(code_ptr + (byte >> 4)) * scale).to(ROUND)
        odd = (tl.load(code_ptr + (byte & 15)) * scale).to(ROUND)
        row = at // HALF_K
        column = at - row * HALF_K
        if PAIRS:  # two 16-bit values as one 32-bit word
            low = even.to(tl.uint16, bitcast=True).to(tl.uint32)
            high = odd.to(tl.uint16, bitcast=True).to(tl.uint32)
            words = out_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
            tl.store(words + row.to(tl.int64) * (out_stride // 2) + column, (high << 16) | low, mask=inside)
        else:
            to = out_ptr + row.to(tl.int64) * out_stride + 2 * column
            tl.store(to, even.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(to + 1, odd.to(out_ptr.dtype.element_ty), mask=inside)


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
    packed = weight.packed.view(torch.uint8)
    inner = state.state2
    nested = () if inner is None else (inner.absmax, inner.code, state.offset)
    absmax2, code2, offset = nested or (state.absmax, state.absmax, state.absmax)
    pairs = out.element_size() == 2 and out.dtype == state.dtype and out.stride(0) % 2 == 0
    pairs = pairs and out.data_ptr() % 4 == 0
    block = WARPS * 32 * 4
    with torch.cuda.device_of(out):
        launch(
            _expand_kernel,
            (-(-(n * k // 2) // (block * UNROLL)),),
            packed,
            state.absmax,
            state.code,
            absmax2,
            code2,
            offset,
            out,
            n * k // 2,
            out.stride(0),
            HALF_K=k // 2,
            HALF_BLOCKSIZE=state.blocksize // 2,
            BLOCKSIZE2=inner.blocksize if nested else 1,
            NESTED=bool(nested),
            ROUND=_TRITON_DTYPES[state.dtype],
            PAIRS=pairs,
            BLOCK=block,
            UNROLL=UNROLL,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return out


def expand_4bit_reference(weight: FourBit) -> torch.Tensor:
    """The weight (N, K) as bitsandbytes expands it, in the dtype that it had before quantization."""
    import bitsandbytes.functional as bnb

    packed = weight.packed.reshape(-1, 1)  # not (1, n), which bitsandbytes takes for a transposed weight
    result: torch.Tensor = bnb.dequantize_4bit(packed, weight.state)
    return result
