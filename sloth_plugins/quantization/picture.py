"""The plan as a picture: what 4 bits would cost each linear, and where the bytes went."""

from __future__ import annotations

from pathlib import Path

from sloth_plugins.quantization.plan import Choice, QuantizationPlan

_COLOURS = {64: "#4c78a8", 32: "#72b7b2", None: "#e45756"}


def draw(plan: QuantizationPlan, path: Path, title: str) -> None:
    """Write a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    places: dict[tuple[int, str], Choice] = {}
    for choice in plan.choices:
        parts = choice.module.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        places[int(parts[at]) if parts[at].isdigit() else 0, ".".join(parts[at + 1 :])] = choice
    kinds = list(dict.fromkeys(kind for _, kind in places))
    layers = 1 + max(layer for layer, _ in places)
    figure = Figure(figsize=(max(6.0, 0.28 * layers + 3), 0.45 * len(kinds) + 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max((choice.kl or 0.0 for choice in plan.choices), default=0.0)
    for (layer, kind), choice in places.items():
        # The area tells the KL; without a measurement all are as large.
        side = 0.9 if not most or choice.kl is None else 0.15 + 0.75 * (choice.kl / most) ** 0.5
        colour = _COLOURS.get(choice.blocksize, "#888888")
        x, y = layer - side / 2, kinds.index(kind) - side / 2
        axes.add_patch(Rectangle((x, y), side, side, color=colour))
    axes.set_xlim(-1, layers)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(f"{title}\n{plan.total_bytes / 1e6:.1f} MB, {plan.ratio:.3f} of uniform NF4", fontsize=10)
    names: dict[int | None, str] = {None: "16 bits", **{size: f"NF4, blocks of {size}" for size in (64, 32)}}
    used = {choice.blocksize for choice in plan.choices}
    axes.legend(
        handles=[Patch(color=_COLOURS[size], label=name) for size, name in names.items() if size in used],
        loc="upper left",
        bbox_to_anchor=(1, 1),
        title="size: KL of 4 bits" if most else None,
    )
    figure.savefig(path, dpi=120)
