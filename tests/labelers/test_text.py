from __future__ import annotations

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.labelers.text import checked_sections, clean, stretches_to_read


def read(text: str, sections: str = "both") -> list[str]:
    return [text[s.start : s.end].strip() for s in stretches_to_read(text, checked_sections(sections))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The lungs are clear.", ["The lungs are clear."]),
        ("FINDINGS: Clear. IMPRESSION: Normal.", ["Clear.", "Normal."]),
        ("Findings: Clear.\nImpression: Normal.", ["Clear.", "Normal."]),
        ("FINDINGS : Clear . IMPRESSION : Normal .", ["Clear .", "Normal ."]),
        ("**Findings:** Clear.\n\n**Impression:** Normal.", ["Clear.", "Normal."]),
        ("INDICATION: Cough. Fever. FINDINGS: Clear.", ["Clear."]),
        ("INDICATION: Cough.\n\nThe lungs are clear.", ["The lungs are clear."]),
        ("INDICATION:\n\nCough and fever.\n\nFINDINGS: Clear.", ["Clear."]),
        ("HISTORY: fall. The lungs are clear.", ["The lungs are clear."]),
        ("HISTORY: fall. The lungs are clear. IMPRESSION: Normal.", ["The lungs are clear.", "Normal."]),
        ("HISTORY: fall. Known effusion. FINDINGS: Clear. IMPRESSION: Normal.", ["Clear.", "Normal."]),
        ("COMPARISON: None. The lungs are clear. IMPRESSION: Normal.", ["The lungs are clear.", "Normal."]),
        ("Clinical History: Effusion.\nReason for exam: Effusion.\nIMPRESSION: Normal.", ["Normal."]),
        ("Bones: no fracture. Heart: normal.", ["Bones: no fracture. Heart: normal."]),
        ("The patient has a history: none known.", ["The patient has a history: none known."]),
        ("FINDINGS:", []),
    ],
)
def test_what_is_about_the_image_is_read(text: str, expected: list[str]) -> None:
    assert read(text) == expected


REPORT = "TECHNIQUE: PA view.\n\nFINDINGS: Clear.\n\nIMPRESSION: Normal.\n\nRECOMMENDATION: CT."


@pytest.mark.parametrize(
    ("text", "findings", "impression"),
    [
        (REPORT, ["Clear."], ["Normal."]),
        ("Clear.\n\nIMPRESSION: Normal.", ["Clear."], ["Normal."]),
        ("FINDINGS: Clear.", ["Clear."], []),
        ("IMPRESSION: Normal.", [], ["Normal."]),
        ("Clear.", ["Clear."], ["Clear."]),
        ("HISTORY: fall. Clear.", ["Clear."], ["Clear."]),
    ],
)
def test_one_section_is_read_alone_and_text_without_heads_whole(
    text: str, findings: list[str], impression: list[str]
) -> None:
    assert read(text, "findings") == findings
    assert read(text, "impression") == impression


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion\nor pneumothorax", "No effusion or pneumothorax."),
        (
            "No pleural effusion or\npneumothorax. The heart\nis normal.",
            "No pleural effusion or pneumothorax. The heart is normal.",
        ),
        ("No effusion\n\nMild edema", "No effusion.\nMild edema."),
        ("No effusion is seen today\nEdema", "No effusion is seen today.\nEdema."),
        ("There is a large opacity and\nXXXX effusion", "There is a large opacity and XXXX effusion."),
        ("THERE IS NO LARGE EFFUSION\nOR EDEMA", "THERE IS NO LARGE EFFUSION OR EDEMA."),
        ("- No effusion\n- Edema", "No effusion.\nEdema."),
        ("1. No effusion\n2. Edema", "No effusion.\nEdema."),
        ("Atelectasis and/or edema", "Atelectasis or edema."),
        ("Atelectasis/infiltrate", "Atelectasis or infiltrate."),
        ("Clear w/o effusion", "Clear without effusion."),
        ("Pneumonia w/ effusion", "Pneumonia with effusion."),
        ("s/p CABG, 9/10", "s/p CABG, 9/10."),
        ("XXXX opacity", "XXXX opacity."),
        ("", ""),
        (" \n\n ", ""),
    ],
)
def test_lines_are_joined_only_where_they_were_wrapped(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(UserError, match="one of both, findings, impression, but got 'all'"):
        checked_sections("all")
