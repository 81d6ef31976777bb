"""A third party's plugin: RMSNorm with a hand-written backward, in plain PyTorch.

It saves x and one float32 a row, where autograd through the plain formula saves several tensors as wide as x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sloth_plugins import KernelSpec, hookimpl


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        cast_before_weight: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rstd = torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
        y = x.to(wide) * rstd
        if cast_before_weight:
            y = y.to(x.dtype).to(wide)
        if weight is not None:
            y = y * (weight.to(wide) + offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        wide = rstd.dtype
        xhat, g = x.to(wide) * rstd, dy.to(wide)
        dweight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                dweight = (g * xhat).flatten(0, -2).sum(0).to(weight.dtype)
            g = g * (weight.to(wide) + ctx.offset)
        dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
        return dx.to(x.dtype), dweight, None, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The op `rms_norm` of docs/kernels.md."""
    promoted = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    dtype = out_dtype or (promoted if cast_before_weight else x.dtype)
    y: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset, cast_before_weight, dtype)
    return y


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    cast_before_weight: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula, for float64."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight + offset)
    return y.to(out_dtype or y.dtype)


@hookimpl
def sloth_register_kernels() -> Sequence[KernelSpec]:
    return [
        KernelSpec(
            op="rms_norm",
            name="example.rms_norm",
            backend="example",
            function=rms_norm,
            reference=rms_norm_reference,
            device_types=frozenset({"cpu", "cuda"}),
        )
    ]
