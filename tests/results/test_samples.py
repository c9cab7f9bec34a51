from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.results.run_files import read_run
from medvlm_harness.results.samples import read_samples, samples_files

HASHES = {name: letter * 64 for name, letter in (("doc_hash", "a"), ("prompt_hash", "b"), ("target_hash", "c"))}
# One sample as lm-eval 0.4.3, 0.4.5 and 0.4.7 to 0.4.13 write it; 0.4.2 writes an array of them, arguments as lists.
V3: dict[str, Any] = {
    "doc_id": 0,
    "doc": {"q": "?"},
    "target": 1,
    "arguments": {f"gen_args_{k}": {"arg_0": "?", "arg_1": f" {k}"} for k in range(11)},
    "resps": [[["-1.0", "False"]]] * 11,
    "filtered_resps": [["-1.0", "False"]] * 11,
    **HASHES,
    "acc": 1.0,
}
V5 = {**V3, "target": "1"}
V7 = {**V5, "filter": "none", "metrics": ["acc"]}
V2 = {**V3, "arguments": [list(one.values()) for one in V3["arguments"].values()]}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("record", [V3, V5, V7])
def test_each_layout_gives_the_same_record(tmp_path: Path, record: Any) -> None:
    first, second = read_samples(write(tmp_path / "s.jsonl", record, {**record, "doc_id": 1}))
    assert (first.doc_id, second.doc_id) == (0, 1)
    assert first.arguments == tuple(("?", f" {k}") for k in range(11))  # in their order: 10 comes after 9
    assert (first.doc, first.metrics, first.hashes) == ({"q": "?"}, {"acc": 1.0}, HASHES)
    assert (first.target, first.filter) == (record["target"], record.get("filter"))
    assert len(first.responses) == len(first.filtered) == 11


def test_up_to_0_4_2_a_file_holds_one_array(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps([V2, V2], indent=2), encoding="utf-8")
    samples = list(read_samples(tmp_path / "s.jsonl"))
    assert len(samples) == 2
    assert samples[0].arguments == tuple(("?", f" {k}") for k in range(11))


def test_a_last_line_that_was_cut_off_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "s.jsonl", V7, V7)
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        assert len(list(read_samples(path))) == 1
    assert "its last line, 2, was cut off" in caplog.text


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", V7)
    path.write_text("{\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="line 1 is no JSON"):
        list(read_samples(path))


@pytest.mark.parametrize(
    ("record", "message"),
    [(3, "got int"), ({**V7, "doc": "x"}, "its 'doc' is 'x'"), ({"doc_id": 1}, "its 'doc' is None")],
)
def test_what_is_no_sample_is_refused(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(read_samples(write(tmp_path / "s.jsonl", V7, record)))
    assert "line 2" in str(caught.value)


def test_a_long_line_is_one_record(tmp_path: Path) -> None:
    (sample,) = read_samples(write(tmp_path / "s.jsonl", {**V7, "doc": {"text": "x" * 3_000_000}}))
    assert len(sample.doc["text"]) == 3_000_000


def test_samples_of_another_run_in_the_folder_are_not_this_runs(demo_runs: dict[str, Path], tmp_path: Path) -> None:
    run = read_run(demo_runs["tiny"])
    found = samples_files(run)
    assert set(found) == set(run.results["configs"])
    assert len(list(read_samples(found["demo_cxr_retrieval"]))) == 4
    assert list(read_samples(found["demo_cxr_text_zeroshot"])) == []  # the model cannot do it
    for date in ("2026-01-02T03-04-05.000006", "2026-11-30T23-29-36"):
        write(tmp_path / f"samples_t_{date}.jsonl", V7)
    (tmp_path / "results_2026-11-30T23-29-36.json").write_text('{"results": {}}', encoding="utf-8")
    other = samples_files(read_run(tmp_path / "results_2026-11-30T23-29-36.json"))
    assert other == {"t": tmp_path / "samples_t_2026-11-30T23-29-36.jsonl"}
    (tmp_path / "renamed.json").write_text('{"results": {}}', encoding="utf-8")
    assert samples_files(read_run(tmp_path / "renamed.json")) == {}
