"""Measure one thing side by side with what it is compared to, in one run on this machine.

    python benchmarks/run.py encode --json encode.json              # the whole of IU-CXR, about 15 minutes on two cores
    python benchmarks/run.py encode --json encode.json --images 600

Each benchmark is the file of its name, with a function `measure`; the result's key `ratio` says ours / theirs, or for a
peer theirs / ours. Those over images need the prepared IU-CXR (`medvlm data prepare iu_cxr`).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import sys
from importlib import import_module
from pathlib import Path

from medvlm_harness.model_backends.hardware import cpu_name

NAMES = (
    "encode",
    "corrupt",
    "peer",
    "warm",
    "bootstrap",
    "retrieval",
    "startup",
    "text",
    "memory",
    "vlm",
    "efficiency",
)


def main() -> None:
    """Run one benchmark and write what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, required=True, help="file that the result is written to")
    parser.add_argument("--images", type=int, help="about how many images, instead of all")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "auto"), help="where the benchmark has one")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    measure = import_module(arguments.name).measure
    options = {"images": arguments.images, "precision": arguments.precision}
    known = inspect.signature(measure).parameters
    for name, value in options.items():
        if value is not None and name not in known:
            parser.error(f"{arguments.name} has no --{name}")
    result = measure(**{name: value for name, value in options.items() if value is not None})
    result["machine"] = {"python": platform.python_version(), "cpu": cpu_name(), "cores": os.cpu_count()}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    print(f"ratio {result['ratio']:.3f}")


if __name__ == "__main__":
    main()
