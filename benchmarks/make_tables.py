"""Write the tables of the kernels and of the head in README.md from benchmarks/results/*.jsonl.

    python benchmarks/make_tables.py            # write them
    python benchmarks/make_tables.py --check    # exit with 1 if README.md is not what would be written

A result file holds one JSON object a line, as benchmarks/kernels.py writes them (with `share_of_copy`) or
benchmarks/head.py (`measurement` is "head"). Files of other measurements are left out. Of the files of one
GPU kind and measurement the newest counts: the one with the latest date (YYYY-MM-DD) in its name, and of
equal dates the last by name. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- kernel-table:begin -->", "<!-- kernel-table:end -->"
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
HEAD_BEGIN, HEAD_END = "<!-- head-table:begin -->", "<!-- head-table:end -->"
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
PASSES = ("forward", "backward")
IMPLEMENTATIONS = ("sloth", "liger")
NOTHING = "No measurement is recorded yet; [benchmarks/README.md](benchmarks/README.md) says how to make one."
Row = dict[str, Any]


class BadResult(ValueError):
    """A result file that can't be read; the message names file and line."""


def read(path: Path, head: bool = False) -> list[Row]:
    """The kernels' rows of a result file, or the head's; none if it holds another measurement."""
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
        if not rows and not (row.get("measurement") == "head" if head else "share_of_copy" in row):
            return []
        if missing := [key for key in (HEAD_KEYS if head else KEYS) if key not in row]:
            raise BadResult(f"{path.name}, line {number}: lacks {', '.join(missing)}")
        if head:
            pass
        elif row["pass"] not in PASSES or row["impl"] not in IMPLEMENTATIONS:
            raise BadResult(
                f"{path.name}, line {number}: pass={row['pass']!r}, impl={row['impl']!r}; allowed are "
                f"{', '.join(PASSES)} and {', '.join(IMPLEMENTATIONS)}"
            )
        if rows and row["gpu"] != rows[0]["gpu"]:
            raise BadResult(f"{path.name}, line {number}: two GPU kinds in one file, which is one run")
        rows.append(row)
    return rows


def newest(results: Path, head: bool = False) -> dict[str, list[Row]]:
    """The rows of the newest file of each GPU kind."""

    def age(path: Path) -> tuple[str, str]:
        date = re.search(r"\d{4}-\d{2}-\d{2}", path.name)
        return (date[0] if date else "", path.name)

    found: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*.jsonl"), key=age):
        if rows := read(path, head):
            found[rows[0]["gpu"]] = rows
    return dict(sorted(found.items()))


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


def section(results: Path, head: bool = False) -> str:
    """What belongs between the markers."""
    tables = [(head_table if head else table)(rows) for rows in newest(results, head).values()]
    return "\n\n".join(tables) if tables else NOTHING


def updated(readme: str, results: Path) -> str:
    """The README's text with both sections anew. Raises BadResult where a marker is missing or doubled."""
    for head, begin, end in ((False, BEGIN, END), (True, HEAD_BEGIN, HEAD_END)):
        if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
            raise BadResult(f"README.md must hold {begin} and {end}, once each and in this order")
        before, rest = readme.split(begin)
        after = rest.split(end)[1]
        readme = f"{before}{begin}\n\n{section(results, head)}\n\n{end}{after}"
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
