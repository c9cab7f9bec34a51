"""What the benchmarks share: the data set shortened, a model of random weights, and child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from medvlm_harness.data.locate import find_dataset
from medvlm_harness.data.records import Dataset, write_dataset
from medvlm_harness.errors import UserError

ARCHITECTURE = "ViT-B-32"
THREADS = 2
TASKS = ("iu_cxr_zeroshot", "iu_cxr_view", "iu_cxr_retrieval")
METADATA = {"split": "all"}


def dataset() -> Dataset:
    """The prepared IU-CXR."""
    try:
        return find_dataset("iu_cxr")
    except UserError as error:
        raise SystemExit(f"These benchmarks need the prepared IU-CXR: {error}") from error


def shortened(folder: Path, images: int | None) -> int:
    """Write the set with its first studies, at least `images` images of them; how many images there are."""
    whole = dataset()
    studies, count = [], 0
    for study in whole.studies:
        if images is not None and count >= images:
            break
        studies.append(study)
        count += len(study.images)
    write_dataset(folder / "iu_cxr", studies, whole.manifest)
    return count


def random_clip(folder: Path) -> Path:
    """A ViT-B/32 of open_clip with random weights, as a folder that both sides load."""
    import open_clip
    import torch

    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    target = folder / "vit-b-32"
    target.mkdir()
    config = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": {}}
    (target / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(model.state_dict(), target / "open_clip_pytorch_model.bin")
    return target


def child(script: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a benchmark script in a process of its own; its last line of output is JSON."""
    fixed = {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **fixed, **(environment or {})}, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
