"""Encoding texts: ours (by length, each once, padding left out) against a bare loop in the order of the reports."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

BATCH = 64


def measure(images: int | None = None, precision: str = "fp32") -> dict[str, Any]:
    """Seconds of both over the reports, findings and impressions of the studies; the ratio is ours / bare."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common.shortened(folder, images)
        model = common.random_clip(folder)
        result = common.child("text.py", str(model), precision, environment={"MEDVLM_DATA": str(folder)})
    return {**result, "precision": precision, "ratio": result["ours"] / result["bare"]}


def _both(model: str, precision: str) -> dict[str, Any]:
    import open_clip
    import torch
    from lm_eval.api.instance import Instance

    from medvlm_harness.model_backends.clip import ClipBackend
    from medvlm_harness.requests import TextRef
    from medvlm_harness.tracks.retrieval import study_texts

    torch.set_num_threads(common.THREADS)
    asked = [text for study in common.dataset().studies for text in study_texts(study).values()]
    distinct = list(dict.fromkeys(asked))
    with tempfile.TemporaryDirectory() as scratch:
        store = str(Path(scratch) / "store.sqlite")
        backend = ClipBackend(pretrained=model, precision=precision, store=store, batch_size=BATCH)
        backend.ensure_loaded()
        tokenizer = open_clip.get_tokenizer(common.ARCHITECTURE)
        backend.seconds_per_item([], distinct[:BATCH])  # warm
        start = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(distinct), BATCH):
                backend.towers.model.encode_text(tokenizer(distinct[first : first + BATCH])).float().numpy()
        bare = time.perf_counter() - start
        start = time.perf_counter()
        backend.embed([Instance("embed", {}, (TextRef(text),), k) for k, text in enumerate(asked)])
        ours = time.perf_counter() - start
    return {"bare": bare, "ours": ours, "asked": len(asked), "distinct": len(distinct)}


if __name__ == "__main__":
    print(json.dumps(_both(*sys.argv[1:3])))
