"""What is done to every picture before a model's own preprocessing: `preprocessing=published`, `task`, or its parts.

Publications crop, pad or squash an image to their square, and window grey values or do not, so the same file is another
picture for each of them. `published` changes nothing: each model sees what its publication shows it. `task` gives all
models the same picture. Parts joined by `+` take this apart: `crop`, `pad+window1-99`, `squash+64px`.

| part         | what it does                                                                                       |
|--------------|----------------------------------------------------------------------------------------------------|
| `squash`     | to the square of the longer side, the aspect ratio lost                                            |
| `pad`        | to the square of the longer side, centred on black                                                 |
| `crop`       | the square of the shorter side from the middle; what is outside is lost                            |
| `windowA-B`  | grey values from the A-th to the B-th percentile of the image become 0 to 255                      |
| `Npx`        | what N pixels on the longer side can hold: reduced to that, and put back to the size that it had   |
| `task`       | the same as `pad`: nothing is lost, nothing is out of shape                                        |

What follows is the model's own: its resolution, its normalisation. On a square image its own crop, pad or squash does
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from medvlm_harness.errors import UserError

__all__ = ["AS_PUBLISHED", "ImagePreparation", "find_preparation"]

Aspect = Literal["squash", "pad", "crop"]
ASPECTS: Mapping[str, Aspect] = {one: one for one in get_args(Aspect)}
PUBLISHED, TASK = "published", "task"
_WINDOW = re.compile(r"window(\d{1,2}(?:\.\d+)?)-(\d{1,3}(?:\.\d+)?)")
_PIXELS = re.compile(r"(\d+)px")


@dataclass(frozen=True, slots=True)
class ImagePreparation:
    """What is done to a picture, in the order of the fields; nothing by default."""

    window: tuple[float, float] | None = None  # percentiles of the image's grey values, in [0, 100]
    aspect: Aspect | None = None
    pixels: int | None = None  # on the longer side

    def __str__(self) -> str:
        window = None if self.window is None else f"window{self.window[0]:g}-{self.window[1]:g}"
        parts = (self.aspect, window, None if self.pixels is None else f"{self.pixels}px")
        return "+".join(part for part in parts if part) or PUBLISHED

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture that the model's own preprocessing is given; mode L or RGB, as it was."""
        if self.window is not None:
            image = _windowed(image, *self.window)
        if self.aspect is not None:
            image = _square(image, self.aspect)
        if self.pixels is not None and self.pixels < max(image.size):
            scale = self.pixels / max(image.size)
            small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            reduced = image.resize(small, Image.Resampling.BOX)
            image = reduced.resize(image.size, Image.Resampling.BICUBIC)
        return image


AS_PUBLISHED = ImagePreparation()


def find_preparation(asked: str | None) -> ImagePreparation:
    """What `preprocessing=` asks for.

    Raises:
        UserError: for a part that there is none of, two of one kind, or a window without width.
    """
    if asked is None or asked == PUBLISHED:
        return AS_PUBLISHED
    if asked == TASK:
        return ImagePreparation(aspect="pad")
    window: tuple[float, float] | None = None
    aspect: Aspect | None = None
    pixels: int | None = None
    for part in str(asked).split("+"):
        as_window, as_pixels = _WINDOW.fullmatch(part), _PIXELS.fullmatch(part)
        if part in ASPECTS and aspect is None:
            aspect = ASPECTS[part]
        elif as_window and window is None:
            window = float(as_window[1]), float(as_window[2])
        elif as_pixels and pixels is None:
            pixels = int(as_pixels[1])
        else:
            raise UserError(
                f"Expected preprocessing to be {PUBLISHED}, {TASK}, or parts joined by +, one of each kind (squash, "
                f"pad or crop; window1-99; 128px), but got {asked!r}."
            )
    if window is not None and not window[0] < window[1] <= 100:
        raise UserError(f"Expected a window from a lower to a higher percentile up to 100, but got {asked!r}.")
    if pixels is not None and pixels < 1:
        raise UserError(f"Expected a resolution of 1 pixel or more, but got {asked!r}.")
    return ImagePreparation(window, aspect, pixels)


def _windowed(image: Image.Image, low: float, high: float) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    grey = values if values.ndim == 2 else values.mean(axis=2)  # one window for all channels: colours stay
    darkest, brightest = np.percentile(grey, (low, high))
    if brightest <= darkest:
        return image  # one shade has no contrast to stretch
    return Image.fromarray(np.rint((values - darkest) / (brightest - darkest) * 255).clip(0, 255).astype(np.uint8))


def _square(image: Image.Image, aspect: Aspect) -> Image.Image:
    short, long = sorted(image.size)
    if short == long:
        return image
    if aspect == "squash":
        return image.resize((long, long), Image.Resampling.BICUBIC)
    if aspect == "crop":
        left, top = (image.width - short) // 2, (image.height - short) // 2
        return image.crop((left, top, left + short, top + short))
    canvas = Image.new(image.mode, (long, long))
    canvas.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return canvas
