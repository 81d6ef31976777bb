"""linear_cross_entropy and linear_log_probs: every output and gradient against eager and float64."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sloth_kernels import linear_cross_entropy as op
from sloth_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
)
from sloth_kernels.nf4 import FourBit
from three_way import WAYS, check
from torch.utils._python_dispatch import TorchDispatchMode

from sloth_plugins.numerics import bound, relative_error

GPU = torch.cuda.is_available()
BOTH = [pytest.param(True, id="fused"), pytest.param(False, id="torch")]
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "num_items": dict(reduction="sum", num_items=7),
    "num_items tensor": dict(reduction="sum", num_items=torch.tensor(7)),
    "ignore_index": dict(ignore_index=3),
    "smoothing": dict(label_smoothing=0.1),
    "smoothing only": dict(label_smoothing=1.0, reduction="none"),
    "softcap": dict(softcap=2.0),
    "scale": dict(scale=0.25),
    "z_loss": dict(z_loss=1e-2),
    "z_loss none": dict(z_loss=1e-2, reduction="none"),
    "together": dict(label_smoothing=0.2, softcap=3.0, scale=2.0, z_loss=1e-2),
    "together none": dict(label_smoothing=0.2, softcap=3.0, scale=2.0, z_loss=1e-2, reduction="none"),
    "together sum": dict(label_smoothing=0.2, scale=1.5, z_loss=1e-2, reduction="sum", num_items=12.5),
}
LOG_PROBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "softcap": dict(softcap=2.0),
    "entropy": dict(entropy=True),
    "together": dict(temperature=1.3, softcap=3.0, scale=2.0, entropy=True),
}


def tensors(
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (2, 7),
    h: int = 24,
    v: int = 203,
    ignored: float = 0.3,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """hidden, weight, labels and bias; a share `ignored` of the labels is -100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    made = {
        "hidden": torch.randn(*rows, h, generator=generator),
        "weight": torch.randn(v, h, generator=generator) * 2 * h**-0.5,
        "bias": torch.randn(v, generator=generator) if bias else None,
    }
    found: dict[str, torch.Tensor | None] = {
        n: None if x is None else x.to(device, dtype) for n, x in made.items()
    }
    return found | {"labels": labels.to(device)}


def with_ids(inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    labels = inputs.pop("labels")
    assert labels is not None
    return inputs | {"ids": labels.clamp_min(0)}


def run(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **inputs: function(**inputs, **options)


def check_loss(
    inputs: dict[str, Any], fused: bool, upstream: list[torch.Tensor] | None = None, **options: Any
) -> None:
    """`check` of linear_cross_entropy. Rows' errors may cancel in eager's one number by luck, so that this is
    held to their mean size, and everything else to the contract. `upstream` is not for reduction="none".
    """
    kernel = run(linear_cross_entropy, fused=fused, **options)
    reference = run(linear_cross_entropy_reference, **options)
    if options.get("reduction") == "none":
        check(kernel, reference, inputs)
        return

    def gradients_of(function: Callable[..., Any]) -> Callable[..., Any]:
        def zero(**given: Any) -> torch.Tensor:
            loss = function(**given)
            return loss - loss.detach()

        return zero

    check(gradients_of(kernel), gradients_of(reference), inputs, upstream=upstream)
    double = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
    single = {**options, "reduction": "none", "num_items": None}
    rows, exact = (linear_cross_entropy_reference(**given, **single) for given in (inputs, double))
    truth = reference(**double)
    allowed = 1.5 * (rows - exact).abs().sum() * (truth / exact.sum()).nan_to_num() + 1e-6 * truth
    found = kernel(**inputs)
    assert found.dtype == torch.float32 and found.shape == ()
    assert (found - truth).abs() <= allowed, (found, truth, allowed)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(op.torch, "empty", poisoned)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 4 rows, a shorter one first; what is computed again, 64 columns at a time."""
    monkeypatch.setattr(op, "most_rows", lambda *_: 4)
    monkeypatch.setattr(op, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(op, "AGAIN_COLUMNS", 64)
    yield


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel walks over a row in several blocks, the last one partial."""
    monkeypatch.setattr(op, "MOST_COLUMNS", 64)
    yield


@pytest.fixture
def lend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[op._Sums]]:
    """Logits in dW's memory wherever they fit, with a buffer of so many elements: what was chosen."""

    def small(elements: int, front: int = 40) -> list[op._Sums]:
        chosen: list[op._Sums] = []
        real = op._weight_sums
        monkeypatch.setattr(op, "FRONT_ROWS", front)
        monkeypatch.setattr(op, "ROW_MULTIPLE", 1)
        monkeypatch.setattr(op, "COLUMN_MULTIPLE", 8)
        monkeypatch.setattr(op, "AGAIN_COLUMNS", 16)
        monkeypatch.setattr(op, "SLAB_BYTES", 2**12)
        monkeypatch.setattr(op, "spare_bytes", lambda *_: 2 * elements)
        monkeypatch.setattr(op, "most_rows", lambda row_bytes, *_: max(1, 2 * elements // row_bytes))
        monkeypatch.setattr(op, "_weight_chunks", lambda *_: (1, 0, True))  # dearer than anything
        monkeypatch.setattr(op, "_weight_sums", lambda *a: chosen.append(real(*a)) or chosen[-1])
        op._lent_sums.cache_clear()
        return chosen

    yield small
    op._lent_sums.cache_clear()


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_loss(fused, dtype, options, device, short_blocks):
    if options.get("ignore_index") is not None:
        inputs = tensors(device, dtype, ignored=0)
        inputs["labels"][0, :3] = 3
    else:
        inputs = tensors(device, dtype)
    check_loss(inputs, fused, **options)


@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_float32_logits(fused, dtype, device):
    """The loss is as exact as of a float32 head; gradients of logits keep the dtype of the matmul."""
    options = dict(logits_dtype=torch.float32)
    kernel = run(linear_cross_entropy, fused=fused, **options)
    inputs = tensors(device, dtype)
    check(kernel, linear_cross_entropy_reference, inputs)
    check(kernel, run(linear_cross_entropy_reference, **options), inputs, backward=False)


@pytest.mark.parametrize("options", LOG_PROBS.values(), ids=LOG_PROBS)
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_log_probs(fused, dtype, options, device, short_blocks):
    inputs = with_ids(tensors(device, dtype))
    check(run(linear_log_probs, fused=fused, **options), run(linear_log_probs_reference, **options), inputs)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("v", [257, 1031])
def test_loss_of_fresh_numbers(v, options, device):
    """Other numbers in each run: every option, odd vocabularies, with and without a bias.

    The loss has the gradient 1, as in a backward(). By another number u, eager's gradients of logits are
    rounded as u / n (p - y) and ours as 1 / n (p - y): of labels that are all unlikely these are nearly one
    number, and which of the two is nearer to bfloat16's grid is luck (1 of 100 draws passes the factor 1.5).
    """
    seed = secrets.randbelow(2**31)
    one = [torch.ones((), device=device)]
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            inputs = tensors(device, dtype, rows=(3, 11), v=v, bias=bias, seed=seed)
            if (ignored := options.get("ignore_index")) is not None:
                labels = inputs["labels"]
                labels[labels == -100] = ignored
            try:
                check_loss(inputs, GPU, upstream=one, **options)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {dtype}, bias {bias}: {error}") from error


@pytest.mark.parametrize("fused", BOTH)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_left_out_by_the_caller_are_ignored_rows(reduction, fused, device):
    """The loss and every gradient; who knows the labels on the host saves the matmuls."""
    inputs = tensors(device, torch.float32, ignored=0.5)
    results = []
    for kept in (torch.ones_like(inputs["labels"], dtype=torch.bool), inputs["labels"] != -100):
        leaves = [inputs[n].detach().requires_grad_() for n in ("hidden", "weight", "bias")]
        hidden, weight, bias = leaves
        options = dict(bias=bias, reduction=reduction, fused=fused)
        loss = linear_cross_entropy(hidden[kept], weight, inputs["labels"][kept], **options).sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for every, some in zip(*results, strict=True):
        assert relative_error(some, every) < 1e-6


class NothingIsRead(TorchDispatchMode):
    """Fails on what would make the host wait for a device: a number read, or a size that values decide."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"), name
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), "a mask as an index"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(short_chunks, lend):
    """On any machine; `test_no_synchronisation` asks a GPU. Ignored rows are not counted on the host."""
    inputs = tensors(torch.device("cpu"), torch.bfloat16, ignored=0.5)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    ids = inputs["labels"].clamp_min(0)
    with NothingIsRead():
        for options in ({}, dict(reduction="sum", num_items=9, label_smoothing=0.1), dict(z_loss=0.1)):
            torch.autograd.grad(linear_cross_entropy(**inputs, fused=False, **options), leaves)
        torch.autograd.grad(linear_cross_entropy(**inputs, fused=False, reduction="none").sum(), leaves)
        hidden, weight, bias = leaves
        found = linear_log_probs(hidden, weight, ids, bias=bias, entropy=True, fused=False)
        torch.autograd.grad(found[0].sum() + found[1].sum(), leaves)
        chosen, inputs["bias"], leaves = lend(3000, front=20), None, leaves[:2]
        torch.autograd.grad(linear_cross_entropy(**inputs, fused=False), leaves)
        torch.autograd.grad(linear_cross_entropy(**inputs, fused=False, reduction="none").sum(), leaves)
        assert len(chosen) == 2 and all(plan.lent is not None for plan in chosen)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        ids.sum().item()


@pytest.mark.parametrize("fused", BOTH)
def test_gradients_of_entropy_alone_and_of_log_probs_beside_it(fused, device):
    inputs = with_ids(tensors(device, torch.float32))
    functions = (
        run(linear_log_probs, fused=fused, entropy=True),
        run(linear_log_probs_reference, entropy=True),
    )
    each = torch.randn(2, 7, device=device)
    same = torch.ones((), device=device).expand(2, 7)  # what comes from a sum
    for upstream in ([None, each], [each, None], [None, same], [same, same]):
        check(*functions, inputs, upstream=upstream)


@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_top1_is_the_first_of_the_largest(fused, dtype, device, short_blocks):
    inputs = with_ids(tensors(device, dtype, rows=(3, 4)))
    weight = inputs["weight"]
    # Often the largest, in four places: two of one lane of the kernel, and two of others.
    places = [17, 17 + 64, 70, 202]
    weight[places] = weight.float().sum(0).to(dtype)
    inputs["bias"][places] = 0
    found = linear_log_probs(**inputs, fused=fused, entropy=True, top1=True)
    wanted = linear_log_probs_reference(**inputs, entropy=True, top1=True)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64]
    assert torch.equal(found[2], wanted[2]) and 17 in wanted[2]
    alone = linear_log_probs(**inputs, fused=fused, top1=True)
    assert torch.equal(alone[1], wanted[2]) and torch.equal(alone[0], found[0])


@pytest.mark.parametrize(
    ("v", "rows"),
    [*((v, (5,)) for v in (1, 2, 4096, 4097, 9001)), *((31, rows) for rows in ((), (1,), (1, 1), (3, 1, 5)))],
    ids=str,
)
@pytest.mark.parametrize("fused", BOTH)
def test_shapes(fused, v, rows, device):
    inputs = tensors(device, torch.float32, rows=rows, v=v, ignored=0, h=8)
    check_loss(inputs, fused)
    check(run(linear_log_probs, fused=fused), linear_log_probs_reference, with_ids(inputs))


@pytest.mark.parametrize("fused", BOTH)
def test_inputs_that_are_not_contiguous(fused, device):
    inputs = tensors(device, torch.float32, rows=(3, 8))
    wide = torch.randn(3, 9, 48, device=device)
    inputs["hidden"] = wide[:, :-1, ::2]
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs["labels"] = inputs["labels"].t().contiguous().t()
    upstream = [torch.randn(8, 3, device=device).t()]
    for options, given in (({}, None), (dict(reduction="none"), upstream)):
        functions = (
            run(linear_cross_entropy, fused=fused, **options),
            run(linear_cross_entropy_reference, **options),
        )
        check(*functions, inputs, upstream=given)


@pytest.mark.parametrize("fused", BOTH)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), ("weight", "bias"), ("hidden", "weight")], ids=str
)
def test_only_what_is_needed(frozen, reduction, fused, device, monkeypatch):
    inputs = tensors(device, torch.float32)
    options = dict(reduction=reduction)
    functions = (
        run(linear_cross_entropy, fused=fused, **options),
        run(linear_cross_entropy_reference, **options),
    )
    check(*functions, inputs, frozen=frozen)
    if "weight" in frozen:
        real = op._product

        def product(out: torch.Tensor, *args: Any) -> None:
            assert out.shape != inputs["weight"].shape, "the gradient of a frozen weight"
            real(out, *args)

        monkeypatch.setattr(op, "_product", product)
        check(*functions, inputs, frozen=frozen)


@pytest.mark.parametrize("fused", BOTH)
@pytest.mark.parametrize("options", [{}, dict(reduction="none")], ids=str)
def test_no_gradients_without_autograd(options, fused, device, monkeypatch):
    inputs = tensors(device, torch.float32)
    wanted = linear_cross_entropy(**inputs, fused=fused, **options)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_()
    real, outs = op._rows_pass, []
    monkeypatch.setattr(op, "_rows_pass", lambda *args: (outs.append(args[2]), real(*args)))
    with torch.no_grad():
        found = linear_cross_entropy(**inputs, fused=fused, **options)
    assert outs == [None] and not found.requires_grad
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("fused", BOTH)
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1), dict(z_loss=0.1)], ids=str)
def test_all_ignored(options, fused, device):
    inputs = tensors(device, torch.float32, ignored=1.1)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_()
    leaves = [inputs[name] for name in ("hidden", "weight", "bias")]
    for reduction, num_items, wanted in (("mean", None, torch.nan), ("sum", 5, 0.0), ("sum", None, 0.0)):
        loss = linear_cross_entropy(
            **inputs, fused=fused, reduction=reduction, num_items=num_items, **options
        )
        torch.testing.assert_close(loss, torch.tensor(wanted, device=device), equal_nan=True)
        for gradient in torch.autograd.grad(loss, leaves):
            assert not gradient.any()


@pytest.mark.parametrize("fused", BOTH)
def test_ignored_rows_may_hold_anything(fused, device):
    inputs = tensors(device, torch.float32)
    dirty = inputs["hidden"].clone()
    dirty[inputs["labels"] == -100] = torch.nan
    for reduction in ("mean", "none"):
        results = []
        for hidden in (inputs["hidden"], dirty):
            hidden = hidden.detach().requires_grad_()
            given = inputs | {"hidden": hidden}
            loss = linear_cross_entropy(**given, fused=fused, reduction=reduction)
            results.append([loss, *torch.autograd.grad(loss.sum(), hidden)])
        for clean, other in zip(*results, strict=True):
            assert torch.equal(clean, other)


@pytest.mark.parametrize("fused", BOTH)
def test_a_label_outside_is_nan_alone(fused, device):
    inputs = tensors(device, torch.float32, ignored=0)
    wanted = linear_cross_entropy(**inputs, fused=fused, reduction="none")
    inputs["labels"][0, 0], inputs["labels"][1, 1] = 203, -1
    found = linear_cross_entropy(**inputs, fused=fused, reduction="none")
    outside = torch.zeros(2, 7, dtype=torch.bool, device=device)
    outside[0, 0] = outside[1, 1] = True
    assert torch.equal(found.isnan(), outside) and torch.equal(found[~outside], wanted[~outside])
    inputs = with_ids(inputs) | {"ids": torch.full((2, 7), -100, device=device)}
    assert linear_log_probs(**inputs, fused=fused).isnan().all()


@pytest.mark.parametrize("fused", BOTH)
def test_logits_of_minus_infinity(fused, device):
    inputs = tensors(device, torch.float32)
    inputs["bias"][100:] = -torch.inf
    inputs["labels"][inputs["labels"] >= 100] = 5
    check(run(linear_cross_entropy, fused=fused), linear_cross_entropy_reference, inputs, frozen=("bias",))
    options = dict(entropy=True)
    functions = run(linear_log_probs, fused=fused, **options), run(linear_log_probs_reference, **options)
    check(*functions, with_ids(inputs), backward=False)


@pytest.mark.parametrize("fused", BOTH)
def test_large_logits(fused, device):
    inputs = tensors(device, torch.float32)
    inputs["hidden"] *= 1e3
    check_loss(inputs, fused)
    options = dict(softcap=30.0)
    check_loss(inputs, fused, **options)


@pytest.mark.parametrize("again", [True, False], ids=["again", "float32"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_chunks(fused, dtype, reduction, again, device, short_chunks, monkeypatch):
    """14 rows in chunks of 2, 4, 4 and 4; for a 16-bit dW one is computed again, or it adds up in float32."""
    monkeypatch.setattr(op, "MOST_AGAIN", 0.3 if again else 0.2)
    real, firsts = op._rows_pass, []
    monkeypatch.setattr(op, "_rows_pass", lambda *args: (firsts.append(args[5:6]), real(*args)))
    inputs = tensors(device, dtype)
    options = dict(reduction=reduction, label_smoothing=0.1, softcap=4.0, scale=1.5, z_loss=1e-2)
    check_loss(inputs, fused, **options)
    columns = [first for (first,) in filter(None, firsts)]
    wide = dtype == torch.float32 or (dtype == torch.float16 and reduction == "mean")
    assert columns == ([0, 64, 128, 192] if again and not wide else [])
    exact = run(linear_cross_entropy, fused=fused, reduction=reduction, logits_dtype=torch.float32)
    check(exact, run(linear_cross_entropy_reference, reduction=reduction), inputs)
    options = dict(temperature=0.9, entropy=True)
    functions = run(linear_log_probs, fused=fused, **options), run(linear_log_probs_reference, **options)
    check(*functions, with_ids(inputs))


@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_sums_that_are_shared_out(fused, dtype, device, monkeypatch):
    """Of 16-bit gradients of narrow hidden states, in four parts; then a vocabulary that can't be divided."""
    monkeypatch.setattr(op, "_processors", lambda _: 7)
    real, parts = op._shared_product, []
    monkeypatch.setattr(op, "_shared_product", lambda *a: (parts.append(a[3]), real(*a)))
    inputs = tensors(device, dtype, v=256)
    check_loss(inputs, fused, softcap=4.0)
    options = dict(temperature=0.9, entropy=True)
    functions = run(linear_log_probs, fused=fused, **options), run(linear_log_probs_reference, **options)
    check(*functions, with_ids(inputs))
    assert set(parts) == ({4} if dtype != torch.float32 else set())
    parts.clear()
    check_loss(tensors(device, dtype, v=257), fused)
    assert not parts


@pytest.mark.parametrize("tokens", [1024, 1536, 2048, 4096])
def test_the_weight_gradient_of_many_chunks(tokens, device, monkeypatch):
    """bf16: two or three equal chunks, four of which one is computed again, and sums in float32."""
    inputs = tensors(device, torch.bfloat16, rows=(tokens,), v=700, h=32, ignored=0, bias=False)
    real, choices = op._weight_chunks, []
    monkeypatch.setattr(op, "most_rows", lambda *_: 512)
    monkeypatch.setattr(op, "AGAIN_COLUMNS", 512)
    monkeypatch.setattr(op, "_weight_chunks", lambda *a: choices.append(real(*a)) or choices[-1])
    check_loss(inputs, GPU)
    again = {1024: 0, 1536: 0, 2048: 1, 4096: 0}[tokens]
    assert choices[-1] == (512, again, tokens == 4096)


# Tokens, features beside 203 ids; elements of the buffer, rows of the free front; chunks after the first sum,
# and how many of them are computed again.
LENT = [
    pytest.param((1,), 24, 3000, 20, 0, 0, id="one"),
    pytest.param((2, 31), 72, 9000, 20, 0, 0, id="fewer than features"),
    pytest.param((72,), 72, 9000, 20, 0, 0, id="as many"),
    pytest.param((61,), 24, 11500, 52, 0, 0, id="more"),
    pytest.param((5, 13), 24, 8000, 40, 1, 0, id="a chunk"),
    pytest.param((83,), 24, 7600, 40, 2, 1, id="again"),
]


@pytest.mark.parametrize("what", ["mean", "sum", "none", "log_probs"])
@pytest.mark.parametrize(("rows", "h", "elements", "front", "chunks", "again"), LENT)
@pytest.mark.parametrize(("fused", "dtype"), [w for w in WAYS if w.values[1] != torch.float32])
def test_logits_in_the_memory_of_the_weight_gradient(
    fused, dtype, rows, h, elements, front, chunks, again, what, device, lend, monkeypatch
):
    """Other numbers in each run, every gradient. Float16 of a mean or sum adds up in float32."""
    chosen = lend(elements, front)
    if again:
        monkeypatch.setattr(op, "MOST_ROUNDINGS", 1.5)
        monkeypatch.setattr(op, "MOST_AGAIN", 0.45)
    seed = secrets.randbelow(2**31)
    inputs = tensors(device, dtype, rows=rows, h=h, ignored=0.2, seed=seed, bias=False)
    inputs["labels"].view(-1)[0] = 202
    one = [torch.ones((), device=device)]
    try:
        if what == "log_probs":
            options = dict(temperature=0.9, entropy=True)
            function, reference = run(linear_log_probs, fused=fused, **options), linear_log_probs_reference
            check(function, run(reference, **options), with_ids(dict(inputs)))
        else:
            options = dict(reduction=what, num_items=7 if what == "sum" else None)
            check_loss(inputs, fused, one, **options)
            # No scale and cap (`test_the_first_sum`): eager rounds those logits otherwise, and of few tokens
            # luck makes more than a factor of 1.5 of that.
            check_loss(inputs, fused, one, reduction=what, label_smoothing=0.1, z_loss=1e-2)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    if dtype == torch.float16 and what in ("mean", "sum"):
        assert not chosen
        return
    tokens = inputs["labels"].numel()
    for plan in chosen:
        assert plan.lent.tokens + chunks * plan.rows == tokens and plan.again == again and not plan.wide
    assert chosen


@pytest.mark.parametrize("losses", [True, False], ids=["losses", "gradients alone"])
@pytest.mark.parametrize("name", ["plain", "smoothing", "softcap", "scale", "z_loss", "together"])
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_the_first_sum(fused, dtype, name, losses, device, lend):
    """Losses and gradients of logits that lie in two places, by the kernels, as the interpreter runs them.
    Gradients alone don't go by the log-sum-exp of a forward whose matmul may have rounded otherwise."""
    options = LOSSES[name]
    lend(0)
    inputs = tensors(device, dtype, rows=(45,), v=301, h=24, bias=False)
    inputs["labels"][:3] = torch.tensor([0, 300, 1])  # labels of both places
    lent = op._lend(45, 24, 301, 10**5, 7)
    assert lent is not None and 0 < lent.split < 301 and len(list(lent.blocks(301, 24))) > 2
    keys = dict(label_smoothing="smoothing", softcap="softcap", scale="scale", z_loss="z_loss")
    given = {keys[n]: x for n, x in options.items() if n in keys}
    given = dict(softcap=None, scale=1.0, ignore_index=-100) | given

    def ours(**leaves: torch.Tensor) -> torch.Tensor:
        hidden, weight = leaves["hidden"].detach(), leaves["weight"].detach()
        head = op._head(hidden, fused=fused, **given)
        new = dict(device=device, dtype=torch.float32)
        loss = torch.full((45,), torch.nan, **new)
        rows = op._Rows(loss=loss if losses else None, lse=torch.full((45,), torch.nan, **new))
        rows.grad = torch.ones((), **new)
        dh, dw = torch.empty_like(hidden), torch.empty_like(weight)
        for x in (dh, dw):
            x.fill_(torch.nan)
        space = torch.full(((301 - lent.split) * lent.stride,), torch.nan, device=device, dtype=dtype)
        op._first_sum(head, hidden, weight, leaves["labels"], rows, lent, space, dh, dw)
        value = rows.loss.sum() if losses else reference(**leaves).detach()
        return Known.apply(value, dh, dw, leaves["hidden"], leaves["weight"])

    reference = run(linear_cross_entropy_reference, **{**options, "reduction": "sum"})
    upstream = [torch.ones((), device=device)]
    comparisons = check(ours, lambda **x: reference(**x), inputs, upstream=upstream)
    assert [c.tensor for c in comparisons] == ["output 0", "dhidden", "dweight"]


class Known(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, dh: Any, dw: Any, *leaves: torch.Tensor) -> Any:
        ctx.gradients = dh, dw
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, None, None, *ctx.gradients


@pytest.mark.parametrize("fused", BOTH)
def test_transposed_logits_are_rows_of_logits(fused, device, lend):
    """The same losses, lse and gradients as by `_rows_pass`; some are ignored, foreign or infinite."""
    lend(0)
    dtype = torch.float32
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(150, 77, generator=generator)
    logits[5, 40:] = -torch.inf
    logits[6], logits[7] = torch.nan, 3e4 * logits[7]
    labels = torch.randint(0, 77, (150,), generator=generator)
    labels[5], labels[6], labels[8:12] = 7, -100, torch.tensor([-100, -1, 77, 76])
    logits, labels = logits.to(device, dtype), labels.to(device)
    for options in ({}, dict(smoothing=0.1, scale=1.5, z_loss=1e-2), dict(softcap=3.0)):
        if "smoothing" in options:
            logits = logits.clone()
            logits[5, 40:] = 0.0
        keywords = dict(softcap=None, scale=1.0, ignore_index=-100) | options
        head = op._head(logits, fused=fused, **keywords)
        results = []
        for transposed in (False, True):
            new = dict(device=device, dtype=torch.float32)
            rows = op._Rows(loss=torch.empty(150, **new), lse=torch.empty(150, **new))
            rows.grad = torch.linspace(0.5, 2, 150, device=device)
            if transposed:
                near, far = torch.zeros(30, 160, **new), torch.zeros(47, 160, **new)
                near[:, :150], far[:, :150] = logits[:, :30].t(), logits[:, 30:].t()
                scratch = torch.empty(op.COLUMN_SUMS * 150 + 1, **new)
                op._columns_pass(head, [near[:, :150], far[:, :150]], labels, rows, scratch)
                assert not near[:, 150:].any() and not far[:, 150:].any()
                d = torch.cat([near, far])[:, :150].t()
            else:
                d = logits.clone()
                op._rows_pass(head, d, d, labels, rows)
            results.append((rows.loss, rows.lse.masked_fill(labels == -100, 0), d))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("fused", BOTH)
def test_all_ignored_with_logits_in_the_memory_of_the_weight_gradient(fused, device, lend):
    chosen = lend(8000)
    dtype = torch.bfloat16 if GPU or not fused else torch.float16
    inputs = tensors(device, dtype, rows=(65,), ignored=1.1, bias=False)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(**inputs, fused=fused, reduction=reduction)
        for gradient in torch.autograd.grad(loss.sum(), leaves):
            assert not gradient.any()
    assert chosen[-1].lent is not None


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("bias",)], ids=str)
def test_what_is_needed_with_logits_in_the_memory_of_the_weight_gradient(frozen, device, lend):
    """Not with a bias: cuBLAS would round the products before it is added."""
    chosen = lend(8000)
    inputs = tensors(device, torch.bfloat16, rows=(65,), bias="bias" in frozen)
    upstream = [torch.ones((), device=device)]
    for reduction, given in (("sum", upstream), ("none", None)):
        functions = (
            run(linear_cross_entropy, fused=GPU, reduction=reduction),
            run(linear_cross_entropy_reference, reduction=reduction),
        )
        check(*functions, inputs, frozen=frozen, upstream=given)
    assert all(plan.lent is not None for plan in chosen) and bool(chosen) == ("bias" not in frozen)


def test_a_scaled_gradient_of_hidden_in_16_bits(device, lend):
    """Where float32 has no room, a scalar of 1/3 is a second rounding: sqrt(2) times the error, not 1.5."""
    chosen = lend(40_000, front=64)  # enough for logits, and not for half of float32 gradients, 256 x 256
    inputs = tensors(device, torch.bfloat16, rows=(256,), h=256, v=4096, ignored=0, bias=False)
    inputs["hidden"] /= 16  # nearly equal logits, so that rounding them counts for little
    leaves = [inputs[n].requires_grad_() for n in ("hidden", "weight")]
    exact = {n: x.detach().double() if x is not None and n != "labels" else x for n, x in inputs.items()}
    exact["hidden"].requires_grad_()
    (truth,) = torch.autograd.grad(linear_cross_entropy_reference(**exact), exact["hidden"])
    once = relative_error(truth.bfloat16(), truth)
    for scalar, most in ((1.0, 1.25), (0.25, 1.25), (1 / 3, 1.5)):
        loss = linear_cross_entropy(**inputs, fused=GPU)
        factor = torch.tensor(scalar, device=device)
        found = torch.autograd.grad(loss, leaves, factor)[0]
        assert found.dtype == torch.bfloat16
        assert relative_error(found, truth * factor.double()) < most * once
    assert {(plan.exact, plan.lent is not None) for plan in chosen} == {(False, True)}


def test_plans_for_logits_in_the_memory_of_the_weight_gradient():
    """Whatever the shapes: within the budget, and no row of dW lies on logits that are still to be read."""
    lib = op.LENT_BYTES // 2
    choose = secrets.SystemRandom()
    shapes = [
        (tokens, k, v)
        for tokens in (1, 2048, 4096, 6000, 8191, 8192, 12_288)
        for k, v in ((4096, 128_256), (4096, 151_936), (576, 49_152), (5120, 151_936), (2048, 50_257))
    ]
    for _ in range(100):
        k, v = 8 * choose.randrange(8, 1000), choose.randrange(3000, 300_000)
        shapes.append((choose.randrange(1, 20_000), k, v))
    seen = 0
    for tokens, k, v in shapes:
        for exact, processors in ((True, 132), (False, 132), (False, 0)):
            found = op._lent_sums(tokens, k, v, lib, exact, op.MOST_AGAIN, processors, v)
            if found is None:
                continue
            seen += 1
            cost, plan = found
            lent = plan.lent
            rest = tokens - lent.tokens
            chunks = rest // plan.rows if plan.rows else 0
            assert cost >= 0 and rest == chunks * plan.rows and lent.tokens > 0, (tokens, k, v, found)
            sums = [lent.tokens + i * plan.rows for i in range(chunks - plan.again)]
            assert sum(sums) / tokens + 1 <= op.MOST_ROUNDINGS + 1e-9
            assert plan.again * plan.rows <= op.MOST_AGAIN * tokens
            assert max((v - lent.split) * lent.stride, plan.rows * v) <= lib
            assert 0 < lent.split < v and lent.offset + lent.split * lent.stride <= v * k
            assert (
                4 * lent.sums * k <= 2 * lent.offset and 4 * op.COLUMN_SUMS * lent.tokens <= 2 * lent.offset
            )
            done = 0
            for block in lent.blocks(v, k):
                assert block.start == done < block.stop
                done = block.stop
                if block.start < lent.split:  # this block's own logits are read, and those behind it
                    assert block.stop * k <= lent.offset + block.start * lent.stride
                    assert block.stop <= lent.split
            assert done == v
            assert len(list(lent.blocks(v, k))) <= 2 + 2 * v // op.FRONT_ROWS
    assert seen > 50


def test_the_choice_of_sums(monkeypatch):
    """For 132 multiprocessors, H = 4,096 and two vocabularies."""

    def plan(tokens: int, v: int, exact: bool = True, k: int = 4096) -> op._Sums:
        excess = tokens * k if exact else 0
        beside = min(tokens, op.LOGITS_BYTES // (2 * v)) * op.AGAIN_COLUMNS * 2
        most = (op.LOGITS_BYTES // 2 - excess - beside) // (128 * v) * 128
        return op._weight_sums(tokens, k, v, most, op.LENT_BYTES // 2, excess, exact, (132, v))

    for v, exact in ((128_256, True), (151_936, False)):
        found = plan(8192, v)
        assert (found.rows, found.again, found.wide, found.exact) == (2048, 0, False, exact)
        assert found.lent.tokens == 6144 and len(list(found.lent.blocks(v, 4096))) < 12
        assert plan(4096, v).lent.tokens == 4096 and plan(4096, v).exact
        assert plan(1024, v) == op._Sums(op._weight_chunks(1024, plan(1024, v).rows)[0])
        assert plan(65_536, v).wide
        assert plan(8192, v, exact=False).lent.sums == 1024
    assert plan(8192, 128_256).lent.offset // 4096 == 2112
    # Narrow hidden states lend little, and need nothing: chunks as before.
    assert plan(16_384, 49_152, k=576).lent is None and plan(4096, 49_152, k=576).lent is None


def test_the_choice_of_chunks(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(op, "CPU_LOGITS_BYTES", op.LOGITS_BYTES)
    row, beside = 2 * 128_256, 2 * 8192 * 4096
    assert op.most_rows(row, 0, cpu) == 2432
    assert op.most_rows(row, beside, cpu) == 2176
    assert op.most_rows(row, 2**40, cpu) == 1152  # half of it at least
    assert op.most_rows(2**40, 0, cpu) == 128
    assert op.chunk_rows(8192, 2176) == 2048
    assert op.chunk_rows(10_000, 2432) == 2048  # five about equal ones, not four of 2,432 and a rest
    assert op.chunk_rows(1, 2432) == 128
    # On 132 multiprocessors 128 x 256 tiles of (rows, 4096) fill one round with 1,024 rows, two with 2,048.
    for v in (32_000, 128_256, 151_936):
        machine = (132, v, True)
        assert op.chunk_rows(8192, 2176, 4096, *machine) == op.chunk_rows(8192, 1792, 4096, *machine) == 1024
        assert op.chunk_rows(16_384, 2432, 4096, *machine) == 1024
        assert op.chunk_rows(8192, 2176, 8192, *machine) == 1024  # two rounds each time
        assert op.chunk_rows(6144, 2176, 2048, 132, v) == 2048  # 128 tiles; 64 with 1,024 rows
        assert op.chunk_rows(900, 2176, 4096, *machine) == 1024
        assert op.chunk_rows(8192, 512, 4096, *machine) == 512
    assert op.chunk_rows(6144, 2176, 2048, 132, 128_256, True) == 1024  # 64 tiles, with half of the sum each
    # 66 tiles of (2816, 576), twice, with half of the sum each: neither the 5,504 rows of one round, nor
    # 1,408 with a quarter of the sum, whose launches take longer.
    assert op.chunk_rows(16_384, 6400, 576, 132, 49_152, True) == 2816
    assert op.shares(2816, 576, 49_152, 132) == 2 and op.shares(1408, 576, 49_152, 132) == 4
    assert op.shares(1024, 4096, 128_256, 132) == op.shares(2816, 576, 50_257, 132) == 1
    assert op.chunk_rows(16_384, 6400, 576, 132, 49_152) == 5504
    assert op.chunk_rows(16_384, 6400, 576, 132, 50_257, True) == 5504
    assert op._weight_chunks(8192, 2560) == (2560, 0, False)  # 512, 2560, 2560, 2560
    assert op._weight_chunks(8192, 2048) == (2048, 1, False)
    assert op._weight_chunks(8192, 1792) == (1792, 1, False)  # 1024, 1792, 1792, and two at once
    assert op._weight_chunks(6144, 2048) == (2048, 0, False)
    assert op._weight_chunks(65_536, 2048) == (2048, 0, True)
    assert op._weight_chunks(1, 2048) == (2048, 0, False)


@pytest.mark.parametrize("processors", [0, 40, 132])
@pytest.mark.parametrize("tokens", [100, 4096, 160_000])
def test_what_a_frozen_head_takes_by_arithmetic(tokens, processors):
    """No more than the buffer's limit and the gradient; on an H200 a chunk of 1,024 rows."""
    most = max(op.LOGITS_BYTES, op.LOGITS_BYTES // 2 + tokens * 4096 * 2)
    for v in (32_000, 128_256):
        found = op.frozen_head_bytes(tokens, 4096, v, 2, processors)
        assert tokens * 4096 * 4 < found <= most + tokens * 4096 * 2 + op.SLAB_BYTES
    if processors == 132:
        chunk = min(tokens, 1024) * 128_256 * 2
        assert found == chunk + tokens * 4096 * 4 + (4 * 132 * 128 * 256 if op.OUT_DTYPE else op.SLAB_BYTES)


def test_the_gradient_of_hidden_is_rounded_once(device):
    """By an incoming gradient of 1/3 as well; the matmul's own rounding would come on top of it."""
    inputs = tensors(device, torch.bfloat16, rows=(256,), h=256, v=4096, ignored=0, bias=False)
    inputs["hidden"] /= 16  # nearly equal logits, so that rounding them counts for little
    inputs["hidden"].requires_grad_()
    exact = {n: x.detach().double() if x is not None and n != "labels" else x for n, x in inputs.items()}
    exact["hidden"].requires_grad_()
    (truth,) = torch.autograd.grad(linear_cross_entropy_reference(**exact), exact["hidden"])
    third = torch.tensor(1 / 3, device=device)
    (found,) = torch.autograd.grad(linear_cross_entropy(**inputs, fused=GPU), inputs["hidden"], third)
    assert found.dtype == torch.bfloat16
    once = relative_error(truth.bfloat16(), truth)
    assert relative_error(found, truth / 3) < 1.25 * once


def test_a_tensor_on_the_cpu_goes_to_no_triton_kernel(monkeypatch):
    """As on a machine with a GPU, where nothing is interpreted."""
    monkeypatch.setattr(op, "INTERPRETED", False)
    for kernel in ("_rows_kernel", "_scale_kernel", "expand_4bit"):
        monkeypatch.setattr(op, kernel, None)
    inputs = tensors(torch.device("cpu"), torch.float32)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_()
    linear_cross_entropy(**inputs).backward()
    linear_log_probs(**with_ids(inputs), entropy=True)[0].sum().backward()


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_gradient_accumulation_weighs_tokens(fused, dtype, kind, device):
    """One batch of 8 = 2 of 4 = 8 of 1, however many labels each of them has."""
    inputs = tensors(device, dtype, rows=(8, 5), ignored=0.5)
    labels = inputs["labels"]
    labels[3] = -100
    items = (labels != -100).sum()
    number = items if kind == "tensor" else float(items)
    results = []
    for parts in (1, 2, 8):
        leaves = [inputs[name].detach().float().requires_grad_() for name in ("hidden", "weight", "bias")]
        hidden, weight, bias = leaves
        total = torch.zeros((), device=device)
        for h, y in zip(hidden.chunk(parts), labels.chunk(parts), strict=True):
            loss = linear_cross_entropy(
                h.to(dtype),
                weight.to(dtype),
                y,
                bias=bias.to(dtype),
                reduction="sum",
                num_items=number,
                fused=fused,
            )
            loss.backward()
            total += loss.detach()
        results.append([total, *(leaf.grad for leaf in leaves)])
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3
    for other in results[1:]:
        assert relative_error(other[0], results[0][0]) < 2e-6
        for got, want in zip(other[1:], results[0][1:], strict=True):
            assert relative_error(got, want) < tolerance
    mean = linear_cross_entropy(**inputs, fused=fused)
    assert relative_error(results[0][0], mean) < 2e-6


@pytest.mark.parametrize("fused", BOTH)
def test_a_graph_gone_through_twice(fused, device):
    inputs = tensors(device, torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss = linear_cross_entropy(**inputs, fused=fused)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    kept = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for one, three, other in zip(first, kept, again, strict=True):
        torch.testing.assert_close(3 * one, three)
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fused", BOTH)
@pytest.mark.parametrize("options", [dict(label_smoothing=0.1), dict(reduction="none", softcap=3.0)], ids=str)
def test_a_gradient_of_a_gradient(options, fused, device):
    inputs = tensors(device, torch.float32)

    def second(function: Callable[..., Any], dtype: torch.dtype, **more: Any) -> list[torch.Tensor]:
        leaves = [inputs[n].detach().to(dtype).requires_grad_() for n in ("hidden", "weight", "bias")]
        hidden, weight, bias = leaves
        loss = function(hidden, weight, inputs["labels"], bias=bias, **options, **more)
        first = torch.autograd.grad((loss**2).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))

    truth = second(linear_cross_entropy_reference, torch.float64)
    for got, want in zip(second(linear_cross_entropy, torch.float32, fused=fused), truth, strict=True):
        assert relative_error(got, want) < 2e-5
    inputs = with_ids(inputs)
    inputs["labels"] = inputs["ids"]
    options = dict(entropy=True)
    sums = lambda function: lambda *a, **k: sum(x.sum() for x in function(*a, **k))  # noqa: E731
    truth = second(sums(linear_log_probs_reference), torch.float64)
    for got, want in zip(second(sums(linear_log_probs), torch.float32, fused=fused), truth, strict=True):
        assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("fused", BOTH)
def test_an_incoming_gradient_is_applied_in_float32(fused, device):
    """1/3 is no bf16 number; rounded first it would put every gradient off by the same 0.2 %."""
    dtype = torch.bfloat16 if GPU or not fused else torch.float16
    inputs = tensors(device, dtype, rows=(64,), ignored=0)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]  # of many values
    loss = linear_cross_entropy(**inputs, fused=fused, label_smoothing=0.1)
    thirds = torch.autograd.grad(loss, leaves, torch.tensor(1 / 3, device=device))
    wholes = torch.autograd.grad(linear_cross_entropy(**inputs, fused=fused, label_smoothing=0.1), leaves)
    for third, whole in zip(thirds, wholes, strict=True):
        share = (third.double() * whole.double()).sum() / whole.double().square().sum()
        assert abs(3 * share - 1) < 1e-3


@pytest.mark.parametrize("fused", BOTH)
def test_small_float16_gradients_survive_the_mean(fused, device):
    """p / 65,536 is below float16's smallest number; with a loss scale eager's is not: nor may ours be."""
    inputs = tensors(device, torch.float16, rows=(16,), ignored=0)
    options = dict(reduction="sum", num_items=65536)
    check(
        run(linear_cross_entropy, fused=fused, **options),
        run(linear_cross_entropy_reference, **options),
        inputs,
        upstream=[torch.tensor(65536.0, device=device)],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", BOTH)
def test_autocast(fused, dtype, device):
    if device.type == "cpu" and fused and dtype == torch.bfloat16:
        pytest.skip("the interpreter gets bfloat16 wrong")
    inputs = tensors(device, torch.float32)
    inputs["hidden"] = inputs["hidden"].to(dtype)

    def under(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(**given: Any) -> Any:
            with torch.autocast(device.type, dtype=dtype, enabled=given["hidden"].dtype != torch.float64):
                return function(**given)

        return inside

    for options in ({}, dict(reduction="none"), dict(logits_dtype=torch.float32)):
        functions = (
            under(run(linear_cross_entropy, fused=fused, **options)),
            under(run(linear_cross_entropy_reference, **options)),
        )
        check(*functions, inputs, backward="logits_dtype" not in options)
    functions = under(run(linear_log_probs, fused=fused)), under(linear_log_probs_reference)
    check(*functions, with_ids(inputs))


@pytest.mark.parametrize("fused", BOTH)
def test_under_compile(fused, device):
    """The head is left out of the graph, and what is around it compiles."""
    inputs = with_ids(tensors(device, torch.float32))
    hidden, weight, bias, ids = (inputs[name] for name in ("hidden", "weight", "bias", "ids"))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = dict(bias=bias, fused=fused)
        loss = linear_cross_entropy(hidden * 2, weight, ids, label_smoothing=0.1, **options)
        return loss + linear_log_probs(hidden, weight, ids, **options).mean()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_the_reference_is_the_eager_model(device):
    """A head, soft-capped and scaled in its own dtype, then PyTorch's loss of float32 logits."""
    inputs = tensors(device, torch.bfloat16)
    logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]) * 0.5
    logits = (torch.tanh(logits / 4.0) * 4.0).float()
    labels = inputs["labels"]
    wanted = F.cross_entropy(logits.view(-1, 203), labels.view(-1), label_smoothing=0.1)
    options = dict(scale=0.5, softcap=4.0)
    found = linear_cross_entropy_reference(**inputs, label_smoothing=0.1, **options)
    assert torch.equal(found, wanted)
    found = linear_log_probs_reference(**with_ids(inputs), **options)
    ids = labels.clamp_min(0)[..., None]
    assert torch.equal(found, logits.log_softmax(-1).gather(-1, ids)[..., 0])


@pytest.mark.parametrize(("fused", "dtype"), WAYS)
def test_a_4bit_weight(fused, dtype, device):
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    inputs = tensors(device, dtype, h=64, v=128)
    packed, state = functional.quantize_4bit(inputs.pop("weight"), quant_type="nf4")
    weight = FourBit(packed=packed, state=state)
    for options in ({}, dict(reduction="none")):
        functions = (
            run(linear_cross_entropy, weight=weight, fused=fused, **options),
            run(linear_cross_entropy_reference, weight=weight, **options),
        )
        check(*functions, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_and_float64_go_to_the_reference(dtype, device):
    rows = (0,) if dtype == torch.float32 else (2, 3)
    inputs = tensors(device, dtype, rows=rows)
    for reduction in ("mean", "sum", "none"):
        found = linear_cross_entropy(**inputs, reduction=reduction)
        wanted = linear_cross_entropy_reference(**inputs, reduction=reduction)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert found.dtype == dtype
    assert linear_log_probs(**with_ids(inputs)).shape == rows


def test_refusals(device):
    inputs = tensors(device, torch.float32)
    for change, message in (
        (dict(reduction="max"), "reduction='max'"),
        (dict(label_smoothing=1.5), "label_smoothing=1.5"),
        (dict(num_items=3), "num_items with reduction='mean'"),
        (dict(softcap=0.0), "softcap=0.0"),
        (dict(logits_dtype=torch.float16), "logits_dtype=torch.float16"),
        (dict(labels=inputs["labels"][:1]), "expected"),
        (dict(labels=inputs["labels"].int()), "labels of torch.int32"),
        (dict(bias=torch.zeros(3, device=device)), r"bias \(3,\)"),
        (dict(weight=inputs["weight"].half()), "weight of torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**(inputs | change))
    with pytest.raises(ValueError, match="temperature=0"):
        linear_log_probs(**with_ids(inputs), temperature=0)


def _real_size(v: int) -> dict[str, Any]:
    make = dict(device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, v, (8192,), device="cuda")
    labels[::7] = -100
    hidden = torch.randn(8192, 4096, **make)
    return {"hidden": hidden, "weight": torch.randn(v, 4096, **make) / 64, "labels": labels}


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("what", ["mean", "log_probs"])
@pytest.mark.parametrize("v", [128_256, 151_936])
def test_peak_memory(v, what, trainable):
    inputs = _real_size(v)
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(trainable)
    if what == "log_probs":
        inputs["ids"] = inputs.pop("labels").clamp_min_(0)
    function = linear_cross_entropy if what == "mean" else linear_log_probs
    leaves = [x for x in inputs.values() if x.requires_grad]
    for _ in range(2):  # the first brings cuBLAS's workspace and the compiled kernel
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(function(**inputs).sum(), leaves)
        torch.cuda.synchronize()
        kept = sum(g.numel() * g.element_size() for g in gradients)
        beyond = torch.cuda.max_memory_allocated() - before - kept
        del gradients
    assert beyond <= 0.6 * 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_synchronisation(trainable):
    inputs = tensors(torch.device("cuda"), torch.bfloat16, rows=(512,), v=4096, h=64)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_(trainable or name == "hidden")
    items = torch.tensor(300, device="cuda")
    ids = inputs["labels"].clamp_min(0)

    def step() -> None:
        linear_cross_entropy(**inputs).backward()
        linear_cross_entropy(**inputs, reduction="sum", num_items=items, label_smoothing=0.1).backward()
        linear_cross_entropy(**inputs, reduction="sum", num_items=300).backward()
        linear_log_probs(inputs["hidden"], inputs["weight"], ids, entropy=True)[0].sum().backward()

    _without_waiting(step)


@pytest.mark.gpu
def test_no_synchronisation_with_logits_in_the_memory_of_the_weight_gradient(lend):
    chosen = lend(8000)
    inputs = tensors(torch.device("cuda"), torch.bfloat16, rows=(65,), bias=False)
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_()

    def step() -> None:
        linear_cross_entropy(**inputs, label_smoothing=0.1).backward()
        linear_cross_entropy(**inputs, reduction="none").sum().backward()

    _without_waiting(step)
    assert len(chosen) == 4 and all(plan.lent is not None for plan in chosen)


def _without_waiting(step: Callable[[], None]) -> None:
    """A second `step`, in which nothing may make the host wait."""
    step()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [700, 4096, 16_384])
@pytest.mark.parametrize(("k", "v"), [(4096, 128_256), (3584, 151_936), (576, 49_152)])
def test_what_a_frozen_head_takes(k, v, tokens):
    """As planned for: its chunk of logits, and gradients of the hidden states in float32."""
    made = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    hidden, weight = made(tokens, k, requires_grad=True), made(v, k)
    labels = torch.randint(0, v, (tokens,), device="cuda")
    linear_cross_entropy(hidden, weight, labels).backward()
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(hidden, weight, labels)
    seen = torch.cuda.max_memory_allocated() - before
    loss.backward()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    predicted = op.frozen_head_bytes(tokens, k, v, 2, processors)
    assert 0.9 * predicted < seen < 1.01 * predicted + 2**21


@pytest.mark.gpu
@pytest.mark.parametrize("v", [151_936, 50_257])
def test_real_sizes(v, monkeypatch):
    """A slice of the hidden states is enough for the truth in float64; its width and dtype are real."""
    monkeypatch.setattr(op, "LOGITS_BYTES", 2**27)
    monkeypatch.setattr(op, "LENT_BYTES", 2**27)
    inputs = {name: x[:768] if name != "weight" else x for name, x in _real_size(v).items()}
    check(linear_cross_entropy, linear_cross_entropy_reference, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 6143, 8192])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_trainable_head_of_real_width(tokens, reduction, monkeypatch):
    """In one sum and in two, with frequent labels: tokens of both sums add to the same rows of dW."""
    monkeypatch.setattr(op, "LOGITS_BYTES", 2**28)
    monkeypatch.setattr(op, "LENT_BYTES", 2**28)
    real, chosen = op._weight_sums, []
    monkeypatch.setattr(op, "_weight_sums", lambda *a: chosen.append(real(*a)) or chosen[-1])
    inputs = {name: x[:tokens] if name != "weight" else x for name, x in _real_size(50_257).items()}
    inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["labels"] % 64)
    check_loss(inputs, True, [torch.ones((), device="cuda")], reduction=reduction)
    assert {tokens} == {plan.lent.tokens + plan.rows for plan in chosen}
    assert all(plan.again == 0 and not plan.wide for plan in chosen)


def test_the_bound_is_not_vacuous():
    assert bound(0.0) < 1e-5
