"""What a very large benchmark costs: constants measured on this machine, and the time, room and bottleneck they mean.

    python benchmarks/scaling.py                    # measure, then print the table of docs/scaling.md
    python benchmarks/scaling.py --gpu-images 500   # with another speed of the model on one GPU

The speed of the model on a GPU cannot be measured here: it is an assumption, and an option. All else is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from medvlm_harness.demo.phantom import render
from medvlm_harness.requests import Embedding
from medvlm_harness.store import Space, Store

WIDTH = 512  # of an embedding
BATCH = 64
STORED = 20_000


class Constants(NamedTuple):
    """Measured on one core unless said otherwise."""

    decode_small: float  # seconds to open and resize a 256 x 256 JPEG
    decode_large: float  # the same at 2048 x 2048
    store_bytes: float  # on disk, of one embedding
    store_write: float  # seconds per answer, in batches of 64
    store_read: float  # seconds per answer, when all are asked for


class Plan(NamedTuple):
    """A benchmark, and the machines it runs on."""

    images: int = 10_000_000
    models: int = 100
    variants: int = 76  # each image as it is, and 15 corruptions at 5 severities
    gpus: int = 64
    gpus_per_node: int = 8
    cores_per_node: int = 96
    gpu_images: float = 2000.0  # images/s of the model on one GPU: assumed


def measure() -> Constants:
    """Take the constants of this machine."""
    small, large = (_jpeg(size) for size in (256, 2048))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "store.sqlite"
        store, space = Store(path), Space("embed:image", {"weights": "w"})
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((STORED, WIDTH)).astype(np.float32)
        answers = {hashlib.sha256(row.tobytes()).hexdigest(): Embedding(row).to_bytes() for row in vectors}
        keys = list(answers)
        start = time.perf_counter()
        for first in range(0, STORED, BATCH):
            store.put(space, {key: answers[key] for key in keys[first : first + BATCH]})
        written = time.perf_counter()
        store.get(space, keys)
        read = time.perf_counter()
        store.close()
        size = path.stat().st_size
    return Constants(
        decode_small=_seconds(lambda: _prepare(small)),
        decode_large=_seconds(lambda: _prepare(large)),
        store_bytes=size / STORED,
        store_write=(written - start) / STORED,
        store_read=(read - written) / STORED,
    )


def stages(plan: Plan, constants: Constants, decode: float) -> dict[str, float]:
    """Seconds that each stage would take alone, every node working; the largest is the bottleneck."""
    nodes = plan.gpus / plan.gpus_per_node
    passes = plan.images * plan.models * plan.variants
    # A shard is a hash of studies: the fullest of n has a little more than its share.
    uneven = 1 + np.sqrt(2 * np.log(plan.gpus) / (plan.images / plan.gpus))
    return {
        "forward passes": passes / (plan.gpus * plan.gpu_images) * uneven,
        # Each model reads the images anew: what is shared between models is on disk, not in memory.
        "decoding": passes * decode / (nodes * plan.cores_per_node),
        "store, one file per node": passes * constants.store_write / nodes,
        "store, one file for all": passes * constants.store_write,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in Plan()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    plan = Plan(**vars(parser.parse_args()))
    constants = measure()
    for name, value in constants._asdict().items():
        print(f"{name:<14} {value:.6f}")
    passes = plan.images * plan.models * plan.variants
    print(f"\n{passes:.3g} forward passes, {passes * constants.store_bytes / 1e12:,.0f} TB in the store")
    print(f"one model, images as they are: {plan.images * constants.store_bytes / 1e9:,.0f} GB")
    for what, decode in (("256 x 256", constants.decode_small), ("2048 x 2048", constants.decode_large)):
        print(f"\nimages of {what}")
        for stage, seconds in sorted(stages(plan, constants, decode).items(), key=lambda item: -item[1]):
            print(f"  {stage:<26} {seconds / 86_400:12,.1f} days")


def _jpeg(size: int) -> bytes:
    """A phantom of the demo set, enlarged to a radiograph's size."""
    pixels = render((), "frontal", np.random.default_rng(0))
    content = BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def _prepare(content: bytes) -> None:
    Image.open(BytesIO(content)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)


def _seconds(work: Callable[[], object], rounds: int = 50) -> float:
    work()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    return (time.perf_counter() - start) / rounds


if __name__ == "__main__":
    main()
