"""Requests as lm-eval builds them, random images to ask about, and tiny random language models in folders."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from medvlm_harness.data.records import Dataset
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
def iu_cxr_images(iu_cxr: Dataset) -> Callable[[int], list[ImageRef]]:
    """References to the first `n` real images, at most 8."""
    images = (image for study in iu_cxr.studies for image in study.images)
    first = list(islice(images, 8))
    return lambda n: [ImageRef(image.sha256, iu_cxr.path(image)) for image in first[:n]]


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


# --- tiny models that see images; each folder holds a processor and a chat template

CHAT = (
    "{% for turn in messages %}<s>{{ turn['role'] }}: {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, **RANDOM}
TEXT |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **RANDOM}
SQUARE = {"image_size": 32, "patch_size": 8}


def tokenizer_with(folder: Path, *more: str, **named: str) -> Any:
    """The byte tokenizer with further special tokens; named ones are its attributes too."""
    byte_tokenizer(folder, begin=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **({"extra_special_tokens": named} if named else {}))
    tokenizer.add_special_tokens({"additional_special_tokens": list(more)})
    return tokenizer


def llava(folder: Path) -> tuple[Any, Any]:
    tokenizer = tokenizer_with(folder, "<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        vision_config=CLIPVisionConfig(**VISION, **SQUARE),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",  # noqa: S106
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def qwen2_vl(folder: Path) -> tuple[Any, Any]:
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tokenizer_with(folder, *tokens)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    patches = {"patch_size": 4, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, **patches, **RANDOM}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={"spatial_merge_size": 2, **vision},
        **ids,
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(merge_size=2, size={"shortest_edge": 16**2, "longest_edge": 64**2}, **patches),
        tokenizer,
        Qwen2VLVideoProcessor(merge_size=2, **patches),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def gemma3(folder: Path) -> tuple[Any, Any]:
    tokens = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    named = dict(zip(("boi_token", "eoi_token", "image_token"), tokens, strict=True))
    tokenizer = tokenizer_with(folder, **named)
    names = ("boi_token_index", "eoi_token_index", "image_token_index")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    layers = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(
        text_config={"vocab_size": len(tokenizer), **layers, **TEXT},
        vision_config={**VISION, **SQUARE},
        mm_tokens_per_image=4,
        initializer_range=0.5,
        **ids,
    )
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    template = CHAT.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero as transformers makes it
    return model, processor


def idefics3(folder: Path) -> tuple[Any, Any]:
    tokens = ("<image>", "<fake_token_around_image>", "<global-img>")
    named = dict(zip(("image_token", "fake_image_token", "global_image_token"), tokens, strict=True))
    tokenizer = tokenizer_with(folder, "<end_of_utterance>", **named)
    config = Idefics3Config(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        vision_config={**VISION, **SQUARE},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = CHAT.replace("IMAGE", "<image>")
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    return Idefics3ForConditionalGeneration(config), processor


SEEING = {"llava": llava, "qwen2_vl": qwen2_vl, "gemma3": gemma3, "idefics3": idefics3}
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
            folder = tmp_path_factory.mktemp(kind)
            with torch.random.fork_rng():
                torch.manual_seed(11)
                if kind in SEEING:
                    model, processor = SEEING[kind](folder)
                    processor.save_pretrained(folder)
                else:
                    build, write_tokenizer = BUILDERS[kind]
                    model = build()
                    write_tokenizer(folder)
                model.eval().save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


# --- a tokenizer of LLaMA's kind, for the published generative models


@pytest.fixture(scope="session")
def write_llama_tokenizer() -> Callable[[Path], None]:
    """Write a BPE with <unk>, <s>, </s>, all bytes, and a blank before each text, as tokenizer.json; 320 tokens."""

    def write(folder: Path) -> None:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(WORDS, trainer)
        written = json.loads(tokenizer.to_str())
        written["added_tokens"] = written["added_tokens"][:3]  # bytes are pieces like others, not left out of a text
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")

    return write
