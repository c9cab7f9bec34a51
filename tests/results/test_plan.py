from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from medvlm_harness.data.records import Dataset
from medvlm_harness.results.plan import PlannedRun, plan


@pytest.fixture
def planned(synthetic_root: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlannedRun]:
    """The plan of an `lm_eval run` command line."""
    from lm_eval._cli.harness import HarnessCLI

    def of(tasks: str, *model: str) -> PlannedRun:
        command = ["lm_eval", "run", "--tasks", tasks, *model]
        monkeypatch.setattr("sys.argv", [*command, "--include_path", str(synthetic_root / "tasks")])
        return plan(HarnessCLI().parse_args())

    return of


def test_images_and_texts_are_counted_once_across_tasks(planned: Callable[..., PlannedRun]) -> None:
    by_name = {task.name: task for task in planned("syn_zeroshot,syn_view,syn_retrieval").tasks}
    zeroshot, view, retrieval = (by_name[f"syn_{name}"] for name in ("zeroshot", "view", "retrieval"))
    # 60 studies with a frontal and a lateral; two labels with two phrases each; two options.
    assert (zeroshot.documents, zeroshot.images, zeroshot.texts) == (60, 60, 4)
    assert (view.documents, view.images, view.texts) == (120, 120, 2)
    reports = {
        text
        for k in range(60)
        for f, i in [(f"finding {k % 25}", f"impression {k}" if k % 3 else "")]
        for text in (f"{f} {i}".strip(), f, i)
        if text
    }
    assert (retrieval.documents, retrieval.images, retrieval.texts) == (60, 60, len(reports))
    assert sum(task.new_images for task in by_name.values()) == 120
    assert sum(task.new_texts for task in by_name.values()) == 6 + len(reports)


def test_a_task_alone_needs_all_of_its_own(planned: Callable[..., PlannedRun]) -> None:
    (view,) = planned("syn_view").tasks
    assert (view.new_images, view.new_texts) == (view.images, view.texts) == (120, 2)


def test_without_a_model_nothing_is_said_of_time(planned: Callable[..., PlannedRun]) -> None:
    run = planned("syn_view")
    assert (run.images, run.texts, run.seconds_per_image, run.seconds_per_text) == (None, None, None, None)
    # One whose answers cost nothing has none either.
    assert planned("syn_view", "--model", "medvlm-baseline").images is None


def test_the_time_is_that_of_what_is_not_stored(
    planned: Callable[..., PlannedRun], demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(demo.folder.parent))
    # Those of validation are fitted on.
    images = sum(len(study.images) for study in demo.studies if study.split in ("test", "validation"))
    first = planned("demo_cxr_view", "--model", "medvlm-tiny")
    assert (first.images, first.texts) == (images, 2)
    assert first.seconds_per_image and first.seconds_per_text
    assert first.seconds == images * first.seconds_per_image + 2 * first.seconds_per_text
    # Measuring keeps nothing: the slots of the run stay what they are.
    assert planned("demo_cxr_view", "--model", "medvlm-tiny").images == images
    simple_evaluate("medvlm-tiny", tasks=["demo_cxr_view"], bootstrap_iters=0, device="cpu")
    then = planned("demo_cxr_view,demo_cxr_retrieval", "--model", "medvlm-tiny")
    assert (then.images, then.seconds_per_image) == (0, None)
    assert then.texts == sum(task.texts for task in then.tasks) - 2


def test_a_task_is_counted_as_it_is_asked_of_the_model(
    planned: Callable[..., PlannedRun], demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVLM_DATA", str(demo.folder.parent))
    (of_any,) = planned("demo_cxr_impression_choice").tasks
    assert of_any.texts == 0  # likelihoods, which are no vectors
    (choice,) = planned("demo_cxr_impression_choice", "--model", "medvlm-tiny").tasks
    assert choice.texts > choice.documents  # the findings, and the impressions
