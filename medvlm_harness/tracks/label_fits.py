"""What is fitted for each label on validation, and held fixed on all else: scalings and decision thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics.operating_points import Threshold, choose_thresholds
from medvlm_harness.metrics.scaling import Method, Scaling, fit_scaling
from medvlm_harness.metrics.selective import Acceptance, binary_decisions, coverage_at_sensitivity

__all__ = ["ACCEPTED", "NO_FINDING", "POINTS", "LabelFits", "LabelItems", "fit_labels"]

Array = NDArray[np.float64]
POINTS = ("youden", "sensitivity_90")
ACCEPTED = "sensitivity_90"  # what answers are accepted for; it asks the same of validation's support
NO_FINDING = "no_finding"
Fit = TypeVar("Fit", Scaling, Threshold)


@dataclass(frozen=True)
class LabelItems:
    """Truth and scores of some inputs, in the order of the labels.

    Attributes:
        truth: 1, 0, or NaN where unlabelled, shape (n, labels).
        margin: scores that rank, proportional to log-odds, shape (n, labels); a column of NaN where a label has none,
            whose truth is then NaN too.
        probability: on the scale that the model's card names, shape (n, labels); likewise.
        studies: the study of each input, (n,).
        no_finding: truth and score of No Finding, each (n,); None where it is not asked for.
    """

    truth: Array
    margin: Array
    probability: Array
    studies: NDArray[np.str_]
    no_finding: tuple[Array, Array] | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def take(self, mask: NDArray[np.bool_]) -> LabelItems:
        """Those of a mask (n,)."""
        derived = self.no_finding and (self.no_finding[0][mask], self.no_finding[1][mask])
        return LabelItems(self.truth[mask], self.margin[mask], self.probability[mask], self.studies[mask], derived)


@dataclass(frozen=True)
class LabelFits:
    """What was fitted, by label; each says why where nothing could be.

    Attributes:
        items: validation inputs that were fitted on.
        studies: of these.
        scalings: margins to probabilities.
        thresholds: operating point (see `POINTS`) -> label -> margin from which on it is called present.
        acceptances: least confidence of answers, for a sensitivity of 0.9 among them.
        no_finding: threshold of No Finding, by Youden; None where it is not asked for.
        reason: why nothing at all could be fitted.
    """

    items: int
    studies: int
    scalings: Mapping[str, Scaling]
    thresholds: Mapping[str, Mapping[str, Threshold]]
    acceptances: Mapping[str, Acceptance]
    no_finding: Threshold | None
    reason: str | None = None


def fit_labels(
    validation: LabelItems,
    *,
    keys: Sequence[str],
    scaling: Method,
    without: str | None = None,
    reasons: Sequence[str | None] | None = None,
) -> LabelFits:
    """Fit all on validation items.

    Args:
        validation: may be empty.
        keys: the labels' names, (labels,).
        scaling: how margins are scaled.
        without: why validation is empty, where it is.
        reasons: why a label has no scores, None for those that have, (labels,).
    """
    truth, margin = validation.truth, validation.margin
    why = [without or reason for reason in reasons or [None] * len(keys)]
    scalings = _because(fit_scaling(truth, margin, keys=keys, method=scaling), why)
    thresholds = {point: _because(choose_thresholds(truth, margin, keys=keys, point=point), why) for point in POINTS}
    acceptances = {
        key: Acceptance(np.nan, np.nan, np.nan)
        if thresholds[ACCEPTED][key].reason
        else _acceptance(truth[:, j], validation.probability[:, j])
        for j, key in enumerate(keys)
    }
    no_finding = None
    if validation.no_finding is not None:
        of_none, score = (one.reshape(-1, 1) for one in validation.no_finding)
        no_finding = choose_thresholds(of_none, score, keys=[NO_FINDING], point="youden")[NO_FINDING]
        no_finding = replace(no_finding, reason=without) if without else no_finding
    studies = len(np.unique(validation.studies))
    return LabelFits(len(validation), studies, scalings, thresholds, acceptances, no_finding, without)


def _because(fits: Mapping[str, Fit], why: Sequence[str | None]) -> dict[str, Fit]:
    """With the reason that says more than empty counts do."""
    return {
        key: replace(one, reason=reason) if reason else one
        for (key, one), reason in zip(fits.items(), why, strict=True)
    }


def _acceptance(truth: Array, probability: Array) -> Acceptance:
    """From validation items of one label."""
    known = ~np.isnan(truth)
    _, confidence = binary_decisions(truth[known], probability[known])
    return coverage_at_sensitivity(truth[known], probability[known] >= 0.5, confidence, sensitivity=0.9)
