"""What a classification track fits on, from its documents to its results."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.requests import LabelScores
from medvlm_harness.tracks.text_zero_shot import TextZeroShot
from medvlm_harness.tracks.zero_shot import ZeroShot

RowsOf = Callable[..., list[Any]]
LABELS = ["Edema", "Fracture"]
VIEWS = ("frontal", "lateral")
SPLITS = ("train",) * 60 + ("validation",) * 120 + ("test",) * 150 + ("unassigned",) * 10


@pytest.fixture(scope="module")
def studies(fake_image: Callable[..., Image]) -> list[Study]:
    """Edema is common, fractures are not; the image's name says what there is."""
    rng = np.random.default_rng(12)
    found = []
    for k, split in enumerate(SPLITS):
        values = {"Edema": int(rng.random() < 0.4), "Fracture": int(rng.random() < 0.1)}
        images = tuple(fake_image(f"{split}_{k}_{values['Edema']}{values['Fracture']}_{v}.png", v) for v in VIEWS)
        sex = {"sex": "FM"[k % 2]} if k % 5 else {}
        found.append(
            Study(f"s{k:03}", f"p{k}", images, findings=f"f {k}", labels={"rules": values}, subgroups=sex, split=split)
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], studies: list[Study]) -> Path:
    return write_set(tmp_path_factory.mktemp("fits") / "set", studies, label_names=tuple(LABELS))


def task(folder: Path, kind: type[ZeroShot] = ZeroShot, **config: Any) -> Any:
    metadata = {"data_dir": str(folder), **config.pop("metadata", {})}
    views = {"views": ["frontal"]} if kind is ZeroShot else {}
    declared = {"task": "t", "dataset": "synthetic", "labels": LABELS, **views, **config, "metadata": metadata}
    return kind({key: value for key, value in declared.items() if value is not None})


def seeing(requests: Sequence[Instance]) -> list[LabelScores]:
    """Log-odds that are better than chance, from the truth that the document carries, and noise by input."""
    answers = []
    for request in requests:
        rng = np.random.default_rng(int(str(request.arguments[0])[:8], 16))
        margin = rng.normal([1.5 * (value or 0) - 1 for value in request.doc["target"]])
        probability = 1 / (1 + np.exp(-margin))
        if request.arguments[1].kind == "multiclass":
            probability = probability / probability.sum()
        answers.append(LabelScores(tuple(margin.tolist()), tuple(probability.tolist())))
    return answers


def plain(estimates: Any) -> dict[str, Any]:
    return {name: estimate.to_dict() for name, estimate in estimates.items()}


@pytest.mark.parametrize("kind", [ZeroShot, TextZeroShot])
def test_validation_is_asked_about_and_test_is_scored(folder: Path, rows_of: RowsOf, kind: type[ZeroShot]) -> None:
    one = task(folder, kind)
    rows = rows_of(one, seeing)
    estimates = one.estimates(rows)
    assert [row.split for row in rows] == ["test"] * 150 + ["validation"] * 120
    assert {estimates[name].n for name in ("auroc", "brier", "ece_scaled", "f1_at_youden", "auroc_head")} == {150}
    details = one.details()
    assert details["fitted_on"] == {"split": "validation", "items": 120, "studies": 120, "reason": None}
    assert details["counts"]["validation_studies_to_fit_on"] == 120
    assert list(details["subgroups"]) == ["sex"]
    assert {record["split"] for record in one.score_records(one.rows)} == {"test"}
    # The rates at the threshold of validation, by hand.
    column = {row.study_id: row.scores.margin[0] for row in rows}
    truth = {study.study_id: study.labels["rules"]["Edema"] for study in one.data.studies}
    threshold = details["operating_points"]["youden"]["edema"]["threshold"]["value"]
    found = [column[s.study_id] >= threshold for s in one.data.studies if s.split == "test" and truth[s.study_id]]
    assert details["operating_points"]["youden"]["edema"]["sensitivity"]["value"] == pytest.approx(np.mean(found))


def test_test_labels_move_no_threshold_and_validation_labels_do(
    folder: Path, rows_of: RowsOf, studies: list[Study], tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    def fitted(where: Path) -> Any:
        one = task(where)
        rows = rows_of(task(folder), seeing)  # the same answers, whatever the labels
        targets = {doc["file"]: doc["targets"] for doc in (*one.documents, *one.fitting_documents)}
        one.estimates([pickle.loads(pickle.dumps(row)) for row in with_targets(rows, targets)])  # noqa: S301
        details = one.details()
        return (
            [details["operating_points"][point]["edema"]["threshold"] for point in ("youden", "sensitivity_90")],
            [its["scaling"] for its in details["calibration"].values()],
        )

    def relabelled(split: str) -> Path:
        flipped = {"rules": {"Edema": 0, "Fracture": 1}}
        changed = [
            Study(**{**fields_of(study), "labels": flipped if study.split == split and k % 2 else study.labels})
            for k, study in enumerate(studies)
        ]
        return write_set(tmp_path / split, changed, label_names=tuple(LABELS))

    assert fitted(folder) == fitted(relabelled("test"))
    assert fitted(folder) != fitted(relabelled("validation"))


def fields_of(study: Study) -> dict[str, Any]:
    return {name: getattr(study, name) for name in Study.__slots__}


def with_targets(rows: Sequence[Any], targets: Any) -> list[Any]:
    changed = []
    for row in rows:
        its = {source: tuple(values) for source, values in targets[row.image].items()}
        changed.append(type(row)(row.study_id, row.patient_id, row.split, row.image, row.scores, its))
    return changed


@pytest.mark.parametrize(("split", "scored", "judged"), [("all", 340, 220), ("validation+test", 270, 150)])
def test_where_validation_is_chosen_what_was_fitted_is_judged_outside_of_it(
    folder: Path, rows_of: RowsOf, split: str, scored: int, judged: int
) -> None:
    one = task(folder, metadata={"split": split})
    assert one.fitting_documents == []
    estimates = one.estimates(rows_of(one, seeing))
    assert estimates["ece"].n == estimates["aurc"].n == scored
    assert estimates["ece_scaled"].n == estimates["f1_at_youden"].n == estimates["sensitivity_head"].n == judged
    assert one.details()["fitted_on"]["items"] == one.details()["counts"]["validation_studies_to_fit_on"] == 120
    usual = task(folder)
    usual.estimates(rows_of(usual, seeing))
    assert one.details()["calibration"]["edema"]["scaling"] == usual.details()["calibration"]["edema"]["scaling"]


def test_validation_alone_has_nothing_to_judge_on(folder: Path, rows_of: RowsOf) -> None:
    one = task(folder, metadata={"split": "validation"})
    estimates = one.estimates(rows_of(one, seeing))
    assert estimates["ece_scaled"].reason == "nothing is scored outside of what was fitted on"
    assert np.isfinite(estimates["ece"].value) or estimates["ece"].reason


def test_a_limit_takes_as_many_of_validation_and_samples_none(folder: Path, rows_of: RowsOf) -> None:
    limited, asked = task(folder), task(folder)
    estimates = limited.estimates(rows_of(limited, seeing, limit=40))
    assert (len(limited.rows), limited.details()["fitted_on"]["items"]) == (40, 40)
    estimates = asked.estimates(rows_of(asked, seeing, samples=[3, 5, 100]))
    assert {row.split for row in asked.rows} == {"test"} and asked.details()["fitted_on"]["items"] == 0
    assert estimates["f1_at_youden"].reason == "--samples leaves out validation, which is fitted on"


def test_a_set_without_validation_says_so(
    studies: list[Study], rows_of: RowsOf, tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    without = [study for study in studies if study.split != "validation"]
    one = task(write_set(tmp_path / "set", without, label_names=tuple(LABELS)))
    estimates = one.estimates(rows_of(one, seeing))
    assert estimates["ece_scaled"].reason == "synthetic has nothing in split validation to fit on"
    assert estimates["aurc"].ci95[0] < estimates["aurc"].value
    assert one.details()["fitted_on"]["reason"] == estimates["ece_scaled"].reason


@pytest.mark.parametrize("split", ["test", "all"])
def test_a_patient_who_is_scored_is_not_fitted_on(
    studies: list[Study], rows_of: RowsOf, tmp_path: Path, write_set: Callable[..., Path], split: str
) -> None:
    scored = next(study for study in studies if study.split == "test")
    again = next(study for study in studies if study.split == "validation")
    both = [Study(**{**fields_of(s), "patient_id": scored.patient_id}) if s is again else s for s in studies]
    one = task(write_set(tmp_path / "set", both, label_names=tuple(LABELS)), metadata={"split": split})
    one.estimates(rows_of(one, seeing))
    assert one.details()["fitted_on"]["items"] == 119


def test_several_processes_give_the_estimates_of_one(folder: Path, rows_of: RowsOf) -> None:
    one = task(folder)
    alone = one.estimates(rows_of(one, seeing))
    gathered: list[Any] = []
    for rank in range(2):
        gathered += pickle.loads(pickle.dumps(rows_of(task(folder), seeing, rank=rank, world_size=2)))  # noqa: S301
    first = task(folder)
    assert plain(first.estimates(gathered)) == plain(alone)
    assert first.details() == one.details()
    shuffled = [gathered[k] for k in np.random.default_rng(0).permutation(len(gathered))]
    other = task(folder)
    assert plain(other.estimates(shuffled)) == plain(alone)


def test_views_are_subgroups_where_several_are_scored(folder: Path, rows_of: RowsOf) -> None:
    one = task(folder, views=None)
    estimates = one.estimates(rows_of(one, seeing))
    assert one.attributes == ("view", "sex") and "auroc_gap_view" in estimates
    groups = one.details()["subgroups"]["view"]["edema"]["groups"]
    assert {name: group["n"] for name, group in groups.items()} == {"frontal": 150, "lateral": 150}
    assert "auroc_gap_view" not in task(folder).metric_names()


def test_exclusive_options_have_a_temperature_of_validation(folder: Path, rows_of: RowsOf) -> None:
    options = {"kind": "multiclass", "options": {"frontal": "front", "lateral": "side"}}
    one = task(folder, labels=options, target="view", views=None)
    estimates = one.estimates(rows_of(one, seeing))
    assert one.details()["fitted_on"] == {"split": "validation", "items": 240, "studies": 120, "reason": None}
    assert one.details()["calibration"]["answer"]["scaling"]["fitted"] == "temperature"
    assert estimates["brier"].n == estimates["brier_scaled"].n == 300
    chosen = task(folder, labels=options, target="view", views=None, metadata={"split": "all"})
    found = chosen.estimates(rows_of(chosen, seeing))
    assert (found["brier"].n, found["brier_scaled"].n) == (680, 440)


@pytest.mark.parametrize("at_run_time", [False, True])
def test_the_scaling_is_chosen_by_the_yaml_or_the_run(folder: Path, rows_of: RowsOf, at_run_time: bool) -> None:
    said = {"metadata": {"scaling": "temperature"}} if at_run_time else {"scaling": "temperature"}
    one = task(folder, **said)
    one.estimates(rows_of(one, seeing))
    assert one.details()["calibration"]["edema"]["scaling"]["fitted"] == "temperature"
    with pytest.raises(UserError, match="scaling to be one of temperature, platt, but got 'isotonic'"):
        task(folder, metadata={"scaling": "isotonic"})


def test_errors_and_gaps_are_better_when_they_are_low(folder: Path) -> None:
    better = task(folder).higher_is_better()
    assert not any(better[name] for name in ("brier", "ece_scaled", "aurc", "auroc_gap_sex"))
    assert all(better[name] for name in ("auroc", "brier_skill", "auroc_tail", "f1_at_youden"))
