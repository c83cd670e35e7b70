"""The window of a picture, its latent mask, and pasting back without touching anything else."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootpig_jax.errors import UserError
from bootpig_jax.sampling.inpainting import (
    Window,
    feathered,
    find_window,
    make_original,
    open_original,
    read_mask,
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def box_mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def as_image(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))


# Sizes of picture and mask's box, and of what the model draws.
CASES = {
    "of the model's size": ((64, 64), (20, 12, 41, 50), (64, 64)),
    "larger": ((300, 420), (100, 310, 161, 395), (64, 64)),
    "smaller": ((37, 29), (5, 3, 20, 21), (64, 64)),
    "a corner": ((300, 420), (290, 0, 300, 7), (64, 96)),
    "as wide as the picture": ((90, 250), (10, 0, 33, 250), (64, 64)),
    "one pixel": ((200, 200), (77, 93, 78, 94), (64, 64)),
    "all but a line": ((80, 120), (0, 0, 80, 119), (64, 64)),
}


@pytest.mark.parametrize(("shape", "box", "size"), CASES.values(), ids=CASES)
def test_pasting_changes_the_mask_and_nothing_else(
    shape: tuple[int, int], box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    pixels, mask = picture(*shape), box_mask(*shape, *box)
    original = make_original(Image.fromarray(pixels), as_image(mask), *size)
    drawn = np.full((*size, 3), 0, np.uint8)
    pasted = original.paste(drawn)
    assert pasted.dtype == np.uint8
    np.testing.assert_array_equal(pasted[~mask], pixels[~mask])
    # The middle of the mask, with every thickness, is the new picture alone.
    middle = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    assert (pasted[middle] == 0).all()
    np.testing.assert_array_equal(original.pixels, pixels)  # left as it was


@pytest.mark.parametrize(("shape", "box", "size"), CASES.values(), ids=CASES)
def test_windows(
    shape: tuple[int, int], box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    mask = box_mask(*shape, *box)
    window = find_window(mask, *size)
    bottom, right = window.top + window.height, window.left + window.width
    assert window.top <= box[0] and window.left <= box[1]
    assert bottom >= box[2] and right >= box[3]
    assert window.width / window.height == pytest.approx(size[1] / size[0], rel=0.05)
    # Over the edge only where the mask does not fit otherwise.
    if (box[3] - box[1]) / size[1] <= shape[0] / size[0]:
        assert window.top >= 0 and window.left >= 0 and bottom <= shape[0] and right <= shape[1]
    view = make_original(Image.fromarray(picture(*shape)), as_image(mask), *size).view()
    assert view.shape == (*size, 3)
    assert view.dtype == np.float32
    assert -1 <= view.min() < view.max() <= 1


def test_a_small_mask_in_a_large_picture_is_seen_from_near() -> None:
    mask = box_mask(3000, 4000, 1000, 2000, 1400, 2300)
    assert find_window(mask, 512, 512) == Window(800, 1750, 800, 800)
    # But never magnified: a window has at least the model's pixels.
    mask = box_mask(3000, 4000, 1000, 2000, 1040, 2030)
    assert find_window(mask, 512, 512) == Window(764, 1759, 512, 512)


def test_the_whole_picture_is_seen_where_it_is_of_the_models_size() -> None:
    pixels = picture(64, 96)
    mask = box_mask(64, 96, 3, 4, 9, 11)
    original = make_original(Image.fromarray(pixels), as_image(mask), 64, 96)
    assert original.window == Window(0, 0, 64, 96)
    np.testing.assert_array_equal(original.view(), pixels.astype(np.float32) / 127.5 - 1)
    latent_mask = original.latent_mask(8)
    assert latent_mask.dtype == np.float32
    pooled = mask.reshape(8, 8, 12, 8).max(axis=(1, 3))
    np.testing.assert_array_equal(latent_mask[..., 0], pooled)


def test_the_latent_mask_misses_no_pixel() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        shape = rng.integers(70, 200, 2)
        mask = np.zeros(shape, bool)
        mask[rng.integers(0, shape[0]), rng.integers(0, shape[1])] = True
        original = make_original(Image.fromarray(picture(*shape)), as_image(mask), 64, 64)
        window, latent_mask = original.window, original.latent_mask(8)[..., 0]
        ((row, column),) = np.argwhere(mask)
        cells = [
            np.unique(np.floor(np.array([p, p + 0.999]) * 8 / side).astype(int))
            for p, side in (
                (row - window.top, window.height),
                (column - window.left, window.width),
            )
        ]
        expected = np.zeros((8, 8))
        expected[np.ix_(*cells)] = 1
        np.testing.assert_array_equal(latent_mask, expected)


def test_beyond_the_edges_nothing_is_drawn() -> None:
    mask = box_mask(40, 160, 10, 0, 30, 160)  # wider than any square in the picture
    original = make_original(Image.fromarray(picture(40, 160)), as_image(mask), 64, 64)
    assert original.window == Window(-60, 0, 160, 160)
    latent_mask = original.latent_mask(8)[..., 0]  # cells of 20 pixels
    np.testing.assert_array_equal(latent_mask.max(axis=1), [0, 0, 0, 1, 1, 0, 0, 0])
    # The picture's first row is repeated above it.
    view = original.view()
    np.testing.assert_allclose(view[0], view[10], atol=0.1)


def test_the_seam_is_blended_inside_the_mask() -> None:
    mask = box_mask(60, 60, 10, 20, 50, 60)  # touches the picture's right edge
    alpha = feathered(mask, 8)
    assert (alpha[~mask] == 0).all()
    np.testing.assert_allclose(alpha[30, 20:29], [*np.arange(1, 9) / 8, 1])
    assert (alpha[30, 29:] == 1).all()  # no seam at the picture's own edge
    # A thin mask still shows what is drawn.
    np.testing.assert_array_equal(feathered(box_mask(60, 60, 10, 20, 50, 21), 8).max(), 1)


def test_the_seam_is_one_latent_wide_however_large_the_window() -> None:
    """Of a window that is twice as wide as what is drawn, 16 pixels."""
    mask = box_mask(128, 128, 0, 20, 128, 127)
    image = Image.new("RGB", (128, 128), (255, 255, 255))
    original = make_original(image, as_image(mask), 64, 64)
    assert original.window == Window(0, 0, 128, 128)
    pasted = original.paste(np.zeros((64, 64, 3), np.uint8))
    expected = np.rint(255 * (1 - np.arange(17) / 16))
    np.testing.assert_array_equal(pasted[64, 19:36, 0], expected)


def test_without_a_mask_the_centre_is_drawn_anew() -> None:
    pixels = picture(60, 100)
    original = make_original(Image.fromarray(pixels), None, 64, 64)
    assert original.window == Window(0, 20, 60, 60)
    drawn = picture(64, 64, seed=1)
    np.testing.assert_array_equal(original.paste(drawn), drawn)
    with pytest.raises(ValueError, match="without a mask"):
        original.latent_mask(8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I"])
def test_masks_of_any_mode(mode: str) -> None:
    mask = box_mask(20, 30, 5, 6, 11, 17)
    if mode.startswith("I"):
        values = np.where(mask, 65535, 0)
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = as_image(mask).convert(mode)
    np.testing.assert_array_equal(read_mask(image), mask)


def test_what_is_transparent_in_a_mask_is_kept() -> None:
    mask = box_mask(20, 30, 5, 6, 11, 17)
    image = Image.new("RGBA", (30, 20), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), mask=as_image(mask))
    np.testing.assert_array_equal(read_mask(image), mask)


def test_a_picture_and_its_mask_are_turned_upright_each_by_its_own_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, mask = picture(20, 30), box_mask(20, 30, 5, 6, 11, 17)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    upright = as_image(np.rot90(mask, -1))
    image = open_original(tmp_path / "photo.png")
    original = make_original(image, upright, 64, 64)
    np.testing.assert_array_equal(original.pixels, np.rot90(pixels, -1))
    np.testing.assert_array_equal(original.mask, np.rot90(mask, -1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((20, 30), bool), "mask: has no white pixel"),
        (np.ones((20, 30), bool), "mask: is white everywhere"),
        (box_mask(30, 20, 1, 1, 2, 2), "mask: is 20x30 pixels and the image 30x20"),
        (box_mask(4, 4, 1, 1, 2, 2), "mask: 4x4 is too small"),
    ],
)
def test_unfit_masks_are_named(mask: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_original(Image.fromarray(picture(20, 30)), as_image(mask), 64, 64)


def test_files_that_do_not_open(tmp_path: Path) -> None:
    (tmp_path / "drawing.svg").write_text("<svg/>")
    for name, file in (("image", "missing.png"), ("mask", "drawing.svg")):
        with pytest.raises(UserError, match=f"^{name} .*{file}: [^\\n]+$"):
            open_original(tmp_path / file, name)
