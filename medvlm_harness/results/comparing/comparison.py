"""Runs compared with a reference run: paired differences, how often answers differ, and what each run costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.comparing.paired_measures import K, scored_labels
from medvlm_harness.results.comparing.paired_scores import Paired, pair_scores
from medvlm_harness.results.markdown import Notes, markdown_table
from medvlm_harness.results.run_cost import EFFICIENCY, cost_of, memory_metric
from medvlm_harness.results.run_files import RunFiles, at_place
from medvlm_harness.results.score_table import ScoreTable

__all__ = ["SCHEMA_VERSION", "comparable_tables", "compare_runs", "comparison_table", "flips_of"]

SCHEMA_VERSION = 1
# What must be the same of two runs of a task, by its place in the task's details, and what it is called.
SAME = {
    "dataset.name": "data set",
    "dataset.sha256": "data (hash of the records)",
    "split": "split",
    "version": "task version",
    "perturbation": "perturbation",
    "label_source": "label source",
    "uncertain": "policy for uncertain labels",
    "distractors": "distractors",
    "comparable": "suite, studies or labels",
    "conditions": "conditions",
    "substitution_seed": "seed of the substitutes",
}
# Of a model, what a user may have changed between runs.
OPTIONS = (
    *("precision", "quantization", "adapter", "prompts", "prompts_sha256", "preprocessing"),
    *("device", "weights_sha256"),
)
HEADER = ("Task", "Metric", "Run", "Value", "Difference [95% interval]", "ECE difference [95%]", "Flips", "Rank corr.")


def compare_runs(
    runs: Mapping[str, RunFiles],
    *,
    reference: str,
    across: Collection[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every task of the reference in every other run that has it, and costs; plain JSON, see `results/README.md`.

    Differences are the run less the reference, from the same resamples of studies; they stand on the scores that runs
    wrote. Where data, split, truth, documents or task version differ, a run is left out of the task, with the reason.

    Args:
        runs: name -> run; names are what tables show.
        reference: the name of one of them.
        across: of what must be the same, what may differ, by its place in a task's details: `perturbation`, to see
            which answers a perturbation changes.
        resamples: number of resamples.
        seed: that of the tasks' own intervals is 0.

    Raises:
        UserError: if there is no other run, no such reference, or a run has no block of ours.
    """
    if reference not in runs or len(runs) < 2:
        raise UserError(f"Expected several runs with {reference!r} among them, but got {', '.join(runs) or 'none'}.")
    names = [reference, *(name for name in runs if name != reference)]
    tasks = [name for name in runs[reference].tasks if not name.endswith(EFFICIENCY)]
    described = {name: _run(runs[name]) for name in names}
    return {
        "schema_version": SCHEMA_VERSION,
        "reference": reference,
        "resamples": resamples,
        "seed": seed,
        "runs": described,
        "differs": _differing(list(described.values())),
        "tasks": {task: _task(task, runs, names, across=across, resamples=resamples, seed=seed) for task in tasks},
    }


def _run(run: RunFiles) -> dict[str, Any]:
    model = run.medvlm["model"]
    card = model.get("card")
    named = card.get("name") if isinstance(card, Mapping) else model.get("class")
    return {
        "results": run.path.name,
        "date": run.results.get("date"),
        "model": named,
        **{key: model.get(key) for key in OPTIONS},
        "transform": card.get("preprocessing") if isinstance(card, Mapping) else None,
        "unsupported": dict(run.medvlm.get("unsupported", {})),
        "cost": cost_of(run),
    }


def _differing(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options of the model that are not the same in all runs."""
    keys = ("model", *OPTIONS, "transform")
    return [key for key in keys if any(one[key] != described[0][key] for one in described)]


def _task(
    task: str,
    runs: Mapping[str, RunFiles],
    names: Sequence[str],
    *,
    across: Collection[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    tables, refused = comparable_tables(task, runs, names, across=across)
    if len(tables) < 2:
        return {"refused": refused, "metrics": {}}
    reference = names[0]
    details = {name: runs[name].tasks[task] for name in tables}
    try:
        paired = pair_scores(tables, details, reference=reference, resamples=resamples, seed=seed)
    except UserError as error:  # which is a ValueError
        return {"refused": refused | dict.fromkeys(list(tables)[1:], first_line(error)), "metrics": {}}
    except (KeyError, TypeError, AttributeError) as error:
        files = ", ".join(str(runs[name].path) for name in tables)
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"What {files} say of {task} has not the shape that it is written in ({what}).") from error
    higher: Mapping[str, Any] = runs[reference].results.get("higher_is_better", {}).get(task, {})
    return {**_described(paired, details, higher), "refused": refused}


def comparable_tables(
    task: str, runs: Mapping[str, RunFiles], names: Sequence[str], *, across: Collection[str] = ()
) -> tuple[dict[str, ScoreTable], dict[str, str]]:
    """The answers of the runs to a task that stand on the same items, and why the others are left out.

    Args:
        task: of the first run.
        runs: name -> run.
        names: of them, the reference first.
        across: see `compare_runs`.
    """
    reference, *others = names
    refused: dict[str, str] = {}
    tables: dict[str, ScoreTable] = {}
    try:
        tables[reference] = runs[reference].score_table(task)
    except UserError as error:
        return {}, dict.fromkeys(others, f"of the reference, {reference}: {first_line(error)}")
    for name in others:
        try:
            tables[name] = _comparable(task, runs[reference], tables[reference], runs[name], across)
        except UserError as error:
            refused[name] = first_line(error)
    return tables, refused


def _described(paired: Paired, details: Mapping[str, Mapping[str, Any]], higher: Mapping[str, Any]) -> dict[str, Any]:
    """What was found as plain JSON, beside what the runs themselves said."""
    metrics: dict[str, Any] = {}
    for metric, levels in paired.levels.items():
        metrics[metric] = {
            "lower_is_better": not higher.get(metric, True),
            "runs": {name: _level(one, details[name]["metrics"].get(metric)) for name, one in levels.items()},
            "differences": {name: one.to_dict() for name, one in paired.differences[metric].items()},
        }
        if metric in paired.ratios:
            metrics[metric]["ratios"] = {name: one.to_dict() for name, one in paired.ratios[metric].items()}
    return {
        "kind": paired.kind,
        "primary": list(paired.primary),
        "metrics": metrics,
        "agreement": {
            run: {name: one.to_dict() for name, one in found.items()} for run, found in paired.agreement.items()
        },
    }


def _level(found: Estimate, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """An estimate with `reported`, the run's own value where that is another: a mean of other items or of seeds."""
    value = None if own is None else own["value"]
    same = value is None or bool(np.isclose(value, found.value, rtol=1e-9, atol=1e-12))
    return {**found.to_dict(), "reported": None if same else value}


def _comparable(
    task: str, reference: RunFiles, first: ScoreTable, run: RunFiles, across: Collection[str]
) -> ScoreTable:
    """The answers of a run, which are on the same items as the reference's.

    Raises:
        UserError: saying what is not the same.
    """
    if task not in run.tasks:
        raise UserError(str(run.medvlm.get("unsupported", {}).get(task, "it did not run this task")))
    if differing := list(_unlike(reference.tasks[task], run.tasks[task], across)):
        raise UserError("; ".join(differing))
    table = run.score_table(task)
    if table.documents != first.documents:
        raise UserError(f"other documents: {len(table.documents)}, and {len(first.documents)} in the reference")
    if set(table.labels) != set(first.labels):
        other = sorted(set(table.labels) ^ set(first.labels))
        raise UserError(f"other labels: {', '.join(other[:3])}{' and more' if len(other) > 3 else ''}")
    table = table.select(first.labels)
    if not np.array_equal(table.target, first.target, equal_nan=True):
        raise UserError("other truth: the label source or the data differ")
    if not np.isnan(table.margin).all():
        scored_labels({"": table})  # one that has holes would take the others' place in the comparison
    return table


def _unlike(reference: Mapping[str, Any], run: Mapping[str, Any], across: Collection[str]) -> Iterator[str]:
    for place, what in SAME.items():
        if place in across:
            continue
        found = [at_place(one, place) for one in (reference, run)]
        if found[0] != found[1]:
            both = [str(one) for one in found]
            shown = f": {both[1]}, and {both[0]} in the reference" if max(map(len, both)) <= 40 else ""
            yield f"other {what}{shown}"


def comparison_table(block: Mapping[str, Any]) -> str:
    """What `compare_runs` gives, as one Markdown table of the primary metrics; reasons for n/a stand below it."""
    reference, names, notes = block["reference"], list(block["runs"]), Notes()
    costs = {name: run["cost"] for name, run in block["runs"].items()}
    titles = {
        "latency_p50": "Latency ms",
        memory_metric(costs.values()): "Memory MiB",
        "weights_memory_mib": "Weights MiB",
    }
    shown = [cost for cost in titles if any(its[cost]["value"] is not None for its in costs.values())]
    rows = [(*HEADER, *map(titles.__getitem__, shown))]
    for task, found in block["tasks"].items():
        for number, metric in enumerate(found.get("primary", ())):
            for name in names:
                if name in found["refused"]:
                    continue
                first = number == 0
                rows.append(
                    (
                        task if first and name == reference else "",
                        _named(metric, found["metrics"][metric]) if name == reference else "",
                        name,
                        _number(found["metrics"][metric]["runs"][name], notes),
                        *_against(found, metric, name, notes, first=first, reference=name == reference),
                        *(_cost(costs[name][cost], notes) if first else "" for cost in shown),
                    )
                )
        for number, (name, why) in enumerate(found["refused"].items()):
            alone = number == 0 and not found["metrics"]
            rows.append((task if alone else "", "", name, notes(why), *[""] * (len(rows[0]) - 4)))
    less = f"{block['resamples']} resamples of studies, the same for all runs"
    head = [f"Compared with {reference}: differences are the run less {reference}, with 95% intervals from {less}."]
    if block["differs"]:
        head.append(f"The runs differ in {', '.join(block['differs'])}.")
    ways = {
        name: run["quantization"] for name, run in block["runs"].items() if isinstance(run["quantization"], Mapping)
    }
    shares = {name: way.get("share") for name, way in ways.items()}
    if rounded := [f"{name} {share:.1%}" for name, share in shares.items() if isinstance(share, float)]:
        head.append(f"Share of the matrices' weights that is quantised: {', '.join(rounded)}.")
    missing = [title for cost, title in titles.items() if cost not in shown]
    if missing:
        head.append(f"Not measured in any run: {', '.join(missing)}.")
    flips: dict[str, list[str]] = {}
    for task, found in block["tasks"].items():
        for agreement in list(found.get("agreement", {}).values())[:1]:
            if by := agreement[flips_of(found)]["extra"].get("by"):
                flips.setdefault(by, []).append(task)
    if flips:
        head.append("Flips, share of answers other than the reference's: ")
        head[-1] += "; ".join(f"{by} ({', '.join(tasks)})" for by, tasks in flips.items()) + "."
    return "\n".join([*head, "", *markdown_table(rows), *notes.lines()]) + "\n"


def _against(
    found: Mapping[str, Any], metric: str, name: str, notes: Notes, *, first: bool, reference: bool
) -> tuple[str, ...]:
    """The cells of one metric of a run that compare it with the reference; agreement in the task's first row."""
    if reference:
        return ("",) * 4
    calibrated = found["metrics"].get("ece") if first else None
    agreement = found["agreement"][name]
    return (
        _difference(found["metrics"][metric]["differences"][name], notes),
        _difference(calibrated["differences"][name], notes) if calibrated else "",
        _number(agreement[flips_of(found)], notes) if first else "",
        _number(agreement["rank_correlation"], notes) if first and "rank_correlation" in agreement else "",
    )


def _named(metric: str, found: Mapping[str, Any]) -> str:
    return f"{metric} (less is better)" if found["lower_is_better"] else metric


def flips_of(found: Mapping[str, Any]) -> str:
    """Of what `compare_runs` says of a task, the name of the agreement that says how many answers change."""
    return f"flip_rate@{K}" if found["kind"] == "search" else "flip_rate"


def _number(estimate: Mapping[str, Any], notes: Notes) -> str:
    value = estimate["value"]
    return notes(estimate["reason"]) if value is None else f"{value:.4f}"


def _difference(estimate: Mapping[str, Any], notes: Notes) -> str:
    if estimate["value"] is None:
        return notes(estimate["reason"])
    interval = ", ".join(f"{end:+.4f}" for end in estimate["ci95"] or ())
    return f"{estimate['value']:+.4f} [{interval or 'unknown'}]"


def _cost(cost: Mapping[str, Any], notes: Notes) -> str:
    return notes(cost["reason"]) if cost["value"] is None else f"{cost['value']:.4g}"
