import re

import numpy as np
import pytest

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.demo.phantom import Finding
from medvlm_harness.demo.reports import Report, index_study, write_report

# One word that a sentence about the label cannot do without, whether it affirms or denies.
KEYWORD = {
    "Enlarged Cardiomediastinum": "mediastin",
    "Cardiomegaly": "heart|cardiomegaly",
    "Lung Lesion": "nodule|lesion",
    "Lung Opacity": "opacity",
    "Edema": "edema",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "effusion",
    "Pleural Other": "pleural (thickening|plaque)",
    "Fracture": "fracture",
    "Support Devices": r"pacemaker|\bline|catheter|tube",
}
DENIAL = re.compile(r"\b(no|not|without|normal)\b")
HEDGE = re.compile(r"possible|probable|cannot be excluded|questionable")


def write(findings: list[Finding], seed: int, hedged: tuple[str, ...] = ()) -> Report:
    return write_report(findings, hedged, np.random.default_rng(seed), sex="F", age=50)


def sentences_on(label: str, text: str) -> list[str]:
    return [part for part in re.split(r"(?<=\.) ", text.lower()) if re.search(KEYWORD[label], part)]


@pytest.mark.parametrize("seed", range(40))
def test_labels_say_what_the_sentences_say(seed: int) -> None:
    drawn = [Finding("Pleural Effusion", "left", 0.5), Finding("Pneumonia", "right", 0.2, "lower")]
    report = write(drawn, seed, hedged=("Pneumonia",))
    if report.labels is None:
        assert report.findings == ""
        return
    assert (report.labels["Pleural Effusion"], report.labels["Pneumonia"]) == (1, -1)
    for label in CHEXPERT_13:
        told = sentences_on(label, report.findings)
        match report.labels[label]:
            case None:
                assert not told, (label, told)
            case 0:
                assert told
                assert all(DENIAL.search(sentence) for sentence in told)
            case 1:
                assert any(not DENIAL.search(sentence) and not HEDGE.search(sentence) for sentence in told)
            case -1:
                assert any(HEDGE.search(sentence) for sentence in told)


def test_side_size_and_zone_are_told() -> None:
    report = next(r for r in (write([Finding("Lung Lesion", "left", 0.9, "upper")], k) for k in range(9)) if r.findings)
    text = report.findings.lower()
    assert all(word in text for word in ("left", "upper", "large"))


@pytest.mark.parametrize("label", CHEXPERT_13)
def test_every_finding_can_be_written_without_a_gap(label: str) -> None:
    site = "line" if label == "Support Devices" else "middle"
    for seed in range(20):
        side = "both" if label in ("Pleural Effusion", "Atelectasis", "Edema") else "right"
        report = write([Finding(label, side, 0.5, site)], seed)
        text = f"{report.findings} {report.impression}"
        assert "{" not in text
        assert "  " not in text.strip()
        assert " ." not in text
        assert "the bilateral" not in text


def test_normal_studies_share_texts_and_are_without_finding() -> None:
    reports = [write([], seed) for seed in range(200)]
    told = [report for report in reports if report.labels is not None]
    assert all(report.labels and report.labels["No Finding"] == 1 for report in told)
    assert all(1 not in [report.labels[name] for name in CHEXPERT_13] for report in told if report.labels)
    assert len({report.findings for report in told}) < 0.75 * len(told)


def test_some_reports_lack_findings_or_impression_but_never_both() -> None:
    reports = [write([Finding("Edema", "both", 0.5)], seed) for seed in range(300)]
    without_findings, without_impression = (
        [r for r in reports if not getattr(r, part)] for part in ("findings", "impression")
    )
    assert 3 < len(without_findings) < 40
    assert 3 < len(without_impression) < 60
    assert all(r.labels is None for r in without_findings)
    assert not [r for r in reports if not r.findings and not r.impression]


def test_a_report_never_denies_opacity_beside_a_consolidation() -> None:
    reports = [write([Finding("Consolidation", "left", 0.5, "lower")], seed) for seed in range(100)]
    assert all(report.labels is None or report.labels["Lung Opacity"] is None for report in reports)


def test_indexing_mostly_agrees_and_sometimes_leaves_a_study_out() -> None:
    rng = np.random.default_rng(0)
    drawn = [Finding("Edema", "both", 0.5), Finding("Fracture", "left", 0.1, "middle")]
    indexed = [index_study(drawn, rng) for _ in range(400)]
    left_out = [entry for entry in indexed if entry.labels is None]
    assert 0 < len(left_out) < 40
    assert all(entry.terms == ("No Indexing",) for entry in left_out)
    labels = [entry.labels for entry in indexed if entry.labels is not None]
    assert 0.9 < np.mean([values["Edema"] == 1 for values in labels]) < 1
    assert 0.6 < np.mean([values["Fracture"] == 1 for values in labels]) < 0.9  # the faint one is overlooked more
    assert all(value in (0, 1) for values in labels for value in values.values())
