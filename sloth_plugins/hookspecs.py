"""The hooks, in the order of a model's life.

docs/hooks.md describes each with an example; a test holds the two together.

A plugin is a module or an object whose functions carry `sloth_plugins.hookimpl`, offered through the
entry-point group `sloth_plugins`. An implementation may take any subset of a hook's arguments. Built-ins are
ordinary plugins, registered first and `trylast`, so that a third party's answer comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sloth_plugins.engine import Acceleration
    from sloth_plugins.settings import Settings
    from sloth_plugins.specs import KernelSpec, Patch, Site, Skip, Survey
    from sloth_plugins.survey import PlanContext

PROJECT = "sloth_plugins"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sloth_register_kernels() -> Sequence[KernelSpec]:  # type: ignore[empty-body]
    """Offer kernels. Called once an acceleration; must not compile or launch anything."""


@hookspec
def sloth_survey_model(model: nn.Module, settings: Settings) -> Survey:  # type: ignore[empty-body]
    """Find sites in `model`, on any device, the meta device included. Must leave the model as it is."""


@hookspec(firstresult=True)
def sloth_choose_kernel(
    site: Site,
    op: str,
    kernels: Sequence[KernelSpec],
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
) -> KernelSpec | None:
    """Choose one of `kernels`, all of which can serve the site; None leaves the choice to the next plugin."""


@hookspec
def sloth_plan_patches(model: nn.Module, context: PlanContext) -> Sequence[Patch | Skip]:  # type: ignore[empty-body]
    """Plan patches for the surveyed sites (`context.sites`), with kernels from `context.choose(site, op)`."""


@hookspec(firstresult=True)
def sloth_plan_quantization(model: nn.Module | str, settings: Settings, budget: float | str) -> Any | None:
    """Plan which modules are stored in how many bits within `budget` (a ratio to uniform 4-bit)."""


@hookspec(firstresult=True)
def sloth_plan_checkpointing(model: nn.Module, settings: Settings) -> Any | None:
    """Plan what is kept, offloaded and recomputed: an object whose `apply(model)` gives an undo function."""


@hookspec
def sloth_check_plan(  # type: ignore[empty-body]
    model: nn.Module, patches: Sequence[Patch], settings: Settings
) -> Sequence[Skip]:
    """Object to planned patches: each Skip drops the patches of that module and op, with its reason."""


@hookspec
def sloth_patched(acceleration: Acceleration) -> None:
    """The model is patched and verified; `acceleration.report` is complete."""


@hookspec
def sloth_restored(acceleration: Acceleration) -> None:
    """`undo()` has given the original forwards back."""
