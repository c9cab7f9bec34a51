from __future__ import annotations

from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.decoder import DEFAULT_MAX_GEN_TOKS, Decoding


def test_what_a_task_leaves_open_is_greedy_and_lm_evals_length() -> None:
    decoding = Decoding.of({"until": "\n"})
    assert decoding.until == ("\n",)
    assert decoding.max_new_tokens == DEFAULT_MAX_GEN_TOKS == 256
    assert not decoding.sampled
    assert "temperature" not in decoding.options


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_the_length_has_lm_evals_names(name: str) -> None:
    assert Decoding.of({name: 7}).max_new_tokens == 7


@pytest.mark.parametrize(
    ("kwargs", "sampled"),
    [
        ({"temperature": 0.0}, False),
        ({"temperature": 0.7}, True),
        ({"do_sample": False, "temperature": 0.7}, False),
        ({"do_sample": True, "temperature": 0.7}, True),
    ],
)
def test_a_temperature_above_zero_samples(kwargs: dict[str, Any], sampled: bool) -> None:
    assert Decoding.of(kwargs).sampled is sampled


def test_everything_that_decides_a_text_is_in_the_key() -> None:
    keys = [
        Decoding.of(kwargs).key
        for kwargs in (
            {},
            {"until": ["a"]},
            {"until": ["b"]},
            {"max_gen_toks": 3},
            {"num_beams": 2},
            {"temperature": 1},
        )
    ]
    assert len(set(keys)) == len(keys)
    assert Decoding.of({"max_new_tokens": 3}).key == Decoding.of({"max_gen_toks": 3}).key


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length": 100}, "use max_gen_toks"),
        ({"max_gen_toks": 0}, "1 or more"),
        ({"max_gen_toks": "many"}, "generation_kwargs"),
        ({"temperature": "hot"}, "generation_kwargs"),
        ({"until": [3]}, "until to be strings"),
    ],
)
def test_wrong_generation_kwargs_are_told_in_one_line(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Decoding.of(kwargs)
    assert "\n" not in str(error.value)
