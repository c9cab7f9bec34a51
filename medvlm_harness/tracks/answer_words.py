"""The words by which models say what they list: names of keys, statuses, and what denies or hedges a finding."""

from __future__ import annotations

from typing import Literal

__all__ = [
    "DETAIL_KEYS",
    "HEADER_WORDS",
    "LEADS",
    "LONGEST_LEAD",
    "LONGEST_TAIL",
    "NAME_KEYS",
    "NEGATION_KEYS",
    "NOTHING",
    "STATUS_KEYS",
    "TAILS",
    "Status",
    "status_of",
]

Status = Literal["present", "absent", "uncertain"]

_STATUSES: dict[Status, str] = {
    # CheXpert's 1, 0 and -1 and RadGraph's labels among them.
    "present": "present, positive, yes, true, 1, definite, definitely present, certain, confirmed, seen, observed, "
    "found, identified, noted, detected, is present, obs dp, anat dp, pos, +",
    "absent": "absent, negative, no, false, 0, not present, definitely absent, not seen, not observed, not found, "
    "not identified, not noted, not detected, none, denied, ruled out, excluded, is absent, obs da, neg, -",
    "uncertain": "uncertain, possible, possibly, probable, probably, likely, maybe, equivocal, indeterminate, "
    "questionable, unclear, suspected, suspicious, cannot be excluded, cannot exclude, not excluded, unsure, "
    "is uncertain, obs u, -1, ?",
}
_STATUS = {word.strip(): status for status, words in _STATUSES.items() for word in words.split(",")}

NAME_KEYS = frozenset(
    {"finding", "entity", "name", "observation", "phrase", "term", "text", "token", "tokens", "condition",
     "abnormality", "disease", "diagnosis", "description", "item", "sign"}
)  # fmt: skip
DETAIL_KEYS = frozenset(
    {"location", "site", "side", "laterality", "anatomy", "region", "severity", "size", "modifier", "attribute",
     "descriptor"}
)  # fmt: skip
"""Keys whose text describes the finding further."""
STATUS_KEYS = frozenset({"status", "presence", "assertion", "certainty", "state", "polarity", "value", "result"})
NEGATION_KEYS = frozenset({"negated", "negation", "is negated", "negative finding"})
HEADER_WORDS = frozenset(
    {"finding", "findings", "entity", "entities", "observation", "observations", "abnormality", "abnormalities",
     "result", "results", "list", "items", "item", "answer", "output", "response", "condition", "conditions", "name",
     "status", "json", "report", "impression", "diagnosis", "diagnoses", "the", "definitely", "all", "and", "of"}
)  # fmt: skip
"""Words of headings and tables' first rows, and of keys that hold a list rather than name a finding."""
NOTHING = frozenset(
    {"none", "nothing", "no findings", "no finding", "n/a", "na", "null", "empty", "not applicable", "none found",
     "no entities", "no abnormal findings", "no abnormalities", "no abnormality", "no findings found"}
)  # fmt: skip
"""Answers that say that there is nothing to list."""

_VERBS = ("", "is", "are", "was", "were")


def _phrases(texts: str) -> list[tuple[str, ...]]:
    return [tuple(text.split()) for text in texts.split(",")]


LEADS: dict[tuple[str, ...], Status] = {
    **dict.fromkeys(
        _phrases("no, no evidence of, no evidence for, no sign of, no signs of, without, without evidence of, "
                 "absence of, absent, absent for, negative for, there is no, there are no, there is no evidence of, "
                 "denies, not"),
        "absent",
    ),
    **dict.fromkeys(
        _phrases("possible, possibly, probable, probably, likely, questionable, suspected, suspicious for, "
                 "suspicion of, concern for, concerning for, cannot exclude, equivocal, uncertain, may represent, "
                 "could represent"),
        "uncertain",
    ),
    **dict.fromkeys(
        _phrases("present, presence of, positive for, there is, there are, evidence of, a, an, any, the"), "present"
    ),
}  # fmt: skip
"""What stands before a finding -> what it says; the longest that fits."""
TAILS: dict[tuple[str, ...], Status] = {
    tuple(f"{verb} {tail}".split()): status
    for verb in _VERBS
    for status, tails in {
        "present": ("present", "seen", "noted", "identified", "observed"),
        "absent": ("absent", "not present", "not seen", "not noted", "not identified", "not observed", "ruled out"),
        "uncertain": ("uncertain", "possible", "not excluded"),
    }.items()
    for tail in tails
} | {("cannot", "be", "excluded"): "uncertain"}  # type: ignore[assignment]
LONGEST_LEAD, LONGEST_TAIL = (max(map(len, phrases)) for phrases in (LEADS, TAILS))


def status_of(text: str) -> Status | None:
    """The status that a text names and nothing else, None where it names none.

    >>> status_of("Definitely absent"), status_of("Observation::uncertain"), status_of("OBS-DP"), status_of("large")
    ('absent', 'uncertain', 'present', None)
    """
    plain = text.rpartition("::")[2].strip(" \t\r\n\"'`*_.,;:!()[]").lower()
    if len(plain) > 40:
        return None
    return _STATUS.get(plain) or _STATUS.get(" ".join(plain.replace("_", " ").replace("-", " ").split()))
