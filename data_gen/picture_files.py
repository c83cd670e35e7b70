"""Pictures: files of the user's own, in the place of drawn ones.

Candidate i is the i-th file of the folder, sorted by name, and takes caption i of the run. A file
that cannot be used is rejected with its reason and keeps its number, so that one bad file does not
give all later ones the wrong captions. Those that can be used are cut to the largest centred square
and resized.

The files are not trusted (`bootpig_jax.data.pictures`): nothing is unpacked, links are not
followed, and only a few formats are decoded.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from bootpig_jax.data.pictures import PictureError, open_picture, square, to_rgb
from bootpig_jax.errors import UserError
from data_gen.config import PicturesConfig
from data_gen.stages import Rejected

# What stands beside pictures without being one.
_CAPTION_SUFFIXES = (".txt", ".json", ".jsonl", ".csv")


class PictureFiles:
    """Gives the pictures in a folder; a `stages.PictureSource` that draws nothing."""

    def __init__(self, config: PicturesConfig, candidates: int) -> None:
        """Lists the folder.

        Args:
          config: of the run's pictures; `folder` is set.
          candidates: of the run.

        Raises:
          UserError: the folder cannot be listed, is a file, or holds fewer files than candidates.
        """
        assert config.folder is not None  # the configuration sees to it
        self._config = config
        self._paths = list_pictures(config.folder)
        if len(self._paths) < candidates:
            raise UserError(
                f"candidates: {candidates} are more than the {len(self._paths)} files in "
                f"{config.folder}: set candidates={len(self._paths)}"
            )
        self.model_hash = _hash_listing(self._paths[:candidates])

    def draw(
        self, indices: Sequence[int], captions: Sequence[str], seeds: Sequence[int]
    ) -> list[UInt8[np.ndarray, "h w 3"] | Rejected]:
        """Reads one batch of pictures (see `stages.PictureSource`).

        The reasons for rejects are those of `bootpig_jax.data.pictures` and `link`, `no_file`
        (a folder or a device), `no_permission`.
        """
        return [self._read(self._paths[index]) for index in indices]

    def _read(self, path: Path) -> UInt8[np.ndarray, "h w 3"] | Rejected:
        # Without O_NONBLOCK, a pipe that nobody writes to would never open.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            reasons = {
                errno.ELOOP: "link",
                errno.ENXIO: "no_file",
                errno.EACCES: "no_permission",
                errno.EPERM: "no_permission",
            }
            if error.errno in reasons:
                return Rejected(reasons[error.errno])
            raise
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return Rejected("no_file")
            config = self._config
            try:
                image = open_picture(file, min_side=config.min_side, max_aspect=config.max_aspect)
                return square(to_rgb(image)[0], config.stored_size)
            except PictureError as error:
                return Rejected(error.reason)


def list_pictures(folder: Path) -> list[Path]:
    """Returns what is directly in a folder, sorted by name, but for captions and hidden files.

    Folders in it are left out. What is no picture is not: it shall be counted.

    Raises:
      UserError: it is not a folder, or cannot be listed.
    """
    if folder.is_file():
        raise UserError(
            f"pictures.folder: {folder} is a file: name a folder (archives are not unpacked here)"
        )
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and not entry.name.lower().endswith(_CAPTION_SUFFIXES)
                and not entry.is_dir(follow_symlinks=False)
            ]
    except OSError as error:
        raise UserError(f"pictures.folder: {folder} cannot be read: {error.strerror}") from None
    return [folder / name for name in sorted(names)]


def _hash_listing(paths: Sequence[Path]) -> str:
    """Hashes names and sizes; the contents might take longer to read than the run."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        # A file name is bytes that need not be UTF-8, but without NUL.
        digest.update(os.fsencode(path.name) + f"\0{path.lstat().st_size}\0".encode())
    return digest.hexdigest()
