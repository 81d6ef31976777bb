"""The fastest step within a budget: a pure function of a model's facts, a batch, bytes and rates.

A layer takes one of OPTIONS, which say of each tensor class whether it is kept, recomputed or offloaded:

    keep               all is kept
    recompute_mlp      gate, up and what lies between them and the MLP's output are made again
    recompute          the layer's input is kept, all else made again
    recompute_offload  the input lies in host memory, all else is made again
    offload            all lies in host memory

Beside that every layer's MLP may be made again in the backward, under all options, in one piece or in tiles
of tokens: all of gate and up is then never there, which counts for long rows and small budgets. And the
outputs of norms may be made again from the norms' inputs, which are saved beside them, for one pass over
memory. And frozen input embeddings may be in host memory, from where a step reads its tokens' rows before
anything else can start. Where everything is kept and there is memory left, layers keep their 4-bit weights
expanded.

Layers are alike, so a plan is how many layers take which option, and where. All counts are gone through, so
that no others are faster under this model. (Of how many recomputed layers the input is offloaded, from two
on: each needs less memory and no less time, so the fewest that fit are found by bisection.) Where: the last
layer keeps its tensors if any does, because they are freed first; offloaded layers lie evenly among the
others, so that each copy has several layers' time; recomputed ones come first.

The model of time: matmuls and attention by their operations, elementwise passes by TRAFFIC times the saved
bytes, copies to and from the host beside all but one layer of the forward or backward. What a copy lacks in
time is added, and so is what the first copy back takes longer than the backward of the layer behind it, with
which it starts. Where the host takes longer to launch a pass than the device to run it (many tiles, a slow
processor), that is added instead if it is more. The model of memory counts two offloaded layers under way and
one layer being recomputed, less what the backward has freed before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sloth_plugins.checkpointing.facts import CLASSES, ModelFacts, Shape
from sloth_plugins.checkpointing.rates import Rates
from sloth_plugins.specs import BadInputError

VERSION = 2
OPTIONS = ("keep", "recompute_mlp", "recompute", "recompute_offload", "offload")
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
IN_FLIGHT = 2
# Parts of the tokens that go through an MLP one after another, each with LEAST_TILE tokens or more.
TILES = (1, 2, 4, 8, 16, 32, 64)
LEAST_TILE = 512


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one layer costs under an option: device bytes kept and made again for a while, host bytes."""

    name: str
    kept_bytes: int
    passing_bytes: int
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
    """What a layer's MLP that is made again costs on top, under every option; else 0."""
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
    mlps_again: bool = False,
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
    mlps_again = mlps_again or mlp_tiles > 1
    tiled = mlp_again + 3 * more if mlps_again else 0.0
    if mlps_again:
        full, forward = full - mlp, forward + more
    again = forward
    if facts.fused_mlp and facts.ends_with_mlp:  # down alone; with tiles, gate and up wait for the gradients
        unread = 3 if mlps_again else 1
        again -= unread * (2 * t * of_mlp / 3 / matmul + expansion(of_mlp // 3))
        again -= traffic[0] * mlp / memory if mlps_again else 0.0
    head = (4 if facts.rank else 6) * t * facts.vocab * h / matmul
    if not facts.fused_head:
        head += t * facts.vocab * 3 * 12 / memory
    optimizer = (3 * facts.gradient_bytes + 2 * facts.optimizer_state_bytes) / memory
    normed = sum(saved[name] for name in NORM_CLASSES) if norms_again else 0
    norm_s = 2 * normed / memory
    kept = full - normed
    lean = 0 if mlps_again else facts.lean_bytes(shape)
    of_layer = lean if facts.ends_with_mlp else 0
    rows = (
        ("keep", kept, 0, 0, norm_s),
        ("recompute_mlp", kept - mlp, max(1, mlp - lean), 0, mlp_again + norm_s),
        ("recompute", boundary, max(1, full - of_layer - (boundary if facts.fused else 0)), 0, again),
        ("recompute_offload", 0, max(1, full - of_layer), boundary, again),
        ("offload", 0, 0, kept, norm_s),
    )
    options = {
        name: Option(name=name, kept_bytes=kept, passing_bytes=passing, host_bytes=host, recompute_s=seconds)
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
    mlps_again: bool = False
    """Each MLP is made again in the backward, as always where it is in several parts."""
    embeddings_on_host: bool = False
    """The input embeddings are in host memory, and read from there."""
    expanded: int = 0
    """Of how many layers, from the first on, the 4-bit weights stay expanded between forward and backward."""

    def __repr__(self) -> str:
        return f"<CheckpointPlan: {self}>"

    def __str__(self) -> str:
        counts = {name: self.layers.count(name) for name in OPTIONS}
        named = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        tiles = ", MLPs again" if self.mlps_again else ""
        tiles = f", MLPs in {self.mlp_tiles} tiles" if self.mlp_tiles > 1 else tiles
        expanded = f", weights of {self.expanded} expanded" if self.expanded else ""
        norms = ", norms again" if self.norms_again else ""
        embeddings = ", embeddings in host memory" if self.embeddings_on_host else ""
        tokens = f"{self.shape.batch} x {self.shape.seq} tokens"
        return (
            f"{named} of {len(self.layers)} layers{tiles}{norms}{embeddings}{expanded} at {tokens}: "
            f"{gib(self.peak_bytes)} of {gib(self.budget_bytes)}"
        )

    def classes(self, layer: int) -> dict[str, str]:
        """keep, recompute or offload for each tensor class of a layer."""
        option = self.layers[layer]
        of_mlps = MLP_CLASSES if self.mlps_again or self.mlp_tiles > 1 else ()
        again = {*of_mlps, *(NORM_CLASSES if self.norms_again else ())}
        if option in ("keep", "offload"):
            return {name: "recompute" if name in again else option for name in CLASSES}
        if option == "recompute_mlp":
            return {name: "recompute" if name in again | {*MLP_CLASSES} else "keep" for name in CLASSES}
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
    def in_flight(self) -> tuple[int, ...]:
        """Of how many layers the copies to the host may be under way when each layer's forward begins: as
        many as layers are behind it, once none of these is offloaded."""
        end = len(self.layers) - 1
        last = end if self.last_offloaded is None else min(self.last_offloaded, end - 1)
        return tuple(IN_FLIGHT if i <= last else min(IN_FLIGHT, end - i) for i in range(end + 1))

    def costs(self) -> Costs:
        """What the options cost under this plan's tiles."""
        return costs(self.facts, self.shape, self.rates, *self._way)

    @property
    def expanded_bytes(self) -> int:
        """What all weights that stay expanded take."""
        return self.expanded * self.facts.expanded_bytes

    @property
    def moved_bytes(self) -> int:
        """What the input embeddings in host memory would take on the device."""
        return self.facts.movable_bytes if self.embeddings_on_host else 0

    @property
    def _way(self) -> tuple[int, bool, bool]:
        return self.mlp_tiles, self.norms_again, self.mlps_again

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
        facts, shape = self.facts, self.shape
        options = self.costs().options
        work, grads = facts.workspace_bytes(shape, *self._way), facts.gradient_bytes
        base = fixed_bytes(facts, self.embeddings_on_host) + facts.ends_bytes(shape) + self.expanded_bytes
        full, rows, held = options["keep"].kept_bytes, [], base
        leaving = [options[name].host_bytes for name in self.layers]
        for index, name in enumerate(self.layers):
            under_way = min(self.in_flight[index], IN_FLIGHT - (leaving[index] > 0))
            before = [size for size in leaving[:index] if size][::-1][:under_way]
            rows.append((f"forward {index}", held + full + sum(before)))
            held += options[name].kept_bytes
        rows.append(("head", held + facts.head_bytes(shape)))
        done, begun = 0, False
        for index in range(len(self.layers) - 1, -1, -1):
            begun = begun or leaving[index] > 0 or index - 1 == self.last_offloaded
            coming = next((size for size in reversed(leaving[:index]) if size), 0) if begun else 0
            option = options[self.layers[index]]
            held -= option.kept_bytes
            own = max(option.kept_bytes + option.passing_bytes, option.host_bytes)
            rows.append((f"backward {index}", held + own + work + done + coming))
            done += 0 if facts.accumulates else grads // len(self.layers)
        rows.append(("optimizer", base + (0 if facts.accumulates else grads)))
        return rows

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
        if not isinstance(made.expanded, int) or not 0 <= made.expanded <= made.facts.layers:
            raise BadInputError(
                f"{where}: expanded={made.expanded!r}: allowed is 0 to {made.facts.layers}, its layers"
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


def fixed_bytes(facts: ModelFacts, embeddings_on_host: bool = False) -> int:
    """What is on the device all the time: weights, optimizer state, and gradients that accumulate."""
    gradients = facts.gradient_bytes if facts.accumulates else 0
    moved = facts.movable_bytes if embeddings_on_host else 0
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
    mlps: Sequence[bool] = (False, True),
    embeddings: Sequence[bool] = (False, True),
    expanded: float = 1.0,
) -> CheckpointPlan:
    """The plan with the shortest predicted step whose peak and margin fit into `budget_bytes`.

    `host_bytes`: pinned host memory that may be used; None: any. `allow`: the options to choose from; one of
    them must be "keep". `tiles`: the numbers of MLP tiles to choose from, 1 among them. `norms`: whether
    norms' outputs may be made again, False among them; `mlps`: MLPs in one piece, likewise; `embeddings`:
    whether the input embeddings may be in host memory, likewise. `expanded`: the share of what is left of the
    budget that expanded weights may take. Raises BadInputError, with the smallest budget that fits, where
    none does.
    """
    best: CheckpointPlan | None = None
    for way in _ways(facts, _tiles(shape, tiles), norms, mlps, embeddings):
        best = _search(facts, shape, budget_bytes, rates, host_bytes, allow, way, best) or best
    if best is not None:
        return _with_expanded(best, expanded)
    smallest = _smallest(facts, shape, rates, host_bytes, allow, tiles, norms, mlps, embeddings)
    need = smallest.peak_bytes + smallest.margin_bytes
    parts = {
        "weights": facts.weights_bytes - smallest.moved_bytes,
        "the optimizer's state": facts.optimizer_state_bytes,
        "activations and work space": smallest.peak_bytes - fixed_bytes(facts, smallest.embeddings_on_host),
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
    all_kept = set(made.layers) == {"keep"} and not made.norms_again and not made.mlps_again
    if not each or not all_kept or made.mlp_tiles > 1:
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
    mlps: Sequence[bool] = (False, True),
    embeddings: Sequence[bool] = (False, True),
) -> int:
    """The smallest budget for which `plan` finds a plan."""
    least = _smallest(facts, shape, rates, host_bytes, allow, tiles, norms, mlps, embeddings)
    return least.peak_bytes + least.margin_bytes


def _tiles(shape: Shape, tiles: Sequence[int]) -> list[int]:
    if 1 not in tiles or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in tiles):
        raise BadInputError(f"tiles={tuple(tiles)!r}: allowed are 1 and other whole numbers above it")
    return [count for count in sorted(set(tiles)) if count == 1 or shape.tokens >= count * LEAST_TILE]


class _Way(NamedTuple):
    """What all layers have in common, and where the input embeddings are."""

    mlp_tiles: int
    norms_again: bool
    mlps_again: bool
    embeddings_on_host: bool


def _ways(
    facts: ModelFacts,
    tiles: Sequence[int],
    norms: Sequence[bool],
    mlps: Sequence[bool],
    embeddings: Sequence[bool],
) -> list[_Way]:
    """All of them; first those with the embeddings on the device, which win where others are no faster."""
    for name, given in (("norms", norms), ("mlps", mlps), ("embeddings", embeddings)):
        if False not in given:
            raise BadInputError(f"{name}={tuple(given)!r}: allowed are False, and True beside it")
    # Elsewhere torch's checkpointing of an MLP holds its input.
    of_norms = sorted(set(norms)) if facts.fused_mlp else [False]
    of_mlps = sorted(set(mlps)) if facts.fused_mlp else [False]
    of_embeddings = sorted(set(embeddings)) if facts.movable_bytes else [False]
    return [
        _Way(count, of_norm, of_mlp, on_host)
        for on_host in of_embeddings
        for count in tiles
        for of_mlp in (of_mlps if count == 1 else [False])
        for of_norm in of_norms
    ]


def _smallest(
    facts: ModelFacts,
    shape: Shape,
    rates: Rates,
    host_limit: int | None,
    allow: Sequence[str],
    tiles: Sequence[int],
    norms: Sequence[bool],
    mlps: Sequence[bool],
    embeddings: Sequence[bool],
) -> CheckpointPlan:
    """The plan that needs the least memory: smaller tiles never need more, embeddings on the host less."""
    ways = _ways(facts, sorted({1, _tiles(shape, tiles)[-1]}), norms, mlps, embeddings)
    if host_limit is None:
        ways = [way for way in ways if way.embeddings_on_host == ways[-1].embeddings_on_host]
    found = [
        made
        for way in ways
        if (made := _search(facts, shape, None, rates, host_limit, allow, way, None)) is not None
    ]
    return min(found, key=lambda made: (made.peak_bytes + made.margin_bytes, made.mlp_tiles))


def _search(
    facts: ModelFacts,
    shape: Shape,
    budget: int | None,
    rates: Rates,
    host_limit: int | None,
    allow: Sequence[str],
    way: _Way,
    at_most: CheckpointPlan | None,
) -> CheckpointPlan | None:
    """The fastest plan within the budget, of equal ones that which does least; None: the smallest.

    In one of the `_ways`, and faster than `at_most` if that is given; None where there is none.
    """
    import torch

    unknown = [name for name in allow if name not in OPTIONS]
    if unknown or "keep" not in allow:
        raise BadInputError(f"allow={tuple(allow)!r}: allowed are 'keep' and any of {', '.join(OPTIONS[1:])}")
    mlp_tiles, norms_again, mlps_again, on_host = way
    cost, layers = costs(facts, shape, rates, *way[:3]), facts.layers
    options = cost.options
    full, boundary = options["keep"].kept_bytes, options["recompute_offload"].host_bytes
    fixed, ends = fixed_bytes(facts, on_host), facts.ends_bytes(shape)
    work, head = facts.workspace_bytes(shape, *way[:3]), facts.head_bytes(shape)
    gradients = 0 if facts.accumulates else facts.gradient_bytes
    beside = (layers - 1) / layers
    to_host, from_host = rates.to_host_gb_s * 1e9, rates.from_host_gb_s * 1e9
    step = layers * (cost.forward_s + cost.backward_s) + cost.rest_s
    waits_forward = max(0.0, layers * (cost.host_forward_s - cost.forward_s))
    moved = facts.movable_bytes if on_host else 0
    if moved and host_limit is not None:
        host_limit -= moved
    read_s = facts.embedding_read_bytes(shape) / from_host if on_host else 0.0
    slowest = float("inf") if at_most is None else round(at_most.recompute_s + at_most.stall_s, 12)
    if layers * cost.tiled_s + read_s >= slowest:
        return None

    # Counts of layers: offloaded (never the last one); whose MLP, and that wholly, are recomputed.
    whole = "recompute" in allow or "recompute_offload" in allow
    offloaded, of_mlp, of_layer = torch.cartesian_prod(
        torch.arange(layers if "offload" in allow else 1),
        torch.arange(layers + 1 if "recompute_mlp" in allow and mlp_tiles == 1 and not mlps_again else 1),
        torch.arange(layers + 1 if whole else 1),
    ).unbind(1)
    rest = layers - offloaded - of_mlp - of_layer
    again = (
        layers * cost.tiled_s
        + (rest + offloaded).double() * options["keep"].recompute_s
        + of_mlp.double() * options["recompute_mlp"].recompute_s
        + of_layer.double() * options["recompute"].recompute_s
    )
    columns = [offloaded, of_mlp, of_layer, rest, again]
    left = (rest >= (offloaded > 0).long()) & (again + read_s < slowest)
    columns = [column[left] for column in columns]

    def memory(columns: list[Any], inputs: Any) -> tuple[Any, Any]:
        """(peak, margin) where the inputs of so many recomputed layers are offloaded."""
        offloaded, of_mlp, of_layer, rest, _ = columns
        held = (
            rest * full
            + of_mlp * options["recompute_mlp"].kept_bytes
            + (of_layer - inputs) * options["recompute"].kept_bytes
        )
        passing = (of_mlp > 0) * options["recompute_mlp"].passing_bytes
        passing = passing.maximum((of_layer > inputs) * options["recompute"].passing_bytes)
        passing = passing.maximum((inputs > 0) * options["recompute_offload"].passing_bytes)
        under_way = offloaded.clamp(max=IN_FLIGHT) * full + inputs.clamp(max=IN_FLIGHT) * boundary
        gap = layers - (offloaded > 0).long() - (offloaded - 1) * layers // offloaded.clamp(min=1)
        gap = torch.where(offloaded > 0, gap, layers)
        # At the last offloaded layer those behind it are free, and all but one when it begins to come; at
        # the first recomputed one all that are kept; at the first layer, the last of the backward, the
        # gradients are there.
        coming = torch.where(offloaded > 0, full, boundary * (inputs > 0))
        extra = (under_way - rest.minimum(gap) * full).maximum(
            (passing > 0) * (passing + under_way - rest * full)
        )
        extra = extra.maximum((rest > 0) * (coming - (rest - 1) * full))
        layer = work + held + extra.clamp(min=0)
        own = passing + under_way
        again_first = (of_layer > 0) & (offloaded == 0)  # else the first layer has all of its tensors then
        own = torch.where(again_first, own + (inputs == 0) * boundary, own.clamp(min=full))
        first = gradients + work + own
        above = ends + layer.maximum(held + head).maximum(first)
        margin = (above.double() * MARGIN).ceil().long()
        return fixed + above, margin

    def inputs_to_try() -> list[tuple[list[Any], Any]]:
        """How many inputs to offload: none; one; all; or the fewest from two on that fit, for less memory is
        needed with each but costs time."""
        of_layer = columns[2]
        if "recompute_offload" not in allow:
            return [(columns, torch.zeros_like(of_layer))]
        if "recompute" not in allow:
            return [(columns, of_layer)]
        few = [(columns, torch.zeros_like(of_layer)), (columns, of_layer.clamp(max=1))]
        if budget is None:
            return [*few, (columns, of_layer)]
        fits = sum(memory(columns, of_layer)) <= budget
        own = [column[fits] for column in columns]
        low, high = own[2].clamp(max=2), own[2].clone()
        for _ in range(layers.bit_length()):
            middle = (low + high) // 2
            fits = sum(memory(own, middle)) <= budget
            high, low = torch.where(fits, middle, high), torch.where(fits, low, (middle + 1).minimum(high))
        return [*few, (own, high)]

    best: tuple[tuple[float, ...], list[int], tuple[int, int, int, float, float]] | None = None
    for own, inputs in inputs_to_try():
        if not len(inputs):
            continue
        offloaded, of_mlp, of_layer, _, again = own
        peak, margin = memory(own, inputs)
        copied = offloaded * full + inputs * boundary
        first = torch.where(offloaded > 0, full, boundary * (inputs > 0)).double() / from_host
        first -= (inputs < layers).double() * (cost.backward_s + cost.tiled_s)
        stall = (
            (copied.double() / to_host - layers * cost.forward_s * beside).clamp(min=0)
            + (copied.double() / from_host - (layers * cost.backward_s + again) * beside).clamp(min=0)
            + first.clamp(min=0)
            + read_s
        )
        launches = layers * cost.host_backward_s + of_layer.double() * cost.host_again_s
        waits = waits_forward + (launches - layers * cost.backward_s - again).clamp(min=0)
        # Copies, the read of embeddings among them, and the host's launches go on beside each other.
        stall = stall.maximum(waits)
        fits = torch.ones_like(copied, dtype=torch.bool) if host_limit is None else copied <= host_limit
        if budget is not None:
            fits = fits & (peak + margin <= budget)
        work_s = again + copied.double() / to_host + read_s  # also what hides behind the host's launches
        time_s = ((again + stall) * 1e12).round() / 1e12  # equal ones are equal in the last bits, too
        wanted = (time_s, work_s) if budget is not None else (peak + margin, time_s)
        figures = [torch.where(fits, x.double(), torch.inf) for x in wanted]
        at = int(_first(*figures))
        key = tuple(float(x[at]) for x in figures)
        if key[0] != float("inf") and (best is None or key < best[0]):
            n = int(inputs[at])
            counts = [int(offloaded[at]), int(of_mlp[at]), int(of_layer[at]) - n, n]
            sizes = (int(peak[at]), int(margin[at]), int(copied[at]), float(again[at]), float(stall[at]))
            best = (key, counts, sizes)
    if best is None or (budget is not None and best[0][0] >= slowest):
        return None
    _, (n_offloaded, n_mlp, n_whole, n_inputs), (peak_bytes, margin_bytes, host, again_s, stall_s) = best
    placed = ["recompute_offload"] * n_inputs + ["recompute"] * n_whole + ["recompute_mlp"] * n_mlp
    placed += ["keep"] * (layers - n_offloaded - len(placed))
    for index in range(n_offloaded):
        placed.insert(index * layers // n_offloaded, "offload")
    return CheckpointPlan(
        layers=tuple(placed),
        facts=facts,
        shape=shape,
        rates=rates,
        budget_bytes=peak_bytes + margin_bytes if budget is None else budget,
        peak_bytes=peak_bytes,
        margin_bytes=margin_bytes,
        host_bytes=host + moved,
        step_s=step + again_s + stall_s,
        recompute_s=again_s,
        stall_s=stall_s,
        mlp_tiles=mlp_tiles,
        norms_again=norms_again,
        mlps_again=mlps_again,
        embeddings_on_host=on_host,
    )


def _first(values: Any, then: Any) -> Any:
    """Index of the smallest of `values`, of equal ones of that with the smallest `then`, the first."""
    least = values.min()
    return then.where(values == least, float("inf")).argmin()


def gib(size: int) -> str:
    """`size` bytes as text, such as 12.34 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
