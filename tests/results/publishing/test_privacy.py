"""What leaves the machine: no small cell, nothing that one could be solved from, and ids only where they may."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.results.publishing.privacy import WITHHELD, per_study_scores, without_small_cells
from medvlm_harness.results.publishing.public import left_out, public_results, public_run
from medvlm_harness.results.run_files import read_run
from medvlm_harness.results.validation import validate


@pytest.fixture
def details(run_file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_file.read_text())["medvlm"]["tasks"]["syn_zeroshot"]
    return found


def counted(value: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings that hold counts, at any depth."""
    if isinstance(value, Mapping):
        if value.keys() & {"n", "positives", "negatives"}:
            yield value
        for one in value.values():
            yield from counted(one)
    elif isinstance(value, list):
        for one in value:
            yield from counted(one)


def small(value: Any) -> list[Mapping[str, Any]]:
    """Written without a look at the code: 1 to 9 positives, negatives or items."""
    found = []
    for one in counted(value):
        n, positives = one.get("n"), one.get("positives")
        counts = [n, positives, one.get("negatives")]
        if n is not None and positives is not None:
            counts.append(n - positives)
        if any(count is not None and 1 <= count <= 9 for count in counts):
            found.append(one)
    return found


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def test_no_small_count_is_left_anywhere(details: dict[str, Any]) -> None:
    assert small(details)  # the run has some: three positives of Pneumonia, four men
    assert small(without_small_cells(details)) == []


def test_a_file_that_claims_to_be_shared_in_full_loses_them_as_well(details: dict[str, Any]) -> None:
    claimed = {**details, "dataset": {**details["dataset"], "name": "iu_cxr", "sharing": "full"}}
    assert small(without_small_cells(claimed)) == []
    own = {**details, "dataset": {**details["dataset"], "sharing": "full"}}
    assert small(without_small_cells(own))


def test_a_rare_label_has_no_number_at_all(details: dict[str, Any]) -> None:
    public = without_small_cells(details)
    estimate = public["metrics"]["auroc_pneumonia"]
    assert (estimate["value"], estimate["ci95"], estimate["stderr"], estimate["positives"]) == (None, None, None, None)
    assert estimate["reason"] == WITHHELD
    for block in (public["calibration"], public["selective"], public["operating_points"]["youden"]):
        scored = {key: one for key, one in block["pneumonia"].items() if key not in ("scaling", "threshold")}
        assert set(numbers(scored)) <= {120}  # n, which says nothing of Pneumonia
    assert public["label_frequency"]["labels"]["pneumonia"]["frequency"] is None
    # A frequent label keeps what it has.
    assert public["metrics"]["auroc_edema"] == details["metrics"]["auroc_edema"]


def test_means_do_not_give_a_rare_label_away(details: dict[str, Any]) -> None:
    public = without_small_cells(details)
    assert details["metrics"]["auroc"]["extra"]["left_out_positives"]["pneumonia"] == 3
    assert public["metrics"]["auroc"]["extra"]["left_out_positives"]["pneumonia"] == "<10"
    details["metrics"]["auroc"]["extra"]["labels"].append("pneumonia")
    assert without_small_cells(details)["metrics"]["auroc"]["value"] is None


def test_a_mean_of_label_f1_with_a_rare_label_among_them_is_rounded(details: dict[str, Any]) -> None:
    f1 = {**details["metrics"]["auroc_edema"], "value": 0.123456789, "extra": {}}
    details["metrics"]["label_f1_macro_5"] = f1
    assert without_small_cells(details)["metrics"]["label_f1_macro_5"]["value"] == 0.12
    details["metrics"] = {"label_f1_macro_5": f1}
    for block in ("calibration", "selective", "operating_points", "label_frequency", "subgroups"):
        details[block] = {}
    assert without_small_cells(details)["metrics"]["label_f1_macro_5"]["value"] == 0.123456789


def test_sentences_do_not_tell_small_counts_nor_those_beside_them(details: dict[str, Any]) -> None:
    reason = "validation has 2 positives and 58 negatives; youden needs 10"
    details["operating_points"]["youden"]["edema"]["sensitivity"]["reason"] = reason
    public = without_small_cells(details)["operating_points"]["youden"]["edema"]["sensitivity"]["reason"]
    assert "2" not in public
    assert "58" not in public
    details["operating_points"]["youden"]["edema"]["sensitivity"]["reason"] = "validation has 20 positives"
    kept = without_small_cells(details)["operating_points"]["youden"]["edema"]["sensitivity"]["reason"]
    assert kept == "validation has 20 positives"


def subgroups(details: dict[str, Any], **groups: tuple[int, int]) -> dict[str, Any]:
    """The details with one subgroup table: name -> (n, positives); the label has 120 items, 48 positive."""
    rate = {"value": 0.123456789, "stderr": 0.05, "ci95": [0.1, 0.2], "floor": 0.5, "ceiling": 1.0, "method": "m"}
    table = {
        name: {
            **{"n": n, "positives": positives, "prevalence": positives / n},
            "auroc": {**rate, "n": n, "positives": positives, "reason": None, "extra": {"average_precision": 0.5}},
        }
        for name, (n, positives) in groups.items()
    }
    details["subgroups"] = {"sex": {"edema": {"groups": table, "gaps": {}}}}
    total = details["metrics"]["auroc_edema"]
    total |= {"n": 120, "positives": 48}
    public: dict[str, Any] = without_small_cells(details)["subgroups"]["sex"]["edema"]["groups"]
    return public


def test_a_small_subgroup_takes_the_counts_of_all_with_it(details: dict[str, Any]) -> None:
    groups = subgroups(details, female=(100, 40), male=(20, 8))
    assert [(one["n"], one["positives"], one["prevalence"]) for one in groups.values()] == [(None, None, None)] * 2
    # With two decimals no fraction can be solved for.
    assert [one["auroc"]["value"] for one in groups.values()] == [0.12, 0.12]
    assert [one["auroc"]["extra"] for one in groups.values()] == [{}, {}]


@pytest.mark.parametrize("male", [(17, 14), (16, 10)])  # less of the total than all: three items, or six
def test_those_of_whom_nobody_knows_the_subgroup_are_a_cell_too(details: dict[str, Any], male: tuple[int, int]) -> None:
    groups = subgroups(details, female=(100, 30), male=male)
    assert all(one["n"] is None for one in groups.values())


def test_large_subgroups_stay_as_they_are(details: dict[str, Any]) -> None:
    groups = subgroups(details, female=(70, 24), male=(50, 24))
    assert [(one["n"], one["positives"]) for one in groups.values()] == [(70, 24), (50, 24)]
    assert groups["male"]["auroc"]["value"] == 0.123456789


def test_bins_are_merged_until_each_has_ten_and_nothing_is_lost(details: dict[str, Any]) -> None:
    bins = {"confidence": [0.1, 0.3, 0.5, 0.9], "frequency": [0.0, 0.5, 0.25, 1.0], "support": [3, 2, 40, 4]}
    details["metrics"]["brier"]["extra"]["reliability"] = bins
    merged = without_small_cells(details)["metrics"]["brier"]["extra"]["reliability"]
    assert min(merged["support"]) >= 10
    assert sum(merged["support"]) == 49
    positives = [n * share for n, share in zip(merged["support"], merged["frequency"], strict=True)]
    assert sum(positives) == pytest.approx(3 * 0 + 2 * 0.5 + 40 * 0.25 + 4)
    bins |= {"confidence": [0.1], "frequency": [0.5], "support": [4]}
    assert without_small_cells(details)["metrics"]["brier"]["extra"]["reliability"]["support"] == []


def test_the_curve_starts_where_it_covers_ten(details: dict[str, Any]) -> None:
    details["selective"]["edema"]["curve"] = {"coverage": [1 / 120, 9 / 120, 10 / 120, 1.0], "risk": [0, 0, 0.1, 0.4]}
    curve = without_small_cells(details)["selective"]["edema"]["curve"]
    assert curve == {"coverage": [10 / 120, 1.0], "risk": [0.1, 0.4]}


def test_data_that_may_be_shared_in_full_is_left_as_it_is(details: dict[str, Any]) -> None:
    details["dataset"]["sharing"] = "full"
    assert without_small_cells(details) == details


def test_speed_is_no_count_of_people(details: dict[str, Any]) -> None:
    details["workload"] = {"kind": "images"}
    assert without_small_cells(details) == details


# --- scores by study


def test_hashed_scores_hold_no_id_and_two_releases_no_common_hash(run_file: Path) -> None:
    run = read_run(run_file)
    assert run.scores is not None
    first, second = (per_study_scores(run.scores, run.tasks) for _ in range(2))
    plain = pq.read_table(run.scores)
    ids = {value for name in ("study", "patient", "image") for value in plain.column(name).to_pylist()}
    columns = [set(first.column(name).to_pylist()) for name in first.column_names]
    assert not any(ids & column for column in columns)
    assert "patient" not in first.column_names
    assert not set(first.column("study").to_pylist()) & set(second.column("study").to_pylist())
    # The same study has the same hash in all rows, and the scores are all there.
    assert len(set(first.column("study").to_pylist())) == len(set(plain.column("study").to_pylist()))
    assert sorted(first.column("margin").to_pylist()) == sorted(plain.column("margin").to_pylist())


def test_the_order_of_rows_does_not_give_ids_away(run_file: Path) -> None:
    run = read_run(run_file)
    assert run.scores is not None
    table = per_study_scores(run.scores, run.tasks)
    rows = list(zip(*(table.column(name).to_pylist() for name in ("task", "label", "study", "image")), strict=True))
    assert rows == sorted(rows)


def test_scores_of_full_data_keep_ids_and_those_of_aggregate_data_are_refused(run_file: Path) -> None:
    run = read_run(run_file)
    assert run.scores is not None

    def shared(sharing: str) -> dict[str, Any]:
        return {"syn_zeroshot": {"dataset": {"name": "synthetic", "sharing": sharing}}}

    assert per_study_scores(run.scores, shared("full")).equals(pq.read_table(run.scores))
    with pytest.raises(UserError, match=r"syn_zeroshot may not be shared by study \(sharing: aggregate"):
        per_study_scores(run.scores, shared("aggregate"))


# --- the results file


def test_only_what_is_listed_goes_out(change: Callable[..., Path]) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["model"]["text"] = "a sentence somebody chose"
        results["medvlm"]["tasks"]["syn_zeroshot"]["constant_floor"] = "a sentence of the training data"
        results["config"]["note"] = "mine"

    run = read_run(change(edit))
    public = json.dumps(public_results(run))
    assert "sentence" not in public
    assert "mine" not in public
    assert "pretty_env_info" not in public
    assert '"configs"' not in public
    assert left_out(run) == ["syn_zeroshot.constant_floor"]


def test_what_goes_out_is_a_valid_results_file(run_file: Path, tmp_path: Path) -> None:
    written = tmp_path / "results.json"
    written.write_text(json.dumps(public_results(read_run(run_file)), allow_nan=False))
    assert validate(written).problems == []
    assert public_run(read_run(run_file)).scores is None
