"""What all tracks share: reading the declaration, finding the data, and turning rows into estimates for lm-eval."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks._yaml_loader import load_yaml

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Capability, ImagePerturbation, ImageRef
from medvlm_harness.tracks.perturbed import (
    InputPerturbation,
    Perturbable,
    PerturbedReports,
    UnfitPerturbation,
    read_perturbation,
)
from medvlm_harness.tracks.rows import NO_FILTER, Metric, Row
from medvlm_harness.tracks.task_data import SHARING, TaskData

__all__ = ["COMMON_KEYS", "MedicalTask"]

_log = logging.getLogger("lm_eval.medvlm")

COMMON_KEYS = frozenset({"dataset", "hub", "aliases", "sharing", "split", "label_source", "modality", "perturbation"})
STAND_IN = "stand_in"  # marks the document of a process that has none of its own


class _Computed(NamedTuple):
    """The rows of one filter pipeline in order, and their estimates."""

    ids: tuple[int, ...]  # of the rows as objects
    rows: Sequence[Any]
    estimates: Mapping[str, Estimate]


class MedicalTask(TaskData, Task):  # type: ignore[misc]  # lm-eval carries no types
    """A benchmark track over the record schema.

    A subclass names its request type, the capabilities it needs and the YAML keys it reads, and implements documents,
    requests, rows and estimates. It is constructed without touching any data; the data set is found at first use.

    Every track reads `modality`, the kind of the set's images (chest, ct, ...), and `perturbation: {name, severity}`,
    which --metadata may give too, with `perturbation_seed`: the same questions about perturbed inputs (perturbed.py).
    """

    is_medvlm = True
    OUTPUT_TYPE: ClassVar[str]
    NEEDS: ClassVar[frozenset[Capability]]
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS
    # What --metadata may say at run time; each is also a key of the YAML or of the run.
    RUNTIME_KEYS: ClassVar[frozenset[str]] = frozenset(
        {
            *("split", "label_source", "data_dir", "allow_contaminated", "allow_remote", "hub_id", "revision"),
            *("perturbation", "perturbation_seed"),
        }
    )
    # What of its requests a perturbation may be done to.
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset()

    def __init__(self, config: Mapping[str, Any]) -> None:
        declared = dict(config)
        declared.pop("class", None)
        name = str(declared.pop("task"))
        alias = declared.pop("task_alias", None)
        metadata = dict(declared.pop("metadata", None) or {})
        for key in declared:
            if key not in self.KEYS:
                raise UserError(f"{name}: unknown key {key!r}.{near_matches(key, self.KEYS)}")
        # lm-eval merges --metadata and the model's arguments, tokens among them, into the YAML's metadata. Only the
        # YAML's own part may be written into results.
        self.metadata = _own_metadata(metadata)
        self.VERSION = self.metadata.get("version")
        self.runtime = {key: metadata[key] for key in self.RUNTIME_KEYS if key in metadata}
        self.metadata_keys = frozenset(metadata) - self.metadata.keys() - {"config_source"}
        self.declared = declared
        self._config = TaskConfig(
            task=name,
            task_alias=alias,
            output_type=self.OUTPUT_TYPE,
            generation_kwargs=self.generation_options(),
            num_fewshot=0,
            metadata=self.metadata,
        )
        self._filters = [build_filter_ensemble(NO_FILTER, [["take_first", None]])]
        self._instances: list[Instance] | None = None
        self._computed: dict[str, _Computed] = {}  # by filter pipeline
        self._asked: Sequence[int] = ()  # by --samples
        self.fewshot_rnd = None
        if not isinstance(declared.get("dataset"), str):
            raise UserError(f"{name}: expected `dataset:` to name a prepared set, but got {declared.get('dataset')!r}.")
        if self.sharing not in SHARING:
            raise UserError(f"{name}: expected sharing to be {', '.join(SHARING)}, but got {self.sharing!r}.")
        self.unfit: str | None = None  # why what --metadata says of a whole run cannot be done in this task
        self.perturbation = self._fitting_perturbation()
        self.read_declaration()
        if self.perturbation.report and not self.input_sections():
            reason = (
                f"{self.perturbation.report.group} is for texts of reports, but the requests of this task hold none."
            )
            self.perturbation = self._without_perturbation(UnfitPerturbation(f"{name}: {reason}"))
        case = self.perturbation.report
        self.perturbed_reports = PerturbedReports(case, self.input_sections()) if case else None

    # --- for subclasses

    def generation_options(self) -> dict[str, Any] | None:
        """The `generation_kwargs` of lm-eval's own config; None for a task in which nothing is generated."""
        return None

    @abstractmethod
    def read_declaration(self) -> None:
        """Check and keep what this track reads from `self.declared`; touches no data."""

    def read_perturbation(self) -> InputPerturbation:
        """What is done to the inputs: by --metadata, else by the YAML, else nothing."""
        return read_perturbation(
            self.runtime.get("perturbation", self.declared.get("perturbation")),
            task=self.task_name,
            takes=self.PERTURBS,
            modality=self.declared.get("modality"),
            seed=self.runtime.get("perturbation_seed", 0),
        )

    def _fitting_perturbation(self) -> InputPerturbation:
        try:
            return self.read_perturbation()
        except UnfitPerturbation as error:
            return self._without_perturbation(error)

    def _without_perturbation(self, error: UnfitPerturbation) -> InputPerturbation:
        """None, where --metadata asks it of all tasks of a run: this one is then refused by itself."""
        if "perturbation" not in self.runtime:
            raise error
        self.unfit = str(error).removeprefix(f"{self.task_name}: ")
        return InputPerturbation()

    def seed_keys(self) -> frozenset[str]:
        """The keys of --metadata by which something in this task is drawn."""
        return frozenset() if self.perturbation.to_dict() is None else frozenset({"perturbation_seed"})

    def needs(self, lm: Any) -> frozenset[Capability]:
        """What a model must be able to do; a task that can be asked in two ways chooses the one for it."""
        return self.NEEDS

    def refuses(self, lm: Any) -> str | None:
        """Why this task does not run with a model, whatever that can do; None if it does."""
        return self.unfit

    def input_sections(self) -> tuple[str, ...]:
        """The sections of the report that go into requests, by the names of `Study`."""
        return ()

    @abstractmethod
    def make_documents(self) -> Iterable[dict[str, Any]]:
        """The documents of the chosen splits: plain JSON values, ids and hashes, no pixels.

        Text only where lm-eval's filters need it: --log_samples writes documents.
        """

    def make_fitting_documents(self) -> Iterable[dict[str, Any]]:
        """Documents of studies outside of the chosen splits, to fit on: none, unless a track fits something."""
        return ()

    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Every metric that each document contributes to, the same for all documents and processes."""

    @abstractmethod
    def estimate(self, rows: Sequence[Any]) -> Mapping[str, Estimate]:
        """All metrics of the task from its rows (sorted by study and image), those to fit on among them."""

    @abstractmethod
    def score_records(self, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """The rows of scores.parquet."""

    def details(self) -> dict[str, Any]:
        """What the results file says of this task beside its metrics."""
        manifest = self.data.manifest
        return {
            "dataset": {
                "name": manifest.name,
                "source": manifest.source,
                "sha256": self.data.sha256,
                "revision": manifest.revision,
                "licence": manifest.licence,
                "sharing": self.sharing,
                "policies": dict(manifest.policies),
            },
            "split": "+".join(self.splits),
            "version": self.VERSION,
            "perturbation": self._perturbation_details(),
            "documents": len(self.documents),
            "scored": len(self.rows),  # fewer under --limit or --samples
        }

    def _perturbation_details(self) -> dict[str, Any] | None:
        """What was done to the inputs, and how many texts of scored studies it changed."""
        described = self.perturbation.to_dict()
        if described is None or self.perturbed_reports is None:
            return described
        scored = sorted({row.study_id for row in self.rows})
        return described | self.perturbed_reports.counts(self.by_id[one] for one in scored)

    # --- the ids that documents, rows and score records share

    def document_ids(self, study: Study, image: Image | None = None) -> dict[str, Any]:
        """How a document names its study and, where it has one, its image."""
        ids = {"study_id": study.study_id, "patient_id": study.patient_id, "split": study.split}
        return ids if image is None else {**ids, "file": image.file, "image": image.sha256}

    def image_ref(self, doc: Mapping[str, Any]) -> ImageRef:
        """The request argument for the image of a document, perturbed if it is to be."""
        path = self.data.path(Image(doc["file"], doc["image"]))
        return ImageRef(doc["image"], path, self.image_perturbation(doc["split"]))

    def score_record(self, row: Row, label: str, **values: Any) -> dict[str, Any]:
        """One row of scores.parquet."""
        ids = {"task": self.task_name, "study": row.study_id, "patient": row.patient_id, "image": row.image or None}
        return {**ids, "split": row.split, "label": label, **values}

    # --- what is done to inputs

    def image_perturbation(self, split: str) -> ImagePerturbation | None:
        """What is done to the images of a split: nothing outside of the scored ones."""
        return self.perturbation.image if split in self.splits else None

    def as_asked(self, study: Study) -> Study:
        """The study with its report as requests hold it: perturbed if it is to be, and scored."""
        if self.perturbed_reports is None or study.split not in self.splits:
            return study
        return self.perturbed_reports(study)

    # --- what the plug-in and lm-eval call

    def prepare_for(self, lm: Any) -> None:
        """Called with the model before requests are made: what a request holds may depend on whose it is."""

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """The documents, made once.

        Raises:
            UserError: if the chosen splits hold none that this task can use.
        """
        documents = list(self.make_documents())
        if not documents:
            raise UserError(
                f"{self.task_name}: nothing to score in split {'+'.join(self.splits)} of {self.data.manifest.name}: "
                f"its {len(self.studies)} studies have {self.what_studies_have()}."
            )
        return documents

    def what_studies_have(self) -> str:
        """What there is of what this task asks about, for the error where that is nothing."""
        views = Counter(image.view or "unknown" for study in self.studies for image in study.images)
        return "images of these views: " + (", ".join(f"{view} {views[view]}" for view in sorted(views)) or "none")

    @cached_property
    def fitting_documents(self) -> list[dict[str, Any]]:
        """What is fitted on, such as validation images for thresholds: asked about, and scored by no metric."""
        return list(self.make_fitting_documents())

    def doc_iterator(
        self, *, rank: int = 0, limit: int | None = None, world_size: int = 1, samples: Sequence[int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The documents of one process, each with its number; under --samples, with its place among those asked for.

        A study belongs to one process in every task over the same split, so that its images are encoded there alone;
        lm-eval's own counts documents. A process without any gets the first document as a stand-in, since lm-eval
        expects at least one: its row is None, and `as_one_process` drops what is logged of it. Documents to fit on come
        last.

        Raises:
            UserError: if --samples asks for a document that is not there, or --limit for none.
        """
        if limit is not None and limit < 1:
            raise UserError(f"Expected --limit to be more than 0, but got {limit}.")
        self._asked = tuple(samples or ())
        for number in self._asked:
            if not 0 <= number < len(self.documents):
                raise UserError(
                    f"{self.task_name}: --samples asks for document {number}, but they go from 0 to "
                    f"{len(self.documents) - 1}."
                )
        chosen = self.chosen_documents(limit=limit, samples=samples)
        fitting = self.chosen_fitting_documents(limit=limit, samples=samples)
        numbered = [*enumerate(chosen), *enumerate(fitting, start=len(self.documents))]
        own = [(k, doc) for k, doc in numbered if self.study_numbers[doc["study_id"]] % world_size == rank]
        return iter(own or [(0, {**chosen[0], STAND_IN: True})])

    def chosen_documents(self, *, limit: int | None, samples: Sequence[int] | None) -> list[dict[str, Any]]:
        """The documents of all processes: those of --samples, else the first `limit`."""
        return [self.documents[number] for number in samples or ()] or self.documents[:limit]

    def chosen_fitting_documents(self, *, limit: int | None, samples: Sequence[int] | None) -> list[dict[str, Any]]:
        """The documents to fit on, of all processes: the first `limit`, and none with --samples."""
        return [] if samples else self.fitting_documents[:limit]

    @cached_property
    def study_numbers(self) -> dict[str, int]:
        """Study id -> its place in its splits, chosen or not, which says what process it belongs to."""
        others = (study for study in self.data.studies if study.split not in self.splits)
        return {study.study_id: number for part in (self.studies, others) for number, study in enumerate(part)}

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        **_: Any,
    ) -> None:
        """The requests of one process; lm-eval's own shows a bar on each, and adds examples and templates."""
        self._instances = []
        for number, doc in self.doc_iterator(rank=rank, limit=limit, world_size=world_size, samples=samples):
            built = self.construct_requests(doc, "", metadata=(self.task_name, number, 1))
            self._instances += built if isinstance(built, list) else [built]

    def apply_filters(self) -> None:
        """Take the first response; further ones come from lm-eval, which pads the shorter processes' requests."""
        for instance in self._instances or ():
            del instance.resps[instance.repeats :]
        super().apply_filters()

    def as_one_process(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What all processes logged, as one would have: without stand-ins, in the order of the documents asked for."""
        place = {number: k for k, number in enumerate(self._asked)}
        own = [sample for sample in samples if STAND_IN not in sample["doc"]]
        return sorted(own, key=lambda sample: place.get(sample["doc_id"], sample["doc_id"]))

    def test_docs(self) -> list[dict[str, Any]]:
        """The documents of the chosen splits."""
        return self.documents

    def has_test_docs(self) -> bool:
        """True: the chosen splits are lm-eval's test documents."""
        return True

    def has_training_docs(self) -> bool:
        """False: no few-shot examples."""
        return False

    has_validation_docs = has_training_docs

    def fewshot_context(self, doc: Mapping[str, Any], **_: Any) -> str:
        """Nothing: these request types take no context."""
        return ""

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The study's id, for --write_out."""
        return str(doc["study_id"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> Any:
        """The truth as logged."""
        return doc.get("target")

    def process_results(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """One row, under every metric's name; None for a stand-in."""
        return dict.fromkeys(self._metric_names, None if STAND_IN in doc else self.make_row(doc, results))

    @cached_property
    def _metric_names(self) -> tuple[str, ...]:
        return self.metric_names()

    @abstractmethod
    def make_row(self, doc: Mapping[str, Any], results: Sequence[Any]) -> Row:
        """The row of one document from the responses to its requests."""

    def estimates(self, rows: Sequence[Any]) -> Mapping[str, Estimate]:
        """All metrics, computed once for a set of rows whatever their order (processes return them interleaved).

        The rows are of one filter pipeline.
        """
        pipeline = rows[0].filter if rows else NO_FILTER
        ids = tuple(sorted(map(id, rows)))
        if pipeline not in self._computed or self._computed[pipeline].ids != ids:
            ordered = sorted(rows, key=lambda row: (row.study_id, row.image))
            scored = [row for row in ordered if row.split in self.splits]
            self._computed[pipeline] = _Computed(ids, scored, self.estimate(ordered))
        return self._computed[pipeline].estimates

    @property
    def rows(self) -> Sequence[Any]:
        """The rows that were scored, in order; of several filter pipelines, those of the first."""
        return next((computed.rows for computed in self._computed.values()), ())

    def all_estimates(self) -> dict[str, Estimate]:
        """What was computed: each metric under its name, from a second filter pipeline on as `rougeL,no_prior`."""
        found: dict[str, Estimate] = {}
        for number, (pipeline, computed) in enumerate(self._computed.items()):
            found |= {f"{name},{pipeline}" if number else name: one for name, one in computed.estimates.items()}
        return found

    def aggregation(self) -> dict[str, Metric]:
        """Metric name -> aggregation with a standard error of its own."""
        return {name: Metric(name, self.estimates) for name in self.metric_names()}

    def higher_is_better(self) -> dict[str, bool]:
        """Metric name -> direction."""
        return {name: name not in self.lower_is_better() for name in self.metric_names()}

    def lower_is_better(self) -> frozenset[str]:
        """The metrics of which less is better."""
        return frozenset()

    def override_metric(self, metric_name: str) -> None:
        """Asked for by --predict_only, which these tasks do not honour: their metrics cost nothing beside the model."""
        _log.warning("%s: --predict_only is ignored: metrics are computed all the same.", self.task_name)

    def dump_config(self) -> dict[str, Any]:
        """The declaration as run; of the metadata only what the YAML itself holds."""
        return {
            "task": self.task_name,
            "class": type(self).__name__,
            **{key: value for key, value in self.declared.items() if key not in ("hub", "perturbation")},
            **({"perturbation": perturbed} if (perturbed := self.perturbation.to_dict()) else {}),
            "split": "+".join(self.splits),
            "num_fewshot": 0,
            "output_type": self.OUTPUT_TYPE,
            "metadata": self.metadata,
        }


def _own_metadata(merged: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that stands in the YAML; of a task given inline, its version."""
    path = Path(str(merged.get("config_source", "inline")))
    if not path.is_file():
        return {key: merged[key] for key in ("version",) if key in merged}
    own = load_yaml(path, resolve_func=False).get("metadata")
    return own if isinstance(own, dict) else {}
