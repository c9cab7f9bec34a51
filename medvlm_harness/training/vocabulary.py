"""A vocabulary of radiology, learnt from the reports of a prepared set's train split.

Byte-level BPE: merging counts whole numbers, so that the same reports give the same vocabulary byte for byte (the
`tokenizers` library's unigram trainer sums floats in threads, and three runs gave three vocabularies); and no text is
unknown to it, XXXX and misspelt words included.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE
from medvlm_harness.training.data import TrainingData

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END", "PAD", "Vocabulary", "train_vocabulary", "write_vocabulary"]

PAD, END = "<pad>", "</s>"
BYTES = 256


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What was learnt, from how much, and how."""

    tokenizer: Tokenizer
    asked: int
    reports: int  # studies with a text
    characters: int
    lowercase: bool
    min_frequency: int

    @property
    def size(self) -> int:
        """Tokens; fewer than asked for where the reports have no more pairs to merge."""
        return int(self.tokenizer.get_vocab_size())


def train_vocabulary(data: TrainingData, size: int, *, lowercase: bool = False, min_frequency: int = 2) -> Vocabulary:
    """Byte-level BPE of findings and impressions of the train studies; a text ends with </s>.

    Args:
        data: only its train studies are read.
        size: tokens at most, </s>, padding and the 256 bytes among them.
        lowercase: forget capitals, as uncased vocabularies do.
        min_frequency: how often a pair must occur to be merged; at 1, words that occur once are learnt by heart.

    Raises:
        UserError: for a size without room for the bytes, or reports without a text.

    Source: Sennrich et al. 2016, arXiv 1508.07909; bytes: Radford et al. 2019.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = [PAD, END]
    if size < BYTES + len(special):
        raise UserError(f"Expected a vocabulary of {BYTES + len(special)} or more, the bytes' own, but got {size}.")
    if min_frequency < 1:
        raise UserError(f"Expected min_frequency to be 1 or more, but got {min_frequency}.")
    reports = [[t for t in (study.findings.strip(), study.impression.strip()) if t] for study in data.train]
    texts = [text for report in reports for text in report]
    if not texts:
        raise UserError(f"{data.name}: no train study has findings or an impression.")
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    # A word is the same at the start of a text as within it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return Vocabulary(tokenizer, size, sum(map(bool, reports)), sum(map(len, texts)), lowercase, min_frequency)


def write_vocabulary(vocabulary: Vocabulary, data: TrainingData, output: Path) -> None:
    """A tokenizer folder of transformers with a card beside it.

    Raises:
        UserError: if `output` exists.
    """
    from transformers import PreTrainedTokenizerFast

    if output.exists():
        raise UserError(f"{output} exists already: name another --output, or remove it.")
    work = output.with_name(output.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer, pad_token=PAD, eos_token=END)
    wrapped.save_pretrained(work)
    card = _card(vocabulary, data, output.name, hashlib.sha256((work / "tokenizer.json").read_bytes()).hexdigest())
    (work / CARD_FILE).write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True), encoding="utf-8")
    work.replace(output)


def _card(vocabulary: Vocabulary, data: TrainingData, name: str, sha256: str) -> dict[str, Any]:
    return {
        "name": name,
        "summary": f"byte-level BPE of {vocabulary.size} tokens, learnt from {data.name}",
        "licence": f"derived from data under: {data.licence}",
        "trained_on": [data.trained_on()],
        "training": {
            "method": "byte-level BPE",
            "vocabulary": vocabulary.size,
            "vocabulary_asked": vocabulary.asked,
            "lowercase": vocabulary.lowercase,
            "min_frequency": vocabulary.min_frequency,
            "tokenizer_sha256": sha256,
            "data": {
                "name": data.name,
                "sha256": data.sha256,
                "split_scheme": data.split_scheme,
                "learnt_from": "train",
                "sections": ["findings", "impression"],
                "reports": vocabulary.reports,
                "characters": vocabulary.characters,
                "licence": data.licence,
            },
        },
    }
