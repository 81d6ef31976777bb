"""The fastest step within a budget: a pure function of a model's facts, a batch, bytes and rates.

A layer takes one of OPTIONS, which say of each tensor class whether it is kept, recomputed or offloaded:

    keep                    all is kept
    recompute_mlp           gate, up and what lies between them and the MLP's output are made again
    recompute               the layer's input is kept, all else made again
    recompute_offload       the input lies in host memory, all else is made again
    recompute_mlp_offload   as recompute_mlp, and what that keeps lies in host memory
    offload                 all lies in host memory

Beside that every layer's MLP may run in tiles of tokens and be made again in the backward, under all options:
all of gate and up is then never there, which counts for long rows and small budgets. And the outputs of norms
may be made again from the norms' inputs, which are saved beside them, for one pass over memory. And frozen
input embeddings may be in host memory, from where a step reads its tokens' rows before anything else can
start. And some layers' packed 4-bit weights may be there, and come ahead of their use, forward and backward.
Where everything is kept and there is memory left, layers keep their 4-bit weights expanded.

Layers are alike, so a plan is how many layers take which option, and where. The search leaves out counts of
which a bound says that they are slower or do not fit, so that no others are faster under this model, unless
more than MOST_FOLLOWED are left. Where:
the last layer keeps its tensors if any does, because they are freed first; those of which more than the input
is offloaded lie evenly among the others, so that each copy has several layers' time; recomputed ones come
first. Each is also tried with none of those among the last layers, so many that the last copy has left when
the forward ends, and with its copy back starting as many layers earlier as it takes (`_at_the_end`).

The model of time: matmuls and attention by their operations, elementwise passes by TRAFFIC times the saved
bytes, copies to and from the host beside all but one layer of the forward or backward. What a copy lacks in
time is added, and so is what of the first copy back is wanted first and takes longer than the backward of the
layers behind, with which it starts. That is a bound, by which plans are put in order; layers and copies of
those that may be the fastest are then followed one by one (`streams`), and the longer of both times counts.
Where the host takes longer to launch a pass than the device to run it (many tiles, a slow processor), that is
added instead if it is more. The model of memory goes through the step layer by layer: what is kept until
then, the layer's own tensors and its work space, copies under way to and from the host, gradients that are
there already. In memory that is free until the peak more copies may be under way.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sloth_plugins.checkpointing.facts import CLASSES, ModelFacts, Shape
from sloth_plugins.checkpointing.rates import Rates
from sloth_plugins.checkpointing.streams import Lanes, simulated
from sloth_plugins.specs import BadInputError

VERSION = 4
OPTIONS = ("keep", "recompute_mlp", "recompute", "recompute_offload", "recompute_mlp_offload", "offload")
MLP_CLASSES, NORM_CLASSES = ("gate_up", "hidden"), ("normed", "mlp_normed")
# Bytes that elementwise passes move over saved bytes, forward and backward, fitted to one H200 step each:
# 28 ms of the fused one (benchmarks/NOTES.md), and what plain PEFT's 465 ms leave over.
FUSED_TRAFFIC, PLAIN_TRAFFIC = (2.0, 5.0), (8.0, 16.0)
# Bytes that expanding a 4-bit weight moves: codes, scales and the 16-bit result.
EXPANDED_BYTES = 2.56
ATTENTION_BACKWARD = 3.4
# Of what comes on top of weights and optimizer, for what the allocator can't use: 2 to 5 % were measured.
MARGIN = 0.03
# What the host takes for a layer's forward and backward, in launches of a matmul: 63 and 70 ms of 32 layers
# where such a launch takes 22.5 us (an H200's host). Those of plain PEFT and of a tile of the MLP are
# estimated by the number of calls, not measured.
FUSED_LAUNCHES, PLAIN_LAUNCHES, TILE_LAUNCHES = (85, 95), (160, 160), (20, 40)
# Of how many layers the copies may be under way at once: of the largest, and of small ones.
IN_FLIGHT, MOST_IN_FLIGHT = 2, 8
# Of how many plans in one way the copies are followed one by one, those first that may be the fastest.
MOST_FOLLOWED = 4096
# Parts of the tokens that go through an MLP one after another, each with LEAST_TILE tokens or more.
TILES = (1, 2, 4, 8, 16, 32, 64)
LEAST_TILE = 512
# Of how many of the layers' 4-bit weights may be in host memory.
SHARES_OF_WEIGHTS = (0.5, 1.0)
# Up to so many layers all counts are gone through at once.
LEAST_ROUGH = 24
# Where a plan does not fit, mostly the first layers' backward says so, behind all gradients.
FEW_LAYERS = 16


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one layer costs under an option: device bytes kept; device bytes that its backward needs for a
    while beside them and beside the work space of a layer that keeps all (below zero where it needs less);
    those that its forward needs beside what it saves; host bytes; seconds."""

    name: str
    kept_bytes: int
    passing_bytes: int
    forward_bytes: int
    host_bytes: int
    recompute_s: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of a step without recomputation (a layer's forward and backward, all else) and each option's."""

    forward_s: float
    backward_s: float
    rest_s: float
    options: dict[str, Option]
    tiled_s: float
    """What a layer's MLP in tiles costs on top, under every option; else 0."""
    host_forward_s: float
    """What the host takes to launch a layer's forward; where that is more, the device waits."""
    host_backward_s: float
    host_again_s: float
    """For the forward of a layer that is run again."""


def costs(
    facts: ModelFacts,
    shape: Shape,
    rates: Rates,
    mlp_tiles: int = 1,
    norms_again: bool = False,
) -> Costs:
    """The costs of one layer and of the rest of the step."""
    t, h = shape.tokens, facts.hidden
    matmul, memory = rates.matmul_tflops * 1e12, rates.memory_tb_s * 1e12
    saved = facts.saved_bytes(shape)
    full, mlp = sum(saved.values()), facts.mlp_bytes(shape)
    boundary = t * h * facts.stream_bytes
    traffic = FUSED_TRAFFIC if facts.fused else PLAIN_TRAFFIC

    def expansion(weights: int) -> float:
        return weights * EXPANDED_BYTES / memory if facts.four_bit else 0.0

    products = 2 * t * facts.layer_weights / matmul
    causal = 2 * t * shape.seq * facts.q / (rates.attention_tflops * 1e12)
    forward = products + causal + traffic[0] * full / memory + expansion(facts.layer_weights)
    backward = products * (1 if facts.rank else 2) + causal * ATTENTION_BACKWARD + traffic[1] * full / memory
    backward += expansion(facts.layer_weights)
    of_mlp = 3 * h * facts.intermediate
    if facts.fused_mlp:  # gate and up alone are made again, of weights that the backward expands anyway
        mlp_again, more = 2 * t * (of_mlp * 2 // 3) / matmul + traffic[0] * mlp / memory, 0.0
    else:
        mlp_again = 2 * t * of_mlp / matmul + traffic[0] * mlp / memory + expansion(of_mlp)
        # Each tile expands the weights anew: forward, again in the backward, and for the gradients.
        more = (mlp_tiles - 1) * expansion(of_mlp)
    tiled, lean = 0.0, facts.lean_bytes(shape)
    if mlp_tiles > 1:  # made again under every option
        tiled, lean = mlp_again + 3 * more, 0
        full, forward = full - mlp, forward + more
    again = forward
    if facts.fused_mlp and facts.ends_with_mlp:  # gate and up wait for the gradients, down is left out
        again -= (3 if mlp_tiles > 1 else 1) * 2 * t * of_mlp / 3 / matmul + expansion(of_mlp)
        again -= traffic[0] * mlp / memory if mlp_tiles > 1 else 0.0
    if mlp_tiles > 1:
        mlp, mlp_again = 0, 0.0
    head = (4 if facts.rank else 6) * t * facts.vocab * h / matmul
    if not facts.fused_head:
        head += t * facts.vocab * 3 * 12 / memory
    optimizer = (3 * facts.gradient_bytes + 2 * facts.optimizer_state_bytes) / memory
    normed = sum(saved[name] for name in NORM_CLASSES) if norms_again else 0
    norm_s = 2 * normed / memory
    kept = full - normed
    of_layer = lean if facts.ends_with_mlp else 0
    held = facts.held_bytes(shape)
    rows = (
        ("keep", kept, 0, 0, norm_s),
        ("recompute_mlp", kept - mlp, mlp - lean, 0, mlp_again + norm_s),
        ("recompute", boundary + held, full - of_layer - (boundary if facts.fused else 0), 0, again),
        ("recompute_offload", held, full - of_layer, boundary, again),
        ("recompute_mlp_offload", 0, kept - lean, kept - mlp, mlp_again + norm_s),
        ("offload", 0, kept, kept, norm_s),
    )

    def beside(name: str) -> int:
        """What the forward needs: the MLP's, a norm's output that is not saved, and a sum of residuals."""
        mlp_kept = mlp_tiles == 1 and name in ("keep", "offload")
        whole = name in ("recompute", "recompute_offload")
        more = t * h * (facts.activation_bytes * (norms_again or whole) + facts.stream_bytes * whole)
        return facts.forward_bytes(shape, mlp_tiles, mlp_kept=mlp_kept) + more

    options = {
        name: Option(
            name=name,
            kept_bytes=kept,
            passing_bytes=passing,
            forward_bytes=beside(name),
            host_bytes=host,
            recompute_s=seconds,
        )
        for name, kept, passing, host, seconds in rows
    }
    launches = list(FUSED_LAUNCHES if facts.fused else PLAIN_LAUNCHES)
    untiled = launches[0] * rates.host_us * 1e-6
    if mlp_tiles > 1:
        launches = [n + mlp_tiles * a_tile for n, a_tile in zip(launches, TILE_LAUNCHES, strict=True)]
    host_forward, host_backward = (n * rates.host_us * 1e-6 for n in launches)
    return Costs(
        forward_s=forward,
        backward_s=backward,
        rest_s=head + optimizer,
        options=options,
        tiled_s=tiled,
        host_forward_s=host_forward,
        host_backward_s=host_backward,
        host_again_s=untiled if facts.fused_mlp and facts.ends_with_mlp else host_forward,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointPlan:
    """What each layer does with its saved tensors, and what the step should take.

    `peak_bytes` is what is allocated at most; `margin_bytes` is left free of the budget on top of it.
    `Settings(checkpointing=plan)` carries it out.
    """

    layers: tuple[str, ...]
    facts: ModelFacts
    shape: Shape
    rates: Rates
    budget_bytes: int
    peak_bytes: int
    margin_bytes: int
    host_bytes: int
    step_s: float
    recompute_s: float
    stall_s: float
    mlp_tiles: int = 1
    """Parts of the tokens that go through each MLP one after another."""
    norms_again: bool = False
    """Outputs of norms are made again from their inputs, where the layer is not recomputed as a whole."""
    embeddings_on_host: bool = False
    """The input embeddings are in host memory, and read from there."""
    lead: int = 1
    """How many layers behind the last one that is offloaded its copy back starts."""
    weights_on_host: int = 0
    """Of how many layers, evenly placed, the 4-bit weights are in host memory and come for each pass."""
    expanded: int = 0
    """Of how many layers, from the first on, the 4-bit weights stay expanded between forward and backward."""

    def __repr__(self) -> str:
        return f"<CheckpointPlan: {self}>"

    def __str__(self) -> str:
        counts = {name: self.layers.count(name) for name in OPTIONS}
        named = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        tiles = f", MLPs in {self.mlp_tiles} tiles" if self.mlp_tiles > 1 else ""
        expanded = f", weights of {self.expanded} expanded" if self.expanded else ""
        norms = ", norms again" if self.norms_again else ""
        embeddings = ", embeddings in host memory" if self.embeddings_on_host else ""
        if self.weights_on_host:
            embeddings += f", weights of {self.weights_on_host} in host memory"
        tokens = f"{self.shape.batch} x {self.shape.seq} tokens"
        return (
            f"{named} of {len(self.layers)} layers{tiles}{norms}{embeddings}{expanded} at {tokens}: "
            f"{gib(self.peak_bytes)} of {gib(self.budget_bytes)}"
        )

    def classes(self, layer: int) -> dict[str, str]:
        """keep, recompute or offload for each tensor class of a layer."""
        option = self.layers[layer]
        again = set(NORM_CLASSES if self.norms_again else ())
        if option.startswith("recompute_mlp") or self.mlp_tiles > 1:
            again.update(MLP_CLASSES)
        if option in ("keep", "recompute_mlp", "recompute_mlp_offload", "offload"):
            way = "offload" if "offload" in option else "keep"
            return {name: "recompute" if name in again else way for name in CLASSES}
        return dict.fromkeys(CLASSES, "recompute") | {"input": "offload" if "offload" in option else "keep"}

    def covers(self, shape: Shape) -> bool:
        """Whether a batch of this shape takes no more memory than the plan allows."""
        return shape.tokens <= self.shape.tokens and shape.seq <= self.shape.seq

    def apply(self, model: Any) -> Callable[[], None]:
        """Carry the plan out on a transformers model; gives the function that undoes it."""
        from sloth_plugins.checkpointing.execute import install

        return install(model, self)

    @property
    def last_offloaded(self) -> int | None:
        """The last layer of which anything is offloaded."""
        return max((i for i, name in enumerate(self.layers) if "offload" in name), default=None)

    @property
    def starts(self) -> int | None:
        """The layer with whose backward the first copy back starts."""
        last = self.last_offloaded
        return None if last is None else min(last + self.lead, len(self.layers) - 1)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Of how many layers the copies to the host may be under way when each layer's forward begins."""
        counts = self._memory.in_flight(self._codes, _tensor([self.lead]))
        return tuple(int(count) for count in counts[0])

    @property
    def _memory(self) -> _Memory:
        return _Memory(self.facts, self.shape, self.costs(), self._way)

    @property
    def _codes(self) -> Any:
        return _tensor([[OPTIONS.index(name) for name in self.layers]])

    def costs(self) -> Costs:
        """What the options cost under this plan's tiles."""
        return costs(self.facts, self.shape, self.rates, *self._way[:2])

    @property
    def expanded_bytes(self) -> int:
        """What all weights that stay expanded take."""
        return self.expanded * self.facts.expanded_bytes

    @property
    def moved_bytes(self) -> int:
        """What the device need not hold of weights that are in host memory."""
        embeddings = self.facts.movable_bytes if self.embeddings_on_host else 0
        return embeddings + self.facts.moved_weights_bytes(self.weights_on_host)

    @property
    def streamed(self) -> tuple[bool, ...]:
        """Whether each layer's 4-bit weights come from host memory."""
        return _evenly(self.weights_on_host, len(self.layers))

    @property
    def _way(self) -> _Way:
        return _Way(self.mlp_tiles, self.norms_again, self.embeddings_on_host, self.weights_on_host)

    @property
    def tile_tokens(self) -> int:
        """Tokens that go through an MLP at once."""
        return -(-self.shape.tokens // self.mlp_tiles)

    def memory(self) -> dict[str, int]:
        """The predicted peak in bytes, part by part, and the margin on top of it."""
        options = self.costs().options
        parts = {
            "weights": self.facts.weights_bytes - self.moved_bytes,
            "optimizer": self.facts.optimizer_state_bytes,
            **({"expanded weights": self.expanded_bytes} if self.expanded else {}),
            "kept activations": sum(options[name].kept_bytes for name in self.layers),
        }
        return {
            **parts,
            "head, gradients, work space, one layer's recomputation": self.peak_bytes - sum(parts.values()),
            "margin": self.margin_bytes,
        }

    def timeline(self) -> list[tuple[str, int]]:
        """(what runs, bytes on the device then): layers forward, the head, layers backward, the optimizer."""
        columns = self._memory.timeline(self._codes, _tensor([self.lead]))
        forward, head, backward, optimizer = (column[0].tolist() for column in columns)
        rows = [(f"forward {index}", size) for index, size in enumerate(forward)]
        rows.append(("head", head))
        rows += [(f"backward {index}", size) for index, size in reversed([*enumerate(backward)])]
        rows.append(("optimizer", optimizer))
        return [(name, size + self.expanded_bytes) for name, size in rows]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types; `from_dict` reads it back."""
        return {
            "version": VERSION,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "layers": list(self.layers),
            "facts": self.facts.to_dict(),
            "shape": dataclasses.asdict(self.shape),
            "rates": self.rates.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any, where: str = "a checkpointing plan") -> CheckpointPlan:
        """The plan that `to_dict` wrote; BadInputError, naming `where`, for anything else."""
        try:
            fields = dict(values)
            if fields.pop("version") != VERSION:
                raise BadInputError(f"{where} has version {values['version']!r}: allowed is {VERSION}")
            fields["facts"] = ModelFacts.from_dict(fields["facts"])
            fields["shape"], fields["rates"] = Shape(**fields["shape"]), Rates(**fields["rates"])
            fields["layers"] = tuple(fields["layers"])
            made = cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, BadInputError):
                raise
            raise BadInputError(
                f"{where} is no checkpointing plan ({type(error).__name__}: {error})"
            ) from error
        unknown = [name for name in made.layers if name not in OPTIONS]
        for name, least in (("expanded", 0), ("lead", 1), ("weights_on_host", 0)):
            count = getattr(made, name)
            whole = isinstance(count, int) and not isinstance(count, bool)
            if not whole or not least <= count <= made.facts.layers:
                raise BadInputError(
                    f"{where}: {name}={count!r}: allowed is {least} to {made.facts.layers}, its layers"
                )
        if not isinstance(made.embeddings_on_host, bool):
            raise BadInputError(
                f"{where}: embeddings_on_host={made.embeddings_on_host!r}: allowed are true and false"
            )
        if unknown or len(made.layers) != made.facts.layers:
            raise BadInputError(
                f"{where}: allowed is one of {', '.join(OPTIONS)} for each of {made.facts.layers} layers"
            )
        return made

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> CheckpointPlan:
        """Read what `save` wrote; BadInputError for a file that is none."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise BadInputError(f"{str(path)!r} is no checkpointing plan ({error})") from error
        return cls.from_dict(values, repr(str(path)))


def fixed_bytes(facts: ModelFacts, embeddings_on_host: bool = False, weights_on_host: int = 0) -> int:
    """What is on the device all the time: weights, optimizer state, and gradients that accumulate.

    weights_on_host: of so many layers the 4-bit weights are not.
    """
    gradients = facts.gradient_bytes if facts.accumulates else 0
    moved = facts.movable_bytes if embeddings_on_host else 0
    moved += facts.moved_weights_bytes(weights_on_host)
    return facts.weights_bytes - moved + facts.optimizer_state_bytes + gradients


def plan(
    facts: ModelFacts,
    shape: Shape,
    budget_bytes: int,
    rates: Rates,
    *,
    host_bytes: int | None = None,
    allow: Sequence[str] = OPTIONS,
    tiles: Sequence[int] = TILES,
    norms: Sequence[bool] = (False, True),
    embeddings: Sequence[bool] = (False, True),
    weights: Sequence[bool] = (False, True),
    expanded: float = 1.0,
) -> CheckpointPlan:
    """The plan with the shortest predicted step whose peak and margin fit into `budget_bytes`.

    `host_bytes`: pinned host memory that may be used; None: any. `allow`: the options to choose from; one of
    them must be "keep". `tiles`: the numbers of MLP tiles to choose from, 1 among them. `norms`: whether
    norms' outputs may be made again, False among them; `embeddings` and `weights`: whether the input
    embeddings and the layers' 4-bit weights may be in host memory, likewise. `expanded`: the share of what is
    left of the budget that expanded weights may take.
    Raises BadInputError, with the smallest budget that fits, where none does.
    """
    searches = [
        (_Search(facts, shape, rates, host_bytes, way), _chosen(allow, way.mlp_tiles))
        for way in _ways(facts, _tiles(shape, tiles), norms, embeddings, weights)
    ]
    rough: CheckpointPlan | None = None  # of some counts: what is slower needs no closer look
    for search, names in searches if facts.layers > LEAST_ROUGH else ():
        rough = search.fastest(budget_bytes, names, rough, None, few=True) or rough
    best: CheckpointPlan | None = None
    for search, names in searches:
        best = search.fastest(budget_bytes, names, best, rough) or best
    best = best or rough  # of more plans than are followed, none that is as fast may have been among these
    if best is not None:
        return _with_expanded(best, expanded)
    smallest = _smallest(facts, shape, rates, host_bytes, allow, tiles, norms, embeddings, weights)
    need = smallest.peak_bytes + smallest.margin_bytes
    parts = {
        "weights": facts.weights_bytes - smallest.moved_bytes,
        "the optimizer's state": facts.optimizer_state_bytes,
        "activations and work space": smallest.peak_bytes + smallest.moved_bytes - fixed_bytes(facts),
    }
    driver = max(parts, key=lambda name: parts[name])
    raise BadInputError(
        f"memory_budget_bytes={gib(budget_bytes)}: {shape.batch} x {shape.seq} tokens need at least "
        f"{-(-need // 2**20)} MiB ({gib(need)}), of which {driver} take {gib(parts[driver])}"
    )


def _with_expanded(made: CheckpointPlan, share: float) -> CheckpointPlan:
    """`made` with weights that stay expanded in a share of what it leaves free, if it keeps all else."""
    facts, rates = made.facts, made.rates
    each = facts.expanded_bytes
    all_kept = set(made.layers) == {"keep"} and not made.norms_again
    if not each or not all_kept or made.mlp_tiles > 1 or made.weights_on_host:
        return made
    spare = share * (made.budget_bytes - made.peak_bytes - made.margin_bytes)
    count = max(0, min(facts.layers, int(spare / (each * (1 + MARGIN)))))
    weights = sum(n * k for n, k, _ in facts.expanded_groups)
    saved_s = 2 * count * weights * EXPANDED_BYTES / (rates.memory_tb_s * 1e12)
    return dataclasses.replace(
        made,
        expanded=count,
        peak_bytes=made.peak_bytes + count * each,
        margin_bytes=made.margin_bytes + int(count * each * MARGIN),
        step_s=made.step_s - saved_s,
    )


def smallest_budget_bytes(
    facts: ModelFacts,
    shape: Shape,
    rates: Rates,
    *,
    host_bytes: int | None = None,
    allow: Sequence[str] = OPTIONS,
    tiles: Sequence[int] = TILES,
    norms: Sequence[bool] = (False, True),
    embeddings: Sequence[bool] = (False, True),
    weights: Sequence[bool] = (False, True),
) -> int:
    """The smallest budget for which `plan` finds a plan."""
    least = _smallest(facts, shape, rates, host_bytes, allow, tiles, norms, embeddings, weights)
    return least.peak_bytes + least.margin_bytes


def _tiles(shape: Shape, tiles: Sequence[int]) -> list[int]:
    if 1 not in tiles or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in tiles):
        raise BadInputError(f"tiles={tuple(tiles)!r}: allowed are 1 and other whole numbers above it")
    return [count for count in sorted(set(tiles)) if count == 1 or shape.tokens >= count * LEAST_TILE]


class _Way(NamedTuple):
    """What all layers have in common, where the input embeddings are, and of how many layers the weights are
    there, too."""

    mlp_tiles: int
    norms_again: bool
    embeddings_on_host: bool
    weights_on_host: int


def _ways(
    facts: ModelFacts,
    tiles: Sequence[int],
    norms: Sequence[bool],
    embeddings: Sequence[bool],
    weights: Sequence[bool],
) -> list[_Way]:
    """All of them; first those with the most on the device, which win where others are no faster."""
    for name, given in (("norms", norms), ("embeddings", embeddings), ("weights", weights)):
        if False not in given:
            raise BadInputError(f"{name}={tuple(given)!r}: allowed are False, and True beside it")
    # Elsewhere torch's checkpointing of an MLP holds its input.
    of_norms = sorted(set(norms)) if facts.fused_mlp else [False]
    of_embeddings = sorted(set(embeddings)) if facts.movable_bytes else [False]
    counts = {0}
    if True in weights and facts.layer_movable_bytes:
        counts |= {round(share * facts.layers) for share in SHARES_OF_WEIGHTS}
    of_weights = sorted(count for count in counts if not count or facts.moved_weights_bytes(count))
    return [
        _Way(count, of_norm, on_host, of_weight)
        for of_weight in of_weights
        for on_host in of_embeddings
        for count in tiles
        for of_norm in of_norms
    ]


def _evenly(count: int, layers: int) -> tuple[bool, ...]:
    """`count` of the layers."""
    return tuple((i + 1) * count // layers > i * count // layers for i in range(layers))


def _tensor(values: Any) -> Any:
    import torch

    return torch.tensor(values)


def _in_flight(host: Any, room: Any = None) -> tuple[Any, Any]:
    """(of how many layers the copies to the host may be under way when each begins; how many bytes these
    are). host: (plans, layers), what each layer copies; room: (plans, layers), bytes that are free then.

    With its own they are at most those of IN_FLIGHT of the largest layers, so that a large one has the time
    of several small ones, or what there is room for. Once no layer is offloaded any more, as many as there
    are layers behind it.
    """
    import torch

    end = host.shape[1] - 1
    at = torch.arange(end + 1)
    newest = torch.where(host > 0, at, -1).cummax(1).values
    before = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], 1)
    last = torch.where(newest[:, -1:] < 0, end, newest[:, -1:].clamp(max=end - 1))
    most = torch.where(at <= last, MOST_IN_FLIGHT, (end - at).clamp(max=MOST_IN_FLIGHT))
    few = IN_FLIGHT * host.amax(1, keepdim=True) - host
    room = few if room is None else few.maximum(room)
    count, size, index = torch.zeros_like(host), torch.zeros_like(host), before
    for _ in range(MOST_IN_FLIGHT):
        more = torch.where(index < 0, 0, host.gather(1, index.clamp(min=0)))
        fits = (index >= 0) & (count < most) & (size + more <= room)
        if not fits.any():
            break
        count, size = count + fits.long(), size + more * fits
        index = torch.where(fits, before.gather(1, index.clamp(min=0)), -1)
    return count, size


class _Memory:
    """What is on the device when, of many plans at once."""

    def __init__(self, facts: ModelFacts, shape: Shape, cost: Costs, way: _Way) -> None:
        options = [cost.options[name] for name in OPTIONS]
        self.kept = _tensor([option.kept_bytes for option in options])
        self.passing = _tensor([option.passing_bytes for option in options])
        self.host = _tensor([option.host_bytes for option in options])
        self.fixed = fixed_bytes(facts, way.embeddings_on_host, way.weights_on_host)
        self.shared, self.ends = facts.shared_bytes(shape), facts.ends_bytes(shape)
        # A model's own forward holds its embeddings until its end.
        embedded = shape.tokens * facts.hidden * facts.stream_bytes
        self.forward = embedded + _tensor([option.forward_bytes for option in options])
        self.work = facts.workspace_bytes(shape, *way[:2])
        if not facts.fused_mlp:  # the last norm's tensors are gone then, but as much more was measured
            self.work += self.ends
        self.head = self.ends + facts.head_bytes(shape)
        self.layers = facts.layers
        self.gradients = 0 if facts.accumulates else facts.gradient_bytes
        self.a_gradient = self.gradients // facts.layers

    def timeline(self, codes: Any, lead: Any) -> tuple[Any, Any, Any, Any]:
        """(forward of each layer with all copies that may be under way, head, backward of each layer,
        optimizer); codes: (plans, layers), where in OPTIONS each layer's is; lead: (plans,), see
        CheckpointPlan."""
        alone, copies, *others = self._rows(codes, lead)
        peak = self._most(alone + copies, *others)
        return alone + self.in_room(codes, peak, alone)[1], *others

    def _rows(self, codes: Any, lead: Any) -> tuple[Any, Any, Any, Any, Any]:
        """As `timeline`, with each layer's forward in two parts: alone, and the least copies under way beside
        it. Of the first layers alone, nothing is more than with all of them."""
        import torch

        kept, passing, host = self.kept[codes], self.passing[codes], self.host[codes]
        at = torch.arange(codes.shape[1])
        base = self.fixed + self.shared
        held = base + kept.cumsum(1) - kept
        newest = torch.where(host > 0, at, -1).cummax(1).values
        before = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], 1)
        alone = held + kept + host + self.forward[codes]
        head = base + kept.sum(1) + self.head
        coming = torch.where(before < 0, 0, host.gather(1, before.clamp(min=0)))
        coming = coming * (at <= newest[:, -1:] + lead.unsqueeze(1))
        done = (self.layers - 1 - at) * self.a_gradient
        backward = held + kept + passing + self.work + coming + done
        return alone, _in_flight(host)[1], head, backward, torch.full_like(head, base + self.gradients)

    def in_flight(self, codes: Any, lead: Any) -> Any:
        """Of how many layers the copies may be under way when each begins, also in memory that is free until
        the peak."""
        return self.in_room(codes, *self.peak_and_alone(codes, lead))[0]

    def in_room(self, codes: Any, peak: Any, alone: Any) -> tuple[Any, Any]:
        """(`in_flight`, how many bytes these are), of what `peak_and_alone` gives."""
        return _in_flight(self.host[codes], peak.unsqueeze(1) - alone)

    def peak_and_alone(self, codes: Any, lead: Any) -> tuple[Any, Any]:
        """(the most of the timeline, of each plan; what each layer's forward takes without other copies)."""
        alone, copies, *others = self._rows(codes, lead)
        return self._most(alone + copies, *others), alone

    @staticmethod
    def _most(forward: Any, head: Any, backward: Any, optimizer: Any) -> Any:
        return forward.amax(1).maximum(backward.amax(1)).maximum(head).maximum(optimizer)

    def peak(self, codes: Any, lead: Any) -> Any:
        """The most of the timeline, of each plan."""
        return self.peak_and_alone(codes, lead)[0]

    def margin(self, peak: Any) -> Any:
        """What is left free on top of it."""
        return ((peak - self.fixed).double() * MARGIN).ceil().long()


class _Counts(NamedTuple):
    """Of how many layers' MLPs are made again, alone (a tensor each, of all plans in question); how many
    layers are run again as a whole; how many are offloaded as a whole; and of how many of the first and
    second kind what is left is offloaded as well. Behind the last one of which all or more than the input is
    offloaded at least `gap` layers follow, and its copy back starts `lead` layers behind it."""

    mlps: Any
    wholes: Any
    offloaded: Any
    mlps_away: Any
    inputs: Any
    gap: Any
    lead: Any

    def copied(self, host: Any) -> Any:
        """Bytes that go to the host; host: of each of OPTIONS."""
        return self.offloaded * host[5] + self.mlps_away * host[4] + self.inputs * host[3]

    def at(self, index: Any) -> _Counts:
        """Of some of the plans."""
        return _Counts(*(column[index] for column in self))

    def placed(self, layers: int, first: int | None = None) -> Any:
        """(plans, layers): where in OPTIONS each layer's is; first: of so many layers alone."""
        import torch

        mlps, wholes, offloaded, mlps_away, inputs, gap, _ = (column.unsqueeze(1) for column in self)
        away, at, among = offloaded + mlps_away, torch.arange(first or layers), layers - gap
        before = (-(-at * away // among)).minimum(away)
        until = (-(-(at + 1) * away // among)).minimum(away)
        # Of those that are offloaded evenly, the smaller ones evenly among the others, from the first on.
        count = away.clamp(min=1)
        smaller = -(-(before + 1) * mlps_away // count) > -(-before * mlps_away // count)
        rank = at - before
        wholes_here, mlps_here = wholes, wholes + mlps - mlps_away
        codes = torch.where(rank < inputs, 3, torch.where(rank < wholes_here, 2, (rank < mlps_here).long()))
        return torch.where(until > before, torch.where(smaller, 4, 5), codes)


def _chosen(allow: Sequence[str], mlp_tiles: int) -> set[str]:
    unknown = [name for name in allow if name not in OPTIONS]
    if unknown or "keep" not in allow:
        raise BadInputError(f"allow={tuple(allow)!r}: allowed are 'keep' and any of {', '.join(OPTIONS[1:])}")
    of_mlps = ("recompute_mlp", "recompute_mlp_offload") if mlp_tiles > 1 else ()
    return {name for name in allow if name not in of_mlps}


def _smallest(
    facts: ModelFacts,
    shape: Shape,
    rates: Rates,
    host_limit: int | None,
    allow: Sequence[str],
    tiles: Sequence[int],
    norms: Sequence[bool],
    embeddings: Sequence[bool],
    weights: Sequence[bool],
) -> CheckpointPlan:
    """The plan that needs the least memory, of those with at most two options beside "keep": smaller tiles
    never need more, weights on the host less."""
    import torch

    ways = _ways(facts, sorted({1, _tiles(shape, tiles)[-1]}), norms, embeddings, weights)
    if host_limit is None:
        ways = [way for way in ways if way[2:] == ways[-1][2:]]
    best: CheckpointPlan | None = None
    for way in ways:
        search = _Search(facts, shape, rates, host_limit, way)
        names = sorted(_chosen(allow, way.mlp_tiles) - {"keep"}, key=OPTIONS.index)
        pairs = [*itertools.combinations(names, 2)] or [(names[0], names[0])] if names else []
        one, two = torch.cartesian_prod(*[torch.arange(facts.layers + 1)] * 2).unbind(1)
        inside = one + two <= facts.layers
        one, two = one[inside], two[inside]
        found = [dict.fromkeys(OPTIONS, torch.zeros(1, dtype=torch.long))]
        found += [
            {**dict.fromkeys(OPTIONS, torch.zeros_like(one)), second: two, first: one}
            for first, second in pairs
        ]
        counts = [
            _Counts(
                n["recompute_mlp"] + n["recompute_mlp_offload"],
                n["recompute"] + n["recompute_offload"],
                n["offload"],
                n["recompute_mlp_offload"],
                n["recompute_offload"],
                torch.zeros_like(n["keep"]),
                torch.ones_like(n["keep"]),
            )
            for n in found
        ]
        made = search.smallest(_Counts(*map(torch.cat, zip(*counts, strict=True))), best)
        best = made or best
    assert best is not None
    return best


@functools.lru_cache(maxsize=8)
def _triples(layers: int, may: tuple[bool, bool, bool], few: bool) -> tuple[Any, ...]:
    """All numbers of layers of three kinds, of which the last leaves one over; may: or else it is 0. few: not
    all numbers."""
    import torch

    ends = min(4, layers)
    numbers = [*range(ends), *range(ends, layers, max(1, layers // 16)), *range(layers - ends, layers + 1)]
    some = torch.tensor(sorted(set(numbers))) if few else torch.arange(layers + 1)
    grid = [some if one_may else some[:1] for one_may in may]
    found = torch.cartesian_prod(*grid)
    found = found[(found.sum(1) <= layers) & (found[:, 2] < layers)]
    return tuple(column.contiguous() for column in found.unbind(1))


class _Search:
    """Of all counts of layers for each option, in one way."""

    def __init__(
        self, facts: ModelFacts, shape: Shape, rates: Rates, host_limit: int | None, way: _Way
    ) -> None:
        self.facts, self.shape, self.rates, self.way = facts, shape, rates, way
        self.cost = costs(facts, shape, rates, *way[:2])
        self.memory = _Memory(facts, shape, self.cost, way)
        self.layers = facts.layers
        moved = facts.movable_bytes if way.embeddings_on_host else 0
        self.moved = moved + way.weights_on_host * facts.layer_movable_bytes
        self.host_limit = None if host_limit is None else host_limit - self.moved
        self.to_host, self.from_host = rates.to_host_gb_s * 1e9, rates.from_host_gb_s * 1e9
        self.read_s = facts.embedding_read_bytes(shape) / self.from_host if moved else 0.0
        # Of a pass's weights, what is not there from the pass before.
        self.weights_s = facts.moved_weights_bytes(way.weights_on_host) / self.from_host
        self.followed = 0
        """How many plans' copies the search at hand has followed one by one."""

    def again_s(self, mlps: Any, wholes: Any) -> Any:
        """Seconds of what is made again."""
        keep, mlp, whole = (self.cost.options[name].recompute_s for name in OPTIONS[:3])
        kept = (self.layers - mlps - wholes).double()
        return self.layers * self.cost.tiled_s + kept * keep + mlps.double() * mlp + wholes.double() * whole

    def times(self, again: Any, wholes: Any, copied: Any, first: Any) -> tuple[Any, Any]:
        """(seconds of the step beyond what any plan takes, seconds of waiting among them). first: seconds
        that the first copy back takes longer than what it runs beside."""
        cost, n = self.cost, self.layers
        beside = (n - 1) / n
        back_s = copied.double() / self.from_host + self.weights_s
        late = (copied.double() / self.to_host - n * cost.forward_s * beside).clamp(min=0)
        stall = (
            late.clamp(min=self.weights_s - n * cost.forward_s)
            + (back_s - (n * cost.backward_s + again) * beside).clamp(min=0)
            + first
            + self.read_s
        )
        launches = n * cost.host_backward_s + wholes.double() * cost.host_again_s
        waits = max(0.0, n * (cost.host_forward_s - cost.forward_s))
        # Copies, the read of embeddings among them, and the host's launches go on beside each other.
        stall = stall.maximum(waits + (launches - n * cost.backward_s - again).clamp(min=0))
        return ((again + stall) * 1e12).round() / 1e12, stall  # equal ones are equal in the last bits, too

    def of(self, counts: _Counts) -> tuple[Any, Any, Any, Any]:
        """(seconds, seconds of waiting, of them and of copies that nobody waits for, bytes copied)."""
        import torch

        host, again = self.memory.host, self.again_s(counts.mlps, counts.wholes)
        copied = counts.copied(host)
        wanted = host.double() * self.lanes.first / self.from_host
        first = torch.where(counts.inputs > 0, wanted[3], 0.0)
        first = torch.where(counts.mlps_away > 0, wanted[4], first)
        first = torch.where(counts.offloaded > 0, wanted[5], first)
        behind = counts.lead.double() * (self.cost.backward_s + self.cost.tiled_s)
        first = (first - (counts.inputs < self.layers).double() * behind).clamp(min=0)
        seconds, stall = self.times(again, counts.wholes, copied, first)
        work = again + copied.double() / self.to_host + self.read_s + self.weights_s
        return seconds, stall, work, copied

    @functools.cached_property
    def lanes(self) -> Lanes:
        """What a step's streams do under the options."""
        import torch

        cost = self.cost
        host = self.memory.host.double()
        # What was saved last comes back first: of a whole layer, gate and up.
        whole = (host[5] - host[4]) / host[5].clamp(min=1)
        return Lanes(
            forward_s=cost.forward_s,
            backward_s=cost.backward_s + cost.tiled_s,
            between_s=cost.rest_s,
            to_host=self.to_host,
            from_host=self.from_host,
            host=host,
            first=torch.cat([torch.ones(5, dtype=torch.float64), whole.unsqueeze(0)]),
            again_s=torch.tensor([cost.options[name].recompute_s for name in OPTIONS], dtype=torch.float64),
            weights=_evenly(self.way.weights_on_host, self.layers),
            weight_bytes=self.facts.layer_movable_bytes,
        )

    def exactly(self, bound: Any, codes: Any, lead: Any, in_flight: Any) -> Any:
        """Seconds beyond what any plan takes, layers and copies being followed one by one. bound: what `of`
        says, which knows sums alone; in_flight: see `_Memory`."""
        cost, n = self.cost, self.layers
        seconds = simulated(self.lanes, codes, in_flight, lead) + self.read_s
        seconds = seconds - n * (cost.forward_s + cost.backward_s) - cost.rest_s
        return bound.maximum((seconds * 1e12).round() / 1e12)

    def possible(self, counts: _Counts) -> Any:
        """Whether the last layer is none of those that are offloaded evenly, and host memory suffices."""
        away = counts.offloaded + counts.mlps_away
        found = away <= self.layers - counts.gap.clamp(min=1)
        found &= (counts.gap == 0) | (away > 0)
        if self.host_limit is not None:
            found &= counts.copied(self.memory.host) <= self.host_limit
        return found

    def least(self, kept: Any, mlps: Any, wholes: Any, offloaded: Any, mlps_away: Any, most_away: Any) -> Any:
        """A bound of what is allocated on top of all that is fixed. kept: bytes of all layers; mlps_away: at
        least so many and, most_away, at most."""
        memory, n = self.memory, self.layers
        own = memory.kept + memory.passing
        last = kept + memory.work + min(0, int(memory.passing[:3].min()))
        found = last.maximum(kept + memory.head)
        if n == 1:
            return found + memory.shared
        # The second layer is there when the first one's tensors come, behind nearly all gradients.
        away = offloaded + mlps_away > 0
        first = (most_away > 0) * memory.host[4] + (most_away == 0) * memory.host[5]
        second = int(own.min()) + memory.work + (n - 2) * memory.a_gradient + first
        found = found.maximum(away * second)
        # So is the first of those that are offloaded as a whole and have another one before them: in `placed`
        # it is the one behind as many smaller ones as there are for each of its kind.
        count = offloaded.clamp(min=1)
        behind = (-(-most_away // count)).clamp(min=1)
        at = (behind * n // count).clamp(max=n - 1)
        before = memory.host[5] * (mlps == 0) + memory.host[4] * (mlps > 0)
        before = before * (wholes == 0) + memory.host[3] * (wholes > 0)
        several = offloaded + mlps_away > 1
        large = own[5] + memory.work + several * (before + (n - 1 - at) * memory.a_gradient)
        return found.maximum((offloaded > 0) * large) + memory.shared

    def fits(self, budget: int) -> int:
        """The most that may be allocated on top of all that is fixed."""
        return int((budget - self.memory.fixed) / (1 + MARGIN)) + 1

    def smallest(self, counts: _Counts, at_most: CheckpointPlan | None) -> CheckpointPlan | None:
        """The plan that needs the least memory of these, if it needs less than `at_most`."""
        counts = counts.at(self.possible(counts))
        memory = self.memory
        kept = (self.layers - counts.mlps - counts.wholes - counts.offloaded) * memory.kept[0]
        kept += (counts.mlps - counts.mlps_away) * memory.kept[1]
        kept += (counts.wholes - counts.inputs) * memory.kept[2]
        bound = memory.fixed + self.least(kept, *counts[:4], counts.mlps_away)
        bound, order = bound.sort(stable=True)
        counts = counts.at(order)
        best = None if at_most is None else at_most.peak_bytes + at_most.margin_bytes
        found = None
        for start in range(0, len(bound), 256):
            if best is not None and int(bound[start]) >= best:
                break
            some = counts.at(slice(start, start + 256))
            peak = memory.peak(some.placed(self.layers), some.lead)
            need = peak + memory.margin(peak)
            at = int(need.argmin())
            if best is None or int(need[at]) < best:
                best, found = int(need[at]), some.at(slice(at, at + 1))
        return None if found is None else self.made(found, None)

    def fastest(
        self,
        budget: int,
        allow: set[str],
        before: CheckpointPlan | None,
        known: CheckpointPlan | None,
        *,
        few: bool = False,
    ) -> CheckpointPlan | None:
        """The plan that takes the least time within the budget, of equal ones that which does least; None
        where none is faster than `before` and as fast as `known`. few: of some counts."""
        import torch

        self.followed = 0
        memory, n, inf = self.memory, self.layers, float("inf")
        slowest = min(
            inf if before is None else round(before.recompute_s + before.stall_s, 12),
            inf if known is None else known.recompute_s + known.stall_s + 1e-11,
        )
        if n * self.cost.tiled_s + self.read_s >= slowest:
            return None
        limit = self.fits(budget)
        may = tuple(not allow.isdisjoint(names) for names in (OPTIONS[1:5:3], OPTIONS[2:4], OPTIONS[5:]))
        mlps, wholes, offloaded = _triples(n, (may[0], may[1], may[2]), few)
        again = self.again_s(mlps, wholes)
        left = again + self.read_s < slowest
        mlps, wholes, offloaded, again = (x[left] for x in (mlps, wholes, offloaded, again))
        # Each byte that leaves is one that is not kept: so many must, and no more can.
        host = memory.host
        whole = (n - mlps - wholes) * memory.kept[0] + mlps * memory.kept[1] + wholes * memory.kept[2]
        none = torch.zeros_like(whole)
        must = whole + self.least(none, mlps, wholes, none, none, none) - limit
        least = must.maximum(offloaded * host[5]).clamp(min=0)
        most = offloaded * host[5] + mlps * host[4] + wholes * host[3]
        smaller = (must > wholes * host[3] + offloaded * host[5]).long()  # one of them, at least
        left = (least <= most) & (self.least(none, mlps, wholes, offloaded, smaller, mlps) <= limit)
        seconds, _ = self.times(again, wholes, least, torch.zeros_like(again))
        work = again + least.double() / self.to_host + self.read_s + self.weights_s
        left &= seconds < slowest
        columns = [x[left] for x in (mlps, wholes, offloaded, must, seconds, work)]
        order = columns[5].argsort(stable=True)
        order = order[columns[4][order].argsort(stable=True)]
        mlps, wholes, offloaded, must, seconds, work = (x[order] for x in columns)
        best, found, start, size = (slowest, -inf), None, 0, 16
        while (
            start < len(order)
            and self.followed < MOST_FOLLOWED
            and (float(seconds[start]), float(work[start])) < best
        ):
            part = slice(start, start + size)
            start, size = start + size, min(4 * size, 1024)
            counts = self._with_parts_away(allow, mlps[part], wholes[part], offloaded[part], must[part])
            some = counts.offloaded + counts.mlps_away
            bound = self.least(torch.zeros_like(some), *counts[:4], counts.mlps_away)
            made = self._fastest_that_fits(counts.at(bound <= limit), budget, best)
            if made is not None:
                best, found = made
        return None if found is None else self.made(found, budget)

    def _with_parts_away(self, allow: set[str], mlps: Any, wholes: Any, offloaded: Any, must: Any) -> _Counts:
        """All counts of parts that leave, of each combination of the others: `must` bytes or more."""
        import torch

        def spread(columns: list[Any], least: Any, most: Any) -> tuple[list[Any], Any]:
            number = (most - least + 1).clamp(min=0)
            index = torch.repeat_interleave(torch.arange(len(number)), number)
            begins = number.cumsum(0) - number
            return [column[index] for column in columns], torch.arange(len(index)) - (begins - least)[index]

        host = self.memory.host
        low = torch.zeros_like(mlps) if "recompute_mlp" in allow else mlps
        high = mlps if "recompute_mlp_offload" in allow else torch.zeros_like(mlps)
        columns, mlps_away = spread([mlps, wholes, offloaded, must], low, high)
        columns.append(mlps_away)
        mlps, wholes, offloaded, must, mlps_away = columns
        wanted = -(-(must - offloaded * host[5] - mlps_away * host[4]) // host[3])
        low = wanted.clamp(min=0) if "recompute" in allow else wanted.maximum(wholes)
        high = wholes if "recompute_offload" in allow else torch.zeros_like(wholes)
        (mlps, wholes, offloaded, _, mlps_away), inputs = spread(columns, low, high)
        none = torch.zeros_like(inputs)
        return _Counts(mlps, wholes, offloaded, mlps_away, inputs, none, none + 1)

    def _at_the_end(self, counts: _Counts) -> _Counts:
        """Each of these, and with more time for what is offloaded last: to leave before the forward is over,
        and to come back before it is wanted."""
        import torch

        cost, kinds = self.cost, self.memory.host[[3, 4, 5]].double()
        out = (kinds / self.to_host / cost.forward_s).ceil().long()
        back = (kinds * self.lanes.first[3:] / self.from_host / self.lanes.backward_s).ceil().long()
        most = max(1, self.layers // 8)
        kind = torch.where(counts.offloaded > 0, 2, (counts.mlps_away > 0).long())
        gap, lead = out.clamp(max=most)[kind], back.clamp(1, most)[kind]
        both = zip(counts, counts._replace(gap=gap, lead=lead), strict=True)
        return _Counts(*(torch.stack(columns, 1).flatten() for columns in both))

    def _fastest_that_fits(
        self, counts: _Counts, budget: int, best: tuple[float, float]
    ) -> tuple[tuple[float, float], _Counts] | None:
        """The fastest of these within the budget, with (seconds, seconds with copies), if that is below
        `best`."""
        import torch

        counts = self._at_the_end(counts)
        bound, _, work, _ = self.of(counts)
        left = self.possible(counts) & ((bound < best[0]) | ((bound == best[0]) & (work < best[1])))
        counts, bound, work = counts.at(left), bound[left], work[left]
        order = work.argsort(stable=True)
        order = order[bound[order].argsort(stable=True)]
        start, size, found = 0, 32, None

        def fit(peak: Any) -> Any:
            return peak + self.memory.margin(peak) <= budget

        while start < len(order) and self.followed < MOST_FOLLOWED:
            part = order[start : start + size]
            if (float(bound[part[0]]), float(work[part[0]])) >= best:
                break
            start, size = start + size, min(4 * size, 2048)
            if self.layers > 4 * FEW_LAYERS:
                first = counts.at(part).placed(self.layers, FEW_LAYERS)
                part = part[fit(self.memory.peak(first, counts.lead[part]))]
            codes = counts.at(part).placed(self.layers)
            peak, alone = self.memory.peak_and_alone(codes, counts.lead[part])
            fits = fit(peak)
            if not fits.any():
                continue
            part, codes = part[fits], codes[fits]
            self.followed += len(part)
            in_flight, _ = self.memory.in_room(codes, peak[fits], alone[fits])
            seconds = self.exactly(bound[part], codes, counts.lead[part], in_flight)
            at = int(torch.where(seconds == seconds.min(), work[part], torch.inf).argmin())
            key = float(seconds[at]), float(work[part[at]])
            if key < best:
                best, found = key, counts.at(part[at : at + 1])
        return None if found is None else (best, found)

    def made(self, counts: _Counts, budget: int | None) -> CheckpointPlan:
        """The one plan of `counts`; budget: None for what it needs."""
        codes = counts.placed(self.layers)
        peak = self.memory.peak(codes, counts.lead)
        margin = self.memory.margin(peak)
        bound, _, _, copied = self.of(counts)
        again_s = float(self.again_s(counts.mlps, counts.wholes))
        in_flight = self.memory.in_flight(codes, counts.lead)
        stall_s = max(0.0, float(self.exactly(bound, codes, counts.lead, in_flight)) - again_s)
        cost = self.cost
        return CheckpointPlan(
            layers=tuple(OPTIONS[code] for code in codes[0].tolist()),
            facts=self.facts,
            shape=self.shape,
            rates=self.rates,
            budget_bytes=int(peak + margin) if budget is None else budget,
            peak_bytes=int(peak),
            margin_bytes=int(margin),
            host_bytes=int(copied) + self.moved,
            step_s=self.layers * (cost.forward_s + cost.backward_s) + cost.rest_s + again_s + stall_s,
            recompute_s=again_s,
            stall_s=stall_s,
            lead=int(counts.lead),
            **self.way._asdict(),
        )


def gib(size: int) -> str:
    """`size` bytes as text, such as 12.34 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
