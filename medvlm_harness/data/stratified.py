"""A fixed subset of studies that keeps the labels' positives: for evaluations that ask about each study many times."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medvlm_harness.errors import UserError

__all__ = ["LabelSupport", "StratifiedStudies", "stratified_studies"]


@dataclass(frozen=True, slots=True)
class LabelSupport:
    """Positive and negative studies of one label, of all and of the chosen."""

    positives: int
    negatives: int
    chosen_positives: int
    chosen_negatives: int


@dataclass(frozen=True, slots=True)
class StratifiedStudies:
    """The chosen studies, and what the choice did to the labels' prevalence."""

    study_ids: frozenset[str]
    labels: Mapping[str, LabelSupport]


def stratified_studies(
    study_ids: Sequence[str],
    labels: Sequence[Sequence[int | None]] = (),
    *,
    keys: Sequence[str] = (),
    n: int = 300,
    seed: int = 0,
) -> StratifiedStudies:
    """Choose n studies; each label keeps its positives, up to n // 10 of them.

    Labels take their positives in turn, the rarest first, then all other studies fill up; always in the order of a
    hash of seed and study id. So the choice depends on neither the order nor the number of runs, only on ids, labels, n
    and seed. Should labels be so many that the places run out, the most frequent go short: see `labels`.

    Rare labels end up more prevalent than in the split. AUROC does not depend on prevalence, though the negatives of
    one label then hold more of the other findings; average precision, PPV, calibration and the like do. They compare
    with other results on these studies only.

    Args:
        study_ids: all different, (all,).
        labels: 1, 0, or None where unlabelled, of each study, (all, labels); nothing where there are no labels.
        keys: the labels' names, (labels,).
        n: how many; all are taken where there are not more.
        seed: another seed chooses others.

    Raises:
        UserError: if n is below 1.
        ValueError: if ids repeat or shapes differ.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"Expected a number of studies of at least 1, but got {n!r}.")
    rows = list(labels) if keys else [()] * len(study_ids)
    if len(rows) != len(study_ids) or any(len(row) != len(keys) for row in rows):
        raise ValueError(f"Expected {len(keys)} labels of each of {len(study_ids)} studies, but got other shapes.")
    if len(set(study_ids)) < len(study_ids):
        raise ValueError("Expected study ids that differ, but some repeat.")
    ordered = sorted(study_ids, key=lambda one: (hashlib.sha256(f"{seed}:{one}".encode()).digest(), one))
    row_of = dict(zip(study_ids, rows, strict=True))
    positive = {key: [one for one in ordered if row_of[one][j] == 1] for j, key in enumerate(keys)}
    chosen: set[str] = set()
    for key in sorted(keys, key=lambda key: (len(positive[key]), key)):
        wanted = n // 10 - len(chosen.intersection(positive[key]))
        chosen.update([one for one in positive[key] if one not in chosen][: max(0, min(wanted, n - len(chosen)))])
    chosen.update([one for one in ordered if one not in chosen][: n - len(chosen)])
    return StratifiedStudies(
        frozenset(chosen),
        {
            key: LabelSupport(
                *(sum(row_of[one][j] == value for one in ids) for ids in (study_ids, chosen) for value in (1, 0))
            )
            for j, key in enumerate(keys)
        },
    )
