"""The command `sloth`: doctor, plan, verify, quantize, demo.

Results go to stdout (tables, or with --json one JSON object and nothing else), everything else to stderr.
Exit status: 0 fine, 1 something falls short, 2 bad input, with one sentence that says what is wrong. torch
and the packages that need it are imported by the command that uses them, so that `sloth --help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from sloth_plugins import __version__
from sloth_plugins.settings import Kernels, Settings, nearest, parse_bytes

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType

    from sloth_plugins.checkpointing.plan import CheckpointPlan
    from sloth_plugins.doctor import Advice, Facts
    from sloth_plugins.quantization import Result as Quantized

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
FINE, FALLS_SHORT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """What the user can put right, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command found: as JSON types, and as what `show` prints for people."""

    values: dict[str, Any]
    show: Callable[[Console], None]
    exit_code: int = FINE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):  # whatever libraries print is not the result
            outcome: Outcome = arguments.run(arguments)
        if arguments.json:
            print(json.dumps(_json_safe(outcome.values), indent=2, allow_nan=False))
        else:
            from rich.console import Console

            # Piped output has no width: 120 columns hold the report's table.
            outcome.show(Console(width=None if sys.stdout.isatty() else 120, highlight=False))
        sys.stdout.flush()
        return outcome.exit_code
    except UserError as error:
        print(f"sloth: {error}", file=sys.stderr)
        return BAD_INPUT
    except SystemExit as error:  # --help and --version
        return error.code if isinstance(error.code, int) else FINE
    except KeyboardInterrupt:
        print("sloth: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (
        BrokenPipeError
    ):  # `sloth plan ... | head`: nobody reads on, and Python must not flush to nobody at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sloth",
        description="Makes fine-tuning faster and smaller inside the trainer that you already use.",
        epilog="Exit status: 0 fine, 1 something falls short, 2 bad input.",
    )
    parser.add_argument("--version", action="version", version=f"sloth-plugins {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], Outcome], text: str
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        made.add_argument(
            "--json", action="store_true", help="print one JSON object, and nothing else, on stdout"
        )
        made.set_defaults(run=run)
        return made

    doctor = command("doctor", _doctor, "what this machine can do, what will work and what to install")
    doctor.add_argument(
        "--need",
        metavar="WHAT",
        nargs="+",
        action="extend",
        type=_one_of("gpu", "triton", "hf", "trl", "quant", "cudnn-attention"),
        default=[],
        help="exit with 1 where one of these doesn't work: gpu, triton, hf, trl, quant, cudnn-attention",
    )

    plan = command(
        "plan", _plan, "what would be patched in a model, from its config.json alone; weights are not read"
    )
    verify = command(
        "verify", _verify, "accelerate a model, prove every patch, print the figures, and undo it"
    )
    verify.add_argument(
        "--dtype",
        type=_one_of(*DTYPES),
        default="auto",
        help=f"{', '.join(DTYPES)}; auto: the checkpoint's own",
    )
    verify.add_argument(
        "--random", action="store_true", help="random weights from config.json instead of the checkpoint's"
    )
    memory = plan.add_argument_group(
        "a memory budget",
        "with --budget: what each decoder layer keeps, offloads and recomputes of a training step",
    )
    memory.add_argument("--budget", metavar="BYTES", help="device memory of the step, such as 24GiB")
    memory.add_argument("--batch", metavar="N", type=int, help="rows of a batch")
    memory.add_argument("--seq", metavar="N", type=int, help="tokens of a row")
    memory.add_argument(
        "--rank", metavar="N", type=int, default=16, help="LoRA rank, 0 for none; default: 16"
    )
    memory.add_argument(
        "--weights",
        type=_one_of("auto", "nf4", "nf4_double", "16bit", "32bit"),
        default="auto",
        help="auto, nf4, nf4_double, 16bit, 32bit; auto: the checkpoint's own",
    )
    memory.add_argument(
        "--gpu",
        metavar="NAME",
        help="h200, h100, a100, 4090, a10, t4 or unknown; default: this machine's, measured",
    )
    memory.add_argument("--plain", action="store_true", help="a step without the project's kernels and head")
    memory.add_argument("--draw", metavar="PNG", type=Path, help="draw the plan")
    memory.add_argument("--save", metavar="FILE", type=Path, help="write the plan as JSON")
    for made in (plan, verify):
        made.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="a directory with a config.json")
        made.add_argument(
            "--kernels", type=_one_of(*get_args(Kernels)), default="auto", help=", ".join(get_args(Kernels))
        )
        made.add_argument(
            "--disable",
            metavar="OP",
            nargs="+",
            action="extend",
            default=[],
            help="ops to leave alone, such as rope",
        )

    quantize = command(
        "quantize",
        _quantize,
        "write a model as an ordinary 4-bit bitsandbytes checkpoint, with calibrated rounding",
    )
    quantize.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="a directory with a config.json")
    quantize.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="the new directory; DIR.partial until it is finished",
    )
    quantize.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        required=True,
        help="texts like those of the use: .jsonl, or texts separated by empty lines",
    )
    quantize.add_argument(
        "--budget",
        metavar="RATIO",
        type=_ratio_or_size,
        default=1.0,
        help='bytes over those of uniform NF4, or a size such as "120MB"; default: 1.0',
    )
    quantize.add_argument(
        "--target-kl",
        metavar="NATS",
        type=float,
        help="instead of a budget: the KL to the original that the smallest such checkpoint has",
    )
    quantize.add_argument(
        "--evaluate",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="held-out texts: KL, perplexity and top-1 agreement on each file",
    )
    quantize.add_argument(
        "--samples", metavar="N", type=int, default=128, help="rows of calibration text; default: 128"
    )
    quantize.add_argument(
        "--evaluation-samples", metavar="N", type=int, default=64, help="rows of held-out text; default: 64"
    )
    quantize.add_argument(
        "--row-tokens", metavar="N", type=int, default=512, help="tokens of a row, at most; default: 512"
    )
    quantize.add_argument(
        "--block-sizes",
        metavar="N",
        type=int,
        nargs="+",
        default=[64],
        help="64, or 64 32: smaller blocks where they are worth their bytes; default: 64",
    )
    quantize.add_argument(
        "--keep", metavar="MODULE", nargs="+", action="extend", default=[], help="linears to leave in 16 bits"
    )
    quantize.add_argument(
        "--lora-init",
        metavar="RANK",
        type=int,
        default=0,
        help="also an adapter of this rank in DIR/lora_init, which gives back a part of what 4 bits took",
    )
    quantize.add_argument(
        "--restart", action="store_true", help="delete DIR.partial first, instead of resuming"
    )
    for made in (verify, quantize):
        made.add_argument(
            "--device",
            type=_one_of(*DEVICES),
            default="auto",
            help=f"{', '.join(DEVICES)}; auto: the GPU if there is one",
        )
    for made in (plan, verify, quantize):
        made.add_argument(
            "--trust-remote-code", action="store_true", help="run model code that lies in MODEL_DIR"
        )

    demo = command("demo", _demo, "fine-tune SmolLM2-135M without and with SlothCallback, and compare")
    demo.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("demo_output"), help="default: demo_output"
    )
    demo.add_argument(
        "--steps", metavar="N", type=int, help="training steps; default: what suits this machine"
    )
    return parser


def _one_of(*allowed: str) -> Callable[[str], str]:
    """For argparse's `type`: `choices` would not say which one was meant."""

    def check(value: str) -> str:
        if value not in allowed:
            raise argparse.ArgumentTypeError(
                f"{value!r}: allowed are {', '.join(allowed)}.{nearest(value, allowed)}"
            )
        return value

    return check


def _ratio_or_size(value: str) -> float | str:
    """A number, or text that `Options` reads as a size."""
    try:
        return float(value)
    except ValueError:
        return value


# Commands


def _doctor(arguments: argparse.Namespace) -> Outcome:
    from sloth_plugins.doctor import advise, examine

    facts = examine(_say)
    advice = advise(facts, tuple(arguments.need))
    values = {
        **facts,
        "works": list(advice.works),
        "install": list(advice.install),
        "broken": list(advice.broken),
    }
    return Outcome(
        values=values,
        show=lambda console: _show_doctor(console, facts, advice),
        exit_code=FALLS_SHORT if advice.broken else FINE,
    )


def _plan(arguments: argparse.Namespace) -> Outcome:
    settings, directory = _settings(arguments), _model_dir(arguments.model_dir)
    asked = [getattr(arguments, name) is not None for name in ("budget", "batch", "seq")]
    if any(asked) and not all(asked):
        raise UserError("--budget, --batch and --seq go together: a plan of a step's memory needs all three")
    if (arguments.draw or arguments.save) and not any(asked):
        raise UserError(
            "--draw and --save are for a plan of a step's memory: give --budget, --batch and --seq"
        )
    torch, transformers = _torch_and_transformers("plan")
    config = _config(transformers, directory, arguments)
    from sloth_plugins import plan

    def build(auto: Any) -> Any:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=arguments.trust_remote_code)

    model = _built(transformers, directory, build)
    with _user_errors():
        report = plan(model, settings)
    values = {"model": str(directory), "class": type(model).__name__, **report.to_dict()}
    if not any(asked):
        return Outcome(values=values, show=lambda console: _show_report(console, values, report))
    memory = _memory_plan(torch, config, directory, arguments)
    values["memory_plan"] = {**memory.to_dict(), "memory": memory.memory()}

    def show(console: Console) -> None:
        _show_report(console, values, report)
        _show_memory_plan(console, memory)

    return Outcome(values=values, show=show)


def _memory_plan(torch: Any, config: Any, directory: Path, arguments: argparse.Namespace) -> CheckpointPlan:
    from sloth_plugins.checkpointing.facts import ModelFacts, Shape
    from sloth_plugins.checkpointing.plan import plan
    from sloth_plugins.checkpointing.rates import KNOWN, measure_rates, rates_for

    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    weights = arguments.weights
    if weights == "auto":
        own = "32bit" if getattr(config, "dtype", None) in (torch.float32, "float32") else "16bit"
        four = "nf4_double" if quantization.get("bnb_4bit_use_double_quant") else "nf4"
        weights = four if quantization.get("load_in_4bit") else own
    width = 4 if weights == "32bit" else 2
    if arguments.gpu is not None and arguments.gpu.lower() not in KNOWN:
        raise UserError(
            f"argument --gpu: {arguments.gpu!r}: allowed are {', '.join(KNOWN)}."
            + nearest(arguments.gpu, KNOWN)
        )
    with _user_errors():
        facts = ModelFacts.from_config(
            config,
            weights=weights,
            activation_bytes=width,
            stream_bytes=4 if arguments.plain and weights.startswith("nf4") else width,
            rank=arguments.rank,
            fused=not arguments.plain,
            fused_head=not arguments.plain,
        )
        shape = Shape(batch=arguments.batch, seq=arguments.seq)
        budget = parse_bytes(
            int(arguments.budget) if arguments.budget.isdigit() else arguments.budget, "argument --budget"
        )
        rates = measure_rates(_device(torch, "auto")) if arguments.gpu is None else rates_for(arguments.gpu)
        memory = plan(facts, shape, budget, rates)
    if arguments.save is not None:
        try:
            memory.save(arguments.save)
        except OSError as error:
            raise UserError(f"argument --save: {_sentence(error)}") from error
    if arguments.draw is not None:
        try:
            from sloth_plugins.checkpointing.picture import draw

            draw(memory, arguments.draw, directory.name)
        except ImportError as error:
            raise _missing("plan --draw", error, "demo") from error
        except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not write
            raise UserError(f"argument --draw: {_sentence(error)}") from error
    return memory


def _verify(arguments: argparse.Namespace) -> Outcome:
    settings, directory = _settings(arguments), _model_dir(arguments.model_dir)
    torch, transformers = _torch_and_transformers("verify")
    device = torch.device(_device(torch, arguments.device))
    config = _config(transformers, directory, arguments)
    own = getattr(config, "dtype", None) or torch.float32
    dtype = own if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    from sloth_plugins import accelerate

    def build(auto: Any) -> Any:
        trust = arguments.trust_remote_code
        if arguments.random:
            torch.manual_seed(0)
            with device:
                return auto.from_config(config, dtype=dtype, trust_remote_code=trust)
        model = auto.from_pretrained(directory, dtype=dtype, trust_remote_code=trust, local_files_only=True)
        return model if getattr(model, "is_quantized", False) else model.to(device)

    source = "making random weights for" if arguments.random else "loading"
    _say(f"{source} {directory} in {_name(dtype)} on {device}")
    model = _built(transformers, directory, build)
    _say("verifying every patch against the model's own code and float64")
    with _user_errors(), accelerate(model, settings) as acceleration:
        report = acceleration.report
    short = [
        f"{skip.module or 'the model'} ({skip.op}): {skip.reason}"
        for skip in report.skipped
        if not skip.benign
    ]
    if not report.patched:
        short.append("nothing was patched")
    values = {
        "model": str(directory),
        "class": type(model).__name__,
        "device": str(device),
        "dtype": _name(dtype),
        "random_weights": arguments.random,
        "ok": not short,
        "falls_short": short,
        **report.to_dict(),
    }

    def show(console: Console) -> None:
        _show_report(console, values, report)
        if not short:
            _line(
                console,
                f"Fine: all {len(report.patched)} patched modules are as accurate as the model's own code.",
            )
            return
        _line(console, f"Falls short in {len(short)} places:")
        reasons = Counter(f"{skip.op}: {skip.reason}" for skip in report.skipped if not skip.benign)
        for reason, count in reasons.items():
            _line(console, f"  - {count} x {reason}")
        if not report.patched:
            _line(console, "  - nothing was patched")

    return Outcome(values=values, show=show, exit_code=FALLS_SHORT if short else FINE)


def _quantize(arguments: argparse.Namespace) -> Outcome:
    directory = _model_dir(arguments.model_dir)
    torch, _ = _torch_and_transformers("quantize")
    device = _device(torch, arguments.device)
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401

        from sloth_plugins.quantization import Options, quantize

        if arguments.lora_init:
            import peft  # noqa: F401
    except ImportError as error:
        raise _missing("quantize", error, "hf,quant") from error
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=of)
            if not bar.console.is_terminal:
                _say(f"{what}: {of} layers")
        bar.update(tasks[what], completed=done)

    try:
        with _user_errors(), bar:
            options = Options(
                budget=arguments.budget,
                target_kl=arguments.target_kl,
                block_sizes=tuple(dict.fromkeys(arguments.block_sizes)),
                keep=tuple(arguments.keep),
                samples=arguments.samples,
                row_tokens=arguments.row_tokens,
                lora_init=arguments.lora_init,
            )
            result = quantize(
                directory,
                arguments.out,
                arguments.calibration,
                options=options,
                evaluation=arguments.evaluate,
                evaluation_rows=arguments.evaluation_samples,
                restart=arguments.restart,
                trust_remote_code=arguments.trust_remote_code,
                device=device,
                progress=progress,
            )
    except KeyboardInterrupt:
        _say("the same command goes on where this one stopped")
        raise
    picture: Path | None = arguments.out / "sloth_quantization.png"
    try:
        from sloth_plugins.quantization.picture import draw

        draw(result.plan, arguments.out / "sloth_quantization.png", directory.name)
    except ImportError:
        picture = None
    values = {"model": str(directory), "picture": picture and str(picture), **result.to_dict()}
    return Outcome(values=values, show=lambda console: _show_quantized(console, result, picture))


def _demo(arguments: argparse.Namespace) -> Outcome:
    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"argument --steps: {arguments.steps}: allowed is a number from 1")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"argument --output: {str(arguments.output)!r} is there and is no directory")
    try:
        from sloth_plugins import demo
        from sloth_plugins.smollm2 import MissingPackageError
    except ImportError as error:
        raise _missing("demo", error, "demo") from error
    try:
        result = demo.run_demo(arguments.output, arguments.steps)
    except MissingPackageError as error:
        raise UserError(str(error)) from error
    except demo.DemoError as error:
        message = str(error)
        return Outcome(
            values={"error": message},
            show=lambda _: print(f"sloth: {message}", file=sys.stderr),
            exit_code=FALLS_SHORT,
        )
    return Outcome(
        values=result.to_dict(), show=result.print, exit_code=FINE if result.agrees else FALLS_SHORT
    )


# What the commands share


def _settings(arguments: argparse.Namespace) -> Settings:
    ops = [op for given in arguments.disable for op in given.split(",") if op]
    with _user_errors():
        return Settings(kernels=arguments.kernels, disable=frozenset(ops))


def _model_dir(path: Path) -> Path:
    """`path` if it is a model directory; looked at before anything slow is imported."""
    if not path.exists():
        raise UserError(
            f"{str(path)!r} does not exist: MODEL_DIR is a directory on this machine with a config.json "
            "(`hf download NAME --local-dir DIR` fetches one)"
        )
    if not path.is_dir():
        raise UserError(f"{str(path)!r} is no directory: MODEL_DIR is a directory with a config.json")
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = ": it holds a PEFT adapter, so name the directory of its base model" if adapter else ""
        raise UserError(f"{str(path)!r} has no config.json{hint}")
    return path


def _torch_and_transformers(command: str) -> tuple[Any, Any]:
    _say("importing torch and transformers")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise _missing(command, error, "hf") from error
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def _missing(command: str, error: ImportError, extra: str) -> UserError:
    return UserError(
        f"`sloth {command}` needs a package that is not here ({error}): pip install 'sloth-plugins[{extra}]'"
    )


def _config(transformers: Any, directory: Path, arguments: argparse.Namespace) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=arguments.trust_remote_code, local_files_only=True
        )
    except (
        Exception
    ) as error:  # transformers raises ValueError, OSError, KeyError or what the model's own code raises
        raise UserError(f"{str(directory / 'config.json')!r} can't be used: {_sentence(error)}") from error


def _built(transformers: Any, directory: Path, build: Callable[[Any], Any]) -> Any:
    """The causal language model of a config, or the bare model where transformers has no such head."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            return build(auto)
        except Exception as error:
            unknown = isinstance(error, ValueError) and "Unrecognized configuration class" in str(error)
            if unknown and auto is not transformers.AutoModel:
                continue
            raise UserError(f"the model in {str(directory)!r} can't be built: {_sentence(error)}") from error
    raise AssertionError("the last one returns or raises")


def _device(torch: Any, wanted: str) -> str:
    here = torch.cuda.is_available()
    if wanted == "cuda" and not here:
        raise UserError("argument --device: 'cuda': torch sees no GPU here (`sloth doctor` says why)")
    return wanted if wanted != "auto" else "cuda" if here else "cpu"


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """A refusal of the core becomes one sentence; its warnings are dropped: the report says the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sloth: ")
        try:
            yield
        except ValueError as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            from sloth_plugins.specs import SlothError

            if not isinstance(error, SlothError):
                raise
            raise UserError(str(error)) from error


def _sentence(error: Exception, length: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    hint = " (--trust-remote-code allows it)" if "trust_remote_code" in text else ""
    return (text if len(text) <= length else f"{text[: length - 3]}...") + hint


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _say(text: str) -> None:
    print(f"sloth: {text}", file=sys.stderr, flush=True)


def _json_safe(value: Any) -> Any:
    """`value` with null for NaN and the infinities, which JSON doesn't have."""
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# Tables


def _line(console: Console, text: str) -> None:
    """One line, as it is: messages of other packages hold brackets that rich would take for its own."""
    console.print(text, markup=False, soft_wrap=True)


def _table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    for column in columns or [""] * len(rows[0]):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells: list[RenderableType] = [Text(cell) for cell in row]
        table.add_row(*cells)
    console.print(table)


def _show_report(console: Console, values: dict[str, Any], report: Any) -> None:
    where = f" on {values['device']} in {values['dtype']}" if "device" in values else ""
    _line(console, f"{values['class']} from {values['model']}{where}")
    console.print(report)


def _show_memory_plan(console: Console, plan: CheckpointPlan) -> None:
    from sloth_plugins.checkpointing.plan import OPTIONS
    from sloth_plugins.report import shorten

    costs, rows = plan.costs(), []
    for name in OPTIONS:
        of = [index for index, option in enumerate(plan.layers) if option == name]
        if not of:
            continue
        ways: dict[str, list[str]] = {}
        for kind, way in plan.classes(of[0]).items():
            ways.setdefault(way, []).append(kind)
        what = "; ".join(
            f"{way} {'all' if len(ways) == 1 else ', '.join(kinds)}" for way, kinds in ways.items()
        )
        cost = costs.options[name]
        layers = shorten([str(index) for index in of])
        figures = (
            f"{cost.kept_bytes / 2**20:.0f}",
            f"{cost.host_bytes / 2**20:.0f}",
            f"{(cost.recompute_s + costs.tiled_s) * 1e3:.2f}",
        )
        rows.append((str(len(of)), layers, what, *figures))
    title = f"A step of {plan.shape.batch} x {plan.shape.seq} tokens in {plan.budget_bytes / 2**30:.2f} GiB"
    columns = ("layers", "which", "saved tensors", "MiB kept\nof each", "MiB on\nthe host", "ms made\nagain")
    _table(console, title, columns, rows)
    if plan.mlp_tiles > 1:
        _line(console, f"MLPs run in {plan.mlp_tiles} tiles of {plan.tile_tokens} tokens")
    if plan.embeddings_on_host:
        moved = plan.facts.movable_bytes / 2**30
        _line(console, f"the input embeddings are read from host memory ({moved:.2f} GiB)")
    if plan.weights_on_host:
        moved = plan.weights_on_host * plan.facts.layer_movable_bytes / 2**30
        _line(
            console,
            f"4-bit weights of {plan.weights_on_host} layers wait in host memory ({moved:.2f} GiB) and come "
            "ahead of their use",
        )
    sizes = [(name, f"{size / 2**30:.2f}") for name, size in plan.memory().items()]
    _table(
        console,
        "Predicted peak",
        ("part", "GiB"),
        [*sizes[:-1], ("in all", f"{plan.peak_bytes / 2**30:.2f}"), sizes[-1]],
    )
    _line(
        console,
        f"predicted step: {plan.step_s * 1e3:.1f} ms on {plan.rates.name}, of which "
        f"{plan.recompute_s * 1e3:.1f} ms recomputation and {plan.stall_s * 1e3:.1f} ms waiting "
        f"for the host; {plan.shape.tokens / plan.step_s:,.0f} tokens/s",
    )


def _show_quantized(console: Console, result: Quantized, picture: Path | None) -> None:
    from sloth_plugins.quantization.plan import folded
    from sloth_plugins.report import shorten

    rows = []
    for (way, reason), choices in folded(result.plan.choices).items():
        kls = [choice.kl for choice in choices if choice.kl is not None]
        names = shorten([choice.module for choice in choices])
        size = f"{sum(choice.bytes for choice in choices) / 1e6:.2f}"
        rows.append((way, names, str(len(choices)), size, f"{sum(kls):.2e}" if kls else "-", reason))
    columns = ("stored as", "linears", "count", "MB", "KL of plain 4 bits", "why")
    _table(console, str(result.plan), columns, rows)
    if result.plan.measured_kl is not None:
        _line(
            console,
            f"the plan in plain NF4, on calibration text: KL {result.plan.measured_kl:.4f} measured, "
            f"{result.plan.expected_kl:.4f} as the linears' own add up",
        )
    if result.reached_kl is not None:
        _line(console, f"KL on the calibration text that was held back: {result.reached_kl:.4f}")
    for name, figures in result.evaluation.items():
        _table(
            console,
            f"On held-out text: {name}",
            ("", "KL to the original", "perplexity", "top-1 agreement"),
            [
                (kind, f"{e['kl']:.4f}", f"{e['perplexity']:.3f}", f"{e['top1']:.1%}")
                for kind, e in figures.items()
            ],
        )
    for note in result.notes:
        _line(console, f"note: {note}")
    _line(console, f"picture: {picture or 'none: matplotlib is not installed'}")
    _line(
        console,
        f"{result.out} is finished ({result.seconds:.0f} s): AutoModelForCausalLM.from_pretrained loads it",
    )


def _show_doctor(console: Console, facts: Facts, advice: Advice) -> None:
    machine = [("python", facts["python"]), ("platform", facts["platform"])]
    for gpu in facts["gpus"]:
        free = "" if gpu["free_bytes"] is None else f", {gpu['free_bytes'] / 2**30:.1f} free"
        memory = f"{gpu['memory_bytes'] / 2**30:.1f} GiB{free}"
        machine.append(("gpu", f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability']}"))
    if not facts["gpus"]:
        machine.append(("gpu", f"none: {facts['torch']['why_no_gpu']}"))
    machine.append(("driver", facts["driver"] or "none found"))
    machine.append(("CUDA of torch", facts["torch"]["cuda"] or "none"))
    _table(console, "Machine", (), machine)

    packages = []
    for name, package in facts["packages"].items():
        note = package["problem"] or ""
        if name == "triton" and package["version"] is not None:
            triton = facts["triton"]
            note = (
                note
                or triton["why_not"]
                or triton["trial"]
                or ("interpreter" if triton["interpreted"] else "driver active")
            )
        elif name == "bitsandbytes" and package["version"] is not None:
            note = note or facts["bitsandbytes"]["why_not"] or "CUDA build"
        packages.append((name, package["version"] or "not installed", note))
    _table(console, "Packages", ("package", "version", ""), packages)

    attention = facts["attention"]
    if "problem" in attention:
        _table(console, "Attention", (), [("not found out", attention["problem"])])
    else:
        loaded, packaged = attention["cudnn_loaded"], attention["cudnn_packaged"]
        rows = [(f"torch chooses, {case}", backend) for case, backend in attention["chosen"].items()]
        rows.append(("only one switched on", attention["forced"] or "no"))
        rows.append(("cuDNN attention", attention["cudnn_attention"]))
        rows.append(
            (
                "cuDNN",
                "none" if loaded is None else f"{loaded} loaded, {packaged or 'none'} installed with torch",
            )
        )
        _table(console, "Attention", (), rows)

    plugins = facts["plugins"]
    rows = [(plugin["name"], plugin["from"]) for plugin in plugins["loaded"]]
    rows += [(name, "not loaded: SLOTH_DISABLED_PLUGINS names it") for name in plugins["disabled"]]
    rows += [("problem", problem) for problem in plugins["problems"]]
    _table(console, "Plugins", ("plugin", "from"), rows)

    kernels = [
        (kernel["op"], kernel["name"], "yes" if kernel["usable"] else f"no: {kernel['why_not']}")
        for kernel in sorted(facts["kernels"], key=lambda kernel: str(kernel["op"]))
    ]
    if kernels:
        _table(console, "Kernels", ("op", "kernel", "usable here"), kernels)

    for title, sentences in (
        ("What will work", advice.works),
        ("What to install", advice.install or ("Nothing.",)),
        ("What is broken", advice.broken),
    ):
        if sentences:
            console.print(f"\n[bold]{title}[/bold]")
            for sentence in sentences:
                _line(console, f"  - {sentence}")


if __name__ == "__main__":
    sys.exit(main())
