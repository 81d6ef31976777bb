"""qk_norm_rope against eager and float64."""

from functools import partial

import pytest
import torch
from sloth_kernels import qk_norm_rope as op
from sloth_kernels import rope as rope_op
from sloth_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from sloth_kernels.rope import LAYOUTS, rope_reference
from three_way import check

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# (batch, Hq, Hk, sequence, D, R)
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 4, 2, 3, 16, 16),
    (1, 9, 3, 5, 12, 12),
    (2, 5, 1, 2, 40, 24),
    (1, 2, 7, 3, 14, 6),
] + (
    [(2, 32, 8, 257, 128, 128), (1, 16, 2, 300, 256, 64), (1, 96, 8, 65, 128, 64), (3, 14, 2, 999, 64, 64)]
    if GPU
    else []
)


def inputs(shape, dtype, device, *, weight_dtype=None, cos_dtype=None, unsqueeze_dim=1):
    batch, q_heads, k_heads, seq_len, dim, rotary = shape
    generator = torch.Generator().manual_seed(dim)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device)

    angles = randn(batch, seq_len, rotary) * 2
    tensors = {
        "q": (randn(batch, seq_len, q_heads, dim) * 3).to(dtype),
        "k": (randn(batch, seq_len, k_heads, dim) / 3).to(dtype),
        "q_weight": (1 + randn(dim) / 4).to(weight_dtype or dtype),
        "k_weight": (1 + randn(dim) / 4).to(weight_dtype or dtype),
        "cos": angles.cos().to(cos_dtype or dtype),
        "sin": (angles * 1.1).sin().to(cos_dtype or dtype),
    }
    if unsqueeze_dim == 1:
        tensors |= {name: tensors[name].transpose(1, 2) for name in "qk"}
    return tensors


def _check(tensors, upstream=None, frozen=(), **options):
    options = {"eps": 1e-6, **options}
    check(
        partial(qk_norm_rope, **options),
        partial(qk_norm_rope_reference, **options),
        tensors,
        frozen=("cos", "sin", *frozen),
        upstream=upstream,
        truth=partial(qk_norm_rope_reference, **{**options, "out_dtype": None}),
    )


@pytest.fixture
def poisoned(monkeypatch):
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poison(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(op.torch, name, poison)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, layout, device, poisoned):
    _check(inputs(shape, dtype, device), layout=layout)


@pytest.mark.parametrize("cast_before_weight", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_options(offset, cast_before_weight, device):
    options = {"offset": offset, "cast_before_weight": cast_before_weight}
    for dtypes in ({}, {"weight_dtype": torch.float32}, {"cos_dtype": torch.float32}):
        _check(inputs((1, 3, 2, 4, 16, 8), torch.float16, device, **dtypes), **options)
    tensors = inputs((1, 3, 2, 4, 16, 16), torch.float16, device, weight_dtype=torch.float32)
    _check(tensors, out_dtype=torch.float16, eps=1e-2, **options)
    assert qk_norm_rope(**tensors, eps=1e-6, out_dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_tokens_and_several_tiles_a_program(layout, device, monkeypatch, poisoned):
    monkeypatch.setattr(rope_op, "MIN_PROGRAMS", 1)
    _check(
        inputs((2, 3, 1, 7, 16, 16), torch.float32, device), layout=layout
    )  # 14 tokens, the last block partial
    # Masked rows must add nothing to the weight gradients, not even where their rstd is infinite.
    _check(inputs((2, 3, 1, 7, 16, 12), torch.float32, device), layout=layout, eps=0.0)
    monkeypatch.setattr(rope_op, "TILE_ELEMENTS", 64)
    _check(inputs((1, 9, 3, 3, 16, 12), torch.float32, device), layout=layout)


def test_programs_loop_over_rows(device, monkeypatch, poisoned):
    monkeypatch.setattr(op, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(op, "WARPS_PER_MULTIPROCESSOR", 3)
    _check(inputs((1, 2, 1, 11, 8, 8), torch.float32, device))


def test_heads_after_positions(device):
    _check(inputs((2, 4, 1, 3, 16, 8), torch.float32, device, unsqueeze_dim=2), unsqueeze_dim=2)


def test_strided_inputs_and_gradients(device):
    tensors = inputs((2, 7, 2, 3, 16, 16), torch.float32, device)
    joint = tensors["q"]
    _check({**tensors, "q": joint[:, :4], "k": joint[:, 4:6]})
    _check({**tensors, "q": joint.contiguous()})
    _check({**tensors, "q_weight": tensors["q_weight"].repeat_interleave(2)[::2]})
    one = torch.ones((), device=device)
    _check(tensors, [one.expand(2, 7, 3, 16), one.expand(2, 2, 3, 16)])
    k_grad = torch.randn(2, 3, 16, 2, device=device).permute(0, 3, 1, 2)
    _check(tensors, [torch.randn(2, 7, 3, 16, device=device), k_grad])


def test_memory_order(device):
    tensors = inputs((2, 4, 2, 3, 8, 8), torch.float32, device)
    leaves = [tensors[name].requires_grad_() for name in "qk"]
    outputs = qk_norm_rope(**tensors, eps=1e-6)
    assert all(out.stride() == x.stride() for out, x in zip(outputs, leaves, strict=True))
    upstream = [torch.randn(x.shape, device=device) for x in leaves]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    assert all(gradient.stride() == x.stride() for gradient, x in zip(gradients, leaves, strict=True))


def test_large_magnitudes(device):
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, device)
    _check({**tensors, "q": tensors["q"] * 1e4, "k": tensors["k"] * 1e17})
    _check({**tensors, "q": tensors["q"] * 1e-6, "k": tensors["k"] * 0.0})
    half = inputs((1, 2, 1, 3, 8, 8), torch.float16, device)
    _check({**half, "q": torch.full_like(half["q"], 60000.0), "k": half["k"] * 1e4})


@pytest.mark.parametrize("frozen", [("q_weight", "k_weight"), ("q_weight",), ("k_weight",), ("q",)], ids=str)
def test_frozen_weights_cost_nothing(frozen, device, monkeypatch):
    tensors = inputs((1, 4, 2, 5, 8, 6), torch.float32, device)
    allocated = []
    original = torch.empty

    def recorded(*args, **kwargs):
        out = original(*args, **kwargs)
        allocated.append(out.numel())
        return out

    _check(tensors, frozen=frozen)
    leaves = {
        name: x.detach().requires_grad_(name not in (*frozen, "cos", "sin")) for name, x in tensors.items()
    }
    outputs = qk_norm_rope(**leaves, eps=1e-6)
    monkeypatch.setattr(op.torch, "empty", recorded)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    wanted = 2 - sum(name.endswith("weight") for name in frozen)
    assert sum(size > 0 for size in allocated) == wanted + (
        wanted > 0
    )  # joint partial sums, a total for each
    assert all(leaves[name].grad is None for name in frozen)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8, 8), (2, 2, 1, 0, 8, 8)], ids=str)
def test_empty(shape, device):
    tensors = inputs(shape, torch.float32, device)
    names = ("q", "k", "q_weight", "k_weight")
    outputs = qk_norm_rope(**{n: x.requires_grad_(n in names) for n, x in tensors.items()}, eps=1e-6)
    assert [out.shape for out in outputs] == [tensors["q"].shape, tensors["k"].shape]
    gradients = torch.autograd.grad(sum(out.sum() for out in outputs), [tensors[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.shape == tensors[name].shape
        assert not gradient.any()


def test_a_gradient_of_cos_and_float64_go_to_the_reference(device):
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, device)
    cos = tensors["cos"].requires_grad_()
    assert torch.autograd.grad(qk_norm_rope(**tensors, eps=1e-6)[0].sum(), cos)[0].abs().sum() > 0
    doubles = {name: x.detach().double() for name, x in tensors.items()}
    pairs = zip(qk_norm_rope(**doubles, eps=1e-6), qk_norm_rope_reference(**doubles, eps=1e-6), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


def test_saved_tensors_and_gradients_are_not_written_over(device):
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, device)
    before = {name: x.clone() for name, x in tensors.items()}
    tensors["q"].requires_grad_()
    q_out, _ = qk_norm_rope(**tensors, eps=1e-6)
    upstream = torch.randn_like(q_out)
    copy = upstream.clone()
    q_out.backward(upstream)
    assert torch.equal(upstream, copy)
    assert all(torch.equal(x.detach(), before[name]) for name, x in tensors.items())


def test_weight_gradients_repeat(device):
    tensors = inputs((1, 3, 2, 20 if not GPU else 5000, 16, 16), torch.float32, device)
    weights = [tensors[name].requires_grad_() for name in ("q_weight", "k_weight")]
    runs = []
    for _ in range(2):
        outputs = qk_norm_rope(**tensors, eps=1e-6)
        runs.append(torch.autograd.grad(outputs, weights, [torch.ones_like(out) for out in outputs]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_formula_of_the_docstring():
    """The hand-derived gradients against autograd of the reference, in float64."""
    tensors = inputs((1, 3, 1, 4, 8, 6), torch.float64, torch.device("cpu"))
    q, weight = tensors["q"].requires_grad_(), tensors["q_weight"].requires_grad_()
    y, _ = qk_norm_rope_reference(**tensors, eps=1e-3, offset=1.0)
    dy = torch.randn(y.shape, dtype=torch.float64)
    dq, dweight = torch.autograd.grad(y, (q, weight), dy)
    x, w = q.detach(), weight.detach() + 1.0
    z = torch.zeros_like(x, requires_grad=True)
    rotated, _ = rope_reference(z, z, tensors["cos"], tensors["sin"])
    (h,) = torch.autograd.grad(rotated, z, dy)
    rstd = (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    xhat = x * rstd
    g = h * w
    expected = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    torch.testing.assert_close(dq, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dweight, (h * xhat).sum((0, 1, 2)), rtol=1e-11, atol=1e-12)


def test_arguments():
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, torch.device("cpu"))
    for match, changes in (
        ("'gptj'", {"layout": "gptj"}),
        (r"q_weight \(4,\)", {"q_weight": tensors["q_weight"][:4]}),
        (r"k_weight \(1, 8\)", {"k_weight": tensors["k_weight"][None]}),
    ):
        with pytest.raises(ValueError, match=match):
            qk_norm_rope(**{**tensors, **changes}, eps=1e-6)


def test_opcheck(device):
    q, k, q_weight, k_weight, cos, sin = inputs((2, 4, 2, 3, 16, 8), torch.float32, device).values()
    shared = (q, k, q_weight, k_weight, cos, sin, 1e-6, 0.0, "half", 1)
    torch.library.opcheck(torch.ops.sloth.qk_norm_rope_fwd, (*shared, torch.float32, torch.float16))
    torch.library.opcheck(torch.ops.sloth.qk_norm_rope_bwd, (q + 1, k + 1, *shared, True, False))


def test_compile(device):
    tensors = inputs((1, 4, 2, 3, 16, 16), torch.float32, device)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "q_weight")]

    def step(q, k, *others):
        q_out, k_out = qk_norm_rope(q * 2, k * 2, *others, eps=1e-6)
        return (q_out * torch.arange(16.0, device=device)).sum() + k_out.pow(3).sum()

    expected = torch.autograd.grad(step(*tensors.values()), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors.values()), leaves), expected)
