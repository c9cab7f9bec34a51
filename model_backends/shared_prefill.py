"""Many continuations of one image: what their prompts have in common is read once, and each goes on from there.

Of thirteen questions about an image, nearly all tokens are the image's own. The numbers are those of scoring each
alone, up to rounding: a causal model's keys and values of a token depend on nothing that comes later.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile

from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.decoder import Decoder
from medvlm_harness.model_backends.sequences import Prompt, Scored, continuation_score

__all__ = ["shared_length", "shared_scores"]

Scores = list[tuple[float, bool]]


def shared_scores(decoder: Decoder, groups: Sequence[Sequence[Scored]], *, rows: int) -> list[Scores]:
    """Log-likelihoods of continuations in nats, and whether each is what greedy decoding gives; as `Decoder.score`.

    Args:
        decoder: the loaded model, a causal one.
        groups: items whose prompts have their images in common, such as all questions about one image.
        rows: sequences in one forward pass at most.
    """
    found: list[Scores] = [[] for _ in groups]
    lengths = [shared_length([item.prompt for item in group]) for group in groups]
    for length in sorted(set(lengths)):
        members = [k for k, own in enumerate(lengths) if own == length]
        together = max(1, rows // max(len(_tails(groups[k], length)) for k in members)) if length else 1
        for part in slots(members, together):
            if length:
                scores = _from_prefix(decoder, [groups[k] for k in part], length, rows)
            else:
                scores = [[score for some in slots(groups[k], rows) for score in decoder.score(some)] for k in part]
            for k, own in zip(part, scores, strict=True):
                found[k] = own
    return found


def shared_length(prompts: Sequence[Prompt]) -> int:
    """How many first tokens all prompts share, without the last of the shortest; 0 if not all images are in them."""
    columns = zip(*(prompt.ids[:-1] for prompt in prompts), strict=False)
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    images = {(prompt.images, prompt.image_end) for prompt in prompts}
    return length if len(images) == 1 and 0 < prompts[0].image_end <= length else 0


def _tails(group: Sequence[Scored], length: int) -> list[tuple[int, ...]]:
    """What comes after the prefix, the last token of the continuation excepted; each once."""
    return list(dict.fromkeys(_tail(item, length) for item in group))


def _tail(item: Scored, length: int) -> tuple[int, ...]:
    return (*item.prompt.ids, *item.ids)[length:-1]


def _from_prefix(decoder: Decoder, groups: Sequence[Sequence[Scored]], length: int, rows: int) -> list[Scores]:
    prefix = decoder.prefill([group[0].prompt for group in groups], length)
    tails = [(row, tail) for row, group in enumerate(groups) for tail in _tails(group, length)]
    # The first logit that any item needs is that of its prompt's last token.
    skip = min(len(item.prompt.ids) for group in groups for item in group) - 1 - length
    scores: dict[tuple[int, Scored], tuple[float, bool]] = {}
    for start in range(0, len(tails), rows):
        part = tails[start : start + rows]
        last = start + rows >= len(tails)
        own = prefix if last else prefix._replace(cache=copy.deepcopy(prefix.cache))
        logits = decoder.continue_from(own, [row for row, _ in part], [tail for _, tail in part], skip=skip)
        place = {key: k for k, key in enumerate(part)}
        for row, group in enumerate(groups):
            for item in group:
                k = place.get((row, _tail(item, length)))
                if k is not None:
                    begin = len(item.prompt.ids) - 1 - length - skip
                    scores[row, item] = continuation_score(logits[k, begin : begin + len(item.ids)], item.ids)
    return [[scores[row, item] for item in group] for row, group in enumerate(groups)]
