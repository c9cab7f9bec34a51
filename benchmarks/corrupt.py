"""Encoding corrupted images against encoding clean ones, by a ViT-B/32 of random weights: what corrupting costs.

Each case of the quick suite has a share of the images to itself, which is encoded clean and corrupted, one right after
the other and in turns first, through the public backend and without a store. Both sides open and prepare each image;
all files were read before. Then counted: what the robustness tasks encode after a clean run of zero-shot classification
and retrieval, which must be the corrupted images and what stands for images, and no text.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

IMAGES = 960
BATCH_SIZE = 16  # several batches per case, so that images are prepared while others are encoded, as in a run
COUNTED = 24  # images of the run whose work is counted
CLEAN, SUITE = ["iu_cxr_zeroshot", "iu_cxr_retrieval"], ["iu_cxr_robustness"]
MODALITY = "chest"


def measure(images: int = IMAGES, precision: str = "fp32") -> dict[str, Any]:
    """Seconds of both, overall and per case, the counts, and the ratio corrupted / clean."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common.shortened(folder, images)
        arguments = str(common.random_clip(folder)), precision, str(images)
        timed = common.child("corrupt.py", "timed", *arguments, environment={"MEDVLM_DATA": scratch})
        few = folder / "few"
        common.shortened(few, COUNTED)
        counted = common.child("corrupt.py", "counted", *arguments[:2], environment={"MEDVLM_DATA": str(few)})
    expected = {"images": counted["perturbed"] + counted["stand_ins"], "texts": 0}
    if counted["suite"] != expected:
        raise SystemExit(
            f"Expected the suite to encode {expected} after a clean run, but it encoded {counted['suite']}."
        )
    median = statistics.median(one["ratio"] for one in timed["cases"].values())
    seconds = {side: sum(one[side] for one in timed["cases"].values()) for side in ("clean", "corrupted")}
    return {
        **timed,
        **seconds,
        "counted": counted,
        "median_ratio": median,
        "ratio": seconds["corrupted"] / seconds["clean"],
    }


def _timed(model: str, precision: str, images: str) -> dict[str, Any]:
    import os

    import torch
    from lm_eval.api.instance import Instance

    from medvlm_harness.model_backends.clip import ClipBackend
    from medvlm_harness.perturbations.image import find_suite
    from medvlm_harness.requests import ImageRef

    torch.set_num_threads(common.THREADS)
    data = common.dataset()
    files = [(one.sha256, data.path(one)) for study in data.studies for one in study.images][: int(images)]
    cases = find_suite("quick", MODALITY)
    share = len(files) // len(cases)
    backend = ClipBackend(pretrained=model, precision=precision, batch_size=BATCH_SIZE, store="off")

    def encode(refs: list[ImageRef]) -> float:
        requests = [Instance("embed", {}, (ref,), k) for k, ref in enumerate(refs)]
        start = time.perf_counter()
        backend.embed(requests)
        return time.perf_counter() - start

    spare = files[share * len(cases) :] or files[:1]
    encode([ImageRef(*file, case) for file in spare[:1] for case in cases])  # loads the model, and warms both
    for _, path in files:
        path.read_bytes()
    load, found = os.getloadavg()[0], {}
    for k, case in enumerate(cases):
        own = files[k * share : (k + 1) * share]
        sides = {"clean": [ImageRef(*file) for file in own], "corrupted": [ImageRef(*file, case) for file in own]}
        found[case.name] = {side: encode(sides[side]) for side in (sorted(sides) if k % 2 else sorted(sides)[::-1])}
    for one in found.values():
        one["ratio"] = one["corrupted"] / one["clean"]
    return {"images": share * len(cases), "load_before": load, "load_after": os.getloadavg()[0], "cases": found}


def _counted(model: str, precision: str) -> dict[str, Any]:
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from medvlm_harness import plugin
    from medvlm_harness.model_backends.clip import ClipBackend
    from medvlm_harness.results.plan import distinct_inputs

    torch.set_num_threads(common.THREADS)
    plugin.install()
    plugin.scope.builtin_tasks = False
    backend = ClipBackend(pretrained=model, precision=precision, store="off")
    manager = TaskManager(metadata={"split": "all"})

    def encoded(tasks: list[str]) -> dict[str, int]:
        before = backend.images_encoded, backend.texts_encoded
        lm_eval.simple_evaluate(backend, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        return {"images": backend.images_encoded - before[0], "texts": backend.texts_encoded - before[1]}

    clean, suite = encoded(CLEAN), encoded(SUITE)
    images = {ref for task in manager.load(SUITE)["tasks"].values() for ref in distinct_inputs(task)[0]}
    perturbed = sum(ref.perturbation is not None for ref in images)
    known = {image.sha256 for study in common.dataset().studies for image in study.images}
    stand_ins = len({ref.file_sha256 for ref in images} - known)  # grey, and the mean image
    return {"clean": clean, "suite": suite, "perturbed": perturbed, "stand_ins": stand_ins}


if __name__ == "__main__":
    side, *rest = sys.argv[1:]
    print(json.dumps((_timed if side == "timed" else _counted)(*rest)))
