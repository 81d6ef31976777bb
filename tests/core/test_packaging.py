"""What is shipped, what an import brings in, and that no name of ours stands in another package's place."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (".", "kernels", "adapters/hf_trainer", "adapters/axolotl", "adapters/lightning")
PACKAGES = ("sloth_plugins", "sloth_kernels", "sloth_hf_trainer", "sloth_axolotl", "sloth_lightning")


def run_python(code: str) -> Any:
    """What `code` prints as JSON, in a fresh Python that is started in the repository root."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / root) for root in SOURCE_ROOTS)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is written into the checkout."""
    pytest.importorskip("build")
    scratch = tmp_path_factory.mktemp("packaging")
    source = scratch / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*")
    source.mkdir()
    for name in ("sloth_plugins", "kernels", "adapters"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(scratch / "dist"),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (scratch / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_no_source_root_in_it(wheel: zipfile.ZipFile) -> None:
    entries = wheel.namelist()
    assert not [entry for entry in entries if entry.startswith(("kernels/", "adapters/", "tests/"))]
    tops = {entry.split("/")[0] for entry in entries if ".dist-info/" not in entry}
    assert set(PACKAGES) <= tops
    assert all(top.startswith("sloth_") for top in tops)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_has_the_package_with_its_types(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/__init__.py" in wheel.namelist()
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert any(entry.endswith("licenses/LICENSE") for entry in wheel.namelist())
    for extra in ("hf", "axolotl", "lightning", "quant", "demo", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_versions_agree(wheel: zipfile.ZipFile) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert Path(str(wheel.filename)).name.split("-")[1] == declared
    assert run_python("import json, sloth_plugins; print(json.dumps(sloth_plugins.__version__))") == declared
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == declared
    try:
        installed = importlib.metadata.version("sloth-plugins")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == declared


def test_import_kernels_in_the_root_is_not_ours() -> None:
    """In the repository root, `kernels/` may be seen as a namespace without code, but never as a package."""
    found = run_python(
        "import importlib.metadata, json\n"
        "try:\n"
        "    import kernels\n"
        "except ModuleNotFoundError:\n"
        "    print(json.dumps({'missing': True}))\n"
        "else:\n"
        "    try:\n"
        "        version = importlib.metadata.version('kernels')\n"
        "    except importlib.metadata.PackageNotFoundError:\n"
        "        version = None\n"
        "    file = getattr(kernels, '__file__', None)\n"
        "    print(json.dumps({'missing': False, 'file': file, 'installed': version}))\n"
    )
    if found["missing"]:
        return
    if found["installed"] is None:
        assert found["file"] is None  # a namespace without code
    else:
        assert found["file"] is not None
        assert not Path(found["file"]).is_relative_to(ROOT / "kernels")


def test_an_installed_kernels_package_wins(tmp_path: Path) -> None:
    """Even where the repository root comes first on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = (
        "import json, sys\n"
        f"sys.path[1:1] = [{str(ROOT / 'kernels')!r}]\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "import kernels, sloth_kernels\n"
        "print(json.dumps(kernels.__file__))\n"
    )
    assert run_python(code) == str(tmp_path / "kernels" / "__init__.py")


@pytest.mark.parametrize(
    "folder", ["kernels", "adapters", "adapters/hf_trainer", "adapters/axolotl", "adapters/lightning"]
)
def test_source_roots_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_import_of_the_core_is_light() -> None:
    loaded = run_python("import json, sys, sloth_plugins; print(json.dumps(sorted(sys.modules)))")
    unwanted = {
        "transformers",
        "triton",
        "peft",
        "trl",
        "accelerate",
        "bitsandbytes",
        "datasets",
        "lightning",
        "axolotl",
    }
    unwanted |= {"sloth_kernels", "sloth_hf_trainer", "sloth_axolotl", "sloth_lightning", "matplotlib"}
    assert "sloth_plugins" in loaded
    if importlib.util.find_spec("triton") and "triton" in run_python(
        "import json, sys, torch; print(json.dumps(sorted(sys.modules)))"
    ):
        unwanted.discard("triton")  # torch itself brought it
    assert not unwanted & set(loaded)
