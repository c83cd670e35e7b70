"""Picture files and folders of them, and contents by their hash."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from bootpig_jax.errors import UserError

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Source = Path | bytes  # a picture file, or what it would hold


def read_source(source: Source) -> bytes:
    """What a picture file holds.

    Raises:
        OSError: it cannot be read.
    """
    return source if isinstance(source, bytes) else source.read_bytes()


def sha256(data: bytes) -> str:
    """The hash as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, before the work for it starts.

    Raises:
        UserError: it or the folder that it would be made in is a file or read-only.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output: {existing} is no folder that can be written to; name another")


def list_pictures(folder: Path) -> list[Path]:
    """The picture files right in a folder, by name; hidden ones are not counted."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".")
    )


def list_folders(folder: Path) -> list[Path]:
    """The folders right in a folder, by name; hidden ones are not counted."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def name_some(names: Iterable[str], most: int = 5) -> str:
    """The first names and how many more there are: "a, b and 3 more"."""
    listed = list(names)
    shown = ", ".join(listed[:most])
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most} more"
