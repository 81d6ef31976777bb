"""What was done to a model and what was left alone, as a table for people and as JSON types for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sloth_plugins.specs import Skip

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "axolotl",
    "lightning",
)


@dataclass(frozen=True, kw_only=True)
class Patched:
    """One accelerated site.

    Errors are relative to float64, the largest over outputs and gradients; None: not verified.
    """

    module: str
    op: str
    kernel: str
    max_rel_error: float | None
    eager_rel_error: float | None
    plugin: str = ""


@dataclass(kw_only=True)
class Report:
    """The record of one acceleration (or, `planned`, of what one would do).

    `head` counts, while the model trains, how each output embedding's logits were asked for (see
    `sloth_plugins.head.COUNTS`).
    """

    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    checkpointing: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Mapping[str, int]] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    planned: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "patched": [asdict(row) for row in self.patched],
            "skipped": [asdict(row) for row in self.skipped],
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "checkpointing": dict(self.checkpointing),
            "head": {module: dict(counts) for module, counts in self.head.items()},
            "sites": dict(self.sites),
            "seconds": self.seconds,
            "planned": self.planned,
        }

    def head_line(self) -> str:
        """In one sentence a head: which way the losses took since the model was patched; "" without one."""
        said = []
        for module, counts in self.head.items():
            ways = {"fused": "fused", "in_chunks": "in chunks", "materialised": "from all logits"}
            ways |= {"late": "read after the weights had changed"} if counts["late"] else {}
            asked = ", ".join(f"{counts[key]} {way}" for key, way in ways.items())
            if not counts["deferred"]:
                asked = "the patch stood idle, because no loss asked this module for logits"
                asked += " (the trainer has a head of its own that reads the weight)"
            said.append(f"{module}: {asked}; {counts['own_forward']} calls of its own forward")
        return "\n".join(said)

    def to_json(self) -> str:
        """The report as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def print(self, console: Any = None) -> None:
        """Print the tables, with rich."""
        from rich.console import Console

        (console or Console()).print(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.table import Table
        from rich.text import Text

        # Text, because rich would take brackets in names and in the messages of errors for its own markup.
        verb = "would patch" if self.planned else "patched"
        yield f"sloth {verb} {len(self.patched)} sites, left {len(self.skipped)} alone ({self.seconds:.1f} s)"
        if self.patched:
            table = Table()
            for column in ("op", "kernel", "modules"):
                table.add_column(column, overflow="fold")
            for column in ("sites", "error to\nfloat64", "eager's"):
                table.add_column(column, justify="right")
            for (op, kernel), rows in _grouped((row.op, row.kernel, row) for row in self.patched).items():
                modules = shorten([row.module for row in rows])
                ours, eager = _worst(r.max_rel_error for r in rows), _worst(r.eager_rel_error for r in rows)
                short = kernel.removesuffix(f".{op}")  # the op has a column, and long names would be folded
                table.add_row(Text(op), Text(short), Text(modules), str(len(rows)), ours, eager)
            yield table
        if self.skipped:
            table = Table()
            for column in ("left alone", "modules", "why"):
                table.add_column(column, overflow="fold")
            for (op, reason), skips in _grouped(
                (skip.op, skip.reason, skip) for skip in self.skipped
            ).items():
                table.add_row(Text(op), Text(shorten([skip.module for skip in skips])), Text(reason))
            yield table
        if self.checkpointing:
            plan = self.checkpointing
            text = f"checkpointing: {plan.get('chosen')} ({plan.get('reason')})"
            if "predicted_peak_bytes" in plan:
                text += f"; peak predicted {plan['predicted_peak_bytes'] / 2**30:.2f} GiB"
                if "measured_peak_bytes" in plan:
                    text += f", measured {plan['measured_peak_bytes'] / 2**30:.2f} GiB"
                elif "earlier_peak_bytes" in plan:
                    earlier = f"{plan['earlier_peak_bytes'] / 2**30:.2f} GiB"
                    text += f", measured less than the {earlier} before weights were moved to host memory"
            yield Text(text)
        if any(any(counts.values()) for counts in self.head.values()):
            yield Text(f"head: {self.head_line()}")
        for note in self.notes:
            yield Text(f"note: {note}")


def shorten(modules: list[str]) -> str:
    """Module names with their layer numbers folded: "model.layers.{0-29}.mlp"."""
    folded: dict[str, list[int]] = {}
    for module in modules:
        parts = module.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        pattern = module or "(the model)"
        if index is not None:
            pattern = ".".join([*parts[:index], "{}", *parts[index + 1 :]])
            folded.setdefault(pattern, []).append(int(parts[index]))
        else:
            folded.setdefault(pattern, [])
    return "\n".join(pattern.replace("{}", _ranges(numbers), 1) for pattern, numbers in folded.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{{{text}}}" if len(set(numbers)) > 1 else text


def _grouped(items: Iterable[tuple[str, str, Any]]) -> dict[tuple[str, str], list[Any]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for first, second, item in items:
        groups.setdefault((first, second), []).append(item)
    return groups


def _worst(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.1e}" if known else "not verified"


def environment() -> dict[str, Any]:
    """Versions and the GPU's name, for the report and for `sloth doctor`."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, such as +cu130
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found
