"""Does a generated text say what its source does not support? Deterministic checks, each read against the human rate.

Radiologists infer, leave out and compare too, so no bare rate means anything: each check is computed for the model's
text and for the human reference of the same studies, and the difference, the lift, is the measure. Silence must not
win: omission and the recall of positive findings belong beside every other rate.

Not checked: severity, inference, truth of the source itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.data.subgroups import stated
from medvlm_harness.metrics._arrays import ratio_or_nan
from medvlm_harness.metrics._texts import words
from medvlm_harness.metrics.bootstrap import bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.laterality import (
    SidedMention,
    Sides,
    laterality_conflicts,
    laterality_version,
    mentioned_sides,
    sided_findings,
)
from medvlm_harness.metrics.measurements import measurements
from medvlm_harness.metrics.sentences import split_sentences

__all__ = [
    "CHECKS",
    "RECALLS",
    "CheckRates",
    "PairChecks",
    "Reading",
    "check_pair",
    "claims_prior",
    "contradictions",
    "critical_findings",
    "factuality_rates",
    "factuality_version",
    "is_cut_off",
    "is_repetitive",
    "omitted_findings",
    "sentence_words",
    "unsupported_findings",
]

CHECKS = (
    "contradiction",
    "unsupported_finding",
    "omission",
    "laterality_conflict",
    "prior_without_prior",
    "measurement_not_in_source",
    "repetition",
    "empty",
    "truncated",
)
"""Of each, lower is better."""
RECALLS = ("positive_recall", "critical_recall")
"""Of each, higher is better."""

Labels = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Reading:
    """A text and what a labeler found in it.

    Attributes:
        text: as it stands; "" where there is none.
        labels: CheXpert name -> 1, 0, -1 or None; without any, the checks that need labels are undefined (NaN).
        mentions: findings with status and side, by the labeler. None leaves the sides of both texts of a pair to our
            own parser, whose findings have other names.
    """

    text: str
    labels: Labels = field(default_factory=dict)
    mentions: Sequence[SidedMention] | None = None


class PairChecks(NamedTuple):
    """What the checks say about one text, given its source."""

    flags: Mapping[str, float]  # each of CHECKS: 1 flagged, 0 not, NaN where the question does not arise
    found: Mapping[str, tuple[int, int]]  # each of RECALLS: findings mentioned, of how many in the source


class CheckRates(NamedTuple):
    """A rate, the human reference's on the same studies, and the first minus the second."""

    model: Estimate
    reference: Estimate
    lift: Estimate


def check_pair(source: Reading, written: Reading, *, comparison: str = "", hit_limit: bool | None = None) -> PairChecks:
    """Every check of one written text (an impression) against its source (the findings).

    contradiction: a finding is positive in one and negative in the other.
    unsupported_finding: positive in the text, neither positive nor uncertain in the source.
    omission: positive in the source, not mentioned in the text. A summary selects: only the lift counts.
    laterality_conflict: the same finding on other sides; NaN unless both texts give a side to one finding.
    prior_without_prior: the text compares with an earlier study where the comparison field says that there is none, by
        data/subgroups.yaml; NaN where there is one, or nobody knows.
    measurement_not_in_source: a number with a unit that the source has not, compared in one unit.
    repetition, empty, truncated: of the text alone; see `is_repetitive` and `is_cut_off`.

    Args:
        source: what the text must be true to.
        written: the text, by a model or by the radiologist.
        comparison: the study's own comparison field; "" where it is empty or the data set has none: nobody knows.
        hit_limit: whether generation was stopped by its length limit; None where unknown.
    """
    labelled = bool(source.labels) and bool(written.labels)
    sides = _sides_of_both(source, written)
    no_prior = stated("comparison", comparison) == "none"
    flags = {
        "contradiction": bool(contradictions(source.labels, written.labels)) if labelled else None,
        "unsupported_finding": bool(unsupported_findings(source.labels, written.labels)) if labelled else None,
        "omission": bool(omitted_findings(source.labels, written.labels)) if labelled else None,
        "laterality_conflict": bool(laterality_conflicts(*sides)) if sides[0].keys() & sides[1].keys() else None,
        "prior_without_prior": bool(claims_prior(written.text)) if no_prior else None,
        "measurement_not_in_source": bool(measurements(written.text) - measurements(source.text)),
        "repetition": is_repetitive(written.text),
        "empty": not words(written.text),
        "truncated": is_cut_off(written.text, hit_limit=hit_limit),
    }
    positive = [name for name in CHEXPERT_13 if source.labels.get(name) == 1] if labelled else []
    mentioned = {name for name in positive if written.labels.get(name) in (1, -1)}
    critical = critical_findings().intersection(positive)
    return PairChecks(
        flags={name: float("nan") if flag is None else float(flag) for name, flag in flags.items()},
        found={
            "positive_recall": (len(mentioned), len(positive)),
            "critical_recall": (len(mentioned & critical), len(critical)),
        },
    )


def factuality_rates(
    model: Sequence[PairChecks],
    reference: Sequence[PairChecks],
    study_ids: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, CheckRates]:
    """Rate of each check and recall for model and human, and their difference, with intervals over the same studies.

    A rate is over the pairs where the question arises, a recall over the findings to be found (micro). `n` says over
    how many, `positives` how many are flagged or found.

    Args:
        model: of the model's texts, one per study, in one order.
        reference: of the human reference texts, likewise.
        study_ids: likewise.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    n = len(np.asarray(study_ids))
    if not len(model) == len(reference) == n:
        raise ValueError(f"Expected checks of the same studies, but got {len(model)}, {len(reference)} and {n}.")
    names = (*CHECKS, *RECALLS)
    # A flag counts as one of one, or none of none where it is undefined: all are then ratios of sums.
    parts = np.array([[[_ratio(pair, name) for name in names] for pair in side] for side in (model, reference)])
    parts = parts.reshape(2, n, len(names), 2)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        rates = []
        for side in parts:
            sums = np.tensordot(weights, side, axes=(1, 0))  # (resamples, names, 2)
            rates.append(ratio_or_nan(sums[..., 0], sums[..., 1]))
        return np.concatenate([*rates, rates[0] - rates[1]], axis=1)

    counts = parts.sum(axis=1).astype(int)  # (sides, names, 2)
    positives = [*counts[0, :, 0].tolist(), *counts[1, :, 0].tolist(), *[None] * len(names)]
    versions = {"factuality_version": factuality_version(), "laterality_version": laterality_version()}
    estimates = bootstrap_columns(
        statistic, study_ids, positives=positives, extras=[versions] * len(positives), resamples=resamples, seed=seed
    )
    over = [*counts[0, :, 1].tolist(), *counts[1, :, 1].tolist(), *[n] * len(names)]
    estimates = [replace(estimate, n=number) for estimate, number in zip(estimates, over, strict=True)]
    width = len(names)
    return {name: CheckRates(*estimates[column::width]) for column, name in enumerate(names)}


def contradictions(source: Labels, written: Labels) -> set[str]:
    """Findings that one text has and the other denies; `No Finding` is no finding."""
    return {name for name in CHEXPERT_13 if {source.get(name), written.get(name)} == {0, 1}}


def unsupported_findings(source: Labels, written: Labels) -> set[str]:
    """Findings that the text has and the source neither has nor suspects."""
    return {name for name in CHEXPERT_13 if written.get(name) == 1 and source.get(name) not in (1, -1)}


def omitted_findings(source: Labels, written: Labels) -> set[str]:
    """Findings that the source has and the text does not mention."""
    return {name for name in CHEXPERT_13 if source.get(name) == 1 and written.get(name) is None}


def critical_findings() -> frozenset[str]:
    """The findings that `critical_recall` is about, from factuality.yaml."""
    return _terms().critical


def claims_prior(text: str) -> list[str]:
    """The sentences that compare with an earlier study, by the strict list of factuality.yaml.

    >>> claims_prior("Stable cardiomegaly. No interval change. Comparison with prior films would be helpful.")
    ['No interval change.']
    """
    terms = _terms()
    return [
        sentence
        for sentence in split_sentences(text)
        if any(pattern.search(_plain(sentence)) for pattern in terms.prior_claims)
        and not any(pattern.search(_plain(sentence)) for pattern in terms.not_a_claim)
    ]


def is_repetitive(text: str) -> bool:
    """Whether a text says a sentence of three words or more twice, or loops.

    A loop is the same one or two words three times in a row, the same three to eight words twice in a row, or the same
    four words three times anywhere.
    """
    sentences = [sentence_words(sentence) for sentence in split_sentences(text)]
    if any(count > 1 for sentence, count in Counter(sentences).items() if len(sentence) >= 3):
        return True
    said = words(text)
    if any(count >= 3 for count in Counter(zip(said, said[1:], said[2:], said[3:], strict=False)).values()):
        return True
    return any(_repeats(said, length, times=3 if length < 3 else 2) for length in range(1, 9))


def sentence_words(sentence: str) -> tuple[str, ...]:
    """A sentence's words in lower case, without its number in a list: what tells whether it was said before."""
    return tuple(words(sentence.lstrip("(0123456789.) ")))


def is_cut_off(text: str, *, hit_limit: bool | None = None) -> bool:
    """Whether a text ends before its end: as generation says, else by its last word or mark.

    Args:
        text: an empty one is not cut off but empty.
        hit_limit: whether generation was stopped by its length limit. None where unknown: then a text is cut off if it
            ends in a comma, a hyphen or a word that nothing ends with ("of", "the").
    """
    if hit_limit is not None:
        return hit_limit
    ending = text.rstrip()
    if ending.endswith((",", "-", "–", "(", "/")):
        return True
    return ending[-1:].isalpha() and words(ending)[-1] in _terms().unfinished


def factuality_version() -> int:
    """Version of factuality.yaml, to stand beside every rate."""
    return _terms().version


def _sides_of_both(source: Reading, written: Reading) -> tuple[Sides, Sides]:
    if source.mentions is None or written.mentions is None:
        return sided_findings(source.text), sided_findings(written.text)
    return mentioned_sides(source.mentions), mentioned_sides(written.mentions)


def _ratio(pair: PairChecks, name: str) -> tuple[float, float]:
    if name in RECALLS:
        return pair.found[name]
    flag = pair.flags[name]
    return (0, 0) if np.isnan(flag) else (flag, 1)


def _repeats(said: Sequence[str], length: int, *, times: int) -> bool:
    """Whether some run of `length` words follows itself until it stands there `times` times."""
    equal = 0
    for place in range(length, len(said)):
        equal = equal + 1 if said[place] == said[place - length] else 0
        if equal == length * (times - 1):
            return True
    return False


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@dataclass(frozen=True, slots=True)
class _Terms:
    version: int
    critical: frozenset[str]
    prior_claims: tuple[re.Pattern[str], ...]
    not_a_claim: tuple[re.Pattern[str], ...]
    unfinished: frozenset[str]


@cache
def _terms() -> _Terms:
    raw = yaml.safe_load(files("medvlm_harness.metrics").joinpath("factuality.yaml").read_text(encoding="utf-8"))
    patterns = {key: _compiled(raw[key]) for key in ("prior_claims", "not_a_claim")}
    sets = {key: frozenset(raw[key]) for key in ("critical", "unfinished")}
    return _Terms(**raw | patterns | sets)


def _compiled(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(map(re.compile, patterns))
