"""`--jobs`: every bad line is found before the model loads; what is drawn is not drawn again."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bootpig_jax import sample
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.jobs import read_jobs
from bootpig_jax.sampling.pipeline import BootPIGPipeline
from bootpig_jax.sampling.settings import SamplingSettings


def write_reference(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        write_reference(tmp_path / name, seed)
    return tmp_path


def write_jobs(folder: Path, *jobs: dict[str, Any] | str) -> Path:
    path = folder / "jobs.jsonl"
    lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(folder: Path, model: Path, bootpig: Path, *more: str) -> None:
    sample.main(
        ["--model", str(model), "--bootpig", str(bootpig), "--jobs", str(folder / "jobs.jsonl")]
        + ["--output", str(folder / "out"), "--steps", "3", "--segmenter", "none", *more]
    )


DOG = {"id": "dog", "references": ["a.png", "b.png"], "prompt": "a dog", "num_images": 2}
CAT = {"id": "cat", "references": ["c.png", "b.png"], "prompt": "the snow", "num_images": 2}


def test_jobs_are_drawn_once_and_together(
    folder: Path, model_folder: Path, bootpig_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[list[str], tuple[int, ...]]] = []
    draw_batch = BootPIGPipeline.draw_batch

    def counted(
        self: BootPIGPipeline, requests: Sequence[Any], images: Sequence[int], **how: Any
    ) -> list[Image.Image]:
        batches.append(([request.prompt for request in requests], tuple(images)))
        return draw_batch(self, requests, images, **how)

    monkeypatch.setattr(BootPIGPipeline, "draw_batch", counted)
    write_jobs(folder, DOG, "", CAT | {"seed": 5, "negative_prompt": "a photo"})
    run(folder, model_folder, bootpig_folder)
    assert batches == [(["a dog", "the snow"], (0, 1))], "one program draws both"
    names = sorted(str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*.png"))
    assert names == ["cat/00.png", "cat/01.png", "dog/00.png", "dog/01.png"]

    # The same again, from the picture alone.
    again = folder / "again"
    sample.main(["--from-png", str(folder / "out" / "cat" / "01.png"), "--output", str(again)])
    assert same_pixels(again / "000_01.png", folder / "out" / "cat" / "01.png")

    # A run that was stopped: only what is missing, and the same bits.
    run(folder, model_folder, bootpig_folder)
    assert len(batches) == 2, "nothing was left to draw"
    content = {name: (folder / "out" / name).read_bytes() for name in names}
    (folder / "out" / "dog" / "01.png").unlink()
    (folder / "out" / "dog" / ".01.png.tmp").write_bytes(b"half a picture")
    run(folder, model_folder, bootpig_folder)
    assert len(batches) == 3
    assert {name: (folder / "out" / name).read_bytes() for name in names} == content
    assert not list((folder / "out").rglob("*.tmp"))

    # Pictures of other jobs are not taken for these.
    write_jobs(folder, DOG | {"prompt": "another"}, CAT | {"seed": 5})
    with pytest.raises(UserError, match=r"^output: .*00.png was drawn from something else"):
        run(folder, model_folder, bootpig_folder)
    assert len(batches) == 3


def test_jobs_share_a_room_and_say_what_is_wrong_with_them(
    folder: Path,
    model_folder: Path,
    bootpig_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoded = []
    encode_original = BootPIGPipeline.encode_original

    def counted(self: BootPIGPipeline, *given: Any) -> Any:
        encoded.append(given)
        return encode_original(self, *given)

    monkeypatch.setattr(BootPIGPipeline, "encode_original", counted)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    room = {"image": "a.png", "mask": "mask.png", "num_images": 1}
    long = "dog " * 20 + "end"
    write_jobs(folder, DOG | room | {"prompt": long}, CAT | room | {"seed": 5})
    run(folder, model_folder, bootpig_folder)
    assert len(encoded) == 1, "one room for both"
    (warning,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: "))
    assert warning.endswith("end'"), "the warning shows what the model does not see"

    # Files are cut out when their turn comes.
    write_jobs(folder, CAT | {"id": "opaque", "segmenter": "alpha"})
    with pytest.raises(UserError, match="^job opaque: reference 1: has no transparency"):
        run(folder, model_folder, bootpig_folder)


def same_pixels(a: Path, b: Path) -> bool:
    return np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def test_a_job_is_read(folder: Path) -> None:
    job = DOG | {"image": "a.png", "mask": "b.png", "guidance_interval": [0, 0.5], "strength": 1}
    (read,) = read_jobs(write_jobs(folder, job), SamplingSettings(num_inference_steps=7))
    assert read.references == (folder / "a.png", folder / "b.png")
    assert read.image == folder / "a.png"
    assert read.settings == SamplingSettings(
        num_inference_steps=7, num_images=2, guidance_interval=(0, 0.5)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"id": "a", "id": "b"}', "twice"),
        ({"prompt": "x"}, "id: "),
        (DOG | {"id": "DOG", "prompt": "x"}, "id: 'DOG' is line 1's already"),
        (CAT | {"id": "../cat"}, "id: "),
        (CAT | {"id": ".cat"}, "id: "),
        (CAT | {"id": ""}, "id: "),
        (CAT | {"id": "c" * 101}, "id: "),
        (CAT | {"id": "a\nb"}, "id: "),
        (CAT | {"id": 3}, "id: "),
        (CAT | {"prompt": 3}, "prompt: "),
        (CAT | {"prompt": "a\0"}, "prompt: "),
        (CAT | {"references": "c.png"}, "references: "),
        (CAT | {"references": ["c.png"] * 17}, "references: "),
        (CAT | {"references": ["c\0.png"]}, "NUL"),
        (CAT | {"mask": "a.png"}, "mask: "),
        (CAT | {"strength": 0.5}, "strength: "),
        (CAT | {"image": "a.png"}, "strength: "),
        (CAT | {"batch_size": 2}, "batch_size: "),
        (CAT | {"steps": 2}, "steps: "),
        (CAT | {"seed": -1}, "seed: "),
        (CAT | {"seed": "1"}, "seed: "),
        (CAT | {"guidance_scale": float("nan")}, "guidance_scale: "),
        ("[" * 100_000, "not valid JSON"),
        ('{"id": "' + "a" * (1 << 20), "longer than"),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: Any, message: str) -> None:
    path = write_jobs(folder, DOG, "", line)
    with pytest.raises(UserError) as error:
        read_jobs(path, SamplingSettings())
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_named(folder: Path) -> None:
    for content in (b"", b"\n \n", b"\xff\xfe"):
        (folder / "jobs.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="jobs.jsonl"):
            read_jobs(folder / "jobs.jsonl", SamplingSettings())
    with pytest.raises(UserError, match="missing.jsonl"):
        read_jobs(folder / "missing.jsonl", SamplingSettings())


def test_pictures_are_checked_before_the_model_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr(BootPIGPipeline, "from_pretrained", fail)
    monkeypatch.setitem(sys.modules, "rembg", None)  # not there
    Image.new("L", (16, 16)).save(folder / "black.png")
    for job, message in (
        (DOG | {"references": ["missing.png"]}, "job dog: reference .*missing.png: no such file"),
        (DOG | {"references": ["jobs.jsonl"]}, "job dog: reference .*jobs.jsonl: "),
        ({"id": "text", "prompt": "x"}, "job text: references: "),
        (DOG | {"image": "missing.png", "mask": "a.png"}, "job dog: image .*missing.png: no such"),
        (DOG | {"image": "a.png", "mask": "black.png"}, "job dog: mask: has no white pixel"),
        (DOG | {"segmenter": "rembg"}, "job dog: segmenter: rembg is not installed"),
    ):
        write_jobs(folder, job)
        with pytest.raises(UserError, match=f"^{message}"):
            run(folder, Path("m"), Path("b"))
    write_jobs(folder, DOG)
    for more in (["--prompt", "x"], ["--references", "a.png"], ["--from-png", "a.png"]):
        with pytest.raises(UserError):
            run(folder, Path("m"), Path("b"), *more)
    assert not (folder / "out").exists()
