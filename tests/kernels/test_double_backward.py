"""create_graph=True: the kernels are not differentiable twice, so their backward goes through the references,
to any order.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sloth_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from sloth_kernels.gated_activation import (
    gated_activation,
    gated_activation_packed,
    gated_activation_packed_reference,
    gated_activation_reference,
)
from sloth_kernels.layer_norm import layer_norm, layer_norm_reference
from sloth_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from sloth_kernels.rms_norm import rms_norm, rms_norm_reference
from sloth_kernels.rope import rope, rope_reference

from sloth_plugins.numerics import relative_error

HEADS = {"q": (1, 2, 3, 8), "k": (1, 1, 3, 8)}
ROTATION = {"cos": (1, 3, 8), "sin": (1, 3, 8)}
CASES: list[tuple[Callable[..., Any], Callable[..., Any], dict[str, tuple[int, ...]], dict[str, Any]]] = [
    (rms_norm, rms_norm_reference, {"x": (3, 8), "weight": (8,)}, {"eps": 1e-5, "offset": 1.0}),
    (
        add_rms_norm,
        add_rms_norm_reference,
        {"x": (3, 8), "residual": (3, 8), "weight": (8,)},
        {"eps": 1e-5, "cast_before_weight": True},
    ),
    (layer_norm, layer_norm_reference, {"x": (3, 8), "weight": (8,), "bias": (8,)}, {"eps": 1e-5}),
    (rope, rope_reference, HEADS | ROTATION, {"layout": "interleaved"}),
    (
        qk_norm_rope,
        qk_norm_rope_reference,
        {"q": HEADS["q"], "k": HEADS["k"], "q_weight": (8,), "k_weight": (8,), **ROTATION},
        {"eps": 1e-5},
    ),
    (gated_activation, gated_activation_reference, {"gate": (3, 8), "up": (3, 8)}, {"activation": "silu"}),
    (gated_activation_packed, gated_activation_packed_reference, {"gate_up": (3, 8)}, {"activation": "gelu"}),
]


@pytest.mark.parametrize(
    ("kernel", "reference", "shapes", "options"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_a_gradient_of_a_gradient_is_that_of_the_reference(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    shapes: dict[str, tuple[int, ...]],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    values = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}

    def second_order(function: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor | None]:
        leaves = {n: v.detach().to(dtype).requires_grad_(n not in ROTATION) for n, v in values.items()}
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        outputs = function(**leaves, **options)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        loss = sum((o**3).sum() for o in outputs)
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), wanted, allow_unused=True))

    truth = second_order(reference, torch.float64)
    found = second_order(kernel, torch.float32)
    assert any(t is not None and bool(t.abs().max() > 0) for t in truth)
    for got, want in zip(found, truth, strict=True):
        assert got is not None and want is not None
        assert relative_error(got, want) < 1e-5
