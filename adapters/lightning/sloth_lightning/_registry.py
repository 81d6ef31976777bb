"""The strategies' names, in the four registries of Lightning; imports neither torch nor Lightning."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from sloth_plugins._autoload import after_import

TRAINER = {"sloth": "SlothStrategy", "sloth_ddp": "SlothDDPStrategy", "sloth_fsdp": "SlothFSDPStrategy"}
FABRIC = {
    "sloth": "SlothFabricStrategy",
    "sloth_ddp": "SlothFabricDDPStrategy",
    "sloth_fsdp": "SlothFabricFSDPStrategy",
}
# Module of Lightning: its registry, the module of ours with the classes, and their names.
REGISTRIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "lightning.pytorch.strategies": ("StrategyRegistry", "lightning", TRAINER),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", "lightning", FABRIC),
    "pytorch_lightning.strategies": ("StrategyRegistry", "pytorch_lightning", TRAINER),
    "lightning_fabric.strategies": ("STRATEGY_REGISTRY", "pytorch_lightning", FABRIC),
}


class _Maker:
    """Makes a strategy when its name is used: Lightning isn't wholly imported when it is registered."""

    def __init__(self, own: str, name: str) -> None:
        self.own, self.name = own, name

    def __call__(self, **settings: Any) -> Any:
        return getattr(import_module(f"sloth_lightning.{self.own}"), self.name)(**settings)


def register_strategies() -> None:
    """Register the names, in each package of Lightning now or when it is imported; again does nothing."""
    for name in REGISTRIES:
        after_import(name, _register)


def _register(module: ModuleType) -> None:
    registry_name, own, classes = REGISTRIES[module.__name__]
    registry = getattr(module, registry_name)
    for name, cls in classes.items():
        if name not in registry:
            registry.register(name, _Maker(own, cls), description=f"{cls} of sloth-plugins")
