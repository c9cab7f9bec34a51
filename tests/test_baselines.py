"""benchmarks/baselines.yaml lists the field's models; the page says of each what it scored, or that it was not run."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from medvlm_harness.model_backends.catalogue import catalogue
from medvlm_harness.plugin import model_targets
from medvlm_harness.sweeps.declaration import Sweep, read_sweep

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMED = {
    *("chexzero", "medclip", "biomedclip", "xraygpt", "llava-med", "medfilip", "medbridge"),
    *("distilbert", "tinybert-4l", "bio-clinicalbert", "t5-small"),
}


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baselines", FOLDER / "baselines.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declared(weights: Path) -> Sweep:
    return read_sweep(FOLDER / "baselines.yaml", {"WEIGHTS": str(weights)})


def test_every_named_model_is_there_with_its_card(tmp_path: Path) -> None:
    models = {model.name: model for model in declared(tmp_path).models}
    assert models.keys() >= NAMED
    for name, model in models.items():
        assert model.model in model_targets()
        if "card" in model.args:
            assert catalogue()[str(model.args["card"])].run.model == model.model, name


def test_a_model_without_weights_is_not_run(baselines: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "chexzero").mkdir()
    (tmp_path / "medclip").mkdir()  # but not the folder of its tokenizer
    sweep = declared(tmp_path)
    absent = {model.name: path for model in sweep.models if (path := baselines.absent_weights(model, tmp_path))}
    assert "chexzero" not in absent and "prior" not in absent
    assert absent["medclip"] == tmp_path / "bio-clinicalbert"
    page = baselines.page(sweep, absent, {}, {"chexzero": "out of memory"})
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert rows["biomedclip"].rstrip(" |").endswith("not run: no weights at biomedclip")
    assert rows["chexzero"].rstrip(" |").endswith("not run: out of memory")
    assert "unpinned" in rows["biomedclip"]


def test_the_page_has_a_row_for_each(baselines: ModuleType, tmp_path: Path) -> None:
    rows = {line.split("|")[1].strip() for line in baselines.PAGE.read_text().splitlines() if line.startswith("| ")}
    assert rows == {"Model", *(model.name for model in declared(tmp_path).models)}
