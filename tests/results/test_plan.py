from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from medvlm_harness.results.plan import PlannedTask, forward_passes


@pytest.fixture
def plan(
    synthetic_root: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[PlannedTask]]:
    """The plan of an `lm_eval run` command line."""
    from lm_eval._cli.harness import HarnessCLI

    def of(tasks: str) -> list[PlannedTask]:
        command = ["lm_eval", "run", "--model", "none-is-loaded", "--tasks", tasks]
        monkeypatch.setattr("sys.argv", [*command, "--include_path", str(synthetic_root / "tasks")])
        return forward_passes(HarnessCLI().parse_args())

    return of


def test_images_and_texts_are_counted_once_across_tasks(plan: Callable[[str], list[PlannedTask]]) -> None:
    by_name = {task.name: task for task in plan("syn_zeroshot,syn_view,syn_retrieval")}
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


def test_a_task_alone_needs_all_of_its_own(plan: Callable[[str], list[PlannedTask]]) -> None:
    (view,) = plan("syn_view")
    assert (view.new_images, view.new_texts) == (view.images, view.texts) == (120, 2)
