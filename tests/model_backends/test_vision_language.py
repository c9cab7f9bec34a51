"""Labels from the likelihood of answers: with the shared prefill as with every answer scored alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.vision_language import images_of, questions_about, turn_parts
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.requests import ImageRef, LabelScores, LabelSet, TextRef

FINDINGS = LabelSet.from_config("findings", ["Edema", "Pleural Effusion", "Support Devices"])
VIEWS = LabelSet.from_config(
    "views", {"kind": "multiclass", "options": {"a": ["a frontal view", "an AP view"], "b": "a lateral view"}}
)


def ours(folder: Path, **options: Any) -> VlmBackend:
    return VlmBackend(pretrained=str(folder), device="cpu", **{"store": "off", **options})


def log_sum(values: Sequence[float]) -> float:
    return math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)


def alone(backend: VlmBackend, ref: ImageRef, labels: LabelSet, indication: str = "") -> LabelScores:
    """From one log-likelihood request per image, question and spelling."""
    totals = []
    for question in questions_about(labels, indication=indication):
        for spellings in question.answers:
            distinct = {backend.answer_ids(spelling): spelling for spelling in spellings}
            requests = [
                Instance("loglikelihood", {}, (question.text, spelling, {"visual": [ref]}), 0)
                for spelling in distinct.values()
            ]
            totals.append(log_sum([score for request in requests for score, _ in backend.loglikelihood([request])]))
    if labels.kind == "multilabel":
        margin = [yes - no for yes, no in zip(totals[::2], totals[1::2], strict=True)]
        return LabelScores(tuple(margin), tuple(1 / (1 + math.exp(-one)) for one in margin))
    first, second = totals
    return LabelScores((first - second, second - first), tuple(math.exp(one - log_sum(totals)) for one in totals))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("labels", [FINDINGS, VIEWS], ids=["multilabel", "multiclass"])
def test_labels_are_those_of_every_answer_scored_alone(
    kind: str,
    labels: LabelSet,
    tiny_model: Callable[[str], Path],
    images: Callable[..., list[ImageRef]],
    classify_requests: Callable[..., list[Instance]],
) -> None:
    refs = images(4)
    expected = [alone(ours(tiny_model(kind), batch_size=1), ref, labels) for ref in refs]
    assert len({round(scores.margin[0], 3) for scores in expected}) == len(refs), "the image must matter"
    for batch_size in (1, 5, 64):  # one sequence at a time, less than an image's questions, several images at once
        found = ours(tiny_model(kind), batch_size=batch_size).classify(classify_requests(refs, labels))
        for ours_, theirs in zip(found, expected, strict=True):
            assert ours_.margin == pytest.approx(theirs.margin, abs=1e-4)
            assert ours_.probability == pytest.approx(theirs.probability, abs=1e-4)


def test_the_indication_stands_before_the_question(
    tiny_model: Callable[[str], Path], images: Callable[..., list[ImageRef]]
) -> None:
    (ref,) = images(1)
    backend = ours(tiny_model("llava"))
    with_it, without = (
        backend.classify([Instance("classify", {}, (ref, FINDINGS, *more), 0)])[0]
        for more in ((TextRef("stable since the prior study"),), ())
    )
    assert with_it.margin != without.margin
    expected = alone(backend, ref, FINDINGS, indication="stable since the prior study")
    assert with_it.margin == pytest.approx(expected.margin, abs=1e-4)


def test_the_first_token_of_each_spelling_alone(
    tiny_model: Callable[[str], Path], images: Callable[..., list[ImageRef]], classify_requests: Callable[..., Any]
) -> None:
    (ref,) = images(1)
    backend = ours(tiny_model("llava"), answer_scoring="first-token")
    (found,) = backend.classify(classify_requests([ref], FINDINGS))
    for label, margin in zip(questions_about(FINDINGS), found.margin, strict=True):
        firsts = [{backend.answer_ids(s)[0] for s in spellings} for spellings in label.answers]
        shared = firsts[0] & firsts[1]
        totals = []
        for own in firsts:
            requests = [
                Instance("loglikelihood", {}, (label.text, backend.tokenizer.decode([token]), {"visual": [ref]}), 0)
                for token in own - shared
            ]
            totals.append(log_sum([score for score, _ in backend.loglikelihood(requests)]))
        assert margin == pytest.approx(totals[0] - totals[1], abs=1e-4)


def test_labels_are_stored_by_image_set_and_scoring(
    tiny_model: Callable[[str], Path],
    images: Callable[..., list[ImageRef]],
    classify_requests: Callable[..., list[Instance]],
    tmp_path: Path,
) -> None:
    refs, store = images(2), str(tmp_path / "store.sqlite")
    first = ours(tiny_model("llava"), store=store).classify(classify_requests(refs, FINDINGS))
    again = ours(tiny_model("llava"), store=store)
    assert again.classify(classify_requests(refs, FINDINGS)) == first
    assert (again.images_classified, again.classifications_recalled, again.loaded) == (0, 2, False)
    other = ours(tiny_model("llava"), store=store, answer_scoring="first-token")
    other.classify(classify_requests(refs, FINDINGS))
    assert other.images_classified == 2


def test_a_multiclass_question_lists_the_options() -> None:
    (question,) = questions_about(VIEWS)
    assert question.text.splitlines()[1:3] == ["a frontal view", "a lateral view"]
    assert question.answers[0] == ("a frontal view", " a frontal view", "an AP view", " an AP view")


def test_parts_of_a_turn() -> None:
    assert turn_parts("what", 2) == [None, None, "what"]
    assert turn_parts("first <image>, second <image>", 2) == ["first ", None, ", second ", None]


def test_pixels_in_a_request_are_refused() -> None:
    with pytest.raises(UserError, match="ImageRef"):
        images_of([{"visual": ["picture.png"]}])
