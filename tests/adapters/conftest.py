from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import counting_kernels
from sloth_hf_trainer import callback as callback_module
from transformers import TrainerCallback


@pytest.fixture
def kernel_calls() -> Iterator[Counter[str]]:
    """How often each op's kernel ran; every model that is accelerated in the test gets counting kernels."""
    with counting_kernels() as calls:
        yield calls


class Clock(TrainerCallback):
    """In the place of `time` in the callback's module: a step takes a second, an evaluation hours.

    SlothCallback reads it first at each event, so a second that passes when a step begins lies within it.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1.0

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.now += 3600.0

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.now += 3600.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(callback_module, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made
