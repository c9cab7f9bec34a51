"""What robustness tracks share: a suite of perturbations as conditions, on studies that keep the labels' positives.

Clean answers, answers to each case of the suite, and answers to images that do not show the patient come from the same
studies and resamples, so that drops are paired. Robustness comes with reliance on the image, always: what ignores the
image never changes its mind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from medvlm_harness.data.chexpert import NO_FINDING
from medvlm_harness.data.labels import resolve
from medvlm_harness.data.records import Study
from medvlm_harness.data.stratified import stratified_studies
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.consistency import QUADRANTS
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.robustness import CLEAN, Conditions, Reference
from medvlm_harness.perturbations.image import find_suite
from medvlm_harness.perturbations.text.suites import find_prompt_suite, find_report_suite
from medvlm_harness.tracks.conditions import ConditionsTask
from medvlm_harness.tracks.perturbed import InputPerturbation, PerturbedReports, UnfitPerturbation

__all__ = ["GATE", "IMAGES", "PROMPTS", "REPORTS", "Case", "RobustnessTask"]

IMAGES, PROMPTS, REPORTS = "images", "prompts", "reports"
GATE = "other_image"  # by which reliance on the image is judged
SUITES = ("quick", "full")
QUICK_STUDIES = 300
# What images of a modality are called in prompts.
IMAGE_WORDS = {"chest": "chest x-ray", "ct": "CT image", "mri": "MR image", "fundus": "fundus photograph"}


class Case(Protocol):
    """One case of a suite, whatever it perturbs."""

    @property
    def name(self) -> str:
        """As in metric names: group and severity."""

    @property
    def group(self) -> str:
        """Of cases of one kind, over which means are taken."""

    @property
    def identity(self) -> str:
        """All that decides what it does to an input."""


class RobustnessTask(ConditionsTask):
    """A task under the condition `clean`, under each case of a suite, and with each substitute for the image.

    YAML: `perturbation`, `{suite: quick or full, of: images, prompts or reports}` (what a track can have perturbed is
    in its `OF`); `modality`, which says what corruptions images have; `substitutes` as for `ConditionsTask`, null for
    a track without images; `studies`, how many are chosen (300 in the suite quick, else all).
    --metadata: `suite`, `studies`, `perturbation_seed`, `substitution_seed`; and `reference`, the results file of
    another model's run of the same task, against which mCE is given.
    """

    KEYS: ClassVar[frozenset[str]] = ConditionsTask.KEYS | {"studies"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = ConditionsTask.RUNTIME_KEYS | {
        "suite",
        "studies",
        "perturbation_seed",
        "reference",
    }
    OF: ClassVar[tuple[str, ...]]
    MEASURES: ClassVar[tuple[str, ...]]  # names of the scores that drop

    def read_perturbation(self) -> InputPerturbation:
        """None: a suite is read by `read_suite`."""
        if "perturbation" in self.runtime:
            raise UnfitPerturbation(
                f"{self.task_name}: runs a suite, which --metadata suite=... chooses: a single perturbation goes on "
                "the ordinary track."
            )
        return InputPerturbation()

    def read_suite(self) -> None:
        """Check suite, modality, substitutes and number of studies; names the conditions."""
        declared = self.declared.get("perturbation")
        if not isinstance(declared, Mapping) or "suite" not in declared:
            raise UserError(
                f"{self.task_name}: expected perturbation: {{suite: quick}} (a single one goes on the ordinary track), "
                f"but got {declared!r}."
            )
        for key in declared:
            if key not in ("suite", "of"):
                raise UserError(
                    f"{self.task_name}: unknown key {key!r} in perturbation.{near_matches(key, ('suite', 'of'))}"
                )
        self.suite = str(self.runtime.get("suite", declared["suite"]))
        self.of = str(declared.get("of", self.OF[0]))
        for what, value, known in (("suite", self.suite, SUITES), ("of", self.of, self.OF)):
            if value not in known:
                raise UserError(
                    f"{self.task_name}: expected {what} of perturbation to be {' or '.join(known)}, but got {value!r}."
                )
        self._found: Mapping[str, Estimate] = {}
        self.perturbation_seed = self.seed("perturbation_seed")
        self.cases: tuple[Any, ...] = self._cases()
        if self.declared.get("substitutes") is None:
            self.substitutes: tuple[Any, ...] = ()
            self.substitution_seed = 0
        else:
            self.read_substitutes()
            if "other" not in self.substitutes:
                raise UserError(
                    f"{self.task_name}: expected other among the substitutes, by which reliance on the image is "
                    f"judged, but got {list(self.substitutes)}."
                )
        self.stood_in = tuple(f"{one}_image" for one in self.substitutes)  # "auroc_mean" would be a mean AUROC
        groups: dict[str, list[str]] = {}
        for case in self.cases:
            groups.setdefault(case.group, []).append(case.name)
        self.compared = Conditions(groups, others=[*self.controls(), *self.stood_in])
        self.conditions = self.compared.names
        chosen = self.runtime.get("studies", self.declared.get("studies"))
        if chosen is not None and (not isinstance(chosen, int) or isinstance(chosen, bool) or chosen < 1):
            raise UserError(f"{self.task_name}: expected studies to be a number from 1 on, but got {chosen!r}.")
        self.wanted: int | None = chosen or (QUICK_STUDIES if self.suite == "quick" else None)

    def _cases(self) -> tuple[Case, ...]:
        if self.of == REPORTS:
            return find_report_suite(self.suite, seed=self.perturbation_seed)
        modality = self.declared.get("modality")
        if self.of == PROMPTS:
            image = IMAGE_WORDS.get(str(modality), "image")
            return find_prompt_suite(self.suite, image=image, seed=self.perturbation_seed)
        if modality is None:
            raise UserError(f"{self.task_name}: expected `modality:` to say what kind of images the suite is for.")
        return find_suite(self.suite, str(modality), seed=self.perturbation_seed)

    def seed_keys(self) -> frozenset[str]:
        """Adds that of the suite."""
        return super().seed_keys() | {"perturbation_seed"}

    @cached_property
    def _reports(self) -> list[PerturbedReports]:
        return [PerturbedReports(case, self.input_sections()) for case in self.cases]

    def said_otherwise(self, doc: Mapping[str, Any]) -> list[Study]:
        """A document's study with its report said otherwise, in each case; of a suite of reports."""
        return [of_case(self.by_id[doc["study_id"]]) for of_case in self._reports]

    def controls(self) -> tuple[str, ...]:
        """Conditions beside the cases under which answers should change; they go into no mean."""
        return ()

    # --- studies

    def choose(self, studies: Sequence[Study]) -> list[Study]:
        """Those with an image and a report, as many as wanted, so that labels keep positives.

        Every robustness task over a set has the same ones, whose clean answers they share.
        """
        able = [study for study in studies if study.images and (study.findings.strip() or study.impression.strip())]
        manifest = self.data.manifest
        names = [name for name in manifest.label_names if name != NO_FINDING] if manifest.label_sources else []
        known = [study.labels.get(self.label_source) for study in able] if names else []
        self.choice = stratified_studies(
            [study.study_id for study in able],
            [[resolve(labels, name) for name in names] for labels in known],
            keys=names,
            n=self.wanted or len(able),
        )
        return [study for study in able if study.study_id in self.choice.study_ids]

    # --- a reference run

    @cached_property
    def reference(self) -> Mapping[str, Reference]:
        """Measure -> what the reference run scored; empty where none is named.

        Raises:
            UserError: if its file cannot be read, or is of another task, data, split or suite.
        """
        if "reference" not in self.runtime:
            return {}
        path = Path(str(self.runtime["reference"]))
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            theirs = results["medvlm"]["tasks"][self.task_name]
            name = str(results["medvlm"]["model"]["card"]["name"])
            for key, value in self.comparable().items():
                if (other := theirs["comparable"].get(key)) != value:
                    raise UserError(
                        f"{self.task_name}: the reference {path} has another {key}: {other!r}, not {value!r}."
                    )
            return {measure: self._reference(name, measure, theirs["robustness"]) for measure in self.MEASURES}
        except UserError:  # which is a ValueError
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.task_name}: expected reference to be the results file of a run of this task, but {path} is "
                f"none ({type(error).__name__}: {error})."
            ) from error

    def _reference(self, name: str, measure: str, scored: Mapping[str, Any]) -> Reference:
        """What a run scored under each condition, from its `robustness` block."""

        def error_of(condition: str) -> float:
            value = scored[f"{measure}_{condition}"]["value"]
            return float("nan") if value is None else 1 - float(value)

        return Reference(name, error_of(CLEAN), {case: error_of(case) for case in self.compared.cases})

    def comparable(self) -> dict[str, Any]:
        """What two runs must share for their errors to be divided by each other; plain JSON."""
        return {
            "version": self.VERSION,
            "data": self.data.sha256,
            "split": "+".join(self.splits),
            "studies": len(self.studies),
            "label_source": self.label_source if self.data.manifest.label_sources else None,
            "cases": {case.name: case.identity for case in self.cases},
        }

    def prepare_for(self, lm: Any) -> None:
        """A wrong reference ends the run before anything is asked."""
        super().prepare_for(lm)
        _ = self.reference

    # --- metrics

    def metric_names(self) -> tuple[str, ...]:
        """Clean score, drops, retention, errors, worst case; flips, reliance and quadrants. details() has the rest."""
        names = []
        for measure in self.MEASURES:
            kinds = ["clean", "drop", *(f"drop_{group}" for group in self.compared.groups), "retention"]
            kinds += ["corruption_error", *(["mce", "relative_mce"] if "reference" in self.runtime else []), "worst"]
            for other in self.compared.others:
                kinds += [other, f"drop_{other}"]
            names += [f"{measure}_{kind}" for kind in kinds]
        reliance = [*(f"reliance_{one}" for one in self.stood_in), *(QUADRANTS if self.stood_in else ())]
        return tuple(dict.fromkeys([*names, "flip_rate", "flip_rate_any", *reliance]))

    def lower_is_better(self) -> frozenset[str]:
        """Drops and errors, but not the drop with another's image; flips; the dangerous quadrant."""
        lower = {"flip_rate", "flip_rate_any", "consistent_unreliant", "inconsistent_unreliant"}
        for measure in self.MEASURES:
            lower |= self.compared.lower_is_better(measure) - {f"{measure}_drop_{one}" for one in self.compared.others}
        return frozenset(lower)

    def keep(self, found: Mapping[str, Estimate]) -> Mapping[str, Estimate]:
        """Keeps all estimates for details(); what is in the headline."""
        self._found = found
        return {name: found[name] for name in self.metric_names()}

    # --- results

    def dump_config(self) -> dict[str, Any]:
        """Adds the suite as run."""
        return {**super().dump_config(), "perturbation": {"suite": self.suite, "of": self.of}}

    def details(self) -> dict[str, Any]:
        """Adds the suite, what makes runs comparable, and the estimates under every condition."""
        return {
            **super().details(),
            "suite": {"name": self.suite, "of": self.of, "seed": self.perturbation_seed},
            "comparable": self.comparable(),
            "groups": {group: list(members) for group, members in self.compared.groups.items()},
            "others": list(self.compared.others),
            "measures": list(self.MEASURES),
            "robustness": {name: estimate.to_dict() for name, estimate in self._found.items()},
        }
