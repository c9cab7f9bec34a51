"""Report generation: the findings, written from the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import compose_report
from medvlm_harness.metrics.report_floors import normal_report, normal_report_version
from medvlm_harness.metrics.summary_floors import most_frequent_summary
from medvlm_harness.requests import Exemplar, ImageRef
from medvlm_harness.tracks.image_prompts import ImagePrompts
from medvlm_harness.tracks.report_scorer import ReportScorer, modal_share
from medvlm_harness.tracks.scored_texts import ScoredTexts
from medvlm_harness.tracks.text_scorer import TextScorer

__all__ = ["ReportGeneration"]


class ReportGeneration(ImagePrompts, ScoredTexts):
    """`generate_until` requests with images: image(s) in, findings out, over the studies that have both.

    The texts are scored against the findings. Facts are checked against the whole human report, the impression too;
    since that is where the reference comes from, the reference's own rates say how far a report contradicts itself.

    Floors that always stand beside the scores: `constant`, the most frequent findings of the train split, and
    `template`, the fixed normal report of metrics/normal_report.yaml. `neighbour`, the findings of the nearest train
    image, needs an encoder: `--model medvlm-baseline --model_args kind=neighbour,encoder=...`.

    --metadata and YAML: as for `ImagePrompts` and `ScoredTexts`.
    """

    KEYS: ClassVar[frozenset[str]] = ImagePrompts.KEYS | ScoredTexts.KEYS
    RUNTIME_KEYS: ClassVar[frozenset[str]] = ImagePrompts.RUNTIME_KEYS | ScoredTexts.RUNTIME_KEYS
    FLOORS: ClassVar[frozenset[str]] = frozenset({"constant", "template", "neighbour"})
    SCORER: ClassVar[type[TextScorer]] = ReportScorer

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study with findings and a chosen image; `file` and `image` are the first one's."""
        for study in self.studies:
            images = self.chosen_images(study)
            if images and study.findings.strip():
                yield {
                    **self.document_ids(study, images[0]),
                    "images": [image.sha256 for image in images],
                    "prompt": self.prompt_for(study),
                    "target": study.findings.strip(),
                    "abnormal": self.is_abnormal(study),
                }

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request per set of images, all with the same prompt."""
        prompt = self.prompt_of(doc)
        return [
            Instance(
                "generate_until",
                doc,
                (prompt, self.generation_kwargs, self.visual(refs)),
                k,
                metadata=kwargs["metadata"],
            )
            for k, refs in enumerate(self.shown(self.by_id[doc["study_id"]]))
        ]

    def shown(self, study: Study) -> list[list[ImageRef]]:
        """The sets of images that are asked about, one request each."""
        return [self.refs_of(study)]

    # --- floors

    @cached_property
    def train_studies(self) -> list[Study]:
        """Those with findings, which floors learn from.

        Raises:
            UserError: if there are none.
        """
        found = [study for study in self.data.studies if study.split == "train" and study.findings.strip()]
        if not found:
            raise UserError(
                f"{self.task_name}: no study of {self.data.manifest.name} in split train has findings, which the "
                "floors are made from."
            )
        return found

    @cached_property
    def exemplars(self) -> Sequence[Exemplar]:
        """Every train image of the chosen views with its study's findings; never perturbed."""
        return tuple(
            Exemplar(ImageRef(image.sha256, self.data.path(image)), study.findings.strip())
            for study in self.train_studies
            for image in self.chosen_images(study)
        )

    def floor_texts(self) -> Mapping[str, Sequence[str]]:
        """The most frequent findings of the train split, and the template."""
        constant = most_frequent_summary(study.findings for study in self.train_studies)
        texts = {"constant": constant, "template": normal_report()}
        return {kind: [text] * len(self.documents) for kind, text in texts.items()}

    # --- facts and results

    def fact_source(self, doc: Mapping[str, Any]) -> str:
        """The human report, findings and impression."""
        study = self.by_id[doc["study_id"]]
        return compose_report(study.findings, study.impression)

    def what_studies_have(self) -> str:
        """Counts of findings and images."""
        findings = sum(bool(study.findings.strip()) for study in self.studies)
        images = sum(bool(self.chosen_images(study)) for study in self.studies)
        return f"findings in {findings} and {self._what_image()} in {images}, never both"

    def _what_image(self) -> str:
        return "a frontal image" if self.images == "frontal" else "an image"

    def counts(self) -> dict[str, int]:
        """What is shown, and the studies that lack something."""
        shown = {doc["study_id"] for doc in self.documents}
        with_findings = [study for study in self.studies if study.findings.strip()]
        what = "frontal_image" if self.images == "frontal" else "image"
        return {
            "images": sum(len(doc["images"]) for doc in self.documents),
            "studies_without_findings": len(self.studies) - len(with_findings),
            f"studies_without_{what}": sum(study.study_id not in shown for study in with_findings),
            "studies_without_indication": sum(not self.by_id[one].indication.strip() for one in shown),
        }

    def details(self) -> dict[str, Any]:
        """Adds the template's version and how far the human reports repeat each other."""
        targets = {row.study_id for row in self.rows}
        texts = [doc["target"] for doc in self.documents if doc["study_id"] in targets]
        return {
            **super().details(),
            "template_version": normal_report_version(),
            "modal_share_of_references": modal_share(texts) if texts else None,
        }
