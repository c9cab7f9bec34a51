"""The files of finished runs: finding them, and reading what may come from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm_harness.errors import UserError, first_line

if TYPE_CHECKING:
    from medvlm_harness.results.score_table import ScoreTable

__all__ = ["RunFiles", "at_place", "find_run", "find_runs", "read_run", "results_files", "run_folder"]

# lm-eval's date, at the end of every file of a run; without a fraction where the second was full.
_DATED = re.compile(r"^(?P<stem>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)\.json$")
_OTHERS = "stability"  # a file of ours with such a name that holds no results


@dataclass(frozen=True)
class RunFiles:
    """One finished run.

    Attributes:
        path: its results file.
        results: what that holds; of a run of our tasks or models with the block `medvlm`, checked.
        scores: its scores.parquet, None where there is none beside the results.
    """

    path: Path
    results: Mapping[str, Any]
    scores: Path | None
    _tables: dict[str, ScoreTable] = field(default_factory=dict, repr=False, compare=False)

    @property
    def date(self) -> str:
        """When it was written, as its files' names say it."""
        return self.path.stem.rpartition("_")[2]

    @cached_property
    def medvlm(self) -> Mapping[str, Any]:
        """Our block.

        Raises:
            UserError: if the run has none: it was one of other tasks, or of an lm-eval without this package.
        """
        block: Mapping[str, Any] | None = self.results.get("medvlm")
        if block is None:
            raise UserError(f"{self.path} has no block `medvlm`: expected the results of a run with medvlm-harness.")
        return block

    @property
    def tasks(self) -> Mapping[str, Any]:
        """Task -> what our block says of it."""
        tasks: Mapping[str, Any] = self.medvlm["tasks"]
        return tasks

    def score_table(self, task: str) -> ScoreTable:
        """The answers to one task, read once.

        Raises:
            UserError: if there is no scores.parquet, or as `read_scores`.
        """
        from medvlm_harness.results.score_table import read_scores

        if self.scores is None:
            raise UserError(f"there is no scores.parquet beside {self.path.name}")
        if task not in self._tables:
            self._tables[task] = read_scores(self.scores, task)
        return self._tables[task]


def at_place(details: Any, place: str) -> Any:
    """What stands at a place with dots in nested mappings; None where there is nothing.

    >>> at_place({"dataset": {"name": "iu_cxr"}}, "dataset.name")
    'iu_cxr'
    """
    for key in place.split("."):
        details = details.get(key) if isinstance(details, Mapping) else None
    return details


def results_files(folder: Path) -> list[Path]:
    """The results files in a folder and those below it, newest first.

    Raises:
        UserError: if the folder is none.
    """
    if not folder.is_dir():
        raise UserError(f"Expected a folder of runs (what --output_path named), but {folder} is none.")
    dated = ((_DATED.match(path.name), path) for path in sorted(folder.rglob("*.json")))
    found = [(match["date"], path) for match, path in dated if match and match["stem"] != _OTHERS]
    return [path for _, path in sorted(found, reverse=True)]


def run_folder(path: Path) -> Path | None:
    """Where the further files of a run lie, by its results file; None where that was renamed."""
    dated = _DATED.match(path.name)
    return path.parent / f"run_{dated['date']}" if dated else None


def find_run(path: Path) -> RunFiles:
    """One run by its results file, or the newest one in a folder.

    Raises:
        UserError: if there is none.
    """
    if path.is_file():
        return read_run(path)
    if found := find_runs(path):
        return found[0]
    raise UserError(f"Expected the results file of a run, or a folder with one, but {path} has none.")


def find_runs(folder: Path) -> list[RunFiles]:
    """All runs in a folder and those below it, newest first.

    Raises:
        UserError: if the folder is none, or the results of a run cannot be read.
    """
    return [read_run(path) for path in results_files(folder)]


def read_run(path: Path) -> RunFiles:
    """A run by its results file.

    Raises:
        UserError: if the file cannot be read or holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Expected the results file of a run, but {path} cannot be read: {first_line(error)}"
        ) from error
    from medvlm_harness.results.schema import shape_errors

    if wrong := next(shape_errors(results, complete=False), None):
        raise UserError(f"Expected the results file of a run, but {path} is none: {wrong}.")
    folder = run_folder(path)
    scores = folder / "scores.parquet" if folder else None
    return RunFiles(path, results, scores if scores is not None and scores.is_file() else None)
