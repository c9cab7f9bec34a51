"""What a prepared set holds, for `medvlm data info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from medvlm_harness.data.labels import Uncertain, resolve
from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.data.splits import SPLITS
from medvlm_harness.metrics.agreement import cohen_kappa

__all__ = ["Agreement", "Description", "LabelSupport", "SectionCoverage", "SplitSummary", "SubgroupSize", "describe"]

SECTIONS = ("indication", "comparison", "findings", "impression")


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Sizes of one split."""

    split: str
    studies: int
    images: int
    frontal: int  # images
    lateral: int
    view_unknown: int
    without_image: int  # studies
    without_frontal: int


@dataclass(frozen=True, slots=True)
class LabelSupport:
    """How many studies one source calls positive, and so on; the five counts sum to the studies."""

    source: str
    label: str
    positive: int
    negative: int
    uncertain: int
    unmentioned: int  # the source read a text that does not mention it
    unlabelled: int  # the source had nothing to read, or does not cover the label


@dataclass(frozen=True, slots=True)
class SectionCoverage:
    """How many studies have a non-empty section, and in how many it holds the de-identification token."""

    section: str
    studies: int
    with_token: int


@dataclass(frozen=True, slots=True)
class SubgroupSize:
    """How many studies have one value of a subgroup field; the sizes of a field sum to the studies."""

    attribute: str
    value: str | None  # None: the record does not say
    studies: int
    share: float  # of all studies


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cohen's kappa of two label sources over the studies that both call positive or negative."""

    label: str
    first: str
    second: str
    studies: int
    kappa: float  # NaN where undefined: no such study, or both sources constant


@dataclass(frozen=True, slots=True)
class Description:
    """All of the above for one set."""

    name: str
    splits: tuple[SplitSummary, ...]
    labels: tuple[LabelSupport, ...]
    sections: tuple[SectionCoverage, ...]
    subgroups: tuple[SubgroupSize, ...]
    agreement: tuple[Agreement, ...]


def describe(dataset: Dataset, *, uncertain: Uncertain = "exclude", token: str = "XXXX") -> Description:  # noqa: S107
    """Count what a prepared set holds, from its records alone; no image is opened.

    Args:
        dataset: the set.
        uncertain: what -1 becomes in the agreement of sources; unmentioned is negative there.
        token: stands where the source removed a word for privacy.
    """
    studies = dataset.studies
    sources, names = dataset.manifest.label_sources, dataset.manifest.label_names
    return Description(
        name=dataset.manifest.name,
        splits=tuple(_split(split, studies) for split in SPLITS if any(study.split == split for study in studies)),
        labels=tuple(_support(source, name, studies) for source in sources for name in names),
        sections=tuple(_section(section, studies, token) for section in SECTIONS),
        subgroups=tuple(_subgroups(studies)),
        agreement=tuple(
            _agreement(name, first, second, studies, uncertain)
            for first, second in combinations(sources, 2)
            for name in names
        ),
    )


def _split(split: str, studies: tuple[Study, ...]) -> SplitSummary:
    inside = [study for study in studies if study.split == split]
    views = Counter(image.view for study in inside for image in study.images)
    return SplitSummary(
        split,
        studies=len(inside),
        images=sum(views.values()),
        frontal=views["frontal"],
        lateral=views["lateral"],
        view_unknown=views[None],
        without_image=sum(not study.images for study in inside),
        without_frontal=sum(all(image.view != "frontal" for image in study.images) for study in inside),
    )


def _support(source: str, name: str, studies: tuple[Study, ...]) -> LabelSupport:
    found = [study.labels.get(source, {}) for study in studies]
    values = Counter(labels.get(name, "unlabelled") for labels in found)
    return LabelSupport(
        source,
        name,
        positive=values[1],
        negative=values[0],
        uncertain=values[-1],
        unmentioned=values[None],
        unlabelled=values["unlabelled"],
    )


def _section(section: str, studies: tuple[Study, ...], token: str) -> SectionCoverage:
    texts = [text for study in studies if (text := getattr(study, section))]
    return SectionCoverage(section, len(texts), sum(token in text for text in texts))


def _subgroups(studies: tuple[Study, ...]) -> Iterator[SubgroupSize]:
    for attribute in sorted({name for study in studies for name in study.subgroups}):
        sizes = Counter(study.subgroups.get(attribute) for study in studies)
        for value in sorted(sizes, key=lambda value: (value is None, value)):
            yield SubgroupSize(attribute, value, sizes[value], sizes[value] / len(studies))


def _agreement(name: str, first: str, second: str, studies: tuple[Study, ...], uncertain: Uncertain) -> Agreement:
    pairs = [
        (a, b)
        for study in studies
        if (a := resolve(study.labels.get(first), name, uncertain=uncertain)) is not None
        and (b := resolve(study.labels.get(second), name, uncertain=uncertain)) is not None
    ]
    return Agreement(name, first, second, len(pairs), cohen_kappa([a for a, _ in pairs], [b for _, b in pairs]))
