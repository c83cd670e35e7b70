"""Files that are written whole or not at all, and where those lie that can be made again."""

import contextlib
import os
import threading
from pathlib import Path

from bootpig_jax.errors import UserError

CACHE = Path("~/.cache/bootpig_jax")


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file that is either whole or not there, however the process ends.

    Raises:
        UserError: it cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    # Two processes or threads may write the same file: each its own draft.
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be written ({reason}); make room or name another"
        ) from None
