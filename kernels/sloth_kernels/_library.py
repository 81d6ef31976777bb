"""What every op file shares: Triton where it is there, and the registration of `torch.ops.sloth.*`.

Without Triton the op files still import (their references are the CPU path); launching a kernel then raises.
`TRITON_INTERPRET=1`, set before the first import of triton, runs the kernels on CPU tensors.
"""

# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands in for triton and triton.language, so that op files can be imported for their references."""

        def jit(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
            return function if function is not None else (lambda f: f)

        def __getattr__(self, name: str) -> Any:
            return type(name, (), {})

    triton: Any = _Absent()  # type: ignore[no-redef]
    tl: Any = _Absent()  # type: ignore[no-redef]

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "Launcher",
    "differentiable_gradients",
    "launch",
    "register_op",
    "run_op",
    "tl",
    "triton",
    "triton_unavailable",
    "wants_graph",
]
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
_LIBRARY = torch.library.Library("sloth", "DEF")


def triton_unavailable() -> str | None:
    """None where Triton kernels can run on this machine, otherwise the reason in one sentence."""
    if not HAS_TRITON:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not any(backend.driver.is_active() for backend in triton.backends.backends.values()):
        return "triton finds no active GPU driver"
    return None


def register_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `sloth::<schema>`: the Triton launch for CUDA (and CPU under the interpreter), and its fake.

    `fake` gets the same arguments and returns empty tensors of the right shapes, dtypes and strides.
    """
    name = _LIBRARY.define(schema)
    keys: Sequence[str] = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    for key in keys:
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"sloth::{name}", fake, lib=_LIBRARY)


def run_op(op: Callable[..., Any], implementation: Callable[..., Any], *args: Any) -> Any:
    """`op(*args)`; straight to its implementation where nothing looks at ops in between, which costs less.

    Somebody looks under torch.compile, under a dispatch mode (selective checkpointing names ops) and for
    tensor subclasses (fake tensors, DTensor).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(args[0]) not in _PLAIN_TENSORS
        or not (args[0].is_cuda or INTERPRETED)
    ):
        return op(*args)
    return implementation(*args)


class Launcher:
    """A kernel with its warps and constants, which a call site that is called often makes once.

    `launcher(grid, tensors, scalars)` is `kernel[grid](*tensors, *scalars, num_warps=..., **constants)`,
    without Triton's binding from the second call on. That binding costs more than a small model's kernel. A
    compiled kernel is found by all that Triton specializes on: dtypes and 16-byte alignment of tensors,
    values of scalars and constants. Once for each kernel, on small tensors, the short way is run after the
    ordinary one and must leave the same bits; otherwise, and where Triton's interface has changed, the
    ordinary way stays. That launch must read nothing it writes: one that does, as in place, is not
    `repeatable` and leaves the proof to others of its kernel. The short way does not call Triton's launch
    hooks, which its own profiler uses.

    Tensors may be None, but for the first, which says on which device.
    """

    __slots__ = ("constants", "kernel", "num_warps")

    def __init__(self, kernel: Any, *, num_warps: int, **constants: Any) -> None:
        self.kernel, self.num_warps, self.constants = kernel, num_warps, constants

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Any, ...],
        scalars: tuple[Any, ...] = (),
        repeatable: bool | int = True,
    ) -> None:
        if INTERPRETED:
            self._ordinary(grid, tensors, scalars)
            return
        device = tensors[0].get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(grid, tensors, scalars, repeatable)
            return
        try:
            pointers: list[Any] = [*map(_POINTER, tensors)]
            dtypes = (*map(_DTYPE, tensors),)
        except (AttributeError, TypeError):  # None among them
            pointers = [None if t is None else t.data_ptr() for t in tensors]
            dtypes = tuple(None if t is None else t.dtype for t in tensors)
            low: Any = tuple(None if p is None else p & 15 for p in pointers)
        else:
            low = functools.reduce(operator.or_, pointers) & 15
            if low:
                low = tuple(p & 15 for p in pointers)
        # With the types: 1 and 1.0 and True are equal as keys, and not to Triton.
        key = self, device, scalars, (*map(type, scalars),), dtypes, low
        known = _COMPILED.get(key)
        if known is not None:
            run, function, metadata, tail = known
            x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            stream = torch._C._cuda_getCurrentRawStream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *pointers, *scalars, *tail)
            return
        compiled = self._ordinary(grid, tensors, scalars)
        identity = id(self.kernel)
        if identity in _NO_SHORT_WAY or not (repeatable or identity in _SHORT_WAY):
            return
        try:
            names = self.kernel.arg_names[len(tensors) + len(scalars) :]
            tail = tuple(self.constants[name] for name in names)
            known = compiled.run, compiled.function, compiled.packed_metadata, tail
            if identity not in _SHORT_WAY:
                stream = torch._C._cuda_getCurrentRawStream(device)
                way = known[:3]
                if not _prove_short_way(identity, way, grid, stream, tensors, (*pointers, *scalars, *tail)):
                    return
        except Exception:  # whatever a Triton that we don't know does: the ordinary way has run and stays
            _NO_SHORT_WAY.add(identity)
            return
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()  # a run whose shapes never repeat
        _COMPILED[key] = known

    def _ordinary(self, grid: tuple[int, ...], tensors: tuple[Any, ...], scalars: tuple[Any, ...]) -> Any:
        return self.kernel[grid](*tensors, *scalars, num_warps=self.num_warps, **self.constants)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    repeatable: bool | int = True,
    **constants: Any,
) -> None:
    """`kernel[grid](*args, num_warps=..., **constants)` by a `Launcher`, which is made at the first call.

    Tensors (or None) come first among the arguments, then scalars.
    """
    identity = id(kernel)
    count = _TENSORS.get(identity)
    if count is None:
        count = _TENSORS[identity] = _leading_tensors(args)
    values = (*constants.values(),)
    key = identity, num_warps, values, (*map(type, values),)
    launcher = _LAUNCHERS.get(key)
    if launcher is None:
        launcher = _LAUNCHERS[key] = Launcher(kernel, num_warps=num_warps, **constants)
    launcher(grid, args[:count], args[count:], repeatable)


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_POINTER, _DTYPE = torch.Tensor.data_ptr, operator.attrgetter("dtype")
_TENSORS: dict[int, int] = {}
_LAUNCHERS: dict[tuple[Any, ...], Launcher] = {}
_COMPILED: dict[tuple[Any, ...], tuple[Any, Any, Any, tuple[Any, ...]]] = {}
_MOST_COMPILED = 10_000
_SHORT_WAY: set[int] = set()
_NO_SHORT_WAY: set[int] = set()
_FEW_BYTES = 2**27


def _leading_tensors(args: tuple[Any, ...]) -> int:
    """How many arguments are tensors or None; TypeError where one stands behind a scalar."""
    are = [arg is None or isinstance(arg, torch.Tensor) for arg in args]
    count = are.index(False) if False in are else len(are)
    if any(are[count:]):
        raise TypeError("launch: a tensor behind a scalar")
    return count


def _prove_short_way(
    identity: int,
    way: tuple[Any, ...],
    grid: tuple[int, ...],
    stream: int,
    given: tuple[Any, ...],
    args: tuple[Any, ...],
) -> bool:
    """Whether the short way leaves in every tensor what the ordinary one has just left there."""
    tensors = [t for t in given if t is not None]
    if sum(t.nbytes for t in tensors) > _FEW_BYTES or torch.cuda.is_current_stream_capturing():
        return False  # at another call
    run, function, metadata = way
    before = [t.contiguous().clone() for t in tensors]
    run(*(*grid, 1, 1)[:3], stream, function, metadata, None, None, None, *args)
    after = [t.contiguous() for t in tensors]
    # As bytes: NaN in an output must not look like a difference.
    same = all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(before, after, strict=True)
        if a.numel()
    )
    (_SHORT_WAY if same else _NO_SHORT_WAY).add(identity)
    return same


def wants_graph() -> bool:
    """Whether a running backward must itself be differentiable (`create_graph=True`); the kernels aren't."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    reference: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients of `reference(*inputs)` for the incoming `grads`, that can be differentiated again.

    The way of every backward here under `create_graph=True`: slower, and right to any order.
    """
    wanted = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.enable_grad():
        outputs = reference(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        pairs = [
            (o, g.to(o.dtype))
            for o, g in zip(outputs, grads, strict=True)
            if g is not None and o.requires_grad
        ]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in wanted],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    result: list[torch.Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return result
