"""Everything that one push sends, looked through before it is: releases, the texts to look for, and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from medvlm_harness.data.locate import find_prepared
from medvlm_harness.data.records import STUDIES_FILE
from medvlm_harness.errors import UserError
from medvlm_harness.results.publishing.release import Release, make_release
from medvlm_harness.results.publishing.scan import (
    Finding,
    report_texts,
    sample_texts,
    scan_for_reports,
    scan_for_secrets,
)
from medvlm_harness.results.run_files import RunFiles, find_runs, read_run
from medvlm_harness.results.samples import samples_files
from medvlm_harness.results.sharing import sharing_of

__all__ = ["only_run", "prepare_releases", "refuse_findings", "unscanned"]


def only_run(path: Path) -> RunFiles:
    """A run by its results file, or by a folder that holds just one.

    Raises:
        UserError: if there is none, or there are several: which one goes out must be said.
    """
    if not path.is_dir():
        return read_run(path)
    found = find_runs(path)
    if len(found) != 1:
        names = ", ".join(str(run.path) for run in found[:5]) or "none"
        raise UserError(f"Expected one run in {path}, but it holds {len(found)} ({names}): name the results file.")
    return found[0]


def prepare_releases(runs: Sequence[RunFiles], *, data_dir: Path | None, samples: bool, force: bool) -> list[Release]:
    """The releases of runs, after every file of them was looked through.

    Args:
        runs: as they lie on this machine.
        data_dir: where prepared data lies, if not where it is sought.
        samples: with per-study scores, as far as data sets permit.
        force: with marks, what would be refused otherwise; never what the scan finds.

    Raises:
        UserError: if a run cannot or should not go out, or a file holds what must not.
    """
    releases = []
    for run in runs:
        missing = unscanned(run, data_dir)
        if missing and not force:
            raise UserError(
                f"{run.path.name}: whether words of reports go out can not be looked for: neither the prepared set "
                f"{', '.join(missing)} nor the run's samples are on this machine. Name the set's folder with "
                "--data-dir, or say --force, which is marked on the card."
            )
        marks = [f"no reports of {name} were at hand to compare its files with" for name in missing]
        release = make_release(run, samples=samples, force=force, marks=marks)
        refuse_findings(release.files, chain.from_iterable(_texts(run, data_dir)))
        releases.append(release)
    if len({release.folder for release in releases}) < len(releases):
        raise UserError("Expected different runs, but got one of them twice.")
    return releases


def refuse_findings(files: Mapping[str, bytes], texts: Iterable[str] = ()) -> None:
    """Refuse files that hold a secret, a path of this machine, or words of one of the texts.

    Raises:
        UserError: naming file, place and kind, never what was found.
    """
    found: list[Finding] = [*scan_for_secrets(files), *scan_for_reports(files, texts)]
    if found:
        said = "; ".join(f"{one.file}, {one.place}: {one.kind}" for one in found[:5])
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"Nothing was pushed, for this must not go out: {said}{more}. Where it comes from the results file, run "
            "the evaluation again without it (tokens belong in HF_TOKEN, models in a folder with a plain name)."
        )


def unscanned(run: RunFiles, data_dir: Path | None) -> list[str]:
    """The data sets of a run that may not be shared in full and whose reports are not at hand."""
    if samples_files(run):
        return []
    return sorted(name for name in _closed(run) if _folder(name, data_dir) is None)


def _texts(run: RunFiles, data_dir: Path | None) -> Iterator[Iterator[str]]:
    """What must not be among the words that go out."""
    closed = _closed(run)
    for name in closed:
        if (folder := _folder(name, data_dir)) is not None:
            yield report_texts(folder)
    if closed:
        yield from map(sample_texts, samples_files(run).values())


def _closed(run: RunFiles) -> set[str]:
    return {str(one["dataset"].get("name")) for task, one in run.tasks.items() if sharing_of({task: one}) != "full"}


def _folder(name: str, data_dir: Path | None) -> Path | None:
    if data_dir is None:
        return find_prepared(name)
    return next((one for one in (data_dir, data_dir / name) if (one / STUDIES_FILE).is_file()), None)
