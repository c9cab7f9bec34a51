"""The cells of a sweep that are done, compared with those that it names as references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medvlm_harness.files import write_json, write_whole
from medvlm_harness.results.comparing.comparison import compare_runs, comparison_table, flips_of
from medvlm_harness.results.markdown import Notes, markdown_table
from medvlm_harness.results.run_cost import EFFICIENCY, cost_of
from medvlm_harness.results.run_files import RunFiles, read_run
from medvlm_harness.results.tradeoff import tradeoff, tradeoff_plot, tradeoff_table
from medvlm_harness.sweeps.state import Recorded, read_record

__all__ = ["Compared", "compare_cells"]

# What levels of an axis may make different between two cells that are compared with each other.
ACROSS = ("perturbation",)
COSTS = {  # heading and format
    "latency_p50": ("Latency ms", ".1f"),
    "weights_memory_mib": ("Weights MiB", ".1f"),
    "parameters": ("Parameters", ",.0f"),
}


class Compared(NamedTuple):
    """What is printed, and what was written."""

    table: str
    files: list[Path]


@dataclass(frozen=True, slots=True)
class _Group:
    """Cells that differ in the axes of one reference alone, and what `compare_runs` says of them."""

    reference: Mapping[str, str]  # axis -> level
    place: Mapping[str, str]  # of all other axes
    block: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Done:
    """A cell that is done."""

    name: str
    place: Mapping[str, str]
    run: RunFiles


def compare_cells(folder: Path) -> Compared | None:
    """Compare what is done; write comparison.json, comparison.md, and the trade-off where the sweep asks for it.

    With one reference the table is that of `compare_runs`. With more, cells are compared with the first, and how many
    answers change under the levels of the others stands in columns of its own.

    Args:
        folder: of a sweep.

    Returns:
        None where fewer than two cells are done, or none of them has its reference.

    Raises:
        UserError: if the folder is no sweep's, or a results file was damaged.
    """
    recorded = read_record(folder)
    done = list(_done(recorded, folder))
    references = recorded.compare.references or (dict(done[0].place),) if done else ()
    groups = [group for reference in references for group in _groups(done, reference)]
    if not groups:
        return None
    alone = len(groups) == 1
    tables = [("" if alone else _heading(group)) + comparison_table(group.block) for group in groups]
    first = [_summary(done, references, groups)] if len(references) > 1 else []
    files = [folder / "comparison.json", folder / "comparison.md"]
    written = [{"reference": one.reference, "place": one.place, "comparison": one.block} for one in groups]
    write_json(files[0], {"sweep": recorded.name, "groups": written})
    shown = first or tables
    metric = recorded.compare.accuracy
    main = {cell.name: cell.run for cell in _at_references(done, references)}
    if metric is not None and any(metric.partition(":")[0] in run.tasks for run in main.values()):
        rows = tradeoff(main, metric=metric)
        cost_table = tradeoff_table(rows)
        shown, tables = [*shown, cost_table], [*tables, cost_table]
        plot = folder / "tradeoff.png"
        files += [plot, tradeoff_plot(rows, plot)]
    write_whole(files[1], "\n".join([*first, *tables]))
    return Compared("\n".join(shown), files)


def _done(recorded: Recorded, folder: Path) -> Iterable[_Done]:
    for cell, (name, files) in zip(recorded.cells, recorded.folders(folder), strict=True):
        results = files.results() if files.state().status == "done" else None
        if results is not None:
            yield _Done(name, cell["place"], read_run(results))


def _groups(done: Sequence[_Done], reference: Mapping[str, str]) -> Iterable[_Group]:
    by_place: dict[tuple[tuple[str, str], ...], list[_Done]] = {}
    for cell in done:
        rest = tuple((axis, level) for axis, level in cell.place.items() if axis not in reference)
        by_place.setdefault(rest, []).append(cell)
    for rest, cells in by_place.items():
        names = [cell.name for cell in cells if _is_at(cell, reference)]
        if names and len(cells) > 1:
            runs = {cell.name: cell.run for cell in cells}
            yield _Group(reference, dict(rest), compare_runs(runs, reference=names[0], across=ACROSS))


def _is_at(cell: _Done, reference: Mapping[str, str]) -> bool:
    return all(cell.place.get(axis) == level for axis, level in reference.items())


def _at_references(done: Sequence[_Done], references: Sequence[Mapping[str, str]]) -> list[_Done]:
    """The cells at the levels of all references but the first."""
    return [cell for cell in done if all(_is_at(cell, reference) for reference in references[1:])]


def _heading(group: _Group) -> str:
    place = ", ".join(f"{axis}={level}" for axis, level in group.place.items())
    return f"## {place or ', '.join(group.reference)}\n\n"


def _summary(done: Sequence[_Done], references: Sequence[Mapping[str, str]], groups: Sequence[_Group]) -> str:
    """A row per task and cell: its score, what it lacks to the first reference, and what changes its answers."""
    cells, notes = _at_references(done, references), Notes()
    levels = list(dict.fromkeys(_levels(done, references)))
    flips = [f"Flips, {level} [95%]" for level in levels]
    less = f"Less {', '.join(references[0].values())} [95%]"
    head = ("Task", "Cell", "Metric", "Value [95%]", less, "ECE [95%]", *flips, *(title for title, _ in COSTS.values()))
    rows: list[tuple[str, ...]] = [head]
    for task in dict.fromkeys(task for cell in cells for task in (*cell.run.tasks, *_unsupported(cell))):
        if task.endswith(EFFICIENCY):
            continue
        for cell in cells:
            if task not in cell.run.tasks:
                if task in _unsupported(cell):
                    rows.append((task, cell.name, "", notes(_unsupported(cell)[task]), *[""] * (len(head) - 4)))
                continue
            metrics, costs = cell.run.tasks[task]["metrics"], cost_of(cell.run)
            metric, difference = _against_first(cell, task, groups, references[0])
            under = _flips(cell, task, groups, references[0], done)
            shown = [_interval(metrics.get(metric), notes), _interval(difference, notes, signed=True)]
            shown += [_interval(one, notes) for one in (metrics.get("ece"), *(under.get(level) for level in levels))]
            known = [(costs[one]["value"], form) for one, (_, form) in COSTS.items()]
            shown += ["" if value is None else f"{value:{form}}" for value, form in known]
            rows.append((task, cell.name, metric, *shown))
    return "\n".join([*markdown_table(rows), *notes.lines()]) + "\n"


def _levels(done: Sequence[_Done], references: Sequence[Mapping[str, str]]) -> Iterable[str]:
    for reference in references[1:]:
        for cell in done:
            if not _is_at(cell, reference):
                yield _level(cell.place, reference)


def _level(place: Mapping[str, str], reference: Mapping[str, str]) -> str:
    return ", ".join(place.get(axis, "") for axis in reference)


def _unsupported(cell: _Done) -> Mapping[str, str]:
    found: Mapping[str, str] = cell.run.medvlm.get("unsupported", {})
    return found


def _against_first(
    cell: _Done, task: str, groups: Sequence[_Group], reference: Mapping[str, str]
) -> tuple[str, Mapping[str, Any] | None]:
    """The task's first metric, and the difference to the reference's; None of the reference itself."""
    for group in groups:
        found = group.block["tasks"].get(task, {})
        if group.reference is reference and cell.name in group.block["runs"] and found.get("primary"):
            metric = str(found["primary"][0])
            return metric, found["metrics"][metric]["differences"].get(cell.name)
    return str(next(iter(cell.run.tasks[task]["metrics"]), "")), None


def _flips(
    cell: _Done, task: str, groups: Sequence[_Group], first: Mapping[str, str], done: Sequence[_Done]
) -> dict[str, Mapping[str, Any]]:
    """Level of another reference than the first -> share of the cell's answers that are others under it."""
    places = {one.name: one.place for one in done}
    found = {}
    for group in groups:
        if group.reference is first or group.block["reference"] != cell.name:
            continue
        its = group.block["tasks"].get(task, {})
        for name, agreement in its.get("agreement", {}).items():
            found[_level(places[name], group.reference)] = agreement[flips_of(its)]
    return found


def _interval(estimate: Mapping[str, Any] | None, notes: Notes, *, signed: bool = False) -> str:
    if estimate is None:
        return ""
    if estimate["value"] is None:
        return notes(estimate["reason"])
    sign = "+" if signed else ""
    ends = ", ".join(f"{end:{sign}.3f}" for end in estimate["ci95"] or ())
    return f"{estimate['value']:{sign}.3f}" + (f" [{ends}]" if ends else "")
