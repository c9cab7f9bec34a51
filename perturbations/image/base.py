"""What a corruption is, and how one is applied: the same bytes for the same image, whatever the order or process.

A corruption acts on the image as it was opened, before any model's preprocessing, so that every model sees the same
corrupted picture, and the image keeps its size and mode. The published severities were tuned at 224 pixels; lengths in
pixels (widths of blurs, size of mosaic cells, grain of noise) therefore count in units of the shorter side / 224, so
that a large radiograph is as damaged, seen at the size at which models see it, as a small one. JPEG alone is coded at
the image's own size, as an archive would.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvlm_harness.errors import UserError

__all__ = ["TUNED_SIZE", "Case", "Corruption", "corrupt", "identity", "length_unit", "to_image", "to_unit"]

TUNED_SIZE = 224
"""Shorter side, in pixels, at which the published severities were tuned."""
GRADES = 5
EXTRAS = {"mri": "monai"}
"""Optional extra of this package -> the library that it brings."""

Level = float | tuple[float, ...] | tuple[str, float]
Apply = Callable[[Image.Image, Any, np.random.Generator], Image.Image]


@dataclass(frozen=True, slots=True)
class Corruption:
    """One declared corruption of one modality.

    Attributes:
        name: unique within the modality.
        modality: chest, ct, fundus, oct or mri.
        levels: what `apply` takes at severities 1 to 5; a single one where there are no degrees (inversion).
        apply: (image of mode L or RGB, level, generator) -> image of the same size and mode.
        source: where the levels come from.
        control: a check on the model, not a robustness corruption: its answers should change or need not stay.
        extra: the optional extra of this package that it needs, if any.
    """

    name: str
    modality: str
    levels: tuple[Level, ...]
    apply: Apply
    source: str
    control: bool = False
    extra: str = ""

    def __post_init__(self) -> None:
        if len(self.levels) not in (1, GRADES):
            raise UserError(
                f"Corruption {self.name} needs five levels, or one if it has no degrees; it has {len(self.levels)}."
            )

    @property
    def severities(self) -> range:
        """1 to 5, or 1 alone."""
        return range(1, len(self.levels) + 1)

    def level(self, severity: int) -> Level:
        """The level of a severity.

        Raises:
            UserError: if the severity is not one of `severities`.
        """
        if isinstance(severity, bool) or not isinstance(severity, int) or severity not in self.severities:
            expected = "1 to 5" if len(self.levels) > 1 else "1 alone (it has no degrees)"
            raise UserError(f"Severity of {self.name}: expected {expected}, got {severity!r}.")
        return self.levels[severity - 1]


@dataclass(frozen=True, slots=True)
class Case:
    """A corruption at one severity: an entry of a suite, and a `requests.ImagePerturbation`."""

    corruption: Corruption
    severity: int
    seed: int = 0

    @property
    def group(self) -> str:
        """The corruption's name."""
        return self.corruption.name

    @property
    def name(self) -> str:
        """As in metric names; without the severity where there is but one."""
        return self.group if len(self.corruption.levels) == 1 else f"{self.group}_{self.severity}"

    @property
    def identity(self) -> str:
        """As the store's key holds it; see `identity`."""
        return identity(self.corruption, self.severity, seed=self.seed)

    def __call__(self, image: Image.Image, *, key: str) -> Image.Image:
        """The corrupted image; see `corrupt`."""
        return corrupt(image, self.corruption, self.severity, key=key, seed=self.seed)


def corrupt(image: Image.Image, corruption: Corruption, severity: int, *, key: str, seed: int = 0) -> Image.Image:
    """A corrupted copy of an image, of the same size and mode (8 bits per channel).

    A grey image stored as RGB is corrupted once and copied to its channels: noise drawn per channel would be averaged
    away by whoever converts it to grey.

    Args:
        image: mode L or RGB, as `open_image` gives it.
        corruption: a declared one.
        severity: 1 to 5; 1 alone where the corruption has no degrees.
        key: the image's content hash (`ImageRef`); with the corruption, the severity and the seed it decides each draw.
        seed: another one gives another draw of the same strength.

    Raises:
        UserError: for another mode, an unknown severity, an empty key, or an extra that is not installed.
    """
    level = corruption.level(severity)
    if image.mode not in ("L", "RGB"):
        raise UserError(f"Expected an image of mode L or RGB, got {image.mode}: open it with open_image.")
    if not key:
        raise UserError("Expected the image's content hash as key, got an empty text.")
    if corruption.extra:
        _extra_version(corruption.extra, corruption.name)
    named = json.dumps([key, corruption.modality, corruption.name, severity, seed])
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(named.encode()).digest())))
    if image.mode == "RGB":
        red, green, blue = image.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            return Image.merge("RGB", [corruption.apply(red, level, rng)] * 3)
    return corruption.apply(image, level, rng)


def identity(corruption: Corruption, severity: int, *, seed: int = 0) -> str:
    """The perturbation as the store's key holds it: all that decides the corrupted pixels beside the image.

    It covers the level itself and the code, so that a mended table or function answers anew. (Versions of Pillow and
    NumPy are in the model's own identity.)
    """
    parts: dict[str, object] = {"level": corruption.level(severity), "seed": seed}
    parts["code"] = _code_sha256(corruption.apply.__module__)[:16]
    if corruption.extra:
        parts[corruption.extra] = _extra_version(corruption.extra, corruption.name)
    return f"image:{corruption.modality}/{corruption.name}@{severity} {json.dumps(parts, sort_keys=True)}"


def length_unit(image: Image.Image) -> float:
    """Pixels of this image per pixel at the size at which the severities were tuned."""
    return min(image.size) / TUNED_SIZE


def to_unit(image: Image.Image) -> NDArray[np.float32]:
    """Pixels in [0, 1], (h, w) or (h, w, 3)."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def to_image(values: NDArray[np.floating]) -> Image.Image:
    """Rounded to 8 bits; values outside [0, 1] are cut."""
    return Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8))


def _extra_version(extra: str, name: str) -> str:
    library = EXTRAS[extra]
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"Corruption {name} needs {library}: install it with `pip install 'medvlm-harness[{extra}]'`."
        ) from None


@cache
def _code_sha256(module: str) -> str:
    """Hash of the module of a function and of this one; comments and layout do not count."""
    files = [Path(str(sys.modules[name].__file__)) for name in (__name__, module)]
    trees = "".join(ast.dump(ast.parse(file.read_bytes())) for file in files)
    return hashlib.sha256(trees.encode()).hexdigest()
