"""The three-way comparison that every kernel test uses: kernel and eager, each against float64 truth.

`check` runs three functions on the same values: the kernel, the reference in the kernel's dtypes (that is
eager), and the reference in float64 (that is truth); it compares every output and every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from sloth_plugins.numerics import Comparison, relative_error

Inputs = Mapping[str, torch.Tensor | None]
Function = Callable[..., Any]
# (fused, dtype): Triton's kernels in what the interpreter gets right, PyTorch's operators in every dtype.
WAYS = [
    pytest.param(True, torch.float32, id="fused-fp32"),
    pytest.param(True, torch.float16, id="fused-fp16"),
    pytest.param(True, torch.bfloat16, id="fused-bf16", marks=pytest.mark.gpu),
    pytest.param(False, torch.float32, id="torch-fp32"),
    pytest.param(False, torch.float16, id="torch-fp16"),
    pytest.param(False, torch.bfloat16, id="torch-bf16"),
]


def _outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _leaves(
    inputs: Inputs, frozen: Sequence[str], cast: torch.dtype | None
) -> dict[str, torch.Tensor | None]:
    """Leaves that require gradients, with the strides of the originals (a slice of a buffer stays one)."""
    leaves: dict[str, torch.Tensor | None] = {}
    for name, tensor in inputs.items():
        if tensor is None:
            leaves[name] = None
            continue
        leaf = tensor.detach() if cast is None else tensor.detach().to(cast)
        leaves[name] = leaf.requires_grad_(name not in frozen and leaf.is_floating_point())
    return leaves


def _run(
    function: Function, leaves: dict[str, torch.Tensor | None], upstream: Sequence[torch.Tensor | None] | None
) -> dict[str, torch.Tensor | None]:
    outputs = _outputs(function(**leaves))
    results: dict[str, torch.Tensor | None] = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if upstream is None:
        return results
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    pairs = [(out, up) for out, up in zip(outputs, upstream, strict=True) if up is not None]
    gradients = torch.autograd.grad(
        [out for out, _ in pairs],
        list(wanted.values()),
        [up if up.dtype == out.dtype else up.to(out.dtype) for out, up in pairs],
        allow_unused=True,
    )
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        results[f"d{name}"] = gradient
        if gradient is not None:
            assert gradient.dtype == leaf.dtype, (name, gradient.dtype, leaf.dtype)
    return results


def check(
    kernel: Function,
    reference: Function,
    inputs: Inputs,
    *,
    frozen: Sequence[str] = (),
    upstream: Sequence[torch.Tensor | None] | None = None,
    backward: bool = True,
    truth: Function | None = None,
) -> list[Comparison]:
    """Assert that `kernel(**inputs)` is as accurate as `reference(**inputs)` in every output and gradient.

    inputs: tensors by parameter name, in the kernel's dtypes, with any strides; None is passed on.
    frozen: names that take no gradient. Tensors that are not floating point never take one.
    upstream: one gradient an output, with any strides; None where that output gets none. Random if absent.
    truth: replaces `reference` in the float64 run (for a reference that rounds to a fixed out_dtype).
    """
    base = _outputs(kernel(**{name: None if t is None else t.detach() for name, t in inputs.items()}))
    if backward and upstream is None:
        # A fixed seed: the same values for the three runs and for a repeated test.
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in base]
    gradients = upstream if backward else None
    got = _run(kernel, _leaves(inputs, frozen, None), gradients)
    eager = _run(reference, _leaves(inputs, frozen, None), gradients)
    floats = {
        name: t.to(torch.float64) if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    exact = _run(truth or reference, _leaves(floats, frozen, None), gradients)
    comparisons = []
    for name, expected in eager.items():
        result, target = got[name], exact[name]
        if expected is None or target is None:
            assert result is None, f"{name}: a gradient where eager has none"
            continue
        assert result is not None, f"{name}: no gradient where eager has one"
        assert result.dtype == expected.dtype, f"{name}: {result.dtype}, eager {expected.dtype}"
        comparisons.append(
            Comparison(
                tensor=name,
                error=relative_error(result, target),
                eager_error=relative_error(expected, target),
            )
        )
    failed = [str(c) for c in comparisons if not c.passed]
    assert not failed, "; ".join(failed)
    return comparisons
