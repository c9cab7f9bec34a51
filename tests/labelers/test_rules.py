from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import pytest
import yaml

from medvlm_harness.data.chexpert import CHEXPERT_13, CHEXPERT_14
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.rules import OTHER, Mention, RulesLabeler, aggregate

SHORT = {
    "mediastinum": "Enlarged Cardiomediastinum",
    "cardiomegaly": "Cardiomegaly",
    "lesion": "Lung Lesion",
    "opacity": "Lung Opacity",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "other": "Pleural Other",
    "fracture": "Fracture",
    "devices": "Support Devices",
}
WRITTEN = yaml.safe_load(Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8"))
SENTENCES = [
    pytest.param(sentence, {SHORT[name]: value for name, value in expected.items()}, id=f"{kind}: {sentence}")
    for kind, sentences in WRITTEN.items()
    for sentence, expected in sentences.items()
]


def mentioned(labels: dict[str, int | None]) -> dict[str, int]:
    """What is said, without `No Finding`, which is derived."""
    return {name: value for name, value in labels.items() if value is not None and name != "No Finding"}


def mention(label: str, value: int, text: str = "") -> Mention:
    return Mention(label, text, 0, 1, value)


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES)
def test_each_kind_of_sentence_is_read_as_a_radiologist_means_it(
    rules: RulesLabeler, sentence: str, expected: dict[str, int]
) -> None:
    assert mentioned(rules.label(sentence)) == expected


def test_case_and_line_breaks_change_nothing(rules: RulesLabeler) -> None:
    for parameters in SENTENCES:
        sentence = str(parameters.values[0])
        labels = rules.label(sentence)
        assert rules.label(sentence.upper()) == labels
        for width in (20, 35):
            assert rules.label(textwrap.fill(sentence, width)) == labels, textwrap.fill(sentence, width)


def test_a_sentence_before_or_behind_changes_nothing(rules: RulesLabeler) -> None:
    """What one sentence denies or doubts never reaches into the next."""
    for parameters in SENTENCES:
        sentence, expected = str(parameters.values[0]), parameters.values[1]
        if sentence.isupper() or ":" in sentence:
            continue  # a head changes what is read
        around = f"No free air. {sentence.rstrip('.')}. Possible hiatal hernia."
        assert mentioned(rules.label(around)) == expected, around


def test_the_shared_sentences_are_all_right(rules: RulesLabeler, shared: Path) -> None:
    with (shared / "labeler" / "sentences.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 30
    for row in rows:
        pairs = (part.partition("=") for part in row["labels"].split(";") if part.strip())
        expected = {name.strip(): int(value) for name, _, value in pairs}
        assert mentioned(rules.label(row["sentence"])) == expected, row["sentence"]


def test_positive_beats_uncertain_beats_negative() -> None:
    labels = aggregate([mention("Edema", 0), mention("Edema", -1), mention("Edema", 1)])
    assert labels["Edema"] == 1
    assert aggregate([mention("Edema", 0), mention("Edema", -1)])["Edema"] == -1
    assert aggregate([mention("Edema", 0), mention("Edema", 0)])["Edema"] == 0
    assert aggregate([])["Edema"] is None


@pytest.mark.parametrize(
    ("mentions", "expected"),
    [
        ([], 1),
        ([mention("Edema", 0), mention("Pneumothorax", 0)], 1),
        ([mention("Support Devices", 1)], 1),
        ([mention("Edema", -1)], None),
        ([mention("Fracture", 1)], None),
        ([mention(OTHER, 1)], None),
        ([mention(OTHER, -1)], None),
        ([mention(OTHER, 0)], 1),
    ],
)
def test_no_finding_is_positive_or_nothing(mentions: list[Mention], expected: int | None) -> None:
    assert aggregate(mentions)["No Finding"] == expected


@pytest.mark.parametrize("text", ["heart failure", "CHF"])
def test_heart_failure_makes_the_heart_uncertain_where_nothing_says_more(text: str) -> None:
    failure = mention("Edema", 1, text)
    assert aggregate([failure])["Cardiomegaly"] == -1
    assert aggregate([failure, mention("Cardiomegaly", 1)])["Cardiomegaly"] == 1
    assert aggregate([failure, mention("Cardiomegaly", 0)])["Cardiomegaly"] == -1
    assert aggregate([mention("Edema", 0, text)])["Cardiomegaly"] is None


def test_other_findings_block_no_finding_and_are_no_label(rules: RulesLabeler) -> None:
    assert rules.label("Calcified granuloma in the left lung.") == dict.fromkeys(CHEXPERT_14)
    assert rules.label("No hernia.") == {**dict.fromkeys(CHEXPERT_13), "No Finding": 1}


def test_a_device_alone_leaves_no_finding(rules: RulesLabeler) -> None:
    labels = rules.label("Left chest tube in place. The lungs are clear.")
    assert (labels["Support Devices"], labels["No Finding"]) == (1, 1)


@pytest.mark.parametrize("text", ["", "  \n ", "INDICATION: chest pain", "HISTORY: pneumonia", "IMPRESSION:"])
def test_nothing_to_read_is_unlabelled_not_normal(rules: RulesLabeler, text: str) -> None:
    assert rules.label(text) == dict.fromkeys(CHEXPERT_14)


def test_labels_come_in_chexperts_names(rules: RulesLabeler) -> None:
    assert set(rules.label("Clear lungs.")) == set(CHEXPERT_14)


def test_one_section_alone_is_read_where_that_is_asked_for() -> None:
    report = "FINDINGS: Small left effusion. No edema.\n\nIMPRESSION: Mild edema."
    both, findings, impression = (
        RulesLabeler(sections).label(report) for sections in ("both", "findings", "impression")
    )
    assert (both["Pleural Effusion"], both["Edema"]) == (1, 1)
    assert (findings["Pleural Effusion"], findings["Edema"]) == (1, 0)
    assert (impression["Pleural Effusion"], impression["Edema"]) == (None, 1)


def test_mentions_show_where_labels_come_from(rules: RulesLabeler) -> None:
    mentions = rules.mentions("Small left effusion, no pneumothorax.")
    assert [(m.label, m.text, m.start, m.end, m.value) for m in mentions] == [
        ("Pleural Effusion", "effusion", 2, 3, 1),
        ("Pneumothorax", "pneumothorax", 5, 6, 0),
    ]


def test_habits_of_the_public_labeler_are_repeated_only_where_that_is_asked_for(rules: RulesLabeler) -> None:
    habits = RulesLabeler(convention="chexpert_labeler")
    normal = "The heart size and vessels appear within normal limits."
    assert (rules.label(normal)["Cardiomegaly"], habits.label(normal)["Cardiomegaly"]) == (0, 1)
    silent = "The heart and lungs are shown."
    assert (rules.label(silent)["Cardiomegaly"], habits.label(silent)["Cardiomegaly"]) == (None, 1)
    spine = "Degenerative endplate changes."
    assert (rules.label(spine)["Support Devices"], habits.label(spine)["Support Devices"]) == (None, 1)
    assert habits.version != rules.version
    assert habits.version.endswith("-chexpert_labeler")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sections": "finding"}, "Expected sections to be one of both, findings, impression, but got 'finding'"),
        ({"convention": "chexpert"}, "Did you mean chexpert_labeler?"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        RulesLabeler(**options)


@pytest.mark.parametrize(
    "text", ["XXXX " * 50, "\x00\x01", "é" * 300, "(" * 200, "no " * 500, "? ? ?", "a/b/c", "1. 2. 3.", "\u2028"]
)
def test_strange_text_is_read_without_a_fault(rules: RulesLabeler, text: str) -> None:
    assert mentioned(rules.label(text)) == {}


def test_the_same_text_gives_the_same_labels_in_any_order(rules: RulesLabeler) -> None:
    texts = [str(parameters.values[0]) for parameters in SENTENCES]
    forwards = [rules.label(text) for text in texts]
    another = RulesLabeler()
    assert [another.label(text) for text in texts] == forwards
    assert [rules.label(text) for text in reversed(texts)] == forwards[::-1]
