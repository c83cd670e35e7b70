"""`python -m bootpig_jax.train`: trains, stops when asked, goes on to the bit, or refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.numpy import load_file

import bootpig_jax.train
from bootpig_jax.checkpoints.diffusers import load_unet
from bootpig_jax.config import TrainConfig
from bootpig_jax.data import records
from bootpig_jax.data.pipeline import dataset_fingerprint
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.train import base_sha256
from bootpig_jax.training.checkpointing import MANIFEST, Checkpoints, _digests
from bootpig_jax.training.metrics import read_history
from bootpig_jax.yaml_config import load_config
from tests.training_helpers import save_tiny_data

STEPS = 5
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def arguments(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(f"""\
model: {{base: {model_folder}}}
data: {{dir: {data}, image_size: 16, threads: 2}}
output_dir: unset
batch_size: 8
steps: {STEPS}
optimizer: {{lr_reference: 1e-3, lr_rsa: 1e-3}}
reference_caption: first_clause
reference_key_scale: 1.1
checkpoint: {{every: 2, keep: 9}}
logging: {{every: 2, grid_every: 5, grid_steps: 2, grid_references: 2}}
validation: {{dir: {data}, every: 4, samples: 20}}
""")
    return ["--config", str(path)]


def train(arguments: list[str], output: Path, *more: str) -> Path:
    bootpig_jax.train.main([*arguments, f"output_dir={output}", *more])
    return output


@pytest.fixture(scope="module")
def trained(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(arguments, tmp_path_factory.mktemp("runs") / "trained")


def test_exports_what_was_trained(trained, model_folder):
    start = load_file(model_folder / "unet" / WEIGHTS)
    base, reference = (load_file(trained / f / WEIGHTS) for f in ("base_unet", "ref_unet"))
    assert start.keys() == base.keys() == reference.keys()
    changed = {name for name in base if (base[name] != start[name]).any()}
    assert changed == {name for name in base if ".attn1." in name}
    assert (reference["conv_in.weight"] != start["conv_in.weight"]).any()
    np.testing.assert_array_equal(reference["conv_out.weight"], start["conv_out.weight"])
    assert json.loads((trained / "bootpig.json").read_text()) == {
        "reference_timestep": "same",
        "reference_key_scale": 1.1,
        "reference_caption": "first_clause",
    }
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert "reference_caption: first_clause" in (trained / "config.yaml").read_text()
    rows = [row for row in read_history(trained) if row["group"] == "validation"]
    assert [row["step"] for row in rows] == [4]
    layers = sum(".attn1.to_q." in name for name in start)
    shares = [rows[0][f"reference_share_{layer:02d}"] for layer in range(layers)]
    assert all(0 < share < 1 for share in shares)
    # All 20 samples, two batches and a rest, at timesteps from all tenths.
    assert {f"loss_t{t}0-{t + 1}0" for t in range(10)} <= rows[0].keys() and rows[0]["loss"] > 0
    (events,) = (trained / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"samples" in events.read_bytes()
    speeds = [row for row in read_history(trained) if row["group"] == "train"]
    assert all(row["gflops_per_second"] > 0 and "mfu" not in row for row in speeds)


def test_the_model_card_says_what_was_trained(trained, model_folder, data):
    _, metadata, card = (trained / "README.md").read_text().split("---\n", 2)
    assert "base_model" not in metadata and "pipeline_tag: text-to-image" in metadata
    assert f"| Base model | {model_folder.name} |" in card
    assert f"| Data | {data.name}, 24 triplets, at 16 px |" in card
    assert f"| Updates | {STEPS}, of 8 samples |" in card
    assert "Base UNet: its self-attention layers" in card
    (row,) = (row for row in read_history(trained) if row["group"] == "validation")
    assert f"| Validation: loss | {row['loss']:.4f} (after update 4) |" in card
    assert "reference_caption: first_clause" in card
    # Nothing of the machine that it was trained on.
    assert str(model_folder.parent) not in card and str(trained.parent) not in card


@pytest.mark.parametrize("name", ["base_unet", "ref_unet"])
def test_plain_diffusers_opens_the_result(trained, name):
    theirs = UNet2DConditionModel.from_pretrained(trained, subfolder=name)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, 4), np.float32)
    text = rng.standard_normal((2, 16, 16), np.float32)
    t = np.array([1, 900])
    with torch.no_grad():
        expected = theirs(
            torch.tensor(latents.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(text)
        ).sample
    prediction, _ = jax.jit(lambda unet, *inputs: unet(*inputs))(
        load_unet(trained / name), latents, t, text
    )
    np.testing.assert_allclose(
        prediction, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.promise("R2", "SIGTERM, then resumed: the same bits as uninterrupted")
def test_resumed_after_sigterm_equals_uninterrupted(
    trained, arguments, tmp_path, monkeypatch, capsys
):
    prepare, calls = bootpig_jax.train.to_pictures, []

    def prepare_and_kill(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(bootpig_jax.train, "to_pictures", prepare_and_kill)
    arguments = [*arguments, "logging.grid_every=0", "validation.dir=null"]
    output = train(arguments, tmp_path / "run")
    assert "stopped at step 3, saved" in capsys.readouterr().err
    assert not (output / "ref_unet").exists()
    train(arguments, output, "checkpoint.resume=must", "data.threads=0")
    assert len(calls) == STEPS
    for name in ("base_unet", "ref_unet"):
        assert (output / name / WEIGHTS).read_bytes() == (trained / name / WEIGHTS).read_bytes()
    position = Path("checkpoints") / str(STEPS) / "data" / "metadata"
    assert (output / position).read_text() == (trained / position).read_text()

    # A finished run is only exported again; another dataset of the same configuration is refused.
    shutil.rmtree(output / "ref_unet")
    train(arguments, output)
    assert len(calls) == STEPS and (output / "ref_unet" / WEIGHTS).exists()
    other = save_tiny_data(tmp_path / "other", count=16)
    with pytest.raises(UserError, match="data.dir: its shards are not those"):
        train(arguments, output, f"data.dir={other}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mesh.data=3"], "mesh: data 3 x fsdp 1 is not the 8 devices"),
        (["mesh.fsdp=3"], "mesh: data -1 x fsdp 3 does not divide the 8 devices"),
        (["batch_size=12"], "batch_size: 12 is not divisible by accumulation 1 x 8 devices"),
        (["checkpoint.resume=must"], "checkpoint.resume: must, but"),
        (["model.base=/absent"], "/absent is neither a folder"),
        (["data.dir=/absent"], "/absent"),
        (["data.split=absent"], "absent"),
        (["data.image_size=12"], "multiple of"),
        (["data.image_size=32", "logging.grid_every=0"], "image_size"),
        (["data.image_size=3e2"], "data.image_size"),
    ],
)
def test_refused_before_anything_is_written(arguments, tmp_path, overrides, words):
    with pytest.raises(UserError) as caught:
        train(arguments, tmp_path / "run", *overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_moved_weights_go_on_and_swapped_ones_do_not(
    trained, arguments, model_folder, tmp_path, capsys
):
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    moved = Path(shutil.copytree(model_folder, tmp_path / "moved"))
    there = [*arguments[2:], f"model.base={moved}", f"output_dir={output}"]
    config = load_config(TrainConfig, arguments[1], there)
    fingerprint = dataset_fingerprint(config.data.dir, config.data.split)
    assert Checkpoints(config, fingerprint, base_sha256(config)).latest == STEPS

    weights = moved / "vae" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=f"model.base: the weights in {moved} are not those"):
        train(arguments, output, f"model.base={moved}")

    # A checkpoint from before they said which weights they are of.
    step = output / "checkpoints" / str(STEPS)
    run = json.loads((step / "run" / "metadata").read_text())
    del run["base_sha256"]
    (step / "run" / "metadata").write_text(json.dumps(run))
    (step / MANIFEST).write_text(json.dumps(_digests(step)))
    capsys.readouterr()
    train(arguments, output, "logging.grid_every=0", "validation.dir=null")
    assert capsys.readouterr().err.count(f"warning: checkpoint {STEPS} was made before") == 1


def test_never_goes_over_an_older_run(trained, arguments):
    with pytest.raises(UserError, match="checkpoint.resume: never"):
        train(arguments, trained, "checkpoint.resume=never")
    with pytest.raises(UserError, match="seed: 7, but the checkpoint .* was trained with 0"):
        train(arguments, trained, "seed=7")


class World:
    """What a line of the table of bad input may change: copies of a run, its model, its data."""

    def __init__(self, folder: Path, arguments: list[str], trained: Path, model: Path, data: Path):
        self.folder, self.arguments = folder, arguments
        self._originals = {"run": trained, "model": model, "data": data}
        self.output = folder / "new"

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self._originals[name], self.folder / name))

    def yaml(self, line: str) -> list[str]:
        path = self.folder / "bad.yaml"
        path.write_text(Path(self.arguments[1]).read_text() + line + "\n")
        return ["--config", str(path)]

    def run(self) -> Path:
        self.output = self.copy("run")
        return self.output

    def shard(self) -> Path:
        return sorted(self.copy("data").glob("*.tfrecord*"))[0]


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def duplicate_key(world: World) -> list[str]:
    return world.yaml("steps: 7")


def yaml_object(world: World) -> list[str]:
    return world.yaml(f"seed: !!python/object/apply:os.mkdir ['{world.folder}/made']")


def all_damaged(world: World) -> list[str]:
    for step in (world.run() / "checkpoints").iterdir():
        flip(step / "run" / "metadata")
    return []


def other_model(world: World) -> list[str]:
    world.run()
    model = world.copy("model")
    flip(next((model / "unet").glob("*.safetensors")))
    return [f"model.base={model}"]


def other_precision(world: World) -> list[str]:
    world.run()
    return ["precision=bfloat16"]


def flipped_record(world: World) -> list[str]:
    shard = world.shard()
    flip(shard, 100)
    return [f"data.dir={shard.parent}"]


def cut_record(world: World) -> list[str]:
    shard = world.shard()
    shard.write_bytes(shard.read_bytes()[:-1])
    return [f"data.dir={shard.parent}"]


def no_shards(world: World) -> list[str]:
    shard = world.shard()
    for path in shard.parent.glob("*.tfrecord*"):
        path.unlink()
    return [f"data.dir={shard.parent}"]


def empty_shard(world: World) -> list[str]:
    shard = world.shard()
    shard.write_bytes(b"")
    return [f"data.dir={shard.parent}"]


def other_shards(world: World) -> list[str]:
    world.run()
    return [f"data.dir={save_tiny_data(world.folder / 'other', count=16)}"]


def missing_feature(world: World) -> list[str]:
    shard = world.shard()
    shard.write_bytes(records._frame(b"") * 12)  # records without any
    return [f"data.dir={shard.parent}"]


def pickled_weights(world: World) -> list[str]:
    model = world.copy("model")
    (model / "unet" / WEIGHTS).unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return [f"model.base={model}"]


def cut_weights(world: World) -> list[str]:
    model = world.copy("model")
    weights = (model / "unet" / WEIGHTS).read_bytes()
    (model / "unet" / WEIGHTS).write_bytes(weights[:-100])
    return [f"model.base={model}"]


def unwritable(world: World) -> list[str]:
    (world.folder / "file").touch()
    world.output = world.folder / "file" / "run"
    return []


BAD_INPUT: list[tuple[str, Callable[[World], list[str]], str]] = [
    ("an unknown key", lambda world: ["step=3"], "did you mean steps?"),
    ("a negative number", lambda world: ["optimizer.lr_rsa=-1e-4"], "optimizer.lr_rsa"),
    ("NaN", lambda world: ["optimizer.lr_rsa=.nan"], "optimizer.lr_rsa"),
    ("a key twice", duplicate_key, "steps"),
    ("a Python object", yaml_object, "bad.yaml"),
    ("no checkpoint", lambda world: ["checkpoint.resume=must"], "checkpoint.resume: must"),
    ("all checkpoints damaged", all_damaged, "every one in"),
    ("another model", other_model, "model.base"),
    ("another precision", other_precision, "precision: 'bfloat16', but"),
    ("another mesh", lambda world: ["mesh.data=3"], "mesh: data 3"),
    ("a batch that can't be divided", lambda world: ["batch_size=9", "accumulation=2"], "9"),
    ("a flipped bit in a record", flipped_record, "damaged at byte"),
    ("a cut record", cut_record, "damaged at byte"),
    ("no shards", no_shards, ".tfrecord"),
    ("an empty shard", empty_shard, "empty shard"),
    ("other shards than before", other_shards, "data.dir: its shards are not those"),
    ("a feature missing", missing_feature, "record 0"),
    ("pickled weights", pickled_weights, "pickled"),
    ("cut weights", cut_weights, "is damaged"),
    ("nowhere to write", unwritable, "output_dir"),
]


MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.fixture
def world(arguments, trained, model_folder, data, tmp_path) -> World:
    return World(tmp_path, arguments, trained, model_folder, data)


def assert_refused(world: World, status: int, errors: str, words: str) -> None:
    assert status == 2 and "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in line and errors.rstrip().endswith(line)
    # Nothing half-written: no result, no checkpoint but those that were there.
    assert not (world.folder / "made").exists() and not (world.folder / "new").exists()


@pytest.mark.promise("R11", "bad input to training: one line, exit status 2, no traceback")
@pytest.mark.parametrize(
    ("prepare", "words"),
    [(prepare, words) for _, prepare, words in BAD_INPUT],
    ids=[name for name, _, _ in BAD_INPUT],
)
def test_bad_input_is_refused_in_one_line(world, prepare, words, capsys):
    more = prepare(world)
    with pytest.raises(SystemExit) as ended:
        run_cli(partial(train, world.arguments, world.output, *more))
    assert_refused(world, ended.value.code, capsys.readouterr().err, words)


@pytest.mark.long
@pytest.mark.promise("R11", "bad input to training: under 2 GB each")
@pytest.mark.parametrize(
    ("prepare", "words"),
    [(prepare, words) for _, prepare, words in BAD_INPUT],
    ids=[name for name, _, _ in BAD_INPUT],
)
def test_bad_input_needs_little(world, prepare, words, found):
    more = prepare(world)
    started = time.perf_counter()
    # From a process that is small itself: what a child has at most begins with what its parent has.
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, "-m", "bootpig_jax.train"]
        + [*world.arguments, *more, f"output_dir={world.output}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    peak = int(process.stdout.splitlines()[-1]) * 1024
    assert_refused(world, process.returncode, process.stderr, words)
    assert peak < 2e9
    found(f"{peak / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


@pytest.mark.long
@pytest.mark.promise("R11", "the newest checkpoint damaged: moved aside, the one before taken")
def test_the_newest_checkpoint_damaged(world, capsys):
    run = world.run()
    flip(run / "checkpoints" / str(STEPS) / "run" / "metadata")
    train(world.arguments, run, "logging.grid_every=0", "validation.dir=null")
    errors = capsys.readouterr().err
    assert f"warning: checkpoint {STEPS} is damaged (run/metadata" in errors
    assert "going on from step 4" in errors
    assert [path.name for path in (run / "damaged_checkpoints").iterdir()] == [f"{STEPS}-0"]
    assert (run / "checkpoints" / str(STEPS)).is_dir()


def test_command_line_errors_are_one_line_and_status_2(arguments, tmp_path):
    command = [sys.executable, "-m", "bootpig_jax.train", *arguments, f"output_dir={tmp_path}/run"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    wrong = subprocess.run([*command, "step=3"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: command line: unknown key step: did you mean steps?\n"
    with pytest.raises(SystemExit) as finished:
        bootpig_jax.train.main([*arguments, "output_dir=x", "--print-config"])
    assert finished.value.code == 0
