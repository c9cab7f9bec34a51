from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm_harness.metrics import bootstrap
from medvlm_harness.metrics.bootstrap import (
    bootstrap_columns,
    bootstrap_estimate,
    percentile_interval,
    resample,
    standard_error,
    study_weights,
    weight_blocks,
    weighted_mean,
    weighted_median,
)
from medvlm_harness.metrics.classification import weighted_accuracy, weighted_balanced_accuracy
from medvlm_harness.metrics.ranking import weighted_auroc, weighted_average_precision

RNG = np.random.default_rng(7)
VALUES, CLASSES = np.array([0.3, np.nan, -1.0, 0.3, 2.0, 0.1, np.nan, 0.7]), np.array([0, 1, 1, 0, 2, 0, 1, 2])
SCORES, ANSWERS = np.array([0.1, 0.4, 0.4, 0.2, 0.9, 0.4, 0.8, 0.0]), np.array([0, 1, 0, 0, 2, 2, 1, 0])


def test_items_of_a_study_share_their_weight_and_each_row_draws_as_many_studies_as_there_are() -> None:
    ids = np.array(["a", "b", "a", "c", "b", "d"])
    weights = study_weights(ids, resamples=500, seed=3)
    assert weights.shape == (500, 6)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3, 5]].sum(axis=1) == 4).all()


def test_weights_do_not_depend_on_the_order_of_the_items() -> None:
    ids = np.array([f"CXR{i % 70}" for i in range(100)])
    order = RNG.permutation(100)
    assert (study_weights(ids[order], resamples=20) == study_weights(ids, resamples=20)[:, order]).all()


def test_weights_depend_on_the_set_of_studies_not_on_how_often_each_occurs() -> None:
    once, twice = np.arange(30), np.repeat(np.arange(30), 2)
    assert (study_weights(twice, resamples=20)[:, ::2] == study_weights(once, resamples=20)).all()
    assert (study_weights(once.astype(str), resamples=20) == study_weights(once, resamples=20)).all()


def test_more_resamples_and_smaller_blocks_leave_earlier_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(50)
    whole = study_weights(ids, resamples=40, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK_BYTES", 8 * 50 * 7)
    blocks = list(weight_blocks(ids, resamples=60, seed=1))
    assert [len(block) for block in blocks] == [7] * 8 + [4]
    assert (np.concatenate(blocks)[:40] == whole).all()


def test_blocks_of_many_items_stay_small() -> None:
    block = next(weight_blocks(np.arange(100_000), resamples=1000))
    assert block.size * 8 <= 64 * 2**20


def test_seeds_differ() -> None:
    assert (study_weights(np.arange(50), seed=0) != study_weights(np.arange(50), seed=1)).any()


def test_a_study_is_drawn_as_often_as_with_replacement() -> None:
    weights = study_weights(np.arange(20), resamples=5000)
    # Binomial(20, 1/20): mean 1, variance 0.95.
    assert weights.mean(axis=0) == pytest.approx(np.ones(20), abs=0.06)
    assert weights.var() == pytest.approx(0.95, rel=0.03)


def test_the_bootstrap_of_a_mean_has_the_standard_error_of_a_mean() -> None:
    x = RNG.normal(size=400)
    estimate = bootstrap_estimate(lambda w: weighted_mean(x, w), np.arange(400), floor=0.0)
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.stderr == pytest.approx(x.std(ddof=1) / 20, rel=0.07)
    assert estimate.ci95[0] == pytest.approx(x.mean() - 1.96 * x.std() / 20, abs=0.02)
    assert (estimate.n, estimate.floor, estimate.reason) == (400, 0.0, None)
    assert "1000 resamples" in estimate.method


def test_images_of_one_study_count_once() -> None:
    x = RNG.normal(size=200)
    single = bootstrap_estimate(lambda w: weighted_mean(x, w), np.arange(200))
    double = bootstrap_estimate(lambda w: weighted_mean(np.repeat(x, 2), w), np.repeat(np.arange(200), 2))
    assert double.ci95 == pytest.approx(single.ci95)


def test_the_same_weights_pair_the_differences() -> None:
    x = RNG.normal(size=200)
    ids = np.arange(200)
    difference = resample(lambda w: weighted_mean(x + 0.1, w), ids) - resample(lambda w: weighted_mean(x, w), ids)
    assert difference == pytest.approx(np.full(1000, 0.1))


@pytest.mark.parametrize(
    "metric",
    [
        lambda w: weighted_mean(VALUES, w),
        lambda w: weighted_median(VALUES, w),
        lambda w: weighted_accuracy(CLASSES, ANSWERS, w),
        lambda w: weighted_balanced_accuracy(CLASSES, ANSWERS, w),
        lambda w: weighted_auroc(CLASSES == 1, SCORES, w),
        lambda w: weighted_average_precision(CLASSES == 1, SCORES, w),
    ],
)
def test_every_metric_takes_a_block_of_resamples_as_it_takes_each_alone(
    metric: Callable[[bootstrap.Weights], bootstrap.Weights],
) -> None:
    weights = study_weights(np.arange(8), resamples=200)
    alone = np.concatenate([metric(row[None]) for row in weights])
    assert np.isnan(alone).sum() < 100
    assert metric(weights) == pytest.approx(alone, abs=1e-12, nan_ok=True)


def test_a_statistic_that_changes_its_weights_does_not_change_the_next_draw() -> None:
    before = study_weights(np.arange(10), resamples=20)
    next(weight_blocks(np.arange(10), resamples=20))[:] = 0
    assert (study_weights(np.arange(10), resamples=20) == before).all()


def test_undefined_resamples_are_counted_not_hidden() -> None:
    values = np.array([np.nan, np.nan, 1.0])
    estimate = bootstrap_estimate(lambda w: weighted_mean(values, w), np.arange(3), resamples=4000)
    assert estimate.value == 1.0
    assert estimate.extra["undefined_resamples"] == pytest.approx((2 / 3) ** 3, abs=0.03)
    assert estimate.reason is not None and "undefined on" in estimate.reason


def test_columns_at_once_are_the_estimates_of_each_alone() -> None:
    columns, ids = [VALUES, np.full(8, np.nan), SCORES], np.arange(8)
    extras = [{"unit": "mm"}, {}, {}]
    together = bootstrap_columns(
        lambda w: np.column_stack([weighted_mean(column, w) for column in columns]),
        ids,
        positives=[3, None, None],
        floors=[0.5, None, None],
        extras=extras,
    )
    for column, estimate, extra in zip(columns, together, extras, strict=True):
        alone = bootstrap_estimate(lambda w, v=column: weighted_mean(v, w), ids)
        assert estimate.value == pytest.approx(alone.value, nan_ok=True)
        assert estimate.ci95 == pytest.approx(alone.ci95, nan_ok=True)
        assert estimate.extra == {**extra, **alone.extra}
        assert estimate.reason == alone.reason
    assert (together[0].positives, together[0].floor, together[1].floor) == (3, 0.5, None)
    assert [one.reason for one in bootstrap_columns(lambda w: w, [], positives=[0, 0])] == ["no item"] * 2


def test_nothing_and_nothing_defined_are_undefined() -> None:
    assert bootstrap_estimate(lambda w: weighted_mean([], w), []).reason == "no item"
    assert np.isnan(bootstrap_estimate(lambda w: weighted_mean([np.nan], w), ["a"]).value)


def test_percentiles_and_error_of_the_defined_samples() -> None:
    samples = np.r_[np.arange(101.0), [np.nan] * 101]
    assert percentile_interval(samples, 0.9) == pytest.approx((5.0, 95.0, 0.5))
    assert standard_error(samples) == pytest.approx(np.std(np.arange(101), ddof=1))
    low, high, undefined = percentile_interval([np.nan, np.nan])
    assert np.isnan(low) and np.isnan(high) and undefined == 1.0
    assert np.isnan(standard_error([np.nan, 1.0]))


@given(
    st.lists(
        st.tuples(st.one_of(st.just(np.nan), st.integers(-5, 5).map(float)), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    )
)
def test_weighted_mean_and_median_are_those_of_the_repeated_values(items: list[tuple[float, int]]) -> None:
    values, weights = np.array([v for v, _ in items]), np.array([[w for _, w in items]])
    repeated = [v for v, count in Counter(dict(enumerate(weights[0].tolist()))).items() for _ in range(count)]
    known = [values[i] for i in repeated if not np.isnan(values[i])]
    mean, median = weighted_mean(values, weights)[0], weighted_median(values, weights)[0]
    if known:
        assert (mean, median) == (pytest.approx(np.mean(known)), pytest.approx(np.median(known)))
    else:
        assert np.isnan(mean) and np.isnan(median)


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="n > 0"):
        study_weights([])
    with pytest.raises(ValueError, match="None or NaN"):
        study_weights(np.array(["a", None]))
    with pytest.raises(ValueError, match="resamples >= 1"):
        weight_blocks(["a"], resamples=0)
    with pytest.raises(ValueError, match=r"level in \(0, 1\)"):
        percentile_interval([0.5], 95)
    with pytest.raises(ValueError, match="at least one"):
        percentile_interval([])
    with pytest.raises(ValueError, match=r"shape \(resamples, 2\)"):
        weighted_mean([0.1, 0.2], [1, 1])
    with pytest.raises(ValueError, match="at least 0"):
        weighted_median([0.1, 0.2], [[1, -1]])
