from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from medvlm_harness.model_backends.sequences import StopStrings, continuation_score, cut_at_end, pad, stop_strings


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_its_tokens_masked_and_counted_from_zero(side: Any) -> None:
    rows = [[5, 6, 7], [8], list(range(10, 19))]
    batch = pad(rows, filler=99, side=side)
    assert batch.ids.shape[1] >= 9
    for row, tokens in enumerate(rows):
        mask = batch.mask[row].bool()
        assert batch.ids[row][mask].tolist() == tokens
        assert set(batch.ids[row][~mask].tolist()) <= {99}
        assert batch.positions[row][mask].tolist() == list(range(len(tokens)))
        assert (batch.positions[row] >= 0).all()
        assert bool(mask[-1 if side == "left" else 0])


def test_no_row_is_padded_beyond_the_last_position() -> None:
    assert pad([[1] * 10, [2]], filler=0, side="right", limit=11).ids.shape == (2, 11)
    assert pad([[1] * 10, [2]], filler=0, side="right", limit=9).ids.shape == (2, 10)
    assert pad([[1] * 10, [2]], filler=0, side="right").ids.shape == (2, 16)


def test_a_continuation_is_scored_as_the_sum_of_its_log_probabilities() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    by_hand = 0.0
    for row, token in ((0, 1), (1, 0)):
        weights = [math.exp(float(value)) for value in logits[row]]
        by_hand += math.log(weights[token] / sum(weights))
    score, greedy = continuation_score(logits, [1, 0])
    assert score == pytest.approx(by_hand, abs=1e-6)
    assert not greedy
    assert continuation_score(logits, [1, 2])[1]


def test_half_precision_logits_are_summed_in_full_precision() -> None:
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.log_softmax(logits.double(), dim=1)[:, 7].sum()
    assert continuation_score(logits, [7] * 40)[0] == pytest.approx(float(exact), abs=1e-4)


def test_each_row_ends_at_its_own_stop_string(tokenizer: Any) -> None:
    rows = [ids(tokenizer, "heart is normal"), ids(tokenizer, "lungs are clear\n\n"), ids(tokenizer, "no. stop")]
    batch = pad(rows, filler=0, side="left").ids
    prompt = torch.full((3, 4), 7)
    criterion = StopStrings(tokenizer, ["\n\n", "stop"], start=4)
    assert criterion(torch.cat([prompt, batch], dim=1), torch.empty(0)).tolist() == [False, True, True]


def test_a_stop_string_in_the_prompt_ends_nothing(tokenizer: Any) -> None:
    prompt = torch.tensor([ids(tokenizer, "context\n\n")])
    text = torch.tensor([ids(tokenizer, "the heart")])
    criterion = StopStrings(tokenizer, ["\n\n"], start=prompt.shape[1])
    assert criterion(torch.cat([prompt, text], dim=1), torch.empty(0)).tolist() == [False]


@pytest.mark.parametrize(
    ("text", "stops", "expected", "finished"),
    [
        ("the heart is normal", [], "the heart is normal", False),
        ("the heart\n\nis normal", ["\n\n"], "the heart", True),
        ("the heart is normal", ["normal", "is"], "the heart ", True),
        ("stop", ["stop"], "", True),
    ],
)
def test_a_text_is_cut_before_its_first_stop_string(
    tokenizer: Any, text: str, stops: list[str], expected: str, finished: bool
) -> None:
    found = cut_at_end(tokenizer, ids(tokenizer, text), end_ids=frozenset({1}), stops=stops)
    assert (found, found.finished) == (expected, finished)


def test_what_follows_an_end_token_is_no_part_of_the_text(tokenizer: Any) -> None:
    tokens = [*ids(tokenizer, "the heart"), 1, *ids(tokenizer, "!!!")]
    found = cut_at_end(tokenizer, tokens, end_ids=frozenset({1}), stops=[])
    assert (found, found.finished) == ("the heart", True)


def test_the_empty_stop_string_stops_nothing() -> None:
    assert stop_strings(["", "a", "a"], "</s>") == ["a", "</s>"]
    assert stop_strings([], None) == []


def test_stop_strings_that_the_model_prints_elsewhere_do_not_hide(tokenizer: Any, tmp_path: Path) -> None:
    """A stop string across token borders: neither token holds it."""
    tokens = [*ids(tokenizer, "clear"), *ids(tokenizer, "ance")]
    criterion = StopStrings(tokenizer, ["rance"], start=0)
    assert criterion(torch.tensor([tokens]), torch.empty(0)).tolist() == [True]
    assert cut_at_end(tokenizer, tokens, end_ids=frozenset(), stops=["rance"]) == "clea"
