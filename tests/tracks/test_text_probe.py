from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import roc_auc_score

from medvlm_harness.data.labels import resolve
from medvlm_harness.data.records import Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import Embedding, TextRef
from medvlm_harness.results.plan import distinct_inputs
from medvlm_harness.tracks.text_probe import TextProbe
from medvlm_harness.training.linear_probe import linear_probe

RowsOf = Callable[..., list[Any]]
LABELS = ["Cardiomegaly", "Edema", "Fracture"]
D = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    """Labels that can be learnt, that are noise, and that the train split has once."""
    rng = np.random.default_rng(6)
    studies = []
    for k in range(260):
        values = {"Cardiomegaly": int(k % 3 == 0), "Edema": int(rng.choice([1, 0, -1])), "Fracture": int(k in (0, 170))}
        studies.append(
            Study(
                f"s{k:03}",
                f"p{k}",
                findings="" if k % 40 == 7 else f"{'large' if k % 3 == 0 else 'normal'} heart {k}",
                labels={"rules": values, "mesh": {**values, "Edema": None}} if k % 11 else {},
                split="train" if k < 160 else "test",
            )
        )
    return write_set(tmp_path_factory.mktemp("probe") / "set", studies)


def task(folder: Path, **config: Any) -> TextProbe:
    metadata = {"data_dir": str(folder), **config.pop("metadata", {})}
    return TextProbe({"task": "p", "dataset": "synthetic", "labels": LABELS, **config, "metadata": metadata})


def vector(text: str) -> np.ndarray:
    raw = np.random.default_rng(int(TextRef(text)[:8], 16)).standard_normal(D).astype(np.float32)
    raw[2] += 2 * text.startswith("large")
    return raw / np.linalg.norm(raw)


def encoder(requests: Sequence[Instance]) -> list[Embedding]:
    return [Embedding(vector(request.arguments[0].text), False) for request in requests]


def split(folder: Path, name: str) -> list[Study]:
    return [study for study in read_dataset(folder).studies if study.split == name and study.findings]


def labels(studies: Sequence[Study], name: str) -> np.ndarray:
    values = [resolve(study.labels.get("rules"), name) for study in studies]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


@pytest.fixture(scope="module")
def scored(rows_of: RowsOf, folder: Path) -> tuple[TextProbe, list[Any]]:
    one = task(folder, no_finding={"except": []}, metadata={"label_source": "rules"})
    rows = rows_of(one, encoder)
    one.estimates(rows)
    return one, rows


def test_auroc_is_that_of_a_probe_by_itself_averaged_over_the_seeds(folder: Path, scored: Any) -> None:
    one, rows = scored
    train, test = split(folder, "train"), split(folder, "test")
    x, x_test = (np.stack([vector(study.findings) for study in side]) for side in (train, test))
    patients = [[study.patient_id for study in side] for side in (train, test)]
    for name in LABELS[:2]:
        probe = linear_probe(x, labels(train, name), patients[0], x_test, patients[1])
        y = labels(test, name)
        known = ~np.isnan(y)
        areas = [roc_auc_score(y[known], margin[known]) for margin in probe.margin]
        estimate = one.estimates(rows)[f"auroc_{name.lower()}"]
        assert estimate.value == pytest.approx(np.mean(areas), abs=1e-9)
        assert estimate.extra["seeds"] == pytest.approx(areas, abs=1e-9)
        assert estimate.extra["spread"] == pytest.approx(max(areas) - min(areas), abs=1e-9)
        assert (estimate.n, estimate.positives) == (known.sum(), y[known].sum())
        assert estimate.ci95[0] < estimate.value < estimate.ci95[1]
        assert estimate.method.startswith("mean over 3 seeds; ")
        chosen = one.details()["probe"]["labels"][name.lower()]
        assert chosen["penalty"] == list(probe.penalty) and chosen["positives"] == probe.positives
    assert one.estimates(rows)["auroc_cardiomegaly"].value > 0.85


def test_a_label_that_cannot_be_learnt_is_undefined_and_in_no_mean(scored: Any) -> None:
    one, rows = scored
    estimates = one.estimates(rows)
    assert np.isnan(estimates["auroc_fracture"].value)
    assert "two of each are needed" in estimates["auroc_fracture"].reason
    mean = (estimates["auroc_cardiomegaly"].value + estimates["auroc_edema"].value) / 2
    assert estimates["auroc"].value == pytest.approx(mean)
    assert estimates["auroc"].extra["labels"] == ["cardiomegaly", "edema"]
    assert np.isfinite(estimates["auroc_no_finding"].value)
    assert estimates["average_precision"].floor is not None


def test_the_floor_repeats_what_training_studies_of_the_same_words_have(
    rows_of: RowsOf, tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    """Half of the test texts stand in the train split, with their labels; of the others nothing is known."""
    studies = []
    for k in range(80):
        text, value = f"text {k % 40}", int(k % 40 < 20)
        split = "train" if k < 40 else "test"
        if k >= 40 and k % 2:
            text = f"other {k}"
        studies.append(Study(f"s{k}", f"p{k}", findings=text, labels={"rules": {"Edema": value}}, split=split))
    one = task(write_set(tmp_path / "set", studies), labels=["Edema"])
    estimate = one.estimates(rows_of(one, encoder))["auroc_edema"]
    # By hand: known positives, then unknown texts, then known negatives.
    truth, guess = [1] * 20 + [0] * 20, ([1, 0] * 10) + ([-1, 0] * 10)
    assert estimate.extra["floors"] == {"constant": 0.5, "repeats": pytest.approx(roc_auc_score(truth, guess))}
    assert estimate.floor == pytest.approx(roc_auc_score(truth, guess)) and estimate.floor > 0.8


def test_only_documents_of_the_chosen_split_are_scored(folder: Path, scored: Any) -> None:
    one, rows = scored
    assert [row.study_id for row in rows] == [study.study_id for study in split(folder, "test")]
    assert one.details()["scored"] == one.details()["documents"] == len(rows)
    assert one.details()["counts"]["training_studies"] == len(split(folder, "train"))
    records = list(one.score_records(one.rows))
    assert len(records) == 3 * len(rows) and {record["split"] for record in records} == {"test"}
    assert {record.get("margin") for record in records if record["label"] == "Fracture"} == {None}


@pytest.mark.parametrize("options", [{"limit": 5}, {"samples": [3, 60, 1]}])
def test_the_whole_train_split_is_asked_for_whatever_is_limited(
    rows_of: RowsOf, folder: Path, options: dict[str, Any]
) -> None:
    one = task(folder)
    rows = rows_of(one, encoder, **options)
    asked = {instance.doc["study_id"] for instance in one.instances} - {row.study_id for row in rows}
    assert asked == {study.study_id for study in split(folder, "train")}
    assert len(rows) == (5 if "limit" in options else 3)
    whole = task(folder)
    margins = {r["study"]: r for r in records(whole, rows_of(whole, encoder)) if r["label"] == "Cardiomegaly"}
    for record in records(one, rows):
        if record["label"] == "Cardiomegaly":
            assert record["margin"] == pytest.approx(margins[record["study"]]["margin"], abs=1e-9)


def records(one: TextProbe, rows: list[Any]) -> list[dict[str, Any]]:
    one.estimates(rows)
    return list(one.score_records(one.rows))


@pytest.mark.parametrize("limit", [None, 1, 7])
def test_several_processes_give_the_estimates_of_one(rows_of: RowsOf, folder: Path, limit: int | None) -> None:
    one = task(folder)
    alone = one.estimates(rows_of(one, encoder, limit=limit))
    gathered: list[Any] = []
    asked: list[str] = []
    for rank in range(3):
        process = task(folder)
        rows = rows_of(process, encoder, limit=limit, rank=rank, world_size=3)
        asked += [i.doc["study_id"] for i in process.instances if i.doc["split"] == "train"]
        gathered += pickle.loads(pickle.dumps(rows))  # noqa: S301  # as processes send them
    assert sorted(asked) == [study.study_id for study in split(folder, "train")]  # each once
    first = task(folder)
    assert first.aggregation()["auroc"](gathered) == pytest.approx(alone["auroc"].value, nan_ok=True)
    plain = {name: estimate.to_dict() for name, estimate in first.estimates(gathered).items()}
    assert plain == {name: estimate.to_dict() for name, estimate in alone.items()}


def test_rows_may_come_in_any_order(folder: Path, scored: Any) -> None:
    one, rows = scored
    other = task(folder, no_finding={"except": []}, metadata={"label_source": "rules"})
    other.build_all_requests()
    found = other.estimates([rows[k] for k in np.random.default_rng(0).permutation(len(rows))])
    assert {k: v.value for k, v in found.items()} == pytest.approx(
        {k: v.value for k, v in one.estimates(rows).items()}, nan_ok=True
    )


def test_how_far_the_mean_scores_can_be_trusted_with_validation_to_fit_on(
    rows_of: RowsOf, folder: Path, tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    def validation(study: Study) -> bool:
        return study.split == "test" and int(study.study_id[1:]) % 2 == 0

    studies = [replace(s, split="validation") if validation(s) else s for s in read_dataset(folder).studies]
    options = {"no_finding": {"except": []}, "metadata": {"label_source": "rules"}}
    one, usual = (task(where, **options) for where in (write_set(tmp_path / "set", studies), folder))
    estimates = one.estimates(rows_of(one, encoder))
    usual.estimates(rows_of(usual, encoder))
    assert tuple(estimates) == one.metric_names()
    asked = {s.study_id for s in studies if s.findings and s.split == "test"}
    assert {row.study_id for row in one.rows} == asked
    assert one.details()["fitted_on"]["items"] == sum(bool(s.findings) and s.split == "validation" for s in studies)
    # The probes and what they say of a study do not depend on what is fitted on them.
    written = {(r["study"], r["label"]): r for r in usual.score_records(usual.rows)}
    own = list(one.score_records(one.rows))
    assert {record["study"] for record in own} == asked
    for record in own:
        same = written[record["study"], record["label"]]
        assert record.get("margin") == pytest.approx(same.get("margin"), abs=1e-9)
    # By hand, of the scores as they are written.
    errors = {name: [] for name in ("Cardiomegaly", "Edema")}
    for record in own:
        if record["target"] is not None and record["label"] in errors:
            errors[record["label"]].append((record["probability"] - record["target"]) ** 2)
    calibration = one.details()["calibration"]
    for name, its in errors.items():
        assert calibration[name.lower()]["brier"]["value"] == pytest.approx(np.mean(its))
    assert calibration["cardiomegaly"]["scaling"]["fitted"] == "shared temperature"
    assert "two of each are needed" in calibration["fracture"]["brier"]["reason"]
    assert "two of each are needed" in one.details()["operating_points"]["youden"]["fracture"]["threshold"]["reason"]
    assert "cardiomegaly" in estimates["aurc"].extra["labels"]
    assert "fracture" in estimates["aurc"].extra["left_out_positives"]


def test_a_patient_that_the_probe_learns_from_is_not_fitted_on(
    folder: Path, tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    studies = [
        replace(s, split="validation", patient_id="p0" if s.study_id == "s200" else s.patient_id)
        if s.study_id in ("s200", "s202")
        else s
        for s in read_dataset(folder).studies
    ]
    one = task(write_set(tmp_path / "set", studies))
    assert [doc["study_id"] for doc in one.fitting_documents] == ["s202"]


@pytest.mark.parametrize(("kind", "low", "high"), [("prior", 0.5, 0.5), ("random", 0.2, 0.8), ("oracle", 0.99, 1.0)])
def test_baselines_are_floor_noise_and_ceiling(
    rows_of: RowsOf, folder: Path, kind: Any, low: float, high: float
) -> None:
    one = task(folder, labels=LABELS[:2], metadata={"label_source": "rules"})
    found = one.estimates(rows_of(one, BaselineBackend(kind=kind).embed))
    assert low <= found["auroc"].value <= high


def test_a_plan_counts_the_train_split(folder: Path) -> None:
    images, texts = distinct_inputs(task(folder))
    assert not images
    assert set(texts) == {study.findings for name in ("train", "test") for study in split(folder, name)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metadata": {"split": "train"}}, "learns from split train"),
        ({"metadata": {"split": "train+test"}}, "learns from split train"),
        ({"labels": {"kind": "multiclass", "options": {"a": "x", "b": "y"}}}, "expected independent labels"),
        ({"target": "sex"}, "unknown key 'target'"),
    ],
)
def test_a_wrong_declaration_is_refused_before_any_data(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(tmp_path / "nowhere", **config)


def test_without_a_train_split_every_metric_is_undefined_with_the_reason(
    rows_of: RowsOf, tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    studies = [
        Study(f"s{k}", f"p{k}", findings="x", labels={"rules": {"Edema": k % 2}}, split="test") for k in range(9)
    ]
    one = task(write_set(tmp_path / "set", studies), labels=["Edema"])
    estimates = one.estimates(rows_of(one, encoder))
    assert {str(estimate.reason) for estimate in estimates.values()} == {
        "no study in split train has findings to learn from"
    }
    assert all(np.isnan(estimate.value) for estimate in estimates.values())
    assert one.details()["counts"]["training_studies"] == 0
    assert list(one.score_records(one.rows)) == []


def test_patients_on_both_sides_are_refused(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    labels = {"rules": {"Edema": 1}}
    both = [Study(split, "p", findings="x", labels=labels, split=split) for split in ("test", "train")]
    with pytest.raises(UserError, match="patient p is in split train too"):
        task(write_set(tmp_path / "set", both), labels=["Edema"]).test_docs()


def test_rows_without_what_was_learnt_from_are_refused(folder: Path, scored: Any) -> None:
    _, rows = scored
    with pytest.raises(UserError, match="training studies, but got 0"):
        task(folder).estimates(rows[1:])
