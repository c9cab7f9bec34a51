"""Small language models from scratch on findings and impressions: what the methods of every architecture share.

They exist to compare vocabularies, and architectures, under one budget: an encoder-decoder (`seq2seq`), a decoder
(`causal-lm`) and an encoder (`masked-lm`) of one width, from the same reports.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.errors import UserError
from medvlm_harness.metrics.bootstrap import bootstrap_columns
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.rouge import rouge_scores
from medvlm_harness.model_backends.allocation import keep_freed_memory
from medvlm_harness.model_backends.cards import ModelCard, card_beside
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.tokenizer_files import load_tokenizer, tokenizer_sha256
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.loop import Fitted, Trainable, batches, fit
from medvlm_harness.training.methods import BaseModel, Method, Trained
from medvlm_harness.training.summaries import Summary, generation_kwargs, summaries

__all__ = ["ScratchMethod", "ScratchTraining", "written_validation"]

TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class ScratchMethod(Method):
    """A model of given sizes over a given vocabulary; the prompt is the summarisation track's.

    Losses per token of two vocabularies must not be compared: a token of one says more than one of the other.
    """

    PATHS: ClassVar[frozenset[str]] = frozenset({TOKENIZER})
    NEEDS_MODEL: ClassVar[bool] = False

    tokenizer: str  # a folder, a tokenizer.json, a GGUF file, or a name on the Hub
    width: int = 128
    layers: int
    heads: int = 4
    feedforward: int = 512
    dropout: float = 0.1
    source_tokens: int = 256  # of the prompt; longer ones lose their beginning, as the backend cuts them
    target_tokens: int = 64  # of the impression in training; longer ones are cut there, never in evaluation
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: of products in training; weights and evaluation are fp32
    learning_rate: float = 3e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        whole = ("width", "layers", "heads", "feedforward", "source_tokens", "target_tokens", "learning_rate")
        for name in whole:
            if getattr(self, name) <= 0:
                raise UserError(f"Expected {name} to be more than 0, but got {getattr(self, name)}.")
        if self.width % self.heads:
            raise UserError(f"Expected width to be a multiple of heads, but got {self.width} and {self.heads}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"Expected dropout in [0, 1), but got {self.dropout}.")

    # --- for subclasses

    @abstractmethod
    def ready(self, tokenizer: Any) -> None:
        """Give the tokenizer the special tokens that this architecture needs.

        Raises:
            UserError: if it lacks one that cannot be added.
        """

    @abstractmethod
    def begin(self, tokenizer: Any, train: Sequence[Summary], validation: Sequence[Summary]) -> ScratchTraining:
        """The new model with what it learns from."""

    def validate(self, training: ScratchTraining, folder: Path) -> dict[str, Estimate]:
        """What the saved model scores on the validation split beside the loss."""
        return {}

    def train(self, data: TrainingData, output: Path) -> Trained:
        """See `Method.train`."""
        tokenizer = load_tokenizer(self.tokenizer)
        base = _tokenizer_card(self.tokenizer, tokenizer)
        self.ready(tokenizer)
        train, validation = summaries(data)
        keep_freed_memory()
        training = self.begin(tokenizer, train, validation)
        fitted = fit(training, self.schedule, output, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        training.module.save_pretrained(output)
        tokenizer.save_pretrained(output)
        everything = sum(parameter.numel() for parameter in training.module.parameters())
        return Trained(
            **asdict(fitted),
            parameters=everything,
            base_models={TOKENIZER: base},
            studies={"train": len(train), "validation": len(validation)},
            validation=self.validate(training, output),
            counts={
                "vocabulary": len(tokenizer),
                "parameters_without_embeddings": everything - training.module.get_input_embeddings().weight.numel(),
                **training.tokens_seen(fitted),
            },
        )

    def new_model(self, build: Any, config: Any) -> Any:
        """A model of transformers with weights of the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.schedule.seed)
            return build(config)


class ScratchTraining(Trainable):
    """A new model, and the studies as its tokens: those of train, then those of validation."""

    module: Any

    def __init__(
        self,
        method: ScratchMethod,
        tokenizer: Any,
        model: Any,
        train: Sequence[Summary],
        validation: Sequence[Summary],
    ) -> None:
        self.method, self.tokenizer, self.validation = method, tokenizer, validation
        self.device = torch.device(method.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module = model.to(self.device)
        self.first = len(train)  # of validation
        self.sources = [self.source(one.prompt) for one in (*train, *validation)]
        self.targets = [self.target(one.impression) for one in (*train, *validation)]
        for number in range(self.first):
            self.targets[number] = self.targets[number][: method.target_tokens]
        self.lengths = [
            len(source) + len(target)
            for source, target in zip(self.sources[: self.first], self.targets[: self.first], strict=True)
        ]

    # --- for subclasses

    def source(self, prompt: str) -> tuple[int, ...]:
        """The prompt's last tokens, special ones as the tokenizer adds them."""
        return tuple(self.tokenizer(prompt, verbose=False)["input_ids"][-self.method.source_tokens :])

    def target(self, impression: str) -> tuple[int, ...]:
        """The impression after the prompt's colon, and the end."""
        ids = self.tokenizer(f" {impression}", add_special_tokens=False, verbose=False)["input_ids"]
        return (*ids, self.tokenizer.eos_token_id)

    @abstractmethod
    def losses(self, items: Sequence[int], *, learning: bool) -> tuple[torch.Tensor, Sequence[int]]:
        """Of each token that is asked for, item after item, (tokens,); and how many there are of each item.

        Logits are made of these alone: over a vocabulary of 30,000 those of padding would take most of the time.

        Args:
            items: places among train and validation.
            learning: of all that is learnt from; without, of the impressions alone.
        """

    # --- the loss

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        """Mean over the tokens of the batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.method.precision == "bf16"):
            losses, _ = self.losses(items, learning=True)
        return losses.mean()

    def validation_loss(self) -> float:
        """Mean over the impressions' tokens of the split."""
        nats, tokens = self.validation_nats()
        return float(nats.sum() / tokens.sum())

    @torch.inference_mode()
    def validation_nats(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each validation impression what its tokens cost, and how many were asked for; both (studies,)."""
        self.module.eval()
        nats, tokens = np.empty((2, len(self.validation)))
        order = sorted(range(self.first, len(self.targets)), key=lambda item: len(self.sources[item]))
        for start in range(0, len(order), self.method.schedule.batch_size):
            items = order[start : start + self.method.schedule.batch_size]
            losses, counts = self.losses(items, learning=False)
            places = np.array(items) - self.first
            nats[places] = [float(one.sum()) for one in torch.split(losses.double(), list(counts))]
            tokens[places] = counts
        return nats, tokens

    def tokens_seen(self, fitted: Fitted) -> Mapping[str, int]:
        """Tokens of prompts and impressions in all steps, padding left out."""
        schedule = self.method.schedule
        epochs = range(math.ceil(fitted.epochs) + 1)
        every = (b for k in epochs for b in batches(self.lengths, schedule.batch_size, seed=schedule.seed, epoch=k))
        items = [item for batch in islice(every, fitted.steps) for item in batch]
        return {
            "source_tokens_seen": sum(len(self.sources[item]) for item in items),
            "target_tokens_seen": sum(len(self.targets[item]) for item in items),
        }


def written_validation(training: ScratchTraining, folder: Path) -> dict[str, Estimate]:
    """Bits per character of the impressions, and ROUGE-L of greedy ones by the backend that evaluates the model.

    Bits per character compare between vocabularies: what a text costs, whatever its tokens.
    """
    backend = LanguageModelBackend(
        pretrained=str(folder), device=str(training.device), batch_size=training.method.schedule.batch_size, store="off"
    )
    kwargs = generation_kwargs()
    asked = [Instance("generate_until", {}, (one.prompt, kwargs), k) for k, one in enumerate(training.validation)]
    written = [text.strip() for text in backend.generate_until(asked)]
    rouge = rouge_scores(written, [one.impression for one in training.validation]).rougeL
    bits = training.validation_nats()[0] / math.log(2)
    characters = np.array([len(one.impression) for one in training.validation], dtype=np.float64)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack([weights @ bits / (weights @ characters), weights @ rouge / weights.sum(axis=1)])

    studies = [one.study_id for one in training.validation]
    keys = ("bits_per_character", "rougeL")
    return dict(zip(keys, bootstrap_columns(statistic, studies, positives=[None] * len(keys)), strict=True))


def _tokenizer_card(name: str, tokenizer: Any) -> BaseModel:
    """What the vocabulary was learnt from counts as well, where a card beside it says."""
    place = Path(name).expanduser()
    card = ModelCard(name=place.name if place.exists() else name, family="generative")
    card = card_beside(place, card) if place.exists() else card
    return BaseModel(card.name, {"tokenizer.json": tokenizer_sha256(tokenizer)}, card.licence, card.trained_on)
