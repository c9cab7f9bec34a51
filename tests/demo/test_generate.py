import hashlib
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.data.records import Dataset, read_dataset, write_dataset
from medvlm_harness.demo import generate
from medvlm_harness.demo.generate import DEMO_SEED, generate_cases, prepare_demo
from medvlm_harness.errors import UserError


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but the manifest, which names its folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, second, third = (
        prepare_demo(tmp_path / name, seed=seed, studies=20) for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    assert contents(first) == contents(second)
    assert not set(contents(first).values()) & set(contents(third).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # no scratch folder is left


def test_splits_are_by_patient_and_large_enough(demo: Dataset) -> None:
    splits, sizes = defaultdict(set), defaultdict(int)
    for study in demo.studies:
        splits[study.patient_id].add(study.split)
        sizes[study.split] += 1
    assert all(len(of_patient) == 1 for of_patient in splits.values())
    assert len(splits) < len(demo.studies) == 480  # some patients have two
    assert sizes["test"] >= 240
    assert 70 <= sizes["validation"] <= 90
    assert sizes["train"] > 100
    assert {name: demo.manifest.counts[f"{name}_studies"] for name in sizes} == dict(sizes)


def test_every_label_occurs_and_two_are_rare_in_the_test_split(demo: Dataset) -> None:
    stated = [
        study.labels["template"] for study in demo.studies if study.split == "test" and "template" in study.labels
    ]
    positives = {name: sum(labels[name] == 1 for labels in stated) for name in CHEXPERT_14}
    assert all(positives.values())
    assert {name for name, count in positives.items() if count < 10} == {"Pneumothorax", "Pleural Other"}
    for value in (0, -1, None):
        assert any(value in labels.values() for labels in stated)


def test_labels_agree_with_what_was_drawn() -> None:
    for case in generate_cases(DEMO_SEED, 60):
        drawn = {finding.label for finding in case.findings}
        labels = case.report.labels
        if labels is None:
            assert case.report.findings == ""
            continue
        assert {name for name in CHEXPERT_13 if labels[name] in (1, -1)} == drawn
        assert {name for name in CHEXPERT_13 if labels[name] == -1} == case.hedged


def test_the_two_label_sources_agree_mostly_but_not_always(demo: Dataset) -> None:
    pairs = [
        (study.labels["template"][name] == 1, study.labels["mesh"][name] == 1)
        for study in demo.studies
        if {"template", "mesh"} <= set(study.labels)
        for name in CHEXPERT_13
    ]
    assert 0.95 < np.mean([a == b for a, b in pairs]) < 1


def test_records_are_complete(demo: Dataset) -> None:
    assert demo.manifest.label_sources == ("template", "mesh")
    assert "synthetic" in demo.manifest.policies
    assert any("template" not in study.labels for study in demo.studies)
    assert any(study.mesh == ("No Indexing",) for study in demo.studies)
    for study in demo.studies:
        assert study.images[0].view == "frontal"
        assert 1 <= len(study.images) <= 3
        assert set(study.subgroups) == {"sex", "age_band"}
        assert ("template" in study.labels) == bool(study.findings)
        assert study.findings or study.impression
    image = demo.studies[5].images[0]
    assert hashlib.sha256(demo.path(image).read_bytes()).hexdigest() == image.sha256
    with Image.open(demo.path(image)) as picture:
        assert (picture.mode, picture.size) == ("L", (image.width, image.height))


def test_a_set_of_the_same_version_is_kept_and_another_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_demo(tmp_path / "demo", studies=12)
    before = (folder / "studies.parquet").stat().st_mtime_ns
    prepare_demo(folder, studies=12)
    assert (folder / "studies.parquet").stat().st_mtime_ns == before
    next((folder / "images").glob("*.png")).unlink()
    prepare_demo(folder, studies=12)
    assert (folder / "studies.parquet").stat().st_mtime_ns != before
    monkeypatch.setattr(generate, "GENERATOR_VERSION", 10**6)
    prepare_demo(folder, studies=12)
    assert json.loads((folder / "manifest.json").read_text())["policies"]["generator_version"] == 10**6


def test_a_moved_set_is_made_anew_so_that_its_paths_hold(tmp_path: Path) -> None:
    prepare_demo(tmp_path / "old", studies=12).rename(tmp_path / "new")
    moved = read_dataset(prepare_demo(tmp_path / "new", studies=12))
    assert moved.path(moved.studies[0].images[0]).is_file()


def test_two_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: prepare_demo(tmp_path / "demo", studies=12), range(4)))
    assert made == [tmp_path / "demo"] * 4
    assert len(read_dataset(tmp_path / "demo").studies) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_is_not_a_demo_set_is_never_replaced(tmp_path: Path, demo: Dataset) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        prepare_demo(tmp_path)
    other = write_dataset(tmp_path / "other", demo.studies[:2], replace(demo.manifest, name="mine"))
    with pytest.raises(UserError, match="holds mine"):
        prepare_demo(other)
    assert read_dataset(other).manifest.name == "mine"


@pytest.mark.parametrize(("seed", "studies", "message"), [(0, 3, "at least 12"), (-1, 20, "seed of at least 0")])
def test_wrong_input_says_what_was_expected(tmp_path: Path, seed: int, studies: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_demo(tmp_path / "x", seed=seed, studies=studies)
