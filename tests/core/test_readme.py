"""The README tells what is so: its kernel table is the results', its settings are those of Settings."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from sloth_plugins.cli import _parser
from sloth_plugins.settings import CHECKPOINTING, OPS, HeadLoss, Kernels, Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """benchmarks/make_tables.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "benchmarks" / "make_tables.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def row(**changes: Any) -> dict[str, Any]:
    """A line as benchmarks/kernels.py writes it."""
    return {
        "gpu": "GPU A",
        "driver": "570.1",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123456789abcdef",
        "case": "rms_norm_4096_frozen",
        "pass": "forward",
        "impl": "sloth",
        "p20_us": 39.0,
        "p50_us": 40.0,
        "p80_us": 41.0,
        "bytes": 134225920,
        "share_of_copy": 0.912,
        "copy_bytes_per_s": 3.68e12,
        "peak_bytes": 67108864,
        "max_rel_error": 2e-3,
        **changes,
    }


def save(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")


def section(text: str, name: str) -> str:
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def outside(text: str) -> str:
    """All but the sections that are generated."""
    name = "(kernel|head|quantization)-table"
    return re.sub(rf"<!-- {name}:begin -->.*?<!-- \1-table:end -->", "", text, flags=re.DOTALL)


# The generated tables


def test_the_kernel_table_is_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0, "run python benchmarks/make_tables.py"


def test_a_stale_table_is_found_and_made_anew(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README, encoding="utf-8")
    save(
        results / "2026-01-02-a-kernels.jsonl",
        row(),
        row(impl="liger", p50_us=50.0),
        row(**{"pass": "backward"}),
    )
    options = ["--readme", str(readme), "--results", str(results)]
    assert tables.main([*options, "--check"]) == 1
    assert "make_tables.py" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == README  # --check writes nothing
    assert tables.main(options) == 0 and tables.main([*options, "--check"]) == 0
    written = readme.read_text(encoding="utf-8")
    assert outside(written) == outside(README)
    lines = section(written, "kernel-table").split("\n")
    assert "| rms_norm_4096_frozen | forward | 40.0 | 91 % | 50.0 | 1.25 |" in lines
    assert "| rms_norm_4096_frozen | backward | 40.0 | 91 % | - | - |" in lines
    assert any("GPU A" in line and "0123456789ab;" in line and "3.68 TB/s" in line for line in lines)


def test_the_newest_file_of_each_gpu_counts(tables: ModuleType, tmp_path: Path) -> None:
    save(tmp_path / "z-2026-01-02.jsonl", row(p50_us=11.0))
    save(tmp_path / "a-2026-02-01.jsonl", row(p50_us=22.0))
    save(tmp_path / "b-2025-12-31.jsonl", row(gpu="GPU B", p50_us=33.0))
    save(tmp_path / "2026-03-01-steps.jsonl", {"step_time_ms": 1})  # another measurement
    made = tables.KINDS[0].section(tmp_path)
    assert "| 22.0 |" in made and "| 33.0 |" in made and "| 11.0 |" not in made
    assert made.index("GPU A") < made.index("GPU B")


def test_the_head_has_a_table_of_its_own(tables: ModuleType, tmp_path: Path) -> None:
    common = dict.fromkeys(tables.HEAD_KEYS, "x") | row() | dict(measurement="head", case="frozen_128256")
    del common["share_of_copy"]
    measured = dict(p50_us=25_000.0, of_matmuls=1.104, peak_bytes=2**29, max_rel_error=0.00234)
    save(
        tmp_path / "2026-02-01-a-head.jsonl",
        {**common, **measured},
        {**common, "impl": "matmuls", "max_rel_error": None, "of_matmuls": 1.0},
    )
    save(tmp_path / "2026-02-01-a.jsonl", row())
    text = " and ".join(f"{begin}old{end}" for begin, end in (kind.markers for kind in tables.KINDS))
    (readme := tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert tables.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    written = readme.read_text(encoding="utf-8")
    assert "| frozen_128256 | sloth | 25.0 | 1.10 | 0.50 | 2.3e-03 |" in section(written, "head-table")
    assert "| frozen_128256 | matmuls | 0.0 | 1.00 | 0.06 | - |" in section(written, "head-table")
    assert "rms_norm_4096_frozen" in section(written, "kernel-table") and "old" not in written


def test_a_model_has_a_table_of_its_checkpoints(tables: ModuleType, tmp_path: Path) -> None:
    common = dict.fromkeys(tables.QUANTIZATION_KEYS, "x") | {"measurement": "quantization", "tokens": 1234}
    figures = {"uniform NF4": (100e6, 0.25, 8.4321, 0.771), "1.00": (100e6, 0.05, 6.5, 0.905)}
    save(
        tmp_path / "2026-02-01-quantization.jsonl",
        *(
            {
                **common,
                "text": text,
                "checkpoint": name,
                "bytes": size,
                "kl": kl,
                "perplexity": p,
                "top1": top1,
            }
            for text in ("maths", "prose")
            for name, (size, kl, p, top1) in figures.items()
        ),
    )
    made = tables.KINDS[2].section(tmp_path)
    assert "1,234 (maths), 1,234 (prose)" in made
    assert "| 1.00 | 100.0 |" + " 0.05 | 0.20 | 6.500 | 90.5 % |" * 2 in made


def test_no_results_is_said(tables: ModuleType, tmp_path: Path) -> None:
    assert all(kind.section(tmp_path) == tables.NOTHING for kind in tables.KINDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "no JSON object"),
        (json.dumps({k: v for k, v in row().items() if k != "p50_us"}), "lacks p50_us"),
        (json.dumps(row(impl="other")), "impl='other'"),
        (json.dumps(row(gpu="GPU B")), "two gpus in one file"),
    ],
)
def test_a_bad_result_names_its_line(
    line: str, message: str, tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "r.jsonl", row())
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write(line + "\n")
    assert tables.main(["--check", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "r.jsonl, line 2" in error


@pytest.mark.parametrize("text", ["none", "<!-- kernel-table:end --> <!-- kernel-table:begin -->"])
def test_a_readme_without_markers_is_refused(text: str, tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(tables.BadResult, match="kernel-table:begin"):
        tables.updated(text, tmp_path)


def test_the_benchmark_writes_what_is_read(tables: ModuleType) -> None:
    """Every key stands in the benchmark that writes it, and in the table of benchmarks/README.md."""
    described = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    programs = {"kernel": ["kernels"], "head": ["kernels", "head"], "quantization": ["quantization"]}
    for kind in tables.KINDS:
        files = [ROOT / "benchmarks" / f"{name}.py" for name in programs[kind.name]]
        if kind.name == "quantization":
            files.append(ROOT / "sloth_plugins" / "quantization" / "evaluate.py")
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        for key in kind.keys:
            assert f'"{key}"' in text, key
            assert f"`{key}`" in described, key


# Settings, commands, links


def test_the_settings_are_those_of_settings() -> None:
    lines = [line for line in section(README, "settings-table").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    fields = dataclasses.fields(Settings)
    assert [name for name, *_ in cells] == [f"`{field.name}`" for field in fields]
    defaults = ["`" + repr(getattr(Settings(), field.name)).replace("'", '"') + "`" for field in fields]
    assert [default for _, default, *_ in cells] == defaults
    allowed = {name.strip("`"): set(re.findall(r'`"(.*?)"`', cell)) for name, _, cell, _ in cells}
    assert allowed["kernels"] == set(get_args(Kernels))
    assert allowed["checkpointing"] == set(CHECKPOINTING)
    assert allowed["head_loss"] == set(get_args(HeadLoss))
    assert allowed["disable"] == set(OPS)
    for name, values in allowed.items():  # whatever is named as allowed is
        for value in values:
            Settings.from_mapping({name: value})


def test_the_commands_are_those_of_the_parser() -> None:
    block = README.split("## The command line")[1].split("```")[1]
    named = [line.split()[1] for line in block.strip().splitlines()]
    help_text = _parser().format_help()
    offered = re.findall(r"^    (\w+)\s", help_text.split("COMMAND\n")[1], flags=re.MULTILINE)
    assert named == offered != []


def test_adapters_that_are_not_there_are_not_promised() -> None:
    for trainer, package in (("Axolotl", "sloth_axolotl"), ("Lightning", "sloth_lightning")):
        here = any(ROOT.glob(f"adapters/*/{package}/__init__.py"))
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {trainer}")]
        assert ("coming" in line) == (not here), line


@pytest.mark.parametrize("document", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []
