"""Masks: which segmenter cuts the object out, two that need no trained network, and the filters.

`data_gen.grounded_sam` and `data_gen.sam3` hold those that are trained and understand words.

GrabCut (Rother et al. 2004) fits a mixture of Gaussians to the colours of the object and one to
those of the background, and cuts the picture between them along its edges. What it finds depends
on what it starts from, and the customary rectangle is a poor start where the background has parts
of its own (a horizon, a window). Here the start is found from the border of the picture:

1. The border's colours, in CIE Lab, are clustered; a pixel's *distance* is that to the nearest
   cluster. Lightness counts half: shading changes it more than hue and chroma.
2. The object's *core* is the largest group of pixels far from the background, small gaps closed.
   If it is large and its rim has one colour, it is the object before a backdrop that does not
   reach the border (a stage, a sheet of paper): that colour joins the background's, once.
3. GrabCut starts from the core. The core's inside is the object for sure, what lies beyond a small
   reach around it is background for sure, and only the ring in between is left to be decided.

Keying takes whatever differs from a background of one colour and refuses any other.

Neither looks at the object's words: both assume one object before a background that reaches the
border. `filtered` rejects masks that show it was not so. How good the masks are where the truth is
known: `python -m data_gen.mask_quality`.
"""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from data_gen.config import FiltersConfig, GrabCutConfig, KeyingConfig, MasksConfig
from data_gen.stages import Rejected, Segmentation, Segmenter

# Lengths are shares of the picture's shorter side, colour distances are in CIE Lab.
_BORDER_WIDTH = 1 / 32
_BORDER_COLOURS = 5
_LAB_WEIGHTS = np.array((0.5, 1, 1), np.float32)
_CORE_DISTANCE = 18.0
_EDGE_WIDTH = 1 / 64
_EDGE_SHARE = (
    0.4  # a pixel on a blurred edge belongs to the object from this share of its contrast on
)
_GAP = 3 / 64  # such as a light stripe across the object
_REACH = 5 / 64
_BACKDROP_AREA = 0.3  # share of the picture from which on a core may hold a backdrop
_BACKDROP_RIM = 0.5  # share of the core's rim that must have the backdrop's colour
_BACKDROP_TOLERANCE = 12.0
_OBJECT_SHARE = 0.25  # of a core: less than this before a backdrop is a mark on an object
_SURROUNDINGS = 14 / 64  # the width of background around the object that GrabCut learns from


def make_segmenter(config: MasksConfig) -> Segmenter:
    """Returns the segmenter that the configuration asks for, its networks loaded.

    Raises:
      UserError: a network or its package is missing or cannot be loaded.
    """
    # Only who asks for a network pays for the import of torch and transformers.
    match config.segmenter:
        case "grabcut":
            return GrabCutSegmenter(config.grabcut)
        case "keying":
            return KeyingSegmenter(config.keying)
        case "grounded_sam" | "grounded_sam_hf":
            from data_gen.grounded_sam import GroundedSam
            from data_gen.networks import prepare

            prepare()
            return GroundedSam(config)
        case "sam3":
            from data_gen.networks import prepare
            from data_gen.sam3 import Sam3

            prepare()
            return Sam3(config)


class GrabCutSegmenter:
    """GrabCut, started from what differs from the picture's border (see the module's docstring).

    The score is the intersection over union of the mask and what GrabCut was started from.
    """

    model_hash = ""

    def __init__(self, config: GrabCutConfig) -> None:
        """Keeps the settings."""
        self._config = config

    def segment(
        self,
        pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
        objects: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Segmentation | Rejected]:
        """Returns the mask of the one object in each picture (see `stages.Segmenter`)."""
        return [self._segment(picture, seed) for picture, seed in zip(pictures, seeds, strict=True)]

    def _segment(self, picture: UInt8[np.ndarray, "h w 3"], seed: int) -> Segmentation | Rejected:
        # k-means and GrabCut draw from OpenCV's generator, which other calls have moved on.
        cv2.setRNGSeed(seed & 0x7FFFFFFF)
        height, width = picture.shape[:2]
        scale = self._config.working_size / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        shrinks = scale < 1
        work = cv2.resize(
            picture, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        )
        start = object_core(work)
        if not start.any():
            return Rejected("empty")
        mask = grabcut(work, start, self._config.iterations)
        if not mask.any():
            return Rejected("empty")
        score = float((mask & start).sum() / (mask | start).sum())
        shrunk = cv2.INTER_LINEAR if shrinks else cv2.INTER_AREA
        covered = cv2.resize(mask.astype(np.float32), (width, height), interpolation=shrunk)
        return Segmentation(covered >= 0.5, score)


def object_core(picture: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Finds the largest region that differs from the picture's border: steps 1 and 2 of the module.

    Draws from OpenCV's random generator. Returns an empty mask where nothing differs enough.
    """
    lab = _lab(picture) * _LAB_WEIGHTS
    background = _clustered(lab[_frame(picture.shape[:2], _BORDER_WIDTH)])
    core = _far_from(lab, background)
    backdrop = _backdrop(lab, core)
    if backdrop is None:
        return core
    inner = _far_from(lab, np.concatenate([background, backdrop[None]]))
    return inner if inner.sum() >= _OBJECT_SHARE * core.sum() else core


def _far_from(
    lab: Float32[np.ndarray, "h w 3"], background: Float32[np.ndarray, "k 3"]
) -> Bool[np.ndarray, "h w"]:
    """Returns the largest region of other colours than the background's, without gaps or holes."""
    side = min(lab.shape[:2])
    distance = _distance_to(lab, background)
    # Pixels of an edge are mixtures: without this they would all be the object's.
    contrast = cv2.dilate(distance, _disc(side * _EDGE_WIDTH))
    differs = (distance > _CORE_DISTANCE) & (distance > _EDGE_SHARE * contrast)
    return _without_holes(_largest_component(_closed(differs, side * _GAP))[0])


def _backdrop(
    lab: Float32[np.ndarray, "h w 3"], core: Bool[np.ndarray, "h w"]
) -> Float32[np.ndarray, " 3"] | None:
    """Returns the colour of a large core's rim if it has one, else None."""
    if core.mean() <= _BACKDROP_AREA:
        return None
    # Padded, so that the picture's border counts as the rim too.
    padded = np.pad(core.astype(np.uint8), 1)
    inside = cv2.erode(padded, _disc(min(core.shape) * _GAP))[1:-1, 1:-1] > 0
    rim = lab[core & ~inside]
    clusters = _clustered(rim)
    nearest = np.argmin([np.linalg.norm(rim - colour, axis=-1) for colour in clusters], axis=0)
    colour = clusters[np.bincount(nearest, minlength=len(clusters)).argmax()]
    near = np.linalg.norm(rim - colour, axis=-1) < _BACKDROP_TOLERANCE
    return colour if near.mean() > _BACKDROP_RIM else None


def grabcut(
    picture: UInt8[np.ndarray, "h w 3"], start: Bool[np.ndarray, "h w"], iterations: int
) -> Bool[np.ndarray, "h w"]:
    """Refines a mask by GrabCut: step 3 of the module. Draws from OpenCV's random generator.

    Args:
      picture: RGB.
      start: a rough mask, not empty.
      iterations: of fitting the colours and cutting.

    Returns:
      The refined mask, without holes; possibly empty.
    """
    shape = start.shape
    side = min(shape)
    labels = np.full(shape, cv2.GC_PR_BGD, np.uint8)
    labels[start] = cv2.GC_PR_FGD
    labels[cv2.erode(start.astype(np.uint8), _disc(side * _EDGE_WIDTH)) > 0] = cv2.GC_FGD
    labels[cv2.dilate(start.astype(np.uint8), _disc(side * _REACH)) == 0] = cv2.GC_BGD
    labels[_frame(shape, 1 / side)] = cv2.GC_BGD
    near = cv2.dilate(start.astype(np.uint8), _disc(side * _SURROUNDINGS)) > 0
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cut = np.ascontiguousarray(labels[part])
    foreground = np.isin(cut, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if foreground.all() or not foreground.any():
        return np.zeros(shape, bool)  # GrabCut has nothing to learn one of its colour models from
    background_model, object_model = np.zeros((1, 65)), np.zeros((1, 65))  # filled by OpenCV
    cv2.grabCut(
        np.ascontiguousarray(picture[part]),
        cut,
        (0, 0, 0, 0),  # the rectangle of another mode
        background_model,
        object_model,
        iterations,
        cv2.GC_INIT_WITH_MASK,
    )
    mask = np.zeros(shape, bool)
    mask[part] = np.isin(cut, (cv2.GC_FGD, cv2.GC_PR_FGD))
    return _without_holes(_closed(mask, side * _GAP))


class KeyingSegmenter:
    """Whatever differs from a background of one colour; other backgrounds are rejected.

    The score is 1 for a border of exactly one colour and 0 for the largest spread allowed.
    """

    model_hash = ""

    def __init__(self, config: KeyingConfig) -> None:
        """Keeps the settings."""
        self._config = config

    def segment(
        self,
        pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
        objects: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Segmentation | Rejected]:
        """Returns the mask of the one object in each picture (see `stages.Segmenter`)."""
        return [self._segment(picture) for picture in pictures]

    def _segment(self, picture: UInt8[np.ndarray, "h w 3"]) -> Segmentation | Rejected:
        lab = _lab(picture)
        border = lab[_frame(picture.shape[:2], _BORDER_WIDTH)]
        colour = np.median(border, axis=0, keepdims=True)
        spread = float(np.sqrt(np.mean(np.sum((border - colour) ** 2, axis=-1))))
        if spread > self._config.max_border_spread:
            return Rejected("background_not_uniform")
        mask = _without_holes(_distance_to(lab, colour) > self._config.tolerance)
        return Segmentation(mask, 1 - spread / self._config.max_border_spread)


def filtered(
    found: Segmentation | Rejected, size: tuple[int, int], config: FiltersConfig
) -> Segmentation | Rejected:
    """Keeps a mask's largest component, or rejects it.

    Args:
      found: a segmenter's answer for one picture.
      size: the picture's height and width.
      config: the limits.

    Returns:
      The mask that is its own largest component, or the first reason against it: `wrong_size`,
      `empty`, `low_score`, `several_components`, `too_small`, `too_large`, `touches_border`.
    """
    if isinstance(found, Rejected):
        return found
    if found.mask.shape != size:
        return Rejected("wrong_size")
    if not found.mask.any():
        return Rejected("empty")
    if found.score < config.min_score:
        return Rejected("low_score")
    mask, share = _largest_component(found.mask)
    if share < config.min_largest_component:
        return Rejected("several_components")
    if mask.mean() < config.min_area:
        return Rejected("too_small")
    if mask.mean() > config.max_area:
        return Rejected("too_large")
    if (mask & _frame(size, config.border)).any():
        return Rejected("touches_border")
    return replace(found, mask=mask)


def _lab(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    return cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _frame(size: tuple[int, ...], width: float) -> Bool[np.ndarray, "h w"]:
    """Returns the frame of a picture as a mask; `width` is a share of the shorter side."""
    pixels = round(min(size) * width)
    frame = np.ones(size, bool)
    frame[pixels : size[0] - pixels, pixels : size[1] - pixels] = False
    return frame


def _clustered(colours: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, "k 3"]:
    """Returns the means of the colours' clusters."""
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.1)
    count = min(_BORDER_COLOURS, len(colours))
    colours = np.ascontiguousarray(colours)
    return cv2.kmeans(colours, count, None, stop, 3, cv2.KMEANS_PP_CENTERS)[2]  # type: ignore[call-overload]


def _distance_to(
    lab: Float32[np.ndarray, "h w 3"], colours: Float32[np.ndarray, "k 3"]
) -> Float32[np.ndarray, "h w"]:
    """Returns every pixel's distance to the nearest of some colours."""
    return np.min([np.linalg.norm(lab - colour, axis=-1) for colour in colours], axis=0)


def _disc(radius: float) -> UInt8[np.ndarray, "d d"]:
    diameter = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def _closed(mask: Bool[np.ndarray, "h w"], radius: float) -> Bool[np.ndarray, "h w"]:
    """Closes gaps of up to twice the radius."""
    disc = _disc(radius)
    margin = disc.shape[0] // 2
    # Without the margin, the picture's border would count as part of the mask.
    padded = np.pad(mask.astype(np.uint8), margin)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc) > 0
    return closed[margin:-margin, margin:-margin]


def _largest_component(mask: Bool[np.ndarray, "h w"]) -> tuple[Bool[np.ndarray, "h w"], float]:
    """Returns the largest 8-connected component and its share of the mask (0 if that is empty)."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = statistics[1:, cv2.CC_STAT_AREA]
    if not areas.size:
        return mask, 0.0
    return labels == 1 + areas.argmax(), float(areas.max() / areas.sum())


def _without_holes(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
    return filled > 0
