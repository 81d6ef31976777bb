"""What the tests of the three norms share: shapes, views, poison and the compile backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
EPS = 1e-5
bf16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), bf16]
# One row, one column, widths that are no power of two, several tiles a program, a last tile that is not full.
SHAPES: list[Any] = [(1, 1), (3, 7), (130, 96), (2, 3, 5, 64), (130,), (5, 2049), (3, 9000)]
REAL_SHAPES = [(257, 4096), (1025, 4096), (300, 14336), (133, 16384), (2, 1031, 32, 128)]
SHAPES += [pytest.param(shape, marks=pytest.mark.gpu, id=f"real-{shape}") for shape in REAL_SHAPES]
# Inductor cannot compile what calls interpreted kernels.
COMPILE_BACKEND = "inductor" if GPU else "aot_eager"


def views(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Non-contiguous tensors of shape (2, 3, 4, 32)."""
    make = {"dtype": dtype, "device": device}
    return {
        "slice of a joint buffer": torch.randn(2, 3, 5 * 32 + 8, **make)[..., 16:144].view(2, 3, 4, 32),
        "heads before tokens": torch.randn(2, 4, 3, 32, **make).transpose(1, 2),
        "last dimension strided": torch.randn(2, 3, 4, 64, **make)[..., ::2],
        "last dimension outermost": torch.randn(32, 2, 3, 4, **make).permute(1, 2, 3, 0),
        "expanded rows": torch.randn(1, 3, 1, 32, **make).expand(2, 3, 4, 32),
        "one number": torch.randn((), **make).expand(2, 3, 4, 32),
    }


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element which no kernel writes is seen."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
