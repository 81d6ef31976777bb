"""The head without its logits: losses, gradients, values as without it; what ran fused; what is left out."""

from __future__ import annotations

import copy
import gc
import io
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
    patched_ops,
    reasons,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn

import sloth_plugins as sloth
from sloth_plugins import head as planning
from sloth_plugins.head import DeferredLogits
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


def test_logits_after_an_optimizer_step() -> None:
    model = make("llama")
    ids = batch(model)
    accelerate(model)
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"read outputs\.logits before that, or set head_loss='off'"):
        outputs.logits.sum()


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
    assert counts == dict(deferred=2, own_forward=1, fused=1, in_chunks=1, materialised=1)


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
    counts = dict(deferred=1, own_forward=1, fused=1, in_chunks=1, materialised=1)
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
# Trainer, its options, data, whether on an adapter: the reference is the model with its adapters off.
TRAINERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "sft": ("trl.SFT", {}, {"text": TEXTS}, False),
    "sft of logits": ("trl.SFT", dict(loss_type="nll"), {"text": TEXTS}, False),
    "dpo": ("trl.DPO", {}, PAIRS, True),
    "kto": ("trl.KTO", {}, LABELLED, True),
    "cpo": ("trl.experimental.cpo.CPO", {}, PAIRS, False),
    "orpo": ("trl.experimental.orpo.ORPO", {}, PAIRS, True),
    "grpo": ("trl.GRPO", dict(beta=0.1, **SAMPLED), {"prompt": TEXTS}, True),
    "rloo": ("trl.RLOO", SAMPLED, {"prompt": TEXTS}, True),
    "reward": ("trl.Reward", {}, PAIRS, False),
}


@pytest.mark.parametrize("case", TRAINERS)
def test_trl(case: str, tmp_path: Path) -> None:
    """Newer versions have a tiled head of their own, which reads the weight: it still does, as is said."""
    pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForSequenceClassification
    from trl.trainer import utils

    where, changes, data, adapter = TRAINERS[case]
    path, _, name = where.rpartition(".")
    module = pytest.importorskip(path, reason=f"this TRL has no {where}Trainer")
    # On a GPU where there is one: TRL 1.15 gives tensors on a CPU to its Triton kernel there.
    options = dict(
        output_dir=str(tmp_path), use_cpu=not GPU, report_to=[], bf16=False, max_steps=2, logging_steps=1,
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, seed=0, learning_rate=1e-3,
        gradient_checkpointing=False, **changes,
    )  # fmt: skip

    def run(patched: bool) -> tuple[list[float], sloth.Report | None]:
        model = make("llama")
        if case == "reward":
            model.config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(model.config)
        given: dict[str, Any] = dict(processing_class=tiny_tokenizer())
        if adapter:
            targets = ["q_proj", "down_proj"]
            given["peft_config"] = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        if changes.keys() & SAMPLED.keys():
            given["reward_funcs"] = lambda completions, **_: [
                float(sum(map(ord, t)) % 7) for t in completions
            ]
        args = getattr(module, f"{name}Config")(**options)
        dataset = datasets.Dataset.from_dict(data)
        trainer = getattr(module, f"{name}Trainer")(model, args=args, train_dataset=dataset, **given)
        report = accelerate(trainer.model, strict=False).report if patched else None
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], report

    want, _ = run(False)
    got, report = run(True)
    assert len(got) == 2 and report is not None
    if not (GPU and case in ("grpo", "rloo")):  # where a rounding may change a sampled token
        assert got == pytest.approx(want, rel=1e-3 if GPU else 1e-4, abs=1e-5)
    tiled = hasattr(utils, "add_fused_lm_head")
    if case == "reward":
        assert not report.head and not report.patched
    elif case == "sft" and not tiled:
        why = {op: why for (_, op), why in reasons(report).items()}
        assert not report.head and why[OP] == "a forward on the model, of TRL's own head, computes its loss"
    else:
        (counts,) = report.to_dict()["head"].values()
        if tiled and case not in ("cpo", "orpo"):
            assert not any(counts[key] for key in ("deferred", "fused", "in_chunks", "materialised"))
            assert "stood idle" in report.head_line()
        else:
            assert counts["deferred"] == 2 and counts["fused"] >= 2
            # The entropy of so few tokens is one chunk of the values.
            assert counts["materialised"] == (0 if case in ("cpo", "orpo") else 2)
            assert f"{counts['fused']} fused" in report.head_line()


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
