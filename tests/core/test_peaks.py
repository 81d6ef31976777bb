"""The predicted peak of a step against the bytes that are alive in one, with everything but kernels' results.

Triton's kernels are not run, so results are anything; what is allocated, held and freed is as on a GPU.
"""

import dataclasses
import gc
from typing import Any

import pytest
import torch
from helpers import Alive
from lora_models import in_4bit, lora
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_plugins as sloth
from sloth_plugins import engine
from sloth_plugins import lora as lora_patches
from sloth_plugins.checkpointing import execute
from sloth_plugins.checkpointing.facts import ModelFacts, Shape
from sloth_plugins.checkpointing.plan import fixed_bytes, plan
from sloth_plugins.checkpointing.rates import KNOWN

LAYERS, HIDDEN, BATCH, SEQ = 6, 512, 2, 512
OPTION = {
    "k": "keep",
    "m": "recompute_mlp",
    "r": "recompute",
    "i": "recompute_offload",
    "p": "recompute_mlp_offload",
    "o": "offload",
}


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing are taken as they are, and for what they'd be on a GPU: in bfloat16, with
    weights that are expanded ahead."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton's interpreter")
    from sloth_kernels import linear_cross_entropy, lora, low_rank

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **options: None)
    monkeypatch.setattr(engine._Run, "prepare_trial", lambda *args: None)
    monkeypatch.setattr(engine._Run, "verdict", lambda *args: ())
    monkeypatch.setattr(lora_patches._Proven, "__call__", lambda *args: True)
    monkeypatch.setattr(execute._Norms, "_prove", staticmethod(lambda *args: True))
    monkeypatch.setattr(linear_cross_entropy, "_fused", lambda x: True)
    monkeypatch.setattr(low_rank, "takes", lambda x: True)
    monkeypatch.setattr(lora, "takes", lambda x: True)
    monkeypatch.setattr(execute, "LEAST_BYTES", 64)

    class Ahead(lora._Ahead):
        def __init__(self, group: Any, x: Any, tensors: Any) -> None:
            super().__init__(group, x, tensors)
            self.early = group.extended and group.kept is None

        def before(self) -> None:
            if self.early:
                self.buffers = lora._buffers(self.group, self.x, self.tensors)

        def result(self) -> Any:
            made, self.buffers = self.buffers, None
            return made or lora._buffers(self.group, self.x, self.tensors)

        def __del__(self) -> None:
            pass

    monkeypatch.setattr(lora, "_Ahead", Ahead)
    monkeypatch.setattr(lora, "_watched", lambda: False)  # who looks at the step here holds nothing of it


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=HIDDEN * 7 // 2, vocab_size=128,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    narrow = in_4bit(LlamaForCausalLM(config).to(torch.bfloat16), compute_dtype=torch.bfloat16)
    model = lora(narrow, r=16).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model


@pytest.mark.parametrize(
    ("layers", "norms", "tiles"),
    [
        ("kkkkkk", False, 1),
        ("rrrrrr", False, 1),
        ("iiiiir", False, 1),
        ("mmmmmm", True, 1),
        ("oooook", False, 1),
        ("pppppm", False, 1),
        ("pppppm", True, 1),
        ("ppmppk", True, 1),
        ("popopm", True, 1),
        ("iooomk", False, 1),
        ("oooook", True, 2),
        ("oooook", False, 2),
        ("kkkkkk", False, 4),
        ("rrrrrr", False, 2),
    ],
)
def test_a_step_takes_what_is_predicted(
    layers: str, norms: bool, tiles: int, model: Any, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward and in all; never more than 2 % above it. Below it at most by 5 %, or by a tenth where
    whole MLPs are said to hold both groups' weights, and in the forward by what the last norm takes."""
    shape = Shape(batch=BATCH, seq=SEQ)
    given = torch.randint(0, 128, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    settings: Any = {"kernels": "triton"}
    with sloth.accelerate(model, memory_budget_bytes=2**40, **settings) as acceleration:
        facts: ModelFacts = execute.facts_of(model, {row.op for row in acceleration.report.patched})
    assert facts.fused_mlp and facts.four_bit and facts.ends_with_mlp and facts.fused_head
    made = plan(facts, shape, 2**40, KNOWN["unknown"], expanded=0)
    chosen = dataclasses.replace(
        made, layers=tuple(OPTION[name] for name in layers), norms_again=norms, mlp_tiles=tiles
    )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=given, labels=given).loss
        of_forward.append(alive.peak)
        loss.backward()

    of_forward: list[int] = []
    alive, host_memory = Alive(), execute.host_memory

    def on_host(size: int, pinned: bool) -> torch.Tensor:
        with alive.put_aside():
            return host_memory(size, pinned)

    monkeypatch.setattr(execute, "host_memory", on_host)
    with sloth.accelerate(model, checkpointing=chosen, **settings):
        step()  # what is made once and kept
        model.zero_grad(set_to_none=True)
        gc.collect()
        with alive:
            step()
    model.zero_grad(set_to_none=True)
    rows = {name: size - fixed_bytes(facts) for name, size in chosen.timeline() if name != "optimizer"}
    forward = max(size for name, size in rows.items() if not name.startswith("backward"))
    whole = tiles == 1 and bool({"k", "o"} & set(layers))
    for predicted, seen, ends in (
        (forward, of_forward[-1], facts.ends_bytes(shape)),
        (max(rows.values()), alive.peak, 0),
    ):
        assert (0.9 if whole else 0.95) * predicted - ends < seen < 1.02 * predicted
