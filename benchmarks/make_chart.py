"""The picture of whole training steps in README.md, from the newest `results/*-steps*.jsonl`.

python benchmarks/make_chart.py            # writes docs/steps.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "steps.png"
NAMES = {"sloth": "sloth-plugins", "unsloth": "Unsloth", "axolotl": "Axolotl's kernels", "hf": "plain PEFT"}
COLOURS = {"sloth": "#1b7f5c", "unsloth": "#8b98a5", "axolotl": "#a9b3bd", "hf": "#c8cfd6"}


def newest() -> Path:
    """The newest file of steps; the second one of a day ends in -2."""
    return max((ROOT / "benchmarks" / "results").glob("*-steps*.jsonl"), key=lambda path: path.stem)


def cases(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by case, for the cases that a peer was measured in too; the fastest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["r"] == 16 and not row["dropout"] and row["targets"] == "all seven":
            base = "QLoRA" if row["mode"] == "qlora" else "LoRA, bf16 weights"
            found.setdefault(f"{base}, {row['B']} x {row['S']:,}", []).append(row)
    return {name: sorted(own, key=lambda row: -row["tok_s"]) for name, own in found.items() if len(own) > 1}


def main() -> None:
    """Draw it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source = newest()
    groups = cases([json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()])
    heights = [len(own) for own in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8, 0.36 * sum(heights) + 0.5 * len(groups) + 0.5), sharex=True,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (name, own) in zip(axes, groups.items(), strict=True):
        for i, row in enumerate(own):
            axis.barh(i, row["tok_s"], color=COLOURS[row["impl"]], height=0.72)
            text = f"{row['tok_s']:,}   {row['peak_gb']:.1f} GiB"
            axis.text(row["tok_s"] + 150, i, text, va="center", fontsize=9)
        axis.set_yticks(range(len(own)), [NAMES[row["impl"]] for row in own], fontsize=9)
        axis.invert_yaxis()
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", length=0, labelbottom=False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_xlim(0, 1.25 * max(row["tok_s"] for own in groups.values() for row in own))
    gpu = next(iter(groups.values()))[0]["gpu"]
    figure.text(
        0.01, 0.005, f"Tokens/s and peak memory of a training step, Llama-8B shapes, {gpu}", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
