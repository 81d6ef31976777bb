"""The comparison of whole calls, and that nothing of the model is changed by looking at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sloth_plugins.verify import Replay, VerificationError, compare_calls, undisturbed


class Mixed(nn.Module):
    """A float32 parameter beside bfloat16 activations, as a LoRA layer has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.weight).to(x.dtype)


def test_roundings_of_the_coarsest_dtype_are_allowed_and_no_more() -> None:
    module = Mixed()
    replay = Replay(args=(torch.randn(2, 8, 32).bfloat16(),), kwargs={})

    def patched(factor: float) -> Any:
        return lambda x: (x.float() * factor).bfloat16() @ module.weight.bfloat16()

    compare_calls(module, patched(1.0), module, replay)
    for factor in (1.05, -1.0):
        with pytest.raises(VerificationError, match="differs by"):
            compare_calls(module, patched(factor), module, replay)


def test_a_forward_that_raises_leaves_flags_and_random_states() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"), undisturbed(model):
        assert not model.training
        torch.randn(3)
        raise ValueError("inside")
    assert model.training and model[0].training and not model[1].training
    assert torch.equal(torch.get_rng_state(), state)
