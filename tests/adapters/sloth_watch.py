"""A plugin of sloth that the Axolotl tests put beside it: it writes down which forwards a run has called.

SLOTH_WATCH names the file; process 0 writes {"patched": calls by op, "problem": what ForwardCalls found,
"linears": {name in the base model: "4bit" or the weight's dtype}}.
"""

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from helpers import ForwardCalls
from torch import nn

from sloth_plugins import hookimpl

_calls: list[tuple[ForwardCalls, dict[str, str]]] = []
_linears: dict[str, str] = {}


@hookimpl
def sloth_patched(acceleration: Any) -> None:
    """Watch the newest acceleration; an earlier one of the same model has been undone."""
    if not _calls:
        atexit.register(_write)
    else:
        _calls.pop()[0].stop()
    calls = ForwardCalls(acceleration)
    _calls.append((calls, {row.module: row.op for row in acceleration.report.patched}))
    calls.start()
    _linears.clear()
    for name, module in acceleration.model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            base = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            quantized = hasattr(module.weight, "quant_state")
            _linears[base] = "4bit" if quantized else str(module.weight.dtype).removeprefix("torch.")


def _write() -> None:
    calls, ops = _calls[0]
    calls.stop()
    path = os.environ.get("SLOTH_WATCH")
    if path and os.environ.get("RANK", "0") == "0":
        try:
            calls.check()
            problem = ""
        except AssertionError as error:
            problem = str(error)[:2000]
        counted: Counter[str] = Counter()
        for module, number in calls.patched.items():
            counted[ops[module]] += number
        Path(path).write_text(json.dumps({"patched": counted, "problem": problem, "linears": _linears}))
