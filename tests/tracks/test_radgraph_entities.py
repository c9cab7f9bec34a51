from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.api.instance import Instance

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.entity_lists import observed_words_list, score_lists
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.tracks.entities import as_json
from medvlm_harness.tracks.radgraph_entities import RadGraphEntities

DECLARED = yaml.safe_load(
    (plugin.tasks_folder() / "radgraph" / "radgraph_entities.yaml").read_text().replace("!function ", "")
)


def task(where: Path, **metadata: Any) -> RadGraphEntities:
    config = {"task": "r", "dataset": "radgraph", "prompt": DECLARED["prompt"]}
    return RadGraphEntities({**config, "metadata": {"version": 1, "radgraph": str(where), **metadata}})


def first_annotator(files: Any) -> Callable[[Sequence[Instance]], list[str]]:
    lists = {key: as_json(observed_words_list(one["labeler_1"]["entities"])) for key, one in files.test.items()}
    return lambda requests: [lists[request.doc["study_id"]] for request in requests]


@pytest.fixture(scope="module")
def result(radgraph_files: Any, score: Callable[..., Any]) -> Any:
    return score(task(radgraph_files.folder), first_annotator(radgraph_files))


def test_the_models_text_is_the_annotated_one(radgraph_files: Any, result: Any) -> None:
    assert [d["study_id"] for d in result.documents] == sorted(radgraph_files.test)
    for document in result.documents:
        assert radgraph_files.test[document["study_id"]]["text"] in document["prompt"]


def test_two_annotators_are_averaged_and_their_agreement_is_the_ceiling(radgraph_files: Any, result: Any) -> None:
    reports = [radgraph_files.test[d["study_id"]] for d in result.documents]
    first, second = ([one[name]["entities"] for one in reports] for name in ("labeler_1", "labeler_2"))
    listed = [observed_words_list(one) for one in first]
    by_each = [score_lists(listed, [*side]).f1.mean() for side in (first, second)]
    # What is anatomy to one of them alone counts on neither side here and on one side there.
    assert result.value("entity_f1") == pytest.approx(np.mean(by_each), abs=0.01)
    human = score_lists([observed_words_list(one) for one in second], first)
    estimate = result.estimates["entity_f1"]
    assert estimate.ceiling == pytest.approx(human.f1.mean())
    assert 0 < estimate.floor < estimate.value < 1
    assert result.details["counts"] == {"reports": len(reports), "reports_read_by_two": len(reports)}


@pytest.mark.parametrize("kind", ["constant", "copy"])
def test_floors_score_as_models(radgraph_files: Any, result: Any, score: Callable[..., Any], kind: Any) -> None:
    floor = score(task(radgraph_files.folder), BaselineBackend(kind=kind).generate_until)
    for name in ("entity_f1", "entity_words_f1", "status_agreement"):
        assert result.estimates[name].extra["floors"][kind] == pytest.approx(floor.value(name))


def test_another_split_has_one_annotator_and_no_ceiling(radgraph_files: Any, score: Callable[..., Any]) -> None:
    dev = score(task(radgraph_files.folder, split="validation"), BaselineBackend(kind="copy").generate_until)
    assert {d["study_id"] for d in dev.documents} == set(radgraph_files.dev)
    assert dev.estimates["entity_f1"].ceiling is None
    assert dev.details["counts"]["reports_read_by_two"] == 0


def test_a_file_alone_has_no_constant_floor(radgraph_files: Any, score: Callable[..., Any]) -> None:
    one = task(radgraph_files.folder / "test.json")
    result = score(one, first_annotator(radgraph_files))
    assert set(result.estimates["entity_f1"].extra["floors"]) == {"copy", "rules"}
    assert result.details["constant_floor"] is None
    with pytest.raises(UserError, match="hands over no text for kind=constant"):
        score(task(radgraph_files.folder / "test.json"), BaselineBackend(kind="constant").generate_until)


def test_places_that_are_not_looked_at_cannot_be_named() -> None:
    assert {"radgraph", "split"} <= RadGraphEntities.RUNTIME_KEYS
    assert not {"data_dir", "hub_id", "revision"} & RadGraphEntities.RUNTIME_KEYS
