"""What strategies and callback share, for every namespace of Lightning: finding models, patching, figures."""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn

import sloth_plugins as sloth
from sloth_plugins.figures import TokenCounter, cuda_devices, peak_bytes

WRAPPED = {"_orig_mod", "_fsdp_wrapped_module"}  # what torch.compile and FSDP1 hold the model as
_PREPARED: weakref.WeakKeyDictionary[nn.Module, sloth.Acceleration] = weakref.WeakKeyDictionary()


def prepare(
    model: nn.Module,
    settings: sloth.Settings | None = None,
    *,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Patch `model` in `configure_model`, before `fully_shard` or the strategy's own wrapping; returns it.

    Later its parameters are sharded, and a patch can't be proven any more. Kernels are chosen for the device
    that the parameters are on, so `device` (None: leave it) moves the model there first. A strategy or a
    callback of ours then leaves it as it is, and undoes it at teardown. A model that is sharded already is
    left alone with a warning (SkippedSiteError under strict=True). Raises ValueError for a bad setting or a
    model on the meta device.
    """
    chosen = sloth.Settings.resolve(settings, overrides, "sloth_lightning.prepare()")
    if reason := _sharded(model):
        Patcher(chosen).leave(reason)
        return model
    if device is not None:
        model = model.to(device)
    _PREPARED[model] = sloth.accelerate(model, chosen)
    return model


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard `model` in place with FSDP2 over `mesh["data_parallel"]`: each layer, then what is left.

    Layers are the entries of the outermost `nn.ModuleList`s.
    """
    from torch.distributed.fsdp import fully_shard

    def walk(parent: nn.Module) -> None:
        for child in parent.children():
            if isinstance(parent, nn.ModuleList):
                fully_shard(child, mesh=mesh["data_parallel"])
            else:
                walk(child)

    walk(model)
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def split(
    settings: Any, given: dict[str, Any], further: tuple[str, ...], where: str
) -> tuple[sloth.Settings, dict[str, Any]]:
    """Settings out of `settings` (Settings, a mapping or None) and `given`; and what in it is in `further`.

    Raises ValueError for a name that is neither, with the nearest one.
    """
    from collections.abc import Mapping
    from dataclasses import fields

    from sloth_plugins.settings import nearest

    names = [field.name for field in fields(sloth.Settings)]
    for name in given:
        if name not in names and name not in further:
            raise ValueError(
                f"{name!r} in {where}: allowed are settings, {', '.join((*names, *further))}."
                f"{nearest(name, (*names, *further, 'settings'))}"
            )
    if isinstance(settings, Mapping):
        settings = sloth.Settings.from_mapping(_tuples(settings), where)
    overrides = _tuples({name: v for name, v in given.items() if name in names and v is not None})
    rest = {name: value for name, value in given.items() if name not in names}
    return sloth.Settings.resolve(settings, overrides, where), rest


def _tuples(values: Any) -> dict[str, Any]:
    """A yaml's list as the tuple that it stands for."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def transformers_in(module: nn.Module) -> list[nn.Module]:
    """The outermost transformers and PEFT models below `module`, each once, out of their wrappers.

    One is told by its `config` and by what it takes: `input_ids`, or embeddings that it can name.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def walk(parent: nn.Module) -> None:
        for child in parent.children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            if WRAPPED & child._modules.keys():
                walk(child)
            elif _is_transformer(child):
                found.append(child)
            else:
                walk(child)

    walk(module)
    return found


def _is_transformer(module: nn.Module) -> bool:
    if getattr(module, "config", None) is None:
        return False
    if callable(getattr(module, "get_input_embeddings", None)):
        return True
    try:
        return "input_ids" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False


class Patcher:
    """The accelerations of one strategy or callback.

    `accelerations` holds one record a model; after teardown they are undone and still have their reports.
    """

    def __init__(self, settings: sloth.Settings) -> None:
        self.settings = settings
        self.accelerations: list[sloth.Acceleration] = []
        self._warned: set[str] = set()

    def patch(self, module: nn.Module | None) -> None:
        """Accelerate the transformers in `module`, or all of it where there is none; idempotent."""
        if module is None:
            return
        made: list[sloth.Acceleration] = []
        for model in transformers_in(module) or [module]:
            prepared = _PREPARED.get(model)
            if prepared is not None and prepared.active:
                made.append(prepared)
            elif reason := _sharded(model):
                self.leave(reason)
            elif acceleration := self._accelerate(model):
                made.append(acceleration)
        for old in self.accelerations:
            if old not in made:
                old.undo()
        self.accelerations = made

    def _accelerate(self, model: nn.Module) -> sloth.Acceleration | None:
        if any(p.is_meta for p in model.parameters()):
            self.leave(f"{type(model).__name__} is on the meta device, so it is left as it is")
            return None
        try:
            return sloth.accelerate(model, self.settings)
        except sloth.SlothError:  # what the user asked for can't be done, in one sentence
            raise
        except Exception as error:  # an accelerator must never take a user's run down
            if self.settings.strict:
                raise
            self.warn(
                f"{type(model).__name__} is left as it is, because patching failed: "
                f"{type(error).__name__}: {error}"
            )
            return None

    def undo(self) -> None:
        """Give every module its own forward back."""
        for acceleration in self.accelerations:
            acceleration.undo()

    def leave(self, reason: str) -> None:
        """Say once why a model is left alone; SkippedSiteError under strict=True."""
        if self.settings.strict:
            raise sloth.SkippedSiteError(f"strict=True: {reason}")
        self.warn(reason)

    def warn(self, message: str) -> None:
        """A warning, once."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"sloth: {message}", stacklevel=4)


def _sharded(model: nn.Module) -> str:
    """Why the parameters of `model` can't be used as they are, or an empty string."""
    kinds = {cls.__name__ for p in model.parameters() for cls in type(p).__mro__}
    name = type(model).__name__
    if "DTensor" in kinds:
        return (
            f"the parameters of {name} are sharded already, so it is left as it is: call "
            "sloth_lightning.prepare(model) in configure_model, before fully_shard"
        )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        return (
            f"DeepSpeed ZeRO-3 has sharded the parameters of {name}, so it is left as it is: stages 1 and 2 "
            'keep them whole, and strategy="sloth_fsdp" shards an accelerated model'
        )
    flat = "FlatParameter" in kinds or any(
        type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()
    )
    if flat or any(p.numel() == 0 for p in model.parameters()):
        return (
            f"FSDP has flattened the parameters of {name}, so it is left as it is: call "
            "sloth_lightning.prepare(model) in configure_model, before the strategy wraps it"
        )
    return ""


class Figures:
    """Counts tokens and time over the last steps."""

    def __init__(self, accelerations: list[sloth.Acceleration]) -> None:
        self._accelerations = accelerations
        self._counter = TokenCounter()
        self._devices: tuple[torch.device, ...] = ()
        self._pauses = 0.0
        self._ended: float | None = None
        self._paused = False
        self._marks: deque[tuple[float, int]] = deque()

    def start(self, module: nn.Module, steps: int) -> None:
        """Count what the accelerated models in `module` train on, over windows of `steps` batches."""
        self.stop()
        self._marks = deque(maxlen=max(steps, 1) + 1)

        compiled = {id(m._orig_mod): m for m in module.modules() if isinstance(m, _compiled_type())}
        for acceleration in self._accelerations:
            if (model := acceleration.model) is not None:
                self._counter.watch(model, compiled.get(id(model)))
        self._devices = cuda_devices(a.model for a in self._accelerations)

    def stop(self) -> None:
        """Take the counting hooks out."""
        self._counter.stop()
        self._counter.tokens, self._pauses, self._ended, self._paused = 0, 0.0, None, False
        self._marks.clear()

    def pause(self) -> None:
        """Until the next batch begins, time is no training time (a validation, a checkpoint)."""
        self._paused = True

    def batch_begins(self) -> None:
        """To be called before each batch."""
        now = time.perf_counter()
        if self._paused and self._ended is not None:
            self._pauses += now - self._ended
        self._paused = False
        if not self._marks:
            self._marks.append((now, self._counter.tokens))

    def batch_ends(self) -> float | None:
        """Tokens per second over the window, padding included."""
        self._ended = now = time.perf_counter()
        self._marks.append((now - self._pauses, self._counter.tokens))
        (began, before), (ended, after) = self._marks[0], self._marks[-1]
        return (after - before) / (ended - began) if after > before and ended > began else None

    def values(self, rate: float | None) -> dict[str, float]:
        """The figures by their name in the log."""
        reports = [a.report for a in self._accelerations]
        figures = {
            "sloth/patched": float(sum(len(r.patched) for r in reports)),
            "sloth/skipped": float(sum(len(r.skipped) for r in reports)),
            "sloth/peak_bytes": float(peak_bytes(self._devices)),
        }
        return figures if rate is None else {"sloth/tokens_per_s": round(rate, 1), **figures}


def _compiled_type() -> type[nn.Module]:
    from torch._dynamo import OptimizedModule

    return OptimizedModule


def print_reports(accelerations: list[sloth.Acceleration]) -> None:
    """The report of each model, to stderr."""
    from rich.console import Console

    for acceleration in accelerations:
        acceleration.report.print(Console(stderr=True))
