from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from medvlm_harness.data.info import describe
from medvlm_harness.data.labels import resolve
from medvlm_harness.data.records import Dataset, Image, Manifest, Study

LABELS = [(1, 1), (1, 0), (0, 0), (0, None), (-1, 1), (None, 0)]


def dataset() -> Dataset:
    studies = [
        Study(
            str(number),
            str(number),
            images=(Image("a.png", "0", "frontal"), Image("b.png", "1", None))[: number % 3],
            findings="heart XXXX" if number % 2 else "",
            labels={"one": {"Edema": first}, "two": {"Edema": second}},
            split="test" if number else "train",
        )
        for number, (first, second) in enumerate(LABELS)
    ]
    studies.append(Study("alone", "alone", labels={"one": {"Edema": 1}}, split="test"))
    manifest = Manifest("mine", "demo", "", "mit", {}, {}, ("one", "two"), ("Edema", "Fracture"))
    return Dataset(Path(), manifest, tuple(studies), "")


def test_counts_per_split_view_section_and_label() -> None:
    found = describe(dataset())
    train, test = found.splits
    assert (train.split, train.studies, train.images, train.without_image) == ("train", 1, 0, 1)
    assert (test.studies, test.images, test.frontal, test.lateral, test.view_unknown) == (6, 6, 4, 0, 2)
    assert (test.without_image, test.without_frontal) == (2, 2)
    findings = next(row for row in found.sections if row.section == "findings")
    assert (findings.studies, findings.with_token) == (3, 3)
    one = next(row for row in found.labels if (row.source, row.label) == ("one", "Edema"))
    assert (one.positive, one.negative, one.uncertain, one.unmentioned, one.unlabelled) == (3, 2, 1, 1, 0)
    two = next(row for row in found.labels if (row.source, row.label) == ("two", "Edema"))
    assert (two.positive, two.negative, two.uncertain, two.unmentioned, two.unlabelled) == (2, 3, 0, 1, 1)


def test_agreement_is_over_the_studies_that_both_sources_decide() -> None:
    edema, fracture = describe(dataset()).agreement
    assert (edema.label, edema.first, edema.second, edema.studies) == ("Edema", "one", "two", 5)
    assert edema.kappa == pytest.approx(cohen_kappa_score([1, 1, 0, 0, 0], [1, 0, 0, 0, 0]))
    assert fracture.studies == 0
    assert fracture.kappa != fracture.kappa
    assert describe(dataset(), uncertain="positive").agreement[0].studies == 6


def test_the_real_sources_agree_as_an_independent_count_says(iu_cxr: Dataset) -> None:
    found = describe(iu_cxr)
    assert all(
        row.positive + row.negative + row.uncertain + row.unmentioned + row.unlabelled == len(iu_cxr.studies)
        for row in found.labels
    )
    for row in found.agreement:
        both = [[resolve(study.labels.get(source), row.label) for source in (row.first, row.second)]
                for study in iu_cxr.studies]  # fmt: skip
        decided = [pair for pair in both if None not in pair]
        assert row.studies == len(decided)
        assert row.kappa == pytest.approx(cohen_kappa_score(*zip(*decided, strict=True)))
