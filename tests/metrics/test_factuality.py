from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import yaml

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.data.records import Dataset
from medvlm_harness.metrics.factuality import (
    CHECKS,
    RECALLS,
    PairChecks,
    Reading,
    check_pair,
    claims_prior,
    critical_findings,
    factuality_rates,
    factuality_version,
    is_cut_off,
    is_repetitive,
)
from medvlm_harness.metrics.laterality import SidedMention

RNG = np.random.default_rng(29)
PHRASES = {
    "Cardiomegaly": "cardiomegaly",
    "Edema": "pulmonary edema",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion",
    "Fracture": "rib fracture",
}


def read(text: str) -> Reading:
    """A labeler for the sentences that these tests write: one finding each, denied by "no", hedged by "possible"."""
    labels: dict[str, int | None] = dict.fromkeys(CHEXPERT_14)
    for sentence in text.lower().split("."):
        for name, phrase in PHRASES.items():
            if phrase in sentence:
                labels[name] = 0 if "no " in sentence else -1 if "possible" in sentence else 1
    return Reading(text, labels)


def flagged(source: str, written: str, **options: Any) -> set[str]:
    flags = check_pair(read(source), read(written), **options).flags
    assert set(flags) == set(CHECKS)
    return {name for name, flag in flags.items() if flag == 1}


@pytest.mark.parametrize(
    ("source", "written", "flags"),
    [
        ("Left pleural effusion.", "Left pleural effusion.", set()),
        ("Pleural effusion.", "No pleural effusion.", {"contradiction"}),
        ("No pleural effusion.", "Pleural effusion.", {"contradiction", "unsupported_finding"}),
        ("Possible pneumonia.", "Pneumonia.", set()),
        ("Clear lungs.", "Pneumonia.", {"unsupported_finding"}),
        ("Clear lungs.", "Possible pneumonia.", set()),
        ("Pneumonia. Cardiomegaly.", "Pneumonia.", {"omission"}),
        ("Left pleural effusion.", "Right pleural effusion.", {"laterality_conflict"}),
        ("Left pleural effusion.", "Bilateral pleural effusion.", set()),
        ("Rib fracture of 3.5 cm.", "Rib fracture of 35 mm.", set()),
        ("Rib fracture of 3.5 cm.", "Rib fracture of 3.5 mm.", {"measurement_not_in_source"}),
        ("Cardiomegaly.", "Cardiomegaly. Cardiomegaly. Cardiomegaly. ", {"repetition"}),
        ("Cardiomegaly.", "", {"omission", "empty"}),
        ("Cardiomegaly.", " . ", {"omission", "empty"}),
        ("Cardiomegaly.", "Cardiomegaly and", {"truncated"}),
        ("", "", {"empty"}),
    ],
)
def test_hand_cases(source: str, written: str, flags: set[str]) -> None:
    assert flagged(source, written) == flags


def test_questions_that_do_not_arise_are_undefined_and_not_passed() -> None:
    plain = check_pair(Reading("Left effusion."), Reading("Effusion."), comparison="Chest radiograph of yesterday")
    for name in ("contradiction", "unsupported_finding", "omission", "laterality_conflict", "prior_without_prior"):
        assert math.isnan(plain.flags[name])
    assert plain.found == {"positive_recall": (0, 0), "critical_recall": (0, 0)}
    sided = check_pair(Reading("Left effusion."), Reading("Left effusion."), comparison="None.")
    assert sided.flags["laterality_conflict"] == sided.flags["prior_without_prior"] == 0


def test_no_finding_is_no_finding() -> None:
    source, written = ({"No Finding": 1} | dict.fromkeys(CHEXPERT_13), {"No Finding": 0} | dict.fromkeys(CHEXPERT_13))
    flags = check_pair(Reading("a", source), Reading("a", written)).flags
    assert flags["contradiction"] == flags["unsupported_finding"] == flags["omission"] == 0


def test_recall_counts_what_the_source_has_and_critical_findings_apart() -> None:
    pair = check_pair(read("Cardiomegaly. Pneumonia. Pneumothorax."), read("Possible pneumonia. No pneumothorax."))
    assert pair.found == {"positive_recall": (1, 3), "critical_recall": (1, 2)}
    assert critical_findings() < set(CHEXPERT_13)


def test_a_labelers_sides_are_used_where_both_texts_have_them() -> None:
    left, right = (Reading("Effusion.", mentions=[SidedMention("e", 1, side)]) for side in ("left", "right"))
    assert check_pair(left, right).flags["laterality_conflict"] == 1
    assert math.isnan(check_pair(left, Reading("Right effusion.")).flags["laterality_conflict"])


@pytest.mark.parametrize(
    "sentence",
    [
        "Effusion has increased since the prior study.",
        "No significant interval change.",
        "Interval removal of the chest tube.",
        "Unchanged from the previous radiograph.",
        "Stable compared to prior.",
        "Smaller than on the most recent prior chest radiograph.",
        "Cardiomegaly is again seen.",
        "Redemonstration of a granuloma.",
        "As compared to XXXX, the nodule has grown.",
        "The previously described nodule is larger.",
        "Clearing in the interval.",
    ],
)
def test_comparisons_with_an_earlier_study_are_claims(sentence: str) -> None:
    assert claims_prior(f"Clear lungs. {sentence}") == [sentence]
    assert "prior_without_prior" in flagged("Clear lungs.", sentence, comparison="None")
    assert "prior_without_prior" not in flagged("Clear lungs.", sentence, comparison="Chest radiograph")
    assert math.isnan(check_pair(read(""), read(sentence), comparison="XXXX").flags["prior_without_prior"])
    assert math.isnan(check_pair(read(""), read(sentence)).flags["prior_without_prior"])


@pytest.mark.parametrize(
    "text",
    [
        "Prior granulomatous disease.",
        "Prior chest surgery.",
        "Stable cardiomegaly.",
        "Changes from prior median sternotomy.",
        "Related to prior chest surgery.",
        "Recommend comparison with prior images.",
        "Comparison to old films, if available, would be useful.",
        "No prior studies for comparison.",
        "Follow up at an appropriate interval.",
        "Increased lung markings.",
        "",
    ],
)
def test_history_requests_and_plain_words_of_change_are_no_claims(text: str) -> None:
    assert claims_prior(text) == []


@pytest.mark.parametrize(
    ("text", "repetitive"),
    [
        ("No acute disease. No acute disease.", True),
        ("1. No acute disease. 2. No acute disease.", True),
        ("no acute disease no acute disease", True),
        ("effusion effusion effusion", True),
        ("left and left and left and", True),
        ("a small effusion in the base, a small effusion in the apex, a small effusion in the hilum", True),
        ("No acute disease. No effusion.", False),
        ("No edema. No edema.", False),
        ("very very small effusion", False),
        ("No effusion or pneumothorax on the left. No effusion or pneumothorax on the right.", False),
        ("", False),
    ],
)
def test_loops_and_sentences_said_twice_are_repetition(text: str, repetitive: bool) -> None:
    assert is_repetitive(text) is repetitive


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("No acute disease of the", True),
        ("Effusion, atelectasis,", True),
        ("Effusion in the left-", True),
        ("No acute disease", False),
        ("Unchanged from before.", False),
        ("Type A.", False),
        ("", False),
    ],
)
def test_a_text_that_ends_in_mid_sentence_is_cut_off(text: str, cut: bool) -> None:
    assert is_cut_off(text) is cut
    assert is_cut_off(text, hit_limit=True) and not is_cut_off(text, hit_limit=False)


def random_checks(n: int, rate: float) -> list[PairChecks]:
    def flag() -> float:
        return math.nan if RNG.random() < 0.2 else float(RNG.random() < rate)

    found = [{name: (int(RNG.integers(0, 2)), int(RNG.integers(1, 4))) for name in RECALLS} for _ in range(n)]
    return [PairChecks({name: flag() for name in CHECKS}, one) for one in found]


def test_rates_are_over_the_pairs_where_the_question_arises_and_recalls_micro() -> None:
    model, human = random_checks(200, 0.3), random_checks(200, 0.1)
    rates = factuality_rates(model, human, np.arange(200), resamples=300)
    assert set(rates) == {*CHECKS, *RECALLS}
    for name in CHECKS:
        expected = [np.nanmean([pair.flags[name] for pair in side]) for side in (model, human)]
        assert [rates[name].model.value, rates[name].reference.value] == pytest.approx(expected)
        assert rates[name].lift.value == pytest.approx(expected[0] - expected[1])
        assert rates[name].model.n == sum(not math.isnan(pair.flags[name]) for pair in model)
        assert rates[name].model.positives == sum(pair.flags[name] == 1 for pair in model)
        assert rates[name].lift.n == 200
        assert rates[name].lift.ci95[0] < rates[name].lift.value < rates[name].lift.ci95[1]
    for name in RECALLS:
        found, wanted = np.array([pair.found[name] for pair in model]).sum(axis=0)
        assert rates[name].model.value == pytest.approx(found / wanted)
        assert (rates[name].model.positives, rates[name].model.n) == (found, wanted)


def test_the_human_text_against_itself_has_no_lift() -> None:
    human = random_checks(50, 0.2)
    for rates in factuality_rates(human, human, np.arange(50), resamples=50).values():
        assert rates.lift.value == 0 and rates.lift.ci95 == (0, 0)


def test_a_rate_without_any_pair_is_undefined_and_says_so() -> None:
    pairs = [check_pair(Reading("a"), Reading("a")) for _ in range(5)]
    rates = factuality_rates(pairs, pairs, np.arange(5), resamples=5)
    assert math.isnan(rates["contradiction"].model.value) and rates["contradiction"].model.n == 0
    assert math.isnan(rates["contradiction"].lift.value) and rates["contradiction"].lift.reason is not None
    assert math.isnan(rates["positive_recall"].model.value)
    assert rates["empty"].model.value == 0
    assert factuality_rates([], [], [], resamples=5)["empty"].model.reason == "no item"


def test_silence_does_not_win() -> None:
    """A model that says nothing is never wrong, and it is last in omission and recall."""
    source = read("Cardiomegaly. Pneumonia.")
    silent = [check_pair(source, read("")) for _ in range(20)]
    human = [check_pair(source, read("Pneumonia.")) for _ in range(20)]
    rates = factuality_rates(silent, human, np.arange(20), resamples=20)
    assert rates["contradiction"].lift.value == rates["unsupported_finding"].lift.value == 0
    assert (rates["omission"].model.value, rates["empty"].lift.value) == (1, 1)
    assert rates["positive_recall"].lift.value == -0.5 and rates["critical_recall"].lift.value == -1


def test_checks_of_other_studies_are_refused() -> None:
    with pytest.raises(ValueError, match="but got 1, 0 and 1"):
        factuality_rates(random_checks(1, 0.1), [], ["a"])


# Injected errors (ReXErr's categories): each takes a true text and makes one thing wrong.


def flip_negation(sentences: list[str], place: int) -> list[str]:
    one = sentences[place]
    flipped = one.removeprefix("No ").capitalize() if one.startswith("No ") else f"No {one.lower()}"
    return [*sentences[:place], flipped, *sentences[place + 1 :]]


def swap_side(sentences: list[str], place: int) -> list[str]:
    other = {"left": "right", "right": "left"}
    one = re.sub(r"\b(left|right)\b", lambda side: other[side[0]], sentences[place])
    return [*sentences[:place], one, *sentences[place + 1 :]]


def insert_finding(sentences: list[str], place: int) -> list[str]:
    absent = [phrase for phrase in PHRASES.values() if not any(phrase in one.lower() for one in sentences)]
    return [*sentences[:place], f"New {RNG.choice(absent)}", *sentences[place:]]


@pytest.mark.parametrize(
    ("inject", "check"),
    [
        (flip_negation, "contradiction"),
        (swap_side, "laterality_conflict"),
        (insert_finding, "unsupported_finding"),
    ],
)
def test_injected_errors_are_found_and_true_texts_pass(inject: Callable[..., list[str]], check: str) -> None:
    found = 0
    for _ in range(100):
        chosen = RNG.choice(list(PHRASES.values()), 3, replace=False)
        sentences = [f"Small {RNG.choice(['left', 'right'])} {chosen[0]}", f"No {chosen[1]}", f"Mild {chosen[2]}"]
        source = ". ".join(sentences) + "."
        place = 0 if inject is swap_side else int(RNG.integers(3))
        written = ". ".join(inject(sentences, place)) + "."
        assert flagged(source, source) == set()
        found += check in flagged(source, written)
    # The side parser knows no side of a heart and of edema: what has no side cannot be swapped.
    assert found == 100 if inject is not swap_side else found > 60


def test_the_patterns_are_written_in_the_form_that_the_file_describes() -> None:
    text = files("medvlm_harness.metrics").joinpath("factuality.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    assert raw["version"] == factuality_version() >= 1
    assert set(raw["critical"]) == critical_findings()
    assert all(isinstance(word, str) for word in raw["unfinished"])
    for pattern in [*raw["prior_claims"], *raw["not_a_claim"]]:
        assert pattern == pattern.lower(), "texts are matched in lower case"


@pytest.mark.parametrize("unit", ["a ", "no change since ", "interval ", "to prior ", "x", "1 . ", "left effusion "])
def test_any_model_output_is_checked_in_little_time(unit: str) -> None:
    start = time.perf_counter()
    check_pair(Reading(unit * 5_000), Reading(unit * 5_000), comparison=unit * 5_000)
    assert time.perf_counter() - start < 3


def test_base_rates_of_the_checks_of_plain_text_on_real_reports(iu_cxr: Dataset) -> None:
    """Impressions against their own findings: what the checks flag in texts that radiologists wrote."""
    studies = [s for s in iu_cxr.studies if s.findings and s.impression and s.split in ("test", "validation")]
    start = time.perf_counter()
    pairs = [check_pair(Reading(s.findings), Reading(s.impression), comparison=s.comparison) for s in studies]
    rates = factuality_rates(pairs, pairs, [s.study_id for s in studies])
    assert time.perf_counter() - start < 5
    assert len(studies) == 886
    without_prior = sum(s.subgroups.get("comparison") == "none" for s in studies)
    assert rates["prior_without_prior"].model.n == without_prior > 400
    assert sum(bool(claims_prior(s.impression)) for s in studies) > 10  # of those with an earlier study, nearly all
    assert 0 < rates["laterality_conflict"].model.value < 0.02
    for name in ("prior_without_prior", "measurement_not_in_source", "repetition", "truncated", "empty"):
        assert rates[name].model.value < 0.01
