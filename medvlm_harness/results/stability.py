"""How far results move with what ought not to decide them: the seed of what is drawn, and the wording of prompts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean, mean, stdev, variance
from typing import Any, NamedTuple

from medvlm_harness.results.markdown import interval_cell, markdown_table, number_cell

__all__ = ["Condition", "stability", "stability_table"]

SCHEMA_VERSION = 1


class Condition(NamedTuple):
    """What one run was given; None where the option was not asked for."""

    seed: int | None = None
    prompts: str | None = None

    def __str__(self) -> str:
        given = {"seed": self.seed, "prompts": self.prompts}
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def stability(
    conditions: Sequence[Condition], runs: Sequence[Mapping[str, Any]], *, seeded: Sequence[str] = ()
) -> dict[str, Any]:
    """What each metric was in each run, and how far it spreads; plain JSON.

    Args:
        conditions: what each run was given, all different.
        runs: lm-eval's results of each, in that order. Of tasks that are not ours the scalars are taken, without an
            interval.
        seeded: where the seed of a run went to, for people.

    Returns:
        `seeds`, `prompt_sets`, `seeded`, `runs` (the conditions), and in `tasks`, per task and metric, `values` and
        `ci95` of each run, `mean`, `sd` (sample standard deviation), `min` and `max` over all runs. Where both options
        were given, `sd_seeds` is the standard deviation over seeds within a prompt set and `sd_prompts` that over
        prompt sets within a seed, each pooled as the root mean square. What cannot be computed is None, with `reason`.

    Raises:
        ValueError: for fewer than two runs, equal conditions, or another number of them.
    """
    if not 1 < len(runs) == len(conditions) == len(set(conditions)):
        raise ValueError(f"Expected several runs, each with a condition of its own, but got {len(runs)}: {conditions}.")
    numbers = [_numbers(run) for run in runs]
    tasks: dict[str, dict[str, Any]] = {}
    for task, metric in dict.fromkeys(key for run in numbers for key in run):
        of_runs = [run.get((task, metric), {}) for run in numbers]
        tasks.setdefault(task, {})[metric] = _spread(conditions, of_runs)
    return {
        "schema_version": SCHEMA_VERSION,
        "seeds": _levels(condition.seed for condition in conditions),
        "prompt_sets": _levels(condition.prompts for condition in conditions),
        "seeded": list(seeded),
        "runs": [condition._asdict() for condition in conditions],
        "tasks": tasks,
    }


def stability_table(block: Mapping[str, Any]) -> str:
    """What `stability` gives, in Markdown: the metrics that differ between runs, and how many do not."""
    conditions = [Condition(run["seed"], run["prompts"]) for run in block["runs"]]
    parts = {"SD over seeds": "sd_seeds", "SD over prompts": "sd_prompts"} if _crossed(conditions) else {}
    rows = [("Task", "Metric", "Values", "Mean", "SD", *parts, "Range", "95% interval, first run", "Note")]
    same = 0
    for task, metrics in block["tasks"].items():
        first = True
        for metric, spread in metrics.items():
            if len(set(spread["values"])) == 1:
                same += 1
                continue
            rows.append(
                (
                    task if first else "",
                    metric,
                    " ".join(map(number_cell, spread["values"])),
                    *(number_cell(spread[key]) for key in ("mean", "sd", *parts.values())),
                    interval_cell(None if spread["min"] is None else (spread["min"], spread["max"])),
                    interval_cell(spread["ci95"][0]),
                    spread["reason"] or "",
                )
            )
            first = False
    head = [
        f"{len(conditions)} runs: {'; '.join(map(str, conditions))}.",
        f"A spread over {len(conditions)} runs is no confidence interval; the 95% interval is over studies.",
    ]
    if block["seeded"]:
        head.append(f"The seed went to {', '.join(block['seeded'])}.")
    if len(rows) == 1:
        return "\n".join([*head, f"All {same} metrics are the same in all runs."]) + "\n"
    rest = f"The other {same} metrics are the same in all runs."
    return "\n".join([*head, "", *markdown_table(rows), "", rest]) + "\n"


def _numbers(run: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(task, metric) -> value, ci95 and reason; of ours the estimates, of others lm-eval's scalars."""
    ours = run.get("medvlm", {}).get("tasks", {})
    found = {(task, name): one for task, details in ours.items() for name, one in details["metrics"].items()}
    for task, scalars in run["results"].items():
        for name, value in scalars.items() if task not in ours else ():
            # "acc,none" beside "acc_stderr,none", "alias" and "sample_len".
            if "," in name and "_stderr," not in name and isinstance(value, int | float):
                known = math.isfinite(value)
                found[task, name] = {"value": value if known else None, "ci95": None, "reason": None}
    return found


def _spread(conditions: Sequence[Condition], of_runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [one.get("value") for one in of_runs]
    known = [value for value in values if value is not None]
    spread: dict[str, Any] = {"values": values, "ci95": [one.get("ci95") for one in of_runs]}
    if len(known) < len(values):
        where = values.index(None)
        reason = f"{conditions[where]}: {of_runs[where].get('reason') or 'no value'}"
        return {**spread, **dict.fromkeys(("mean", "sd", "sd_seeds", "sd_prompts", "min", "max")), "reason": reason}
    crossed = _crossed(conditions)
    return {
        **spread,
        "mean": mean(known),
        "sd": stdev(known),
        "sd_seeds": _sd_within(known, [condition.prompts for condition in conditions]) if crossed else None,
        "sd_prompts": _sd_within(known, [condition.seed for condition in conditions]) if crossed else None,
        "min": min(known),
        "max": max(known),
        "reason": None,
    }


def _crossed(conditions: Sequence[Condition]) -> bool:
    """Whether both options have several levels."""
    return all(len(set(levels)) > 1 for levels in zip(*conditions, strict=True))


def _sd_within(values: Sequence[float], levels: Sequence[Hashable]) -> float:
    """Standard deviation among the values that share a level, pooled."""
    groups: dict[Hashable, list[float]] = {}
    for value, level in zip(values, levels, strict=True):
        groups.setdefault(level, []).append(value)
    return math.sqrt(fmean(variance(group) for group in groups.values()))


def _levels(given: Iterable[Any]) -> list[Any] | None:
    """Those of one option in order; None where it was not asked for."""
    return [one for one in dict.fromkeys(given) if one is not None] or None
