"""What a report labeler is, and how one is made by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.labelers.text import Sections
from medvlm_harness.plugin import load_target

__all__ = ["LABELERS", "Labeler", "compose_report", "labeler_from_text", "make_labeler"]

# Name -> where it is, so that spaCy or torch is imported only for the labeler that needs it.
LABELERS: Mapping[str, str] = {
    "rules": "medvlm_harness.labelers.rules:RulesLabeler",
    "chexbert": "medvlm_harness.labelers.chexbert:CheXbertLabeler",
}


class Labeler(Protocol):
    """Reads the text of one report.

    Labels of different labelers, or of different versions of one, are never mixed: results are keyed by both.
    """

    name: str
    version: str  # of rules and terms, or of weights; stands in every result that uses the labels
    sections: Sections  # what it reads of a report that has heads

    def label(self, text: str) -> dict[str, int | None]:
        """The fourteen observations of CheXpert: 1 positive, 0 negative, -1 uncertain, None unmentioned.

        Text with nothing to read gives None throughout, `No Finding` included: it is unlabelled, not normal.
        """


def make_labeler(name: str, **options: Any) -> Labeler:
    """A labeler by its name.

    Args:
        name: one of `LABELERS`.
        options: of that labeler; see its class.

    Raises:
        UserError: if there is no such labeler or option, or it cannot be loaded.
    """
    if name not in LABELERS:
        raise UserError(f"Expected the name of a labeler, but got {name!r}.{near_matches(name, LABELERS)}")
    factory = load_target(LABELERS[name])
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise UserError(f"The labeler {name} has no option {option!r}.{near_matches(option, known)}")
    labeler: Labeler = factory(**options)
    return labeler


def labeler_from_text(text: str) -> Labeler:
    """A labeler as a command line writes it: a name, then options, as in `rules,sections=findings`.

    Raises:
        UserError: if it is not of this form, or there is no such labeler.
    """
    name, *pairs = (part.strip() for part in text.split(","))
    options: dict[str, str] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not (equals and option.strip() and value.strip()):
            raise UserError(f"Expected NAME,option=value,... for a labeler, but got {pair!r} in {text!r}.")
        if option.strip() in options:
            raise UserError(f"Expected one value of {option.strip()} for a labeler, but got two in {text!r}.")
        options[option.strip()] = value.strip()
    return make_labeler(name, **options)


def compose_report(findings: str, impression: str, sections: Sections = "both") -> str:
    """A record's sections as one text with heads, for `Labeler.label`; empty where there is nothing to read.

    >>> compose_report("Clear lungs.", "", "both"), compose_report("Clear lungs.", "", "impression")
    ('FINDINGS: Clear lungs.', '')
    """
    bodies = {"findings": findings.strip(), "impression": impression.strip()}
    wanted = bodies if sections == "both" else (sections,)
    return "\n\n".join(f"{name.upper()}: {bodies[name]}" for name in wanted if bodies[name])
