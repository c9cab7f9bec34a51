from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import f1_score, roc_auc_score

from medvlm_harness import plugin
from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.records import Dataset, Image, Study, read_dataset
from medvlm_harness.data.substitution import Substitution
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import make_labeler
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.requests import LabelScores, TextRef
from medvlm_harness.results.plan import distinct_inputs
from medvlm_harness.tracks.image_use import ImageUseLabels, ImageUseReports

FINDINGS = (
    "The heart is enlarged.",
    "Small left pleural effusion.",
    "Right lower lobe consolidation.",
    "Lungs are clear.",
)
NAMES = ("Cardiomegaly", "Pleural Effusion", "Consolidation", "Fracture")
PROMPT = "{images}\nIndication: {indication}\nFindings:"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """96 studies of four kinds, every other with two frontal images; a fracture in one, far too few for a macro."""
    studies = []
    for k in range(96):
        kind = (k * 7 + k // 9) % 4
        images = (*(fake_image(f"{k}_{i}.png") for i in range(1 + k % 2)), fake_image(f"{k}_lateral.png", "lateral"))
        labels = {name: int(kind == n) for n, name in enumerate(NAMES)} | {"Fracture": int(k == 50)}
        studies.append(
            Study(
                f"s{k:02}",
                f"p{k}",
                images,
                indication="Cough." if k % 3 else "",
                findings=FINDINGS[kind],
                labels={"rules": {"No Finding": int(kind == 3), **labels}},
                split="train" if k < 36 else "test",
            )
        )
    return write_set(tmp_path_factory.mktemp("image_use") / "set", studies)


def labels_task(folder: Path, **config: Any) -> ImageUseLabels:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    base = {"task": "l", "dataset": "synthetic", "labels": list(NAMES), "views": ["frontal"]}
    more = {"substitutes": ["other", "blank"], "subsets": {"two": list(NAMES[:2])}, **config}
    return ImageUseLabels({**base, **more, "metadata": metadata})


def reports_task(folder: Path, **config: Any) -> ImageUseReports:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    base = {"task": "r", "dataset": "synthetic", "prompt": PROMPT, "substitutes": ["other", "blank"]}
    return ImageUseReports({**base, **config, "metadata": metadata})


def noise(requests: Sequence[Instance]) -> list[LabelScores]:
    """Depends on the image alone."""
    found = []
    for request in requests:
        rng = np.random.default_rng(int(str(request.arguments[0])[:8], 16))
        margin = rng.standard_normal(len(request.arguments[1].labels)).round(1)
        found.append(LabelScores(tuple(margin.tolist()), tuple((1 / (1 + np.exp(-margin))).tolist())))
    return found


def blind(requests: Sequence[Instance]) -> list[LabelScores]:
    """Depends on the indication and the study, never on the image."""
    return noise([Instance("classify", {}, (TextRef(r.doc["file"]), r.arguments[1]), 0) for r in requests])


# --- labels


def test_each_image_is_asked_about_once_per_condition_with_the_same_indication(folder: Path) -> None:
    made = labels_task(folder, substitutes=["other", "blank"])
    made.build_all_requests()
    studies = {study.study_id: study for study in read_dataset(folder).studies}
    owner = {image.sha256: study for study in studies.values() for image in study.images}
    for doc in made.documents:
        own = [instance for instance in made.instances if instance.doc is doc]
        assert [instance.idx for instance in own] == [0, 1, 2]
        image, other, blank = (instance.arguments[0] for instance in own)
        assert image == doc["image"]
        assert owner[other].patient_id != doc["patient_id"] and owner[other].split == "test"
        assert blank not in owner and blank.path.is_file()
        indication = studies[doc["study_id"]].indication
        for instance in own:
            assert [ref.text for ref in instance.arguments[2:]] == ([indication] if indication else [])
    assert "Cough" not in str(made.instances[1].arguments)


def test_neither_limit_nor_process_decides_which_image_stands_for_which(folder: Path) -> None:
    def shown(**options: Any) -> dict[str, list[str]]:
        made = labels_task(folder)
        made.build_all_requests(**options)
        found: dict[str, list[str]] = {}
        for instance in made.instances:
            found.setdefault(instance.doc["file"], []).append(str(instance.arguments[0]))
        return found

    whole = shown()
    parts = [shown(rank=rank, world_size=3) for rank in range(3)]
    assert {file: refs for part in parts for file, refs in part.items()} == whole
    limited = shown(limit=5)
    assert len(limited) == 5 and all(whole[file] == refs for file, refs in limited.items())


def test_areas_equal_sklearns_under_each_condition(folder: Path, score: Callable[..., Any]) -> None:
    made = labels_task(folder)
    scored = score(made, noise)
    substitution = Substitution(made.data)
    images = {image.file: image for study in made.studies for image in study.images}
    values = {}
    for condition in made.conditions:
        refs = [
            doc["image"] if condition == "true" else substitution(condition, images[doc["file"]])[0]  # type: ignore[arg-type]
            for doc in scored.documents
        ]
        margins = np.array([noise([Instance("classify", {}, (ref, made.label_set), 0)])[0].margin for ref in refs])
        truth = np.array([doc["target"] for doc in scored.documents])
        areas = [roc_auc_score(truth[:, j], margins[:, j]) for j in range(3)]
        values[condition] = np.mean(areas)
        assert scored.value(f"auroc_{condition}") == pytest.approx(values[condition], abs=1e-12)
        assert scored.value(f"auroc_two_{condition}") == pytest.approx(np.mean(areas[:2]), abs=1e-12)
    assert scored.value("auroc_true_minus_other") == pytest.approx(values["true"] - values["other"], abs=1e-12)
    assert scored.estimates["auroc_true"].extra["labels"] == ["cardiomegaly", "pleural_effusion", "consolidation"]
    assert (scored.estimates["auroc_true"].floor, scored.estimates["auroc_true_minus_blank"].floor) == (0.5, None)
    assert len(scored.records) == 3 * len(NAMES) * len(scored.documents)
    assert {record["label"].partition("@")[2] for record in scored.records} == {"", "other", "blank"}
    assert scored.details["conditions"] == ["true", "other", "blank"]


def test_a_model_that_ignores_the_image_gains_exactly_nothing(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(labels_task(folder), blind)
    assert scored.value("auroc_true") != 0.5
    for name, estimate in scored.estimates.items():
        if "minus" in name:
            assert (estimate.value, estimate.ci95) == (0, (0, 0)), name


def test_one_that_sees_the_image_gains_all_there_is(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(labels_task(folder), BaselineBackend(kind="oracle").classify)
    for other in ("other", "blank"):
        assert (scored.value("auroc_true"), scored.value(f"auroc_{other}")) == (1, 0.5)
        estimate = scored.estimates[f"auroc_true_minus_{other}"]
        assert (estimate.value, estimate.ci95) == (0.5, (0.5, 0.5))


@pytest.mark.parametrize("kind", ["prior", "random"])
def test_floors_gain_nothing_that_is_sure(folder: Path, score: Callable[..., Any], kind: Any) -> None:
    scored = score(labels_task(folder), BaselineBackend(kind=kind).classify)
    low, high = scored.estimates["auroc_true_minus_other"].ci95
    assert low <= 0 <= high
    if kind == "prior":
        assert {scored.value(f"auroc_{c}") for c in ("true", "other", "blank")} == {0.5}


def test_without_a_label_of_enough_support_nothing_is_claimed(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(labels_task(folder, labels=["Fracture"], subsets={}), noise)
    assert all(np.isnan(one.value) and one.reason for one in scored.estimates.values())


def test_nothing_is_fitted(demo: Dataset) -> None:
    one = labels_task(demo.folder, dataset="demo_cxr", labels=["Cardiomegaly"], subsets={})
    assert "validation" in {study.split for study in one.data.studies}
    assert one.fitting_documents == [] and "fitted_on" not in one.details()
    with pytest.raises(UserError, match="unknown key 'scaling'"):
        labels_task(demo.folder, scaling="platt")


def test_an_encoder_would_be_asked_for_no_indication(folder: Path) -> None:
    _, texts = distinct_inputs(labels_task(folder))
    assert set(texts) == {phrase for name in NAMES for phrase in (name.lower(), f"no {name.lower()}")}


# --- reports


def test_all_images_of_a_study_are_replaced_and_the_prompt_stays(folder: Path) -> None:
    made = reports_task(folder, images="all", substitutes=["other", "mean", "blank"], metadata={"substitution_seed": 3})
    made.substitution._mean = lambda view, size: ("f" * 64, Path(f"mean_{view}.png"))  # no pixels in this set
    made.build_all_requests()
    view = {image.sha256: image.view for study in read_dataset(folder).studies for image in study.images}
    for doc in made.documents[:9]:
        own = [instance for instance in made.instances if instance.doc is doc]
        assert len({str(instance.arguments[0]) for instance in own}) == 1
        true, other, mean, blank = ([str(ref) for ref in instance.arguments[2]["visual"]] for instance in own)
        assert true == doc["images"] and len(other) == len(mean) == len(blank) == len(true)
        assert [view[ref] for ref in other] == [view[ref] for ref in true]
        assert not set(other) & set(true)
    assert made.details()["substitution_seed"] == 3


def sees(requests: Sequence[Instance]) -> list[str]:
    """The reference for the document's own image, a normal report for any other."""
    return [
        request.doc["target"] if request.arguments[2]["visual"][0] == request.doc["image"] else FINDINGS[3]
        for request in requests
    ]


def test_reports_are_scored_under_each_condition(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(reports_task(folder), sees)
    assert scored.value("rougeL_true") == 1
    assert scored.value("rougeL_other") == scored.value("rougeL_blank") < 0.5
    labeler = make_labeler("rules")
    truth, normal = (
        np.array([[labeler.label(text)[name] in (1, -1) for name in CHEXPERT_14] for text in texts])
        for texts in ([doc["target"] for doc in scored.documents], [FINDINGS[3]] * len(scored.documents))
    )
    for average in ("micro", "macro"):
        expected = f1_score(truth, normal, average=average, zero_division=0)
        name = f"label_f1_{average}_14"
        assert scored.value(f"{name}_blank") == pytest.approx(expected)
        difference = scored.estimates[f"{name}_true_minus_blank"]
        assert difference.value == pytest.approx(scored.value(f"{name}_true") - expected)
        assert difference.ci95[0] > 0
    assert set(scored.estimates["rougeL_blank"].extra["floors"]) == {"constant", "template"}
    assert {record["label"] for record in scored.records} >= {"rougeL", "rougeL@other", "rougeL@blank"}
    assert "label_f1" not in scored.details


def test_a_writer_that_ignores_the_image_gains_exactly_nothing(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(reports_task(folder), lambda requests: [FINDINGS[len(r.doc["file"]) % 4] for r in requests])
    for name, estimate in scored.estimates.items():
        if "minus" in name:
            assert (estimate.value, estimate.ci95) == (0, (0, 0)), name


# --- declarations


@pytest.mark.parametrize("make", [labels_task, reports_task])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"substitutes": None}, "expected substitutes to be a list of other, blank, mean, but got None"),
        ({"substitutes": []}, "expected substitutes to be a list"),
        ({"substitutes": ["blank", "blank"]}, "expected substitutes to be a list"),
        ({"substitutes": ["blanc"]}, r"unknown substitute 'blanc'\. Did you mean blank"),
        ({"metadata": {"substitution_seed": "x"}}, "expected substitution_seed=N"),
    ],
)
def test_a_wrong_declaration_is_refused(
    folder: Path, make: Callable[..., Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(folder, **config)


def test_labels_are_independent_ones(folder: Path) -> None:
    with pytest.raises(UserError, match="expected independent labels"):
        labels_task(folder, no_finding={})


# --- from end to end


class Seeing(MedicalLM):
    """Writes the reference of the document, and knows its labels, when it is shown its own image."""

    CAPABILITIES = frozenset({"generate_until", "classify:image"})
    card = ModelCard(name="seeing", family="test", summary="reads the image")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return sees(requests)

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        return BaselineBackend(kind="oracle").classify(requests)

    def describe(self) -> dict[str, Any]:
        return {"card": self.card.to_dict(), "weights_sha256": None}


def test_both_demo_tasks_run_through_lm_eval(demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    tasks = ["demo_cxr_image_use_labels", "demo_cxr_image_use_reports"]
    manager = TaskManager(metadata={"data_dir": str(demo.folder)})
    results = lm_eval.simple_evaluate(model=Seeing(), tasks=tasks, task_manager=manager, limit=120, bootstrap_iters=0)
    labels, reports = (results["medvlm"]["tasks"][name] for name in tasks)
    assert labels["metrics"]["auroc_true"]["value"] == 1 and labels["scored"] == reports["scored"] == 120
    assert labels["metrics"]["auroc_true_minus_other"]["ci95"][0] > 0.3
    assert reports["metrics"]["rougeL_true"]["value"] == 1
    assert reports["metrics"]["rougeL_true_minus_other"]["ci95"][0] > 0.2
    assert results["results"][tasks[1]]["rougeL_true,none"] == 1
