"""The head's loss without its logits: what the output embedding gives a model, and what is asked of it.

While a language model's own forward runs, its head gives `DeferredLogits`: a tensor of the right shape,
dtype, device and autograd history that holds no values, but the hidden states and the weight. What commutes
with the head is noted down (casts, scales, in place as well, tanh soft-capping, slices and reshapes of the
leading dims):

    F.cross_entropy, F.nll_loss of log_softmax    the op linear_cross_entropy on hidden states and weight
    log_softmax + gather, gather, logsumexp       the op linear_log_probs, or the dot products of single ids
    argmax, max, topk, logsumexp without gradients   computed a chunk of rows at a time

Whatever else touches it gets the values: they are computed by the head's own matmul when first needed, and
kept. So a loss function, a trainer or a metric needs no change, and `outputs.logits` is right when read.

A head that is trained may have other weights by the time of the first read. Before an optimizer's step, small
logits that somebody still holds are therefore computed. Large ones would cost every loop that keeps `outputs`
over the step, read or not, what was saved; and a step that calls its forward itself (Lightning's) leaves no
time before it. If such logits are read late after all, their values come from the hidden states of then and
the weights of now, and one warning says so (strict=True raises); from that read on, the head's forwards
compute their logits at once, and these are exact. HF's and TRL's trainers drop the outputs of a training
forward, or read them, before the step. A late read is known by the step of any torch.optim.Optimizer, which
need not be of these weights (fused and 8-bit ones raise no tensor's version), and else by the versions; only
a write through `weight.data` outside an optimizer goes unseen.

What each head did is counted (`Patch.counts`), so that the report can say which way the losses took.

Gradients come from the op's own backward where it answered. Where values were used they are dy W and dy^T x:
`_Head` is an ordinary node of autograd's graph, and each noted operation has its own.
"""

# torch.autograd.Function is untyped.
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _module
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from sloth_plugins.numerics import FORMULA_TOLERANCE, Comparison, relative_error
from sloth_plugins.patches import Forward, _hooked, _hooked_everywhere, _takes, named_like
from sloth_plugins.specs import FLOATS, KernelSpec, NotASite, Patch, Site, Skip
from sloth_plugins.survey import PlanContext, forward_obstacle, stand_in
from sloth_plugins.verify import TOKENS, Trial, VerificationError, compare

OP = "linear_cross_entropy"
# A larger weight is verified on its first rows, so that float64 copies stay small.
ELEMENTS = 2**23
# Bytes of logits that an answer in chunks holds at a time, and that are computed unasked before a step.
CHUNK_BYTES = 2**26
# What a head counts: calls whose logits were left out, and calls of its own forward; questions answered by an
# op and in chunks of rows; logits computed in whole after all; logits first read after the weights had
# changed.
COUNTS = ("deferred", "own_forward", "fused", "in_chunks", "materialised", "late")
LATE = (
    "outputs.logits were read for the first time after the head's weight or input had changed (by an "
    "optimizer step?), so these values are of the hidden states of then and the weights of now"
)
REMEDY = "read outputs.logits before the step, or set head_loss='off'"
# Frames above the head in which its model's forward is looked for; a head inside two modules needs twelve.
DEPTH = 16
_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_aten: Any = torch.ops.aten
_tensor: Any = torch.Tensor
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_SAME = {_aten.detach.default, _aten.alias.default, _aten.clone.default}
# Functions of a leading dim: func -> where the dims are among the arguments after the tensor.
_LEADING = {
    _aten.slice.Tensor: (0,),
    _aten.select.int: (0,),
    _aten.split.Tensor: (1,),
    _aten.split_with_sizes.default: (1,),
    _aten.unbind.int: (0,),
    _aten.squeeze.dim: (0,),
    _aten.transpose.int: (0, 1),
}
_SCALES = {
    _aten.mul.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Tensor: -1,
    _aten.div.Scalar: -1,
}
_IN_PLACE = {
    _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.mul_.Scalar: _aten.mul.Scalar,
    _aten.div_.Tensor: _aten.div.Tensor,
    _aten.div_.Scalar: _aten.div.Scalar,
}
# Whose results lie in the memory of what they are given.
_ALIASES = {_aten.view.default, _aten.detach.default, _aten.alias.default, _aten.unsqueeze.default, *_LEADING}
_BY_ROW = {
    _aten.argmax.default,
    _aten.argmin.default,
    _aten.max.dim,
    _aten.amax.default,
    _aten.topk.default,
    _aten.logsumexp.default,
}
# What reads storage or the object itself, below the dispatcher.
_REAL = {
    getattr(_tensor, name)
    for name in (
        *("numpy", "tolist", "item", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__array__"),
        *("__deepcopy__", "__reduce_ex__", "__repr__", "__dlpack__", "__dlpack_device__", "__format__"),
        *("share_memory_", "pin_memory", "is_pinned", "is_shared", "__contains__"),
    )
}
# Who watches the gradient of the logits has to see it flow through them.
_WATCHING = {
    _tensor.register_hook,
    _tensor.register_post_accumulate_grad_hook,
    _tensor.retain_grad,
    _tensor.requires_grad_,
}


# The tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """One operation on the tensor before; `pick` is its place in a list of results, `rows` what it leaves."""

    function: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pick: int | None = None
    in_place: bool = False
    rows: tuple[int, ...] | None = None
    """The leading dims of the result, where it moves rows only; None where it changes values only."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The operation on logits or, where it moves rows only, on hidden states."""
        if self.function in _VIEWS:
            assert self.rows is not None
            return x.reshape(*self.rows, x.shape[-1])
        result = self.function(x, *self.args, **self.kwargs)
        return result if self.pick is None else result[self.pick]  # type: ignore[no-any-return]


@dataclass(kw_only=True, eq=False)
class _Root:
    """One call of a head: x (..., H), weight (V, H) in the dtype of its matmul, and who shares its logits.

    weight may be a sloth_kernels.nf4.FourBit.
    """

    x: torch.Tensor
    weight: Any
    bias: torch.Tensor | None
    kernel: KernelSpec
    log_probs: KernelSpec | None
    counts: dict[str, int]
    strict: bool = False
    values: torch.Tensor | None = None
    stepped: bool = False
    """An optimizer has made a step since, which may have changed the weights."""
    said: bool = False
    """It was counted as read late."""
    observed: bool = False
    """Somebody watches gradients or wrote into the logits: from then on only the values count."""
    settled: bool = False
    writes: list[tuple[tuple[_Step, ...], Any, tuple[Any, ...]]] = dataclasses.field(default_factory=list)
    """Scales in place that were noted: the steps of the view that was written to, and the operation."""
    family: list[weakref.ref[DeferredLogits]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = self.now()

    def now(self) -> list[int]:
        """How often each of the tensors has been written to."""
        weight = getattr(self.weight, "packed", self.weight)
        return [t._version for t in (self.x, weight, self.bias) if t is not None]

    def late(self) -> bool:
        """Whether the logits of this call's weights can no longer be computed."""
        return self.stepped or self.now() != self.versions

    def before_step(self) -> None:
        """An optimizer is about to change the weights: computes small logits that somebody holds."""
        size_bytes = self.x.nbytes // self.x.shape[-1] * self.weight.shape[0]
        held = any(ref() is not None for ref in self.family)
        if size_bytes <= CHUNK_BYTES and held and not self.late():
            self.unasked()

    def unasked(self) -> None:
        """All logits, where there is memory for them: a run may not end for what nobody has asked for."""
        with contextlib.suppress(torch.OutOfMemoryError):
            self.whole()

    def dense(self) -> torch.Tensor:
        """The weight (V, H) as a plain tensor, without history where it is in 4 bits."""
        if isinstance(self.weight, torch.Tensor):
            return self.weight
        from sloth_kernels.nf4 import expand_4bit_reference

        return expand_4bit_reference(self.weight).to(self.x.dtype)

    def head(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of some rows, without history; `weight` is the dense one, where it is at hand."""
        if self.late():
            if self.strict:
                raise RuntimeError(f"{LATE}, and strict=True: {REMEDY}")
            if not self.counts["late"]:
                now = "from now on this head computes its logits in each forward"
                warnings.warn(
                    f"sloth: {LATE}; {now}. To have them right from the start, {REMEDY}", stacklevel=2
                )
            self.counts["late"] += not self.said
            self.said = True
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.dense() if weight is None else weight, self.bias)

    def whole(self) -> torch.Tensor:
        """All logits, computed once."""
        if self.values is None:
            self.counts["materialised"] += 1
            self.values = self.head(self.x)
        return self.values


class DeferredLogits(torch.Tensor):
    """Logits (..., V) that are computed when somebody needs their values; see the module's docstring."""

    _root: _Root
    _meta: torch.Tensor
    _steps: tuple[_Step, ...]
    _computed: torch.Tensor | None
    _stale: bool
    """Part of its memory was scaled through another view."""

    @staticmethod
    def __new__(cls, root: _Root, meta: torch.Tensor, steps: tuple[_Step, ...]) -> DeferredLogits:
        """A tensor with the sizes, strides and dtype of `meta`, on the head's device."""
        self: DeferredLogits = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=root.x.device
        )
        self._root, self._meta, self._steps, self._computed = root, meta, steps, None
        self._stale = False
        if len(root.family) > 256:  # a loop over rows makes thousands that die at once
            root.family = [ref for ref in root.family if ref() is not None]
        root.family.append(weakref.ref(self))
        return self

    # torch calls this without the object
    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answers what can be answered from hidden states; hands the rest on to autograd and to dispatch."""
        kwargs = kwargs or {}
        if (answer := _ANSWERS.get(func)) is not None:
            result = answer(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            if func in _WATCHING:
                args[0]._root.observed = True
            elif func in _REAL:
                args = tree_map_only(DeferredLogits, _Values.apply, args)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Notes the operation down, or runs it on the values. Autograd has been seen to before."""
        kwargs = dict(kwargs or {})
        this = args[0] if args and isinstance(args[0], DeferredLogits) else None
        writes = func._schema.is_mutable
        if func in _IN_PLACE and this is not None and not kwargs and _scaled(func, this, args[1:]):
            return this
        if not writes and this is not None and not this._root.observed:
            # Of what is stale only views are noted: autograd makes them when a view of it has been scaled.
            if (not this._stale or func in _ALIASES) and (
                noted := _note(func, this, args[1:], kwargs)
            ) is not None:
                return noted
            if (
                func in _BY_ROW
                and not this._stale
                and (result := _by_row(func, this, args[1:], kwargs)) is not None
            ):
                return result
        # A plain view of the values may be written to later, unseen.
        if writes or any(result.alias_info is not None for result in func._schema.returns):
            tree_map_only(DeferredLogits, _settle, (args, kwargs))
        held: list[tuple[torch.Tensor, DeferredLogits]] = []

        def real(logits: DeferredLogits) -> torch.Tensor:
            held.append((values_of(logits), logits))
            return held[-1][0]

        args, kwargs = tree_map_only(DeferredLogits, real, (args, kwargs))
        results = func(*args, **kwargs)
        return tree_map_only(  # what writes into its input returns that input
            torch.Tensor, lambda t: next((logits for values, logits in held if values is t), t), results
        )


def values_of(logits: DeferredLogits) -> torch.Tensor:
    """The values, computed once, as a plain tensor without history."""
    if logits._stale:
        _settle(logits)
    if logits._computed is None:
        root, steps = logits._root, logits._steps
        # A small part of the logits is computed alone: who goes through them in chunks never holds them all.
        part = logits._meta.numel() * root.x.shape[-1] * 2 <= root.x.numel() * root.weight.shape[0]
        with torch.no_grad():
            if part and root.values is None:
                root.counts["in_chunks"] += 1
                x = _rows(root.x, steps)
                logits._computed = _run(root.head(x), [step for step in steps if step.rows is None])
            else:
                logits._computed = _run(root.whole(), steps)
    return logits._computed


def _scaled(func: Any, logits: DeferredLogits, args: tuple[Any, ...]) -> bool:
    """Notes a scale in place down, where nobody has the values yet; who shares the memory becomes stale."""
    root, before = logits._root, logits._steps
    if (
        root.observed
        or root.values is not None
        or logits._computed is not None
        or logits._stale
        or not _aliases(before)
        or (found := _on_values(_IN_PLACE[func], logits, args, {})) is None
    ):
        return False
    functional, args, _ = found
    logits._steps = (*before, _Step(function=functional, args=args, in_place=True))
    root.writes.append((before, func, args))
    for ref in root.family:
        if (other := ref()) is not None and other is not logits and _aliases(other._steps):
            other._stale = True
    return True


def _aliases(steps: Sequence[_Step]) -> bool:
    """Whether what is left after `steps` lies in the memory of the logits."""
    return all(step.in_place or step.function in _ALIASES for step in steps)


def _settle(logits: DeferredLogits) -> DeferredLogits:
    """Before the first write: all who share these logits get their values, views as views of one tensor."""
    root = logits._root
    if not root.settled:
        root.settled = root.observed = True
        whole = root.whole()
        family = [other for ref in root.family if (other := ref()) is not None]
        late = [other for other in family if _aliases(other._steps) or any(s.in_place for s in other._steps)]
        for other in family:
            if not any(other is each for each in late):  # a copy from before the noted writes
                other._computed = _run(whole, other._steps)
        for steps, func, args in root.writes:
            func(_run(whole, [step for step in steps if not step.in_place]), *args)
        for other in late:
            other._computed = _run(whole, [step for step in other._steps if not step.in_place])
            other._stale = False
    return logits


def _run(x: torch.Tensor, steps: Sequence[_Step]) -> torch.Tensor:
    for step in steps:
        x = step(x)
    return x


def _rows(x: torch.Tensor, steps: Sequence[_Step]) -> torch.Tensor:
    """The hidden states (..., H) of the rows that are left after `steps`."""
    return _run(x, [step for step in steps if step.rows is not None])


def _note(func: Any, logits: DeferredLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `func` as DeferredLogits; None where it doesn't commute with the head."""
    meta = logits._meta
    moved = _on_rows(func, meta, args, kwargs)
    step = moved or _on_values(func, logits, args, kwargs)
    if step is None or meta.dim() == 0:
        return None
    func, args, kwargs = step
    shapes = args
    if func is _aten.index.Tensor:
        shapes = ([i if i is None else i.to("meta") for i in args[0]],)
    try:
        results = func(meta, *shapes, **kwargs)
    except RuntimeError:  # eager's own error, or its own reason to copy
        return None
    many = isinstance(results, list | tuple)
    out = []
    for place, result in enumerate(results if many else (results,)):
        if result.dim() == 0 or result.shape[-1] != meta.shape[-1]:
            return None
        noted = _Step(
            function=func,
            args=args,
            kwargs=kwargs,
            pick=place if many else None,
            rows=tuple(result.shape[:-1]) if moved else None,
        )
        out.append(DeferredLogits(logits._root, result, (*logits._steps, noted)))
        out[-1]._stale = logits._stale
    return out if many else out[0]


def _on_rows(
    func: Any, meta: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """An operation on rows as (func, args, kwargs), with dims from the front: hidden states share these."""
    dims, last = meta.dim(), meta.dim() - 1
    if func in _VIEWS or func in _SAME:
        return func, args, kwargs
    if func is _aten.unsqueeze.default:
        dim = args[0] % (dims + 1)
        return (func, (dim,), {}) if dim <= last else None
    if func in _LEADING:
        given = list(args)
        for place in _LEADING[func]:
            dim = (args[place] if len(args) > place else kwargs.get("dim", 0)) % max(dims, 1)
            if dim == last:
                whole = func is _aten.slice.Tensor and func(meta, *args, **kwargs).shape == meta.shape
                return (_aten.alias.default, (), {}) if whole else None
            given[place : place + 1] = [dim]
        return func, tuple(given), {}
    if func is _aten.index.Tensor:
        indices: list[Any] = []
        for index in args[0]:
            if index is not None and type(index) is not torch.Tensor:
                return None
            mask = index is not None and index.dtype == torch.bool
            indices += index.nonzero().unbind(1) if mask else [index]  # type: ignore[union-attr]
        plain = all(i is None or i.dtype in (torch.int64, torch.int32) for i in indices)
        return (func, (indices,), {}) if plain and len(indices) <= last else None
    return None


def _on_values(
    func: Any, logits: DeferredLogits, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """An operation on each value, or on each row's values, as (func, args, kwargs)."""
    if func is _aten.tanh.default:
        return func, args, kwargs
    if func in _SCALES:
        number = not kwargs and type(args[0]) in (int, float) and math.isfinite(args[0]) and args[0] != 0
        return (func, args, kwargs) if number else None
    if func is _aten._log_softmax.default:
        last = args[0] in (-1, logits._meta.dim() - 1) and not args[1]
        return (func, (-1, False), kwargs) if last else None
    if func is _aten._to_copy.default:
        given = {key: value for key, value in kwargs.items() if value is not None}
        dtype, device = given.pop("dtype", None), given.pop("device", None)
        known = set(given) <= {"memory_format", "non_blocking"} and dtype in FLOATS
        return (func, args, {"dtype": dtype}) if known and device in (None, logits._root.x.device) else None
    return None


def _by_row(func: Any, logits: DeferredLogits, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A function of each row alone, a chunk of rows at a time; None where it looks across rows."""
    last = logits._meta.dim() - 1
    place = 1 if func is _aten.topk.default else 0
    dims = args[place] if len(args) > place else kwargs.get("dim", -1 if func is _aten.topk.default else None)
    keep = (args[place + 1] if len(args) > place + 1 else kwargs.get("keepdim")) and place == 0
    dims = [dims] if isinstance(dims, int) else dims
    if logits._computed is not None or logits._root.values is not None or last < 1 or keep:
        return None
    if not dims or len(dims) != 1 or dims[0] % (last + 1) != last:
        return None
    steps, root = logits._steps, logits._root
    x = _rows(root.x, steps)
    leading = x.shape[:-1]
    size = max(1, CHUNK_BYTES // (4 * root.weight.shape[0]))
    given = list(args)
    if len(args) > place:
        given[place] = [-1] if isinstance(args[place], list | tuple) else -1
    else:
        kwargs = {**kwargs, "dim": -1}
    parts = []
    root.counts["in_chunks"] += 1
    weight = root.dense()
    for chunk in x.reshape(-1, x.shape[-1]).split(size):
        values = _run(root.head(chunk, weight), [step for step in steps if step.rows is None])
        parts.append(func(values, *given, **kwargs))
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts).reshape(leading)
    whole = (torch.cat(some) for some in zip(*parts, strict=True))
    return tuple(t.reshape(*leading, *t.shape[1:]) for t in whole)


class _Head(torch.autograd.Function):
    """x, weight, bias -> DeferredLogits with a history, so that who uses the values gets their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, root: _Root) -> DeferredLogits:
        ctx.root = root  # it saves nothing for backward: an offloading hook would move what nobody reads
        meta = torch.empty(*x.shape[:-1], root.weight.shape[0], dtype=x.dtype, device="meta")
        return DeferredLogits(root, meta, ())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        root: _Root = ctx.root
        if root.now() != root.versions:
            raise RuntimeError("the head's input or weight was changed in place between forward and backward")
        rows, x = grad.reshape(-1, grad.shape[-1]), root.x.reshape(-1, root.x.shape[-1])
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            (rows @ root.dense()).reshape(root.x.shape) if need_x else None,
            rows.t() @ x if need_weight else None,
            rows.sum(0) if need_bias else None,
            None,
        )


class _Values(torch.autograd.Function):
    """DeferredLogits -> a plain tensor on the same memory, with the history."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> torch.Tensor:
        return values_of(logits).detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


# Answers from hidden states


@dataclass(frozen=True, kw_only=True)
class _Form:
    """softcap * tanh(scale * logits / softcap), or scale * logits; then log_softmax or not."""

    scale: float
    softcap: float | None
    log_softmax: bool


def _form(logits: DeferredLogits) -> _Form | None:
    """What the noted values' operations come to; None where no op says it, or somebody has to be seen."""
    if logits._root.observed or logits._stale or logits._root.late() or not _unseen(logits):
        return None
    before, scale, tanh, log_softmax = 1.0, 1.0, False, False
    for step in logits._steps:
        if log_softmax and step.rows is None and step.function is not _aten._to_copy.default:
            return None
        if step.function in _SCALES:
            scale *= float(step.args[0]) ** _SCALES[step.function]
        elif step.function is _aten.tanh.default:
            if tanh:
                return None
            before, scale, tanh = scale, 1.0, True
        elif step.function is _aten._log_softmax.default:
            log_softmax = True
    if not tanh:
        return _Form(scale=scale, softcap=None, log_softmax=log_softmax)
    if scale < 0:  # tanh is odd
        before, scale = -before, -scale
    inner = before * scale
    inner = 1.0 if abs(inner - 1) < 1e-12 else inner  # x / 30 -> tanh -> * 30
    return _Form(scale=inner, softcap=scale, log_softmax=log_softmax)


def _unseen(logits: DeferredLogits) -> bool:
    """Whether nothing but the noted operations lies between the logits and their head in autograd's graph.

    DDP and full backward hooks pass an output through a function of their own, which counts on its gradient.
    """
    node = logits.grad_fn
    if node is None:
        return not logits.requires_grad  # a leaf wants a gradient of its own
    for _ in range(len(logits._steps) * 3 + 4):
        if node.name() == "_HeadBackward":
            return True
        before = [item for item, _ in node.next_functions if item is not None]
        if isinstance(node, torch.autograd.function.BackwardCFunction) or len(before) != 1:
            return False
        node = before[0]
    return False


def _ask(kernel: KernelSpec, logits: DeferredLogits, form: _Form, ids: torch.Tensor, **options: Any) -> Any:
    """A kernel's answer for the rows that are left of `logits`, with gradients where these have them."""
    root = logits._root
    wants = torch.is_grad_enabled() and logits.requires_grad
    root.counts["fused"] += 1
    with torch.set_grad_enabled(wants), torch.autocast(root.x.device.type, enabled=False):
        x = _rows(root.x, logits._steps)
        values = dict(bias=root.bias, softcap=form.softcap, scale=form.scale)
        return kernel.function(x, root.weight, ids, **values, **options)


def _result(loss: torch.Tensor, logits: DeferredLogits) -> torch.Tensor:
    """In the dtype that eager gives: float32 under autocast, else the logits' own."""
    autocast = torch.is_autocast_enabled(loss.device.type)
    return loss if autocast or loss.dtype == logits.dtype else loss.to(logits.dtype)


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    negative_log: bool = False,
) -> Any:
    if (
        not isinstance(input, DeferredLogits)
        or type(target) is not torch.Tensor
        or any(option is not None for option in (weight, size_average, reduce))
        or reduction not in ("mean", "sum", "none")
        or input.dim() != 2
        or target.dtype != torch.int64
        or target.shape != input.shape[:1]
        or target.device != input.device
        or (form := _form(input)) is None
        or form.log_softmax != negative_log
    ):
        return NotImplemented
    loss = _ask(
        input._root.kernel,
        input,
        form,
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return _result(loss, input)


def _nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    given = (input, target, weight, size_average, ignore_index, reduce, reduction)
    return _cross_entropy(*given, negative_log=True)


def _gather(input: Any, dim: Any = None, index: Any = None, **options: Any) -> Any:
    if (
        not isinstance(input, DeferredLogits)
        or options
        or type(index) is not torch.Tensor
        or type(dim) is not int
        or dim % input.dim() != input.dim() - 1
        or index.shape[:-1] != input.shape[:-1]
        or (index.shape[-1] > 1 and index.shape[-1] * input._root.x.shape[-1] > input.shape[-1])
        or (form := _form(input)) is None
    ):
        return NotImplemented
    if form.log_softmax and index.shape[-1] == 1:
        if input._root.log_probs is None:
            return NotImplemented
        result = _ask(input._root.log_probs, input, form, index[..., 0])[..., None]
        return result.to(input.dtype)
    picked = _picked(input, index)
    if not form.log_softmax:
        return picked
    normalizer = _logsumexp(input, -1, True)
    return normalizer if normalizer is NotImplemented else (picked - normalizer).to(input.dtype)


def _picked(logits: DeferredLogits, ids: torch.Tensor) -> torch.Tensor:
    """The logits (..., K) of single ids (..., K): dot products, then what was noted for values."""
    root = logits._root
    wants = torch.is_grad_enabled() and logits.requires_grad
    with torch.set_grad_enabled(wants), torch.autocast(root.x.device.type, enabled=False):
        x = _rows(root.x, logits._steps)[..., None, :].float()
        z = (x * root.dense()[ids].float()).sum(-1)
        if root.bias is not None:
            z = z + root.bias[ids].float()
        steps = [s for s in logits._steps if s.rows is None and s.function is not _aten._log_softmax.default]
        return _run(z.to(root.x.dtype), steps)


def _logsumexp(input: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if (
        not isinstance(input, DeferredLogits)
        or options
        or (dim := dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim) is None
        or type(dim) is not int
        or dim % input.dim() != input.dim() - 1
        or input._root.log_probs is None
        or not (
            torch.is_grad_enabled() and input.requires_grad
        )  # without gradients dispatch does it in chunks
        or (form := _form(input)) is None
    ):
        return NotImplemented
    first = torch.zeros(*input.shape[:-1], 1, dtype=torch.int64, device=input.device)
    logarithm = _ask(input._root.log_probs, input, form, first[..., 0])
    result = (_picked(input, first)[..., 0].float() - logarithm).to(input.dtype)
    return result[..., None] if keepdim else result


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    torch.gather: _gather,
    _tensor.gather: _gather,
    torch.logsumexp: _logsumexp,
    _tensor.logsumexp: _logsumexp,
}


# The head's forward


def defer(
    head: nn.Module,
    x: torch.Tensor,
    kernel: KernelSpec,
    log_probs: KernelSpec | None,
    counts: dict[str, int] | None = None,
    strict: bool = False,
) -> torch.Tensor:
    """`head(x)` as DeferredLogits; x (..., H), cast as autocast would cast it."""
    counts = dict.fromkeys(COUNTS, 0) if counts is None else counts
    counts["deferred"] += 1
    weight: Any = head._parameters["weight"]
    bias: Any = head._parameters["bias"]
    shared: dict[str, Any] = dict(kernel=kernel, log_probs=log_probs, counts=counts, strict=strict)
    given: Any = x
    if _is_four_bit(type(head)):
        from sloth_kernels.nf4 import FourBit

        packed: Any = FourBit(packed=weight, state=weight.quant_state)
        weight = None
    else:
        kind, tensors = x.device.type, [x, weight, bias]
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        given, weight, bias = tensors
        packed = weight
    root = _Root(x=given, weight=packed, bias=bias, **shared)
    # What autocast cast is a copy, which no step changes.
    own = head._parameters.values()
    if any(t is not None and t.requires_grad and any(t is p for p in own) for t in (weight, bias)):
        _watch_steps()
        _waiting.add(root)
    if counts["late"]:
        root.unasked()
    return _Head.apply(given, weight, bias, root)  # type: ignore[no-any-return]


# Calls of heads that are trained, since the last step of any optimizer. FSDP and DeepSpeed step on tensors
# other than the parameters, so that it isn't known whose weights a step changes.
_waiting: weakref.WeakSet[_Root] = weakref.WeakSet()


@torch.compiler.disable
def _before_step(*_: Any) -> None:
    for root in list(_waiting):
        root.before_step()


@torch.compiler.disable
def _after_step(*_: Any) -> None:
    for root in list(_waiting):  # also of a forward in a closure, which the step itself calls (Lightning)
        root.stepped = True
    _waiting.clear()


@cache
def _watch_steps() -> None:
    """Once a process: without logits that somebody holds, the hooks do nothing."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _is_four_bit(kind: type) -> bool:
    from sloth_plugins.lora import _FOUR_BIT, _kind  # it imports this module's caller

    return _kind(kind) == _FOUR_BIT


def _head_forward(
    module: nn.Module, kernel: KernelSpec, log_probs: KernelSpec | None, counts: dict[str, int], strict: bool
) -> Forward:
    original, takes = type(module).forward, _takes(kernel)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if kwargs or len(args) != 1 or not _defers(self, args[0], takes):
            counts["own_forward"] += 1
            return original(self, *args, **kwargs)
        return defer(self, args[0], kernel, log_probs, counts, strict)

    return named_like(forward, module)


def _reads_4bit(head: Any, x: Any) -> bool:
    """Whether a Linear4bit computes in x's dtype now, which its first call settles, as here."""
    state = getattr(head._parameters["weight"], "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    if not head.compute_type_is_set:
        head.set_compute_type(x)
        head.compute_type_is_set = True
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return head.compute_dtype in (None, x.dtype) and cast == x.dtype


def _defers(head: nn.Module, x: Any, takes: Callable[[Any], bool]) -> bool:
    """Whether this call's logits may be left out: its model's own forward, in training or with labels."""
    own, four_bit = head._parameters, _is_four_bit(type(head))
    weights = [t for name, t in own.items() if t is not None and not (four_bit and name == "weight")]
    tensors: list[Any] = [x, *weights]
    if (
        any(type(t) not in _TENSORS or t.is_inference() for t in tensors)
        or not takes(x)
        or x.dim() < 2
        or x.numel() == 0
        or torch.is_inference_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or _hooked(head)
        or _hooked_everywhere()
        or not (torch.is_autocast_enabled(x.device.type) or all(t.dtype == x.dtype for t in tensors))
        or any(t.device != x.device for t in own.values() if t is not None)
        or (four_bit and not _reads_4bit(head, x))
        or (frame := _models_forward(head)) is None
    ):
        return False
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return differentiable or _has_labels(frame)


def _models_forward(head: nn.Module) -> FrameType | None:
    """The running forward of the model whose output embedding `head` is.

    From the stack, because the model's own forward is not ours to wrap: accelerate, TRL and FSDP wrap it.
    """
    frame: FrameType | None = sys._getframe(3)
    for _ in range(DEPTH):
        if frame is None:
            return None
        code = frame.f_code
        if code.co_varnames[:1] == ("self",) and frame.f_globals.get("__name__") != _module.__name__:
            get = getattr(frame.f_locals.get("self"), "get_output_embeddings", None)
            if callable(get):
                try:
                    return frame if get() is head else None
                except (AttributeError, NotImplementedError):
                    return None
        frame = frame.f_back
    return None


def _has_labels(frame: FrameType) -> bool:
    given = frame.f_locals
    extra = [value for name, value in given.items() if "kwargs" in name and isinstance(value, dict)]
    return any(
        where.get(name) is not None for where in (given, *extra) for name in ("labels", "shift_labels")
    )


# Planning


def with_head(
    model: nn.Module, context: PlanContext, plans: Sequence[Patch | Skip]
) -> Sequence[Patch | Skip]:
    """`plans` with the patch of each output embedding, or the reason why it is left alone."""
    added: list[Patch | Skip] = []
    for site in context.by_role("lm_head"):
        try:
            added.append(_head_patch(model, site, context))
        except NotASite as reason:
            added.append(Skip(module=site.module, op=OP, reason=str(reason), benign=reason.benign))
    return [*plans, *added]


def _head_patch(model: nn.Module, site: Site, context: PlanContext) -> Patch:
    module: Any = model.get_submodule(site.module)
    if context.settings.head_loss == "off":
        raise NotASite("switched off by the setting head_loss='off'", benign=True)
    if (obstacle := forward_obstacle(module)) is not None:
        raise NotASite(obstacle)
    kind = type(module)
    if kind.__module__.startswith("peft."):
        raise NotASite(f"PEFT's {kind.__qualname__} is around it, so its logits are computed", benign=True)
    if four_bit := _is_four_bit(kind):
        from sloth_kernels.nf4 import FourBit, refuse

        if getattr(module.weight, "quant_state", None) is None:
            raise NotASite("its 4-bit weight is not quantized yet: move the model to its device first")
        if (reason := refuse(FourBit(packed=module.weight, state=module.weight.quant_state))) is not None:
            raise NotASite(reason, benign=True)
    elif kind.forward is not nn.Linear.forward:
        raise NotASite(
            f"it is a {kind.__qualname__}, so its logits are computed; served are nn.Linear and "
            "bitsandbytes' Linear4bit",
            benign=True,
        )
    kernel = context.choose(site, OP)
    try:
        log_probs = context.choose(site, "linear_log_probs")
    except NotASite:
        log_probs = None
    bias, counts = module.bias, dict.fromkeys(COUNTS, 0)
    dtype = context.dtypes[site.module] if four_bit else module.weight.dtype
    return Patch(
        module=site.module,
        op=OP,
        kernel=kernel,
        forwards={site.module: _head_forward(module, kernel, log_probs, counts, context.settings.strict)},
        signature=(
            *(*site.signature, OP, kernel.name, tuple(module.weight.shape), module.weight.dtype),
            *(module.weight.requires_grad, None if bias is None else (bias.dtype, bias.requires_grad)),
            dtype,
        ),
        verify=partial(_verify_head, name=site.module, kernel=kernel, log_probs=log_probs, dtype=dtype),
        counts=counts,
    )


# Verification: the deferred path on the head's first rows; then the model's own loss, fused and not


def _verify_head(
    trial: Trial, *, name: str, kernel: KernelSpec, log_probs: KernelSpec | None, dtype: torch.dtype
) -> list[Comparison]:
    head: Any = trial.module(name)
    calls: list[int] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel.function(*args, **kwargs)

    counted = dataclasses.replace(kernel, function=function)
    width, rows = head.in_features, head.out_features
    four_bit, small, exact = _is_four_bit(type(head)), None, None
    if rows * width > ELEMENTS:
        step = head.weight.quant_state.blocksize if four_bit else 1
        rows = max(16, step, ELEMENTS // width // step * step)
    parameters = {key: p.detach()[:rows] for key, p in head._parameters.items() if p is not None}
    if four_bit:
        from sloth_plugins.lora import _first_rows_4bit

        del parameters["weight"]
        small, exact = _first_rows_4bit(head.weight, rows, width)
    trainable = [key for key, p in head._parameters.items() if p is not None and p.requires_grad]
    labels = torch.randint(0, rows, (TOKENS,), generator=trial.generator, device=trial.device)
    labels[:: TOKENS // 4] = -100

    def logits(patched: bool, x: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
        clone = stand_in(head, {})
        clone.__dict__["_parameters"] = {"weight": leaves.get("weight", small), "bias": leaves.get("bias")}
        out = defer(clone, x, counted, log_probs) if patched else type(head).forward(clone, x)
        return out.float()

    def losses(patched: bool, x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(patched, x, leaves), labels, reduction="none")

    def true_losses(x: torch.Tensor, *, reduction: str = "none", **leaves: torch.Tensor) -> Any:
        weight = leaves.get("weight", exact)
        return kernel.reference(x, weight, labels, bias=leaves.get("bias"), reduction=reduction)

    def gradients_of(mean: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def run(**tensors: torch.Tensor) -> Any:
            wanted = ["x", *trainable]
            tensors = {key: t.detach().requires_grad_(key in wanted) for key, t in tensors.items()}
            return torch.autograd.grad(mean(**tensors), [tensors[key] for key in wanted])

        return run

    def mean(patched: bool, x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits(patched, x, leaves), labels)

    comparisons = []
    for activation in [dtype] if four_bit else trial.dtypes(dtype):
        tensors = {"x": trial.randn(TOKENS, width, dtype=activation), **parameters}
        with trial.context(activation, dtype):
            comparisons += compare(
                partial(losses, True), partial(losses, False), true_losses, tensors, ["x", *trainable]
            )
            comparisons += compare(
                gradients_of(partial(mean, True)),
                gradients_of(partial(mean, False)),
                gradients_of(partial(true_losses, reduction="mean")),
                tensors,
                [],
            )
        if len(calls) != 2:
            raise VerificationError(f"two calls were expected of the kernel and {len(calls)} were made")
        calls.clear()
    forward = _head_forward(head, counted, log_probs, dict.fromkeys(COUNTS, 0), True)
    _verify_models_loss(trial, head, forward, calls)
    return comparisons


def _verify_models_loss(trial: Trial, head: nn.Module, forward: Forward, calls: list[int]) -> None:
    """The model's own loss on a few random tokens is the same with deferred logits, and is computed fused."""
    get: Any = getattr(trial.model, "get_input_embeddings", lambda: None)
    try:
        vocabulary = min(getattr(get(), "num_embeddings", None) or 100, 1000)
        ids = torch.randint(0, vocabulary, (2, 8), generator=trial.generator, device=trial.device)
        labels = ids.clone()
        labels[0, :3] = -100
        with torch.enable_grad():  # as in training: the graph takes part in what is answered fused
            want = trial.model(input_ids=ids, labels=labels).loss.detach()
    except Exception:  # it may need inputs that we can't make up; its trainer may compute the loss
        return
    if not bool(torch.isfinite(want)):  # something else is broken, and has its own line in the report
        return
    before = head.__dict__.get("forward")
    head.__dict__["forward"] = MethodType(forward, head)
    try:
        with torch.enable_grad():
            got = trial.model(input_ids=ids, labels=labels).loss.detach()
    finally:
        del head.__dict__["forward"]
        if before is not None:
            head.__dict__["forward"] = before
    if not calls:
        own = getattr(trial.model.__dict__.get("forward"), "__func__", None)
        if own is not None and own.__globals__.get("__name__", "").startswith("trl."):
            raise NotASite("a forward on the model, of TRL's own head, computes its loss", benign=True)
        raise NotASite("the model's loss is not the cross-entropy of its logits", benign=True)
    dtypes = [p.dtype for p in trial.model.parameters() if p.dtype in FORMULA_TOLERANCE]
    tolerance = max(FORMULA_TOLERANCE[dtype] for dtype in dtypes)
    if not relative_error(got, want) <= tolerance:
        raise VerificationError(
            f"the model's own loss is {got.item():.6g} with it and {want.item():.6g} without"
        )


__all__ = ["DeferredLogits", "with_head"]
