"""The scripts in launch/ that train, with stand-ins for the programs they call."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jax._src import distributed

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
    assert (told["num_processes"], told["process_id"]) == (2, 1)
    assert told["coordinator_address"] == variables["JAX_COORDINATOR_ADDRESS"]


def test_incomplete_variables_are_one_line(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match="set JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        join_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: must be a whole number, not 'two'"):
        join_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(UserError, match="JAX_PROCESS_ID: 2 is not below JAX_NUM_PROCESSES, 2"):
        join_processes()


class Client:
    """In the place of the client that waits for the others."""

    def connect(self) -> None:
        pass


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Joins as the environment says, through JAX itself but for the connection.

    Returns (address, number of processes, this one's, which GPUs JAX shows), or None if alone.
    """
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "CUDA_VISIBLE", "JAX_NUM_PROC", "JAX_PROCESS_ID")):
            monkeypatch.delenv(name)
    jax_module = "jax._src.distributed"
    monkeypatch.setattr(f"{jax_module}.xla_bridge.backends_are_initialized", lambda: False)
    runtime = f"{jax_module}._jax.get_distributed_runtime"
    monkeypatch.setattr(f"{runtime}_service", lambda *_, **more: object())
    monkeypatch.setattr(f"{runtime}_client", lambda *_, **more: Client())
    state_of = f"{jax_module}.State.initialize_preemption_sync_manager"
    monkeypatch.setattr(state_of, lambda self: None)

    def join(**environment: object) -> Any:
        state, shown = distributed.State(), dict[str, str]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{jax_module}.global_state", state)
            patch.setattr(f"{jax_module}.config.update", shown.__setitem__)
            for name, value in environment.items():
                patch.setenv(name, str(value))
            join_processes()
        gpus = shown.get("jax_cuda_visible_devices", "all")
        if state.client is None:
            assert gpus == "all"
            return None
        return state.coordinator_address, state.num_processes, state.process_id, gpus

    return join


def step(tasks: int, nodes: int, process: int, **more: object) -> dict[str, object]:
    """What `srun` tells task number `process`, of equally many on each node."""
    here = tasks // nodes
    return {
        "SLURM_JOB_ID": 5000,
        "SLURM_STEP_ID": 0,
        "SLURM_NTASKS": tasks,
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NODELIST": "gpu[007-008,11]" if nodes > 1 else "gpu007",
        "SLURM_STEP_TASKS_PER_NODE": f"{here}(x{nodes})" if nodes > 1 else here,
        "SLURM_PROCID": process,
        "SLURM_LOCALID": process % here,
        "SLURM_NODEID": process // here,
    } | more


ALL_8 = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": 8}
ADDRESS = f"gpu007:{61440 + 5000 % 4096}"


def test_slurm_s_tasks_take_all_gpus_of_their_node_between_them(joined):
    # One task a node: all of them.
    assert joined(**step(2, 2, 1), **ALL_8) == (ADDRESS, 2, 1, "all")
    # One task a GPU, two GPUs a task, which all see all.
    assert joined(**step(16, 2, 11), **ALL_8) == (ADDRESS, 16, 11, "3")
    assert joined(**step(8, 2, 7), **ALL_8) == (ADDRESS, 8, 7, "6,7")
    # Each task sees its own only (--gpus-per-task): JAX would ask for one that is not there.
    assert joined(**step(16, 2, 11), CUDA_VISIBLE_DEVICES="0", SLURM_GPUS_ON_NODE=8)[3] == "all"
    assert joined(**step(4, 2, 3), CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_GPUS_ON_NODE=8)[3] == "all"
    # Nobody says what is to be seen.
    assert joined(**step(16, 2, 11), SLURM_GPUS_ON_NODE=16)[3] == "6,7"
    assert joined(**step(16, 2, 11))[3] == "3"
    # The second node has fewer tasks than the first.
    uneven = step(3, 1, 2, SLURM_STEP_TASKS_PER_NODE="2,1", SLURM_NODEID=1, SLURM_LOCALID=0)
    assert joined(**uneven, **ALL_8)[3] == "all"
    with pytest.raises(UserError, match="3 processes on this host cannot share its 8 GPUs evenly"):
        joined(**step(3, 1, 0), **ALL_8)
    # What the user says stands.
    assert joined(**step(2, 2, 1), **ALL_8, JAX_LOCAL_DEVICE_IDS="2,5")[3] == "2,5"
    # Told by the three variables and started by srun.
    told = {"JAX_COORDINATOR_ADDRESS": "there:1", "JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": 0}
    assert joined(**step(2, 2, 1), **ALL_8, **told) == ("there:1", 2, 0, "all")


def test_one_task_is_alone_with_all_its_gpus(joined):
    assert joined() is None
    assert joined(**step(1, 1, 0), **ALL_8) is None
    # An sbatch script without srun, on one node.
    assert joined(SLURM_JOB_ID=5000, SLURM_NTASKS=1, SLURM_JOB_NUM_NODES=1, SLURM_PROCID=0) is None


def test_a_shell_of_salloc_says_at_once_how_to_start(joined, capsys):
    # Where the shell runs on a node it is a step of one task; JAX takes it for the first of 16.
    on_a_node = step(1, 1, 0, SLURM_STEP_ID=4294967290) | {"SLURM_NTASKS": 16}
    where_it_was_called = {"SLURM_JOB_ID": 5000, "SLURM_NTASKS": 16, "SLURM_JOB_NUM_NODES": 2}
    for shell in (on_a_node, where_it_was_called):
        with pytest.raises(UserError, match="allocated 16 tasks, .* for 15 others.* `srun python"):
            joined(**shell)
        # What it says for this process alone.
        assert joined(**(shell | {"SLURM_NTASKS": 1})) is None
    assert joined(**on_a_node, OMPI_MCA_orte_hnp_uri="4096.0;tcp://10.0.0.1:1", **OPEN_MPI)
    assert "waiting" in capsys.readouterr().err


OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": 4,
    "OMPI_COMM_WORLD_RANK": 1,
    "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
    "OMPI_COMM_WORLD_LOCAL_RANK": 1,
}


def test_whoever_waits_says_for_whom(joined, capsys):
    joined(**step(16, 2, 11))
    assert (
        f"process 11 of 16 (the first is 0): waiting up to 300 s for the others at {ADDRESS}"
        in (capsys.readouterr().err)
    )
    joined(**step(1, 1, 0))
    assert capsys.readouterr().err == ""


def test_an_error_while_joining_is_one_line_whatever_its_words(joined, monkeypatch):
    def fails(*_: object, **more: object) -> None:
        raise RuntimeError("must be called before\ncoordinator_address")

    monkeypatch.setattr("jax._src.distributed._jax.get_distributed_runtime_client", fails)
    with pytest.raises(UserError, match="cannot be joined: must be called before$"):
        joined(**step(2, 2, 1))
