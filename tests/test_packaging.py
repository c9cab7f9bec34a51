"""What is declared in pyproject.toml is what lies in the tree, and what a wheel holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_FILES = ("LICENSE", "README.md", "medvlm_harness.pth", "pyproject.toml", "setup.py")
# Folder in the repository -> package as installed.
TREES = {
    "medvlm_harness": "medvlm_harness",
    "model_backends": "medvlm_harness.model_backends",
    "perturbations": "medvlm_harness.perturbations",
    "tasks": "medvlm_harness.tasks",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
MEGABYTE = 2**20


def packages_of_the_tree() -> dict[str, Path]:
    """Package as installed -> its folder: each folder that holds an `__init__.py`."""
    found = {}
    for top, package in TREES.items():
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            found[".".join((package, *parts))] = init.parent
    return found


def data_of_the_tree() -> dict[str, Path]:
    """Path in a wheel -> file: what lies below our packages beside Python; a README only where a task folder has it."""
    found = {}
    for top, package in TREES.items():
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc") and (path.name != "README.md" or top == "tasks"):
                found["/".join((*package.split("."), *path.relative_to(ROOT / top).parts))] = path
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree: other builds leave folders behind that setuptools would pack again."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in TOP_FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in TREES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name)  # with __pycache__, which must not get in
    command = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def dist_info(wheel: Path) -> dict[str, str]:
    """The texts of the wheel's dist-info, by name within it."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if ".dist-info/" in name]
        return {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in inside}


def test_the_list_of_packages_is_the_tree() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_of_the_tree())


def test_each_package_maps_to_its_folder() -> None:
    mapping: dict[str, str] = SETUPTOOLS["package-dir"]
    for package, folder in packages_of_the_tree().items():
        nearest = max((name for name in mapping if f"{package}.".startswith(f"{name}.")), key=len)
        rest = package.removeprefix(nearest).strip(".").split(".") if package != nearest else []
        assert ROOT.joinpath(mapping[nearest], *rest) == folder


def test_every_module_lies_in_a_package() -> None:
    """A folder without `__init__.py` would run from the checkout, and be missing from the wheel."""
    folders = set(packages_of_the_tree().values())
    modules = {path for top in TREES for path in (ROOT / top).rglob("*.py")}
    assert {path for path in modules if path.parent not in folders} == set()


def test_every_module_and_data_file_is_in_the_wheel(names: list[str]) -> None:
    modules = {
        "/".join((*package.split("."), path.name))
        for package, folder in packages_of_the_tree().items()
        for path in folder.glob("*.py")
    }
    assert (modules | set(data_of_the_tree())) - set(names) == set()


@pytest.mark.parametrize(
    "name",
    [
        "medvlm_harness/py.typed",
        "medvlm_harness/data/mesh_chexpert.yaml",
        "medvlm_harness/metrics/factuality.yaml",
        "medvlm_harness/metrics/laterality.yaml",
        "medvlm_harness/metrics/mesh_findings.yaml",
        "medvlm_harness/data/r2gen_split.csv",
        "medvlm_harness/demo/tiny.json",
        "medvlm_harness/demo/tiny.safetensors",
        "medvlm_harness/labelers/terms/assertion.yaml",
        "medvlm_harness/model_backends/catalogue/chexzero.yaml",
        "medvlm_harness/model_backends/catalogue/medvlm-tiny.yaml",
        "medvlm_harness/labelers/terms/chexpert.yaml",
        "medvlm_harness/labelers/terms/sections.yaml",
        "medvlm_harness/tasks/demo_cxr/_demo_cxr_yaml",
        "medvlm_harness/tasks/iu_cxr/README.md",
        "medvlm_harness/tasks/iu_cxr/_iu_cxr_yaml",
        "medvlm_harness/tasks/iu_cxr/iu_cxr_zeroshot.yaml",
    ],
)
def test_what_the_code_reads_is_in_the_wheel(names: list[str], name: str) -> None:
    """Named one by one, so that a file that vanishes from the tree is missed too."""
    assert name in names


def test_each_data_file_is_matched_by_a_declared_pattern() -> None:
    declared = {
        (package.replace(".", "/"), pattern)
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
    }
    for name in data_of_the_tree():
        folders = [(str(PurePosixPath(name).relative_to(top)), p) for top, p in declared if name.startswith(f"{top}/")]
        assert any(_matches(rest, pattern) for rest, pattern in folders), f"{name}: no pattern of package-data"


def _matches(path: str, pattern: str) -> bool:
    """As setuptools globs: `*` stays in one folder, `**/` is any number of folders."""
    pieces = {"**/": "(?:[^/]+/)*", "*": "[^/]*"}
    regex = "".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*/|\*)", pattern))
    return re.fullmatch(regex, path) is not None


def test_nothing_else_is_at_the_root_of_the_wheel(names: list[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"medvlm_harness", "medvlm_harness.pth"}
    assert len(top) == 3


def test_the_wheel_holds_no_leftovers(names: list[str]) -> None:
    known = {".py", ".typed", ".yaml", ".csv", ".json", ".safetensors", ".md", ".html", ".css", ".js"}
    code = [name for name in names if name.startswith("medvlm_harness/")]
    strange = [name for name in code if PurePosixPath(name).suffix not in known and not name.endswith("_yaml")]
    assert strange == []


def test_the_pth_is_the_line_of_the_tree_and_only_that(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("medvlm_harness.pth").decode()
    assert text == (ROOT / "medvlm_harness.pth").read_text(encoding="utf-8")
    (line,) = text.splitlines()
    assert line.startswith("import medvlm_harness.plugin;")  # site runs only lines that begin with "import"


def test_no_file_is_large(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        large = {entry.filename: entry.file_size for entry in archive.infolist() if entry.file_size > 3 * MEGABYTE}
    assert large == {}
    assert wheel.stat().st_size < 3 * MEGABYTE


def test_entry_points_name_what_exists(dist_info: dict[str, str]) -> None:
    points = ConfigParser(delimiters=("=",), interpolation=None)
    points.optionxform = str  # type: ignore[assignment,method-assign]
    points.read_string(dist_info["entry_points.txt"])
    declared: dict[str, Any] = {"console_scripts": PYPROJECT["project"]["scripts"]}
    declared |= PYPROJECT["project"]["entry-points"]
    assert {section: dict(points[section]) for section in points.sections()} == declared
    assert declared["lm_eval.tasks"] == {"medvlm-harness": "medvlm_harness.tasks"}
    for group in declared.values():
        for target in group.values():
            module, _, attribute = target.partition(":")
            assert hasattr(import_module(module), attribute or "__path__"), target


def test_the_licence_is_inside_and_named(dist_info: dict[str, str]) -> None:
    assert dist_info["licenses/LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    metadata = Parser().parsestr(dist_info["METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"


def test_the_version_is_the_one_that_the_package_states(dist_info: dict[str, str]) -> None:
    import medvlm_harness

    metadata = Parser().parsestr(dist_info["METADATA"])
    assert metadata["Version"] == PYPROJECT["project"]["version"] == medvlm_harness.__version__


def test_the_wheel_is_pure_python(dist_info: dict[str, str]) -> None:
    assert "Tag: py3-none-any" in dist_info["WHEEL"]
    assert "Root-Is-Purelib: true" in dist_info["WHEEL"]
