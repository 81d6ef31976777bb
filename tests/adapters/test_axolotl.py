"""The real `axolotl train` with `plugins: [sloth]`, on SmolLM2, in an environment of its own.

`make axolotl` makes these environments in the user's cache folder; SLOTH_AXOLOTL names others (folders of
virtual environments, separated as in PATH). What a run with the plugin gives is compared with the same run
without it; runs that are compared begin from the same checkpoint, because Axolotl seeds no adapter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from sloth_plugins.quantization import Options, quantize
from sloth_plugins.smollm2 import MissingPackageError, cache_dir, smollm2_dir

EXAMPLES = ROOT / "adapters" / "axolotl" / "examples"
# Between runs in float32, whose only difference is the rounding of fused formulas.
TOLERANCE = 1e-4
LORA_OPS = {"lora_linear", "lora_mlp", "rms_norm", "add_rms_norm", "rope"}


def environments() -> list[Any]:
    """The virtual environments with Axolotl, or one parameter that says why there is none."""
    given = os.environ.get("SLOTH_AXOLOTL")
    folders = (
        [Path(folder) for folder in given.split(os.pathsep) if folder]
        if given is not None
        else sorted(path.parent for path in cache_dir().glob("axolotl-*/.ready"))
    )
    why = pytest.mark.skip(reason="no environment with Axolotl: `make axolotl` makes it")
    return [pytest.param(f, id=f.name) for f in folders] or [pytest.param(None, marks=why, id="none")]


@dataclass
class Run:
    """One `axolotl` process; `wait` gives its output."""

    folder: Path
    process: subprocess.Popen[str]
    status: int | None = None
    text: str = ""

    def wait(self) -> Run:
        if self.status is None:
            self.status = self.process.wait(timeout=500)
            self.text = (self.folder / "log.txt").read_text(encoding="utf-8")
        return self

    def done(self) -> Run:
        assert self.wait().status == 0, self.text[-6000:]
        return self

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log entries that have a loss."""
        newest = max(
            (self.folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
        )
        state = json.loads((newest / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out" / "sloth_report.json").read_text())
        return found

    @property
    def watched(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "watched.json").read_text())
        return found


@dataclass
class Axolotl:
    """Starts commands of one installed Axolotl, with sloth-plugins installed beside it or not."""

    venv: Path
    folder: Path
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        site = self.folder / "site"
        site.mkdir(parents=True)
        # Not the repository's root itself: its folder kernels/ would be seen as a package there.
        sources = [ROOT / "sloth_plugins", ROOT / "kernels/sloth_kernels", ROOT / "tests/helpers.py"]
        sources += [ROOT / "adapters/hf_trainer/sloth_hf_trainer", ROOT / "adapters/axolotl/sloth_axolotl"]
        for path in (*sources, Path(__file__).with_name("sloth_watch.py")):
            (site / path.name).symlink_to(path)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        groups = project["entry-points"] | {"sloth_plugins": {"watch": "sloth_watch"}}
        info = site / "sloth_plugins-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "".join(
                f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
                for group, points in groups.items()
            )
        )

    def environment(self, *, installed: bool = True, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLOTH_", "PYTHON"))}
        kept |= {"PATH": f"{self.venv / 'bin'}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}
        kept |= {"AXOLOTL_DO_NOT_TRACK": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        kept |= {"TMPDIR": str(self.folder)}  # Axolotl leaves its configs there
        kept.pop("TRITON_INTERPRET", None)
        return kept | ({"PYTHONPATH": str(self.folder / "site")} if installed else {}) | more

    def start(
        self, name: str, config: dict[str, Any], *arguments: str, command: str = "train", **options: Any
    ) -> Run:
        folder = self.folder / name
        folder.mkdir()
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **config}))
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                ["axolotl", command, str(path), *arguments],
                env=self.environment(SLOTH_WATCH=str(folder / "watched.json"), **options),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                text=True,
            )
        self.runs.append(Run(folder, process))
        return self.runs[-1]

    def train(self, name: str, config: dict[str, Any], **options: Any) -> Run:
        return self.start(name, config, "--launcher", "python", **options)

    def python(self, code: str, *, installed: bool = True, **environment: str) -> str:
        done = subprocess.run(
            [str(self.venv / "bin" / "python"), "-c", code],
            env=self.environment(installed=installed, **environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout


@pytest.fixture(scope="module", params=environments())
def axolotl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Axolotl]:
    made = Axolotl(request.param.absolute(), tmp_path_factory.mktemp(request.param.name))
    yield made
    for run in made.runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    # A folder that is made for a whole module outlives it; of many runs the logs are kept, not the weights.
    for path in made.folder.rglob("*"):
        if path.suffix in {".safetensors", ".pt", ".bin"} and not path.is_symlink():
            path.unlink()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """An example's config for SmolLM2 and a few rows; `sloth=False` takes the plugin out again."""
    try:
        model = str(smollm2_dir())
    except MissingPackageError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("data")
    texts = list(topics.items())[:8]
    alpaca = [{"instruction": f"Explain {k}.", "input": "", "output": v[:120]} for k, v in texts]
    turn: Callable[[str], dict[str, str]] = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    pairs = [
        {
            "conversation": [{"role": "user", "content": f"Explain {k}."}],
            "chosen": turn(v[:90]),
            "rejected": turn(v[90:140]),
        }
        for k, v in texts
    ]
    for name, rows in (("alpaca", alpaca), ("dpo", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, *, sloth: bool = True, **changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yml").read_text(encoding="utf-8"))
        config["datasets"][0]["path"] = str(folder / ("dpo" if name == "dpo" else "alpaca")) + ".jsonl"
        for key in ("output_dir", "num_epochs", "saves_per_epoch", "warmup_ratio"):
            config.pop(key, None)
        config |= dict(base_model=model, max_steps=2, save_steps=1, sequence_len=128, seed=3, val_set_size=0)
        config |= dict(dataset_prepared_path=str(folder / "prepared"), gradient_accumulation_steps=1)
        config |= dict(micro_batch_size=1, optimizer="adamw_torch", bf16=False, learning_rate=1e-3)
        config |= dict(lr_scheduler="constant")
        if not sloth:
            config.pop("sloth", None)
            assert config.pop("plugins") == ["sloth"]
            # What the plugin does for a CPU, where Axolotl's own kernels can't run.
            config["lora_mlp_kernel"] = False
        return config | changes

    return make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 whose linears bitsandbytes' blocks divide, with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = dict(hidden_size=64, intermediate_size=128, head_dim=16, max_position_embeddings=512)
    tiny_model("llama", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def oldest(axolotl: Axolotl) -> Axolotl:
    """For what no version does in another way."""
    if axolotl.venv.name != environments()[0].id:
        pytest.skip("on the oldest Axolotl alone: each run takes half a minute")
    return axolotl


def check_accelerated(run: Run, ops: set[str]) -> None:
    """The report, the forwards that ran, the figures of the trackers."""
    report, watched = run.report, run.watched
    assert {row["op"] for row in report["patched"]} >= ops
    assert not watched["problem"] and {op for op, calls in watched["patched"].items() if calls} >= ops - {
        "rms_norm"  # fused away where add_rms_norm has it
    }
    assert run.history[-1]["sloth/tokens_per_s"] > 0
    assert run.text.count("sloth patched") == 1, "the report is printed once"


def assert_close(run: Run, plain: Run, *keys: str) -> None:
    assert run.history[-1]["step"] == plain.history[-1]["step"] == 2
    for entry in run.history:
        (other,) = [o for o in plain.history if o["step"] == entry["step"]]
        for key in ("loss", *keys):
            assert entry[key] == pytest.approx(other[key], rel=TOLERANCE), (key, entry, other)


@pytest.fixture(scope="module")
def lora(axolotl: Axolotl, example: Callable[..., dict[str, Any]]) -> Run:
    """LoRA without the plugin, but with the package installed: two steps, a checkpoint after each."""
    return axolotl.train("lora", example("lora", sloth=False, sample_packing=False)).done()


def test_lora_resumes_and_merges(axolotl: Axolotl, example: Callable[..., dict[str, Any]], lora: Run) -> None:
    """A plain checkpoint is continued with the plugin, without it, and without the package."""
    # Unpacked: Axolotl continues in the middle of an epoch of packed rows with other ones.
    begun = dict(resume_from_checkpoint=str(lora.folder / "out" / "checkpoint-1"), sample_packing=False)
    run = axolotl.train("lora_sloth", example("lora", **begun))
    bare = axolotl.train("lora_bare", example("lora", sloth=False, **begun), installed=False)
    run.done(), bare.done()
    check_accelerated(run, LORA_OPS)
    assert not run.report["skipped"]
    assert any("LoRA kernels are off" in note for note in run.report["notes"])
    assert_close(run, lora, "grad_norm")
    assert [e["loss"] for e in bare.history] == [e["loss"] for e in lora.history], "unlisted, it does nothing"
    name = "adapter_model.safetensors"
    assert (bare.folder / "out" / name).read_bytes() == (lora.folder / "out" / name).read_bytes()
    files = {path.name for path in (bare.folder / "out").iterdir()}
    assert {path.name for path in (run.folder / "out").iterdir()} == files | {"sloth_report.json"}
    configs = [json.loads((r.folder / "out" / "adapter_config.json").read_text()) for r in (run, lora)]
    for config in configs:
        config["target_modules"].sort()  # a set's order
    assert configs[0] == configs[1]

    adapter = str(run.folder / "out")
    merged = [
        axolotl.start(
            f"merge_{sloth}", example("lora", sloth=sloth, lora_model_dir=adapter), command="merge-lora"
        )
        for sloth in (True, False)
    ]
    weights = [(r.done().folder / "out" / "merged" / "model.safetensors").read_bytes() for r in merged]
    assert weights[0] == weights[1]


def test_qlora_packed(oldest: Axolotl, example: Callable[..., dict[str, Any]], lora: Run) -> None:
    """Both runs begin with the same adapter; rows are packed into 256 tokens and layers recomputed."""
    changes = dict(lora_model_dir=str(lora.folder / "out"), sequence_len=256, pad_to_sequence_len=True)
    plain = oldest.train("qlora", example("qlora", sloth=False, **changes))
    run = oldest.train("qlora_sloth", example("qlora", **changes))
    plain.done(), run.done()
    check_accelerated(run, LORA_OPS)
    assert_close(run, plain, "grad_norm")


def test_dpo(axolotl: Axolotl, example: Callable[..., dict[str, Any]]) -> None:
    """TRL builds the adapter; the plain run's first checkpoint is continued with the plugin."""
    plain = axolotl.train("dpo", example("dpo", sloth=False)).done()
    begun = str(plain.folder / "out" / "checkpoint-1")
    run = axolotl.train("dpo_sloth", example("dpo", resume_from_checkpoint=begun)).done()
    check_accelerated(run, LORA_OPS)
    assert_close(run, plain, "logps/chosen", "logps/rejected")
    assert plain.history[1]["loss"] != pytest.approx(0.6931, abs=1e-3), "it has learnt"


def layout(run: Run) -> dict[str, str]:
    """What the saved plan of a run says of each linear, as sloth_watch writes it."""
    plan = json.loads((run.folder / "out" / "sloth_quantization_plan.json").read_text())
    return {c["module"]: "4bit" if c["bits"] == 4 else "bfloat16" for c in plan["choices"]}


def check_planned(run: Run) -> None:
    """The model that was trained is stored as the plan says."""
    planned = layout(run)
    assert {*planned.values()} == {"4bit", "bfloat16"}
    assert {name: run.watched["linears"].get(name) for name in planned} == planned


LOAD_ADAPTER = """
import sys
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
state = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
saved = load_file(f"{folder}/adapter_model.safetensors")
assert state.keys() == saved.keys() and all((state[k] == v).all() for k, v in saved.items())
assert any((v != 0).any() for k, v in saved.items() if "lora_B" in k)
"""


def test_dynamic_4bit(axolotl: Axolotl, example: Callable[..., dict[str, Any]]) -> None:
    """Chosen from the run's own rows, loaded so; the adapter is one for the plain base model."""
    config = example("qlora", bf16=True, gradient_checkpointing=False, max_steps=5)
    block = {"dynamic_4bit": {"budget": 1.1, "samples": 3}}
    run = axolotl.train("dynamic", config | {"sloth": block}).done()
    check_accelerated(run, LORA_OPS)
    check_planned(run)
    planned, linears = layout(run), run.watched["linears"]
    assert 0 < sum(kind == "bfloat16" for kind in planned.values()) < len(planned) / 4
    assert linears["lm_head"] == "bfloat16" and linears.keys() == planned.keys() | {"lm_head"}
    (note,) = [note for note in run.report["notes"] if note.startswith("dynamic_4bit: ")]
    assert "210 linears" in note and note in run.text
    loaded = f"import sys; sys.argv[1:] = {[config['base_model'], str(run.folder / 'out')]!r}\n{LOAD_ADAPTER}"
    axolotl.python(loaded, installed=False)


def test_a_saved_plan(axolotl: Axolotl, example: Callable[..., dict[str, Any]], tiny: Path) -> None:
    """It is taken up by `plan:`, by a resumed training and by other commands."""
    changes = dict(base_model=str(tiny), bf16=True, sequence_len=512, sample_packing=False)
    config = example("qlora", **changes) | {"sloth": {"dynamic_4bit": {"budget": 1.2}}}
    run = axolotl.train("plan", config).done()
    check_planned(run)
    out = run.folder / "out"
    saved = {"dynamic_4bit": {"plan": str(out / "sloth_quantization_plan.json")}}
    given = axolotl.train("planned", config | {"sloth": saved, "max_steps": 1})
    begun = {"resume_from_checkpoint": str(out / "checkpoint-1")}
    resumed = axolotl.train("resumed", config | begun | {"sloth": {"dynamic_4bit": {"budget": 1.5}}})
    merged = axolotl.start("merged", config | {"output_dir": str(out)}, command="merge-lora").done()
    for later in (given, resumed):
        check_planned(later.done())
        assert layout(later) == layout(run) and "measuring" not in later.text
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in run.history]
    # Where merge-lora rounds what was kept in 16 bits, the plugin says so.
    name = min(name for name, kind in layout(run).items() if kind == "bfloat16")
    before, after = (load_file(f / "model.safetensors")[f"{name}.weight"] for f in (tiny, out / "merged"))
    update = load_file(out / "adapter_model.safetensors")
    a, b = (update[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    exact = before + config["lora_alpha"] / config["lora_r"] * b @ a
    rounded = (after - exact).norm() > 0.01 * exact.norm()
    assert rounded == ("merge_method: legacy rounds none" in merged.text)


def test_dynamic_4bit_in_two_processes(
    oldest: Axolotl, example: Callable[..., dict[str, Any]], tiny: Path
) -> None:
    """The main process measures, from a file here; DPO's rows are text. Then without a plan to go by."""
    changes = QLORA | dict(base_model=str(tiny), bf16=True, max_steps=1, sequence_len=512)
    texts = oldest.folder / "texts.txt"
    texts.write_text("\n\n".join(text[:300] for text in list(topics.values())[:4]))
    block = {"budget": 1.2, "calibration": str(texts), "keep": ["model.layers.1.mlp.up_proj"]}
    config = example("lora", **changes) | {"sloth": {"dynamic_4bit": block}}
    launch = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    run = oldest.start("dynamic_ddp", config, "--launcher", "accelerate", "--", *launch)
    rows = example("dpo", **changes) | {"sloth": {"dynamic_4bit": {"budget": 1.2, "samples": 3}}}
    dpo = oldest.train("dynamic_dpo", rows)
    lost = oldest.start("dynamic_lost", config, command="evaluate")
    for done in (run.done(), dpo.done()):
        check_planned(done)
        assert done.text.count("measuring") == 1
    assert layout(run)["model.layers.1.mlp.up_proj"] == "bfloat16"
    assert lost.wait().status != 0 and "only `axolotl train` measures a plan" in lost.text


def test_a_quantized_directory_needs_no_option(
    axolotl: Axolotl, example: Callable[..., dict[str, Any]], tiny: Path
) -> None:
    """What `sloth quantize` writes is an ordinary base model, which dynamic_4bit refuses."""
    texts, out = axolotl.folder / "quantize.txt", axolotl.folder / "model_4bit"
    texts.write_text("\n\n".join(text[:300] for text in list(topics.values())[:4]))
    kept = "model.layers.0.self_attn.v_proj"
    quantize(tiny, out, texts, options=Options(samples=4, keep=(kept,)))
    config = example("qlora", base_model=str(out), bf16=True, max_steps=1, sequence_len=512)
    run = axolotl.train("quantized", config)
    refused = axolotl.train("quantized_twice", config | {"sloth": {"dynamic_4bit": {}}})
    check_accelerated(run.done(), LORA_OPS)
    assert not run.report["skipped"]
    linears = run.watched["linears"]
    others = {name: kind for name, kind in linears.items() if kind != "4bit"}
    assert others == {kept: "bfloat16", "lm_head": "bfloat16"}
    assert refused.wait().status != 0 and "needs no dynamic_4bit" in refused.text


def test_full_fine_tuning(oldest: Axolotl, example: Callable[..., dict[str, Any]]) -> None:
    # The optimizer's state of a whole model is 1 GB a checkpoint, and nothing is continued here.
    saves = dict(save_only_model=True, save_steps=2)
    plain = oldest.train("full", example("full", sloth=False, **saves))
    run = oldest.train("full_sloth", example("full", **saves))
    plain.done(), run.done()
    check_accelerated(run, {"gated_mlp", "rms_norm", "add_rms_norm", "rope"})
    assert_close(run, plain, "grad_norm")
    assert plain.history[1]["loss"] != pytest.approx(plain.history[0]["loss"], rel=1e-2)


def test_two_processes_in_bf16(oldest: Axolotl, example: Callable[..., dict[str, Any]]) -> None:
    """DDP through `accelerate launch`, nothing in the config that says CPU, the plugin listed twice."""
    config = example("lora", bf16=True, plugins=["sloth", "sloth_axolotl.SlothPlugin"], max_steps=1)
    launch = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    run = oldest.start("ddp", config, "--launcher", "accelerate", "--", *launch).done()
    check_accelerated(run, LORA_OPS)


QLORA = {"adapter": "qlora", "load_in_4bit": True}
BAD = {
    "misspelt": ({"sloth": {"kernel": "triton"}}, "'kernel' in sloth: .* Did you mean 'kernels'"),
    "alias": ({"sloth": {"memory_budgets": "1GiB"}}, "Did you mean 'memory_budget'"),
    "both": ({"sloth": {"memory_budget": 1, "memory_budget_bytes": 1}}, "they are one option"),
    "type": ({"sloth": {"verify": "yes"}}, "verify='yes': allowed are True and False.*sloth:"),
    "value": ({"sloth": {"checkpointing": "all"}}, "checkpointing='all': allowed are 'auto'"),
    "block": ({"sloth": True}, "sloth: True in the Axolotl config: allowed is a block"),
    "op": ({"sloth": {"disable": ["ropes"]}}, "Did you mean 'rope'"),
    "contradiction": (
        {"sloth": {"checkpointing": "recompute"}, "gradient_checkpointing": False},
        "checkpointing: recompute under sloth: and gradient_checkpointing: false",
    ),
    "zero3": ({"deepspeed": "zero3.json"}, r"deepspeed: 'zero3.json' \(ZeRO stage 3\)"),
    "dynamic block": ({"sloth": {"dynamic_4bit": True}}, "dynamic_4bit: True in the Axolotl config"),
    "dynamic key": ({"sloth": {"dynamic_4bit": {"budgets": 1}}}, "dynamic_4bit under .* mean 'budget'"),
    "dynamic budget": ({"sloth": {"dynamic_4bit": {"budget": 0.5}}}, "budget=0.5: allowed is .*dynamic_4bit"),
    "dynamic type": ({"sloth": {"dynamic_4bit": {"samples": "x"}}}, "dynamic_4bit.samples.*valid integer"),
    "dynamic 16": ({"sloth": {"dynamic_4bit": {}}}, "adapter: 'lora' and load_in_4bit: None: needed are"),
    "dynamic 8": (
        {"sloth": {"dynamic_4bit": {}}, "load_in_8bit": True},
        "load_in_4bit: None: needed are adapter: qlora",
    ),
    "dynamic two": (
        QLORA | {"sloth": {"dynamic_4bit": {"plan": "a.json", "calibration": "b.txt"}}},
        "plan and calibration under dynamic_4bit .* one of the two",
    ),
    "dynamic text": (
        QLORA | {"sloth": {"dynamic_4bit": {"calibration": "b.txt"}}},
        "calibration: 'b.txt' is no file",
    ),
    "dynamic plan": (
        QLORA | {"sloth": {"dynamic_4bit": {"plan": "a.json"}}},
        "plan: 'a.json' is no quantization plan",
    ),
    "dynamic skips": (
        QLORA | {"sloth": {"dynamic_4bit": {}}, "bnb_config_kwargs": {"llm_int8_skip_modules": ["lm_head"]}},
        "llm_int8_skip_modules and dynamic_4bit .* name yours as keep",
    ),
    "fsdp1": ({"fsdp": ["full_shard"], "fsdp_config": {}}, "FSDP1"),
}
DYNAMIC = """
import os, sys, types
import torch
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from sloth_axolotl import _dynamic
from sloth_axolotl.args import Dynamic4bit
from torch import nn

def refused(call, message):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

cfg = DictDefault({"base_model": "nobody/nothing", "load_in_4bit": True, "output_dir": "nowhere"})
refused(lambda: _dynamic._directory(cfg), "'nobody/nothing' is no directory, and its files are neither")
refused(lambda: _dynamic.require(cfg), "only `axolotl train` measures a plan")
for kind, own in (("llama", []), ("falcon_h1", ["out_proj"])):
    assert _dynamic._axolotls_own(kind) == own
rows = [{"input_ids": [i, i]} for i in range(9)]
assert sorted(_dynamic._rows(rows, 99)) == [row["input_ids"] for row in rows]
assert len(_dynamic._rows(rows, 4)) == 4 and len(_dynamic._rows(iter(rows), 4)) == 4
assert _dynamic._rows([{"prompt": "a", "completion": "b"}], 1) == ["ab"]
refused(lambda: _dynamic._rows([{"prompt": ["a"]}], 1), "only prompt: give calibration, a file")
other = type("Other", (BasePlugin,), {"load_datasets": lambda self, cfg, preprocess=False: None})
PluginManager.get_instance().plugins["other.Other"] = other()
refused(lambda: _dynamic._datasets(cfg), "those of the plugin other.Other, which can't be asked twice")

# The loaded model has one listed linear in 4 bits, and lacks another; "head" is trained.
model = nn.ModuleDict({"x": nn.ModuleDict({n: nn.Linear(2, 2) for n in ("a", "b", "c", "head")})})
model["x"]["a"].weight.quant_state = "of bitsandbytes"
names = ["x.a", "x.b", "x.head", "lm_head"]
model.config = types.SimpleNamespace(quantization_config=types.SimpleNamespace(llm_int8_skip_modules=names))
cfg |= {"bnb_config_kwargs": {"llm_int8_skip_modules": names}, "torch_dtype": torch.bfloat16}
cfg["lora_modules_to_save"] = ["head"]
cfg = DictDefault(cfg)
refused(lambda: _dynamic.check(cfg, Dynamic4bit(plan="p"), False, model), "'p' is of another model")
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _dynamic.check(cfg, Dynamic4bit(), False, model)
assert "2 linears that the plan keeps in 16 bits, such as x.a, are in 4 bits" in str(caught[0].message)
_dynamic.narrow(cfg, model)
assert [n for n, layer in model["x"].items() if layer.weight.dtype == torch.bfloat16] == ["b"]

# What goes wrong in measuring leaves uniform NF4 with a warning, but in strict mode and for a user's mistake.
import axolotl.loaders
import sloth_plugins
axolotl.loaders.load_tokenizer = lambda cfg: None
data = types.SimpleNamespace(train_dataset=rows)
for error, strict, raised in ((KeyError, 0, None), (KeyError, 1, KeyError), (ValueError, 0, ValueError)):
    def fail(*args, **kwargs):
        raise error("text")
    sloth_plugins.plan_quantization = fail
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            assert _dynamic._measured(cfg, Dynamic4bit(), strict, "d", data) is None and raised is None
            assert "uniform NF4, because planning failed: KeyError: 'text'" in str(caught[0].message)
        except (KeyError, ValueError) as found:
            assert type(found) is raised, found
"""
NOTES = """
from axolotl.utils.dict import DictDefault
from sloth_axolotl.plugin import THEIRS, settings_of
from sloth_plugins.settings import OPS
assert {op for ops in THEIRS.values() for op in ops} <= {*OPS, "head_loss"}
for name, ops in THEIRS.items():
    settings, notes = settings_of(DictDefault({name: True, "sloth": {"disable": ["rope"]}}))
    assert settings.disable == {"rope", *ops} - {"head_loss"}, (name, settings)
    assert settings.head_loss == ("off" if "head_loss" in ops else "auto")
    assert len(notes) == 1 and name in notes[0] and all(op in notes[0] for op in ops), notes
given = {"activation_offloading": True, "gradient_checkpointing": "offload", "layer_offloading": True}
for offload in ({name: value} for name, value in given.items()):
    settings, notes = settings_of(DictDefault(offload))
    assert settings.checkpointing == "off" and len(notes) == 1 and next(iter(offload)) in notes[0], notes
    for own in ({"memory_budget_bytes": 2**34}, {"checkpointing": "recompute"}):
        settings, notes = settings_of(DictDefault({**offload, "sloth": own}))
        assert settings.checkpointing == own.get("checkpointing", "auto") and not notes
assert settings_of(DictDefault({"gradient_checkpointing": True}))[0].checkpointing == "auto"
"""
LOAD = """
import json, sys, warnings
from pathlib import Path
Path("zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
from axolotl.cli.config import load_cfg
from axolotl.utils.dict import DictDefault
found = {}
for name, config in json.loads(Path("configs.json").read_text()).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            cfg = load_cfg(DictDefault(config))
            result = {key: value for key, value in cfg.items() if key == "sloth" or key.endswith("_kernel")}
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    found[name] = [result, [str(w.message) for w in caught if "sloth" in str(w.message)]]
print("RESULT" + json.dumps(found))
"""


def test_configs(axolotl: Axolotl, example: Callable[..., dict[str, Any]]) -> None:
    """What is refused, and what a good config becomes, in one process that loads them all."""
    good = {
        "block": {"sloth": {"memory_budget": "24GiB", "checkpointing": False, "disable": "rope"}},
        "theirs": {"lora_mlp_kernel": True},
        "unlisted": {"plugins": [], "sloth": {"strict": True}},
        "again": {"plugins": ["sloth", "sloth"]},
        "dotted": {"plugins": ["sloth_axolotl.SlothPlugin"], "sloth": {"kernels": "torch"}},
    }
    configs = {f"bad {name}": example("lora") | change for name, (change, _) in BAD.items()}
    configs |= {f"good {name}": example("lora") | change for name, change in good.items()}
    configs = {name: c | {"output_dir": str(axolotl.folder / "none")} for name, c in configs.items()}
    (axolotl.folder / "configs.json").write_text(json.dumps(configs))
    found = json.loads(axolotl.python(NOTES + LOAD).split("RESULT")[1])
    for name, (_, message) in BAD.items():
        assert re.search(message, found[f"bad {name}"][0], re.DOTALL), (name, found[f"bad {name}"])
    block, _ = found["good block"]
    assert block["sloth"] == {
        **{"kernels": "auto", "verify": True, "strict": False, "head_loss": "auto", "keep_float32": True},
        **{"checkpointing": "off", "memory_budget_bytes": 24 * 2**30, "disable": ["rope"]},
    }
    assert not any(value for key, value in block.items() if key != "sloth")
    assert found["good theirs"][0]["lora_mlp_kernel"] is True
    (warning,) = found["good unlisted"][1]
    assert "plugins: [sloth]" in warning
    assert "sloth" not in found["good again"][0] and not found["good again"][1]
    assert found["good dotted"][0]["sloth"]["kernels"] == "torch"


def test_the_parts_of_dynamic_4bit(axolotl: Axolotl) -> None:
    """What needs no model to be loaded: mistakes, rows, a model that is not as planned, a failing plan."""
    axolotl.python(DYNAMIC, HF_HUB_OFFLINE="1")


def test_the_name_needs_the_hook_and_the_dotted_form_none(axolotl: Axolotl) -> None:
    """Without torch's autoload 0.21 still finds the name; and what is loaded stays light."""
    code = (
        "import json, sys\n"
        "import axolotl.cli.config\n"
        "from axolotl.integrations import base\n"
        "light = 'sloth_axolotl.plugin' not in sys.modules and 'sloth_hf_trainer' not in sys.modules\n"
        "base.PluginManager.get_instance()\n"
        "found = {}\n"
        "for name in ('sloth', 'sloth_axolotl.SlothPlugin'):\n"
        "    try:\n"
        "        found[name] = type(base.load_plugin(name)).__name__\n"
        "    except Exception as error:\n"
        "        found[name] = type(error).__name__\n"
        "print('RESULT' + json.dumps([light, found, hasattr(base, 'get_builtin_plugins')]))\n"
    )
    for hook in ("1", "0"):
        text = axolotl.python(code, TORCH_DEVICE_BACKEND_AUTOLOAD=hook)
        light, found, entry_points = json.loads(text.split("RESULT")[1])
        assert light and found["sloth_axolotl.SlothPlugin"] == "SlothPlugin"
        expected = "SlothPlugin" if hook == "1" or entry_points else "ValueError"
        assert found["sloth"] == expected, (hook, found)


def test_torchs_hook_is_light(oldest: Axolotl) -> None:
    """What every `import torch` in an environment with this package loads more. Counted, as times vary."""
    code = "import sys, torch; print('RESULT' + ' '.join(sys.modules))"
    with_hook, without = (
        {*oldest.python(code, TORCH_DEVICE_BACKEND_AUTOLOAD=hook).split("RESULT")[1].split()} for hook in "10"
    )
    assert with_hook - without == {"sloth_plugins", "sloth_plugins._autoload"}
