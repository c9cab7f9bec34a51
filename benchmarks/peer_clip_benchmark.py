"""Run CLIP_benchmark's own command line with a clock around its evaluation; for the Python of its own environment.

Called as `peer_clip_benchmark.py THREADS eval ...`; all after THREADS goes to CLIP_benchmark as it is. The last line of
output is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from clip_benchmark import cli

PACKAGES = ("clip_benchmark", "numpy", "open_clip_torch", "pillow", "torch", "torchvision", "webdataset")


class Clock:
    """Adds up the seconds and the items of every call to a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds, self.items = function, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result; the first argument is the batch."""
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.items += len(args[0])
        return result


def main() -> None:
    """Run the command line given, and print what was timed."""
    threads = int(sys.argv.pop(1))
    torch.set_num_threads(threads)
    _, options = cli.get_parser_args()
    timed: dict[str, Any] = {}

    def with_clock(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        # The command line calls it with the model loaded and the data set opened; its loader's workers start inside.
        def run(model: Any, *args: Any, **kwargs: Any) -> Any:
            images, texts = Clock(model.encode_image), Clock(model.encode_text)
            model.encode_image, model.encode_text = images, texts
            start = time.perf_counter()
            metrics = evaluate(model, *args, **kwargs)
            seconds = time.perf_counter() - start
            timed.update(
                seconds=seconds,
                seconds_images=images.seconds,
                seconds_texts=texts.seconds,
                images=images.items,
                texts=texts.items,
                metrics=metrics,
            )
            return metrics

        return run

    module = getattr(cli, options.task)
    module.evaluate = with_clock(module.evaluate)
    cli.main()
    settings = {
        "precision": "amp" if options.amp else "fp32",
        "batch_size": options.batch_size,
        "workers": options.num_workers,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(timed | settings))


if __name__ == "__main__":
    main()
