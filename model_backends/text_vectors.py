"""Vectors of texts by masked language models of transformers: BERT, DistilBERT, RoBERTa, and their kind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.checkpoints import Checkpoint, tensor_names
from medvlm_harness.model_backends.embedded_texts import EmbeddedTexts, text_of
from medvlm_harness.model_backends.sentence_layout import SentenceLayout, read_layout, vocabulary_is_cased
from medvlm_harness.model_backends.sequences import pad
from medvlm_harness.model_backends.towers import refuse_key_mismatch
from medvlm_harness.requests import Capability, TokenVectors

__all__ = ["TextVectors"]

_log = logging.getLogger("lm_eval.medvlm")

# Their first position is that after the padding token's.
_SHIFTED = {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}


class TextVectors(EmbeddedTexts):
    """`embed`: the mean of the last layer over a text's tokens, special ones included, scaled to length 1.

    `embed_tokens`: the last layer at each of them, special ones left out, of any length. No vector of it is stored.

    So sentence-transformers has it; a folder of theirs that pools by the first token is pooled so. Texts that are too
    long lose their end, which the answer tells.

    `lower_case=auto` follows the files. A bare vocab.txt with capitals (Bio_ClinicalBERT's) does not say, and
    transformers would lower-case the texts: they keep their case, which is logged; `lower_case=True` is how MedCLIP
    used that model.
    """

    MULTIMODAL = False
    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset({"embed:text", "embed_tokens", "profile"})

    def __init__(self, *, lower_case: bool | Literal["auto"] = "auto", **options: Any) -> None:
        if lower_case not in (True, False, "auto"):
            raise UserError(f"Expected lower_case to be True, False or auto, but got {lower_case!r}.")
        self.lower_case_asked = lower_case
        super().__init__(**options)

    # --- the checkpoint

    def locate(self) -> Checkpoint:
        """Adds what a folder of sentence-transformers says."""
        if self.gguf_file is not None or self.pretrained.endswith(".gguf"):
            raise UserError("medvlm-text-encoder reads no GGUF files: use a folder as transformers saves it.")
        checkpoint = super().locate()
        self.layout: SentenceLayout = read_layout(self.folder)
        return checkpoint

    def model_class(self) -> Any:
        """The encoder with its trained head, or the encoder alone.

        Raises:
            UserError: for any other kind of model.
        """
        from transformers import AutoModel, AutoModelForMaskedLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        kind = self.config.model_type
        if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or self.config.is_encoder_decoder:
            raise UserError(f"{self.pretrained} is no encoder-only model ({kind}): use --model medvlm-lm.")
        return AutoModelForMaskedLM if self.has_head else AutoModel

    @cached_property
    def _skeleton(self) -> Any:
        """The masked language model without any numbers, for the names of its parts."""
        from transformers import AutoModelForMaskedLM

        with torch.device("meta"):
            return AutoModelForMaskedLM.from_config(self.config)

    @cached_property
    def has_head(self) -> bool:
        """Whether the file holds a masked-language-model head; by the names of its tensors, without reading any."""
        inside = f"{self._skeleton.base_model_prefix}."
        head = {part_of(name) for name in self._skeleton.state_dict() if not name.startswith(inside)}
        return bool(head & {part_of(name) for name in tensor_names(self.checkpoint.weights)})

    def check_keys(self, target: str, missing: set[str], unexpected: set[str]) -> None:
        """Refuse an encoder that does not fit, or half a head; heads that are not used are left aside, logged."""
        inside = {name for name, _ in self._skeleton.base_model.named_children()}
        prefix = f"{self._skeleton.base_model_prefix}."
        others = {name for name in unexpected if name.removeprefix(prefix).partition(".")[0] not in inside}
        lacking = {name for name in missing if not part_of(name).endswith("pooler.dense")}  # which no answer uses
        refuse_key_mismatch(self.pretrained, f"transformers' {target}", sorted(lacking), sorted(unexpected - others))
        if others:
            _log.info("%s: %d tensors of other heads are not used (%s...)", self.card.name, len(others), min(others))

    def tokenizer_options(self) -> dict[str, Any]:
        """Whether texts are lower-cased, where the files do not say."""
        return {} if self.lower_case is None else {"do_lower_case": self.lower_case}

    @cached_property
    def lower_case(self) -> bool | None:
        """What the tokenizer is told; None: what its files say."""
        if self.lower_case_asked != "auto":
            return bool(self.lower_case_asked)
        vocabulary, config = self.folder / "vocab.txt", self.folder / "tokenizer_config.json"
        says = (self.folder / "tokenizer.json").is_file() or (
            config.is_file() and "do_lower_case" in config.read_text(encoding="utf-8")
        )
        if says or not vocabulary.is_file() or not vocabulary_is_cased(vocabulary):
            return None
        _log.warning(
            "%s has a vocabulary with capitals, but does not say whether texts keep theirs: they do. "
            "lower_case=True is what transformers would do.",
            self.card.name,
        )
        return False

    @cached_property
    def max_length(self) -> int:
        """The longest text in tokens, special ones included: the least of what was asked for and the files say."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is not None and self.config.model_type in _SHIFTED:
            positions -= (self.config.pad_token_id or 0) + 1
        known = (self.max_length_asked, positions, self.tokenizer.model_max_length, self.layout.max_length)
        return min(int(length) for length in known if length is not None)

    def preprocessing(self) -> dict[str, Any]:
        """Adds pooling and the words before each text."""
        layout = self.layout
        return {**super().preprocessing(), "pooling": layout.pooling, "prefix": layout.prefix, "lower": layout.lower}

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text."""
        first = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return [token for token in first[:1] if token is not None], [token for token in first[1:] if token is not None]

    @property
    def text_room(self) -> int:
        """Beside the special tokens."""
        return self.max_length - sum(map(len, self._ends))

    @property
    def _filler(self) -> int:
        known = (self.config.pad_token_id, self.tokenizer.pad_token_id)  # RoBERTa counts positions by it
        return next((int(token) for token in known if token is not None), 0)

    # --- vectors

    def embed_tokens(self, requests: Sequence[Instance]) -> list[TokenVectors]:
        """Token vectors of one text per request; each distinct text is encoded once."""
        texts = [text_of(request.arguments[0], self.card.name) for request in requests]
        distinct = list(dict.fromkeys(texts))
        found = dict(zip(distinct, self.encode_tokens(distinct), strict=True))
        return [found[text] for text in texts]

    def text_ids(self, text: str) -> list[int]:
        """Without special tokens, after the words that the files put before each text."""
        worded = self.layout.prefix + (text.lower() if self.layout.lower else text)
        return list(self.tokenizer(worded, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_tokens(self, texts: Sequence[str]) -> list[TokenVectors]:
        """Vectors of the last layer for each token of each text, special ones left out; nothing of it is stored."""
        if not texts:
            return []
        self.ensure_loaded()
        encoded = [
            self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
        ]
        ids = [list(one["input_ids"]) for one in encoded]
        order = sorted(range(len(texts)), key=lambda k: (-len(ids[k]), texts[k]))
        found: dict[int, TokenVectors] = {}
        size = self.batching.of(self._device, lambda n: self._hidden([ids[order[0]]] * n))
        start = len(self._ends[0])
        for slot in slots(order, size):
            with self.meter.stage("encode_texts", len(slot), self.tokens_read(ids[k] for k in slot)):
                parts = self.batching.in_parts(slot, lambda part: list(self._hidden([ids[k] for k in part])[0]))
            for k, hidden in zip(slot, [one for part in parts for one in part], strict=True):
                length = min(len(ids[k]), self.text_room)
                vectors = hidden[start : start + length].cpu().numpy()
                found[k] = TokenVectors(vectors, tuple(map(tuple, encoded[k]["offset_mapping"][:length])))
        return [found[k] for k in range(len(texts))]

    def tokens_read(self, texts: Iterable[Sequence[int]]) -> int:
        """Special ones included."""
        ends = sum(map(len, self._ends))
        return sum(min(len(ids), self.text_room) + ends for ids in texts)

    def encode_text_ids(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mean (or first) vector of the last layer, of any length."""
        hidden, mask = self._hidden(texts)
        weights = mask[:, :, None].float()
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return (mean if self.layout.pooling == "mean" else hidden[:, 0]).cpu()

    @torch.inference_mode()
    def _hidden(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer in float32, (n, tokens, d), and which places are tokens, (n, tokens); one forward pass."""
        before, after = self._ends
        rows = [(*before, *ids[: self.text_room], *after) for ids in texts]
        batch = pad(rows, filler=self._filler, side="right", limit=self.max_length)
        mask = batch.mask.to(self._device)
        network = self.network.base_model if self.has_head else self.network
        hidden: torch.Tensor = network(input_ids=batch.ids.to(self._device), attention_mask=mask).last_hidden_state
        return hidden.float(), mask

    # --- results

    def _progress(self, what: str, total: int, size: int) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=total <= size or self.rank > 0, mininterval=1)

    def describe(self) -> dict[str, Any]:
        """Adds what decides vectors."""
        return {
            **super().describe(),
            "trained_head": self.has_head,
            "pooling": self.layout.pooling,
            "lower_case": self.lower_case,
        }


def part_of(name: str) -> str:
    """The module that a tensor belongs to: old checkpoints name its parameters otherwise (gamma, beta)."""
    return name.rpartition(".")[0]
