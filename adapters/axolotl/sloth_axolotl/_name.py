"""The name `sloth` for Axolotl, whose own loader takes only `module.Class`; standard library only.

Axolotl 0.21 has an entry-point group for plugins, whose classes it always makes and calls: ours there is
inert (`_installed.py`). 0.19 and 0.20 have none: the autoload hook of torch imports this package.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sloth_plugins._autoload import after_import

NAME = "sloth"
DOTTED = "sloth_axolotl.SlothPlugin"
BASE = "axolotl.integrations.base"
UTILS = "axolotl.utils.config"
_warned = False


def give_name() -> None:
    """Let `plugins: [sloth]` resolve, now or when Axolotl is imported; a second call does nothing."""
    # A module that is what imports torch can't be awaited any more; the others come later.
    for name in (BASE, UTILS, "axolotl.cli.config"):
        after_import(name, _give_name)
    after_import(UTILS, _watch)


def _give_name(module: ModuleType) -> None:
    base: Any = sys.modules.get(BASE)
    own = getattr(base, "load_plugin", None)
    if own is None and module.__name__ == BASE:
        raise AttributeError(f"this Axolotl has no load_plugin; `plugins: [{DOTTED}]` may work")
    if own is None or hasattr(own, "sloth_own"):
        return

    @functools.wraps(own)
    def load_plugin(plugin_name: str, *args: Any, **kwargs: Any) -> Any:
        if plugin_name != NAME:
            return own(plugin_name, *args, **kwargs)
        try:
            from sloth_axolotl.plugin import SlothPlugin
        except ImportError as error:  # Axolotl 0.19 and 0.20 would go on without the plugin
            raise RuntimeError(f"sloth: plugins: [sloth] can't be loaded: {error}") from error
        return SlothPlugin()

    load_plugin.sloth_own = own  # type: ignore[attr-defined]
    base.load_plugin = load_plugin


def _watch(module: ModuleType) -> None:
    """Say so where `sloth:` is given to a run that doesn't name the plugin: Axolotl drops unknown keys."""
    own: Any = getattr(module, "validate_config", None)
    if own is None or hasattr(own, "sloth_own"):
        return

    @functools.wraps(own)
    def validate_config(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        warn_unlisted(cfg)
        return own(cfg, *args, **kwargs)

    validate_config.sloth_own = own  # type: ignore[attr-defined]
    module.validate_config = validate_config  # type: ignore[attr-defined]


def warn_unlisted(cfg: Mapping[str, Any]) -> None:
    """One warning where the raw config has `sloth:`, but not the plugin."""
    global _warned
    listed = cfg.get("plugins")
    listed = [listed] if isinstance(listed, str) else listed or []
    if _warned or cfg.get(NAME) is None or {NAME, DOTTED, DOTTED.replace(".", ":")} & {*map(str, listed)}:
        return
    _warned = True
    warnings.warn(
        "sloth: the config has `sloth:` but its `plugins:` don't list sloth, so nothing is accelerated: add "
        "`plugins: [sloth]`",
        stacklevel=3,
    )
