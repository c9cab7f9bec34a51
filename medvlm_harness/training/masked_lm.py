"""Method `masked-lm`: a small encoder from scratch that fills gaps in findings and impressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from medvlm_harness.model_backends.sequences import pad
from medvlm_harness.training.scratch import ScratchMethod, ScratchTraining
from medvlm_harness.training.summaries import Summary

__all__ = ["MaskedMethod"]

MASKED_SHARE = 0.15  # BERT's
# What the architecture needs of special tokens, where a vocabulary has them not.
ADDED = {"cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>", "mask_token": "<mask>"}


@dataclass(frozen=True, kw_only=True)
class MaskedMethod(ScratchMethod):
    """Cross-entropy of masked tokens of the track's prompt with the impression behind it.

    Of half of the studies, drawn anew at each step, 15% of all tokens are masked; of the other half the impression from
    a place drawn at random to its end, which is how a continuation is scored (`model_backends/masked_scoring.py`). The
    validation loss is that of every impression masked as a whole. BERT's architecture (Devlin et al. 2019, arXiv
    1810.04805) without its sentence pairs; a masked token is always the mask.
    """

    NAME: ClassVar[str] = "masked-lm"
    EVALUATED_BY: ClassVar[str] = "medvlm-text-encoder"

    layers: int = 4  # as many as encoder and decoder of `seq2seq` together

    def ready(self, tokenizer: Any) -> None:
        """The special tokens that BERT has, added where there are none, and the longest text."""
        known = tokenizer.special_tokens_map
        tokenizer.add_special_tokens({kind: token for kind, token in ADDED.items() if kind not in known})
        tokenizer.model_max_length = self.positions

    @property
    def positions(self) -> int:
        """The longest text, special tokens included."""
        return self.source_tokens + self.target_tokens + 2

    def begin(self, tokenizer: Any, train: Sequence[Summary], validation: Sequence[Summary]) -> ScratchTraining:
        """A new BERT."""
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=self.feedforward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=self.positions,
            pad_token_id=tokenizer.pad_token_id,
        )
        return _MaskedTraining(self, tokenizer, self.new_model(BertForMaskedLM, config), train, validation)


class _MaskedTraining(ScratchTraining):
    def source(self, prompt: str) -> tuple[int, ...]:
        """The prompt's last tokens after the one that begins a text."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return (self.tokenizer.cls_token_id, *ids[-self.method.source_tokens :])

    def target(self, impression: str) -> tuple[int, ...]:
        """The impression; its end is no token that is asked for."""
        ids = self.tokenizer(f" {impression}", add_special_tokens=False, verbose=False)["input_ids"]
        return tuple(ids[: self.method.target_tokens])

    def losses(self, items: Sequence[int], *, learning: bool) -> tuple[torch.Tensor, Sequence[int]]:
        """Of masked tokens; without learning, of the impressions masked whole."""
        end = self.tokenizer.sep_token_id
        batch = pad(
            [(*self.sources[item], *self.targets[item], end) for item in items],
            filler=self.tokenizer.pad_token_id,
            side="right",
        )
        masked = torch.zeros_like(batch.ids, dtype=torch.bool)
        for row, item in enumerate(items):
            first, last = len(self.sources[item]), len(self.sources[item]) + len(self.targets[item])
            if not learning:
                masked[row, first:last] = True
            elif torch.rand(()) < 0.5:
                masked[row, first + int(torch.rand(()) * (last - first)) : last] = True
            else:
                drawn = torch.rand(last - 1) < MASKED_SHARE
                drawn[int(torch.rand(()) * (last - 1))] = True  # one at least
                masked[row, 1:last] = drawn
        ids = batch.ids.masked_fill(masked, self.tokenizer.mask_token_id).to(self.device)
        asked = masked.to(self.device)
        hidden = self.module.bert(input_ids=ids, attention_mask=batch.mask.to(self.device)).last_hidden_state
        logits = self.module.cls(hidden[asked])
        losses = functional.cross_entropy(logits.float(), batch.ids.to(self.device)[asked], reduction="none")
        return losses, masked.sum(dim=1).tolist()
