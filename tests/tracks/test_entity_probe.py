from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.radgraph import entity_span_f1
from medvlm_harness.requests import TokenVectors
from medvlm_harness.results.run import unsupported_reason
from medvlm_harness.tracks.entity_probe import EntityProbe, most_frequent_tags
from medvlm_harness.training.token_probe import TokenProbe, bio_tags, entities_of, word_vectors


def task(where: Path, **metadata: Any) -> EntityProbe:
    config = {"task": "p", "dataset": "radgraph"}
    return EntityProbe({**config, "metadata": {"version": 1, "radgraph": str(where), **metadata}})


def word(text: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(text.lower().encode())).standard_normal(24).astype(np.float32)


def token_vectors(text: str, longest: int = 10**6) -> TokenVectors:
    """A vector per word that knows its neighbours, and two pieces where a word is long."""
    words = text.split(" ")
    known = [word(""), *map(word, words), word("")]
    vectors, offsets, start = [], [], 0
    for k, one in enumerate(words):
        vector = np.concatenate([known[k], known[k + 1], known[k + 2]])
        cuts = [0, len(one)] if len(one) < 8 else [0, 4, len(one)]
        for a, b in pairwise(cuts):
            vectors.append(vector)
            offsets.append((start + a, start + b))
        start += len(one) + 1
    return TokenVectors(np.array(vectors[:longest]), tuple(offsets[:longest]))


def encoder(requests: Sequence[Instance]) -> list[TokenVectors]:
    return [token_vectors(request.arguments[0].text) for request in requests]


class Scored:
    """The task as lm-eval runs it, under a limit."""

    def __init__(self, one: EntityProbe, limit: int | None = None, samples: Sequence[int] | None = None) -> None:
        self.task = one
        asked = list(one.doc_iterator(limit=limit, samples=samples))
        self.numbers = [number for number, _ in asked]
        self.documents = [document for _, document in asked]
        self.rows = []
        for number, document in asked:
            request = one.construct_requests(document, "", metadata=("p", number, 1))
            results = one.process_results(document, encoder([request]))
            self.rows.append(next(iter(results.values())))
        self.estimates = one.estimates(self.rows)


@pytest.fixture(scope="module")
def scored(radgraph_files: Any) -> Scored:
    return Scored(task(radgraph_files.folder))


@pytest.fixture(scope="module")
def by_hand(radgraph_files: Any) -> list[dict[str, Any]]:
    """Independent: the probe, and its entities of the test reports in order of their keys."""
    train = [radgraph_files.train[key] for key in sorted(radgraph_files.train)]
    test = [radgraph_files.test[key] for key in sorted(radgraph_files.test)]
    features, unseen = (
        [word_vectors(one["text"], (v := token_vectors(one["text"])).vectors, v.offsets) for one in side]
        for side in (train, test)
    )
    tags = TokenProbe().fit(features, [bio_tags(one) for one in train]).predict(unseen)
    texts = [one["text"] for one in test]
    return [{"text": text, "entities": entities_of(text, own)} for text, own in zip(texts, tags, strict=True)]


def annotated(files: Any, name: str) -> list[dict[str, Any]]:
    return [{"text": one["text"], "entities": one[name]["entities"]} for _, one in sorted(files.test.items())]


def test_the_probe_learns_on_train_and_is_scored_on_exact_spans_by_both_annotators(
    radgraph_files: Any, scored: Scored, by_hand: list[dict[str, Any]]
) -> None:
    each = [entity_span_f1(by_hand, annotated(radgraph_files, name)) for name in ("labeler_1", "labeler_2")]
    estimate = scored.estimates["entity_span_f1"]
    assert estimate.value == pytest.approx(np.mean(each))
    assert estimate.n == len(radgraph_files.test)
    assert estimate.ci95[0] < estimate.value < estimate.ci95[1]
    human = entity_span_f1(annotated(radgraph_files, "labeler_2"), annotated(radgraph_files, "labeler_1"))
    assert estimate.ceiling == pytest.approx(human)
    assert estimate.value > 0.6  # and it is one that has learnt something
    assert tuple(scored.estimates) == scored.task.metric_names()


def test_each_label_is_scored_by_itself(radgraph_files: Any, scored: Scored, by_hand: list[dict[str, Any]]) -> None:
    def only(reports: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
        return [
            {**r, "entities": {k: {**e, "relations": []} for k, e in r["entities"].items() if e["label"] == label}}
            for r in reports
        ]

    for suffix, label in (("anatomy", "Anatomy::definitely present"), ("absent", "Observation::definitely absent")):
        each = [
            entity_span_f1(only(by_hand, label), only(annotated(radgraph_files, name), label))
            for name in ("labeler_1", "labeler_2")
        ]
        assert scored.estimates[f"entity_span_f1_{suffix}"].value == pytest.approx(np.mean(each))


def test_the_floor_is_each_words_most_frequent_tag(radgraph_files: Any, scored: Scored) -> None:
    counts: dict[str, dict[str, int]] = {}
    for one in radgraph_files.train.values():
        for token, tag in zip(one["text"].lower().split(), bio_tags(one), strict=True):
            counts.setdefault(token, {}).setdefault(tag, 0)
            counts[token][tag] += 1
    found = []
    for _, one in sorted(radgraph_files.test.items()):
        tags = []
        for token in one["text"].lower().split():
            own = counts.get(token, {"O": 1})
            tags.append(min(own, key=lambda tag, own=own: (-own[tag], tag)))  # type: ignore[misc]
        found.append({"text": one["text"], "entities": entities_of(one["text"], tags)})
    each = [entity_span_f1(found, annotated(radgraph_files, name)) for name in ("labeler_1", "labeler_2")]
    assert scored.estimates["entity_span_f1"].floor == pytest.approx(np.mean(each))


def test_the_rules_are_named_beside_it(radgraph_files: Any, scored: Scored) -> None:
    # They stand in for the first annotator here.
    gold = [annotated(radgraph_files, name) for name in ("labeler_1", "labeler_2")]
    estimate = scored.estimates["entity_span_f1"]
    each = [entity_span_f1(gold[0], one) for one in gold]
    assert each[0] == 1.0
    assert estimate.extra["floors"]["rules"] == pytest.approx(np.mean(each))
    assert estimate.extra["rules"].startswith("rules ")


def test_unknown_words_are_outside() -> None:
    tagger = most_frequent_tags([{"text": "No Mass ."}], [["O", "B-OBS-DA", "O"]])
    assert tagger("mass or edema") == ["B-OBS-DA", "O", "O"]


def test_training_reports_are_asked_for_under_a_limit_too(radgraph_files: Any, scored: Scored) -> None:
    limited = Scored(task(radgraph_files.folder), limit=3)
    splits = [document["split"] for document in limited.documents]
    assert splits == ["test"] * 3 + ["train"] * len(radgraph_files.train)
    n = len(radgraph_files.test)
    assert limited.numbers == [0, 1, 2, *range(n, n + len(radgraph_files.train))]
    assert limited.estimates["entity_span_f1"].n == 3
    details = limited.task.details()
    assert (details["documents"], details["scored"]) == (n, 3)
    assert details["probe"] == scored.task.details()["probe"]  # the same probe
    chosen = Scored(task(radgraph_files.folder), samples=[4, 1])
    assert [d["study_id"] for d in chosen.documents[:2]] == [sorted(radgraph_files.test)[k] for k in (4, 1)]
    assert len(chosen.documents) == 2 + len(radgraph_files.train)


def test_processes_share_the_reports_and_give_the_numbers_of_one(radgraph_files: Any, scored: Scored) -> None:
    one = task(radgraph_files.folder)
    shares = [list(one.doc_iterator(rank=rank, world_size=3)) for rank in range(3)]
    numbers = sorted(number for share in shares for number, _ in share)
    assert numbers == sorted(scored.numbers)
    rows = [scored.rows[scored.numbers.index(number)] for share in shares for number, _ in share]
    assert one.estimates(rows) == scored.estimates


def test_records_are_of_the_scored_reports_alone(radgraph_files: Any, scored: Scored, by_hand: Any) -> None:
    records = list(scored.task.score_records(scored.task.rows))
    assert [record["study"] for record in records] == sorted(radgraph_files.test)
    first = [
        np.mean([entity_span_f1([by_hand[0]], [annotated(radgraph_files, name)[0]])
                 for name in ("labeler_1", "labeler_2")])
    ]  # fmt: skip
    assert records[0]["value"] == pytest.approx(first[0])
    assert all(str(row) == row.study_id for row in scored.rows)  # logged without texts and vectors


def test_documents_hold_hashes_and_no_texts(radgraph_files: Any, scored: Scored) -> None:
    logged = json.dumps(scored.documents)
    assert not any(one["text"] in logged for one in radgraph_files.test.values())


def test_words_that_the_tokenizer_cut_are_counted(radgraph_files: Any) -> None:
    one = task(radgraph_files.folder)
    longest, expected, rows = 5, 0, []
    for number, document in one.doc_iterator():
        request = one.construct_requests(document, "", metadata=("p", number, 1))
        text = request.arguments[0].text
        cut = token_vectors(text, longest)
        reached = {len(text[:start].split(" ")) for start, _ in cut.offsets}
        expected += len(text.split(" ")) - len(reached)
        rows.append(next(iter(one.process_results(document, [cut]).values())))
    one.estimates(rows)
    assert one.details()["counts"]["words_cut_by_the_tokenizer"] == expected > 0


def test_without_a_training_file_the_way_to_give_one_is_told(radgraph_files: Any) -> None:
    with pytest.raises(UserError, match=r"train\.json and test\.json in one folder"):
        list(task(radgraph_files.folder / "test.json").doc_iterator())
    with pytest.raises(UserError, match="the probe learns on split train; choose another"):
        task(radgraph_files.folder, split="train")


def test_a_model_without_token_vectors_is_refused_with_the_reason(radgraph_files: Any) -> None:
    from medvlm_harness.model_backends.baseline import BaselineBackend

    reason = unsupported_reason(BaselineBackend(), task(radgraph_files.folder))
    assert reason == "medvlm-baseline cannot answer embed_tokens requests"


def test_no_rows_give_no_numbers(radgraph_files: Any) -> None:
    one = task(radgraph_files.folder)
    assert all(np.isnan(e.value) and e.reason == "no report" for e in one.estimates([]).values())
