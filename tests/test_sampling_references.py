"""Any picture becomes the subject on white."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from bootpig_jax.data.pictures import to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.references import find_mask, open_reference, prepare_reference

RED, BLUE, WHITE = (200, 30, 40), (30, 60, 200), (255, 255, 255)


def disc(size: tuple[int, int] = (60, 60), background: tuple[int, ...] = WHITE) -> Image.Image:
    """A red disc of 20 pixels with a hole of the background's colour, right of the centre."""
    image = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 20, 49, 39), RED)
    draw.rectangle((38, 28, 41, 31), background)
    return image


def noisy_scene() -> Image.Image:
    """A red square on a background without a single colour."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (80, 80, 3), dtype=np.uint8)
    pixels[..., 0] = 40
    pixels[24:56, 24:56] = RED
    return Image.fromarray(pixels)


def transparent_disc() -> Image.Image:
    image = disc(background=BLUE).convert("RGBA")
    alpha = Image.new("L", image.size, 0)
    ImageDraw.Draw(alpha).ellipse((30, 20, 49, 39), 255)
    image.putalpha(alpha)
    return image


def is_red(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] > 0.3) & (pixels[..., 1] < -0.3)


@pytest.mark.parametrize(
    ("image", "segmenter"),
    [
        (disc(), "auto"),
        (disc(background=BLUE), "keying"),
        (transparent_disc(), "auto"),
        (transparent_disc(), "alpha"),
        (noisy_scene(), "grabcut"),
        (noisy_scene(), "auto"),
    ],
)
def test_subject_fills_a_white_square(image: Image.Image, segmenter: str) -> None:
    pixels = prepare_reference(image, 64, 48, segmenter)
    assert pixels.shape == (64, 48, 3)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[:6], 1)
    np.testing.assert_array_equal(pixels[-6:], 1)
    rows, columns = np.nonzero(is_red(pixels))
    assert 40 <= np.ptp(rows) <= 46
    assert 40 <= np.ptp(columns) <= 46
    np.testing.assert_allclose([rows.mean(), columns.mean()], [31.5, 23.5], atol=1.5)


def test_none_leaves_a_fitting_picture_alone() -> None:
    image = disc((64, 64))
    pixels = prepare_reference(image, 64, 64, "none")
    np.testing.assert_array_equal(pixels, np.asarray(image).astype(np.float32) / 127.5 - 1)


def test_an_enclosed_hole_stays() -> None:
    rgb = np.asarray(disc(background=BLUE))
    mask = find_mask(rgb, None, "keying")
    assert mask[29, 39]
    assert not mask[0, 0]


def test_auto_keys_only_a_plain_border() -> None:
    rgb = np.asarray(noisy_scene())
    np.testing.assert_array_equal(find_mask(rgb, None, "auto"), find_mask(rgb, None, "grabcut"))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "RGBA", "1", "I;16", "YCbCr", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = Image.linear_gradient("L").resize((32, 32))
    if mode.startswith("I"):
        values = np.asarray(grey).astype(np.int32) * 257
        image = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values)
    else:
        image = grey.convert(mode)
    rgb, _ = to_rgb(image)
    assert rgb.shape == (32, 32, 3)
    if mode != "1":
        np.testing.assert_allclose(rgb[..., 1], np.asarray(grey), atol=2)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    rgb, _ = to_rgb(Image.open(file))
    assert rgb.shape == (40, 20, 3)
    assert (rgb[0] == RED).all()


def test_half_transparent_pixels_are_composited() -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 51))
    rgb, alpha = to_rgb(image)
    assert (rgb == 204).all()
    assert alpha is not None
    assert (alpha == 51).all()


@pytest.mark.parametrize(
    ("image", "segmenter", "message"),
    [
        (Image.new("RGB", (1, 1)), "none", "too small"),
        (Image.new("L", (10_000, 7_000)), "none", "million pixels"),
        (Image.new("RGB", (32, 32), WHITE), "keying", "finds no subject"),
        (Image.new("RGB", (32, 32), WHITE), "grabcut", "finds no subject"),
        (disc(), "alpha", "no transparency"),
    ],
)
def test_unfit_pictures_are_named(image: Image.Image, segmenter: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare_reference(image, 64, 64, segmenter, name="cat.png")
    assert "cat.png" in str(error.value)


def test_files_that_do_not_open(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    disc().save(good)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:90])
    svg = tmp_path / "drawing.svg"
    svg.write_text("<svg/>")
    bomb = tmp_path / "bomb.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 14_000, 14_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + checksum)
    for path in (cut, svg, bomb, tmp_path / "missing.png", tmp_path):
        with pytest.raises(UserError) as error:
            open_reference(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert open_reference(good).size == (60, 60)
