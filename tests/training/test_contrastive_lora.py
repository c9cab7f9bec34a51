from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch.nn import functional

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.clip import ClipBackend
from medvlm_harness.model_backends.frozen_encoder import frozen_encoder
from medvlm_harness.training import contrastive_lora
from medvlm_harness.training.contrastive_lora import ContrastiveLoraMethod, _ContrastiveTraining, contrastive_loss
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.lora import chosen
from medvlm_harness.training.methods import Schedule, Trained

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "vit": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
}
ADAPTER = "adapter_model.safetensors"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tower -> --model_args of a random open_clip model with it."""
    made = {}
    for number, (name, vision) in enumerate(TOWERS.items()):
        folder = tmp_path_factory.mktemp("bases") / name
        folder.mkdir()
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        made[name] = f"pretrained={folder}"
    return made


@pytest.fixture(scope="module")
def data(demo: Dataset) -> TrainingData:
    """A few studies of the demo."""
    whole = TrainingData.of(demo)
    return replace(whole, train=whole.train[:20], validation=whole.validation[:12])


def train(
    data: TrainingData, output: Path, *, steps: int = 3, batch_size: int = 8, seed: int = 0, **given: Any
) -> Trained:
    schedule = Schedule(steps=steps, batch_size=batch_size, seed=seed, eval_steps=2)
    options = {"model": "medvlm-tiny", "device": "cpu", "rank": 2, "learning_rate": 0.01, **given}
    return finetune(ContrastiveLoraMethod(schedule=schedule, **options), data, output)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[_ContrastiveTraining]:
    """What was trained in memory."""
    made: list[_ContrastiveTraining] = []

    class Kept(_ContrastiveTraining):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(contrastive_lora, "_ContrastiveTraining", Kept)
    return made


def vectors_of(training: _ContrastiveTraining, encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The validation studies' vectors by another encoder."""
    encoder.ensure_loaded()
    with torch.inference_mode():
        pixels = torch.stack([training.pixels(pair.image) for pair in training.validation])
        texts = encoder.encode_texts([pair.report for pair in training.validation]).vectors
        return functional.normalize(encoder.encode_images(pixels), dim=1), functional.normalize(texts, dim=1)


# --- the loss


def unit(seed: int) -> torch.Tensor:
    return functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_of_different_reports_it_is_clips_own_loss() -> None:
    images, texts = unit(0), unit(1)
    expected = ClipLoss()(images, texts, torch.tensor(7.0))
    torch.testing.assert_close(contrastive_loss(images, texts, torch.eye(6, dtype=torch.bool), 7.0), expected)


def test_the_same_report_of_another_study_is_no_mistake() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 0, 2]]  # the second study is taken for the first, whose report is its own word for word
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    images[1] = images[0]
    shared = contrastive_loss(images, texts, same, 50.0)
    alone = contrastive_loss(images, texts, torch.eye(3, dtype=torch.bool), 50.0)
    assert shared == pytest.approx(2 / 3 * torch.log(torch.tensor(2.0)).item(), abs=1e-5)  # that of a uniform answer
    one = torch.tensor([[1, 1], [1, 1]]).bool()
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert contrastive_loss(apart, torch.eye(2)[[0, 0]], one, 50.0) > contrastive_loss(
        apart, torch.eye(2)[[0, 1]], ~(one ^ torch.eye(2).bool()), 50.0
    )
    assert alone == pytest.approx(float(shared), abs=1e-5)


# --- training and loading again


@pytest.mark.parametrize("base", ["tiny", "vit", "resnet", "vit,quantization=nf4"])
def test_what_was_trained_is_what_is_loaded_again(
    base: str, bases: dict[str, str], data: TrainingData, tmp_path: Path, trainings: list[_ContrastiveTraining]
) -> None:
    base, _, rounding = base.partition(",")
    name, args = ("medvlm-tiny", "") if base == "tiny" else ("medvlm-clip", f"{bases[base]},{rounding}".strip(","))
    trained = train(data, tmp_path / "out", model=name, model_args=args)
    (training,) = trainings
    own = training.validation_vectors()
    given = {part.partition("=")[0]: part.partition("=")[2] for part in args.split(",") if part}
    again = vectors_of(training, frozen_encoder(name, {**given, "peft": str(tmp_path / "out"), "device": "cpu"}))
    before = vectors_of(training, frozen_encoder(name, {**given, "device": "cpu"}))
    assert trained.best_step > 0
    for side in range(2):
        torch.testing.assert_close(again[side], own[side], atol=1e-5, rtol=0)
        assert (before[side] - own[side]).abs().max() > 1e-3  # else it would be no test
    stored = load_file(tmp_path / "out" / ADAPTER)
    assert trained.parameters == sum(tensor.numel() for tensor in stored.values())
    kinds = {"tiny": "image_tower", "vit": "attn", "resnet": "visual.layer1"}
    assert any(kinds[base] in key for key in stored)
    assert set(trained.validation) >= {"i2t_recall@10_before", "i2t_recall@10_after", "t2i_mrr_after_minus_before"}


def test_plain_peft_loads_it_too(
    bases: dict[str, str], data: TrainingData, tmp_path: Path, trainings: list[_ContrastiveTraining]
) -> None:
    from peft import PeftModel

    train(data, tmp_path / "out", model="medvlm-clip", model_args=bases["vit"])
    (training,) = trainings
    folder = bases["vit"].partition("=")[2]
    model = PeftModel.from_pretrained(open_clip.create_model(f"local-dir:{folder}"), str(tmp_path / "out")).eval()
    with torch.inference_mode():
        pixels = torch.stack([training.pixels(pair.image) for pair in training.validation])
        vectors = functional.normalize(model.encode_image(pixels), dim=1)
    torch.testing.assert_close(vectors, training.validation_vectors()[0], atol=1e-5, rtol=0)


def test_statistics_of_batch_normalisation_stay_the_bases(
    bases: dict[str, str], data: TrainingData, tmp_path: Path, trainings: list[_ContrastiveTraining]
) -> None:
    train(data, tmp_path / "out", model="medvlm-clip", model_args=bases["resnet"])
    now = {name: one for name, one in trainings[0].module.named_buffers() if "running_mean" in name}
    assert now and all(bool((one == 0).all()) for one in now.values())  # as a fresh layer has them


def test_one_tower_alone_leaves_the_other_as_it_was(
    bases: dict[str, str], data: TrainingData, tmp_path: Path, trainings: list[_ContrastiveTraining]
) -> None:
    for towers, side in (("image", 1), ("text", 0)):
        train(data, tmp_path / towers, model="medvlm-clip", model_args=bases["vit"], towers=towers)
        training = trainings.pop()
        folder = bases["vit"].partition("=")[2]
        before = vectors_of(training, ClipBackend(pretrained=folder, device="cpu", store="off"))
        after = training.validation_vectors()
        assert torch.equal(before[side], after[side])
        assert not torch.equal(before[1 - side], after[1 - side])


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 5, "dropout": 0.2}
    train(data, tmp_path / "whole", **options)
    real, calls = _ContrastiveTraining.loss, []

    def killed(self: _ContrastiveTraining, items: Any) -> torch.Tensor:
        calls.append(items)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(_ContrastiveTraining, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path / "killed", **options)
    state = torch.load(tmp_path / "killed.partial" / "state.pt", weights_only=True)
    assert state["at"]["step"] == 2
    assert all("lora" in name for name in state["module"])  # of the base model nothing is kept
    train(data, tmp_path / "killed", **options)
    train(data, tmp_path / "other", **options, seed=1)
    whole, resumed, other = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "killed", "other"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


# --- what is refused


def test_another_base_is_refused(bases: dict[str, str], data: TrainingData, tmp_path: Path) -> None:
    train(data, tmp_path / "out", model="medvlm-clip", model_args=bases["vit"], steps=1)
    folder = Path(bases["vit"].partition("=")[2])
    other = tmp_path / "other"
    other.mkdir()
    (other / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    state = load_file(folder / "open_clip_model.safetensors")
    save_file({**state, "logit_scale": state["logit_scale"] + 1}, other / "open_clip_model.safetensors")
    backend = ClipBackend(pretrained=str(other), peft=str(tmp_path / "out"), device="cpu", store="off")
    with pytest.raises(UserError, match=r"not the one that this was trained on: .* Name the right one by pretrained="):
        backend.ensure_loaded()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "imge_head"}, "No layer that can be trained is called 'imge_head'. Did you mean image_head"),
        ({"batch_size": 21}, "A batch takes 21 items, but there are 20"),
        ({"batch_size": 1}, "a batch of 2 studies or more"),
        ({"model_args": "precision=bf16"}, "Expected precision=fp32"),
        ({"model_args": "peft=DIR"}, "a base model without an adapter"),
        (
            {"model": "medvlm-lm", "model_args": "pretrained=x"},
            "Expected a dual encoder, but medvlm-lm is",
        ),
        ({"rank": 0}, "Expected rank to be more than 0"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    data: TrainingData, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        train(data, tmp_path / "out", **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    names = ["visual.blocks.0.attn.proj", "visual.blocks.0.mlp.fc", "text.fc"]
    assert chosen(names, "auto") == names
    assert chosen(names, "fc,attn.proj") == [names[1], names[2], names[0]]
    assert chosen(names, "text.fc") == ["text.fc"]
