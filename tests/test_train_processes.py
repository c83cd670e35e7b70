"""Two processes with two devices each are the same run as one process with one device."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from bootpig_jax.training.checkpointing import fault, saved_steps
from bootpig_jax.training.metrics import read_history
from tests.training_helpers import save_tiny_data

pytestmark = pytest.mark.long

STEPS = 10
SECONDS_TO_END = 30  # that schedulers leave between SIGTERM and SIGKILL
HANG_SECONDS = 120  # more than compiling takes
TRAIN = ("-m", "bootpig_jax.train")
WEIGHTS = "diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def arguments(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("processes")
    data = save_tiny_data(folder / "tiny")
    (folder / "tiny.yaml").write_text(f"""\
model: {{base: {model_folder}}}
data: {{dir: {data}, image_size: 16, threads: 2}}
output_dir: unset
batch_size: 8
steps: {STEPS}
precision: float32
optimizer: {{lr_reference: 1e-3, lr_rsa: 1e-3}}
mesh: {{data: 2, fsdp: 2, fsdp_min_size: 64}}
checkpoint: {{every: 3, keep: 9}}
logging: {{every: 1, grid_every: 5, grid_steps: 2, grid_references: 2}}
safety: {{hang_seconds: 400}}
""")
    return ["--config", str(folder / "tiny.yaml")]


def start(
    arguments: list[str],
    output: Path,
    processes: int,
    last: Sequence[str] = TRAIN,
    devices: int = 4,
) -> list[subprocess.Popen[str]]:
    """Starts a run of so many devices in all; the last process may run another program."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [
        f"--xla_force_host_platform_device_count={devices // processes}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments, f"output_dir={output}"],
            env=environment | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, program in enumerate([TRAIN] * (processes - 1) + [last])
    ]


def finish(running: list[subprocess.Popen[str]]) -> str:
    """Waits for the processes and returns what the first one printed."""
    printed = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(printed)
    return printed[0]


def history(output: Path) -> dict[int, dict[str, float]]:
    """The loss, also by timestep, and the gradients' norms of each update."""
    return {
        row["step"]: {name: row[name] for name in row if name.startswith(("loss", "gradient_norm"))}
        for row in read_history(output)
    }


def gradient_means(output: Path) -> dict[str, np.ndarray]:
    """What the optimiser keeps of all gradients: their running means after the last update."""
    state = output / "checkpoints" / str(STEPS) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(state).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restored = checkpointer.restore(state, restore_args=as_numpy)
    return {name: array for name, array in restored.items() if ".mu." in name}


def assert_same_run(output: Path, expected: Path) -> None:
    assert history(output).keys() == history(expected).keys() == set(range(1, STEPS + 1))
    for step, metrics in history(expected).items():
        assert history(output)[step] == pytest.approx(metrics, rel=1e-5), step
    means, others = gradient_means(output), gradient_means(expected)
    assert means.keys() == others.keys() and len(means) > 100
    difference = np.sqrt(sum(np.square(means[n] - others[n]).sum() for n in means))
    assert difference <= 1e-5 * np.sqrt(sum(np.square(mean).sum() for mean in others.values()))
    for name in ("base_unet", "ref_unet"):
        tensors, others = (load_file(run / name / WEIGHTS) for run in (output, expected))
        for key, tensor in tensors.items():
            # Adam divides noise by noise where a gradient vanishes: a few weights take other steps.
            difference = np.abs(tensor - others[key])
            assert np.quantile(difference, 0.99) <= 1e-4 * np.abs(others[key]).max() + 1e-7, key


@pytest.fixture(scope="module")
def one_process(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    finish(start([*arguments, "mesh.data=1", "mesh.fsdp=1"], output, 1, devices=1))
    return output


@pytest.mark.promise("R5", "two processes are one: losses, gradients within 1e-5")
def test_two_processes_equal_one(arguments, one_process, tmp_path):
    finish(start(arguments, tmp_path / "run", 2))
    assert_same_run(tmp_path / "run", one_process)


@pytest.mark.promise("R5", "a run of two processes goes on in one: losses within 1e-5")
def test_sigterm_to_one_of_two_saves_once_and_one_process_goes_on(arguments, one_process, tmp_path):
    output = tmp_path / "run"
    running = start([*arguments, "steps=1000"], output, 2)
    first = running[0]
    assert first.stdout is not None
    for line in first.stdout:
        if "1/1000" in line:
            break
    running[1].send_signal(signal.SIGTERM)  # only one of them is told
    printed = finish(running)
    assert "saved; the same command goes on from here" in printed
    steps = sorted(int(path.name) for path in (output / "checkpoints").iterdir())
    assert steps and history(output).keys() == set(range(1, steps[-1] + 1))
    for step in [step for step in steps if step > 6]:  # the test needs some steps to go on with
        os.rename(output / "checkpoints" / str(step), output / f"later-{step}")
    finish(start([*arguments, "mesh.data=1", "mesh.fsdp=4"], output, 1))
    assert_same_run(output, one_process)


@pytest.mark.promise("R2", "SIGTERM: everything saved, exit status 0 within 30 s")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.torture)])
def test_sigterm_loses_no_update(
    arguments: list[str], tmp_path: Path, processes: int, times: int, found: Callable[[str], None]
) -> None:
    rng = np.random.default_rng(processes)
    slowest, made = 0.0, 0
    for _ in range(times):
        running = start([*arguments, "steps=10000", "logging.grid_every=0"], tmp_path, processes)
        wanted = made + int(rng.integers(1, 8))
        assert running[0].stdout is not None
        for line in running[0].stdout:
            if f"{wanted}/10000" in line:
                break
        asked = time.perf_counter()
        running[-1].send_signal(signal.SIGTERM)
        finish(running)
        slowest = max(slowest, time.perf_counter() - asked)
        assert slowest < SECONDS_TO_END
        made = max(history(tmp_path))
        assert made >= wanted and made == max(saved_steps(tmp_path / "checkpoints"))
        assert fault(tmp_path / "checkpoints" / str(made)) is None
    found(f"{processes} process(es): {times} of {times}, the slowest in {slowest:.1f} s")


# The data of this process stop after three batches.
HANGING = """
import sys, time
import bootpig_jax.train
prepare, batches = bootpig_jax.train.to_pictures, []
def hang(*arguments, **more):
    batches.append(1)
    if len(batches) > 3:
        print("hanging", flush=True)
        time.sleep(1000)
    return prepare(*arguments, **more)
bootpig_jax.train.to_pictures = hang
bootpig_jax.train.main(sys.argv[1:])
"""


@pytest.mark.promise("R8", "one process hangs: stacks printed, all end in time")
def test_a_peer_that_hangs_ends_all_processes(
    arguments: list[str], tmp_path: Path, found: Callable[[str], None]
) -> None:
    more = ["logging.grid_every=0", f"safety.hang_seconds={HANG_SECONDS}"]
    running = start([*arguments, *more], tmp_path / "run", 2, last=("-c", HANGING))
    assert running[1].stdout is not None
    # If none says so, both ended before, while compiling.
    assert any("hanging" in line for line in running[1].stdout)
    began = time.perf_counter()
    printed = [process.communicate(timeout=HANG_SECONDS + 60)[0] for process in running]
    seconds = time.perf_counter() - began
    assert all(process.returncode != 0 for process in running), "\n".join(printed)
    assert any("Timeout (0:02:00)!" in text and "in run_steps" in text for text in printed)
    assert seconds < HANG_SECONDS + 10
    found(f"limit {HANG_SECONDS} s: gone after {seconds:.0f} s")
