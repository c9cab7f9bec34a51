"""Each packaged task has one primary metric, among those that it reports."""

import pytest
from lm_eval.tasks import TaskManager

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset
from medvlm_harness.results.primary import primary_metric
from medvlm_harness.tracks.declarations import declared_names, summarise

EXPECTED = {
    "demo_cxr_zeroshot": "auroc",
    "demo_cxr_view": "balanced_accuracy",
    "demo_cxr_retrieval": "i2t_recall@10",
    "demo_cxr_text_retrieval": "f2i_recall@10",
    "demo_cxr_summarization": "rougeL",
    "demo_cxr_image_use_labels": "auroc_true_minus_other",
    "demo_cxr_robustness_zeroshot": "auroc_retention",
    "demo_cxr_robustness_retrieval": "i2t_recall@10_retention",
    "demo_cxr_efficiency": "latency_p50",
}


def test_every_demo_task_has_one(demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    folder = plugin.tasks_folder() / "demo_cxr"
    names = [name for name, path in declared_names(folder).items() if summarise(path).kind != "group"]
    tasks = TaskManager().load(names)["tasks"]
    found = {name: primary_metric({"metrics": dict.fromkeys(task.metric_names())}) for name, task in tasks.items()}
    assert all(found.values()), found
    assert {name: found.get(name) for name in EXPECTED} == EXPECTED


def test_a_task_of_somebody_else_has_none() -> None:
    assert primary_metric({"metrics": {"exact_match": {}}}) is None
