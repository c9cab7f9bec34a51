"""What one run becomes in a results repo: its folder, whose name tells it from all others, and the files in it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvlm_harness.errors import UserError
from medvlm_harness.files import plain_name
from medvlm_harness.results.plots import plot_data
from medvlm_harness.results.publishing.card import run_card
from medvlm_harness.results.publishing.checks import headlines, objections, refuse_broken
from medvlm_harness.results.publishing.privacy import per_study_scores
from medvlm_harness.results.publishing.public import left_out, public_run
from medvlm_harness.results.publishing.repository import SUMMARY
from medvlm_harness.results.publishing.tables import parquet_bytes, run_tables
from medvlm_harness.results.report.build import report_sections
from medvlm_harness.results.report.cautions import cautions
from medvlm_harness.results.report.methods import methods
from medvlm_harness.results.report.parts import Plot, Section
from medvlm_harness.results.report.runs import ReportRuns, model_name
from medvlm_harness.results.run_files import RunFiles
from medvlm_harness.results.sharing import sharing_of

__all__ = ["Release", "make_release"]

SUMMARY_VERSION = 1
DPI = 110
# Sections that the card has in its own place, or that are of what does not go out.
_ELSEWHERE = ("cautions", "methods", "examples")
# Section of a report -> what a reader misses where it is not there.
_EXPECTED = {
    "findings": "AUROC of each finding",
    "calibration": "calibration",
    "selective": "risk and coverage",
    "robustness": "disturbed images and texts, and images of another study",
    "subgroups": "subgroups",
}
WITHHELD = (
    "Counts below 10, what gives them away, and scores by study are not published; docs/publishing.md of "
    "medvlm-harness says how."
)
HASHED = (
    "Tables are without counts below 10 and what gives them away. Scores by study are published under salted hashes; "
    "such counts can be made from them again."
)
_FIXED = {
    "ROC and precision-recall curves": "they are drawn from per-study scores, which do not go out with a card",
    "sex, age and race": "known only as far as the data set states them; see the subgroups",
}


@dataclass(frozen=True)
class Release:
    """One run, ready to go out.

    Attributes:
        folder: in the repo: runs/MODEL/DATE_HASH; the hash is of the public results file.
        files: path in the repo -> content.
        summary: what the repo's README says of it.
        marks: why it should not be published; on the card.
        left_out: what the results file says that does not go out, as task.key.
        run: as everybody may see it.
    """

    folder: str
    files: Mapping[str, bytes]
    summary: Mapping[str, Any]
    marks: Sequence[str]
    left_out: Sequence[str]
    run: RunFiles


def make_release(run: RunFiles, *, samples: bool = False, force: bool = False, marks: Sequence[str] = ()) -> Release:
    """The folder of a run; nothing is written and nothing asked of a network.

    Args:
        run: as it lies on this machine.
        samples: add per-study scores, as far as the data sets permit.
        force: publish a run that should not be, with a mark.
        marks: further ones.

    Raises:
        UserError: if the run cannot be published, or should not be and `force` is not said.
    """
    refuse_broken(run)
    against, unchecked = objections(run)
    if against and not force:
        raise UserError(
            f"{run.path.name} should not be published: {'; '.join(against)}. --force publishes it with a mark on its "
            "card."
        )
    marks = [*against, *marks, *unchecked]
    public = public_run(run)
    results = (json.dumps(public.results, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    model = model_name(public)
    folder = f"runs/{plain_name(model)}/{plain_name(public.date)[:19]}_{hashlib.sha256(results).hexdigest()[:12]}"
    tables = run_tables(public, name=folder, model=model)
    sections = report_sections({model: public})
    files = {"results.json": results, **{f"{name}.parquet": parquet_bytes(table) for name, table in tables.items()}}
    for section in sections:
        if section.name not in _ELSEWHERE:
            files.update(_plots(section))
    if samples:
        files["scores.parquet"] = _scores(run)
    summary = _summary(public, folder, model, marks, {name: table.num_rows for name, table in tables.items()})
    files[SUMMARY] = (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode()
    files["card.md"] = _card(public, model, sections, marks, samples=samples).encode()
    return Release(
        folder, {f"{folder}/{name}": data for name, data in files.items()}, summary, marks, left_out(run), public
    )


def _card(run: RunFiles, model: str, sections: Sequence[Section], marks: Sequence[str], *, samples: bool) -> str:
    have = {section.name for section in sections}
    return run_card(
        run,
        [section for section in sections if section.name not in _ELSEWHERE],
        title=f"{model}: results of {', '.join(sorted({one['dataset']['name'] for one in run.tasks.values()}))}",
        marks=marks,
        cautions=[str(one) for one in cautions(run)],
        methods=" ".join(methods(ReportRuns({model: run}))),
        missing={what: "no task of this run measures it" for name, what in _EXPECTED.items() if name not in have}
        | _FIXED
        | {task: f"not run: {why}" for task, why in run.medvlm["unsupported"].items()},
        withheld="" if sharing_of(run.tasks) == "full" else HASHED if samples else WITHHELD,
    )


def _plots(section: Section) -> Iterator[tuple[str, bytes]]:
    """Each plot as a picture and as the numbers behind it."""
    for plot in section.parts:
        if isinstance(plot, Plot):
            buffer = io.BytesIO()
            plot.draw().savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            yield f"plots/{plain_name(plot.name)}.png", buffer.getvalue()
            yield f"plots/{plain_name(plot.name)}.csv", plot_data(plot.data).encode()


def _scores(run: RunFiles) -> bytes:
    if run.scores is None:
        raise UserError(f"--samples: no scores.parquet lies beside {run.path}: expected the one that the run wrote.")
    return parquet_bytes(per_study_scores(run.scores, run.tasks))


def _summary(run: RunFiles, folder: str, model: str, marks: Sequence[str], tables: Mapping[str, int]) -> dict[str, Any]:
    block = run.medvlm
    data = {task["dataset"]["name"]: task["dataset"].get("licence") for task in run.tasks.values()}
    return {
        "schema_version": SUMMARY_VERSION,
        "run": folder,
        "model": model,
        "precision": block["model"].get("precision"),
        "weights_sha256": block["model"].get("weights_sha256"),
        "date": run.date[:10],
        "data": ", ".join(f"{name} ({licence or 'licence not stated'})" for name, licence in data.items()),
        "headlines": [
            {"task": task, "metric": metric, **{key: one.get(key) for key in ("value", "ci95", "n", "reason")}}
            for task, (metric, one) in headlines(run).items()
        ],
        "tables": dict(tables),
        "marks": list(marks),
    }
