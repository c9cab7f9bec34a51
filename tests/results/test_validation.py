from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.results.manifest import MANIFEST, changes
from medvlm_harness.results.validation import validate

TASK = "demo_cxr_retrieval"
Edit = Callable[[Any], None]


@pytest.fixture
def copied(demo_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run that may be edited."""
    folder = demo_runs["tiny"].parent
    shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / folder.name / demo_runs["tiny"].name


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def metric(content: Any, name: str = "i2t_recall@1") -> Any:
    return content["medvlm"]["tasks"][TASK]["metrics"][name]


@pytest.mark.parametrize("name", ["tiny", "constant"])
def test_what_a_run_wrote_is_valid_and_every_file_of_it_is_in_the_manifest(
    demo_runs: dict[str, Path], name: str
) -> None:
    verdict = validate(demo_runs[name])
    assert (verdict.problems, verdict.notes) == ([], [])
    (manifest,) = demo_runs[name].parent.glob(f"run_*/{MANIFEST}")
    recorded = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    there = [path for path in demo_runs[name].parent.rglob("*") if path.is_file() and path != manifest]
    assert set(recorded) == {path.relative_to(demo_runs[name].parent).as_posix() for path in there}


def set_value(value: float) -> Edit:
    return lambda content: metric(content).update(value=value)


def both_values(content: Any) -> None:
    """As a careful hand would: block, table and interval agree."""
    estimate = metric(content)
    estimate.update(value=0.99, ci95=[0.9, 1.0])
    content["results"][TASK]["i2t_recall@1,none"] = 0.99


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            set_value(0.42),
            ["i2t_recall@1: lm-eval's table has", "was changed after the run: medvlm.tasks.demo_cxr_retrieval.metrics"],
        ),
        (set_value(7.0), ["its value 7.0 is outside of its interval"]),
        (set_value(float("nan")), ["i2t_recall@1.value: expected a finite number, but got nan"]),
        (
            both_values,
            [
                "i2t_recall@1: it says 0.99, but scores.parquet gives",
                "was changed after the run: results.demo_cxr_retrieval, medvlm",
            ],
        ),
        (
            lambda content: metric(content)["extra"].update(mine=float("inf")),
            ["medvlm.tasks.demo_cxr_retrieval.metrics.i2t_recall@1.extra.mine is inf, which is no JSON"],
        ),
        (lambda content: metric(content).update(ci95=[0.9, 0.1]), ["its interval ends before it begins"]),
        (lambda content: metric(content).update(stderr=-1.0), ["its standard error -1.0 is below 0"]),
        (
            lambda content: content["medvlm"]["tasks"][TASK].update(scored=10_000),
            ["10000 scored of", "was changed after the run: medvlm.tasks.demo_cxr_retrieval.scored"],
        ),
        (
            lambda content: content["medvlm"]["model"]["card"].update(name="a better model"),
            ["was changed after the run: medvlm.model"],
        ),
        (lambda content: content["medvlm"]["tasks"].pop(TASK), [f"medvlm.tasks.{TASK}.dataset (gone)"]),
        (lambda content: content["results"].pop(TASK), ["lm-eval's table has no row of it"]),
        (lambda content: None, ["was changed after the run, in its layout alone"]),
    ],
)
def test_an_edit_by_hand_is_caught_by_name(copied: Path, change: Edit, messages: list[str]) -> None:
    edit(copied, change)
    if messages[0].endswith("layout alone"):
        copied.write_text(copied.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    verdict = validate(copied)
    assert not verdict.valid
    for message in messages:
        assert any(message in problem for problem in verdict.problems), (message, verdict.problems)


def test_other_files_of_a_run_count_too(copied: Path) -> None:
    (samples,) = copied.parent.glob(f"samples_{TASK}_*.jsonl")
    samples.write_bytes(samples.read_bytes()[:-10])
    (scores,) = copied.parent.glob("run_*/scores.parquet")
    scores.unlink()
    verdict = validate(copied)
    assert verdict.problems == [
        f"{scores.parent.name}/scores.parquet is gone",
        f"{samples.name} was changed after the run",
    ]
    assert verdict.notes == ["no scores.parquet: no value was computed anew"]


def test_runs_without_a_manifest_or_a_block_say_so(copied: Path, tmp_path: Path) -> None:
    for manifest in copied.parent.glob(f"run_*/{MANIFEST}"):
        manifest.unlink()
    assert changes(copied, {}) is None
    verdict = validate(copied)
    assert verdict.valid
    assert verdict.notes == ["no manifest: whether it was changed after the run is not known"]
    other = tmp_path / "results_2026-01-02T03-04-05.json"
    other.write_text(json.dumps({"results": {"arc": {"acc,none": float("nan")}}}), encoding="utf-8")
    verdict = validate(other)
    assert verdict.valid
    assert verdict.notes[0].startswith("no block `medvlm`")


@pytest.mark.parametrize("manifest", ["", "[]", '{"schema_version": 9}'])
def test_a_manifest_that_is_none_is_a_problem(copied: Path, manifest: str) -> None:
    (path,) = copied.parent.glob(f"run_*/{MANIFEST}")
    path.write_text(manifest, encoding="utf-8")
    assert any("Expected the manifest of a run" in problem for problem in validate(copied).problems)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\ud800"])
def test_what_is_no_json_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    verdict = validate(path)
    assert len(verdict.problems) == 1
    assert verdict.problems[0].startswith("it cannot be read")
    assert "\n" not in verdict.problems[0]
