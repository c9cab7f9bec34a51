from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from medvlm_harness.data.info import describe
from medvlm_harness.data.prepare import prepare_iu_cxr
from medvlm_harness.data.records import Dataset, read_dataset
from medvlm_harness.data.subgroups import stated, subgroup_rule_version, subgroups_of
from medvlm_harness.metrics.factuality import claims_prior


@pytest.mark.parametrize(
    ("indication", "sex"),
    [
        ("XXXX-year-old male with chest pain.", "male"),
        ("Homeless MALE, positive PPD", "male"),
        ("The patient is a XXXX-year-old woman, preop.", "female"),
        ("42y female with positive ppd", "female"),
        ("52 yo F, dyspnea", "female"),
        ("52 y/o M with rib pain", "male"),
        ("60-year-old, M, cough", "male"),
        ("Patient states he has been on antibiotics.", "male"),
        ("Feels like she has choking.", "female"),
        # What says nothing, or only suggests it.
        ("", None),
        ("XXXX-year-old XXXX with chest pain", None),
        ("Prostate cancer", None),
        ("Eight weeks pregnant, chest pain", None),
        ("Fever of 102 F", None),
        ("Pneumonia x 5 years f/u", None),
        ("Chest pain this a.m.", None),
        ("Kidney cancer, F/U", None),
        # Both sexes, or somebody else.
        ("XXXX-year-old male donor for a female recipient", None),
        ("XXXX-year-old female, mother had tuberculosis", None),
        ("Her father has TB", None),
    ],
)
def test_sex_is_what_the_indication_says_of_the_patient(indication: str, sex: str | None) -> None:
    assert stated("sex", indication) == sex


@pytest.mark.parametrize(
    ("comparison", "value"),
    [
        ("None.", "none"),
        ("None available", "none"),
        ("NONE", "none"),
        ("Nones", "none"),
        ("No comparison studies are currently available.", "none"),
        ("No comparison chest x-XXXX.", "none"),
        ("Not available", "none"),
        ("Radiograph Chest PA and Lateral None.", "none"),
        ("Chest radiograph XXXX", "available"),
        ("CT chest dated XXXX, XXXX.", "available"),
        ("PA and lateral chest x-XXXX", "available"),
        ("XXXX", "available"),
        ("XXXX, XXXX.", "available"),
        ("XXXX at XXXX p.m.", "available"),
        ("11/7/ XXXX", "available"),
        ("Yesterday.", "available"),
        ("", None),
        ("  ", None),
        (".", None),
        ("XXXX, vomiting, blood", None),
        ("XXXX-year-old female. XXXX and chest congestion.", None),
        ("with no comparison XXXX film there is a comparison CT scan XXXX", None),
        ("Images from chest x-XXXX performed on XXXX are not available at this time for comparison.", None),
    ],
)
def test_the_comparison_field_says_whether_there_is_an_earlier_study(comparison: str, value: str | None) -> None:
    assert stated("comparison", comparison) == value


@pytest.mark.parametrize(
    ("mesh", "quality"),
    [
        (["Lung/hypoinflation", "Technical  Quality of Image Unsatisfactory "], "unsatisfactory"),
        (["normal"], "not flagged"),
        (["Cardiomegaly/mild"], "not flagged"),
        (["No Indexing"], None),
        ([], None),
    ],
)
def test_image_quality_is_known_where_the_study_was_coded(mesh: list[str], quality: str | None) -> None:
    assert subgroups_of({}, mesh).get("image_quality") == quality


@pytest.mark.parametrize("unit", ["x", "XXXX ", "x-", "year-old ", "images not ", "XXXX at 5 p.m. q"])
@pytest.mark.parametrize("attribute", ["sex", "comparison"])
def test_any_text_is_read_in_little_time(attribute: str, unit: str) -> None:
    start = time.perf_counter()
    stated(attribute, unit * 5_000 + " end")
    assert time.perf_counter() - start < 2


def test_prepared_studies_have_what_their_records_say(kaggle_folder: Path, tmp_path: Path) -> None:
    header, *rows = (kaggle_folder / "indiana_reports.csv").read_text().splitlines()
    with (kaggle_folder / "indiana_reports.csv").open("a") as file:
        file.write("7,Technical Quality of Image Unsatisfactory,,,42-year-old female,None.,clear,clear\n")
    dataset = read_dataset(prepare_iu_cxr(kaggle_folder, labels=None, out=tmp_path / "out").folder)
    studies = {study.study_id: study for study in dataset.studies}
    assert header.split(",")[4:6] == ["indication", "comparison"] and len(studies) == len(rows) + 1
    assert studies["7"].subgroups == {"sex": "female", "comparison": "none", "image_quality": "unsatisfactory"}
    assert "image_quality" not in studies["2"].subgroups  # nobody coded it
    assert f"version {subgroup_rule_version()};" in dataset.manifest.policies["subgroups"]
    sizes = {(row.attribute, row.value): row.studies for row in describe(dataset).subgroups}
    assert sizes["sex", "female"] == 1 and sizes["sex", None] == len(rows)
    assert sizes["image_quality", "unsatisfactory"] == 1


def test_the_real_sets_subgroups_tell_its_reports_apart(iu_cxr: Dataset) -> None:
    sizes = {(row.attribute, row.value): row.studies for row in describe(iu_cxr).subgroups}
    # An independent reading: whole words, nothing else.
    words = [set(study.indication.lower().replace("-", " ").replace(",", " ").replace(".", " ").split())
             for study in iu_cxr.studies]  # fmt: skip
    assert abs(sizes["sex", "male"] - sum("male" in said for said in words)) <= 3
    assert abs(sizes["sex", "female"] - sum(bool(said & {"female", "woman"}) for said in words)) <= 8
    assert sizes["image_quality", None] == iu_cxr.manifest.counts["mesh_not_indexed"]
    claims: Counter[str] = Counter()
    for study in iu_cxr.studies:
        claims[study.subgroups.get("comparison", "")] += bool(claims_prior(f"{study.findings} {study.impression}"))
    rates = {value: claims[value] / sizes["comparison", value] for value in ("none", "available")}
    assert rates["none"] < 0.01 < 0.15 < rates["available"]
