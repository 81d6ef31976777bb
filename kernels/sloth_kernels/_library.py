"""What every op file shares: Triton where it is there, and the registration of `torch.ops.sloth.*`.

Without Triton the op files still import (their references are the CPU path); launching a kernel then raises.
`TRITON_INTERPRET=1`, set before the first import of triton, runs the kernels on CPU tensors.
"""

# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands in for triton and triton.language, so that op files can be imported for their references."""

        def jit(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
            return function if function is not None else (lambda f: f)

        def __getattr__(self, name: str) -> Any:
            return type(name, (), {})

    triton: Any = _Absent()  # type: ignore[no-redef]
    tl: Any = _Absent()  # type: ignore[no-redef]

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "differentiable_gradients",
    "register_op",
    "tl",
    "triton",
    "triton_unavailable",
    "wants_graph",
]
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
_LIBRARY = torch.library.Library("sloth", "DEF")


def triton_unavailable() -> str | None:
    """None where Triton kernels can run on this machine, otherwise the reason in one sentence."""
    if not HAS_TRITON:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not any(backend.driver.is_active() for backend in triton.backends.backends.values()):
        return "triton finds no active GPU driver"
    return None


def register_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `sloth::<schema>`: the Triton launch for CUDA (and CPU under the interpreter), and its fake.

    `fake` gets the same arguments and returns empty tensors of the right shapes, dtypes and strides.
    """

    def on_its_device(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Triton launches on the current device, which under a device map need not be the tensor's."""
        if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return implementation(first, *args, **kwargs)
        return implementation(first, *args, **kwargs)

    name = _LIBRARY.define(schema)
    keys: Sequence[str] = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    for key in keys:
        _LIBRARY.impl(name, on_its_device, key)
    torch.library.register_fake(f"sloth::{name}", fake, lib=_LIBRARY)


def wants_graph() -> bool:
    """Whether a running backward must itself be differentiable (`create_graph=True`); the kernels aren't."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    reference: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients of `reference(*inputs)` for the incoming `grads`, that can be differentiated again.

    The way of every backward here under `create_graph=True`: slower, and right to any order.
    """
    wanted = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.enable_grad():
        outputs = reference(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        pairs = [
            (o, g.to(o.dtype))
            for o, g in zip(outputs, grads, strict=True)
            if g is not None and o.requires_grad
        ]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in wanted],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    result: list[torch.Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return result
