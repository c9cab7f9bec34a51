"""`medvlm reproduce`, with one real run in a process of its own; how runs are compared is tested beside the code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.data.records import Dataset
from medvlm_harness.results import reproduce
from medvlm_harness.results.manifest import MANIFEST


@pytest.fixture
def results(demo_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A results file that may be edited, and whose data must be named."""
    shutil.copytree(demo_runs["tiny"].parent, tmp_path / "run")
    return tmp_path / "run" / demo_runs["tiny"].name


def test_a_run_comes_out_again_and_an_edited_value_does_not(
    medvlm: Callable[..., Any], results: Path, demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"data_dir={demo.folder}"
    status, out, err = medvlm("reproduce", str(results), "--metadata", data, "-o", "again")
    assert status == 0, out
    assert "metrics came out again (tolerance 0)." in out
    same, _, every = out.splitlines()[-1].split()[:3]
    assert same == every
    (again,) = Path("again").glob("*/results_*.json")
    # Without a second computation: the run again is there already.
    monkeypatch.setattr(reproduce, "run_again", lambda *_: again)
    content = json.loads(results.read_text(encoding="utf-8"))
    content["medvlm"]["tasks"]["demo_cxr_retrieval"]["metrics"]["i2t_mrr"]["value"] = 0.987654
    results.write_text(json.dumps(content), encoding="utf-8")
    status, out, err = medvlm("reproduce", str(results), "--metadata", data)
    assert status == 1
    assert f"{results.name} was changed after the run: medvlm.tasks.demo_cxr_retrieval.metrics" in err
    (line,) = [line for line in out.splitlines() if "DIFFERS" in line]
    assert {"demo_cxr_retrieval", "i2t_mrr", "0.987654"} <= set(line.split())
    status, out, _ = medvlm("reproduce", str(results), "--metadata", data, "--json")
    assert (status, json.loads(out)["same"]) == (1, False)


def test_a_dry_run_prints_the_command(medvlm: Callable[..., Any], results: Path) -> None:
    status, out, err = medvlm("reproduce", str(results), "--metadata", "split=validation", "--dry-run")
    assert status == 0
    assert "-m medvlm_harness run --model medvlm-tiny --tasks demo_cxr_zeroshot,demo_cxr_view" in out
    assert "demo_cxr_text_zeroshot" not in out  # the model cannot do it
    assert '--metadata \'{"split": "validation"}\'' in out
    assert err == "note: --metadata data_dir was <local>/demo_cxr: data are looked for in the usual places\n"


def test_other_weights_are_refused_before_anything_is_computed(
    medvlm: Callable[..., Any], results: Path, demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "run_again", lambda *_: pytest.fail("it ran"))
    content = json.loads(results.read_text(encoding="utf-8"))
    content["medvlm"]["model"]["weights_sha256"] = "ab" * 32
    results.write_text(json.dumps(content), encoding="utf-8")
    next(results.parent.glob(f"run_*/{MANIFEST}")).unlink()
    outcome = medvlm("reproduce", str(results), "--metadata", f"data_dir={demo.folder}")
    assert outcome.status == 2
    assert "the weights have sha256 035adc38" in outcome.error
    assert "--allow-other-inputs" in outcome.error
