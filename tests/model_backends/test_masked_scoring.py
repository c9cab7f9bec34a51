from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from medvlm_harness.model_backends.batching import BatchSize
from medvlm_harness.model_backends.masked_scoring import MaskedScorer, masked_rows

MASK, BEGIN, END = 4, 2, 3
CPU = torch.device("cpu")


@pytest.fixture(params=["bert", "distilbert"])
def network(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Any:
    return AutoModelForMaskedLM.from_pretrained(tiny_model(request.param)).eval()


def test_each_row_masks_its_token_and_all_that_follow() -> None:
    rows = masked_rows([BEGIN, 10, 11], [20, 21, 22], [END], mask=MASK)
    assert [row.ids for row in rows] == [
        (BEGIN, 10, 11, MASK, MASK, MASK, END),
        (BEGIN, 10, 11, 20, MASK, MASK, END),
        (BEGIN, 10, 11, 20, 21, MASK, END),
    ]
    assert [(row.place, row.target) for row in rows] == [(3, 20), (4, 21), (5, 22)]


@torch.inference_mode()
def by_hand(network: Any, before: list[int], continuation: list[int], after: list[int]) -> float:
    """One sequence at a time, all logits of it, no padding."""
    total = 0.0
    for k, token in enumerate(continuation):
        ids = before + continuation[:k] + [MASK] * (len(continuation) - k) + after
        logits = network(input_ids=torch.tensor([ids])).logits[0, len(before) + k]
        total += float(torch.log_softmax(logits.double(), dim=0)[token])
    return total


def test_scores_are_those_of_the_whole_model_one_by_one(network: Any) -> None:
    texts = {"a": ([BEGIN, 10, 11, 12], [20, 21, 22]), "b": ([BEGIN], [30]), "c": ([BEGIN, *range(40, 70)], [31, 32])}
    rows = {key: masked_rows(before, own, [END], mask=MASK) for key, (before, own) in texts.items()}
    expected = {key: by_hand(network, before, own, [END]) for key, (before, own) in texts.items()}
    scorer = MaskedScorer(network, filler=0, device=CPU)
    for size in (1, 2, 16):
        found = scorer.totals(rows, BatchSize(size), size)
        assert {key: score for key, (score, _) in found.items()} == pytest.approx(expected, abs=1e-4)


def test_the_pieces_of_a_word_do_not_give_each_other_away(network: Any) -> None:
    """Were only the token itself masked, as in Salazar et al. 2020, the score would be another one."""
    before, word = [BEGIN, 10, 11], [20, 21, 22]
    scorer = MaskedScorer(network, filler=0, device=CPU)
    (found,) = scorer.totals({"": masked_rows(before, word, [END], mask=MASK)}, BatchSize(8), 8).values()
    alone = 0.0
    with torch.inference_mode():
        for k, token in enumerate(word):
            ids = [*before, *word[:k], MASK, *word[k + 1 :], END]
            logits = network(input_ids=torch.tensor([ids])).logits[0, len(before) + k]
            alone += float(torch.log_softmax(logits, dim=0)[token])
    assert abs(found[0] - alone) > 0.1


def test_a_continuation_of_most_likely_tokens_is_greedy(network: Any) -> None:
    before: list[int] = [BEGIN, 10, 11]
    with torch.inference_mode():
        first = int(network(input_ids=torch.tensor([[*before, MASK, END]])).logits[0, 3].argmax())
    scorer = MaskedScorer(network, filler=0, device=CPU)
    rows = {"best": masked_rows(before, [first], [END], mask=MASK), "other": masked_rows(before, [9], [END], mask=MASK)}
    found = scorer.totals(rows, BatchSize(8), 8)
    assert found["best"][1] and found["other"][1] is (first == 9)


def test_the_model_makes_whole_logits_again_afterwards(network: Any) -> None:
    MaskedScorer(network, filler=0, device=CPU).score(masked_rows([BEGIN], [9], [END], mask=MASK))
    assert network(input_ids=torch.tensor([[BEGIN, 9, END]])).logits.shape[1] == 3
