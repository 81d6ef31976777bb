"""`sloth quantize`: from a model directory to an ordinary bitsandbytes checkpoint, resumable layer by layer.

Work goes on in `OUT.partial` (the plan, one file for each finished layer) and takes the final name as a
whole. Hidden states are not stored: a resumed run sends the texts through the finished layers again.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sloth_plugins.quantization.calibrate import calibrate_layer, linears, matmul_precision, put
from sloth_plugins.quantization.evaluate import (
    Figures,
    Weights,
    by_file,
    evaluate,
    rounded_plainly,
    stored_in,
)
from sloth_plugins.quantization.lora_init import PREFIX, check_rank, factors_in, save_adapter
from sloth_plugins.quantization.plan import Offer, QuantizationPlan, Survey, bnb_config, nf4_bytes
from sloth_plugins.quantization.rounding import BLOCKSIZES, Codes, expand_tensors
from sloth_plugins.quantization.sensitivity import measure
from sloth_plugins.quantization.stream import Checkpoint, Stream, open_stream
from sloth_plugins.quantization.texts import read_texts, to_rows
from sloth_plugins.settings import nearest, parse_bytes

REPORT = "sloth_quantization.json"
_OURS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", REPORT)
_SHARD_BYTES = 2**30
_VERSION = 1  # of the rounding: a run of another is not resumed
# What calibrated rounding leaves of plain NF4's KL, where a search for a KL begins: few bytes first.
_FIRST_SHARE = 0.12
_TURNS = 4  # after so many, the search takes what it has
_HELD_BACK = 8  # every so many rows of calibration text one, for measuring a KL that a run has to reach

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run may choose; ValueError names the option, its value and what is allowed."""

    budget: float | str = 1.0
    """Bytes of the checkpoint over those of uniform NF4, or a size such as "120MB"."""
    target_kl: float | None = None
    """In the place of a budget: the KL to the original (nats a token) that the smallest such checkpoint has,
    on an eighth of the calibration text, which is left out of the calibration."""
    block_sizes: tuple[int, ...] = (64,)
    """Weights with one scale: 64, or also 32 where that is worth its bytes."""
    keep: tuple[str, ...] = ()
    """Linears that stay in 16 bits, by full dotted name."""
    samples: int = 128
    """Rows of calibration text, at most."""
    row_tokens: int = 512
    """Tokens of a row, at most."""
    measure_tokens: int = 1024
    """Tokens of calibration text on which sensitivity is measured."""
    drift_share: float = 0.0
    """How much of what earlier layers lost the rounding makes up for, 0 to 1. It takes twice the time."""
    sweeps: int = 2
    """Sweeps of coordinate descent after the first rounding."""
    lora_init: int = 0
    """Rank of the adapter in OUT/lora_init that gives back a part of what quantization took; 0: none."""
    compute: str = "medium"
    """torch's float32 matmul precision for the layers' own code."""

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            parse_bytes(self.budget, "budget")
        elif not isinstance(self.budget, int | float) or not 1 <= self.budget <= 4:
            raise ValueError(
                f"budget={self.budget!r}: allowed is a ratio to the bytes of uniform NF4, from 1.0 to 4, "
                'or a size such as "120MB"'
            )
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl={self.target_kl!r}: allowed is a positive number of nats a token")
        if self.target_kl is not None and self.budget != 1:
            raise ValueError(
                f"target_kl={self.target_kl!r} with budget={self.budget!r}: allowed is one of them, for the "
                "other follows from it"
            )
        if not self.block_sizes or any(size not in BLOCKSIZES for size in self.block_sizes):
            allowed = ", ".join(map(str, BLOCKSIZES))
            raise ValueError(f"block_sizes={self.block_sizes!r}: allowed are {allowed}")
        if 64 not in self.block_sizes:
            raise ValueError(f"block_sizes={self.block_sizes!r}: allowed are lists with 64, uniform NF4's")
        for name in ("samples", "row_tokens", "measure_tokens"):
            if getattr(self, name) < (2 if name == "row_tokens" else 1):
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed is a positive number")
        if not 0 <= self.drift_share <= 1 or self.sweeps < 0:
            raise ValueError(
                f"drift_share={self.drift_share!r}, sweeps={self.sweeps!r}: allowed are 0 to 1, and 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run wrote and measured."""

    out: Path
    plan: QuantizationPlan
    notes: tuple[str, ...]
    seconds: float
    evaluation: dict[str, dict[str, Figures]] = field(default_factory=dict)
    """For each held-out file, the figures of "original", "uniform NF4" and "sloth" (see `evaluate`)."""
    reached_kl: float | None = None
    """Where a KL was asked for: the one measured."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "out": str(self.out),
            "ratio": self.plan.ratio,
            "evaluation": self.evaluation,
            "reached_kl": self.reached_kl,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "plan": self.plan.to_dict(),
        }


def make_survey(
    stream: Stream, rows: Sequence[Tensor], options: Options, codes: Codes, progress: Progress
) -> Survey:
    """The ways to store each linear: their bytes and, where the options leave a choice, what they cost."""
    offers: list[Offer] = []
    others: list[str] = []
    dtypes: dict[str, torch.dtype] = {}
    modules: dict[str, tuple[int, int]] = {}
    names = {stream.name(i, n) for i, layer in enumerate(stream.layers) for n in linears(layer)}
    for name in options.keep:
        if name not in names:
            hint = nearest(name, names)
            raise ValueError(f"keep={name!r}: allowed are linears of the decoder layers, by full name.{hint}")
    store = stream.checkpoint
    sizes = (
        store.bytes
        if store is not None
        else {n: p.numel() * min(p.element_size(), 2) for n, p in stream.model.named_parameters()}
    )
    for name, module in stream.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name not in names:
            others.append(name)
            continue
        key, shape = f"{name}.weight", (module.out_features, module.in_features)
        modules[name] = shape
        reason = ""
        if key not in sizes or (store is not None and store.shapes[key] != shape):
            reason = "its weight is stored under another name or in another shape"
        elif shape[1] % 64:
            reason = f"its {shape[1]} inputs are no multiple of 64: a block would lie in two rows"
        elif name in options.keep:
            reason = "keep names it"
        if reason:
            offers.append(Offer(module=name, kl=None, ways=((None, sizes.get(key, 0), 0.0),), reason=reason))
        else:
            dtypes[name] = store.dtypes[key] if store is not None else torch.bfloat16
            offers.append(Offer(module=name, kl=None, ways=((64, nf4_bytes(shape, 64), 0.0),)))
    if not dtypes:
        raise ValueError(
            f"{type(stream.model).__name__} has no linear that can be stored in 4 bits"
            + (f": {offers[0].module}: {offers[0].reason}" if offers else "")
        )
    own = {f"{offer.module}.weight" for offer in offers}
    survey = Survey(
        offers=tuple(offers),
        others=tuple(others),
        rest_bytes=sum(size for key, size in sizes.items() if key not in own),
        rows=0,
    )
    _limit(survey, options.budget)  # refused before the measurement
    few: list[Tensor] = []
    if options.budget != 1 or options.target_kl is not None or len(options.block_sizes) > 1:
        while len(few) < len(rows) and sum(row.numel() for row in few) < options.measure_tokens:
            few.append(rows[len(few)])
        kls, factors = measure(
            stream,
            few,
            dtypes,
            options.block_sizes,
            codes,
            lambda n: progress("measuring sensitivity", n, len(stream)),
        )
        for at, offer in enumerate(offers):
            if offer.module in kls:
                kl, shape = kls[offer.module], modules[offer.module]
                ways = [
                    (size, nf4_bytes(shape, size), kl * factors[offer.module][size])
                    for size in options.block_sizes
                ]
                offers[at] = Offer(
                    module=offer.module,
                    kl=kl,
                    ways=((None, sizes[f"{offer.module}.weight"], 0.0), *ways),
                )
    return dataclasses.replace(survey, offers=tuple(offers), rows=len(few))


def _limit(survey: Survey, budget: float | str) -> int:
    """A budget in bytes."""
    if not isinstance(budget, str):
        return int(survey.uniform_bytes * budget)
    limit = parse_bytes(budget, "budget")
    if limit < survey.uniform_bytes:
        raise ValueError(
            f"budget={budget!r}: allowed are {survey.uniform_bytes} bytes, uniform NF4's, or more"
        )
    return limit


def make_plan(
    stream: Stream,
    survey: Survey,
    rows: Sequence[Tensor],
    budget: float | str,
    codes: Codes,
    expected_kl: float | None = None,
) -> QuantizationPlan:
    """Which linears stay in 16 bits and which get which blocks, for a budget or for an expected KL.

    All choices are then measured together, on the rows that they were measured on one by one.
    """
    plan = survey.plan(_limit(survey, budget)) if expected_kl is None else survey.plan_for(expected_kl)
    if not survey.rows:
        return plan
    sizes = {choice.module: choice.blocksize for choice in plan.choices if choice.blocksize}
    found = evaluate(stream, {"plan": rounded_plainly(stream, codes, sizes)}, {"": rows[: survey.rows]})
    return dataclasses.replace(plan, measured_kl=found[""]["plan"]["kl"])


def plan_quantization(
    model: nn.Module | str | Path,
    calibration: Sequence[str | Sequence[int]],
    budget: float | str = 1.1,
    *,
    tokenizer: Any = None,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    manager: Any = None,
) -> QuantizationPlan:
    """Which linears stay in 16 bits so that the model is at most `budget` times as large as in uniform NF4,
    or has at most that size, such as "120MB".

    model: a directory (read layer by layer), or a causal language model in memory, which stays as it is.
    calibration: texts like those of the use, or rows of token ids; a directory's tokenizer is found there,
    another's is given. A plugin's `sloth_plan_quantization` is asked first.

    Raises ValueError for bad input, in one sentence.
    """
    from sloth_plugins.manager import default_manager
    from sloth_plugins.settings import Settings

    options = Options(budget=budget, keep=tuple(keep))
    subject = model if isinstance(model, nn.Module) else str(model)
    answer = (manager or default_manager()).plan_quantization(subject, Settings(), budget)
    if answer is not None:
        if not isinstance(answer, QuantizationPlan):
            raise TypeError(f"sloth_plan_quantization answered {answer!r:.80}: allowed is a QuantizationPlan")
        return answer
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with matmul_precision(options.compute):
        if isinstance(model, nn.Module):
            if getattr(model, "quantization_method", None) is not None:
                raise ValueError(f"the model is quantized already ({model.quantization_method})")
            stream = Stream(copy.deepcopy(model).float().to(where), None, where)
        else:
            check_model(Path(model))
            if tokenizer is None:
                tokenizer = _tokenizer(Path(model), trust_remote_code)
            stream, _ = open_stream(Path(model), where, trust_remote_code)
        rows = to_rows(calibration, tokenizer, options.row_tokens, options.samples)
        if not rows:
            raise ValueError("calibration is empty: give texts like those that the model is for")
        codes = Codes(where)
        survey = make_survey(stream, rows, options, codes, lambda what, done, of: None)
        return make_plan(stream, survey, rows, budget, codes)


def check_model(directory: Path) -> dict[str, Any]:
    """The config.json of a model that can be quantized. Raises ValueError otherwise."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"{str(directory)!r} has no config.json: allowed is a model directory")
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if (carried := config.get("quantization_config")) is not None:
        raise ValueError(
            f"{str(directory)!r} is quantized already: its config.json has a quantization_config with "
            f"quant_method {carried.get('quant_method')!r}; allowed is a model in 16 or 32 bits"
        )
    return config


def _tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ValueError(f"{str(directory)!r} has no tokenizer that can be loaded: {error}") from error


def quantize(
    model: Path,
    out: Path,
    calibration: Path,
    *,
    options: Options | None = None,
    evaluation: Sequence[Path] = (),
    evaluation_rows: int = 64,
    restart: bool = False,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Result:
    """Quantize the model directory `model` into `out`, which must not be there.

    evaluation: files of held-out text; evaluation_rows: rows of each, at most.

    Raises ValueError for bad input, in one sentence. Whatever ends a run, the next one goes on from
    `OUT.partial`.
    """
    began, options = time.monotonic(), options or Options()
    config = check_model(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={str(out)!r} is there already: allowed is a new directory")
    tokenizer = _tokenizer(model, trust_remote_code)
    texts = read_texts(calibration, tokenizer, "calibration")
    rows = to_rows(texts, tokenizer, options.row_tokens, options.samples)
    if not rows:
        raise ValueError(f"calibration={str(calibration)!r} holds no text of two tokens or more")
    held_out: dict[str, list[Tensor]] = {}
    for name, path in by_file(evaluation).items():
        other = read_texts(path, tokenizer, "evaluate")
        if common := set(texts) & set(other):
            raise ValueError(
                f"evaluate={str(path)!r}: {len(common)} of its {len(other)} are calibration texts "
                "too: allowed is text that the rounding has not seen"
            )
        held_out[name] = to_rows(other, tokenizer, options.row_tokens, evaluation_rows)
        if not held_out[name]:
            raise ValueError(f"evaluate={str(path)!r} holds no text of two tokens or more")
    if options.target_kl is not None and len(rows) < _HELD_BACK:
        raise ValueError(
            f"calibration={str(calibration)!r} gives {len(rows)} rows: target_kl needs {_HELD_BACK} or more, "
            "one of which is left out of the calibration"
        )
    partial = out.with_name(f"{out.name}.partial")
    job = _job(model, config, rows, options)
    if restart and partial.exists():
        shutil.rmtree(partial)
    if (partial / "job.json").is_file() and json.loads((partial / "job.json").read_text()) != job:
        raise ValueError(
            f"{str(partial)!r} is of a run with another model, text or option: allowed is the same again, "
            "or --restart, which deletes it"
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        needed = sum(Checkpoint(model).bytes.values())
        partial.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(partial).free) < needed:
            raise ValueError(f"out={str(out)!r}: {free} bytes are free there: needed are {needed}")
        _write_json(partial / "job.json", job)
        with matmul_precision(options.compute):
            stream, whole = open_stream(model, where, trust_remote_code)
            return _work(model, out, partial, rows, held_out, options, stream, whole, progress, began)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"out={str(out)!r}: the disk is full; {str(partial)!r} holds what is finished, and the same "
                "command goes on from there"
            ) from error
        raise


def evaluate_checkpoints(
    model: Path,
    checkpoints: Mapping[str, Path],
    texts: Mapping[str, Path],
    *,
    row_tokens: int = 512,
    evaluation_rows: int = 64,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> dict[str, dict[str, Figures]]:
    """For each file of texts, the figures (see `evaluate`) of "original", which is `model`, of "uniform NF4"
    and of each 4-bit checkpoint of it, read from its directory. Raises ValueError for bad input.
    """
    check_model(model)
    tokenizer = _tokenizer(model, trust_remote_code)
    rows = {
        name: to_rows(read_texts(path, tokenizer, name), tokenizer, row_tokens, evaluation_rows)
        for name, path in texts.items()
    }
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with matmul_precision(Options().compute):
        stream, _ = open_stream(model, where, trust_remote_code)
        codes, stores = Codes(where), {name: Checkpoint(path) for name, path in checkpoints.items()}
        survey = make_survey(stream, [], Options(), codes, lambda what, done, of: None)
        sizes = {offer.module: 64 for offer in survey.offers if not offer.reason}
        variants = {"uniform NF4": rounded_plainly(stream, codes, sizes)}
        variants |= {name: stored_in(stream, [store] * len(stream)) for name, store in stores.items()}
        return evaluate(stream, variants, rows)


def _work(
    model: Path,
    out: Path,
    partial: Path,
    rows: list[Tensor],
    held_out: dict[str, list[Tensor]],
    options: Options,
    stream: Stream,
    whole: str | None,
    progress: Progress,
    began: float,
) -> Result:
    codes, notes = Codes(stream.device), list[str]()
    if whole:
        notes.append(f"the model is in memory as a whole: {whole}")
    shapes = {
        stream.name(index, name): tuple(module.weight.shape)
        for index, layer in enumerate(stream.layers)
        for name, module in linears(layer).items()
    }
    if options.lora_init:
        check_rank(options.lora_init, shapes)
    tokens = sum(row.numel() for row in rows)
    widest = max(shape[1] for shape in shapes.values())
    if tokens < 2 * widest:
        notes.append(
            f"calibrated on {tokens} tokens in {len(rows)} rows: {2 * widest} and more are better here"
        )
    fused = {
        name
        for name, parameter in stream.model.named_parameters()
        if parameter.dim() == 3 and name.startswith(f"{stream.prefix}.")
    }
    if fused:
        notes.append(
            f"{len(fused)} fused 3-D parameters, such as {min(fused)}, stay in 16 bits: bitsandbytes takes "
            "linears only"
        )
    held_back: list[Tensor] = []
    if options.target_kl is not None:
        held_back = rows[_HELD_BACK - 1 :: _HELD_BACK]
        rows = [row for at, row in enumerate(rows) if at % _HELD_BACK != _HELD_BACK - 1]
    survey = _kept(
        partial / "survey.json", Survey, lambda: make_survey(stream, rows, options, codes, progress)
    )

    def made(turn: int, expected: float | None) -> _Turn:
        folder = partial / f"turn-{turn}"
        folder.mkdir(exist_ok=True)
        make = functools.partial(make_plan, stream, survey, rows, options.budget, codes, expected)
        plan = _kept(folder / "plan.json", QuantizationPlan, make)
        files = _calibrate(stream, plan, folder, rows, options, codes, progress)
        weights = stored_in(stream, [Checkpoint(file) for file in files])
        kl = evaluate(stream, {"": weights}, {"": held_back})[""][""]["kl"] if held_back else None
        return _Turn(plan=plan, files=files, weights=weights, kl=kl)

    turn = made(0, None) if options.target_kl is None else _search(made, options.target_kl)
    plan = turn.plan
    sizes = {name: 64 for name in (choice.module for choice in plan.choices if not choice.reason)}
    variants = {"uniform NF4": rounded_plainly(stream, codes, sizes), "sloth": turn.weights}
    stores = [Checkpoint(file) for file in turn.files]
    adapter: dict[str, Tensor] = {}
    if options.lora_init:
        adapter = {key: s.tensor(key) for s in stores for key in s.shapes if key.startswith(PREFIX)}

        def adapted(index: int, layer: nn.Module) -> dict[str, Tensor]:
            found = {}
            for name, weight in turn.weights(index, layer).items():
                factors = factors_in(adapter, stream.name(index, name))
                a, b = (factor.to(weight.device) for factor in factors)
                found[name] = weight.float() + b @ a
            return found

        variants["sloth + lora_init"] = adapted
    measured = evaluate(stream, variants, held_out, progress) if held_out else {}
    result = Result(
        out=out,
        plan=plan,
        notes=tuple(notes),
        seconds=time.monotonic() - began,
        evaluation=measured,
        reached_kl=turn.kl,
    )
    if adapter:
        save_adapter(partial / "lora_init", adapter, [*shapes, *plan.others], out)
    _assemble(model, partial, turn.files, result)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return result


@dataclass(frozen=True, kw_only=True)
class _Turn:
    plan: QuantizationPlan
    files: list[Path]
    weights: Weights
    kl: float | None


def _search(made: Callable[[int, float | None], _Turn], target: float) -> _Turn:
    """The turn with the most expected KL whose measured KL is at most `target`; 15 % less is near enough.

    Calibrated rounding leaves a share of what plain NF4 is expected to do: the first turns find which one,
    and those after a turn on either side of the target interpolate.
    """
    passed: tuple[float, _Turn] | None = None
    failed: tuple[float, float] | None = None
    expected = target / _FIRST_SHARE
    for at in itertools.count():
        turn = made(at, expected)
        reached = max(turn.kl or 0.0, 1e-9 * target)
        if reached > target:
            if not turn.plan.expected_kl:  # nothing is left whose bytes were seen to buy anything
                raise ValueError(f"target_kl={target!r}: allowed is {reached:.3g} or more for this model")
            failed = expected, reached
        else:
            passed = expected, turn
            if reached >= 0.85 * target or turn.plan.total_bytes == turn.plan.uniform_bytes or at >= _TURNS:
                break
        aim = 0.95 * target / reached
        if passed and failed:
            low = passed[0], max(passed[1].kl or 0.0, 1e-9 * target)
            slope = math.log(failed[0] / low[0]) / math.log(failed[1] / low[1])
            expected = low[0] * (0.95 * target / low[1]) ** slope
            if at >= _TURNS or expected <= 1.03 * low[0]:
                break
        else:  # as long as none passes the expected KL shrinks: at 0 all linears are in 16 bits
            expected *= min(10.0, aim)
    assert passed is not None
    return passed[1]


def _kept(path: Path, kind: type[Any], make: Callable[[], Any]) -> Any:
    """What an interrupted run left in `path`, or what is made now and left there."""
    if not path.is_file():
        made = make()
        made.save(path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return kind.load(path)


def _job(model: Path, config: dict[str, Any], rows: Sequence[Tensor], options: Options) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.numpy().tobytes() + b"|")
    weights = sorted((p.name, p.stat().st_size, int(p.stat().st_mtime)) for p in model.glob("*.safetensors"))
    values = {
        "version": _VERSION,
        "model": str(model.resolve()),
        "config": config,
        "weights": weights,
        "rows": digest.hexdigest(),
        "options": {name: getattr(options, name) for name in Options.__dataclass_fields__},
    }
    done: dict[str, Any] = json.loads(json.dumps(values))
    return done


def _calibrate(
    stream: Stream,
    plan: QuantizationPlan,
    folder: Path,
    rows: Sequence[Tensor],
    options: Options,
    codes: Codes,
    progress: Progress,
) -> list[Path]:
    """The file of each layer's 4-bit tensors, written where it is not there yet."""
    from safetensors.torch import load_file, save_file

    files = [folder / f"layer-{index:05d}.tensors" for index in range(len(stream))]
    original = stream.start(rows)
    hidden = list(original)
    for index, file in enumerate(files):
        progress("calibrating", index, len(files))
        sizes = _blocksizes(stream, plan, index)
        if file.is_file():
            layer = stream.load(index)
            work, tensors = copy.deepcopy(layer), load_file(file)
            for name in sizes:
                full = stream.name(index, f"{name}.weight")
                put(work, name, expand_tensors(tensors, full, stream.device), stream.device)
        else:
            layer, work, tensors = calibrate_layer(
                stream,
                index,
                sizes,
                {name: stream.dtype(index, name) for name in sizes},
                original,
                hidden,
                codes,
                drift_share=options.drift_share,
                sweeps=options.sweeps,
                lora_rank=options.lora_init,
            )
            save_file(tensors, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        if not all(file.is_file() for file in files[index + 1 :]):  # else nothing needs them any more
            if options.drift_share:  # else nobody asks what the original model would do
                original = [stream.run(index, layer, states, row) for row, states in enumerate(original)]
            hidden = [stream.run(index, work, states, row) for row, states in enumerate(hidden)]
    progress("calibrating", len(files), len(files))
    return files


def _blocksizes(stream: Stream, plan: QuantizationPlan, index: int) -> dict[str, int]:
    """Names within a layer of the linears in 4 bits, and their block sizes."""
    start = stream.name(index, "")
    return {
        choice.module.removeprefix(start): choice.blocksize
        for choice in plan.choices
        if choice.blocksize is not None and choice.module.startswith(start)
    }


def _assemble(model: Path, partial: Path, layers: Sequence[Path], result: Result) -> None:
    """Everything that a checkpoint holds, then nothing else."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    store = Checkpoint(model)
    where: dict[str, Path] = {}
    for path in layers:
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    by_weight: dict[str, list[str]] = {}
    for choice in result.plan.choices:
        if choice.bits == 4:
            key = f"{choice.module}.weight"
            by_weight[key] = [name for name in where if name == key or name.startswith(f"{key}.")]
    shards: list[dict[str, Tensor]] = [{}]
    files: list[Path] = []
    index: dict[str, int] = {}
    total = size = 0

    def write() -> None:
        files.append(partial / f"shard-{len(files):05d}")
        save_file(shards[-1], files[-1], metadata={"format": "pt"})
        shards[-1] = {}

    for key in store.shapes:
        for name in by_weight.get(key, [key]):
            if name in where:
                with safe_open(where[name], "pt") as file:
                    tensor = file.get_tensor(name)
            else:
                tensor = store.tensor(name)
            if size and size + tensor.nbytes > _SHARD_BYTES:
                write()
                size = 0
            shards[-1][name], index[name] = tensor, len(files)
            size += tensor.nbytes
            total += tensor.nbytes
    write()
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    for path, name in zip(files, names, strict=True):
        os.replace(path, partial / name)
    if len(names) > 1:
        weight_map = {name: names[at] for name, at in index.items()}
        _write_json(
            partial / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    for path in model.iterdir():
        ours = path.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth") or path.name in _OURS
        if path.is_file() and not ours:
            shutil.copyfile(path, partial / path.name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    compute = "float16" if config.get("dtype", config.get("torch_dtype")) == "float16" else "bfloat16"
    config["quantization_config"] = bnb_config(result.plan.skip_modules, compute).to_dict()
    _write_json(partial / "config.json", config)
    values = result.to_dict()
    del values["out"], values["seconds"]  # the same files from one run and from a resumed one
    _write_json(partial / REPORT, values)
    for path in (partial / "job.json", partial / "survey.json"):
        path.unlink(missing_ok=True)
    for path in partial.glob("turn-*"):
        shutil.rmtree(path)
    for path in partial.glob("*.tmp"):
        path.unlink()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
