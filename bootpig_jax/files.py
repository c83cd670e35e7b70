"""Where files may lie, and how they are written whole or not at all.

Every path that a configuration or a command line takes is declared with one of the types here:
`LocalPath` and `LocalName` as fields, `local_path` and `local_name` as options. What has a scheme,
as `gs://bucket/run` has, would become a folder called `gs:` in the current one, without a word.
"""

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Annotated, Any

import pydantic

from bootpig_jax.errors import UserError

CACHE = Path("~/.cache/bootpig_jax")  # of what can be made again


def local_name(text: str) -> str:
    """Returns what names a file, or a model, which may be a hub id; but not with a scheme.

    Raises:
        UserError: it has one.
    """
    if scheme := re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise UserError(
            f"{text}: {scheme[0]} is no file system of this machine: mount it (gs:// with gcsfuse, "
            "s3:// with s3fs) and name the path below the mount"
        )
    return text


def local_path(text: str) -> Path:
    """Returns the path; see `local_name`."""
    return Path(local_name(text))


def _checked(value: Any) -> Any:
    try:
        return local_name(value) if isinstance(value, str) else value
    except UserError as error:
        raise ValueError(str(error)) from None


LocalName = Annotated[str, pydantic.BeforeValidator(_checked)]
LocalPath = Annotated[Path, pydantic.BeforeValidator(_checked)]


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
