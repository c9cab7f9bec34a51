"""Whether a results file is what a run wrote: its shape, numbers that agree, and its manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.results.manifest import changes
from medvlm_harness.results.run_files import RunFiles, read_run

__all__ = ["Verdict", "not_finite", "validate"]

ROUNDING = 1e-9  # of an interval's ends against the value
# Counted over all studies at once, where scores.parquet has the value of each: a mean of those is another number.
POOLED = {"mesh_f1", "mesh_precision", "mesh_recall", "entity_f1", "entity_span_f1"}


@dataclass(frozen=True)
class Verdict:
    """What was found of one results file.

    Attributes:
        path: the file.
        problems: what is wrong, one line each; none for a file that is as a run of ours writes it.
        notes: what could not be checked, and why.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"path": str(self.path), "valid": self.valid, "problems": self.problems, "notes": self.notes}


def validate(path: Path) -> Verdict:
    """Check one results file against the schema, itself, its scores.parquet and its manifest; raises nothing."""
    verdict = Verdict(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        verdict.problems.append(f"it cannot be read: {first_line(error)}")
        return verdict
    from medvlm_harness.results.schema import shape_errors

    verdict.problems.extend(shape_errors(content, complete=True))
    if not verdict.problems:
        block = content.get("medvlm")
        strict = content if block and block["schema_version"] > 1 else block or {}
        for place, number in not_finite(strict):
            verdict.problems.append(f"{place} is {number}, which is no JSON: undefined numbers are null")
        if block is None:
            verdict.notes.append("no block `medvlm`: a run of lm-eval alone, of which only the shape is checked")
        else:
            verdict.problems.extend(_disagreeing(content))
            _compare_with_scores(path, verdict)
    _compare_with_manifest(path, content, verdict)
    return verdict


def _compare_with_manifest(path: Path, content: Any, verdict: Verdict) -> None:
    try:
        changed = changes(path, content)
    except UserError as error:
        verdict.problems.append(str(error))
        return
    if changed is None:
        verdict.notes.append("no manifest: whether it was changed after the run is not known")
    else:
        verdict.problems.extend(changed)


def not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every NaN and infinity in what JSON gave, with its place."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from not_finite(one, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from not_finite(one, f"{place}.{number}")


def _disagreeing(content: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that contradict each other."""
    for task, details in content["medvlm"]["tasks"].items():
        if details["scored"] > details["documents"]:
            yield f"{task}: {details['scored']} scored of {details['documents']} documents"
        row = content["results"].get(task)
        if row is None:
            yield f"{task}: lm-eval's table has no row of it"
        for name, estimate in details["metrics"].items():
            yield from (f"{task} {name}: {what}" for what in _implausible(estimate))
            if row is not None:
                yield from _unlike_table(f"{task} {name}", name, estimate, row)


def _implausible(estimate: Mapping[str, Any]) -> Iterator[str]:
    value, interval = estimate["value"], estimate["ci95"]
    if value is None and not estimate["reason"]:
        yield "it has neither a value nor a reason"
    if interval is not None and interval[0] > interval[1]:
        yield f"its interval ends before it begins: {interval}"
    elif interval is not None and value is not None:
        slack = ROUNDING * max(1.0, abs(value))
        if not interval[0] - slack <= value <= interval[1] + slack:
            yield f"its value {value} is outside of its interval {interval}"
    if estimate["stderr"] is not None and estimate["stderr"] < 0:
        yield f"its standard error {estimate['stderr']} is below 0"
    if estimate["positives"] is not None and estimate["positives"] < 0:  # of several labels, they may be more than n
        yield f"it has {estimate['positives']} positives"


def _unlike_table(what: str, name: str, estimate: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """Where lm-eval's table says another number than our block; before version 2 it has NaN for null."""
    metric, _, pipeline = name.partition(",")
    key = f"{metric},{pipeline or 'none'}"
    keys = [key] if pipeline else [one for one in row if one.partition(",")[0] == metric][:1]
    if not keys or keys[0] not in row:
        yield f"{what}: lm-eval's table lacks it"
        return
    shown = row[keys[0]]
    number = None if isinstance(shown, float) and math.isnan(shown) else shown
    if number != estimate["value"]:
        yield f"{what}: lm-eval's table has {shown}, the block `medvlm` {estimate['value']}"


def _compare_with_scores(path: Path, verdict: Verdict) -> None:
    """Metrics computed anew from scores.parquet, as comparisons do: what was edited consistently shows here."""
    try:
        run = read_run(path)
        if run.scores is None:
            verdict.notes.append("no scores.parquet: no value was computed anew")
            return
        verdict.problems.extend(_recomputed(run))
    except UserError as error:
        verdict.problems.append(first_line(error))


def _recomputed(run: RunFiles) -> Iterator[str]:
    from medvlm_harness.results.comparing.comparison import compare_runs

    compared = compare_runs({"run": run, "again": run}, reference="run", resamples=2)
    for task, found in compared["tasks"].items():
        if "probe" in run.tasks[task]:  # means over seeds, of which the file has the first
            continue
        for name, metric in found["metrics"].items():
            anew = metric["runs"]["run"]
            other_items = anew["n"] != run.tasks[task]["metrics"].get(name, anew)["n"]
            if anew["reported"] is not None and anew["value"] is not None and name not in POOLED and not other_items:
                yield f"{task} {name}: it says {anew['reported']}, but scores.parquet gives {anew['value']}"
