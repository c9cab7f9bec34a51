"""Why a run should not be published: what `medvlm push` refuses, or marks on the card where it is forced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medvlm_harness.errors import UserError
from medvlm_harness.results.primary import primary_metric
from medvlm_harness.results.run_cost import EFFICIENCY
from medvlm_harness.results.run_files import RunFiles
from medvlm_harness.results.validation import not_finite, validate

__all__ = ["headlines", "objections", "refuse_broken"]


def refuse_broken(run: RunFiles) -> None:
    """Refuse what no force can publish.

    Raises:
        UserError: if a number is NaN or infinite where JSON has null, or nothing was measured.
    """
    for place, _ in not_finite(run.medvlm, "medvlm"):  # older versions left NaN in lm-eval's own table
        raise UserError(
            f"{run.path.name}: {place} is not a finite number. A run writes null with a reason where a value is "
            "undefined, so this file was changed or is damaged: run the evaluation again."
        )
    if not run.tasks:
        raise UserError(f"{run.path.name}: no task was run, so there is nothing to publish.")


def objections(run: RunFiles) -> tuple[list[str], list[str]]:
    """What is wrong with a run that could be published all the same, and what could not be checked of it."""
    verdict = validate(run.path)
    return [*_limited(run), *_without_headline(run), *verdict.problems], verdict.notes


def headlines(run: RunFiles) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Task -> its primary metric and the estimate, of the tasks that have one; speed is no headline."""
    found = {task: primary_metric(details) for task, details in run.tasks.items() if not task.endswith(EFFICIENCY)}
    return {
        task: (metric, run.tasks[task]["metrics"][metric])
        for task, metric in found.items()
        if metric is not None and metric in run.tasks[task]["metrics"]
    }


def _limited(run: RunFiles) -> Iterator[str]:
    limit = (run.results.get("config") or {}).get("limit")
    if limit is not None:
        yield f"a limited run (--limit {limit:g}): its numbers are of a part of the data"
        return
    for task, details in run.tasks.items():
        scored, documents = details.get("scored"), details.get("documents")
        if isinstance(scored, int) and isinstance(documents, int) and scored < documents:
            yield f"{task} scored {scored} of {documents} documents"


def _without_headline(run: RunFiles) -> Iterator[str]:
    """What a disturbed model retains is undefined where it has nothing to lose: that is a result, not a failure."""
    for task, (metric, estimate) in headlines(run).items():
        if estimate["value"] is None and "robustness" not in run.tasks[task]:
            yield f"{task} has no {metric}: {estimate.get('reason') or 'no reason given'}"
