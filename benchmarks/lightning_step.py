"""One QLoRA training step in Lightning's Trainer, with strategy "sloth" and without, and without Lightning.

    python benchmarks/lightning_step.py DIR [--out rows.jsonl] [--cases sloth plain] [--commit HASH]

DIR is a Hugging Face checkpoint directory; the figures in `results/` are of random weights in the shapes of
Llama-3.1-8B. Everywhere the same: NF4 with double quantization, LoRA r=16 and alpha=16 without dropout on all
seven projections, batch 2 x 2048 of random tokens, bf16 autocast, fused AdamW with lr 1e-4, no recomputation,
3 steps of warm-up, then `--steps` (8) measured ones. "plain" cases are prepared as PEFT says
(`prepare_model_for_kbit_training`), "sloth" cases are not, for the kernels of those take the model as loaded.

| case | loop | model |
|---|---|---|
| `sloth` | Trainer(strategy="sloth", precision="bf16-mixed") | as above |
| `plain` | Trainer(strategy="auto", precision="bf16-mixed") | as above |
| `loop_sloth` | a loop without Lightning | patched by `sloth_plugins.accelerate` |
| `loop_plain` | the same loop | as above |

A step's time is the wall clock between two device synchronisations, from `on_train_batch_start` to
`on_train_batch_end`: forward, backward, optimizer and what Lightning does around them. The batch is on the
device before the clock starts, in the loop too; drawing it is not timed. Lightning drops the gradients
just before the backward and the loop just after the optimizer's step, so Lightning's forward holds them too.
Each case runs in a process of its own, so that none finds another one's memory or warm caches. `peak_bytes`
is what was allocated at most in the steps, the first one included.

`--tiny` needs no GPU: two small layers that the script makes itself, to see that it runs; its times say
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Else kernels.py beside this script would be taken for the package `kernels`, which transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "adapters" / "lightning")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402

from sloth_plugins.figures import peak_bytes  # noqa: E402

CASES = ("sloth", "plain", "loop_sloth", "loop_plain")
WARM_UP = 3
RANK = ALPHA = 16
LEARNING_RATE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKEN_IDS = 256  # of a byte-level tokenizer, and of every larger one
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=TOKEN_IDS,
)


def load(directory: str, device: torch.device, *, prepared: bool) -> Any:
    """The quantized model with its adapters, in training mode on `device`."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map={"": "cpu" if device.type == "cpu" else device.index},
        attn_implementation="sdpa",
        quantization_config=quantization,
    )
    model.config.use_cache = False
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora).train()


def optimizer_for(model: Any, device: torch.device) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=device.type == "cuda")


def batches(count: int, rows: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, TOKEN_IDS, (rows, length), generator=generator) for _ in range(count)]


class Clock:
    """Times steps between two synchronisations, and holds their losses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.losses: list[torch.Tensor] = []
        self._began = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def begin(self) -> None:
        self._began = self._now()

    def end(self) -> None:
        self.seconds.append(self._now() - self._began)

    def forget_memory(self) -> int:
        """Before the first step: bytes allocated by the model and the optimizer; peaks count from here."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def in_trainer(model: Any, strategy: str, clock: Clock, data: list[torch.Tensor]) -> tuple[Any, int]:
    """One epoch of `data` in Lightning's Trainer; returns the reports and the bytes before the first step."""
    import lightning
    import sloth_lightning  # noqa: F401  names the strategy

    class FineTune(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            clock.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_for(self.model, clock.device)

    class Timer(lightning.Callback):
        base_bytes = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.base_bytes = clock.forget_memory()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            clock.begin()

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            clock.end()

    timer = Timer()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, no validation
        trainer = lightning.Trainer(
            strategy=strategy,
            precision="bf16-mixed",
            accelerator="gpu" if clock.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[timer],
            default_root_dir=folder,
        )
        trainer.fit(FineTune(), torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return [a.report for a in getattr(trainer.strategy, "accelerations", [])], timer.base_bytes


def in_loop(model: Any, patched: bool, clock: Clock, data: list[torch.Tensor]) -> tuple[Any, int]:
    """The same without Lightning."""
    import sloth_plugins

    reports = [sloth_plugins.accelerate(model).report] if patched else []
    for report in reports:
        print(report, file=sys.stderr)
    optimizer = optimizer_for(model, clock.device)
    base_bytes = clock.forget_memory()
    for batch in data:
        ids = batch.to(clock.device)
        clock.begin()
        with torch.autocast(clock.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        clock.losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.end()
    return reports, base_bytes


def measure(case: str, directory: str, rows: int, length: int, steps: int, tiny: bool) -> dict[str, Any]:
    """The figures of one case, in this process."""
    device = torch.device("cpu") if tiny else torch.device("cuda", 0)
    model = load(directory, device, prepared="plain" in case)
    clock, data = Clock(device), batches(WARM_UP + steps, rows, length)
    if case.startswith("loop_"):
        reports, base_bytes = in_loop(model, case == "loop_sloth", clock, data)
    else:
        reports, base_bytes = in_trainer(model, "sloth" if case == "sloth" else "auto", clock, data)
    assert len(clock.seconds) == len(clock.losses) == len(data), "a step was not timed"
    ms = torch.tensor(clock.seconds[WARM_UP:], dtype=torch.float64) * 1e3
    p20, p50, p80 = (round(float(ms.quantile(q)), 3) for q in (0.2, 0.5, 0.8))
    losses = [round(loss.item(), 4) for loss in clock.losses]
    ops: dict[str, int] = {}
    for report in reports:
        for row in report.patched:
            ops[row.op] = ops.get(row.op, 0) + 1
    return {
        "case": f"qlora {rows}x{length}",
        "impl": case,
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "tokens_per_s": round(rows * length / p50 * 1e3, 1),
        "peak_bytes": peak_bytes([] if tiny else [device]),
        "base_bytes": base_bytes,
        "first_ms": round(clock.seconds[0] * 1e3, 1),
        "losses": losses[:3] + losses[-1:],
        "patched": ops,
        "skipped": sum(1 for report in reports for skip in report.skipped if not skip.benign),
    }


def environment(commit: str | None) -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            return done.stdout.strip() or "unknown"
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("triton", "transformers", "peft", "bitsandbytes", "lightning"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
        "torch": torch.__version__,
        **versions,
        "commit": commit or output("git", "rev-parse", "HEAD"),
    }


def make_tiny(folder: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.bfloat16).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", nargs="?", help="a Hugging Face checkpoint; --tiny makes its own")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help=f"measured ones, after {WARM_UP} of warm-up")
    parser.add_argument("--out", type=Path, help="JSON lines, added as the cases finish")
    parser.add_argument("--commit", help="recorded in each row, where the checkout has no git")
    parser.add_argument("--tiny", action="store_true", help="two small layers on the CPU")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # one case, in this process
    arguments = parser.parse_args()
    if arguments.directory is None and not arguments.tiny:
        parser.error("DIR: a Hugging Face checkpoint directory is needed, or --tiny")
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("no CUDA GPU here; --tiny runs without one")
    if arguments.tiny:
        arguments.batch, arguments.length = min(arguments.batch, 2), min(arguments.length, 16)
    if arguments.inside:
        (case,) = arguments.cases
        shape = (arguments.batch, arguments.length, arguments.steps)
        row = {**environment(arguments.commit), **measure(case, arguments.directory, *shape, arguments.tiny)}
        print("ROW " + json.dumps(row), flush=True)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.directory
        if directory is None:
            make_tiny(directory := folder)
        for case in arguments.cases:
            command = [sys.executable, __file__, directory, "--inside", "--cases", case]
            for name in ("batch", "length", "steps"):
                command += [f"--{name}", str(getattr(arguments, name))]
            command += ["--tiny"] * arguments.tiny
            command += ["--commit", arguments.commit] if arguments.commit else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if done.returncode or len(lines) != 1:
                print(f"{case}: failed\n{done.stdout}", file=sys.stderr, flush=True)
                failed += 1
                continue
            print(lines[0], flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as out:
                    out.write(lines[0] + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
