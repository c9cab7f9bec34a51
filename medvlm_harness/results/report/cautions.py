"""What must be known before a number is believed: of one run, and of runs that stand beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medvlm_harness.results.manifest import changes
from medvlm_harness.results.report.parts import Cell, Column, Section, Table
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.run_cost import EFFICIENCY
from medvlm_harness.results.run_files import RunFiles

__all__ = ["Caution", "all_cautions", "cautions", "cautions_between", "cautions_section"]

CUT = 0.05  # share of texts that a tokenizer cuts, from which on it is said
# What makes the same numbers other numbers.
VERSIONS = ("medvlm-harness", "lm_eval", "torch", "transformers", "open_clip_torch")
FEW = "fewer than"


@dataclass(frozen=True)
class Caution:
    """One thing to know.

    Attributes:
        kind: in two or three words.
        text: what it is, as half a sentence.
        severe: the numbers it is about must not be taken for what they seem.
        tasks: that it is about; none where it is about all of them.
    """

    kind: str
    text: str
    severe: bool = False
    tasks: tuple[str, ...] = ()

    def __str__(self) -> str:
        about = f" ({', '.join(self.tasks)})" if self.tasks else ""
        return f"{self.kind}: {self.text}{about}."


def cautions(run: RunFiles) -> list[Caution]:
    """What must be known of one run, the severe first; each thing once, with the tasks that it is about."""
    found: dict[Caution, list[str]] = {}
    for task, details in run.tasks.items():
        for caution in _of_task(task, details):
            found.setdefault(caution, []).append(task)
    every = sum(not task.endswith(EFFICIENCY) for task in run.tasks)
    said = [*_of_files(run), *_of_model(run)]
    said += [replace(one, tasks=() if len(tasks) == every > 1 else tuple(tasks)) for one, tasks in found.items()]
    return sorted(said, key=lambda caution: not caution.severe)


def _of_files(run: RunFiles) -> Iterator[Caution]:
    """Whether the run's files are as it wrote them."""
    for change in changes(run.path, run.results) or ():
        yield Caution("Changed", change, severe=True)


def _of_task(task: str, details: Mapping[str, Any]) -> Iterator[Caution]:
    if task.endswith(EFFICIENCY):
        return
    yield from _of_training(details)
    if details["scored"] < details["documents"]:
        yield Caution("Limited run", f"only {details['scored']} items were scored, of more", severe=True)
    if details.get("perturbation"):
        one = details["perturbation"]
        yield Caution(
            "Disturbed inputs", f"inputs were changed by {one.get('name')}@{one.get('severity')}", severe=True
        )
    if remote := details.get("remote"):
        yield Caution("Sent elsewhere", f"documents were sent to {remote}")
    if (split := details["split"]) != "test":
        yield Caution("Split", f"scored on {split}, not on test alone")
    if source := details.get("label_source"):
        policies = details["dataset"].get("policies") or {}
        said = f"truth is {source}"
        kind = policies.get(f"labels_{source}")
        if version := details.get("mesh_findings_version"):
            kind = f"terms of the coders of the reports, read by mesh_findings.yaml version {version}"
        said += f": {kind}" if kind else "; how it was made, the data set does not say"
        uncertain = details.get("uncertain")
        yield Caution("Label source", said + (f"; uncertain labels: {uncertain}" if uncertain else ""))
    if details["dataset"].get("source") == "hub" and details["dataset"].get("revision") is None:
        yield Caution("Unpinned data", "the data set has no revision: another day may give other data")
    for text, share in (details.get("truncated_share") or {}).items():
        if share is not None and share >= CUT:
            yield Caution("Texts cut", f"the tokenizer cut {share:.0%} of {text} texts")
    if cut := details.get("answers_cut"):
        yield Caution("Answers cut", f"{cut} answers ended at the length limit")
    if few := _few_positives(details):
        yield Caution("Few positives", few)


def _of_training(details: Mapping[str, Any]) -> Iterator[Caution]:
    """What the model may have seen of the data."""
    contamination = details["contamination"]
    seen, asked = set(contamination.get("splits_seen") or ()), set(str(details["split"]).split("+"))
    if both := sorted(seen & asked):
        yield Caution(
            "Contaminated", f"the model was trained on the {' and '.join(both)} split it is scored on", severe=True
        )
    elif seen:
        name = details["dataset"]["name"]
        yield Caution(
            "Home data",
            f"the model learnt from the {' and '.join(sorted(seen))} split of {name}; other data will be harder",
        )
    elif note := contamination.get("note"):
        yield Caution("Training data", str(note))


def _few_positives(details: Mapping[str, Any]) -> str:
    """Labels that means leave out, with their counts."""
    macro = details["metrics"].get("auroc")
    left_out = (macro["extra"].get("left_out_positives") or {}) if macro else {}
    its = ", ".join(f"{label.replace('_', ' ')} {count}" for label, count in left_out.items())
    return f"left out of the mean AUROC for too few positives or negatives: {its}" if its else ""


def _of_model(run: RunFiles) -> Iterator[Caution]:
    model, tasks = run.medvlm["model"], run.tasks
    card = model.get("card")
    if not isinstance(card, Mapping):
        yield Caution("Unknown model", "lm-eval's own model class: weights, training data and precision are not known")
    elif card.get("family") != "baseline":
        source = card.get("source")
        pinned = isinstance(source, Mapping) and source.get("revision")
        if model.get("weights_sha256") is None:
            yield Caution(
                "Unpinned weights", "no hash of the weights is known: another copy may be other weights", severe=True
            )
        elif not pinned:
            yield Caution(
                "Local weights",
                f"weights have no published revision; their SHA-256 starts {str(model['weights_sha256'])[:12]}",
            )
    if (limit := (run.results.get("config") or {}).get("limit")) and not any(
        one["scored"] < one["documents"] for one in tasks.values()
    ):
        yield Caution("Limited run", f"run with --limit {limit}", severe=True)
    measured = any(task.endswith(EFFICIENCY) for task in tasks)
    if not measured and not (isinstance(card, Mapping) and card.get("family") == "baseline"):
        yield Caution("Cost not measured", "no efficiency task was run: costs are what was counted along the way")


def cautions_between(runs: ReportRuns) -> list[Caution]:
    """Why runs may not be read beside each other, however like their tables look."""
    said: list[Caution] = []
    by_task: dict[str, list[str]] = {}
    for group in runs.groups(lambda details: True):
        if group.differs:
            by_task.setdefault(group.task, []).append(f"{', '.join(group.runs)}: {group.differs}")
    for task, groups in by_task.items():
        said.append(
            Caution(
                "Not comparable",
                f"{task} was run on unlike data; it has a column for each: {'; '.join(groups)}",
                severe=True,
            )
        )
    for name in VERSIONS:
        found: dict[str, list[str]] = {}
        for run, files in runs.files.items():
            version = (files.medvlm.get("versions") or {}).get(name)
            found.setdefault("unknown" if version is None else str(version), []).append(run)
        if len(found) > 1:
            its = "; ".join(f"{version} ({', '.join(members)})" for version, members in found.items())
            said.append(Caution("Other software", f"{name} differs: {its}"))
    hardware: dict[str, list[str]] = {}
    for run, files in runs.files.items():
        if known := (files.medvlm.get("efficiency") or {}).get("hardware"):
            hardware.setdefault(f"{known.get('gpu') or known.get('cpu')}, {known.get('cores')} cores", []).append(run)
    if len(hardware) > 1:
        its = "; ".join(f"{name} ({', '.join(members)})" for name, members in hardware.items())
        said.append(Caution("Other hardware", f"costs were measured on unlike machines: {its}", severe=True))
    return said


def all_cautions(runs: ReportRuns) -> list[tuple[Caution, list[str]]]:
    """Each caution once, with the tasks and the runs it is about (no run: it is between runs); severe first."""
    tasks: dict[Caution, list[str]] = {}
    members: dict[Caution, list[str]] = {}
    for caution in cautions_between(runs):
        tasks[caution], members[caution] = [], []
    for run, files in runs.files.items():
        for caution in cautions(files):
            same = replace(caution, tasks=())
            tasks.setdefault(same, []).extend(caution.tasks)
            members.setdefault(same, []).append(run)
    merged = [(replace(one, tasks=tuple(dict.fromkeys(tasks[one]))), its) for one, its in members.items()]
    return sorted(merged, key=lambda item: not item[0].severe)


def cautions_section(runs: ReportRuns) -> Section:
    """All cautions."""
    found = all_cautions(runs)
    rows: list[dict[str, Cell]] = [
        {
            "kind": f"Severe: {one.kind}" if one.severe else one.kind,
            "text": one.text,
            "tasks": ", ".join(one.tasks) or "all",
            "runs": "between runs" if not its else "all" if its == runs.names else ", ".join(its),
        }
        for one, its in found
    ]
    titles = {"kind": "What", "text": "Why it matters", "tasks": "Tasks", "runs": "Runs"}
    severe = sum(one.severe for one, _ in found)
    text = (
        f"{severe} severe: the numbers they are about must not be taken as they stand."
        if severe
        else "None is severe; all bear on what the numbers mean."
    )
    table = Table("cautions", "What to know", [Column(*one) for one in titles.items()], rows)
    return Section("cautions", "Cautions", (text,), [table])
