from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from medvlm_harness.errors import UserError
from medvlm_harness.results.scores import SCHEMA, name_folder, write_scores

COLUMNS = ["task", "study", "patient", "image", "split", "label", "target", "margin", "probability", "rank", "tied"]
COLUMNS += ["value", "answer"]


def save(results: Any, output: Path) -> Any:
    """What `lm_eval run --output_path` does after the run."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.log_experiment_args(
        model_source="medvlm-baseline", model_args="kind=random", system_instruction="", chat_template="",
        fewshot_as_multiturn=False,
    )  # fmt: skip
    own = copy(results)
    samples = own.pop("samples")  # as lm-eval's command line does
    tracker.save_results_aggregated(results=own, samples=samples)
    return tracker


@pytest.mark.parametrize(
    ("model_args", "folder"),
    [
        ("kind=random", "some-model"),  # lm-eval: eight random letters
        ("pretrained={here}", "some-model"),  # lm-eval: the path, hidden where it starts with a dot
        ("pretrained=org/name", "org__name"),
    ],
)
def test_the_output_folder_has_a_name_that_says_what_ran(model_args: str, folder: str, tmp_path: Path) -> None:
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path))
    given = model_args.format(here=tmp_path)
    tracker.general_config_tracker.log_experiment_args(
        model_source="x", model_args=given, system_instruction="", chat_template="", fewshot_as_multiturn=False
    )
    name_folder(tracker, {"config": {"model_args": given}, "medvlm": {"model": {"card": {"name": "some-model"}}}})
    assert tracker.general_config_tracker.model_name_sanitized == folder


def test_the_file_has_the_documented_columns(tmp_path: Path) -> None:
    record = {"task": "t", "study": "s", "label": "Edema", "target": None, "margin": 0.1, "probability": 0.5}
    write_scores(tmp_path / "deep" / "scores.parquet", [record])
    table = pq.read_table(tmp_path / "deep" / "scores.parquet")
    assert table.schema == SCHEMA
    assert table.column_names == COLUMNS
    assert table.to_pylist() == [dict.fromkeys(COLUMNS) | record]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.parquet"]


def test_no_record_still_gives_the_columns(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.parquet", [])
    assert pq.read_table(tmp_path / "scores.parquet").column_names == COLUMNS


def test_a_record_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.parquet", [])
    before = (tmp_path / "scores.parquet").read_bytes()
    with pytest.raises((ValueError, TypeError)):
        write_scores(tmp_path / "scores.parquet", [{"target": "many"}])
    assert (tmp_path / "scores.parquet").read_bytes() == before


def test_the_file_beside_the_results_equals_the_answers(results: Any, tmp_path: Path) -> None:
    block = results["medvlm"]
    save(results, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*/run_*/scores.parquet")
    records = pq.read_table(path).to_pylist()
    samples = results["samples"]["syn_zeroshot"]
    labels = [record for record in records if record["task"] == "syn_zeroshot"]
    assert len(labels) == 2 * len(samples) == 120
    by_image = {(record["image"], record["label"]): record for record in labels}
    for sample in samples:
        margin, probability = sample["filtered_resps"][0]
        for j, name in enumerate(("Edema", "Fracture")):
            record = by_image[sample["doc"]["file"], name]
            assert record["margin"] == margin[j]
            assert record["probability"] == probability[j]
            assert record["target"] == sample["target"][j]
            assert (record["study"], record["split"]) == (sample["doc"]["study_id"], "test")
    edema = [record for record in labels if record["label"] == "Edema"]
    area = roc_auc_score([r["target"] for r in edema], [r["margin"] for r in edema])
    assert area == pytest.approx(block["tasks"]["syn_zeroshot"]["metrics"]["auroc_edema"]["value"], abs=1e-12)
    search = [record for record in records if record["label"] == "i2t"]
    assert len(search) == 60
    mrr = block["tasks"]["syn_retrieval"]["metrics"]["i2t_median_rank"]["value"]
    ranks = sorted(record["rank"] for record in search)
    assert (ranks[29] + ranks[30]) / 2 == pytest.approx(mrr)


def test_the_results_file_holds_the_block_as_strict_json(results: Any, tmp_path: Path) -> None:
    save(results, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*/results_*.json")
    assert path.parent.name == "medvlm-baseline"  # and not random letters
    written = json.loads(path.read_text())
    block = {**results["medvlm"], "asked": {**results["medvlm"]["asked"], "include_path": ["<local>/tasks"]}}
    assert written["medvlm"] == json.loads(json.dumps(block, allow_nan=False))
    undefined = [name for name, one in block["tasks"]["syn_zeroshot"]["metrics"].items() if one["value"] is None]
    assert undefined
    assert all(written["results"]["syn_zeroshot"][f"{name},none"] is None for name in undefined)
    assert "scores" not in written and len(path.read_text()) < 200_000


@pytest.mark.parametrize("output", ["out", "out/results.json"])
def test_two_runs_never_overwrite_each_other(run: Callable[..., Any], tmp_path: Path, output: str) -> None:
    results = run(["syn_view"])
    for _ in range(2):
        save(results, tmp_path / output)
    assert len(list((tmp_path / "out").rglob("results*.json"))) == 2
    runs = list((tmp_path / "out").rglob("run_*/scores.parquet"))
    assert len(runs) == 2
    assert len({path.parent for path in runs}) == 2


@pytest.mark.parametrize("output", ["file/out", "file/out.json"])
def test_a_folder_that_cannot_be_written_is_an_error_and_nothing_is_lost(
    run: Callable[..., Any], tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"could not be written to .*writable") as error:
        save(run(["syn_view"]), tmp_path / output)
    (kept,) = tmp_path.glob("medvlm-results-*")
    assert str(kept) in str(error.value)
    assert "syn_view" in json.loads((kept / "results.json").read_text())["medvlm"]["tasks"]
    assert pq.read_table(kept / "scores.parquet").num_rows > 0


def test_without_an_output_path_nothing_is_written(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.chdir(tmp_path)
    results = run(["syn_view"])
    EvaluationTracker().save_results_aggregated(results=results, samples=None)
    assert list(tmp_path.rglob("*.parquet")) == []
