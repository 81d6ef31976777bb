"""What the kernels cost the host: microseconds a call, and a small model's step, eager and patched in turns.

    python benchmarks/host_cost.py

Small tensors, so that the device waits for the host. Needs a CUDA GPU, transformers and peft.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

CALLS = 2000
BF16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}


def host_us(function: Callable[[], Any]) -> float:
    """Mean microseconds until a call returns; the device is not waited for."""
    for _ in range(50):
        function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        function()
    elapsed = time.perf_counter() - began
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


def with_backward(function: Callable[[], Any], leaves: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """The call and the gradients of `leaves`."""

    def both() -> Any:
        outputs = function()
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])

    return both


def calls() -> None:
    from sloth_kernels.gated_activation import gated_activation
    from sloth_kernels.rms_norm import rms_norm
    from sloth_kernels.rope import rope
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    x = torch.randn(8, 64, 576, **BF16, requires_grad=True)
    norm = LlamaRMSNorm(576).to(**BF16).requires_grad_(False)
    q = torch.randn(8, 64, 9, 64, **BF16, requires_grad=True)
    k = torch.randn(8, 64, 3, 64, **BF16, requires_grad=True)
    cos, sin = torch.randn(1, 64, 64, **BF16), torch.randn(1, 64, 64, **BF16)
    gate = torch.randn(8, 64, 1536, **BF16, requires_grad=True)
    up = torch.randn(8, 64, 1536, **BF16, requires_grad=True)
    heads = lambda f: lambda: f(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # noqa: E731
    for name, leaves, eager, ours in (
        (
            "rms_norm",
            (x,),
            lambda: norm(x),
            lambda: rms_norm(x, norm.weight, eps=1e-5, cast_before_weight=True),
        ),
        ("rope", (q, k), heads(apply_rotary_pos_emb), heads(rope)),
        (
            "swiglu",
            (gate, up),
            lambda: F.silu(gate) * up,
            lambda: gated_activation(gate, up, activation="silu"),
        ),
    ):
        for what, function in (("eager", eager), ("sloth", ours)):
            both = host_us(with_backward(function, leaves))
            print(
                f"{name:10} {what:6} forward {host_us(function):6.1f} us   forward + backward {both:6.1f} us"
            )


def steps() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import sloth_plugins as sloth

    config = LlamaConfig(  # SmolLM2-135M's shapes
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, 49152, (8, 1024), device="cuda")

    def median_ms() -> float:
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:]) * 1e3

    for _ in range(4):
        eager = median_ms()
        with sloth.accelerate(model):
            print(f"step: eager {eager:.1f} ms, sloth {median_ms():.1f} ms")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("host_cost.py needs a CUDA GPU")
    calls()
    steps()
