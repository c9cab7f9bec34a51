"""Forward passes of a causal or encoder-decoder model of transformers: scoring continuations, and generating texts.

One batch at a time; what is in it, and how large it is, is decided elsewhere. A prompt may have images beside its
tokens: `stack` says what goes into the model for those of a batch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import StoppingCriteriaList

from medvlm_harness.errors import UserError, first_line
from medvlm_harness.model_backends.sequences import (
    Padded,
    Prompt,
    Scored,
    StopStrings,
    continuation_score,
    cut_at_end,
    pad,
    stop_strings,
    written_length,
)
from medvlm_harness.requests import Generation

__all__ = ["Decoder", "Decoding", "Prefix"]

DEFAULT_MAX_GEN_TOKS = 256  # lm-eval's, where a task names none
# From prompts and the padded tokens of their batch, (n, length), to what goes into the model beside them.
Stack = Callable[[Sequence[Prompt], torch.Tensor], Mapping[str, torch.Tensor]]


class Decoding(NamedTuple):
    """How a group of requests is decoded, as lm-eval's generation_kwargs say it."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampled: bool
    options: Mapping[str, Any]  # for transformers' `generate`

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Decoding:
        """Read generation_kwargs.

        Raises:
            UserError: for a length that is none, or a stop string that is no text.
        """
        if "max_length" in kwargs:
            raise UserError("generation_kwargs: max_length counts the prompt too: use max_gen_toks.")
        try:
            options = dict(normalize_gen_kwargs(dict(kwargs), DEFAULT_MAX_GEN_TOKS))
        except (TypeError, ValueError) as error:
            raise UserError(f"generation_kwargs {dict(kwargs)!r}: {error}") from error
        until, length = options.pop("until") or [], options.pop("max_gen_toks")
        if not all(isinstance(string, str) for string in until):
            raise UserError(f"Expected until to be strings, but got {until!r}.")
        if length < 1:
            raise UserError(f"Expected max_gen_toks to be 1 or more, but got {length}.")
        sampled = bool(options["do_sample"])
        if not sampled:
            options.pop("temperature", None)  # 0 stands for greedy, and transformers takes none then
        return cls(tuple(until), length, sampled, options)

    @property
    def key(self) -> str:
        """Everything of it, as JSON with sorted keys."""
        return json.dumps([list(self.until), self.max_new_tokens, dict(self.options)], sort_keys=True)


class Prefix(NamedTuple):
    """The first tokens of several prompts as a model remembers them; one length for all."""

    cache: Any  # transformers' keys and values, one row per prompt
    length: int
    first: torch.Tensor  # (prompts,): the position of the token that comes next


class Decoder:
    """A loaded model with its tokenizer.

    Args:
        network: the model, as transformers or PEFT has it.
        tokenizer: its tokenizer.
        seq2seq: an encoder-decoder: contexts go into the encoder, continuations into the decoder.
        device: where the model is.
        stack: what goes into the model beside the tokens of a batch of prompts.
        limit: the longest input in tokens; an encoder's positions end there.
    """

    def __init__(
        self, network: Any, tokenizer: Any, *, seq2seq: bool, device: torch.device, stack: Stack, limit: int
    ) -> None:
        self.network, self.tokenizer, self.seq2seq = network, tokenizer, seq2seq
        self.device, self.stack, self._limit = device, stack, limit
        base = network.get_base_model() if hasattr(network, "get_base_model") else network
        self._inner = getattr(base, "model", None)
        self._accepted = frozenset(inspect.signature(base.forward).parameters)
        # Such a model (Qwen-VL) gives the tokens of an image two-dimensional positions, which it alone can count.
        self._counts_positions = hasattr(self._inner, "get_rope_index")
        # Newer releases of transformers have another name for it, and warn of the old one.
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"
        # A token for masked places. Its value decides nothing, but it must be one of the model's own.
        known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        self._filler: int = next((token for token in known if token is not None), 0)
        # Tokens that end a text: the generation configuration's and the tokenizer's.
        named = getattr(network.generation_config, "eos_token_id", None)
        ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
        self.end_ids = frozenset(token for token in ends if token is not None)
        self.new_tokens = 0  # written so far; what fills a batch after a text's end is left out

    @torch.inference_mode()
    def score(self, items: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is what greedy decoding gives."""
        prompts, tokens = [item.prompt for item in items], self._tokens(items)
        if self.seq2seq:
            logits = self._forward(tokens, prompts)
            return [continuation_score(logits[row, : len(item.ids)], item.ids) for row, item in enumerate(items)]
        # All continuations end where the batch does, and only their logits are made: over a vocabulary of 262,144,
        # 1,024 tokens of an item would take 1 GB.
        logits = self._forward(tokens, prompts, use_cache=False, **self._last(max(len(item.ids) for item in items)))
        return [continuation_score(logits[row, -len(item.ids) :], item.ids) for row, item in enumerate(items)]

    def target_logits(self, items: Sequence[Scored]) -> torch.Tensor:
        """Logits before each token of each continuation, one item after another, (tokens, vocabulary); for training.

        With gradients, where something learns. The output embeddings see no other place: what they would make of a
        batch's prompts takes most of the memory.
        """
        lengths = [len(item.ids) for item in items]

        def at_targets(head: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            kept = [row[:n] if self.seq2seq else row[-n:] for row, n in zip(given[0], lengths, strict=True)]
            return torch.cat(kept)[None], *given[1:]

        hook = self.network.get_output_embeddings().register_forward_pre_hook(at_targets)
        try:
            return self._forward(self._tokens(items), [item.prompt for item in items], use_cache=False)[0]
        finally:
            hook.remove()

    def _tokens(self, items: Sequence[Scored]) -> dict[str, torch.Tensor]:
        """What goes into the model for prompts and continuations; the last token predicts nothing."""
        if self.seq2seq:
            context = self._encoder_batch([item.prompt for item in items])
            labels = pad([item.ids for item in items], filler=self._filler, side="right", limit=self._limit)
            written = self.network.prepare_decoder_input_ids_from_labels(labels=labels.ids)
            return {"input_ids": context.ids, "attention_mask": context.mask, "decoder_input_ids": written}
        # Padded on the left, all continuations end where the batch does.
        batch = pad([(*item.prompt.ids, *item.ids)[:-1] for item in items], filler=self._filler, side="left")
        given = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if "position_ids" in self._accepted and not self._counts_positions:
            given["position_ids"] = batch.positions
        return given

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Generation]:
        """A text per prompt; the batch goes on to its last end.

        Raises:
            UserError: for an option of decoding that transformers refuses.
        """
        rows = [prompt.ids for prompt in prompts]
        batch = self._encoder_batch(prompts) if self.seq2seq else pad(rows, filler=self._filler, side="left")
        # The texts of an encoder-decoder start after one token, whatever the context; those of a causal model after it.
        start = 1 if self.seq2seq else batch.ids.shape[1]
        end = self.tokenizer.eos_token_id
        stops = stop_strings(decoding.until, None if end is None else self.tokenizer.decode([end]))
        try:
            tokens = self.network.generate(
                input_ids=batch.ids.to(self.device),
                attention_mask=batch.mask.to(self.device),
                max_new_tokens=decoding.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([StopStrings(self.tokenizer, stops, start)]),
                pad_token_id=self._filler,
                eos_token_id=sorted(self.end_ids) or None,
                **self.stack(prompts, batch.ids),
                **decoding.options,
            )
        except (ValueError, TypeError) as error:  # an option that `generate` does not know, or a value it refuses
            raise UserError(f"generation_kwargs {dict(decoding.options)}: {first_line(error)}") from error
        texts = tokens[:, start:].tolist()
        self.new_tokens += sum(written_length(row, end_ids=self.end_ids, filler=self._filler) for row in texts)
        return [cut_at_end(self.tokenizer, row, end_ids=self.end_ids, stops=stops) for row in texts]

    @torch.inference_mode()
    def fill_cache(self, prompts: Sequence[Prompt], decoding: Decoding) -> None:
        """Take as much memory as `generate` does at its end, in one forward pass."""
        extra = (self._filler,) * decoding.max_new_tokens
        if self.seq2seq:
            batch = self._encoder_batch(prompts)
            written = {"decoder_input_ids": torch.tensor([extra] * len(prompts))}
            self._forward({"input_ids": batch.ids, "attention_mask": batch.mask, **written}, prompts, use_cache=True)
        else:
            batch = pad([(*prompt.ids, *extra) for prompt in prompts], filler=self._filler, side="left")
            given = {"input_ids": batch.ids, "attention_mask": batch.mask}
            self._forward(given, prompts, use_cache=True, **self._last(1))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], length: int) -> Prefix:
        """Read the first `length` tokens of each prompt, all of its images among them."""
        ids = torch.tensor([prompt.ids[:length] for prompt in prompts])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "position_ids" in self._accepted and not self._counts_positions:
            given["position_ids"] = torch.arange(length).expand(len(prompts), length)
        output = self._output(given, prompts, use_cache=True, **self._last(1))
        first = torch.full((len(prompts),), length, device=self.device)
        if self._counts_positions and self._inner is not None:
            first = first + self._inner.rope_deltas[:, 0]  # an image takes fewer positions than tokens
        return Prefix(getattr(output, self._cache_name), length, first)

    @torch.inference_mode()
    def continue_from(
        self, prefix: Prefix, rows: Sequence[int], tails: Sequence[Sequence[int]], *, skip: int = 0
    ) -> torch.Tensor:
        """Logits after each token of the tails but the first `skip`, (tails, longest - skip or more, vocabulary).

        Args:
            prefix: what was read; its cache is used up.
            rows: the prompt that each tail goes on with.
            tails: tokens, padded on the right.
            skip: how many logits of each tail are not needed.
        """
        batch = pad(tails, filler=self._filler, side="right")
        length = batch.ids.shape[1]
        of = torch.tensor(rows, device=self.device)
        prefix.cache.batch_select_indices(of)
        seen = torch.ones((len(rows), prefix.length), dtype=torch.long)
        given = {
            "input_ids": batch.ids.to(self.device),
            "attention_mask": torch.cat([seen, batch.mask], 1).to(self.device),
        }
        if "position_ids" in self._accepted:
            positions = prefix.first[of][:, None] + torch.arange(length, device=self.device)
            given["position_ids"] = positions.expand(3, *positions.shape) if self._counts_positions else positions
        options = {self._cache_name: prefix.cache, "use_cache": True, **self._last(length - skip)}
        logits: torch.Tensor = self.network(**given, **options).logits
        return logits[:, logits.shape[1] - (length - skip) :]

    def _encoder_batch(self, prompts: Sequence[Prompt]) -> Padded:
        """Padded on the right, where no position moves."""
        return pad([prompt.ids for prompt in prompts], filler=self._filler, side="right", limit=self._limit)

    def _last(self, tokens: int) -> dict[str, int]:
        """Make logits of the last tokens alone, where the model can."""
        return {"logits_to_keep": tokens} if "logits_to_keep" in self._accepted else {}

    def _forward(self, tokens: Mapping[str, torch.Tensor], prompts: Sequence[Prompt], **options: Any) -> torch.Tensor:
        logits: torch.Tensor = self._output(tokens, prompts, **options).logits
        return logits

    def _output(self, tokens: Mapping[str, torch.Tensor], prompts: Sequence[Prompt], **options: Any) -> Any:
        moved = {name: tensor.to(self.device) for name, tensor in tokens.items()}
        return self.network(**moved, **self.stack(prompts, tokens["input_ids"]), **options)
