"""Trainers find our names with no import of ours: `Trainer(strategy="sloth")`, `plugins: [sloth]`.

torch calls `autoload` at the end of `import torch` (entry-point group `torch.backends`; off with
TORCH_DEVICE_BACKEND_AUTOLOAD=0). It only notes which of our modules to import once a trainer's module has
been imported. An exception here would break `import torch` in every program of the environment, so there is
none; and nothing but the standard library is imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AFTER = {
    "lightning.pytorch.strategies": "sloth_lightning",
    "lightning.fabric.strategies": "sloth_lightning",
    "pytorch_lightning.strategies": "sloth_lightning",
    "lightning_fabric.strategies": "sloth_lightning",
    # Three, because the first may be what imports torch and then can't be awaited any more.
    "axolotl.integrations.base": "sloth_axolotl",
    "axolotl.utils.config": "sloth_axolotl",
    "axolotl.cli.config": "sloth_axolotl",
}
"""A module -> the module of ours that is imported when that one has been."""

Action = Callable[[ModuleType], object]


def autoload() -> None:
    """Import each module of AFTER when its trainer has been imported. Never raises."""
    try:
        for name, own in AFTER.items():
            after_import(name, _Importer(own))
    except Exception as error:
        _warn(f"not loaded with torch ({type(error).__name__}: {error})")


def after_import(name: str, action: Action) -> None:
    """Call `action(module)` once the module `name` has been executed: now, where it has been already.

    An exception of `action` is a warning: the import of `name` succeeds.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        _run(action, module)
        return
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    actions = finder.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)


class _Importer:
    """Imports a module of ours; equal where the module is, so that a second `autoload` adds nothing."""

    def __init__(self, own: str) -> None:
        self.own = own

    def __call__(self, module: ModuleType) -> None:
        importlib.import_module(self.own)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Importer) and other.own == self.own

    def __hash__(self) -> int:
        return hash(self.own)


class _Finder(MetaPathFinder):
    """Stands before the other finders for the awaited names alone, and wraps the loader that they find."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None  # the other finders' business; no action then
        spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """The found loader, with the actions after it has executed the module."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module has the loader that it would have without us.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        while actions := self._finder.actions.pop(module.__name__, None):  # an action may add another
            for action in actions:
                _run(action, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _run(action: Action, module: ModuleType) -> None:
    try:
        action(module)
    except Exception as error:
        _warn(f"nothing is added to {module.__name__} ({type(error).__name__}: {error})")


def _warn(message: str) -> None:
    try:
        warnings.warn(f"sloth: {message}", stacklevel=3)
    except Warning:  # `python -W error`: an import must not fail for it
        print(f"sloth: {message}", file=sys.stderr)
