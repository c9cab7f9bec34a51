from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import study_weights
from medvlm_harness.results.paired_runs import paired_auroc
from medvlm_harness.results.scores import write_scores

LABELS = ("Edema", "Fracture", "Rare")
STUDIES = [f"s{k // 2:03d}" for k in range(160)]  # two images each
RNG = np.random.default_rng(3)
TRUTH = np.stack([RNG.random(160) < 0.3, RNG.random(160) < 0.2, np.arange(160) < 4], axis=1).astype(float)
TRUTH[5, 0] = np.nan
GOOD = np.nan_to_num(TRUTH) + RNG.standard_normal(TRUTH.shape)
POOR = 0.5 * np.nan_to_num(TRUTH) + RNG.standard_normal(TRUTH.shape)


def records(margin: np.ndarray, truth: np.ndarray = TRUTH) -> list[dict[str, Any]]:
    rows = []
    for k, study in enumerate(STUDIES):
        for j, label in enumerate(LABELS):
            target = None if np.isnan(truth[k, j]) else int(truth[k, j])
            values = {"target": target, "margin": margin[k, j], "probability": 0.5}
            rows.append({"task": "t", "study": study, "image": f"{k}.png", "split": "test", "label": label, **values})
    return rows


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        write_scores(tmp_path / name / "scores.parquet", rows)
        return tmp_path / name / "scores.parquet"

    return write


def macro(margin: np.ndarray, weights: np.ndarray) -> float:
    """By scikit-learn, over the two labels with ten positives."""
    areas = []
    for j in (0, 1):
        known = ~np.isnan(TRUTH[:, j]) & (weights > 0)
        areas.append(roc_auc_score(TRUTH[known, j], margin[known, j], sample_weight=weights[known]))
    return float(np.mean(areas))


def test_the_difference_is_of_the_same_resamples(written: Callable[..., Path]) -> None:
    one, other = written("a", records(GOOD)), written("b", records(POOR)[::-1])
    found = paired_auroc(one, other, task="t", resamples=60, seed=4)
    weights = study_weights(STUDIES, resamples=60, seed=4)  # they do not depend on the order of the items
    by_hand = [macro(GOOD, w) - macro(POOR, w) for w in weights]
    difference = found["auroc_first_minus_second"]
    assert difference.value == pytest.approx(macro(GOOD, np.ones(160)) - macro(POOR, np.ones(160)), abs=1e-12)
    assert difference.ci95 == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=1e-12)
    assert difference.extra["labels"] == ["Edema", "Fracture"]
    assert found["auroc_first"].value - found["auroc_second"].value == pytest.approx(difference.value)


def test_pairing_narrows_the_interval_of_runs_that_rise_and_fall_together(written: Callable[..., Path]) -> None:
    alike = GOOD + 0.1 * RNG.standard_normal(GOOD.shape)
    found = paired_auroc(written("a", records(GOOD)), written("b", records(alike)), task="t", resamples=200)
    apart = (found["auroc_first"].stderr ** 2 + found["auroc_second"].stderr ** 2) ** 0.5
    assert found["auroc_first_minus_second"].stderr < 0.3 * apart


def test_a_run_does_not_differ_from_itself(written: Callable[..., Path]) -> None:
    path = written("a", records(GOOD))
    difference = paired_auroc(path, path, task="t", resamples=20)["auroc_first_minus_second"]
    assert (difference.value, *difference.ci95) == (0, 0, 0)


def test_runs_that_cannot_be_paired_are_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    path, flipped = written("a", records(GOOD)), TRUTH.copy()
    flipped[0, 0] = 1 - flipped[0, 0]
    for rows, message in (
        (records(GOOD)[: 3 * 100], "same documents"),
        ([row for row in records(GOOD) if row["label"] != "Rare"], "same labels"),
        (records(GOOD, flipped), "same truth"),
        (records(GOOD)[1:], "lacks scores"),
        ([{**row, "task": "u"} for row in records(GOOD)], "no scores"),
    ):
        with pytest.raises(UserError, match=message):
            paired_auroc(path, written("b", rows), task="t")
    (tmp_path / "none.parquet").write_text("no")
    with pytest.raises(UserError, match=r"none\.parquet is none"):
        paired_auroc(path, tmp_path / "none.parquet", task="t")
