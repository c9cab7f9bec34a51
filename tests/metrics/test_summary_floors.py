from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.metrics.rouge import rouge_scores
from medvlm_harness.metrics.sentences import split_sentences
from medvlm_harness.metrics.summary_floors import (
    copies,
    leads,
    most_frequent_summary,
    nearest_summaries,
    oracle_extracts,
)


def test_the_constant_is_the_most_frequent_summary_in_its_most_frequent_spelling() -> None:
    summaries = [
        "Edema.",
        "NO ACUTE DISEASE.",
        "No acute  disease.",
        "Edema.",
        "no acute disease.",
        "No acute disease.",
        "",
    ]
    assert most_frequent_summary(summaries) == "No acute disease."
    assert most_frequent_summary(["b", None, "a"]) == "a"


def test_leads_and_copies_take_the_source_as_it_is() -> None:
    sources = ["1. Nodule of 3.5 cm. Stable. Clear.", "no stop", "", None]
    assert leads(sources) == ["1. Nodule of 3.5 cm.", "no stop", "", ""]
    assert leads(sources, sentences=2)[0] == "1. Nodule of 3.5 cm. Stable."
    assert leads(sources, sentences=9)[0] == sources[0]
    assert copies(sources) == [*sources[:3], ""]


TRAIN = {
    "The lungs are clear. No effusion.": "Normal.",
    "There is a large left effusion.": "Effusion.",
    "There is a large left effusion and a nodule.": "Effusion and nodule.",
    "Lungs are clear": "Normal.",
    "": "Lost.",
    "Cardiomegaly is seen.": "",
}


def test_the_nearest_training_study_lends_its_summary() -> None:
    sources = [
        "Large left effusion.",
        "a nodule and a large left effusion",
        "No effusion",
        "Cardiomegaly is seen.",
        "",
        "zzz",
    ]
    found = nearest_summaries(list(TRAIN), list(TRAIN.values()), sources)
    # The study with cardiomegaly has no summary to lend; "is" is then the nearest word.
    assert found == ["Effusion.", "Effusion and nodule.", "Normal.", "Effusion.", "Normal.", "Normal."]


def test_a_study_of_the_training_set_finds_itself() -> None:
    known = [(source, summary) for source, summary in TRAIN.items() if source and summary]
    assert nearest_summaries(*zip(*known, strict=True), [source for source, _ in known]) == [s for _, s in known]


def test_the_oracle_is_the_best_of_all_sentences() -> None:
    sources = ["Heart is large. No acute disease of the lungs. Clear.", "", "One sentence only.", "Same. Same."]
    references = ["No acute lung disease.", "a", "zzz", "same"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(
            split_sentences(source) or [""],
            key=lambda sentence, r=reference: scorer.score(r, sentence)["rougeL"].fmeasure,
        )
        for source, reference in zip(sources, references, strict=True)
    ]
    assert (
        oracle_extracts(sources, references)
        == best
        == ["No acute disease of the lungs.", "", "One sentence only.", "Same."]
    )


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="a training summary, but all are empty"):
        most_frequent_summary(["", None])
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        leads(["a"], sentences=0)
    with pytest.raises(ValueError, match="source and summary, but there is none"):
        nearest_summaries(["a"], [""], ["a"])
    with pytest.raises(ValueError, match="a reference for each"):
        nearest_summaries(["a"], [], ["a"])
    with pytest.raises(ValueError, match="got one text"):
        copies("a")


def sections(studies: list[Study]) -> tuple[list[str], list[str]]:
    return [study.findings for study in studies], [study.impression for study in studies]


def test_floors_on_the_real_split(iu_cxr: Dataset) -> None:
    both = [study for study in iu_cxr.studies if study.findings and study.impression]
    train = sections([study for study in both if study.split == "train"])
    sources, references = sections([study for study in both if study.split == "test"])
    constant = most_frequent_summary(train[1])
    assert constant == "No acute cardiopulmonary abnormality."
    floors = {
        "constant": [constant] * len(sources),
        "lead": leads(sources),
        "copy": copies(sources),
        "nearest": nearest_summaries(*train, sources),
        "oracle": oracle_extracts(sources, references),
    }
    scores = {name: float(np.mean(rouge_scores(texts, references).rougeL)) for name, texts in floors.items()}
    assert scores["constant"] == pytest.approx(0.490, abs=0.0006)
    assert scores["copy"] == pytest.approx(0.125, abs=0.0006)
    assert scores["lead"] < scores["oracle"] < scores["constant"] < scores["nearest"]
