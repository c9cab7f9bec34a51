import csv
import itertools
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medvlm_harness.metrics import _similarity, retrieval
from medvlm_harness.metrics.bootstrap import bootstrap_estimate, weighted_mean, weighted_median
from medvlm_harness.metrics.retrieval import (
    RankedQueries,
    chance,
    duplicate_ceiling,
    expected_rank,
    rank_queries,
    rank_queries_by,
    recall_at,
    recall_bound,
    reciprocal_rank,
)

RNG = np.random.default_rng(7)


def random_ranked(queries: int, gallery: int) -> RankedQueries:
    greater = RNG.integers(0, gallery, queries)
    tied = RNG.integers(1, gallery - greater + 1)
    return RankedQueries(greater, tied, RNG.integers(1, tied + 1), gallery)


def first_hits_by_enumeration(similarity: list[float], is_hit: list[bool]) -> list[int]:
    """Independent and slow: the rank of the first hit in every order of the gallery that the similarities allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(similarity)))
        if all(similarity[a] >= similarity[b] for a, b in itertools.pairwise(order))
    ]
    return [next(rank for rank, item in enumerate(order, start=1) if is_hit[item]) for order in orders]


small_gallery = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6).filter(
    lambda items: any(hit for _, hit in items)
)


@settings(deadline=None)
@given(small_gallery)
def test_equals_the_mean_over_all_orders_of_tied_items(items: list[tuple[int, bool]]) -> None:
    similarity, is_hit = [float(s) for s, _ in items], [hit for _, hit in items]
    ranked = rank_queries([[1.0]], [[s] for s in similarity], [1], [1 if hit else 0 for hit in is_hit])
    ranks = np.array(first_hits_by_enumeration(similarity, is_hit))
    for k in range(1, len(items) + 2):
        assert recall_at(ranked, k)[0] == pytest.approx((ranks <= k).mean(), abs=1e-12)
    assert reciprocal_rank(ranked)[0] == pytest.approx((1 / ranks).mean(), abs=1e-12)
    assert expected_rank(ranked)[0] == pytest.approx(ranks.mean(), abs=1e-12)


def test_equals_a_simulation_of_random_orders() -> None:
    ranked = RankedQueries(np.array([3]), np.array([40]), np.array([4]), 100)
    ranks = 3 + np.array([RNG.choice(40, 4, replace=False).min() + 1 for _ in range(40_000)])
    for k in (1, 4, 10, 30):
        assert recall_at(ranked, k)[0] == pytest.approx((ranks <= k).mean(), abs=0.01)
    assert reciprocal_rank(ranked)[0] == pytest.approx((1 / ranks).mean(), rel=0.01)
    assert expected_rank(ranked)[0] == pytest.approx(ranks.mean(), rel=0.01)


def ranked_by_loops(q: NDArray, g: NDArray, of_query: NDArray, of_gallery: NDArray) -> list[tuple[int, int, int]]:
    """Independent and slow: whole-number vectors, so that float64 products are exact."""
    rows = []
    for vector, wanted in zip(q, of_query, strict=True):
        similarity = [int(vector @ one) for one in g]
        hits = [s for s, c in zip(similarity, of_gallery, strict=True) if c == wanted and wanted >= 0]
        best = max(hits, default=0)
        rows.append(
            (sum(s > best for s in similarity), similarity.count(best), hits.count(best)) if hits else (0, 0, 0)
        )
    return rows


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("rows", "elements"), [(512, 1), (512, 400), (7, 2**26), (512, 2**26)])
def test_counts_equal_a_loop_with_duplicates_missing_classes_and_any_block(
    rows: int, elements: int, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", elements)
    for _ in range(10):
        q, g = RNG.integers(-1, 2, (25, 3)), RNG.integers(-1, 2, (40, 3))
        classes = [(RNG.integers(-1, 9, 25), RNG.integers(-1, 8, 40)) for _ in range(3)]
        for ways in (classes[:1], classes):
            together = rank_queries_by(q, g, ways, device=device)
            for ranked, (of_query, of_gallery) in zip(together, ways, strict=True):
                expected = ranked_by_loops(q, g, of_query, of_gallery)
                assert list(zip(*(array.tolist() for array in ranked[:3]), strict=True)) == expected
                assert ranked.gallery == 40


@pytest.mark.parametrize("cached", [1, 50, 2**18])
def test_each_copy_counts_however_many_are_counted_at_once(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_similarity, "_CACHED", cached)
    copies = np.repeat(np.arange(60), np.r_[np.ones(20, dtype=int), RNG.integers(2, 9, 40)])
    q, g = RNG.integers(-3, 4, (60, 5)), RNG.integers(-3, 4, (60, 5))[copies]
    ranked = rank_queries(q, g, np.arange(60), copies)
    expected = ranked_by_loops(q, g, np.arange(60), copies)
    assert list(zip(*(array.tolist() for array in ranked[:3]), strict=True)) == expected


def test_a_torch_device_gives_the_same_ranks_of_real_vectors() -> None:
    g = RNG.normal(size=(400, 64)).astype(np.float32)[RNG.integers(0, 300, 400)]
    q, of_query, of_gallery = RNG.normal(size=(200, 64)), RNG.integers(-1, 90, 200), RNG.integers(-1, 90, 400)
    first, second = (rank_queries(q, g, of_query, of_gallery, device=device) for device in (None, "cpu"))
    # Two libraries round differently: a near tie of different vectors may change sides, a tie of equal ones may not.
    assert np.mean(first.greater != second.greater) < 0.01
    assert (first.tied == second.tied).mean() > 0.99 and (first.hits_tied == second.hits_tied).mean() > 0.99


def test_without_a_device_torch_is_not_imported() -> None:
    code = (
        "import sys; from medvlm_harness.metrics.retrieval import rank_queries;"
        "rank_queries([[1.0]], [[1.0]], [0], [0]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_vectors_that_begin_alike_are_told_apart() -> None:
    g = np.zeros((6, 9))
    g[:, 5] = [1, 2, 3, 3, 2, 2]
    first, vector = retrieval._distinct(g.astype(np.float32))
    assert len(first) == 3 and (g[first[vector]] == g).all()
    ranked = rank_queries([[0, 0, 0, 0, 0, 1, 0, 0, 0]], g, [0], [0, 1, 1, 1, 1, 1])
    assert (ranked.greater[0], ranked.tied[0]) == (5, 1)


@pytest.mark.parametrize("width", [1, 3, 4, 20])
def test_the_numbers_of_distinct_vectors_do_not_depend_on_the_order_of_the_rows(width: int) -> None:
    rows = RNG.integers(-1, 2, (60, width)).astype(np.float32)
    order = RNG.permutation(60)
    (first, vector), (other_first, other_vector) = retrieval._distinct(rows), retrieval._distinct(rows[order])
    assert (rows[first] == rows[order][other_first]).all() and (vector[order] == other_vector).all()
    assert len(first) == len({tuple(row) for row in rows.tolist()})


def test_equal_vectors_tie_exactly_wherever_they_stand() -> None:
    base = RNG.normal(size=(30, 513)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    g = base[np.arange(3000) % 30]
    ranked = rank_queries(base, g, np.arange(30), np.where(np.arange(3000) < 30, np.arange(3000), -1))
    assert (ranked.greater == 0).all() and (ranked.tied == 100).all() and (ranked.hits_tied == 1).all()
    assert recall_at(ranked, 10) == pytest.approx(np.full(30, 0.1))


def test_minus_zero_is_zero() -> None:
    ranked = rank_queries([[1.0, 0.0]], [[0.5, 0.0], [0.5, -0.0]], [0], [0, 1])
    assert (ranked.tied[0], len(retrieval._distinct(np.array([[0.0], [-0.0]], dtype=np.float32))[0])) == (2, 1)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_a_constant_encoder_scores_exactly_chance(items: int, k: int) -> None:
    vectors = np.full((items, 8), 8**-0.5)
    ranked = rank_queries(vectors, vectors, np.arange(items), np.arange(items))
    floor = chance(np.arange(items), np.arange(items))
    assert recall_at(ranked, k) == pytest.approx(np.full(items, min(1, k / items)), abs=1e-12)
    assert (recall_at(ranked, k) == recall_at(floor, k)).all()
    assert expected_rank(ranked) == pytest.approx(np.full(items, (items + 1) / 2))
    assert reciprocal_rank(ranked) == pytest.approx(np.full(items, (1 / np.arange(1, items + 1)).mean()))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_the_gallery_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(50, 16)).astype(np.float32)[rng.integers(0, 50, 50)]
    q, of_query, of_gallery = rng.normal(size=(20, 16)), rng.integers(0, 12, 20), rng.integers(0, 12, 50)
    order = rng.permutation(50)
    first, second = rank_queries(q, g, of_query, of_gallery), rank_queries(q, g[order], of_query, of_gallery[order])
    assert all((a == b).all() for a, b in zip(first[:3], second[:3], strict=True))


def test_a_perfect_encoder_is_first_and_a_reversed_one_last() -> None:
    eye = np.eye(12)
    assert (recall_at(rank_queries(eye, eye, np.arange(12), np.arange(12)), 1) == 1).all()
    last = rank_queries(-eye, eye, np.arange(12), np.arange(12))
    assert (expected_rank(last) == 12).all() and (recall_at(last, 11) == 0).all()


def test_recall_grows_with_k_and_ends_at_one() -> None:
    ranked = random_ranked(200, 50)
    recalls = np.array([recall_at(ranked, k) for k in range(1, 51)])
    assert (np.diff(recalls, axis=0) >= -1e-12).all() and (recalls[-1] == 1).all()
    # P(rank <= k), summed over k, gives the mean rank again; with weights 1/k - 1/(k + 1) the mean reciprocal.
    assert 50 - recalls[:-1].sum(axis=0) == pytest.approx(expected_rank(ranked))
    k = np.arange(1, 50)
    assert recalls[-1] / 50 + (1 / k - 1 / (k + 1)) @ recalls[:-1] == pytest.approx(reciprocal_rank(ranked))


def test_chance_of_several_hits_is_hypergeometric() -> None:
    floor = chance([7, 8, -1, 9], [7, 7, 8, -1, -1])
    assert recall_at(floor, 2) == pytest.approx(np.array([1 - 3 / 10, 2 / 5, np.nan, np.nan]), nan_ok=True)
    vectors = np.ones((5, 2))
    constant = rank_queries(vectors[:4], vectors, [7, 8, -1, 9], [7, 7, 8, -1, -1])
    assert all((a == b).all() for a, b in zip(constant[:3], floor[:3], strict=True))


def test_the_ceiling_is_k_over_the_number_of_equal_texts() -> None:
    text = np.array([0, 0, 0, 0, 1])
    ceiling = duplicate_ceiling(np.arange(5), np.arange(5), text, text)
    assert recall_at(ceiling, 2) == pytest.approx(np.array([0.5] * 4 + [1.0]))
    assert reciprocal_rank(ceiling) == pytest.approx(np.array([(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4] * 4 + [1.0]))
    assert weighted_median(expected_rank(ceiling), np.ones((1, 5)))[0] == 2.5


def test_the_ceiling_is_what_an_encoder_of_the_texts_reaches() -> None:
    study = np.repeat(np.arange(40), 2)
    text = RNG.integers(0, 12, 40)
    vectors = np.eye(12)[text]
    by_image, by_text = vectors[study], vectors
    for query, gallery, of_query, of_gallery in (
        (by_image, by_text, study, np.arange(40)),
        (by_text, by_image, np.arange(40), study),
    ):
        perfect = rank_queries(query, gallery, of_query, of_gallery)
        ceiling = duplicate_ceiling(of_query, of_gallery, text[of_query], text[of_gallery])
        assert all((a == b).all() for a, b in zip(perfect[:3], ceiling[:3], strict=True))


def test_text_class_hits_have_no_such_ceiling() -> None:
    text = np.array([0, 0, 0, 0, 1])
    assert (recall_at(duplicate_ceiling(text, text, text, text), 1) == 1).all()


def best_order_by_trying_all(
    of_query: np.ndarray, of_gallery: np.ndarray, known: np.ndarray, known_of_gallery: np.ndarray, k: int
) -> float:
    """Independent and slow: equal queries share the best of all orders of the distinct gallery texts."""
    found = []
    for text in np.unique(known):
        best = 0.0
        for order in itertools.permutations(np.unique(known_of_gallery)):
            total = 0.0
            for wanted in of_query[known == text]:
                missed, left = 1.0, k
                for group in order:
                    hit = of_gallery[known_of_gallery == group] == wanted
                    drawn = min(left, hit.size)
                    missed *= math.comb(hit.size - hit.sum(), drawn) / math.comb(hit.size, drawn)
                    left -= drawn
                total += 1 - missed
            best = max(best, total)
        found.append(best)
    return sum(found) / len(of_query)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_with_duplicates_on_both_sides_no_order_beats_the_ceiling(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    findings, impressions, own = rng.integers(0, 4, 9), rng.integers(0, 4, 9), np.arange(9)
    best = best_order_by_trying_all(own, own, findings, impressions, k)
    assert recall_at(duplicate_ceiling(own, own, findings, impressions), k).mean() == pytest.approx(best)
    assert recall_bound(own, own, findings, impressions, k) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_for_queries_with_several_hits_and_is_reached_at_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    findings, impressions, classes = rng.integers(0, 4, 9), rng.integers(0, 4, 9), rng.integers(0, 3, 9)
    for k in (1, 2, 4):
        best = best_order_by_trying_all(classes, classes, findings, impressions, k)
        bound = recall_bound(classes, classes, findings, impressions, k)
        assert best - 1e-12 <= bound <= 1
        assert k > 1 or bound == pytest.approx(best)


def test_equal_findings_with_unequal_impressions_are_found_by_the_more_frequent_first() -> None:
    """Two studies of three with these findings are normal; one normal impression is another study's too."""
    findings, impressions = np.array([0, 0, 0, 1]), np.array([5, 5, 6, 5])
    ceiling = duplicate_ceiling(np.arange(4), np.arange(4), findings, impressions)
    # Of the first text: the three items "5" hold two of its hits (2/3 a slot), the item "6" one (1 a slot): "6" first.
    assert ceiling.greater.tolist() == [1, 1, 0, 0]
    assert ceiling.tied.tolist() == [3, 3, 1, 3]
    assert recall_at(ceiling, 1).tolist() == pytest.approx([0, 0, 1, 1 / 3])
    assert recall_at(ceiling, 2).tolist() == pytest.approx([1 / 3, 1 / 3, 1, 2 / 3])


def test_what_is_left_out_is_no_part_of_the_bound() -> None:
    assert recall_bound([0, -1, 3], [0, 1, 2], [0, 0, 0], [0, 1, 2], 1) == 1
    assert np.isnan(recall_bound([4], [5], [0], [0], 1))
    assert (duplicate_ceiling([4, 0], [0, 0], [0, -1], [0, 0]).hits_tied == 0).all()
    with pytest.raises(ValueError, match="k to be at least 1"):
        recall_bound([0], [0], [0], [0], 0)


PUBLISHED = {  # ReXrank's files of the same split, numbers_and_lm_eval.md, section 4a
    "impression": (0.397, 0.641, 0.783),
    "findings": (0.675, 0.878, 0.951),
    "report": (0.720, 0.924, 0.978),
}


@pytest.mark.parametrize("section", PUBLISHED)
def test_ceiling_of_the_r2gen_test_split(section: str, shared: Path) -> None:
    folder = shared / "data" / "iu_cxr"
    if not (folder / "r2gen_split.csv").is_file():
        pytest.skip(f"no IU-CXR data in {folder}")
    with (folder / "indiana_reports.csv").open(newline="", encoding="utf-8") as file:
        reports = {row["uid"]: row for row in csv.DictReader(file)}
    with (folder / "r2gen_split.csv").open(newline="", encoding="utf-8") as file:
        rows = [reports[row["uid"]] for row in csv.DictReader(file) if row["split"] == "test"]
    texts = [
        f"{row['findings'].strip()} {row['impression'].strip()}" if section == "report" else row[section].strip()
        for row in rows
    ]
    _, text = np.unique(texts, return_inverse=True)
    ceiling = duplicate_ceiling(np.arange(590), np.arange(590), text, text)
    # Published to three digits: equal texts in both sources must give the same number up to that rounding.
    got = [float(recall_at(ceiling, k).mean()) for k in (1, 5, 10)]
    assert got == pytest.approx(list(PUBLISHED[section]), abs=5.1e-4)


def test_queries_are_resampled_by_study_and_those_without_a_hit_are_left_out() -> None:
    study = np.repeat(np.arange(150), 2)
    q, g = RNG.normal(size=(300, 8)), RNG.normal(size=(150, 8))
    of_query = np.where(study < 100, study, -1)
    values = recall_at(rank_queries(q, g, of_query, np.arange(150)), 10)
    assert np.isnan(values).sum() == 100
    estimate = bootstrap_estimate(lambda w: weighted_mean(values, w), study)
    by_study = values[:200].reshape(100, 2).mean(axis=1)
    assert estimate.value == pytest.approx(by_study.mean())
    assert estimate.stderr == pytest.approx(by_study.std() / 10, rel=0.15)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_find_is_undefined_not_zero(n: int) -> None:
    ranked = rank_queries(np.zeros((n, 4)), np.zeros((0, 4)), np.arange(n), np.arange(0))
    for value in (recall_at(ranked, 5), reciprocal_rank(ranked), expected_rank(ranked)):
        assert value.shape == (n,) and np.isnan(value).all()
    assert np.isnan(weighted_mean(recall_at(ranked, 5), np.ones((1, n)))).all()


def test_the_similarity_matrix_is_never_held_as_a_whole() -> None:
    q, g = RNG.normal(size=(12_000, 8)).astype(np.float32), RNG.normal(size=(12_000, 8)).astype(np.float32)
    tracemalloc.start()
    rank_queries(q, g, np.arange(12_000), np.arange(12_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20  # the matrix alone would be 576 MB


@pytest.mark.parametrize(
    ("q", "g", "of_query", "of_gallery", "message"),
    [
        ([[1.0]], [[1.0, 2.0]], [0], [0], r"queries \(n, d\)"),
        ([[1.0]], [[1.0]], [0, 1], [0], "1 query classes"),
        ([[1.0]], [[1.0]], [0.5], [0], "query_class to be integers"),
        ([[1.0]], [[1.0]], [-2], [0], "at least -1"),
        ([[np.nan]], [[1.0]], [0], [0], "finite queries"),
        ([[1.0]], [[np.inf]], [0], [0], "finite gallery"),
    ],
)
def test_wrong_input_says_what_was_expected(
    q: list[list[float]], g: list[list[float]], of_query: list[int], of_gallery: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_queries(q, g, of_query, of_gallery)


def test_wrong_k_and_wrong_texts_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="k to be at least 1"):
        recall_at(chance([0], [0]), 0)
    with pytest.raises(ValueError, match="Expected query_text"):
        duplicate_ceiling([0, 1], [0, 1], [0], [0, 1])
