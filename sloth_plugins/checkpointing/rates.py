"""How fast a device computes, reads its memory and talks to its host: known, or measured once and cached."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sloth_plugins.specs import BadInputError

VERSION = 3
# After half of that the clock of an H200 under load has settled.
SUSTAINED_S = 0.6


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that a training step reaches, not a data sheet's. Host links are in GB/s (1e9), each way."""

    name: str
    matmul_tflops: float
    attention_tflops: float
    memory_tb_s: float
    to_host_gb_s: float
    from_host_gb_s: float
    host_us: float
    """Microseconds that the host takes to launch one matmul from Python."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise BadInputError(f"{field.name}={value!r}: allowed is a positive number")

    def to_dict(self) -> dict[str, Any]:
        """The rates as JSON types."""
        return dataclasses.asdict(self)


def _known(name: str, matmul: float, attention: float, memory: float, link: float) -> Rates:
    return Rates(
        name=name,
        matmul_tflops=matmul,
        attention_tflops=attention,
        memory_tb_s=memory,
        to_host_gb_s=link,
        from_host_gb_s=link,
        host_us=10.0,
    )


# What the host takes for a launch is unknown without a measurement: 10 us on a desktop's processor.
# H200: measured (dense bf16 matmuls in a QLoRA step, cuDNN attention, copies, PCIe 5). The others: about 80 %
# of the data sheet, as the H200 reaches of its own.
KNOWN = {
    rates.name: rates
    for rates in (
        _known("h200", 730, 480, 3.6, 55),
        _known("h100", 680, 450, 2.6, 50),
        _known("a100", 250, 170, 1.5, 24),
        _known("4090", 140, 110, 0.85, 24),
        _known("a10", 70, 50, 0.48, 22),
        _known("t4", 40, 15, 0.25, 11),
        _known("unknown", 100, 60, 0.8, 12),
    )
}


def rates_for(gpu: str) -> Rates:
    """The known rates that a name such as "NVIDIA H200" or "4090" asks for; those of "unknown" otherwise."""
    words = re.split(r"[^0-9a-z]+", gpu.lower())
    return next((KNOWN[name] for name in KNOWN if name in words), KNOWN["unknown"])


def cache_path() -> Path:
    """Where measured rates are kept: sloth_plugins/rates.json in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "sloth_plugins" / "rates.json"


def measure_rates(
    device: Any, *, again: bool = False, measure: Callable[[Any], Rates] | None = None
) -> Rates:
    """The rates of a CUDA device, from the cache or measured (about two seconds) and cached.

    A cache that can't be read is made anew, one that can't be written is done without. For other devices the
    rates are those of "unknown". `measure` takes the place of the measurement.
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda" and measure is None:
        return KNOWN["unknown"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    key, path = f"{name}, torch {torch.__version__}", cache_path()
    entries = _read(path)
    if not again and key in entries:
        return entries[key]
    found = (measure or _measure)(device)
    entries[key] = found
    text = json.dumps({"version": VERSION, "rates": {k: r.to_dict() for k, r in entries.items()}}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several ranks may write at once: each its own file, renamed as a whole.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass
    return found


def _read(path: Path) -> dict[str, Rates]:
    try:
        values = json.loads(path.read_text())
        if values["version"] != VERSION:
            return {}
        return {key: Rates(**value) for key, value in values["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _measure(device: Any) -> Rates:
    import torch
    from torch.nn import functional

    def seconds(work: Callable[[], Any], repeat: int = 10) -> list[float]:
        for _ in range(3):
            work()
        times = []
        for _ in range(repeat):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return sorted(times)

    def median(work: Callable[[], Any]) -> float:
        return statistics.median(seconds(work))

    def under_load(work: Callable[[], Any]) -> float:
        """Of one, in a loop of SUSTAINED_S seconds, which takes a GPU to its power limit as a step does."""
        count, began, last = 50, time.perf_counter(), 0.0
        while time.perf_counter() < began + SUSTAINED_S:
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                work()
            torch.cuda.synchronize(device)
            last = time.perf_counter() - start
        return last / count

    with torch.no_grad(), torch.cuda.device(device):
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        few = torch.randn(16, 16, device=device, dtype=dtype)
        host_us = median(lambda: [few @ few for _ in range(200)]) / 200 * 1e6
        n = 4096
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        matmul = 2 * n**3 / under_load(lambda: a @ b) / 1e12
        q, k, v = (torch.randn(2, 32, 2048, 128, device=device, dtype=dtype) for _ in range(3))
        flops = 2 * 32 * 2048 * 2048 * 128 * 4 / 2
        attention = (
            flops / median(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)) / 1e12
        )
        large, to = (torch.empty(2**28, dtype=torch.uint8, device=device) for _ in range(2))
        memory = 2 * large.numel() / median(lambda: to.copy_(large)) / 1e12
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        # The best of several: what else uses the host's memory now will not all the time.
        to_host = host.numel() / seconds(lambda: host.copy_(large, non_blocking=True))[0] / 1e9
        from_host = host.numel() / seconds(lambda: large.copy_(host, non_blocking=True))[0] / 1e9
    return Rates(
        name=torch.cuda.get_device_name(device),
        matmul_tflops=round(matmul, 1),
        attention_tflops=round(attention, 1),
        memory_tb_s=round(memory, 3),
        to_host_gb_s=round(to_host, 2),
        from_host_gb_s=round(from_host, 2),
        host_us=round(host_us, 1),
    )
