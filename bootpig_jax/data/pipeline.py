"""The input pipeline: shards of records in, batches of targets, references and words out.

    source, seed, shuffle, repeat, decode, augment, batch, [process::processes], threads

Every step is random access (`grain.MapDataset`), so an iterator's state is one number: the index of
the next batch. It does not depend on the number of threads. A resumed run gets the very batches
that an uninterrupted one would have got.

Two positions in the chain matter. `repeat` stands before `augment`: the generator of a sample is
derived from its index in the endless stream, so each epoch augments anew. The slice by process
stands *after* `augment`: slicing first would renumber the samples, and all processes would draw
the same augmentations. It stands after `batch` so that the processes' parts, joined in order, are
the samples [bBP, (b+1)BP) of the stream in their order, for batch b of P processes with B samples
each: the same global batch, row by row, whatever the number of processes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, UInt8

from bootpig_jax.data import records
from bootpig_jax.data.augment import AugmentationKind, build_reference, resize_square
from bootpig_jax.errors import UserError


class Batch(TypedDict):
    """What the loader yields."""

    target: UInt8[np.ndarray, "b h w 3"]
    """Target pictures."""
    reference: UInt8[np.ndarray, "b h w 3"]
    """The subjects on white."""
    caption: np.ndarray
    """The targets' captions: an array of str, [b]."""
    object: np.ndarray
    """The captions' words for the subjects: an array of str, [b]."""
    id: np.ndarray
    """The records' ids: an array of str, [b]."""


def make_loader(
    data_dir: str | os.PathLike[str],
    *,
    split: str = "train",
    batch_size: int,
    image_size: int,
    augmentation: AugmentationKind = "paper",
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> grain.DatasetIterator[Batch]:
    """Opens an endless, shuffled stream of batches; `get_state` and `set_state` resume it exactly.

    Args:
      data_dir: the folder that `data_gen` wrote.
      split: the split to read.
      batch_size: samples a batch of *this* process.
      image_size: height and width of both pictures, at most that of the stored ones.
      augmentation: how references vary (`bootpig_jax.data.augment`).
      seed: of the order and the augmentation; in [0, 2^32).
      process_index: this process's share of the stream, in [0, process_count).
      process_count: the number of processes that share the stream.
      num_threads: threads that build batches ahead, one whole batch each; 0 builds them on demand.
        As many batches wait in memory as there are threads, and at least two.

    Raises:
      UserError: if the dataset is missing, incomplete or damaged; while iterating, if a record is.
    """
    if batch_size < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"batch size {batch_size}, process {process_index} of {process_count}")
    decode = _Decode(image_size)
    augment = _Augment(image_size, augmentation)
    dataset = (
        grain.MapDataset.source(RecordSource(data_dir, split))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(decode)
        .random_map(augment)
        # The stream is endless; rounding its length up would overflow at batch size 1.
        .batch(batch_size, drop_remainder=True, batch_fn=_to_batch)[process_index::process_count]
    )
    # Grain's default would keep 500 batches.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads))
    return iter(dataset.to_iter_dataset(options))


def first_examples(
    data_dir: str | os.PathLike[str], *, split: str = "train", count: int, image_size: int
) -> Batch:
    """The first `count` examples in stored order with unaugmented references, for sample grids.

    Raises:
      UserError: if the dataset is missing or damaged.
    """
    source = RecordSource(data_dir, split)
    decode, augment = _Decode(image_size), _Augment(image_size, "none")
    rng = np.random.default_rng(0)  # drawn from by no step
    return _to_batch(
        [augment(decode(source[index]), rng) for index in range(min(count, len(source)))]
    )


def read_copies(
    source: RecordSource,
    rows: Sequence[int],
    *,
    copies: int,
    image_size: int,
    augmentation: AugmentationKind,
    seed: int,
) -> list[Batch]:
    """Reads records in stored order, several times with other augmentations.

    Args:
      source: the dataset.
      rows: which records.
      copies: how many batches; they differ in the references alone.
      image_size: as in `make_loader`.
      augmentation: as in `make_loader`.
      seed: with it and a record's row, the number of a copy decides the augmentation.

    Raises:
      UserError: if a record is damaged.
    """
    decode, augment = _Decode(image_size), _Augment(image_size, augmentation)
    decoded = [decode(source[row]) for row in rows]
    return [
        _to_batch(
            [
                augment(record, np.random.default_rng((seed, row, copy)))
                for row, record in zip(rows, decoded, strict=True)
            ]
        )
        for copy in range(copies)
    ]


def num_records(data_dir: str | os.PathLike[str], split: str = "train") -> int:
    """The number of records of a split, from its metadata.

    Raises:
      UserError: if the dataset is missing or its metadata damaged.
    """
    return records.read_split(data_dir, split).num_records


def dataset_fingerprint(data_dir: str | os.PathLike[str], split: str = "train") -> str:
    """A SHA-256 of the shards' names, sizes and counts; it stands in checkpoints.

    A loader's state is an index into this very list of shards: with another list, a resumed run
    would silently see other samples.

    Raises:
      UserError: if the dataset is missing or its metadata damaged.
    """
    shards = records.read_split(data_dir, split)
    listing = [
        (path.name, path.stat().st_size, count)
        for path, count in zip(shards.paths, shards.counts, strict=True)
    ]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@dataclass(frozen=True)
class StoredRecord:
    """A record as it is stored, and where it is, for error messages."""

    data: bytes
    where: str


class RecordSource:
    """All records of a split, shard after shard: a random-access source for Grain."""

    def __init__(self, data_dir: str | os.PathLike[str], split: str) -> None:
        """Indexes all shards.

        Raises:
          UserError: if a shard is missing, empty, cut, or its headers are damaged.
        """
        shards = records.read_split(data_dir, split)
        self._readers = [
            records.ShardReader(path, expected_count=count)
            for path, count in zip(shards.paths, shards.counts, strict=True)
        ]
        self._ends = list(itertools.accumulate(shards.counts))

    def __len__(self) -> int:
        """The number of records."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> StoredRecord:
        """Record `index`, in [0, len), its checksum checked.

        Raises:
          UserError: if the record is damaged.
        """
        shard = bisect.bisect_right(self._ends, index)
        reader = self._readers[shard]
        local = index - (self._ends[shard] - len(reader))
        return StoredRecord(reader[local], f"{reader.path}, record {local}")


@dataclass(frozen=True)
class _Decoded:
    picture: UInt8[np.ndarray, "h h 3"]
    mask: Bool[np.ndarray, "h h"]
    record: records.Record


@dataclass(frozen=True)
class _Example:
    target: UInt8[np.ndarray, "h h 3"]
    reference: UInt8[np.ndarray, "h h 3"]
    record: records.Record


@dataclass(frozen=True)
class _Decode:
    """Parses a record, decodes its picture and mask, and checks that they can be used."""

    image_size: int

    def __call__(self, stored: StoredRecord) -> _Decoded:
        record = records.decode(stored.data, where=stored.where)
        picture = records.decode_picture(record.target, where=stored.where)
        mask = records.decode_mask(record.mask, where=stored.where)
        height, width = picture.shape[:2]
        if mask.shape != (height, width):
            raise UserError(
                f"{stored.where}: feature 'mask' is {mask.shape[1]}x{mask.shape[0]} pixels, the "
                f"target {width}x{height}; generate the shard again"
            )
        if height != width:
            raise UserError(f"{stored.where}: feature 'target' is {width}x{height}, not square")
        if height < self.image_size:
            raise UserError(
                f"{stored.where}: the target is {height} pixels wide, less than image_size "
                f"{self.image_size}; set image_size to {height} or generate larger pictures"
            )
        if not mask.any():
            raise UserError(f"{stored.where}: feature 'mask' is empty; generate the shard again")
        return _Decoded(picture, mask, record)


@dataclass(frozen=True)
class _Augment:
    """Builds the reference and brings the target to size."""

    image_size: int
    kind: AugmentationKind

    def __call__(self, decoded: _Decoded, rng: np.random.Generator) -> _Example:
        target, mask = decoded.picture, decoded.mask
        reference = build_reference(target, mask, rng, size=self.image_size, kind=self.kind)
        return _Example(resize_square(target, self.image_size), reference, decoded.record)


def _to_batch(examples: Sequence[_Example]) -> Batch:
    return {
        "target": np.stack([example.target for example in examples]),
        "reference": np.stack([example.reference for example in examples]),
        "caption": np.asarray([example.record.caption for example in examples], np.str_),
        "object": np.asarray([example.record.object for example in examples], np.str_),
        "id": np.asarray([example.record.id for example in examples], np.str_),
    }
