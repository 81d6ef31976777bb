"""One word for Lightning: `Trainer(strategy="sloth")`.

    import sloth_lightning

    trainer = lightning.Trainer(strategy="sloth")

It works with `lightning.pytorch`, `pytorch_lightning` and both Fabrics. `sloth` runs on one device or as DDP,
by the number of devices, as "auto" does; `sloth_ddp` and `sloth_fsdp` name one. `SlothCallback` does the same
under any other strategy. Importing this package names the strategies in each registry: at once where that
package of Lightning is imported already, else when it will be.

`SlothStrategy`, `SlothCallback` and the others are those of `pytorch_lightning` where a script has imported
that alone, else those of `lightning.pytorch`. `sloth_lightning.lightning` and
`sloth_lightning.pytorch_lightning` hold each.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sloth_lightning._registry import register_strategies
from sloth_plugins import Settings

if TYPE_CHECKING:
    from sloth_lightning._core import prepare
    from sloth_lightning.lightning import (
        SlothCallback,
        SlothDDPStrategy,
        SlothFabricDDPStrategy,
        SlothFabricFSDPStrategy,
        SlothFabricStrategy,
        SlothFSDPStrategy,
        SlothStrategy,
    )

__all__ = [
    "Settings",
    "SlothCallback",
    "SlothDDPStrategy",
    "SlothFSDPStrategy",
    "SlothFabricDDPStrategy",
    "SlothFabricFSDPStrategy",
    "SlothFabricStrategy",
    "SlothStrategy",
    "prepare",
]

register_strategies()


def __getattr__(name: str) -> Any:
    """Import Lightning and torch when a class is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "prepare":
        return import_module("sloth_lightning._core").prepare
    older = "pytorch_lightning" in sys.modules or find_spec("lightning") is None
    own = "pytorch_lightning" if older and "lightning.pytorch" not in sys.modules else "lightning"
    return getattr(import_module(f"sloth_lightning.{own}"), name)
