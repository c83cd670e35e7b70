"""`python -m bootpig_jax.sample`: what it writes, and one line for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootpig_jax import sample
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.pipeline import BootPIGPipeline


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
    )
    names = sorted(path.name for path in output.iterdir())
    assert names == ["000_00.png", "000_01.png", "001_00.png", "001_01.png", "contact_sheet.png"]
    assert Image.open(output / "001_01.png").size == (16, 16)
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output / "contact_sheet.png")
    warning = next(line for line in printed.err.splitlines() if line.startswith("warning: "))
    assert "\ufb01sh" in warning, "the warning shows what the model does not see"
    assert "drawing: 100%" in printed.err


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
        (["--prompt", "a\0dog"], "prompt 2: "),
        (["--bootpig", "trained"], "references: "),
        (["--references", *["a.png"] * 17], "references: "),
        (["--references", "missing.png"], "reference missing.png: "),
        (["--unknown"], "--unknown"),
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
