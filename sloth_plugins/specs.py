"""The values that pass between hooks: sites, kernels, patches. Only the engine changes a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sloth_plugins.numerics import Comparison
    from sloth_plugins.verify import Trial

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True, kw_only=True)
class Site:
    """A module that plays a known role, confirmed by behaviour.

    `role` is one of "rms_norm", "layer_norm", "gated_mlp", "attention", "decoder_layer", "lm_head",
    "lora_linear". `facts` is what the probe confirmed (eps, activation, child names ...); `signature` is
    equal for all the sites that one verification covers (same class, same facts, same widths and dtypes).
    """

    module: str
    role: str
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    signature: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A candidate that was left alone, and why.

    `benign`: there was nothing to accelerate, so `strict` does not raise.
    """

    module: str
    op: str
    reason: str
    benign: bool = False


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a survey found: sites, and candidates that turned out to be none."""

    sites: tuple[Site, ...] = ()
    skips: tuple[Skip, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One implementation of one op.

    `function` has the signature of the op's public function in `sloth_kernels` (see docs/kernels.md) and
    `reference` is plain differentiable PyTorch of the same signature that is right in float64. `unavailable`
    says in one sentence why the kernel can't run on this machine; `refuse(device, dtype, facts)` why it can't
    serve a site. Both give None for "it can".
    """

    op: str
    name: str
    backend: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    device_types: frozenset[str] = frozenset({"cuda"})
    dtypes: frozenset[torch.dtype] = FLOATS
    unavailable: Callable[[], str | None] = lambda: None
    refuse: Callable[[torch.device, torch.dtype, Mapping[str, Any]], str | None] = lambda *_: None

    def why_not(self, device: torch.device, dtype: torch.dtype, facts: Mapping[str, Any]) -> str | None:
        """None where the kernel serves this device, dtype and site, otherwise the reason."""
        if (reason := self.unavailable()) is not None:
            return reason
        if device.type not in self.device_types:
            return f"{self.name} does not run on {device.type}"
        if dtype not in self.dtypes:
            return f"{self.name} does not take {str(dtype).removeprefix('torch.')}"
        return self.refuse(device, dtype, facts)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A planned change: instance forwards of some modules, and how to prove them.

    `forwards` maps a module's dotted name to a function `(self, *args, **kwargs)` that becomes the forward of
    that one instance; it must reach parameters and children through `self` so that a deep copy of the model
    works. Claiming a module twice is a conflict. `verify` returns the comparisons against float64 (None: the
    module is replayed on real input, patched against original). `replays` names modules whose real inputs
    `verify` wants. `otherwise` are the patches to try where this one is dropped. `counts` are numbers that
    the forwards keep up to date and that the report shows for the head.
    """

    module: str
    op: str
    kernel: KernelSpec
    forwards: Mapping[str, Callable[..., Any]]
    signature: tuple[Any, ...]
    verify: Callable[[Trial], Sequence[Comparison]] | None = None
    replays: tuple[str, ...] = ()
    otherwise: tuple[Patch, ...] = ()
    counts: Mapping[str, int] | None = None
    plugin: str = ""


class SlothError(RuntimeError):
    """A refusal of ours that says what to do; never raised in the middle of a training step."""


class BadInputError(SlothError, ValueError):
    """A model or a setting that can't be served: the value, and what is allowed."""


class SkippedSiteError(SlothError):
    """`strict=True` and a site was left alone."""


class ConflictError(SlothError):
    """Two plugins claim the same module."""


class NotASite(Exception):
    """A probe's or a planner's reason for leaving a module alone; `benign` as in Skip."""

    def __init__(self, reason: str, benign: bool = False) -> None:
        super().__init__(reason)
        self.benign = benign
