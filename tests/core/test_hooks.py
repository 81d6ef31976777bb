"""The hooks: each is documented with an example that runs and does what it says; wrong plugins are told."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from helpers import (
    ROOT,
    forwards,
    make_plugin,
    manager_with,
    patched_ops,
    python_environment,
    reasons,
    tiny_model,
)
from torch import nn

import sloth_plugins as sloth
from sloth_plugins import hookspecs, manager
from sloth_plugins.manager import BUILT_INS, Manager
from sloth_plugins.specs import KernelSpec, Patch, Site, Skip, Survey

HOOKS = {name: function for name, function in vars(hookspecs).items() if name.startswith("sloth_")}
SECTIONS = dict(
    re.findall(r"^## (sloth_\w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs/hooks.md").read_text(), re.M | re.S)
)
Q_NORM = "model.layers.0.self_attn.q_norm"
NORM = "model.norm"


class Calls(list[str]):
    """Names of the hooks that a plugin of this test has answered, in order."""

    def plugin(self, **hooks: Callable[..., Any]) -> Any:
        return make_plugin(**{name: self._recorded(name, function) for name, function in hooks.items()})

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # pluggy reads the argument names from the signature.
        names = ", ".join(inspect.signature(function).parameters)
        scope: dict[str, Any] = {"function": function, "calls": self, "name": name}
        exec(f"def hook({names}):\n    calls.append(name)\n    return function({names})", scope)
        hook: Callable[..., Any] = scope["hook"]
        return hook


def kernel(name: str = "test.kernel", op: str = "rms_norm", **changes: Any) -> KernelSpec:
    """A kernel that is right: the op's reference under another name."""
    (reference,) = (k.reference for k in manager_with().kernels() if k.name == f"sloth.torch.{op}")
    values: dict[str, Any] = {"function": reference, "reference": reference, "backend": "test"}
    devices = frozenset({"cpu", "cuda"})
    return KernelSpec(**{"op": op, "name": name, "device_types": devices, **values, **changes})


def patch_of(module: str, forward: Callable[..., Any] | None = None, op: str = "test.op") -> Patch:
    """A patch of one module, proven by replay, that computes the same as the module's class."""

    def same(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    chosen = forward or same
    return Patch(
        module=module,
        op=op,
        kernel=kernel(op=("rms_norm")),
        forwards={module: chosen},
        signature=(module, op),
    )


def planner(*modules: str, **options: Any) -> Callable[..., Any]:
    def sloth_plan_patches(model: nn.Module) -> Sequence[Patch]:
        return [patch_of(module, **options) for module in modules]

    return sloth_plan_patches


# The documentation


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented(name: str) -> None:
    assert name in SECTIONS, f"docs/hooks.md has no section for {name}"
    section = SECTIONS[name]
    assert "**Called** " in section and "**Returns** " in section and "**Arguments" in section
    for argument in inspect.signature(HOOKS[name]).parameters:
        assert f"`{argument}`" in section, f"the section of {name} does not describe {argument}"


def test_sections_are_the_hooks_in_their_order() -> None:
    assert list(SECTIONS) == list(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_examples_of_the_documentation_run(name: str) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[name], re.M | re.S)
    example = ModuleType(f"example_of_{name}")
    exec(compile(code, f"docs/hooks.md, {name}", "exec"), example.__dict__)
    own = manager_with(example=example)
    answered: dict[str, Any] = {}

    def after(outcome: Any, hook_name: str, hook_impls: Any, kwargs: Any) -> None:
        if any(implementation.plugin is example for implementation in hook_impls):
            answered.setdefault(hook_name, outcome.get_result())

    own.pluggy.add_hookcall_monitoring(lambda *_: None, after)
    model = tiny_model("llama" if name != "sloth_register_kernels" else "cohere2")
    acceleration = sloth.accelerate(model, manager=own, memory_budget_bytes="1GiB")
    acceleration.undo()
    if name == "sloth_plan_quantization":
        assert own.plan_quantization(model, sloth.Settings(), 1.1) == {"default_bits": 4, "lm_head": 8}
    assert set(answered) == {name}
    evidence = {
        "sloth_register_kernels": lambda r: (
            {row.kernel for row in r.patched if row.op == "layer_norm"} == {"example.layer_norm"}
        ),
        "sloth_survey_model": lambda r: r.sites["example.embedding"] == 1,
        "sloth_choose_kernel": lambda r: (
            {row.kernel for row in r.patched if row.op == "rms_norm"} == {"sloth.torch.rms_norm"}
        ),
        "sloth_plan_patches": lambda r: patched_ops(r)["lm_head"] == "example.head",
        "sloth_plan_quantization": lambda r: True,
        "sloth_plan_checkpointing": lambda r: r.checkpointing["chosen"] == "every layer recomputed",
        "sloth_check_plan": lambda r: (
            patched_ops(r).keys() & {"model.layers.0.mlp", "model.layers.1.mlp"} == {"model.layers.1.mlp"}
        ),
        "sloth_patched": lambda r: any("sites are watched" in note for note in r.notes),
        "sloth_restored": lambda r: example.__dict__["RESTORED"] == [r.seconds],
    }
    assert evidence[name](acceleration.report), acceleration.report


# What each hook does. A function a hook, so that a hook without one fails `test_every_hook_is_exercised`.


def exercise_sloth_register_kernels(calls: Calls) -> None:
    own = manager_with(third=calls.plugin(sloth_register_kernels=lambda: [kernel()]))
    report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert {row.kernel for row in report.patched if row.op == "rms_norm"} == {"test.kernel"}
    assert {row.kernel for row in report.patched if row.op == "rope"} == {"sloth.torch.rope"}
    assert own.kernels()[0].name == "test.kernel"  # third parties' before ours
    assert calls.count("sloth_register_kernels") == 2  # once an acceleration, and once just above


def exercise_sloth_survey_model(calls: Calls) -> None:
    def survey(model: nn.Module, settings: sloth.Settings) -> Survey:
        site = Site(module=NORM, role="rms_norm", facts={"mine": True}, signature=("mine",))
        return Survey(sites=(site,), skips=(Skip(module="lm_head", op="test.head", reason="not today"),))

    own = manager_with(third=calls.plugin(sloth_survey_model=survey))
    found = own.survey(tiny_model("llama"), sloth.Settings())
    (site,) = (site for site in found.sites if site.module == NORM)
    assert site.facts == {"mine": True}  # the third party's counts
    assert "lm_head" not in {skip.module for skip in found.skips}  # the built-in survey knows it as a site
    assert sum(site.role == "gated_mlp" for site in found.sites) == 2


def exercise_sloth_choose_kernel(calls: Calls) -> None:
    def choose(
        site: Site, op: str, kernels: Sequence[KernelSpec], device: Any, dtype: Any, settings: Any
    ) -> Any:
        assert device.type == "cpu" and dtype == torch.float32
        assert {k.op for k in kernels} == {op}
        return kernels[-1] if site.module == NORM else None

    own = manager_with(
        kernels=make_plugin(sloth_register_kernels=lambda: [kernel("test.a"), kernel("test.b")]),
        third=calls.plugin(sloth_choose_kernel=choose),
    )
    rows = {
        row.module: row.kernel for row in sloth.accelerate(tiny_model("llama"), manager=own).report.patched
    }
    assert rows[NORM] == "sloth.torch.rms_norm"
    assert rows["model.layers.0.input_layernorm"] == "test.a"


def exercise_sloth_plan_patches(calls: Calls) -> None:
    def plan(model: nn.Module, context: Any) -> Any:
        assert context.by_role("lm_head")[0].module == "lm_head"
        return [patch_of("lm_head"), Skip(module="model", op="test.op", reason="too big")]

    model = tiny_model("llama")
    acceleration = sloth.accelerate(model, manager=manager_with(third=calls.plugin(sloth_plan_patches=plan)))
    (row,) = (row for row in acceleration.report.patched if row.module == "lm_head")
    assert (row.op, row.plugin) == ("test.op", "third") and row.max_rel_error is not None
    assert reasons(acceleration.report)["model", "test.op"] == "too big"
    acceleration.undo()
    assert not forwards(model)


def exercise_sloth_plan_quantization(calls: Calls) -> None:
    own = manager_with(
        last=calls.plugin(sloth_plan_quantization=lambda model, settings, budget: ("plan", model, budget)),
        first=calls.plugin(sloth_plan_quantization=lambda budget: None),
    )
    assert own.plan_quantization("some/dir", sloth.Settings(), 1.05) == ("plan", "some/dir", 1.05)
    assert len(calls) == 2
    assert manager_with().plan_quantization("some/dir", sloth.Settings(), 1.05) is None


class LayerPlan:
    """A checkpointing plan that marks what it was applied to."""

    def apply(self, model: Any) -> Callable[[], None]:
        model.planned = True
        return lambda: delattr(model, "planned")

    def __str__(self) -> str:
        return "two layers kept"


def exercise_sloth_plan_checkpointing(calls: Calls) -> None:
    own = manager_with(third=calls.plugin(sloth_plan_checkpointing=lambda model, settings: LayerPlan()))
    model = tiny_model("llama")
    acceleration = sloth.accelerate(model, manager=own)
    assert model.planned
    assert acceleration.report.checkpointing["chosen"] == "two layers kept"
    acceleration.undo()
    assert not hasattr(model, "planned")
    with sloth.accelerate(model, manager=own, checkpointing="off"):
        assert not hasattr(model, "planned")
    assert len(calls) == 1


def exercise_sloth_check_plan(calls: Calls) -> None:
    def check(model: nn.Module, patches: Sequence[Patch], settings: Any) -> Sequence[Skip]:
        assert isinstance(patches, tuple) and not forwards(model)
        return [Skip(module=p.module, op=p.op, reason="I know better") for p in patches if p.module == NORM]

    own = manager_with(third=calls.plugin(sloth_check_plan=check))
    with pytest.warns(UserWarning, match="rms_norm: I know better"):
        report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert NORM not in patched_ops(report) and "model.layers.0.input_layernorm" in patched_ops(report)
    assert reasons(report) == {(NORM, "rms_norm"): "I know better"}
    with pytest.raises(sloth.SkippedSiteError, match=rf"'{NORM}'.*I know better"):
        sloth.accelerate(tiny_model("llama"), manager=own, strict=True)


def exercise_sloth_patched(calls: Calls) -> None:
    seen: list[Any] = []
    own = manager_with(third=calls.plugin(sloth_patched=lambda acceleration: seen.append(acceleration)))
    model = tiny_model("llama")
    acceleration = sloth.accelerate(model, manager=own)
    assert sloth.accelerate(model, manager=own) is acceleration
    assert seen == [acceleration] and acceleration.report.patched


def exercise_sloth_restored(calls: Calls) -> None:
    seen: list[Any] = []

    def restored(acceleration: sloth.Acceleration) -> None:
        seen.append((acceleration.active, len(forwards(acceleration.model))))

    own = manager_with(third=calls.plugin(sloth_restored=restored))
    model = tiny_model("llama")
    acceleration = sloth.accelerate(model, manager=own)
    assert not seen
    acceleration.undo()
    acceleration.undo()
    assert seen == [(False, 0)]


EXERCISES = {
    name.removeprefix("exercise_"): function
    for name, function in globals().items()
    if name.startswith("exercise_")
}


def test_every_hook_is_exercised() -> None:
    assert EXERCISES.keys() == HOOKS.keys()


@pytest.mark.parametrize("name", EXERCISES)
def test_hook(name: str) -> None:
    calls = Calls()
    EXERCISES[name](calls)
    assert set(calls) == {name}


def test_neither_is_told_of_an_acceleration_that_failed() -> None:
    calls = Calls()
    hooks = calls.plugin(sloth_patched=lambda acceleration: None, sloth_restored=lambda acceleration: None)
    refuse = make_plugin(sloth_check_plan=lambda patches: [Skip(module=NORM, op="rms_norm", reason="no")])
    model = tiny_model("llama")
    with pytest.raises(sloth.SkippedSiteError):
        sloth.accelerate(model, manager=manager_with(third=hooks, refuse=refuse), strict=True)
    assert not calls and not forwards(model)


def test_an_error_in_sloth_patched_undoes_the_acceleration() -> None:
    def sloth_patched(acceleration: Any) -> None:
        raise RuntimeError("disk full")

    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="disk full"):
        sloth.accelerate(model, manager=manager_with(third=make_plugin(sloth_patched=sloth_patched)))
    assert not forwards(model)
    assert sloth.accelerate(model, manager=manager_with()).report.patched


def test_an_error_in_undoing_a_checkpointing_plan_keeps_no_forward() -> None:
    class Stuck(LayerPlan):
        def apply(self, model: Any) -> Callable[[], None]:
            def undo() -> None:
                raise RuntimeError("stuck")

            return undo

    model = tiny_model("llama")
    acceleration = sloth.accelerate(model, checkpointing=Stuck(), manager=manager_with())
    with pytest.raises(RuntimeError, match="stuck"):
        acceleration.undo()
    assert not forwards(model) and not acceleration.active


def test_a_checkpointing_plan_that_cannot_be_undone_is_refused() -> None:
    class OneWay:
        def apply(self, model: Any) -> None:
            return None

    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"checkpointing=.*OneWay.*returned None"):
        sloth.accelerate(model, checkpointing=OneWay(), manager=manager_with())
    assert not forwards(model)


# Third parties and the built-ins


def test_a_third_party_displaces_a_built_in_with_a_reason() -> None:
    own = manager_with(third=make_plugin(sloth_plan_patches=planner(NORM)))
    report = sloth.accelerate(tiny_model("llama"), manager=own, strict=True).report
    (row,) = (row for row in report.patched if row.module == NORM)
    assert row.plugin == "third" and row.op == "test.op"
    assert reasons(report)[NORM, "rms_norm"] == f"plugin 'third' patches '{NORM}'"


def test_where_one_of_three_fused_modules_is_taken_the_others_are_patched_apart() -> None:
    own = manager_with(third=make_plugin(sloth_plan_patches=planner(Q_NORM)))
    report = sloth.accelerate(tiny_model("qwen3"), manager=own).report
    ops = patched_ops(report)
    attention = "model.layers.0.self_attn"
    assert ops[Q_NORM] == "test.op" and ops[f"{attention}.k_norm"] == "rms_norm" and ops[attention] == "rope"
    assert ops["model.layers.1.self_attn"] == ops["model.layers.1.self_attn.q_norm"] == "qk_norm_rope"
    assert reasons(report)[attention, "qk_norm_rope"] == f"plugin 'third' patches '{Q_NORM}'"


def test_two_third_parties_that_claim_one_module_are_a_conflict_that_names_both() -> None:
    own = manager_with(
        one=make_plugin(sloth_plan_patches=planner(NORM)),
        two=make_plugin(sloth_plan_patches=planner("lm_head", NORM)),
    )
    model = tiny_model("llama")
    with pytest.raises(sloth.ConflictError) as caught:
        sloth.accelerate(model, manager=own)
    assert all(part in str(caught.value) for part in ("'one'", "'two'", repr(NORM), "SLOTH_DISABLED_PLUGINS"))
    assert not forwards(model)


def test_the_last_registered_third_party_comes_first() -> None:
    own = manager_with(
        one=make_plugin(sloth_register_kernels=lambda: [kernel("one.rms_norm")]),
        two=make_plugin(sloth_register_kernels=lambda: [kernel("two.rms_norm")]),
    )
    assert [k.name for k in own.kernels()[:2]] == ["two.rms_norm", "one.rms_norm"]


@pytest.mark.parametrize("case", ["wrong", "raises", "wrong weight gradient"])
def test_a_third_partys_patch_is_verified_by_replay(case: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if case == "raises":
            raise RuntimeError("no such instruction")
        if case == "wrong":
            return type(self).forward(self, x) * 1.01
        return (
            type(self).forward(self, x) + 0 * self.weight.sum() + (self.weight - self.weight.detach()) * 0.5
        )

    own = manager_with(third=make_plugin(sloth_plan_patches=planner(NORM, forward=forward)))
    with pytest.warns(UserWarning, match="sites are left to the model's own code"):
        report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert NORM not in patched_ops(report)
    text = {"wrong": "output 0: ", "raises": "RuntimeError: no such instruction"}.get(
        case, "gradient of weight: "
    )
    assert text in reasons(report)[NORM, "test.op"]


# Wrong plugins


def test_an_unknown_hook_or_argument_is_an_error_and_no_later_plugins_problem() -> None:
    own = manager_with()
    for wrong in (
        make_plugin(sloth_register_kernel=lambda: []),
        make_plugin(sloth_plan_patches=lambda model, contexts: []),
    ):
        with pytest.raises(pluggy.PluginValidationError, match=r"sloth_register_kernel|contexts"):
            own.register(wrong, name="wrong")
        assert "wrong" not in own.names()
    own.register(make_plugin(sloth_register_kernels=lambda: [kernel()]), name="right")
    assert own.kernels()[0].name == "test.kernel"


@pytest.mark.parametrize(
    ("hook", "answer", "wanted"),
    [
        ("sloth_register_kernels", ["rms_norm"], "a list of KernelSpec"),
        ("sloth_register_kernels", 3, "a list of KernelSpec"),
        ("sloth_survey_model", [], "a Survey"),
        ("sloth_plan_patches", [object()], "a list of Patch and Skip"),
        ("sloth_check_plan", ["model.norm"], "a list of Skip"),
    ],
)
def test_a_wrong_answer_names_the_plugin(hook: str, answer: Any, wanted: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(TypeError) as caught:
        sloth.accelerate(model, manager=manager_with(careless=make_plugin(**{hook: lambda: answer})))
    assert all(part in str(caught.value) for part in ("'careless'", hook, wanted))
    assert not forwards(model)


def test_a_plugin_without_a_hash_is_refused() -> None:
    with pytest.raises(TypeError, match="'careless' is a SimpleNamespace"):
        manager_with(careless=SimpleNamespace())


def test_a_choice_that_was_not_offered_is_refused() -> None:
    stranger = kernel("test.stranger")
    own = manager_with(third=make_plugin(sloth_choose_kernel=lambda: stranger))
    with pytest.raises(TypeError, match="none of `kernels`"):
        sloth.accelerate(tiny_model("llama"), manager=own)


def test_none_is_no_answer() -> None:
    own = manager_with(silent=make_plugin(**{name: lambda: None for name in HOOKS}))
    report = sloth.accelerate(tiny_model("llama"), manager=own, strict=True).report
    assert len(report.patched) == len(
        sloth.accelerate(tiny_model("llama"), manager=manager_with()).report.patched
    )


def test_a_kernel_name_that_is_registered_twice_is_an_error() -> None:
    own = manager_with(third=make_plugin(sloth_register_kernels=lambda: [kernel("sloth.torch.rope")]))
    with pytest.raises(ValueError, match=r"'sloth\.torch\.rope' is registered twice"):
        own.kernels()


# Entry points and the environment


def with_entry_points(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """The environment of a Python in which distributions offer these plugins."""
    found = [EntryPoint(name=name, value=value, group="sloth_plugins") for name, value in values.items()]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: EntryPoints(found).select(group=group)
    )


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> str:
    """The example plugin, importable but not installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "example_plugin"))
    return "sloth_example_plugin"


def test_a_plugin_that_fails_to_import_is_a_warning_and_a_note(
    monkeypatch: pytest.MonkeyPatch, example: str
) -> None:
    with_entry_points(monkeypatch, broken="no_such_module_anywhere", example=example)
    with pytest.warns(UserWarning, match=r"'broken' \(no_such_module_anywhere\) was not loaded"):
        own = Manager()
    assert "broken" not in own.names() and "example" in own.names()
    report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert [note for note in report.notes if "'broken'" in note and "No module named" in note]
    assert "'broken'" in str(report)
    assert {row.kernel for row in report.patched if row.op == "rms_norm"} == {"example.rms_norm"}


def test_disabled_plugins_are_not_loaded(monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    with_entry_points(monkeypatch, broken="no_such_module_anywhere", example=example)
    monkeypatch.setenv("SLOTH_DISABLED_PLUGINS", "broken, example ,sloth_kernels,")
    own = Manager()
    assert own.names() == [name for name in BUILT_INS if name != "sloth_kernels"] and not own.problems
    with pytest.warns(UserWarning, match="nothing to patch in LlamaForCausalLM"):
        report = sloth.accelerate(tiny_model("llama"), manager=own).report
    assert reasons(report)[NORM, "rms_norm"] == "no plugin offers a kernel for rms_norm"


def test_tracing_prints_every_call_of_a_hook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    sloth.accelerate(model, manager=manager_with()).undo()
    assert "sloth_" not in capsys.readouterr().err
    monkeypatch.setenv("SLOTH_TRACE_PLUGINS", "1")
    sloth.accelerate(model, manager=manager_with()).undo()
    traced = capsys.readouterr().err
    called = {name for name in HOOKS if name in traced}
    assert called == HOOKS.keys() - {"sloth_plan_quantization"}
    monkeypatch.setenv("SLOTH_TRACE_PLUGINS", "0")
    sloth.accelerate(model, manager=manager_with()).undo()
    assert "sloth_" not in capsys.readouterr().err


def test_the_processes_manager_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_MANAGER", None)
    first = manager.default_manager()
    assert manager.default_manager() is first and set(BUILT_INS) <= set(first.names())


def test_the_example_plugin_passes_the_gate(example: str, device: torch.device) -> None:
    import importlib

    from sloth_plugins.testing import check_kernel

    (spec,) = importlib.import_module(example).sloth_register_kernels()
    assert check_kernel(spec, device=device)


ACCELERATED = """
import json, torch, transformers, sloth_plugins as sloth
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
acceleration = sloth.accelerate(model, disable=["add_rms_norm"])
model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
report = acceleration.report.to_dict()
report["text"] = str(acceleration.report)
report["plugins"] = sloth.engine.default_manager().names()
print(json.dumps(report))
"""


def test_an_installed_plugin_is_found_chosen_verified_and_shown(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for file in (Path(__file__).parent / "example_plugin").iterdir():
        if file.is_file():  # a copy, so that building leaves nothing in the checkout
            (source / file.name).write_bytes(file.read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    install += ["--no-index", "--disable-pip-version-check", "--target", str(target), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def run(**variables: str) -> dict[str, Any]:
        environment = python_environment(target) | variables
        code = [sys.executable, "-c", ACCELERATED]
        done = subprocess.run(
            code, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    report = run()
    assert report["plugins"][-1] == "example"
    norms = [row for row in report["patched"] if row["op"] == "rms_norm"]
    assert {row["kernel"] for row in norms} == {"example.rms_norm"} and len(norms) == 3
    assert all(0 < row["max_rel_error"] <= 1.5 * row["eager_rel_error"] + 1e-6 for row in norms)
    assert "│ example " in report["text"]  # the op has a column of its own
    without = run(SLOTH_DISABLED_PLUGINS="example")
    assert {row["kernel"] for row in without["patched"] if row["op"] == "rms_norm"} == {
        "sloth.torch.rms_norm"
    }
