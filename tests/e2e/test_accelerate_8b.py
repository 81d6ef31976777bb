"""accelerate() on Llama-3.1-8B shapes: the time and the memory that proving every patch takes."""

import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sloth_plugins as sloth

pytestmark = pytest.mark.gpu
SHAPES = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_verification_of_an_8b_model_takes_seconds_and_little_memory(family: str) -> None:
    config = AutoConfig.for_model(family, **SHAPES)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # what LoRA leaves trainable is not a norm; one is, to prove that too
        parameter.requires_grad_(name.endswith("model.norm.weight"))
    sloth.accelerate(model).undo()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    acceleration = sloth.accelerate(model)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    extra = torch.cuda.max_memory_allocated() - before
    print(f"\n{family}: accelerate() took {seconds:.2f} s and {extra / 2**20:.0f} MiB beyond the model")
    print(acceleration.report)
    assert not [skip for skip in acceleration.report.skipped if not skip.benign]
    assert all(row.kernel.startswith("sloth.triton.") for row in acceleration.report.patched)
    norms = 65 if family == "llama" else 65 + 64
    layers_and_mlps_and_rotaries = 3 * 32
    assert len(acceleration.report.patched) == norms + layers_and_mlps_and_rotaries + 1  # the head
    assert seconds < 3.0
    assert extra < 2**30
    assert torch.cuda.memory_allocated() - before < 2**20
    acceleration.undo()
