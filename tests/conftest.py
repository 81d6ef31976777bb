"""Kernels run in Triton's interpreter where there is no GPU, which must be said before triton is first
imported.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for helpers.py, which import mode importlib does not find
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    """What PyTorch keeps of a GPU behind a test of large tensors, to those that run beside this process."""
    yield
    if GPU and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    """CUDA where there is one, else the CPU (Triton kernels are interpreted there)."""
    return torch.device("cuda" if GPU else "cpu")
