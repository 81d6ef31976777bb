"""What a user can set, in one frozen type that every adapter translates into."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kernels = Literal["auto", "triton", "torch", "off"]
HeadLoss = Literal["auto", "off"]
CHECKPOINTING = ("auto", "off", "recompute")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "gated_mlp",
    "rope",
    "qk_norm_rope",
    "lora_linear",
    "lora_mlp",
    "linear_cross_entropy",
    "linear_log_probs",
)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' for the allowed name closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse_bytes(value: int | str, setting: str = "memory_budget_bytes") -> int:
    """`value` in bytes: an int, or a string with a unit such as "20GiB", "800 MB" or "1.5TB".

    Raises ValueError, naming `setting`, for anything else and for what is not positive.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(
                f'{setting}={value!r}: allowed are bytes as an integer or a size such as "20GiB"'
            )
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'{setting}={value!r}: allowed are bytes as an integer or a size such as "20GiB"')
    if value <= 0:
        raise ValueError(f"{setting}={value!r}: allowed is a positive number of bytes")
    return value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one acceleration.

    Raises ValueError that names the setting, the value and what is allowed.
    """

    kernels: Kernels = "auto"
    """"auto": Triton where a GPU driver is active, else the PyTorch references. "off": patch nothing."""
    checkpointing: Any = "auto"
    """"auto": plan at the first batch what each decoder layer keeps, offloads and recomputes, within
    memory_budget_bytes or else within what the GPU has; without both, leave it to the trainer. A plugin's
    plan comes before. "off": leave it alone. "recompute": recompute every decoder layer. Or a plan: a
    CheckpointPlan or a plugin's."""
    memory_budget_bytes: int | None = None
    """Bytes of device memory that a training step may fill, weights included; None: most of what the GPU has.
    Sizes such as "20GiB" are accepted and stored in bytes."""
    verify: bool = True
    """Run every patch against the module that it replaces and against float64 before it is used."""
    strict: bool = False
    """Raise where a site is skipped, instead of leaving it to the model's own code with a reason in the
    report.
    """
    head_loss: HeadLoss = "auto"
    """"auto": compute the loss of the head without holding logits where a kernel for it is there."""
    keep_float32: bool = True
    """False: frozen float32 weights beside 4-bit layers whose values are 16-bit ones (as PEFT's
    prepare_model_for_kbit_training leaves norms, embeddings and head) are kept in 16 bits until undo."""
    disable: frozenset[str] = frozenset()
    """Ops to leave alone, by name (`sloth_plugins.settings.OPS`, and names that plugins add with a dot)."""

    def __post_init__(self) -> None:
        _one_of("kernels", self.kernels, get_args(Kernels))
        _one_of("head_loss", self.head_loss, get_args(HeadLoss))
        if isinstance(self.checkpointing, str):
            _one_of("checkpointing", self.checkpointing, CHECKPOINTING)
        elif not hasattr(self.checkpointing, "apply"):
            raise ValueError(
                f"checkpointing={self.checkpointing!r}: allowed are {', '.join(map(repr, CHECKPOINTING))} or "
                "a plan (an object with apply(model))"
            )
        for name in ("verify", "strict", "keep_float32"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are True and False")
        if self.memory_budget_bytes is not None:
            object.__setattr__(self, "memory_budget_bytes", parse_bytes(self.memory_budget_bytes))
        disable: Any = (self.disable,) if isinstance(self.disable, str) else self.disable
        disable = tuple(disable) if isinstance(disable, Iterable) else None  # an iterator can be read once
        if disable is None or not all(isinstance(op, str) for op in disable):
            raise ValueError(
                f"disable={self.disable!r}: allowed is a list of op names out of {', '.join(OPS)}"
            )
        for op in disable:
            if op not in OPS and "." not in op:
                raise ValueError(
                    f"disable={op!r}: allowed are {', '.join(OPS)} and names that plugins add with a dot."
                    + nearest(op, OPS)
                )
        object.__setattr__(self, "disable", frozenset(disable))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "Settings") -> Settings:
        """Settings from a config block; ValueError for an unknown key, with the nearest name and `where`."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise ValueError(
                    f"{key!r} in {where}: allowed are {', '.join(fields)}.{nearest(str(key), fields)}"
                )
        return cls(**values)

    @classmethod
    def resolve(cls, settings: Settings | None, overrides: Mapping[str, Any], where: str) -> Settings:
        """`settings` (default ones for None) with keyword `overrides`, whose keys are checked."""
        if settings is not None and not isinstance(settings, Settings):
            raise ValueError(f"settings={settings!r} in {where}: allowed is a sloth_plugins.Settings")
        if not overrides:
            return settings or cls()
        checked = (
            {name: getattr(settings, name) for name in (f.name for f in dataclasses.fields(cls))}
            if settings
            else {}
        )
        return cls.from_mapping({**checked, **overrides}, where)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["disable"] = sorted(self.disable)
        if not isinstance(self.checkpointing, str):
            values["checkpointing"] = repr(self.checkpointing)
        return values


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}.{hint}")
