from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from medvlm_harness.results.run import SCHEMA_VERSION
from medvlm_harness.results.schema import READABLE, json_schema, shape_errors

SHIPPED = files("medvlm_harness.results") / "results.schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module", params=["tiny", "constant"])
def content(request: pytest.FixtureRequest, demo_runs: dict[str, Path]) -> Any:
    return json.loads(demo_runs[request.param].read_text(encoding="utf-8"))


def test_the_shipped_schema_is_what_the_code_generates() -> None:
    made = json.dumps(json_schema(), indent=2) + "\n"
    assert SHIPPED.read_text(encoding="utf-8") == made, (
        "medvlm results schema > medvlm_harness/results/results.schema.json"
    )
    assert READABLE[-1] == SCHEMA_VERSION


def test_what_runs_write_fits_both_forms_of_the_schema(
    content: Any, validator: jsonschema.Draft202012Validator
) -> None:
    assert content["medvlm"]["tasks"]
    assert list(shape_errors(content, complete=True)) == []
    assert list(validator.iter_errors(content)) == []


TASK = ("medvlm", "tasks", "demo_cxr_zeroshot")
METRIC = (*TASK, "metrics", "auroc_pneumothorax")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("medvlm", "schema_version"), 3, "medvlm.schema_version: expected 1 or 2, but got 3"),
        (("medvlm", "note"), "mine", "medvlm.note: expected Extra inputs"),
        (("medvlm", "model", "weights_sha256"), "abc", "weights_sha256: expected String should match pattern"),
        (("medvlm", "efficiency", "seconds"), "1", "efficiency.seconds: expected a valid number, but got '1'"),
        ((*TASK, "dataset", "sharing"), "everything", "dataset.sharing: expected 'aggregate', 'hashed' or 'full'"),
        ((*TASK, "scored"), -1, "scored: expected greater than or equal to 0"),
        ((*METRIC, "value"), True, "auroc_pneumothorax.value: expected a valid number, but got True"),
        ((*METRIC, "ci95"), [0.1, None], "auroc_pneumothorax.ci95.1: expected a valid number"),
        ((*METRIC, "p"), 0.1, "auroc_pneumothorax.p: expected Extra inputs"),
        (("results",), [], "results: expected a mapping"),
    ],
)
def test_what_is_of_another_shape_is_named_by_its_place(
    demo_runs: dict[str, Path],
    validator: jsonschema.Draft202012Validator,
    place: tuple[str, ...],
    value: Any,
    message: str,
) -> None:
    content = json.loads(demo_runs["tiny"].read_text(encoding="utf-8"))
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    assert any(message in error for error in shape_errors(content, complete=True))
    assert list(validator.iter_errors(content))


@pytest.mark.parametrize("place", [("medvlm", "versions"), (*TASK, "documents"), (*METRIC, "method")])
def test_what_an_earlier_version_left_out_is_missed_only_in_full_checks(
    demo_runs: dict[str, Path], place: tuple[str, ...]
) -> None:
    content = json.loads(demo_runs["tiny"].read_text(encoding="utf-8"))
    at = content
    for key in place[:-1]:
        at = at[key]
    del at[place[-1]]
    assert list(shape_errors(content, complete=True)) == [f"{'.'.join(place)} is missing"]
    assert list(shape_errors(content, complete=False)) == []


# As lm-eval 0.4.3 writes them: options as one text, no version of its own, hours of a clock.
OLD = {
    "results": {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01}},
    "group_subtasks": {"arc": []},
    "configs": {"arc": {"task": "arc", "metadata": {"version": 1.0}}},
    "versions": {"arc": 1.0},
    "n-shot": {"arc": 0},
    "higher_is_better": {"arc": {"acc": True}},
    "config": {"model": "hf", "model_args": "pretrained=org/m", "batch_size": "auto", "limit": 4.0, "gen_kwargs": None},
    "date": 1.0,
    "start_time": 36042.6,
    "total_evaluation_time_seconds": "0.1",
}


def test_results_of_older_versions_of_lm_eval_fit(validator: jsonschema.Draft202012Validator) -> None:
    assert list(shape_errors(OLD, complete=True)) == []
    assert list(validator.iter_errors(OLD)) == []
    assert list(shape_errors({**OLD, "results": {"arc": 0.25}}, complete=True))
