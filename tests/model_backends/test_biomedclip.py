from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from transformers import BertConfig, BertTokenizerFast

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.biomedclip import BiomedClipBackend
from medvlm_harness.requests import ImageRef, LabelSet

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "edema", "no", "pleural", "effusion", "lung", "this", "is", "a")
CONTEXT = 16
TEXT_CFG = {
    "hf_model_name": "some/unreachable",
    "hf_tokenizer_name": "some/unreachable",
    "hf_proj_type": "mlp",
    "hf_pooler_type": "cls_last_hidden_state_pooler",
    "context_length": CONTEXT,
}
MODEL_CFG = {
    "embed_dim": 24,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "text_cfg": TEXT_CFG,
}
PREPROCESS_CFG = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
# 128 wide, so two heads: read from the weights alone, one head would load as well and answer something else.
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
TEXTS = ["edema", "no pleural effusion", "lung"]


class Written:
    """A random model in BiomedCLIP's layout, without its text tower's config.json, and the model that wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder, bert = folder / "biomedclip", folder / "bert"
        self.folder.mkdir()
        BertConfig(**BERT).save_pretrained(bert)
        self._write_config(MODEL_CFG)
        torch.manual_seed(0)
        local = TEXT_CFG | {"hf_model_name": str(bert), "hf_model_pretrained": False}
        self.model: Any = open_clip.create_model(
            f"local-dir:{self.folder}", load_weights=False, pretrained_text=False, text_cfg=local
        ).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        torch.save(self.model.state_dict(), self.folder / "open_clip_pytorch_model.bin")
        (self.folder / "vocab.txt").write_text("\n".join(WORDS))
        self.tokenizer = BertTokenizerFast(vocab={word: k for k, word in enumerate(WORDS)})
        self.tokenizer.save_pretrained(self.folder)
        self.bert_config = bert / "config.json"
        assert not (self.folder / "config.json").exists()

    def _write_config(self, model_cfg: dict[str, Any]) -> None:
        content = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS_CFG}
        (self.folder / "open_clip_config.json").write_text(json.dumps(content))

    @torch.inference_mode()
    def encode(self, refs: list[ImageRef], texts: list[str]) -> np.ndarray:
        transform = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(size=160, **PREPROCESS_CFG), is_train=False
        )
        images = self.model.encode_image(torch.stack([transform(Image.open(ref.path)) for ref in refs]))
        ids = self.tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]
        vectors = torch.cat([images, self.model.encode_text(ids)])
        return torch.nn.functional.normalize(vectors, dim=-1).numpy()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("biomedclip"))


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_loads_without_a_network_and_equals_the_model_that_wrote_it(
    written: Written,
    with_config: bool,
    tmp_path: Path,
    images: Callable[..., list[ImageRef]],
    embed_requests: Callable[..., list[Instance]],
    no_network: None,
) -> None:
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    if with_config:
        shutil.copy(written.bert_config, folder)
    refs = images(3)
    backend = BiomedClipBackend(pretrained=str(folder), device="cpu")
    backend.learn()
    ours = np.stack([e.vector for e in backend.embed(embed_requests([*refs, *TEXTS]))])
    assert np.allclose(ours, written.encode(refs, TEXTS), rtol=0, atol=1e-5)
    assert backend.card.parameters == sum(p.numel() for p in written.model.parameters())
    assert backend.card.licence == "mit"
    assert [path.name for path in backend.checkpoint.weights] == ["open_clip_pytorch_model.bin"]


def test_one_head_in_place_of_two_would_be_seen(
    written: Written,
    tmp_path: Path,
    embed_requests: Callable[..., list[Instance]],
    images: Callable[..., list[ImageRef]],
) -> None:
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    BertConfig(**BERT | {"num_attention_heads": 1}).save_pretrained(folder)
    backend = BiomedClipBackend(pretrained=f"local-dir:{folder}", device="cpu")
    backend.learn()
    ours = np.stack([e.vector for e in backend.embed(embed_requests(TEXTS))])
    assert np.abs(ours - written.encode(images(1), TEXTS)[1:]).max() > 1e-3


def test_buffers_of_older_releases_are_left_aside(written: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    state["text.transformer.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    BiomedClipBackend(pretrained=str(folder), device="cpu").ensure_loaded()
    state["text.transformer.embeddings.other"] = torch.arange(40)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="0 keys missing, 1 unexpected"):
        BiomedClipBackend(pretrained=str(folder), device="cpu").ensure_loaded()


def test_truncation_is_told(written: Written, embed_requests: Callable[..., list[Instance]]) -> None:
    backend = BiomedClipBackend(pretrained=str(written.folder), device="cpu")
    backend.learn()
    texts = [" ".join(["edema"] * words) for words in (1, CONTEXT - 2, CONTEXT - 1, 60)]
    assert [e.truncated for e in backend.embed(embed_requests(texts))] == [False, False, True, True]


def test_published_prompts_are_the_model_cards(
    written: Written, images: Callable[..., list[ImageRef]], classify_requests: Callable[..., list[Instance]]
) -> None:
    refs = images(2)
    labels = LabelSet.from_config("one", {"edema": {"positive": ["lung edema"], "negative": ["no edema"]}})
    backend = BiomedClipBackend(pretrained=str(written.folder), device="cpu", prompts="published")
    backend.learn()
    vectors = written.encode(refs, ["this is a photo of edema", "this is a photo of no edema"])
    margin = vectors[:2] @ vectors[2] - vectors[:2] @ vectors[3]
    scores = backend.classify(classify_requests(refs, labels))
    assert np.allclose([s.margin[0] for s in scores], margin, rtol=0, atol=1e-5)
    scale = float(written.model.logit_scale.detach().exp())
    assert np.allclose([s.probability[0] for s in scores], 1 / (1 + np.exp(-scale * margin)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("open_clip_config.json", r"Expected .* to hold open_clip_config\.json"),
        ("open_clip_pytorch_model.bin", "no weights"),
        ("tokenizer.json", "no tokenizer that loads"),
    ],
)
def test_a_folder_that_lacks_a_file_says_which(
    written: Written, tmp_path: Path, lacks: str, message: str, no_network: None
) -> None:
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    (folder / lacks).unlink()
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        if lacks == "tokenizer.json":
            (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=message):
        BiomedClipBackend(pretrained=str(folder), device="cpu").ensure_loaded()


def test_a_name_that_is_no_folder_is_refused(no_network: None) -> None:
    with pytest.raises(UserError, match="hf-hub:microsoft/BiomedCLIP"):
        BiomedClipBackend(pretrained="microsoft/BiomedCLIP", device="cpu").ensure_loaded()
