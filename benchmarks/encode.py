"""Our whole image run against a bare loop over the same model, images and texts: what the harness adds.

Ours: zero-shot classification with 13 labels, view classification and retrieval both ways over every split, with all
metrics and intervals, the store included. Bare: open, preprocess and encode each image once, tokenise and encode each
text once, at the best batch size of those tried. Both start with the model loaded and everything imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

BATCH_SIZES = (16, 32, 64, 128)
TRIED_IMAGES = 128


def measure(images: int | None = None, precision: str = "fp32") -> dict[str, Any]:
    """Seconds of both in one run, bare first, and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = common.shortened(folder, images)
        model = common.random_clip(folder)
        environment = {"MEDVLM_DATA": str(folder)}
        bare = common.child("encode.py", "bare", str(model), precision, environment=environment)
        ours = run_ours(folder, model, precision)
    return {
        "images": count,
        "precision": precision,
        "bare": bare,
        "ours": ours,
        "ratio": ours["seconds"] / bare["seconds"],
    }


def run_ours(folder: Path, model: Path, precision: str, store: str | None = None) -> dict[str, Any]:
    """Our run in a process of its own, over the set in `folder`."""
    arguments = [] if store is None else [store]
    return common.child(
        "encode.py", "ours", str(model), precision, *arguments, environment={"MEDVLM_DATA": str(folder)}
    )


def _ours(model: str, precision: str) -> dict[str, Any]:
    import resource

    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from medvlm_harness import plugin
    from medvlm_harness.model_backends.clip import ClipBackend

    torch.set_num_threads(common.THREADS)
    plugin.scope.builtin_tasks = False
    with tempfile.TemporaryDirectory() as scratch:
        backend = ClipBackend(pretrained=model, precision=precision, store=str(Path(scratch) / "store.sqlite"))
        backend.ensure_loaded()
        manager = TaskManager(metadata=common.METADATA)
        start = time.perf_counter()
        results = lm_eval.simple_evaluate(
            backend, tasks=list(common.TASKS), task_manager=manager, metadata=common.METADATA, bootstrap_iters=0
        )
        seconds = time.perf_counter() - start
    described = results["medvlm"]["model"]
    return {
        "seconds": seconds,
        "images": described["images_encoded"],
        "texts": described["texts_encoded"],
        "batch_size": described["batch_size"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _bare(model: str, precision: str) -> dict[str, Any]:
    import open_clip
    import torch
    from PIL import Image

    from medvlm_harness.model_backends.precision import choose_precision, dtype_of

    torch.set_num_threads(common.THREADS)
    dtype = dtype_of(choose_precision(precision, torch.device("cpu")))
    network, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{model}")
    network = network.to(dtype).eval()
    tokenizer = open_clip.get_tokenizer(common.ARCHITECTURE)
    paths, texts = _inputs()

    def encode_images(chosen: list[Path], size: int) -> None:
        for part in _parts(chosen, size):
            pixels = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in part])
            network.encode_image(pixels.to(dtype)).float().numpy()

    def encode_texts(size: int) -> None:
        for part in _parts(texts, size):
            network.encode_text(tokenizer(part)).float().numpy()

    with torch.inference_mode():
        tried = {}
        for size in BATCH_SIZES:
            encode_images(paths[:size], size)
            start = time.perf_counter()
            encode_images(paths[:TRIED_IMAGES], size)
            tried[size] = time.perf_counter() - start
        best = min(tried, key=lambda size: tried[size])
        start = time.perf_counter()
        encode_images(paths, best)
        between = time.perf_counter()
        encode_texts(best)
        end = time.perf_counter()
    return {
        "seconds": end - start,
        "seconds_images": between - start,
        "seconds_texts": end - between,
        "images": len(paths),
        "texts": len(texts),
        "batch_size": best,
    }


def _inputs() -> tuple[list[Path], list[str]]:
    """Every distinct image and text that our three tasks ask for."""
    from lm_eval.tasks import TaskManager

    from medvlm_harness import plugin
    from medvlm_harness.results.plan import distinct_inputs

    plugin.install()
    plugin.scope.builtin_tasks = False
    tasks = TaskManager(metadata=common.METADATA).load(list(common.TASKS))["tasks"]
    images: dict[str, Path] = {}
    texts: dict[str, None] = {}
    for task in tasks.values():
        found_images, found_texts = distinct_inputs(task)
        images |= {str(ref): ref.path for ref in found_images}
        texts |= dict.fromkeys(found_texts)
    return list(images.values()), list(texts)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


if __name__ == "__main__":
    side, *rest = sys.argv[1:]
    print(json.dumps((_bare if side == "bare" else _ours)(*rest)))
