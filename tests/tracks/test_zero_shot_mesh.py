"""Zero-shot classification whose truth is what the coders wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.api.instance import Instance
from sklearn.metrics import roc_auc_score

from medvlm_harness import plugin
from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.data.labels import mesh_labels
from medvlm_harness.data.records import Dataset, Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.mesh import coded_findings
from medvlm_harness.requests import LabelScores
from medvlm_harness.tracks.zero_shot import ZeroShot

TERMS = {
    "emphysema": "Pulmonary Emphysema/severe",
    "hernia": "Hernia, Hiatal/large",
    "tortuous aorta": "Aorta, Thoracic/tortuous",
}
UNCODED: set[tuple[str, ...]] = {(), ("No Indexing",)}
OTHERS = (("normal",), ("Cardiomegaly/mild",), ("Aorta/prominent",), ("No Indexing",), ())
# What the rule of tasks/iu_cxr/README.md leaves out by hand: shades, shapes and things of any place, and a diagnosis.
NOT_SEEN_AS_SUCH = {"calcification", "deformity", "density", "lucency", "markings", "copd"}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """160 studies: every fourth with two findings, the others with none of these, or coded by nobody."""
    studies = []
    for k in range(160):
        some = list(TERMS.values())[k % 3 :][:2] if k % 4 == 0 else OTHERS[k % 5]
        labels = {"mesh": {"Edema": 1}}  # a prepared source, which this truth does not ask
        split = ("test", "unassigned", "train", "test")[k // 4 % 4]
        image = fake_image(f"{k}.png")
        studies.append(Study(f"s{k:03}", f"p{k}", (image,), mesh=tuple(some), labels=labels, split=split))
    return write_set(tmp_path_factory.mktemp("coded") / "set", studies)


def task(folder: Path, **config: Any) -> ZeroShot:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    base = {"task": "t", "dataset": "synthetic", "labels": list(TERMS), "truth": "mesh_findings"}
    return ZeroShot({**base, "split": "test+unassigned", **config, "metadata": metadata})


def noise(requests: Sequence[Instance]) -> list[LabelScores]:
    (request,) = requests
    image, label_set = request.arguments
    margin = np.random.default_rng(int(str(image)[:8], 16)).standard_normal(len(label_set.labels))
    return [LabelScores(tuple(margin.tolist()), tuple((1 / (1 + np.exp(-margin))).tolist()))]


def test_the_truth_is_what_the_coders_wrote_of_the_studies_they_coded(folder: Path, score: Callable[..., Any]) -> None:
    one = task(folder)
    result = score(one, noise)
    coded = {s.study_id: s.mesh for s in one.data.studies if s.split != "train" and s.mesh not in UNCODED}
    assert [d["study_id"] for d in result.documents] == sorted(coded)
    # Independent: the terms themselves, each of which stands for one finding here.
    expected = {study: [int(term in mesh) for term in TERMS.values()] for study, mesh in coded.items()}
    assert {d["study_id"]: d["target"] for d in result.documents} == expected
    assert {tuple(row) for row in expected.values()} >= {(0, 0, 0), (1, 1, 0)}
    margins = np.array([answer[0].margin for answer in result.answers])
    truth = np.array([expected[d["study_id"]] for d in result.documents])
    for j, key in enumerate(("emphysema", "hernia", "tortuous_aorta")):
        assert result.value(f"auroc_{key}") == pytest.approx(roc_auc_score(truth[:, j], margins[:, j]))
    assert result.details["counts"]["images_without_target"] == len(one.studies) - len(coded) > 0
    assert result.details["label_source"] == "mesh_findings" and result.details["mesh_findings_version"] >= 1
    assert not any("@" in name for name in result.estimates)  # no prepared source has these labels


def test_the_prior_is_that_of_the_train_splits_coded_studies(folder: Path) -> None:
    one = task(folder)
    train = [s.mesh for s in one.data.studies if s.split == "train" and s.mesh not in UNCODED]
    share = [sum(term in mesh for mesh in train) / len(train) for term in TERMS.values()]
    assert one.request_labels.prior == pytest.approx(tuple(share))


def test_a_label_source_of_the_run_is_for_the_tasks_that_have_one(folder: Path) -> None:
    """`--tasks 'iu_cxr_*' --metadata label_source=mesh` still runs."""
    assert task(folder, metadata={"label_source": "mesh"}).test_docs() == task(folder).test_docs()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"truth": "mesh"}, "expected truth to be mesh_findings"),
        ({"target": "view", "labels": {"kind": "multiclass", "options": {"a": "x", "b": "y"}}}, "of a multilabel set"),
    ],
)
def test_a_wrong_declaration_is_refused(folder: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(folder, **config)


def test_a_finding_that_no_code_stands_for_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"mesh_findings has no label 'emphysemas'\. Did you mean emphysema"):
        task(folder, labels=["emphysemas"]).test_docs()


def test_a_set_that_nobody_coded_has_nothing_to_score(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> None:
    folder = write_set(tmp_path / "set", [Study("a", "a", (fake_image("a.png"),), split="test")])
    with pytest.raises(UserError, match=r"nothing to score.*; 0 have MeSH terms"):
        task(folder).test_docs()


def test_the_rare_labels_of_iu_cxr_are_those_of_their_rule(iu_cxr: Dataset) -> None:
    """Coded at least ten times, none of CheXpert's thirteen nor perhaps one, and seen as such."""
    declared = yaml.safe_load(
        (plugin.tasks_folder() / "iu_cxr" / "iu_cxr_rare.yaml").read_text().replace("!function", "")
    )
    found = [names for study in iu_cxr.studies if (names := coded_findings(study.mesh)) is not None]
    raw = yaml.safe_load((Path(plugin.__file__).parent / "metrics" / "mesh_findings.yaml").read_text())["findings"]
    chosen = {
        name
        for name, entry in raw.items()
        if sum(name in names for names in found) >= 10
        and not any(labels[k] for code in entry["codes"] if (labels := mesh_labels([code])) for k in CHEXPERT_13)
    }
    assert chosen >= NOT_SEEN_AS_SUCH
    assert set(declared["labels"]) == chosen - NOT_SEEN_AS_SUCH
