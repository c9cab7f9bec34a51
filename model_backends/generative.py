"""Generation and log-likelihoods of any causal or encoder-decoder model of transformers, through the store.

A subclass turns the arguments of a request into a `Prompt`: token ids, and references to images. The store,
batch sizes, repeats, truncation and its counts are here, forward passes in `decoder.py`. Conventions are those of
lm-eval's `hf` backend (its `huggingface.py`, 0.4.13), so that the same model gives the same texts and log-likelihoods;
where it depends on what else is in a batch, we do as it does for one item alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.batching import BatchSize, slots
from medvlm_harness.model_backends.decoder import Decoder, Decoding
from medvlm_harness.model_backends.sequences import Prompt, Scored
from medvlm_harness.model_backends.transformers_backend import TransformersBackend
from medvlm_harness.requests import Capability, Generation

__all__ = ["GenerativeBackend", "StoredAnswer"]

_log = logging.getLogger("lm_eval.medvlm")

Item = TypeVar("Item")
# Of keys, values and logits in one batch. On a CPU nobody says that memory runs out: the process is killed.
CPU_BYTES = 2**31


class StoredAnswer(NamedTuple):
    """An answer as it is kept: lm-eval's part of it, and how many tokens of the prompt were cut."""

    value: Any
    cut: int

    def to_bytes(self) -> bytes:
        """As it is stored: JSON."""
        return json.dumps([self.value, self.cut]).encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> StoredAnswer:
        """What `to_bytes` gave."""
        value, cut = json.loads(stored)
        return cls(value, cut)


class _Found(NamedTuple):
    """The answers by key, and which of them had not been asked for before: computed now, or recalled."""

    of: Mapping[str, StoredAnswer]
    computed: Sequence[str]
    recalled: Sequence[str]


class GenerativeBackend(TransformersBackend):
    """A model that writes, and says how likely a text is.

    A context that does not fit is cut from its left, logged and counted (`prompts_cut` of the results). Greedy texts
    and log-likelihoods do not depend on the batch size in fp32 (in bf16 and fp16 the same sums round differently in
    other shapes, which can turn a near tie between two tokens); sampled texts are drawn one by one, each with a seed
    made from `seed=`, its prompt and its repeat.
    """

    CAPABILITIES: ClassVar[frozenset[Capability]] = frozenset(
        {"generate_until", "loglikelihood", "loglikelihood_rolling", "profile"}
    )
    REMEMBERED: ClassVar[tuple[str, ...]] = ("_answers",)
    DEFAULT_PRECISION: ClassVar[str] = "checkpoint"
    DECODER: ClassVar[type[Decoder]] = Decoder
    VIRTUAL_TOKENS: ClassVar[bool] = True

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.seed = seed
        self.generation_batching = BatchSize(self.batch_size, self.max_batch_size)
        self.generated = self.generations_recalled = self.scored = self.scores_recalled = 0
        self.prompts_cut = self.generations_unfinished = 0
        self._answers: dict[tuple[str, str], dict[str, StoredAnswer]] = {}

    # --- for subclasses

    @abstractmethod
    def encode_prompt(self, arguments: Sequence[Any], room: int) -> Prompt:
        """The prompt of a `generate_until` request, in `room` tokens at most."""

    @abstractmethod
    def encode_pair(self, arguments: Sequence[Any]) -> Scored:
        """Context and continuation of a `loglikelihood` request, within `max_length`."""

    @abstractmethod
    def encode_windows(self, text: str) -> list[Scored]:
        """A text as continuations that together are all of it (`loglikelihood_rolling`)."""

    def stack(self, prompts: Sequence[Prompt], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What goes into the model beside the tokens of a batch, on its device.

        Args:
            prompts: those of the batch.
            ids: its padded tokens, (n, length).
        """
        return {}

    @staticmethod
    def input_key(arguments: Sequence[Any]) -> str:
        """The content hash of what a request asks about; an image counts by its own hash, which is its string."""
        return hashlib.sha256(json.dumps([str(one) for one in arguments]).encode()).hexdigest()

    # --- requests

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """A text per request; requests of one set of generation_kwargs are batched by length."""
        texts: list[Generation | None] = [None] * len(requests)
        groups: dict[str, tuple[Decoding, list[int]]] = {}
        for place, request in enumerate(requests):
            decoding = Decoding.of(request.arguments[1])
            groups.setdefault(decoding.key, (decoding, []))[1].append(place)
        for decoding, places in groups.values():
            for place, text in zip(places, self._generations([requests[k] for k in places], decoding), strict=True):
                texts[place] = text
        return [text for text in texts if text is not None]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding would give it."""
        inputs = {self.input_key(request.arguments): request.arguments for request in requests}

        def compute(missing: Sequence[str]) -> Iterator[dict[str, StoredAnswer]]:
            items = {key: self.encode_pair(inputs[key]) for key in missing}
            for scores in self._scores(items):
                yield {key: StoredAnswer(list(score), items[key].prompt.cut) for key, score in scores.items()}

        answers = self._answered("loglikelihood", "", inputs, compute)
        self._count_scores(answers)
        found = (answers.of[self.input_key(request.arguments)].value for request in requests)
        return [(float(score), bool(greedy)) for score, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of each whole text in nats: windows that each see what fits before them; 0 for no text."""
        inputs = {self.input_key(request.arguments): str(request.arguments[0]) for request in requests}

        def compute(missing: Sequence[str]) -> Iterator[dict[str, StoredAnswer]]:
            windows = {key: self.encode_windows(inputs[key]) for key in missing}
            parts: dict[str, dict[int, float]] = {key: {} for key in missing}
            yield {key: StoredAnswer(0.0, 0) for key, items in windows.items() if not items}
            for scores in self._scores({(key, n): w for key, items in windows.items() for n, w in enumerate(items)}):
                for (key, number), (score, _) in scores.items():
                    parts[key][number] = score
                whole = {key for key, _ in scores if len(parts[key]) == len(windows[key])}
                yield {key: StoredAnswer(sum(parts[key][n] for n in range(len(windows[key]))), 0) for key in whole}

        answers = self._answered("loglikelihood_rolling", "", inputs, compute)
        self._count_scores(answers)
        return [float(answers.of[self.input_key(request.arguments)].value) for request in requests]

    # --- answers: known in this process, stored, or computed

    def _answered(
        self,
        kind: str,
        prompt: str,
        keys: Mapping[str, Any],
        compute: Callable[[Sequence[str]], Iterator[Mapping[str, StoredAnswer]]],
    ) -> _Found:
        """The answers to inputs, each computed once; what is computed is stored slot by slot."""
        known = self._answers.setdefault((kind, prompt), {})
        new = [key for key in keys if key not in known]
        space = self.space(kind, prompt=prompt)
        recalled = self.recall(space, new, StoredAnswer.from_bytes)
        missing = [key for key in new if key not in recalled]
        known.update(recalled)
        for slot in compute(missing) if missing else ():
            self.keep(space, {key: answer.to_bytes() for key, answer in slot.items()})
            known.update(slot)
        cut = sum(known[key].cut > 0 for key in new)
        if cut:
            _log.warning(
                "%d of %d prompts do not fit into %d tokens: cut from the left", cut, len(new), self.max_length
            )
        self.prompts_cut += cut
        return _Found(known, missing, list(recalled))

    def _count_scores(self, answers: _Found) -> None:
        self.scored += len(answers.computed)
        self.scores_recalled += len(answers.recalled)

    def _generations(self, requests: Sequence[Instance], decoding: Decoding) -> list[Generation]:
        keys: list[str] = []
        arguments: dict[str, tuple[Any, ...]] = {}
        repeats: dict[str, int] = {}
        for request in requests:
            given = (request.arguments[0], *request.arguments[2:])
            key = self.input_key(given)
            if decoding.sampled:  # lm-eval asks `repeats` times for the same: each is a draw of its own
                key = self.input_key((key, self.seed, request.task_name, request.doc_id))
                repeats[key] = repeats.get(key, -1) + 1
                key = self.input_key((key, repeats[key]))
            keys.append(key)
            arguments[key] = given

        def compute(missing: Sequence[str]) -> Iterator[dict[str, StoredAnswer]]:
            prompts = {key: self.encode_prompt(arguments[key], self._room(decoding)) for key in missing}
            for texts in self._texts(prompts, decoding):
                yield {key: StoredAnswer([str(text), text.finished], prompts[key].cut) for key, text in texts.items()}

        answers = self._answered("generate_until", decoding.key, arguments, compute)
        self.generated += len(answers.computed)
        self.generations_recalled += len(answers.recalled)
        self.generations_unfinished += sum(
            not answers.of[key].value[1] for key in (*answers.computed, *answers.recalled)
        )
        return [Generation(*answers.of[key].value) for key in keys]

    def _room(self, decoding: Decoding) -> int:
        """Tokens that a prompt may have."""
        room = self.max_length if self.is_seq2seq else self.max_length - decoding.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks={decoding.max_new_tokens} leaves no room for a prompt: the model takes "
                f"{self.max_length} tokens. Use --gen_kwargs max_gen_toks=N."
            )
        return room

    # --- the model

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its cache of requests by: the model's hash, not its path."""
        return f"{self.card.name}@{(self.weights_sha256 or '')[:12]}"

    @property
    def is_seq2seq(self) -> bool:
        """An encoder-decoder: the context goes into the encoder, the continuation into the decoder."""
        return bool(self.config.is_encoder_decoder)

    @cached_property
    def decoder(self) -> Decoder:
        """The loaded model."""
        self.ensure_loaded()
        return self.DECODER(
            self.model,
            self.tokenizer,
            seq2seq=self.is_seq2seq,
            device=self._device,
            stack=self.stack,
            limit=self.max_length,
        )

    def _scores(self, items: Mapping[Item, Scored]) -> Iterator[dict[Item, tuple[float, bool]]]:
        """Log-likelihoods, slot by slot, the longest first: memory runs out at once, or not at all."""
        for item in items.values():
            if len(item.ids) > self.max_length:
                raise UserError(
                    f"A continuation has {len(item.ids)} tokens, but the model takes {self.max_length}: it cannot be "
                    "scored. If the model takes more, say so by max_length=N."
                )
        order = sorted(items, key=lambda key: (-len(items[key]), items[key].prompt.ids, items[key].ids))
        if not order:
            return
        longest, logits = items[order[0]], max(len(item.ids) for item in items.values())
        size = self._size(self.batching, lambda n: self.decoder.score([longest] * n), len(longest), logits)
        with self._progress("Scoring", len(order), size) as progress:
            for slot in slots(order, size):
                with self.meter.stage("score", len(slot), sum(len(items[key]) for key in slot)):
                    parts = self.batching.in_parts(slot, lambda part: self.decoder.score([items[key] for key in part]))
                yield dict(zip(slot, [score for part in parts for score in part], strict=True))
                progress.update(len(slot))

    def _texts(self, prompts: Mapping[str, Prompt], decoding: Decoding) -> Iterator[dict[str, Generation]]:
        """Texts, slot by slot, the longest prompts first."""
        order = sorted(prompts, key=lambda key: (-len(prompts[key].ids), prompts[key].ids, key))
        longest = prompts[order[0]]
        size = 1
        if not decoding.sampled:
            tokens = len(longest.ids) + decoding.max_new_tokens
            size = self._size(
                self.generation_batching, lambda n: self.decoder.fill_cache([longest] * n, decoding), tokens, 1
            )
        with self._progress("Generating", len(order), size) as progress:
            for slot in slots(order, size):
                with self.meter.stage("generate", len(slot)) as batch:
                    before = self.decoder.new_tokens
                    texts = self._written([(key, prompts[key]) for key in slot], decoding)
                    batch.tokens = self.decoder.new_tokens - before
                yield dict(zip(slot, texts, strict=True))
                progress.update(len(slot))

    def _written(self, slot: Sequence[tuple[str, Prompt]], decoding: Decoding) -> list[Generation]:
        """The texts of one slot."""
        if decoding.sampled:
            return [self._drawn(*slot[0], decoding)]
        parts = self.generation_batching.in_parts(
            slot, lambda part: self.decoder.generate([prompt for _, prompt in part], decoding)
        )
        return [text for part in parts for text in part]

    def use_batch_size(self, size: int) -> None:
        """Adds that of generation."""
        super().use_batch_size(size)
        self.generation_batching = BatchSize(self.batching.asked)

    def _drawn(self, key: str, prompt: Prompt, decoding: Decoding) -> Generation:
        """A sampled text: the same for the same key, whatever was drawn before."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(key[:15], 16))
            (text,) = self.decoder.generate([prompt], decoding)
        return text

    def _size(self, batching: BatchSize, attempt: Callable[[int], object], tokens: int, logits: int) -> int:
        """The size of a slot; of an automatic one on a CPU, what fits `CPU_BYTES` by the model's configuration."""
        size = batching.of(self._device, attempt)
        if batching.asked is not None or self._device.type == "cuda":
            return size
        text = self.config.get_text_config()
        width = getattr(text, "hidden_size", 1024)
        cache = 2 * tokens * getattr(text, "num_hidden_layers", 32) * width * self.dtype.itemsize
        return max(1, min(size, CPU_BYTES // (cache + 8 * logits * int(text.vocab_size))))

    def _progress(self, what: str, total: int, size: int) -> tqdm[Any]:
        hidden = total <= size or self.rank > 0
        return tqdm(total=total, desc=what, unit="request", disable=hidden, mininterval=1)

    # --- results

    def describe(self) -> dict[str, Any]:
        """Adds what was computed, what came from the store, what was cut, and what ended by its length."""
        return {
            **super().describe(),
            "generation_batch_size": self.generation_batching.found,
            "seed": self.seed,
            "generated": self.generated,
            "generations_recalled": self.generations_recalled,
            "generations_unfinished": self.generations_unfinished,
            "scored": self.scored,
            "scores_recalled": self.scores_recalled,
            "prompts_cut": self.prompts_cut,
        }
