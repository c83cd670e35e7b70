"""Picture files of unknown origin, read safely and brought to one form.

A picture that somebody else made may be cut short, may be no picture at all, or may be a few
kilobytes that fill the memory when decoded. So a file is read in steps, each of which can refuse
it: the header (one of `FORMATS`, and no other decoder is ever tried), its size in pixels, the
number of frames, and only then the pixels. What is refused raises `PictureError`, whose `reason`
is one word to count by.

`to_rgb` then makes upright 8-bit RGB of every colour mode, and `square` cuts and resizes it.
This module imports neither jax nor torch: sampling and data generation share it.
"""

from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000  # beyond this a small file can fill the memory when decoded
MIN_SIDE = 8
WHITE = 255

Reason = Literal[
    "format", "too_many_pixels", "low_resolution", "too_long", "animated", "damaged", "colour_mode"
]
REASONS: tuple[str, ...] = get_args(Reason)


class PictureError(Exception):
    """A picture that is not used; its message is one line, without the picture's name."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Keeps the reason, by which refused pictures are counted."""
        super().__init__(message)
        self.reason = reason


def open_picture(
    source: Path | BinaryIO, *, min_side: int = MIN_SIDE, max_aspect: float = float("inf")
) -> Image.Image:
    """Opens and decodes a picture file, in the colour mode and orientation it has.

    Args:
      source: a path, or a file that is open for reading.
      min_side: pixels that the shorter side must have.
      max_aspect: how many times the shorter side the longer one may be.

    Raises:
      PictureError: it is of another format than `FORMATS`, damaged, animated, too small, too long
        or too large.
      OSError: the path cannot be opened.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return open_picture(file, min_side=min_side, max_aspect=max_aspect)
    try:
        image = Image.open(source, formats=FORMATS)
        check_size(image, min_side=min_side, max_aspect=max_aspect)
        # Phones write a JPEG and, behind it, a preview or a gain map: "MPO". Its first is meant.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise PictureError("animated", "has several frames; use a single picture")
        image.load()
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        if _begins_like_a_picture(source):
            detail = "its header is damaged, or its colours are of an uncommon kind: save it as PNG"
            raise PictureError("damaged", f"cannot be read ({detail})") from None
        raise PictureError("format", f"is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels() from None
    except Exception as error:  # decoders raise all kinds on damaged files
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PictureError("damaged", f"cannot be read ({detail})") from None
    return image


def check_size(
    image: Image.Image, *, min_side: int = MIN_SIDE, max_aspect: float = float("inf")
) -> None:
    """Refuses a picture by its header, before it is decoded.

    Raises:
      PictureError: a side is too short, one is too long for the other, or there are too many
        pixels.
    """
    short, long = sorted(image.size)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels()
    if long > short * max_aspect:
        raise PictureError("too_long", f"{width}x{height} is too long; {max_aspect} is the most")
    if short < min_side:
        raise PictureError(
            "low_resolution", f"{width}x{height} is too small; {min_side} is the least"
        )


def to_rgb(
    image: Image.Image,
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"] | None]:
    """Upright RGB pixels on white, and the alpha channel if the picture has one.

    EXIF rotation is applied, 16 bits are scaled to 8, palettes, grey and CMYK become RGB.

    Raises:
      PictureError: the colour mode has no agreed conversion, such as floating point.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, not a damaged picture: shown as it is stored
        pass
    if image.mode.startswith("I"):
        # 16 bits: PIL's own conversion would saturate.
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.mode in ("F", "LAB", "HSV"):
        raise PictureError("colour_mode", f"has colours of the kind {image.mode}; save it as RGB")
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")), None
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (WHITE, WHITE, WHITE, 255))
    on_white = Image.alpha_composite(canvas, rgba).convert("RGB")
    return np.asarray(on_white), np.asarray(rgba.getchannel("A"))


def square(rgb: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The largest centred square of a picture, resized (bicubic, antialiased) to `side` pixels."""
    height, width = rgb.shape[:2]
    if (height, width) == (side, side):
        return rgb
    shorter = min(height, width)
    left, top = (width - shorter) // 2, (height - shorter) // 2
    box = (left, top, left + shorter, top + shorter)
    return np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC, box))


def _begins_like_a_picture(file: BinaryIO) -> bool:
    file.seek(0)
    prefix = file.read(16)
    return any(accept and accept(prefix) for _, accept in (Image.OPEN[name] for name in FORMATS))


def _too_many_pixels() -> PictureError:
    message = f"more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller"
    return PictureError("too_many_pixels", message)
