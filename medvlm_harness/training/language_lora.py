"""Method `lora`: LoRA in a language model, or in the language part of one that sees images, learnt from a task's texts.

On a base whose weights are rounded to 4 or 8 bits (`quantization=nf4` or `int8`) it is QLoRA.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from tqdm import tqdm

from medvlm_harness import plugin
from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.rouge import rouge_scores
from medvlm_harness.model_backends.decoder import Decoder, Decoding
from medvlm_harness.model_backends.generative import GenerativeBackend
from medvlm_harness.model_backends.sequences import Prompt, Scored
from medvlm_harness.model_backends.vision_language import VisionLanguageBackend
from medvlm_harness.tracks.declarations import declared_names
from medvlm_harness.tracks.report_generation import ReportGeneration
from medvlm_harness.tracks.summarization import Summarization
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.loop import fit
from medvlm_harness.training.lora import (
    LoraMethod,
    LoraTrainable,
    after_and_before,
    chosen,
    put_lora,
    supported,
    write_adapter,
)
from medvlm_harness.training.methods import BaseModel, Trained

__all__ = ["LanguageLoraMethod"]

_log = logging.getLogger("lm_eval.medvlm")

SEES, READS = "report_generation", "summarization"


@dataclass(frozen=True, kw_only=True)
class LanguageLoraMethod(LoraMethod):
    """Cross-entropy of the tokens that a task wants written, after its own prompt.

    Of a summarisation task these are the impression's, of report generation the findings'; the token that ends a text
    is learnt too. No chat template is put around the prompt of a language model; one that sees images has its own.
    """

    NAME: ClassVar[str] = "lora"

    task: str = ""  # whose prompt and texts; by default the set's summarisation, with images its report generation
    learning_rate: float = 2e-4
    validation_studies: int = 128
    validation_generations: int = 64  # of these, texts that are written before and after, and scored by ROUGE-L

    def train(self, data: TrainingData, output: Path) -> Trained:
        """See `Method.train`."""
        kind = "a language model or one that sees images, such as medvlm-lm or medvlm-vlm"
        backend = self.base(GenerativeBackend, kind)
        sees = isinstance(backend, VisionLanguageBackend)
        task = _task(self.task or f"{data.name}_{SEES if sees else READS}", sees=sees)
        train = _items(task, data, data.train)
        validation = _items(task, data, data.validation)[: self.validation_studies]
        for split, items in (("train", train), ("validation", validation)):
            if not items:
                raise UserError(f"{data.name}: no study of the {split} split has what {task.task_name} asks for.")
        _log.info("%d of %d train studies have what %s asks for", len(train), len(data.train), task.task_name)
        backend.ensure_loaded()
        network: Any = backend.model
        kinds = {"task_type": "SEQ_2_SEQ_LM" if backend.is_seq2seq else "CAUSAL_LM"}
        model = put_lora(network, chosen(_layers(network, sees), self.targets), self, **kinds)
        backend.model = model
        training = _LanguageTraining(self, backend, task, train, validation)
        written = validation[: self.validation_generations]
        before = training.rouge(written)
        fitted = fit(training, self.schedule, output, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        gains = after_and_before(["rougeL"], training.rouge(written), before, [item.study_id for item in written])
        return Trained(
            **asdict(fitted),
            parameters=write_adapter(model, output),
            base_models={"model": BaseModel.of(backend)},
            studies={"train": len(train), "validation": len(validation)},
            validation=gains,
        )


class _Item(NamedTuple):
    """A study as it is asked about."""

    study_id: str
    arguments: tuple[Any, ...]  # prompt, and images where there are any
    target: str


def _task(name: str, *, sees: bool) -> Any:
    """A packaged task, for its prompt and its way to decode; it reads no data.

    Raises:
        UserError: if there is none of that name, or the base model cannot learn from it.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    paths = declared_names(plugin.tasks_folder())
    if name not in paths:
        raise UserError(f"Unknown task {name!r}.{near_matches(name, paths)}")
    declared = load_yaml(paths[name])
    kind = ReportGeneration if sees else Summarization
    if not (isinstance(declared.get("class"), type) and issubclass(declared["class"], kind)):
        raise UserError(f"Expected task to be one of class {kind.__name__} for this base model, but got {name}.")
    return declared["class"](declared)


def _items(task: Any, data: TrainingData, studies: Sequence[Study]) -> list[_Item]:
    """The studies that have what is asked for; of images those that the task shows."""
    made: list[_Item] = []
    for study in studies:
        findings, impression = study.findings.strip(), study.impression.strip()
        if isinstance(task, Summarization):
            if findings and impression:
                made.append(_Item(study.study_id, (task.prompt_for(study),), impression))
            continue
        images = data.images(study, task.images)
        if images and findings:
            visual = {"visual": list(images)}
            made.append(_Item(study.study_id, (task.prompt_for(study), visual), findings))
    return made


def _layers(network: Any, sees: bool) -> list[str]:
    """All that LoRA can go into, but for output embeddings and whatever looks at images."""
    part = network.get_decoder() if sees else network
    inside = {id(module) for module in part.modules()} - {id(network.get_output_embeddings())}
    return [name for name, module in supported(network).items() if id(module) in inside]


class _LanguageTraining(LoraTrainable):
    """A language model over a task's prompts and texts."""

    def __init__(
        self,
        method: LanguageLoraMethod,
        backend: GenerativeBackend,
        task: Any,
        train: Sequence[_Item],
        validation: Sequence[_Item],
    ) -> None:
        super().__init__(backend.model)  # type: ignore[arg-type]  # it is loaded
        self.backend = backend
        self.size = backend.batch_size or method.schedule.batch_size  # 1 where activations are rounded
        self.decoder: Decoder = backend.decoder
        self.decoding = Decoding.of(task.generation_kwargs)
        self.train = [self.scored(item) for item in train]
        self.validation = [self.scored(item) for item in validation]
        self.lengths = [len(item) for item in self.train]

    def scored(self, item: _Item) -> Scored:
        """Prompt and text as tokens, with the one that ends it; a text is cut where the task would end it."""
        prompt, *images = item.arguments
        # After "Impression:" a text begins with a blank; the templates of conversations end with one of their own.
        lead = "" if images or self.backend.is_seq2seq else " "
        pair = self.backend.encode_pair((prompt, lead + item.target, *images))
        end = self.backend.tokenizer.eos_token_id
        ids = (*pair.ids, *([] if end is None or pair.ids[-1] == end else [end]))[: self.decoding.max_new_tokens]
        over = len(pair.prompt.ids) + len(ids) - 1 - self.backend.max_length
        if over > 0 and not self.backend.is_seq2seq:
            if pair.prompt.images:
                raise UserError(f"A study takes {over} tokens more than the {self.backend.max_length} of the model.")
            return Scored(Prompt(pair.prompt.ids[over:], cut=pair.prompt.cut + over), ids)
        return Scored(pair.prompt, ids)

    def losses(self, items: Sequence[Scored]) -> torch.Tensor:
        """Of each token of the texts, (tokens,)."""
        logits = self.decoder.target_logits(items)
        targets = torch.tensor([token for item in items for token in item.ids], device=logits.device)
        return functional.cross_entropy(logits.float(), targets, reduction="none")

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        """Mean over the tokens of the batch's texts."""
        return self.losses([self.train[item] for item in items]).mean()

    def validation_loss(self) -> float:
        """Mean over all tokens of the validation texts."""
        ordered = sorted(self.validation, key=len)
        total, count = 0.0, 0
        for start in range(0, len(ordered), self.size):
            losses = self.losses(ordered[start : start + self.size])
            total, count = total + float(losses.double().sum()), count + losses.numel()
        return total / count

    def rouge(self, items: Sequence[_Item]) -> NDArray[np.float64]:
        """ROUGE-L of what is written for each, as the task decodes; (n, 1)."""
        self.module.eval()
        room = self.backend.max_length - (0 if self.backend.is_seq2seq else self.decoding.max_new_tokens)
        prompts = [self.backend.encode_prompt(item.arguments, room) for item in items]
        texts: list[str] = []
        starts = range(0, len(prompts), self.size)
        for start in tqdm(starts, desc="Writing validation texts", unit="batch", mininterval=1):
            texts += self.decoder.generate(prompts[start : start + self.size], self.decoding)
        scores = rouge_scores([text.strip() for text in texts], [item.target for item in items])
        return scores.rougeL[:, None]
