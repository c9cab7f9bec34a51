from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from medvlm_harness.model_backends.language_model import LanguageModelBackend
from medvlm_harness.model_backends.meter import Batch, Meter, merged, summary
from medvlm_harness.model_backends.sequences import written_length
from medvlm_harness.model_backends.text_encoder import TextEncoderBackend
from medvlm_harness.model_backends.tiny import TinyBackend
from medvlm_harness.model_backends.vlm import VlmBackend
from medvlm_harness.requests import TextRef

CPU = torch.device("cpu")


def clock(*times: float) -> Callable[[], float]:
    values = iter(times)
    return lambda: next(values)


def seconds(meter: Meter) -> dict[str, list[float]]:
    return {name: [batch.seconds for batch in batches] for name, batches in meter.batches.items()}


# --- stages


def test_a_stage_within_a_stage_counts_as_itself_alone() -> None:
    meter = Meter(CPU, clock(0, 1, 3, 4, 8, 10))
    with meter.stage("generate", 2):  # 0 to 10
        with meter.stage("decode", 2):  # 1 to 3
            pass
        with meter.stage("decode", 2):  # 4 to 8
            pass
    assert seconds(meter) == {"decode": [2, 4], "generate": [4]}
    assert meter.seconds("decode") == 6 and meter.seconds("load") == 0


def test_what_fails_is_not_kept_and_what_is_around_it_goes_on() -> None:
    meter = Meter(CPU, clock(0, 1, 4, 9))
    with meter.stage("load"), pytest.raises(ValueError, match="broken"), meter.stage("store"):
        raise ValueError("broken")
    assert seconds(meter) == {"load": [6]}


def test_a_stage_ends_when_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    gpu = torch.device("cuda:1")
    with Meter(gpu).stage("score"):
        assert not waited
    assert waited == [gpu]
    with Meter(CPU).stage("score"):
        pass
    assert waited == [gpu]


def test_what_is_taken_is_gone() -> None:
    meter = Meter(CPU)
    with meter.stage("score", 3):
        pass
    assert [batch.items for batch in meter.take()["score"]] == [3]
    assert meter.take() == {}


# --- summaries


def test_a_summary_equals_the_definition() -> None:
    batches = [Batch(4, 40, 2.0), Batch(4, 36, 1.0), Batch(1, 9, 1.0)]
    found = summary([batches])
    each = [0.5] * 4 + [0.25] * 4 + [1.0]
    assert (found["seconds"], found["items"], found["tokens"], found["batches"]) == (4.0, 9, 85, 3)
    assert found["items_per_second"] == 9 / 4 and found["tokens_per_second"] == 85 / 4
    assert found["ms_per_item"]["mean"] == pytest.approx(1000 * np.mean(each))
    assert found["ms_per_item"]["p50"] == pytest.approx(1000 * np.percentile(each, 50))
    assert found["ms_per_item"]["p90"] == pytest.approx(1000 * np.percentile(each, 90))


def test_of_processes_items_add_up_and_the_slowest_decides_the_time() -> None:
    found = merged([{"score": [Batch(3, None, 1.0)]}, {"score": [Batch(5, None, 4.0)], "load": [Batch(1, None, 2.0)]}])
    assert found["score"]["items"] == 8 and found["score"]["seconds"] == 4.0
    assert found["score"]["items_per_second"] == 2.0
    assert found["load"]["items"] == 1


def test_tokens_that_not_every_batch_counts_are_unknown() -> None:
    assert summary([[Batch(1, 5, 1.0), Batch(1, None, 1.0)]])["tokens"] is None
    nothing = summary([[Batch(0, None, 1.0)]])
    assert nothing["items_per_second"] is None and nothing["ms_per_item"] == {"mean": None, "p50": None, "p90": None}


def test_batches_go_from_process_to_process() -> None:
    batch = Batch(2, 7, 0.5)
    assert pickle.loads(pickle.dumps(batch)) == batch  # noqa: S301  # our own bytes


@pytest.mark.parametrize(
    ("row", "length"), [([5, 6, 1, 0, 0], 3), ([5, 6, 7], 3), ([5, 6, 0, 0], 2), ([1], 1), ([0, 0], 0)]
)
def test_what_fills_a_batch_was_not_written(row: list[int], length: int) -> None:
    assert written_length(row, end_ids=frozenset({1}), filler=0) == length


def test_where_the_filler_ends_a_text_only_the_first_was_written() -> None:
    assert written_length([5, 0, 0], end_ids=frozenset({0}), filler=0) == 2


# --- backends


def items(backend: Any) -> dict[str, int]:
    return {name: sum(batch.items for batch in batches) for name, batches in backend.meter.take().items()}


def ticking(backend: Any) -> Any:
    """Every reading of the clock is one second later: stages are told apart without any time passing."""
    ticks: Iterator[int] = count()
    backend.meter = Meter(CPU, lambda: float(next(ticks)))
    return backend


def test_an_encoder_counts_what_it_computes_and_nothing_of_the_store(
    images: Callable[..., list[Any]], embed_requests: Callable[..., list[Instance]]
) -> None:
    refs, texts = images(5), [TextRef("no edema"), TextRef("edema"), TextRef("edema")]
    backend = ticking(TinyBackend(device="cpu", batch_size=2))
    backend.embed(embed_requests([*refs, *refs, *texts]))
    assert [batch.items for batch in backend.meter.batches["encode_images"]] == [2, 2, 1]
    found = items(backend)
    assert {k: v for k, v in found.items() if k != "store"} == {
        "load": 1,
        "decode": 5,
        "encode_images": 5,
        "encode_texts": 2,
    }
    assert found["store"] == 7
    again = TinyBackend(device="cpu", batch_size=2)
    again.embed(embed_requests([*refs, *texts]))
    assert items(again) == {"store": 7}


def test_a_text_encoder_counts_tokens_without_padding(
    tiny_model: Callable[[str], Path], embed_requests: Callable[..., list[Instance]]
) -> None:
    backend = TextEncoderBackend(pretrained=str(tiny_model("bert")), device="cpu")
    texts = ["the heart", "there is a small left pleural effusion with adjacent atelectasis"]
    backend.embed(embed_requests(map(TextRef, texts)))
    (batch,) = backend.meter.batches["encode_texts"]
    assert batch.items == 2
    assert batch.tokens == sum(len(backend.tokenizer(text)["input_ids"]) for text in texts)


def test_a_language_model_counts_what_it_writes_and_scores(tiny_model: Callable[[str], Path]) -> None:
    backend = LanguageModelBackend(pretrained=str(tiny_model("llama")), device="cpu", batch_size=2)
    options = {"until": [], "max_gen_toks": 5, "min_new_tokens": 5, "do_sample": False}
    backend.generate_until([Instance("generate_until", {}, (f"heart {k}", options), k) for k in range(3)])
    backend.loglikelihood([Instance("loglikelihood", {}, ("the heart", " is"), 0)])
    taken = backend.meter.take()
    assert [(batch.items, batch.tokens) for batch in taken["generate"]] == [(2, 10), (1, 5)]
    pair = backend.encode_pair(("the heart", " is"))
    assert [(batch.items, batch.tokens) for batch in taken["score"]] == [(1, len(pair))]


def test_a_model_that_sees_counts_the_images_that_it_scores(
    tiny_model: Callable[[str], Path], images: Callable[..., list[Any]], classify_requests: Callable[..., Any]
) -> None:
    from medvlm_harness.requests import LabelSet

    backend = VlmBackend(pretrained=str(tiny_model("llava")), device="cpu", precision="fp32")
    backend.classify(classify_requests(images(2), LabelSet.from_config("two", ["Edema", "Fracture"])))
    assert items(backend)["score"] == 2
