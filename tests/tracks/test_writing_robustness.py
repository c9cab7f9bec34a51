from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import f1_score

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import make_labeler
from medvlm_harness.metrics.rouge import rouge_scores
from medvlm_harness.tracks.writing_robustness import ReportGenerationRobustness, SummarizationRobustness

NORMAL = "Lungs are clear. No pleural effusion."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def reports_task(folder: Path, **config: Any) -> ReportGenerationRobustness:
    base = {"task": "g", "dataset": "synthetic", "modality": "chest", "prompt": "{images}\nFindings:", "studies": 40}
    more = {"perturbation": {"suite": "quick"}, "substitutes": ["other", "blank"], **config}
    return ReportGenerationRobustness({**base, **more, "metadata": {"data_dir": str(folder)}})


def impressions_task(folder: Path, **config: Any) -> SummarizationRobustness:
    base = {"task": "s", "dataset": "synthetic", "prompt": "{findings}\nImpression:", "studies": 40}
    more = {"perturbation": {"suite": "quick"}, **config}
    return SummarizationRobustness({**base, **more, "metadata": {"data_dir": str(folder)}})


def sees(requests: Sequence[Instance]) -> list[str]:
    """The reference for the study's own image unless it is badly corrupted, else a normal report."""
    found = []
    for request in requests:
        (ref,) = request.arguments[2]["visual"]
        seen = ref.file_sha256 == request.doc["image"] and (ref.perturbation is None or ref.perturbation.severity < 5)
        found.append(request.doc["target"] if seen else NORMAL)
    return found


def test_reports_of_corrupted_images_are_scored_under_each_condition(
    four_kinds: Path, score: Callable[..., Any]
) -> None:
    task = reports_task(four_kinds)
    scored = score(task, sees)
    targets = [doc["target"] for doc in scored.documents]
    rouge = np.mean(rouge_scores([NORMAL] * len(targets), targets)[2])
    labeler = make_labeler("rules")
    truth, normal = (
        np.array([[labeler.label(text)[name] in (1, -1) for name in CHEXPERT_14] for text in texts])
        for texts in (targets, [NORMAL] * len(targets))
    )
    f1 = f1_score(truth, normal, average="macro", zero_division=0)
    found = scored.details["robustness"]
    assert found["rougeL_clean"]["value"] == 1
    assert found["rougeL_rotation_5"]["value"] == pytest.approx(rouge)
    assert found["rougeL_drop"]["value"] == pytest.approx((1 - rouge) / 3)  # severity 5 of 1, 3, 5
    clean_f1 = f1_score(truth, truth, average="macro", zero_division=0)
    assert found["label_f1_macro_14_drop_other_image"]["value"] == pytest.approx(clean_f1 - f1)
    flipped = (truth != normal).mean()
    assert (
        scored.value("flip_rate_any") == pytest.approx(flipped) == pytest.approx(scored.value("reliance_other_image"))
    )
    assert scored.value("flip_rate") == pytest.approx(flipped / 3)
    assert {record["label"] for record in scored.records} >= {"rougeL", "rougeL@rotation_5", "rougeL@blank_image"}
    assert "label_f1" not in scored.details


def test_a_writer_that_ignores_the_image_is_exposed(four_kinds: Path, score: Callable[..., Any]) -> None:
    scored = score(reports_task(four_kinds), lambda requests: [NORMAL] * len(requests))
    assert scored.value("rougeL_drop_other_image") == scored.value("reliance_other_image") == 0
    assert scored.value("consistent_unreliant") == 1
    assert np.isnan(scored.value("rougeL_retention"))  # not above the best floor


def test_impressions_are_asked_of_findings_said_otherwise(four_kinds: Path, score: Callable[..., Any]) -> None:
    task = impressions_task(four_kinds)
    doc = task.documents[0]
    prompts = [str(instance.arguments[0]) for instance in task.construct_requests(doc, "", metadata=("s", 0, 1))]
    assert prompts[0] == doc["prompt"] and len(prompts) == len(task.conditions)
    assert prompts[task.conditions.index("case_2")] == f"{doc['source'].upper()}\nImpression:"
    scored = score(task, lambda requests: [str(request.arguments[0]).split("\n")[0].lower() for request in requests])
    found = scored.details["robustness"]
    assert found["rougeL_drop_case_2"]["value"] == 0 and found["flip_rate_synonyms_3"]["value"] == 0
    assert abs(found["rougeL_drop_synonyms_3"]["value"]) > 0 and "reliance_other_image" not in found


def test_impressions_have_no_image_to_replace(four_kinds: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'substitutes'"):
        impressions_task(four_kinds, substitutes=["other"])
    with pytest.raises(UserError, match="expected of of perturbation to be images"):
        reports_task(four_kinds, perturbation={"suite": "quick", "of": "reports"})
