"""Write the kernel table of README.md from benchmarks/results/*.jsonl.

    python benchmarks/make_tables.py            # write it
    python benchmarks/make_tables.py --check    # exit with 1 if README.md is not what would be written

A result file holds one JSON object a line, as benchmarks/kernels.py writes them. Files of other measurements,
whose rows have no `share_of_copy`, are left out. Of the files of one GPU kind the newest counts: the one with
the latest date (YYYY-MM-DD) in its name, and of equal dates the last by name. Needs nothing but Python.
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
PASSES = ("forward", "backward")
IMPLEMENTATIONS = ("sloth", "liger")
NOTHING = "No measurement is recorded yet; [benchmarks/README.md](benchmarks/README.md) says how to make one."
Row = dict[str, Any]


class BadResult(ValueError):
    """A result file that can't be read; the message names file and line."""


def read(path: Path) -> list[Row]:
    """The kernel rows of a result file; none if it holds another measurement."""
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
        if not rows and "share_of_copy" not in row:
            return []
        if missing := [key for key in KEYS if key not in row]:
            raise BadResult(f"{path.name}, line {number}: lacks {', '.join(missing)}")
        if row["pass"] not in PASSES or row["impl"] not in IMPLEMENTATIONS:
            raise BadResult(
                f"{path.name}, line {number}: pass={row['pass']!r}, impl={row['impl']!r}; allowed are "
                f"{', '.join(PASSES)} and {', '.join(IMPLEMENTATIONS)}"
            )
        if rows and row["gpu"] != rows[0]["gpu"]:
            raise BadResult(f"{path.name}, line {number}: two GPU kinds in one file, which is one run")
        rows.append(row)
    return rows


def newest(results: Path) -> dict[str, list[Row]]:
    """The rows of the newest file of each GPU kind."""

    def age(path: Path) -> tuple[str, str]:
        date = re.search(r"\d{4}-\d{2}-\d{2}", path.name)
        return (date[0] if date else "", path.name)

    found: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*.jsonl"), key=age):
        if rows := read(path):
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


def section(results: Path) -> str:
    """What belongs between the markers."""
    tables = [table(rows) for rows in newest(results).values()]
    return "\n\n".join(tables) if tables else NOTHING


def updated(readme: str, results: Path) -> str:
    """The README's text with the section made anew. Raises BadResult where a marker is missing or doubled."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise BadResult(f"README.md must hold {BEGIN} and {END}, once each and in this order")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}"


def _us(row: Row | None) -> str:
    return "-" if row is None else f"{row['p50_us']:.1f}"


def _share(row: Row | None) -> str:
    return "-" if row is None else f"{row['share_of_copy']:.0%}".replace("%", " %")


def _ratio(sloth: Row | None, liger: Row | None) -> str:
    return "-" if sloth is None or liger is None else f"{liger['p50_us'] / sloth['p50_us']:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, or up to date; 1: stale; 2: unreadable."""
    parser = argparse.ArgumentParser(description="Write the kernel table of README.md from the results.")
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
