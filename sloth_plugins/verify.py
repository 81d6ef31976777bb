"""Proof before use: a patch against the module that it replaces, and both against float64.

For every output and every gradient, err(patched) <= 1.5 * err(original) + 1e-6 (see numerics.py). The inputs
are random, of the dtype and on the device of the module; widths, head counts and memory layouts are the
model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sloth_plugins.numerics import FORMULA_TOLERANCE, Comparison, relative_error
from sloth_plugins.specs import NotASite, Patch
from sloth_plugins.survey import stand_in

TOKENS = 64
PARAMETER_ELEMENTS = 2**20
_SETTLED = ("compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")
Function = Callable[..., Any]


class VerificationError(Exception):
    """A patch falls short; the message holds the figures."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The arguments with which the model called a module, and the autocast (device, dtype) that it ran in."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: tuple[str, torch.dtype] | None = None

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What the call has to be repeated in."""
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(*self.autocast)


@dataclass(kw_only=True)
class Trial:
    """What a patch's verification may use."""

    model: nn.Module
    device: torch.device
    generator: torch.Generator
    replays: Mapping[str, Replay] = field(default_factory=dict)
    replay_error: str = ""

    def module(self, name: str) -> nn.Module:
        """The module of a dotted name."""
        return self.model.get_submodule(name)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """The activations' dtypes to prove for parameters of `dtype`: on a GPU, bf16 under fp32 as well."""
        if dtype == torch.float32 and self.device.type == "cuda":
            return torch.float32, torch.bfloat16
        return (dtype,)

    def context(self, activation: torch.dtype, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
        """Autocast where activations are of another dtype than parameters, which is how that comes about."""
        if activation == dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=activation)

    def randn(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Random normal values on the trial's device, from the trial's own generator."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float32, device=self.device).to(
            dtype
        )

    def replay(self, name: str) -> Replay:
        """The captured call of a module; raises NotASite where the model could not be run."""
        if name not in self.replays:
            raise NotASite(self.replay_error or "the model's forward never called it")
        return self.replays[name]


def compare(
    patched: Function,
    original: Function,
    truth: Function,
    tensors: Mapping[str, torch.Tensor],
    grads: Sequence[str],
) -> list[Comparison]:
    """Outputs and the gradients of `grads`, of two functions of **tensors against `truth` run in float64.

    Raises VerificationError where dtypes or shapes of the two differ.
    """
    results = {}
    upstream: list[torch.Tensor] | None = None
    for name, function in (("original", original), ("truth", truth), ("patched", patched)):
        double = name == "truth"
        leaves = {
            key: _leaf(value, requires_grad=key in grads, double=double) for key, value in tensors.items()
        }
        with torch.enable_grad():
            outputs = _flat(function(**leaves))
        if upstream is None:
            generator = torch.Generator(device=outputs[0].device).manual_seed(7)
            upstream = [  # rounded once, so that all three get the same incoming gradient
                torch.randn(o.shape, generator=generator, dtype=torch.float32, device=o.device).to(o.dtype)
                for o in outputs
            ]
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
        gradients: Sequence[torch.Tensor | None] = ()
        if pairs and grads:
            gradients = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaves[key] for key in grads],
                [g.to(o.dtype) for o, g in pairs],
                allow_unused=True,
            )
        results[name] = [*((f"output {i}", o) for i, o in enumerate(outputs))] + [
            (f"gradient of {key}", g) for key, g in zip(grads, gradients, strict=bool(gradients))
        ]
    # A float32 result of a bf16 input (under float32 weights) has been through bf16.
    floating = [t.dtype for t in (*tensors.values(), *(o for _, o in results["original"] if o is not None))]
    coarsest = min((dtype for dtype in floating if dtype.is_floating_point), key=_precision)
    comparisons = []
    for (tensor, want), (_, eager), (_, got) in zip(
        results["truth"], results["original"], results["patched"], strict=True
    ):
        if want is None or eager is None or got is None:
            if (eager is None) != (got is None):
                raise VerificationError(f"{tensor}: patched and original disagree on whether it exists")
            continue
        if eager.dtype != got.dtype:
            raise VerificationError(f"{tensor}: dtype {got.dtype} where the original gives {eager.dtype}")
        comparison = Comparison(
            tensor=tensor, error=relative_error(got, want), eager_error=relative_error(eager, want)
        )
        tolerance = FORMULA_TOLERANCE[coarsest]
        if comparison.eager_error > tolerance:
            raise VerificationError(
                f"the original itself is {comparison.eager_error:.1e} from the formula in {tensor} "
                f"(at most {tolerance:.0e})"
            )
        comparisons.append(comparison)
    return comparisons


def compare_calls(original: Function, patched: Function, module: nn.Module, replay: Replay) -> None:
    """Original and patched forward on one captured call agree to a few roundings of the dtype.

    This proves the wiring (who calls what, in which order); the arithmetic is proven by `compare`. Raises
    VerificationError.
    """
    results = []
    for function in (original, patched):
        leaves: list[torch.Tensor] = []
        args, kwargs = _leaves((replay.args, dict(replay.kwargs)), leaves)
        # Gradients of large weights would cost memory and prove nothing that the input's gradient doesn't.
        parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad and p.numel() <= 2**20]
        with torch.enable_grad():
            with replay.context():
                outputs = [o for o in _flat(function(*args, **kwargs)) if o.is_floating_point()]
            wanted = leaves + [p for _, p in parameters]
            total = sum((o.float() * _ramp(o)).sum() for o in outputs if o.requires_grad)
        grads: Sequence[torch.Tensor | None] = ()
        if isinstance(total, torch.Tensor) and wanted:
            grads = torch.autograd.grad(total, wanted, allow_unused=True)
        names = [f"gradient of input {i}" for i in range(len(leaves))] + [
            f"gradient of {n}" for n, _ in parameters
        ]
        results.append(
            [(f"output {i}", o) for i, o in enumerate(outputs)] + list(zip(names, grads, strict=bool(grads)))
        )
    if len(results[0]) != len(results[1]):
        raise VerificationError("patched and original return different numbers of tensors")
    for (name, want), (_, got) in zip(*results, strict=True):
        if want is None or got is None:
            if (want is None) != (got is None):
                raise VerificationError(f"{name}: patched and original disagree on whether it exists")
            continue
        if got.dtype != want.dtype:
            raise VerificationError(f"{name}: dtype {got.dtype} where the original gives {want.dtype}")
        # A float32 gradient of a float32 adapter has been through bf16 where activations are that.
        dtypes = {t.dtype for t in (*leaves, *module.parameters()) if t.is_floating_point()}
        dtype = min((want.dtype, *dtypes), key=_precision)
        error, tolerance = relative_error(got, want), FORMULA_TOLERANCE[dtype]
        if not error <= tolerance:
            raise VerificationError(
                f"{name} differs by {error:.1e} from the original's (at most {tolerance:.0e})"
            )


def verify(patch: Patch, trial: Trial) -> tuple[Comparison, ...]:
    """Run a patch's proof. VerificationError and NotASite hold the reason; others are the kernel's own."""
    if patch.verify is None:
        return _verify_by_replay(patch, trial)
    comparisons = tuple(patch.verify(trial))
    failed = [str(comparison) for comparison in comparisons if not comparison.passed]
    if failed:
        raise VerificationError("less accurate than the contract: " + "; ".join(failed))
    return comparisons


def nonfinite_parameters(module: nn.Module) -> list[str]:
    """Names of the floating-point parameters at or below `module` that hold NaN or infinity."""
    return [
        name
        for name, p in module.named_parameters()
        if p.is_floating_point() and not p.is_meta and not bool(torch.isfinite(p).all())
    ]


def _verify_by_replay(patch: Patch, trial: Trial) -> tuple[Comparison, ...]:
    """The proof of a patch that brings none: the module's own float64 copy is the truth."""
    import copy

    module = trial.module(patch.module)
    replay = trial.replay(patch.module)
    if set(patch.forwards) != {patch.module}:
        raise VerificationError("a patch of several modules must bring its own verify")
    forward = patch.forwards[patch.module]
    tensors = {str(i): a for i, a in enumerate(replay.args) if isinstance(a, torch.Tensor)}
    rest = [a for a in replay.args if not isinstance(a, torch.Tensor)]
    if rest or not tensors or any(isinstance(v, torch.Tensor) for v in replay.kwargs.values()):
        raise VerificationError(
            "only modules called with tensors alone can be replayed: the patch must bring its own verify"
        )
    double = copy.deepcopy(module).double()
    inputs = list(tensors)
    # Gradients of large weights would cost memory. Those of children are left to the children's own forwards.
    tensors |= {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad and p.numel() <= PARAMETER_ELEMENTS
    }

    def call(function: Function, module: nn.Module) -> Function:
        def run(**given: torch.Tensor) -> Any:
            clone = stand_in(module, {})
            clone.__dict__["_parameters"].update({name: given[name] for name in given if name not in inputs})
            with replay.context():
                return function(clone, *(given[name] for name in inputs), **replay.kwargs)

        return run

    original = type(module).forward
    grads = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    comparisons = compare(
        call(forward, module), call(original, module), call(original, double), tensors, grads
    )
    failed = [str(comparison) for comparison in comparisons if not comparison.passed]
    if failed:
        raise VerificationError("less accurate than the contract: " + "; ".join(failed))
    return tuple(comparisons)


class _Captured(BaseException):
    """Ends the capturing forward; a BaseException, so that no `except Exception` on the way swallows it."""


def capture(
    model: nn.Module, names: Sequence[str], device: torch.device, generator: torch.Generator
) -> tuple[dict[str, Replay], str]:
    """Run the model on a few random tokens; returns how it called `names` and, if it failed, why.

    A model that only autocast lets run (norms in float32 above linears in bfloat16) is run in it.
    """
    get: Any = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    vocabulary = min(getattr(embedding, "num_embeddings", None) or 100, 1000)
    ids = torch.randint(0, vocabulary, (2, 8), generator=generator, device=generator.device).to(device)

    def run() -> None:
        try:
            model(input_ids=ids, use_cache=False)
        except TypeError:
            model(input_ids=ids)

    autocast = None
    own = {(p.dtype, p.dim() > 1) for name, p in model.named_parameters() if ".lora_" not in name}
    low = [dtype for dtype in (torch.bfloat16, torch.float16) if (dtype, True) in own]
    if low and any(dtype == torch.float32 for dtype, _ in own):
        try:
            with torch.no_grad():
                run()
        except RuntimeError:
            autocast = (device.type, low[0])
        except Exception:  # the same below, which says why
            pass
    replays: dict[str, Replay] = {}
    handles = []

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in replays:
                cloned_args, cloned_kwargs = _leaves((args, kwargs), None)
                replays[name] = Replay(args=cloned_args, kwargs=cloned_kwargs, autocast=autocast)
            if len(replays) == len(set(names)):
                raise _Captured

        return keep

    try:
        for name in set(names):
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True))
        context = contextlib.nullcontext() if autocast is None else torch.autocast(*autocast)
        with torch.no_grad(), context:
            run()
    except _Captured:
        pass
    except (
        Exception
    ) as error:  # the user's model may need inputs that we can't make up; then it isn't replayed
        return (
            replays,
            f"the model could not be run on random tokens ({type(error).__name__}: {str(error)[:120]})",
        )
    finally:
        for handle in handles:
            handle.remove()
    return replays, ""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards training flags, random states and 4-bit layers are as they were."""
    training = [module for module in model.modules() if module.training]
    # In eval mode on an AVX512-BF16 CPU, bitsandbytes repacks a layer's weights for inference, for good. It
    # also settles the compute dtype at the first call, and casts the bias to it.
    four_bit: list[Any] = [m for m in model.modules() if "support_avx512bf16_for_cpu" in vars(m)]
    settled = [{key: vars(module)[key] for key in _SETTLED if key in vars(module)} for module in four_bit]
    biases = [None if module.bias is None else module.bias.data for module in four_bit]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    kinds = {"cpu", *(p.device.type for p in model.parameters())} & {"cpu", "cuda", "xpu"}
    with contextlib.ExitStack() as stack:
        # Under the caller's inference_mode no gradient could be compared, and under autocast not in the
        # dtypes given.
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        try:
            for module in training:
                module.training = False
            for module in four_bit:
                module.support_avx512bf16_for_cpu = False
            yield
        finally:
            for module in training:
                module.training = True
            for module, values, bias in zip(four_bit, settled, biases, strict=True):
                vars(module).update(values)
                if bias is not None:
                    module.bias.data = bias


def _leaf(value: torch.Tensor, *, requires_grad: bool, double: bool) -> torch.Tensor:
    """A fresh leaf of the same values and the same memory layout."""
    fresh = (
        value.detach().to(torch.float64) if double and value.is_floating_point() else value.detach().clone()
    )
    return fresh.requires_grad_(requires_grad)


def _leaves(item: Any, leaves: list[torch.Tensor] | None) -> Any:
    """`item` with every tensor cloned; the hidden states become a leaf where leaves are asked for."""
    if isinstance(item, torch.Tensor):
        clone = item.detach().clone()
        if leaves is not None and clone.is_floating_point() and clone.dim() == 3 and not leaves:
            leaves.append(clone.requires_grad_(True))  # the first one: the hidden states
        return clone
    if isinstance(item, tuple) and type(item) is tuple:
        return tuple(_leaves(part, leaves) for part in item)
    if type(item) is list:
        return [_leaves(part, leaves) for part in item]
    if type(item) is dict:
        first = sorted(item, key=lambda key: key != "hidden_states")
        cloned = {key: _leaves(item[key], leaves) for key in first}
        return {key: cloned[key] for key in item}
    return item


def _flat(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return [tensor for part in outputs for tensor in _flat(part)]
    return []


def _ramp(x: torch.Tensor) -> torch.Tensor:
    """Fixed, uneven weights, so that a gradient has no accidental symmetry."""
    return torch.cos(torch.arange(x.numel(), device=x.device, dtype=torch.float32)).reshape(x.shape)


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps
