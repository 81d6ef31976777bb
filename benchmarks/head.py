"""Time the loss of a language model's head, forward and backward, against its bare matmuls and its peers.

    python benchmarks/head.py [--out head.jsonl] [--cases frozen_128256] [--quick] [--commit HASH]

One JSON line per case and implementation (on stdout without --out), and a table at the end. 8,192 tokens of
width 4,096 in bf16, the vocabularies of Llama-3.1 and of Qwen3; the weight is frozen (two matmuls) or
trainable (three). Peers that can't be imported are left out: liger-kernel, cut-cross-entropy (whose
gradients are filtered, not exact) and `F.linear_cross_entropy` of torch 2.13. "log_probs" is our
linear_log_probs, whose backward computes the logits again: one more matmul, which `of_matmuls` counts against
it.

"grpo_128256" is what GRPO asks of a head: 4 rows of 4,096 tokens, a frozen weight, a temperature, weighted
log-probabilities with gradients, and entropies without. "trl" computes them of all logits, as TRL does
without its tiled head, and "trl_tiled" by that (both of the TRL that is installed); "sloth" is
linear_log_probs. "grpo_49152" is the same for SmolLM2-135M, whose hidden states are 576 wide.

A sample is the time by events of one forward and backward, launches and allocations included; the
implementations take turns. `peak_bytes` is what a call allocates at most beyond its inputs and gradients.
`max_rel_error` is that of the worst gradient, and `loss_rel_error` the loss's, against float64.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from sloth_plugins.numerics import relative_error  # noqa: E402

TOKENS, WIDTH, VOCABULARIES = 8192, 4096, (128_256, 151_936)
GRPO_ROWS, GRPO_TOKENS, TEMPERATURE = 4, 4096, 0.9
SMALL_VOCABULARY, SMALL_WIDTH = 49_152, 576  # SmolLM2-135M
TRUTH_TOKENS = 1024
Step = Callable[[], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]


def _sibling(name: str) -> Any:
    """A script next to this one; `import kernels` would find the folder of that name."""
    spec = importlib.util.spec_from_file_location(
        f"sloth_benchmarks_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a model of transformers does: float32 logits of a bf16 matmul."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def peers() -> dict[str, Callable[..., torch.Tensor]]:
    """Losses by name, as far as they can be imported here."""
    from sloth_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs

    found: dict[str, Callable[..., torch.Tensor]] = {
        "sloth": linear_cross_entropy,
        "log_probs": lambda *arguments: -linear_log_probs(*arguments).mean(),
        "eager": eager,
    }
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def liger(*arguments: torch.Tensor) -> torch.Tensor:
            result = LigerFusedLinearCrossEntropyFunction.apply(*arguments)
            return result[0] if isinstance(result, tuple) else result

        found["liger"] = liger
    except ImportError as reason:
        print(f"without Liger: {reason}", file=sys.stderr)
    try:
        import cut_cross_entropy

        found["cce"] = cut_cross_entropy.linear_cross_entropy
    except ImportError as reason:
        print(f"without cut_cross_entropy: {reason}", file=sys.stderr)
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = F.linear_cross_entropy
    return found


def grpo_peers(weights: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """-sum(weights * log-probabilities) by name, of hidden (B, S, H), with entropies computed beside them."""
    from sloth_kernels.linear_cross_entropy import linear_log_probs

    def ours(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found = linear_log_probs(hidden, weight, ids, temperature=TEMPERATURE, entropy=True)
        return -(found[0] * weights).sum()

    found: dict[str, Callable[..., torch.Tensor]] = {"sloth": ours}
    try:
        from trl.trainer import utils
    except ImportError as reason:
        print(f"without TRL: {reason}", file=sys.stderr)
        return found

    def full(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, weight)
        logits.div_(TEMPERATURE)
        log_probs = utils.selective_log_softmax(logits, ids)
        with torch.no_grad():
            utils.entropy_from_logits(logits)
        return -(log_probs * weights).sum()

    found["trl"] = full
    tiled = getattr(utils, "_ChunkedLogProbFunction", None)
    if tiled is None:
        print("without TRL's tiled head: this version has none", file=sys.stderr)
        return found

    def tiles(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        flat, wanted = hidden.flatten(0, 1), ("log_probs", "entropy")
        result = tiled.apply(flat, weight, None, ids.flatten(), TEMPERATURE, chunk, None, 1.0, wanted)
        return -(result[0] * weights.flatten()).sum()

    return found | {"trl_tiled": tiles}


def loss_step(
    function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...], *inputs: torch.Tensor
) -> Step:
    def step() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = function(*inputs)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    return step


def matmuls(hidden: torch.Tensor, weight: torch.Tensor, trainable: bool) -> Step:
    """The two or three matmuls alone, each in one piece."""

    @torch.no_grad()
    def step() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        logits = hidden @ weight.t()
        gradients = (logits @ weight,)
        return logits.view(-1)[0], (*gradients, logits.t() @ hidden) if trainable else gradients

    return step


@torch.no_grad()
def truth(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    trainable: bool,
    weights: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """-sum(weights * log-probabilities) and its gradients in float64, some tokens at a time."""
    h, w, shape = hidden.flatten(0, -2).double(), weight.double(), hidden.shape
    labels, weights = labels.flatten(), weights.flatten().double()
    loss = torch.zeros((), dtype=torch.float64, device=h.device)
    dh = torch.empty_like(h)
    dw = torch.zeros_like(w) if trainable else None
    for start in range(0, len(h), TRUTH_TOKENS):
        rows = slice(start, start + TRUTH_TOKENS)
        y = labels[rows, None]
        logarithms = (h[rows] @ w.t()).div_(temperature).log_softmax(1)
        loss -= (logarithms.gather(1, y)[:, 0] * weights[rows]).sum()
        d = logarithms.exp_()
        d.scatter_add_(1, y, torch.full_like(d[:, :1], -1.0))
        d *= weights[rows, None] / temperature
        torch.mm(d, w, out=dh[rows])
        if dw is not None:
            dw.addmm_(d.t(), h[rows])
    return loss, (dh.view(shape),) if dw is None else (dh.view(shape), dw)


def peak_bytes(step: Step) -> int:
    """What a call allocates at most, less the gradients that it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, gradients = step()
    torch.cuda.synchronize()
    kept = sum(g.numel() * g.element_size() for g in gradients)
    return torch.cuda.max_memory_allocated() - before - kept


def milliseconds(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def measure(
    vocabulary: int, width: int, trainable: bool, grpo: bool, samples: int, quantile: Any
) -> list[dict[str, Any]]:
    """The rows of one case, without what is the same for the whole run."""
    torch.manual_seed(0)
    make: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    rows_of = (GRPO_ROWS, GRPO_TOKENS) if grpo else (TOKENS,)
    hidden = torch.randn(*rows_of, width, **make).requires_grad_()
    weight = (torch.randn(vocabulary, width, **make) / width**0.5).requires_grad_(trainable)
    labels = torch.randint(0, vocabulary, rows_of, device="cuda")
    weights = torch.full(rows_of, 1 / labels.numel(), device="cuda")
    if grpo:  # advantages
        weights *= torch.randn(rows_of, device="cuda")
    leaves = (hidden, weight) if trainable else (hidden,)
    steps: dict[str, Step] = {"matmuls": matmuls(hidden, weight, trainable)}
    functions = grpo_peers(weights) if grpo else peers()
    steps |= {n: loss_step(f, leaves, hidden, weight, labels) for n, f in functions.items()}
    peaks: dict[str, int] = {}
    errors: dict[str, tuple[float, float]] = {}
    temperature = TEMPERATURE if grpo else 1.0
    exact_loss, exact = truth(hidden, weight, labels, trainable, weights, temperature)
    for name in list(steps):
        try:
            loss, gradients = steps[name]()  # compiles, too
            if name != "matmuls":
                worst = max(relative_error(g, e) for g, e in zip(gradients, exact, strict=True))
                errors[name] = relative_error(loss, exact_loss), worst
        except Exception as error:  # a peer that can't do this case
            print(f"without {name}: {type(error).__name__}: {error}", file=sys.stderr)
            del steps[name]
        loss = gradients = None
        torch.cuda.empty_cache()
    del exact, exact_loss
    torch.cuda.empty_cache()
    for name, step in steps.items():
        peaks[name] = peak_bytes(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(samples + 3):
        for name in sorted(steps, reverse=bool(turn % 2)):
            elapsed = milliseconds(steps[name])
            if turn >= 3:  # the first turns warm up the clocks and the allocator
                times[name].append(elapsed)
    bare = quantile(times["matmuls"], 0.5)
    rows = []
    for name, values in times.items():
        p20, p50, p80 = (quantile(values, q) for q in (0.2, 0.5, 0.8))
        loss_error, worst = errors.get(name, (None, None))
        rows.append(
            {
                "impl": name,
                "p20_us": round(p20 * 1e3, 1),
                "p50_us": round(p50 * 1e3, 1),
                "p80_us": round(p80 * 1e3, 1),
                "of_matmuls": round(p50 / bare, 4),
                "peak_bytes": peaks[name],
                "loss_rel_error": loss_error,
                "max_rel_error": worst,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'case':18} {'impl':10} {'p50 ms':>8} {'of matmuls':>10} {'peak GiB':>9}"
    lines = [f"{head} {'loss err':>9} {'worst':>9}"]
    for row in rows:
        errors = (row["loss_rel_error"], row["max_rel_error"])
        shown = " ".join(f"{'' if e is None else format(e, '.2e'):>9}" for e in errors)
        lines.append(
            f"{row['case']:18} {row['impl']:10} {row['p50_us'] / 1e3:8.2f} {row['of_matmuls']:10.3f} "
            f"{row['peak_bytes'] / 2**30:9.3f} {shown}"
        )
    return "\n".join(lines)


def main() -> int:
    cases = {
        f"{'trainable' if trainable else 'frozen'}_{vocabulary}": (vocabulary, WIDTH, trainable, False)
        for trainable in (False, True)
        for vocabulary in VOCABULARIES
    }
    cases["grpo_128256"] = (128_256, WIDTH, False, True)
    cases[f"grpo_{SMALL_VOCABULARY}"] = (SMALL_VOCABULARY, SMALL_WIDTH, False, True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON lines, written as the cases finish; else on stdout")
    parser.add_argument("--cases", nargs="+", default=list(cases), choices=list(cases))
    parser.add_argument("--quick", action="store_true", help="5 samples in place of 15")
    parser.add_argument("--commit", help="recorded in each row, where the checkout has no git")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    shared = _sibling("kernels")
    common = shared.environment(arguments.commit)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        out: Any = sys.stdout
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(arguments.out.open("w"))
        for name in arguments.cases:
            measured = measure(*cases[name], 5 if arguments.quick else 15, shared.quantile)
            torch.cuda.empty_cache()
            for row in measured:
                rows.append(
                    {**common, "measurement": "head", "case": name, "pass": "forward + backward", **row}
                )
                out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
    shown = sys.stderr if arguments.out is None else sys.stdout
    print(f"{common['gpu']}, torch {common['torch']}, triton {common['triton']}", file=shown)
    print(table(rows), file=shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
