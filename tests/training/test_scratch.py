"""Small models from scratch, one per architecture: they learn, load where they are evaluated, and repeat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file

from medvlm_harness.data.records import Study, read_dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.text_encoder import TextEncoderBackend
from medvlm_harness.requests import TextRef
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.methods import METHODS, Schedule, Trained, find_method
from medvlm_harness.training.summaries import summaries
from medvlm_harness.training.vocabulary import train_vocabulary, write_vocabulary

KINDS = ("seq2seq", "causal-lm", "masked-lm")
PAIRS = (
    ("The heart is enlarged.", "Cardiomegaly."),
    ("The lungs are clear.", "No acute disease."),
    ("There is fluid in the left pleural space.", "Pleural effusion."),
    ("Air is seen beside the right lung.", "Pneumothorax."),
)
SMALL = {"width": 32, "heads": 2, "feedforward": 64, "dropout": 0.0, "learning_rate": 1e-2}

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> TrainingData:
    splits = ["train"] * 24 + ["validation"] * 8 + ["test"] * 4
    studies = [
        Study(f"s{k:02}", f"p{k}", findings=PAIRS[k % 4][0], impression=PAIRS[k % 4][1], split=split)
        for k, split in enumerate(splits)
    ]
    return TrainingData.of(read_dataset(write_set(tmp_path_factory.mktemp("pairs") / "set", studies)))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory, data: TrainingData) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary") / "v"
    write_vocabulary(train_vocabulary(data, 320), data, folder)
    return folder


def train(kind: str, data: TrainingData, vocabulary: Path, output: Path, *, steps: int, **options: Any) -> Trained:
    schedule = Schedule(steps=steps, batch_size=8, eval_steps=max(1, steps // 2), seed=options.pop("seed", 0))
    method = find_method(kind)(
        tokenizer=str(vocabulary), device="cpu", schedule=schedule, **{**SMALL, "layers": 1, **options}
    )
    return finetune(method, data, output)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, data: TrainingData, vocabulary: Path
) -> dict[str, tuple[Path, Trained]]:
    """A model of each kind that was trained for a second."""
    folder = tmp_path_factory.mktemp("made")
    steps = {"seq2seq": 60, "causal-lm": 120, "masked-lm": 160}
    return {kind: (folder / kind, train(kind, data, vocabulary, folder / kind, steps=steps[kind])) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(made: dict[str, tuple[Path, Trained]], kind: str) -> None:
    _, trained = made[kind]
    assert trained.validation_loss < 0.5 * trained.first_validation_loss
    assert trained.studies == {"train": 24, "validation": 8}
    assert 0 < trained.counts["parameters_without_embeddings"] < trained.parameters
    assert trained.counts["target_tokens_seen"] > 0


@pytest.mark.parametrize("kind", ["seq2seq", "causal-lm"])
def test_one_that_writes_has_bits_per_character_and_writes(
    made: dict[str, tuple[Path, Trained]], data: TrainingData, kind: str
) -> None:
    folder, trained = made[kind]
    _, validation = summaries(data)
    backend = LanguageModelBackend(pretrained=str(folder), device="cpu", store="off")
    pairs = [(one.prompt, f" {one.impression}") for one in validation]
    scores = backend.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    characters = sum(len(one.impression) for one in validation)
    # The backend scores the texts, training their ends as well: what it costs to say that they end is the rest.
    bits = -sum(score for score, _ in scores) / np.log(2) / characters
    assert bits <= trained.validation["bits_per_character"].value < bits + 0.5
    assert trained.validation["rougeL"].value > 0.9


def test_a_prompt_of_the_decoder_does_not_say_that_nothing_follows(
    made: dict[str, tuple[Path, Trained]],
) -> None:
    backend = LanguageModelBackend(pretrained=str(made["causal-lm"][0]), device="cpu", store="off")
    prompt = backend.encode_prompt(("The heart is enlarged. Impression:",), 64)
    end = backend.tokenizer.eos_token_id
    assert prompt.ids[0] == end and end not in prompt.ids[1:]


def test_the_encoder_finds_the_impression_that_belongs_to_the_findings(
    made: dict[str, tuple[Path, Trained]], data: TrainingData
) -> None:
    backend = TextEncoderBackend(pretrained=str(made["masked-lm"][0]), device="cpu", store="off")
    assert backend.has_head
    _, validation = summaries(data)
    options = [impression for _, impression in PAIRS]
    asked = [Instance("loglikelihood", {}, (one.prompt, f" {option}"), 0) for one in validation for option in options]
    scores = np.array([score for score, _ in backend.loglikelihood(asked)]).reshape(len(validation), len(options))
    # Per character: options of more tokens cost more.
    best = (scores / [len(option) for option in options]).argmax(axis=1)
    assert np.mean([options[k] == one.impression for k, one in zip(best, validation, strict=True)]) > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them_have_vectors_of_texts(made: dict[str, tuple[Path, Trained]], kind: str) -> None:
    backend_class = TextEncoderBackend if kind == "masked-lm" else LanguageModelBackend
    backend = backend_class(pretrained=str(made[kind][0]), device="cpu", store="off")
    answers = backend.embed([Instance("embed", {}, (TextRef(findings),), 0) for findings, _ in PAIRS])
    vectors = np.stack([answer.vector for answer in answers])
    assert np.abs(vectors @ vectors.T - np.eye(4)).max() < 1 and vectors.shape[1] == SMALL["width"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights_and_another_others(
    data: TrainingData, vocabulary: Path, tmp_path: Path, kind: str
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name))  # what was drawn before does not matter
        train(kind, data, vocabulary, tmp_path / name, steps=2, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, "width to be a multiple of heads, but got 30 and 4"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), but got 1.0"),
        ({"layers": 0}, "layers to be more than 0, but got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    data: TrainingData, vocabulary: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train("seq2seq", data, vocabulary, tmp_path / "out", steps=1, **options)


def test_every_kind_is_a_method() -> None:
    assert set(KINDS) <= METHODS.keys()
