"""Studies of a synthetic set, and a task's path from documents to estimates without lm-eval around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Dataset, Image, Study
from medvlm_harness.metrics.estimate import Estimate


class Scored(NamedTuple):
    """What a task made of a model's answers."""

    documents: list[dict[str, Any]]
    answers: list[list[Any]]  # per document
    rows: list[Any]  # per document, then those of what is fitted on
    estimates: Mapping[str, Estimate]
    details: dict[str, Any]
    records: list[dict[str, Any]]

    def value(self, metric: str) -> float:
        return self.estimates[metric].value


@pytest.fixture(scope="session")
def score() -> Callable[..., Scored]:
    """Ask a model everything that a task asks, in lm-eval's order, and aggregate as lm-eval does."""

    def run(task: Any, answer: Callable[[Sequence[Instance]], Sequence[Any]]) -> Scored:
        documents = task.test_docs()
        answers, rows = [], []
        for k, document in enumerate([*documents, *task.fitting_documents]):
            built = task.construct_requests(document, "", metadata=(task.task_name, k, 1))
            answers.append(list(answer(built if isinstance(built, list) else [built])))
            results = task.process_results(document, answers[-1])
            assert tuple(results) == task.metric_names()
            assert len(set(map(id, results.values()))) == 1
            rows.append(next(iter(results.values())))
        for name, metric in task.aggregation().items():
            assert isinstance(metric(rows), float)
            assert isinstance(metric.stderr(rows), float), name
        estimates = task.estimates(rows)
        assert tuple(estimates) == task.metric_names()
        return Scored(
            documents, answers[: len(documents)], rows, estimates, task.details(), list(task.score_records(task.rows))
        )

    return run


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[Any]]:
    """The rows of a probe, whose requests also ask about what it learns from."""

    def run(one: Any, answer: Callable[[Sequence[Instance]], Sequence[Any]], **options: Any) -> list[Any]:
        """The rows of one process, by lm-eval's steps."""
        one.build_all_requests(**options)
        for instance, response in zip(one.instances, answer(one.instances), strict=True):
            instance.resps.append(response)
        one.apply_filters()
        rows = []
        for number, doc in one.doc_iterator(**{k: v for k, v in options.items() if k != "answer"}):
            (instance,) = (i for i in one.instances if i.doc_id == number)
            results = one.process_results(doc, [instance.filtered_resps["none"]])
            assert tuple(results) == one.metric_names()
            rows.append(next(iter(results.values())))
        return rows

    return run


FINDINGS_OF = {
    "Cardiomegaly": "The heart is enlarged. The lungs are clear.",
    "Pleural Effusion": "There is a small left pleural effusion. No pneumothorax.",
    "Consolidation": "Right lower lobe consolidation. Heart size is normal.",
    "No Finding": "Lungs are clear. No pleural effusion.",
}


@pytest.fixture(scope="session")
def four_kinds(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """160 studies of four kinds: 30 train, 50 validation, 80 test; two test studies have a fracture too."""
    studies = []
    for k in range(160):
        kind = list(FINDINGS_OF)[(k * 7 + k // 9) % 4]
        labels = {name: int(kind == name) for name in FINDINGS_OF} | {"Fracture": int(k in (100, 120))}
        studies.append(
            Study(
                f"s{k:03}",
                f"p{k}",
                (fake_image(f"{k}.png"), fake_image(f"{k}_lateral.png", "lateral")),
                findings=FINDINGS_OF[kind],
                impression=f"Impression {k % 7}: {kind.lower()}.",
                labels={"rules": labels},
                split="train" if k < 30 else "validation" if k < 80 else "test",
            )
        )
    return write_set(tmp_path_factory.mktemp("four_kinds") / "set", studies)


class RadGraphFiles(NamedTuple):
    """A synthetic copy of RadGraph: demo reports, with the extractor's entities in the place of annotations."""

    folder: Path
    train: dict[str, Any]
    dev: dict[str, Any]
    test: dict[str, Any]


@pytest.fixture(scope="session")
def radgraph_files(demo: Dataset, tmp_path_factory: pytest.TempPathFactory) -> RadGraphFiles:
    """train.json, dev.json and test.json; in the last a second annotator who missed every fourth entity."""
    from medvlm_harness.labelers.entities import EntityExtractor

    extractor = EntityExtractor()
    texts = sorted({study.findings for study in demo.studies if study.findings})[:90]
    reports = [extractor.extract(text) for text in texts]
    parts = {
        "train": {f"p10/p{10_000_000 + k}/s{k}.txt": one for k, one in enumerate(reports[0::2])},
        "dev": {f"dev/{k}": one for k, one in enumerate(reports[1::4])},
        "test": {
            f"test/{k}": {
                "text": one["text"],
                "labeler_1": {"entities": one["entities"]},
                "labeler_2": {"entities": _without_every_fourth(one["entities"])},
            }
            for k, one in enumerate(reports[3::4])
        },
    }
    folder = tmp_path_factory.mktemp("radgraph")
    for name, content in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return RadGraphFiles(folder, **parts)


def _without_every_fourth(entities: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: one for k, (key, one) in enumerate(entities.items()) if k % 4}
    return {
        key: {**one, "relations": [pair for pair in one["relations"] if pair[1] in kept]} for key, one in kept.items()
    }
