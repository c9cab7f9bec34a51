from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from medvlm_harness.data.records import Dataset


@pytest.fixture(scope="session")
def word_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows three words."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "no": 1, "effusion": 2, ".": 3}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    path = tmp_path / "reports.csv"
    path.write_text("id,findings,impression\n1,no effusion,no pneumothorax\n2,,\n3,no XXXX,no effusion\n")
    return path


def test_a_vocabulary_is_learnt_measured_and_known_as_learnt_from_what_it_is_measured_on(
    medvlm: Callable[..., Any], demo: Dataset, word_level: Path
) -> None:
    place = ("--texts", "demo_cxr", "--data-dir", demo.folder)
    outcome = medvlm("tokenizers", "train", *place, "--vocabulary", "500", "--output", "learnt")
    assert outcome.status == 0, outcome.err
    assert "500 tokens" in outcome.out
    command = ("tokenizers", *place, "--tokenizer", "learnt", "--tokenizer", f"words={word_level}")
    outcome = medvlm(*command, "--output", "out")
    assert outcome.status == 0, outcome.err
    assert "learnt from the train split, which is measured here" in outcome.out
    assert "learnt from" not in medvlm(*command, "--split", "test").out
    written = json.loads(Path("out/tokenizers.json").read_text())
    learnt, words = written["tokenizers"]["learnt"], written["tokenizers"]["words"]
    assert written["texts"]["splits"] == ["train", "validation", "test"]
    assert learnt["metrics"]["unknown_words"]["value"] == 0
    assert words["metrics"]["unknown_words"]["value"] > 0.5
    assert 1 < learnt["metrics"]["fertility"]["value"] < 2
    assert words["first_minus_this"]["fertility"]["value"] == pytest.approx(
        learnt["metrics"]["fertility"]["value"] - words["metrics"]["fertility"]["value"]
    )
    assert learnt["first_minus_this"] == {}
    with Path("out/tokenizers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(learnt["metrics"])
    assert float(rows[0]["value"]) == learnt["metrics"]["fertility"]["value"]
    assert Path("out/tokenizers.md").read_text().strip() in outcome.out
    with Image.open("out/tokenizers_plot.png") as plot:
        assert plot.width > 1000
    assert Path("out/tokenizers_plot.csv").read_text().count("\n") > 10


def test_a_table_and_a_text_file_are_measured_by_hand(
    medvlm: Callable[..., Any], reports: Path, word_level: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "reports.txt"
    lines.write_text("no effusion no pneumothorax\n\nno XXXX no effusion\n")
    for texts, columns in ((reports, ("--text-column", "findings", "--text-column", "impression")), (lines, ())):
        outcome = medvlm("tokenizers", "--texts", texts, *columns, "--tokenizer", word_level, "--output", "out")
        assert outcome.status == 0, outcome.err
        written = json.loads(Path("out/tokenizers.json").read_text())
        assert written["texts"] == {"name": texts.name, "splits": [], "reports": 2, "without_text": 1}
        if texts == lines:
            metrics = written["tokenizers"]["tokenizer.json"]["metrics"]
            assert metrics["fertility"]["value"] == 1
            assert metrics["tokens_mean"]["value"] == 4
            assert metrics["unknown_words"]["value"] == 2 / 8
        removed = written["tokenizers"]["tokenizer.json"]["removed"]
        assert (removed["pieces"], removed["occurrences"]) == (["[UNK]"], 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Expected --texts iu_cxr and one or more --tokenizer NAME."),
        (("--texts", "demo_cxr2", "--tokenizer", "x"), "Unknown data set 'demo_cxr2'. Did you mean demo_cxr?"),
        (("--texts", "{reports}", "--tokenizer", "x"), "Expected the name of a column of text, but got none."),
        (
            ("--texts", "{reports}", "--tokenizer", "x", "--text-column", "finding"),
            "Expected one column 'finding' in reports.csv, but it is missing. Did you mean findings?",
        ),
        (
            ("--texts", "demo_cxr", "--tokenizer", "x", "--text-column", "findings"),
            "Expected --text-column with a table of reports, not with a prepared set.",
        ),
        (
            ("--texts", "demo_cxr", "--tokenizer", "{words}", "--tokenizer", "{words}"),
            "Two tokenizers are called 'tokenizer.json': name them by --tokenizer LABEL=...",
        ),
        (
            ("--texts", "demo_cxr", "--tokenizer", "=x"),
            "Expected --tokenizer NAME or LABEL=NAME, but got '=x'.",
        ),
        (
            ("--texts", "x", "train", "--texts", "demo_cxr", "--output", "out"),
            "Expected options after the command: medvlm tokenizers train ...",
        ),
        (
            ("train", "--texts", "{reports}", "--output", "out"),
            "Expected a prepared set (iu_cxr, demo_cxr), but got {reports}: nobody can say which patients of a file "
            "are for training.",
        ),
        (("train", "--texts", "iu_cxr2", "--output", "out"), "Unknown data set 'iu_cxr2'. Did you mean iu_cxr?"),
    ],
)
def test_wrong_input_gets_one_line(
    medvlm: Callable[..., Any], reports: Path, word_level: Path, arguments: tuple[str, ...], expected: str
) -> None:
    places = {"reports": str(reports), "words": str(word_level)}
    outcome = medvlm("tokenizers", *(argument.format(**places) for argument in arguments))
    assert outcome.refusal == expected.format(**places)
    assert not Path("out").exists()
