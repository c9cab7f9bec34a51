from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.api.instance import Instance

from medvlm_harness import plugin
from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.entities import EntityExtractor
from medvlm_harness.metrics.mesh import coded_findings, described_findings, entity_phrases
from medvlm_harness.metrics.radgraph import radgraph_f1_simple
from medvlm_harness.metrics.sentences import split_sentences
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import Generation
from medvlm_harness.tracks.entities import Entities, as_json
from medvlm_harness.tracks.entity_metrics import best_constant_findings

DECLARED = yaml.safe_load(
    (plugin.tasks_folder() / "demo_cxr" / "demo_cxr_entities.yaml").read_text().replace("!function ", "")
)
ANNOTATED = ("entity_f1", "entity_words_f1", "status_agreement")
CODED = ("mesh_f1", "mesh_precision", "mesh_recall")


def task(folder: Path, **config: Any) -> Entities:
    metadata = {"version": 1, "data_dir": str(folder), **config.pop("metadata", {})}
    return Entities({"task": "e", "dataset": "x", "prompt": DECLARED["prompt"], **config, "metadata": metadata})


def by_study(write: Callable[[Study], str], studies: Sequence[Study]) -> Callable[[Sequence[Instance]], list[Any]]:
    texts = {study.study_id: write(study) for study in studies}
    return lambda requests: [Generation(texts[request.doc["study_id"]], finished=True) for request in requests]


def baseline(kind: Any) -> Callable[[Sequence[Instance]], list[Any]]:
    return BaselineBackend(kind=kind).generate_until


def test_studies(data: Dataset) -> list[Study]:
    return [study for study in data.studies if study.split == "test"]


test_studies.__test__ = False  # type: ignore[attr-defined]


def coded_as_list(study: Study) -> str:
    return as_json([(finding, "present") for finding in sorted(coded_findings(study.mesh) or ())])


@pytest.fixture(scope="module")
def perfect(demo: Dataset, score: Callable[..., Any]) -> Any:
    return score(task(demo.folder), by_study(coded_as_list, demo.studies))


@pytest.fixture(scope="module")
def gold_file(demo: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entities of the demo reports by the extractor, which stand in for a human's annotations."""
    extractor = EntityExtractor()
    texts = {study.study_id: f"{study.findings} {study.impression}".strip() for study in demo.studies}
    path = tmp_path_factory.mktemp("gold") / "gold.json"
    path.write_text(json.dumps(extractor.extract_all(texts)))
    return path


# --- against codes


def test_the_prompt_asks_for_json_and_holds_the_report(demo: Dataset) -> None:
    document = task(demo.folder).test_docs()[0]
    study = next(one for one in demo.studies if one.study_id == document["study_id"])
    assert study.findings in document["prompt"] and study.impression in document["prompt"]
    assert '[{"finding": "small left pleural effusion", "status": "present"}' in document["prompt"]
    assert "{{" not in document["prompt"]


def test_studies_that_nobody_indexed_are_left_out_and_counted(demo: Dataset, perfect: Any) -> None:
    studies = test_studies(demo)
    no_report = [s for s in studies if not (s.findings or s.impression)]
    not_indexed = [s for s in studies if s not in no_report and coded_findings(s.mesh) is None]
    assert not_indexed
    counts = perfect.details["counts"]
    assert counts["studies_not_indexed"] == len(not_indexed)
    assert counts["studies"] == len(studies) - len(no_report) - len(not_indexed) == len(perfect.documents)
    assert not {d["study_id"] for d in perfect.documents} & {s.study_id for s in not_indexed}


def test_listing_the_codes_scores_one(perfect: Any) -> None:
    for name in ("mesh_f1", "mesh_precision", "mesh_recall"):
        estimate = perfect.estimates[name]
        assert estimate.value == 1.0
        assert estimate.floor < 1.0
    assert perfect.value("answers_parsed") == 1.0
    assert perfect.value("items_unparsed") == 0.0


def test_scores_are_micro_counts_over_studies(demo: Dataset, score: Callable[..., Any]) -> None:
    rng = np.random.default_rng(3)
    names = sorted({f for s in demo.studies for f in coded_findings(s.mesh) or ()})
    written = {
        s.study_id: [(str(rng.choice(names)), str(rng.choice(["present", "absent", "uncertain"]))) for _ in range(3)]
        for s in demo.studies
    }
    result = score(task(demo.folder), by_study(lambda s: as_json(written[s.study_id]), demo.studies))
    matched = predicted = known = 0
    for study in test_studies(demo):
        coded = coded_findings(study.mesh)
        if coded is None or not (study.findings or study.impression):
            continue
        # What is listed as absent is not found.
        said = set().union(*(described_findings([p]) for p, status in written[study.study_id] if status != "absent"))
        matched, predicted, known = matched + len(said & coded), predicted + len(said), known + len(coded)
    assert result.value("mesh_precision") == pytest.approx(matched / predicted)
    assert result.value("mesh_recall") == pytest.approx(matched / known)
    assert result.value("mesh_f1") == pytest.approx(2 * matched / (predicted + known))
    assert result.estimates["mesh_f1"].positives == known
    low, high = result.estimates["mesh_f1"].ci95
    assert low < result.value("mesh_f1") < high


@pytest.mark.parametrize("kind", ["constant", "copy"])
def test_a_floor_scores_as_a_model_what_stands_beside_the_scores(
    demo: Dataset, perfect: Any, score: Callable[..., Any], kind: str
) -> None:
    result = score(task(demo.folder), baseline(kind))
    for name in CODED:
        assert perfect.estimates[name].extra["floors"][kind] == pytest.approx(result.value(name), nan_ok=True)
    assert result.value("answers_parsed") == 1.0
    floors = perfect.estimates["mesh_f1"].extra["floors"]
    assert perfect.estimates["mesh_f1"].floor == max(floors["constant"], floors["copy"])


def test_the_rules_are_named_beside_the_floors_and_are_none(demo: Dataset, perfect: Any) -> None:
    extractor = EntityExtractor()
    matched = total = 0
    for document in perfect.documents:
        study = next(s for s in demo.studies if s.study_id == document["study_id"])
        coded = coded_findings(study.mesh) or frozenset()
        text = f"{study.findings} {study.impression}".strip()
        said = described_findings(entity_phrases(extractor.extract(text)["entities"]))
        matched, total = matched + len(said & coded), total + len(said) + len(coded)
    estimate = perfect.estimates["mesh_f1"]
    assert estimate.extra["floors"]["rules"] == pytest.approx(2 * matched / total)
    assert estimate.extra["rules"].startswith("rules ")
    assert estimate.floor < estimate.extra["floors"]["rules"]


def test_the_constant_list_is_the_best_of_the_train_split(demo: Dataset) -> None:
    train = [coded_findings(s.mesh) for s in demo.studies if s.split == "train"]
    coded = [one for one in train if one is not None]
    best = best_constant_findings(coded)

    def f1(listed: Sequence[str]) -> float:
        said = described_findings(listed)
        return 2 * sum(len(said & one) for one in coded) / (len(said) * len(coded) + sum(map(len, coded)))

    counts = {name: sum(name in one for one in coded) for one in coded for name in one}
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    assert f1(best) == pytest.approx(max(f1(ranked[:k]) for k in range(1, len(ranked) + 1)))
    listed = json.loads(task(demo.folder).details()["constant_floor"])
    assert [one["finding"] for one in listed] == list(best)


def test_every_coded_finding_is_described_by_its_own_name(demo: Dataset) -> None:
    """So that a constant list, and a perfect answer, can be written in these names."""
    names = {f for s in demo.studies for f in coded_findings(s.mesh) or ()}
    assert names and all(name in described_findings([name]) for name in names)


def test_the_copy_is_the_sentences_of_the_report(demo: Dataset) -> None:
    one = task(demo.folder)
    document = one.test_docs()[0]
    lines = one.floors_of(document)["copy"].split("\n")
    assert [line.removeprefix("- ") for line in lines] == split_sentences(document["source"])


def test_answers_that_are_no_lists_are_seen_to_be_none(demo: Dataset, score: Callable[..., Any]) -> None:
    prose = "the patient was examined and the radiologist looked at both views of the chest for quite some time"

    def write(requests: Sequence[Instance]) -> list[str]:
        return [["", prose, "[]", "[{", "mass"][int(r.doc["study_id"][-1]) % 5] for r in requests]

    result = score(task(demo.folder), write)
    share = np.mean([int(d["study_id"][-1]) % 5 in (2, 4) for d in result.documents])
    assert result.value("answers_parsed") == pytest.approx(share)
    unparsed = np.mean([int(d["study_id"][-1]) % 5 == 1 for d in result.documents])
    assert result.value("items_unparsed") == pytest.approx(unparsed)
    assert task(demo.folder).higher_is_better()["items_unparsed"] is False
    assert result.details["answers_cut"] is None  # plain strings do not say


def test_a_model_that_lists_nothing_has_no_precision_and_no_zero_for_it(
    demo: Dataset, score: Callable[..., Any]
) -> None:
    result = score(task(demo.folder), lambda requests: [Generation("[]", finished=False) for _ in requests])
    assert np.isnan(result.value("mesh_precision")) and result.estimates["mesh_precision"].reason
    assert result.value("mesh_recall") == result.value("mesh_f1") == 0.0
    assert result.details["answers_cut"] == len(result.documents)


def test_records_are_per_study_and_score(perfect: Any) -> None:
    assert {record["label"] for record in perfect.records} == {"mesh_f1", "items_listed", "items_unparsed"}
    assert len(perfect.records) == 3 * len(perfect.documents)
    values = {r["value"] for r in perfect.records if r["label"] == "mesh_f1"}
    assert values == {1.0, None}  # None: nothing coded, nothing listed


def test_no_rows_give_no_numbers(demo: Dataset) -> None:
    one = task(demo.folder)
    assert all(np.isnan(e.value) and e.reason == "no study" for e in one.estimates([]).values())
    assert list(one.score_records([])) == []


def test_a_set_without_codes_says_what_it_has(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    folder = write_set(tmp_path / "set", [Study("a", "a", findings="Clear lungs.", split="test")])
    with pytest.raises(UserError, match="a report in 1 and codes of an indexer in 0, never both"):
        task(folder).test_docs()


# --- against annotations


@pytest.fixture(scope="module")
def annotated(demo: Dataset, gold_file: Path, score: Callable[..., Any]) -> Any:
    gold = json.loads(gold_file.read_text())

    def write(requests: Sequence[Instance]) -> list[Any]:
        found = [gold[r.doc["study_id"]]["entities"].values() for r in requests]
        status = {"definitely present": "present", "definitely absent": "absent", "uncertain": "uncertain"}
        return [
            as_json([(e["tokens"], status[e["label"].rpartition("::")[2]]) for e in one if e["label"][0] == "O"])
            for one in found
        ]

    return score(task(demo.folder, metadata={"gold": str(gold_file)}), write)


def test_with_annotations_every_annotated_study_is_scored_against_them(demo: Dataset, annotated: Any) -> None:
    assert [d["study_id"] for d in annotated.documents] == [
        s.study_id for s in test_studies(demo) if s.findings or s.impression
    ]
    assert tuple(annotated.estimates) == (*ANNOTATED, "answers_parsed", "items_unparsed")
    assert annotated.details["truth"] == "annotations"
    assert annotated.details["counts"]["studies_annotated_on_another_text"] == 0


def test_listing_the_annotated_observations_scores_one(annotated: Any, gold_file: Path) -> None:
    gold = json.loads(gold_file.read_text())
    observed = [
        any(e["label"].startswith("Observation") for e in gold[d["study_id"]]["entities"].values())
        for d in annotated.documents
    ]
    for name in ("entity_f1", "entity_words_f1"):
        assert annotated.value(name) == pytest.approx(np.mean(observed))  # 0 where nothing is annotated
        floors: Mapping[str, float] = annotated.estimates[name].extra["floors"]
        assert floors["rules"] == pytest.approx(annotated.value(name))  # the annotator is the extractor here
        assert 0 < floors["constant"] < 1 and 0 < floors["copy"] < 1
    assert annotated.value("status_agreement") == 1.0


@pytest.mark.parametrize("kind", ["constant", "copy"])
def test_floors_against_annotations_score_as_models_too(
    demo: Dataset, gold_file: Path, annotated: Any, score: Callable[..., Any], kind: str
) -> None:
    result = score(task(demo.folder, metadata={"gold": str(gold_file)}), baseline(kind))
    for name in ANNOTATED:
        assert annotated.estimates[name].extra["floors"][kind] == pytest.approx(result.value(name))


def test_annotations_of_test_studies_alone_leave_no_constant(demo: Dataset, gold_file: Path, tmp_path: Path) -> None:
    test = {s.study_id for s in test_studies(demo)}
    part = tmp_path / "gold.json"
    part.write_text(json.dumps({k: v for k, v in json.loads(gold_file.read_text()).items() if k in test}))
    one = task(demo.folder, metadata={"gold": str(part)})
    assert set(one.floors_of(one.test_docs()[0])) == {"copy"}
    assert one.details()["constant_floor"] is None


def test_annotations_of_other_studies_are_refused(demo: Dataset, gold_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "gold.json"
    other.write_text(json.dumps({f"x{k}": v for k, v in json.loads(gold_file.read_text()).items()}))
    with pytest.raises(UserError, match="expected gold to have study ids of demo_cxr as keys"):
        task(demo.folder, metadata={"gold": str(other)}).test_docs()
    with pytest.raises(UserError, match="Expected a RadGraph file"):
        task(demo.folder, metadata={"gold": str(tmp_path / "nowhere.json")}).test_docs()


def test_annotations_of_part_of_the_report_are_counted(demo: Dataset, tmp_path: Path) -> None:
    extractor = EntityExtractor()
    path = tmp_path / "findings.json"
    path.write_text(json.dumps(extractor.extract_all({s.study_id: s.findings for s in demo.studies if s.findings})))
    details = task(demo.folder, metadata={"gold": str(path)}).details()
    both = [s for s in test_studies(demo) if s.findings and s.impression]
    assert details["counts"]["studies_annotated_on_another_text"] == len(both) > 0


def test_equal_entities_give_radgraphs_own_score(annotated: Any, gold_file: Path) -> None:
    read = json.loads(gold_file.read_text())
    gold = [read[d["study_id"]]["entities"] for d in annotated.documents]
    assert annotated.value("entity_f1") == pytest.approx(radgraph_f1_simple(gold, gold).mean(), abs=0.02)
