from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file

from medvlm_harness.data.records import Dataset, Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.dual_encoder import DualEncoder
from medvlm_harness.model_backends.identity import state_sha256
from medvlm_harness.model_backends.medbridge import MedBridgeBackend
from medvlm_harness.model_backends.medbridge_adapter import AdapterConfig, MedBridge
from medvlm_harness.model_backends.tower_tokens import TokenTower
from medvlm_harness.requests import LabelSet
from medvlm_harness.training import medbridge
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.labelled_images import labelled_images
from medvlm_harness.training.medbridge import (
    MedBridgeMethod,
    loss_of,
    positive_weights,
    shift_bias,
)
from medvlm_harness.training.methods import METHODS, Schedule, build_method, find_method

SMALL: dict[str, Any] = {"model": "medvlm-tiny", "device": "cpu", "width": 16, "queries": 3, "heads": 2}


@pytest.fixture(scope="module")
def data(demo: Dataset) -> TrainingData:
    """A few studies of the demo."""
    whole = TrainingData.of(demo)
    labelled = [study for study in whole.train if "template" in study.labels]
    return replace(whole, train=tuple(labelled[:32]), validation=whole.validation[:12])


def trained(
    data: TrainingData, output: Path, *, seed: int = 0, steps: int = 2, **options: Any
) -> dict[str, torch.Tensor]:
    method = MedBridgeMethod(schedule=Schedule(steps=steps, batch_size=8, seed=seed), **{**SMALL, **options})
    finetune(method, data, output)
    return load_file(output / "medbridge.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# --- labels


def test_labels_mean_what_they_mean_in_an_evaluation(data: TrainingData, fake_image: Callable[..., Image]) -> None:
    def study(name: str, labels: dict[str, Any]) -> Study:
        return Study(name, name, images=(fake_image(f"{name}.png"),), labels=labels)

    studies = [
        study("a", {"rules": {"Edema": 1, "Fracture": None}}),  # unmentioned by a source that covers it: negative
        study("b", {"rules": {"Edema": -1, "Fracture": 0}}),  # uncertain: left out
        study("c", {"mesh": {"Edema": 1, "Fracture": 1}}),  # of another source: unlabelled, not negative
        study("d", {"rules": {"Edema": -1, "Fracture": -1}}),  # nothing known
    ]
    found = labelled_images(data, studies, "rules", ["Edema", "Fracture"], "frontal")
    assert [ref.path.name for ref in found.images] == ["a.png", "b.png"]
    assert np.array_equal(found.targets, [[1, 0], [np.nan, 0]], equal_nan=True)


def test_a_study_gives_its_labels_to_each_image_asked_for(data: TrainingData, fake_image: Callable[..., Image]) -> None:
    images = (fake_image("f.png"), fake_image("l.png", "lateral"), fake_image("g.png"))
    study = Study("a", "a", images=images, labels={"rules": {"Edema": 1}})
    one = labelled_images(data, [study], "rules", ["Edema"], "frontal")
    every = labelled_images(data, [study], "rules", ["Edema"], "all")
    assert [ref.path.name for ref in one.images] == ["f.png"]
    assert every.targets.tolist() == [[1], [1], [1]]


def test_positives_weigh_as_much_as_negatives_up_to_a_limit() -> None:
    nan = np.nan
    columns = [[1, 0, 0, 0, nan, nan], [1, 1, 1, 0, 0, nan], [0] * 6, [1] + [0] * 5]
    targets = np.array([*np.array(columns).T, *[[nan, nan, 0, 0]] * 200], dtype=np.float32)
    assert positive_weights(targets).tolist() == [3, 1, 20, 20]


def test_the_shift_gives_back_the_log_odds_of_the_train_split() -> None:
    """Of a head that sees nothing the weighted loss is least at log(w p / (1 - p)): searched for, then shifted."""
    module = MedBridge([TokenTower(lambda x: x)], [4], 2, AdapterConfig(grid=0, width=4, heads=1, queries=1))
    weights, share = np.array([5.0, 1.0], np.float32), np.array([0.1, 0.3])
    grid = np.linspace(-6, 6, 24001)
    for k, (w, p) in enumerate(zip(weights, share, strict=True)):
        loss = w * p * np.log1p(np.exp(-grid)) + (1 - p) * np.log1p(np.exp(grid))
        with torch.no_grad():
            module.head.bias[k] = float(grid[loss.argmin()])
    shift_bias(module, weights)
    assert torch.sigmoid(module.head.bias).tolist() == pytest.approx(share, abs=1e-3)


def test_a_label_that_is_not_known_teaches_nothing() -> None:
    module = MedBridge([TokenTower(lambda x: x)], [4], 3, AdapterConfig(grid=0, width=4, heads=1, queries=1))
    targets = np.array([[1, 0, np.nan], [0, np.nan, np.nan]], np.float32)
    loss_of(module, [torch.randn(2, 1, 5, 4)], targets, torch.ones(3)).backward()
    moved = module.head.weight.grad.abs().amax(dim=1) > 0  # type: ignore[union-attr]
    assert moved.tolist() == [True, True, False]


def test_the_loss_is_the_mean_over_known_labels_with_positives_weighed() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, stems: Any) -> torch.Tensor:
            return torch.tensor([[0.5, -1.0], [2.0, 3.0]])

    targets = np.array([[1, 0], [np.nan, 1]], np.float32)
    by_hand = [3 * np.log1p(np.exp(-0.5)), np.log1p(np.exp(-1.0)), 2 * np.log1p(np.exp(-3.0))]
    loss = loss_of(Fixed(), [], targets, torch.tensor([3.0, 2.0]))  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(np.mean(by_hand), abs=1e-6)


# --- training


def test_the_same_seed_gives_the_same_weights_and_another_one_others(data: TrainingData, tmp_path: Path) -> None:
    first, again, other = (trained(data, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert equal(first, again)
    assert not equal(first, other)


def test_the_encoder_is_as_it_was(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[DualEncoder, str]] = []
    original = medbridge.frozen_encoder

    def watched(*args: Any, **options: Any) -> DualEncoder:
        encoder = original(*args, **options)
        encoder.ensure_loaded()
        assert encoder.model is not None
        encoder.model.requires_grad_(True)  # as most come
        opened.append((encoder, state_sha256(encoder.model)))
        return encoder

    monkeypatch.setattr(medbridge, "frozen_encoder", watched)
    trained(data, tmp_path / "a", learning_rate=0.1)
    ((encoder, before),) = opened
    assert encoder.model is not None
    assert state_sha256(encoder.model) == before
    assert not encoder.model.training
    assert not any(p.requires_grad or p.grad is not None for p in encoder.model.parameters())


def test_what_the_towers_give_is_the_same_kept_or_computed_anew(data: TrainingData, tmp_path: Path) -> None:
    def losses(folder: Path, **options: Any) -> list[float]:
        trained(data, folder, **options)
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [value for entry in entries for name, value in entry.items() if name.endswith("loss")]

    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "anew", memory=0.0), abs=1e-4)


def test_random_crops_are_drawn_by_the_seed(data: TrainingData, tmp_path: Path) -> None:
    first, again, sliding = (
        trained(data, tmp_path / name, crops=crops)
        for name, crops in (("a", "random"), ("b", "random"), ("c", "sliding"))
    )
    assert equal(first, again)
    assert not equal(first, sliding)


def test_the_saved_model_has_the_validation_loss_that_was_reached(
    data: TrainingData, tmp_path: Path, classify_requests_of: Callable[..., list[Instance]]
) -> None:
    """From the backend's margins, by NumPy: the loss of the weights that were kept, and less than at the start."""
    trained(data, tmp_path / "a", steps=12, learning_rate=3e-3)
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    losses = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    model = MedBridgeBackend(pretrained=str(tmp_path / "a"), device="cpu", store="off")
    names = model.settings.labels
    validation, train = (
        labelled_images(data, studies, "template", names, "frontal") for studies in (data.validation, data.train)
    )
    scores = model.classify(classify_requests_of(validation.images, LabelSet.from_config("all", list(names))))
    weights = positive_weights(train.targets).astype(np.float64)
    logits = np.array([one.margin for one in scores]) + np.log(weights)
    y, known = np.nan_to_num(validation.targets), ~np.isnan(validation.targets)
    loss = weights * y * np.log1p(np.exp(-logits)) + (1 - y) * np.log1p(np.exp(logits))
    assert loss[known].mean() == pytest.approx(min(losses), abs=1e-4)
    assert min(losses) < losses[0] - 0.01


@pytest.fixture
def classify_requests_of() -> Callable[..., list[Instance]]:
    return lambda refs, labels: [Instance("classify", {}, (ref, labels), k) for k, ref in enumerate(refs)]


# --- what does not fit


def test_labels_of_one_value_are_left_out_and_named(
    data: TrainingData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    never = tuple(replace(study, labels={"template": {**study.labels["template"], "Edema": 0}}) for study in data.train)
    with caplog.at_level(logging.WARNING, "lm_eval.medvlm"):
        trained(replace(data, train=never), tmp_path / "a", steps=1)
    labels = json.loads((tmp_path / "a" / "medbridge.json").read_text())["labels"]
    assert "Edema" not in labels and "Cardiomegaly" in labels
    assert "Edema" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_source": "chexbert"}, "label_source"),
        ({"model": "medvlm-lm", "model_args": "pretrained=x"}, "dual encoder"),
        ({"more_experts": "medvlm-tyni:"}, "medvlm-tyni"),
        ({"model_args": "precision=bf16"}, "fp32"),
        ({"crop": 0.2}, "leave gaps"),
        ({"width": 15}, "multiple of heads"),
    ],
)
def test_what_does_not_fit_gets_one_line(
    data: TrainingData, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        trained(data, tmp_path / "a", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_the_method_is_built_by_its_name() -> None:
    assert find_method("medbridge") is MedBridgeMethod
    assert "medbridge" in METHODS
    built = build_method("medbridge", ["grid=3", "crop=0.5", "crops=random"], model="x", schedule=Schedule(steps=1))
    assert (built.grid, built.crop, built.crops) == (3, 0.5, "random")  # type: ignore[attr-defined]
    defaults = MedBridgeMethod(model="x", schedule=Schedule(steps=1))
    assert AdapterConfig() == AdapterConfig(**{name: getattr(defaults, name) for name in vars(AdapterConfig())})
