"""The runs of a report: their names, what sections ask of them, and which of them may stand side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.results.comparing.comparison import SAME
from medvlm_harness.results.run_cost import EFFICIENCY
from medvlm_harness.results.run_files import RunFiles, at_place
from medvlm_harness.results.score_table import ScoreTable

__all__ = ["Group", "ReportRuns", "model_name", "name_runs", "option_name"]

Details = Mapping[str, Any]
# What tells two runs of one model apart, first come first, and how a name says it.
TELLING: Sequence[Callable[[RunFiles], str]] = (
    lambda run: option_name(_of(run, "quantization")) or str(_of(run, "precision") or ""),
    lambda run: option_name(_of(run, "adapter")),
    lambda run: f"{_of(run, 'prompts')} prompts" if _of(run, "prompts") else "",
    lambda run: str(_of(run, "preprocessing") or ""),
    lambda run: str(_of(run, "device") or ""),
    lambda run: str(_of(run, "weights_sha256") or "")[:8],
    lambda run: f"limit {limit}" if (limit := (run.results.get("config") or {}).get("limit")) else "",
)
# Beside what comparisons want alike: a part of the documents is another test.
ALIKE = {**SAME, "scored": "documents scored"}


@dataclass(frozen=True)
class Group:
    """Runs of one task whose numbers may stand in one column.

    Attributes:
        task: its name.
        runs: by name, in the order of the report.
        differs: what tells the group from the task's other groups; empty where it is the only one.
    """

    task: str
    runs: Sequence[str]
    differs: str

    @property
    def title(self) -> str:
        """The task, and what its runs have in common that others have not."""
        return f"{self.task} ({self.differs})" if self.differs else self.task

    @property
    def name(self) -> str:
        """For files and anchors."""
        return f"{self.task}_{self.differs}" if self.differs else self.task


@dataclass(frozen=True)
class ReportRuns:
    """Finished runs by their names in the report; scores are read when they are asked for."""

    files: Mapping[str, RunFiles]

    @property
    def names(self) -> list[str]:
        """Of the runs, in order."""
        return list(self.files)

    @property
    def baselines(self) -> frozenset[str]:
        """Runs of no model: floors and ceilings."""
        return frozenset(run for run in self.files if (self.model(run).get("card") or {}).get("family") == "baseline")

    def model(self, run: str) -> Mapping[str, Any]:
        """What the run says of its model."""
        model: Mapping[str, Any] = self.files[run].medvlm["model"]
        return model

    def details(self, run: str, task: str) -> Details | None:
        """What the run says of a task; None where it has none."""
        found: Details | None = self.files[run].tasks.get(task)
        return found

    def unsupported(self, run: str) -> Mapping[str, str]:
        """Task -> why the model cannot do it."""
        found: Mapping[str, str] = self.files[run].medvlm.get("unsupported", {})
        return found

    def tasks(self) -> list[str]:
        """All tasks that any run has, in the order in which they first come."""
        return list(dict.fromkeys(task for run in self.files.values() for task in run.tasks))

    def groups(self, wanted: Callable[[Details], bool]) -> Iterator[Group]:
        """The tasks that a section is about, each with runs that may be compared; those of unlike data stand apart.

        Args:
            wanted: whether it is about a task, by what a run says of it. Tasks of efficiency are never meant.
        """
        for task in self.tasks():
            if task.endswith(EFFICIENCY):
                continue
            having = {run: self.files[run].tasks[task] for run in self.files if task in self.files[run].tasks}
            having = {run: details for run, details in having.items() if wanted(details)}
            alike: dict[str, list[str]] = {}
            for run, details in having.items():
                alike.setdefault(json.dumps([at_place(details, place) for place in ALIKE], sort_keys=True), []).append(
                    run
                )
            for members in alike.values():
                yield Group(task, members, _telling(having, members) if len(alike) > 1 else "")

    def places(self, runs: Iterable[str]) -> dict[str, int]:
        """Run -> its place in the report, by which it has its colour in every figure."""
        return {run: self.names.index(run) for run in runs}

    def short(self, group: Group) -> str:
        """A task in words; without the data set's name where the report is of one only."""
        sets = {str(details["dataset"]["name"]) for run in self.files.values() for details in run.tasks.values()}
        task = group.task
        if len(sets) == 1:
            task = task.removeprefix(f"{sets.pop()}_")
        words = task.replace("_", " ").capitalize()
        return f"{words} ({group.differs})" if group.differs else words

    def estimate(self, run: str, task: str, metric: str) -> Estimate | None:
        """A metric of a run; None where the run has none of that name."""
        details = self.details(run, task)
        found = details["metrics"].get(metric) if details else None
        return Estimate.from_dict(found) if found else None

    def lower_is_better(self, run: str, task: str, metric: str) -> bool:
        """Whether the task's declaration says so."""
        return not self.files[run].results.get("higher_is_better", {}).get(task, {}).get(metric, True)

    def scores(self, run: str, task: str) -> ScoreTable | None:
        """The answers of a run to a task; None where no file of them lies beside its results."""
        files = self.files[run]
        return None if files.scores is None else files.score_table(task)


def name_runs(files: Iterable[RunFiles]) -> dict[str, RunFiles]:
    """A short name for each run: its model, then what tells it from other runs of that model.

    Raises:
        UserError: if one run is given twice, or a file holds no run of ours.
    """
    runs = list(files)
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("Expected different runs, but got one of them twice.")
    names = [" ".join(filter(None, (model_name(run), str(_of(run, "kind") or "")))) for run in runs]
    for tell in TELLING:
        told = [tell(run) for run in runs]
        alike = [{told[k] for k, other in enumerate(names) if other == name} for name in names]
        names = [
            f"{name} {one}" if one and len(its) > 1 else name for name, one, its in zip(names, told, alike, strict=True)
        ]
    numbered = [
        f"{name} #{names[:k].count(name) + 1}" if names.count(name) > 1 else name for k, name in enumerate(names)
    ]
    return dict(zip(numbered, runs, strict=True))


def model_name(run: RunFiles) -> str:
    """What its card calls the model; else the class that ran it."""
    model = run.medvlm["model"]
    card = model.get("card")
    named = card.get("name") if isinstance(card, Mapping) else model.get("class")
    return str(named or run.results.get("model_name") or run.path.parent.name)


def _of(run: RunFiles, key: str) -> Any:
    """An option of the run's model."""
    return run.medvlm["model"].get(key)


def option_name(option: Any) -> str:
    """An adapter or a quantisation in a word."""
    if isinstance(option, Mapping):
        named = next((option[key] for key in ("method", "name", "scheme") if option.get(key)), None)
        return str(named) if named else "changed"
    return str(option or "")


def _telling(having: Mapping[str, Details], members: Sequence[str]) -> str:
    """In what a group is not as all others are, in words."""
    first = having[members[0]]
    unlike = [
        place for place in ALIKE if any(at_place(one, place) != at_place(first, place) for one in having.values())
    ]
    said = [(ALIKE[place], at_place(first, place)) for place in unlike]
    # A hash or a long list says nothing to a reader; which runs it is about does.
    short = [f"{what} {value}" for what, value in said if isinstance(value, str | int) and len(str(value)) <= 24]
    return ", ".join(short) or f"other {said[0][0]}: {', '.join(members)}"
