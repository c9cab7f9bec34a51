"""`medvlm models`: the list, one card, the self-test, and the page that shows the list."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.cli.models import markdown_table
from medvlm_harness.model_backends.catalogue import catalogue

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_every_registered_model_and_every_card_is_listed(medvlm: Callable[..., Any]) -> None:
    status, out, err = medvlm("models")
    assert (status, err) == (0, "")
    registered = {point.name for point in entry_points(group="lm_eval.models") if point.dist.name == "medvlm-harness"}
    listed = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert registered | catalogue().keys() <= listed
    assert len(registered) >= 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("medvlm-tiny", ["nothing", "yes"]),
        ("medgemma-27b", ["over the limit of 10B", "gated"]),
        ("chexagent-2-3b", ["no: it is remote code"]),
        ("pubmedclip", ["151.3M", "mit", "ROCO", "needs weights from flaviagiammarino"]),
        ("medfilip", ["none were published"]),
    ],
)
def test_the_list_says_what_is_known_and_what_stands_in_the_way(
    medvlm: Callable[..., Any], name: str, expected: list[str]
) -> None:
    _, out, _ = medvlm("models", "--markdown")
    (row,) = [line for line in out.splitlines() if line.startswith(f"| {name} |")]
    assert all(part in row for part in expected if part != "nothing")


@pytest.mark.parametrize("name", catalogue())
def test_each_card_is_shown_in_full(medvlm: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = medvlm("models", name)
    assert (status, err) == (0, "")
    card = catalogue()[name].card
    shown = " ".join(out.split())
    assert card.summary in shown
    assert all(trap in shown for trap in card.traps)
    assert "revision unpinned" in shown and "sha256 unpinned" in shown  # until a card pins one
    assert ("licence of weights not stated" in shown) == (card.licence is None)
    assert ("trained on not stated" in shown) == (card.trained_on is None)
    assert f"parameters {card.parameters:,}" in shown if card.parameters is not None else "None" not in shown
    for template in () if card.prompts is None else (*card.prompts.positive, *card.prompts.negative):
        assert repr(template) in shown


def test_an_unknown_name_gets_near_misses(medvlm: Callable[..., Any]) -> None:
    outcome = medvlm("models", "medclp")
    assert outcome.status == 2
    assert outcome.error == "No model 'medclp' in the catalogue. Did you mean medclip, pubmedclip, biomedclip?"


@pytest.mark.parametrize(
    "arguments",
    [("--selftest",), ("--golden", "."), ("chexzero", "--markdown"), ("chexzero", "--selftest", "--golden", ".")],
)
def test_options_that_do_not_go_together_are_refused(medvlm: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    assert medvlm("models", *arguments).status == 2


def test_the_selftest_prints_each_difference_and_fails_on_a_changed_copy(
    medvlm: Callable[..., Any], shared: Path, tmp_path: Path
) -> None:
    golden = tmp_path / "golden"
    golden.mkdir()
    for path in (shared / "golden").glob("*"):
        if path.name.startswith(("chexzero", "img_")):
            shutil.copyfile(path, golden / path.name)
    status, out, err = medvlm("models", "--selftest", "--golden", golden)
    assert status == 0, err
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == ["chexzero"]]
    assert len(rows) == 6
    assert all(float(row[-3]) < float(row[-2]) == 1e-4 and row[-1] == "ok" for row in rows)
    tampered = bytearray((golden / "chexzero_pre_ref.safetensors").read_bytes())
    tampered[-40:] = bytes(40)
    (golden / "chexzero_pre_ref.safetensors").write_bytes(tampered)
    outcome = medvlm("models", "--selftest", "--golden", golden)
    assert outcome.status == 2
    assert "Self-test failed: chexzero pixels of " in outcome.error
    assert "ABOVE" in outcome.out


def test_a_selftest_without_files_is_no_pass(medvlm: Callable[..., Any], tmp_path: Path) -> None:
    outcome = medvlm("models", "--selftest", "--golden", tmp_path)
    assert outcome.status == 2
    assert outcome.error == "Nothing was compared: no family has all of its files there."


def test_the_page_shows_the_catalogue() -> None:
    # To mend it, put what `medvlm models --markdown` prints into the page.
    assert markdown_table() in PAGE.read_text(encoding="utf-8")
