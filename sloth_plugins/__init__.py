"""Makes fine-tuning faster and smaller inside the trainer that you already use.

    import sloth_plugins as sloth

    acceleration = sloth.accelerate(model)      # before the optimizer is built
    print(acceleration.report)                  # what was patched, with which measured error, and what was left alone
    acceleration.undo()                         # the same modules, the same bits
"""

from sloth_plugins.engine import Acceleration, accelerate, plan
from sloth_plugins.hookspecs import hookimpl
from sloth_plugins.settings import Settings
from sloth_plugins.specs import (
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
