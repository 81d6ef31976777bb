"""The Lightning adapter under the real Trainers of both packages, and Fabric."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    VOCABULARY,
    ForwardCalls,
    forwards,
    python_environment,
    relative_difference,
    tiny_model,
)

pytest.importorskip("lightning", reason="needs lightning: pip install sloth-plugins[lightning]")
pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")

import lightning.pytorch as lightning_pytorch
import pytorch_lightning
import sloth_lightning
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import sloth_plugins as sloth
from sloth_plugins.figures import cuda_devices, peak_bytes
from sloth_plugins.numerics import FORMULA_TOLERANCE

PACKAGES = {"lightning.pytorch": lightning_pytorch, "pytorch_lightning": pytorch_lightning}
OURS = {
    "lightning.pytorch": "sloth_lightning.lightning",
    "pytorch_lightning": "sloth_lightning.pytorch_lightning",
}
FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
SITES = len(sloth.accelerate(tiny_model("llama")).report.patched)
MLPS = 2
FIGURES = {"sloth/tokens_per_s", "sloth/peak_bytes", "sloth/patched", "sloth/skipped"}
ROWS, LENGTH, BATCH = 8, 12, 2
ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

needs_cli = pytest.mark.skipif(
    find_spec("jsonargparse") is None, reason="needs jsonargparse: pip install sloth-plugins[lightning]"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec.*")


@pytest.fixture(params=list(PACKAGES))
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Trainer's environment variables and default dtype stay in its test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert torch.get_default_dtype() == torch.float32


def ours(package: str = "lightning.pytorch") -> Any:
    return import_module(OURS[package])


def lora(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def module_for(package: str = "lightning.pytorch", model: Any = None, **methods: Any) -> Any:
    """A LightningModule around `model`; it keeps its losses, and how many forwards were ours at each step."""

    class Module(PACKAGES[package].LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.holder = nn.ModuleDict({"lm": tiny_model("llama") if model is None else model})
            self.losses: list[float] = []
            self.patched: list[int] = []

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            self.patched.append(len(forwards(self.holder)))
            return self.holder["lm"](input_ids=batch, labels=batch).loss

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            loss = self.loss(batch)
            self.log("val_loss", loss)
            self.losses.append(loss.item())

        test_step = validation_step

        def predict_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    made = type("Module", (Module,), methods)
    return made()


def data() -> DataLoader[Any]:
    return DataLoader(ids, batch_size=BATCH)  # type: ignore[arg-type]


def trainer_for(
    folder: Path, strategy: Any = "sloth", package: str = "lightning.pytorch", **changes: Any
) -> Any:
    settings: dict[str, Any] = dict(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # Lightning's own would shuffle
    )
    return PACKAGES[package].Trainer(strategy=strategy, **{**settings, **changes})


def fitted(
    folder: Path, module: Any, strategy: Any = "sloth", package: str = "lightning.pytorch", **changes: Any
) -> Any:
    trainer = trainer_for(folder, strategy, package, **changes)
    trainer.fit(module, data())
    return trainer


def close(some: list[float], others: list[float], dtype: torch.dtype = torch.float32) -> bool:
    return relative_difference(some, others) <= FORMULA_TOLERANCE[dtype]


# The strategies


@pytest.mark.parametrize("strategy", ["sloth", "sloth_ddp"])
def test_trains_as_without_it(
    tmp_path: Path, package: str, strategy: str, kernel_calls: Counter[str]
) -> None:
    plain, module = module_for(package), module_for(package)
    fitted(tmp_path, plain, "auto", package)
    assert not kernel_calls and plain.patched == [0] * 4
    own = {name: m.forward.__func__ for name, m in module.holder.named_modules()}
    trainer = fitted(tmp_path, module, strategy, package)
    assert kernel_calls["gated_mlp"] >= 2 * 4
    assert module.patched == [SITES] * 4 and close(module.losses, plain.losses)
    assert not forwards(module.holder), "teardown undoes it (and DDP leaves a forward on the LightningModule)"
    assert {name: m.forward.__func__ for name, m in module.holder.named_modules()} == own
    (acceleration,) = trainer.strategy.accelerations
    assert not acceleration.active and len(acceleration.report.patched) == SITES
    assert trainer.callbacks == [], "nothing of ours stays on the Trainer"
    assert list(module.state_dict()) == list(plain.state_dict())


def test_the_same_bits_after_teardown(tmp_path: Path) -> None:
    module = module_for()
    fitted(tmp_path, module)
    untouched = module_for()
    untouched.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(module.holder["lm"].eval()(ids).logits, untouched.holder["lm"].eval()(ids).logits)


def test_original_forwards_never_run(tmp_path: Path, package: str) -> None:
    calls: list[ForwardCalls] = []

    def on_train_start(self: Any) -> None:
        (acceleration,) = self.trainer.strategy.accelerations
        calls.append(ForwardCalls(acceleration))
        calls[0].start()

    def on_train_end(self: Any) -> None:
        calls[0].stop()

    fitted(
        tmp_path,
        module_for(package, on_train_start=on_train_start, on_train_end=on_train_end),
        package=package,
    )
    calls[0].check()
    assert calls[0].patched["model.norm"] == 4


def test_one_device_is_a_single_device_strategy_and_two_are_ddp(tmp_path: Path, package: str) -> None:
    strategies = import_module(f"{package}.strategies")
    one = trainer_for(tmp_path, "sloth", package).strategy
    assert isinstance(one, strategies.SingleDeviceStrategy) and not isinstance(one, strategies.DDPStrategy)
    assert one.root_device == torch.device("cpu") and one.launcher is None
    two = trainer_for(tmp_path, "sloth", package, devices=2).strategy
    assert isinstance(two, strategies.DDPStrategy) and two.num_processes == 2
    assert two.launcher is not None
    given = ours(package).SlothStrategy(find_unused_parameters=True, disable=["rope"])
    assert trainer_for(tmp_path, given, package, devices=2).strategy is given
    assert given._ddp_kwargs == {"find_unused_parameters": True}
    assert given.patcher.settings.disable == {"rope"}


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    module = module_for()
    strategy = ours().SlothStrategy(sloth.Settings(verify=False), disable=["rope", "gated_mlp"])
    fitted(tmp_path, module, strategy)
    (acceleration,) = strategy.accelerations
    ops = {row.op for row in acceleration.report.patched}
    assert ops >= {"rms_norm", "add_rms_norm"} and not ops & {"rope", "gated_mlp"}
    assert acceleration.settings == sloth.Settings(verify=False, disable=frozenset({"rope", "gated_mlp"}))


def test_checkpointing_is_turned_on_and_off(tmp_path: Path) -> None:
    seen: list[bool] = []

    def on_train_batch_start(self: Any, batch: Any, index: int) -> None:
        seen.append(self.holder["lm"].is_gradient_checkpointing)

    plain, module = module_for(), module_for(on_train_batch_start=on_train_batch_start)
    fitted(tmp_path, plain, "auto")
    fitted(tmp_path, module, ours().SlothStrategy(checkpointing="recompute"))
    assert seen == [True] * 4 and not module.holder["lm"].is_gradient_checkpointing
    assert close(module.losses, plain.losses)


def test_fit_validate_test_predict_and_fit_again(tmp_path: Path, package: str) -> None:
    plain, module = module_for(package), module_for(package)
    for one, strategy in ((plain, "auto"), (module, "sloth")):
        trainer = trainer_for(tmp_path, strategy, package)
        trainer.fit(one, data(), data())
        trainer.validate(one, data(), verbose=False)
        trainer.test(one, data(), verbose=False)
        one.losses += [float(loss) for loss in trainer.predict(one, data())]
        trainer.fit_loop.max_epochs = 2
        trainer.fit(one, data(), data())
        assert not forwards(one)
    assert set(module.patched) == {SITES} and len(module.patched) == len(plain.patched) == 4 * 7
    assert close(module.losses, plain.losses)


def test_validation_only(tmp_path: Path, package: str) -> None:
    plain, module = module_for(package), module_for(package)
    (want,) = trainer_for(tmp_path, "auto", package).validate(plain, data(), verbose=False)
    (got,) = trainer_for(tmp_path, "sloth", package).validate(module, data(), verbose=False)
    assert module.patched == [SITES] * 4 and close([got["val_loss"]], [want["val_loss"]])
    assert not forwards(module)


def test_one_trainer_for_two_modules(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    for _ in range(2):
        module = module_for()
        trainer.fit(module, data())
        trainer.fit_loop.max_epochs += 1
        assert set(module.patched) == {SITES} and not forwards(module)


def test_one_model_in_two_modules(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for _ in range(2):
        module = module_for(model=model)
        fitted(tmp_path, module)
        assert module.patched == [SITES] * 4 and not forwards(model)


# What a LightningModule may hold


def test_lora(tmp_path: Path) -> None:
    plain, module = module_for(model=lora(tiny_model("llama"))), module_for(model=lora(tiny_model("llama")))
    fitted(tmp_path, plain, "auto")
    trainer = fitted(tmp_path, module)
    assert close(module.losses, plain.losses) and min(module.patched) >= SITES
    (acceleration,) = trainer.strategy.accelerations
    assert acceleration.model is module.holder["lm"] and not forwards(module)


def test_several_models_and_a_shared_one(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = tiny_model("llama")
            self.again = nn.ModuleList([self.first])
            self.second = tiny_model("qwen3", seed=1)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            out = self.first(input_ids=input_ids, labels=labels)
            out.loss = out.loss + self.second(input_ids=input_ids, labels=labels).loss
            return out

    plain, module = module_for(model=Pair()), module_for(model=Pair())
    fitted(tmp_path, plain, "auto")
    trainer = fitted(tmp_path, module)
    families = [a.model.config.model_type for a in trainer.strategy.accelerations]
    assert families == ["llama", "qwen3"] and close(module.losses, plain.losses)
    assert not forwards(module)


def test_a_module_that_is_a_models_only_home_is_patched_in_configure_model(tmp_path: Path) -> None:
    def configure_model(self: Any) -> None:
        if not self.holder:
            self.holder["lm"] = tiny_model("llama")

    plain = module_for()
    fitted(tmp_path, plain, "auto")
    module = module_for(configure_model=configure_model)
    del module.holder["lm"]
    fitted(tmp_path, module)
    assert module.patched == [SITES] * 4 and close(module.losses, plain.losses)


def test_no_transformer_is_one_warning_and_trains_on(tmp_path: Path, package: str) -> None:
    def training_step(self: Any, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.holder["lm"](batch.float()).square().mean()

    module = module_for(package, nn.Linear(LENGTH, 2), training_step=training_step)
    with pytest.warns(UserWarning, match="nothing to patch") as caught:
        trainer = fitted(tmp_path, module, "sloth", package)
    ours_ = [str(w.message) for w in caught if str(w.message).startswith("sloth: ")]
    assert len(ours_) == 1 and "training goes on as it was" in ours_[0]
    assert trainer.global_step == 4


def test_a_compiled_model(tmp_path: Path) -> None:
    torch._dynamo.reset()
    losses = []
    for strategy in ("auto", "sloth"):
        module = module_for(model=torch.compile(tiny_model("llama"), backend="eager"))
        module.loss = lambda batch, m=module: m.holder["lm"](input_ids=batch, labels=batch).loss
        logger = lightning_pytorch.loggers.CSVLogger(tmp_path)
        trainer = fitted(tmp_path, module, strategy, logger=logger)
        losses.append(module.losses)
        assert not forwards(module.holder["lm"]._orig_mod)
        torch._dynamo.reset()
    assert close(losses[1], losses[0])
    (acceleration,) = trainer.strategy.accelerations
    assert type(acceleration.model).__name__ == "LlamaForCausalLM"
    assert trainer.logged_metrics["sloth/tokens_per_s"] > 0, "counted outside of what is compiled"


# What a Trainer may do


def test_manual_optimization(tmp_path: Path) -> None:
    def training_step(self: Any, batch: torch.Tensor, index: int) -> None:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())

    plain, module = (module_for(training_step=training_step) for _ in range(2))
    for one, strategy in ((plain, "auto"), (module, "sloth")):
        one.automatic_optimization = False
        fitted(tmp_path, one, strategy)
    assert module.patched == [SITES] * 4 and close(module.losses, plain.losses)


CHANGES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "accumulation and clipping": (
        dict(accumulate_grad_batches=2, gradient_clip_val=0.5, max_epochs=2),
        torch.float32,
    ),
    "bf16-true": (dict(precision="bf16-true"), torch.bfloat16),
    "bf16-mixed": (dict(precision="bf16-mixed"), torch.bfloat16),
    "16-mixed": (dict(precision="16-mixed"), torch.bfloat16),  # Lightning's own fallback on a CPU
    "inference mode off": (dict(inference_mode=False), torch.float32),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_a_trainers_options(tmp_path: Path, case: str) -> None:
    changes, dtype = CHANGES[case]
    plain, module = module_for(), module_for()
    fitted(tmp_path, plain, "auto", **changes)
    trainer = fitted(tmp_path, module, "sloth", **changes)
    assert set(module.patched) == {SITES} and close(module.losses, plain.losses, dtype)
    assert trainer.strategy.accelerations[0].report.skipped == []
    assert next(module.parameters()).dtype == next(plain.parameters()).dtype


def four_bit(package: str, dtype: torch.dtype) -> Any:
    """Lightning's plugin; `lm` is the model's own place, where it is converted before the Trainer has it."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install sloth-plugins[quant]")
    plugins = import_module(f"{package}.plugins")
    return plugins.BitsandbytesPrecision(
        "nf4-dq", dtype=dtype, ignore_modules={"holder.lm.lm_head", "lm_head"}
    )


@pytest.mark.parametrize("adapted", ["no adapter", "adapter after quantization"])
def test_lightnings_4_bit_layers(tmp_path: Path, package: str, adapted: str) -> None:
    losses = []
    for strategy in ("auto", "sloth"):
        plugin = four_bit(package, torch.float32)
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        if adapted != "no adapter":
            model = lora(plugin.convert_module(model).to("cpu"))
        module = module_for(package, model)
        trainer = trainer_for(tmp_path, strategy, package)
        # A Trainer would refuse the plugin without a GPU; bitsandbytes itself quantizes and multiplies there.
        trainer.strategy.precision_plugin = plugin
        trainer.fit(module, data())
        losses.append(module.losses)
        layers = [m for m in module.modules() if type(m).__name__ == "_NF4DQLinear"]
        assert len(layers) == 14 and all(layer.weight.quant_state is not None for layer in layers)
    (acceleration,) = trainer.strategy.accelerations
    ops = Counter(row.op for row in acceleration.report.patched)
    assert (
        acceleration.report.skipped == []
        and close(losses[1], losses[0])
        and set(module.patched) == {len(acceleration.report.patched)}
    )
    if adapted == "no adapter":
        assert ops["gated_mlp"] == 2 and not ops["lora_mlp"]
    else:
        assert ops["lora_linear"] == 8 and ops["lora_mlp"] == 2, "fused over Lightning's own subclass"


def test_lora_matrices_that_lightning_has_quantized_are_left_alone() -> None:
    """The plugin converts every linear layer of a PEFT model, its adapters too: nobody can train those."""
    plugin = four_bit("lightning.pytorch", torch.float32)
    model = plugin.convert_module(lora(tiny_model("llama", hidden_size=64, intermediate_size=128))).to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sloth.accelerate(model).report
    reasons = {skip.reason for skip in report.skipped if skip.op.startswith("lora")}
    assert any("matrices of adapter 'default' are no plain linear layers" in reason for reason in reasons)
    assert not [row for row in report.patched if row.op.startswith("lora")]


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_callbacks_that_average_weights(tmp_path: Path, kind: str) -> None:
    def make() -> Any:
        from lightning.pytorch import callbacks

        if kind == "SWA":
            return callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
        if not hasattr(callbacks, "EMAWeightAveraging"):
            pytest.skip("EMAWeightAveraging came with Lightning 2.6")
        return callbacks.EMAWeightAveraging(decay=0.5)

    plain, module = module_for(), module_for()
    fitted(tmp_path, plain, "auto", callbacks=[make()], max_epochs=2)
    fitted(tmp_path, module, "sloth", callbacks=[make()], max_epochs=2)
    assert close(module.losses, plain.losses) and set(module.patched) == {SITES}
    assert not forwards(module)
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_an_error_in_the_run_leaves_no_patch(tmp_path: Path) -> None:
    def on_train_batch_end(self: Any, *args: Any) -> None:
        raise RuntimeError("the user's own")

    module = module_for(on_train_batch_end=on_train_batch_end)
    with pytest.raises(RuntimeError, match="the user's own"):
        fitted(tmp_path, module)
    assert module.patched == [SITES] and not forwards(module)
    assert not any(m._forward_pre_hooks for m in module.modules()), "no counting hook stays"


# Checkpoints


@pytest.mark.parametrize(
    ("first", "other"), [("sloth", "auto"), ("auto", "sloth"), ("ddp", "sloth"), ("sloth_ddp", "auto")]
)
def test_checkpoints_are_plain_lightnings(tmp_path: Path, package: str, first: str, other: str) -> None:
    whole = module_for(package)
    fitted(tmp_path, whole, "auto", package, max_epochs=2)
    written = module_for(package)
    trainer = fitted(tmp_path, written, first, package)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    plain = trainer_for(tmp_path, "auto", package)
    plain.fit(module_for(package), data())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    mine, theirs = (torch.load(tmp_path / name, weights_only=False) for name in ("one.ckpt", "plain.ckpt"))
    assert list(mine) == list(theirs) and list(mine["state_dict"]) == list(theirs["state_dict"])
    assert mine["callbacks"] == theirs["callbacks"]
    resumed = module_for(package)
    again = trainer_for(tmp_path, other, package, max_epochs=2)
    newer = "weights_only" in inspect.signature(again.fit).parameters  # Lightning 2.6
    options = {"weights_only": False} if newer else {}
    again.fit(resumed, data(), ckpt_path=tmp_path / "one.ckpt", **options)
    assert again.global_step == 8 and close(resumed.losses, whole.losses[4:])
    assert resumed.patched == [SITES if other == "sloth" else 0] * 4


def test_a_checkpoint_written_while_patched_has_the_plain_keys(tmp_path: Path) -> None:
    callback = lightning_pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    module = module_for()
    fitted(tmp_path, module, callbacks=[callback], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert list(saved["state_dict"]) == list(module_for().state_dict())


# SlothCallback


def test_callback_under_another_strategy(tmp_path: Path, package: str) -> None:
    plain, module = module_for(package), module_for(package)
    trainer = trainer_for(tmp_path, "auto", package)
    trainer.fit(plain, data())
    callback = ours(package).SlothCallback(show_report=False)
    trainer = trainer_for(tmp_path, "auto", package, callbacks=[callback])
    trainer.fit(module, data(), data())
    assert set(module.patched) == {SITES} and not forwards(module)
    assert close([x for x in module.losses[:4]], plain.losses)
    trainer.predict(module, data())
    assert set(module.patched) == {SITES} and not forwards(module)
    assert len(callback.accelerations) == 1


def test_callback_undoes_after_an_error(tmp_path: Path) -> None:
    def on_train_batch_end(self: Any, *args: Any) -> None:
        raise RuntimeError("the user's own")

    module = module_for(on_train_batch_end=on_train_batch_end)
    with pytest.raises(RuntimeError, match="the user's own"):
        fitted(tmp_path, module, "auto", callbacks=[ours().SlothCallback()])
    assert module.patched == [SITES] and not forwards(module)


def test_callback_beside_the_strategy_is_one_warning(tmp_path: Path) -> None:
    module = module_for()
    with pytest.warns(UserWarning, match=r"SlothCallback does nothing beside strategy='sloth'"):
        fitted(tmp_path, module, "sloth", callbacks=[ours().SlothCallback(disable=["rope"])])
    assert module.patched == [SITES] * 4


def single_device(package: str, changed: Any) -> Any:
    """A strategy of Lightning that calls `changed(module)` when it has moved the module."""
    base = import_module(f"{package}.strategies").SingleDeviceStrategy

    class Strategy(base):  # type: ignore[misc, valid-type]
        def model_to_device(self) -> None:
            super().model_to_device()
            changed(self.model)

    return Strategy(device=torch.device("cpu"))


def as_zero_2(module: nn.Module) -> None:
    """As DeepSpeed's stages 1 and 2 leave them: whole, and views of one buffer."""
    parameters = list(module.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view(p.shape)


def as_zero_3(module: nn.Module) -> None:
    for number, p in enumerate(module.parameters()):
        p.ds_id = number  # type: ignore[attr-defined]


def test_callback_under_zero_2(tmp_path: Path, package: str) -> None:
    plain, module = module_for(package), module_for(package)
    fitted(tmp_path, plain, "auto", package)
    fitted(
        tmp_path,
        module,
        single_device(package, as_zero_2),
        package,
        callbacks=[ours(package).SlothCallback()],
    )
    assert module.patched == [SITES] * 4 and close(module.losses, plain.losses) and not forwards(module)


def test_callback_under_zero_3_is_one_warning_and_trains_on(tmp_path: Path) -> None:
    plain, module = module_for(), module_for()
    fitted(tmp_path, plain, "auto")
    with pytest.warns(UserWarning) as caught:
        fitted(
            tmp_path,
            module,
            single_device("lightning.pytorch", as_zero_3),
            callbacks=[ours().SlothCallback()],
        )
    (message,) = [str(w.message) for w in caught if str(w.message).startswith("sloth: ")]
    assert "DeepSpeed ZeRO-3 has sharded the parameters of LlamaForCausalLM" in message
    assert module.patched == [0] * 4 and module.losses == plain.losses
    callback = ours().SlothCallback(strict=True)
    with pytest.raises(sloth.SkippedSiteError, match="strict=True: DeepSpeed ZeRO-3"):
        fitted(tmp_path, module_for(), single_device("lightning.pytorch", as_zero_3), callbacks=[callback])


def test_prepare_leaves_what_is_sharded_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    as_zero_3(model)
    with pytest.warns(UserWarning, match="ZeRO-3 has sharded"):
        assert sloth_lightning.prepare(model) is model
    assert not forwards(model)
    with pytest.raises(ValueError, match=r"'kernel' in sloth_lightning.prepare\(\).*Did you mean 'kernels'"):
        sloth_lightning.prepare(model, kernel="torch")
    with pytest.raises(ValueError, match="meta"):
        sloth_lightning.prepare(tiny_model("llama").to("meta"))


# Figures and report


@pytest.mark.parametrize("how", ["strategy", "callback"])
def test_figures_reach_the_logger(tmp_path: Path, package: str, how: str) -> None:
    logger = import_module(f"{package}.loggers").CSVLogger(tmp_path)
    strategy: Any = "sloth" if how == "strategy" else "auto"
    callbacks = [] if how == "strategy" else [ours(package).SlothCallback()]
    module = module_for(package)
    trainer = fitted(tmp_path, module, strategy, package, logger=logger, callbacks=callbacks)
    (row, *_), rows = (logged := _csv(Path(logger.log_dir) / "metrics.csv")), logged
    assert row.keys() >= {*FIGURES, "loss"} and len(rows) == 4
    assert float(row["sloth/patched"]) == SITES and float(row["sloth/skipped"]) == 0
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    assert float(row["sloth/peak_bytes"]) > parameters
    assert all(float(r["sloth/tokens_per_s"]) > 0 for r in rows)
    assert trainer.callbacks == callbacks


def _csv(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_no_logger_no_figures(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, module_for())
    assert not FIGURES & trainer.callback_metrics.keys() and "loss" in trainer.callback_metrics


@pytest.mark.parametrize("adapt", [None, lora])
def test_tokens_are_counted_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapt: Any) -> None:
    from sloth_lightning import _core

    now = [0.0]
    monkeypatch.setattr(_core.time, "perf_counter", lambda: now[0])

    def on_train_batch_start(self: Any, batch: Any, index: int) -> None:
        now[0] += 1.0

    def on_validation_epoch_start(self: Any) -> None:
        now[0] += 3600.0

    module = module_for(
        model=adapt and adapt(tiny_model("llama")),
        on_train_batch_start=on_train_batch_start,
        on_validation_epoch_start=on_validation_epoch_start,
    )
    logger = lightning_pytorch.loggers.CSVLogger(tmp_path)
    trainer = trainer_for(tmp_path, logger=logger, val_check_interval=1)
    trainer.fit(module, data(), data())
    rows = [row for row in _csv(Path(logger.log_dir) / "metrics.csv") if row["sloth/tokens_per_s"]]
    assert [float(row["sloth/tokens_per_s"]) for row in rows] == [BATCH * LENGTH] * 4


def test_the_peak_is_of_the_devices_that_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU beside a GPU, and one that lies on two GPUs."""
    allocated = {0: 3, 1: 4, 2: 5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device=0: allocated[torch.device(device).index]
    )
    model = tiny_model("llama")
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert cuda_devices([model, None]) == () and peak_bytes(cuda_devices([model])) > parameters
    places = [torch.device("cuda", i) for i in (1, 0, 1)]
    spread: Any = SimpleNamespace(
        parameters=lambda: [SimpleNamespace(is_cuda=True, device=d) for d in places]
    )
    assert cuda_devices([spread, model]) == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert peak_bytes(cuda_devices([spread])) == 7


@pytest.mark.parametrize("show", [True, False])
def test_the_report_is_printed_once_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    module = module_for()
    trainer = trainer_for(tmp_path, ours().SlothStrategy(show_report=show))
    trainer.fit(module, data(), data())
    trainer.validate(module, data(), verbose=False)
    assert capsys.readouterr().err.count("sloth patched") == int(show)


# Bad input


def test_bad_options_are_refused_when_the_strategy_is_made(package: str) -> None:
    made = ours(package)
    for cls in (
        *(made.SlothStrategy, made.SlothDDPStrategy, made.SlothFSDPStrategy, made.SlothCallback),
        *(made.SlothFabricStrategy, made.SlothFabricDDPStrategy, made.SlothFabricFSDPStrategy),
    ):
        with pytest.raises(ValueError, match=rf"'kernel' in {cls.__name__}\(\).*Did you mean 'kernels'"):
            cls(kernel="torch")
        with pytest.raises(ValueError, match="kernels='cuda'"):
            cls(kernels="cuda")
        with pytest.raises(ValueError, match=r"'kernel' in .*Did you mean 'kernels'"):
            cls({"kernel": "torch"})
    with pytest.raises(ValueError, match="Did you mean 'find_unused_parameters'"):
        made.SlothStrategy(find_unused_parameter=True)


def test_mps_and_tpu_are_refused(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators = import_module(f"{package}.accelerators")
    for name in ("MPSAccelerator", "XLAAccelerator"):
        cls = getattr(accelerators, name)
        strategy = ours(package).SlothStrategy()
        with pytest.raises(ValueError, match=f"strategy='sloth' with {name}: allowed accelerators are 'cpu'"):
            strategy.accelerator = cls.__new__(cls)
        fabric_strategy = ours(package).SlothFabricStrategy()
        with pytest.raises(ValueError, match=f"strategy='sloth' with {name}: allowed accelerators are 'cpu'"):
            fabric_strategy.accelerator = cls.__new__(cls)
    for name, value in (("is_available", True), ("parse_devices", [0]), ("setup_device", None)):
        monkeypatch.setattr(accelerators.MPSAccelerator, name, staticmethod(lambda *_, value=value: value))
    with pytest.raises(ValueError, match="MPS"):
        trainer_for(tmp_path, "sloth", package, accelerator="mps")


def test_more_devices_than_there_are_is_lightnings_own_error(tmp_path: Path) -> None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException):
        trainer_for(tmp_path, "sloth", accelerator="gpu", devices=99)


def test_strict_names_the_skipped_site(tmp_path: Path) -> None:
    module = module_for()
    norm = module.holder["lm"].model.norm
    norm.forward = lambda x, own=norm.forward: own(x)
    with pytest.raises(sloth.SkippedSiteError, match=r"model\.norm"):
        fitted(tmp_path, module, ours().SlothStrategy(strict=True))
    assert list(forwards(module)) == ["holder.lm.model.norm"]


def test_a_failure_inside_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, module = module_for(), module_for()
    fitted(tmp_path, plain, "auto")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the survey fell over")

    monkeypatch.setattr(sloth, "accelerate", broken)
    with pytest.warns(UserWarning) as caught:
        fitted(tmp_path, module)
    mine = [str(w.message) for w in caught if str(w.message).startswith("sloth: ")]
    assert len(mine) == 1 and "RuntimeError: the survey fell over" in mine[0]
    assert module.losses == plain.losses
    with pytest.raises(RuntimeError, match="fell over"):
        fitted(tmp_path, module_for(), ours().SlothStrategy(strict=True))


def test_strategies_can_be_pickled(tmp_path: Path, package: str) -> None:
    """ddp_spawn sends the strategy to other processes."""
    strategy = ours(package).SlothDDPStrategy(kernels="torch", start_method="spawn")
    trainer_for(tmp_path, strategy, package, devices=2)
    strategy._launcher = None
    again = pickle.loads(pickle.dumps(strategy))
    assert type(again) is type(strategy) and again.patcher.settings.kernels == "torch"


# Fabric


def test_fabric(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(strategy: Any) -> tuple[list[float], Any, int]:
        fabric = import_module(FABRIC[package]).Fabric(accelerator="cpu", devices=1, strategy=strategy)
        fabric.launch()
        bare = tiny_model("llama")
        model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters(), lr=1e-3))
        count = len(forwards(bare))
        losses = []
        for batch in fabric.setup_dataloaders(data()):
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        if strategy != "auto":
            fabric.strategy.undo()
        assert not forwards(bare)
        return losses, fabric, count

    plain, _, none = run("auto")
    got, fabric, count = run("sloth")
    assert (none, count) == (0, SITES) and close(got, plain)
    strategies = import_module(f"{FABRIC[package]}.strategies")
    assert isinstance(fabric.strategy, strategies.SingleDeviceStrategy)
    assert capsys.readouterr().err.count("sloth patched") == 1
    two = import_module(FABRIC[package]).Fabric(accelerator="cpu", devices=2, strategy="sloth")
    assert isinstance(two.strategy, strategies.DDPStrategy)
    run(ours(package).SlothFabricStrategy(show_report=False))


def test_fabric_leaves_other_modules_that_are_moved_alone() -> None:
    fabric = import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1, strategy="sloth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fabric.to_device(nn.Linear(2, 2))
    assert fabric.strategy.accelerations == []


# Two processes, FSDP2, no import, LightningCLI: each in a process of its own


def python(
    code: str, folder: Path, *first: Path, arguments: tuple[str, ...] = (), environment: Any = None
) -> str:
    """What a script with `code` prints; it finds helpers.py and, unless `environment` says so, no GPU."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=python_environment(*first, ROOT / "tests")
        | {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


DDP = """
import json, sys
import torch
from importlib import import_module
import sloth_lightning
from helpers import VOCABULARY, forwards, tiny_model

L = import_module(sys.argv[1])
torch.set_num_threads(1)
ids = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm, self.losses = tiny_model("llama"), []
    def training_step(self, batch, index):
        loss = self.lm(input_ids=batch, labels=batch).loss
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        self.patched = len(forwards(self.lm))
        return loss
    def train_dataloader(self):
        mine = ids[self.global_rank::devices]
        return torch.utils.data.DataLoader(mine, batch_size=4 // devices)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

module = Module()
devices = int(sys.argv[2])
trainer = L.Trainer(strategy=sys.argv[3], accelerator=sys.argv[4], devices=devices, max_epochs=1,
                    logger=False, enable_progress_bar=False, enable_checkpointing=False,
                    enable_model_summary=False, use_distributed_sampler=False)
trainer.fit(module)
assert not forwards(module.lm)
if trainer.is_global_zero:
    with open("result.json", "w") as file:
        json.dump([type(trainer.strategy).__name__, module.patched, module.losses], file)
"""


def two_processes(folder: Path, package: str, accelerator: str, environment: Any = None) -> None:
    """Two train with strategy "sloth" as one does with "auto" on the same global batches."""
    found = {}
    for devices, strategy in ((1, "auto"), (2, "sloth")):
        arguments = (package, str(devices), strategy, accelerator)
        printed = python(DDP, folder, arguments=arguments, environment=environment)
        found[strategy] = json.loads((folder / "result.json").read_text())
        assert printed.count("sloth patched") == int(strategy == "sloth"), "the report is rank 0's"
    name, patched, losses = found["sloth"]
    assert name == "SlothDDPStrategy" and patched == SITES
    assert len(losses) == 4 and close(losses, found["auto"][2])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, package: str) -> None:
    two_processes(tmp_path, package, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_train_as_one(tmp_path: Path, package: str) -> None:
    two_processes(
        tmp_path, package, "gpu", {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    )


SPAWN = """
import pathlib
import sys
import torch
import lightning as L
import sloth_lightning
from helpers import VOCABULARY, forwards, tiny_model

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama")
    def training_step(self, batch, index):
        assert len(forwards(self.lm)) > 0
        return self.lm(input_ids=batch, labels=batch).loss
    def on_train_end(self):
        pathlib.Path(sys.argv[1], f"ended-{self.global_rank}").write_text(str(self.trainer.global_step))
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randint(3, VOCABULARY, (8, 8)), batch_size=2)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

if __name__ == "__main__":
    module = Module()
    trainer = L.Trainer(strategy=sloth_lightning.SlothDDPStrategy(start_method="spawn", show_report=False),
                        accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module)
    assert not forwards(module.lm)
"""


@pytest.mark.slow
def test_spawned_processes(tmp_path: Path) -> None:
    python(SPAWN, tmp_path, arguments=(str(tmp_path),))
    ended = {file.name: file.read_text() for file in tmp_path.glob("ended-*")}
    assert ended == {"ended-0": "2", "ended-1": "2"}  # in files: two that print at once mix their lines


SHARDED = """
import json, sys
import torch
import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
import sloth_lightning
from helpers import VOCABULARY, forwards, tiny_model

devices, how, prepared = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "prepared"
torch.set_num_threads(1)
ids = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))

class FSDP1(DDPStrategy):  # Lightning's own refuses a CPU
    def _setup_model(self, model):
        policy = ModuleWrapPolicy({type(model.lm.model.layers[0])})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True,
                                        device_id=torch.device("cpu"))
    def _register_ddp_hooks(self):
        pass

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm, self.losses = None, []
    def configure_model(self):
        if self.lm is not None:
            return
        self.lm = tiny_model("llama")
        if prepared:
            sloth_lightning.prepare(self.lm, disable=["gated_mlp"])
        if how == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for layer in self.lm.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.lm, mesh=mesh)
    def training_step(self, batch, index):
        loss = self.lm(input_ids=batch, labels=batch).loss
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        self.patched = len(forwards(self.lm))
        self.sharded = any("DTensor" in type(p).__name__ or p.numel() == 0 for p in self.lm.parameters())
        return loss
    def train_dataloader(self):
        return torch.utils.data.DataLoader(ids[self.global_rank::devices], batch_size=4 // devices)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

module = Module()
strategy = {"fsdp1": FSDP1, "fsdp2": sloth_lightning.SlothFSDPStrategy, "none": lambda: "auto"}[how]()
trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=devices, max_epochs=1, logger=False,
                    callbacks=[sloth_lightning.SlothCallback()] if how == "fsdp1" else [],
                    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
                    use_distributed_sampler=False)
trainer.fit(module)
assert not forwards(module.lm)
if trainer.is_global_zero:
    with open("result.json", "w") as file:
        json.dump([module.patched, module.sharded, module.losses], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "prepared"),
    [("fsdp2", "prepared"), ("fsdp2", "not prepared"), ("fsdp1", "prepared"), ("fsdp1", "not prepared")],
)
def test_two_processes_with_sharded_parameters(tmp_path: Path, how: str, prepared: str) -> None:
    python(SHARDED, tmp_path, arguments=("1", "none", "not prepared"))
    *_, plain = json.loads((tmp_path / "result.json").read_text())
    printed = python(SHARDED, tmp_path, arguments=("2", how, prepared))
    patched, sharded, losses = json.loads((tmp_path / "result.json").read_text())
    assert len(losses) == 4 and close(losses, plain)
    assert patched == (SITES - MLPS if prepared == "prepared" else 0) and sharded
    advice = "call sloth_lightning.prepare(model) in configure_model"
    assert (advice in printed) == (prepared == "not prepared")


FABRIC_FSDP = """
import json, sys
import torch
from importlib import import_module
from peft import LoraConfig, get_peft_model
import sloth_lightning
from helpers import VOCABULARY, forwards, tiny_model

package, devices, strategy, adapted = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "lora"
torch.set_num_threads(1)
ids = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))
fabric = import_module(package).Fabric(accelerator="cpu", devices=devices, strategy=strategy)
fabric.launch()
bare = tiny_model("llama")
if adapted:
    torch.manual_seed(0)
    bare = get_peft_model(bare, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
model = fabric.setup(bare)
trained = [p for p in bare.parameters() if p.requires_grad]
optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=1e-3))
patched, losses = len(forwards(bare)), []
sharded = all("DTensor" in type(p).__name__ for p in bare.parameters())
for batch in ids[fabric.global_rank::devices].split(4 // devices):
    loss = model(input_ids=batch, labels=batch).loss
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    losses.append(float(fabric.all_reduce(loss.detach(), reduce_op="mean")))
if strategy != "auto":
    fabric.strategy.undo()
assert not forwards(bare)
if fabric.global_rank == 0:
    with open("result.json", "w") as file:
        json.dump([patched, sharded, losses], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapted", ["full", "lora"])
def test_fabric_with_sharded_parameters(tmp_path: Path, package: str, adapted: str) -> None:
    found = []
    for devices, strategy in ((1, "auto"), (2, "sloth_fsdp")):
        python(FABRIC_FSDP, tmp_path, arguments=(FABRIC[package], str(devices), strategy, adapted))
        found.append(json.loads((tmp_path / "result.json").read_text()))
    (_, _, plain), (patched, sharded, losses) = found
    assert patched >= SITES and sharded and close(losses, plain)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed sloth-plugins into, from a copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77 to build a wheel")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*")
    for name in ("sloth_plugins", "kernels", "adapters"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(source)]
    command = [sys.executable, "-m", "pip", "install", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["1", "0"])
def test_an_installed_distribution_needs_no_import(
    tmp_path: Path, package: str, switch: str, installed: Path
) -> None:
    """torch calls its entry point, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0; then the import still works."""
    code = f"""
    import sys
    import torch
    early = [m for m in sys.modules if m.startswith(("sloth_lightning", "lightning", "sloth_kernels"))]
    import {package} as L
    light = "sloth_plugins.engine" not in sys.modules

    def make():
        try:
            trainer = L.Trainer(strategy="sloth", accelerator="cpu", devices=1, logger=False)
        except ValueError as error:
            return f"REFUSED {{error}}"
        return f"MADE {{type(trainer.strategy).__name__}}"

    print("FIRST", make(), early, light)
    import sloth_lightning
    print("THEN", make(), sloth_lightning.__file__)
    """
    environment = {"PYTHONPATH": str(installed), "TORCH_DEVICE_BACKEND_AUTOLOAD": switch}
    printed = python(code, tmp_path, environment=environment)
    if switch == "1":
        assert "FIRST MADE SlothSingleDeviceStrategy [] True" in printed
    else:
        assert "FIRST REFUSED" in printed and "invalid strategy name" in printed
    assert f"THEN MADE SlothSingleDeviceStrategy {installed}" in printed


def test_the_hook_never_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sloth_plugins import _autoload

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "awaited_module.py").write_text("value = 1\n")
    monkeypatch.setitem(_autoload.AFTER, "awaited_module", "no_such_module_of_ours")
    _autoload.autoload()
    _autoload.autoload()
    with pytest.warns(UserWarning, match="nothing is added to awaited_module") as caught:
        awaited = import_module("awaited_module")
    assert awaited.value == 1 and len(caught) == 1
    assert type(awaited.__spec__.loader).__name__ == "SourceFileLoader"
    with pytest.warns(UserWarning, match="nothing is added"):
        _autoload.autoload()  # imported already: at once
    monkeypatch.setattr(_autoload, "after_import", None)
    with pytest.warns(UserWarning, match="not loaded with torch"):
        _autoload.autoload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _autoload.autoload()


def test_the_hook_imports_the_standard_library_alone() -> None:
    code = """
    import sys, importlib.util
    spec = importlib.util.spec_from_file_location("alone", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    module.autoload()
    print(sorted({m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))
    """
    path = str(ROOT / "sloth_plugins" / "_autoload.py")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


CLI = """
import torch
from lightning.pytorch.cli import LightningCLI
import lightning as L
import sloth_lightning
from helpers import VOCABULARY, forwards, tiny_model

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama")
    def training_step(self, batch, index):
        return self.lm(input_ids=batch, labels=batch).loss
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randint(3, VOCABULARY, (4, 8)), batch_size=2)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

cli = LightningCLI(Module, seed_everything_default=1, save_config_callback=None, trainer_defaults=dict(
    accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False))
print("RESULT", type(cli.trainer.strategy).__name__, cli.trainer.strategy.patcher.settings)
"""
YAML = """
trainer:
  strategy:
    class_path: sloth_lightning.SlothStrategy
    init_args:
      {init_args}
"""


@needs_cli
@pytest.mark.slow
@pytest.mark.parametrize(
    "init_args", ["{settings: {disable: [rope]}}", "{disable: [rope], show_report: false}"]
)
def test_cli_with_a_yaml(tmp_path: Path, init_args: str) -> None:
    (tmp_path / "config.yaml").write_text(YAML.format(init_args=init_args))
    printed = python(CLI, tmp_path, arguments=("fit", "--config", "config.yaml"))
    assert "RESULT SlothSingleDeviceStrategy" in printed and "disable=frozenset({'rope'})" in printed
    assert ("sloth patched" in printed) == ("show_report" not in init_args)


@needs_cli
@pytest.mark.slow
def test_cli_with_a_name(tmp_path: Path) -> None:
    assert "RESULT SlothSingleDeviceStrategy" in python(
        CLI, tmp_path, arguments=("fit", "--trainer.strategy=sloth")
    )


@needs_cli
@pytest.mark.slow
@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ("{kernel: torch}", "Option 'kernel' is not accepted"),  # Lightning's own
        ("{settings: {kernel: torch}}", r"'kernel' in SlothStrategy\(\): .* Did you mean 'kernels'"),
    ],
)
def test_cli_with_a_wrong_option(tmp_path: Path, init_args: str, expected: str) -> None:
    (tmp_path / "config.yaml").write_text(YAML.format(init_args=init_args))
    with pytest.raises(AssertionError, match=expected):
        python(CLI, tmp_path, arguments=("fit", "--config", "config.yaml"))


# On a GPU

WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_precision_on_a_gpu(tmp_path: Path, package: str, precision: str) -> None:
    plain, module = (module_for(package, tiny_model("llama", **WIDE)) for _ in range(2))
    changes = dict(accelerator="gpu", precision=precision)
    fitted(tmp_path, plain, "auto", package, **changes)
    logger = import_module(f"{package}.loggers").CSVLogger(tmp_path)
    trainer = fitted(tmp_path, module, "sloth", package, logger=logger, **changes)
    (acceleration,) = trainer.strategy.accelerations
    report = acceleration.report
    assert [skip for skip in report.skipped if not skip.benign] == []
    # And the backbone's, which repeats a forward that runs out of memory.
    assert module.patched == [len(report.patched) + 1] * 4 and len(report.patched) >= 11
    assert all(row.kernel.startswith("sloth.triton.") for row in report.patched if "rms_norm" in row.op)
    kind = {"bf": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision[:2]]
    assert close(module.losses, plain.losses, kind) and not forwards(module)
    peak = trainer.logged_metrics["sloth/peak_bytes"]
    assert 0 < peak <= 1.001 * torch.cuda.max_memory_allocated(), "of the GPU, not of the process"


@pytest.mark.gpu
def test_lightnings_4_bit_layers_on_a_gpu(tmp_path: Path, package: str) -> None:
    losses = []
    for strategy in ("auto", "sloth"):
        plugin = four_bit(package, torch.bfloat16)
        model = lora(plugin.convert_module(tiny_model("llama", **WIDE)).to("cuda"))
        module = module_for(package, model)
        trainer = fitted(tmp_path, module, strategy, package, accelerator="gpu", plugins=[plugin])
        losses.append(module.losses)
    (acceleration,) = trainer.strategy.accelerations
    report = acceleration.report
    reasons = [f"{skip.module}: {skip.reason}" for skip in report.skipped if not skip.benign]
    assert reasons or {"lora_linear", "lora_mlp"} <= {row.op for row in report.patched}
    assert close(losses[1], losses[0], torch.bfloat16), reasons


# The README, the benchmark, the examples


def test_the_readmes_options_are_those_that_there_are() -> None:
    text = (ROOT / "adapters" / "lightning" / "README.md").read_text(encoding="utf-8")
    table = text.split("| option |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [*(field.name for field in dataclasses.fields(sloth.Settings)), "show_report"]
    for name in named:
        assert name in inspect.signature(ours().SlothStrategy).parameters
    words = set(re.findall(r'`"(sloth\w*)"`', text))
    from sloth_lightning._registry import TRAINER

    assert words == TRAINER.keys()


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install sloth-plugins[quant]")
    script = str(ROOT / "benchmarks" / "lightning_step.py")
    out = tmp_path / "rows.jsonl"
    arguments = [
        "--tiny",
        "--steps",
        "2",
        "--cases",
        "sloth",
        "loop_plain",
        "--out",
        str(out),
        "--commit",
        "abc",
    ]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env=python_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["sloth", "loop_plain"] and rows[0]["commit"] == "abc"
    assert rows[0]["patched"]["lora_mlp"] == 2 and rows[1]["patched"] == {} and rows[0]["skipped"] == 0
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["peak_bytes"] > 0
    assert close(rows[0]["losses"], rows[1]["losses"], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora.py", pytest.param("cli.py", marks=needs_cli)])
def test_examples(tmp_path: Path, name: str) -> None:
    from sloth_plugins import smollm2

    try:
        smollm2.smollm2_dir()
    except smollm2.MissingPackageError as error:
        pytest.skip(str(error))
    folder = ROOT / "adapters" / "lightning" / "examples"
    arguments = (
        ["2"] if name == "lora.py" else ["fit", "--config", str(folder / "cli.yaml"), "--trainer.max_steps=2"]
    )
    done = subprocess.run(
        [sys.executable, str(folder / name), *arguments],
        cwd=tmp_path,
        env=python_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (patched, left) = re.findall(r"sloth patched (\d+) sites, left (\d+) alone", done.stderr)[0]
    assert int(patched) >= 151 and left == "0"
