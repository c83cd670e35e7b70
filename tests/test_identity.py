"""What a model is known by: its content, wherever it lies, read once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bootpig_jax import files
from bootpig_jax.checkpoints import identity
from bootpig_jax.checkpoints.identity import hash_model
from bootpig_jax.errors import UserError
from bootpig_jax.training.distributed import told_by_first

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HALF = "unet/diffusion_pytorch_model.fp16.safetensors"
READ = (WEIGHTS, "unet/config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in READ:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, from the first time on."""
    names: list[str] = []
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    digest = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_it_is_the_content_that_is_read_and_not_the_place(model, read, tmp_path):
    before = hash_model(model)
    half, index = model / HALF, model / f"{WEIGHTS}.index.json"
    for unread in (half, index, model / "README.md", model / "unet/weights.bin"):
        unread.write_text("{}")
    assert hash_model(Path(shutil.copytree(model, tmp_path / "moved"))) == before
    for name in READ:
        (model / name).write_text(name.upper())
        assert hash_model(model) != before, name
        (model / name).write_text(name)
        assert hash_model(model) == before
    (model / WEIGHTS).unlink()
    shutil.rmtree(model / "tokenizer")
    assert hash_model(model) != before  # half precision, if there is nothing else
    half.unlink()
    index.unlink()
    with pytest.raises(UserError, match="only pickled weights"):
        hash_model(model)


def test_every_file_is_read_once_until_it_changes(model, read):
    before = hash_model(model)
    assert len(read) == len(READ)
    assert hash_model(model) == before and len(read) == len(READ)

    # Another content of the same size, with the time of the old one: what `cp -p` brings.
    path = model / WEIGHTS
    status = path.stat()
    path.write_text(WEIGHTS.swapcase())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    swapped = hash_model(model)
    assert swapped != before and read[len(READ) :] == [path.name]
    assert hash_model(model) == swapped and len(read) == len(READ) + 1


@pytest.mark.parametrize("content", ["", "[]", '{"a": [1, 2, 3, "x"]}', '{"a": 1', "\xff\0"])
def test_what_is_kept_may_be_damaged(model, read, content):
    before = hash_model(model)
    path = files.CACHE / identity.KNOWN
    path.write_text(content, encoding="latin-1")
    assert hash_model(model) == before and len(read) == 2 * len(READ)
    assert len(json.loads(path.read_text())) == len(READ)


def test_hashes_need_not_be_kept_and_are_not_kept_forever(model, read, monkeypatch):
    monkeypatch.setattr(identity, "MOST_KNOWN", 3)
    before = hash_model(model)
    assert len(json.loads((files.CACHE / identity.KNOWN).read_text())) == 3
    shutil.rmtree(files.CACHE)
    files.CACHE.write_text("a file: nothing can be kept below it")
    assert hash_model(model) == before
    monkeypatch.setattr(files, "CACHE", Path("~nobody-has-this-name/cache"))
    assert hash_model(model) == before


def test_only_the_first_process_hashes(monkeypatch):
    sent: list[np.ndarray] = []

    def broadcast(value: np.ndarray) -> np.ndarray:
        sent.append(value)
        return sent[0]  # the first process's

    def of_process(index: int, work: Callable[[], str]) -> str:
        monkeypatch.setattr("jax.process_index", lambda: index)
        return told_by_first(work)

    def fails() -> str:
        raise UserError("why")

    def never() -> str:
        raise AssertionError

    monkeypatch.setattr("jax.process_count", lambda: 2)
    module = "bootpig_jax.training.distributed.multihost_utils.broadcast_one_to_all"
    monkeypatch.setattr(module, broadcast)
    digits = bytes(range(100, 132)).hex()
    assert of_process(0, lambda: digits) == of_process(1, never) == digits
    sent.clear()
    # A failure ends all of them, and none waits for another.
    for index, (work, words) in enumerate([(fails, "why"), (never, "the first process cannot")]):
        with pytest.raises(UserError, match=words):
            of_process(index, work)
    assert len(sent) == 2
