from __future__ import annotations

import csv
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from medvlm_harness.data.records import Dataset
from medvlm_harness.data.splits import SPLITS, assign_split, canonical_split, parse_splits
from medvlm_harness.errors import UserError


def packaged() -> list[dict[str, str]]:
    with files("medvlm_harness.data").joinpath("r2gen_split.csv").open(encoding="utf-8") as table:
        return list(csv.DictReader(table))


def test_the_packaged_split_holds_ids_alone_in_the_published_sizes() -> None:
    rows = packaged()
    assert Counter(row["split"] for row in rows) == {"train": 2069, "validation": 296, "test": 590}
    assert len({row["uid"] for row in rows}) == len(rows)
    assert rows[0].keys() == {"uid", "split"}
    assert all(row["uid"].isdigit() for row in rows)


def test_patients_outside_the_published_split_are_unassigned() -> None:
    for row in packaged()[::100]:
        assert assign_split(row["uid"], "r2gen") == row["split"]
    assert assign_split("no such patient", "r2gen") == "unassigned"


def test_the_hash_split_is_70_10_20_and_depends_on_the_patient_alone() -> None:
    ids = [str(n) for n in range(20_000)]
    split = [assign_split(patient, "hash") for patient in ids]
    assert split == [assign_split(patient, "hash") for patient in ids]
    share = {name: count / len(ids) for name, count in Counter(split).items()}
    # Four standard deviations of a binomial share at this size.
    assert share == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=4 * (0.25 / len(ids)) ** 0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", ("test",)),
        ("validation+test", ("validation", "test")),
        (" Test + val ", ("validation", "test")),
        ("test+test", ("test",)),
        ("ALL", SPLITS),
        ("dev+unassigned", ("validation", "unassigned")),
    ],
)
def test_splits_as_users_write_them(text: str, expected: tuple[str, ...]) -> None:
    assert parse_splits(text) == expected


@pytest.mark.parametrize("text", ["tets", "test+tets", "", "test+"])
def test_an_unknown_split_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="Expected a split"):
        parse_splits(text)


def test_near_matches_are_named() -> None:
    with pytest.raises(UserError, match="Did you mean test"):
        canonical_split("tets")
    with pytest.raises(UserError, match="Did you mean r2gen"):
        assign_split("1", "r2gn")  # type: ignore[arg-type]


def test_the_real_test_split_has_590_studies_and_615_frontal_images(iu_cxr: Dataset) -> None:
    test = [study for study in iu_cxr.studies if study.split == "test"]
    assert len(test) == 590
    assert sum(image.view == "frontal" for study in test for image in study.images) == 615


def test_the_packaged_split_is_the_source_list(shared: Path) -> None:
    with (shared / "data" / "iu_cxr" / "r2gen_split.csv").open(encoding="utf-8") as table:
        source = {row["uid"]: canonical_split(row["split"]) for row in csv.DictReader(table)}
    assert {row["uid"]: row["split"] for row in packaged()} == source
