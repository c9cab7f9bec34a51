from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE
from medvlm_harness.model_backends.frozen_encoder import frozen_encoder
from medvlm_harness.model_backends.projector import CONFIG_FILE, WEIGHTS_FILE, ProjectorBackend, image_places, turn_ids
from medvlm_harness.model_backends.vision_language import questions_about
from medvlm_harness.requests import ImageRef, LabelSet

torch.set_num_threads(1)

PROMPT = "Findings:"
GREEDY = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}


@pytest.fixture
def refs(light_and_dark: Dataset) -> list[ImageRef]:
    """Of the test studies: light, dark, light, dark."""
    studies = [study for study in light_and_dark.studies if study.split == "test"]
    return [ImageRef(study.images[0].sha256, light_and_dark.path(study.images[0])) for study in studies]


def backend(folder: Path, **options: Any) -> ProjectorBackend:
    return ProjectorBackend(pretrained=str(folder), **{"device": "cpu", "store": "off", **options})


def generate(model: ProjectorBackend, asked: Sequence[tuple[str, Sequence[ImageRef]]]) -> list[str]:
    requests = [
        Instance("generate_until", {}, (text, dict(GREEDY), {"visual": list(images)}), k)
        for k, (text, images) in enumerate(asked)
    ]
    return model.generate_until(requests)


def likelihoods(model: ProjectorBackend, images: Sequence[ImageRef], answer: str, prompt: str = PROMPT) -> list[float]:
    requests = [
        Instance("loglikelihood", {}, (prompt, answer, {"visual": [image]}), k) for k, image in enumerate(images)
    ]
    return [score for score, _ in model.loglikelihood(requests)]


def test_what_it_learnt_depends_on_the_image(trained_projector: Path, refs: list[ImageRef]) -> None:
    model = backend(trained_projector)
    light, dark = likelihoods(model, refs, " light"), likelihoods(model, refs, " dark")
    margins = [one - other for one, other in zip(light, dark, strict=True)]
    assert min(margins[0], margins[2]) > max(margins[1], margins[3]) + 1
    texts = generate(model, [(PROMPT, [ref]) for ref in refs])
    assert texts[0] != texts[1]


def test_neither_texts_nor_likelihoods_depend_on_the_batch(trained_projector: Path, refs: list[ImageRef]) -> None:
    asked = [
        (PROMPT, refs[:1]),
        (f"Indication: cough and fever\n\n{PROMPT}", refs[1:2]),
        ("first <image> then <image>, compare:", refs[2:4]),
        ("no image at all", []),
    ]
    one, four = (backend(trained_projector, batch_size=size) for size in (1, 4))
    assert generate(one, asked) == generate(four, asked)
    for answer in (" light", " dark and more"):
        assert likelihoods(one, refs, answer) == pytest.approx(likelihoods(four, refs, answer), abs=1e-4)


def test_a_text_is_the_most_likely_token_again_and_again(trained_projector: Path, refs: list[ImageRef]) -> None:
    """By whole forward passes over embeddings put together here, without a cache and without padding."""
    model = backend(trained_projector)
    (text,) = generate(model, [(PROMPT, refs[:1])])
    network: Any = model.model
    state = load_file(trained_projector / WEIGHTS_FILE)
    encoder = frozen_encoder("medvlm-tiny", device="cpu")
    standard = (image_places(encoder, refs[:1], grid=2)[refs[0]] - state["mean"]) / state["spread"]
    hidden = torch.nn.functional.gelu(standard @ state["first.weight"].T + state["first.bias"])
    image = (hidden @ state["second.weight"].T + state["second.bias"] + 10 * state["place"]) * state["size"]
    embed = network.language_model.get_input_embeddings()
    before = embed(torch.tensor([model.tokenizer.bos_token_id]))
    after = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    sequence = torch.cat([before, image, embed(torch.tensor(after))])
    written: list[int] = []
    with torch.inference_mode():
        for _ in range(GREEDY["max_gen_toks"]):
            logits = network.language_model(inputs_embeds=sequence[None], use_cache=False).logits[0, -1]
            written.append(int(logits.argmax()))
            if written[-1] == model.tokenizer.eos_token_id:
                break
            sequence = torch.cat([sequence, embed(torch.tensor(written[-1:]))])
    assert text == model.tokenizer.decode(written, skip_special_tokens=True).partition("\n\n")[0]


def test_labels_from_one_pass_over_the_image_are_those_of_each_answer_alone(
    trained_projector: Path, refs: list[ImageRef]
) -> None:
    labels = LabelSet.from_config("demo", ["light", "dark", "pleural effusion"])
    model = backend(trained_projector)
    together = model.classify([Instance("classify", {}, (ref, labels), 0) for ref in refs])
    for place, question in enumerate(questions_about(labels)):
        yes, no = (
            logsumexp([likelihoods(model, refs, spelt, question.text) for spelt in answer], axis=0)
            for answer in question.answers
        )
        assert [scores.margin[place] for scores in together] == pytest.approx(list(yes - no), abs=1e-4)
    assert together[0].margin != together[1].margin


def test_images_stand_before_a_text_that_does_not_say_where(trained_projector: Path) -> None:
    tokenizer = backend(trained_projector).tokenizer
    begin, text = [tokenizer.bos_token_id], tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert turn_ids(tokenizer, "ab", 1, places=2, place=99) == (*begin, 99, 99, *text)
    assert turn_ids(tokenizer, "a<image>b", 1, places=2, place=99) == (*begin, text[0], 99, 99, text[1])
    with pytest.raises(UserError, match="2 images"):
        turn_ids(tokenizer, "a<image>b", 2, places=2, place=99)


# --- what it is, and what is refused


def test_the_identity_covers_all_parts_and_no_place(
    trained_projector: Path, small_language_model: Path, tmp_path: Path, projector_of: Callable[..., Any]
) -> None:
    first = backend(trained_projector)
    names = {"projector.safetensors", "model.safetensors", "encoder/tiny.safetensors"}
    assert set(first.weights) == names
    assert first.identity is not None
    assert str(small_language_model) not in json.dumps(first.identity)
    moved = shutil.copytree(small_language_model, tmp_path / "moved")
    elsewhere = shutil.copytree(trained_projector, tmp_path / "elsewhere")
    assert backend(elsewhere, language_model=str(moved)).identity == first.identity
    projector_of(tmp_path / "other", steps=1, eval_steps=1)
    other = backend(tmp_path / "other")
    assert other.identity != first.identity
    assert {name for name in names if other.weights[name] != first.weights[name]} == {"projector.safetensors"}


def test_the_card_names_what_it_was_trained_on(trained_projector: Path, light_and_dark: Dataset) -> None:
    model = backend(trained_projector)
    described = model.describe()
    assert model.card.name == "light-or-dark"
    assert {"dataset": "light_and_dark", "scheme": "hash", "splits": ["train"]} in described["card"]["trained_on"]
    assert described["card"]["training"]["data"]["sha256"] == light_and_dark.sha256
    network: Any = model.model
    encoder_parameters = model.encoder.parameters
    assert encoder_parameters is not None
    assert model.parameters == sum(p.numel() for p in network.parameters()) + encoder_parameters
    assert described["encoder"]["card"]["name"] == "medvlm-tiny"


@pytest.mark.parametrize("part", ["language_model", "encoder"])
def test_another_base_model_is_refused_by_its_hash(
    trained_projector: Path, small_language_model: Path, tmp_path: Path, refs: list[ImageRef], part: str
) -> None:
    folder = shutil.copytree(trained_projector, tmp_path / "copy")
    options = {}
    if part == "language_model":
        changed = shutil.copytree(small_language_model, tmp_path / "changed")
        state = load_file(changed / "model.safetensors")
        state["model.norm.weight"] += 1e-3
        save_file(state, changed / "model.safetensors", metadata={"format": "pt"})
        options = {"language_model": str(changed)}
    else:
        recipe = json.loads((folder / CONFIG_FILE).read_text())
        recipe["encoder"]["weights"] = {"tiny.safetensors": "0" * 64}
        (folder / CONFIG_FILE).write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="is not the one that this was trained on") as refused:
        generate(backend(folder, **options), [(PROMPT, refs[:1])])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE])
def test_a_folder_that_lacks_a_file_is_refused(trained_projector: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(trained_projector, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        backend(folder)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(
    trained_projector: Path, tmp_path: Path, refs: list[ImageRef], change: str
) -> None:
    folder = shutil.copytree(trained_projector, tmp_path / "copy")
    state = load_file(folder / WEIGHTS_FILE)
    if change == "missing":
        del state["place"]
    elif change == "unexpected":
        state["third.bias"] = torch.zeros(2)
    else:
        state["place"] = state["place"][:2].clone()
    save_file(state, folder / WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"does not fit projector\.json"):
        generate(backend(folder), [(PROMPT, refs[:1])])


def test_a_recipe_with_unknown_keys_is_refused(trained_projector: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained_projector, tmp_path / "copy")
    (folder / CONFIG_FILE).write_text(json.dumps({**json.loads((folder / CONFIG_FILE).read_text()), "gird": 3}))
    with pytest.raises(UserError, match="expected the keys encoder, grid"):
        backend(folder)


def test_an_encoder_decoder_is_refused(trained_projector: Path, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="Expected a causal language model"):
        backend(trained_projector, language_model=str(tiny_model("t5")))


def test_features_and_places_must_agree(trained_projector: Path) -> None:
    model = backend(trained_projector)
    model.ensure_loaded()
    network: Any = model.model
    with pytest.raises(ValueError, match="Expected features for 1 places, but got 0"):
        network(torch.tensor([[network.place_id, 5]]))
