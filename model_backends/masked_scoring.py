"""Pseudo-log-likelihood of a continuation under a masked language model, token by token from left to right.

Token i is predicted where the context and the tokens before it are seen, and it and every token after it are masked.
Kauf and Ivanova 2023 (arXiv 2305.10588) mask the rest of the word (PLL-word-l2r), so that the pieces of a long word do
not give each other away; with the rest of the whole continuation masked, the sum reads as a causal model's chain rule
does. What remains different: the number of masks tells how many tokens follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from medvlm_harness.model_backends.batching import BatchSize, slots
from medvlm_harness.model_backends.sequences import pad

__all__ = ["MaskedRow", "MaskedScorer", "masked_rows"]


class MaskedRow(NamedTuple):
    """One prediction: a sequence with masks, the place that is asked about, and the token that belongs there."""

    ids: tuple[int, ...]
    place: int
    target: int


def masked_rows(
    before: Sequence[int], continuation: Sequence[int], after: Sequence[int], *, mask: int
) -> list[MaskedRow]:
    """One row per token of the continuation.

    Args:
        before: what is seen on its left, special tokens included.
        continuation: the tokens to be scored.
        after: special tokens on its right.
        mask: the mask token.
    """
    rows = []
    for known, target in enumerate(continuation):
        seen = (*before, *continuation[:known])
        masks = (mask,) * (len(continuation) - known)
        rows.append(MaskedRow((*seen, *masks, *after), len(seen), target))
    return rows


class MaskedScorer:
    """A loaded masked language model."""

    def __init__(self, network: Any, *, filler: int, device: torch.device, limit: int | None = None) -> None:
        self.network, self.filler, self.device, self.limit = network, filler, device, limit

    def totals(
        self, rows: Mapping[str, Sequence[MaskedRow]], batching: BatchSize, size: int
    ) -> dict[str, tuple[float, bool]]:
        """Of each continuation the sum of its tokens' scores, and whether each was the most likely one."""
        places = [(key, k) for key, own in rows.items() for k in range(len(own))]
        scores: dict[tuple[str, int], tuple[float, bool]] = {}
        for slot in slots(places, size):
            parts = batching.in_parts(slot, lambda part: self.score([rows[key][k] for key, k in part]))
            scores |= zip(slot, [score for part in parts for score in part], strict=True)
        tokens = {key: [scores[key, k] for k in range(len(own))] for key, own in rows.items()}
        return {key: (sum(s for s, _ in own), all(best for _, best in own)) for key, own in tokens.items()}

    @torch.inference_mode()
    def score(self, rows: Sequence[MaskedRow]) -> list[tuple[float, bool]]:
        """Log-probability of each target in nats, and whether it is the most likely token; one forward pass."""
        batch = pad([row.ids for row in rows], filler=self.filler, side="right", limit=self.limit)
        places = torch.tensor([row.place for row in rows], device=self.device)
        targets = torch.tensor([row.target for row in rows], device=self.device)
        given = {"input_ids": batch.ids.to(self.device), "attention_mask": batch.mask.to(self.device)}
        with self._at(places):
            logits: torch.Tensor = self.network(**given).logits
        values = logits[:, 0].float()
        chosen = values.gather(1, targets[:, None])[:, 0] - values.logsumexp(dim=1)
        best = values.argmax(dim=1) == targets
        return list(zip(chosen.tolist(), best.tolist(), strict=True))

    @contextmanager
    def _at(self, places: torch.Tensor) -> Iterator[None]:
        """Make logits at one place of each row: of a whole row they would be the largest tensor by far."""

        def narrow(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = given[0]
            return (hidden[torch.arange(len(places), device=hidden.device), places][:, None], *given[1:])

        handle = self.network.get_output_embeddings().register_forward_pre_hook(narrow)
        try:
            yield
        finally:
            handle.remove()
