"""Linear probe: what a linear classifier reads off an encoder's frozen vectors of the train split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from scipy.special import logit

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.choice import same_words
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Embedding, ImageRef, TextRef
from medvlm_harness.tracks import zero_shot_metrics as metrics
from medvlm_harness.tracks.rows import Row
from medvlm_harness.tracks.zero_shot import ZeroShot
from medvlm_harness.training.linear_probe import FOLDS, PENALTIES, SEEDS, LinearProbe, multilabel_probe

__all__ = ["Probe", "ProbeRow"]

TRAIN = "train"
NO_DOCUMENT = -1  # of requests for training studies, which no metric is computed of

Labelled = tuple[Study, Image | None, dict[str, list[int | None]]]  # a study, its input, its truth per label source


class TrainingVectors(NamedTuple):
    """The training studies that one process asked for."""

    study_ids: tuple[str, ...]
    vectors: NDArray[np.float32]  # (n, d)


@dataclass(frozen=True, slots=True)
class ProbeRow(Row):
    """The vector of one study, and its truth per label source (None: unlabelled or left out)."""

    vector: Embedding
    targets: Mapping[str, tuple[int | None, ...]]
    training: TrainingVectors | None  # the first row of each process brings its share

    __str__ = Row.__str__


class Probe(ZeroShot):
    """`embed` requests: one input per study of the chosen splits, and of the whole train split beside them.

    For each label a logistic regression on the vectors of the train split, its penalty chosen by cross-validation over
    patients, for three seeds of the folds (`training/linear_probe.py`); metrics are those of `ZeroShot`, the mean over
    the seeds, which stand in `extra` each by itself. --limit leaves out documents of the chosen splits alone. The floor
    is the higher of two: the constant's, and that of repeating the labels of training studies with the same input.

    A subclass says what the input is; independent labels alone, of which phrases and questions go unused.
    """

    OUTPUT_TYPE: ClassVar[str] = "embed"

    @property
    @abstractmethod
    def input_name(self) -> str:
        """What a study must have to be learnt from."""

    def read_declaration(self) -> None:
        """As for `ZeroShot`, of independent labels; and no probe is scored on what it learns from."""
        labels = self.declared.get("labels")
        if isinstance(labels, Mapping) and labels.get("kind") == "multiclass":
            raise UserError(f"{self.task_name}: expected independent labels, which are learnt one by one.")
        super().read_declaration()
        if TRAIN in self.splits:
            raise UserError(
                f"{self.task_name}: the probe learns from split {TRAIN}: choose others than {'+'.join(self.splits)}."
            )
        self._training: TrainingVectors | None = None
        self._fitted: tuple[tuple[str, ...], list[LinearProbe]] = ((), [])

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document per study; `counterparts`, its positive labels, are for `medvlm-baseline kind=oracle` alone.

        Raises:
            UserError: if a patient is in the train split too.
        """
        learnt_from = {study.patient_id for study, _, _ in self._train_studies.values()}
        for one in self.labelled(self.studies):
            doc = self.document(*one)
            if doc["patient_id"] in learnt_from:
                raise UserError(
                    f"{self.task_name}: patient {doc['patient_id']} is in split {TRAIN} too, which the probe learns "
                    "from: prepare the set with splits by patient."
                )
            yield doc

    def make_fitting_documents(self) -> Iterator[dict[str, Any]]:
        """As for `ZeroShot`, without patients that the probe learns from."""
        learnt_from = {study.patient_id for study, _, _ in self._train_studies.values()}
        return (doc for doc in super().make_fitting_documents() if doc["patient_id"] not in learnt_from)

    def document(self, study: Study, image: Image | None, targets: dict[str, list[int | None]]) -> dict[str, Any]:
        """Adds the positive labels."""
        doc = super().document(study, image, targets)
        positive = [name for name, value in zip(self.label_set.names, doc["target"], strict=True) if value == 1]
        return {**doc, "counterparts": {"": 1.0, **dict.fromkeys(positive, 1.0)}}

    @cached_property
    def _train_studies(self) -> dict[str, Labelled]:
        """Those with an input, with their truth, by id; without any, every metric is undefined."""
        train = [study for study in self.data.studies if study.split == TRAIN]
        return {one[0].study_id: one for one in self.labelled(train)}

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        """Those of the documents, then this process's share of the train split.

        Shared by the processes that have a document: with its row the vectors come to where the probe is fitted.
        """
        super().build_all_requests(limit=limit, samples=samples, rank=rank, world_size=world_size, **options)
        chosen = self.chosen_documents(limit=limit, samples=samples)
        working = sorted({self.study_numbers[doc["study_id"]] % world_size for doc in chosen})
        share = list(self._train_studies)[working.index(rank) :: len(working)] if rank in working else []
        self._instances = [*(self._instances or ()), *map(self._training_request, share)]

    def _training_request(self, study_id: str) -> Instance:
        doc = self.document(*self._train_studies[study_id])
        return self.construct_requests(doc, "", metadata=(self.task_name, NO_DOCUMENT, 1))

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """The input."""
        return Instance("embed", doc, (self.input_ref(doc),), 0, metadata=kwargs["metadata"])

    def apply_filters(self) -> None:
        """Keeps what was answered for the train split."""
        super().apply_filters()
        (pipeline,) = (one.name for one in self._filters)
        own = [one for one in self._instances or () if one.doc_id == NO_DOCUMENT]
        if own:
            vectors = np.stack([instance.filtered_resps[pipeline].vector for instance in own])
            self._training = TrainingVectors(tuple(instance.doc["study_id"] for instance in own), vectors)

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Embedding]) -> ProbeRow:  # type: ignore[override]
        """Vector and truth of one study."""
        targets = {source: tuple(values) for source, values in doc["targets"].items()}
        training, self._training = self._training, None
        ids = doc["study_id"], doc["patient_id"], doc["split"], doc.get("file", "")
        return ProbeRow(*ids, results[0], targets, training)

    # --- metrics

    def estimate(self, rows: Sequence[ProbeRow]) -> Mapping[str, Estimate]:  # type: ignore[override]
        """The means over the seeds; how far scores can be trusted is that of the mean scores, as they are written."""
        if not self._train_studies:
            reason = f"no study in split {TRAIN} has {self.input_name} to learn from"
            nothing = Estimate.undefined(reason, n=sum(row.split in self.splits for row in rows))
            return dict.fromkeys(self.metric_names(), nothing)
        probes = self._probes(rows)
        is_scored, _, _ = self.parts(rows)
        scored = [row for row, one in zip(rows, is_scored, strict=True) if one]
        learnt = np.array([not probe.reason for probe in probes])
        # A label that could not be learnt says nothing of No Finding.
        margins = [
            np.stack([np.full(len(scored), -np.inf) if p.reason else p.margin[seed, is_scored] for p in probes], axis=1)
            for seed in range(len(SEEDS))
        ]
        of_seeds = [self._of_margin(scored, margin, learnt) for margin in margins]
        repeats = self._of_margin(scored, self._known_inputs(scored), learnt)
        estimates = {name: _mean([one[name] for one in of_seeds]) for name in of_seeds[0]}
        for label, probe in zip(self.label_set.labels, probes, strict=True):
            if probe.reason:
                estimates[f"auroc_{label.key}"] = Estimate.undefined(probe.reason, n=len(scored))
        trust = self.label_trust(
            rows,
            np.stack([probe.margin.mean(axis=0) for probe in probes], axis=1),
            np.stack([probe.probability.mean(axis=0) for probe in probes], axis=1),
            reasons=[probe.reason or None for probe in probes],
        )
        found = {name: _with_floor(estimate, repeats[name].value) for name, estimate in estimates.items()} | trust
        return {name: found[name] for name in self.metric_names()}

    def _known_inputs(self, rows: Sequence[ProbeRow]) -> NDArray[np.float64]:
        """The floor that repeats: log-odds of what the training studies with the same input have, (n, L).

        Reports repeat between train and test, so that vectors of pure noise, one per text, beat a coin.
        """
        known_labels: dict[str, list[list[int | None]]] = {}
        for one in self._train_studies.values():
            doc = self.document(*one)
            known_labels.setdefault(_same(self.input_ref(doc)), []).append(doc["target"])
        asked = {doc["study_id"]: _same(self.input_ref(doc)) for doc in self.documents}
        everything = np.array([one for ones in known_labels.values() for one in ones], dtype=np.float64)
        known = np.maximum((~np.isnan(everything)).sum(axis=0), 1)
        prevalence = np.clip(np.nansum(everything, axis=0) / known, 1e-6, 1 - 1e-6)
        shares = []
        for row in rows:
            same = np.array(known_labels.get(asked[row.study_id], []), dtype=np.float64)
            same = same.reshape(-1, len(prevalence))
            shares.append((np.nansum(same, axis=0) + prevalence) / ((~np.isnan(same)).sum(axis=0) + 1))
        found: NDArray[np.float64] = logit(np.array(shares))
        return found

    def _of_margin(
        self, rows: Sequence[ProbeRow], margin: NDArray[np.float64], learnt: NDArray[np.bool_]
    ) -> dict[str, Estimate]:
        """The metrics of one matrix of scores; labels that could not be learnt take part in no mean."""
        keys = [label.key for label in self.label_set.labels]
        truth = {
            source: np.array([row.targets[source] for row in rows], dtype=np.float64)
            for source in (self.source, *self.other_sources)
        }
        masked = {source: np.where(learnt, y, np.nan) for source, y in truth.items()}
        studies = [row.study_id for row in rows]
        estimates = metrics.multilabel(
            masked[self.source],
            np.where(learnt, margin, 0.0),
            studies,
            keys=keys,
            subsets={name: [self.label_set.names.index(x) for x in members] for name, members in self.subsets.items()},
            findings=None,
            others={source: masked[source] for source in self.other_sources},
        )
        columns = self.finding_columns()
        if columns is not None:
            estimates["auroc_no_finding"] = (
                metrics.no_finding(truth[self.source][:, columns], margin[:, columns], studies)
                if learnt[columns].any()
                else Estimate.undefined("no finding could be learnt", n=len(rows))
            )
        return estimates

    def _probes(self, rows: Sequence[ProbeRow]) -> list[LinearProbe]:
        """One per label, learnt from what all processes brought."""
        ids = tuple(row.study_id for row in rows)
        if self._fitted[0] != ids:
            shares = [row.training for row in rows if row.training is not None]
            vectors = {k: v for share in shares for k, v in zip(share.study_ids, share.vectors, strict=True)}
            if vectors.keys() != self._train_studies.keys():
                raise UserError(
                    f"{self.task_name}: expected the vectors of {len(self._train_studies)} training studies, "
                    f"but got {len(vectors)}: run the task as lm-eval does, with its requests built by itself."
                )
            train = [(vectors[k], study.patient_id, targets[self.source]) for k, (study, _, targets) in self._trained()]
            x, patients, y = zip(*train, strict=True)
            probes = multilabel_probe(
                np.stack(x),
                np.array(y, dtype=np.float64),
                patients,
                np.stack([row.vector.vector for row in rows]),
                [row.patient_id for row in rows],
            )
            self._fitted = ids, probes
        return self._fitted[1]

    def _trained(self) -> list[tuple[str, Labelled]]:
        return sorted(self._train_studies.items())

    # --- results

    def counts(self) -> dict[str, int]:
        """Adds what was learnt from."""
        return {**super().counts(), "training_studies": len(self._train_studies)}

    def details(self) -> dict[str, Any]:
        """Adds how the probes were fitted, and what was chosen for each label and seed."""
        probes = zip(self.label_set.labels, self._fitted[1], strict=False)
        return {
            **super().details(),
            "probe": {
                "seeds": list(SEEDS),
                "folds": FOLDS,
                "penalties": list(PENALTIES),
                "labels": {
                    label.key: {
                        "positives": probe.positives,
                        "penalty": list(probe.penalty),
                        "inner_auroc": list(probe.inner_auroc),
                        "reason": probe.reason or None,
                    }
                    for label, probe in probes
                },
            },
        }

    def score_records(self, rows: Sequence[ProbeRow]) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """One record per study and label: means over the seeds."""
        # By id, since the probes answered for what was fitted on, too.
        place = {study_id: k for k, study_id in enumerate(self._fitted[0])}
        own = [place[row.study_id] for row in rows if place]
        for number, (name, probe) in enumerate(zip(self.label_set.names, self._fitted[1], strict=False)):
            margins, probabilities = (one.mean(axis=0)[own].tolist() for one in (probe.margin, probe.probability))
            for row, margin, probability in zip(rows, margins, probabilities, strict=True):
                target = row.targets[self.source][number]
                known = {} if probe.reason else {"margin": margin, "probability": probability}
                yield self.score_record(row, name, target=target, **known)


def _same(ref: ImageRef | TextRef) -> str:
    """Inputs that share it count as the same: texts of the same words, images of the same bytes."""
    return same_words(ref.text) if isinstance(ref, TextRef) else str(ref)


def _with_floor(estimate: Estimate, repeats: float) -> Estimate:
    """With the higher of two floors: the constant, and what repeating the labels of known inputs scores."""
    if estimate.floor is None:
        return estimate
    floors = {"constant": estimate.floor, "repeats": repeats}
    best = max(floor for floor in floors.values() if not np.isnan(floor))
    return replace(estimate, floor=best, extra={**estimate.extra, "floors": floors})


def _mean(of_seeds: Sequence[Estimate]) -> Estimate:
    """The mean over seeds; the interval is that of one probe, its ends averaged, not the narrower one of a mean."""
    first = of_seeds[0]
    values = [one.value for one in of_seeds]
    low, high = (float(np.mean([one.ci95[end] for one in of_seeds])) for end in (0, 1))
    return replace(
        first,
        value=float(np.mean(values)),
        stderr=float(np.mean([one.stderr for one in of_seeds])),
        ci95=(low, high),
        method=f"mean over {len(of_seeds)} seeds; {first.method}" if first.method else "",
        extra={**first.extra, "seeds": values, "spread": float(np.max(values) - np.min(values))},
    )
