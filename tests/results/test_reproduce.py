from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.results.reproduce import ELSEWHERE, Call, call_of, compare, other_inputs, parse_options
from medvlm_harness.results.run_files import RunFiles, read_run

SHA = "ab" * 32
RESULTS: dict[str, Any] = {
    "results": {"syn_view": {}},
    "configs": {"syn_view": {}, "syn_retrieval": {}},
    "config": {
        "model": "medvlm-clip",
        "model_args": {"pretrained": "<local>/iu-clip-tiny", "quantization": "int8"},
        "batch_size": 1,
        "device": "cuda:0",
        "limit": 16.0,
        "gen_kwargs": {"temperature": 0.5},
        "random_seed": 0,
        "numpy_seed": None,
        "torch_seed": 7,
        "fewshot_seed": 1234,
    },
    "medvlm": {
        "schema_version": 2,
        "asked": {
            "tasks": ["syn_view", "syn_retrieval"],
            "metadata": {"data_dir": "<local>/data", "split": "validation"},
            "samples": {"syn_view": [0, 2]},
            "apply_chat_template": True,
            "include_path": ["<local>/tasks"],
        },
        "model": {"card": {"name": "m"}, "weights_sha256": SHA},
        "tasks": {"syn_view": {"dataset": {"sha256": SHA}, "metrics": {}}},
        "unsupported": {"syn_retrieval": "it cannot"},
    },
}


def files(results: Mapping[str, Any]) -> RunFiles:
    return RunFiles(Path("results_x.json"), results, None)


def asked(run: RunFiles, **given: Any) -> Call:
    return call_of(run, **{"model_args": {}, "metadata": {}, "include_paths": (), **given})


def test_the_command_is_the_runs_own() -> None:
    call = asked(files(RESULTS), model_args={"pretrained": "here"}, include_paths=["mine"])
    assert shlex.join(call.arguments()[1:]) == shlex.join(
        [
            *("-m", "medvlm_harness", "run", "--model", "medvlm-clip"),
            *("--model_args", '{"pretrained": "here", "quantization": "int8"}', "--tasks", "syn_view"),
            *("--metadata", '{"split": "validation"}', "--include_path", "mine", "--limit", "16.0"),
            *("--samples", '{"syn_view": [0, 2]}', "--seed", "0,None,7,1234"),
            *("--gen_kwargs", '{"temperature": 0.5}', "--apply_chat_template"),
        ]
    )
    assert call.notes == ["--metadata data_dir was <local>/data: data are looked for in the usual places"]
    assert asked(
        files(RESULTS), model_args={"pretrained": "here"}, include_paths=["m"], metadata={"data_dir": "d"}
    ).metadata == {
        "data_dir": "d",
        "split": "validation",
    }


def test_what_was_taken_out_is_asked_for_with_the_hash_that_is_expected() -> None:
    with pytest.raises(UserError) as caught:
        asked(files(RESULTS))
    assert str(caught.value) == (
        "results_x.json does not hold paths and secrets; give --model-args pretrained=... (<local>/iu-clip-tiny), "
        f"--include-path ... (<local>/tasks). The weights' sha256 is {SHA}."
    )


def test_files_of_earlier_versions_say_less() -> None:
    old = copy.deepcopy(RESULTS)
    del old["medvlm"]["asked"]
    old["medvlm"]["schema_version"] = 1
    old["config"] |= {
        "model_args": "pretrained=org/m,precision=bf16",
        "batch_size": "8",
        "device": "cpu",
        "gen_kwargs": None,
    }
    old["medvlm"]["unsupported"] = {}
    call = asked(files(old))
    assert call.model_args == {"pretrained": "org/m", "precision": "bf16"}
    assert call.module == "lm_eval"  # one of the tasks is none of ours
    assert call.notes == ["the file is of version 1, which does not say what --metadata was"]
    assert "--batch_size 8 --device cpu" in " ".join(call.further)
    del old["config"]["model"]
    with pytest.raises(UserError, match="does not say the model's name"):
        asked(files(old))


@pytest.mark.parametrize(
    ("text", "options"),
    [(None, {}), ("a=1,b=x", {"a": 1, "b": "x"}), ('{"a": {"b": 1}}', {"a": {"b": 1}})],
)
def test_options_are_given_as_lm_eval_takes_them(text: str | None, options: dict[str, Any]) -> None:
    assert parse_options(text, "--x") == options


@pytest.mark.parametrize("text", ["{", "nothing"])
def test_options_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="Expected --x to be name=value"):
        parse_options(text, "--x")


@pytest.fixture
def run(demo_runs: dict[str, Path]) -> RunFiles:
    return read_run(demo_runs["tiny"])


def changed(run: RunFiles) -> tuple[RunFiles, Any]:
    results = copy.deepcopy(dict(run.results))
    return RunFiles(run.path, results, run.scores), results["medvlm"]


def test_a_run_equals_itself_and_nothing_else_does(run: RunFiles) -> None:
    found = compare(run, run)
    assert found.same
    assert (found.tolerance, found.around, found.unreproduced) == (0.0, [], {})
    assert len(found.metrics) == sum(len(task["metrics"]) for task in run.tasks.values())
    now, block = changed(run)
    block["tasks"]["demo_cxr_retrieval"]["metrics"]["i2t_mrr"]["value"] += 1e-12
    (other,) = [one for one in compare(run, now).metrics if not one.same]
    assert (other.task, other.metric) == ("demo_cxr_retrieval", "i2t_mrr")
    assert other.difference == pytest.approx(1e-12, rel=1e-3)
    assert compare(run, now, tolerance=1e-9).same


@pytest.mark.parametrize(
    "change",
    [
        lambda metrics: metrics["i2t_mrr"].update(ci95=[0.0, 1.0]),
        lambda metrics: metrics["i2t_mrr"].update(value=None, ci95=None, reason="edited"),
        lambda metrics: metrics["i2t_mrr"].update(ci95=None),
        lambda metrics: metrics.pop("i2t_mrr"),
        lambda metrics: metrics.update(mine={"value": None, "ci95": None}),
    ],
)
def test_intervals_undefined_values_and_missing_metrics_count(run: RunFiles, change: Any) -> None:
    now, block = changed(run)
    change(block["tasks"]["demo_cxr_retrieval"]["metrics"])
    assert len([one for one in compare(run, now, tolerance=0.001).metrics if not one.same]) == 1
    assert len([one for one in compare(now, run, tolerance=0.001).metrics if not one.same]) == 1


def test_another_machine_or_version_is_named_and_allows_a_little(run: RunFiles) -> None:
    now, block = changed(run)
    block["versions"]["torch"] = "9.0"
    block["efficiency"]["hardware"]["cpu"] = "Another"
    block["tasks"]["demo_cxr_view"]["split"] = "validation"
    block["tasks"]["demo_cxr_retrieval"]["metrics"]["i2t_mrr"]["value"] += 0.004
    found = compare(run, now)
    assert found.tolerance == ELSEWHERE
    assert found.same
    torch, cpu, split = found.around
    assert torch.startswith("version of torch 9.0, before ")
    assert cpu.startswith("machine: cpu Another, before ")
    assert split == "demo_cxr_view: split validation, before test"
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_task_that_did_not_run_again_is_no_reproduction(run: RunFiles) -> None:
    now, block = changed(run)
    del block["tasks"]["demo_cxr_view"]
    block["unsupported"]["demo_cxr_view"] = "it cannot"
    found = compare(run, now)
    assert not found.same
    assert found.unreproduced == {"demo_cxr_view": "it cannot"}


def test_other_weights_and_data_are_known_before_anything_is_computed(run: RunFiles, demo: Dataset) -> None:
    assert run.medvlm["asked"]["metadata"] == {"data_dir": "<local>/demo_cxr"}
    call = asked(run, metadata={"data_dir": str(demo.folder)})
    assert other_inputs(run, call) == []
    now, block = changed(run)
    block["model"]["weights_sha256"] = SHA
    block["tasks"]["demo_cxr_view"]["dataset"]["sha256"] = SHA
    weights, data = other_inputs(now, call)
    assert weights.startswith("the weights have sha256 035adc38")
    assert weights.endswith(f"not {SHA}")
    assert data.startswith("the data of demo_cxr_view have sha256 ")
