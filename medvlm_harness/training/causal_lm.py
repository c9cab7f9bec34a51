"""Method `causal-lm`: a small decoder from scratch that reads findings and goes on with the impression."""

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
from medvlm_harness.training.summaries import Summary, generation_kwargs

__all__ = ["CausalMethod"]


@dataclass(frozen=True, kw_only=True)
class CausalMethod(ScratchMethod):
    """Cross-entropy of every token after the first, those of the prompt too; chosen by that of the impressions.

    Llama's architecture (Touvron et al. 2023, arXiv 2302.13971), input and output embeddings shared.
    """

    NAME: ClassVar[str] = "causal-lm"
    EVALUATED_BY: ClassVar[str] = "medvlm-lm"

    layers: int = 4  # as many as encoder and decoder of `seq2seq` together

    def ready(self, tokenizer: Any) -> None:
        """One token that begins and ends texts, and room for prompt and impression."""
        from tokenizers import processors

        end = tokenizer.eos_token or tokenizer.sep_token
        if end is None:
            raise UserError(f"The tokenizer {self.tokenizer} has no token that ends a text.")
        tokenizer.bos_token = tokenizer.eos_token = end
        # Another architecture's end after each prompt would say that nothing follows.
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        tokenizer.model_max_length = self.positions

    @property
    def positions(self) -> int:
        """The longest input: a prompt, and as much behind it as the track lets a model write."""
        return self.source_tokens + max(self.target_tokens, int(generation_kwargs()["max_gen_toks"]))

    def begin(self, tokenizer: Any, train: Sequence[Summary], validation: Sequence[Summary]) -> ScratchTraining:
        """A new Llama."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=self.feedforward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            attention_dropout=self.dropout,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return _CausalTraining(self, tokenizer, self.new_model(LlamaForCausalLM, config), train, validation)

    def validate(self, training: ScratchTraining, folder: Path) -> dict[str, Estimate]:
        """Bits per character, and ROUGE-L of greedy texts."""
        return written_validation(training, folder)


class _CausalTraining(ScratchTraining):
    def losses(self, items: Sequence[int], *, learning: bool) -> tuple[torch.Tensor, Sequence[int]]:
        """Of prompt and impression, or of the impression alone."""
        batch = pad(
            [(*self.sources[item], *self.targets[item]) for item in items],
            filler=self.tokenizer.eos_token_id,
            side="right",
        )
        known = batch.mask[:, 1:].bool()
        if not learning:
            prompts = torch.tensor([len(self.sources[item]) for item in items])
            known &= torch.arange(1, batch.ids.shape[1]) >= prompts[:, None]
        ids, asked = batch.ids.to(self.device), known.to(self.device)
        hidden = self.module.model(
            input_ids=ids, attention_mask=batch.mask.to(self.device), use_cache=False
        ).last_hidden_state
        logits = self.module.lm_head(hidden[:, :-1][asked])
        losses = functional.cross_entropy(logits.float(), ids[:, 1:][asked], reduction="none")
        return losses, known.sum(dim=1).tolist()
