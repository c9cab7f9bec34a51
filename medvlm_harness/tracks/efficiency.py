"""Efficiency: what a model costs on this machine, measured on the images and reports of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.bootstrap import Weights, bootstrap_estimate
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import (
    Capability,
    ImageRef,
    LabelSet,
    Profile,
    TextRef,
    TimedBatches,
    TimingProtocol,
    Workload,
    capabilities_of,
)
from medvlm_harness.tracks.base import COMMON_KEYS, STAND_IN, MedicalTask
from medvlm_harness.tracks.retrieval import study_texts
from medvlm_harness.tracks.rows import Row

__all__ = ["Efficiency", "EfficiencyRow"]

Kind = Literal["images", "reports", "impressions", "image_reports"]
PROTOCOLS = {
    "full": TimingProtocol(),
    "short": TimingProtocol(warm_up=1, iterations=3, seconds=0.0, new_tokens=8, max_batch_size=4),
}
PERCENTILES = (50, 90, 95, 99)
OF_GENERATORS = ("time_to_first_token", "time_per_output_token", "output_tokens_per_second")
OF_MEMORY = ("peak_ram_mib", "vram_allocated_mib", "vram_reserved_mib", "vram_process_mib")
OF_MODEL = (
    *("parameters", "parameters_active", "parameters_trainable"),
    *("weights_memory_mib", "weights_disk_mib", "gflops_per_item"),
)
MORE_IS_BETTER = {"throughput", "output_tokens_per_second"}
# Larger than the largest batch on a CPU; on a GPU batches end there.
MOST_INPUTS = 256


class _Prompts(NamedTuple):
    impressions: str
    image_reports: str


@dataclass(frozen=True, slots=True)
class EfficiencyRow(Row):
    """What one process measured."""

    profile: Profile

    __str__ = Row.__str__


class Efficiency(MedicalTask):
    """One `profile` request, of what the model can do, over the first studies of the split that have what it takes.

    A model that writes and sees images writes reports (`image_reports`: image and prompt in, a fixed number of tokens
    out); one that writes and sees none writes impressions from findings (`impressions`); an encoder of images answers
    about a study's first frontal image (`images`: its vector, and where it can the scores of the label set); an encoder
    of texts about its report (`reports`: its vector). --limit is a number of studies.

    YAML: `dataset`, `labels` (see `LabelSet.from_config`), `prompts` (`impressions` with {findings}, and
    `image_reports` with `<image>`), and optionally `profile`: `full` (the default), `short`, or a mapping with fields
    of `TimingProtocol`. --metadata profile=short goes before it.

    Of several processes the one that has the first study measures, while the others wait: they would share its
    processor. Nothing of it comes from the store or goes there.
    """

    OUTPUT_TYPE: ClassVar[str] = "profile"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"profile"})
    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | {"labels", "prompts", "profile"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = MedicalTask.RUNTIME_KEYS | {"profile"}

    def read_declaration(self) -> None:
        """Check labels, prompts and the protocol."""
        self.label_set = LabelSet.from_config(self.task_name, self.declared.get("labels"))
        prompts = self.declared.get("prompts")
        texts = prompts if isinstance(prompts, Mapping) else {}
        wrong = texts.keys() ^ set(_Prompts._fields) or [k for k, v in texts.items() if not isinstance(v, str)]
        if wrong:
            raise UserError(
                f"{self.task_name}: expected prompts to hold the texts {' and '.join(_Prompts._fields)}, "
                f"but got {prompts!r}."
            )
        self.prompts = _Prompts(**texts)
        if "{findings}" not in self.prompts.impressions or "<image>" not in self.prompts.image_reports:
            raise UserError(
                f"{self.task_name}: expected prompts.impressions to hold {{findings}}, and prompts.image_reports to "
                "hold <image>."
            )
        self.protocol = self._read_protocol(self.runtime.get("profile", self.declared.get("profile", "full")))
        self.kind: Kind | None = None  # known with the model
        self._classifies = False
        self._inputs: int | None = None  # known with --limit

    def _read_protocol(self, declared: Any) -> TimingProtocol:
        if isinstance(declared, str) and declared in PROTOCOLS:
            return PROTOCOLS[declared]
        names = {one.name for one in fields(TimingProtocol)}
        if not isinstance(declared, Mapping):
            raise UserError(
                f"{self.task_name}: expected profile to be {', '.join(PROTOCOLS)}, or a mapping with "
                f"{', '.join(sorted(names))}, but got {declared!r}.{near_matches(str(declared), PROTOCOLS)}"
            )
        for key, value in declared.items():
            if key not in names:
                raise UserError(f"{self.task_name}: unknown key {key!r} in profile.{near_matches(str(key), names)}")
            least, kind = (0, int | float) if key == "seconds" else (int(key != "warm_up"), int)
            if not isinstance(value, kind) or isinstance(value, bool) or value < least:
                raise UserError(
                    f"{self.task_name}: expected {key} of profile to be a number from {least}, but got {value!r}."
                )
        return replace(TimingProtocol(), **declared)

    def prepare_for(self, lm: Any) -> None:
        """Choose the workload by what the model can do."""
        can = capabilities_of(lm) or frozenset()
        # A floor answers by a text that the task hands over: it writes nothing.
        writes = "generate_until" in can and getattr(lm, "floor", None) is None
        if writes:
            self.kind = "image_reports" if lm.MULTIMODAL else "impressions"
        else:
            self.kind = "images" if can & {"embed:image", "classify:image"} else "reports"
        self._classifies = "classify:image" in can

    # --- documents and requests

    def make_documents(self) -> Iterator[dict[str, Any]]:
        """One document: the studies that are asked about, as many as there are different inputs."""
        chosen: dict[str, Study] = {}
        for study in self.studies:
            key = self._content(study)
            if key is not None and len(chosen) < MOST_INPUTS:
                chosen.setdefault(key, study)
        if chosen:
            studies = list(chosen.values())
            yield {**self.document_ids(studies[0]), "studies": [study.study_id for study in studies]}

    def chosen_documents(self, *, limit: int | None, samples: Sequence[int] | None) -> list[dict[str, Any]]:
        """The one document, with its first studies under --limit."""
        chosen = [{**doc, "studies": doc["studies"][:limit]} for doc in self.documents]
        self._inputs = len(chosen[0]["studies"])
        return chosen

    def _content(self, study: Study) -> str | None:
        """What of a study is asked about, by its hash or its words; None where it has none."""
        image = self._image(study)
        if self.kind in ("images", "image_reports"):
            return None if image is None else image.sha256
        texts = study_texts(study)
        return texts.get("findings" if self.kind == "impressions" else "report")

    @staticmethod
    def _image(study: Study) -> Image | None:
        return next(iter(study.shown("frontal")), None)

    def what_studies_have(self) -> str:
        """Images, findings and reports."""
        images = sum(self._image(study) is not None for study in self.studies)
        texts = [study_texts(study) for study in self.studies]
        return (
            f"a frontal image in {images}, findings in {sum('findings' in one for one in texts)} and a report in "
            f"{sum(map(bool, texts))}, but {self.kind} are asked for"
        )

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """The workload; without inputs for a process that does not measure, and where no model is known."""
        measured = self.kind is not None and STAND_IN not in doc
        inputs = tuple(self._arguments(self.by_id[one]) for one in doc["studies"]) if measured else ()
        workload = Workload(self._request, inputs, self.protocol)
        return Instance("profile", doc, (str(workload), workload), 0, metadata=kwargs["metadata"])

    @property
    def _request(self) -> Literal["classify", "embed", "generate_until"]:
        if self.kind in ("impressions", "image_reports"):
            return "generate_until"
        return "classify" if self.kind == "images" and self._classifies else "embed"

    def _arguments(self, study: Study) -> tuple[Any, ...]:
        if self.kind == "impressions":
            return (self.prompts.impressions.replace("{findings}", study.findings.strip()),)
        image = self._image(study)
        if self.kind == "reports" or image is None:
            return (TextRef(study_texts(study)["report"]),)
        ref = ImageRef(image.sha256, self.data.path(image))
        if self.kind == "image_reports":
            return self.prompts.image_reports, {"visual": [ref]}
        return (ref, self.label_set) if self._classifies else (ref,)

    def make_row(self, doc: Mapping[str, Any], results: Sequence[Profile]) -> EfficiencyRow:
        """What was measured."""
        return EfficiencyRow(doc["study_id"], doc["patient_id"], doc["split"], "", results[0])

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Those that a model of the kind has."""
        generators = OF_GENERATORS if self._request == "generate_until" else ()
        latencies = tuple(f"latency_p{percent}" for percent in PERCENTILES)
        return (*latencies, "throughput", *generators, "load_seconds", *OF_MEMORY, *OF_MODEL)

    def lower_is_better(self) -> frozenset[str]:
        """All but rates."""
        return frozenset(self.metric_names()) - MORE_IS_BETTER

    def estimate(self, rows: Sequence[EfficiencyRow]) -> Mapping[str, Estimate]:
        """Durations with intervals by a bootstrap over iterations; sizes are known, without any."""
        if not rows:
            return dict.fromkeys(self.metric_names(), Estimate.undefined("no study", n=0))
        measured = rows[0].profile
        single, best = measured.single, measured.best
        found = {f"latency_p{p}": _over(single, _percentile(np.array(single.seconds) * 1000, p)) for p in PERCENTILES}
        found["throughput"] = _over(best, _rate(best, [best.batch_size] * len(best.seconds)))
        if self._request == "generate_until":
            found |= _of_generator(single, best)
        found["load_seconds"] = _known(measured.load_seconds, measured.reasons.get("load_seconds"))
        for name in OF_MEMORY:
            alone = {"batch_size": best.batch_size, "at_batch_size_1": single.memory[name]}
            found[name] = _known(best.memory[name], best.memory["vram_reason"], alone)
        for name in OF_MODEL:
            found[name] = _known(getattr(measured, name), measured.reasons.get(name))
        return {name: found[name] for name in self.metric_names()}

    def score_records(self, rows: Sequence[EfficiencyRow]) -> Iterator[dict[str, Any]]:
        """None: nothing is measured of a single study."""
        return iter(())

    def details(self) -> dict[str, Any]:
        """Adds the workload, the protocol, the hardware, and each iteration."""
        more: dict[str, Any] = {}
        if self.rows:
            measured = self.rows[0].profile
            more = {
                "hardware": dict(measured.hardware),
                "batch_sizes": {str(size): rate for size, rate in measured.searched},
                "search_ended": measured.search_ended,
                "single": _described(measured.single),
                "best": _described(measured.best),
            }
        return {
            **super().details(),
            "workload": {"kind": self.kind, "request": self._request, "inputs": self._inputs},
            "protocol": {**asdict(self.protocol), "full": self.protocol.is_full},
            "counts": {"studies_available": len(self.documents[0]["studies"])},
            **more,
        }


def _described(one: TimedBatches) -> dict[str, Any]:
    """Iterations in full, and the median of each stage per item in milliseconds."""
    per_item = {name: float(np.median(values)) / one.batch_size * 1000 for name, values in one.stages.items()}
    return {
        "batch_size": one.batch_size,
        "iterations": len(one.seconds),
        "seconds": list(one.seconds),
        "first_token_seconds": list(one.first_token_seconds),
        "tokens": list(one.tokens),
        "stages_ms_per_item_p50": per_item,
        "memory": dict(one.memory),
    }


def _of_generator(single: TimedBatches, best: TimedBatches) -> dict[str, Estimate]:
    """From the same prompts answered twice, by one token and by all: (T_n - T_1) / (n - 1) is the time per token."""
    first = np.array(single.first_token_seconds)
    rest = np.array(single.tokens) - 1
    decode = np.array(single.seconds) - first
    longer = bool((rest > 0).all())

    def per_token(weights: Weights) -> NDArray[np.float64]:
        return np.asarray(1000 * (weights @ decode) / (weights @ rest))

    return {
        "time_to_first_token": _over(single, _percentile(first * 1000, 50)),
        "time_per_output_token": _over(single, per_token)
        if longer
        else Estimate.undefined("a text has no second token", n=len(first)),
        "output_tokens_per_second": _over(best, _rate(best, best.tokens)),
    }


def _percentile(values: NDArray[np.float64], percent: int) -> Callable[[Weights], NDArray[np.float64]]:
    """The percentile of each resample, interpolated as NumPy does by default."""

    def of(weights: Weights) -> NDArray[np.float64]:
        counts = weights.astype(np.int64)
        return np.array([np.percentile(np.repeat(values, row), percent) for row in counts])

    return of


def _rate(one: TimedBatches, counts: Sequence[int]) -> Callable[[Weights], NDArray[np.float64]]:
    done, seconds = np.array(counts, dtype=np.float64), np.array(one.seconds)
    return lambda weights: np.asarray((weights @ done) / (weights @ seconds))


def _over(one: TimedBatches, statistic: Callable[[Weights], NDArray[np.float64]]) -> Estimate:
    """An estimate whose resamples are of iterations."""
    found = bootstrap_estimate(statistic, [f"{k:06}" for k in range(len(one.seconds))])
    extra = {**found.extra, "batch_size": one.batch_size, "iterations": len(one.seconds)}
    return replace(found, method=found.method.replace("studies", "iterations"), extra=extra)


def _known(value: float | None, reason: str | None, extra: Mapping[str, Any] | None = None) -> Estimate:
    """What was read off once, and has no interval."""
    if value is None:
        return Estimate.undefined(reason or "not known", n=1)
    return Estimate(float(value), float("nan"), (float("nan"), float("nan")), 1, method="read", extra=extra or {})
