from __future__ import annotations

import pytest

from medvlm_harness.labelers.lexicon import lexicon


@pytest.mark.parametrize(
    ("token", "kind", "base"),
    [
        ("effusion", "Observation", "effusion"),
        ("Effusions", "Observation", "effusion"),
        ("densities", "Observation", "densities"),
        ("opacities", "Observation", "opacity"),
        ("masses", "Observation", "mass"),
        ("mildly", "Observation", "mild"),
        ("bilaterally", "Anatomy", "bilateral"),
        ("RA", "Anatomy", "ra"),
        ("R", "Anatomy", "r"),
        ("LLL", "Anatomy", "lll"),
        ("lll", "Anatomy", "lll"),
    ],
)
def test_a_word_is_found_in_its_inflections(token: str, kind: str, base: str) -> None:
    word = lexicon().find(token)
    assert word is not None
    assert (word.kind, word.base) == (kind, base)


@pytest.mark.parametrize("token", ["la", "r", "seen", "no", "XXXX", "significantly", "", "3"])
def test_other_words_are_not(token: str) -> None:
    assert lexicon().find(token) is None


@pytest.mark.parametrize(
    ("token", "meant"),
    [
        ("effsion", "effusion"),
        ("effussion", "effusion"),
        ("Cardiomegoly", "Cardiomegaly"),
        ("unchnaged", "unchanged"),
        ("smal", "small"),
        ("likley", "likely"),
        ("opacites", "opacities"),
    ],
)
def test_one_slip_of_the_pen_is_mended(token: str, meant: str) -> None:
    assert lexicon().spelt(token) == meant


@pytest.mark.parametrize(
    "token",
    ["this", "most", "place", "study", "like", "less", "scan", "XXXXX", "pa", "12mm", "zzzzzz", "effsn"],
)
def test_other_words_are_left_as_they_are(token: str) -> None:
    assert lexicon().spelt(token) == token
