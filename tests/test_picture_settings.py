"""Settings in PNGs: written, read back, and refused when they are not what they should be."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bootpig_jax.errors import UserError
from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.picture_settings import (
    MAX_JSON,
    InputFile,
    PictureSettings,
    read_picture_settings,
    write_png,
)
from bootpig_jax.sampling.settings import SamplingSettings

PICTURE = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
SETTINGS = PictureSettings(
    model="models/sd",
    bootpig="runs/b",
    prompt='a "dog" \N{DOG FACE} \u0643\u0644\u0628',
    prompt_index=2,
    image_index=3,
    references=(InputFile(path="dog.png", sha256="0" * 64),),
    image=InputFile(path="room \N{DOG FACE}.png", sha256="1" * 64),
    settings=SamplingSettings(
        guidance_interval=(0.1, 0.9),
        negative_prompt="blurred",
        reference_timestep=0,
        reference_scale=1.1,
        guidance_scale=0.1 + 0.2,
        height=64,
    ),
    place=Place(2, 4, 7, stepwise=True),
)


def test_settings_survive_in_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, PICTURE, SETTINGS)
    settings, picture = read_picture_settings(path)
    assert settings == SETTINGS
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(PICTURE))
    # Any other reader sees plain JSON.
    assert json.loads(Image.open(path).info["bootpig"])["prompt"] == SETTINGS.prompt
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"], "no temporary file stays"


def test_what_decides_a_picture(tmp_path: Path) -> None:
    def changed(**fields: Any) -> PictureSettings:
        return SETTINGS.model_copy(
            update={"settings": dataclasses.replace(SETTINGS.settings, **fields)}
        )

    assert SETTINGS.draws_the_same_as(changed(batch_size=9, num_images=7, strict=True))
    assert SETTINGS.draws_the_same_as(SETTINGS.model_copy(update={"place": Place(1, 1, 0)}))
    for other in (changed(seed=1), changed(negative_prompt=""), changed(segmenter="none")):
        assert not SETTINGS.draws_the_same_as(other)
    assert not SETTINGS.draws_the_same_as(SETTINGS.model_copy(update={"image_index": 0}))

    def reference(path: str, digit: str) -> PictureSettings:
        file = InputFile(path=path, sha256=digit * 64)
        return SETTINGS.model_copy(update={"references": (file,)})

    assert SETTINGS.draws_the_same_as(reference("elsewhere.png", "0")), "it may have been moved"
    assert not SETTINGS.draws_the_same_as(reference("dog.png", "1"))


def test_reference_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "dog.png"
    PICTURE.save(path)
    file = InputFile.of(path)
    file.check("references")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"^references .*dog.png: has changed"):
        file.check("references")
    path.unlink()
    with pytest.raises(UserError, match=r"^references .*dog.png: no such file"):
        file.check("references")
    with pytest.raises(UserError, match="no such file"):
        InputFile(path="/dev/zero", sha256="0" * 64).check("references")
    unnamed = tmp_path / os.fsdecode(b"\xff.png")
    PICTURE.save(unnamed)
    with pytest.raises(UserError, match="not valid Unicode"):
        InputFile.of(unnamed)


def png(path: Path, text: str | None, key: str = "bootpig", zipped: bool = False) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text(key, text, zip=zipped)
    PICTURE.save(path, pnginfo=info)
    return path


def broken(**fields: Any) -> str:
    return json.dumps(SETTINGS.model_dump(mode="json") | fields)


def inner(**fields: Any) -> str:
    return broken(settings=dataclasses.asdict(SETTINGS.settings) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no settings"),
        ("", "damaged"),
        ("[]", "damaged"),
        ("[" * 100_000, "damaged"),
        (broken(extra=1), "extra"),
        (broken(prompt=None), "prompt"),
        (broken(prompt="a\0b"), "NUL"),
        (broken(prompt="a" * 10_001), "prompt"),
        (broken(prompt_index=-1), "prompt_index"),
        (broken(image_index=1.5), "image_index"),
        (broken(references=[{"path": "a", "sha256": "00"}]), "sha256"),
        (broken(references=[{"path": "a", "sha256": "0" * 64}] * 17), "references"),
        (broken(model="m" * 5000), "model"),
        (broken(place={"prompts": 1, "images": 1, "row": 1}), "row"),
        (broken(place={"prompts": 10**6, "images": 10**6, "row": 1}), "place"),
        (broken(place={"prompts": "1", "images": 1, "row": 0}), "place.prompts"),
        (inner(num_inference_steps=10**9), "num_inference_steps"),
        (inner(num_inference_steps="3"), "num_inference_steps"),
        (inner(guidance_scale=True), "guidance_scale"),
        (inner(guidance_scale=None), "guidance_scale"),
        (inner(height=1 << 20), "height"),
        (inner(allow_pickle=True), "allow_pickle"),
        (inner(guidance_interval=[0.9, 0.1]), "guidance_interval"),
        (json.dumps({"model": "m"}), "bootpig"),
    ],
)
def test_damaged_settings_are_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_picture_settings(png(tmp_path / "a.png", text))
    assert str(error.value).startswith(f"{tmp_path / 'a.png'}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_floods_and_other_files_are_refused(tmp_path: Path) -> None:
    for name, text, zipped in (
        ("long.png", " " * (MAX_JSON + 1), False),
        ("bomb.png", " " * 10_000_000, True),
    ):
        with pytest.raises(UserError, match=name):
            read_picture_settings(png(tmp_path / name, text, zipped=zipped))
    PICTURE.save(tmp_path / "a.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("a.jpg", "text.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            read_picture_settings(tmp_path / name)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.png"
    with pytest.raises(UserError, match=r"^output: cannot write .*a.png"):
        write_png(path, PICTURE, SETTINGS)
