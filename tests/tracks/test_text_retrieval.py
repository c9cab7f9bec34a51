from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import Embedding, TextRef
from medvlm_harness.tracks.text_retrieval import TextRetrieval

FINDINGS = ("the lungs are clear", "large heart", "small effusion", "old fracture", "clear", "wide")
IMPRESSIONS = ("normal", "cardiomegaly", "effusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    """Reports without any image, of which findings and impressions repeat by themselves and together."""
    rng = np.random.default_rng(3)
    studies = []
    for k in range(60):
        findings = FINDINGS[k % 6] + (f" {k}" if k % 5 == 0 else "")
        labels = {name: int(rng.random() < 0.4) for name in ("Edema", "Cardiomegaly", "No Finding")}
        studies.append(
            Study(
                f"s{k:02}",
                f"p{k}",
                findings="" if k == 11 else f" {findings} ",
                impression=" " if k == 22 else IMPRESSIONS[int(rng.integers(3))],
                labels={"rules": labels} if k % 9 else {},
                split="test" if k < 50 else "train",
            )
        )
    return write_set(tmp_path_factory.mktemp("texts") / "set", studies)


def task(folder: Path, **config: Any) -> TextRetrieval:
    return TextRetrieval({"task": "r", "dataset": "synthetic", **config, "metadata": {"data_dir": str(folder)}})


def vector(key: str) -> np.ndarray:
    raw = np.random.default_rng(int(key[:8], 16)).standard_normal(5).astype(np.float32)
    return raw / np.linalg.norm(raw)


def noise(requests: Sequence[Instance]) -> list[Embedding]:
    """A vector per text; those longer than 12 letters are cut."""
    return [Embedding(vector(request.arguments[0]), len(request.arguments[0].text) > 12) for request in requests]


def usable(folder: Path) -> list[Study]:
    studies = [study for study in read_dataset(folder).studies if study.split == "test"]
    return [study for study in studies if study.findings.strip() and study.impression.strip()]


def found(study: Study) -> set[str]:
    return {name for name, value in study.labels.get("rules", {}).items() if value == 1} - {"No Finding"}


HITS: dict[str, Callable[[Study, Study], bool]] = {
    "": lambda a, b: a is b,
    "_text_class": lambda a, b: a.impression == b.impression,
    "_label_overlap": lambda a, b: bool(found(a)) and found(a) == found(b),
}


@pytest.fixture(scope="module")
def result(folder: Path, score: Callable[..., Any]) -> Any:
    return score(task(folder), noise)


@pytest.mark.parametrize("suffix", HITS)
@pytest.mark.parametrize("direction", ["f2i", "i2f"])
def test_recall_equals_a_ranking_by_hand(folder: Path, result: Any, suffix: str, direction: str) -> None:
    studies = usable(folder)
    findings = np.stack([vector(TextRef(study.findings.strip())) for study in studies])
    impressions = np.stack([vector(TextRef(study.impression.strip())) for study in studies])
    queries, gallery = (findings, impressions) if direction == "f2i" else (impressions, findings)
    similarity = (queries.astype(np.float64) @ gallery.T.astype(np.float64)).round(9)
    is_hit = np.array([[HITS[suffix](a, b) for b in studies] for a in studies])
    rng = np.random.default_rng(0)
    for k in (1, 5, 10):
        hits = []
        for row, hit in zip(similarity, is_hit, strict=True):
            if hit.any():
                orders = [np.lexsort((rng.random(len(row)), -row))[:k] for _ in range(300)]
                hits.append(np.mean([hit[order].any() for order in orders]))
        estimate = result.estimates[f"{direction}_recall@{k}{suffix}"]
        assert estimate.value == pytest.approx(np.mean(hits), abs=0.025)
        assert estimate.n == is_hit.any(axis=1).sum()
        assert estimate.floor <= estimate.ceiling <= 1


def test_the_floor_is_chance(folder: Path, result: Any) -> None:
    n = len(usable(folder))
    for direction in ("f2i", "i2f"):
        assert result.estimates[f"{direction}_recall@5"].floor == pytest.approx(5 / n)
        assert result.estimates[f"{direction}_median_rank"].floor == pytest.approx((n + 1) / 2)


def test_equal_findings_and_equal_impressions_bound_what_can_be_found(folder: Path, result: Any) -> None:
    """By hand at 1: equal findings all choose the impression with the best chance per item; an item of it is drawn."""
    studies = usable(folder)
    pairs = [(study.findings.strip(), study.impression.strip()) for study in studies]
    copies = [impression for _, impression in pairs]
    total = sum(
        max(pairs.count((text, impression)) / copies.count(impression) for impression in set(copies))
        for text in {findings for findings, _ in pairs}
    )
    assert len({findings for findings, _ in pairs}) < len(pairs)
    assert result.estimates["f2i_recall@1"].ceiling == pytest.approx(total / len(pairs))
    assert result.estimates["f2i_recall@1"].ceiling < 1
    assert result.estimates["f2i_recall@1_text_class"].ceiling < 1  # some findings have two impressions


@pytest.mark.parametrize("kind", ["prior", "random", "oracle"])
def test_a_baseline_stays_between_floor_and_ceiling(folder: Path, score: Callable[..., Any], kind: Any) -> None:
    found = score(task(folder), BaselineBackend(kind=kind).embed)
    for direction in ("f2i", "i2f"):
        for k in (1, 5, 10):
            estimate = found.estimates[f"{direction}_recall@{k}"]
            assert estimate.value <= estimate.ceiling + 1e-9
            if kind == "prior":
                assert estimate.value == pytest.approx(estimate.floor)
            if kind == "oracle":
                assert estimate.value > 0.9 * estimate.ceiling > estimate.floor


def test_studies_without_a_section_are_left_out_and_those_without_an_image_are_not(folder: Path, result: Any) -> None:
    assert [d["study_id"] for d in result.documents] == [study.study_id for study in usable(folder)]
    texts = [(study.findings.strip(), study.impression) for study in usable(folder)]
    assert result.details["counts"] == {
        "studies": 48,
        "studies_without_findings": 1,
        "studies_without_impression": 1,
        "distinct_findings": len({a for a, _ in texts}),
        "distinct_impression": len({b for _, b in texts}),
    }
    assert result.details["truncated_share"]["findings"] == pytest.approx(np.mean([len(a) > 12 for a, _ in texts]))


def test_documents_hold_hashes_alone(folder: Path) -> None:
    one = task(folder)
    for document, study in zip(one.test_docs(), usable(folder), strict=True):
        requests = one.construct_requests(document, "", metadata=("r", 0, 1))
        assert [r.arguments[0].text for r in requests] == [study.findings.strip(), study.impression.strip()]
        assert not any(text in str(document) for text in (study.findings.strip(), study.impression))


def test_rows_may_come_in_any_order(folder: Path, result: Any) -> None:
    order = np.random.default_rng(1).permutation(len(result.rows))
    assert task(folder).estimates([result.rows[k] for k in order]) == result.estimates


@pytest.mark.filterwarnings("error")
def test_a_set_without_labels_says_what_is_undefined(
    tmp_path: Path, write_set: Callable[..., Path], score: Callable[..., Any]
) -> None:
    make = partial(Study, impression="same", split="test")
    studies = [make(f"s{k}", f"p{k}", findings=f"text {k}") for k in range(9)]
    result = score(task(write_set(tmp_path / "set", studies)), noise)
    labels = result.estimates["f2i_recall@1_label_overlap"]
    assert np.isnan(labels.value) and labels.reason == "no query has a hit"
    assert result.details["label_source"] is None
    assert result.value("f2i_recall@1") == pytest.approx(1 / 9)  # impressions that cannot be told apart
    assert result.estimates["f2i_recall@1"].ceiling == pytest.approx(1 / 9)
    assert result.value("f2i_recall@1_text_class") == 1


def test_a_set_without_pairs_is_refused_with_what_there_is(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    studies = [Study("a", "a", findings="x", split="test"), Study("b", "b", impression="y", split="test")]
    with pytest.raises(UserError, match="findings in 1 and an impression in 1, 0 times both"):
        task(write_set(tmp_path / "set", studies)).test_docs()


def test_ranks_are_lower_the_better(folder: Path) -> None:
    better = task(folder).higher_is_better()
    assert {name for name, higher in better.items() if not higher} == {"f2i_median_rank", "i2f_median_rank"}


def test_a_view_is_no_key_of_it(folder: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'view'"):
        task(folder, view="frontal")
