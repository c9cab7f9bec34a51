"""What an import pulls in, by name: seconds depend on the machine, names do not."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "open_clip", "scipy", "sklearn", "PIL", "yaml", "typer", "lm_eval", "spacy")


def imported_by(code: str) -> set[str]:
    """Top-level modules in `sys.modules` of a fresh interpreter after running the code."""
    code += "\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import medvlm_harness").intersection(HEAVY) == set()


def test_the_plug_in_imports_nothing_heavy() -> None:
    code = "import medvlm_harness.plugin as plugin\nplugin.autoload()\nplugin.install()"
    assert imported_by(code).intersection(HEAVY) == set()


def test_the_version_costs_no_heavy_import() -> None:
    assert imported_by("import medvlm_harness\nmedvlm_harness.__version__").intersection(HEAVY) == set()


def test_errors_are_light() -> None:
    assert imported_by("import medvlm_harness.errors").intersection(HEAVY) == set()


@pytest.mark.parametrize(
    "module", ["medvlm_harness.cli", "medvlm_harness.tracks.declarations", "medvlm_harness.perturbations.image"]
)
def test_listing_and_checking_need_no_torch(module: str) -> None:
    assert "torch" not in imported_by(f"import {module}")


@pytest.mark.parametrize("arguments", [[], ["chexzero"], ["--markdown"]])
def test_models_are_listed_and_shown_without_torch(arguments: list[str]) -> None:
    command = f"sys.argv = {['medvlm', 'models', *arguments]}"
    code = f"import sys, contextlib, io\nfrom medvlm_harness.cli import main\n{command}\n"
    code += "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()"
    modules = imported_by(code)
    assert "yaml" in modules and "torch" not in modules


def test_every_public_name_is_reached_by_attribute() -> None:
    code = "import medvlm_harness\nfor name in medvlm_harness.__all__: assert getattr(medvlm_harness, name)"
    assert "torch" in imported_by(code)  # a backend needs it: this is what the lazy names put off
