from __future__ import annotations

import numpy as np
import pytest

from medvlm_harness.metrics.pareto import pareto_front


def beaten_by_hand(rows: list[list[float]], maximise: list[bool]) -> list[bool]:
    """Straight from the definition, pair by pair."""
    front = []
    for one in rows:
        beaten = any(np.isnan(one))
        for other in rows:
            as_good = [(b >= a) if up else (b <= a) for a, b, up in zip(one, other, maximise, strict=True)]
            better = [(b > a) if up else (b < a) for a, b, up in zip(one, other, maximise, strict=True)]
            beaten = beaten or (all(as_good) and any(better))
        front.append(not beaten)
    return front


@pytest.mark.parametrize("maximise", [[True, False], [False, False], [True, False, True]])
def test_equals_the_definition_with_ties_and_nan(maximise: list[bool]) -> None:
    rng = np.random.default_rng(5)
    for n in (1, 2, 7, 40):
        values = rng.integers(0, 6, (n, len(maximise))).astype(float)  # few levels: many ties
        values[rng.random(values.shape) < 0.05] = np.nan
        assert pareto_front(values, maximise=maximise).tolist() == beaten_by_hand(values.tolist(), maximise)


def test_equal_candidates_share_the_front() -> None:
    assert pareto_front([[1, 1], [1, 1], [0, 2]], maximise=[True, False]).tolist() == [True, True, False]


def test_what_is_unknown_beats_none() -> None:
    assert pareto_front([[0.9, np.nan], [0.5, 3.0]], maximise=[True, False]).tolist() == [False, True]


@pytest.mark.parametrize(("values", "maximise"), [([[1.0, 2.0]], [True]), ([1.0], [True]), ([[]], [])])
def test_shapes_that_do_not_fit_are_refused(values: list[float], maximise: list[bool]) -> None:
    with pytest.raises(ValueError, match="Expected values of shape"):
        pareto_front(values, maximise=maximise)
