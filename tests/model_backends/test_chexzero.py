from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import chexzero
from medvlm_harness.model_backends.chexzero import CheXzeroBackend, build_model, preprocess
from medvlm_harness.requests import ImageRef, LabelSet

State = dict[str, torch.Tensor]
LABELS = LabelSet.from_config("pair", {name: {"negative": [f"no {name}"]} for name in ("edema", "pleural effusion")})


def openai_state(seed: int, *, vision: int = 128, text: int = 64, dim: int = 32, layers: int = 2) -> State:
    """A random state dict in OpenAI's layout, written from the layout alone: 64 px, patch 32, context 77."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}

    def blocks(prefix: str, width: int) -> State:
        state: State = {}
        for k in range(layers):
            block = f"{prefix}transformer.resblocks.{k}"
            state |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            state |= {f"{block}.attn.in_proj_weight": normal(3 * width, width)}
            state |= {f"{block}.attn.in_proj_bias": normal(3 * width)}
            for name, (rows, columns) in {
                "attn.out_proj": (width, width),
                "mlp.c_fc": (4 * width, width),
                "mlp.c_proj": (width, 4 * width),
            }.items():
                state |= {f"{block}.{name}.weight": normal(rows, columns), f"{block}.{name}.bias": normal(rows)}
        return state

    return {
        "positional_embedding": normal(77, text),
        "text_projection": normal(text, dim),
        "logit_scale": torch.tensor(2.0),
        "visual.class_embedding": normal(vision),
        "visual.positional_embedding": normal(5, vision),
        "visual.proj": normal(vision, dim),
        "visual.conv1.weight": normal(vision, 3, 32, 32, scale=0.02),
        **norm("visual.ln_pre", vision),
        **norm("visual.ln_post", vision),
        **blocks("visual.", vision),
        **blocks("", text),
        "token_embedding.weight": normal(49408, text),
        **norm("ln_final", text),
    }


def as_transformers(state: State) -> CLIPModel:
    """Independent: the same weights in transformers' CLIP."""
    vision, text = state["visual.proj"].shape[0], state["text_projection"].shape[0]
    tower = {"hidden_act": "quick_gelu", "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={**tower, "hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text // 64}
        | {"vocab_size": 49408, "eos_token_id": 49407, "projection_dim": state["text_projection"].shape[1]},
        vision_config={**tower, "hidden_size": vision, "intermediate_size": 4 * vision, "patch_size": 32}
        | {"num_attention_heads": vision // 64, "image_size": 64, "projection_dim": state["visual.proj"].shape[1]},
        projection_dim=state["visual.proj"].shape[1],
    )
    renamed: State = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for ours, theirs in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ):
        renamed |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}
    for prefix, target in (("visual.", "vision_model"), ("", "text_model")):
        for k in range(2):
            block, layer = f"{prefix}transformer.resblocks.{k}", f"{target}.encoder.layers.{k}"
            for part in ("weight", "bias"):
                for name, piece in zip("qkv", state[f"{block}.attn.in_proj_{part}"].chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{name}_proj.{part}"] = piece
                for a, b in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                ):
                    renamed[f"{layer}.{b}.{part}"] = state[f"{block}.{a}.{part}"]
    model = CLIPModel(config).eval()
    model.load_state_dict(renamed, strict=True)
    return model


def save(path: Path, state: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# --- against the original code's answers


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    return shared / "golden" / "chexzero_tiny.pt"


@pytest.fixture(scope="module")
def state(checkpoint: Path) -> State:
    loaded: State = torch.load(checkpoint, weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, Any]:
    path = shared / "golden" / "chexzero_tiny_ref.safetensors"
    with safe_open(path, "pt") as file:
        return {"texts": file.metadata()["texts"].split("|"), **load_file(path)}


@torch.inference_mode()
def test_embeddings_equal_the_original_codes_before_normalisation(checkpoint: Path, reference: dict[str, Any]) -> None:
    backend = CheXzeroBackend(pretrained=str(checkpoint), device="cpu")
    image = backend.image_features(reference["pixel_values"])
    assert largest_difference(image, reference["image_embeds"]) < 1e-4
    text = backend.text_features(reference["input_ids"])
    assert largest_difference(text, reference["text_embeds"]) < 1e-4
    assert not torch.allclose(reference["image_embeds"].norm(dim=-1), torch.ones(2), atol=0.01)


@torch.inference_mode()
def test_texts_get_the_original_token_ids(checkpoint: Path, reference: dict[str, Any]) -> None:
    assert open_clip.SimpleTokenizer(context_length=77)(reference["texts"]).equal(reference["input_ids"])
    backend = CheXzeroBackend(pretrained=str(checkpoint), device="cpu")
    backend.ensure_loaded()
    (member,) = backend.members
    text = member.encode_texts(reference["texts"])
    assert largest_difference(text.vectors, reference["text_embeds"]) < 1e-4
    assert text.truncated == [False] * 4


def test_pair_probabilities_equal_the_original_codes(
    checkpoint: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CheXzeroBackend(pretrained=str(checkpoint), device="cpu")
    backend.learn()
    monkeypatch.setattr(
        backend,
        "_pixels",
        lambda refs: iter([(refs, torch.stack([reference["pixel_values"][int(r, 16)] for r in refs]))]),
    )
    positive, negative = reference["texts"][::2], reference["texts"][1::2]
    assert negative == [f"no {name}" for name in positive]
    labels = LabelSet.from_config(
        "golden", {p: {"positive": [p], "negative": [n]} for p, n in zip(positive, negative, strict=True)}
    )
    requests = [Instance("classify", {}, (ImageRef(f"{k:064x}", Path("unused")), labels), k) for k in range(2)]
    probability = torch.tensor([scores.probability for scores in backend.classify(requests)])
    assert largest_difference(probability, reference["prob"].double()) < 1e-4
    # Negative control: with the logit scale they are far apart.
    assert float((probability - 0.5).abs().max()) < 0.4
    scaled = torch.tensor([scores.margin for scores in backend.classify(requests)]) * backend.logit_scale
    assert largest_difference(torch.sigmoid(scaled), reference["prob"].double()) > 1e-3


@pytest.mark.parametrize("name", ["square", "tall", "wide"])
def test_preprocessing_equals_the_original_codes(shared: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(shared / "golden" / "chexzero_pre_ref.safetensors", "pt") as file:
        expected = file.get_tensor(name)
    image = Image.open(shared / "golden" / f"img_{name}.png")
    ours = preprocess(image)
    assert ours.shape == (3, 224, 224)
    assert all(largest_difference(channel[None], expected) < 1e-4 for channel in ours)
    monkeypatch.setattr(
        chexzero,
        "interpolate",
        lambda x, **options: torch.nn.functional.interpolate(x, **{**options, "antialias": True}),
    )
    assert largest_difference(preprocess(image)[:1], expected) > 1e-3  # negative control


@torch.inference_mode()
def test_the_wrong_activation_is_seen(state: State, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_clip.CLIP
    monkeypatch.setattr(open_clip, "CLIP", lambda *args, **options: real(*args, **{**options, "quick_gelu": False}))
    model = build_model(state, "golden").eval()
    assert largest_difference(model.encode_image(reference["pixel_values"]), reference["image_embeds"]) > 1e-3
    assert largest_difference(model.encode_text(reference["input_ids"]), reference["text_embeds"]) > 1e-3


# --- on random weights in the same layout


@torch.inference_mode()
def test_random_weights_give_the_vectors_of_transformers() -> None:
    state = openai_state(1)
    ours, theirs = build_model(state, "random").eval(), as_transformers(state)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    ids = open_clip.SimpleTokenizer(context_length=77)(["edema", "no acute cardiopulmonary process", ""])
    image = theirs.get_image_features(pixel_values=pixels).pooler_output
    text = theirs.get_text_features(input_ids=ids).pooler_output
    assert largest_difference(ours.encode_image(pixels), image) < 1e-4
    assert largest_difference(ours.encode_text(ids), text) < 1e-4


def test_sizes_are_read_from_the_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "deep.pt", openai_state(3, vision=64, text=128, dim=16, layers=3))
    backend = CheXzeroBackend(pretrained=str(path), device="cpu")
    backend.learn()
    assert backend.preprocess(Image.new("L", (30, 50))).shape == (3, 64, 64)
    assert backend.card.parameters == sum(tensor.numel() for tensor in torch.load(path, weights_only=True).values())
    assert backend.checkpoint.weights == (path,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.ln_pre.bias"), "1 keys missing, 0 unexpected"),
        (lambda state: state.pop("text_projection"), "1 keys missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "0 keys missing, 1 unexpected"),
        (lambda state: state.update({"ln_final.bias": torch.zeros(3)}), "ln_final.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    state = openai_state(1)
    change(state)
    path = save(tmp_path / "changed.pt", state)
    with pytest.raises(UserError, match=message) as error:
        CheXzeroBackend(pretrained=str(path), device="cpu").ensure_loaded()
    assert "changed.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_ensemble_means_the_members_probabilities(
    tmp_path: Path, images: Callable[..., list[ImageRef]], classify_requests: Callable[..., list[Instance]]
) -> None:
    folder = tmp_path / "weights"
    paths = [save(folder / name, openai_state(seed)) for seed, name in enumerate(("c.pt", "a.pt", "b.pt"))]
    (folder / "notes.txt").write_text("not a member")
    requests = classify_requests(images(4), LABELS)
    singles = [CheXzeroBackend(pretrained=str(path), device="cpu").classify(requests) for path in paths]
    mean = np.mean([[scores.probability for scores in single] for single in singles], axis=0)
    ensemble = CheXzeroBackend(pretrained=str(folder), device="cpu")
    ensemble.learn()
    scores = ensemble.classify(requests)
    assert np.allclose([s.probability for s in scores], mean, rtol=0, atol=1e-6)
    assert np.allclose([s.margin for s in scores], np.log(mean / (1 - mean)), rtol=0, atol=1e-5)
    assert np.abs(mean - [s.probability for s in singles[0]]).max() > 1e-3  # negative control: members disagree
    assert [path.name for path in ensemble.checkpoint.weights] == ["a.pt", "b.pt", "c.pt"]
    assert len(ensemble.describe()["weight_files_sha256"]) == 3


def test_an_ensembles_cosine_is_the_mean_of_the_members_cosines(
    tmp_path: Path, images: Callable[..., list[ImageRef]], embed_requests: Callable[..., list[Instance]]
) -> None:
    paths = [save(tmp_path / "weights" / f"{seed}.pt", openai_state(seed)) for seed in range(2)]
    requests = embed_requests([*images(2), "edema"])

    def cosines(pretrained: Path) -> np.ndarray:
        vectors = [e.vector for e in CheXzeroBackend(pretrained=str(pretrained), device="cpu").embed(requests)]
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        return np.array(vectors[:2]) @ vectors[2]

    assert np.allclose(cosines(tmp_path / "weights"), np.mean([cosines(p) for p in paths], axis=0), atol=1e-5)
    pixels, ids = torch.randn(2, 3, 64, 64), open_clip.SimpleTokenizer(context_length=77)(["edema", "no edema"])
    for feature, given in (("image_features", pixels), ("text_features", ids)):
        members = [getattr(CheXzeroBackend(pretrained=str(p), device="cpu"), feature)(given) for p in paths]
        both = getattr(CheXzeroBackend(pretrained=str(tmp_path / "weights"), device="cpu"), feature)(given)
        assert torch.allclose(both, torch.cat(members, dim=1), rtol=0, atol=1e-5)
        assert not both.requires_grad and not both.is_inference()  # something may be trained on top


# --- files that are none


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "executed")


def write_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [save, write_pickle])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_with_code_is_refused_and_never_run(
    tmp_path: Path, write: Callable[[Path, Any], object], wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    executed, path = tmp_path / "executed", tmp_path / "bomb.pt"
    content = {"visual.conv1.weight": Bomb(executed)}
    write(path, {"state_dict": content} if wrapped else content)
    with pytest.raises(UserError, match=r"bomb\.pt") as error:
        CheXzeroBackend(pretrained=str(path), device="cpu").ensure_loaded()
    assert not executed.exists()
    assert "\n" not in str(error.value)
    # Negative control: it is live.
    if write is write_pickle:
        pickle.loads(path.read_bytes())  # noqa: S301
    else:
        torch.load(path, weights_only=False)
    assert executed.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.pt", b"not a checkpoint"),
        ("empty.pt", b""),
        ("text.safetensors", b"not a checkpoint"),
        ("short.safetensors", b"\x10\0\0\0\0\0\0\0{"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        CheXzeroBackend(pretrained=str(path), device="cpu").ensure_loaded()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), {}, {"a": 1}, {"epoch": 3, "model": {"a": torch.zeros(1)}}, {1: 2}]
)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = save(tmp_path / "other.pt", content)
    with pytest.raises(UserError, match=r"other\.pt") as error:
        CheXzeroBackend(pretrained=str(path), device="cpu").ensure_loaded()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.pt", "empty"])
def test_where_nothing_lies_the_error_says_what_was_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"CheXzero checkpoint.*{name}"):
        CheXzeroBackend(pretrained=str(tmp_path / name), device="cpu").ensure_loaded()
