"""Pinned host memory, and a frozen weight that waits there instead of on the GPU.

Of its input embeddings a step reads the rows of its tokens, a few megabytes of a table of a gigabyte. CUDA
gives pinned memory one address for host and GPU (unified addressing), so that a tensor of the GPU can have
its storage there: `torch.nn.Embedding` gathers its rows over the link, nothing is patched, the parameter
stays the same object on the same device. `__cuda_array_interface__` is the way to such a tensor: PyTorch
takes the address, asks CUDA whose it is, and holds the object that gave it for as long as the storage lives
(tensor_from_cuda_array_interface in torch/csrc/utils/tensor_numpy.cpp, of torch 2.11).
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_unpinned: list[str] = []
"""Why host memory could not be pinned, once that has failed."""


def host_memory(size: int, pinned: bool) -> torch.Tensor:
    """`size` bytes of host memory, pinned if asked for. Where that fails, with one warning, they are not, nor
    are those of later calls."""
    if pinned and not _unpinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _unpinned.append(str(error))
            warnings.warn(
                f"sloth: host memory can't be pinned, so offloading is slower: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
    return torch.empty(size, dtype=torch.uint8)


def reads_host_memory(device: torch.device) -> bool:
    """Whether kernels on a device reach pinned host memory at the host's own address."""
    return device.type == "cuda" and torch.version.hip is None


def movable_embedding(model: nn.Module) -> nn.Parameter | None:
    """The weight of the model's input embeddings, if nobody would notice that it is in host memory.

    That is a frozen one on a GPU, of a plain `torch.nn.Embedding`, with a storage of its own that nothing
    else in the model shares, in a single process, of a model that is neither sharded nor compiled. Hooks on
    the module see ids and rows alone, so they are no obstacle.
    """
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get()
    except Exception:  # transformers raises NotImplementedError, others have none to call
        return None
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    weight = embedding.weight
    if type(weight) is not nn.Parameter or weight.requires_grad or not reads_host_memory(weight.device):
        return None
    return weight if is_alone(model, [weight]) else None


def is_alone(model: nn.Module, weights: Sequence[nn.Parameter]) -> bool:
    """Whether each of these has a whole storage that nothing else in the model shares, in a single process,
    of a model that is neither sharded nor compiled."""
    for weight in weights:
        whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size() > 0
        if not (whole and weight.is_contiguous()) or hasattr(weight, "ds_id"):
            return False
    if _is_one_of_many() or _is_compiled(model):
        return False
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if any(type(tensor).__name__ == "DTensor" for _, tensor in named):
        return False
    users = Counter(_address(tensor) for _, tensor in named)
    return all(users[_address(weight)] == 1 for weight in weights)


def _address(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _is_one_of_many() -> bool:
    """Whether other processes train this model as well."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


class StaysError(RuntimeError):
    """A weight stays on its device, for the reason given."""


class HostWeight:
    """A weight whose bytes are in pinned host memory, under its own name and device, until `restore()`.

    weight: one that `movable_embedding` gave. Raises StaysError, with the weight as it was, where memory
    can't be pinned, the device can't read it there, or reads other bytes.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        size = weight.numel() * weight.element_size()
        host = host_memory(size, weight.is_cuda)
        if weight.is_cuda and not host.is_pinned():
            raise StaysError("host memory can't be pinned")
        # Asynchronous, so that the allocator of pinned memory knows of the stream: it waits for it before it
        # gives this memory to anybody else. The steps run on that stream, too.
        host.copy_(weight.detach().view(torch.uint8).view(-1), non_blocking=True)
        try:
            view = on_device(host, weight.device).view(weight.dtype).view(weight.shape)
            rows = torch.tensor([0, weight.shape[0] // 2, weight.shape[0] - 1], device=weight.device)
            read, own = (F.embedding(rows, table).view(torch.uint8) for table in (view, weight.detach()))
            same = view.device == weight.device and torch.equal(read, own)
        except Exception as error:  # of whatever version of PyTorch or CUDA
            raise StaysError(f"the device can't read them there ({error})") from error
        if not same:
            raise StaysError("the device reads other bytes there")
        # Both weakly: they live as long as the model.
        self._weight, self._host = weakref.ref(weight), weakref.ref(host)
        weight.data = view

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter while its bytes are in this memory; None once it is gone or has others."""
        weight, host = self._weight(), self._host()
        if weight is None or host is None or weight.untyped_storage().data_ptr() != host.data_ptr():
            return None
        return weight

    def restore(self) -> bool:
        """Bring the bytes back to the device; what somebody else has put in their place stays. False, with a
        warning, where the device has no room for them: they stay in host memory then, which works as well."""
        weight, host = self.weight, self._host()
        if weight is None or host is None:
            return True
        try:
            back = torch.empty_like(weight.data)
        except torch.OutOfMemoryError:
            warnings.warn(
                "sloth: the input embeddings stay in host memory: the device has no room for them",
                stacklevel=2,
            )
            return False
        back.view(torch.uint8).view(-1).copy_(host, non_blocking=True)
        weight.data = back
        return True


class _Address:
    """Where host memory is, as CUDA's and NumPy's array interfaces say it. Whoever makes a tensor of this
    holds it, and with it the memory."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        where = {"shape": (host.numel(),), "typestr": "|u1", "data": (host.data_ptr(), False)}
        self.__cuda_array_interface__ = {**where, "version": 2}
        self.__array_interface__ = {**where, "version": 3}


def on_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the device over `host`'s own bytes, which holds `host`."""
    if device.type != "cuda":
        import numpy as np

        return torch.as_tensor(np.asarray(_Address(host)))
    with torch.cuda.device(device):
        # Without the index, for PyTorch then asks CUDA about the address and refuses one that is not pinned.
        view = torch.as_tensor(_Address(host), device="cuda")
    if view.data_ptr() != host.data_ptr():  # pinned for another GPU, so it was copied
        raise RuntimeError("its address is another GPU's")
    return view
