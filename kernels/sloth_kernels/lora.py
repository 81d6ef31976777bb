"""LoRA [1] linear layers that share an input, and whole gated MLPs of them, over frozen weights.

For projections i of one input x (T, K), with weights W_i (N_i, K), adapters A_i (r_i, K), B_i (N_i, r_i) and
scalings s_i:

    P_i  = s_i x A_i^T                   (T, r_i), kept for the backward
    y_i  = x W_i^T + P_i B_i^T + bias_i
    Q_i  = s_i dy_i B_i                  (T, r_i)
    dB_i = dy_i^T P_i                    accumulated in float32, written in the parameter's dtype
    dA_i = Q_i^T x                       likewise
    dx   = sum_i dy_i W_i + Q_i A_i

4-bit weights [2] are expanded for each pass, and there the low-rank term rides in the same matmul: with K
extended by the ranks,

    y  = [x, P] @ [W, B]^T               one rounding, from float32, of the whole sum
    dx = [dy, Q] @ [W; A]

so that no pass over an output remains, and a small update is not lost against an already rounded output.
Weights in 16 or 32 bits stay where they are: the low-rank term is written first and the matmul adds to it.

The MLP, y = down(act(gate(x)) * up(x)), keeps gate and up, and computes their product again in the backward.
Their gradients take their place there, since nobody else has them (`_is_private`).

[1] Hu et al., LoRA, arXiv:2106.09685
[2] Dettmers et al., QLoRA, arXiv:2305.14314
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils import checkpoint

from sloth_kernels._library import (
    INTERPRETED,
    differentiable_gradients,
    launch,
    tl,
    triton,
    wants_graph,
)
from sloth_kernels._streams import Side, current_stream, on
from sloth_kernels.gated_activation import (
    ACTIVATIONS,
    as_matrix,
    gated_activation_fwd_into,
    gated_activation_reference,
)
from sloth_kernels.low_rank import (
    Dropout,
    activated_narrow,
    activated_tall,
    ceil_div,
    dropped,
    masked_add,
    narrow_matmul,
    takes,
    tall_matmul,
)
from sloth_kernels.nf4 import Extension, FourBit, Part, expand_4bit, expand_4bit_reference

Weight = torch.Tensor | FourBit
# A slot of an adapter in a group's buffers: ranks are padded with zeros so that rows stay 16-byte aligned.
RANK_ALIGNMENT = 8
ROW_ALIGNMENT = 64
# Whether the weights of a part of an MLP are expanded while the matmul before runs.
PREFETCH = True
TENSORS_A_PROJECTION = 4  # a, b, adapter bias, bias
MOST_KNOWN = 16  # of the calls that a projection was the first of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Adapter:
    """One LoRA: y += scaling * dropout(x) @ a.T @ b.T + scaling * bias.

    a: (r, K), b: (N, r), bias: (N,) or None; float32, bfloat16 or float16. dropout: probability of a zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float = 0.0
    bias: torch.Tensor | None = None
    kind: tuple[Any, ...] = field(init=False)
    """What a and b were when this was made: their dtypes and shapes, which may change by `.data`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", (self.a.dtype, self.b.dtype, self.a.shape, self.b.shape))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Projection:
    """A frozen linear layer with at most one LoRA. weight: (N, K), a tensor or a FourBit; bias: (N,).

    Who passes the same objects again, because nothing has changed, saves the work of looking at them again.
    """

    weight: Weight
    bias: torch.Tensor | None = None
    adapter: Adapter | None = None
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


class _Slot(NamedTuple):
    """What a group knows of one projection: rows of the joint weight, columns of the joint low-rank term; and
    which of the group's runs its adapter is in."""

    weight: Weight
    start: int
    width: int
    column: int
    padded: int
    rank: int
    scaling: float
    run: int


class _Kept:
    """A group's expanded weights, with room for the factors of its adapters, from one pass to the next."""

    __slots__ = ("filled", "joint", "of", "stored")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Free the memory, once nothing that was launched needs it."""
        self.joint: torch.Tensor | None = None
        self.of: tuple[Any, ...] = ()
        self.stored: list[torch.Tensor] = []
        """What the weights are expanded from, held so that nothing else gets their place in memory."""
        self.filled = False
        """Whether the weights are in the buffer."""

    def buffer(self, group: _Group, x: torch.Tensor) -> torch.Tensor:
        """The buffer; not `filled` where the weights have changed since, or are other ones."""
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' Params4bit looks at each call otherwise
            stored = [t for slot in group.slots for t in _stored_tensors(slot.weight)]
            of = x.dtype, x.device, group.columns, *((id(t), t.data_ptr(), t._version) for t in stored)
        if self.joint is None or of != self.of:
            self.clear()
            self.joint = torch.empty((group.n + group.columns, group.row), dtype=x.dtype, device=x.device)
            self.of, self.stored = of, stored
        return self.joint


class Expanded:
    """Expanded 4-bit weights of one `lora_linear` or `lora_mlp`, kept between its calls and their backwards.

    For who has the memory: 2 bytes a weight in 16 bits. One object for the same projections each time; others
    take the place of the first. Weights that are changed in place are noticed by PyTorch's version counter,
    which what is written through `.data` does not count.
    """

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first, self.last = _Kept(), _Kept()

    def clear(self) -> None:
        """Drop what is kept; the next call expands again."""
        self.first.clear()
        self.last.clear()


def _stored_tensors(weight: Weight) -> list[torch.Tensor]:
    assert isinstance(weight, FourBit)
    inner = weight.state.state2
    nested = [] if inner is None else [inner.absmax, weight.state.offset]
    return [weight.packed, weight.state.absmax, *nested]


class _Run(NamedTuple):
    """Adapters of a group, [first, last) by number, whose columns [start, stop) one kernel serves.

    scaling and dropout (the probability of a zero) are the same for all; with dropout, `width` is too.
    """

    first: int
    last: int
    start: int
    stop: int
    width: int
    scaling: float
    dropout: float

    def masks(self, seeds: torch.Tensor | None) -> Dropout | None:
        """The adapters' dropout, or None for none."""
        if seeds is None or not self.dropout:
            return None
        return Dropout(p=self.dropout, seeds=seeds[self.first : self.last], width=self.width)


class _View(NamedTuple):
    """A block of a matrix as `as_strided` gives it: at once, where slices and a transposition are three steps
    with as many tensors."""

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: int


class _Views(NamedTuple):
    """The blocks of an extended weight, [W_i | B_i] over A.

    a: A. down: W over A, of all; without A where an adapter's input is dropped. right: [W | B].T of all, and
    rights of each projection. b: B.T of each projection, and of_runs of each run for all projections.
    """

    a: _View
    down: _View
    right: _View
    rights: tuple[_View, ...]
    b: tuple[_View, ...]
    of_runs: tuple[_View, ...]


class _Group(NamedTuple):
    """Projections of one input.

    extended: the low-rank terms ride in the matmuls of expanded weights. wide: the small matmuls run in
    float32, since outside autocast eager runs them in the adapters' dtype, which is not the activations'.
    fused: Triton kernels are used, else PyTorch's operators. kept: where expanded weights stay, if they do.
    row: elements from row to row of an extended weight or input. dropout: whether any adapter's input is
    dropped. biased: whether any layer or adapter has a bias.
    """

    slots: tuple[_Slot, ...]
    runs: tuple[_Run, ...]
    k: int
    n: int
    columns: int
    row: int
    dropout: bool
    biased: bool
    extended: bool
    wide: bool
    fused: bool
    extension: Extension | None
    views: _Views | None
    kept: _Kept | None = None

    def seeds(self, device: torch.device) -> torch.Tensor | None:
        """New seeds, one an adapter, from the device's generator, which checkpointing sets back."""
        if not self.dropout:
            return None
        return torch.randint(2**62, (self.runs[-1].last,), device=device)


# Packing the factors of dense weights


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    rows_ptr,
    columns_ptr,
    rank,
    a_stride,
    b_stride,
    rows_stride,
    columns_stride,
    first,
    last,
    N,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a (rank, K) into rows, b into rows [first, last) of N; zeros in the rest of both."""
    a_programs: tl.constexpr = (PADDED * K + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < a_programs:
        at = program * BLOCK + tl.arange(0, BLOCK)
        row = at // K
        k = at - row * K
        value = tl.load(a_ptr + row.to(tl.int64) * a_stride + k, mask=row < rank, other=0.0).to(tl.float32)
        to = rows_ptr + row.to(tl.int64) * rows_stride + k
        tl.store(to, value.to(rows_ptr.dtype.element_ty), mask=at < PADDED * K)
    else:
        at = (program - a_programs) * BLOCK + tl.arange(0, BLOCK)
        row = at // PADDED
        column = at - row * PADDED
        own = (row >= first) & (row < last) & (column < rank)
        # Another name: a of another dtype may have been loaded in the other branch.
        b = tl.load(b_ptr + (row - first).to(tl.int64) * b_stride + column, mask=own, other=0.0)
        b_to = columns_ptr + row.to(tl.int64) * columns_stride + column
        tl.store(b_to, b.to(columns_ptr.dtype.element_ty), mask=row < N)


def _pack(
    rows: torch.Tensor,
    columns: torch.Tensor,
    slot: _Slot,
    a: torch.Tensor,
    b: torch.Tensor,
    first: int,
    fused: bool,
) -> None:
    """a into rows (padded, K), b into columns (n, padded) from row `first` on; zeros elsewhere."""
    last = first + slot.width
    if not (fused and takes(rows)) or a.stride(1) != 1 or b.stride(1) != 1:
        rows[: slot.rank] = a
        rows[slot.rank :] = 0
        columns.zero_()
        columns[first:last, : slot.rank] = b
        return
    (padded, k), n, block = rows.shape, columns.shape[0], 1024
    launch(
        _pack_kernel,
        (ceil_div(padded * k, block) + ceil_div(n * padded, block),),
        a,
        b,
        rows,
        columns,
        slot.rank,
        a.stride(0),
        b.stride(0),
        rows.stride(0),
        columns.stride(0),
        first,
        last,
        n,
        K=k,
        PADDED=padded,
        BLOCK=block,
        num_warps=4,
    )


# Groups


class _Buffers(NamedTuple):
    """A group's weights for one pass: joint (extended), or the low-rank factors alone."""

    joint: torch.Tensor | None
    rows: torch.Tensor
    columns: tuple[torch.Tensor, ...] | None

    def factors(self, group: _Group, i: int) -> torch.Tensor:
        """B.T of the i-th projection (padded, N)."""
        if self.columns is not None:
            return self.columns[i].t()
        assert self.joint is not None and group.views is not None
        return self.joint.as_strided(*group.views.b[i])


class _Ahead:
    """Buffers of the next group, expanded on a side stream while a large matmul runs on the main one.

    A matmul's last wave of tiles leaves most of the card idle; the expansion, launched after it, fills that.
    """

    def __init__(self, group: _Group, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> None:
        self.group, self.x, self.tensors = group, x, tensors
        self.works = PREFETCH and group.extended and x.is_cuda and group.kept is None
        self.buffers: _Buffers | None = None

    def before(self) -> None:
        """To be called before the matmul is launched: what the memory held until then is done with."""
        if self.works:
            group, x = self.group, self.x
            self.joint = torch.empty((group.n + group.columns, group.row), dtype=x.dtype, device=x.device)
            self.side = _side(x.device)
            self.side.wait()

    def after(self) -> None:
        """To be called after it."""
        if self.works:
            with on(self.side.stream):
                self.buffers = _buffers(self.group, self.x, self.tensors, self.joint)
            self.done = self.side.stream.record_event()

    def result(self) -> _Buffers:
        """The buffers, for what the main stream does from now on."""
        buffers, self.buffers = self.buffers, None
        if buffers is None:
            return _buffers(self.group, self.x, self.tensors)
        current_stream(self.x.device).wait_event(self.done)
        return buffers

    def __del__(self) -> None:
        if self.buffers is not None:  # an exception came between: nobody gets this memory before it is filled
            current_stream(self.x.device).wait_event(self.done)


_side = functools.cache(Side)  # one a device


def _dense(weight: Weight, dtype: torch.dtype, fused: bool) -> torch.Tensor:
    """A weight (N, K) in `dtype`, the tensor itself where it has that."""
    if isinstance(weight, FourBit):
        if fused and (weight.device.type == "cuda" or INTERPRETED):
            return expand_4bit(weight, torch.empty(weight.shape, dtype=dtype, device=weight.device))
        return expand_4bit_reference(weight).to(dtype)
    return weight.detach().to(dtype)


def _buffers(
    group: _Group,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    joint: torch.Tensor | None = None,
) -> _Buffers:
    """Expand and pack what a pass over a group needs; `joint`: where to, for an extended group."""
    step = TENSORS_A_PROJECTION
    factors = [*zip(tensors[::step], tensors[1::step], strict=True)]
    if group.extension is not None:
        assert group.views is not None
        kept = group.kept
        if kept is not None:
            joint = kept.buffer(group, x)
        elif joint is None:
            joint = torch.empty((group.n + group.columns, group.row), dtype=x.dtype, device=x.device)
        rows = joint.as_strided(*group.views.a)
        there = kept is not None and kept.filled
        if group.extension.fill(joint, factors, weights=not there):
            if kept is not None:
                kept.filled = True
            return _Buffers(joint, rows, None)
        right = joint[: group.n, group.k : group.k + group.columns]
        columns = tuple(right[:, slot.column : slot.column + slot.padded] for slot in group.slots)
        for slot in () if there else group.slots:
            assert isinstance(slot.weight, FourBit)
            expand_4bit(slot.weight, joint[slot.start : slot.start + slot.width, : group.k])
        if kept is not None:
            kept.filled = True
    else:
        dtype = torch.float32 if group.wide else x.dtype
        rows = torch.empty((group.columns, group.k), dtype=dtype, device=x.device)
        columns = tuple(
            torch.empty((slot.width, slot.padded), dtype=dtype, device=x.device) for slot in group.slots
        )
    for slot, own, (a, b) in zip(group.slots, columns, factors, strict=True):
        if slot.rank:
            assert a is not None and b is not None
            part = rows[slot.column : slot.column + slot.padded]
            _pack(part, own, slot, a, b, slot.start if group.extended else 0, group.fused)
    return _Buffers(joint, rows, None if joint is not None else columns)


def _narrow(
    group: _Group,
    run: _Run,
    x: torch.Tensor,
    w: torch.Tensor,
    copy: torch.Tensor | None = None,
    extension: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    return narrow_matmul(x, w, copy, extension, scale=run.scaling, dropout=dropout, fused=group.fused)


def _low_rank(
    group: _Group,
    seeds: torch.Tensor | None,
    rows: torch.Tensor,
    x: torch.Tensor,
    extended_x: torch.Tensor | None,
) -> torch.Tensor:
    """P (T, columns) = s D(x) A^T of all adapters, in one pass over x where they are of one kind.

    extended_x: gets x and P beside it.
    """
    if group.wide:
        x = x.float()
    parts = []
    several = len(group.runs) > 1
    for i, run in enumerate(group.runs):
        copy = tail = None
        if extended_x is not None:
            copy = None if i else extended_x[:, : group.k]
            tail = extended_x[:, group.k + run.start : group.k + run.stop]
        own = rows[run.start : run.stop] if several else rows
        parts.append(_narrow(group, run, x, own, copy, tail, dropout=run.masks(seeds)))
    return torch.cat(parts, 1) if several else parts[0]


def _group_forward(
    group: _Group,
    seeds: torch.Tensor | None,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    *,
    together: bool = False,
    extended_x: torch.Tensor | None = None,
    buffers: _Buffers | None = None,
    ahead: _Ahead | None = None,
    into: torch.Tensor | None = None,
    p: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """([y_i], P); `together` puts the outputs of an extended group without biases into one buffer, the first
    columns of `into` if it is given. x: (T, K).

    p: P where it is known. extended_x: (T, row), then with [x, P] in its first columns. ahead: to expand
    during a joint matmul.
    """
    buffers = buffers or _buffers(group, x, tensors)
    biases: list[torch.Tensor | None] = [None] * len(group.slots)
    if group.biased:
        biases = [_bias(slot, tensors, i, x.dtype) for i, slot in enumerate(group.slots)]
    if group.extended:
        assert buffers.joint is not None and group.views is not None
        left = x
        if group.columns:
            if p is None:
                extended_x = torch.empty((x.shape[0], group.row), dtype=x.dtype, device=x.device)
                p = _low_rank(group, seeds, buffers.rows, x, extended_x)
            assert extended_x is not None
            left = extended_x[:, : group.k + group.columns]
        if together and not group.biased:
            if ahead is not None:
                ahead.before()
            right = buffers.joint.as_strided(*group.views.right)
            y = left @ right if into is None else torch.mm(left, right, out=into[:, : group.n])
            if ahead is not None:
                ahead.after()
            return _outputs(group, y), p
        outputs = []
        for view, bias in zip(group.views.rights, biases, strict=True):
            right = buffers.joint.as_strided(*view)
            outputs.append(left @ right if bias is None else torch.addmm(bias, left, right))
        return outputs, p
    if group.columns and p is None:
        p = _low_rank(group, seeds, buffers.rows, x, None)
    outputs = []
    for i, (slot, bias) in enumerate(zip(group.slots, biases, strict=True)):
        weight = _dense(slot.weight, x.dtype, group.fused).t()
        if slot.rank:
            assert p is not None
            low, factors = p[:, slot.column : slot.column + slot.padded], buffers.factors(group, i)
            y = low @ factors if bias is None else torch.addmm(bias.to(low.dtype), low, factors)
            y = y.to(x.dtype).addmm_(x, weight)
        else:
            y = x @ weight if bias is None else torch.addmm(bias, x, weight)
        outputs.append(y)
    return outputs, p


def _bias(
    slot: _Slot, tensors: Sequence[torch.Tensor | None], i: int, dtype: torch.dtype
) -> torch.Tensor | None:
    low, base = tensors[i * TENSORS_A_PROJECTION + 2], tensors[i * TENSORS_A_PROJECTION + 3]
    if low is None:
        return None if base is None else base.to(dtype)
    total = low.float() * slot.scaling
    return (total if base is None else total + base.float()).to(dtype)


def _gradient_buffer(group: _Group, rows: int, like: torch.Tensor) -> torch.Tensor:
    """(rows, n and the low-rank columns): where the gradients of all outputs lie side by side."""
    width = group.n + ceil_div(group.columns, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty((rows, width), dtype=like.dtype, device=like.device)


class _Pass(NamedTuple):
    """What a group's backward has once it knows the gradients of its outputs."""

    grads: list[torch.Tensor]
    q: torch.Tensor | None
    dx: torch.Tensor | None
    rows: torch.Tensor | None


def _input_gradient(
    group: _Group,
    seeds: torch.Tensor | None,
    rows: int,
    like: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    *,
    needs_x: bool,
    joint: torch.Tensor | None = None,
    masked: bool = True,
    buffers: _Buffers | None = None,
    ahead: _Ahead | None = None,
) -> _Pass:
    """dx (rows, K) and Q from the gradients of the outputs; `joint`: the buffer where these lie already.

    masked: False leaves out of dx what comes through adapters whose input is dropped. ahead: to expand
    during the matmul.
    """
    buffers = buffers or _buffers(group, like, tensors)
    dropout = group.dropout
    given = [
        torch.zeros((rows, slot.width), dtype=like.dtype, device=like.device) if g is None else g
        for slot, g in zip(group.slots, grads, strict=True)
    ]
    q: torch.Tensor | None = None
    dx: torch.Tensor | None = None
    if group.extended:
        assert buffers.joint is not None and group.views is not None
        end = group.n + group.columns
        if joint is not None:
            for run, view in zip(group.runs, group.views.of_runs, strict=True):
                to = joint[:, group.n + run.start : group.n + run.stop]
                _narrow(group, run, joint[:, : group.n], buffers.joint.as_strided(*view), extension=to)
        elif group.columns or len(group.slots) > 1:
            joint = _gradient_buffer(group, rows, like)
            for i, (slot, g) in enumerate(zip(group.slots, given, strict=True)):
                own = slice(slot.start, slot.start + slot.width)
                if slot.rank:  # Q, and the gradient's way into the buffer, in one pass
                    to = joint[:, group.n + slot.column : group.n + slot.column + slot.padded]
                    factors = buffers.factors(group, i)
                    _narrow(group, group.runs[slot.run], g, factors, joint[:, own], to)
                else:
                    joint[:, own] = g
        if joint is not None and group.columns:
            q = joint[:, group.n : end]
        if ahead is not None:
            ahead.before()
        if needs_x:
            left = given[0] if joint is None else joint[:, : group.n if dropout else end]
            dx = left @ buffers.joint.as_strided(*group.views.down)
        if ahead is not None:
            ahead.after()
    else:
        if group.columns:
            q = torch.empty((rows, group.columns), dtype=buffers.rows.dtype, device=like.device)
            for i, slot in enumerate(group.slots):
                if slot.rank:
                    target = q[:, slot.column : slot.column + slot.padded]
                    run, factors = group.runs[slot.run], buffers.factors(group, i)
                    target.copy_(_narrow(group, run, given[i].to(q.dtype), factors))
            if needs_x and not dropout:
                dx = (q @ buffers.rows).to(like.dtype)
        if needs_x:
            for slot, g in zip(group.slots, given, strict=True):
                weight = _dense(slot.weight, like.dtype, group.fused)
                dx = g @ weight if dx is None else dx.addmm_(g, weight)
    if dropout and masked and dx is not None:
        assert q is not None
        for run in group.runs:
            terms, factors = q[:, run.start : run.stop], buffers.rows[run.start : run.stop]
            masks = run.masks(seeds)
            if masks is None:
                dx += (terms @ factors).to(dx.dtype)
            else:
                dx = masked_add(dx, terms, factors, masks, fused=group.fused)
    return _Pass(given, q, dx, buffers.rows)


def _adapter_gradients(
    group: _Group,
    seeds: torch.Tensor | None,
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    p: torch.Tensor | None,
    done: _Pass,
    needs: Sequence[bool],
    known: Sequence[torch.Tensor | None] = (),
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor | None]:
    """dA, dB, dbias of every adapter and of the layers' own biases, as far as they are needed. x: (T, K).

    known: gradients that have been computed already, in the places of `tensors`. dtype: theirs, where it is
    not the tensors' own.
    """
    result = list(known) or [None] * len(tensors)
    step = TENSORS_A_PROJECTION
    das: dict[int, torch.Tensor] = {}
    for number, run in enumerate(group.runs):
        wanted = [
            i
            for i, slot in enumerate(group.slots)
            if slot.rank and slot.run == number and needs[i * step] and result[i * step] is None
        ]
        if not wanted:
            continue
        assert done.q is not None
        dtypes = {dtype or tensor.dtype for i in wanted if (tensor := tensors[i * step]) is not None}
        together = tall_matmul(
            x.to(done.q.dtype),
            done.q[:, run.start : run.stop] if len(group.runs) > 1 else done.q,
            transposed=True,
            dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
            dropout=run.masks(seeds),
            fused=group.fused,
        )
        for i in wanted:
            first = group.slots[i].column - run.start
            das[i] = together[first : first + group.slots[i].rank]
    for i, slot in enumerate(group.slots):
        first = i * step
        a, b = tensors[first], tensors[first + 1]
        grad = done.grads[i]
        if i in das:
            assert a is not None
            result[first] = das[i].to(dtype or a.dtype)
        if slot.rank and needs[first + 1] and result[first + 1] is None:
            assert b is not None and p is not None
            result[first + 1] = tall_matmul(
                grad.to(p.dtype),
                _own(p, slot),
                transposed=False,
                dtype=dtype or b.dtype,
                fused=group.fused,
            )
        for offset, scale in ((2, slot.scaling), (3, 1.0)) if group.biased else ():
            target = tensors[first + offset]
            if needs[first + offset] and target is not None:
                result[first + offset] = (grad.sum(0, dtype=torch.float32) * scale).to(dtype or target.dtype)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: _Group, *tensors: torch.Tensor | None) -> Any:
        seeds = group.seeds(x.device)
        outputs, p = _group_forward(group, seeds, as_matrix(x), tensors)
        ctx.group = group
        ctx.save_for_backward(x, p, seeds, *tensors)
        ctx.set_materialize_grads(False)
        shaped = tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)
        needs, step = ctx.needs_input_grad, TENSORS_A_PROJECTION
        if not needs[0]:
            ctx.mark_non_differentiable(
                *(y for i, y in enumerate(shaped) if not any(needs[2 + i * step : 2 + (i + 1) * step]))
            )
        return shaped

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        x, p, seeds, *tensors = ctx.saved_tensors
        group, needs = ctx.group, ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return None, None, *([None] * len(tensors))
        if wants_graph():
            filled = [
                x.new_zeros(*x.shape[:-1], slot.width) if g is None else g
                for slot, g in zip(group.slots, grads, strict=True)
            ]
            reference = functools.partial(_flat_reference, group, seeds)
            dx, *rest = differentiable_gradients(reference, (x, *tensors), filled)
            return dx, None, *rest
        rows = as_matrix(x)
        flat = [None if g is None else as_matrix(g) for g in grads]
        done = _input_gradient(group, seeds, rows.shape[0], rows, tensors, flat, needs_x=needs[0])
        found = _adapter_gradients(group, seeds, rows, tensors, p, done, needs[2:])
        return None if done.dx is None else done.dx.view(x.shape), None, *found


def _down_low_rank(
    last: _Group,
    seeds: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    tensors: Sequence[torch.Tensor | None],
    fused: bool,
    hidden: torch.Tensor | None = None,
    extension: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """P of down, and y = act(gate) * up into `hidden` (T, I) on the way; extension: gets P too."""
    if not last.columns:
        if hidden is not None:
            gated_activation_fwd_into(hidden, gate, up, activation, fused=fused)
        return None
    a, (run,) = tensors[0], last.runs
    assert a is not None
    if not last.wide:
        return activated_narrow(
            *(gate, up, a, last.columns, hidden, extension),
            activation=activation,
            scale=run.scaling,
            dropout=run.masks(seeds),
            fused=fused,
        )
    if hidden is None:
        hidden = torch.empty((len(gate), last.k), dtype=gate.dtype, device=gate.device)
    gated_activation_fwd_into(hidden, gate, up, activation, fused=fused)
    rows = torch.zeros((last.columns, last.k), dtype=torch.float32, device=gate.device)
    rows[: a.shape[0]] = a
    return _low_rank(last, seeds, rows, hidden, None)


def _mlp_down(
    last: _Group,
    seeds: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    tensors: Sequence[torch.Tensor | None],
    ahead: _Ahead | None,
    buffers: _Buffers | None,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, P of down) from gate(x) and up(x)."""
    width = last.row if last.extended else last.k
    extended = torch.empty((gate.shape[0], width), dtype=gate.dtype, device=gate.device)
    hidden = extended[:, : last.k]
    tail = extended[:, last.k : last.k + last.columns] if last.extended and last.columns else None
    p = _down_low_rank(last, seeds, gate, up, activation, tensors, fused, hidden, tail)
    (y,), _ = _group_forward(
        *(last, seeds, hidden, tensors),
        extended_x=extended if last.extended else None,
        buffers=ahead.result() if ahead is not None else buffers,
        p=p,
    )
    return y, p


def _watched() -> bool:
    """Whether somebody looks at operators and may keep their results, as selective checkpointing does."""
    return torch._C._len_torch_dispatch_stack() > 0


def _is_private() -> bool:
    """Whether what is saved now comes back in the backward with nobody else to read it later: no dispatch
    mode that might hold it, and no hooks on saved tensors but checkpointing's, which are torch's and those
    with an attribute `private`."""
    if _watched():
        return False
    try:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    except Exception:  # of a PyTorch that we don't know
        return False
    if hooks is None:
        return True
    theirs = getattr(hooks[0], "__module__", None) == checkpoint.__name__
    return theirs or getattr(hooks[0], "private", False)


def _outputs(group: _Group, y: torch.Tensor) -> list[torch.Tensor]:
    """Those of each projection, side by side in y."""
    return [y[:, slot.start : slot.start + slot.width] for slot in group.slots]


def _joint_buffer(group: _Group, x: torch.Tensor) -> torch.Tensor | None:
    """For the outputs of gate and up of x (T, K), where their gradients will be; None for a group whose
    outputs are made one by one."""
    return _gradient_buffer(group, len(x), x) if group.extended and not group.biased else None


class _Saved(NamedTuple):
    """What the backward of some rows of an MLP starts from."""

    x: torch.Tensor
    p: torch.Tensor | None
    gate: torch.Tensor
    up: torch.Tensor
    p_last: torch.Tensor | None
    seeds: torch.Tensor | None
    last_seeds: torch.Tensor | None


def _mlp_gradients(
    first: _Group,
    last: _Group,
    activation: str,
    saved: list[_Saved],
    tensors: Sequence[torch.Tensor | None],
    grad: torch.Tensor,
    needs_x: bool,
    needs: Sequence[bool],
    buffers: tuple[_Buffers, _Buffers] | None = None,
    dtype: torch.dtype | None = None,
    joint: torch.Tensor | None = None,
    in_place: bool = False,
    prefetch: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """(dx, the gradients of `tensors`); saved: one, which is taken out, so that gate and up go when they are
    done with; buffers: of both groups, else they are expanded here; dtype: of the gradients of `tensors`,
    where it is not their own; in_place: nobody else has gate and up, so their gradients take their place
    (joint: where they lie side by side); prefetch: whether gate and up are expanded ahead."""
    x, p, gate, up, p_last, seeds, last_seeds = saved.pop()
    step = TENSORS_A_PROJECTION
    ours, theirs = tensors[:-step], tensors[-step:]
    ahead = _Ahead(first, x, ours) if prefetch else None
    tail = _input_gradient(
        *(last, last_seeds, x.shape[0], x, theirs, [grad]),
        needs_x=True,
        masked=False,
        ahead=ahead,
        buffers=None if buffers is None else buffers[1],
    )
    masks = last.runs[0].masks(last_seeds) if last.runs else None
    if masks is None:
        tail = tail._replace(rows=None)  # a part of down's expanded weight, which goes with it
    assert tail.dx is not None
    width = gate.shape[1]
    if in_place and (joint is not None or not first.extended):
        dgate, dup = gate, up
    elif first.extended:
        joint = _gradient_buffer(first, x.shape[0], x)
        dgate, dup = joint[:, :width], joint[:, width : 2 * width]
    else:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    of_rank = [tensors[i] for i in (2 * step, 1, step + 1)]  # A of down, B of gate, B of up
    dtypes = {dtype or t.dtype for t in of_rank if t is not None}
    low = [
        None if p is None or not slot.rank or not needs[i * step + 1] else _own(p, slot)
        for i, slot in enumerate(first.slots)
    ]
    q_wanted = tail.q is not None and (needs[2 * step] or masks is not None)
    da, *dbs = activated_tall(
        *(dgate, dup, tail.dx, gate, up),
        tail.q if q_wanted else None,
        tail.rows,
        low,
        activation=activation,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        dropout=masks,
        fused=first.fused,
    )
    if da is not None:
        da = da[: last.slots[0].rank]
    da, *dbs = (
        None if t is None or own is None else t.to(dtype or own.dtype)
        for t, own in zip((da, *dbs), of_rank, strict=True)
    )
    tail = tail._replace(dx=None)
    del gate, up
    found_last = _adapter_gradients(
        *(last, last_seeds, x, theirs, p_last, tail, needs[2 * step :]),
        known=[da if needs[2 * step] else None, None, None, None],
        dtype=dtype,
    )
    del tail
    done = _input_gradient(
        *(first, seeds, x.shape[0], x, ours, [dgate, dup]),
        needs_x=needs_x,
        joint=joint,
        buffers=ahead.result() if ahead is not None else buffers[0] if buffers is not None else None,
    )
    found = _adapter_gradients(
        *(first, seeds, x, ours, p, done, needs[: 2 * step]),
        known=[None, dbs[0], None, None, None, dbs[1], None, None],
        dtype=dtype,
    )
    return done.dx, [*found, *found_last]


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        first: _Group,
        last: _Group,
        activation: str,
        output: bool,
        *tensors: torch.Tensor | None,
    ) -> Any:
        rows = as_matrix(x)
        seeds, last_seeds = first.seeds(x.device), last.seeds(x.device)
        ours, theirs = tensors[:-TENSORS_A_PROJECTION], tensors[-TENSORS_A_PROJECTION:]
        ahead = _Ahead(last, rows, theirs) if output else None
        joint = _joint_buffer(first, rows)
        watched = _watched()  # who gives a result back does not write it to `out`
        into = None if watched else joint
        (gate, up), p = _group_forward(first, seeds, rows, ours, together=True, ahead=ahead, into=into)
        if watched and joint is not None:
            gate, up = (own.copy_(y) for own, y in zip(_outputs(first, joint), (gate, up), strict=True))
        if output:
            y, p_last = _mlp_down(last, last_seeds, gate, up, activation, theirs, ahead, None, first.fused)
        else:
            y = x.new_zeros(rows.shape[0], last.n)
            p_last = _down_low_rank(last, last_seeds, gate, up, activation, theirs, first.fused)
        ctx.first, ctx.last, ctx.activation, ctx.spent = first, last, activation, False
        ctx.in_place = _is_private() and (joint is not None or not first.extended)
        made = (gate, up) if joint is None else (joint, None)
        ctx.save_for_backward(x, p, *made, p_last, seeds, last_seeds, *tensors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, p, gate, up, p_last, seeds, last_seeds, *tensors = ctx.saved_tensors
        first, last = ctx.first, ctx.last
        if wants_graph():
            reference = functools.partial(_flat_mlp_reference, first, last, seeds, last_seeds, ctx.activation)
            dx, *rest = differentiable_gradients(reference, (x, *tensors), [grad])
            return dx, *[None] * 4, *rest
        rows = as_matrix(x)
        if ctx.in_place:  # what is written there is no change that autograd should complain about
            gate, up = gate.data, None if up is None else up.data
        joint = gate if up is None else None
        if joint is not None:
            gate, up = _outputs(first, joint)
        if ctx.spent:  # by a backward before this one
            ours = tensors[:-TENSORS_A_PROJECTION]
            (gate, up), _ = _group_forward(first, seeds, rows, ours, together=True, into=joint)
        ctx.spent = ctx.in_place
        saved = [_Saved(rows, p, gate, up, p_last, seeds, last_seeds)]
        del gate, up
        needs = ctx.needs_input_grad
        dx, found = _mlp_gradients(
            *(first, last, ctx.activation, saved, tensors, as_matrix(grad)),
            needs[0],
            needs[5:],
            joint=joint if ctx.in_place else None,
            in_place=ctx.in_place,
        )
        return None if dx is None else dx.view(x.shape), *[None] * 4, *found


class _LoraMLPAgain(torch.autograd.Function):
    """_LoraMLP in tiles of rows that keeps x and P of down: gate and up of a tile are made again when its
    gradients are.

    Both groups are expanded once a pass; for one tile, when they are wanted. Sums over tiles are in float32.
    Where it is `repeated`, the backward is the first call's, with what the repetition saves: P of down is
    held, not saved, and without `output` nothing is left to do in the forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        first: _Group,
        last: _Group,
        activation: str,
        tile: int,
        output: bool,
        repeated: bool,
        *tensors: torch.Tensor | None,
    ) -> Any:
        rows = as_matrix(x)
        parts = rows.split(tile)
        ours, theirs = tensors[:-TENSORS_A_PROJECTION], tensors[-TENSORS_A_PROJECTION:]
        ctx.first, ctx.last, ctx.activation, ctx.tile, ctx.held = first, last, activation, tile, None
        if not output:
            seeds = [group.seeds(x.device) for _ in parts for group in (first, last)]
            ctx.save_for_backward(x, *[None] * len(parts), *seeds, *tensors)
            return x.new_zeros(*x.shape[:-1], last.n)
        several = len(parts) > 1
        # In one piece each group expands its own weights, which go when its matmul is launched.
        of_first = _buffers(first, rows, ours) if several else None
        of_last = _buffers(last, rows, theirs) if several else None
        made, low = [], []
        seeds = []
        for part in parts:
            own = first.seeds(x.device), last.seeds(x.device)
            (gate, up), _ = _group_forward(first, own[0], part, ours, together=True, buffers=of_first)
            y, p = _mlp_down(last, own[1], gate, up, activation, theirs, None, of_last, first.fused)
            del gate, up
            made.append(y)
            low.append(p)
            seeds.extend(own)
        if repeated:
            ctx.held, low = low, [None] * len(parts)
        ctx.save_for_backward(x, *low, *seeds, *tensors)
        y = made[0] if len(made) == 1 else torch.cat(made)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        first, last, activation, needs = ctx.first, ctx.last, ctx.activation, ctx.needs_input_grad
        rows, grads = as_matrix(x), as_matrix(grad)
        parts = rows.split(ctx.tile)
        low, seeds, tensors = saved[: len(parts)], saved[len(parts) : 3 * len(parts)], saved[3 * len(parts) :]
        low = ctx.held or low
        pairs = list(zip(seeds[::2], seeds[1::2], strict=True))
        if wants_graph():

            def reference(x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
                outs = [
                    _flat_mlp_reference(first, last, *pair, activation, part, *tensors)
                    for pair, part in zip(pairs, as_matrix(x).split(ctx.tile), strict=True)
                ]
                return torch.cat(outs).view(*x.shape[:-1], outs[0].shape[-1])

            dx, *rest = differentiable_gradients(reference, (x, *tensors), [grad])
            return dx, *[None] * 6, *rest
        ours, theirs = tensors[:-TENSORS_A_PROJECTION], tensors[-TENSORS_A_PROJECTION:]
        several = len(parts) > 1
        buffers = (_buffers(first, rows, ours), _buffers(last, rows, theirs)) if several else None
        dxs: list[torch.Tensor] = []
        total: list[torch.Tensor | None] = [None] * len(tensors)
        for part, own, p_last, pair in zip(parts, grads.split(ctx.tile), low, pairs, strict=True):
            of_first = None if buffers is None else buffers[0]
            joint = _joint_buffer(first, part)
            (gate, up), p = _group_forward(
                first, pair[0], part, ours, together=True, buffers=of_first, into=joint
            )
            if p_last is None:
                p_last = _down_low_rank(last, pair[1], gate, up, activation, theirs, first.fused)
            made = [_Saved(part, p, gate, up, p_last, *pair)]
            del gate, up
            dx, found = _mlp_gradients(
                *(first, last, activation, made, tensors, own),
                needs[0],
                needs[7:],
                buffers,
                torch.float32 if several else None,
                joint,
                in_place=True,
                prefetch=False,
            )
            del joint
            if dx is not None:
                dxs.append(dx)
            if all(t is None for t in total):
                total = found
            else:  # the same ones each time, in one launch
                sums = [t for t in total if t is not None]
                more: list[Any] = [t for t in found if t is not None]
                torch._foreach_add_(sums, more)
        if several:
            total = [None if t is None else t.to(own.dtype) for t, own in zip(total, tensors, strict=True)]
        joined = None if not dxs else (torch.cat(dxs) if several else dxs[0]).view(x.shape)
        return joined, *[None] * 6, *total


def _own(columns: torch.Tensor, slot: _Slot) -> torch.Tensor:
    """A projection's columns of the joint low-rank term."""
    return columns[:, slot.column : slot.column + slot.rank]


# The public functions


def _check(x: torch.Tensor, projections: Sequence[Projection]) -> None:
    if not projections:
        raise ValueError("projections is empty: expected at least one")
    for i, projection in enumerate(projections):
        n, k = projection.weight.shape
        if x.dim() == 0 or x.shape[-1] != k:
            raise ValueError(f"x {tuple(x.shape)} and weight {i} {(n, k)}: expected x (..., {k})")
        adapter = projection.adapter
        if adapter is None:
            continue
        a, b = adapter.a, adapter.b
        if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0], a.shape[0]) != (k, n, b.shape[1]):
            raise ValueError(
                f"adapter {i}: a {tuple(a.shape)} and b {tuple(b.shape)}: expected (r, {k}) and ({n}, r)"
            )
        if not 0 <= adapter.dropout < 1:
            raise ValueError(f"adapter {i}: dropout={adapter.dropout!r}: allowed is 0 <= dropout < 1")


def _check_mlp(x: torch.Tensor, gate: Projection, up: Projection, down: Projection) -> None:
    _check(x, [gate, up])
    inner = gate.weight.shape[0]
    if up.weight.shape[0] != inner or down.weight.shape[1] != inner:
        raise ValueError(
            f"gate {tuple(gate.weight.shape)}, up {tuple(up.weight.shape)}, down {tuple(down.weight.shape)}: "
            "expected (I, K), (I, K) and (N, I)"
        )
    _check(x.new_empty(0, inner), [down])


def _group(x: torch.Tensor, projections: Sequence[Projection], fused: bool) -> _Group:
    slots: list[_Slot] = []
    runs: list[_Run] = []
    start = column = number = 0
    for projection in projections:
        adapter = projection.adapter
        n = projection.weight.shape[0]
        rank = 0 if adapter is None else adapter.a.shape[0]
        padded = ceil_div(rank, RANK_ALIGNMENT) * RANK_ALIGNMENT
        scaling = 1.0 if adapter is None else float(adapter.scaling)
        if adapter is not None:
            last = runs[-1] if runs else None
            kind = scaling, adapter.dropout
            if last and kind == (last.scaling, last.dropout) and (not last.dropout or last.width == padded):
                runs[-1] = last._replace(last=number + 1, stop=column + padded)
            else:
                runs.append(_Run(number, number + 1, column, column + padded, padded, *kind))
            number += 1
        slots.append(_Slot(projection.weight, start, n, column, padded, rank, scaling, len(runs) - 1))
        start, column = start + n, column + padded
    adapters = [p.adapter for p in projections if p.adapter is not None]
    dtypes = {t.dtype for adapter in adapters for t in (adapter.a, adapter.b)}
    wide = x.dtype != torch.float32 and dtypes - {x.dtype} and not torch.is_autocast_enabled(x.device.type)
    k = x.shape[-1]
    extended = fused and takes(x) and k % 8 == 0 and not wide
    extended = extended and all(isinstance(p.weight, FourBit) for p in projections)
    row = k + ceil_div(column, ROW_ALIGNMENT) * ROW_ALIGNMENT
    dropout = any(run.dropout for run in runs)
    biased = any(p.bias is not None or (p.adapter and p.adapter.bias is not None) for p in projections)
    extension = views = None
    if extended:
        extension = Extension([Part(slot.weight, slot.column, slot.padded) for slot in slots])  # type: ignore[arg-type]
        views = _views(slots, runs, k, row, dropout)
    return _Group(
        *(tuple(slots), tuple(runs), k, start, column, row, dropout, biased),
        *(extended, bool(wide), fused, extension, views),
    )


def _views(slots: Sequence[_Slot], runs: Sequence[_Run], k: int, row: int, dropout: bool) -> _Views:
    n, columns = sum(slot.width for slot in slots), sum(slot.padded for slot in slots)

    def transposed(rows: range, columns: range) -> _View:
        return _View((len(columns), len(rows)), (1, row), rows.start * row + columns.start)

    of_slots = [range(slot.start, slot.start + slot.width) for slot in slots]
    low = [range(k + slot.column, k + slot.column + slot.padded) for slot in slots]
    return _Views(
        a=_View((columns, k), (row, 1), n * row),
        down=_View((n if dropout else n + columns, k), (row, 1), 0),
        right=transposed(range(n), range(k + columns)),
        rights=tuple(transposed(rows, range(k + columns)) for rows in of_slots),
        b=tuple(map(transposed, of_slots, low)),
        of_runs=tuple(transposed(range(n), range(k + run.start, k + run.stop)) for run in runs),
    )


def _tensors(projections: Sequence[Projection]) -> list[torch.Tensor | None]:
    flat: list[torch.Tensor | None] = []
    for projection in projections:
        adapter = projection.adapter
        factors = (None, None, None) if adapter is None else (adapter.a, adapter.b, adapter.bias)
        flat += [*factors, projection.bias]
    return flat


def _known(
    x: torch.Tensor, projections: Sequence[Projection], fused: bool, make: Callable[[], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """What `make` gave for these very projections before, and for an x like this one.

    It is kept with the first, beside the others, so that their ids stay theirs.
    """
    cuda = x.is_cuda
    # How wide the small matmuls are depends on autocast.
    autocast = torch.is_autocast_enabled("cuda" if cuda else x.device.type)
    key = (fused, cuda, autocast, x.dtype, x.shape[-1], *map(id, projections))
    known = projections[0]._known
    result = known.get(key)
    if result is None:
        if len(known) >= MOST_KNOWN:
            known.clear()
        result = known[key] = (*make(), projections[1:])
    return result


def lora_linear(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    fused: bool = True,
    expanded: Expanded | None = None,
) -> tuple[torch.Tensor, ...]:
    """All of `projections` of one input, each y = x W.T + bias + scaling * dropout(x) A.T B.T.

    Args:
        x: (..., K) in the dtype to compute in: float32, bfloat16 or float16 (float64 goes to the reference).
        projections: frozen weights of one width K; 4-bit ones may stand beside others. Adapters may be
            float32 beside a narrower x. Where autocast is off their small matmuls then run in float32.
        fused: False for PyTorch's operators instead of Triton kernels, on any device.
        expanded: where 4-bit weights stay expanded, for the backward and for later calls; None: nowhere.

    Returns:
        One (..., N_i) a projection, in x.dtype. Gradients reach x, A, B and biases, never a weight.

    Raises:
        ValueError: for shapes that don't fit, and a dropout outside [0, 1).
    """
    if not projections or x.dtype == torch.float64 or not x.numel():
        return lora_linear_reference(x, projections)

    def make() -> tuple[Any, ...]:
        _check(x, projections)
        return _group(x, projections, fused), _tensors(projections)

    group, tensors, _ = _known(x, projections, fused, make)
    if expanded is not None:
        group = group._replace(kept=expanded.first)
    result: tuple[torch.Tensor, ...] = _LoraLinear.apply(x, group, *tensors)
    return result


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str,
    fused: bool = True,
    tile: int | None = None,
    output: bool = True,
    repeated: bool = False,
    expanded: Expanded | None = None,
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) as one function; keeps x, gate(x) and up(x) for the backward.

    Args:
        x: (..., K), see `lora_linear`.
        gate, up: (I, K); down: (N, I).
        activation: "silu", "gelu_tanh" or "gelu" (by erf).
        fused: see `lora_linear`.
        tile: tokens that are in the MLP at a time, 1 or more: only x is kept, and a tile's gate(x) and
            up(x) are made again in the backward. One tile gives the bits of None; sums over several round
            otherwise, and each has dropout masks of its own.
        output: False where the output's value goes nowhere, as when a checkpointed layer that ends with this
            and a residual addition is run again: what only the output needs is left out, and it is zeros.
            Gradients are the same bits.
        repeated: True where this call, or the one that it repeats, is made again before the backward, as
            torch.utils.checkpoint does it: with a tile even less is saved.
        expanded: see `lora_linear`.

    Returns:
        (..., N) in x.dtype.

    Raises:
        ValueError: for another activation, shapes that don't fit, a tile below 1, and a dropout outside
            [0, 1).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: allowed are {', '.join(map(repr, ACTIVATIONS))}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile!r}: allowed is a whole number from 1")
    if x.dtype == torch.float64 or not x.numel():
        _check_mlp(x, gate, up, down)
        return lora_mlp_reference(x, gate, up, down, activation=activation)

    def make() -> tuple[Any, ...]:
        _check_mlp(x, gate, up, down)
        wide = x.new_empty(0, gate.weight.shape[0])
        return _group(x, [gate, up], fused), _group(wide, [down], fused), _tensors([gate, up, down])

    first, last, tensors, _ = _known(x, (gate, up, down), fused, make)
    if expanded is not None:
        first, last = first._replace(kept=expanded.first), last._replace(kept=expanded.last)
    result: torch.Tensor
    if tile is None:
        result = _LoraMLP.apply(x, first, last, activation, output, *tensors)
    else:
        result = _LoraMLPAgain.apply(
            x, first, last, activation, tile, output, repeated or not output, *tensors
        )
    return result


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scaling: float,
    masks: tuple[Dropout, int] | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    low_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """One projection in plain PyTorch, with eager's roundings. masks: (dropout, which of its adapters)."""
    y = F.linear(x, weight.detach().to(x.dtype), None if bias is None else bias.to(x.dtype))
    if a is None or b is None:
        return y
    dtype = torch.promote_types(x.dtype, a.dtype)
    source = x.to(dtype)
    if masks is not None:
        source = dropped(source, *masks)
    low = F.linear(source, a.to(dtype))
    low = F.linear(low, b.to(dtype), None if low_bias is None else low_bias.to(dtype))
    return (y + low * scaling).to(x.dtype)


def _flat_reference(
    group: _Group, seeds: torch.Tensor | None, x: torch.Tensor, *tensors: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    step = TENSORS_A_PROJECTION
    outputs = []
    for i, slot in enumerate(group.slots):
        masks = None
        for run in group.runs:
            if slot.rank and run.start <= slot.column < run.stop and (dropout := run.masks(seeds)):
                masks = dropout, (slot.column - run.start) // run.width
        own = tensors[i * step : (i + 1) * step]
        outputs.append(_linear(x, _stored(slot.weight), slot.scaling, masks, *own))
    return tuple(outputs)


def _flat_mlp_reference(
    first: _Group,
    last: _Group,
    seeds: torch.Tensor | None,
    last_seeds: torch.Tensor | None,
    activation: str,
    x: torch.Tensor,
    *tensors: torch.Tensor | None,
) -> torch.Tensor:
    gate, up = _flat_reference(first, seeds, x, *tensors[:-TENSORS_A_PROJECTION])
    hidden = gated_activation_reference(gate, up, activation=activation)
    return _flat_reference(last, last_seeds, hidden, *tensors[-TENSORS_A_PROJECTION:])[0]


def _stored(weight: Weight) -> torch.Tensor:
    return expand_4bit_reference(weight) if isinstance(weight, FourBit) else weight


def lora_linear_reference(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """`lora_linear` in plain PyTorch, right in float64."""
    _check(x, projections)
    group = _group(x, projections, False)
    return _flat_reference(group, group.seeds(x.device), x, *_tensors(projections))


def lora_mlp_reference(
    x: torch.Tensor, gate: Projection, up: Projection, down: Projection, *, activation: str
) -> torch.Tensor:
    """`lora_mlp` in plain PyTorch, right in float64."""
    first = _group(x, [gate, up], False)
    last = _group(x.new_empty(0, down.weight.shape[1]), [down], False)
    seeds = first.seeds(x.device), last.seeds(x.device)
    return _flat_mlp_reference(first, last, *seeds, activation, x, *_tensors([gate, up, down]))
