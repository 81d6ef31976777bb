"""Settings: every value is checked when it is given; the message says what was wrong and what is allowed."""

import dataclasses
import json
from typing import Any

import pytest

from sloth_plugins.settings import OPS, Settings, parse_bytes


class Plan:
    """A checkpointing plan, as far as Settings look at it."""

    def apply(self, model: Any) -> Any:
        return lambda: None


GOOD: dict[str, tuple[Any, ...]] = {
    "kernels": ("auto", "triton", "torch", "off"),
    "checkpointing": ("auto", "off", "recompute", Plan()),
    "memory_budget_bytes": (None, 1, 2**40, "20GiB"),
    "verify": (True, False),
    "strict": (True, False),
    "head_loss": ("auto", "off"),
    "keep_float32": (True, False),
    "disable": ((), "rope", ["rope", "gated_mlp"], {"rms_norm"}, ["mine.conv"]),
}
# Field -> bad values, and what the message must hold beside the field's name and the value.
BAD: dict[str, tuple[tuple[Any, str], ...]] = {
    "kernels": (
        ("trition", "Did you mean 'triton'?"),
        ("", "'auto'"),
        (None, "'off'"),
        (True, "'torch'"),
        (["auto"], "'auto'"),
    ),
    "checkpointing": (
        ("recomputed", "Did you mean 'recompute'?"),
        (None, "'auto'"),
        (True, "apply(model)"),
        (1, "'off'"),
    ),
    "memory_budget_bytes": (
        (0, "positive"),
        (-1, "positive"),
        (True, "20GiB"),
        (1.5, "20GiB"),
        ("20 parsecs", "20GiB"),
        ("GiB", "20GiB"),
        ("-5GiB", "20GiB"),
        ("0 MB", "positive"),
        ("", "20GiB"),
        ([1], "20GiB"),
    ),
    "verify": ((1, "True and False"), ("yes", "True and False"), (None, "True and False")),
    "strict": ((0, "True and False"), ("true", "True and False")),
    "head_loss": (("automatic", "'auto'"), (False, "'off'")),
    "keep_float32": ((None, "True and False"), ("no", "True and False")),
    "disable": (
        ("rms_norms", "Did you mean 'rms_norm'?"),
        (["rope", "conv"], "gated_mlp"),
        ([1], "rope"),
        (None, "rope"),
        (3, "rope"),
    ),
}


def test_every_field_is_tested() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields == GOOD.keys() == BAD.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in GOOD.items() for value in values]
)
def test_good_values_are_taken(name: str, value: Any) -> None:
    settings = Settings(**{name: value})
    assert json.loads(json.dumps(settings.to_dict()))[name] is not None or value is None


@pytest.mark.parametrize(
    ("name", "value", "text"), [(name, *case) for name, cases in BAD.items() for case in cases], ids=repr
)
def test_bad_values_are_named(name: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Settings(**{name: value})
    message = str(caught.value)
    assert name in message
    assert text in message
    # A list is named by its bad entry, a size with a unit by what it comes to.
    shown = "conv" if value == ["rope", "conv"] else "0" if value == "0 MB" else repr(value)
    assert shown in message


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * 2**30),
        ("800 MB", 800 * 10**6),
        (" 1.5 TB ", 1_500_000_000_000),
        ("3kib", 3072),
        ("7", 7),
        ("512 B", 512),
        ("2tib", 2**41),
        (123, 123),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size
    assert Settings(memory_budget_bytes=text).memory_budget_bytes == size


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("kernel", "kernels"), ("memory_budget", "memory_budget_bytes"), ("disabled", "disable")],
)
def test_unknown_keys_are_refused_with_the_nearest_name(key: str, nearest: str) -> None:
    for make in (
        lambda: Settings.from_mapping({key: 1}, "sloth: in config.yml"),
        lambda: Settings.resolve(Settings(), {key: 1}, "sloth: in config.yml"),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        message = str(caught.value)
        assert repr(key) in message and f"Did you mean {nearest!r}?" in message
        assert "sloth: in config.yml" in message and "head_loss" in message


def test_an_unknown_key_unlike_any_other_gets_the_list_alone() -> None:
    with pytest.raises(ValueError, match="allowed are kernels, checkpointing") as caught:
        Settings.from_mapping({"zzz": 1})
    assert "Did you mean" not in str(caught.value)


def test_frozen_and_comparable() -> None:
    settings = Settings(disable=["rope", "rms_norm"], memory_budget_bytes="1GiB")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.kernels = "off"  # type: ignore[misc]
    same = Settings(disable={"rms_norm", "rope"}, memory_budget_bytes=2**30)
    assert settings == same and hash(settings) == hash(same)
    assert settings != Settings(disable=["rope"]) and len({settings, same, Settings()}) == 2
    with pytest.raises(TypeError):
        Settings("auto")  # type: ignore[misc]


def test_disable_reads_an_iterator_once() -> None:
    assert Settings(disable=(op for op in OPS)).disable == frozenset(OPS)


def test_overrides_win_over_settings_and_are_checked() -> None:
    base = Settings(kernels="torch", strict=True)
    assert Settings.resolve(None, {}, "here") == Settings()
    assert Settings.resolve(base, {}, "here") is base
    changed = Settings.resolve(base, {"kernels": "off"}, "here")
    assert changed == Settings(kernels="off", strict=True) and base.kernels == "torch"
    with pytest.raises(ValueError, match="kernels='fast'"):
        Settings.resolve(base, {"kernels": "fast"}, "here")
    with pytest.raises(ValueError, match=r"settings=\{'kernels': 'off'\} in here"):
        Settings.resolve({"kernels": "off"}, {}, "here")  # type: ignore[arg-type]


def test_to_dict_is_json() -> None:
    settings = Settings(disable=["rope", "gated_mlp"], checkpointing=Plan(), memory_budget_bytes="2 GB")
    values = json.loads(json.dumps(settings.to_dict()))
    assert values["disable"] == ["gated_mlp", "rope"]
    assert "Plan" in values["checkpointing"]
    assert values["memory_budget_bytes"] == 2 * 10**9
    assert Settings.from_mapping(Settings(strict=True).to_dict()) == Settings(strict=True)
