"""`medvlm-lm`: causal (decoder-only) and encoder-decoder language models of transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.embedded_texts import EmbeddedTexts
from medvlm_harness.model_backends.generative import GenerativeBackend
from medvlm_harness.model_backends.sequences import Prompt, Scored, pad
from medvlm_harness.requests import Capability

__all__ = ["LanguageModelBackend"]

Pooling = Literal["mean", "last"]

_log = logging.getLogger("lm_eval.medvlm")


class LanguageModelBackend(EmbeddedTexts, GenerativeBackend):
    """Text in, text out: `generate_until`, `loglikelihood` and `loglikelihood_rolling`; and `embed` of texts.

    The vector of a text is the mean of the last layer over its tokens, special ones left out; of an encoder-decoder,
    the encoder's last layer. `pooling=last` takes the last token of a causal model, which has seen all of it.

    Tokens, truncation, stop strings and defaults are those of lm-eval's `hf`. Where we differ: a text of an
    encoder-decoder has `max_gen_toks` tokens at most (`hf` adds the length of the context); the token that ends a text
    is no part of it (`hf` leaves one in that the tokenizer does not call special); the embeddings of a model with an
    adapter keep their size (`hf` fits them to the tokenizer, which changes the softmax); log-likelihoods are summed in
    fp32 or better whatever the model's precision.

    Refuses encoders (BERT and its kind), which `hf` scores as if they were causal: use medvlm-text-encoder. Refuses
    requests with images.
    """

    MULTIMODAL = False
    CAPABILITIES: ClassVar[frozenset[Capability]] = GenerativeBackend.CAPABILITIES | {"embed:text"}
    REMEMBERED: ClassVar[tuple[str, ...]] = (*EmbeddedTexts.REMEMBERED, *GenerativeBackend.REMEMBERED)
    card: ModelCard = backend_card("medvlm-lm")

    def __init__(self, *, pooling: Pooling = "mean", **options: Any) -> None:
        if pooling not in get_args(Pooling):
            raise UserError(f"Expected pooling to be {' or '.join(get_args(Pooling))}, but got {pooling!r}.")
        self.pooling = pooling
        super().__init__(**options)
        if pooling == "last" and self.is_seq2seq:
            raise UserError(f"pooling=last is for causal models, but {self.pretrained} is an encoder-decoder.")

    def model_class(self) -> Any:
        """By what lm-eval's `hf` goes by as well."""
        return self.class_of(self.config, self.pretrained)

    @staticmethod
    def class_of(config: Any, where: str) -> Any:
        """The class of transformers for a language model's configuration.

        Raises:
            UserError: if it is an encoder, or no language model.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )

        kind = config.model_type
        if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return AutoModelForSeq2SeqLM
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
            raise UserError(
                f"{where} is an encoder ({kind}), which cannot generate, and whose likelihoods are no causal "
                "model's: use --model medvlm-text-encoder."
            )
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise UserError(
                f"{where} is no language model that transformers knows ({kind}); "
                "models that see images take --model medvlm-vlm."
            )
        return AutoModelForCausalLM

    # --- tokens

    def encode_prompt(self, arguments: Sequence[Any], room: int) -> Prompt:
        """The context's last `room` tokens."""
        self._refuse_images(arguments[1:])
        context = str(arguments[0])
        plain = not self.is_seq2seq and has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self._encode(context, add_special_tokens=False if plain else None)
        if not ids:
            raise UserError("A prompt has no tokens: this model cannot start from nothing.")
        return Prompt(tuple(ids[-room:]), cut=max(0, len(ids) - room))

    def encode_pair(self, arguments: Sequence[Any]) -> Scored:
        """The context's last tokens that fit, and the continuation."""
        self._refuse_images(arguments[2:])
        context, continuation = str(arguments[0]), str(arguments[1])
        if context:
            context_ids, ids = TemplateLM._encode_pair(self, context, continuation)
        else:
            context_ids, ids = [self.prefix_token_id], self._encode(continuation, add_special_tokens=False)
            if ids[:1] == context_ids:
                context_ids, ids = ids[:1], ids[1:]
        if not ids or not context_ids:
            raise UserError(
                f"Expected a continuation of one token or more, but got {continuation!r} after {context!r}."
            )
        return self._fitting(context_ids, ids)

    def encode_windows(self, text: str) -> list[Scored]:
        """Windows as lm-eval cuts them: each token is predicted once."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [self._fitting(*make_disjoint_window(window)) for window in windows]

    def _fitting(self, context_ids: Sequence[int], ids: Sequence[int]) -> Scored:
        """A causal model reads all but the last token; of an encoder-decoder each half has the whole length."""
        room = self.max_length if self.is_seq2seq else self.max_length + 1 - len(ids)
        kept = context_ids[-room:] if room > 0 else ()
        return Scored(Prompt(tuple(kept), cut=len(context_ids) - len(kept)), tuple(ids))

    def _refuse_images(self, rest: Sequence[Any]) -> None:
        if rest:
            raise UserError(f"{self.card.name} takes text alone, but the task gives it {type(rest[0]).__name__} too.")

    def describe(self) -> dict[str, Any]:
        """Adds how a text's vector is made."""
        return {**super().describe(), "pooling": self.pooling}

    @property
    def backend(self) -> str:
        """`causal` or `seq2seq`, as lm-eval calls them."""
        return "seq2seq" if self.is_seq2seq else "causal"

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token that begins a text, else the one that ends it."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError(f"The tokenizer of {self.pretrained} has neither a begin nor an end token to start from.")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, but no second begin token."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    # --- vectors of texts

    def preprocessing(self) -> dict[str, Any]:
        """Adds how a text's vector is made."""
        return {**super().preprocessing(), "pooling": self.pooling}

    def text_ids(self, text: str) -> list[int]:
        """With special tokens as the tokenizer adds them."""
        return self._encode(text, add_special_tokens=None)

    @property
    def text_room(self) -> int:
        """The longest input."""
        return self.max_length

    @torch.inference_mode()
    def encode_text_ids(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See the class; of any length.

        Raises:
            UserError: if a text has no tokens but special ones.
        """
        batch = pad(
            [tuple(ids[: self.text_room]) for ids in texts],
            filler=self._text_filler,
            side="right",
            limit=self.max_length,
        )
        special = torch.isin(batch.ids, torch.tensor(self.tokenizer.all_special_ids, dtype=torch.long))
        own = (batch.mask.bool() & ~special).to(self._device)
        if not bool(own.any(dim=1).all()):
            raise UserError("A text has no tokens: it has no vector.")
        part = self.network.get_encoder() if self.is_seq2seq else self.network.base_model
        options = {} if self.is_seq2seq else {"use_cache": False}
        given = {"input_ids": batch.ids.to(self._device), "attention_mask": batch.mask.to(self._device)}
        hidden = part(**given, **options).last_hidden_state.float()
        if self.pooling == "last":
            places = own * torch.arange(own.shape[1], device=self._device)
            vectors: torch.Tensor = hidden[torch.arange(len(hidden)), places.argmax(dim=1)]
        else:
            weights = own[:, :, None].float()
            vectors = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return vectors.cpu()

    @property
    def _text_filler(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None), 0)

    # --- chat templates

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that lm-eval writes into results; chosen as it does for `hf`."""
        if chat_template and not self.tokenizer.chat_template:
            raise UserError(f"{self.card.name} has no chat template: leave out --apply_chat_template.")
        chosen: str | None = TemplateLM.chat_template(self, chat_template)
        return chosen

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt; a template without a system role gets the conversation without it, logged.

        Raises:
            UserError: if there is no template, or it takes no such conversation.
        """
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError(f"{self.card.name} has no chat template: leave out --apply_chat_template.")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        without = [message for message in chat_history if message["role"] != "system"]
        try:
            return self._templated(chat_history, options)
        except TemplateError as error:
            if len(without) == len(chat_history):
                raise UserError(f"The chat template of {self.card.name} refuses the conversation: {error}") from error
            _log.warning("the chat template of %s takes no system role: left out", self.card.name)
            return self._templated(without, options)

    def _templated(self, history: list[dict[str, str]], options: Mapping[str, bool]) -> str:
        return str(self.tokenizer.apply_chat_template(history, tokenize=False, **options))
