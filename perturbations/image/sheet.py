"""The contact sheet: what each corruption does to one image, to be looked at before its figures are believed."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from medvlm_harness.perturbations.image.base import Corruption, Level, corrupt

__all__ = ["contact_sheet"]

CELL = 192  # longer side of a picture on the sheet, pixels
GAP = 8
CAPTION = 18  # height of the line above a picture
FONT = 13
LABEL_WIDTH = 150
PAPER, INK, FAINT = (255, 255, 255), (0, 0, 0), (110, 110, 110)


def contact_sheet(
    image: Image.Image, corruptions: Sequence[Corruption], severities: Sequence[int], *, key: str, seed: int = 0
) -> Image.Image:
    """One row per corruption: the clean image, then each severity, with its level above.

    Corruption acts at the image's own size; only what is shown is reduced. A corruption without degrees fills the
    first column and leaves the others empty.

    Args:
        image: mode L or RGB.
        corruptions: the rows.
        severities: the columns after the clean one, each 1 to 5.
        key: the image's content hash.
        seed: of the draws.

    Raises:
        UserError: as `corrupt`.
    """
    shown = min(1.0, CELL / max(image.size))
    size = (max(1, round(image.width * shown)), max(1, round(image.height * shown)))
    step = (size[0] + GAP, size[1] + CAPTION + GAP)
    origin = (LABEL_WIDTH + GAP, CAPTION + 2 * GAP)
    columns = 1 + len(severities)
    sheet = Image.new("RGB", (origin[0] + columns * step[0], origin[1] + len(corruptions) * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT)

    for column, heading in enumerate(["clean", *(f"severity {severity}" for severity in severities)]):
        draw.text((origin[0] + column * step[0], GAP), heading, fill=INK, font=font)
    for row, corruption in enumerate(corruptions):
        top = origin[1] + row * step[1]
        about = f"{corruption.name}\n{'control' if corruption.control else corruption.source.replace(', ', chr(10))}"
        draw.multiline_text((GAP, top + CAPTION), about, fill=INK, font=font)
        cells: list[tuple[str, Image.Image]] = [("", image)]
        graded = len(corruption.levels) > 1
        for severity in severities if graded else (1,):
            caption = _text(corruption.level(severity)) if graded else "no degrees"
            cells.append((caption, corrupt(image, corruption, severity, key=key, seed=seed)))
        for column, (caption, picture) in enumerate(cells):
            left = origin[0] + column * step[0]
            draw.text((left, top), caption, fill=FAINT, font=font)
            sheet.paste(picture.resize(size, Image.Resampling.BOX), (left, top + CAPTION))
    return sheet


def _text(level: Level) -> str:
    return ", ".join(map(str, level)) if isinstance(level, tuple) else str(level)
