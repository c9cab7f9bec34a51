"""Requests as lm-eval builds them, and random images to ask about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from medvlm_harness.requests import ImageRef, LabelSet

torch.set_num_threads(1)


@pytest.fixture
def images(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., list[ImageRef]]:
    """References to `n` different images of several shapes."""

    def make(n: int, *, size: tuple[int, int] | None = None) -> list[ImageRef]:
        paths = [
            write_image(tmp_path / "images" / f"{k}.png", size=size or (40 + 7 * (k % 3), 48), seed=k) for k in range(n)
        ]
        return [ImageRef(hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in paths]

    return make


@pytest.fixture(scope="session")
def embed_requests() -> Callable[[Iterable[Any]], list[Instance]]:
    """One `embed` request per image or text."""
    return lambda arguments: [Instance("embed", {}, (argument,), k) for k, argument in enumerate(arguments)]


@pytest.fixture(scope="session")
def classify_requests() -> Callable[..., list[Instance]]:
    """One `classify` request per image; `docs` where a model reads them."""

    def make(refs: Iterable[ImageRef], labels: LabelSet, docs: list[dict[str, Any]] | None = None) -> list[Instance]:
        return [Instance("classify", docs[k] if docs else {}, (ref, labels), k) for k, ref in enumerate(refs)]

    return make
