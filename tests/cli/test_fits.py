"""`medvlm models --fits`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from medvlm_harness.model_backends.memory import PRECISIONS


def rows_of(out: str) -> dict[tuple[str, str], list[str]]:
    """(model, precision) -> weights, working, libraries, total, fits; as printed."""
    lines = [line.split() for line in out.splitlines()]
    return {(line[0], line[1]): line[2:7] for line in lines if len(line) > 6 and line[1] in PRECISIONS}


def test_each_model_stands_with_each_precision_and_whether_it_fits(medvlm: Callable[..., Any]) -> None:
    status, out, err = medvlm("models", "--fits", "16GB")
    assert (status, err) == (0, "")
    rows = rows_of(out)
    assert {precision for model, precision in rows if model == "llava-med"} == set(PRECISIONS)
    assert [rows["llava-med", precision][-1] for precision in PRECISIONS] == ["no", "no", "yes", "yes"]
    for weights, working, libraries, total, fits in rows.values():
        assert float(total) == pytest.approx(float(weights) + float(working) + float(libraries), abs=0.02)
        assert fits == ("yes" if float(total) <= 16 else "no")
    models = [model for model, _ in rows]
    assert models.index("t5-small") < models.index("chexzero") < models.index("llava-med")
    assert "Unknown, as their cards have no count of parameters: " in out
    assert "medgemma-4b" in out.partition("Unknown")[2] and ("medgemma-4b", "nf4") not in rows
    assert "Predictions, not measurements." in out
    assert not any(model in out for model in ("maira-2", "medvlm-baseline"))  # nothing here runs it; it has no weights


def test_a_smaller_memory_holds_less(medvlm: Callable[..., Any]) -> None:
    large, small = (rows_of(medvlm("models", "--fits", size).out) for size in ("24GiB", "2GB"))
    assert large.keys() == small.keys()
    fitting = [{key for key, row in rows.items() if row[-1] == "yes"} for rows in (large, small)]
    assert fitting[1] < fitting[0]
    assert ("chexzero", "nf4") in fitting[1] and ("llava-med", "bf16") in fitting[0]


@pytest.mark.parametrize(
    ("task", "in_it", "left_out"),
    [
        ("iu_cxr_zeroshot", {"chexzero", "llava-med"}, {"t5-small", "distilbert"}),
        ("iu_cxr_retrieval", {"chexzero", "medclip"}, {"llava-med", "t5-small", "distilbert"}),
        ("iu_cxr_summarization", {"t5-small"}, {"chexzero"}),
        ("iu_cxr_impression_choice", {"chexzero", "llava-med", "t5-small", "distilbert"}, set()),
    ],
)
def test_a_task_leaves_out_what_cannot_do_it(
    medvlm: Callable[..., Any], task: str, in_it: set[str], left_out: set[str]
) -> None:
    rows = rows_of(medvlm("models", "--fits", "80GB", "--task", task).out)
    models = {model for model, _ in rows}
    assert in_it <= models and not left_out & models


def test_what_is_wrong_is_told(medvlm: Callable[..., Any]) -> None:
    assert "Expected a size such as 16GB" in medvlm("models", "--fits", "sixteen").refusal
    assert medvlm("models", "--task", "iu_cxr_zeroshot").refusal == "--task needs --fits SIZE."
    assert "Expected one of NAME" in medvlm("models", "chexzero", "--fits", "16GB").refusal
    unknown = medvlm("models", "--fits", "16GB", "--task", "iu_cxr_zeroshoot").refusal
    assert unknown.startswith("Unknown task 'iu_cxr_zeroshoot'. Did you mean iu_cxr_zeroshot")
