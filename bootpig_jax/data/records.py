"""The record format that data generation writes and training reads.

A dataset is a folder of TFRecord shards in the layout of TensorFlow Datasets (TFDS), so that
`tfds.builder_from_directory(folder)` opens it where TensorFlow is installed. Nothing here needs
TensorFlow: `tfds.features` serialises without it, and we write and read the frames ourselves.

    folder/
      dataset_info.json  features.json                      written by `write_dataset_metadata`
      toyland-train.tfrecord-00000-of-00004                 written by `write_shard`
      ...

A shard is a sequence of frames (integers are little-endian):

    uint64  length of the data
    uint32  masked CRC-32C of those 8 bytes
    bytes   data: one serialised `tf.train.Example`
    uint32  masked CRC-32C of the data

with mask(c) = rotate_right(c, 15) + 0xA282EAD8 (mod 2^32). Both checksums are checked on every
read. A shard that was cut exactly between two frames has valid frames only: there the counts in
dataset_info.json tell.

A record holds the target picture and the subject's mask. The reference picture is not stored: it is
built from both when a record is loaded (`bootpig_jax.data.augment`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import google_crc32c
import numpy as np
from jaxtyping import Bool, UInt8

from bootpig_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

JPEG_QUALITY = 95
VERSION = "1.0.0"
METADATA_FILES = ("dataset_info.json", "features.json")

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _LENGTH.size + _CRC.size
_FOOTER_BYTES = _CRC.size
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NAME = re.compile(r"[a-zA-Z]\w*")  # what TFDS accepts as the name of a dataset or split


@dataclass(frozen=True)
class Record:
    """One training example: a target picture, its subject and the words for it.

    Attributes:
      target: the target picture, a JPEG (`encode_picture`).
      mask: the subject's mask, of the picture's size, a 1-bit greyscale PNG (`encode_mask`).
      caption: the text the picture was drawn from.
      object: the words of the caption that name the subject.
      seed: the seed the picture was drawn with (int64).
      id: unique within the dataset.
      box: the mask's bounding box (ymin, xmin, ymax, xmax) in [0, 1]. Stored in float32.
      score: the segmenter's confidence in the mask. Stored in float32.
    """

    target: bytes
    mask: bytes
    caption: str
    object: str
    seed: int
    id: str
    box: tuple[float, float, float, float]
    score: float


@functools.cache
def features() -> tfds.features.FeaturesDict:
    """The TFDS features of a `Record`, field by field."""
    import tensorflow_datasets as tfds  # takes a second to import

    picture = tfds.features.Image(
        shape=(None, None, 3), encoding_format="jpeg", doc="The target picture."
    )
    mask = tfds.features.Image(
        shape=(None, None, 1),
        encoding_format="png",
        # TFDS decodes it with TensorFlow to 0 and 255, without to 0 and 1.
        doc="Mask of the subject, 1 bit deep: 0 is the background.",
    )
    return tfds.features.FeaturesDict(
        {
            "target": picture,
            "mask": mask,
            "caption": tfds.features.Text(doc="The text the picture was drawn from."),
            "object": tfds.features.Text(doc="The caption's words for the subject."),
            "seed": tfds.features.Scalar(np.int64, doc="The seed the picture was drawn with."),
            "id": tfds.features.Text(doc="Unique within the dataset."),
            "box": tfds.features.BBoxFeature(doc="Bounding box of the mask."),
            "score": tfds.features.Scalar(np.float32, doc="Confidence in the mask."),
        }
    )


@dataclass(frozen=True)
class _FieldSpec:
    """How a field stands in a `tf.train.Example`: its kind of list and number of values."""

    kind: str
    count: int


@functools.cache
def _field_specs() -> dict[str, _FieldSpec]:
    def spec(info: Any) -> _FieldSpec:
        dtype = np.dtype(info.np_dtype)
        kind = {"O": "bytes_list", "i": "int64_list", "f": "float_list"}[dtype.kind]
        return _FieldSpec(kind, math.prod(info.shape))

    return {name: spec(info) for name, info in features().get_serialized_info().items()}


@functools.cache
def _example_type() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def encode(record: Record) -> bytes:
    """Serialises a record as a `tf.train.Example`; equal records give equal bytes.

    Raises:
      ValueError: if a field does not fit its feature, such as a box outside [0, 1].
    """
    serialised = features().serialize_example(
        {**vars(record), "box": np.asarray(record.box, np.float64)}
    )
    # A protobuf map has no order of its own: without this, the bytes may differ from run to run.
    result: bytes = _example_type().FromString(serialised).SerializeToString(deterministic=True)
    return result


def decode(data: bytes, *, where: str = "record") -> Record:
    """Parses what `encode` wrote.

    Args:
      data: a serialised `tf.train.Example`.
      where: names the record in error messages, for example "a.tfrecord, record 7".

    Raises:
      UserError: if the data is no `tf.train.Example`, or a feature is missing or of the wrong type.
    """
    from google.protobuf.message import DecodeError

    try:
        stored = _example_type().FromString(data).features.feature
    except DecodeError as error:
        raise UserError(f"{where}: not a tf.train.Example; generate the shard again") from error
    values = {name: _field(stored, name, spec, where) for name, spec in _field_specs().items()}
    return Record(**values)


def _field(stored: Any, name: str, spec: _FieldSpec, where: str) -> Any:
    if name not in stored:
        raise UserError(f"{where}: feature {name!r} is missing; generate the shard again")
    kind = stored[name].WhichOneof("kind")
    if kind != spec.kind:
        raise UserError(
            f"{where}: feature {name!r} is a {kind}, not a {spec.kind}; generate the shard again"
        )
    values = getattr(stored[name], spec.kind).value
    if len(values) != spec.count:
        raise UserError(
            f"{where}: feature {name!r} has {len(values)} values, not {spec.count}; "
            "generate the shard again"
        )
    if spec.count > 1:
        return tuple(values)
    if name in ("caption", "object", "id"):
        try:
            return values[0].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: feature {name!r} is not UTF-8 text") from error
    return values[0]


# --- pictures and masks ---------------------------------------------------------------------------


def encode_picture(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes an RGB picture as JPEG, quality 95, without chroma subsampling."""
    parameters = [
        cv2.IMWRITE_JPEG_QUALITY,
        JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    return _encode_image(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), parameters)


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> bytes:
    """Encodes a mask as a 1-bit greyscale PNG."""
    return _encode_image(".png", mask.astype(np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])


def _encode_image(extension: str, pixels: np.ndarray, parameters: list[int]) -> bytes:
    done, encoded = cv2.imencode(extension, pixels, parameters)
    if not done:
        raise ValueError(f"cannot encode an array of shape {pixels.shape} as {extension}")
    return encoded.tobytes()


def decode_picture(data: bytes, *, where: str = "record") -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an RGB picture.

    Raises:
      UserError: if `data` is no picture.
    """
    pixels = _decode_image(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise UserError(f"{where}: feature 'target' is not a picture; generate the shard again")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def decode_mask(data: bytes, *, where: str = "record") -> Bool[np.ndarray, "h w"]:
    """Decodes a 1-bit mask.

    Raises:
      UserError: if `data` is not a 1-bit greyscale PNG.
    """
    # Bytes 24 and 25 of a PNG are its bit depth and colour type. Deeper masks are refused because
    # their threshold would be a guess.
    if data[:8] != _PNG_SIGNATURE or data[24:26] != b"\x01\x00":
        raise UserError(f"{where}: feature 'mask' is not a 1-bit greyscale PNG")
    pixels = _decode_image(data, cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        raise UserError(f"{where}: feature 'mask' is not a picture; generate the shard again")
    return pixels > 0


def _decode_image(data: bytes, flags: int) -> np.ndarray | None:
    if not data:  # OpenCV raises on an empty buffer and returns None on any other bad one
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def bounding_box(mask: Bool[np.ndarray, "h w"]) -> tuple[float, float, float, float]:
    """The box (ymin, xmin, ymax, xmax) of a mask in [0, 1], as `Record.box` holds it.

    Raises:
      ValueError: if the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("an empty mask has no bounding box")
    height, width = mask.shape
    return (
        float(rows[0] / height),
        float(columns[0] / width),
        float((rows[-1] + 1) / height),
        float((columns[-1] + 1) / width),
    )


# --- shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardInfo:
    """What a written shard contains: its number of records, its size and its CRC-32C."""

    count: int
    num_bytes: int
    crc32c: int


def shard_name(dataset: str, split: str, index: int, num_shards: int) -> str:
    """The file name of a shard, as TFDS expects it.

    Raises:
      UserError: if the dataset's or split's name is not a word of letters, digits and underscores.
    """
    for kind, name in (("dataset", dataset), ("split", split)):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{kind} name {name!r}: use letters, digits and underscores, starting with a letter"
            )
    return f"{dataset}-{split}.tfrecord-{index:05d}-of-{num_shards:05d}"


def write_shard(path: str | os.PathLike[str], records: Iterable[Record]) -> ShardInfo:
    """Writes a shard under a temporary name, syncs it, and renames it: `path` is whole or absent.

    One process at a time may write a shard. The temporary name is fixed, so that a restart
    overwrites what a killed run has left.

    Args:
      path: the final path; an older file there is replaced.
      records: the records. Without any, the file is empty: `read_split` leaves such a shard out.

    Raises:
      UserError: if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            count, num_bytes, crc = 0, 0, 0
            for record in _apart(records):
                frame = _frame(encode(record))
                file.write(frame)
                count, num_bytes = count + 1, num_bytes + len(frame)
                crc = google_crc32c.extend(crc, frame)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot write the shard: {error.strerror or error}") from error
    except _IterationError as error:
        raise error.cause from None
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; never there if opening failed
            temporary.unlink()
    return ShardInfo(count, num_bytes, crc)


class _IterationError(Exception):
    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _apart(records: Iterable[Record]) -> Iterator[Record]:
    """Yields the records, and keeps the iterable's own `OSError`s apart from those of writing."""
    try:
        yield from records
    except OSError as error:
        raise _IterationError(error) from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _frame(data: bytes) -> bytes:
    length = _LENGTH.pack(len(data))
    return b"".join((length, _CRC.pack(_masked_crc(length)), data, _CRC.pack(_masked_crc(data))))


class ShardReader:
    """Random access to the records of one shard; safe to use from several threads.

    The constructor walks the frames' headers, so a shard that is cut or whose headers are damaged
    is found before training starts. A record's data is checked when it is read.

    No file stays open between reads: the number of shards is not bound by the limit on open files.
    """

    def __init__(self, path: str | os.PathLike[str], *, expected_count: int | None = None) -> None:
        """Indexes a shard.

        Args:
          path: the shard's file.
          expected_count: its number of records, where known (dataset_info.json holds it).

        Raises:
          UserError: if the file cannot be read, is empty, cut or damaged, or holds another number
            of records. Names the file and the offset.
        """
        self.path = Path(path)
        with self._open() as file:
            self._starts, self._lengths = self._index(file.fileno())
        if not len(self):
            raise UserError(f"{self.path}: empty shard at byte 0; generate it again")
        if expected_count is not None and expected_count != len(self):
            raise UserError(
                f"{self.path}: {len(self)} records up to byte {self._end()}, but dataset_info.json "
                f"says {expected_count}; generate the shard again"
            )

    def __len__(self) -> int:
        """The number of records."""
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        """The data of record `index`, in [0, len).

        Raises:
          UserError: if the record is damaged or gone. Names the file and the offset.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        start, length = int(self._starts[index]), int(self._lengths[index])
        with self._open() as file:
            data = self._pread(file.fileno(), length + _FOOTER_BYTES, start)
        (crc,) = _CRC.unpack_from(data, length)
        data = data[:length]
        if crc != _masked_crc(data):
            raise self._damaged(start, f"the checksum of record {index} does not match")
        return data

    def _index(self, descriptor: int) -> tuple[np.ndarray, np.ndarray]:
        size = os.fstat(descriptor).st_size
        starts: list[int] = []
        lengths: list[int] = []
        offset = 0
        while offset < size:
            header = self._pread(descriptor, _HEADER_BYTES, offset)
            (length,), (crc,) = _LENGTH.unpack_from(header), _CRC.unpack_from(header, _LENGTH.size)
            if crc != _masked_crc(header[: _LENGTH.size]):
                raise self._damaged(offset, f"the header of record {len(starts)} is wrong")
            start = offset + _HEADER_BYTES
            offset = start + length + _FOOTER_BYTES
            if offset > size:
                raise self._damaged(size, f"the file ends inside record {len(starts)}")
            starts.append(start)
            lengths.append(length)
        return np.asarray(starts, np.int64), np.asarray(lengths, np.int64)

    def _end(self) -> int:
        return int(self._starts[-1] + self._lengths[-1]) + _FOOTER_BYTES

    def _open(self) -> Any:
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"{self.path}: cannot open the shard: {error.strerror}") from error

    def _pread(self, descriptor: int, size: int, offset: int) -> bytes:
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot read at byte {offset}: {error.strerror}"
            ) from error
        if len(data) != size:
            raise self._damaged(offset + len(data), "the file ends inside a record")
        return data

    def _damaged(self, offset: int, what: str) -> UserError:
        return UserError(f"{self.path}: damaged at byte {offset}: {what}; generate the shard again")


# --- datasets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The shards of one split of a dataset that hold records, in order, and how many they hold."""

    paths: tuple[Path, ...]
    counts: tuple[int, ...]

    @property
    def num_records(self) -> int:
        """The number of records in all shards."""
        return sum(self.counts)


def write_dataset_metadata(
    folder: str | os.PathLike[str],
    dataset: str,
    shard_counts: Mapping[str, Sequence[int]],
    *,
    description: str = "Target pictures, subject masks and captions for BootPIG.",
) -> None:
    """Writes dataset_info.json and features.json beside the finished shards.

    Args:
      folder: where all shards stand.
      dataset: the dataset's name, as in the shards' file names.
      shard_counts: for each split, the number of records of each of its shards, in order.
      description: free text for dataset_info.json.

    Raises:
      UserError: if there are no shards, one is missing, or the files cannot be written.
    """
    import tensorflow_datasets as tfds

    folder = Path(folder)
    if not any(shard_counts.values()):
        raise UserError(f"{folder}: no shards to describe")
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=dataset)
    splits = []
    for split, counts in shard_counts.items():
        names = [shard_name(dataset, split, i, len(counts)) for i in range(len(counts))]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder / missing[0]}: the shard is missing; generate it first")
        num_bytes = sum((folder / name).stat().st_size for name in names)
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(counts),
                num_bytes=num_bytes,
                filename_template=template.replace(split=split, filetype_suffix="tfrecord"),
            )
        )
    try:
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features(),
            split_infos=splits,
            version=VERSION,
            check_data=False,  # the check reads through TensorFlow
            description=description,
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot write the metadata: {error.strerror}") from error


def read_split(folder: str | os.PathLike[str], split: str = "train") -> Split:
    """Finds the shards of a split from dataset_info.json, without importing TFDS.

    Raises:
      UserError: if the metadata is missing or damaged, the split is unknown, or has no records.
    """
    path = Path(folder) / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}); is this the folder data_gen wrote?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON; run data_gen again to rewrite it") from error
    try:
        counts_of = {
            # TFDS leaves the key out where there are no shards.
            entry["name"]: tuple(int(count) for count in entry.get("shardLengths", ()))
            for entry in info["splits"]
        }
        dataset = info["name"]
        if not isinstance(dataset, str) or not all(map(_NAME.fullmatch, counts_of)):
            raise ValueError("a name of another form")
        if any(count < 0 for counts in counts_of.values() for count in counts):
            raise ValueError("a negative count")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: not a TFDS description of splits ({error}); run data_gen again"
        ) from error
    if split not in counts_of:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(sorted(counts_of))}")
    counts = counts_of[split]
    if not any(counts):
        raise UserError(f"{path}: split {split!r} has no records; run data_gen again")
    shards = {
        Path(folder) / shard_name(dataset, split, i, len(counts)): count
        for i, count in enumerate(counts)
    }
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard}: the shard is missing; run data_gen again")
    filled = {shard: count for shard, count in shards.items() if count}
    return Split(tuple(filled), tuple(filled.values()))
