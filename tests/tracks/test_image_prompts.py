from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.model import hash_args
from lm_eval.utils import hash_dict_images
from PIL import Image as Pillow

from medvlm_harness.data.images import UnreadableImage, inspect_image
from medvlm_harness.data.records import Image, Study
from medvlm_harness.errors import UserError
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks.image_prompts import OpenedImages
from medvlm_harness.tracks.report_generation import ReportGeneration

PROMPT = "{images}\nIndication: {indication}\nFindings:"


def make(**config: Any) -> ReportGeneration:
    metadata = {"version": 1, **config.pop("metadata", {})}
    return ReportGeneration({"task": "t", "dataset": "none", "prompt": PROMPT, **config, "metadata": metadata})


@pytest.fixture
def refs(tmp_path: Path) -> list[ImageRef]:
    made = []
    for k in range(3):
        path = tmp_path / f"{k}.png"
        Pillow.fromarray(np.full((4, 5), 40 * k, dtype=np.uint8)).save(path)
        made.append(ImageRef(inspect_image(path).sha256, path))
    return made


STUDY = Study(
    "s",
    "p",
    (
        Image("c_lateral.png", "3" * 64, "lateral"),
        Image("b_frontal.png", "2" * 64, "frontal"),
        Image("a_unknown.png", "4" * 64, None),
        Image("a_frontal.png", "1" * 64, "frontal"),
    ),
    indication=" Cough. ",
    findings="Clear.",
)


def test_the_first_frontal_image_is_shown_or_all_with_the_frontal_ones_first() -> None:
    assert [image.file for image in make().chosen_images(STUDY)] == ["a_frontal.png"]
    every = make(images="all").chosen_images(STUDY)
    assert [image.file for image in every] == ["a_frontal.png", "b_frontal.png", "a_unknown.png", "c_lateral.png"]
    assert make(images="frontal", metadata={"images": "all"}).chosen_images(STUDY) == every
    assert make().chosen_images(Study("s", "p", STUDY.images[:1])) == []


def test_the_prompt_has_a_mark_for_each_image_and_says_what_is_not_stated() -> None:
    assert make().prompt_for(STUDY) == "<image>\nIndication: Cough.\nFindings:"
    assert make(images="all").prompt_for(STUDY).count("<image>") == 4
    assert make().prompt_for(Study("s", "p", STUDY.images)) == "<image>\nIndication: not stated\nFindings:"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"images": "lateral"}, "expected images to be frontal or all, but got 'lateral'"),
        ({"metadata": {"images": "al"}}, "Did you mean all"),
        ({"prompt": "Findings:"}, r"the prompt to hold \{images\}"),
        ({"prompt": "{images} {findings}"}, r"asks for \{findings\}"),  # that would be the answer
        ({"prompt": "{images} {impression}"}, r"asks for \{impression\}"),
    ],
)
def test_a_wrong_declaration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**config)


def test_our_models_get_references_and_others_pictures(refs: list[ImageRef]) -> None:
    task = make()
    task.prepare_for(type("Ours", (), {"CAPABILITIES": frozenset()})())
    assert task.visual(refs) == {"visual": refs} and type(task.visual(refs)["visual"]) is list
    task.prepare_for(object())
    pictures = list(task.visual(refs)["visual"])
    assert all(isinstance(one, Pillow.Image) and one.mode == "RGB" for one in pictures)
    assert [one.getpixel((0, 0)) for one in pictures] == [(k, k, k) for k in (0, 40, 80)]


def test_pictures_are_opened_when_taken_and_kept_by_nobody(refs: list[ImageRef]) -> None:
    opened = OpenedImages(refs)
    assert len(opened) == 3
    assert opened[1] is not opened[1]
    assert [one.getpixel((0, 0))[0] for one in opened[1:]] == [40, 80]
    assert len(pickle.dumps(opened)) < 1000
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301  # our own
    assert [one.tobytes() for one in again] == [one.tobytes() for one in opened]
    refs[0].path.write_bytes(b"other")
    with pytest.raises(UnreadableImage, match="changed"):
        next(iter(opened))


def test_lm_evals_cache_and_samples_hold_hashes_of_pictures(refs: list[ImageRef]) -> None:
    arguments = ("prompt", {"until": []}, {"visual": OpenedImages(refs)})
    assert hash_args("generate_until", arguments) == hash_args("generate_until", arguments)
    swapped = ("prompt", {"until": []}, {"visual": OpenedImages(refs[::-1])})
    assert hash_args("generate_until", arguments) != hash_args("generate_until", swapped)
    logged = json.dumps(hash_dict_images({"arguments": [arguments]}))
    assert str(refs[0].path) not in logged and len(logged) < 400
