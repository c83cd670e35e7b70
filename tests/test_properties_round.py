"""What is written is read back: configurations, schedules, records, weights, settings in PNGs."""

import dataclasses
import functools
import json
import string
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import diffusers
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import tests.properties  # noqa: F401 - its profile
from bootpig_jax.attention import STRATEGIES
from bootpig_jax.checkpoints.diffusers import (
    _current_name,
    diffusers_name,
    from_torch_layout,
    load_unet,
    save_unet,
    to_torch_layout,
    to_torch_shape,
)
from bootpig_jax.config import TrainConfig
from bootpig_jax.data import records
from bootpig_jax.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    predict_epsilon,
    predict_x0,
    training_target,
)
from bootpig_jax.diffusion.solvers import SIGMAS, SOLVERS, SPACINGS
from bootpig_jax.errors import UserError
from bootpig_jax.models.shapes import OneKey
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.sampling.batches import Place
from bootpig_jax.sampling.picture_settings import (
    InputFile,
    PictureSettings,
    read_picture_settings,
    write_png,
)
from bootpig_jax.sampling.references import SEGMENTERS
from bootpig_jax.sampling.settings import MAX_TEXT, SamplingSettings
from bootpig_jax.yaml_config import dump_config, load_config
from data_gen.config import DataGenConfig
from tests.sampling_models import UNET, random_network

CONFIGS = Path(__file__).parents[1] / "configs"

# Letters of every kind, and what YAML takes for numbers, dates and marks.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NUMBERS_IN_LETTERS = st.text("0123456789eE+-._:xo", max_size=5)
MARKS = st.sampled_from(["null", "~", "true", "No", "=", "<<", "-", "# a", "a: b", "2001-01-01"])
TEXT = WORDS | NUMBERS_IN_LETTERS | MARKS


# ---------------------------------------------------------------- configurations


def values_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of a field, as JSON has them, within the limits that its annotation sets."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return values_of(inner, (*metadata, *more))
    if origin in (Union, UnionType):
        return st.one_of([values_of(inner, metadata) for inner in get_args(annotation)])
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is tuple:
        inner, *rest = get_args(annotation)
        if rest == [...]:
            return st.lists(values_of(inner), max_size=3)
        return st.tuples(*map(values_of, get_args(annotation))).map(list)
    limits = _limits(metadata)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        step = limits.get(MultipleOf, 1)
        low = limits.get(Ge, limits.get(Gt, -1) + 1)
        high = limits.get(Le, limits.get(Lt, 2**40) - 1)
        return st.integers(-(-low // step), high // step).map(step.__mul__)
    if annotation is float:
        return st.floats(
            limits.get(Ge, limits.get(Gt, -1e300)),
            limits.get(Le, limits.get(Lt, 1e300)),
            exclude_min=Gt in limits,
            exclude_max=Lt in limits,
        )
    if annotation in (str, Path):
        return TEXT.filter(lambda text: len(text) >= limits.get(MinLen, 0))
    assert annotation is NoneType, annotation
    return st.none()


def _limits(metadata: tuple[Any, ...]) -> dict[type, Any]:
    found: dict[type, Any] = {}
    for entry in metadata:
        for limit in getattr(entry, "metadata", [entry]):
            for name in ("ge", "gt", "le", "lt", "multiple_of", "min_length"):
                if getattr(limit, name, None) is not None:
                    found[type(limit)] = getattr(limit, name)
    return found


def fields_of(model: type[pydantic.BaseModel], prefix: str = "") -> dict[str, Any]:
    """A strategy for every field by its dotted name, those of sections included."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            found |= fields_of(field.annotation, f"{prefix}{name}.")
        elif not any(
            isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
            for kind in get_args(field.annotation)
        ):
            found[f"{prefix}{name}"] = values_of(field.annotation, tuple(field.metadata))
    return found


@functools.cache
def changes(model: type[pydantic.BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Values for up to four fields."""
    fields = fields_of(model)
    chosen = st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({n: fields[n] for n in names}))


@pytest.mark.parametrize(
    ("model", "name"), [(TrainConfig, "release"), (DataGenConfig, "data_gen_release")]
)
@settings(max_examples=80)
@given(data=st.data())
def test_configurations(
    model: type[pydantic.BaseModel], name: str, tmp_path: Path, data: st.DataObject
) -> None:
    """From the command line to the file that a run leaves, and back."""
    changed = data.draw(changes(model))
    overrides = [f"{field}={json.dumps(value)}" for field, value in changed.items()]
    try:
        config = load_config(model, CONFIGS / f"{name}.yaml", overrides)
    except UserError as error:
        # Fields that exclude each other, and never one that was not understood.
        assert not any(word in str(error) for word in ("unknown key", "valid", "YAML")), error
        assume(False)
    for field, value in changed.items():
        found = functools.reduce(getattr, field.split("."), config)
        assert found == pydantic.TypeAdapter(type(found)).validate_python(value), field
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(model, tmp_path / "config.yaml") == config


# ---------------------------------------------------------------- schedules


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """A scheduler_config.json."""
    start, end = sorted(draw(st.tuples(*[st.floats(1e-5, 0.05)] * 2)))
    prediction_type = draw(st.sampled_from(["epsilon", "v_prediction"]))
    zero_snr = prediction_type == "v_prediction" and draw(st.booleans())
    return {
        "beta_schedule": draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        "beta_start": start,
        "beta_end": end,
        # Few, because each is another program.
        "num_train_timesteps": draw(st.sampled_from([2, 10, 1000])),
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
        "trained_betas": None,
        "steps_offset": draw(st.integers(0, 9)),
        draw(st.text(max_size=5)): draw(st.text(max_size=5)),
    }


@settings(max_examples=40)
@given(schedules(), st.data())
def test_schedules(config: dict[str, Any], data: st.DataObject) -> None:
    """x_0 and the noise come back from x_t and what the network should have said of it."""
    schedule = NoiseSchedule.from_config(json.loads(json.dumps(config)))
    alpha, sigma = schedule.alphas, schedule.sigmas
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    assert (np.diff(alpha) < 0).all() and alpha[-1] >= 0 and alpha[0] < 1
    assert (alpha[-1] == 0) == config["rescale_betas_zero_snr"]

    t = data.draw(st.integers(0, schedule.num_train_timesteps - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    x0, noise = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(2))
    steps = jnp.asarray([t, t])
    x_t, said = (f(schedule, x0, noise, steps) for f in (add_noise, training_target))
    np.testing.assert_allclose(x_t, alpha[t] * x0 + sigma[t] * noise, atol=1e-6)
    # Noise predicted at a timestep that leaves little of the picture says little of it.
    worst = 1e-5 / (alpha[t] if schedule.prediction_type == "epsilon" else 1)
    np.testing.assert_allclose(predict_x0(schedule, x_t, said, steps), x0, atol=worst)
    np.testing.assert_allclose(predict_epsilon(schedule, x_t, said, steps), noise, atol=1e-5)


# ---------------------------------------------------------------- records

UNIT = st.floats(0, 1, width=32)


@given(
    st.builds(
        records.Record,
        target=st.binary(max_size=20),
        mask=st.binary(max_size=20),
        caption=WORDS,
        object=WORDS,
        seed=st.integers(-(2**63), 2**63 - 1),
        id=WORDS,
        box=st.tuples(UNIT, UNIT, UNIT, UNIT).map(
            lambda box: (min(box[::2]), min(box[1::2]), max(box[::2]), max(box[1::2]))
        ),
        score=st.floats(width=32, allow_nan=False),
    )
)
def test_records(tmp_path: Path, record: records.Record) -> None:
    """Through a shard, between two others, to equal fields and equal bytes."""
    assume(record.box[0] < record.box[2] and record.box[1] < record.box[3])
    other = dataclasses.replace(record, id="other")
    info = records.write_shard(tmp_path / "a.tfrecord", [other, record, other])
    reader = records.ShardReader(tmp_path / "a.tfrecord", expected_count=info.count)
    assert [records.decode(reader[index]) for index in range(3)] == [other, record, other]
    assert reader[1] == records.encode(record)
    assert (tmp_path / "a.tfrecord").stat().st_size == info.num_bytes


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_masks(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    np.testing.assert_array_equal(records.decode_mask(records.encode_mask(mask)), mask)


# ---------------------------------------------------------------- names of weights


@st.composite
def unets(draw: st.DrawFn) -> UNetConfig:
    """A UNet of one to three levels, with and without attention at each."""
    levels = draw(st.integers(1, 3))
    attends = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    return dataclasses.replace(
        UNET,
        block_out_channels=(8,) * levels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        layers_per_block=draw(st.integers(1, 2)),
        use_linear_projection=draw(st.booleans()),
    )


@settings(max_examples=5)
@given(unets())
def test_names_and_layouts_of_weights(config: UNetConfig) -> None:
    """One name for each parameter, which diffusers gives a tensor of the same shape."""
    shapes = nnx.state(nnx.eval_shape(lambda: UNet(config, rngs=OneKey(0))), nnx.Param)
    parameters = dict(nnx.to_flat_state(shapes))
    names = {path: diffusers_name(path) for path in parameters}
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k != "sample_size"}
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**fields).state_dict()
    assert sorted(names.values()) == sorted(theirs)
    for path, name in names.items():
        shape = parameters[path].shape
        assert to_torch_shape(shape, path) == tuple(theirs[name].shape), name
        assert _current_name(name) == name, "no present spelling is taken for an old one"
        value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        again = from_torch_layout(to_torch_layout(value, path), path)
        np.testing.assert_array_equal(again, value, err_msg=name)


@settings(max_examples=2)
@given(unets(), st.integers(0, 9))
def test_weights(tmp_path: Path, config: UNetConfig, seed: int) -> None:
    unet = random_network(UNet, config, seed)
    save_unet(tmp_path / "unet", unet)
    loaded = load_unet(tmp_path / "unet")
    assert loaded.config == config
    saved, found = (dict(nnx.to_flat_state(nnx.state(n, nnx.Param))) for n in (unet, loaded))
    assert saved.keys() == found.keys()
    for path, leaf in saved.items():
        np.testing.assert_array_equal(found[path][...], leaf[...], err_msg=str(path))


# ---------------------------------------------------------------- settings in PNGs

PROMPTS = WORDS | st.sampled_from(["a" * MAX_TEXT, "\N{DOG FACE}" * MAX_TEXT])
FILES = st.builds(
    InputFile,
    path=WORDS | st.just("\N{DOG FACE}" * 4096),
    sha256=st.text(string.hexdigits[:16], min_size=64, max_size=64),
)
SETTINGS = st.builds(
    SamplingSettings,
    num_inference_steps=st.integers(1, 1000),
    image_guidance_scale=st.floats(0, 100),
    guidance_scale=st.floats(0, 100) | st.integers(0, 100),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.1 + 0.2, 0.9), (0, 1)]),
    negative_prompt=PROMPTS,
    strategy=st.sampled_from(STRATEGIES),
    reference_scale=st.none() | st.floats(0, 100, exclude_min=True),
    reference_caption=st.sampled_from([None, "target", "object", "\N{DOG FACE}" * MAX_TEXT]),
    reference_timestep=st.sampled_from([None, "same", 0]),
    reuse_features=st.integers(1, 1000),
    num_images=st.integers(1, 10_000),
    seed=st.integers(0, 2**32 - 1),
    solver=st.sampled_from(SOLVERS),
    spacing=st.sampled_from([None, *SPACINGS]),
    sigmas=st.sampled_from(SIGMAS),
    strength=st.floats(0, 1, exclude_min=True),
    segmenter=st.sampled_from(SEGMENTERS),
    height=st.none() | st.integers(1, 256).map((8).__mul__),
    width=st.none() | st.integers(1, 256).map((8).__mul__),
    batch_size=st.integers(1, 10_000),
    strict=st.booleans(),
)
PLACES = st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(0, 9999)).map(
    lambda size: Place(size[0], size[1], size[2] % (size[0] * size[1]), stepwise=size[2] % 2 == 1)
)
RECORDS = st.builds(
    PictureSettings,
    version=WORDS,
    model=WORDS,
    bootpig=st.none() | WORDS,
    prompt=PROMPTS,
    prompt_index=st.integers(0, 2**31 - 1),
    image_index=st.integers(0, 2**31 - 1),
    references=st.lists(FILES, max_size=16).map(tuple),
    image=st.none() | FILES,
    mask=st.none() | FILES,
    settings=SETTINGS,
    place=PLACES,
)
LONGEST = PictureSettings(
    model="\N{DOG FACE}" * 4096,
    bootpig="\N{DOG FACE}" * 4096,
    prompt="\N{DOG FACE}" * MAX_TEXT,
    references=(InputFile(path="\N{DOG FACE}" * 4096, sha256="0" * 64),) * 16,
    settings=SamplingSettings(negative_prompt="\N{DOG FACE}" * MAX_TEXT),
)


@given(RECORDS, st.binary(min_size=18, max_size=18))
@example(LONGEST, bytes(18))
def test_settings_in_a_png(tmp_path: Path, record: PictureSettings, pixels: bytes) -> None:
    picture = np.frombuffer(pixels, np.uint8).reshape(3, 2, 3)
    write_png(tmp_path / "a.png", Image.fromarray(picture), record)
    found, image = read_picture_settings(tmp_path / "a.png")
    assert found == record
    np.testing.assert_array_equal(np.asarray(image), picture)
