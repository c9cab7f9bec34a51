"""The package as installed, from a wheel and editable: each in a fresh environment, run from another folder.

The environments see the dependencies of the interpreter that runs the tests, but not its installed medvlm-harness.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest

from medvlm_harness.demo.generate import prepare_demo

pytestmark = pytest.mark.install

ROOT = Path(__file__).resolve().parents[1]
FILES = ("LICENSE", "README.md", "medvlm_harness.pth", "pyproject.toml", "setup.py")
FOLDERS = ("medvlm_harness", "model_backends", "perturbations", "tasks")
MODEL_AND_TASK = ("--model", "medvlm-baseline", "--tasks", "demo_cxr_view", "--limit", "20")
RESULT = "|demo_cxr_view|      1|none  |     0|accuracy"
BROKEN_YAML = "class: !function medvlm_harness.ZeroShot\ntask: mine\nlables: []\n"


class Environment(NamedTuple):
    """A virtual environment, and the variables that its commands run under."""

    folder: Path
    variables: dict[str, str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(
        self, *command: str | Path, cwd: Path, status: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands, such as `lm_eval`, elsewhere."""
        program = self.folder / "bin" / command[0]
        done = subprocess.run(
            [program, *command[1:]],
            cwd=cwd,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that nothing left over from other builds gets in and nothing is left behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source))
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything that is installed here, but for this package."""
    folder = tmp_path_factory.mktemp("dependencies")
    for scheme in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for entry in Path(scheme).iterdir():
            if "medvlm_harness" not in entry.name and entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user cache, with the demo set in it."""
    folder = tmp_path_factory.mktemp("cache")
    prepare_demo(folder / "medvlm_harness" / "data" / "demo_cxr")
    return folder


@pytest.fixture(scope="session", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, dependencies: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """An environment with the package in it, in the two ways people install it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MEDVLM_", "PYTHON"))}
    variables |= {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment = Environment(tmp_path_factory.mktemp(request.param) / "venv", variables)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
    (_site_packages(environment) / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    for point in distribution("lm_eval").entry_points.select(group="console_scripts"):
        script = environment.folder / "bin" / point.name
        script.write_text(
            f"#!{environment.python}\nimport sys\nfrom {point.module} import {point.attr}\nsys.exit({point.attr}())\n",
            encoding="utf-8",
        )
        script.chmod(0o755)
    if request.param == "wheel":
        what = [str(request.getfixturevalue("wheel"))]
    else:
        what = ["--no-build-isolation", "--editable", str(request.getfixturevalue("source"))]
    elsewhere = environment.folder.parent
    environment.run("python", "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", *what, cwd=elsewhere)
    return environment


def _site_packages(environment: Environment) -> Path:
    (folder,) = environment.folder.glob("lib/python*/site-packages")
    return folder


def test_the_package_that_runs_is_the_installed_one(installed: Environment, source: Path, tmp_path: Path) -> None:
    code = "import medvlm_harness, sys; print(medvlm_harness.__file__, 'torch' in sys.modules)"
    file, imported_torch = installed.run("python", "-c", code, cwd=tmp_path).stdout.split()
    assert Path(file).parent in (_site_packages(installed) / "medvlm_harness", source / "medvlm_harness")
    assert imported_torch == "False"


def test_lm_eval_lists_our_tasks(installed: Environment, tmp_path: Path) -> None:
    listed = installed.run("lm_eval", "ls", "tasks", cwd=tmp_path).stdout
    for name in ("iu_cxr_zeroshot", "demo_cxr_zeroshot", "hellaswag"):
        assert f"|{name} " in listed


@pytest.mark.parametrize("start", [("lm_eval", "run"), ("python", "-m", "lm_eval")], ids=["run", "module_without_run"])
def test_the_stock_command_runs_our_model_on_our_task(
    installed: Environment, start: tuple[str, ...], tmp_path: Path
) -> None:
    done = installed.run(*start, *MODEL_AND_TASK, cwd=tmp_path)
    assert RESULT in done.stdout
    assert "95% interval" in done.stdout
    assert "medvlm-harness:" not in done.stderr, "a patch failed"


def test_a_python_file_runs_our_model_on_our_task(installed: Environment, tmp_path: Path) -> None:
    file = tmp_path / "evaluate_it.py"
    file.write_text(
        "import lm_eval\n"
        "results = lm_eval.simple_evaluate(model='medvlm-baseline', tasks=['demo_cxr_view'], limit=20)\n"
        "print(results['results']['demo_cxr_view']['accuracy,none'], sorted(results['medvlm']['tasks']))\n",
        encoding="utf-8",
    )
    accuracy, tasks = installed.run("python", file, cwd=tmp_path).stdout.split(maxsplit=1)
    assert 0 < float(accuracy) < 1
    assert tasks.strip() == "['demo_cxr_view']"


def test_broken_yaml_of_the_user_is_one_line_and_status_2(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.yaml").write_text(BROKEN_YAML, encoding="utf-8")
    done = installed.run("lm_eval", "run", *MODEL_AND_TASK, "--include_path", "mine", cwd=tmp_path, status=2)
    errors = [line for line in done.stderr.splitlines() if " WARNING " not in line and " INFO " not in line]
    assert errors == ["error: mine/broken.yaml: unknown key 'lables'. Did you mean labels, aliases?"]


def test_medvlm_is_on_the_path_and_finds_the_plug_in_active(installed: Environment, tmp_path: Path) -> None:
    assert "demo_cxr_view" in installed.run("medvlm", "ls", cwd=tmp_path).stdout
    assert "active" in installed.run("medvlm", "doctor", cwd=tmp_path).stdout
    off = installed.run("medvlm", "doctor", cwd=tmp_path, status=1, MEDVLM_NO_AUTOLOAD="1")
    assert "NOT active" in off.stdout


def test_no_autoload_makes_lm_eval_its_own_again(installed: Environment, tmp_path: Path) -> None:
    done = installed.run("lm_eval", *MODEL_AND_TASK, cwd=tmp_path, status=1, MEDVLM_NO_AUTOLOAD="1")
    assert "Tasks not found: demo_cxr_view" in done.stderr


@pytest.mark.parametrize("name", ["tasks", "model_backends", "perturbations", "tests", "benchmarks"])
def test_nothing_of_ours_is_importable_by_a_general_name(installed: Environment, name: str, tmp_path: Path) -> None:
    code = f"from importlib.util import find_spec; print(find_spec({name!r}))"
    assert installed.run("python", "-c", code, cwd=tmp_path).stdout.strip() == "None"


def test_uninstalling_removes_everything(installed: Environment, tmp_path: Path) -> None:
    """Last in the file: nothing can run after it."""
    assert (_site_packages(installed) / "medvlm_harness.pth").is_file()
    installed.run("python", "-m", "pip", "--quiet", "uninstall", "--yes", "medvlm-harness", cwd=tmp_path)
    left = [path.name for path in _site_packages(installed).iterdir() if "medvlm" in path.name]
    assert left == []
    assert not (installed.folder / "bin" / "medvlm").exists()
    started = installed.run("python", "-c", "print('fine')", cwd=tmp_path)
    assert (started.stdout, started.stderr) == ("fine\n", "")
