"""`import sloth_plugins` needs the standard library alone: torch loads the package when it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import python_environment

import sloth_plugins


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=python_environment(), check=True
    )
    return done.stdout.strip()


def test_import_needs_neither_torch_nor_pluggy() -> None:
    code = "import sys; before = {*sys.modules}; import sloth_plugins; print(*{*sys.modules} - before)"
    assert set(run(code).split()) <= {"sloth_plugins", "__future__"}


def test_hookimpl_needs_no_torch() -> None:
    code = "import sys; from sloth_plugins import hookimpl, Settings; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_every_public_name_is_found_and_no_other() -> None:
    assert all(getattr(sloth_plugins, name) is not None for name in sloth_plugins.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        sloth_plugins.no_such_name  # noqa: B018
