"""Frozen weights that were cast up to float32 beside 4-bit layers, and back.

PEFT's `prepare_model_for_kbit_training` casts norms, embeddings and the head of a quantized model to
float32: 2 GiB more for an 8B model, and a residual stream in float32. The fused path sums in float32 by
itself, so that these copies buy little. Where every value of such a weight is one of the narrower dtype,
casting it back loses nothing, and neither does casting it up again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)
# Compared at a time, so that an embedding needs no second float32 copy.
ELEMENTS = 2**24


def narrow_upcasts(model: nn.Module) -> tuple[str, Callable[[], None]]:
    """Cast frozen float32 weights back to the 4-bit layers' compute dtype, in place: (a note, the way back).

    Only where that dtype is one 16-bit dtype, and only weights whose values it holds exactly. Parameters stay
    the same objects. Reading back whether values are exact waits for the device.
    """
    dtypes = set()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            dtypes.add(getattr(module, "compute_dtype", None) or state.dtype)
    if len(dtypes) != 1 or (dtype := dtypes.pop()) not in NARROW:
        return (
            "keep_float32=False: there are no 4-bit layers of one 16-bit dtype, so nothing was cast",
            _nothing,
        )
    changed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.dtype != torch.float32 or parameter.requires_grad or type(parameter) is not nn.Parameter:
            continue
        narrow = parameter.data.to(dtype)
        parts = (torch.split(t.flatten(), ELEMENTS) for t in (narrow, parameter.data))
        if all(torch.equal(some.float(), own) for some, own in zip(*parts, strict=True)):
            parameter.data = narrow
            changed.append(parameter)
    saved_bytes = sum(2 * parameter.numel() for parameter in changed)
    name = str(dtype).removeprefix("torch.")

    def widen() -> None:
        for parameter in changed:
            if parameter.dtype == dtype:
                parameter.data = parameter.data.float()

    note = f"keep_float32=False: {len(changed)} frozen float32 weights hold {name} values and are kept in it"
    return f"{note} ({saved_bytes / 2**20:,.0f} MiB less)", widen


def _nothing() -> None:
    pass
