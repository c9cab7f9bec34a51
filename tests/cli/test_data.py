"""`medvlm data prepare` and `data info`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_prepare_prints_what_was_read_and_dropped(
    medvlm: Callable[..., Any], kaggle_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "iu_cxr"
    (kaggle_folder / "images" / "deep" / "4_IM-2050-1001.png").write_bytes(b"not an image")
    status, printed, err = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--out", out)
    assert (status, err) == (0, "")
    assert "read 3 studies and 2 images (layout kaggle)" in printed
    (dropped,) = [line for line in printed.splitlines() if line.startswith("  dropped: ") and "4_IM-2050-1001" in line]
    assert dropped.startswith("  dropped: 1 ")
    assert f"wrote {out}" in printed
    assert (out / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("option", "value", "meant"), [("--split-scheme", "r2gem", "r2gen"), ("--layout", "kagle", "kaggle")]
)
def test_prepare_names_what_was_meant(
    medvlm: Callable[..., Any], kaggle_folder: Path, option: str, value: str, meant: str
) -> None:
    outcome = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, option, value)
    assert outcome.status == 2
    assert f"Did you mean {meant}?" in outcome.error


def test_a_table_of_labels_that_is_not_there_is_named(medvlm: Callable[..., Any], kaggle_folder: Path) -> None:
    outcome = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--labels", "nowhere.csv")
    assert outcome.status == 2
    assert "nowhere.csv" in outcome.error


def test_labels_may_come_from_a_table_and_from_a_labeler(
    medvlm: Callable[..., Any], kaggle_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv").write_text("uid,edema\n1,0\n")
    prepare = ("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--out", tmp_path / "set" / "iu_cxr")
    assert medvlm(*prepare, "--labels", tmp_path / "labels.csv", "--labels", "rules,sections=findings").status == 0
    printed = medvlm("data", "info", "iu_cxr", "--data-dir", tmp_path / "set").out
    assert "labels_rules: version " in printed
    assert "on the findings alone" in printed
    assert "chexpert_labeler / rules" in printed


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("nowhere.csv",), "to be a table or a labeler (rules, chexbert), but nowhere.csv is neither"),
        (("rule",), "but rule is neither"),
        (("rules,section=both",), "Did you mean sections?"),
        (("rules", "rules"), "got rules twice"),
        (("a.csv", "b.csv"), "Expected one table of labels, but got a.csv and b.csv"),
    ],
)
def test_labels_that_are_none_are_named(
    medvlm: Callable[..., Any], kaggle_folder: Path, labels: tuple[str, ...], expected: str
) -> None:
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("uid,edema\n1,0\n")
    options = [part for value in labels for part in ("--labels", value)]
    outcome = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, *options)
    assert outcome.status == 2
    assert expected in outcome.error


def test_info_shows_what_was_prepared(medvlm: Callable[..., Any], kaggle_folder: Path, tmp_path: Path) -> None:
    prepared = medvlm("data", "prepare", "iu_cxr", "--source", kaggle_folder, "--split_scheme", "hash")
    assert prepared.status == 0
    status, out, err = medvlm("data", "info", "iu_cxr")
    assert (status, err) == (0, "")
    assert out.startswith(f"iu_cxr: {tmp_path}/cache/medvlm_harness/data/iu_cxr (layout kaggle, licence ")
    for title in ("Splits", "Labels (studies)", "Sections", "Agreement between label sources"):
        assert title in out
    assert medvlm("data", "info", "iu_cxr", "--data-dir", tmp_path / "cache" / "medvlm_harness" / "data").status == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("data", "prepare"), "Missing argument 'name'"),
        (("data", "prepare", "iu_cxrr"), "Unknown data set 'iu_cxrr'. Did you mean iu_cxr?"),
        (("data", "prepare", "zzz"), "Unknown data set 'zzz'. Known: demo_cxr, iu_cxr."),
        (("data", "prepare", "iu_cxr"), "Expected --source DIR"),
        (("data", "prepare", "iu_cxr", "--source", "nowhere"), "nowhere is none"),
        (("data", "prepare", "demo_cxr", "--source", "nowhere"), "leave out --source, --labels and --layout"),
        (("data", "info", "iu_cxrr"), "Unknown data set 'iu_cxrr'. Did you mean iu_cxr?"),
        (("data", "info", "iu_cxr"), "no IU-CXR data found"),
        (("data", "info", "iu_cxr", "--data-dir", "nowhere"), "Expected the prepared set iu_cxr in data_dir nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_user_can_mend_is_one_line_and_status_2(
    medvlm: Callable[..., Any], arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in medvlm(*arguments).refusal
