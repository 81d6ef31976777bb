"""The accuracy contract that every kernel and every patch is held to.

Truth is float64. For an output or a gradient x with float64 truth t,

    err(x) = ||x - t|| / ||t||            (Frobenius norms, computed in float64)

and a kernel passes when err(kernel) <= 1.5 * err(eager in the same dtype) + 1e-6. `eager` is what the model
would have computed without us, so "passes" means: at least as accurate as the code it replaces, up to noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

EAGER_FACTOR = 1.5
ABSOLUTE_SLACK = 1e-6
# What eager itself may be off by before "this module computes that formula" is believed: a few roundings of
# the dtype.
FORMULA_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """||x - truth|| / ||truth|| in float64; infinity for another shape or a non-finite x.

    Where truth is 0, the plain norm of the difference.
    """
    if x.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().to(torch.float64)
    difference = torch.linalg.vector_norm(x.detach().to(torch.float64) - truth)
    scale = torch.linalg.vector_norm(truth)
    error = float(difference / scale) if float(scale) > 0 else float(difference)
    return error if error == error else float("inf")


def bound(eager_error: float) -> float:
    """The largest relative error a kernel may have where eager has `eager_error`."""
    return EAGER_FACTOR * eager_error + ABSOLUTE_SLACK


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor of a kernel and of eager, each against float64."""

    tensor: str
    error: float
    eager_error: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= bound(
            self.eager_error
        )  # infinity is never within infinity

    def __str__(self) -> str:
        allowed = bound(self.eager_error)
        return f"{self.tensor}: {self.error:.2e} (eager {self.eager_error:.2e}, allowed {allowed:.2e})"
