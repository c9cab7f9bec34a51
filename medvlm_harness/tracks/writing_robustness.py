"""Robustness of what a model writes: reports from corrupted images, and impressions from findings said otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import CHEXPERT_14, label_key
from medvlm_harness.data.records import Study
from medvlm_harness.metrics.consistency import consistency_estimates
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.robustness import Measure, robustness_estimates
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks.conditions import ConditionsRow
from medvlm_harness.tracks.generation import TextRow
from medvlm_harness.tracks.report_generation import ReportGeneration
from medvlm_harness.tracks.robustness import GATE, IMAGES, REPORTS, RobustnessTask
from medvlm_harness.tracks.scored_texts import ScoredTexts
from medvlm_harness.tracks.summarization import Summarization
from medvlm_harness.tracks.text_scorer import TextScorer

__all__ = ["ReportGenerationRobustness", "SummarizationRobustness"]

FINDING_KEYS = tuple(map(label_key, CHEXPERT_14))


class WritingRobustness(RobustnessTask, ScoredTexts):
    """`generate_until` requests, one per study and condition: scores of the texts, and the labels that they say.

    Scores are against the human text, above the best floor. A flip is a label that the labeler reads in one text and
    not in the other; reliance, the same with a substitute for the image.
    """

    KEYS: ClassVar[frozenset[str]] = RobustnessTask.KEYS | ScoredTexts.KEYS
    RUNTIME_KEYS: ClassVar[frozenset[str]] = RobustnessTask.RUNTIME_KEYS | ScoredTexts.RUNTIME_KEYS
    MEASURES: ClassVar[tuple[str, ...]] = ("rougeL", "label_f1_macro_14")

    def read_declaration(self) -> None:
        """As for both."""
        super().read_declaration()
        self.read_suite()

    # --- metrics

    def estimate(self, rows: Sequence[ConditionsRow]) -> Mapping[str, Estimate]:  # type: ignore[override]
        """Each condition on the same studies and resamples."""
        if not rows:
            return dict.fromkeys(self.metric_names(), Estimate.undefined("no study", n=0))
        scorer, studies = self.scorer_of(rows), [row.study_id for row in rows]
        by_condition: dict[str, list[TextRow]] = self.by_condition(rows)
        texts = {name: [row.text for row in its] for name, its in by_condition.items()}
        found = robustness_estimates(
            {name: scorer.statistic(its, self.MEASURES) for name, its in texts.items()},
            studies,
            [self._measure(scorer, name) for name in self.MEASURES],
            self.compared,
            extras={name: {"floors": scorer.floor(name)} for name in self.MEASURES},
        )
        flips = consistency_estimates(
            {name: _said(scorer, its) for name, its in texts.items()},
            studies,
            keys=FINDING_KEYS,
            substitutes=self.stood_in,
            gates=[GATE],
        )
        return self.keep({**found, **flips})

    def _measure(self, scorer: TextScorer, name: str) -> Measure:
        floor = max(scorer.floor(name).values())
        return Measure(name, floor=floor, least_clean=floor, reference=self.reference.get(name))

    # --- results

    def label_details(self) -> dict[str, Any]:
        """Nothing: label F1 of each label is of one set of texts."""
        return {}


class ReportGenerationRobustness(WritingRobustness, ReportGeneration):
    """Of images: findings written from corrupted ones; all images of a study that are shown are perturbed or replaced.

    YAML: as for `RobustnessTask`, of images, and for `ReportGeneration`.
    """

    KEYS: ClassVar[frozenset[str]] = WritingRobustness.KEYS | ReportGeneration.KEYS
    RUNTIME_KEYS: ClassVar[frozenset[str]] = WritingRobustness.RUNTIME_KEYS | ReportGeneration.RUNTIME_KEYS
    OF: ClassVar[tuple[str, ...]] = (IMAGES,)

    def shown(self, study: Study) -> list[list[ImageRef]]:
        """The chosen images, corrupted ones, and what stands for them."""
        own = self.refs_of(study)
        stand_ins = [self.stand_ins(image) for image in self.chosen_images(study)]
        return [
            own,
            *([ref.perturbed(case) for ref in own] for case in self.cases),
            *(list(refs) for refs in zip(*stand_ins, strict=True)),
        ]


class SummarizationRobustness(WritingRobustness, Summarization):
    """Of reports: impressions written from findings said otherwise.

    YAML: as for `RobustnessTask`, of reports, without substitutes, and for `Summarization`.
    """

    KEYS: ClassVar[frozenset[str]] = (WritingRobustness.KEYS | Summarization.KEYS) - {"substitutes"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = WritingRobustness.RUNTIME_KEYS | Summarization.RUNTIME_KEYS
    OF: ClassVar[tuple[str, ...]] = (REPORTS,)

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request per condition."""
        prompts = [doc, *({**doc, "prompt": self.prompt_for(said)} for said in self.said_otherwise(doc))]
        return [
            Instance(
                "generate_until",
                doc,
                (self.prompt_of(prompt), self.generation_kwargs),
                k,
                metadata=kwargs["metadata"],
            )
            for k, prompt in enumerate(prompts)
        ]


def _said(scorer: TextScorer, texts: Sequence[str]) -> NDArray[np.float64]:
    """What texts say of each label, (n, 14): 1 where it is there, or may be; else 0."""
    labels = scorer.labels(texts)
    return np.isin(labels, (1, -1)).astype(np.float64)
