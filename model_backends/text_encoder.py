"""`medvlm-text-encoder`: BERT, DistilBERT, RoBERTa and their kind, and folders of sentence-transformers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from scipy.special import expit

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.sentences import split_sentences
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.cards import ModelCard
from medvlm_harness.model_backends.catalogue import backend_card
from medvlm_harness.model_backends.dual_encoder import log_odds_and_softmax
from medvlm_harness.model_backends.embedded_texts import text_of
from medvlm_harness.model_backends.image_vectors import unit
from medvlm_harness.model_backends.masked_scoring import MaskedRow, MaskedScorer, masked_rows
from medvlm_harness.model_backends.text_vectors import TextVectors
from medvlm_harness.requests import Capability, Generation, LabelScores, LabelSet, floors_of
from medvlm_harness.training.extractive import centroid_sentences

__all__ = ["TextEncoderBackend"]

_log = logging.getLogger("lm_eval.medvlm")

ClassifyBy = Literal["auto", "likelihood", "similarity"]
NO_HEAD = "its checkpoint holds no trained masked-language-model head, and one at random would answer without a word"

WRITES_NOTHING = "a masked language model writes nothing; extractive=1 picks a sentence of the text instead"


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


class TextEncoderBackend(TextVectors):
    """Vectors of texts, pseudo-log-likelihoods, and with them multiple choice and classification of texts.

    `embed`, and `lower_case=`: see `TextVectors`.

    `loglikelihood`: see `masked_scoring.py`. A context that is too long is cut from its left, logged and counted.

    `classify` of a text. By likelihood, where there is a trained head (`classify_by=auto`): each phrase scores its
    pseudo-log-likelihood after the text minus that after no text (pointwise mutual information, so that a phrase's
    length and how common it is cancel), averaged over a label's phrases. By similarity: the cosine of the text with the
    mean of a label's phrases. Multilabel: margin = positive - negative, probability = sigmoid of it. Multiclass:
    softmax over the options, margin = log-odds.

    Refuses `generate_until` and `loglikelihood_rolling`, which a masked model has no answer to, and images. Without a
    trained head refuses likelihoods.

    `extractive=N` answers `generate_until` by N sentences of the text that is to be summarised, those most like all of
    it (see `centroid_sentences`): extraction, not writing, and the model's name says so. The task hands that text over
    as it does for `medvlm-baseline kind=copy`; the prompt's words, stop strings and lengths decide nothing.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset(
        {"classify:text", "embed:text", "embed_tokens", "generate_until", "loglikelihood", "profile"}
    )
    REMEMBERED: ClassVar[tuple[str, ...]] = (*TextVectors.REMEMBERED, "_scores")
    card: ModelCard = backend_card("medvlm-text-encoder")

    def __init__(self, *, classify_by: ClassifyBy = "auto", extractive: int | None = None, **options: Any) -> None:
        if extractive is not None and (not isinstance(extractive, int) or extractive < 1):
            raise UserError(f"Expected extractive to be 1 sentence or more, but got {extractive!r}.")
        if classify_by not in ("auto", "likelihood", "similarity"):
            raise UserError(f"Expected classify_by to be auto, likelihood or similarity, but got {classify_by!r}.")
        super().__init__(**options)
        self.extractive = extractive
        writes = {"generate_until": WRITES_NOTHING} if extractive is None else {}
        self.lacks = {**writes, **({} if self.has_head else {"loglikelihood": NO_HEAD})}
        if extractive is not None:
            self.floor = "copy"
            self.card = replace(self.card, name=f"{self.card.name} extractive")
        if classify_by == "likelihood" and not self.has_head:
            raise UserError(f"classify_by=likelihood cannot be used with {self.pretrained}: {NO_HEAD}.")
        chosen = "likelihood" if self.has_head else "similarity"
        self.classify_by = chosen if classify_by == "auto" else classify_by
        if self.classify_by == "similarity":
            self.card = replace(self.card, probability_scale="no scale")
        self.scored = self.scores_recalled = self.prompts_cut = 0
        self._scores: dict[str, _Score] = {}

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
        scorer = MaskedScorer(self.network, filler=self._filler, device=self._device, limit=self.max_length)
        parts = {key: self._split(*pair) for key, pair in pairs.items()}
        order = sorted(parts, key=lambda key: (-sum(map(len, parts[key][:2])), pairs[key]))
        size = self.batching.of(self._device, lambda n: scorer.score(self._rows(*parts[order[0]][:2])[:1] * n))
        with self._progress("Scoring", len(order), size) as progress:
            for slot in slots(order, size):
                with self.meter.stage("score", len(slot)):
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
        room = self.text_room - len(rest)
        if not rest or room < 0:
            raise UserError(
                f"Expected a continuation of 1 to {self.text_room} tokens, but got {len(rest)}: {continuation[:40]!r}."
            )
        kept = context_ids[-room:] if room else []
        return kept, rest, len(context_ids) - len(kept)

    # --- classification

    def classify(self, requests: Sequence[Instance]) -> list[LabelScores]:
        """Scores of each text for each label of its set: see the class."""
        texts = [text_of(request.arguments[0], self.card.name) for request in requests]
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
        self.encode_new([one for text, phrases in asked for one in (text, *phrases)])
        means = {p: unit(np.mean([self._vectors[one].vector for one in p], axis=0)) for p in {p for _, p in asked}}
        return [float(self._vectors[text].vector @ means[phrases]) for text, phrases in asked]

    # --- extraction

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Sentences of each text itself, where `extractive` asks for them; nothing for a text without sentences.

        Raises:
            UserError: without that option, or if a task hands over no text.
        """
        if self.extractive is None:
            raise UserError(f"{self.card.name} cannot answer `generate_until` requests: {WRITES_NOTHING}.")
        parts = [split_sentences(self._extracted_from(request)) for request in requests]
        self.encode_new([sentence for sentences in parts for sentence in sentences])
        return [Generation(self._extract(sentences, self.extractive), finished=True) for sentences in parts]

    def _extract(self, sentences: Sequence[str], count: int) -> str:
        if not sentences:
            return ""
        vectors = np.stack([self._vectors[sentence].vector for sentence in sentences])
        return " ".join(sentences[place] for place in centroid_sentences(vectors, count=count))

    def _extracted_from(self, request: Instance) -> str:
        source = floors_of(request.arguments[0], request.doc).get("copy")
        if source is None:
            raise UserError(
                f"Task {request.task_name} hands over no text to extract from (`copy` of its floors): "
                "leave out extractive, or use another task."
            )
        return source

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds how texts are classified, and what was scored, recalled and cut."""
        return {
            **super().describe(),
            "probability_scale": self.card.probability_scale,
            "classify_by": self.classify_by,
            "extractive": self.extractive,
            "scored": self.scored,
            "scores_recalled": self.scores_recalled,
            "prompts_cut": self.prompts_cut,
        }


def _phrases(label_set: LabelSet) -> list[tuple[str, ...]]:
    """What each label is scored by, in order: positive and negative phrases by turns, or the options."""
    if label_set.kind == "multiclass":
        return [label.positive for label in label_set.labels]
    return [phrases for label in label_set.labels for phrases in (label.positive, label.negative)]
