"""One line in an Axolotl config that accelerates the model: `plugins: [sloth]`.

Importing this package gives Axolotl the short name and nothing else; `plugins: [sloth_axolotl.SlothPlugin]`
is the same without a short name. Options stand under one key, `sloth:` (adapters/axolotl/README.md).
"""

from typing import TYPE_CHECKING, Any

from sloth_axolotl._name import give_name

if TYPE_CHECKING:
    from sloth_axolotl.args import SlothAxolotlArgs
    from sloth_axolotl.plugin import SlothPlugin

__all__ = ["SlothAxolotlArgs", "SlothPlugin"]

give_name()


def __getattr__(name: str) -> Any:
    """The classes import Axolotl and pydantic, so they are made when they are asked for."""
    if name == "SlothPlugin":
        from sloth_axolotl.plugin import SlothPlugin

        return SlothPlugin
    if name == "SlothAxolotlArgs":
        from sloth_axolotl.args import SlothAxolotlArgs

        return SlothAxolotlArgs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
