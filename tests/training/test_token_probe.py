from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from medvlm_harness.training.token_probe import OUTSIDE, TokenProbe, bio_tags, entities_of, span_f1, word_vectors

RNG = np.random.default_rng(2)
WORDS = {
    "the": OUTSIDE,
    "no": OUTSIDE,
    "is": OUTSIDE,
    "heart": "B-ANAT-DP",
    "lung": "B-ANAT-DP",
    "base": "I-ANAT-DP",
    "pleural": "B-OBS-DP",
    "effusion": "I-OBS-DP",
    "edema": "B-OBS-DP",
}
KNOWN = {word: RNG.normal(size=16) for word in WORDS}
PHRASES = (["the"], ["no"], ["is"], ["heart"], ["lung"], ["lung", "base"], ["pleural", "effusion"], ["edema"])


def documents(n: int, seed: int, *, noise: float = 0.3) -> tuple[list[Any], list[list[str]]]:
    """Texts of phrases, with noisy vectors of their words, and the tags that the words have."""
    rng = np.random.default_rng(seed)
    features, tags = [], []
    for _ in range(n):
        words = [w for k in rng.integers(len(PHRASES), size=6) for w in PHRASES[k]]
        features.append(np.stack([KNOWN[word] + noise * rng.normal(size=16) for word in words]))
        tags.append([WORDS[word] for word in words])
    return features, tags


def entity(first: int, last: int, label: str = "OBS-DP") -> dict[str, Any]:
    return {"tokens": "", "label": label, "start_ix": first, "end_ix": last, "relations": []}


TRAIN, TEST = documents(40, 1), documents(20, 2)


# --- tags and spans


def test_tags_and_entities_are_each_others_inverse() -> None:
    text = "small left pleural effusion no edema"
    entities = {"1": entity(0, 0), "2": entity(1, 1, "ANAT-DP"), "3": entity(2, 3), "4": entity(5, 5, "OBS-DA")}
    tags = bio_tags({"text": text, "entities": entities})
    assert tags == ["B-OBS-DP", "B-ANAT-DP", "B-OBS-DP", "I-OBS-DP", "O", "B-OBS-DA"]
    found = entities_of(text, tags)
    spans = {(e["start_ix"], e["end_ix"], e["label"]) for e in entities.values()}
    assert {(e["start_ix"], e["end_ix"], e["label"]) for e in found.values()} == spans
    assert [e["tokens"] for e in found.values()] == ["small", "left", "pleural effusion", "edema"]
    assert all(e["relations"] == [] for e in found.values())


def test_neighbours_of_one_label_stay_apart() -> None:
    document = {"text": "effusion edema", "entities": {"1": entity(0, 0), "2": entity(1, 1)}}
    assert len(entities_of(document["text"], bio_tags(document))) == 2


def test_of_entities_that_overlap_the_first_and_longest_counts() -> None:
    document = {"text": "a b c", "entities": {"1": entity(0, 0), "2": entity(0, 1, "ANAT-DP"), "3": entity(1, 2)}}
    assert bio_tags(document) == ["B-ANAT-DP", "I-ANAT-DP", "O"]


def test_an_inside_tag_without_a_beginning_begins_an_entity() -> None:
    assert entities_of("a b c", ["I-X", "I-X", "I-Y"]).keys() == {"1", "2"}


def test_words_and_tags_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="each of 2 words"):
        entities_of("a b", ["O"])
    with pytest.raises(ValueError, match="within 1 words, but got 0 to 1"):
        bio_tags({"text": "a", "entities": {"1": entity(0, 1)}})


def test_span_f1_by_hand() -> None:
    expected = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"]]
    predicted = [["B-X", "O", "O", "B-Y"], ["O", "B-X"]]  # 2 right of 3 found and 3 there
    assert span_f1(predicted, expected) == pytest.approx(2 / 3)
    assert span_f1(expected, expected) == 1
    assert span_f1([["O"]], [["B-X"]]) == 0
    assert np.isnan(span_f1([["O"], []], [["O"], []]))


# --- vectors of words


def test_a_word_is_the_mean_of_its_pieces() -> None:
    vectors = np.arange(8.0).reshape(4, 2)
    found = word_vectors("no effusions here", vectors, [(0, 2), (3, 8), (8, 12), (0, 0)])  # the last is special
    assert found.tolist() == [[0, 1], [3, 4], [0, 0]]  # "here" was cut off
    with pytest.raises(ValueError, match="an offset for each of 4 vectors"):
        word_vectors("a", vectors, [(0, 1)])


# --- the probe


def test_entities_that_vectors_tell_apart_are_found() -> None:
    probe = TokenProbe().fit(*TRAIN)
    assert span_f1(probe.predict(TEST[0]), TEST[1]) > 0.95
    assert probe.penalty in (1e-3, 1e-2, 1e-1, 1.0)


def test_shuffled_tags_are_not_learnt() -> None:
    """The negative control: no better, on average, than the most frequent tag for every word."""
    scores = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        parts = iter(rng.permutation([tag for own in TRAIN[1] for tag in own]).tolist())
        shuffled = [[next(parts) for _ in own] for own in TRAIN[1]]
        probe = TokenProbe(penalties=(0.1,)).fit(TRAIN[0], shuffled)
        scores.append(span_f1(probe.predict(TEST[0]), TEST[1]))
    tags = [tag for own in TRAIN[1] for tag in own if tag != OUTSIDE]
    constant = span_f1([[max(set(tags), key=tags.count)] * len(own) for own in TEST[1]], TEST[1])
    assert np.mean(scores) < constant + 0.05 < 0.5


def test_predicted_tags_are_the_best_sequence_that_is_one() -> None:
    """Against every sequence of three words, with features so noisy that single words would break the rule."""
    probe = TokenProbe(penalties=(1.0,)).fit(*documents(40, 3, noise=2.0))
    short = [one[:3] for one in documents(30, 4, noise=2.0)[0]]
    names = [str(name) for name in probe._model.classes_]
    broken = 0
    for features, tags in zip(short, probe.predict(short), strict=True):
        scores = probe._model.predict_log_proba(features)
        valid = [
            path
            for path in itertools.product(range(len(names)), repeat=3)
            if all(
                not names[k].startswith("I-") or (before is not None and names[before][2:] == names[k][2:])
                for before, k in zip((None, *path), path, strict=False)
            )
        ]
        best = max(valid, key=lambda path: sum(scores[place, k] for place, k in enumerate(path)))
        assert tags == [names[k] for k in best]
        broken += tags != [names[k] for k in scores.argmax(axis=1)]
    assert broken > 0


def test_no_documents_and_empty_ones_have_no_tags() -> None:
    probe = TokenProbe().fit(*TRAIN)
    assert probe.predict([]) == []
    assert probe.predict([np.zeros((0, 16)), TEST[0][0]])[0] == []


@pytest.mark.parametrize(
    ("features", "tags", "message"),
    [
        (TRAIN[0][:1], TRAIN[1][:1], "two or more documents"),
        (TRAIN[0], TRAIN[1][:-1], "two or more documents with tags, but got 40 and 39"),
        (TRAIN[0][:2], [TRAIN[1][0], TRAIN[1][1][:-1]], "a tag for each"),
        (TRAIN[0][:2], [[OUTSIDE] * len(own) for own in TRAIN[1][:2]], "there are none"),
    ],
)
def test_wrong_input_says_what_was_expected(features: Any, tags: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenProbe().fit(features, tags)


def test_before_fit_nothing_is_predicted() -> None:
    with pytest.raises(ValueError, match="fit before predict"):
        TokenProbe().predict(TEST[0])
