"""Zero-shot classification: each image against a set of labels, independent (multilabel) or exclusive (multiclass)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast, get_args

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.data.labels import Uncertain, resolve
from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Capability, ImageRef, LabelScores, LabelSet, TextRef
from medvlm_harness.tracks import zero_shot_metrics as metrics
from medvlm_harness.tracks.base import COMMON_KEYS, MedicalTask, Row

__all__ = ["ScoreRow", "ZeroShot"]


@dataclass(frozen=True, slots=True)
class ScoreRow(Row):
    """The scores of one image, and the truth per label source (None: unlabelled or left out)."""

    scores: LabelScores
    targets: Mapping[str, tuple[int | None, ...]]

    __str__ = Row.__str__


class ZeroShot(MedicalTask):
    """One `classify` request per image with the whole label set.

    YAML: `dataset`, `labels` (see `LabelSet.from_config`), and optionally `views` (only these), `target` (multiclass:
    the image's `view`, or a subgroup field of the study), `uncertain` (exclude, positive or negative), `subsets`
    (name -> labels, each a macro AUROC of its own), `no_finding` (derive it; `except` lists labels that do not count).
    """

    OUTPUT_TYPE: ClassVar[str] = "classify"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"classify:image"})
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | {"labels", "views", "target", "uncertain", "subsets", "no_finding"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = MedicalTask.RUNTIME_KEYS | {"uncertain"}

    def read_declaration(self) -> None:
        """Check labels, views, target, subsets and the uncertain policy."""
        declared = self.declared
        if "labels" not in declared:
            raise UserError(f"{self.task_name}: expected `labels:`, but it is missing.")
        self.label_set = LabelSet.from_config(self.task_name, declared["labels"])
        self._check_shapes()
        self.views = tuple(declared.get("views") or ())
        self.target = declared.get("target")
        if (self.label_set.kind == "multiclass") != (self.target is not None):
            raise UserError(
                f"{self.task_name}: a multiclass set needs `target:` (the field that holds the truth) and a "
                f"multilabel set has none, but got kind {self.label_set.kind} and target {self.target!r}."
            )
        uncertain = self.runtime.get("uncertain", declared.get("uncertain", "exclude"))
        if uncertain not in get_args(Uncertain):
            raise UserError(
                f"{self.task_name}: expected uncertain to be one of {', '.join(get_args(Uncertain))}, "
                f"but got {uncertain!r}."
            )
        self.uncertain = cast(Uncertain, uncertain)
        self.subsets = {str(k): tuple(map(str, v)) for k, v in (declared.get("subsets") or {}).items()}
        no_finding = declared.get("no_finding")
        self.no_finding_except = None if no_finding is None else tuple(map(str, no_finding.get("except", ())))
        for label in (*(x for names in self.subsets.values() for x in names), *(self.no_finding_except or ())):
            if label not in self.label_set.names:
                raise UserError(
                    f"{self.task_name}: {label!r} is not among the labels.{near_matches(label, self.label_set.names)}"
                )

    def _check_shapes(self) -> None:
        for key, kind, what in (
            ("views", list, "a list of views"),
            ("subsets", dict, "a mapping of names to lists of labels"),
            ("no_finding", dict, "a mapping with `except`, a list of labels"),
        ):
            value = self.declared.get(key)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"{self.task_name}: expected {key} to be {what}, but got {value!r}.")
        for key in self.declared.get("no_finding") or ():
            if key != "except":
                raise UserError(f"{self.task_name}: unknown key {key!r} in no_finding.{near_matches(key, ['except'])}")

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per input, such as an image of the chosen views."""
        for study, image, targets in self.labelled(self.studies):
            yield {**self.document_ids(study, image), "target": targets[self.source], "targets": targets}

    def inputs(self, study: Study) -> Iterable[Image | None]:
        """What of a study is classified: images, or None for its text."""
        return [image for image in study.images if not self.views or image.view in self.views]

    def labelled(self, studies: Iterable[Study]) -> Iterator[tuple[Study, Image | None, dict[str, list[int | None]]]]:
        """Inputs with their truth per source; one whose target field is empty is left out."""
        for study in studies:
            for image in self.inputs(study):
                targets = self._targets(study, image)
                if targets is not None:
                    yield study, image, targets

    def _targets(self, study: Study, image: Image | None) -> dict[str, list[int | None]] | None:
        """Truth per source in the order of the labels; None where a multiclass field holds none of the options."""
        if self.target is None:
            return {
                source: [resolve(study.labels.get(source), k, uncertain=self.uncertain) for k in self.label_source_keys]
                for source in (self.source, *self.other_sources)
            }
        value = image.view if image and self.target == "view" else study.subgroups.get(self.target)
        if value not in self.label_set.names:
            return None
        return {self.target: [int(name == value) for name in self.label_set.names]}

    @cached_property
    def source(self) -> str:
        """Where the truth comes from: a label source, or the target field of a multiclass set."""
        return self.target or self.label_source

    @cached_property
    def label_source_keys(self) -> tuple[str, ...]:
        """For each label of the set, its name as the sources spell it.

        Raises:
            UserError: if the data set has no such label.
        """
        known = {name.lower().replace(" ", "_"): name for name in self.data.manifest.label_names}
        keys = []
        for label in self.label_set.labels:
            if label.key not in known:
                raise UserError(
                    f"{self.task_name}: {self.data.manifest.name} has no label {label.name!r}."
                    f"{near_matches(label.name, known.values())}"
                )
            keys.append(known[label.key])
        return tuple(keys)

    @cached_property
    def request_labels(self) -> LabelSet:
        """The label set as sent, with the train split's prevalence for the floor that `medvlm-baseline` gives."""
        train = [study for study in self.data.studies if study.split == "train"]
        rows = [targets[self.source] for _, _, targets in self.labelled(train)]
        prior = []
        for column in range(len(self.label_set.labels)):
            known = [value for row in rows if (value := row[column]) is not None]
            prior.append(sum(known) / len(known) if known else None)
        return LabelSet(self.label_set.name, self.label_set.kind, self.label_set.labels, tuple(prior))

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """The input, with the whole label set."""
        arguments = (self.input_ref(doc), self.request_labels)
        return Instance("classify", doc, arguments, 0, metadata=kwargs["metadata"])

    def input_ref(self, doc: Mapping[str, Any]) -> ImageRef | TextRef:
        """What the model is to classify."""
        return self.image_ref(doc)

    def make_row(self, doc: Mapping[str, Any], results: Sequence[LabelScores]) -> ScoreRow:
        """Scores and truth of one input."""
        targets = {source: tuple(values) for source, values in doc["targets"].items()}
        ids = doc["study_id"], doc["patient_id"], doc["split"]
        return ScoreRow(*ids, doc.get("file", ""), results[0], targets)

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Macro metrics, one AUROC per label, and the macro AUROC against each other label source."""
        if self.target is not None:
            return metrics.MULTICLASS
        names = ["auroc", *(f"auroc_{name}" for name in self.subsets), "average_precision"]
        names += [f"auroc_{label.key}" for label in self.label_set.labels]
        names += ["auroc_no_finding"] if self.no_finding_except is not None else []
        return (*names, *(f"auroc@{source}" for source in self.other_sources))

    def estimate(self, rows: Sequence[ScoreRow]) -> Mapping[str, Estimate]:
        """All metrics, from one set of bootstrap resamples of studies."""
        studies = [row.study_id for row in rows]
        if self.target is not None:
            probability = np.array([row.scores.probability for row in rows])
            margin = np.array([row.scores.margin for row in rows])
            return metrics.multiclass(self._matrix(rows, self.target), probability, margin, studies)
        margin = np.array([row.scores.margin for row in rows])
        by_source = {source: self._matrix(rows, source) for source in (self.source, *self.other_sources)}
        return metrics.multilabel(
            by_source[self.source],
            margin,
            studies,
            keys=[label.key for label in self.label_set.labels],
            subsets={name: [self.label_set.names.index(x) for x in members] for name, members in self.subsets.items()},
            findings=self.finding_columns(),
            others={source: by_source[source] for source in self.other_sources},
        )

    def _matrix(self, rows: Sequence[ScoreRow], source: str) -> NDArray[np.float64]:
        """Truth of one source, shape (n, labels): 1, 0, or NaN where unlabelled or left out."""
        return np.array([row.targets[source] for row in rows], dtype=np.float64)

    def finding_columns(self) -> list[int] | None:
        """The labels whose absence makes No Finding; None where it is not asked for."""
        if self.no_finding_except is None:
            return None
        return [i for i, name in enumerate(self.label_set.names) if name not in self.no_finding_except]

    # --- results

    def details(self) -> dict[str, Any]:
        """Adds the label set, where its truth comes from, and what was left out."""
        return {
            **super().details(),
            "label_set": str(self.label_set),
            "label_source": self.source,
            "compared_label_sources": list(self.other_sources) if self.target is None else [],
            "uncertain": self.uncertain,
            "counts": self.counts(),
        }

    def counts(self) -> dict[str, int]:
        """What is scored, and what was left out."""
        images = [image for study in self.studies for image in study.images]
        wanted = [image for image in images if not self.views or image.view in self.views]
        return {
            "studies": len({doc["study_id"] for doc in self.documents}),
            "images": len(self.documents),
            "images_of_other_views": len(images) - len(wanted),
            "images_without_target": len(wanted) - len(self.documents),
        }

    def score_records(self, rows: Sequence[ScoreRow]) -> Iterator[dict[str, Any]]:
        """One record per image and label."""
        names = self.label_set.names
        for row in rows:
            answers = zip(names, row.targets[self.source], *row.scores, strict=True)
            for label, target, margin, probability in answers:
                yield self.score_record(row, label, target=target, margin=margin, probability=probability)
