from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.errors import UserError
from medvlm_harness.requests import Embedding, ImageRef
from medvlm_harness.tracks.retrieval_robustness import RetrievalRobustness

WIDTH = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def task_of(folder: Path, **config: Any) -> RetrievalRobustness:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    base = {"task": "r", "dataset": "synthetic", "modality": "chest", "perturbation": {"suite": "quick"}}
    return RetrievalRobustness({**base, "substitutes": ["other", "blank"], **config, "metadata": metadata})


def vector(name: str) -> np.ndarray:
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
    return rng.standard_normal(WIDTH)


def knows_its_own(requests: Sequence[Instance]) -> list[Embedding]:
    """An image lies at its study, further off the more severe the perturbation; a report at its study."""
    found = []
    for request in requests:
        argument, study = request.arguments[0], request.doc["study_id"]
        if isinstance(argument, ImageRef):
            own = argument.file_sha256 == request.doc["image"]
            severity = argument.perturbation.severity if argument.perturbation else 0
            place = (vector(study) if own else 0) + (0.2 + severity / 2) * vector(str(argument))
        else:
            place = vector(study)
        found.append(Embedding((place / np.linalg.norm(place)).astype(np.float32)))
    return found


def test_recalls_drops_and_flips_equal_an_independent_computation(four_kinds: Path, score: Callable[..., Any]) -> None:
    task = task_of(four_kinds)
    scored = score(task, knows_its_own)
    rows, n = scored.rows, len(scored.rows)
    found = scored.details["robustness"]
    first: dict[str, np.ndarray] = {}
    for k, condition in enumerate(task.conditions):
        images = np.stack([row.images[k].vector for row in rows])
        reports = np.stack([row.reports[k].vector for row in rows])
        for direction, similarity in (("i2t", images @ reports.T), ("t2i", reports @ images.T)):
            if (direction, condition) == ("t2i", "blank_image"):
                continue  # all are equal: chance
            better = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
            recall = (better < 10).mean()
            assert found[f"{direction}_recall@10_{condition}"]["value"] == pytest.approx(recall, abs=1e-9), condition
        texts = np.array([row.report_id for row in rows])
        first[condition] = texts[(images @ reports.T).argmax(axis=1)]
    flips = [(first[case] != first["clean"]).mean() for case in task.compared.cases]
    assert scored.value("flip_rate") == pytest.approx(np.mean(flips))
    assert scored.value("reliance_other_image") == pytest.approx((first["other_image"] != first["clean"]).mean())
    assert scored.estimates["i2t_recall@10_clean"].floor == pytest.approx(10 / n)
    assert scored.value("i2t_recall@10_clean") > 0.95 > scored.value("i2t_recall@10_worst")
    low, high = scored.estimates["i2t_recall@10_other_image"].ci95
    assert low < 10 / n < high  # another patient's image is worth nothing
    assert scored.value("i2t_recall@10_retention") < 1
    assert found["t2i_recall@10_blank_image"]["value"] == pytest.approx(10 / n)


def test_each_distinct_input_is_asked_about_once(four_kinds: Path) -> None:
    task = task_of(four_kinds)
    asked = [i.arguments[0] for i in task.construct_requests(task.documents[0], "", metadata=("r", 0, 1))]
    assert len(asked) == len(set(asked)) == len(task.conditions) + 1  # and the report
    of_reports = task_of(four_kinds, perturbation={"suite": "quick", "of": "reports"})
    asked = [i.arguments[0] for i in of_reports.construct_requests(of_reports.documents[0], "", metadata=("r", 0, 1))]
    images = [one for one in asked if isinstance(one, ImageRef)]
    assert len(images) == 3 and all(image.perturbation is None for image in images)
    texts = [one.text for one in asked if not isinstance(one, ImageRef)]
    assert texts[0].upper() in texts and len(texts) > 5


def test_reports_said_otherwise_are_searched_and_found(four_kinds: Path, score: Callable[..., Any]) -> None:
    task = task_of(four_kinds, perturbation={"suite": "quick", "of": "reports"})
    scored = score(task, knows_its_own)  # which knows whose report it is, whatever it says
    assert scored.value("t2i_recall@10_drop") == scored.value("flip_rate_any") == 0
    assert scored.value("reliance_other_image") > 0.5
    labels = {record["label"] for record in scored.records}
    assert {"i2t", "t2i", "i2t@case_2", "t2i@other_image"} <= labels
    assert len(scored.records) == 2 * len(task.conditions) * len(scored.documents)


def test_one_that_sees_nothing_is_exposed(four_kinds: Path, score: Callable[..., Any]) -> None:
    def blind(requests: Sequence[Instance]) -> list[Embedding]:
        same = (np.ones(WIDTH) / 4).astype(np.float32)
        return [
            Embedding(same if isinstance(r.arguments[0], ImageRef) else knows_its_own([r])[0].vector) for r in requests
        ]

    scored = score(task_of(four_kinds), blind)
    assert scored.value("reliance_other_image") == 0 and scored.value("consistent_unreliant") == 1
    assert "lower bound" in str(scored.estimates["i2t_recall@10_retention"].reason)


def test_prompts_are_nothing_to_search_with(four_kinds: Path) -> None:
    with pytest.raises(UserError, match="expected of of perturbation to be images or reports"):
        task_of(four_kinds, perturbation={"suite": "quick", "of": "prompts"})
