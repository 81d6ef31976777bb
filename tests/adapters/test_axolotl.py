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
import yaml
from helpers import ROOT

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


def test_full_fine_tuning(oldest: Axolotl, example: Callable[..., dict[str, Any]]) -> None:
    plain = oldest.train("full", example("full", sloth=False))
    run = oldest.train("full_sloth", example("full"))
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
    "fsdp1": ({"fsdp": ["full_shard"], "fsdp_config": {}}, "FSDP1"),
}
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
