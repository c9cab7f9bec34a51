"""DeLong's variance and test against slow implementations that count pairs."""

import numpy as np
import pytest
from scipy.stats import norm

from medvlm_harness.metrics.delong import compare_aurocs, delong_variance
from medvlm_harness.metrics.ranking import auroc

RNG = np.random.default_rng(7)


def covariance_by_hand(y: list[int], scores: list[list[float]], clusters: list[int]) -> np.ndarray:
    """Independent and slow: the covariance matrix of several AUROCs, by pairs and loops over clusters."""
    positives = [i for i, label in enumerate(y) if label]
    negatives = [i for i, label in enumerate(y) if not label]
    m, n, k = len(positives), len(negatives), len(set(clusters))
    v10, v01 = [], []
    for s in scores:
        wins = {(i, j): (s[i] > s[j]) + (s[i] == s[j]) / 2 for i in positives for j in negatives}
        v10.append({i: sum(wins[i, j] for j in negatives) / n for i in positives})
        v01.append({j: sum(wins[i, j] for i in positives) / m for j in negatives})
    areas = [sum(one.values()) / m for one in v10]
    i10, i01 = (len({clusters[i] for i in of}) for of in (positives, negatives))

    def within(parts: list[dict[int, float]], r: int, c: int) -> float:
        return sum(value - areas[r] for i, value in parts[r].items() if clusters[i] == c)

    result = np.zeros((len(scores), len(scores)))
    for r in range(len(scores)):
        for q in range(len(scores)):
            s10 = i10 / ((i10 - 1) * m) * sum(within(v10, r, c) * within(v10, q, c) for c in set(clusters))
            s01 = i01 / ((i01 - 1) * n) * sum(within(v01, r, c) * within(v01, q, c) for c in set(clusters))
            s11 = k / ((k - 1) * m) * sum(within(v10, r, c) * within(v01, q, c) for c in set(clusters))
            s11_turned = k / ((k - 1) * m) * sum(within(v10, q, c) * within(v01, r, c) for c in set(clusters))
            result[r, q] = s10 / m + s01 / n + (s11 + s11_turned) / n
    return result


@pytest.mark.parametrize("levels", [4, 10_000])
def test_variance_equals_the_definition(levels: int) -> None:
    for _ in range(20):
        y = np.r_[1, 1, 0, 0, RNG.random(36) < 0.3].astype(int)
        s = RNG.integers(0, levels, 40) / levels
        single, mixed = np.arange(40), np.r_[0, 1, 2, 3, RNG.integers(0, 15, 36)]
        assert delong_variance(y, s) == pytest.approx(
            covariance_by_hand(y.tolist(), [s.tolist()], single.tolist())[0, 0]
        )
        by_hand = max(covariance_by_hand(y.tolist(), [s.tolist()], mixed.tolist())[0, 0], 0)
        assert delong_variance(y, s, clusters=mixed) == pytest.approx(by_hand)


def test_variance_without_clusters_is_delongs_textbook_formula() -> None:
    y, s = np.r_[np.ones(10), np.zeros(50)], RNG.normal(size=60)
    wins = (s[:10, None] > s[10:]).astype(float)
    textbook = wins.mean(axis=1).var(ddof=1) / 10 + wins.mean(axis=0).var(ddof=1) / 50
    assert delong_variance(y, s) == pytest.approx(textbook)


@pytest.mark.parametrize("clustered", [False, True])
def test_the_paired_test_is_the_contrast_of_the_covariance_matrix(clustered: bool) -> None:
    for _ in range(10):
        y = np.r_[1, 1, 0, 0, RNG.random(36) < 0.4].astype(int)
        first = np.round(RNG.normal(size=40) + y, 1)  # with ties
        second = np.round(first + RNG.normal(size=40), 1)
        clusters = np.r_[0, 1, 2, 3, RNG.integers(0, 20, 36)] if clustered else np.arange(40)
        covariance = covariance_by_hand(y.tolist(), [first.tolist(), second.tolist()], clusters.tolist())
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        found = compare_aurocs(y, first, second, clusters=clusters)
        assert found.difference == pytest.approx(auroc(y, first) - auroc(y, second), abs=1e-12)
        assert found.stderr == pytest.approx(np.sqrt(variance), abs=1e-6)
        assert found.p == pytest.approx(2 * norm.sf(abs(found.difference) / np.sqrt(variance)), abs=1e-6)


def test_the_same_scores_do_not_differ() -> None:
    y, score = RNG.integers(0, 2, 50), RNG.normal(size=50)
    assert compare_aurocs(y, score, 2 * score + 1) == (0.0, 0.0, 1.0)


def test_what_shows_no_variance_has_no_p() -> None:
    found = compare_aurocs([1, 1, 0, 0], [4, 3, 2, 1], [1, 2, 3, 4])  # perfect against all wrong
    assert found.difference == 1 and np.isnan(found.stderr) and np.isnan(found.p)
    assert np.isnan(compare_aurocs([1, 1], [0.1, 0.2], [0.2, 0.1])).all()


def test_p_is_uniform_where_nothing_differs() -> None:
    p = []
    for _ in range(500):
        y, shared = np.r_[np.ones(30), np.zeros(170)], RNG.normal(size=200)
        p.append(compare_aurocs(y, shared + RNG.normal(size=200) + y, shared + RNG.normal(size=200) + y).p)
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09 and 0.42 < np.mean(p) < 0.58
