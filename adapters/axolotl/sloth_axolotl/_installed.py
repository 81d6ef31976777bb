"""What Axolotl 0.21 makes of every installed plugin, whether a config names it or not."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from sloth_axolotl._name import give_name, warn_unlisted


class InstalledPlugin(BasePlugin):  # type: ignore[misc]
    """Does nothing but to give Axolotl the name `sloth`, for a config that uses it."""

    def __init__(self) -> None:
        super().__init__()
        give_name()

    def register(self, cfg: Any) -> None:
        """Axolotl's first call, with the raw config."""
        warn_unlisted(cfg)
