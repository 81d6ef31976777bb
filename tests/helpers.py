"""What several test files share: tiny models, a tiny tokenizer, ways of counting calls and bytes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import sloth_plugins as sloth
from sloth_plugins.manager import Manager, default_manager

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = (".", "kernels", "adapters/hf_trainer", "adapters/axolotl", "adapters/lightning")
VOCABULARY = 104
_BASE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# What a family needs beside the base: layer counts that reach every kind of its layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": dict(num_hidden_layers=6),
    "phi3": {},
    "olmo2": {},
    "cohere2": dict(num_hidden_layers=4),
    "granite": {},
    "smollm3": dict(num_hidden_layers=4),
    "glm4": {},
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "bert": {},
}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of `family` (a key of FAMILIES) on the CPU; `changes` go into its config.

    Norm weights are random too: with ones, a kernel that forgets them would pass.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    config = AutoConfig.for_model(family, **{**_BASE, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = (AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name.lower():
                parameter.add_(torch.randn_like(parameter) / 10)
    return model.to(dtype)


def tiny_tokenizer() -> Any:
    """One token a printable character, with a chat template; fits the vocabulary of `tiny_model`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(specials + letters)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    assert tokenizer.get_vocab_size() <= VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        chat_template="{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}",
    )


def forwards(model: nn.Module) -> dict[str, Any]:
    """The forwards that sit on instances, by module name."""
    return {
        name: module.__dict__["forward"]
        for name, module in model.named_modules()
        if "forward" in module.__dict__
    }


def relative_difference(some: Sequence[float], others: Sequence[float]) -> float:
    """The largest |a - b| / |b| of two equally long, non-empty series; infinity where a value is NaN."""
    assert len(some) == len(others) > 0
    worst = max(abs(a - b) / abs(b) for a, b in zip(some, others, strict=True))
    return worst if all(a == a for a in (*some, *others)) else float("inf")


class CountingKernels:
    """Offers the built-in kernels (Triton's for a model on a GPU, else the others); counts their calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    @sloth.hookimpl
    def sloth_register_kernels(self) -> list[sloth.KernelSpec]:
        from sloth_kernels.plugin import sloth_register_kernels

        backends = {"torch", "triton"} if torch.cuda.is_available() else {"torch"}
        return [
            dataclasses.replace(
                kernel,
                name=f"counting.{kernel.backend}.{kernel.op}",
                backend="counting",
                function=self._counted(kernel.op, kernel.function),
            )
            for kernel in sloth_register_kernels()
            if kernel.backend in backends
        ]

    def _counted(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[op] += 1
            return function(*args, **kwargs)

        return counted


@contextlib.contextmanager
def counting_kernels() -> Iterator[Counter[str]]:
    """Registers CountingKernels; yields how often each op's kernel has run. Verification counts too."""
    plugin = CountingKernels()
    default_manager().register(plugin, name="counting")
    try:
        yield plugin.calls
    finally:
        default_manager().unregister("counting")


class ForwardCalls:
    """Counts which forwards the patched modules of a model run, by watching every Python call of this thread.

    Watching code objects (not wrapping functions) also sees a patch that falls back to the class's forward,
    which it holds in a closure. `patched` and `original` count by module name; `helpers` counts calls of the
    model's own rotary helper made from a patched module.
    """

    def __init__(self, acceleration: sloth.Acceleration) -> None:
        model = acceleration.model
        assert model is not None and acceleration.active
        self.patched: Counter[str] = Counter()
        self.original: Counter[str] = Counter()
        self.helpers = 0
        self._names: dict[int, str] = {}
        self._kinds: dict[tuple[int, int], Counter[str]] = {}
        self._helper_codes = set()
        for row in acceleration.report.patched:
            if row.op == "linear_cross_entropy":  # TRL uses the head's weight, generation its own forward
                continue
            module = model.get_submodule(row.module)
            self._names[id(module)] = row.module
            # Decorators are kept around a patch, so what counts is what they wrap.
            own, ours = map(inspect.unwrap, (type(module).forward, module.__dict__["forward"].__func__))
            # The patched attention shares its code with the original and differs in its globals.
            self._kinds[id(own.__code__), id(own.__globals__)] = self.original
            self._kinds[id(ours.__code__), id(ours.__globals__)] = self.patched
            for name in own.__code__.co_names:
                helper = own.__globals__.get(name)
                if "rotary" in name and isinstance(helper, FunctionType):
                    self._helper_codes.add(id(helper.__code__))
        self._codes = {code for code, _ in self._kinds}

    def check(self) -> None:
        """Fails unless every patched module ran its patch and none of them the model's own code.

        A norm that its decoder layer's patch has fused away is not called at all.
        """
        assert not self.original and self.helpers == 0, (self.original, self.helpers)
        idle = {name for name in self._names.values() if not self.patched[name]}
        fused = {name for name in idle if self.patched[name.rpartition(".")[0]] and "norm" in name}
        assert idle == fused and len(fused) < len(self._names), idle - fused

    @contextlib.contextmanager
    def watching(self) -> Iterator[ForwardCalls]:
        """Counts inside the block."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        """Begin to count."""
        sys.setprofile(self._seen)

    def stop(self) -> None:
        """Stop counting."""
        sys.setprofile(None)

    def _seen(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = id(frame.f_code)  # hashing a code object would hash all that it holds
        if code in self._helper_codes and self._of_patched_module(frame):
            self.helpers += 1
        elif code in self._codes:
            counter = self._kinds.get((code, id(frame.f_globals)))
            name = self._names.get(id(frame.f_locals.get("self")))
            if counter is not None and name is not None:
                counter[name] += 1

    def _of_patched_module(self, frame: FrameType) -> bool:
        """Whether one of the next callers (the attention, past our own helper) is a patched module's."""
        caller = frame.f_back
        for _ in range(3):
            if caller is not None and id(caller.f_locals.get("self")) in self._names:
                return True
            caller = caller.f_back if caller is not None else None
        return False


def batch(model: nn.Module, *, seed: int = 1, rows: int = 2, tokens: int = 8) -> torch.Tensor:
    """Random token ids without padding, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    return ids.to(next(model.parameters()).device)


def loss_and_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One forward and backward from zero gradients, with the random state fixed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def step(model: Any, given: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=given, labels=given).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """That two steps gave the same bits."""
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def in_float64(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a copy of `model` in float64."""
    return loss_and_gradients(copy.deepcopy(model).double(), ids)[1]


def no_further(some: torch.Tensor, others: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether `some` is at most 1.5 times as far from the truth as `others`, the contract of every kernel:
    for float32 computations whose own rounding is more than a fixed tolerance."""
    return bool((some.double() - truth).norm() <= 1.5 * (others.double() - truth).norm())


def train(model: Any, steps: int = 3) -> list[float]:
    """The losses of a few AdamW steps on fixed data, in training mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        ids = batch(model, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def patched_ops(report: Any) -> dict[str, str]:
    """Module name -> op, of everything that a report says is patched."""
    return {row.module: row.op for row in report.patched}


def reasons(report: Any) -> dict[tuple[str, str], str]:
    """(module, op) -> reason, of everything that a report says is left alone."""
    return {(skip.module, skip.op): skip.reason for skip in report.skipped}


def make_plugin(**hooks: Any) -> ModuleType:
    """A plugin whose hooks are the given functions."""
    plugin = ModuleType("plugin")
    vars(plugin).update({name: sloth.hookimpl(function) for name, function in hooks.items()})
    return plugin


def manager_with(**plugins: Any) -> Manager:
    """The built-ins and the given plugins, by name, without the entry points of the environment."""
    manager = Manager(entry_points=False)
    for name, plugin in plugins.items():
        manager.register(plugin, name=name)
    return manager


@contextlib.contextmanager
def no_sloth_warnings() -> Iterator[None]:
    """Fails on a warning of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in caught if str(w.message).startswith("sloth:")]
    assert not ours, ours


def python_environment(*first: Path) -> dict[str, str]:
    """The environment of a Python that finds `first` and our source roots, installed or not; no GPU."""
    paths = [str(path) for path in (*first, *(ROOT / root for root in SOURCE_ROOTS))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}


class Alive(TorchDispatchMode):
    """The most bytes of storages, made inside, that were alive at once; aside: those made now don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.aside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)
        }
        result = function(*args, **(kwargs or {}))
        self.storages = {key: own for key, own in self.storages.items() if not own[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor) and (key := tensor.untyped_storage()._cdata) not in given:
                storage = tensor.untyped_storage()
                self.storages.setdefault(key, (StorageWeakRef(storage), storage.nbytes() * (not self.aside)))
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result

    @contextlib.contextmanager
    def put_aside(self) -> Iterator[None]:
        """What is made inside lies in host memory."""
        self.aside = True
        try:
            yield
        finally:
            self.aside = False
