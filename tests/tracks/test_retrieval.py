from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.data.records import Image, Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.retrieval import RankedQueries, recall_at, reciprocal_rank
from medvlm_harness.requests import Embedding, ImageRef, TextRef
from medvlm_harness.tracks.retrieval import Retrieval, study_texts

FINDINGS = ("", "the lungs are clear", "large heart", "small effusion", "no acute disease", "old fracture")
IMPRESSIONS = ("", "normal", "cardiomegaly", "effusion")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """Reports that repeat, studies without a frontal or without a report, labels that some studies lack."""
    rng = np.random.default_rng(8)
    studies = []
    for k in range(60):
        images = [fake_image(f"{k}_b.png"), fake_image(f"{k}_a.png"), fake_image(f"{k}_0.png", "lateral")]
        findings = FINDINGS[k % 6] and f"{FINDINGS[k % 6]} {k // 12}"
        labels = {name: int(rng.random() < 0.4) for name in ("Edema", "Cardiomegaly", "No Finding")}
        studies.append(
            Study(
                f"s{k:02}",
                f"p{k}",
                tuple(images[2:] if k % 20 == 7 else images),
                findings=findings,
                impression=IMPRESSIONS[k % 4],
                labels={"rules": labels} if k % 9 else {},
                split="test" if k < 50 else "validation",
            )
        )
    return write_set(tmp_path_factory.mktemp("retrieval") / "set", studies)


def task(folder: Path, **config: Any) -> Retrieval:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    return Retrieval({"task": "r", "dataset": "synthetic", **config, "metadata": metadata})


def vector(key: str) -> np.ndarray:
    raw = np.random.default_rng(int(key[:8], 16)).standard_normal(5).astype(np.float32)
    return raw / np.linalg.norm(raw)


def noise(requests: Sequence[Instance]) -> list[Embedding]:
    """A vector per input; texts longer than 25 letters are cut."""
    arguments = [request.arguments[0] for request in requests]
    return [Embedding(vector(a), None if isinstance(a, ImageRef) else len(a.text) > 25) for a in arguments]


def usable(folder: Path) -> list[Study]:
    """Independent: test studies with a frontal and a report."""
    return [
        study
        for study in read_dataset(folder).studies
        if study.split == "test"
        and any(image.view == "frontal" for image in study.images)
        and (study.findings or study.impression)
    ]


def text_of(study: Study, which: str) -> str:
    if which == "report":
        return f"{study.findings} {study.impression}".strip()
    return str(getattr(study, which))


def recall_by_hand(similarity: np.ndarray, is_hit: np.ndarray, k: int) -> float:
    """Slow: sort the gallery of each query with ties in 400 random orders, and look."""
    rng = np.random.default_rng(0)
    found = []
    for row, hit in zip(similarity, is_hit, strict=True):
        if hit.any():
            orders = [
                np.lexsort((rng.random(len(row)), -row))[:k] for _ in range(400 if len(set(row)) < len(row) else 1)
            ]
            found.append(np.mean([hit[order].any() for order in orders]))
    return float(np.mean(found))


@pytest.fixture(scope="module")
def result(folder: Path, score: Callable[..., Any]) -> Any:
    return score(task(folder), noise)


@pytest.mark.parametrize(
    ("suffix", "which", "hit"),
    [
        ("", "report", lambda a, b: a is b),
        ("_text_class", "report", lambda a, b: text_of(a, "report") == text_of(b, "report")),
        ("_label_overlap", "report", lambda a, b: bool(found(a)) and found(a) == found(b)),
        ("_findings", "findings", lambda a, b: a is b),
        ("_impression", "impression", lambda a, b: a is b),
    ],
)
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_recall_equals_a_ranking_by_hand(
    folder: Path, result: Any, suffix: str, which: str, hit: Callable[[Study, Study], bool], direction: str
) -> None:
    studies = [study for study in usable(folder) if text_of(study, which)]
    images = np.stack([vector(min(i.sha256 for i in s.images if i.file.endswith("a.png"))) for s in studies])
    texts = np.stack([vector(str(TextRef(text_of(study, which)))) for study in studies])
    queries, gallery = (images, texts) if direction == "i2t" else (texts, images)
    # Equal vectors tie exactly; two products of them may differ in the last bit.
    similarity = (queries.astype(np.float64) @ gallery.T.astype(np.float64)).round(9)
    is_hit = np.array([[hit(a, b) for b in studies] for a in studies])
    for k in (1, 5, 10):
        estimate = result.estimates[f"{direction}_recall@{k}{suffix}"]
        assert estimate.value == pytest.approx(recall_by_hand(similarity, is_hit, k), abs=0.02)
        assert estimate.n == is_hit.any(axis=1).sum()
        assert estimate.floor <= estimate.ceiling <= 1


def found(study: Study) -> set[str]:
    return {name for name, value in study.labels.get("rules", {}).items() if value == 1} - {"No Finding"}


def test_strict_ranks_equal_a_sort_where_nothing_ties(folder: Path, result: Any) -> None:
    studies = usable(folder)
    images = np.stack([vector(str(d["image"])) for d in result.documents])
    texts = np.stack([vector(str(TextRef(text_of(s, "report")))) for s in studies])
    similarity = (texts.astype(np.float64) @ images.T.astype(np.float64)).round(9)  # images are all different
    ranks = [1 + int((row > row[k]).sum()) for k, row in enumerate(similarity)]
    assert result.value("t2i_mrr") == pytest.approx(np.mean(1 / np.array(ranks)))
    assert result.value("t2i_median_rank") == pytest.approx(np.median(ranks))
    by_study = {r["study"]: r["rank"] for r in result.records if r["label"] == "t2i"}
    assert [by_study[study.study_id] for study in studies] == ranks
    assert len(result.records) == 2 * len(studies)


def test_rank_and_ties_of_a_record_give_its_recall(result: Any) -> None:
    for direction in ("i2t", "t2i"):
        own = [r for r in result.records if r["label"] == direction]
        rank, tied = (np.array([r[name] for r in own]) for name in ("rank", "tied"))
        assert (tied.max() > 1) == (direction == "i2t")  # reports repeat, images do not
        ranked = RankedQueries((rank - (tied + 1) / 2).astype(int), tied, np.ones_like(tied), len(own))
        assert recall_at(ranked, 5).mean() == pytest.approx(result.value(f"{direction}_recall@5"))
        assert reciprocal_rank(ranked).mean() == pytest.approx(result.value(f"{direction}_mrr"))


def test_the_floor_is_chance_and_the_ceiling_counts_duplicates(folder: Path, result: Any) -> None:
    reports = [text_of(study, "report") for study in usable(folder)]
    n = len(reports)
    assert len(set(reports)) < n
    for k in (1, 5, 10):
        estimate = result.estimates[f"i2t_recall@{k}"]
        assert estimate.floor == pytest.approx(k / n)
        assert estimate.ceiling == pytest.approx(np.mean([min(1, k / reports.count(report)) for report in reports]))
    assert result.estimates["i2t_recall@1_text_class"].ceiling == 1.0


def test_the_image_is_the_first_frontal_by_file_name(folder: Path, fake_image: Callable[..., Image]) -> None:
    for document in task(folder).test_docs():
        assert document["file"] == f"{int(document['study_id'][1:])}_a.png"
    assert {d["file"].rpartition("_")[2] for d in task(folder, view="lateral").test_docs()} == {"0.png"}
    assert {d["file"].rpartition("_")[2] for d in task(folder, view=None).test_docs()} == {"0.png"}


def test_studies_without_report_or_frontal_are_left_out_and_counted(folder: Path, result: Any) -> None:
    test = [study for study in read_dataset(folder).studies if study.split == "test"]
    no_frontal = [s for s in test if all(image.view != "frontal" for image in s.images)]
    no_report = [s for s in test if s not in no_frontal and not text_of(s, "report")]
    assert no_frontal and no_report
    assert [d["study_id"] for d in result.documents] == [study.study_id for study in usable(folder)]
    assert result.details["counts"] == {
        "studies": len(test) - len(no_frontal) - len(no_report),
        "studies_without_frontal_image": len(no_frontal),
        "studies_without_report": len(no_report),
        "studies_with_report": len(usable(folder)),
        "studies_with_findings": sum(bool(s.findings) for s in usable(folder)),
        "studies_with_impression": sum(bool(s.impression) for s in usable(folder)),
    }


def test_requests_are_the_image_and_each_text_that_the_study_has(folder: Path) -> None:
    one = task(folder)
    for document, study in zip(one.test_docs(), usable(folder), strict=True):
        requests = one.construct_requests(document, "", metadata=("r", 0, 1))
        image, *texts = (request.arguments[0] for request in requests)
        assert image.path == folder / document["file"]
        parts = [part for part in (study.findings, study.impression) if part]
        assert [text.text for text in texts] == [" ".join(parts), *parts]
        assert {request.request_type for request in requests} == {"embed"}
        assert not any(text in str(document) for text in parts)  # documents hold hashes alone


def test_the_share_of_cut_texts_is_told(folder: Path, result: Any) -> None:
    studies = usable(folder)
    for which in ("report", "findings", "impression"):
        texts = [text_of(study, which) for study in studies if text_of(study, which)]
        assert result.details["truncated_share"][which] == pytest.approx(np.mean([len(text) > 25 for text in texts]))


def test_a_model_that_does_not_say_has_no_share(folder: Path, score: Callable[..., Any]) -> None:
    silent = score(task(folder), lambda requests: [Embedding(e.vector) for e in noise(requests)])
    assert set(silent.details["truncated_share"].values()) == {None}


def test_rows_may_come_in_any_order(folder: Path, result: Any) -> None:
    order = np.random.default_rng(1).permutation(len(result.rows))
    assert task(folder).estimates([result.rows[k] for k in order]) == result.estimates


@pytest.mark.filterwarnings("error")
def test_a_set_without_labels_and_impressions_says_what_is_undefined(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: Callable[..., Image], score: Callable[..., Any]
) -> None:
    studies = [Study(f"s{k}", f"p{k}", (fake_image(f"{k}.png"),), findings=f"text {k}", split="test") for k in range(9)]
    result = score(task(write_set(tmp_path / "set", studies)), noise)
    labels, impression = (result.estimates[f"i2t_recall@1_{x}"] for x in ("label_overlap", "impression"))
    assert np.isnan(labels.value) and labels.reason == "no query has a hit"
    assert np.isnan(impression.value) and impression.reason == "no study has any impression"
    assert result.details["label_source"] is None
    assert np.isfinite(result.value("i2t_recall@1"))


def test_lower_ranks_and_higher_recalls_are_better(folder: Path) -> None:
    better = task(folder).higher_is_better()
    assert {name for name, higher in better.items() if not higher} == {"i2t_median_rank", "t2i_median_rank"}


def test_a_report_is_the_findings_then_the_impression() -> None:
    assert study_texts(Study("s", "p", findings=" a ", impression="b")) == {
        "report": "a b",
        "findings": "a",
        "impression": "b",
    }
    assert study_texts(Study("s", "p", findings=" ", impression="b")) == {"report": "b", "impression": "b"}
    assert study_texts(Study("s", "p", findings=" ", indication="cough")) == {}


def test_a_misspelt_view_is_refused_with_the_views_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"frontal \d+, lateral \d+"):
        task(folder, view="frotal").test_docs()
