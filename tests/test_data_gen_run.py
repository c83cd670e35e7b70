"""The run as a whole: deterministic shards, resume, errors. Pictures are Toyland's renderings."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from bootpig_jax.data.records import ShardReader, decode, decode_mask, decode_picture, read_split
from bootpig_jax.errors import UserError
from bootpig_jax.toyland import render, world
from bootpig_jax.yaml_config import load_config
from data_gen.captions import make_caption_source
from data_gen.config import DataGenConfig, GrabCutConfig, samples_hash
from data_gen.locks import Locked, held
from data_gen.masks import GrabCutSegmenter, make_segmenter
from data_gen.plan import make_plan
from data_gen.run import WHOLE, Command, Part, parse_arguments, run
from data_gen.shards import captions_hash, finished_shards, make_shard, shard_path
from data_gen.stages import Rejected, Segmentation, Stages
from tests.shipped_configs import assert_takes_effect

ROOT = Path(__file__).parents[1]


class RenderedPictures:
    """Draws Toyland's captions with its renderer; a stand-in for the diffusion model.

    Raises KeyboardInterrupt at the picture number `stop_at`.
    """

    model_hash = "renderer"

    def __init__(self, stop_at=None):
        self.drawn = 0
        self._stop_at = stop_at

    def draw(self, indices, captions, seeds):
        pictures = []
        for caption, seed in zip(captions, seeds, strict=True):
            if self.drawn == self._stop_at:
                raise KeyboardInterrupt
            self.drawn += 1
            category, position, scene = world.parse_caption(caption)
            rng = np.random.default_rng(seed)
            picture = render.render(world.sample_subject(rng, category), scene, position, rng)
            pictures.append(Rejected("not_finite") if seed % 7 == 0 else picture.image)
        return pictures


class EverythingRejected:
    model_hash = ""

    def segment(self, pictures, objects, seeds):
        return [Rejected("empty") for _ in pictures]


class FullMask:
    model_hash = ""

    def segment(self, pictures, objects, seeds):
        return [Segmentation(np.ones(p.shape[:2], bool), 1.0) for p in pictures]


def make_config(folder, **changes):
    values = dict(
        output_dir=folder,
        dataset="toyland",
        candidates=22,
        candidates_per_shard=6,
        captions={"source": "toyland"},
        pictures=dict(model="unused", image_size=64, batch_size=3),
        masks=dict(grabcut=dict(working_size=64, iterations=1), filters=dict(border=0.0)),
    )
    return DataGenConfig.model_validate({**values, **changes})


def make_stages(config, pictures=None, segmenter=None):
    return Stages(pictures or RenderedPictures(), segmenter or make_segmenter(config.masks))


def generate(config, pictures=None, segmenter=None, part=WHOLE):
    return run(Command(config, part), lambda config: make_stages(config, pictures, segmenter))


def captions_of(config, shard):
    return make_caption_source(config).captions(config.shard_indices(shard))


def contents(folder):
    """Everything a run wrote, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder):
    """The shards and what they show of rejects. Their reports hold the time it took, too."""
    return {
        name: data
        for name, data in contents(folder).items()
        if ".tfrecord" in name and data and not name.endswith(".done.json")
    }


def reports(folder):
    return [
        {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        for path in sorted(folder.glob("*.done.json"))
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    config = make_config(tmp_path_factory.mktemp("data") / "out")
    assert generate(config) == 0
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


def test_a_rerun_writes_the_same_bytes(finished, tmp_path):
    generate(make_config(tmp_path))
    assert shards(tmp_path) == shards(finished.output_dir)
    assert reports(tmp_path) == reports(finished.output_dir)


def test_shards_can_be_made_in_any_order(finished, tmp_path):
    config = make_config(tmp_path)
    for shard in (3, 1, 0, 2):
        make_shard(config, make_stages(config), shard, captions_of(config, shard))
    assert shards(tmp_path) == shards(finished.output_dir)


def test_the_batch_size_changes_no_sample(finished, tmp_path):
    pictures = dict(model="elsewhere", image_size=64, batch_size=8)
    generate(make_config(tmp_path, pictures=pictures))
    assert shards(tmp_path) == shards(finished.output_dir)


@pytest.mark.parametrize("stop_at", [0, 4, 13, 21])
def test_an_interrupted_run_goes_on(finished, tmp_path, stop_at):
    config = make_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        generate(config, RenderedPictures(stop_at))
    assert not (tmp_path / "dataset_info.json").exists()
    again = RenderedPictures()
    generate(config, again)
    assert again.drawn <= 22 - stop_at + 6
    assert shards(tmp_path) == shards(finished.output_dir)


def test_a_finished_run_draws_nothing(finished):
    before = contents(finished.output_dir)
    pictures = RenderedPictures()
    generate(finished, pictures)
    assert pictures.drawn == 0
    assert contents(finished.output_dir) == before


@pytest.mark.parametrize("damage", ["cut", "no report", "damaged report", "no file"])
def test_unfinished_shards_are_made_again(finished, tmp_path, damage):
    config = make_config(tmp_path)
    made = make_shard(config, make_stages(config), 1, captions_of(config, 1))
    path = shard_path(config, 1)
    report = path.with_name(path.name + ".done.json")
    assert finished_shards(config) == {1: made}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no report":
        report.unlink()
    elif damage == "damaged report":
        report.write_text(report.read_text()[:-9])
    else:
        path.unlink()
    assert finished_shards(config) == {}


def test_another_runs_folder_is_refused(finished):
    steps = finished.pictures.model_copy(update={"steps": 7})
    other = finished.model_copy(update={"pictures": steps})
    with pytest.raises(UserError, match="other settings or another model"):
        generate(other)
    with pytest.raises(UserError, match="other captions, or another seed"):
        generate(finished.model_copy(update={"seed": 1}))


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
    config = make_config(tmp_path)
    for part in (Part(0, 1), Part(0, 2)):
        with held(tmp_path, "run"), pytest.raises(UserError, match="another run is writing"):
            generate(config, part=part)
    with held(tmp_path, "run", shared=True):
        with pytest.raises(UserError, match="another run is writing"):
            generate(config)
        assert generate(config, part=Part(0, 2)) == 0


def test_two_processes_do_not_make_one_shard(tmp_path):
    config = make_config(tmp_path)
    with held(tmp_path, shard_path(config, 0).name), pytest.raises(Locked):
        make_shard(config, make_stages(config), 0, captions_of(config, 0))


def test_a_shard_that_another_process_has_made_is_not_made_again(tmp_path):
    config = make_config(tmp_path)
    captions, pictures = captions_of(config, 0), RenderedPictures()
    made = make_shard(config, make_stages(config), 0, captions)
    assert make_shard(config, make_stages(config, pictures), 0, captions) == made
    assert pictures.drawn == 0


class AloneAndTogether(RenderedPictures):
    """Draws its second batch only while the first one is being cut out; then the reverse."""

    model_hash = ""

    def __init__(self):
        super().__init__()
        self._second_is_drawn, self._first_is_cut = threading.Event(), threading.Event()

    def draw(self, indices, captions, seeds):
        if self.drawn:
            self._second_is_drawn.set()
            assert self._first_is_cut.wait(30), "nothing is cut out beside the drawing"
        return super().draw(indices, captions, seeds)

    def segment(self, pictures, objects, seeds):
        assert self._second_is_drawn.wait(30), "nothing is drawn beside the cutting out"
        self._first_is_cut.set()
        return GrabCutSegmenter(GrabCutConfig(working_size=64, iterations=1)).segment(
            pictures, objects, seeds
        )


def test_pictures_are_drawn_while_others_are_cut_out(finished, tmp_path):
    config, both = make_config(tmp_path), AloneAndTogether()
    report = make_shard(config, make_stages(config, both, both), 0, captions_of(config, 0))
    name = report.shard
    # The same bytes as ever.
    assert contents(tmp_path)[name] == contents(finished.output_dir)[name]
    assert set(report.seconds) == {"pictures", "masks", "encoding", "waiting", "total"}


def test_other_captions_than_the_finished_shards_have_are_refused(finished, tmp_path):
    lines = [caption.text for n in range(4) for caption in captions_of(finished, n)]
    source = {"source": "file", "file": tmp_path / "captions.txt"}
    config = make_config(tmp_path / "out", captions=source)
    source["file"].write_text("\n".join(lines))
    generate(config, part=Part(1, 2))
    report = finished_shards(config)[1]
    assert report.captions_hash == captions_hash(captions_of(finished, 1))
    source["file"].write_text("\n".join(reversed(lines)))
    with pytest.raises(UserError, match="was made with other captions"):
        generate(config)
    source["file"].write_text("\n".join(lines))
    assert generate(config) == 0


class RejectsTheFirst:
    """Rejects the first candidates, and the pictures of all others are kept whole."""

    model_hash = ""

    def __init__(self, count):
        self._left = count

    def segment(self, pictures, objects, seeds):
        found = []
        for picture in pictures:
            self._left -= 1
            mask = np.zeros(picture.shape[:2], bool)
            mask[20:40, 20:40] = True
            found.append(Rejected("empty") if self._left >= 0 else Segmentation(mask, 1.0))
        return found


def test_a_shard_without_samples_is_empty_and_training_reads_the_others(tmp_path):
    config = make_config(tmp_path, masks=dict(filters=dict(border=0.0)))
    assert generate(config, segmenter=RejectsTheFirst(8)) == 0
    assert finished_shards(config)[0].count == 0
    assert shard_path(config, 0).read_bytes() == b""
    records = read_all(config)
    assert len(records) == json.loads((tmp_path / "summary.json").read_text())["samples"]


def test_a_run_without_samples_is_an_error_that_counts_the_reasons(tmp_path):
    for segmenter, reason in ((EverythingRejected(), r"empty \d"), (FullMask(), r"too_large \d")):
        config = make_config(tmp_path / reason[:5])
        with pytest.raises(UserError, match=rf"all 22 candidates were rejected \({reason}"):
            generate(config, segmenter=segmenter)
        assert (config.output_dir / "report.html").exists()
        assert not (config.output_dir / "dataset_info.json").exists()


def test_shards_share_the_candidates_evenly():
    config = make_config("x", candidates=25, candidates_per_shard=6)
    ranges = [config.shard_indices(shard) for shard in range(config.num_shards)]
    assert [index for one in ranges for index in one] == list(range(25))
    assert {len(one) for one in ranges} == {5}


def test_the_output_folder_cannot_be_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        generate(make_config(tmp_path / "out"))


SHIPPED = sorted((ROOT / "configs").glob("data_gen_*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_configurations_take_effect_and_can_be_planned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing has been made yet
    assert_takes_effect(DataGenConfig, path, tmp_path / "dumped.yaml")
    command = parse_arguments(["--config", str(path), "--dry-run"])
    assert command == Command(load_config(DataGenConfig, path), dry_run=True)
    plan = make_plan(command.config, command.part.shards(command.config)).text()
    all_of_them = f"{command.config.candidates:,}"
    assert f"{all_of_them} of {all_of_them} left" in plan


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


def parsed(*arguments):
    return parse_arguments(["--config", str(ROOT / "configs/data_gen_toyland.yaml"), *arguments])


def test_the_command_line():
    assert parsed() == Command(load_config(DataGenConfig, ROOT / "configs/data_gen_toyland.yaml"))
    command = parsed("--shards", "3/16", "--engine", "ray", "candidates=5", "--dry-run")
    assert (command.part, command.engine, command.dry_run) == (Part(3, 16), "ray", True)
    assert command.config.candidates == 5
    assert parsed("--only", "captions").only == "captions"
    own = parsed("--captions", "my: file.txt", "--images", "my #1").config
    assert (own.captions.source, own.captions.file) == ("file", Path("my: file.txt"))
    assert (own.pictures.source, own.pictures.folder) == ("folder", Path("my #1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "16/16"], "--shards.*not I/N with I below N"),
        (["--shards", "-1/16"], "--shards"),
        (["--shards", "x"], "--shards"),
        (["--engine", "beam"], "--engine"),
        (["--only", "pictures"], "--only"),
        (["--only", "captions", "--shards", "0/2"], "leave --shards out"),
        (["--candidate", "5"], "did you mean candidates"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        parsed(*arguments)
    assert "\n" not in str(error.value)


def test_part_i_of_n_takes_every_nth_shard():
    config = make_config("x", candidates=60, candidates_per_shard=6)
    assert list(Part(1, 4).shards(config)) == [1, 5, 9]
    taken = [shard for i in range(4) for shard in Part(i, 4).shards(config)]
    assert sorted(taken) == list(range(10))


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
