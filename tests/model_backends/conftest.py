"""Requests as lm-eval builds them, random images to ask about, and tiny random language models in folders."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from medvlm_harness.requests import ImageRef, LabelSet

torch.set_num_threads(1)


@pytest.fixture
def in_one_and_two(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """The results of `medvlm run` with these arguments in one process, and in two."""
    launchers = {
        "one": (sys.executable,),
        "two": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    }

    def run(*arguments: str, **variables: str) -> tuple[dict[str, Any], dict[str, Any]]:
        found = {}
        for name, launcher in launchers.items():
            out = ("--output_path", str(tmp_path / name), "--device", "cpu")
            done = subprocess.run(
                [*launcher, "-m", "medvlm_harness", "run", *arguments, *out],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-3000:]
            (path,) = (tmp_path / name).rglob("results_*.json")
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        return found["one"], found["two"]

    return run


@pytest.fixture
def images(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., list[ImageRef]]:
    """References to `n` different images of several shapes."""

    def make(n: int, *, size: tuple[int, int] | None = None) -> list[ImageRef]:
        paths = [
            write_image(tmp_path / "images" / f"{k}.png", size=size or (40 + 7 * (k % 3), 48), seed=k) for k in range(n)
        ]
        return [ImageRef(hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in paths]

    return make


@pytest.fixture(scope="session")
def embed_requests() -> Callable[[Iterable[Any]], list[Instance]]:
    """One `embed` request per image or text."""
    return lambda arguments: [Instance("embed", {}, (argument,), k) for k, argument in enumerate(arguments)]


@pytest.fixture(scope="session")
def classify_requests() -> Callable[..., list[Instance]]:
    """One `classify` request per image; `docs` where a model reads them."""

    def make(refs: Iterable[ImageRef], labels: LabelSet, docs: list[dict[str, Any]] | None = None) -> list[Instance]:
        return [Instance("classify", docs[k] if docs else {}, (ref, labels), k) for k, ref in enumerate(refs)]

    return make


# --- tiny language models, with tokenizers trained on these words

WORDS = (
    "the heart is normal in size and the lungs are clear without focal consolidation or pneumothorax",
    "there is a small left pleural effusion with adjacent atelectasis, stable since the prior study.",
    "findings: enlarged cardiac silhouette. impression: no acute cardiopulmonary abnormality",
    "summarize the report: question answer yes no maybe, given context and options\n\n",
)
VOCABULARY = 320
RANDOM = {"initializer_range": 0.5}  # far from ties, which would make greedy texts a matter of rounding


def byte_tokenizer(folder: Path, *, begin: bool) -> None:
    """Byte-level BPE with </s>, and <s> before each text where asked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", **({"bos_token": "<s>"} if begin else {})}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def word_piece_tokenizer(folder: Path, *, lower: bool = True) -> None:
    """BERT's layout, with all characters and the words above in pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*WORDS, *([] if lower else [text.title() for text in WORDS])], trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=64).save_pretrained(folder)


def llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=128, num_key_value_heads=2, **sizes, **tokens, **RANDOM
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **tokens, **RANDOM))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": 96}
    # Its factor scales every initial weight. Larger than its vocabulary of tokens, as the real ones are.
    config = T5Config(vocab_size=VOCABULARY + 8, **sizes, initializer_factor=3.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=160, max_position_embeddings=64, **sizes, **RANDOM))


def distilbert() -> Any:
    config = DistilBertConfig(
        vocab_size=160, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4, **RANDOM
    )
    return DistilBertForMaskedLM(config)


BUILDERS = {
    "llama": (llama, lambda folder: byte_tokenizer(folder, begin=True)),
    "gpt2": (gpt2, lambda folder: byte_tokenizer(folder, begin=False)),
    "t5": (t5, lambda folder: byte_tokenizer(folder, begin=False)),
    "bert": (bert, word_piece_tokenizer),
    "bert-cased": (bert, lambda folder: word_piece_tokenizer(folder, lower=False)),
    "distilbert": (distilbert, word_piece_tokenizer),
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a kind, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            build, write_tokenizer = BUILDERS[kind]
            folder = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng():
                torch.manual_seed(11)
                build().eval().save_pretrained(folder)
            write_tokenizer(folder)
            made[kind] = folder
        return made[kind]

    return make
