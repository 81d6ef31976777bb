"""Every family: exactly what is patched, training as before, and exact undo."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from helpers import (
    FAMILIES,
    batch,
    forwards,
    loss_and_gradients,
    no_sloth_warnings,
    patched_ops,
    reasons,
    relative_difference,
    tiny_model,
    train,
)

import sloth_plugins as sloth

# Pattern of module names -> op; * stands for every layer.
ROPE = {"model.layers.*.self_attn": "rope"}
MLP = {"model.layers.*.mlp": "gated_mlp"}
QK_NORM_ROPE = {f"model.layers.*.self_attn{norm}": "qk_norm_rope" for norm in ("", ".q_norm", ".k_norm")}
# The residual addition before this norm is fused with it, which is a patch of the layer.
FUSED = {"model.layers.*": "add_rms_norm"}
PRE = {"model.layers.*.input_layernorm": "rms_norm", "model.norm": "rms_norm"}
POST = {"model.layers.*.post_attention_layernorm": "rms_norm"}
FEEDFORWARD = {f"model.layers.*.{which}_feedforward_layernorm": "rms_norm" for which in ("pre", "post")}
GLM = {f"model.layers.*.post_{which}_layernorm": "rms_norm" for which in ("self_attn", "mlp")}
OLMO = {"model.layers.*.post_feedforward_layernorm": "rms_norm", "model.norm": "rms_norm"} | {
    f"model.layers.*.self_attn.{which}_norm": "rms_norm" for which in "qk"
}
COHERE = {"model.layers.*.input_layernorm": "layer_norm", "model.norm": "layer_norm"}
BERT = {
    "bert.embeddings.LayerNorm": "layer_norm",
    "bert.encoder.layer.*.attention.output.LayerNorm": "layer_norm",
    "bert.encoder.layer.*.output.LayerNorm": "layer_norm",
    "cls.predictions.transform.LayerNorm": "layer_norm",
}
LLAMA = ROPE | MLP | FUSED | PRE | POST
PATCHED: Mapping[str, Mapping[str, str]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QK_NORM_ROPE | MLP | FUSED | PRE | POST,
    "gemma2": LLAMA | FEEDFORWARD,
    "gemma3_text": QK_NORM_ROPE | MLP | FUSED | PRE | POST | FEEDFORWARD,
    "phi3": LLAMA,
    "olmo2": ROPE | MLP | POST | OLMO,
    "cohere2": ROPE | MLP | COHERE,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "glm4": LLAMA | GLM,
    "qwen3_moe": QK_NORM_ROPE | FUSED | PRE | POST,
    "bert": BERT,
}
ATTENTION = "its three linear layers have one width, but it is no gated MLP"
# The references are eager's own operations, in nearly eager's order. A kernel's sums have another one, and
# AdamW's first steps turn the rounding of a gradient near zero into a whole step.
TOLERANCE = {"cpu": 2e-6, "cuda": 2e-5}
NO_ROPE = "this layer applies no rotary embedding"
EXPERTS = "experts stored as stacked 3-D weights: left to the model's own mixture-of-experts code"
# (module, op) -> reason, of what is left alone, and never more than that.
LEFT_ALONE: Mapping[str, Mapping[tuple[str, str], str]] = {
    "cohere2": {("model.layers.3.self_attn", "rope"): NO_ROPE},
    "smollm3": {("model.layers.3.self_attn", "rope"): NO_ROPE},
    "qwen3_moe": {(f"model.layers.{i}.mlp.experts", "gated_mlp"): EXPERTS for i in range(2)},
    "bert": {(f"bert.encoder.layer.{i}.attention.self", "gated_mlp"): ATTENTION for i in range(2)},
}


def expected(family: str) -> dict[str, str]:
    layers = FAMILIES[family].get("num_hidden_layers", 2)
    table = {
        pattern.replace("*", str(layer)): op
        for pattern, op in PATCHED[family].items()
        for layer in range(layers)
    }
    table["cls.predictions.decoder" if family == "bert" else "lm_head"] = "linear_cross_entropy"
    return {name: op for name, op in table.items() if (name, op) not in LEFT_ALONE.get(family, {})}


def test_every_family_is_in_the_table() -> None:
    assert PATCHED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_these_modules_are_patched(family: str) -> None:
    model = tiny_model(family)
    with no_sloth_warnings():
        acceleration = sloth.accelerate(model, strict=True)
    report = acceleration.report
    assert patched_ops(report) == expected(family)
    assert reasons(report) == LEFT_ALONE.get(family, {})
    assert forwards(model).keys() == expected(family).keys()
    for row in report.patched:
        assert row.plugin == "sloth_patches" and row.kernel == f"sloth.torch.{row.op}"
        assert row.max_rel_error is not None and row.eager_rel_error is not None
        assert 0 < row.max_rel_error <= 1.5 * row.eager_rel_error + 1e-6 < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_and_undo_is_exact(family: str, device: torch.device) -> None:
    # On a GPU the backward of fused attention adds up in an order that differs from run to run.
    attention = {"attn_implementation": "eager"} if device.type == "cuda" else {}
    model = tiny_model(family, **attention).to(device).train()
    ids = batch(model)
    loss, gradients = loss_and_gradients(model, ids)

    acceleration = sloth.accelerate(model)
    patched_loss, patched_gradients = loss_and_gradients(model, ids)
    assert patched_gradients.keys() == gradients.keys()
    torch.testing.assert_close(patched_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        error = torch.linalg.vector_norm(patched_gradients[name] - gradient)
        # A gradient that is exactly zero in theory (a key's bias) is rounding alone, of the largest's scale.
        scale = max(
            torch.linalg.vector_norm(gradient).item(), 1e-2 * max(g.norm().item() for g in gradients.values())
        )
        assert error <= TOLERANCE[device.type] * scale, (name, error, scale)

    acceleration.undo()
    assert not forwards(model)
    again, same_gradients = loss_and_gradients(model, ids)
    assert torch.equal(again, loss)
    assert all(torch.equal(same_gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_three_optimizer_steps_agree(family: str, device: torch.device) -> None:
    losses = []
    for patched in (False, True):
        model = tiny_model(family).to(device)
        if patched:
            assert sloth.accelerate(model).report.patched
        losses.append(train(model, steps=3))
    if relative_difference(losses[1], losses[0]) > TOLERANCE[device.type]:
        truth = train(tiny_model(family).to(device).double(), steps=3)
        eager, ours = (relative_difference(run, truth) for run in losses)
        # Where eager's own rounding is more: AdamW makes steps as large of small gradients as of others.
        assert ours <= max(TOLERANCE[device.type], 3 * eager)
    assert len(set(losses[0])) == 3  # it does train


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "cohere2"])
def test_interpreted_triton_kernels_train_the_same(family: str) -> None:
    """The path of a GPU, in Triton's interpreter: one forward and backward, few tokens."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; there the other tests run Triton itself")
    model = tiny_model(family, num_hidden_layers=1)
    ids = batch(model, rows=1, tokens=4)
    loss, gradients = loss_and_gradients(model, ids)
    with sloth.accelerate(model, kernels="triton", verify=False) as acceleration:
        assert {row.kernel.split(".")[1] for row in acceleration.report.patched} == {"triton"}
        patched_loss, patched_gradients = loss_and_gradients(model, ids)
    torch.testing.assert_close(patched_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(patched_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_site_is_verified_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype).cuda()
    report = sloth.accelerate(model).report
    assert patched_ops(report) == expected(family), reasons(report)
    assert {row.kernel.split(".")[1] for row in report.patched} == {"triton"}
