"""Cross-modal retrieval: does a query find what belongs to it, when tied items come in random order?

Reports repeat, and small encoders map different inputs to one vector, so ties are common. Each metric is therefore an
expectation over all orders of tied items: it never depends on the order of the gallery, and a constant encoder scores
exactly chance. What counts as a hit is up to the caller, who names a class for each query and each gallery item.

    ranked = rank_queries(images, reports, image_study, report_study)
    weighted_mean(recall_at(ranked, 5), weights)        # see `bootstrap`; queries are resampled, the gallery is fixed
    recall_at(chance(image_study, report_study), 5)     # its floor, and with duplicate_ceiling its ceiling

Values are per query. A query without a class, or without any hit in the gallery, has NaN: it is left out of the mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.metrics._similarity import NumpySimilarity, Similarity, TorchSimilarity

__all__ = [
    "RankedQueries",
    "chance",
    "duplicate_ceiling",
    "expected_rank",
    "rank_queries",
    "rank_queries_by",
    "recall_at",
    "recall_bound",
    "reciprocal_rank",
]

Vectors = NDArray[np.float32]
Classes = NDArray[np.int64]

# Similarities held at once. More rows make a product faster, up to about this many.
_BLOCK_ROWS = 512
_BLOCK_ELEMENTS = 2**26  # 256 MB
_HIT_ELEMENTS = 12  # what looking up one hit takes in memory, in similarities


class RankedQueries(NamedTuple):
    """Where the best hit of each query stands in the gallery; arrays have shape (queries,)."""

    greater: NDArray[np.int64]  # gallery items more similar than the best hit
    tied: NDArray[np.int64]  # gallery items exactly as similar as the best hit, hits included
    hits_tied: NDArray[np.int64]  # how many of the tied are hits; 0 if the query has no hit at all
    gallery: int  # number of gallery items


def rank_queries(
    queries: ArrayLike,
    gallery: ArrayLike,
    query_class: ArrayLike,
    gallery_class: ArrayLike,
    *,
    device: str | None = None,
) -> RankedQueries:
    """Rank the gallery by inner product with each query, and locate the best hit.

    Vectors that are equal byte for byte are compared once, so they tie exactly, which no BLAS promises by itself.
    Similarities are computed in float32 and in blocks; beyond its arguments the function needs a copy of the gallery
    and at most about 300 MB.

    Args:
        queries: finite, of unit length if cosines are meant, shape (n, d).
        gallery: as queries, shape (m, d).
        query_class: integer per query, shape (n,); -1 leaves the query out.
        gallery_class: integer per gallery item, shape (m,); a hit has the query's class; -1 is never a hit.
        device: where to compute: None for the CPU with NumPy, or a torch device such as "cuda".
    """
    return rank_queries_by(queries, gallery, [(query_class, gallery_class)], device=device)[0]


def rank_queries_by(
    queries: ArrayLike, gallery: ArrayLike, classes: Sequence[tuple[ArrayLike, ArrayLike]], *, device: str | None = None
) -> list[RankedQueries]:
    """`rank_queries` for several ways to say what a hit is, each a pair of query and gallery classes, at once."""
    q, g = _vectors(queries, gallery)
    of_query, of_gallery = _numbered_apart(classes, len(q), len(g))  # (ways, n), (ways, m)
    greater, tied, hits_tied = np.zeros((3, *of_query.shape), dtype=np.int64)
    asked = np.nonzero(np.isin(of_query, of_gallery[of_gallery >= 0]))
    if asked[0].size:
        answers = _best_hits(q, g, asked[1], of_query[asked], of_gallery, device)
        greater[asked], tied[asked], hits_tied[asked] = answers
    return [RankedQueries(*way, len(g)) for way in zip(greater, tied, hits_tied, strict=True)]


def _best_hits(
    q: Vectors, g: Vectors, query: NDArray[np.intp], wanted: NDArray[np.int64], of_gallery: Classes, device: str | None
) -> NDArray[np.int64]:
    """Of each query and the class that it wants: greater, tied and hits tied, shape (3, asked)."""
    q_first, q_vector = _distinct(q)
    g_first, g_vector = _distinct(g)
    vectors, copies = _without_minus_zero(g[g_first]), np.bincount(g_vector).astype(np.int64)
    # Members of a class: the distinct vectors among its items, each with the number of items that have it.
    way, item = np.nonzero(of_gallery >= 0)
    members, hits = np.unique(np.c_[of_gallery[way, item], g_vector[item]], axis=0, return_counts=True)
    # Queries with the same vector and the same class share their answer, those with the same vector its similarities.
    pairs, pair = np.unique(np.c_[q_vector[query], wanted], axis=0, return_inverse=True)
    first, last = (np.searchsorted(members[:, 0], pairs[:, 1], side=side) for side in ("left", "right"))
    rows, row_of_pair = np.unique(pairs[:, 0], return_inverse=True)
    start = np.searchsorted(row_of_pair, np.arange(len(rows) + 1))  # of each row's pairs

    blocks = list(_row_blocks(len(vectors) + _HIT_ELEMENTS * np.add.reduceat(last - first, start[:-1])))
    similarity: Similarity = (
        NumpySimilarity(vectors, copies, max(block.stop - block.start for block in blocks))
        if device is None
        else TorchSimilarity(vectors, copies, device)
    )
    answers = np.empty((3, len(pairs)), dtype=np.int64)
    for block in blocks:
        these = slice(start[block.start], start[block.stop])
        row = row_of_pair[these] - block.start
        size = last[these] - first[these]
        offset = np.cumsum(size) - size
        member = np.arange(size.sum()) - np.repeat(offset - first[these], size)
        of_hits = similarity.at(_without_minus_zero(q[q_first[rows[block]]]), np.repeat(row, size), members[member, 1])
        best = np.maximum.reduceat(of_hits, offset)
        answers[0, these], answers[1, these] = similarity.counts(row, best)
        answers[2, these] = np.add.reduceat(np.where(of_hits == np.repeat(best, size), hits[member], 0), offset)
    return answers[:, pair.ravel()]


def recall_at(ranked: RankedQueries, k: int) -> NDArray[np.float64]:
    """Probability that a hit is among the first k; per query, in [0, 1], higher is better, NaN without any hit.

    1 - C(tied - hits, j) / C(tied, j) with j = k - greater: the hypergeometric chance to draw no hit in j draws.
    """
    if k < 1:
        raise ValueError(f"Expected k to be at least 1, but got {k}.")
    greater, tied, hits = ranked.greater, ranked.tied, ranked.hits_tied
    draws = np.clip(k - greater, 0, tied)
    missed = np.ones(len(tied))
    for i in range(int(draws.max(initial=0))):
        drawing = i < draws
        left = np.maximum(tied - hits - i, 0)
        missed[drawing] *= left[drawing] / (tied - i)[drawing]
    return np.where(hits > 0, 1 - missed, np.nan)


def reciprocal_rank(ranked: RankedQueries) -> NDArray[np.float64]:
    """Expected 1 / rank of the first hit; per query, in (0, 1], higher is better, NaN without any hit."""
    value = np.where(ranked.hits_tied > 0, 1 / (ranked.greater + 1), np.nan)  # that of a hit which ties with nothing
    tied = ranked.tied > 1
    if tied.any():
        cases, case = np.unique(np.stack([array[tied] for array in ranked[:3]], axis=1), axis=0, return_inverse=True)
        value[tied] = np.array([_expected_reciprocal(*triple) for triple in cases.tolist()])[case.ravel()]
    return value


def expected_rank(ranked: RankedQueries) -> NDArray[np.float64]:
    """Expected rank of the first hit; per query, from 1 to the gallery's size, lower is better, NaN without any hit.

    The median rank of a run is the median of these expectations.
    """
    rank = ranked.greater + (ranked.tied + 1) / (ranked.hits_tied + 1)
    return np.where(ranked.hits_tied > 0, rank, np.nan)


def chance(query_class: ArrayLike, gallery_class: ArrayLike) -> RankedQueries:
    """The floor: what a constant encoder reaches, for which the whole gallery ties."""
    of_query, of_gallery = _classes("query_class", query_class), _classes("gallery_class", gallery_class)
    hits = _share_count(of_query, of_gallery)
    return RankedQueries(np.zeros_like(hits), np.where(hits > 0, of_gallery.size, 0), hits, of_gallery.size)


def duplicate_ceiling(
    query_class: ArrayLike, gallery_class: ArrayLike, query_text: ArrayLike, gallery_text: ArrayLike
) -> RankedQueries:
    """The ceiling: what a perfect retriever reaches, which cannot tell equal texts apart, on either side.

    It gives equal queries one and the same order of the gallery, in which equal items tie, and knows how often each
    text of one side goes with each of the other: it orders the gallery by the probability that an item is a hit.
    Where a query has one hit no order is better for recall at any k, nor for the mean of 1 / rank. With m studies of
    one text on both sides, and one hit among them, a query finds it within k with probability min(1, k / m).

    Args:
        query_class: what is to be found, as in `rank_queries`, shape (n,).
        gallery_class: as in `rank_queries`, shape (m,).
        query_text: integer that names what is known of the query, shape (n,); -1 leaves the query out.
        gallery_text: integer that names what is known of the gallery item, shape (m,); -1 is never a hit.

    Source: probability ranking principle, Robertson 1977, doi 10.1108/eb026647.
    """
    known = _Duplicates(query_class, gallery_class, query_text, gallery_text)
    greater, tied, hits = np.zeros((3, len(known.of_query)), dtype=np.int64)
    # Where the query's class is certain, what is likeliest to be a hit comes first.
    best = known.per_class(np.maximum, known.density)
    first = known.density == np.repeat(best, known.sizes)
    place = known.place_of_class(known.certain)
    tied[known.certain] = known.per_class(np.add, known.copies[known.hit_text] * first)[place]
    hits[known.certain] = known.per_class(np.add, known.hits * first)[place]
    for same in known.equal_queries():
        order = known.order_for(same)
        of_query = known.of_query[same]
        for asked in np.unique(of_query):
            its = order.hit_class == asked
            highest = order.density[order.hit_text[its]].max()
            these = same[of_query == asked]
            greater[these] = order.copies[order.density > highest].sum()
            tied[these] = order.copies[order.density == highest].sum()
            hits[these] = order.hits[its & (order.density[order.hit_text] == highest)].sum()
    return RankedQueries(greater, tied, hits, known.gallery)


def recall_bound(
    query_class: ArrayLike, gallery_class: ArrayLike, query_text: ArrayLike, gallery_text: ArrayLike, k: int
) -> float:
    """What no retriever's mean recall exceeds that cannot tell equal texts apart; in [0, 1], NaN without any hit.

    For queries with several hits, where the order of `duplicate_ceiling` need not be the best one: the sum of the k
    highest probabilities of a hit, at most 1. It can be reached at k = 1, and everywhere with one hit per query.

    Args:
        query_class: as in `duplicate_ceiling`.
        gallery_class: likewise.
        query_text: likewise.
        gallery_text: likewise.
        k: at least 1.
    """
    if k < 1:
        raise ValueError(f"Expected k to be at least 1, but got {k}.")
    known = _Duplicates(query_class, gallery_class, query_text, gallery_text)
    likeliest = np.lexsort((-known.density, known.hit_class))
    copies, density = known.copies[known.hit_text[likeliest]], known.density[likeliest]
    before = np.cumsum(copies) - copies
    before -= np.repeat(before[known.starts], known.sizes)
    bounds = np.minimum(1.0, known.per_class(np.add, np.clip(k - before, 0, copies) * density))
    found = float(bounds[known.place_of_class(known.certain)].sum())
    asked = int(known.certain.sum())
    for same in known.equal_queries():
        order = known.order_for(same)
        first = np.argsort(-order.density, kind="stable")
        copies = order.copies[first]
        places = np.clip(k - (np.cumsum(copies) - copies), 0, copies)
        found += len(same) * min(1.0, float(places @ order.density[first]))
        asked += len(same)
    return found / asked if asked else float("nan")


class _Order(NamedTuple):
    """What a perfect retriever knows of the gallery texts that have a hit for equal queries, (texts,)."""

    copies: Classes  # gallery items of the text
    density: NDArray[np.float64]  # probability that one of them is a hit
    hit_class: Classes  # of each class and text that go together, (pairs,)
    hit_text: NDArray[np.intp]  # the text's place above, (pairs,)
    hits: Classes  # gallery items of both, (pairs,)


class _Duplicates:
    """Queries and gallery items by what is known of them; queries whose class has no item are left out."""

    def __init__(
        self, query_class: ArrayLike, gallery_class: ArrayLike, query_text: ArrayLike, gallery_text: ArrayLike
    ) -> None:
        self.of_query, of_gallery = _classes("query_class", query_class), _classes("gallery_class", gallery_class)
        self.text, texts = _classes("query_text", query_text), _classes("gallery_text", gallery_text)
        if self.text.shape != self.of_query.shape or texts.shape != of_gallery.shape:
            raise ValueError(
                f"Expected query_text {self.of_query.shape} and gallery_text {of_gallery.shape}, "
                f"but got {self.text.shape} and {texts.shape}."
            )
        self.gallery = of_gallery.size
        self.copies = np.bincount(texts[texts >= 0])  # of each text, (texts,)
        hit = (texts >= 0) & (of_gallery >= 0)
        pairs, self.hits = np.unique(np.c_[of_gallery[hit], texts[hit]], axis=0, return_counts=True)
        self.hit_class, self.hit_text = pairs.T
        self.classes, self.starts, self.sizes = np.unique(self.hit_class, return_index=True, return_counts=True)
        # Probability that a gallery item of the text is of the class, (pairs,).
        self.density = self.hits / self.copies[self.hit_text]
        self.asked = (self.text >= 0) & np.isin(self.of_query, self.hit_class)
        # Queries whose text says their class; of the others it leaves several open.
        known = np.unique(np.c_[self.text, self.of_query][self.asked], axis=0)[:, 0]
        texts, times = np.unique(known, return_counts=True)
        self.certain = self.asked & np.isin(self.text, texts[times == 1])

    def per_class(self, reduce: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """What is computed of the texts of each class, (pairs,) to (classes,)."""
        result: NDArray[Any] = reduce.reduceat(values, self.starts) if self.starts.size else values
        return result

    def place_of_class(self, queries: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The place of each query's class in `classes`."""
        return np.searchsorted(self.classes, self.of_query[queries])

    def equal_queries(self) -> Iterator[NDArray[np.intp]]:
        """The queries of each text that leaves their class open."""
        queries = np.flatnonzero(self.asked & ~self.certain)
        queries = queries[np.argsort(self.text[queries], kind="stable")]
        if queries.size:
            yield from np.split(queries, np.flatnonzero(np.diff(self.text[queries])) + 1)

    def order_for(self, queries: NDArray[np.intp]) -> _Order:
        """How likely gallery texts are a hit for queries of one text."""
        wanted, times = np.unique(self.of_query[queries], return_counts=True)
        first, last = (np.searchsorted(self.hit_class, wanted, side=side) for side in ("left", "right"))
        its = np.concatenate([np.arange(*ends) for ends in zip(first, last, strict=True)])
        texts, place = np.unique(self.hit_text[its], return_inverse=True)
        found = np.bincount(place, weights=self.hits[its] * np.repeat(times, last - first))
        copies = self.copies[texts]
        return _Order(copies, found / (copies * len(queries)), self.hit_class[its], place, self.hits[its])


def _expected_reciprocal(greater: int, tied: int, hits: int) -> float:
    if hits == 0:
        return float("nan")
    # P(first hit is the j-th of the tied) = C(tied - j, hits - 1) / C(tied, hits), from j to j + 1 by its ratio.
    j = np.arange(1, tied - hits + 1)
    probability = hits / tied * np.cumprod(np.r_[1.0, (tied - j - hits + 1) / (tied - j)])
    return float(probability @ (1 / (greater + np.arange(1, tied - hits + 2))))


def _share_count(of_query: NDArray[np.int64], of_gallery: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each query the number of gallery items of its class; 0 for class -1."""
    ordered = np.sort(of_gallery)
    count = np.searchsorted(ordered, of_query, side="right") - np.searchsorted(ordered, of_query, side="left")
    return np.where(of_query >= 0, count, 0).astype(np.int64)


def _distinct(vectors: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index of the first row of each distinct vector, and for each row the number of its vector.

    Rows are compared by their first four numbers and, where these occur again, by a 128-bit digest of all their bytes:
    sorting the rows themselves would copy them several times. Vectors are in the order of how often they occur, then
    of these bytes, so it does not depend on the order of the rows.
    """
    start = _without_minus_zero(vectors[:, :4].copy())
    keys = np.zeros((len(vectors), 32), dtype=np.uint8)
    keys[:, : start.shape[1] * start.itemsize] = start.view(np.uint8)
    _, group, size = np.unique(keys.view("V32").ravel(), return_inverse=True, return_counts=True)
    shared = np.flatnonzero(size[group] > 1)
    contents = (_without_minus_zero(vectors[row].copy()).tobytes() for row in shared)
    digests = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
    keys[shared, 16:] = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
    _, first, vector, copies = np.unique(
        keys.view("V32").ravel(), return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(copies, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order], number[vector]


def _without_minus_zero(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same rows with 0.0 for -0.0, whose bytes differ; changed in place."""
    vectors += np.float32(0)
    return vectors


def _row_blocks(cost: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive rows whose cost stays within the block size; a row that exceeds it alone gets its own block."""
    start, total = 0, 0
    for row, one in enumerate(cost.tolist()):
        if row - start == _BLOCK_ROWS or (total + one > _BLOCK_ELEMENTS and row > start):
            yield slice(start, row)
            start, total = row, 0
        total += one
    yield slice(start, len(cost))


def _classes(name: str, value: ArrayLike) -> NDArray[np.int64]:
    given = np.asarray(value)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"Expected {name} to be integers of shape (n,), but got {given.dtype} of shape {given.shape}.")
    if given.size and given.min() < -1:
        raise ValueError(f"Expected {name} to be at least -1 (no class), but got {given.min()}.")
    return given.astype(np.int64)


def _vectors(queries: ArrayLike, gallery: ArrayLike) -> tuple[Vectors, Vectors]:
    q = np.ascontiguousarray(queries, dtype=np.float32)
    g = np.ascontiguousarray(gallery, dtype=np.float32)
    if q.ndim != 2 or g.ndim != 2 or q.shape[1] != g.shape[1]:
        raise ValueError(f"Expected queries (n, d) and gallery (m, d), but got {q.shape} and {g.shape}.")
    for name, vectors in (("queries", q), ("gallery", g)):
        if not np.isfinite(vectors).all():
            raise ValueError(f"Expected finite {name}, but got NaN or infinity.")
    return q, g


def _numbered_apart(
    classes: Sequence[tuple[ArrayLike, ArrayLike]], queries: int, gallery: int
) -> tuple[Classes, Classes]:
    """The classes of all ways, none of which occurs in two of them."""
    of_query = np.full((len(classes), queries), -1, dtype=np.int64)
    of_gallery = np.full((len(classes), gallery), -1, dtype=np.int64)
    free = 0
    for way, (query_class, gallery_class) in enumerate(classes):
        one, other = _classes("query_class", query_class), _classes("gallery_class", gallery_class)
        if one.size != queries or other.size != gallery:
            raise ValueError(
                f"Expected {queries} query classes and {gallery} gallery classes, but got {one.size} and {other.size}."
            )
        of_query[way], of_gallery[way] = (np.where(given >= 0, given + free, -1) for given in (one, other))
        free = 1 + max(free - 1, of_query[way].max(initial=-1), of_gallery[way].max(initial=-1))
    return of_query, of_gallery
