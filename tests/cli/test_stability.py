"""`medvlm run --seeds` and `--prompt-sets`, on the demo set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset
from medvlm_harness.model_backends.cards import Prompts
from medvlm_harness.model_backends.tiny import TinyBackend

IMAGE_USE = "demo_cxr_image_use_labels"
TINY = ("run", "--model", "medvlm-tiny", "--tasks", IMAGE_USE, "--device", "cpu")
RANDOM = ("run", "--model", "medvlm-baseline", "--model-args", "kind=random", "--tasks", "demo_cxr_zeroshot")


@pytest.fixture(autouse=True)
def demo_data(demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(demo.folder.parent))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's model as if it had been published with templates."""
    prompts = Prompts(positive=("{}",), negative=("normal chest",))
    monkeypatch.setattr(TinyBackend, "card", replace(TinyBackend.card, prompts=prompts))


def written(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The stability file, and the results that it names."""
    (path,) = folder.rglob("stability_*.json")
    block = json.loads(path.read_text(encoding="utf-8"))
    files = [path.with_name(run["results"]) for run in block["runs"]]
    assert sorted(files) == sorted(folder.rglob("results_*.json"))
    return block, [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_each_seed_is_a_run_with_results_of_its_own(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    status, out, err = medvlm(*TINY, "--seeds", "0,1", "--output-path", tmp_path / "out")
    assert status == 0, err
    block, results = written(tmp_path / "out")
    tasks = [one["medvlm"]["tasks"][IMAGE_USE] for one in results]
    assert [task["substitution_seed"] for task in tasks] == [0, 1]
    assert [one["config"]["numpy_seed"] for one in results] == [0, 1]
    assert results[1]["medvlm"]["model"]["images_encoded"] == 0  # all come from the store
    found = block["tasks"][IMAGE_USE]
    for name, spread in found.items():
        assert spread["values"] == [task["metrics"][name]["value"] for task in tasks]
        assert spread["ci95"] == [task["metrics"][name]["ci95"] for task in tasks]
    assert found["auroc_other"]["sd"] > 0
    assert found["auroc_true"]["sd"] == found["auroc_blank"]["sd"] == 0
    table = out.partition("2 runs: seed 0; seed 1.")[2]
    assert "auroc_other" in table
    assert "auroc_true " not in table
    assert "The seed went to --seed, --metadata substitution_seed." in table
    assert plugin.scope.finished is None


def test_the_models_own_seed_is_set_and_no_key_that_no_task_reads(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    status, _, err = medvlm(*RANDOM, "--seeds", "0,1", "--limit", "60", "--output-path", tmp_path / "out")
    assert status == 0, err
    block, results = written(tmp_path / "out")
    assert [one["medvlm"]["model"]["seed"] for one in results] == [0, 1]
    assert block["seeded"] == ["--seed", "--model_args seed"]
    assert block["tasks"]["demo_cxr_zeroshot"]["auroc"]["sd"] > 0


def test_both_options_give_every_pair(medvlm: Callable[..., Any], published: None, tmp_path: Path) -> None:
    asked = ("--seeds", "3,4", "--prompt-sets", "published,task", "--limit", "100")
    status, out, err = medvlm(*TINY, *asked, "--output-path", tmp_path / "out")
    assert status == 0, err
    block, results = written(tmp_path / "out")
    assert [(run["seed"], run["prompts"]) for run in block["runs"]] == [
        *((3, "published"), (4, "published"), (3, "task"), (4, "task"))
    ]
    assert [one["medvlm"]["model"]["prompts"] for one in results] == ["published", "published", "task", "task"]
    true = block["tasks"][IMAGE_USE]["auroc_true"]
    assert true["sd_seeds"] == 0 < true["sd_prompts"]
    assert block["tasks"][IMAGE_USE]["auroc_other"]["sd_seeds"] > 0
    assert "SD over prompts" in out


def test_one_seed_is_an_ordinary_run_and_can_be_planned(medvlm: Callable[..., Any]) -> None:
    status, out, err = medvlm(*TINY, "--plan", "--seeds", "7")
    assert (status, err) == (0, "")
    assert IMAGE_USE in out
    status, out, err = medvlm(*RANDOM, "--seeds", "7", "--limit", "40")
    assert status == 0, err
    assert "runs:" not in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*TINY, "--seeds", "0,x"), "Expected --seeds to be different whole numbers from 0"),
        ((*TINY, "--seeds", "0,"), "but got '0,'."),
        ((*TINY, "--seeds", "-1,2"), "but got '-1,2'."),
        ((*TINY, "--seeds", "1,01"), "but got '1,01'."),
        ((*TINY, "--seeds", "0,4294967296"), "from 0 to 4294967295"),
        ((*TINY, "--seeds", "0,1", "--seed", "3"), "Expected --seeds or --seed, but got both."),
        ((*TINY, "--seeds", "0,1", "--metadata", "substitution_seed=3"), "Expected --seeds or substitution_seed=..."),
        ((*RANDOM, "--model-args", "seed=3", "--seeds", "0,1"), "Expected --seeds or seed=..., but got both."),
        ((*TINY, "--seeds", "0,1", "--use_cache", "x"), "Leave out --use_cache"),
        ((*TINY, "--seeds", "0,1", "--plan"), "--plan counts one run"),
        ((*RANDOM, "--prompt-sets", "task,published"), "a model that has the option prompts, but medvlm-baseline has"),
        ((*TINY, "--prompt-sets", "task,published"), "medvlm-tiny has no published prompts on its card"),
        ((*TINY, "--prompt-sets", "task,tsak"), "Expected prompts to be task, published or ours, but got 'tsak'."),
        ((*TINY, "--prompt-sets", "task,task"), "Expected --prompt-sets to be different names"),
        ((*TINY, "--prompt-sets", "task", "--model-args", "prompts=task"), "Expected --prompt-sets or prompts=..."),
        ((*TINY, "--sedes", "0,1"), "Did you mean --seeds, --seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_stops_before_anything_runs(
    medvlm: Callable[..., Any], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in medvlm(*arguments).refusal
