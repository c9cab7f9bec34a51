from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import bootstrap_estimate, weighted_mean
from medvlm_harness.metrics.matches import weighted_micro_f1
from medvlm_harness.metrics.radgraph import (
    RADGRAPH_LABELS,
    RADGRAPH_RELATIONS,
    Entities,
    entity_span_counts,
    entity_span_f1,
    radgraph_combined,
    radgraph_f1_complete,
    radgraph_f1_partial,
    radgraph_f1_simple,
    relation_span_f1,
)

LABELS, RELATIONS = sorted(RADGRAPH_LABELS), sorted(RADGRAPH_RELATIONS)
WORDS = ["effusion", "lung", "left", "3.5 cm", "clear", "opacity", "base"]
PRESENT, ABSENT, PLACE = (
    "Observation::definitely present",
    "Observation::definitely absent",
    "Anatomy::definitely present",
)
LEVELS = {"simple": radgraph_f1_simple, "partial": radgraph_f1_partial, "complete": radgraph_f1_complete}


def entity(tokens: str, label: str, *relations: tuple[str, str], start: int = 0, end: int = -1) -> dict[str, Any]:
    span = {"start_ix": start, "end_ix": end if end >= 0 else start}
    return {"tokens": tokens, "label": label, **span, "relations": [list(relation) for relation in relations]}


def random_graph(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """A report of at most eight entities with few words and labels, so that chance matches are frequent."""
    size = int(rng.integers(0, 9))
    graph = {}
    for key in range(size):
        targets = rng.integers(0, size, rng.integers(0, 3))
        relations = [(str(rng.choice(RELATIONS)), str(target)) for target in targets]
        graph[str(key)] = entity(str(rng.choice(WORDS)), str(rng.choice(LABELS[:4])), *relations, start=key)
    return graph


def random_pairs(count: int) -> tuple[list[Entities], list[Entities]]:
    rng = np.random.default_rng(3)
    return [random_graph(rng) for _ in range(count)], [random_graph(rng) for _ in range(count)]


def f1_by_loops(generated: Entities, reference: Entities, level: str) -> float:
    """Independent: lists without duplicates, and precision and recall one item at a time."""

    def stated(graph: Entities) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for one in graph.values():
            items: list[tuple[Any, ...]] = [(one["tokens"].lower(), one["label"])]
            if level == "partial" and len(one["relations"]) > 0:
                items = [(*items[0], True)]
            if level == "complete" and len(one["relations"]) > 0:
                items = [(*items[0], kind, graph[to]["tokens"].lower()) for kind, to in one["relations"]]
            for item in items:
                if item not in found:
                    found.append(item)
        return found

    ours, theirs = stated(generated), stated(reference)
    if not ours or not theirs:
        return 0.0
    precision = sum(item in theirs for item in ours) / len(ours)
    recall = sum(item in ours for item in theirs) / len(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_equals_an_independent_count(level: str) -> None:
    generated, references = random_pairs(400)
    expected = [f1_by_loops(g, r, level) for g, r in zip(generated, references, strict=True)]
    assert LEVELS[level](generated, references) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 5


@pytest.fixture
def rewards() -> ModuleType:
    """radgraph's own scoring file, without the package around it, which imports torch and AllenNLP.

    `make test` puts it into a folder of the environment that is on no path: it brings a package called `tests` along.
    """
    found = PathFinder.find_spec("radgraph", [str(Path(sys.prefix, "compared")), *sys.path])
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs radgraph's scoring code: pip install --no-deps --target FOLDER radgraph==0.1.18")
    spec = importlib.util.spec_from_file_location("rewards", Path(found.submodule_search_locations[0], "rewards.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("level", LEVELS)
def test_equals_radgraphs_rewards_on_lower_cased_pairs(rewards: ModuleType, level: str) -> None:
    generated, references = random_pairs(400)
    expected = [
        rewards.compute_reward({"entities": g}, {"entities": r}, level)
        for g, r in zip(generated, references, strict=True)
    ]
    assert LEVELS[level](generated, references) == pytest.approx(expected, abs=1e-9)


def test_case_is_the_one_difference_to_the_release(rewards: ModuleType) -> None:
    lower, upper = [{"1": entity("effusion", PRESENT)}], [{"1": entity("Effusion", PRESENT)}]
    assert rewards.compute_reward({"entities": upper[0]}, {"entities": lower[0]}, "simple") == 0
    assert radgraph_f1_simple(upper, lower).tolist() == [1.0]


REFERENCE = {
    "1": entity("acute", ABSENT, ("modify", "3")),
    "2": entity("cardiopulmonary", PLACE),
    "3": entity("process", ABSENT, ("located_at", "2")),
}
WITHOUT_MODIFY = REFERENCE | {"1": entity("acute", ABSENT)}


def all_levels(generated: Entities, reference: Entities, **options: float) -> list[float]:
    return [float(score([generated], [reference], **options)[0]) for score in LEVELS.values()]


def test_hand_cases() -> None:
    assert all_levels(REFERENCE, REFERENCE) == [1, 1, 1]
    # "acute" has lost its relation: both sides still have three facts, of which two agree.
    assert all_levels(WITHOUT_MODIFY, REFERENCE) == pytest.approx([1, 2 / 3, 2 / 3])
    # "Cardiopulmonary" is the same word here; the release scored (0.667, 0.333, 0.333).
    capital = WITHOUT_MODIFY | {"2": entity("Cardiopulmonary", PLACE)}
    assert all_levels(capital, REFERENCE) == pytest.approx([1, 2 / 3, 2 / 3])
    twice = {"1": entity("effusion", PRESENT), "2": entity("effusion", PRESENT)}
    assert all_levels(twice, {"1": entity("effusion", PRESENT)}) == [1, 1, 1]
    assert all_levels({"1": entity("effusion", ABSENT)}, {"1": entity("effusion", PRESENT)}) == [0, 0, 0]


def test_hand_cases_as_the_release_scores_them(rewards: ModuleType) -> None:
    capital = WITHOUT_MODIFY | {"2": entity("Cardiopulmonary", PLACE)}
    released = rewards.compute_reward({"entities": capital}, {"entities": REFERENCE}, "all")
    assert released == pytest.approx((0.667, 0.333, 0.333), abs=0.001)
    sided = {"1": entity("Effusion", PRESENT, ("located_at", "2")), "2": entity("Left", PLACE)}
    lower = {"1": entity("effusion", PRESENT, ("located_at", "2")), "2": entity("left", PLACE)}
    assert rewards.compute_reward({"entities": sided}, {"entities": lower}, "all") == (0, 0, 0.5)
    assert all_levels(sided, lower) == [1, 1, 1]


def test_nothing_extracted_scores_zero_unless_asked_otherwise() -> None:
    assert all_levels({}, REFERENCE) == all_levels(REFERENCE, {}) == all_levels({}, {}) == [0, 0, 0]
    assert all_levels({}, {}, empty_both=1) == [1, 1, 1]
    assert all_levels({}, REFERENCE, empty_both=1) == [0, 0, 0]
    assert radgraph_f1_simple([], []).shape == (0,)


def test_the_score_is_the_mean_over_the_annotators_who_read_the_report() -> None:
    first, second = [REFERENCE, REFERENCE, REFERENCE], [WITHOUT_MODIFY, None, None]
    scores = radgraph_f1_partial([REFERENCE] * 3, first, second)
    assert scores == pytest.approx([(1 + 2 / 3) / 2, 1, 1])
    assert np.isnan(radgraph_f1_partial([REFERENCE], [None], [None])[0])


def test_the_combined_score_is_half_entities_and_half_typed_relations() -> None:
    assert radgraph_combined([REFERENCE], [REFERENCE]).tolist() == [1.0]
    # All three entities, and one of two relations: (1 + 2/3) / 2.
    assert radgraph_combined([WITHOUT_MODIFY], [REFERENCE]) == pytest.approx([(1 + 2 / 3) / 2])
    assert radgraph_combined([{"1": entity("clear", PRESENT)}], [{"1": entity("clear", PRESENT)}]).tolist() == [0.5]
    # Unlike in `complete`, the label of the target counts.
    moved = REFERENCE | {"2": entity("cardiopulmonary", PRESENT)}
    assert radgraph_combined([moved], [REFERENCE]) == pytest.approx([(2 / 3 + 1 / 2) / 2])
    assert radgraph_combined([{}], [{}]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entity("effusion", "OBS-DP"), "RadGraph-XL's labels .* got 'OBS-DP'.* first release"),
        (entity("effusion", "Observation::definitly present"), "Did you mean Observation::definitely present"),
        (entity("effusion", PRESENT) | {"label": ["a"]}, "got \\['a'\\]"),
        (entity("effusion", PRESENT, ("modifies", "1")), "RadGraph's relations .* Did you mean modify"),
        (entity("effusion", PRESENT, ("modify", "7")), "end at an entity of its report, but got '7'"),
        (entity("effusion", PRESENT) | {"relations": ["modify"]}, "as \\[type, id\\]"),
        (entity("effusion", PRESENT) | {"relations": None}, "a list of"),
        (entity("effusion", PRESENT) | {"tokens": ["effusion"]}, "as one text"),
        ({"tokens": "effusion"}, "tokens, label and relations in entity 1 of report 0"),
        ("effusion", "tokens, label and relations"),
    ],
)
def test_what_is_not_radgraphs_json_is_refused_in_one_line(wrong: Any, message: str) -> None:
    for score in (*LEVELS.values(), radgraph_combined):
        with pytest.raises(UserError, match=message) as error:
            score([{"1": wrong}], [REFERENCE])
        assert "\n" not in str(error.value)


def test_wrong_numbers_of_reports_and_a_wrong_option_are_refused() -> None:
    with pytest.raises(ValueError, match="for 1 reports, once per annotator, but got 2"):
        radgraph_f1_simple([{}], [{}, {}])
    with pytest.raises(ValueError, match="but got none"):
        radgraph_f1_simple([{}])
    with pytest.raises(ValueError, match="to be 0 or 1"):
        radgraph_f1_simple([{}], [{}], empty_both=0.5)
    with pytest.raises(UserError, match="as id -> entity, but got list"):
        radgraph_f1_simple([[]], [{}])  # type: ignore[list-item]


def test_scores_of_reports_take_part_in_the_bootstrap() -> None:
    scores = radgraph_f1_simple(*random_pairs(100))
    estimate = bootstrap_estimate(lambda w: weighted_mean(scores, w), np.arange(100))
    assert estimate.value == pytest.approx(scores.mean())
    assert estimate.ci95[0] < estimate.value < estimate.ci95[1]


TEXT = "Small left pleural effusion ."
GOLD = {
    "text": TEXT,
    "entities": {
        "1": entity("left", PLACE, ("modify", "2"), start=1),
        "2": entity("pleural", PLACE, start=2),
        "3": entity("effusion", PRESENT, ("located_at", "2"), start=3),
    },
}
FOUND = {
    "text": TEXT.lower(),
    "entities": {
        "a": entity("left pleural", PLACE, start=1, end=2),
        "b": entity("effusion", PRESENT, ("located_at", "c"), start=3),
        "c": entity("pleural", PRESENT, start=2),
    },
}


def test_spans_must_be_exact_and_labelled_right() -> None:
    assert entity_span_f1([GOLD], [GOLD]) == relation_span_f1([GOLD], [GOLD]) == 1
    # Of three entities on each side only "effusion" has the same span and label.
    assert entity_span_f1([FOUND], [GOLD]) == pytest.approx(2 / 6)
    # Its relation has the right ends and type, though the other end is labelled wrong: 1 of 1, and 1 of 2.
    assert relation_span_f1([FOUND], [GOLD]) == pytest.approx(2 / 3)


def test_span_f1_is_micro_over_the_corpus() -> None:
    empty = {"text": TEXT, "entities": {}}
    counts = entity_span_counts([GOLD, empty, FOUND], [GOLD, GOLD, GOLD])
    assert [column.tolist() for column in counts] == [[3, 0, 1], [3, 0, 3], [3, 3, 3]]
    weights = np.array([[1, 1, 1], [2, 0, 1], [0, 0, 0]])
    assert weighted_micro_f1(counts, weights) == pytest.approx([8 / 15, 14 / 18, np.nan], nan_ok=True)
    assert np.isnan(entity_span_f1([empty], [empty])) and np.isnan(entity_span_f1([], []))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (GOLD | {"text": "Small right pleural effusion ."}, "report 0, token by token, but got other words at token 1"),
        (GOLD | {"text": "Small left pleural effusion . Clear ."}, "got 7 and 5 tokens"),
        ({"text": "a", "entities": {"1": entity("a", PRESENT, start=1)}}, "end_ix < 1 for entity 1"),
        ({"text": TEXT, "entities": {"1": entity("a", PRESENT, start=2, end=1)}}, "got 2 and 1"),
        ({"entities": {}}, "text and entities in report 0"),
    ],
)
def test_spans_of_different_texts_are_refused(found: dict[str, Any], message: str) -> None:
    for score in (entity_span_f1, relation_span_f1):
        with pytest.raises(UserError, match=message):
            score([found], [GOLD])
    with pytest.raises(ValueError, match="same reports twice, but got 2 and 1"):
        entity_span_f1([GOLD, GOLD], [GOLD])


def test_the_annotated_snippets_agree_with_themselves_and_little_with_each_other(shared: Path) -> None:
    lines = (shared / "labeler" / "entities.jsonl").read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    entities = [report["entities"] for report in reports]
    assert len(reports) == 45 and entity_span_f1(reports, reports) == relation_span_f1(reports, reports) == 1
    for score in LEVELS.values():
        assert (score(entities, entities) == 1).all()
        assert score(entities, entities[1:] + entities[:1]).mean() < 0.3
