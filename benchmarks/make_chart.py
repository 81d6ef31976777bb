"""The pictures of whole training steps in README.md, from the newest `results/*-steps*.jsonl`, and of budgets
from the newest `results/*-budgets*.jsonl`.

python benchmarks/make_chart.py            # writes docs/steps.png and docs/budgets.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURE, BUDGETS = (ROOT / "docs" / f"{name}.png" for name in ("steps", "budgets"))
NAMES = {"sloth": "sloth-plugins", "unsloth": "Unsloth", "axolotl": "Axolotl's kernels", "hf": "plain PEFT"}
COLOURS = {"sloth": "#1b7f5c", "unsloth": "#8b98a5", "axolotl": "#a9b3bd", "hf": "#c8cfd6"}


def newest(kind: str) -> list[dict[str, Any]]:
    """The rows of the newest file of a kind; the second one of a day ends in -2, whatever the GPU."""

    def age(path: Path) -> tuple[str, int]:
        number = path.stem.rpartition("-")[2]
        return path.stem[: len("2026-11-21")], int(number) if number.isdigit() else 1

    path = max((ROOT / "benchmarks" / "results").glob(f"*-{kind}*.jsonl"), key=age)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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

    groups = cases(newest("steps"))
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
    plt.close(figure)
    # "none" is what "auto" comes to there, in the same place of the picture.
    rows = [row for row in newest("budgets") if (row["B"], row["S"]) == (2, 2048)]
    several: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["tok_s"]):
        several.setdefault((row["impl"], row["ck"]), []).append(row)
    # Of cases that were measured more than once the one in the middle, of two the faster.
    draw_budgets([own[len(own) // 2] for case, own in several.items() if case != ("sloth", "none")])


def unlike(row: dict[str, Any]) -> bool:
    """Whether the slowest step took much longer than the fastest: something else was going on."""
    return bool(row.get("most_ms", 0) > 1.3 * row.get("least_ms", row["ms"]))


def said(row: dict[str, Any]) -> str:
    """What a row's step does with its activations."""
    word, _, budget = row["ck"].partition(":")
    whose = NAMES[row["impl"]] if row["impl"] != "sloth" else "sloth"
    ways = {
        "none": "keeps all",
        "auto": "without a budget",
        "hf": "recomputes all layers",
        "offload": "its offload",
    }
    return f"{budget} GiB" if word == "auto" and budget else f"{whose} {ways.get(word, word)}"


def draw_budgets(rows: list[dict[str, Any]]) -> None:
    """Tokens/s over the peak memory of the steps; planned ones joined by a line, but for unlike steps."""
    import matplotlib.pyplot as plt

    rows = [{**row, "peak_gb": row.get("steady_gb", row["peak_gb"])} for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.2))
    planned = [row for row in rows if row["ck"].startswith("auto") and not unlike(row)]
    others = [row for row in rows if row not in planned]
    for own, line in ((planned, "-"), *(([row], "none") for row in others)):
        own = sorted(own, key=lambda row: row["peak_gb"])
        axes.plot(
            [row["peak_gb"] for row in own], [row["tok_s"] for row in own],
            marker="o", linestyle=line, color=COLOURS[own[0]["impl"]],
            markerfacecolor="white" if unlike(own[0]) else None,
        )  # fmt: skip
        for i, row in enumerate(own):  # in turns on both sides of the line
            place, side = ((-5, 5), "right") if i % 2 else ((7, -11), "left")
            least, most = (row.get(key, row["ms"]) for key in ("least_ms", "most_ms"))
            steps = f" ({least:.0f} to {most:.0f} ms)" if unlike(row) else ""
            axes.annotate(
                f"{said(row)}: {row['tok_s']:,}{steps}", (row["peak_gb"], row["tok_s"]), place,
                textcoords="offset points", fontsize=8, horizontalalignment=side,
            )  # fmt: skip
    axes.set_xlim(0, 1.28 * max(row["peak_gb"] for row in rows))
    axes.set_ylim(0, 1.12 * max(row["tok_s"] for row in rows))
    axes.set_xlabel("peak memory of the steps, GiB", fontsize=9)
    axes.set_ylabel("tokens/s", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    title = f"sloth under budgets: QLoRA, Llama-8B shapes, 2 x 2,048 tokens, {rows[0]['gpu']}"
    axes.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(BUDGETS, dpi=110)


if __name__ == "__main__":
    main()
