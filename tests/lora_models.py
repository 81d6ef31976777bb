"""Models with PEFT's LoRA for the tests of several files."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from helpers import counting_kernels, tiny_model
from torch import nn

import sloth_plugins as sloth

LAYER = "base_model.model.model.layers.0"
ATTENTION = f"{LAYER}.self_attn"


def lora(model: Any, **options: Any) -> Any:
    """PEFT around a model, with B away from zero: with zeros half of the gradients would be."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomize(adapted)
    return adapted


def randomize(model: nn.Module) -> None:
    """Random values into every B."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 10)


def accelerate(model: Any, **settings: Any) -> sloth.Acceleration:
    """Without warnings of ours; they are asked for where they are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sloth.accelerate(model, **settings)


def in_4bit(model: Any, **options: Any) -> Any:
    """Every linear layer below the head in bitsandbytes' 4-bit storage, on the CPU."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = {"compute_dtype": torch.float32, "quant_type": "nf4", **options}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, **options
            )
            state = {key: p.data for key, p in module.named_parameters()}
            new.weight = bnb.nn.Params4bit(
                state["weight"],
                requires_grad=False,
                quant_type=options["quant_type"],
                compress_statistics=options.get("compress_statistics", True),
                quant_storage=options.get("quant_storage", torch.uint8),
                module=new,
            )
            if "bias" in state:
                new.bias = nn.Parameter(state["bias"])
            # On some CPUs it would repack its weights in eval mode, for good, and then they can't be trained.
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def wide(family: str = "llama", **changes: Any) -> Any:
    """A tiny model of widths that 4-bit blocks divide."""
    return tiny_model(family, **{"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, **changes})


@contextlib.contextmanager
def counted(model: Any) -> Iterator[Any]:
    """Kernel calls of an accelerated model, by op, without those of the verification."""
    with counting_kernels() as calls:
        accelerate(model)
        calls.clear()
        yield calls
