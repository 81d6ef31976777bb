"""What strategies and callback share, for every namespace of Lightning: finding models, patching, figures."""

from __future__ import annotations

import inspect
import sys
import time
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import nn

import sloth_plugins as sloth

_PREPARED: weakref.WeakKeyDictionary[nn.Module, sloth.Acceleration] = weakref.WeakKeyDictionary()


def prepare(
    model: nn.Module,
    settings: sloth.Settings | None = None,
    *,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Patch `model` in `configure_model`, before `fully_shard`; returns it.

    Later its parameters are sharded, and a patch can't be proven any more. Kernels are chosen for the device
    that the parameters are on, so `device` (None: leave it) moves the model there first. The strategy then
    leaves it as it is, and undoes it at teardown. Raises ValueError for a bad setting or a model on the meta
    device.
    """
    if device is not None:
        model = model.to(device)
    _PREPARED[model] = sloth.accelerate(
        model, sloth.Settings.resolve(settings, overrides, "sloth_lightning.prepare()")
    )
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
    """The outermost transformers and PEFT models below `module`, each once, out of torch.compile's wrapper.

    One is told by its `config` and by what it takes: `input_ids`, or embeddings that it can name.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def walk(parent: nn.Module) -> None:
        for child in parent.children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            inner = getattr(child, "_orig_mod", None)
            if isinstance(inner, nn.Module):
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
                self.warn(reason)
            elif acceleration := self._accelerate(model):
                made.append(acceleration)
        for old in self.accelerations:
            if old not in made:
                old.undo()
        self.accelerations = made

    def _accelerate(self, model: nn.Module) -> sloth.Acceleration | None:
        if any(p.is_meta for p in model.parameters()):
            self.warn(f"{type(model).__name__} is on the meta device, so it is left as it is")
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
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()) or any(
        hasattr(p, "ds_id") or p.numel() == 0 for p in model.parameters()
    ):
        return (
            f"the parameters of {name} are sharded by the strategy, so it is left as it is: "
            'strategy="sloth_fsdp" shards an accelerated model'
        )
    if "FlatParameter" in kinds:
        return (
            f'FSDP has flattened the parameters of {name}, so it is left as it is: use strategy="sloth_fsdp"'
        )
    return ""


class Figures:
    """Counts tokens and time over the last steps."""

    def __init__(self, accelerations: list[sloth.Acceleration]) -> None:
        self._accelerations = accelerations
        self._tokens = 0
        self._pauses = 0.0
        self._ended: float | None = None
        self._paused = False
        self._marks: deque[tuple[float, int]] = deque()
        self._handles: list[Any] = []

    def start(self, module: nn.Module, steps: int) -> None:
        """Count what the accelerated models in `module` train on, over windows of `steps` batches."""
        self.stop()
        self._marks = deque(maxlen=max(steps, 1) + 1)

        # A plain function: callbacks that average weights copy the module with its hooks.
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
                return
            ids = kwargs.get("input_ids", args[0] if args else None)
            embeddings = kwargs.get("inputs_embeds")
            if isinstance(ids, torch.Tensor):
                self._tokens += ids.numel()
            elif isinstance(embeddings, torch.Tensor):
                self._tokens += embeddings.shape[0] * embeddings.shape[1]

        models = {id(a.model) for a in self._accelerations}
        wrappers = {id(m._orig_mod): m for m in module.modules() if isinstance(m, _compiled_type())}
        for child in module.modules():
            if id(child) in models:
                # A hook inside what torch.compile traces would run once, in tracing.
                target = wrappers.get(id(child), child)
                self._handles.append(target.register_forward_pre_hook(count, with_kwargs=True))

    def stop(self) -> None:
        """Take the counting hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tokens, self._pauses, self._ended, self._paused = 0, 0.0, None, False
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
            self._marks.append((now, self._tokens))

    def batch_ends(self) -> float | None:
        """Tokens per second over the window, padding included."""
        self._ended = now = time.perf_counter()
        self._marks.append((now - self._pauses, self._tokens))
        (began, before), (ended, after) = self._marks[0], self._marks[-1]
        return (after - before) / (ended - began) if after > before and ended > began else None

    def values(self, rate: float | None) -> dict[str, float]:
        """The figures by their name in the log."""
        reports = [a.report for a in self._accelerations]
        figures = {
            "sloth/patched": float(sum(len(r.patched) for r in reports)),
            "sloth/skipped": float(sum(len(r.skipped) for r in reports)),
            "sloth/peak_bytes": float(peak_bytes(self._accelerations)),
        }
        return figures if rate is None else {"sloth/tokens_per_s": round(rate, 1), **figures}


def _compiled_type() -> type[nn.Module]:
    from torch._dynamo import OptimizedModule

    return OptimizedModule


def peak_bytes(accelerations: list[sloth.Acceleration]) -> int:
    """The most memory so far: allocated on the current CUDA device; on a CPU, this process's resident set."""
    models = [a.model for a in accelerations if a.model is not None]
    if any(p.is_cuda for model in models for p in model.parameters()):
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_reports(accelerations: list[sloth.Acceleration]) -> None:
    """The report of each model, to stderr."""
    from rich.console import Console

    for acceleration in accelerations:
        acceleration.report.print(Console(stderr=True))
