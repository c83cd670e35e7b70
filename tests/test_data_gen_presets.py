"""The shipped configurations of data generation: valid, and what their names promise."""

from pathlib import Path

import pytest

from bootpig_jax.yaml_config import load_config
from data_gen.config import DataGenConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PATHS = sorted(CONFIGS.glob("data_gen_*.yaml"))


def load(name: str) -> DataGenConfig:
    return load_config(DataGenConfig, CONFIGS / f"data_gen_{name}.yaml")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_says_how_it_is_used(path):
    config = load_config(DataGenConfig, path)
    head = path.read_text().split("\noutput_dir")[0]
    assert f"python -m data_gen.run --config configs/{path.name}" in head
    assert "# Hardware: " in head
    if config.candidates == 200_000:
        assert "# Time: " in head and "# Disk: " in head and head.count("(estimated") == 2


def test_no_two_configurations_write_to_one_folder():
    folders = [load_config(DataGenConfig, path).output_dir for path in PATHS]
    assert len(set(folders)) == len(folders) >= 6


def test_paper():
    config = load("paper")
    assert (config.captions.source, config.captions.llm.captions_per_call) == ("llm", 1)
    pictures = config.pictures
    assert (pictures.scheduler, pictures.steps, pictures.refiner) == ("default", 50, None)
    assert config.masks.segmenter == "grounded_sam"


def test_release():
    config = load("release")
    llm, pictures, masks = config.captions.llm, config.pictures, config.masks
    assert (llm.captions_per_call, llm.temperature, llm.max_words) == (50, 1.2, 17)
    assert (pictures.steps, pictures.refiner.start) == (25, 0.8)
    assert (pictures.image_size, pictures.stored_size) == (1024, 512)
    assert (masks.segmenter, masks.grounded_sam.box) == ("grounded_sam", "first")
    assert round(masks.filters.border * pictures.stored_size) == 25


def test_fast_and_turbo_ask_no_server_and_draw_in_half_precision():
    for name, steps in (("fast", 20), ("turbo", 4)):
        config = load(name)
        assert config.captions.source == "open_world"
        assert config.pictures.steps <= steps
        assert config.pictures.dtype == "float16" and config.pictures.batch_size > 1
    assert load("turbo").pictures.guidance_scale <= 1
