"""Retrieval over large sets against the matrix products alone that it cannot do without.

The reference is `queries[block] @ gallery.T` in float32, with our block size, the same threads and memory that is
reused from block to block; nothing is looked up or counted. Vectors are synthetic: 512 numbers, unit length, one hit
per query, which stands first for some queries and far behind for others.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import common
import numpy as np
from numpy.typing import NDArray

from medvlm_harness.metrics import retrieval

SIZES = (10_000, 100_000)
WIDTH = 512
ROUNDS = {10_000: 7, 100_000: 2}
Vectors = NDArray[np.float32]


def measure(images: int | None = None) -> dict[str, object]:
    """Seconds and peak memory at each size up to `images`; the ratio is ours / products at the largest size."""
    largest = SIZES[-1] if images is None else images
    sizes = [size for size in SIZES if size <= largest] or [largest]
    runs = [common.child("retrieval.py", str(size)) for size in sizes]
    return {"runs": runs, "threads": common.THREADS, "width": WIDTH, "ratio": runs[-1]["ratio"]}


def run(n: int) -> dict[str, object]:
    """Both sides in turn, the fastest round of each; peak memory of ours, inputs included."""
    rng = np.random.default_rng(0)
    queries = _unit(rng.standard_normal((n, WIDTH), dtype=np.float32))
    # Of a partner, a quarter is the query: its rank is from 1 to some thousands.
    gallery = _unit(queries + rng.standard_normal((n, WIDTH), dtype=np.float32) * np.float32(4 * WIDTH**-0.5))
    classes = np.arange(n)
    before = _peak_mib()
    ours, products = [], []
    for number in range(ROUNDS.get(n, 3)):
        start = time.perf_counter()
        retrieval.rank_queries(queries, gallery, classes, classes)
        ours.append(time.perf_counter() - start)
        if number == 0:
            peak = _peak_mib()
        products.append(_products(queries, gallery))
    return {
        "n": n,
        "seconds": min(ours),
        "products_seconds": min(products),
        "rounds": {"ours": ours, "products": products},
        "peak_mib": peak,
        "peak_of_inputs_mib": before,
        "ratio": min(ours) / min(products),
    }


def _products(queries: Vectors, gallery: Vectors) -> float:
    """Seconds of all blocked products."""
    rows = max(1, min(retrieval._BLOCK_ROWS, retrieval._BLOCK_ELEMENTS // len(gallery)))
    start = time.perf_counter()
    room = np.empty((rows, len(gallery)), dtype=np.float32)
    for first in range(0, len(queries), rows):
        block = queries[first : first + rows]
        np.matmul(block, gallery.T, out=room[: len(block)])
    return time.perf_counter() - start


def _unit(vectors: Vectors) -> Vectors:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _peak_mib() -> float:
    """Peak resident memory of this process: the system counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]))))
