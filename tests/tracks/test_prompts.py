from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.tracks.choice import ImpressionChoice
from medvlm_harness.tracks.generation import GenerationTask
from medvlm_harness.tracks.prompts import PromptedTask
from medvlm_harness.tracks.report_pairs import ReportPairs
from medvlm_harness.tracks.summarization import Summarization

TRACKS = (Summarization, ImpressionChoice)


def make(track: Any, prompt: Any, folder: Path = Path("nowhere")) -> Any:
    return track({"task": "t", "dataset": "synthetic", "prompt": prompt, "metadata": {"data_dir": str(folder)}})


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "expected `prompt:` to be a text"),
        (" ", "expected `prompt:` to be a text"),
        (["a"], "expected `prompt:` to be a text"),
        ("{findigs}", r"asks for \{findigs\}\. Did you mean findings"),
        ("{findings", "braces do not match"),
        ("{0}", r"asks for \{0\}"),
        ("{findings.__class__}", r"asks for \{findings.__class__\}"),
    ],
)
def test_a_prompt_that_cannot_be_filled_is_refused_before_any_data(track: Any, prompt: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(track, prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("track", TRACKS)
def test_a_prompt_is_filled_from_the_report(track: Any) -> None:
    study = Study("s", "p", findings=" a{b} ", impression="c", indication="d", comparison=" ")
    assert make(track, "{findings}|{indication}|{comparison}|{{x}}").prompt_for(study) == "a{b}|d||{x}"


def test_prompted_tracks_share_their_code() -> None:
    assert issubclass(GenerationTask, PromptedTask) and issubclass(ImpressionChoice, PromptedTask)
    assert all(issubclass(track, ReportPairs) for track in TRACKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    """Impressions of many kinds, in both splits."""
    texts = ("No acute disease.", "Cardiomegaly.", "Edema.", "Pleural effusion.", "Pneumonia.", "Fracture.")
    studies = [
        Study(f"s{k}", f"p{k}", findings=f"f {k}", impression=texts[k % 6], split="test" if k < 12 else "train")
        for k in range(24)
    ]
    return write_set(tmp_path_factory.mktemp("prompts") / "set", studies)


@pytest.mark.parametrize("track", TRACKS)
def test_a_chat_template_wraps_prompt_and_system_instruction(track: Any, folder: Path) -> None:
    def template(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    task = make(track, "F: {findings}", folder)
    task.build_all_requests()
    plain = [instance.arguments[0] for instance in task.instances]
    assert plain[0] == "F: f 0"
    task.build_all_requests(system_instruction="Be brief.", chat_template=template)
    assert task.instances[0].arguments[0] == "<system>Be brief.<user>F: f 0<assistant>"
    task.build_all_requests(system_instruction="Be brief.")
    assert task.instances[0].arguments[0] == "Be brief.\n\nF: f 0"
    task.build_all_requests()
    assert [instance.arguments[0] for instance in task.instances] == plain


def test_abnormal_is_what_the_label_source_does_not_call_normal(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    labels = [{"mesh": {"No Finding": value}} for value in (1, 0, None)] + [{}]
    studies = [Study(f"s{k}", f"p{k}", findings="x", labels=one, split="test") for k, one in enumerate(labels)]
    task = make(Summarization, "{findings}", write_set(tmp_path / "set", studies))
    assert task.abnormal_by == "mesh"
    assert [task.is_abnormal(study) for study in task.studies] == [False, True, True, True]


def test_without_labels_the_labeler_says_what_is_abnormal(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    findings = ("The lungs are clear.", "There is a pleural effusion.")
    studies = [Study(f"s{k}", f"p{k}", findings=text, split="test") for k, text in enumerate(findings)]
    task = make(ImpressionChoice, "{findings}", write_set(tmp_path / "set", studies))
    assert task.abnormal_by == "rules"
    assert [task.is_abnormal(study) for study in task.studies] == [False, True]
