"""Zero-shot classification: each image against a set of labels, independent (multilabel) or exclusive (multiclass)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast, get_args

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import label_key
from medvlm_harness.data.labels import Uncertain, resolve
from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.mesh import coded_finding_labels, finding_names, mesh_findings_version
from medvlm_harness.metrics.scaling import Method
from medvlm_harness.requests import Capability, ImageRef, LabelScores, LabelSet, TextRef
from medvlm_harness.tracks import zero_shot_metrics as metrics
from medvlm_harness.tracks.base import COMMON_KEYS
from medvlm_harness.tracks.label_fits import LabelItems, fit_labels
from medvlm_harness.tracks.label_trust import LabelTrust, is_lower_better, label_trust, trust_names
from medvlm_harness.tracks.option_trust import OPTION_TRUST, option_trust
from medvlm_harness.tracks.perturbed import Perturbable
from medvlm_harness.tracks.rows import Row
from medvlm_harness.tracks.validation_fits import FitsOnValidation

__all__ = ["ScoreRow", "ZeroShot"]

MESH_FINDINGS = "mesh_findings"  # truth that is read off the coders' terms when a task runs, not when a set is prepared


@dataclass(frozen=True, slots=True)
class ScoreRow(Row):
    """The scores of one image, and the truth per label source (None: unlabelled or left out)."""

    scores: LabelScores
    targets: Mapping[str, tuple[int | None, ...]]

    __str__ = Row.__str__


class ZeroShot(FitsOnValidation):
    """One `classify` request per image with the whole label set.

    YAML: `dataset`, `labels` (see `LabelSet.from_config`), and optionally `views` (only these), `target` (multiclass:
    the image's `view`, or a subgroup field of the study), `uncertain` (exclude, positive or negative), `subsets`
    (name -> labels, each a macro AUROC of its own), `no_finding` (derive it; `except` lists labels that do not count),
    `truth` (mesh_findings: the labels are findings of metrics/mesh_findings.yaml, and the truth what the coders gave),
    `scaling` (platt or temperature: how margins become probabilities on validation).

    Scalings and thresholds are fitted on the validation split, whose inputs are asked about beside those of the chosen
    splits. Where validation is itself chosen, what was fitted is evaluated on the other chosen splits alone.
    """

    OUTPUT_TYPE: ClassVar[str] = "classify"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"classify:image"})
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset({"image"})
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | frozenset(
        {"labels", "views", "target", "truth", "uncertain", "subsets", "no_finding", "scaling"}
    )
    RUNTIME_KEYS: ClassVar[frozenset[str]] = FitsOnValidation.RUNTIME_KEYS | {"uncertain", "scaling"}

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
        self.coded = self._reads_coded_findings()
        scaling = self.runtime.get("scaling", declared.get("scaling", "platt"))
        if scaling not in get_args(Method):
            raise UserError(
                f"{self.task_name}: expected scaling to be one of {', '.join(get_args(Method))}, but got {scaling!r}."
            )
        self.scaling = cast(Method, scaling)
        self._trust: LabelTrust | None = None
        self._fitted_on: dict[str, Any] = {}
        self.subsets = {str(k): tuple(map(str, v)) for k, v in (declared.get("subsets") or {}).items()}
        no_finding = declared.get("no_finding")
        self.no_finding_except = None if no_finding is None else tuple(map(str, no_finding.get("except", ())))
        for label in (*(x for names in self.subsets.values() for x in names), *(self.no_finding_except or ())):
            if label not in self.label_set.names:
                raise UserError(
                    f"{self.task_name}: {label!r} is not among the labels.{near_matches(label, self.label_set.names)}"
                )

    def _reads_coded_findings(self) -> bool:
        truth = self.declared.get("truth")
        if truth not in (None, MESH_FINDINGS) or (truth and self.target):
            raise UserError(
                f"{self.task_name}: expected truth to be {MESH_FINDINGS}, of a multilabel set, or missing "
                f"(then a label source is the truth), but got {truth!r}."
            )
        return truth is not None

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
            yield self.document(study, image, targets)

    def make_fitting_documents(self) -> Iterator[dict[str, Any]]:
        """Those of validation, where that is not itself chosen."""
        for study, image, targets in self.labelled(self.fitting_studies()):
            yield self.document(study, image, targets)

    def document(self, study: Study, image: Image | None, targets: dict[str, list[int | None]]) -> dict[str, Any]:
        """An input with its truth, the source's and all."""
        return {**self.document_ids(study, image), "target": targets[self.source], "targets": targets}

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
        """Truth per source in the order of the labels; None where a target field holds no option or nobody coded."""
        if self.coded:
            labels = coded_finding_labels(study.mesh)
            return None if labels is None else {MESH_FINDINGS: [labels[k] for k in self.label_source_keys]}
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
        """Where the truth comes from: a label source, the target field of a multiclass set, or the coders' terms."""
        return MESH_FINDINGS if self.coded else self.target or self.label_source

    @cached_property
    def other_sources(self) -> tuple[str, ...]:
        """The other label sources; none has the findings that coders name."""
        return () if self.coded else super().other_sources

    @cached_property
    def label_source_keys(self) -> tuple[str, ...]:
        """For each label of the set, its name as the sources spell it.

        Raises:
            UserError: if the data set has no such label.
        """
        manifest = self.data.manifest
        owner, names = (MESH_FINDINGS, finding_names()) if self.coded else (manifest.name, manifest.label_names)
        known = {label_key(name): name for name in names}
        keys = []
        for label in self.label_set.labels:
            if label.key not in known:
                raise UserError(
                    f"{self.task_name}: {owner} has no label {label.name!r}.{near_matches(label.name, known.values())}"
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

    def what_studies_have(self) -> str:
        """Their views, and how many were coded where that is the truth."""
        coded = sum(coded_finding_labels(study.mesh) is not None for study in self.studies) if self.coded else None
        return super().what_studies_have() + ("" if coded is None else f"; {coded} have MeSH terms")

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Macro metrics, how far scores can be trusted, one AUROC per label, and that against each other source."""
        if self.target is not None:
            return (*metrics.MULTICLASS, *OPTION_TRUST)
        names = ["auroc", *(f"auroc_{name}" for name in self.subsets), "average_precision"]
        names += [f"auroc_{label.key}" for label in self.label_set.labels]
        names += ["auroc_no_finding"] if self.no_finding_except is not None else []
        names += [f"auroc@{source}" for source in self.other_sources]
        return (*names, *trust_names(self.attributes, no_finding=self.no_finding_except is not None))

    def lower_is_better(self) -> frozenset[str]:
        """Errors of calibration, risks, and gaps between subgroups."""
        return frozenset(name for name in self._metric_names if is_lower_better(name))

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """What subgroups are of: the view, where several are scored, and whatever the set knows of its studies."""
        views = {self._views.get(doc.get("file", "")) for doc in self.documents} - {None}
        known = {name for study in self.data.studies for name in study.subgroups}
        return (*(["view"] if len(views) > 1 else []), *sorted(known))

    @cached_property
    def _views(self) -> dict[str, str | None]:
        return {image.file: image.view for study in self.data.studies for image in study.images}

    @cached_property
    def _subgroups(self) -> dict[str, Mapping[str, str]]:
        return {study.study_id: study.subgroups for study in self.data.studies}

    def estimate(self, rows: Sequence[ScoreRow]) -> Mapping[str, Estimate]:
        """All metrics, from one set of bootstrap resamples of studies."""
        scored = [row for row in rows if row.split in self.splits]
        studies = [row.study_id for row in scored]
        margin = np.array([row.scores.margin for row in scored])
        if self.target is not None:
            truth, probability = self._matrix(scored, self.target), self._probabilities(scored)
            accuracy = metrics.multiclass(truth, probability, margin, studies)
            return accuracy | self._option_trust(rows, scored, truth, probability)
        by_source = {source: self._matrix(scored, source) for source in (self.source, *self.other_sources)}
        estimates = metrics.multilabel(
            by_source[self.source],
            margin,
            studies,
            keys=[label.key for label in self.label_set.labels],
            subsets={name: [self.label_set.names.index(x) for x in members] for name, members in self.subsets.items()},
            findings=self.finding_columns(),
            others={source: by_source[source] for source in self.other_sources},
        )
        margins = np.array([row.scores.margin for row in rows])
        return estimates | self.label_trust(rows, margins, self._probabilities(rows))

    def label_trust(
        self,
        rows: Sequence[Row],
        margin: NDArray[np.float64],
        probability: NDArray[np.float64],
        *,
        reasons: Sequence[str | None] | None = None,
    ) -> dict[str, Estimate]:
        """Calibration, selective prediction, operating points, rare findings and subgroups.

        Args:
            rows: all, those to fit on among them.
            margin: of these, shape (n, labels); NaN for a label without scores.
            probability: likewise.
            reasons: why a label has no scores, (labels,).
        """
        keys = [label.key for label in self.label_set.labels]
        items = self.label_items(rows, margin, probability)
        scored, judged, fitting = self.parts(rows)
        without = None if fitting.any() else self.without_validation()
        fits = fit_labels(items.take(fitting), keys=keys, scaling=self.scaling, without=without, reasons=reasons)
        of_scored = items.take(scored)
        of_judged = of_scored if (judged == scored).all() else items.take(judged)
        prior = self.request_labels.prior
        self._trust = label_trust(
            of_scored,
            of_judged,
            fits,
            keys=keys,
            groups={
                name: (self._groups(name, rows, scored), self._groups(name, rows, judged)) for name in self.attributes
            },
            frequency=None if None in prior else [float(share) for share in prior if share is not None],
            reasons=reasons,
        )
        self._fitted_on = {"items": fits.items, "studies": fits.studies, "reason": fits.reason}
        return self._trust.estimates

    def label_items(
        self, rows: Sequence[Any], margin: NDArray[np.float64], probability: NDArray[np.float64]
    ) -> LabelItems:
        """Rows with their scores as arrays; a label that has no scores has no truth."""
        truth = self._matrix(rows, self.source)
        columns, derived = self.finding_columns(), None
        if columns is not None:
            ranked = np.where(np.isnan(margin), -np.inf, margin)[:, columns]
            of_none, score = metrics.no_finding_column(truth[:, columns], ranked)
            known = np.isfinite(score)
            derived = np.where(known, of_none, np.nan), np.where(known, score, 0.0)
        studies = np.array([row.study_id for row in rows])
        return LabelItems(np.where(np.isnan(margin), np.nan, truth), margin, probability, studies, derived)

    def _groups(self, attribute: str, rows: Sequence[Row], mask: NDArray[np.bool_]) -> list[str | None]:
        """The subgroup of each row of a mask."""
        of_view = attribute == "view" and "view" in self.attributes
        return [
            self._views.get(row.image) if of_view else self._subgroups[row.study_id].get(attribute)
            for row, one in zip(rows, mask, strict=True)
            if one
        ]

    def _option_trust(
        self,
        rows: Sequence[ScoreRow],
        scored: Sequence[ScoreRow],
        truth: NDArray[np.float64],
        probability: NDArray[np.float64],
    ) -> dict[str, Estimate]:
        of_scored, judged, fitting = self.parts(rows)
        fitted_on = [row for row, one in zip(rows, fitting, strict=True) if one]
        shape = -1, len(self.label_set.labels)
        without = None if fitted_on else self.without_validation()
        self._trust = option_trust(
            truth,
            probability,
            np.array([row.study_id for row in scored]),
            judged=judged[of_scored],
            fit_truth=self._matrix(fitted_on, self.source).reshape(shape),
            fit_probability=self._probabilities(fitted_on).reshape(shape),
            without=without,
        )
        studies = len({row.study_id for row in fitted_on})
        self._fitted_on = {"items": len(fitted_on), "studies": studies, "reason": without}
        return self._trust.estimates

    @staticmethod
    def _probabilities(rows: Sequence[ScoreRow]) -> NDArray[np.float64]:
        return np.array([row.scores.probability for row in rows], dtype=np.float64)

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
        """Adds the label set, where its truth comes from, what was left out, and how far scores can be trusted."""
        fitted_on = {"split": self.fits_on, **self._fitted_on} if self._fitted_on else None
        return {
            **super().details(),
            "label_set": str(self.label_set),
            "label_source": self.source,
            "compared_label_sources": list(self.other_sources) if self.target is None else [],
            "uncertain": self.uncertain,
            **({"mesh_findings_version": mesh_findings_version()} if self.coded else {}),
            "counts": self.counts() | self.fitting_counts(),
            **({"fitted_on": fitted_on, **self._trust.details} if fitted_on and self._trust else {}),
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
