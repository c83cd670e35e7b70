"""The scripts in launch/ that train, with stand-ins for the programs they call."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bootpig_jax.config import TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.training.distributed import join_processes
from bootpig_jax.yaml_config import load_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
CONFIG = "configs/paper.yaml"


def launched(
    folder: Path, script: str, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a script with stand-ins that write down the words they are called with."""
    log = folder / "log"
    for name in ("srun", "gcloud", "python"):
        path = folder / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" {name} "$@" > {log}\n')
        path.chmod(0o755)
    child = subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        cwd=ROOT,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    return child, log.read_text().splitlines() if log.exists() else []


def config_of(words: list[str]) -> TrainConfig:
    """The configuration that a command line ends in."""
    assert words[:4] == ["python", "-m", "bootpig_jax.train", "--config"]
    return load_config(TrainConfig, ROOT / words[4], words[5:])


@pytest.mark.parametrize("script", ["train_slurm.sbatch", "train_tpu.sh"])
def test_the_scripts_are_valid_and_say_what_they_need(tmp_path, script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    child, called = launched(tmp_path, script)
    assert child.returncode != 0 and "name " in child.stderr and not called


def test_slurm_starts_one_process_a_gpu(tmp_path):
    child, words = launched(tmp_path, "train_slurm.sbatch", "seed=7", CONFIG=CONFIG)
    assert child.returncode == 0, child.stderr
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert config_of(words[2:]).seed == 7
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in (LAUNCH / "train_slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"].startswith("TERM@")


def test_tpu_hosts_get_the_arguments_unharmed(tmp_path):
    prompts = 'logging.grid_prompts=["a {object}, it\'s here"]'
    child, words = launched(
        tmp_path, "train_tpu.sh", prompts, CONFIG=CONFIG, TPU="slice", ZONE="here"
    )
    assert child.returncode == 0, child.stderr
    assert words[0] == "gcloud" and "--worker=all" in words
    command = shlex.split(words[-1])
    config = config_of(["python", *command[command.index(".venv/bin/python") + 1 :]])
    assert config.logging.grid_prompts == ("a {object}, it's here",)
    child, words = launched(tmp_path, "train_tpu.sh", "--stop", TPU="slice", ZONE="here")
    assert "pkill -TERM" in words[-1]


def test_the_jobset_starts_the_processes_that_it_announces(monkeypatch):
    manifest: Any = yaml.safe_load((LAUNCH / "train_jobset.yaml").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(variables["JAX_NUM_PROCESSES"])
    host = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    assert (
        variables["JAX_COORDINATOR_ADDRESS"] == f"{host}:{container['ports'][0]['containerPort']}"
    )
    words = [word for argument in container["args"] for word in argument.split("=", 1)[:1]]
    assert container["command"] == ["python", "-m", "bootpig_jax.train"] and words[0] == "--config"
    config = load_config(TrainConfig, ROOT / CONFIG, container["args"][1:])
    assert config.output_dir == Path("/shared/runs/paper")

    # The names are those that training reads.
    told: dict[str, Any] = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: told.update(given))
    for name in variables:
        monkeypatch.setenv(name, variables[name] or "1")
    join_processes()
    assert told == {"num_processes": 2, "process_id": 1}


def test_incomplete_variables_are_one_line(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        join_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: must be a whole number, not 'two'"):
        join_processes()
