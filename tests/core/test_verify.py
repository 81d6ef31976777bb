"""The comparison of whole calls, and that nothing of the model is changed by looking at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import nn

import sloth_plugins as sloth
from sloth_plugins.numerics import relative_error
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_model_that_only_autocast_lets_run_is_proven_in_it(family: str) -> None:
    """Norms in float32 above linears in bfloat16: every site patched, and a step is eager's to bfloat16."""
    model = tiny_model(family, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    ids = torch.randint(3, 60, (2, 12))
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=ids)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    want = step()
    with sloth.accelerate(model) as acceleration:
        assert not acceleration.report.skipped and len(acceleration.report.patched) >= 10
        got = step()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert relative_error(got[name], value.double()) < 0.03, name
