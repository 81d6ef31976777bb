"""A plan as a picture: what each layer does with each tensor class, and the memory of the step."""

from __future__ import annotations

from pathlib import Path

from sloth_plugins.checkpointing.facts import CLASSES
from sloth_plugins.checkpointing.plan import CheckpointPlan, gib

_COLOURS = {"keep": "#4c78a8", "offload": "#72b7b2", "recompute": "#e45756"}


def draw(plan: CheckpointPlan, path: Path, title: str) -> None:
    """Write a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    layers = len(plan.layers)
    saved = plan.facts.saved_bytes(plan.shape)
    shown = [name for name in CLASSES if saved[name]]
    figure = Figure(figsize=(max(9.0, 0.2 * layers + 5), 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(1, 1))
    heights = [
        0.25 + 3 * saved[name] / sum(saved.values()) for name in shown
    ]  # a row's height tells its bytes
    tops = [sum(heights[: i + 1]) for i in range(len(heights))]
    for layer in range(layers):
        classes = plan.classes(layer)
        for name, top, height in zip(shown, tops, heights, strict=True):
            above.add_patch(
                Rectangle((layer - 0.45, top - height), 0.9, height * 0.92, color=_COLOURS[classes[name]])
            )
    above.set_xlim(-1, layers)
    above.set_ylim(tops[-1], 0)
    above.set_yticks(
        [top - height / 2 for top, height in zip(tops, heights, strict=True)],
        [f"{name} {saved[name] / 2**20:.1f} MiB" for name in shown],
    )
    above.set_xlabel("layer")
    above.legend(
        handles=[Patch(color=colour, label=name) for name, colour in _COLOURS.items()],
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    line = plan.timeline()
    sizes = [size / 2**30 for _, size in line]
    below.fill_between(range(len(line)), sizes, step="mid", color="#bab0ac")
    below.axhline(plan.budget_bytes / 2**30, color="#e45756", label=f"budget {gib(plan.budget_bytes)}")
    below.axhline(
        plan.peak_bytes / 2**30,
        color="#4c78a8",
        linestyle="--",
        label=f"predicted peak {gib(plan.peak_bytes)}",
    )
    below.set_ylim(
        0, max(*sizes, plan.peak_bytes / 2**30, min(plan.budget_bytes, 2 * plan.peak_bytes) / 2**30) * 1.1
    )
    below.set_xlim(0, len(line) - 1)
    below.set_ylabel("GiB on the device")
    below.set_xticks([layers // 2, layers, layers + layers // 2], ["forward", "head", "backward"])
    below.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title}, {plan.step_s * 1e3:.0f} ms a step\n{plan}", fontsize=10)
    figure.savefig(path, dpi=120)
