"""The record format: round trips, what TFDS makes of it, and that no damage passes unseen."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from bootpig_jax.data import records
from bootpig_jax.data.records import Record, ShardReader
from bootpig_jax.errors import UserError, run_cli


def make_record(index: int, size: int = 32) -> Record:
    rng = np.random.default_rng(index)
    picture = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (size, size))
    mask = np.zeros((size, size), bool)
    mask[size // 4 : size // 2, size // 8 : size // 8 + 5 + index % 8] = True
    return Record(
        target=records.encode_picture(picture),
        mask=records.encode_mask(mask),
        caption=f"A photo of a cat №{index}, in the snow ☃",
        object="cat",
        seed=2**62 + index,
        id=f"{index:08d}",
        box=records.bounding_box(mask),
        score=0.5,
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / records.shard_name("toy", "train", 0, 1)
    records.write_shard(path, (make_record(i) for i in range(8)))
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for index, count in enumerate((3, 5)):
        name = records.shard_name("toy", "train", index, 2)
        records.write_shard(tmp_path / name, (make_record(10 * index + i) for i in range(count)))
    records.write_dataset_metadata(tmp_path, "toy", {"train": (3, 5)})
    return tmp_path


# --- one record


def test_round_trip() -> None:
    record = make_record(3)
    assert records.decode(records.encode(record)) == record


def test_tfds_features_parse_our_bytes_to_the_same_values() -> None:
    record = make_record(4)
    parsed = records.features().deserialize_example_np(
        records.encode(record), decoders=_skip_pictures()
    )
    assert parsed["target"] == record.target
    assert parsed["mask"] == record.mask
    assert parsed["caption"].decode() == record.caption
    assert parsed["object"].decode() == record.object
    assert parsed["id"].decode() == record.id
    assert parsed["seed"] == record.seed
    assert parsed["score"] == record.score
    np.testing.assert_array_equal(parsed["box"], np.asarray(record.box, np.float32))


def _skip_pictures() -> dict[str, object]:
    import tensorflow_datasets as tfds

    return {name: tfds.decode.SkipDecoding() for name in ("target", "mask")}


def test_we_parse_what_tfds_serialises() -> None:
    record = make_record(5)
    values = {**vars(record), "box": np.asarray(record.box)}
    assert records.decode(records.features().serialize_example(values)) == record


def test_another_process_writes_the_same_bytes() -> None:
    """Protobuf maps iterate in an order that may differ between processes."""
    code = (
        "import sys, hashlib; sys.path[:0] = sys.argv[1:]\n"
        "from test_records import make_record; from bootpig_jax.data import records\n"
        "print(hashlib.sha256(records.encode(make_record(6))).hexdigest())"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent)]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == hashlib.sha256(records.encode(make_record(6))).hexdigest()


def test_importing_the_format_stays_light() -> None:
    heavy = "{'jax', 'torch', 'tensorflow', 'tensorflow_datasets', 'grain'}"
    code = f"import sys, bootpig_jax.data.records; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def _edited(edit: Callable) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(records.encode(make_record(0)))
    edit(example.features.feature)
    return example.SerializeToString()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Record)])
def test_a_missing_feature_is_named(name: str) -> None:
    data = _edited(lambda stored: stored.pop(name))
    with pytest.raises(UserError, match=rf"^a\.tfrecord, record 7: feature '{name}' is missing"):
        records.decode(data, where="a.tfrecord, record 7")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Record)])
def test_a_feature_of_the_wrong_type_is_named(name: str) -> None:
    def edit(stored: dict) -> None:
        was_integer = stored[name].HasField("int64_list")
        stored[name].Clear()
        if was_integer:
            stored[name].bytes_list.value.append(b"5")
        else:
            stored[name].int64_list.value.append(5)

    with pytest.raises(UserError, match=f"^here: feature '{name}' is a "):
        records.decode(_edited(edit), where="here")


def test_a_feature_of_the_wrong_length_is_named() -> None:
    with pytest.raises(UserError, match="feature 'box' has 5 values, not 4"):
        records.decode(_edited(lambda stored: stored["box"].float_list.value.append(0.5)))


def test_text_that_is_not_utf8_is_named() -> None:
    def edit(stored: dict) -> None:
        stored["caption"].bytes_list.value[0] = b"\xff"

    with pytest.raises(UserError, match="feature 'caption' is not UTF-8"):
        records.decode(_edited(edit))


def test_data_that_is_no_example_is_refused() -> None:
    with pytest.raises(UserError, match="not a tf.train.Example"):
        records.decode(b"\xff\xff\xff")


# --- pictures and masks


def test_mask_round_trip_is_exact_and_one_bit_deep() -> None:
    mask = np.random.default_rng(0).random((37, 53)) < 0.5
    encoded = records.encode_mask(mask)
    assert encoded[24] == 1
    np.testing.assert_array_equal(records.decode_mask(encoded), mask)


def test_picture_keeps_its_colours_at_full_chroma_resolution() -> None:
    """4:2:0 would smear a one-pixel edge between two colours of equal luma."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :15], picture[:, 15:] = (200, 60, 60), (20, 137, 60)
    decoded = records.decode_picture(records.encode_picture(picture))
    assert np.abs(decoded.astype(int) - picture).max() <= 12


def test_pictures_are_jpegs_of_quality_95() -> None:
    data = records.encode_picture(np.zeros((32, 32, 3), np.uint8))
    theirs = io.BytesIO()
    Image.new("RGB", (32, 32)).save(theirs, "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).quantization == Image.open(theirs).quantization


def test_a_stored_picture_lies_as_its_mask_does_whatever_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
    assert records.decode_picture(file.getvalue()).shape == (20, 40, 3)


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_broken_pictures_are_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="feature 'target' is not a picture"):
        records.decode_picture(data)
    with pytest.raises(UserError, match="feature 'mask' is not a 1-bit greyscale PNG"):
        records.decode_mask(data)


def test_masks_of_more_than_one_bit_are_refused() -> None:
    _, deep = cv2.imencode(".png", np.full((8, 8), 100, np.uint8))
    with pytest.raises(UserError, match="not a 1-bit"):
        records.decode_mask(deep.tobytes())


def test_bounding_box() -> None:
    mask = np.zeros((10, 20), bool)
    mask[1:5, 4:14] = True
    assert records.bounding_box(mask) == (0.1, 0.2, 0.5, 0.7)
    with pytest.raises(ValueError, match="empty"):
        records.bounding_box(np.zeros((4, 4), bool))


# --- shards


def test_shard_round_trip(shard: Path) -> None:
    reader = ShardReader(shard, expected_count=8)
    order = np.random.default_rng(0).permutation(8)
    assert [records.decode(reader[int(i)]) for i in order] == [make_record(int(i)) for i in order]
    with pytest.raises(IndexError):
        reader[8]


def test_frames_match_the_published_format(tmp_path: Path) -> None:
    """CRC-32C of 32 zero bytes is 0x8A9136AA (RFC 3720, B.4)."""
    crc = 0x8A9136AA
    assert records._masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 2**32 - 1
    frame = records._frame(bytes(32))
    assert frame[:8] == (32).to_bytes(8, "little") and len(frame) == 8 + 4 + 32 + 4


def test_shard_info_describes_the_file(tmp_path: Path) -> None:
    import google_crc32c

    info = records.write_shard(tmp_path / "a", (make_record(i) for i in range(3)))
    data = (tmp_path / "a").read_bytes()
    assert info == records.ShardInfo(3, len(data), google_crc32c.value(data))


@pytest.mark.parametrize("error", [RuntimeError("generator died"), TimeoutError("no answer")])
def test_a_failed_write_leaves_the_old_shard_and_nothing_else(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "a.tfrecord"
    records.write_shard(path, [make_record(0)])
    before = path.read_bytes()

    def failing() -> Iterator[Record]:
        yield make_record(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        records.write_shard(path, failing())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tfrecord"]


def test_writing_where_no_folder_is_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "a", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match=f"^{path}: cannot write the shard"):
            records.write_shard(path, [make_record(0)])


def _read_all(path: Path, count: int) -> None:
    reader = ShardReader(path, expected_count=count)
    for index in range(len(reader)):
        reader[index]


@pytest.mark.promise("R10", "TFRecords: 200 flipped bits, all found")
def test_200_bit_flips_are_all_found(shard: Path, tmp_path: Path) -> None:
    whole, damaged = shard.read_bytes(), tmp_path / "damaged.tfrecord"
    rng = np.random.default_rng(0)
    for position in rng.choice(8 * len(whole), 200, replace=False):
        byte, bit = divmod(int(position), 8)
        changed = bytearray(whole)
        changed[byte] ^= 1 << bit
        damaged.write_bytes(changed)
        with pytest.raises(UserError, match=rf"^{damaged}: damaged at byte \d+: "):
            _read_all(damaged, 8)


def test_flips_in_every_byte_of_a_frames_header_and_footer_are_found(
    shard: Path, tmp_path: Path
) -> None:
    """These few bytes steer the reading, and random flips seldom hit them."""
    whole, damaged = shard.read_bytes(), tmp_path / "damaged.tfrecord"
    end = int.from_bytes(whole[:8], "little") + 16
    for byte in (*range(12), *range(end - 4, end)):
        changed = bytearray(whole)
        changed[byte] ^= 1 << byte % 8
        damaged.write_bytes(changed)
        with pytest.raises(UserError, match=rf"^{damaged}: damaged at byte \d+: "):
            _read_all(damaged, 8)


@pytest.mark.promise("R10", "TFRecords: 50 cuts, all found")
def test_50_cuts_are_all_found(shard: Path, tmp_path: Path) -> None:
    whole, cut = shard.read_bytes(), tmp_path / "cut.tfrecord"
    for length in np.random.default_rng(1).choice(len(whole), 50, replace=False):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"^{cut}: .* at byte|^{cut}: .* to byte"):
            _read_all(cut, 8)


def test_cuts_between_two_frames_are_found_by_the_count(shard: Path, tmp_path: Path) -> None:
    whole, cut = shard.read_bytes(), tmp_path / "cut.tfrecord"
    reader, end = ShardReader(shard), 0
    for count in range(8):
        cut.write_bytes(whole[:end])
        with pytest.raises(UserError, match="empty shard" if count == 0 else f": {count} records"):
            _read_all(cut, 8)
        end += 16 + len(reader[count])
    assert end == len(whole)
    with pytest.raises(UserError, match=": 8 records .* says 7"):  # nor may there be more
        ShardReader(shard, expected_count=7)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.tfrecord: cannot open the shard"):
        ShardReader(tmp_path / "gone.tfrecord")


# --- datasets


def test_tfds_opens_the_metadata(dataset: Path) -> None:
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(dataset).info
    assert info.name == "toy"
    assert info.splits["train"].num_examples == 8
    assert info.splits["train"].shard_lengths == [3, 5]
    assert [Path(p) for p in info.splits["train"].filepaths] == list(
        records.read_split(dataset).paths
    )
    assert info.splits["train"].num_bytes == sum(
        p.stat().st_size for p in records.read_split(dataset).paths
    )
    assert set(info.features) == {field.name for field in dataclasses.fields(Record)}


def test_metadata_can_be_written_again_and_is_the_same(dataset: Path) -> None:
    before = {name: (dataset / name).read_bytes() for name in records.METADATA_FILES}
    records.write_dataset_metadata(dataset, "toy", {"train": (3, 5)})
    assert before == {name: (dataset / name).read_bytes() for name in records.METADATA_FILES}


def test_several_splits(dataset: Path) -> None:
    records.write_shard(dataset / records.shard_name("toy", "test", 0, 1), [make_record(0)])
    records.write_dataset_metadata(dataset, "toy", {"train": (3, 5), "test": (1,)})
    assert records.read_split(dataset, "test").num_records == 1
    assert records.read_split(dataset, "train").counts == (3, 5)


def test_shards_without_records_are_left_out(dataset: Path) -> None:
    for index, kept in enumerate((2, 0, 1, 0)):
        of_shard = [make_record(10 * index + n) for n in range(kept)]
        info = records.write_shard(dataset / records.shard_name("toy", "some", index, 4), of_shard)
        assert info.count == kept
    records.write_dataset_metadata(dataset, "toy", {"train": (3, 5), "some": (2, 0, 1, 0)})
    split = records.read_split(dataset, "some")
    assert split.counts == (2, 1) and split.num_records == 3
    assert [p.name[-14:] for p in split.paths] == ["00000-of-00004", "00002-of-00004"]
    for path, count in zip(split.paths, split.counts, strict=True):
        _read_all(path, count)


def test_metadata_for_missing_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards"):
        records.write_dataset_metadata(tmp_path, "toy", {})
    with pytest.raises(UserError, match="toy-train.tfrecord-00000-of-00001: the shard is missing"):
        records.write_dataset_metadata(tmp_path, "toy", {"train": (1,)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "a-b", "", "1a", "a b"])
def test_names_that_tfds_could_not_parse_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="use letters, digits and underscores"):
        records.shard_name(name, "train", 0, 1)
    with pytest.raises(UserError, match="use letters, digits and underscores"):
        records.shard_name("toy", name, 0, 1)


def test_bad_dataset_folders_are_named(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    info = dataset / "dataset_info.json"
    with pytest.raises(UserError, match=r"no split 'test'; it has train"):
        records.read_split(dataset, "test")
    missing = records.read_split(dataset).paths[1]
    missing.unlink()
    with pytest.raises(UserError, match=f"^{missing}: the shard is missing"):
        records.read_split(dataset)
    for content, complaint in (
        ('{"name": "toy", "splits": [{"name": "train"}]}', "has no records"),
        (
            '{"name": "toy", "splits": [{"name": "train", "shardLengths": ["0"]}]}',
            "has no records",
        ),
        ('{"name": "../../etc", "splits": [{"name": "train", "shardLengths": ["1"]}]}', "name"),
        ("[]", "not a TFDS description"),
        ("null", "not a TFDS description"),
        ("{", "damaged JSON"),
    ):
        info.write_text(content)
        with pytest.raises(UserError, match=complaint):
            records.read_split(dataset)
    with pytest.raises(UserError, match="is this the folder data_gen wrote"):
        records.read_split(tmp_path_factory.mktemp("empty"))


# --- errors


@pytest.mark.parametrize(
    ("outcome", "status", "shown"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("lr: must be positive"), 2, "error: lr: must be positive\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_cli(outcome: object, status: int, shown: str, capsys: pytest.CaptureFixture) -> None:
    def main() -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is None or isinstance(outcome, int)
        return outcome

    with pytest.raises(SystemExit) as raised:
        run_cli(main)
    assert raised.value.code == status
    assert tuple(capsys.readouterr()) == ("", shown)


def test_defects_keep_their_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(main)
