"""`medvlm label`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.labelers import make_labeler


@pytest.fixture
def reports(tmp_path: Path, write_csv: Callable[..., Path]) -> Path:
    rows = [("1", "No effusion.", "Edema."), ("2", "", ""), ("3", "Possible pneumonia.", "")]
    return write_csv(tmp_path / "reports.csv", ("uid", "findings", "impression"), rows)


def test_a_table_is_labelled_and_the_labelers_version_printed(medvlm: Callable[..., Any], reports: Path) -> None:
    out = reports.with_name("labels.csv")
    status, printed, err = medvlm("label", reports, "--text-column", "findings", "-o", out)
    assert (status, err) == (0, "")
    version = make_labeler("rules").version
    assert printed == f"wrote {out}: 3 reports labelled by rules {version}, 1 without text left blank\n"
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["uid", "findings", "impression", *CHEXPERT_14]
    assert (rows[0]["Pleural Effusion"], rows[0]["Edema"], rows[2]["Pneumonia"]) == ("0", "", "-1")


def test_both_sections_and_a_labelers_options(medvlm: Callable[..., Any], reports: Path) -> None:
    columns = ("--text-column", "findings", "--text_column", "impression")
    for name, labeler in (("both", "rules"), ("one", "rules,sections=findings")):
        out = reports.with_name(f"{name}.csv")
        assert medvlm("label", reports, *columns, "-o", out, "--labeler", labeler).status == 0
    edema = []
    for name in ("both", "one"):
        with reports.with_name(f"{name}.csv").open(newline="") as file:
            edema.append(next(csv.DictReader(file))["Edema"])
    assert edema == ["1", ""]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--text-column", "finding"), "Did you mean findings?"),
        (("--text-column", "findings", "--labeler", "rule"), "Did you mean rules?"),
        (("--text-column", "findings", "--labeler", "rules,section=both"), "Did you mean sections?"),
        ((), "Missing option '--text-column'"),
    ],
)
def test_wrong_input_is_one_line(
    medvlm: Callable[..., Any], reports: Path, arguments: tuple[str, ...], expected: str
) -> None:
    outcome = medvlm("label", reports, *arguments, "-o", "labels.csv")
    assert outcome.status == 2
    assert expected in outcome.error
    assert not Path("labels.csv").exists()


def test_a_file_is_not_overwritten_silently(medvlm: Callable[..., Any], reports: Path) -> None:
    arguments = ("label", reports, "--text-column", "findings", "-o", "labels.csv")
    assert medvlm(*arguments).status == 0
    outcome = medvlm(*arguments)
    assert (outcome.status, "--overwrite" in outcome.error) == (2, True)
    assert medvlm(*arguments, "--overwrite").status == 0
