"""Position, field of view, and what is drawn over the picture. What lies outside the image is black."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

__all__ = ["add_border", "burn_marker", "crop", "flip", "rotate", "tilt"]

WHITE = 255
MARKER_MARGIN = 0.03  # of the shorter side


def rotate(image: Image.Image, degrees: float, rng: np.random.Generator) -> Image.Image:
    """Turned about the centre, to the side that is drawn."""
    sign = 1 if rng.random() < 0.5 else -1
    return image.rotate(sign * degrees, Image.Resampling.BILINEAR)


def tilt(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Seen at an angle: one side, as drawn, recedes: both its corners move inwards by this share of its length."""
    width, height = image.size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    seen = corners.copy()
    first = int(rng.integers(4))
    second = (first + 1) % 4
    seen[first] += share * (corners[second] - corners[first])
    seen[second] += share * (corners[first] - corners[second])
    data = tuple(_perspective(seen, corners).tolist())
    return image.transform(image.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR)


def crop(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """A smaller field of view: this share is lost at each side, and the rest enlarged to the image's size."""
    width, height = image.size
    box = (share * width, share * height, (1 - share) * width, (1 - share) * height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def add_border(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """A collimator's black border over this share of the image at each side."""
    width, height = image.size
    across, down = round(share * width), round(share * height)
    result = Image.new(image.mode, image.size)
    result.paste(image.crop((across, down, width - across, height - down)), (across, down))
    return result


def burn_marker(image: Image.Image, level: tuple[str, float], rng: np.random.Generator) -> Image.Image:
    """White text with a black outline in a corner: (text, its size as a share of the shorter side).

    The text "side" is R in the image's left half or L in its right half, as drawn: what a frontal radiograph shows
    there, so that the marker never contradicts the anatomy.
    """
    text, share = level
    left, top = bool(rng.integers(2)), bool(rng.integers(2))
    if text == "side":
        text = "R" if left else "L"
    short = min(image.size)
    margin = round(MARKER_MARGIN * short)
    place = (margin if left else image.width - margin, margin if top else image.height - margin)
    result = image.copy()
    draw = ImageDraw.Draw(result)
    size = max(1.0, share * short)
    draw.text(
        place,
        text,
        fill=(WHITE,) * len(image.getbands()),
        font=ImageFont.load_default(size),
        anchor=("l" if left else "r") + ("t" if top else "b"),
        stroke_width=max(1, round(size / 14)),  # without it a marker on the white abdomen could not be seen
        stroke_fill=(0,) * len(image.getbands()),
    )
    return result


def flip(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


def _perspective(seen: NDArray[np.float64], source: NDArray[np.float64]) -> NDArray[np.floating]:
    """Pillow's eight coefficients of the projective map from four points of the result to four of the source, (4, 2).

    u = (a x + b y + c) / (g x + h y + 1), v = (d x + e y + f) / (g x + h y + 1).
    """
    rows = []
    for (x, y), (u, v) in zip(seen, source, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return np.linalg.solve(np.array(rows), source.reshape(8))
