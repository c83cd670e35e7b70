"""Text from outside, whatever its bytes, ends in a value or in the error that is promised."""

import io
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bootpig_jax.checkpoints.diffusers import read_json
from bootpig_jax.config import TrainConfig
from bootpig_jax.data import records
from bootpig_jax.diffusion.schedule import NoiseSchedule
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import (
    fill_template,
    open_folder,
    parse_prompts_and_classes,
)
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.sampling.jobs import Job, read_jobs
from bootpig_jax.sampling.picture_settings import KEY, PictureSettings, read_picture_settings
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.yaml_config import load_config
from data_gen.captions import FileSource, parse_caption
from data_gen.chat_server import ChatServer, retry_after
from data_gen.config import DataGenConfig, LLMConfig
from data_gen.llm_captions import DistinctCaptions, Journal, answer_lines, parse_line
from data_gen.stages import Caption
from tests.evaluation_folders import prompts_and_classes
from tests.properties import JSON_VALUES, changed_bytes, changed_json, value_or_user_error

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outside")


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---------------------------------------------------------------- YAML

YAML_PIECES = [
    *(b"{", b"}", b"[", b"]", b": ", b"- ", b"\n", b"\n  ", b"&a ", b"*a", b"!!", b"!!float "),
    *(b"|", b"!!int ", b"!!timestamp ", b"!!binary ", b"!!set ", b"? ", b"<<: ", b"'", b'"', b"#"),
    *(b"---\n", b"1e999", b"9" * 5000, b"[" * 2000, b"a: {" * 2000, b"~", b"\xff", b"\t", b"%"),
    *(b"\x85", b".5"),
]


@pytest.mark.parametrize(
    ("model", "name"), [(TrainConfig, "release"), (DataGenConfig, "data_gen_release")]
)
@settings(max_examples=100)
@given(data=st.data())
def test_a_configuration(model: type, name: str, folder: Path, data: st.DataObject) -> None:
    valid = (CONFIGS / f"{name}.yaml").read_bytes().partition(b"output_dir")
    content = data.draw(changed_bytes(b"".join(valid[1:]), YAML_PIECES) | st.binary(max_size=30))
    found = value_or_user_error(load_config, model, written(folder / "config.yaml", content))
    assert isinstance(found, model | UserError)


@settings(max_examples=200)
@given(st.lists(st.text(max_size=20), max_size=2), st.sampled_from(["model.base", "data", "seed"]))
@example(["seed." * 1000 + "a=1"], "seed")
@example(["seed=" + "[" * 500], "seed")
def test_overrides(arguments: list[str], key: str) -> None:
    given_ = ["model.base=b", "data.dir=d", "output_dir=o", *arguments]
    for more in ([], [f"{key}={text}" for text in arguments]):
        found = value_or_user_error(load_config, TrainConfig, None, [*given_, *more])
        assert isinstance(found, TrainConfig | UserError)


# ---------------------------------------------------------------- jobs

JOB = {
    "id": "dog",
    "prompt": "a dog",
    "references": ["a.png"],
    "image": "room.png",
    "mask": "mask.png",
    "guidance_interval": [0, 0.5],
    "seed": 3,
    "reference_caption": "dog",
    "reference_timestep": 0,
    "height": 64,
}


@settings(max_examples=150)
@given(
    changed_json(JOB).map(str.encode)
    | changed_bytes(json.dumps(JOB).encode(), [b'"id": "cat",', b"\n", b"[" * 2000])
)
def test_jobs(folder: Path, content: bytes) -> None:
    found = value_or_user_error(
        read_jobs, written(folder / "jobs.jsonl", content), SamplingSettings()
    )
    assert isinstance(found, UserError) or all(isinstance(job, Job) for job in found)


# ---------------------------------------------------------------- text in PNGs

RECORD = PictureSettings(
    model="sd",
    bootpig="b",
    prompt="a dog",
    settings=SamplingSettings(reference_caption="dog", height=64),
).model_dump(mode="json")


def png(text: str, kind: str) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    if kind == "iTXt":
        info.add_itxt(KEY, text)
    else:
        info.add_text(KEY, text, zip=kind == "zTXt")
    Image.new("RGB", (2, 3)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@settings(max_examples=150)
@given(
    st.builds(png, changed_json(RECORD) | st.text(), st.sampled_from(["tEXt", "zTXt", "iTXt"]))
    | changed_bytes(png(json.dumps(RECORD), "zTXt"))
    | changed_bytes(png(json.dumps(RECORD), "iTXt"))
)
def test_settings_in_a_picture(folder: Path, content: bytes) -> None:
    found = value_or_user_error(read_picture_settings, written(folder / "a.png", content))
    assert isinstance(found, UserError) or isinstance(found[0], PictureSettings)


# ---------------------------------------------------------------- TFRecords


def frame(data: bytes, length: int | None = None) -> bytes:
    """A frame whose checksums are right, also where its length is not."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return b"".join(
        (header, struct.pack("<I", records._masked_crc(header)), data)
        + (struct.pack("<I", records._masked_crc(data)),)
    )


EXAMPLE = records.encode(
    records.Record(b"jpeg", b"png", "a dog", "dog", 1, "id", (0.0, 0.0, 0.5, 1.0), 1.0)
)


@settings(max_examples=150)
@given(
    st.binary(max_size=40)
    | changed_bytes(frame(EXAMPLE) + frame(b""))
    | st.lists(
        st.builds(frame, changed_bytes(EXAMPLE), st.none() | st.integers(0, 2**64 - 1)), max_size=3
    ).map(b"".join)
)
def test_a_shard(folder: Path, content: bytes) -> None:
    def read() -> list[records.Record]:
        reader = records.ShardReader(written(folder / "a.tfrecord", content))
        return [records.decode(reader[index]) for index in range(len(reader))]

    found = value_or_user_error(read)
    assert isinstance(found, UserError) or len(found) > 0


@given(changed_bytes(records.encode_mask(np.eye(3, dtype=bool))) | st.binary(max_size=40))
def test_a_mask_and_a_picture_of_a_record(content: bytes) -> None:
    mask = value_or_user_error(records.decode_mask, content)
    assert isinstance(mask, UserError) or mask.dtype == bool
    picture = value_or_user_error(records.decode_picture, content)
    assert isinstance(picture, UserError) or picture.shape[2] == 3


INFO = {"name": "tiny", "splits": [{"name": "train", "shardLengths": ["1", "0"], "numBytes": "9"}]}


@settings(max_examples=200)
@given(changed_json(INFO))
def test_the_description_of_a_dataset(folder: Path, content: str) -> None:
    for shard in range(2):
        written(folder / records.shard_name("tiny", "train", shard, 2), b"")
    written(folder / "dataset_info.json", content)
    found = value_or_user_error(records.read_split, folder)
    assert isinstance(found, UserError) or found.num_records >= 1


# ---------------------------------------------------------------- language models' answers

LINES = (
    "1. Caption: A photo of a red teapot, on a table\n"
    '- "A photo of an owl, in a tree",\n'
    "```\n**A photo of a dog,** in the snow"
)
ANSWER_PIECES = [
    *(b"A photo of a ", b", ", b"Caption", b"*", b"\n", b'"', b"[", b"\xc2\xa0", b"\xcc\x81"),
]


@settings(max_examples=150)
@given(
    st.text(max_size=60)
    | JSON_VALUES
    | changed_json({"captions": ["A photo of a dog, in the snow", "A photo of a cat, on a mat"]})
    | changed_bytes(LINES.encode(), ANSWER_PIECES).map(lambda line: line.decode(errors="replace"))
)
@example("Caption" + "-" * 1300 + "A photo of a dog")
def test_an_answer_of_a_language_model(answer: str) -> None:
    distinct = DistinctCaptions()
    for line in answer_lines(answer):
        try:
            caption = parse_line(line)
        except ValueError:
            continue
        assert caption == parse_caption(caption.text), "a caption is of the paper's form"
        assert caption.object in caption.text
        distinct.add(caption)
        assert not distinct.add(caption), "the same once more is a duplicate"
        json.dumps(caption.text).encode()


COMPLETION = {
    "choices": [
        {"message": {"role": "assistant", "content": "A photo\nof"}, "finish_reason": "length"}
    ]
}


@pytest.fixture(scope="module")
def chat_server() -> ChatServer:
    return ChatServer(LLMConfig(model="m", attempts=1), lambda seconds: None)


@settings(max_examples=200)
@given(changed_json(COMPLETION).map(str.encode) | st.binary(max_size=20))
def test_the_body_of_a_chat_servers_response(chat_server: ChatServer, body: bytes) -> None:
    def create(**_: Any) -> Any:
        return SimpleNamespace(http_response=httpx.Response(200, content=body))

    raw = SimpleNamespace(with_raw_response=SimpleNamespace(create=create))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            chat_server, "_client", SimpleNamespace(chat=SimpleNamespace(completions=raw))
        )
        assert isinstance(value_or_user_error(chat_server.ask, "?", {}, 0), str | UserError)


@given(st.text(max_size=30), st.text(max_size=30))
@example("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00")
@example("Wed, 99999999999999999999 Oct 2015 07:28:00 GMT", "")
@example("inf", "")
def test_when_a_server_asks_to_wait(after: str, date: str) -> None:
    assert retry_after({"retry-after": after, "date": date}) >= 0


ENTRY = {"call": 0, "settings": "s", "answer": "A photo of a dog, in the snow"}


@settings(max_examples=200)
@given(
    st.lists(
        changed_json(ENTRY).map(str.encode)
        | st.just(json.dumps(ENTRY).encode())
        | st.binary(max_size=9)
    )
)
def test_the_journal_of_answers(folder: Path, lines: list[bytes]) -> None:
    path = written(folder / "captions.jsonl", b"\n".join(lines))
    journal = Journal(path, "s")
    found = value_or_user_error(journal.read)
    opened = value_or_user_error(journal.open)
    journal.close()
    assert str(opened) == str(found)
    if not isinstance(found, UserError):
        assert all(isinstance(call, int) and isinstance(text, str) for call, text in found.items())
        assert Journal(path, "s").read() == found, "opening it keeps every answer"


@settings(max_examples=200)
@given(
    changed_json({"caption": "A photo of a dog, in the snow", "object": "dog"}).map(str.encode)
    | changed_bytes(b"A photo of a dog, in the snow\nA photo of an owl, in a tree\n", ANSWER_PIECES)
    | st.binary(max_size=30),
    st.sampled_from(["captions.txt", "captions.jsonl"]),
)
def test_a_file_of_captions(folder: Path, content: bytes, name: str) -> None:
    found = value_or_user_error(FileSource, written(folder / name, content))
    assert isinstance(found, UserError) or isinstance(found.captions([0])[0], Caption)


# ---------------------------------------------------------------- prompts

PROMPT_PIECES = [
    *(b"= [1]", b"] + [", b"[", b"]\n", b"'", b"\\", b"(" * 300, b"x for x in y", b"\n", b"\0"),
    *(b"f'{x}'", b"live", b"prompt_list = ['a {1}']\n", b"\r", b"\x0c", b"{0}", b"{1}"),
    b"-" * 3000,
]


@settings(max_examples=200)
@given(
    changed_bytes(prompts_and_classes().encode(), PROMPT_PIECES)
    | st.binary(max_size=20).map(b"subject_name,class\na,b\n\nx = [%s]\ny = []\n".__mod__)
)
@example(b"subject_name,class\na,b\n\nx = ['a {1}'] + ['b {1}']\n\nlive\ny = ['a {1}']\n")
@example(b"subject_name,class\na,b\n\nx = [p for p in ['a {1}']]\n\nlive\ny = ['a {1}']\n")
@example(b"subject_name,class\na,b\n\nx = [%s'a']\n\nlive\ny = ['a']\n" % (b"(" * 300))
@example(b"subject_name,class\na,b\n\nx = [%s1]\n\nlive\ny = ['a {1}']\n" % (b"-" * 5000))
def test_dreambooths_prompts(content: bytes) -> None:
    found = value_or_user_error(parse_prompts_and_classes, content.decode(errors="replace"))
    if not isinstance(found, UserError):
        classes, *lists = found
        assert classes
        for template in (template for templates in lists for template in templates):
            prompt = value_or_user_error(fill_template, template, "dog")
            assert isinstance(prompt, UserError) or "dog" in prompt


@given(st.binary(max_size=40), st.none() | st.binary(max_size=20))
def test_a_folder_of_ones_own(
    tmp_path_factory: pytest.TempPathFactory, prompts: bytes, word: bytes | None
) -> None:
    folder = tmp_path_factory.mktemp("own")
    (folder / "dog2").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "dog2" / "a.png")
    written(folder / "prompts.txt", prompts)
    if word is not None:
        written(folder / "dog2" / "class.txt", word)
    found = value_or_user_error(open_folder, folder)
    assert isinstance(found, UserError) or all(found.subjects[0].prompts)


# ---------------------------------------------------------------- a model's files

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": [0.1, 0.2],
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "solver_order": 2,
    "clip_sample": False,
    "_use_default_values": ["timestep_spacing"],
}


@settings(max_examples=150)
@given(changed_json(SCHEDULER) | changed_json({**SCHEDULER, "trained_betas": None}))
def test_a_schedule(folder: Path, content: str) -> None:
    path = written(folder / "scheduler_config.json", content)
    found = value_or_user_error(lambda: NoiseSchedule.from_config(read_json(path)))
    if not isinstance(found, UserError):
        assert np.isfinite(found.alphas).all() and np.isfinite(found.sigmas).all()


@given(
    changed_json(
        {"reference_timestep": "same", "reference_key_scale": 1.1, "reference_caption": "object"}
    ).map(str.encode)
    | st.binary(max_size=20)
)
def test_how_a_bootpig_was_trained(folder: Path, content: bytes) -> None:
    written(folder / "bootpig.json", content)
    assert isinstance(value_or_user_error(Conditioning.read, folder), Conditioning | UserError)
