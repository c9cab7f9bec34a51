from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from PIL import Image

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.baseline import BaselineBackend
from medvlm_harness.model_backends.nearest_image import image_encoder, nearest_texts
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.requests import Exemplar, ImageRef, PromptWithFloors


def asked(images: Sequence[Sequence[ImageRef]], exemplars: Sequence[Exemplar]) -> list[Instance]:
    return [
        Instance(
            "generate_until", {}, (PromptWithFloors("p", {}, exemplars), {}, {"visual": list(one)}), 0, ("t", k, 1)
        )
        for k, one in enumerate(images)
    ]


def test_the_nearest_image_decides_by_cosine(images: Callable[..., list[ImageRef]]) -> None:
    refs = images(24)
    exemplars = tuple(Exemplar(ref, f"text {k}") for k, ref in enumerate(refs[:14]))
    encoder = TinyBackend(device="cpu")
    vectors = np.stack([e.vector for e in encoder.embed([Instance("embed", {}, (ref,), 0) for ref in refs])])
    by_hand = [f"text {max(range(14), key=lambda k: float(vectors[q] @ vectors[k]))}" for q in range(14, 24)]
    requests = asked([[ref] for ref in refs[14:]], exemplars)
    assert nearest_texts(encoder, requests) == by_hand
    assert nearest_texts(encoder, requests[::-1]) == by_hand[::-1]
    assert len(set(by_hand)) > 1


def test_an_image_finds_itself_and_of_several_the_nearest_pair_decides(images: Callable[..., list[ImageRef]]) -> None:
    refs = images(8)
    exemplars = tuple(Exemplar(ref, f"text {k}") for k, ref in enumerate(refs[:5]))
    encoder = TinyBackend(device="cpu")
    assert nearest_texts(encoder, asked([[ref] for ref in refs[:5]], exemplars)) == [f"text {k}" for k in range(5)]
    assert nearest_texts(encoder, asked([[refs[6], refs[3], refs[7]]], exemplars)) == ["text 3"]


def test_each_image_is_encoded_once_and_the_next_run_finds_it_stored(images: Callable[..., list[ImageRef]]) -> None:
    refs = images(6)
    exemplars = tuple(Exemplar(ref, "x") for ref in refs[:4])
    backend = BaselineBackend(kind="neighbour", encoder="medvlm-tiny", encoder_args="device=cpu")
    backend.generate_until(asked([refs[4:5], refs[5:]], exemplars))
    backend.generate_until(asked([refs[4:5]], exemplars))
    assert backend.describe()["encoder"]["images_encoded"] == 6
    again = BaselineBackend(kind="neighbour", encoder="medvlm-tiny", encoder_args={"device": "cpu"})
    again.generate_until(asked([refs[4:5], refs[5:]], exemplars))
    assert again.describe()["encoder"]["images_recalled"] == 6


def test_what_the_encoder_is_stands_in_the_result() -> None:
    backend = BaselineBackend(kind="neighbour", encoder="medvlm-tiny")
    encoder = TinyBackend()
    assert backend.describe()["weights_sha256"] == encoder.weights_sha256 is not None
    assert backend.card.trained_on == encoder.card.trained_on
    assert backend.describe()["encoder"]["card"]["name"] == encoder.card.name
    assert BaselineBackend().card.trained_on == () and BaselineBackend().describe()["encoder"] is None


def test_options_may_be_one_text(shared: Path) -> None:
    folder = shared / "models" / "iu-clip-tiny"
    encoder: Any = image_encoder("medvlm-clip", f"pretrained={folder};device=cpu; batch_size=4")
    assert (encoder.pretrained, encoder.batch_size) == (str(folder), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "neighbour"}, "Expected encoder=NAME"),
        ({"kind": "copy", "encoder": "medvlm-tiny"}, "Expected encoder=NAME"),
        ({"kind": "constant", "encoder_args": "x=1"}, "Expected encoder=NAME"),
        ({"kind": "neighbour", "encoder": "medvlm-tinny"}, r"'medvlm-tinny'\. Did you mean medvlm-tiny"),
        ({"kind": "neighbour", "encoder": "medvlm-lm"}, "medvlm-lm does not"),
        ({"kind": "neighbour", "encoder": "medvlm-baseline"}, "medvlm-baseline does not"),
        ({"kind": "neighbour", "encoder": "medvlm-tiny", "encoder_args": "devise=cpu"}, "Did you mean device"),
    ],
)
def test_a_wrong_encoder_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        BaselineBackend(**arguments)
    assert "\n" not in str(error.value)


def test_a_task_without_exemplars_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(path)
    encoder = TinyBackend(device="cpu")
    for requests in (
        asked([[ImageRef("a" * 64, path)]], ()),
        [Instance("generate_until", {}, ("p", {}), 0, ("t", 0, 1))],
    ):
        with pytest.raises(UserError, match="Task t hands over no images with texts"):
            nearest_texts(encoder, requests)
