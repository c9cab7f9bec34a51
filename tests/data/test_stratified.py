from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.labels import LABELER_SOURCE, resolve
from medvlm_harness.data.records import Dataset
from medvlm_harness.data.stratified import stratified_studies
from medvlm_harness.errors import UserError

Labels = list[list[int | None]]
IDS = [f"s{k}" for k in range(600)]
KEYS = ["rare", "medium", "common"]


def drawn() -> Labels:
    """600 studies, some unlabelled; 12, about 60 and about 200 positives."""
    rng = np.random.default_rng(3)
    rows: Labels = [[None, int(rng.random() < 0.1), int(rng.random() < 0.35)] for _ in IDS]
    for k, row in enumerate(rows):
        row[0] = None if k % 7 == 0 else int(k % 50 == 1)
    return rows


def test_each_label_keeps_its_positives_up_to_a_tenth() -> None:
    rows = drawn()
    found = stratified_studies(IDS, rows, keys=KEYS, n=300)
    assert len(found.study_ids) == 300 and found.study_ids <= set(IDS)
    for j, key in enumerate(KEYS):
        everything = [row[j] for row in rows]
        chosen = [row[j] for one, row in zip(IDS, rows, strict=True) if one in found.study_ids]
        support = found.labels[key]
        assert (support.positives, support.negatives) == (everything.count(1), everything.count(0))
        assert (support.chosen_positives, support.chosen_negatives) == (chosen.count(1), chosen.count(0))
        assert support.chosen_positives >= min(support.positives, 30)
    rare = found.labels["rare"]
    assert rare.chosen_positives == rare.positives > 0
    # Half of the studies, and all of its positives: twice as prevalent.
    assert rare.chosen_positives / rare.chosen_negatives > 1.8 * rare.positives / rare.negatives


def test_a_plain_draw_would_lose_rare_positives() -> None:
    rows = drawn()
    plain = stratified_studies(IDS, n=300).study_ids
    assert sum(row[0] == 1 for one, row in zip(IDS, rows, strict=True) if one in plain) < 12


def test_neither_order_nor_process_decides_but_the_seed_does() -> None:
    rows = drawn()
    found = stratified_studies(IDS, rows, keys=KEYS)
    order = np.random.default_rng(1).permutation(600)
    columns = [2, 0, 1]
    again = stratified_studies(
        [IDS[i] for i in order], [[rows[i][j] for j in columns] for i in order], keys=[KEYS[j] for j in columns]
    )
    assert again.study_ids == found.study_ids and dict(again.labels) == dict(found.labels)
    other = stratified_studies(IDS, rows, keys=KEYS, seed=1)
    assert len(other.study_ids - found.study_ids) > 50
    code = (
        "from medvlm_harness.data.stratified import stratified_studies\n"
        "print(*sorted(stratified_studies([f's{k}' for k in range(600)]).study_ids))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert done == sorted(stratified_studies(IDS).study_ids)


def test_the_chosen_positives_do_not_depend_on_other_studies() -> None:
    rows = drawn()
    rare = {one for one, row in zip(IDS, rows, strict=True) if row[0] == 1}
    found = stratified_studies(IDS[:400], rows[:400], keys=KEYS, n=200)
    assert rare.intersection(IDS[:400]) <= found.study_ids


def test_all_are_taken_where_there_are_not_more_than_asked_for() -> None:
    for n in (600, 601):
        assert stratified_studies(IDS, drawn(), keys=KEYS, n=n).study_ids == set(IDS)
    assert stratified_studies([], n=5).study_ids == frozenset()


def test_where_places_run_out_the_most_frequent_label_goes_short() -> None:
    """Twelve labels of 2 to 13 positives, no study with two of them: 2 each would be 24 studies, one too many."""
    rows: Labels = []
    for j in range(12):
        rows += [[int(column == j) for column in range(12)] for _ in range(2 + j)]
    ids, keys = [f"s{k}" for k in range(len(rows))], [f"l{j}" for j in range(12)]
    found = stratified_studies(ids, rows, keys=keys, n=23)
    assert [found.labels[key].chosen_positives for key in keys] == [2] * 11 + [1]


def test_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(UserError, match="at least 1, but got 0"):
        stratified_studies(IDS, n=0)
    with pytest.raises(ValueError, match="some repeat"):
        stratified_studies(["a", "a"])
    with pytest.raises(ValueError, match="2 labels of each of 1"):
        stratified_studies(["a"], [[1]], keys=["x", "y"])


def test_on_the_real_test_split_rare_labels_keep_all_positives(iu_cxr: Dataset) -> None:
    studies = [study for study in iu_cxr.studies if study.split == "test"]
    rows = [[resolve(study.labels.get(LABELER_SOURCE), key) for key in CHEXPERT_14] for study in studies]
    found = stratified_studies([study.study_id for study in studies], rows, keys=CHEXPERT_14)
    assert (len(studies), len(found.study_ids)) == (590, 300)
    for support in found.labels.values():
        assert support.chosen_positives >= min(support.positives, 30)
