from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, roc_auc_score

from medvlm_harness.data.chexpert import CHEXPERT_5, CHEXPERT_13
from medvlm_harness.data.labels import Uncertain, resolve
from medvlm_harness.data.records import Image, Labels, Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.requests import LabelScores
from medvlm_harness.tracks.zero_shot import ZeroShot

FREQUENT = ("Atelectasis", "Cardiomegaly", "Lung Opacity", "Pleural Effusion", "Support Devices")
RARE = "Fracture"  # 4 positives


def labels(rng: np.random.Generator, number: int) -> Labels:
    values: dict[str, int | None] = dict.fromkeys(CHEXPERT_13)
    values["No Finding"] = None
    for name in FREQUENT:
        values[name] = int(rng.choice([1, 0, -1])) if rng.random() < 0.8 else None
    values[RARE] = 1 if number < 4 else 0
    return values


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    write_set: Callable[..., Path],
    fake_image: Callable[..., Image],
) -> Path:
    """120 test studies with one or two frontals, some laterals and a view that nobody knows; two label sources."""
    rng = np.random.default_rng(5)
    studies = []
    for k in range(150):
        images = [fake_image(f"{k}_frontal_{i}.png") for i in range(1 + k % 2)]
        images += [fake_image(f"{k}_lateral.png", "lateral")] if k % 3 == 0 else []
        images += [fake_image(f"{k}_unknown.png", None)] if k % 10 == 0 else []
        sources = {"mesh": labels(rng, k), "chexpert_labeler": labels(rng, k)}
        if k % 15 == 1:
            del sources["chexpert_labeler"]  # unlabelled
        split = "test" if k < 120 else "train" if k < 140 else "validation"
        grade = {"grade": str(k % 3)} if k % 4 else {}
        studies.append(Study(f"s{k:03}", f"p{k}", tuple(images), labels=sources, subgroups=grade, split=split))
    return write_set(tmp_path_factory.mktemp("zero_shot") / "set", studies)


def task(folder: Path, **config: Any) -> ZeroShot:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    base = {"task": "t", "dataset": "synthetic", "labels": list(CHEXPERT_13), "views": ["frontal"]}
    return ZeroShot({**base, **config, "metadata": metadata})


def noise(requests: Sequence[Instance]) -> list[LabelScores]:
    """Scores that depend on the image alone, rounded so that ties occur."""
    (request,) = requests
    image, label_set = request.arguments
    rng = np.random.default_rng(int(str(image)[:8], 16))
    margin = rng.standard_normal(len(label_set.labels)).round(1)
    weights = np.exp(margin)
    probability = weights / weights.sum() if label_set.kind == "multiclass" else 1 / (1 + np.exp(-margin))
    return [LabelScores(tuple(margin.tolist()), tuple(probability.tolist()))]


def truth(folder: Path, source: str, name: str, uncertain: Uncertain = "exclude") -> dict[str, int | None]:
    """Independent: label per frontal image of the test split, straight from the records."""
    return {
        image.file: resolve(study.labels.get(source), name, uncertain=uncertain)
        for study in read_dataset(folder).studies
        if study.split == "test"
        for image in study.images
        if image.view == "frontal"
    }


def margins(result: Any, name: str, names: Sequence[str] = CHEXPERT_13) -> dict[str, float]:
    column = list(names).index(name)
    return {d["file"]: a[0].margin[column] for d, a in zip(result.documents, result.answers, strict=True)}


def area(y: Mapping[str, int | None], s: Mapping[str, float], of: Callable[..., float] = roc_auc_score) -> float:
    known = [file for file, value in y.items() if value is not None]
    return float(of([y[file] for file in known], [s[file] for file in known]))


# --- documents


def test_one_document_per_image_of_the_views_and_the_rest_is_counted(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), noise)
    studies = [study for study in read_dataset(folder).studies if study.split == "test"]
    everything = [image for study in studies for image in study.images]
    frontal = {image.file for image in everything if image.view == "frontal"}
    assert {d["file"] for d in result.documents} == frontal
    assert result.details["counts"] == {
        "studies": 120,
        "images": len(frontal),
        "images_of_other_views": len(everything) - len(frontal),
        "images_without_target": 0,
        "validation_studies_to_fit_on": 10,
    }
    assert json.loads(json.dumps(result.documents, allow_nan=False)) == result.documents


def test_a_request_is_the_image_with_the_whole_label_set(folder: Path) -> None:
    one = task(folder)
    document = one.test_docs()[3]
    request = one.construct_requests(document, "", metadata=("t", 3, 1))
    image, label_set = request.arguments
    assert request.request_type == "classify"
    assert (str(image), image.path) == (document["image"], folder / document["file"])
    assert label_set.names == CHEXPERT_13


def test_the_prior_is_the_train_splits_prevalence_per_image(folder: Path) -> None:
    one = task(folder)
    train = [study for study in read_dataset(folder).studies if study.split == "train"]
    frontal = [study for study in train for image in study.images if image.view == "frontal"]  # the task's images
    values = [resolve(study.labels.get("chexpert_labeler"), "Lung Opacity") for study in frontal]
    known = [v for v in values if v is not None]
    prior = one.request_labels.prior[CHEXPERT_13.index("Lung Opacity")]
    assert prior == pytest.approx(sum(known) / len(known))
    views = task(folder, labels=VIEWS, target="view", views=None).request_labels.prior
    images = [image.view for s in train for image in s.images if image.view]
    assert views == pytest.approx((images.count("frontal") / len(images), images.count("lateral") / len(images)))


# --- values


@pytest.mark.parametrize("uncertain", ["exclude", "positive", "negative"])
@pytest.mark.parametrize("at_run_time", [False, True])
def test_each_labels_auroc_is_sklearns_under_every_policy(
    folder: Path, score: Callable[..., Any], uncertain: Uncertain, at_run_time: bool
) -> None:
    said = {"metadata": {"uncertain": uncertain}} if at_run_time else {"uncertain": uncertain}
    result = score(task(folder, **said), noise)
    expected, precisions = {}, {}
    for name in FREQUENT:
        y, s = truth(folder, "chexpert_labeler", name, uncertain), margins(result, name)
        expected[name], precisions[name] = area(y, s), area(y, s, average_precision_score)
        key = name.lower().replace(" ", "_")
        assert result.value(f"auroc_{key}") == pytest.approx(expected[name], abs=1e-12)
        assert result.estimates[f"auroc_{key}"].positives == sum(v == 1 for v in y.values())
        assert result.estimates[f"auroc_{key}"].n == sum(v is not None for v in y.values())
    assert result.value("auroc") == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert result.value("average_precision") == pytest.approx(np.mean(list(precisions.values())), abs=1e-12)
    assert result.details["uncertain"] == uncertain


def test_the_policies_differ(folder: Path, score: Callable[..., Any]) -> None:
    values = {score(task(folder, uncertain=u), noise).value("auroc") for u in ("exclude", "positive", "negative")}
    assert len(values) == 3


def test_rare_labels_are_shown_and_left_out_of_macros(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), noise)
    rare = result.estimates["auroc_fracture"]
    y = truth(folder, "chexpert_labeler", RARE)
    assert rare.value == pytest.approx(area(y, margins(result, RARE)))
    assert rare.positives is not None and 0 < rare.positives < 10
    assert "left out of macros" in str(rare.reason)
    assert rare.ci95[0] < rare.value < rare.ci95[1]
    macro = result.estimates["auroc"].extra
    assert set(macro["labels"]) == {name.lower().replace(" ", "_") for name in FREQUENT}
    assert macro["left_out_positives"]["fracture"] == rare.positives
    never = result.estimates["auroc_pneumothorax"]
    assert np.isnan(never.value) and never.reason == "only one class among what is labelled"


def test_a_subset_with_a_label_left_out_is_marked_incomplete(folder: Path, score: Callable[..., Any]) -> None:
    subsets = {"pair": ["Atelectasis", "Cardiomegaly"], "five": list(CHEXPERT_5), "none": ["Pneumothorax"]}
    result = score(task(folder, subsets=subsets), noise)
    pair, five, none = (result.estimates[f"auroc_{name}"] for name in subsets)
    assert pair.reason is None
    assert pair.value == pytest.approx((result.value("auroc_atelectasis") + result.value("auroc_cardiomegaly")) / 2)
    assert "incomplete" in str(five.reason) and "consolidation (0)" in str(five.reason)
    used = [result.value(f"auroc_{key}") for key in ("atelectasis", "cardiomegaly", "pleural_effusion")]
    assert five.value == pytest.approx(np.mean(used))
    assert np.isnan(none.value) and none.reason


def test_the_other_sources_are_evaluated_on_the_same_scores(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), noise)
    assert result.details["label_source"] == "chexpert_labeler"  # first of a fixed order, though mesh comes first
    assert result.details["compared_label_sources"] == ["mesh"]
    mesh = [area(truth(folder, "mesh", name), margins(result, name)) for name in FREQUENT]
    assert result.value("auroc@mesh") == pytest.approx(np.mean(mesh), abs=1e-12)
    swapped = score(task(folder, metadata={"label_source": "mesh"}), noise)
    assert swapped.value("auroc") == pytest.approx(result.value("auroc@mesh"), abs=1e-12)
    assert swapped.value("auroc@chexpert_labeler") == pytest.approx(result.value("auroc"), abs=1e-12)
    assert score(task(folder, label_source="mesh"), noise).value("auroc") == swapped.value("auroc")


def test_no_finding_is_derived_from_the_other_labels(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder, no_finding={"except": ["Support Devices"]}), noise)
    studies = {study.study_id: study for study in read_dataset(folder).studies}
    y, s = {}, {}
    for document, (answer,) in zip(result.documents, result.answers, strict=True):
        labels = studies[document["study_id"]].labels.get("chexpert_labeler")
        known = [resolve(labels, name) for name in CHEXPERT_13 if name != "Support Devices"]
        y[document["file"]] = 0 if 1 in known else None if None in known else 1
        counted = [m for m, name in zip(answer.margin, CHEXPERT_13, strict=True) if name != "Support Devices"]
        s[document["file"]] = -max(counted)
    assert result.value("auroc_no_finding") == pytest.approx(area(y, s), abs=1e-12)
    assert "auroc_no_finding" not in score(task(folder), noise).estimates


def test_rows_may_come_in_any_order(folder: Path, score: Callable[..., Any]) -> None:
    one, other = task(folder), task(folder)
    result = score(one, noise)
    shuffled = [result.rows[k] for k in np.random.default_rng(0).permutation(len(result.rows))]
    assert other.estimates(shuffled) == result.estimates


def test_estimates_are_computed_once_for_a_set_of_rows(
    folder: Path, score: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = ZeroShot.estimate
    monkeypatch.setattr(ZeroShot, "estimate", lambda self, rows: calls.append(len(rows)) or real(self, rows))
    one = task(folder, labels=["Lung Opacity"])
    result = score(one, noise)
    one.estimates(result.rows)
    one.estimates(result.rows[::-1])
    assert calls == [len(result.rows)]
    one.estimates(result.rows[:50])
    assert calls == [len(result.rows), 50]


def test_images_of_one_study_are_resampled_together(folder: Path, score: Callable[..., Any]) -> None:
    plain = score(task(folder, labels=["Lung Opacity"], views=None), noise)
    # Negative control: the same images as studies of their own have another standard error.
    alone = task(folder, labels=["Lung Opacity"], views=None)
    rows = [replace(row, study_id=f"{row.study_id}-{row.image}") for row in plain.rows]
    alone._subgroups = {row.study_id: {} for row in rows}
    one, other = plain.estimates["auroc_lung_opacity"], alone.estimates(rows)["auroc_lung_opacity"]
    assert one.value == other.value
    assert one.stderr != other.stderr


def test_score_records_hold_every_answer(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), noise)
    assert len(result.records) == len(result.documents) * len(CHEXPERT_13)
    y, s = truth(folder, "chexpert_labeler", "Cardiomegaly"), margins(result, "Cardiomegaly")
    for record in result.records:
        assert 0 <= record["probability"] <= 1
        if record["label"] == "Cardiomegaly":
            assert (record["target"], record["margin"]) == (y[record["image"]], s[record["image"]])
    assert {record["split"] for record in result.records} == {"test"}


# --- exclusive options

VIEWS = {"kind": "multiclass", "options": {"frontal": "front", "lateral": "side"}}


def test_views_equal_sklearn_and_unknown_views_are_left_out(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder, labels=VIEWS, target="view", views=None), noise)
    studies = [study for study in read_dataset(folder).studies if study.split == "test"]
    views = {image.file: image.view for study in studies for image in study.images}
    assert result.details["counts"]["images_without_target"] == sum(view is None for view in views.values()) > 0
    y = [views[d["file"]] == "lateral" for d in result.documents]
    p = np.array([a[0].probability for a in result.answers])
    assert result.value("accuracy") == pytest.approx(accuracy_score(y, p.argmax(axis=1)))
    assert result.value("balanced_accuracy") == pytest.approx(balanced_accuracy_score(y, p.argmax(axis=1)))
    m = np.array([a[0].margin for a in result.answers])
    both = [roc_auc_score(np.logical_not(y), m[:, 0]), roc_auc_score(y, m[:, 1])]
    assert result.value("auroc") == pytest.approx(np.mean(both))
    assert result.estimates["accuracy"].floor == pytest.approx(max(np.mean(y), 1 - np.mean(y)))
    assert result.estimates["balanced_accuracy"].floor == 0.5
    assert result.details["compared_label_sources"] == []
    assert {r["target"] for r in result.records} == {0, 1}


def test_a_subgroup_field_can_be_the_target(folder: Path, score: Callable[..., Any]) -> None:
    grades = {"kind": "multiclass", "options": {"0": "none", "1": "mild", "2": "severe"}}
    result = score(task(folder, labels=grades, target="grade"), noise)
    assert {d["target"].index(1) == int(d["study_id"][1:]) % 3 for d in result.documents} == {True}
    assert {int(d["study_id"][1:]) % 4 == 0 for d in result.documents} == {False}  # no grade
    answers = np.array([a[0].probability for a in result.answers]).argmax(axis=1)
    y = [d["target"].index(1) for d in result.documents]
    assert result.value("balanced_accuracy") == pytest.approx(balanced_accuracy_score(y, answers))
    assert result.estimates["balanced_accuracy"].floor == pytest.approx(1 / 3)


# --- declarations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"labels": VIEWS}, "needs `target:`"),
        ({"target": "view"}, "needs `target:`"),
        ({"uncertain": "drop"}, "uncertain to be one of exclude, positive, negative, but got 'drop'"),
        ({"subsets": {"a": ["Edma"]}}, r"'Edma' is not among the labels\. Did you mean Edema\?"),
        ({"no_finding": {"except": ["Devices"]}}, "'Devices' is not among the labels"),
        ({"no_finding": {"excpt": ["Edema"]}}, "excpt"),
        ({"no_finding": True}, "no_finding"),
        ({"subsets": ["Edema"]}, "subsets to be a mapping"),
        ({"views": "frontal"}, "views to be a list"),
        ({"lables": []}, r"unknown key 'lables'.* Did you mean labels"),
        ({"labels": []}, "list of names"),
        ({"dataset": None}, "`dataset:`"),
    ],
)
def test_a_wrong_declaration_is_refused_before_any_data(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        task(tmp_path / "nowhere", **config)
    assert re.search(r"\bt\b", str(error.value))  # the task's name
    assert "\n" not in str(error.value)


def test_a_label_that_the_set_lacks_names_the_near_one(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'Pleural Efusion'\. Did you mean Pleural Effusion\?"):
        task(folder, labels=["Pleural Efusion"]).test_docs()


def test_labels_may_be_spelt_as_keys(folder: Path, score: Callable[..., Any]) -> None:
    spelt = score(task(folder, labels={"pleural_effusion": {}}), noise)
    y = truth(folder, "chexpert_labeler", "Pleural Effusion")
    expected = area(y, margins(spelt, "pleural_effusion", ["pleural_effusion"]))
    assert spelt.value("auroc_pleural_effusion") == pytest.approx(expected, abs=1e-12)
