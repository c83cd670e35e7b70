"""Drawing a dataset: layout, resumption, shares of the work, and the methods."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bootpig_jax import evaluate
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import Dataset, open_dataset
from bootpig_jax.evaluation.generate import (
    BootPIGDrawer,
    GenerateSettings,
    IPAdapterDrawer,
    check_dataset_references,
    generate,
    load_drawer,
)
from bootpig_jax.evaluation.score import About, find_pictures, read_about
from bootpig_jax.sampling.settings import SamplingSettings
from tests.evaluation_folders import CLASSES, write_dreambooth
from tests.tiny_pipelines import WIDTH, save_stable_diffusion

ABOUT = About(method="fake", details={"seed": 0, "interval": (0, 1), "command": "first"})


class Fake:
    """Draws pictures that depend on prompt, references and number; may be killed at a prompt."""

    use_references = True

    def __init__(self, images: int = 2, killed_at: int | None = None) -> None:
        self.images = images
        self.killed_at = killed_at
        self.calls: list[tuple[str, int]] = []

    def draw(self, prompt: str, references: Sequence[Image.Image]) -> list[Image.Image]:
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append((prompt, len(references)))
        base = sum(prompt.encode()) + int(np.asarray(references[0]).sum())
        return [
            Image.new("RGB", (8, 8), ((base + j) % 256, j, len(prompt))) for j in range(self.images)
        ]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset("dreambooth", write_dreambooth(tmp_path / "dataset"))


def draw(dataset: Dataset, drawer: Any, output: Path, **settings: Any) -> int:
    how = GenerateSettings(**settings)
    return generate(dataset, drawer, output, ABOUT, num_images=drawer.images, settings=how)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_layout_and_inputs(dataset: Dataset, tmp_path: Path) -> None:
    drawer, output = Fake(), tmp_path / "out" / "fake"
    assert draw(dataset, drawer, output, references=2, template="a photo of {}") == 24
    assert drawer.calls[0] == ("a photo of a backpack in the snow", 2)
    assert (output / "dog2" / "02" / "01.png").exists()
    found, missing = find_pictures(dataset, output)
    assert len(found) == 24 and not missing
    about = read_about(output)
    assert about.inputs == {name: ("00.jpg", "01.jpg") for name in CLASSES}
    assert about.details["command"] == "first"


def test_resumes_without_repeating_or_losing(dataset: Dataset, tmp_path: Path) -> None:
    draw(dataset, Fake(), tmp_path / "whole")
    killed, again, third = Fake(killed_at=5), Fake(), Fake()
    with pytest.raises(KeyboardInterrupt):
        draw(dataset, killed, tmp_path / "parts")
    (tmp_path / "parts" / "backpack" / "00" / "01.png").unlink()
    assert draw(dataset, again, tmp_path / "parts") == 24 - 10 + 1
    assert len(killed.calls) + len(again.calls) == 12 + 1
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert draw(dataset, third, tmp_path / "parts") == 0 and not third.calls


def test_shares_of_the_work(dataset: Dataset, tmp_path: Path) -> None:
    draw(dataset, Fake(), tmp_path / "whole")
    drawers = [Fake() for _ in range(5)]
    for i, drawer in enumerate(drawers):
        draw(dataset, drawer, tmp_path / "parts", shard=(i, 5))
    assert sorted(len(drawer.calls) for drawer in drawers) == [2, 2, 2, 3, 3]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_taste_grows(dataset: Dataset, tmp_path: Path) -> None:
    draw(dataset, Fake(), tmp_path / "whole")
    assert draw(dataset.limited(1), Fake(), tmp_path / "parts") == 2
    assert draw(dataset, Fake(), tmp_path / "parts") == 22
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_what_was_drawn_otherwise_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "out"
    draw(dataset, Fake(), output, references=1)
    with pytest.raises(UserError, match="another references of backpack, .*; name another folder"):
        draw(dataset, Fake(), output)
    settings = GenerateSettings(references=1)
    details = ABOUT.details | {"seed": 1, "command": "second"}
    other = ABOUT.model_copy(update={"details": details})
    with pytest.raises(UserError, match="was drawn with another seed;"):
        generate(dataset, Fake(), output, other, num_images=2, settings=settings)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        draw(dataset, Fake(), tmp_path / "notes")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        draw(dataset, Fake(), tmp_path / "file")
    # Where the model lies does not matter.
    moved = ABOUT.model_copy(update={"details": ABOUT.details | {"model": "elsewhere"}})
    assert generate(dataset, Fake(), output, moved, num_images=2, settings=settings) == 0


def test_broken_references_and_wrong_settings(dataset: Dataset, tmp_path: Path) -> None:
    source = dataset.subjects[1].references[0].source
    assert isinstance(source, Path)
    source.write_bytes(b"no picture")
    with pytest.raises(UserError, match="bear_plushie/00.jpg: is none of PNG"):
        draw(dataset, Fake(), tmp_path / "out")
    for wrong in ({"references": -1}, {"template": "a dog"}, {"shard": (2, 2)}):
        with pytest.raises(UserError, match="--"):
            GenerateSettings(**wrong)  # type: ignore[arg-type]
    folder = tmp_path / "many"
    many = open_dataset("dreambooth", write_dreambooth(folder, references=17))
    with pytest.raises(UserError, match="from 1 to 16 pictures, not 17"):
        check_dataset_references(many, GenerateSettings())
    check_dataset_references(many, GenerateSettings(references=3))


def test_our_methods(
    model_folder: Path, bootpig_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """One prompt each, of tiny networks; the command line draws what the pipeline draws."""
    data = dataset.subjects[0].references[0].source
    assert isinstance(data, Path)
    small = [
        *("--dataset", "dreambooth", "--data", str(data.parents[1]), "--limit", "1"),
        *("--model", str(model_folder), "--references", "1", "--images", "2", "--steps", "2"),
        *("--segmenter", "keying", "--seed", "7"),
    ]
    drawn = {}
    for method in ("bootpig", "text", "untrained"):
        output = tmp_path / method
        extra = ["--bootpig", str(bootpig_folder)] if method == "bootpig" else []
        arguments = ["generate", *small, *extra, "--method", method, "--output", str(output)]
        assert evaluate.main(arguments) == 0
        paths = sorted(output.rglob("*.png"))
        assert [path.relative_to(output).as_posix() for path in paths] == [
            "backpack/00/00.png",
            "backpack/00/01.png",
        ]
        drawn[method] = np.stack([np.asarray(Image.open(path)) for path in paths])
        about = read_about(output)
        assert about.details["seed"] == 7 and len(about.details["model_sha256"]) == 64
        assert about.inputs == {"backpack": () if method == "text" else ("00.jpg",)}
    assert (drawn["text"] != drawn["untrained"]).any()
    assert (drawn["bootpig"] != drawn["untrained"]).any()
    settings = SamplingSettings(
        num_inference_steps=2, num_images=2, seed=7, segmenter="keying", batch_size=4
    )
    drawer, _ = load_drawer("untrained", str(model_folder), settings)
    assert isinstance(drawer, BootPIGDrawer)
    images = drawer.pipeline.draw(["a backpack in the snow"], [Image.open(data)], settings)
    np.testing.assert_array_equal(np.stack([np.asarray(i) for i in images]), drawn["untrained"])


def save_ip_adapter(folder: Path, cross_attention_layers: int) -> Path:
    """A tiny IP-Adapter with random weights, in the layout of the published ones."""
    torch.manual_seed(0)
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, 12),
        "image_proj.proj.bias": torch.randn(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    for i in range(cross_attention_layers):
        for name in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * i + 1}.{name}.weight"] = torch.randn(16, WIDTH)
    (folder / "models").mkdir(parents=True)
    save_file(tensors, folder / "models" / "tiny.safetensors")
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "models" / "image_encoder")
    return folder


def test_ip_adapter(dataset: Dataset, tmp_path: Path) -> None:
    model = save_stable_diffusion(tmp_path / "sd")
    adapter = save_ip_adapter(tmp_path / "adapter", cross_attention_layers=4)
    settings = SamplingSettings(
        num_inference_steps=2, num_images=3, batch_size=2, height=16, width=16, guidance_scale=3.0
    )
    drawer, identity = load_drawer(
        "ip-adapter",
        str(model),
        settings,
        ip_adapter=str(adapter),
        ip_adapter_file="models/tiny.safetensors",
    )
    assert isinstance(drawer, IPAdapterDrawer)
    assert identity["ip_adapter_scale"] == 0.6
    taste = dataset.limited(1)
    generate(
        taste,
        drawer,
        tmp_path / "out",
        ABOUT,
        num_images=3,
        settings=GenerateSettings(references=2),
    )
    paths = sorted((tmp_path / "out").rglob("*.png"))
    assert len(paths) == 3
    first, other = (np.asarray(Image.open(path)) for path in paths[:2])
    assert first.shape == (16, 16, 3) and (first != other).any()
    # It sees the references, and a picture doesn't depend on how many are drawn together.
    source = taste.subjects[0].references
    references = [Image.open(r.source) for r in source[:2]]  # type: ignore[arg-type]
    prompt = taste.subjects[0].prompts[0]
    singly = IPAdapterDrawer(
        drawer.pipeline, SamplingSettings(**{**settings.__dict__, "batch_size": 1})
    ).draw(prompt, references)
    difference = np.abs(np.asarray(singly[1]).astype(int) - other.astype(int))
    assert difference.max() <= 1
    (changed, *_) = drawer.draw(prompt, [Image.new("RGB", (20, 20), (255, 0, 0))])
    assert (np.asarray(changed) != first).any()
    with pytest.raises(UserError, match="--allow-pickle reads its tensors"):
        load_drawer(
            "ip-adapter", str(model), settings, ip_adapter="x/y", ip_adapter_file="models/a.bin"
        )
    with pytest.raises(UserError, match="a.safetensors is missing"):
        load_drawer(
            "ip-adapter",
            str(model),
            settings,
            ip_adapter=str(adapter),
            ip_adapter_file="models/a.safetensors",
        )


def test_mistakes_on_the_command_line(tmp_path: Path, model_folder: Path) -> None:
    data = write_dreambooth(tmp_path / "data")
    how = ["generate", "--dataset", "dreambooth", "--data", str(data), "--output", "out"]
    for arguments, message in (
        (how, "--model is missing"),
        ([*how, "--model", str(model_folder)], "--bootpig: names what training exports"),
        ([*how, "--model", "m", "--shard", "3"], "--shard: must be I/N"),
        ([*how, "--model", "m", "--shard", "3/3"], "--shard: must be I/N with I"),
        ([*how, "--model", "m", "--images", "0"], "num_images"),
        ([*how, "--model", "m", "--method", "dreambooth"], "invalid choice"),
        ([*how, "--model", "no where", "--method", "text"], "neither a folder"),
        ([*how, "--model", "m", "--output", str(data / "dog" / "00.jpg")], "is no folder that"),
        ([*how, "--model", "m", "--method", "ip-adapter"], "--ip-adapter: names a folder"),
        (["generate", "--dataset", "dreambooth", "--output", "o", "--model", "m"], "--data is"),
        ([], "required: stage"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments)
    assert not Path("out").exists()


def test_starting_it_imports_no_torch() -> None:
    code = (
        "import sys; from bootpig_jax import evaluate; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md", "docs/reproduction.md"])
def test_commands_in_the_documentation_parse(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *python -m bootpig_jax\.evaluate (.+)$", text, re.MULTILINE)
    values = {"method": "text", "strategy": "softmax", "count": "1"}
    for command in commands:
        # What a loop or a function would put in.
        typed = re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], "x"), command)
        evaluate.parse_arguments(shlex.split(typed.replace('"${@:3}"', ""), comments=True))
    assert len(commands) >= 3


def test_about_is_readable(dataset: Dataset, tmp_path: Path) -> None:
    draw(dataset.limited(1), Fake(), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "about.json").read_text())
    assert values["method"] == "fake"
    assert values["inputs"] == {"backpack": ["00.jpg", "01.jpg", "02.jpg"]}
