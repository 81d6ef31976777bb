"""TRL's trainers on SmolLM2 with LoRA: everything patched runs fused, and the adapter is plain PEFT's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ForwardCalls, counting_kernels

from sloth_plugins import smollm2

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
from sloth_hf_trainer import SlothCallback  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed  # noqa: E402
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

pytestmark = pytest.mark.slow
GPU = torch.cuda.is_available()
STEPS = 2
LAYERS = 30 if GPU else 4  # the first ones of SmolLM2: a CPU takes seconds a step for all of them
TEXTS = ["The sloth hangs in a tree.", "It sleeps all day long.", "A leaf is its meal.", "It moves slowly."]


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return smollm2.smollm2_dir()
    except smollm2.MissingPackageError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def not_watched() -> Iterator[None]:
    """A run that fails must not leave every later test slow."""
    yield
    sys.setprofile(None)


def loaded(directory: Path) -> Any:
    dtype = torch.bfloat16 if GPU else torch.float32
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, num_hidden_layers=LAYERS)


class Watch(TrainerCallback):
    """Watches forwards, and the adapter's state in them, from the begin of training to its end."""

    def __init__(self, callback: SlothCallback, kernels: Counter[str]) -> None:
        self.callback, self.kernels = callback, kernels
        self.disabled = self.cached = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        first = next(m for m in model.modules() if hasattr(m, "lora_A"))
        self.handle = first.register_forward_pre_hook(self._seen)
        self.kernels.clear()
        self.calls = ForwardCalls(self.callback.acceleration)
        self.calls.start()

    def _seen(self, layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.disabled += layer.disable_adapters
        self.cached += args[0].shape[-2] == 1  # one new token: the others are in the cache

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.stop()
        self.handle.remove()


def trainer_of(kind: str, directory: Path, folder: Path, *callbacks: TrainerCallback) -> Any:
    common: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not GPU,
        bf16=GPU,
        dataloader_pin_memory=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    given: dict[str, Any] = dict(
        processing_class=tokenizer, peft_config=config, callbacks=[*callbacks], model=loaded(directory)
    )
    if kind == "sft":
        args = SFTConfig(**common, max_length=32)
        return SFTTrainer(args=args, train_dataset=datasets.Dataset.from_dict({"text": TEXTS}), **given)
    if kind == "dpo":
        pairs = {"prompt": ["A: "] * len(TEXTS), "chosen": TEXTS, "rejected": TEXTS[::-1]}
        args = DPOConfig(**common, max_length=32)
        return DPOTrainer(args=args, train_dataset=datasets.Dataset.from_dict(pairs), **given)
    args = GRPOConfig(**common, num_generations=2, max_completion_length=6, beta=0.1)
    return GRPOTrainer(
        args=args,
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        **given,
    )


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_runs_fused_and_saves_plain_adapters(kind: str, directory: Path, tmp_path: Path) -> None:
    set_seed(0)
    with counting_kernels() as kernels:
        callback = SlothCallback()
        watch = Watch(callback, kernels)
        trainer = trainer_of(kind, directory, tmp_path, callback, watch)
        trainer.train()
    assert kernels["lora_linear"] > 0 and kernels["lora_mlp"] > 0
    assert sum(kernels[op] for op in ("lora_linear", "lora_mlp")) >= STEPS * LAYERS * 3
    patched = {row.module for row in callback.acceleration.report.patched if row.op.startswith("lora_")}
    assert len(patched) == LAYERS * 5  # q k v o and the MLP
    assert not set(watch.calls.original) & patched
    if kind == "dpo":
        assert watch.disabled > 0  # the reference is the model without its adapter
    if kind == "grpo":
        assert watch.disabled > 0 and watch.cached > 0
    fused = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert any(p.abs().max() > 0 for name, p in fused.named_parameters() if "lora_B" in name)
    trainer.save_model(str(tmp_path / "adapter"))
    plain = peft.PeftModel.from_pretrained(loaded(directory), tmp_path / "adapter").eval().to(fused.device)
    ids = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(1)).to(fused.device)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.float() for model in (fused, plain))
        with plain.disable_adapter():
            base = plain(input_ids=ids).logits.float()
    tolerance = 3e-2 if GPU else 1e-4
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert (theirs - base).norm() > tolerance * theirs.norm() / 10
