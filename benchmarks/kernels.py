"""Time every kernel, forward and backward, against the bandwidth of a copy and against Liger, in one run.

    python benchmarks/kernels.py --out kernels.jsonl [--cases rms_norm swiglu] [--quick] [--commit HASH]

One JSON line per case, pass and implementation, and a table at the end. 8,192 tokens in bf16, in the shapes
of Llama-3.1-8B and Qwen3-8B. Liger is optional (`pip install liger-kernel`).

How a number comes about. A CUDA graph holds one call for each of several input sets, about a gigabyte of
inputs in all, many times the L2 cache, so that no call finds its data there; a sample is the time of one
replay, by events, divided by the calls. Replays of ours and of Liger's alternate. Before each, untimed,
every input and incoming gradient is restored, because some of Liger's kernels write their results over
them. The backward is `torch.autograd.grad` with the graph retained. `bytes` is what must move: each tensor
once, the same for both implementations; `share_of_copy` is bytes / p50 over the rate of a large copy (bytes
read and written), measured in this run. Errors are against the float64 reference on fewer tokens: the worst
output in the forward, the worst gradient in the backward.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from sloth_plugins.numerics import relative_error  # noqa: E402

Tensors = dict[str, torch.Tensor]
TOKENS = 8192
ACCURACY_TOKENS = 512
SEQUENCES = 4
EPS = 1e-6
DTYPE = torch.bfloat16
COPY_BYTES = 1 << 30
INPUT_BYTES = 1 << 30
DEVICE = "cuda"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def norm_inputs(
    tokens: int, *, width: int, heads: int = 0, bias: bool = False, residual: bool = False
) -> Tensors:
    """x (tokens, width), or (tokens, heads, width) for a norm over the head dim, with what goes with it."""
    shape = (tokens, heads, width) if heads else (tokens, width)
    inputs = {"x": normal(*shape)}
    if residual:
        inputs["residual"] = normal(*shape)
    inputs["weight"] = 1 + 0.1 * normal(width)
    if bias:
        inputs["bias"] = 0.1 * normal(width)
    return inputs


def rope_inputs(tokens: int, *, q_heads: int, k_heads: int, dim: int, norm: bool = False) -> Tensors:
    """q, k (B, H, S, D) as attention makes them: transposed views of (B, S, H, D); cos, sin (1, S, D)."""
    length = tokens // SEQUENCES
    inputs = {
        name: normal(SEQUENCES, length, heads, dim).transpose(1, 2)
        for name, heads in (("q", q_heads), ("k", k_heads))
    }
    if norm:
        inputs |= {name: 1 + 0.1 * normal(dim) for name in ("q_weight", "k_weight")}
    frequency = 500_000.0 ** (-torch.arange(0, dim, 2, device=DEVICE).double() / dim)
    angle = torch.arange(length, device=DEVICE).double()[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[None]
    return inputs | {"cos": angle.cos().to(DTYPE), "sin": angle.sin().to(DTYPE)}


def gated_inputs(tokens: int, *, width: int, packed: bool = False) -> Tensors:
    if packed:
        return {"gate_up": normal(tokens, 2 * width)}
    return {"gate": normal(tokens, width), "up": normal(tokens, width)}


def ours(module: str, name: str | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A kernel and its reference; imported late, so that a case can be listed before its file is written."""
    name = name or module

    def kernel(**arguments: Any) -> Any:
        return getattr(importlib.import_module(f"sloth_kernels.{module}"), name)(**arguments)

    def reference(**arguments: Any) -> Any:
        return getattr(importlib.import_module(f"sloth_kernels.{module}"), f"{name}_reference")(**arguments)

    return kernel, reference


def liger(module: str, function: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function)


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> Any:
    return liger("rms_norm", "LigerRMSNormFunction").apply(x, weight, EPS, 0.0, "llama", True)


def liger_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction").apply(
        x, residual, weight, EPS, 0.0, "llama"
    )


def liger_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    return liger("layer_norm", "LigerLayerNormFunction").apply(x, weight, bias, EPS)


def liger_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return liger("rope", "LigerRopeFunction").apply(q, k, cos, sin)


def liger_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Any:
    """Liger has no fused kernel: its norms and its rope one after another, as its Qwen3 patch runs them."""
    q = liger_rms_norm(q.transpose(1, 2), q_weight).transpose(1, 2)
    k = liger_rms_norm(k.transpose(1, 2), k_weight).transpose(1, 2)
    return liger_rope(q, k, cos, sin)


def liger_swiglu(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return liger("swiglu", "LigerSiLUMulFunction").apply(gate, up)


def liger_geglu(gate: torch.Tensor, up: torch.Tensor) -> Any:
    return liger("geglu", "LigerGELUMulFunction").apply(gate, up)


def liger_swiglu_packed(gate_up: torch.Tensor) -> Any:
    return liger("swiglu", "LigerFusedGateUpSiLUMulFunction").apply(gate_up)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel in one shape. `reads`: what the backward must read beside gradients (inputs, "output 1")."""

    name: str
    kernel: tuple[Callable[..., Any], Callable[..., Any]]
    liger: Callable[..., Any] | None
    inputs: Callable[..., Tensors]
    shape: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    reads: tuple[str, ...]


LLAMA_NORM = {"eps": EPS, "cast_before_weight": True}
QWEN_HEADS = {"q_heads": 32, "k_heads": 8, "dim": 128}
CASES: list[Case] = [
    *(
        Case(
            name=f"{name}_{what}",
            kernel=ours("rms_norm"),
            liger=liger_rms_norm,
            inputs=norm_inputs,
            shape=shape,
            settings=LLAMA_NORM,
            frozen=frozen,
            reads=("x", "weight"),
        )
        for name, shape in [
            ("rms_norm_4096", {"width": 4096}),
            ("rms_norm_32x128", {"width": 128, "heads": 32}),
        ]
        for what, frozen in [("frozen", ("weight",)), ("trainable", ())]
    ),
    *(
        Case(
            name=f"add_rms_norm_4096_{what}",
            kernel=ours("add_rms_norm"),
            liger=liger_add_rms_norm,
            inputs=norm_inputs,
            shape={"width": 4096, "residual": True},
            settings=LLAMA_NORM,
            frozen=frozen,
            reads=("output 1", "weight"),
        )
        for what, frozen in [("frozen", ("weight",)), ("trainable", ())]
    ),
    *(
        Case(
            name=f"layer_norm_4096_{what}",
            kernel=ours("layer_norm"),
            liger=liger_layer_norm,
            inputs=norm_inputs,
            shape={"width": 4096, "bias": True},
            settings={"eps": EPS},
            frozen=frozen,
            reads=("x", "weight"),
        )
        for what, frozen in [("frozen", ("weight", "bias")), ("trainable", ())]
    ),
    Case(
        name="rope_llama",
        kernel=ours("rope"),
        liger=liger_rope,
        inputs=rope_inputs,
        shape=QWEN_HEADS,
        frozen=("cos", "sin"),
        reads=("cos", "sin"),
    ),
    *(
        Case(
            name=f"qk_norm_rope_qwen3_{what}",
            kernel=ours("qk_norm_rope"),
            liger=liger_qk_norm_rope,
            inputs=rope_inputs,
            shape={**QWEN_HEADS, "norm": True},
            settings=LLAMA_NORM,
            frozen=frozen,
            reads=("q", "k", "q_weight", "k_weight", "cos", "sin"),
        )
        for what, frozen in [
            ("frozen", ("q_weight", "k_weight", "cos", "sin")),
            ("trainable", ("cos", "sin")),
        ]
    ),
    *(
        Case(
            name=f"{name}_{width}",
            kernel=ours("gated_activation"),
            liger=peer,
            inputs=gated_inputs,
            shape={"width": width},
            settings={"activation": activation},
            reads=("gate", "up"),
        )
        for name, activation, peer in [
            ("swiglu", "silu", liger_swiglu),
            ("geglu_tanh", "gelu_tanh", liger_geglu),
            ("geglu_erf", "gelu", None),
        ]
        for width in (14336, 12288)
    ),
    *(
        Case(
            name=f"swiglu_packed_{width}",
            kernel=ours("gated_activation", "gated_activation_packed"),
            liger=liger_swiglu_packed,
            inputs=gated_inputs,
            shape={"width": width, "packed": True},
            settings={"activation": "silu"},
            reads=("gate_up",),
        )
        for width in (14336, 12288)
    ),
]


def as_list(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def nbytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of distinct tensors: one gradient handed to two inputs counts once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


class Runner:
    """One implementation on a list of input sets: `forward(i)` and `backward(i)` on set i."""

    def __init__(self, function: Callable[..., Any], sets: list[Tensors], frozen: Sequence[str]) -> None:
        self.function = function
        self.sets = sets
        self.wanted = [name for name in sets[0] if name not in frozen]
        self.upstream: list[list[torch.Tensor]] = []
        self.pristine: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.outputs: list[list[torch.Tensor]] = []
        for tensors in sets:
            for name in self.wanted:
                tensors[name].requires_grad_()

    def prepare(self) -> None:
        """Draw the incoming gradients, and remember everything that a kernel might write over."""
        for i, tensors in enumerate(self.sets):
            saved = [(t.detach(), t.detach().clone()) for t in tensors.values()]
            outputs = self.forward(i)
            self.pristine += saved
            self.restore()
            upstream = [torch.randn_like(out) for out in outputs]
            self.upstream.append(upstream)
            self.pristine += [(t, t.clone()) for t in upstream]
            self.outputs.append([])
        self.restore()

    def forward(self, i: int) -> list[torch.Tensor]:
        return as_list(self.function(**self.sets[i]))

    def keep_outputs(self) -> None:
        self.outputs = [self.forward(i) for i in range(len(self.sets))]
        self.pristine += [(o.detach(), o.detach().clone()) for outputs in self.outputs for o in outputs]

    def backward(self, i: int) -> list[torch.Tensor]:
        wanted = [self.sets[i][name] for name in self.wanted]
        return list(torch.autograd.grad(self.outputs[i], wanted, self.upstream[i], retain_graph=True))

    def restore(self) -> None:
        # .data: the version counter must not tell autograd, which would refuse the retained graph.
        for tensor, value in self.pristine:
            tensor.data.copy_(value)

    def captured(self, step: Callable[[int], list[torch.Tensor]]) -> Callable[[], None]:
        """One call a set, as one graph; the outputs stay apart, so that none is overwritten in cache."""
        for i in range(2):
            step(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = [step(i) for i in range(len(self.sets))]

        def replay(_kept: Any = kept) -> None:
            graph.replay()

        return replay

    def peak_bytes(self, step: Callable[[int], list[torch.Tensor]]) -> int:
        """What a call allocates at most, its results included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = step(0)
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before


def sample(runners: dict[str, Runner], passes: str, repeats: int) -> dict[str, list[float]]:
    """Microseconds a call, `repeats` samples for each implementation, taken in turns."""
    replays = {name: runner.captured(getattr(runner, passes)) for name, runner in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(repeats + 3):
        for name in sorted(runners, reverse=bool(turn % 2)):
            runner = runners[name]
            # Not waited for: the device is still at it when the graph is launched, which hides the launch.
            runner.restore()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replays[name]()
            end.record()
            end.synchronize()
            # The first turns warm up the clocks and the graph.
            if turn >= 3:
                times[name].append(start.elapsed_time(end) * 1e3 / len(runner.sets))
    return times


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def copy_rate(repeats: int) -> float:
    """Bytes read and written per second by a large device copy."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * COPY_BYTES / quantile(times[3:], 0.5)


def errors(case: Case, function: Callable[..., Any]) -> dict[str, float]:
    """The worst relative error of the outputs ("forward") and gradients ("backward") against float64."""
    torch.manual_seed(1)
    inputs = case.inputs(ACCURACY_TOKENS, **case.shape)
    exact = Runner(
        lambda **a: case.kernel[1](**a, **case.settings),
        [{name: t.double() for name, t in inputs.items()}],
        case.frozen,
    )
    exact.prepare()
    exact.keep_outputs()
    got = Runner(function, [{name: t.clone() for name, t in inputs.items()}], case.frozen)
    got.prepare()
    got.outputs = [got.forward(0)]
    outputs = [o.detach().clone() for o in got.outputs[0]]
    # The same gradients for both, representable in the kernel's dtype.
    got.upstream = [[u.to(o.dtype) for u, o in zip(exact.upstream[0], outputs, strict=True)]]
    exact.upstream = [[u.double() for u in got.upstream[0]]]
    gradients = exact.backward(0)
    pairs = zip(got.backward(0), gradients, strict=True)
    return {
        "forward": max(relative_error(o, e) for o, e in zip(outputs, exact.outputs[0], strict=True)),
        "backward": max(relative_error(g, e) for g, e in pairs),
    }


def must_move(case: Case, runner: Runner) -> dict[str, int]:
    inputs, outputs = runner.sets[0], runner.outputs[0]
    named = {**inputs, **{f"output {i}": out for i, out in enumerate(outputs)}}
    return {
        "forward": nbytes([*inputs.values(), *outputs]),
        "backward": nbytes([*runner.upstream[0], *(named[name] for name in case.reads), *runner.backward(0)]),
    }


def measure(case: Case, *, repeats: int, with_liger: bool) -> list[dict[str, Any]]:
    """The rows of one case, without what is the same for the whole run."""
    torch.manual_seed(0)
    functions: dict[str, Callable[..., Any]] = {"sloth": lambda **a: case.kernel[0](**a, **case.settings)}
    if with_liger and case.liger is not None:
        functions["liger"] = case.liger
    first = case.inputs(TOKENS, **case.shape)
    count = max(4, min(16, -(-INPUT_BYTES // nbytes(list(first.values())))))
    sets = [first, *(case.inputs(TOKENS, **case.shape) for _ in range(count - 1))]
    runners: dict[str, Runner] = {}
    for name, function in functions.items():
        # Detached aliases: the implementations share memory, each with leaves of its own.
        runner = Runner(function, [{k: t.detach() for k, t in s.items()} for s in sets], case.frozen)
        runner.prepare()
        runners[name] = runner
    peak = {(name, "forward"): r.peak_bytes(r.forward) for name, r in runners.items()}
    times = {"forward": sample(runners, "forward", repeats)}
    for runner in runners.values():
        runner.restore()
        runner.keep_outputs()
    moved = must_move(case, runners["sloth"])
    for name, runner in runners.items():
        runner.restore()
        peak[name, "backward"] = runner.peak_bytes(runner.backward)
    times["backward"] = sample(runners, "backward", repeats)
    rows = []
    for name, function in functions.items():
        error = errors(case, function)
        for passes in ("forward", "backward"):
            p20, p50, p80 = (round(quantile(times[passes][name], q), 3) for q in (0.2, 0.5, 0.8))
            rows.append(
                {
                    "case": case.name,
                    "pass": passes,
                    "impl": name,
                    "p20_us": p20,
                    "p50_us": p50,
                    "p80_us": p80,
                    "bytes": moved[passes],
                    "peak_bytes": peak[name, passes],
                    "max_rel_error": error[passes],
                    "input_sets": count,
                }
            )
    return rows


def environment(commit: str | None) -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit or output("git", "rev-parse", "HEAD"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'case':30} {'pass':8} {'impl':6} {'p20 us':>9} {'p50 us':>9} {'p80 us':>9}"
    lines = [head + f" {'of copy':>8} {'peak MB':>9} {'error':>9}"]
    for row in rows:
        start = f"{row['case']:30} {row['pass']:8} {row['impl']:6}"
        times = " ".join(f"{row[name]:9.1f}" for name in ("p20_us", "p50_us", "p80_us"))
        end = f"{row['share_of_copy']:8.1%} {row['peak_bytes'] / 1e6:9.1f} {row['max_rel_error']:9.2e}"
        lines.append(f"{start} {times} {end}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, written as the cases finish")
    parser.add_argument(
        "--cases", nargs="+", default=[], help="only cases whose name starts with one of these"
    )
    parser.add_argument("--quick", action="store_true", help="10 samples in place of 50")
    parser.add_argument("--commit", help="recorded in each row, where the checkout has no git")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    chosen = [c for c in CASES if not arguments.cases or c.name.startswith(tuple(arguments.cases))]
    if arguments.list:
        print("\n".join(c.name for c in chosen))
        return 0
    if not chosen:
        parser.error(f"no case starts with any of {arguments.cases}; --list shows them")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    try:
        importlib.import_module("liger_kernel.ops.rms_norm")
        with_liger = True
    except ImportError as reason:
        with_liger = False
        print(f"without Liger: {reason}", file=sys.stderr)
    repeats = 10 if arguments.quick else 50
    common = environment(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    # Autograd runs a backward on the stream of its forward, and the default stream cannot be captured.
    with torch.cuda.stream(torch.cuda.Stream()), arguments.out.open("w") as out:
        rate = copy_rate(repeats)
        for case in chosen:
            try:
                measured = measure(case, repeats=repeats, with_liger=with_liger)
            except Exception as error:
                failures.append(f"{case.name}: {type(error).__name__}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            finally:
                torch.cuda.empty_cache()
            for row in measured:
                share = row["bytes"] / (row["p50_us"] * 1e-6) / rate
                row |= {"share_of_copy": round(share, 4), "copy_bytes_per_s": round(rate)}
                rows.append({**common, **row})
                out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
    print(f"{common['gpu']}, copy {rate / 1e12:.2f} TB/s, torch {common['torch']}, triton {common['triton']}")
    print(table(rows))
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
