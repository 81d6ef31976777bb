"""The engine: what accelerate() does to a model under all that people do to models, and its undoing."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
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
from sloth_plugins.manager import Manager
from sloth_plugins.settings import Settings
from sloth_plugins.specs import KernelSpec

NORM = "model.norm"


def same_training(
    model: Any, other: tuple[torch.Tensor, dict[str, torch.Tensor]], ids: torch.Tensor, *, exact: bool = False
) -> None:
    """The model's loss and gradients are those of `other`, to the bit or to a few roundings."""
    loss, gradients = loss_and_gradients(model, ids)
    assert gradients.keys() == other[1].keys()
    options = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, other[0], **options)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[1][name], **options)


def spec(function: Callable[..., Any], op: str = "rms_norm", **changes: Any) -> KernelSpec:
    return KernelSpec(
        op=op,
        name=f"test.{op}",
        backend="test",
        function=function,
        reference=reference(op),
        device_types=frozenset({"cpu", "cuda"}),
        **changes,
    )


def reference(op: str) -> Callable[..., Any]:
    (found,) = (kernel.reference for kernel in manager_with().kernels() if kernel.name == f"sloth.torch.{op}")
    return found


def with_kernel(function: Callable[..., Any], op: str = "rms_norm", **changes: Any) -> Manager:
    return manager_with(third=make_plugin(sloth_register_kernels=lambda: [spec(function, op, **changes)]))


class Counted:
    """A right kernel that counts its calls."""

    def __init__(self, op: str) -> None:
        self.function, self.calls = reference(op), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


# Once, again, and back


def test_the_same_settings_give_the_same_acceleration() -> None:
    model = tiny_model("qwen3")
    acceleration = sloth.accelerate(model)
    installed = forwards(model)
    assert sloth.accelerate(model) is acceleration
    assert sloth.accelerate(model, Settings()) is acceleration
    assert all(forward is installed[name] for name, forward in forwards(model).items())
    assert acceleration.model is model and "active" in repr(acceleration)


def test_changed_settings_are_done_anew() -> None:
    model = tiny_model("llama")
    ids = batch(model)
    before = loss_and_gradients(model, ids)
    first = sloth.accelerate(model)
    second = sloth.accelerate(model, disable=["rope"])
    assert second is not first and not first.active and second.active
    assert "rope" not in patched_ops(second.report).values() and len(forwards(model)) == len(
        second.report.patched
    )
    first.undo()  # nothing more
    assert len(forwards(model)) == len(second.report.patched)
    second.undo()
    assert not forwards(model)
    same_training(model, before, ids, exact=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model, "norm", copy.deepcopy(model.model.norm)),
        lambda model: model.model.norm.weight.requires_grad_(False),
        lambda model: model.double().float().bfloat16(),
    ],
    ids=["a module is replaced", "a parameter is frozen", "the model is cast"],
)
def test_a_changed_model_is_done_anew(change: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")
    first = sloth.accelerate(model)
    change(model)
    second = sloth.accelerate(model)
    assert second is not first and not first.active
    assert patched_ops(second.report) == patched_ops(first.report)
    second.undo()
    assert not forwards(model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_undo_gives_back_the_same_objects_and_bits(family: str) -> None:
    model = tiny_model(family)
    ids = batch(model)
    before = loss_and_gradients(model, ids)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    acceleration = sloth.accelerate(model)
    assert acceleration.report.patched and forwards(model)
    acceleration.undo()
    acceleration.undo()
    assert not acceleration.active and "undone" in repr(acceleration)
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys(), name
        assert all(
            vars(module)[key] is value or vars(module)[key] == value
            for key, value in attributes[name].items()
        )
    same_training(model, before, ids, exact=True)


def test_a_context_manager_undoes_at_its_end_and_after_an_error() -> None:
    model = tiny_model("llama")
    with sloth.accelerate(model) as acceleration:
        assert forwards(model) and acceleration.active
    assert not forwards(model)
    with pytest.raises(KeyError), sloth.accelerate(model):
        raise KeyError
    assert not forwards(model)


@pytest.mark.parametrize(
    "where", ["sloth_survey_model", "sloth_plan_patches", "sloth_check_plan", "sloth_plan_checkpointing"]
)
def test_an_error_in_planning_leaves_the_model_untouched(where: str) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    model = tiny_model("qwen3").train()
    ids = batch(model)
    before = loss_and_gradients(model, ids)
    with pytest.raises(ZeroDivisionError):
        sloth.accelerate(model, manager=manager_with(broken=make_plugin(**{where: fail})))
    assert not forwards(model) and all(module.training for module in model.modules())
    same_training(model, before, ids, exact=True)
    assert sloth.accelerate(model).report.patched


def test_the_original_class_forward_runs_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched forwards are the ones that run: the class's own would raise."""
    model = tiny_model("llama")
    ids = batch(model)
    kernels = {op: Counted(op) for op in ("rms_norm", "add_rms_norm", "gated_mlp", "rope")}
    own = manager_with(
        third=make_plugin(sloth_register_kernels=lambda: [spec(k, op) for op, k in kernels.items()])
    )
    sloth.accelerate(model, manager=own)
    for kernel in kernels.values():
        kernel.calls = 0

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model's own forward ran")

    for module in (model.model.norm, model.model.layers[0].mlp):
        monkeypatch.setattr(type(module), "forward", forbidden)
    loss_and_gradients(model, ids)
    assert {op: kernel.calls for op, kernel in kernels.items()} == {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "gated_mlp": 2,
        "rope": 2,
    }


def test_an_input_norm_adds_the_residuals_gradient() -> None:
    """In its own backward, except where somebody wants to see the norm's call."""
    model = tiny_model("llama")
    ids = batch(model)
    want = loss_and_gradients(model, ids)

    def beside() -> int:
        todo, seen = [model(input_ids=ids, labels=ids).loss.grad_fn], set()
        while todo:
            if (node := todo.pop()) is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        return sum("RMSNormBeside" in node.name() for node in seen)

    with sloth.accelerate(model, kernels="triton"):
        assert beside() == 2
        same_training(model, want, ids)
        calls: list[Any] = []
        handle = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        assert beside() == 1 and calls == [1]
        same_training(model, want, ids)
        handle.remove()
        names = {id(module): name for name, module in model.named_modules()}
        seen: list[str] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(names.get(id(module), ""))
        )
        assert beside() == 0 and {f"model.layers.{i}.input_layernorm" for i in range(2)} <= set(seen)
        handle.remove()
        model.model.embed_tokens.requires_grad_(False)
        assert beside() == 1  # the first layer's input has no gradient
        model.model.embed_tokens.requires_grad_(True)
    assert beside() == 0
    same_training(model, want, ids, exact=True)


# Copies, files


def test_a_deep_copy_runs_on_its_own_parameters() -> None:
    model = tiny_model("qwen3")
    ids = batch(model)
    acceleration = sloth.accelerate(model)
    before = loss_and_gradients(model, ids)
    other = copy.deepcopy(model)
    assert all(forward.__self__ is other.get_submodule(name) for name, forward in forwards(other).items())
    same_training(other, before, ids, exact=True)
    for name in (
        NORM,
        "model.layers.0.self_attn.q_norm",
        "model.layers.1.post_attention_layernorm",
        "model.layers.0.mlp.gate_proj",
    ):
        with torch.no_grad():
            weight = other.get_submodule(name).weight
            saved = weight.clone()
            weight.mul_(3)
        changed, _ = loss_and_gradients(other, ids)
        assert (changed - before[0]).abs() > 1e-6, f"{name} of the copy has no effect"
        with torch.no_grad():
            weight.copy_(saved)
    same_training(model, before, ids, exact=True)

    acceleration.undo()
    assert not forwards(model) and forwards(other)
    same_training(other, before, ids, exact=True)
    again = sloth.accelerate(other)
    assert (
        again is not acceleration
        and again.model is other
        and patched_ops(again.report) == patched_ops(acceleration.report)
    )
    again.undo()
    assert not forwards(other)


def test_a_third_partys_patch_survives_a_copy_too() -> None:
    from sloth_plugins.specs import Patch

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    patch = Patch(module="0", op="test.op", kernel=spec(forward), forwards={"0": forward}, signature=("0",))
    own = manager_with(third=make_plugin(sloth_plan_patches=lambda: [patch]))
    model = nn.Sequential(nn.Linear(4, 4))
    sloth.accelerate(model, manager=own, verify=False)
    other = copy.deepcopy(model)
    with no_sloth_warnings():
        again = sloth.accelerate(other, manager=own, verify=False)
    again.undo()
    assert not forwards(other) and forwards(model)


def test_the_state_dict_is_that_of_the_model() -> None:
    model = tiny_model("qwen3")
    keys = list(model.state_dict())
    with sloth.accelerate(model):
        assert list(model.state_dict()) == keys
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = tiny_model("qwen3", seed=7)
        other.load_state_dict(torch.load(buffer))
        ids = batch(model)
        want = loss_and_gradients(model, ids)
    same_training(other, want, ids)


def test_save_pretrained_and_from_pretrained(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = batch(model)
    with sloth.accelerate(model):
        want = loss_and_gradients(model, ids)
        model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert not forwards(other)
    same_training(other, want, ids)
    with sloth.accelerate(other) as acceleration:
        assert acceleration.report.patched
        same_training(other, want, ids, exact=True)


def test_models_are_not_kept_alive() -> None:
    for settings in ({}, {"checkpointing": "recompute"}):
        model = tiny_model("qwen3")
        alive = weakref.ref(model)
        acceleration = sloth.accelerate(model, **settings)
        loss_and_gradients(model, batch(model))
        del model
        gc.collect()
        assert alive() is None, settings
        assert acceleration.model is None
        acceleration.undo()  # of nothing: no error


# torch.compile, generation, checkpointing, autocast


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_torch_compile_without_a_graph_break(family: str, device: torch.device) -> None:
    torch._dynamo.reset()
    model = tiny_model(family).to(device)
    ids = batch(model)
    sloth.accelerate(model)
    want = loss_and_gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(compiled, ids)
    torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=0)
    assert {name.removeprefix("_orig_mod.") for name in gradients} == want[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want[1][name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-6)
    again, _ = loss_and_gradients(compiled, ids)  # and no state is left over from the first call
    assert torch.equal(again, loss)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere2"])
def test_generation_with_a_cache(family: str) -> None:
    model = tiny_model(family).eval()
    ids = batch(model, rows=2, tokens=5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "use_cache": True,
    }
    want = model.generate(ids, **options)
    assert want.shape == (2, 13)
    with sloth.accelerate(model):
        assert torch.equal(model.generate(ids, **options), want)
    assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradient_checkpointing(family: str, use_reentrant: bool) -> None:
    model = tiny_model(family).train()
    ids = batch(model)
    want = loss_and_gradients(model, ids)
    kernel = Counted("gated_mlp")
    acceleration = sloth.accelerate(model, manager=with_kernel(kernel, "gated_mlp"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    kernel.calls = 0
    same_training(model, want, ids)
    assert kernel.calls == 4  # two layers, forward and recomputed
    acceleration.undo()


@pytest.mark.parametrize("wanted", ["recompute", "off", "auto"])
def test_the_setting_checkpointing(wanted: str) -> None:
    model = tiny_model("llama").train()
    ids = batch(model)
    want = loss_and_gradients(model, ids)
    assert not checkpointed(model)
    acceleration = sloth.accelerate(model, checkpointing=wanted)
    assert checkpointed(model) == (wanted == "recompute")
    shown = "recompute" if wanted == "recompute" else "left to the trainer"
    assert acceleration.report.checkpointing == {"chosen": shown, "reason": f"checkpointing={wanted!r}"}
    same_training(model, want, ids)
    acceleration.undo()
    assert not checkpointed(model)


def checkpointed(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_recomputation_leaves_no_function_of_ours_behind() -> None:
    from sloth_plugins.checkpointing.execute import _Ours

    model = tiny_model("llama")
    acceleration = sloth.accelerate(model, checkpointing="recompute")
    layers = [
        m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and "mlp" in m._modules
    ]
    assert layers and all(isinstance(m._gradient_checkpointing_func, _Ours) for m in layers)
    acceleration.undo()
    assert not any(isinstance(m._gradient_checkpointing_func, _Ours) for m in layers)


def test_recomputation_that_was_there_before_stays() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sloth.accelerate(model, checkpointing="recompute").undo()
    assert checkpointed(model)


def test_recomputation_of_a_model_that_cannot_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"checkpointing='recompute': Sequential has no"):
        sloth.accelerate(model, checkpointing="recompute")
    assert not forwards(model)


def outputs_by_module(model: Any, names: list[str], ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What each named module returned in one forward, its hooks being the witness."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            seen.setdefault(name, []).extend(t.detach() for t in tensors if isinstance(t, torch.Tensor))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "cohere2", "bert"]
)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_on_patched_modules_see_the_same_values_and_dtypes_under_autocast(
    family: str, weights: torch.dtype
) -> None:
    model = tiny_model(family, dtype=weights).eval()
    ids = batch(model)
    with sloth.accelerate(model) as acceleration:
        names = list(patched_ops(acceleration.report))
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32), torch.no_grad():
        want = outputs_by_module(model, names, ids)
        loss = model(input_ids=ids, labels=ids).loss
        with no_sloth_warnings():
            assert patched_ops(sloth.accelerate(model).report).keys() == set(names)
        got = outputs_by_module(model, names, ids)
        patched_loss = model(input_ids=ids, labels=ids).loss
    assert want.keys() == got.keys() == set(names)
    for name, tensors in want.items():
        assert [t.dtype for t in got[name]] == [t.dtype for t in tensors], name
        for a, b in zip(got[name], tensors, strict=True):
            assert torch.linalg.vector_norm(a.float() - b.float()) <= 0.03 * torch.linalg.vector_norm(
                b.float()
            ), name
    assert patched_loss.dtype == loss.dtype
    torch.testing.assert_close(patched_loss, loss, rtol=2e-3, atol=0)


def test_backward_hooks_on_patched_modules_fire() -> None:
    model = tiny_model("llama")
    acceleration = sloth.accelerate(model)
    names = [row.module for row in acceleration.report.patched if row.op != "add_rms_norm"]
    fired: set[str] = set()
    for name in names:
        hook = functools.partial(lambda name, *_: fired.add(name), name)
        model.get_submodule(name).register_full_backward_hook(hook)
    loss_and_gradients(model, batch(model))
    assert fired == set(names)


def test_hidden_states_and_attentions() -> None:
    model = tiny_model("qwen3", attn_implementation="eager").eval()
    ids = batch(model)
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        want = model(input_ids=ids, **options)
        with sloth.accelerate(model):
            got = model(input_ids=ids, **options)
    assert len(got.hidden_states) == 3 and len(got.attentions) == 2
    for key in ("hidden_states", "attentions"):
        for a, b in zip(getattr(got, key), getattr(want, key), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Others' patches


def a_foreign_forward(module: str) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return type(self).forward(self, hidden_states)

    forward.__module__ = module
    return forward


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("liger_kernel.transformers.rms_norm", "Liger"),
        ("unsloth.kernels.rms_layernorm", "Unsloth"),
        ("unsloth_zoo.patching_utils", "Unsloth"),
        ("axolotl.monkeypatch.lora_kernels", "Axolotl"),
    ],
)
@pytest.mark.parametrize(
    "site", [(NORM, "norm"), ("model.layers.0.mlp", "gated_mlp"), ("model.layers.0.self_attn", "rope")]
)
def test_a_forward_of_another_accelerator_is_left_alone(
    module: str, owner: str, site: tuple[str, str]
) -> None:
    model = tiny_model("llama")
    name, op = site
    target = model.get_submodule(name)
    foreign = MethodType(a_foreign_forward(module), target)
    target.forward = foreign
    with pytest.warns(UserWarning, match=f"already patched by {owner}"):
        acceleration = sloth.accelerate(model)
    assert {k: v for k, v in reasons(acceleration.report).items() if k[0] == name} == {
        (name, op): f"already patched by {owner}"
    }
    assert target.__dict__["forward"] is foreign
    acceleration.undo()
    assert forwards(model) == {name: foreign}


def test_a_class_of_another_accelerator_is_left_alone() -> None:
    model = tiny_model("llama")
    own = type(model.model.norm)
    model.model.norm.__class__ = type(
        "LigerRMSNorm", (own,), {"__module__": "liger_kernel.transformers.rms_norm"}
    )
    with pytest.warns(UserWarning, match="already patched by Liger"):
        report = sloth.accelerate(model).report
    assert NORM not in patched_ops(report) and "model.layers.0.input_layernorm" in patched_ops(report)


def test_somebodys_own_forward_on_an_instance_is_left_alone_with_its_name() -> None:
    model = tiny_model("llama")

    def careful_norm(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2

    model.model.norm.forward = careful_norm
    with pytest.warns(UserWarning, match="already replaced on the instance by"):
        acceleration = sloth.accelerate(model)
    assert "careful_norm" in reasons(acceleration.report)[NORM, "norm"]
    acceleration.undo()
    assert forwards(model) == {NORM: careful_norm}


def test_a_forward_put_on_top_of_ours_stays_through_undo_and_a_second_acceleration() -> None:
    model = tiny_model("llama")
    ids = batch(model)
    acceleration = sloth.accelerate(model)
    norm = model.model.norm
    ours, calls = norm.forward, []

    @functools.wraps(ours)  # which copies the attributes of ours
    def logged(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    norm.forward = logged
    with pytest.warns(UserWarning, match="already replaced on the instance"):
        again = sloth.accelerate(model)
    assert norm.forward is logged and again is not acceleration
    assert sloth.accelerate(model) is again
    loss_and_gradients(model, ids)
    assert calls
    again.undo()
    assert forwards(model) == {NORM: logged}


def test_accelerates_device_map_hooks_are_left_alone() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = tiny_model("llama")
    hooks.add_hook_to_module(model.model.norm, hooks.ModelHook())
    before = model.model.norm.__dict__["forward"]
    with pytest.warns(UserWarning, match="device-map hook"):
        acceleration = sloth.accelerate(model)
    assert NORM not in patched_ops(acceleration.report) and model.model.norm.__dict__["forward"] is before
    acceleration.undo()

    model = tiny_model("llama")  # and the other way round: the hook comes after us
    sloth.accelerate(model)
    hooks.add_hook_to_module(model.model.norm, hooks.ModelHook())
    wrapped = model.model.norm.__dict__["forward"]
    with pytest.warns(UserWarning, match="device-map hook"):
        sloth.accelerate(model)
    assert model.model.norm.__dict__["forward"] is wrapped
    assert loss_and_gradients(model, batch(model))[0].isfinite()


def test_two_roots() -> None:
    """The backbone first and then the whole model, as two callers would; the later one owns the patches."""
    model = tiny_model("qwen3")
    ids = batch(model)
    want = loss_and_gradients(model, ids)
    inner = sloth.accelerate(model.model)
    outer = sloth.accelerate(model)
    head = 1  # the whole model's alone
    assert len(outer.report.patched) == len(inner.report.patched) + head == len(forwards(model))
    same_training(model, want, ids)
    inner.undo()
    assert len(forwards(model)) == len(outer.report.patched)
    same_training(model, want, ids)
    outer.undo()
    assert not forwards(model)
    same_training(model, want, ids, exact=True)

    outer = sloth.accelerate(model)
    inner = sloth.accelerate(model.model)
    inner.undo()
    assert forwards(model).keys() == {"lm_head"}
    again = sloth.accelerate(model)  # not the old one, whose patches are gone
    assert again is not outer and len(forwards(model)) == len(again.report.patched)
    again.undo()
    assert not forwards(model)


# Kernels that fall short


def test_a_kernel_that_cannot_launch_costs_its_own_patch_alone() -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of shared memory: [/red] 99 KiB")  # brackets as rich's markup has them

    model = tiny_model("llama")
    ids = batch(model)
    want = loss_and_gradients(model, ids)
    with pytest.warns(UserWarning, match=r"test\.gated_mlp failed: RuntimeError: out of shared memory"):
        acceleration = sloth.accelerate(model, manager=with_kernel(broken, "gated_mlp"))
    report = acceleration.report
    assert "gated_mlp" not in patched_ops(report).values()
    assert {"rms_norm", "rope"} < set(patched_ops(report).values())
    assert set(reasons(report)) == {(f"model.layers.{i}.mlp", "gated_mlp") for i in range(2)}
    assert "[/red] 99 KiB" in " ".join(str(report).split())
    same_training(model, want, ids)


def test_a_broken_fused_kernel_leaves_its_parts_to_theirs() -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    model = tiny_model("qwen3")
    with pytest.warns(UserWarning, match="qk_norm_rope"):
        report = sloth.accelerate(model, manager=with_kernel(broken, "qk_norm_rope")).report
    ops = patched_ops(report)
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        assert (ops[attention], ops[f"{attention}.q_norm"], ops[f"{attention}.k_norm"]) == (
            "rope",
            "rms_norm",
            "rms_norm",
        )


def doubled_weight_gradient(x: torch.Tensor, weight: Any, **options: Any) -> torch.Tensor:
    return reference("rms_norm")(x, None if weight is None else weight * 2 - weight.detach(), **options)


def slightly_off(x: torch.Tensor, weight: Any, **options: Any) -> torch.Tensor:
    return reference("rms_norm")(x, weight, **options) * 1.00001


def wrong_dtype(x: torch.Tensor, weight: Any, **options: Any) -> torch.Tensor:
    return reference("rms_norm")(x, weight, **options).double()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (doubled_weight_gradient, r"gradient of weight: 1\.00e\+00 \(eager .*e-0\d, allowed .*e-0\d\)"),
        (slightly_off, r"output 0: 1\.0\de-05 \(eager"),
        (wrong_dtype, "dtype torch.float64 where the original gives torch.float32"),
    ],
)
def test_an_inaccurate_kernel_is_dropped_with_its_figures(function: Callable[..., Any], text: str) -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match=text):
        report = sloth.accelerate(model, manager=with_kernel(function)).report
    assert "rms_norm" not in patched_ops(report).values() and "gated_mlp" in patched_ops(report).values()


def test_a_kernel_that_refuses_a_site_says_why() -> None:
    own = with_kernel(
        reference("rms_norm"),
        refuse=lambda device, dtype, facts: "only on weekends",
        dtypes=frozenset({torch.float32}),
    )
    report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert {row.kernel for row in report.patched if row.op == "rms_norm"} == {"sloth.torch.rms_norm"}
    own.unregister("sloth_kernels")
    with pytest.warns(UserWarning, match="nothing to patch in LlamaForCausalLM"):
        report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert (
        "no kernel for rms_norm under kernels='auto' (test.rms_norm: only on weekends)"
        in reasons(report).values()
    )


def test_without_verification_nothing_is_run_and_the_report_says_so() -> None:
    model = tiny_model("llama")
    kernel = Counted("rms_norm")
    report = sloth.accelerate(model, verify=False, manager=with_kernel(kernel)).report
    assert kernel.calls == 0 and "rms_norm" in patched_ops(report).values()
    assert (
        {row.max_rel_error for row in report.patched}
        == {row.eager_rel_error for row in report.patched}
        == {None}
    )
    assert any(note.startswith("verify=False") for note in report.notes) and "not verified" in str(report)


def test_each_class_and_configuration_is_verified_once() -> None:
    few, many = (Counted("rms_norm") for _ in range(2))
    sloth.accelerate(tiny_model("llama", num_hidden_layers=2), manager=with_kernel(few))
    sloth.accelerate(tiny_model("llama", num_hidden_layers=6), manager=with_kernel(many))
    assert few.calls == many.calls > 0


# The report


def test_the_report_is_json_and_text() -> None:
    model = tiny_model("cohere2")
    report = sloth.accelerate(model, disable=["gated_mlp"], memory_budget_bytes="1GiB").report
    values = json.loads(report.to_json())
    assert values == json.loads(json.dumps(report.to_dict()))
    assert (
        values["settings"]["disable"] == ["gated_mlp"] and values["settings"]["memory_budget_bytes"] == 2**30
    )
    assert values["environment"]["torch"] == torch.__version__
    assert values["sites"]["decoder_layer"] == 4 and values["seconds"] > 0 and not values["planned"]
    assert {"module", "op", "kernel", "max_rel_error", "eager_rel_error", "plugin"} == values["patched"][
        0
    ].keys()
    text = str(report)
    assert f"sloth patched {len(values['patched'])} sites, left {len(values['skipped'])} alone" in text
    for part in (
        "model.layers.{0-3}.input_layernorm",
        "model.norm",
        "this layer applies no rotary embedding",
        "disable='gated_mlp'",
    ):
        assert part in text.replace("\n", ""), part
    assert max(len(line) for line in text.splitlines()) <= 120
