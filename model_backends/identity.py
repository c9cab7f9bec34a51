"""What a model is, for the store: hashes of everything that decides its answers, and never a path or a name."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from medvlm_harness.errors import UserError

__all__ = ["check_weights", "code_sha256", "combined_sha256", "library_versions", "state_sha256"]

# A release of one of these may change pixels, tokens or kernels.
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "open_clip_torch", "timm", "pillow", "numpy")
# Our modules that make answers; options, cards, records of hashes, ranks and what is
# measured decide nothing of one.
_ANSWERING = ("medvlm_harness.model_backends.", "medvlm_harness.data.images", "medvlm_harness.demo.tiny")
_NOT_ANSWERING = {
    f"medvlm_harness.model_backends.{name}"
    for name in (
        *("base", "cards", "catalogue", "first_load", "footprint", "hardware", "identity", "memory", "meter"),
        *("profiling", "ranks"),
    )
}


def code_sha256(backend: type) -> str:
    """Hash of the code that answers for a backend: its class's modules, and those of ours that they import.

    Comments and layout do not count. So a backend whose author mends it answers anew.
    """
    waiting = [owner.__module__ for owner in backend.__mro__ if not _is_foreign(owner.__module__)]
    trees: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in trees or name in _NOT_ANSWERING or (path := _source(name)) is None:
            continue
        tree = ast.parse(path.read_bytes())
        trees[name] = ast.dump(tree)
        waiting += [found for found in _imported(tree) if found.startswith(_ANSWERING)]
    # Not by module name: a plug-in may be moved without being another.
    return combined_sha256(sorted(trees.values()))


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that compute; None where one is not installed."""
    versions: dict[str, str | None] = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def state_sha256(model: torch.nn.Module) -> str:
    """Hash of a loaded model's tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combined_sha256(parts: Iterable[str]) -> str:
    """One hash of several texts, in their order."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _is_foreign(module: str) -> bool:
    return module in ("builtins", "abc", "typing") or module.startswith(("lm_eval.", "torch."))


def _source(module: str) -> Path | None:
    """The module's file; None for one that was typed in, or has no source."""
    loaded = sys.modules.get(module)
    named = getattr(loaded, "__file__", None) if loaded is not None else getattr(find_spec(module), "origin", None)
    return Path(named) if named and Path(named).suffix == ".py" and Path(named).is_file() else None


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def check_weights(what: str, recorded: Mapping[str, str], found: Mapping[str, str], *, option: str) -> None:
    """Refuse base weights that are not those that were trained on; files may have been renamed.

    Args:
        what: what they are, for people.
        recorded: file -> sha256 when it was trained.
        found: the same, now.
        option: by which the right ones are named.

    Raises:
        UserError: naming the first that differs.
    """
    if sorted(recorded.values()) != sorted(found.values()):
        known = set(recorded.values())
        name, value = next(((n, v) for n, v in found.items() if v not in known), ("no file", ""))
        raise UserError(
            f"{what} is not the one that this was trained on: {name} has sha256 {value[:12]}, expected "
            f"{' or '.join(v[:12] for v in recorded.values())}. Name the right one by {option}=..."
        )
