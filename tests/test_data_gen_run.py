"""The run as a whole: deterministic shards, resume, errors. Pictures are Toyland's renderings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from bootpig_jax.data.records import ShardReader, decode, decode_mask, decode_picture, read_split
from bootpig_jax.errors import UserError
from bootpig_jax.toyland import render, world
from bootpig_jax.yaml_config import load_config
from data_gen.captions import make_caption_source
from data_gen.config import DataGenConfig, samples_hash
from data_gen.masks import make_segmenter
from data_gen.run import exclusive, generate
from data_gen.shards import finished_shards, make_shard, shard_path
from data_gen.stages import Rejected, Segmentation, Stages

ROOT = Path(__file__).parents[1]


class RenderedPictures:
    """Draws Toyland's captions with its renderer; a stand-in for the diffusion model.

    Raises KeyboardInterrupt at the picture number `stop_at`. Sleeps `pause` seconds a picture.
    """

    model_hash = "renderer"

    def __init__(self, stop_at=None, pause=0.0):
        self.drawn = 0
        self._stop_at, self._pause = stop_at, pause

    def draw(self, captions, seeds):
        pictures = []
        for caption, seed in zip(captions, seeds, strict=True):
            if self.drawn == self._stop_at:
                raise KeyboardInterrupt
            self.drawn += 1
            time.sleep(self._pause)
            category, position, scene = world.parse_caption(caption)
            rng = np.random.default_rng(seed)
            picture = render.render(world.sample_subject(rng, category), scene, position, rng)
            pictures.append(Rejected("not_finite") if seed % 7 == 0 else picture.image)
        return pictures


class EverythingRejected:
    def segment(self, pictures, objects, seeds):
        return [Rejected("empty") for _ in pictures]


class FullMask:
    def segment(self, pictures, objects, seeds):
        return [Segmentation(np.ones(p.shape[:2], bool), 1.0) for p in pictures]


def make_config(folder, **changes):
    values = dict(
        output_dir=folder,
        dataset="toyland",
        candidates=22,
        candidates_per_shard=6,
        captions="toyland",
        pictures=dict(model="unused", image_size=64, batch_size=3),
        masks=dict(grabcut=dict(working_size=64, iterations=1), filters=dict(border=0.0)),
    )
    return DataGenConfig.model_validate({**values, **changes})


def make_stages(config, pictures=None, segmenter=None):
    return Stages(
        make_caption_source(config.captions, config.seed),
        pictures or RenderedPictures(),
        segmenter or make_segmenter(config.masks),
    )


def contents(folder):
    """Everything a run wrote, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder):
    return {name: data for name, data in contents(folder).items() if ".tfrecord" in name}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    config = make_config(tmp_path_factory.mktemp("data") / "out")
    with exclusive(config.output_dir):
        generate(config, make_stages(config))
    return config


def read_all(config):
    split = read_split(config.output_dir, config.split)
    readers = [
        ShardReader(path, expected_count=count)
        for path, count in zip(split.paths, split.counts, strict=True)
    ]
    return [decode(reader[i]) for reader in readers for i in range(len(reader))]


def test_writes_a_dataset_that_training_reads(finished):
    records = read_all(finished)
    summary = json.loads((finished.output_dir / "summary.json").read_text())
    assert len(records) == summary["samples"]
    assert len(records) + sum(summary["rejects"].values()) == summary["candidates"] == 22
    assert summary["rejects"]["not_finite"] > 0
    assert len({record.id for record in records}) == len(records)
    for record in records:
        picture, mask = decode_picture(record.target), decode_mask(record.mask)
        assert picture.shape == (64, 64, 3) and mask.shape == (64, 64)
        assert record.caption.startswith(f"A photo of a {record.object}, ")
        ys, xs = np.nonzero(mask)
        top, left, bottom, right = np.multiply(record.box, 64)
        assert (top, left) == (ys.min(), xs.min())
        assert (bottom, right) == (ys.max() + 1, xs.max() + 1)


def test_writes_a_contact_sheet(finished):
    from PIL import Image

    with Image.open(finished.output_dir / "contact_sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 500


def test_a_rerun_writes_the_same_bytes(finished, tmp_path):
    config = make_config(tmp_path)
    generate(config, make_stages(config))
    assert shards(tmp_path) == shards(finished.output_dir)


def test_shards_can_be_made_in_any_order(finished, tmp_path):
    config = make_config(tmp_path)
    for shard in (3, 1, 0, 2):
        make_shard(config, make_stages(config), shard)
    assert shards(tmp_path) == shards(finished.output_dir)


def test_the_batch_size_changes_no_sample(finished, tmp_path):
    pictures = dict(model="elsewhere", image_size=64, batch_size=8)
    config = make_config(tmp_path, pictures=pictures)
    generate(config, make_stages(config))
    assert shards(tmp_path) == shards(finished.output_dir)


@pytest.mark.parametrize("stop_at", [0, 4, 13, 21])
def test_an_interrupted_run_goes_on(finished, tmp_path, stop_at):
    config = make_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        generate(config, make_stages(config, RenderedPictures(stop_at)))
    assert not (tmp_path / "dataset_info.json").exists()
    again = RenderedPictures()
    generate(config, make_stages(config, again))
    assert again.drawn <= 22 - stop_at + 6
    assert shards(tmp_path) == shards(finished.output_dir)


def test_a_finished_run_draws_nothing(finished):
    before = contents(finished.output_dir)
    pictures = RenderedPictures()
    generate(finished, make_stages(finished, pictures))
    assert pictures.drawn == 0
    assert contents(finished.output_dir) == before


_CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_data_gen_run import *
config = make_config(Path({folder!r}))
with exclusive(config.output_dir):
    generate(config, make_stages(config, RenderedPictures(pause=0.1)))
"""


def test_killed_runs_lose_and_double_nothing(finished, tmp_path):
    """SIGKILL after each shard, at another moment each time, then to the end."""
    script = _CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    for number, delay in enumerate((0.0, 0.1, 0.2)):
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(tmp_path.glob("*.done.json"))) <= number:
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    config = make_config(tmp_path)
    with exclusive(tmp_path):  # the lock died with its owner
        generate(config, make_stages(config))
    assert shards(tmp_path) == shards(finished.output_dir)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "no report", "damaged report", "no file"])
def test_unfinished_shards_are_made_again(finished, tmp_path, damage):
    config = make_config(tmp_path)
    make_shard(config, make_stages(config), 1)
    path = shard_path(config, 1)
    report = path.with_name(path.name + ".done.json")
    assert list(finished_shards(config, "renderer")) == [1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no report":
        report.unlink()
    elif damage == "damaged report":
        report.write_text(report.read_text()[:-9])
    else:
        path.unlink()
    assert finished_shards(config, "renderer") == {}


def test_another_runs_folder_is_refused(finished):
    other = finished.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="other settings or another model"):
        generate(other, make_stages(other))


def test_the_hash_follows_what_decides_the_samples(finished):
    def changed(**changes):
        return samples_hash(finished.model_copy(update=changes), "renderer")

    same = samples_hash(finished, "renderer")
    pictures = finished.pictures
    assert changed(output_dir=Path("x")) == same
    assert changed(pictures=pictures.model_copy(update={"batch_size": 9, "device": "cuda"})) == same
    assert changed(pictures=pictures.model_copy(update={"steps": 9})) != same
    assert changed(candidates=23) != same
    assert samples_hash(finished, "retrained") != same


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with exclusive(tmp_path), pytest.raises(UserError, match="another run is writing"):
        with exclusive(tmp_path):
            pass


def test_a_shard_without_samples_is_an_error_that_counts_the_reasons(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(UserError, match=r"all 5 candidates were rejected \(empty \d"):
        make_shard(config, make_stages(config, segmenter=EverythingRejected()), 0)
    with pytest.raises(UserError, match="too_large"):
        make_shard(config, make_stages(config, segmenter=FullMask()), 0)
    assert not contents(tmp_path)


def test_shards_share_the_candidates_evenly():
    config = make_config("x", candidates=25, candidates_per_shard=6)
    ranges = [config.shard_indices(shard) for shard in range(config.num_shards)]
    assert [index for one in ranges for index in one] == list(range(25))
    assert {len(one) for one in ranges} == {5}


def test_the_output_folder_cannot_be_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot be created"), exclusive(tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["toyland", "sd21"])
def test_the_shipped_configurations_are_valid(name):
    load_config(DataGenConfig, ROOT / f"configs/data_gen_{name}.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pictures: {modle: x}", "did you mean pictures.model"),
        ("candidates: -1", "candidates"),
        ("candidates: .nan", "candidates"),
        ("seed: 1\nseed: 2", "seed"),
        ("seed: !!python/object/apply:os.getcwd []", "not allowed"),
        ("masks: {filters: {min_area: 0.9}}", "min_area must be below max_area"),
        ("pictures: {model: x, image_size: 60}", "image_size"),
    ],
)
def test_bad_configurations_are_one_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    given = yaml.compose(text)
    keys = {key.value for key, _ in given.value}
    overrides = [o for o in ("output_dir=x", "pictures.model=x") if o.split(".")[0] not in keys]
    with pytest.raises(UserError, match=message) as error:
        load_config(DataGenConfig, path, overrides)
    assert "\n" not in str(error.value)


def test_the_command_line_reports_mistakes_without_a_traceback(tmp_path):
    config = ROOT / "configs/data_gen_toyland.yaml"
    child = subprocess.run(
        [sys.executable, "-m", "data_gen.run", "--config", config, "candidates=no"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert child.returncode == 2
    assert child.stderr.startswith("error: ") and "candidates" in child.stderr
    assert "Traceback" not in child.stderr


def test_importing_data_gen_loads_neither_jax_nor_torch():
    code = "import data_gen.run, sys; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
