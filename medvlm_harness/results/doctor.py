"""What `medvlm doctor` looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from medvlm_harness.data.locate import data_root, find_prepared
from medvlm_harness.results.run import installed_versions

__all__ = ["findings"]


def findings(datasets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of what was looked at and its state."""
    for name, version in installed_versions().items():
        yield name, version or "not installed"
    yield from _devices()
    yield "data root", str(data_root())
    for name in datasets:
        folder = find_prepared(name)
        yield f"data {name}", str(folder) if folder else "not prepared"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "CPU threads of torch", str(torch.get_num_threads())
    if not torch.cuda.is_available():
        yield "CUDA", "no device"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "available"
