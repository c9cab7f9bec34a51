"""The multilabel part of the zero-shot task against a plain bootstrap: a loop over resamples and labels.

Ours is `multilabel` as the task calls it: values, macro AUROC and average precision with intervals of 1,000 resamples,
and the AUROC of each label with its own interval. The reference calls scikit-learn's `roc_auc_score` for each label on
the resampled images, the same ones, and nothing else; some resamples are timed and the time is scaled to 1,000. What
both compute on these resamples is compared, average precision too. Labels and scores are synthetic, of IU-CXR's size.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import common
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from medvlm_harness.metrics import bootstrap
from medvlm_harness.tracks import zero_shot_metrics

IMAGES = 3_794  # frontal images of IU-CXR
LABELS = 13
RESAMPLES = 1000
TIMED = 20
ROUNDS = 3
Array = NDArray[np.float64]


def measure(images: int | None = None) -> dict[str, object]:
    """Seconds of both sides and the largest difference; the ratio is ours / reference."""
    return common.child("bootstrap.py", str(IMAGES if images is None else images))


def run(n: int) -> dict[str, object]:
    """One process: the fastest call of ours, its draws included, then the reference."""
    rng = np.random.default_rng(0)
    truth = (rng.random((n, LABELS)) < np.geomspace(0.003, 0.2, LABELS)).astype(np.float64)
    score = rng.standard_normal((n, LABELS)) + truth
    truth[rng.random(truth.shape) < 0.02] = np.nan
    studies = [f"s{k % max(1, round(n * 0.96))}" for k in range(n)]  # about 1.04 images a study
    keys = [f"label_{j}" for j in range(LABELS)]

    def ours(others: dict[str, Array]) -> float:
        bootstrap._times_drawn.cache_clear()
        start = time.perf_counter()
        zero_shot_metrics.multilabel(
            truth, score, studies, keys=keys, subsets={"first": range(5)}, findings=range(LABELS - 1), others=others
        )
        return time.perf_counter() - start

    seconds = min(ours({}) for _ in range(ROUNDS))
    with_another_source = min(ours({"other": np.nan_to_num(truth)}) for _ in range(ROUNDS))
    samples = zero_shot_metrics.ranking_table(truth, score, studies, keys).samples
    weights = bootstrap.study_weights(studies, resamples=TIMED).astype(np.intp)
    auroc_seconds, auroc = _sklearn(roc_auc_score, truth, score, weights)
    ap_seconds, average_precision = _sklearn(average_precision_score, truth, score, weights)
    reference = auroc_seconds / TIMED * RESAMPLES
    return {
        "n": n,
        "labels": LABELS,
        "resamples": RESAMPLES,
        "threads": common.THREADS,
        "seconds": seconds,
        "seconds_with_another_label_source": with_another_source,
        "reference_seconds": reference,
        "reference": f"roc_auc_score alone; {TIMED} resamples timed, scaled to {RESAMPLES}",
        "average_precision_reference_seconds": ap_seconds / TIMED * RESAMPLES,
        "largest_difference": {
            "auroc": _largest_difference(samples[:TIMED, 0], auroc),
            "average_precision": _largest_difference(samples[:TIMED, 1], average_precision),
        },
        "ratio": seconds / reference,
    }


def _sklearn(
    metric: Callable[[Array, Array], float], truth: Array, score: Array, weights: NDArray[np.intp]
) -> tuple[float, Array]:
    """Seconds, and the value of each resample and label; NaN where a class was lost."""
    start = time.perf_counter()
    values = np.full((len(weights), truth.shape[1]), np.nan)
    for r, row in enumerate(weights):
        items = np.repeat(np.arange(len(row)), row)
        for j in range(truth.shape[1]):
            known = items[~np.isnan(truth[items, j])]
            if 0 < truth[known, j].sum() < len(known):
                values[r, j] = metric(truth[known, j], score[known, j])
    return time.perf_counter() - start, values


def _largest_difference(ours: Array, theirs: Array) -> float:
    """The largest absolute difference; NaN where only one side has a value."""
    both_undefined = np.isnan(ours) & np.isnan(theirs)
    return float(np.where(both_undefined, 0, np.abs(ours - theirs)).max())


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]))))
