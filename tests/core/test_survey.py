"""Roles by behaviour: what is a norm, a gated MLP, an attention, and what only looks like one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    batch,
    forwards,
    loss_and_gradients,
    make_plugin,
    manager_with,
    no_sloth_warnings,
    patched_ops,
    reasons,
    tiny_model,
)
from torch import nn

import sloth_plugins as sloth
from sloth_plugins.numerics import relative_error
from sloth_plugins.settings import Settings
from sloth_plugins.specs import KernelSpec, Survey
from sloth_plugins.survey import sloth_survey_model


def survey(model: nn.Module) -> Survey:
    return sloth_survey_model(model=model, settings=Settings())


def only(module: nn.Module, role: str) -> Any:
    """Facts of the one site that a module by itself is."""
    found = survey(nn.Sequential(module))
    (site,) = (site for site in found.sites if site.module == "0")
    assert site.role == role and not found.skips
    return site.facts


def left_alone(module: nn.Module) -> str:
    """Why a module by itself is left alone."""
    found = survey(nn.Sequential(module))
    assert not found.sites, found.sites
    (skip,) = found.skips
    assert skip.module == "0"
    return skip.reason


# Norms


class RMSNorm(nn.Module):
    def __init__(
        self,
        width: int = 24,
        *,
        offset: float = 0.0,
        early: bool = False,
        weight: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 1 - offset) if weight else None
        self.offset, self.early, self.variance_epsilon, self.normalized_shape = offset, early, eps, (width,)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.weight is None:
            return x.to(hidden.dtype)
        if self.early:
            return (self.weight + self.offset) * x.to(hidden.dtype)
        return ((self.weight.float() + self.offset) * x).to(hidden.dtype)


class LayerNorm(RMSNorm):
    def __init__(self, width: int = 24, *, bias: bool = True, **options: Any) -> None:
        super().__init__(width, **options)
        self.bias = nn.Parameter(torch.rand(width)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden - hidden.mean(-1, keepdim=True)
        x = super().forward(x)
        return x if self.bias is None else x + self.bias


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("early", [False, True])
def test_rms_norm(offset: float, early: bool) -> None:
    facts = only(RMSNorm(offset=offset, early=early, eps=3e-4), "rms_norm")
    assert facts == {
        "role": "rms_norm",
        "width": 24,
        "eps": 3e-4,
        "weight": "weight",
        "bias": None,
        "offset": offset,
        "cast_before_weight": early,
    }


def test_rms_norm_without_a_weight() -> None:
    facts = only(RMSNorm(weight=False), "rms_norm")
    assert facts["weight"] is None and facts["offset"] == 0.0 and facts["width"] == 24


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", [False, True])
def test_layer_norm(bias: bool, weight: bool) -> None:
    facts = only(LayerNorm(bias=bias, weight=weight), "layer_norm")
    assert facts["weight"] == ("weight" if weight else None) and facts["bias"] == ("bias" if bias else None)


@pytest.mark.parametrize(
    ("module", "role"),
    [
        (nn.LayerNorm(24), "layer_norm"),
        (nn.LayerNorm(24, bias=False), "layer_norm"),
        (nn.LayerNorm(24, elementwise_affine=False), "layer_norm"),
        (nn.RMSNorm(24, eps=1e-6), "rms_norm"),
        (nn.RMSNorm(24, eps=1e-6, elementwise_affine=False), "rms_norm"),
    ],
    ids=repr,
)
def test_torchs_own_norms(module: nn.Module, role: str) -> None:
    assert only(module, role)["width"] == 24


class L2Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class GatedNorm(RMSNorm):
    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden) * F.silu(gate)


class ClampedNorm(RMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.clamp(-100, 100))


class PickyNorm(RMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("only on a Tuesday")


class HalfNorm(RMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)[..., :12]


class TwiceEps(RMSNorm):
    """Adds its eps outside the root."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        return self.weight * hidden / (hidden.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (L2Norm(), "it computes neither RMSNorm"),
        (GatedNorm(), "takes more than one tensor"),
        (ClampedNorm(), "it computes neither RMSNorm"),
        (PickyNorm(), "the probe could not run it: RuntimeError: only on a Tuesday"),
        (HalfNorm(), "has not the shape of its input"),
        (TwiceEps(eps=1e-2), "it computes neither RMSNorm"),
        (nn.RMSNorm(24), "a norm without an eps attribute"),  # its eps depends on the dtype
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_looks_like_a_norm_is_left_alone(module: nn.Module, reason: str) -> None:
    assert reason in left_alone(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.GroupNorm(2, 24),
        nn.BatchNorm1d(24),
        nn.InstanceNorm1d(24),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose1d(4, 4, 3),
        nn.Linear(24, 24),
        nn.Embedding(24, 24),
        nn.Bilinear(4, 4, 4),
        nn.MultiheadAttention(24, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_no_candidates(module: nn.Module) -> None:
    found = survey(nn.Sequential(module))
    assert not found.sites and not found.skips


# Gated MLPs

ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "silu": (F.silu, "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
}


class MLP(nn.Module):
    def __init__(
        self,
        act: Any = F.silu,
        *,
        narrow: int = 16,
        wide: int = 24,
        bias: bool = False,
        names: str = "gate up down",
    ) -> None:
        super().__init__()
        self.names, self.act = names.split(), act
        gate, up, down = self.names
        self.add_module(gate, nn.Linear(narrow, wide, bias=bias))
        self.add_module(up, nn.Linear(narrow, wide, bias=bias))
        self.add_module(down, nn.Linear(wide, narrow, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


class FusedMLP(nn.Module):
    def __init__(self, act: Any = F.silu, *, gate_first: bool = True) -> None:
        super().__init__()
        self.act, self.gate_first = act, gate_first
        self.w1, self.w2 = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = self.w1(x).chunk(2, dim=-1)
        gate, up = halves if self.gate_first else reversed(halves)
        return self.w2(self.act(gate) * up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_mlp(act: str, bias: bool) -> None:
    function, name = ACTIVATIONS[act]
    facts = only(MLP(function, bias=bias), "gated_mlp")
    assert facts == {"gate": "gate", "up": "up", "down": "down", "activation": name}


@pytest.mark.parametrize("names", ["up gate down", "c b a", "w1 w3 w2", "down up gate"])
def test_names_mean_nothing(names: str) -> None:
    gate, up, down = names.split()
    facts = only(MLP(names=names), "gated_mlp")
    assert (facts["gate"], facts["up"], facts["down"]) == (gate, up, down)


@pytest.mark.parametrize("names", ["gate up down", "c b a", "b c a"])
def test_one_width_for_all_is_told_apart_by_behaviour(names: str) -> None:
    gate, up, down = names.split()
    facts = only(MLP(narrow=16, wide=16, names=names), "gated_mlp")
    assert (facts["gate"], facts["up"], facts["down"]) == (gate, up, down)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_fused_gate_and_up(act: str) -> None:
    function, name = ACTIVATIONS[act]
    assert only(FusedMLP(function), "gated_mlp") == {"gate_up": "w1", "down": "w2", "activation": name}


class DropoutInside(MLP):
    """Functional dropout, which no list of children shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(self.act(self.gate(x)) * self.up(x), 0.1, self.training))


class NestedDropout(MLP):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.SiLU(), nn.Dropout(0.1)))


class Clamped(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)).clamp(max=50.0) * self.up(x))


class Scaled(MLP):
    """A factor that is 1 now and is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x)


class Buffered(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(x)


class TwoResults(MLP):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.rand(2, 48, 16)), nn.Parameter(torch.rand(2, 16, 24))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (MLP(F.relu), "does not compute down(act(gate(x)) * up(x)) for act in silu, gelu_tanh, gelu"),
        (FusedMLP(gate_first=False), "up before gate"),
        (DropoutInside(), "something else in training mode: dropout?"),
        (NestedDropout(), "something else in training mode: dropout?"),
        (Clamped(), "does not compute"),
        (Scaled(), "parameters or buffers of its own"),
        (Buffered(), "parameters or buffers of its own"),
        (TwoResults(), "its output is no tensor"),
        (Experts(), "experts stored as stacked 3-D weights"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_looks_like_a_gated_mlp_is_left_alone(module: nn.Module, reason: str) -> None:
    assert reason in left_alone(module)


def test_an_mlp_without_a_gate_is_no_candidate() -> None:
    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    found = survey(nn.Sequential(mlp))
    assert not found.sites and not found.skips


@pytest.mark.parametrize("kind", ["function", "module", "nested", "list"])
def test_two_instances_of_one_class_may_differ_in_what_is_no_scalar(kind: str) -> None:
    """One probe serves a class and a configuration, and the activation belongs to the configuration."""

    class Chosen(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            act = self.act[0] if isinstance(self.act, list) else self.act
            if act == "gelu":
                act = F.gelu
            return self.down((F.silu if act == "silu" else act)(self.gate(x)) * self.up(x))

    acts = {
        "function": (F.silu, F.gelu),
        "module": (nn.SiLU(), nn.GELU()),
        "nested": (nn.Sequential(nn.SiLU()), nn.Sequential(nn.GELU())),
        "list": (["silu"], ["gelu"]),
    }[kind]
    model = nn.Sequential(*(Chosen(act) for act in acts))
    assert [site.facts["activation"] for site in survey(model).sites] == ["silu", "gelu"]
    assert only(Chosen(nn.GELU("tanh")), "gated_mlp")["activation"] == "gelu_tanh"
    x = torch.randn(3, 16)
    want = model(x)
    with sloth.accelerate(model) as acceleration:
        assert patched_ops(acceleration.report) == {"0": "gated_mlp", "1": "gated_mlp"}
        torch.testing.assert_close(model(x), want)


# Rotary helpers. At module level: an attention finds its helper among its globals.


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def half_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def tokens_first_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 2) -> Any:
    return half_rotary(q, k, cos, sin, unsqueeze_dim)


def interleaved_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_pairs(q) * sin, k * cos + rotate_pairs(k) * sin


def repeat_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
    return interleaved_rotary(q, k, cos, sin, unsqueeze_dim)


def partial_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    width = cos.shape[-1]
    (q, q_rest), (k, k_rest) = ((x[..., :width], x[..., width:]) for x in (q, k))
    q, k = half_rotary(q, k, cos, sin, unsqueeze_dim)
    return torch.cat((q, q_rest), dim=-1), torch.cat((k, k_rest), dim=-1)


def float_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    rotated = half_rotary(q.float(), k.float(), cos.float(), sin.float(), unsqueeze_dim)
    return tuple(x.to(q.dtype) for x in rotated)


def backward_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return half_rotary(q, k, cos, -sin, unsqueeze_dim)


def only_q_rotary(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return half_rotary(q, k, cos, sin, unsqueeze_dim)[0], k


class Attention(nn.Module):
    """Two heads of queries, one of keys and values."""

    rotary_width = 8

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o, self.head_dim = nn.Linear(16, 16), 8

    def angles(self, x: torch.Tensor) -> Any:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / 10 ** torch.arange(
            self.rotary_width, device=x.device
        )
        return angles.cos()[None], angles.sin()[None]

    def project(self, x: torch.Tensor) -> Any:
        return tuple(linear(x).unflatten(-1, (-1, 8)).transpose(1, 2) for linear in (self.q, self.k, self.v))

    def attend(self, q: Any, k: Any, v: Any) -> torch.Tensor:
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
        return self.o(y.transpose(1, 2).flatten(-2))


class Half(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*half_rotary(q, k, *self.angles(x)), v)


class TokensFirst(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        q, k = tokens_first_rotary(q.transpose(1, 2), k.transpose(1, 2), *self.angles(x))
        return self.attend(q.transpose(1, 2), k.transpose(1, 2), v)


class Interleaved(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*interleaved_rotary(q, k, *self.angles(x)), v)


class Repeat(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*repeat_rotary(q, k, *self.angles(x)), v)


class Partial(Attention):
    rotary_width = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*partial_rotary(q, k, *self.angles(x)), v)


class Float(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*float_rotary(q, k, *self.angles(x)), v)


class Backward(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*backward_rotary(q, k, *self.angles(x)), v)


class OnlyQ(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        return self.attend(*only_q_rotary(q, k, *self.angles(x)), v)


class TwoHelpers(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        helper = half_rotary if self.training else interleaved_rotary
        return self.attend(*helper(q, k, *self.angles(x)), v)


class Model(nn.Module):
    """Token ids in, so that verification can run it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(50, 16), block

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.block(self.embedding(input_ids))


@pytest.mark.parametrize(
    ("attention", "layout", "unsqueeze_dim", "result"),
    [
        (Half, "half", 1, "promoted"),
        (TokensFirst, "half", 2, "promoted"),
        (Interleaved, "interleaved", 1, "promoted"),
        (Repeat, "interleaved_repeat", 1, "promoted"),
        (Partial, "half", 1, "promoted"),
        (Float, "half", 1, "input"),
    ],
)
def test_rotary_helpers(attention: type[nn.Module], layout: str, unsqueeze_dim: int, result: str) -> None:
    facts = only(attention(), "attention")
    assert (facts["layout"], facts["unsqueeze_dim"], facts["result"]) == (layout, unsqueeze_dim, result)
    torch.manual_seed(0)
    model = Model(attention())
    ids = torch.randint(0, 50, (2, 7))
    want = model(ids)
    before = dict(vars(attention).get("forward").__globals__)
    with sloth.accelerate(model) as acceleration:
        assert patched_ops(acceleration.report) == {"block": "rope"}, reasons(acceleration.report)
        torch.testing.assert_close(model(ids), want)
        assert attention.forward.__globals__ == before  # replaced for this instance alone
    assert torch.equal(model(ids), want)


class KFirst(Half):
    """Norms of q and k, defined as q and k, but called as k and q."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(8), RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        k = self.k_norm(k)
        q = self.q_norm(q)
        return self.attend(*half_rotary(q, k, *self.angles(x)), v)


def test_norms_called_in_another_order_are_not_exchanged() -> None:
    model = Model(KFirst()).requires_grad_(False)
    for norm in (model.block.q_norm, model.block.k_norm):
        norm.weight.fill_(1.0)  # as in a new model: no output tells which norm was used
    model.embedding.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="qk_norm_rope"):
        acceleration = sloth.accelerate(model)
    assert set(patched_ops(acceleration.report).values()) == {"rope", "rms_norm"}
    model.block.q_norm.weight.mul_(3)
    ids = torch.arange(12).view(2, 6)
    got = model(ids)
    acceleration.undo()
    torch.testing.assert_close(got, model(ids))


@pytest.mark.parametrize("attention", [Backward, OnlyQ])
def test_another_rotation_is_no_candidate(attention: type[nn.Module]) -> None:
    found = survey(nn.Sequential(attention()))
    assert not found.sites and not found.skips


def test_two_rotary_helpers_in_one_forward_are_left_alone() -> None:
    assert "several rotary helpers: half_rotary, interleaved_rotary" in left_alone(TwoHelpers())


def liger_rotary_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    raise RuntimeError("0 active drivers")


def test_a_rotary_helper_that_liger_replaced_for_the_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_rotary_emb, "__module__", "liger_kernel.transformers.rope")
    monkeypatch.setitem(Half.forward.__globals__, "half_rotary", liger_rotary_emb)
    assert left_alone(Half()) == "its helper half_rotary is already patched by Liger"


# A whole model


def test_roles_of_a_whole_model() -> None:
    found = survey(tiny_model("llama"))
    roles = {site.module: site.role for site in found.sites}
    assert roles["model.layers.1"] == "decoder_layer" and roles["lm_head"] == "lm_head"
    assert roles["model.layers.0.self_attn"] == "attention" and not found.skips
    signatures = {site.signature for site in found.sites if site.role == "rms_norm"}
    assert len(signatures) == 1  # verified once


def snapshot(model: nn.Module) -> Any:
    return [
        (name, id(p), p._version, p.grad is None or p.grad.clone(), p.requires_grad)
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_model_or_the_process_is_touched(training: bool) -> None:
    model = nn.Sequential(
        tiny_model("qwen3"), MLP(), DropoutInside(), NestedDropout(), RMSNorm(), PickyNorm()
    )
    model.train(training)
    model[1].eval()
    model[0].get_input_embeddings().weight.grad = torch.ones(104, 32)
    before, flags = snapshot(model), [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    random_state, values = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    for look in (survey, sloth.plan):
        look(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sloth.accelerate(model).undo()
    after = snapshot(model)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    assert all(
        torch.equal(torch.as_tensor(a[3]), torch.as_tensor(b[3])) for a, b in zip(after, before, strict=True)
    )
    assert flags == [module.training for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_the_callers_context_does_not_matter() -> None:
    expected = patched_ops(sloth.accelerate(tiny_model("qwen3")).report)
    contexts: dict[str, Callable[[], Any]] = {
        "device": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    for name, context in contexts.items():
        model = tiny_model("qwen3")
        with context():
            acceleration = sloth.accelerate(model)
        assert patched_ops(acceleration.report) == expected, name


def test_a_wrong_gradient_is_found_under_inference_mode() -> None:
    def no_gradient(x: Any, weight: Any, **options: Any) -> Any:
        return reference(x.detach(), weight, **options)

    (reference,) = (k.reference for k in manager_with().kernels() if k.name == "sloth.torch.rms_norm")
    spec = KernelSpec(
        op="rms_norm",
        name="test.kernel",
        backend="test",
        function=no_gradient,
        reference=reference,
        device_types=frozenset({"cpu"}),
    )
    own = manager_with(third=make_plugin(sloth_register_kernels=lambda: [spec]))
    model = nn.Sequential(RMSNorm())
    with torch.inference_mode(), pytest.warns(UserWarning, match="gradient of x"):
        report = sloth.accelerate(model, manager=own).report
    assert not report.patched


def test_the_meta_device() -> None:
    with torch.device("meta"):
        meta = tiny_model_on_meta()
    report = sloth.plan(meta)
    assert report.planned and {row.op for row in report.patched} == {
        "qk_norm_rope",
        "rms_norm",
        "gated_mlp",
        "add_rms_norm",
        "linear_cross_entropy",
    }
    assert "would patch" in str(report) and not forwards(meta)
    assert {row.max_rel_error for row in report.patched} == {None}
    with pytest.raises(ValueError, match=r"meta device.*plan\(model\)"):
        sloth.accelerate(meta)


def tiny_model_on_meta() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_model("qwen3").config)


def test_plan_and_accelerate_agree_and_plan_changes_nothing() -> None:
    for family in ("llama", "qwen3", "gemma3_text", "phi3"):
        model = tiny_model(family)
        planned = patched_ops(sloth.plan(model))
        assert not forwards(model)
        assert planned == patched_ops(sloth.accelerate(model).report)


# PEFT and bitsandbytes


def lora(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=linears, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config)
    # Small beside the weights: attention that is nearly one-hot multiplies rounding.
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_B." in name:
                p.mul_(0.1)
    return adapted


def test_it_sees_through_lora_and_modules_to_save() -> None:
    model = lora(tiny_model("qwen3"), modules_to_save=["model.norm"])
    ids = batch(model)
    loss, gradients = loss_and_gradients(model, ids)
    with no_sloth_warnings():
        acceleration = sloth.accelerate(model, strict=True)
    ops = patched_ops(acceleration.report)
    root = "base_model.model.model."
    assert ops[f"{root}layers.0.mlp"] == "lora_mlp" and ops[f"{root}layers.1.self_attn"] == "qk_norm_rope"
    assert {name for name in ops if name.startswith(f"{root}norm.")} == {
        f"{root}norm.original_module",
        f"{root}norm.modules_to_save.default",
    }
    patched_loss, patched_gradients = loss_and_gradients(model, ids)
    torch.testing.assert_close(patched_loss, loss, rtol=1e-6, atol=0)
    assert patched_gradients.keys() == gradients.keys() and any(
        "modules_to_save" in name for name in gradients
    )
    for name, gradient in gradients.items():
        assert relative_error(patched_gradients[name], gradient) < 1e-5, name
    acceleration.undo()
    assert torch.equal(loss_and_gradients(model, ids)[0], loss)


def test_adapters_added_later_are_seen_and_keep_their_effect() -> None:
    model = tiny_model("llama")
    acceleration = sloth.accelerate(model)
    adapted = lora(model)
    ids = torch.arange(8)[None]
    again = sloth.accelerate(adapted)
    with_adapter = adapted(input_ids=ids).logits
    with adapted.disable_adapter():
        without = adapted(input_ids=ids).logits
    assert (with_adapter - without).abs().max() > 1e-3
    again.undo()
    acceleration.undo()
    assert not forwards(adapted)
    torch.testing.assert_close(adapted(input_ids=ids).logits, with_adapter)


def test_it_sees_through_4_bit_linears(device: torch.device) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    mlp = MLP(narrow=64, wide=128)
    for name in mlp.names:
        linear = getattr(mlp, name)
        quantized = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        quantized.load_state_dict(linear.state_dict())
        setattr(mlp, name, quantized)
    model = nn.Sequential(mlp).to(device)
    x = torch.randn(3, 64, device=device)
    try:
        want = model(x)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes can't run 4-bit linears on {device}: {error}")
    assert model[0].gate.weight.quant_state is not None
    with sloth.accelerate(model) as acceleration:
        assert patched_ops(acceleration.report) == {"0": "gated_mlp"}, reasons(acceleration.report)
        torch.testing.assert_close(model(x), want)


# Bad input


def test_a_model_without_a_site_gets_one_warning() -> None:
    with pytest.warns(UserWarning, match="^sloth:") as caught:
        report = sloth.accelerate(nn.Sequential(nn.Linear(4, 4)), strict=True).report
    assert [str(w.message) for w in caught] == [
        "sloth: nothing to patch in Sequential (no known site was found); training goes on as it was"
    ]
    assert not report.patched and not report.skipped


def test_a_model_with_candidates_alone_gets_one_warning_that_names_the_first() -> None:
    model = nn.Sequential(L2Norm(), MLP(F.relu))
    with pytest.warns(UserWarning, match="^sloth:") as caught:
        report = sloth.accelerate(model).report
    assert len(caught) == 1 and "'0': it computes neither RMSNorm" in str(caught[0].message)
    assert reasons(report).keys() == {("0", "norm"), ("1", "gated_mlp")}
    assert "neither RMSNorm" in str(report)


def test_strict_names_the_first_skipped_site_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(RMSNorm(), MLP(F.relu), L2Norm())
    with pytest.raises(sloth.SkippedSiteError) as caught:
        sloth.accelerate(model, strict=True)
    assert "'1'" in str(caught.value) and "gated_mlp" in str(caught.value)
    assert not forwards(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_norm_with_a_broken_weight_is_named_and_the_others_are_patched(bad: float, layer: int) -> None:
    model = tiny_model("llama")
    name = f"model.layers.{layer}.input_layernorm"
    with torch.no_grad():
        model.get_submodule(name).weight[3] = bad
    with pytest.warns(UserWarning, match="holds NaN or infinity"):
        report = sloth.accelerate(model).report
    assert reasons(report)[name, "rms_norm"] == f"{name}.weight holds NaN or infinity"
    ops = patched_ops(report)
    assert name not in ops and ops[f"model.layers.{1 - layer}.input_layernorm"] == "rms_norm"


def test_kernels_off_patches_nothing_and_says_so_without_a_warning() -> None:
    model = tiny_model("qwen3")
    with no_sloth_warnings():
        report = sloth.accelerate(model, kernels="off", strict=True).report
    assert not report.patched and not forwards(model)
    assert set(reasons(report).values()) == {"switched off by the setting kernels='off'"}


def test_disabled_ops_are_left_alone() -> None:
    every = set(patched_ops(sloth.accelerate(tiny_model("qwen3")).report).values())
    assert every == {"qk_norm_rope", "rms_norm", "gated_mlp", "add_rms_norm", "linear_cross_entropy"}
    for op in every:
        report = sloth.accelerate(tiny_model("qwen3"), disable=[op], strict=True).report
        assert op not in patched_ops(report).values()
        assert (
            op == "qk_norm_rope" or f"switched off by the setting disable={op!r}" in reasons(report).values()
        )
    apart = patched_ops(sloth.accelerate(tiny_model("qwen3"), disable=["qk_norm_rope"]).report)
    assert (
        apart["model.layers.0.self_attn"] == "rope" and apart["model.layers.0.self_attn.q_norm"] == "rms_norm"
    )
    neither = patched_ops(sloth.accelerate(tiny_model("qwen3"), disable=["rope"]).report)
    assert "rope" not in neither.values() and "qk_norm_rope" not in neither.values()


def test_the_model_itself_can_be_the_site() -> None:
    norm = RMSNorm()
    with sloth.accelerate(norm) as acceleration:
        assert patched_ops(acceleration.report) == {"": "rms_norm"}
        assert "(the model)" in str(acceleration.report)
    with pytest.raises(ValueError, match="model=dict"):
        sloth.accelerate({})  # type: ignore[arg-type]


def test_a_model_that_cannot_be_run_on_made_up_tokens_keeps_its_rotary_helper() -> None:
    class Picky(Model):
        def forward(self, input_ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(input_ids)

    model = Picky(nn.Sequential(Half(), RMSNorm(16)))
    with pytest.warns(UserWarning, match="could not be run on random tokens"):
        report = sloth.accelerate(model).report
    assert patched_ops(report) == {"block.1": "rms_norm"}
    assert "TypeError" in reasons(report)["block.0", "rope"]
