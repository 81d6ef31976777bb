"""What every adapter counts while a model trains: tokens, and the most memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class TokenCounter:
    """Counts, in `tokens`, what this process trains on, padding included; evaluation does not count."""

    def __init__(self) -> None:
        self.tokens = 0
        self._handles: list[Any] = []

    def watch(self, model: nn.Module, compiled: nn.Module | None = None) -> None:
        """Count what passes through `model`, which `torch.compile` has wrapped into `compiled`, if at all."""

        # A plain function: callbacks that average weights copy the module with its hooks.
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
                return
            ids = kwargs.get("input_ids", args[0] if args else None)
            embeddings = kwargs.get("inputs_embeds")
            if isinstance(ids, torch.Tensor):
                self.tokens += ids.numel()
            elif isinstance(embeddings, torch.Tensor):
                self.tokens += embeddings.shape[0] * embeddings.shape[1]

        # A hook inside what torch.compile traces would run once, in tracing.
        target: Any = compiled
        if target is None:
            # TRL's fused heads call the backbone past the top module, so the count sits where both come by.
            target = getattr(model, "base_model", model)
            target = getattr(target, "model", target)  # PEFT: LoraModel.model is the causal LM
            target = getattr(target, "base_model", target)
        if isinstance(target, nn.Module):
            self._handles.append(target.register_forward_pre_hook(count, with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks out. `tokens` stays."""
        while self._handles:
            self._handles.pop().remove()


def cuda_devices(models: Iterable[nn.Module | None]) -> tuple[torch.device, ...]:
    """The CUDA devices that hold parameters of `models`; empty for models on a CPU beside a GPU."""
    found = {p.device for model in models if model is not None for p in model.parameters() if p.is_cuda}
    return tuple(sorted(found, key=lambda device: device.index))


def peak_bytes(devices: Iterable[torch.device]) -> int:
    """The most bytes so far: allocated on the CUDA `devices`, in all; without any, resident in this process.

    What is resident is 0 where the system does not tell it (Windows).
    """
    devices = tuple(devices)
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
