"""Our whole image run against CLIP_benchmark, which does zero-shot classification and then retrieval.

Both have the same images, the same ViT-B/32 of random weights and the same number of threads; CLIP_benchmark runs
through its own command line, in an environment of its own, with its own batch size and workers. At fp32 it is told
`--no_amp`; at auto each does what it does by itself: it autocasts (to bf16 on a CPU), and we choose by the device. It
encodes every image once per task:

- zero-shot over every image, 13 labels as a multi-label set in its WebDataset layout, one prompt per label;
- retrieval over every image that has a report, one caption per image, in the layout of MS COCO's captions.

Timed from the model and data being set up to the metrics being there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import numpy as np

from medvlm_harness.cache import cache_folder
from medvlm_harness.data.locate import find_dataset
from medvlm_harness.data.records import Dataset, Labels, Study

HERE = Path(__file__).parent
PRECISIONS = {"fp32": ["--no_amp"], "auto": []}
SHARDS = 4  # its default number of workers; with fewer shards than workers webdataset refuses to start
NOT_PROMPTED = "No Finding"
SHARED_PACKAGES = ("numpy", "open_clip_torch", "pillow", "torch", "torchvision")


def measure(
    images: int | None = None, precision: str = "fp32", *, cache: Path | None = None, peer_only: bool = False
) -> dict[str, object]:
    """Seconds of the peer's two tasks and of our run, and how many times ours the peer takes.

    Args:
        images: take the first studies with at least so many images; None takes all.
        precision: fp32 on both sides, or auto: each as it does by itself.
        cache: where the peer's environment is kept.
        peer_only: leave our run out.
    """
    if precision not in PRECISIONS:
        raise SystemExit(f"CLIP_benchmark has the precisions {' and '.join(PRECISIONS)}, not {precision}.")
    python = environment(cache)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = common.shortened(folder, images)
        model = common.random_clip(folder)
        dataset = find_dataset("iu_cxr", data_dir=folder)
        zeroshot = _peer(python, folder, model, precision, write_zeroshot(folder / "zeroshot", dataset))
        retrieval = _peer(python, folder, model, precision, write_retrieval(folder / "retrieval", dataset))
        versions = {"peer": zeroshot.pop("versions"), "ours": {name: version(name) for name in SHARED_PACKAGES}}
        del retrieval["versions"]
        result: dict[str, object] = {
            "images": count,
            "precision": precision,
            "threads": common.THREADS,
            "versions": versions,
            "peer_zeroshot": zeroshot,
            "peer_retrieval": retrieval,
            "peer_seconds": zeroshot["seconds"] + retrieval["seconds"],
        }
        if not peer_only:
            from encode import run_ours

            ours = run_ours(folder, model, precision)
            result |= {"ours": ours, "ratio": (zeroshot["seconds"] + retrieval["seconds"]) / ours["seconds"]}
    return result


def environment(cache: Path | None = None) -> Path:
    """The Python of the peer's environment, which is made once for each content of peer_requirements.txt."""
    requirements = HERE / "peer_requirements.txt"
    wanted = f"{sys.version_info[:2]}\n{requirements.read_text(encoding='utf-8')}"
    name = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    folder = (cache or cache_folder() / "benchmarks") / f"peer-{name}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.is_file():
        print(f"Making the environment of CLIP_benchmark in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
        subprocess.run(install, check=True, stdout=sys.stderr)
        complete.touch()
    return python


def write_zeroshot(folder: Path, dataset: Dataset) -> list[str]:
    """Write every image with its 13 labels as WebDataset shards; the peer's options that read them."""
    labels = [name for name in dataset.manifest.label_names if name != NOT_PROMPTED]
    found = [(study, image) for study in dataset.studies for image in study.images]
    split = folder / "test"
    split.mkdir(parents=True)
    texts = {
        "classnames.txt": "\n".join(name.lower() for name in labels),
        "zeroshot_classification_templates.txt": "{c}",
        "dataset_type.txt": "multilabel",
        "test/nshards.txt": str(SHARDS),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for shard in range(SHARDS):
        with tarfile.open(split / f"{shard}.tar", "w") as archive:
            for number in range(shard, len(found), SHARDS):
                study, image = found[number]
                path = dataset.path(image)
                archive.add(path, f"{number:06d}{path.suffix.lower()}")
                buffer = io.BytesIO()
                np.save(buffer, np.array([_is_positive(study, name) for name in labels], dtype=np.float32))
                entry = tarfile.TarInfo(f"{number:06d}.npy")
                entry.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(entry, buffer)
    return ["--task", "zeroshot_classification", "--dataset", "wds/iu_cxr", "--dataset_root", str(folder)]


def write_retrieval(folder: Path, dataset: Dataset) -> list[str]:
    """Write every image that has a report as one of MS COCO's with one caption; the peer's options that read them."""
    pairs = []
    for study in dataset.studies:
        report = f"{study.findings.strip()} {study.impression.strip()}".strip()
        pairs += [(image.file, report) for image in study.images if report]
    annotations = {
        "images": [{"id": number, "file_name": file} for number, (file, _) in enumerate(pairs)],
        "annotations": [
            {"id": number, "image_id": number, "caption": report} for number, (_, report) in enumerate(pairs)
        ],
    }
    folder.mkdir()
    (folder / "val2014").symlink_to(dataset.manifest.image_root, target_is_directory=True)
    file = folder / "captions.json"
    file.write_text(json.dumps(annotations), encoding="utf-8")
    options = ["--task", "zeroshot_retrieval", "--dataset", "mscoco_captions"]
    return [*options, "--dataset_root", str(folder), "--annotation_file", str(file)]


def _is_positive(study: Study, label: str) -> bool:
    """By the first source that labelled the study; the labels decide the metric, not the time."""
    source: Labels = next(iter(study.labels.values()), {})
    return source.get(label) == 1


def _peer(python: Path, folder: Path, model: Path, precision: str, task: list[str]) -> dict[str, Any]:
    """One run of the peer in a process of its own."""
    chosen = ["--model", common.ARCHITECTURE, "--pretrained", str(model / "open_clip_pytorch_model.bin")]
    output = ["--output", str(folder / "peer.json")]
    script = [str(python), str(HERE / "peer_clip_benchmark.py"), str(common.THREADS), "eval"]
    done = subprocess.run(
        [*script, *task, *chosen, *PRECISIONS[precision], *output],
        env={**os.environ, "OMP_NUM_THREADS": str(common.THREADS)},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["images_per_second"] = result["images"] / result["seconds"]
    return result


def main() -> None:
    """Measure as the command line says, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, help="at least so many, whole studies; all when left out")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--cache", type=Path, help="where the peer's environment is kept; the user cache when left out")
    parser.add_argument("--peer-only", action="store_true", help="leave our own run out")
    options = parser.parse_args()
    result = measure(options.images, options.precision, cache=options.cache, peer_only=options.peer_only)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
