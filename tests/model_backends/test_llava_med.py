"""`llava-med` against the original code's answers, and on tiny random checkpoints in its layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import interleaved
from medvlm_harness.model_backends.interleaved import IMAGE_MARK
from medvlm_harness.model_backends.llava_med import LlavaMedBackend, expand_to_square, preprocess
from medvlm_harness.model_backends.selftest import llava_med as selftest
from medvlm_harness.requests import ImageRef, LabelSet, TextRef

State = dict[str, torch.Tensor]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
}
WIDTH, MLP, LAYERS, HEADS, KV_HEADS = 48, 64, 2, 6, 2
LABELS = LabelSet.from_config("three", ["edema", "cardiomegaly", "pleural effusion"])
QUESTIONS = [f"Is there {name}? Answer with yes or no." for name in ("edema", "cardiomegaly", "pleural effusion")]


def published_state(seed: int = 3) -> tuple[State, State]:
    """A random checkpoint under the published names, written from those alone, and a stock tower of other weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> State:
        return {f"{name}.weight": normal(rows, columns)} | ({f"{name}.bias": normal(rows)} if bias else {})

    def norm(name: str) -> State:
        return {f"{name}.weight": 1 + normal(32), f"{name}.bias": normal(32)}

    def tower(prefix: str) -> State:
        state = {
            f"{prefix}embeddings.class_embedding": normal(32),
            f"{prefix}embeddings.patch_embedding.weight": normal(32, 3, 14, 14, scale=0.05),
            f"{prefix}embeddings.position_embedding.weight": normal(5, 32),
            **norm(f"{prefix}pre_layrnorm"),
            **norm(f"{prefix}post_layernorm"),
        }
        for k in range(VISION["num_hidden_layers"]):
            layer = f"{prefix}encoder.layers.{k}"
            state |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
            state |= linear(f"{layer}.mlp.fc1", 48, 32) | linear(f"{layer}.mlp.fc2", 32, 48)
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                state |= linear(f"{layer}.self_attn.{part}", 32, 32)
        return state

    state = {
        "model.embed_tokens.weight": normal(320, WIDTH),
        "lm_head.weight": torch.cat([torch.zeros(3, WIDTH), normal(317, WIDTH)]),  # texts do not end early
        "model.norm.weight": 1 + normal(WIDTH),
        **linear("model.mm_projector.0", WIDTH, 32),
        **linear("model.mm_projector.2", WIDTH, WIDTH),
        **tower("model.vision_tower.vision_tower.vision_model."),
    }
    for k in range(LAYERS):
        layer = f"model.layers.{k}"
        state |= {f"{layer}.{n}_layernorm.weight": 1 + normal(WIDTH) for n in ("input", "post_attention")}
        for part, rows in (
            ("q", WIDTH),
            ("k", WIDTH * KV_HEADS // HEADS),
            ("v", WIDTH * KV_HEADS // HEADS),
            ("o", WIDTH),
        ):
            state |= linear(f"{layer}.self_attn.{part}_proj", rows, WIDTH, bias=False)
        for part, rows, columns in (("gate", MLP, WIDTH), ("up", MLP, WIDTH), ("down", WIDTH, MLP)):
            state |= linear(f"{layer}.mlp.{part}_proj", rows, columns, bias=False)
    return state, tower("vision_model.")


CONFIG: Mapping[str, Any] = {
    "model_type": "llava_mistral",
    "architectures": ["LlavaMistralForCausalLM"],
    "vocab_size": 320,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "somewhere/tiny-clip",
    "torch_dtype": "float32",
}


def write(folder: Path, state: State, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_llama_tokenizer: Callable[[Path], None]) -> Path:
    """A folder with a checkpoint, `llava`, and its stock tower, `clip`."""
    folder = tmp_path_factory.mktemp("llava_med")
    state, stock = published_state()
    write_llama_tokenizer(write(folder / "llava", state))
    save_file(stock, write_clip(folder / "clip") / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_clip(folder: Path) -> Path:
    CLIPVisionModel(CLIPVisionConfig(**VISION, patch_size=14)).save_pretrained(folder)
    return folder


def backend(folder: Path, **options: Any) -> LlavaMedBackend:
    given = {"stock_tower": str(folder / "clip"), "device": "cpu", "precision": "fp32", "store": "off", **options}
    return LlavaMedBackend(**{"pretrained": str(folder / "llava"), **given})


def generation(ref: ImageRef, prompt: str, number: int = 0, **kwargs: Any) -> Instance:
    given = {"max_gen_toks": 10, "until": [], **kwargs}
    return Instance("generate_until", {}, (prompt, given, {"visual": [ref]}), 0, ("task", number, 1))


# --- the original code's answers


def test_the_golden_checkpoint_gives_the_original_answers(shared: Path) -> None:
    found = selftest.differences(shared / "golden")
    assert len(found) == 6
    for name, difference in found.items():
        assert difference <= selftest.TOLERANCES.get(name, 1e-4), name


def test_the_stock_tower_and_rgb_before_padding_give_other_answers(shared: Path) -> None:
    golden = shared / "golden"
    reference = torch.load(golden / "llavamed15_tiny_ref.pt", weights_only=True)
    where = {"pretrained": str(golden / "llavamed15_tiny"), "stock_tower": str(golden / "tiny_clip")}
    stock = LlavaMedBackend(**where, tower="stock", device="cpu", precision="fp32", store="off")
    assert (stock.logits(reference["ids"], reference["px"]) - reference["logits"]).abs().max() > 1e-3
    stored = load_file(golden / "llavamed15_pre_ref.safetensors")
    for shape in ("tall", "wide"):
        image = Image.open(golden / f"img_{shape}.png")
        assert image.mode == "L"
        assert (preprocess(image.convert("RGB")) - stored[shape][0]).abs().max() > 0.1


# --- loading


def test_a_dropped_and_an_unknown_key_are_named(tiny: Path, tmp_path: Path) -> None:
    state, _ = published_state()
    for key in ("model.mm_projector.2.bias", "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"):
        folder = write(tmp_path / key, {name: value for name, value in state.items() if name != key})
        with pytest.raises(UserError, match=r"1 keys missing, 0 unexpected .*(linear_2|post_layernorm)\.bias"):
            backend(tiny, pretrained=str(folder)).ensure_loaded()
    folder = write(tmp_path / "more", {**state, "model.mm_projector.4.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"0 keys missing, 1 unexpected \(model\.mm_projector\.4\.weight"):
        backend(tiny, pretrained=str(folder)).ensure_loaded()


def test_the_stock_tower_replaces_one_that_the_checkpoint_need_not_have(tiny: Path, tmp_path: Path) -> None:
    state, stock = published_state()
    without = {name: value for name, value in state.items() if "vision_tower" not in name}
    swapped = without | {f"model.vision_tower.vision_tower.{name}": value for name, value in stock.items()}
    ids, pixels = torch.tensor([[1, 5, IMAGE_MARK, 9]]), torch.randn(1, 3, 28, 28)
    by_option = backend(tiny, pretrained=str(write(tmp_path / "without", without)), tower="stock")
    in_place = backend(tiny, pretrained=str(write(tmp_path / "swapped", swapped)))
    found = by_option.logits(ids, pixels)
    assert torch.equal(found, in_place.logits(ids, pixels))
    assert (found - backend(tiny).logits(ids, pixels)).abs().max() > 1e-3


def test_a_whole_clip_serves_as_stock_tower(tiny: Path, tmp_path: Path) -> None:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    clip = CLIPModel(CLIPConfig(vision_config={**VISION, "patch_size": 14}, text_config=text, projection_dim=8))
    clip.save_pretrained(tmp_path / "whole")
    own = load_file(tmp_path / "whole" / "model.safetensors") | published_state()[1]
    own["vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # as OpenAI's files have it
    save_file(own, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    ids, pixels = torch.tensor([[1, 5, IMAGE_MARK, 9]]), torch.randn(1, 3, 28, 28)
    whole = backend(tiny, tower="stock", stock_tower=str(tmp_path / "whole"))
    assert torch.equal(whole.logits(ids, pixels), backend(tiny, tower="stock").logits(ids, pixels))
    assert whole.config.vision_config.num_attention_heads == VISION["num_attention_heads"]
    del own["vision_model.post_layernorm.bias"]
    save_file(own, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 keys missing.*post_layernorm\.bias"):
        backend(tiny, tower="stock", stock_tower=str(tmp_path / "whole")).ensure_loaded()


def test_the_tower_is_in_the_result_and_in_the_identity(tiny: Path) -> None:
    own, stock = backend(tiny, store="auto"), backend(tiny, store="auto", tower="stock")
    assert (own.describe()["tower"], stock.describe()["tower"]) == ("checkpoint", "stock")
    assert own.identity != stock.identity
    assert list(stock.weights) == ["llava/model.safetensors", "clip/model.safetensors"]
    assert len(set(stock.weights.values())) == 2
    assert own.weights_sha256 != stock.weights_sha256


def test_parameters_are_those_of_the_files(tiny: Path) -> None:
    state, _ = published_state()
    model = backend(tiny)
    model.ensure_loaded()
    assert model.parameters == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, r"expected model_type llava_mistral .* but got 'llava'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True is not built"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear' is not built"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tiny: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "other", {"x": torch.zeros(1)}, **change)
    with pytest.raises(UserError, match=message):
        backend(tiny, pretrained=str(folder))


def test_what_is_missing_is_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tower=stock needs stock_tower=DIR"):
        backend(tiny, tower="stock", stock_tower=None)
    with pytest.raises(UserError, match="checkpoint or stock, but got 'own'"):
        backend(tiny, tower="own")
    with pytest.raises(UserError, match=r"sizes are not known here: say where its config\.json lies by stock_tower"):
        backend(tiny, stock_tower=None)
    with pytest.raises(UserError, match="stock_tower to be a folder"):
        backend(tiny, stock_tower=str(tmp_path))
    with pytest.raises(UserError, match=r"to hold config\.json"):
        backend(tiny, pretrained=str(tmp_path))


def test_the_published_tower_needs_no_configuration(tiny: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "named", published_state()[0], mm_vision_tower="openai/clip-vit-large-patch14-336")
    found = backend(tiny, pretrained=str(folder), stock_tower=None)
    assert found.image_positions == 576
    assert found.config.vision_config.num_attention_heads == 16


# --- images


@pytest.mark.parametrize(("size", "corner"), [((5, 8), (1, 0)), ((8, 5), (0, 1)), ((6, 6), (0, 0))])
@pytest.mark.parametrize(("mode", "colour", "filler"), [("L", 200, 114), ("RGB", (200, 10, 60), (122, 116, 104))])
def test_padding_is_centred_and_keeps_the_mode(
    size: tuple[int, int], corner: tuple[int, int], mode: str, colour: Any, filler: Any
) -> None:
    square = expand_to_square(Image.new(mode, size, colour))
    side = max(size)
    assert (square.size, square.mode) == ((side, side), mode)
    expected = np.empty((side, side, *(() if mode == "L" else (3,))), dtype=np.uint8)
    expected[:] = filler
    left, top = corner
    expected[top : top + size[1], left : left + size[0]] = colour
    assert np.array_equal(np.asarray(square), expected)


def test_without_padding_in_the_configuration_an_image_is_cropped(tiny: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "crop", published_state()[0], image_aspect_ratio="square")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56), dtype=np.uint8))
    cropped = backend(tiny, pretrained=str(folder)).pixels(image)
    assert torch.equal(cropped, preprocess(image, 28, square=False))
    assert (cropped - backend(tiny).pixels(image)).abs().max() > 0.1


# --- prompts


def test_pieces_of_a_prompt_are_tokenised_one_by_one(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    model, refs = backend(tiny), images(2)
    tokens = model.tokenizer

    def piece(text: str) -> list[int]:
        return list(tokens(text, add_special_tokens=False)["input_ids"])

    prompt = model.encode_turn(" Is there edema?\n", refs[:1])
    assert prompt.ids == (1, *piece("[INST] "), *[0] * 4, *piece("\nIs there edema? [/INST]"))
    assert prompt.image_end == len(piece("[INST] ")) + 5
    assert model.encode_turn("Is there edema?", ()).ids == (1, *piece("[INST] Is there edema? [/INST]"))
    both = model.encode_turn("now <image> before <image>", refs)
    assert both.ids == (1, *piece("[INST] now "), *[0] * 4, *piece(" before "), *[0] * 4, *piece(" [/INST]"))
    assert model.prompt_text("hi", 2) == "[INST] <image>\n<image>\nhi [/INST]"
    assert model.card.prompts is not None
    assert model.prompt_text("hi", 1) == model.card.prompts.conversation.format(q="hi")
    assert model.card.name == "llava-med"


def test_prompts_that_cannot_be_are_refused(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    model, refs = backend(tiny), images(2)
    with pytest.raises(UserError, match=r"names 1 places for images .* but 2 came with it"):
        model.encode_turn("see <image>", refs)
    with pytest.raises(UserError, match="has <unk> in its text"):
        model.encode_turn("an <unk> word", refs)
    with pytest.raises(UserError, match="An answer has <unk>"):
        model.answer_ids("<unk>")
    with pytest.raises(UserError, match="leave out --apply_chat_template"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_tokenizer_model_names_the_packages_it_needs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "llava", published_state()[0])
    with pytest.raises(UserError, match="holds no tokenizer"):
        _ = backend(tiny, pretrained=str(folder)).tokenizer
    (folder / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(interleaved, "SENTENCEPIECE", {"json": "json", "not_there.at_all": "protobuf"})
    with pytest.raises(UserError, match=r"tokenizer.model needs protobuf, not installed here: .*\[sentencepiece\]"):
        _ = backend(tiny, pretrained=str(folder)).tokenizer


# --- answers


def test_batch_sizes_give_the_same_texts(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    refs = images(3)
    requests = [generation(ref, prompt, k) for k, (ref, prompt) in enumerate(zip(refs, QUESTIONS, strict=True))]
    alone, together = (backend(tiny, batch_size=size).generate_until(requests) for size in (1, 3))
    assert alone == together
    assert len(set(alone)) == 3
    # The same by the tokens alone, without the tokenizer's part.
    model = backend(tiny)
    prompt = model.encode_turn(QUESTIONS[1], refs[1:2])
    marked = [*prompt.ids[: prompt.image_end - 4], IMAGE_MARK, *prompt.ids[prompt.image_end :]]
    pixels = model.stack([prompt], torch.zeros(0))["pixel_values"]
    written = model.greedy(torch.tensor([marked]), pixels, 10)[0].tolist()
    assert model.tokenizer.decode(written, skip_special_tokens=True).startswith(alone[1])


def test_a_log_likelihood_is_that_of_the_logits(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    model, refs = backend(tiny), images(3)
    pairs = [
        (prompt, answer, {"visual": [ref]}) for ref in refs for prompt in QUESTIONS[:2] for answer in ("yes", " no")
    ]
    pairs.append((QUESTIONS[0], "yes"))
    found = [
        backend(tiny, batch_size=n).loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs]) for n in (1, 3)
    ]
    assert [score for score, _ in found[0]] == pytest.approx([score for score, _ in found[1]], abs=1e-4)
    model.ensure_loaded()
    for pair, (score, _) in zip(pairs, found[0], strict=True):
        prompt = model.encode_turn(pair[0], tuple(pair[2]["visual"]) if len(pair) == 3 else ())
        answer = model.answer_ids(pair[1])
        ids = torch.tensor([[*prompt.ids, *answer]])
        logits = model.model(input_ids=ids, **model.stack([prompt], ids)).logits[0].log_softmax(-1)
        by_hand = sum(logits[len(prompt.ids) - 1 + k, token].item() for k, token in enumerate(answer))
        assert score == pytest.approx(by_hand, abs=1e-4)


def test_labels_are_those_of_separate_log_likelihoods(tiny: Path, images: Callable[..., list[ImageRef]]) -> None:
    refs = images(2)
    found = backend(tiny).classify([Instance("classify", {}, (ref, LABELS, TextRef("cough")), 0) for ref in refs])
    spelt = {"yes": ("Yes", "yes", " Yes", " yes"), "no": ("No", "no", " No", " no")}
    model = backend(tiny)
    for ref, scores in zip(refs, found, strict=True):
        for question, margin, probability in zip(QUESTIONS, *scores, strict=True):
            odds = {}
            for answer, spellings in spelt.items():
                pairs = [(f"Indication: cough\n{question}", one, {"visual": [ref]}) for one in spellings]
                each = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
                odds[answer] = float(np.logaddexp.reduce([score for score, _ in each]))
            assert margin == pytest.approx(odds["yes"] - odds["no"], abs=1e-4)
            assert probability == pytest.approx(1 / (1 + np.exp(odds["no"] - odds["yes"])), abs=1e-4)


def test_half_precision_answers(tiny: Path, tmp_path: Path, images: Callable[..., list[ImageRef]]) -> None:
    folder = shutil.copytree(tiny, tmp_path / "half")
    save_file(
        {k: v.half() for k, v in published_state()[0].items()}, folder / "llava/model.safetensors", {"format": "pt"}
    )
    config = {**CONFIG, "torch_dtype": "bfloat16"}
    (folder / "llava" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = backend(folder, precision="checkpoint")
    assert model.precision == "bf16"
    (scores,) = model.classify([Instance("classify", {}, (images(1)[0], LABELS), 0)])
    assert np.isfinite(scores.margin).all()


def test_a_sentencepiece_model_gives_the_tokens_of_sentencepiece(
    tmp_path: Path, images: Callable[..., list[ImageRef]]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf", reason="transformers reads a tokenizer.model through protobuf too")
    folder = write(tmp_path / "llava", published_state()[0])
    texts = [
        "[INST] Is there a small pleural effusion? [/INST]",
        "the heart is normal in size",
        "Answer yes or no.",
    ] * 9
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    clip = write_clip(tmp_path / "clip")
    model = backend(tmp_path, stock_tower=str(clip))
    (ref,) = images(1)
    prompt = model.encode_turn("Is there\n an é?", [ref])
    pieces = [original.encode(piece) for piece in ("[INST] ", "\nIs there\n an é? [/INST]")]
    assert prompt.ids == (1, *pieces[0], *[0] * 4, *pieces[1])
    for answer in ("yes", " yes", "  two words"):  # of blanks at the beginning none is lost
        assert model.answer_ids(answer) == tuple(original.encode(answer))
