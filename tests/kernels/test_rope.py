"""rope against eager and float64."""

from functools import partial

import pytest
import torch
from sloth_kernels import rope as op
from sloth_kernels.rope import LAYOUTS, head_tiles, rope, rope_reference, warps_for
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
    (1, 40, 5, 1, 128, 128),
] + (
    [(2, 32, 8, 129, 128, 128), (1, 96, 8, 65, 128, 64), (1, 8, 4, 513, 256, 256), (3, 14, 2, 1000, 64, 64)]
    if GPU
    else []
)


def rotation(batch: int, seq_len: int, rotary: int, dtype: torch.dtype, device: torch.device):
    """cos and sin, all columns different: what only looks at one half of them is found out."""
    generator = torch.Generator().manual_seed(rotary)
    angles = torch.randn(batch, seq_len, rotary, generator=generator) * 2
    return angles.cos().to(device, dtype), (angles * 1.1).sin().to(device, dtype)


def heads(batch, head_count, seq_len, dim, dtype, device, unsqueeze_dim=1):
    """(B, H, S, D) as a transposed view of (B, S, H, D) memory, or that memory itself."""
    generator = torch.Generator().manual_seed(head_count)
    x = torch.randn(batch, seq_len, head_count, dim, generator=generator).to(device, dtype)
    return x.transpose(1, 2) if unsqueeze_dim == 1 else x


def inputs(shape, dtype, device, unsqueeze_dim=1, cos_dtype=None, cos_batch=None):
    batch, q_heads, k_heads, seq_len, dim, rotary = shape
    cos, sin = rotation(cos_batch or batch, seq_len, rotary, cos_dtype or dtype, device)
    return {
        "q": heads(batch, q_heads, seq_len, dim, dtype, device, unsqueeze_dim),
        "k": heads(batch, k_heads, seq_len, dim, dtype, device, unsqueeze_dim),
        "cos": cos,
        "sin": sin,
    }


def _check(tensors, upstream=None, **options):
    check(
        partial(rope, **options),
        partial(rope_reference, **options),
        tensors,
        frozen=("cos", "sin"),
        upstream=upstream,
        truth=partial(rope_reference, **{**options, "out_dtype": None}),
    )


@pytest.fixture
def poisoned(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_tokens_and_several_tiles_a_program(layout, device, monkeypatch, poisoned):
    monkeypatch.setattr(op, "MIN_PROGRAMS", 1)
    _check(
        inputs((2, 3, 1, 7, 16, 16), torch.float32, device), layout=layout
    )  # 14 tokens, the last block partial
    monkeypatch.setattr(op, "TILE_ELEMENTS", 64)
    _check(inputs((1, 9, 3, 3, 16, 12), torch.float32, device), layout=layout)
    monkeypatch.setattr(op, "TILE_ELEMENTS", 1024)
    tensors = inputs((2, 18, 3, 5, 16, 16), torch.float32, device)
    _check({name: x.contiguous() for name, x in tensors.items()}, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_after_positions(layout, device, poisoned):
    _check(
        inputs((2, 4, 1, 3, 16, 8), torch.float32, device, unsqueeze_dim=2), layout=layout, unsqueeze_dim=2
    )


def test_one_rotation_for_all_batches(device):
    tensors = inputs((3, 2, 1, 4, 8, 8), torch.float32, device, cos_batch=1)
    _check(tensors)
    _check({**tensors, "cos": tensors["cos"].expand(3, 4, 8), "sin": tensors["sin"].expand(3, 4, 8)})


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(dtypes, device):
    tensors = inputs((1, 2, 2, 3, 8, 8), dtypes[0], device, cos_dtype=dtypes[1])
    assert rope(**tensors)[0].dtype == torch.float32
    _check(tensors)
    _check(tensors, out_dtype=torch.float16)
    _check({**tensors, "k": tensors["k"].to(dtypes[1])})


def test_strided_inputs_keep_their_memory_order(device):
    seq_len, dim = 3, 16
    cos, sin = rotation(2, seq_len, dim, torch.float32, device)
    joint = heads(2, 7, seq_len, dim, torch.float32, device, unsqueeze_dim=2)  # (B, S, 4 + 2 + 1 heads, D)
    q, k = (joint[:, :, part].transpose(1, 2) for part in (slice(0, 4), slice(4, 6)))
    _check({"q": q, "k": k, "cos": cos, "sin": sin})
    for unsqueeze_dim, tensors in ((1, (q, k)), (2, (joint[:, :, :4], joint[:, :, 4:6]))):
        for result in rope(*tensors, cos, sin, unsqueeze_dim=unsqueeze_dim):
            assert (result.transpose(1, 2) if unsqueeze_dim == 1 else result).is_contiguous()
    dense = q.contiguous()
    assert rope(dense, k, cos, sin)[0].stride() == dense.stride()
    columns_strided = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.cat((cos, sin), dim=-1)
    _check({"q": columns_strided, "k": k, "cos": wide[..., :dim], "sin": wide[..., dim:]})
    _check({"q": q, "k": k, "cos": wide[..., 0::2], "sin": wide[..., 1::2]})
    _check({"q": q[:, :1].expand(2, 4, seq_len, dim), "k": k, "cos": cos, "sin": sin})


def test_gradients_have_the_memory_order_of_the_inputs(device):
    tensors = inputs((2, 4, 2, 3, 8, 8), torch.float32, device)
    q, k = (tensors[name].requires_grad_() for name in "qk")
    q_out, k_out = rope(**tensors)
    # As an attention that computes in (B, H, S, D) order returns them.
    upstream = [torch.randn(q.shape, device=device), torch.randn(k.shape, device=device)]
    for x, gradient in zip((q, k), torch.autograd.grad([q_out, k_out], [q, k], upstream), strict=True):
        assert gradient.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_gradients(layout, device):
    tensors = inputs((2, 4, 2, 3, 8, 6), torch.float32, device)
    one = torch.ones((), device=device)
    _check(tensors, [one.expand(2, 4, 3, 8), one.expand(2, 2, 3, 8)], layout=layout)
    q_grad = torch.randn(2, 4, 3, 8, device=device)  # positions adjoin, as in (B, H, S, D) memory
    k_grad = torch.randn(2, 3, 8, 2, device=device).permute(0, 3, 1, 2)
    _check(tensors, [q_grad, k_grad], layout=layout)


def test_large_magnitudes(device):
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, device)
    _check({**tensors, "q": tensors["q"] * 1e4, "k": tensors["k"] * 1e30})
    cos, sin = (torch.full((1, 3, 8), value, device=device, dtype=torch.float16) for value in (0.5, 0.25))
    half = torch.full((1, 2, 3, 8), 60000.0, device=device, dtype=torch.float16)
    _check({"q": half, "k": -half, "cos": cos, "sin": sin})


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8, 8), (2, 2, 1, 0, 8, 8)], ids=str)
def test_empty(shape, device):
    tensors = inputs(shape, torch.float32, device)
    q = tensors["q"].requires_grad_()
    q_out, k_out = rope(**tensors)
    assert (q_out.shape, k_out.shape) == (q.shape, tensors["k"].shape)
    assert torch.autograd.grad(q_out.sum(), q)[0].shape == q.shape


def test_a_gradient_of_cos_and_float64_go_to_the_reference(device):
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, device)
    cos = tensors["cos"].requires_grad_()
    assert torch.autograd.grad(rope(**tensors)[0].sum(), cos)[0].abs().sum() > 0
    doubles = {name: x.detach().double() for name, x in tensors.items()}
    for got, expected in zip(rope(**doubles), rope_reference(**doubles), strict=True):
        assert torch.equal(got, expected)


def test_saved_tensors_and_gradients_are_not_written_over(device):
    tensors = inputs((1, 2, 1, 3, 8, 8), torch.float32, device)
    before = {name: x.clone() for name, x in tensors.items()}
    tensors["q"].requires_grad_()
    q_out, _ = rope(**tensors)
    upstream = torch.randn_like(q_out)
    copy = upstream.clone()
    q_out.backward(upstream)
    assert torch.equal(upstream, copy)
    assert all(torch.equal(x.detach(), before[name]) for name, x in tensors.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formula_of_the_docstring(layout):
    """The hand-derived rotation and its transpose against autograd of the reference, in float64."""
    dim, rotary = 10, 8
    cos, sin = rotation(1, 1, rotary, torch.float64, torch.device("cpu"))
    x = torch.randn(1, 1, 1, dim, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(dim, dtype=torch.float64)
    y, _ = rope_reference(x, x, cos, sin, layout=layout)
    (dx,) = torch.autograd.grad(y, x, dy.view_as(y))
    x, y, dx, c, s = x.detach().flatten(), y.detach().flatten(), dx.flatten(), cos.flatten(), sin.flatten()
    expected_y, expected_dx = x.clone(), dy.clone()
    for j in range(rotary // 2):
        a, b = (j, j + rotary // 2) if layout == "half" else (2 * j, 2 * j + 1)
        ca, cb = (j, j) if layout == "interleaved_repeat" else (a, b)
        expected_y[a] = x[a] * c[ca] - x[b] * s[ca]
        expected_y[b] = x[b] * c[cb] + x[a] * s[cb]
        expected_dx[a] = dy[a] * c[ca] + dy[b] * s[cb]
        expected_dx[b] = dy[b] * c[cb] - dy[a] * s[ca]
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_reference_is_what_transformers_computes(layout):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    eager = llama.apply_rotary_pos_emb if layout == "half" else cohere.apply_rotary_pos_emb
    tensors = inputs((2, 4, 2, 3, 16, 16), torch.float32, torch.device("cpu"))
    for got, expected in zip(rope_reference(**tensors, layout=layout), eager(**tensors), strict=True):
        assert torch.equal(got, expected)


def test_repeat_reference_is_what_transformers_computes():
    glm4 = pytest.importorskip("transformers.models.glm4.modeling_glm4")
    tensors = inputs((2, 4, 2, 3, 16, 8), torch.float32, torch.device("cpu"))
    got = rope_reference(**tensors, layout="interleaved_repeat")
    for result, expected in zip(got, glm4.apply_rotary_pos_emb(**tensors), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("tokens", [1, 100, 8192, 65536])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (32, 8, 128, 128),
        (9, 3, 64, 64),
        (40, 8, 96, 32),
        (96, 8, 128, 64),
        (1, 1, 2, 2),
        (1, 64, 576, 64),
        (128, 1, 192, 64),
    ],
    ids=str,
)
def test_tiles_cover_all_heads_and_stay_small(shape, strided, tokens):
    q_heads, k_heads, dim, rotary = shape
    tiles = head_tiles(tokens, q_heads, k_heads, dim, rotary, strided)
    assert tiles["TILES"] * tiles["BLOCK_HQ"] >= q_heads
    assert tiles["TILES"] * tiles["BLOCK_HK"] >= k_heads
    rows = tiles["BLOCK_T"] * max(tiles["BLOCK_HQ"], tiles["BLOCK_HK"])
    assert rows == 1 or rows * 2 * tiles["BLOCK_HALF"] <= op.TILE_ELEMENTS
    warps = warps_for(tiles, 32)
    assert warps in (1, 2, 4, 8, 16)


def test_arguments():
    tensors = inputs((2, 4, 2, 3, 16, 16), torch.float32, torch.device("cpu"))
    for match, changes in (
        ("'gptj'.*'half'", {"layout": "gptj"}),
        ("unsqueeze_dim 3", {"unsqueeze_dim": 3}),
        ("number of heads", {"k": tensors["k"][:, :, :2]}),
        ("cos", {"cos": tensors["cos"][:, :2]}),
        ("sin", {"sin": tensors["sin"][..., :8]}),
        ("15 columns", {"cos": tensors["cos"][..., :15], "sin": tensors["sin"][..., :15]}),
    ):
        with pytest.raises(ValueError, match=match):
            rope(**{**tensors, **changes})


def test_opcheck(device):
    tensors = inputs((2, 4, 2, 3, 16, 8), torch.float32, device)
    q, k, cos, sin = tensors.values()
    torch.library.opcheck(torch.ops.sloth.rope_fwd, (q, k, cos, sin, "half", 1, torch.float16))
    arguments = ("interleaved", 1, torch.float16, torch.float32, q.stride(), k.stride())
    torch.library.opcheck(torch.ops.sloth.rope_bwd, (q, k, cos, sin, *arguments))


def test_compile(device):
    tensors = inputs((2, 4, 2, 3, 16, 16), torch.float32, device)
    leaves = [tensors[name].requires_grad_() for name in "qk"]

    def step(q, k, cos, sin):
        q_out, k_out = rope(q * 2, k * 2, cos, sin)
        return q_out.square().sum() + k_out.square().sum()

    expected = torch.autograd.grad(step(**tensors), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(**tensors), leaves), expected)
