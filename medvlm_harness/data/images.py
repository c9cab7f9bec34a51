"""Opening images that somebody else made: one read, a checked size, two formats, and errors that name the file."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile

from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.requests import ImageRef

__all__ = [
    "MAX_PIXELS",
    "ImageInfo",
    "UnreadableImage",
    "inspect_image",
    "open_image",
    "open_reference",
    "resolve_inside",
]

MAX_PIXELS = 50_000_000
"""A radiograph at full resolution has about 15 million; a 79 kB PNG can claim 81 million."""
FORMATS = ("PNG", "JPEG")
# What Pillow raises on a damaged, truncated, oversized or foreign file.
_DECODE_ERRORS = (
    OSError,  # includes UnidentifiedImageError and "image file is truncated"
    SyntaxError,  # a broken PNG chunk
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class UnreadableImage(UserError):  # noqa: N818 - a state of the file, and the name that logs show
    """A file that is missing, damaged, too large, or not the PNG or JPEG it claims to be."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is kept of an image that was decoded once: the hash of its bytes and its size in pixels."""

    sha256: str
    width: int
    height: int


def open_image(path: Path, *, expected_sha256: str | None = None) -> Image.Image:
    """Read and decode one image; the result has mode L or RGB, 8 bits per channel, pixels as stored.

    Sixteen-bit grey is scaled by a fixed rule, so that an image's brightness never depends on its own contrast: the
    smallest of 8, 12 and 16 bits that holds the image's maximum is taken as full scale, and `value / full * 255` is
    rounded. (Radiographs commonly carry 12 bits in 16.) Alpha is flattened on black; palettes become RGB.

    Args:
        path: the file; its bytes are read once, so the hash and the pixels are of the same content.
        expected_sha256: hash of the file's bytes when the set was prepared, in hexadecimal.

    Raises:
        UnreadableImage: if the file is missing, changed, truncated, above `MAX_PIXELS`, or neither PNG nor JPEG.
    """
    payload = _read(path)
    if expected_sha256 is not None and hashlib.sha256(payload).hexdigest() != expected_sha256:
        raise UnreadableImage(f"{path} changed since it was prepared: run `medvlm data prepare` again.")
    return _eight_bit(_decode(payload, path))


def open_reference(ref: ImageRef) -> Image.Image:
    """The picture as a model is to see it: mode L or RGB, 8 bits per channel, perturbed if that is asked.

    Raises:
        UnreadableImage: as `open_image`.
    """
    image = open_image(ref.path, expected_sha256=ref.file_sha256)
    return image if ref.perturbation is None else ref.perturbation(image, key=ref.file_sha256)


def inspect_image(path: Path) -> ImageInfo:
    """Decode an image fully, so that a truncated one is found now, and keep its hash and size.

    Raises:
        UnreadableImage: as `open_image`.
    """
    payload = _read(path)
    image = _decode(payload, path)
    return ImageInfo(hashlib.sha256(payload).hexdigest(), image.width, image.height)


def resolve_inside(root: Path, name: str) -> Path:
    """The path of a file named in somebody's table, which must lie below `root`; it need not exist.

    Raises:
        UserError: if the name is empty, absolute (here or on Windows), climbs with `..`, or leaves `root` by a link.
    """
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or windows.drive or windows.root
    if not name.strip() or "\0" in name or absolute or ".." in windows.parts:
        raise UserError(f"Expected a file name below {root}, but got {name!r}.")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"Expected a file below {root}, but {name!r} leads outside by a link.")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read: {error.strerror or error}.") from error


def _decode(payload: bytes, path: Path) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # Other packages switch this on for the whole process; half an image must never pass for a whole one.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(BytesIO(payload), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(
                f"{path} claims {image.width} x {image.height} pixels, above the limit of {MAX_PIXELS:,}."
            )
        image.load()
    except UnreadableImage:
        raise
    except _DECODE_ERRORS as error:
        # Pillow's text for a foreign file names the buffer's address, which says nothing.
        reason = "it is neither PNG nor JPEG" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise UnreadableImage(f"{path} is not a readable image: {reason}.") from error
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, and I in older versions of Pillow
        values = np.asarray(image, dtype=np.float64)
        full = next((limit for limit in (255.0, 4095.0) if values.max() <= limit), 65535.0)
        return Image.fromarray(np.rint(values.clip(0) / full * 255).clip(0, 255).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La"):
        return _on_black(image.convert("LA"), "L")
    if image.mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        return _on_black(image.convert("RGBA"), "RGB")
    return image.convert("RGB")


def _on_black(image: Image.Image, mode: str) -> Image.Image:
    flat = Image.new(mode, image.size)
    flat.paste(image.convert(mode), mask=image.getchannel("A"))
    return flat
