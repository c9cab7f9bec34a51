"""What runs gain for what they cost: a table and a plot of one metric against latency, memory and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.pareto import pareto_front
from medvlm_harness.results.markdown import markdown_table
from medvlm_harness.results.plots import SEQUENTIAL, house_style, label_points, new_figure, save_plot
from medvlm_harness.results.run_cost import COST_METRICS, cost_of, memory_metric
from medvlm_harness.results.run_files import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["tradeoff", "tradeoff_figure", "tradeoff_plot", "tradeoff_table"]

CHEAPER_IF_MORE = frozenset({"throughput", "output_tokens_per_second"})
AXES = {
    "latency_p50": "Latency, median per study (ms)",
    "throughput": "Throughput (items/s)",
    "peak_ram_mib": "Peak memory, RAM (MiB)",
    "vram_allocated_mib": "Peak memory, GPU (MiB)",
    "weights_memory_mib": "Weights in memory (MiB)",
    "weights_disk_mib": "Weights on disk (MiB)",
}
LOG_FROM = 20  # largest by smallest cost from which on an axis is logarithmic
UNCOLOURED = "#bbbbbb"


def tradeoff(
    runs: Mapping[str, RunFiles], *, metric: str, colour: str | None = None, costs: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """One row per run: the metric with its interval, each cost, and whether the run is on a Pareto front.

    Args:
        runs: name -> run.
        metric: `task:metric`, such as `iu_cxr_zeroshot:auroc`.
        colour: a second metric, likewise; None: the `ece` of the same task, where it has one.
        costs: of `COST_METRICS`; None: median latency, peak memory (of the GPU, where one was used), and weights.

    Returns:
        Flat rows: `run`, `metric`, `value`, `low`, `high`, `colour_metric`, `colour`, each cost by its name with
        `<cost>_source`, `on_front_<cost>` for metric and that cost alone, `on_front` for metric and all costs together,
        and `reason`, why anything is missing. What is unknown is None; a run that lacks a value is on no
        front that needs it.

    Raises:
        UserError: if no run has the metric, or a cost is not known.
    """
    task, name = _named(metric)
    second = _named(colour) if colour is not None else (task, "ece")
    cost_by_run = {run: cost_of(files) for run, files in runs.items()}
    wanted = list(costs or ("latency_p50", memory_metric(cost_by_run.values()), "weights_memory_mib"))
    if unknown := [cost for cost in wanted if cost not in COST_METRICS]:
        raise UserError(f"Expected costs among {', '.join(COST_METRICS)}, but got {unknown[0]}.")
    having = [files for files in runs.values() if _estimate(files, task, name)]
    if not having:
        raise UserError(f"Expected a metric that a run has, as task:metric, but none has {metric}.")
    more = having[0].results.get("higher_is_better", {}).get(task, {}).get(name, True)
    rows = [_row(run, files, (task, name), second, cost_by_run[run], wanted) for run, files in runs.items()]
    fronts = {f"on_front_{cost}": [cost] for cost in wanted} | {"on_front": wanted}
    for front, of in fronts.items():
        values = [[np.nan if row[key] is None else row[key] for key in ("value", *of)] for row in rows]
        directions = [bool(more), *(cost in CHEAPER_IF_MORE for cost in of)]
        for row, on in zip(rows, pareto_front(values, maximise=directions).tolist(), strict=True):
            row[front] = on
    return rows


def _row(
    run: str,
    files: RunFiles,
    metric: tuple[str, str],
    colour: tuple[str, str],
    costs: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[str],
) -> dict[str, Any]:
    found, second = _estimate(files, *metric), _estimate(files, *colour)
    missing = [] if found and found["value"] is not None else [_why_not(files, metric, found)]
    missing += [f"{cost}: {costs[cost]['reason']}" for cost in wanted if costs[cost]["value"] is None]
    low, high = (found and found["ci95"]) or (None, None)
    row = {"run": run, "metric": ":".join(metric), "value": found["value"] if found else None, "low": low, "high": high}
    row |= {"colour_metric": ":".join(colour), "colour": second["value"] if second else None}
    for cost in wanted:
        row |= {cost: costs[cost]["value"], f"{cost}_source": costs[cost]["source"]}
    return {**row, "reason": "; ".join(missing) or None}


def _named(metric: str) -> tuple[str, str]:
    task, colon, name = metric.partition(":")
    if not (task and colon and name):
        raise UserError(f"Expected a metric as task:metric, such as iu_cxr_zeroshot:auroc, but got {metric!r}.")
    return task, name


def _estimate(run: RunFiles, task: str, metric: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = run.tasks.get(task, {}).get("metrics", {}).get(metric)
    return found


def _why_not(run: RunFiles, metric: tuple[str, str], found: Mapping[str, Any] | None) -> str:
    why = found["reason"] if found else run.medvlm.get("unsupported", {}).get(metric[0], "it was not run")
    return f"{':'.join(metric)}: {why}"


def tradeoff_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `tradeoff` gives, in Markdown; best first, runs on the front of all costs together in bold."""
    costs = _costs(rows)
    head = ("Run", f"{rows[0]['metric']} [95% interval]", rows[0]["colour_metric"], *costs, "On the front of")
    lines, reasons = [head], []
    for row in sorted(rows, key=lambda one: (one["value"] is None, -(one["value"] or 0))):
        name = f"**{row['run']}**" if row["on_front"] else row["run"]
        interval = "" if row["low"] is None else f" [{row['low']:.4f}, {row['high']:.4f}]"
        value = "n/a" if row["value"] is None else f"{row['value']:.4f}{interval}"
        colour = "n/a" if row["colour"] is None else f"{row['colour']:.4f}"
        fronts = ", ".join(cost for cost in costs if row[f"on_front_{cost}"])
        lines.append((name, value, colour, *("n/a" if row[c] is None else f"{row[c]:.4g}" for c in costs), fronts))
        reasons += [f"n/a of {row['run']}: {row['reason']}."] if row["reason"] else []
    return "\n".join([*markdown_table(lines), "", *reasons]).rstrip() + "\n"


def tradeoff_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write what `tradeoff_figure` draws; CSV beside it.

    Args:
        rows: what `tradeoff` gives.
        path: ends in .png or .svg.

    Returns:
        The path of the CSV.
    """
    return save_plot(tradeoff_figure(rows), path, data=rows)


def tradeoff_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The metric against each cost, one panel per cost, with the front as a line of steps.

    Colour is the second metric; grey where a run has none. Bars are 95% intervals over studies, one per run: they do
    not say whether two runs differ, for which there are paired intervals.

    Args:
        rows: what `tradeoff` gives.
    """
    from matplotlib.colors import Normalize

    costs = _costs(rows)
    known = [row["colour"] for row in rows if row["colour"] is not None]
    norm = Normalize(min(known), max(known)) if known and min(known) < max(known) else None
    with house_style():
        figure, panels = new_figure(columns=len(costs), sharey=True)
        for panel, cost in zip(panels, costs, strict=True):
            _draw(panel, rows, cost, norm)
        caption = "Line and thick rims: the Pareto front of the panel. Bars: 95% intervals over studies."
        if 0 < len(known) < len(rows):
            caption += f" Grey: no {rows[0]['colour_metric']}."
        figure.suptitle(caption, x=0.005, ha="left", fontsize=8)
        panels[0].set_ylabel(rows[0]["metric"].replace(":", "\n"))
        if norm is not None:
            from matplotlib.cm import ScalarMappable

            bar = figure.colorbar(ScalarMappable(norm, SEQUENTIAL), ax=panels, pad=0.01)
            bar.set_label(rows[0]["colour_metric"].replace(":", "\n"))
        for panel, cost in zip(panels, costs, strict=True):
            shown = _shown(rows, cost)
            label_points(panel, [(row[cost], row["value"], row["run"]) for row in shown], _bars(shown))
    return figure


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], cost: str, norm: Any) -> None:
    """Points with their intervals, and the front."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter

    panel.set_xlabel(AXES.get(cost, f"{cost} ({COST_METRICS[cost]})"))
    shown = _shown(rows, cost)
    if not shown:
        reasons = {part for row in rows for part in (row["reason"] or "").split("; ") if part.startswith(f"{cost}: ")}
        why = "\n".join(sorted(part.removeprefix(f"{cost}: ") for part in reasons))
        panel.text(0.5, 0.5, f"not measured:\n{why}", transform=panel.transAxes, ha="center", va="center", wrap=True)
        panel.set_xticks([])
        return
    x = [row[cost] for row in shown]
    if max(x) > LOG_FROM * min(x) > 0:
        panel.set_xscale("log")
        # In digits, since the house style reads no mathematics; between decades too, of which there may be one.
        panel.xaxis.set_major_formatter(LogFormatter())
        panel.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    else:
        panel.margins(x=0.15)
    front = sorted((row[cost], row["value"]) for row in shown if row[f"on_front_{cost}"])
    panel.step(*zip(*front, strict=True), where="pre" if cost in CHEAPER_IF_MORE else "post", color="#555555", zorder=1)
    for row, (low, high) in zip(shown, _bars(shown), strict=True):
        panel.plot([row[cost]] * 2, [low, high], color="#888888", linewidth=1, zorder=2)
        face = UNCOLOURED if norm is None or row["colour"] is None else colormaps[SEQUENTIAL](norm(row["colour"]))
        width = 1.6 if row[f"on_front_{cost}"] else 0.7
        panel.plot(
            [row[cost]], [row["value"]], "o", markersize=8, color=face, markeredgecolor="black",
            markeredgewidth=width, zorder=3,
        )  # fmt: skip


def _shown(rows: Sequence[Mapping[str, Any]], cost: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["value"] is not None and row[cost] is not None]


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(row["value"], row["value"]) if row["low"] is None else (row["low"], row["high"]) for row in rows]


def _costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        raise ValueError("Expected rows of runs, but got none.")
    return [key.removesuffix("_source") for key in rows[0] if key.endswith("_source")]
