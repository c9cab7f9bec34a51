"""`xraygpt` against the original code's answers, and on tiny random sets of files in the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.interleaved import IMAGE_MARK
from medvlm_harness.model_backends.selftest import xraygpt as selftest
from medvlm_harness.model_backends.xraygpt import XrayGptBackend, preprocess
from medvlm_harness.requests import ImageRef, LabelSet

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
SIZES: Mapping[str, Any] = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    "qformer_config": {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_attention_frequency": 2,
    },
    "num_query_tokens": 6,
}
TEXT: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
FILES = ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "xraygpt_pretrained1.pth")
LABELS = LabelSet.from_config("three", ["edema", "cardiomegaly", "pleural effusion"])
QUESTIONS = [f"Is there {name}? Answer with yes or no." for name in ("edema", "cardiomegaly", "pleural effusion")]


def published_shapes(sizes: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Shapes]:
    """What each published file holds of what the model has a place for, written from the published names alone."""
    vision, qformer = sizes["vision_config"], sizes["qformer_config"]
    v, q, t = vision["hidden_size"], qformer["hidden_size"], text["hidden_size"]
    patch, grid = vision["patch_size"], vision["image_size"] // vision["patch_size"]

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
        return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})

    def norm(name: str, width: int) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    eva: Shapes = {
        "cls_token": (1, 1, v),
        "pos_embed": (1, grid**2 + 1, v),
        "patch_embed.proj.weight": (v, 3, patch, patch),
        "patch_embed.proj.bias": (v,),
    }
    for k in range(vision["num_hidden_layers"]):
        block = f"blocks.{k}"
        eva |= norm(f"{block}.norm1", v) | norm(f"{block}.norm2", v)
        eva |= linear(f"{block}.attn.qkv", 3 * v, v, bias=False) | linear(f"{block}.attn.proj", v, v)
        eva |= {f"{block}.attn.q_bias": (v,), f"{block}.attn.v_bias": (v,)}
        eva |= linear(f"{block}.mlp.fc1", vision["intermediate_size"], v)
        eva |= linear(f"{block}.mlp.fc2", v, vision["intermediate_size"])
    blip2: Shapes = {
        "query_tokens": (1, sizes["num_query_tokens"], q),
        **norm("ln_vision", v),
        **norm("Qformer.bert.embeddings.LayerNorm", q),
    }
    for k in range(qformer["num_hidden_layers"]):
        layer = f"Qformer.bert.encoder.layer.{k}"
        for name, width in (("attention", q), ("crossattention", v)):
            if name == "crossattention" and k % qformer["cross_attention_frequency"]:
                continue
            blip2 |= linear(f"{layer}.{name}.self.query", q, q)
            blip2 |= linear(f"{layer}.{name}.self.key", q, width) | linear(f"{layer}.{name}.self.value", q, width)
            blip2 |= linear(f"{layer}.{name}.output.dense", q, q) | norm(f"{layer}.{name}.output.LayerNorm", q)
        blip2 |= linear(f"{layer}.intermediate_query.dense", qformer["intermediate_size"], q)
        blip2 |= linear(f"{layer}.output_query.dense", q, qformer["intermediate_size"])
        blip2 |= norm(f"{layer}.output_query.LayerNorm", q)
    vicuna: Shapes = {
        "model.embed_tokens.weight": (text["vocab_size"], t),
        "lm_head.weight": (text["vocab_size"], t),
        "model.norm.weight": (t,),
    }
    for k in range(text["num_hidden_layers"]):
        layer = f"model.layers.{k}"
        vicuna |= {f"{layer}.{name}_layernorm.weight": (t,) for name in ("input", "post_attention")}
        for part in "qkvo":
            vicuna |= linear(f"{layer}.self_attn.{part}_proj", t, t, bias=False)
        for part, rows, columns in (("gate", 1, 0), ("up", 1, 0), ("down", 0, 1)):
            pair = (t, text["intermediate_size"])
            vicuna |= linear(f"{layer}.mlp.{part}_proj", pair[rows], pair[columns], bias=False)
    return {"eva": eva, "blip2": blip2, "vicuna": vicuna, "checkpoint": linear("llama_proj", t, q)}


def filled(shapes: Shapes, seed: int, *, scale: float = 0.2) -> State:
    """Random weights; norms around 1, and no end token, so that texts do not end early."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(*shape, generator=generator) * scale for name, shape in shapes.items()}
    for name, value in state.items():
        if value.ndim == 1 and name.endswith("weight"):
            value += 1
        if name == "lm_head.weight":
            value[:3] = 0
    return state


def write_set(folder: Path, *, without: str = "") -> Path:
    """The set of files, with what the published ones hold beside the weights that are used."""
    shapes = published_shapes(SIZES, TEXT)
    parts = {name: filled(own, seed) for seed, (name, own) in enumerate(shapes.items())}
    parts = {name: {key: value for key, value in own.items() if key != without} for name, own in parts.items()}
    vicuna = folder / "Vicuna_Radiology_fp16"
    vicuna.mkdir(parents=True, exist_ok=True)
    v, q = SIZES["vision_config"]["hidden_size"], SIZES["qformer_config"]["hidden_size"]
    beyond = {"blocks.3.norm1.weight": torch.ones(v), "norm.weight": torch.ones(v), "head.bias": torch.ones(9)}
    torch.save(parts["eva"] | beyond, folder / FILES[0])
    text_branch = {
        "Qformer.bert.embeddings.position_ids": torch.arange(8)[None],
        "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(9, q),
        "Qformer.bert.encoder.layer.0.intermediate.dense.bias": torch.ones(9),
        "Qformer.cls.predictions.bias": torch.ones(9),
        "t5_proj.bias": torch.ones(9),
    }
    torch.save({"model": parts["blip2"] | text_branch}, folder / FILES[1])
    half = len(parts["vicuna"]) // 2
    keys = list(parts["vicuna"])
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    for number, own in enumerate((keys[:half], keys[half:])):
        shard = {key: parts["vicuna"][key] for key in own} | (frequencies if number else {})
        torch.save(shard, vicuna / f"pytorch_model-0000{number + 1}-of-00002.bin")
    (vicuna / "config.json").write_text(json.dumps(TEXT), encoding="utf-8")
    (folder / "xraygpt_config.json").write_text(json.dumps(SIZES), encoding="utf-8")
    trained = {"model": parts["checkpoint"], "optimizer": {"state": {}}, "config": {"run": {"lr": 0.1}}, "epoch": 3}
    torch.save(trained, folder / FILES[2])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_llama_tokenizer: Callable[[Path], None]) -> Path:
    """The published set of files, tiny."""
    folder = write_set(tmp_path_factory.mktemp("xraygpt"))
    write_llama_tokenizer(folder / "Vicuna_Radiology_fp16")
    return folder


def backend(folder: Path, **options: Any) -> XrayGptBackend:
    given = {"device": "cpu", "precision": "fp32", "store": "off", **options}
    return XrayGptBackend(pretrained=str(folder), **given)


def generation(ref: ImageRef, prompt: str, number: int = 0, **kwargs: Any) -> Instance:
    given = {"max_gen_toks": 10, "until": [], **kwargs}
    return Instance("generate_until", {}, (prompt, given, {"visual": [ref]}), 0, ("task", number, 1))


# --- the original code's answers


def test_the_golden_checkpoint_gives_the_original_answers(shared: Path) -> None:
    found = selftest.differences(shared / "golden")
    assert len(found) == 5
    for name, difference in found.items():
        assert difference <= 1e-4, name


def test_the_epsilon_of_transformers_gives_another_image(shared: Path) -> None:
    reference = torch.load(shared / "golden" / "xraygpt_tiny_ref.pt", weights_only=True)
    model = backend(shared / "golden" / "xraygpt_tiny.pth")
    right = (model.image_stages(reference["px"]).vision - reference["ie"]).abs().max()
    model.model.vision_model.post_layernorm.eps = 1e-6
    wrong = (model.image_stages(reference["px"]).vision - reference["ie"]).abs().max()
    assert wrong > 20 * right
    assert wrong > 1e-5


# --- loading


def test_parameters_are_those_of_the_files(tiny: Path) -> None:
    shapes = published_shapes(SIZES, TEXT)
    model = backend(tiny)
    model.ensure_loaded()
    one_by_one = sum(int(np.prod(shape)) for own in shapes.values() for shape in own.values())
    # Of the three biases of a block's queries, keys and values the files leave out the keys', which are 0.
    keys = SIZES["vision_config"]["num_hidden_layers"] * SIZES["vision_config"]["hidden_size"]
    assert model.parameters == one_by_one + keys


def test_the_set_is_one_file_with_everything(tiny: Path, tmp_path: Path) -> None:
    shapes = published_shapes(SIZES, TEXT)
    prefixes = {"eva": "visual_encoder.", "vicuna": "llama_model."}
    whole: State = {}
    for seed, (part, own) in enumerate(shapes.items()):
        whole |= {prefixes.get(part, "") + name: value for name, value in filled(own, seed).items()}
    torch.save({"model": whole}, tmp_path / "all.pth")
    (tmp_path / "all_config.json").write_text(json.dumps({**SIZES, "text_config": TEXT}), encoding="utf-8")
    ids, pixels = torch.tensor([[1, 5, IMAGE_MARK, 9]]), torch.randn(1, 3, 28, 28)
    assert torch.equal(backend(tmp_path / "all.pth").logits(ids, pixels), backend(tiny).logits(ids, pixels))
    with pytest.raises(UserError, match="one file with all weights: leave out blip2"):
        backend(tmp_path / "all.pth", blip2=str(tmp_path / "all.pth"))
    (tmp_path / "all_config.json").write_text(json.dumps({**SIZES, "txt_config": TEXT}), encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown key 'txt_config'\. Did you mean text_config"):
        backend(tmp_path / "all.pth")
    (tmp_path / "all_config.json").unlink()
    with pytest.raises(UserError, match=r"beside it, in all_config\.json, but there is no such file"):
        backend(tmp_path / "all.pth")


def test_every_missing_file_is_named_with_its_purpose_and_source(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        backend(tmp_path)
    message = str(caught.value)
    assert message.startswith("4 of XrayGPT's files are missing")
    for words in (
        "eva_vit_g.pth: the vision tower (storage.googleapis.com",
        "blip2_pretrained_flant5xxl.pth: the Q-Former (storage.googleapis.com",
        "Vicuna_Radiology_fp16: the language model and its tokenizer (SharePoint",
        "xraygpt_pretrained1.pth: XrayGPT's own weights: the projection (SharePoint",
    ):
        assert words in message
    with pytest.raises(UserError, match="a folder with XrayGPT's files, or one file"):
        backend(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nothing from the Hub"):
        backend(tmp_path, model_revision="main")


def test_files_may_lie_elsewhere(tiny: Path, tmp_path: Path) -> None:
    parts = {"eva": FILES[0], "blip2": FILES[1], "checkpoint": FILES[2], "vicuna": "Vicuna_Radiology_fp16"}
    (tmp_path / "xraygpt_config.json").write_bytes((tiny / "xraygpt_config.json").read_bytes())
    found = backend(tmp_path, **{option: str(tiny / name) for option, name in parts.items()})
    assert sorted(found.weights.values()) == sorted(backend(tiny).weights.values())
    with pytest.raises(UserError, match=r"1 of XrayGPT's files are missing.*\n +minigpt4=.*MiniGPT-4's projection"):
        backend(tiny, minigpt4=str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.1.attn.v_bias", r"visual_encoder\.blocks\.1\.attn\.v_bias is missing beside .*q_bias"),
        ("blocks.1.norm2.weight", r"eva_vit_g\.pth: 1 keys missing.*layers\.1\.layer_norm2\.weight"),
        ("ln_vision.bias", r"blip2_pretrained_flant5xxl\.pth: 1 keys missing.*post_layernorm\.bias"),
        ("query_tokens", r"blip2_pretrained_flant5xxl\.pth: 1 keys missing.*query_tokens"),
        ("model.norm.weight", r"Vicuna_Radiology_fp16: 1 keys missing.*language_model\.model\.norm\.weight"),
        ("llama_proj.bias", r"xraygpt_pretrained1\.pth: 1 keys missing.*language_projection\.bias"),
    ],
)
def test_a_dropped_key_is_named_with_its_file(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backend(write_set(tmp_path, without=key)).ensure_loaded()


def test_what_nothing_has_a_place_for_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    shapes = published_shapes(SIZES, TEXT)["checkpoint"]
    torch.save({"model": filled(shapes, 3) | {"llama_proj.scale": torch.ones(1)}}, tmp_path / FILES[2])
    with pytest.raises(UserError, match=r"0 keys missing, 1 unexpected \(language_projection\.scale"):
        backend(tmp_path).ensure_loaded()
    torch.save([1, 2], tmp_path / FILES[2])
    with pytest.raises(UserError, match=r"xraygpt_pretrained1\.pth: expected a state dict"):
        backend(tmp_path).ensure_loaded()
    torch.save({"model": Path("x")}, tmp_path / FILES[2])  # any class that is no tensor
    with pytest.raises(UserError, match=r"xraygpt_pretrained1\.pth is no checkpoint that loads safely"):
        backend(tmp_path).ensure_loaded()


def test_of_two_files_with_the_same_weights_the_later_counts(tiny: Path, tmp_path: Path) -> None:
    write_set(tmp_path)
    shapes = published_shapes(SIZES, TEXT)["checkpoint"]
    ids, pixels = torch.tensor([[1, 5, IMAGE_MARK, 9]]), torch.randn(1, 3, 28, 28)
    expected = backend(tiny).logits(ids, pixels)
    torch.save({"model": filled(shapes, 77)}, tmp_path / "pretrained_minigpt4_7b.pth")
    assert torch.equal(backend(tmp_path).logits(ids, pixels), expected)
    # Without a weight in the later file, that of the earlier one stays.
    rest = {name: value for name, value in filled(shapes, 3).items() if name != "llama_proj.bias"}
    torch.save({"model": rest}, tmp_path / FILES[2])
    model = backend(tmp_path)
    assert not torch.equal(model.logits(ids, pixels), expected)
    assert torch.equal(model.model.language_projection.bias, filled(shapes, 77)["llama_proj.bias"])
    assert torch.equal(model.model.language_projection.weight, filled(shapes, 3)["llama_proj.weight"])


# --- images, prompts


@pytest.mark.parametrize(("mode", "size"), [("L", (40, 61)), ("RGB", (61, 40))])
def test_pixels_are_those_of_torchvisions_transforms(mode: str, size: tuple[int, int]) -> None:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    published = v2.Compose(
        [
            v2.Resize((28, 28), interpolation=InterpolationMode.BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    assert torch.allclose(preprocess(image, 28), published(image.convert("RGB")), atol=1e-6)


def test_the_prompt_is_the_demos(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    model, refs = backend(tiny), images(2)
    assert model.prompt_text("What is seen?", 1) == (
        "You are an experienced Doctor, give the following medical scan: <Img>ImageContent</Img>. You will be able to "
        "see the medical scan once I provide it to you. Please answer my questions."
        "###Patient: <Img><image></Img> What is seen?###Doctor:"
    )

    def piece(text: str) -> list[int]:
        return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = model.encode_turn("What is seen?", refs[:1])
    before, after = model.prompt_text("What is seen?", 1).split("<image>")
    assert prompt.ids == (1, *piece(before), *[0] * 6, *piece(after))
    assert prompt.image_end == 1 + len(piece(before)) + 6
    assert model.prompt_text("<image> or <image>", 2).endswith("<Img><image></Img> or <Img><image></Img>###Doctor:")


# --- answers


def test_batch_sizes_give_the_same_texts(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    refs = images(3)
    requests = [generation(ref, prompt, k) for k, (ref, prompt) in enumerate(zip(refs, QUESTIONS, strict=True))]
    requests.append(Instance("generate_until", {}, ("no image", {"max_gen_toks": 6}), 0, ("task", 3, 1)))
    alone, together = (backend(tiny, batch_size=size).generate_until(requests) for size in (1, 3))
    assert alone == together
    assert len(set(alone)) == 4


def test_an_answer_is_cut_as_published(
    tiny: Path, images: Callable[..., list[ImageRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backend(tiny)
    written = model.tokenizer("Doctor: the heart is normal ###Patient: and", add_special_tokens=False)["input_ids"]
    prompts = [generation(images(1)[0], "Findings?", max_gen_toks=len(written))]

    def generate(input_ids: torch.Tensor, stopping_criteria: Any, **_: Any) -> torch.Tensor:
        for end in range(1, len(written) + 1):
            ids = torch.cat([input_ids, torch.tensor([written[:end]])], dim=1)
            if bool(stopping_criteria(ids, None)[0]):
                return ids
        raise AssertionError("nothing stopped it")

    model.ensure_loaded()
    monkeypatch.setattr(model.model, "generate", generate)
    (text,) = model.generate_until(prompts)
    assert text == "the heart is normal"
    assert text.finished


def test_log_likelihoods_and_labels_are_those_of_the_logits(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    refs = images(2)
    model = backend(tiny, batch_size=3)
    found = model.classify([Instance("classify", {}, (ref, LABELS), 0) for ref in refs])
    spelt = (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no"))
    for ref, scores in zip(refs, found, strict=True):
        for question, margin, probability in zip(QUESTIONS, *scores, strict=True):
            prompt = model.encode_turn(question, [ref])
            pairs = [(question, one, {"visual": [ref]}) for one in (*spelt[0], *spelt[1])]
            each = [score for score, _ in model.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs])]
            for (_, answer, _), score in zip(pairs, each, strict=True):
                own = model.answer_ids(answer)
                ids = torch.tensor([[*prompt.ids, *own]])
                pixels = model.stack([prompt], ids)["pixel_values"]
                with torch.inference_mode():
                    logits = model.model(ids, pixel_values=pixels).logits[0].log_softmax(-1)
                by_hand = sum(logits[len(prompt.ids) - 1 + k, token].item() for k, token in enumerate(own))
                assert score == pytest.approx(by_hand, abs=1e-4)
            odds = np.logaddexp.reduce(each[:4]) - np.logaddexp.reduce(each[4:])
            assert margin == pytest.approx(odds, abs=1e-4)
            assert probability == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-4)
    without = model.loglikelihood([Instance("loglikelihood", {}, (QUESTIONS[0], "yes"), 0)])
    assert np.isfinite(without[0][0])


def test_features_and_places_must_be_as_many(tiny: Path) -> None:
    model = backend(tiny)
    with pytest.raises(ValueError, match="6 features of images, but 12 places"):
        model.logits(torch.tensor([[1, IMAGE_MARK, IMAGE_MARK]]), torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize(("stored", "precision"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_half_precision_answers(
    tiny: Path, tmp_path: Path, images: Callable[..., list[ImageRef]], stored: str, precision: str
) -> None:
    vicuna = tmp_path / "vicuna"
    vicuna.mkdir()
    for file in (tiny / "Vicuna_Radiology_fp16").iterdir():
        (vicuna / file.name).write_bytes(file.read_bytes())
    (vicuna / "config.json").write_text(json.dumps({**TEXT, "torch_dtype": stored}), encoding="utf-8")
    model = backend(tiny, vicuna=str(vicuna), precision="checkpoint")
    assert model.precision == precision
    (scores,) = model.classify([Instance("classify", {}, (images(1)[0], LABELS), 0)])
    assert np.isfinite(scores.margin).all()


def test_the_cards_conversation_is_the_one_that_is_asked(tiny: Path) -> None:
    model = backend(tiny)
    assert model.card.prompts is not None
    written = model.card.prompts.conversation.replace("<ImageHere>", "<image>").format(q="What is seen?")
    assert model.prompt_text("What is seen?", 1) == written
