"""Findings and impressions to learn summarisation from, asked for as the summarisation track asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.plugin import tasks_folder
from medvlm_harness.training.data import TrainingData

__all__ = ["Summary", "generation_kwargs", "summaries", "summaries_of"]


@dataclass(frozen=True, slots=True)
class Summary:
    """A study to learn from."""

    study_id: str
    prompt: str
    impression: str


def summaries(data: TrainingData) -> tuple[list[Summary], list[Summary]]:
    """Train and validation studies with findings and impression.

    Raises:
        UserError: if a split has none.
    """
    train, validation = summaries_of(data.train), summaries_of(data.validation)
    for split, found in (("train", train), ("validation", validation)):
        if not found:
            raise UserError(f"{data.name}: no study of the {split} split has both findings and impression.")
    return train, validation


def generation_kwargs() -> dict[str, Any]:
    """How the track has a summary generated."""
    return dict(_task()["generation_kwargs"])


def summaries_of(studies: Iterable[Study]) -> list[Summary]:
    """The studies with findings and impression, in their order."""
    prompt: str = _task()["prompt"]
    both = ((s.study_id, s.findings.strip(), s.impression.strip()) for s in studies)
    return [Summary(key, prompt.format(findings=findings), said) for key, findings, said in both if findings and said]


@cache
def _task() -> dict[str, Any]:
    """The declaration of the task; all summarisation tasks have one prompt."""
    from lm_eval.tasks._yaml_loader import load_yaml

    declared: dict[str, Any] = load_yaml(tasks_folder() / "iu_cxr" / "iu_cxr_summarization.yaml", resolve_func=False)
    return declared
