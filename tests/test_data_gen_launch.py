"""The scripts in launch/, with stand-ins for the programs they call."""

import os
import subprocess
from pathlib import Path

import pytest

from data_gen.run import Part, parse_arguments

ROOT = Path(__file__).parents[1]
CONFIG = "configs/data_gen_toyland.yaml"
SCRIPTS = ("data_gen_slurm.sbatch", "data_gen_ray.sh")


@pytest.fixture
def launch(tmp_path):
    """Runs a script with programs that write down what they are called with."""
    log = tmp_path / "log"
    log.touch()
    programs = {
        # Runs its program, as Slurm does on the first of the nodes.
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
        "python": "",
        "hostname": "echo first-node",
        # The cluster's head stays until it is ended; the cluster has two machines.
        "ray": "if [[ $1 == start ]]; then exec sleep 60; fi\n"
        f'if grep -q -e --head {log}; then printf "1 node_a\\n1 node_b\\n"; fi',
        "sleep": 'exec /bin/sleep "$1"',
    }
    for name, body in programs.items():
        path = tmp_path / name
        called = f'echo "{name} $* ${{RAY_ADDRESS:-}}" >> {log}\n' if name != "sleep" else ""
        path.write_text(f"#!/usr/bin/env bash\n{called}{body}\n")
        path.chmod(0o755)

    def run(script, *arguments, **environment):
        child = subprocess.run(
            ["bash", ROOT / "launch" / script, *arguments],
            cwd=ROOT,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return child, [line.split() for line in log.read_text().splitlines()]

    return run


def arguments_of(line):
    assert line[:3] == ["python", "-m", "data_gen.run"]
    return parse_arguments(line[3:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_valid_and_want_a_configuration(launch, script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
    child, called = launch(script)
    assert child.returncode != 0 and "name a configuration" in child.stderr and not called


def test_a_slurm_job_makes_its_part(launch):
    array = {"ID": "5", "MIN": "2", "COUNT": "4"}
    names = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    child, called = launch(SCRIPTS[0], "candidates=9", CONFIG=CONFIG, **names)
    assert child.returncode == 0, child.stderr
    command = arguments_of(called[1])
    assert called[0][0] == "srun" and len(called) == 2
    assert (command.part, command.config.candidates) == (Part(3, 4), 9)


def test_a_cluster_that_is_up_is_used(launch):
    child, called = launch(SCRIPTS[1], "candidates=9", CONFIG=CONFIG, RAY_ADDRESS="there:1")
    assert child.returncode == 0, child.stderr
    (line,) = called
    assert line.pop() == "there:1"
    assert arguments_of(line).engine == "ray" and arguments_of(line).config.candidates == 9


def test_a_slurm_job_starts_a_cluster_of_its_own(launch):
    child, called = launch(SCRIPTS[1], CONFIG=CONFIG, SLURM_JOB_NUM_NODES="2")
    assert child.returncode == 0, child.stderr
    address = "first-node:6379"
    assert ["ray", "start", "--block", "--head", "--port=6379", address] in called
    assert called[-1].pop() == address
    assert arguments_of(called[-1]).engine == "ray"
