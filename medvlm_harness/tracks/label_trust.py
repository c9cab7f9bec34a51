"""How far the scores of independent labels can be trusted, with intervals over studies.

Calibration, selective prediction, operating points, rare findings and subgroups. What is fitted comes from validation
(`label_fits`), and is evaluated on other studies alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics.calibration import calibration_estimates
from medvlm_harness.metrics.estimate import Estimate, plain
from medvlm_harness.metrics.frequency_groups import frequency_group, frequency_group_estimates, frequency_group_names
from medvlm_harness.metrics.operating_points import operating_point_estimates
from medvlm_harness.metrics.scaling import scaled
from medvlm_harness.metrics.selective import binary_decisions, risk_coverage, selective_estimates
from medvlm_harness.metrics.subgroups import GAPS, LabelSubgroups, Subgroup, Subgroups, label_subgroup_estimates
from medvlm_harness.tracks.label_fits import ACCEPTED, NO_FINDING, POINTS, LabelFits, LabelItems

__all__ = ["CALIBRATION", "LabelTrust", "is_lower_better", "label_trust", "risk_coverage_points", "trust_names"]

Array = NDArray[np.float64]
CALIBRATION = ("brier", "brier_skill", "ece", "ece_equal_mass")
SELECTIVE = ("aurc", "excess_aurc")
ACCEPTING = {"coverage": f"coverage_at_{ACCEPTED}", "accepted_sensitivity": f"accepted_{ACCEPTED}"}
AT_POINTS = (
    *("sensitivity_at_youden", "specificity_at_youden", "f1_at_youden"),
    *("specificity_at_sensitivity_90", "sensitivity_at_sensitivity_90"),
)
CURVE_POINTS = 50
LOWER = ("brier", "ece", "aurc", "excess_aurc")


@dataclass(frozen=True)
class LabelTrust:
    """The estimates by `trust_names`, and what the results file says beside them: per label, as plain JSON."""

    estimates: dict[str, Estimate]
    details: dict[str, Any]


def trust_names(attributes: Sequence[str], *, no_finding: bool) -> tuple[str, ...]:
    """The metrics, means over labels.

    Args:
        attributes: what subgroups are of, such as "sex".
        no_finding: whether No Finding is derived.

    >>> trust_names(["sex"], no_finding=True)[-2:]
    ('equalized_odds_difference_sex', 'underdiagnosis_gap_sex')
    """
    return (
        *CALIBRATION,
        *(f"{name}_scaled" for name in CALIBRATION),
        *SELECTIVE,
        *ACCEPTING.values(),
        *AT_POINTS,
        *frequency_group_names(),
        *(name for attribute in attributes for name in _gap_names(attribute, no_finding)),
    )


def _gap_names(attribute: str, no_finding: bool) -> list[str]:
    gaps = (*GAPS, "underdiagnosis_gap") if no_finding else GAPS
    return [f"{gap}_{attribute}" for gap in gaps]


def is_lower_better(name: str) -> bool:
    """Whether less of one of these metrics is better."""
    return "_gap_" in name or (name.startswith((*LOWER, "equalized_odds")) and not name.startswith("brier_skill"))


def label_trust(
    scored: LabelItems,
    judged: LabelItems,
    fits: LabelFits,
    *,
    keys: Sequence[str],
    groups: Mapping[str, tuple[Sequence[str | None], Sequence[str | None]]],
    frequency: Sequence[float] | None,
    reasons: Sequence[str | None] | None = None,
) -> LabelTrust:
    """All of it.

    Args:
        scored: what metrics are of.
        judged: the same object, or the part of it that nothing was fitted on.
        fits: from validation.
        keys: the labels' names, (labels,).
        groups: attribute -> the subgroup of each input, of `scored` and of `judged`.
        frequency: of each label in the train split, (labels,); None: that among what is scored.
        reasons: why a label has no scores, None for those that have, (labels,).
    """
    return _LabelTrust(scored, judged, fits, keys, groups, frequency, reasons or [None] * len(keys)).all()


class _LabelTrust:
    """The parts; each gives the means over labels, and its details."""

    def __init__(
        self,
        scored: LabelItems,
        judged: LabelItems,
        fits: LabelFits,
        keys: Sequence[str],
        groups: Mapping[str, tuple[Sequence[str | None], Sequence[str | None]]],
        frequency: Sequence[float] | None,
        reasons: Sequence[str | None],
    ) -> None:
        self.scored, self.judged, self.fits, self.keys = scored, judged, fits, list(keys)
        self.groups, self.frequency, self.reasons = groups, frequency, reasons
        # Why nothing that was fitted can be evaluated.
        self.unfitted = fits.reason or (None if len(judged) else "nothing is scored outside of what was fitted on")

    def all(self) -> LabelTrust:
        parts = [self._calibration(), self._selective(), self._operating_points(), self._frequency(), self._subgroups()]
        found = {name: estimate for estimates, _ in parts for name, estimate in estimates.items()}
        names = trust_names(list(self.groups), no_finding=self.scored.no_finding is not None)
        details: dict[str, Any] = {key: value for _, its in parts for key, value in its.items()}
        return LabelTrust({name: found[name] for name in names}, details)

    def _fitted(self, names: Sequence[str], compute: Callable[[], Mapping[str, Estimate]]) -> dict[str, Estimate]:
        """What stands on a fit; with the reason where there is none. `names` are the means that are there at least."""
        if self.unfitted is None:
            return dict(compute())
        return dict.fromkeys(names, Estimate.undefined(self.unfitted, n=len(self.judged)))

    def _calibration(self) -> tuple[dict[str, Estimate], dict[str, Any]]:
        scored, judged, scalings = self.scored, self.judged, list(self.fits.scalings.values())
        stated = calibration_estimates(
            scored.truth, scored.probability, scored.studies, keys=self.keys, reasons=self.reasons
        )
        after = self._fitted(
            CALIBRATION,
            lambda: calibration_estimates(
                judged.truth,
                scaled(judged.margin, scalings),
                judged.studies,
                keys=self.keys,
                reasons=[one.reason for one in scalings],
            ),
        )
        means = {name: stated[name] for name in CALIBRATION}
        means |= {f"{name}_scaled": after[name] for name in CALIBRATION}
        details = {
            key: {
                **{name: stated[f"{name}_{key}"].to_dict() for name in CALIBRATION},
                "scaling": plain(asdict(self.fits.scalings[key])),
                "scaled": {name: after[f"{name}_{key}"].to_dict() for name in CALIBRATION if f"{name}_{key}" in after},
            }
            for key in self.keys
        }
        return means, {"calibration": details}

    def _selective(self) -> tuple[dict[str, Estimate], dict[str, Any]]:
        fits, same = self.fits, self.judged is self.scored and self.unfitted is None
        least = [fits.acceptances[key].threshold for key in self.keys]
        why = [fits.thresholds[ACCEPTED][key].reason for key in self.keys]

        def accepting(items: LabelItems) -> dict[str, Estimate]:
            return selective_estimates(
                items.truth, items.probability, items.studies, keys=self.keys, thresholds=least, reasons=why
            )

        if same:
            found = accepting(self.scored)
        else:
            scored = self.scored
            found = self._fitted(list(ACCEPTING), lambda: accepting(self.judged)) | selective_estimates(
                scored.truth, scored.probability, scored.studies, keys=self.keys, reasons=self.reasons
            )
        means = {name: found[name] for name in SELECTIVE}
        means |= {new: self._not_reached(found[name]) for name, new in ACCEPTING.items()}
        details = {
            key: {
                **{
                    name: found[f"{name}_{key}"].to_dict()
                    for name in (*SELECTIVE, *ACCEPTING)
                    if f"{name}_{key}" in found
                },
                "threshold": plain(fits.acceptances[key]._asdict()),
                "curve": self._curve(j),
            }
            for j, key in enumerate(self.keys)
        }
        return means, {"selective": details}

    def _not_reached(self, mean: Estimate) -> Estimate:
        """Says of how many labels no answer is accepted, because no confidence is enough on validation."""
        never = sum(np.isinf(self.fits.acceptances[key].threshold) for key in self.keys)
        if self.unfitted is not None or not never:
            return mean
        return replace(mean, reason=f"labels out of reach on validation: {never}")

    def _curve(self, label: int) -> dict[str, list[float]] | None:
        """Risk at some coverages."""
        error, confidence = binary_decisions(self.scored.truth[:, label], self.scored.probability[:, label])
        known = ~np.isnan(error)
        return risk_coverage_points(error[known], confidence[known]) if known.any() else None

    def _operating_points(self) -> tuple[dict[str, Estimate], dict[str, Any]]:
        judged = self.judged
        means: dict[str, Estimate] = {}
        details: dict[str, Any] = {}
        for point in POINTS:
            thresholds = self.fits.thresholds[point]
            compute = partial(operating_point_estimates, thresholds=thresholds, point=point)
            found = self._fitted(AT_POINTS, partial(compute, judged.truth, judged.margin, judged.studies))
            means |= {name: found[name] for name in AT_POINTS if name in found}
            details[point] = {
                key: {
                    "threshold": plain(asdict(thresholds[key])),
                    **{
                        name.removesuffix(f"_at_{point}_{key}"): estimate.to_dict()
                        for name, estimate in found.items()
                        if name.endswith(f"_at_{point}_{key}")
                    },
                }
                for key in self.keys
            }
        if self.fits.no_finding is not None:
            details["youden"][NO_FINDING] = {"threshold": plain(asdict(self.fits.no_finding))}
        return means, {"operating_points": details}

    def _frequency(self) -> tuple[dict[str, Estimate], dict[str, Any]]:
        known = np.maximum((~np.isnan(self.scored.truth)).sum(axis=0), 1)
        of_scored: list[float] = ((self.scored.truth == 1).sum(axis=0) / known).tolist()
        frequency = of_scored if self.frequency is None else list(self.frequency)

        def grouped(items: LabelItems) -> dict[str, Estimate]:
            thresholds = [one.value for one in self.fits.thresholds["youden"].values()]
            return frequency_group_estimates(
                items.truth, items.margin, items.studies, keys=self.keys, thresholds=thresholds, frequency=frequency
            )

        means = grouped(self.scored)
        sensitivity = [name for name in frequency_group_names() if name.startswith("sensitivity")]
        if self.unfitted is not None or self.judged is not self.scored:
            judged = self._fitted(sensitivity, lambda: grouped(self.judged))
            means |= {name: judged[name] for name in sensitivity}
        source = "the train split" if self.frequency is not None else "what is scored"
        details = {
            "from": source,
            "labels": {
                key: {"frequency": one, "group": frequency_group(one)}
                for key, one in zip(self.keys, frequency, strict=True)
            },
        }
        return {k: replace(v, extra={**v.extra, "frequency": source}) for k, v in means.items()}, {
            "label_frequency": details
        }

    def _subgroups(self) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """On what nothing was fitted on; where there is no threshold, AUROC on all that is scored."""
        fits, items = self.fits, self.judged if self.unfitted is None else self.scored
        thresholds = [fits.thresholds["youden"][key] for key in self.keys]
        keys, truth, score = self.keys, items.truth, items.margin
        if items.no_finding is not None and fits.no_finding is not None:
            keys, thresholds = [*keys, NO_FINDING], [*thresholds, fits.no_finding]
            truth, score = (
                np.column_stack([labels, derived])
                for labels, derived in zip((truth, score), items.no_finding, strict=True)
            )
        usable = self.unfitted is None
        means: dict[str, Estimate] = {}
        details: dict[str, Any] = {}
        for attribute, both in self.groups.items():
            groups = both[1] if usable else both[0]
            if all(group is None for group in groups):
                nothing = Estimate.undefined(f"{attribute} is not known of any input", n=len(items))
                means |= dict.fromkeys(_gap_names(attribute, no_finding=True), nothing)
                details[attribute] = {}
                continue
            found = label_subgroup_estimates(
                truth,
                score,
                groups,
                items.studies,
                keys=keys,
                thresholds=[one.value if usable else np.nan for one in thresholds],
                reasons=[self.unfitted or one.reason for one in thresholds],
                averaged=self.keys,
            )
            means |= _gaps(found, attribute, len(items))
            details[attribute] = {key: _subgroup_details(its) for key, its in found.labels.items()}
        return means, {"subgroups": details}


def risk_coverage_points(error: Array, confidence: Array) -> dict[str, list[float]]:
    """The risk-coverage curve at up to 50 coverages that lie evenly; arguments as for `risk_coverage`."""
    curve = risk_coverage(error, confidence)
    places = np.unique(np.linspace(0, len(curve.risk) - 1, CURVE_POINTS).round().astype(int))
    return {"coverage": curve.coverage[places].tolist(), "risk": curve.risk[places].tolist()}


def _gaps(found: LabelSubgroups, attribute: str, n: int) -> dict[str, Estimate]:
    """The means over labels, and the underdiagnosis gap: that of the false positive rates of No Finding.

    Its n is that of all inputs, for the same reason as below.
    """
    gaps = {f"{gap}_{attribute}": estimate for gap, estimate in found.gaps.items()}
    if NO_FINDING in found.labels:
        gaps[f"underdiagnosis_gap_{attribute}"] = replace(found.labels[NO_FINDING].gaps["fpr_gap"], n=n)
    return gaps


def _subgroup_details(found: Subgroups) -> dict[str, Any]:
    """Where the counts of one subgroup are not shown, none are: totals stand elsewhere in the results."""
    hidden = any(group.n is None for group in found.groups)
    groups = {group.name: _one_subgroup(group, hidden) for group in found.groups}
    gaps = {name: _shown(estimate, hidden) for name, estimate in found.gaps.items() if not np.isnan(estimate.value)}
    return {"groups": groups, "gaps": gaps}


def _one_subgroup(group: Subgroup, hidden: bool) -> dict[str, Any]:
    n, positives = (None, None) if hidden else (group.n, group.positives)
    counts = {"n": n, "positives": positives, "prevalence": positives / n if n and positives is not None else None}
    rates = {"auroc": group.auroc, "fpr": group.fpr, "fnr": group.fnr}
    if np.isnan(group.auroc.value):
        return {**counts, "reason": group.auroc.reason}
    return {**counts, **{name: _shown(estimate, hidden) for name, estimate in rates.items()}}


def _shown(estimate: Estimate, hidden: bool) -> dict[str, Any]:
    if not hidden:
        return estimate.to_dict()
    counted = {"n": None, "positives": None, "method": "not shown: it tells counts"}
    extra = {key: value for key, value in estimate.to_dict()["extra"].items() if key != "prevalence"}
    return {**estimate.to_dict(), **counted, "extra": extra}
