"""The elementwise middle of a gated MLP, y = act(gate) * up [1]; act is SiLU [2], GELU or its tanh form [3].

    dup = dy * act(gate)
    dgate = dy * up * act'(gate)

With S(z) = 1 / (1 + exp(-z)) and P(z) = (1 + erf(z / sqrt(2))) / 2:

    silu        act(g) = g * S(g)      act'(g) = S(g) * (1 + g * (1 - S(g)))
    gelu        act(g) = g * P(g)      act'(g) = P(g) + g * exp(-g^2 / 2) / sqrt(2 pi)
    gelu_tanh   act(g) = g * S(u)      act'(g) = S(u) + g * S(u) * (1 - S(u)) * u'
                u = 2 * sqrt(2 / pi) * (g + 0.044715 * g^3), since (1 + tanh(z)) / 2 = S(2 z)

Shapes: gate, up, y (..., N); or both in one buffer (..., 2N), gate first. bf16, fp16, fp32; arithmetic in
float32, one rounding. Only the inputs are saved: backward computes the activation again. Bytes that must
move, in bf16: 6 an element of y forward, 10 backward.

[1] Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202
[2] Elfwing et al., Sigmoid-Weighted Linear Units, arXiv:1702.03118
[3] Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415
"""

# Triton and torch.autograd.Function are untyped.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from sloth_kernels._library import (
    HAS_TRITON,
    INTERPRETED,
    differentiable_gradients,
    launch,
    register_op,
    run_op,
    tl,
    triton,
    wants_graph,
)

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
# Two 16-byte loads (bf16) of each input a thread; one in a forward with little arithmetic (1 % on an H200).
ELEMENTS_PER_THREAD = 16
LIGHT_FORWARD_ELEMENTS_PER_THREAD = 8
_PTX = HAS_TRITON and not INTERPRETED and torch.version.cuda is not None
PTX = tl.constexpr(_PTX) if HAS_TRITON else _PTX  # kernels read no other globals


@triton.jit
def _sigmoid(g):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-g)) in float32, to 2 units in the last place; 0 where that is below 2^-126."""
    if PTX:
        # 4 instructions; with the ranges that tl.sigmoid takes care of it is 12. Not pure, or else Triton 3.6
        # computes everything behind it once more for each layout in which it is used.
        result = tl.inline_asm_elementwise(
            """{
                .reg .f32 t;
                mul.rn.f32 t, $1, 0fBFB8AA3B;
                ex2.approx.ftz.f32 t, t;
                add.rn.f32 t, t, 0f3F800000;
                rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [g],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        result = tl.sigmoid(g)
    return result


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(act(g), act'(g)); the compiler drops what the caller does not use."""
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = cdf + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif ACTIVATION == "gelu_tanh":
        # Beyond 16 the sigmoid is 0 or 1 exactly. Unclamped, z * z could be inf in the slope: 0 * inf is NaN.
        z = tl.minimum(tl.maximum(g, -16.0), 16.0)
        u = 1.5957691216057308 * (z + 0.044715 * (z * z * z))
        # exp(-|u|) gives S(u) and S(u) * (1 - S(u)) without overflow and without cancellation.
        decay = tl.exp(-tl.abs(u))
        larger = 1.0 / (1.0 + decay)
        cdf = tl.where(u >= 0.0, larger, decay * larger)
        slope = cdf + g * (decay * larger * larger) * (1.5957691216057308 + 0.2140644488318007 * (z * z))
    else:
        cdf = _sigmoid(g)
        slope = cdf * (1.0 + g * (1.0 - cdf))
    return g * cdf, slope


@triton.jit
def _place(N: tl.constexpr, total, FLAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, columns, mask) of this program; everything is one long row where FLAT."""
    pid = tl.program_id(0).to(tl.int64)
    if FLAT:
        row = pid * 0
        columns = pid * BLOCK + tl.arange(0, BLOCK)
        inside = columns < total
    else:
        blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
        row = pid // blocks
        columns = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < N
    return row, columns, inside


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    out_ptr,
    total,
    gate_stride,
    up_stride,
    out_stride,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns, inside = _place(N, total, FLAT, BLOCK)
    g = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0)
    u = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0)
    activated, _ = _activate(g.to(tl.float32), ACTIVATION)
    y = activated * u.to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    out_ptr,
    total,
    grad_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    out_stride,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_OUT: tl.constexpr,
):
    row, columns, inside = _place(N, total, FLAT, BLOCK)
    dy = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0)
    g = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0)
    u = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0)
    dy = dy.to(tl.float32)
    activated, slope = _activate(g.to(tl.float32), ACTIVATION)
    dup = dy * activated
    dgate = dy * u.to(tl.float32) * slope
    tl.store(dgate_ptr + row * dgate_stride + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * dup_stride + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    if HAS_OUT:
        y = activated * u.to(tl.float32)
        tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix of rows whose elements adjoin; a view where its strides allow."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@functools.lru_cache(maxsize=4096)
def _block(width: int) -> int:
    """Elements a program: 4,096 (8 warps); fewer where rows are short or leave a last block mostly empty."""
    smallest = 1 << max(0, width - 1).bit_length()
    if smallest <= 1024:
        return max(32, smallest)
    return min((4096, 2048, 1024), key=lambda b: (max(-(-width // b) * b, 1.05 * width), -b))


def _launch(
    kernel: Any, tensors: list[torch.Tensor], activation: str, *, repeatable: bool = True, **constants: bool
) -> None:
    """Tensors of one shape (..., N): one long row where all are contiguous, else rows a stride apart."""
    light = kernel is _forward_kernel and activation != "gelu"
    per_thread = LIGHT_FORWARD_ELEMENTS_PER_THREAD if light else ELEMENTS_PER_THREAD
    total = tensors[0].numel()
    flat = all(x.is_contiguous() for x in tensors)
    if flat:
        # Strides and width play no part then; their values would only cause compilations.
        width, strides = 1, [0] * len(tensors)
        block = _block(total)
        grid = -(-total // block)
    else:
        tensors = [as_matrix(x) for x in tensors]
        rows, width = tensors[0].shape
        strides = [x.stride(0) for x in tensors]
        block = _block(width)
        grid = rows * -(-width // block)
    launch(
        kernel,
        (grid,),
        *tensors,
        total,
        *strides,
        N=width,
        ACTIVATION=activation,
        FLAT=flat,
        BLOCK=block,
        **constants,
        num_warps=max(1, block // (32 * per_thread)),
        repeatable=repeatable,
    )


def gated_activation_fwd(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Launch act(gate) * up; the result is contiguous."""
    out = _fwd_fake(gate, up, activation)
    if out.numel():
        _launch(_forward_kernel, [gate, up, out], activation)
    return out


def _fwd_fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)


def gated_activation_bwd(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch both gradients, each contiguous and in the dtype of its input."""
    dgate, dup = _bwd_fake(grad, gate, up, activation)
    if grad.numel():
        _launch(_backward_kernel, [grad, gate, up, dgate, dup, dup], activation, HAS_OUT=False)
    return dgate, dup


def _bwd_fake(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
    )


def gated_activation_fwd_into(
    out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, *, fused: bool = True
) -> torch.Tensor:
    """act(gate) * up into `out`; matrices (T, N) whose rows may lie any distance apart. Returns `out`.

    fused: False for PyTorch's operators on any device.
    """
    if not (fused and (out.is_cuda or INTERPRETED)):
        return out.copy_(gated_activation_reference(gate, up, activation=activation))
    if out.numel():
        _launch(_forward_kernel, [gate, up, out], activation)
    return out


def gated_activation_bwd_into(
    dgate: torch.Tensor,
    dup: torch.Tensor,
    out: torch.Tensor,
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    fused: bool = True,
) -> None:
    """Both gradients and, computed once more, act(gate) * up; matrices as in `gated_activation_fwd_into`.

    dgate may be gate, and dup then up.
    """
    if not (fused and (out.is_cuda or INTERPRETED)):
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            y = gated_activation_reference(*leaves, activation=activation)
        for target, gradient in zip((dgate, dup), torch.autograd.grad(y, leaves, grad), strict=True):
            target.copy_(gradient)
        out.copy_(y.detach())
    elif out.numel():
        tensors = [grad, gate, up, dgate, dup, out]
        _launch(_backward_kernel, tensors, activation, repeatable=dgate is not gate, HAS_OUT=True)


def gated_activation_packed_fwd(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Launch act(gate) * up for gate_up = [gate | up]; the result is contiguous."""
    out = _packed_fwd_fake(gate_up, activation)
    if out.numel():
        gate, up = as_matrix(gate_up).chunk(2, dim=1)
        _launch(_forward_kernel, [gate, up, as_matrix(out)], activation)
    return out


def _packed_fwd_fake(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)


def gated_activation_packed_bwd(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Launch both gradients into one contiguous buffer [dgate | dup]."""
    dgate_up = _packed_bwd_fake(grad, gate_up, activation)
    if dgate_up.numel():
        halves = [*as_matrix(gate_up).chunk(2, dim=1), *as_matrix(dgate_up).chunk(2, dim=1)]
        _launch(_backward_kernel, [as_matrix(grad), *halves, halves[-1]], activation, HAS_OUT=False)
    return dgate_up


def _packed_bwd_fake(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


register_op(
    "gated_activation_fwd(Tensor gate, Tensor up, str activation) -> Tensor", gated_activation_fwd, _fwd_fake
)
register_op(
    "gated_activation_bwd(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    gated_activation_bwd,
    _bwd_fake,
)
register_op(
    "gated_activation_packed_fwd(Tensor gate_up, str activation) -> Tensor",
    gated_activation_packed_fwd,
    _packed_fwd_fake,
)
register_op(
    "gated_activation_packed_bwd(Tensor grad, Tensor gate_up, str activation) -> Tensor",
    gated_activation_packed_bwd,
    _packed_bwd_fake,
)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return run_op(torch.ops.sloth.gated_activation_fwd, gated_activation_fwd, gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if wants_graph():
            reference = functools.partial(gated_activation_reference, activation=ctx.activation)
            return *differentiable_gradients(reference, (gate, up), [grad]), None
        dgate, dup = run_op(
            torch.ops.sloth.gated_activation_bwd, gated_activation_bwd, grad, gate, up, ctx.activation
        )
        return dgate, dup, None


class _GatedActivationPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str) -> Any:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return run_op(
            torch.ops.sloth.gated_activation_packed_fwd, gated_activation_packed_fwd, gate_up, activation
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        if wants_graph():
            reference = functools.partial(gated_activation_packed_reference, activation=ctx.activation)
            return *differentiable_gradients(reference, (gate_up,), [grad]), None
        return run_op(
            torch.ops.sloth.gated_activation_packed_bwd,
            gated_activation_packed_bwd,
            grad,
            gate_up,
            ctx.activation,
        ), None


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: allowed are {', '.join(map(repr, ACTIVATIONS))}")
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(
            f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: expected two equal shapes (..., N)"
        )


def _check_packed(gate_up: torch.Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: allowed are {', '.join(map(repr, ACTIVATIONS))}")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)}: expected (..., 2N)")


def gated_activation(gate: torch.Tensor, up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """act(gate) * up in one launch, its two gradients in another.

    Args:
        gate, up: (..., N), the same shape; float32, bfloat16 or float16 (float64 goes to the reference). Read
            in place where rows lie a constant stride apart, as slices of a joint buffer do.
        activation: "silu", "gelu_tanh" or "gelu" (by erf).

    Returns:
        (..., N), contiguous, in promote_types(gate.dtype, up.dtype).

    Raises:
        ValueError: for another activation, and for unequal shapes.
    """
    _check(gate, up, activation)
    if torch.float64 in (gate.dtype, up.dtype):
        return gated_activation_reference(gate, up, activation=activation)
    result: torch.Tensor = _GatedActivation.apply(gate, up, activation)
    return result


def gated_activation_packed(gate_up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """`gated_activation` of the two halves of one tensor; its gradient is one buffer as well.

    Args:
        gate_up: (..., 2N), in the last dim gate first, then up; dtypes and strides as for `gated_activation`.
        activation: "silu", "gelu_tanh" or "gelu" (by erf).

    Returns:
        (..., N), contiguous, in the dtype of gate_up.

    Raises:
        ValueError: for another activation, and for an odd last dim.
    """
    _check_packed(gate_up, activation)
    if gate_up.dtype == torch.float64:
        return gated_activation_packed_reference(gate_up, activation=activation)
    result: torch.Tensor = _GatedActivationPacked.apply(gate_up, activation)
    return result


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """`gated_activation` in plain PyTorch, with eager's rounding of act(gate) to the dtype of gate."""
    _check(gate, up, activation)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def gated_activation_packed_reference(gate_up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """`gated_activation_packed` in plain PyTorch."""
    _check_packed(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return gated_activation_reference(gate, up, activation=activation)
