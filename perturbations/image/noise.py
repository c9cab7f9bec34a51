"""Noise, drawn on a grid whose cell is one pixel at the size at which the strengths were tuned.

On a larger image a cell is a block of whole pixels: noise per pixel would be averaged away when a model resizes it.
Strengths are in units of the full range [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvlm_harness.perturbations.image.base import length_unit, to_image, to_unit

__all__ = ["add_gaussian_noise", "add_impulse_noise", "add_shot_noise", "add_speckle_noise"]


def add_gaussian_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """X + N(0, sigma)."""
    values = to_unit(image)
    cells = _cells(image, values)
    return to_image(values + _enlarged(rng.standard_normal(cells.shape, np.float32), image) * np.float32(sigma))


def add_speckle_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """X + x N(0, sigma)."""
    values = to_unit(image)
    cells = _cells(image, values)
    return to_image(
        values + values * _enlarged(rng.standard_normal(cells.shape, np.float32), image) * np.float32(sigma)
    )


def add_impulse_noise(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Salt and pepper: this share of the cells, half of them black and half white."""
    values = to_unit(image)
    drawn = _enlarged(rng.random(_cells(image, values).shape, np.float32), image)
    values = np.where(drawn < share / 2, np.float32(0), values)
    return to_image(np.where(drawn >= 1 - share / 2, np.float32(1), values))


def add_shot_noise(image: Image.Image, photons: float, rng: np.random.Generator) -> Image.Image:
    """Poisson noise of a white cell that counts this many photons: fewer photons, more noise."""
    values = to_unit(image)
    cells = _cells(image, values)
    counted = rng.poisson(cells * photons).astype(np.float32) / np.float32(photons)
    return to_image(values + _enlarged(counted - cells, image))


def _grain(image: Image.Image) -> int:
    return max(1, round(length_unit(image)))


def _cells(image: Image.Image, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """One pixel of each cell of the grid."""
    grain = _grain(image)
    return values[::grain, ::grain]


def _enlarged(cells: NDArray[np.float32], image: Image.Image) -> NDArray[np.float32]:
    grain = _grain(image)
    if grain == 1:
        return cells
    return cells.repeat(grain, axis=0).repeat(grain, axis=1)[: image.height, : image.width]
