from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL.Image import Image

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import ModelCard, Prompts
from medvlm_harness.model_backends.class_prompts import ClassPrompts, PromptList, choose_prompts
from medvlm_harness.model_backends.dual_encoder import DualEncoder, EncodedTexts
from medvlm_harness.model_backends.medclip import MedClipBackend
from medvlm_harness.model_backends.medfilip import MedFilipBackend
from medvlm_harness.requests import ImageRef, Label, LabelSet

LISTED = PromptList("constants.py of nobody", "PROMPTS", "combinations", {"pleural effusion": "effusion"})
PYTHON = """
import os
open({executed!r}, "w").write("executed")
OTHER = os.sep
PROMPTS = {{
    "Edema": {{"extent": ["", "mild"], "finding": ["edema", "wet lungs", "edema"], "place": [""]}},
    "Effusion": ["fluid at the base", "a blunt angle"],
    "Fracture": "A step in a bone.",
}}
"""
LABELS = LabelSet.from_config("findings", ["Edema", "Pleural Effusion", "Fracture", "Pneumonia"])
SCALE = 5.0


def published(path: Path, listed: PromptList = LISTED) -> ClassPrompts:
    found = choose_prompts("published", str(path), model="m", templates=None, listed=listed)
    assert found is not None
    return found


@pytest.fixture
def python_file(tmp_path: Path) -> Path:
    path = tmp_path / "constants.py"
    path.write_text(PYTHON.format(executed=str(tmp_path / "executed")), encoding="utf-8")
    return path


def test_a_python_file_is_read_and_never_run(python_file: Path) -> None:
    found = published(python_file)
    assert not (python_file.parent / "executed").exists()
    assert found.sha256 == file_sha256(python_file)
    assert found.of(Label("Fracture", ("x",))) == ("Fracture. A step in a bone.",)
    assert found.of(Label("Pleural Effusion", ("x",))) == ("fluid at the base", "a blunt angle")
    assert found.of(Label("pleural_effusion", ("x",))) == ("fluid at the base", "a blunt angle")
    assert found.of(Label("Pneumonia", ("x",))) == ()
    exec(compile(python_file.read_text(), "constants", "exec"), {})  # noqa: S102  # negative control: it is live
    assert (python_file.parent / "executed").exists()


def test_groups_are_combined_as_published(python_file: Path) -> None:
    # The publication's loops, written out: every word of a group, empty ones and repeated ones included.
    expected = [f"{a} {b} {c}" for a in ("", "mild") for b in ("edema", "wet lungs", "edema") for c in ("",)]
    assert published(python_file).of(Label("edema", ("x",))) == tuple(expected)
    assert expected[0] == " edema "


def test_json_says_the_same(python_file: Path, tmp_path: Path) -> None:
    values = {
        "Edema": {"a": ["", "mild"], "b": ["edema", "wet lungs", "edema"], "c": [""]},
        "Fracture": "A step in a bone.",
    }
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    ours, theirs = published(path), published(python_file)
    assert {name: theirs.phrases[name] for name in ours.phrases} == ours.phrases


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", "X = {}", "expected an assignment to PROMPTS at its top level; it has: X"),
        ("a.py", "def f():\n    PROMPTS = {}", "it has: none"),
        ("a.py", "PROMPTS = dict(a=1)", "no plain dictionary"),
        ("a.py", "PROMPTS = {", "expected JSON .* or Python with PROMPTS"),
        ("a.py", "PROMPTS = {}", "expected classes with their prompts"),
        ("a.py", "PROMPTS = {'Edema': 3}", "'Edema' to have a description"),
        ("a.py", "PROMPTS = {'Edema': {'a': 'b'}}", "'Edema' to have a description"),
        ("a.py", "PROMPTS = {'Edema': []}", "'Edema' to have a description"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "expected classes with their prompts, but got list"),
    ],
)
def test_a_file_that_is_no_list_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        published(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"your copy of constants\.py of nobody"):
        published(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("choice", "file", "listed", "message"),
    [
        ("both", None, LISTED, "task, published or ours"),
        ("task", "f.py", LISTED, "goes with prompts=published"),
        ("ours", "f.py", LISTED, "goes with prompts=published"),
        ("published", "f.py", None, "published without a list"),
        ("published", None, LISTED, "prompts_file=FILE, or use prompts=ours"),
        ("published", None, None, "no published prompts"),
        ("ours", None, None, "no list of class prompts"),
    ],
)
def test_a_choice_that_a_model_lacks_is_refused(choice: Any, file: str | None, listed: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_prompts(choice, file, model="m", templates=None, listed=listed)


def test_short_templates_need_no_file() -> None:
    assert choose_prompts("published", None, model="m", templates=Prompts(("{}",)), listed=None) is None


@pytest.mark.parametrize("backend", [MedClipBackend, MedFilipBackend])
def test_our_wording_covers_every_chexpert_label(backend: type[DualEncoder]) -> None:
    found = choose_prompts("ours", None, model="m", templates=None, listed=backend.PROMPT_LIST)
    assert found is not None
    labels = [Label(name, ("x",)) for name in CHEXPERT_14 if name != "No Finding"]
    assert all(found.of(label) for label in labels)
    assert len({found.of(label) for label in labels}) == 13


# --- what they do to scores


class Hashed(DualEncoder):
    """Vectors by the letters of a text and the mean of an image's rows."""

    card: ModelCard = ModelCard(name="hashed", family="dual encoder")
    PROMPT_LIST = LISTED

    def load(self) -> None:
        self.logit_scale = SCALE

    def preprocess(self, image: Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("L").resize((1, 26)), dtype=np.float32))[None] - 100

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        letters = "abcdefghijklmnopqrstuvwxyz"
        counts = torch.tensor([[float(text.lower().count(letter)) for letter in letters] for text in texts])
        return EncodedTexts(counts, [False] * len(texts))


def cosine_with_mean(image: np.ndarray, vectors: list[np.ndarray]) -> float:
    mean = np.mean([v / np.linalg.norm(v) for v in vectors], axis=0)
    return float(image @ mean / np.linalg.norm(image) / np.linalg.norm(mean))


def test_listed_prompts_are_scored_alone_and_lacking_labels_by_the_tasks_words(
    python_file: Path,
    images: Callable[..., list[ImageRef]],
    classify_requests: Callable[..., list[Instance]],
    embed_requests: Callable[..., list[Instance]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Hashed(pretrained="x", device="cpu", prompts="published", prompts_file=str(python_file))
    refs = images(3)
    scores = model.classify(classify_requests(refs, LABELS))
    image = model.embed(embed_requests(refs))[1].vector
    for k, texts in enumerate(
        [
            [" edema ", " wet lungs ", " edema ", "mild edema ", "mild wet lungs ", "mild edema "],
            ["fluid at the base", "a blunt angle"],
            ["Fracture. A step in a bone."],
            ["pneumonia"],  # the task's
        ]
    ):
        expected = cosine_with_mean(image, list(model.encode_texts(texts).vectors.numpy()))
        assert scores[1].margin[k] == pytest.approx(expected, abs=1e-6)
        assert scores[1].probability[k] == pytest.approx(1 / (1 + np.exp(-SCALE * expected)), abs=1e-6)
    described = model.describe()
    assert described["prompts"] == "published"
    assert described["prompts_sha256"] == file_sha256(python_file)
    assert described["prompts_lacking"] == {"findings": ["Pneumonia"]}
    assert described["probability_scale"] == "sigmoid"
    assert "lacks Pneumonia of findings" in caplog.text
    # Negative control: with the task's words it is the difference of a pair.
    task = Hashed(pretrained="x", device="cpu")
    assert abs(task.classify(classify_requests(refs, LABELS))[1].margin[0] - scores[1].margin[0]) > 1e-3
    assert task.describe()["prompts_sha256"] is None


def test_options_are_asked_by_the_list_too(
    python_file: Path,
    images: Callable[..., list[ImageRef]],
    classify_requests: Callable[..., list[Instance]],
    embed_requests: Callable[..., list[Instance]],
) -> None:
    options = LabelSet.from_config(
        "which", {"kind": "multiclass", "options": {"Fracture": "broken", "Edema": "wet", "other": "else"}}
    )
    model = Hashed(pretrained="x", device="cpu", prompts="published", prompts_file=str(python_file))
    refs = images(2)
    (_, scores) = model.classify(classify_requests(refs, options))
    image = model.embed(embed_requests(refs))[1].vector
    asked = [["Fracture. A step in a bone."], list(published(python_file).phrases["edema"]), ["else"]]
    cosines = [cosine_with_mean(image, list(model.encode_texts(texts).vectors.numpy())) for texts in asked]
    softmax = np.exp(SCALE * np.array(cosines)) / np.exp(SCALE * np.array(cosines)).sum()
    assert np.allclose(scores.probability, softmax, rtol=0, atol=1e-6)
    assert model.describe()["prompts_lacking"] == {"which": ["other"]}
