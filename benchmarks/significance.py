"""Do the verdicts of `medvlm compare` keep their promises? Simulated pairs of runs, half of them equally good.

    python benchmarks/significance.py --pairs 2000      # about 10 minutes on one core

Labels: 590 studies with 13 labels, as rare as IU-CXR's; both runs see a part of the truth, share a part of their noise,
and have noise of their own. Choice: 590 studies, right or wrong. Of equally good runs the share that is called better
or worse should be 5%; of runs apart by the mean detectable difference, the share that is called worse 80%.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics.bootstrap import percentile_interval, resample, standard_error
from medvlm_harness.metrics.delong import compare_aurocs
from medvlm_harness.metrics.significance import LEVEL, detectable_difference, interval_p, mcnemar
from medvlm_harness.results.comparing.paired_scores import pair_scores
from medvlm_harness.results.score_table import ScoreTable
from medvlm_harness.tracks.zero_shot_metrics import enough_support, macro_auroc

Floats = NDArray[np.float64]
Pair = tuple[ScoreTable, ScoreTable]
STUDIES = 590
PREVALENCE = (0.35, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.05, 0.04, 0.03, 0.03, 0.02, 0.02)
SIGNAL = 0.9  # AUROC of about 0.74
SHARED = 0.7  # of the noise's variance


def table(truth: Floats, *, margin: Floats | None = None, value: Floats | None = None) -> ScoreTable:
    """The answers of one run: margins of labels, or one value per study."""
    nothing = np.full(truth.shape, np.nan)
    labels = [f"l{j}" for j in range(truth.shape[1])] if value is None else ["acc"]
    return ScoreTable(
        documents=[(f"{k:04}", "") for k in range(len(truth))],
        labels=labels,
        target=truth if value is None else nothing,
        margin=nothing if margin is None else margin,
        probability=nothing if margin is None else 1 / (1 + np.exp(-margin)),
        rank=nothing,
        tied=nothing,
        value=nothing if value is None else value,
        answer=np.full(truth.shape, None, dtype=np.object_),
    )


def labelled(rng: np.random.Generator, weaker: float = 0.0) -> Pair:
    """Two runs that score labels, the second with less of the truth in its scores."""
    truth = (rng.random((STUDIES, len(PREVALENCE))) < PREVALENCE).astype(np.float64)
    shared = np.sqrt(SHARED) * rng.normal(size=truth.shape)
    own = [np.sqrt(1 - SHARED) * rng.normal(size=truth.shape) for _ in range(2)]
    first, second = (
        signal * truth + shared + noise for signal, noise in zip((SIGNAL, SIGNAL - weaker), own, strict=True)
    )
    return table(truth, margin=first), table(truth, margin=second)


def choices(rng: np.random.Generator, weaker: float = 0.0) -> Pair:
    """Two runs that are right or wrong on each study, mostly the same ones."""
    hardness = rng.normal(size=(STUDIES, 1))
    first, second = (
        (hardness + 0.5 * rng.normal(size=hardness.shape) < 0.5 - less).astype(np.float64) for less in (0, weaker)
    )
    return table(hardness, value=first), table(hardness, value=second)


def tested(pair: Pair, metric: str, resamples: int, seed: int) -> tuple[float, float, float]:
    """The second run less the first, its standard error, and the p that `medvlm compare` gives the primary metric."""
    if metric == "acc":
        details = {name: {"metrics": {metric: {}}} for name in "AB"}
        found = pair_scores(dict(zip("AB", pair, strict=True)), details, reference="A", resamples=resamples, seed=seed)
        estimate = found.differences[metric]["B"]
        return estimate.value, estimate.stderr, mcnemar(*(one.value[:, 0] == 1 for one in pair))
    # What `pair_scores` does of this metric; it would compute calibration and agreement too.
    first, _ = pair
    used = np.flatnonzero(enough_support(first.target)).tolist()
    areas = [macro_auroc(first.target, one.margin, [used]) for one in pair]
    samples = resample(
        lambda weights: areas[1](weights) - areas[0](weights), first.studies, resamples=resamples, seed=seed
    )[:, 0]
    value = float((areas[1](np.ones((1, STUDIES))) - areas[0](np.ones((1, STUDIES))))[0, 0])
    return value, standard_error(samples), interval_p(*percentile_interval(samples)[:2])


def one_label(rng: np.random.Generator, prevalence: float) -> float:
    """The p of DeLong's test of two equally good scores of one label."""
    truth = (rng.random(STUDIES) < prevalence).astype(np.float64)
    shared = SIGNAL * truth + np.sqrt(SHARED) * rng.normal(size=STUDIES)
    first, second = (shared + np.sqrt(1 - SHARED) * rng.normal(size=STUDIES) for _ in range(2))
    return compare_aurocs(truth, first, second).p


def weaker_by(metric: str, make: Callable[..., Pair], wanted: float, rng: np.random.Generator) -> float:
    """How much weaker the second run must be so that its true difference is `wanted`, by bisection on large samples."""
    low, high = 0.0, 1.0
    repeats = 500 if metric == "acc" else 100
    for _ in range(12):
        middle = (low + high) / 2
        lost = np.mean([_true_difference(make(rng, middle), metric) for _ in range(repeats)])
        low, high = (middle, high) if lost < wanted else (low, middle)
    return (low + high) / 2


def _true_difference(pair: Pair, metric: str) -> float:
    first, second = pair
    if metric == "acc":
        return float((first.value - second.value).mean())
    lost = [
        compare_aurocs(first.target[:, j], first.margin[:, j], second.margin[:, j]).difference
        for j in range(len(first.labels))
        if first.target[:, j].sum() >= 10
    ]
    return float(np.mean(lost))


MAKES: dict[str, Callable[..., Pair]] = {"auroc": labelled, "acc": choices}


def main() -> None:
    """Simulate, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--metric", choices=tuple(MAKES), help="one of them; both if not given")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for metric in [asked.metric] if asked.metric else MAKES:
        make, rng = MAKES[metric], np.random.default_rng(asked.seed)
        equal = [make(rng) for _ in range(asked.pairs)]
        found = [
            tested(pair, metric, asked.resamples, seed) for seed, pair in enumerate(equal, asked.seed * asked.pairs)
        ]
        false = np.mean([p < LEVEL for *_, p in found])
        detectable = float(np.mean([detectable_difference(stderr) for _, stderr, _ in found]))
        less = weaker_by(metric, make, detectable, rng)
        apart = [make(rng, less) for _ in range(asked.pairs)]
        worse = [
            tested(pair, metric, asked.resamples, seed) for seed, pair in enumerate(apart, asked.seed * asked.pairs)
        ]
        power = np.mean([value < 0 and p < LEVEL for value, _, p in worse])
        true = -np.mean([value for value, *_ in worse])
        print(f"{metric}: false positives {false:.4f}; detectable {detectable:.4f}; apart by {true:.4f}, {power:.4f}")
    for prevalence in (0.15, 0.05):
        p = [one_label(rng, prevalence) for _ in range(3 * asked.pairs)]
        print(f"DeLong, one label, prevalence {prevalence}: false positives {np.mean(np.array(p) < LEVEL):.4f}")


if __name__ == "__main__":
    main()
