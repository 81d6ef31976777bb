"""KL to the original, perplexity and top-1 agreement of quantized models, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sloth_plugins.quantization.calibrate import linears, put
from sloth_plugins.quantization.rounding import Codes, expand_tensors
from sloth_plugins.quantization.sensitivity import kl_of, plainly
from sloth_plugins.quantization.stream import Checkpoint, Stream

Weights = Callable[[int, nn.Module], Mapping[str, Tensor]]
"""From a layer's index and the original layer: the weights of a variant's linears that differ, by name within
the layer."""
Figures = dict[str, float]


def rounded_plainly(stream: Stream, codes: Codes, blocksizes: Mapping[str, int]) -> Weights:
    """Plain NF4 in blocks of these sizes, by the full names of linears."""

    def weights(index: int, layer: nn.Module) -> dict[str, Tensor]:
        return {
            name: plainly(module.weight.data, stream.dtype(index, name), blocksizes[full], codes)
            for name, module in linears(layer).items()
            if (full := stream.name(index, name)) in blocksizes
        }

    return weights


def stored_in(stream: Stream, checkpoints: Sequence[Checkpoint]) -> Weights:
    """What bitsandbytes expands from 4-bit tensors; `checkpoints` holds the files of each layer."""

    def weights(index: int, layer: nn.Module) -> dict[str, Tensor]:
        files, found = checkpoints[index], {}
        for name in linears(layer):
            key = stream.name(index, f"{name}.weight")
            if f"{key}.absmax" in files.shapes:
                own = (k for k in files.shapes if k == key or k.startswith(f"{key}."))
                found[name] = expand_tensors({k: files.tensor(k) for k in own}, key, stream.device)
        return found

    return weights


def evaluate(
    stream: Stream,
    variants: Mapping[str, Weights],
    rows: Mapping[str, Sequence[Tensor]],
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> dict[str, dict[str, Figures]]:
    """For each set of `rows` (1, tokens), the figures of "original" and of each variant.

    kl: nats a token, of all tokens; perplexity: of each token but a row's first; top1: the share of tokens
    whose likeliest next one is the original's.
    """
    joint = [(name, row) for name, several in rows.items() for row in several]
    first = stream.start([row for _, row in joint])
    states = {"original": first, **{name: list(first) for name in variants}}
    for index in range(len(stream)):
        progress("evaluating", index, len(stream))
        layer = stream.load(index)
        plain = {name: module.weight.data for name, module in linears(layer).items()}
        for kind, hidden in states.items():
            changed = variants[kind](index, layer) if kind in variants else {}
            for name, weight in changed.items():
                put(layer, name, weight, stream.device)
            states[kind] = [stream.run(index, layer, x, row) for row, x in enumerate(hidden)]
            for name in changed:
                put(layer, name, plain[name], stream.device)
    sums = {name: {kind: [0.0, 0.0, 0.0] for kind in states} for name in rows}
    tokens, predicted = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
    for row, (name, ids) in enumerate(joint):
        truth = stream.logits(states["original"][row], row)
        following = ids[0, 1:, None].to(truth.device)
        tokens[name] += ids.numel()
        predicted[name] += following.numel()
        for kind, hidden in states.items():
            logits, own = stream.logits(hidden[row], row), sums[name][kind]
            own[0] += kl_of(truth, logits).sum().item()
            own[1] -= logits.log_softmax(-1)[:-1].gather(1, following).sum().item()
            own[2] += (logits.argmax(-1) == truth.argmax(-1)).sum().item()
    progress("evaluating", len(stream), len(stream))
    return {
        name: {
            kind: {
                "kl": kl / tokens[name],
                "perplexity": float(torch.tensor(loss / predicted[name]).exp()),
                "top1": same / tokens[name],
                "tokens": tokens[name],
            }
            for kind, (kl, loss, same) in kinds.items()
        }
        for name, kinds in sums.items()
    }


def by_file(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by name, by path where two have one name."""
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): path for path in paths}
