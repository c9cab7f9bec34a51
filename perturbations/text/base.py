"""What a text perturbation is, and how it is carried out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from medvlm_harness.errors import UserError
from medvlm_harness.perturbations.text.guard import Edit, edited, kept, labeler_version
from medvlm_harness.perturbations.text.terms import terms_version

__all__ = ["Level", "PerturbedText", "TextCase", "TextPerturbation", "perturb_text"]

Level = float | str


class PerturbedText(NamedTuple):
    """A perturbed text."""

    text: str
    changed: bool
    kept_back: int  # edits that the guard did not let through


@dataclass(frozen=True, slots=True)
class TextPerturbation:
    """One way to say the same otherwise; a control says the opposite.

    `apply` gives the edits that it would make at a level; it draws from the generator alone. Severity 1 is the first
    level, severity 0 the text as it is.
    """

    name: str
    of: tuple[Literal["report", "prompt"], ...]  # prompts: questions and instructions
    levels: tuple[Level, ...]
    apply: Callable[[str, Level, np.random.Generator], Sequence[Edit]]
    says: str
    control: bool = False
    read: Callable[[str], str] = str  # what the guard's labeler reads of a text: by default the text itself
    source: str = "written for this package"

    def identity(self, severity: int, *, seed: int = 0) -> str:
        """Everything beside the text that decides the result, for the store's key: words, code and labeler too."""
        _level(self, severity)
        return f"text:{self.name}:{severity}:{seed}@{terms_version()}:{labeler_version()}"


@dataclass(frozen=True, slots=True)
class TextCase:
    """A perturbation at one severity."""

    perturbation: TextPerturbation
    severity: int
    seed: int = 0

    @property
    def group(self) -> str:
        """The perturbation's name."""
        return self.perturbation.name

    @property
    def name(self) -> str:
        """As in metric names; without the severity where there is but one."""
        return self.group if len(self.perturbation.levels) == 1 else f"{self.group}_{self.severity}"

    @property
    def identity(self) -> str:
        """All that decides the result beside the text."""
        return self.perturbation.identity(self.severity, seed=self.seed)

    def __call__(self, text: str) -> PerturbedText:
        """The perturbed text; see `perturb_text`."""
        return perturb_text(text, self.perturbation, self.severity, seed=self.seed)


def perturb_text(text: str, perturbation: TextPerturbation, severity: int, *, seed: int = 0) -> PerturbedText:
    """The text perturbed, as far as negation, sides and labels stay as they are (in a control: as labels invert).

    The result depends on the text, the perturbation's name, severity and seed alone, not on what was perturbed before.

    Raises:
        UserError: if the perturbation has no such severity.
    """
    level = _level(perturbation, severity)
    if level is None:
        return PerturbedText(text, False, 0)
    key = f"{perturbation.name}\0{severity}\0{seed}\0{text}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16]))
    edits = [edit for edit in perturbation.apply(text, level, rng) if text[edit.start : edit.end] != edit.new]
    made = kept(text, edits, invert=perturbation.control, read=perturbation.read)
    new = edited(text, made)
    return PerturbedText(new, new != text, len(edits) - len(made))


def _level(perturbation: TextPerturbation, severity: int) -> Level | None:
    """The level of a severity; None for 0."""
    if severity not in range(len(perturbation.levels) + 1):
        raise UserError(
            f"Expected a severity of {perturbation.name} from 0 (unchanged) to {len(perturbation.levels)}, "
            f"but got {severity!r}."
        )
    return perturbation.levels[severity - 1] if severity else None
