"""Draws Toyland: a subject in a scene, and the mask of the subject.

Everything is flat colour or a smooth gradient, with no texture and no noise, so that a small VAE
can hold it. Drawing happens at `_SCALE` times the size and is averaged down, which gives
anti-aliased edges.

A subject is drawn as a map of labels (body, accent, dark, white) in units of 1/100 of its height,
origin at its centre, y downwards. The accent's region is cut by quantiles of the body's own area
(`_regions`), so every pattern covers 30-70 % of the body whatever its outline.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from bootpig_jax.toyland.world import CATEGORIES, PALETTE, POSITIONS, SCENES, Subject

SIZE = 64  # pixels, both sides
_SCALE = 4
_CANVAS = SIZE * _SCALE
_SHIFT = 4  # OpenCV's fractional bits of a coordinate

_ERASE, _BODY, _ACCENT, _DARK, _WHITE = range(5)
_DARK_RGB = (44, 44, 52)
_WHITE_RGB = (246, 246, 242)

_HEIGHT = 38.0  # pixels that 100 units measure, before jitter: 59 % of the picture
_HEIGHT_JITTER = 0.06
_CENTRES = dict(zip(POSITIONS, (20.0, 32.0, 44.0), strict=True))
_CENTRE_Y = 34.0  # below the middle: a hat needs room above
_JITTER = 2.0

Points = np.ndarray  # float32 [n, 2]
Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Rendering:
    """A drawn picture: `image` uint8 [64, 64, 3] and `mask` bool [64, 64], true on the subject."""

    image: np.ndarray
    mask: np.ndarray


# ---------------------------------------------------------------- outlines, in units


def _polygon(*xy: tuple[float, float]) -> Points:
    return np.asarray(xy, np.float32)


def _ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360
) -> Points:
    angles = np.deg2rad(np.linspace(start, end, 49))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], -1).astype(np.float32)


def _rounded(x0: float, y0: float, x1: float, y1: float, r: float) -> Points:
    corners = (
        (x1 - r, y1 - r, 0),
        (x0 + r, y1 - r, 90),
        (x0 + r, y0 + r, 180),
        (x1 - r, y0 + r, 270),
    )
    return np.concatenate([_ellipse(x, y, r, r, a, a + 90)[::6] for x, y, a in corners])


def _star(outer: float, inner: float) -> Points:
    angles = np.deg2rad(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles) + 4], -1).astype(np.float32)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x * 2.85, y * 3.1 - 7], -1).astype(np.float32)


Shape = tuple[Points, int]


@dataclass(frozen=True)
class _Outline:
    """A category's drawing: its body, neutral details on top, and where a hat sits."""

    body: tuple[Shape, ...]
    details: tuple[Shape, ...]
    hat: tuple[float, float]


def _eye(x: float, y: float, r: float = 9.0) -> tuple[Shape, ...]:
    return ((_ellipse(x, y, r, r), _WHITE), (_ellipse(x, y, r * 0.6, r * 0.6), _DARK))


def _two_eyes(x: float, y: float, dx: float) -> tuple[Shape, ...]:
    return tuple((_ellipse(x + s * dx, y, 5, 7), _DARK) for s in (-1, 1))


_OUTLINES: dict[str, _Outline] = {
    "ball": _Outline(
        body=((_ellipse(0, 0, 46, 46), _BODY),),
        details=((_ellipse(-20, -22, 9, 9), _WHITE),),
        hat=(0, -43),
    ),
    "boat": _Outline(
        body=(
            (_polygon((-46, 16), (46, 16), (28, 48), (-28, 48)), _BODY),
            (_polygon((-6, -50), (-6, 8), (-44, 8)), _BODY),
            (_polygon((4, -44), (42, 8), (4, 8)), _BODY),
        ),
        details=((_polygon((-6, -50), (4, -50), (4, 18), (-6, 18)), _DARK),),
        hat=(-1, -46),
    ),
    "car": _Outline(
        body=(
            (_rounded(-46, -8, 46, 32, 12), _BODY),
            (_polygon((-32, -4), (-20, -42), (22, -42), (36, -4)), _BODY),
        ),
        details=(
            (_polygon((-22, -8), (-14, -33), (-3, -33), (-3, -8)), _WHITE),
            (_polygon((5, -8), (5, -33), (17, -33), (26, -8)), _WHITE),
            (_ellipse(-25, 31, 15, 15), _DARK),
            (_ellipse(25, 31, 15, 15), _DARK),
        ),
        hat=(0, -40),
    ),
    "duck": _Outline(
        body=(
            (_ellipse(-4, 20, 40, 28), _BODY),
            (_polygon((-46, -8), (-20, 4), (-36, 28)), _BODY),
            (_ellipse(14, -24, 25, 25), _BODY),
        ),
        details=((_polygon((34, -28), (48, -19), (34, -10)), _DARK), *_eye(19, -29)),
        hat=(11, -46),
    ),
    "fish": _Outline(
        body=(
            (_ellipse(9, 2, 37, 36), _BODY),
            (_polygon((-46, -32), (-12, 2), (-46, 36)), _BODY),
        ),
        details=_eye(26, -8, 10),
        hat=(9, -31),
    ),
    "heart": _Outline(
        body=((_heart(), _BODY),),
        details=((_ellipse(-22, -26, 9, 8), _WHITE),),
        hat=(22, -40),
    ),
    "house": _Outline(
        body=(
            (_polygon((-36, -10), (36, -10), (36, 48), (-36, 48)), _BODY),
            (_polygon((-46, -6), (0, -50), (46, -6)), _BODY),
        ),
        details=(
            (_polygon((-9, 18), (9, 18), (9, 48), (-9, 48)), _DARK),
            (_polygon((-29, 2), (-13, 2), (-13, 18), (-29, 18)), _WHITE),
            (_polygon((13, 2), (29, 2), (29, 18), (13, 18)), _WHITE),
        ),
        hat=(0, -44),
    ),
    "mug": _Outline(
        body=(
            (_ellipse(22, 4, 25, 27), _BODY),
            (_ellipse(22, 4, 13, 15), _ERASE),
            (_rounded(-44, -42, 22, 48, 12), _BODY),
        ),
        details=((_ellipse(-11, -40, 33, 9), _WHITE), (_ellipse(-11, -39, 25, 5), _DARK)),
        hat=(-11, -46),
    ),
    "mushroom": _Outline(
        body=(
            (_rounded(-19, -6, 19, 48, 10), _BODY),
            (
                np.concatenate([_ellipse(0, 2, 46, 50, 180, 360), _ellipse(0, 2, 46, 8, 0, 180)]),
                _BODY,
            ),
        ),
        details=_two_eyes(0, 24, 9),
        hat=(0, -45),
    ),
    "robot": _Outline(
        body=(
            (_rounded(-30, -50, 30, -8, 8), _BODY),
            (_rounded(-40, -4, 40, 38, 6), _BODY),
        ),
        details=(
            (_polygon((-12, -8), (12, -8), (12, -4), (-12, -4)), _DARK),
            (_polygon((-28, 38), (-8, 38), (-8, 50), (-28, 50)), _DARK),
            (_polygon((8, 38), (28, 38), (28, 50), (8, 50)), _DARK),
            *_eye(-13, -29),
            *_eye(13, -29),
        ),
        hat=(0, -48),
    ),
    "rocket": _Outline(
        body=(
            (_polygon((-20, 4), (-40, 30), (-40, 50), (40, 50), (40, 30), (20, 4)), _BODY),
            (
                _polygon(
                    (0, -50), (14, -34), (22, -12), (24, 40), (-24, 40), (-22, -12), (-14, -34)
                ),
                _BODY,
            ),
        ),
        details=(
            (_ellipse(0, -8, 13, 13), _DARK),
            (_ellipse(0, -8, 8, 8), _WHITE),
        ),
        hat=(0, -44),
    ),
    "star": _Outline(
        body=((_star(50, 27), _BODY),),
        details=_two_eyes(0, -2, 11),
        hat=(0, -38),
    ),
}
assert tuple(_OUTLINES) == CATEGORIES

_HAT: tuple[Shape, ...] = (
    (_polygon((-15, 0), (0, -26), (15, 0)), _ACCENT),
    (_rounded(-18, -3, 18, 5, 4), _WHITE),
)


def _fill(
    canvas: np.ndarray, points: Points, centre: tuple[float, float], unit: float, colour: int | Rgb
) -> None:
    """Fill `centre + unit * points` (canvas pixels) on `canvas`, in place."""
    fixed = np.rint((points * unit + centre) * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], colour, cv2.LINE_8, _SHIFT)


@cache
def _regions(category: str) -> dict[str, tuple[Points, ...]]:
    """The accent's region for each pattern, in units.

    Cuts are quantiles of the body's area along x or y, and the dot holds about a third of it.
    """
    grid = 2  # canvas pixels a unit
    labels = np.zeros((300, 300), np.uint8)
    for points, label in _OUTLINES[category].body:
        _fill(labels, points, (150, 150), grid, label)
    ys, xs = (axis / grid - 75 for axis in np.nonzero(labels))

    top, bottom = float(ys.min()), float(ys.max())
    quarter = (bottom - top) / 4

    def area_below(cut: float) -> float:
        return float(np.quantile(ys, cut))

    def rows(y0: float, y1: float) -> Points:
        return _polygon((-99, y0), (99, y0), (99, y1), (-99, y1))

    left, right = np.quantile(xs, (0.31, 0.69))
    cx, cy = np.median(xs), np.median(ys)
    radius = np.quantile(np.hypot(xs - cx, ys - cy), 0.34)
    return {
        "band": (rows(area_below(0.36), area_below(0.72)),),
        "half": (rows(area_below(0.52), 99),),
        # Even in height, not in area: equal widths are what reads as stripes.
        "stripes": (rows(top + quarter, top + 2 * quarter), rows(top + 3 * quarter, 99)),
        "column": (_polygon((left, -99), (right, -99), (right, 99), (left, 99)),),
        "dot": (_ellipse(cx, cy, radius, radius),),
    }


def _subject_labels(subject: Subject, centre: tuple[float, float], unit: float) -> np.ndarray:
    """The subject as labels, uint8 [_CANVAS, _CANVAS], zero outside it."""
    outline = _OUTLINES[subject.category]
    labels = np.zeros((_CANVAS, _CANVAS), np.uint8)
    for points, label in outline.body:
        _fill(labels, points, centre, unit, label)
    region = np.zeros_like(labels)
    for polygon in _regions(subject.category)[subject.pattern]:
        _fill(region, polygon, centre, unit, _ACCENT - _BODY)
    labels = labels + region * (labels == _BODY)  # body + 1 = accent
    for points, label in outline.details:
        _fill(labels, points, centre, unit, label)
    if subject.part == "hat":
        x, y = outline.hat
        for points, label in _HAT:
            _fill(labels, points + np.array((x, y), np.float32), centre, unit, label)
    return labels


# ---------------------------------------------------------------- scenes, in picture pixels


def _rows(canvas: np.ndarray, y0: float, y1: float, top: Rgb, bottom: Rgb | None = None) -> None:
    """Fill picture rows y0..y1 with a colour or a vertical gradient."""
    a, b = round(y0 * _SCALE), round(y1 * _SCALE)
    ramp = np.linspace(top, bottom or top, b - a, dtype=np.float32)
    column = np.rint(ramp).astype(np.uint8)[:, None]
    canvas[a:b] = cv2.resize(column, (_CANVAS, b - a), interpolation=cv2.INTER_NEAREST)


def _disc(
    canvas: np.ndarray, x: float, y: float, r: float, colour: Rgb, ry: float | None = None
) -> None:
    _fill(canvas, _ellipse(x, y, r, ry or r), (0, 0), _SCALE, colour)


def _area(canvas: np.ndarray, colour: Rgb, *xy: tuple[float, float]) -> None:
    _fill(canvas, _polygon(*xy), (0, 0), _SCALE, colour)


def _box(canvas: np.ndarray, x0: float, y0: float, x1: float, y1: float, colour: Rgb) -> None:
    _area(canvas, colour, (x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _beach(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 30 + dy, (196, 222, 238), (230, 240, 240))
    _rows(canvas, 30 + dy, 42 + dy, (140, 186, 198), (160, 200, 206))
    _rows(canvas, 42 + dy, 64, (238, 222, 184), (226, 206, 166))
    _disc(canvas, 54 + dx, 9 + dy, 6, (250, 244, 216))


def _snow(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (176, 188, 206), (208, 214, 224))
    for x, y in ((9 + dx, 14 + dy), (56 + dx, 12 + dy)):
        _area(canvas, (104, 126, 122), (x, y), (x + 10, y + 30), (x - 10, y + 30))
    _disc(canvas, 32 + dx, 76 + dy, 62, (244, 247, 250), 40)


def _meadow(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (200, 222, 236), (232, 240, 240))
    for x, r in ((13, 6), (20, 4.5), (6, 4)):
        _disc(canvas, x + dx, 9 + dy, r * 1.3, (250, 250, 250), r)
    _disc(canvas, 50 + dx, 52 + dy, 40, (184, 206, 160), 22)
    _rows(canvas, 42 + dy, 64, (164, 194, 136), (148, 178, 122))


def _night(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (28, 32, 54), (64, 68, 94))
    _disc(canvas, 11 + dx, 11 + dy, 6, (232, 230, 212))
    _rows(canvas, 48 + dy, 64, (44, 50, 54), (36, 40, 44))


def _kitchen(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (244, 236, 218))
    _rows(canvas, 0, 8 + dy, (196, 182, 160))
    _box(canvas, 3 + dx, 13 + dy, 23 + dx, 31 + dy, (250, 250, 250))
    _box(canvas, 6 + dx, 16 + dy, 20 + dx, 28 + dy, (186, 212, 226))
    _rows(canvas, 46 + dy, 50 + dy, (214, 206, 194))
    _rows(canvas, 50 + dy, 64, (150, 134, 116))


def _sunset(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 46 + dy, (150, 128, 156), (242, 204, 172))
    _disc(canvas, 48 + dx, 40 + dy, 11, (252, 232, 198))
    _rows(canvas, 46 + dy, 64, (104, 86, 96), (88, 72, 84))


def _under_water(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (178, 216, 216), (74, 118, 134))
    for x, y, r in ((8, 14, 3.5), (57, 24, 3.5), (54, 9, 3)):
        _disc(canvas, x + dx, y + dy, r, (222, 238, 238))
    _disc(canvas, 20 + dx, 68 + dy, 48, (172, 166, 142), 12)


def _forest(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (150, 168, 146), (194, 204, 180))
    for x in (-1, 15, 41, 57):
        _box(canvas, x + dx, 0, x + 8 + dx, 54, (106, 92, 82))
    _rows(canvas, 0, 9 + dy, (98, 118, 92))
    _rows(canvas, 48 + dy, 64, (128, 138, 104), (108, 118, 88))


def _stage(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (206, 198, 208))
    _disc(canvas, 32 + dx, 30, 22, (228, 222, 226), 30)
    _rows(canvas, 50 + dy, 64, (190, 166, 140), (170, 148, 124))
    _box(canvas, 0, 0, 10 + dx, 52 + dy, (124, 88, 98))
    _box(canvas, 54 + dx, 0, 64, 52 + dy, (124, 88, 98))
    _rows(canvas, 0, 8 + dy, (104, 72, 82))


def _street(canvas: np.ndarray, dx: float, dy: float) -> None:
    _rows(canvas, 0, 64, (214, 218, 222))
    for x0, x1, top, shade in (
        (0, 18, 18, 150),
        (18, 38, 6, 172),
        (38, 50, 24, 140),
        (50, 64, 12, 162),
    ):
        _box(
            canvas, x0 + (dx if x0 else 0), top + dy, x1 + dx + 2, 50, (shade, shade + 2, shade + 8)
        )
    _rows(canvas, 44 + dy, 48 + dy, (204, 202, 198))
    _rows(canvas, 48 + dy, 64, (98, 100, 106), (86, 88, 94))


_PAINTERS: dict[str, Callable[[np.ndarray, float, float], None]] = dict(
    zip(
        SCENES,
        (_beach, _snow, _meadow, _night, _kitchen, _sunset, _under_water, _forest, _stage, _street),
        strict=True,
    )
)


def _scene_canvas(scene: str, rng: np.random.Generator) -> np.ndarray:
    canvas = np.empty((_CANVAS, _CANVAS, 3), np.uint8)
    dx, dy = rng.uniform(-_JITTER, _JITTER, 2)
    _PAINTERS[scene](canvas, dx, dy)
    return canvas


# ---------------------------------------------------------------- pictures


def _shrink(canvas: np.ndarray) -> np.ndarray:
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _compose(subject: Subject, canvas: np.ndarray, x: float, y: float, height: float) -> Rendering:
    """Draw the subject on `canvas` (changed in place) with its centre at (x, y), in pixels."""
    unit = height * _SCALE / 100
    labels = _subject_labels(subject, (x * _SCALE, y * _SCALE), unit)
    table = np.zeros((256, 1, 3), np.uint8)
    table[1:5, 0] = PALETTE[subject.body], PALETTE[subject.accent], _DARK_RGB, _WHITE_RGB
    cv2.copyTo(cv2.LUT(cv2.merge([labels] * 3), table), labels, canvas)
    covered = cv2.threshold(labels, 0, 255, cv2.THRESH_BINARY)[1]
    return Rendering(_shrink(canvas), _shrink(covered) >= 128)


def render(subject: Subject, scene: str, position: str, rng: np.random.Generator) -> Rendering:
    """Draw `subject` at one of `POSITIONS` in one of `SCENES`.

    The scene's layout, the subject's size (6 %) and its place (2 px) vary with `rng`, and nothing
    else does: equal arguments and generator states give equal pictures.
    """
    canvas = _scene_canvas(scene, rng)
    height = _HEIGHT * (1 + rng.uniform(-_HEIGHT_JITTER, _HEIGHT_JITTER))
    jx, jy = rng.uniform(-_JITTER, _JITTER, 2)
    margin = 0.48 * height + 1  # widest outline, so that the subject stays inside the picture
    x = float(np.clip(_CENTRES[position] + jx, margin, SIZE - margin))
    return _compose(subject, canvas, x, _CENTRE_Y + jy, height)


def render_scene(scene: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene without a subject, uint8 [64, 64, 3]."""
    return _shrink(_scene_canvas(scene, rng))


def render_reference(subject: Subject, height: float = 1.2 * _HEIGHT) -> Rendering:
    """Draw `subject` in the middle of a white picture, 100 units being `height` pixels."""
    canvas = np.full((_CANVAS, _CANVAS, 3), 255, np.uint8)
    return _compose(subject, canvas, SIZE / 2, SIZE / 2 + height * 0.08, height)
