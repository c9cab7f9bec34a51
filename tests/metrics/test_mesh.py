from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import yaml

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.labels import mesh_labels
from medvlm_harness.data.records import Dataset
from medvlm_harness.metrics.mesh import (
    coded_findings,
    described_findings,
    entity_phrases,
    mesh_f1_estimates,
    mesh_findings_version,
    mesh_label_estimates,
)

VOCABULARY: Mapping[str, Any] = yaml.safe_load(
    files("medvlm_harness.metrics").joinpath("mesh_findings.yaml").read_text(encoding="utf-8")
)
PRESENT, UNSURE, ABSENT = (
    f"Observation::{status}" for status in ("definitely present", "uncertain", "definitely absent")
)
PLACE = "Anatomy::definitely present"


@pytest.mark.parametrize(
    ("terms", "findings"),
    [
        (["Cardiomegaly/mild"], {"enlarged heart"}),
        (["cardiac shadow / Enlarged"], {"enlarged heart"}),
        (["Lung/bilateral/hypoinflation"], {"low lung volumes"}),
        (["Lung/hyperdistention", "Diaphragm/bilateral/flattened"], {"hyperinflation", "flattened diaphragm"}),
        (["Calcinosis/aorta, thoracic"], {"calcification", "atherosclerosis"}),
        (["Subcutaneous  Emphysema/right"], {"subcutaneous air"}),
        (["Thickening/pleura/apex"], {"pleural thickening"}),
        (["Thickening/bronchovascular"], set()),
        (["normal"], set()),
    ],
)
def test_codes_stand_for_findings(terms: list[str], findings: set[str]) -> None:
    assert coded_findings(terms) == findings


@pytest.mark.parametrize("terms", [["No Indexing"], [], [" "], ["Cardiomegaly", "no  indexing"]])
def test_a_study_that_nobody_coded_is_unlabelled_and_not_normal(terms: list[str]) -> None:
    assert coded_findings(terms) is None


@pytest.mark.parametrize(
    ("phrase", "findings"),
    [
        ("mild cardiomegaly", {"enlarged heart"}),
        ("heart mildly enlarged", {"enlarged heart"}),
        ("Heart", set()),
        ("enlarged", set()),
        ("calcified granulomas right upper lobe", {"granuloma"}),
        ("calcified aortic arch", {"calcification", "atherosclerosis"}),
        ("pericardial effusion", {"pericardial effusion"}),
        ("small left pleural effusion", {"pleural effusion"}),
        ("hydropneumothorax", {"pleural effusion", "pneumothorax"}),
        ("subcutaneous emphysema", {"subcutaneous air"}),
        ("degenerative changes of the shoulder", {"arthritis"}),
        ("degenerative changes thoracic spine", {"degenerative spine"}),
        ("massive", set()),
        ("", set()),
    ],
)
def test_words_stand_for_findings(phrase: str, findings: set[str]) -> None:
    assert described_findings([phrase]) == findings


def test_words_of_two_observations_do_not_make_a_third() -> None:
    assert described_findings(["enlarged nodes", "normal heart"]) == {"enlarged nodes"}


@pytest.mark.parametrize("name", VOCABULARY["findings"])
def test_every_finding_is_reached_by_a_code_and_by_words_that_stand_for_it(name: str) -> None:
    entry = VOCABULARY["findings"][name]
    for code in entry["codes"]:
        assert name in (coded_findings([code]) or ()), code
    for phrase in entry["phrases"]:
        said = [word.split("|")[0].rstrip("*") for word in phrase.split() if not word.startswith("-")]
        assert name in described_findings([" ".join(said)]), phrase


def test_the_list_is_written_in_the_form_that_it_describes() -> None:
    assert VOCABULARY.keys() == {"version", "findings"} and VOCABULARY["version"] == mesh_findings_version()
    words = [
        word for entry in VOCABULARY["findings"].values() for phrase in entry["phrases"] for word in phrase.split()
    ]
    assert all(re.fullmatch(r"-?[a-z-]+\*?(\|[a-z-]+\*?)*", word) for word in words)


def entity(tokens: str, label: str, *relations: tuple[str, str]) -> dict[str, Any]:
    return {"tokens": tokens, "label": label, "relations": [list(relation) for relation in relations]}


ENTITIES = {
    "1": entity("heart", PLACE),
    "2": entity("mildly", PRESENT, ("modify", "3")),
    "3": entity("enlarged", PRESENT, ("located_at", "1")),
    "4": entity("edema", ABSENT),
    "5": entity("left", PLACE, ("modify", "6")),
    "6": entity("base", PLACE),
    "7": entity("pneumonia", UNSURE, ("located_at", "6")),
}


def test_an_entity_is_described_by_its_modifiers_and_its_place() -> None:
    phrases = entity_phrases(ENTITIES)
    assert phrases == ["mildly", "enlarged mildly heart", "pneumonia base left"]
    assert described_findings(phrases) == {"enlarged heart", "pneumonia"}
    assert entity_phrases(ENTITIES, uncertain=False) == phrases[:2]
    assert entity_phrases({}) == []


def test_modifiers_in_a_circle_end() -> None:
    circle = {"1": entity("a", PRESENT, ("modify", "2")), "2": entity("b", PRESENT, ("modify", "1"))}
    assert entity_phrases(circle) == ["a b", "b a"]


TERMS = [["Cardiomegaly", "Opacity/lung"], ["normal"], ["No Indexing"], ["Pleural Effusion/left"]]
PHRASES = [["cardiomegaly", "left nodule"], [], ["pneumonia"], ["left effusion", "clear lungs"]]


def test_scores_are_micro_over_the_studies_that_were_coded() -> None:
    estimates = mesh_f1_estimates(PHRASES, TERMS, ["a", "b", "c", "d"], floors={"mesh_f1": 0.25}, resamples=50)
    # Coded: heart, opacity, effusion; described: heart, nodule, effusion.
    assert [estimates[key].value for key in ("mesh_f1", "mesh_precision", "mesh_recall")] == pytest.approx([2 / 3] * 3)
    score = estimates["mesh_f1"]
    assert (score.n, score.positives, score.floor) == (3, 3, 0.25)
    assert score.extra["mesh_findings_version"] == mesh_findings_version()


def test_without_a_coded_study_or_finding_scores_are_undefined() -> None:
    assert mesh_f1_estimates([["edema"]], [["No Indexing"]], ["a"])["mesh_f1"].reason == "no item"
    normal = mesh_f1_estimates([[]], [["normal"]], ["a"])["mesh_f1"]
    assert np.isnan(normal.value) and (normal.n, normal.positives) == (1, 0)


def test_labels_are_compared_with_the_coders_where_they_coded() -> None:
    blank = dict.fromkeys(CHEXPERT_14)
    labels = [blank | {"Cardiomegaly": 1}, blank | {"Edema": 1}, blank | {"Edema": 1}, blank | {"Pleural Effusion": 1}]
    estimates = mesh_label_estimates(labels, TERMS, ["a", "b", "c", "d"], resamples=50)
    # Coded: heart, opacity, no finding, effusion; predicted: heart, edema, effusion.
    assert estimates["micro_14"].value == pytest.approx(2 * 2 / 7)
    assert (estimates["micro_14"].n, estimates["Edema"].positives) == (3, 0)


def test_what_the_mapping_leaves_open_is_left_out_by_default() -> None:
    blank = dict.fromkeys(CHEXPERT_14)
    borderline, clear = [["Cardiomegaly/borderline"], ["Cardiomegaly"]], [blank, blank | {"Cardiomegaly": 1}]
    options: dict[str, Any] = {"names": ("Cardiomegaly",), "resamples": 5}
    assert mesh_label_estimates(clear, borderline, ["a", "b"], **options)["Cardiomegaly"].value == 1
    hedged = mesh_label_estimates(clear, borderline, ["a", "b"], uncertain="ones", **options)
    assert hedged["Cardiomegaly"].value == pytest.approx(2 / 3)


def test_other_studies_are_refused() -> None:
    for score in (mesh_f1_estimates, mesh_label_estimates):
        with pytest.raises(ValueError, match="but got 1, 2 and 1"):
            score([[]], [["normal"], ["normal"]], ["a"])  # type: ignore[operator]


def test_the_list_covers_what_the_coders_wrote(iu_cxr: Dataset) -> None:
    """All but a few codes of the real set that are about the chest stand for a finding."""
    codes = [term for study in iu_cxr.studies if mesh_labels(study.mesh) for term in study.mesh]
    kept = [code for code in codes if code.lower() not in ("normal", "technical quality of image unsatisfactory")]
    assert len(kept) > 5000
    assert np.mean([bool(coded_findings([code])) for code in kept]) > 0.97
