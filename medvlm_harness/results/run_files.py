"""The files of finished runs: finding them, and reading what may come from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medvlm_harness.errors import UserError, first_line

__all__ = ["RunFiles", "find_run", "find_runs", "read_run"]

SCHEMA_VERSIONS = (1,)
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
    if not folder.is_dir():
        raise UserError(f"Expected a folder of runs (what --output_path named), but {folder} is none.")
    dated = ((_DATED.match(path.name), path) for path in sorted(folder.rglob("*.json")))
    found = [(match["date"], path) for match, path in dated if match and match["stem"] != _OTHERS]
    return [read_run(path) for _, path in sorted(found, reverse=True)]


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
    if wrong := _misshapen(results):
        raise UserError(f"Expected the results file of a run, but {path} is none: {wrong}.")
    dated = _DATED.match(path.name)
    scores = path.parent / f"run_{dated['date']}" / "scores.parquet" if dated else None
    return RunFiles(path, results, scores if scores is not None and scores.is_file() else None)


def _misshapen(results: Any) -> str | None:
    """What is wrong with a results file; None if all that is read of it elsewhere has the right shape."""
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        return "it has no mapping `results`"
    if "medvlm" not in results:
        return None
    block = results["medvlm"]
    if not isinstance(block, dict) or block.get("schema_version") not in SCHEMA_VERSIONS:
        version = block.get("schema_version") if isinstance(block, dict) else None
        return f"its block `medvlm` has schema_version {version!r}, not {' or '.join(map(str, SCHEMA_VERSIONS))}"
    for key in ("model", "tasks"):
        if not isinstance(block.get(key), dict):
            return f"its block `medvlm` has no mapping `{key}`"
    for task, details in block["tasks"].items():
        if not isinstance(details, dict) or not isinstance(details.get("dataset"), dict):
            return f"its task {task} has no mapping `dataset`"
        metrics = details.get("metrics")
        if not isinstance(metrics, dict) or not all(map(_is_estimate, metrics.values())):
            return f"its task {task} has no mapping `metrics` of estimates"
    return None


def _is_estimate(one: Any) -> bool:
    """Whether it has what `Estimate.to_dict` gives, as far as comparisons read it."""
    if not isinstance(one, dict) or not {"value", "ci95", "reason"} <= one.keys():
        return False
    interval = one["ci95"]
    return _is_number(one["value"]) and (
        interval is None or (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)))
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
