"""Which module plays which role: found by structure, confirmed by behaviour, with no list of model names.

A candidate is probed through a *stand-in*: a shallow copy of the module whose parameters (or linear children)
are replaced by small random ones on the CPU. The class's own forward runs on it, and the result is compared
with the formula. So the probe is cheap for any size, it sees through PEFT wrappers and bitsandbytes layers
(they are children that get replaced), it runs for a model on the meta device, and it touches nothing of the
user's model.

    RMSNorm      x * rsqrt(mean(x^2) + eps) * (w + offset)      offset 0 or 1, two rounding orders, with or
    without w LayerNorm    (x - mean(x)) * rsqrt(var(x) + eps) * w + b    with or without w and b gated MLP
    down(act(gate(x)) * up(x))                     separate gate and up, or one fused projection rotary
    q*cos + rotate(q)*sin, same for k              a helper that the attention's forward calls by a global
    name
"""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sloth_plugins.hookspecs import hookimpl
from sloth_plugins.numerics import FORMULA_TOLERANCE, relative_error
from sloth_plugins.specs import KernelSpec, NotASite, Patch, Site, Skip, Survey

if TYPE_CHECKING:
    from sloth_plugins.manager import Manager
    from sloth_plugins.settings import Settings

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "silu": nn.functional.silu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "gelu": nn.functional.gelu,
    }
)
# A layer in the order of its steps: s = x + [after](attention(before(x)));  y = s + [last](mlp(middle(s)))
LAYER_STEPS = ("before", "attention", "after", "middle", "mlp", "last")
ROPE_LAYOUTS = ("half", "interleaved", "interleaved_repeat")
FOREIGN = {
    "liger_kernel": "Liger",
    "unsloth": "Unsloth",
    "unsloth_zoo": "Unsloth",
    "axolotl": "Axolotl",
    "kernels": "HF kernels",
}
# The functions that an engine has installed. By identity: a wrapper made with functools.wraps would carry an
# attribute over.
PATCHES: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
_TIGHT = 1e-9  # float64 stand-ins


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What a planning hook gets: the sites, and how to choose a kernel."""

    sites: tuple[Site, ...]
    settings: Settings
    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    kernels: tuple[KernelSpec, ...]
    manager: Manager = field(repr=False)

    def by_role(self, role: str) -> tuple[Site, ...]:
        """The sites of one role, in the model's order."""
        return tuple(site for site in self.sites if site.role == role)

    def choose(self, site: Site, op: str) -> KernelSpec:
        """The kernel for `op` at `site`; raises NotASite with the reason where there is none."""
        if op in self.settings.disable or (self.settings.kernels == "off"):
            where = "kernels='off'" if self.settings.kernels == "off" else f"disable={op!r}"
            raise NotASite(f"switched off by the setting {where}", benign=True)
        dtype = self.dtypes.get(site.module, torch.float32)
        of_op = [kernel for kernel in self.kernels if kernel.op == op]
        if not of_op:
            raise NotASite(f"no plugin offers a kernel for {op}")
        refusals = {kernel.name: kernel.why_not(self.device, dtype, site.facts) for kernel in of_op}
        able = [kernel for kernel in of_op if refusals[kernel.name] is None]
        chosen = self.manager.choose(site, op, able, self.device, dtype, self.settings) if able else None
        if chosen is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if reason)
            raise NotASite(
                f"no kernel for {op} under kernels={self.settings.kernels!r}" + (f" ({why})" if why else "")
            )
        return chosen


@hookimpl(trylast=True)
def sloth_survey_model(model: nn.Module, settings: Settings) -> Survey:
    """The built-in survey: norms, gated MLPs, attention with rotary embeddings, decoder layers, lm_head."""
    return _Surveyor(model).run()


@hookimpl(trylast=True)
def sloth_choose_kernel(
    kernels: Sequence[KernelSpec], settings: Settings, device: torch.device
) -> KernelSpec | None:
    """The first kernel of the backend asked for; "auto" takes the references only where nothing else serves
    the site.
    """
    if settings.kernels != "auto":
        return next((kernel for kernel in kernels if kernel.backend == settings.kernels), None)
    interpreted = device.type == "cpu"  # Triton's interpreter is for tests: only on demand
    fast = [
        kernel
        for kernel in kernels
        if kernel.backend != "torch" and not (interpreted and kernel.backend == "triton")
    ]
    return next(iter(fast), next((kernel for kernel in kernels if kernel.backend == "torch"), None))


def foreign_owner(module: nn.Module) -> str | None:
    """The accelerator that already owns this module's forward (Liger, Unsloth, Axolotl ...), or None."""
    items = (type(module), type(module).forward, module.__dict__.get("forward"))
    return next((owner for item in items if (owner := _foreign(item)) is not None), None)


def _foreign(item: Any) -> str | None:
    function = getattr(item, "__func__", item)
    return FOREIGN.get((getattr(function, "__module__", None) or "").split(".")[0])


def is_ours(forward: Any) -> bool:
    """Whether an instance's forward is a patch, any plugin's, and not somebody's wrapper around one."""
    return isinstance(forward, MethodType) and forward.__func__ in PATCHES


def forward_obstacle(module: nn.Module) -> str | None:
    """Why this instance's forward must not be replaced, or None."""
    if (owner := foreign_owner(module)) is not None:
        return f"already patched by {owner}"
    if any(type(p).__name__ == "DTensor" for p in module._parameters.values()):
        return "its parameters are sharded (DTensor): accelerate the model before it is sharded"
    if any(hasattr(p, "ds_id") and p.numel() == 0 for p in module._parameters.values() if p is not None):
        return "its parameters are partitioned by DeepSpeed ZeRO-3, so they can't be read"
    own = module.__dict__.get("forward")
    function = getattr(own, "__func__", own)
    if own is None or function is type(module).forward or is_ours(own):
        return None
    if hasattr(module, "_hf_hook"):
        return "its forward is wrapped by accelerate's device-map hook"
    return f"its forward is already replaced on the instance by {getattr(own, '__qualname__', repr(own))}"


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer of any make (PEFT, bitsandbytes, plain), or None."""
    base = getattr(module, "base_layer", module)
    widths = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if all(isinstance(width, int) for width in widths):
        return widths  # type: ignore[return-value]
    return None


def scalars(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The plain attributes that can steer a forward: what makes two instances of one class behave alike."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        sorted(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, plain)
            and not name.startswith("_")
            and name not in ("layer_idx", "training", "layer_id")
        )
    )


def stand_in(
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor | None],
    children: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A shallow copy with other parameters and children, in eval mode; the original stays as it is."""
    clone = copy.copy(module)
    clone.__dict__.pop("forward", None)
    replaced = {
        name: None if value is None else nn.Parameter(value, requires_grad=False)
        for name, value in parameters.items()
    }
    clone.__dict__["_parameters"] = {**module._parameters, **replaced}
    clone.__dict__["_buffers"] = dict(module._buffers)
    clone.__dict__["_modules"] = {**module._modules, **(children or {})}
    clone.__dict__["training"] = False
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        clone.__dict__[hooks] = OrderedDict()
    return clone


def positional_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters of a forward without `self`, in order, without *args and **kwargs."""
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return named[1:] if named and named[0].name == "self" else named


class _Recorder(nn.Module):
    """Stands in for a child of a layer: scales its input by a known factor and notes how it was called."""

    def __init__(
        self, name: str, factor: float, log: list[tuple[str, float, dict[str, Any]]], attends: bool
    ) -> None:
        super().__init__()
        self.name, self.factor, self.log, self.attends = name, factor, log, attends

    def forward(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.pop("hidden_states")
        self.log.append((self.name, self.factor, kwargs))
        return (x * self.factor, None) if self.attends else x * self.factor


class _Surveyor:
    """One walk over one model; probes each class and configuration once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(0x5107)
        self.sites: dict[str, Site] = {}
        self.skips: list[Skip] = []
        self.cache: dict[tuple[Any, ...], Mapping[str, Any] | NotASite] = {}
        self.helpers: dict[int, Mapping[str, Any] | None] = {}

    def run(self) -> Survey:
        with torch.no_grad(), _undisturbing():
            for name, module in self.model.named_modules():
                self.look_at(name, module)
            self.find_decoder_layers()
            self.find_head()
        return Survey(sites=tuple(self.sites.values()), skips=tuple(self.skips))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def look_at(self, name: str, module: nn.Module) -> None:
        for role, op, candidate, probe in (
            ("norm", "norm", _norm_candidate, self.probe_norm),
            ("gated_mlp", "gated_mlp", _mlp_candidate, self.probe_mlp),
            ("attention", "rope", self.attention_candidate, self.probe_attention),
        ):
            try:
                structure = candidate(module)
                if structure is None:
                    continue
                if (obstacle := forward_obstacle(module)) is not None:
                    self.skips.append(Skip(module=name, op=op, reason=obstacle))
                    return
                key: tuple[Any, ...] = (role, type(module), type(module).forward, structure, scalars(module))
                if (
                    role != "attention"
                ):  # an attention's other attributes don't change what its rotary helper computes
                    key = (*key, _steering(module))
                if key not in self.cache:
                    self.cache[key] = _probed(probe, module, structure)
                facts = self.cache[key]
                if isinstance(facts, NotASite):
                    raise facts
            except NotASite as reason:
                self.skips.append(Skip(module=name, op=op, reason=str(reason), benign=reason.benign))
                continue
            site_role = facts.get("role", role)
            self.sites[name] = Site(
                module=name, role=site_role, facts=facts, signature=(*key, _dtypes(module))
            )
            return

    # Norms

    def probe_norm(self, module: nn.Module, structure: tuple[Any, ...]) -> Mapping[str, Any]:
        weight_name, bias_name, width = structure
        w, b = self.randn(width) + 2.0, self.randn(width)
        clone = stand_in(module, {n: v for n, v in ((weight_name, w), (bias_name, b)) if n})
        x = self.randn(5, width)
        scaled = [x * scale for scale in (1.0, 1e-3, 1e3)]  # quiet: the eps must show; loud: a clamp
        got = [type(module).forward(clone, v) for v in scaled]
        if any(not isinstance(y, torch.Tensor) or y.shape != x.shape for y in got):
            raise NotASite("its output has not the shape of its input, so it is no norm")
        epsilons = [float(v) for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, float)]
        if not epsilons:
            raise NotASite("a norm without an eps attribute")
        weight, bias = (w if weight_name else None), (b if bias_name else None)
        for eps, centred, offset in itertools.product(dict.fromkeys(epsilons), (False, True), (0.0, 1.0)):
            if (offset and (centred or weight is None)) or (bias is not None and not centred):
                continue
            wanted = [_norm(v.double(), weight, bias, eps, offset, centred) for v in scaled]
            errors = [relative_error(y, want) for y, want in zip(got, wanted, strict=True)]
            if max(errors) <= FORMULA_TOLERANCE[torch.float32]:
                facts = dict(width=width, eps=eps, weight=weight_name, bias=bias_name)
                if centred:
                    return MappingProxyType({"role": "layer_norm", **facts})
                order = self._rounds_before_weight(module, facts, offset)
                return MappingProxyType(
                    {"role": "rms_norm", **facts, "offset": offset, "cast_before_weight": order}
                )
        raise NotASite("it computes neither RMSNorm (offset 0 or 1) nor LayerNorm")

    def _rounds_before_weight(self, module: nn.Module, facts: Mapping[str, Any], offset: float) -> bool:
        """Llama rounds the normalised row and then multiplies; Gemma and OLMo 2 multiply and then round."""
        if facts["weight"] is None:
            return False
        x = self.randn(64, facts["width"], dtype=torch.bfloat16)
        weight = (self.randn(facts["width"]) + 2.0).to(torch.bfloat16)
        try:
            got = type(module).forward(stand_in(module, {facts["weight"]: weight}), x)
        except (RuntimeError, TypeError, ValueError):
            return False  # a norm that doesn't take bf16 has no order to reproduce
        xhat = _norm(x.float(), None, None, facts["eps"], 0.0, False)
        late = ((weight.float() + offset) * xhat).to(torch.bfloat16)
        early = (weight + offset) * xhat.to(torch.bfloat16)
        return bool((got != early).sum() < (got != late).sum())

    # Gated MLPs

    def probe_mlp(self, module: nn.Module, structure: tuple[Any, ...]) -> Mapping[str, Any]:
        for children in structure[:-1]:  # more than one assignment only where the widths are all equal
            try:
                return self._probe_mlp(module, children)
            except Exception:  # foreign code on our probe's input
                continue
        try:
            return self._probe_mlp(module, structure[-1])
        except Exception as error:
            if len(structure) == 1:
                raise
            # Three linear layers of one width are an attention as often as an MLP.
            raise NotASite(
                "its three linear layers have one width, but it is no gated MLP", benign=True
            ) from error

    def _probe_mlp(self, module: nn.Module, structure: tuple[str, ...]) -> Mapping[str, Any]:
        narrow, wide = 6, 10
        fused = len(structure) == 2
        tiny = {
            name: nn.Linear(narrow if i < len(structure) - 1 else wide, out, bias=False, dtype=torch.float64)
            for i, (name, out) in enumerate(
                zip(structure, ((2 * wide, narrow) if fused else (wide, wide, narrow)), strict=True)
            )
        }
        for linear in tiny.values():
            linear.weight.copy_(self.randn(*linear.weight.shape, dtype=torch.float64))
        # Large rows as well: a clamp inside must show.
        x = (
            self.randn(4, 3, narrow, dtype=torch.float64)
            * torch.tensor([1.0, 0.1, 30.0, 1e3], dtype=torch.float64)[:, None, None]
        )
        others = {name: copy.deepcopy(child) for name, child in module.named_children() if name not in tiny}
        clone = stand_in(module, {}, {**others, **tiny})
        clone.eval()
        got = type(module).forward(clone, x)
        if not isinstance(got, torch.Tensor):
            raise NotASite("its output is no tensor, so it is no plain gated MLP")
        clone.train()
        trained = type(module).forward(clone, x)
        down = tiny[structure[-1]]
        if fused:
            first, second = tiny[structure[0]](x).chunk(2, dim=-1)
            halves = {"gate_first": (first, second), "up_first": (second, first)}
        else:
            a, b = structure[0], structure[1]
            halves = {a: (tiny[a](x), tiny[b](x)), b: (tiny[b](x), tiny[a](x))}
        for (gate, (g, u)), (activation, act) in itertools.product(halves.items(), ACTIVATIONS.items()):
            want = down(act(g) * u)
            if max(relative_error(*rows) for rows in zip(got, want, strict=True)) > _TIGHT:
                continue
            if not torch.equal(trained, got):
                raise NotASite("it computes something else in training mode: dropout?")
            if gate == "up_first":
                raise NotASite("its fused projection holds up before gate, for which there is no kernel")
            if fused:
                return MappingProxyType(
                    {"gate_up": structure[0], "down": structure[1], "activation": activation}
                )
            up = structure[1] if gate == structure[0] else structure[0]
            return MappingProxyType({"gate": gate, "up": up, "down": structure[2], "activation": activation})
        raise NotASite(f"it does not compute down(act(gate(x)) * up(x)) for act in {', '.join(ACTIVATIONS)}")

    # Attention: rotary helpers that its forward calls by a global name

    def attention_candidate(self, module: nn.Module) -> tuple[Any, ...] | None:
        forward = type(module).forward
        inner = inspect.unwrap(forward)
        if (
            not isinstance(inner, FunctionType)
            or sum(linear_widths(c) is not None for c in module.children()) < 2
        ):
            return None
        if (owner := foreign_owner(module)) is not None:
            raise NotASite(f"already patched by {owner}")
        names = [name for name in inner.__code__.co_names if callable(inner.__globals__.get(name))]
        for name in (
            names
        ):  # a rotary helper that was replaced for the whole process; theirs may not run in our probe
            if "rotary" in name.lower() and (owner := _foreign(inner.__globals__[name])) is not None:
                raise NotASite(f"its helper {name} is already patched by {owner}")
        helpers = [name for name in names if self._rotary_facts(inner.__globals__[name]) is not None]
        if not helpers:
            return None
        if inner is not forward:
            raise NotASite(
                "its forward is wrapped by a decorator, so its rotary helper can't be replaced for it alone"
            )
        return tuple(helpers)

    def probe_attention(self, module: nn.Module, structure: tuple[Any, ...]) -> Mapping[str, Any]:
        if len(structure) > 1:
            raise NotASite(f"its forward calls several rotary helpers: {', '.join(structure)}")
        facts = self._rotary_facts(type(module).forward.__globals__[structure[0]])
        assert facts is not None
        return MappingProxyType({"helper": structure[0], **facts})

    def _rotary_facts(self, helper: Any) -> Mapping[str, Any] | None:
        """Layout, default unsqueeze_dim, result dtype of a rotary helper f(q, k, cos, sin, ...), or None."""
        if not isinstance(helper, FunctionType):
            return None
        if id(helper) not in self.helpers:
            try:
                self.helpers[id(helper)] = self._probe_rotary(helper)
            except Exception:  # any error of foreign code on our input only means "no rotary helper"
                self.helpers[id(helper)] = None
        return self.helpers[id(helper)]

    def _probe_rotary(self, helper: FunctionType) -> Mapping[str, Any] | None:
        from sloth_kernels.rope import rope_reference

        parameters = positional_parameters(helper)
        if len(parameters) < 4 or any(p.default is p.empty for p in parameters[4:]):
            return None
        unsqueeze_dim = next((p.default for p in parameters if p.name == "unsqueeze_dim"), None)
        if unsqueeze_dim not in (1, 2):
            return None
        heads, steps, width = 3, 4, 8
        q = self.randn(2, heads, steps, width)
        k = self.randn(2, 1, steps, width)
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = self.randn(2, steps, width), self.randn(2, steps, width)
        got = helper(q, k, cos, sin)
        for layout in ROPE_LAYOUTS:
            want = rope_reference(q, k, cos, sin, layout=layout, unsqueeze_dim=unsqueeze_dim)
            errors = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
            if max(errors) <= FORMULA_TOLERANCE[torch.float32]:
                half = helper(q.bfloat16(), k.bfloat16(), cos, sin)
                result = {torch.bfloat16: "input", torch.float32: "promoted"}.get(half[0].dtype)
                if result is None:
                    return None
                return MappingProxyType({"layout": layout, "unsqueeze_dim": unsqueeze_dim, "result": result})
        return None

    # Layers and head: roles that the planners of checkpointing and of the loss use

    def find_decoder_layers(self) -> None:
        for list_name, modules in self.model.named_modules():
            if not isinstance(modules, nn.ModuleList):
                continue
            for index, layer in enumerate(modules):
                name = f"{list_name}.{index}" if list_name else str(index)
                roles = {site.role for module, site in self.sites.items() if module.startswith(name + ".")}
                if "attention" in roles and roles & {"rms_norm", "layer_norm"}:
                    inside = {
                        m.removeprefix(f"{name}."): s
                        for m, s in self.sites.items()
                        if m.startswith(f"{name}.")
                    }
                    key = (
                        "decoder_layer",
                        type(layer),
                        type(layer).forward,
                        scalars(layer),
                        *(s.signature for s in inside.values()),
                    )
                    key += (_dtypes(layer),)
                    if key not in self.cache:
                        roles_of = {
                            child: inside[child].role
                            for child, _ in layer.named_children()
                            if child in inside
                        }
                        self.cache[key] = _probed(self.probe_layer, layer, tuple(roles_of.items()))
                    facts = self.cache[key]  # a layer of another kind is a site all the same, without steps
                    known = MappingProxyType({}) if isinstance(facts, NotASite) else facts
                    self.sites[name] = Site(module=name, role="decoder_layer", facts=known, signature=key)

    def probe_layer(self, layer: nn.Module, roles: tuple[Any, ...]) -> Mapping[str, Any]:
        """The steps of a residual layer: its own forward, with recorders that scale for its children."""
        role = dict(roles)
        if forward_obstacle(layer) is not None:
            raise NotASite("its forward must stay", benign=True)
        children = dict(layer.named_children())
        if any(isinstance(child, nn.Dropout) and child.p > 0 for child in children.values()):
            raise NotASite("dropout on the residual", benign=True)
        steps = [
            n for n, child in children.items() if n in role or next(child.parameters(), None) is not None
        ]
        log: list[tuple[str, float, dict[str, Any]]] = []
        attention = [name for name in steps if role.get(name) == "attention"]
        recorders = {
            name: _Recorder(name, 1.0 + 0.37 * (i + 1), log, name in attention)
            for i, name in enumerate(steps)
        }
        parameters = positional_parameters(type(layer).forward)
        sent = {
            p.name: object() if p.default is None or p.default is p.empty else p.default
            for p in parameters[1:]
        }
        extra = object()
        x = self.randn(1, 3, 4, dtype=torch.float64)
        got = type(layer).forward(stand_in(layer, {}, recorders), x, **sent, sloth_probe=extra)
        order = [name for name, _, _ in log]
        sandwich = len(order) == 6
        named = dict(
            zip(LAYER_STEPS if sandwich else ("before", "attention", "middle", "mlp"), order, strict=True)
        )
        named = {step: named.get(step, "") for step in LAYER_STEPS}
        (kwargs,) = [kwargs for name, _, kwargs in log if name in attention]
        norms = [named[step] for step in ("before", "after", "middle", "last") if named[step]]
        scale = {name: factor for name, factor, _ in log}
        inner = x * scale[named["before"]] * scale[named["attention"]] * scale.get(named["after"], 1.0)
        summed = x + inner
        wanted = summed + summed * scale[named["middle"]] * scale[named["mlp"]] * scale.get(
            named["last"], 1.0
        )
        passes = {name: p.default for p in parameters[1:] for name in [p.name] if name in kwargs}
        if (
            [named["attention"]] != attention
            or role.get(named["mlp"]) in ("rms_norm", "layer_norm")
            or any(role.get(name) != "rms_norm" for name in norms)
            or not isinstance(got, torch.Tensor)
            or relative_error(got, wanted) > _TIGHT
            or kwargs.pop("sloth_probe", None) is not extra
            or any(kwargs[name] is not sent[name] for name in passes)
            or set(kwargs) != set(passes)
            or any(default is inspect.Parameter.empty for default in passes.values())
        ):
            raise NotASite(
                "its steps are others than s = x + attention(norm(x)); s + mlp(norm(s))", benign=True
            )
        names = tuple(p.name for p in parameters)
        return MappingProxyType(
            {"steps": MappingProxyType(named), "parameters": names, "passes": MappingProxyType(passes)}
        )

    def find_head(self) -> None:
        get = getattr(self.model, "get_output_embeddings", None)
        try:
            head = get() if callable(get) else None
        except (AttributeError, NotImplementedError):
            head = None
        if head is None or linear_widths(head) is None:
            return
        for name, module in self.model.named_modules():
            if module is head:
                facts = MappingProxyType({"widths": linear_widths(head)})
                self.sites[name] = Site(
                    module=name, role="lm_head", facts=facts, signature=("lm_head", type(head))
                )


def _probed(
    probe: Callable[[nn.Module, tuple[Any, ...]], Mapping[str, Any]],
    module: nn.Module,
    structure: tuple[Any, ...],
) -> Mapping[str, Any] | NotASite:
    try:
        return probe(module, structure)
    except NotASite as reason:
        return reason
    except (
        Exception
    ) as error:  # foreign code on our probe's input: whatever it raises, the module is left alone
        return NotASite(f"the probe could not run it: {type(error).__name__}: {str(error)[:120]}")


def _norm_candidate(module: nn.Module) -> tuple[Any, ...] | None:
    """(weight name, bias name, width) of a module that looks like a norm over the last dim."""
    if next(module.children(), None) is not None or not any("eps" in name.lower() for name in vars(module)):
        return None
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if any(p.dim() != 1 for p in own.values()) or set(own) - {"weight", "bias", "gamma", "beta", "scale"}:
        return None
    if module._buffers:  # BatchNorm keeps running statistics
        return None
    weight = next((name for name in ("weight", "gamma", "scale") if name in own), None)
    bias = next((name for name in ("bias", "beta") if name in own), None)
    if isinstance(
        module,
        nn.GroupNorm
        | nn.modules.batchnorm._NormBase
        | nn.LocalResponseNorm
        | nn.CosineSimilarity
        | nn.PairwiseDistance,
    ):
        return None
    required = [p for p in positional_parameters(type(module).forward) if p.default is p.empty]
    if len(required) != 1:
        raise NotASite("a norm whose forward takes more than one tensor")
    shape = getattr(module, "normalized_shape", (32,))
    width = next(iter(own.values())).shape[0] if own else tuple(shape)[-1]
    return weight, bias, width


def _mlp_candidate(module: nn.Module) -> tuple[tuple[str, ...], ...] | None:
    """Names of what may be (a, b, down) or (gate_up, down) of a gated MLP, in every order that fits."""
    children = dict(module.named_children())
    own = [p for p in module._parameters.values() if p is not None]
    if sum(p.dim() == 3 for p in own) >= 2:  # one alone is a convolution
        raise NotASite(
            "experts stored as stacked 3-D weights: left to the model's own mixture-of-experts code",
            benign=True,
        )
    widths = {name: width for name, child in children.items() if (width := linear_widths(child)) is not None}
    others = [child for name, child in children.items() if name not in widths]
    if any(next(child.parameters(), None) is not None for child in others):
        return None
    fitting: list[tuple[str, ...]] = []
    for names in itertools.permutations(widths) if len(widths) in (2, 3) else ():
        *first, down = names
        narrow, wide = widths[first[0]] if first else (0, 0)
        if (
            len(names) == 3
            and names[0] < names[1]
            and widths[names[1]] == (narrow, wide)
            and widths[down] == (wide, narrow)
        ):
            fitting.append(names)
        if len(names) == 2 and (narrow, wide) == (widths[down][1], 2 * widths[down][0]):
            fitting.append(names)
    if not fitting:
        return None
    if own or any(b is not None for b in module._buffers.values()):
        raise NotASite("it looks like a gated MLP, but has parameters or buffers of its own")
    return tuple(fitting)


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> torch.Tensor:
    """The probe's own formula, in x's dtype."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y if bias is None else y + bias.to(y.dtype)


def _steering(module: nn.Module) -> tuple[Any, ...]:
    """What else can steer a forward: activations, configs, lists; by identity where not by value."""
    public = sorted(
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "forward"
    )
    plain = (bool, int, float, str, type(None))
    values = tuple(
        (name, repr(value) if isinstance(value, tuple | list) else id(value))
        for name, value in public
        if not isinstance(value, plain)
    )
    children = tuple(
        (name, type(child), scalars(child), _steering(child))
        for name, child in module.named_children()
        if linear_widths(child) is None
    )
    return values + children


def _dtypes(module: nn.Module) -> tuple[Any, ...]:
    """Dtypes, shapes and trainability of the parameters at or below `module`."""
    return tuple((name, p.dtype, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())


@contextmanager
def _undisturbing() -> Iterator[None]:
    """Probes on the CPU in their own dtypes, whatever the caller's context; the random state is kept."""
    with torch.autocast("cpu", enabled=False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        yield


__all__ = [
    "ACTIVATIONS",
    "Patch",
    "PlanContext",
    "forward_obstacle",
    "linear_widths",
    "sloth_choose_kernel",
    "sloth_survey_model",
]
