"""A block's columns rounded in one launch: PyTorch's rule, and as small a loss."""

from __future__ import annotations

import pytest
import torch
from sloth_kernels import nf4_rounding
from sloth_kernels.nf4_rounding import nearest_nibbles, round_block, round_block_reference

# The interpreter truncates where a GPU rounds to bfloat16.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
RULES = pytest.mark.parametrize("descent", [False, True], ids=["spreading", "descent"])
# Of the format's 16 values, symmetric ones, so that bitsandbytes isn't needed.
CODE = torch.linspace(-1, 1, 16).pow(3) * 0.4 + torch.linspace(-1, 1, 16) * 0.6
TABLE = torch.bucketize(torch.linspace(-1, 1, 4096), (CODE[1:] + CODE[:-1]) / 2)


class Block:
    """A random block, 20 times a weight's size in some channels, as what has spread into it can be."""

    def __init__(self, blocksize: int, n: int, descent: bool, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(n + blocksize)
        x = torch.randn(4 * blocksize, blocksize, generator=generator)
        x = x @ torch.randn(blocksize, blocksize, generator=generator) / blocksize**0.5 + x
        hessian = (x.T @ x).double()
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        # A slice of a larger matrix, as the caller's are.
        whole = torch.full((blocksize + 3, blocksize + 5), float("nan"), dtype=torch.float64)
        whole[:blocksize, 5:] = hessian if descent else upper
        self.own = torch.randn(blocksize, n, generator=generator).to(device)
        self.matrix = whole.float().to(device)[:blocksize, 5:]
        self.slope = torch.randn(blocksize, n, generator=generator).to(device) if descent else None
        scale = 2 * torch.rand(n, generator=generator) + 0.5
        if n > 1:
            scale[0], scale[-1] = 0.0, -scale[-1]
        self.scale = scale.to(device)
        self.code, self.table = CODE.to(device), TABLE.to(device)
        self.hessian = hessian.to(device)

    def rounded(
        self, dtype: torch.dtype, *, reference: bool = False, compute: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(nibbles, values, passed); what is written to is full of NaN and 255."""
        own, matrix, scale, code = (t.to(compute) for t in (self.own, self.matrix, self.scale, self.code))
        slope = None if self.slope is None else self.slope.to(compute)
        nibbles = torch.full_like(own, 255, dtype=torch.uint8)
        values = torch.full_like(own, float("nan"))
        run = round_block_reference if reference else round_block
        passed = run(own, matrix, slope, scale, self.table, code, dtype, nibbles, values)
        return nibbles, values, passed

    def loss(self, values: torch.Tensor) -> torch.Tensor:
        """What each row's rule makes small, float64: the error of spreading, or of descent its change."""
        changed = values.double() - self.own.double()
        curved = (changed * (self.hessian @ changed)).sum(0)
        return curved if self.slope is None else curved + 2 * (changed * self.slope.double()).sum(0)


def check(block: Block, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty_like
    inputs = [t for t in (block.own, block.matrix, block.slope, block.scale) if t is not None]
    before = [t.clone() for t in inputs]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", lambda *a, **k: real(*a, **k).fill_(float("nan")))
        nibbles, values, passed = block.rounded(dtype)
        again = block.rounded(dtype)
    assert all(torch.equal(a, b) for a, b in zip((nibbles, values, passed), again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert values.isfinite().all() and passed.isfinite().all() and nibbles.max() < 16
    assert torch.equal(values, (block.code[nibbles.long()] * block.scale).to(dtype).float())
    # Each column by itself, in float64, with what the kernel passed on from those before it.
    matrix, own = block.matrix.double(), block.own.double()
    sums = torch.triu(matrix, 1).T @ passed.double()
    middle = matrix.diagonal()[:, None]
    if block.slope is None:
        wanted, expected = own - sums, (own - sums - values) / middle
    else:
        wanted = own - (block.slope.double() + sums) / middle
        expected = values.double() - own
    assert ((passed - expected).abs() <= 1e-5 * (1 + expected.abs().amax(0))).all()
    scale = block.scale.double()
    distances = (wanted - (block.code.double() * scale[:, None]).T[:, None]).abs()
    chosen = distances.gather(0, nibbles.long()[None])[0]
    assert (chosen <= distances.amin(0) + scale.abs() / 2047 + 1e-4).all()  # as far as a step of the table
    # They differ where a value lies in the middle of two, and then in what follows.
    other, exact = (block.rounded(dtype, reference=True, compute=c) for c in (torch.float32, torch.float64))
    for theirs in (other, exact):
        same = (nibbles == theirs[0]).all(0)
        assert same.float().mean() > 0.9
        torch.testing.assert_close(
            passed.double()[:, same], theirs[2].double()[:, same], rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(block.loss(values).sum(), block.loss(theirs[1]).sum(), rtol=0.01, atol=0.0)


@RULES
@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_column_by_its_rule(
    dtype: torch.dtype, blocksize: int, descent: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(Block(blocksize, 41, descent, device), dtype, monkeypatch)


@RULES
@pytest.mark.parametrize("n", [1, 32, 70])
def test_odd_numbers_of_rows(
    n: int, descent: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(Block(32, n, descent, device), torch.float32, monkeypatch)


@pytest.mark.gpu
@RULES
@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_sizes(
    dtype: torch.dtype, blocksize: int, descent: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (4099, 28672):
        check(Block(blocksize, n, descent, device), dtype, monkeypatch)


def test_nothing_to_round_and_no_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    nibbles, values, passed = Block(32, 2, False, device).rounded(torch.float32)
    block = Block(32, 2, False, device)
    block.own, block.scale = block.own[:, :0].contiguous(), block.scale[:0]
    assert [t.shape for t in block.rounded(torch.float32)] == [(32, 0)] * 3

    def launch(*_: object, **__: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(nf4_rounding, "launch", launch)
    block = Block(32, 2, False, device)
    given = block.own, block.matrix, None, block.scale, block.table, block.code, torch.float32
    into = torch.zeros_like(nibbles), torch.zeros_like(values)
    torch.testing.assert_close(round_block(*given, *into, fused=False), passed, rtol=1e-4, atol=1e-4)
    assert torch.equal(into[0], nibbles) and torch.equal(into[1], values)


def test_the_nearest_of_a_scale() -> None:
    values = torch.tensor([-5.0, -1.0, 0.01, 0.49, 1.0, 7.0])
    for scale in (1.0, -0.5, 3.0):
        found = nearest_nibbles(values, torch.tensor(scale), TABLE)
        nearest = (values[:, None] - CODE * scale).abs().argmin(1)
        assert torch.equal(found, nearest), scale
    assert nearest_nibbles(values, torch.tensor(0.0), TABLE).max() < 16


def test_bad_input(device: torch.device) -> None:
    own, matrix, scale = torch.zeros(32, 8, device=device), torch.eye(32, device=device), torch.ones(8)
    nibbles, values = torch.zeros_like(own, dtype=torch.uint8), torch.zeros_like(own)
    code, table = CODE.to(device), TABLE.to(device)
    with pytest.raises(ValueError, match=r"\(8, 32\): expected contiguous tensors of shape \(32, 8\)"):
        round_block(own, matrix, None, scale, table, code, torch.float32, nibbles, values.T)
    with pytest.raises(ValueError, match="blocksize 24: allowed are powers of 2"):
        few = own[:24], matrix[:24, :24], None, scale, table, code, torch.float32, nibbles[:24], values[:24]
        round_block(*few)
