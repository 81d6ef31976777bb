"""4-bit weights in host memory: which may go there, when they come, and that nobody sees other bytes.

Without a GPU the host's copy is another tensor of the CPU and copies are plain, and all else is as on a GPU.
"""

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import same, step
from lora_models import accelerate, in_4bit, lora
from sloth_kernels import nf4
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_plugins as sloth
from sloth_plugins.checkpointing import execute, host, weights
from sloth_plugins.checkpointing.execute import decoder_layers, facts_of
from sloth_plugins.checkpointing.facts import Shape
from sloth_plugins.checkpointing.host import StaysError
from sloth_plugins.checkpointing.plan import OPTIONS, CheckpointPlan, fixed_bytes, plan, smallest_budget_bytes
from sloth_plugins.checkpointing.rates import KNOWN
from sloth_plugins.checkpointing.weights import StreamedWeights, movable_weights

VOCAB, LAYERS = 500, 6


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host, "reads_host_memory", lambda device: True)
    monkeypatch.setattr(weights, "reads_host_memory", lambda device: True)
    monkeypatch.setattr(execute, "LEAST_BYTES", 64)
    yield
    gc.collect()
    assert not nf4.SOURCES  # nothing outlives its model


def llama(layers: int = LAYERS, device: str = "cpu", nested: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, use_cache=False,
    )  # fmt: skip
    model = in_4bit(LlamaForCausalLM(config).requires_grad_(False), compress_statistics=nested)
    return lora(model, **options).train().to(device)


def ids(batch: int = 2, seq: int = 12, device: str = "cpu") -> torch.Tensor:
    given = torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(1))
    return given.to(device)


def packed(model: Any) -> dict[str, nn.Parameter]:
    """The model's 4-bit weights by name."""
    return {name: p for name, p in model.named_parameters() if getattr(p, "quant_state", None) is not None}


def bytes_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight's bytes on the CPU. Its own `.cpu()` would take the quantization state there as well."""
    return weight.detach().as_subclass(torch.Tensor).cpu()


def addresses(model: Any) -> list[int]:
    return [p.data_ptr() for p in packed(model).values()]


def away(model: Any) -> int:
    """How many of the weights are in host memory."""
    return sum(address in nf4.SOURCES for address in addresses(model))


def planned(model: Any, option: str = "keep", count: int = LAYERS) -> CheckpointPlan:
    facts = facts_of(model, ["lora_linear", "lora_mlp"])
    made = plan(facts, Shape(batch=2, seq=12), 2**40, KNOWN["unknown"], weights=(False,))
    layers = [option] * (facts.layers - 1) + ["keep"]
    return CheckpointPlan.from_dict(
        {**made.to_dict(), "layers": layers, "expanded": 0, "weights_on_host": count}
    )


class Copies:
    """The layers whose bytes were copied to the device, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        load = StreamedWeights._load

        def spy(this: StreamedWeights, index: int) -> None:
            there = [slot.index for slot in this._slots]
            load(this, index)
            if 0 <= index < len(this) and index not in there:
                self.seen.append(index)

        monkeypatch.setattr(StreamedWeights, "_load", spy)

    def take(self) -> list[int]:
        found, self.seen = self.seen, []
        return found


# Which


def test_what_the_kernels_expand_may_move(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(model: Any, **settings: Any) -> list[int]:
        with accelerate(model, **settings):
            return [len(found) for found in movable_weights(model, decoder_layers(model))]

    assert count(llama()) == [7] * LAYERS
    assert count(llama(), kernels="off") == [] == count(llama(), disable={"lora_linear", "lora_mlp"})
    assert count(llama(target_modules=["q_proj", "v_proj"])) == [3] * LAYERS  # k is theirs by the input
    assert count(llama(), disable={"lora_mlp"}) == [7] * LAYERS
    torch.manual_seed(0)
    plain = lora(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=VOCAB)))
    assert count(plain) == []
    model = llama()
    with accelerate(model):
        layers = decoder_layers(model)
        first = next(iter(packed(model).values()))
        first.ds_id = 0
        assert movable_weights(model, layers) == []
        del first.ds_id
        model.register_buffer("shared", first.detach()[:5])
        assert movable_weights(model, layers) == []
        del model.shared
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            assert movable_weights(model, layers) == []
        assert movable_weights(model, layers)
        monkeypatch.setattr(weights, "reads_host_memory", lambda device: device.type == "cuda")
        assert movable_weights(model, layers) == []


@pytest.mark.parametrize("fault", ["bytes", "address", "pinning"])
def test_a_device_that_cannot_read_them_keeps_all(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    acceleration = accelerate(model)
    want = step(model, ids())
    on_device, calls = weights.on_device, iter(range(1000))

    def other(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
        late = next(calls) > 20  # some layers have moved by then
        if late and fault == "address":
            raise RuntimeError("no such address")
        if late and fault == "pinning":
            raise StaysError("host memory can't be pinned")
        return on_device(memory.clone().fill_(1) if late else memory, device)

    monkeypatch.setattr(weights, "on_device", other)
    with pytest.raises(StaysError, match=r"other bytes|no such address|pinned"):
        StreamedWeights(movable_weights(model, decoder_layers(model)))
    calls = iter(range(1000))
    with pytest.warns(UserWarning, match="the layers' weights stay on the device.*more memory than planned"):
        undo = planned(model).apply(model)
    same(step(model, ids()), want)
    assert not nf4.SOURCES
    undo()
    acceleration.undo()


# When


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_has_the_same_bits(option: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(nested=nested)
    acceleration = accelerate(model)
    want, wider = step(model, ids()), step(model, ids(3, 7))
    bytes_ = {name: p.detach().clone() for name, p in packed(model).items()}
    copies = Copies(monkeypatch)
    undo = planned(model, option).apply(model)
    assert away(model) == 7 * LAYERS
    for _ in range(3):
        same(step(model, ids()), want)
    # Each layer comes once for each pass, but for those that are there from the pass before.
    up, down = list(range(2, LAYERS)), list(range(LAYERS - 3, -1, -1))
    assert copies.take() == [0, 1, *up, *down, *up, *down, *up, *down]
    same(step(model, ids(3, 7)), wider)
    assert all(torch.equal(p, bytes_[name]) for name, p in packed(model).items())
    there = addresses(model)
    undo()
    assert not set(addresses(model)) & set(there) and not nf4.SOURCES
    same(step(model, ids()), want)
    acceleration.undo()


@pytest.mark.parametrize("count", [1, 2, 3, 4, LAYERS])
def test_some_layers_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    acceleration = accelerate(model)
    want = step(model, ids())
    chosen = planned(model, "recompute", count)
    assert sum(chosen.streamed) == count
    copies = Copies(monkeypatch)
    undo = chosen.apply(model)
    assert away(model) == 7 * count
    same(step(model, ids()), want)
    same(step(model, ids()), want)
    copied = copies.take()
    assert len(copied) == count + 3 * max(0, count - 2)
    undo()
    acceleration.undo()


def test_other_ways_through_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation, a forward whose loss is dropped, one that raises, micro-batches, a second backward."""
    model = llama()
    acceleration = accelerate(model)
    want, wider = step(model, ids()), step(model, ids(2, 20))
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids(8, 64)).logits
    model.train()
    undo = planned(model, "recompute_mlp").apply(model)
    same(step(model, ids()), want)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids(8, 64)).logits, logits)
    model.train()
    same(step(model, ids(2, 20)), wider)
    model(input_ids=ids(), labels=ids())
    same(step(model, ids()), want)
    layer = decoder_layers(model)[3]

    def fail(*_: Any) -> None:
        raise ValueError("of somebody's")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="somebody"):
        step(model, ids())
    handle.remove()
    same(step(model, ids()), want)
    handle = layer.register_full_backward_pre_hook(fail)
    with pytest.raises(ValueError, match="somebody"):
        step(model, ids())
    handle.remove()
    same(step(model, ids()), want)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(got, 2 * one) for got, one in zip(twice, want[1:], strict=True))
    undo()
    acceleration.undo()


def test_short_forwards_find_them_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    acceleration = accelerate(model)
    want = step(model, ids())
    model.eval()
    text = model.generate(input_ids=ids()[:, :4], max_new_tokens=5, do_sample=False)
    model.train()
    chosen = planned(model)
    undo = chosen.apply(model)
    there = addresses(model)
    same(step(model, ids()), want)
    for _ in range(2):
        assert addresses(model) == there
        model.eval()
        assert torch.equal(model.generate(input_ids=ids()[:, :4], max_new_tokens=5, do_sample=False), text)
        assert not away(model)
        model.train()
        same(step(model, ids()), want)
    assert addresses(model) == there and away(model) == 7 * LAYERS
    undo()
    # No room for them: slower, and as right.
    undo = CheckpointPlan.from_dict({**chosen.to_dict(), "budget_bytes": 1}).apply(model)
    there = addresses(model)
    model.eval()
    with pytest.warns(UserWarning, match="short forwards, as of a generation, are slow"):
        assert torch.equal(model.generate(input_ids=ids()[:, :4], max_new_tokens=5, do_sample=False), text)
    assert addresses(model) == there
    model.train()
    same(step(model, ids()), want)
    undo()
    assert not set(addresses(model)) & set(there)
    acceleration.undo()


def test_forwards_under_inference_mode() -> None:
    """As Lightning validates: weights come and go there as well."""
    model = llama()
    acceleration = accelerate(model)
    want = step(model, ids())
    model.eval()
    with torch.inference_mode():
        short, long = model(input_ids=ids()).logits, model(input_ids=ids(8, 64)).logits
    model.train()
    undo = planned(model).apply(model)
    for given, logits in ((ids(8, 64), long), (ids(), short), (ids(), short), (ids(8, 64), long)):
        model.eval()
        with torch.inference_mode():
            assert torch.equal(model(input_ids=given).logits, logits)
        model.train()
        same(step(model, ids()), want)
        assert away(model) == 7 * LAYERS
    model.eval()
    with torch.inference_mode():
        model(input_ids=ids())
        assert not away(model)
        undo()
    model.train()
    assert not any(p.is_inference() for p in model.parameters())
    same(step(model, ids()), want)
    acceleration.undo()


def test_what_is_written_while_they_are_on_the_device_is_kept() -> None:
    model = llama()
    acceleration = accelerate(model)
    first = step(model, ids())
    weight = list(packed(model).values())[-3]
    undo = planned(model).apply(model)
    same(step(model, ids()), first)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids())
        assert not away(model)
        weight.copy_(weight.flip(0))
    new = weight.detach().clone()
    model.train()
    changed = step(model, ids())
    assert away(model) == 7 * LAYERS and torch.equal(weight, new)
    assert not torch.equal(changed[0], first[0])
    undo()
    assert torch.equal(weight, new)
    same(step(model, ids()), changed)
    acceleration.undo()


def test_what_is_written_in_place_is_noticed() -> None:
    """As load_state_dict() writes."""
    model = llama()
    acceleration = accelerate(model)
    first = step(model, ids())
    weight = list(packed(model).values())[-3]
    old = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    want = step(model, ids())
    assert not torch.equal(first[0], want[0])
    with torch.no_grad():
        weight.copy_(old)
    undo = planned(model).apply(model)
    same(step(model, ids()), first)
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    same(step(model, ids()), want)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        weight.copy_(old)
    same(step(model, ids()), first)
    model.load_state_dict(state, strict=False)
    same(step(model, ids()), want)
    undo()
    same(step(model, ids()), want)
    acceleration.undo()


def test_copies_and_files_hold_their_own(tmp_path: Any) -> None:
    model = llama()
    acceleration = accelerate(model)
    before = {name: p.detach().clone() for name, p in packed(model).items()}
    undo = planned(model).apply(model)
    step(model, ids())
    keys = list(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert list(loaded) == keys and all(torch.equal(loaded[name], t) for name, t in before.items())
    storages = [p.untyped_storage().data_ptr() for p in packed(model).values()]
    assert len(set(storages)) == len(storages)  # safetensors asks for that
    from safetensors.torch import load_file, save_file

    save_file({name: p.detach() for name, p in packed(model).items()}, tmp_path / "packed.safetensors")
    loaded = load_file(tmp_path / "packed.safetensors")
    assert all(torch.equal(loaded[name], t) for name, t in before.items())
    clone = copy.deepcopy(model)
    assert not set(addresses(clone)) & set(addresses(model))
    assert all(torch.equal(p, before[name]) for name, p in packed(clone).items())
    undo()
    acceleration.undo()


def test_what_somebody_has_put_there_since_stays() -> None:
    model = llama()
    acceleration = accelerate(model)
    undo = planned(model).apply(model)
    weight = list(packed(model).values())[3]
    theirs = weight.data = torch.ones_like(weight.data)
    want = step(model, ids())
    undo()
    assert weight.data_ptr() == theirs.data_ptr()
    same(step(model, ids()), want)
    acceleration.undo()


def test_memory_lives_as_long_as_its_model() -> None:
    model = llama()
    accelerate(model)
    planned(model).apply(model)
    step(model, ids())
    assert nf4.SOURCES
    memory = weakref.ref(next(iter(packed(model).values())).untyped_storage())
    del model
    gc.collect()
    assert memory() is None and not nf4.SOURCES


def test_no_room_to_bring_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    acceleration = accelerate(model)
    want = step(model, ids())
    streamed = StreamedWeights(movable_weights(model, decoder_layers(model)))
    there, empty, calls = addresses(model), torch.empty, iter(range(1000))

    def full(*sizes: Any, **options: Any) -> Any:
        if next(calls) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*sizes, **options)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="weights stay in host memory"):
        patch.setattr(torch, "empty", full)
        assert not streamed.restore()
    assert addresses(model) == there
    same(step(model, ids()), want)
    assert streamed.restore() and not set(addresses(model)) & set(there)
    same(step(model, ids()), want)
    acceleration.undo()


# Budgets


def budgets(model: Any) -> tuple[int, int]:
    """The smallest at 2 x 12 with the weights in host memory, and without."""
    facts = facts_of(model, ["lora_linear", "lora_mlp"])
    shape, rates = Shape(batch=2, seq=12), KNOWN["unknown"]
    found = [smallest_budget_bytes(facts, shape, rates, weights=w) for w in ((False, True), (False,))]
    return found[0], found[1]


def test_a_budget_moves_them() -> None:
    model = llama(layers=8)
    with accelerate(model):
        want, wider = step(model, ids()), step(model, ids(2, 30))
        least, stay = budgets(model)
        facts = facts_of(model, ["lora_linear", "lora_mlp"])
        assert facts.packed_bytes == sum(p.numel() for p in packed(model).values()) // 8
        assert fixed_bytes(facts) - fixed_bytes(facts, False, 8) == 6 * facts.packed_bytes
    assert least < stay
    with accelerate(model, memory_budget_bytes=(least + stay) // 2) as acceleration:
        record = acceleration.report.checkpointing
        same(step(model, ids()), want)
        count = record["plan"]["weights_on_host"]
        assert count > 2 and f"weights of {count} in host memory" in record["chosen"]
        assert away(model) == 7 * count
        same(step(model, ids()), want)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same(step(model, ids(2, 30)), wider)
        assert record["plans"] == 2
    assert not nf4.SOURCES
    with accelerate(model):
        same(step(model, ids()), want)


def test_a_budget_is_planned_without_them_where_they_cannot_move(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(layers=8)
    with accelerate(model):
        want = step(model, ids())
        least, stay = budgets(model)

    def fail(*_: Any) -> Any:
        raise ValueError("odd")

    monkeypatch.setattr(weights, "on_device", fail)
    monkeypatch.setattr(host, "on_device", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sloth.accelerate(model, memory_budget_bytes=(least + stay) // 2) as acceleration:
            before = addresses(model)
            same(step(model, ids()), want)
            record = acceleration.report.checkpointing
            assert addresses(model) == before and not record["plan"]["weights_on_host"]
            assert "the layers' weights stay on the device" in record["note"]
    assert any("need at least" in str(w.message) for w in caught)


def test_long_forwards_that_no_kernel_serves_find_them_on_the_device() -> None:
    """As an evaluation without the autocast of the training: its second batch need not wait."""
    model = llama()
    acceleration = accelerate(model)
    want = step(model, ids())
    undo = planned(model).apply(model)
    given = ids(8, 64)

    def evaluate() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=given).logits
        model.train()
        return logits

    same(step(model, ids()), want)
    served = evaluate()
    assert torch.equal(evaluate(), served) and away(model)  # by the kernels
    linears = [m for m in model.modules() if hasattr(m, "compute_dtype")]
    before = [(m, m.compute_dtype) for m in linears]
    same(step(model, ids()), want)
    for module in linears:
        module.compute_dtype = torch.bfloat16
    first = evaluate()
    assert away(model) == 7 * LAYERS
    assert torch.equal(evaluate(), first) and not away(model)
    for module, dtype in before:
        module.compute_dtype = dtype
    same(step(model, ids()), want)
    assert away(model) == 7 * LAYERS and torch.equal(evaluate(), served)
    undo()
    acceleration.undo()


@pytest.mark.parametrize("budget", [True, False])
def test_weights_that_no_kernel_reads_come_back(budget: bool) -> None:
    """As where a layer's compute dtype is not the one in which it is called, so that PEFT serves it."""
    model = llama(layers=8)
    with accelerate(model):
        least, stay = budgets(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_type_is_set, module.compute_dtype = True, torch.bfloat16
    with accelerate(model):
        want = step(model, ids())
    settings: Any = {"memory_budget_bytes": (least + stay) // 2} if budget else {}
    with accelerate(model, **settings) as acceleration:
        undo = None if budget else planned(model, count=8).apply(model)
        for _ in range(2):
            same(step(model, ids()), want)
            assert away(model)
        with pytest.warns(UserWarning, match="the kernels did not read them") as caught:
            same(step(model, ids()), want)
            same(step(model, ids()), want)
        assert not away(model) and not nf4.SOURCES
        assert sum("did not read" in str(w.message) for w in caught) == 1
        if undo is None:
            record = acceleration.report.checkpointing
            assert record["plans"] == 2 and not record["plan"]["weights_on_host"]
            assert "the kernels did not read them" in record["note"]
        else:
            undo()


def test_a_peak_from_before_weights_have_moved_is_not_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    model, peak = llama(layers=8), [1000]
    with accelerate(model):
        least, stay = budgets(model)
    monkeypatch.setattr(execute, "peak_bytes", lambda device: peak[0])
    with accelerate(model, memory_budget_bytes=(least + stay) // 2) as acceleration:
        step(model, ids())
        text = str(acceleration.report)
        assert "measured_peak_bytes" not in acceleration.report.checkpointing
        assert "measured less than the 0.00 GiB before weights were moved" in " ".join(text.split())
        for peak[0] in (2000, 500):  # a step took more; somebody began to count anew
            step(model, ids())
            assert acceleration.report.checkpointing["measured_peak_bytes"] == peak[0]
            assert "measured less" not in str(acceleration.report)


@pytest.mark.gpu
@pytest.mark.parametrize("option", OPTIONS)
def test_on_a_gpu(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes on the device, the same bits in every step, also while it is busy elsewhere."""
    monkeypatch.undo()
    monkeypatch.setattr(execute, "LEAST_BYTES", 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=8, hidden_size=512, intermediate_size=2048, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=VOCAB, use_cache=False,
    )  # fmt: skip
    bare = in_4bit(LlamaForCausalLM(config).requires_grad_(False), compute_dtype=torch.bfloat16)
    model = lora(bare, r=8).train().to("cuda")
    for p in model.parameters():
        if getattr(p, "quant_state", None) is None and not p.requires_grad:
            p.data = p.data.bfloat16()
    acceleration = accelerate(model)

    def run(given: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return step(model, given)

    batches = [ids(2, 64 + 8 * i, "cuda") for i in range(4)]
    want = [run(given) for given in batches]
    before = {name: bytes_of(p) for name, p in packed(model).items()}
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    undo = planned(model, option, 8).apply(model)
    size = sum(p.numel() for p in packed(model).values())
    assert torch.cuda.memory_allocated() <= allocated - size * 6 // 8 + 2**20
    noise = torch.randn(4096, 4096, device="cuda")
    for _ in range(4):
        for given, one in zip(batches, want, strict=True):
            same(run(given), one)
            noise @ noise
    assert all(p.is_cuda and torch.equal(bytes_of(p), before[name]) for name, p in packed(model).items())
    assert all(torch.equal(bytes_of(p.detach().clone()), before[name]) for name, p in packed(model).items())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu")
    assert all(torch.equal(loaded[name], t) for name, t in before.items())
    model.eval()
    short = model.generate(input_ids=batches[0][:, :4], max_new_tokens=4, do_sample=False)
    model.train()
    same(run(batches[0]), want[0])
    undo()
    model.zero_grad(set_to_none=True)
    assert abs(torch.cuda.memory_allocated() - allocated) < 2**22
    model.eval()
    assert torch.equal(model.generate(input_ids=batches[0][:, :4], max_new_tokens=4, do_sample=False), short)
    model.train()
    same(run(batches[1]), want[1])
    assert all(torch.equal(bytes_of(p), before[name]) for name, p in packed(model).items())
    acceleration.undo()
