"""Vectors of texts by language models: the same rule for every architecture, against transformers by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModel, AutoTokenizer

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.requests import ImageRef, TextRef

TEXTS = (
    "the lungs are clear",
    "a small left pleural effusion with adjacent atelectasis",
    "no pneumothorax",
    "heart",
    "stable since the prior study, no acute cardiopulmonary abnormality",
)


def vectors(folder: Path, texts: Sequence[str] = TEXTS, **options: Any) -> np.ndarray:
    backend = LanguageModelBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})
    answers = backend.embed([Instance("embed", {}, (TextRef(text),), 0) for text in texts])
    return np.stack([answer.vector for answer in answers])


@torch.inference_mode()
def by_hand(folder: Path, text: str, pooling: str) -> np.ndarray:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    part = model.encoder if model.config.is_encoder_decoder else model
    hidden = part(input_ids=ids).last_hidden_state[0]
    own = [k for k, token in enumerate(ids[0].tolist()) if token not in tokenizer.all_special_ids]
    vector = hidden[own].mean(dim=0) if pooling == "mean" else hidden[own[-1]]
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize(("kind", "pooling"), [("llama", "mean"), ("llama", "last"), ("gpt2", "mean"), ("t5", "mean")])
def test_as_transformers_by_hand_at_every_batch_size(
    tiny_model: Callable[[str], Path], kind: str, pooling: str
) -> None:
    folder = tiny_model(kind)
    expected = np.stack([by_hand(folder, text, pooling) for text in TEXTS])
    for size in (1, 2, 5):
        found = vectors(folder, pooling=pooling, batch_size=size)
        assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - np.roll(expected, 1, axis=0)).max() > 1e-3  # they are not all alike


def test_a_long_text_loses_its_end_and_says_so(tiny_model: Callable[[str], Path]) -> None:
    backend = LanguageModelBackend(pretrained=str(tiny_model("llama")), device="cpu", store="off", max_length=8)
    long, short = backend.embed([Instance("embed", {}, (TextRef(text),), 0) for text in (TEXTS[1], "ab")])
    assert long.truncated and short.truncated is False


def test_vectors_come_from_the_store_apart_for_each_pooling(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder, store = tiny_model("llama"), str(tmp_path / "s.sqlite")
    first = vectors(folder, store=store)
    again = LanguageModelBackend(pretrained=str(folder), device="cpu", store=store)
    answers = again.embed([Instance("embed", {}, (TextRef(text),), 0) for text in TEXTS])
    assert again.texts_recalled == len(TEXTS) and not again.loaded
    assert (np.stack([answer.vector for answer in answers]) == first).all()
    assert again.describe()["pooling"] == "mean"
    assert np.abs(vectors(folder, store=store, pooling="last") - first).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("t5", {"pooling": "last"}, "pooling=last is for causal models"),
        ("llama", {"pooling": "first"}, "Expected pooling to be mean or last, but got 'first'"),
    ],
)
def test_other_poolings_are_refused(
    tiny_model: Callable[[str], Path], kind: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LanguageModelBackend(pretrained=str(tiny_model(kind)), device="cpu", store="off", **options)


def test_what_has_no_vector_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokens"):
        vectors(tiny_model("llama"), [""])
    with pytest.raises(UserError, match="takes text alone"):
        backend = LanguageModelBackend(pretrained=str(tiny_model("llama")), device="cpu", store="off")
        backend.embed([Instance("embed", {}, (ImageRef("00", tmp_path),), 0)])
