from __future__ import annotations

import subprocess
import sys

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.labelers import LABELERS, labeler_from_text, make_labeler
from medvlm_harness.labelers.base import compose_report
from medvlm_harness.labelers.rules import RulesLabeler


def test_the_rules_are_made_by_name() -> None:
    labeler = make_labeler("rules", sections="findings")
    assert isinstance(labeler, RulesLabeler)
    assert (labeler.name, labeler.sections) == ("rules", "findings")
    assert "rules" in LABELERS


def test_a_command_line_names_a_labeler_and_its_options() -> None:
    labeler = labeler_from_text(" rules , sections = impression ")
    assert (labeler.name, labeler.sections) == ("rules", "impression")
    assert labeler_from_text("rules").sections == "both"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule", "Did you mean rules?"),
        ("rules,section=both", "no option 'section'. Did you mean sections?"),
        ("rules,findings", "Expected NAME,option=value"),
        ("rules,sections=", "Expected NAME,option=value"),
        ("rules,sections=both,sections=both", "one value of sections"),
        ("", "Expected the name of a labeler"),
    ],
)
def test_what_is_no_labeler_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        labeler_from_text(text)
    assert message in str(caught.value)


def test_a_record_is_composed_of_what_it_has_and_what_is_wanted() -> None:
    assert compose_report(" Clear. ", "Normal.") == "FINDINGS: Clear.\n\nIMPRESSION: Normal."
    assert compose_report("Clear.", "Normal.", "impression") == "IMPRESSION: Normal."
    assert compose_report("", "Normal.") == "IMPRESSION: Normal."
    assert compose_report("", "", "both") == compose_report("", "Normal.", "findings") == ""


def test_naming_labelers_imports_neither_spacy_nor_torch() -> None:
    code = "import sys, medvlm_harness.labelers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"spacy", "torch", "negspacy"} & {name.partition(".")[0] for name in done.stdout.split()} == set()
