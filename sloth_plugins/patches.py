"""The built-in patches: how a kernel takes the place of a norm, a gated MLP's activation, a rotary helper.

Every patch is an instance forward. The replaced module keeps its parameters, children and hooks, so
state-dict keys, PEFT, quantized linears and checkpoints are as before. A call that the kernel can't serve
(another device, float64) goes to the class's own forward.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from sloth_plugins.checkpointing.repeat import NOW, call_unread, note
from sloth_plugins.hookspecs import hookimpl
from sloth_plugins.numerics import Comparison
from sloth_plugins.specs import KernelSpec, NotASite, Patch, Site, Skip
from sloth_plugins.survey import LAYER_STEPS, PlanContext, positional_parameters, stand_in
from sloth_plugins.verify import TOKENS, Trial, VerificationError, compare, compare_calls

Forward = Callable[..., Any]


@hookimpl(trylast=True)
def sloth_plan_patches(model: nn.Module, context: PlanContext) -> Sequence[Patch | Skip]:
    """The built-in plan: one patch a norm, MLP, attention and residual; q/k norms join the rotary one.

    PEFT's LoRA layers join their MLP's patch, or get their own; the output embedding gets the head's.
    """
    plans: list[Patch | Skip] = []
    norms = {site.module: site for role in ("rms_norm", "layer_norm") for site in context.by_role(role)}
    taken: set[str] = set()

    def add(module: str, op: str, make: Callable[[], Patch]) -> None:
        try:
            plans.append(make())
        except NotASite as reason:
            plans.append(Skip(module=module, op=op, reason=str(reason), benign=reason.benign))

    for site in context.by_role("attention"):
        pair = _qk_norms(model.get_submodule(site.module), site, norms)
        if pair is not None and "qk_norm_rope" not in context.settings.disable:
            try:
                plans.append(_qk_norm_rope_patch(model, site, pair, context))
                taken.update(norm.module for norm in pair)
                continue
            except NotASite:
                pass  # then norms and rotary embedding are patched apart, each with its own reasons
        add(site.module, "rope", partial(_rope_patch, model, site, context))
    for site in norms.values():
        if site.module not in taken:
            add(site.module, site.role, partial(_norm_patch, model, site, context))
    for site in context.by_role("gated_mlp"):
        add(site.module, "gated_mlp", partial(_mlp_patch, model, site, context))
    for site in context.by_role("decoder_layer"):
        if "steps" in site.facts:
            add(site.module, "add_rms_norm", partial(_add_rms_norm_patch, model, site, context))
    from sloth_plugins.head import with_head  # they import this module
    from sloth_plugins.lora import with_lora

    return with_head(model, context, with_lora(model, context, plans))


def named_like(function: Forward, like: nn.Module) -> Forward:
    """Give `function` the name of the forward that it replaces, for tracebacks and profilers."""
    function.__name__ = "forward"
    function.__qualname__ = f"sloth:{type(like).__qualname__}.forward"
    return function


# Norms


def _norm_patch(model: nn.Module, site: Site, context: PlanContext) -> Patch:
    module = model.get_submodule(site.module)
    kernel = context.choose(site, site.role)
    call = _norm_call(kernel, site)
    original = type(module).forward
    (name,) = (p.name for p in positional_parameters(original)[:1])
    takes = _takes(kernel)
    under_autocast = _float32_under_autocast(module, site, context)

    function = getattr(kernel.function, "beside", None)
    both = None if function is None else _norm_call(dataclasses.replace(kernel, function=function), site)

    def dtype_of(x: torch.Tensor) -> torch.dtype | None:
        wide = under_autocast and torch.is_autocast_enabled(x.device.type)
        return torch.float32 if wide else None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get(name)
        if len(args) + len(kwargs) != 1 or not takes(x):
            return original(self, *args, **kwargs)
        out_dtype = dtype_of(x)
        y = call(self, x, out_dtype)
        if NOW.norms:
            note(self, y, x, lambda x: call(self, x, out_dtype))
        return y

    def beside(self: nn.Module, x: torch.Tensor) -> Any:
        if not takes(x):
            return original(self, x), x
        out_dtype = dtype_of(x)
        y, same = both(self, x, out_dtype)  # type: ignore[misc]
        if NOW.norms:
            note(self, y, x, lambda x: call(self, x, out_dtype))
        return y, same

    named_like(forward, module)
    vars(forward)["beside"] = None if both is None else beside
    return Patch(
        module=site.module,
        op=site.role,
        kernel=kernel,
        forwards={site.module: forward},
        signature=(*site.signature, kernel.name),
        verify=partial(
            _verify_norm, site=site, kernel=kernel, forward=forward, dtype=context.dtypes[site.module]
        ),
    )


def _norm_call(kernel: KernelSpec, site: Site) -> Callable[..., torch.Tensor]:
    """f(module, x, out_dtype) that runs `kernel` with the site's facts and the module's own parameters."""
    facts, function = site.facts, kernel.function
    weight, bias, eps = facts["weight"], facts["bias"], facts["eps"]
    if site.role == "layer_norm":
        return lambda self, x, out_dtype: function(
            x,
            getattr(self, weight) if weight else None,
            getattr(self, bias) if bias else None,
            eps=eps,
            out_dtype=out_dtype,
        )
    offset, early = facts["offset"], facts["cast_before_weight"]
    return lambda self, x, out_dtype: function(
        x,
        getattr(self, weight) if weight else None,
        eps=eps,
        offset=offset,
        cast_before_weight=early,
        out_dtype=out_dtype,
    )


def _float32_under_autocast(module: nn.Module, site: Site, context: PlanContext) -> bool:
    """Whether autocast turns this norm's result to float32, as it does for torch's own norms."""
    device = context.device
    low = torch.bfloat16
    weights = {n: torch.ones(site.facts["width"], device=device, dtype=low) for n in _norm_parameters(site)}
    clone = stand_in(module, weights)
    x = torch.ones(1, site.facts["width"], device=device, dtype=low)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=low):
            return bool(type(module).forward(clone, x).dtype == torch.float32)
    except (RuntimeError, TypeError):
        return False


def _norm_parameters(site: Site) -> list[str]:
    return [site.facts[kind] for kind in ("weight", "bias") if site.facts[kind]]


def _verify_norm(
    trial: Trial, *, site: Site, kernel: KernelSpec, forward: Forward, dtype: torch.dtype
) -> list[Comparison]:
    module = trial.module(site.module)
    names = _norm_parameters(site)
    comparisons = []
    for activation in trial.dtypes(dtype):
        x = trial.randn(TOKENS, site.facts["width"], dtype=activation)
        parameters = {name: module._parameters[name] for name in names}
        trainable = [name for name in names if module._parameters[name].requires_grad]  # type: ignore[union-attr]

        def run(f: Forward, x: torch.Tensor, **leaves: torch.Tensor) -> Any:
            clone = stand_in(module, {})
            clone.__dict__["_parameters"].update(leaves)
            return f(clone, x)

        reference = partial(_norm_call(_reference(kernel), site), out_dtype=None)
        truth = partial(run, reference)
        tensors = {"x": x, **{name: p.detach() for name, p in parameters.items() if p is not None}}
        with trial.context(activation, dtype):
            comparisons += compare(
                partial(run, forward), partial(run, type(module).forward), truth, tensors, ["x", *trainable]
            )
            beside = vars(forward)["beside"]
            if beside is not None:
                comparisons += compare(
                    partial(run, beside),
                    lambda x, run=run, **leaves: (run(type(module).forward, x, **leaves), x.view_as(x)),
                    lambda x, truth=truth, **leaves: (truth(x, **leaves), x.view_as(x)),
                    tensors,
                    ["x", *trainable],
                )
    return comparisons


# Gated MLPs


def _mlp_patch(model: nn.Module, site: Site, context: PlanContext) -> Patch:
    module = model.get_submodule(site.module)
    kernel = context.choose(site, "gated_mlp")
    function, activation = kernel.function, site.facts["activation"]
    original, takes, down = type(module).forward, _takes(kernel), site.facts["down"]
    (name,) = (p.name for p in positional_parameters(original)[:1])
    packed, gate, up = (site.facts.get(key) for key in ("gate_up", "gate", "up"))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(name)
        if len(args) + len(kwargs) != 1 or not takes(x):
            return original(self, *args, **kwargs)
        children = self._modules
        if packed:
            return children[down](function(children[packed](x), None, activation=activation))  # type: ignore[misc]
        return children[down](function(children[gate](x), children[up](x), activation=activation))  # type: ignore[misc, index]

    named_like(forward, module)
    return Patch(
        module=site.module,
        op="gated_mlp",
        kernel=kernel,
        forwards={site.module: forward},
        signature=(*site.signature, kernel.name),
        verify=partial(
            _verify_mlp, site=site, kernel=kernel, forward=forward, dtype=context.dtypes[site.module]
        ),
    )


class _Given(nn.Module):
    """Stands in for a linear layer and gives a prepared output."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


def _verify_mlp(
    trial: Trial, *, site: Site, kernel: KernelSpec, forward: Forward, dtype: torch.dtype
) -> list[Comparison]:
    from sloth_plugins.survey import linear_widths

    module, facts = trial.module(site.module), site.facts
    widths = linear_widths(module._modules[facts["down"]])  # type: ignore[arg-type]
    assert widths is not None
    wide, narrow = widths
    first = [facts["gate_up"]] if "gate_up" in facts else [facts["gate"], facts["up"]]
    comparisons = []
    for activation in trial.dtypes(dtype):
        values = {n: trial.randn(TOKENS, wide * (3 - len(first)), dtype=activation) for n in first}
        x = torch.zeros(TOKENS, narrow, device=trial.device, dtype=activation)

        def run(f: Forward, **tensors: torch.Tensor) -> Any:
            children = {name: _Given(value) for name, value in tensors.items()} | {
                facts["down"]: nn.Identity()
            }
            return f(stand_in(module, {}, children), x)  # noqa: B023

        def truth(**tensors: torch.Tensor) -> torch.Tensor:
            given = [tensors[name] for name in first]
            result: torch.Tensor = kernel.reference(
                *given, *([None] * (2 - len(given))), activation=facts["activation"]
            )
            return result

        with trial.context(activation, dtype):
            comparisons += compare(
                partial(run, forward), partial(run, type(module).forward), truth, values, first
            )
    return comparisons


# Rotary embeddings, alone and with the norms of q and k


def _rope_patch(model: nn.Module, site: Site, context: PlanContext) -> Patch:
    module = model.get_submodule(site.module)
    kernel = context.choose(site, "rope")
    original = type(module).forward
    helper = original.__globals__[site.facts["helper"]]
    fused = _rope_helper(kernel, helper, site)
    forward = named_like(_with_helper(original, site.facts["helper"], fused), module)
    return Patch(
        module=site.module,
        op="rope",
        kernel=kernel,
        forwards={site.module: forward},
        signature=(*site.signature, kernel.name),
        verify=partial(
            _verify_rope,
            site=site,
            kernel=kernel,
            forward=forward,
            fused=fused,
            dtype=context.dtypes[site.module],
        ),
        replays=(site.module,),
    )


def _rope_helper(kernel: KernelSpec, helper: Forward, site: Site) -> Forward:
    """A helper of the same signature: the kernel, and the model's own for calls that it doesn't serve."""
    function, takes, layout = kernel.function, _takes(kernel), site.facts["layout"]
    default, keep = site.facts["unsqueeze_dim"], site.facts["result"] == "input"

    def apply_rotary(
        q: Any, k: Any, cos: Any, sin: Any, *args: Any, unsqueeze_dim: int = default, **kwargs: Any
    ) -> Any:
        if (
            args
            or kwargs
            or not (takes(q) and takes(k) and q.dim() == 4 and cos.dim() == 3 and q.dtype == k.dtype)
        ):
            return helper(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)
        out_dtype = q.dtype if keep else None
        return function(q, k, cos, sin, layout=layout, unsqueeze_dim=unsqueeze_dim, out_dtype=out_dtype)

    return apply_rotary


def _with_helper(forward: Forward, name: str, replacement: Forward) -> FunctionType:
    """`forward` with another function under one global name, for the instances that it is bound to alone.

    Its globals are a copy without `__name__`: torch.compile then guards on this very dict, not on the
    module's.
    """
    assert isinstance(forward, FunctionType)
    scope = {key: value for key, value in forward.__globals__.items() if key != "__name__"}
    scope[name] = replacement
    bound = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    bound.__doc__, bound.__module__ = forward.__doc__, forward.__module__
    bound.__annotations__ = dict(forward.__annotations__)
    return bound


def _recorded(trial: Trial, site: Site) -> tuple[torch.Tensor, ...]:
    """q, k, cos and sin as the module's own forward hands them to its helper; NotASite if it never does."""
    module = trial.module(site.module)
    original = type(module).forward
    helper = original.__globals__[site.facts["helper"]]
    calls: list[tuple[torch.Tensor, ...]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(args[:4]))
        return helper(*args, **kwargs)

    replay = trial.replay(site.module)
    with torch.no_grad(), replay.context():
        _with_helper(original, site.facts["helper"], record)(module, *replay.args, **replay.kwargs)
    if not calls:
        raise NotASite("this layer applies no rotary embedding", benign=True)
    if len(calls) > 1 or len(calls[0]) < 4:
        raise NotASite("its forward calls the rotary helper in an unusual way")
    return calls[0]


def _random_like(trial: Trial, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Random values in x's shape and memory layout."""
    return torch.empty_like(x, dtype=dtype).copy_(trial.randn(*x.shape, dtype=dtype))


def _verify_rope(
    trial: Trial, *, site: Site, kernel: KernelSpec, forward: Forward, fused: Forward, dtype: torch.dtype
) -> list[Comparison]:
    module = trial.module(site.module)
    original = type(module).forward
    q, k, cos, sin = _recorded(trial, site)
    reference = _rope_helper(_reference(kernel), original.__globals__[site.facts["helper"]], site)
    comparisons = []
    for activation in trial.dtypes(dtype):
        tensors = {"q": _random_like(trial, q, activation), "k": _random_like(trial, k, activation)}
        tensors |= {"cos": cos.detach(), "sin": sin.detach()}
        with trial.context(activation, dtype):
            comparisons += compare(
                fused, original.__globals__[site.facts["helper"]], reference, tensors, ["q", "k"]
            )
    _verify_wiring(trial, site, forward)
    return comparisons


def _verify_wiring(trial: Trial, site: Site, forward: Forward) -> None:
    module = trial.module(site.module)
    compare_calls(
        partial(type(module).forward, module), partial(forward, module), module, trial.replay(site.module)
    )


class _Deferral:
    """Hands the norms of q and k from the attention's code to the fused helper, within one forward."""

    def __init__(self) -> None:
        self.active = False
        self.norms: list[nn.Module] = []


def _qk_norms(module: nn.Module, site: Site, norms: dict[str, Site]) -> tuple[Site, Site] | None:
    """The two per-head RMSNorms of an attention, in the order of their definition (q, then k), or None."""
    head_dim = getattr(module, "head_dim", None)
    found = [
        norms[f"{site.module}.{name}"]
        for name, _ in module.named_children()
        if f"{site.module}.{name}" in norms
    ]
    if len(found) != 2 or any(
        s.role != "rms_norm" or s.facts["width"] != head_dim or not s.facts["weight"] for s in found
    ):
        return None
    a, b = found
    same = all(a.facts[key] == b.facts[key] for key in ("eps", "offset", "cast_before_weight"))
    return (a, b) if same else None


def _qk_norm_rope_patch(model: nn.Module, site: Site, pair: tuple[Site, Site], context: PlanContext) -> Patch:
    kernel = context.choose(site, "qk_norm_rope")
    if context.settings.disable & {"rms_norm", "rope"}:
        raise NotASite("switched off by the setting disable", benign=True)
    module = model.get_submodule(site.module)
    original = type(module).forward
    helper = original.__globals__[site.facts["helper"]]
    facts, norm = site.facts, pair[0].facts
    function, takes, weight = kernel.function, _takes(kernel), norm["weight"]
    keep, default = facts["result"] == "input", facts["unsqueeze_dim"]
    state = _Deferral()
    options = {key: norm[key] for key in ("eps", "offset", "cast_before_weight")} | {
        "layout": facts["layout"]
    }

    def apply_rotary(
        q: Any, k: Any, cos: Any, sin: Any, *args: Any, unsqueeze_dim: int = default, **kwargs: Any
    ) -> Any:
        if len(state.norms) != 2 or args or kwargs:
            return helper(
                q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs
            )  # forward() sees what is left over
        first, second = state.norms
        state.norms = []
        if not (takes(q) and takes(k) and q.dim() == 4 and cos.dim() == 3 and q.dtype == k.dtype):
            q, k = type(first).forward(first, q), type(second).forward(second, k)
            return helper(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        out_dtype = q.dtype if keep else None
        q_weight, k_weight = getattr(first, weight), getattr(second, weight)
        return function(
            q, k, q_weight, k_weight, cos, sin, unsqueeze_dim=unsqueeze_dim, out_dtype=out_dtype, **options
        )

    fused = _with_helper(original, facts["helper"], apply_rotary)

    names = [norm.module.removeprefix(f"{site.module}.") for norm in pair]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A hook on a norm must see the norm's own result, so nothing is put off then.
        state.active, state.norms = not any(_hooked(self._modules[name]) for name in names), []
        try:
            result = fused(self, *args, **kwargs)
        finally:
            state.active = False
        if state.norms:  # a norm that was put off and never done: redo the whole forward as the model has it
            state.norms = []
            result = original(self, *args, **kwargs)
        return result

    def deferred(own: Forward) -> Forward:
        def norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if state.active and len(args) == 1:
                state.norms = [*state.norms, self]
                return args[0]
            return own(self, *args, **kwargs)

        return norm_forward

    forwards = {site.module: named_like(forward, module)}
    for each in pair:
        norm_module = model.get_submodule(each.module)
        forwards[each.module] = named_like(deferred(type(norm_module).forward), norm_module)
    apart = []
    for make in (
        partial(_rope_patch, model, site, context),
        *(partial(_norm_patch, model, s, context) for s in pair),
    ):
        try:
            apart.append(make())
        except NotASite:
            continue  # its own reason appears when the parts are planned alone
    return Patch(
        module=site.module,
        op="qk_norm_rope",
        kernel=kernel,
        forwards=forwards,
        signature=(*site.signature, kernel.name, "qk_norm_rope"),
        verify=partial(
            _verify_qk_norm_rope,
            site=site,
            pair=pair,
            kernel=kernel,
            forwards=forwards,
            dtype=context.dtypes[site.module],
        ),
        replays=(site.module,),
        otherwise=tuple(apart),
    )


def _verify_qk_norm_rope(
    trial: Trial,
    *,
    site: Site,
    pair: tuple[Site, Site],
    kernel: KernelSpec,
    forwards: dict[str, Forward],
    dtype: torch.dtype,
) -> list[Comparison]:
    module = trial.module(site.module)
    q, k, cos, sin = _recorded(trial, site)
    helper = type(module).forward.__globals__[site.facts["helper"]]
    q_norm, k_norm = (trial.module(each.module) for each in pair)
    weight = pair[0].facts["weight"]
    keep = site.facts["result"] == "input"
    options = {key: pair[0].facts[key] for key in ("eps", "offset", "cast_before_weight")}
    options |= {"layout": site.facts["layout"], "unsqueeze_dim": site.facts["unsqueeze_dim"]}

    def eager(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
        normed = []
        for norm, x, w in ((q_norm, q, q_weight), (k_norm, k, k_weight)):
            clone = stand_in(norm, {})
            clone.__dict__["_parameters"][weight] = w
            normed.append(type(norm).forward(clone, x))
        return helper(*normed, cos, sin)

    def run(function: Forward, q: Any, *args: Any, **kwargs: Any) -> Any:
        return function(q, *args, out_dtype=q.dtype if keep else None, **kwargs, **options)

    comparisons = []
    weights = {name: norm._parameters[weight] for name, norm in (("q_weight", q_norm), ("k_weight", k_norm))}
    grads = ["q", "k", *(name for name, p in weights.items() if p is not None and p.requires_grad)]
    for activation in trial.dtypes(dtype):
        tensors = {"q": _random_like(trial, q, activation), "k": _random_like(trial, k, activation)}
        tensors |= {name: p.detach() for name, p in weights.items() if p is not None}
        tensors |= {"cos": cos.detach(), "sin": sin.detach()}
        with trial.context(activation, dtype):
            comparisons += compare(
                partial(run, kernel.function), eager, partial(run, kernel.reference), tensors, grads
            )
    _verify_deferral(trial, site, forwards)
    return comparisons


def _verify_deferral(trial: Trial, site: Site, forwards: dict[str, Forward]) -> None:
    """The attention with its two norms put off against the attention as it is, on stand-ins.

    The norms get random weights: with two equal ones (as in a new model) it wouldn't show if q had the norm
    of k.
    """
    module = trial.module(site.module)
    plain: dict[str, nn.Module] = {}
    children: dict[str, nn.Module] = {}
    reached: list[str] = []
    for name in forwards:
        if name == site.module:
            continue
        own = trial.module(name)
        weights = {
            key: trial.randn(*p.shape, dtype=p.dtype) + 2
            for key, p in own._parameters.items()
            if p is not None
        }
        norm = stand_in(own, weights)

        def bound(*args: Any, _name: str = name, _norm: nn.Module = norm) -> Any:
            reached.append(_name)
            return forwards[_name](_norm, *args)

        norm.__dict__["forward"] = bound
        children[name.removeprefix(f"{site.module}.")] = norm
        plain[name.removeprefix(f"{site.module}.")] = stand_in(own, weights)
    original, patched = stand_in(module, {}, plain), stand_in(module, {}, children)
    compare_calls(
        partial(type(module).forward, original),
        partial(forwards[site.module], patched),
        module,
        trial.replay(site.module),
    )
    if len(set(reached)) != 2:
        raise VerificationError("its forward does not call both norms before the rotary helper")


# Decoder layers: the residual addition and the norm after it in one launch


def _add_rms_norm_patch(model: nn.Module, site: Site, context: PlanContext) -> Patch:
    module = model.get_submodule(site.module)
    steps, names, passes = site.facts["steps"], site.facts["parameters"], site.facts["passes"]
    before, attention, after, middle, mlp, last = (steps[key] for key in LAYER_STEPS)
    norm_name = f"{site.module}.{middle}"
    if "rms_norm" in context.settings.disable:
        raise NotASite("switched off by the setting disable='rms_norm'", benign=True)
    norm = next(s for s in context.by_role("rms_norm") if s.module == norm_name)
    kernel = context.choose(norm, "add_rms_norm")
    if _float32_under_autocast(model.get_submodule(norm_name), norm, context):
        raise NotASite("its norm changes dtype under autocast", benign=True)
    function, takes, weight = kernel.function, _takes(kernel), norm.facts["weight"]
    options = {key: norm.facts[key] for key in ("eps", "offset", "cast_before_weight")}
    alone = _norm_call(context.choose(norm, "rms_norm"), norm)
    decorated = type(module).forward
    original = inspect.unwrap(decorated)

    def fused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given.pop(names[0], None)
        steps: Any = self._modules
        put_off = steps[middle]
        if not takes(x) or _hooked(put_off) or len(args) > len(names):
            return original(self, *args, **kwargs)
        passed = {name: given.pop(name, default) for name, default in passes.items()}
        extra = {name: value for name, value in given.items() if name not in names}
        normed, x = _normed(steps[before], x)
        inner = steps[attention](hidden_states=normed, **passed, **extra)[0]
        del normed
        if after:
            inner = steps[after](inner)
        normed, summed = function(inner, x, getattr(put_off, weight) if weight else None, **options)
        del inner  # else it would be there beside the MLP
        if NOW.norms:
            note(put_off, normed, summed, lambda x: alone(put_off, x, None))
        if last:
            return summed + steps[last](steps[mlp](normed))
        ends = steps[mlp]
        return summed + (ends(normed) if _hooked(ends) or _hooked(self) else call_unread(ends, normed))

    forward = named_like(_in_decorators(decorated, fused), module)
    vars(forward)["ends_with_mlp"] = not last
    return Patch(
        module=site.module,
        op="add_rms_norm",
        kernel=kernel,
        forwards={site.module: forward},
        signature=(*site.signature, kernel.name),
        verify=partial(
            _verify_add_rms_norm,
            site=site,
            norm=norm,
            kernel=kernel,
            forward=forward,
            dtype=context.dtypes[norm_name],
        ),
        replays=(site.module,),
    )


def _normed(norm: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """(norm(x), x), the norm's backward adding what x gets a gradient for otherwise."""
    beside = getattr(getattr(vars(norm).get("forward"), "__func__", None), "beside", None)
    graph = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if beside is None or not graph or _hooked(norm) or _hooked_everywhere():
        return norm(x), x
    made: tuple[Any, torch.Tensor] = beside(norm, x)
    return made


def _in_decorators(decorated: Forward, replacement: Forward) -> Forward:
    """`replacement` inside the decorators of `decorated`; newer transformers recompute layers in one."""
    inner = getattr(decorated, "__wrapped__", None)
    if inner is None:
        return replacement
    replacement = _in_decorators(inner, replacement)
    held = CellType(inner)  # cells compare by what they hold, and two empty ones are equal
    cells = (isinstance(decorated, FunctionType) and decorated.__closure__) or ()
    if cells.count(held) != 1:
        raise NotASite("its forward is wrapped by a decorator that hides what it wraps", benign=True)
    closure = tuple(CellType(replacement) if cell == held else cell for cell in cells)
    assert isinstance(decorated, FunctionType)
    code, scope, defaults = decorated.__code__, decorated.__globals__, decorated.__defaults__
    wrapper = FunctionType(code, scope, decorated.__name__, defaults, closure)
    wrapper.__kwdefaults__ = decorated.__kwdefaults__
    wrapper.__wrapped__ = replacement  # type: ignore[attr-defined]
    return wrapper


def _verify_add_rms_norm(
    trial: Trial, *, site: Site, norm: Site, kernel: KernelSpec, forward: Forward, dtype: torch.dtype
) -> list[Comparison]:
    module, weight = trial.module(norm.module), norm.facts["weight"]
    parameter = module._parameters[weight] if weight else None
    options = {key: norm.facts[key] for key in ("eps", "offset", "cast_before_weight")}

    def eager(x: Any, residual: Any, **weights: Any) -> Any:
        clone = stand_in(module, {})
        if weights:
            clone.__dict__["_parameters"][weight] = weights["weight"]
        summed = residual + x
        return type(module).forward(clone, summed), summed

    def run(function: Forward, x: Any, residual: Any, **weights: Any) -> Any:
        return function(x, residual, weights.get("weight"), **options)

    comparisons = []
    for activation in trial.dtypes(dtype):
        tensors = {
            key: trial.randn(TOKENS, norm.facts["width"], dtype=activation) for key in ("x", "residual")
        }
        grads = ["x", "residual"]
        if parameter is not None:
            tensors["weight"] = parameter.detach()
            grads += ["weight"] if parameter.requires_grad else []
        with trial.context(activation, dtype):
            comparisons += compare(
                partial(run, kernel.function), eager, partial(run, kernel.reference), tensors, grads
            )
    _verify_wiring(trial, site, forward)
    return comparisons


# Shared


def _hooked(module: Any) -> bool:
    """Whether somebody wants to see this module's own inputs, outputs or gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _hooked_everywhere() -> bool:
    """Whether somebody wants to see all modules' inputs, outputs or gradients."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def _takes(kernel: KernelSpec) -> Callable[[Any], bool]:
    """A cheap check at call time: a tensor on a device and of a dtype that the kernel serves."""
    devices, dtypes = kernel.device_types, kernel.dtypes
    return lambda x: isinstance(x, torch.Tensor) and x.device.type in devices and x.dtype in dtypes


def _reference(kernel: KernelSpec) -> KernelSpec:
    """The kernel's float64 truth in the kernel's place."""
    return dataclasses.replace(
        kernel,
        function=kernel.reference,
        dtypes=kernel.dtypes | {torch.float64},
        device_types=frozenset({"cpu", "cuda"}),
    )
