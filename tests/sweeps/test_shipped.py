"""The sweeps that come with the package: each is read, and each of its cells has tasks and options that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medvlm_harness.plugin import tasks_folder
from medvlm_harness.sweeps.cells import make_cells
from medvlm_harness.sweeps.declaration import placeholders, read_sweep, shipped_sweeps
from medvlm_harness.tracks.declarations import declared_names

SHIPPED = shipped_sweeps()


def needed(path: Path) -> dict[str, str]:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: f"/models/{name}" for name, must in placeholders(raw).items() if must}


def test_what_the_architecture_of_a_study_needs_is_shipped() -> None:
    assert {"quantization", "preprocessing", "architecture", "tokenizers", "prompts"} <= SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_called_as_its_file_and_says_what_it_varies(name: str) -> None:
    sweep = read_sweep(SHIPPED[name], needed(SHIPPED[name]))
    assert sweep.name == name and sweep.summary
    assert sweep.compare.references, "nothing would be compared"
    if any("efficiency" in task for task in sweep.tasks):
        assert sweep.executor.parallel == 1, "cells at work at once slow each other down"


@pytest.mark.parametrize("name", SHIPPED)
def test_each_cell_of_a_shipped_sweep_can_be_run(name: str) -> None:
    import lm_eval.models  # noqa: F401  # fills the registry
    from lm_eval.api.registry import get_model

    for cell in make_cells(read_sweep(SHIPPED[name], needed(SHIPPED[name]))):
        assert set(cell.tasks) <= declared_names(tasks_folder()).keys()
        backend: Any = get_model(cell.model)
        backend.refuse_options(cell.args)


def test_the_flip_rate_of_the_architectures_is_of_what_is_asked_in_other_words() -> None:
    cells = make_cells(read_sweep(SHIPPED["architecture"], needed(SHIPPED["architecture"])))
    changed = [cell for cell in cells if cell.place["reports"] != "as-written"]
    assert changed and all("--metadata" in cell.arguments for cell in changed)
    assert not any("efficiency" in task or "image" in task for cell in changed for task in cell.tasks)
