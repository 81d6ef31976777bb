"""The cost model against measured figures and autograd, the planner against brute force, rates and files."""

import functools
import itertools
import json
import math
import random
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sloth_plugins import cli
from sloth_plugins.checkpointing import execute
from sloth_plugins.checkpointing import plan as planner
from sloth_plugins.checkpointing.facts import CLASSES, PROJECTIONS, ModelFacts, Shape
from sloth_plugins.checkpointing.plan import (
    OPTIONS,
    TILES,
    CheckpointPlan,
    costs,
    fixed_bytes,
    plan,
    smallest_budget_bytes,
)
from sloth_plugins.checkpointing.rates import KNOWN, Rates, cache_path, measure_rates, rates_for
from sloth_plugins.checkpointing.streams import simulated

LLAMA_8B: dict[str, Any] = {
    "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336,
    "vocab": 128256,
}  # fmt: skip
QLORA = {"weights": "nf4_double"}
STAYS = {**QLORA, "embedding_bytes": 0}
"""QLoRA with input embeddings that can't leave the device."""
PLAIN = {**QLORA, "stream_bytes": 4, "fused": False, "fused_head": False}
H200 = KNOWN["h200"]


def llama_8b(**changes: Any) -> ModelFacts:
    return ModelFacts(**{**LLAMA_8B, **changes})


# torch.cuda.max_memory_allocated and the median step on one H200 (benchmarks/results).
@pytest.mark.parametrize(
    ("changes", "batch", "seq", "base_gib", "peak_gib", "step_ms"),
    [
        ({**QLORA, "head_processors": 132}, 2, 2048, 5.53, 19.89, 239.0),
        ({**QLORA, "head_processors": 132}, 1, 8192, 5.53, 33.59, 553.7),
        ({**QLORA, "head_processors": 132}, 8, 2048, 5.53, 60.99, 918.2),
        # With an earlier version.
        ({**QLORA, "rank": 64}, 2, 2048, 6.00, 21.63, 248.0),
        ({}, 2, 2048, 15.18, 29.62, 241.5),
        (PLAIN, 2, 2048, 7.42, 50.77, 465.3),
    ],
)
def test_predictions_agree_with_a_measured_step(
    changes: Any, batch: int, seq: int, base_gib: float, peak_gib: float, step_ms: float
) -> None:
    facts = llama_8b(**changes)
    made = plan(facts, Shape(batch=batch, seq=seq), 2**40, H200, expanded=0)
    assert set(made.layers) == {"keep"}
    assert facts.weights_bytes / 2**30 == pytest.approx(base_gib, rel=0.02)
    assert made.peak_bytes / 2**30 == pytest.approx(peak_gib, rel=0.02)
    assert made.step_s * 1e3 == pytest.approx(step_ms, rel=0.15)


def test_what_a_head_takes_is_known_where_it_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen, on a GPU, in the activations' dtype; else the most is counted."""
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def processors(**changes: Any) -> int | None:
        size = changes.pop("size", 2)
        found = {"requires_grad": False, "is_cuda": True, "device": "cuda:0", "element_size": lambda: size}
        weight = types.SimpleNamespace(**{**found, **changes})
        head = types.SimpleNamespace(parameters=lambda: [weight])
        model: Any = types.SimpleNamespace(get_output_embeddings=lambda: head)
        return execute._head_processors(model, 2)

    assert processors() == 132
    assert processors(requires_grad=True) is None and processors(is_cuda=False) is None
    assert processors(size=4) is None and processors(quant_state=None) is None
    assert execute._head_processors(torch.nn.Linear(2, 2), 2) is None
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    assert facts.replace(head_processors=132).head_bytes(shape) < facts.head_bytes(shape)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_layers_bytes_are_what_autograd_saves(rank: int) -> None:
    """In plain float32, two layers against four: what each adds."""
    shape, found = Shape(batch=2, seq=16), []
    for layers in (2, 4):
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=64, intermediate_size=160, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=64, use_cache=False,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        if rank:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
        storages: dict[int, Any] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Any, storages: Any = storages, weights: Any = weights) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(input_ids=torch.zeros(2, 16, dtype=torch.long))
        found.append(sum(storage.nbytes() for storage in storages.values()))
        del out
        facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    measured = (found[1] - found[0]) / 2
    assert facts.rank == rank and facts.weights == "32bit" and facts.activation_bytes == 4
    assert sum(facts.saved_bytes(shape).values()) == pytest.approx(measured, rel=0.03)


def test_facts_of_a_model_are_those_of_its_config() -> None:
    with torch.device("meta"):
        config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=160, vocab_size=96)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    facts = ModelFacts.from_model(model)
    same = ModelFacts.from_config(config, rank=0)
    assert facts.replace(resident_bytes=None, embedding_bytes=None, packed_bytes=None) == same
    assert facts.embedding_bytes == same.movable_bytes == 0  # trained
    assert facts.packed_bytes == same.layer_movable_bytes == 0
    assert facts.resident_bytes == sum(2 * p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=r"'mixtral': the memory of expert layers"):
        from transformers import MixtralConfig

        ModelFacts.from_config(MixtralConfig())
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        ModelFacts.from_config(object())
    with pytest.raises(ValueError, match=r"rank=0 with weights='nf4'"):
        llama_8b(rank=0, weights="nf4")
    with pytest.raises(ValueError, match="seq=0"):
        Shape(batch=1, seq=0)


# The planner


# What of an 8B layer's weights is packed in 4 bits.
PACKED = (4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14336) // 2


def fixed_by_hand(facts: ModelFacts, way: Any) -> int:
    """What is there all the time: weights in host memory are not, but for places for those of two layers."""
    return fixed_bytes(facts) - way[2] * facts.movable_bytes - max(0, way[3] - 2) * PACKED


def by_hand(layers: tuple[str, ...], facts: ModelFacts, shape: Shape, way: Any, lead: int) -> int:
    """The peak of a plan, layer by layer."""
    return fixed_by_hand(facts, way) + above(layers, facts, shape, way[0], way[1], lead)[0]


@functools.cache
def options_of(facts: ModelFacts, shape: Shape, tiles: int, norms: bool) -> dict[str, Any]:
    return costs(facts, shape, H200, tiles, norms).options


def above(
    layers: tuple[str, ...], facts: ModelFacts, shape: Shape, tiles: int, norms: bool, lead: int
) -> tuple[int, list[int]]:
    """The peak of a plan above what is there all the time; how much below it each layer's forward is without
    others' copies."""
    options = options_of(facts, shape, tiles, norms)
    leaves = [options[name].host_bytes for name in layers]
    away = [index for index, size in enumerate(leaves) if size]
    n, held, rows, alone = len(layers), facts.shared_bytes(shape), [facts.gradient_bytes], []
    rows[0] += held
    for index, name in enumerate(layers):
        alone.append(held + options[name].kept_bytes + leaves[index])
        alone[-1] += options[name].forward_bytes + shape.tokens * facts.hidden * facts.stream_bytes
        rows.append(alone[-1] + sum(leaves[i] for i in under_way(leaves, index)))
        held += options[name].kept_bytes
    rows.append(held + facts.ends_bytes(shape) + facts.head_bytes(shape))
    work, done = facts.workspace_bytes(shape, tiles, norms), 0
    work += 0 if facts.fused_mlp else facts.ends_bytes(shape)
    for index, name in reversed([*enumerate(layers)]):
        coming = [leaves[i] for i in away if i < index and index <= away[-1] + lead][-1:]
        rows.append(held + options[name].passing_bytes + work + done + sum(coming))
        held -= options[name].kept_bytes
        done += facts.gradient_bytes // n
    return max(rows), [max(rows) - size for size in alone]


def under_way(leaves: list[int], index: int, room: int = 0) -> list[int]:
    """Whose copies may be under way when a layer begins: with its own, the bytes of two of the largest, or
    those for which there is room; of 8 layers at most."""
    n, away = len(leaves), [i for i, size in enumerate(leaves) if size]
    most = n - 1 - index if away and index > min(away[-1], n - 2) else 8
    found: list[int] = []
    for i in reversed([i for i in away if i < index]):
        size = sum(leaves[j] for j in (*found, i))
        if len(found) == min(most, 8) or size > max(room, 2 * max(leaves) - leaves[index]):
            break
        found.append(i)
    return found


def followed(
    layers: tuple[str, ...], cost: Any, rates: Rates, room: list[int], lead: int, streamed: int
) -> float:
    """The seconds of a step that layers and copies take, one by one."""
    options, n = cost.options, len(layers)
    leaves = [options[name].host_bytes for name in layers]
    away = [index for index, size in enumerate(leaves) if size]
    whole, mlp_less = (options[name].host_bytes for name in ("offload", "recompute_mlp_offload"))
    # The weights of `streamed` layers, evenly from the end on, take turns in two places.
    come = [index for index in range(n) if (index + 1) * streamed // n > index * streamed // n]
    assert len(come) == streamed
    a_copy = PACKED / rates.from_host_gb_s / 1e9
    now = link = there = 0.0
    out: dict[int, float] = {}
    expanded: dict[int, float] = {}
    for index, size in enumerate(leaves):
        here = under_way(leaves, index, room[index])
        now = max([now, *(out[i] for i in away if i < index and i not in here)])
        if index in come:
            if index in come[2:]:  # with 0.85 of the rate, since others leave at the same time
                there = max(there, expanded[come[come.index(index) - 2]]) + a_copy / 0.85
                now = max(now, there)
            expanded[index] = now + 0.75 * cost.forward_s
        if size:
            link = max(link, now + cost.forward_s / 4) + size / rates.to_host_gb_s / 1e9
            link = out[index] = max(link, now + cost.forward_s)
        now += cost.forward_s
    now = max(now, link) + cost.rest_s
    front: dict[int, float] = {}
    back: dict[int, float] = {}
    weights: dict[int, float] = {}
    there = 0.0
    for index, name in reversed([*enumerate(layers)]):
        comes = [index, *[i for i in away if i < index][-1:]] if index in away else []
        if away and index == min(away[-1] + lead, n - 1):
            comes = [away[-1], *comes]
        for i in comes:
            if i not in back:
                first = (whole - mlp_less) / whole if layers[i] == "offload" else 1
                begin, takes = max(link, now), leaves[i] / rates.from_host_gb_s / 1e9
                front[i], back[i] = begin + first * takes, begin + takes
                link = back[i]
        now = max(now, front.get(index, 0), weights.get(index, 0))
        run = cost.backward_s + cost.tiled_s + options[name].recompute_s
        now += run
        if index in away:
            now = max(now, back[index] + 0.35 * run)
        if index in come[2:]:  # ahead of all that is still to come of tensors
            there = weights[come[come.index(index) - 2]] = max(there, now) + a_copy
            link = max(link, now) + a_copy
            for times in (front, back):
                times |= {i: time + a_copy for i, time in times.items() if time > now}
    return now - n * (cost.forward_s + cost.backward_s) - cost.rest_s


def arranged(counts: dict[str, int], gap: int) -> tuple[str, ...]:
    """Counts as layers: offloaded ones evenly, the smaller ones of them evenly, from the first on; the last
    `gap` are none of them."""
    n, both = sum(counts.values()), counts["recompute_mlp_offload"] + counts["offload"]
    order = ("recompute_offload", "recompute", "recompute_mlp", "keep")
    layers = [name for name in order for _ in range(counts[name])]
    smaller = counts["recompute_mlp_offload"]
    for index in range(both):
        before, until = (-(-k * smaller // both) for k in (index, index + 1))
        at = index * (n - gap) // both
        layers.insert(at, "recompute_mlp_offload" if until > before else "offload")
    return tuple(layers)


def all_counts(layers: int, kinds: int) -> list[tuple[int, ...]]:
    """All ways to share `layers` out among kinds."""
    if kinds == 1:
        return [(layers,)]
    return [(k, *rest) for k in range(layers + 1) for rest in all_counts(layers - k, kinds - 1)]


@functools.cache
def all_plans(facts: ModelFacts, shape: Shape, allow: tuple[str, ...], most_tiles: int) -> list[Any]:
    """(way without weights, (gap, lead), layers, bytes above those of all the time, room of each) of every
    plan."""
    n, found = facts.layers, []
    most = max(1, n // 8)
    ends = [(0, 1), *itertools.product(range(1, most + 1), repeat=2)]
    tiles = [m for m in TILES if shape.tokens >= m * 512 and m <= most_tiles]
    for numbers in all_counts(n, len(allow)):
        counts = dict.fromkeys(OPTIONS, 0) | dict(zip(allow, numbers, strict=True))
        away = counts["offload"] + counts["recompute_mlp_offload"]
        of_mlps = counts["recompute_mlp"] + counts["recompute_mlp_offload"]
        for gap, lead in ends:
            if away > n - max(1, gap) or (gap and not away):
                continue
            layers = arranged(counts, gap)
            for m, norms in itertools.product(tiles if not of_mlps else [1], (False, True)):
                found.append(((m, norms), (gap, lead), layers, *above(layers, facts, shape, m, norms, lead)))
    return found


def at_the_end(layers: tuple[str, ...], cost: Any, rates: Rates) -> tuple[int, int]:
    """Of how many layers at the end none is offloaded, so that the last copy has left before the forward is
    over; how many layers behind the last offloaded one its copy back begins. An eighth of all at most."""
    away = ("offload", "recompute_mlp_offload", "recompute_offload")
    size, least = (cost.options[next(name for name in away if name in layers)].host_bytes,) * 2
    if "offload" in layers:
        least = size - cost.options["recompute_mlp_offload"].host_bytes
    gap = size / rates.to_host_gb_s / 1e9 / cost.forward_s
    lead = least / rates.from_host_gb_s / 1e9 / (cost.backward_s + cost.tiled_s)
    most = max(1, len(layers) // 8)
    return min(math.ceil(gap), most), min(max(1, math.ceil(lead)), most)


@functools.cache
def by_time(
    facts: ModelFacts, shape: Shape, rates: Rates, allow: tuple[str, ...], most_tiles: int
) -> list[Any]:
    """(recomputation and waiting at least, the budget that it needs, ...) of every plan, by the module's
    formulas; the fastest first."""
    n, found = facts.layers, []
    cost_of = {way: costs(facts, shape, rates, *way) for way in itertools.product(TILES, (False, True))}
    weights = sorted({0, *(w for w in (round(n / 2), n) if w > 2)})
    for way, end, layers, peak, room in all_plans(facts, shape, allow, most_tiles):
        cost = cost_of[way]
        o = cost.options
        if end != (0, 1) and end != at_the_end(layers, cost, rates):
            continue
        again = n * cost.tiled_s + sum(o[name].recompute_s for name in layers)
        copied = sum(o[name].host_bytes for name in layers) / 1e9
        behind = end[1] * (cost.backward_s + cost.tiled_s) if layers.count("recompute_offload") < n else 0
        first = max(o[name].host_bytes for name in layers)
        if "offload" in layers:  # of all of it, what is wanted first
            first -= o["recompute_mlp_offload"].host_bytes
        first_late = max(0.0, first / rates.from_host_gb_s / 1e9 - behind)
        wholes = layers.count("recompute") + layers.count("recompute_offload")
        launches = n * cost.host_backward_s + wholes * cost.host_again_s
        waits = max(0.0, n * (cost.host_forward_s - cost.forward_s))
        waits += max(0.0, launches - n * cost.backward_s - again)
        margin = math.ceil(peak * planner.MARGIN)
        for on_host, streamed in itertools.product((False, True), weights):
            weights_s = max(0, streamed - 2) * PACKED / rates.from_host_gb_s / 1e9
            late = max(0.0, copied / rates.to_host_gb_s - cost.forward_s * (n - 1))
            late = max(late, weights_s - n * cost.forward_s)
            back = (n * cost.backward_s + again) * (n - 1) / n
            late += max(0.0, copied / rates.from_host_gb_s + weights_s - back) + first_late
            read = on_host * facts.movable_bytes / facts.vocab * shape.tokens / rates.from_host_gb_s / 1e9
            late = max(late + read, waits)
            need = fixed_by_hand(facts, (*way, on_host, streamed)) + peak + margin
            found.append((again + late, need, read, layers, cost, room, end[1], streamed))
    return sorted(found, key=lambda row: row[0])


def brute_force(
    facts: ModelFacts,
    shape: Shape,
    budget: int,
    rates: Rates,
    allow: tuple[str, ...] = OPTIONS,
    most_tiles: int = 64,
) -> float | None:
    """The shortest recomputation and waiting of all plans, one by one."""
    best = None
    for least, need, read, layers, cost, room, lead, streamed in by_time(
        facts, shape, rates, allow, most_tiles
    ):
        if best is not None and least >= best:
            break
        if need <= budget:
            seconds = max(least, followed(layers, cost, rates, room, lead, streamed) + read)
            best = seconds if best is None else min(best, seconds)
    return best


@pytest.mark.parametrize("gpu", ["h200", "4090", "t4"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize(("layers", "vocab"), [(1, 1000), (2, 1000), (6, 1000), (5, 64_000)])
def test_no_plan_is_faster(
    gpu: str, share: float, layers: int, vocab: int, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With embeddings that are small, and those that are as large as some layers; rough: as of many layers,
    for which bounds are found first."""
    if rough:
        monkeypatch.setattr(planner, "LEAST_ROUGH", 0)
        monkeypatch.setattr(planner, "FEW_LAYERS", 1)
    facts, shape = llama_8b(layers=layers, vocab=vocab, **QLORA), Shape(batch=2, seq=4096)
    least = smallest_budget_bytes(facts, shape, KNOWN[gpu])
    most = plan(facts, shape, 2**40, KNOWN[gpu])
    budget = int(least + share * (most.peak_bytes + most.margin_bytes - least))
    made = plan(facts, shape, budget, KNOWN[gpu])
    assert made.peak_bytes + made.margin_bytes <= budget
    assert made.peak_bytes - made.expanded_bytes == by_hand(made.layers, facts, shape, made._way, made.lead)
    want = brute_force(facts, shape, budget, KNOWN[gpu])
    assert made.recompute_s + made.stall_s == pytest.approx(want, rel=1e-9, abs=1e-12)
    if share == 0.01:
        assert brute_force(facts, shape, least - 1, KNOWN[gpu]) is None
        assert brute_force(facts, shape, least, KNOWN[gpu]) is not None
    assert made == plan(facts, shape, budget, KNOWN[gpu])


SLOW_LINK = Rates(**{**H200.to_dict(), "to_host_gb_s": 20, "from_host_gb_s": 20})


@pytest.mark.parametrize(
    "rates", [H200, KNOWN["4090"], KNOWN["t4"], SLOW_LINK], ids=lambda r: f"{r.to_host_gb_s}"
)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.3, 0.5])
def test_no_plan_of_more_layers_is_faster(rates: Rates, share: float) -> None:
    """Of those that may leave two layers at the end, and start the first copy back two layers ahead."""
    facts, shape = llama_8b(layers=16, vocab=1000, **QLORA), Shape(batch=2, seq=4096)
    allow = ("keep", "recompute", "recompute_mlp_offload", "offload")
    chosen: dict[str, Any] = {"allow": allow, "tiles": (1,)}
    least = smallest_budget_bytes(facts, shape, rates, **chosen)
    most = plan(facts, shape, 2**40, rates, **chosen)
    budget = int(least + share * (most.peak_bytes + most.margin_bytes - least))
    made = plan(facts, shape, budget, rates, **chosen)
    assert made.peak_bytes == by_hand(made.layers, facts, shape, made._way, made.lead)
    want = brute_force(facts, shape, budget, rates, allow, 1)
    assert made.recompute_s + made.stall_s == pytest.approx(want, rel=1e-9, abs=1e-12)
    if share == 0.01:
        assert brute_force(facts, shape, least - 1, rates, allow, 1) is None


@pytest.mark.parametrize("gbs", [55.0, 25.0, 12.0, 2.0])
def test_streams_are_followed_as_by_hand(gbs: float) -> None:
    """Of any layers, also where a layer's weights take longer than the layer, and one waits for the other."""
    facts, shape = llama_8b(layers=16, **QLORA), Shape(batch=1, seq=2048)
    rates = Rates(**{**H200.to_dict(), "to_host_gb_s": gbs, "from_host_gb_s": gbs})
    chance, some = random.Random(0), []
    for _ in range(50):
        few = chance.sample(OPTIONS, chance.randint(1, 3))
        some.append((*chance.choices(few, k=15), "keep"))
    for streamed, lead in itertools.product((0, 8, 16), (1, 2)):
        way = planner._Way(1, False, False, streamed)
        search = planner._Search(facts, shape, rates, None, way)
        codes = torch.tensor([[OPTIONS.index(name) for name in layers] for layers in some])
        leads = torch.full((len(some),), lead)
        found = simulated(search.lanes, codes, search.memory.in_flight(codes, leads), leads)
        cost = search.cost
        for layers, seconds in zip(some, found.tolist(), strict=True):
            _, room = above(layers, facts, shape, 1, False, lead)
            more = seconds - 16 * (cost.forward_s + cost.backward_s) - cost.rest_s
            want = followed(layers, cost, rates, room, lead, streamed)
            assert more == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("gpu", ["h200", "4090"])
@pytest.mark.parametrize("changes", [QLORA, {}, PLAIN, {"rank": 0}], ids=["qlora", "lora", "plain", "full"])
def test_the_timeline_has_the_peak(gpu: str, changes: dict[str, Any]) -> None:
    facts, shape = llama_8b(**changes), Shape(batch=2, seq=4096)
    least = smallest_budget_bytes(facts, shape, KNOWN[gpu])
    for more_gib in (0, 1, 3, 6, 12, 20):
        made = plan(facts, shape, least + more_gib * 2**30, KNOWN[gpu])
        assert made.peak_bytes == max(size for _, size in made.timeline())
        assert made.peak_bytes - made.expanded_bytes == by_hand(
            made.layers, facts, shape, made._way, made.lead
        )
        assert sum(made.memory().values()) == made.peak_bytes + made.margin_bytes
        assert all(size >= 0 for size in made.memory().values())


def test_more_memory_is_never_slower_and_all_of_it_recomputes_nothing() -> None:
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    made = [plan(facts, shape, gib * 2**30, H200) for gib in (8, 9, 10, 12, 16, 20, 21)]
    steps = [m.step_s for m in made]
    assert steps == sorted(steps, reverse=True) and made[-1].recompute_s == made[-1].stall_s == 0
    assert made[0].layers[-1] == "keep"  # what is freed first


def test_arithmetic_on_slower_cards_changes_the_plan() -> None:
    """An H200 computes too fast for its link: a third is offloaded. An RTX 4090 offloads most, a T4
    recomputes nothing; with a link a thousand times slower nobody offloads."""
    facts, shape, budget = llama_8b(**QLORA), Shape(batch=2, seq=2048), 10 * 2**30
    of = {
        gpu: plan(facts, shape, budget, KNOWN[gpu], weights=(False,)).layers
        for gpu in ("h200", "4090", "a10", "t4")
    }
    assert 8 <= of["h200"].count("offload") <= 14 and sum("recompute" in x for x in of["h200"]) > 8
    for gpu in ("4090", "a10", "t4"):
        assert of[gpu].count("offload") > 21
    assert set(of["t4"]) == set(of["a10"]) == {"keep", "offload"}
    slow = Rates(**{**H200.to_dict(), "to_host_gb_s": 0.05, "from_host_gb_s": 0.05})
    assert not any("offload" in name for name in plan(facts, shape, budget, slow).layers)


def test_embeddings_are_in_host_memory_where_the_step_gets_faster_or_only_then_fits() -> None:
    """2 x 2048 tokens of an 8B model: 1002 MiB less on the device for 0.6 ms."""
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    moved, read = 128256 * 4096 * 2, 4096 * 4096 * 2
    assert facts.movable_bytes == moved and facts.embedding_read_bytes(shape) == read
    made = plan(facts, shape, 7 * 2**30, H200, weights=(False,))
    assert made.embeddings_on_host and "embeddings in host memory" in str(made)
    stay = plan(facts, shape, 7 * 2**30, H200, embeddings=(False,), weights=(False,))
    assert stay == plan(llama_8b(**STAYS), shape, 7 * 2**30, H200, weights=(False,)).__class__(
        **{**vars(stay), "facts": stay.facts}
    )
    assert not stay.embeddings_on_host and made.step_s < stay.step_s
    # As a budget with as much more, but for the time of the rows.
    more = plan(llama_8b(**STAYS), shape, 7 * 2**30 + moved, H200, weights=(False,))
    assert made.layers == more.layers and made.peak_bytes == more.peak_bytes - moved
    assert made.step_s - more.step_s == pytest.approx(read / H200.from_host_gb_s / 1e9, rel=1e-6)
    assert made.host_bytes == more.host_bytes + moved
    assert made.memory()["weights"] == stay.memory()["weights"] - moved
    assert made.timeline()[-1][1] == stay.timeline()[-1][1] - moved
    assert CheckpointPlan.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="embeddings_on_host=1: allowed are true and false"):
        CheckpointPlan.from_dict({**made.to_dict(), "embeddings_on_host": 1})
    # Where all is kept anyway they stay, also where the link is so slow that it does not pay.
    assert not plan(facts, shape, 2**40, H200).embeddings_on_host
    slow = Rates(**{**H200.to_dict(), "from_host_gb_s": 0.1, "to_host_gb_s": 0.1})
    assert not plan(facts, shape, 12 * 2**30, slow).embeddings_on_host
    assert plan(facts, shape, 12 * 2**30, H200).embeddings_on_host
    assert plan(facts, shape, smallest_budget_bytes(facts, shape, slow), slow).embeddings_on_host
    # They count as host memory.
    assert not plan(facts, shape, 7 * 2**30, H200, host_bytes=moved - 1).embeddings_on_host
    with pytest.raises(ValueError, match=r"embeddings=\(True,\): allowed are False"):
        plan(facts, shape, 7 * 2**30, H200, embeddings=(True,))
    for changes in ({"tied": True}, {"embedding_bytes": 0}):
        assert not llama_8b(**{**QLORA, **changes}).movable_bytes
    assert not llama_8b(rank=0).movable_bytes and llama_8b(**PLAIN).movable_bytes == 2 * moved


def test_the_smallest_budget_counts_with_embeddings_in_host_memory() -> None:
    facts, shape, stays = llama_8b(**QLORA), Shape(batch=2, seq=2048), {"weights": (False,)}
    least, stay = (smallest_budget_bytes(llama_8b(**kind), shape, H200, **stays) for kind in (QLORA, STAYS))
    assert least == stay - facts.movable_bytes
    assert smallest_budget_bytes(facts, shape, H200, embeddings=(False,), **stays) == stay
    with pytest.raises(ValueError, match=r"at least .* of which weights take 4\.5") as error:
        plan(facts, shape, least - 2**20, H200, **stays)
    assert f"{-(-least // 2**20)} MiB" in str(error.value)
    none_left = smallest_budget_bytes(facts, shape, H200, host_bytes=0)
    assert none_left > stay and not plan(facts, shape, none_left, H200, host_bytes=0).embeddings_on_host


def test_the_smallest_budget_counts_with_weights_in_host_memory() -> None:
    """Those of 30 of 32 layers, since places for two are on the device, are 3120 MiB of an 8B model."""
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    assert facts.layer_movable_bytes == PACKED and 30 * PACKED == 3120 * 2**20
    least, stay = (
        smallest_budget_bytes(facts, shape, H200, weights=given) for given in ((False, True), (False,))
    )
    assert least == stay - 30 * PACKED
    assert fixed_bytes(facts, True, 32) == fixed_bytes(facts) - facts.movable_bytes - 30 * PACKED
    made = plan(facts, shape, least, H200)
    assert made.weights_on_host == 32 and all(made.streamed) and made.embeddings_on_host
    assert "weights of 32 in host memory" in str(made)
    assert made.memory()["weights"] == facts.weights_bytes - facts.movable_bytes - 30 * PACKED
    assert made.timeline()[-1][1] == made.moved_bytes * -1 + fixed_bytes(facts) + facts.gradient_bytes + (
        facts.shared_bytes(shape)
    )
    with pytest.raises(ValueError, match=r"at least .* of which weights take 1\.50 GiB") as error:
        plan(facts, shape, least - 2**20, H200)
    assert f"{-(-least // 2**20)} MiB" in str(error.value)
    for changes in ({"weights": "16bit"}, {"fused": False}, {"packed_bytes": 0}):
        other = llama_8b(**{**QLORA, **changes})
        assert not other.layer_movable_bytes and not other.moved_weights_bytes(32)
        assert not plan(other, shape, smallest_budget_bytes(other, shape, H200), H200).weights_on_host
    assert [facts.moved_weights_bytes(count) for count in (0, 1, 2, 3)] == [0, 0, 0, PACKED]
    with pytest.raises(ValueError, match=r"weights=\(True,\): allowed are False"):
        plan(facts, shape, 7 * 2**30, H200, weights=(True,))


def test_weights_in_host_memory_are_host_memory() -> None:
    """All of the layers' they take there, although the device has two layers' beside them."""
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    least = smallest_budget_bytes(facts, shape, H200)
    for budget, count in ((least, 32), (10 * 2**30, 16)):
        made = plan(facts, shape, budget, H200)
        leave = sum(made.costs().options[name].host_bytes for name in made.layers)
        assert made.weights_on_host == count == sum(made.streamed) and made.embeddings_on_host
        assert made.host_bytes == leave + count * PACKED + facts.movable_bytes
        assert made.expanded == 0
    limit = 32 * PACKED - 1
    held = plan(
        facts, shape, smallest_budget_bytes(facts, shape, H200, host_bytes=limit), H200, host_bytes=limit
    )
    assert held.weights_on_host == 16 and held.host_bytes <= limit and held.budget_bytes > least
    assert not plan(facts, shape, 10 * 2**30, H200, host_bytes=16 * PACKED - 1).weights_on_host
    # Where all is kept they stay.
    assert not plan(facts, shape, 2**40, H200).weights_on_host


def test_a_forward_that_is_too_short_for_all_weights() -> None:
    """256 tokens of an H200 with a quick host: weights take longer to come than their layer to run. Half of
    them take half as long."""
    facts, shape = llama_8b(**QLORA), Shape(batch=1, seq=256)
    rates = Rates(**{**H200.to_dict(), "host_us": 0.1})
    cost = costs(facts, shape, rates)
    each = PACKED / H200.from_host_gb_s / 1e9
    assert each > 2 * (cost.forward_s + cost.backward_s)
    made = {w: plan(facts, shape, 2**40, rates, weights=w, expanded=0) for w in ((False,), (False, True))}
    assert made[(False,)] == made[(False, True)] and made[(False,)].stall_s < each
    fixed = fixed_bytes(facts, True)
    least = {w: smallest_budget_bytes(facts, shape, rates, weights=w) for w in made}
    tight = plan(facts, shape, least[(False, True)], rates)
    assert tight.weights_on_host == 32 and tight.peak_bytes < fixed
    passes = 2 * 30 * each - 32 * (cost.forward_s + cost.backward_s)
    assert tight.stall_s + tight.recompute_s > 0.9 * passes
    some = plan(facts, shape, least[(False,)] - 10 * PACKED, rates)
    assert some.weights_on_host == 16
    assert 0.3 * tight.stall_s < some.stall_s < 0.6 * tight.stall_s
    # The same tokens several times are long enough.
    long = Shape(batch=2, seq=2048)
    small = plan(facts, long, 5 * 2**30, H200)
    assert small.weights_on_host == 32 and small.stall_s < 0.02 * small.step_s


def test_weights_stay_where_the_link_has_no_time_for_them() -> None:
    """9 GiB hold an 8B model's on a T4, whose forward is filled with what leaves; an H200 is faster with
    half of them in host memory. A link a thousand times slower brings none."""
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    made = plan(facts, shape, 9 * 2**30, KNOWN["t4"])
    assert not made.weights_on_host and made.stall_s + made.recompute_s == 0
    faster, stay = (plan(facts, shape, 9 * 2**30, H200, weights=w) for w in ((False, True), (False,)))
    assert faster.weights_on_host == 16 and not stay.weights_on_host and faster.step_s < stay.step_s
    slow = Rates(**{**H200.to_dict(), "to_host_gb_s": 0.05, "from_host_gb_s": 0.05})
    for gib in (7, 9, 12):
        assert not plan(facts, shape, gib * 2**30, slow).weights_on_host


def test_a_gap_and_a_lead_give_long_copies_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 16 layers is offloaded as a whole, which takes the link more than two layers' forward and
    backward; it is the last one of four."""
    facts, shape = llama_8b(layers=16, **QLORA), Shape(batch=2, seq=4096)
    rates = Rates(**{**H200.to_dict(), "to_host_gb_s": 30, "from_host_gb_s": 30})
    search = planner._Search(facts, shape, rates, None, planner._Way(1, False, False, 0))
    size, cost = int(search.memory.host[5]), search.cost
    assert size / 30e9 > 2 * cost.forward_s and size / 30e9 > 2 * cost.backward_s
    counts = planner._Counts(*(torch.tensor([k]) for k in (3, 0, 1, 3, 0, 0, 1)))
    both = search._at_the_end(counts)
    assert both.gap.tolist() == [0, 2] and both.lead.tolist() == [1, 2]
    codes, n = both.placed(16), dict.fromkeys(OPTIONS, 0)
    layers = [tuple(OPTIONS[code] for code in row) for row in codes.tolist()]
    n |= {"recompute_mlp_offload": 3, "offload": 1, "keep": 12}
    assert layers == [arranged(n, gap) for gap in (0, 2)]
    assert [row.index("offload") for row in layers] == [12, 10]

    def seconds(gap: int, lead: int) -> float:
        row, leads = codes[gap // 2 :][:1], torch.tensor([lead])
        return float(simulated(search.lanes, row, search.memory.in_flight(row, leads), leads))

    assert seconds(2, 2) < seconds(2, 1) < seconds(0, 1)
    assert seconds(0, 2) < seconds(0, 1)
    assert seconds(0, 1) - seconds(2, 2) > 3 * cost.forward_s
    # What comes earlier is there earlier.
    one, two = (search.memory.timeline(codes[:1], torch.tensor([lead]))[2][0] for lead in (1, 2))
    assert (two - one).tolist() == [size if index == 14 else 0 for index in range(16)]
    # Whole plans gain by it, and never lose.
    facts, shape, steps = llama_8b(**QLORA), Shape(batch=2, seq=2048), []
    for _ in range(2):
        steps.append([plan(facts, shape, gib * 2**30, H200, weights=(False,)).step_s for gib in (7, 9, 12)])
        monkeypatch.setattr(planner._Search, "_at_the_end", lambda self, counts: counts)
    assert all(with_both < without for with_both, without in zip(*steps, strict=True))


def test_copies_are_under_way_in_memory_that_is_free_until_the_peak() -> None:
    """Two of the largest layers' where there is none; the forward never takes more than the peak then."""
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    more = 0
    for gib in (7, 9, 12, 16):
        made = plan(facts, shape, gib * 2**30, H200)
        options = made.costs().options
        leaves = [options[name].host_bytes for name in made.layers]
        _, room = above(made.layers, facts, shape, made.mlp_tiles, made.norms_again, made.lead)
        assert made.in_flight == tuple(len(under_way(leaves, i, free)) for i, free in enumerate(room))
        more += sum(made.in_flight) - sum(len(under_way(leaves, i)) for i in range(32))
        assert max(size for name, size in made.timeline() if "forward" in name) <= made.peak_bytes
    assert more > 20


def test_tiles_are_for_budgets_that_nothing_else_meets() -> None:
    """An 8B model: 6.8 GiB for 2 x 2048 tokens, 24 GiB for 160,000 in a row; 3.7 and 21 GiB with weights in
    host memory."""
    facts, short, long = llama_8b(**STAYS), Shape(batch=2, seq=2048), Shape(batch=1, seq=160_000)
    for shape, budget in ((short, int(3.7 * 2**30)), (long, 21 * 2**30)):
        assert smallest_budget_bytes(facts, shape, H200, tiles=(1,)) > budget
        assert plan(facts, shape, budget, H200).mlp_tiles > 1
    facts = llama_8b(**STAYS, packed_bytes=0)
    for shape, budget in ((short, int(6.75 * 2**30)), (long, 24 * 2**30)):
        assert smallest_budget_bytes(facts, shape, H200, tiles=(1,)) > budget
        made = plan(facts, shape, budget, H200)
        assert made.mlp_tiles > 1 and f"MLPs in {made.mlp_tiles} tiles" in str(made)
        assert made.tile_tokens * made.mlp_tiles >= shape.tokens
        assert {made.classes(layer)["gate_up"] for layer in range(32)} == {"recompute"}
    assert plan(facts, short, 2**40, H200).mlp_tiles == 1
    sizes = [smallest_budget_bytes(facts, short, H200, tiles=(1, n)) for n in TILES if n * 512 <= 4096]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match=r"tiles=\(2,\): allowed are 1 and"):
        plan(facts, short, 2**40, H200, tiles=(2,))


def test_layers_whose_mlps_are_made_again_stand_beside_others() -> None:
    """8192 tokens in 10 GiB: the link has no room for gate and up of all layers, but for some."""
    facts, shape, budget = llama_8b(**QLORA), Shape(batch=1, seq=8192), 10 * 2**30
    made = plan(facts, shape, budget, H200, weights=(False,))
    counts = {name: made.layers.count(name) for name in OPTIONS}
    assert counts["recompute_mlp_offload"] > 4 and counts["offload"] > 4 and made.mlp_tiles == 1
    assert f"{counts['recompute_mlp_offload']} recompute mlp offload" in str(made)
    classes = made.classes(made.layers.index("recompute_mlp_offload"))
    assert classes["gate_up"] == "recompute" and classes["qkv"] == "offload"
    without = [name for name in OPTIONS if name != "recompute_mlp_offload"]
    assert plan(facts, shape, budget, H200, allow=without, weights=(False,)).step_s > made.step_s
    # Those that leave more lie evenly among those that leave less.
    away = [name for name in made.layers if name in ("offload", "recompute_mlp_offload")]
    half = len(away) // 2
    assert abs(away[:half].count("offload") - away[-half:].count("offload")) <= 1
    assert CheckpointPlan.from_dict(made.to_dict()) == made


def test_limits_on_host_memory_and_options() -> None:
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    free = plan(facts, shape, 12 * 2**30, H200)
    held = plan(facts, shape, 12 * 2**30, H200, host_bytes=2 * 2**30)
    assert free.host_bytes > 2 * 2**30 >= held.host_bytes > 0 and held.step_s > free.step_s
    only = plan(facts, shape, 12 * 2**30, H200, allow=("keep", "recompute"))
    assert set(only.layers) == {"keep", "recompute"} and only.step_s >= free.step_s
    with pytest.raises(ValueError, match="allowed are 'keep' and any of"):
        plan(facts, shape, 2**40, H200, allow=("recompute",))


def test_a_budget_that_is_too_small_names_the_smallest() -> None:
    facts, shape = llama_8b(**STAYS, packed_bytes=0), Shape(batch=2, seq=2048)
    with pytest.raises(
        ValueError, match=r"memory_budget_bytes=6\.00 GiB: 2 x 2048 tokens need at least"
    ) as error:
        plan(facts, shape, 6 * 2**30, H200)
    mib = int(str(error.value).split("at least ")[1].split(" MiB")[0])
    assert "weights take 5.5" in str(error.value)
    plan(facts, shape, mib * 2**20, H200)
    with pytest.raises(ValueError):
        plan(facts, shape, (mib - 2) * 2**20, H200)


def test_norms_are_made_again_where_their_outputs_are_what_is_saved() -> None:
    shape, budget = Shape(batch=2, seq=2048), 12 * 2**30
    made = plan(llama_8b(**QLORA), shape, budget, H200)
    assert made.norms_again and "norms again" in str(made)
    assert made.classes(made.layers.index("offload"))["mlp_normed"] == "recompute"
    without = plan(llama_8b(**QLORA), shape, budget, H200, norms=(False,))
    assert not without.norms_again and made.step_s < without.step_s
    mlps_alone = {"targets": PROJECTIONS[:4]}  # whose MLPs are plain
    for changes in ({"fused": False}, mlps_alone):
        assert not plan(llama_8b(**{**QLORA, **changes}), shape, 40 * 2**30, H200).norms_again
        tight = plan(llama_8b(**{**QLORA, **changes}), shape, 20 * 2**30, H200)
        assert not tight.norms_again, changes
    with pytest.raises(ValueError, match=r"norms=\(True,\): allowed are False"):
        plan(llama_8b(**QLORA), shape, budget, H200, norms=(True,))


def test_weights_stay_expanded_where_all_else_is_kept() -> None:
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    plain = plan(facts, shape, 2**40, H200, expanded=0)
    need = plain.peak_bytes + plain.margin_bytes
    each = facts.expanded_bytes
    weights = 2 * (4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14336)
    assert weights < each < 1.03 * weights
    before = plain
    for budget, count in ((need, 0), (need + 4 * each, 3), (need + 40 * each, 32), (2**40, 32)):
        made = plan(facts, shape, budget, H200)
        assert made.expanded == count and set(made.layers) == {"keep"}
        assert made.peak_bytes + made.margin_bytes <= budget
        assert made.peak_bytes == plain.peak_bytes + count * each
        assert made.step_s <= before.step_s and (f"weights of {count} expanded" in str(made)) == (count > 0)
        assert CheckpointPlan.from_dict(made.to_dict()) == made
        assert max(size for _, size in made.timeline()) <= 1.01 * made.peak_bytes
        before = made
    assert plan(facts, shape, need + 4 * each, H200, expanded=0.5).expanded == 1
    # The time of expanding each weight twice a step: 2.56 bytes a weight.
    assert plain.step_s - made.step_s == pytest.approx(
        32 * weights * 2.56 / H200.memory_tb_s / 1e12, rel=0.01
    )
    assert plan(facts, shape, need - 2**30, H200).expanded == 0
    for other in ({}, PLAIN):  # 16-bit weights; somebody else's matmuls
        assert plan(llama_8b(**other), shape, 2**40, H200).expanded == 0
    some = llama_8b(**{**QLORA, "targets": ("q_proj", "v_proj")})  # o and the MLP are bitsandbytes' own
    assert some.expanded_bytes == 2 * (4096 + 2 * 1024 + 2 * 16) * (4096 + 64)
    with pytest.raises(ValueError, match=r"expanded=33: allowed is 0 to 32"):
        CheckpointPlan.from_dict({**made.to_dict(), "expanded": 33})


def test_there_is_a_plan_where_more_may_be_the_fastest_than_are_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts, shape = llama_8b(**QLORA), Shape(batch=2, seq=2048)
    for gib in (6, 7, 12):
        monkeypatch.setattr(planner, "MOST_FOLLOWED", 4096)
        best = plan(facts, shape, gib * 2**30, H200)
        monkeypatch.setattr(planner, "MOST_FOLLOWED", 1)
        made = plan(facts, shape, gib * 2**30, H200)
        assert made.peak_bytes + made.margin_bytes <= gib * 2**30
        assert best.step_s <= made.step_s < 1.05 * best.step_s


def test_126_layers_in_a_second() -> None:
    facts = ModelFacts(
        layers=126, hidden=16384, heads=128, kv_heads=8, head_dim=128, intermediate=53248,
        vocab=128256, **QLORA,
    )  # fmt: skip
    shape = Shape(batch=1, seq=4096)
    least = smallest_budget_bytes(facts, shape, H200)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # others would wait for each other where the machine of the tests is busy
    for more in (1.0, 1.05, 1.2):
        start = time.process_time()
        plan(facts, shape, int(least * more), H200)
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(times) < 1.0 and max(times) < 3.0


def test_classes_and_shapes_of_a_plan() -> None:
    made = plan(llama_8b(**QLORA), Shape(batch=2, seq=2048), 9 * 2**30, H200)
    for layer, option in enumerate(made.layers):
        classes = made.classes(layer)
        assert tuple(classes) == CLASSES
        again = "recompute" in option or made.mlp_tiles > 1 or made.norms_again
        assert ("recompute" in classes.values()) == again
        assert classes["input"] == ("offload" if "offload" in option else "keep")
    assert made.covers(Shape(batch=4, seq=1024)) and made.covers(made.shape)
    assert not made.covers(Shape(batch=1, seq=2049)) and not made.covers(Shape(batch=3, seq=2048))


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    made = plan(llama_8b(**QLORA), Shape(batch=2, seq=2048), 9 * 2**30, H200)
    path = tmp_path / "plan.json"
    made.save(path)
    assert CheckpointPlan.load(path) == made
    values = json.loads(path.read_text())
    for change, message in (
        ({"version": 99}, "has version 99: allowed is 4"),
        ({"layers": ["keep"]}, f"one of {', '.join(OPTIONS)} for each of 32"),
        ({"layers": ["lose"] * 32}, "for each of 32 layers"),
        ({"facts": None}, "is no checkpointing plan"),
        ({"weights_on_host": 33}, r"plan\.json': weights_on_host=33: allowed is 0 to 32, its layers$"),
        ({"weights_on_host": -1}, r"weights_on_host=-1: allowed is 0 to 32, its layers$"),
        ({"weights_on_host": "half"}, r"weights_on_host='half': allowed is 0 to 32, its layers$"),
        ({"lead": 0}, r"plan\.json': lead=0: allowed is 1 to 32, its layers$"),
        ({"lead": 33}, r"lead=33: allowed is 1 to 32, its layers$"),
        ({"lead": None}, r"lead=None: allowed is 1 to 32, its layers$"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            CheckpointPlan.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no checkpointing plan"):
        CheckpointPlan.load(path)


# Rates


def test_names_of_gpus() -> None:
    assert rates_for("NVIDIA H200") is H200
    assert rates_for("NVIDIA GeForce RTX 4090") is KNOWN["4090"]
    assert rates_for("NVIDIA A100-SXM4-80GB") is KNOWN["a100"]
    assert rates_for("NVIDIA A10G") is rates_for("Tesla") is KNOWN["unknown"]
    with pytest.raises(ValueError, match=r"matmul_tflops=0"):
        Rates(**{**H200.to_dict(), "matmul_tflops": 0})


@pytest.mark.parametrize(
    "content", [None, "", "{}", '{"version": 0, "rates": {}}', "[1]", '{"version": 3, "rates": {"x": {}}}']
)
def test_measured_rates_are_cached_and_a_corrupt_cache_is_rebuilt(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_path()
    assert path.is_relative_to(tmp_path)
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    calls = []

    def measure(device: Any) -> Rates:
        calls.append(device)
        return KNOWN["t4"]

    for _ in range(2):
        assert measure_rates("cpu", measure=measure) == KNOWN["t4"]
    assert len(calls) == 1 and json.loads(path.read_text())["version"] == 3
    measure_rates("cpu", again=True, measure=measure)
    assert len(calls) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measure_rates("cpu", measure=lambda _: KNOWN["t4"]) == KNOWN["t4"]
    assert measure_rates("cpu") is KNOWN["unknown"]


# The command


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


STEP = ("--batch", 2, "--seq", 2048, "--weights", "nf4_double", "--gpu", "h200")


def test_the_command_prints_draws_and_saves(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, file = directory / "plan.png", directory / "plan.json"
    given = ("plan", directory, *STEP, "--budget", "9GiB", "--draw", png, "--save", file)
    code, out, _ = run(capsys, *given)
    assert code == 0 and "predicted step:" in out and "A step of 2 x 2048 tokens in 9.00 GiB" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, *given, "--json")
    values = json.loads(out)
    assert code == 0
    made = plan(llama_8b(**QLORA), Shape(batch=2, seq=2048), 9 * 2**30, H200)
    assert CheckpointPlan.load(file) == made
    assert values["memory_plan"]["peak_bytes"] == made.peak_bytes
    assert sum(values["memory_plan"]["memory"].values()) == made.peak_bytes + made.margin_bytes
    code, out, _ = run(capsys, "plan", directory, *STEP, "--budget", "6GiB")
    assert code == 0 and "offload input, qkv, attention" in out
    assert "the input embeddings are read from host memory (0.98 GiB)" in out
    least = smallest_budget_bytes(llama_8b(**QLORA), Shape(batch=2, seq=2048), H200)
    code, out, _ = run(capsys, "plan", directory, *STEP, "--budget", least)
    small = plan(llama_8b(**QLORA), Shape(batch=2, seq=2048), least, H200)
    assert f"MLPs run in {small.mlp_tiles} tiles of {small.tile_tokens} tokens" in out
    options = small.costs().options
    shown = [(options[name].kept_bytes, options[name].host_bytes) for name in set(small.layers)]
    assert code == 0 and all(f"{size / 2**20:.0f} " in out for sizes in shown for size in sizes)
    kept = options["keep"].kept_bytes
    sizes = small.facts.saved_bytes(small.shape)
    normed = sizes["normed"] + sizes["mlp_normed"] if small.norms_again else 0
    assert kept == sum(sizes.values()) - small.facts.mlp_bytes(small.shape) - normed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--batch", 2), "--budget, --batch and --seq go together"),
        (("--draw", "x.png"), "give --budget, --batch and --seq"),
        ((*STEP, "--budget", "2GiB"), "2 x 2048 tokens need at least"),
        ((*STEP, "--budget", "lots"), "argument --budget='lots'"),
        ((*STEP, "--budget", "9GiB", "--seq", 0), "seq=0"),
        ((*STEP, "--budget", "9GiB", "--gpu", "h2000"), "'h2000': allowed are h200"),
        ((*STEP, "--budget", "9GiB", "--rank", -1), "rank=-1"),
        ((*STEP, "--budget", "9GiB", "--draw", "/nowhere/at/all.png"), "argument --draw"),
    ],
)
def test_mistakes_in_the_command(
    given: tuple[Any, ...], message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plan", directory, *given)
    assert code == 2 and not out and message in err and "Traceback" not in err
