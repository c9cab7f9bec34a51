"""What robustness tracks share: suites, the choice of studies, thresholds from validation, references."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import roc_auc_score

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.operating_points import youden_threshold
from medvlm_harness.metrics.robustness import Reference
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.perturbations.image import find_suite
from medvlm_harness.requests import ImageRef, LabelScores, TextRef
from medvlm_harness.results.robustness_table import robustness_table
from medvlm_harness.tracks.zero_shot_robustness import TextZeroShotRobustness, ZeroShotRobustness

NAMES = ("Cardiomegaly", "Pleural Effusion", "Consolidation", "Fracture")
LABELS = {name: {"positive": [name.lower()], "negative": [f"no {name.lower()}"]} for name in NAMES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images_task(folder: Path, **config: Any) -> ZeroShotRobustness:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    base = {"task": "z", "dataset": "synthetic", "labels": LABELS, "views": ["frontal"], "modality": "chest"}
    more = {"perturbation": {"suite": "quick"}, "substitutes": ["other", "blank"], **config}
    return ZeroShotRobustness({**base, **more, "metadata": metadata})


def margin_of(seed: str, truth: Sequence[int | None], signal: float) -> list[float]:
    rng = np.random.default_rng(int(seed[:12], 16))
    return (signal * np.array([value or 0 for value in truth]) + rng.standard_normal(len(truth))).tolist()


def reads(requests: Sequence[Instance]) -> list[LabelScores]:
    """Scores that hold less of the truth the more severe the perturbation, and nothing of it for another image."""
    found = []
    for request in requests:
        ref = request.arguments[0]
        own = ref.file_sha256 == request.doc["image"]
        severity = ref.perturbation.severity if ref.perturbation else 0
        truth = request.doc["target"] if own else [0] * len(NAMES)
        margin = margin_of(str(ref), truth, 3 - severity / 2)
        found.append(LabelScores(tuple(margin), tuple((1 / (1 + np.exp(-np.array(margin)))).tolist())))
    return found


# --- suites and conditions


def test_each_image_is_asked_about_under_each_condition_and_validation_images_are_clean(four_kinds: Path) -> None:
    task = images_task(four_kinds)
    cases = find_suite("quick", "chest")
    assert task.conditions == ("clean", *(case.name for case in cases), "other_image", "blank_image")
    (asked, fitted) = (
        task.construct_requests(docs[0], "", metadata=("z", 0, 1)) for docs in (task.documents, task.fitting_documents)
    )
    refs = [instance.arguments[0] for instance in asked]
    assert [ref.perturbation for ref in refs] == [None, *cases, None, None]
    assert {ref.file_sha256 for ref in refs[:16]} == {task.documents[0]["image"]}
    assert len({str(ref) for ref in refs}) == len(refs)
    assert len({instance.arguments[1] for instance in asked}) == 1
    assert [instance.arguments[0].perturbation for instance in fitted] == [None]
    assert {doc["split"] for doc in task.fitting_documents} == {"validation"}


def test_neither_limit_nor_process_decides_how_an_image_is_perturbed(four_kinds: Path) -> None:
    def asked(**options: Any) -> dict[str, list[str]]:
        task = images_task(four_kinds)
        task.build_all_requests(**options)
        found: dict[str, list[str]] = {}
        for instance in task.instances:
            found.setdefault(instance.doc["file"], []).append(str(instance.arguments[0]))
        return found

    whole = asked()
    parts = [asked(rank=rank, world_size=3) for rank in range(3)]
    assert {file: refs for part in parts for file, refs in part.items()} == whole
    assert all(whole[file] == refs for file, refs in asked(limit=4).items())


def test_a_seed_draws_other_noise_and_other_patients(four_kinds: Path) -> None:
    def first(**metadata: Any) -> list[str]:
        task = images_task(four_kinds, metadata=metadata)
        return [str(i.arguments[0]) for i in task.construct_requests(task.documents[0], "", metadata=("z", 0, 1))]

    same, other = first(perturbation_seed=0), first(perturbation_seed=1)
    assert first() == same
    assert [a == b for a, b in zip(same, other, strict=True)] == [True, *[False] * 15, True, True]


def test_the_full_suite_takes_all_studies_unless_told(four_kinds: Path) -> None:
    full = images_task(four_kinds, metadata={"suite": "full"})
    assert len(full.cases) == len(find_suite("full", "chest")) > 60 and full.wanted is None
    assert "inversion" in full.conditions and "left_right_flip" not in full.conditions
    assert images_task(four_kinds, metadata={"suite": "full", "studies": 7}).wanted == 7


def test_chosen_studies_keep_the_positives_of_rare_labels_and_all_tasks_have_the_same(four_kinds: Path) -> None:
    task = images_task(four_kinds, studies=20)
    assert {"s100", "s120"} <= {study.study_id for study in task.studies} and len(task.studies) == 20
    assert task.choice.labels["Fracture"].chosen_positives == task.choice.labels["Fracture"].positives == 2
    config = {"task": "t", "dataset": "synthetic", "labels": LABELS, "perturbation": {"suite": "quick"}, "studies": 20}
    reports = TextZeroShotRobustness({**config, "metadata": {"data_dir": str(four_kinds)}})
    assert [study.study_id for study in reports.studies] == [study.study_id for study in task.studies]


# --- numbers


def test_scores_drops_and_flips_equal_an_independent_computation(four_kinds: Path, score: Callable[..., Any]) -> None:
    task = images_task(four_kinds)
    scored = score(task, reads)
    rows = [row for row in scored.rows if row.split == "test"]
    truth = np.array([doc["target"] for doc in scored.documents])
    by_file = {row.image: row for row in rows}
    margins = np.array([[one.scores.margin for one in by_file[doc["file"]].conditions] for doc in scored.documents])
    areas = [np.mean([roc_auc_score(truth[:, j], margins[:, k, j]) for j in range(3)]) for k in range(18)]
    found = scored.details["robustness"]
    for k, condition in enumerate(task.conditions):
        assert found[f"auroc_{condition}"]["value"] == pytest.approx(areas[k], abs=1e-12)
    assert found["auroc_drop"]["value"] == pytest.approx(areas[0] - np.mean(areas[1:16]), abs=1e-12)
    assert found["auroc_corruption_error"]["value"] == pytest.approx(1 - np.mean(areas[1:16]), abs=1e-12)
    assert found["auroc_drop_gaussian_noise"]["value"] == pytest.approx(areas[0] - np.mean(areas[1:4]), abs=1e-12)
    retention = (np.mean(areas[1:16]) - 0.5) / (areas[0] - 0.5)
    assert scored.value("auroc_retention") == pytest.approx(retention, abs=1e-12)
    assert scored.estimates["auroc_worst"].extra["condition"].endswith("_5")
    assert scored.estimates["auroc_clean"].extra["labels"] == ["cardiomegaly", "pleural_effusion", "consolidation"]
    # Decisions at the thresholds of validation, which no test image has a part in.
    fitted = [row.conditions[0] for row in scored.rows if row.split == "validation"]
    cuts = [
        youden_threshold([row.targets["rules"][j] for row in fitted], [row.scores.margin[j] for row in fitted])
        for j in range(3)
    ]
    called = margins[:, :, :3] >= cuts
    flips = (called[:, 1:16] != called[:, :1]).mean(axis=0).mean(axis=1)
    assert scored.value("flip_rate") == pytest.approx(flips.mean(), abs=1e-12)
    assert scored.value("flip_rate_any") == pytest.approx(
        (called[:, 1:16] != called[:, :1]).any(axis=1).mean(), abs=1e-12
    )
    assert scored.value("reliance_other_image") == pytest.approx((called[:, 16] != called[:, 0]).mean(), abs=1e-12)
    thresholds = scored.details["thresholds"]["labels"]
    assert [thresholds[key]["value"] for key in ("cardiomegaly", "pleural_effusion", "consolidation")] == cuts
    assert thresholds["fracture"]["value"] is None and "0 positives" in thresholds["fracture"]["reason"]


def test_a_prior_that_answers_without_the_image_is_exposed(four_kinds: Path, score: Callable[..., Any]) -> None:
    scored = score(images_task(four_kinds), BaselineBackend(kind="prior").classify)
    assert scored.value("auroc_clean") == scored.value("auroc_other_image") == 0.5
    drop = scored.estimates["auroc_drop_other_image"]
    assert (drop.value, drop.ci95) == (0, (0, 0))
    assert scored.value("flip_rate_any") == scored.value("reliance_other_image") == 0
    dangerous = scored.estimates["consistent_unreliant"]
    assert dangerous.value == 1 and dangerous.ci95[0] < 1  # 80 studies do not make a certainty
    assert np.isnan(scored.value("auroc_retention")) and "lower bound" in str(
        scored.estimates["auroc_retention"].reason
    )


def test_one_that_answers_by_the_image_is_not(four_kinds: Path, score: Callable[..., Any]) -> None:
    scored = score(images_task(four_kinds), BaselineBackend(kind="oracle").classify)
    assert scored.value("auroc_clean") == 1 and scored.value("auroc_other_image") == 0.5
    assert scored.value("reliance_other_image") > 0.2


def test_all_of_it_is_written(four_kinds: Path, score: Callable[..., Any]) -> None:
    task = images_task(four_kinds)
    scored = score(task, reads)
    assert len(scored.records) == len(task.conditions) * len(NAMES) * len(scored.documents)
    assert {record["label"].partition("@")[2] for record in scored.records} == {"", *task.conditions[1:]}
    lines = robustness_table({"z": json.loads(json.dumps(scored.details))})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[5:]]
    assert [row[2] for row in rows] == list(task.conditions)
    assert rows[0][:4] == ["z", "auroc", "clean", f"{scored.value('auroc_clean'):.3f}"]
    assert rows[-1][7] == f"{scored.value('reliance_blank_image'):.3f}"
    assert task.dump_config()["perturbation"] == {"suite": "quick", "of": "images"}
    lower = task.lower_is_better()
    assert {"auroc_drop", "flip_rate", "consistent_unreliant"} <= lower
    assert not {"auroc_drop_other_image", "auroc_clean", "auroc_retention"} & lower


# --- the words that labels are asked by


def by_words(requests: Sequence[Instance]) -> list[LabelScores]:
    """Reads the positive phrase: a model that takes "no x" for the finding when it is told so."""
    found = []
    for request in requests:
        ref, labels = request.arguments[:2]
        truth = [value or 0 for value in request.doc["target"]] if str(ref) == request.doc["image"] else [0] * 4
        says = [-1 if label.positive[0].startswith("no ") else 1 for label in labels.labels]
        margin = tuple(s * m for s, m in zip(says, margin_of(str(ref), truth, 3), strict=True))
        found.append(LabelScores(margin, tuple(1 / (1 + np.exp(-m)) for m in margin)))
    return found


def test_other_words_change_nothing_for_who_understands_them_and_inversion_inverts(
    four_kinds: Path, score: Callable[..., Any]
) -> None:
    task = images_task(four_kinds, perturbation={"suite": "quick", "of": "prompts"})
    assert task.conditions[:2] == ("clean", "wording_1") and "polarity_flip" in task.compared.others
    scored = score(task, by_words)
    assert scored.value("auroc_drop") == scored.value("flip_rate_any") == 0
    assert scored.value("auroc_polarity_flip") == pytest.approx(1 - scored.value("auroc_clean"), abs=1e-12)
    phrases = {label.positive[0] for labels in task.worded for label in labels.labels}
    assert {"evidence of cardiomegaly", "CONSOLIDATION", "no fracture"} <= phrases
    assert all(labels.names == NAMES for labels in task.worded)


def test_a_model_with_words_of_its_own_is_not_asked(four_kinds: Path) -> None:
    class Own:
        prompts = "published"

    assert "takes none with prompts=published" in str(
        images_task(four_kinds, perturbation={"suite": "quick", "of": "prompts"}).refuses(Own())
    )
    assert images_task(four_kinds).refuses(Own()) is None


# --- reports


WORDS = ("enlarged", "left pleural effusion", "consolidation", "fracture")


def by_words_of_the_report(requests: Sequence[Instance]) -> list[LabelScores]:
    """Knows one word for each finding, in whatever case."""
    found = []
    for request in requests:
        text = request.arguments[0].text.lower()
        margin = tuple(float(word in text) for word in WORDS)
        found.append(LabelScores(margin, tuple(1 / (1 + np.exp(-m)) for m in margin)))
    return found


def test_reports_are_said_otherwise_and_the_truth_stays(four_kinds: Path, score: Callable[..., Any]) -> None:
    config = {"task": "t", "dataset": "synthetic", "labels": LABELS, "perturbation": {"suite": "quick"}}
    task = TextZeroShotRobustness({**config, "metadata": {"data_dir": str(four_kinds)}})
    asked = task.construct_requests(task.documents[0], "", metadata=("t", 0, 1))
    texts = [instance.arguments[0].text for instance in asked]
    assert len(texts) == len(task.conditions)
    assert all(isinstance(instance.arguments[0], TextRef) for instance in asked)
    assert texts[task.conditions.index("case_2")] == texts[0].upper()
    scored = score(task, by_words_of_the_report)
    assert scored.details["robustness"]["auroc_drop_case_2"]["value"] == 0
    assert scored.value("auroc_clean") == 1 and scored.details["robustness"]["auroc_drop_synonyms_3"]["value"] > 0.1
    assert scored.value("flip_rate") > 0 and "reliance_other_image" not in scored.estimates


# --- a reference run


def test_errors_are_divided_by_those_of_a_named_run(
    four_kinds: Path, score: Callable[..., Any], tmp_path: Path
) -> None:
    scored = score(images_task(four_kinds), reads)
    card = {"card": {"name": "the other"}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"medvlm": {"model": card, "tasks": {"z": scored.details}}}))
    against = images_task(four_kinds, metadata={"reference": str(path)})
    (reference,) = against.reference.values()
    assert isinstance(reference, Reference) and reference.name == "the other"
    itself = score(against, reads)
    assert itself.value("auroc_mce") == pytest.approx(1) and itself.value("auroc_relative_mce") == pytest.approx(1)
    perfect = score(images_task(four_kinds, metadata={"reference": str(path)}), BaselineBackend(kind="oracle").classify)
    assert perfect.value("auroc_mce") == 0
    assert "auroc_mce" not in scored.estimates


def written_reference(folder: Path, details: Any) -> dict[str, str]:
    path = folder / "results.json"
    path.write_text(json.dumps({"medvlm": {"model": {"card": {"name": "x"}}, "tasks": details}}))
    return {"reference": str(path)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "another"}, "has another data"),
        ({"studies": 3}, "has another studies: 3, not 80"),
        ({"label_source": "mesh"}, "has another label_source: 'mesh', not 'rules'"),
        ({"label_set": "others@12"}, "has another label_set: 'others@12'"),
        ({"uncertain": "positive"}, "has another uncertain: 'positive', not 'exclude'"),
    ],
)
def test_a_reference_of_something_else_is_refused(
    four_kinds: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    theirs = {**images_task(four_kinds).comparable(), **change}
    metadata = written_reference(tmp_path, {"z": {"comparable": theirs, "robustness": {}}})
    with pytest.raises(UserError, match=message):
        images_task(four_kinds, metadata=metadata).prepare_for(object())


def test_a_file_that_is_no_such_run_is_refused(four_kinds: Path, tmp_path: Path) -> None:
    same = images_task(four_kinds).comparable()
    for details in ({}, {"z": "nothing"}, {"z": {"comparable": same, "robustness": {}}}):
        metadata = written_reference(tmp_path, details)
        with pytest.raises(UserError, match="expected reference to be the results file of a run of this task, but"):
            images_task(four_kinds, metadata=metadata).prepare_for(object())


# --- declarations


def test_a_set_that_lacks_what_stands_for_an_image_is_refused_by_itself(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> None:
    labels = {"rules": {"Edema": 0}}
    studies = [
        Study(f"s{k}", f"p{k}", (fake_image(f"{k}.png"),), findings="Clear.", labels=labels, split="test")
        for k in range(4)
    ]
    folder = write_set(tmp_path / "set", studies)
    assert images_task(folder, labels=["Edema"]).refuses(None) is None
    lacking = images_task(folder, labels=["Edema"], substitutes=["other", "mean"]).refuses(None)
    assert "has no frontal image in split train to make a mean image of" in str(lacking)


def test_images_that_are_not_asked_about_need_no_stand_in(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> None:
    lateral = (fake_image("side.png", "lateral"),)  # the only one, which no other patient's can stand for
    studies = [
        Study(
            f"s{k}",
            f"p{k}",
            (fake_image(f"{k}.png"), *(lateral if k == 0 else ())),
            findings="Clear.",
            labels={"rules": {"Edema": 0}},
            split="test",
        )
        for k in range(4)
    ]
    folder = write_set(tmp_path / "set", studies)
    assert images_task(folder, labels=["Edema"]).refuses(None) is None
    both = images_task(folder, labels=["Edema"], views=["frontal", "lateral"]).refuses(None)
    assert "too few for each to be replaced by another patient's" in str(both)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"perturbation": None}, r"expected perturbation: \{suite: quick\}"),
        ({"perturbation": {"name": "gaussian_noise", "severity": 3}}, r"expected perturbation: \{suite: quick\}"),
        ({"perturbation": {"suite": "quick", "off": "images"}}, r"unknown key 'off' in perturbation\. Did you mean of"),
        ({"perturbation": {"suite": "fast"}}, "expected suite of perturbation to be quick or full, but got 'fast'"),
        ({"perturbation": {"suite": "quick", "of": "reports"}}, "expected of of perturbation to be images or prompts"),
        ({"modality": "xray"}, "Unknown modality 'xray'"),
        ({"modality": None}, "expected `modality:` to say what kind of images the suite is for"),
        ({"substitutes": ["blank"]}, "expected other among the substitutes"),
        ({"substitutes": ["blanc"]}, r"unknown substitute 'blanc'\. Did you mean blank"),
        ({"studies": 0}, "expected studies to be a number from 1 on, but got 0"),
        ({"metadata": {"perturbation_seed": -1}}, "expected perturbation_seed=N"),
        ({"no_finding": {}}, "expected independent labels"),
        ({"scaling": "platt"}, "unknown key 'scaling'"),
    ],
)
def test_a_wrong_declaration_is_refused(four_kinds: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        images_task(four_kinds, **config)


def test_references_are_perturbed_files_that_pickle() -> None:
    case = find_suite("quick", "chest")[0]
    ref = ImageRef("ab" * 32, Path("a.png")).perturbed(case)
    assert ref.perturbation == case and ref.file_sha256 == "ab" * 32 != str(ref)
