"""Locks between processes, let go by the kernel when their owner ends, however it ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bootpig_jax.errors import UserError

_FOLDER = ".locks"


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def held(output_dir: Path, name: str, *, shared: bool = False) -> Iterator[None]:
    """Holds one of an output folder's locks.

    The lock is on an empty file of its own, which stays: were it deleted, one process could lock
    the deleted file and another one a new file of that name.

    Args:
      output_dir: the folder.
      name: the lock's name, which is a file name.
      shared: whether others may hold it at the same time, all of them as shared.

    Raises:
      Locked: another process holds it.
      UserError: the folder cannot be written to, or its file system has no locks.
    """
    path = output_dir / _FOLDER / name
    try:
        path.parent.mkdir(exist_ok=True)
        # NFS grants an exclusive lock only to a file that is open for writing.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"output_dir: {path} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"another process holds {path}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise UserError(
                f"output_dir: {output_dir} is on a file system without locks (flock): mount it "
                "with them, or choose another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)
