"""What a training step of a decoder holds in memory and computes, by arithmetic from shapes and settings.

A layer's saved tensors fall into CLASSES, the same in every layer. For T tokens, hidden size H, q of Q and k
and v of KV elements, MLP width I, activations of e bytes and a residual stream of s bytes:

    class          fused                        plain (transformers and PEFT)
    input          T H s + 4 T                  4 T H + 4 T        what the first norm keeps: float32 in plain
    normed         T H e                        T H e, or under autocast one copy for each adapter
    qkv            T (Q + 2 KV) e               the same
    attention      T Q e + 4 T heads            and a copy for o_proj's adapter
    residual       as input, of the second norm
    mlp_normed     as normed, for gate and up
    gate_up        2 T I e, and T ROW e with it over 4-bit weights
                                                3 T I e (gate, silu(gate), up); of s bytes behind 4-bit layers
    hidden         0, or T I e without an MLP op the copy of down_proj's input
    low_rank       T (ranks of the layer) e     the same
    other          0                            0

Where a model's own layers were observed, gate_up is what its MLP saves, normed and mlp_normed the outputs of
its norms, and other the rest.

Figures against which it is held (bytes of torch.cuda.max_memory_allocated, H200, shapes of Llama-3.1-8B) are
in tests/core/test_checkpointing.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sloth_plugins.checkpointing.observe import Observed
from sloth_plugins.checkpointing.streams import SLOTS
from sloth_plugins.specs import BadInputError

CLASSES = (
    "input",
    "normed",
    "qkv",
    "attention",
    "residual",
    "mlp_normed",
    "gate_up",
    "hidden",
    "low_rank",
    "other",
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Weights = Literal["16bit", "32bit", "nf4", "nf4_double"]
WEIGHT_BYTES = {"16bit": 2.0, "32bit": 4.0, "nf4": 0.5 + 4 / 64, "nf4_double": 0.5 + 1 / 64 + 4 / (64 * 256)}
# cuBLAS keeps 32 MiB a stream on Hopper, and expansion has a stream of its own.
LIBRARY_BYTES = 64 * 2**20
# Of sloth_kernels.linear_cross_entropy: the most that the logits of a chunk take (often half of it, which
# depends on the GPU), and a slab of a product.
HEAD_CHUNK_BYTES, HEAD_SLAB_BYTES = 600 * 2**20, 64 * 2**20
# Logits in 16 bits, in float32, and their gradients: measured 12.3 with transformers' own loss.
BYTES_PER_LOGIT = 12
ROW = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A batch: rows and padded tokens of a row."""

    batch: int
    seq: int

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInputError(f"{name}={value!r}: allowed is a whole number from 1")

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the cost model has to know of a model and of how it is trained. All bytes are of one device."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    weights: Weights = "16bit"
    activation_bytes: int = 2
    """Bytes of an activation's element: 2 in bf16 and fp16, also under autocast."""
    stream_bytes: int = 2
    """Bytes of an element of the residual stream: 4 where embeddings or norms are float32."""
    rank: int = 16
    """LoRA rank; 0: all weights are trained."""
    targets: tuple[str, ...] = PROJECTIONS
    adapter_bytes: int = 4
    dropout: bool = False
    fused: bool = True
    """Norms, rotary embedding, LoRA and MLP run in the project's kernels."""
    ends_with_mlp: bool = True
    """A layer ends with its MLP and an addition: run again, it leaves out what the output alone needs."""
    whole_mlp: bool = True
    """An MLP with LoRA runs in one function, where it is fused at all."""
    fused_head: bool = True
    """The loss of the head holds no logits."""
    head_processors: int | None = None
    """Multiprocessors of the GPU on which a frozen head's loss is made; None: unknown, or the head is trained
    in part, and the most is counted that any takes."""
    optimizer_bytes: int | None = None
    """Bytes of optimizer state for each byte of a trained parameter; None: 2 (AdamW in its dtype)."""
    accumulates: bool = False
    """Gradients of an earlier micro-batch are there when the forward begins."""
    resident_bytes: int | None = None
    """Measured bytes on the device before a step and without optimizer state; None: by arithmetic."""
    embedding_bytes: int | None = None
    """Bytes of the input embeddings, if they may wait in host memory, else 0; None: by arithmetic."""
    packed_bytes: int | None = None
    """Bytes of a layer's packed 4-bit weights, if they may wait in host memory, else 0; None: by
    arithmetic."""
    observed: Observed | None = None
    """What a layer of the model was seen to save for a token; None: by arithmetic."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInputError(f"{name}={value!r}: allowed is a whole number from 1")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise BadInputError(f"rank={self.rank!r}: allowed is a whole number from 0")
        if self.weights not in WEIGHT_BYTES:
            raise BadInputError(f"weights={self.weights!r}: allowed are {', '.join(WEIGHT_BYTES)}")
        if not self.rank and self.four_bit:
            raise BadInputError(
                f"rank=0 with weights={self.weights!r}: 4-bit weights are not trained, "
                "so allowed is a rank from 1"
            )

    @classmethod
    def from_config(cls, config: Any, **known: Any) -> ModelFacts:
        """From a transformers config, with `known` for what it does not say.

        Raises BadInputError for a model with experts or without the usual sizes.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        kind = getattr(text, "model_type", type(text).__name__)
        if any(
            getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
        ):
            raise BadInputError(
                f"a model of type {kind!r}: the memory of expert layers can't be predicted yet"
            )
        names = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "intermediate": "intermediate_size",
            "vocab": "vocab_size",
        }
        sizes = {ours: getattr(text, theirs, None) for ours, theirs in names.items()}
        missing = [names[name] for name, size in sizes.items() if not isinstance(size, int)]
        if missing:
            raise BadInputError(
                f"a model of type {kind!r}: its config has no {', '.join(missing)}, "
                "so its memory can't be predicted"
            )
        sizes["kv_heads"] = getattr(text, "num_key_value_heads", None) or sizes["heads"]
        sizes["head_dim"] = getattr(text, "head_dim", None) or sizes["hidden"] // sizes["heads"]  # type: ignore[operator]
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return cls(**{**sizes, "tied": tied, **known})

    @classmethod
    def from_model(cls, model: Any, **known: Any) -> ModelFacts:
        """From a transformers model with its adapters, as it stands in memory.

        Raises BadInputError where the model has no config or can't be predicted.
        """
        config = getattr(model, "config", None)
        if config is None:
            raise BadInputError(f"{type(model).__name__} has no config, so its memory can't be predicted")
        found: dict[str, Any] = {}
        named = list(model.named_parameters())
        total = sum(_stored_bytes(p) for _, p in named)
        trained = [(name, p) for name, p in named if p.requires_grad]
        adapters = [(name, p) for name, p in trained if ".lora_A." in name]
        states = [p.quant_state for _, p in named if getattr(p, "quant_state", None) is not None]
        plain = [p for name, p in named if ".lora_" not in name and p.is_floating_point()]
        matrices = [p for p in plain if p.dim() > 1]
        small = [p for p in plain if p.dim() == 1]
        if states:
            found["weights"] = "nf4_double" if any(state.nested for state in states) else "nf4"
        elif matrices:
            found["weights"] = "32bit" if matrices[0].element_size() == 4 else "16bit"
        found["stream_bytes"] = max((p.element_size() for p in (*small, *matrices[:1])), default=2)
        if not states and matrices:
            found["activation_bytes"] = matrices[0].element_size()
        if adapters:
            ours = {name.rsplit(".lora_A.", 1)[0].rsplit(".", 1)[-1] for name, _ in adapters}
            found["targets"] = tuple(name for name in PROJECTIONS if name in ours)
            found["rank"] = max(p.shape[0] for _, p in adapters)
            found["adapter_bytes"] = adapters[0][1].element_size()
            found["dropout"] = any(
                getattr(m, "p", 0) for name, m in model.named_modules() if ".lora_dropout." in name
            )
        else:
            found["rank"] = 0
        from sloth_plugins.checkpointing.host import movable_embedding

        embedding = movable_embedding(model)
        found["embedding_bytes"] = 0 if embedding is None else embedding.numel() * embedding.element_size()
        found["packed_bytes"] = 0  # who knows the patches knows better
        on_gpu = any(p.is_cuda for _, p in named)
        found["resident_bytes"] = total + (LIBRARY_BYTES if on_gpu else 0)
        return cls.from_config(config, **{**found, **known})

    def replace(self, **changes: Any) -> ModelFacts:
        """These facts with some changed."""
        return dataclasses.replace(self, **changes)

    @property
    def four_bit(self) -> bool:
        """Whether the layers' weights are stored in 4 bits."""
        return self.weights.startswith("nf4")

    @property
    def fused_mlp(self) -> bool:
        """Whether MLPs are one function, which makes gate and up again without the output."""
        adapted = bool(self.rank) and any(name in self.targets for name in PROJECTIONS[4:])
        return self.fused and self.whole_mlp and adapted

    @property
    def q(self) -> int:
        """Elements of a token's q."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Elements of a token's k, and of its v."""
        return self.kv_heads * self.head_dim

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each projection of a layer."""
        h, i = self.hidden, self.intermediate
        return {
            "q_proj": (self.q, h),
            "k_proj": (self.kv, h),
            "v_proj": (self.kv, h),
            "o_proj": (h, self.q),
            "gate_proj": (i, h),
            "up_proj": (i, h),
            "down_proj": (h, i),
        }

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's frozen matrices."""
        return sum(n * k for n, k in self.widths.values())

    @property
    def adapter_weights(self) -> int:
        """Elements of all adapters."""
        widths = self.widths
        return self.layers * self.rank * sum(sum(widths[name]) for name in self.targets)

    @property
    def weights_bytes(self) -> int:
        """Weights, quantization states and adapters on the device, and what libraries hold there."""
        if self.resident_bytes is not None:
            return self.resident_bytes
        tables = (1 if self.tied else 2) * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden
        stored = self.layers * self.layer_weights * WEIGHT_BYTES[self.weights]
        adapters = self.adapter_weights * self.adapter_bytes
        return int(stored + tables * self.dense_bytes + adapters) + LIBRARY_BYTES

    @property
    def dense_bytes(self) -> int:
        """Bytes of an element of what is not in the layers' matrices: embeddings, head, norms."""
        return 4 if self.weights == "32bit" else max(2, self.stream_bytes if self.four_bit else 2)

    @property
    def movable_bytes(self) -> int:
        """What is not on the device where the input embeddings are in host memory."""
        if self.embedding_bytes is not None:
            return self.embedding_bytes
        return 0 if self.tied or not self.rank else self.vocab * self.hidden * self.dense_bytes

    @property
    def layer_movable_bytes(self) -> int:
        """What of each layer is not on the device where its packed weights are in host memory."""
        if self.packed_bytes is not None:
            return self.packed_bytes
        return sum(n * k for n, k, _ in self.expanded_groups) // 2

    def moved_weights_bytes(self, layers: int) -> int:
        """What the device holds less where so many layers' packed weights are in host memory."""
        return max(0, layers - SLOTS) * self.layer_movable_bytes

    def embedding_read_bytes(self, shape: Shape) -> int:
        """What a step reads of input embeddings that are in host memory: a row for each token."""
        return shape.tokens * -(-self.movable_bytes // self.vocab)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all that is trained."""
        if self.rank:
            return self.adapter_weights * self.adapter_bytes
        tables = (1 if self.tied else 2) * self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden
        return int((self.layers * self.layer_weights + tables) * WEIGHT_BYTES[self.weights])

    @property
    def optimizer_state_bytes(self) -> int:
        """State of the optimizer after its first step."""
        factor = 2 if self.optimizer_bytes is None else self.optimizer_bytes
        return factor * self.gradient_bytes

    def saved_bytes(self, shape: Shape) -> dict[str, int]:
        """Bytes that one layer saves for its backward, by class; the keys are CLASSES."""
        t, h, i, e = shape.tokens, self.hidden, self.intermediate, self.activation_bytes
        if self.observed is not None:
            seen = self.observed
            found = dict.fromkeys(CLASSES, 0) | {
                "input": t * h * self.stream_bytes,
                "normed": int(t * seen.norms / 2),
                "mlp_normed": int(t * seen.norms / 2),
                "gate_up": int(t * seen.mlp),
            }
            found["other"] = max(0, int(t * (seen.saved + seen.by_length * shape.seq)) - sum(found.values()))
            return found
        adapted = set(self.targets) if self.rank else set(PROJECTIONS)
        ranks = {name: self.rank if name in self.targets else 0 for name in PROJECTIONS}
        if self.fused:
            norm = t * h * self.stream_bytes + 4 * t
            normed = mlp_normed = t * h * e
            copies = 0
            # Behind 4-bit weights, beside columns in which their gradients will have low-rank terms.
            gate_up = t * (2 * i + (ROW if self.four_bit and self.fused_mlp else 0)) * e
            # The MLP's own Function makes the product again; else a trained down_proj keeps its input.
            hidden = t * i * e if not self.fused_mlp and "down_proj" in adapted else 0
            ranks = {name: -(-rank // 16) * 16 for name, rank in ranks.items()}
        else:
            norm = 4 * t * h + 4 * t
            mask = t * (1 if self.dropout else 0)

            def kept(width: int, names: tuple[str, ...]) -> int:
                users = len(adapted.intersection(names))
                if self.rank and (self.dropout or e < self.adapter_bytes):  # each adapter's own cast or mask
                    return users * (t * width * e + mask * width)
                return t * width * e if users else 0

            normed, mlp_normed = kept(h, PROJECTIONS[:3]), kept(h, PROJECTIONS[4:6])
            if not self.rank:  # the norms' weights are trained: what they multiply stays
                norm += t * h * e
            own = self.rank and (self.dropout or e < self.adapter_bytes)
            copies = kept(self.q, PROJECTIONS[3:4]) if own else 0
            gate_up = 3 * t * i * (max(self.stream_bytes, e) if self.four_bit else e)
            hidden = kept(i, PROJECTIONS[6:])
        return {
            "input": norm,
            "normed": normed,
            "qkv": t * (self.q + 2 * self.kv) * e,
            "attention": t * self.q * e + 4 * t * self.heads + copies,
            "residual": norm,
            "mlp_normed": mlp_normed,
            "gate_up": gate_up,
            "hidden": hidden,
            "low_rank": t * sum(ranks.values()) * e,
            "other": 0,
        }

    def mlp_bytes(self, shape: Shape) -> int:
        """Bytes that go where the MLP alone is recomputed: gate, up, their product, the low-rank products."""
        saved, e = self.saved_bytes(shape), self.activation_bytes
        if self.observed is not None:
            return saved["gate_up"]
        inside = sum(name in self.targets for name in PROJECTIONS[4:]) if self.rank else 0
        low = shape.tokens * inside * (-(-self.rank // 16) * 16 if self.fused else self.rank) * e
        # Of several casts of its input one remains: the input itself.
        casts = max(0, saved["mlp_normed"] - shape.tokens * self.hidden * max(e, self.stream_bytes))
        return saved["gate_up"] + saved["hidden"] + low + casts

    def held_bytes(self, shape: Shape) -> int:
        """What a layer that is run again as a whole holds beside its input: down_proj's low-rank product."""
        if not (self.fused_mlp and self.ends_with_mlp and "down_proj" in self.targets):
            return 0
        return shape.tokens * -(-self.rank // 16) * 16 * self.activation_bytes

    def workspace_bytes(self, shape: Shape, mlp_tiles: int = 1, norms_again: bool = False) -> int:
        """What one layer's backward takes beside saved tensors: expanded weights, gradients on their way.

        mlp_tiles: parts of the tokens, one of which is in the MLP at a time; beyond 1 with what it saves, and
        with the parts of its input's gradient beside the whole.
        """
        t, h, i, e = shape.tokens, self.hidden, self.intermediate, self.activation_bytes
        columns = (-(-self.rank // 16) * 16) if self.rank else 0
        # Gradients of gate and up take their place in what is saved where the MLP is one function.
        inside, outside = i if self.fused_mlp else 3 * i + ROW, 2 * h
        wide = e if self.fused or not self.four_bit else max(e, self.stream_bytes)
        if mlp_tiles == 1:
            gradients = t * (inside + outside) * wide
        else:
            gradients = -(-t // mlp_tiles) * inside * wide + t * (outside + h) * wide
            gradients += -(-self.mlp_bytes(shape) // mlp_tiles)
        if not self.four_bit:
            expanded = 0
        elif self.fused:
            expanded = (2 * i + 2 * columns) * (h + ROW) * e + (h + columns) * (i + ROW) * e
        else:
            expanded = h * i * e
        return expanded + gradients + (t * h * e if norms_again else 0)

    def forward_bytes(self, shape: Shape, mlp_tiles: int = 1, *, mlp_kept: bool = True) -> int:
        """What one layer's forward takes at most beside what it saves: that is in its MLP.

        mlp_tiles: parts of the tokens, one of which is in the MLP at a time. mlp_kept: whether gate and up
        are among what it saves; else they are there for a while all the same.
        """
        t, h, i, e = shape.tokens, self.hidden, self.intermediate, self.activation_bytes
        output = t * h * e
        if not self.fused_mlp:
            made = 0 if mlp_kept else -(-self.mlp_bytes(shape) // mlp_tiles)
            expanded = (2 if self.fused else 1) * h * i * e if self.four_bit else 0
            return expanded + made + -(-t // mlp_tiles) * i * max(e, self.stream_bytes) + output
        first, last = self._expanded_mlp
        if mlp_tiles > 1:
            return first + last + -(-t // mlp_tiles) * (3 * i + h + 2 * ROW) * e + 2 * output
        made, ahead = (0, last) if mlp_kept else (t * 2 * i * e, 0)
        joint, down = first + t * (h + ROW) * e + ahead, t * (i + ROW) * e + last + output
        return made + max(joint, down)

    @property
    def _expanded_mlp(self) -> tuple[int, int]:
        """Bytes that gate and up, and down, take where they are expanded in our kernels."""
        if not self.four_bit:
            return 0, 0
        h, i, columns = self.hidden, self.intermediate, -(-self.rank // 16) * 16
        return (
            (2 * i + 2 * columns) * (h + ROW) * self.activation_bytes,
            (h + columns) * (i + ROW) * self.activation_bytes,
        )

    @property
    def expanded_groups(self) -> list[tuple[int, int, int]]:
        """(outputs, inputs, adapters) of what a layer expands at once of its 4-bit weights in our kernels."""
        if not (self.four_bit and self.fused and self.rank):
            return []
        groups = PROJECTIONS[:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:]
        # One adapter takes the whole MLP into one function.
        served = [
            names
            for names in groups
            if (
                self.fused_mlp if names[0] in PROJECTIONS[4:] else any(name in self.targets for name in names)
            )
        ]
        widths = self.widths
        return [
            (
                sum(widths[name][0] for name in names),
                widths[names[0]][1],
                sum(name in self.targets for name in names),
            )
            for names in served
        ]

    @property
    def expanded_bytes(self) -> int:
        """Bytes of a layer's weights that are expanded for the matmuls, with the adapters' factors beside."""
        columns, e = -(-self.rank // 16) * 16, self.activation_bytes
        return sum((n + count * columns) * (k + ROW) * e for n, k, count in self.expanded_groups)

    def lean_bytes(self, shape: Shape) -> int:
        """What a layer whose MLP is made again in one piece takes less in its backward than all of its saved
        tensors and `workspace_bytes`: gate and up are made when their gradients are, and each of the MLP's
        weights is expanded when it is wanted."""
        if not self.fused_mlp:
            return 0
        t, i, e = shape.tokens, self.intermediate, self.activation_bytes
        first, last = self._expanded_mlp
        return min(first, last + t * i * e)

    def head_bytes(self, shape: Shape) -> int:
        """What the head and its loss take at most, while all of the layers' saved tensors are there."""
        t, h, e = shape.tokens, self.hidden, self.activation_bytes
        trained = 0 if self.rank else self.vocab * h * e
        if not self.fused_head:
            return t * self.vocab * BYTES_PER_LOGIT + trained
        if self.head_processors is not None:
            from sloth_kernels.linear_cross_entropy import frozen_head_bytes

            return frozen_head_bytes(t, h, self.vocab, e, self.head_processors)
        chunk = max(HEAD_CHUNK_BYTES - t * h * (4 - e), HEAD_CHUNK_BYTES // 2)
        return t * h * 4 + min(chunk, t * self.vocab * e) + min(HEAD_SLAB_BYTES, self.vocab * h * 4) + trained

    def ends_bytes(self, shape: Shape) -> int:
        """What is there beside the layers' tensors at the head: the last norm's input and output."""
        stream = self.stream_bytes if self.fused else 4
        return shape.tokens * self.hidden * (stream + self.activation_bytes)

    def shared_bytes(self, shape: Shape) -> int:
        """What all layers read: ids and positions, rotary tables."""
        return 16 * shape.tokens + 2 * shape.seq * self.head_dim * 4

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelFacts:
        """The facts that `to_dict` wrote."""
        values = dict(values)
        seen = values.get("observed")
        observed = None if seen is None else Observed(**seen)
        return cls(**{**values, "targets": tuple(values["targets"]), "observed": observed})


def _stored_bytes(parameter: Any) -> int:
    """Bytes of a parameter and of its bitsandbytes quantization state."""
    own = int(parameter.numel() * parameter.element_size())
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        own += sum(
            tensor.numel() * tensor.element_size()
            for tensor in (state.absmax, getattr(state, "code", None))
            if tensor is not None
        )
        state = getattr(state, "state2", None)
    return own
