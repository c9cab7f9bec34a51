"""Stock lm-eval tasks with `medvlm-lm`: the numbers of `hf`, what cannot be done refused, two processes as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness import plugin

COMMON = """
custom_dataset: !function data.documents
test_split: test
doc_to_text: "Is it {{question}}?"
metadata: {version: 1.0}
"""
TASKS = {
    "tiny_choice": 'output_type: multiple_choice\ndoc_to_choice: [" yes", " no, never"]\ndoc_to_target: "{{answer}}"\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "tiny_text": 'output_type: generate_until\ndoc_to_target: "yes"\n'
    'generation_kwargs: {until: ["e"], max_gen_toks: 9}\nmetric_list: [{metric: exact_match}]',
    "tiny_rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "Is it {{question}}?"\n'
    "metric_list: [{metric: bits_per_byte}]",
    "tiny_image": 'output_type: generate_until\ndoc_to_target: "yes"\ndoc_to_image: [picture]\n'
    "generation_kwargs: {until: [], max_gen_toks: 2}\nmetric_list: [{metric: exact_match}]",
}
DATA = """
from datasets import Dataset

def documents(**options):
    rows = [{"question": "the lung " * (1 + k % 4) + str(k), "answer": k % 2, "picture": None} for k in range(11)]
    return {"test": Dataset.from_list(rows)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(f"task: {name}\n{text}\n{COMMON}")
    (made / "data.py").write_text(DATA)
    return made


def evaluate(model: str, model_args: str, tasks: list[str], folder: Path) -> Any:
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
        manager = TaskManager(include_path=str(folder))
        return lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=tasks, task_manager=manager, device="cpu", bootstrap_iters=0
        )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_stock_tasks_have_the_numbers_of_hf(tiny_model: Callable[[str], Path], folder: Path, kind: str) -> None:
    tasks = ["tiny_choice", "tiny_text", "tiny_rolling"]
    path = tiny_model(kind)
    found = evaluate("medvlm-lm", f"pretrained={path}", tasks, folder)
    expected = evaluate("hf", f"pretrained={path},dtype=float32", tasks, folder)
    for task in tasks:
        values = {name: value for name, value in expected["results"][task].items() if isinstance(value, float)}
        assert values
        assert {name: found["results"][task][name] for name in values} == pytest.approx(values, rel=1e-5)
    assert found["medvlm"]["model"]["generated"] == 11
    assert found["medvlm"]["model"]["scored"] == 22 + 11
    assert found["medvlm"]["model"]["card"]["trained_on"] is None


def test_a_task_with_images_is_refused_and_the_rest_runs(tiny_model: Callable[[str], Path], folder: Path) -> None:
    found = evaluate("medvlm-lm", f"pretrained={tiny_model('llama')}", ["tiny_choice", "tiny_image"], folder)
    assert found["medvlm"]["unsupported"].keys() == {"tiny_image"}
    assert found["results"]["tiny_image"]["unsupported,none"].endswith("cannot take images")
    assert "acc,none" in found["results"]["tiny_choice"]


def test_two_processes_answer_as_one(
    tiny_model: Callable[[str], Path], folder: Path, in_one_and_two: Callable[..., tuple[dict[str, Any], ...]]
) -> None:
    arguments = ("--model", "medvlm-lm", "--model_args", f"pretrained={tiny_model('llama')},store=off")
    one, two = in_one_and_two(*arguments, "--tasks", "tiny_choice,tiny_text", "--include_path", str(folder))
    assert two["medvlm"]["model"]["world_size"] == 2
    for task in ("tiny_choice", "tiny_text"):
        assert two["results"][task] == one["results"][task]
        assert two["n-samples"][task] == one["n-samples"][task]
    assert two["medvlm"]["model"]["scored"] == one["medvlm"]["model"]["scored"] == 22
    assert two["medvlm"]["model"]["generated"] == one["medvlm"]["model"]["generated"] == 11
