from __future__ import annotations

import pytest

from medvlm_harness.metrics.coco import clean_report, coco_rouge_l, coco_settings, coco_tokens


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("The heart is normal. No effusion.", "the heart is normal . no effusion ."),
        ("1. Clear lungs. 2. No effusion. 3. Old fracture.", "clear lungs . no effusion . old fracture ."),
        ("Nodule of 3.5 cm.", "nodule of 35 cm ."),
        ("Well-defined, (calcified) granuloma; stable?", "well-defined calcified granuloma stable ."),
        ('Right-sided "XXXX" lines/tubes... Unchanged.', "right-sided xxxx linestubes . unchanged ."),
        ("", " ."),
    ],
)
def test_reports_are_cleaned_as_r2gen_cleans_them(text: str, cleaned: str) -> None:
    assert clean_report(text) == cleaned


def test_sixty_tokens_count_and_of_references_one_less() -> None:
    long = " ".join(f"w{k}" for k in range(80)) + "."
    assert coco_tokens(long) == [f"w{k}" for k in range(60)]
    assert coco_tokens(long, limit=59)[-1] == "w58"
    # What comes after the sixtieth decides nothing; one that stands before it does.
    assert coco_rouge_l([long], [long + " more words"]).tolist() == coco_rouge_l([long], [long]).tolist()
    assert coco_rouge_l([long], [long])[0] == pytest.approx(2.44 * (59 / 60) / (1 + 1.44 * 59 / 60))
    assert coco_tokens("  ") == []


def test_rouge_by_hand() -> None:
    """`the heart is big .` against `the heart is not big now .`: 5 of 5 and 5 of 7; recall weighs more."""
    precision, recall = 5 / 5, 5 / 7
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert coco_rouge_l(["The heart is big."], ["The heart is not big now."])[0] == pytest.approx(expected)
    swapped = (1 + 1.44) * precision * recall / (precision + 1.44 * recall)
    assert coco_rouge_l(["The heart is not big now."], ["The heart is big."])[0] == pytest.approx(swapped)
    assert swapped > expected


def test_order_counts_and_nothing_in_common_is_zero() -> None:
    assert coco_rouge_l(["b a"], ["a b"])[0] == pytest.approx(2 / 3)  # of `b a .` and `a b .` two in order
    assert coco_rouge_l(["", "x"], ["a", ""]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="a reference for each"):
        coco_rouge_l(["a"], [])
    assert "beta 1.2" in coco_settings()
