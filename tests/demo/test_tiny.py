import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.metrics import roc_auc_score

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.data.records import Dataset, Study
from medvlm_harness.demo import tiny
from medvlm_harness.demo.tiny import TinyDualEncoder, load_tiny, preprocess


@pytest.fixture(scope="module")
def model() -> TinyDualEncoder:
    torch.set_num_threads(1)
    return load_tiny()


@pytest.fixture(scope="module")
def studies(demo: Dataset) -> list[Study]:
    return [study for study in demo.studies if study.split == "test"]


@pytest.fixture(scope="module")
def frontal(model: TinyDualEncoder, demo: Dataset, studies: list[Study]) -> torch.Tensor:
    """Embeddings of each test study's first image."""
    return encode(model, [str(demo.path(study.images[0])) for study in studies])


def encode(model: TinyDualEncoder, paths: list[str]) -> torch.Tensor:
    return model.encode_images(torch.stack([preprocess(Image.open(path)) for path in paths]))


def texts(model: TinyDualEncoder, *prompts: str) -> torch.Tensor:
    return model.encode_texts(model.tokenize(prompts).ids)


def test_the_packaged_files_are_small() -> None:
    sizes = [
        len((resources.files("medvlm_harness.demo") / name).read_bytes()) for name in ("tiny.safetensors", "tiny.json")
    ]
    assert sum(sizes) < 3 * 2**20


def test_it_is_ready_to_use(model: TinyDualEncoder) -> None:
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.logit_scale > 1


def test_only_the_model_needs_torch() -> None:
    code = "import sys, medvlm_harness.demo.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_image_embeddings_do_not_depend_on_the_batch(model: TinyDualEncoder) -> None:
    pixels = torch.randn(64, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    together = model.encode_images(pixels)
    assert together.shape == (64, 64)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(64))
    alone = torch.cat([model.encode_images(one) for one in pixels.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_text_embeddings_do_not_depend_on_the_batch_or_its_padding(
    model: TinyDualEncoder, studies: list[Study]
) -> None:
    reports = [f"{study.findings} {study.impression}" for study in studies[:60]] + ["edema", "", "no", "word " * 500]
    together = model.encode_texts(model.tokenize(reports).ids)
    alone = torch.cat([model.encode_texts(model.tokenize([report]).ids) for report in reports])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.isfinite().all()


def test_long_texts_are_cut_and_flagged(model: TinyDualEncoder) -> None:
    tokens = model.tokenize(["heart " * 95, "heart " * 96, ""])
    assert tokens.ids.shape == (3, 96)
    assert tokens.truncated.tolist() == [False, True, False]
    assert model.tokenize([]).ids.shape[0] == 0


def test_unknown_words_share_hashed_ids_and_case_does_not_matter(model: TinyDualEncoder) -> None:
    known, upper, unknown = (model.tokenize([text]).ids[0, 1].item() for text in ("edema", "EDEMA", "XXXX"))
    assert known == upper
    assert 2 <= unknown < 2 + tiny.HASH_BUCKETS <= known


def test_pictures_of_any_size_and_mode_can_be_preprocessed() -> None:
    for mode, size in (("L", (160, 160)), ("RGB", (300, 200)), ("RGBA", (10, 500))):
        assert preprocess(Image.new(mode, size)).shape == (1, 96, 96)


def test_labels_are_found_well_but_not_perfectly(
    model: TinyDualEncoder, studies: list[Study], frontal: torch.Tensor
) -> None:
    areas = {}
    for name in CHEXPERT_13:
        positive, negative = texts(model, name.lower(), f"no {name.lower()}")
        margin = (frontal @ (positive - negative)).numpy()
        known = [k for k, s in enumerate(studies) if "template" in s.labels and s.labels["template"][name] != -1]
        truth = [studies[k].labels["template"][name] == 1 for k in known]
        if sum(truth) >= 10:
            areas[name] = roc_auc_score(truth, margin[known])
    assert len(areas) == 11
    assert 0.70 < np.mean(list(areas.values())) < 0.95
    assert max(areas.values()) - min(areas.values()) > 0.1


def test_a_picture_finds_its_report_more_often_than_chance(
    model: TinyDualEncoder, studies: list[Study], frontal: torch.Tensor
) -> None:
    reports = texts(model, *(f"{study.findings} {study.impression}" for study in studies))
    similarity = frontal @ reports.T
    rank = (similarity > similarity.diagonal().unsqueeze(1)).sum(dim=1)
    assert 0.15 < (rank < 10).float().mean() < 0.95  # chance is 0.04


def test_frontal_and_lateral_views_are_told_apart(model: TinyDualEncoder, demo: Dataset, studies: list[Study]) -> None:
    images = [image for study in studies for image in study.images]
    views = encode(model, [str(demo.path(image)) for image in images]) @ (
        texts(model, "a frontal chest radiograph", "a lateral chest radiograph").T
    )
    said = ["frontal" if a > b else "lateral" for a, b in views.tolist()]
    assert np.mean([view == image.view for view, image in zip(said, images, strict=True)]) > 0.9


@pytest.mark.parametrize("change", ["dropped", "added"])
def test_weights_that_do_not_fit_are_refused(
    model: TinyDualEncoder, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    weights = model.state_dict()
    if change == "dropped":
        del weights["text_head.bias"]
    else:
        weights["another"] = torch.zeros(1)
    payload = save(weights)
    real = tiny.load_safetensors
    monkeypatch.setattr(tiny, "load_safetensors", lambda _: real(payload))
    with pytest.raises(RuntimeError, match=r"text_head.bias|another"):
        load_tiny()
