"""expand_4bit gives the bits that bitsandbytes gives."""

from __future__ import annotations

import pytest
import torch
from sloth_kernels.nf4 import FourBit, expand_4bit, expand_4bit_reference, refuse

bitsandbytes = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def quantized(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    quant_type: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
) -> FourBit:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    packed, state = bitsandbytes.quantize_4bit(
        weight,
        quant_type=quant_type,
        compress_statistics=nested,
        blocksize=blocksize,
        quant_storage=storage,
    )
    return FourBit(packed=packed, state=state)


# Widths are multiples of the blocksize on the CPU: there bitsandbytes (0.50) starts a new block with each row
# when it expands, which is not how it quantizes. Its CUDA kernel does not.
def check(weight: FourBit, padding: int, dtype: torch.dtype) -> None:
    (n, k), device = weight.shape, weight.device
    rows = torch.full((n + 1, k + padding), float("nan"), dtype=dtype, device=device)
    expand_4bit(weight, rows[:n, :k])
    assert torch.equal(rows[:n, :k], expand_4bit_reference(weight).to(dtype))
    assert rows[n:].isnan().all() and rows[:, k:].isnan().all()  # nothing beside the weight is touched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_the_same_bits(quant_type, nested, blocksize, dtype, device):
    width = max(192, blocksize)
    weight = quantized((40, width), dtype, device, quant_type=quant_type, nested=nested, blocksize=blocksize)
    for padding in (0, 1, 8):
        check(weight, padding, dtype)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_every_storage(storage, device):
    check(quantized((16, 128), torch.float16, device, storage=storage), 0, torch.float16)


def test_a_dtype_other_than_the_stored_one(device):
    check(quantized((16, 128), torch.float16, device), 0, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14336, 4096), (2, 2), (70, 96), (1023, 14336)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_shapes(shape, dtype, device):
    check(quantized(shape, dtype, device), 64, dtype)


def test_bad_input(device):
    weight = quantized((16, 128), torch.float32, device)
    with pytest.raises(ValueError, match=r"out \(16, 64\): expected the weight's shape \(16, 128\)"):
        expand_4bit(weight, torch.empty(16, 64, device=device))
    odd = quantized((16, 64), torch.float32, device)
    odd.state.shape = torch.Size((64, 16))
    assert refuse(odd) is None
    odd.state.shape = torch.Size((16, 63))
    assert "even K" in (refuse(odd) or "")
    odd.state.shape = torch.Size((16, 66))
    assert "do not fit" in (refuse(odd) or "")
    odd.state.quant_type = "int8"
    assert "'int8'" in (refuse(odd) or "")
