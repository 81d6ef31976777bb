"""The parts of the Axolotl adapter that need no Axolotl: the block `sloth:`, the README, the name's hook."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers import ROOT

from sloth_plugins import Settings, _autoload

pytest.importorskip("pydantic")
from sloth_axolotl import _name
from sloth_axolotl.args import Dynamic4bit, SlothAxolotlArgs, SlothOptions, option_table

ADAPTER = ROOT / "adapters" / "axolotl"


def test_every_setting_is_an_option_with_the_same_default() -> None:
    options = SlothOptions()
    settings = [field.name for field in dataclasses.fields(Settings)]
    assert [*SlothOptions.model_fields] == [*settings, "dynamic_4bit"]
    assert options.settings() == Settings()
    assert SlothAxolotlArgs().sloth is None


def test_options_become_settings_and_survive_axolotls_dump() -> None:
    given: dict[str, Any] = {"kernels": "torch", "memory_budget": "1.5GiB", "disable": "rope"}
    given |= {"checkpointing": False, "dynamic_4bit": {"budget": 1.2, "keep": ["a.b"]}}
    options = SlothAxolotlArgs.model_validate({"sloth": given}).sloth
    assert options is not None
    expected = Settings(kernels="torch", memory_budget_bytes="1.5GiB", disable=["rope"], checkpointing="off")
    assert options.settings() == expected
    dumped = SlothAxolotlArgs(sloth=options).model_dump(exclude_none=True)
    assert SlothOptions.model_validate(dumped["sloth"]).settings() == expected
    again = SlothOptions.model_validate(dumped["sloth"]).dynamic_4bit
    assert again == options.dynamic_4bit == Dynamic4bit(budget=1.2, keep=["a.b"])


def test_the_readmes_table_is_the_models() -> None:
    readme = (ADAPTER / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- options:begin -->\n")[1].split("\n<!-- options:end -->")[0]
    assert table == option_table()
    for block in readme.split("```yaml\n")[1:]:
        config = yaml.safe_load(block.split("```")[0])
        assert config["plugins"] == ["sloth"]
        SlothAxolotlArgs.model_validate({"sloth": config.get("sloth")})


@pytest.mark.parametrize("path", sorted(ADAPTER.glob("examples/*.yml")), ids=lambda path: path.stem)
def test_an_example_differs_by_the_plugin_alone(path: Any) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["plugins"] == ["sloth"]
    SlothAxolotlArgs.model_validate({"sloth": config.get("sloth")})


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for axolotl.integrations.base, of a version that nobody has seen."""
    monkeypatch.setattr(_name, "_warned", False)
    for name in ("axolotl", "axolotl.integrations", _name.BASE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return sys.modules[_name.BASE]


def test_other_names_go_to_axolotls_own_loader(axolotl: Any) -> None:
    axolotl.load_plugin = lambda plugin_name: ["own", plugin_name]
    _name._give_name(axolotl)
    wrapped = axolotl.load_plugin
    _name._give_name(axolotl)
    assert axolotl.load_plugin is wrapped, "wrapped once"
    assert axolotl.load_plugin("a.B") == ["own", "a.B"]
    with pytest.raises(RuntimeError, match=r"plugins: \[sloth\] can't be loaded"):
        axolotl.load_plugin("sloth")  # the stand-in has no BasePlugin


def test_an_axolotl_without_the_loader_is_one_warning(axolotl: Any) -> None:
    with pytest.warns(UserWarning, match=r"sloth: nothing is added .*sloth_axolotl\.SlothPlugin"):
        _autoload.after_import(_name.BASE, _name._give_name)


def test_a_block_without_the_plugin_is_one_warning(axolotl: Any) -> None:
    for listed in (["sloth"], ["sloth_axolotl.SlothPlugin"], ["sloth_axolotl:SlothPlugin"], "sloth"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _name.warn_unlisted({"sloth": {"strict": True}, "plugins": listed})
            _name.warn_unlisted({"plugins": None})
    with pytest.warns(UserWarning, match="nothing is accelerated") as caught:
        _name.warn_unlisted({"sloth": {"strict": True}})
        _name.warn_unlisted({"sloth": {"strict": True}, "plugins": ["other"]})
    assert len(caught) == 1
