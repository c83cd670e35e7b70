"""`python -m bootpig_jax.train`: trains, stops when asked, goes on to the bit, or refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import bootpig_jax.train
from bootpig_jax.errors import UserError
from bootpig_jax.training.metrics import read_history
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
    # 16 of the 20 samples, two batches, at timesteps from all tenths but the last.
    assert {f"loss_t{t}0-{t + 1}0" for t in range(8)} <= rows[0].keys() and rows[0]["loss"] > 0
    (events,) = (trained / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"samples" in events.read_bytes()


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


def test_never_goes_over_an_older_run(trained, arguments):
    with pytest.raises(UserError, match="checkpoint.resume: never"):
        train(arguments, trained, "checkpoint.resume=never")
    with pytest.raises(UserError, match="seed: 7, but the checkpoint .* was trained with 0"):
        train(arguments, trained, "seed=7")


def test_command_line_errors_are_one_line_and_status_2(arguments, tmp_path):
    command = [sys.executable, "-m", "bootpig_jax.train", *arguments, f"output_dir={tmp_path}/run"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    wrong = subprocess.run([*command, "step=3"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: command line: unknown key step: did you mean steps?\n"
    with pytest.raises(SystemExit) as finished:
        bootpig_jax.train.main([*arguments, "output_dir=x", "--print-config"])
    assert finished.value.code == 0
