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
        """Stands in for triton and triton.language so that the op files can be imported for their references."""

        def jit(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
            return function if function is not None else (lambda f: f)

        def __getattr__(self, name: str) -> Any:
            return type(name, (), {})

    triton: Any = _Absent()  # type: ignore[no-redef]
    tl: Any = _Absent()  # type: ignore[no-redef]

__all__ = ["HAS_TRITON", "INTERPRETED", "register_op", "tl", "triton", "triton_unavailable"]
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
    """Define `sloth::<schema>`, with the Triton launch for CUDA (and for CPU under the interpreter) and its fake.

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
