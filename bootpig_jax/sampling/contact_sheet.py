"""One picture that shows them all: a row for each prompt, references on the left."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 8
FONT_SIZE = 13
LINE = 17
LETTER = 6.8  # a little more than the default font's average width at this size
MAX_LINES = 3
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a sheet.

    Attributes:
        caption: stands above the row.
        cells: the pictures of each column; several share a cell as tiles, none leave it empty.
    """

    caption: str
    cells: Sequence[Sequence[Image.Image]]


def contact_sheet(
    rows: Sequence[Row], titles: Sequence[str] = (), cell: int | None = None
) -> Image.Image:
    """Draws rows of pictures with captions.

    Args:
        rows: at least one; they may differ in length.
        titles: of the columns; none for a sheet without.
        cell: width and height of a cell in pixels; by default that of the largest picture, between
            128 and 256.

    Returns:
        The sheet, in RGB.
    """
    pictures = [picture for row in rows for tiles in row.cells for picture in tiles]
    if cell is None:
        largest = max((max(picture.size) for picture in pictures), default=128)
        cell = min(max(largest, 128), 256)
    columns = max(len(titles), *(len(row.cells) for row in rows))
    width = GAP + columns * (cell + GAP)
    captions = [_wrap(row.caption, width - 2 * GAP) for row in rows]
    heights = [len(lines) * LINE + cell + 2 * GAP for lines in captions]
    top = GAP + (LINE if titles else 0)

    sheet = Image.new("RGB", (width, top + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    left = [GAP + column * (cell + GAP) for column in range(columns)]
    for x, title in zip(left, titles, strict=False):
        draw.text((x, GAP // 2), _wrap(title, cell)[0], INK, font)
    for row, lines, height in zip(rows, captions, heights, strict=True):
        for number, line in enumerate(lines):
            draw.text((GAP, top + number * LINE), line, INK, font)
        for x, tiles in zip(left, row.cells, strict=False):
            _paste_tiles(sheet, tiles, x, top + len(lines) * LINE + GAP // 2, cell)
        top += height
    return sheet


def _paste_tiles(
    sheet: Image.Image, tiles: Sequence[Image.Image], x: int, y: int, cell: int
) -> None:
    """Pastes pictures into a square cell, in a grid if there are several."""
    side = math.ceil(math.sqrt(len(tiles)))
    for number, picture in enumerate(tiles):
        tile = cell // side
        scale = tile / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        # Enlarged pixels stay pixels: a small model's pictures should not look blurred.
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        position = (x + number % side * tile, y + number // side * tile)
        sheet.paste(picture.convert("RGB").resize(size, method), position)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of about `width` pixels, `MAX_LINES` at most; never none."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    letters = max(8, int(width / LETTER))
    lines = textwrap.wrap(printable, letters, max_lines=MAX_LINES, placeholder=" ...")
    return lines or [""]
