from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.labelers.radgraph_json import LABELS, read_radgraph, xl_label


def entity(
    tokens: str = "effusion", label: str = "OBS-DA", start: int = 1, end: int = 1, **more: Any
) -> dict[str, Any]:
    return {"tokens": tokens, "label": label, "start_ix": start, "end_ix": end, "relations": [], **more}


def write(tmp_path: Path, content: Any, name: str = "train.json") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_first_scheme_is_given_in_the_names_of_the_second(tmp_path: Path) -> None:
    first = entity("No", "ANAT-DP", 0, 0, relations=[["modify", "2"]])
    second = entity(relations=[["located_at", 1]])
    report = {"text": "No effusion .", "entities": {"1": first, "2": second}, "data_source": "MIMIC", "data_split": "x"}
    read = read_radgraph(write(tmp_path, {"p1/s1.txt": report}))
    assert list(read) == ["p1/s1.txt"]
    assert read["p1/s1.txt"].text == "No effusion ."
    assert read["p1/s1.txt"].annotations["entities"] == {
        "1": {**first, "label": "Anatomy::definitely present"},
        "2": {**second, "label": "Observation::definitely absent", "relations": [["located_at", "1"]]},
    }


def test_two_annotators_are_kept_apart(tmp_path: Path) -> None:
    report = {"text": "No effusion", "labeler_1": {"entities": {"1": entity()}}, "labeler_2": {"entities": {}}}
    read = read_radgraph(write(tmp_path, {"a": report}, "test.json"))["a"]
    assert list(read.annotations) == ["labeler_1", "labeler_2"]
    assert (len(read.annotations["labeler_1"]), len(read.annotations["labeler_2"])) == (1, 0)


def test_one_report_a_line_with_its_id(tmp_path: Path) -> None:
    lines = [json.dumps({"id": k, "text": "No effusion", "entities": {"1": entity()}}) for k in ("x", 7)]
    assert list(read_radgraph(write(tmp_path, "\n\n".join(lines), "a.jsonl"))) == ["x", "7"]


@pytest.mark.parametrize("label", LABELS)
def test_names_of_the_second_scheme_stay_and_measurements_lose_their_mark(label: str) -> None:
    kind, status = label.split("::")
    assert xl_label(label) == xl_label(f"{kind}::measurement::{status}") == label


@pytest.mark.parametrize("label", ["OBS", "obs-dp", "Observation", "Observation::present", "", "Anatomy::a::uncertain"])
def test_another_label_is_refused(label: str) -> None:
    with pytest.raises(UserError, match="expected a label of RadGraph"):
        xl_label(label)


ONE = '{"id": "a", "text": "x", "entities": {}}'
GOOD = {"text": "No effusion", "entities": {"1": entity()}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "expected a mapping of reports, but got a list"),
        ("{}", "it holds no report"),
        ({"a": 1}, "report 'a' has no text"),
        ({"a": {"entities": {}}}, "report 'a' has no text"),
        ({"a": {"text": "No effusion"}}, "report 'a' has no entities (entities, or labeler_1 and labeler_2)"),
        ({"a": {"text": "x", "entities": []}}, "expected entities to map numbers to entities, but got []"),
        ({"a": {"text": "x", "labeler_1": 3}}, "expected labeler_1 to map numbers to entities, but got None"),
        ({"a": {**GOOD, "entities": {"1": {"tokens": "x"}}}}, "entity 1: expected tokens, label, start_ix and end_ix"),
        ({"a": {**GOOD, "entities": {"1": entity(label="OBS-XX")}}}, "Did you mean OBS-"),
        ({"a": {**GOOD, "entities": {"1": entity(end=2)}}}, "expected places among 2 tokens, but got 1 to 2"),
        ({"a": {**GOOD, "entities": {"1": entity(start=-1)}}}, "but got -1 to 1"),
        ({"a": {**GOOD, "entities": {"1": entity(start=True)}}}, "but got True to 1"),
        ({"a": {**GOOD, "entities": {"1": entity("edema")}}}, "expected tokens 'effusion' at 1 to 1, but got 'edema'"),
        ({"a": {**GOOD, "entities": {"1": entity(relations=[["modify", "2"]])}}}, "to an entity that is there"),
        ({"a": {**GOOD, "entities": {"1": entity(relations=[["near", "1"]])}}}, "expected a relation (modify"),
        ({"a": {**GOOD, "entities": {"1": entity(relations="x")}}}, "expected a list of relations, but got 'x'"),
        ('{"a": {"text": "x", "entities": {}}, "a": {"text": "y", "entities": {}}}', "the key 'a' is there twice"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_radgraph(write(tmp_path, content))
    assert str(caught.value).startswith("train.json is no RadGraph file: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x", "entities": {}}', "expected a report with an id in line 1"),
        (
            '{"id": "a", "text": "x", "entities": {}}\n{"id": "a", "text": "x", "entities": {}}',
            "report 'a' is there twice",
        ),
    ],
)
def test_lines_without_an_id_of_their_own_are_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_radgraph(write(tmp_path, content, "a.jsonl"))
    assert message in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", write(tmp_path, "x", "notes.txt"), tmp_path):
        with pytest.raises(UserError, match="Expected a RadGraph file"):
            read_radgraph(path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_radgraph(tmp_path / "bytes.json")
    with pytest.raises(UserError, match="not JSON"):
        read_radgraph(write(tmp_path, "[" * 100_000))
