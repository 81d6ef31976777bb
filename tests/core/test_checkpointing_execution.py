"""A plan at work: the same bits as without it, flags given back, budgets kept, what trainers do meanwhile."""

import copy
import dataclasses
import functools
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

import sloth_plugins as sloth
from sloth_plugins.checkpointing import execute, repeat
from sloth_plugins.checkpointing.facts import ModelFacts, Shape
from sloth_plugins.checkpointing.plan import (
    OPTIONS,
    CheckpointPlan,
    fixed_bytes,
    plan,
    smallest_budget_bytes,
)
from sloth_plugins.checkpointing.rates import KNOWN

LAYERS = 4


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "LEAST_BYTES", 64)


def llama(rank: int = 0, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, attention_dropout=dropout, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    if rank:
        from peft import LoraConfig, get_peft_model

        targets = "all-linear"
        model = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules=targets))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def ids(batch: int = 2, seq: int = 12) -> torch.Tensor:
    return torch.randint(0, 64, (batch, seq), generator=torch.Generator().manual_seed(1))


def step(model: Any, given: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, from one random state."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = model(input_ids=given, labels=given).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got: Any, want: Any) -> None:
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert torch.equal(got[1][name], gradient), name


def planned(model: Any, layers: tuple[str, ...], **changes: Any) -> CheckpointPlan:
    facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    made = plan(facts, Shape(batch=2, seq=12), 2**40, KNOWN["unknown"])
    return dataclasses.replace(made, layers=layers, **changes)


MIXED = ("offload", "recompute_offload", "recompute_mlp", "keep")
MLPS_AGAIN = {"keep": "recompute_mlp", "offload": "recompute_mlp_offload"}


@pytest.mark.parametrize("layers", [*((o,) * 3 + ("keep",) for o in OPTIONS), ("recompute",) * 4, MIXED])
@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (4, 0.3)])
def test_losses_and_gradients_are_the_same_bits(layers: tuple[str, ...], rank: int, dropout: float) -> None:
    model = llama(rank, dropout)
    want = step(model, ids())
    undo = planned(model, layers).apply(model)
    same(step(model, ids()), want)
    undo()
    same(step(model, ids()), want)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("layers", [("keep",) * 4, MIXED])
@pytest.mark.parametrize("rank", [0, 4])
def test_an_mlp_in_tiles_is_the_same_but_for_rounding(
    layers: tuple[str, ...], rank: int, patched: bool
) -> None:
    """Each tile is as large as it may be, every gradient in float64 that of the whole."""
    model = llama(rank).double()
    want = step(model, ids(3, 13))
    settings = {} if patched else {"kernels": "off"}
    plan = planned(model, layers, mlp_tiles=5)  # 24 tokens planned: tiles of 5, and 39 come in 8
    acceleration = sloth.accelerate(model, checkpointing=plan, **settings)
    sizes: list[int] = []
    mlp = next(m for name, m in model.named_modules() if name.endswith("layers.1.mlp"))
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2]))
    inner = mlp.forward
    got = step(model, ids(3, 13))
    handle.remove()
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        scale = gradient.norm().item()
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=1e-7 * scale, msg=name)
    assert mlp.forward == inner
    assert patched or (max(sizes) == 5 and sizes[:8] == [5, 5, 5, 5, 5, 5, 5, 4])
    acceleration.undo()
    same(step(model, ids(3, 13)), want)


def test_dropout_and_evaluation_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of the backward are those of the forward; without gradients the MLP is called once."""
    model = llama(4, 0.3)
    undo = planned(model, MIXED, mlp_tiles=4).apply(model)
    with monkeypatch.context() as patched:  # the same tiles, and nothing made again
        patched.setattr(execute, "checkpoint", lambda function, *args, use_reentrant: function(*args))
        want = step(model, ids())
    same(step(model, ids()), want)
    calls: list[int] = []
    mlp = next(m for n, m in model.named_modules() if n.endswith("layers.2.mlp"))
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: calls.append(args[0].numel()))
    with torch.no_grad():
        model(input_ids=ids())
    model.eval()
    model(input_ids=ids())
    handle.remove()
    assert len(calls) == 2
    undo()


@pytest.mark.parametrize("layers", [MIXED, ("recompute",) * 4])
def test_patched_models_too(layers: tuple[str, ...]) -> None:
    model = llama(4, 0.3)
    acceleration = sloth.accelerate(model)
    want = step(model, ids())
    acceleration.undo()
    acceleration = sloth.accelerate(model, checkpointing=planned(model, layers))
    assert acceleration.report.patched
    same(step(model, ids()), want)
    acceleration.undo()
    assert not any("gradient_checkpointing" in layer.__dict__ for layer in execute.decoder_layers(model))


@pytest.mark.parametrize("tiles", [1, 4])
def test_a_fused_mlp_makes_gate_and_up_again_itself(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the patch's own Function, proven before; one tile gives the bits of a step that keeps all."""
    from sloth_kernels import lora

    model, given = llama(4, 0.3 if tiles == 1 else 0.0), ids(3, 13)
    with sloth.accelerate(model):
        want = step(model, given)
    calls: list[int] = []
    apply = lora._LoraMLPAgain.apply
    monkeypatch.setattr(lora._LoraMLPAgain, "apply", lambda *a: calls.append(a[4]) or apply(*a))
    monkeypatch.setattr(execute, "checkpoint", None)  # not called
    plan = planned(model, ("recompute_mlp",) * 3 + ("offload",), mlp_tiles=tiles)
    with sloth.accelerate(model, checkpointing=plan) as acceleration:
        assert "lora_mlp" in {row.op for row in acceleration.report.patched}
        proofs, calls[:] = len(calls), []
        got = step(model, given)
    assert proofs and calls == ([39] * 3 if tiles == 1 else [6] * 4)
    if tiles == 1:
        same(got, want)
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=1e-5 * gradient.norm().item())


@pytest.mark.parametrize(("setting", "tiles"), [("plan", 1), ("plan", 4), ("recompute", 1)])
def test_a_layer_that_runs_again_leaves_its_output_out(
    setting: str, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an MLP at its end: the same bits without down_proj, in tiles without any of its matmuls."""
    from sloth_kernels import lora

    model, given = llama(4, 0.3), ids(3, 13)
    kinds = {"plan": planned(model, ("recompute", "recompute_offload") * 2, mlp_tiles=tiles)}
    with sloth.accelerate(model, checkpointing=kinds.get(setting, setting)):
        with monkeypatch.context() as patch:
            patch.setattr(repeat, "options", lambda module: {})  # everything, again
            want = step(model, given)
        calls: list[tuple[bool, ...]] = []
        apply = lora._LoraMLPAgain.apply
        monkeypatch.setattr(lora._LoraMLPAgain, "apply", lambda *a: calls.append(a[5:7]) or apply(*a))
        got = step(model, given)
    same(got, want)
    assert calls == [(True, True)] * LAYERS + [(False, True)] * LAYERS


@pytest.mark.parametrize("option", ["keep", "offload", "recompute", "recompute_offload"])
@pytest.mark.parametrize("norms", [False, True])
def test_mlps_that_are_made_again_in_one_piece_give_the_same_bits(
    option: str, norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, and no layer keeps gate and up."""
    from sloth_kernels import lora

    model, given = llama(4, 0.3), ids(3, 13)
    with sloth.accelerate(model, checkpointing=planned(model, ("keep",) * 4)):
        want = step(model, given)
    whole: list[Any] = []
    apply = lora._LoraMLP.apply
    monkeypatch.setattr(lora._LoraMLP, "apply", lambda *a: whole.append(a) or apply(*a))
    chosen = planned(model, (MLPS_AGAIN.get(option, option),) * 3 + ("recompute_mlp",), norms_again=norms)
    with sloth.accelerate(model, checkpointing=chosen):
        whole.clear()  # of the proofs
        same(step(model, given), want)
    assert not whole


def test_weights_stay_expanded_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first layer: expanded once, until a call without gradients; always the same bits."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from lora_models import in_4bit, lora, wide
    from sloth_kernels import nf4

    model = lora(in_4bit(wide())).train()
    count = len(execute.decoder_layers(model))
    filled: list[bool] = []
    fill = nf4.Extension.fill

    def counted(self: Any, out: Any, factors: Any, *, weights: bool = True) -> bool:
        filled.append(weights)
        return fill(self, out, factors, weights=weights)

    monkeypatch.setattr(nf4.Extension, "fill", counted)
    given = ids()
    # In Triton's interpreter: only what this is about.
    others = {"rms_norm", "add_rms_norm", "rope", "linear_cross_entropy", "gated_mlp"}
    options: Any = dict(kernels="triton", verify=False, disable=others)
    with sloth.accelerate(model, checkpointing=planned(model, ("keep",) * count), **options):
        filled.clear()
        want = step(model, given)
        groups, left = divmod(len(filled), 2 * count)  # forward and backward of each
        assert groups >= 3 and not left and all(filled)
    chosen = planned(model, ("keep",) * count, expanded=1)
    with sloth.accelerate(model, checkpointing=chosen, **options):
        for first in (True, False):
            filled.clear()
            same(step(model, given), want)
            assert len(filled) == 2 * count * groups
            assert sum(filled) == 2 * (count - 1) * groups + first * groups
        kept = [place for module in model.modules() if (place := repeat.EXPANDED.get(module)) is not None]
        assert sum(part.filled for place in kept for part in (place.first, place.last)) == groups
        # Somebody else's optimizer writes adapters in place.
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data.mul_(2)
        filled.clear()
        doubled = step(model, given)
        assert sum(filled) == 2 * (count - 1) * groups
        with torch.no_grad():
            model(input_ids=ids(4, 40))
        assert not any(part.joint is not None for place in kept for part in (place.first, place.last))
        same(step(model, given), doubled)
        held = [
            weakref.ref(part.joint)
            for place in kept
            for part in (place.first, place.last)
            if part.joint is not None
        ]
        assert len(held) == groups
        del kept
    assert not any(module in repeat.EXPANDED for module in model.modules())
    gc.collect()
    assert not any(joint() is not None for joint in held)
    with sloth.accelerate(model, checkpointing=planned(model, ("keep",) * count), **options):
        same(step(model, given), doubled)


@pytest.mark.parametrize("option", ["recompute_offload", "offload"])
@pytest.mark.parametrize("norms", [False, True])
def test_host_memory_is_free_after_the_backward(option: str, norms: bool) -> None:
    """Without Python's collector: pinned memory that waited for it would be allocated anew in each step."""
    model, given = llama(4), ids()
    with sloth.accelerate(model, checkpointing=planned(model, (option,) * 3 + ("keep",), norms_again=norms)):
        step(model, given)
        gc.collect()
        gc.disable()
        try:
            step(model, given)
            assert not [thing for thing in gc.get_objects() if isinstance(thing, execute._Block)]
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("layers", "tiles"),
    [(("keep",) * 4, 1), (("recompute_mlp",) * 4, 1), (("offload",) * 3 + ("keep",), 1), (MIXED, 4)],
)
def test_norms_again_give_the_same_bits_and_are_not_kept(
    layers: tuple[str, ...], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, a second backward through the same graph, and no norm's output alive after the forward."""
    model, given = llama(4, 0.3), ids(3, 13)
    got: dict[bool, Any] = {}
    outputs: list[StorageWeakRef] = []
    sources: list[StorageWeakRef] = []
    note = repeat.note

    def noted(module: Any, output: Any, source: Any, make: Any) -> None:
        outputs.append(StorageWeakRef(output.untyped_storage()))
        sources.append(StorageWeakRef(source.untyped_storage()))
        note(module, output, source, make)

    monkeypatch.setattr("sloth_plugins.patches.note", noted)
    for again in (False, True):
        chosen = planned(model, layers, mlp_tiles=tiles, norms_again=again)
        with sloth.accelerate(model, checkpointing=chosen) as acceleration:
            assert {"rms_norm", "add_rms_norm"} <= {row.op for row in acceleration.report.patched}
            got[again] = step(model, given)
            outputs.clear()
            sources.clear()
            model.zero_grad(set_to_none=True)
            torch.manual_seed(3)
            loss = model(input_ids=given, labels=given).loss
            assert all(ref.expired() for ref in outputs)
            left = [ref.expired() for ref in sources]
            assert (
                left
                == [
                    option == "offload"
                    for option in layers
                    if option != "recompute_offload"
                    for _ in range(2)
                ][: len(left)]
            )
            loss.backward(retain_graph=True)
            loss.backward()
            for name, gradient in got[again][1].items():
                assert torch.equal(model.get_parameter(name).grad, gradient + gradient), name
    same(got[True], got[False])
    whole = sum(option in ("recompute", "recompute_offload") for option in layers)
    assert len(outputs) == 2 * (LAYERS - whole)
    assert repeat.NOW.output is None and repeat.NOW.recipe is None and not repeat.NOW.norms


def test_a_budget_is_planned_anew_where_norms_have_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = llama(4), ids()
    note = repeat.note
    wrong = False

    def other(module: Any, output: Any, source: Any, make: Any) -> None:
        here = source.shape[0] == 2  # not in the one row that is run before the first plan
        note(module, output, source, (lambda x: make(x) + 1e-6) if here or wrong == "always" else make)

    tight = budget_of_norms(model)
    for wrong in (False, True, "always"):
        with monkeypatch.context() as patch:
            if wrong:
                patch.setattr("sloth_plugins.patches.note", other)
            with sloth.accelerate(model, memory_budget_bytes=tight) as acceleration:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step(model, given)
                said = [w for w in caught if "a norm gave other bits" in str(w.message)]
                assert len(said) == bool(wrong)  # once, not for each norm
                record = acceleration.report.checkpointing
                assert record["plan"]["norms_again"] == (wrong != "always") and record["plans"] == 1
                if wrong == "always":
                    assert "a norm gave other bits" in record["note"]
                    continue
                if not wrong:
                    step(model, given)
                    assert record["plans"] == 1 and "note" not in record
                    continue
                step(model, given)
                assert not record["plan"]["norms_again"] and record["plans"] == 2


def budget_of_norms(model: Any) -> int:
    """A budget for which the fastest plan makes norms again."""
    with sloth.accelerate(model, memory_budget_bytes=2**40) as acceleration:
        step(model, ids())
        roomy = CheckpointPlan.from_dict(acceleration.report.checkpointing["plan"])
    facts, shape, rates = roomy.facts, roomy.shape, roomy.rates
    for size in range(roomy.peak_bytes + roomy.margin_bytes, fixed_bytes(facts), -1024):
        if plan(facts, shape, size, rates).norms_again:
            return size
    raise AssertionError("no such budget")


@pytest.mark.gpu
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layers", "tiles"),
    [
        *(((o,) * 3 + ("keep",), 1) for o in OPTIONS),
        (MIXED, 1),
        (MIXED, 4),
        (tuple(MLPS_AGAIN.get(o, o) for o in MIXED), 1),
        (("recompute_mlp_offload", "offload", "recompute_mlp_offload", "recompute_mlp"), 1),
    ],
)
def test_the_same_bits_on_a_gpu(layers: tuple[str, ...], tiles: int, dtype: torch.dtype, norms: bool) -> None:
    """With copies on a stream of their own: under autocast and without, dropout, a second backward,
    generation between steps, another shape. In tiles: as the whole but for rounding.
    """
    model = llama(4, 0.3 if tiles == 1 else 0.0).to("cuda", dtype)
    shapes = [ids().cuda(), ids(3, 13).cuda(), ids().cuda()]

    def steps() -> list[Any]:
        found = []
        for given in shapes:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                found.append(step(model, given))
            model.eval()
            model.generate(input_ids=given[:, :4], max_new_tokens=3, do_sample=False, use_cache=True)
            model.train()
        return found

    def twice() -> list[dict[str, torch.Tensor]]:
        """Gradients of two backwards through one graph."""
        torch.manual_seed(3)
        loss, found = model(input_ids=shapes[0], labels=shapes[0]).loss, []
        for last in (False, True):
            model.zero_grad(set_to_none=True)
            loss.backward(retain_graph=not last)
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return found

    with sloth.accelerate(model):
        want, want_twice = steps(), twice()
        for one, other in zip(steps(), want, strict=True):
            same(one, other)  # else nothing here means anything
    chosen = planned(model, layers, mlp_tiles=tiles, norms_again=norms)
    with sloth.accelerate(model, checkpointing=chosen) as acceleration:
        ours = {row.op for row in acceleration.report.patched}
        assert {"lora_linear", "lora_mlp", "rms_norm", "add_rms_norm"} <= ours
        for _ in range(2):
            got = steps()
            for one, other in zip(got, want, strict=True):
                if tiles == 1:
                    same(one, other)
                    continue
                for name, gradient in other[1].items():
                    error = (one[1][name] - gradient).norm() / gradient.norm()
                    assert error < 2e-2, name
        for got_gradients, gradients in zip(twice(), want_twice, strict=True):
            for name, gradient in gradients.items():
                error = (got_gradients[name] - gradient).norm() / gradient.norm()
                assert error == 0 if tiles == 1 else error < 2e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize("norms", [False, True])
def test_memory_that_is_offloaded_is_free_on_a_gpu(norms: bool) -> None:
    """What is allocated after a forward: less by what leaves, and nothing stays after the backward."""
    model, given = llama(4).cuda(), ids(8, 64).cuda()
    held = {}
    for option in ("keep", "recompute_offload", "offload"):
        layers = (option,) * 3 + ("keep",)
        with sloth.accelerate(model, checkpointing=planned(model, layers, norms_again=norms)):
            for _ in range(3):  # what is allocated once and kept, as the counters of kernels
                step(model, given)
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            loss = model(input_ids=given, labels=given).loss
            torch.cuda.synchronize()
            held[option] = torch.cuda.memory_allocated() - before
            loss.backward()
            model.zero_grad(set_to_none=True)
            del loss
            assert torch.cuda.memory_allocated() <= before
    assert held["offload"] < held["keep"] / 2 and held["recompute_offload"] < held["keep"] / 2


@pytest.mark.parametrize("kind", ["keep", "norms", "offload", "offload, small", "recompute_mlp", "observed"])
def test_a_graph_whose_backward_never_comes_goes_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed output that kept its graph would hold itself, through C++, where no collector looks."""
    option = kind.split(",")[0] if kind in OPTIONS or kind.startswith("offload") else "keep"
    if kind == "offload, small":
        monkeypatch.setattr(execute, "LEAST_BYTES", 2**40)
    model, nodes = llama(4), []

    class Token:
        pass

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.token = Token()
            nodes.append(weakref.ref(ctx.token))
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    model.get_input_embeddings().register_forward_hook(
        lambda m, a, y: Watched.apply(y.detach().requires_grad_())
    )
    chosen = planned(model, (option,) * 3 + ("keep",), norms_again=kind == "norms")
    how: Any = dict(memory_budget_bytes=2**40) if kind == "observed" else dict(checkpointing=chosen)
    gc.collect()
    gc.disable()
    try:
        with sloth.accelerate(model, **how):
            nodes.clear()
            loss = model(input_ids=ids(), labels=ids()).loss
            assert len(nodes) == (3 if kind == "observed" else 1) and nodes[-1]() is not None
            assert not any(node() for node in nodes[:-1])
            del loss
            assert nodes[-1]() is None
    finally:
        gc.enable()


def test_a_narrower_copy_of_a_norms_output_is_made_again() -> None:
    """Under autocast norms give float32, and what the LoRA layers save is their bfloat16 copy of it."""
    model, given, got = llama(4, 0.3), ids(3, 13), {}
    others = [thing for thing in gc.get_objects() if isinstance(thing, execute._Made)]  # of other tests
    for again in (False, True):
        chosen = planned(model, ("keep",) * 3 + ("offload",), norms_again=again)
        with sloth.accelerate(model, checkpointing=chosen):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got[again] = step(model, given)
                torch.manual_seed(3)
                model.zero_grad(set_to_none=True)
                loss = model(input_ids=given, labels=given).loss
                made = [thing for thing in gc.get_objects() if isinstance(thing, execute._Made)]
                assert len(made) - len(others) == (2 * LAYERS if again else 0)
                del made
                loss.backward()
            for name, gradient in got[again][1].items():
                assert torch.equal(model.get_parameter(name).grad, gradient), name
            del loss
    same(got[True], got[False])


def test_an_output_that_is_not_the_norms_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a norm's second run gives other bits, and where its input is changed meanwhile."""
    model, given = llama(4), ids()
    with sloth.accelerate(model, checkpointing=planned(model, ("keep",) * 4)):
        want = step(model, given)
    note = repeat.note
    with monkeypatch.context() as patch:
        patch.setattr(
            "sloth_plugins.patches.note",
            lambda module, output, source, make: note(module, output, source, lambda x: make(x) + 1e-6),
        )
        chosen = planned(model, ("keep",) * 4, norms_again=True)
        with (
            sloth.accelerate(model, checkpointing=chosen),
            pytest.warns(UserWarning, match="a norm gave other bits .* its output is kept"),
        ):
            same(step(model, given), want)
    norms = execute._Norms()
    x, norm = torch.randn(3, 8, requires_grad=True), torch.nn.RMSNorm(8)
    norm.weight.requires_grad_(False)
    weight = torch.randn(8, 8, requires_grad=True)
    with norms.layer():
        source = x * 1
        y = norm(source)
        repeat.note(norm, y, source, norm)
        out = (y @ weight).sum()
        del y
    source.data.add_(1)
    torch.autograd.grad(out, weight, retain_graph=True)  # through .data nobody sees it, as everywhere
    source.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        torch.autograd.grad(out, weight)


def test_an_output_that_somebody_reads_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a hook on the MLP, a norm behind it, a layer that is not checkpointed as a whole."""
    from sloth_kernels import lora

    zeros: list[bool] = []
    for function, at in ((lora._LoraMLP, 4), (lora._LoraMLPAgain, 5)):
        apply = functools.partial(
            lambda apply, at, *a: zeros.append(not a[at]) or apply(*a), function.apply, at
        )
        monkeypatch.setattr(function, "apply", apply)
    model, seen = llama(4), []
    with sloth.accelerate(model, checkpointing=planned(model, ("recompute",) * 4)):
        mlp = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp"))
        handle = mlp.register_forward_hook(lambda *a: seen.append(float(a[2].abs().sum())))
        step(model, ids())
        handle.remove()
    assert sum(zeros) == LAYERS - 1 and seen and min(seen) > 0
    zeros.clear()
    with sloth.accelerate(model, checkpointing=planned(model, ("recompute_mlp",) * 4)):
        step(model, ids())
    assert not any(zeros)
    # Gemma 2 has a norm behind the MLP, which saves its input.
    from peft import LoraConfig, get_peft_model

    gemma: Any = tiny_model("gemma2")
    gemma = get_peft_model(gemma, LoraConfig(r=4, target_modules="all-linear")).train()
    want = step(gemma, ids())
    with sloth.accelerate(gemma, checkpointing="recompute") as acceleration:
        assert "lora_mlp" in {row.op for row in acceleration.report.patched}
        zeros.clear()
        got = step(gemma, ids())
    assert zeros and not any(zeros)
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.norm().item())


def test_a_module_inside_of_the_last_is_not_the_last() -> None:
    """An expert's MLP, say, whose output is weighted before it is added."""
    inner, outer = torch.nn.Identity(), torch.nn.Identity()
    found = []
    outer.forward = lambda x: (found.append((repeat.options(inner), repeat.options(outer))), x)[1]  # type: ignore[method-assign]
    run = repeat.Repeated(lambda: repeat.call_unread(outer, None))
    run()
    run()
    repeat.call_unread(outer, None)
    kept = {"output": True, "repeated": True}
    assert found == [({}, kept), ({}, {**kept, "output": False}), ({}, {})]
    assert repeat.NOW.layer is None and repeat.NOW.unread is None


def test_an_mlp_whose_patch_cannot_serve_is_checkpointed() -> None:
    """A hook on a child that the fused MLP would not call."""
    model = llama(4)
    seen: list[int] = []
    mlp = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp"))
    plan = planned(model, ("recompute_mlp",) * 4, mlp_tiles=4)
    with sloth.accelerate(model, checkpointing=plan) as acceleration:
        want = step(model, ids())
        handle = mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[2].shape[1]))
        got = step(model, ids())
        handle.remove()
        assert seen == [6] * 8 and acceleration.report.patched  # four tiles, twice
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=1e-5 * gradient.norm().item())


def saved(model: Any, given: torch.Tensor) -> int:
    """Bytes of storages that autograd holds after a forward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(input_ids=given).logits
    del out
    return sum(storage.nbytes() for storage in found.values())


def test_what_a_plan_does_to_each_layer_is_what_autograd_keeps() -> None:
    kept = {}
    for option in ("keep", "recompute_mlp", "recompute"):
        model = llama()
        undo = planned(model, (option,) * LAYERS).apply(model)
        kept[option] = saved(model, ids())
        undo()
    assert kept["recompute"] < kept["recompute_mlp"] < kept["keep"]
    model = llama()
    undo = planned(model, ("keep",) * LAYERS, mlp_tiles=4).apply(model)
    assert saved(model, ids()) == kept["recompute_mlp"]
    undo()


def test_offloaded_tensors_leave_and_come_back_once() -> None:
    model = llama()
    undo = planned(model, ("offload",) * 3 + ("keep",)).apply(model)
    torch.manual_seed(3)
    made: list[weakref.ref[Any]] = []
    first = execute._Entry.__init__

    def watch(self: Any, *args: Any) -> None:
        first(self, *args)
        made.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute._Entry, "__init__", watch)
        loss = model(input_ids=ids(), labels=ids()).loss
    entries: list[Any] = [ref() for ref in made]
    assert entries and all(entry.source is None and entry.back is None for entry in entries)
    loss.backward(retain_graph=True)
    assert all(entry.back is None for entry in entries)  # each was dropped with its last user
    one = [p.grad.clone() for p in model.parameters()]
    loss.backward()  # a second time through the same graph
    for p, g in zip(model.parameters(), one, strict=True):
        assert torch.equal(p.grad, g + g)
    del entries, loss
    gc.collect()
    assert not any(ref() for ref in made)
    undo()


def test_the_block_before_comes_with_the_first_tensor_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no layer but the last of the offloaded ones waits for its copy."""
    model = llama()
    undo = planned(model, ("offload",) * 3 + ("keep",)).apply(model)
    blocks: list[Any] = []
    made = execute._Block.__init__
    monkeypatch.setattr(
        execute._Block, "__init__", lambda self, *a: (blocks.append(weakref.ref(self)), made(self, *a))[1]
    )
    owner: dict[int, int] = {}
    events: list[tuple[str, int]] = []
    began: list[int] = []
    start = execute._Offload._start

    def started(self: Any, ref: Any, index: int, grad: Any) -> None:
        assert not events and index == 3
        start(self, ref, index, grad)
        began.extend({owner[id(e)] for e in ref().entries.values() if e.back is not None})

    monkeypatch.setattr(execute._Offload, "_start", started)
    loss = model(input_ids=ids(), labels=ids()).loss
    owner |= {id(e): i for i, ref in enumerate(blocks) for e in ref().entries.values()}
    copy, take = execute._Offload._copy, execute._Entry.take

    def copied(entry: Any, side: Any, most: Any) -> Any:
        events.append(("fetch", owner[id(entry)]))
        return copy(entry, side, most)

    def taken(self: Any) -> torch.Tensor:
        events.append(("take", owner[id(self)]))
        return take(self)

    monkeypatch.setattr(execute._Offload, "_copy", staticmethod(copied))
    monkeypatch.setattr(execute._Entry, "take", taken)
    loss.backward()
    order = [event for event, before in zip(events, [None, *events], strict=False) if event != before]
    # The last one's with the backward of the layer behind it, which has nothing to wait for itself.
    assert order[:3] == [("fetch", 2), ("fetch", 1), ("take", 2)]
    assert began == [2]
    assert order.index(("fetch", 0)) == order.index(("take", 1)) - 1  # with the first of layer 1's
    assert not any(event[0] == "fetch" for event in order[order.index(("take", 1)) + 1 :])
    undo()


def test_what_has_several_layers_time_comes_in_as_many_portions() -> None:
    """One with the layer behind, and one with each layer between whose weights come as well."""
    offload = execute._Offload(execute._Norms())
    offload.streamed = (True, False, True, True, True)
    earlier, behind = execute._Block(None, 0), 4
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (50, 40)]
    for number, source in enumerate(sources):
        entry = earlier.entries[number, 0, 0] = execute._Entry(source, None)
        entry.users = entry.left = 1
    first, second = earlier.entries.values()
    offload._prepare(earlier, behind)
    # What was saved last comes first.
    assert (first.missing, second.missing) == (50, 10)
    offload.advance(4)  # that layer's own
    assert (first.missing, second.missing) == (50, 10)
    offload.advance(3)
    assert (first.missing, second.missing) == (30, 0)
    offload.advance(2)
    assert (first.missing, second.missing) == (0, 0) and not offload._queue
    assert all(torch.equal(e.take(), want) for e, want in zip((first, second), sources, strict=True))
    # Who wants one earlier gets the rest at once.
    offload._prepare(earlier, behind)
    offload._fetch((first,))
    assert not first.missing and torch.equal(first.take(), sources[0]) and second.missing
    offload.drain()
    assert not offload._queue


def test_views_of_one_storage_leave_as_one_and_come_back_as_they_were() -> None:
    offload, seen = execute._Offload(execute._Norms()), []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            both = torch.cat([x, 2 * x], 1)
            ctx.save_for_backward(both[:, :8], both[:, 8:], both.t(), x.bfloat16(), torch.arange(3))
            return both.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.extend(ctx.saved_tensors)
            return 3 * grad.expand(4, 8)

    x = torch.randn(4, 8, requires_grad=True)
    with offload.layer(torch.nn.Linear(1, 1), {"mask": x}):
        Keeps.apply(x).backward()
    first, second, turned, narrow, small = seen
    assert (
        torch.equal(first, x) and torch.equal(second, 2 * x) and first.stride() == second.stride() == (16, 1)
    )
    assert torch.equal(turned, torch.cat([x, 2 * x], 1).t()) and turned.stride() == (1, 16)
    assert torch.equal(narrow, x.bfloat16()) and torch.equal(small, torch.arange(3))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_a_backward_that_never_comes_and_an_exception_leave_nothing() -> None:
    model = llama()
    want = step(model, ids())
    undo = planned(model, MIXED).apply(model)
    model(input_ids=ids(), labels=ids())  # no backward
    mlp = execute.decoder_layers(model)[2].mlp

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(input_ids=ids(), labels=ids())
    handle.remove()
    assert "forward" not in mlp.__dict__
    with torch.no_grad():
        model.eval()(input_ids=ids())
    model.train()
    model.generate(ids(), max_new_tokens=2, do_sample=False)
    same(step(model, ids()), want)
    undo()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_trainers_own_gives_way_and_comes_back(reentrant: bool, when: str) -> None:
    model = llama()
    want = step(model, ids())
    enable = {"use_reentrant": reentrant}
    if when == "before":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=enable)
    undo = planned(model, MIXED).apply(model)
    if when == "after":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=enable)
    same(step(model, ids()), want)
    layers = execute.decoder_layers(model)
    assert all(isinstance(layer._gradient_checkpointing_func, execute._Ours) for layer in layers)
    undo()
    assert all(layer.gradient_checkpointing for layer in layers)
    assert not any(isinstance(layer._gradient_checkpointing_func, execute._Ours) for layer in layers)


def test_a_copy_and_a_pickle_stand_alone() -> None:
    model = llama()
    want = step(model, ids())
    undo = planned(model, MIXED).apply(model)
    twin = copy.deepcopy(model)
    same(step(twin, ids()), want)
    function = pickle.loads(pickle.dumps(execute.decoder_layers(model)[0]._gradient_checkpointing_func))
    assert function.keywords == {"use_reentrant": False}
    undo()
    same(step(twin, ids()), want)


def test_a_plan_for_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan is for 4 layers, the model has 2"):
        planned(llama(), MIXED).apply(tiny_model("llama"))


# A budget


def budget(model: Any, share: float) -> int:
    """Between the smallest that fits at 2 x 12 and what keeping everything takes."""
    facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    least = smallest_budget_bytes(facts, Shape(batch=2, seq=12), KNOWN["unknown"])
    most = plan(facts, Shape(batch=2, seq=12), 2**40, KNOWN["unknown"])
    return int(least + share * (most.peak_bytes + most.margin_bytes - least))


@pytest.mark.filterwarnings("ignore:sloth")
def test_a_budget_is_planned_at_the_first_batch_and_again_for_a_larger_one() -> None:
    model = llama(4)
    want = step(model, ids())
    wider = step(model, ids(2, 20))
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=budget(model, 0.5)) as acceleration:
        record = acceleration.report.checkpointing
        assert record["chosen"] == "to be planned at the first batch" and record["plans"] == 0
        same(step(model, ids()), want)
        assert record["plans"] == 1 and set(record["plan"]["layers"]) != {"keep"}
        step(model, ids(1, 6))
        with torch.no_grad():
            model(input_ids=ids(2, 20))  # evaluation plans nothing
        assert record["plans"] == 1
        same(step(model, ids(2, 20)), wider)
        assert record["plans"] == 2 and record["plan"]["shape"] == {"batch": 2, "seq": 20}
        acceleration.report.to_json()
        assert "peak predicted" in str(acceleration.report)
    same(step(model, ids()), want)


# What the planner takes for kernels is off: it plans as for a plain step.
PLAIN = ["lora_linear", "lora_mlp", "gated_mlp", "linear_cross_entropy", "linear_log_probs"]


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("share", [0.2, 1.1, 9.0])
def test_without_a_budget_what_the_gpu_has_is_planned_for(
    share: float, theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is kept where there is room, also where the trainer would recompute; nobody is warned."""
    model = llama(4)
    layers = execute.decoder_layers(model)
    with sloth.accelerate(model, disable=PLAIN, checkpointing="off"):
        want = step(model, ids())
    if theirs:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    room = budget(model, share)
    with sloth.accelerate(model, disable=PLAIN) as acceleration:  # a CPU: nothing is planned
        assert acceleration.report.checkpointing["chosen"] == "left to the trainer"
        same(step(model, ids()), want)
    monkeypatch.setattr(execute, "usable_bytes", lambda device: room)
    with sloth.accelerate(model, kernels="off") as acceleration:
        assert acceleration.report.checkpointing["chosen"] == "left to the trainer"
    measured: list[Any] = []
    measure = execute.measure_rates
    monkeypatch.setattr(execute, "measure_rates", lambda device: measured.append(device) or measure(device))
    looked: list[Any] = []
    observe = execute.observe
    monkeypatch.setattr(execute, "observe", lambda *given: looked.append(given) or observe(*given))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sloth")
        with sloth.accelerate(model, disable=PLAIN, strict=True) as acceleration:
            record = acceleration.report.checkpointing
            same(step(model, ids()), want)
            assert (set(record["plan"]["layers"]) == {"keep"}) == (share > 1)
            assert bool(measured) == (share < 1)  # nothing is measured for a plan that needs no figures
            assert len(looked) == (share < 2)  # and nothing is run where there is room for more than is known
            assert "of the GPU may be filled" in record["reason"]
            assert ("the trainer's own gradient checkpointing gives way" in record["reason"]) == theirs
            assert any(
                layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "mlp")
            ) == (share < 1)
            handle = failing(model, 1)
            warnings.filterwarnings("ignore", message="sloth: out of memory in a forward")
            same(step(model, ids()), want)
            handle.remove()
            assert "planned anew" in record["note"]
        room = 1  # nothing fits: the smallest plan, without an error
        with sloth.accelerate(model, disable=PLAIN, strict=True) as acceleration:
            same(step(model, ids()), want)
            assert "need at least" in acceleration.report.checkpointing["note"]
    assert all(layer.gradient_checkpointing == theirs for layer in layers)


def test_without_a_budget_a_plan_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is no transformers model, and a fault while planning."""
    monkeypatch.setattr(execute, "usable_bytes", lambda device: 2**40)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sloth: .*budget")
        with sloth.accelerate(net) as acceleration:
            net(torch.randn(2, 4)).sum().backward()
            assert acceleration.report.checkpointing["chosen"] == "left to the trainer"
    model = llama(4)
    with sloth.accelerate(model, disable=PLAIN, checkpointing="off"):
        want = step(model, ids())

    def fault(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a fault")

    with sloth.accelerate(model, disable=PLAIN) as acceleration:
        monkeypatch.setattr(execute, "plan", fault)
        with pytest.warns(
            UserWarning, match="sloth: checkpointing is left to the trainer: ZeroDivisionError"
        ):
            same(step(model, ids()), want)
        same(step(model, ids()), want)
        record = acceleration.report.checkpointing
        assert record["chosen"] == "left to the trainer" and "a fault" in record["note"]


@pytest.mark.parametrize("early", [False, True])
def test_sharded_parameters_are_not_planned_without_a_budget(
    early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process would plan for itself. Trainers shard before acceleration or after it."""
    monkeypatch.setattr(execute, "usable_bytes", lambda device: 2**40)
    model = llama(4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with sloth.accelerate(model, disable=PLAIN, checkpointing="off"):
        want = step(model, ids())
    sharded: Any = next(model.parameters())
    if early:
        sharded.ds_id = 0
    with sloth.accelerate(model, disable=PLAIN) as acceleration:
        sharded.ds_id = 0
        same(step(model, ids()), want)
        record = acceleration.report.checkpointing
        assert record["chosen"] == "left to the trainer" and "are sharded (Parameter)" in record["note"]
        assert all(layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "mlp"))
        assert not any(isinstance(vars(m).get(execute.FLAGS[1]), execute._Ours) for m in model.modules())


def failing(model: Any, times: int, layer: int = 2) -> Any:
    """A handle: the MLP of a layer runs out of memory so many times."""
    left = [times]

    def fail(*_: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    mlp = next(m for n, m in model.named_modules() if n.endswith(f"layers.{layer}.mlp"))
    return mlp.register_forward_pre_hook(fail)


def test_a_forward_without_memory_is_planned_anew_and_repeated() -> None:
    """Once: the same bits as without it, dropout too, then and in the steps that follow."""
    model = llama(4, 0.3)
    want = step(model, ids())
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=budget(model, 0.9)) as acceleration:
        record = acceleration.report.checkpointing
        same(step(model, ids()), want)
        before = record["predicted_peak_bytes"]
        handle = failing(model, 1)
        with pytest.warns(UserWarning, match="out of memory in a forward under a plan for .*repeated"):
            same(step(model, ids()), want)
        handle.remove()
        assert record["predicted_peak_bytes"] < 0.95 * before and "planned anew" in record["note"]
        same(step(model, ids()), want)
        clone = copy.deepcopy(model)
        same(step(clone, ids()), want)
        handle = failing(clone, 1)
        with pytest.raises(torch.OutOfMemoryError):
            step(clone, ids())
        handle = failing(model, 2)
        with pytest.raises(torch.OutOfMemoryError) as raised, pytest.warns(UserWarning, match="repeated"):
            step(model, ids())
        assert "2 x 12 tokens need at least" in raised.value.__notes__[0]
        handle.remove()
        same(step(model, ids()), want)
    assert "forward" not in execute.watched(model).__dict__
    same(step(model, ids()), want)


def test_where_no_smaller_plan_is_left_the_error_says_so() -> None:
    model = llama(4)
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=budget(model, 0.0)):
        step(model, ids())
        handle = failing(model, 1)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            step(model, ids())
        assert "there is no plan with less memory" in raised.value.__notes__[0]
        handle.remove()
        step(model, ids())


@pytest.mark.parametrize("layers", [("offload",) * 3 + ("keep",), MIXED])
def test_a_second_backward_and_generation_between(layers: tuple[str, ...]) -> None:
    model = llama(4, 0.3)
    want = step(model, ids())
    undo = planned(model, layers).apply(model)
    torch.manual_seed(3)
    loss = model(input_ids=ids(), labels=ids()).loss
    model.eval()
    made = model.generate(input_ids=ids()[:, :4], max_new_tokens=4, do_sample=False)
    model.train()
    loss.backward(retain_graph=True)
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    same((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), want)
    undo()
    model.eval()
    assert torch.equal(made, model.generate(input_ids=ids()[:, :4], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupt_leaves_nothing(where: str) -> None:
    model = llama(4, 0.3)
    want = step(model, ids())
    undo = planned(model, MIXED).apply(model)
    mlp = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    register = mlp.register_forward_pre_hook if where == "forward" else mlp.register_full_backward_hook
    handle = register(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, ids())
    handle.remove()
    gc.collect()
    assert not any(isinstance(thing, execute._Entry) for thing in gc.get_objects())
    same(step(model, ids()), want)
    undo()
    same(step(model, ids()), want)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_there_already_of_gradients_and_optimizer_counts_once(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run is resumed: what is allocated then is weights, gradients and the optimizer's state."""
    model = llama(4)
    trained = [p for p in model.parameters() if p.requires_grad]
    others = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=64))
    optimizers = [kind(trained, lr=0.1), torch.optim.AdamW(others.parameters())]
    step(model, ids())
    device = torch.device("cpu")
    gradients = sum(p.numel() * 4 for p in trained)
    assert execute.planned_for_bytes(model, device) == gradients
    for p in others.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    there = execute.planned_for_bytes(model, device)
    if kind is torch.optim.AdamW:
        assert 3 * gradients <= there <= 3 * gradients + 4 * len(trained)  # and a step for each
    else:
        assert there == gradients
    facts = ModelFacts.from_model(model, fused=False, fused_head=False)
    weights, there = facts.weights_bytes, there - gradients
    monkeypatch.setattr(execute, "allocated_bytes", lambda device: weights + there + 12345)
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=2**40) as acceleration:
        step(model, ids())
        planned_facts = acceleration.report.checkpointing["plan"]["facts"]
        assert planned_facts["resident_bytes"] == weights + 12345


@pytest.mark.filterwarnings("ignore:sloth")
def test_gradients_that_accumulate_are_planned_for() -> None:
    model = llama(4)
    with sloth.accelerate(model, kernels="off", memory_budget_bytes=budget(model, 0.6)) as acceleration:
        record, peaks = acceleration.report.checkpointing, []
        for _ in range(3):
            model(input_ids=ids(), labels=ids()).loss.backward()
            peaks.append((record["plans"], record["plan"]["facts"]["accumulates"]))
    assert peaks == [(1, False), (2, True), (2, True)]


def test_without_a_budget_nothing_is_planned() -> None:
    model = llama(4)
    with sloth.accelerate(model, kernels="off") as acceleration:
        step(model, ids())
        assert acceleration.report.checkpointing["chosen"] == "left to the trainer"
        assert not any(
            layer.__dict__.get("gradient_checkpointing") for layer in execute.decoder_layers(model)
        )


def test_a_budget_that_does_not_hold_the_weights_is_an_error_before_training() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"memory_budget_bytes=.*: weights and the optimizer's state alone"):
        sloth.accelerate(model, kernels="off", memory_budget_bytes=1000)
    assert "gradient_checkpointing" not in execute.decoder_layers(model)[0].__dict__


@pytest.mark.parametrize("strict", [False, True])
def test_a_batch_beyond_the_budget(strict: bool) -> None:
    model = llama()
    given = budget(model, 0.0)
    settings = sloth.Settings(kernels="off", memory_budget_bytes=given, strict=strict)
    with sloth.accelerate(model, settings) as acceleration:
        if strict:
            with pytest.raises(ValueError, match="16 x 64 tokens need at least"):
                step(model, ids(16, 64))
        else:
            with pytest.warns(UserWarning, match="16 x 64 tokens need at least .*the smallest plan is used"):
                step(model, ids(16, 64))
            assert "need at least" in acceleration.report.checkpointing["note"]


def test_a_model_that_cannot_be_planned_is_left_to_its_trainer() -> None:
    model = tiny_model("llama").model.layers[0]
    with pytest.warns(UserWarning, match="memory_budget_bytes is not used"):
        acceleration = sloth.accelerate(model, kernels="off", memory_budget_bytes="1GiB")
    assert acceleration.report.checkpointing["chosen"] == "left to the trainer"
    acceleration.undo()


@pytest.mark.parametrize("theirs", [False, True])
def test_in_the_hf_trainer(theirs: bool, tmp_path: Any) -> None:
    from sloth_hf_trainer import SlothCallback
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(8, 12)]
    losses = []
    for planned_too in (False, True):
        model = llama(4, 0.2)
        options: dict[str, Any] = {"memory_budget_bytes": budget(model, 0.4)} if planned_too else {}
        callback = SlothCallback(kernels="off", **options)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, seed=1,
            report_to=[], save_strategy="no", use_cpu=True, gradient_checkpointing=theirs and planned_too,
            gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        if planned_too:
            assert callback.acceleration is not None
            record = callback.acceleration.report.checkpointing
            assert record["plans"] == 1 and set(record["plan"]["layers"]) != {"keep"}
            assert ("gives way to the plan" in record["reason"]) == theirs
            callback.acceleration.undo()
            layers = execute.decoder_layers(model)
            assert any(layer.gradient_checkpointing for layer in layers) == theirs
    assert losses[0] == losses[1] and len(losses[0]) == 3
