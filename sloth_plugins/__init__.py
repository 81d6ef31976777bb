"""Makes fine-tuning faster and smaller inside the trainer that you already use.

    import sloth_plugins as sloth

    acceleration = sloth.accelerate(model)      # before the optimizer is built
    print(acceleration.report)                  # what was patched, with which error, and what was left alone
    acceleration.undo()                         # the same modules, the same bits

The trainers' adapters do this for you: `sloth_hf_trainer.SlothCallback`.
"""

from typing import TYPE_CHECKING, Any

from sloth_plugins.hookspecs import hookimpl
from sloth_plugins.settings import Settings

if TYPE_CHECKING:
    from sloth_plugins.engine import Acceleration, accelerate, plan
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
    "Settings",
    "Site",
    "Skip",
    "SkippedSiteError",
    "SlothError",
    "Survey",
    "accelerate",
    "hookimpl",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: `sloth --help`, for one, never does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sloth_plugins import engine, specs

    value = getattr(engine if name in ("Acceleration", "accelerate", "plan") else specs, name)
    globals()[name] = value
    return value
