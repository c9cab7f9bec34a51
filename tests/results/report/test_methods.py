from __future__ import annotations

from collections.abc import Callable

from medvlm_harness.results.report.methods import methods
from medvlm_harness.results.report.runs import ReportRuns
from medvlm_harness.results.run_files import RunFiles


def test_the_paragraph_says_what_the_runs_recorded(several: dict[str, RunFiles]) -> None:
    text = " ".join(methods(ReportRuns(several)))
    run = several["reader int8"]
    for said in (
        "4 runs",
        "reader int8 (dual encoder, 1.0 million parameters, fp32, quantised: int8",
        run.tasks["demo_cxr_zeroshot"]["dataset"]["sha256"][:12],
        "AUROC of demo_cxr_zeroshot",
        "percentile bootstrap over studies (1,000 resamples, seed 0)",
        f"lm-evaluation-harness {run.medvlm['versions']['lm_eval']}",
    ):
        assert said in text


def test_what_is_not_known_is_left_out(guessing: RunFiles, edited: Callable[..., RunFiles]) -> None:
    def forget(block: dict[str, object]) -> None:
        block["versions"] = {}
        del block["efficiency"]

    text = " ".join(methods(ReportRuns({"a": edited(guessing, forget)})))
    assert "Software" not in text
    assert "Runs were made on" not in text
    assert "None" not in text
    assert "revision" not in text
