"""Write the generated tables of README.md from benchmarks/results/*.jsonl.

    python benchmarks/make_tables.py            # write them
    python benchmarks/make_tables.py --check    # exit with 1 if README.md is not what would be written

A result file holds one JSON object a line, as benchmarks/kernels.py writes them (with `share_of_copy`),
benchmarks/head.py or benchmarks/quantization.py (with `measurement`). Files of other measurements are left
out. Of the files of one measurement and one GPU kind (of one model, for the quantization) the newest counts:
the one with the latest date (YYYY-MM-DD) in its name, and of equal dates the last by name. Needs nothing but
Python.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEYS = (
    "gpu",
    "driver",
    "torch",
    "triton",
    "commit",
    "case",
    "pass",
    "impl",
    "p20_us",
    "p50_us",
    "p80_us",
    "bytes",
    "share_of_copy",
    "copy_bytes_per_s",
    "peak_bytes",
    "max_rel_error",
)
HEAD_KEYS = (
    "gpu",
    "driver",
    "torch",
    "triton",
    "commit",
    "measurement",
    "case",
    "impl",
    "p20_us",
    "p50_us",
    "p80_us",
    "of_matmuls",
    "peak_bytes",
    "loss_rel_error",
    "max_rel_error",
)
QUANTIZATION_KEYS = (
    "measurement",
    "model",
    "device",
    "calibration",
    "bitsandbytes",
    "commit",
    "text",
    "checkpoint",
    "bytes",
    "kl",
    "perplexity",
    "top1",
    "tokens",
)
PASSES = ("forward", "backward")
IMPLEMENTATIONS = ("sloth", "liger")
NOTHING = "No measurement is recorded yet; [benchmarks/README.md](benchmarks/README.md) says how to make one."
Row = dict[str, Any]


class BadResult(ValueError):
    """A result file that can't be read; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One measurement: its section between `<!-- name-table:begin -->` and `:end`, and a table a subject.

    mine: whether a file's first row is of it; subject: the key whose values have tables of their own.
    """

    name: str
    keys: tuple[str, ...]
    mine: Callable[[Row], bool]
    table: Callable[[Sequence[Row]], str]
    subject: str = "gpu"

    @property
    def markers(self) -> tuple[str, str]:
        """What stands before and after its section."""
        return f"<!-- {self.name}-table:begin -->", f"<!-- {self.name}-table:end -->"

    def read(self, path: Path) -> list[Row]:
        """The rows of a result file; none if it holds another measurement."""
        rows: list[Row] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadResult(f"{path.name}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise BadResult(f"{path.name}, line {number}: no JSON object")
            if not rows and not self.mine(row):
                return []
            if missing := [key for key in self.keys if key not in row]:
                raise BadResult(f"{path.name}, line {number}: lacks {', '.join(missing)}")
            if "pass" in self.keys and (row["pass"] not in PASSES or row["impl"] not in IMPLEMENTATIONS):
                raise BadResult(
                    f"{path.name}, line {number}: pass={row['pass']!r}, impl={row['impl']!r}; allowed are "
                    f"{', '.join(PASSES)} and {', '.join(IMPLEMENTATIONS)}"
                )
            if rows and row[self.subject] != rows[0][self.subject]:
                raise BadResult(
                    f"{path.name}, line {number}: two {self.subject}s in one file, which is one run"
                )
            rows.append(row)
        return rows

    def newest(self, results: Path) -> dict[str, list[Row]]:
        """The rows of the newest file of each subject."""

        def age(path: Path) -> tuple[str, str]:
            date = re.search(r"\d{4}-\d{2}-\d{2}", path.name)
            return (date[0] if date else "", path.name)

        found: dict[str, list[Row]] = {}
        for path in sorted(results.glob("*.jsonl"), key=age):
            if rows := self.read(path):
                found[rows[0][self.subject]] = rows
        return dict(sorted(found.items()))

    def section(self, results: Path) -> str:
        """What belongs between the markers."""
        return "\n\n".join(map(self.table, self.newest(results).values())) or NOTHING


def table(rows: Sequence[Row]) -> str:
    """One run: where it was made, and a line for each case and pass, in the run's order."""
    first = rows[0]
    measured = {(row["case"], row["pass"], row["impl"]): row for row in rows}
    lines = [
        f"**{first['gpu']}**: driver {first['driver']}, torch {first['torch']}, triton {first['triton']}, "
        f"commit {first['commit'][:12]}; a copy moves {first['copy_bytes_per_s'] / 1e12:.2f} TB/s",
        "",
        "| case | pass | sloth (µs) | share of copy bandwidth | Liger (µs) | Liger / sloth |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for case, passes in dict.fromkeys((row["case"], row["pass"]) for row in rows):
        sloth, liger = (measured.get((case, passes, implementation)) for implementation in IMPLEMENTATIONS)
        lines.append(
            f"| {case} | {passes} | {_us(sloth)} | {_share(sloth)} | {_us(liger)} | {_ratio(sloth, liger)} |"
        )
    return "\n".join(lines)


def head_table(rows: Sequence[Row]) -> str:
    """One run of benchmarks/head.py: a line for each case and implementation, in the run's order."""
    first = rows[0]
    lines = [
        f"**{first['gpu']}**: driver {first['driver']}, torch {first['torch']}, triton {first['triton']}, "
        f"commit {first['commit'][:12]}",
        "",
        "| case | loss | time (ms) | of the bare matmuls | peak (GiB) | error of the worst gradient |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        error = "-" if row["max_rel_error"] is None else f"{row['max_rel_error']:.1e}"
        lines.append(
            f"| {row['case']} | {row['impl']} | {row['p50_us'] / 1e3:.1f} | {row['of_matmuls']:.2f} | "
            f"{row['peak_bytes'] / 2**30:.2f} | {error} |"
        )
    return "\n".join(lines)


def quantization_table(rows: Sequence[Row]) -> str:
    """One run of benchmarks/quantization.py: a line a checkpoint, on each kind of text."""
    first = rows[0]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    own = {(row["checkpoint"], row["text"]): row for row in rows}
    tokens = ", ".join(f"{own[first['checkpoint'], text]['tokens']:,} ({text})" for text in texts)
    lines = [
        f"**{first['model']}** ({first['device']}, bitsandbytes {first['bitsandbytes']}, commit "
        f"{first['commit'][:12]}): calibrated on {first['calibration']}; held-out tokens: {tokens}",
        "",
        "| | MB | " + " | ".join(f"KL, {text} | of uniform's | perplexity | top-1" for text in texts) + " |",
        "|---|---:|" + "---:|---:|---:|---:|" * len(texts),
    ]
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        cells = []
        for text in texts:
            row, plain = own[name, text], own["uniform NF4", text]
            cells += [
                f"{row['kl']:.3g}",
                f"{row['kl'] / plain['kl']:.2f}",
                f"{row['perplexity']:.3f}",
                f"{row['top1']:.1%}".replace("%", " %"),
            ]
        lines.append(f"| {name} | {own[name, texts[0]]['bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


KINDS = (
    Kind(name="kernel", keys=KEYS, mine=lambda row: "share_of_copy" in row, table=table),
    Kind(name="head", keys=HEAD_KEYS, mine=lambda row: row.get("measurement") == "head", table=head_table),
    Kind(
        name="quantization",
        keys=QUANTIZATION_KEYS,
        mine=lambda row: row.get("measurement") == "quantization",
        table=quantization_table,
        subject="model",
    ),
)


def updated(readme: str, results: Path) -> str:
    """The README's text with all sections anew. Raises BadResult where a marker is missing or doubled."""
    for kind in KINDS:
        begin, end = kind.markers
        if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
            raise BadResult(f"README.md must hold {begin} and {end}, once each and in this order")
        before, rest = readme.split(begin)
        after = rest.split(end)[1]
        readme = f"{before}{begin}\n\n{kind.section(results)}\n\n{end}{after}"
    return readme


def _us(row: Row | None) -> str:
    return "-" if row is None else f"{row['p50_us']:.1f}"


def _share(row: Row | None) -> str:
    return "-" if row is None else f"{row['share_of_copy']:.0%}".replace("%", " %")


def _ratio(sloth: Row | None, liger: Row | None) -> str:
    return "-" if sloth is None or liger is None else f"{liger['p50_us'] / sloth['p50_us']:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, or up to date; 1: stale; 2: unreadable."""
    parser = argparse.ArgumentParser(description="Write the tables of README.md from the results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if README.md is stale"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.readme.read_text(encoding="utf-8")
        wanted = updated(text, arguments.results)
    except (BadResult, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.check:
        if text != wanted:
            print(f"{arguments.readme} is stale: run python benchmarks/make_tables.py", file=sys.stderr)
        return int(text != wanted)
    arguments.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
