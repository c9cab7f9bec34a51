"""Images decoded and prepared in worker threads, ahead of the forward pass and not far ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL.Image import Image

from medvlm_harness.data.images import open_reference
from medvlm_harness.requests import ImageRef

__all__ = ["prepared"]


def prepared(
    slots: Iterator[Sequence[ImageRef]], preprocess: Callable[[Image], torch.Tensor], *, ahead: int, threads: int
) -> Iterator[tuple[Sequence[ImageRef], torch.Tensor]]:
    """Each slot of images with its pixels, shape (n, channels, height, width).

    Args:
        slots: in this order.
        preprocess: from an image to (channels, height, width); runs in the workers.
        ahead: images prepared ahead of the slot that was handed out last.
        threads: workers.

    Raises:
        UnreadableImage: if a file is missing, damaged, or not the one of its hash.
    """

    def prepare(ref: ImageRef) -> torch.Tensor:
        return preprocess(open_reference(ref))

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Sequence[ImageRef], list[Future[torch.Tensor]]]] = deque()
        held = 0
        try:
            while True:
                while held <= ahead and (slot := next(slots, None)) is not None:
                    waiting.append((slot, [pool.submit(prepare, ref) for ref in slot]))
                    held += len(slot)
                if not waiting:
                    return
                slot, futures = waiting.popleft()
                pixels = torch.stack([future.result() for future in futures])
                futures.clear()  # they hold the same pixels once more
                held -= len(slot)
                yield slot, pixels
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
