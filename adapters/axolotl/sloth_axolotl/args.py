"""The block `sloth:` of an Axolotl config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sloth_plugins import Settings
from sloth_plugins.settings import nearest

ALIAS = "memory_budget"


class SlothOptions(BaseModel):
    """Every field of `sloth_plugins.Settings`, which checks the values; other keys are refused."""

    model_config = ConfigDict(extra="forbid")

    kernels: str = Field(
        "auto",
        description="`auto`: Triton where a GPU driver is active, else PyTorch; `triton`; `torch`; `off`: "
        "patch nothing",
    )
    checkpointing: str = Field(
        "auto",
        description="`auto`: leave it to Axolotl unless a plugin plans it; `off`: leave it alone; "
        "`recompute`: recompute every decoder layer",
    )
    memory_budget_bytes: int | str | None = Field(
        None,
        description="device memory that a checkpointing plan may fill, such as `24GiB`; also written "
        "`memory_budget`",
    )
    verify: bool = Field(True, description="compare every patch with what it replaces before it is used")
    strict: bool = Field(False, description="stop with an error where a site is left alone")
    head_loss: str = Field(
        "auto",
        description="`auto`: the loss of the head without holding logits, where a kernel for it is there; "
        "`off`",
    )
    keep_float32: bool = Field(
        True,
        description="`false`: frozen weights that were cast up to float32 beside 4-bit layers go back to 16 "
        "bits, which loses nothing",
    )
    disable: list[str] | str = Field(
        default_factory=list,
        description="ops to leave alone, by the names in the report: `[rope, lora_mlp]`",
    )

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, values: Any) -> Any:
        where = "sloth: of the Axolotl config"
        if not isinstance(values, Mapping):
            raise ValueError(f"sloth: {values!r} in the Axolotl config: allowed is a block of options")
        fields = [*cls.model_fields, ALIAS]
        for key in values:
            if key not in fields:
                raise ValueError(
                    f"{key!r} in {where}: allowed are {', '.join(fields)}.{nearest(str(key), fields)}"
                )
        known = {key: value for key, value in values.items() if value is not None}
        for key in {"kernels", "checkpointing", "head_loss"} & known.keys():
            if known[key] is False:  # YAML's reading of a bare off
                known[key] = "off"
        if ALIAS in known:
            if "memory_budget_bytes" in known:
                raise ValueError(f"{ALIAS} and memory_budget_bytes in {where}: they are one option, give one")
            known["memory_budget_bytes"] = known.pop(ALIAS)
        try:
            checked = Settings.from_mapping(known, where).to_dict()
        except ValueError as error:
            raise ValueError(f"{error} (in {where})") from None
        return {key: checked[key] for key in known}

    def settings(self, **changes: Any) -> Settings:
        """The Settings that they stand for."""
        return Settings(**{**self.model_dump(), **changes})


class SlothAxolotlArgs(BaseModel):
    """What the plugin adds to Axolotl's config."""

    sloth: SlothOptions | None = None


def option_table() -> str:
    """The options as a Markdown table, for the README."""
    lines = ["| option | default | |", "|---|---|---|"]
    for name, field in SlothOptions.model_fields.items():
        default = json.dumps(field.get_default(call_default_factory=True)).strip('"')
        lines.append(f"| `{name}` | `{default}` | {field.description} |")
    return "\n".join(lines)
