from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from medvlm_harness.data.chexpert import CHEXPERT_5, CHEXPERT_14
from medvlm_harness.data.records import Dataset, Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import make_labeler
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.requests import Generation
from medvlm_harness.tracks.summarization import Summarization
from medvlm_harness.tracks.text_scorer import TextScorer

FINDINGS = (
    "The heart is enlarged. No pleural effusion.",
    "The lungs are clear. Heart size is normal.",
    "Small left pleural effusion. No pneumothorax.",
    "Right lower lobe consolidation of 3 cm.",
)
IMPRESSIONS = ("Cardiomegaly.", "No acute disease.", "Small left pleural effusion.", "Right lower lobe pneumonia.")
PROMPT = "Findings: {findings}\nImpression:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    """Sixty studies of four kinds, some without a section; every second kind has its No Finding label."""
    studies = [
        Study(
            f"s{k:02}",
            f"p{k}",
            comparison="None." if k % 5 else "Chest radiograph of last year",
            findings="" if k % 11 == 7 else f"{FINDINGS[k % 4]} Study {k // 4}.",
            impression="" if k % 13 == 9 else IMPRESSIONS[k % 4],
            labels={"rules": {"No Finding": 1 if k % 4 == 1 else None}},
            split="train" if k < 30 else "test",
        )
        for k in range(60)
    ]
    return write_set(tmp_path_factory.mktemp("summarization") / "set", studies)


def task(folder: Path, **config: Any) -> Summarization:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    return Summarization({"task": "s", "dataset": "synthetic", "prompt": PROMPT, **config, "metadata": metadata})


def writes(text: Callable[[dict[str, Any]], str]) -> Callable[[Sequence[Instance]], list[str]]:
    return lambda requests: [text(request.doc) for request in requests]


def both_sections(folder: Path, split: str = "test") -> list[Study]:
    return [s for s in read_dataset(folder).studies if s.split == split and s.findings and s.impression]


def test_documents_are_the_studies_with_both_sections_with_or_without_an_image(folder: Path) -> None:
    documents = task(folder).documents
    usable = both_sections(folder)
    assert [(doc["study_id"], doc["source"], doc["target"]) for doc in documents] == [
        (study.study_id, study.findings, study.impression) for study in usable
    ]
    assert [doc["abnormal"] for doc in documents] == [study.impression != IMPRESSIONS[1] for study in usable]
    assert "image" not in documents[0]


def test_the_reference_itself_scores_one_and_has_no_lift(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(task(folder), writes(lambda doc: doc["target"]))
    for part in ("", "_abnormal"):
        for name in ("rouge1", "rougeL", "rougeLsum", "entity_f1_simple", "label_f1_micro_14"):
            if name.startswith("rouge"):
                assert scored.value(f"{name}{part}") == 1
        assert scored.value(f"label_f1_micro_14{part}") == 1
    lifts = [name for name in TextScorer.metric_names() if name.endswith("_lift")]
    assert {scored.value(name) for name in lifts if not math.isnan(scored.value(name))} == {0.0}


def test_scores_equal_those_of_independent_implementations(folder: Path, score: Callable[..., Any]) -> None:
    made = task(folder)
    texts = {doc["study_id"]: IMPRESSIONS[(k * 7) % 4] for k, doc in enumerate(made.documents)}
    scored = score(made, writes(lambda doc: texts[doc["study_id"]]))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    labeler = make_labeler("rules")
    for part, chosen in (("", scored.documents), ("_abnormal", [d for d in scored.documents if d["abnormal"]])):
        pairs = [(doc["target"], texts[doc["study_id"]]) for doc in chosen]
        for name in ("rouge1", "rouge2", "rougeL"):
            expected = np.mean([scorer.score(*pair)[name].fmeasure for pair in pairs])
            assert scored.value(f"{name}{part}") == pytest.approx(expected, abs=1e-12)
            assert scored.estimates[f"{name}{part}"].n == len(chosen)
        truth, found = (
            np.array([[labeler.label(pair[side])[name] in (1, -1) for name in CHEXPERT_14] for pair in pairs])
            for side in (0, 1)
        )
        five = [CHEXPERT_14.index(name) for name in CHEXPERT_5]
        for average in ("micro", "macro"):
            for size, columns in (("14", list(range(14))), ("5", five)):
                expected = f1_score(truth[:, columns], found[:, columns], average=average, zero_division=0)
                assert scored.value(f"label_f1_{average}_{size}{part}") == pytest.approx(expected, abs=1e-12)


def test_floors_stand_beside_each_score_and_are_what_the_floors_score(folder: Path, score: Callable[..., Any]) -> None:
    made = task(folder)
    kinds = made.floors_of(made.documents[0])
    assert set(kinds) == {"constant", "lead", "copy", "tfidf"}
    assert kinds["copy"] == made.documents[0]["source"]
    by_kind = {kind: score(task(folder), writes(lambda doc, k=kind: made.floors_of(doc)[k])) for kind in kinds}
    for name in ("rougeL", "rougeL_abnormal", "entity_f1_simple", "label_f1_macro_5_abnormal"):
        floors = {kind: scored.value(name) for kind, scored in by_kind.items()}
        for scored in by_kind.values():
            assert scored.estimates[name].extra["floors"] == pytest.approx(floors)
            assert scored.estimates[name].floor == pytest.approx(max(floors.values()))


def test_an_error_that_is_put_in_raises_its_rate_over_the_human_one(folder: Path, score: Callable[..., Any]) -> None:
    wrong = {
        "contradiction": lambda doc: "Pleural effusion." if "No pleural" in doc["source"] else doc["target"],
        "unsupported_finding": lambda doc: f"{doc['target']} Pneumothorax.",
        "laterality_conflict": lambda doc: doc["target"].replace("left", "right"),
        "prior_without_prior": lambda doc: f"{doc['target']} No interval change since the prior study.",
        "measurement_not_in_source": lambda doc: f"{doc['target']} A nodule of 9 mm.",
        "repetition": lambda doc: " ".join(["The lungs are clear."] * 3),
        "empty": lambda doc: "",
        "truncated": lambda doc: "There is a small effusion in the",
    }
    for check, write in wrong.items():
        scored = score(task(folder), writes(write))
        estimate = scored.estimates[check]
        assert estimate.value > estimate.extra["reference"], check
        assert scored.value(f"{check}_lift") == pytest.approx(estimate.value - estimate.extra["reference"])


def test_silence_does_not_win(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(task(folder), writes(lambda doc: ""))
    assert scored.value("rougeL") == scored.value("entity_f1_simple") == scored.value("label_f1_micro_5") == 0
    assert (scored.value("empty"), scored.value("positive_recall")) == (1, 0)
    assert scored.value("omission_lift") > 0
    assert scored.value("positive_recall_lift") < 0


def test_the_length_limit_is_known_where_the_backend_says_it(folder: Path, score: Callable[..., Any]) -> None:
    cut = score(task(folder), writes(lambda doc: Generation(doc["target"], finished=False)))
    assert (cut.value("truncated"), cut.value("truncated_lift")) == (1, 1)
    whole = score(task(folder), writes(lambda doc: Generation("effusion of the", finished=True)))
    assert whole.value("truncated") == 0


def test_without_labels_the_labeler_says_what_is_abnormal(
    folder: Path, write_set: Callable[..., Path], tmp_path: Path
) -> None:
    bare = [
        Study(s.study_id, s.patient_id, findings=s.findings, impression=s.impression, split=s.split)
        for s in read_dataset(folder).studies
    ]
    made = task(write_set(tmp_path / "bare", bare))
    assert made.abnormal_by == "rules"
    assert [doc["abnormal"] for doc in made.documents] == [doc["abnormal"] for doc in task(folder).documents]


def test_a_set_without_abnormal_studies_has_no_score_on_them(
    write_set: Callable[..., Path], tmp_path: Path, score: Callable[..., Any]
) -> None:
    normal = [
        Study(f"s{k}", f"p{k}", findings="Clear lungs.", impression="Normal.", split=("train", "test")[k % 2],
              labels={"rules": {"No Finding": 1}})
        for k in range(6)
    ]  # fmt: skip
    scored = score(task(write_set(tmp_path / "normal", normal)), writes(lambda doc: "Normal."))
    assert scored.value("rougeL") == 1
    assert math.isnan(scored.value("rougeL_abnormal"))
    assert scored.estimates["label_f1_micro_14_abnormal"].reason == "no abnormal study"
    assert math.isnan(scored.value("critical_recall"))


def test_details_and_records_say_what_was_scored_and_by_what(folder: Path, score: Callable[..., Any]) -> None:
    scored = score(task(folder), writes(lambda doc: doc["target"]))
    details = scored.details
    studies = [study for study in read_dataset(folder).studies if study.split == "test"]
    assert details["counts"]["studies_without_findings"] == sum(not study.findings for study in studies)
    assert details["read_by"]["labeler"].startswith("rules ")
    assert set(details["label_f1"]) == set(CHEXPERT_14)
    assert details["abnormal_by"] == "rules"
    assert len(scored.records) == 7 * len(scored.documents)
    assert {record["label"] for record in scored.records} >= {"rougeL", "entity_f1_simple"}
    assert all(record["image"] is None for record in scored.records)
    values = [record["value"] for record in scored.records if record["label"] == "rougeL"]
    assert np.mean(values) == pytest.approx(scored.value("rougeL"))
    answers = {record["study"]: record["answer"] for record in scored.records}
    texts = {doc["study_id"]: doc["target"] for doc in scored.documents}
    assert len(set(answers.values())) == len(set(texts.values()))
    assert not any(answer in text for answer, text in zip(answers.values(), texts.values(), strict=True))


def test_a_split_without_reports_is_refused_with_counts(write_set: Callable[..., Path], tmp_path: Path) -> None:
    studies = [Study("a", "a", findings="Clear.", split="test"), Study("b", "b", impression="Normal.", split="test")]
    made = task(write_set(tmp_path / "halves", studies))
    with pytest.raises(UserError, match="findings in 1 and an impression in 1, 0 times both"):
        _ = made.documents


def test_a_set_without_a_train_split_cannot_have_floors_and_says_so(
    write_set: Callable[..., Path], tmp_path: Path
) -> None:
    studies = [Study("a", "a", findings="Clear.", impression="Normal.", split="test")]
    made = task(write_set(tmp_path / "test_only", studies))
    with pytest.raises(UserError, match="in split train has findings and impression"):
        made.floors_of(made.documents[0])


def test_an_unknown_labeler_is_refused_by_name(folder: Path) -> None:
    made = task(folder, metadata={"labeler": "rulez"})
    with pytest.raises(UserError, match=r"'rulez'.*Did you mean .*rules"):
        made.reader.labels("Clear lungs.")


def test_the_floors_of_real_reports_are_those_of_independent_measurements(
    iu_cxr: Dataset, score: Callable[..., Any]
) -> None:
    """A constant sentence near 0.490 ROUGE-L, near 0.34 on abnormal studies; copying the findings near 0.125."""
    made = Summarization(
        {"task": "s", "dataset": "iu_cxr", "prompt": PROMPT, "metadata": {"data_dir": str(iu_cxr.folder)}}
    )
    scored = score(made, writes(lambda doc: made.floors_of(doc)["constant"]))
    assert len(scored.documents) == 590
    floors: dict[str, Estimate] = scored.estimates["rougeL"].extra["floors"]
    assert scored.value("rougeL") == pytest.approx(0.490, abs=0.005)
    assert scored.value("rougeL_abnormal") == pytest.approx(0.34, abs=0.01)
    assert floors["copy"] == pytest.approx(0.125, abs=0.005)
