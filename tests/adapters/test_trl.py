"""SlothCallback in TRL's trainers: patched forwards run, the model's own never do, losses stay the same."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ForwardCalls, forwards, relative_difference, tiny_model, tiny_tokenizer
from peft import LoraConfig
from sloth_hf_trainer import SlothCallback
from transformers import AutoTokenizer, TrainerCallback, set_seed

import sloth_plugins as sloth
from sloth_plugins.checkpointing import execute
from sloth_plugins.numerics import FORMULA_TOLERANCE
from sloth_plugins.smollm2 import MissingPackageError, require

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[2]
STEPS = 3
TEXTS = ["the sloth hangs", "it sleeps all day long", "and eats a leaf", "slowly", "very slowly", "the end"]
PAIRS = {"prompt": ["a ", "b ", "c "] * 2, "chosen": TEXTS, "rejected": TEXTS[::-1]}
LABELLED = {"prompt": PAIRS["prompt"], "completion": TEXTS, "label": [True, False] * 3}
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models with their tokenizer, by family: TRL's trainers load by path, the reference model too."""
    saved = {}
    for family in ("llama", "qwen3"):
        saved[family] = str(tmp_path_factory.mktemp(family))
        tiny_model(family).save_pretrained(saved[family])
        tiny_tokenizer().save_pretrained(saved[family])
    return saved


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not GPU,
        bf16=False,
        dataloader_pin_memory=False,
    )
    return {**common, **changes}


def sft(
    model: Any, folder: Path, *callbacks: TrainerCallback, peft: bool = True, **changes: Any
) -> SFTTrainer:
    return SFTTrainer(
        model,
        args=SFTConfig(**settings(folder, max_length=32, **changes)),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        peft_config=lora() if peft else None,
        callbacks=[*callbacks],
    )


def dpo(
    model: Any, folder: Path, *callbacks: TrainerCallback, peft: bool = True, **changes: Any
) -> DPOTrainer:
    return DPOTrainer(
        model,
        args=DPOConfig(**settings(folder, max_length=32, **changes)),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        peft_config=lora() if peft else None,
        callbacks=[*callbacks],
    )


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def grpo(
    model: Any, folder: Path, *callbacks: TrainerCallback, peft: bool = True, **changes: Any
) -> GRPOTrainer:
    return GRPOTrainer(
        model,
        reward_funcs=rewards,
        args=GRPOConfig(**settings(folder, num_generations=2, max_completion_length=4, **changes)),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        peft_config=lora() if peft else None,
        callbacks=[*callbacks],
    )


def made(where: str, data: dict[str, Any], **own: Any) -> Make:
    """A maker of the trainer `where`; `own` are further arguments of the trainer."""

    def make(model: Any, folder: Path, *callbacks: TrainerCallback, peft: bool = True, **changes: Any) -> Any:
        path, _, name = where.rpartition(".")
        module = pytest.importorskip(path, reason=f"this TRL has no {where}Trainer")
        return getattr(module, f"{name}Trainer")(
            model,
            args=getattr(module, f"{name}Config")(**settings(folder, **changes)),
            train_dataset=datasets.Dataset.from_dict(data),
            peft_config=lora() if peft else None,
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[*callbacks],
            **own,
        )

    return make


class Watch(TrainerCallback):
    """Watches forwards from the begin of training to its end, and counts tokens at the embedding."""

    def __init__(self, callback: SlothCallback) -> None:
        self.callback = callback
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def count(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            self.tokens += arguments[0].numel() if torch.is_grad_enabled() and module.training else 0

        model.get_input_embeddings().register_forward_pre_hook(count)
        self.calls = ForwardCalls(self.callback.acceleration)
        self.calls.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.stop()


@pytest.fixture(autouse=True)
def not_watched() -> Iterator[None]:
    """A run that fails must not leave every later test slow."""
    yield
    sys.setprofile(None)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "sft": (sft, {}),
    "sft, full": (sft, dict(peft=False)),
    "sft, bf16": (sft, dict(bf16=True)),
    "sft, packing": (sft, dict(packing=True)),
    "sft, kept activations": (sft, dict(gradient_checkpointing=False)),
    "dpo": (dpo, {}),
    "dpo, full": (dpo, dict(peft=False)),
    "grpo": (grpo, {}),
    "grpo, reference": (grpo, dict(beta=0.1)),
}
OTHERS: dict[str, tuple[Make, dict[str, Any]]] = {
    "kto": (made("trl.KTO", LABELLED), dict(max_length=32)),
    "kto, full": (made("trl.KTO", LABELLED), dict(max_length=32, peft=False)),
    "cpo": (made("trl.experimental.cpo.CPO", PAIRS), dict(max_length=32)),
    "orpo": (made("trl.experimental.orpo.ORPO", PAIRS), dict(max_length=32)),
    "rloo": (
        made("trl.RLOO", {"prompt": TEXTS}, reward_funcs=rewards),
        dict(num_generations=2, max_completion_length=4),
    ),
    "reward": (made("trl.Reward", PAIRS), dict(max_length=32, peft=False)),
}


@pytest.mark.parametrize(
    ("family", "case"),
    [*((family, case) for family in ("llama", "qwen3") for case in CASES), *(("llama", c) for c in OTHERS)],
)
def test_only_patched_forwards_run(
    folders: dict[str, str],
    tmp_path: Path,
    family: str,
    case: str,
    kernel_calls: Counter[str],
    clock: TrainerCallback,
) -> None:
    make, changes = {**CASES, **OTHERS}[case]
    set_seed(0)  # TRL makes the adapter before the Trainer sets its seed
    plain = make(folders[family], tmp_path, **changes)
    plain.train()
    assert not kernel_calls

    callback = SlothCallback()
    watch = Watch(callback)
    set_seed(0)
    trainer = make(folders[family], tmp_path, callback, watch, clock, **changes)
    kernel_calls.clear()
    trainer.train()
    report = callback.acceleration.report
    assert not report.skipped and report.patched
    rotary = "qk_norm_rope" if family == "qwen3" else "rope"
    fused = ("lora_mlp", "lora_linear") if changes.get("peft", True) else ("gated_mlp",)
    assert {row.op for row in report.patched} >= {"rms_norm", *fused, rotary}
    watch.calls.check()
    layers = 2
    for op in ("rms_norm", *fused, rotary):
        assert kernel_calls[op] >= layers * STEPS, op
    assert not any(name.startswith("sloth") for name in trainer.model.state_dict())
    if case in OTHERS:
        ways = [(counts["deferred"], counts["fused"] > 0) for counts in report.head.values()]
        # TRL's newer trainers have a head of their own; these two take the log-probabilities of the logits.
        tiled = hasattr(trl.trainer.utils, "add_fused_lm_head") and case not in ("cpo", "orpo")
        assert ways == ([] if case == "reward" else [(0, False)] if tiled else [(STEPS, True)])

    got, wanted = losses(trainer), losses(plain)
    if make is not grpo and case != "rloo":  # there a rounding may change a sampled token
        precision = torch.bfloat16 if changes.get("bf16") else torch.float32
        assert relative_difference(got, wanted) <= FORMULA_TOLERANCE[precision]
    assert len(got) == STEPS and all(torch.isfinite(torch.tensor(got)))
    summary = trainer.state.log_history[-1]
    assert summary["sloth/patched"] == len(report.patched) and summary["sloth/peak_bytes"] > 0
    assert watch.tokens and summary["sloth/tokens_per_s"] == pytest.approx(watch.tokens / STEPS, abs=0.05)


@pytest.mark.parametrize(
    ("make", "changes"), [(dpo, {}), (grpo, dict(beta=0.1))], ids=["dpo", "grpo with beta"]
)
def test_the_reference_model_is_in_the_report(
    folders: dict[str, str], tmp_path: Path, make: Make, changes: dict[str, Any]
) -> None:
    callback = SlothCallback()
    trainer = make(folders["llama"], tmp_path, callback, peft=False, **changes)
    assert trainer.ref_model is not None and not set(forwards(trainer.ref_model)) & set(
        forwards(trainer.model)
    ) - {""}
    trainer.train()
    (note,) = (note for note in callback.acceleration.report.notes if "ref_model" in note)
    assert "sloth_plugins.accelerate(trainer.ref_model)" in note

    # What the note says to do works, before training as well as between two runs.
    with sloth.accelerate(trainer.ref_model) as reference:
        calls = ForwardCalls(reference)
        with calls.watching():
            trainer.train()
        calls.check()
    assert sum("ref_model" in note for note in callback.acceleration.report.notes) == 1


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_no_reference_model_no_note(folders: dict[str, str], tmp_path: Path, make: Make) -> None:
    callback = SlothCallback()
    make(folders["llama"], tmp_path, callback, max_steps=1).train()
    assert not any("ref_model" in note for note in callback.acceleration.report.notes)


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_a_plan_gives_the_losses_of_the_trainers_own_checkpointing(
    folders: dict[str, str], tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with DPO's reference passes and GRPO's generation: a plan that offloads."""
    found, plan = [], execute.plan

    def offloading(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(plan(*args, **kwargs), layers=("offload", "keep"))

    for planned in (False, True):
        with monkeypatch.context() as patch:
            if planned:
                patch.setattr(execute, "usable_bytes", lambda device: 1)
                patch.setattr(execute, "LEAST_BYTES", 64)
                patch.setattr(execute, "plan", offloading)
            set_seed(0)
            callback = SlothCallback(checkpointing="auto" if planned else "off")
            trainer = make(folders["llama"], tmp_path, callback, gradient_checkpointing=True)
            trainer.train()
        record = callback.acceleration.report.checkpointing
        assert ("1 keep, 1 offload of 2 layers" in record["chosen"]) == planned, record
        assert ("gives way to the plan" in record["reason"]) == planned
        found.append(losses(trainer))
    assert found[0] == found[1] and len(found[0]) == STEPS


def test_undo_leaves_trls_own_patch(folders: dict[str, str], tmp_path: Path) -> None:
    """Newer TRL puts a forward of its own on the model; after undo() what a plain trainer has is left."""
    plain = sft(folders["llama"], tmp_path)
    plain.train()
    callback = SlothCallback()
    trainer = sft(folders["llama"], tmp_path, callback)
    trainer.train()
    callback.acceleration.undo()
    assert set(forwards(trainer.model)) == set(forwards(plain.model))
    for name, forward in forwards(trainer.model).items():
        assert getattr(forward, "__qualname__", None) == getattr(
            forwards(plain.model)[name], "__qualname__", None
        )


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    """adapters/hf_trainer/examples/sft_lora.py, two steps of it, as a user would run it."""
    try:
        require(["gguf"])
    except MissingPackageError as error:
        pytest.skip(str(error))
    roots = [str(ROOT / root) for root in ("kernels", "adapters/hf_trainer")]
    # The repository's root goes last: its folder `kernels` would hide the package of that name.
    path = [*roots, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(ROOT)]
    done = subprocess.run(
        [sys.executable, ROOT / "adapters/hf_trainer/examples/sft_lora.py", "2"],
        cwd=tmp_path,
        # One thread: several that wait for each other are many times as slow where the cores are not free.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sloth patched" in done.stderr and "left 0 alone" in done.stderr
    assert "sloth/tokens_per_s" in done.stdout and "train_loss" in done.stdout
