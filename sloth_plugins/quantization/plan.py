"""Which linears are stored in how many bytes: a value to save, to load and to hand to transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMAT = 1
# Of the look-up tables and the packed JSON that bitsandbytes stores with each weight.
_TABLE_BYTES = 16 * 4 + 256 * 4 + 128


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one linear is stored.

    bits: 4 or 16; blocksize: weights with one scale, None for 16 bits; bytes: of its weight; kl: what storing
    it in blocks of 64, alone, does to the model's output (nats a token, from the calibration text), None: not
    measured; reason: why it had to stay in 16 bits, or "".
    """

    module: str
    bits: int
    blocksize: int | None
    bytes: int
    kl: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """Choices for every linear of a model; bytes are those of the whole checkpoint.

    budget: the allowed ratio of `total_bytes` to `uniform_bytes`, which uniform NF4 (blocks of 64) needs.
    others: linears outside the decoder layers, such as lm_head; they stay as they are.
    expected_kl, measured_kl: to the original, in plain NF4 on calibration text, as the choices' own add up
    and as it was measured with all of them together; None: not measured.
    """

    budget: float
    uniform_bytes: int
    total_bytes: int
    choices: tuple[Choice, ...]
    others: tuple[str, ...]
    expected_kl: float | None = None
    measured_kl: float | None = None

    @property
    def ratio(self) -> float:
        """Bytes over those of uniform NF4."""
        return self.total_bytes / self.uniform_bytes

    @property
    def skip_modules(self) -> list[str]:
        """Full dotted names of the linears that stay in 16 bits, for `llm_int8_skip_modules`."""
        return [*(c.module for c in self.choices if c.bits == 16), *self.others]

    def to_bnb_config(self, compute_dtype: str = "bfloat16") -> Any:
        """A `transformers.BitsAndBytesConfig`, for quantizing while a model is loaded.

        Raises ValueError where the plan has blocks of another size than 64: transformers has no such setting.
        """
        wrong = sorted({c.blocksize for c in self.choices if c.bits == 4} - {64, None}, key=str)
        if wrong:
            raise ValueError(
                f"blocksize={wrong[0]} in the plan: allowed is 64 where transformers quantizes while "
                "loading; `sloth quantize` writes a checkpoint with any"
            )
        return bnb_config(self.skip_modules, compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the plan") -> QuantizationPlan:
        """The plan of `to_dict`. Raises ValueError that names `where` for anything else."""
        try:
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']!r} in {where}: allowed is {_FORMAT}")
            optional = {"expected_kl": None, "measured_kl": None}
            fields = {f.name: (optional | dict(values))[f.name] for f in dataclasses.fields(cls)}
            fields |= {
                "choices": tuple(Choice(**choice) for choice in values["choices"]),
                "others": tuple(values["others"]),
            }
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is no quantization plan of sloth: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> QuantizationPlan:
        """Read what `save` wrote. Raises ValueError, naming the file, for anything else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no quantization plan that can be read: {error}") from error
        return cls.from_dict(values, repr(str(path)))

    def __str__(self) -> str:
        kept = sum(c.bits == 16 for c in self.choices)
        sizes = sorted({c.blocksize for c in self.choices if c.blocksize})
        blocks = ", ".join(
            f"{sum(c.blocksize == size for c in self.choices)} in blocks of {size}" for size in sizes
        )
        return (
            f"{len(self.choices)} linears: {blocks or 'none in 4 bits'}, {kept} in 16 bits; "
            f"{self.total_bytes / 1e6:.1f} MB, {self.ratio:.3f} of uniform NF4 (budget {self.budget:.3f})"
        )


def bnb_config(skip_modules: Sequence[str], compute_dtype: str) -> Any:
    """The `BitsAndBytesConfig` of nested NF4 with a skip list."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(skip_modules),
    )


def nf4_bytes(shape: tuple[int, int], blocksize: int) -> int:
    """What bitsandbytes stores of a weight (N, K), with nested scales."""
    count = shape[0] * shape[1]
    blocks = -(-count // blocksize)
    return -(-count // 2) + blocks + -(-blocks // 256) * 4 + _TABLE_BYTES


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One linear and the ways to store it: (blocksize or None for 16 bits, bytes, expected KL) of each."""

    module: str
    kl: float | None
    ways: tuple[tuple[int | None, int, float], ...]
    reason: str = ""

    def expected_kl(self, choice: Choice) -> float:
        """Of the way that was chosen."""
        return next(kl for blocksize, _, kl in self.ways if blocksize == choice.blocksize)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What plans for a model are chosen from; bytes: rest_bytes are those of everything but the offers.

    rows: of the calibration text, from the first, sensitivity was measured on; 0: it was not.
    """

    offers: tuple[Offer, ...]
    others: tuple[str, ...]
    rest_bytes: int
    rows: int

    @property
    def uniform_bytes(self) -> int:
        """Of the checkpoint in uniform NF4, and in 16 bits what has to stay so."""
        return self.rest_bytes + sum(
            next(size for blocksize, size, _ in offer.ways if offer.reason or blocksize == 64)
            for offer in self.offers
        )

    def plan(self, limit: int) -> QuantizationPlan:
        """The plan with the least expected KL among those of at most `limit` bytes."""
        choices = solve(self.offers, limit - self.rest_bytes)
        return QuantizationPlan(
            budget=round(limit / self.uniform_bytes, 4),
            uniform_bytes=self.uniform_bytes,
            total_bytes=self.rest_bytes + sum(choice.bytes for choice in choices),
            choices=tuple(choices),
            others=self.others,
            expected_kl=sum(o.expected_kl(c) for o, c in zip(self.offers, choices, strict=True))
            if self.rows
            else None,
        )

    def plan_for(self, kl: float) -> QuantizationPlan:
        """The smallest plan whose expected KL is at most `kl`."""
        low = self.uniform_bytes
        high = self.rest_bytes + sum(max(size for _, size, _ in offer.ways) for offer in self.offers)
        best = self.plan(high)
        while high - low > max(1, self.uniform_bytes // 10_000):
            middle = (low + high) // 2
            plan = self.plan(middle)
            if (plan.expected_kl or 0.0) <= kl:
                best, high = plan, middle
            else:
                low = middle
        return best

    def save(self, path: Path) -> None:
        """Write the survey as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Survey:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        offers = (
            Offer(**{**offer, "ways": tuple(map(tuple, offer["ways"]))}) for offer in values.pop("offers")
        )
        return cls(offers=tuple(offers), others=tuple(values.pop("others")), **values)


def solve(offers: Sequence[Offer], budget_bytes: int, steps: int = 20_000) -> list[Choice]:
    """The ways with the least KL in all whose bytes fit: a knapsack with one way for each linear.

    Gains are taken to add up. Bytes over the smallest ways' are counted in `steps` steps, rounded up, so that
    the budget holds. Raises ValueError where even the smallest ways do not fit.
    """
    import numpy as np

    least = sum(min(way[1] for way in offer.ways) for offer in offers)
    if least > budget_bytes:
        raise ValueError(f"a budget of {budget_bytes} bytes for the linears: allowed is {least} or more")
    step = max(1.0, (budget_bytes - least) / steps)
    width = int((budget_bytes - least) / step) + 1
    best = np.zeros(width)  # the least KL with at most this many steps
    taken = []
    for offer in offers:
        smallest = min(way[1] for way in offer.ways)
        rows = np.full((len(offer.ways), width), np.inf)
        for i, (_, size, kl) in enumerate(offer.ways):
            cost = int(np.ceil((size - smallest) / step))
            if cost < width:
                rows[i, cost:] = best[: width - cost] + kl
        taken.append(rows.argmin(0))
        best = rows.min(0)
    left, choices = width - 1, []
    for offer, ways in zip(reversed(offers), reversed(taken), strict=True):
        blocksize, size, _ = offer.ways[ways[left]]
        left -= int(np.ceil((size - min(way[1] for way in offer.ways)) / step))
        choices.append(
            Choice(
                module=offer.module,
                bits=16 if blocksize is None else 4,
                blocksize=blocksize,
                bytes=size,
                kl=offer.kl,
                reason=offer.reason,
            )
        )
    return choices[::-1]


def folded(choices: Iterable[Choice]) -> dict[tuple[str, str], list[Choice]]:
    """Choices with the same way and reason together."""
    found: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        way = f"NF4, blocks of {choice.blocksize}" if choice.bits == 4 else "16 bits"
        found.setdefault((way, choice.reason), []).append(choice)
    return found
