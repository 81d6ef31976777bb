"""The command `sloth`: doctor, plan, verify, demo.

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
from sloth_plugins.settings import Kernels, Settings, nearest

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType

    from sloth_plugins.doctor import Advice, Facts

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
        "--device",
        type=_one_of(*DEVICES),
        default="auto",
        help=f"{', '.join(DEVICES)}; auto: the GPU if there is one",
    )
    verify.add_argument(
        "--random", action="store_true", help="random weights from config.json instead of the checkpoint's"
    )
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
    return Outcome(values=values, show=lambda console: _show_report(console, values, report))


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
