from __future__ import annotations

from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.model_backends.cards import ModelCard


class Recorder(MedicalLM):
    """Keeps its options."""

    card = ModelCard(name="recorder", family="baseline", parameters=5)

    def __init__(self, *, weights: str, temperature: float = 1.0, **lm_eval: Any) -> None:
        super().__init__(**lm_eval)
        self.kept = (weights, temperature)

    def describe(self) -> dict[str, Any]:
        return {}


class Plain(MedicalLM):
    """The least a backend is."""

    card = ModelCard(name="plain", family="baseline")

    def describe(self) -> dict[str, Any]:
        return {}


class Closed(Recorder):
    """Passes nothing on."""

    def __init__(self, *, weights: str) -> None:
        super().__init__(weights=weights)


def test_options_are_the_keyword_parameters_and_those_that_are_passed_on() -> None:
    assert Plain.options() == {"batch_size", "max_batch_size"}
    assert Recorder.options() == Plain.options() | {"weights", "temperature"}
    assert Closed.options() == {"weights"}


def test_a_model_is_built_from_a_string_or_a_mapping() -> None:
    assert Recorder.create_from_arg_string("weights=a,temperature=0.5").kept == ("a", 0.5)
    assert Recorder.create_from_arg_obj({"weights": "a"}).kept == ("a", 1.0)


def test_lm_evals_own_arguments_fill_in_what_is_not_given() -> None:
    own = {"batch_size": "8", "max_batch_size": None, "device": "cuda:0"}
    assert Plain.create_from_arg_string("", own).batch_size == 8
    assert Plain.create_from_arg_string("batch_size=2", own).batch_size == 2


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), ("auto", None), ("auto:4", None), ("8", 8), ("1", 1), (3, 3)]
)
def test_batch_sizes_are_read_as_lm_eval_writes_them(given: int | str | None, expected: int | None) -> None:
    assert Plain(batch_size=given).batch_size == expected


def test_one_that_nobody_asked_for_is_automatic() -> None:
    # lm-eval's own default arrives as the integer 1, what was typed as text.
    assert Plain.create_from_arg_string("", {"batch_size": 1}).batch_size is None
    assert Plain.create_from_arg_string("", {"batch_size": "1"}).batch_size == 1
    assert Plain.create_from_arg_string("batch_size=1", {"batch_size": 1}).batch_size == 1


@pytest.mark.parametrize("value", [0, -1, "0", "many", "1.5", ""])
def test_other_batch_sizes_are_refused(value: int | str) -> None:
    with pytest.raises(UserError, match="positive integer or auto"):
        Plain(batch_size=value)


def test_an_unknown_option_is_refused_before_anything_is_built() -> None:
    with pytest.raises(UserError, match=r"'temprature' of model recorder\. Did you mean temperature\?"):
        Recorder.create_from_arg_string("weights=a,temprature=1")


def test_a_missing_option_says_how_to_give_it() -> None:
    with pytest.raises(UserError, match=r"recorder needs weights=.*--model_args weights="):
        Recorder.create_from_arg_string("")


@pytest.mark.parametrize(
    "request_type", ["classify", "embed", "loglikelihood", "loglikelihood_rolling", "generate_until"]
)
def test_every_request_that_is_not_implemented_is_refused_in_words(request_type: str) -> None:
    with pytest.raises(UserError, match=f"plain .*cannot answer `{request_type}`"):
        getattr(Plain(), request_type)([])


def test_lm_eval_is_told_the_parameters() -> None:
    assert Recorder(weights="a").get_model_info() == {"model_num_parameters": 5}
