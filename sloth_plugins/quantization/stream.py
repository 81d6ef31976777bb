"""A causal language model, one decoder layer at a time.

The layers' own code runs them: the model is built without memory for its weights, its parts outside the
decoder layers are read, and each layer's arguments are recorded in one pass in which the layers do nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Checkpoint:
    """The safetensors files of a model directory, or one such file, read tensor by tensor."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        files: dict[str, str]
        index = directory / "model.safetensors.index.json"
        if directory.is_file():
            with safe_open(directory, "pt") as file:
                directory, files = directory.parent, dict.fromkeys(file.keys(), directory.name)
        elif index.is_file():
            files = json.loads(index.read_text())["weight_map"]
        elif (directory / "model.safetensors").is_file():
            with safe_open(directory / "model.safetensors", "pt") as file:
                files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(
                f"{str(directory)!r} has no model.safetensors: allowed is a model directory with such weights"
            )
        self.directory, self.files, self._open = directory, files, safe_open
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in sorted(set(files.values())):
            if not (directory / name).is_file():
                raise ValueError(f"{str(directory / name)!r} is missing: the index of the model names it")
            with safe_open(directory / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    self.shapes[key] = tuple(part.get_shape())
                    self.dtypes[key] = _DTYPES.get(part.get_dtype(), torch.uint8)
                    count = 1
                    for size in self.shapes[key]:
                        count *= size
                    self.bytes[key] = count * self.dtypes[key].itemsize

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with self._open(self.directory / self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Stream:
    """The decoder layers of a model, in order; only the one in use is in memory where the model was not.

    The forward of a layer takes hidden states (1, tokens, width), here float32, and gives them back.

    checkpoint: the model's files, None for a model that was given in memory; whole: all of it is in memory.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint | None, device: torch.device, *, whole: bool = False
    ) -> None:
        self.model, self.checkpoint, self.device = model.eval(), checkpoint, device
        self.whole = whole or checkpoint is None
        self.prefix, self.layers = _decoder_layers(model)
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.layers)

    def name(self, index: int, inner: str) -> str:
        """The full dotted name of a module of a layer."""
        return f"{self.prefix}.{index}.{inner}"

    def dtype(self, index: int, linear: str) -> torch.dtype:
        """What a layer's linear is stored in; bfloat16 for a model in memory, which may be a float32 copy."""
        if self.checkpoint is None:
            return torch.bfloat16
        return self.checkpoint.dtypes[self.name(index, f"{linear}.weight")]

    def start(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Take rows of token ids (1, tokens); the hidden states that enter the first layer, for each."""
        self.rows, self._calls, first = list(rows), [], []
        for row in rows:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def record(*args: Any, calls: Any = calls, **kwargs: Any) -> Tensor:
                hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
                if not calls:
                    first.append(hidden.float())
                calls.append((args[1:], kwargs))
                return hidden

            with self._replaced([record] * len(self)), torch.no_grad():
                self.model(input_ids=row.to(self.device), use_cache=False)
            if len(calls) != len(self):
                raise ValueError(
                    f"{type(self.model).__name__}: {len(calls)} calls of its {len(self)} layers in one pass; "
                    "quantized are models whose layers run once each, one after another"
                )
            self._calls.append(calls)
        return first

    def run(self, index: int, layer: nn.Module, hidden: Tensor, row: int) -> Tensor:
        """What a layer makes of a row's hidden states."""
        args, kwargs = self._calls[row][index]
        with torch.no_grad():
            out: Any = layer(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def logits(self, hidden: Tensor, row: int) -> Tensor:
        """(tokens, vocabulary) float32 from what the last layer gave."""

        def skip(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        with self._replaced([skip] * (len(self) - 1) + [lambda *a, **k: hidden]), torch.no_grad():
            logits: Tensor = self.model(input_ids=self.rows[row].to(self.device), use_cache=False).logits
        return logits[0].float()

    def load(self, index: int) -> nn.Module:
        """A layer in float32, in memory of its own."""
        layer = copy.deepcopy(self.layers[index])
        if self.checkpoint is not None and not self.whole:
            _fill(layer, f"{self.prefix}.{index}.", self.checkpoint, self.device)
        return layer.float().to(self.device).eval()

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        for layer, forward in zip(self.layers, forwards, strict=True):
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules that is in no other list: its name and itself."""
    found: tuple[str, nn.ModuleList] | None = None
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    for name, modules in lists.items():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if not inside and (found is None or len(modules) > len(found[1])):
            found = name, modules
    if found is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers that could be quantized")
    return found


def _fill(module: nn.Module, prefix: str, checkpoint: Checkpoint, device: torch.device) -> list[str]:
    """Read what `module` keeps in its state dict and lies on no device yet; names that the files lack."""
    missing = []
    for path, part in module.named_modules():
        for store in (part._parameters, part._buffers):
            for key, value in store.items():
                name = prefix + (f"{path}.{key}" if path else key)
                if value is None or (store is part._buffers and key in part._non_persistent_buffers_set):
                    continue
                if checkpoint.shapes.get(name) != tuple(value.shape):
                    missing.append(name)
                    continue
                tensor = checkpoint.tensor(name).to(device)
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                store[key] = (
                    nn.Parameter(tensor, requires_grad=False) if store is part._parameters else tensor
                )
    return missing


def open_stream(directory: Path, device: torch.device, trust_remote_code: bool) -> tuple[Stream, str | None]:
    """The stream of a model directory, and why it is in memory as a whole, if so."""
    import transformers
    from accelerate import init_empty_weights

    checkpoint = Checkpoint(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever transformers and the model's own code raise
        sentence = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{str(directory)!r} is no causal language model that can be built: {sentence}"
        ) from error
    prefix, _ = _decoder_layers(model)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    lacking = [n for n, shape in state.items() if n not in tied and checkpoint.shapes.get(n) != shape]
    if lacking:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=trust_remote_code, local_files_only=True
        )
        reason = f"{len(lacking)} of its tensors are stored under other names or shapes, such as {lacking[0]}"
        return Stream(model.to(device), checkpoint, device, whole=True), reason
    spared = model.get_submodule(prefix)
    parent, _, child = prefix.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.ModuleList())
    _fill(model, "", checkpoint, device)
    setattr(model.get_submodule(parent), child, spared)
    model.tie_weights()
    for buffer_owner in model.modules():
        for key, buffer in buffer_owner._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                buffer_owner._buffers[key] = buffer.to(device)
    return Stream(model, checkpoint, device), None
