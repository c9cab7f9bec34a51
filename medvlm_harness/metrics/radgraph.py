"""RadGraph F1: how many entities and relations of a report another report states as well.

The scores follow radgraph's main branch, which lower-cases words at every level; releases up to 0.1.18 do so only for
words with relations, and only in `complete`. `entity_span_f1` is another measure, of two annotations of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.labelers.radgraph_json import RELATIONS, Entities
from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics.matches import MatchCounts, count_matches, weighted_micro_f1

__all__ = [
    "RADGRAPH_LABELS",
    "RADGRAPH_RELATIONS",
    "Entities",
    "entity_span_counts",
    "entity_span_f1",
    "radgraph_combined",
    "radgraph_f1_complete",
    "radgraph_f1_partial",
    "radgraph_f1_simple",
    "relation_span_counts",
    "relation_span_f1",
]

RADGRAPH_LABELS = frozenset(
    f"{kind}::{measured}{status}"
    for kind in ("Anatomy", "Observation")
    for measured in ("", "measurement::")
    for status in ("definitely present", "uncertain", "definitely absent")
)
"""RadGraph-XL's labels. The first release's (OBS-DP, ...) must be given these names when files are read."""
_FIRST_RELEASE = ("ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA")
RADGRAPH_RELATIONS = frozenset(RELATIONS)


class _Entity(NamedTuple):
    words: str  # lower case
    label: str
    relations: tuple[tuple[str, str], ...]  # type, id of the target


def radgraph_f1_simple(
    generated: Sequence[Entities], *references: Sequence[Entities | None], empty_both: float = 0.0
) -> NDArray[np.float64]:
    """F1 over the distinct (words, label) of each report; shape (n,), in [0, 1], higher is better.

    0 where one side has no entity. Average over reports for the corpus score, as radgraph does (`weighted_mean`).

    Args:
        generated: entities per report, shape (n,).
        *references: likewise, once per annotator; a report's score is the mean over the annotators who read it, NaN
            where none did. None stands for "did not read it".
        empty_both: what a report scores where neither side has an entity: 0 as in radgraph, or 1, for reports of normal
            studies on which nothing to say is right. A score with 1 must be named so.

    Raises:
        UserError: if an entity is not as in RadGraph's JSON, or has a label or relation that RadGraph does not know; it
            would match nothing, and score 0 in silence.
        ValueError: if numbers of reports differ, or empty_both is neither 0 nor 1.

    Source: Delbrouck et al. 2022, arXiv 2210.12186; radgraph, main branch, rewards.py (simple).
    """
    return _mean_over_annotators(_simple, generated, references, empty_both)


def radgraph_f1_partial(
    generated: Sequence[Entities], *references: Sequence[Entities | None], empty_both: float = 0.0
) -> NDArray[np.float64]:
    """As `radgraph_f1_simple`, but an entity must also have a relation of any kind, or none, on both sides."""
    return _mean_over_annotators(_partial, generated, references, empty_both)


def radgraph_f1_complete(
    generated: Sequence[Entities], *references: Sequence[Entities | None], empty_both: float = 0.0
) -> NDArray[np.float64]:
    """As `radgraph_f1_simple`, over (words, label, relation, words of its target), once per relation.

    Entities without a relation count as in `simple`; the target's label is not compared.
    """
    return _mean_over_annotators(_complete, generated, references, empty_both)


def radgraph_combined(generated: Sequence[Entities], *references: Sequence[Entities | None]) -> NDArray[np.float64]:
    """(entity F1 + relation F1) / 2 of each report, the RadGraph part of RadCliQ; shape (n,), in [0, 1].

    Entities are (words, label), relations (words, label, words of target, label of target, type). Either F1 is 0 where
    a side has none, so two reports with the same entities and no relations score 0.5.

    Args:
        generated: as for `radgraph_f1_simple`.
        *references: likewise.

    Source: Yu et al. 2023, Patterns 4(9), doi 10.1016/j.patter.2023.100802 (radgraph_combined).
    """
    entity = _mean_over_annotators(_simple, generated, references, 0.0)
    relation = _mean_over_annotators(_typed_relations, generated, references, 0.0)
    return (entity + relation) / 2


def entity_span_f1(predicted: Sequence[Mapping[str, Any]], annotated: Sequence[Mapping[str, Any]]) -> float:
    """Micro F1 of the entities of the same texts, exact in start, end and label; in [0, 1], NaN without any entity.

    Args:
        predicted: per report `text` (tokens joined by blanks) and `entities`, as in RadGraph's JSON; shape (n,).
        annotated: the same reports, in the same order.

    Raises:
        UserError: if two texts are not the same but for case: positions mean nothing then (`radgraph_f1_simple`
            compares different texts), or an entity is not as in RadGraph's JSON, or lies outside its text.
        ValueError: if the numbers of reports differ.

    Source: Wadden et al. 2019, arXiv 1909.03546; dygiepp, training/ner_metrics.py.
    """
    return float(weighted_micro_f1(entity_span_counts(predicted, annotated), np.ones((1, len(predicted))))[0])


def relation_span_f1(predicted: Sequence[Mapping[str, Any]], annotated: Sequence[Mapping[str, Any]]) -> float:
    """As `entity_span_f1`, for relations: exact spans of both ends, and type; labels of the ends are not compared.

    Source: dygiepp, training/relation_metrics.py.
    """
    return float(weighted_micro_f1(relation_span_counts(predicted, annotated), np.ones((1, len(predicted))))[0])


def entity_span_counts(predicted: Sequence[Mapping[str, Any]], annotated: Sequence[Mapping[str, Any]]) -> MatchCounts:
    """What `entity_span_f1` counts, per report, for `weighted_micro_f1`."""
    return _span_counts(predicted, annotated, lambda entities, spans: {(spans[key], e.label) for key, e in entities})


def relation_span_counts(predicted: Sequence[Mapping[str, Any]], annotated: Sequence[Mapping[str, Any]]) -> MatchCounts:
    """What `relation_span_f1` counts, per report, for `weighted_micro_f1`."""
    return _span_counts(
        predicted,
        annotated,
        lambda entities, spans: {(spans[key], kind, spans[to]) for key, e in entities for kind, to in e.relations},
    )


_Facts = Callable[[Mapping[str, _Entity]], AbstractSet[tuple[str, ...]]]


def _simple(entities: Mapping[str, _Entity]) -> set[tuple[str, ...]]:
    return {(entity.words, entity.label) for entity in entities.values()}


def _partial(entities: Mapping[str, _Entity]) -> set[tuple[str, ...]]:
    return {(e.words, e.label, "related") if e.relations else (e.words, e.label) for e in entities.values()}


def _complete(entities: Mapping[str, _Entity]) -> set[tuple[str, ...]]:
    alone = {(entity.words, entity.label) for entity in entities.values() if not entity.relations}
    return alone | {
        (entity.words, entity.label, kind, entities[target].words)
        for entity in entities.values()
        for kind, target in entity.relations
    }


def _typed_relations(entities: Mapping[str, _Entity]) -> set[tuple[str, ...]]:
    return {
        (entity.words, entity.label, entities[target].words, entities[target].label, kind)
        for entity in entities.values()
        for kind, target in entity.relations
    }


def _f1(generated: AbstractSet[tuple[str, ...]], reference: AbstractSet[tuple[str, ...]]) -> float:
    total = len(generated) + len(reference)
    return 2 * len(generated & reference) / total if total else 0.0


def _mean_over_annotators(
    facts: _Facts, generated: Sequence[Entities], annotators: Sequence[Sequence[Entities | None]], empty_both: float
) -> NDArray[np.float64]:
    if empty_both not in (0, 1):
        raise ValueError(f"Expected empty_both to be 0 or 1, but got {empty_both}.")
    if not annotators or any(len(reference) != len(generated) for reference in annotators):
        counts = ", ".join(str(len(reference)) for reference in annotators) or "none"
        raise ValueError(f"Expected references for {len(generated)} reports, once per annotator, but got {counts}.")
    scores = np.full((len(annotators), len(generated)), np.nan)
    for place, report in enumerate(generated):
        mine = _checked(report, f"report {place} of generated")
        for row, annotator in zip(scores, annotators, strict=True):
            reading = annotator[place]
            if reading is not None:
                theirs = _checked(reading, f"report {place} of the references")
                row[place] = _f1(facts(mine), facts(theirs)) if mine or theirs else empty_both
    read = ~np.isnan(scores)
    return ratio_or_nan(np.where(read, scores, 0).sum(axis=0), read.sum(axis=0).astype(np.float64))


def _checked(entities: Entities, where: str) -> dict[str, _Entity]:
    if not isinstance(entities, Mapping):
        raise UserError(f"Expected the entities of {where} as id -> entity, but got {type(entities).__name__}.")
    return {key: _checked_entity(entity, entities, f"entity {key} of {where}") for key, entity in entities.items()}


def _checked_entity(entity: Mapping[str, Any], entities: Entities, where: str) -> _Entity:
    if not isinstance(entity, Mapping) or not {"tokens", "label", "relations"} <= entity.keys():
        raise UserError(f"Expected tokens, label and relations in {where}, but got {_shown(entity)}.")
    tokens, label, relations = entity["tokens"], entity["label"], entity["relations"]
    if not isinstance(tokens, str):
        raise UserError(f"Expected tokens of {where} as one text, but got {_shown(tokens)}.")
    if not isinstance(label, str) or label not in RADGRAPH_LABELS:
        old = " It is of RadGraph's first release: give it its new name where the file is read."
        hint = old if label in _FIRST_RELEASE else near_matches(str(label), RADGRAPH_LABELS)
        raise UserError(f"Expected one of RadGraph-XL's labels for {where}, but got {_shown(label)}.{hint}")
    if not isinstance(relations, Sequence) or isinstance(relations, str):
        raise UserError(f"Expected relations of {where} as a list of [type, id], but got {_shown(relations)}.")
    return _Entity(tokens.lower(), label, tuple(_checked_relation(pair, entities, where) for pair in relations))


def _checked_relation(pair: Any, entities: Entities, where: str) -> tuple[str, str]:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise UserError(f"Expected a relation of {where} as [type, id], but got {_shown(pair)}.")
    kind, target = pair
    if kind not in RADGRAPH_RELATIONS:
        hint = near_matches(kind, RADGRAPH_RELATIONS)
        raise UserError(f"Expected one of RadGraph's relations for {where}, but got {_shown(kind)}.{hint}")
    if target not in entities:
        raise UserError(f"Expected a relation of {where} to end at an entity of its report, but got {_shown(target)}.")
    return kind, target


_Spans = Mapping[str, tuple[int, int]]
_SpanFacts = Callable[[Iterator[tuple[str, _Entity]], _Spans], AbstractSet[tuple[object, ...]]]


def _span_counts(
    predicted: Sequence[Mapping[str, Any]], annotated: Sequence[Mapping[str, Any]], facts: _SpanFacts
) -> MatchCounts:
    if len(predicted) != len(annotated):
        raise ValueError(f"Expected the same reports twice, but got {len(predicted)} and {len(annotated)}.")
    pairs = []
    for place, (mine, theirs) in enumerate(zip(predicted, annotated, strict=True)):
        ours, tokens = _located(mine, f"report {place} of predicted", facts)
        gold, wanted = _located(theirs, f"report {place} of annotated", facts)
        if tokens != wanted:
            differ = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), None)
            what = f"{len(tokens)} and {len(wanted)} tokens" if differ is None else f"other words at token {differ}"
            raise UserError(f"Expected one text on both sides of report {place}, token by token, but got {what}.")
        pairs.append((ours, gold))
    return count_matches(pairs)


def _located(
    report: Mapping[str, Any], where: str, facts: _SpanFacts
) -> tuple[AbstractSet[tuple[object, ...]], list[str]]:
    """The facts of a report, and its tokens in lower case."""
    if not isinstance(report, Mapping) or not isinstance(report.get("text"), str) or "entities" not in report:
        raise UserError(f"Expected text and entities in {where}, but got {_shown(report)}.")
    tokens = report["text"].lower().split()
    entities = _checked(report["entities"], where)
    spans = {key: _span(report["entities"][key], len(tokens), f"entity {key} of {where}") for key in entities}
    return facts(iter(entities.items()), spans), tokens


def _span(entity: Mapping[str, Any], tokens: int, where: str) -> tuple[int, int]:
    start, end = entity.get("start_ix"), entity.get("end_ix")
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end < tokens):
        raise UserError(f"Expected 0 <= start_ix <= end_ix < {tokens} for {where}, but got {start!r} and {end!r}.")
    return start, end


def _shown(value: object) -> str:
    """At most 60 characters of what came, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
