"""The results data set repo: where each run lies in it, and its one shared file, the README."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.results.publishing.card import escaped_table, render
from medvlm_harness.results.publishing.tables import TABLES

__all__ = ["DEFAULT_LICENCE", "README", "SUMMARY", "is_summary", "read_summary", "repository_readme"]

README = "README.md"
SUMMARY = "summary.json"
DEFAULT_LICENCE = "cc-by-4.0"
"""Of the results: numbers, not the data they are of."""
BEGIN = "<!-- medvlm push writes what stands from here on; write above or below it -->"
END = "<!-- medvlm push writes what stands up to here -->"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
TAGS = (
    *("medical", "radiology", "chest-x-ray", "benchmark", "vision-language", "lm-evaluation-harness", "evaluation"),
    "medvlm-harness",
)
CATEGORIES = ("zero-shot-image-classification", "visual-question-answering", "image-to-text")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_SUMMARY_PATH = re.compile(rf"runs/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+/{re.escape(SUMMARY)}")


def is_summary(path: str) -> bool:
    """Whether a file of the repo is the summary of a run."""
    return _SUMMARY_PATH.fullmatch(path) is not None


def read_summary(path: str, data: bytes) -> dict[str, Any]:
    """The summary of a run that somebody pushed.

    Raises:
        UserError: if it has not the shape of one.
    """
    try:
        summary: dict[str, Any] = json.loads(data)
        shaped = isinstance(summary["run"], str) and isinstance(summary["tables"], dict)
        shaped &= all(
            isinstance(one["task"], str) and {"metric", "value"} <= one.keys() for one in summary["headlines"]
        )
        shaped &= isinstance(summary["marks"], list)
        shaped &= all(name in TABLES and isinstance(rows, int) for name, rows in summary["tables"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} in the repo is no summary of a run ({first_line(error)}): mend or delete it."
        ) from error
    if not shaped or summary["run"] != path.removesuffix(f"/{SUMMARY}"):
        raise UserError(f"{path} in the repo is no summary of the run in its folder: mend or delete it.")
    return summary


def repository_readme(
    summaries: Sequence[Mapping[str, Any]], *, repo: str, licence: str | None, existing: str | None
) -> str:
    """The README of the repo: its front matter, and a row for each run; what others wrote around it is kept.

    Args:
        summaries: of all runs in the repo, the new one among them, in any order.
        repo: ORG/NAME.
        licence: of the results; None leaves the one that is there.
        existing: the README that is there; None where there is none.

    Raises:
        UserError: if the README that is there was not written here, or names another licence.
    """
    front, before, after = _taken_apart(existing, repo)
    present = front.get("license")
    if licence is not None and present not in (None, licence):
        raise UserError(
            f"The results in {repo} are under {present}, but --licence says {licence}: use another --repo, or change "
            "the licence of all results in the README first."
        )
    ordered = sorted(summaries, key=lambda one: str(one["run"]))
    ours = _front_matter(ordered, repo, licence or present or DEFAULT_LICENCE)
    body = render(
        "repository.md",
        title=front.get("pretty_name") or ours["pretty_name"],
        table=_runs_table(ordered),
        marks=[(one["run"], mark) for one in ordered for mark in one["marks"]],
    )
    matter = yaml.safe_dump(
        ours | {k: v for k, v in front.items() if k not in ours or k == "pretty_name"}, sort_keys=False
    )
    return f"---\n{matter}---\n{before}{BEGIN}\n\n{body}\n{END}{after or chr(10)}"


def _taken_apart(existing: str | None, repo: str) -> tuple[dict[str, Any], str, str]:
    """Front matter, and what stands before and after our part."""
    if existing is None:
        return {}, "\n", ""
    match = _FRONT.match(existing)
    text = existing[match.end() :] if match else existing
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(
            f"{repo} has a README that `medvlm push` did not write: use another --repo, or delete that README first."
        )
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise UserError(f"The README of {repo} has front matter that is no YAML: {first_line(error)}") from error
    if not isinstance(front, dict):
        raise UserError(f"The README of {repo} has front matter that is no mapping: mend it first.")
    before, _, rest = text.partition(BEGIN)
    return front, before, rest.partition(END)[2]


def _front_matter(summaries: Sequence[Mapping[str, Any]], repo: str, licence: str) -> dict[str, Any]:
    rows = sum(sum(one["tables"].values()) for one in summaries)
    tables = [table for table in TABLES if any(table in one["tables"] for one in summaries)]
    return {
        "license": licence,
        "language": ["en"],
        "pretty_name": f"Results of medical vision-language models ({repo.partition('/')[2]})",
        "tags": list(TAGS),
        "task_categories": list(CATEGORIES),
        "size_categories": [next((name for most, name in SIZES if rows < most), "n>1M")],
        # A pattern, not a list: no file has to name all runs for the tables to hold them.
        "configs": [
            {"config_name": table, "data_files": [{"split": "test", "path": f"runs/*/*/{table}.parquet"}]}
            for table in tables
        ],
    }


def _runs_table(summaries: Sequence[Mapping[str, Any]]) -> Any:
    from markupsafe import Markup

    rows = []
    for one in summaries:
        said = [f"{its['task']} {its['metric']} {_number(its['value'])}" for its in one["headlines"]]
        marked = "marked" if one["marks"] else ""
        rows.append((one.get("model"), one.get("precision"), one.get("date"), "; ".join(said), one.get("data"), marked))
    table = escaped_table(["Model", "Precision", "Date", "Headlines", "Data", ""], rows, longest=2_000)
    # The folder's name is checked: it can hold nothing but letters, digits, dots, dashes and underscores.
    links = [f"- [{one['run']}]({one['run']}/card.md)" for one in summaries]
    return Markup(f"{table}\nCards:\n\n" + "\n".join(links) + "\n")  # noqa: S704


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "undefined"
