from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from medvlm_harness.data.records import Dataset
from medvlm_harness.metrics.rouge import RougeScores, rouge_scores, rouge_settings
from medvlm_harness.metrics.sentences import split_sentences

RNG = np.random.default_rng(5)
WORDS = ["no", "acute", "effusion", "effusions", "lungs", "clear", "the", "3.5", "opacities", "Opacity", "x-ray", "°C"]
PAIRS = [
    (" ".join(RNG.choice(WORDS, a)) + ".", ". ".join(" ".join(RNG.choice(WORDS, 4)) for _ in range(b)))
    for a, b in RNG.integers(1, 12, (60, 2))
]
ODD = [
    ("Épanchement pleural gauche", "epanchement pleural"),
    ("肺は明らかです", "肺は明らかです"),
    ("...", "---"),
    ("No effusion.", "!"),
    ("1. No effusion. 2. No edema.", "No edema.\nNo effusion."),
    ("A\u00a0nodule\tof 3.5\u2009cm", "a nodule of 3 5 cm"),
    ("effusion " * 300, "effusion"),
]


def by_rouge_score(text: str, reference: str, stemmer: bool) -> list[float]:
    """The package itself, with its own tokenizer, on the same lines for Lsum."""
    plain = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer).score(reference, text)
    lines = ["\n".join(split_sentences(side)) for side in (reference, text)]
    return [
        *(plain[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")),
        RougeScorer(["rougeLsum"], use_stemmer=stemmer).score(*lines)["rougeLsum"].fmeasure,
    ]


@pytest.mark.parametrize("stemmer", [True, False])
def test_equals_rouge_score_itself_to_the_last_bit(stemmer: bool) -> None:
    texts, references = zip(*(PAIRS + ODD), strict=True)
    scores = np.column_stack(rouge_scores(texts, references, stemmer=stemmer))
    expected = [by_rouge_score(text, reference, stemmer) for text, reference in PAIRS + ODD]
    assert (scores == np.array(expected)).all()
    assert len(np.unique(scores)) > 50


def test_lsum_is_taken_over_sentences_and_not_over_the_whole_text() -> None:
    scores = rouge_scores(["No edema. No effusion."], ["No effusion. No edema."])
    assert scores.rougeLsum[0] == 1
    assert scores.rougeL[0] == pytest.approx(2 / 4)


def test_a_denied_finding_scores_two_thirds() -> None:
    assert rouge_scores(["no effusion"], ["effusion"]).rouge1[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("text", "reference"), [("", "a"), ("a", ""), ("", ""), (None, "a"), ("a", None), (" ", "a")])
def test_empty_and_missing_texts_score_zero(text: str | None, reference: str | None) -> None:
    assert [scores.tolist() for scores in rouge_scores([text], [reference])] == [[0.0]] * 4


def test_no_pairs_have_no_scores() -> None:
    assert [scores.shape for scores in rouge_scores([], [])] == [(0,)] * 4


def test_stemming_matches_plurals_and_says_so() -> None:
    assert rouge_scores(["effusions"], ["effusion"]).rouge1[0] == 1
    assert rouge_scores(["effusions"], ["effusion"], stemmer=False).rouge1[0] == 0
    assert "Porter stemmer" in rouge_settings() and "no stemmer" in rouge_settings(stemmer=False)


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        (["a"], ["a", "b"], "a reference for each"),
        ("no effusion", "no effusion", "got one text"),
        ([float("nan")], ["a"], "at 0 of generated, but got float"),
        (["a"], [3], "at 0 of references, but got int"),
    ],
)
def test_wrong_input_says_what_was_expected(texts: list[str], references: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rouge_scores(texts, references)


def test_importing_the_metric_does_not_import_nltk() -> None:
    code = "import sys, medvlm_harness.metrics.rouge; sys.exit('nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def mean(scores: RougeScores) -> list[float]:
    return [float(column.mean()) for column in scores]


def test_the_test_split_gives_the_known_floors_in_a_second(iu_cxr: Dataset) -> None:
    """Measured independently on the R2Gen test split: one constant sentence, and copying the findings."""
    studies = [study for study in iu_cxr.studies if study.split == "test" and study.findings and study.impression]
    references = [study.impression for study in studies]
    assert len(studies) == 590
    start = time.perf_counter()
    constant = mean(rouge_scores(["no acute cardiopulmonary abnormality."] * 590, references))
    copied = mean(rouge_scores([study.findings for study in studies], references))
    assert time.perf_counter() - start < 5
    assert constant[:3] == pytest.approx([0.490, 0.378, 0.490], abs=0.0006)
    assert copied[:3] == pytest.approx([0.143, 0.047, 0.125], abs=0.0006)
