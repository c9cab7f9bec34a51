"""What the image adds: the same questions with a study's own image, and with one that does not show the patient.

Model, prompt and indication stay; another patient's image, or grey, takes the place of the study's own. What a model
loses by that is what it takes from the image. One that loses nothing answers by the indication and by what is usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.paired import paired_estimates, paired_names
from medvlm_harness.requests import ImageRef, TextRef
from medvlm_harness.tracks.conditions import ConditionsRow, ConditionsTask
from medvlm_harness.tracks.perturbed import Perturbable
from medvlm_harness.tracks.report_generation import ReportGeneration
from medvlm_harness.tracks.text_scorer import LABELS
from medvlm_harness.tracks.zero_shot import ScoreRow, ZeroShot
from medvlm_harness.tracks.zero_shot_metrics import enough_support, macro_auroc

__all__ = ["ImageUseLabels", "ImageUseReports"]

TRUE = "true"


class ImageUse(ConditionsTask):
    """A task under the condition `true`, the study's own image, and under each substitute."""

    def read_substitutes(self) -> None:
        """Names the conditions too."""
        super().read_substitutes()
        self.conditions = (TRUE, *self.substitutes)

    def under_conditions(self, image: Image) -> list[ImageRef]:
        """The image itself, and what stands for it."""
        own = ImageRef(image.sha256, self.data.path(image), self.perturbation.image)
        return [own, *self.stand_ins(image)]


class ImageUseLabels(ImageUse, ZeroShot):
    """`classify` requests with the indication, one per image and condition: macro AUROC of each, and the differences.

    Encoders ignore the indication; of them this asks how much the image decides at all. A study without an indication
    is asked about without one.

    YAML: as for `ImageUse`, and for `ZeroShot` with independent labels, without `no_finding`.
    """

    KEYS: ClassVar[frozenset[str]] = ImageUse.KEYS | ZeroShot.KEYS - {"scaling"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = ImageUse.RUNTIME_KEYS | ZeroShot.RUNTIME_KEYS - {"scaling"}
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset({"image", "report"})

    def read_declaration(self) -> None:
        """As for both; refuses exclusive options."""
        super().read_declaration()
        self.read_substitutes()
        if self.target is not None or self.no_finding_except is not None:
            raise UserError(f"{self.task_name}: expected independent labels, without `target:` and `no_finding:`.")

    def input_sections(self) -> tuple[str, ...]:
        """The indication."""
        return ("indication",)

    @property
    def fits_on(self) -> None:
        """Nothing is fitted."""
        return None

    @cached_property
    def _indications(self) -> dict[str, tuple[TextRef, ...]]:
        """Study id -> the indication as an argument, or none."""
        texts = {study.study_id: self.as_asked(study).indication.strip() for study in self.studies}
        return {study_id: (TextRef(text),) if text else () for study_id, text in texts.items()}

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request per condition."""
        rest = (self.request_labels, *self._indications[doc["study_id"]])
        return [
            Instance("classify", doc, (ref, *rest), k, metadata=kwargs["metadata"])
            for k, ref in enumerate(self.under_conditions(self.images_by_file[doc["file"]]))
        ]

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Macro AUROC, and that of each subset."""
        return paired_names(["auroc", *(f"auroc_{name}" for name in self.subsets)], self.conditions)

    def estimate(self, rows: Sequence[ConditionsRow]) -> Mapping[str, Estimate]:  # type: ignore[override]
        """Each condition on the same images, labels and resamples."""
        by_condition: dict[str, list[ScoreRow]] = self.by_condition(rows)
        truth = self._matrix(by_condition[TRUE], self.source)
        enough = enough_support(truth)
        names = self.label_set.names
        members = {"auroc": names, **{f"auroc_{name}": labels for name, labels in self.subsets.items()}}
        groups = [[j for j, name in enumerate(names) if name in labels and enough[j]] for labels in members.values()]
        keys = [label.key for label in self.label_set.labels]
        return paired_estimates(
            {
                condition: macro_auroc(truth, np.array([row.scores.margin for row in its]), groups)
                for condition, its in by_condition.items()
            },
            [row.study_id for row in rows],
            list(members),
            floors=dict.fromkeys(members, 0.5),
            extras={
                metric: {"labels": [keys[j] for j in group]} for metric, group in zip(members, groups, strict=True)
            },
        )


class ImageUseReports(ImageUse, ReportGeneration):
    """`generate_until` requests with images, one per study and condition: ROUGE-L and label F1, and the differences.

    All images of a study that are shown are replaced. YAML: as for `ImageUse` and `ReportGeneration`.
    """

    KEYS: ClassVar[frozenset[str]] = ImageUse.KEYS | ReportGeneration.KEYS
    RUNTIME_KEYS: ClassVar[frozenset[str]] = ImageUse.RUNTIME_KEYS | ReportGeneration.RUNTIME_KEYS
    PERTURBS: ClassVar[frozenset[Perturbable]] = ReportGeneration.PERTURBS
    METRICS: ClassVar[tuple[str, ...]] = ("rougeL", *LABELS)

    def read_declaration(self) -> None:
        """As for both."""
        super().read_declaration()
        self.read_substitutes()

    def shown(self, study: Study) -> list[list[ImageRef]]:
        """The chosen images, and what stands for them."""
        per_image = [self.under_conditions(image) for image in self.chosen_images(study)]
        return [list(refs) for refs in zip(*per_image, strict=True)]

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """See `METRICS`."""
        return paired_names(self.METRICS, self.conditions)

    def lower_is_better(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def estimate(self, rows: Sequence[ConditionsRow]) -> Mapping[str, Estimate]:  # type: ignore[override]
        """Each condition on the same studies and resamples."""
        if not rows:
            return dict.fromkeys(self.metric_names(), Estimate.undefined("no study", n=0))
        scorer = self.scorer_of(rows)
        floors = {metric: scorer.floor(metric) for metric in self.METRICS}
        estimates = paired_estimates(
            {
                name: scorer.statistic([row.text for row in its], self.METRICS)
                for name, its in self.by_condition(rows).items()
            },
            [row.study_id for row in rows],
            self.METRICS,
        )
        for metric, its in floors.items():
            for name in paired_names([metric], self.conditions)[: len(self.conditions)]:
                extra = {**estimates[name].extra, "floors": its}
                estimates[name] = replace(estimates[name], floor=max(its.values()), extra=extra)
        return estimates

    # --- results

    def label_details(self) -> dict[str, Any]:
        """Nothing: label F1 of each label is of one set of texts."""
        return {}
