"""One decoder layer: what enters its linears, and their calibrated rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sloth_plugins.quantization.lora_init import adapter_tensors, lora_factors
from sloth_plugins.quantization.rounding import (
    Codes,
    Rounded,
    expand,
    round_calibrated,
    round_plainly,
    tensors_of,
)
from sloth_plugins.quantization.stream import Stream


class _Reached(Exception):
    """Ends a layer's forward where the input that was asked for is known."""


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a layer, by name within it."""
    return {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}


def groups(stream: Stream, index: int, layer: nn.Module, hidden: Sequence[Tensor]) -> list[list[str]]:
    """Names of linears in the order of their calls, those with one input together; uncalled ones are left
    out."""
    found: list[list[str]] = []
    inputs: list[Tensor] = []
    wanted = set(linears(layer))

    def saw(name: str, x: Tensor) -> None:
        if name not in wanted:
            return
        wanted.remove(name)
        if inputs and inputs[-1] is x:
            found[-1].append(name)
        else:
            found.append([name])
            inputs.append(x)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: saw(name, args[0]))
        for name, module in linears(layer).items()
    ]
    try:
        for row, states in enumerate(hidden):
            inputs.clear()
            stream.run(index, layer, states, row)
            if not wanted:
                break
    finally:
        for handle in handles:
            handle.remove()
    return found


def input_of(
    stream: Stream, index: int, layer: nn.Module, module: str, hidden: Tensor, row: int
) -> Tensor | None:
    """What enters a linear, (tokens, K) float32; None where the row does not reach it (experts)."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]).float())
        raise _Reached

    handle = layer.get_submodule(module).register_forward_pre_hook(stop)
    try:
        stream.run(index, layer, hidden, row)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


def calibrate_layer(
    stream: Stream,
    index: int,
    blocksizes: Mapping[str, int],
    dtypes: Mapping[str, torch.dtype],
    original: Sequence[Tensor],
    hidden: Sequence[Tensor],
    codes: Codes,
    *,
    drift_share: float = 0.0,
    sweeps: int = 2,
    lora_rank: int = 0,
) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Round the linears of `blocksizes` (names within the layer), one group after another.

    original, hidden: what enters the layer in the original model and in the quantized one, for each row.
    Returns the layer as it was, the layer with rounded weights, and what a checkpoint holds of them, by full
    name. lora_rank: also what an adapter of this rank holds for every linear, by PEFT's names; 0: none.
    """
    layer = stream.load(index)
    work = copy.deepcopy(layer)
    own = linears(layer)
    stored: dict[str, Tensor] = {}
    seen = groups(stream, index, layer, hidden) if blocksizes else []
    called = {name for group in seen for name in group}
    for group in [*seen, *([name] for name in blocksizes if name not in called)]:
        chosen = [name for name in group if name in blocksizes]
        if not chosen:
            continue
        k = own[chosen[0]].in_features
        hessian = torch.zeros(k, k, device=stream.device)
        drift = torch.zeros_like(hessian) if drift_share else None
        for row, (states, before) in enumerate(zip(hidden, original, strict=True)):
            x = input_of(stream, index, work, chosen[0], states, row) if group[0] in called else None
            if x is None:
                continue
            hessian += x.T @ x
            if drift is not None:
                truth = input_of(stream, index, layer, chosen[0], before, row)
                if truth is not None and truth.shape == x.shape:
                    drift += (truth - x).T @ x
        if not all(matrix.isfinite().all() for matrix in (hessian, drift) if matrix is not None):
            raise ValueError(
                f"{stream.name(index, chosen[0])}: its input is not finite on the calibration text: "
                "allowed is a model that runs in float32"
            )
        for blocksize, dtype in dict.fromkeys((blocksizes[name], dtypes[name]) for name in chosen):
            names = [n for n in chosen if (blocksizes[n], dtypes[n]) == (blocksize, dtype)]
            weights = [own[name].weight.data for name in names]
            rounded: list[Rounded]
            if hessian.any():
                with matmul_precision("highest"):
                    rounded = round_calibrated(
                        weights,
                        hessian,
                        drift,
                        blocksize=blocksize,
                        dtype=dtype,
                        codes=codes,
                        drift_share=drift_share,
                        sweeps=sweeps,
                    )
            else:
                rounded = round_plainly(weights, blocksize, codes)
            for name, result in zip(names, rounded, strict=True):
                full = stream.name(index, f"{name}.weight")
                expanded = expand(result, dtype, codes)
                put(work, name, expanded, stream.device)
                stored |= tensors_of(result, full, dtype, codes)
                if lora_rank:
                    module, metric = stream.name(index, name), hessian if hessian.any() else None
                    pair = lora_factors(module, own[name].weight.data, expanded, metric, lora_rank)
                    stored |= adapter_tensors(module, *pair)
    for name, linear in own.items():
        if lora_rank and name not in blocksizes:  # in 16 bits: it trains with the others
            module, weight = stream.name(index, name), linear.weight.data
            stored |= adapter_tensors(module, *lora_factors(module, weight, weight, None, lora_rank))
    return layer, work, stored


def put(layer: nn.Module, name: str, weight: Tensor, device: torch.device) -> None:
    """Give a linear of a layer another weight."""
    linears(layer)[name].weight = nn.Parameter(weight.float().to(device), requires_grad=False)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it float32 matmuls have this precision, of `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
