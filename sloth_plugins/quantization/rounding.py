"""Calibrated rounding to bitsandbytes' NF4: the same bytes, a smaller error of what a linear computes.

    w_hat[n, k] = code[nibble[n, k]] * scale[n, k // blocksize]             in bitsandbytes' format [1]
    scale[j]    = code2[nested[j]] * outer[j // 256] + offset               nested ("double") quantization
    loss        = trace((W_hat - W*) H (W_hat - W*)^T)
    H           = X^T X + damping * mean(diag(X^T X)) * I                   X (tokens, K): the linear's input
    W*          = W + W D H^-1,   D = (X_original - X)^T X

X comes from the model whose earlier layers are quantized already, X_original from the original one: W* makes
up for what the earlier layers lost [2].

1. Columns are rounded one after another, and each one's error is spread over those that follow (GPTQ [3]).
   Blocks of columns come in descending order of their input's energy, columns within a block too. A block's
   scale is chosen when its turn comes, among the 256 that the nested format can store.
2. Sweeps of coordinate descent: each block's scale is fitted again with its nibbles fixed, then each column
   is rounded again with all others fixed.

[1] Dettmers et al., QLoRA, arXiv:2305.14314        [2] Li et al., GPTAQ, arXiv:2504.02692
[3] Frantar et al., GPTQ, arXiv:2210.17323
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256
BLOCKSIZES = (64, 32)
# Of the block's largest weight; beyond 1 where spread errors made it larger.
_CANDIDATES = (0.7, 0.75, 0.8, 0.84, 0.88, 0.91, 0.94, 0.97, 1.0, 1.03)
# Room for scales that grow in calibration, over the largest of 256.
_HEADROOM = 1.05


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight (N, K) in 4 bits: everything that bitsandbytes stores of it.

    nibbles: (N, K) uint8, 0 to 15; nested: (N, K // blocksize) uint8; outer: a float32 for each 256 of these.
    """

    nibbles: Tensor
    nested: Tensor
    outer: Tensor
    offset: float
    blocksize: int


class Codes:
    """The two look-up tables of the format, as bitsandbytes makes them, and what rounds with them."""

    def __init__(self, device: torch.device) -> None:
        import bitsandbytes.functional as bnb
        from sloth_kernels._library import triton_unavailable

        self.nf4 = bnb.get_4bit_type("nf4", device=device).float()
        self.nested = bnb.create_dynamic_map().to(device=device, dtype=torch.float32)
        self._nested_middles = (self.nested[1:] + self.nested[:-1]) / 2
        # A table of 4,096 steps is several times faster than a search, and as good: what it rounds the other
        # way lies in the middle of two values.
        steps = torch.linspace(-1, 1, _STEPS, device=device)
        self._nibble_of_step = torch.bucketize(steps, (self.nf4[1:] + self.nf4[:-1]) / 2)
        self._fused = device.type == "cuda" and triton_unavailable() is None

    def nibbles(self, values: Tensor, scale: Tensor) -> Tensor:
        """The index of the nearest of 16 values, int64; `scale` broadcasts and may be negative."""
        from sloth_kernels.nf4_rounding import nearest_nibbles

        return nearest_nibbles(values, scale, self._nibble_of_step)

    def nearest_nested(self, values: Tensor) -> Tensor:
        """The index of the nearest of the 256 values, int64."""
        return torch.bucketize(values, self._nested_middles)

    def round_block(
        self,
        own: Tensor,
        matrix: Tensor,
        slope: Tensor | None,
        scale: Tensor,
        dtype: torch.dtype,
        nibbles: Tensor,
        values: Tensor,
    ) -> Tensor:
        """`sloth_kernels.nf4_rounding.round_block`; in plain PyTorch where its kernel can't be had."""
        from sloth_kernels.nf4_rounding import round_block

        given = own, matrix, slope, scale, self._nibble_of_step, self.nf4, dtype, nibbles, values
        if self._fused:
            try:
                return round_block(*given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a Triton that we don't know does; nothing read was written
                self._fused = False
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                warnings.warn(
                    f"the rounding kernel failed, and PyTorch, which takes much longer, goes on: {reason}",
                    stacklevel=2,
                )
        return round_block(*given, fused=False)


_STEPS = 4096


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < 1e-30, torch.full_like(scale, 1e-30), scale)


class _Grid:
    """The scales that can be stored for each block of several weights that share their input."""

    def __init__(self, weights: Sequence[Tensor], blocksize: int, codes: Codes, headroom: float) -> None:
        self.codes, self.parts, self.blocksize = codes, [w.shape[0] for w in weights], blocksize
        self.outers: list[Tensor] = []
        self.offsets: list[float] = []
        wide, shift = [], []
        for weight in weights:
            n, k = weight.shape
            absmax = weight.view(n * k // blocksize, blocksize).abs().amax(1)
            offset = absmax.mean()
            padding = -absmax.numel() % NESTED_BLOCKSIZE
            spread = torch.nn.functional.pad((absmax - offset).abs(), (0, padding)).view(-1, NESTED_BLOCKSIZE)
            outer = spread.amax(1) * headroom
            self.outers.append(outer)
            self.offsets.append(offset.item())
            each = outer.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
            wide.append(each.view(n, k // blocksize))
            shift.append(offset.expand(n))
        self.wide, self.shift = torch.cat(wide), torch.cat(shift)

    def nearest(self, wanted: Tensor) -> Tensor:
        """For a scale of every block, (N, blocks): the index of the nearest that can be stored."""
        return self.codes.nearest_nested((wanted - self.shift[:, None]) / _nonzero(self.wide))

    def snap(self, wanted: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """For scales (candidates, N): the indices and the values of the nearest that can be stored."""
        wide = self.wide[:, block]
        index = self.codes.nearest_nested((wanted - self.shift) / _nonzero(wide))
        return index, self.codes.nested[index] * wide + self.shift


def round_plainly(weights: Sequence[Tensor], blocksize: int, codes: Codes) -> list[Rounded]:
    """Each weight (N, K) as bitsandbytes rounds it: the largest of a block is its scale."""
    grid = _Grid(weights, blocksize, codes, 1.0)
    joint = torch.cat(list(weights))
    blocks = joint.view(joint.shape[0], -1, blocksize)
    absmax = blocks.abs().amax(2)
    nibbles = codes.nibbles(blocks, absmax[:, :, None]).view(joint.shape)
    return _split(nibbles, grid.nearest(absmax), grid)


def round_calibrated(
    weights: Sequence[Tensor],
    hessian: Tensor,
    drift: Tensor | None,
    *,
    blocksize: int,
    dtype: torch.dtype,
    codes: Codes,
    damping: float = 0.01,
    drift_share: float = 1.0,
    sweeps: int = 2,
) -> list[Rounded]:
    """Weights (N_i, K) float32 that share their input, rounded for it.

    hessian: (K, K) float32, X^T X; drift: (K, K) float32, (X_original - X)^T X, or None; dtype: what the
    weights are expanded to, and so rounded to, when they are used.
    """
    grid = _Grid(weights, blocksize, codes, _HEADROOM)
    joint = torch.cat(list(weights))
    rows, columns = joint.shape
    dead = hessian.diagonal() <= 0
    damped = hessian.clone()
    energy = damped.diagonal()
    energy[dead] = 1.0
    energy += damping * energy.mean()
    lower = torch.linalg.cholesky(damped)
    inverse = torch.cholesky_inverse(lower)
    if drift is not None:
        joint = joint + drift_share * (joint @ drift) @ inverse

    by_block = hessian.diagonal().view(-1, blocksize)
    order = by_block.sum(1).argsort(descending=True)
    inner = by_block.argsort(dim=1, descending=True)
    permutation = (order[:, None] * blocksize + inner[order]).reshape(-1)
    upper = torch.linalg.cholesky(inverse[permutation][:, permutation], upper=True)
    damped = damped[permutation][:, permutation]
    del lower, inverse
    # From here on transposed, (K, N): the loops go over columns of the weight, which then lie together.
    target = joint.T[permutation].contiguous()

    work = target.clone()
    values = torch.empty_like(work)
    nibbles = torch.empty(columns, rows, dtype=torch.uint8, device=joint.device)
    nested = torch.empty(columns // blocksize, rows, dtype=torch.int64, device=joint.device)
    scales = torch.empty(columns // blocksize, rows, device=joint.device)
    candidates = torch.tensor(_CANDIDATES, device=joint.device)[:, None]
    parts = 1 if joint.is_cuda else len(_CANDIDATES)  # a GPU waits for launches, a CPU for its memory
    for place, block in enumerate(order.tolist()):
        here = slice(place * blocksize, (place + 1) * blocksize)
        own, local = work[here], upper[here, here]
        index, offered = grid.snap(own.abs().amax(0) * candidates, block)
        weight = local.diagonal().square().reciprocal()
        losses: list[Tensor] = []
        for some in offered[:, None].chunk(parts):
            error = codes.nf4[codes.nibbles(own, some)].mul_(some).sub_(own).square_()
            losses += [weight @ each for each in error]
        best = torch.stack(losses).argmin(0, keepdim=True)
        nested[block], scales[block] = index.gather(0, best)[0], offered.gather(0, best)[0]
        errors = codes.round_block(own, local, None, scales[block], dtype, nibbles[here], values[here])
        work[here.stop :] -= upper[here, here.stop :].T @ errors

    gradient = damped @ (values - target) if sweeps else values
    for _ in range(sweeps):
        for place, block in enumerate(order.tolist()):
            here = slice(place * blocksize, (place + 1) * blocksize)
            before, local, slope = values[here].clone(), damped[here, here], gradient[here].clone()
            shape = codes.nf4[nibbles[here].long()]
            step = (shape * slope).sum(0) / ((local @ shape) * shape).sum(0).clamp(min=1e-30)
            index, offered = grid.snap((scales[block] - step)[None], block)
            changed = (shape * offered).to(dtype).float() - before
            moved = local @ changed
            gains = (changed * (2 * slope + moved)).sum(0) < 0
            nested[block] = torch.where(gains, index[0], nested[block])
            scales[block] = torch.where(gains, offered[0], scales[block])
            own = before + changed * gains
            slope += moved * gains
            codes.round_block(own, local, slope, scales[block], dtype, nibbles[here], values[here])
            gradient += damped[:, here] @ (values[here] - before)
    back = torch.empty_like(nibbles)
    back[permutation] = nibbles
    return _split(back.T, nested.T, grid)


def _split(nibbles: Tensor, nested: Tensor, grid: _Grid) -> list[Rounded]:
    found, start = [], 0
    for rows, outer, offset in zip(grid.parts, grid.outers, grid.offsets, strict=True):
        found.append(
            Rounded(
                nibbles=nibbles[start : start + rows].to(torch.uint8).contiguous(),
                nested=nested[start : start + rows].to(torch.uint8).contiguous(),
                outer=outer,
                offset=offset,
                blocksize=grid.blocksize,
            )
        )
        start += rows
    return found


def tensors_of(rounded: Rounded, name: str, dtype: torch.dtype, codes: Codes) -> dict[str, Tensor]:
    """What a checkpoint holds for the weight `name`, as bitsandbytes writes it, on the CPU."""
    packed, state = _stored(rounded, dtype, codes)
    state.to("cpu")
    parts = state.as_dict(packed=True)
    return {name: packed.cpu(), **{f"{name}.{key}": tensor.cpu() for key, tensor in parts.items()}}


def expand(rounded: Rounded, dtype: torch.dtype, codes: Codes) -> Tensor:
    """The weight (N, K) expanded by bitsandbytes, where `rounded` is: what `expand_tensors` gives."""
    import bitsandbytes.functional as bnb

    expanded: Tensor = bnb.dequantize_4bit(*_stored(rounded, dtype, codes))
    return expanded


def _stored(rounded: Rounded, dtype: torch.dtype, codes: Codes) -> tuple[Tensor, Any]:
    """The packed bytes and bitsandbytes' `QuantState`, where `rounded` is."""
    import bitsandbytes.functional as bnb

    n, k = rounded.nibbles.shape
    flat, device = rounded.nibbles.reshape(-1, 2), rounded.nibbles.device
    state = bnb.QuantState(
        absmax=rounded.nested.reshape(-1),
        shape=torch.Size((n, k)),
        code=codes.nf4.clone(),  # safetensors refuses tensors that share memory
        blocksize=rounded.blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.tensor(rounded.offset, device=device),
        state2=bnb.QuantState(
            absmax=rounded.outer,
            code=codes.nested,
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        ),
    )
    return ((flat[:, 0] << 4) | flat[:, 1])[:, None], state


def expand_tensors(tensors: dict[str, Tensor], name: str, device: torch.device | None = None) -> Tensor:
    """The weight (N, K) that a checkpoint's tensors stand for, expanded by bitsandbytes.

    device: where to; None: where the tensors are. Where a block divides a row it is the same to the bit, but
    for float16, which bitsandbytes rounds another way on a CPU.
    """
    import bitsandbytes.functional as bnb

    packed = tensors[name] if device is None else tensors[name].to(device)
    start = f"{name}."
    stats = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    state = bnb.QuantState.from_dict(stats, device=packed.device)
    expanded: Tensor = bnb.dequantize_4bit(packed, state)
    return expanded
