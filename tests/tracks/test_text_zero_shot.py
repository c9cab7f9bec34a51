from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import roc_auc_score

from medvlm_harness.data.records import Image, Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import LabelScores
from medvlm_harness.results.run import unsupported_reason
from medvlm_harness.tracks.text_zero_shot import TextZeroShot

LABELS = ["Cardiomegaly", "Edema", "Fracture"]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """Studies with two images, or none; some without findings, some unlabelled."""
    rng = np.random.default_rng(6)
    studies = []
    for k in range(120):
        images = () if k % 3 else (fake_image(f"{k}.png"), fake_image(f"{k}_l.png", "lateral"))
        values = {name: int(rng.choice([1, 0, -1])) for name in LABELS[:2]} | {"Fracture": int(k < 3)}
        studies.append(
            Study(
                f"s{k:03}",
                f"p{k}",
                images,
                findings=" " if k % 10 == 4 else f" findings of {k % 40} ",
                labels={"mesh": values} if k % 7 else {},
                subgroups={"sex": "mf"[k % 2]} if k % 5 else {},
                split="test" if k < 90 else "train",
            )
        )
    return write_set(tmp_path_factory.mktemp("reports") / "set", studies)


def task(folder: Path, **config: Any) -> TextZeroShot:
    metadata = {"data_dir": str(folder), **config.pop("metadata", {})}
    return TextZeroShot({"task": "t", "dataset": "synthetic", "labels": LABELS, **config, "metadata": metadata})


def noise(requests: Sequence[Instance]) -> list[LabelScores]:
    (request,) = requests
    text, label_set = request.arguments
    margin = np.random.default_rng(int(str(text)[:8], 16)).standard_normal(len(label_set.labels))
    probability = np.exp(margin) / np.exp(margin).sum() if label_set.kind == "multiclass" else 1 / (1 + np.exp(-margin))
    return [LabelScores(tuple(margin.tolist()), tuple(probability.tolist()))]


def with_findings(folder: Path) -> list[Study]:
    studies = [study for study in read_dataset(folder).studies if study.split == "test"]
    return [study for study in studies if study.findings.strip()]


def test_one_document_per_study_with_findings_whether_it_has_images_or_not(
    folder: Path, score: Callable[..., Any]
) -> None:
    result = score(task(folder), noise)
    studies = with_findings(folder)
    assert [d["study_id"] for d in result.documents] == [study.study_id for study in studies]
    assert result.details["counts"] == {
        "studies": 81,
        "scored_without_image": sum(not study.images for study in studies),
        "studies_without_findings": 9,
        "studies_without_target": 0,
        "validation_studies_to_fit_on": 0,
    }
    assert 0 < result.details["counts"]["scored_without_image"] < 81
    assert {record["image"] for record in result.records} == {None}


def test_a_request_is_the_findings_with_the_whole_label_set(folder: Path) -> None:
    one = task(folder)
    for document, study in zip(one.test_docs(), with_findings(folder), strict=True):
        request = one.construct_requests(document, "", metadata=("t", 0, 1))
        text, label_set = request.arguments
        assert request.request_type == "classify"
        assert (text.text, label_set.names) == (study.findings.strip(), tuple(LABELS))
        assert study.findings.strip() not in str(document)


def test_auroc_is_scikit_learns(folder: Path, score: Callable[..., Any]) -> None:
    result = score(task(folder), noise)
    studies = with_findings(folder)
    for column, name in enumerate(LABELS):
        values = [study.labels.get("mesh", {}).get(name) for study in studies]
        known = [k for k, value in enumerate(values) if value in (0, 1)]
        margins = [result.answers[k][0].margin[column] for k in known]
        area = roc_auc_score([values[k] for k in known], margins)
        assert result.value(f"auroc_{name.lower()}") == pytest.approx(area, abs=1e-12)
        assert result.estimates[f"auroc_{name.lower()}"].n == len(known)


@pytest.mark.parametrize(("kind", "low", "high"), [("prior", 0.5, 0.5), ("random", 0.3, 0.7), ("oracle", 1.0, 1.0)])
def test_baselines_are_floor_noise_and_ceiling(
    folder: Path, score: Callable[..., Any], kind: Any, low: float, high: float
) -> None:
    result = score(task(folder, no_finding={"except": []}), BaselineBackend(kind=kind).classify)
    assert low <= result.value("auroc") <= high
    assert low <= result.value("auroc_no_finding") <= high


def test_it_needs_a_model_that_classifies_texts(folder: Path) -> None:
    reads, looks = (SimpleNamespace(CAPABILITIES={f"classify:{kind}"}) for kind in ("text", "image"))
    assert unsupported_reason(reads, task(folder)) is None
    assert unsupported_reason(looks, task(folder)) == "SimpleNamespace cannot classify texts"


def test_a_subgroup_can_be_the_target_and_a_view_cannot(folder: Path, score: Callable[..., Any]) -> None:
    sexes = {"kind": "multiclass", "options": {"m": "a man", "f": "a woman"}}
    result = score(task(folder, labels=sexes, target="sex"), noise)
    expected = [study.study_id for study in with_findings(folder) if study.subgroups]
    assert [d["study_id"] for d in result.documents] == expected
    assert result.details["counts"]["studies_without_target"] == 81 - len(expected) > 0
    with pytest.raises(UserError, match="subgroup field, but got 'view'"):
        task(folder, labels=sexes, target="view")
    with pytest.raises(UserError, match="unknown key 'views'"):
        task(folder, views=["frontal"])


def test_a_set_without_findings_is_refused_with_what_there_is(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    studies = [Study("a", "a", impression="x", labels={"mesh": {"Edema": 1}}, split="test")]
    with pytest.raises(UserError, match="studies have findings in 0"):
        task(write_set(tmp_path / "set", studies)).test_docs()
