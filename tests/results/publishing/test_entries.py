"""Entries on a model's page: checked before, one per task, and nothing of others touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from medvlm_harness.errors import UserError
from medvlm_harness.results.publishing.entries import (
    Entry,
    check_repo_id,
    entries_of,
    eval_results_files,
    readme_with_model_index,
)
from medvlm_harness.results.publishing.public import public_run
from medvlm_harness.results.run_files import read_run

ENTRY = Entry(
    dataset="acme/iu-cxr",
    revision="0" * 40,
    task_id="iu_cxr_zeroshot.auroc",
    task="iu_cxr_zeroshot",
    metric="auroc",
    value=0.634,
    split="test",
    date="2026-01-01T00:00:00Z",
    url="https://hub.example/datasets/acme/results",
    notes="95% interval 0.59 to 0.68",
)
PATH = ".eval_results/medvlm-iu-cxr.yaml"
OTHERS = {
    "language": "en",
    "license": "mit",
    "tags": ["a", "b"],
    "model-index": [
        {
            "name": "theirs",
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"type": "beans", "name": "Beans"},
                    "metrics": [{"type": "accuracy", "value": 0.9, "verified": True}],
                }
            ],
        }
    ],
}


def files(present: dict[str, bytes], *entries: Entry, overwrite: bool = False) -> dict[str, bytes]:
    return eval_results_files(entries or [ENTRY], sorted(present), present.__getitem__, overwrite=overwrite)


# --- from a run


def test_headlines_become_entries(run_file: Path) -> None:
    run = public_run(read_run(run_file))
    (entry,), told = entries_of(run, benchmark="acme/iu-cxr", url="u")
    assert entry.task_id == "syn_zeroshot.auroc"
    assert entry.value == run.tasks["syn_zeroshot"]["metrics"]["auroc"]["value"]
    assert entry.revision is None
    assert "revision of the data set" in told[0]
    assert "n 120" in entry.notes
    assert entry.date.endswith("Z")


def test_data_of_the_hub_knows_its_id_and_revision(change: Callable[..., Path]) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["dataset"] |= {
            "revision": "a" * 40,
            "policies": {"hub_id": "acme/synthetic"},
        }

    run = public_run(read_run(change(edit)))
    (entry,), _ = entries_of(run, benchmark=None, url="u")
    assert (entry.dataset, entry.revision) == ("acme/synthetic", "a" * 40)
    # The revision is of that repo, not of another one that is named instead.
    (other,), _ = entries_of(run, benchmark="acme/else", url="u")
    assert (other.dataset, other.revision) == ("acme/else", None)


@pytest.mark.parametrize("revision", ["main", "abc", "A" * 40])
def test_what_is_no_commit_is_no_revision(change: Callable[..., Path], revision: str) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["dataset"] |= {"revision": revision, "policies": {"hub_id": "a/b"}}

    (entry,), told = entries_of(public_run(read_run(change(edit))), benchmark=None, url="u")
    assert entry.revision is None
    assert told


def test_without_an_id_or_a_value_there_is_no_entry(change: Callable[..., Path], run_file: Path) -> None:
    with pytest.raises(UserError, match="--benchmark ORG/NAME"):
        entries_of(public_run(read_run(run_file)), benchmark=None, url="u")

    def edit(results: dict[str, Any]) -> None:
        results["medvlm"]["tasks"]["syn_zeroshot"]["metrics"]["auroc"] |= {"value": None, "reason": "none"}

    with pytest.raises(UserError, match="no task has a headline"):
        entries_of(public_run(read_run(change(edit))), benchmark="a/b", url="u")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a b/c", "../x", "a/b.git", "a/--b", ""])
def test_ids_are_checked(repo: str) -> None:
    with pytest.raises(UserError, match="--repo"):
        check_repo_id(repo, "--repo")
    assert check_repo_id("acme/results", "--repo") == "acme/results"


# --- .eval_results


def test_the_file_reads_back_as_the_hubs_client_reads_it() -> None:
    made = files({})
    assert list(made) == [PATH]
    (entry,) = parse_eval_result_entries(yaml.safe_load(made[PATH]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("acme/iu-cxr", "iu_cxr_zeroshot.auroc", 0.634)
    assert (entry.dataset_revision, entry.date) == ("0" * 40, "2026-01-01T00:00:00Z")
    assert entry.source_url == ENTRY.url


def test_what_is_there_is_kept_and_the_same_is_not_said_again() -> None:
    present = files({}, replace(ENTRY, task_id="iu_cxr_zeroshot.ece", value=0.05))
    both = files(present)
    assert [row["dataset"]["task_id"] for row in yaml.safe_load(both[PATH])] == [
        "iu_cxr_zeroshot.ece",
        "iu_cxr_zeroshot.auroc",
    ]
    assert files(both) == {}


def test_another_value_is_replaced_only_when_told() -> None:
    present = files({})
    other = replace(ENTRY, value=0.7)
    with pytest.raises(UserError, match=r"has 0\.634 as iu_cxr_zeroshot\.auroc, and this run has 0\.7: --overwrite"):
        files(present, other)
    (row,) = yaml.safe_load(files(present, other, overwrite=True)[PATH])
    assert row["value"] == 0.7


def test_the_hub_keeps_one_value_so_another_file_with_it_is_refused() -> None:
    present = {".eval_results/theirs.yaml": files({})[PATH]}
    with pytest.raises(UserError, match=r"theirs\.yaml of the model repo has a value"):
        files(present, overwrite=True)


@pytest.mark.parametrize("broken", [b"{", b"- 1", b"- {value: 1}", b"a: b"])
def test_a_broken_file_of_theirs_is_named(broken: bytes) -> None:
    with pytest.raises(UserError, match="holds no evaluation results"):
        files({".eval_results/x.yaml": broken})


# --- model-index


def readme(front: dict[str, Any], body: str = "\n# Their model\n\nText.\n") -> str:
    return f"---\n{yaml.safe_dump(front)}---\n{body}"


def test_the_model_index_gains_an_entry_and_all_else_stays() -> None:
    before = readme(OTHERS)
    after = readme_with_model_index(before, [ENTRY], name="model", overwrite=False)
    assert after is not None
    old, new = ModelCard(before), ModelCard(after)
    assert new.text == old.text
    front = yaml.safe_load(after.split("---\n")[1])
    index = front.pop("model-index")
    assert front == {key: value for key, value in OTHERS.items() if key != "model-index"}
    assert index[0]["results"][0] == OTHERS["model-index"][0]["results"][0]  # type: ignore[index]
    (result,) = [one for one in new.data.eval_results if one.metric_type == "auroc"]
    assert (result.metric_value, result.dataset_type, result.dataset_revision) == (0.634, "acme/iu-cxr", "0" * 40)
    assert readme_with_model_index(after, [ENTRY], name="model", overwrite=False) is None


def test_another_value_in_the_model_index_is_replaced_only_when_told() -> None:
    before = readme_with_model_index(readme(OTHERS), [ENTRY], name="model", overwrite=False)
    other = replace(ENTRY, value=0.7, url="https://elsewhere.example")
    with pytest.raises(UserError, match="--overwrite"):
        readme_with_model_index(before, [other], name="model", overwrite=False)
    after = readme_with_model_index(before, [other], name="model", overwrite=True)
    assert after is not None
    values = {one.metric_type: one.metric_value for one in ModelCard(after).data.eval_results}
    assert values == {"accuracy": 0.9, "auroc": 0.7}


@pytest.mark.parametrize("before", [None, "", "# No front matter\n", "---\nlicense: mit\n---\nText\n"])
def test_a_readme_without_an_index_gets_one(before: str | None) -> None:
    after = readme_with_model_index(before, [ENTRY], name="model", overwrite=False)
    assert after is not None
    card = ModelCard(after)
    assert card.data.model_name == "model"
    assert card.data.eval_results[0].metric_value == 0.634
    assert after.endswith(before.split("---\n")[-1] if before else "# model\n")


@pytest.mark.parametrize("front", ["a: [", "- a\n- b"])
def test_front_matter_that_cannot_be_read_is_left_alone(front: str) -> None:
    with pytest.raises(UserError, match="front matter is no"):
        readme_with_model_index(f"---\n{front}\n---\n", [ENTRY], name="m", overwrite=False)


def test_an_index_of_another_shape_is_left_alone() -> None:
    with pytest.raises(UserError, match="has not its shape"):
        readme_with_model_index(readme({"model-index": [{"name": "x"}]}), [ENTRY], name="m", overwrite=False)
