"""Offers this package's kernels: for each op the Triton kernel, and its PyTorch reference without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sloth_kernels import (
    add_rms_norm,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    lora,
    qk_norm_rope,
    rms_norm,
    rope,
)
from sloth_kernels._library import INTERPRETED, triton_unavailable
from sloth_plugins.hookspecs import hookimpl
from sloth_plugins.specs import FLOATS, KernelSpec

MAX_WIDTH = 16_384


def gated_mlp(gate: torch.Tensor, up: torch.Tensor | None, *, activation: str) -> torch.Tensor:
    """act(gate) * up; with up None, gate is [gate | up] of a fused projection. See gated_activation."""
    if up is None:
        return gated_activation.gated_activation_packed(gate, activation=activation)
    return gated_activation.gated_activation(gate, up, activation=activation)


def gated_mlp_reference(gate: torch.Tensor, up: torch.Tensor | None, *, activation: str) -> torch.Tensor:
    """gated_mlp in plain PyTorch."""
    if up is None:
        return gated_activation.gated_activation_packed_reference(gate, activation=activation)
    return gated_activation.gated_activation_reference(gate, up, activation=activation)


def lora_linear_without_triton(
    x: torch.Tensor, projections: Sequence[lora.Projection]
) -> tuple[torch.Tensor, ...]:
    """lora.lora_linear by PyTorch's operators."""
    return lora.lora_linear(x, projections, fused=False)


def lora_mlp_without_triton(
    x: torch.Tensor,
    gate: lora.Projection,
    up: lora.Projection,
    down: lora.Projection,
    *,
    activation: str,
    tile: int | None = None,
    output: bool = True,
    repeated: bool = False,
) -> torch.Tensor:
    """lora.lora_mlp by PyTorch's operators."""
    options: dict[str, Any] = dict(tile=tile, output=output, repeated=repeated)
    return lora.lora_mlp(x, gate, up, down, activation=activation, fused=False, **options)


OPS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("rms_norm", rms_norm.rms_norm, rms_norm.rms_norm_reference),
    ("add_rms_norm", add_rms_norm.add_rms_norm, add_rms_norm.add_rms_norm_reference),
    ("layer_norm", layer_norm.layer_norm, layer_norm.layer_norm_reference),
    ("gated_mlp", gated_mlp, gated_mlp_reference),
    ("rope", rope.rope, rope.rope_reference),
    ("qk_norm_rope", qk_norm_rope.qk_norm_rope, qk_norm_rope.qk_norm_rope_reference),
    ("lora_linear", lora.lora_linear, lora.lora_linear_reference),
    ("lora_mlp", lora.lora_mlp, lora.lora_mlp_reference),
    (
        "linear_cross_entropy",
        linear_cross_entropy.linear_cross_entropy,
        linear_cross_entropy.linear_cross_entropy_reference,
    ),
    (
        "linear_log_probs",
        linear_cross_entropy.linear_log_probs,
        linear_cross_entropy.linear_log_probs_reference,
    ),
)
# Hand-derived gradients and chunks around matmuls are worth it without Triton as well.
WITHOUT_TRITON: dict[str, Callable[..., Any]] = {
    "lora_linear": lora_linear_without_triton,
    "lora_mlp": lora_mlp_without_triton,
    "linear_cross_entropy": partial(linear_cross_entropy.linear_cross_entropy, fused=False),
    "linear_log_probs": partial(linear_cross_entropy.linear_log_probs, fused=False),
}


def _too_wide(device: torch.device, dtype: torch.dtype, facts: Mapping[str, Any]) -> str | None:
    width = facts.get("width", 0)
    return (
        f"rows of {width} are wider than the {MAX_WIDTH} that the kernel holds" if width > MAX_WIDTH else None
    )


# For a decoder layer, which adds to the norm's input later (see sloth_plugins.patches).
vars(rms_norm.rms_norm)["beside"] = add_rms_norm.rms_norm_beside


@hookimpl(trylast=True)
def sloth_register_kernels() -> Sequence[KernelSpec]:
    """Our kernels: Triton first, so that "auto" takes it where a GPU is there."""
    devices = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})
    triton = [
        KernelSpec(
            op=op,
            name=f"sloth.triton.{op}",
            backend="triton",
            function=function,
            reference=reference,
            device_types=devices,
            unavailable=triton_unavailable,
            refuse=_too_wide,
        )
        for op, function, reference in OPS
    ]
    torch_references = [
        KernelSpec(
            op=op,
            name=f"sloth.torch.{op}",
            backend="torch",
            function=WITHOUT_TRITON.get(op, reference),
            reference=reference,
            device_types=frozenset(
                {"cpu", "cuda"} if op in WITHOUT_TRITON else {"cpu", "cuda", "mps", "xpu"}
            ),
            dtypes=FLOATS if op in WITHOUT_TRITON else FLOATS | {torch.float64},
        )
        for op, _, reference in OPS
    ]
    return [*triton, *torch_references]
