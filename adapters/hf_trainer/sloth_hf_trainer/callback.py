"""SlothCallback: see the package's docstring and adapters/hf_trainer/README.md."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import sloth_plugins as sloth
from sloth_plugins.figures import TokenCounter, cuda_devices, peak_bytes

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


class SlothCallback(TrainerCallback):  # type: ignore[misc]
    """Accelerates the Trainer's model and logs `sloth/...` figures.

    Args:
        settings: sloth_plugins.Settings, or None for the defaults.
        show_report: print the report to stderr, once, when training begins, and at its end which way the
            head's losses took (main process only).
        overrides: fields of Settings, which win over `settings`.

    Raises ValueError for a bad setting when it is made; under `strict=True`, SkippedSiteError when the model
    is patched. Anything else that goes wrong in patching is a warning, and training goes on with the model's
    own code.

    After patching, `acceleration` holds the record (`.report`, `.undo()`).
    """

    def __init__(
        self, settings: sloth.Settings | None = None, *, show_report: bool = True, **overrides: Any
    ) -> None:
        self._show_report = show_report
        self.settings = sloth.Settings.resolve(settings, overrides, "SlothCallback()")
        self.acceleration: sloth.Acceleration | None = None
        self._printed: sloth.Acceleration | None = None
        self._warned = False
        self._counter = TokenCounter()
        self._devices: tuple[Any, ...] | None = None
        self._window_began: float | None = None
        self._step_ended: float | None = None
        self._run_tokens = 0
        self._run_seconds = 0.0

    # Patching

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._patch(args, kwargs.get("model"))
        _go_first(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._patch(args, kwargs.get("model"))
        trainer = _go_first(self)
        if self.acceleration is None:
            return
        self._note_reference_model(trainer)
        self._reset_figures()
        self._count_tokens(trainer)
        wanted = self._show_report and state.is_world_process_zero
        if wanted and self._printed is not self.acceleration:
            self._printed = self.acceleration
            from rich.console import Console

            self.acceleration.report.print(Console(stderr=True))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch where only evaluate() is called and the callback was added later, or served elsewhere."""
        model = kwargs.get("model")
        if model is None or self._warned:
            return
        if self.acceleration is None or self.acceleration.model is not _unwrapped(model):
            self._patch(args, model)

    def _patch(self, args: TrainingArguments, model: nn.Module | None) -> None:
        if model is None:
            return
        model = _unwrapped(model)
        held = self.acceleration
        if held is not None and held.active and held.model is model and (args.fsdp or args.deepspeed):
            return  # sharded since then: its modules and parameters are the wrapper's now
        if args.n_gpu > 1 and not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
            self._warn_once(
                f"this run uses torch.nn.DataParallel on {args.n_gpu} GPUs, whose replicas would run the "
                "first GPU's forwards, so nothing is patched: start it with torchrun or accelerate launch, "
                "or set CUDA_VISIBLE_DEVICES to one GPU"
            )
            return
        settings, theirs = self.settings, bool(getattr(args, "activation_offloading", False))  # TRL's
        if theirs and settings.checkpointing == "auto" and settings.memory_budget_bytes is None:
            settings = dataclasses.replace(settings, checkpointing="off")
        try:
            acceleration = sloth.accelerate(model, settings)
        except sloth.SlothError:  # what the user asked for can't be done, in one sentence
            raise
        except Exception as error:  # an accelerator must never take a user's run down
            if self.settings.strict:
                raise
            self._warn_once(
                f"the model is left as it is, because patching failed: {type(error).__name__}: {error}"
            )
            return
        note = "activation_offloading=True is kept, so sloth plans no checkpointing of its own"
        if settings is not self.settings and note not in acceleration.report.notes:
            acceleration.report.notes.append(note)
        if held is not None and held is not acceleration:
            held.undo()  # model_init made a new model
        self.acceleration = acceleration

    def _note_reference_model(self, trainer: Trainer | None) -> None:
        reference = getattr(trainer, "ref_model", None)
        if self.acceleration is None or not isinstance(reference, nn.Module):
            return
        note = (
            "the trainer's ref_model is a second model that no callback is given: it runs as it is. "
            "sloth_plugins.accelerate(trainer.ref_model) patches it too"
        )
        notes = self.acceleration.report.notes
        if _unwrapped(reference) is not self.acceleration.model and note not in notes:
            notes.append(note)

    # Figures

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._window_began is None:
            self._window_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_ended = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave_out_the_pause()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave_out_the_pause()

    def _leave_out_the_pause(self) -> None:
        """Evaluating and saving between two steps is no training time: the window begins that much later."""
        if self._window_began is not None and self._step_ended is not None:
            now = time.perf_counter()
            self._window_began += now - self._step_ended
            self._step_ended = now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to the log that the trackers, called after us, are given, and to the history.

        They go beside every loss (tokens per second since the last one) and into the summary at the end
        (tokens per second of the whole run).
        """
        if self.acceleration is None or logs is None or not {"loss", "train_loss"} & logs.keys():
            return
        tokens = self._counter.tokens
        seconds = time.perf_counter() - self._window_began if self._window_began is not None else 0.0
        self._counter.tokens, self._window_began, self._step_ended = 0, None, None
        self._run_tokens += tokens
        self._run_seconds += seconds
        if "train_loss" in logs:
            tokens, seconds = self._run_tokens, self._run_seconds
        if self._devices is None:  # once a run: looking at all parameters takes milliseconds
            self._devices = cuda_devices([self.acceleration.model])
        report = self.acceleration.report
        figures: dict[str, float] = {
            "sloth/patched": len(report.patched),
            "sloth/skipped": len(report.skipped),
            "sloth/peak_bytes": peak_bytes(self._devices),
        }
        if tokens and seconds > 0:
            figures["sloth/tokens_per_s"] = round(tokens / seconds, 1)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._counter.stop()
        if self._show_report and state.is_world_process_zero and self.acceleration is not None:
            for line in self.acceleration.report.head_line().splitlines():
                print(f"sloth head {line}", file=sys.stderr)

    def _reset_figures(self) -> None:
        self._window_began = self._step_ended = self._devices = None
        self._counter.tokens = self._run_tokens = 0
        self._run_seconds = 0.0

    def _count_tokens(self, trainer: Trainer | None) -> None:
        self._counter.stop()  # a run that ended in an error has left its own
        model = self.acceleration.model if self.acceleration is not None else None
        if model is None:
            return

        wrapped = getattr(trainer, "model_wrapped", None)
        compiled = isinstance(getattr(wrapped, "_orig_mod", None), nn.Module)
        self._counter.watch(model, wrapped if compiled else None)

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"sloth: {message}", stacklevel=3)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in WRAPPERS:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _go_first(callback: TrainerCallback) -> Trainer | None:
    """Put `callback` before the trackers, which the Trainer calls first; return the Trainer that is calling.

    The events' arguments hold neither the Trainer nor its handler, so both are found on the call stack. Where
    they aren't there, the figures still reach the history and the console.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler: Any = getattr(caller, "callback_handler", None)
        if isinstance(caller, Trainer) and callback in getattr(handler, "callbacks", ()):
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return caller
        frame = frame.f_back
    return None
