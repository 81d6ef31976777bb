"""The command `sloth`: what it prints where, its exit status, and one sentence for every mistake."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forwards, tiny_model

import sloth_plugins as sloth
from sloth_plugins import cli, demo, doctor
from sloth_plugins.manager import default_manager
from sloth_plugins.report import Report
from sloth_plugins.settings import OPS
from sloth_plugins.smollm2 import MissingPackageError, smollm2_dir

FAMILIES = ("gemma3_text", "qwen3", "phi3")
Run = tuple[int, str, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory with config.json and weights for each of FAMILIES."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def config_only(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model directory without weights."""
    target = tmp_path / "config_only"
    target.mkdir()
    (target / "config.json").write_text((models["qwen3"] / "config.json").read_text())
    return target


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Run:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def expected_sites(directory: Path) -> set[str]:
    """The head and every norm, MLP, attention of the saved model, by the names of transformers' classes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    kinds = ("RMSNorm", "MLP", "Attention")
    named = {name for name, module in model.named_modules() if type(module).__name__.endswith(kinds)}
    return named | {"lm_head"}


def listed(report: dict[str, Any]) -> set[str]:
    """The patched modules, less the decoder layers, whose op joins modules that are listed by themselves."""
    return {row["module"] for row in report["patched"] if row["op"] != "add_rms_norm"}


# verify


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_lists_every_site(
    family: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run_json(capsys, "verify", models[family])
    assert code == 0 and report["ok"] and report["falls_short"] == []
    assert listed(report) == expected_sites(models[family])
    assert all(math.isfinite(row["max_rel_error"]) for row in report["patched"])
    assert report["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_verify_prints_tables(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", models["gemma3_text"])
    assert code == 0
    assert "pre_feedforward_layernorm" in out  # the longest names are not cut
    assert "error to" in out and out.splitlines()[-1].startswith("Fine: all ")
    assert "loading" in err and "verifying" in err


def test_verify_undoes(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int]] = []

    class Watch:
        @sloth.hookimpl
        def sloth_patched(self, acceleration: sloth.Acceleration) -> None:
            assert acceleration.model is not None
            seen.append(("patched", len(forwards(acceleration.model))))

        @sloth.hookimpl
        def sloth_restored(self, acceleration: sloth.Acceleration) -> None:
            assert acceleration.model is not None
            seen.append(("restored", len(forwards(acceleration.model))))

    default_manager().register(Watch(), name="watch")
    try:
        code, report = run_json(capsys, "verify", models["phi3"])
    finally:
        default_manager().unregister("watch")
    assert code == 0
    assert seen == [("patched", len(report["patched"])), ("restored", 0)]


def test_verify_finds_a_broken_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    code, report = run_json(capsys, "verify", tmp_path)
    assert code == 1 and not report["ok"]
    assert len(report["falls_short"]) == 1
    assert "model.norm" in report["falls_short"][0] and "NaN" in report["falls_short"][0]
    assert listed(report) == expected_sites(tmp_path) - {"model.norm"}
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1
    assert "Falls short in 1 places" in out and "model.norm.weight holds NaN or infinity" in out


def test_verify_falls_short_where_nothing_is_patched(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run_json(capsys, "verify", models["qwen3"], "--kernels", "off")
    assert (code, report["patched"], report["falls_short"]) == (1, [], ["nothing was patched"])


def test_verify_takes_the_dtype_of_the_checkpoint_or_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("qwen3", dtype=torch.bfloat16).save_pretrained(tmp_path)
    errors = {}
    for given, used in (("auto", "bfloat16"), ("float32", "float32")):
        code, report = run_json(capsys, "verify", tmp_path, "--dtype", given, "--device", "cpu")
        assert (code, report["dtype"], report["device"]) == (0, used, "cpu")
        errors[used] = max(row["eager_rel_error"] for row in report["patched"])
    assert errors["float32"] < 1e-5 < 1e-3 < errors["bfloat16"]


def test_verify_with_random_weights_needs_no_checkpoint(
    config_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run_json(capsys, "verify", config_only, "--random")
    assert code == 0 and report["random_weights"]
    assert listed(report) == expected_sites(config_only)


def test_triton_that_was_asked_for_is_not_said_to_be_missing(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Interpreted on a CPU (conftest sets TRITON_INTERPRET), compiled on a GPU."""
    code, report = run_json(capsys, "verify", models["phi3"], "--kernels", "triton")
    assert code == 0 and report["notes"] == []
    assert all(row["kernel"].startswith("sloth.triton.") for row in report["patched"])


@pytest.mark.slow
def test_verify_smollm2(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        directory = smollm2_dir()
    except MissingPackageError as error:
        pytest.skip(str(error))
    code, report = run_json(capsys, "verify", directory)
    assert code == 0
    assert listed(report) == expected_sites(directory)
    assert len(listed(report)) == 61 + 30 + 30 + 1


# plan


def test_plan_reads_only_the_config(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run_json(capsys, "plan", config_only)
    assert code == 0 and report["planned"]
    assert listed(report) == expected_sites(config_only)
    assert all(row["max_rel_error"] is None for row in report["patched"])


def test_plan_makes_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """70 billion parameters would not fit: they stay on the meta device."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path)
    code, report = run_json(capsys, "plan", tmp_path)
    assert code == 0
    assert len(listed(report)) == 161 + 80 + 80 + 1


def test_plan_falls_back_to_the_bare_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config

    T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99).save_pretrained(tmp_path)
    code, report = run_json(capsys, "plan", tmp_path)
    assert (code, report["class"]) == (0, "T5Model")
    assert "encoder.final_layer_norm" in listed(report)


@pytest.mark.parametrize(
    "given", [["rope", "gated_mlp"], ["rope,gated_mlp"], ["rope", "--disable", "gated_mlp"]]
)
def test_plan_disables_ops(
    given: list[str], models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run_json(capsys, "plan", models["phi3"], "--disable", *given)
    assert code == 0
    assert {row["op"] for row in report["patched"]} == {"rms_norm", "add_rms_norm", "linear_cross_entropy"}
    assert {row["op"] for row in report["skipped"]} == {"rope", "gated_mlp"}


def test_plan_prints_a_table(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", models["phi3"])
    assert code == 0
    assert out.startswith("Phi3ForCausalLM") and "sloth would patch" in out and "not verified" in out


def test_json_is_alone_on_stdout(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    class Noise:
        @sloth.hookimpl
        def sloth_check_plan(self) -> list[sloth.Skip]:
            print("noise on stdout")
            return []

    default_manager().register(Noise(), name="noise")
    try:
        code, out, err = run(capsys, "plan", models["phi3"], "--json")
    finally:
        default_manager().unregister("noise")
    assert code == 0
    assert json.loads(out)["planned"] and "noise on stdout" in err


# doctor


def healthy() -> dict[str, Any]:
    """The facts of a machine on which everything works."""
    packages = dict(
        torch="2.11.0",
        triton="3.6.0",
        transformers="5.17.0",
        accelerate="1.15.0",
        peft="0.21.0",
        trl="1.13.0",
    )
    packages |= dict(bitsandbytes="0.50.2")
    return {
        "torch": {"version": "2.11.0", "cuda": "12.8", "hip": None, "why_no_gpu": None},
        "gpus": [{"name": "Some GPU"}],
        "driver": "570.1",
        "packages": {name: {"version": version, "problem": None} for name, version in packages.items()},
        "triton": {"why_not": None, "interpreted": False, "trial": None},
        "bitsandbytes": {"cuda_build": True, "why_not": None},
        "attention": {
            "chosen": {"causal": "FLASH_ATTENTION"},
            "cudnn_attention": "available, but shadowed by FLASH_ATTENTION, which torch asks first",
            "cudnn_usable": True,
            "cudnn_loaded": "9.10.2",
            "cudnn_packaged": "9.10.2.21",
            "cudnn_shadowed": False,
            "cudnn_library": None,
        },
        "plugins": {"loaded": [], "disabled": [], "problems": []},
        "adapters": {
            trainer: {
                "package": ours,
                "here": trainer == "HF Trainer",
                "trainer_installed": trainer == "HF Trainer",
            }
            for trainer, (_, ours, _) in doctor.ADAPTERS.items()
        },
    }


def changed(facts: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`facts` with the values at dotted paths replaced."""
    facts = copy.deepcopy(facts)
    for path, value in changes.items():
        *way, last = path.split("/")
        place = facts
        for step in way:
            place = place[step]
        place[last] = value
    return facts


NO_GPU = {"gpus": [], "torch/why_no_gpu": "torch is built without CUDA", "torch/cuda": None}


def test_advice_for_a_healthy_machine() -> None:
    advice = doctor.advise(healthy(), doctor.NEEDS)
    assert advice.install == () and advice.broken == ()
    works = " ".join(advice.works)
    for wanted in (
        "Some GPU",
        "Triton kernels work",
        "transformers 5.17.0",
        "trl 1.13.0",
        "on the GPU",
        "shadowed",
    ):
        assert wanted in works


@pytest.mark.parametrize(
    ("changes", "need", "install", "broken"),
    [
        (NO_GPU, "gpu", "install a CUDA build of torch", "sees no GPU"),
        (
            {**NO_GPU, "torch/cuda": "12.8", "torch/why_no_gpu": "driver too old"},
            "gpu",
            "update the driver",
            "too old",
        ),
        (
            {"packages/triton/version": None, "triton/why_not": "triton is not installed"},
            "triton",
            "pip install triton",
            "triton is not installed",
        ),
        (
            {"triton/trial": "a trial kernel failed: RuntimeError: no gcc"},
            "triton",
            "a C compiler",
            "no gcc",
        ),
        ({"packages/transformers/version": None}, "hf", "sloth-plugins[hf]", "transformers is not installed"),
        ({"packages/transformers/version": "4.57.1"}, "hf", "sloth-plugins[hf]", "older than 5.0"),
        ({"packages/transformers/version": None}, "trl", "sloth-plugins[hf]", "TRL can't be accelerated"),
        ({"adapters/HF Trainer/here": False}, "hf", "sloth-plugins[hf]", "sloth_hf_trainer"),
        ({"packages/trl/version": "1.8.0"}, "trl", "trl>=1.9", "older than 1.9"),
        ({"packages/peft/problem": "ImportError: x"}, None, "can't be imported (ImportError: x)", None),
        ({"packages/bitsandbytes/version": None}, "quant", "sloth-plugins[quant]", "not installed"),
        (
            {"bitsandbytes/cuda_build": False, "bitsandbytes/why_not": "it has no CUDA"},
            "quant",
            "python -m bitsandbytes",
            "it has no CUDA",
        ),
        (
            {"attention/cudnn_usable": False, "attention/cudnn_attention": "not usable (head dim)"},
            "cudnn-attention",
            None,
            "head dim",
        ),
        (
            {"attention/cudnn_shadowed": True, "attention/cudnn_loaded": "8.9.7"},
            None,
            "LD_LIBRARY_PATH",
            None,
        ),
        ({"plugins/problems": ["plugin 'x' was not loaded"]}, None, None, "plugin 'x' was not loaded"),
        ({"attention": {"problem": "AttributeError: gone"}}, "cudnn-attention", None, "gone"),
    ],
)
def test_advice(changes: dict[str, Any], need: str | None, install: str | None, broken: str | None) -> None:
    facts = changed(healthy(), changes)
    advice = doctor.advise(facts, (need,) if need else ())
    assert (install is None and advice.install == ()) or (install or "") in " ".join(advice.install)
    assert (broken is None and advice.broken == ()) or (broken or "") in " ".join(advice.broken)
    if need is not None:  # what nobody asked for is no failure
        assert doctor.advise(facts).broken == ()


def test_advice_promises_no_adapter_that_is_not_there() -> None:
    facts = changed(healthy(), {"adapters/Axolotl/trainer_installed": True})
    assert any("Axolotl is installed" in line and "no adapter" in line for line in doctor.advise(facts).works)


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, "doctor")
    assert code == 0 and found["broken"] == []
    assert found["packages"]["torch"] == {"version": torch.__version__.split("+")[0], "problem": None} or (
        found["packages"]["torch"]["version"] == torch.__version__
    )
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {kernel["op"] for kernel in found["kernels"]} >= set(OPS)
    for kernel in found["kernels"]:
        assert kernel["usable"] == (kernel["why_not"] is None)
        assert kernel["usable"] or kernel["backend"] != "torch"
    assert {"sloth_survey", "sloth_patches", "sloth_kernels"} <= {
        p["name"] for p in found["plugins"]["loaded"]
    }
    assert found["attention"]["chosen"]["causal"] in torch.nn.attention.SDPBackend.__members__
    assert found["triton"] == {"why_not": None, "interpreted": not torch.cuda.is_available(), "trial": None}
    assert any("transformers" in line for line in found["works"])


def test_doctor_prints_tables_and_fails_for_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = doctor.examine()
    facts = changed(facts, {"plugins/problems": ["plugin 'x' [/red] was not loaded"], "gpus": []})
    monkeypatch.setattr(doctor, "examine", lambda say: facts)
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "[/red] was not loaded" in out  # not rich's markup
    for title in (
        "Machine",
        "Packages",
        "Attention",
        "Plugins",
        "Kernels",
        "What will work",
        "What is broken",
    ):
        assert title in out
    assert run(capsys, "doctor", "--need", "gpu")[0] == 1
    facts["plugins"]["problems"] = []
    assert run(capsys, "doctor")[0] == 0
    assert run(capsys, "doctor", "--need", "gpu")[0] == 1


def test_doctor_runs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth_kernels import rms_norm

    right = rms_norm.rms_norm
    assert doctor._triton_trial() is None
    monkeypatch.setattr(rms_norm, "rms_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert "wrong by 1.0e-02" in (doctor._triton_trial() or "")

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(rms_norm, "rms_norm", broken)
    assert "RuntimeError: no C compiler" in (doctor._triton_trial() or "")


def test_doctor_survives_what_it_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose import fails and a kernel that can't say whether it is there are facts, not crashes."""

    def fail() -> str | None:
        raise OSError("libcuda is broken")

    class Odd:
        @sloth.hookimpl
        def sloth_register_kernels(self) -> list[sloth.KernelSpec]:
            none: Any = None
            spec = dict(op="rope", backend="x", function=none, reference=none)
            return [sloth.KernelSpec(name="odd.rope", unavailable=fail, **spec)]

    monkeypatch.setitem(sys.modules, "trl", None)
    default_manager().register(Odd(), name="odd")
    try:
        facts = doctor.examine()
    finally:
        default_manager().unregister("odd")
    assert "ModuleNotFoundError" in facts["packages"]["trl"]["problem"]
    (odd,) = (kernel for kernel in facts["kernels"] if kernel["name"] == "odd.rope")
    assert odd["why_not"] == "OSError: libcuda is broken"
    assert {"name": "odd", "from": "registered by code"} in facts["plugins"]["loaded"]


# demo


class FakeResult:
    """What the command needs of a DemoResult."""

    def __init__(self, agrees: bool) -> None:
        self.agrees = agrees

    def to_dict(self) -> dict[str, Any]:
        return {"agrees": self.agrees, "loss": float("nan")}

    def print(self, console: Any) -> None:
        console.print("the demo's tables")


@pytest.mark.parametrize("agrees", [True, False])
def test_demo(
    agrees: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = []

    def fake(output_dir: Path, steps: int | None) -> FakeResult:
        calls.append((output_dir, steps))
        return FakeResult(agrees)

    monkeypatch.setattr(demo, "run_demo", fake)
    code, values = run_json(capsys, "demo", "--output", tmp_path, "--steps", 3)
    assert code == (0 if agrees else 1)
    assert values == {"agrees": agrees, "loss": None}  # JSON has no NaN
    code, out, _ = run(capsys, "demo")
    assert code == (0 if agrees else 1) and "the demo's tables" in out
    assert calls == [(tmp_path, 3), (Path("demo_output"), None)]


@pytest.mark.parametrize(
    ("error", "code"), [(demo.DemoError("it ended badly"), 1), (MissingPackageError("it ended badly"), 2)]
)
def test_demo_that_fails(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(*_: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "run_demo", fake)
    found, out, err = run(capsys, "demo")
    assert (found, out) == (code, "") and "it ended badly" in err


# Mistakes


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.parent


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("plan {tmp}/nowhere", "does not exist"),
        ("verify {tmp}/nowhere", "does not exist"),
        ("plan {tmp}/file.txt", "is no directory"),
        ("plan {tmp}/empty", "has no config.json"),
        ("verify {tmp}/adapter", "it holds a PEFT adapter"),
        ("plan {tmp}/bad_json", "config.json' can't be used"),
        ("plan {tmp}/unknown", "no_such_architecture"),
        ("verify {config}", "can't be built"),
        ("verify {config} --dtype float31", "Did you mean 'float32'?"),
        ("verify {config} --dtype int8", "allowed are auto, float32, bfloat16, float16"),
        ("verify {config} --device tpu", "allowed are auto, cpu, cuda"),
        ("plan {config} --kernels tritn", "Did you mean 'triton'?"),
        ("plan {config} --disable ropes", "Did you mean 'rope'?"),
        ("plan", "MODEL_DIR"),
        ("plam {config}", "invalid choice: 'plam'"),
        ("", "COMMAND"),
        ("doctor --need trition", "Did you mean 'triton'?"),
        ("demo --steps 0", "allowed is a number from 1"),
        ("demo --steps many", "invalid int value"),
        ("demo --output {tmp}/file.txt", "is no directory"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: str, sentence: str, tmp_path: Path, config_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "file.txt", "")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "adapter" / "adapter_config.json", "{}")
    write(tmp_path / "bad_json" / "config.json", "{")
    write(tmp_path / "unknown" / "config.json", '{"model_type": "no_such_architecture"}')
    for more in ([], ["--json"]):
        if more and not arguments:
            continue
        code, out, err = run(capsys, *arguments.format(tmp=tmp_path, config=config_only).split(), *more)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("sloth: ") and sentence in last


def test_no_gpu_to_verify_on(
    config_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, "verify", config_only, "--random", "--device", "cuda")
    assert (code, out) == (2, "") and "torch sees no GPU" in err


def test_a_missing_package_names_the_extra(
    config_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(capsys, "plan", config_only)
    assert (code, out) == (2, "") and "pip install 'sloth-plugins[hf]'" in err


def test_interrupted(
    config_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_torch_and_transformers", interrupted)
    code, out, err = run(capsys, "plan", config_only)
    assert (code, out, err) == (130, "", "sloth: interrupted\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"sloth-plugins {sloth.__version__}\n", "")


def test_messages_of_errors_are_no_markup() -> None:
    """rich would drop [red] and raise MarkupError for [/x.cu]."""
    reason = "RuntimeError: [red] in [/x.cu]"
    report = Report(skipped=[sloth.Skip(module="a", op="rope", reason=reason)], notes=[reason])
    assert str(report).count(reason) == 2


# As a process


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_as_a_process(models: dict[str, Path], tmp_path: Path) -> None:
    done = python("-m", "sloth_plugins.cli", "plan", str(models["phi3"]), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert listed(json.loads(done.stdout)) == expected_sites(models["phi3"])
    done = python("-m", "sloth_plugins.cli", "plan", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sloth: 'nowhere' does not exist") and done.stderr.count("\n") == 1


def test_help_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from sloth_plugins.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: sloth") and done.stdout.splitlines()[-1] == "False"
    for command in ("doctor", "plan", "verify", "demo"):
        assert command in done.stdout
