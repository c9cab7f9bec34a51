"""Method `projector`: image features of a frozen encoder into a frozen language model, learnt from findings."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn import functional

from medvlm_harness.data.records import Study, Views
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.model_backends.frozen_encoder import encoder_record, frozen_encoder
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.projector import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ProjectedLanguageModel,
    Projector,
    causal_class,
    image_places,
    turn_ids,
)
from medvlm_harness.model_backends.sequences import pad
from medvlm_harness.model_backends.vision_language import IMAGE_PLACE
from medvlm_harness.requests import ImageRef
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.loop import Trainable, fit
from medvlm_harness.training.methods import BaseModel, Method, Trained

__all__ = ["INSTRUCTION", "ProjectorMethod"]

_log = logging.getLogger("lm_eval.medvlm")

# As the tasks on report generation ask, once with the indication before it and once without.
INSTRUCTION = "Write the findings section of the report on this chest x-ray.\n\nFindings:"
NOTHING_STATED = "not stated"
LANGUAGE_MODEL, ENCODER = "language_model", "encoder"


@dataclass(frozen=True, kw_only=True)
class ProjectorMethod(Method):
    """Cross-entropy of the findings' tokens after the image and the prompt.

    The prompt holds the indication for half of the studies, drawn anew at each step. Neither base model changes.

    The softmax takes every token that occurs in the findings, and of all others `negatives` drawn anew at each step,
    which stand for the rest: with a vocabulary of 262,144 half of all computing would go into tokens that no report
    has. Validation loss is computed alike, with negatives of its own.
    """

    NAME: ClassVar[str] = "projector"
    EVALUATED_BY: ClassVar[str] = "medvlm-projector"
    PATHS: ClassVar[frozenset[str]] = frozenset({LANGUAGE_MODEL})

    language_model: str  # a folder as transformers saves it, a .gguf file, or a name on the Hub
    precision: str = "checkpoint"  # of the language model; the projector itself is fp32
    grid: int = 4  # tokens of an image along each side
    hidden: int = 1024  # units between the two layers
    images: Views = "frontal"
    instruction: str = INSTRUCTION
    max_tokens: int = 160  # of the findings; longer ones are cut
    negatives: int = 2048
    validation_studies: int = 128  # at most, the first by id
    learning_rate: float = 5e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("grid", "hidden", "max_tokens", "negatives", "validation_studies", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"Expected {name} to be more than 0, but got {getattr(self, name)}.")

    def train(self, data: TrainingData, output: Path) -> Trained:
        """See `Method.train`."""
        encoder = frozen_encoder(self.model, self.model_args, device=self.device)
        language = LanguageModelBackend(
            pretrained=self.language_model, precision=self.precision, device=self.device, store="off"
        )
        causal_class(language.config, self.language_model)
        train = _items(data, data.train, self.images)
        validation = _items(data, data.validation, self.images)[: self.validation_studies]
        for split, items in (("train", train), ("validation", validation)):
            if not items:
                raise UserError(f"{data.name}: no study of the {split} split has both findings and an image.")
        _log.info("%d of %d train studies have findings and an image", len(train), len(data.train))
        language.ensure_loaded()
        training = _ProjectorTraining(self, encoder, language, train, validation)
        fitted = fit(training, self.schedule, output, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        self._write(output, training.projector, encoder, language)
        return Trained(
            **asdict(fitted),
            parameters=sum(parameter.numel() for parameter in training.projector.parameters()),
            base_models={ENCODER: BaseModel.of(encoder), LANGUAGE_MODEL: BaseModel.of(language)},
            studies={"train": len(train), "validation": len(validation)},
        )

    def _write(self, output: Path, projector: Projector, encoder: DualEncoder, language: LanguageModelBackend) -> None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}
        save_file(state, output / WEIGHTS_FILE)
        place = Path(self.language_model).expanduser()
        recipe = {
            "grid": self.grid,
            "hidden": self.hidden,
            "instruction": self.instruction,
            "images": self.images,
            ENCODER: encoder_record(encoder, self.model, self.model_args),
            LANGUAGE_MODEL: {
                "pretrained": str(place.resolve()) if place.exists() else self.language_model,
                "weights": dict(language.weights),
            },
        }
        (output / CONFIG_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


class _Item(NamedTuple):
    """A study to learn from."""

    images: tuple[ImageRef, ...]
    indication: str
    findings: str


def _items(data: TrainingData, studies: Sequence[Study], views: Views) -> list[_Item]:
    """The studies with findings and an image."""
    made = (_Item(data.images(s, views), s.indication.strip(), s.findings.strip()) for s in studies)
    return [item for item in made if item.images and item.findings]


class _Tokens(NamedTuple):
    """An item as the language model takes it."""

    prompts: tuple[tuple[int, ...], tuple[int, ...]]  # without and with the indication
    answer: tuple[int, ...]


class _ProjectorTraining(Trainable):
    """The projector between two loaded models."""

    def __init__(
        self,
        method: ProjectorMethod,
        encoder: DualEncoder,
        language: LanguageModelBackend,
        train: Sequence[_Item],
        validation: Sequence[_Item],
    ) -> None:
        self.method, self.device = method, language.device
        network: Any = language.model
        self.language_model = network.requires_grad_(False)
        self.tokenizer = language.tokenizer
        self.train, self.validation = train, validation
        refs = [ref for item in (*train, *validation) for ref in item.images]
        self.features = image_places(encoder, refs, grid=method.grid)
        self.projector = self._new_projector()
        self.module = self.projector
        self.network = ProjectedLanguageModel(self.language_model, self.projector)
        self.tokens = [self._tokens(item) for item in (*train, *validation)]
        self.lengths = [len(tokens.prompts[1]) + len(tokens.answer) for tokens in self.tokens[: len(train)]]
        longest = max(self.lengths)
        if longest > language.max_length:
            raise UserError(
                f"A study takes {longest} tokens, but {method.language_model} takes {language.max_length}: use a "
                "smaller grid or max_tokens."
            )
        self.vocabulary = _Vocabulary(self.language_model, self.tokens, negatives=method.negatives)

    def _new_projector(self) -> Projector:
        embeddings = self.language_model.get_input_embeddings()
        features = torch.cat([self.features[ref] for item in self.train for ref in item.images])
        with torch.random.fork_rng():
            torch.manual_seed(self.method.schedule.seed)
            projector = Projector(features.shape[1], self.method.hidden, embeddings.embedding_dim, self.method.grid**2)
        projector.mean.copy_(features.mean(dim=0))
        projector.spread.copy_(features.std(dim=0).clamp(min=1e-6))
        with torch.inference_mode():
            known = sorted({token for item in self.train for token in self._answer(item)})
            own = embeddings(torch.tensor(known, device=self.device)).float()
        projector.size.copy_(own.square().mean().sqrt())
        return projector.to(self.device)

    def _answer(self, item: _Item) -> tuple[int, ...]:
        """The findings after the prompt's colon, and the token that ends a text."""
        ids = self.tokenizer(f" {item.findings}", add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return tuple([*ids, *end][: self.method.max_tokens])

    def _tokens(self, item: _Item) -> _Tokens:
        marks = "\n".join([IMAGE_PLACE] * len(item.images))
        indication = f"Indication: {item.indication or NOTHING_STATED}\n\n"
        places = {"places": self.method.grid**2, "place": self.network.place_id}
        without, with_it = (
            turn_ids(self.tokenizer, f"{marks}\n{before}{self.method.instruction}", len(item.images), **places)
            for before in ("", indication)
        )
        return _Tokens((without, with_it), self._answer(item))

    # --- the loss

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        """Mean over the findings' tokens of the batch."""
        with_indication = (torch.rand(len(items)) < 0.5).tolist()
        losses = self._losses(items, with_indication)
        return losses.mean()

    def validation_loss(self) -> float:
        """Mean over all tokens, half of the studies with their indication."""
        first = len(self.train)
        numbers = sorted(range(first, len(self.tokens)), key=lambda number: len(self.tokens[number].answer))
        total, count = 0.0, 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for start in range(0, len(numbers), self.method.schedule.batch_size):
                part = numbers[start : start + self.method.schedule.batch_size]
                losses = self._losses(part, [number % 2 == 0 for number in part])
                total, count = total + float(losses.double().sum()), count + losses.numel()
        return total / count

    def _losses(self, numbers: Sequence[int], with_indication: Sequence[bool]) -> torch.Tensor:
        """Of each token of the findings, (tokens,)."""
        prompts = [self.tokens[n].prompts[asked] for n, asked in zip(numbers, with_indication, strict=True)]
        answers = [self.tokens[n].answer for n in numbers]
        batch = pad([(*p, *a)[:-1] for p, a in zip(prompts, answers, strict=True)], filler=0, side="right")
        ids, mask = batch.ids.to(self.device), batch.mask.to(self.device)
        everything = (*self.train, *self.validation)
        features = torch.stack([self.features[ref] for n in numbers for ref in everything[n].images])
        embeddings = self.network.embedded(ids, features.to(self.device))
        hidden = self.language_model.base_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=batch.positions.to(self.device), use_cache=False
        ).last_hidden_state
        before = torch.cat(
            [
                hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
                for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        )
        targets = torch.tensor([token for answer in answers for token in answer], device=self.device)
        return self.vocabulary.losses(before, targets)


class _Vocabulary:
    """Cross-entropy over a large vocabulary: all tokens that are targets, and a sample that stands for the rest.

    The sum over the rest is estimated without bias by the mean of the sample times their number. (Bengio & Senécal
    2008, doi 10.1109/TNN.2007.912312, with a uniform proposal.)
    """

    def __init__(self, language_model: Any, tokens: Sequence[_Tokens], *, negatives: int) -> None:
        head = language_model.get_output_embeddings()
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        device = self.weight.device
        self.known = torch.tensor(sorted({token for one in tokens for token in one.answer}), device=device)
        self.place = torch.full((len(self.weight),), -1, device=device)
        self.place[self.known] = torch.arange(len(self.known), device=device)
        self.rest = (self.place < 0).nonzero()[:, 0]
        self.negatives = min(negatives, len(self.rest))
        _refuse_scaled_logits(language_model, self)

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of each position, (tokens,), from the last layer's (tokens, width)."""
        known = self.logits(hidden, self.known)
        drawn = self.rest[torch.randperm(len(self.rest))[: self.negatives].to(self.rest.device)]
        together = [known]
        if len(drawn):
            together.append(self.logits(hidden, drawn) + torch.log(torch.tensor(len(self.rest) / len(drawn))))
        return functional.nll_loss(
            known - torch.cat(together, dim=1).logsumexp(dim=1, keepdim=True), self.place[targets], reduction="none"
        )

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of some tokens, in float32."""
        bias = None if self.bias is None else self.bias[tokens]
        return functional.linear(hidden, self.weight[tokens], bias).float()


@torch.inference_mode()
def _refuse_scaled_logits(language_model: Any, vocabulary: _Vocabulary) -> None:
    """Some models (Gemma 2, Cohere) change logits after their last layer, which `_Vocabulary` does not know."""
    ids = vocabulary.known[:4][None]
    hidden = language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = language_model(input_ids=ids, use_cache=False).logits[0][:, vocabulary.known].float()
    found = vocabulary.logits(hidden, vocabulary.known)
    if (found - expected).abs().max() > 0.02 * expected.abs().max():
        raise UserError(
            f"{type(language_model).__name__} scales its logits in a way that method projector does not know: use "
            "another language model."
        )
