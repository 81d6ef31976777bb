"""What a model's decoder layers save for their backwards, seen in two short forwards.

The arithmetic of `facts` is that of a Llama. Others have norms of queries and keys, four norms a layer, MLPs
that are left to their parts, attention that keeps its scores: what autograd is given to keep says it all, a
token and, where rows matter to themselves, a token times the length of its row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sloth_plugins.checkpointing.repeat import FLAGS, norms_noted, put_back, tensors

LENGTHS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Bytes that a layer saves for each token: all; of that its MLP's, but for the MLP's input; and outputs
    of norms that can be made again. `by_length`: more of all, times the length of a row."""

    saved: float
    by_length: float
    mlp: float
    norms: float


@dataclass
class _Seen:
    """Bytes of the storages that one forward saves in its layers, each counted once."""

    is_norm: Callable[[torch.Tensor], bool]
    stays: set[int]
    saved: int = 0
    mlp: int = 0
    norms: int = 0
    storages: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By address and size, of the layer that runs; held, so that no other one gets the address."""
    earlier: dict[tuple[int, int], Any] = field(default_factory=dict)
    """Those of the layer before it."""
    input: torch.Tensor | None = None
    """Of the MLP that runs now."""

    def pack(self, tensor: torch.Tensor) -> None:
        """The hook: counts. Nothing is saved, for no backward comes."""
        self._count(tensor)

    vars(pack)["private"] = True

    def _count(self, tensor: torch.Tensor) -> None:
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        norm = self.is_norm(tensor)
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key[0] in self.stays or key in self.storages or key in self.earlier:
            return
        self.storages[key] = storage
        self.saved += key[1]
        if norm:
            self.norms += key[1]
        elif self.input is not None and self.input.untyped_storage().data_ptr() != key[0]:
            self.mlp += key[1]

    def layer(self, mlp: nn.Module | None, function: Callable[..., Any], *args: Any) -> Any:
        """A layer's `_gradient_checkpointing_func`."""
        self.earlier, self.storages = self.storages, {}
        shared = tensors(getattr(function, "keywords", {}))
        self.stays.update(t.untyped_storage().data_ptr() for t in shared)
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda nothing: nothing):
            return function(*args) if mlp is None else self._with_mlp(mlp, function, *args)

    def _with_mlp(self, mlp: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        inner = mlp.forward

        def forward(x: Any, *others: Any, **named: Any) -> Any:
            self.input = x if torch.is_tensor(x) else None
            try:
                return inner(x, *others, **named)
            finally:
                if self.input is not None:
                    storage = self.input.untyped_storage()
                    if (storage.data_ptr(), storage.nbytes()) not in self.storages:
                        # Nobody keeps it; it must be kept where the MLP is made again.
                        self.mlp -= storage.nbytes()
                self.input = None

        with put_back(mlp, "forward"):
            mlp.__dict__["forward"] = forward
            return function(*args)


def observe(
    backbone: nn.Module,
    layers: Sequence[Any],
    mlps: Sequence[nn.Module | None],
    vocab: int,
    is_norm: Callable[[torch.Tensor], bool],
) -> Observed | None:
    """What the layers save, by forwards of `backbone` on random tokens in the mode that it is in; None where
    they raise. mlps: of each layer, if it has one. is_norm: whether a tensor is a norm's output, just made.

    Flags of the layers and random states are afterwards what they were.
    """
    try:
        found = [_forward(backbone, layers, mlps, vocab, is_norm, length) for length in LENGTHS]
    except Exception:  # of whatever it wants beside ids, and has not got
        return None
    short, long = LENGTHS
    a_token = [[seen.saved / n, seen.mlp / n, seen.norms / n] for seen, n in zip(found, LENGTHS, strict=True)]
    by_length = max(0.0, (a_token[1][0] - a_token[0][0]) / (long - short))
    if by_length * long < 0.01 * a_token[1][0]:
        by_length = 0.0  # what each layer saves once, and no scores
    saved, mlp, norms = (value / len(layers) for value in a_token[1])
    by_length /= len(layers)
    if not 0 <= mlp + norms <= saved or not saved:
        return None
    return Observed(saved=saved - by_length * long, by_length=by_length, mlp=mlp, norms=norms)


def _forward(
    backbone: nn.Module,
    layers: Sequence[Any],
    mlps: Sequence[nn.Module | None],
    vocab: int,
    is_norm: Callable[[torch.Tensor], bool],
    length: int,
) -> _Seen:
    weights = [*backbone.parameters(), *backbone.buffers()]
    device = weights[0].device
    seen = _Seen(is_norm, {t.untyped_storage().data_ptr() for t in weights if not t.is_meta})
    generator = torch.Generator().manual_seed(0x5107)
    ids = torch.randint(0, vocab, (1, length), generator=generator).to(device)
    devices = sorted({t.device.index or 0 for t in weights if t.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(norms_noted(True))
        for layer, mlp in zip(layers, mlps, strict=True):
            stack.enter_context(put_back(layer, *FLAGS))
            layer.__dict__.update({FLAGS[0]: True, FLAGS[1]: functools.partial(seen.layer, mlp)})
        backbone(input_ids=ids, use_cache=False)
    seen.earlier, seen.storages = {}, {}
    return seen
