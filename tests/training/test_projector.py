from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from medvlm_harness.data.records import Dataset
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.frozen_encoder import frozen_encoder
from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.projector import WEIGHTS_FILE
from medvlm_harness.training import loop
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.methods import Schedule
from medvlm_harness.training.projector import ProjectorMethod, _items, _ProjectorTraining, _Vocabulary

torch.set_num_threads(1)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def training_of(data: TrainingData, language_model: Path, **options: Any) -> _ProjectorTraining:
    method = ProjectorMethod(
        model="medvlm-tiny",
        language_model=str(language_model),
        grid=2,
        hidden=8,
        schedule=Schedule(steps=1),
        **options,
    )
    language = LanguageModelBackend(pretrained=str(language_model), device="cpu", store="off")
    language.ensure_loaded()
    items = _items(data, data.train, "frontal")
    return _ProjectorTraining(method, frozen_encoder("medvlm-tiny", device="cpu"), language, items[:6], items[6:8])


def test_the_loss_falls_and_the_best_weights_are_kept(projector_of: Callable[..., Any], tmp_path: Path) -> None:
    trained = projector_of(tmp_path / "out")
    curve = {
        entry["step"]: entry["validation_loss"] for entry in log_of(tmp_path / "out") if "validation_loss" in entry
    }
    assert list(curve) == [0, 20, 40, 60]
    assert trained.first_validation_loss == curve[0]
    assert trained.validation_loss == min(curve.values()) == curve[trained.best_step]
    assert trained.validation_loss < 0.7 * curve[0]
    weights = load_file(tmp_path / "out" / WEIGHTS_FILE)
    buffers = {"mean", "spread", "size"}
    assert trained.parameters == sum(tensor.numel() for name, tensor in weights.items() if name not in buffers)
    assert trained.studies == {"train": 16, "validation": 4}


def test_the_same_seed_gives_the_same_weights_and_another_others(
    projector_of: Callable[..., Any], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name))  # what was drawn before does not matter
        projector_of(tmp_path / name, steps=6, eval_steps=3, seed=seed)
    a, b, c = (load_file(tmp_path / name / WEIGHTS_FILE) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["first.weight"], c["first.weight"])


@pytest.mark.parametrize("killed_at", [4, 5])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    projector_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    options = {"steps": 8, "eval_steps": 4}
    projector_of(tmp_path / "whole", **options)

    real, calls = _ProjectorTraining.loss, []

    def killed(self: _ProjectorTraining, items: Any) -> torch.Tensor:
        calls.append(items)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return real(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(_ProjectorTraining, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            projector_of(tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "killed.partial" / loop.STATE_FILE).is_file()

    calls.clear()
    monkeypatch.setattr(_ProjectorTraining, "loss", lambda self, items: (calls.append(items), real(self, items))[1])
    projector_of(tmp_path / "killed", **options)
    assert len(calls) == 4  # the state of step 4 was gone on from
    assert not (tmp_path / "killed.partial").exists()
    whole, resumed = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [[{**entry, "seconds": 0} for entry in log_of(tmp_path / name)] for name in ("whole", "killed")]
    assert steps[0] == steps[1]


def test_neither_base_model_changes(light_and_dark: Dataset, small_language_model: Path) -> None:
    training = training_of(TrainingData.of(light_and_dark), small_language_model)
    training.loss([0, 1, 2]).backward()
    assert all(parameter.grad is None for parameter in training.language_model.parameters())
    assert all(parameter.grad is not None for parameter in training.projector.parameters())


def test_the_loss_is_the_language_models_own_over_its_whole_vocabulary(
    light_and_dark: Dataset, small_language_model: Path
) -> None:
    """As transformers computes it, study by study, without padding."""
    training = training_of(TrainingData.of(light_and_dark), small_language_model)
    assert training.vocabulary.negatives == len(training.vocabulary.rest)  # all of them are drawn
    asked = [True, False, True]
    ours = training._losses([0, 1, 2], asked)
    expected = []
    for number, with_indication in enumerate(asked):
        tokens = training.tokens[number]
        prompt, answer = tokens.prompts[with_indication], tokens.answer
        features = torch.stack([training.features[ref] for ref in training.train[number].images])
        ids = torch.tensor([[*prompt, *answer]])
        logits = training.network(ids, image_features=features).logits[0, len(prompt) - 1 : -1]
        expected.append(functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_a_sample_stands_for_the_rest_of_the_vocabulary_without_bias(
    light_and_dark: Dataset, small_language_model: Path
) -> None:
    training = training_of(TrainingData.of(light_and_dark), small_language_model)
    few = _Vocabulary(training.language_model, training.tokens, negatives=40)
    hidden, target = 3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), few.known[:1]
    torch.manual_seed(0)
    # The loss is log(sum) - logit: of the sums the mean is right, of their logarithms it is a little below.
    logit = few.logits(hidden, target)[0, 0].double()
    sums = torch.stack([(few.losses(hidden, target)[0].double() + logit).exp() for _ in range(3000)])
    exact = few.logits(hidden, torch.arange(len(few.weight)))[0].double().exp().sum()
    assert abs(sums.mean() - exact) < 4 * sums.std() / 3000**0.5
    without = few.logits(hidden, few.known)[0].double().exp().sum()
    assert abs(without - exact) > 4 * sums.std() / 3000**0.5  # what leaving the rest out would give


def test_the_findings_end_with_the_end_token_and_are_cut(light_and_dark: Dataset, small_language_model: Path) -> None:
    data = TrainingData.of(light_and_dark)
    whole = training_of(data, small_language_model)
    answer = whole.tokens[0].answer
    assert whole.tokenizer.decode(answer[:-1]) == " light"
    assert answer[-1] == whole.tokenizer.eos_token_id
    cut = training_of(data, small_language_model, max_tokens=3)
    assert cut.tokens[0].answer == answer[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "Expected grid to be more than 0"),
        ({"learning_rate": -1.0}, "Expected learning_rate to be more than 0"),
        ({"grid": 40}, "takes 1024: use a smaller grid"),
        ({"precision": "fp7"}, "fp7"),
        ({"learning_rate": 1e30}, "try a lower learning rate"),
    ],
)
def test_what_cannot_work_is_told_in_one_line_and_leaves_no_output(
    projector_of: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        projector_of(tmp_path / "out", steps=5, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
