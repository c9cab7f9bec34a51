from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.registry import get_filter

from medvlm_harness.errors import UserError
from medvlm_harness.perturbations.factuality import DropPriorClaims, DropRepetitions, DropUnsupported
from medvlm_harness.requests import Generation


def filtered(drop: Any, text: str, **doc: Any) -> str:
    ((found,),) = drop.apply([[text]], [doc])
    return str(found)


def test_a_sentence_that_claims_a_prior_goes_and_the_others_stay() -> None:
    text = (
        "Small left effusion. No interval change since the prior study. Comparison with prior films would be helpful."
    )
    assert filtered(DropPriorClaims(), text) == ("Small left effusion. Comparison with prior films would be helpful.")


def test_sentences_said_before_go_whatever_their_case_and_number() -> None:
    text = "1. No effusion. 2. Clear lungs. 3. NO EFFUSION."
    assert filtered(DropRepetitions(), text) == "1. No effusion. 2. Clear lungs."


def test_what_the_source_denies_or_does_not_know_goes() -> None:
    source = "The heart is enlarged. There is no pneumothorax. Possible pneumonia."
    text = "Cardiomegaly. Large pneumothorax. Pneumonia. Pleural effusion. No edema."
    assert filtered(DropUnsupported(), text, source=source) == "Cardiomegaly. Pneumonia. No edema."


def test_a_text_from_which_nothing_goes_is_left_as_it_is() -> None:
    text = "Clear  lungs.\nNo effusion"
    for drop in (DropPriorClaims(), DropRepetitions(), DropUnsupported()):
        assert filtered(drop, text, source="Clear lungs.") == text
        assert filtered(drop, "", source="Clear lungs.") == ""


def test_whether_generation_came_to_an_end_stays_known() -> None:
    text = Generation("Clear. Clear.", finished=False)
    ((found,),) = DropRepetitions().apply([[text]], [{}])
    assert getattr(found, "finished", None) is False


def test_every_response_of_every_document_is_filtered_by_its_own_source() -> None:
    texts = [["Edema.", "Clear lungs."], ["Edema."]]
    docs = [{"source": "Clear lungs."}, {"source": "Pulmonary edema."}]
    assert [list(map(str, own)) for own in DropUnsupported().apply(texts, docs)] == [["", "Clear lungs."], ["Edema."]]


def test_documents_without_a_source_are_refused() -> None:
    with pytest.raises(UserError, match="needs the `source` of each document"):
        DropUnsupported().apply([["Edema."]], [{"question": "?"}])


@pytest.mark.parametrize("name", ["drop_prior_claims", "drop_repetitions", "drop_unsupported"])
def test_lm_eval_finds_the_filters_by_name(name: str) -> None:
    import lm_eval.filters  # noqa: F401  # fills the registry

    assert get_filter(name).__module__ == "medvlm_harness.perturbations.factuality"
