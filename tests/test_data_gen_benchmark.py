"""The benchmark of data generation runs, adds up and writes what it measured."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.data_gen import STAGES, plain_pictures
from bootpig_jax.errors import UserError
from bootpig_jax.yaml_config import load_config
from data_gen.config import DataGenConfig
from tests.tiny_pipelines import save_stable_diffusion

ROOT = Path(__file__).parents[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_measures_both_ways_and_writes_them(tmp_path, monkeypatch, capsys, one_thread):
    from benchmarks import data_gen

    model, output = save_stable_diffusion(tmp_path), tmp_path / "results" / "tiny.json"
    changes = [f"pictures.model={model}", "pictures.image_size=16", "pictures.steps=2"]
    changes += ["pictures.batch_size=3", "masks.filters.min_area=0.0", "masks.filters.max_area=1.0"]
    changes += ["masks.filters.min_largest_component=0.0", "pictures.device=cpu"]
    command = ["--config", "configs/data_gen_toyland.yaml", "--pictures", "4", "--rounds", "2"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["x", *command, "--output", str(output), *changes])
    monkeypatch.setattr(data_gen, "PLAIN_STEPS", 3)
    data_gen.main()
    printed = capsys.readouterr().out
    assert "plain loop" in printed and "configs/data_gen_toyland.yaml" in printed
    results = json.loads(output.read_text())
    plain, pipeline = results["results"]
    assert plain["settings"]["steps"] == 3 and pipeline["settings"]["steps"] == 2
    assert sum(plain["shares"].values()) == pytest.approx(1)
    for one in (plain, pipeline):
        assert set(one["shares"]) == set(STAGES) and min(one["shares"].values()) >= 0
        assert len(one["pictures_a_second"]) == 2 and one["median"] > 0
    assert results["gain"] == pytest.approx(pipeline["median"] / plain["median"])
    assert results["command"].startswith("python -m benchmarks.data_gen --config configs/")
    assert results["measured_on"]["machine"].endswith("CPU cores")


def test_the_plain_loop_is_plain():
    fast = load_config(DataGenConfig, ROOT / "configs/data_gen_fast.yaml").pictures
    plain = plain_pictures(fast, "float32")
    assert (plain.batch_size, plain.scheduler, plain.steps) == (1, "default", 50)
    same = ("model", "guidance_scale", "image_size", "stored_size")
    assert all(getattr(plain, name) == getattr(fast, name) for name in same)


def test_a_folder_of_pictures_is_refused(tmp_path, monkeypatch):
    from benchmarks import data_gen

    arguments = ["--config", str(ROOT / "configs/data_gen_toyland.yaml")]
    arguments += ["pictures.source=folder", f"pictures.folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(UserError, match="pictures.source: the benchmark draws"):
        data_gen.main()


def test_importing_it_loads_neither_jax_nor_torch():
    code = (
        "import benchmarks.data_gen, sys; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
