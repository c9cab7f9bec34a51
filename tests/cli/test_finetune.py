"""`medvlm finetune`, and a run on what it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medvlm_harness.data.records import Dataset, read_dataset, write_dataset

COMMAND = ("finetune", "--method", "projector", "--model", "medvlm-tiny", "--device", "cpu")


@pytest.fixture
def command(small_language_model: Path, demo: Dataset) -> tuple[str, ...]:
    """Three steps on the demo set; --output is left to each test."""
    return (
        *COMMAND,
        *("--dataset", "demo_cxr", "--data_dir", str(demo.folder), "--batch_size", "2", "--steps", "3"),
        *("--option", f"language_model={small_language_model}", "--option", "grid=2", "--option", "hidden=8"),
        *("--option", "validation_studies=4"),
    )


def test_what_is_trained_is_a_model_that_is_refused_on_what_it_learnt_from(
    medvlm: Callable[..., Any], command: tuple[str, ...], demo: Dataset, tmp_path: Path
) -> None:
    status, out, err = medvlm(*command, "--output", "out", "--seed", "3", "--eval-steps", "2")
    assert status == 0, err
    assert "3 steps" in out and "--model medvlm-projector --model_args pretrained=out" in out
    assert {path.name for path in Path("out").iterdir()} == {
        *("projector.safetensors", "projector.json", "medvlm_card.yaml", "log.jsonl"),
    }
    assert not Path("out.partial").exists()
    card = yaml.safe_load(Path("out/medvlm_card.yaml").read_text())
    training = card["training"]
    assert (training["method"], training["steps"], training["options"]["seed"]) == ("projector", 3, 3)
    assert training["data"]["sha256"] == demo.sha256
    assert set(training["base_models"]) == {"encoder", "language_model"}
    for base in training["base_models"].values():
        assert all(len(digest) == 64 for digest in base["weights_sha256"].values())
    assert demo.manifest.licence in card["licence"]
    assert str(tmp_path) not in json.dumps(card)  # results carry it
    log = map(json.loads, Path("out/log.jsonl").read_text().splitlines())
    curve = [entry for entry in log if "validation_loss" in entry]
    assert [entry["step"] for entry in curve] == [0, 2, 3]

    run = ("run", "--model", "medvlm-projector", "--model_args", "pretrained=out", "--tasks", "demo_cxr_zeroshot")
    where = {"data_dir": str(demo.folder)}
    refused = medvlm(*run, "--limit", "2", "--metadata", json.dumps({**where, "split": "train"}))
    assert refused.status == 2
    assert "the card of out says that it was trained on the train split" in refused.error
    done = medvlm(*run, "--limit", "2", "--output_path", "results", "--metadata", json.dumps(where))
    assert done.status == 0, done.err
    (results,) = Path("results").rglob("results_*.json")
    written = json.loads(results.read_text())["medvlm"]
    assert written["tasks"]["demo_cxr_zeroshot"]["contamination"]["splits_seen"] == ["train"]
    assert written["model"]["card"]["training"]["base_models"] == training["base_models"]


def test_an_output_that_is_there_is_left_alone(medvlm: Callable[..., Any], command: tuple[str, ...]) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    outcome = medvlm(*command, "--output", "out")
    assert (outcome.status, outcome.error) == (2, "out exists already: name another --output, or remove it.")
    assert Path("out/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["patient", "image"])
def test_a_set_whose_test_patients_are_in_training_is_refused(
    medvlm: Callable[..., Any], command: tuple[str, ...], demo: Dataset, tmp_path: Path, what: str
) -> None:
    from dataclasses import replace

    studies = list(demo.studies)
    test = next(study for study in studies if study.split == "test")
    place = next(k for k, study in enumerate(studies) if study.split == "train")
    same = {"patient_id": test.patient_id} if what == "patient" else {"images": test.images}
    studies[place] = replace(studies[place], **same)
    folder = write_dataset(tmp_path / "leaking", studies, demo.manifest)
    outcome = medvlm(*command, "--data-dir", folder, "--output", "out")
    assert outcome.status == 2
    assert f"{what}s are in the train split and in the test split" in outcome.error
    assert not Path("out").exists() and not Path("out.partial").exists()
    assert read_dataset(demo.folder).sha256 == demo.sha256


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--method", "projecter"), "Unknown method 'projecter'. Did you mean projector?"),
        (("--dataset", "iu_cxr2"), "Unknown data set 'iu_cxr2'. Did you mean iu_cxr?"),
        (("--option", "gird=3"), "Unknown option 'gird' of method projector. Did you mean grid?"),
        (("--option", "grid=three"), "Expected grid to be a whole number, but got 'three'."),
        (("--option", "grid"), "Expected --option to be key=value, but got 'grid'."),
        (("--option", "images=lateral"), "Expected images to be one of frontal, all, but got 'lateral'."),
        (("--model", ""), "Method projector needs a base model: --model NAME."),
        (("--model", "medvlm-tinny"), "Unknown model 'medvlm-tinny'. Did you mean medvlm-tiny"),
        (("--model", "medvlm-lm"), "Expected the encoder to be a dual encoder, but medvlm-lm is a generative."),
        (("--model-args", "prompt=task"), "Unknown option 'prompt' of model medvlm-tiny. Did you mean prompts"),
        (("--batch-size", "0"), "Expected batch_size to be more than 0, but got 0."),
        (("--seconds", "-1"), "Expected seconds to be more than 0, but got -1.0."),
    ],
)
def test_wrong_options_get_one_line(
    medvlm: Callable[..., Any], command: tuple[str, ...], arguments: tuple[str, ...], expected: str
) -> None:
    outcome = medvlm(*command, "--output", "out", *arguments)
    assert outcome.status == 2
    assert outcome.error.startswith(expected)
    assert not Path("out").exists()


def test_without_a_budget_or_a_language_model_it_says_what_is_missing(
    medvlm: Callable[..., Any], demo: Dataset
) -> None:
    common = (*COMMAND, "--dataset", "demo_cxr", "--data-dir", demo.folder, "--output", "out")
    assert "one or more of --seconds, --epochs and --steps" in medvlm(*common, "--option", "language_model=x").error
    assert medvlm(*common, "--steps", "1").error == "Method projector needs language_model: --option language_model=..."


def test_a_state_of_other_settings_is_not_gone_on_from(
    medvlm: Callable[..., Any], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvlm_harness.training.projector import ProjectorMethod

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProjectorMethod, "_write", killed)
        assert medvlm(*command, "--output", "out").status == 130
    other = medvlm(*command, "--output", "out", "--option", "grid=3", "--seed", "1")
    assert other.error.startswith("out.partial was begun with another grid and schedule: ")
    assert medvlm(*command, "--output", "out").status == 0
    shutil.rmtree("out")
