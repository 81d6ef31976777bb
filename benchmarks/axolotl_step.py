"""One QLoRA training step of `axolotl train`, with the plugin, with Axolotl's own kernels, and plain.

    python benchmarks/axolotl_step.py DIR [--out rows.jsonl] [--cases sloth axolotl plain] [--commit HASH]

DIR is a Hugging Face checkpoint directory with a tokenizer, any one; the figures in `results/` are of random
weights in the shapes of Llama-3.1-8B. Axolotl quantizes 16-bit weights to NF4 with double quantization while
it loads them; what bitsandbytes has quantized already it loads as it is. The configs differ in what the table
says and in nothing else: adapter qlora, LoRA r=16 and alpha=16 without dropout on all seven projections,
batch 2 x 2048 of random tokens (tokenized beforehand, neither packed nor padded), bf16, SDPA, fused AdamW
with a constant lr of 1e-4, 3 steps of warm-up, then `--steps` (8) measured ones, a log entry each step, no
evaluation and no checkpoints.

| case | in the config |
|---|---|
| `sloth` | `plugins: [sloth_axolotl.SlothPlugin]` |
| `axolotl` | its LoRA kernels (MLP, QKV, O) and its LigerPlugin: rope, RMSNorm, fused linear cross entropy |
| `plain` | Axolotl's LoRA kernels off: where nothing is said, it switches them on |
| `sloth_ck:GIB` | as `sloth`, with `sloth: {memory_budget: GIBGiB}` and `gradient_checkpointing: true` |
| `axolotl_ck` | as `axolotl`, with `gradient_checkpointing: true`: every layer is recomputed |

`liger_glu_activation` stays off, for `lora_mlp_kernel` has that place. `gradient_checkpointing` is false in
the first three cases; in `sloth_ck` the plan takes its place.

Each case is a process of its own, `python -m axolotl.cli.train config.yml`, on one GPU. A plugin of this
script, the same in all cases, adds a callback that synchronises the device and reads the clock where a step
begins and where it ends. A step's time (`p20_ms`, `p50_ms`, `p80_ms`) is from the end of one step to the end
of the next, so that loading the batch, logging and all else that is done between steps count; `inside_ms` is
the median from begin to end. The plugin also seeds the adapters, so that the losses of the cases can be
compared. `peak_bytes` is what was allocated at most from the first step on, `base_bytes` what was allocated
before it, and `setup_peak_bytes` the peak until then, with loading and verification. `own_kernels` counts
Axolotl's and Liger's kernels in the model; a case that should have none and has some fails, and the other way
round.

`--python` names another interpreter, one that has Axolotl. `--tiny` needs no GPU: two small layers and a
byte-level tokenizer that the script makes itself, to see that it runs; its times say nothing. `axolotl` and
`axolotl_ck` fail there at the first kernel, which needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
# What goes on PYTHONPATH; not the root itself, whose folder kernels/ would be seen as a package there.
PACKAGES = (
    "sloth_plugins",
    "kernels/sloth_kernels",
    "adapters/hf_trainer/sloth_hf_trainer",
    "adapters/axolotl/sloth_axolotl",
)
# What Axolotl loads by its dotted name; this file is copied beside it.
CLOCK = "sloth_step_clock"
CLOCK_MODULE = "import axolotl_step\n\nStepClock = axolotl_step.step_clock()\n"
RESULT = "SLOTH_STEP_RESULT"  # names the file that the clock writes

CASES = ("sloth", "axolotl", "plain")
WARM_UP = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKEN_IDS = 256  # of a byte-level tokenizer, and of every larger one
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
LIGER = ("liger_rope", "liger_rms_norm", "liger_fused_linear_cross_entropy")
VERSIONS = ("triton", "transformers", "peft", "bitsandbytes", "trl", "axolotl", "liger-kernel")
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=TOKEN_IDS + len(SPECIAL),
    bos_token_id=TOKEN_IDS,
    eos_token_id=TOKEN_IDS + 1,
    pad_token_id=TOKEN_IDS + 2,
)


def own_kernels(model: Any) -> dict[str, int]:
    """What Axolotl's LoRA kernels and Liger have put into `model`, by the name of the function or class."""
    found: dict[str, int] = {}

    def note(thing: Any) -> None:
        module, name = str(getattr(thing, "__module__", "")), getattr(thing, "__name__", "")
        if module.startswith("liger_") or (module.startswith("axolotl.") and name.startswith("apply_lora")):
            found[name] = found.get(name, 0) + 1

    inner = model.get_base_model()
    note(type(inner).forward)
    note(getattr(sys.modules[type(inner).__module__], "apply_rotary_pos_emb", None))
    for module in model.modules():
        note(type(module))
        for name in ("forward", "apply_qkv", "apply_o"):
            note(getattr(vars(module).get(name), "__func__", None))
    return found


def step_clock() -> type:
    """The class of the Axolotl plugin; called in the measured process, where Axolotl and torch are."""
    import torch
    from axolotl.integrations.base import BasePlugin
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def environment() -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        versions = {"gpu": torch.cuda.get_device_name(0) if cuda else "none", "torch": torch.__version__}
        for name in VERSIONS:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "none"
        return versions

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer
            self.begins: list[float] = []
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.setup_peak = self.base = self.peak = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cuda and not self.begins:
                self.setup_peak = torch.cuda.max_memory_allocated()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                self.base = torch.cuda.memory_allocated()
            self.begins.append(now())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(now())
            if cuda:  # Axolotl resets it with each log
                self.peak = max(self.peak, torch.cuda.max_memory_allocated())

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            callbacks = self.trainer.callback_handler.callbacks
            records = [c.acceleration for c in callbacks if getattr(c, "acceleration", None) is not None]
            result = {
                "environment": environment(),
                "begins": self.begins,
                "ends": self.ends,
                "losses": self.losses,
                "peak_bytes": self.peak,
                "base_bytes": self.base,
                "setup_peak_bytes": self.setup_peak,
                "own_kernels": own_kernels(self.trainer.model),
                "batch": args.train_batch_size,
                "lengths": sorted({len(row) for row in self.trainer.train_dataset["input_ids"]}),
                # As it stands after the steps: the saved report is older than the plan.
                "checkpointing": records[0].report.to_dict()["checkpointing"] if records else {},
            }
            Path(os.environ[RESULT]).write_text(json.dumps(result), encoding="utf-8")

    class StepClock(BasePlugin):  # type: ignore[misc]
        def register(self, cfg: Any) -> None:
            if not cuda and os.environ["CUDA_VISIBLE_DEVICES"]:
                raise ValueError("no CUDA GPU here; --tiny runs without one")

        def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
            return None if cuda else {"use_cpu": True}  # else bf16 is refused

        def pre_lora_load(self, cfg: Any, model: Any) -> None:
            torch.manual_seed(0)

        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
            return [Clock(trainer)]

    return StepClock


def make_tiny(folder: str) -> None:
    """A checkpoint of two layers and a byte-level tokenizer; called in a process of --python."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.bfloat16).save_pretrained(folder)
    entries = sorted(pre_tokenizers.ByteLevel.alphabet()) + list(SPECIAL.values())
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **SPECIAL).save_pretrained(
        folder
    )


def config(case: str, directory: str, folder: Path, rows: int, length: int, steps: int) -> dict[str, Any]:
    """The Axolotl config of one case; its data and its output are in `folder`."""
    name, _, budget = case.partition(":")
    options: dict[str, Any] = {
        "base_model": directory,
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 1,
        "val_set_size": 0,
        "sequence_len": length,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": TARGETS,
        "micro_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "max_steps": WARM_UP + steps,
        "optimizer": "adamw_torch_fused",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "bf16": True,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": name.endswith("_ck"),
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 42,
        "plugins": [],
    }
    if name in ("sloth", "sloth_ck"):
        options["plugins"] += ["sloth_axolotl.SlothPlugin"]
        if budget:
            options["sloth"] = {"memory_budget": f"{budget}GiB"}
    else:
        own = name != "plain"
        options |= dict.fromkeys(LORA_KERNELS, own)
        if own:
            options |= dict.fromkeys(LIGER, True)
            options["plugins"] += ["axolotl.integrations.liger.LigerPlugin"]
    options["plugins"] += [f"{CLOCK}.StepClock"]
    return options


def write_rows(path: Path, count: int, length: int) -> None:
    generator = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            ids = [generator.randrange(TOKEN_IDS) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "labels": ids, "attention_mask": [1] * length}) + "\n")


def make_site(folder: Path) -> None:
    """A folder for PYTHONPATH: the packages of this repository, and the clock."""
    folder.mkdir()
    for package in PACKAGES:
        (folder / Path(package).name).symlink_to(ROOT / package)
    shutil.copy(HERE, folder / "axolotl_step.py")
    (folder / f"{CLOCK}.py").write_text(CLOCK_MODULE, encoding="utf-8")


def child_environment(site: Path, folder: Path, tiny: bool) -> dict[str, str]:
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "" if tiny else visible.split(",")[0],
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        RESULT: str(folder / "steps.json"),
    }


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class CaseError(Exception):
    """A case without a row; the message is the end of its log, or what is wrong with what it measured."""


def measure(
    case: str, arguments: argparse.Namespace, directory: str, site: Path, folder: Path
) -> dict[str, Any]:
    """Run one case in `folder`, which is empty; gives its row."""
    rows, length, steps = arguments.batch, arguments.length, arguments.steps
    total = WARM_UP + steps
    write_rows(folder / "rows.jsonl", rows * total, length)
    options = config(case, directory, folder, rows, length, steps)
    (folder / "config.yml").write_text(json.dumps(options, indent=2), encoding="utf-8")  # JSON is YAML too
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [arguments.python, "-m", "axolotl.cli.train", "config.yml"],
            env=child_environment(site, folder, arguments.tiny),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode or not (folder / "steps.json").exists():
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        raise CaseError(f"exit status {done.returncode}\n{text[-6000:]}")
    result = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    begins, ends = result["begins"], result["ends"]
    if not len(begins) == len(ends) == len(result["losses"]) == total:
        raise CaseError(f"{len(ends)} steps and {len(result['losses'])} losses, not {total}")
    if (result["batch"], result["lengths"]) != (rows, [length]):
        raise CaseError(f"batches of {result['batch']} rows of {result['lengths']}, not {rows} x {length}")
    if bool(result["own_kernels"]) != case.startswith("axolotl"):
        raise CaseError(f"Axolotl's and Liger's own kernels in the model: {result['own_kernels']}")
    report: dict[str, Any] = {"patched": [], "skipped": []}
    saved = folder / "out" / "sloth_report.json"
    if saved.exists() != case.startswith("sloth"):
        raise CaseError(f"sloth_report.json is {'there' if saved.exists() else 'missing'}")
    if saved.exists():
        report = json.loads(saved.read_text(encoding="utf-8"))
    ops: dict[str, int] = {}
    for row in report["patched"]:
        ops[row["op"]] = ops.get(row["op"], 0) + 1
    if bool(ops) != case.startswith("sloth"):
        raise CaseError(f"patched: {ops}")

    ms = [(end - before) * 1e3 for before, end in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    inside = [(end - begin) * 1e3 for begin, end in zip(begins[WARM_UP:], ends[WARM_UP:], strict=True)]
    tenths = statistics.quantiles(ms, n=10, method="inclusive") if steps > 1 else ms * 9
    p20, p50, p80 = (round(tenths[tenth - 1], 3) for tenth in (2, 5, 8))
    losses = [round(loss, 4) for loss in result["losses"]]
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    measured = {
        "gpu": result["environment"].pop("gpu"),
        "driver": driver,
        **result["environment"],
        "commit": arguments.commit or output("git", "rev-parse", "HEAD"),
        "case": f"qlora {rows}x{length}",
        "impl": case,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "inside_ms": round(statistics.median(inside), 3),
        "tokens_per_s": round(rows * length / p50 * 1e3, 1),
        **{key: result[key] for key in ("peak_bytes", "base_bytes", "setup_peak_bytes")},
        "first_ms": round((ends[0] - begins[0]) * 1e3, 1),
        "losses": losses[:3] + losses[-1:],
        "own_kernels": result["own_kernels"],
        "patched": ops,
        "skipped": sum(1 for skip in report["skipped"] if not skip.get("benign")),
    }
    if case.startswith("sloth_ck"):
        kept = ("chosen", "reason", "note", "predicted_peak_bytes", "predicted_step_s", "plans")
        measured["checkpointing"] = {k: v for k, v in result["checkpointing"].items() if k in kept}
    return measured


def case_name(text: str) -> str:
    if text in (*CASES, "axolotl_ck") or re.fullmatch(r"sloth_ck:\d+(\.\d+)?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: allowed are {', '.join(CASES)}, sloth_ck:GIB, axolotl_ck")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", nargs="?", help="a Hugging Face checkpoint; --tiny makes its own")
    parser.add_argument("--cases", nargs="+", type=case_name, default=list(CASES), metavar="CASE")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help=f"measured ones, after {WARM_UP} of warm-up")
    parser.add_argument("--out", type=Path, help="JSON lines, added as the cases finish")
    parser.add_argument("--commit", help="recorded in each row, where the checkout has no git")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has Axolotl")
    parser.add_argument("--tiny", action="store_true", help="two small layers on the CPU")
    arguments = parser.parse_args()
    if arguments.directory is None and not arguments.tiny:
        parser.error("DIR: a Hugging Face checkpoint directory is needed, or --tiny")
    if min(arguments.batch, arguments.length, arguments.steps) < 1:
        parser.error("--batch, --length and --steps are at least 1")
    arguments.python = shutil.which(arguments.python) or parser.error(f"--python: no {arguments.python}")
    if arguments.tiny:
        arguments.batch, arguments.length = min(arguments.batch, 2), min(arguments.length, 16)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        make_site(site)
        directory = str(Path(arguments.directory).resolve()) if arguments.directory else f"{scratch}/tiny"
        if arguments.directory is None:
            code = f"import axolotl_step; axolotl_step.make_tiny({directory!r})"
            environment = child_environment(site, Path(scratch), tiny=True)
            subprocess.run([arguments.python, "-c", code], env=environment, cwd=scratch, check=True)
        for number, case in enumerate(arguments.cases):
            folder = Path(scratch) / f"case{number}"
            folder.mkdir()
            try:
                line = json.dumps(measure(case, arguments, directory, site, folder))
            except CaseError as error:
                print(f"{case}: failed: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            finally:
                shutil.rmtree(folder)
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as out:
                    out.write(line + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
