"""What happens to grey values alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["change_brightness", "change_contrast", "change_gamma", "change_window", "invert"]


def change_brightness(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Values times a factor, cut at white."""
    return ImageEnhance.Brightness(image).enhance(factor)


def change_contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Distance from the image's mean grey times a factor."""
    return ImageEnhance.Contrast(image).enhance(factor)


def change_gamma(image: Image.Image, gamma: float, rng: np.random.Generator) -> Image.Image:
    """X to the power of gamma: above 1 darker, below 1 lighter."""
    return _mapped(image, (np.arange(256) / 255) ** gamma)


def change_window(image: Image.Image, level: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """A narrower display window: (distance of its centre from mid-grey, up or down as drawn; its width)."""
    shift, width = level
    low = 0.5 + (shift if rng.random() < 0.5 else -shift) - width / 2
    return _mapped(image, (np.arange(256) / 255 - low) / width)


def invert(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """The negative: MONOCHROME1 read as MONOCHROME2."""
    return ImageOps.invert(image)


def _mapped(image: Image.Image, values: NDArray[np.float64]) -> Image.Image:
    """Each grey value replaced by that of a table of 256 in [0, 1]."""
    table = np.rint(values.clip(0, 1) * 255).astype(int).tolist()
    return image.point(table * len(image.getbands()))
