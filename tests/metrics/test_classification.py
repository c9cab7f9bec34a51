import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from medvlm_harness.metrics.classification import (
    accuracy,
    balanced_accuracy,
    weighted_accuracy,
    weighted_balanced_accuracy,
)

RNG = np.random.default_rng(7)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("kinds", [["AP", "PA", "lateral"], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("n", [3, 50, 590])
def test_equals_scikit_learn(kinds: list[str] | list[int], n: int) -> None:
    # One class is predicted but never true, so it has no recall.
    y, p = RNG.choice(kinds[:-1], n), RNG.choice(kinds, n)
    weights = RNG.poisson(1, size=(30, n))
    weights[weights.sum(axis=1) == 0] = 1
    assert accuracy(y, p) == pytest.approx(accuracy_score(y, p), abs=1e-12)
    assert balanced_accuracy(y, p) == pytest.approx(balanced_accuracy_score(y, p), abs=1e-12)
    plain = [accuracy_score(y, p, sample_weight=w) for w in weights]
    assert weighted_accuracy(y, p, weights) == pytest.approx(np.array(plain), abs=1e-12)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_a_class_without_weight_leaves_the_mean() -> None:
    y, p = RNG.choice(3, 12), RNG.choice(3, 12)
    weights = RNG.poisson(0.5, size=(200, 12))
    expected = [balanced_accuracy_score(np.repeat(y, w), np.repeat(p, w)) if w.any() else np.nan for w in weights]
    assert weighted_balanced_accuracy(y, p, weights) == pytest.approx(np.array(expected), abs=1e-12, nan_ok=True)


def test_hand_computed() -> None:
    y, p = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    assert accuracy(y, p) == 0.5
    assert balanced_accuracy(y, p) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_constant_answer_scores_one_over_classes(classes: int) -> None:
    y = RNG.permutation(np.repeat(np.arange(classes), np.arange(1, classes + 1)))
    assert balanced_accuracy(y, np.zeros_like(y)) == pytest.approx(1 / classes)


def test_nothing_is_undefined_not_zero() -> None:
    assert np.isnan(accuracy([], []))
    assert np.isnan(balanced_accuracy([], []))
    assert np.isnan(weighted_accuracy([1], [1], [[0]])[0])


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([0, 1], [0], "one shape"),
        ([0, 1], ["0", "1"], "one kind"),
        (["PA", None], ["PA", "AP"], "one kind"),
        ([0.0, np.nan], [0.0, 1.0], "but got NaN"),
    ],
)
def test_wrong_input_says_what_was_expected(y: list[object], p: list[object], message: str) -> None:
    for metric in (accuracy, balanced_accuracy):
        with pytest.raises(ValueError, match=message):
            metric(y, p)  # type: ignore[arg-type]


def test_wrong_weights_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"shape \(resamples, 2\)"):
        weighted_accuracy([0, 1], [0, 1], [[1]])
