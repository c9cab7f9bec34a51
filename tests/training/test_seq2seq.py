"""What is seq2seq's own; what it shares with the other methods from scratch is in test_scratch.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from safetensors.torch import load_file

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.tokenizer_files import load_tokenizer
from medvlm_harness.tracks.summarization import Summarization
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.finetune import finetune
from medvlm_harness.training.methods import Schedule, Trained, build_method
from medvlm_harness.training.scratch import ScratchTraining
from medvlm_harness.training.seq2seq import Seq2SeqMethod
from medvlm_harness.training.summaries import _task, summaries
from medvlm_harness.training.vocabulary import train_vocabulary, write_vocabulary

torch.set_num_threads(1)
SMALL = {"width": 16, "layers": 1, "heads": 2, "feedforward": 16}
TRAIN, VALIDATION = 20, 5


@pytest.fixture(scope="module")
def data(demo: Dataset) -> TrainingData:
    """A few studies of the demo set."""
    whole = TrainingData.of(demo)
    both = [[s for s in split if s.findings and s.impression] for split in (whole.train, whole.validation)]
    return replace(whole, train=tuple(both[0][:TRAIN]), validation=tuple(both[1][:VALIDATION]))


@pytest.fixture(scope="module")
def vocabulary(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary") / "demo_vocabulary"
    write_vocabulary(train_vocabulary(data, 300, lowercase=True), data, folder)
    return folder


def method_of(vocabulary: Path, **options: Any) -> Seq2SeqMethod:
    schedule = Schedule(steps=6, batch_size=8)  # two epochs
    return Seq2SeqMethod(tokenizer=str(vocabulary), device="cpu", schedule=schedule, **{**SMALL, **options})


def training_of(data: TrainingData, vocabulary: Path, **options: Any) -> ScratchTraining:
    method, loaded = method_of(vocabulary, **options), load_tokenizer(str(vocabulary))
    method.ready(loaded)
    return method.begin(loaded, *summaries(data))


@pytest.fixture(scope="module")
def learnt(data: TrainingData, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("seq2seq") / "model"
    return folder, finetune(method_of(vocabulary), data, folder)


def test_the_card_says_what_can_be_compared(learnt: tuple[Path, Trained], data: TrainingData) -> None:
    folder, trained = learnt
    card = yaml.safe_load((folder / "medvlm_card.yaml").read_text())
    assert card["trained_on"] == [data.trained_on()]
    assert card["training"]["base_models"]["tokenizer"]["name"] == "demo_vocabulary"
    assert "demo_vocabulary" not in json.dumps(card["training"]["options"])  # no path of this machine
    bits = card["training"]["validation"]["bits_per_character"]
    assert bits["ci95"][0] < bits["value"] < bits["ci95"][1]
    weights = load_file(folder / "model.safetensors")
    assert trained.parameters == sum(tensor.numel() for tensor in weights.values())
    embeddings = weights["shared.weight"].numel()
    assert card["training"]["counts"]["parameters_without_embeddings"] == trained.parameters - embeddings


def test_the_backend_that_evaluates_it_finds_the_same_likelihoods(
    learnt: tuple[Path, Trained], data: TrainingData
) -> None:
    folder, trained = learnt
    _, validation = summaries(data)
    backend = LanguageModelBackend(pretrained=str(folder), device="cpu", store="off")
    end = backend.tokenizer.eos_token
    pairs = [(one.prompt, f" {one.impression}{end}") for one in validation]
    nats = -sum(score for score, _ in backend.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs]))
    characters = sum(len(one.impression) for one in validation)
    expected = trained.validation["bits_per_character"].value
    assert nats / math.log(2) / characters == pytest.approx(expected, rel=1e-5)


def test_tokens_seen_are_those_of_the_batches(
    learnt: tuple[Path, Trained], data: TrainingData, vocabulary: Path
) -> None:
    tokenizer, (train, _) = load_tokenizer(str(vocabulary)), summaries(data)
    # Long ones are cut: at 256 and at 64.
    sources = sum(min(256, len(tokenizer(one.prompt)["input_ids"])) for one in train)
    targets = sum(min(64, len(tokenizer(f" {one.impression}")["input_ids"])) for one in train)
    counts = learnt[1].counts
    assert (counts["source_tokens_seen"], counts["target_tokens_seen"]) == (2 * sources, 2 * targets)


def test_the_prompt_is_the_tracks_own(demo: Dataset, data: TrainingData) -> None:
    task = Summarization({**_task(), "task": "t", "dataset": "demo_cxr", "metadata": {"data_dir": str(demo.folder)}})
    study, (train, _) = data.train[0], summaries(data)
    assert train[0].study_id == study.study_id
    assert train[0].prompt == task.prompt_for(study)
    assert study.findings.strip() in train[0].prompt
    assert train[0].impression == study.impression.strip()


def test_the_loss_is_that_of_transformers_and_padding_changes_nothing(data: TrainingData, vocabulary: Path) -> None:
    training = training_of(data, vocabulary)
    training.module.eval()
    items = range(TRAIN, TRAIN + VALIDATION)
    with torch.inference_mode():
        alone = [
            float(
                training.module(
                    input_ids=torch.tensor([training.sources[item]]), labels=torch.tensor([training.targets[item]])
                ).loss
            )
            * len(training.targets[item])
            for item in items
        ]
    nats, tokens = training.validation_nats()
    assert nats == pytest.approx(np.array(alone), rel=1e-5)
    assert tokens.tolist() == [len(training.targets[item]) for item in items]


def test_long_prompts_lose_their_beginning_and_validation_impressions_nothing(
    data: TrainingData, vocabulary: Path
) -> None:
    training = training_of(data, vocabulary, source_tokens=9, target_tokens=3)
    assert {len(source) for source in training.sources} == {9}
    assert all(source[-1] == training.tokenizer.eos_token_id for source in training.sources)
    assert max(len(target) for target in training.targets[:TRAIN]) == 3
    assert max(len(target) for target in training.targets[TRAIN:]) > 3


def test_bf16_products_change_the_loss_a_little(data: TrainingData, vocabulary: Path) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        training = training_of(data, vocabulary, precision=precision)
        training.module.eval()
        found.append(float(training.loss([0, 1, 2]).detach()))
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize(
    ("options", "common", "expected"),
    [
        ([], {}, "needs tokenizer: --option tokenizer="),
        (["tokenizer=x"], {"model": "medvlm-tiny"}, "takes no base model"),
    ],
)
def test_wrong_options_get_one_line(options: list[str], common: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        build_method("seq2seq", options, schedule=Schedule(steps=1), **common)


def test_a_tokenizer_without_padding_is_refused(data: TrainingData, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_vocabulary(data, 300).tokenizer.save(str(path))  # the file alone names no special tokens
    with pytest.raises(UserError, match="no padding token"):
        finetune(method_of(path), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
