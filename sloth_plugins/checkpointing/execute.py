"""Carries a plan out on a transformers model, and makes one at the first batch where only a budget is given.

A layer that does not keep everything has its `gradient_checkpointing` switched on and a function of ours as
its `_gradient_checkpointing_func`, as `gradient_checkpointing_enable` gives it torch's. It recomputes through
`torch.utils.checkpoint` (not reentrant, the random state preserved) and offloads through
`saved_tensors_hooks`. The same bits go in and come out, so losses and gradients are those of a step that
keeps everything. Undoing gives each layer its own flags back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from sloth_kernels._streams import Side, current_stream, on
from torch import nn
from torch.utils.checkpoint import checkpoint

from sloth_plugins.checkpointing.facts import ModelFacts, Shape
from sloth_plugins.checkpointing.host import HostWeight, StaysError, host_memory, movable_embedding
from sloth_plugins.checkpointing.observe import Observed, observe
from sloth_plugins.checkpointing.plan import (
    IN_FLIGHT,
    OPTIONS,
    TILES,
    CheckpointPlan,
    costs,
    fixed_bytes,
    gib,
    plan,
    smallest_budget_bytes,
)
from sloth_plugins.checkpointing.rates import Rates, measure_rates, rates_for
from sloth_plugins.checkpointing.repeat import (
    ABSENT,
    EXPANDED,
    FLAGS,
    NOW,
    Recipe,
    Repeated,
    as_saved,
    norms_noted,
    place,
    put_back,
    tensors,
)
from sloth_plugins.checkpointing.weights import StreamedWeights, movable_weights
from sloth_plugins.settings import Settings
from sloth_plugins.specs import BadInputError

# Smaller tensors stay: a copy of its own would cost more than it frees.
LEAST_BYTES = 2**20
# Without a budget, how much of the GPU's memory a plan may fill: there are allocations that no plan knows of.
OF_FREE = 0.85
# What a plan that keeps all chooses from. Nobody has asked for it, so half of what it leaves stays free.
KEEP_ALL: dict[str, Any] = {
    **{"allow": ("keep",), "tiles": (1,), "norms": (False,), "embeddings": (False,), "weights": (False,)},
    "expanded": 0.5,
}
# Options under which a plan may leave out norms' outputs; the others make them again anyway.
NORMS_AGAIN = ("keep", "recompute_mlp", "recompute_mlp_offload", "offload")
# For models whose MLPs are not found.
WITHOUT_MLPS = tuple(name for name in OPTIONS if "mlp" not in name)
OTHER_BITS = (
    "a norm gave other bits when it was run again, so its output is kept, for more memory than planned"
)


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a transformers model; BadInputError where it has none that can be recomputed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1:
        raise BadInputError(
            f"checkpointing of {type(model).__name__}: it has {len(lists)} lists of layers that transformers "
            "can recompute; allowed is one"
        )
    return lists[0]


def install(model: nn.Module, chosen: CheckpointPlan) -> Callable[[], None]:
    """Carry `chosen` out on `model`; gives the function that undoes it."""
    running = Running(model)
    running.use(chosen)
    for stay in filter(None, (running.embeddings_stay, running.weights_stay)):
        warnings.warn(f"sloth: {stay}, for more memory than planned", stacklevel=3)
    return before_training_forwards(model, running, lambda args, kwargs: running.begin())


def recompute_all(
    model: nn.Module, *, offload: bool = False, facts: ModelFacts | None = None
) -> Callable[[], None]:
    """Give decoder layers that transformers has set to be recomputed a function that leaves out what is not
    needed of the MLP then; returns the function that gives them transformers' back. Where a model has no such
    list of layers, transformers' function stays.

    offload: the layers' inputs, but for the last one's, wait in host memory. facts: if they are known, MLPs
    keep less meanwhile.
    """
    try:
        layers = [layer for layer in decoder_layers(model) if layer.gradient_checkpointing]
    except BadInputError:
        layers = []
    mover, given = _Offload(_Norms()), []
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        option = "recompute_offload" if offload and not last else "recompute"
        behind = offload and last and index > 0
        mlp = mlp_of(layer, facts) if facts is not None else None
        inner = None if mlp is None else weakref.ref(mlp)
        ours = _Ours(
            option, mover, weakref.ref(layer), inner, in_flight=0 if behind else IN_FLIGHT - 1, starts=behind
        )
        given.append((weakref.ref(layer), layer._gradient_checkpointing_func, ours))
        layer._gradient_checkpointing_func = ours

    def undo() -> None:
        for ref, theirs, ours in given:
            layer = ref()
            if layer is not None and layer._gradient_checkpointing_func is ours:
                layer._gradient_checkpointing_func = theirs

    return undo


def inputs_leave_in_time(facts: ModelFacts, device: torch.device) -> bool:
    """Whether a layer's input gets to the host in less time than the layer's forward takes, so that waiting
    there costs none: by the device's rates, on a GPU."""
    if device.type != "cuda":
        return False
    rates = measure_rates(device)
    cost = costs(facts, Shape(batch=1, seq=4096), rates)
    link = min(rates.to_host_gb_s, rates.from_host_gb_s) * 1e9
    return cost.options["recompute_offload"].host_bytes / link < cost.forward_s


def facts_of(model: nn.Module, ops: Collection[str]) -> ModelFacts:
    """The facts of a model that is patched with `ops`; BadInputError where they can't be known."""
    adapted = any(".lora_A." in name for name, _ in model.named_parameters())
    fused = bool(set(ops) & ({"lora_mlp", "lora_linear"} if adapted else {"gated_mlp"}))
    facts = ModelFacts.from_model(
        model, fused=fused, whole_mlp="lora_mlp" in ops, fused_head="linear_cross_entropy" in ops
    )
    layers = decoder_layers(model)
    ends = [getattr(vars(layer).get("forward"), "__func__", None) for layer in layers]
    return facts.replace(
        ends_with_mlp=all(getattr(end, "ends_with_mlp", False) for end in ends),
        packed_bytes=packed_bytes(model, layers),
        head_processors=_head_processors(model, facts.activation_bytes) if facts.fused_head else None,
    )


def _head_processors(model: nn.Module, itemsize: int) -> int | None:
    """Multiprocessors of the GPU that a frozen head is on, if its weight is read as it is: in elements of
    `itemsize` bytes, which another dtype or 4 bits would first be copied to."""
    try:
        parameters = [*model.get_output_embeddings().parameters()]  # type: ignore[operator]
    except Exception:  # of a model that has none, or none that can be asked for
        return None
    if not parameters or any(
        p.requires_grad or not p.is_cuda or p.element_size() != itemsize or hasattr(p, "quant_state")
        for p in parameters
    ):
        return None
    return int(torch.cuda.get_device_properties(parameters[0].device).multi_processor_count)


def packed_bytes(model: nn.Module, layers: list[Any]) -> int:
    """Bytes of 4-bit weights of each layer that the device need not hold, wherever they are now."""
    found = movable_weights(model, layers)
    return min((sum(w.numel() * w.element_size() for w in weights) for weights in found), default=0)


def before_training_forwards(
    model: nn.Module, running: Running, action: Callable[[Any, dict[str, Any]], Any]
) -> Callable[[], None]:
    """Call `action(args, kwargs)` before every training forward, and have `running` ready for others; gives
    the function that ends `running`."""
    target = watched(model)
    alive = weakref.ref(target)

    # A plain function, which a copy of the model shares: the copy's layers are not ours.
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module is not alive() or torch.compiler.is_compiling():
            return
        if module.training and torch.is_grad_enabled():
            action(args, kwargs)
        else:
            running.aside(shape_of(args, kwargs))

    handle = target.register_forward_pre_hook(hook, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        running.stop()

    return undo


def shape_of(args: Any, kwargs: dict[str, Any]) -> Shape | None:
    """The batch that a backbone is called with; None where there is none to be seen."""
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds", args[0] if args else None) if given is None else given
    if not isinstance(given, torch.Tensor) or given.dim() < 2 or not given.numel():
        return None
    return Shape(batch=int(given.shape[0]), seq=int(given.shape[1]))


class Running:
    """A plan at work on a model's layers."""

    def __init__(self, model: nn.Module) -> None:
        layers = decoder_layers(model)
        self._model = weakref.ref(model)
        self._layers = [weakref.ref(layer) for layer in layers]
        self._before = [{name: layer.__dict__.get(name, ABSENT) for name in FLAGS} for layer in layers]
        self.theirs = any(layer.gradient_checkpointing for layer in layers)
        """Whether somebody else's checkpointing was on: ours takes its place until undone."""
        self._wanted: list[dict[str, Any]] = []
        self.norms = _Norms()
        self._offload = _Offload(self.norms)
        self._embedding: HostWeight | None = None
        self.embeddings_stay = ""
        """Why the input embeddings are on the device although the plan wants them elsewhere."""
        self._weights: StreamedWeights | None = None
        self._streamed: tuple[bool, ...] = ()
        self.weights_stay = ""
        """Likewise of the layers' 4-bit weights."""
        self._chosen: CheckpointPlan | None = None
        self._aside = False
        """Whether it was seen to since the last training forward that short forwards find the weights."""
        self._reached = 0
        """What `StreamedWeights.reached` was before the last long forward that is none of training."""
        self._unread = 0
        """Training forwards since weights were moved that have not asked for them."""

    @property
    def movable_bytes(self) -> int:
        """What the device need not hold of the input embeddings, wherever they are now."""
        weight = self._embedding.weight if self._embedding is not None else None
        if weight is None and (model := self._model()) is not None:
            weight = movable_embedding(model)
        return 0 if weight is None else weight.numel() * weight.element_size()

    @property
    def packed_bytes(self) -> int:
        """See the function."""
        model = self._model()
        return 0 if model is None else packed_bytes(model, self.layers)

    @property
    def layers(self) -> list[Any]:
        """The layers that are alive."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def use(self, chosen: CheckpointPlan) -> None:
        """Set every layer's flags as `chosen` says."""
        layers = self.layers
        if len(layers) != len(chosen.layers):
            raise BadInputError(
                f"checkpointing: the plan is for {len(chosen.layers)} layers, the model has {len(layers)}"
            )
        self._notice()
        self._wanted = []
        self._chosen = chosen
        self._place_embeddings(chosen.embeddings_on_host)
        self._place_weights(chosen.streamed)
        self._offload.streamed = chosen.streamed if self._weights is not None else ()
        self._expand(chosen.expanded)
        tile = chosen.tile_tokens if chosen.mlp_tiles > 1 else None
        in_flight = chosen.in_flight
        most = 0  # of how many layers the copies are under way, if none waits for them
        for index, (layer, option) in enumerate(zip(layers, chosen.layers, strict=True)):
            again = tile or option.startswith("recompute")
            mlp = mlp_of(layer, chosen.facts) if again else None
            if mlp is None:
                option = option.replace("_mlp", "")
            left, starts = in_flight[index], index == chosen.starts
            inner = None if mlp is None else weakref.ref(mlp)
            norms = self.norms if chosen.norms_again and option in NORMS_AGAIN else None
            function = _Ours(
                option, self._offload, weakref.ref(layer), inner, tile, norms, left, starts, index
            )
            waits = starts or left < most
            most = min(most, left) + ("offload" in option)
            on = option != "keep" or waits or mlp is not None or norms is not None
            self._wanted.append({FLAGS[0]: on, FLAGS[1]: function})
        self._set()

    def _place_embeddings(self, on_host: bool) -> None:
        """Have the input embeddings in host memory, or what is there of them back on the device."""
        self.embeddings_stay = ""
        there = self._embedding is not None and self._embedding.weight is not None
        if on_host == there:
            return
        if self._embedding is not None and (on_host or self._embedding.restore()):
            self._embedding = None
        model = self._model()
        if not on_host or model is None:
            return
        weight = movable_embedding(model)
        why = "they are trained, shared or not on a GPU"
        try:
            self._embedding = HostWeight(weight) if weight is not None else None
        except StaysError as error:
            why = str(error)
        if self._embedding is None:
            self.embeddings_stay = f"the input embeddings stay on the device: {why}"

    def _place_weights(self, streamed: tuple[bool, ...]) -> None:
        """Have the packed weights of these layers in host memory, and all others on the device."""
        self.weights_stay, self._unread = "", 0
        if self._weights is not None:
            self._weights.send()
            if streamed == self._streamed and self._weights.away:
                return
            self._weights.restore()
            self._weights = None
        model = self._model()
        if True not in streamed or model is None:
            return
        found = [
            weights
            for weights, comes in zip(movable_weights(model, self.layers), streamed, strict=False)
            if comes
        ]
        why = "they are not 4-bit ones that the kernels expand, or shared, or not on one GPU"
        try:
            if found and all(found):
                at = [index for index, comes in enumerate(streamed) if comes]
                number = {index: number for number, index in enumerate(at)}
                side = self._offload.side(found[0][0].device)
                made = StreamedWeights(
                    found, None if side is None else side.stream, lambda n: self._offload.advance(at[n])
                )
                self._weights, self._streamed = made, streamed
                alive = weakref.ref(made)

                def step(index: int) -> None:
                    weights = alive()
                    if weights is not None and index in number:
                        weights.reach(number[index])

                self._offload.step = step
        except StaysError as error:
            why = str(error)
        if self._weights is None:
            self.weights_stay = f"the layers' weights stay on the device: {why}"

    def aside(self, shape: Shape | None) -> None:
        """At the begin of a forward that is none of training: many short ones, as of a generation, want all
        weights on the device; they come if there is room, until the next training forward."""
        weights, chosen = self._weights, self._chosen
        if weights is None or chosen is None or shape is None or self._aside:
            return
        a_token = chosen.costs().forward_s * len(chosen.layers) / chosen.shape.tokens
        long = shape.tokens * a_token >= weights.nbytes / (chosen.rates.from_host_gb_s * 1e9)
        if long and weights.reached != self._reached:
            self._reached = weights.reached
            return  # they come while it runs, unless the last such forward was not one of our kernels
        self._aside = True
        here = allocated_bytes(weights.device) or 0
        if here + weights.nbytes > chosen.budget_bytes or not weights.bring():
            warnings.warn(
                f"sloth: {gib(weights.nbytes)} of 4-bit weights are in host memory, and there is no room for "
                "them on the device: short forwards, as of a generation, are slow",
                stacklevel=4,
            )

    def _expand(self, count: int) -> None:
        """Let the modules of the first `count` layers keep their 4-bit weights expanded, and no others."""
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if index < count:
                    EXPANDED.setdefault(module, None)
                else:
                    EXPANDED.pop(module, None)

    def _set(self) -> None:
        for layer, flags in zip(self.layers, self._wanted, strict=False):
            layer.__dict__.update(flags)

    def begin(self) -> bool:
        """At the begin of a training forward; whether somebody else's flags were in the way."""
        self._offload.drain()
        if self._weights is not None and self._aside:
            self._weights.send()
        self._aside = False
        self._notice_unread()
        changed = any(
            layer.__dict__.get(name) is not flags[name]
            for layer, flags in zip(self.layers, self._wanted, strict=False)
            for name in FLAGS
        )
        if changed:
            self._notice()
            self._set()
        return changed

    def _notice_unread(self) -> None:
        """Weights that our kernels have not read in two forwards come back: others read them from the host,
        slowly."""
        if self._weights is None or self._weights.reached:
            return
        self._unread += 1
        if self._unread > 2:
            self._place_weights(())
            self.weights_stay = "the layers' weights are back on the device: the kernels did not read them"
            warnings.warn(f"sloth: {self.weights_stay}, for more memory than planned", stacklevel=4)

    def _notice(self) -> None:
        """Flags that somebody set since are what undoing gives back."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer.__dict__.get(FLAGS[1]), _Ours):
                self._before[index] = {name: layer.__dict__.get(name, ABSENT) for name in FLAGS}
                self.theirs = self.theirs or layer.gradient_checkpointing

    def stop(self) -> None:
        """Give each layer the flags back that it had."""
        self._offload.drain()
        self._place_embeddings(False)
        self._place_weights(())
        self._expand(0)
        for ref, before, ours in zip(self._layers, self._before, self._wanted, strict=False):
            layer = ref()
            if layer is None:
                continue
            changed = layer.__dict__.get(FLAGS[1]) is not ours[FLAGS[1]]
            for name, value in before.items():
                if changed:
                    continue  # somebody set others since: theirs stay
                if value is ABSENT:
                    layer.__dict__.pop(name, None)
                else:
                    layer.__dict__[name] = value
        self._wanted = []


class _Ours:
    """A layer's `_gradient_checkpointing_func`: called with the layer's forward (its keywords bound).

    in_flight: of how many layers before it the copies may be under way when it begins. starts: whether the
    copy back of what the layer before it has offloaded starts with its own backward.
    """

    def __init__(
        self,
        option: str,
        offload: _Offload,
        layer: weakref.ref[Any],
        mlp: weakref.ref[nn.Module] | None,
        tile: int | None = None,
        norms: _Norms | None = None,
        in_flight: int = 0,
        starts: bool = False,
        index: int = 0,
    ) -> None:
        self.index = index
        self.option, self.offload, self.layer, self.mlp = option, offload, layer, mlp
        self.tile, self.norms, self.in_flight, self.starts = tile, norms, in_flight, starts

    def __reduce__(self) -> Any:
        # A copy of the model, or one from a file, has other layers: they recompute as transformers would.
        return functools.partial, (checkpoint,), (checkpoint, (), {"use_reentrant": False}, None)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self.offload.drain(self.in_flight)
        layer = self.layer()
        if layer is None or not torch.is_grad_enabled():
            return function(*args)
        try:
            result = self._call(layer, function, *args)
        except BaseException:  # the later layers, which would free what leaves, do not come
            self.offload.drain()
            raise
        if self.starts:
            self.offload.start_with(result, self.index)
        return result

    def _call(self, layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        option = self.option
        mlp = self.mlp() if self.mlp is not None else None
        run = function if mlp is None else functools.partial(_with_mlp_again, mlp, self.tile, function)
        if option in ("keep", "recompute_mlp"):
            if self.norms is None:
                return run(*args)
            with self.norms.layer():
                return run(*args)
        if option in ("recompute", "recompute_offload"):
            run = Repeated(run)
        if option == "recompute":
            return checkpoint(run, *args, use_reentrant=False)
        with self.offload.layer(layer, getattr(function, "keywords", {}), self.index):
            if option in ("offload", "recompute_mlp_offload"):
                with norms_noted(self.norms is not None):
                    return run(*args)
            return checkpoint(run, *args, use_reentrant=False)


def _with_mlp_again(mlp: nn.Module, tile: int | None, function: Callable[..., Any], *args: Any) -> Any:
    """A layer's forward with an MLP that is recomputed, in tiles of so many tokens if `tile` is given.

    The MLP's forward is what it was afterwards.
    """
    again = functools.partial(_again, mlp, mlp.forward, tile)
    with put_back(mlp, "forward"):
        mlp.__dict__["forward"] = again
        return function(*args)


def _again(
    mlp: nn.Module, inner: Callable[..., Any], tile: int | None, x: torch.Tensor, *others: Any, **named: Any
) -> Any:
    """The MLP's forward of x (..., H), recomputed: by its own patch if it can do that, which then neither
    expands weights for each tile nor computes the output again; else by torch's checkpointing.

    In one piece where it has other arguments. In a layer that is run again as a whole, in one piece only
    where the layer's second run needs nothing of it.
    """
    tokens = x.numel() // x.shape[-1]
    several = tile is not None and tokens > tile and not others and not named
    if not several and NOW.layer is not None and NOW.unread is not mlp:
        return inner(x, *others, **named)
    size = -(-tokens // -(-tokens // tile)) if tile is not None and several else tokens
    own = getattr(getattr(inner, "__func__", None), "again", None)
    if own is not None and tokens and not others and not named and (y := own(mlp, x, size)) is not None:
        return y
    forward = functools.partial(checkpoint, inner, use_reentrant=False)
    if not several:
        return forward(x, *others, **named)
    parts = torch.split(x.reshape(1, tokens, x.shape[-1]), size, 1)
    return torch.cat([forward(part) for part in parts], 1).view(x.shape)


def mlp_of(layer: nn.Module, facts: ModelFacts) -> nn.Module | None:
    """The layer's child that widens to the MLP's size and comes back from it."""
    for child in layer.children():
        shapes = {
            (getattr(m, "in_features", None), getattr(m, "out_features", None)) for m in child.modules()
        }
        h, i = facts.hidden, facts.intermediate
        if {(h, i), (i, h)} <= shapes or {(h, 2 * i), (i, h)} <= shapes:
            return child
    return None


# Norms


class _Made(NamedTuple):
    """A norm's output in place of which its input, as it was saved, is kept."""

    make: Callable[[Any], Any]
    source: Any
    version: int | None = None
    """Of a source that stays where it is."""

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        if self.version is not None and source._version != self.version:
            raise RuntimeError("the input of a norm was changed in place between forward and backward")
        return _plainly(self.make, source)


def _plainly(make: Callable[[Any], Any], source: torch.Tensor) -> torch.Tensor:
    """`make(source)` as a backward runs it, where no autocast is."""
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        made: torch.Tensor = make(source)
        return made


class _Norms:
    """Norms' outputs that are not kept. Each norm's first one is made again at once, and must be the same."""

    def __init__(self) -> None:
        self._proven: dict[tuple[Any, ...], bool] = {}
        self.kept = False
        """Whether some norm's output had to be kept after all: its second run gave other bits."""

    def recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        """How to make `tensor`, which is about to be saved, if it is what the last norm gave."""
        recipe: Recipe | None = NOW.recipe
        if recipe is None or type(tensor) is not torch.Tensor:
            return None
        if tensor.data_ptr() != NOW.place[0] or place(tensor) != NOW.place:
            return None
        key = id(recipe.module), tensor.dtype, tensor.shape[-1]
        if key not in self._proven:
            self._proven[key] = self._prove(recipe, tensor)
            if not self._proven[key] and not self.kept:
                self.kept = True
                warnings.warn(f"sloth: {OTHER_BITS}", stacklevel=2)
        return recipe if self._proven[key] else None

    @staticmethod
    def _prove(recipe: Recipe, tensor: torch.Tensor) -> bool:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        try:
            made = _plainly(recipe.make, recipe.source)
            parts = [t.contiguous().view(torch.uint8) for t in (made, tensor.detach())]
        except Exception:  # a kernel of somebody else's: then its output is kept
            return False
        return place(made)[1:] == place(tensor)[1:] and torch.equal(*parts)

    @contextmanager
    def layer(self) -> Iterator[None]:
        """What is saved inside stays, but for norms' outputs."""

        def pack(tensor: torch.Tensor) -> Any:
            recipe = self.recipe_of(tensor)
            if recipe is None:
                return as_saved(tensor)
            return _Made(recipe.make, recipe.source, recipe.source._version)

        def unpack(saved: Any) -> Any:
            return saved(saved.source) if isinstance(saved, _Made) else saved

        vars(pack)["private"] = True
        with norms_noted(True), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


# Offloading


class _Entry:
    """One storage in host memory, and on the device while it is on its way or wanted."""

    def __init__(self, source: torch.Tensor, side: Side | None) -> None:
        self.source: torch.Tensor | None = source
        self.device = source.device
        self.users = self.left = 0
        self.back: torch.Tensor | None = None
        self.missing = 0
        """Bytes of `back` whose copy has not been launched."""
        self.gone: Any = None
        """Behind the copy to the host, until one back has waited for it."""
        self.arrived: Any = None
        self.stream: Any = None
        """Where `back` was allocated, and will be freed."""
        self.host = host_memory(source.numel(), source.is_cuda)
        if side is None:
            self.host.copy_(source)
            return
        side.wait()
        with on(side.stream):
            self.host.copy_(source, non_blocking=True)

    def take(self) -> torch.Tensor:
        """The bytes on the device; with the last of its users they are dropped here."""
        assert self.back is not None and not self.missing
        if self.arrived is not None:
            current_stream(self.device).wait_event(self.arrived)
        found = self.back
        self.left -= 1
        if self.left <= 0:
            self.left, self.back, self.arrived = self.users, None, None
        return found

    def __del__(self) -> None:
        if self.back is not None and self.arrived is not None:
            # Dropped unused: nobody gets this memory before it is filled. record_stream() would do, but hold
            # it until later copies have run as well, also where it was used.
            self.stream.wait_event(self.arrived)


class _Block:
    """What one layer of one forward has offloaded. Lives as long as autograd wants any of it."""

    def __init__(self, before: _Block | None, index: int) -> None:
        self.index = index
        """The layer's, from 0."""
        self.entries: dict[tuple[int, int, int], _Entry] = {}
        self.before = None if before is None else weakref.ref(before)
        self.copied: Any = None
        self.wanted = False
        """Whether its backward has begun, the first time."""

    def release(self) -> None:
        """Drop the tensors on the device, for what the current stream does after they are copied."""
        leaving = [entry for entry in self.entries.values() if entry.source is not None]
        if self.copied is not None:
            for device in {entry.device for entry in leaving}:
                current_stream(device).wait_event(self.copied)
        for entry in leaving:
            entry.source = None


class _View(NamedTuple):
    """A saved tensor: where in which storage."""

    block: _Block
    entry: _Entry
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Offload:
    """Moves what layers save to pinned host memory and back, on a stream for each way.

    On their way back are those of the layer that is wanted and of the one before. On a CPU copies are plain.

    Weights come from the host as well (`weights`), on the same stream, since a device would not take copies
    of two streams in turns. So that none is late, a layer's weights come before what the layers before it
    have saved, and what has several layers' time comes in as many portions.
    """

    def __init__(self, norms: _Norms) -> None:
        self._norms = norms
        self.streamed: tuple[bool, ...] = ()
        """Whether each layer's weights come from the host."""
        self._queue: deque[_Entry] = deque()
        self.step: Callable[[int], None] = lambda index: None
        """Called with a layer whose backward begins: the next one's weights begin to come."""
        self._portion = self._behind = 0
        self._leaving: deque[_Block] = deque()
        self._last: weakref.ref[_Block] | None = None
        self._sides: dict[tuple[torch.device, bool], Side] = {}
        self._parameters: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()

    def drain(self, left: int = 0) -> None:
        """Free the device of what leaves it, waiting for the copies, but for those of the last `left`
        layers."""
        self._queue.clear()  # of a backward that has ended, or never will
        while len(self._leaving) > left:
            self._leaving.popleft().release()

    def start_with(self, result: Any, index: int) -> None:
        """Let the copy back of the last block start when the backward reaches `result`, a layer's."""
        block = self._last() if self._last is not None else None
        first = next((t for t in tensors(result) if t.requires_grad), None)
        if block is not None and first is not None:
            first.register_hook(functools.partial(self._start, weakref.ref(block), index))  # type: ignore[no-untyped-call]

    def _start(self, ref: weakref.ref[_Block], index: int, grad: torch.Tensor) -> None:
        block = ref()
        if block is not None and not block.wanted:
            self.step(index)
            self._prepare(block, index)

    def _fetch(self, entries: Iterable[_Entry]) -> None:
        """Start the way back of those that aren't back or on their way, in this order: what was saved last is
        wanted first."""
        entries = list(entries)
        self._place(entries)
        self._come(entries)

    def _place(self, entries: Iterable[_Entry]) -> None:
        """Give places on the device to those that have none."""
        for entry in entries:
            if entry.back is None:
                side = self.side(entry.device)
                entry.back = torch.empty(entry.host.numel(), dtype=torch.uint8, device=entry.device)
                entry.missing = entry.host.numel()
                entry.stream = None if side is None else current_stream(entry.device)

    def _come(self, entries: Iterable[_Entry], most: int | None = None) -> None:
        """Launch the copies of what is missing of these, or of `most` bytes of that."""
        missing = [entry for entry in entries if entry.missing]
        for device in dict.fromkeys(entry.device for entry in missing):
            side = self.side(device)
            if side is not None:
                side.wait()
            with contextlib.nullcontext() if side is None else on(side.stream):
                for entry in missing:
                    if entry.device != device or most == 0:
                        continue
                    most = self._copy(entry, side, most)

    @staticmethod
    def _copy(entry: _Entry, side: Side | None, most: int | None) -> int | None:
        """What is missing of one, or `most` bytes of that; what is left of `most`."""
        assert entry.back is not None
        begin = entry.host.numel() - entry.missing
        size = entry.missing if most is None else min(most, entry.missing)
        to, of = entry.back, entry.host
        if size < of.numel():
            to, of = to[begin : begin + size], of[begin : begin + size]
        if entry.gone is not None and side is not None:
            side.stream.wait_event(entry.gone)
            entry.gone = None
        to.copy_(of, non_blocking=side is not None)
        entry.missing -= size
        if side is not None:
            entry.arrived = side.stream.record_event()
        return None if most is None else most - size

    def advance(self, index: int) -> None:
        """At the backward of a layer whose weights come from the host: launch another portion."""
        if self._queue and index < self._behind:
            self._come(self._queue, self._portion)
            while self._queue and not self._queue[0].missing:
                self._queue.popleft()

    def _prepare(self, block: _Block, behind: int) -> None:
        """Start the way back of all that `block` has, while the layers from `behind` on down to it run."""
        self._come(self._queue)
        self._queue.clear()
        entries = [*reversed(block.entries.values())]
        self._place(entries)
        between = 1 + sum(self.streamed[block.index + 1 : behind])
        self._portion = -(-sum(entry.missing for entry in entries) // between)
        self._queue.extend(entries)
        self._behind = behind + 1
        self.advance(behind)
        self._behind = behind

    def _weights(self, layer: nn.Module) -> Iterator[torch.Tensor]:
        """The layer's parameters. Its modules are looked for once, since that takes longer than all else
        here; what is added to them later would be copied like activations."""
        held = self._parameters.get(layer)
        if held is None:
            held = self._parameters[layer] = [m._parameters for m in layer.modules() if m._parameters]
        return (p for parameters in held for p in parameters.values() if p is not None)

    @contextmanager
    def layer(self, layer: nn.Module, keywords: dict[str, Any], index: int = 0) -> Iterator[None]:
        """What is saved inside goes to the host, but for weights, and for the layer's keyword arguments,
        which other layers share. index: the layer's, from 0."""
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' weights look at each call otherwise
            stays = {t.untyped_storage().data_ptr() for t in self._weights(layer)}
            stays |= {t.untyped_storage().data_ptr() for t in tensors(keywords)}
        block = _Block(self._last() if self._last is not None else None, index)
        device: list[torch.device] = []

        # None of these calls itself: in such a cycle host memory would wait for Python's collector.
        def leave(tensor: torch.Tensor) -> Any:
            # Many are parameters, so the cheapest question comes first.
            if type(tensor) is not torch.Tensor or not (tensor.is_cuda or tensor.is_cpu):
                return as_saved(tensor)
            if tensor.layout != torch.strided or (storage := tensor.untyped_storage()).nbytes() < LEAST_BYTES:
                return as_saved(tensor)
            if storage.data_ptr() in stays:
                return as_saved(tensor)
            device.append(tensor.device)
            key = (storage.data_ptr(), storage.nbytes(), tensor._version)
            entry = block.entries.get(key)
            if entry is None:
                side = self.side(tensor.device, out=True)
                entry = block.entries[key] = _Entry(_whole(tensor, storage), side)
            entry.users += 1
            entry.left = entry.users
            return _View(
                block, entry, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
            )

        def pack(tensor: torch.Tensor) -> Any:
            recipe = self._norms.recipe_of(tensor) if NOW.norms else None
            if recipe is not None:
                return _Made(recipe.make, leave(recipe.source))  # the source itself leaves
            return leave(tensor)

        def come(saved: Any) -> torch.Tensor:
            if not isinstance(saved, _View):
                return saved  # type: ignore[no-any-return]
            entry, block = saved.entry, saved.block
            if not block.wanted:  # its first tensor: all of it comes now, and the block before it next
                earlier = None if block.before is None else block.before()
                block.wanted = True
                self._fetch(reversed(block.entries.values()))
                self.step(block.index)
                if earlier is not None:
                    self._prepare(earlier, block.index)
            if entry.back is None or entry.missing:
                self._fetch((entry,))
            out = torch.empty(0, dtype=saved.dtype, device=entry.device)
            storage = entry.take().untyped_storage()
            return out.set_(storage, saved.offset, saved.size, saved.stride)

        def unpack(saved: Any) -> torch.Tensor:
            return saved(come(saved.source)) if isinstance(saved, _Made) else come(saved)

        vars(pack)["private"] = True
        self._last = weakref.ref(block)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            if device:
                side = self.side(device[0], out=True)
                block.copied = None if side is None else side.stream.record_event()
                for entry in block.entries.values():
                    entry.gone = block.copied
                self._leaving.append(block)

    def side(self, device: torch.device, *, out: bool = False) -> Side | None:
        """A device's stream for what comes from the host or, `out`, leaves for it."""
        if device.type != "cuda":
            return None
        if (device, out) not in self._sides:
            self._sides[device, out] = Side(device)
        return self._sides[device, out]


def _whole(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a tensor's storage."""
    if tensor.nbytes == storage.nbytes() and tensor.is_contiguous():
        return tensor.detach().view(-1).view(torch.uint8)
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


# A budget and no plan


def watched(model: nn.Module) -> nn.Module:
    """The module that every training forward comes by: the backbone, which trainers' own heads call too."""
    target: Any = getattr(model, "base_model", model)
    target = getattr(target, "model", target)  # PEFT: LoraModel.model is the causal LM
    target = getattr(target, "base_model", target)
    return target if isinstance(target, nn.Module) else model


class BudgetError(BadInputError):
    """A budget that nothing can meet."""


class Sharded(BadInputError):
    """Parameters of which a process holds a part."""


def refuse_sharded(model: nn.Module) -> None:
    """Sharded for a model under FSDP or DeepSpeed's ZeRO-3: its processes must recompute alike, and their
    plans may differ."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise Sharded("checkpointing: its parameters are sharded (FullyShardedDataParallel)")
    for parameter in model.parameters():
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
            raise Sharded(f"checkpointing: its parameters are sharded ({type(parameter).__name__})")


def usable_bytes(device: torch.device) -> int | None:
    """OF_FREE of what a GPU has free and what this process has of it; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(OF_FREE * (free + torch.cuda.memory_reserved(device)))


def allocated_bytes(device: torch.device) -> int | None:
    """What tensors take of a GPU; None for other devices."""
    return _allocated(device, "current")


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors took of a GPU; None for other devices."""
    return _allocated(device, "peak")


def _allocated(device: torch.device, which: str) -> int | None:
    if device.type != "cuda":
        return None
    # Without the flat copy of all figures that torch.cuda.memory_allocated() makes: it is asked for at the
    # begin of each step, when the device waits for the host.
    stats: Any = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["allocated_bytes"]["all"][which]) if stats else 0


def planned_for_bytes(model: nn.Module, device: torch.device) -> int:
    """What is on the device already of that for which a plan has room beside the weights: the trained
    parameters' gradients, and the state of whichever of the process's optimizers has them."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    found = [p.grad for p in trained.values() if p.grad is not None]
    for thing in gc.get_objects():
        # Not isinstance(), which asks lazy modules for their class.
        if issubclass(type(thing), torch.optim.Optimizer):
            groups, state = vars(thing).get("param_groups", ()), vars(thing).get("state", {})
            if any(id(p) in trained for group in groups for p in group["params"]):
                found += tensors([*dict(state).values()])
    storages = (t.untyped_storage() for t in found if t.device == device and t.layout == torch.strided)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def twice(facts: ModelFacts, shape: Shape) -> Observed:
    """Twice what a layer saves by arithmetic: where there is room for that, nobody has to look closer."""
    saved = sum(facts.saved_bytes(shape).values()) / shape.tokens
    return Observed(saved=2 * saved, by_length=0.0, mlp=0.0, norms=0.0)


class Automatic:
    """Plans within `settings.memory_budget_bytes` at the first training batch, and anew for a larger one.

    `record` is the report's entry, kept up to date. Where nothing fits, the smallest plan is used with a
    warning, or under strict=True BadInputError is raised. Without a budget, OF_FREE of what the GPU has for
    this process is one; then nobody is warned, and models with sharded parameters are left alone.
    """

    def __init__(
        self, settings: Settings, record: dict[str, Any], ops: Iterable[str], rates: Rates | None = None
    ) -> None:
        self.given, self.strict = settings.memory_budget_bytes, settings.strict
        self.budget = self.given or 0
        self.record, self.ops, self._rates = record, set(ops), rates

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Wait for the first batch; gives the function that undoes all. Raises BadInputError where the model
        can't be planned, BudgetError where the budget does not hold its weights and the optimizer's state."""
        self.facts = facts_of(model, self.ops)
        self.running = Running(model)
        mlps = [mlp_of(layer, self.facts) for layer in self.running.layers]
        split = all(mlp is not None for mlp in mlps)
        self.tiles = TILES if split else (1,)
        self.allow = OPTIONS if split else WITHOUT_MLPS
        both = {"rms_norm", "add_rms_norm"} <= self.ops
        self.norms: tuple[bool, ...] = (False, True) if both else (False,)
        self.embeddings: tuple[bool, ...] = (False, True)
        self.weights: tuple[bool, ...] = (False, True)
        if len(self.running.layers) != self.facts.layers:
            raise BadInputError(
                f"checkpointing: {type(model).__name__} has not the layers that its config says"
            )
        self.device = next(model.parameters()).device
        if self.given is None:
            refuse_sharded(model)
            self.budget = usable_bytes(self.device) or 0
        elif (least := fixed_bytes(self.facts, True, self.facts.layers)) >= self.budget:
            raise BudgetError(
                f"memory_budget_bytes={gib(self.budget)}: weights and the optimizer's state alone take "
                f"{gib(least)}"
            )
        trained = next((p for p in model.parameters() if p.requires_grad), None)
        self.trained = weakref.ref(trained) if trained is not None else lambda: None
        self.plan: CheckpointPlan | None = None
        self.left = self.observed = False
        self.earlier: int | None = None
        self.seen: Shape | None = None
        self.model = weakref.ref(model)
        self.record.update({"chosen": "to be planned at the first batch", "plans": 0})
        self._say_why()
        end = before_training_forwards(model, self.running, self._before_forward)
        free = self._repeat_without_memory(watched(model))

        def undo() -> None:
            free()
            end()

        return undo

    @property
    def ways(self) -> dict[str, Any]:
        """What the planner may choose from."""
        return {
            **{"allow": self.allow, "tiles": self.tiles},
            **{"norms": self.norms, "embeddings": self.embeddings, "weights": self.weights},
        }

    @property
    def rates(self) -> Rates:
        """The device's, measured when somebody asks for them first."""
        if self._rates is None:
            self._rates = measure_rates(self.device)
        return self._rates

    def _repeat_without_memory(self, module: nn.Module) -> Callable[[], None]:
        """A training forward that runs out of memory is planned anew with less and run once more: until its
        end nothing is changed but the random state, which is put back. Gives the function that ends this."""
        if "forward" in module.__dict__:
            return lambda: None  # somebody's own, which may not be called twice
        alive = weakref.ref(module)

        # As the engine's forwards: a function that a copy of the model shares, and that is the class's there.
        @functools.wraps(type(module).forward)
        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inner = functools.partial(type(this).forward, this)
            planned = self.plan is not None and this is alive() and not torch.compiler.is_compiling()
            if not (planned and this.training and torch.is_grad_enabled()):
                return inner(*args, **kwargs)
            state = _random_state(self.device)
            try:
                return inner(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                chosen = self._plan_with_less(error)
            # Here the exception and the tensors in its frames are gone: there is room for what a plan moves.
            self.running.begin()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._use(chosen)
            _put_back(state, self.device)
            try:
                return inner(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                error.add_note(f"sloth: this was the forward's second try. {self._least()}")
                raise

        ours = module.__dict__["forward"] = MethodType(forward, module)

        def undo() -> None:
            target = alive()
            if target is not None and target.__dict__.get("forward") is ours:
                del target.__dict__["forward"]
            self.plan = None  # whoever wrapped it since gets what was there

        return undo

    def _least(self) -> str:
        assert self.plan is not None
        least = smallest_budget_bytes(self.facts, self.plan.shape, self.rates, **self.ways)
        shape = self.plan.shape
        return f"{shape.batch} x {shape.seq} tokens need at least {gib(least)} by the plan's arithmetic"

    def _plan_with_less(self, error: torch.OutOfMemoryError) -> CheckpointPlan:
        """A plan for nine tenths of what this one was to take; with a note, `error` goes on where none is
        left."""
        assert self.plan is not None
        shape, before = self.plan.shape, self.plan.peak_bytes + self.plan.margin_bytes
        try:
            chosen = plan(self.facts, shape, int(0.9 * before), self.rates, **self.ways)
        except BadInputError:
            least = smallest_budget_bytes(self.facts, shape, self.rates, **self.ways)
            if least >= before:
                error.add_note(f"sloth: there is no plan with less memory. {self._least()}")
                raise error from None
            chosen = plan(self.facts, shape, least, self.rates, **self.ways)
        self.budget = min(self.budget, int(0.9 * before))
        said = f"out of memory in a forward under a plan for {gib(before)}: planned anew for less"
        warnings.warn(f"sloth: {said} ({chosen}), and the forward is repeated", stacklevel=3)
        self.record["note"] = said
        return chosen

    def _say_why(self) -> None:
        budget = f"memory_budget_bytes={gib(self.budget)}"
        self.record["reason"] = budget if self.given else f"{gib(self.budget)} of the GPU may be filled"
        if self.running.theirs:
            self.record["reason"] += "; the trainer's own gradient checkpointing gives way to the plan"

    def _before_forward(self, args: Any, kwargs: dict[str, Any]) -> None:
        shape = shape_of(args, kwargs)
        if self.left or shape is None:
            return
        trained = self.trained()
        if not self.facts.accumulates and trained is not None and trained.grad is not None:
            # Micro-batches, or gradients that are zeroed in place: they are there beside all activations.
            self.facts, self.plan = self.facts.replace(accumulates=True), None
        if self.running.norms.kept and True in self.norms:
            self.norms, self.plan, self.record["note"] = (False,), None, OTHER_BITS
        if self.plan is None or not self.plan.covers(shape):
            try:
                self._plan(shape)
            except Exception as error:
                if self.given is not None:
                    raise
                known = isinstance(error, BadInputError)
                self.plan, self.left = None, True
                self.record["note"] = str(error) if known else f"no plan: {error!r}"
                self.record["chosen"] = "left to the trainer"
                self.running.stop()
                if not known:
                    warnings.warn(f"sloth: checkpointing is left to the trainer: {error!r}", stacklevel=2)
        elif self.running.begin():
            self._say_why()
        if (stay := self.running.weights_stay) and True in self.weights and not self.left:
            self.weights = (False,)
            self.record.pop("note", None)
            self._plan(shape)
            self.record["note"] = "; ".join(filter(None, (stay, self.record.get("note"))))
        self._measure()

    def _measure(self) -> None:
        """The peak so far into the record, but for one from before the plan has moved weights to the host."""
        if (peak := peak_bytes(self.device)) is None:
            return
        for name in ("measured_peak_bytes", "earlier_peak_bytes"):
            self.record.pop(name, None)
        self.record["earlier_peak_bytes" if peak == self.earlier else "measured_peak_bytes"] = peak

    def _plan(self, shape: Shape) -> None:
        if self.seen is not None:  # room for the longest row and for the most tokens that were seen
            seq = max(shape.seq, self.seen.seq)
            tokens = max(shape.tokens, self.seen.tokens)
            shape = Shape(batch=-(-tokens // seq), seq=seq)
        self.seen = shape
        # Trainers tie, train, shard and compile after they have called accelerate().
        facts = self.facts = self.facts.replace(
            embedding_bytes=self.running.movable_bytes, packed_bytes=self.running.packed_bytes
        )
        if self.given is None and not self.record["plans"]:
            if (model := self.model()) is not None:
                refuse_sharded(model)  # trainers shard after they have called accelerate()
            self.budget = usable_bytes(self.device) or 0
        if not self.record["plans"] and (here := allocated_bytes(self.device)) is not None:
            here -= 0 if (model := self.model()) is None else planned_for_bytes(model, self.device)
            facts = self.facts = facts.replace(resident_bytes=max(here, facts.weights_bytes))
        if facts.observed is None and self._all_kept(facts.replace(observed=twice(facts, shape)), shape):
            roomy = self._all_kept(facts, shape)
        else:
            if not self.observed:
                self.observed = True
                facts = self.facts = self._observed(facts)
            roomy = self._all_kept(facts, shape)
        if roomy is not None:
            self._use(roomy)
            return
        rates = self.rates
        try:
            chosen = plan(facts, shape, self.budget, rates, **self.ways)
        except BadInputError as error:
            if self.strict and self.given is not None:
                raise
            least = smallest_budget_bytes(facts, shape, rates, **self.ways)
            chosen = plan(facts, shape, least, rates, **self.ways)
            if self.given is not None:
                warnings.warn(f"sloth: {error}; the smallest plan is used", stacklevel=2)
            said = str(error)
            self.record["note"] = said if self.given else said.replace("memory_budget_bytes=", "the GPU has ")
        self._use(chosen)

    def _all_kept(self, facts: ModelFacts, shape: Shape) -> CheckpointPlan | None:
        """Without a budget, the plan that keeps everything, if it fits: no rates are measured for it."""
        if self.given is not None:
            return None
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        try:
            return plan(facts, shape, self.budget, rates_for(gpu), **KEEP_ALL)
        except BadInputError:
            return None

    def _observed(self, facts: ModelFacts) -> ModelFacts:
        """`facts` with what the layers are seen to save, if the backbone runs on ids alone.

        Not of sharded models, whose processes expect a backward after each forward, nor of compiled layers,
        which would be compiled for these lengths too.
        """
        model = self.model()
        if model is None or any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
            return facts
        try:
            refuse_sharded(model)
        except Sharded:
            return facts
        layers, norms = self.running.layers, _Norms()  # a longer batch's norms are proven by themselves
        self.left = True  # what runs now is no training forward
        try:
            seen = observe(
                watched(model),
                layers,
                [mlp_of(layer, facts) for layer in layers],
                min(facts.vocab, 1000),
                lambda tensor: norms.recipe_of(tensor) is not None,
            )
        finally:
            self.left = False
        if norms.kept:
            self.norms, self.record["note"] = (False,), OTHER_BITS
        return facts if seen is None else facts.replace(observed=seen)

    def _use(self, chosen: CheckpointPlan) -> None:
        self.plan = chosen
        if chosen.moved_bytes and not self.record["plans"]:
            self.earlier = peak_bytes(self.device)
        self.running.use(chosen)
        stays = [*filter(None, (self.running.embeddings_stay, self.running.weights_stay))]
        if stays:  # they are not asked again
            self.embeddings = (False,) if self.running.embeddings_stay else self.embeddings
            self.weights = (False,) if self.running.weights_stay else self.weights
            self._plan(chosen.shape)
            self.record["note"] = "; ".join(filter(None, (*stays, self.record.get("note"))))
            return
        self._say_why()
        self.record.update(
            {
                "chosen": str(chosen),
                "plans": self.record["plans"] + 1,
                "predicted_peak_bytes": chosen.peak_bytes,
                "predicted_step_s": chosen.step_s,
                "plan": chosen.to_dict(),
            }
        )


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _put_back(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
