"""Latents and text features on disk, in the place of pictures and captions.

VAE and text encoder are frozen, and take a third of a training step. What they make of a dataset
can be computed once (`python -m bootpig_jax.cache_latents`): the target's latents and the caption's
features exactly as a step would compute them, and the reference's for N augmented copies, of which
each visit draws one. So with a cache a reference has N appearances in place of endlessly many.

    cache.json            what it was made of, and how many records are done
    target.npy            [n, 2, h, w, c]: mean and standard deviation (`training.step.Posterior`)
    reference.npy         [n, N, 2, h, w, c]
    text.npy              [n, l, e]
    reference_text.npy    [n, l, e], where the Reference UNet reads another caption
    crc32c.npy            [n]: checksum of a record's bytes, always checked

Arrays have the precision that training computes in; bfloat16 is stored as its bits.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import grain
import ml_dtypes
import numpy as np

from bootpig_jax.errors import UserError
from bootpig_jax.files import write_whole

ARRAYS = ("target", "reference", "text", "reference_text")
_DESCRIPTION = "cache.json"
_CHECKSUMS = "crc32c.npy"

CachedBatch = dict[str, Any]
"""Arrays: `target`, `reference` [b, 2, h, w, c], `text`, `reference_text` if there is one."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a cache was made of. Two that differ in anything but `model` must not be mixed.

    Attributes:
      model: the base checkpoint, as the configuration names it: it may have been moved since.
      model_sha256: of its files. Caches that an earlier version made have none.
      data_fingerprint: of the dataset.
      split: of it.
      image_size: of the pictures, in pixels.
      augmentation: of the references.
      reference_caption: what the Reference UNet reads.
      copies: N.
      seed: of the augmentation.
      precision: of the arrays.
    """

    model: str
    model_sha256: str
    data_fingerprint: str
    split: str
    image_size: int
    augmentation: str
    reference_caption: str
    copies: int
    seed: int
    precision: str


class CacheWriter:
    """Fills a cache, record after record; goes on where an earlier one stopped."""

    def __init__(self, folder: Path, contents: Contents, shapes: Mapping[str, tuple[int, ...]]):
        """Opens or creates the files.

        Args:
          folder: of the cache.
          contents: what is put in.
          shapes: of each array, with the number of records in front.

        Raises:
          UserError: the folder holds another cache, or cannot be written to.
        """
        self._folder, self._contents = folder, contents
        self.done = 0
        dtype = _stored(contents.precision)
        try:
            if (folder / _DESCRIPTION).exists():
                self.done = _checked(folder, contents)["done"]
            folder.mkdir(parents=True, exist_ok=True)
            count = next(iter(shapes.values()))[0]
            self._arrays = {name: self._open(name, shape, dtype) for name, shape in shapes.items()}
            self._checksums = self._open("crc32c", (count,), np.dtype(np.uint32))
        except OSError as error:
            raise UserError(f"data.cache: {folder} cannot be written: {error.strerror}") from None

    def append(self, batch: Mapping[str, np.ndarray]) -> None:
        """Writes the next records; they count from when this returns.

        Args:
          batch: `Contents.precision` arrays by name, equally many records in each.
        """
        count = len(next(iter(batch.values())))
        rows = slice(self.done, self.done + count)
        for name, values in batch.items():
            self._arrays[name][rows] = np.ascontiguousarray(values).view(self._arrays[name].dtype)
        for row in range(rows.start, rows.stop):
            self._checksums[row] = _checksum({n: a[row] for n, a in self._arrays.items()})
        for array in (*self._arrays.values(), self._checksums):
            array.flush()
        self.done += count
        _describe(self._folder, self._contents, self.done)

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        mode: Any = "r+" if self.done else "w+"
        return np.lib.format.open_memmap(
            self._folder / f"{name}.npy", mode=mode, dtype=dtype, shape=shape
        )


class CacheSource:
    """All records of a cache: a random-access source for Grain."""

    def __init__(self, folder: Path, contents: Contents):
        """Opens the files.

        Raises:
          UserError: there is no cache, it is of something else, or it is not complete.
        """
        self._folder = folder
        if not (folder / _DESCRIPTION).exists():
            raise UserError(
                f"data.cache: {folder} holds no cache: make it with python -m "
                "bootpig_jax.cache_latents and the same configuration"
            )
        done = _checked(folder, contents)["done"]
        try:
            self._arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in ARRAYS
                if (folder / f"{name}.npy").exists()
            }
            self._checksums = np.load(folder / _CHECKSUMS)
        except (OSError, ValueError) as error:
            raise UserError(f"data.cache: {folder} is damaged: {error}; make it again") from None
        if done != len(self._checksums):
            raise UserError(
                f"data.cache: {folder} holds {done} of {len(self._checksums)} records: go on with "
                "python -m bootpig_jax.cache_latents"
            )
        self._dtype = _computed(contents.precision)

    def __len__(self) -> int:
        """The number of records."""
        return len(self._checksums)

    def __getitem__(self, index: int) -> CachedBatch:
        """Record `index`, its checksum checked; `reference` has all copies.

        Raises:
          UserError: the record is damaged.
        """
        record = {name: np.asarray(array[index]) for name, array in self._arrays.items()}
        if _checksum(record) != self._checksums[index]:
            raise UserError(
                f"data.cache: record {index} in {self._folder} is damaged: make the cache again"
            )
        return {name: array.view(self._dtype) for name, array in record.items()}


def make_cached_loader(
    folder: Path,
    contents: Contents,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> grain.DatasetIterator[CachedBatch]:
    """Opens an endless, shuffled stream of batches, in the order of `data.pipeline.make_loader`.

    Args:
      folder: of the cache.
      contents: what it must be made of.
      batch_size: samples a batch of *this* process.
      seed: of the order and the choice among copies.
      process_index: this process's share of the stream.
      process_count: the number of processes that share the stream.
      num_threads: threads that read ahead.

    Raises:
      UserError: the cache is missing, incomplete or of something else; while iterating, damaged.
    """
    dataset = (
        grain.MapDataset.source(CacheSource(folder, contents))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_one_copy)
        .batch(batch_size, drop_remainder=True)[process_index::process_count]
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads))
    return iter(dataset.to_iter_dataset(options))


def name_weights(folder: Path, contents: Contents) -> bool:
    """Lets a cache say from which weights it was made, if it was made before caches did.

    Args:
      folder: of the cache; there need not be one yet.
      contents: what it must be made of. The weights are taken for these.

    Returns:
      Whether it did not say so.

    Raises:
      UserError: the cache is of something else, or damaged.
    """
    if not (folder / _DESCRIPTION).exists():
        return False
    description = _checked(folder, contents)
    if "model_sha256" in description:
        return False
    # A folder that cannot be written to is asked again next time.
    with contextlib.suppress(UserError):
        _describe(folder, contents, description["done"])
    return True


def _describe(folder: Path, contents: Contents, done: int) -> None:
    text = json.dumps({"done": done, **dataclasses.asdict(contents)}, indent=1)
    write_whole(folder / _DESCRIPTION, text + "\n")


def _one_copy(record: CachedBatch, rng: np.random.Generator) -> CachedBatch:
    copies = record["reference"]
    return record | {"reference": copies[rng.integers(len(copies))]}


def _checked(folder: Path, contents: Contents) -> dict[str, Any]:
    """Reads a cache's description and compares it with what is wanted."""
    path = folder / _DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        done = int(description["done"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"data.cache: {path} is damaged: {error}; make the cache again") from None
    wanted = dataclasses.asdict(contents)
    # The weights are known by their hash; where there is none, by where they lay.
    wanted.pop("model" if "model_sha256" in description else "model_sha256")
    for name, value in wanted.items():
        if description.get(name) != value:
            raise UserError(
                f"data.cache: {folder} was made with {name} {description.get(name)!r}, this run "
                f"has {value!r}: name another folder, or make the cache again"
            )
    return description | {"done": done}


def _checksum(record: Mapping[str, np.ndarray]) -> int:
    return int(google_crc32c.value(b"".join(record[name].tobytes() for name in sorted(record))))


def _computed(precision: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if precision == "bfloat16" else np.float32)


def _stored(precision: str) -> np.dtype:
    return np.dtype(np.uint16 if precision == "bfloat16" else np.float32)
