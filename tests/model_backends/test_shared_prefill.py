"""One pass over an image for all that is asked about it, and where that cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvlm_harness.model_backends.sequences import Prompt, Scored
from medvlm_harness.model_backends.shared_prefill import shared_length, shared_scores
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.requests import ImageRef

QUESTIONS = ("is the heart normal", "are the lungs clear without focal consolidation", "any pneumothorax")


@pytest.fixture
def backend(tiny_model: Callable[[str], Path]) -> VlmBackend:
    return VlmBackend(pretrained=str(tiny_model("llava")), device="cpu", store="off")


def group(backend: VlmBackend, ref: ImageRef, template: str = "{}") -> list[Scored]:
    prompts = [backend.encode_turn(template.format(question), [ref]) for question in QUESTIONS]
    return [Scored(prompt, backend.answer_ids(answer)) for prompt in prompts for answer in ("yes", "no, it is clear")]


def one_by_one(backend: VlmBackend, groups: list[list[Scored]]) -> list[list[tuple[float, bool]]]:
    return [[backend.decoder.score([item])[0] for item in items] for items in groups]


def assert_same(found: Any, expected: Any) -> None:
    for own, others in zip(found, expected, strict=True):
        assert [score for score, _ in own] == pytest.approx([score for score, _ in others], abs=1e-4)
        assert [greedy for _, greedy in own] == [greedy for _, greedy in others]


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_the_scores_of_each_alone_whatever_the_number_of_rows(
    backend: VlmBackend, images: Callable[..., list[ImageRef]], rows: int
) -> None:
    groups = [group(backend, ref) for ref in images(3)]
    assert_same(shared_scores(backend.decoder, groups, rows=rows), one_by_one(backend, groups))


def test_an_image_goes_through_the_tower_once(backend: VlmBackend, images: Callable[..., list[ImageRef]]) -> None:
    groups = [group(backend, ref) for ref in images(3)]
    seen: list[int] = []
    tower = backend.decoder.network.model.vision_tower
    handle = tower.register_forward_pre_hook(
        lambda _, given, named: seen.append(len((*given, *named.values())[0])), with_kwargs=True
    )
    shared_scores(backend.decoder, groups, rows=64)
    assert sum(seen) == 3
    one_by_one(backend, groups)
    handle.remove()
    assert sum(seen) == 3 + 3 * 6


def test_an_image_after_the_question_is_shared_by_nothing(
    backend: VlmBackend, images: Callable[..., list[ImageRef]]
) -> None:
    groups = [group(backend, ref, "{}? <image>") for ref in images(2)]
    assert shared_length([item.prompt for item in groups[0]]) == 0
    assert_same(shared_scores(backend.decoder, groups, rows=4), one_by_one(backend, groups))


def test_images_of_other_sizes_are_not_mixed_up(
    tiny_model: Callable[[str], Path], images: Callable[..., list[ImageRef]]
) -> None:
    backend = VlmBackend(pretrained=str(tiny_model("qwen2_vl")), device="cpu", store="off")
    groups = [group(backend, ref) for ref in (*images(3), *images(1, size=(64, 30)))]
    assert len({shared_length([item.prompt for item in items]) for items in groups}) > 1
    assert_same(shared_scores(backend.decoder, groups, rows=100), one_by_one(backend, groups))


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([Prompt((1, 2, 3, 4), images=("a",), image_end=2), Prompt((1, 2, 3, 5), images=("a",), image_end=2)], 3),
        ([Prompt((1, 2, 3), images=("a",), image_end=2), Prompt((1, 2, 3), images=("a",), image_end=2)], 2),
        ([Prompt((1, 2, 3), images=("a",), image_end=3)], 0),  # nothing would be left to predict from
        ([Prompt((1, 2, 3), images=("a",), image_end=2), Prompt((1, 2, 4), images=("b",), image_end=2)], 0),
        ([Prompt((1, 2, 3))], 0),
    ],
)
def test_what_is_shared(prompts: list[Prompt], length: int) -> None:
    assert shared_length(prompts) == length
