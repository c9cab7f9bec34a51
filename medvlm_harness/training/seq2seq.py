"""Method `seq2seq`: a small encoder-decoder from scratch, findings in and impression out, over any vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.model_backends.sequences import pad
from medvlm_harness.training.scratch import ScratchMethod, ScratchTraining, written_validation
from medvlm_harness.training.summaries import Summary

__all__ = ["Seq2SeqMethod"]


@dataclass(frozen=True, kw_only=True)
class Seq2SeqMethod(ScratchMethod):
    """Cross-entropy of the impression's tokens and its end, given the track's prompt.

    T5's architecture (Raffel et al. 2020, arXiv 1910.10683).
    """

    NAME: ClassVar[str] = "seq2seq"
    EVALUATED_BY: ClassVar[str] = "medvlm-lm"

    layers: int = 2  # of the encoder, and as many of the decoder

    def ready(self, tokenizer: Any) -> None:
        """A padding token, a token that ends texts, and the longest prompt."""
        if tokenizer.pad_token_id is None:
            raise UserError(f"The tokenizer {self.tokenizer} has no padding token, which decoders start from.")
        if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
            raise UserError(f"The tokenizer {self.tokenizer} has no token that ends a text.")
        if tokenizer.eos_token_id is None:
            tokenizer.eos_token = tokenizer.sep_token
        tokenizer.model_max_length = self.source_tokens

    def begin(self, tokenizer: Any, train: Sequence[Summary], validation: Sequence[Summary]) -> ScratchTraining:
        """A new T5."""
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=self.width,
            d_kv=self.width // self.heads,
            d_ff=self.feedforward,
            num_layers=self.layers,
            num_heads=self.heads,
            dropout_rate=self.dropout,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        return _Seq2SeqTraining(self, tokenizer, self.new_model(T5ForConditionalGeneration, config), train, validation)

    def validate(self, training: ScratchTraining, folder: Path) -> dict[str, Estimate]:
        """Bits per character, and ROUGE-L of greedy texts."""
        return written_validation(training, folder)


class _Seq2SeqTraining(ScratchTraining):
    def losses(self, items: Sequence[int], *, learning: bool) -> tuple[torch.Tensor, Sequence[int]]:
        """Of the impressions' tokens, which are all that is learnt."""
        filler = self.tokenizer.pad_token_id
        source = pad([self.sources[item] for item in items], filler=filler, side="right")
        target = pad([self.targets[item] for item in items], filler=filler, side="right")
        shifted = functional.pad(target.ids[:, :-1], (1, 0), value=self.module.config.decoder_start_token_id)
        mask, known = source.mask.to(self.device), target.mask.bool().to(self.device)
        read = self.module.encoder(input_ids=source.ids.to(self.device), attention_mask=mask).last_hidden_state
        hidden = self.module.decoder(
            input_ids=shifted.to(self.device),
            encoder_hidden_states=read,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
        # T5 scales where its embeddings are its head.
        logits = self.module.lm_head(hidden[known] * self.module.config.d_model**-0.5)
        losses = functional.cross_entropy(logits.float(), target.ids.to(self.device)[known], reduction="none")
        return losses, [len(self.targets[item]) for item in items]
