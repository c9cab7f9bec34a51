import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from medvlm_harness.metrics.bootstrap import percentile_interval, study_weights
from medvlm_harness.metrics.frequency_groups import (
    frequency_group,
    frequency_group_estimates,
    frequency_group_names,
)

RNG = np.random.default_rng(7)
COUNTS = {"opacity": 400, "effusion": 200, "edema": 60, "nodule": 21, "hernia": 15, "pneumothorax": 12, "fibrosis": 9}
N = 2000


def drawn() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y = np.zeros((N, len(COUNTS)))
    for j, count in enumerate(COUNTS.values()):
        y[RNG.choice(N, count, replace=False), j] = 1
    return y, RNG.normal(y)


@pytest.mark.parametrize(
    ("frequency", "group"),
    [(1.0, "head"), (0.1, "head"), (0.0999, "medium"), (0.01, "medium"), (0.0099, "tail"), (0.0, "tail")],
)
def test_bounds_belong_to_the_more_frequent_group(frequency: float, group: str) -> None:
    assert frequency_group(frequency) == group


def test_means_equal_scikit_learns_over_the_labels_of_each_group() -> None:
    y, s = drawn()
    thresholds = np.array([0.5, 0.5, 0.3, 0.3, 0.2, np.nan, 0.1])
    found = frequency_group_estimates(y, s, np.arange(N), keys=list(COUNTS), thresholds=thresholds, resamples=20)
    assert tuple(found) == frequency_group_names()
    members = {"head": [0, 1], "medium": [2, 3], "tail": [4, 5]}
    for group, labels in members.items():
        assert found[f"auroc_{group}"].value == pytest.approx(
            np.mean([roc_auc_score(y[:, j], s[:, j]) for j in labels])
        )
        precision = [average_precision_score(y[:, j], s[:, j]) for j in labels]
        assert found[f"average_precision_{group}"].value == pytest.approx(np.mean(precision))
        assert found[f"average_precision_{group}"].floor == pytest.approx(y[:, labels].mean())
        cut = [j for j in labels if not np.isnan(thresholds[j])]
        recalls = [recall_score(y[:, j], s[:, j] >= thresholds[j]) for j in cut]
        assert found[f"sensitivity_{group}"].value == pytest.approx(np.mean(recalls))
    assert found["sensitivity_tail"].extra["labels"] == ["hernia"]


def test_nothing_under_ten_positives_is_in_a_mean_and_what_is_left_out_is_named() -> None:
    y, s = drawn()
    found = frequency_group_estimates(y, s, np.arange(N), keys=list(COUNTS), resamples=20)
    assert found["auroc_tail"].extra["labels"] == ["hernia", "pneumothorax"]
    assert found["auroc_tail"].extra["left_out_positives"] == {"fibrosis": 9}
    worse = s.copy()
    worse[:, -1] = -worse[:, -1]
    again = frequency_group_estimates(y, worse, np.arange(N), keys=list(COUNTS), resamples=20)
    assert again["auroc_tail"] == found["auroc_tail"]


def test_intervals_are_those_of_resampled_studies() -> None:
    y, s = drawn()
    studies = np.arange(N) // 2
    found = frequency_group_estimates(y, s, studies, keys=list(COUNTS), resamples=10)
    by_hand = [
        np.mean([roc_auc_score(y[:, j], s[:, j], sample_weight=w) for j in (4, 5)])
        for w in study_weights(studies, resamples=10)
    ]
    assert found["auroc_tail"].ci95 == pytest.approx(percentile_interval(by_hand)[:2])


def test_without_thresholds_there_is_no_sensitivity_and_without_labels_no_mean() -> None:
    y, s = drawn()
    found = frequency_group_estimates(y[:, :2], s[:, :2], np.arange(N), keys=["a", "b"], resamples=10)
    assert np.isnan(found["sensitivity_head"].value)
    assert np.isnan(found["auroc_tail"].value) and "no label" in (found["auroc_tail"].reason or "")


def test_a_frequency_given_decides_the_group() -> None:
    y, s = drawn()
    found = frequency_group_estimates(
        y[:, :2], s[:, :2], np.arange(N), keys=["a", "b"], frequency=[0.005, 0.5], resamples=10
    )
    assert found["auroc_tail"].extra["labels"] == ["a"] and found["auroc_head"].extra["labels"] == ["b"]


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"a frequency in \[0, 1\]"):
        frequency_group(1.5)
    with pytest.raises(ValueError, match="tail <= head"):
        frequency_group(0.5, head=0.01, tail=0.1)
    with pytest.raises(ValueError, match="a frequency for each of 1 labels, but got 2"):
        frequency_group_estimates([[0.0], [1.0]], [[0.0], [1.0]], [0, 1], keys=["a"], frequency=[0.1, 0.2])
