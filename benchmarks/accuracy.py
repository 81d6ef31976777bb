"""Whether training ends where it should: losses of a QLoRA run with sloth beside eager runs of other seeds.

    python benchmarks/accuracy.py MODEL_DIR TEXTS [--out rows.jsonl] [--steps 200] [--seeds 0 1 2] [--jobs N]

MODEL_DIR is a Hugging Face checkpoint (SmolLM2-135M-Instruct, say), TEXTS has one object a line with
"text", or "question" and "answer" (GSM8K). Everywhere the same: NF4 with double quantization, LoRA r=16,
alpha=32 on all seven projections, batches of 8 rows of 256 tokens packed from the texts, bf16 autocast,
AdamW with lr 2e-4 and 10 steps of linear warm-up. A seed fixes the adapters and the order of the rows. Each
seed runs eager and patched by `sloth_plugins.accelerate`.

The final loss is the mean over the last 20 steps, and the loss on 16 held-out batches. A row says which of
the patched runs, and whether their mean, lie within the eager runs' spread, from least to largest, and how
far a patched run is at most from the eager run of its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Else kernels.py beside this script would be taken for the package `kernels`, which transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

ROWS, TOKENS, HELD_OUT, TAIL, WARM_UP = 8, 256, 16, 20, 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def packed(texts: Path, tokenizer: Any) -> torch.Tensor:
    """The texts one after another, cut into rows: (rows, TOKENS) int64."""
    ids: list[int] = []
    for line in texts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row.get("text") or f"{row['question']}\n{row['answer']}"
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    count = len(ids) // TOKENS
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


def run(directory: Path, texts: Path, seed: int, patched: bool, steps: int) -> dict[str, Any]:
    """One training run; its row."""
    import transformers
    from peft import LoraConfig, get_peft_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )
    model.config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    rows = packed(texts, tokenizer).to(device)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)).train()
    report: dict[str, Any] = {}
    if patched:
        import sloth_plugins

        acceleration = sloth_plugins.accelerate(model)
        report = {"patched": len(acceleration.report.patched), "skipped": len(acceleration.report.skipped)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    held_out, rows = rows[: HELD_OUT * ROWS], rows[HELD_OUT * ROWS :]
    order = list(range(rows.shape[0]))
    random.Random(seed).shuffle(order)
    losses, started = [], time.perf_counter()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype):
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    for step in range(steps):
        chosen = [order[(step * ROWS + i) % len(order)] for i in range(ROWS)]
        loss = loss_of(rows[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - started
    with torch.no_grad():
        tests = [loss_of(held_out[i * ROWS : (i + 1) * ROWS]).item() for i in range(HELD_OUT)]
    return {
        "measurement": "training run",
        "impl": "sloth" if patched else "eager",
        "seed": seed,
        "steps": steps,
        "train_loss": torch.stack(losses[-TAIL:]).float().mean().item(),
        "held_out_loss": sum(tests) / len(tests),
        "seconds": round(seconds, 1),
        **report,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    """Each run in a process of its own, then the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the same device")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # seed:impl, in a child
    options = parser.parse_args()
    if options.only:
        seed, _, impl = options.only.partition(":")
        row = run(options.directory, options.texts, int(seed), impl == "sloth", options.steps)
        print("ROW " + json.dumps(row), flush=True)
        return

    def child(case: str) -> dict[str, Any]:
        command = [sys.executable, __file__, str(options.directory), str(options.texts), "--only", case]
        done = subprocess.run([*command, "--steps", str(options.steps)], capture_output=True, text=True)
        found = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if not found:
            raise SystemExit(f"{case} gave no row:\n{done.stderr[-2000:]}")
        print(found[0], flush=True)
        row: dict[str, Any] = json.loads(found[0])
        return row

    cases = [f"{seed}:{impl}" for impl in ("eager", "sloth") for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(child, cases))
    rows = [*runs]
    for key in ("train_loss", "held_out_loss"):
        eager, ours = ([row[key] for row in runs if row["impl"] == impl] for impl in ("eager", "sloth"))
        mean = sum(ours) / len(ours)
        spread: dict[str, Any] = {"eager": eager, "sloth": ours, "sloth_mean": mean}
        spread["within"] = [min(eager) <= value <= max(eager) for value in ours]
        spread["mean_within"] = min(eager) <= mean <= max(eager)
        spread["most_apart_of_one_seed"] = max(abs(x - y) for x, y in zip(eager, ours, strict=True))
        rows.append({"measurement": "spread", "of": key, **spread})
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
