"""Templated reports of phantom studies: what was drawn, said in varied words, with negations and hedges.

Every sentence is written for this file; none stems from a data set. The labels follow from the sentences by
construction, so a labeler can be checked against them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.demo.anatomy import Finding

__all__ = ["Indexing", "Report", "index_study", "write_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """The sections of one report, and the labels that its findings section states."""

    indication: str
    comparison: str
    findings: str
    impression: str
    labels: Mapping[str, int | None] | None  # None where there is no findings section to label


@dataclass(frozen=True, slots=True)
class Indexing:
    """Index terms of a study, and the labels that they mean."""

    terms: tuple[str, ...]
    labels: Mapping[str, int | None] | None  # None where the study was not indexed


_PRESENT: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        "The cardiomediastinal silhouette is widened.",
        "There is {degree} enlargement of the cardiomediastinum.",
        "The mediastinum appears {degree}ly widened.",
    ),
    "Cardiomegaly": (
        "The heart is {degree}ly enlarged.",
        "There is {degree} cardiomegaly.",
        "Cardiomegaly, {degree} in degree.",
    ),
    "Lung Lesion": (
        "A {size} nodule lies in the {side} {zone} lung.",
        "There is a {size} rounded lesion in the {side} {zone} lung zone.",
        "A {size} well defined {side} {zone} lung nodule is noted.",
    ),
    "Lung Opacity": (
        "There is a {size} hazy opacity in the {side} {zone} lung.",
        "A {size} ill defined {side} {zone} zone opacity is seen.",
        "Hazy opacity, {size}, projects over the {side} {zone} lung.",
    ),
    "Edema": (
        "There is {degree} pulmonary edema.",
        "Perihilar haze on both sides is in keeping with {degree} edema.",
        "Vascular congestion with {degree} interstitial edema.",
    ),
    "Consolidation": (
        "There is a {size} dense consolidation in the {side} {zone} lung.",
        "The {side} {zone} zone shows a {size} area of consolidation.",
        "A {size} consolidation is present in the {side} {zone} zone.",
    ),
    "Pneumonia": (
        "Patchy airspace disease in the {side} {zone} lung fits {degree} pneumonia.",
        "There is {degree} pneumonia in the {side} {zone} zone.",
        "Patchy infiltrate of the {side} {zone} lung, {degree} pneumonia.",
    ),
    "Atelectasis": (
        "There is {degree} {side} basilar atelectasis.",
        "Linear {side} basilar bands represent {degree} atelectasis.",
        "Plate like {side} atelectasis with {degree} volume loss.",
    ),
    "Pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "A {size} {side} pneumothorax with visible pleural line is present.",
    ),
    "Pleural Effusion": (
        "There is a {size} {side} pleural effusion.",
        "A {size} {side} pleural effusion blunts the costophrenic angle.",
        "{side} pleural fluid, {size} in amount, in keeping with effusion.",
    ),
    "Pleural Other": (
        "There is {degree} {side} pleural thickening in the {zone} zone.",
        "A {size} pleural plaque is seen along the {side} chest wall.",
    ),
    "Fracture": (
        "There is a {degree}ly displaced {side} rib fracture.",
        "A {side} rib fracture is noted with {degree} displacement.",
    ),
    "Support Devices": ("{device}",),
}
_DEVICES = {
    "pacemaker": (
        "A {side} chest pacemaker with its lead is in place.",
        "{side} pacemaker, lead over the heart.",
    ),
    "line": ("A {side} central venous line is in place.", "{side} central catheter ends in the superior vena cava."),
    "tube": ("An endotracheal tube and a gastric tube are in place.", "Tracheal tube above the carina, gastric tube."),
}
_HEDGED: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": ("Heart size is borderline, possible cardiomegaly.",),
    "Lung Lesion": ("A possible nodule projects over the {side} {zone} lung.",),
    "Lung Opacity": ("Questionable faint opacity in the {side} {zone} lung.", "Possible {side} {zone} zone opacity."),
    "Edema": ("Mild edema cannot be excluded.", "Possible early pulmonary edema."),
    "Consolidation": ("Possible {side} {zone} zone consolidation.",),
    "Pneumonia": ("Pneumonia in the {side} {zone} lung cannot be excluded.", "Possible {side} {zone} pneumonia."),
    "Atelectasis": ("Probable {side} basilar atelectasis.", "Possible minor {side} atelectasis."),
    "Pleural Effusion": ("Possible trace {side} pleural effusion.", "A tiny {side} effusion cannot be excluded."),
    "Fracture": ("Possible {side} rib fracture.",),
}
# What is said to be absent, how often, and which labels it denies.
_ABSENT: tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...] = (
    (0.75, ("Cardiomegaly",), ("The heart is normal in size.", "Heart size is within normal limits.")),
    (0.45, ("Enlarged Cardiomediastinum",), ("The mediastinum is not widened.", "Mediastinal contours are normal.")),
    (0.60, ("Pleural Effusion", "Pneumothorax"), ("No pleural effusion or pneumothorax.",)),
    (
        0.55,
        ("Pleural Effusion",),
        ("There is no pleural effusion.", "No effusion.", "Sharp angles, no effusion."),
    ),
    (0.55, ("Pneumothorax",), ("There is no pneumothorax.", "No pneumothorax is seen.")),
    (0.50, ("Consolidation",), ("There is no consolidation.", "No focal consolidation.")),
    (0.30, ("Lung Opacity",), ("No focal opacity.", "The lungs are without opacity.")),
    (0.25, ("Edema",), ("No pulmonary edema.", "There is no edema.")),
    (0.25, ("Pneumonia",), ("No evidence of pneumonia.", "No pneumonia.")),
    (0.15, ("Atelectasis",), ("No atelectasis.",)),
    (0.20, ("Lung Lesion",), ("No nodule or mass.", "No suspicious lung nodule.")),
    (0.30, ("Fracture",), ("No acute fracture.", "No rib fracture is seen.")),
    (0.08, ("Pleural Other",), ("No pleural thickening.",)),
    (0.08, ("Support Devices",), ("No lines or tubes.",)),
)
_SHADOWS = ("Lung Lesion", "Consolidation", "Pneumonia", "Atelectasis")  # with these, no report says "no opacity"
_NEUTRAL = ("The trachea is midline.", "Soft tissues are unremarkable.", "The upper abdomen is unremarkable.")
_SHORT: dict[str, str] = {
    "Enlarged Cardiomediastinum": "Widened mediastinum",
    "Cardiomegaly": "{degree} cardiomegaly",
    "Lung Lesion": "{side} {zone} lung nodule",
    "Lung Opacity": "{side} {zone} zone opacity",
    "Edema": "{degree} pulmonary edema",
    "Consolidation": "{side} {zone} zone consolidation",
    "Pneumonia": "{side} {zone} zone pneumonia",
    "Atelectasis": "{side} basilar atelectasis",
    "Pneumothorax": "{size} {side} pneumothorax",
    "Pleural Effusion": "{size} {side} pleural effusion",
    "Pleural Other": "{side} pleural thickening",
    "Fracture": "{side} rib fracture",
    "Support Devices": "{site} in place",
}
_NORMAL_IMPRESSIONS = (
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute disease.",
    "No active disease of the chest.",
)
_INDICATIONS = (
    "cough",
    "chest pain",
    "shortness of breath",
    "fever",
    "before surgery",
    "fall",
    "known heart disease",
)
_COMPARISONS = ("None.", "None available.", "Earlier chest radiograph.", "")
STOCK_REPORTS = 6  # normal studies are often dictated with the same few texts


def _words(finding: Finding) -> dict[str, str]:
    grade = 0 if finding.size < 0.33 else 1 if finding.size < 0.66 else 2
    return {
        "side": {"both": "bilateral", "": ""}.get(finding.side, finding.side),
        "zone": finding.site,
        "site": {"line": "central line", "tube": "tubes"}.get(finding.site, finding.site),
        "size": ("small", "moderate", "large")[grade],
        "degree": ("mild", "moderate", "severe")[grade],
    }


def _sentence(template: str, finding: Finding) -> str:
    text = " ".join(template.format_map(_words(finding)).split())
    return text[:1].upper() + text[1:]


def write_report(
    findings: Sequence[Finding],
    hedged: Collection[str],
    rng: np.random.Generator,
    *,
    sex: str,
    age: int,
) -> Report:
    """Write up a study.

    Args:
        findings: what was drawn.
        hedged: labels among them that the report only calls possible.
        rng: chooses words, order, and which sections are missing.
        sex: "F" or "M".
        age: in years.
    """
    person = "woman" if sex == "F" else "man"
    indication = f"{age} year old {person}, {_pick(_INDICATIONS, rng)}."
    comparison = _pick(_COMPARISONS, rng)
    missing = rng.random()
    if not findings and rng.random() < 0.55:
        rng = np.random.default_rng(int(rng.integers(STOCK_REPORTS)))
    text, labels = _write_findings(findings, hedged, rng)
    impression = _write_impression(findings, hedged, rng)
    if missing < 0.05:
        return Report(indication, comparison, "", impression, None)
    return Report(indication, comparison, text, "" if missing < 0.12 else impression, labels)


def _write_findings(
    findings: Sequence[Finding], hedged: Collection[str], rng: np.random.Generator
) -> tuple[str, dict[str, int | None]]:
    labels: dict[str, int | None] = dict.fromkeys(CHEXPERT_14)
    sentences = []
    for finding in findings:
        unsure = finding.label in hedged
        labels[finding.label] = -1 if unsure else 1
        template = _pick((_HEDGED if unsure else _PRESENT)[finding.label], rng)
        if template == "{device}":
            template = _pick(_DEVICES[finding.site], rng)
        sentences.append(_sentence(template, finding))
    denials = []
    shadowed = any(labels[label] is not None for label in _SHADOWS)
    for share, denied, wordings in _ABSENT:
        contradicts = shadowed and "Lung Opacity" in denied
        if rng.random() < share and not contradicts and all(labels[label] is None for label in denied):
            labels |= dict.fromkeys(denied, 0)
            denials.append(_pick(wordings, rng))
    if not sentences:
        denials.insert(0, _pick(("The lungs are clear.", "Clear lungs.", "Both lungs are well expanded."), rng))
    if rng.random() < 0.4:
        denials.append(_pick(_NEUTRAL, rng))
    if all(labels[label] not in (1, -1) for label in CHEXPERT_13 if label != "Support Devices"):
        labels["No Finding"] = 1
    first, second = (sentences, denials) if rng.random() < 0.7 else (denials, sentences)
    return " ".join(first + second), labels


def _write_impression(findings: Sequence[Finding], hedged: Collection[str], rng: np.random.Generator) -> str:
    told = [
        _sentence(("Possible " if f.label in hedged else "") + _SHORT[f.label], f).replace("  ", " ") + "."
        for f in findings
    ]
    if not told:
        return _pick(_NORMAL_IMPRESSIONS, rng)
    return " ".join(told) if rng.random() < 0.85 else " ".join(told[:1]) + " Clinical correlation is suggested."


def index_study(findings: Sequence[Finding], rng: np.random.Generator) -> Indexing:
    """Index a study from its pictures, as a librarian would: terms, and the labels they mean.

    A few studies are left unindexed (None, not negative), a few findings overlooked or added.
    """
    if rng.random() < 0.04:
        return Indexing(("No Indexing",), None)
    seen = {f.label: f for f in findings if rng.random() > (0.25 if f.size < 0.25 else 0.05)}
    if rng.random() < 0.04:
        extra = _pick(CHEXPERT_13, rng)
        seen.setdefault(extra, Finding(extra))
    labels: dict[str, int | None] = {label: int(label in seen) for label in CHEXPERT_13}
    terms = tuple("/".join(filter(None, (f.label, f.site, f.side, _words(f)["size"]))) for f in seen.values())
    return Indexing(terms or ("normal",), {"No Finding": int(not seen), **labels})


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
