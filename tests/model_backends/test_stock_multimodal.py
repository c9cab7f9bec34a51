"""Our tasks with images through lm-eval's own `hf-multimodal`, by a tiny random Llava, and the same through ours."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medvlm_harness import plugin
from medvlm_harness.data.images import open_image
from medvlm_harness.data.records import Dataset
from medvlm_harness.perturbations.image import Case, find_corruption
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks import image_prompts

TEXT, IMAGES = "demo_cxr_summarization", "demo_cxr_report_generation"
LABELS, USE = "demo_cxr_image_use_labels", "demo_cxr_image_use_reports"


@pytest.fixture
def run(
    tiny_model: Callable[[str], Path], demo: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    torch.set_num_threads(1)
    plugin.install()
    monkeypatch.setattr(plugin.scope, "builtin_tasks", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    def call(
        *tasks: str,
        model: str = "hf-multimodal",
        model_args: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        manager = TaskManager(metadata={"data_dir": str(demo.folder), **(metadata or {})})
        return lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(tiny_model("llava")), **(model_args or {})},
            tasks=list(tasks),
            task_manager=manager,
            device="cpu",
            batch_size=2,
            limit=2,
            bootstrap_iters=0,
            gen_kwargs="max_gen_toks=6",
            **options,
        )

    return call


def texts(results: Any, task: str) -> list[Any]:
    return [sample["resps"] for sample in results["samples"][task]]


def test_text_and_image_tasks_run_in_one_run_and_images_are_opened_one_batch_at_a_time(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, alive, most = image_prompts._opened, 0, 0

    def closed() -> None:
        nonlocal alive
        alive -= 1

    def watched(ref: ImageRef) -> Image.Image:
        nonlocal alive, most
        picture = opened(ref)
        weakref.finalize(picture, closed)
        alive += 1
        most = max(most, alive)
        return picture

    monkeypatch.setattr(image_prompts, "_opened", watched)
    results = run(TEXT, IMAGES, USE)
    assert results["medvlm"]["unsupported"] == {}
    assert {name: results["medvlm"]["tasks"][name]["scored"] for name in (TEXT, IMAGES, USE)} == dict.fromkeys(
        (TEXT, IMAGES, USE), 2
    )
    assert 0 < most <= 4  # of eight: a batch of two, and the one before it
    written = texts(results, USE)
    assert any(len({str(one) for one in document}) > 1 for document in written)  # it sees that the image changes
    assert "rougeL_true_minus_blank" in results["medvlm"]["tasks"][USE]["metrics"]


def test_our_backend_writes_the_same_from_the_same_prompt(run: Callable[..., Any]) -> None:
    asked: dict[str, Any] = {"metadata": {"images": "all"}}
    stock, own = run(IMAGES, **asked), run(IMAGES, model="medvlm-vlm", model_args={"chat_template": "none"}, **asked)
    prompt, sample = stock["samples"][IMAGES][0]["arguments"][0][0], stock["samples"][IMAGES][0]
    assert prompt.count("<image>") == len(sample["doc"]["images"]) == 2
    assert texts(stock, IMAGES) == texts(own, IMAGES)
    assert all(len(document[0][0]) > 1 for document in texts(own, IMAGES))


def test_both_see_the_perturbed_image(run: Callable[..., Any], demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, seen = image_prompts._opened, []

    def watched(ref: ImageRef) -> Image.Image:
        picture = opened(ref)
        seen.append((ref.file_sha256, picture.tobytes()))
        return picture

    monkeypatch.setattr(image_prompts, "_opened", watched)
    asked: dict[str, Any] = {"metadata": {"perturbation": {"name": "gaussian_noise", "severity": 5}}}
    stock, own = run(IMAGES, **asked), run(IMAGES, model="medvlm-vlm", model_args={"chat_template": "none"}, **asked)
    assert texts(stock, IMAGES) == texts(own, IMAGES)
    case = Case(find_corruption("gaussian_noise", "chest"), 5)
    files = {image.sha256: demo.path(image) for study in demo.studies for image in study.images}
    assert {sha for sha, _ in seen} == {one["doc"]["image"] for one in stock["samples"][IMAGES]}
    for sha, pixels in seen:
        assert pixels == case(open_image(files[sha]), key=sha).convert("RGB").tobytes()
    assert stock["medvlm"]["tasks"][IMAGES]["perturbation"]["identity"] == case.identity


@pytest.mark.parametrize("model", ["hf-multimodal", "medvlm-vlm"])
def test_a_chat_template_is_applied_where_lm_eval_asks_for_it(run: Callable[..., Any], model: str) -> None:
    results = run(IMAGES, model=model, apply_chat_template=True)
    prompt = results["samples"][IMAGES][0]["arguments"][0][0]
    assert prompt.startswith("<s>user: <image>") and prompt.endswith("assistant:")
    assert all(document[0][0] for document in texts(results, IMAGES))


def test_our_backend_does_both_tasks_of_the_images_use(run: Callable[..., Any]) -> None:
    results = run(USE, LABELS, model="medvlm-vlm", metadata={"label_source": "template"})
    assert results["medvlm"]["unsupported"] == {}
    assert results["medvlm"]["model"]["images_classified"] == 2 * 3
    assert results["medvlm"]["tasks"][LABELS]["conditions"] == ["true", "other", "blank"]
    margins = [[scores[0] for scores in one["filtered_resps"]] for one in results["samples"][LABELS]]
    assert all(len({str(one) for one in document}) == 3 for document in margins)  # each image has its answer
