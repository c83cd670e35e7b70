"""Cached latents: what a step would compute, in the order it would have come, and never unnoticed
damage."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import bootpig_jax.train
from bootpig_jax import cache_latents
from bootpig_jax.checkpoints.diffusers import load_stable_diffusion
from bootpig_jax.config import TrainConfig
from bootpig_jax.data.cache import (
    CacheSource,
    CacheWriter,
    Contents,
    make_cached_loader,
    name_weights,
)
from bootpig_jax.data.pipeline import make_loader
from bootpig_jax.errors import UserError
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.train import base_sha256, cache_contents
from bootpig_jax.training.loop import to_encoded, to_pictures
from bootpig_jax.training.step import encode
from bootpig_jax.yaml_config import load_config
from tests.training_helpers import save_tiny_data


def contents_of(config: TrainConfig) -> Contents:
    return cache_contents(config, base_sha256(config))


@pytest.fixture(scope="module")
def arguments(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cached")
    return [
        f"model.base={model_folder}",
        f"data.dir={save_tiny_data(folder / 'tiny')}",
        f"data.cache={folder / 'cache'}",
        *("data.image_size=16", "output_dir=unused", "precision=float32", "batch_size=8"),
        *("reference_caption=object", "data.cache_copies=3", "data.augmentation=paper"),
    ]


@pytest.fixture(scope="module")
def config(arguments: list[str]) -> TrainConfig:
    config = load_config(TrainConfig, None, arguments)
    append, calls = CacheWriter.append, []

    def once(self: CacheWriter, batch: Any) -> None:
        append(self, batch)
        calls.append(self.done)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        # Stopped after its first batch, then continued: nothing is done twice.
        patch.setattr(CacheWriter, "append", once)
        with pytest.raises(KeyboardInterrupt):
            cache_latents.main(arguments)
        assert config.data.cache is not None
        with pytest.raises(UserError, match="holds 16 of 24 records"):
            CacheSource(config.data.cache, contents_of(config))
        cache_latents.main(arguments)
    assert calls == [16, 24]
    return config


def loader(config: TrainConfig, **changes: Any) -> Any:
    assert config.data.cache is not None
    options: dict[str, Any] = {"batch_size": 8, "seed": 0} | changes
    return make_cached_loader(config.data.cache, contents_of(config), **options)


def test_a_cached_batch_is_the_online_one_encoded(config):
    """... but for the augmentation of its references."""
    model = load_stable_diffusion(config.model.base)
    online = make_loader(config.data.dir, batch_size=8, image_size=16, seed=0)
    conditioning = Conditioning(reference_caption="object")
    for _, cached in zip(range(4), loader(config), strict=False):
        pictures = to_pictures(next(online), model.tokenizer, conditioning)
        expected = jax.jit(encode)(model.vae, model.text_encoder, pictures)
        found = to_encoded(cached)
        for name in ("target", "text", "reference_text"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                getattr(found, name),
                getattr(expected, name),
            )
        assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)


def test_every_copy_is_drawn_and_processes_share_the_stream(config):
    whole = loader(config)
    parts = [loader(config, batch_size=4, process_index=i, process_count=2) for i in range(2)]
    drawn: dict[bytes, set[bytes]] = {}
    for _ in range(60):
        batch = next(whole)
        halves = [next(part) for part in parts]
        for name, values in batch.items():
            np.testing.assert_array_equal(values, np.concatenate([h[name] for h in halves]))
        for target, reference in zip(batch["target"], batch["reference"], strict=True):
            drawn.setdefault(target.tobytes(), set()).add(reference.tobytes())
    assert len(drawn) == 24 and {len(copies) for copies in drawn.values()} == {3}


def test_another_run_s_cache_is_refused(config):
    contents = contents_of(config)
    for change in ({"copies": 2}, {"seed": 1}, {"precision": "bfloat16"}, {"model_sha256": "0"}):
        with pytest.raises(UserError, match=f"was made with {next(iter(change))}"):
            CacheSource(config.data.cache, dataclasses.replace(contents, **change))
    with pytest.raises(UserError, match="holds no cache: make it with"):
        CacheSource(Path("/absent"), contents)


@pytest.mark.parametrize(
    "change",
    ["model.base=other", "data.split=test", "data.image_size=8", "data.augmentation=release",
     "reference_caption=target", "data.cache_copies=2", "seed=1", "precision=bfloat16"],
)  # fmt: skip
def test_a_cache_knows_all_that_it_was_made_of(arguments, monkeypatch, change):
    monkeypatch.setattr(bootpig_jax.train, "dataset_fingerprint", lambda *which: "f")
    config, changed = (load_config(TrainConfig, None, [*arguments, *c]) for c in ([], [change]))
    one, other = (dataclasses.asdict(cache_contents(c, "0")) for c in (config, changed))
    assert len([name for name in one if one[name] != other[name]]) == 1


def test_a_cache_knows_its_weights_wherever_they_lie(config, tmp_path, monkeypatch):
    contents = contents_of(config)
    moved = dataclasses.replace(contents, model="moved")
    assert len(CacheSource(config.data.cache, moved)) == 24
    assert not name_weights(config.data.cache, moved)

    # One that an earlier version made says where they lay, and is told which they are.
    cache = Path(shutil.copytree(config.data.cache, tmp_path / "cache"))
    described = json.loads((cache / "cache.json").read_text())
    del described["model_sha256"]
    (cache / "cache.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="was made with model "):
        name_weights(cache, moved)
    assert len(CacheSource(cache, contents)) == 24
    with monkeypatch.context() as patch:  # read-only
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(30, "read-only")))
        assert name_weights(cache, contents) and name_weights(cache, contents)
    assert name_weights(cache, contents) and not name_weights(cache, contents)
    assert len(CacheSource(cache, moved)) == 24
    with pytest.raises(UserError, match="was made with model_sha256"):
        CacheSource(cache, dataclasses.replace(contents, model_sha256="0"))


def test_an_older_cache_warns(config, arguments, tmp_path, capsys):
    cache = Path(shutil.copytree(config.data.cache, tmp_path / "cache"))
    described = json.loads((cache / "cache.json").read_text())
    del described["model_sha256"]
    (cache / "cache.json").write_text(json.dumps(described))
    cache_latents.main([*arguments, f"data.cache={cache}"])
    assert capsys.readouterr().err.count("warning: data.cache") == 1
    assert not name_weights(cache, contents_of(config))


def test_bfloat16_survives(tmp_path, config):
    contents = dataclasses.replace(contents_of(config), precision="bfloat16")
    values = np.arange(6, dtype=np.float32).reshape(2, 3).astype(jax.numpy.bfloat16)
    CacheWriter(tmp_path, contents, {"text": (2, 3)}).append({"text": values})
    record = CacheSource(tmp_path, contents)[1]
    assert record["text"].dtype == values.dtype
    np.testing.assert_array_equal(record["text"], values[1])


@pytest.mark.parametrize("name", ["target", "reference", "text", "reference_text"])
def test_a_flipped_bit_is_found(config, name):
    path = config.data.cache / f"{name}.npy"
    whole = path.read_bytes()
    try:
        content = bytearray(whole)
        content[-5] ^= 4
        path.write_bytes(content)
        source = CacheSource(config.data.cache, contents_of(config))
        source[0]
        with pytest.raises(UserError, match="record 23 in .* is damaged"):
            source[23]
    finally:
        path.write_bytes(whole)


@pytest.mark.long
def test_training_takes_it(config, arguments, tmp_path):
    output = tmp_path / "run"
    bootpig_jax.train.main(
        [*arguments, f"output_dir={output}", "steps=2", "logging.every=1", "logging.grid_every=0"]
    )
    assert len((output / "history.jsonl").read_text().splitlines()) == 2
