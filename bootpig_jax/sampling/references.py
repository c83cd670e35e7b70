"""Cutting the subject out of a user's picture: any picture in, a square on white out.

The Reference UNet was trained on cut-outs on white. In training the masks come with the data; here
the picture has to yield one: from its own alpha channel, by keying where the border is of nearly
one colour, or with GrabCut. No weights are needed for any of them, and `auto` takes the first that
the picture is fit for.

Two segmenters with learned weights are used only when asked for, and only if the user has installed
them; each downloads its weights the first time. `rembg` runs U2-Net (its weights: Apache 2.0; the
package's default model may not be used commercially, so the name is always given). `carvekit` runs
TRACER and FBA matting, which the paper's authors used; the package is no longer maintained.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from bootpig_jax.data.pictures import (
    MIN_SIDE,
    WHITE,
    PictureError,
    check_size,
    open_picture,
    to_rgb,
)
from bootpig_jax.errors import UserError

Segmenter = Literal["auto", "alpha", "keying", "grabcut", "rembg", "carvekit", "none"]
SEGMENTERS: tuple[str, ...] = get_args(Segmenter)

# Keying: how far (largest channel difference, of 255) a background pixel may be from the border's
# colour, and how much of the border has to be that near.
KEYING_TOLERANCE = 20
KEYING_BORDER = 0.8
# GrabCut starts from the assumption that this part of each side is background.
GRABCUT_BORDER = 0.04
GRABCUT_SIDE = 512
MARGIN = 0.05  # white around the cut-out, as a part of its longer side

REMBG_MODEL = "u2net"
# The settings of the authors' release.
CARVEKIT_SETTINGS = {
    "object_type": "object",
    "seg_mask_size": 640,
    "matting_mask_size": 2048,
    "trimap_prob_threshold": 231,
    "trimap_dilation": 30,
    "trimap_erosion_iters": 5,
}
INSTALL = {
    "rembg": 'pip install "rembg[cpu]"',
    # With its requirements it would bring a web server, and another OpenCV over the one installed.
    "carvekit": "pip install --no-deps carvekit, beside torch and torchvision",
}


def open_reference(path: str | Path, name: str = "reference") -> Image.Image:
    """Opens and decodes a picture file.

    Args:
        path: of the file.
        name: what errors call it.

    Raises:
        UserError: it is missing or refused (see `bootpig_jax.data.pictures`).
    """
    try:
        return open_picture(Path(path))
    except FileNotFoundError:
        raise UserError(f"{name} {path}: no such file") from None
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be read ({error.strerror})") from None
    except PictureError as error:
        raise UserError(f"{name} {path}: {error}") from None


def reference_picture(
    image: Image.Image, height: int, width: int, segmenter: Segmenter = "auto", name: str = "image"
) -> UInt8[np.ndarray, "h w 3"]:
    """The cut-out subject on white: what the Reference UNet will see.

    EXIF rotation is applied, every colour mode becomes RGB, alpha is composited on white. Then the
    subject is cut out, cropped, set with a margin on a white canvas of the model's shape, and
    resized. With `none` the picture is taken to be a cut-out on white already: only resized, white
    added where its shape is not the model's.

    Args:
        image: any picture.
        height: of the result, in pixels.
        width: of the result, in pixels.
        segmenter: how the subject is found; see `find_mask`.
        name: what an error calls the picture.

    Raises:
        UserError: too small, too large, no alpha where it is asked for, no subject found, or the
            segmenter is not installed.
    """
    try:
        check_size(image)
        rgb, alpha = to_rgb(image)
    except PictureError as error:
        raise UserError(f"reference {name}: {error}") from None
    if segmenter != "none":
        mask = find_mask(rgb, alpha, segmenter, name)
        rgb = crop(np.where(mask[..., None], rgb, WHITE).astype(np.uint8), mask)
    return fit(rgb, height, width)


def prepare_reference(
    image: Image.Image, height: int, width: int, segmenter: Segmenter = "auto", name: str = "image"
) -> Float32[np.ndarray, "h w 3"]:
    """`reference_picture` in [-1, 1], as the VAE wants it."""
    return _to_model(reference_picture(image, height, width, segmenter, name))


def find_mask(
    rgb: UInt8[np.ndarray, "h w 3"],
    alpha: UInt8[np.ndarray, "h w"] | None,
    segmenter: Segmenter,
    name: str = "image",
) -> Bool[np.ndarray, "h w"]:
    """Where the subject is.

    Args:
        rgb: the picture on white.
        alpha: its alpha channel, if it has one.
        segmenter: `alpha`, `keying`, `grabcut`, `rembg`, `carvekit`, or `auto`: the first of
            `alpha`, `keying` and `grabcut` that the picture is fit for.
        name: what an error calls the picture.

    Raises:
        UserError: `alpha` is asked for and missing, nothing is found, or the segmenter is not
            installed or fails.
    """
    # A channel that is opaque everywhere says nothing about the subject.
    transparent = alpha is not None and bool((alpha < 128).any())
    if segmenter == "auto":
        if transparent:
            segmenter = "alpha"
        else:
            segmenter = "keying" if has_plain_border(rgb) else "grabcut"
    match segmenter:
        case "alpha":
            if not transparent or alpha is None:
                raise UserError(f"reference {name}: has no transparency; use another segmenter")
            mask = alpha > 0
        case "keying":
            mask = keying(rgb)
        case "rembg" | "carvekit":
            mask = _learned_mask(rgb, segmenter)
        case _:
            mask = grabcut(rgb)
    if not mask.any():
        raise UserError(
            f"reference {name}: {segmenter} finds no subject; "
            "cut it out on white yourself and use the segmenter none"
        )
    return mask


def has_plain_border(rgb: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether nearly all of the border is of nearly one colour, so that keying can work."""
    near = _distance(rgb, _border_colour(rgb)) <= KEYING_TOLERANCE
    return bool(_border(near).mean() >= KEYING_BORDER)


def keying(rgb: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Everything but the regions of the border's colour that touch the border.

    A part of the subject that has the background's colour stays, if it is enclosed.
    """
    near = _distance(rgb, _border_colour(rgb)) <= KEYING_TOLERANCE
    _, regions = cv2.connectedComponents(near.astype(np.uint8), connectivity=4)
    outside = np.unique(_border(regions)[_border(near)])
    return ~np.isin(regions, outside) | ~near


def grabcut(rgb: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """GrabCut's foreground, from a rectangle a little inside the picture; its largest region."""
    height, width = rgb.shape[:2]
    scale = min(1.0, GRABCUT_SIDE / max(height, width))
    size = (max(MIN_SIDE, round(width * scale)), max(MIN_SIDE, round(height * scale)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    x, y = (max(1, round(GRABCUT_BORDER * side)) for side in size)
    labels = np.zeros((size[1], size[0]), np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # its clustering draws random numbers
    try:
        rectangle = (x, y, size[0] - 2 * x, size[1] - 2 * y)
        cv2.grabCut(small, labels, rectangle, *models, 5, cv2.GC_INIT_WITH_RECT)
    except cv2.error:  # fewer colours than its mixture has components
        return np.zeros((height, width), bool)
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    count, regions, statistics, _ = cv2.connectedComponentsWithStats(found)
    if count == 1:
        return np.zeros((height, width), bool)
    largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
    mask = (regions == largest).astype(np.uint8)
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)


def crop(
    rgb: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The mask's bounding box, with a white margin around it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = rgb[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    margin = round(MARGIN * max(box.shape[:2]))
    return np.pad(box, ((margin, margin), (margin, margin), (0, 0)), constant_values=WHITE)


def fit(
    rgb: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resizes to `height` x `width`, centred on white where the shapes differ; never distorts."""
    scale = min(height / rgb.shape[0], width / rgb.shape[1])
    size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    resized = Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (width, height), (WHITE, WHITE, WHITE))
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def reference_pictures(
    images: Sequence[Image.Image], height: int, width: int, segmenter: Segmenter = "auto"
) -> UInt8[np.ndarray, "k h w 3"]:
    """`reference_picture` for each picture; an error counts them from 1."""
    return np.stack(
        [
            reference_picture(image, height, width, segmenter, name=str(number))
            for number, image in enumerate(images, start=1)
        ]
    )


def prepare_references(
    images: Sequence[Image.Image], height: int, width: int, segmenter: Segmenter = "auto"
) -> Float32[np.ndarray, "k h w 3"]:
    """`reference_pictures` in [-1, 1], as the VAE wants them."""
    return _to_model(reference_pictures(images, height, width, segmenter))


def _to_model(rgb: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    return rgb.astype(np.float32) / 127.5 - 1


def _learned_mask(
    rgb: UInt8[np.ndarray, "h w 3"], segmenter: Literal["rembg", "carvekit"]
) -> Bool[np.ndarray, "h w"]:
    """The mask of a segmenter that somebody else wrote: any failure of it is the user's to see."""
    with _named_failures(segmenter):
        mask = _finder(segmenter)(Image.fromarray(rgb))
    if mask.shape != rgb.shape[:2]:
        raise UserError(f"segmenter: {segmenter} returned a mask of another size")
    return mask


_Finder = Callable[[Image.Image], Bool[np.ndarray, "h w"]]


def check_segmenter(segmenter: Segmenter) -> None:
    """Loads a segmenter that somebody else wrote, so that what is missing shows at once.

    Raises:
        UserError: it is not installed, or its weights can't be had.
    """
    if segmenter in ("rembg", "carvekit"):
        with _named_failures(segmenter):
            _finder(segmenter)


@contextlib.contextmanager
def _named_failures(segmenter: str) -> Iterator[None]:
    try:
        yield
    # rembg leaves the interpreter where it finds no ONNX runtime.
    except (ImportError, SystemExit) as error:
        missing = f" ({error})" if isinstance(error, ImportError) else ""
        raise UserError(
            f"segmenter: {segmenter} is not installed{missing}: {INSTALL[segmenter]}"
        ) from None
    except Exception as error:  # among them every failure of a download
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"segmenter: {segmenter} failed: {reason}") from error


def _finder(segmenter: Literal["rembg", "carvekit"]) -> _Finder:
    return _rembg() if segmenter == "rembg" else _carvekit()


# Loading the weights takes seconds; they are the same for every picture.
@functools.cache
def _rembg() -> _Finder:
    rembg: Any = importlib.import_module("rembg")
    session = rembg.new_session(REMBG_MODEL)

    def find(image: Image.Image) -> Bool[np.ndarray, "h w"]:
        return np.asarray(rembg.remove(image, session=session, only_mask=True).convert("L")) >= 128

    return find


@functools.cache
def _carvekit() -> _Finder:
    high: Any = importlib.import_module("carvekit.api.high")
    # On the CPU: the accelerator's memory belongs to JAX.
    interface = high.HiInterface(device="cpu", fp16=False, **CARVEKIT_SETTINGS)

    def find(image: Image.Image) -> Bool[np.ndarray, "h w"]:
        (cut,) = interface([image])
        return np.asarray(cut.convert("RGBA"))[..., 3] > 0  # as in the authors' release

    return find


def _border(values: np.ndarray) -> np.ndarray:
    """The outermost pixels, as a list."""
    return np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])


def _border_colour(rgb: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "3"]:
    return np.median(_border(rgb), axis=0)


def _distance(
    rgb: UInt8[np.ndarray, "h w 3"], colour: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "h w"]:
    return np.abs(rgb.astype(np.float64) - colour).max(axis=-1)
