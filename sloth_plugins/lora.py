"""Fused LoRA: which PEFT layers are served, in which groups, and what their forwards do at each call.

    lora_linear   linear layers called one after another on the same tensor (q, k and v), or one alone
    lora_mlp      a gated MLP whose gate, up and down hold LoRA layers, as one function

Groups are found by behaviour: the model runs once on a few random tokens, and the linear children of one
parent that get the very same tensor belong together. Whichever of them is called first computes them all;
the others are handed their result when they are called with that tensor, and compute alone otherwise.

Everything about an adapter (active, disabled, merged, scaling, dropout, frozen or not) is read from PEFT's
layer at every call. A call that the kernel can't serve goes to the class's own forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from sloth_plugins.checkpointing import repeat
from sloth_plugins.numerics import Comparison
from sloth_plugins.patches import Forward, _hooked, _takes, named_like
from sloth_plugins.specs import FLOATS, KernelSpec, NotASite, Patch, Site, Skip
from sloth_plugins.survey import PlanContext, forward_obstacle, positional_parameters, stand_in
from sloth_plugins.verify import TOKENS, Trial, VerificationError, compare, undisturbed

# A larger weight is verified on its first rows, so that float64 copies stay small.
ELEMENTS = 2**25
# Up to as many rows without grad, a 4-bit layer is left to bitsandbytes: its gemm_4bit (0.50) multiplies by
# the packed weight, and expanding all of it for the few rows of a batch that decodes would take longer.
FEW_ROWS = 32
_Prove = Callable[[Trial, Sequence["_Layer"], nn.Module], list[Comparison]]
_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_PLAIN, _FOUR_BIT, _LORA, _OTHER = "plain", "4-bit", "lora", "other"
_KINDS: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


# Planning


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A linear layer that can be served: a PEFT LoRA layer, or a plain one beside it."""

    name: str
    module: nn.Module
    adapter: str | None
    dtype: torch.dtype
    signature: tuple[Any, ...]

    @property
    def base(self) -> nn.Module:
        """The layer that holds the frozen weight."""
        return _base(self.module)

    @property
    def four_bit(self) -> bool:
        """Whether the weight is stored in 4 bits."""
        return _kind(type(self.base)) == _FOUR_BIT

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        base: Any = self.base
        return base.out_features, base.in_features


def with_lora(
    model: nn.Module, context: PlanContext, plans: Sequence[Patch | Skip]
) -> Sequence[Patch | Skip]:
    """`plans` with the LoRA patches: an MLP's takes its gated_mlp patch's place, the others are added."""
    layers: dict[str, _Layer] = {}
    skips: list[Skip] = []
    for name, module in model.named_modules():
        if not _is_tuner_layer(module):
            continue
        try:
            layer = _layer(name, module)
            if layer.adapter is None:
                raise NotASite("it holds no adapter", benign=True)
            layers[name] = layer
        except NotASite as reason:
            skips.append(Skip(module=name, op="lora_linear", reason=str(reason), benign=reason.benign))
    if not layers:
        return [*plans, *skips]
    tuned = set(layers)
    for name, module in model.named_modules():
        inside = name.removesuffix(".base_layer") in layers or name in layers
        if not inside and _kind(type(module)) == _FOUR_BIT:
            with contextlib.suppress(NotASite):  # it holds no LoRA: there is nothing to report
                layers[name] = _layer(name, module)
    context = dataclasses.replace(
        context, dtypes={**context.dtypes, **{name: layer.dtype for name, layer in layers.items()}}
    )
    off = context.settings.kernels == "off" or {"lora_linear", "lora_mlp"} <= context.settings.disable
    runs = [] if off else _same_input(model, layers)
    make = _Maker(model=model, context=context, said=set(), slot=_Slot())
    linear = make.linear(layers, tuned, runs)
    kept: list[Patch | Skip] = []
    for plan in plans:
        if isinstance(plan, Patch) and plan.op == "gated_mlp":
            inner = [item for item in linear if item.module.startswith(f"{plan.module}.")]
            try:
                fused = make.mlp(plan, layers, [item for item in inner if isinstance(item, Patch)])
            except NotASite as reason:
                if not reason.benign:
                    skips.append(Skip(module=plan.module, op="lora_mlp", reason=str(reason)))
                fused = None
            if fused is not None:
                linear = [item for item in linear if item not in inner]
                kept.append(fused)
                continue
        kept.append(plan)
    return [*kept, *linear, *skips]


def _is_tuner_layer(module: nn.Module) -> bool:
    """A layer of PEFT's around another one, without an import of peft."""
    return type(module).__module__.startswith("peft.") and "base_layer" in module._modules


def _base(module: nn.Module) -> nn.Module:
    base = module._modules.get("base_layer")
    return module if base is None else base


def _kind(kind: type) -> str:
    """What a class of layers is, by its name and the module that defines it."""
    found = _KINDS.get(kind)
    if found is None:
        where = kind.__module__
        if kind is nn.Linear:
            found = _PLAIN
        elif where.startswith("peft.tuners.lora.") and kind.__name__ in ("Linear", "Linear4bit"):
            found = _LORA
        else:
            four_bit = next((c for c in kind.__mro__ if c.__name__ == "Linear4bit"), None)
            ours = four_bit is not None and four_bit.__module__.startswith("bitsandbytes.")
            found = _FOUR_BIT if ours and kind.forward is four_bit.forward else _OTHER  # type: ignore[attr-defined,union-attr]
        _KINDS[kind] = found
    return found


def _layer(name: str, module: nn.Module) -> _Layer:
    """What a LoRA layer (or a linear layer beside one) is served as; NotASite with the reason."""
    base: Any = _base(module)
    adapter = None
    if base is not module:
        adapter = _adapter_name(module)
    for each in (module, base):
        if (obstacle := forward_obstacle(each)) is not None:
            raise NotASite(obstacle)
    kind = _kind(type(base))
    if kind not in (_PLAIN, _FOUR_BIT):
        raise NotASite(
            f"its base layer is a {type(base).__module__.split('.')[0]} {type(base).__qualname__}; "
            "served are nn.Linear and bitsandbytes' Linear4bit"
        )
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    quantization: tuple[Any, ...] = ()
    if kind == _FOUR_BIT:
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise NotASite("its 4-bit weight is not quantized yet: move the model to its device first")
        if state.quant_type not in ("nf4", "fp4"):
            raise NotASite(f"its weight is quantized as {state.quant_type}; served are nf4 and fp4")
        if tuple(state.shape) != (base.out_features, base.in_features):
            raise NotASite("its weight was quantized as [K, N]: quantize it from (out, in) features")
        if getattr(state, "packing_format_for_cpu", False):
            raise NotASite("its weight is packed for bitsandbytes' CPU inference")
        dtype = base.compute_dtype or state.dtype
        nested = state.state2.blocksize if state.state2 is not None else None
        quantization = (state.quant_type, state.blocksize, nested, state.dtype, base.compute_type_is_set)
    else:
        if type(weight) not in _TENSORS or type(weight.data) not in _TENSORS:
            raise NotASite(f"its base weight is a {type(weight.data).__name__}: left to PEFT")
        if weight.requires_grad:
            raise NotASite("its base weight is trainable")
        dtype = weight.dtype
    if dtype not in FLOATS:
        raise NotASite(f"its base weight is {str(dtype).removeprefix('torch.')}")
    signature: tuple[Any, ...] = (
        *(type(module), type(base), base.in_features, base.out_features, dtype, weight.dtype),
        *(None if bias is None else (bias.dtype, bias.requires_grad), *quantization),
    )
    if adapter is not None:
        tuner: Any = module
        a, b = tuner.lora_A[adapter], tuner.lora_B[adapter]
        tensors = (a.weight, b.weight, b.bias)
        signature += tuple(None if t is None else (t.dtype, tuple(t.shape), t.requires_grad) for t in tensors)
        signature += (tuner.scaling[adapter],)
    return _Layer(name=name, module=module, adapter=adapter, dtype=dtype, signature=signature)


def _adapter_name(module: Any) -> str | None:
    """The adapter to plan and prove a LoRA layer with: the active one, else the first, if there is one."""
    kind = type(module)
    if not hasattr(module, "lora_A"):
        raise NotASite(f"PEFT's {kind.__qualname__} is no LoRA layer: nothing to fuse", benign=True)
    if _kind(kind) != _LORA:
        if kind.__name__ == "Embedding":
            raise NotASite("LoRA on an embedding is a lookup: left to PEFT", benign=True)
        raise NotASite(f"LoRA of the class {kind.__qualname__} is left to PEFT; served are linear layers")
    if getattr(module, "fan_in_fan_out", False):
        raise NotASite("its base weight is stored as (in, out) features (fan_in_fan_out)")
    names = list(module.lora_A.keys())
    if not names:
        return None
    name: str = next((n for n in module.active_adapters if n in names), names[0])
    if (variant := _variant(module, name)) is not None:
        raise NotASite(f"adapter {name!r} is {variant}: left to PEFT")
    if any(type(layer) is not nn.Linear for layer in (module.lora_A[name], module.lora_B[name])):
        raise NotASite(f"the matrices of adapter {name!r} are no plain linear layers")
    return name


def _variant(module: Any, adapter: str) -> str | None:
    """What an adapter is beside plain LoRA, or None."""
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None:
        name = type(variant).__name__.removesuffix("LinearVariant").removesuffix("Variant")
        return {"Dora": "DoRA", "ALora": "aLoRA"}.get(name, f"the LoRA variant {name}")
    return "DoRA" if getattr(module, "use_dora", {}).get(adapter) else None


def _same_input(model: nn.Module, layers: Mapping[str, _Layer]) -> list[list[str]]:
    """Names of layers of one parent that are called with the very same tensor, in the order of the calls.

    Empty where the model can't be run on random tokens: then every layer is planned alone.
    """
    if any(p.is_meta for p in model.parameters()):
        return []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    calls: list[tuple[str, torch.Tensor]] = []
    seen: set[str] = set()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in seen and len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            seen.add(name)
            calls.append((name, args[0]))  # keeps the tensor, so that no other one can get its identity

    embedding = getattr(model, "get_input_embeddings", lambda: None)
    handles = []
    with undisturbed(model), torch.no_grad():
        try:
            vocabulary = min(getattr(embedding(), "num_embeddings", None) or 100, 1000)
            ids = torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0x5107))
            for name, layer in layers.items():
                hook = partial(note, name)
                handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
            try:
                model(input_ids=ids.to(device), use_cache=False)
            except TypeError:
                model(input_ids=ids.to(device))
        except Exception:  # it may need inputs that we can't make up; what was seen until then still holds
            pass
        finally:
            for handle in handles:
                handle.remove()
    groups: dict[tuple[str, int], list[str]] = {}
    for name, x in calls:
        groups.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Makes the patches of one plan; `said`, `slot` and `verdicts` are shared by their forwards."""

    model: nn.Module
    context: PlanContext
    said: set[str]
    slot: _Slot
    verdicts: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def proven(self, site: str, op: str, layers: Sequence[_Layer], prove: _Prove) -> _Proven | None:
        """What a patch of `layers` asks about adapters that are added later; None where nothing is proven."""
        if not self.context.settings.verify:
            return None
        return _Proven(self.model, site, op, layers, prove, self.verdicts, self.said)

    def linear(
        self, layers: Mapping[str, _Layer], tuned: set[str], runs: Iterable[Sequence[str]]
    ) -> list[Patch | Skip]:
        """A patch a group, and one for each LoRA layer without one, in the model's order."""
        groups: list[list[_Layer]] = []
        for names in runs:
            by_kind: dict[Any, list[_Layer]] = {}
            for layer in (layers[name] for name in names):
                by_kind.setdefault((layer.dtype, _weight_device(layer)), []).append(layer)
            groups += [group for group in by_kind.values() if any(one.name in tuned for one in group)]
        grouped = {layer.name for group in groups for layer in group}
        groups += [[layers[name]] for name in tuned - grouped]
        order = {name: index for index, name in enumerate(layers)}
        plans: list[Patch | Skip] = []
        for group in sorted(groups, key=lambda group: min(order[layer.name] for layer in group)):
            first = group[0].name
            try:
                plans.append(self._linear_patch(group))
            except NotASite as reason:
                plans.append(Skip(module=first, op="lora_linear", reason=str(reason), benign=reason.benign))
        return plans

    def _linear_patch(self, group: Sequence[_Layer]) -> Patch:
        first = group[0]
        site = Site(module=first.name, role="lora_linear")
        kernel = self.context.choose(site, "lora_linear")
        prove = partial(_prove_linear, kernel=kernel)
        proven = self.proven(first.name, "lora_linear", group, prove)
        modules = [layer.module for layer in group]
        forwards = _linear_forwards(modules, kernel, self.said, self.slot, proven)
        return Patch(
            module=first.name,
            op="lora_linear",
            kernel=kernel,
            forwards={layer.name: forward for layer, forward in zip(group, forwards, strict=True)},
            signature=("lora_linear", kernel.name, *(layer.signature for layer in group)),
            verify=partial(_verify, site=first.name, names=[layer.name for layer in group], prove=prove),
        )

    def mlp(self, gated: Patch, layers: Mapping[str, _Layer], apart: Sequence[Patch]) -> Patch | None:
        """The patch of a whole MLP; None where it holds no LoRA, NotASite where it can't be served."""
        site = next(site for site in self.context.by_role("gated_mlp") if site.module == gated.module)
        if "gate" not in site.facts:
            return None
        module = self.model.get_submodule(site.module)
        names = tuple(site.facts[part] for part in ("gate", "up", "down"))
        children: list[_Layer] = []
        if not any(_is_tuner_layer(module.get_submodule(name)) for name in names):
            return None
        for name in names:
            child = f"{site.module}.{name}"
            if child not in layers and _is_tuner_layer(module.get_submodule(name)):
                return None  # its own reason is in the report
            try:
                children.append(layers.get(child) or _layer(child, module.get_submodule(name)))
            except NotASite as reason:
                raise NotASite(f"{name}: {reason}", benign=reason.benign) from None
        if len({(layer.dtype, _weight_device(layer)) for layer in children}) > 1:
            raise NotASite("its linear layers differ in dtype or device")
        kernel = dataclasses.replace(self.context, dtypes={site.module: children[0].dtype}).choose(
            site, "lora_mlp"
        )
        activation = site.facts["activation"]
        settings = self.context.settings
        planned = settings.memory_budget_bytes is not None or settings.checkpointing not in ("auto", "off")
        planned |= settings.checkpointing == "auto" and _weight_device(children[0]).type == "cuda"
        tiled = planned and "tile" in inspect.signature(kernel.function).parameters
        prove = partial(_prove_mlp, names=names, kernel=kernel, activation=activation, tiled=tiled)
        proven = self.proven(site.module, "lora_mlp", children, prove)
        otherwise = gated.forwards[site.module]
        forward = _mlp_forward(module, names, kernel, activation, otherwise, self.said, proven, tiled)
        return Patch(
            module=site.module,
            op="lora_mlp",
            kernel=kernel,
            forwards={site.module: forward},
            signature=(
                *("lora_mlp", kernel.name, type(module), names, activation, tiled),
                *(layer.signature for layer in children),
            ),
            verify=partial(_verify, site=site.module, names=[layer.name for layer in children], prove=prove),
            otherwise=(gated, *apart),
        )


def _weight_device(layer: _Layer) -> torch.device:
    weight: torch.Tensor = layer.base._parameters["weight"]  # type: ignore[assignment]
    return weight.device


# Reading a layer at each call


# What `read` gives: a Projection and its Linear4bit or None.
_Item = tuple[Any, Any]


def _reader(said: set[str]) -> Callable[..., _Item | None]:
    """read(layer, before) -> an _Item, or None where the layer must run its own code.

    before: what it gave last time; the same comes back where nothing has changed.
    """
    from sloth_kernels.lora import Adapter, Projection
    from sloth_kernels.nf4 import FourBit

    def say(reason: str) -> None:
        if reason not in said:
            said.add(reason)
            warnings.warn(f"sloth: {reason}: PEFT's own code runs for it", stacklevel=2)

    def adapter_of(layer: Any, modules: Any, before: Any) -> Any:
        """The active Adapter, None for none, False for what can't be served."""
        lora_a = modules["lora_A"]._modules
        active = layer._active_adapter
        if type(active) is not str:
            present = [name for name in active if name in lora_a]
            if len(present) > 1:
                say(f"several adapters are active at once ({', '.join(present)})")
                return False
            if not present:
                return None
            (active,) = present
        elif active not in lora_a:
            return None
        own = layer.__dict__
        variants, dora = own.get("lora_variant"), own.get("use_dora")
        special = (variants and active in variants) or (dora and dora.get(active))
        if special and (variant := _variant(layer, active)) is not None:
            say(f"adapter {active!r} is {variant}")
            return False
        a, b = lora_a[active], modules["lora_B"]._modules[active]
        dropout = modules["lora_dropout"]._modules[active]
        scaling = layer.scaling[active]
        if (
            type(a) is not nn.Linear
            or type(b) is not nn.Linear
            or _seen(a)
            or _seen(b)
            or _seen(dropout)
            or type(scaling) not in (float, int)
            or not own.get("cast_input_dtype_enabled", True)
        ):
            return False
        rate = 0.0
        if type(dropout) is nn.Dropout:
            rate = dropout.p if dropout.training else 0.0
        elif type(dropout) is not nn.Identity:
            return False
        weight_a: Any = a._parameters["weight"]
        weight_b: Any = b._parameters["weight"]
        if (
            rate >= 1
            or type(weight_a) not in _TENSORS
            or type(weight_b) not in _TENSORS
            or weight_a.dtype not in FLOATS
            or weight_b.dtype not in FLOATS
            or a._parameters["bias"] is not None
        ):
            return False
        bias = b._parameters["bias"]
        kind = weight_a.dtype, weight_b.dtype, weight_a.shape, weight_b.shape
        if (
            before is not None
            and before.a is weight_a
            and before.b is weight_b
            and before.bias is bias
            and before.scaling == scaling
            and before.dropout == rate
            and before.kind == kind
        ):
            return before
        return Adapter(a=weight_a, b=weight_b, scaling=scaling, dropout=rate, bias=bias)

    def read(layer: Any, before: _Item | None = None) -> _Item | None:
        kind = _KINDS.get(type(layer)) or _kind(type(layer))
        base, adapter = layer, None
        last = None if before is None else before[0]
        if kind == _LORA:
            modules = layer._modules
            base = modules["base_layer"]
            merged = layer.merged_adapters
            if layer._disable_adapters:
                if merged:
                    return None  # PEFT unmerges first
            elif not merged:
                adapter = adapter_of(layer, modules, None if last is None else last.adapter)
                if adapter is False:
                    return None
            if _seen(base):
                return None
            kind = _KINDS.get(type(base)) or _kind(type(base))
        parameters = base._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if kind == _PLAIN:
            if weight.requires_grad or type(weight) not in _TENSORS or weight.dtype not in FLOATS:
                return None
            if last is not None and (last.weight is weight and last.bias is bias and last.adapter is adapter):
                return before
            return Projection(weight=weight, bias=bias, adapter=adapter), None
        if kind != _FOUR_BIT:
            return None
        state = getattr(weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return None
        if (
            last is not None
            and before is not None
            and before[1] is base
            and last.weight.packed is weight
            and last.weight.state is state
            and last.bias is bias
            and last.adapter is adapter
        ):
            return before
        return Projection(weight=FourBit(packed=weight, state=state), bias=bias, adapter=adapter), base

    return read


def _seen(module: Any) -> bool:
    """Whether somebody wants to be called when this module is: hooks, or a forward of its own."""
    return _hooked(module) or "forward" in module.__dict__


def _served(x: Any, takes: Callable[[Any], bool]) -> bool:
    """A plain, non-empty tensor of rows that the kernel takes, outside of torch.compile and global hooks."""
    return (
        type(x) in _TENSORS
        and takes(x)
        and x.dtype in FLOATS
        and x.dim() > 1
        and x.numel() > 0
        and not (_module._global_forward_hooks or _module._global_forward_pre_hooks)
    )


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _compute_dtype(
    item: tuple[Any, Any], x: torch.Tensor, autocast: torch.dtype | None, grad: bool
) -> torch.dtype | None:
    """The dtype of the layer's matmul where it is one that the kernel can serve, else None."""
    projection, base = item
    dtype = x.dtype
    if base is None:
        weight = projection.weight
        if weight.device != x.device:
            return None
        return autocast or (dtype if weight.dtype == dtype else None)
    if not base.compute_type_is_set:  # as its own forward would
        base.set_compute_type(x)
        base.compute_type_is_set = True
    wanted = autocast or dtype
    if (
        (base.compute_dtype or dtype) != wanted
        or (autocast is not None and dtype not in (torch.float32, autocast))
        or (
            not grad
            and x.numel() <= FEW_ROWS * x.shape[-1]
            # Reentrant checkpointing runs without grad at first, and must drop what the recomputation drops.
            and (projection.adapter is None or not projection.adapter.dropout)
        )
    ):
        return None
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' Params4bit looks at each call otherwise
        return wanted if projection.weight.packed.device == x.device else None


class _Proven:
    """Whether an adapter may run fused; one that came after the patch's proof is proven when first met.

    A proof holds for the shapes and dtypes of a group's adapters, wherever they appear in the model. Where it
    fails, these adapters are left to PEFT, with a warning and a reason in the report.
    """

    def __init__(
        self,
        model: nn.Module,
        site: str,
        op: str,
        layers: Sequence[_Layer],
        prove: _Prove,
        verdicts: dict[tuple[Any, ...], str],
        said: set[str],
    ) -> None:
        self.model = weakref.ref(model)
        self.site, self.op, self.prove = site, op, prove
        self.verdicts, self.said = verdicts, said
        self.known: dict[tuple[Any, ...], bool] = {}
        for i, layer in enumerate(layers):
            if (name := layer.adapter) is not None:
                tuner: Any = layer.module
                a, b = tuner.lora_A[name], tuner.lora_B[name]
                self.known[self._key(i, a.weight, b.weight, b.bias)] = True

    @staticmethod
    def _key(i: int, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
        return i, a.shape[0], a.dtype, b.dtype, None if bias is None else bias.dtype

    def __call__(
        self, i: int, adapter: Any, modules: Callable[[], Sequence[nn.Module]], holder: nn.Module
    ) -> bool:
        """For the i-th layer and its active Adapter (or None); `modules` are the layers of the kernel's call,
        `holder` the MLP around them.
        """
        if adapter is None:
            return True
        key = self._key(i, adapter.a, adapter.b, adapter.bias)
        verdict = self.known.get(key)
        if verdict is None:
            # Not in a backward, whose thread the proof's own would wait for, nor into a CUDA graph.
            capturing = adapter.a.is_cuda and torch.cuda.is_current_stream_capturing()
            if capturing or torch._C._current_graph_task_id() != -1:
                return False
            verdict = self.known[key] = self._prove(modules(), holder)
        return verdict

    def _prove(self, modules: Sequence[nn.Module], holder: nn.Module) -> bool:
        try:
            layers = [_layer(self.site, module) for module in modules]
        except NotASite as reason:
            why = str(reason)
        else:
            signature = (self.op, *(layer.signature for layer in layers))
            if signature not in self.verdicts:
                # A thread of its own sees no autocast, checkpointing hooks or dispatch modes of the caller.
                with ThreadPoolExecutor(1) as thread:
                    self.verdicts[signature] = thread.submit(self._run, layers, holder).result()
            why = self.verdicts[signature]
        if why:
            self._say(f"an adapter that came after acceleration: {why}")
        return not why

    def _run(self, layers: Sequence[_Layer], holder: nn.Module) -> str:
        """Why the proof fails, or nothing."""
        device = _weight_device(layers[0])
        generator = torch.Generator(device=device).manual_seed(0x5107)
        try:
            with undisturbed(nn.ModuleList([layer.module for layer in layers])):
                trial = Trial(model=holder, device=device, generator=generator)
                comparisons = self.prove(trial, layers, holder)
        except Exception as error:  # nothing of this may take a training step down
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        failed = "; ".join(str(comparison) for comparison in comparisons if not comparison.passed)
        return failed and f"less accurate than the contract: {failed}"

    def _say(self, reason: str) -> None:
        from sloth_plugins.engine import _ACTIVE  # it imports this module

        model = self.model()
        acceleration = None if model is None else _ACTIVE.get(model)
        if acceleration is not None:
            acceleration.report.skipped.append(Skip(module=self.site, op=self.op, reason=reason))
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"sloth: {self.op} of {self.site} is left to PEFT: {reason}", stacklevel=2)


def _note_expansion(forward: Forward, kernel: KernelSpec, names: tuple[str, ...]) -> None:
    """Say which children's ("": its own) 4-bit weights a module's forward expands, for
    `checkpointing.weights`: our kernels read them where they are brought to (`sloth_kernels.nf4.SOURCES`),
    which others don't know."""
    if kernel.name.startswith("sloth."):
        vars(forward)["expands"] = names


# Groups of linear layers


class _Slot:
    """The group that waits for its siblings' calls, one a model: what a forward that raised left behind goes
    with the next group.
    """

    __slots__ = ("group",)

    def __init__(self) -> None:
        self.group: _Group | None = None


class _Group:
    """Layers called one after another on the same tensor, and what has been computed for those to come."""

    __slots__ = ("__weakref__", "left", "mode", "refs", "results", "version", "x")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.refs = tuple(weakref.ref(module) for module in modules)
        self.clear()

    def clear(self) -> None:
        """Forget what waits."""
        self.x: torch.Tensor | None = None
        self.version, self.left = 0, 0
        self.mode: tuple[Any, ...] = ()
        self.results: list[torch.Tensor | None] = []


def _linear_forwards(
    modules: Sequence[nn.Module], kernel: KernelSpec, said: set[str], slot: _Slot, proven: _Proven | None
) -> list[Forward]:
    """The forwards of a group. Another module that gets one of them (a deep copy) computes alone."""
    from sloth_kernels.lora import Expanded

    group = _Group(modules)
    read, takes, function = _reader(said), _takes(kernel), kernel.function
    keeps = "expanded" in inspect.signature(function).parameters
    before: list[_Item | None] = [None] * len(modules)

    def members() -> list[nn.Module]:
        return [module for ref in group.refs if (module := ref()) is not None]

    def fused(index: int, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        grad, autocast = torch.is_grad_enabled(), _autocast(x)
        kept = repeat.expanded(layer, grad, Expanded) if keeps and repeat.EXPANDED else {}
        mine = group.refs[index]() is layer
        waiting = False
        if mine and group.x is x and group.version == x._version and group.mode == (grad, autocast):
            waiting = True
            result = group.results[index]
            if result is not None:
                group.results[index] = None
                group.left -= 1
                if not group.left:
                    group.clear()
                    slot.group = None
                return result
        own = read(layer, before[index] if mine else None)
        if own is None or (dtype := _compute_dtype(own, x, autocast, grad)) is None:
            return None
        if proven is not None:
            together = members if mine else (lambda: [layer])
            if not proven(index, own[0].adapter, together, layer):
                return None
        if mine:
            before[index] = own
        items = [(index, own)]
        # Writes to an inference tensor are not counted, so nobody could tell whether it is still the same.
        if mine and not waiting and len(group.refs) > 1 and not x.is_inference():
            for other, ref in enumerate(group.refs):
                if other == index or (sibling := ref()) is None:
                    continue
                item = before[other] = read(sibling, before[other])
                if item is None or _compute_dtype(item, x, autocast, grad) != dtype:
                    continue
                if proven is None or proven(other, item[0].adapter, members, sibling):
                    items.append((other, item))
        given = repeat.narrowed(x, dtype)
        results = function(given, [item[0] for _, item in items], **kept)
        if x.dtype != dtype:
            results = [
                y if item[1] is None else y.to(x.dtype) for y, (_, item) in zip(results, items, strict=True)
            ]
        if mine and not waiting:
            if slot.group is not None:
                slot.group.clear()
                slot.group = None
            if len(items) > 1:
                group.results = [None] * len(group.refs)
                for (other, _), y in zip(items[1:], results[1:], strict=True):
                    group.results[other] = y
                group.x, group.version, group.mode = x, x._version, (grad, autocast)
                group.left = len(items) - 1
                slot.group = group
        first: torch.Tensor = results[0]
        return first

    def forward_of(index: int, module: nn.Module) -> Forward:
        original = type(module).forward

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or kwargs or len(args) != 1 or not _served(args[0], takes):
                return original(self, *args, **kwargs)
            result = fused(index, self, args[0])
            return original(self, args[0]) if result is None else result

        _note_expansion(forward, kernel, ("",))
        return named_like(forward, module)

    return [forward_of(index, module) for index, module in enumerate(modules)]


# MLPs


def _mlp_forward(
    module: nn.Module,
    names: tuple[str, str, str],
    kernel: KernelSpec,
    activation: str,
    otherwise: Forward,
    said: set[str],
    proven: _Proven | None,
    tiled: bool = False,
) -> Forward:
    """The forward of a gated MLP with LoRA; `otherwise` serves the calls that it can't.

    tiled: with an attribute `again(module, x, tile)`, which gives the same and keeps x alone (see
    `sloth_kernels.lora.lora_mlp`), or None where `otherwise` has to serve the call.
    """
    from sloth_kernels.lora import Expanded

    read, takes, function = _reader(said), _takes(kernel), kernel.function
    (argument,) = (p.name for p in positional_parameters(type(module).forward)[:1])
    before: dict[str, _Item | None] = {}
    parameters = set(inspect.signature(function).parameters)
    repeats, keeps = {"output", "repeated"} <= parameters, "expanded" in parameters

    def fused(mlp: nn.Module, x: torch.Tensor, **options: Any) -> Any:
        grad, autocast = torch.is_grad_enabled(), _autocast(x)
        if keeps and repeat.EXPANDED:
            options |= repeat.expanded(mlp, grad, Expanded)
        children = mlp._modules
        items, dtypes = [], set()
        for name in names:
            child = children[name]
            # That of a copy of the MLP comes by here too: it is the child that decides.
            if _seen(child) or (item := read(child, before.get(name))) is None:
                return None
            before[name] = item
            items.append(item)
            dtypes.add(_compute_dtype(item, x, autocast, grad))
        if len(dtypes) != 1 or (dtype := dtypes.pop()) is None:
            return None
        if proven is not None:
            for i, item in enumerate(items):
                if not proven(i, item[0].adapter, lambda: [mlp.get_submodule(n) for n in names], mlp):
                    return None
        gate, up, down = (item[0] for item in items)
        given = repeat.narrowed(x, dtype)
        y = function(given, gate, up, down, activation=activation, **options)
        # A Linear4bit gives its input's dtype back.
        kept = x.dtype != dtype and items[2][1] is not None and (items[0][1] or items[1][1]) is not None
        return y.to(x.dtype) if kept else y

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get(argument)
        if torch.compiler.is_compiling() or len(args) + len(kwargs) != 1 or not _served(x, takes):
            return otherwise(self, *args, **kwargs)
        result = fused(self, x, **(repeat.options(self) if repeats else {}))
        return otherwise(self, x) if result is None else result

    def again(self: nn.Module, x: Any, tile: int) -> Any:
        if torch.compiler.is_compiling() or not _served(x, takes):
            return None
        return fused(self, x, tile=tile, **(repeat.options(self) if repeats else {}))

    vars(forward)["again"] = again if tiled else None
    _note_expansion(forward, kernel, names)
    return named_like(forward, module)


# Verification: random adapters on stand-ins, the base's own weight or its first rows


@dataclass(kw_only=True)
class _Proof:
    """Stand-ins of some layers with small bases, and the float64 truth of the same."""

    layers: Sequence[_Layer]
    shapes: Sequence[tuple[int, int]]
    bases: list[nn.Module]
    doubles: list[torch.Tensor]
    tensors: dict[str, torch.Tensor]
    trainable: list[str]

    def stand_ins(self, leaves: Mapping[str, torch.Tensor]) -> list[nn.Module]:
        """The layers with `leaves` as their adapters."""
        clones = []
        for i, (layer, base) in enumerate(zip(self.layers, self.bases, strict=True)):
            name = layer.adapter
            base = stand_in(base, {})
            base.__dict__["_parameters"]["bias"] = leaves.get(f"base_bias{i}")
            if name is None:
                clones.append(base)
                continue
            a, b = (_linear_of(leaves[f"{key}{i}"]) for key in "ab")
            b.__dict__["_parameters"]["bias"] = leaves.get(f"bias{i}")
            children = {
                "base_layer": base,
                "lora_A": nn.ModuleDict({name: a}),
                "lora_B": nn.ModuleDict({name: b}),
                "lora_dropout": nn.ModuleDict({name: nn.Identity()}),
            }
            clone = stand_in(layer.module, {}, children)
            clone.__dict__.update(
                _disable_adapters=False,
                merged_adapters=[],
                _active_adapter=[name],
                scaling={name: self.scaling(i)},
            )
            clones.append(clone)
        return clones

    def scaling(self, i: int) -> float:
        """The layer's own scaling; with zero nothing would be proven."""
        module: Any = self.layers[i].module
        return module.scaling[self.layers[i].adapter] or 1.0

    def projections(self, leaves: Mapping[str, torch.Tensor]) -> list[Any]:
        """The truth's arguments."""
        from sloth_kernels.lora import Adapter, Projection

        result = []
        for i, weight in enumerate(self.doubles):
            adapter = None
            if self.layers[i].adapter is not None:
                a, b = leaves[f"a{i}"], leaves[f"b{i}"]
                adapter = Adapter(a=a, b=b, scaling=self.scaling(i), bias=leaves.get(f"bias{i}"))
            bias = leaves.get(f"base_bias{i}")
            result.append(Projection(weight=weight, bias=bias, adapter=adapter))
        return result

    def x(self, trial: Trial, dtype: torch.dtype) -> torch.Tensor:
        """A random input (TOKENS, K)."""
        return trial.randn(TOKENS, self.shapes[0][1], dtype=dtype)

    def cases(self, trial: Trial) -> list[tuple[torch.dtype, bool]]:
        """(dtype of the activations, under autocast to it) that training may use."""
        dtype = self.layers[0].dtype
        found = [(dtype, False)]
        if trial.device.type == "cuda":
            low = torch.bfloat16 if dtype == torch.float32 else dtype
            if low == dtype or not any(layer.four_bit for layer in self.layers):
                found.append((low, True))
        return found


def _linear_of(weight: torch.Tensor) -> nn.Module:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
    linear.__dict__["_parameters"] = {"weight": weight, "bias": None}
    return linear.eval()


def _proof(trial: Trial, layers: Sequence[_Layer], shapes: Sequence[tuple[int, int]]) -> _Proof:
    tensors: dict[str, torch.Tensor] = {}
    trainable: list[str] = []
    bases, doubles = [], []
    for i, (layer, (n, k)) in enumerate(zip(layers, shapes, strict=True)):
        base, double = _small_base(layer, n, k)
        bases.append(base)
        doubles.append(double)
        bias: Any = layer.base._parameters["bias"]
        if bias is not None:
            tensors[f"base_bias{i}"] = bias.detach()[:n].clone()
            trainable += [f"base_bias{i}"] if bias.requires_grad else []
        if layer.adapter is None:
            continue
        module: Any = layer.module
        a, b = module.lora_A[layer.adapter].weight, module.lora_B[layer.adapter]
        rank = a.shape[0]
        tensors[f"a{i}"] = trial.randn(rank, k, dtype=a.dtype) / k**0.5
        tensors[f"b{i}"] = trial.randn(n, rank, dtype=b.weight.dtype) / rank**0.5
        if b.bias is not None:
            tensors[f"bias{i}"] = trial.randn(n, dtype=b.bias.dtype)
        # Where nothing is trained yet, training is what will come.
        parameters = {f"a{i}": a, f"b{i}": b.weight, f"bias{i}": b.bias}
        trained = {key for key, p in parameters.items() if p is not None and p.requires_grad}
        trainable += [key for key in parameters if key in tensors and (key in trained or not trained)]
    return _Proof(
        layers=layers, shapes=shapes, bases=bases, doubles=doubles, tensors=tensors, trainable=trainable
    )


def _small_base(layer: _Layer, n: int, k: int) -> tuple[nn.Module, torch.Tensor]:
    """A stand-in of the base layer with the first n * k of its weights as (n, k); and these in float64."""
    base: Any = layer.base
    weight = base._parameters["weight"]
    clone = stand_in(base, {})
    if layer.four_bit:
        small, double = _first_rows_4bit(weight, n, k)
    else:
        small = weight.detach() if tuple(weight.shape) == (n, k) else weight.detach()[:n, :k].contiguous()
        double = small.double()
    clone.__dict__["_parameters"] = {"weight": small, "bias": None}
    clone.__dict__.update(in_features=k, out_features=n)
    return clone, double


def _first_rows_4bit(weight: Any, n: int, k: int) -> tuple[Any, torch.Tensor]:
    """The first n * k weights in 4-bit storage as (n, k), and their values in float64."""
    import bitsandbytes.functional as bnb

    state = weight.quant_state
    kind: Any = type(state)
    blocks = -(-n * k // state.blocksize)
    inner = state.state2
    if inner is not None:
        outer = -(-blocks // inner.blocksize)
        inner = kind(
            absmax=inner.absmax[:outer], code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype
        )
    small_state = kind(
        absmax=state.absmax.reshape(-1)[:blocks],
        shape=torch.Size((n, k)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=state.offset,
        state2=inner,
    )
    packed = weight.data.reshape(-1).view(torch.uint8)[: n * k // 2].view(weight.dtype).reshape(-1, 1)
    small = type(weight)(
        packed,
        requires_grad=False,
        quant_state=small_state,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        quant_storage=weight.dtype,
        bnb_quantized=True,
    )
    return small, bnb.dequantize_4bit(packed, small_state).double()


def _at_most(n: int, k: int, *layers: _Layer) -> int:
    """n, or the largest multiple of every block size at which n * k weights are few enough."""
    if n * k <= ELEMENTS:
        return n
    steps = [_blocksize(layer) for layer in layers]
    step = max(16, *steps)
    return max(step, ELEMENTS // k // step * step)


def _blocksize(layer: _Layer) -> int:
    weight: Any = layer.base._parameters["weight"]
    return weight.quant_state.blocksize if layer.four_bit else 1


def _counted(kernel: KernelSpec) -> tuple[KernelSpec, list[int]]:
    calls: list[int] = []

    @wraps(kernel.function)
    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel.function(*args, **kwargs)

    return dataclasses.replace(kernel, function=function), calls


def _prove(
    trial: Trial,
    proof: _Proof,
    original: Callable[..., Any],
    patched: Callable[..., Any],
    truth: Callable[..., Any],
    calls: list[int],
) -> list[Comparison]:
    comparisons = []
    for dtype, autocast in proof.cases(trial):
        tensors = {"x": proof.x(trial, dtype), **proof.tensors}
        context = torch.autocast(trial.device.type, dtype=dtype, enabled=autocast)
        before = len(calls)
        with context:
            comparisons += compare(patched, original, truth, tensors, ["x", *proof.trainable])
        if len(calls) != before + 1:
            raise VerificationError(
                f"one call was expected of the kernel and {len(calls) - before} were made "
                f"({str(dtype).removeprefix('torch.')}, autocast {'on' if autocast else 'off'})"
            )
    return comparisons


def _verify(trial: Trial, *, site: str, names: Sequence[str], prove: _Prove) -> list[Comparison]:
    return prove(trial, [_layer(name, trial.module(name)) for name in names], trial.module(site))


def _prove_linear(
    trial: Trial, layers: Sequence[_Layer], holder: nn.Module, *, kernel: KernelSpec
) -> list[Comparison]:
    shapes = [(_at_most(*layer.shape, layer), layer.shape[1]) for layer in layers]
    proof = _proof(trial, layers, shapes)
    counted, calls = _counted(kernel)

    def original(x: torch.Tensor, **leaves: torch.Tensor) -> Any:
        return tuple(type(clone).forward(clone, x) for clone in proof.stand_ins(leaves))

    def patched(x: torch.Tensor, **leaves: torch.Tensor) -> Any:
        clones = proof.stand_ins(leaves)
        forwards = _linear_forwards(clones, counted, set(), _Slot(), None)
        return tuple(forward(clone, x) for forward, clone in zip(forwards, clones, strict=True))

    def truth(x: torch.Tensor, **leaves: torch.Tensor) -> Any:
        return tuple(kernel.reference(x, proof.projections(leaves)))

    return _prove(trial, proof, original, patched, truth, calls)


def _prove_mlp(
    trial: Trial,
    layers: Sequence[_Layer],
    mlp: nn.Module,
    *,
    names: tuple[str, str, str],
    kernel: KernelSpec,
    activation: str,
    tiled: bool,
) -> list[Comparison]:
    wide, narrow = layers[0].shape
    wide = _at_most(wide, narrow, *layers)
    proof = _proof(trial, layers, [(wide, narrow), (wide, narrow), (narrow, wide)])
    counted, calls = _counted(kernel)

    def original(forward: Forward, x: torch.Tensor, **leaves: torch.Tensor) -> Any:
        children = dict(zip(names, proof.stand_ins(leaves), strict=True))
        return forward(stand_in(mlp, {}, children), x)

    def truth(x: torch.Tensor, **leaves: torch.Tensor) -> Any:
        return kernel.reference(x, *proof.projections(leaves), activation=activation)

    own = type(mlp).forward
    patched = _mlp_forward(mlp, names, counted, activation, own, set(), None, tiled)
    comparisons = _prove(trial, proof, partial(original, own), partial(original, patched), truth, calls)
    if tiled:

        def again(module: nn.Module, x: torch.Tensor) -> Any:
            return vars(patched)["again"](module, x, TOKENS // 2 + 1)

        comparisons += _prove(trial, proof, partial(original, own), partial(original, again), truth, calls)
    return comparisons


__all__ = ["with_lora"]
