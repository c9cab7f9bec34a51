"""Blurs and lost resolution. Lengths count in pixels of an image whose shorter side is 224."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from medvlm_harness.perturbations.image.base import length_unit, to_image, to_unit

__all__ = ["blur_defocus", "blur_gaussian", "blur_motion", "compress_jpeg", "pixelate"]

MOTION_DEGREES = 45  # the direction is drawn within this angle from the horizontal, to either side


def blur_gaussian(image: Image.Image, kernel: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian whose sigma belongs to this odd width of a kernel by the rule of OpenCV and torchvision.

    sigma = 0.3 ((kernel - 1) / 2 - 1) + 0.8; the tails are not cut at the kernel's width.
    """
    sigma = 0.3 * ((kernel - 1) / 2 - 1) + 0.8
    return image.filter(ImageFilter.GaussianBlur(sigma * length_unit(image)))


def blur_defocus(image: Image.Image, level: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """Mean over a disc of a radius, its edge softened by a small Gaussian: (radius, sigma of the edge)."""
    radius, edge = (length * length_unit(image) for length in level)
    soft = max(1, round(length_unit(image)))  # the edge's kernel is three pixels wide at the tuned size
    reach = math.floor(radius) + soft
    steps = np.arange(-reach, reach + 1)
    disc = ((steps[:, None] ** 2 + steps**2) <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * edge**2))
    for axis in (0, 1):
        disc = np.apply_along_axis(np.convolve, axis, disc, taps, mode="same")
    return to_image(_convolved(to_unit(image), disc / disc.sum()))


def blur_motion(image: Image.Image, level: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """A trail to one side, of half a Gaussian: (radius, sigma); 2 radius + 1 pixels long, direction drawn."""
    unit = length_unit(image)
    radius, sigma = level
    reach = max(1, round(2 * radius * unit))
    steps = np.arange(reach + 1)
    angle = math.radians(rng.uniform(-MOTION_DEGREES, MOTION_DEGREES))
    weights = np.exp(-(steps**2) / (2 * (sigma * unit) ** 2))
    centre = reach + 1
    kernel = np.zeros((2 * centre + 1, 2 * centre + 1))
    # Each step is shared between the pixels around it: the nearest one alone would give a trail of beads.
    rows, down = np.divmod(centre + steps * math.sin(angle), 1)
    columns, across = np.divmod(centre + steps * math.cos(angle), 1)
    for row, height in ((0, 1 - down), (1, down)):
        for column, width in ((0, 1 - across), (1, across)):
            np.add.at(kernel, (rows.astype(int) + row, columns.astype(int) + column), weights * height * width)
    return to_image(_convolved(to_unit(image), kernel / kernel.sum()))


def pixelate(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Mosaic: box-reduced to this share of 224 pixels on the shorter side, and enlarged again."""
    factor = min(1.0, share / length_unit(image))
    small = image.resize([max(1, int(side * factor)) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


def compress_jpeg(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    """JPEG of this quality (1 to 95), coded at the image's own size."""
    coded = BytesIO()
    image.save(coded, "JPEG", quality=int(quality))
    decoded = Image.open(coded, formats=["JPEG"])
    decoded.load()
    return decoded.copy()  # without the file's headers


def _convolved(values: NDArray[np.float32], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convolution with a square kernel of odd width through the frequency domain; the image's edge is continued."""
    reach = kernel.shape[0] // 2
    padding = [(reach, reach), (reach, reach), (0, 0)][: values.ndim]
    padded = np.pad(values.astype(np.float64), padding, mode="edge")
    height, width = padded.shape[:2]
    transfer = np.fft.rfft2(kernel, (height, width))
    transfer = transfer.reshape(transfer.shape + (1,) * (values.ndim - 2))
    result = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * transfer, (height, width), axes=(0, 1))
    return result[2 * reach :, 2 * reach :]
