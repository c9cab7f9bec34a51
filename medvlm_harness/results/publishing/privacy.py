"""What of a run may leave this machine: aggregates without small cells, and what a data set permits beyond.

Of data that is shared in full everything counted goes out as it is. Of other data a count from 1 to 9 could point at a
person, so it is withheld, and so is whatever gives it away:

- of a label with so few positives or negatives every number, in all blocks: an AUROC, a sensitivity or a prevalence is
  a fraction whose denominator is the count; and a mean over labels that such a one is among;
- of a subgroup table all counts where one is so small, or where the totals less the shown ones (those of whom nobody
  knows the subgroup) are; what stays is rounded to two decimals, from which no count can be solved for;
- bins of a reliability diagram are merged until each holds enough, and a risk-coverage curve starts where it does.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.subgroups import SMALLEST_SHOWN
from medvlm_harness.results.sharing import sharing_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "WITHHELD",
    "label_blocks",
    "label_of",
    "labels_of",
    "per_study_scores",
    "without_small_cells",
]

WITHHELD = f"withheld: a count below {SMALLEST_SHOWN}"
# Of a block of one label: what was fitted on validation has counts of its own.
_FITTED = ("scaling", "threshold")
_COUNTS = ("n", "positives", "negatives")
# Counts in sentences ("validation has 5 positives and 291 negatives"): beside a small one no other may stay.
_COUNTED = r"(positives?|negatives?|stud(?:y|ies)|patients?|images?|items?|reports?)\b"
_SMALL_TOLD, _TOLD = re.compile(rf"\b[1-9] {_COUNTED}"), re.compile(rf"\b\d+ {_COUNTED}")
_IDS = ("study", "patient", "image", "answer")


# --- per-study scores


def per_study_scores(scores: Path, tasks: Mapping[str, Any]) -> pa.Table:
    """The scores of a run as its data sets permit: ids as they are, or each as a salted hash and rows in their order.

    The salt is drawn anew and kept nowhere, so hashes of two releases cannot be joined, and ids cannot be tried out.
    No text is among them in any case.

    Raises:
        UserError: if a task's data set permits aggregates alone.
    """
    import pyarrow.parquet as pq

    refused = sorted(name for name, task in tasks.items() if sharing_of({name: task}) == "aggregate")
    if refused:
        raise UserError(
            f"--samples: {', '.join(refused)} may not be shared by study (sharing: aggregate in the task's YAML). "
            "Leave out --samples: aggregates go out in any case."
        )
    table = pq.read_table(scores)
    if sharing_of(tasks) == "full":
        return table
    return _hashed(table, secrets.token_bytes(32))


def _hashed(table: pa.Table, salt: bytes) -> pa.Table:
    """Ids replaced, the patient's left out; `answer` is the start of a text's plain hash, which could be tried out."""
    import pyarrow as pa

    for name in set(_IDS) - {"patient"}:
        values = table.column(name).to_pylist()
        known = {value: _digest(salt, name, value) for value in set(values) - {None}}
        hashed = pa.array([known.get(value) for value in values], pa.string())
        table = table.set_column(table.schema.get_field_index(name), name, hashed)
    return table.drop_columns(["patient"]).sort_by(
        [(name, "ascending") for name in ("task", "label", "study", "image")]
    )


def _digest(salt: bytes, kind: str, value: str) -> str:
    return hmac.new(salt, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()[:32]


# --- small cells


def without_small_cells(details: Mapping[str, Any]) -> dict[str, Any]:
    """One task of a results file without what a count from 1 to 9 could be read from; the data's sharing decides.

    Speeds and memory are no counts of people: the efficiency track stays as it is.
    """
    if sharing_of({"": details}) == "full" or "workload" in details:
        return dict(details)
    small = _small_labels(details)
    metrics = details["metrics"]
    totals = {label: metrics.get(f"auroc_{label}") for label in labels_of(details)}
    subgroups, coarse = _subgroups(details.get("subgroups") or {}, totals)
    shown = {key: value for key, value in details.items() if key not in ("metrics", "subgroups", "selective", "counts")}
    if "subgroups" in details:
        shown["subgroups"] = subgroups
    if "selective" in details:
        shown["selective"] = {label: _with_curve(its, details["scored"]) for label, its in details["selective"].items()}
    public = {key: _clean(value, small) for key, value in shown.items()}
    public["counts"] = {key: one for key, one in (details.get("counts") or {}).items() if not _is_small(one)}
    public["metrics"] = {
        name: _metric(name, estimate, small, coarse=_is_coarse(name, small, coarse))
        for name, estimate in metrics.items()
    }
    return public


def _is_small(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and 0 < count < SMALLEST_SHOWN


def _has_small(counted: Mapping[str, Any]) -> bool:
    """Whether one of the counts of a mapping, negatives as what is left of them too, is small."""
    n, positives = counted.get("n"), counted.get("positives")
    both = isinstance(n, int) and isinstance(positives, int)
    return any(map(_is_small, (*(counted.get(one) for one in _COUNTS), n - positives if both else None)))  # type: ignore[operator]


def label_blocks(details: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Everything that a task says label by label: the block, of operating points the point, the label, and what."""
    for name in ("calibration", "selective", "label_f1"):
        yield from ((name, *its) for its in (details.get(name) or {}).items())
    for point, of_point in (details.get("operating_points") or {}).items():
        yield from ((f"at_{point}", *its) for its in of_point.items())
    for name in ("label_frequency", "thresholds", "probe"):
        yield from ((name, *its) for its in ((details.get(name) or {}).get("labels") or {}).items())
    for of_attribute in (details.get("subgroups") or {}).values():
        yield from (("subgroups", label, None) for label in of_attribute)


def labels_of(details: Mapping[str, Any]) -> set[str]:
    """The labels that a task says something of one by one."""
    return {label for _, label, _ in label_blocks(details)}


def label_of(metric: str, labels: set[str]) -> str | None:
    """The label that a metric is of, by the end of its name; None for one over labels."""
    return max((one for one in labels if metric.endswith(f"_{one}")), key=len, default=None)


def _small_labels(details: Mapping[str, Any]) -> set[str]:
    """The labels of which the scored split has few positives or negatives."""
    labels = labels_of(details)
    small = {label_of(name, labels) for name, one in details["metrics"].items() if _has_small(one)} - {None}
    for _, label, block in label_blocks(details):
        if isinstance(block, Mapping):
            parts = [value for key, value in block.items() if key not in _FITTED and isinstance(value, Mapping)]
            if any(map(_has_small, parts)):
                small.add(label)
    return {label for label in small if label is not None}


def _clean(value: Any, small: set[str]) -> Any:
    """Without small counts at any depth, and without what is said of the small labels."""
    if isinstance(value, list):
        return [_clean(one, small) for one in value]
    if isinstance(value, str):
        return _TOLD.sub(r"few \1", value) if _SMALL_TOLD.search(value) else value
    if not isinstance(value, Mapping):
        return value
    if _has_small(value):
        return _withheld(value)
    if value.keys() >= {"confidence", "frequency", "support"}:
        return _merged_bins(value)
    return {key: _withheld(one) if key in small else _clean(one, small) for key, one in value.items()}


def _withheld(value: Any) -> Any:
    """The same shape without a number; an estimate says why."""
    if isinstance(value, Mapping):
        counted = "value" in value or any(one in value for one in _COUNTS)
        bare = {key: None if key == "extra" else _withheld(one) for key, one in value.items()}
        bare |= {"extra": {}} if "extra" in value else {}
        # How many were asked about says nothing of how many had it.
        if "n" in value:
            bare["n"] = value["n"] if isinstance(value["n"], int) and value["n"] >= SMALLEST_SHOWN else 0
        return bare | ({"reason": WITHHELD} if counted else {})
    if isinstance(value, list):
        return None
    return None if isinstance(value, int | float) else value


def _is_coarse(name: str, small: set[str], attributes: set[str]) -> bool:
    """Whether a mean must be rounded: over subgroups without counts, or label F1 with rare labels among the labels."""
    of_rare = bool(small) and name.startswith("label_f1_macro")
    return of_rare or any(name.endswith(f"_{attribute}") for attribute in attributes)


def _metric(name: str, estimate: Mapping[str, Any], small: set[str], *, coarse: bool) -> dict[str, Any]:
    label, over = label_of(name, small), set((estimate.get("extra") or {}).get("labels") or ())
    if label is not None or _has_small(estimate) or over & small:
        withheld: dict[str, Any] = _withheld(estimate)
        return withheld
    extra = {
        key: _few(one) if key == "left_out_positives" else _clean(one, small)
        for key, one in (estimate.get("extra") or {}).items()
    }
    public = _rounded(estimate) if coarse else dict(estimate)
    return public | {"extra": extra, "reason": _clean(estimate.get("reason"), small)}


def _few(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: f"<{SMALLEST_SHOWN}" if _is_small(count) else count for key, count in counts.items()}


def _merged_bins(bins: Mapping[str, Any]) -> dict[str, Any]:
    """Neighbouring bins of a reliability diagram together until each has enough items; none if all have not."""
    names = ("confidence", "frequency", "support")
    merged: list[tuple[float, ...]] = []
    for new in zip(*(bins[name] for name in names), strict=True):
        if not merged or min(merged[-1][2], new[2]) >= SMALLEST_SHOWN:
            merged.append(new)
            continue
        before = merged[-1]
        total = before[2] + new[2]
        merged[-1] = (*((before[k] * before[2] + new[k] * new[2]) / total for k in (0, 1)), total)
    if merged and merged[-1][2] < SMALLEST_SHOWN:
        merged = []
    return {name: [row[k] for row in merged] for k, name in enumerate(names)}


def _with_curve(block: Any, scored: int) -> Any:
    """The risk-coverage curve from where it covers enough items: of those with the label, else of all scored."""
    curve = block.get("curve") if isinstance(block, Mapping) else None
    if not curve:
        return block
    n = (block.get("aurc") or {}).get("n") or scored
    points = [
        (coverage, risk)
        for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True)
        if round(coverage * n) >= SMALLEST_SHOWN
    ]
    return {**block, "curve": {"coverage": [one for one, _ in points], "risk": [one for _, one in points]}}


# --- subgroups


def _subgroups(
    tables: Mapping[str, Any], totals: Mapping[str, Mapping[str, Any] | None]
) -> tuple[dict[str, Any], set[str]]:
    """The tables, and the attributes of which one is without counts."""
    public: dict[str, Any] = {}
    coarse = set()
    for attribute, of_attribute in tables.items():
        public[attribute] = {}
        for label, table in of_attribute.items():
            groups: Mapping[str, Any] = table.get("groups") or {}
            if _tells(list(groups.values()), totals.get(label)):
                coarse.add(attribute)
                table = {part: {name: _uncounted(one) for name, one in its.items()} for part, its in table.items()}
            public[attribute][label] = table
    return public, coarse


def _tells(groups: Sequence[Mapping[str, Any]], total: Mapping[str, Any] | None) -> bool:
    """Whether a table must go without counts: one is missing already, one is small, or the total gives one away."""
    if any(group.get("n") is None or group.get("positives") is None or _has_small(group) for group in groups):
        return True
    if not groups or total is None or total.get("n") is None or total.get("positives") is None:
        return False
    rest = {one: total[one] - sum(group[one] for group in groups) for one in ("n", "positives")}
    return _has_small(rest)


def _uncounted(of_group: Any) -> Any:
    """One subgroup, or one gap, without counts and with numbers too coarse to solve for them."""
    if not isinstance(of_group, Mapping):
        return of_group
    if "value" in of_group:
        between = {key: one for key, one in (of_group.get("extra") or {}).items() if key == "between"}
        return _rounded(of_group) | {"n": None, "positives": None, "floor": None, "extra": between}
    bare = {key: _uncounted(one) for key, one in of_group.items()}
    return bare | {key: None for key in ("n", "positives", "prevalence") if key in of_group}


def _rounded(estimate: Mapping[str, Any]) -> dict[str, Any]:
    rounded = dict(estimate)
    for key in ("value", "stderr", "floor", "ceiling"):
        if isinstance(rounded.get(key), float):
            rounded[key] = round(rounded[key], 2)
    if rounded.get("ci95") is not None:
        rounded["ci95"] = [round(end, 2) for end in rounded["ci95"]]
    return rounded
