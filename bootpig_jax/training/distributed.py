"""Several processes as one run: who is told about the others, and by whom.

Each process drives the devices of its own host, or its share of them; together they hold the mesh.
A launcher starts them and says who they are in the environment: Slurm's `srun`, or anything else by
three variables,

    JAX_COORDINATOR_ADDRESS=host:port    of process 0, the same for all
    JAX_NUM_PROCESSES=2
    JAX_PROCESS_ID=0                     this process's number

Open MPI, Cloud TPU, and Kubernetes (with its Python package) are left to JAX. Without any of it the
process is alone. What the environment says decides, never how JAX words an error.
"""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bootpig_jax.errors import UserError

WAIT_SECONDS = 300  # for the others
_TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# Variables of the clusters in which JAX finds its way by itself.
_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"
_KUBERNETES = "KUBERNETES_SERVICE_HOST"
_CLOUD_TPU = "TPU_ML_PLATFORM"  # JAX sets it where it finds TPUs


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its run.

    Attributes:
        coordinator_address: `host:port` of process 0.
        num_processes: how many there are.
        process_id: this one's number.
    """

    coordinator_address: str
    num_processes: int
    process_id: int


def join_processes() -> None:
    """Joins the run's other processes, if there are any. Call it before anything asks for a device.

    Raises:
      UserError: the environment's variables are incomplete, no launcher has started this process
        where others are awaited, or the coordinator does not answer.
    """
    if jax.distributed.is_initialized():
        return
    open_mpi = _OPEN_MPI in os.environ
    place = _told() or (None if open_mpi else _slurm())
    given: dict[str, Any] = {}
    if place is not None:
        if place.num_processes == 1:
            return
        who = f"process {place.process_id} of {place.num_processes} (the first is 0)"
        _say(f"{who}: waiting up to {WAIT_SECONDS} s for the others at {place.coordinator_address}")
        given = dataclasses.asdict(place)
    elif open_mpi or _CLOUD_TPU in os.environ or _in_kubernetes():
        _say(f"waiting up to {WAIT_SECONDS} s for the processes of this machine's cluster")
    else:
        return
    try:
        jax.distributed.initialize(
            **given, local_device_ids=local_device_ids(), initialization_timeout=WAIT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and place is None and not open_mpi:
            return  # A TPU or a pod that belongs to no group.
        reason = str(error).splitlines()[0]
        raise UserError(f"the run's processes cannot be joined: {reason}") from None


def local_device_ids() -> list[int] | None:
    """Which of the GPUs that this process sees it takes; empty: all.

    JAX gives a process that Slurm or Open MPI started one GPU, by its number on its host. That
    leaves the others idle where there is one process a host, and names a GPU that is not there
    where the launcher shows each process its own. So: what this process alone sees is its own, and
    what those of a host all see they share evenly.

    Returns:
      Indices into the visible devices. None where `JAX_LOCAL_DEVICE_IDS` says it to JAX.

    Raises:
      UserError: a host's processes cannot share its GPUs evenly.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    processes, index = _on_this_host()
    if processes == 1:
        return []
    names = [os.environ[name] for name in _VISIBLE if name in os.environ]
    here = _integer("SLURM_GPUS_ON_NODE")
    seen = len(names[0].split(",")) if names else here
    if seen is None:
        return [index]
    if seen < processes or (here is not None and seen < here):
        return []  # The launcher has shared them out.
    share, rest = divmod(seen, processes)
    if rest:
        raise UserError(
            f"{processes} processes on this host cannot share its {seen} GPUs evenly: start one a "
            "GPU, or one a host"
        )
    return list(range(index * share, (index + 1) * share))


def told_by_first(work: Callable[[], str]) -> str:
    """Returns on all processes what the first one finds out; the others only wait for it.

    Args:
      work: returns a SHA-256 in hexadecimal.

    Raises:
      UserError: on the first process, what `work` raised; on the others, that it did.
    """
    if jax.process_count() == 1:
        return work()
    digits, failure = "0" * 64, None
    if jax.process_index() == 0:
        try:
            digits = work()
        except UserError as error:
            failure = error
    # All zeros tell the others to stop as well.
    sent = np.frombuffer(bytes.fromhex(digits), np.uint8).astype(np.int32)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    if failure is not None:
        raise failure
    if not received.any():
        raise UserError("the first process cannot go on; it says why")
    return bytes(received.tolist()).hex()


def _told() -> Place | None:
    """What the three variables say."""
    count, index = (_integer(name) for name in _TOLD[1:])
    coordinator = os.environ.get(_TOLD[0])
    missing = [name for name in _TOLD if name not in os.environ]
    if len(missing) == len(_TOLD):
        return None
    if coordinator is None or count is None or index is None:
        given = next(name for name in _TOLD if name in os.environ)
        raise UserError(f"{given}: set {' and '.join(missing)} beside it")
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID: {index} is not below JAX_NUM_PROCESSES, {count}")
    return Place(coordinator, count, index)


def _slurm() -> Place | None:
    """What Slurm says to a process that `srun` has started.

    Raises:
      UserError: several tasks are allocated, and this process is none of them.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    allocated = _integer("SLURM_NTASKS") or _integer("SLURM_JOB_NUM_NODES") or 1
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    # The shell that `salloc` opens on a node is a step, too, but one of a single task that keeps
    # the number of the allocation in SLURM_NTASKS.
    count = 1
    if nodes is not None and "SLURM_PROCID" in os.environ:
        count = _integer("SLURM_STEP_NUM_TASKS") or allocated
    if count == 1 < allocated:
        raise UserError(
            f"Slurm has allocated {allocated} tasks, and srun did not start this process as one of "
            f"them: it would wait for {allocated - 1} others. Start all with `srun python -m "
            "bootpig_jax.train ...`, or this one alone with SLURM_NTASKS=1 before the command"
        )
    index = _integer("SLURM_PROCID") or 0
    if nodes is None or count == 1:
        return None
    # "node[001-004,7],other" begins with node001.
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    # Jobs that share a host get different ports.
    port = os.environ.get("JAX_COORDINATOR_PORT") or 61440 + (_integer("SLURM_JOB_ID") or 0) % 4096
    return Place(f"{host}:{port}", count, index)


def _on_this_host() -> tuple[int, int]:
    """How many processes were started on this host, and this one's number among them."""
    if _OPEN_MPI in os.environ:
        processes = _integer("OMPI_COMM_WORLD_LOCAL_SIZE")
        return processes or 1, _integer("OMPI_COMM_WORLD_LOCAL_RANK") or 0
    if "SLURM_STEP_NODELIST" not in os.environ:
        return 1, 0
    local = _integer("SLURM_LOCALID") or 0
    # "8(x2),4": eight tasks on each of the first two nodes of the step, four on the third.
    counts: list[int] = []
    for entry in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _integer("SLURM_NODEID") or 0
    if node < len(counts):
        return counts[node], local
    tasks, nodes = _integer("SLURM_NTASKS") or 1, _integer("SLURM_STEP_NUM_NODES") or 1
    return _integer("SLURM_NTASKS_PER_NODE") or -(-tasks // nodes), local


def _in_kubernetes() -> bool:
    return _KUBERNETES in os.environ and importlib.util.find_spec("kubernetes") is not None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"{name}: must be a whole number, not {text!r}")
    return int(text)
