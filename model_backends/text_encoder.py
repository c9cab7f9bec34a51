"""`medvlm-text-encoder`: BERT, DistilBERT, RoBERTa and their kind, and folders of sentence-transformers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lm_eval.api.instance import Instance
from scipy.special import expit
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.checkpoints import Checkpoint, tensor_names
from medvlm_harness.model_backends.dual_encoder import log_odds_and_softmax, unit
from medvlm_harness.model_backends.masked_scoring import MaskedRow, MaskedScorer, masked_rows
from medvlm_harness.model_backends.sentence_layout import SentenceLayout, read_layout, vocabulary_is_cased
from medvlm_harness.model_backends.sequences import pad
from medvlm_harness.model_backends.towers import refuse_key_mismatch
from medvlm_harness.model_backends.transformers_backend import TransformersBackend
from medvlm_harness.requests import Capability, Embedding, ImageRef, LabelScores, LabelSet, TextRef

__all__ = ["TextEncoderBackend"]

_log = logging.getLogger("lm_eval.medvlm")

ClassifyBy = Literal["auto", "likelihood", "similarity"]
NO_HEAD = "its checkpoint holds no trained masked-language-model head, and one at random would answer without a word"
# Their first position is that after the padding token's.
_SHIFTED = {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}


class _Score(NamedTuple):
    """Log-likelihood in nats, whether each token was the most likely one, and the tokens cut off the context."""

    value: float
    greedy: bool
    cut: int

    def to_bytes(self) -> bytes:
        return json.dumps(self).encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> _Score:
        return cls(*json.loads(stored))


class TextEncoderBackend(TransformersBackend):
    """Vectors of texts, pseudo-log-likelihoods, and with them multiple choice and classification of texts.

    `embed`: the mean of the last layer over a text's tokens, special ones included (as sentence-transformers has it; a
    folder of theirs that pools by the first token is pooled so), scaled to length 1. Texts that are too long lose their
    end, which the answer tells.

    `loglikelihood`: see `masked_scoring.py`. A context that is too long is cut from its left, logged and counted.

    `classify` of a text. By likelihood, where there is a trained head (`classify_by=auto`): each phrase scores its
    pseudo-log-likelihood after the text minus that after no text (pointwise mutual information, so that a phrase's
    length and how common it is cancel), averaged over a label's phrases. By similarity: the cosine of the text with the
    mean of a label's phrases. Multilabel: margin = positive - negative, probability = sigmoid of it. Multiclass:
    softmax over the options, margin = log-odds.

    Refuses `generate_until` and `loglikelihood_rolling`, which a masked model has no answer to, and images. Without a
    trained head refuses likelihoods.

    `lower_case=auto` follows the files. A bare vocab.txt with capitals (Bio_ClinicalBERT's) does not say, and
    transformers would lower-case the texts: they keep their case, which is logged; `lower_case=True` is how MedCLIP
    used that model.
    """

    MULTIMODAL = False
    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset({"classify:text", "embed:text", "loglikelihood"})
    card: ModelCard = ModelCard(
        name="medvlm-text-encoder",
        family="text encoder",
        summary="any masked language model of transformers, and sentence-transformers folders",
        probability_scale="log-likelihood",
    )

    def __init__(
        self, *, lower_case: bool | Literal["auto"] = "auto", classify_by: ClassifyBy = "auto", **options: Any
    ) -> None:
        if lower_case not in (True, False, "auto"):
            raise UserError(f"Expected lower_case to be True, False or auto, but got {lower_case!r}.")
        if classify_by not in ("auto", "likelihood", "similarity"):
            raise UserError(f"Expected classify_by to be auto, likelihood or similarity, but got {classify_by!r}.")
        self.lower_case_asked = lower_case
        super().__init__(**options)
        if not self.has_head:
            self.lacks = {"loglikelihood": NO_HEAD}
        if classify_by == "likelihood" and not self.has_head:
            raise UserError(f"classify_by=likelihood cannot be used with {self.pretrained}: {NO_HEAD}.")
        chosen = "likelihood" if self.has_head else "similarity"
        self.classify_by = chosen if classify_by == "auto" else classify_by
        if self.classify_by == "similarity":
            self.card = replace(self.card, probability_scale="no scale")
        self.texts_encoded = self.texts_recalled = self.scored = self.scores_recalled = self.prompts_cut = 0
        self._vectors: dict[str, Embedding] = {}
        self._scores: dict[str, _Score] = {}

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
        head = {_part(name) for name in self._skeleton.state_dict() if not name.startswith(inside)}
        return bool(head & {_part(name) for name in tensor_names(self.checkpoint.weights)})

    def check_keys(self, target: str, missing: set[str], unexpected: set[str]) -> None:
        """Refuse an encoder that does not fit, or half a head; heads that are not used are left aside, logged."""
        inside = {name for name, _ in self._skeleton.base_model.named_children()}
        prefix = f"{self._skeleton.base_model_prefix}."
        others = {name for name in unexpected if name.removeprefix(prefix).partition(".")[0] not in inside}
        lacking = {name for name in missing if not _part(name).endswith("pooler.dense")}  # which no answer uses
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
    def _filler(self) -> int:
        known = (self.config.pad_token_id, self.tokenizer.pad_token_id)  # RoBERTa counts positions by it
        return next((int(token) for token in known if token is not None), 0)

    # --- vectors

    def embed(self, requests: Sequence[Instance]) -> list[Embedding]:
        """One unit vector per request; each distinct text is encoded once in the life of the model."""
        texts = [_text(request.arguments[0], self.card.name) for request in requests]
        self._encode_new(texts)
        return [self._vectors[text] for text in texts]

    def _encode_new(self, texts: Sequence[str]) -> None:
        new = {str(TextRef(text)): text for text in texts if text not in self._vectors}
        space = self.space("embed:text")
        stored = self.recall(space, new, Embedding.from_bytes)
        self._vectors.update({new[key]: vector for key, vector in stored.items()})
        self.texts_recalled += len(stored)
        missing = [text for key, text in new.items() if key not in stored]
        if not missing:
            return
        self.ensure_loaded()
        ids = {text: self._ids(text) for text in missing}
        order = sorted(missing, key=lambda text: (-len(ids[text]), text))
        size = self.batching.of(self._device, lambda n: self._encode([ids[order[0]]] * n))
        with self._progress("Encoding texts", len(order), size) as progress:
            for slot in slots(order, size):
                parts = self.batching.in_parts(slot, lambda part: self._encode([ids[text] for text in part]))
                vectors = unit(torch.cat(parts).numpy())
                room = self.max_length - sum(map(len, self._ends))
                found = {t: Embedding(v, len(ids[t]) > room) for t, v in zip(slot, vectors, strict=True)}
                self.keep(space, {str(TextRef(text)): vector.to_bytes() for text, vector in found.items()})
                self._vectors.update(found)
                self.texts_encoded += len(slot)
                progress.update(len(slot))

    def _ids(self, text: str) -> list[int]:
        worded = self.layout.prefix + (text.lower() if self.layout.lower else text)
        return list(self.tokenizer(worded, add_special_tokens=False, verbose=False)["input_ids"])

    @torch.inference_mode()
    def _encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mean (or first) vector of the last layer, (n, d) in float32, of any length."""
        before, after = self._ends
        room = self.max_length - len(before) - len(after)
        rows = [(*before, *ids[:room], *after) for ids in texts]
        batch = pad(rows, filler=self._filler, side="right", limit=self.max_length)
        mask = batch.mask.to(self._device)
        network = self._network.base_model if self.has_head else self._network
        hidden: torch.Tensor = network(input_ids=batch.ids.to(self._device), attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].float()
        mean = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
        return (mean if self.layout.pooling == "mean" else hidden[:, 0].float()).cpu()

    @property
    def _network(self) -> Any:
        """The loaded model without PEFT's wrapper, whose layers an adapter has replaced."""
        model: Any = self.model
        return model if self.adapter is None else model.get_base_model()

    # --- pseudo-log-likelihoods

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Pseudo-log-likelihood of each continuation in nats, and whether each token was the most likely one."""
        if not self.has_head:
            raise UserError(f"{self.card.name} cannot answer `loglikelihood` requests: {NO_HEAD}.")
        for request in requests:
            if len(request.arguments) > 2:
                raise UserError(f"{self.card.name} takes text alone.")
        pairs = [(str(request.arguments[0]), str(request.arguments[1])) for request in requests]
        return [(score.value, score.greedy) for score in self._scored(pairs)]

    def _scored(self, pairs: Sequence[tuple[str, str]]) -> list[_Score]:
        keys = [hashlib.sha256(json.dumps(pair).encode()).hexdigest() for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._scores}
        space = self.space("loglikelihood")
        stored = self.recall(space, new, _Score.from_bytes)
        self._scores.update(stored)
        self.scores_recalled += len(stored)
        for found in self._score_new({key: pair for key, pair in new.items() if key not in stored}):
            self.keep(space, {key: score.to_bytes() for key, score in found.items()})
            self._scores.update(found)
            self.scored += len(found)
        cut = sum(self._scores[key].cut > 0 for key in new)
        if cut:
            _log.warning("%d of %d contexts do not fit into %d tokens: left end cut", cut, len(new), self.max_length)
        self.prompts_cut += cut
        return [self._scores[key] for key in keys]

    def _score_new(self, pairs: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, _Score]]:
        """Scores by key, slot by slot, the longest first; a slot is of pairs, its forward passes are of tokens."""
        if not pairs:
            return
        self.ensure_loaded()
        scorer = MaskedScorer(self._network, filler=self._filler, device=self._device, limit=self.max_length)
        parts = {key: self._split(*pair) for key, pair in pairs.items()}
        order = sorted(parts, key=lambda key: (-sum(map(len, parts[key][:2])), pairs[key]))
        size = self.batching.of(self._device, lambda n: scorer.score(self._rows(*parts[order[0]][:2])[:1] * n))
        with self._progress("Scoring", len(order), size) as progress:
            for slot in slots(order, size):
                found = scorer.totals({key: self._rows(*parts[key][:2]) for key in slot}, self.batching, size)
                yield {key: _Score(*score, parts[key][2]) for key, score in found.items()}
                progress.update(len(slot))

    def _rows(self, context: Sequence[int], continuation: Sequence[int]) -> list[MaskedRow]:
        before, after = self._ends
        return masked_rows([*before, *context], continuation, after, mask=self.tokenizer.mask_token_id)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int], int]:
        """Tokens of both as they are in one text; those of the context that fit, and how many do not.

        Raises:
            UserError: if the continuation has no tokens, or too many.
        """
        encoded = self.tokenizer(
            context + continuation, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # A token that reaches beyond the context belongs to the continuation, as in lm-eval.
        first = sum(end <= len(context) for _, end in encoded["offset_mapping"])
        ids = list(encoded["input_ids"])
        context_ids, rest = ids[:first], ids[first:]
        room = self.max_length - sum(map(len, self._ends)) - len(rest)
        if not rest or room < 0:
            raise UserError(
                f"Expected a continuation of 1 to {self.max_length - sum(map(len, self._ends))} tokens, but got "
                f"{len(rest)}: {continuation[:40]!r}."
            )
        kept = context_ids[-room:] if room else []
        return kept, rest, len(context_ids) - len(kept)

    # --- classification

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Scores of each text for each label of its set: see the class."""
        texts = [_text(request.arguments[0], self.card.name) for request in requests]
        sets: list[LabelSet] = [request.arguments[1] for request in requests]
        score = self._likelihoods if self.classify_by == "likelihood" else self._similarities
        found = score([(t, phrases) for t, one in zip(texts, sets, strict=True) for phrases in _phrases(one)])
        answers = []
        start = 0
        for one in sets:
            values = np.array(found[start : (start := start + len(_phrases(one)))])
            if one.kind == "multilabel":
                margin = values[::2] - values[1::2]
                probability = expit(margin)
            else:
                (margin,), (probability,) = log_odds_and_softmax(values[None])
            answers.append(LabelScores(tuple(margin.tolist()), tuple(probability.tolist())))
        return answers

    def _likelihoods(self, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[float]:
        """Mean over phrases of what the text adds to a phrase's pseudo-log-likelihood, in nats."""
        pairs = [(context, f" {phrase}") for text, phrases in asked for phrase in phrases for context in (text, "")]
        values = iter(self._scored(pairs))
        return [float(np.mean([next(values).value - next(values).value for _ in phrases])) for _, phrases in asked]

    def _similarities(self, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[float]:
        """Cosine of the text with the mean of the phrases."""
        self._encode_new([one for text, phrases in asked for one in (text, *phrases)])
        means = {p: unit(np.mean([self._vectors[one].vector for one in p], axis=0)) for p in {p for _, p in asked}}
        return [float(self._vectors[text].vector @ means[phrases]) for text, phrases in asked]

    # --- results

    def _progress(self, what: str, total: int, size: int) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=total <= size or self.rank > 0, mininterval=1)

    def describe(self) -> dict[str, Any]:
        """Adds what decides vectors and scores, and what was computed, recalled and cut."""
        return {
            **super().describe(),
            "probability_scale": self.card.probability_scale,
            "classify_by": self.classify_by,
            "trained_head": self.has_head,
            "pooling": self.layout.pooling,
            "lower_case": self.lower_case,
            "texts_encoded": self.texts_encoded,
            "texts_recalled": self.texts_recalled,
            "scored": self.scored,
            "scores_recalled": self.scores_recalled,
            "prompts_cut": self.prompts_cut,
        }


def _part(name: str) -> str:
    """The module that a tensor belongs to: old checkpoints name its parameters otherwise (gamma, beta)."""
    return name.rpartition(".")[0]


def _phrases(label_set: LabelSet) -> list[tuple[str, ...]]:
    """What each label is scored by, in order: positive and negative phrases by turns, or the options."""
    if label_set.kind == "multiclass":
        return [label.positive for label in label_set.labels]
    return [phrases for label in label_set.labels for phrases in (label.positive, label.negative)]


def _text(argument: Any, name: str) -> str:
    if isinstance(argument, ImageRef):
        raise UserError(f"{name} takes text alone, but was given an image.")
    return str(getattr(argument, "text", argument))
