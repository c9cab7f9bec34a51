"""Suites of text perturbations: of reports, and of the words that a label is asked by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.perturbations.text.base import TextCase, TextPerturbation
from medvlm_harness.perturbations.text.layout import CASE, PUNCTUATION, SENTENCE_ORDER, SPACING
from medvlm_harness.perturbations.text.paraphrase import prompt_variants
from medvlm_harness.perturbations.text.polarity import flip_label
from medvlm_harness.perturbations.text.terms import terms_version
from medvlm_harness.perturbations.text.words import ABBREVIATED_FINDINGS, SYNONYMS, TYPOS_IN_FINDINGS
from medvlm_harness.requests import Label

__all__ = ["FLIPPED", "WORDING", "Wording", "find_prompt_suite", "find_report_suite"]

WORDING, FLIPPED = "wording", "polarity_flip"
# One of each kind: slips, short forms, other words, layout, order. The full suite has every one whose text differs.
_REPORTS: Mapping[str, tuple[TextPerturbation, ...]] = {
    "quick": (TYPOS_IN_FINDINGS, ABBREVIATED_FINDINGS, SYNONYMS, CASE, SENTENCE_ORDER),
    "full": (TYPOS_IN_FINDINGS, ABBREVIATED_FINDINGS, SYNONYMS, CASE, SENTENCE_ORDER, PUNCTUATION, SPACING),
}
# Of wordings, how many; then perturbations of the phrases as they are, at these severities. Phrases are in lower case,
# which leaves upper case.
_PROMPTS: Mapping[str, tuple[int, Mapping[TextPerturbation, tuple[int, ...]]]] = {
    "quick": (5, {CASE: (2,), TYPOS_IN_FINDINGS: (1, 3)}),
    "full": (9, {CASE: (2,), TYPOS_IN_FINDINGS: (1, 2, 3), SYNONYMS: (1, 2, 3)}),
}


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask for a label otherwise; a label that has fewer other words starts over, one that has none stays."""

    group: str  # wording, polarity_flip, or the name of a text perturbation
    number: int  # of the wording, or the severity
    image: str  # what an image is called in prompts
    case: TextCase | None = None

    @property
    def name(self) -> str:
        """As in metric names."""
        return self.group if self.group == FLIPPED else f"{self.group}_{self.number}"

    @property
    def identity(self) -> str:
        """All that decides the result beside the label."""
        if self.case is not None:
            return self.case.identity
        return f"prompt:{self.name}@{terms_version()}" + (f":{self.image}" if self.group == WORDING else "")

    def __call__(self, label: Label) -> Label:
        """The label, asked for otherwise; its name stays.

        Raises:
            UserError: if it cannot be inverted where that is asked.
        """
        if self.group == FLIPPED:
            return flip_label(label)
        if self.case is None:
            variants = prompt_variants(label, image=self.image)
            return variants[(self.number - 1) % len(variants)] if variants else label
        positive, negative = (
            tuple(self.case(phrase).text for phrase in phrases) for phrases in (label.positive, label.negative)
        )
        return replace(label, positive=positive, negative=negative, question=self.case(label.question).text)


def find_report_suite(name: str, *, seed: int = 0) -> tuple[TextCase, ...]:
    """The cases of a suite of reports: quick or full.

    Raises:
        UserError: if there is no such suite.
    """
    _refuse_unknown(name, _REPORTS, "reports")
    return tuple(TextCase(one, k + 1, seed) for one in _REPORTS[name] for k in range(len(one.levels)))


def find_prompt_suite(name: str, *, image: str = "image", seed: int = 0) -> tuple[Wording, ...]:
    """The wordings of a suite of prompts: quick or full; without the inversion, which is a control.

    Args:
        name: of the suite.
        image: what an image is called in prompts, such as "chest x-ray".
        seed: of the perturbed phrases.

    Raises:
        UserError: if there is no such suite.
    """
    _refuse_unknown(name, _PROMPTS, "prompts")
    wordings, perturbations = _PROMPTS[name]
    cases = (TextCase(one, severity, seed) for one, severities in perturbations.items() for severity in severities)
    return (
        *(Wording(WORDING, k + 1, image) for k in range(wordings)),
        *(Wording(case.group, case.severity, image, case) for case in cases),
    )


def _refuse_unknown(name: str, suites: Mapping[str, object], what: str) -> None:
    if name not in suites:
        raise UserError(f"Unknown suite {name!r} of {what}.{near_matches(name, suites)}")
