"""Colour jitter and erasing as torchvision defines them, written out here.

torchvision's `ColorJitter(0.2, 0.2, 0.2, 0.05)` and `RandomErasing`, which the authors' release
augments references with; colours there are in [0, 1].
"""

import colorsys

import numpy as np
import pytest

from bootpig_jax.data import augment

PICTURE = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.float32)


def grey(colours: np.ndarray) -> np.ndarray:
    return 0.299 * colours[..., 0] + 0.587 * colours[..., 1] + 0.114 * colours[..., 2]


def brightness(colours: np.ndarray, factor: float) -> np.ndarray:
    """`_blend(img, zeros_like(img), factor)`"""
    return factor * colours + (1 - factor) * 0


def contrast(colours: np.ndarray, factor: float) -> np.ndarray:
    """`_blend(img, mean(rgb_to_grayscale(img)), factor)`"""
    return factor * colours + (1 - factor) * grey(colours).mean()


def saturation(colours: np.ndarray, factor: float) -> np.ndarray:
    """`_blend(img, rgb_to_grayscale(img), factor)`"""
    return factor * colours + (1 - factor) * grey(colours)[..., None]


def hue(colours: np.ndarray, turn: float) -> np.ndarray:
    """`h = (h + factor) % 1.0` between `_rgb2hsv` and `_hsv2rgb`"""

    def turned(colour: np.ndarray) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(*(colour / 255))
        return colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)

    return 255 * np.apply_along_axis(turned, -1, colours.astype(float))


@pytest.mark.parametrize(
    ("ours", "formula", "values"),
    [
        (augment.adjust_brightness, brightness, (0.8, 1.0, 1.2)),
        (augment.adjust_contrast, contrast, (0.8, 1.0, 1.2)),
        (augment.adjust_saturation, saturation, (0.8, 1.0, 1.2)),
        (augment.adjust_hue, hue, (-0.05, 0.0, 0.05, 0.5)),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_each_change_is_torchvisions(ours, formula, values) -> None:
    for value in values:
        np.testing.assert_allclose(ours(PICTURE, value), formula(PICTURE, value), atol=0.02)


def test_jitter_makes_all_four_changes_in_random_order() -> None:
    """The same numbers drawn again, and each change cut off at both ends."""
    orders = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        factors = rng.uniform(0.8, 1.2, 3)
        turn = rng.uniform(-0.05, 0.05)
        changes = [*zip((brightness, contrast, saturation), factors, strict=True), (hue, turn)]
        order = tuple(rng.permutation(4))
        expected = PICTURE
        for index in order:
            change, value = changes[index]
            expected = np.clip(change(expected, value), 0, 255)
        found = augment.colour_jitter(PICTURE.astype(np.uint8), np.random.default_rng(seed))
        assert np.abs(found - expected).max() <= 0.5 + 0.1, seed
        orders.add(order)
    assert len(orders) > 12  # of 24


def test_erasing_is_one_white_rectangle_as_torchvision_draws_it() -> None:
    """Area uniform in [2 %, 25 %], aspect log-uniform in [0.3, 3.3], anywhere on the canvas."""
    side = 80
    areas, aspects, tops, lefts = [], [], [], []
    for seed in range(600):
        erased = augment.erase(np.zeros((side, side, 3), np.uint8), np.random.default_rng(seed))
        white = erased == 255
        assert (white | (erased == 0)).all() and (white.all(axis=-1) == white.any(axis=-1)).all()
        rows, columns = (np.flatnonzero(white[..., 0].any(axis=axis)) for axis in (1, 0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert white[..., 0].sum() == h * w  # a whole rectangle
        areas.append(h * w / side**2)
        aspects.append(np.log(h / w))
        tops.append(rows[0] / (side - h))
        lefts.append(columns[0] / (side - w))
    # The k-th smallest of 600 values that are uniform lies near k / 600.
    shares = (np.arange(600) + 0.5) / 600
    low, high = np.log(0.3), np.log(3.3)
    uniform = {
        "area": (np.array(areas) - 0.02) / 0.23,
        "aspect": (np.array(aspects) - low) / (high - low),
        "top": np.array(tops),
        "left": np.array(lefts),
    }
    for name, values in uniform.items():
        assert np.abs(np.sort(values) - shares).max() < 0.07, name
