"""Users' own pictures: every kind of file, good and bad, becomes a square or a counted reason."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootpig_jax.data.pictures import PictureError, open_picture, square, to_rgb
from bootpig_jax.errors import UserError
from data_gen.config import PicturesConfig
from data_gen.picture_files import PictureFiles, list_pictures
from data_gen.stages import Rejected

SIZE = 32


def gradient(width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Grey from black (left) to white (right)."""
    row = np.linspace(0, 255, width).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, (height, width)).copy())


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size with hardly any pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)]
    chunks += [b"IDAT" + zlib.compress(b"\0" * 50)]
    framed = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def configure(folder: Path, **changes) -> PicturesConfig:
    values = dict(source="folder", folder=folder, min_side=16, output_size=SIZE)
    return PicturesConfig.model_validate({**values, **changes})


def read(folder: Path, **changes) -> list[np.ndarray | Rejected]:
    """Every file of the folder, in order."""
    count = len(list_pictures(folder))
    pictures = PictureFiles(configure(folder, **changes), count)
    return pictures.draw(range(count), [""] * count, [0] * count)


def read_one(folder: Path, data: bytes, **changes) -> np.ndarray | Rejected:
    (folder / "0").write_bytes(data)
    return read(folder, **changes)[0]


def test_pictures_are_those_of_the_folder_by_name(tmp_path):
    for name, grey in (("b.png", 20), ("a.jpg", 10), ("C.bmp", 30), ("10.webp", 40)):
        Image.new("L", (SIZE, SIZE), grey).save(tmp_path / name)
    (tmp_path / "captions.jsonl").write_text("{}")
    (tmp_path / "a.txt").write_text("A photo of a cup, on it")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "more").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["10.webp", "C.bmp", "a.jpg", "b.png"]
    drawn = read(tmp_path)
    assert [picture.mean() for picture in drawn] == [40, 30, 10, 20]
    assert all(picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8 for picture in drawn)
    pictures = PictureFiles(configure(tmp_path), 4)
    np.testing.assert_array_equal(pictures.draw([2], [""], [7])[0], drawn[2])


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect/></svg>'
FRAMES = dict(save_all=True, append_images=[gradient().rotate(90)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(encoded(gradient(), "JPEG")[:-40], "damaged", id="JPEG cut short"),
        pytest.param(encoded(gradient(), "PNG")[:-40], "damaged", id="PNG cut short"),
        pytest.param(encoded(gradient(), "BMP")[:-40], "damaged", id="BMP cut short"),
        pytest.param(encoded(gradient(), "TIFF")[:-40], "damaged", id="TIFF cut short"),
        pytest.param(png_header(32, 32), "damaged", id="PNG with a few pixels"),
        pytest.param(encoded(gradient(), "WEBP")[:-40], "damaged", id="WEBP cut short"),
        pytest.param(encoded(gradient(), "PNG")[:20], "damaged", id="half a header"),
        pytest.param(b"", "format", id="empty"),
        pytest.param(b"\0" * 1000, "format", id="zeros"),
        pytest.param(SVG, "format", id="SVG"),
        pytest.param(EPS, "format", id="EPS"),
        pytest.param(encoded(gradient(), "PPM"), "format", id="PPM"),
        pytest.param(encoded(gradient(), "PDF"), "format", id="PDF"),
        pytest.param(encoded(gradient(), "ICO"), "format", id="ICO"),
        pytest.param(encoded(gradient(), "GIF", **FRAMES), "animated", id="animated GIF"),
        pytest.param(encoded(gradient(), "PNG", **FRAMES), "animated", id="animated PNG"),
        pytest.param(encoded(gradient(), "WEBP", **FRAMES), "animated", id="animated WEBP"),
        pytest.param(encoded(gradient(), "TIFF", **FRAMES), "animated", id="TIFF of two pages"),
        pytest.param(png_header(14_000, 14_000), "too_many_pixels", id="bomb, 196 megapixels"),
        pytest.param(png_header(9_000, 9_000), "too_many_pixels", id="bomb, 81 megapixels"),
        pytest.param(png_header(2**31 - 1, 2**31 - 1), "too_many_pixels", id="bomb, all pixels"),
        pytest.param(encoded(gradient(1, 1), "PNG"), "low_resolution", id="1x1"),
        pytest.param(encoded(gradient(20, 15), "PNG"), "low_resolution", id="20x15"),
        pytest.param(encoded(gradient(10_000, 10), "PNG"), "too_long", id="10000x10"),
        pytest.param(encoded(gradient(16, 33), "PNG"), "too_long", id="16x33"),
        pytest.param(encoded(gradient().convert("F"), "TIFF"), "colour_mode", id="float TIFF"),
        pytest.param(encoded(Image.new("LAB", (SIZE, SIZE)), "TIFF"), "colour_mode", id="Lab"),
        pytest.param(b"GIF89a" + b"\0" * 30, "damaged", id="GIF of 0x0"),
    ],
)
def test_bad_files_are_rejected_with_their_reason(tmp_path, data, reason):
    assert read_one(tmp_path, data) == Rejected(reason)


def test_a_bad_file_moves_no_other(tmp_path):
    for number, data in enumerate([b"", encoded(Image.new("L", (40, 40), 9), "PNG"), SVG]):
        (tmp_path / f"{number}.png").write_bytes(data)
    drawn = read(tmp_path)
    assert drawn[0] == drawn[2] == Rejected("format")
    assert (drawn[1] == 9).all()


def test_only_files_in_the_folder_are_read(tmp_path):
    outside, folder = tmp_path / "outside.png", tmp_path / "folder"
    folder.mkdir()
    gradient().save(outside)
    (folder / "0.png").symlink_to(outside)
    (folder / "1.png").symlink_to(Path("..") / "outside.png")
    (folder / "2.png").symlink_to("/dev/zero")
    (folder / "3").symlink_to(tmp_path)
    (folder / "4.png").symlink_to("nowhere")
    os.mkfifo(folder / "5.png")
    assert read(folder) == [Rejected("link")] * 5 + [Rejected("no_file")]


def test_a_file_that_vanishes_is_no_reject(tmp_path):
    """A rerun would find other rejects: the shard has to be made again."""
    gradient().save(tmp_path / "0.png")
    pictures = PictureFiles(configure(tmp_path), 1)
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError):
        pictures.draw([0], [""], [0])


GREY = np.asarray(gradient())


def in_16_bits() -> Image.Image:
    return Image.fromarray(GREY.astype(np.uint16) * 257)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    return encoded(gradient().rotate(90), "JPEG", exif=exif, quality=100)


def transparent() -> Image.Image:
    """Black, and the more transparent the further right."""
    image = Image.new("RGBA", (SIZE, SIZE))
    image.putalpha(Image.fromarray(255 - GREY))
    return image


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(gradient(), "PNG"), id="grey"),
        pytest.param(encoded(gradient().convert("RGB"), "PNG"), id="RGB"),
        pytest.param(encoded(in_16_bits(), "PNG"), id="16-bit PNG"),
        pytest.param(encoded(in_16_bits(), "TIFF"), id="16-bit TIFF"),
        pytest.param(encoded(gradient().convert("P"), "PNG"), id="palette"),
        pytest.param(encoded(gradient(), "GIF"), id="GIF"),
        pytest.param(encoded(gradient().convert("CMYK"), "JPEG", quality=100), id="CMYK JPEG"),
        pytest.param(encoded(gradient().convert("CMYK"), "TIFF"), id="CMYK TIFF"),
        pytest.param(encoded(gradient().convert("YCbCr"), "JPEG", quality=100), id="YCbCr"),
        pytest.param(encoded(transparent(), "PNG"), id="alpha"),
        pytest.param(encoded(transparent(), "WEBP", lossless=True), id="WEBP with alpha"),
        pytest.param(rotated(), id="EXIF rotation"),
        pytest.param(
            encoded(gradient(), "MPO", **FRAMES, quality=100), id="a phone's picture and preview"
        ),
        pytest.param(encoded(gradient(), "JPEG", quality=100) + b"\0" * 999, id="bytes behind it"),
    ],
)
def test_every_colour_mode_is_normalised(tmp_path, data):
    picture = read_one(tmp_path, data)
    expected = np.repeat(GREY[..., None], 3, axis=2).astype(int)
    assert isinstance(picture, np.ndarray)
    assert np.abs(picture - expected).max() <= 4


def test_transparent_palettes_and_keyed_colours_are_white(tmp_path):
    image = gradient().convert("P")
    assert (read_one(tmp_path, encoded(image, "PNG", transparency=0))[:, 0] == 255).all()
    rgb = Image.new("RGB", (SIZE, SIZE), (1, 2, 3))
    assert (read_one(tmp_path, encoded(rgb, "PNG", transparency=(1, 2, 3))) == 255).all()


def test_16_bits_are_rounded_to_8():
    deep = np.array([[0, 128, 129, 65_406, 65_407, 65_535]], np.uint16)
    rgb, alpha = to_rgb(Image.fromarray(deep))
    np.testing.assert_array_equal(rgb[0, :, 1], [0, 0, 1, 254, 255, 255])
    assert alpha is None


def test_the_alpha_channel_is_handed_over_as_it_is():
    rgba = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 4), np.uint8)
    _, alpha = to_rgb(Image.fromarray(rgba))
    np.testing.assert_array_equal(alpha, rgba[..., 3])


def test_damaged_exif_is_ignored(tmp_path):
    data = encoded(gradient(), "JPEG", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert isinstance(read_one(tmp_path, data), np.ndarray)


def test_the_largest_centred_square_is_kept():
    wide = np.asarray(gradient(48, 32).convert("RGB"))
    np.testing.assert_array_equal(square(wide, 32), wide[:, 8:40])
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(square(tall, 32), tall[8:40])


@pytest.mark.parametrize("side", [8, 64])
def test_squares_are_resized_without_aliasing(side):
    stripes = np.zeros((48, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    resized = square(stripes, side)
    assert resized.shape == (side, side, 3)
    if side == 8:
        assert np.abs(resized.astype(int) - 127).max() < 16


def test_the_size_and_shape_asked_for_are_configuration(tmp_path):
    wide = encoded(gradient(96, 24), "PNG")
    assert read_one(tmp_path, wide) == Rejected("too_long")
    assert isinstance(read_one(tmp_path, wide, max_aspect=4.0), np.ndarray)
    assert isinstance(read_one(tmp_path, wide, max_aspect=4.0, min_side=24), np.ndarray)
    assert read_one(tmp_path, wide, max_aspect=4.0, min_side=25) == Rejected("low_resolution")
    assert read_one(tmp_path, wide, max_aspect=4.0, output_size=8).shape == (8, 8, 3)


def test_archives_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../escaped.png", encoded(gradient(), "PNG"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    for name in ("a.zip", "a.tar"):
        with pytest.raises(UserError, match="is a file: name a folder") as error:
            PictureFiles(configure(tmp_path / name), 1)
        assert "\n" not in str(error.value)
    assert read(tmp_path) == [Rejected("format")] * 2  # nor where they stand among pictures


def test_a_folder_that_does_not_do_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be read: No such file"):
        PictureFiles(configure(tmp_path / "nowhere"), 1)
    gradient().save(tmp_path / "a.png")
    with pytest.raises(UserError, match="set candidates=1"):
        PictureFiles(configure(tmp_path), 2)


def test_the_hash_follows_the_files_but_not_their_place(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in folders:
        folder.mkdir()
        (folder / "x").write_bytes(b"12")
        (folder / "y").write_bytes(b"3")
    (folders[2] / "x").write_bytes(b"123")
    (folders[3] / "x").rename(folders[3] / "z")
    hashes = [PictureFiles(configure(folder), 2).model_hash for folder in folders]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_an_error_says_what_is_wrong_in_one_line(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(32, 32))
    with pytest.raises(PictureError, match=r"^cannot be read \(") as error:
        open_picture(path)
    assert "\n" not in str(error.value)
    for mode in ("F", "HSV", "LAB"):
        with pytest.raises(PictureError, match=f"colours of the kind {mode}"):
            to_rgb(Image.new(mode, (8, 8)))
