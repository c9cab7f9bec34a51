"""Whether one run is better or worse than another: tests, effects, what could have been found, and who disagrees.

Each task has one primary metric, declared beforehand (`results/primary.py`), which is judged by the 95% interval of its
paired difference. All other metrics are looked at as well, with p adjusted by Holm over all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medvlm_harness.data.chexpert import label_key
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.bootstrap import Z_975
from medvlm_harness.metrics.delong import compare_aurocs
from medvlm_harness.metrics.estimate import plain
from medvlm_harness.metrics.ranking import auroc
from medvlm_harness.metrics.significance import (
    Verdict,
    detectable_difference,
    direction,
    holm,
    interval_p,
    mcnemar,
    non_inferiority,
)
from medvlm_harness.model_backends.image_preparation import find_preparation
from medvlm_harness.results.comparing.comparison import comparable_tables, compare_runs
from medvlm_harness.results.comparing.disagreements import disagreements
from medvlm_harness.results.primary import primary_metric
from medvlm_harness.results.run_files import RunFiles
from medvlm_harness.results.score_table import ScoreTable
from medvlm_harness.tracks.zero_shot_metrics import enough_support

__all__ = ["ACROSS", "SCHEMA_VERSION", "assess", "tasks_by_reason"]

SCHEMA_VERSION = 1
REFERENCE, RUN = "A", "B"
PREPROCESSING = "preprocessing"
_SIZE = re.compile(r"(?<!patch_)(?:size|height|width|edge)\W*?(\d+)")
ACROSS = (PREPROCESSING, "perturbation")
"""What may be allowed to differ between runs: the resolution of the pictures, and what perturbs the inputs."""
RIGHT_OR_WRONG = ("acc", "acc_norm")
NO_VARIANCE = "the sample shows no variance"


def assess(
    reference: RunFiles,
    run: RunFiles,
    *,
    metrics: Sequence[str] = (),
    margin: float | None = None,
    across: Collection[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every task that both runs have, as plain JSON; see `results/README.md`.

    Args:
        reference: what the other is compared with.
        run: the other.
        metrics: `task:metric`, what is tested, the primary ones among them as such; all if empty.
        margin: of a primary metric, the loss that does not matter; None to ask for any difference.
        across: of `ACROSS`, what may differ all the same.
        resamples: number of resamples.
        seed: that of the tasks' own intervals is 0.

    Raises:
        UserError: if the runs have no task in common that can be compared, saying why not of each; or for a metric
            that no task has.
    """
    runs = {REFERENCE: reference, RUN: run}
    _refuse_other_resolution(runs, across)
    block = compare_runs(
        runs, reference=REFERENCE, across=set(across) - {PREPROCESSING}, resamples=resamples, seed=seed
    )
    refused = {task: found["refused"][RUN] for task, found in block["tasks"].items() if RUN in found["refused"]}
    compared = {task: found for task, found in block["tasks"].items() if found["metrics"]}
    if not compared:
        reasons = "; ".join(f"{', '.join(tasks)}: {why}" for why, tasks in tasks_by_reason(refused).items())
        raise UserError(f"These runs cannot be compared. {reasons or 'The reference has no task of ours.'}")
    tests, differing = [], {}
    for task, found in compared.items():
        pair, _ = comparable_tables(task, runs, (REFERENCE, RUN), across=across)
        tables = pair[REFERENCE], pair[RUN]
        primary = primary_metric(found) or found["primary"][0]
        tests += [{"task": task, **row} for row in _tests(found, primary, tables, margin)]
        details = reference.tasks[task], run.tasks[task]
        differing[task] = disagreements(found["kind"], primary, tables, details)
    if metrics:
        _refuse_unknown(metrics, tests, refused)
        tests = [row for row in tests if _name(row) in metrics]
        differing = {row["task"]: differing[row["task"]] for row in tests}
    _adjust(tests)
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": {name: {**block["runs"][name], "path": str(files.path)} for name, files in runs.items()},
        "differs": block["differs"],
        "resamples": resamples,
        "seed": seed,
        "margin": margin,
        "tests": plain(tests),
        "disagreements": plain(differing),
        "refused": refused,
    }


def _refuse_other_resolution(runs: Mapping[str, RunFiles], across: Collection[str]) -> None:
    if PREPROCESSING in across:
        return
    asked = {name: run.medvlm["model"].get("preprocessing") for name, run in runs.items()}
    shown = {name: find_preparation(one).pixels for name, one in asked.items()}
    if shown[REFERENCE] != shown[RUN]:
        what = " and ".join(f"preprocessing={one}" for one in asked.values())
    else:
        own = {name: _own_resolution(run) for name, run in runs.items()}
        if not all(own.values()) or own[REFERENCE] == own[RUN]:
            return
        what = " and ".join(f"{'x'.join(map(str, sorted(one)))} pixels" for one in own.values())
    raise UserError(
        f"These runs were shown pictures of different resolution: {what}. If that is part of what you compare, say "
        f"--across {PREPROCESSING}."
    )


def _own_resolution(run: RunFiles) -> set[int]:
    """The sizes that the model's own transform names, as its library prints it; empty where it names none."""
    card = run.medvlm["model"].get("card")
    transform = card.get("preprocessing") if isinstance(card, Mapping) else None
    return set(map(int, _SIZE.findall(str(transform or ""))))


def _tests(
    found: Mapping[str, Any], primary: str, tables: tuple[ScoreTable, ScoreTable], margin: float | None
) -> Iterator[dict[str, Any]]:
    for metric, its in found["metrics"].items():
        difference = its["differences"][RUN]
        stderr = math.nan if difference["stderr"] is None else difference["stderr"]
        value = math.nan if difference["value"] is None else difference["value"]
        low, high = difference["ci95"] or (math.nan, math.nan)
        test, p = "bootstrap", interval_p(low, high)
        exact = _mcnemar(found["kind"], metric, tables)
        if exact is not None:
            test, p = "McNemar", exact
        is_primary, lower = metric == primary, its["lower_is_better"]
        yield {
            "metric": metric,
            "primary": is_primary,
            "lower_is_better": lower,
            "reference": its["runs"][REFERENCE]["value"],
            "run": its["runs"][RUN]["value"],
            "reported": {name: its["runs"][name]["reported"] for name in (REFERENCE, RUN)},
            "difference": value,
            "ci95": [low, high],
            "stderr": stderr,
            "test": test,
            "p": p,
            "detectable": detectable_difference(stderr),
            "verdict": _verdict(value, p, (low, high), margin if is_primary else None, lower),
            "reason": difference["reason"] or (NO_VARIANCE if value == value and p != p else None),
        }
    if found["kind"] == "labels":
        yield from _labels(*tables)


def _verdict(value: float, p: float, ci95: tuple[float, float], margin: float | None, lower: bool) -> Verdict:
    if margin is None or math.isnan(p):  # an interval without variance would claim certainty
        return direction(value, p, lower_is_better=lower)
    return non_inferiority(*ci95, margin, lower_is_better=lower)


def _mcnemar(kind: str, metric: str, tables: tuple[ScoreTable, ScoreTable]) -> float | None:
    """Of a share of right answers, the p of McNemar's test; None of other metrics, and where ties are half right."""
    if kind == "options" and metric == "accuracy":
        truth = tables[0].target.argmax(axis=1)
        first, other = (table.probability.argmax(axis=1) == truth for table in tables)
        return mcnemar(first, other, clusters=tables[0].studies)
    if kind == "values" and metric in RIGHT_OR_WRONG:
        values = np.stack([table.select([metric]).value[:, 0] for table in tables])
        known = ~np.isnan(values).any(axis=0)
        if np.isin(values[:, known], (0, 1)).all():
            return mcnemar(*(values[:, known] == 1), clusters=np.asarray(tables[0].studies)[known])
    return None


def _labels(first: ScoreTable, other: ScoreTable) -> Iterator[dict[str, Any]]:
    """DeLong's test of each label that has enough positives and negatives."""
    studies = np.asarray(first.studies)
    for j in np.flatnonzero(enough_support(first.target)).tolist():
        known = ~np.isnan(first.target[:, j] + first.margin[:, j] + other.margin[:, j])
        truth, scores = first.target[known, j], (other.margin[known, j], first.margin[known, j])
        if len(np.unique(truth)) < 2:
            continue
        difference, stderr, p = compare_aurocs(truth, *scores, clusters=studies[known])
        both = [auroc(truth, one) for one in scores]
        low, high = difference - Z_975 * stderr, difference + Z_975 * stderr
        yield {
            "metric": f"auroc_{label_key(first.labels[j])}",
            "primary": False,
            "lower_is_better": False,
            "reference": both[1],
            "run": both[0],
            "difference": difference,
            "ci95": [low, high],
            "stderr": stderr,
            "test": "DeLong",
            "p": p,
            "detectable": detectable_difference(stderr),
            "verdict": direction(difference, p),
            "reason": None if p == p else NO_VARIANCE,
        }


def _adjust(tests: list[dict[str, Any]]) -> None:
    """Holm over all that are not primary, which are judged by what is left of them."""
    others = [row for row in tests if not row["primary"]]
    for row, adjusted in zip(others, holm([row["p"] for row in others]).tolist(), strict=True):
        row["p_adjusted"] = adjusted
        row["verdict"] = direction(row["difference"], adjusted, lower_is_better=row["lower_is_better"])
    for row in tests:
        row.setdefault("p_adjusted", None)


def tasks_by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Why tasks were not compared, each reason once."""
    found: dict[str, list[str]] = {}
    for task, why in refused.items():
        found.setdefault(why, []).append(task)
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['task']}:{row['metric']}"


def _refuse_unknown(metrics: Sequence[str], tests: Sequence[Mapping[str, Any]], refused: Mapping[str, str]) -> None:
    known = set(map(_name, tests))
    for one in metrics:
        if (why := refused.get(one.partition(":")[0])) is not None:
            raise UserError(f"{one} cannot be compared: {why}")
        if one not in known:
            raise UserError(f"No task that is compared has {one!r}; expected task:metric.{near_matches(one, known)}")
