"""Results on the page of a model: `.eval_results/*.yaml`, or the older model-index in the front matter of its README.

Each headline of a run becomes one entry: the Hub keeps one value per data set and task id.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.results.publishing.checks import headlines
from medvlm_harness.results.run_files import RunFiles

__all__ = ["Entry", "check_repo_id", "entries_of", "eval_results_files", "readme_with_model_index"]

FOLDER = ".eval_results"
_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,95}")
_REVISION = re.compile(r"[0-9a-f]{40}")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# What the Hub calls the kind of task, told by the primary metric; the first that fits.
TASK_TYPES = (
    ("auroc", "zero-shot-image-classification"),
    ("accuracy", "zero-shot-image-classification"),
    ("balanced_accuracy", "zero-shot-image-classification"),
    ("i2t_", "feature-extraction"),
    ("f2i_", "feature-extraction"),
    ("acc", "visual-question-answering"),
    ("rouge", "text-generation"),
)


@dataclass(frozen=True)
class Entry:
    """One headline of a run, checked.

    Attributes:
        dataset: id of the data set on the Hub.
        revision: of that data set, 40 hexadecimal digits; None where it is not known.
        task_id: the task and its metric.
        task: its name.
        metric: its name.
        value: finite.
        split: of the data set.
        date: of the run, ISO 8601 in UTC.
        url: where the results lie.
        notes: how the run was made, in a line.
    """

    dataset: str
    revision: str | None
    task_id: str
    task: str
    metric: str
    value: float
    split: str
    date: str
    url: str
    notes: str


def check_repo_id(repo: str, option: str) -> str:
    """An id as the Hub takes it, with its owner.

    Raises:
        UserError: naming the option.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"Expected {option} to be ORG/NAME, but got {repo!r}: {first_line(error)}") from error
    if repo.count("/") != 1:
        raise UserError(f"Expected {option} to be ORG/NAME, but got {repo!r}: who owns it is part of the id.")
    return repo


def entries_of(run: RunFiles, *, benchmark: str | None, url: str) -> tuple[list[Entry], list[str]]:
    """The headlines of a public run as entries, and what was left out, as sentences.

    Args:
        run: as `public_run` gives it.
        benchmark: id of the data set on the Hub; None where the data came from there, which knows it.
        url: where the results lie.

    Raises:
        UserError: if no id is known, or there is nothing to say.
    """
    entries: list[Entry] = []
    told: list[str] = []
    for task, (metric, estimate) in headlines(run).items():
        details = run.tasks[task]
        dataset: Mapping[str, Any] = details["dataset"]
        known = (dataset.get("policies") or {}).get("hub_id")
        chosen = benchmark or known
        if chosen is None:
            raise UserError(
                f"{task}: the data came from files, so its id on the Hub is not known: name it with "
                "--benchmark ORG/NAME."
            )
        if estimate["value"] is None:
            told.append(f"{task}: no {metric} ({estimate['reason']})")
            continue
        revision = dataset.get("revision") if chosen == known else None
        if revision is None or not _REVISION.fullmatch(str(revision)):
            revision = None
        notes = _notes(run, estimate)
        entries.append(
            _checked(
                Entry(
                    *(check_repo_id(str(chosen), "--benchmark"), revision, f"{task}.{metric}", task, metric),
                    *(float(estimate["value"]), str(details.get("split")), _date(run), url, notes),
                )
            )
        )
    if any(entry.revision is None for entry in entries):
        told.append("the revision of the data set, which is not known")
    if not entries:
        raise UserError(f"{run.path.name}: no task has a headline that could stand on a model's page.")
    if len({(entry.dataset, entry.task_id) for entry in entries}) < len(entries):
        raise UserError(f"{run.path.name}: two headlines have one task id, but the Hub keeps one value for each.")
    return entries, told


def eval_results_files(
    entries: Sequence[Entry], files: Sequence[str], read: Callable[[str], bytes], *, overwrite: bool
) -> dict[str, bytes]:
    """`.eval_results/medvlm-<data set>.yaml` of a model repo with the entries, beside those that it has.

    Args:
        entries: new ones.
        files: paths in the model repo.
        read: gives one of them.
        overwrite: replace values of our own file that differ.

    Raises:
        UserError: if an entry is there already with another value, or a file cannot be read.
    """
    present = {
        path: _parsed(path, read(path)) for path in files if re.fullmatch(rf"{re.escape(FOLDER)}/[^/]+\.yaml", path)
    }
    changed: dict[str, bytes] = {}
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        path = f"{FOLDER}/medvlm-{dataset.partition('/')[2]}.yaml"
        rows = list(present.get(path, []))
        new = [entry for entry in entries if entry.dataset == dataset]
        for entry in new:
            _refuse_other(entry, {other: its for other, its in present.items() if other != path})
            rows = _merged(rows, entry, path, overwrite=overwrite)
        if rows != present.get(path):
            data = yaml.safe_dump(rows, sort_keys=False, allow_unicode=True).encode()
            if _parsed(path, data) != rows:
                raise UserError(f"{path} would not read back as it was written: nothing was proposed.")
            changed[path] = data
    return changed


def readme_with_model_index(readme: str | None, entries: Sequence[Entry], *, name: str, overwrite: bool) -> str | None:
    """The README of a model with the entries in its model-index and all else as it was; None if they are there.

    Args:
        readme: as it is; None where there is none.
        entries: new ones.
        name: of the model, for a README without a model-index.
        overwrite: replace values that differ.

    Raises:
        UserError: if a value is there already and differs, or the front matter cannot be read.
    """
    match = _FRONT.match(readme or "")
    text = (readme or f"\n# {name}\n")[match.end() if match else 0 :]
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise UserError(f"The README's front matter is no YAML ({first_line(error)}): mend it first.") from error
    if not isinstance(front or {}, dict):
        raise UserError("The README's front matter is no mapping: mend it first.")
    front = front or {}
    index = front.get("model-index") or [{"name": name, "results": []}]
    changed = False
    for entry in entries:
        changed |= _index_entry(index, entry, overwrite=overwrite)
    if not changed:
        return None
    matter = yaml.safe_dump(front | {"model-index": index}, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(matter) != front | {"model-index": index}:
        raise UserError("The README's front matter would not read back as it is: add the results by hand.")
    return f"---\n{matter}---\n{text}"


def _checked(entry: Entry) -> Entry:
    """What the Hub does not check, or drops without a word."""
    if not math.isfinite(entry.value):
        raise UserError(f"{entry.task_id}: expected a finite value, but got {entry.value}.")
    if not _TASK_ID.fullmatch(entry.task_id):
        raise UserError(
            f"Expected a task id of letters, digits, dots, dashes, @ and underscores, but got {entry.task_id!r}."
        )
    try:
        datetime.fromisoformat(entry.date)
    except ValueError as error:
        raise UserError(f"{entry.task_id}: expected an ISO 8601 date, but got {entry.date!r}.") from error
    return entry


def _date(run: RunFiles) -> str:
    """lm-eval notes when a run began as seconds since 1970; the file's name has local time."""
    began = run.results.get("date")
    if not isinstance(began, int | float):
        raise UserError(f"{run.path.name}: expected `date` to say when the run began, but got {began!r}.")
    return datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _notes(run: RunFiles, estimate: Mapping[str, Any]) -> str:
    model, versions = run.medvlm["model"], run.medvlm.get("versions") or {}
    ends = estimate.get("ci95")
    quantization = model.get("quantization")
    said = [
        f"95% interval {ends[0]:.4f} to {ends[1]:.4f}" if ends else "no interval",
        f"n {estimate['n']}" if estimate.get("n") is not None else "",
        f"medvlm-harness {versions.get('medvlm-harness')}, lm-eval {versions.get('lm_eval')}",
        str(model.get("precision") or ""),
        f"quantised {quantization['name']}" if isinstance(quantization, Mapping) and "name" in quantization else "",
        f"prompts {model['prompts']}" if model.get("prompts") else "",
        f"weights sha256 {model['weights_sha256'][:12]}" if model.get("weights_sha256") else "",
    ]
    return "; ".join(one for one in said if one)


def _as_row(entry: Entry) -> dict[str, Any]:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    made = EvalResultEntry(
        dataset_id=entry.dataset,
        task_id=entry.task_id,
        value=entry.value,
        dataset_revision=entry.revision,
        date=entry.date,
        source_url=entry.url,
        source_name="medvlm-harness",
        notes=entry.notes,
    )
    (row,) = eval_result_entries_to_yaml([made])
    return dict(row)


def _parsed(path: str, data: bytes) -> list[dict[str, Any]]:
    """The rows of a file, if the Hub's client can read them."""
    from huggingface_hub import parse_eval_result_entries

    try:
        rows: list[dict[str, Any]] = yaml.safe_load(data) or []
        parse_eval_result_entries(rows)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} of the model repo holds no evaluation results ({first_line(error)}): mend it first."
        ) from error
    return rows


def _is_same(row: Mapping[str, Any], entry: Entry) -> bool:
    return bool(row["dataset"]["id"] == entry.dataset and row["dataset"]["task_id"] == entry.task_id)


def _refuse_other(entry: Entry, present: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for path, rows in present.items():
        if any(_is_same(row, entry) for row in rows):
            raise UserError(
                f"{path} of the model repo has a value of {entry.task_id} already, and the Hub keeps one: take it out "
                "first."
            )


def _merged(rows: list[dict[str, Any]], entry: Entry, path: str, *, overwrite: bool) -> list[dict[str, Any]]:
    new = _as_row(entry)
    before = next((row for row in rows if _is_same(row, entry)), None)
    if before is None:
        return [*rows, new]
    if before["value"] == entry.value:
        return rows
    if not overwrite:
        raise _differs(path, entry, before["value"])
    return [new if row is before else row for row in rows]


def _differs(path: str, entry: Entry, before: Any) -> UserError:
    return UserError(
        f"{path} of the model repo has {before} as {entry.task_id}, and this run has {entry.value}: --overwrite "
        "proposes to replace it."
    )


def _index_entry(index: list[dict[str, Any]], entry: Entry, *, overwrite: bool) -> bool:
    """Add an entry to a model-index, in place; whether it was changed."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    kind = next((kind for start, kind in TASK_TYPES if entry.metric.startswith(start)), "other")
    new = EvalResult(
        task_type=kind,
        dataset_type=entry.dataset,
        dataset_name=entry.dataset.partition("/")[2],
        metric_type=entry.metric,
        metric_value=entry.value,
        task_name=entry.task,
        dataset_split=entry.split,
        dataset_revision=entry.revision,
        metric_name=entry.task_id,
    )
    try:
        for model in index:
            for result in model["results"]:
                for metric in result["metrics"]:
                    one = {"name": str(model.get("name")), "results": [{**result, "metrics": [metric]}]}
                    ((before,),) = (model_index_to_eval_results([one])[1],)
                    if not new.is_equal_except_value(_unsourced(before)):
                        continue
                    if metric["value"] == entry.value:
                        return False
                    if not overwrite:
                        raise _differs("README.md", entry, metric["value"])
                    metric["value"] = entry.value
                    return True
        (made,) = eval_results_to_model_index("", [new])
        result = made["results"][0] | {"source": {"name": "medvlm-harness", "url": entry.url}}
        index[0]["results"].append(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The README's model-index has not its shape ({first_line(error)}): mend it first.") from error
    return True


def _unsourced(result: Any) -> Any:
    """Another run of the same is the same metric, wherever its results lie."""
    from dataclasses import replace

    return replace(result, source_name=None, source_url=None)
