"""The first run against the second, through `medvlm run` as a user starts it: what the store saves.

Seconds are those of the whole process, start-up included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def measure(images: int | None = None, precision: str = "fp32") -> dict[str, Any]:
    """Cold and warm seconds; the ratio is warm / cold."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = common.shortened(folder, images)
        model = common.random_clip(folder)
        cold, warm = (_run(folder, model, precision, out) for out in ("cold", "warm"))
    ratio = warm["seconds"] / cold["seconds"]
    return {"images": count, "precision": precision, "cold": cold, "warm": warm, "ratio": ratio}


def _run(folder: Path, model: Path, precision: str, out: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "MEDVLM_DATA": str(folder),
        "MEDVLM_STORE": str(folder / "store.sqlite"),
        "OMP_NUM_THREADS": str(common.THREADS),
    }
    command = [str(Path(sys.executable).with_name("medvlm")), "run", "--model", "medvlm-clip"]
    options = ["--model_args", f"pretrained={model},precision={precision}", "--tasks", ",".join(common.TASKS)]
    start = time.perf_counter()
    subprocess.run(
        [*command, *options, "--metadata", json.dumps(common.METADATA), "--output_path", str(folder / out)],
        env=environment,
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - start
    (results,) = (folder / out).rglob("results_*.json")
    described = json.loads(results.read_text(encoding="utf-8"))["medvlm"]["model"]
    encoded = {name: described[name] for name in ("images_encoded", "texts_encoded")}
    return {"seconds": seconds, **encoded}
