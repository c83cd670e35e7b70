"""The pixels of inpainting and of image to image: what the model sees, and pasting back.

A user's picture has any size, the model draws one. So the model is given a *window* of the
picture, which has the shape that the model draws, and what it draws is put back where the window
was. With a mask the window is twice as large as the mask's bounding box, so that there is something
to see around what is drawn, but covers at least as many pixels as the model draws, so that nothing
is magnified; both only as far as the picture goes. Where even the largest window of that shape in
the picture does not hold the mask, it reaches over the picture's edge, whose pixels are repeated.
Without a mask it is the largest centred window.

Decoding changes every pixel a little, also far from the mask. Hence the paste: pixels outside the
mask are the picture's own, bit for bit, and the seam is blended inside the mask.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from bootpig_jax.data.pictures import PictureError, check_size, to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.references import open_reference

CONTEXT = 2.0  # how many times as long as the mask's box the window is
FEATHER = 8  # width of the blended seam, in pixels of what the model draws: one of its latents


@dataclass(frozen=True)
class Window:
    """A part of a picture, in its pixels; it may reach over the edges."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Original:
    """A picture to be changed, and where.

    Attributes:
        pixels: upright RGB; what was transparent is white.
        mask: True where something new is drawn; None for the whole picture.
        window: what the model sees of it.
        height: of what the model draws, in pixels.
        width: likewise.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "H W"] | None
    window: Window
    height: int
    width: int

    def view(self) -> Float32[np.ndarray, "h w 3"]:
        """The window as the model sees it, in [-1, 1]."""
        window = _cut(self.pixels, self.window, cv2.BORDER_REPLICATE)
        resized = Image.fromarray(window).resize(
            (self.width, self.height), Image.Resampling.BICUBIC
        )
        return np.asarray(resized).astype(np.float32) / 127.5 - 1

    def latent_mask(self, factor: int) -> Float32[np.ndarray, "h w 1"]:
        """Which latents are drawn anew: 1 for those under which at least one masked pixel lies.

        Args:
            factor: how many pixels of what the model draws are one latent, in either direction.

        Raises:
            ValueError: there is no mask.
        """
        if self.mask is None:
            raise ValueError("without a mask there are no kept latents")
        window = _cut(self.mask.astype(np.uint8), self.window, cv2.BORDER_CONSTANT)
        rows = _overlaps(self.height // factor, self.window.height)
        columns = _overlaps(self.width // factor, self.window.width)
        touched = rows @ window.astype(np.float32) @ columns.T > 0
        return touched[..., None].astype(np.float32)

    def paste(self, drawn: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H2 W2 3"]:
        """Puts what the model has drawn back into the picture.

        Returns:
            The picture in its own size, changed inside the mask only; without a mask `drawn`.
        """
        if self.mask is None:
            return drawn
        size = self.window.width, self.window.height
        resized = np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC))
        top, left, height, width = _inside(self.window, self.pixels.shape)
        rows, columns = top - self.window.top, left - self.window.left
        new = resized[rows : rows + height, columns : columns + width].astype(np.float32)

        box = np.s_[top : top + height, left : left + width]
        alpha = feathered(self.mask, FEATHER * self.window.width / self.width)[box][..., None]
        old = self.pixels[box]
        result = self.pixels.copy()
        result[box] = np.where(alpha > 0, np.rint(old + alpha * (new - old)), old)
        return result


def open_original(path: str | Path, name: str = "image") -> Image.Image:
    """Opens and decodes a picture or a mask.

    Args:
        path: of the file.
        name: of the option, for errors.

    Raises:
        UserError: it is missing or refused (see `bootpig_jax.data.pictures`).
    """
    return open_reference(path, name)


def make_original(
    image: Image.Image, mask: Image.Image | None, height: int, width: int
) -> Original:
    """Reads a picture and its mask, and chooses the window.

    Args:
        image: see `read_original`.
        mask: likewise.
        height: of what the model draws, in pixels.
        width: likewise.

    Raises:
        UserError: as `read_original`.
    """
    pixels, drawn = read_original(image, mask)
    if drawn is None:
        size = _largest_window(pixels.shape, height, width)
        return Original(pixels, None, _centred(size, pixels.shape), height, width)
    return Original(pixels, drawn, find_window(drawn, height, width), height, width)


def read_original(
    image: Image.Image, mask: Image.Image | None
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"] | None]:
    """The pixels of a picture, and where they are drawn anew.

    Args:
        image: any picture; EXIF rotation is applied, alpha composited on white.
        mask: white where something new is drawn, black (or transparent) where nothing changes; of
            any colour mode and of the picture's size. Grey counts as what it is nearer to.

    Raises:
        UserError: a picture is too small or too large or of a colour mode without a conversion;
            the mask is of another size than the picture, empty, or covers all of it.
    """
    pixels, _ = _read(image, "image")
    if mask is None:
        return pixels, None
    drawn = read_mask(mask)
    if drawn.shape != pixels.shape[:2]:
        raise UserError(
            f"mask: is {drawn.shape[1]}x{drawn.shape[0]} pixels and the image "
            f"{pixels.shape[1]}x{pixels.shape[0]}; they must have the same size"
        )
    if not drawn.any():
        raise UserError("mask: has no white pixel, so nothing would be drawn")
    if drawn.all():
        raise UserError("mask: is white everywhere, so nothing would be kept; leave it out")
    return pixels, drawn


def read_mask(mask: Image.Image) -> Bool[np.ndarray, "h w"]:
    """True where a mask is nearer to white than to black; transparent counts as black.

    Raises:
        UserError: it is too small or too large or of a colour mode without a conversion.
    """
    on_white, alpha = _read(mask, "mask")
    grey = np.asarray(Image.fromarray(on_white).convert("L")).astype(np.int16)
    if alpha is not None:
        grey = grey - (255 - alpha.astype(np.int16))  # composited on black instead
    return grey >= 128


def find_window(mask: Bool[np.ndarray, "h w"], height: int, width: int) -> Window:
    """The window for a mask; see the module's docstring.

    Args:
        mask: not empty.
        height: of what the model draws.
        width: likewise; the window has nearly this aspect ratio.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    # In units of what the model draws.
    needed = max(box[0] / height, box[1] / width)
    largest = min(mask.shape[0] / height, mask.shape[1] / width)
    scale = max(needed, min(largest, max(CONTEXT * needed, 1.0)))
    size = max(box[0], round(scale * height)), max(box[1], round(scale * width))
    centre = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    top, left = (
        _place(middle, length, whole)
        for middle, length, whole in zip(centre, size, mask.shape, strict=True)
    )
    return Window(top, left, *(int(side) for side in size))


def feathered(mask: Bool[np.ndarray, "h w"], width: float) -> Float32[np.ndarray, "h w"]:
    """How much of the new picture to take: 0 outside the mask, rising to 1 inside it.

    Args:
        mask: True inside.
        width: over how many pixels it rises; half the mask's inner radius at most, so that a thin
            mask is not lost.
    """
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    steps = max(1.0, min(width, float(distance.max()) / 2))
    return np.minimum(distance / steps, 1.0).astype(np.float32)


def _read(
    image: Image.Image, name: str
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"] | None]:
    try:
        check_size(image)
        return to_rgb(image)
    except PictureError as error:
        raise UserError(f"{name}: {error}") from None


def _largest_window(shape: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    scale = min(shape[0] / height, shape[1] / width)
    return max(1, round(scale * height)), max(1, round(scale * width))


def _centred(size: tuple[int, int], shape: tuple[int, ...]) -> Window:
    return Window((shape[0] - size[0]) // 2, (shape[1] - size[1]) // 2, *size)


def _place(middle: float, length: int, whole: int) -> int:
    """Where a window begins: centred on the mask, but inside the picture if it fits there."""
    if length > whole:
        return (whole - length) // 2
    return min(max(0, round(middle - length / 2)), whole - length)


def _inside(window: Window, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The part of a window that lies in the picture: top, left, height and width."""
    top, left = max(0, window.top), max(0, window.left)
    bottom = min(shape[0], window.top + window.height)
    right = min(shape[1], window.left + window.width)
    return top, left, bottom - top, right - left


def _cut(picture: np.ndarray, window: Window, border: int) -> np.ndarray:
    """The window's pixels; `border` says what is beyond the edges (0 if constant)."""
    top, left, height, width = _inside(window, picture.shape)
    above, before = top - window.top, left - window.left
    below, after = window.height - height - above, window.width - width - before
    part = np.ascontiguousarray(picture[top : top + height, left : left + width])
    return cv2.copyMakeBorder(part, above, below, before, after, border)


def _overlaps(cells: int, pixels: int) -> Float32[np.ndarray, "cells pixels"]:
    """1 where a cell and a pixel overlap, if both divide the same length evenly."""
    cell, pixel = np.arange(cells)[:, None], np.arange(pixels)[None]
    overlap = (pixel * cells < (cell + 1) * pixels) & ((pixel + 1) * cells > cell * pixels)
    return overlap.astype(np.float32)
