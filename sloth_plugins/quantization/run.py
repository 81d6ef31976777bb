"""`sloth quantize`: from a model directory to an ordinary bitsandbytes checkpoint, resumable layer by layer.

Work goes on in `OUT.partial` (the plan, one file for each finished layer) and takes the final name as a
whole. Hidden states are not stored: a resumed run sends the texts through the finished layers again.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sloth_plugins.quantization.calibrate import calibrate_layer, linears, matmul_precision, put
from sloth_plugins.quantization.plan import Offer, QuantizationPlan, bnb_config, nf4_bytes, solve
from sloth_plugins.quantization.rounding import BLOCKSIZES, Codes, expand_tensors
from sloth_plugins.quantization.sensitivity import kl_of, measure, plainly
from sloth_plugins.quantization.stream import Checkpoint, Stream, open_stream
from sloth_plugins.quantization.texts import read_texts, to_rows
from sloth_plugins.settings import nearest

REPORT = "sloth_quantization.json"
_OURS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", REPORT)
_SHARD_BYTES = 2**30
_VERSION = 1  # of the rounding: a run of another is not resumed

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run may choose; ValueError names the option, its value and what is allowed."""

    budget: float = 1.0
    """Bytes of the checkpoint over those of uniform NF4."""
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
    compute: str = "medium"
    """torch's float32 matmul precision for the layers' own code."""

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int | float) or not 1 <= self.budget <= 4:
            raise ValueError(
                f"budget={self.budget!r}: allowed is a ratio to the bytes of uniform NF4, from 1.0 to 4"
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
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "out": str(self.out),
            "ratio": self.plan.ratio,
            "evaluation": self.evaluation,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "plan": self.plan.to_dict(),
        }


def make_plan(
    stream: Stream,
    rows: Sequence[Tensor],
    options: Options,
    codes: Codes,
    progress: Progress = lambda what, done, of: None,
) -> QuantizationPlan:
    """Measure and solve: which linears stay in 16 bits, which get which blocks."""
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
    stored = {f"{offer.module}.weight" for offer in offers}
    rest_bytes = sum(size for key, size in sizes.items() if key not in stored)
    uniform = rest_bytes + sum(offer.ways[0][1] for offer in offers)
    if options.budget > 1 or len(options.block_sizes) > 1:
        few: list[Tensor] = []
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
    choices = solve(offers, int(uniform * options.budget) - rest_bytes)
    return QuantizationPlan(
        budget=options.budget,
        uniform_bytes=uniform,
        total_bytes=rest_bytes + sum(choice.bytes for choice in choices),
        choices=tuple(choices),
        others=tuple(others),
    )


def plan_quantization(
    model: nn.Module | str | Path,
    calibration: Sequence[str | Sequence[int]],
    budget: float = 1.1,
    *,
    tokenizer: Any = None,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    manager: Any = None,
) -> QuantizationPlan:
    """Which linears stay in 16 bits so that the model is at most `budget` times as large as in uniform NF4.

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
        return make_plan(stream, rows, options, Codes(where))


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
    evaluation: Path | None = None,
    evaluation_rows: int = 64,
    restart: bool = False,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Result:
    """Quantize the model directory `model` into `out`, which must not be there.

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
    held_out: list[Tensor] = []
    if evaluation is not None:
        other = read_texts(evaluation, tokenizer, "evaluate")
        if common := set(texts) & set(other):
            raise ValueError(
                f"evaluate={str(evaluation)!r}: {len(common)} of its {len(other)} are calibration texts "
                "too: allowed is text that the rounding has not seen"
            )
        held_out = to_rows(other, tokenizer, options.row_tokens, evaluation_rows)
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


def _work(
    model: Path,
    out: Path,
    partial: Path,
    rows: list[Tensor],
    held_out: list[Tensor],
    options: Options,
    stream: Stream,
    whole: str | None,
    progress: Progress,
    began: float,
) -> Result:
    codes, notes = Codes(stream.device), list[str]()
    if whole:
        notes.append(f"the model is in memory as a whole: {whole}")
    tokens = sum(row.numel() for row in rows)
    widest = max(m.weight.shape[1] for layer in stream.layers for m in linears(layer).values())
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
    if (partial / "plan.json").is_file():
        plan = QuantizationPlan.load(partial / "plan.json")
    else:
        plan = make_plan(stream, rows, options, codes, progress)
        plan.save(partial / "plan.json.tmp")
        os.replace(partial / "plan.json.tmp", partial / "plan.json")

    stored = _calibrate(stream, plan, partial, rows, options, codes, progress)
    measured = _evaluate(stream, plan, stored, held_out, codes, progress) if held_out else {}
    result = Result(
        out=out,
        plan=plan,
        notes=tuple(notes),
        seconds=time.monotonic() - began,
        evaluation=measured,
    )
    _assemble(model, partial, stored, result)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return result


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
    partial: Path,
    rows: Sequence[Tensor],
    options: Options,
    codes: Codes,
    progress: Progress,
) -> list[Path]:
    """The file of each layer's 4-bit tensors, written where it is not there yet."""
    from safetensors.torch import load_file, save_file

    files = [partial / f"layer-{index:05d}.tensors" for index in range(len(stream))]
    original = stream.start(rows)
    hidden = list(original)
    for index, file in enumerate(files):
        progress("calibrating", index, len(files))
        sizes = _blocksizes(stream, plan, index)
        if file.is_file():
            layer, work = stream.load(index), stream.load(index)
            tensors = load_file(file)
            for name in sizes:
                put(work, name, expand_tensors(tensors, stream.name(index, f"{name}.weight")), stream.device)
        else:
            layer, work, tensors = calibrate_layer(
                stream,
                index,
                sizes,
                {name: _dtype(stream, index, name) for name in sizes},
                original,
                hidden,
                codes,
                drift_share=options.drift_share,
                sweeps=options.sweeps,
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


def _dtype(stream: Stream, index: int, name: str) -> torch.dtype:
    if stream.checkpoint is None:
        return torch.bfloat16
    return stream.checkpoint.dtypes[stream.name(index, f"{name}.weight")]


def _evaluate(
    stream: Stream,
    plan: QuantizationPlan,
    files: Sequence[Path],
    rows: Sequence[Tensor],
    codes: Codes,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """KL to the original, perplexity and top-1 agreement of the original, uniform NF4 and the result."""
    from safetensors.torch import load_file

    start = stream.start(rows)
    states = {"original": start, "uniform NF4": list(start), "sloth": list(start)}
    for index, file in enumerate(files):
        progress("evaluating", index, len(files))
        tensors, chosen = load_file(file), _blocksizes(stream, plan, index)
        forced = {choice.module for choice in plan.choices if choice.reason}
        for kind in states:
            layer = stream.load(index)
            for name, module in linears(layer).items():
                if kind == "sloth" and name in chosen:
                    weight = expand_tensors(tensors, stream.name(index, f"{name}.weight"))
                elif kind == "uniform NF4" and stream.name(index, name) not in forced:
                    weight = plainly(module.weight.data, _dtype(stream, index, name), 64, codes)
                else:
                    continue
                put(layer, name, weight, stream.device)
            states[kind] = [stream.run(index, layer, x, row) for row, x in enumerate(states[kind])]
    sums = {kind: [0.0, 0.0, 0.0] for kind in states}
    tokens = predicted = 0
    for row, ids in enumerate(rows):
        truth = stream.logits(states["original"][row], row)
        following = ids[0, 1:, None].to(truth.device)
        tokens, predicted = tokens + ids.numel(), predicted + following.numel()
        for kind, hidden in states.items():
            logits = stream.logits(hidden[row], row)
            sums[kind][0] += kl_of(truth, logits).sum().item()
            sums[kind][1] -= logits.log_softmax(-1)[:-1].gather(1, following).sum().item()
            sums[kind][2] += (logits.argmax(-1) == truth.argmax(-1)).sum().item()
    progress("evaluating", len(files), len(files))
    return {
        kind: {
            "kl": kl / tokens,
            "perplexity": float(torch.tensor(loss / predicted).exp()),
            "top1": same / tokens,
            "tokens": tokens,
        }
        for kind, (kl, loss, same) in sums.items()
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
    for path in (*layers, partial / "job.json", partial / "plan.json"):
        path.unlink(missing_ok=True)
    for path in partial.glob("*.tmp"):
        path.unlink()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
