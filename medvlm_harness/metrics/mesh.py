"""Findings of a model or labeler against the codes that human indexers gave each report of Open-i (MeSH).

The human annotation of IU-CXR. Two questions: CheXpert's observations (`mesh_label_estimates`, by the rules of
data/mesh_chexpert.yaml), and findings named in words (`mesh_f1_estimates`, by mesh_findings.yaml beside this file).
Coders index what is there and worth indexing, so precision also counts true findings that they passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.labels import coded_terms, mesh_labels
from medvlm_harness.metrics._texts import words
from medvlm_harness.metrics.bootstrap import bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.label_f1 import UncertainPolicy, label_f1_estimates, label_matrix
from medvlm_harness.metrics.matches import (
    count_matches,
    weighted_micro_f1,
    weighted_micro_precision,
    weighted_micro_recall,
)
from medvlm_harness.metrics.radgraph import Entities

__all__ = [
    "coded_finding_labels",
    "coded_findings",
    "described_findings",
    "entity_phrases",
    "finding_names",
    "mesh_f1_estimates",
    "mesh_findings_version",
    "mesh_headings",
    "mesh_label_estimates",
]


def mesh_label_estimates(
    labels: Sequence[Mapping[str, int | None]],
    terms: Sequence[Sequence[str]],
    study_ids: Sequence[str],
    *,
    names: Sequence[str] = CHEXPERT_14,
    uncertain: UncertainPolicy = "ignore",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """`label_f1_estimates` of predicted CheXpert labels against the coders', over the studies that were coded.

    Args:
        labels: name -> 1, 0, -1 or None per study, as a labeler gives them.
        terms: the MeSH terms of the same studies.
        study_ids: likewise.
        names: of the labels to compare.
        uncertain: by default what the mapping of codes leaves open is left out; see `label_f1`.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    _check_lengths(labels, terms, study_ids)
    coded = [(place, known) for place, known in enumerate(map(mesh_labels, terms)) if known is not None]
    return label_f1_estimates(
        label_matrix([known for _, known in coded], names),
        label_matrix([labels[place] for place, _ in coded], names),
        [study_ids[place] for place, _ in coded],
        names=names,
        uncertain=uncertain,
        resamples=resamples,
        seed=seed,
    )


def mesh_f1_estimates(
    phrases: Sequence[Iterable[str]],
    terms: Sequence[Sequence[str]],
    study_ids: Sequence[str],
    *,
    floors: Mapping[str, float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Micro `mesh_f1`, `mesh_precision` and `mesh_recall` of described findings, over the studies that were coded.

    A study coded normal, and of which nothing was described, adds to no count: these scores are about findings.

    Args:
        phrases: per study, what was found, each with its own words ("left pleural effusion"; see `entity_phrases`).
            Only what is present belongs here: negation is not looked for.
        terms: the MeSH terms of the same studies.
        study_ids: likewise.
        floors: what a constant scores, by key.
        resamples: number of resamples.
        seed: the same for all that is to be compared.
    """
    _check_lengths(phrases, terms, study_ids)
    coded = [(place, known) for place, known in enumerate(map(coded_findings, terms)) if known is not None]
    counts = count_matches((described_findings(phrases[place]), known) for place, known in coded)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        metrics = (weighted_micro_f1, weighted_micro_precision, weighted_micro_recall)
        return np.column_stack([metric(counts, weights) for metric in metrics])

    keys = ("mesh_f1", "mesh_precision", "mesh_recall")
    estimates = bootstrap_columns(
        statistic,
        np.array([study_ids[place] for place, _ in coded], dtype=np.str_),
        positives=[int(counts.annotated.sum())] * len(keys),
        floors=[(floors or {}).get(key) for key in keys],
        extras=[{"mesh_findings_version": mesh_findings_version()}] * len(keys),
        resamples=resamples,
        seed=seed,
    )
    return dict(zip(keys, estimates, strict=True))


def coded_findings(terms: Sequence[str]) -> frozenset[str] | None:
    """The findings that the coders gave a study, by the names of mesh_findings.yaml; None where nobody coded it.

    >>> sorted(coded_findings(["Cardiomegaly/mild", "Aorta/tortuous", "Lung/hypoinflation"]) or ())
    ['enlarged heart', 'low lung volumes', 'tortuous aorta']
    """
    split = coded_terms(terms)
    if split is None:
        return None
    return frozenset(
        finding.name
        for finding in _vocabulary().findings
        for head, *qualifiers in split
        if any(code[0] == head and set(code[1:]) <= set(qualifiers) for code in finding.codes)
    )


def coded_finding_labels(terms: Sequence[str]) -> dict[str, int | None] | None:
    """Every finding of mesh_findings.yaml as a label: 1 where the coders gave it, else 0; None where nobody coded.

    >>> labels = coded_finding_labels(["Hernia, Hiatal/large"])
    >>> labels["hernia"], labels["emphysema"], coded_finding_labels(["No Indexing"])
    (1, 0, None)
    """
    found = coded_findings(terms)
    return None if found is None else {name: int(name in found) for name in finding_names()}


def finding_names() -> tuple[str, ...]:
    """The findings of mesh_findings.yaml, in its order."""
    return tuple(finding.name for finding in _vocabulary().findings)


def described_findings(phrases: Iterable[str]) -> frozenset[str]:
    """The findings that phrases name, by mesh_findings.yaml.

    >>> sorted(described_findings(["enlarged cardiac silhouette", "bibasilar atelectasis", "clear lungs"]))
    ['atelectasis', 'enlarged heart']
    """
    return frozenset().union(*map(_findings_of, phrases))


def entity_phrases(entities: Entities, *, uncertain: bool = True) -> list[str]:
    """What a report in RadGraph's form found, one phrase per observation: its words, its modifiers' and its places'.

    Args:
        entities: of one report.
        uncertain: whether uncertain observations count as found; absent ones never do.
    """
    wanted = ("definitely present", "uncertain") if uncertain else ("definitely present",)
    modifiers: dict[str, list[str]] = {}
    for key, entity in entities.items():
        for kind, target in entity["relations"]:
            if kind == "modify":
                modifiers.setdefault(target, []).append(key)

    def described(key: str, seen: AbstractSet[str]) -> list[str]:
        parts = [entities[key]["tokens"]]
        for other in modifiers.get(key, ()):
            if other not in seen:
                parts += described(other, {*seen, other})
        return parts

    phrases = []
    for key, entity in entities.items():
        kind, *_, status = entity["label"].split("::")
        if kind == "Observation" and status in wanted:
            places = [target for kind, target in entity["relations"] if kind == "located_at"]
            phrases.append(" ".join(part for one in (key, *places) for part in described(one, {key, *places})))
    return phrases


def mesh_headings() -> tuple[str, ...]:
    """The headings of mesh_findings.yaml's codes without their qualifiers, in lower case, each once."""
    return tuple(dict.fromkeys(code[0] for finding in _vocabulary().findings for code in finding.codes))


def mesh_findings_version() -> int:
    """Version of mesh_findings.yaml, to stand beside every score."""
    return _vocabulary().version


@dataclass(frozen=True, slots=True)
class _Finding:
    name: str
    codes: tuple[tuple[str, ...], ...]
    phrases: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    version: int
    findings: tuple[_Finding, ...]


@lru_cache(maxsize=2**14)
def _findings_of(phrase: str) -> frozenset[str]:
    said = frozenset(words(phrase))
    return frozenset(
        finding.name
        for finding in _vocabulary().findings
        if any(all(_holds(part, said) for part in pattern) for pattern in finding.phrases)
    )


def _holds(part: str, said: AbstractSet[str]) -> bool:
    """Whether one part of a pattern (`a|b`, `pre*`, `-word`) fits the words of a phrase."""
    if part.startswith("-"):
        return not _holds(part[1:], said)
    return any(
        any(word.startswith(choice[:-1]) for word in said) if choice.endswith("*") else choice in said
        for choice in part.split("|")
    )


@cache
def _vocabulary() -> _Vocabulary:
    raw = yaml.safe_load(files("medvlm_harness.metrics").joinpath("mesh_findings.yaml").read_text(encoding="utf-8"))
    return _Vocabulary(int(raw["version"]), tuple(_finding(name, entry) for name, entry in raw["findings"].items()))


def _finding(name: str, entry: Mapping[str, Any]) -> _Finding:
    if entry.keys() != {"codes", "phrases"}:
        raise ValueError(f"Expected codes and phrases of {name} in mesh_findings.yaml, but got {', '.join(entry)}.")
    codes = (tuple(" ".join(part.lower().split()) for part in code.split("/")) for code in entry["codes"])
    return _Finding(name, tuple(codes), tuple(tuple(phrase.lower().split()) for phrase in entry["phrases"]))


def _check_lengths(found: Sequence[object], terms: Sequence[object], study_ids: Sequence[object]) -> None:
    if not len(found) == len(terms) == len(study_ids):
        counts = f"{len(found)}, {len(terms)} and {len(study_ids)}"
        raise ValueError(f"Expected predictions, terms and ids of the same studies, but got {counts}.")
