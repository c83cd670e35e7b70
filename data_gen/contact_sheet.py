"""A picture of the first samples of a dataset: target, cut-out reference and caption of each."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bootpig_jax.data.records import Record, decode_mask, decode_picture
from bootpig_jax.errors import UserError

_SIDE = 144  # pixels of a picture on the sheet
_TEXT_HEIGHT = 44
_GAP = 6
_FONT_SIZE = 11
_LETTERS_A_LINE = 48  # what two pictures side by side leave room for, in this font size
_COLUMNS = 6


def write_contact_sheet(path: Path, records: Sequence[Record]) -> None:
    """Writes a PNG that shows `records`, in rows of six.

    Args:
      path: the PNG. It is replaced if it is there.
      records: at least one.

    Raises:
      UserError: it cannot be written.
    """
    columns = min(_COLUMNS, len(records))
    rows = -(-len(records) // columns)
    width, height = 2 * _SIDE + _GAP, _SIDE + _TEXT_HEIGHT
    size = (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, (232, 232, 232))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, record in enumerate(records):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (width + _GAP), _GAP + row * (height + _GAP)
        target = decode_picture(record.target, where=record.id)
        mask = decode_mask(record.mask, where=record.id)
        reference = np.where(mask[..., None], target, np.uint8(255))
        sheet.paste(_fitted(target), (x, y))
        sheet.paste(_fitted(reference), (x + _SIDE + _GAP, y))
        lines = textwrap.wrap(record.caption, _LETTERS_A_LINE)[:3]
        draw.text((x, y + _SIDE + 2), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=2)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        sheet.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _fitted(picture: np.ndarray) -> Image.Image:
    """Returns the picture scaled to a square of the sheet."""
    small = picture.shape[0] < _SIDE
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((_SIDE, _SIDE), method)
