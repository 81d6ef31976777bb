"""The block `sloth:` of an Axolotl config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sloth_plugins import Settings
from sloth_plugins.quantization import Options
from sloth_plugins.settings import nearest

ALIAS = "memory_budget"


def _known(model: type[BaseModel], values: Any, name: str, where: str, *more: str) -> dict[str, Any]:
    """What is given of a block. ValueError for what is no block, and for a key that the model lacks."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: {values!r} in the Axolotl config: allowed is a block of options")
    fields = [*model.model_fields, *more]
    for key in values:
        if key not in fields:
            raise ValueError(
                f"{key!r} in {where}: allowed are {', '.join(fields)}.{nearest(str(key), fields)}"
            )
    return {key: value for key, value in values.items() if value is not None}


class Dynamic4bit(BaseModel):
    """The block `dynamic_4bit:`, for `sloth_plugins.plan_quantization`; other keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    budget: float | str = Field(
        1.1, description="bytes of the model over those of uniform NF4, or a size such as `5GB`"
    )
    calibration: str | None = Field(
        None,
        description="a file with texts like those of the use (docs/quantization.md); `null`: the run's own "
        "training rows",
    )
    samples: int = Field(
        128, ge=1, description="texts or training rows to take, at most; about 1,024 tokens are measured on"
    )
    keep: list[str] = Field(
        default_factory=list, description="linears that stay in 16 bits, by full dotted name"
    )
    plan: str | None = Field(
        None, description="a plan that was saved earlier, used instead of measuring; its budget is its own"
    )

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, values: Any) -> Any:
        known = _known(cls, values, "dynamic_4bit", "dynamic_4bit under sloth: of the Axolotl config")
        if "plan" in known and (more := {"calibration", "keep"} & {k for k, v in known.items() if v}):
            raise ValueError(
                f"plan and {min(more)} under dynamic_4bit in sloth: of the Axolotl config: a plan is used "
                "instead of measuring, give one of the two"
            )
        if "budget" in known:
            try:
                Options(budget=known["budget"])
            except ValueError as error:
                raise ValueError(f"{error} (dynamic_4bit under sloth: of the Axolotl config)") from None
        return known


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
        description="`auto`: plan it, within the budget or what the GPU has, in the place of "
        "`gradient_checkpointing`; `off`: leave it to Axolotl; `recompute`: recompute every decoder layer",
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
    dynamic_4bit: Dynamic4bit | None = Field(
        None,
        description="a block of options, `{}` for their defaults: with `load_in_4bit: true`, keep those "
        "linears in 16 bits where that buys the most accuracy",
    )

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, values: Any) -> Any:
        where = "sloth: of the Axolotl config"
        known = _known(cls, values, "sloth", where, ALIAS)
        for key in {"kernels", "checkpointing", "head_loss"} & known.keys():
            if known[key] is False:  # YAML's reading of a bare off
                known[key] = "off"
        if ALIAS in known:
            if "memory_budget_bytes" in known:
                raise ValueError(f"{ALIAS} and memory_budget_bytes in {where}: they are one option, give one")
            known["memory_budget_bytes"] = known.pop(ALIAS)
        own = {key: known.pop(key) for key in ("dynamic_4bit",) if key in known}
        try:
            checked = Settings.from_mapping(known, where).to_dict()
        except ValueError as error:
            raise ValueError(f"{error} (in {where})") from None
        return {key: checked[key] for key in known} | own

    def settings(self, **changes: Any) -> Settings:
        """The Settings that they stand for."""
        return Settings(**{**self.model_dump(exclude={"dynamic_4bit"}), **changes})


class SlothAxolotlArgs(BaseModel):
    """What the plugin adds to Axolotl's config."""

    sloth: SlothOptions | None = None


def option_table() -> str:
    """The options as a Markdown table, for the README."""
    lines = ["| option | default | |", "|---|---|---|"]
    fields = dict(SlothOptions.model_fields)
    fields |= {f"dynamic_4bit: {name}": field for name, field in Dynamic4bit.model_fields.items()}
    for name, field in fields.items():
        default = json.dumps(field.get_default(call_default_factory=True)).strip('"')
        lines.append(f"| `{name}` | `{default}` | {field.description} |")
    return "\n".join(lines)
