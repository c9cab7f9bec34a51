from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from PIL.Image import Image

from medvlm_harness.data.images import UnreadableImage
from medvlm_harness.model_backends.batching import slots
from medvlm_harness.model_backends.decoding import prepared
from medvlm_harness.requests import ImageRef


def shade(image: Image) -> torch.Tensor:
    return torch.tensor([[[float(image.getpixel((0, 0)))]]])  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ahead", [0, 3, 100])
def test_slots_come_whole_and_in_order(images: Callable[..., list[ImageRef]], threads: int, ahead: int) -> None:
    refs = images(11)
    expected = [shade(open_ref(ref)).item() for ref in refs]
    got = list(prepared(slots(refs, 3), shade, ahead=ahead, threads=threads))
    assert [len(slot) for slot, _ in got] == [3, 3, 3, 2]
    assert [ref for slot, _ in got for ref in slot] == refs
    assert torch.cat([pixels for _, pixels in got]).flatten().tolist() == expected


def test_the_next_slot_is_prepared_while_one_is_computed(images: Callable[..., list[ImageRef]]) -> None:
    done: list[str] = []

    def slow(image: Image) -> torch.Tensor:
        done.append("prepared")
        return shade(image)

    batches = prepared(slots(images(6), 2), slow, ahead=2, threads=2)
    next(batches)
    deadline = time.monotonic() + 10
    while len(done) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(done) == 4  # the slot in hand and the next, and no more
    batches.close()


def test_a_bad_image_in_the_middle_stops_there_and_leaves_no_thread(images: Callable[..., list[ImageRef]]) -> None:
    refs = images(9)
    refs[4].path.write_bytes(b"no image")
    got = []
    with pytest.raises(UnreadableImage, match=r"4\.png changed"):
        for slot, _ in prepared(slots(refs, 3), shade, ahead=3, threads=2):
            got.append(slot)
    assert got == [refs[:3]]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def open_ref(ref: ImageRef) -> Image:
    from PIL import Image as PilImage

    return PilImage.open(ref.path)
