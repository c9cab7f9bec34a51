from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvlm_harness.metrics.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Heart size is normal. No effusion.", ["Heart size is normal.", "No effusion."]),
        ("A nodule of 3.5 cm is seen. Stable.", ["A nodule of 3.5 cm is seen.", "Stable."]),
        ("It measures 5 mm. in diameter. Stable.", ["It measures 5 mm. in diameter.", "Stable."]),
        ("It measures 5 mm. No effusion.", ["It measures 5 mm.", "No effusion."]),
        ("Discussed with Dr. Smith at 5 p.m. today.", ["Discussed with Dr. Smith at 5 p.m. today."]),
        ("Called at 5 p.m. No change.", ["Called at 5 p.m.", "No change."]),
        ("Scarring vs. atelectasis, e.g. at the base.", ["Scarring vs. atelectasis, e.g. at the base."]),
        ("History of CF. Lungs are clear.", ["History of CF.", "Lungs are clear."]),
        ("Compared to 2010. No change.", ["Compared to 2010.", "No change."]),
        ("No effusion.No pneumothorax.", ["No effusion.", "No pneumothorax."]),
        ("Is there an effusion? No.", ["Is there an effusion?", "No."]),
    ],
)
def test_stops_end_sentences_and_numbers_and_abbreviations_do_not(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("1. No acute disease. 2. Stable nodule.", ["1. No acute disease.", "2. Stable nodule."]),
        ("1. Cardiomegaly 2. Effusion", ["1. Cardiomegaly", "2. Effusion"]),
        ("1.Cardiomegaly 2.Effusion", ["1.Cardiomegaly", "2.Effusion"]),
        ("(1) Cardiomegaly. (2) Effusion.", ["(1) Cardiomegaly.", "(2) Effusion."]),
        ("IMPRESSION: 1) Edema. Worse. 2) Effusion.", ["IMPRESSION:", "1) Edema.", "Worse.", "2) Effusion."]),
        ("Fracture of rib 7. No effusion.", ["Fracture of rib 7.", "No effusion."]),
        ("1. Fracture of rib 7. Old. 2. Edema.", ["1. Fracture of rib 7.", "Old.", "2. Edema."]),
    ],
)
def test_a_list_number_belongs_to_the_item_after_it(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("The heart is\nnormal in size. Lungs\nare clear.", ["The heart is normal in size.", "Lungs are clear."]),
        ("No edema\nNo effusion", ["No edema", "No effusion"]),
        ("no edema\n\nno effusion", ["no edema", "no effusion"]),
        ("Findings:\nclear lungs", ["Findings:", "clear lungs"]),
        ("the heart is normal . no effusion .", ["the heart is normal .", "no effusion ."]),
        ("Clear. .", ["Clear. ."]),
        ("Effusion...", ["Effusion..."]),
    ],
)
def test_wrapped_lines_are_joined_and_models_writing_in_lower_case_is_cut(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("text", ["", "   ", "\n \n"])
def test_no_text_has_no_sentence(text: str) -> None:
    assert split_sentences(text) == []


@given(st.text(alphabet="ab1 .\n()?Z", max_size=60))
def test_no_letter_is_lost_added_or_moved(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == " ".join(sentence.split()) for sentence in sentences)


@pytest.mark.parametrize("unit", [". ", "1. ", "a. ", "a\n", "(1) x 2) y ", ".", "aaa.", "a\n \n"])
def test_any_model_output_is_cut_in_linear_time(unit: str) -> None:
    start = time.perf_counter()
    split_sentences(unit * 20_000)
    assert time.perf_counter() - start < 2
