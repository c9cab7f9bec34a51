"""What disturbed inputs do: scores by severity, what is retained, flipped answers, and whether the image is used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.robustness import CLEAN
from medvlm_harness.results.plots import house_style
from medvlm_harness.results.report.drawing import FLOOR, labelled, legend, look, small_multiples
from medvlm_harness.results.report.parts import Cell, Column, Plot, Section, Table
from medvlm_harness.results.report.runs import Group, ReportRuns
from medvlm_harness.results.report.shown import interval_of, metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["has_image_use", "has_robustness", "robustness_section"]

SUMMARY: Sequence[tuple[str, str, Literal["higher"] | None, str]] = (
    ("{measure}_clean", "Undisturbed", "higher", ""),
    ("{measure}_drop", "Mean drop", None, "over all disturbances"),
    ("{measure}_retention", "Retained", "higher", "share of what the model has above its floor"),
    ("{measure}_worst", "Worst case", "higher", "the lowest score of any disturbance"),
    ("flip_rate", "Flips", None, "share of answers that a disturbance changes, mean"),
    ("flip_rate_any", "Flips, any", None, "share of answers that some disturbance changes"),
)
RELIANCE = "reliance_"
UNORDERED = frozenset({"wording"})  # numbered as severities are, but none is further from the first than another
Lines = Mapping[tuple[str, str], Sequence[tuple[float, Estimate]]]  # (disturbance, run) -> severity, value


def has_robustness(details: Mapping[str, Any]) -> bool:
    """Whether a task disturbs its inputs."""
    return "robustness" in details


def has_image_use(details: Mapping[str, Any]) -> bool:
    """Whether a task asks the same with another image, or none."""
    return "robustness" not in details and any(name.endswith("_true_minus_other") for name in details["metrics"])


def robustness_section(runs: ReportRuns) -> Section | None:
    """Every task that disturbs its inputs, or puts another image in the place of the study's own."""
    parts: list[Table | Plot] = []
    for group in runs.groups(has_robustness):
        details = runs.files[group.runs[0]].tasks[group.task]
        for measure in details["measures"]:
            lines = _lines(runs, group, measure)
            if curves := {key: points for key, points in lines.items() if len(points) > 1}:
                parts.append(_curves(runs, group, measure, curves))
            parts.append(_summary(runs, group, measure))
            parts.append(_drops(runs, group, measure))
        if relying := _reliance(runs, group):
            parts.append(relying)
    parts += [_image_use(runs, group) for group in runs.groups(has_image_use)]
    text = (
        "Each disturbance is applied to the same studies. A drop is the undisturbed score less the disturbed one; what "
        "is retained is measured above the floor, so that a model that knows nothing retains nothing.",
        "Reliance on the image: how many answers change when the image is another patient's, blank or the mean of all. "
        "A model that hardly changes its answers does not look.",
    )
    return Section("robustness", "Robustness and use of the image", text, parts) if parts else None


def _found(runs: ReportRuns, run: str, task: str, name: str) -> Estimate | None:
    """From all that was measured under conditions, of which the metrics are a part."""
    found = runs.files[run].tasks[task]["robustness"].get(name)
    return Estimate.from_dict(found) if found else None


def _lines(runs: ReportRuns, group: Group, measure: str) -> dict[tuple[str, str], list[tuple[float, Estimate]]]:
    """From the undisturbed score on; a disturbance without a severity has one step."""
    lines: dict[tuple[str, str], list[tuple[float, Estimate]]] = {}
    for run in group.runs:
        details = runs.files[run].tasks[group.task]
        clean = _found(runs, run, group.task, f"{measure}_{CLEAN}")
        for disturbance, cases in details["groups"].items():
            points = [(0.0, clean)] if clean else []
            for case in cases:
                severity = re.fullmatch(rf"{re.escape(disturbance)}_(\d+)", case)
                value = _found(runs, run, group.task, f"{measure}_{case}")
                if severity and value:
                    points.append((float(severity[1]), value))
            lines[disturbance, run] = points
    return lines


def _curves(runs: ReportRuns, group: Group, measure: str, lines: Lines) -> Plot:
    disturbances = list(dict.fromkeys(disturbance for disturbance, _ in lines))
    floors = {
        clean.floor
        for run in group.runs
        if (clean := _found(runs, run, group.task, f"{measure}_{CLEAN}")) and clean.floor is not None
    }
    data = [
        {
            "disturbance": labelled(disturbance),
            "run": run,
            "severity": severity,
            "value": value.value,
            "low": value.ci95[0],
            "high": value.ci95[1],
        }
        for (disturbance, run), points in lines.items()
        for severity, value in points
    ]
    return Plot(
        f"robustness_{group.name}_{measure}",
        f"{metric_title(measure)} by severity",
        f"{measure} from undisturbed (0) to the highest severity for {len(disturbances)} disturbances, one line per "
        "run, with 95% intervals.",
        partial(
            _draw, measure, disturbances, runs.places(group.runs), lines, floors.pop() if len(floors) == 1 else None
        ),
        data,
        group.title,
    )


def _draw(
    measure: str, disturbances: Sequence[str], runs: Mapping[str, int], lines: Lines, floor: float | None
) -> Figure:
    with house_style():
        figure, panels = small_multiples(len(disturbances), sharey=True)
        for panel, disturbance in zip(panels, disturbances, strict=True):
            for k, (run, place) in enumerate(runs.items()):
                points = lines.get((disturbance, run), ())
                # Side by side within a step, so that intervals do not hide each other.
                x = [severity + 0.07 * (k - (len(runs) - 1) / 2) for severity, _ in points]
                style = look(place) | ({"linestyle": "none"} if disturbance in UNORDERED else {})
                for at, (_, value) in zip(x, points, strict=True):
                    if ends := interval_of(value):
                        panel.plot([at, at], ends, color=style["color"], linewidth=0.8, alpha=0.7)
                panel.plot(x, [value.value for _, value in points], markersize=3.5, label=run, **style)
            if floor is not None:
                panel.axhline(floor, color=FLOOR, linewidth=0.9, linestyle=(0, (3, 2)))
            panel.set_title(labelled(disturbance) + (" (in no order)" if disturbance in UNORDERED else ""))
            panel.set_xticks(sorted({severity for (its, _), points in lines.items() if its == disturbance
                                     for severity, _ in points}))  # fmt: skip
        figure.supxlabel("Severity (0: undisturbed)", fontsize=9)
        figure.supylabel(metric_title(measure), fontsize=9)
        legend(figure, panels)
    return figure


def _summary(runs: ReportRuns, group: Group, measure: str) -> Table:
    names = [(key.format(measure=measure), title, better, why) for key, title, better, why in SUMMARY]
    rows: list[dict[str, Cell]] = [
        {"run": run, **{name: _found(runs, run, group.task, name) for name, *_ in names}} for run in group.runs
    ]
    columns = [Column("run", "Run")]
    for name, title, better, why in names:
        if any(row[name] is not None for row in rows):
            columns.append(Column(name, title, better, why))
    name, title = f"robustness_{group.name}_{measure}", f"Robustness of {metric_title(measure)}"
    return Table(name, title, columns, rows, about=group.title)


def _drops(runs: ReportRuns, group: Group, measure: str) -> Table:
    """One row per disturbance, its mean over severities; then conditions that stand alone."""
    details = runs.files[group.runs[0]].tasks[group.task]
    rows: list[dict[str, Cell]] = []
    for condition in (*details["groups"], *details["others"]):
        values = {run: _found(runs, run, group.task, f"{measure}_drop_{condition}") for run in group.runs}
        rows.append({"condition": labelled(condition), **values})
    columns = [Column("condition", "Disturbance"), *(Column(run, run, "lower", run=run) for run in group.runs)]
    name, title = f"drops_{group.name}_{measure}", f"Drop of {metric_title(measure)} by disturbance"
    note = "Means over severities. What always answers the same drops by nothing: read it beside the score itself."
    return Table(name, title, columns, rows, note, compared="across", about=group.title)


def _reliance(runs: ReportRuns, group: Group) -> Table | None:
    details = runs.files[group.runs[0]].tasks[group.task]
    names = [f"{RELIANCE}{other}" for other in details["others"]]
    rows: list[dict[str, Cell]] = [
        {"run": run, **{name: _found(runs, run, group.task, name) for name in names}} for run in group.runs
    ]
    shown = [name for name in names if any(row[name] is not None for row in rows)]
    if not shown:
        return None
    columns = [
        Column("run", "Run"),
        *(Column(name, labelled(name.removeprefix(RELIANCE)), "higher", "share of changed answers") for name in shown),
    ]
    name, title = f"reliance_{group.name}", "Answers that change with the image"
    return Table(name, title, columns, rows, about=group.title)


def _image_use(runs: ReportRuns, group: Group) -> Table:
    metrics = runs.files[group.runs[0]].tasks[group.task]["metrics"]
    rows: list[dict[str, Cell]] = [
        {"run": run, **{name: runs.estimate(run, group.task, name) for name in metrics}} for run in group.runs
    ]
    columns = [
        Column("run", "Run"),
        *(Column(name, labelled(name), "higher" if "_true" in name else None) for name in metrics),
    ]
    note = "True: the study's own image. Other: another patient's. Blank: no image. The differences are paired."
    name, title = f"image_use_{group.name}", "With and without the image"
    return Table(name, title, columns, rows, note=note, about=group.title)
