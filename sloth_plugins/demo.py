"""The demonstration: one real fine-tune, twice, without and with `SlothCallback()`, and what that changed.

SmolLM2-135M-Instruct gets a LoRA on the language reference that every Python carries (`pydoc_data.topics`),
through the plain Trainer of transformers. Both trainings start from the same seed and the same adapter and
see the same text in the same order. Each runs in a process of its own, one after the other, so that neither
sees the other's caches or peak memory.

    python -m sloth_plugins.demo --output demo_output
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sloth_plugins.report import Patched, Report
from sloth_plugins.smollm2 import MissingPackageError, require, smollm2_dir
from sloth_plugins.specs import Skip

VARIANTS = ("plain", "sloth")
LABELS = {"plain": "without", "sloth": "with SlothCallback"}
LORA_RANK = 16
LEARNING_RATE = 1e-3
HELD_OUT_BLOCKS = 4
PASSES = 4  # over the text, so that the loss visibly falls in a few steps
# Below this, a median of step times says nothing.
MEASURED_STEPS = 8
# Two runs that differ only in rounding stay well within this; a wrong gradient does not.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_MODULES = ("torch", "transformers", "accelerate", "peft", "gguf", "matplotlib")
_GIB = 2**30


class DemoError(RuntimeError):
    """One of the two trainings did not end well; its own message stands above."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training as its process measured it.

    Memory is CUDA memory on a GPU, and the resident set of the process on a CPU.
    """

    variant: str
    losses: list[float]
    step_times_ms: list[float]
    """From the beginning of a step to that of the next, so that data, logging and callbacks count as well."""
    tokens_per_step: int
    held_out_losses: tuple[float, float]
    """On text that is not trained on, before and after."""
    setup_s: float
    """From the call of `Trainer(...)` to the first step; verification and patching happen there."""
    peak_bytes: int | None
    """The highest during the steps. None: this platform doesn't tell."""
    peak_with_setup_bytes: int | None
    """The highest during the whole process, loading and verification included."""
    initial_adapter_sha256: str
    environment: dict[str, Any]
    report: dict[str, Any] | None
    """`acceleration.report.to_dict()`; None without SlothCallback."""

    @property
    def measured_ms(self) -> list[float]:
        """The steps without the first two, in which caches are filled and kernels compiled."""
        return self.step_times_ms[2:] or self.step_times_ms

    @property
    def step_time_ms(self) -> float:
        """The median of the measured steps."""
        return statistics.median(self.measured_ms)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The 20th and the 80th percentile of the measured steps."""
        if len(self.measured_ms) == 1:
            return self.measured_ms[0], self.measured_ms[0]
        fifths = statistics.quantiles(self.measured_ms, n=5, method="inclusive")
        return fifths[0], fifths[-1]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_time_ms * 1e3


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Both trainings side by side. `print()` shows them; `results_path` holds `to_dict()` as JSON."""

    plain: TrainingRun
    sloth: TrainingRun
    picture_path: Path
    results_path: Path

    @property
    def largest_loss_difference(self) -> float:
        return max(
            abs(a - b) if a == a and b == b else float("inf")
            for a, b in zip(self.plain.losses, self.sloth.losses, strict=True)
        )

    @property
    def speed_is_measured(self) -> bool:
        """Whether the step times tell which is faster: enough steps, and no overlap of the two p20 to p80."""
        if min(len(self.plain.measured_ms), len(self.sloth.measured_ms)) < MEASURED_STEPS:
            return False
        (plain_low, plain_high), (sloth_low, sloth_high) = self.plain.spread_ms, self.sloth.spread_ms
        return plain_high < sloth_low or sloth_high < plain_low

    @property
    def loss_tolerance(self) -> float:
        return LOSS_TOLERANCE[self.plain.environment["dtype"]]

    @property
    def agrees(self) -> bool:
        """Whether the two loss curves are the same up to rounding."""
        return self.largest_loss_difference <= self.loss_tolerance

    def conclusion(self) -> str:
        """What the run shows and what it doesn't, in one sentence."""
        if not self.sloth.report or not self.sloth.report.get("patched"):
            return "Nothing was patched (the report says why), so both trainings are the same one."
        if not self.agrees:
            return (
                f"The losses differ by up to {self.largest_loss_difference:.1e}, which is more than the "
                f"{self.loss_tolerance:.0e} that rounding in {self.plain.environment['dtype']} explains: "
                "please report this."
            )
        if self.plain.environment["device"] == "cpu":
            return (
                "On a CPU the kernels are the torch references, so no speed-up is to be expected here: "
                "the run shows that the patched model trains to the same losses."
            )
        return (
            f"Measured on {self.plain.environment['device_name']} in {self.plain.environment['dtype']}, with "
            "the kernels that the report names; the losses agree up to rounding."
        )

    def to_dict(self) -> dict[str, Any]:
        runs = {
            run.variant: {
                **asdict(run),
                "step_time_ms": run.step_time_ms,
                "step_time_p20_p80_ms": run.spread_ms,
                "tokens_per_s": run.tokens_per_s,
            }
            for run in (self.plain, self.sloth)
        }
        return {
            **runs,
            "speed_is_measured": self.speed_is_measured,
            "largest_loss_difference": self.largest_loss_difference,
            "loss_tolerance": self.loss_tolerance,
            "agrees": self.agrees,
            "conclusion": self.conclusion(),
            "picture": self.picture_path.name,
        }

    def print(self, console: Console | None = None) -> None:
        """The table, the report, where the picture lies, and the conclusion."""
        console = console or Console()
        console.print()
        console.print(self._table())
        console.print()
        if self.sloth.report is not None:
            console.print(_report(self.sloth.report))
            console.print()
        console.print(f"Loss curves: {self.picture_path}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"All figures: {self.results_path}", markup=False, highlight=False, soft_wrap=True)
        console.print()
        console.print(self.conclusion(), markup=False, highlight=False)

    def _table(self) -> Table:
        environment = self.plain.environment
        peak = "peak GPU memory" if environment["device"] == "cuda" else "peak RSS"
        table = Table(
            title=f"SmolLM2-135M-Instruct, LoRA r={LORA_RANK}, {environment['dtype']}\n"
            f"{len(self.plain.losses)} steps of {environment['batch_size']} x "
            f"{environment['sequence_tokens']} tokens on {environment['device_name']}"
        )
        table.add_column("")
        for run in (self.plain, self.sloth):
            table.add_column(LABELS[run.variant], justify="right")
        table.add_column("change", justify="right")
        plain, sloth = self.plain, self.sloth
        times = _pair(plain.step_time_ms, sloth.step_time_ms, ".0f")
        rates = _pair(plain.tokens_per_s, sloth.tokens_per_s, ".0f")
        if not self.speed_is_measured:
            # A percentage here would be the noise of this machine, or of a handful of steps.
            few = min(len(plain.measured_ms), len(sloth.measured_ms)) < MEASURED_STEPS
            times = (*times[:2], "too few steps" if few else "within noise")
            rates = (*rates[:2], "")
        table.add_row("step time, median (ms)", *times)
        table.add_row(
            "step time, p20 to p80 (ms)", *("{:.0f} to {:.0f}".format(*r.spread_ms) for r in (plain, sloth))
        )
        table.add_row("tokens per second", *rates)
        table.add_row(f"{peak}, steps (GiB)", *_pair(_gib(plain.peak_bytes), _gib(sloth.peak_bytes), ".2f"))
        table.add_row(
            f"{peak}, with set-up (GiB)",
            *_pair(_gib(plain.peak_with_setup_bytes), _gib(sloth.peak_with_setup_bytes), ".2f"),
        )
        table.add_row("set-up before step 1 (s)", f"{plain.setup_s:.1f}", f"{sloth.setup_s:.1f}", "")
        table.add_row("loss, first step", f"{plain.losses[0]:.5f}", f"{sloth.losses[0]:.5f}", "")
        table.add_row("loss, last step", f"{plain.losses[-1]:.5f}", f"{sloth.losses[-1]:.5f}", "")
        held_out = [f"{a:.4f} → {b:.4f}" for a, b in (plain.held_out_losses, sloth.held_out_losses)]
        table.add_row("held-out loss", *held_out, "")
        table.add_row("largest loss difference", "", f"{self.largest_loss_difference:.1e}", "")
        return table


def run_demo(
    output_dir: str | Path = "demo_output",
    steps: int | None = None,
    *,
    batch_size: int | None = None,
    sequence_tokens: int | None = None,
    seed: int = 0,
) -> DemoResult:
    """Train twice and write `loss.png` and `results.json` to `output_dir`; two minutes on two CPU cores.

    Progress goes to stderr. Nothing is printed to stdout: call `print()` on what comes back.

    Args:
        steps, batch_size, sequence_tokens: by default 16 steps of 4 x 128 tokens in float32 on a CPU, and 60
            steps of 8 x 1024 tokens (4 x 1024 below 24 GiB) in bfloat16 on a GPU.
        seed: of the adapter and of the order of the text.

    Raises:
        MissingPackageError: a package that only the demo needs is not installed.
        DemoError: one of the trainings failed.
        ValueError: a number below 1.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("sequence_tokens", sequence_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; allowed are None and whole numbers from 1")
    require(_MODULES)
    if importlib.util.find_spec("sloth_hf_trainer") is None:
        raise MissingPackageError("The demo needs sloth_hf_trainer: run `pip install sloth-plugins[demo]`.")
    log = Console(stderr=True, highlight=False)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    log.print("Preparing SmolLM2-135M-Instruct (converted on the first call, in about 20 s)")
    model_dir = smollm2_dir()

    options = {"steps": steps, "batch-size": batch_size, "sequence-tokens": sequence_tokens, "seed": seed}
    runs = {}
    with tempfile.TemporaryDirectory(prefix=".running-", dir=output_dir) as scratch:
        for variant in VARIANTS:
            runs[variant] = _run_in_child(variant, model_dir, Path(scratch), options, log)
    plain, sloth = runs["plain"], runs["sloth"]
    if plain.initial_adapter_sha256 != sloth.initial_adapter_sha256:
        raise DemoError("The two trainings did not start from the same adapter, so they cannot be compared.")

    result = DemoResult(
        plain=plain,
        sloth=sloth,
        picture_path=output_dir / "loss.png",
        results_path=output_dir / "results.json",
    )
    _draw(result)
    result.results_path.write_text(
        json.dumps(result.to_dict(), indent=2, allow_nan=True) + "\n", encoding="utf-8"
    )
    return result


def _run_in_child(
    variant: str, model_dir: Path, scratch: Path, options: Mapping[str, int | None], log: Console
) -> TrainingRun:
    """Train in a fresh Python and read back what it measured. subprocess.run ends the child on Ctrl-C."""
    target = scratch / f"{variant}.json"
    # -P: nothing is imported from the working directory, where a checkout's `kernels/` would be taken for the
    # package of that name. The ignored warnings are about calls between transformers and peft.
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore::FutureWarning",
        "-m",
        "sloth_plugins.demo",
        "--one",
        variant,
    ]
    command += ["--model", str(model_dir), "--output", str(target)]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # With several GPUs the Trainer would spread the batch over all of them.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    status = subprocess.run(command, env=environment, stdout=sys.stderr.fileno(), check=False).returncode
    if status != 0:
        raise DemoError(
            f"The training {LABELS[variant]} ended with exit status {status}; its message stands above."
        )
    values = json.loads(target.read_text(encoding="utf-8"))
    return TrainingRun(**{**values, "held_out_losses": tuple(values["held_out_losses"])})


def train_once(
    variant: str,
    model_dir: Path,
    scratch: Path,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    sequence_tokens: int | None = None,
    seed: int = 0,
) -> TrainingRun:
    """Train in this process. `variant` "plain" is what a user has, "sloth" adds one callback to it."""
    # peft imports it, and it warns of a 4-bit kernel that it can't download; nothing here is in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    small = cuda and torch.cuda.get_device_properties(0).total_memory < 24 * _GIB
    steps = steps or (60 if cuda else 16)
    batch_size = batch_size or (8 if cuda and not small else 4)
    sequence_tokens = sequence_tokens or (1024 if cuda else 128)

    # The user's script begins here.
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    blocks = _text_blocks(tokenizer, sequence_tokens, seed)
    held_out, blocks = blocks[:HELD_OUT_BLOCKS], blocks[HELD_OUT_BLOCKS:]
    blocks = blocks[: math.ceil(steps * batch_size / PASSES)]
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(
        "cuda" if cuda else "cpu"
    )
    lora = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    adapter_sha256 = _sha256(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(scratch / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=dtype == torch.bfloat16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps  loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        watch = _watch(
            progress, progress.add_task(f"Training {LABELS[variant]}".ljust(28), total=steps, loss="-")
        )
        callbacks = [watch]
        sloth: Any = None
        if variant == "sloth":
            from sloth_hf_trainer import SlothCallback

            sloth = SlothCallback(show_report=False)  # it comes last, below the table
            callbacks.append(sloth)
        before = _held_out_loss(model, held_out)
        watch.setup_began_s = time.perf_counter()
        trainer = transformers.Trainer(
            model,
            arguments,
            # An iterable dataset comes in its own order, whoever has drawn random numbers before.
            train_dataset=_in_order(blocks),
            callbacks=callbacks,
        )
        trainer.remove_callback(transformers.PrinterCallback)  # the bar shows the loss
        trainer.train()
        after = _held_out_loss(model, held_out)

    report = sloth.acceleration.report if sloth is not None else None
    return TrainingRun(
        variant=variant,
        losses=watch.losses,
        step_times_ms=watch.step_times_ms(),
        tokens_per_step=batch_size * sequence_tokens,
        held_out_losses=(before, after),
        setup_s=watch.step_began_s[0] - watch.setup_began_s,
        peak_bytes=watch.peak_bytes,
        peak_with_setup_bytes=watch.peak_with_setup_bytes,
        initial_adapter_sha256=adapter_sha256,
        environment={
            "device": "cuda" if cuda else "cpu",
            "device_name": torch.cuda.get_device_name(0)
            if cuda
            else f"a CPU, {torch.get_num_threads()} threads",
            "dtype": str(dtype).removeprefix("torch."),
            "batch_size": batch_size,
            "sequence_tokens": sequence_tokens,
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
        },
        report=report.to_dict() if report is not None else None,
    )


def _text_blocks(tokenizer: Any, sequence_tokens: int, seed: int) -> list[dict[str, list[int]]]:
    """The language reference, one end-of-text after each topic, cut into blocks and shuffled once."""
    from pydoc_data.topics import topics

    tokens: list[int] = []
    for name in sorted(topics):
        tokens += [*tokenizer(topics[name]).input_ids, tokenizer.eos_token_id]
    starts = list(range(0, len(tokens) - sequence_tokens + 1, sequence_tokens))
    if len(starts) <= HELD_OUT_BLOCKS:
        raise ValueError(
            f"sequence_tokens is {sequence_tokens}; the text has {len(tokens)} tokens, "
            f"so at most {len(tokens) // (HELD_OUT_BLOCKS + 1)} are allowed"
        )
    random.Random(seed).shuffle(starts)
    pieces = [tokens[start : start + sequence_tokens] for start in starts]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def _in_order(blocks: Sequence[dict[str, list[int]]]) -> Any:
    """A dataset that yields `blocks` in their order, again and again."""
    from torch.utils.data import IterableDataset

    class InOrder(IterableDataset[dict[str, list[int]]]):
        def __iter__(self) -> Any:
            return itertools.cycle(blocks)

    return InOrder()


def _held_out_loss(model: Any, blocks: Sequence[dict[str, list[int]]]) -> float:
    """The mean loss of `blocks`, one at a time."""
    import torch

    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for block in blocks:
            input_ids = torch.tensor([block["input_ids"]], device=model.device)
            total += float(model(input_ids=input_ids, labels=input_ids).loss)
    model.train(training)
    return total / len(blocks)


def _sha256(model: Any) -> str:
    """Of every trainable parameter, by name."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _watch(progress: Progress, task: Any) -> Any:
    """A TrainerCallback that keeps the losses, the times and the peak memory, and moves the progress bar."""
    import transformers

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.setup_began_s = 0.0
            self.step_began_s: list[float] = []
            self.ended_s = 0.0
            self.peak_bytes: int | None = None
            self.peak_with_setup_bytes: int | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.step_began_s:
                self.peak_with_setup_bytes = _peak_bytes()
                _reset_peak()
            self.step_began_s.append(_now_s())

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))
                progress.update(task, advance=1, loss=f"{self.losses[-1]:.4f}")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended_s = _now_s()
            self.peak_bytes = _peak_bytes()
            if self.peak_bytes is not None and self.peak_with_setup_bytes is not None:
                self.peak_with_setup_bytes = max(self.peak_bytes, self.peak_with_setup_bytes)

        def step_times_ms(self) -> list[float]:
            marks = [*self.step_began_s, self.ended_s]
            return [1e3 * (later - earlier) for earlier, later in itertools.pairwise(marks)]

    return Watch()


def _now_s() -> float:
    """The time once the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int | None:
    """The highest memory since `_reset_peak`, or since the process began where that cannot be reset."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage: its figure survives exec, so a child begins with its parent's peak.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    """Let `_peak_bytes` begin anew, where the platform can."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _report(values: Mapping[str, Any]) -> Report:
    """The report that the training's process gave out as `values`."""
    patched = [Patched(**row) for row in values["patched"]]
    return Report(**{**values, "patched": patched, "skipped": [Skip(**row) for row in values["skipped"]]})


def _gib(value_bytes: int | None) -> float | None:
    return None if value_bytes is None else value_bytes / _GIB


def _pair(before: float | None, after: float | None, form: str) -> tuple[str, str, str]:
    """Both figures and the relative change, for one row of the table."""
    if before is None or after is None:
        return "not measured", "not measured", ""
    return f"{before:{form}}", f"{after:{form}}", f"{100 * (after / before - 1):+.0f} %"


def _draw(result: DemoResult) -> None:
    """Both loss curves above each other's difference, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(result.plain.losses) + 1)
    upper.plot(steps, result.plain.losses, color="#9ecae1", linewidth=6, label=LABELS["plain"])
    upper.plot(
        steps, result.sloth.losses, "--o", color="#d94801", linewidth=1.5, markersize=3, label=LABELS["sloth"]
    )
    upper.set_ylabel("training loss (nats per token)")
    upper.set_title("SmolLM2-135M-Instruct, LoRA: the same training with and without SlothCallback")
    upper.legend()
    upper.grid(alpha=0.3)
    differences = [b - a for a, b in zip(result.plain.losses, result.sloth.losses, strict=True)]
    lower.axhline(0, color="black", linewidth=0.8)
    lower.plot(steps, differences, "o-", color="#d94801", markersize=3)
    lower.ticklabel_format(axis="y", style="scientific", scilimits=(-2, 2))
    lower.xaxis.get_major_locator().set_params(integer=True)
    lower.set_xlabel("step")
    lower.set_ylabel("with minus without")
    lower.grid(alpha=0.3)
    figure.savefig(result.picture_path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 for a failure or differing losses, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m sloth_plugins.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="directory for loss.png and results.json"
    )
    parser.add_argument("--steps", type=int, help="default: 16 on a CPU, 60 on a GPU")
    parser.add_argument("--batch-size", type=int, help="default: 4, on a GPU with 24 GiB 8")
    parser.add_argument("--sequence-tokens", type=int, help="default: 128 on a CPU, 1024 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    # For run_demo's own children: train once and write what was measured to the file --output.
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    numbers = {
        "steps": given.steps,
        "batch_size": given.batch_size,
        "sequence_tokens": given.sequence_tokens,
        "seed": given.seed,
    }
    try:
        if given.one:
            run = train_once(given.one, given.model, given.output.parent, **numbers)
            given.output.write_text(json.dumps(asdict(run)), encoding="utf-8")
            return 0
        result = run_demo(given.output, **numbers)
    except KeyboardInterrupt:
        if not given.one:
            print("\nInterrupted: the demo was ended, and nothing of it is kept.", file=sys.stderr)
        return 130
    except (DemoError, MissingPackageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    # A pipe has no width of its own, and the default of 80 columns cuts module names short.
    result.print(Console(width=None if sys.stdout.isatty() else 120))
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
