from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from scipy.special import expit

from medvlm_harness.data.images import open_image
from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.medbridge import MedBridgeBackend
from medvlm_harness.requests import ImageRef, LabelScores, LabelSet
from medvlm_harness.results.run import unsupported_reason
from medvlm_harness.tracks.contamination import trained_splits
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.medbridge import MedBridgeMethod
from medvlm_harness.training.methods import Schedule

VISION = {"image_size": 32, "layers": 3, "width": 48, "head_width": 24, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
LABELS = LabelSet.from_config("findings", ["Edema", "Cardiomegaly", "Support Devices"])
Requests = Callable[..., list[Instance]]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random open_clip model with a ViT."""
    folder: Path = tmp_path_factory.mktemp("experts") / "vit"
    folder.mkdir()
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "medvlm_card.yaml").write_text("trained_on: [somewhere]\n")
    return folder


@pytest.fixture(scope="module")
def trained(vit: Path, demo: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MedBridge over a ViT (queries inside) and the packaged CNN (queries after), trained for a moment."""
    data = TrainingData.of(demo)
    few = replace(data, train=data.train[:32], validation=data.validation[:12])
    method = MedBridgeMethod(
        model="medvlm-clip",
        model_args=f"pretrained={vit}",
        more_experts="medvlm-tiny:",
        schedule=Schedule(steps=2, batch_size=8),
        device="cpu",
        width=16,
        queries=3,
        heads=2,
    )
    output: Path = tmp_path_factory.mktemp("trained") / "bridge"
    finetune(method, few, output)
    return output


@pytest.fixture(scope="module")
def pictures(demo: Dataset) -> list[ImageRef]:
    studies = [study for study in demo.studies if study.split == "test"]
    return [ImageRef(image.sha256, demo.path(image)) for study in studies[:9] for image in study.images[:1]]


def backend(folder: Path, **options: Any) -> MedBridgeBackend:
    return MedBridgeBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def margins(scores: list[LabelScores]) -> np.ndarray:
    return np.array([one.margin for one in scores])


# --- answers


def test_scores_are_the_adapters_logits_on_the_whole_image_and_its_windows(
    trained: Path, pictures: list[ImageRef], classify_requests: Requests
) -> None:
    model = backend(trained)
    scores = model.classify(classify_requests(pictures, LABELS))
    # By hand: five views of 60%, at the corners.
    pixels: list[list[torch.Tensor]] = [[], []]
    for ref in pictures:
        image = open_image(ref.path)
        w, h = image.size
        boxes = [(x, y, x + 0.6, y + 0.6) for y in (0, 0.4) for x in (0, 0.4)]
        edges = [
            (round(a * w - 0.499), round(b * h - 0.499), round(c * w + 0.499), round(d * h + 0.499))
            for a, b, c, d in boxes
        ]
        views = [image, *(image.crop(edge) for edge in edges)]
        for expert, rows in zip(model.experts, pixels, strict=True):
            rows.append(torch.stack([expert.preprocess(view) for view in views]))
    with torch.inference_mode():
        logits = model.network(model.network.stems([torch.stack(rows) for rows in pixels])).numpy()
    columns = [model.settings.labels.index(name) for name in LABELS.names]
    assert np.abs(margins(scores) - logits[:, columns]).max() < 1e-5
    assert np.allclose([one.probability for one in scores], expit(margins(scores)), atol=1e-12)
    assert np.ptp(margins(scores), axis=0).min() > 1e-4  # images differ


def test_batch_size_does_not_matter(trained: Path, pictures: list[ImageRef], classify_requests: Requests) -> None:
    requests = classify_requests(pictures, LABELS)
    one, many = (backend(trained, batch_size=size).classify(requests) for size in (1, 64))
    assert np.abs(margins(one) - margins(many)).max() < 1e-5


def test_labels_may_come_in_any_order_and_number(
    trained: Path, pictures: list[ImageRef], classify_requests: Requests
) -> None:
    model = backend(trained)
    all_three = margins(model.classify(classify_requests(pictures, LABELS)))
    turned = LabelSet.from_config("turned", ["support_devices", "Edema"])
    assert np.array_equal(margins(model.classify(classify_requests(pictures, turned))), all_three[:, [2, 0]])
    assert model.images_encoded == len(pictures)


def test_stored_answers_need_no_model(trained: Path, pictures: list[ImageRef], classify_requests: Requests) -> None:
    requests = classify_requests(pictures, LABELS)
    first, second = backend(trained, store="auto"), backend(trained, store="auto")
    scores = first.classify(requests)
    first.describe()
    assert second.classify(requests) == scores
    assert not second.loaded and not any(expert.loaded for expert in second.experts)
    assert second.describe()["images_recalled"] == len(pictures)
    assert not second.loaded


# --- what it does not do


def test_labels_it_was_not_trained_for_are_refused_by_name(
    trained: Path, pictures: list[ImageRef], classify_requests: Requests
) -> None:
    model = backend(trained)
    others = LabelSet.from_config("others", ["Edema", "Scoliosis", "Hernia"])
    with pytest.raises(UserError, match="others: it was not trained for Scoliosis, Hernia") as error:
        model.classify(classify_requests(pictures, others))
    assert "\n" not in str(error.value)
    assert not model.loaded


def test_a_task_that_it_cannot_do_is_known_before_the_run(trained: Path) -> None:
    model = backend(trained)
    options = {"kind": "multiclass", "options": {"frontal": "front", "lateral": "side"}}

    def task(labels: Any) -> SimpleNamespace:
        label_set = LabelSet.from_config("labels", labels)
        needs = {"needs": lambda lm: {"classify:image"}, "refuses": lambda lm: None}
        return SimpleNamespace(is_medvlm=True, label_set=label_set, **needs)

    assert unsupported_reason(model, task(["Edema"])) is None
    assert "independent labels" in str(unsupported_reason(model, task(options)))
    assert "Scoliosis" in str(unsupported_reason(model, task(["Edema", "Scoliosis"])))
    assert model.refuses(LABELS) is None


@pytest.mark.parametrize("left", [(), ("medbridge.json",), ("medbridge.safetensors",)])
def test_an_untrained_folder_says_how_to_train(trained: Path, tmp_path: Path, left: tuple[str, ...]) -> None:
    for name in left:
        shutil.copy(trained / name, tmp_path)
    with pytest.raises(UserError, match="medvlm finetune --method medbridge") as error:
        backend(tmp_path)
    assert "\n" not in str(error.value)


def altered(trained: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(trained, folder)
    state = load_file(folder / "medbridge.safetensors")
    change(state)
    save_file(state, folder / "medbridge.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.weight"), r"1 keys missing, 0 unexpected \(head.weight"),
        (lambda state: state.update(more=torch.zeros(1)), r"0 keys missing, 1 unexpected \(more"),
        (lambda state: state.update({"head.bias": torch.zeros(2)}), r"head.bias is \(2,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    trained: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        backend(altered(trained, tmp_path / "other", change)).ensure_loaded()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1, "experts": []}'])
def test_damaged_settings_are_refused(trained: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(trained, tmp_path / "other")
    (tmp_path / "other" / "medbridge.json").write_text(text)
    with pytest.raises(UserError, match=r"medbridge\.json"):
        backend(tmp_path / "other")


# --- experts


def test_an_expert_that_moved_is_found_by_its_new_path_and_only_the_same_one(
    trained: Path, vit: Path, tmp_path: Path, pictures: list[ImageRef], classify_requests: Requests
) -> None:
    requests = classify_requests(pictures, LABELS)
    shutil.copytree(vit, tmp_path / "moved")
    here = "packaged"
    moved = backend(trained, experts=f"{tmp_path / 'moved'}+{here}")
    assert moved.classify(requests) == backend(trained).classify(requests)
    state = load_file(vit / "open_clip_model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "moved" / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="is not the one that this was trained on"):
        backend(trained, experts=f"{tmp_path / 'moved'}+{here}").classify(requests)
    with pytest.raises(UserError, match="2 paths"):
        backend(trained, experts="one")


def test_the_identity_holds_the_experts_and_no_path(trained: Path, vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "moved")
    here, moved = backend(trained), backend(trained, experts=f"{tmp_path / 'moved'}+packaged")
    assert here.identity == moved.identity
    assert str(vit) not in str(here.identity)
    other = altered(trained, tmp_path / "other", lambda state: state["head.bias"].add_(1))
    assert backend(other).identity != here.identity


# --- results


def test_the_card_says_whose_it_is_and_what_it_was_trained_on(trained: Path) -> None:
    card = backend(trained).card
    assert "re-implementation" in card.summary and "not the authors' model" in card.summary
    assert card.trained_on is not None and "somewhere" in card.trained_on  # the expert's own
    seen = trained_splits(card.trained_on, names=["demo_cxr"], split_scheme=None)
    assert seen == {"train"}


def test_results_say_where_the_queries_go(trained: Path) -> None:
    described = backend(trained).describe()
    assert [expert["injection"] for expert in described["experts"]] == ["inside", "after"]
    assert described["probability_scale"] == "sigmoid"
    assert 0 < described["trained_parameters"] < described["card"]["parameters"]
    assert "5 views" in described["card"]["preprocessing"]
