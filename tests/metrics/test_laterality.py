from __future__ import annotations

import re

import numpy as np
import pytest

from medvlm_harness.data.records import Dataset
from medvlm_harness.metrics.laterality import (
    SidedMention,
    laterality_conflicts,
    laterality_version,
    mentioned_sides,
    sided_findings,
)

LEFT, RIGHT, BOTH = {"left"}, {"right"}, {"left", "right"}


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("Small left pleural effusion.", {"effusion": LEFT}),
        ("Pleural effusion on the right.", {"effusion": RIGHT}),
        ("Left-sided effusion.", {"effusion": LEFT}),
        ("Bibasilar atelectasis.", {"atelectasis": BOTH}),
        ("Effusions, right greater than left.", {"effusion": BOTH}),
        ("RLL pneumonia.", {"opacity": RIGHT}),
        ("Opacity in the lingula.", {"opacity": LEFT}),
        ("Right upper lobe opacity and left effusion.", {"opacity": RIGHT, "effusion": LEFT}),
        ("Consolidation in the left base, effusion on the right.", {"opacity": LEFT, "effusion": RIGHT}),
        ("Left effusion with shift to the right.", {"effusion": LEFT, "shift": RIGHT}),
        ("Right jugular catheter with left effusion.", {"device": RIGHT, "effusion": LEFT}),
        ("Effusion. On the left there is scarring.", {"scar": LEFT}),
        ("Large effusion.", {}),
        ("Left lung is clear.", {}),
        ("", {}),
    ],
)
def test_a_side_goes_to_the_finding_that_it_is_said_of(text: str, sides: dict[str, set[str]]) -> None:
    assert sided_findings(text) == sides


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("No left effusion.", {}),
        ("Without right pneumothorax or effusion.", {}),
        ("No left effusion but a right nodule.", {"nodule": RIGHT}),
        ("No change in the left effusion.", {"effusion": LEFT}),
        ("Enlarged left ventricle with effusion.", {}),
    ],
)
def test_denied_findings_and_parts_of_the_heart_have_no_side(text: str, sides: dict[str, set[str]]) -> None:
    assert sided_findings(text) == sides


def test_texts_conflict_where_their_sides_have_nothing_in_common() -> None:
    left, right, both = ({"effusion": frozenset(sides)} for sides in (LEFT, RIGHT, BOTH))
    assert laterality_conflicts(left, right) == {"effusion"}
    assert (
        laterality_conflicts(left, both) == laterality_conflicts(left, left) == laterality_conflicts(left, {}) == set()
    )


def test_sides_of_a_labelers_mentions_leave_out_what_it_denies() -> None:
    mentions = [
        SidedMention("Pleural Effusion", 1, "left"),
        SidedMention("Pleural Effusion", -1, "right"),
        SidedMention("Pneumothorax", 0, "right"),
        SidedMention("Atelectasis", 1, "both"),
        SidedMention("Edema", 1, None),
    ]
    assert mentioned_sides(mentions) == {"Pleural Effusion": BOTH, "Atelectasis": BOTH}
    with pytest.raises(ValueError, match="left, right, both or None as side, but got 'L'"):
        mentioned_sides([SidedMention("Edema", 1, "L")])


def test_the_words_have_a_version() -> None:
    assert laterality_version() >= 1


def swapped(text: str) -> str:
    """The same text with its sides exchanged."""
    other = {"left": "right", "right": "left", "lll": "rll", "rll": "lll", "rul": "lul", "lul": "rul"}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda side: other[side[0].lower()], text, flags=re.IGNORECASE)


def test_injected_swaps_are_found_and_real_reports_seldom_conflict(iu_cxr: Dataset) -> None:
    """On findings and impressions of all studies: swaps of a side that both name, and what is flagged without any."""
    pairs = [(study.findings, study.impression) for study in iu_cxr.studies if study.findings and study.impression]
    sides = [(sided_findings(findings), sided_findings(impression)) for findings, impression in pairs]
    asked = [bool(source.keys() & text.keys()) for source, text in sides]
    flagged = [bool(laterality_conflicts(source, text)) for source, text in sides]
    assert sum(asked) > 300 and sum(flagged) / sum(asked) < 0.02
    found = [
        bool(laterality_conflicts(source, sided_findings(swapped(impression))))
        for (source, text), (_, impression) in zip(sides, pairs, strict=True)
        if any(len(source[name]) == 1 and source[name] == text[name] for name in source.keys() & text.keys())
    ]
    assert len(found) > 200 and np.mean(found) > 0.95
