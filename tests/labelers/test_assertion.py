from __future__ import annotations

import pytest

from medvlm_harness.labelers.assertion import ASSERTIONS, AssertionEngine

PHRASES = {
    "effusion": ["effusion", "pleural effusion"],
    "edema": ["edema"],
    "pneumonia": ["pneumonia"],
    "heart": ["heart"],
}


@pytest.fixture(scope="module")
def engine() -> AssertionEngine:
    return AssertionEngine(PHRASES, reach={"normal": ["heart"], "abnormal": ["heart"], "indefinite": ["heart"]})


def said(engine: AssertionEngine, text: str) -> dict[str, set[str]]:
    return {target.key: set(target.assertions) for target in engine.find(engine.parse(text))}


def sentences(engine: AssertionEngine, text: str) -> list[str]:
    return [sentence.text.strip() for sentence in engine.parse(text).sents]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion.", {"effusion": {"negated"}}),
        ("Effusion.", {"effusion": set()}),
        ("Effusion is possible.", {"effusion": {"uncertain"}}),
        ("Effusion is unlikely.", {"effusion": {"unlikely"}}),
        ("Effusion is not excluded.", {"effusion": {"not_excluded"}}),
        ("Evaluate for effusion.", {"effusion": {"hypothetical"}}),
        ("The heart is normal.", {"heart": {"normal"}}),
        ("The heart is enlarged.", {"heart": {"abnormal"}}),
        ("The heart is stable.", {"heart": {"indefinite"}}),
        ("No effusion, but mild edema.", {"effusion": {"negated"}, "edema": set()}),
        ("No change in the effusion.", {"effusion": set()}),
    ],
)
def test_each_kind_of_assertion_is_found(engine: AssertionEngine, text: str, expected: dict[str, set[str]]) -> None:
    assert said(engine, text) == expected


def test_an_assertion_reaches_only_the_keys_it_is_for(engine: AssertionEngine) -> None:
    assert said(engine, "Normal heart and effusion.") == {"heart": {"normal"}, "effusion": set()}


def test_of_one_key_the_longest_phrase_counts_once(engine: AssertionEngine) -> None:
    targets = engine.find(engine.parse("A pleural effusion and an effusion."))
    assert [(target.start, target.end) for target in targets] == [(1, 3), (5, 6)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mild edema. No effusion.", ["Mild edema.", "No effusion."]),
        ("A nodule of 4.2 cm. Edema.", ["A nodule of 4.2 cm.", "Edema."]),
        ("Edema vs. pneumonia.", ["Edema vs. pneumonia."]),
        ("Edema? Effusion.", ["Edema?", "Effusion."]),
        ("?pneumonia", ["?pneumonia"]),
        ("Opacity, ? pneumonia.", ["Opacity, ? pneumonia."]),
        ("Edema\nEffusion", ["Edema", "Effusion"]),
        ("1. Edema. 2. Effusion.", ["1.", "Edema.", "2.", "Effusion."]),
        ("Edema..Effusion", ["Edema.", ".", "Effusion"]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(engine: AssertionEngine, text: str, expected: list[str]) -> None:
    assert sentences(engine, text) == expected


def test_text_split_into_tokens_is_read_the_same(engine: AssertionEngine) -> None:
    tokens = [
        "A",
        "nodule",
        "of",
        "4",
        ".",
        "2",
        "cm",
        ".",
        "No",
        "effusion",
        ",",
        "edema",
        "can",
        "'",
        "t",
        "be",
        "excluded",
        ".",
    ]
    doc = engine.parse_tokens(tokens)
    assert [token.text for token in doc] == tokens
    assert len(list(doc.sents)) == 2
    assert {t.key: set(t.assertions) for t in engine.find(doc)}["effusion"] == {"negated"}


def test_words_are_split_at_punctuation_and_nowhere_else(engine: AssertionEngine) -> None:
    tokens = [token.text for token in engine.parse("Can't, cannot; ill-defined 4.2cm (T8/T9) x-ray_2")]
    assert tokens == [
        "Can",
        "'",
        "t",
        ",",
        "cannot",
        ";",
        "ill",
        "-",
        "defined",
        "4",
        ".",
        "2cm",
        "(",
        "T8",
        "/",
        "T9",
        ")",
        "x",
        "-",
        "ray",
        "_",
        "2",
    ]


def test_two_engines_do_not_share_what_they_reach(engine: AssertionEngine) -> None:
    other = AssertionEngine({"effusion": ["effusion"]}, reach={"normal": ["effusion"]})
    assert said(other, "Normal effusion.") == {"effusion": {"normal"}}
    assert said(engine, "Normal effusion.") == {"effusion": set()}


def test_nothing_to_find_is_nothing(engine: AssertionEngine) -> None:
    assert engine.find(engine.parse("")) == []
    assert engine.find(engine.parse("The lungs are clear.")) == []
    assert len(set(ASSERTIONS)) == len(ASSERTIONS)
