"""The head without its logits: losses, gradients, values as without it; what ran fused; what is left out."""

from __future__ import annotations

import copy
import gc
import io
import secrets
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    VOCABULARY,
    batch,
    counting_kernels,
    forwards,
    loss_and_gradients,
    make_plugin,
    manager_with,
    no_sloth_warnings,
    patched_ops,
    reasons,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn

import sloth_plugins as sloth
from sloth_plugins import head as planning
from sloth_plugins.head import DeferredLogits
from sloth_plugins.numerics import bound, relative_error
from sloth_plugins.settings import OPS
from sloth_plugins.specs import KernelSpec

GPU = torch.cuda.is_available()
OP = "linear_cross_entropy"
OTHERS = [op for op in OPS if op not in (OP, "linear_log_probs")]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": dict(final_logit_softcapping=0.5),
    "gemma3_text": dict(final_logit_softcapping=0.7),
    "cohere2": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=3.0),
    "qwen3_moe": dict(output_router_logits=True, router_aux_loss_coef=0.3),
    "gpt2": dict(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


def make(family: str, **changes: Any) -> Any:
    """A tiny model; gpt2 and mixtral beside those of the helpers."""
    options = {**MODELS.get(family, {}), **changes}
    if family not in ("gpt2", "mixtral"):
        return tiny_model(family, **options)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **options)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def calls() -> Iterator[Counter[str]]:
    with counting_kernels() as counted:
        yield counted


@pytest.fixture
def matmuls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often logits were computed: by a head's values, or by a head's own forward."""
    counted: Counter[str] = Counter()
    whole, linear = planning._Root.head, nn.Linear.forward

    def values(self: Any, x: torch.Tensor, *weight: Any) -> torch.Tensor:
        counted["values"] += 1
        return whole(self, x, *weight)

    def own(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == VOCABULARY:
            counted["own"] += 1
        return linear(self, x)

    monkeypatch.setattr(planning._Root, "head", values)
    monkeypatch.setattr(nn.Linear, "forward", own)
    return counted


def accelerate(model: Any, **settings: Any) -> sloth.Acceleration:
    """With the head alone, so that what differs is the head's."""
    return sloth.accelerate(model, **{"disable": OTHERS, "strict": True, **settings})


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
    assert error <= tolerance, error


def masked(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = batch(model)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6] = -100
    return ids, labels


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("items", [None, 5, torch.tensor(7)], ids=["mean", "5 items", "tensor of items"])
def test_a_models_own_loss(family: str, items: Any, calls: Counter[str], matmuls: Counter[str]) -> None:
    model = make(family).train()
    ids, labels = masked(model)
    extra = {} if items is None or family == "bert" else {"num_items_in_batch": items}

    def step() -> tuple[Any, dict[str, torch.Tensor]]:
        model.zero_grad()
        outputs = model(input_ids=ids, labels=labels, **extra)
        outputs.loss.backward()
        return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want, gradients = step()
    keys = list(model.state_dict())
    acceleration = accelerate(model)
    (row,) = acceleration.report.patched
    assert row.op == OP and row.max_rel_error is not None and row.eager_rel_error is not None
    assert list(model.state_dict()) == keys
    calls.clear(), matmuls.clear()
    got, patched = step()
    assert calls == {OP: 1} and not matmuls
    assert type(got.logits) is DeferredLogits and got.logits.shape == want.logits.shape
    close(got.loss, want.loss)
    assert patched.keys() == gradients.keys()
    scale = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():  # a key's bias has a gradient of rounding alone
        assert (patched[name] - gradient).norm() <= 2e-5 * (gradient.norm() + 0.01 * scale), name
    close(got.logits.detach() + 0, want.logits.detach())
    assert matmuls == {"values": 1}
    if family == "qwen3_moe":
        close(got.aux_loss, want.aux_loss)
    acceleration.undo()
    again, _ = step()
    assert torch.equal(again.loss, want.loss) and type(again.logits) is torch.Tensor and not forwards(model)


def _next(labels: torch.Tensor) -> torch.Tensor:
    """Labels shifted as a model shifts them."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def _packed(ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Three sequences in each row; the first token of each has no label."""
    lengths = [5, 7, ids.shape[1] - 12]
    labels = labels.clone()
    labels[:, [0, 5, 12]] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).expand_as(ids)
    return dict(labels=labels, position_ids=positions)


def _but_one(labels: torch.Tensor) -> torch.Tensor:
    found = torch.full_like(labels, -100)
    found[0, 3] = labels[0, 3].clamp_min(5)
    return found


# Family, what the forward is given (ids, labels), and what becomes of the logits.
Given = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]
LOSSES: dict[str, tuple[str, dict[str, Any], Given, Callable[[torch.Tensor], torch.Tensor]]] = {
    "labels": ("llama", {}, lambda i, y: dict(labels=y), lambda z: z),
    "tied": ("llama", dict(tie_word_embeddings=True), lambda i, y: dict(labels=y), lambda z: z),
    "odd": ("llama", dict(vocab_size=1031), lambda i, y: dict(labels=y), lambda z: z),
    "soft cap, tied": ("gemma2", {}, lambda i, y: dict(labels=y), lambda z: torch.tanh(z / 0.5) * 0.5),
    "scale": ("cohere2", {}, lambda i, y: dict(labels=y), lambda z: z * 0.25),
    "divided": ("granite", {}, lambda i, y: dict(labels=y), lambda z: z / 3.0),
    "items": ("llama", {}, lambda i, y: dict(labels=y, num_items_in_batch=11), lambda z: z),
    "tensor of items": (
        "llama", {}, lambda i, y: dict(labels=y, num_items_in_batch=torch.tensor(11)), lambda z: z,
    ),
    "shift_labels": ("llama", {}, lambda i, y: dict(labels=i, shift_labels=y.roll(-2, 1)), lambda z: z),
    "ignore_index": (
        "llama", {}, lambda i, y: dict(labels=y.where(y != -100, 3), ignore_index=3), lambda z: z,
    ),
    "packing": ("llama", {}, _packed, lambda z: z),
    "one token": ("llama", {}, lambda i, y: dict(labels=_but_one(y)), lambda z: z),
}  # fmt: skip


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_against_float64(case: str, trained: bool, calls: Counter[str]) -> None:
    """Other numbers in each run. The truth starts at the hidden states that the head was given."""
    family, changes, given, change = LOSSES[case]
    seed = secrets.randbelow(2**31)
    model = make(family, seed=seed, **changes).train()
    weight = model.get_output_embeddings().weight.requires_grad_(trained)
    ids = batch(model, seed=seed, rows=2, tokens=17)
    labels = torch.where(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3, -100, ids
    )
    inputs = given(ids, labels)
    seen: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.get_decoder().norm.register_forward_hook(keep)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, **inputs).loss
        loss.backward()
        own = [weight.grad.clone()] if trained and not model.config.tie_word_embeddings else []
        return [loss.detach(), seen[-1].grad, *own]

    eager = step()
    accelerate(model)
    calls.clear()
    patched = step()
    assert calls == {OP: 1}
    x, w = (t.detach().double().requires_grad_() for t in (seen[-1], weight))
    wanted = inputs.get("shift_labels", _next(inputs["labels"]))
    ignore, items = inputs.get("ignore_index", -100), inputs.get("num_items_in_batch")
    if ignore != -100:
        wanted = F.pad(inputs["labels"], (0, 1), value=ignore)[:, 1:]
    loss = F.cross_entropy(
        change(x @ w.t()).flatten(0, 1), wanted.flatten(), ignore_index=ignore, reduction="sum"
    )
    loss = loss / ((wanted != ignore).sum() if items is None else items)
    truth = [loss.detach(), *torch.autograd.grad(loss, [x, w])]
    for name, got, plain, exact in zip(("loss", "dx", "dW"), patched, eager, truth, strict=False):
        error, eagers = relative_error(got, exact), relative_error(plain, exact)
        assert error <= bound(eagers), (seed, name, error, eagers)


@pytest.mark.parametrize("items", ["number", "tensor"])
def test_gradient_accumulation_weighs_tokens(items: str, calls: Counter[str]) -> None:
    """1 x 8 = 2 x 4 = 8 x 1 to float32's rounding, though rows have one to nine labels."""
    model = make("llama").train()
    ids = batch(model, rows=8, tokens=10)
    labels = torch.where(torch.arange(10) < torch.arange(8)[:, None] + 1, -100, ids)
    count = int((labels[:, 1:] != -100).sum())
    accelerate(model)
    calls.clear()
    results = []
    for parts in (1, 2, 8):
        model.zero_grad()
        total = torch.zeros(())
        for some, wanted in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
            number = count if items == "number" else torch.tensor(count)
            loss = model(input_ids=some, labels=wanted, num_items_in_batch=number).loss
            loss.backward()
            total += loss.detach()
        results.append([total, *(p.grad.clone() for p in model.parameters())])
    assert calls == {OP: 11}
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            close(got, want, 2e-6)


def test_all_labels_ignored_and_labels_already_shifted(calls: Counter[str]) -> None:
    model = make("llama")
    ids = batch(model)
    none = torch.full_like(ids, -100)
    want = model(input_ids=ids, labels=ids, shift_labels=ids.roll(-2, 1)).loss
    accelerate(model)
    calls.clear()
    close(model(input_ids=ids, labels=ids, shift_labels=ids.roll(-2, 1)).loss, want)
    assert model(input_ids=ids, labels=none).loss.isnan()
    assert model(input_ids=ids, labels=none, num_items_in_batch=4).loss == 0
    assert calls == {OP: 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, calls: Counter[str], matmuls: Counter[str]) -> None:
    model = make("llama").to(dtype)
    ids, labels = masked(model)
    context = torch.autocast("cpu", dtype=torch.bfloat16)

    def step() -> tuple[Any, torch.Tensor]:
        model.zero_grad()
        with context:
            outputs = model(input_ids=ids, labels=labels)
        outputs.loss.backward()
        return outputs, model.lm_head.weight.grad.clone()

    want, gradient = step()
    accelerate(model)
    calls.clear(), matmuls.clear()
    got, patched = step()
    assert calls == {OP: 1} and not matmuls
    assert got.logits.dtype == want.logits.dtype == torch.bfloat16
    close(got.loss, want.loss, 1e-3)
    close(patched, gradient, 2e-2)
    assert torch.equal(
        got.logits.detach() + 0, want.logits
    )  # under another autocast state than the forward's


ANSWERED: dict[str, Callable[[Any, Any], Any]] = {
    "shift by hand": lambda d, y: F.cross_entropy(
        d[..., :-1, :].contiguous().view(-1, VOCABULARY), y[..., 1:].contiguous().view(-1)
    ),
    "flatten": lambda d, y: nn.CrossEntropyLoss(reduction="sum")(d.float().flatten(0, 1), y.flatten()),
    "every option": lambda d, y: F.cross_entropy(
        d.reshape(-1, VOCABULARY),
        y.view(-1),
        label_smoothing=0.1,
        ignore_index=int(y[0, 0]),
        reduction="none",
    ).square(),
    "scale and cap": lambda d, y: F.cross_entropy(
        ((d * -2 / 3).tanh() * -1.5).view(-1, VOCABULARY), y.view(-1)
    ),
    "rows": lambda d, y: sum(F.cross_entropy(row, ids) for row, ids in zip(d, y, strict=True)),
    "chunks": lambda d, y: sum(
        F.cross_entropy(part, ids)
        for part, ids in zip(d.view(-1, VOCABULARY).split(5), y.view(-1).split(5), strict=True)
    ),
    "many dims": lambda d, y: F.cross_entropy(
        d[None].unsqueeze(-2).squeeze(0)[:, ::2, 0, :].reshape(-1, VOCABULARY), y[:, ::2].reshape(-1)
    ),
    "masked": lambda d, y: F.cross_entropy(d[y > 20], y[y > 20]),
    "picked": lambda d, y: F.cross_entropy(
        d[:, [1, 3]].transpose(0, 1).flatten(0, 1), y[:, [1, 3]].T.flatten()
    ),
    "nll_loss": lambda d, y: F.nll_loss(d.view(-1, VOCABULARY).log_softmax(-1), y.view(-1)),
    "log_softmax and gather": lambda d, y: d.log_softmax(-1).gather(-1, y[..., None]).square(),
    "many ids": lambda d, y: torch.gather(F.log_softmax(d, -1), -1, torch.stack([y, y - 1], -1)).square(),
    "gather": lambda d, y: torch.gather(d[:, :-1] / 0.7, dim=-1, index=y[:, 1:, None]).square(),
    "logsumexp": lambda d, y: torch.stack([torch.logsumexp(row, dim=-1) for row in d / 0.7]).square(),
    "scaled in place": lambda d, y: F.cross_entropy(d.div_(0.3).view(-1, VOCABULARY), y.view(-1)),
    "a view scaled in place": lambda d, y: torch.stack(
        [z.log_softmax(-1).gather(-1, y[:, 1:, None]) for z in (d[:, :-1, :][:, -7:].mul_(2).div_(0.7),)]
    ).square(),
    "checkpoint": lambda d, y: torch.utils.checkpoint.checkpoint(
        lambda z: F.cross_entropy(z.view(-1, VOCABULARY), y.view(-1)), d, use_reentrant=False
    ),
}
MATERIALISED: dict[str, Callable[[Any, Any], Any]] = {
    "square": lambda d, y: d * d,
    "class weights": lambda d, y: F.cross_entropy(
        d.view(-1, VOCABULARY), y.view(-1), weight=torch.linspace(0.1, 1, VOCABULARY)
    ),
    "probabilities": lambda d, y: F.cross_entropy(
        d.view(-1, VOCABULARY), F.one_hot(y.view(-1), VOCABULARY) * 0.5
    ),
    "classes second": lambda d, y: F.cross_entropy(d.transpose(1, 2), y),
    "part of the vocabulary": lambda d, y: d[..., 3:50].logsumexp(-1),
    "a base scaled through a view": lambda d, y: torch.stack(
        [d[:, :4].div_(0.3).sum(), d.float().logsumexp(-1).sum(), d[:, :4].sum()]
    ),
    "a copy before a scaled view, and a write after": lambda d, y: torch.cat(
        [(d * 1), (v := d[:, 2:]).div_(0.3).add_(1.0), v * 1, d * 1], 1
    ),
    "a scale of a copy": lambda d, y: F.cross_entropy(
        d[:, :-1].contiguous().div_(0.3).view(-1, VOCABULARY), y[:, 1:].reshape(-1)
    ),
    "a view written to": lambda d, y: (
        d.view(-1, VOCABULARY)[:, 3].fill_(-5.0),
        F.cross_entropy(d.view(-1, VOCABULARY), y.view(-1)),
    )[1],
    "an item set": lambda d, y: (
        d.__setitem__((slice(None), 2), 1.0),
        F.cross_entropy(d.view(-1, VOCABULARY), y.view(-1)),
    )[1],
    "one value a row": lambda d, y: d[torch.zeros_like(d, dtype=torch.bool).scatter(-1, y[..., None], True)],
    "a copy before a write": lambda d, y: torch.stack([d * 1, d.div_(2.0), d * 1]),
    "double": lambda d, y: F.cross_entropy(d.double().view(-1, VOCABULARY), y.view(-1)),
    "a tensor of a scale": lambda d, y: F.cross_entropy(
        (d * torch.tensor(2.0)).view(-1, VOCABULARY), y.view(-1)
    ),
    "entropy": lambda d, y: -(d.softmax(-1) * d.log_softmax(-1)).sum(-1),
    "plain tensors": lambda d, y: torch.cat([d, torch.zeros(2, 1, VOCABULARY)], 1).sin(),
}


@pytest.mark.parametrize("case", [*ANSWERED, *MATERIALISED])
def test_a_trainers_own_loss(case: str, calls: Counter[str], matmuls: Counter[str]) -> None:
    """Without labels: what a trainer computes from outputs.logits, and its gradients."""
    model = make("llama").train()
    ids = batch(model)
    function = {**ANSWERED, **MATERIALISED}[case]

    def step() -> tuple[Any, list[torch.Tensor]]:
        result = function(model(input_ids=ids).logits, ids)
        weights = torch.cos(torch.arange(result.numel())).reshape(result.shape)
        return result, torch.autograd.grad((result * weights).sum(), list(model.parameters()))

    want, gradients = step()
    accelerate(model)
    calls.clear(), matmuls.clear()
    got, patched = step()
    assert (matmuls["values"] > 0) == (case in MATERIALISED) and not matmuls["own"]
    assert bool(calls) == (case in ANSWERED and case != "gather")
    close(got.detach() + 0, want.detach())
    for mine, theirs in zip(patched, gradients, strict=True):
        assert (mine - theirs).norm() <= 2e-5 * (theirs.norm() + 1e-3)


READ: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda d: torch.from_numpy(d.numpy()),
    "array": lambda d: torch.from_numpy(__import__("numpy").asarray(d)),
    "tolist": lambda d: torch.tensor(d.tolist()),
    "item": lambda d: torch.tensor(d[1, 2, 3].item()),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "saved": lambda d: _saved(d),
    "repr": lambda d: torch.tensor(len(repr(d))),
    "data": lambda d: d.data + 0,
    "dlpack": torch.from_dlpack,
    "storage": lambda d: torch.tensor(d.untyped_storage().nbytes()),
    "pointer": lambda d: torch.tensor(d.data_ptr() != 0),
    "int": lambda d: (d * 100).int(),
    "facts": lambda d: torch.tensor([*d.shape, *d.stride(), d.ndim, d.numel(), d.is_leaf, d.element_size()]),
}


def _saved(d: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"logits": d}, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)["logits"]


@pytest.mark.parametrize("case", READ)
def test_reading_values(case: str) -> None:
    model = make("llama")
    ids = batch(model)
    want = READ[case](model(input_ids=ids).logits.detach())
    accelerate(model)
    logits = model(input_ids=ids).logits.detach()
    assert type(logits) is DeferredLogits
    got = READ[case](logits)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, want)


BY_ROW: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda d: d[:, :-1].argmax(-1),
    "max": lambda d: d.max(dim=-1).values,
    "topk": lambda d: d.topk(3).indices,
    "amax": lambda d: torch.amax(d, -1),
    "logsumexp": lambda d: d.float().logsumexp(2),
}


@pytest.mark.parametrize("case", BY_ROW)
def test_rows_are_answered_in_chunks(
    case: str, monkeypatch: pytest.MonkeyPatch, matmuls: Counter[str]
) -> None:
    model = make("cohere2")
    ids = batch(model)
    want = BY_ROW[case](model(input_ids=ids).logits.detach())
    accelerate(model)
    monkeypatch.setattr(planning, "CHUNK_BYTES", 4 * VOCABULARY * 5)
    matmuls.clear()
    logits = model(input_ids=ids).logits.detach()
    torch.testing.assert_close(BY_ROW[case](logits), want)
    assert matmuls["values"] in (3, 4) and logits._root.values is None


def test_the_autograd_facts_are_true() -> None:
    model = make("llama")
    ids = batch(model)
    accelerate(model)
    logits = model(input_ids=ids).logits
    assert logits.requires_grad and logits.grad_fn is not None and not logits.is_leaf
    assert not logits.detach().requires_grad and not logits.data.requires_grad
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.shape))
    F.cross_entropy(logits.view(-1, VOCABULARY), ids.view(-1)).backward()
    assert seen == [logits.shape]

    class Sink(torch.autograd.Function):
        """As DDP's: the identity, and something to do in the backward."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(gradient.shape)
            return gradient

    F.cross_entropy(Sink.apply(model(input_ids=ids).logits).view(-1, VOCABULARY), ids.view(-1)).backward()
    assert len(seen) == 2
    leaf = logits.detach()
    leaf.requires_grad = True
    F.cross_entropy(leaf.float().view(-1, VOCABULARY), ids.view(-1)).backward()
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("static", [False, True])
def test_ddp_gets_its_gradients(static: bool, calls: Counter[str], tmp_path: Path) -> None:
    """From the model's own loss, and from one computed of its logits outside."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    model = make("llama").train()
    ids = batch(model)
    _, gradients = loss_and_gradients(model, ids)
    accelerate(model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        wrapped = nn.parallel.DistributedDataParallel(
            model, static_graph=static, find_unused_parameters=not static
        )
        for labels in ({"labels": ids}, {}):
            model.zero_grad()
            outputs = wrapped(input_ids=ids, **labels)
            loss = outputs.loss
            if not labels:
                flat = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
                loss = F.cross_entropy(flat, ids[:, 1:].reshape(-1))
            loss.backward()
            for name, p in model.named_parameters():
                close(p.grad, gradients[name], 1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_when_nothing_is_deferred(calls: Counter[str]) -> None:
    model = make("llama").train()
    ids = batch(model)
    accelerate(model)
    hidden = model.model(ids).last_hidden_state
    assert type(model.lm_head(hidden)) is torch.Tensor  # not in the model's own forward
    with torch.no_grad():
        assert type(model(input_ids=ids).logits) is torch.Tensor
        assert type(model(input_ids=ids, labels=ids).logits) is DeferredLogits
    with torch.inference_mode():
        assert type(model(input_ids=ids, labels=ids).logits) is torch.Tensor
    want = model(input_ids=ids).logits.detach() + 0
    seen = []
    for hook in (model.lm_head.register_forward_hook, model.lm_head.register_full_backward_hook):
        handle = hook(lambda *_: seen.append(1))
        outputs = model(input_ids=ids, labels=ids)
        assert type(outputs.logits) is torch.Tensor and torch.equal(outputs.logits, want)
        outputs.loss.backward()
        handle.remove()
    assert len(seen) == 2
    for p in model.parameters():
        p.requires_grad_(False)
    assert type(model(input_ids=ids).logits) is torch.Tensor
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 10)


def test_torch_compile_takes_the_plain_path(calls: Counter[str]) -> None:
    model = make("llama").train()
    ids = batch(model)
    want = model(input_ids=ids, labels=ids).loss
    accelerate(model)
    calls.clear()
    outputs = torch.compile(model, backend="eager", fullgraph=False)(input_ids=ids, labels=ids)
    close(outputs.loss, want)
    assert type(outputs.logits) is torch.Tensor and not calls


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def fused_adamw(parameters: Any) -> torch.optim.Optimizer:
    """It raises no parameter's version, and it is the HF Trainer's default."""
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the logits were too large to be computed unasked before a step."""
    monkeypatch.setattr(planning, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("optimizer", [sgd, fused_adamw])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2's head is its embedding
def test_small_logits_are_right_after_an_optimizer_step(family: str, optimizer: Any) -> None:
    model = make(family).train()
    ids = batch(model)
    want = model(input_ids=ids).logits.detach()
    report = accelerate(model).report
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    optimizer(model.parameters()).step()
    with no_sloth_warnings():
        close(outputs.logits.detach() + 0, want)
        assert torch.equal(outputs.logits.argmax(-1), want.argmax(-1))
        flat = outputs.logits.detach()[:, :-1].reshape(-1, VOCABULARY)
        close(F.cross_entropy(flat, ids[:, 1:].reshape(-1)), outputs.loss.detach())
    assert report.head["lm_head"]["late"] == 0 and report.head["lm_head"]["materialised"] == 1


def test_a_step_computes_nothing_for_logits_that_nobody_holds(matmuls: Counter[str]) -> None:
    model = make("llama").train()
    ids = batch(model)
    accelerate(model)
    optimizer = fused_adamw(model.parameters())
    matmuls.clear()
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert not matmuls
    # What a frozen head gives is right at any time.
    model.lm_head.weight.requires_grad_(False)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    optimizer.step()
    assert not matmuls and not outputs.logits._root.late()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("optimizer", [sgd, fused_adamw])
def test_a_late_read_says_so_and_ends_nothing(optimizer: Any) -> None:
    model, eager = make("llama").train(), make("llama").train()
    ids = batch(model)
    report = accelerate(model, strict=False).report
    counts = report.head["lm_head"]
    optimizers = [optimizer(m.parameters()) for m in (model, eager)]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, read after the step; with an optimizer's own state the two models stay as one."""
        logits = []
        for m, o in zip((model, eager), optimizers, strict=True):
            m.zero_grad()
            outputs = m(input_ids=ids, labels=ids)
            outputs.loss.backward()
            o.step()
            logits.append(outputs.logits)
        return logits[0], logits[1]

    late, _ = step()
    with torch.no_grad():
        now = F.linear(late._root.x, model.lm_head.weight)
    with pytest.warns(UserWarning, match=r"^sloth: outputs\.logits were read .* head_loss='off'") as caught:
        close(late.argmax(-1).float(), now.argmax(-1).float(), 0)
        close(late.detach() + 0, now)
        loss = F.cross_entropy(late.view(-1, VOCABULARY), ids.view(-1))
        close(loss.detach(), F.cross_entropy(now.view(-1, VOCABULARY), ids.view(-1)))
    assert len([w for w in caught if str(w.message).startswith("sloth:")]) == 1 and counts["late"] == 1
    if optimizer is sgd:  # as eager's: the weights that the gradient needs are gone
        with pytest.raises(RuntimeError, match="changed in place"):
            loss.backward()
    with no_sloth_warnings():
        for _ in range(2):  # from now on they are right, and the loss is still fused
            fused = counts["fused"]
            got, want = step()
            close(got.detach() + 0, want.detach(), 2e-3)  # three steps of one rounding more or less
            assert counts["fused"] == fused + 1 and counts["late"] == 1


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("optimizer", [sgd, fused_adamw])
def test_a_late_read_raises_where_settings_are_strict(optimizer: Any) -> None:
    model = make("llama")
    ids = batch(model)
    accelerate(model)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    optimizer(model.parameters()).step()
    for read in (lambda d: d.sum(), lambda d: d.argmax(-1), lambda d: d.logsumexp(-1)):
        with pytest.raises(
            RuntimeError, match=r"read outputs\.logits before the step, or set head_loss='off'"
        ):
            read(outputs.logits)


@pytest.mark.parametrize("optimizer", [sgd, fused_adamw])
def test_a_step_that_calls_its_forward_itself(optimizer: Any) -> None:
    """As Lightning's do: no hook comes between the forward and the new weights."""
    model = make("llama").train()
    ids = batch(model)
    report = accelerate(model, strict=False).report
    made = optimizer(model.parameters())
    kept: list[Any] = []

    def closure() -> torch.Tensor:
        model.zero_grad()
        kept.append(model(input_ids=ids, labels=ids))
        kept[-1].loss.backward()
        return kept[-1].loss.detach()

    made.step(closure)
    with pytest.warns(UserWarning, match=r"^sloth: outputs\.logits were read"):
        assert kept[0].logits.detach().isfinite().all()
    with torch.no_grad():
        wanted = F.linear(kept[0].logits._root.x, model.lm_head.weight)
    close(kept[0].logits.detach() + 0, wanted)
    weight = model.lm_head.weight.detach().clone()
    made.step(closure)
    with no_sloth_warnings():
        close(kept[1].logits.detach() + 0, F.linear(kept[1].logits._root.x, weight).detach())
    assert report.head["lm_head"]["late"] == 1


def test_no_memory_for_logits_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    ids = batch(model)
    accelerate(model)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(planning._Root, "whole", full)
        sgd(model.parameters()).step()
    assert outputs.logits._root.late()


def test_nothing_is_kept_alive() -> None:
    model = make("llama")
    ids = batch(model)
    acceleration = accelerate(model)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    hidden = weakref.ref(outputs.logits._root.x)
    gc.disable()  # by reference counting alone
    try:
        del outputs
        assert hidden() is None
    finally:
        gc.enable()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and acceleration.model is None


def test_a_deep_copy_works(calls: Counter[str]) -> None:
    model = make("llama")
    ids = batch(model)
    accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    calls.clear()
    one, two = model(input_ids=ids, labels=ids), twin(input_ids=ids, labels=ids)
    assert calls == {OP: 2} and one.loss != two.loss
    close(two.logits.detach() + 0, 2 * one.logits.detach())


# Planning


def test_settings_switch_it_off() -> None:
    for settings, reason in (
        (dict(head_loss="off"), "switched off by the setting head_loss='off'"),
        (dict(disable=[OP]), f"switched off by the setting disable={OP!r}"),
    ):
        model = make("llama")
        report = sloth.accelerate(model, strict=True, **settings).report
        assert OP not in patched_ops(report).values() and "lm_head" not in forwards(model)
        assert reasons(report)["lm_head", OP] == reason


def test_without_log_probs_only_the_loss_is_answered(calls: Counter[str], matmuls: Counter[str]) -> None:
    model = make("llama")
    ids = batch(model)
    accelerate(model, disable=[*OTHERS, "linear_log_probs"])
    calls.clear(), matmuls.clear()
    model(input_ids=ids).logits.log_softmax(-1).gather(-1, ids[..., None]).sum().backward()
    assert not calls and matmuls["values"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(target_modules=["lm_head", "q_proj"]), "PEFT's Linear is around it"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "ModulesToSaveWrapper"),
        (dict(target_modules=["q_proj", "down_proj"]), None),
    ],
    ids=["lora on it", "trained in full", "elsewhere"],
)
def test_peft(options: dict[str, Any], reason: str | None, calls: Counter[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        make("llama"), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    )
    ids = batch(model)
    loss, gradients = loss_and_gradients(model, ids)
    acceleration = accelerate(model)
    calls.clear()
    got, patched = loss_and_gradients(model, ids)
    close(got, loss)
    for name, gradient in gradients.items():
        close(patched[name], gradient, 1e-4)
    assert patched.keys() == gradients.keys()
    if reason is None:
        assert patched_ops(acceleration.report) == {"base_model.model.lm_head": OP} and calls == {OP: 1}
    else:
        assert any(reason in why for (_, op), why in reasons(acceleration.report).items() if op == OP)
        assert not calls
    acceleration.undo()
    assert torch.equal(loss_and_gradients(model, ids)[0], loss)


@pytest.mark.parametrize("bias", [False, True])
def test_a_4bit_head(bias: bool, calls: Counter[str]) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = make("llama").train()
    head = bnb.nn.Linear4bit(32, VOCABULARY, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    weight = bnb.nn.Params4bit(model.lm_head.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    head.weight, head.support_avx512bf16_for_cpu = weight.to("cpu"), False
    model.lm_head = head
    ids, labels = masked(model)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        outputs = model(input_ids=ids, labels=labels)
        outputs.loss.backward()
        return [outputs.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    want = step()
    logits = model(input_ids=ids).logits
    acceleration = accelerate(model)
    assert patched_ops(acceleration.report) == {"lm_head": OP}
    calls.clear()
    for got, wanted in zip(step(), want, strict=True):
        close(got, wanted, 2e-5)
    assert calls == {OP: 1}
    deferred = model(input_ids=ids).logits
    close(deferred[:, :-1].argmax(-1).float(), logits[:, :-1].argmax(-1).float())
    close(deferred.gather(-1, ids[..., None]).detach(), logits.gather(-1, ids[..., None]).detach())
    gradients = [torch.autograd.grad((z**2).sum(), model.model.norm.weight)[0] for z in (deferred, logits)]
    close(*gradients, 2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it computes in float32 all the same
        assert type(model(input_ids=ids, labels=labels).logits) is torch.Tensor
    counts = acceleration.report.to_dict()["head"]["lm_head"]
    assert counts == dict(deferred=2, own_forward=1, fused=1, in_chunks=1, materialised=1, late=0)


def test_what_the_head_did_is_counted() -> None:
    model = make("llama").train()
    ids = batch(model)
    report = accelerate(model).report
    assert report.head_line().startswith("lm_head: the patch stood idle")
    assert "head:" not in str(report)
    outputs = model(input_ids=ids, labels=ids)
    outputs.logits.argmax(-1)
    outputs.logits.exp()
    with torch.no_grad():
        model(input_ids=ids)
    counts = dict(deferred=1, own_forward=1, fused=1, in_chunks=1, materialised=1, late=0)
    assert report.to_dict()["head"] == {"lm_head": counts}
    line = "lm_head: 1 fused, 1 in chunks, 1 from all logits; 1 calls of its own forward"
    assert report.head_line() == line and f"head: {line}" in str(report)


def test_a_frozen_head_gets_no_gradient(calls: Counter[str]) -> None:
    model = make("llama", tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(False)
    ids = batch(model)
    loss, gradients = loss_and_gradients(model, ids)
    accelerate(model)
    calls.clear()
    got, patched = loss_and_gradients(model, ids)
    assert calls == {OP: 1} and "lm_head.weight" not in patched and patched.keys() == gradients.keys()
    close(got, loss)
    model(input_ids=ids).logits.square().mean().backward()
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is not None


@pytest.mark.parametrize(
    "wrong", ["loss", "gradient", "ignored labels", "raises"], ids=lambda name: name.replace(" ", "-")
)
def test_a_wrong_kernel_is_not_used(wrong: str) -> None:
    from sloth_kernels.linear_cross_entropy import linear_cross_entropy_reference as right

    def kernel(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("no such device")
        if wrong == "gradient":
            hidden = hidden + 0.01 * (hidden - hidden.detach())
        if wrong == "ignored labels":
            labels = labels.clamp_min(0)
        return right(hidden, weight, labels, **options) * (1.001 if wrong == "loss" else 1)

    spec = KernelSpec(
        op=OP,
        name="wrong",
        backend="wrong",
        function=kernel,
        reference=right,
        device_types=frozenset({"cpu"}),
    )
    manager = manager_with(wrong=make_plugin(sloth_register_kernels=lambda: [spec]))
    model = make("llama")
    with pytest.warns(UserWarning, match="wrong"):
        report = accelerate(model, strict=False, manager=manager).report
    assert not report.patched and not forwards(model)
    assert reasons(report)["lm_head", OP].startswith("wrong")


class Another(nn.Module):
    """A language model whose loss is not the cross-entropy of its logits, or has other inputs."""

    def __init__(self, squares: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.squares = squares

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        logits = self.head(self.embedding(input_ids))
        if not self.squares:
            return logits
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(loss=logits.square().mean(), logits=logits)


def test_a_model_that_is_nobodys() -> None:
    report = accelerate(Another(squares=True)).report
    assert reasons(report)["head", OP] == "the model's loss is not the cross-entropy of its logits"
    model = Another(squares=False)  # its trainer computes the loss
    accelerate(model)
    ids = torch.randint(0, 20, (2, 6))
    logits = model(ids)
    loss = F.cross_entropy(logits.view(-1, 20), ids.view(-1))
    assert type(logits) is DeferredLogits and logits._root.values is None
    loss.backward()
    want = F.cross_entropy(
        F.linear(model.embedding(ids), model.head.weight, model.head.bias).view(-1, 20), ids.view(-1)
    )
    close(loss.detach(), want.detach())
    close(model.head.bias.grad, torch.autograd.grad(want, model.head.bias)[0])


# Trainers


def rows(n: int = 8, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    data = [torch.randint(3, VOCABULARY, (length,), generator=generator) for _ in range(n)]
    return [{"input_ids": ids, "labels": torch.where(ids > 90, -100, ids)} for ids in data]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_hf_trainer(tmp_path: Path, bf16: bool, calls: Counter[str], matmuls: Counter[str]) -> None:
    from transformers import Trainer, TrainingArguments

    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"seen": 1.0}

    def run(patched: bool) -> Any:
        model = make("llama")
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=bf16, max_steps=3, logging_steps=1,
            per_device_train_batch_size=2, per_device_eval_batch_size=4, gradient_accumulation_steps=2,
            save_strategy="no", disable_tqdm=True, seed=0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=args, train_dataset=rows(), eval_dataset=rows(4), compute_metrics=metrics
        )
        if patched:
            accelerate(model)
        calls.clear(), matmuls.clear()
        trainer.train()
        if patched:
            assert calls == {OP: 6} and not matmuls
        trainer.evaluate()
        if patched:
            assert calls == {OP: 7} and matmuls == {"values": 1}
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    want, got = run(False), run(True)
    assert len(got) == 3 and got == pytest.approx(want, rel=5e-3 if bf16 else 1e-5)
    assert seen[0].shape == (4, 12, VOCABULARY)
    torch.testing.assert_close(*map(torch.from_numpy, seen), rtol=0, atol=2e-2 if bf16 else 1e-5)


def test_the_hf_trainer_accumulates(tmp_path: Path) -> None:
    """One batch of 8 = 2 of 4 = 8 of 1: the Trainer counts the labels of them all, the loss is over these."""
    from transformers import Trainer, TrainingArguments

    weights = []
    for size, parts in ((8, 1), (4, 2), (1, 8)):
        model = make("llama")
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, learning_rate=0.1, optim="sgd",
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, save_strategy="no",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=rows(16))
        report = accelerate(model).report
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        trainer.train()
        assert report.head["lm_head"]["fused"] == 2 * parts
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    for other in weights[1:]:
        close(other, weights[0], 1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_callback_that_keeps_outputs(
    optim: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Logits are read after each step; only the first of large ones are not what they are without us."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if size == "large":
        monkeypatch.setattr(planning, "CHUNK_BYTES", 0)

    class Keeping(Trainer):
        """Keeps what the last forward gave, as one does for a metric of the training data."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, self.kept = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (loss, self.kept) if return_outputs else loss

    class Reading(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            read.append(trainer.kept.logits.detach() + 0)

    found = []
    for patched in (False, True):
        read: list[torch.Tensor] = []
        model = make("llama")
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=4, learning_rate=1e-2,
            per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, seed=0, optim=optim,
        )  # fmt: skip
        trainer = Keeping(model=model, args=args, train_dataset=rows(), callbacks=[Reading()])
        if patched:
            report = accelerate(model, strict=False).report
        trainer.train()
        assert trainer.state.global_step == 4
        found.append(read)
    off = [((ours - theirs).norm() / theirs.norm()).item() for theirs, ours in zip(*found, strict=True)]
    assert len(off) == 4 and max(off[1:]) < 1e-3
    said = [w for w in recwarn if "read for the first time after" in str(w.message)]
    if size == "small":
        assert off[0] < 1e-5 and not said and report.head["lm_head"]["late"] == 0
    else:
        assert off[0] > 1e-2 and len(said) == 1 and report.head["lm_head"]["late"] == 1


@pytest.mark.parametrize("show", [True, False])
def test_the_callback_says_which_way_the_losses_took(
    show: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sloth_hf_trainer import SlothCallback
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, per_device_train_batch_size=2,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = SlothCallback(disable=OTHERS, show_report=show)
    Trainer(model=make("llama"), args=args, train_dataset=rows(), callbacks=[callback]).train()
    line = "sloth head lm_head: 2 fused, 0 in chunks, 0 from all logits; 0 calls of its own forward"
    assert (line in capsys.readouterr().err.splitlines()) == show


TEXTS = ["the sloth hangs", "it sleeps all day long", "and eats a leaf", "slowly"]
PAIRS = {"prompt": ["a ", "b ", "c ", "d "], "chosen": TEXTS, "rejected": TEXTS[::-1]}
LABELLED = {"prompt": PAIRS["prompt"], "completion": TEXTS, "label": [True, False, True, False]}
SAMPLED = dict(num_generations=2, max_completion_length=4)
CHATS = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": t}] for t in TEXTS]}
SIMPO = dict(loss_type="simpo", cpo_alpha=0.5)
# Trainer, its options, data, whether on an adapter (the reference is then the model with its adapters off),
# and what TRL asks of the head: "tiled" where newer versions have one of their own that reads the weight.
TRAINERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool, str]] = {
    "sft": ("trl.SFT", {}, {"text": TEXTS}, False, "tiled"),
    "sft of logits": ("trl.SFT", dict(loss_type="nll"), {"text": TEXTS}, False, "tiled"),
    "sft, dft": ("trl.SFT", dict(loss_type="dft"), {"text": TEXTS}, False, "tiled"),
    "dpo": ("trl.DPO", {}, PAIRS, True, "tiled"),
    "dpo in full": ("trl.DPO", {}, PAIRS, False, "tiled"),
    "kto": ("trl.KTO", {}, LABELLED, True, "tiled"),
    "kto in full": ("trl.KTO", {}, LABELLED, False, "tiled"),
    "cpo": ("trl.experimental.cpo.CPO", {}, PAIRS, False, "log-probabilities"),
    "cpo, simpo": ("trl.experimental.cpo.CPO", SIMPO, PAIRS, True, "log-probabilities"),
    "orpo": ("trl.experimental.orpo.ORPO", {}, PAIRS, True, "log-probabilities"),
    "orpo in full": ("trl.experimental.orpo.ORPO", {}, PAIRS, False, "log-probabilities"),
    "tpo": ("trl.experimental.tpo.TPO", {}, {**PAIRS, "reference": TEXTS}, False, "both"),
    "gkd": ("trl.experimental.gkd.GKD", dict(lmbda=0.0), CHATS, False, "logits"),
    "grpo": ("trl.GRPO", dict(beta=0.1, **SAMPLED), {"prompt": TEXTS}, True, "tiled"),
    "grpo in full": ("trl.GRPO", dict(beta=0.1, **SAMPLED), {"prompt": TEXTS}, False, "tiled"),
    "rloo": ("trl.RLOO", SAMPLED, {"prompt": TEXTS}, True, "tiled"),
    "rloo in full": ("trl.RLOO", SAMPLED, {"prompt": TEXTS}, False, "tiled"),
    "reward": ("trl.Reward", {}, PAIRS, False, "no head"),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_trl(case: str, tmp_path: Path) -> None:
    """Losses and what was learned are those of a run without us, and the report says which way they took."""
    pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForSequenceClassification
    from trl.trainer import utils

    where, changes, data, adapter, way = TRAINERS[case]
    path, _, name = where.rpartition(".")
    module = pytest.importorskip(path, reason=f"this TRL has no {where}Trainer")
    # On a GPU where there is one: TRL 1.15 gives tensors on a CPU to its Triton kernel there.
    options = dict(
        output_dir=str(tmp_path), use_cpu=not GPU, report_to=[], bf16=False, max_steps=2, logging_steps=1,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, seed=0, learning_rate=1e-3,
        gradient_checkpointing=False, **changes,
    )  # fmt: skip
    saved = str(tmp_path / "model")  # a reference of its own is loaded by name
    make("llama").save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)

    def run(patched: bool) -> tuple[list[float], torch.Tensor, sloth.Report | None, dict[str, Any]]:
        model: Any = saved
        if case == "reward":
            model = make("llama")
            model.config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(model.config)
        given: dict[str, Any] = dict(processing_class=tiny_tokenizer())
        if adapter:
            targets = ["q_proj", "down_proj"]
            torch.manual_seed(0)  # TRL makes the adapter before the Trainer sets its seed
            given["peft_config"] = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        if changes.keys() & SAMPLED.keys():
            given["reward_funcs"] = lambda completions, **_: [
                float(sum(map(ord, t)) % 7) for t in completions
            ]
        if name == "GKD":
            given["teacher_model"] = make("llama", seed=5)
        args = getattr(module, f"{name}Config")(**options)
        dataset = datasets.Dataset.from_dict(data)
        if name not in ("GRPO", "RLOO"):  # whose evaluation samples
            given["eval_dataset"] = dataset
        trainer = getattr(module, f"{name}Trainer")(model, args=args, train_dataset=dataset, **given)
        report = accelerate(trainer.model, strict=False).report if patched else None
        weights = list(trainer.model.parameters())
        before = [p.detach().cpu().clone() for p in weights]
        trainer.train()
        learned = torch.cat([(p.detach().cpu() - b).flatten() for p, b in zip(weights, before, strict=True)])
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        counts = {} if report is None else {name: dict(of) for name, of in report.head.items()}
        if "eval_dataset" in given:
            losses.append(trainer.evaluate()["eval_loss"])
        return losses, learned, report, counts

    want, moved, *_ = run(False)
    got, learned, report, head = run(True)
    assert len(got) == len(want) >= 2 and report is not None and moved.any()
    if not (GPU and name in ("GRPO", "RLOO")):  # where a rounding may change a sampled token
        assert got == pytest.approx(want, rel=1e-3 if GPU else 1e-4, abs=1e-5)
        # AdamW makes the noise of a gradient near 0 a step like any other.
        close(learned, moved, 0.1 if GPU else 2e-3)
    tiled = hasattr(utils, "add_fused_lm_head")
    if way == "no head":
        assert not report.head and not report.patched
    elif case in ("sft", "gkd") and not tiled:
        why = {op: why for (_, op), why in reasons(report).items()}
        assert not report.head and why[OP] == "a forward on the model, of TRL's own head, computes its loss"
    else:
        (counts,) = head.values()
        assert counts["late"] == 0
        if tiled and way == "tiled":
            assert not any(counts[key] for key in ("deferred", "fused", "in_chunks", "materialised"))
            assert report.head["lm_head" if not adapter else "base_model.model.lm_head"]["fused"] == 0
        else:
            assert counts["deferred"] == 2
            assert counts["fused"] >= 2 or way == "logits"
            # The entropy of so few tokens is one chunk of the values.
            assert counts["materialised"] == (0 if way == "log-probabilities" else 2)


def test_trls_log_probabilities(calls: Counter[str], matmuls: Counter[str]) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    model = make("llama").train()
    ids = batch(model, rows=3, tokens=100)
    weights = torch.cos(torch.arange(297)).reshape(3, 99)

    def step() -> list[torch.Tensor]:
        logits = model(input_ids=ids).logits[:, :-1, :] / 0.7
        log_probs = utils.selective_log_softmax(logits, ids[:, 1:])
        with torch.no_grad():
            entropy = utils.entropy_from_logits(logits, chunk_size=64)
        gradients = torch.autograd.grad((log_probs * weights).sum(), list(model.parameters()))
        return [log_probs.detach(), entropy, *gradients]

    want = step()
    accelerate(model)
    calls.clear(), matmuls.clear()
    for got, wanted in zip(step(), want, strict=True):
        close(got, wanted, 2e-5)
    assert calls == {"linear_log_probs": 3} and matmuls == {"values": 5}  # a chunk of the entropy at a time
