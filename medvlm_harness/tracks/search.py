"""What searches share: two sides of each study, searched both ways over the whole split, and what counts as a hit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import NO_FINDING
from medvlm_harness.data.labels import resolve
from medvlm_harness.data.records import Study
from medvlm_harness.metrics.bootstrap import bootstrap_estimate, bootstrap_means, weighted_median
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.retrieval import (
    RankedQueries,
    chance,
    duplicate_ceiling,
    expected_rank,
    rank_queries_by,
    recall_at,
    recall_bound,
    reciprocal_rank,
)
from medvlm_harness.requests import Capability, Embedding
from medvlm_harness.tracks.base import MedicalTask
from medvlm_harness.tracks.rows import Row

__all__ = ["KS", "SearchRow", "SearchTask", "Side", "Variant", "numbered", "truncated_share"]

KS = (1, 5, 10)
PerQuery = Callable[[RankedQueries], NDArray[np.float64]]
Hit = Literal["strict", "text", "labels"]


class Variant(NamedTuple):
    """One way to search."""

    text: str  # what is searched for, or by
    # A strict hit is the study's own; text: that of a study of which `text` is word for word the same; labels: that of
    # one with the same non-empty set of positive labels.
    hit: Hit


class Side(NamedTuple):
    """One side of what is searched."""

    vectors: NDArray[np.float32]  # (n, d)
    known: NDArray[np.int64]  # names what a perfect model could know of each item, (n,)


@dataclass(frozen=True, slots=True)
class SearchRow(Row):
    """The texts of one study; one that the study lacks is left out."""

    texts: Mapping[str, Embedding]
    text_ids: Mapping[str, str]
    positives: tuple[str, ...] | None  # positive labels; None where the label source had nothing to read

    __str__ = Row.__str__


class SearchTask(MedicalTask):
    """`embed` requests, and a search from each side of a study for the other.

    A subclass names its directions and variants (by metric suffix; "" is the strict one), and gives the two sides of
    rows. Queries are resampled by study; the gallery stays as it is.
    """

    OUTPUT_TYPE: ClassVar[str] = "embed"
    NEEDS: ClassVar[frozenset[Capability]]
    DIRECTIONS: ClassVar[tuple[str, str]]
    VARIANTS: ClassVar[Mapping[str, Variant]]

    # --- for subclasses

    @abstractmethod
    def sides(self, rows: Sequence[Any], text: str) -> tuple[Side, Side]:
        """Both sides of the rows that have the text, in the order of the directions."""

    # --- documents

    def positives_of(self, study: Study) -> list[str] | None:
        """The positive labels of a study; None where there are no labels, or nothing was read."""
        if not self.data.manifest.label_sources:
            return None
        labels = study.labels.get(self.label_source)
        if labels is None:
            return None
        return sorted(name for name in labels if name != NO_FINDING and resolve(labels, name) == 1)

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Recall at 1, 5 and 10 both ways for every variant; MRR and median rank for the strict search."""
        names = [f"{d}_recall@{k}{suffix}" for suffix in self.VARIANTS for d in self.DIRECTIONS for k in KS]
        return (*names, *(f"{d}_{what}" for d in self.DIRECTIONS for what in ("mrr", "median_rank")))

    def lower_is_better(self) -> frozenset[str]:
        """The median ranks."""
        return frozenset(f"{direction}_median_rank" for direction in self.DIRECTIONS)

    def estimate(self, rows: Sequence[Any]) -> Mapping[str, Estimate]:
        """All metrics: queries resampled by study, the gallery as it is."""
        estimates: dict[str, Estimate] = {}
        self.ranks: dict[str, dict[str, tuple[float, int]]] = {}  # expected rank, and how many tie
        for text in dict.fromkeys(variant.text for variant in self.VARIANTS.values()):
            items = [row for row in rows if text in row.texts]
            variants = {suffix: variant.hit for suffix, variant in self.VARIANTS.items() if variant.text == text}
            if not items:
                undefined = Estimate.undefined(f"no study has any {text}", n=0)
                estimates |= dict.fromkeys(self.metric_names(), undefined) if "" in variants else {}
                estimates |= {f"{d}_recall@{k}{s}": undefined for s in variants for d in self.DIRECTIONS for k in KS}
                continue
            one, other = self.sides(items, text)
            classes = [_hit_classes(items, text, hit) for hit in variants.values()]
            for direction, queries, gallery in zip(self.DIRECTIONS, (one, other), (other, one), strict=True):
                ranked = rank_queries_by(queries.vectors, gallery.vectors, [(c, c) for c in classes])
                for (suffix, hit), of_hit, found in zip(variants.items(), classes, ranked, strict=True):
                    ceiling = _Ceiling(hit, of_hit, queries.known, gallery.known)
                    estimates |= self._variant(direction, suffix, items, of_hit, found, ceiling)
        return {name: estimates[name] for name in self.metric_names()}

    def _variant(
        self,
        direction: str,
        suffix: str,
        items: Sequence[Any],
        classes: NDArray[np.int64],
        ranked: RankedQueries,
        ceiling: _Ceiling,
    ) -> dict[str, Estimate]:
        """The metrics of one direction of one variant, beside chance and what a perfect retriever reaches."""
        asked = ranked.hits_tied > 0
        study_ids = np.array([row.study_id for row in items])[asked]
        summary = _Summary(_only(ranked, asked), _only(chance(classes, classes), asked), study_ids)
        names = {f"{direction}_recall@{k}{suffix}": k for k in KS}
        means: dict[str, PerQuery] = {name: partial(recall_at, k=k) for name, k in names.items()}
        ceilings = [ceiling.recall_at(k) for k in names.values()]
        if suffix:
            return summary.means(means, ceilings)
        places = zip(expected_rank(summary.ranked).tolist(), summary.ranked.tied.tolist(), strict=True)
        self.ranks[direction] = dict(zip(study_ids.tolist(), places, strict=True))
        means[f"{direction}_mrr"] = reciprocal_rank
        median = summary.median_rank(float(np.median(expected_rank(ceiling.ranked))))
        found = summary.means(means, [*ceilings, float(np.mean(reciprocal_rank(ceiling.ranked)))])
        return {**found, f"{direction}_median_rank": median}

    # --- results

    def score_records(self, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """One record per study and direction: the expected rank of its own counterpart."""
        for row in rows:
            for direction, ranks in self.ranks.items():
                rank, tied = ranks.get(row.study_id, (None, None))
                yield self.score_record(row, direction, rank=rank, tied=tied)


class _Ceiling:
    """What a retriever reaches that cannot tell equal items apart, on either side."""

    def __init__(
        self, hit: Hit, classes: NDArray[np.int64], queries: NDArray[np.int64], gallery: NDArray[np.int64]
    ) -> None:
        self.hit, self._arguments = hit, (classes, classes, queries, gallery)

    @cached_property
    def ranked(self) -> RankedQueries:
        """Its hits, where each query has one."""
        return duplicate_ceiling(*self._arguments)

    def recall_at(self, k: int) -> float:
        """Its mean recall; where queries have several hits, a bound that holds."""
        return float(np.mean(recall_at(self.ranked, k))) if self.hit == "strict" else recall_bound(*self._arguments, k)


class _Summary:
    """Means over queries with interval, beside what chance and a perfect retriever reach on the same queries."""

    def __init__(self, ranked: RankedQueries, floor: RankedQueries, studies: NDArray[np.str_]) -> None:
        self.ranked, self.floor, self.studies = ranked, floor, studies

    def means(self, per_query: Mapping[str, PerQuery], ceilings: Sequence[float]) -> dict[str, Estimate]:
        """Means over the queries of what is computed of each."""
        if self.studies.size == 0:
            return {name: Estimate.undefined("no query has a hit", n=0) for name in per_query}
        found = bootstrap_means(
            np.stack([compute(self.ranked) for compute in per_query.values()], axis=1),
            self.studies,
            floors=[float(np.mean(compute(self.floor))) for compute in per_query.values()],
            ceilings=ceilings,
        )
        return dict(zip(per_query, found, strict=True))

    def median_rank(self, ceiling: float) -> Estimate:
        """Median of the expected ranks."""
        ranks = expected_rank(self.ranked)
        return bootstrap_estimate(
            lambda weights: weighted_median(ranks, weights),
            self.studies,
            floor=float(np.median(expected_rank(self.floor))),
            ceiling=ceiling,
        )


def numbered(names: Sequence[str | None]) -> NDArray[np.int64]:
    """One integer per distinct name, (n,); -1 for None."""
    numbers = {name: number for number, name in enumerate(sorted({name for name in names if name is not None}))}
    return np.array([-1 if name is None else numbers[name] for name in names], dtype=np.int64)


def truncated_share(rows: Sequence[Any], text: str) -> float | None:
    """Share of the texts that the tokenizer cut, in [0, 1]; None where the model did not say."""
    flags = [row.texts[text].truncated for row in rows if text in row.texts]
    known = [flag for flag in flags if flag is not None]
    return sum(known) / len(known) if known else None


def _hit_classes(rows: Sequence[Any], text: str, hit: Hit) -> NDArray[np.int64]:
    if hit == "strict":
        return np.arange(len(rows))
    if hit == "text":
        return numbered([row.text_ids[text] for row in rows])
    return numbered(["|".join(row.positives) if row.positives else None for row in rows])


def _only(ranked: RankedQueries, asked: NDArray[np.bool_]) -> RankedQueries:
    return RankedQueries(ranked.greater[asked], ranked.tied[asked], ranked.hits_tied[asked], ranked.gallery)
