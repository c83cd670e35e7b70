"""Segmenters against known masks, and every reason a mask is rejected for."""

import cv2
import numpy as np
import pytest

from bootpig_jax.toyland import render, world
from data_gen.config import FiltersConfig, GrabCutConfig, KeyingConfig
from data_gen.masks import GrabCutSegmenter, KeyingSegmenter, filtered
from data_gen.stages import Rejected, Segmentation

SIZE = (64, 64)


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def toyland_renderings(count):
    """Every category and scene, in turn."""
    rng = np.random.default_rng(0)
    for number in range(count):
        subject = world.sample_subject(rng, world.CATEGORIES[number % len(world.CATEGORIES)])
        scene = world.SCENES[number % len(world.SCENES)]
        yield render.render(subject, scene, world.POSITIONS[number // 7 % 3], rng)


def test_grabcut_finds_toylands_subjects():
    segmenter = GrabCutSegmenter(GrabCutConfig(working_size=128, iterations=2))
    pictures = list(toyland_renderings(36))
    found = segmenter.segment([p.image for p in pictures], [""] * 36, range(36))
    ious = [
        iou(f.mask, p.mask)
        for f, p in zip(found, pictures, strict=True)
        if isinstance(f, Segmentation)
    ]
    assert len(ious) == 36
    assert np.mean(ious) > 0.9


def test_grabcut_is_deterministic_whatever_ran_before():
    picture = next(toyland_renderings(1)).image
    segmenter = GrabCutSegmenter(GrabCutConfig(working_size=64, iterations=1))
    first, again = (segmenter.segment([picture], [""], [4])[0] for _ in range(2))
    np.testing.assert_array_equal(first.mask, again.mask)
    assert first.score == again.score


@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 80, 3), (200, 130, 3)])
def test_grabcut_masks_have_the_pictures_size(shape):
    picture = np.full(shape, 230, np.uint8)
    cv2.circle(picture, (shape[1] // 2, shape[0] // 2), 14, (200, 30, 60), -1)
    (found,) = GrabCutSegmenter(GrabCutConfig(working_size=96)).segment([picture], [""], [0])
    assert found.mask.shape == shape[:2]
    assert iou(found.mask, (picture != 230).any(-1)) > 0.9


@pytest.mark.parametrize("picture", [np.zeros((64, 64, 3)), np.full((64, 64, 3), 255)])
def test_grabcut_rejects_a_picture_of_nothing(picture):
    segmenter = GrabCutSegmenter(GrabCutConfig())
    assert segmenter.segment([picture.astype(np.uint8)], [""], [0]) == [Rejected("empty")]


def test_grabcut_survives_noise():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (found,) = GrabCutSegmenter(GrabCutConfig(working_size=64)).segment([picture], [""], [0])
    assert isinstance(found, Rejected) or found.mask.shape == SIZE


def test_keying_takes_what_differs_from_a_plain_background():
    picture = np.full((64, 64, 3), 250, np.uint8)
    cv2.rectangle(picture, (20, 20), (40, 50), (30, 90, 200), -1)
    (found,) = KeyingSegmenter(KeyingConfig()).segment([picture], [""], [0])
    np.testing.assert_array_equal(found.mask, (picture != 250).any(-1))
    assert found.score == 1


def test_keying_refuses_a_background_of_several_colours():
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[32:] = (40, 120, 40)
    segmenter = KeyingSegmenter(KeyingConfig())
    assert segmenter.segment([picture], [""], [0]) == [Rejected("background_not_uniform")]


def disc(x=32, y=32, radius=14):
    mask = np.zeros(SIZE, np.uint8)
    cv2.circle(mask, (x, y), radius, 1, -1)
    return mask > 0


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros(SIZE, bool), "empty"),
        (np.ones((32, 64), bool), "wrong_size"),
        (disc(radius=2), "too_small"),
        (np.ones(SIZE, bool), "too_large"),
        (disc(x=15), "touches_border"),
        (disc(x=16, radius=10) | disc(x=48, radius=10), "several_components"),
    ],
)
def test_bad_masks_are_rejected_with_their_reason(mask, reason):
    config = FiltersConfig(min_area=0.02, max_area=0.8, border=3 / 64)
    assert filtered(Segmentation(mask, 1.0), SIZE, config) == Rejected(reason)


def test_low_scores_are_rejected():
    found = filtered(Segmentation(disc(), 0.3), SIZE, FiltersConfig(min_score=0.5))
    assert found == Rejected("low_score")


def test_specks_are_removed():
    mask = disc()
    mask[5, 5] = True
    kept = filtered(Segmentation(mask, 0.9), SIZE, FiltersConfig(border=0.0))
    np.testing.assert_array_equal(kept.mask, disc())
    assert kept.score == 0.9


def test_the_segmenters_own_rejects_pass_through():
    assert filtered(Rejected("no_box"), SIZE, FiltersConfig()) == Rejected("no_box")
