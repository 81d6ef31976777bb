"""claims -> conflicts -> verification -> apply -> report -> undo. The only code that changes a model."""

from __future__ import annotations

import dataclasses
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn

from sloth_plugins.manager import BUILT_INS, Manager, default_manager
from sloth_plugins.numerics import Comparison
from sloth_plugins.report import Patched, Report, environment
from sloth_plugins.settings import Settings
from sloth_plugins.specs import (
    BadInputError,
    ConflictError,
    KernelSpec,
    NotASite,
    Patch,
    Site,
    Skip,
    SkippedSiteError,
    SlothError,
)
from sloth_plugins.survey import PATCHES, PlanContext, is_ours, linear_widths
from sloth_plugins.upcasts import narrow_upcasts
from sloth_plugins.verify import Trial, VerificationError, capture, nonfinite_parameters, undisturbed, verify

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Acceleration] = weakref.WeakKeyDictionary()
_ABSENT = object()
_said: set[str] = set()


class Acceleration:
    """An accelerated model's record: the report, and the way back; as a context manager it undoes."""

    def __init__(self, model: nn.Module, settings: Settings, manager: Manager, report: Report) -> None:
        self._model = weakref.ref(model)
        self._manager = manager
        self._undo: list[Callable[[], None]] = []
        self._slots: list[tuple[nn.Module, Any, MethodType]] = []
        self._fingerprint: tuple[Any, ...] = ()
        self.settings = settings
        self.report = report
        self.active = True
        self._announced = False

    @property
    def model(self) -> nn.Module | None:
        """The accelerated model, while it lives."""
        return self._model()

    def undo(self) -> None:
        """Give every module its own forward back, the same object that it had; a second call does nothing."""
        if not self.active:
            return
        self.active = False
        restores, self._undo = self._undo, []
        try:
            for restore in reversed(restores):
                restore()
        finally:  # a plugin's error must not keep our forwards on the model
            self._take_out()
        if self._announced:
            self._manager.restored(self)

    def _take_out(self) -> None:
        for module, before, installed in reversed(self._slots):
            if module.__dict__.get("forward") is not installed:
                continue  # somebody put another forward on top of ours: it isn't ours to remove
            if before is _ABSENT:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._slots.clear()
        model = self.model
        if model is not None and _ACTIVE.get(model) is self:
            del _ACTIVE[model]

    def _intact(self) -> bool:
        """Whether every patch sits where it was put; accelerating a submodule takes its patches over."""
        return all(module.__dict__.get("forward") is installed for module, _, installed in self._slots)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"<Acceleration: {len(self.report.patched)} sites patched, {state}>"

    def _install(self, model: nn.Module, patch: Patch) -> None:
        for name, forward in patch.forwards.items():
            module = model.get_submodule(name)
            before = module.__dict__.get("forward", _ABSENT)
            PATCHES.add(forward)
            installed = MethodType(forward, module)
            module.__dict__["forward"] = installed
            self._slots.append((module, before, installed))
        if patch.counts is not None:
            self.report.head[patch.module] = patch.counts


def accelerate(
    model: nn.Module, settings: Settings | None = None, *, manager: Manager | None = None, **overrides: Any
) -> Acceleration:
    """Patch `model` in place with every kernel that proves itself.

    To be called after adapters are added and before the optimizer is built. `overrides` are fields of
    Settings. On a model that is already accelerated with equal settings the same Acceleration is returned;
    with others, or after modules were added or replaced, it is undone and made anew. Raises ValueError for a
    bad setting or a model on the meta device, SkippedSiteError under strict=True, ConflictError where two
    plugins claim one module.
    """
    chosen = Settings.resolve(settings, overrides, "accelerate()")
    if not isinstance(model, nn.Module):
        raise BadInputError(f"model={type(model).__name__}: accelerate() takes a torch.nn.Module")
    if any(p.is_meta for p in model.parameters()):
        raise BadInputError(
            "the model is on the meta device, so nothing can be verified or run: load its weights first, or "
            "use sloth_plugins.plan(model) or `sloth plan MODEL_DIR` to see what would be patched"
        )
    existing = _ACTIVE.get(model)
    if existing is not None and existing.active:
        if (
            existing.settings == chosen
            and existing._fingerprint == _fingerprint(model)
            and existing._intact()
        ):
            return existing
        existing.undo()
    _strip_marks(model)
    run = _Run(model, chosen, manager or default_manager())
    try:
        acceleration = run.apply()
        _ACTIVE[model] = acceleration
        acceleration._announced = True
        run.manager.patched(acceleration)
    except BaseException:
        run.acceleration.undo()
        raise
    return acceleration


def plan(
    model: nn.Module, settings: Settings | None = None, *, manager: Manager | None = None, **overrides: Any
) -> Report:
    """What `accelerate` would patch; changes and verifies nothing. The model may be on the meta device."""
    run = _Run(model, Settings.resolve(settings, overrides, "plan()"), manager or default_manager())
    for patch in run.planned():
        run.report.patched.extend(run.rows(patch, None))
    run.report.planned = True
    run.finish()
    return run.report


class _Run:
    """One acceleration in the making."""

    def __init__(self, model: nn.Module, settings: Settings, manager: Manager) -> None:
        self.started = time.perf_counter()
        self.model, self.settings, self.manager = model, settings, manager
        self.report = Report(
            settings=settings.to_dict(), environment=environment(), notes=list(manager.problems)
        )
        self.acceleration = Acceleration(model, settings, manager, self.report)
        self.device = _device(model)
        self.verdicts: dict[tuple[Any, ...], tuple[Comparison, ...] | Skip] = {}
        self.trial: Trial | None = None

    def planned(self) -> list[Patch]:
        """Survey, plans of every plugin, objections and conflicts; what is left over goes into the report."""
        survey = self.manager.survey(self.model, self.settings)
        self.report.sites = dict(Counter(site.role for site in survey.sites))
        self.report.skipped.extend(survey.skips)
        kernels = tuple(self.manager.kernels())
        self._say_why_no_triton(kernels)
        context = PlanContext(
            sites=survey.sites,
            settings=self.settings,
            device=self.device,
            dtypes={site.module: activation_dtype(self.model, site) for site in survey.sites},
            kernels=kernels,
            manager=self.manager,
        )
        plans = self.manager.plan(self.model, context)
        self.report.skipped.extend(item for item in plans if isinstance(item, Skip))
        patches = self.without_conflicts([item for item in plans if isinstance(item, Patch)])
        objections = {
            (skip.module, skip.op): skip for skip in self.manager.check(self.model, patches, self.settings)
        }
        self.report.skipped.extend(objections.values())
        return [patch for patch in patches if (patch.module, patch.op) not in objections]

    def without_conflicts(self, patches: Sequence[Patch]) -> list[Patch]:
        """One claimant a module: a third party displaces a built-in; two third parties are an error."""
        claimed: dict[str, Patch] = {}
        kept: list[Patch] = []
        waiting = deque(sorted(patches, key=lambda patch: patch.plugin in BUILT_INS))
        while waiting:
            patch = waiting.popleft()
            holders = {claimed[name].plugin: name for name in patch.forwards if name in claimed}
            if not holders:
                claimed.update(dict.fromkeys(patch.forwards, patch))
                kept.append(patch)
                continue
            (holder, name), *_ = holders.items()
            if patch.plugin not in BUILT_INS:
                raise ConflictError(
                    f"plugins {holder!r} and {patch.plugin!r} both claim {name!r}: switch one of them off "
                    f"with SLOTH_DISABLED_PLUGINS={holder} or ={patch.plugin}"
                )
            self.report.skipped.append(
                Skip(
                    module=patch.module,
                    op=patch.op,
                    reason=f"plugin {holder!r} patches {name!r}",
                    benign=True,
                )
            )
            waiting.extendleft(dataclasses.replace(part, plugin=patch.plugin) for part in patch.otherwise)
        return kept

    def apply(self) -> Acceleration:
        if not self.settings.keep_float32:
            note, widen = narrow_upcasts(self.model)
            self.acceleration._undo.append(widen)
            self.report.notes.append(note)
        patches = self.planned()
        if not self.settings.verify:
            patches = [part for patch in patches for part in (patch.otherwise or (patch,))]
            self.report.notes.append(
                "verify=False: no patch was compared with float64 or with the model's own code"
            )
        accepted: list[tuple[Patch, tuple[Comparison, ...] | None]] = []
        if self.settings.verify:
            with undisturbed(self.model):
                self.prepare_trial(patches)
                waiting = deque(patches)
                while waiting:
                    patch = waiting.popleft()
                    verdict = self.verdict(patch)
                    if isinstance(verdict, Skip):
                        self.report.skipped.append(verdict)
                        waiting.extendleft(
                            dataclasses.replace(part, plugin=patch.plugin) for part in patch.otherwise
                        )
                    else:
                        accepted.append((patch, verdict))
        else:
            accepted = [(patch, None) for patch in patches]
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        for patch, comparisons in sorted(accepted, key=lambda item: order[item[0].module]):
            self.acceleration._install(self.model, patch)
            self.report.patched.extend(self.rows(patch, comparisons))
        self.trial = None
        self.checkpointing()
        self.finish()
        self.acceleration._fingerprint = _fingerprint(self.model)
        return self.acceleration

    def prepare_trial(self, patches: Sequence[Patch]) -> None:
        generator = torch.Generator(device=self.device).manual_seed(0x5107)
        first = {patch.signature: patch for patch in reversed(patches)}
        wanted = ((*p.replays, p.module) if p.verify is None else p.replays for p in first.values())
        names = list(dict.fromkeys(name for modules in wanted for name in modules))
        replays, error = capture(self.model, names, self.device, generator) if names else ({}, "")
        self.trial = Trial(
            model=self.model, device=self.device, generator=generator, replays=replays, replay_error=error
        )

    def verdict(self, patch: Patch) -> tuple[Comparison, ...] | Skip:
        """The proof of a patch's signature, run once; and each instance's own small parameters are finite."""
        assert self.trial is not None
        for (
            name
        ) in patch.forwards:  # first: one broken layer must not stand for all the layers of its signature
            module = self.model.get_submodule(name)
            for key, p in module._parameters.items():
                if (
                    p is not None
                    and p.dim() <= 1
                    and p.is_floating_point()
                    and not bool(torch.isfinite(p).all())
                ):
                    return Skip(
                        module=patch.module, op=patch.op, reason=f"{name}.{key} holds NaN or infinity"
                    )
        if patch.signature not in self.verdicts:
            self.verdicts[patch.signature] = self.prove(patch, self.trial)
        verdict = self.verdicts[patch.signature]
        return dataclasses.replace(verdict, module=patch.module) if isinstance(verdict, Skip) else verdict

    def prove(self, patch: Patch, trial: Trial) -> tuple[Comparison, ...] | Skip:
        benign = False
        try:
            device = next((p.device for p in trial.module(patch.module).parameters()), trial.device)
            return verify(patch, trial if device == trial.device else self.trial_on(device))
        except NotASite as reason:
            why, benign = str(reason), reason.benign
        except VerificationError as error:
            why = f"{patch.kernel.name}: {error}"
            if broken := nonfinite_parameters(trial.module(patch.module)):
                why = f"{', '.join(f'{patch.module}.{name}' for name in broken[:3])} holds NaN or infinity"
        except Exception as error:  # a kernel that can't compile or launch must not take the run down
            text = " ".join(str(error).split())[:200]
            why = f"{patch.kernel.name} failed: {type(error).__name__}: {text}"
        return Skip(module=patch.module, op=patch.op, reason=why, benign=benign)

    def trial_on(self, device: torch.device) -> Trial:
        assert self.trial is not None
        return dataclasses.replace(
            self.trial, device=device, generator=torch.Generator(device=device).manual_seed(0x5107)
        )

    def rows(self, patch: Patch, comparisons: tuple[Comparison, ...] | None) -> list[Patched]:
        """One row for each module whose forward the patch replaces, the patch's own module first."""
        measured = comparisons is not None
        return [
            Patched(
                module=module,
                op=patch.op,
                kernel=patch.kernel.name,
                max_rel_error=max((c.error for c in comparisons or ()), default=0.0) if measured else None,
                eager_rel_error=max((c.eager_error for c in comparisons or ()), default=0.0)
                if measured
                else None,
                plugin=patch.plugin,
            )
            for module in patch.forwards
        ]

    def checkpointing(self) -> None:
        """A plugin's plan, or recomputation of every layer if asked for; else the trainer's own stays."""
        wanted = self.settings.checkpointing
        chosen = wanted if not isinstance(wanted, str) else None
        if wanted == "auto":
            chosen = self.manager.plan_checkpointing(self.model, self.settings)
        if chosen is not None:
            undo = chosen.apply(self.model)
            if not callable(undo):
                raise BadInputError(
                    f"checkpointing={chosen!r}: its apply(model) returned {undo!r}; allowed is a function "
                    "that undoes it"
                )
            self.acceleration._undo.append(undo)
            self.report.checkpointing = {"chosen": str(chosen), "reason": f"checkpointing={wanted!r}"}
            return
        if wanted == "auto" and self.budgeted():
            return
        if wanted != "recompute":
            self.report.checkpointing.update(
                {"chosen": "left to the trainer", "reason": f"checkpointing={wanted!r}"}
            )
            return
        enable = getattr(self.model, "gradient_checkpointing_enable", None)
        if not callable(enable) or not getattr(self.model, "supports_gradient_checkpointing", True):
            raise BadInputError(
                f"checkpointing='recompute': {type(self.model).__name__} has no "
                "gradient_checkpointing_enable(); allowed for it are 'auto' and 'off'"
            )
        before, offload = bool(getattr(self.model, "is_gradient_checkpointing", False)), False
        if not before:
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            from sloth_plugins.checkpointing.execute import facts_of, inputs_leave_in_time, recompute_all

            facts = None
            with suppress(BadInputError):  # no facts of this model: its layers are recomputed all the same
                facts = facts_of(self.model, {row.op for row in self.report.patched})
                offload = inputs_leave_in_time(facts, next(self.model.parameters()).device)
            give_back = recompute_all(self.model, offload=offload, facts=facts)
            model = weakref.ref(self.model)  # the undo list must not keep the model alive

            def disable() -> None:
                give_back()
                if (alive := model()) is not None:
                    alive.gradient_checkpointing_disable()  # type: ignore[operator]

            self.acceleration._undo.append(disable)
        chosen = "recompute, the layers' inputs in host memory" if offload else "recompute"
        self.report.checkpointing = {"chosen": chosen, "reason": "checkpointing='recompute'"}

    def budgeted(self) -> bool:
        """Have the first batch planned within the budget or, without one, within what the GPU has; False,
        with a note, for a model that can't be."""
        from sloth_plugins.checkpointing import execute

        record, budget = self.report.checkpointing, self.settings.memory_budget_bytes
        parameter = next(self.model.parameters(), None)
        if budget is None and (
            self.settings.kernels == "off"
            or parameter is None
            or execute.usable_bytes(parameter.device) is None
        ):
            return False
        try:
            undo = execute.Automatic(self.settings, record, [row.op for row in self.report.patched]).apply(
                self.model
            )
        except Exception as error:
            asked = budget is not None
            if asked and (
                self.settings.strict
                or isinstance(error, execute.BudgetError)
                or not isinstance(error, BadInputError)
            ):
                raise
            # Nobody asked for a plan: whatever a model is, it goes on without one.
            record["note"] = str(error) if isinstance(error, BadInputError) else f"no plan: {error!r}"
            if asked:
                _warn(f"memory_budget_bytes is not used: {error}")
            return False
        self.acceleration._undo.append(undo)
        return True

    def finish(self) -> None:
        """Strictness, the one warning, the time."""
        self.report.seconds = time.perf_counter() - self.started
        real = [skip for skip in self.report.skipped if not skip.benign]
        if self.settings.strict and real:
            skip = real[0]
            raise SkippedSiteError(
                f"strict=True and {skip.module!r} is left alone ({skip.op}): {skip.reason}"
            )
        if self.report.planned or self.settings.kernels == "off":
            return
        if not self.report.patched:
            why = (
                f"the first candidate, {real[0].module!r}: {real[0].reason}"
                if real
                else "no known site was found"
            )
            _warn(f"nothing to patch in {type(self.model).__name__} ({why}); training goes on as it was")
        elif real:
            reasons = Counter(f"{skip.op}: {skip.reason}" for skip in real)
            listed = "; ".join(f"{reason} ({n}x)" for reason, n in reasons.most_common(3))
            _warn(f"{len(real)} sites are left to the model's own code: {listed}. See the report")

    def _say_why_no_triton(self, kernels: Sequence[KernelSpec]) -> None:
        if self.settings.kernels not in ("auto", "triton"):
            return
        reason = next((r for k in kernels if k.backend == "triton" and (r := k.unavailable())), None)
        if reason is None and (self.device.type == "cuda" or self.settings.kernels == "triton"):
            return  # where Triton was asked for, each site that it can't serve says so itself
        reason = reason or f"the model is on {self.device.type}"
        instead = (
            "nothing is patched" if self.settings.kernels == "triton" else "the PyTorch references are used"
        )
        self.report.notes.append(f"no Triton kernels ({reason}): {instead}")
        if self.device.type == "cuda" and reason not in _said:
            _said.add(reason)
            _warn(self.report.notes[-1])


def activation_dtype(model: nn.Module, site: Site) -> torch.dtype:
    """The dtype of a site's activations, from its parameters; of a quantized linear, its compute dtype."""
    module = model.get_submodule(site.module)
    for child in module.modules():
        if linear_widths(child) is None and child is not module:
            continue
        base = getattr(child, "base_layer", child)
        compute = getattr(base, "compute_dtype", None)
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if state is not None:
            return compute or state.dtype  # type: ignore[no-any-return]
        own = [p for p in base._parameters.values() if p is not None and p.is_floating_point()]
        if own:
            return own[0].dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _device(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":  # a plan: for the device that training would use
        return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return device


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a module is added, removed or replaced, or a parameter frozen, unfrozen, moved or cast."""
    return tuple((name, id(module)) for name, module in model.named_modules()) + tuple(
        (p.requires_grad, p.dtype, p.device) for p in model.parameters()
    )


def _strip_marks(model: nn.Module) -> None:
    """Remove our forwards from a deep copy of an accelerated model, or from another root's modules."""
    for module in model.modules():
        if is_ours(module.__dict__.get("forward")):
            del module.__dict__["forward"]


def _warn(message: str) -> None:
    warnings.warn(f"sloth: {message}", stacklevel=4)


__all__ = ["Acceleration", "SlothError", "accelerate", "plan"]
