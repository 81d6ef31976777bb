"""The gate for kernels, ours and third parties': `check_kernel(spec)` holds one to its op's reference.

    from sloth_plugins.testing import check_kernel

    def test_my_kernel():
        check_kernel(spec)

Forward and every gradient are compared by the contract of `sloth_plugins.numerics`, on odd shapes,
non-contiguous inputs, large magnitudes, frozen weights and an empty batch.
The signatures are in docs/kernels.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from sloth_plugins.numerics import Comparison, relative_error
from sloth_plugins.specs import FLOATS, KernelSpec

Tensors = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call of an op: its tensors by parameter name, its options, and the tensors without a gradient."""

    name: str
    tensors: Tensors
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Makes the random tensors of one dtype on one device, the same ones at every run."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator, device="cpu") * scale
        return values.to(self.device, dtype or self.dtype)

    def weight(self, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self(width, dtype=dtype) * 0.5 + 1

    def sliced(self, *shape: int) -> torch.Tensor:
        """A slice of a wider buffer."""
        *outer, width = shape
        return self(*outer, 2 * width + 3)[..., 1 : width + 1]

    def swapped(self, *shape: int) -> torch.Tensor:
        """The two dims before the last one are in each other's place in memory, as in an attention."""
        *outer, a, b, width = shape
        return self(*outer, b, a, width).transpose(-3, -2)

    def angles(self, batch: int, steps: int, columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """cos and sin of random angles; the columns differ, so that reading the wrong one shows."""
        angles = torch.rand(batch, steps, columns, generator=self.generator) * 6.3
        return {"cos": angles.cos().to(self.device, dtype), "sin": angles.sin().to(self.device, dtype)}


def _norm_inputs(make: _Maker) -> Iterator[tuple[str, torch.Tensor]]:
    yield "rows", make(7, 96)
    yield "an odd width", make(2, 3, 33)
    yield "one row", make(1, 130)
    yield "a slice of a buffer", make.sliced(3, 5, 48)
    yield "heads before tokens", make.swapped(2, 3, 4, 32)
    yield "every second column", make(5, 64)[:, ::2]
    yield "large", make(6, 64, scale=1e3)
    yield "small", make(6, 64, scale=1e-2)
    yield "empty", make(0, 64)


def _rms_norm(make: _Maker) -> Iterator[Sample]:
    llama: Mapping[str, Any] = {"eps": 1e-6, "cast_before_weight": True}
    gemma: Mapping[str, Any] = {"eps": 1e-5, "offset": 1.0}
    for name, x in _norm_inputs(make):
        for which, options in (("Llama", llama), ("Gemma", gemma)):
            tensors = {"x": x, "weight": make.weight(x.shape[-1])}
            yield Sample(name=f"{name}, {which}", tensors=tensors, options=options)
    x, weight = make(5, 40), make.weight(40)
    yield Sample(name="a large eps", tensors={"x": x, "weight": weight}, options={"eps": 0.5})
    yield Sample(
        name="frozen weight", tensors={"x": x, "weight": weight}, options=llama, frozen=frozenset({"weight"})
    )
    yield Sample(name="frozen x", tensors={"x": x, "weight": weight}, options=llama, frozen=frozenset({"x"}))
    yield Sample(name="no weight", tensors={"x": x, "weight": None}, options={"eps": 1e-6})
    single = make.weight(40, torch.float32)
    for options in (llama, gemma, {**llama, "out_dtype": x.dtype}, {**gemma, "out_dtype": torch.float32}):
        yield Sample(name="float32 weight", tensors={"x": x, "weight": single}, options=options)


def _add_rms_norm(make: _Maker) -> Iterator[Sample]:
    for sample in _rms_norm(make):
        x = sample.tensors["x"]
        assert x is not None
        tensors = {"x": x, "residual": make(*x.shape), "weight": sample.tensors["weight"]}
        yield Sample(name=sample.name, tensors=tensors, options=sample.options, frozen=sample.frozen)
    tensors = {"x": make(5, 40), "residual": make(5, 40, dtype=torch.float32), "weight": make.weight(40)}
    yield Sample(name="float32 residual", tensors=tensors, options={"eps": 1e-6})


def _layer_norm(make: _Maker) -> Iterator[Sample]:
    for name, x in _norm_inputs(make):
        width = x.shape[-1]
        tensors = {"x": x, "weight": make.weight(width), "bias": make(width)}
        yield Sample(name=name, tensors=tensors, options={"eps": 1e-5})
    x, weight, bias = make(5, 40), make.weight(40), make(40)
    for name, w, b in (("no bias", weight, None), ("no weight", None, bias), ("neither", None, None)):
        yield Sample(name=name, tensors={"x": x, "weight": w, "bias": b}, options={"eps": 1e-5})
    tensors = {"x": x, "weight": weight, "bias": bias}
    yield Sample(name="a large eps", tensors=tensors, options={"eps": 0.5})
    for frozen in (("weight",), ("bias",), ("weight", "bias")):
        yield Sample(
            name=f"frozen {frozen}", tensors=tensors, options={"eps": 1e-5}, frozen=frozenset(frozen)
        )
    single = {"x": x, "weight": make.weight(40, torch.float32), "bias": make(40, dtype=torch.float32)}
    yield Sample(name="float32 weights", tensors=single, options={"eps": 1e-5})
    yield Sample(name="float32 result", tensors=single, options={"eps": 1e-5, "out_dtype": torch.float32})


def _gated_mlp(make: _Maker) -> Iterator[Sample]:
    for activation in ("silu", "gelu_tanh", "gelu"):
        options = {"activation": activation}
        buffer = make(3, 5, 66)
        for name, gate, up in (
            ("rows", make(7, 96), make(7, 96)),
            ("an odd width", make(2, 3, 33), make(2, 3, 33)),
            ("halves of a buffer", buffer[..., :33], buffer[..., 33:]),
            ("swapped", make.swapped(2, 3, 4, 16), make(2, 3, 4, 16)),
            ("large", make(4, 40, scale=30.0), make(4, 40, scale=30.0)),
            ("empty", make(0, 32), make(0, 32)),
        ):
            yield Sample(name=f"{name}, {activation}", tensors={"gate": gate, "up": up}, options=options)
        for name, both in (("packed", make(5, 66)), ("packed slice", make.sliced(2, 3, 34))):
            yield Sample(name=f"{name}, {activation}", tensors={"gate": both, "up": None}, options=options)


def _rope(make: _Maker) -> Iterator[Sample]:
    for first, layout in enumerate(("half", "interleaved", "interleaved_repeat")):
        cases = (
            ("heads first", 1, make(2, 4, 5, 16), make(2, 2, 5, 16), 2, 16),
            ("tokens first", 2, make(2, 5, 4, 16), make(2, 5, 1, 16), 2, 16),
            ("partial", 1, make(1, 3, 7, 20), make(1, 3, 7, 20), 1, 12),
            ("one table for all", 1, make(2, 2, 3, 8), make(2, 1, 3, 8), 1, 8),
            ("as an attention has it", 1, make.swapped(2, 4, 5, 16), make.swapped(2, 2, 5, 16), 2, 16),
            ("a slice of q, k, v", 2, make.sliced(2, 3, 4, 8), make.sliced(2, 3, 2, 8), 2, 8),
            ("large", 1, make(2, 2, 3, 8, scale=1e3), make(2, 1, 3, 8, scale=1e3), 2, 8),
            ("no batch", 1, make(0, 2, 3, 8), make(0, 1, 3, 8), 1, 8),
        )
        for index, (name, unsqueeze_dim, q, k, batch, columns) in enumerate(cases, first):
            table, options = (make.dtype, {}) if index % 2 else (torch.float32, {"out_dtype": make.dtype})
            yield Sample(
                name=f"{name}, {layout}, {_short(table)} tables",
                tensors={"q": q, "k": k, **make.angles(batch, q.shape[3 - unsqueeze_dim], columns, table)},
                options={"layout": layout, "unsqueeze_dim": unsqueeze_dim, **options},
                frozen=frozenset({"cos", "sin"}),
            )
    promoted = make.angles(2, 3, 8, torch.float32)
    tensors = {"q": make(2, 2, 3, 8), "k": make(2, 1, 3, 8), **promoted}
    yield Sample(name="promoted", tensors=tensors, options={}, frozen=frozenset({"cos", "sin"}))


def _qk_norm_rope(make: _Maker) -> Iterator[Sample]:
    llama: Mapping[str, Any] = {"eps": 1e-6, "cast_before_weight": True}
    gemma: Mapping[str, Any] = {"eps": 1e-5, "offset": 1.0}
    last: Sample | None = None
    for index, sample in enumerate(_rope(make)):
        q = sample.tensors["q"]
        assert q is not None
        weights = {f"{which}_weight": make.weight(q.shape[3]) for which in "qk"}
        options = {**sample.options, **(llama if index % 2 else gemma)}
        frozen = sample.frozen
        last = Sample(name=sample.name, tensors={**sample.tensors, **weights}, options=options, frozen=frozen)
        yield last
    assert last is not None
    for names in (("q_weight",), ("k_weight",), ("q_weight", "k_weight"), ("q", "k")):
        frozen = last.frozen | set(names)
        yield Sample(name=f"frozen {names}", tensors=last.tensors, options=last.options, frozen=frozen)
    yield Sample(name="a large eps", tensors=last.tensors, options={"eps": 0.5}, frozen=last.frozen)


def _head_inputs(make: _Maker) -> Iterator[tuple[str, Tensors, torch.Tensor]]:
    """(name, hidden, weight and bias, ids of single classes)."""
    for name, hidden, classes in (
        ("rows", make(24, 24), 203),
        ("a batch", make(3, 7, 16), 64),
        ("one row", make(1, 33), 130),
        ("several blocks of classes", make(6, 8), 4099),
        ("a slice of a buffer", make.sliced(3, 7, 16), 96),
        ("large", make(20, 16, scale=1e2), 96),
        ("no tokens", make(0, 16), 32),
    ):
        width = hidden.shape[-1]
        weight = make(classes, width, scale=2 * width**-0.5)
        ids = torch.randint(0, classes, hidden.shape[:-1], generator=make.generator).to(make.device)
        yield name, {"hidden": hidden, "weight": weight, "bias": make(classes)}, ids


def _linear_cross_entropy(make: _Maker) -> Iterator[Sample]:
    last: tuple[Tensors, torch.Tensor] | None = None
    for index, (name, tensors, ids) in enumerate(_head_inputs(make)):
        labels = ids.clone()
        labels.view(-1)[2::3] = -100
        softcap, smoothing = (3.0, 0.1) if index % 2 else (None, 0.0)
        options: dict[str, Any] = dict(labels=labels, softcap=softcap, label_smoothing=smoothing)
        for reduction in ("sum", "none") if len(labels) != 1 else ("none",):  # of one, the sum is luck
            given = {**options, "reduction": reduction}
            yield Sample(name=f"{name}, {reduction}", tensors=tensors, options=given)
        if index == 0:
            last = tensors, labels
    assert last is not None
    tensors, labels = last
    for more in (
        dict(scale=0.25),
        dict(ignore_index=int(labels[0]), reduction="none"),
        dict(label_smoothing=1.0),
    ):
        yield Sample(name=str(more), tensors=tensors, options={"labels": labels.clamp_min(0), **more})
    for frozen in (("weight", "bias"), ("hidden",)):
        options = dict(labels=labels)
        yield Sample(name=f"frozen {frozen}", tensors=tensors, options=options, frozen=frozenset(frozen))
    yield Sample(name="no bias", tensors={**tensors, "bias": None}, options={"labels": labels})


def _linear_log_probs(make: _Maker) -> Iterator[Sample]:
    for index, (name, tensors, ids) in enumerate(_head_inputs(make)):
        options = {"ids": ids, **(dict(softcap=3.0, scale=1.5) if index % 2 else {})}
        yield Sample(name=name, tensors=tensors, options=options)
        frozen = frozenset({"weight", "bias"})
        yield Sample(name=f"{name}, frozen weight", tensors=tensors, options=options, frozen=frozen)
        yield Sample(name=f"{name}, no bias", tensors={**tensors, "bias": None}, options=options)


# What our references take beyond the signatures of docs/kernels.md; no patch passes it.
_BEYOND = frozenset({"z_loss", "num_items", "logits_dtype", "temperature", "entropy", "top1"})
SAMPLES: Mapping[str, Callable[[_Maker], Iterable[Sample]]] = MappingProxyType(
    {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "layer_norm": _layer_norm,
        "gated_mlp": _gated_mlp,
        "rope": _rope,
        "qk_norm_rope": _qk_norm_rope,
        "linear_cross_entropy": _linear_cross_entropy,
        "linear_log_probs": _linear_log_probs,
    }
)


def check_kernel(
    spec: KernelSpec, *, device: torch.device | str | None = None, dtypes: Iterable[torch.dtype] | None = None
) -> list[Comparison]:
    """Hold a kernel to its op's reference, on every sample of the op, in outputs and gradients.

    Args:
        spec: the kernel; its op is one of `SAMPLES`.
        device: where to run; by default a GPU where there is one and the kernel takes it, else what it takes.
        dtypes: by default those of float32, float16 and bfloat16 that the kernel takes. (Triton's interpreter
            computes wrongly in bfloat16, so on a CPU a Triton kernel is checked in the other two.)

    Returns:
        Every comparison that was made, all of them passed.

    Raises:
        AssertionError: lists what fell short: accuracy, dtype, shape, a missing gradient, an input that was
            written over, an error.
        ValueError: for an op without samples, no dtype, and a kernel that can't run on this machine.
    """
    if spec.op not in SAMPLES:
        raise ValueError(f"op={spec.op!r}: check_kernel has samples for {', '.join(SAMPLES)}")
    if (reason := spec.unavailable()) is not None:
        raise ValueError(f"kernel {spec.name!r} can't be checked on this machine: {reason}")
    device = torch.device(device) if device is not None else _default_device(spec)
    if device.type not in spec.device_types:
        raise ValueError(
            f"device={str(device)!r}: kernel {spec.name!r} runs on {', '.join(sorted(spec.device_types))}"
        )
    interpreted = spec.backend == "triton" and device.type == "cpu"
    chosen = list(dtypes) if dtypes is not None else sorted(spec.dtypes & FLOATS, key=str)
    if dtypes is None and interpreted:
        chosen = [dtype for dtype in chosen if dtype != torch.bfloat16]
    if not chosen:
        raise ValueError(f"dtypes: kernel {spec.name!r} is to be checked in none")
    reference = _reference(spec)
    comparisons: list[Comparison] = []
    failures = _signature_failures(spec.function, reference)
    for dtype in chosen:
        make = _Maker(device=device, dtype=dtype, generator=torch.Generator().manual_seed(11))
        for sample in SAMPLES[spec.op](make):
            where = f"{_short(dtype)}, {sample.name}"
            try:
                found = list(_compare(spec.function, reference, sample))
            except Exception as error:  # one failing sample must not hide the others
                failures.append(f"{where}: {type(error).__name__}: {error}")
                continue
            for item in found:
                if isinstance(item, str):
                    failures.append(f"{where}: {item}")
                    continue
                item = Comparison(
                    tensor=f"{where}, {item.tensor}", error=item.error, eager_error=item.eager_error
                )
                comparisons.append(item)
                if not item.passed:
                    failures.append(str(item))
    if failures:
        listed = "\n  ".join(failures[:40])
        more = f"\n  and {len(failures) - 40} more" if len(failures) > 40 else ""
        raise AssertionError(
            f"kernel {spec.name!r} ({spec.op}) falls short in {len(failures)} points:\n  {listed}{more}"
        )
    return comparisons


def _default_device(spec: KernelSpec) -> torch.device:
    if "cuda" in spec.device_types and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu" if "cpu" in spec.device_types else min(spec.device_types))


def _reference(spec: KernelSpec) -> Callable[..., Any]:
    """The built-in reference of the op: a third party's own could be wrong in the same way as its kernel."""
    from sloth_kernels.plugin import sloth_register_kernels

    built_in = (k.reference for k in sloth_register_kernels() if k.op == spec.op and k.backend == "torch")
    return next(built_in, spec.reference)


def _signature_failures(function: Callable[..., Any], reference: Callable[..., Any]) -> list[str]:
    """Arguments of the op that the kernel does not take by the same name."""
    taken = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return []
    return [
        f"it takes no argument {name!r}"
        for name in inspect.signature(reference).parameters
        if name not in taken and name not in _BEYOND
    ]


def _compare(
    kernel: Callable[..., Any], reference: Callable[..., Any], sample: Sample
) -> Iterator[Comparison | str]:
    """The three-way comparison of one sample; a text for what isn't a matter of accuracy."""
    eager, outputs = _run(reference, sample, None, None)
    upstream = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o.device, o.dtype)
        for o in outputs
    ]
    eager, _ = _run(reference, sample, upstream, None)
    truth, _ = _run(reference, sample, upstream, torch.float64)
    got, _ = _run(kernel, sample, upstream, None)
    if got.keys() != eager.keys():
        count = sum(name.startswith("output") for name in got)
        yield f"{count} outputs where the reference has {len(outputs)}"
        return
    for name, want in eager.items():
        result, exact = got[name], truth[name]
        if (want is None) != (result is None):
            yield f"{name}: {'missing' if result is None else 'computed, where the reference has none'}"
        elif want is not None and result is not None and exact is not None:
            if result.shape != want.shape or result.dtype != want.dtype:
                yield (
                    f"{name}: {tuple(result.shape)} {_short(result.dtype)} where the reference gives "
                    f"{tuple(want.shape)} {_short(want.dtype)}"
                )
            else:
                error, eager_error = relative_error(result, exact), relative_error(want, exact)
                if want.dim() == 0:  # eager's one number may be right by luck
                    coarsest = max(torch.finfo(t.dtype).eps for t in sample.tensors.values() if t is not None)
                    eager_error = max(eager_error, coarsest / 4)
                yield Comparison(tensor=name, error=error, eager_error=eager_error)


def _run(
    function: Callable[..., Any],
    sample: Sample,
    upstream: list[torch.Tensor] | None,
    cast: torch.dtype | None,
) -> tuple[dict[str, torch.Tensor | None], list[torch.Tensor]]:
    """Outputs and gradients by name; ValueError where an input or an incoming gradient was written over."""
    leaves: dict[str, torch.Tensor | None] = {}
    for name, tensor in sample.tensors.items():
        if tensor is not None:
            tensor = _relayout(tensor if cast is None else tensor.to(cast)).requires_grad_(
                name not in sample.frozen
            )
        leaves[name] = tensor
    before = {name: leaf.detach().clone() for name, leaf in leaves.items() if leaf is not None}
    # In the float64 run nothing is rounded, not even the result.
    options = {k: v for k, v in sample.options.items() if cast is None or k != "out_dtype"}
    with torch.enable_grad():
        result = function(**leaves, **options)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    named: dict[str, torch.Tensor | None] = {f"output {i}": o.detach().clone() for i, o in enumerate(outputs)}
    if upstream is not None:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        given = [g.to(o.dtype, copy=True) for g, o in zip(upstream, outputs, strict=False)]
        pairs = [(o, g) for o, g in zip(outputs, given, strict=False) if o.requires_grad]
        gradients: Iterable[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            gradients = torch.autograd.grad(
                [o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
            )
        named |= {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}
        if any(not torch.equal(g, u.to(g.dtype)) for g, u in zip(given, upstream, strict=False)):
            raise ValueError("it writes over an incoming gradient")
    for name, saved in before.items():
        leaf = leaves[name]
        if leaf is not None and not torch.equal(leaf.detach(), saved):
            raise ValueError(f"it writes over its input {name}")
    return named, outputs


def _relayout(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, and NaN in the gaps between its elements, which no kernel may read."""
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() == 0:
        return tensor.detach().clone()
    buffer = torch.full((extent,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, tensor.stride()).copy_(tensor.detach())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
