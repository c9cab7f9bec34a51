from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.results.report.cautions import all_cautions, cautions, cautions_between
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.run_files import RunFiles, read_run

from .conftest import as_model

TASK = "demo_cxr_zeroshot"


def task(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda block: block["tasks"][TASK].update(values)


def model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda block: (as_model("m")(block), block["model"].update(values))[0]


SEEN = {"trained_on": ["x"], "splits_seen": ["train", "test"], "note": None}
HOME = {"trained_on": ["x"], "splits_seen": ["train"], "note": None}


@pytest.mark.parametrize(
    ("edit", "kind", "severe"),
    [
        (task(contamination=SEEN), "Contaminated", True),
        (task(contamination=HOME), "Home data", False),
        (task(contamination={**HOME, "splits_seen": [], "note": "nothing is known"}), "Training data", False),
        (task(scored=5), "Limited run", True),
        (task(remote="models.example"), "Sent elsewhere", False),
        (task(split="train"), "Split", False),
        (task(perturbation={"name": "gaussian_noise", "severity": 3}), "Disturbed inputs", True),
        (task(truncated_share={"report": 0.4}), "Texts cut", False),
        (model(weights_sha256=None), "Unpinned weights", True),
        (model(), "Local weights", False),
        (model(), "Cost not measured", False),
        (lambda block: block["model"].update(card=None), "Unknown model", False),
    ],
)
def test_each_thing_to_know_is_said(
    guessing: RunFiles, edited: Callable[..., RunFiles], edit: Any, kind: str, severe: bool
) -> None:
    found = {one.kind: one for one in cautions(edited(guessing, edit))}
    assert found[kind].severe is severe
    assert kind not in {one.kind for one in cautions(guessing)}  # nor is it said without a cause


def test_label_source_and_few_positives_are_said_of_the_demo(guessing: RunFiles) -> None:
    kinds = [one.kind for one in cautions(guessing)]
    assert "Label source" in kinds
    assert sum(one.severe for one in cautions(guessing)) == 0


def test_what_differs_between_runs_is_said_and_like_runs_have_nothing(
    guessing: RunFiles, edited: Callable[..., RunFiles]
) -> None:
    newer = edited(guessing, lambda block: block["versions"].update(torch="99.0"))
    (caution,) = cautions_between(ReportRuns({"a": guessing, "b": newer}))
    assert caution.kind == "Other software"
    assert "99.0 (b)" in caution.text
    assert cautions_between(ReportRuns({"a": guessing, "b": guessing})) == []


def test_what_runs_share_stands_once(guessing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    runs = ReportRuns({"a": edited(guessing, task(scored=5)), "b": edited(guessing, task(scored=5))})
    (limited,) = (item for item in all_cautions(runs) if item[0].kind == "Limited run")
    assert limited[1] == ["a", "b"]
    assert limited[0].tasks == (TASK,)


def test_a_file_that_was_changed_after_the_run_is_named_first(guessing: RunFiles, tmp_path: Path) -> None:
    path = shutil.copytree(guessing.path.parent, tmp_path / "copy") / guessing.path.name
    assert "Changed" not in {caution.kind for caution in cautions(read_run(path))}
    results = json.loads(path.read_text(encoding="utf-8"))
    results["medvlm"]["tasks"][TASK]["metrics"]["auroc"]["value"] = 0.99
    path.write_text(json.dumps(results), encoding="utf-8")
    first = cautions(read_run(path))[0]
    assert first.severe and f"{path.name} was changed after the run: medvlm.tasks.{TASK}.metrics" in str(first)
