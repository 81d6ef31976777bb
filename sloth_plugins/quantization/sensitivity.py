"""What storing each linear in 4 bits does to the model's output, measured layer by layer.

Two measurements on a few rows of the calibration text, with plain NF4 in the place of the weights:

- a layer's KL: its linears in 4 bits, every other layer as it was, the model's output against the original;
- a linear's share of it: how much of the layer's output it alone changes, relative to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sloth_plugins.quantization.calibrate import linears, put
from sloth_plugins.quantization.rounding import Codes, expand, round_plainly
from sloth_plugins.quantization.stream import Stream


def kl_of(truth: Tensor, other: Tensor) -> Tensor:
    """KL(truth || other) of logits (tokens, vocabulary), in nats, (tokens,)."""
    p, q = truth.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def plainly(weight: Tensor, dtype: torch.dtype, blocksize: int, codes: Codes) -> Tensor:
    """The weight (N, K) after a way through uniform NF4."""
    (rounded,) = round_plainly([weight.float()], blocksize, codes)
    return expand(rounded, dtype, codes)


def measure(
    stream: Stream,
    rows: Sequence[Tensor],
    dtypes: Mapping[str, torch.dtype],
    blocksizes: Iterable[int],
    codes: Codes,
    done: Callable[[int], None] = lambda layers: None,
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """For each linear of `dtypes` (full names): its KL in blocks of 64, and the error of others relative
    to these."""
    original = stream.start(rows)
    forks: dict[int, list[Tensor]] = {}
    shares: dict[int, dict[str, float]] = {}
    factors: dict[str, dict[int, float]] = {}
    for index in range(len(stream)):
        layer = stream.load(index)
        after = [stream.run(index, layer, states, row) for row, states in enumerate(original)]
        for forked, hidden in forks.items():
            forks[forked] = [stream.run(index, layer, states, row) for row, states in enumerate(hidden)]
        names = [name for name in linears(layer) if stream.name(index, name) in dtypes]
        rounded, shares[index] = {}, {}
        for name in names:
            full = stream.name(index, name)
            weight = linears(layer)[name].weight.data
            rounded[name] = plainly(weight, dtypes[full], 64, codes)
            error = (rounded[name].to(weight) - weight).square().sum()
            factors[full] = {64: 1.0}
            for size in blocksizes:
                if size != 64:
                    other = plainly(weight, dtypes[full], size, codes).to(weight) - weight
                    factors[full][size] = (other.square().sum() / error).item() if error > 0 else 1.0
            put(layer, name, rounded[name], stream.device)
            share = 0.0
            for row, states in enumerate(original):
                moved = stream.run(index, layer, states, row) - after[row]
                share += (moved.square().sum(-1) / after[row].square().sum(-1).clamp(min=1e-30)).sum().item()
            shares[index][full] = share
            put(layer, name, weight, stream.device)
        for name in names:
            put(layer, name, rounded[name], stream.device)
        if names:
            forks[index] = [stream.run(index, layer, states, row) for row, states in enumerate(original)]
        original = after
        done(index + 1)
    kls, tokens = dict.fromkeys(forks, 0.0), 0
    for row, states in enumerate(original):
        truth = stream.logits(states, row)
        tokens += truth.shape[0]
        for index, hidden in forks.items():
            kls[index] += kl_of(truth, stream.logits(hidden[row], row)).sum().item()
    found: dict[str, float] = {}
    for index, kl in kls.items():
        whole = sum(shares[index].values())
        for full, share in shares[index].items():
            part = share / whole if whole else 1 / len(shares[index])
            found[full] = max(0.0, kl / tokens) * part
    return found, factors
