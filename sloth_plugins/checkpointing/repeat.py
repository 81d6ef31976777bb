"""What runs inside of a checkpointed layer learns whether it runs for the first time or again.

A layer that is run again is run for what its functions save; its output goes nowhere. Where its last step is
an addition, which saves nothing, the value of the MLP before it is not needed then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class _Now(threading.local):
    layer: str | None = None
    """"first" or "again" inside of a layer whose whole forward is run again for its backward, or None."""
    unread: Any = None
    """The module that is called now and ends such a layer, but for an addition."""


NOW = _Now()  # of this thread: backwards run in others


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


def options(module: Any) -> dict[str, bool]:
    """For `sloth_kernels.lora.lora_mlp`: what it may leave out in this call of `module`."""
    if NOW.layer is None or NOW.unread is not module:
        return {}
    return {"output": NOW.layer != "again", "repeated": True}
