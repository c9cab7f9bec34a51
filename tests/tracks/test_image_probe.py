"""What the probe of images has of its own; what it shares with that of texts is tested in test_text_probe.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from sklearn.metrics import roc_auc_score

from medvlm_harness.data.records import Image, Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.requests import Embedding, ImageRef
from medvlm_harness.results.plan import distinct_inputs
from medvlm_harness.tracks.image_probe import ImageProbe
from medvlm_harness.training.linear_probe import linear_probe

RowsOf = Callable[..., list[Any]]
FakeImage = Callable[..., Image]
D = 6


def task(folder: Path, **config: Any) -> ImageProbe:
    metadata = {"data_dir": str(folder), **config.pop("metadata", {})}
    return ImageProbe(
        {"task": "p", "dataset": "synthetic", "labels": ["Cardiomegaly", "Edema"], **config, "metadata": metadata}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: FakeImage) -> Path:
    """Every third heart is large, and its frontal image says so; oedema is noise. Some have no frontal image."""
    rng = np.random.default_rng(6)
    studies = []
    for k in range(200):
        frontal = [f"{'large' if k % 3 == 0 else 'normal'}-{k:03}-{end}.png" for end in "ba"]
        images = [fake_image(f"a-side-{k}.png", "lateral")]
        images += [fake_image(name) for name in frontal if k % 20 != 7]
        labels = {"rules": {"Cardiomegaly": int(k % 3 == 0), "Edema": int(rng.choice([1, 0, -1]))}}
        split = "train" if k < 120 else "test"
        studies.append(Study(f"s{k:03}", f"p{k}", images=tuple(images), labels=labels, split=split))
    return write_set(tmp_path_factory.mktemp("probe") / "set", studies)


def vector(image: ImageRef) -> np.ndarray:
    raw = np.random.default_rng(int(image[:8], 16)).standard_normal(D).astype(np.float32)
    raw[2] += 2 * image.path.name.startswith("large")
    return raw / np.linalg.norm(raw)


def encoder(requests: Sequence[Instance]) -> list[Embedding]:
    return [Embedding(vector(request.arguments[0])) for request in requests]


def first_frontal(folder: Path, split: str) -> dict[str, Image]:
    found = {}
    for study in read_dataset(folder).studies:
        names = sorted(image.file for image in study.images if image.view == "frontal")
        if study.split == split and names:
            found[study.study_id] = next(image for image in study.images if image.file == names[0])
    return found


def test_the_first_frontal_image_of_each_study_is_learnt_from_and_scored(rows_of: RowsOf, folder: Path) -> None:
    one = task(folder)
    rows = rows_of(one, encoder)
    sides = first_frontal(folder, "train"), first_frontal(folder, "test")
    assert {row.study_id: row.image for row in rows} == {k: image.file for k, image in sides[1].items()}
    assert all(image.file.endswith("-a.png") for image in sides[1].values())
    images, texts = distinct_inputs(task(folder))
    assert not texts and set(images) == {image.sha256 for side in sides for image in side.values()}
    data = read_dataset(folder)
    x, x_test = ([vector(ImageRef(i.sha256, data.path(i))) for i in side.values()] for side in sides)
    large, large_test = ([int(i.file.startswith("large")) for i in side.values()] for side in sides)
    probe = linear_probe(x, large, list(sides[0]), x_test, list(sides[1]))
    estimates = one.estimates(rows)
    areas = [roc_auc_score(large_test, margin) for margin in probe.margin]
    assert estimates["auroc_cardiomegaly"].value == pytest.approx(np.mean(areas), abs=1e-9)
    assert estimates["auroc_cardiomegaly"].value > 0.85
    # Negative control: noise is not learnt.
    assert estimates["auroc_edema"].ci95[0] < 0.5 < estimates["auroc_edema"].ci95[1]
    assert one.details()["counts"] == {
        "studies": len(sides[1]),
        "studies_without_frontal_image": 80 - len(sides[1]),
        "training_studies": len(sides[0]),
        "validation_studies_to_fit_on": 0,
    }
    records = list(one.score_records(one.rows))
    assert {record["image"] for record in records} == {image.file for image in sides[1].values()}


@pytest.mark.parametrize(
    ("views", "first", "without"),
    [(["lateral"], "a-side-", 0), (["lateral", "frontal"], "a-side-", 0), (["frontal", "lateral"], "normal-121-a", 0)],
)
def test_views_are_taken_in_the_order_they_are_named(folder: Path, views: list[str], first: str, without: int) -> None:
    one = task(folder, views=views)
    files = {doc["study_id"]: doc["file"] for doc in one.test_docs()}
    assert files["s121"].startswith(first) and files["s127"] == "a-side-127.png"
    assert one.counts()[f"studies_without_{'_or_'.join(views)}_image"] == without


def test_several_processes_give_the_estimates_of_one(rows_of: RowsOf, folder: Path) -> None:
    one = task(folder)
    alone = one.estimates(rows_of(one, encoder))
    gathered: list[Any] = []
    for rank in range(2):
        rows = rows_of(task(folder), encoder, rank=rank, world_size=2)
        gathered += pickle.loads(pickle.dumps(rows))  # noqa: S301  # as processes send them
    found = task(folder).estimates(gathered)
    assert {k: v.to_dict() for k, v in found.items()} == {k: v.to_dict() for k, v in alone.items()}


@pytest.mark.parametrize(("kind", "low", "high"), [("prior", 0.5, 0.5), ("oracle", 0.99, 1.0)])
def test_baselines_are_floor_and_ceiling(rows_of: RowsOf, folder: Path, kind: Any, low: float, high: float) -> None:
    one = task(folder, labels=["Cardiomegaly"])
    estimates = one.estimates(rows_of(one, BaselineBackend(kind=kind).embed))
    assert low <= estimates["auroc"].value <= high
    assert estimates["auroc"].extra["floors"] == {"constant": 0.5, "repeats": 0.5}


def test_the_floor_repeats_what_training_images_of_the_same_bytes_have(
    rows_of: RowsOf, tmp_path: Path, write_set: Callable[..., Path], fake_image: FakeImage
) -> None:
    """Half of the test images stand in the train split too, with their labels; of the others nothing is known."""
    studies = []
    for k in range(80):
        image = fake_image(f"{k}.png" if k >= 40 and k % 2 else f"{k % 40}.png")
        labels = {"rules": {"Edema": int(k % 40 < 20)}}
        studies.append(Study(f"s{k}", f"p{k}", images=(image,), labels=labels, split="train" if k < 40 else "test"))
    one = task(write_set(tmp_path / "set", studies), labels=["Edema"])
    estimate = one.estimates(rows_of(one, encoder))["auroc_edema"]
    truth, guess = [1] * 20 + [0] * 20, ([1, 0] * 10) + ([-1, 0] * 10)
    assert estimate.floor == estimate.extra["floors"]["repeats"] == pytest.approx(roc_auc_score(truth, guess))


def test_without_a_frontal_image_to_learn_from_every_metric_is_undefined(
    rows_of: RowsOf, tmp_path: Path, write_set: Callable[..., Path], fake_image: FakeImage
) -> None:
    views = {"train": "lateral", "test": "frontal"}
    studies = [
        Study(f"{s}{k}", f"{s}{k}", images=(fake_image(f"{s}{k}.png", v),), labels={"rules": {"Edema": k % 2}}, split=s)
        for s, v in views.items()
        for k in range(6)
    ]
    one = task(write_set(tmp_path / "set", studies), labels=["Edema"])
    reasons = {str(estimate.reason) for estimate in one.estimates(rows_of(one, encoder)).values()}
    assert reasons == {"no study in split train has a frontal image to learn from"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metadata": {"split": "train"}}, "learns from split train"),
        ({"labels": {"kind": "multiclass", "options": {"a": "x", "b": "y"}}}, "expected independent labels"),
        ({"target": "view"}, "unknown key 'target'"),
        ({"views": "frontal"}, "expected views to be a list"),
    ],
)
def test_a_wrong_declaration_is_refused_before_any_data(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(tmp_path / "nowhere", **config)


def test_nothing_to_score_names_the_views_that_there_are(
    tmp_path: Path, write_set: Callable[..., Path], fake_image: FakeImage
) -> None:
    study = Study("s", "p", images=(fake_image("a.png", "lateral"),), labels={"rules": {"Edema": 1}}, split="test")
    with pytest.raises(UserError, match="images of these views: lateral 1"):
        task(write_set(tmp_path / "set", [study]), labels=["Edema"]).test_docs()
