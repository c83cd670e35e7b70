"""Several processes as one run: who is told about the others, and by whom.

Each process drives the devices of its own host; together they hold the mesh. A launcher starts them
and says who they are: Slurm, Open MPI, Kubernetes and Cloud TPU are recognised by JAX itself;
anything else sets three variables of the environment,

    JAX_COORDINATOR_ADDRESS=host:port    of process 0, the same for all
    JAX_NUM_PROCESSES=2
    JAX_PROCESS_ID=0                     this process's number

Without any of it the process is alone.
"""

import os

import jax

from bootpig_jax.errors import UserError


def join_processes() -> None:
    """Joins the run's other processes, if there are any. Call it before anything asks for a device.

    Raises:
      UserError: the environment's variables are incomplete, or the coordinator does not answer.
    """
    count, index = (_integer(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    told = "JAX_COORDINATOR_ADDRESS" in os.environ
    if told and (count is None or index is None):
        raise UserError(
            "JAX_COORDINATOR_ADDRESS: set JAX_NUM_PROCESSES and JAX_PROCESS_ID beside it"
        )
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        if told or "coordinator_address" not in str(error):
            raise UserError(f"the run's processes cannot be joined: {error}") from None
        # Nobody launched several: the usual case.
    except RuntimeError as error:
        if not told and "must be called before" in str(error):
            return  # Called by a program that has used JAX before: it would have joined by now.
        reason = str(error).splitlines()[0]
        raise UserError(f"the run's processes cannot be joined: {reason}") from None


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"{name}: must be a whole number, not {text!r}")
    return int(text)
