"""What runs inside of a decoder layer learns what of it is made again.

A layer that is run again is run for what its functions save; its output goes nowhere. Where its last step is
an addition, which saves nothing, the value of the MLP before it is not needed then.

The output of a norm, which the layers behind it save, is a cheap function of the norm's input, which is
saved as well: norms say how to make it again.

And where memory is to spare, modules keep their 4-bit weights expanded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# By which transformers' layers are told how to be recomputed.
FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A norm's output that `make(source)` gives to the bit; module: the norm."""

    module: Any
    source: Any
    make: Callable[[Any], Any]


def as_saved(tensor: Any) -> Any:
    """What a pack hook gives back for a tensor that stays: without its graph. A function's own output would
    hold the function that has saved it, and both for ever where no backward comes."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def place(tensor: Any) -> tuple[Any, ...]:
    """What identifies a tensor for as long as it is alive: its address, shape, strides and dtype."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Now(threading.local):
    norms: bool = False
    """Whether norms are to say how their outputs are made."""
    output: Any = None
    """Of the last norm. It is held, so that nothing else gets its place in memory and is taken for it."""
    place: tuple[Any, ...] = (0,)
    """The output's."""
    recipe: Recipe | None = None
    """That of the output."""
    layer: str | None = None
    """"first" or "again" inside of a layer whose whole forward is run again for its backward, or None."""
    unread: Any = None
    """The module that is called now and ends such a layer, but for an addition."""


NOW = _Now()  # of this thread: backwards run in others


@contextmanager
def norms_noted(on: bool) -> Iterator[None]:
    """Norms inside say how their outputs are made, if `on`."""
    before = NOW.norms, NOW.output, NOW.place, NOW.recipe
    NOW.norms, NOW.output, NOW.recipe = on, None, None
    try:
        yield
    finally:
        NOW.norms, NOW.output, NOW.place, NOW.recipe = before


@contextmanager
def put_back(module: Any, *names: str) -> Iterator[None]:
    """The module's own attributes of these names are afterwards what they were."""
    own = module.__dict__
    before = {name: own.get(name, ABSENT) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


class Repeated:
    """A layer's forward, for one checkpoint: its first call is the forward, others are run again."""

    __slots__ = ("function", "ran")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.ran = function, False

    def __call__(self, *args: Any) -> Any:
        before = NOW.layer
        NOW.layer = "again" if self.ran else "first"
        self.ran = True
        try:
            return self.function(*args)
        finally:
            NOW.layer = before


def call_unread(module: Any, x: Any) -> Any:
    """`module(x)`, whose value is added to the residual stream at the end of the layer and not saved."""
    if NOW.layer is None:
        return module(x)
    before, NOW.unread = NOW.unread, module
    try:
        return module(x)
    finally:
        NOW.unread = before


def note(module: Any, output: Any, source: Any, make: Callable[[Any], Any]) -> None:
    """A norm's output and how `make` gets it from `source`, which the norm's function saves."""
    NOW.output, NOW.recipe = output.detach(), Recipe(module=module, source=source.detach(), make=make)
    NOW.place = place(NOW.output)


def narrowed(x: Any, dtype: Any) -> Any:
    """`x` in `dtype`, which is what is saved then; made again like `x` where that is a norm's output."""
    if x.dtype == dtype:
        return x
    result = x.to(dtype)
    recipe = NOW.recipe
    if NOW.norms and recipe is not None and place(x) == NOW.place:
        make = recipe.make
        NOW.output = result.detach()
        NOW.place = place(NOW.output)
        NOW.recipe = Recipe(module=recipe.module, source=recipe.source, make=lambda x: make(x).to(dtype))
    return result


EXPANDED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Modules whose 4-bit weights stay expanded between training passes, with where they are; None at first."""


def expanded(module: Any, grad: bool, make: Callable[[], Any]) -> dict[str, Any]:
    """For `sloth_kernels.lora`: where this call of `module` keeps expanded weights. `make` gives a place.

    A call without gradients drops them: evaluation and generation need memory of their own.
    """
    if module not in EXPANDED:
        return {}
    place = EXPANDED[module]
    if not grad:
        if place is not None:
            place.clear()
        return {}
    if place is None:
        place = EXPANDED[module] = make()
    return {"expanded": place}


def options(module: Any) -> dict[str, bool]:
    """For `sloth_kernels.lora.lora_mlp`: what it may leave out in this call of `module`."""
    if NOW.layer is None or NOW.unread is not module:
        return {}
    return {"output": NOW.layer != "again", "repeated": True}
