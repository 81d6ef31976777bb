"""A typed face over pluggy: which plugins there are, and one method for each hook.

Environment: SLOTH_DISABLED_PLUGINS, names separated by commas, are not loaded; SLOTH_TRACE_PLUGINS=1 prints
every hook call to stderr.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from sloth_plugins import hookspecs
from sloth_plugins.hookspecs import PROJECT
from sloth_plugins.specs import KernelSpec, Patch, Site, Skip, Survey

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sloth_plugins.engine import Acceleration
    from sloth_plugins.settings import Settings
    from sloth_plugins.survey import PlanContext

BUILT_INS = {
    "sloth_survey": "sloth_plugins.survey",
    "sloth_patches": "sloth_plugins.patches",
    "sloth_kernels": "sloth_kernels.plugin",
}


class Manager:
    """The plugins of one process, or of one test: built-ins, then the entry points of our group."""

    def __init__(self, *, entry_points: bool = True) -> None:
        self.pluggy = pluggy.PluginManager(PROJECT)
        self.pluggy.add_hookspecs(hookspecs)
        names = (name.strip() for name in os.environ.get("SLOTH_DISABLED_PLUGINS", "").split(","))
        self.disabled = {name for name in names if name}
        self.problems: list[str] = []
        for name, module in BUILT_INS.items():
            if name not in self.disabled:
                self.pluggy.register(importlib.import_module(module), name=name)
        if entry_points:
            self._load_entry_points()
        if os.environ.get("SLOTH_TRACE_PLUGINS", "0") not in ("", "0"):
            self.pluggy.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
            self.pluggy.enable_tracing()

    def _load_entry_points(self) -> None:
        """Each on its own: a plugin that can't be imported is a warning and a note, not the run's end."""
        from importlib.metadata import entry_points

        for entry_point in entry_points(group=PROJECT):
            if entry_point.name in self.disabled or self.pluggy.has_plugin(entry_point.name):
                continue
            try:
                self.register(entry_point.load(), name=entry_point.name)
            except Exception as error:
                self.problems.append(
                    f"plugin {entry_point.name!r} ({entry_point.value}) was not loaded: {error!r}"
                )
                warnings.warn(f"sloth: {self.problems[-1]}", stacklevel=2)

    def register(self, plugin: Any, name: str | None = None) -> None:
        """Add a plugin; an unknown hook, or an argument that a hook doesn't have, raises pluggy's error."""
        if type(plugin).__hash__ is None:  # pluggy keeps plugins in sets
            raise TypeError(
                f"plugin {name!r} is a {type(plugin).__name__}, which has no hash: "
                "allowed are modules and objects"
            )
        try:
            self.pluggy.register(plugin, name=name)
            self.pluggy.check_pending()
        except pluggy.PluginValidationError:
            if self.pluggy.is_registered(plugin):
                self.pluggy.unregister(plugin)  # a plugin that is wrong must not make the next one look wrong
            raise

    def unregister(self, name: str) -> None:
        """Remove a plugin by name."""
        self.pluggy.unregister(name=name)

    def names(self) -> list[str]:
        """Names of the plugins, in the order of registration."""
        return [name for name, _ in self.pluggy.list_name_plugin()]

    def kernels(self) -> list[KernelSpec]:
        """All kernels, third parties' before ours. Raises ValueError where two have one name."""
        kernels = [kernel for _, kernel in self._items("sloth_register_kernels", KernelSpec)]
        names = [kernel.name for kernel in kernels]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"kernel name {name!r} is registered twice: names are unique (see `sloth doctor`)"
                )
        return kernels

    def survey(self, model: nn.Module, settings: Settings) -> Survey:
        """All surveys in one; of two that name a module in the same role, the third party's counts."""
        sites: dict[tuple[str, str], Site] = {}
        skips: list[Skip] = []
        for name, answer in self._answers("sloth_survey_model", model=model, settings=settings):
            if not isinstance(answer, Survey):
                raise TypeError(_wrong(name, "sloth_survey_model", answer, "a Survey"))
            for site in answer.sites:
                sites.setdefault((site.module, site.role), site)
            skips.extend(answer.skips)
        found = {module for module, _ in sites}
        return Survey(
            sites=tuple(sites.values()), skips=tuple(skip for skip in skips if skip.module not in found)
        )

    def choose(
        self,
        site: Site,
        op: str,
        kernels: Sequence[KernelSpec],
        device: torch.device,
        dtype: torch.dtype,
        settings: Settings,
    ) -> KernelSpec | None:
        """The first plugin's choice among the kernels that can serve the site."""
        choice: KernelSpec | None = self.pluggy.hook.sloth_choose_kernel(
            site=site, op=op, kernels=kernels, device=device, dtype=dtype, settings=settings
        )
        if choice is not None and not any(choice is kernel for kernel in kernels):
            raise TypeError(
                f"sloth_choose_kernel chose {choice!r} for {site.module!r}, which is none of `kernels`"
            )
        return choice

    def plan(self, model: nn.Module, context: PlanContext) -> list[Patch | Skip]:
        """Every plugin's patches, each marked with the name of its plugin."""
        return [
            dataclasses.replace(item, plugin=name) if isinstance(item, Patch) else item
            for name, item in self._items("sloth_plan_patches", Patch, Skip, model=model, context=context)
        ]

    def plan_quantization(
        self, model: nn.Module | str, settings: Settings, budget: float | str
    ) -> Any | None:
        """The first plugin's quantization plan, or None."""
        return self.pluggy.hook.sloth_plan_quantization(model=model, settings=settings, budget=budget)

    def plan_checkpointing(self, model: nn.Module, settings: Settings) -> Any | None:
        """The first plugin's checkpointing plan, or None."""
        return self.pluggy.hook.sloth_plan_checkpointing(model=model, settings=settings)

    def check(self, model: nn.Module, patches: Sequence[Patch], settings: Settings) -> list[Skip]:
        """Every plugin's objections to the plan."""
        return [
            skip
            for _, skip in self._items(
                "sloth_check_plan", Skip, model=model, patches=tuple(patches), settings=settings
            )
        ]

    def patched(self, acceleration: Acceleration) -> None:
        """Tell every plugin that the model is patched."""
        self.pluggy.hook.sloth_patched(acceleration=acceleration)

    def restored(self, acceleration: Acceleration) -> None:
        """Tell every plugin that the model is as it was."""
        self.pluggy.hook.sloth_restored(acceleration=acceleration)

    def _answers(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Name and answer of each plugin that implements `hook`, third parties first; None is no answer."""
        caller = getattr(self.pluggy.hook, hook)
        plugins = [implementation.plugin for implementation in caller.get_hookimpls()]
        if not plugins:
            caller(**arguments)  # for the trace
        for plugin in reversed(plugins):  # pluggy's calling order: the last registered first, `trylast` last
            call = self.pluggy.subset_hook_caller(
                hook, remove_plugins=[p for p in plugins if p is not plugin]
            )
            for answer in call(**arguments):
                yield self.pluggy.get_name(plugin) or repr(plugin), answer

    def _items(self, hook: str, *types: type, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """The items of the lists that a hook's plugins answer with; TypeError names whose item is wrong."""
        wanted = "a list of " + " and ".join(kind.__name__ for kind in types)
        for name, answer in self._answers(hook, **arguments):
            if not isinstance(answer, list | tuple):
                raise TypeError(_wrong(name, hook, answer, wanted))
            for item in answer:
                if not isinstance(item, types):
                    raise TypeError(_wrong(name, hook, item, wanted))
                yield name, item


def _wrong(plugin: str, hook: str, answer: Any, wanted: str) -> str:
    return (
        f"plugin {plugin!r} answered {hook} with {type(answer).__name__} {answer!r:.80}: allowed is {wanted}"
    )


_MANAGER: Manager | None = None


def default_manager() -> Manager:
    """The process's manager, made at first use."""
    global _MANAGER
    if _MANAGER is None:
        _MANAGER = Manager()
    return _MANAGER
