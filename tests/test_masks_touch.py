"""Inpainting, pixel by pixel: which latents a mask touches, and what a paste changes or keeps."""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import bootpig_jax.sampling.pipeline
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.sampling.inpainting import FEATHER, Original, Window, make_original
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from tests.pixel_vae import PixelVAE


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def one_pixel(height: int, width: int, row: int, column: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[row, column] = True
    return mask


def touched(cells: int, length: int, pixel: int) -> list[int]:
    """The cells, `cells` in a length of so many pixels, that share more than an edge with one."""
    cell = Fraction(length, cells)
    return [i for i in range(cells) if max(i * cell, pixel) < min((i + 1) * cell, pixel + 1)]


@pytest.mark.parametrize(
    ("window", "factor"),
    [
        pytest.param(Window(0, 0, 32, 48), 8, id="latents of 8x8 pixels"),
        pytest.param(Window(0, 0, 20, 30), 8, id="latents of 5x5 pixels"),
        pytest.param(Window(3, 5, 25, 37), 8, id="latents that end within a pixel"),
        pytest.param(Window(2, 1, 3, 5), 8, id="latents smaller than a pixel"),
        pytest.param(Window(-4, -3, 50, 70), 16, id="over the picture's edges"),
    ],
)
def test_one_masked_pixel_touches_the_latents_that_it_overlaps_and_no_other(
    window: Window, factor: int
) -> None:
    pixels = random_picture(40, 60)
    cells = 32 // factor, 48 // factor
    bottom = min(40, window.top + window.height)
    right = min(60, window.left + window.width)
    for row in range(max(0, window.top), bottom):
        for column in (max(0, window.left), max(0, window.left) + row % 3, right - 1):
            mask = one_pixel(40, 60, row, column)
            latents = Original(pixels, mask, window, 32, 48).latent_mask(factor)
            expected = np.zeros((*cells, 1))
            rows = touched(cells[0], window.height, row - window.top)
            columns = touched(cells[1], window.width, column - window.left)
            expected[np.ix_(rows, columns)] = 1
            np.testing.assert_array_equal(latents, expected, err_msg=f"{row} {column}")


def test_what_is_drawn_comes_in_with_the_distance_from_what_is_kept() -> None:
    """old + min(distance / feather, 1) * (new - old), to the nearest level; kept pixels bit by bit.

    The distance from the middle of a masked pixel to that of the nearest kept one, by hand.
    """
    rng = np.random.default_rng(0)
    pixels, drawn = random_picture(24, 40, 1), random_picture(24, 40, 2)
    mask = np.zeros((24, 40), bool)
    mask[2:, 5:30] = True
    mask[rng.integers(2, 24, 3), rng.integers(20, 30, 3)] = False  # and some single pixels kept
    image = Image.fromarray(np.uint8(255) * mask)
    original = make_original(Image.fromarray(pixels), image, 24, 40)
    assert original.window == Window(0, 0, 24, 40)
    kept = np.argwhere(~mask)
    distance = np.array(
        [
            [np.sqrt(((kept - (row, column)) ** 2).sum(axis=1).min()) for column in range(40)]
            for row in range(24)
        ]
    )
    steps = max(1.0, min(FEATHER, distance.max() / 2))
    assert 2 < steps < FEATHER  # of this mask, half the inner radius
    alpha = np.minimum(distance / steps, 1)[..., None]
    expected = pixels + alpha * (drawn.astype(float) - pixels)
    pasted = original.paste(drawn)
    assert np.abs(pasted - expected).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(pasted[~mask], pixels[~mask])
    np.testing.assert_array_equal(pasted[alpha[..., 0] == 1], drawn[alpha[..., 0] == 1])


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> BootPIGPipeline:
    model = dataclasses.replace(load_stable_diffusion(model_folder), vae=PixelVAE())
    return BootPIGPipeline(model, model.unet)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_drawn_picture_is_the_given_one_bit_for_bit_outside_its_mask(
    pipeline: BootPIGPipeline, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    """... whatever the networks draw, and they are told to draw anew inside of it."""
    pixels = random_picture(16, 16)
    mask = np.zeros((16, 16), bool)
    mask[3:14, 6:15] = True
    drawn = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    asked: list[dict[str, Any]] = []

    def denoise(*_: Any, **how: Any) -> Any:
        asked.append(how)
        return jnp.asarray(drawn)

    monkeypatch.setattr(bootpig_jax.sampling.pipeline, "denoise", denoise)
    pictures = pipeline(
        "a cup",
        image=Image.fromarray(pixels),
        mask=Image.fromarray(np.uint8(255) * mask),
        num_images=2,
        num_inference_steps=4,
        strength=strength,
    )
    means = pixels.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)) / 127.5 - 1
    (how,) = asked
    for latents in (how["kept"].latents, *([how["start_from"]] if strength < 1 else [])):
        assert latents.shape == (2, 8, 8, 4)
        np.testing.assert_allclose(latents[..., :3], 0.5 * means[None].repeat(2, 0), atol=1e-6)
    # The mask ends within latents: these are drawn anew too.
    np.testing.assert_array_equal(
        how["kept"].mask[0, ..., 0], mask.reshape(8, 2, 8, 2).any(axis=(1, 3))
    )
    new = np.rint((np.clip(drawn[..., :3] / 0.5, -1, 1) + 1) * 127.5)
    for picture, latents in zip(pictures, new, strict=True):
        found = np.asarray(picture)
        np.testing.assert_array_equal(found[~mask], pixels[~mask])
        np.testing.assert_array_equal(found[8, 10], latents[4, 5])  # the mask's middle
