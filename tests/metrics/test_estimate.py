import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from medvlm_harness.metrics.estimate import Estimate


def test_a_full_estimate_is_plain_json() -> None:
    estimate = Estimate(
        np.float64(0.8),
        0.05,
        (0.7, 0.9),
        n=int(np.int64(590)),
        positives=18,
        floor=0.5,
        method="DeLong",
        extra={"share": np.float32(0.5), "bins": np.array([1.0, np.nan]), "nested": {"k": (np.int64(1), True)}},
    )
    plain = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
    assert plain == {
        "value": 0.8,
        "stderr": 0.05,
        "ci95": [0.7, 0.9],
        "n": 590,
        "positives": 18,
        "floor": 0.5,
        "ceiling": None,
        "method": "DeLong",
        "reason": None,
        "extra": {"share": 0.5, "bins": [1.0, None], "nested": {"k": [1, True]}},
    }


def test_undefined_is_nan_with_a_reason_and_null_in_json() -> None:
    estimate = Estimate.undefined("no positive item", n=590, positives=0)
    assert math.isnan(estimate.value) and math.isnan(estimate.stderr) and all(map(math.isnan, estimate.ci95))
    plain = estimate.to_dict()
    assert (plain["value"], plain["stderr"], plain["ci95"]) == (None, None, None)
    assert (plain["reason"], plain["n"], plain["positives"]) == ("no positive item", 590, 0)


def test_half_an_interval_is_none() -> None:
    assert Estimate(0.5, 0.1, (0.4, math.nan), n=3).to_dict()["ci95"] is None


def test_it_cannot_be_changed_afterwards() -> None:
    with pytest.raises(FrozenInstanceError):
        Estimate(0.5, 0.1, (0.4, 0.6), n=3).value = 1.0  # type: ignore[misc]


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected a number, a string"):
        Estimate(0.5, 0.1, (0.4, 0.6), n=3, extra={"labels": {1, 2}}).to_dict()


def test_it_comes_back_from_json() -> None:
    whole = Estimate(0.5, 0.1, (0.4, 0.6), n=3, positives=2, floor=0.1, method="bootstrap", extra={"labels": ["a"]})
    assert Estimate.from_dict(whole.to_dict()) == whole
    undefined = Estimate.undefined("no positive item", n=590, positives=0)
    assert Estimate.from_dict(undefined.to_dict()).to_dict() == undefined.to_dict()
