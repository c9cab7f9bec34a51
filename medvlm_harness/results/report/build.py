"""All sections of a report, from the results files of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from medvlm_harness.errors import UserError
from medvlm_harness.results.report.calibration import calibration_section
from medvlm_harness.results.report.cautions import all_cautions, cautions_section
from medvlm_harness.results.report.curves import curves_section
from medvlm_harness.results.report.examples import examples_section
from medvlm_harness.results.report.labels import labels_section, rare_section
from medvlm_harness.results.report.leaderboard import leaderboard_section
from medvlm_harness.results.report.methods import methods_section
from medvlm_harness.results.report.parts import Report, Section
from medvlm_harness.results.report.robustness import robustness_section
from medvlm_harness.results.report.runs import ReportRuns, model_name
from medvlm_harness.results.report.selective import selective_section
from medvlm_harness.results.report.subgroups import subgroups_section
from medvlm_harness.results.report.tradeoff import tradeoff_section
from medvlm_harness.results.run_files import RunFiles

__all__ = ["build_report", "report_sections"]


def report_sections(runs: Mapping[str, RunFiles], *, show_text: bool = False) -> list[Section]:
    """The sections that the runs have something for, in the order they are read.

    Nothing is drawn yet; scores are read, each task of a run once.

    Args:
        runs: name in the report -> run, as `name_runs` gives it; one is enough.
        show_text: show texts and references of tasks that write, where the data set permits.

    Raises:
        UserError: if there is no run, or a file has not the shape that it is written in.
    """
    if not runs:
        raise UserError("Expected results of at least one run, but got none.")
    try:
        return list(_sections(ReportRuns(runs), show_text))
    except (KeyError, TypeError, AttributeError) as error:
        files = ", ".join(str(run.path) for run in runs.values())
        raise UserError(
            f"What {files} hold has not the shape that it is written in ({type(error).__name__}: {error}). "
            "`medvlm results validate` says where."
        ) from error


def build_report(runs: Mapping[str, RunFiles], *, title: str = "Benchmark report", show_text: bool = False) -> Report:
    """The report of some runs.

    Args:
        runs: see `report_sections`.
        title: its heading.
        show_text: see `report_sections`.
    """
    sections = report_sections(runs, show_text=show_text)
    named = ReportRuns(runs)
    severe = [(one, its) for one, its in all_cautions(named) if one.severe]
    alerts = [f"{one} Runs: {', '.join(its)}." if its else str(one) for one, its in severe]
    return Report(title, headline(runs), named.names, named.baselines, alerts, sections)


def headline(runs: Mapping[str, RunFiles]) -> str:
    """How many runs of how many models, on what."""
    models = len({model_name(run) for run in runs.values()})
    data = dict.fromkeys(
        f"{task['dataset']['name']} ({task['split']})" for run in runs.values() for task in run.tasks.values()
    )
    counted = f"{len(runs)} run{'s' * (len(runs) != 1)} of {models} model{'s' * (models != 1)}"
    return f"{counted} on {', '.join(data) or 'no task of ours'}"


def _sections(runs: ReportRuns, show_text: bool) -> Iterator[Section]:
    yield leaderboard_section(runs)
    yield cautions_section(runs)
    for build in (
        tradeoff_section,
        labels_section,
        rare_section,
        curves_section,
        calibration_section,
        selective_section,
        robustness_section,
        subgroups_section,
    ):
        if section := build(runs):
            yield section
    if examples := examples_section(runs, show_text=show_text):
        yield examples
    yield methods_section(runs)
