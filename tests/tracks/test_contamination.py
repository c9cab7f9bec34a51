from __future__ import annotations

from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.tracks.contamination import refuse_contaminated, trained_splits

NAMES = ("iu_cxr", "IU-CXR", "Open-i")
ALL = {"train", "validation", "test", "unassigned"}


@pytest.mark.parametrize(
    ("trained_on", "expected"),
    [
        ([], set()),
        (["MIMIC-CXR"], set()),
        (["IU-CXR"], ALL),
        (["iu cxr"], ALL),
        (["openi"], ALL),
        (["IU-CXR", "R2Gen train split"], {"train"}),
        (["R2Gen train split", "IU-CXR"], {"train"}),
        (["IU-CXR train split"], {"train"}),
        (["IU-CXR", "R2Gen train split", "r2gen val split"], {"train", "validation"}),
        (["IU-CXR", "hash train split"], ALL),  # another scheme cuts the set elsewhere
        (["MIMIC-CXR train split"], set()),
        ([{"dataset": "iu_cxr", "splits": ["train", "val"]}], {"train", "validation"}),
        ([{"dataset": "iu_cxr", "scheme": "r2gen", "splits": ["train"]}], {"train"}),
        ([{"dataset": "iu_cxr", "scheme": "hash", "splits": ["train"]}], ALL),
        ([{"dataset": "Open-i"}], ALL),
        ([{"dataset": "MIMIC-CXR", "splits": ["train"]}], set()),
        ([{"dataset": "iu_cxr", "splits": ["train"]}, "IU-CXR"], {"train"}),
        ([{"splits": ["train"]}], set()),
    ],
)
def test_the_splits_that_a_card_names(trained_on: list[Any], expected: set[str]) -> None:
    assert trained_splits(trained_on, names=NAMES, split_scheme="r2gen") == expected


def test_a_set_prepared_by_the_hash_scheme_knows_its_own_splits() -> None:
    assert trained_splits(["hash train split"], names=NAMES, split_scheme="hash") == {"train"}
    assert trained_splits(["R2Gen train split"], names=NAMES, split_scheme="hash") == ALL
    assert trained_splits(["R2Gen train split"], names=NAMES, split_scheme=None) == ALL


def test_a_misspelt_split_is_an_error_and_never_nothing() -> None:
    with pytest.raises(UserError, match="trian"):
        trained_splits(["IU-CXR trian split"], names=NAMES, split_scheme="r2gen")


def test_a_split_that_was_seen_is_refused_unless_allowed() -> None:
    seen = frozenset({"train", "validation"})
    refuse_contaminated("t", ["test"], seen, model="m", allowed=False)
    refuse_contaminated("t", ["train"], seen, model="m", allowed=True)
    with pytest.raises(UserError, match=r"t: the card of m .* train and validation split.*allow_contaminated=True"):
        refuse_contaminated("t", ["train", "validation", "test"], seen, model="m", allowed=False)
