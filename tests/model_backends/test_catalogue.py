"""Every card of the catalogue, and how cards are read and found."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lm_eval.utils import simple_parse_args_string

from medvlm_harness import plugin
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends import catalogue as module
from medvlm_harness.model_backends import identity
from medvlm_harness.model_backends.cards import ModelCard, Source
from medvlm_harness.model_backends.catalogue import Entry, Run, backend_card, catalogue, find, over_limit, state
from medvlm_harness.model_backends.chexzero import CheXzeroBackend
from medvlm_harness.model_backends.clip import ClipBackend

ENTRIES = catalogue()
TARGETS = plugin.model_targets()
# Cards that pin a revision or a hash; the first one adds its name here, with where it was read.
PINNED: set[str] = set()
LONGEST = 400


def backend(name: str) -> Any:
    target, _, attribute = TARGETS[name].partition(":")
    return getattr(import_module(target), attribute)


@pytest.mark.parametrize("name", TARGETS)
def test_every_backend_has_its_card_here(name: str) -> None:
    assert backend(name).card == backend_card(name), f"declare `card: ModelCard = backend_card({name!r})`"
    assert ENTRIES[name].run.model == name


def test_every_backend_that_a_card_names_is_there() -> None:
    assert {entry.run.model for entry in ENTRIES.values()} - {None} == TARGETS.keys()


@pytest.mark.parametrize("name", ENTRIES)
def test_a_card_is_complete(name: str) -> None:
    card, run = ENTRIES[name].card, ENTRIES[name].run
    assert card.name == name
    assert card.summary and "\n" not in card.summary
    assert (run.model is None) == bool(run.cannot)
    if run.model is None or run.weights == "published":
        assert card.source is not None and card.source.location
        assert card.reference
    assert card.licence is None or card.licence.strip()
    assert card.billions is None or card.parameters is None  # a name's figure stands in for a count
    assert bool(card.counted) == bool(card.parameters)
    assert ENTRIES[name].card.to_dict()["name"] == name


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_on_a_card_is_long(name: str) -> None:
    entry = ENTRIES[name]
    texts = [*map(str, vars_of(entry.card)), *entry.card.traps, entry.run.args, entry.run.cannot, entry.run.access]
    assert max(map(len, texts)) <= LONGEST
    assert all("\n" not in trap for trap in entry.card.traps)


def vars_of(card: ModelCard) -> list[Any]:
    return [value for value in (card.summary, card.licence, card.preprocessing, card.reference, card.counted) if value]


@pytest.mark.parametrize("name", ENTRIES)
def test_published_prompts_have_a_source_and_a_place_for_what_is_asked(name: str) -> None:
    prompts = ENTRIES[name].card.prompts
    if prompts is not None:
        assert prompts.source and prompts.licence
        assert prompts.positive or prompts.conversation
        assert all(template.count("{}") == 1 for template in (*prompts.positive, *prompts.negative))
        assert prompts.conversation.count("{q}") == bool(prompts.conversation)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_example_arguments_are_options_of_the_backend(name: str) -> None:
    run = ENTRIES[name].run
    if run.model in TARGETS:
        assert set(simple_parse_args_string(run.args)) <= backend(run.model).options()


@pytest.mark.parametrize("name", ENTRIES)
def test_no_revision_or_hash_is_invented(name: str) -> None:
    found = re.findall(r"\b(?:[0-9a-f]{40}|[0-9a-f]{64})\b", str(ENTRIES[name]))
    source = ENTRIES[name].card.source
    pinned = source is not None and (source.revision is not None or bool(source.sha256))
    assert (bool(found) or pinned) == (name in PINNED)


def test_parameters_are_those_of_the_architectures() -> None:
    """Counted again from the libraries' configurations, without numbers."""
    import timm
    import torch
    import torchvision
    import transformers as t

    def count(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        clip = count(t.CLIPModel(t.CLIPConfig()))
        clinical = count(t.BertModel(t.BertConfig(vocab_size=28996)))
        swin = count(t.SwinModel(t.SwinConfig()))
        body = count(torchvision.models.resnet50()) - 2049 * 1000
        clip_text = count(t.CLIPTextModel(t.CLIPTextConfig()))
        eva = count(timm.create_model("eva02_base_patch14_448", num_classes=0))
        vit = count(timm.create_model("vit_base_patch16_224", num_classes=0, global_pool=""))
        bert = count(t.BertModel(t.BertConfig(), add_pooling_layer=False))
        distil = count(t.DistilBertForMaskedLM(t.DistilBertConfig()))
        six = count(t.BertModel(t.BertConfig(num_hidden_layers=6)))
        t5 = count(t.T5ForConditionalGeneration(t.T5Config()))
    projection = 768 * 512
    assert {name: entry.card.parameters for name, entry in ENTRIES.items() if entry.card.parameters} == {
        "chexzero": clip,
        "pubmedclip": clip,
        "medclip": swin + clinical + 2 * projection + 1,
        "medclip-resnet": body + 2048 * 512 + clinical + projection + 1,
        "medfilip": body + 2049 * 768 + clip_text + projection + 1,
        "medfilip-eva02": eva + clip_text + projection + 1,
        "biomedclip": vit + projection + bert + 768 * 640 + 640 * 512 + 1,
        "distilbert": distil,
        "tinybert-6l": six,
        "bio-clinicalbert": clinical,
        "t5-small": t5,
        **LARGE,
    }


# Seven billions take long even without numbers; per layer from the published sizes.
LAYER_LLAMA = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
LAYER_MISTRAL = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
LLAMA = 32 * LAYER_LLAMA + 2 * 32000 * 4096 + 4096
MISTRAL = 32 * LAYER_MISTRAL + 2 * 32000 * 4096 + 4096
# CLIP ViT-L/14 at 336: patches, class token, 577 positions, 24 layers, two norms around them.
LAYER_VIT = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
VIT_L = 1024 * 3 * 14 * 14 + 1024 + 577 * 1024 + 24 * LAYER_VIT + 4 * 1024
# EVA ViT-g/14 as BLIP-2 has it, its norm, and the Q-Former with 32 queries and cross-attention in every second layer.
LAYER_EVA = 4 * 1408 * 1408 + 4 * 1408 + 2 * 1408 * 6144 + 6144 + 1408 + 4 * 1408
EVA_G = 1408 * 3 * 14 * 14 + 1408 + 1408 + 257 * 1408 + 39 * LAYER_EVA + 2 * 1408
ATTENTION = 4 * (768 * 768 + 768) + 2 * 768
CROSS = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
Q_FORMER = 12 * (ATTENTION + 2 * 768 * 3072 + 3072 + 768 + 2 * 768) + 6 * CROSS + 2 * 768
LARGE = {
    "llava-med": MISTRAL + VIT_L + 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
    "xraygpt": LLAMA + EVA_G + Q_FORMER + 32 * 768 + 768 * 4096 + 4096,
}


# --- whether a model runs


def test_only_models_over_ten_billions_are_over_the_limit() -> None:
    assert [name for name, entry in ENTRIES.items() if over_limit(entry.card)] == ["medgemma-27b"]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run("a", weights="packaged"), "yes"),
        (Run("a", weights="yours"), "yes, with weights of yours"),
        (Run("a"), "needs weights from org/name"),
        (Run("a", access="gated"), "needs weights from org/name (gated)"),
        (Run("a", weights="none"), "needs weights of yours: none were published"),
        (Run("b"), "no: this installation has no --model b"),
        (Run(cannot="it is remote code"), "no: it is remote code"),
    ],
)
def test_what_stands_in_the_way_is_said(run: Run, expected: str) -> None:
    card = ModelCard(name="m", family="generative", source=Source("org/name"))
    assert state(Entry(card, run), ["a"]) == expected


# --- reading


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def read_anew() -> Any:
    module._read.cache_clear()
    module.catalogue.cache_clear()
    yield
    module._read.cache_clear()
    module.catalogue.cache_clear()


def test_a_card_extends_another(folder: Path) -> None:
    (folder / "a.yaml").write_text(
        "name: a\nfamily: generative\nlicence: mit\nparameters: 5\nrun: {model: m, args: pretrained=a, access: gated}\n"
    )
    (folder / "b.yaml").write_text("extends: a\nname: b\nparameters: null\nrun: {args: pretrained=b}\n")
    b = find("B")
    assert b.card == replace(find("a").card, name="b", parameters=None)
    assert b.run == Run("m", "pretrained=b", access="gated")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nfamily: generative\nlicense: mit\n", r"unknown key 'license'.* Did you mean licence\?"),
        ("name: a\nfamily: generative\nrun: {modell: m}\n", r"run: unknown key 'modell'.* Did you mean model\?"),
        ("name: a\nfamily: generative\nsource: {location: x, sha: y}\n", "source: unknown key 'sha'"),
        ("name: a\nfamily: generative\nsource: x\n", "expected source to be a mapping"),
        ("name: a\nfamily: generative\nrun: m\n", "expected run to be a mapping"),
        ("name: a\nfamily: dual\n", "expected family to be one of dual encoder, "),
        ("name: a\nfamily: generative\nrun: {weights: mine}\n", "expected weights to be one of packaged, "),
        ("name: a\nfamily: generative\ntraps: one\n", "expected traps to be a list of texts"),
        ("name: a\nfamily: generative\nparameters: true\n", "expected parameters to be a number"),
        ("name: a\nfamily: generative\nbillions: four\n", "expected billions to be a number"),
        ("name: a\nfamily: generative\nsource: {location: x, sha256: {f: 1}}\n", "expected sha256 to map texts"),
        ("name: b\nfamily: generative\n", "expected name to be a, but got 'b'"),
        ("name: a\n", "expected a family"),
        ("extends: z\nname: a\n", "extends 'z', which has no card"),
    ],
)
def test_a_card_that_is_wrong_is_named_in_one_line(folder: Path, text: str, message: str) -> None:
    (folder / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        catalogue()
    assert str(error.value).startswith(str(folder / "a.yaml"))
    assert "\n" not in str(error.value)


def test_an_unknown_name_gets_its_near_misses() -> None:
    with pytest.raises(UserError, match=r"No model 'chexzro' in the catalogue\. Did you mean chexzero"):
        find("chexzro")


# --- from a checkpoint to its card


def test_a_hub_id_brings_its_card_with_the_revision_asked_for() -> None:
    location = "flaviagiammarino/pubmed-clip-vit-base-patch32"
    clip = ClipBackend(pretrained=location, model_revision="1" * 40, device="cpu")
    assert clip.card == replace(find("pubmedclip").card, source=Source(location, "1" * 40))
    assert clip.card.trained_on == ("ROCO",)
    unknown = ClipBackend(pretrained="somebody/else", device="cpu").card  # negative control
    assert (unknown.name, unknown.trained_on) == ("somebody/else", None)


def test_a_pinned_hash_is_of_its_revision_alone(folder: Path) -> None:
    pin = "source: {location: o/n, revision: one, sha256: {f: h}}\nrun: {model: m, args: pretrained=o/n}\n"
    (folder / "a.yaml").write_text(f"name: a\nfamily: generative\n{pin}")
    for revision, hashes in (("one", {"f": "h"}), ("two", {}), (None, {})):
        card = module.published_card("m", "o/n", revision)
        assert card is not None and card.source == Source("o/n", revision, hashes)
    assert module.published_card("another", "o/n", "one") is None


def test_a_local_copy_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "copy.bin"
    path.touch()
    options = {"pretrained": str(path), "architecture": "ViT-B-32", "device": "cpu"}
    assert ClipBackend(**options, card="pubmedclip").card.name == "pubmedclip"
    assert ClipBackend(**options).card.name == "copy.bin"
    with pytest.raises(UserError, match="card=chexzero is a model that --model chexzero runs, not --model medvlm-clip"):
        ClipBackend(**options, card="chexzero")
    with pytest.raises(UserError, match="card=maira-2 is a model that nothing here runs"):
        ClipBackend(**options, card="maira-2")
    with pytest.raises(UserError, match="Did you mean pubmedclip"):
        ClipBackend(**options, card="pubmedclp")


def test_no_card_is_part_of_a_models_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    source = identity._source
    monkeypatch.setattr(identity, "_source", lambda name: read.append(name.rpartition(".")[2]) or source(name))
    identity.code_sha256(CheXzeroBackend)
    assert {"cards", "catalogue", "first_load"} & set(read) == set()
    assert {"chexzero", "torch_backend", "open_clip_towers"} <= set(read)  # negative control
