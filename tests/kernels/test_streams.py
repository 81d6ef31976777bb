"""The ways to other streams do what torch.cuda's do."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from sloth_kernels import _streams
from sloth_kernels._streams import Side, current_stream, on


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a CUDA device with streams 0 and 7 is asked for."""
    made: list[tuple[Any, ...]] = []

    class Stream(types.SimpleNamespace):
        device, device_index = torch.device("cuda", 0), 0

        def wait_event(self, event: Any) -> None:
            made.append((self.raw, "waits", event.after))

    class Event:
        def record(self, stream: Any) -> None:
            self.after = stream.raw

    now = [Stream(raw=0)]

    def set_stream(stream: Any) -> None:
        made.append(("set", stream.raw))
        now[0] = stream

    monkeypatch.setattr(_streams, "_KNOWN", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now[0].raw, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(raw=7))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return made


def test_the_current_stream_comes_back_whatever_happens_inside(calls: list[tuple[Any, ...]]) -> None:
    device = torch.device("cuda", 0)
    side = Side(device)
    side.wait()
    with pytest.raises(KeyError), on(side.stream):
        assert current_stream(device) is side.stream
        raise KeyError
    assert current_stream(device).raw == 0
    assert calls == [(7, "waits", 0), ("set", 7), ("set", 0)]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = torch.ones(2**24, device="cuda")
    device, main, side = x.device, torch.cuda.current_stream(), Side(x.device)
    for _ in range(3):
        for _ in range(20):
            x.mul_(2).mul_(0.5)
        x.add_(1)
        side.wait()
        with on(side.stream):
            assert current_stream(device) == torch.cuda.current_stream() == side.stream != main
            with on(main):
                assert current_stream(device) == torch.cuda.current_stream() == main
            assert torch.cuda.current_stream() == side.stream
            y = x.clone()
        assert current_stream(device) == torch.cuda.current_stream() == main
        main.wait_stream(side.stream)
        assert torch.equal(x, y)
