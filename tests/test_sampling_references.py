"""Any picture becomes the subject on white."""

import io
import struct
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from bootpig_jax.data.pictures import to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.sampling import references
from bootpig_jax.sampling.references import (
    crop,
    find_mask,
    grabcut,
    has_plain_border,
    keying,
    open_reference,
    prepare_reference,
    prepare_references,
    reference_pictures,
)

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


def test_keying_takes_colours_up_to_20_away_in_any_channel_for_background() -> None:
    rgb = np.full((40, 40, 3), 100, np.uint8)
    rgb[2:5, 2:5] = (120, 80, 100)
    rgb[10:20, 10:20] = (100, 121, 100)
    expected = np.zeros((40, 40), bool)
    expected[10:20, 10:20] = True
    np.testing.assert_array_equal(keying(rgb), expected)


def test_keying_does_not_leak_in_over_a_corner() -> None:
    rgb = np.full((40, 40, 3), 250, np.uint8)
    rgb[10:20, 10:20] = RED
    rgb[11:19, 11:19] = 250  # a frame, one pixel wide,
    rgb[10, 10] = 250  # without its corner
    assert keying(rgb)[11:19, 11:19].all()


@pytest.mark.parametrize(("odd", "plain"), [(0.15, True), (0.25, False)])
def test_a_border_is_plain_if_four_fifths_have_its_commonest_colour(
    odd: float, plain: bool
) -> None:
    rgb = np.full((41, 41, 3), 200, np.uint8)
    rgb[0, : round(odd * 160)] = 0
    assert has_plain_border(rgb) == plain


def test_whatever_is_not_quite_transparent_belongs_to_the_subject() -> None:
    rgb, alpha = np.asarray(disc()), np.zeros((60, 60), np.uint8)
    alpha[20:40, 20:40] = 1
    alpha[22:38, 22:38] = 255
    np.testing.assert_array_equal(find_mask(rgb, alpha, "auto"), alpha > 0)


def test_a_picture_that_shows_everywhere_says_nothing_of_its_subject() -> None:
    rgb, alpha = np.asarray(disc()), np.full((60, 60), 128, np.uint8)
    np.testing.assert_array_equal(find_mask(rgb, alpha, "auto"), keying(rgb))
    with pytest.raises(UserError, match="no transparency"):
        find_mask(rgb, alpha, "alpha")


def test_the_margin_is_a_twentieth_of_the_longer_side() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[10:31, 20] = mask[30, 20:80] = True
    cropped = crop(rgb, mask)
    assert cropped.shape == (21 + 2 * 3, 60 + 2 * 3, 3)
    np.testing.assert_array_equal(cropped[3:-3, 3:-3], rgb[10:31, 20:80])
    assert (cropped[:3] == 255).all() and (cropped[:, -3:] == 255).all()


def test_grabcut_keeps_the_largest_region() -> None:
    rgb = np.asarray(noisy_scene()).copy()
    rgb[60:66, 60:66] = RED
    mask = find_mask(rgb, None, "grabcut")
    assert mask[30:50, 30:50].all() and not mask[58:].any()


def test_grabcut_is_deterministic_whatever_ran_before() -> None:
    """In this scene the clusters' random start decides about a few pixels at the edge."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (80, 80, 3)).astype(float)
    pixels[..., 0] = 60
    pixels[24:56, 24:56] = np.array([170, 80, 90]) + rng.normal(0, 20, (32, 32, 3))
    rgb = pixels.clip(0, 255).astype(np.uint8)
    masks = []
    for seed in (0, 1, 2):
        cv2.setRNGSeed(seed)
        masks.append(grabcut(rgb))
    np.testing.assert_array_equal(masks[1:], [masks[0]] * 2)


def test_grabcut_takes_the_same_margin_on_each_side_for_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    monkeypatch.setattr(cv2, "grabCut", lambda *arguments: given.append(arguments[2]))
    assert not grabcut(np.zeros((200, 400, 3), np.uint8)).any()
    assert given == [(16, 8, 400 - 2 * 16, 200 - 2 * 8)]


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


def test_pictures_are_what_the_model_sees() -> None:
    images = [disc(), transparent_disc(), disc((48, 64))]
    pictures = reference_pictures(images, 32, 40)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, 32, 40, 3)
    np.testing.assert_array_equal(
        prepare_references(images, 32, 40), pictures.astype(np.float32) / 127.5 - 1
    )
    assert (pictures[:, 0, 0] == 255).all()


class FakeRembg(types.ModuleType):
    """What is used of rembg 2.0: a session by name, and the mask of a picture."""

    def __init__(self) -> None:
        super().__init__("rembg")
        self.sessions: list[str] = []

    def new_session(self, model_name: str = "bria-rmbg") -> str:
        self.sessions.append(model_name)
        return model_name

    def remove(self, data: Image.Image, *, session: str, only_mask: bool) -> Image.Image:
        assert (session, only_mask) == ("u2net", True)
        assert data.mode == "RGB"
        # Soft, as the network's output is: 200 on the disc, 60 around it.
        red = np.asarray(data)[..., 0] > 150
        return Image.fromarray(np.where(red, 200, 60).astype(np.uint8))


class FakeHiInterface:
    """What is used of carvekit 4.1."""

    made = 0

    def __init__(self, *, object_type: str, device: str, fp16: bool, seg_mask_size: int, **_: Any):
        assert (object_type, device, fp16, seg_mask_size) == ("object", "cpu", False, 640)
        FakeHiInterface.made += 1

    def __call__(self, images: list[Image.Image]) -> list[Image.Image]:
        cut = []
        for image in images:
            red = (np.asarray(image)[..., 0] > 150) & (np.asarray(image)[..., 1] < 100)
            image = image.convert("RGBA")
            image.putalpha(Image.fromarray(np.where(red, 9, 0).astype(np.uint8)))
            cut.append(image)
        return cut


@pytest.fixture
def forgotten_models() -> Iterator[None]:
    """Models that earlier tests loaded are not there, nor are this test's for later ones."""
    references._rembg.cache_clear()
    references._carvekit.cache_clear()
    yield
    references._rembg.cache_clear()
    references._carvekit.cache_clear()


def put_carvekit(monkeypatch: pytest.MonkeyPatch, interface: Any) -> None:
    module = types.ModuleType("carvekit.api.high")
    module.HiInterface = interface  # type: ignore[attr-defined]
    for name in ("carvekit", "carvekit.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "carvekit.api.high", module)


@pytest.mark.usefixtures("forgotten_models")
def test_rembg_is_asked_once_for_a_model_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rembg = FakeRembg()
    monkeypatch.setitem(sys.modules, "rembg", rembg)
    image = disc(background=BLUE)
    mask = find_mask(np.asarray(image), None, "rembg")
    np.testing.assert_array_equal(mask, np.asarray(image)[..., 0] > 150)
    prepare_references([image, image], 32, 32, "rembg")
    assert rembg.sessions == ["u2net"]


@pytest.mark.usefixtures("forgotten_models")
def test_carvekit_keeps_every_pixel_that_is_not_transparent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_carvekit(monkeypatch, FakeHiInterface)
    made = FakeHiInterface.made
    image = noisy_scene()
    mask = find_mask(np.asarray(image), None, "carvekit")
    np.testing.assert_array_equal(np.flatnonzero(mask.any(axis=0)), np.arange(24, 56))
    prepare_references([image, image], 32, 32, "carvekit")
    assert FakeHiInterface.made == made + 1


@pytest.mark.usefixtures("forgotten_models")
@pytest.mark.parametrize("segmenter", ["rembg", "carvekit"])
def test_a_segmenter_that_is_not_installed(segmenter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rembg", "carvekit", "carvekit.api", "carvekit.api.high"):
        monkeypatch.setitem(sys.modules, name, None)  # import now fails, installed or not
    with pytest.raises(UserError, match=f"segmenter: {segmenter} is not installed.*pip install"):
        prepare_reference(disc(), 32, 32, segmenter)


@pytest.mark.usefixtures("forgotten_models")
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (SystemExit(1), "rembg is not installed"),  # what it does without an ONNX runtime
        (OSError("no route to host\nretry later"), "rembg failed: no route to host$"),
        (ValueError(), "rembg failed: ValueError$"),
    ],
)
def test_a_segmenter_that_fails(
    failure: BaseException, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rembg = FakeRembg()

    def fails(model_name: str) -> str:
        raise failure

    monkeypatch.setattr(rembg, "new_session", fails)
    monkeypatch.setitem(sys.modules, "rembg", rembg)
    with pytest.raises(UserError, match=message):
        prepare_reference(disc(), 32, 32, "rembg")


def test_auto_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_rembg", "_carvekit"):
        monkeypatch.setattr(references, name, lambda: pytest.fail("a model was loaded"))
    for image in (disc(), transparent_disc(), noisy_scene()):
        prepare_reference(image, 32, 32, "auto")
