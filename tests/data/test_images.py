from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from medvlm_harness.data.images import UnreadableImage, inspect_image, open_image, resolve_inside
from medvlm_harness.errors import UserError

WriteImage = Callable[..., Path]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_hash_and_size_are_of_the_files_bytes(tmp_path: Path, write_image: WriteImage, suffix: str) -> None:
    path = write_image(tmp_path / f"a{suffix}", size=(12, 10))
    info = inspect_image(path)
    assert (info.width, info.height) == (12, 10)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_image(path, expected_sha256=info.sha256).size == (12, 10)


def test_an_image_that_changed_is_refused(tmp_path: Path, write_image: WriteImage) -> None:
    path = write_image(tmp_path / "a.png")
    before = inspect_image(path).sha256
    write_image(path, seed=1)
    with pytest.raises(UnreadableImage, match=r"a\.png changed since it was prepared"):
        open_image(path, expected_sha256=before)


@pytest.mark.parametrize("tolerant", [False, True])
def test_a_truncated_image_is_refused_even_where_another_package_allows_it(
    tmp_path: Path, write_image: WriteImage, tolerant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    for suffix in (".png", ".jpg"):
        path = write_image(tmp_path / f"half{suffix}", size=(200, 200))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for read in (open_image, inspect_image):
            with pytest.raises(UnreadableImage, match="half"):
                read(path)


# 60 MP is above our limit alone; 100 MP also makes Pillow warn; 10 GP makes it raise.
@pytest.mark.parametrize("size", [(6000, 10_000), (10_000, 10_000), (100_000, 100_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(UnreadableImage, match=r"bomb\.png"):
        inspect_image(path)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_warning_made_an_error_stays_our_error(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(10_000, 10_000))
    with pytest.raises(UnreadableImage):
        inspect_image(path)


def test_only_png_and_jpeg_are_opened(tmp_path: Path, write_image: WriteImage) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "real.gif")
    (tmp_path / "real.gif").rename(tmp_path / "gif.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("gif.png", "text.png", "empty.png"):
        with pytest.raises(UnreadableImage, match=f"{name} is not a readable image: it is neither PNG nor JPEG"):
            open_image(tmp_path / name)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"none\.png cannot be read"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize(("highest", "full"), [(200, 255), (4000, 4095), (4096, 65535), (65535, 65535)])
def test_sixteen_bits_are_scaled_by_the_smallest_range_that_holds_them(tmp_path: Path, highest: int, full: int) -> None:
    values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    by_hand = [[int(v / full * 255 + 0.5) for v in row] for row in values.tolist()]
    assert image.mode == "L"
    assert np.asarray(image).tolist() == by_hand


def test_alpha_is_flattened_on_black(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (2, 2), (200, 255)).save(tmp_path / "opaque.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (0, 0, 0)
    assert open_image(tmp_path / "opaque.png").getpixel((0, 0)) == 200


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_ends_as_grey_or_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").mode in ("L", "RGB")


def test_a_transparent_palette_and_a_cmyk_jpeg_become_rgb(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (0, 0, 0)
    assert open_image(tmp_path / "c.jpg").mode == "RGB"


@pytest.mark.parametrize(
    "name", ["", " ", "../x.png", "a/../../x.png", "/etc/passwd", "C:\\x.png", "..\\x.png", "\\x.png", "a\0.png"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="below"):
        resolve_inside(tmp_path, name)


def test_links_may_stay_inside_but_not_leave(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "a.png").touch()
    (outside / "b.png").touch()
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "outer.png").symlink_to(outside / "b.png")
    (root / "folder").symlink_to(outside)
    assert resolve_inside(root, "inner.png") == root / "inner.png"
    assert resolve_inside(root, "new/c.png") == root / "new/c.png"
    for name in ("outer.png", "folder/b.png"):
        with pytest.raises(UserError, match="by a link"):
            resolve_inside(root, name)
