"""A small set with tasks of its own, and lm-eval run on them in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from medvlm_harness import plugin
from medvlm_harness.data.records import Image, Study

YAML = {
    "syn_zeroshot": "class: !function medvlm_harness.ZeroShot\nlabels: [Edema, Fracture]\nviews: [frontal]\n",
    "syn_view": "class: !function medvlm_harness.ZeroShot\ntarget: view\n"
    "labels: {kind: multiclass, options: {frontal: front, lateral: side}}\n",
    "syn_retrieval": "class: !function medvlm_harness.Retrieval\n",
}


@pytest.fixture(scope="session")
def synthetic_root(
    tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path], fake_image: Callable[..., Image]
) -> Path:
    """60 test and 40 train studies with a frontal, a lateral, a report and labels; and three tasks with a group."""
    rng = np.random.default_rng(4)
    studies = [
        Study(
            f"s{k:03}",
            f"p{k:03}",
            (fake_image(f"{k}_f.png"), fake_image(f"{k}_l.png", "lateral")),
            findings=f"finding {k % 25}",
            impression=f"impression {k}" if k % 3 else "",
            labels={"rules": {"Edema": int(rng.random() < 0.4), "Fracture": int(k % 30 == 0)}},
            split="test" if k < 60 else "train",
        )
        for k in range(100)
    ]
    root: Path = tmp_path_factory.mktemp("results")
    write_set(root / "synthetic", studies, label_names=("Edema", "Fracture"))
    (root / "tasks").mkdir()
    for name, text in YAML.items():
        shared = f"task: {name}\ndataset: synthetic\nmetadata: {{version: 2}}\n"
        (root / "tasks" / f"{name}.yaml").write_text(text + shared)
    (root / "tasks" / "_syn.yaml").write_text("group: syn\ntask: [syn_zeroshot, syn_view, syn_retrieval]\n")
    return root


def set_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    monkeypatch.setenv("MEDVLM_DATA", str(root))


def run_lm_eval(
    root: Path, tasks: list[str], model: Any = "medvlm-baseline", metadata: Any = None, **options: Any
) -> Any:
    """`lm_eval run` as a function: tasks, model, and what --metadata says."""
    import lm_eval

    settings = {"model_args": "kind=random"} if isinstance(model, str) else {}
    manager = TaskManager(include_path=str(root / "tasks"), metadata=metadata or {})
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, **{**settings, **options})


@pytest.fixture
def manager(synthetic_root: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """lm-eval's task manager with our tasks and the synthetic ones."""
    set_up(synthetic_root, monkeypatch)
    return TaskManager(include_path=str(synthetic_root / "tasks"))


@pytest.fixture
def run(synthetic_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run on the synthetic set, with a random model unless another is given."""
    set_up(synthetic_root, monkeypatch)
    return partial(run_lm_eval, synthetic_root)


@pytest.fixture(scope="session")
def results(synthetic_root: Path) -> Any:
    """Results of one run of all three tasks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_up(synthetic_root, monkeypatch)
        return run_lm_eval(synthetic_root, ["syn_zeroshot", "syn_view", "syn_retrieval"])
