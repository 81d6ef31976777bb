"""Makes fine-tuning faster and smaller inside the trainer that you already use.

    import sloth_plugins as sloth

    acceleration = sloth.accelerate(model)      # before the optimizer is built
    print(acceleration.report)                  # what was patched, with which error, and what was left alone
    acceleration.undo()                         # the same modules, the same bits

The trainers' adapters do this for you: `sloth_hf_trainer.SlothCallback`.
"""

from __future__ import annotations

# torch loads this package when it is imported itself (`_autoload`): nothing is imported before it is needed,
# not even typing, and type checkers take this name for typing's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sloth_plugins.engine import Acceleration, accelerate, plan
    from sloth_plugins.hookspecs import hookimpl
    from sloth_plugins.quantization import QuantizationPlan, plan_quantization
    from sloth_plugins.settings import Settings
    from sloth_plugins.specs import (
        BadInputError,
        ConflictError,
        KernelSpec,
        NotASite,
        Patch,
        Site,
        Skip,
        SkippedSiteError,
        SlothError,
        Survey,
    )

__version__ = "0.1.0"
__all__ = [
    "Acceleration",
    "BadInputError",
    "ConflictError",
    "KernelSpec",
    "NotASite",
    "Patch",
    "QuantizationPlan",
    "Settings",
    "Site",
    "Skip",
    "SkippedSiteError",
    "SlothError",
    "Survey",
    "accelerate",
    "hookimpl",
    "plan",
    "plan_quantization",
]


_HOMES = {
    "Acceleration": "engine",
    "QuantizationPlan": "quantization",
    "Settings": "settings",
    "accelerate": "engine",
    "hookimpl": "hookspecs",
    "plan": "engine",
    "plan_quantization": "quantization",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is asked for: `sloth --help`, for one, needs neither torch nor
    pluggy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'specs')}"), name)
    globals()[name] = value
    return value
