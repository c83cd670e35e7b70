"""What a model is known by: a hash of the files that are read of it, wherever they lie.

Hashing gigabytes takes its time, so the hash of each file is kept in the user's cache folder and
holds as long as the file has the size and the times it had.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import pydantic

from bootpig_jax import files
from bootpig_jax.checkpoints.diffusers import weight_files
from bootpig_jax.errors import UserError

KNOWN = "hashes.json"  # in the cache folder
MOST_KNOWN = 1000  # files; the newest stay
_NETWORKS = ("unet", "vae", "text_encoder", "base_unet", "ref_unet")
_PARTS = (*_NETWORKS, "tokenizer", "scheduler")

# Size, time of the last change to the content and to anything (which the user cannot set), SHA-256.
_Known = tuple[int, int, int, Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]]
_KNOWN_FILES = pydantic.TypeAdapter(dict[str, _Known])


def hash_model(folder: Path, *, allow_pickle: bool = False) -> str:
    """The SHA-256 of a model in diffusers' layout, or of what training exports.

    Of weights that lie there several times (half precision, pickled) those count that are read.

    Args:
        folder: of the model.
        allow_pickle: whether pickled weights are read where there are no others.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: weights are missing, or a file cannot be read.
    """
    known = _known()
    new: dict[str, _Known] = {}

    def digest(path: Path) -> bytes:
        status = path.stat()
        stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        name = str(path.absolute())
        if name not in known or known[name][:3] != stamp:
            new[name] = (*stamp, _digest(path).hex())
        return bytes.fromhex((known | new)[name][3])

    try:
        result = hash_files(folder, _files(folder, allow_pickle), digest)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if new:
        _remember(new)
    return result


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def hash_files(
    folder: Path, paths: Iterable[Path], digest: Callable[[Path], bytes] = _digest
) -> str:
    """One hash of the names below `folder` and the contents of `paths`, in any order."""
    together = hashlib.sha256()
    for path in sorted(paths):
        together.update(path.relative_to(folder).as_posix().encode() + b"\0" + digest(path))
    return together.hexdigest()


def _files(folder: Path, allow_pickle: bool) -> Iterator[Path]:
    """The files that are read of a model, but for lists of which tensor lies in which."""
    for part in _PARTS:
        if not (folder / part).is_dir():
            continue
        for path in (folder / part).iterdir():
            if path.suffix in (".json", ".txt") and ".index." not in path.name and path.is_file():
                yield path
        if part in _NETWORKS:
            yield from weight_files(folder / part, allow_pickle)


def _known() -> dict[str, _Known]:
    try:
        return _KNOWN_FILES.validate_json(_kept_in().read_bytes(), strict=True)
    except (OSError, RuntimeError, ValueError):  # there is none, no home, or it is damaged
        return {}


def _remember(new: dict[str, _Known]) -> None:
    known = {name: entry for name, entry in _known().items() if name not in new} | new
    newest = dict(list(known.items())[-MOST_KNOWN:])
    # Where nothing can be kept, the files are read again next time.
    with contextlib.suppress(UserError, RuntimeError):
        files.write_whole(_kept_in(), _KNOWN_FILES.dump_json(newest, indent=1))


def _kept_in() -> Path:
    return files.CACHE.expanduser() / KNOWN
