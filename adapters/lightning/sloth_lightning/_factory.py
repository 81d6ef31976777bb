"""The strategies and the callback, made for one package of Lightning.

`lightning` and `pytorch_lightning` are two copies of the same classes, and a Trainer refuses the other's.
"""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sloth_plugins as sloth
from sloth_lightning._core import Figures, Patcher, print_reports, shard, split

UNSERVED = ("XLAAccelerator", "MPSAccelerator")
SETTINGS = """

    Args:
        settings: sloth_plugins.Settings, a mapping of its fields, or None for the defaults.
        show_report: print the report to stderr, once, when the run begins (main process only).
        options: fields of Settings, which win over `settings` unless they are None, and arguments of the
            strategy of Lightning.

    Raises ValueError for a bad option when it is made; under `strict=True`, SkippedSiteError when the model
    is patched. After patching, `accelerations` holds one record a model (`.report`).
    """


def _names(*functions: Any) -> tuple[str, ...]:
    """The keyword arguments of `functions`, without those that a Trainer sets."""
    taken = (
        "self",
        "module",
        "device_ids",
        "accelerator",
        "precision_plugin",
        "precision",
        "parallel_devices",
    )
    found: dict[str, None] = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in taken and parameter.kind is not parameter.VAR_KEYWORD:
                found[name] = None
    return tuple(found)


def _signature(*functions: Any) -> inspect.Signature:
    """For help texts and LightningCLI, which reads options and their types off signatures."""
    import dataclasses

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter(
            "settings",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=dict[str, Any] | None,
        ),
        inspect.Parameter("show_report", keyword, default=True, annotation=bool),
    ]
    # None: not given. LightningCLI hands over every default, which would win over `settings`.
    parameters += [
        inspect.Parameter(field.name, keyword, default=None, annotation=Any)
        for field in dataclasses.fields(sloth.Settings)
    ]
    have = {p.name for p in parameters}
    for function in functions:
        for name in _names(function):
            if name not in have:
                have.add(name)
                own = inspect.signature(function).parameters[name]
                parameters.append(own.replace(kind=keyword, annotation=Any))
    return inspect.Signature(parameters)


def build(trainer_package: str, fabric_package: str, where: str) -> SimpleNamespace:
    """The classes for `trainer_package` and its Fabric; `where` is the module that will hold them by name."""
    strategies: Any = import_module(f"{trainer_package}.strategies")
    fabric: Any = import_module(f"{fabric_package}.strategies")
    callback_base: Any = import_module(f"{trainer_package}.callbacks.callback").Callback
    interactive = bool(import_module(f"{fabric_package}.utilities.imports")._IS_INTERACTIVE)

    class Patching:
        """What every strategy of ours has, over a strategy of Lightning."""

        patcher: Patcher
        show_report: bool
        word = "sloth"

        def _refuse(self, accelerator: Any) -> None:
            if type(accelerator).__name__ in UNSERVED:
                raise ValueError(
                    f"strategy={self.word!r} with {type(accelerator).__name__}: allowed accelerators are "
                    f"'cpu' and 'gpu' with CUDA or ROCm; take strategy=\"auto\" on this machine"
                )

        @property
        def accelerations(self) -> list[sloth.Acceleration]:
            """One record a model that is patched, or was until the last teardown."""
            return self.patcher.accelerations

        def undo(self) -> None:
            """Give every module its own forward back."""
            self.patcher.undo()

    class TrainerPatching(Patching):
        """Patches at `model_to_device`: after dtype conversion, before the DDP wrap and the optimizer."""

        lightning_module: Any
        _figures: Any = None

        @property
        def accelerator(self) -> Any:
            return super().accelerator  # type: ignore[misc]

        @accelerator.setter
        def accelerator(self, accelerator: Any) -> None:
            self._refuse(accelerator)
            self._accelerator = accelerator

        def setup(self, trainer: Any) -> None:
            if self._figures is None:
                self._figures = FiguresCallback(self.patcher, self.show_report)
            if self._figures not in trainer.callbacks:
                trainer.callbacks.append(self._figures)
            super().setup(trainer)  # type: ignore[misc]

        def model_to_device(self) -> None:
            super().model_to_device()  # type: ignore[misc]
            self.patcher.patch(self.lightning_module)

        def teardown(self) -> None:
            module = self.lightning_module
            if self._figures is not None:
                self._figures.figures.stop()
                trainer = getattr(module, "_trainer", None)
                if trainer is not None and self._figures in trainer.callbacks:
                    trainer.callbacks.remove(self._figures)
            self.patcher.undo()
            super().teardown()  # type: ignore[misc]

        def __getstate__(self) -> dict[str, Any]:
            """Without what belongs to this process, for strategies that start others (`ddp_spawn`)."""
            state = dict(super().__getstate__())  # type: ignore[call-overload]
            return {**state, "_figures": None, "patcher": Patcher(self.patcher.settings)}

    class FiguresCallback(callback_base):  # type: ignore[misc]
        """Logs the figures and prints the report; the strategies and SlothCallback share it."""

        def __init__(self, patcher: Patcher, show_report: bool) -> None:
            self.patcher, self.show_report = patcher, show_report
            self.figures = Figures([])
            self._printed: list[Any] = []

        def _begin(self, trainer: Any) -> None:
            reports = [a.report for a in self.patcher.accelerations]
            models = [a.model for a in self.patcher.accelerations]
            seen = [reference() for reference in self._printed]
            if self.show_report and trainer.is_global_zero and reports and models != seen:
                import weakref

                self._printed = [weakref.ref(model) for model in models if model is not None]
                print_reports(self.patcher.accelerations)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self._begin(trainer)
            self.figures.stop()
            self.figures = Figures(self.patcher.accelerations)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.figures.start(pl_module, trainer.log_every_n_steps)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.figures.batch_begins()

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            rate = self.figures.batch_ends()
            if trainer.loggers and self.patcher.accelerations:
                values = self.figures.values(rate)
                pl_module.log_dict(values, on_step=True, on_epoch=False, logger=True, batch_size=1)

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.figures.pause()
            self._begin(trainer)

        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            self._begin(trainer)

        def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
            self._begin(trainer)

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            self.figures.pause()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.figures.stop()

    single_base, ddp_base = strategies.SingleDeviceStrategy, strategies.DDPStrategy
    parallel_base = strategies.ModelParallelStrategy
    ddp_names = _names(ddp_base.__init__, DistributedDataParallel.__init__)

    class SlothSingleDeviceStrategy(TrainerPatching, single_base):  # type: ignore[misc, valid-type]
        """What SlothStrategy becomes on one device."""

    class SlothDDPStrategy(TrainerPatching, ddp_base):  # type: ignore[misc, valid-type]
        __doc__ = f"DDP with accelerated transformers.{SETTINGS}"
        word = "sloth_ddp"

        def __init__(self, settings: Any = None, *, show_report: bool = True, **options: Any) -> None:
            chosen, rest = split(settings, options, ddp_names, f"{type(self).__name__}()")
            self.patcher, self.show_report = Patcher(chosen), show_report
            super().__init__(**rest)

    class SlothStrategy(SlothDDPStrategy):
        __doc__ = (
            "Accelerated transformers on one device, or under DDP where there are more, as with "
            f'strategy="auto".{SETTINGS}'
        )
        word = "sloth"

        def set_world_ranks(self) -> None:
            """The Trainer's first call once devices and nodes are known: become the strategy for them."""
            _choose(self, SlothSingleDeviceStrategy, SlothDDPStrategy, "precision_plugin")
            if isinstance(self, ddp_base):
                self.set_world_ranks()

    class DataParallel:
        """ModelParallelStrategy's sizes, with all devices in the data-parallel group where none are given."""

        _data_parallel_size: Any
        _tensor_parallel_size: Any

        def setup_environment(self) -> None:
            if self._data_parallel_size == self._tensor_parallel_size == "auto":
                devices = self.num_nodes * self.num_processes  # type: ignore[attr-defined]
                self._data_parallel_size, self._tensor_parallel_size = devices, 1
            super().setup_environment()  # type: ignore[misc]

    class SlothFSDPStrategy(DataParallel, TrainerPatching, parallel_base):  # type: ignore[misc, valid-type]
        __doc__ = (
            "FSDP2: ModelParallelStrategy, with all devices in the data-parallel group unless sizes are "
            f"given. `configure_model` shards, after sloth_lightning.prepare(model).{SETTINGS}"
        )
        word = "sloth_fsdp"

        def __init__(self, settings: Any = None, *, show_report: bool = True, **options: Any) -> None:
            chosen, rest = split(
                settings, options, _names(parallel_base.__init__), f"{type(self).__name__}()"
            )
            self.patcher, self.show_report = Patcher(chosen), show_report
            super().__init__(**rest)

    class FabricPatching(Patching):
        """Patches at `setup_module`. Fabric has no teardown: `fabric.strategy.undo()`."""

        @property
        def accelerator(self) -> Any:
            return super().accelerator  # type: ignore[misc]

        @accelerator.setter
        def accelerator(self, accelerator: Any) -> None:
            self._refuse(accelerator)
            self._accelerator = accelerator

        def setup_module(self, module: nn.Module) -> nn.Module:
            before = self.patcher.accelerations
            self.patcher.accelerations = []
            # The outermost module may be the transformer itself.
            self.patcher.patch(nn.ModuleList([module]))
            fresh = self.patcher.accelerations
            if self.show_report and self.is_global_zero:  # type: ignore[attr-defined]
                print_reports([a for a in fresh if a not in before])
            self.patcher.accelerations = [a for a in before if a not in fresh] + fresh
            return super().setup_module(module)  # type: ignore[misc, no-any-return]

    fabric_single, fabric_ddp = fabric.SingleDeviceStrategy, fabric.DDPStrategy

    class SlothFabricSingleDeviceStrategy(FabricPatching, fabric_single):  # type: ignore[misc, valid-type]
        """What SlothFabricStrategy becomes on one device."""

    class SlothFabricDDPStrategy(FabricPatching, fabric_ddp):  # type: ignore[misc, valid-type]
        __doc__ = f"Fabric's DDP with accelerated transformers.{SETTINGS}"
        word = "sloth_ddp"

        def __init__(self, settings: Any = None, *, show_report: bool = True, **options: Any) -> None:
            names = _names(fabric_ddp.__init__, DistributedDataParallel.__init__)
            chosen, rest = split(settings, options, names, f"{type(self).__name__}()")
            self.patcher, self.show_report = Patcher(chosen), show_report
            super().__init__(**rest)

    class SlothFabricStrategy(SlothFabricDDPStrategy):
        __doc__ = f"One device, or DDP where there are more, with accelerated transformers.{SETTINGS}"
        word = "sloth"

        def _set_world_ranks(self) -> None:
            _choose(self, SlothFabricSingleDeviceStrategy, SlothFabricDDPStrategy, "precision")
            if isinstance(self, fabric_ddp):
                self._set_world_ranks()

    fabric_parallel = fabric.ModelParallelStrategy

    class SlothFabricFSDPStrategy(DataParallel, FabricPatching, fabric_parallel):  # type: ignore[misc, valid-type]
        __doc__ = (
            "Fabric's ModelParallelStrategy (FSDP2) with accelerated transformers: each whole model is moved "
            "to its device, patched and then sharded, by `parallelize_fn(model, mesh)` or, without one, "
            "layer by layer over all devices. The optimizer is made after `fabric.setup(model)`, from the "
            f"sharded parameters.{SETTINGS}"
        )
        word = "sloth_fsdp"

        def __init__(self, settings: Any = None, *, show_report: bool = True, **options: Any) -> None:
            names = _names(fabric_parallel.__init__)
            chosen, rest = split(settings, options, names, f"{type(self).__name__}()")
            self.patcher, self.show_report = Patcher(chosen), show_report
            super().__init__(**{"parallelize_fn": shard, **rest})

        def setup_module(self, module: nn.Module) -> nn.Module:
            if not any(p.is_meta for p in module.parameters()):
                module.to(self.root_device)  # a patch is proven where it will run
            return super().setup_module(module)

    def _choose(strategy: Any, single: Any, several: Any, precision: str) -> None:
        """Turn `strategy` into its single-device or DDP class: the same object, which its user may hold."""
        devices = strategy.parallel_devices
        if len(devices) > 1 or strategy.num_nodes > 1:
            strategy.__class__ = several
            if interactive and strategy._start_method == "popen" and "LOCAL_RANK" not in os.environ:
                strategy._start_method = "fork"  # as "auto" does in notebooks
            return
        made = single.__new__(single)
        made.patcher, made.show_report = strategy.patcher, strategy.show_report
        kept = {name: getattr(strategy, f"_{name}") for name in ("accelerator", "checkpoint_io", precision)}
        single_of = fabric_single if precision == "precision" else single_base
        single_of.__init__(made, device=devices[0], **kept)
        strategy.__class__ = single
        strategy.__dict__.clear()
        strategy.__dict__.update(made.__dict__)

    class SlothCallback(FiguresCallback):
        """Accelerates the transformers of a LightningModule under any strategy.

        Args:
            settings: sloth_plugins.Settings, a mapping of its fields, or None for the defaults.
            show_report: print the report to stderr, once, when the run begins (main process only).
            overrides: fields of Settings, which win over `settings` unless they are None.

        Raises ValueError for a bad setting when it is made; under `strict=True`, SkippedSiteError when the
        model is patched. Patches when the strategy has set the model up, and undoes it at teardown.
        """

        def __init__(self, settings: Any = None, *, show_report: bool = True, **overrides: Any) -> None:
            chosen, _ = split(settings, overrides, (), "SlothCallback()")
            super().__init__(Patcher(chosen), show_report)

        @property
        def accelerations(self) -> list[sloth.Acceleration]:
            """One record a model that is patched, or was until the last teardown."""
            return self.patcher.accelerations

        def _begin(self, trainer: Any) -> None:
            if isinstance(trainer.strategy, Patching):
                self.patcher.warn(
                    f"SlothCallback does nothing beside strategy={trainer.strategy.word!r}, which "
                    "accelerates the model already"
                )
                return
            self.patcher.patch(trainer.lightning_module)
            super()._begin(trainer)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.teardown(trainer, pl_module, "")

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.figures.stop()
            self.patcher.undo()

    SlothDDPStrategy.__init__.__signature__ = _signature(  # type: ignore[attr-defined]
        ddp_base.__init__, DistributedDataParallel.__init__
    )
    SlothFSDPStrategy.__init__.__signature__ = _signature(parallel_base.__init__)  # type: ignore[attr-defined]
    SlothFabricDDPStrategy.__init__.__signature__ = _signature(  # type: ignore[attr-defined]
        fabric_ddp.__init__, DistributedDataParallel.__init__
    )
    SlothFabricFSDPStrategy.__init__.__signature__ = _signature(  # type: ignore[attr-defined]
        fabric_parallel.__init__
    )
    SlothCallback.__init__.__signature__ = _signature()  # type: ignore[attr-defined]

    made = SimpleNamespace()
    for cls in (
        SlothCallback,
        SlothDDPStrategy,
        SlothFSDPStrategy,
        SlothFabricDDPStrategy,
        SlothFabricFSDPStrategy,
        SlothFabricSingleDeviceStrategy,
        SlothFabricStrategy,
        SlothSingleDeviceStrategy,
        SlothStrategy,
    ):
        cls.__module__, cls.__qualname__ = where, cls.__name__  # so that they can be pickled
        setattr(made, cls.__name__, cls)
    return made
