from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import normalize
from torchvision.models.resnet import Bottleneck, ResNet, resnet50
from transformers import BertConfig, BertModel, SwinConfig, SwinModel
from transformers.core_model_loading import revert_weight_conversion

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.chexzero import CheXzeroBackend
from medvlm_harness.model_backends.medclip import MedClipBackend, preprocess
from medvlm_harness.model_backends.selftest import medclip as selftest
from medvlm_harness.requests import ImageRef, LabelSet

State = dict[str, torch.Tensor]
full_width = pytest.mark.skipif(
    "MEDVLM_FULL_WIDTH" not in os.environ, reason="writes and loads 1 GB: set MEDVLM_FULL_WIDTH=1"
)
Requests = Callable[..., list[Instance]]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] no lung lungs edema effusion pleural small large the is clear heart Heart , ."
VOCABULARY = [*WORDS.split(), *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
BERT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
POSITIONS = 88
SWIN = {"embed_dim": 32, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "mlp_ratio": 0.5}
LABELS = LabelSet.from_config(
    "findings",
    {
        "Edema": {"positive": ["edema", "small edema is the lungs", "the heart"], "negative": ["no edema", "clear"]},
        "Pleural Effusion": {"positive": ["large pleural effusion"], "negative": ["no effusion, the lungs clear ."]},
    },
)


def randomised(model: torch.nn.Module, seed: int) -> Any:
    """Biases and normalisation away from 0 and 1, which would hide swapped names."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            kept = tensor if tensor.ndim == 1 and "table" not in name else 0
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else kept + noise)
    return model.eval()


class Written:
    """A checkpoint in the published layout, and the modules it was written from."""

    def __init__(
        self,
        folder: Path,
        *,
        swin: SwinConfig | None,
        bert: BertConfig,
        layers: tuple[int, ...] = (1, 1, 1, 1),
        words: Sequence[str] = VOCABULARY,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.bert = folder, randomised(BertModel(bert), 1)
        self.text_head = torch.randn(512, bert.hidden_size, generator=torch.Generator().manual_seed(2)) * 0.1
        self.state: State = {"logit_scale": torch.tensor(2.0), "text_model.projection_head.weight": self.text_head}
        self.swin: SwinModel | None = None
        if swin is None:
            self.resnet = ResNet(Bottleneck, list(layers))
            self.resnet.fc = torch.nn.Linear(2048, 512, bias=False)
            image = randomised(self.resnet, 3).state_dict()
        else:
            self.swin = randomised(SwinModel(swin), 3)
            self.image_head = torch.randn(512, self.swin.num_features, generator=torch.Generator().manual_seed(4)) * 0.1
            self.state["vision_model.projection_head.weight"] = self.image_head
            image = revert_weight_conversion(self.swin, self.swin.state_dict())
            for stage, depth in enumerate(swin.depths):  # a buffer of the transformers of the time
                for block in range(depth):
                    name = f"encoder.layers.{stage}.blocks.{block}.attention.self.relative_position_index"
                    image[name] = torch.zeros(49, 49, dtype=torch.int64)
        text = {**self.bert.state_dict(), "embeddings.position_ids": torch.arange(bert.max_position_embeddings)[None]}
        self.state |= {f"vision_model.model.{name}": tensor for name, tensor in image.items()}
        self.state |= {f"text_model.model.{name}": tensor for name, tensor in text.items()}
        torch.save(self.state, folder / "pytorch_model.bin")
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def images(self, refs: list[ImageRef]) -> np.ndarray:
        pixels = torch.stack([preprocess(Image.open(ref.path)) for ref in refs]).repeat(1, 3, 1, 1)
        answer = self.resnet(pixels) if self.swin is None else self.swin(pixels).pooler_output @ self.image_head.T
        return normalize(answer, dim=-1).numpy()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> np.ndarray:
        """As the publication writes it: pad to the longest, average over all positions."""
        ids = [[VOCABULARY.index(w) if w in VOCABULARY else 1 for w in f"[CLS] {t} [SEP]".split()] for t in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        states = self.bert(padded, attention_mask=(padded != 0).long(), output_hidden_states=True)["hidden_states"]
        mean = torch.stack([states[1], states[2], states[-1]]).permute(1, 0, 2, 3).mean(1).mean(1)
        return normalize(mean @ self.text_head.T, dim=-1).numpy()


def tiny_bert() -> BertConfig:
    return BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=POSITIONS, **BERT)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("medclip") / "medclip-vit"
    return Written(folder, swin=SwinConfig(**SWIN), bert=tiny_bert())


def backend(folder: Path, **options: Any) -> MedClipBackend:
    return MedClipBackend(pretrained=str(folder), device="cpu", **options)


def vectors(model: MedClipBackend, requests: list[Instance]) -> np.ndarray:
    return np.stack([embedding.vector for embedding in model.embed(requests)])


# --- against the original code's answers


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def reference(golden: Path) -> State:
    return load_file(golden / "medclip_tiny_ref.safetensors")


def test_the_golden_checkpoint_gives_the_original_codes_answers(golden: Path) -> None:
    found = selftest.differences(golden)
    assert len(found) == 6
    assert max(found.values()) < 1e-4
    assert all((golden / name).is_file() for name in selftest.FILES)


@torch.inference_mode()
def test_leaving_padding_out_of_the_mean_is_seen(golden: Path, reference: State) -> None:
    model = backend(golden / "medclip_tiny_pytorch_model.bin")
    ids, mask = reference["input_ids"], reference["attention_mask"]
    assert mask.min() == 0
    ours = normalize(model.text_features(ids, mask), dim=-1)
    assert (ours - reference["text_embeds"]).abs().max() < 1e-4
    masked = normalize(model.towers.encode_ids(ids, mask, mask.sum(dim=1)), dim=-1)
    assert (masked - reference["text_embeds"]).abs().max() > 1e-3
    unmasked = normalize(model.text_features(ids), dim=-1)  # tokens that attend to padding
    assert (unmasked - reference["text_embeds"]).abs().max() > 1e-3


def test_sizes_are_read_from_the_weights(golden: Path) -> None:
    model = backend(golden / "medclip_tiny_pytorch_model.bin")
    model.ensure_loaded()
    with safe_open(golden / "medclip_tiny_ref.safetensors", "pt") as file:
        assert file.metadata()["swin"] == "{'depths': [1, 2, 1, 1], 'mlp_ratio': 0.25}"
    assert list(model.towers.image.config.depths) == [1, 2, 1, 1]
    assert model.towers.image.config.mlp_ratio == 0.25
    assert model.towers.image.config.num_heads == [3, 6, 12, 24]
    assert model.towers.image.config.window_size == 7
    assert model.towers.text.config.num_attention_heads == 12
    assert next(model.towers.parameters()).dtype == torch.float32  # the file is float16


def test_bilinear_pixels_are_seen(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_file(golden / "medclip_pre_ref.safetensors")["tall"][0]  # the others are only padded
    image = Image.open(golden / "img_tall.png")
    assert (preprocess(image) - expected).abs().max() < 1e-4
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, how: resize(self, size, Image.Resampling.BILINEAR))
    assert (preprocess(image) - expected).abs().max() > 1e-3


# --- on random weights in the same layout


@pytest.mark.parametrize("variant", ["swin", "resnet"])
def test_both_variants_answer_as_the_modules_that_wrote_them(
    written: Written, tmp_path: Path, variant: str, images: Callable[..., list[ImageRef]], embed_requests: Requests
) -> None:
    made = written if variant == "swin" else Written(tmp_path / "resnet", swin=None, bert=tiny_bert())
    model = backend(made.folder)
    refs = images(3)
    assert np.abs(vectors(model, embed_requests(refs)) - made.images(refs)).max() < 1e-5
    buffers = ("position_ids", "position_index", "running_mean", "running_var", "num_batches_tracked")
    counts = {name: tensor.numel() for name, tensor in made.state.items() if not name.endswith(buffers)}
    image = sum(count for name, count in counts.items() if name.startswith("vision_model."))
    text = sum(count for name, count in counts.items() if name.startswith("text_model."))
    assert model.describe()["tower_parameters"] == {"image": image, "text": text}
    assert model.card.parameters == image + text + 1
    assert model.card.name == {"swin": "medclip", "resnet": "medclip-resnet"}[variant]


def test_single_texts_have_no_padding_whatever_their_batch(written: Written, embed_requests: Requests) -> None:
    texts = ["edema", "no pleural effusion", "the lungs is clear , heart is small . " * 2, "heart"]
    alone = np.concatenate([written.texts([text]) for text in texts])
    for size in (1, 2, 64):
        ours = vectors(backend(written.folder, batch_size=size, store="off"), embed_requests(texts))
        assert np.abs(ours - alone).max() < 1e-5
    assert np.abs(written.texts(texts)[0] - alone[0]).max() > 1e-3  # negative control: padding is in the mean


def test_a_class_is_the_mean_of_its_logits_padded_to_its_longest_prompt(
    written: Written, images: Callable[..., list[ImageRef]], classify_requests: Requests
) -> None:
    refs = images(3)
    pixels, scale = written.images(refs), float(np.exp(2.0))

    def logits(texts: tuple[str, ...]) -> np.ndarray:
        return (scale * pixels @ written.texts([t.replace(",", " ,") for t in texts]).T).mean(axis=1)

    expected = np.stack([logits(x.positive) - logits(x.negative) for x in LABELS.labels], axis=1)
    for size in (1, 64):
        model = backend(written.folder, batch_size=size, store="off")
        scores = model.classify(classify_requests(refs, LABELS))
        assert np.allclose(scale * np.array([s.margin for s in scores]), expected, rtol=0, atol=1e-4)
        assert np.allclose([s.probability for s in scores], 1 / (1 + np.exp(-expected)), rtol=0, atol=1e-4)
    # Negative control: without the padding, or with a mean of length 1, it is another number.
    alone = scale * pixels @ np.mean([written.texts([text])[0] for text in LABELS.labels[0].positive], axis=0)
    assert np.abs(alone - logits(LABELS.labels[0].positive)).max() > 1e-3
    mean = written.texts(list(LABELS.labels[0].positive)).mean(axis=0)
    assert np.abs(scale * pixels @ (mean / np.linalg.norm(mean)) - logits(LABELS.labels[0].positive)).max() > 1e-3


def test_published_prompts_are_scored_as_published(
    written: Written, tmp_path: Path, images: Callable[..., list[ImageRef]], classify_requests: Requests
) -> None:
    path = tmp_path / "constants.py"
    path.write_text(
        "CHEXPERT_CLASS_PROMPTS = {'Edema': {'severity': ['', 'small'], 'subtype': ['edema', 'lung edema', 'edema'], "
        "'location': ['', 'the lungs']}, 'Pleural Effusion': {'a': ['large'], 'b': ['pleural'], 'c': ['effusion']}}"
    )
    prompts = {
        "Edema": [
            f"{a} {b} {c}" for a in ("", "small") for b in ("edema", "lung edema", "edema") for c in ("", "the lungs")
        ],
        "Pleural Effusion": ["large pleural effusion"],
    }
    refs = images(4)
    scale = float(np.exp(2.0))
    logits = np.stack(
        [(scale * written.images(refs) @ written.texts(texts).T).mean(axis=1) for texts in prompts.values()], axis=1
    )
    model = backend(written.folder, prompts="published", prompts_file=str(path))
    scores = model.classify(classify_requests(refs, LABELS))
    assert np.allclose(scale * np.array([s.margin for s in scores]), logits, rtol=0, atol=1e-4)
    assert np.allclose([s.probability for s in scores], 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-4)
    options = LabelSet.from_config("one", {"kind": "multiclass", "options": {"Edema": "x", "Pleural Effusion": "y"}})
    scores = model.classify(classify_requests(refs, options))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose([s.probability for s in scores], softmax, rtol=0, atol=1e-5)
    assert model.describe()["prompts_lacking"] == {}


def test_the_store_tells_paddings_apart_and_builds_no_model_again(
    written: Written, images: Callable[..., list[ImageRef]], classify_requests: Requests, embed_requests: Requests
) -> None:
    longer = LabelSet.from_config(
        "longer",
        {"Edema": {"positive": ["edema", "the heart is small , the lungs is clear"], "negative": ["no edema"]}},
    )
    requests = [*classify_requests(images(2), LABELS), *classify_requests(images(2), longer)]
    fresh = backend(written.folder, store="off")
    expected, single = fresh.classify(requests), vectors(fresh, embed_requests(["edema"]))
    first, again = backend(written.folder), backend(written.folder)
    for model in (first, again):
        assert np.allclose([s.margin[0] for s in model.classify(requests)], [s.margin[0] for s in expected], atol=1e-6)
        assert np.abs(vectors(model, embed_requests(["edema"])) - single).max() < 1e-6
    assert first.loaded and first.texts_encoded
    assert not again.loaded and not again.texts_encoded


def test_the_scale_is_clamped_as_published(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "high.bin"
    torch.save({**written.state, "logit_scale": torch.tensor(9.0)}, path)
    model = backend(path)
    model.learn()
    assert model.logit_scale == pytest.approx(np.exp(4.6052), rel=1e-6)


# --- the vocabulary


def test_texts_are_lower_cased_unless_asked_otherwise(written: Written, embed_requests: Requests) -> None:
    lower, cased = backend(written.folder), backend(written.folder, lower_case=False)
    requests = embed_requests(["Heart"])
    assert np.abs(vectors(lower, requests) - written.texts(["heart"])).max() < 1e-5
    assert np.abs(vectors(cased, requests) - written.texts(["Heart"])).max() < 1e-5
    assert np.abs(vectors(lower, requests) - vectors(cased, requests)).max() > 1e-3
    assert lower.identity != cased.identity
    assert (lower.describe()["lower_case"], cased.describe()["lower_case"]) == (True, False)
    with pytest.raises(UserError, match="lower_case to be True or False"):
        backend(written.folder, lower_case="yes")


def test_texts_over_77_tokens_are_cut_and_counted(written: Written, embed_requests: Requests) -> None:
    model = backend(written.folder)
    long = [" ".join(["edema"] * words) for words in (75, 76, 90)]
    assert [e.truncated for e in model.embed(embed_requests(long))] == [False, True, True]
    assert np.abs(np.diff(vectors(model, embed_requests(long)), axis=0)).max() < 1e-6


def test_without_a_vocabulary_images_are_embedded_and_texts_refused(
    written: Written, tmp_path: Path, images: Callable[..., list[ImageRef]], embed_requests: Requests
) -> None:
    torch.save(written.state, tmp_path / "pytorch_model.bin")
    model = backend(tmp_path)
    refs = images(1)
    assert np.abs(vectors(model, embed_requests(refs)) - written.images(refs)).max() < 1e-5
    assert set(model.lacks) == {"embed:text", "classify:image"}
    assert "fetch vocab.txt of emilyalsentzer/Bio_ClinicalBERT" in model.lacks["embed:text"]
    with pytest.raises(UserError, match=r"fetch vocab\.txt of emilyalsentzer/Bio_ClinicalBERT"):
        model.embed(embed_requests(["edema"]))
    assert not backend(tmp_path, tokenizer=str(written.folder / "vocab.txt")).lacks
    with pytest.raises(UserError, match=r"tokenizer to be a folder with vocab\.txt"):
        backend(tmp_path, tokenizer=str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]) + "\n")
    with pytest.raises(UserError, match=f"has {len(VOCABULARY) - 1} words, but the checkpoint {len(VOCABULARY)}"):
        backend(tmp_path).ensure_loaded()


# --- at full width


@full_width
@pytest.mark.parametrize("variant", ["vit", "resnet"])
def test_the_published_sizes_load_and_answer(
    tmp_path: Path, variant: str, iu_cxr_images: Callable[[int], list[ImageRef]], classify_requests: Requests
) -> None:
    words = [*VOCABULARY, *(f"word{k}" for k in range(28996 - len(VOCABULARY)))]
    swin = SwinConfig() if variant == "vit" else None
    made = Written(tmp_path / variant, swin=swin, bert=BertConfig(vocab_size=28996), layers=(3, 4, 6, 3), words=words)
    assert len(made.state) == {"vit": 434, "resnet": 521}[variant]  # as in the published files
    refs, model = iu_cxr_images(8), backend(made.folder)
    scores = np.array([s.margin for s in model.classify(classify_requests(refs, LABELS))])
    assert scores.shape == (8, 2)
    assert np.isfinite(scores).all()
    assert scores.std(axis=0).min() > 0
    with torch.device("meta"):
        if variant == "vit":
            image = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
            head = 768 * 512
        else:
            image = resnet50()
            image.fc = torch.nn.Identity()
            head = 2048 * 512
    embeddings = (28996 + 512 + 2) * 768 + 2 * 768
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    text = embeddings + 12 * layer + 768 * 768 + 768 + 768 * 512
    assert model.describe()["tower_parameters"] == {
        "image": sum(p.numel() for p in image.parameters()) + head,
        "text": text,
    }


# --- files that do not fit


BLOCK = "vision_model.model.encoder.layers.1.blocks.1"


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "vision_model.projection_head.weight",
        "text_model.projection_head.weight",
        f"{BLOCK}.attention.self.query.weight",
        f"{BLOCK}.attention.self.relative_position_bias_table",
        f"{BLOCK}.layernorm_after.bias",
        "vision_model.model.embeddings.patch_embeddings.projection.bias",
        "text_model.model.encoder.layer.3.output.dense.bias",
        "text_model.model.embeddings.word_embeddings.weight",
    ],
)
def test_a_dropped_key_is_named(written: Written, tmp_path: Path, name: str) -> None:
    state = dict(written.state)
    del state[name]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.* does not fit.*1 keys missing, 0 unexpected") as error:
        backend(tmp_path).ensure_loaded()
    known = name.removeprefix("vision_model.model.").removeprefix("text_model.model.")
    assert known in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["extra", "vision_model.model.extra.weight", "text_model.model.embeddings.other_ids"])
def test_an_unknown_key_is_named(written: Written, tmp_path: Path, name: str) -> None:
    torch.save({**written.state, name: torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="0 keys missing, 1 unexpected") as error:
        backend(tmp_path).ensure_loaded()
    assert name.rpartition("model.")[2] in str(error.value)


def test_a_wrong_shape_is_named(written: Written, tmp_path: Path) -> None:
    name = f"{BLOCK}.layernorm_after.bias"
    torch.save({**written.state, name: torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"layernorm_after\.bias is \(3,\), expected \(64,\)"):
        backend(tmp_path).ensure_loaded()


def test_a_checkpoint_of_another_model_names_that_model(written: Written, tmp_path: Path) -> None:
    foreign = {
        "chexzero": ["visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.bias", "token_embedding.weight"],
        "medfilip": ["image_model.fc.weight", "text_model.embeddings.token_embedding.weight", "text_projection.weight"],
        "biomedclip": ["visual.trunk.pos_embed", "text.transformer.embeddings.LayerNorm.bias", "text.proj.0.weight"],
    }
    for model, names in foreign.items():
        torch.save({name: torch.zeros(1) for name in names}, tmp_path / f"{model}.pt")
        with pytest.raises(UserError, match=f"It looks like a checkpoint for --model {model}") as error:
            backend(tmp_path / f"{model}.pt").ensure_loaded()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="It looks like a checkpoint for --model medclip"):
        CheXzeroBackend(pretrained=str(written.folder / "pytorch_model.bin"), device="cpu").ensure_loaded()


def test_where_nothing_lies_the_error_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MedCLIP's folder with pytorch_model\.bin"):
        backend(tmp_path)
