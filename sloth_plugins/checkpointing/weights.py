"""Frozen 4-bit weights that wait in host memory and come to the GPU layer by layer, ahead of their use.

Of a QLoRA step the packed weights are what stays: 3.25 GiB of an 8B model. In a forward the link from the
host has nothing to do, since activations go the other way; in a backward there is time beside what comes
back. A layer's bytes are copied in one piece to one of SLOTS places on the GPU while the layer before it
runs, and the kernels that expand 4-bit weights read them there (`sloth_kernels.nf4.SOURCES`). The parameters
stay the same objects on the same device, with their storage in pinned host memory (see `host`): whoever else
reads one, a checkpoint's writer or bitsandbytes, gets its bytes over the link, only slower.

Nobody has to say which layer comes next: a layer's weights are asked for when they are expanded, one layer
after the other, up in a forward and down in a backward. At each step to another layer the next one in this
direction begins to come, as soon as all that reads its place has run. Whoever jumps waits for a copy.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sloth_kernels._streams import current_stream, on
from torch import nn

from sloth_plugins.checkpointing.host import (
    StaysError,
    host_memory,
    is_alone,
    on_device,
    reads_host_memory,
)
from sloth_plugins.checkpointing.streams import SLOTS

# Where each weight begins, for 16-byte loads and more.
ALIGNMENT = 256


def movable_weights(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Of each of the model's layers the packed weights that may wait in host memory; empty where the layers
    have none.

    That are frozen 4-bit weights on one GPU which our kernels expand, with storages of their own, in a single
    process, of a model that is neither sharded nor compiled.
    """
    found = [[w for module in layer.modules() for w in _expanded_here(module)] for layer in layers]
    every = [weight for weights in found for weight in weights]
    devices = {weight.device for weight in every}
    if len(devices) != 1 or not reads_host_memory(devices.pop()):
        return []
    return found if is_alone(model, every) else []


def _expanded_here(module: nn.Module) -> list[nn.Parameter]:
    """The 4-bit weights that the module's patched forward expands."""
    forward = getattr(vars(module).get("forward"), "__func__", None)
    found = []
    for name in getattr(forward, "expands", ()):
        child = module.get_submodule(name)
        weight: Any = getattr(child, "base_layer", child).weight
        # Without a state it has not been quantized yet.
        if getattr(weight, "quant_state", None) is not None and not weight.requires_grad:
            found.append(weight)
    return found


def version(weight: torch.Tensor) -> int:
    """How often a weight was written to in place."""
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' weights look at each call otherwise
        return weight._version


class StreamedWeights:
    """The packed weights of some layers in pinned host memory, until `restore()`.

    layers: the weights of each, in the order of a forward; of `movable_weights`. stream: for the copies from
    the host; None for one of its own. advance: called at each step to another of these layers, with its place
    among them, once the copy for the next one is launched. Raises StaysError, with all of them as they were,
    where memory can't be pinned, the device can't read it there, or reads other bytes.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Parameter]],
        stream: Any = None,
        advance: Callable[[int], None] = lambda index: None,
    ) -> None:
        self._advance = advance
        self.device = layers[0][0].device
        self._layers = [_Layer(weights) for weights in layers]
        most = max(layer.size for layer in self._layers)
        try:
            places = [
                torch.empty(most, dtype=torch.uint8, device=self.device)
                for _ in range(min(SLOTS, len(self._layers)))
            ]
            for layer in self._layers:
                layer.move()
        except BaseException as error:
            for layer in self._layers:
                layer.back()
            if isinstance(error, torch.OutOfMemoryError):
                raise StaysError("the device has no room for those that are on their way") from error
            raise
        self._slots = [_Slot(place) for place in places]
        self._at: int | None = None
        """The layer whose weights were read last."""
        self.reached = 0
        """How often a layer was asked for behind another one."""
        self._side = stream
        if stream is None and self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._sources = [
            _Source(
                weakref.ref(self), layer, index, self._slots[index % len(self._slots)].place[part], weight
            )
            for index, layer in enumerate(self._layers)
            for part, weight in zip(layer.parts, layer.weights, strict=True)
        ]
        self._offer()

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(layer.size for layer in self._layers)

    @property
    def away(self) -> bool:
        """Whether they are in host memory now."""
        return any(layer.is_away for layer in self._layers)

    def _offer(self) -> None:
        from sloth_kernels.nf4 import SOURCES

        addresses = (view.data_ptr() for layer in self._layers for view in layer.views)
        SOURCES.update(zip(addresses, self._sources, strict=True))

    def reach(self, index: int) -> None:
        """A layer's weights are about to be read, or its backward begins. The next ones begin to come."""
        if index == self._at:
            return
        self.reached += 1
        before, self._at = self._at, index
        self._load(index)
        step = 1 if before is None or index > before else -1
        for far in range(1, len(self._slots)):
            self._load(index + step * far)
        self._advance(index)

    def slot_of(self, index: int) -> _Slot:
        """Where a layer's bytes are, for what the current stream is given next."""
        self.reach(index)
        slot = self._slots[index % len(self._slots)]
        if slot.filled is not None:
            stream = current_stream(self.device)
            if stream.cuda_stream not in slot.waited:
                stream.wait_event(slot.filled)
                slot.waited.add(stream.cuda_stream)
        return slot

    def read(self, slot: _Slot) -> None:
        """What reads a place has been launched on the current stream."""
        if slot.filled is not None:
            stream = current_stream(self.device)
            event = slot.readers.get(stream.cuda_stream)
            if event is None:
                event = slot.readers[stream.cuda_stream] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)

    def again(self, index: int) -> None:
        """A layer's bytes were written to: what has come of them is old."""
        for slot in self._slots:
            if slot.index == index:
                slot.index, self._at = None, None
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))

    def _load(self, index: int) -> None:
        if not 0 <= index < len(self._layers):
            return
        slot, layer = self._slots[index % len(self._slots)], self._layers[index]
        if slot.index == index:
            return
        slot.index = None
        place = slot.place[: layer.size]
        if self._side is None:
            place.copy_(layer.host)
        else:
            for event in slot.readers.values():
                self._side.wait_event(event)
            with on(self._side):
                place.copy_(layer.host, non_blocking=True)
            slot.waited.clear()
            slot.filled = self._side.record_event()
        slot.index = index

    def bring(self) -> bool:
        """Have them all on the device for a while, for many short forwards; whether there was room."""
        try:
            for layer in self._layers:
                layer.back()
        except torch.OutOfMemoryError:
            self.send()
            return False
        return True

    def send(self) -> None:
        """Let those that `bring` has brought be in host memory only again."""
        for layer in self._layers:
            layer.away()

    def restore(self) -> bool:
        """Bring them back to the device; what somebody else has put in their place stays. False, with a
        warning, where the device has no room: they stay in host memory then, where reading them is slow."""
        self._slots, self._at = [], None
        self._sources.clear()
        if self._side is not None:  # nobody gets the places before what is on its way is there
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        try:
            for layer in self._layers:
                layer.back()
        except torch.OutOfMemoryError:
            self.send()
            warnings.warn(
                "sloth: 4-bit weights stay in host memory, where they are slow to read: the device has no "
                "room for them",
                stacklevel=2,
            )
            return False
        return True


class _Layer:
    """A layer's packed weights side by side in host memory."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = [weakref.ref(weight) for weight in weights]
        self.parts: list[slice] = []
        self.size = 0
        for weight in weights:
            size = weight.numel() * weight.element_size()
            self.parts.append(slice(self.size, self.size + size))
            self.size += -(-size // ALIGNMENT) * ALIGNMENT
        self.host: Any = None
        self.views: list[torch.Tensor] = []
        self.brought: list[tuple[int, int]] = []
        """While they are on the device for a while: each one's address there and version; zeros for those
        that are not."""

    @property
    def is_away(self) -> bool:
        return any(
            weight is not None and weight.data_ptr() == view.data_ptr()
            for ref, view in zip(self.weights, self.views, strict=False)
            if (weight := ref()) is not None
        )

    @torch.inference_mode(False)
    def move(self) -> None:
        """Copy them to the host, prove the copies and let the parameters have their storage there."""
        weights = [weight for ref in self.weights if (weight := ref()) is not None]
        self.host = host_memory(self.size, weights[0].is_cuda)
        if weights[0].is_cuda and not self.host.is_pinned():
            raise StaysError("host memory can't be pinned")
        views = []
        for weight, part in zip(weights, self.parts, strict=True):
            own = weight.detach().view(torch.uint8).view(-1)
            # Asynchronous, so that the allocator of pinned memory knows of the stream: see HostWeight.
            self.host[part].copy_(own, non_blocking=True)
            try:
                # Each with a storage of its own, as they had: who saves them finds nothing shared.
                read = on_device(self.host[part], weight.device)
                same = read.device == weight.device and torch.equal(read, own)
            except Exception as error:  # of whatever version of PyTorch or CUDA
                raise StaysError(f"the device can't read them there ({error})") from error
            if not same:
                raise StaysError("the device reads other bytes there")
            views.append(read.view(weight.dtype).view(weight.shape))
        self.views = views
        for weight, view in zip(weights, views, strict=True):
            weight.data = view

    @torch.inference_mode(False)
    def back(self) -> None:
        """Give those that are in host memory bytes on the device."""
        self.brought = self.brought or [(0, 0)] * len(self.views)
        for index, (ref, view) in enumerate(zip(self.weights, self.views, strict=False)):
            weight = ref()
            if weight is None or weight.data_ptr() != view.data_ptr():
                continue
            device = torch.empty(view.shape, dtype=view.dtype, device=weight.device)
            bytes_ = self.host[self.parts[index]]
            device.view(torch.uint8).view(-1).copy_(bytes_, non_blocking=True)
            weight.data = device
            self.brought[index] = device.data_ptr(), version(weight)

    @torch.inference_mode(False)
    def away(self) -> None:
        """Take back what `back` gave, but for those that have others' bytes since; what was written to it
        meanwhile goes to the host."""
        for index, (address, written) in enumerate(self.brought):
            weight, view = self.weights[index](), self.views[index]
            if weight is None or not address or weight.data_ptr() != address:
                continue
            if version(weight) != written:
                own = weight.detach().view(torch.uint8).view(-1)
                self.host[self.parts[index]].copy_(own, non_blocking=True)
            weight.data = view
        self.brought = []


class _Slot:
    """A place on the device, and the layer that is there or on its way."""

    def __init__(self, place: torch.Tensor) -> None:
        self.place = place
        self.index: int | None = None
        self.filled: Any = None
        self.waited: set[int] = set()
        """Streams that have waited for the copy."""
        self.readers: dict[int, Any] = {}
        """Of each stream that reads the place, an event behind what reads it."""


class _Source:
    """Where one weight's bytes are on the device when its layer is reached (`sloth_kernels.nf4.Source`)."""

    __slots__ = ("__weakref__", "_bytes", "_index", "_owner", "_slot", "_version", "_weight", "together")

    def __init__(
        self,
        owner: weakref.ref[StreamedWeights],
        layer: _Layer,
        index: int,
        place: torch.Tensor,
        weight: weakref.ref[nn.Parameter],
    ) -> None:
        self._owner, self._index, self._bytes, self._weight = owner, index, place, weight
        self.together = layer
        self._slot: _Slot | None = None
        self._version = self._written()

    def _written(self) -> int:
        weight = self._weight()
        return -1 if weight is None else version(weight)

    def packed(self) -> torch.Tensor:
        """The bytes, once the layer's copy is there."""
        owner = self._owner()
        assert owner is not None  # it holds this
        if (version := self._written()) != self._version:  # as load_state_dict() does
            self._version = version
            owner.again(self._index)
        self._slot = owner.slot_of(self._index)
        return self._bytes

    def read(self) -> None:
        """They are being read."""
        owner = self._owner()
        if self._slot is not None and owner is not None:
            owner.read(self._slot)
