"""`python -m bootpig_jax.sample`: what it writes, and one line for every mistake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootpig_jax import sample
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.picture_settings import (
    PictureSettings,
    read_picture_settings,
    write_png,
)
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.references import prepare_reference
from bootpig_jax.sampling.settings import SamplingSettings


@pytest.fixture(scope="module")
def reference_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("references")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(2):
        pixels = np.full((40, 40, 3), 255, np.uint8)
        pixels[10:30, 12:28] = rng.integers(0, 200, 3)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr(BootPIGPipeline, "from_pretrained", fail)


def test_writes_pictures_and_a_sheet(
    model_folder: Path,
    bootpig_folder: Path,
    reference_files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "deep" / "out"
    prompts = ["", "\N{DOG FACE} \u0643\u0644\u0628 in the snow " + "dog " * 10 + "\ufb01sh"]
    sample.main(
        ["--model", str(model_folder), "--bootpig", str(bootpig_folder)]
        + ["--references", *reference_files, "--prompt", prompts[0], "--prompt", prompts[1]]
        + ["--output", str(output), "--steps", "3", "--num-images", "2", "--strategy", "softmax"]
        + ["--image-guidance", "4", "--guidance", "6.5", "--seed", "3", "--segmenter", "keying"]
        + ["--reference-scale", "1.1", "--negative-prompt", "dog", "--save-references"]
    )
    names = sorted(path.name for path in output.iterdir())
    pictures = ["000_00.png", "000_01.png", "001_00.png", "001_01.png"]
    assert names == [*pictures, "contact_sheet.png", "references"]
    assert Image.open(output / "001_01.png").size == (16, 16)
    seen = prepare_reference(Image.open(reference_files[1]), 16, 16, "keying")
    saved = np.asarray(Image.open(output / "references" / "01.png"))
    np.testing.assert_array_equal(saved, np.round((seen + 1) * 127.5))
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output / "contact_sheet.png")
    (warning,) = (line for line in printed.err.splitlines() if line.startswith("warning: "))
    assert "\ufb01sh" in warning, "the warning shows what the model does not see"
    assert "drawing: 100%" in printed.err

    repeat_from_the_picture(output, reference_files, tmp_path, capsys)


def repeat_from_the_picture(
    output: Path, reference_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Part of the test above: drawing four pictures once more would double its time."""
    for name in ("000_00.png", "001_01.png"):
        again = tmp_path / f"again {name}"
        sample.main(["--from-png", str(output / name), "--output", str(again)])
        assert (again / name).read_bytes() == (output / name).read_bytes()
        assert "the pixels are identical" in capsys.readouterr().err
    moved = shutil.copytree(Path(reference_files[0]).parent, tmp_path / "moved")
    sample.main(
        ["--from-png", str(output / "000_00.png"), "--output", str(tmp_path / "from elsewhere")]
        + ["--references", str(moved / "0.png"), str(moved / "1.png")]
    )
    assert "the pixels are identical" in capsys.readouterr().err

    # What the command line says wins.
    other = tmp_path / "other"
    picture = str(output / "001_01.png")
    sample.main(["--from-png", picture, "--output", str(other), "--prompt", "snow", "--seed", "4"])
    assert (other / "001_01.png").read_bytes() != (output / "001_01.png").read_bytes()
    settings, _ = read_picture_settings(other / "001_01.png")
    assert (settings.prompt, settings.settings.seed) == ("snow", 4)
    assert settings.settings.reference_scale == 1.1
    assert "identical" not in capsys.readouterr().err

    changed = Path(reference_files[1])
    content = changed.read_bytes()
    changed.write_bytes(content + b"x")
    with pytest.raises(UserError, match=r"^references .*1.png: has changed"):
        sample.main(["--from-png", picture, "--output", str(tmp_path / "never")])
    changed.write_bytes(content)
    for more in (["--num-images", "2"], ["--prompt", "a", "--prompt", "b"]):
        with pytest.raises(UserError, match="--from-png"):
            sample.main(["--from-png", picture, "--output", str(tmp_path / "never"), *more])
    assert not (tmp_path / "never").exists()


@pytest.mark.usefixtures("never_loaded")
def test_a_strange_picture_downloads_nothing(tmp_path: Path) -> None:
    settings = PictureSettings(
        model="somebody/model", bootpig=None, prompt="a dog", settings=SamplingSettings()
    )
    path = tmp_path / "a.png"
    write_png(path, Image.new("RGB", (16, 16)), settings)
    with pytest.raises(UserError, match="^model: 'somebody/model'.* give --model"):
        sample.main(["--from-png", str(path), "--output", str(tmp_path / "out")])


def test_inpainting_keeps_the_rest(model_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    room = rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)
    mask = np.zeros((24, 40), np.uint8)
    mask[4:16, 20:34] = 255
    Image.fromarray(room).save(tmp_path / "room.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    sample.main(
        ["--model", str(model_folder), "--prompt", "a dog", "--steps", "3"]
        + ["--image", str(tmp_path / "room.png"), "--mask", str(tmp_path / "mask.png")]
        + ["--output", str(tmp_path / "out")]
    )
    drawn = np.asarray(Image.open(tmp_path / "out" / "000_00.png"))
    np.testing.assert_array_equal(drawn[mask == 0], room[mask == 0])
    assert not np.array_equal(drawn[mask > 0], room[mask > 0])

    sample.main(
        ["--from-png", str(tmp_path / "out" / "000_00.png"), "--output", str(tmp_path / "again")]
    )
    again = np.asarray(Image.open(tmp_path / "again" / "000_00.png"))
    np.testing.assert_array_equal(again, drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segmenter", "alpha"], "reference 1: has no transparency"),
        (["--segmenter", "rembg"], "segmenter: rembg is not installed"),
        (["--image", "{}", "--mask", "small.png"], "mask: is 8x8 pixels and the image 40x40"),
        (["--solver", "ddim", "--sigmas", "karras"], "sigmas: "),
        (["--bootpig", "missing"], "bootpig: missing/base_unet is missing"),
    ],
)
@pytest.mark.usefixtures("never_loaded")
def test_what_does_not_suit_the_model_is_named_before_it_is_loaded(
    model_folder: Path,
    reference_files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "rembg", None)  # not there
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 255).save("small.png")
    with pytest.raises(UserError, match=f"^{message}"):
        sample.main(
            ["--model", str(model_folder), "--references", reference_files[0], "--prompt", "a dog"]
            + ["--output", "out", *(text.format(reference_files[0]) for text in arguments)]
        )
    assert not Path("out").exists()


@pytest.mark.usefixtures("never_loaded")
def test_strict_refuses_a_long_prompt(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="longer than 16 tokens"):
        sample.main(
            ["--model", str(model_folder), "--prompt", "dog " * 40, "--strict"]
            + ["--output", str(output), "--steps", "2"]
        )
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "num_inference_steps: "),
        (["--steps", "x"], "--steps"),
        (["--guidance", "nan"], "guidance_scale: "),
        (["--image-guidance", "1e9"], "image_guidance_scale: "),
        (["--height", "30"], "height: "),
        (["--width", "1000000"], "width: "),
        (["--num-images", "0"], "num_images: "),
        (["--seed", "-1"], "seed: "),
        (["--strategy", "mean"], "strategy: "),
        (["--segmenter", "sam"], "segmenter: "),
        (["--model", os.fsdecode(b"\xff")], "model: not valid Unicode"),
        (["--prompt", "a\0dog"], "prompt 2: "),
        (["--bootpig", "trained"], "references: "),
        (["--references", *["a.png"] * 17], "references: "),
        (["--references", "missing.png"], "reference missing.png: "),
        (["--unknown"], "--unknown"),
        (["--guidance-interval", "0.9", "0.1"], "guidance_interval: "),
        (["--reference-scale", "0"], "reference_scale: "),
        (["--reference-caption", "targt"], "reference_caption: "),
        (["--reuse-features", "0"], "reuse_features: "),
        (["--spacing", "even"], "spacing: "),
        (["--sigmas", "linear"], "sigmas: "),
        (["--negative-prompt", "a\0"], "negative_prompt: "),
        (["--strength", "0.5"], "strength: "),
        (["--strength", "nan"], "strength: "),
        (["--mask", "a.png"], "mask: "),
        (["--image", "missing.png"], "strength: "),
        (["--image", "missing.png", "--strength", "0.5"], "image missing.png: "),
        (["--jobs", "a.jsonl"], "prompt: "),
        (["--from-png", "missing.png"], "missing.png: "),
    ],
)
@pytest.mark.usefixtures("never_loaded")
def test_wrong_arguments_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError) as error:
        sample.main(["--model", "m", "--prompt", "a dog", "--output", str(output), *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not output.exists()


@pytest.mark.usefixtures("never_loaded")
def test_output_is_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "000_00.png").write_bytes(b"precious")
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    for output in (full, file, file / "below", Path("/proc/nothing/here")):
        with pytest.raises(UserError, match="^output: "):
            sample.main(["--model", "m", "--prompt", "a dog", "--output", str(output)])
    assert (full / "000_00.png").read_bytes() == b"precious"
    assert file.read_bytes() == b"precious"


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(UserError, match="^model: "):
        sample.main(["--model", "./missing", "--prompt", "a dog", "--output", str(output)])
    assert output.is_dir()


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bootpig_jax.sample", "--model", "m", "--prompt", "a dog"]
        + ["--output", str(tmp_path / "out"), "--steps", "0"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: num_inference_steps: ")
    assert result.stderr.count("\n") == 1
