"""A subject with four corners of different colours, and a word for how a picture shows it.

Whatever mirrors, turns, transposes or recolours a picture changes the word: `UPRIGHT` as it is,
"GRYB" mirrored, "BYRG" upside down, "BGRC" with red and blue exchanged.
"""

import numpy as np
from PIL import Image

UPRIGHT, MIRRORED = "RGBY", "GRYB"
COLOURS = {
    "R": (220, 30, 30),
    "G": (30, 180, 40),
    "B": (30, 40, 220),
    "Y": (230, 210, 30),
    "C": (30, 210, 230),
    "M": (210, 30, 200),
}
GREY = 128
BOX = np.s_[12:36, 20:52]  # neither square nor in the middle
SIDE = 64


def scene() -> tuple[np.ndarray, np.ndarray]:
    """The subject before a grey ground, 64 pixels square, and its mask."""
    picture, mask = np.full((SIDE, SIDE, 3), GREY, np.uint8), np.zeros((SIDE, SIDE), bool)
    mask[BOX] = True
    subject = picture[BOX]
    height, width = subject.shape[0] // 2, subject.shape[1] // 2
    subject[:height, :width], subject[:height, width:] = COLOURS["R"], COLOURS["G"]
    subject[height:, :width], subject[height:, width:] = COLOURS["B"], COLOURS["Y"]
    return picture, mask


def read(picture: np.ndarray | Image.Image) -> str:
    """The colours of the subject's corners: top left, top right, bottom left, bottom right.

    Args:
        picture: pixels in 0..255, or floats in [-1, 1]; all but the subject is white or grey.
    """
    pixels = np.asarray(picture)
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = (pixels + 1) * 127.5
    pixels = pixels.astype(float)
    coloured = np.ptp(pixels, axis=-1) > 60
    rows, columns = np.flatnonzero(coloured.any(axis=1)), np.flatnonzero(coloured.any(axis=0))
    assert len(rows) and len(columns), "there is no subject"
    points = [
        pixels[row, column]
        for row in np.quantile(rows, [0.25, 0.75]).astype(int)
        for column in np.quantile(columns, [0.25, 0.75]).astype(int)
    ]
    return "".join(
        min(COLOURS, key=lambda name: np.abs(COLOURS[name] - point).sum())  # noqa: B023 - at once
        for point in points
    )


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The rows and columns of a file whose EXIF orientation is as given, from 1 to 8.

    The standard says at which visual side row 0 and column 0 lie: 1 top and left, 2 top and right,
    3 bottom and right, 4 bottom and left; then with the two exchanged, 5 left and top, 6 right and
    top, 7 right and bottom, 8 left and bottom.
    """
    if orientation in (2, 3, 6, 7):
        upright = upright[:, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    return upright if orientation <= 4 else upright.swapaxes(0, 1)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags
