from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE, ModelCard, Prompts, Source, card_beside

CARD = ModelCard(name="some-clip", family="dual encoder", licence="mit", source=Source("org/name"))


def beside(folder: Path, text: str) -> ModelCard:
    (folder / CARD_FILE).write_text(text)
    (folder / "weights.bin").touch()
    return card_beside(folder / "weights.bin", CARD)


def test_without_a_file_the_card_stays_as_it_is(tmp_path: Path) -> None:
    assert card_beside(tmp_path / "weights.bin", CARD) is CARD


def test_what_the_file_says_replaces_and_the_rest_stays(tmp_path: Path) -> None:
    card = beside(tmp_path, "name: mine\ntrained_on: [IU-CXR, R2Gen train split]\nparameters: 7\nreference: a paper\n")
    assert (card.name, card.parameters, card.reference) == ("mine", 7, "a paper")
    assert card.trained_on == ("IU-CXR", "R2Gen train split")
    assert (card.licence, card.source) == (CARD.licence, CARD.source)
    assert card_beside(tmp_path, CARD) == card  # the folder as well as the file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trained_on: IU-CXR", ("IU-CXR",)),
        ("trained_on: {dataset: iu_cxr, splits: [train]}", ({"dataset": "iu_cxr", "splits": ["train"]},)),
        ("trained_on: []", ()),
        ("trained_on: null", None),
    ],
)
def test_training_data_may_be_one_name_or_many(tmp_path: Path, text: str, expected: Any) -> None:
    assert beside(tmp_path, text).trained_on == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trained_om: [IU-CXR]", r"unknown key 'trained_om'.* Did you mean trained_on\?"),
        ("family: baseline", "unknown key 'family'"),
        ("probability_scale: given", "unknown key 'probability_scale'"),
        ("- a list", "expected a mapping"),
        ("", "expected a mapping, but got None"),
        ("name: [", "not valid YAML"),
        ("name: ..", "expected name to be letters"),
        ("name: a/b", "expected name to be letters"),
        ("trained_on: 5", "expected trained_on to be a list"),
        ("trained_on: [5]", "expected trained_on to be a list"),
        ("licence: 2020-01-01", "expected licence to be a text"),
        ("parameters: many", "expected parameters to be a number"),
    ],
)
def test_a_file_that_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        beside(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / CARD_FILE))
    assert "\n" not in str(error.value)


def test_a_card_is_plain_json() -> None:
    card = ModelCard(
        name="a", family="generative", source=Source("o/n", "1" * 40, {"f": "h"}), prompts=Prompts(("{}",), ("no {}",))
    )
    assert json.loads(json.dumps(card.to_dict(), allow_nan=False))["source"]["revision"] == "1" * 40


def test_a_card_says_how_it_was_trained(tmp_path: Path) -> None:
    card = beside(tmp_path, "training: {method: projector, steps: 7}\n")
    assert card.to_dict()["training"] == {"method": "projector", "steps": 7}
    with pytest.raises(UserError, match="expected training to be a mapping"):
        beside(tmp_path, "training: yesterday\n")
