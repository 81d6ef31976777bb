"""Adapters that start by giving back what quantization took: an ordinary PEFT LoRA beside the checkpoint.

For a linear with weight W (N, K), its expanded 4-bit weight Q (N, K), and H = X^T X (K, K) of its inputs:

    A (r, K), B (N, r) = argmin trace((D - B A) H (D - B A)^T),   D = W - Q               EoRA [1]
    H = None: H = I, the truncated SVD of D                                              LoftQ [2], one step

With H = L L^T and U the r leading left singular vectors of D L, the least is at B A = U U^T D. That projects
D: no square root of H is inverted, and inputs that the calibration never saw get D's own values, not noise.
U are the leading eigenvectors of G = D H D^T (N, N). G is not formed: a seeded block Krylov method [3] takes
products of D, H and D^T with r + 8 columns, eight of 15 GFLOP for 4096 x 14336 and r = 16. D L alone takes
1,700, its SVD ten times that. All is float64: H's eigenvalues differ by more than float32 resolves.

[1] Liu et al., arXiv:2410.21271        [2] Li et al., arXiv:2310.08659
[3] Musco and Musco, arXiv:1504.05477
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "base_model.model."  # of PEFT's names
_SPARE_COLUMNS = 8
_DEPTH = 8


def check_rank(rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where an adapter of this rank does not fit a linear; shapes: its weight's (N, K)."""
    narrowest = min(shapes, key=lambda name: min(shapes[name]))
    most = min(shapes[narrowest])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(
            f"lora_init={rank!r}: allowed is a rank from 1 to {most}, the smaller side of {narrowest}"
        )


def lora_factors(
    name: str,
    weight: Tensor,
    quantized: Tensor,
    hessian: Tensor | None,
    rank: int,
    *,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """A (rank, K) and B (N, rank), float32: weight + what they can't make up for = quantized + B @ A.

    weight, quantized: (N, K), any floating type, `quantized` as it is when used; hessian: (K, K), X^T X of
    the inputs, may be singular, or None for the plain norm; damping: of the mean of its diagonal, added to
    it.

    Row i of A and column i of B have the same norm, so that both train. What has nothing to make up for,
    such as a linear in 16 bits, gets PEFT's own start: A random, B zero. Randomness is seeded with `name`:
    the same arguments give the same bits.

    Raises ValueError for a rank that does not fit, and for values that are not finite.
    """
    check_rank(rank, {name: tuple(weight.shape)})
    n, k = weight.shape
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    residual = weight.to(torch.float64, copy=True).sub_(quantized)
    metric = None if hessian is None else hessian.to(torch.float64, copy=True)
    if metric is not None:
        metric.diagonal().add_(damping * metric.diagonal().mean())
    if not (residual.isfinite().all() and (metric is None or metric.isfinite().all())):
        raise ValueError(f"{name}: allowed are finite weights and inputs; what quantization removed is not")

    def g(columns: Tensor) -> Tensor:
        inner = residual.T @ columns
        return residual @ (inner if metric is None else metric @ inner)

    width = min(n, rank + _SPARE_COLUMNS)
    if n <= width * _DEPTH:
        basis = torch.eye(n, dtype=torch.float64, device=residual.device)
        image = g(basis)
    else:
        start = torch.randn(n, width, dtype=torch.float64, generator=generator).to(residual.device)
        blocks = [torch.linalg.qr(start)[0]]
        images = [g(blocks[0])]
        while len(blocks) < _DEPTH:
            # Of all columns, so that they stay orthonormal where the range of G is used up.
            joint = torch.linalg.qr(torch.cat([*blocks, images[-1]], 1))[0]
            blocks.append(joint[:, -width:])
            images.append(g(blocks[-1]))
        basis, image = torch.cat(blocks, 1), torch.cat(images, 1)
    projected = basis.T @ image
    vectors = torch.linalg.eigh((projected + projected.T) / 2)[1]
    up = basis @ vectors[:, -rank:].flip(1)
    down = up.T @ residual
    norm = down.norm(dim=1)
    alive = norm > 1e-12 * torch.linalg.vector_norm(weight, dtype=torch.float64)
    root = torch.where(alive, norm, 1.0).sqrt()
    fresh = torch.rand(rank, k, generator=generator, dtype=torch.float64).mul_(2).sub_(1) / math.sqrt(k)
    a = torch.where(alive[:, None], down / root[:, None], fresh.to(down.device))
    b = up * torch.where(alive, root, 0.0)
    return a.float().contiguous(), b.float().contiguous()


def adapter_tensors(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """What PEFT stores of the adapter of the linear `name` (full dotted), on the CPU."""
    return {f"{PREFIX}{name}.lora_A.weight": a.cpu(), f"{PREFIX}{name}.lora_B.weight": b.cpu()}


def factors_in(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A and B of the linear `name` from what `adapter_tensors` made."""
    return tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]


def save_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    linears: Iterable[str],
    base: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT adapter of scaling 1: adapter_config.json and adapter_model.safetensors.

    tensors: of `adapter_tensors`, all of one rank; linears: full names of all linears of the model, those
    without an adapter too; base: the checkpoint that it belongs to, as its users will name it. The same
    arguments give the same bytes.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(".lora_A.weight")}
    assert len(ranks) == 1, ranks
    (rank,) = ranks
    # PEFT takes every module whose name ends in a target: a short one is right where all of that name are in.
    others = {name.rpartition(".")[2] for name in linears if name not in names}
    last = {name: name.rpartition(".")[2] for name in names}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    # A list, not the set that LoraConfig makes of it: a set's order differs from process to process.
    config.target_modules = sorted({name if short in others else short for name, short in last.items()})
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(
        {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
