"""The reference picture, built from a target picture and its mask when a record is loaded.

Every variant cuts the subject out and puts it on white:

| kind      | longest side / canvas   | place        | flip  | further                          |
|-----------|-------------------------|--------------|-------|----------------------------------|
| `none`    | as in the target        | as in target | -     | -                                |
| `paper`   | uniform in [0.45, 0.95] | random       | p 0.5 | -                                |
| `release` | 1 (as large as fits)    | random       | p 0.5 | colour jitter p 0.1, erasing 0.4 |

The paper resizes "randomly" and names no range. Ours keeps the subject large enough to show its
details at 64 px and small enough for its place to vary.

Resizing. The cut-out is put on white *before* it is resized. A linear filter then computes, at
every pixel of the edge, coverage * subject + (1 - coverage) * white: edges are smooth, and nothing
of the old background leaks in, because the hard mask has already replaced it. Area averaging
shrinks without aliasing; bilinear interpolation enlarges without the overshoot that cubic kernels
leave on white.

All functions are pure: they take a `numpy` generator and change no argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

AugmentationKind = Literal["none", "paper", "release"]

WHITE = 255
_LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow and torchvision


@dataclass(frozen=True)
class Augmentation:
    """How a reference varies.

    Attributes:
      scale: range of the subject's longest side, as a fraction of the canvas.
      flip_probability: of a horizontal flip.
      jitter_probability: of `colour_jitter`.
      erase_probability: of `erase`.
    """

    scale: tuple[float, float]
    flip_probability: float = 0.5
    jitter_probability: float = 0.0
    erase_probability: float = 0.0


PAPER = Augmentation(scale=(0.45, 0.95))
RELEASE = Augmentation(scale=(1.0, 1.0), jitter_probability=0.1, erase_probability=0.4)


def build_reference(
    picture: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    size: int,
    kind: AugmentationKind,
) -> UInt8[np.ndarray, "size size 3"]:
    """Builds a reference picture; see the module's table.

    Args:
      picture: the target picture, square, at least `size` wide.
      mask: True on the subject; not empty.
      rng: the source of all randomness; `none` draws nothing from it.
      size: height and width of the canvas in pixels.
      kind: the row of the table.
    """
    if kind == "none":
        return resize_square(cut_out(picture, mask), size)
    return augment_reference(
        picture, mask, rng, size=size, how={"paper": PAPER, "release": RELEASE}[kind]
    )


def augment_reference(
    picture: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    rng: np.random.Generator,
    *,
    size: int,
    how: Augmentation,
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes, flips and places the subject at random on a white canvas, as `how` says."""
    box = bounding_slices(mask)
    subject = cut_out(picture[box], mask[box])
    subject = resize_longest(subject, round(size * rng.uniform(*how.scale)))
    if rng.random() < how.flip_probability:
        subject = subject[:, ::-1]
    canvas = place(subject, rng, size=size)
    if rng.random() < how.jitter_probability:
        canvas = colour_jitter(canvas, rng)
    if rng.random() < how.erase_probability:
        canvas = erase(canvas, rng)
    return canvas


def cut_out(
    picture: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The subject where it stands, on white."""
    return np.where(mask[..., None], picture, np.uint8(WHITE))


def bounding_slices(mask: Bool[np.ndarray, "h w"]) -> tuple[slice, slice]:
    """The rows and columns of a mask's bounding box.

    Raises:
      ValueError: if the mask is empty.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        raise ValueError("the mask is empty: there is no subject to cut out")
    return slice(y, y + height), slice(x, x + width)


def resize_longest(
    picture: UInt8[np.ndarray, "h w 3"], length: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes so that the longest side is `length` pixels; the aspect ratio stays."""
    height, width = picture.shape[:2]
    factor = length / max(height, width)
    new_size = max(1, round(width * factor)), max(1, round(height * factor))
    return cv2.resize(picture, new_size, interpolation=_filter(factor))


def resize_square(
    picture: UInt8[np.ndarray, "h h 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes a square picture to `size` pixels a side; the same size returns it unchanged."""
    if picture.shape[0] == size:
        return picture
    return cv2.resize(picture, (size, size), interpolation=_filter(size / picture.shape[0]))


def _filter(factor: float) -> int:
    return cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR


def place(
    subject: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, *, size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Puts the subject on a white canvas, whole, at a uniformly random place."""
    height, width = subject.shape[:2]
    y = int(rng.integers(0, size - height + 1))
    x = int(rng.integers(0, size - width + 1))
    canvas = np.full((size, size, 3), WHITE, np.uint8)
    canvas[y : y + height, x : x + width] = subject
    return canvas


def colour_jitter(
    picture: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Varies brightness, contrast and saturation by up to 20 % and the hue by up to 5 % of a turn.

    The four changes come in random order. The canvas changes with the subject, as in the release.
    """
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    hue = rng.uniform(-0.05, 0.05)
    changes: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda x: adjust_brightness(x, brightness),
        lambda x: adjust_contrast(x, contrast),
        lambda x: adjust_saturation(x, saturation),
        lambda x: adjust_hue(x, hue),
    )
    colours = picture.astype(np.float32)
    for index in rng.permutation(len(changes)):
        colours = np.clip(changes[index](colours), 0, 255)
    return np.rint(colours).astype(np.uint8)


def adjust_brightness(
    colours: Float[np.ndarray, "h w 3"], factor: float
) -> Float[np.ndarray, "h w 3"]:
    """Scales all colours. The result may leave [0, 255]; `colour_jitter` clips."""
    return colours * np.float32(factor)


def adjust_contrast(
    colours: Float[np.ndarray, "h w 3"], factor: float
) -> Float[np.ndarray, "h w 3"]:
    """Scales the distance of all colours from the picture's mean luma."""
    mean = (colours @ _LUMA).mean()
    return mean + np.float32(factor) * (colours - mean)


def adjust_saturation(
    colours: Float[np.ndarray, "h w 3"], factor: float
) -> Float[np.ndarray, "h w 3"]:
    """Scales the distance of each pixel's colour from its own luma."""
    grey = (colours @ _LUMA)[..., None]
    return grey + np.float32(factor) * (colours - grey)


def adjust_hue(colours: Float[np.ndarray, "h w 3"], turn: float) -> Float[np.ndarray, "h w 3"]:
    """Turns the hue by a fraction of the colour circle, from colours in [0, 255]."""
    hsv = cv2.cvtColor(colours / np.float32(255), cv2.COLOR_RGB2HSV)  # hue in degrees
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * turn)) % 360
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * np.float32(255)


def erase(
    picture: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Paints a rectangle of 2 to 25 % of the area white.

    Its aspect ratio is log-uniform in [0.3, 3.3]. At 25 % the longest side is 0.91 of a square
    canvas, so the rectangle always fits.
    """
    height, width = picture.shape[:2]
    area = height * width * rng.uniform(0.02, 0.25)
    aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    erased = picture.copy()
    erased[y : y + h, x : x + w] = WHITE
    return erased
