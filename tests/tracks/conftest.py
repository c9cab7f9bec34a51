"""Studies of a synthetic set, and a task's path from documents to estimates without lm-eval around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.metrics.estimate import Estimate


class Scored(NamedTuple):
    """What a task made of a model's answers."""

    documents: list[dict[str, Any]]
    answers: list[list[Any]]  # per document
    rows: list[Any]
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
        for k, document in enumerate(documents):
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
        return Scored(documents, answers, rows, estimates, task.details(), list(task.score_records(task.rows)))

    return run
