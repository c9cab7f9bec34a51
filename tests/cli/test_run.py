"""`medvlm run`, and the plan of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = ("run", "--model", "medvlm-baseline", "--tasks", "iu_cxr_view")


def test_run_takes_dashes_and_writes_what_lm_eval_writes(
    medvlm_process: Callable[..., Any],
    prepared: Path,
    mine: Path,
    write_task: Callable[[Path, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_task(tmp_path / "second", "second_view")
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm_process(
        *(
            "run",
            "--model",
            "medvlm-baseline",
            "--model-args",
            "kind=random,seed=3",
            "--tasks",
            "iu_cxr_retr*,iu_cxr_view,mine_view,second_view",
        ),
        *("--include-path", mine, "--include_path", "second", "--output-path", "out", "--log-samples", "--limit=16"),
    )
    assert status == 0, err
    assert "Traceback" not in err
    names = {"iu_cxr_view", "mine_view", "second_view", "iu_cxr_retrieval"}
    (results_file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    assert names <= set(results["results"])
    assert names <= set(results["medvlm"]["tasks"])
    assert results["medvlm"]["model"]["kind"] == "random"
    assert results["versions"]["mine_view"] == 3
    assert len(list((tmp_path / "out").rglob("samples_mine_view_*.jsonl"))) == 1
    assert "95% interval" in out


def test_the_plan_counts_each_image_once_and_runs_nothing(
    medvlm: Callable[..., Any], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm("run", "--plan", "--tasks", "iu_cxr_view,iu_cxr_retrieval")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: [int(x) for x in line.split()[1:]] for line in out.splitlines() if "iu_cxr" in line}
    documents, images, texts, new_images, new_texts = rows["iu_cxr_view"]
    assert (documents, images, texts) == (24, 24, 2)
    assert (new_images, new_texts) == (images, texts)
    assert rows["iu_cxr_retrieval"][3] == 0  # its frontal images are among those
    (total,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["all"]]
    assert [int(x) for x in total[1:]] == [sum(row[3] for row in rows.values()), sum(row[4] for row in rows.values())]


def test_a_task_file_runs_by_its_path(
    medvlm: Callable[..., Any], mine: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    status, out, err = medvlm("run", "--plan", "-t", mine / "mine_view.yaml")
    assert (status, err) == (0, "")
    assert "mine_view" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "--model", "medvlm-tiny"), "Expected --tasks, such as --tasks 'iu_cxr_*'"),
        (("run", "--tasks", "iu_cxr_view"), "Expected --model, such as --model medvlm-tiny"),
        (
            ("run", "--model", "medvlm-tiny", "--tasks", "iu_cxr_veiw"),
            "Unknown task 'iu_cxr_veiw'. Did you mean iu_cxr_view",
        ),
        (("run", "--model", "medvlm-tiny", "--tasks", "iu_cxr_view,mmlu"), "Unknown task 'mmlu'."),
        (("run", "--model", "medvlm-tiny", "--tasks", "nowhere.yaml"), "Unknown task 'nowhere.yaml'."),
        (
            ("run", "--model", "medvlm-tinny", "--tasks", "iu_cxr_view"),
            "Unknown model 'medvlm-tinny'. Did you mean medvlm-tiny",
        ),
        ((*RUN, "--include-path", "nowhere"), "to be a folder with task YAML, but nowhere is not one"),
        ((*RUN, "--limmit", "3"), "unrecognized arguments: --limmit 3. Did you mean --limit?"),
        ((*RUN, "--debgu"), "unrecognized arguments: --debgu. Did you mean --debug?"),
        ((*RUN, "--limit", "few"), "argument --limit/-L: invalid float value: 'few'"),
        ((*RUN, "--config", "nowhere.yaml"), "Expected --config to be a YAML file, but nowhere.yaml is not one."),
        ((*RUN, "--model-args", "kind=orcle"), "Unknown kind 'orcle' of medvlm-baseline. Did you mean oracle?"),
        ((*RUN, "--model-args", "knd=oracle"), "Unknown option 'knd' of model medvlm-baseline. Did you mean kind?"),
        (RUN, "no IU-CXR data found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    medvlm: Callable[..., Any], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in medvlm(*arguments).refusal


def test_unknown_metadata_is_refused(
    medvlm: Callable[..., Any], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(prepared))
    outcome = medvlm(*RUN, "--metadata", '{"splitt": "test"}')
    assert outcome.status == 2
    assert "unknown key 'splitt' in --metadata. Did you mean split" in outcome.error


def test_a_broken_folder_stops_a_run_before_any_model_is_built(medvlm: Callable[..., Any], mine: Path) -> None:
    (mine / "broken.yaml").write_text("task: [", encoding="utf-8")
    outcome = medvlm(*RUN, "--include-path", mine)
    assert outcome.status == 2
    assert outcome.error.startswith(f"{mine}/broken.yaml: not valid YAML")


def test_a_broken_task_file_given_by_its_path_is_named(medvlm: Callable[..., Any], mine: Path) -> None:
    broken = mine / "broken.yaml"
    broken.write_text("class: !function medvlm_harness.ZeroShot\ntask: b\nlables: []\n", encoding="utf-8")
    outcome = medvlm("run", "--model", "medvlm-baseline", "--tasks", broken)
    assert outcome.status == 2
    assert outcome.error.startswith(f"{broken}: unknown key 'lables'")
