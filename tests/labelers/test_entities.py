from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medvlm_harness.labelers.entities import EntityExtractor
from medvlm_harness.labelers.radgraph_json import read_radgraph

LABELS = {
    "A": "Anatomy::definitely present",
    "O": "Observation::definitely present",
    "ON": "Observation::definitely absent",
    "OU": "Observation::uncertain",
}
SIGNS = {"modify": ">", "located_at": "@", "suggestive_of": "~"}
SNIPPETS = yaml.safe_load(Path(__file__).with_name("snippets.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def extractor() -> EntityExtractor:
    return EntityExtractor()


def entities(extracted: dict[str, Any]) -> list[str]:
    short = {label: name for name, label in LABELS.items()}
    return [f"{entity['tokens']} {short[entity['label']]}" for entity in extracted["entities"].values()]


def relations(extracted: dict[str, Any]) -> set[str]:
    found = extracted["entities"]
    return {
        f"{entity['tokens']} {SIGNS[kind]} {found[target]['tokens']}"
        for entity in found.values()
        for kind, target in entity["relations"]
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet["text"])
def test_a_snippet_is_annotated_as_radgraph_would(extractor: EntityExtractor, snippet: dict[str, Any]) -> None:
    extracted = extractor.extract(snippet["text"])
    assert entities(extracted) == snippet["entities"]
    assert relations(extracted) == set(snippet["relations"])


def test_tokens_that_are_given_stay_as_they_are(extractor: EntityExtractor) -> None:
    tokens = [
        "___",
        "has",
        "no",
        "4",
        ".",
        "2",
        "cm",
        "mass",
        ",",
        "+/-",
        "edema",
        ".",
    ]  # spaCy would cut the first and "+/-"
    extracted = extractor.extract_tokens(tokens)
    assert extracted["text"].split(" ") == tokens
    assert "mass ON" in entities(extracted)
    for entity in extracted["entities"].values():
        assert entity["tokens"] == " ".join(tokens[entity["start_ix"] : entity["end_ix"] + 1])
    own = extractor.extract(extracted["text"])
    assert extractor.extract_tokens(own["text"].split(" ")) == own


def test_tokens_are_words_and_single_marks_and_indices_point_at_them(extractor: EntityExtractor) -> None:
    extracted = extractor.extract("No ill-defined (4.2 cm) mass;  XXXX effusion?")
    tokens = extracted["text"].split(" ")
    assert tokens == ["No", "ill", "-", "defined", "(", "4", ".", "2", "cm", ")", "mass", ";", "XXXX", "effusion", "?"]
    for entity in extracted["entities"].values():
        assert " ".join(tokens[entity["start_ix"] : entity["end_ix"] + 1]) == entity["tokens"]


def test_text_that_is_split_already_is_kept(extractor: EntityExtractor) -> None:
    for snippet in SNIPPETS:
        first = extractor.extract(snippet["text"])
        assert extractor.extract(first["text"]) == first


def test_entities_are_numbered_in_order_and_never_overlap(extractor: EntityExtractor) -> None:
    extracted = extractor.extract(" ".join(snippet["text"] for snippet in SNIPPETS))
    assert list(extracted["entities"]) == [str(n) for n in range(1, len(extracted["entities"]) + 1)]
    last = -1
    for entity in extracted["entities"].values():
        assert last < entity["start_ix"] <= entity["end_ix"]
        last = entity["end_ix"]
        for kind, target in entity["relations"]:
            assert kind in SIGNS
            assert target in extracted["entities"]


def test_relations_never_cross_a_sentence(extractor: EntityExtractor) -> None:
    extracted = extractor.extract("The right lung. Clear. Large effusion. Left base.")
    tokens = extracted["text"].split(" ")
    sentence = [tokens[:i].count(".") for i in range(len(tokens))]
    for entity in extracted["entities"].values():
        for _, target in entity["relations"]:
            assert sentence[entity["start_ix"]] == sentence[extracted["entities"][target]["start_ix"]]


def test_case_changes_no_status(extractor: EntityExtractor) -> None:
    text = "No change in the small left effusion, likely reactive. No pneumothorax."
    lower, upper = extractor.extract(text.lower()), extractor.extract(text.upper())
    assert [e["label"] for e in lower["entities"].values()] == [e["label"] for e in upper["entities"].values()]


@pytest.mark.parametrize("text", ["", "   ", "XXXX XXXX .", "INDICATION: pneumonia", "1 . 2 . 3 .", "- - -", "\n\n"])
def test_nothing_to_extract_is_nothing(extractor: EntityExtractor, text: str) -> None:
    assert extractor.extract(text)["entities"] == {}


def test_what_is_written_can_be_read_back_and_says_what_made_it(extractor: EntityExtractor, tmp_path: Path) -> None:
    written = extractor.extract_all({"a": "Small effusion.", "b": "Clear lungs."})
    assert written["a"]["metadata"] == {
        "extractor": "rules",
        "version": extractor.version,
        "relations": "approximate: adjacency rules",
    }
    path = tmp_path / "entities.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    read = read_radgraph(path)
    assert {key: report.annotations["entities"] for key, report in read.items()} == {
        key: report["entities"] for key, report in written.items()
    }


def test_the_shared_snippets_agree(extractor: EntityExtractor, shared: Path) -> None:
    """Simple RadGraph F1 and agreement of status, each computed straight from its definition."""
    scores, same, both = [], 0, 0
    reports = read_radgraph(shared / "labeler" / "entities.jsonl")
    assert len(reports) > 40
    for report in reports.values():
        gold, found = report.annotations["entities"], extractor.extract(report.text)["entities"]
        wanted = {(entity["tokens"].lower(), entity["label"]) for entity in gold.values()}
        given = {(entity["tokens"].lower(), entity["label"]) for entity in found.values()}
        scores.append(2 * len(wanted & given) / (len(wanted) + len(given)))
        by_token = [
            {i: e["label"] for e in side.values() for i in range(e["start_ix"], e["end_ix"] + 1) if "Obs" in e["label"]}
            for side in (gold, found)
        ]
        for i in by_token[0].keys() & by_token[1].keys():
            both += 1
            same += by_token[0][i] == by_token[1][i]
    assert sum(scores) / len(scores) >= 0.9
    assert same / both >= 0.95
