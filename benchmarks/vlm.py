"""Thirteen labels of an image from one shared prefill, against each (image, question, answer) alone; random weights."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

IMAGES = 32
KINDS = ("llava", "qwen2_vl")
ANSWERS = ("Yes", "No")
TEXT = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
TEXT |= {"num_key_value_heads": 6, "max_position_embeddings": 2048, "bos_token_id": 2, "eos_token_id": 1}


def measure(images: int = IMAGES) -> dict[str, Any]:
    """Seconds of both and the largest difference of a log-likelihood; the ratio is ours / alone, of the slower kind.

    Alone are the answers "Yes" and "No" to each question, 26 per image, in batches as large as ours; ours also scores
    their other spellings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common.shortened(folder, images)
        found = {
            kind: common.child("vlm.py", kind, str(images), environment={"MEDVLM_DATA": scratch}) for kind in KINDS
        }
    return {"images": images, **found, "ratio": max(one["ours"] / one["alone"] for one in found.values())}


def _both(kind: str, images: int) -> dict[str, Any]:
    import torch
    from lm_eval.api.instance import Instance

    from medvlm_harness.data.labels import CHEXPERT_14
    from medvlm_harness.model_backends.sequences import Scored
    from medvlm_harness.model_backends.shared_prefill import shared_scores
    from medvlm_harness.model_backends.vision_language import questions_about
    from medvlm_harness.model_backends.vlm import VlmBackend
    from medvlm_harness.requests import ImageRef, LabelSet

    torch.set_num_threads(common.THREADS)
    data = common.dataset()
    labels = LabelSet.from_config("labels", [name for name in CHEXPERT_14 if name != "No Finding"])
    questions = [question.text for question in questions_about(labels)]
    refs = [ImageRef(one.sha256, data.path(one)) for study in data.studies for one in study.images][:images]
    with tempfile.TemporaryDirectory() as scratch:
        _write(kind, Path(scratch), questions)
        backend = VlmBackend(pretrained=scratch, device="cpu", precision="fp32", store="off")
        backend.classify([Instance("classify", {}, (refs[0], labels), 0)])  # warm
        start = time.perf_counter()
        backend.classify([Instance("classify", {}, (ref, labels), k) for k, ref in enumerate(refs)])
        ours = time.perf_counter() - start
        single = VlmBackend(pretrained=scratch, device="cpu", precision="fp32", store="off")
        asked = [(question, answer, {"visual": [ref]}) for ref in refs for question in questions for answer in ANSWERS]
        single.loglikelihood([Instance("loglikelihood", {}, ("warm", "Yes", {"visual": [refs[0]]}), 0)])
        start = time.perf_counter()
        likelihoods = single.loglikelihood([Instance("loglikelihood", {}, pair, k) for k, pair in enumerate(asked)])
        alone = time.perf_counter() - start
        groups = [
            [Scored(backend.encode_turn(q, [ref]), backend.answer_ids(answer)) for q in questions for answer in ANSWERS]
            for ref in refs
        ]
        shared = [score for group in shared_scores(backend.decoder, groups, rows=64) for score, _ in group]
    largest = max(abs(own - other) for own, (other, _) in zip(shared, likelihoods, strict=True))
    return {"ours": ours, "alone": alone, "largest_difference": largest, "tokens": len(groups[0][0].prompt.ids)}


def _write(kind: str, folder: Path, questions: list[str]) -> None:
    """A model of random weights with its processor; the tokenizer knows the questions' words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, images = ["<pad>", "</s>", "<s>"], ["<image>", "<|vision_start|>", "<|vision_end|>"]
    images += ["<|image_pad|>", "<|video_pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[*special, *images], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*questions, "Yes yes No no"] * 2, trainer)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"additional_special_tokens": images})
    torch.manual_seed(0)
    model, processor = (_llava if kind == "llava" else _qwen2_vl)(fast)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        vision_config=CLIPVisionConfig(image_size=224, patch_size=14, **tower),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 224}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokens = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    tokens |= {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
    patches = {"patch_size": 14, "temporal_patch_size": 2}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={"depth": 6, "embed_dim": 384, "hidden_size": TEXT["hidden_size"], "num_heads": 6, **patches},
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 336**2, "longest_edge": 336**2}, **patches),
        tokenizer,
        Qwen2VLVideoProcessor(**patches),
        chat_template="{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}",
    )
    return Qwen2VLForConditionalGeneration(config), processor


if __name__ == "__main__":
    print(json.dumps(_both(sys.argv[1], int(sys.argv[2]))))
