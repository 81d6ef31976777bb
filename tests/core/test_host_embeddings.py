"""Input embeddings in host memory: which may go there, what is seen of it, what a budget's plan does with it.

Without a GPU the host's copy is another tensor of the CPU, and all else is as on a GPU.
"""

import copy
import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from helpers import same, step
from lora_models import lora
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_plugins as sloth
from sloth_plugins.checkpointing import execute, host
from sloth_plugins.checkpointing.facts import ModelFacts, Shape
from sloth_plugins.checkpointing.host import HostWeight, StaysError, movable_embedding
from sloth_plugins.checkpointing.plan import CheckpointPlan, fixed_bytes, plan, smallest_budget_bytes
from sloth_plugins.checkpointing.rates import KNOWN

VOCAB = 2000


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "reads_host_memory", lambda device: True)
    monkeypatch.setattr(execute, "LEAST_BYTES", 64)


def llama(tied: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=VOCAB, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    return lora(LlamaForCausalLM(config), **options).train()


def ids(batch: int = 2, seq: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(1))


def embedding_of(model: Any) -> Any:
    return model.get_input_embeddings().weight


def is_moved(model: Any, before: int) -> bool:
    return bool(embedding_of(model).data_ptr() != before)


def planned(model: Any, **changes: Any) -> CheckpointPlan:
    facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    made = plan(facts, Shape(batch=2, seq=12), 2**40, KNOWN["unknown"])
    return CheckpointPlan.from_dict({**made.to_dict(), "embeddings_on_host": True, **changes})


# The weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_parameter_is_the_same_and_so_are_its_bits(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    weight = movable_embedding(model)
    assert weight is embedding_of(model)
    before, keys, old = weight.detach().clone(), list(model.state_dict()), weight.data_ptr()
    want = model(input_ids=ids()).logits
    freed = weakref.ref(weight.untyped_storage())
    moved = HostWeight(weight)
    assert embedding_of(model) is weight and weight.device == before.device and weight.dtype == dtype
    assert is_moved(model, old) and freed() is None
    assert torch.equal(weight, before) and torch.equal(model(input_ids=ids()).logits, want)
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    clone = copy.deepcopy(model)
    assert torch.equal(embedding_of(clone), before) and embedding_of(clone).data_ptr() != weight.data_ptr()
    there = weight.data_ptr()
    assert moved.weight is weight and moved.restore()
    assert moved.weight is None and weight.data_ptr() != there and moved.restore()
    assert embedding_of(model) is weight and torch.equal(weight, before)
    assert torch.equal(model(input_ids=ids()).logits, want)


def test_what_somebody_has_put_there_since_stays() -> None:
    model = llama()
    weight = embedding_of(model)
    moved = HostWeight(weight)
    with torch.no_grad():
        weight.mul_(2)  # in place, as load_state_dict() does: these are the bits now
    want = weight.detach().clone()
    moved.restore()
    assert torch.equal(weight, want)
    moved = HostWeight(weight)
    theirs = weight.data = torch.ones_like(weight)
    assert moved.weight is None and moved.restore() and weight.data_ptr() == theirs.data_ptr()
    moved = HostWeight(weight)
    model.double()
    moved.restore()
    assert weight.dtype == torch.float64 and moved.weight is None
    moved = HostWeight(weight)
    model.get_input_embeddings().weight = nn.Parameter(torch.zeros(VOCAB, 32), requires_grad=False)
    del weight
    gc.collect()
    assert moved.restore() and not embedding_of(model).any()


def test_host_memory_lives_as_long_as_somebody_reads_it() -> None:
    model = llama()
    moved = HostWeight(embedding_of(model))
    memory = moved._host
    rows = embedding_of(model).data[3:5]
    want = rows.clone()
    gc.collect()
    assert memory() is not None
    moved.restore()
    assert memory() is not None and torch.equal(rows, want)
    del rows
    assert memory() is None
    moved = HostWeight(embedding_of(model))
    memory = moved._host
    del model
    gc.collect()
    assert memory() is None and moved.restore()


def test_a_device_that_reads_other_bytes_or_none_keeps_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    weight = embedding_of(model)
    old, before = weight.data_ptr(), weight.detach().clone()
    on_device = host.on_device

    def other(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
        return on_device(memory.clone().fill_(1), device)

    def none(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise RuntimeError("no such address")

    for fault, message in ((other, "reads other bytes"), (none, "no such address")):
        monkeypatch.setattr(host, "on_device", fault)
        with pytest.raises(StaysError, match=message):
            HostWeight(weight)
        assert not is_moved(model, old) and torch.equal(weight, before)


def test_a_weight_without_room_on_the_device_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    want = step(model, ids())
    moved = HostWeight(embedding_of(model))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="embeddings stay in host memory"):
        patch.setattr(torch, "empty_like", full)
        assert not moved.restore()
    same(step(model, ids()), want)
    assert moved.weight is not None and moved.restore()


def test_what_may_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    assert movable_embedding(llama()) is not None
    hooked = llama()
    hooked.enable_input_require_grads()  # as for gradient checkpointing: a hook that sees rows alone
    assert movable_embedding(hooked) is not None

    def changed(change: Any) -> Any:
        model = llama()
        change(model.get_input_embeddings(), model)
        return model

    class Own(nn.Embedding):
        pass

    def subclass(embedding: Any, model: Any) -> None:
        embedding.__class__ = Own

    def view(embedding: Any, model: Any) -> None:
        embedding.weight.data = torch.zeros(2 * VOCAB, 32)[:VOCAB]

    def buffer(embedding: Any, model: Any) -> None:
        model.register_buffer("table", embedding.weight.detach()[:5])

    def norm(embedding: Any, model: Any) -> None:
        embedding.max_norm = 1.0

    def parametrized(embedding: Any, model: Any) -> None:
        nn.utils.parametrize.register_parametrization(embedding, "weight", nn.Identity())

    for change in (
        subclass,
        view,
        buffer,
        norm,
        parametrized,
        lambda embedding, model: embedding.weight.requires_grad_(),
        lambda embedding, model: setattr(embedding.weight, "ds_id", 0),
        lambda embedding, model: setattr(model, "get_input_embeddings", None),
        lambda embedding, model: model.base_model.model.model.layers[0].compile(backend="eager"),
    ):
        assert movable_embedding(changed(change)) is None
    assert movable_embedding(llama(tied=True)) is None
    assert movable_embedding(llama(modules_to_save=["embed_tokens"])) is None
    assert movable_embedding(llama(target_modules=["q_proj", "embed_tokens"])) is None
    assert movable_embedding(nn.Linear(2, 2)) is None
    with torch.device("meta"):
        meta = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=64))
    assert movable_embedding(meta.requires_grad_(False)) is None
    model = llama()
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert movable_embedding(model) is None
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        assert movable_embedding(model) is not None
    monkeypatch.setattr(host, "reads_host_memory", lambda device: device.type == "cuda")
    assert movable_embedding(model) is None


# A plan


def test_a_plan_moves_them_and_undoing_brings_them_back() -> None:
    model = llama()
    weight, old = embedding_of(model), embedding_of(model).data_ptr()
    before = weight.detach().clone()
    want = step(model, ids())
    facts = ModelFacts.from_model(model)
    assert facts.embedding_bytes == weight.numel() * 4
    chosen = planned(model)
    with sloth.accelerate(model, kernels="off", checkpointing=chosen) as acceleration:
        assert is_moved(model, old) and "embeddings in host memory" in str(acceleration.report)
        same(step(model, ids()), want)
        model.eval()
        model.generate(input_ids=ids()[:, :4], max_new_tokens=2, do_sample=False)
        model.train()
        there = weight.data_ptr()
    assert is_moved(model, there) and embedding_of(model) is weight and torch.equal(weight, before)
    same(step(model, ids()), want)


def test_a_plan_for_embeddings_that_have_to_stay_is_carried_out_without_it() -> None:
    model = llama()
    want, chosen = step(model, ids()), planned(model)
    embedding_of(model).ds_id = 0
    old = embedding_of(model).data_ptr()
    with pytest.warns(
        UserWarning, match="the input embeddings stay on the device: .*more memory than planned"
    ):
        acceleration = sloth.accelerate(model, kernels="off", checkpointing=chosen)
    same(step(model, ids()), want)
    assert not is_moved(model, old)
    acceleration.undo()


# A budget


def budgets(model: Any) -> tuple[int, int]:
    """The smallest at 2 x 12 with the embeddings in host memory, and without."""
    facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    shape, rates = Shape(batch=2, seq=12), KNOWN["unknown"]
    found = [smallest_budget_bytes(facts, shape, rates, embeddings=e) for e in ((False, True), (False,))]
    return found[0], found[1]


@pytest.mark.filterwarnings("ignore:sloth")
def test_a_budget_may_move_them_and_a_larger_batch_bring_them_back_or_not() -> None:
    model = llama()
    want, wider = step(model, ids()), step(model, ids(2, 40))
    weight = embedding_of(model)
    old, before = weight.data_ptr(), weight.detach().clone()
    least, stay = budgets(model)
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=(least + stay) // 2) as acceleration:
        record = acceleration.report.checkpointing
        same(step(model, ids()), want)
        assert record["plan"]["embeddings_on_host"] and "embeddings in host memory" in record["chosen"]
        there = weight.data_ptr()
        assert there != old
        same(step(model, ids()), want)
        same(step(model, ids(2, 40)), wider)  # planned anew: they are there already, and not moved again
        assert record["plans"] == 2 and record["plan"]["embeddings_on_host"]
        assert record["plan"]["facts"]["embedding_bytes"] == weight.numel() * 4
        assert weight.data_ptr() == there
    assert weight.data_ptr() != there and torch.equal(weight, before)
    same(step(model, ids()), want)
    roomy = plan(ModelFacts.from_model(model), Shape(batch=2, seq=12), 2**40, KNOWN["unknown"])
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=2 * roomy.peak_bytes):
        old = weight.data_ptr()
        same(step(model, ids()), want)
        assert weight.data_ptr() == old  # all is kept anyway


def test_embeddings_that_a_new_plan_has_no_use_for_come_back() -> None:
    model = llama()
    running = execute.Running(model)
    old = embedding_of(model).data_ptr()
    want = step(model, ids())
    bytes_ = running.movable_bytes
    for on_host in (True, True, False, True):
        running.use(planned(model, embeddings_on_host=on_host))
        assert is_moved(model, old) == on_host or not on_host
        assert (running._embedding is not None) == on_host and running.movable_bytes == bytes_
        same(step(model, ids()), want)
    model.double()  # somebody's own: a plan may move it again
    running.use(planned(model))
    assert running.movable_bytes == 2 * bytes_ and running._embedding.weight is embedding_of(model)
    running.stop()
    assert running._embedding is None


@pytest.mark.parametrize("fault", ["pinning", "bytes"])
def test_a_budget_is_planned_without_them_where_they_cannot_move(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    want = step(model, ids())
    old = embedding_of(model).data_ptr()
    least, stay = budgets(model)

    def fail(*_: Any) -> Any:
        raise StaysError("host memory can't be pinned") if fault == "pinning" else ValueError("odd")

    monkeypatch.setattr(host, "host_memory" if fault == "pinning" else "on_device", fail)
    for given, fits in (((least + stay) // 2, False), (int(1.1 * stay), True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with sloth.accelerate(model, kernels="off", memory_budget_bytes=given) as acceleration:
                same(step(model, ids()), want)
                same(step(model, ids()), want)
                record = acceleration.report.checkpointing
                assert not is_moved(model, old) and not record["plan"]["embeddings_on_host"]
                if not fits:
                    assert "the input embeddings stay on the device" in record["note"]
                    assert "need at least" in record["note"] and record["plans"] == 1
        said = [str(w.message) for w in caught if str(w.message).startswith("sloth")]
        assert [("need at least" in text) for text in said] == ([] if fits else [True])


def test_a_failed_pinning_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_unpinned", [])
    empty = torch.empty

    def refuse(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("no memory to pin\nmore")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(
        UserWarning, match="host memory can't be pinned, so offloading is slower: no memory to"
    ):
        assert not host.host_memory(8, True).is_pinned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert host.host_memory(8, True).numel() == 8


def test_a_budget_below_the_weights_counts_with_it() -> None:
    """The error before training is for what can't fit with the embeddings in host memory."""
    model = llama()
    facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    between = (fixed_bytes(facts) + fixed_bytes(facts, embeddings_on_host=True)) // 2
    sloth.accelerate(model, kernels="off", memory_budget_bytes=between).undo()
    with pytest.raises(ValueError, match="weights and the optimizer's state alone"):
        sloth.accelerate(model, kernels="off", memory_budget_bytes=between - facts.movable_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's memory falls by the table; steps, copies, saving and undoing give the same bits."""
    monkeypatch.undo()
    monkeypatch.setattr(execute, "LEAST_BYTES", 64)
    model = llama().to("cuda", dtype)
    given = ids().cuda()
    big = torch.randn(2**14, 32, device="cuda", dtype=dtype)
    model.get_input_embeddings().weight.data = torch.cat([embedding_of(model).data, big])
    model.get_input_embeddings().num_embeddings += 2**14
    weight = embedding_of(model)
    before, size = weight.detach().cpu(), weight.numel() * weight.element_size()
    del big
    want = step(model, given)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    chosen = planned(model)
    with sloth.accelerate(model, kernels="off", checkpointing=chosen):
        assert weight.is_cuda and embedding_of(model) is weight
        assert allocated - torch.cuda.memory_allocated() >= size - 2**20
        same(step(model, given), want)
        assert torch.equal(weight.cpu(), before) and torch.equal(weight.clone().cpu(), before)
        assert torch.equal(embedding_of(copy.deepcopy(model)).cpu(), before)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        saved = [t for n, t in torch.load(file, map_location="cpu").items() if "embed_tokens" in n]
        assert torch.equal(saved[0], before)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():  # in place, from the host and on the device
            weight.copy_(before.flip(0))
            assert torch.equal(weight.cpu(), before.flip(0))
            weight.copy_(before.cuda())
    assert weight.is_cuda and torch.equal(weight.cpu(), before)
    gc.collect()
    assert abs(torch.cuda.memory_allocated() - allocated) < 2**20
    same(step(model, given), want)
    host_weight = HostWeight(weight)
    weight.data = weight.data.to("cpu")  # somebody's own
    host_weight.restore()
    assert not weight.is_cuda and torch.equal(weight, before)
