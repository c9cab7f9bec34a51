from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import selftest
from medvlm_harness.model_backends.selftest import TOLERANCE, families, run_selftest
from medvlm_harness.model_backends.selftest.chexzero import ANSWERS, CHECKPOINT, FILES


@pytest.fixture
def golden(shared: Path, tmp_path: Path) -> Path:
    """A copy of CheXzero's files that may be changed."""
    for name in FILES:
        shutil.copyfile(shared / "golden" / name, tmp_path / name)
    return tmp_path


def test_the_reference_is_reproduced(golden: Path) -> None:
    report = run_selftest(golden)
    assert {one.family for one in report.comparisons} == {"chexzero"}
    assert {one.name for one in report.comparisons} >= {"image embeddings", "text embeddings", "pair probabilities"}
    assert len(report.comparisons) == 6
    assert all(one.difference < TOLERANCE for one in report.comparisons)
    assert report.problem is None
    assert set(report.skipped) == set(families()) - {"chexzero"}


def test_changed_weights_fail(golden: Path) -> None:
    state = torch.load(golden / CHECKPOINT, weights_only=True)
    state["visual.ln_post.bias"] = state["visual.ln_post.bias"] + 0.01
    torch.save(state, golden / CHECKPOINT)
    report = run_selftest(golden)
    above = {one.name for one in report.comparisons if not one.passed}
    assert "image embeddings" in above and "text embeddings" not in above
    assert report.problem is not None and "chexzero image embeddings" in report.problem


def test_a_reference_that_is_not_a_number_fails(golden: Path) -> None:
    from safetensors import safe_open

    answers = load_file(golden / ANSWERS)
    with safe_open(golden / ANSWERS, "pt") as file:
        metadata = file.metadata()
    answers["text_embeds"][0, 0] = float("nan")
    save_file(answers, golden / ANSWERS, metadata=metadata)
    assert "chexzero text embeddings" in str(run_selftest(golden).problem)


@pytest.mark.parametrize("name", [CHECKPOINT, ANSWERS])
def test_a_damaged_file_fails_and_says_so(golden: Path, name: str) -> None:
    content = bytearray((golden / name).read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    (golden / name).write_bytes(content)
    report = run_selftest(golden)
    assert report.failed["chexzero"].startswith("failed: ")
    assert "\n" not in report.failed["chexzero"]
    assert report.problem == "Self-test failed: chexzero."


def test_a_dropped_key_fails(golden: Path) -> None:
    state = torch.load(golden / CHECKPOINT, weights_only=True)
    del state["ln_final.bias"]
    torch.save(state, golden / CHECKPOINT)
    assert "1 keys missing" in run_selftest(golden).failed["chexzero"]


def test_without_all_files_of_a_family_it_is_skipped_and_nothing_is_no_pass(golden: Path) -> None:
    (golden / CHECKPOINT).unlink()
    report = run_selftest(golden)
    assert report.skipped["chexzero"] == f"skipped, without {CHECKPOINT}"
    assert report.comparisons == ()
    assert report.problem == "Nothing was compared: no family has all of its files there."


def test_a_family_may_have_tolerances_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimpleNamespace(
        FILES=(), TOLERANCES={"loose": 1e-2}, differences=lambda folder: {"loose": 5e-3, "tight": 5e-3, "exact": 0.0}
    )
    monkeypatch.setattr(selftest, "families", lambda: ("one",))
    monkeypatch.setattr(selftest, "import_module", lambda name: family)
    report: Any = run_selftest(tmp_path)
    assert {one.name: one.verdict for one in report.comparisons} == {"loose": "ok", "tight": "ABOVE", "exact": "ok"}
    assert report.problem == "Self-test failed: one tight."


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected --golden to be a folder"):
        run_selftest(tmp_path / "nowhere")
