"""Token sequences in batches: padding, the score of a continuation, and where a generated text ends.

Nothing here knows where tokens come from; a prompt with images names them, and its tokens hold places for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import StoppingCriteria

from medvlm_harness.model_backends.towers import LENGTH_STEP
from medvlm_harness.requests import Generation, ImageRef

__all__ = [
    "Padded",
    "Prompt",
    "Scored",
    "StopStrings",
    "continuation_score",
    "cut_at_end",
    "pad",
    "stop_strings",
    "written_length",
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given: tokens, special ones included, and how many were cut off their left to make it fit.

    Of images it holds references: pixels of a whole task would fill the memory, and are read batch by batch.
    """

    ids: tuple[int, ...]
    cut: int = 0
    images: tuple[ImageRef, ...] = ()  # in the order of their places among the tokens
    image_end: int = 0  # tokens up to and with the last one of the last image; 0 without images


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation whose log-likelihood after a prompt is asked for; not empty."""

    prompt: Prompt
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.ids)


class Padded(NamedTuple):
    """Sequences of one length, (n, length) each; `positions` count the tokens of a row from 0."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def pad(
    rows: Sequence[Sequence[int]], *, filler: int, side: Literal["left", "right"], limit: int | None = None
) -> Padded:
    """Pad to a multiple of `LENGTH_STEP` that holds the longest row, or to `limit`, and never below the longest row.

    Masked tokens on the left have position 0, those on the right that of the last token. A model that counts positions
    itself, from the left end and whatever the mask, has no more than `limit` of them.
    """
    longest = max(map(len, rows))
    rounded = math.ceil(longest / LENGTH_STEP) * LENGTH_STEP
    length = max(longest, rounded if limit is None else min(rounded, limit))
    ids = torch.full((len(rows), length), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens, dtype=torch.long)
        mask[row, place] = 1
    return Padded(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0))


def continuation_score(logits: torch.Tensor, ids: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of tokens, in nats, and whether each is the most likely one.

    Args:
        logits: what the model says before each of the tokens, (tokens, vocabulary), in any floating type.
        ids: the tokens.
    """
    values = logits.float()
    target = torch.tensor(ids, dtype=torch.long, device=values.device)
    chosen = values.gather(1, target[:, None])[:, 0] - values.logsumexp(dim=1)
    return float(chosen.double().sum()), bool((values.argmax(dim=1) == target).all())


class StopStrings(StoppingCriteria):  # type: ignore[misc]  # transformers carries no types
    """Ends each row of a batch at its first stop string.

    A row is looked at near its end first: the last tokens, two more than a stop string takes. Where one seems to be
    there, the whole text decides, which is what `cut_at_end` cuts.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], start: int) -> None:
        self.tokenizer, self.strings, self.start = tokenizer, strings, start
        lengths = [len(tokenizer.encode(string, add_special_tokens=False)) for string in strings]
        self.window = max(lengths, default=0) + 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Which rows are done, (rows,)."""
        generated = input_ids[:, self.start :]
        tails = self.tokenizer.batch_decode(generated[:, -self.window :], skip_special_tokens=True)
        done = [
            self._has_stop(tail) and self._has_stop(self._decoded(generated[row])) for row, tail in enumerate(tails)
        ]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _has_stop(self, text: str) -> bool:
        return any(string in text for string in self.strings)

    def _decoded(self, ids: torch.Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def stop_strings(until: Sequence[str], end: str | None) -> list[str]:
    """What ends a text: lm-eval's `until` and the tokenizer's own end, without the empty string."""
    return [string for string in dict.fromkeys((*until, *((end,) if end else ()))) if string]


def written_length(ids: Sequence[int], *, end_ids: frozenset[int], filler: int) -> int:
    """Tokens that a model wrote of a row of a batch: up to its end token, that included, or up to what fills it."""
    end = next((place + 1 for place, token in enumerate(ids) if token in end_ids), len(ids))
    while end and ids[end - 1] == filler and filler not in end_ids:
        end -= 1
    return end


def cut_at_end(tokenizer: Any, ids: Sequence[int], *, end_ids: frozenset[int], stops: Sequence[str]) -> Generation:
    """The text of generated tokens up to the first end token or stop string, which are not part of it."""
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    whole = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
    text = whole
    for string in stops:  # one after the other, as lm-eval does it: they may overlap
        text = text.partition(string)[0]
    return Generation(text, finished=end is not None or len(text) < len(whole))
