"""0 and 255, -1 and 1, all that lies between, and what lies beyond: in, and back, without a shift.

A network's picture is in [-1, 1], a file's in 0..255; 0 is -1 and 255 is 1, exactly. Backwards it
is rounded to the nearest level, and what lies beyond is cut off.
"""

import io
from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bootpig_jax.data.pictures import to_rgb
from bootpig_jax.evaluation import embedders, lpips
from bootpig_jax.sampling.encoding import decode, encode_images
from bootpig_jax.sampling.inpainting import make_original, read_mask
from bootpig_jax.sampling.references import prepare_reference, prepare_references
from bootpig_jax.training import loop
from bootpig_jax.training.step import unit_range
from data_gen.config import PicturesConfig
from data_gen.pictures import DiffusionPictures
from tests.pixel_vae import PixelVAE

# All 256 levels, in another order in each channel.
LEVELS = np.stack(
    [np.random.default_rng(seed).permutation(256).reshape(16, 16) for seed in range(3)], axis=-1
).astype(np.uint8)
IMAGE = Image.fromarray(LEVELS)


def preprocessed(levels: np.ndarray) -> np.ndarray:
    """As LPIPS wants it, without its resizing."""
    how = lpips.PREPROCESSING.model_copy(update={"resize": 16, "crop": 16})
    return embedders.preprocess(levels, how).transpose(1, 2, 0)


@pytest.mark.parametrize(
    "to_network",
    [
        pytest.param(lambda x: np.asarray(unit_range(jnp.asarray(x[None])))[0], id="training"),
        pytest.param(
            lambda x: prepare_reference(Image.fromarray(x), 16, 16, "none"), id="a reference"
        ),
        pytest.param(
            lambda x: prepare_references([Image.fromarray(x)], 16, 16, "none")[0], id="references"
        ),
        pytest.param(
            lambda x: make_original(Image.fromarray(x), None, 16, 16).view(), id="inpainting"
        ),
        pytest.param(preprocessed, id="LPIPS"),
    ],
)
def test_levels_become_minus_one_to_one(to_network: Callable[[np.ndarray], np.ndarray]) -> None:
    found = to_network(LEVELS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, LEVELS / 127.5 - 1, rtol=0, atol=1e-6)
    assert (found[LEVELS == 0] == -1).all() and (found[LEVELS == 255] == 1).all()


def decoded(pictures: np.ndarray) -> np.ndarray:
    """By an autoencoder that repeats its latents in 2x2 pixels."""
    latents = np.zeros((1, 16, 16, 4), np.float32)
    latents[0, ..., :3] = pictures * PixelVAE().config.scaling_factor
    return decode(PixelVAE(), jnp.asarray(latents))[0, ::2, ::2]


def drawn_by_diffusers(pictures: np.ndarray) -> np.ndarray:
    """By a pipeline of diffusers, whose pictures are in [0, 1]."""
    drawer = object.__new__(DiffusionPictures)
    drawer._config = PicturesConfig(model="any", image_size=16)
    drawer._refiner = None
    drawer._pipeline = lambda **_: SimpleNamespace(images=[np.clip((pictures + 1) / 2, 0, 1)])
    (picture,) = drawer.draw([0], ["a cup"], [0])
    assert isinstance(picture, np.ndarray)
    return picture


@pytest.mark.parametrize(
    "to_levels",
    [
        pytest.param(decoded, id="sampling"),
        pytest.param(loop._to_bytes, id="grids"),
        pytest.param(drawn_by_diffusers, id="data"),
    ],
)
def test_pictures_are_rounded_to_the_nearest_level(
    to_levels: Callable[[np.ndarray], np.ndarray],
) -> None:
    for offset in (-0.49, -0.2, 0.0, 0.2, 0.49):
        picture = ((LEVELS + offset) / 127.5 - 1).astype(np.float32)
        found = to_levels(picture)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, LEVELS, err_msg=str(offset))
    # Beyond the ends nothing wraps around.
    far = np.where(LEVELS < 128, -1.7, 1.7).astype(np.float32)
    np.testing.assert_array_equal(to_levels(far), np.where(LEVELS < 128, 0, 255))


def test_an_autoencoder_without_loss_gives_back_every_level() -> None:
    doubled = LEVELS.repeat(2, axis=0).repeat(2, axis=1)
    latents = encode_images(PixelVAE(), doubled[None].astype(np.float32) / 127.5 - 1)
    np.testing.assert_array_equal(decode(PixelVAE(), latents)[0], doubled)
    # Scaled as the UNet sees them, by the factor and not by its inverse.
    np.testing.assert_allclose(latents[0, ..., :3], 0.5 * (LEVELS / 127.5 - 1), rtol=0, atol=1e-6)


def test_decoded_pictures_are_cut_off_at_both_ends() -> None:
    """Before they become levels: some devices' conversion to 8 bits wraps around."""
    latents = jnp.array([-4.0, -0.3, 0.5, 3.0]).reshape(1, 2, 2, 1).repeat(4, axis=-1)
    found = PixelVAE().decode_latents(latents)[0, ::2, ::2, 0]
    np.testing.assert_allclose(found, [[-1, -0.6], [1, 1]], rtol=1e-6)


def test_foregrounds_are_scored_with_the_levels_they_have() -> None:
    """`prepare_reference` goes to [-1, 1], and the score's pictures back to levels."""
    rgba = np.dstack([LEVELS, np.full((16, 16), 255, np.uint8)])
    rgba = np.pad(rgba, ((1, 1), (1, 1), (0, 0)))  # transparent around it
    pixels = embedders.decode(png(Image.fromarray(rgba)), "masked")
    # A margin of 1 makes it 18 wide, and 512 is no multiple: so compare with the enlargement.
    canvas = np.pad(LEVELS, ((1, 1), (1, 1), (0, 0)), constant_values=255)
    larger = Image.fromarray(canvas).resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels, np.asarray(larger))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_sixteen_bits_are_rounded_to_eight() -> None:
    values = np.array([0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535], np.uint16)
    expected = [0, 0, 1, 1, 127, 128, 254, 255, 255]
    for dtype in (np.uint16, np.int32):
        rgb, _ = to_rgb(Image.fromarray(values[None].astype(dtype)))
        np.testing.assert_array_equal(rgb, np.repeat(np.array(expected)[None, :, None], 3, axis=2))


def test_half_transparent_colours_lie_on_white() -> None:
    alpha = np.arange(256, dtype=np.uint8)
    for colour in ((0, 0, 0), (255, 0, 100)):
        rgba = np.dstack([np.full((1, 256, 3), colour, np.uint8), alpha[None]])
        rgb, kept = to_rgb(Image.fromarray(rgba))
        share = alpha[:, None] / 255
        expected = np.rint(share * np.array(colour) + (1 - share) * 255)
        assert np.abs(rgb[0] - expected).max() <= 1  # Pillow's own rounding
        np.testing.assert_array_equal(rgb[0, [0, -1]], [(255, 255, 255), colour])
        np.testing.assert_array_equal(kept, alpha[None])


def test_a_masks_grey_is_what_it_is_nearer_to() -> None:
    mask = np.zeros((8, 256), np.uint8)
    mask[:] = np.arange(256)
    np.testing.assert_array_equal(read_mask(Image.fromarray(mask)), mask >= 128)
