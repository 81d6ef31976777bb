"""keep_float32=False: what prepare_model_for_kbit_training cast up goes back, and up again on undo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import batch, tiny_model
from lora_models import in_4bit, lora

from sloth_plugins import accelerate

peft = pytest.importorskip("peft", reason="peft is not installed")


def prepared(**options: Any) -> Any:
    model = in_4bit(tiny_model("llama", dtype=torch.bfloat16), compute_dtype=torch.bfloat16)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return lora(model, **options)


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Frozen floating-point weights by name, as they are."""
    named = model.named_parameters()
    return {name: p.data for name, p in named if not p.requires_grad and p.is_floating_point()}


def test_back_to_16_bits_and_up_again_to_the_bit() -> None:
    model = prepared()
    before = frozen(model)
    assert {t.dtype for t in before.values()} == {torch.float32}
    parameters = dict(model.named_parameters())
    acceleration = accelerate(model, keep_float32=False)
    inside = frozen(model)
    assert {t.dtype for t in inside.values()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)  # adapters stay
    assert {k: id(v) for k, v in parameters.items()} == {k: id(v) for k, v in model.named_parameters()}
    assert any("bfloat16" in note and "MiB less" in note for note in acceleration.report.notes)
    ids = batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    acceleration.undo()
    after = frozen(model)
    assert all(torch.equal(t, before[name]) and t.dtype == torch.float32 for name, t in after.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(plain.item(), rel=2e-3)


def test_only_what_loses_nothing() -> None:
    """A weight that has more bits than 16, a trained one, and everything by default stay float32."""
    model = prepared(modules_to_save=["lm_head"])
    norm = next(module for name, module in model.named_modules() if name.endswith("norm"))
    norm.weight.data += 2**-20
    accelerate(model, keep_float32=False)
    assert norm.weight.dtype == torch.float32
    saved = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert saved and all(p.dtype == torch.float32 for p in saved)
    model = prepared()
    accelerate(model)
    assert {t.dtype for t in frozen(model).values()} == {torch.float32}


def test_without_4_bit_layers_nothing_is_cast() -> None:
    model = tiny_model("llama").requires_grad_(False)
    acceleration = accelerate(model, keep_float32=False)
    assert {t.dtype for t in frozen(model).values()} == {torch.float32}
    assert any("nothing was cast" in note for note in acceleration.report.notes)
