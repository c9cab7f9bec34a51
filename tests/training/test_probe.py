from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.metrics.ranking import auroc
from medvlm_harness.model_backends.probe import CONFIG_FILE, WEIGHTS_FILE, Probe, ProbeBackend, vectors_of
from medvlm_harness.requests import Label, LabelSet
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.labelled_images import LabelledImages, labelled_images
from medvlm_harness.training.methods import Schedule, Trained
from medvlm_harness.training.probe import LinearProbeMethod

torch.set_num_threads(1)
SOURCE = "template"


@pytest.fixture(scope="module")
def data(demo: Dataset) -> TrainingData:
    """Some studies of the demo."""
    whole = TrainingData.of(demo)
    return replace(whole, train=whole.train[:100], validation=whole.validation[:40])


def train(data: TrainingData, output: Path, **given: Any) -> Trained:
    options = {"model": "medvlm-tiny", "device": "cpu", "label_source": SOURCE, **given}
    method = LinearProbeMethod(schedule=Schedule(steps=60, batch_size=32, eval_steps=20), **options)
    return finetune(method, data, output)


@pytest.fixture(scope="module")
def folder(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("probe") / "out"
    trained = train(data, output)
    assert trained.validation_loss < 0.9 * trained.first_validation_loss
    return output


def backend(folder: Path, **options: Any) -> ProbeBackend:
    return ProbeBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def label_set(*names: str, kind: Literal["multilabel", "multiclass"] = "multilabel") -> LabelSet:
    return LabelSet("few", kind, tuple(Label(name, (name.lower(),)) for name in names))


def asked(model: ProbeBackend, held: LabelledImages, names: list[str]) -> np.ndarray:
    labels = label_set(*names)
    scores = model.classify([Instance("classify", {}, (ref, labels), k) for k, ref in enumerate(held.images)])
    assert all(0 <= p <= 1 for one in scores for p in one.probability)
    return np.array([one.margin for one in scores])


def test_it_scores_what_it_learnt_and_stores_it(folder: Path, data: TrainingData, tmp_path: Path) -> None:
    model = backend(folder, store="auto")
    names = list(model.labels)[:3]
    held = labelled_images(data, data.validation, SOURCE, names, "frontal")
    margins = asked(model, held, names)
    state = load_file(folder / WEIGHTS_FILE)
    probe = Probe(state["mean"].numel(), len(model.labels))
    probe.load_state_dict(state)
    with torch.no_grad():
        expected = probe(vectors_of(model.encoder, held.images))[:, :3].numpy()
    np.testing.assert_allclose(margins, expected, atol=1e-5)
    defined = [k for k in range(3) if len(set(held.targets[:, k][~np.isnan(held.targets[:, k])])) == 2]
    for k in defined:
        known = ~np.isnan(held.targets[:, k])
        assert auroc(held.targets[known, k], margins[known, k]) > 0.6
    again = backend(folder, store="auto")
    assert np.array_equal(asked(again, held, names), margins)
    assert (again.loaded, again.images_recalled) == (False, len(held.images))


def test_what_it_cannot_do_is_told(folder: Path, data: TrainingData, tmp_path: Path) -> None:
    model = backend(folder)
    assert "was not trained for Unheard" in str(model.refuses(label_set("Unheard")))
    assert "exclude each other" in str(model.refuses(label_set(*model.labels[:2], kind="multiclass")))
    with pytest.raises(UserError, match="takes no quantization="):
        backend(folder, quantization="nf4")
    with pytest.raises(UserError, match=r"Expected .* to hold probe\.json"):
        backend(tmp_path)
    with pytest.raises(UserError, match="Expected an encoder of images, but medvlm-lm"):
        train(data, tmp_path / "out", model="medvlm-lm", model_args="pretrained=x")
    with pytest.raises(UserError, match="Expected label_source"):
        train(data, tmp_path / "out", label_source="chexbert")


def test_damaged_files_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("{}")
    (tmp_path / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    with pytest.raises(UserError, match="is damaged"):
        backend(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(
        (folder / CONFIG_FILE).read_text().replace('weights": {', 'weights": {"x": "1", ')
    )
    with pytest.raises(UserError, match="is not the one that this was trained on"):
        backend(tmp_path).describe()
    (tmp_path / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text())
    save_file({"other": torch.ones(2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match="cannot be read as weights"):
        backend(tmp_path).ensure_loaded()
