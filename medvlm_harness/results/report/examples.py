"""Examples: what a search finds best and worst, and texts beside their references; as far as data may be shown."""

from __future__ import annotations

import numpy as np

from medvlm_harness.results.report.parts import Cell, Column, Section, Table
from medvlm_harness.results.report.runs import Group, ReportRuns
from medvlm_harness.results.report.shown import DIRECTIONS
from medvlm_harness.results.samples import read_samples, samples_files
from medvlm_harness.results.sharing import sharing_of

__all__ = ["examples_section"]

OPEN = "full"  # of `sharing`: the data set's texts and ids may leave this machine
EXAMPLES = 5  # best, and as many worst
LONGEST = 600  # characters of one text


def examples_section(runs: ReportRuns, *, show_text: bool = False) -> Section | None:
    """Searches by rank, and written texts where they were asked for and the data set permits.

    Args:
        runs: of the report.
        show_text: show what models wrote, and the references.
    """
    parts: list[Table] = []
    kept_back: list[str] = []
    for group in runs.groups(lambda details: any(name.endswith("_mrr") for name in details["metrics"])):
        may_name = _may_show(runs, group)
        if not may_name:
            kept_back.append(group.task)
        parts.append(_searches(runs, group, may_name=may_name))
    if show_text:
        for group in runs.groups(lambda details: "rougeL" in details["metrics"]):
            if not _may_show(runs, group):
                kept_back.append(group.task)
                continue
            parts += [table for run in group.runs if (table := _texts(runs, group, run))]
    text = ["Rank 1: the study's own counterpart comes first. With ties, the expected rank."]
    if kept_back:
        text.append(
            f"Studies and texts of {', '.join(dict.fromkeys(kept_back))} are not shown: what the data set permits "
            "(`sharing`) is less than full. Ranks by study are in the scores.parquet beside each run."
        )
    elif not show_text:
        text.append("Texts are shown with --show-text, where the data set permits.")
    return Section("examples", "Examples", text, parts) if parts or kept_back else None


def _may_show(runs: ReportRuns, group: Group) -> bool:
    return all(sharing_of({group.task: runs.files[run].tasks[group.task]}) == OPEN for run in group.runs)


def _searches(runs: ReportRuns, group: Group, *, may_name: bool) -> Table:
    """The best and the worst queries of each run: by study, or by rank alone."""
    rows: list[dict[str, Cell]] = []
    for run in group.runs:
        if (table := runs.scores(run, group.task)) is None:
            continue
        for j, direction in enumerate(table.labels):
            rank = table.rank[:, j]
            known = np.flatnonzero(~np.isnan(rank))
            order = known[np.argsort(rank[known], kind="stable")]
            for which, chosen in (("best", order[:EXAMPLES]), ("worst", order[::-1][:EXAMPLES])):
                row: dict[str, Cell] = {"run": run, "direction": DIRECTIONS.get(direction, direction), "which": which}
                if may_name:
                    rows += [{**row, "study": table.studies[k], "rank": float(rank[k])} for k in chosen]
                else:
                    ranks = ", ".join(f"{rank[k]:g}" for k in chosen)
                    rows.append({**row, "ranks": ranks, "of": len(known)})
    ids = [Column("study", "Study"), Column("rank", "Rank")]
    columns = [
        Column("run", "Run"),
        Column("direction", "Direction"),
        Column("which", "Which"),
        *(ids if may_name else [Column("ranks", "Ranks"), Column("of", "Of queries")]),
    ]
    return Table(f"examples_{group.name}", "Best and worst searches", columns, rows, about=group.title)


def _texts(runs: ReportRuns, group: Group, run: str) -> Table | None:
    """Texts with the best and the worst ROUGE-L, beside their references."""
    table = runs.scores(run, group.task)
    path = samples_files(runs.files[run]).get(group.task)
    if table is None or path is None or "rougeL" not in table.labels:
        return None
    value = table.value[:, list(table.labels).index("rougeL")]
    of_study = {study: float(one) for study, one in zip(table.studies, value, strict=True) if not np.isnan(one)}
    order = sorted(of_study, key=lambda study: -of_study[study])
    worst = order[max(EXAMPLES, len(order) - EXAMPLES) :]
    chosen = dict.fromkeys(order[:EXAMPLES], "best") | dict.fromkeys(worst, "worst")
    rows: dict[str, dict[str, Cell]] = {}
    for sample in read_samples(path):
        study = sample.doc.get("study_id")
        if study in chosen and study not in rows and sample.filtered:
            answer = sample.filtered[0]
            wrote = answer[0] if isinstance(answer, list) and answer else answer
            rows[study] = {"which": chosen[study], "study": study, "rougeL": of_study[study]}
            rows[study] |= {"reference": str(sample.target)[:LONGEST], "answer": str(wrote)[:LONGEST]}
    columns = [
        Column("which", "Which"),
        Column("study", "Study"),
        Column("rougeL", "ROUGE-L"),
        Column("reference", "Reference"),
        Column("answer", "Written by the model"),
    ]
    its = [rows[study] for study in chosen if study in rows]
    return Table(f"texts_{group.name}_{run}", f"Texts of {run}", columns, its, about=group.title)
