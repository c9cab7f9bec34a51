from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.requests import LabelScores
from medvlm_harness.results.run import installed_versions, unsupported_reason
from medvlm_harness.tracks.zero_shot import ZeroShot

TASKS = ["syn_zeroshot", "syn_view", "syn_retrieval"]


class ClassifyOnly(MedicalLM):
    """Has no embeddings, like a generative model, and nobody knows what it was trained on."""

    CAPABILITIES = frozenset({"classify:image"})
    card = ModelCard(name="classify-only", family="generative")

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        n = len(requests[0].arguments[1].labels)
        return [LabelScores((0.0,) * n, (1 / n,) * n) for _ in requests]

    def describe(self) -> dict[str, Any]:
        return {"card": self.card.to_dict()}


def seen(*trained_on: Any) -> BaselineBackend:
    """A random model with a card that says what it was trained on."""
    model = BaselineBackend(kind="random")
    model.card = replace(model.card, name="seen", trained_on=trained_on)
    return model


def stock_task() -> ConfigurableTask:
    """One of lm-eval's own, from memory."""
    docs = [{"text": f"{k} is", "answer": "a number"} for k in range(3)]
    return ConfigurableTask(
        config={
            "task": "stock",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": ["a number", "a name"],
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        }
    )


# --- what a model cannot do


def test_a_refused_task_gets_a_row_with_the_reason_and_the_others_run(run: Callable[..., Any]) -> None:
    results = run(TASKS, ClassifyOnly())
    refused = results["results"]["syn_retrieval"]
    assert refused["unsupported,none"] == "classify-only cannot embed images and embed texts"
    assert results["medvlm"]["unsupported"] == {"syn_retrieval": refused["unsupported,none"]}
    assert set(results["medvlm"]["tasks"]) == {"syn_zeroshot", "syn_view"}
    assert results["results"]["syn_zeroshot"]["auroc_edema,none"] == 0.5
    # What lm-eval's command line and loggers look up for each task.
    for key in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "samples"):
        assert set(results[key]) >= set(TASKS), key
    assert results["samples"]["syn_retrieval"] == []
    assert results["n-samples"]["syn_retrieval"] == {"original": 0, "effective": 0}
    assert {record["task"] for record in results.scores} == {"syn_zeroshot", "syn_view"}


def test_a_group_with_a_refused_member_is_still_reported(run: Callable[..., Any]) -> None:
    from lm_eval.utils import make_table

    results = run(["syn"], ClassifyOnly())
    assert "unsupported,none" in results["results"]["syn_retrieval"]
    assert "syn_view" in results["results"]
    table = make_table(results)
    assert "classify-only cannot" in table
    if "groups" in results:
        make_table(results, "groups")


def test_where_nothing_is_supported_the_run_stops_with_the_reasons(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="syn_retrieval: classify-only cannot embed"):
        run(["syn_retrieval"], ClassifyOnly())
    with pytest.raises(UserError, match=r"can do none of the tasks: .*syn_zeroshot: DummyLM cannot classify"):
        run(TASKS, DummyLM())


def test_lm_evals_own_tasks_are_refused_beside_ours(manager: TaskManager) -> None:
    tasks = manager.load(["syn_view"])["tasks"] | {"stock": stock_task()}
    results = evaluate(lm=BaselineBackend(kind="random"), task_dict={"tasks": tasks, "groups": {}})
    assert results["results"]["stock"]["unsupported,none"] == "medvlm-baseline cannot answer loglikelihood requests"
    assert 0 <= results["results"]["syn_view"]["accuracy,none"] <= 1
    with pytest.raises(UserError, match="stock: medvlm-baseline cannot answer loglikelihood requests"):
        evaluate(lm=BaselineBackend(), task_dict={"tasks": {"stock": stock_task()}, "groups": {}})


def test_a_run_without_ours_is_lm_evals_own(manager: TaskManager) -> None:
    for task_dict in ({"tasks": {"stock": stock_task()}, "groups": {}}, {"stock": stock_task()}):
        results = evaluate(lm=DummyLM(), task_dict=task_dict)
        assert "medvlm" not in results
        assert "acc,none" in results["results"]["stock"]


def test_reasons_are_words() -> None:
    task = ZeroShot({"task": "t", "dataset": "d", "labels": ["a"]})
    assert unsupported_reason(BaselineBackend(), task) is None
    assert unsupported_reason(DummyLM(), task) == "DummyLM cannot classify images"


# --- what the results say


def test_the_block_is_strict_json_with_every_documented_key(results: Any) -> None:
    block = json.loads(json.dumps(results["medvlm"], allow_nan=False))
    assert set(block) == {"schema_version", "versions", "asked", "model", "efficiency", "tasks", "unsupported"}
    assert {"card", "weights_sha256", "probability_scale"} <= set(block["model"])
    for name, task in block["tasks"].items():
        assert {
            "dataset",
            "split",
            "version",
            "documents",
            "scored",
            "counts",
            "contamination",
            "remote",
            "metrics",
        } <= set(task)
        assert set(task["dataset"]) == {"name", "source", "sha256", "revision", "licence", "sharing", "policies"}
        assert set(task["contamination"]) == {"trained_on", "splits_seen", "note"}
        for metric, estimate in task["metrics"].items():
            assert set(estimate) == {
                *("value", "stderr", "ci95", "n", "positives", "floor", "ceiling", "method", "reason", "extra")
            }, metric
            assert (estimate["value"] is not None) or estimate["reason"], f"{name} {metric}: undefined without a reason"
    assert {"label_set", "label_source", "compared_label_sources", "uncertain"} <= set(block["tasks"]["syn_zeroshot"])
    assert "truncated_share" in block["tasks"]["syn_retrieval"]


def test_the_block_agrees_with_lm_evals_table(results: Any) -> None:
    for name, task in results["medvlm"]["tasks"].items():
        row = results["results"][name]
        for metric, estimate in task["metrics"].items():
            assert np.nan_to_num(row[f"{metric},none"], nan=-1) == (
                -1 if estimate["value"] is None else estimate["value"]
            )
            stderr = row[f"{metric}_stderr,none"]
            assert np.nan_to_num(stderr, nan=-1) == (-1 if estimate["stderr"] is None else estimate["stderr"])
        assert row["alias"] == name
        assert results["versions"][name] == 2
        assert results["n-shot"][name] == 0


def test_each_tasks_estimates_are_computed_once(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = ZeroShot.estimate
    monkeypatch.setattr(ZeroShot, "estimate", lambda self, rows: calls.append(len(rows)) or real(self, rows))
    run(["syn_zeroshot"])
    assert calls == [60]


def test_samples_hold_ids_scores_and_hashes_and_no_text(results: Any) -> None:
    logged = json.dumps(results["samples"], default=str)
    assert "finding 3" not in logged and "impression 4" not in logged
    sample = results["samples"]["syn_zeroshot"][0]
    assert sample["doc"]["image"] == sample["arguments"][0][0]
    assert len(results["samples"]["syn_zeroshot"]) == 60


def test_limit_and_samples_are_said(run: Callable[..., Any]) -> None:
    limited = run(["syn_zeroshot", "syn_retrieval"], limit=12)
    for task in limited["medvlm"]["tasks"].values():
        assert (task["scored"], task["documents"]) == (12, 60)
    assert len({record["study"] for record in limited.scores}) == 12


def test_versions_are_those_installed() -> None:
    versions = installed_versions()
    assert versions["numpy"] == np.__version__
    assert {"python", "medvlm-harness", "lm_eval", "torch", "transformers", "open_clip_torch"} <= set(versions)


# --- contamination and --metadata


def test_a_split_that_the_model_was_trained_on_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="the card of seen says that it was trained on the test split"):
        run(["syn_view"], seen("Synthetic"))
    with pytest.raises(UserError, match="trained on the train split"):
        run(["syn_view"], seen("synthetic", "hash train split"), {"split": "train"})


def test_it_may_be_scored_all_the_same_and_the_result_says_so(run: Callable[..., Any]) -> None:
    results = run(["syn_view"], seen("Synthetic"), {"allow_contaminated": True})
    contamination = results["medvlm"]["tasks"]["syn_view"]["contamination"]
    assert contamination["note"] == "scored on test, which it was trained on"
    assert contamination["trained_on"] == ["Synthetic"]


def test_what_is_fitted_on_a_split_that_was_trained_on_is_said_to_be_optimistic(
    run: Callable[..., Any], demo: Any
) -> None:
    model = seen({"dataset": "demo_cxr", "splits": ["validation"]})
    results = run(["demo_cxr_view", "demo_cxr_image_use_labels"], model, {"data_dir": str(demo.folder)})
    notes = {track: task["contamination"]["note"] for track, task in results["medvlm"]["tasks"].items()}
    assert "fitted on validation is optimistic" in str(notes["demo_cxr_view"])
    assert notes["demo_cxr_image_use_labels"] is None  # which fits nothing


def test_the_splits_it_has_not_seen_are_scored_without_a_note(run: Callable[..., Any]) -> None:
    model = seen("synthetic", {"dataset": "synthetic", "splits": ["train"]}, "MIMIC-CXR")
    contamination = run(["syn_view"], model)["medvlm"]["tasks"]["syn_view"]["contamination"]
    assert contamination["splits_seen"] == ["train"]
    assert contamination["note"] is None


def test_a_model_of_which_nothing_is_known_says_so(run: Callable[..., Any]) -> None:
    contamination = run(["syn_view"], ClassifyOnly())["medvlm"]["tasks"]["syn_view"]["contamination"]
    assert contamination["trained_on"] is None
    assert "nothing is known" in contamination["note"]


def test_an_unknown_metadata_key_names_the_near_one(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"'spilt' in --metadata\. Did you mean split\?"):
        run(["syn_view"], metadata={"spilt": "test"})


def test_the_models_own_options_are_no_unknown_keys(run: Callable[..., Any]) -> None:
    # lm-eval merges --model_args into each task's metadata.
    results = run(["syn_view"], metadata={"kind": "random", "seed": 3, "split": "train"})
    assert results["medvlm"]["tasks"]["syn_view"]["split"] == "train"
    assert results["configs"]["syn_view"]["metadata"] == {"version": 2}


def test_a_request_cache_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="--cache_requests"):
        run(["syn_view"], cache_requests=True)


@pytest.mark.parametrize("name", ["data of syn_view", "precision", "versions"])
def test_processes_that_differ_in_what_they_have_are_refused(run: Callable[..., Any], name: str) -> None:
    class First(ClassifyOnly):
        """The first of two, the other of which has something else."""

        world_size = 2

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
            return [obj, {**obj, name: "other"}]

        def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
            raise AssertionError("asked, though it is known that the processes differ")

    with pytest.raises(UserError, match=f"Process 1 has other {name} than process 0: other, not"):
        run(["syn_view"], First())
