import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from medvlm_harness.metrics.calibration import expected_calibration_error, noise_floor
from medvlm_harness.metrics.scaling import (
    MINIMUM_SUPPORT,
    Method,
    fit_scaling,
    fit_softmax_temperature,
    scaled,
    softmax_scaled,
)

RNG = np.random.default_rng(7)
Floats = NDArray[np.float64]


def drawn(n: int, labels: int = 1, *, slope: float = 3.0, offset: float = 0.0) -> tuple[Floats, Floats]:
    """Outcomes, and the log-odds of a model that has them times the slope plus the offset."""
    z = RNG.normal(-0.5, 1.5, (n, labels))
    return (RNG.random((n, labels)) < expit(z)).astype(float), slope * z + offset


def negative_log_likelihood(y: Floats, logit: Floats) -> float:
    """Independent: by probabilities."""
    p = expit(logit)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


@pytest.mark.parametrize("unit", [0.01, 1.0, 300.0])
def test_the_temperature_minimises_the_likelihood_in_any_unit(unit: float) -> None:
    y, z = drawn(400)
    found = fit_scaling(y, unit * z, keys=["a"], method="temperature")["a"]
    searched = minimize_scalar(lambda a: negative_log_likelihood(y, a * z), bounds=(0.01, 5), method="bounded")
    assert found.slope * unit == pytest.approx(searched.x, rel=1e-4)
    assert (found.fitted, found.offset, found.reason) == ("temperature", 0, None)
    assert (found.n, found.positives) == (400, int(y.sum()))


@pytest.mark.parametrize("unit", [0.01, 1.0, 300.0])
def test_platt_equals_a_logistic_regression_on_targets_drawn_in(unit: float) -> None:
    y, z = drawn(400, offset=4)
    found = fit_scaling(y, unit * z, keys=["a"], method="platt")["a"]
    positives = y.sum()
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (400 - positives + 2))[:, 0]
    # Each item once as a positive and once as a negative, weighted by its target.
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(np.tile(z, (2, 1)), np.repeat([1, 0], 400), sample_weight=np.concatenate([target, 1 - target]))
    assert found.slope * unit == pytest.approx(model.coef_[0, 0], rel=1e-4)
    assert found.offset == pytest.approx(model.intercept_[0], abs=1e-4)
    assert found.fitted == "platt"


@pytest.mark.parametrize(("method", "offset"), [("temperature", 0.0), ("platt", 5.0)])
def test_scaling_recovers_what_distorted_the_logits_and_leaves_the_order(method: Method, offset: float) -> None:
    y, z = drawn(4000, slope=3, offset=offset)
    validation, test = slice(0, 2000), slice(2000, 4000)
    fits = fit_scaling(y[validation], z[validation], keys=["a"], method=method)
    assert 1 / fits["a"].slope == pytest.approx(3, rel=0.15)
    p = scaled(z[test], list(fits.values()))[:, 0]
    floor = noise_floor(p)
    assert expected_calibration_error(y[test, 0], expit(z[test, 0])) > 3 * floor
    assert expected_calibration_error(y[test, 0], p) < 1.7 * floor
    assert (np.argsort(p) == np.argsort(z[test, 0])).all()


def test_a_label_with_few_positives_takes_the_temperature_of_all() -> None:
    y, z = drawn(300, 2)
    y[:, 1] = 0
    y[: MINIMUM_SUPPORT - 1, 1] = 1
    fits = fit_scaling(y, z, keys=["own", "few"], method="platt")
    pooled = fit_scaling(y.reshape(-1, 1), z.reshape(-1, 1), keys=["all"], method="temperature")["all"]
    assert fits["own"].fitted == "platt"
    assert (fits["few"].fitted, fits["few"].slope, fits["few"].offset) == ("shared temperature", pooled.slope, 0)
    assert fits["few"].reason == "validation has 19 positives and 281 negatives, fewer than 20 of one"
    y[MINIMUM_SUPPORT - 1, 1] = 1
    assert "fewer than" not in (fit_scaling(y, z, keys=["own", "enough"], method="platt")["enough"].reason or "")


def test_without_enough_of_all_labels_nothing_is_fitted_and_the_reason_is_given() -> None:
    y, z = drawn(300, 2)
    y[10:] = 0
    fits = fit_scaling(y, z, keys=["a", "b"], method="temperature")
    assert fits["a"].fitted is None and "no temperature shared by all labels either" in (fits["a"].reason or "")
    assert np.isnan(scaled(z, list(fits.values()))).all()


def test_separable_classes_have_no_temperature_but_a_platt_fit() -> None:
    z = np.concatenate([RNG.uniform(-3, -1, 50), RNG.uniform(1, 3, 50)])[:, None]
    y = (z > 0).astype(float)
    fit = fit_scaling(y, z, keys=["a"], method="temperature")["a"]
    assert fit.fitted is None and "0 separates the validation logits" in (fit.reason or "")
    fit = fit_scaling(y, z, keys=["a"], method="platt")["a"]
    assert fit.fitted == "platt" and np.isfinite([fit.slope, fit.offset]).all()
    p = scaled(z, [fit])
    assert 0.9 < p[y == 1].mean() < 1 and 0 < p[y == 0].mean() < 0.1


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_constant_and_reversed_logits_have_no_fit(method: Method) -> None:
    y, z = drawn(300)
    constant = fit_scaling(y, np.full_like(z, 2.5), keys=["a"], method=method)["a"]
    assert constant.fitted is None and "all validation logits are 2.5" in (constant.reason or "")
    backwards = fit_scaling(y, -z, keys=["a"], method=method)["a"]
    assert backwards.fitted is None and "slope would not be above 0" in (backwards.reason or "")


def test_a_degenerate_label_takes_the_temperature_of_all() -> None:
    y, z = drawn(300, 2)
    z[:, 1] = 0.0
    fits = fit_scaling(y, z, keys=["own", "constant"], method="platt")
    assert fits["constant"].fitted == "shared temperature"
    assert fits["constant"].reason == "all validation logits are 0"


def test_unlabelled_items_are_not_looked_at() -> None:
    y, z = drawn(300)
    more_y, more_z = np.concatenate([y, np.full((50, 1), np.nan)]), np.concatenate([z, np.full((50, 1), np.nan)])
    assert fit_scaling(more_y, more_z, keys=["a"], method="platt") == fit_scaling(y, z, keys=["a"], method="platt")


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="finite logits"):
        fit_scaling([[0.0], [1.0]], [[np.inf], [0.0]], keys=["a"], method="platt")
    with pytest.raises(ValueError, match="shape"):
        fit_scaling([[0.0], [1.0]], [[0.0, 1.0], [0.0, 1.0]], keys=["a"], method="platt")
    with pytest.raises(ValueError, match="only 0, 1 and NaN"):
        fit_scaling([[0.0], [2.0]], [[0.0], [1.0]], keys=["a"], method="platt")
    with pytest.raises(ValueError, match=r"shape \(n, 0\)"):
        scaled(np.zeros((3, 1)), [])


# --- exclusive options


def options(n: int, *, slope: float) -> tuple[Floats, Floats, Floats]:
    """One-hot outcomes, their probabilities, and those of a model that overstates the log-odds."""
    z = RNG.normal(size=(n, 3))
    p, overstated = (np.exp(k * z) / np.exp(k * z).sum(axis=1, keepdims=True) for k in (1, slope))
    return np.array([RNG.multinomial(1, one) for one in p], dtype=float), p, overstated


def test_one_temperature_of_options_minimises_the_likelihood_and_mends_what_is_overstated() -> None:
    y, p, overstated = options(3000, slope=3)
    found = fit_softmax_temperature(y, overstated)

    def loss(slope: float) -> float:
        q = overstated**slope
        return float(-np.mean(np.log((q * y).sum(axis=1) / q.sum(axis=1))))

    searched = minimize_scalar(loss, bounds=(0.01, 5), method="bounded")
    assert found.slope == pytest.approx(searched.x, rel=1e-4)
    assert found.slope == pytest.approx(1 / 3, rel=0.15)
    after = softmax_scaled(overstated, found)
    assert after.sum(axis=1) == pytest.approx(1)
    assert np.abs(after - p).mean() < np.abs(overstated - p).mean() / 5
    assert (found.n, found.positives) == (3000, int(y[np.arange(3000), p.argmax(axis=1)].sum()))


def test_two_options_have_the_temperature_of_one_label() -> None:
    y, z = drawn(500)
    p = expit(z)
    both = fit_softmax_temperature(np.hstack([y, 1 - y]), np.hstack([p, 1 - p]))
    assert both.slope == pytest.approx(fit_scaling(y, z, keys=["a"], method="temperature")["a"].slope, rel=1e-4)


def test_a_temperature_that_cannot_be_found_says_why() -> None:
    y, p, _ = options(200, slope=1)
    few = y[:, [1, 0, 2]] * 0 + [1, 0, 0]
    cases = {
        "not 20 items of each of two options": (few, p),
        "all validation answers are right": (y, 0.9 * y + 0.05),
        "equally probable": (y, np.full_like(p, 1 / 3)),
        "not more often right": (y, (1.2 - y) / (1.2 - y).sum(axis=1, keepdims=True)),
    }
    for reason, (truth, probability) in cases.items():
        found = fit_softmax_temperature(truth, probability)
        assert found.fitted is None and reason in str(found.reason)
        assert np.isnan(softmax_scaled(probability, found)).all()
    with pytest.raises(ValueError, match="two or more"):
        fit_softmax_temperature(y[:, :1], p[:, :1])
