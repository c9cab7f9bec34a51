from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.data.records import Dataset
from medvlm_harness.data.sources.base import ReadLog, read_rows
from medvlm_harness.data.sources.kaggle import REPORTS
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.base import compose_report
from medvlm_harness.labelers.rules import RulesLabeler
from medvlm_harness.perturbations.text import (
    TEXT_PERTURBATIONS,
    TextPerturbation,
    find_text_perturbation,
    flip_label,
    flip_question,
    paraphrases,
    perturb_text,
    prompt_variants,
)
from medvlm_harness.perturbations.text.guard import Edit, edited, reading
from medvlm_harness.perturbations.text.terms import terms
from medvlm_harness.requests import Label, LabelSet

DOCS = Path(__file__).resolve().parents[2] / "docs" / "text_perturbations.md"
REPORT = compose_report(
    "The heart is enlarged. Small left pleural effusion with pneumothorax. Lungs XXXX otherwise clear.",
    "No pneumonia, no fracture.",
)
LABELS = LabelSet.from_config("all", list(CHEXPERT_13)).labels
OF_REPORTS = [perturbation for perturbation in TEXT_PERTURBATIONS if "report" in perturbation.of]
GUARDED = [perturbation for perturbation in OF_REPORTS if not perturbation.control]
# Counted here by other means than the guard's: short forms spelt out one by one, then plain words.
CUES = re.compile(r"\b(?:no|not|without|neither|nor|none|negative|free|absent|cannot|excluded|resolved|removed)\b")
SIDES = re.compile(r"\b(?:left|right|bilateral(?:ly)?|bibasilar|biapical|both)\b")
SHORT = {
    r"\bw/o\b": "without",
    r"\bl\b": "left",
    r"\br\b": "right",
    r"\bbilat\b": "bilateral",
    r"\b([rl])([uml])l\b": lambda found: "right" if found[1] == "r" else "left",
}


def named(perturbation: TextPerturbation) -> str:
    return perturbation.name


def by_hand(text: str) -> tuple[list[str], list[str]]:
    text = text.lower()
    for short, long in SHORT.items():
        text = re.sub(short, long, text)
    return sorted(CUES.findall(text)), sorted(SIDES.findall(text))


def check_invariants(texts: list[str], perturbation: TextPerturbation, labeler: RulesLabeler) -> float:
    """Labels, cues and sides of every text, each at one of the severities; gives back the share that changed."""
    changed = 0
    for k, text in enumerate(texts):
        result = perturb_text(text, perturbation, 1 + k % len(perturbation.levels))
        changed += result.changed
        assert result.changed == (result.text != text)
        assert by_hand(result.text) == by_hand(text)
        assert result.text.count("XXXX") == text.count("XXXX")
        if result.changed:
            before = dict(reading(text, perturbation.read).labels)
            assert labeler.label(perturbation.read(result.text)) == before, result.text
    return changed / len(texts)


@pytest.mark.parametrize("perturbation", GUARDED, ids=named)
def test_demo_reports_read_as_before_and_some_change(demo: Dataset, perturbation: TextPerturbation) -> None:
    texts = [compose_report(study.findings, study.impression) for study in demo.studies]
    assert check_invariants([text for text in texts if text][:60], perturbation, RulesLabeler()) > 0.1


def test_a_thousand_real_reports_read_as_before_and_some_change(shared: Path, record_property: Any) -> None:
    rows = read_rows(shared / "data" / "iu_cxr" / REPORTS, ("uid", "findings", "impression"), ReadLog())
    texts = [compose_report(row["findings"], row["impression"]) for row in rows if row["findings"].strip()][:1000]
    assert len(texts) == 1000
    labeler = RulesLabeler()
    # Each report by every third perturbation, so that it takes seconds; benchmarks/text_perturbations.py does all.
    shares = {p.name: check_invariants(texts[k % 3 :: 3], p, labeler) for k, p in enumerate(GUARDED)}
    record_property("share changed", shares)
    assert min(shares.values()) > 0.3, shares


@pytest.mark.parametrize("perturbation", [p for p in GUARDED if p.name in ("typos", "abbreviations")], ids=named)
def test_without_the_guard_labels_would_change(demo: Dataset, perturbation: TextPerturbation) -> None:
    rng, severest = np.random.default_rng(0), perturbation.levels[-1]
    texts = [study.findings for study in demo.studies if study.findings][:40]
    assert any(reading(edited(t, perturbation.apply(t, severest, rng))) != reading(t) for t in texts)


@pytest.mark.parametrize(
    ("text", "edit", "wanted"),
    [
        ("No effusion. Clear lungs.", Edit(0, 3, ""), "No effusion. Clear lungs."),  # a cue
        ("Left effusion.", Edit(0, 4, "Right"), "Left effusion."),  # a side
        ("Left effusion.", Edit(5, 13, "opacity"), "Left effusion."),  # a label
        ("Effusion. Left effusion.", Edit(15, 23, "nodes"), "Effusion. Left effusion."),  # of the sentence alone
        ("Left effusion.", Edit(0, 4, "L"), "L effusion."),
    ],
)
def test_what_the_guard_keeps_back(text: str, edit: Edit, wanted: str) -> None:
    perturbation = TextPerturbation("one", ("report",), ("only",), lambda *_: [edit], "one edit")
    result = perturb_text(text, perturbation, 1)
    assert result == (wanted, wanted != text, int(wanted == text))


def test_one_bad_edit_takes_no_good_one_with_it() -> None:
    text = "Small left effusion, unchanged. Heart large."
    edits = [Edit(0, 5, "Smlal"), Edit(6, 10, "right"), Edit(21, 30, "unchangde"), Edit(38, 43, "lareg")]
    perturbation = TextPerturbation("four", ("report",), ("only",), lambda *_: edits, "four edits")
    assert perturb_text(text, perturbation, 1).text.startswith("Smlal left effusion, unchangde.")


@pytest.mark.parametrize("perturbation", TEXT_PERTURBATIONS, ids=named)
def test_severity_nought_is_the_text_itself(perturbation: TextPerturbation) -> None:
    assert perturb_text(REPORT, perturbation, 0) == (REPORT, False, 0)
    assert perturb_text("", perturbation, len(perturbation.levels)) == ("", False, 0)


def test_seeds_and_severities_differ_and_order_does_not_matter() -> None:
    typos = find_text_perturbation("typos")
    first = [perturb_text(REPORT, typos, 3, seed=seed).text for seed in range(6)]
    assert len(set(first)) > 3
    assert [perturb_text(REPORT, typos, 3, seed=seed).text for seed in reversed(range(6))] == first[::-1]
    edits = [len(typos.apply(REPORT * 20, rate, np.random.default_rng(0))) for rate in typos.levels]
    assert edits == sorted(set(edits))


SCRIPT = """
import sys
from medvlm_harness.perturbations.text import TEXT_PERTURBATIONS, perturb_text
for p in TEXT_PERTURBATIONS[:: int(sys.argv[2])]:
    print(p.identity(1, seed=3), ascii(perturb_text(sys.argv[1], p, len(p.levels), seed=3).text))
"""


def test_another_process_gives_the_same() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, REPORT, "-1"], capture_output=True, text=True, check=True, env=environment
    )
    here = [
        f"{p.identity(1, seed=3)} {perturb_text(REPORT, p, len(p.levels), seed=3).text!a}" for p in TEXT_PERTURBATIONS
    ]
    assert run.stdout.splitlines() == here[::-1]


def test_the_identity_names_all_that_decides() -> None:
    identities = {p.identity(s, seed=seed) for p in TEXT_PERTURBATIONS for s in range(2) for seed in range(2)}
    assert len(identities) == 4 * len(TEXT_PERTURBATIONS)
    labeler = RulesLabeler()
    assert all(labeler.version in identity for identity in identities)


def test_unknown_names_and_severities_are_refused() -> None:
    with pytest.raises(UserError, match=r"'sinonyms'\. Did you mean synonyms\?"):
        find_text_perturbation("sinonyms")
    with pytest.raises(UserError, match=r"severity of typos from 0 \(unchanged\) to 3, but got 4"):
        perturb_text(REPORT, find_text_perturbation("typos"), 4)


def test_typos_spare_cues_sides_heads_and_placeholders() -> None:
    text = "FINDINGS: <image> XXXX without bilateral negative absent excluded right"
    typos = find_text_perturbation("typos")
    assert not typos.apply(text, 1.0, np.random.default_rng(0))
    assert len(typos.apply(f"{text} moderate degenerative spurs", 1.0, np.random.default_rng(0))) == 3


def test_names_of_findings_are_misspelt_where_asked_and_can_still_be_read() -> None:
    text, names = "There is pneumothorax and consolidation.", ("pneumothorax", "consolidation")
    for name, wanted in (("typos", 0), ("typos_in_findings", 1)):
        results = [perturb_text(text, find_text_perturbation(name), 3, seed=seed).text for seed in range(20)]
        assert any(not all(word in result for word in names) for result in results) == wanted


def test_sections_change_places_whole_and_only_where_both_are() -> None:
    sections = find_text_perturbation("section_order")
    text = "INDICATION: cough.\n\nFINDINGS: Edema.\n\nImpression:\nHeart failure."
    assert (
        perturb_text(text, sections, 1).text == "INDICATION: cough.\n\nImpression:\nHeart failure.\n\nFINDINGS: Edema."
    )
    for other in ("FINDINGS: Edema.", "Edema. No effusion.", ""):
        assert not perturb_text(other, sections, 1).changed


def test_sentences_move_within_their_section_and_lists_do_not() -> None:
    order = find_text_perturbation("sentence_order")
    moved = perturb_text(REPORT, order, 1).text
    assert moved != REPORT
    assert moved.endswith("\n\nIMPRESSION: No pneumonia, no fracture.")
    assert sorted(moved) == sorted(REPORT)
    assert not perturb_text("1. Edema. 2. No effusion.", order, 1).changed


QUESTIONS = [label.question for label in LABELS]


@pytest.mark.parametrize("severity", [1, 2, 3, 4])
def test_questions_are_paraphrased(severity: int) -> None:
    paraphrase = find_text_perturbation("paraphrase")
    results = [perturb_text(f"<image>\n{question} Answer yes or no.", paraphrase, severity) for question in QUESTIONS]
    assert all(result.changed and result.text.startswith("<image>\n") for result in results)
    # Read as a statement, each says that the finding is there, as the question does.
    for question in QUESTIONS:
        assert reading(paraphrases(question)[severity - 1].rstrip("?")) == reading(question.rstrip("?"))


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Are there opacities?", "Are opacities visible on this image?"),
        ("Is there atelectasis?", "Is atelectasis visible on this image?"),
        ("Can opacities be seen on this image?", "Are there opacities?"),
        (
            "does this chest x-ray show a left pleural effusion?",
            "Is a left pleural effusion visible on this chest x-ray?",
        ),
    ],
)
def test_paraphrases_keep_number_and_the_word_for_the_image(question: str, wanted: str) -> None:
    found = paraphrases(question)
    assert wanted in found
    assert len(set(found)) == len(found) == 4
    assert question not in found


@pytest.mark.parametrize(
    "question",
    [
        "",
        "What is seen?",
        "Is the heart enlarged?",
        "Is there edema, and is it mild?",
        "Is there edema present?",
        "Edema.",
    ],
)
def test_questions_that_fit_no_template_have_none(question: str) -> None:
    assert paraphrases(question) == ()
    assert flip_question(question) is None


def test_every_instruction_stands_for_the_others() -> None:
    paraphrase = find_text_perturbation("paraphrase")
    for group in terms().instructions:
        for instruction in group:
            others = [perturb_text(instruction, paraphrase, k).text for k in range(1, len(group))]
            assert sorted([instruction, *others]) == sorted(group)


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.key)
def test_prompts_of_labels_say_the_same(label: Label) -> None:
    variants = prompt_variants(label)
    assert len(variants) >= 5
    assert len({(v.positive, v.negative) for v in (label, *variants)}) == len(variants) + 1
    labeler = RulesLabeler()
    for variant in variants:
        assert variant.name == label.name
        assert variant.question in paraphrases(label.question)
        for (new,), (old,) in ((variant.positive, label.positive), (variant.negative, label.negative)):
            assert labeler.label(new) == labeler.label(old)


def test_options_without_denials_are_framed_alone() -> None:
    option = Label("2", ("a fundus photograph with drusen",))
    assert {variant.positive for variant in prompt_variants(option)} == {
        ("image: a fundus photograph with drusen",),
        ("a fundus photograph with drusen.",),
    }


def test_prompts_name_the_kind_of_image() -> None:
    (edema,) = LabelSet.from_config("one", ["Edema"]).labels
    pairs = [(v.positive[0], v.negative[0]) for v in prompt_variants(edema, image="chest radiograph")]
    assert ("chest radiograph with edema", "chest radiograph without edema") in pairs
    assert ("this chest radiograph shows edema", "this chest radiograph shows no edema") in pairs


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("There is a left pleural effusion.", "There is no left pleural effusion."),
        ("No pneumothorax or pleural effusion.", "Pneumothorax and pleural effusion."),
        ("Pneumonia is not seen.", "Pneumonia is seen."),
        ("The heart is enlarged.", "The heart is not enlarged."),
        ("<image>\nIs there edema? Answer yes or no.", "<image>\nCan edema be ruled out? Answer yes or no."),
        ("No pneumonia, no fracture.", "No pneumonia, no fracture."),  # one of the two would stay denied
        ("Possible pneumonia.", "Possible pneumonia."),  # neither there nor denied
        ("Clear lungs.", "Clear lungs."),
    ],
)
def test_the_control_says_the_opposite_where_that_can_be_read(text: str, wanted: str) -> None:
    assert perturb_text(text, find_text_perturbation("polarity_flip"), 1).text == wanted


def test_the_control_inverts_the_labels_of_demo_reports(demo: Dataset) -> None:
    flip, labeler = find_text_perturbation("polarity_flip"), RulesLabeler()
    assert flip.control
    sentences = {s for study in demo.studies for s in re.findall(r"[^.\n]+\.", study.findings)}
    inverted = 0
    for sentence in sorted(sentences)[:300]:
        result = perturb_text(sentence.strip(), flip, 1)
        if result.changed:
            old, new = labeler.label(sentence), labeler.label(result.text)
            said = [name for name in CHEXPERT_13 if old[name] is not None]
            assert said
            assert all({old[name], new[name]} == {0, 1} for name in said)
            inverted += 1
    assert inverted > 30


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.key)
def test_flipped_labels_ask_and_say_the_opposite(label: Label) -> None:
    flipped = flip_label(label)
    assert (flipped.name, flipped.positive, flipped.negative) == (label.name, label.negative, label.positive)
    assert flipped.question == f"Can {label.positive[0]} be ruled out?"


def test_what_cannot_be_flipped_is_refused() -> None:
    with pytest.raises(UserError, match="to have negative phrases"):
        flip_label(Label("a", ("edema",)))
    with pytest.raises(UserError, match="to have a question like"):
        flip_label(Label("a", ("edema",), ("no edema",), "How much edema?"))
    assert flip_question("Is there no edema?") is None


def test_terms_are_in_order() -> None:
    known = terms()
    for table in (known.abbreviations, known.synonyms):
        assert all(phrase == " ".join(phrase.lower().split()) for phrase in table)
    assert not {phrase for phrase, others in known.synonyms.items() if phrase in others}


def test_synonyms_fit_the_article_before_them() -> None:
    synonyms = find_text_perturbation("synonyms")
    assert perturb_text("An osseous lesion.", synonyms, 3).text == "An osseous lesion."
    assert perturb_text("An opacity.", synonyms, 3).text == "An opacification."
    assert perturb_text("The osseous lesion.", synonyms, 3).text == "The bony lesion."


def test_the_examples_of_the_documentation_are_what_comes_out() -> None:
    rows = [
        [cell.strip().strip("`").replace("↵", "\n") for cell in line.strip("|").split(" | ")]
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and line.count(" | ") == 4
    ]
    for name, severity, text, wanted, kept_back in rows:
        result = perturb_text(text, find_text_perturbation(name), int(severity))
        assert (result.text, result.kept_back) == (wanted, int(kept_back.strip(" |")))
        assert result.changed
    assert {row[0] for row in rows} == {perturbation.name for perturbation in TEXT_PERTURBATIONS}
