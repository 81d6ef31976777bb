"""What layers are seen to save, against all that autograd is given in a step of another shape."""

from typing import Any

import pytest
import torch
from helpers import Alive, tiny_model
from lora_models import lora

import sloth_plugins as sloth
from sloth_plugins.checkpointing import execute, repeat
from sloth_plugins.checkpointing.facts import ModelFacts, Shape
from sloth_plugins.checkpointing.observe import observe
from sloth_plugins.checkpointing.plan import CheckpointPlan

LAYERS = 6
SIZES = dict(hidden_size=64, intermediate_size=160, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
ALL = "all-linear"


def model_of(family: str, targets: Any, layers: int = LAYERS) -> Any:
    model = tiny_model(family, num_hidden_layers=layers, **SIZES)
    return (lora(model, target_modules=targets, r=16) if targets else model).train()


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """Of all storages but weights that one forward with a loss keeps."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
        return repeat.as_saved(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    found = sum(storage.nbytes() for storage in storages.values())
    del loss
    return found


def facts_of_step(model: Any, ids: torch.Tensor, **settings: Any) -> ModelFacts:
    """The facts that a budget's first plan goes by."""
    with sloth.accelerate(model, memory_budget_bytes=2**40, **settings) as acceleration:
        model(input_ids=ids, labels=ids).loss.backward()
        record = acceleration.report.checkpointing
    model.zero_grad()
    return CheckpointPlan.from_dict(record["plan"]).facts


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("llama", ALL, {}),
        ("llama", ALL, {"kernels": "off"}),
        ("llama", ALL, {"disable": {"lora_mlp"}}),
        ("llama", ["q_proj", "v_proj"], {}),
        ("llama", None, {}),
        ("phi3", ALL, {}),
        ("glm4", ALL, {}),
        ("qwen3", ALL, {}),
        ("gemma2", ALL, {}),
        ("gemma3_text", ALL, {}),
    ],
    ids=str,
)
def test_every_layer_is_counted(family: str, targets: Any, settings: Any) -> None:
    """3 x 96 tokens of two depths: their difference is that of the layers; Gemma 2 keeps its scores."""
    ids = torch.randint(0, 60, (3, 96), generator=torch.Generator().manual_seed(1))
    shape, totals = Shape(batch=3, seq=96), []
    for layers in (2, LAYERS):
        model = model_of(family, targets, layers)
        with sloth.accelerate(model, checkpointing="off", **settings):
            totals.append(saved_bytes(model, ids))
    facts = facts_of_step(model, ids, **settings)
    assert facts.observed is not None and (facts.observed.by_length > 0) == (family == "gemma2")
    measured = (totals[1] - totals[0]) / (LAYERS - 2)
    # The first layer's input has no gradient, and fills a fiftieth here.
    assert sum(facts.saved_bytes(shape).values()) == pytest.approx(measured, rel=0.035)
    assert ModelFacts.from_dict(facts.to_dict()) == facts


@pytest.mark.parametrize("norms", [False, True])
def test_what_is_made_again_is_what_was_seen(norms: bool) -> None:
    """Of an MLP, and of norms: what a step that makes them again keeps less."""
    model, ids = model_of("llama", ALL), torch.randint(0, 60, (2, 40))
    facts = facts_of_step(model, ids)
    seen = facts.observed
    assert seen is not None
    made = execute.plan(facts, Shape(batch=2, seq=40), 2**40, execute.rates_for(""), expanded=0)
    values = {**made.to_dict(), "layers": ["recompute_mlp"] * LAYERS, "norms_again": norms}
    kept = []
    for plan in (made, CheckpointPlan.from_dict(values)):
        with sloth.accelerate(model, checkpointing=plan):
            kept.append(saved_in_layers(model, ids))
    # The MLP keeps x A^T of down; the first norm's input has no gradient, and stays in its output's place.
    want = LAYERS * (seen.mlp - 16 * 4) + norms * (LAYERS * seen.norms - 64 * 4)
    assert kept[0] - kept[1] == 80 * want


def saved_in_layers(model: Any, ids: torch.Tensor) -> int:
    """As `saved_bytes`, of what hooks of ours leave as it is: their own packing is what counts."""
    found: dict[int, Any] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(packed: Any) -> None:
        tensor = packed.source if isinstance(packed, execute._Made) else packed
        if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    class Counting(hooks):  # type: ignore[misc, valid-type]
        def __init__(self, pack: Any, unpack: Any) -> None:
            def counted(tensor: torch.Tensor) -> Any:
                packed = pack(tensor)
                count(packed)
                return packed

            super().__init__(counted, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counting)
        with Counting(repeat.as_saved, lambda saved: saved):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        del loss
    return sum(storage.nbytes() for storage in found.values())


def test_nothing_is_left_behind() -> None:
    """Flags, forwards, random states, and gradients; also where the backbone wants more than ids."""
    model = model_of("llama", ALL)
    layers = execute.decoder_layers(model)
    mlps = [layer.mlp for layer in layers]
    for layer in layers[:2]:
        layer.gradient_checkpointing = True
    before = [dict(layer.__dict__) for layer in layers], [mlp.__dict__.get("forward") for mlp in mlps]
    state = torch.get_rng_state()
    backbone = execute.watched(model)
    never = lambda tensor: False  # noqa: E731
    assert observe(backbone, layers, mlps, 60, never) is not None
    handle = backbone.register_forward_pre_hook(lambda *_: 1 / 0)
    assert observe(backbone, layers, mlps, 60, never) is None
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        [dict(layer.__dict__) for layer in layers],
        [mlp.__dict__.get("forward") for mlp in mlps],
    ) == before
    assert all(p.grad is None for p in model.parameters())
    assert (repeat.NOW.norms, repeat.NOW.output, repeat.NOW.recipe) == (False, None, None)


@pytest.mark.parametrize("kind", ["compiled", "sharded"])
def test_some_models_are_not_run_for_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("llama", ALL), torch.randint(0, 60, (2, 12))
    monkeypatch.setattr(execute, "observe", None)  # not called
    if kind == "compiled":
        execute.decoder_layers(model)[0]._compiled_call_impl = execute.decoder_layers(model)[0]._call_impl
    else:
        next(model.parameters()).ds_id = 0
    assert facts_of_step(model, ids).observed is None


def test_a_backbone_that_can_not_be_observed_is_planned_by_arithmetic() -> None:
    model, ids = model_of("llama", ALL), torch.randint(0, 60, (2, 12))
    model.base_model.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: 1 / 0 if kwargs["input_ids"].shape[0] == 1 else None, with_kwargs=True
    )
    assert facts_of_step(model, ids).observed is None


def test_looking_takes_the_memory_of_few_layers() -> None:
    """Before a plan for a small budget everything is on the device."""
    layers = 12
    model = model_of("llama", ALL, layers)
    backbone = model.get_base_model().model
    mlps = [layer.mlp for layer in backbone.layers]
    with Alive() as alive:
        found = observe(backbone, backbone.layers, mlps, 64, lambda tensor: False)
    assert found is not None
    assert 0 < alive.peak < 4 * 128 * found.saved < layers * 128 * found.saved / 2
