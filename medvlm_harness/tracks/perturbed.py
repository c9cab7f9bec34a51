"""One perturbation of what a track asks about: `perturbation: {name, severity}`, read and checked.

Perturbed are inputs alone, and those of the scored splits alone: no reference, no target, no text that facts are
checked against, nothing that is learnt from or fitted on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from medvlm_harness.errors import UserError, near_matches

if TYPE_CHECKING:
    from medvlm_harness.data.records import Study
    from medvlm_harness.perturbations.image import Case, Corruption
    from medvlm_harness.perturbations.text import PerturbedText, TextCase, TextPerturbation

__all__ = [
    "InputPerturbation",
    "Perturbable",
    "PerturbedReports",
    "UnfitPerturbation",
    "image_case",
    "read_perturbation",
    "text_case",
]

Perturbable = Literal["image", "report", "prompt"]
"""What of a request can be perturbed: its images, the report's texts in it, or the question's own words."""
_IN_WORDS: Mapping[Perturbable, str] = {"image": "images", "report": "texts of reports", "prompt": "prompts"}
_KEYS = ("name", "severity")
_SUITES = "iu_cxr_robustness, iu_cxr_prompt_robustness, iu_cxr_report_robustness"


class UnfitPerturbation(UserError):  # noqa: N818 - a state of the task, which rows of results show
    """A perturbation that there is, but of something else than what the task asks about."""


@dataclass(frozen=True, slots=True)
class InputPerturbation:
    """What is done to the inputs of a task: one of these, or nothing."""

    image: Case | None = None
    report: TextCase | None = None
    prompt: TextCase | None = None

    def to_dict(self) -> dict[str, Any] | None:
        """As results hold it; None where nothing is done."""
        if self.image is not None:
            return _described("image", self.image.corruption, self.image)
        for kind, case in (("report", self.report), ("prompt", self.prompt)):
            if case is not None:
                return _described(kind, case.perturbation, case)
        return None


def read_perturbation(
    declared: Any, *, task: str, takes: Collection[Perturbable], modality: str | None, seed: Any = 0
) -> InputPerturbation:
    """The perturbation of a task.

    Args:
        declared: `{name, severity}`, or None for none.
        task: its name, for errors.
        takes: what of its requests can be perturbed.
        modality: of the data set's images; None where nothing says it.
        seed: of what is drawn at random.

    Raises:
        UserError: if the declaration is none, or has an unknown key, name or severity.
        UnfitPerturbation: if it does not fit the task.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"{task}: expected perturbation_seed to be a whole number from 0 on, but got {seed!r}.")
    if declared is None:
        return InputPerturbation()
    if not isinstance(declared, Mapping):
        raise UserError(
            f"{task}: expected perturbation to be a mapping such as {{name: gaussian_noise, severity: 3}}, "
            f"but got {declared!r}."
        )
    if "suite" in declared:
        raise UserError(
            f"{task}: takes one perturbation, with name and severity; suites are what the robustness tasks run: "
            f"{_SUITES}."
        )
    for key in declared:
        if key not in _KEYS:
            raise UserError(f"{task}: unknown key {key!r} in perturbation.{near_matches(str(key), _KEYS)}")
    name, severity = declared.get("name"), declared.get("severity")
    kind = _kind(name, task, takes)
    if kind == "image":
        if modality is None:
            raise UserError(f"{task}: expected `modality:` to say what kind of images {name} is for, such as chest.")
        return InputPerturbation(image=image_case(str(name), severity, modality=modality, seed=seed))
    case = text_case(str(name), severity, seed=seed)
    return InputPerturbation(report=case) if kind == "report" else InputPerturbation(prompt=case)


def image_case(name: str, severity: Any, *, modality: str, seed: int = 0) -> Case:
    """A corruption of images at one severity; None means the only one of those without degrees.

    Raises:
        UserError: if there is no such corruption or severity.
    """
    from medvlm_harness.perturbations.image import Case, find_corruption

    corruption = find_corruption(name, modality)
    return Case(corruption, _severity(corruption, severity), seed)


def text_case(name: str, severity: Any, *, seed: int = 0) -> TextCase:
    """A perturbation of texts at one severity; None means the only one of those without degrees.

    Raises:
        UserError: if there is no such perturbation or severity.
    """
    from medvlm_harness.perturbations.text import TextCase, find_text_perturbation

    perturbation = find_text_perturbation(name)
    return TextCase(perturbation, _severity(perturbation, severity), seed)


class PerturbedReports:
    """Studies with sections of their reports perturbed, each once.

    Args:
        case: what is done to each section by itself.
        sections: those that requests hold, by the names of `Study`.
    """

    def __init__(self, case: TextCase, sections: Sequence[str]) -> None:
        self.case, self.sections = case, tuple(sections)
        self._done: dict[str, dict[str, PerturbedText]] = {}

    def __call__(self, study: Study) -> Study:
        """The study as requests hold it."""
        texts: dict[str, Any] = {name: one.text for name, one in self._perturbed(study).items()}
        return replace(study, **texts)

    def counts(self, studies: Iterable[Study]) -> dict[str, Any]:
        """How many texts there are, the share that changed, and edits per text that the guard kept back."""
        done = [one for study in studies for one in self._perturbed(study).values()]
        return {
            "texts": len(done),
            "texts_changed": sum(one.changed for one in done) / len(done) if done else None,
            "edits_kept_back": sum(one.kept_back for one in done) / len(done) if done else None,
        }

    def _perturbed(self, study: Study) -> dict[str, PerturbedText]:
        if study.study_id not in self._done:
            texts = {name: getattr(study, name).strip() for name in self.sections}
            self._done[study.study_id] = {name: self.case(text) for name, text in texts.items() if text}
        return self._done[study.study_id]


def _kind(name: Any, task: str, takes: Collection[Perturbable]) -> Perturbable:
    """What a perturbation of this name is done to in a task."""
    from medvlm_harness.perturbations.image import CORRUPTIONS
    from medvlm_harness.perturbations.text import TEXT_PERTURBATIONS

    of: dict[str, tuple[Perturbable, ...]] = {one.name: ("image",) for one in CORRUPTIONS}
    of |= {one.name: one.of for one in TEXT_PERTURBATIONS}
    fitting = {known: kinds for known, kinds in of.items() if set(kinds).intersection(takes)}
    if not fitting:
        raise UnfitPerturbation(f"{task}: takes no perturbation: its truth holds for its inputs as they are.")
    if name not in of:
        raise UserError(f"{task}: no perturbation {name!r}.{near_matches(str(name), fitting)}")
    if name not in fitting:
        raise UnfitPerturbation(
            f"{task}: {name} is for {_in_words(of[name])}, but of this task only {_in_words(takes)} can be perturbed."
        )
    return next(kind for kind in fitting[name] if kind in takes)


def _in_words(kinds: Collection[Perturbable]) -> str:
    return " and ".join(words for kind, words in _IN_WORDS.items() if kind in kinds)


def _described(kind: str, declared: Corruption | TextPerturbation, case: Case | TextCase) -> dict[str, Any]:
    return {
        "name": declared.name,
        "severity": case.severity,
        "seed": case.seed,
        "of": kind,
        "control": declared.control,
        "identity": case.identity,
    }


def _severity(declared: Corruption | TextPerturbation, severity: Any) -> int:
    """A checked severity; 1 where there is no other and none was said."""
    levels = len(declared.levels)
    if severity is None and levels == 1:
        return 1
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= levels:
        expected = "1 alone (it has no degrees)" if levels == 1 else f"1 to {levels}"
        raise UserError(f"Severity of {declared.name}: expected {expected}, got {severity!r}.")
    return severity
