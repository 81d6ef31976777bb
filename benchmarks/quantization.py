"""What `sloth quantize` gives: bytes, KL, perplexity and top-1 agreement on two kinds of text.

    python benchmarks/quantization.py MODEL_DIR CALIBRATION.jsonl HELD_OUT.jsonl --out results.jsonl

Checkpoints of several budgets are calibrated on CALIBRATION, and one on CALIBRATION and on Python's
documentation (half of the topics in `pydoc_data.topics`; the other half is held out). All are then loaded
from their files and measured on HELD_OUT and on the held-out documentation, which none was calibrated on.
Each line of the result is one checkpoint on one text.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import resource
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from sloth_plugins.quantization import Options, quantize
from sloth_plugins.quantization.run import evaluate_checkpoints

OTHER = "Python's documentation"
# Name, budget, block sizes, whether it is calibrated on both kinds of text.
CHECKPOINTS = (
    ("1.00", 1.0, (64,), False),
    ("1.05", 1.05, (64, 32), False),
    ("1.10", 1.1, (64, 32), False),
    ("1.20", 1.2, (64, 32), False),
    ("1.10, blocks of 64 only", 1.1, (64,), False),
    ("1.00, calibrated on both", 1.0, (64,), True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the result; default: its folder's")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--evaluation-samples", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        own = [
            line for line in arguments.calibration.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        other = [json.dumps(text) for text in topics[::2]]
        files = {"both": scratch / "both.jsonl", "other": scratch / "other.jsonl"}
        files["both"].write_text("\n".join([*own[: arguments.samples], *other]) + "\n", encoding="utf-8")
        files["other"].write_text("\n".join(map(json.dumps, topics[1::2])) + "\n", encoding="utf-8")
        made, facts = {}, {}
        for label, budget, block_sizes, both in CHECKPOINTS:
            result = quantize(
                arguments.model,
                scratch / f"{len(made)}",
                files["both"] if both else arguments.calibration,
                options=Options(
                    budget=budget, block_sizes=block_sizes, samples=arguments.samples * (1 + both)
                ),
                device=arguments.device,
            )
            made[label] = result.out
            facts[label] = {
                "block_sizes": list(block_sizes),
                "bytes": result.plan.total_bytes,
                "ratio": round(result.plan.ratio, 4),
                "expected_kl": result.plan.expected_kl,
                "measured_kl": result.plan.measured_kl,
                "seconds": round(result.seconds, 1),
                "peak_resident_bytes_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            print(label, facts[label], flush=True)
        figures = evaluate_checkpoints(
            arguments.model,
            made,
            {"like the calibration's": arguments.held_out, OTHER: files["other"]},
            evaluation_rows=arguments.evaluation_samples,
            device=arguments.device,
        )
        plan = result.plan
        facts["uniform NF4"] = {"bytes": plan.uniform_bytes, "ratio": 1.0}
        facts["original"] = {"bytes": sum(p.stat().st_size for p in arguments.model.glob("*.safetensors"))}
    about = {
        "measurement": "quantization",
        "model": arguments.name or arguments.model.name,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "calibration": f"{arguments.samples} rows of {arguments.calibration.name}",
        **{package: version(package) for package in ("torch", "transformers", "bitsandbytes")},
        "commit": commit,
    }
    with arguments.out.open("w", encoding="utf-8") as out:
        for text, kinds in figures.items():
            for label, own_figures in kinds.items():
                row = {**about, "text": text, "checkpoint": label, **facts[label], **own_figures}
                out.write(json.dumps(row) + "\n")
                print(json.dumps(row))


if __name__ == "__main__":
    main()
