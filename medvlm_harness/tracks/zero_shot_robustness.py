"""Robustness of zero-shot classification: of images and of the words labels are asked by, and of reports."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.consistency import consistency_estimates, decide, score_change_estimates
from medvlm_harness.metrics.estimate import Estimate, plain
from medvlm_harness.metrics.operating_points import Threshold, choose_thresholds
from medvlm_harness.metrics.robustness import CLEAN, Measure, robustness_estimates
from medvlm_harness.perturbations.text.suites import FLIPPED, Wording
from medvlm_harness.requests import LabelSet, TextRef
from medvlm_harness.tracks.conditions import ConditionsRow
from medvlm_harness.tracks.robustness import GATE, IMAGES, PROMPTS, REPORTS, RobustnessTask
from medvlm_harness.tracks.text_zero_shot import TextZeroShot
from medvlm_harness.tracks.zero_shot import ScoreRow, ZeroShot
from medvlm_harness.tracks.zero_shot_metrics import enough_support, macro_auroc

__all__ = ["TextZeroShotRobustness", "ZeroShotRobustness"]

AUROC = "auroc"
LEAST_CLEAN = 0.55  # below, a share of what is left above chance is mostly noise
POINT = "youden"  # of the decisions
Scores = Mapping[str, NDArray[np.float64]]


class LabelRobustness(RobustnessTask, ZeroShot):
    """`classify` requests, one per input and condition: macro AUROC, and decisions at the validation threshold.

    The labels of the macro are those with enough positives among the clean inputs, under every condition. Decisions are
    made at each label's Youden threshold on clean validation inputs.
    """

    KEYS: ClassVar[frozenset[str]] = RobustnessTask.KEYS | ZeroShot.KEYS - {"scaling"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = RobustnessTask.RUNTIME_KEYS | ZeroShot.RUNTIME_KEYS - {"scaling"}
    MEASURES: ClassVar[tuple[str, ...]] = (AUROC,)

    def read_declaration(self) -> None:
        """As for both; refuses exclusive options."""
        super().read_declaration()
        if self.target is not None or self.no_finding_except is not None:
            raise UserError(f"{self.task_name}: expected independent labels, without `target:` and `no_finding:`.")
        self.read_suite()
        self._thresholds: Mapping[str, Threshold] = {}

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request per condition; of what is fitted on, the clean one alone."""
        asked = enumerate(self.asked(doc))
        return [Instance("classify", doc, one, k, metadata=kwargs["metadata"]) for k, one in asked]

    def comparable(self) -> dict[str, Any]:
        """Adds the labels, and what uncertain ones count as."""
        return {**super().comparable(), "label_set": str(self.label_set), "uncertain": self.uncertain}

    @abstractmethod
    def asked(self, doc: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The arguments under each condition; of what is fitted on, under the first."""

    # --- metrics

    def estimate(self, rows: Sequence[ConditionsRow]) -> Mapping[str, Estimate]:  # type: ignore[override]
        """Each condition on the same inputs, labels and resamples."""
        scored = [row for row in rows if row.split in self.splits]
        by_condition: dict[str, list[ScoreRow]] = self.by_condition(scored)
        truth = self._matrix(by_condition[CLEAN], self.source)
        used = np.flatnonzero(enough_support(truth)).tolist() if scored else []
        margins = {name: np.array([row.scores.margin for row in its]) for name, its in by_condition.items()}
        keys = [label.key for label in self.label_set.labels]
        labels = [keys[j] for j in used]
        studies = [row.study_id for row in scored]
        found = robustness_estimates(
            {name: macro_auroc(truth, margin, [used]) for name, margin in margins.items()},
            studies,
            [Measure(AUROC, floor=0.5, least_clean=LEAST_CLEAN, reference=self.reference.get(AUROC))],
            self.compared,
            extras={AUROC: {"labels": labels}},
        )
        if used:
            moved = {name: margin[:, used] for name, margin in margins.items()}
            found |= score_change_estimates(moved, studies, keys=labels)
        return self.keep({**found, **self._consistency(rows, scored, margins)})

    def _consistency(
        self, rows: Sequence[ConditionsRow], scored: Sequence[ConditionsRow], margins: Scores
    ) -> dict[str, Estimate]:
        """Flips, reliance and quadrants at thresholds from validation, on the inputs outside of it."""
        of_scored, judged, fitting = self.parts(rows)
        clean = [row.conditions[0] for row, one in zip(rows, fitting, strict=True) if one]
        keys = [label.key for label in self.label_set.labels]
        truth = np.array([row.targets[self.source] for row in clean], dtype=np.float64).reshape(len(clean), len(keys))
        margin = np.array([row.scores.margin for row in clean]).reshape(len(clean), len(keys))
        self._thresholds = choose_thresholds(truth, margin, keys=keys, point=POINT)
        cuts = [one.value for one in self._thresholds.values()]
        outside = np.flatnonzero(judged[of_scored]).tolist()
        compared = {name: its for name, its in margins.items() if name not in self.controls()}
        return consistency_estimates(
            {name: decide(its[outside], cuts) for name, its in compared.items()},
            [scored[k].study_id for k in outside],
            keys=keys,
            substitutes=self.stood_in,
            gates=[GATE],
        )

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds the thresholds."""
        thresholds = {key: plain(asdict(one)) for key, one in self._thresholds.items()}
        return {**super().details(), "thresholds": {"fitted_on": self.fits_on, "point": POINT, "labels": thresholds}}


class ZeroShotRobustness(LabelRobustness):
    """Of images: each image corrupted. Of prompts: each label asked for in other words (and, as a control, inverted).

    YAML: as for `RobustnessTask`, of images or prompts, and for `ZeroShot` with independent labels.
    """

    OF: ClassVar[tuple[str, ...]] = (IMAGES, PROMPTS)

    def controls(self) -> tuple[str, ...]:
        """The inversion, of which a model that reads has an AUROC of one minus the clean one."""
        return (FLIPPED,) if self.of == PROMPTS else ()

    def refuses(self, lm: Any) -> str | None:
        """Why there is nothing to find out about a model: with prompts of its own it takes none of the task's words."""
        prompts = getattr(lm, "prompts", "task")
        if self.of == PROMPTS and prompts != "task":
            return f"it is asked in other words, of which the model takes none with prompts={prompts}"
        return super().refuses(lm)

    @cached_property
    def worded(self) -> list[LabelSet]:
        """The label set in the words of each case, then inverted."""
        labels = self.request_labels
        cases = (*self.cases, Wording(FLIPPED, 0, ""))
        return [
            LabelSet(f"{labels.name}/{case.name}", labels.kind, tuple(map(case, labels.labels)), labels.prior)
            for case in cases
        ]

    def asked(self, doc: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The image with the label set, as both are and perturbed; then its substitutes."""
        own, labels = self.image_ref(doc), self.request_labels
        if doc["split"] not in self.splits:
            return [(own, labels)]
        if self.of == PROMPTS:
            cases = [(own, worded) for worded in self.worded]
        else:
            cases = [(own.perturbed(case), labels) for case in self.cases]
        stand_ins = self.stand_ins(self.images_by_file[doc["file"]])
        return [(own, labels), *cases, *((ref, labels) for ref in stand_ins)]


class TextZeroShotRobustness(LabelRobustness, TextZeroShot):
    """Of reports: the findings said otherwise, with the labeler's output as it was.

    YAML: as for `RobustnessTask`, of reports, without substitutes, and for `TextZeroShot`.
    """

    KEYS: ClassVar[frozenset[str]] = (RobustnessTask.KEYS | TextZeroShot.KEYS) - {"scaling", "substitutes"}
    OF: ClassVar[tuple[str, ...]] = (REPORTS,)

    def asked(self, doc: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The findings as they are, and in other words."""
        own = self.input_ref(doc)
        said = self.said_otherwise(doc) if doc["split"] in self.splits else []
        texts = [own, *(TextRef(study.findings) for study in said)]
        return [(text, self.request_labels) for text in texts]
