"""The last look at outgoing files: what it finds in which kind of file, what it says of it, and what it lets pass."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.results.publishing.scan import (
    report_texts,
    sample_texts,
    scan_for_reports,
    scan_for_secrets,
)

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsT"
REPORT = "There is a small calcified granuloma in the left upper lobe, unchanged. Heart size is normal today."


def as_json(text: str) -> bytes:
    return json.dumps({"a": [{"b": text}]}).encode()


def as_key(text: str) -> bytes:
    return json.dumps({text: 1}).encode()


def as_parquet(text: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"value": [1.0, 2.0], "note": ["x", text]}), buffer, compression="zstd")
    return buffer.getvalue()


def as_parquet_metadata(text: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"value": [1.0]}).replace_schema_metadata({"from": text}), buffer)
    return buffer.getvalue()


def as_png(text: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", text, zip=True)
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


FORMS = [
    ("a.json", as_json),
    ("a.json", as_key),
    ("a.parquet", as_parquet),
    ("a.parquet", as_parquet_metadata),
    ("a.png", as_png),
    ("a.csv", str.encode),
    ("a.md", str.encode),
    ("a.yaml", str.encode),
]


@pytest.mark.parametrize(("name", "write"), FORMS)
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"model_args token={TOKEN}", "a Hugging Face token"),
        ("weights in /home/alice/models/x.pt", "a home folder"),
        ("weights in /Users/alice/x.pt", "a home folder"),
        ("weights in C:\\Users\\alice\\x.pt", "a home folder"),
    ],
)
def test_secrets_are_found_in_every_kind_of_file(
    name: str, write: Callable[[str], bytes], text: str, kind: str
) -> None:
    found = scan_for_secrets({name: write(text)})
    assert kind in {one.kind for one in found}
    assert all(one.file == name for one in found)
    # What is said of it is not it.
    assert TOKEN not in str(found)
    assert "alice" not in str(found)
    assert scan_for_secrets({name: write("a plain note")}) == []


@pytest.mark.parametrize(("name", "write"), FORMS)
@pytest.mark.parametrize(
    "text",
    ["… a SMALL calcified\n granuloma in the left upper lobe …", "heart size is normal today", REPORT],
)
def test_words_of_a_report_are_found_in_every_kind_of_file(name: str, write: Callable[[str], bytes], text: str) -> None:
    found = scan_for_reports({name: write(text)}, [REPORT])
    assert {one.file for one in found} == {name}
    assert "granuloma" not in str(found)


@pytest.mark.parametrize(
    "text",
    ["small calcified granuloma", "a granuloma in the lobe of the left upper lung", "not_words@0a1b2c3"],
)
def test_a_few_words_are_no_report(text: str) -> None:
    assert scan_for_reports({"a.md": text.encode()}, [REPORT]) == []


def test_what_our_own_prompts_say_is_no_report() -> None:
    prompt = "Which impression belongs to the findings of this chest x-ray report?"
    assert scan_for_reports({"a.md": prompt.encode()}, [prompt]) == []
    other = prompt.replace("impression", "diagnosis")
    assert scan_for_reports({"a.md": other.encode()}, [other])


def test_names_of_files_are_looked_at() -> None:
    assert scan_for_secrets({f"plots/{TOKEN}.png": as_png("x")})
    assert scan_for_reports({"heart size is normal today.md": b""}, [REPORT])


def test_the_user_and_the_machine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/mallory")
    monkeypatch.setattr("platform.node", lambda: "ward7-workstation")
    kinds = [one.kind for text in ("/data/people/mallory/x", "/scratch/mallory/x", "ran on ward7-workstation")
             for one in scan_for_secrets({"a.md": text.encode()})]  # fmt: skip
    assert kinds == [
        "this user's folder",
        "this user's name in a path",
        "this user's name in a path",
        "this machine's name",
    ]
    assert scan_for_secrets({"a.md": b"mallory-v2 and ward7-workstations"}) == []


@pytest.mark.parametrize("name", ["a.pkl", "a.jsonl", "model.safetensors", "a"])
def test_a_kind_of_file_that_is_not_read_does_not_pass(name: str) -> None:
    with pytest.raises(ValueError, match="nothing else is read"):
        scan_for_secrets({name: b"x"})


def test_columns_that_are_not_read_do_not_pass() -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"bytes": [b"secret"]}), buffer)
    with pytest.raises(ValueError, match="column bytes"):
        scan_for_secrets({"a.parquet": buffer.getvalue()})


def test_reports_come_from_the_prepared_set(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    folder = write_set(tmp_path / "set", [Study("s1", "p1", findings=REPORT, impression="No change.")])
    assert sorted(report_texts(folder)) == ["No change.", REPORT]


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"doc": "x"}\n{"doc": ')
    with pytest.raises(UserError, match=r"samples\.jsonl is damaged"):
        list(sample_texts(path))


def test_samples_give_documents_and_answers_but_not_names_of_metrics(tmp_path: Path) -> None:
    sample = {
        **{"doc": {"findings": REPORT}, "resps": [["It says so."]], "arguments": {"gen_args_0": {"arg_0": "Tell me."}}},
        **{"target": "t", "metrics": ["sensitivity_at_youden_of_edema_on_test"], "filter": "none"},
    }
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(sample) + "\n")
    assert sorted(sample_texts(path)) == ["It says so.", "Tell me.", REPORT, "t"]
