"""The configuration of a data generation run: typed, frozen, every field overridable."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from bootpig_jax.yaml_config import ConfigModel

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

# What changes neither the samples (beyond rounding) nor where they stand in the shards. The model
# is known by its files, not by its path.
_NOT_IN_SAMPLES: Any = {"output_dir": True, "pictures": {"batch_size", "device", "model"}}


class PicturesConfig(ConfigModel):
    """The text-to-image model and how it is sampled."""

    model: Path
    """A folder in diffusers layout that holds a StableDiffusionPipeline."""
    scheduler: Literal["unipc", "ddim"] = "unipc"
    """Its noise schedule and prediction type come from the model's own scheduler configuration."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    image_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 512
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto`: the GPU if there is one."""
    batch_size: Count = 8
    """Pictures drawn at once. It changes no picture beyond rounding."""


class GrabCutConfig(ConfigModel):
    """GrabCut, seeded by a model of the background that is taken from the picture's border."""

    iterations: Annotated[int, Field(ge=1, le=50)] = 4
    working_size: Annotated[int, Field(ge=32, le=2048)] = 256
    """The longer side the picture is resized to before it is cut."""


class KeyingConfig(ConfigModel):
    """Keying: what differs from a background of (almost) one colour."""

    tolerance: Annotated[float, Field(gt=0, le=100)] = 12.0
    """Distance in CIE Lab above which a pixel is foreground."""
    max_border_spread: Annotated[float, Field(gt=0, le=100)] = 6.0
    """Pictures whose border colours spread more (root mean square, CIE Lab) are rejected."""


class FiltersConfig(ConfigModel):
    """Which masks are rejected."""

    min_area: Share = 0.02
    """Share of the picture that a mask must cover at least."""
    max_area: Share = 0.8
    """Share of the picture that a mask may cover at most."""
    border: Annotated[float, Field(ge=0, lt=0.5)] = 25 / 512
    """Width, as a share of the picture's side, of the frame that a mask must not touch."""
    min_largest_component: Share = 0.9
    """Share of a mask that its largest connected component must hold. Only that one is kept."""
    min_score: Share = 0.0
    """Score that the segmenter must give the mask at least."""

    @pydantic.model_validator(mode="after")
    def _areas_in_order(self) -> Self:
        if self.min_area >= self.max_area:
            raise ValueError("min_area must be below max_area: every mask would be rejected")
        return self


class MasksConfig(ConfigModel):
    """How the object is cut out of the picture."""

    segmenter: Literal["grabcut", "keying"] = "grabcut"
    grabcut: GrabCutConfig = GrabCutConfig()
    keying: KeyingConfig = KeyingConfig()
    filters: FiltersConfig = FiltersConfig()


class DataGenConfig(ConfigModel):
    """Everything that `python -m data_gen.run` can be told."""

    output_dir: Path
    """The TFDS folder that is written. A run that was stopped goes on in it."""
    dataset: str = Field("bootpig", pattern=r"^[a-z][a-z0-9_]{0,63}$")
    split: str = Field("train", pattern=r"^[a-z][a-z0-9_]{0,63}$")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    candidates: Annotated[int, Field(ge=1, le=10**9)] = 200_000
    """Pictures to draw. Those with a bad mask are rejected, so fewer samples come out."""
    candidates_per_shard: Count = 1000
    """Candidates in a shard at most: what a run that is killed has to draw again at most."""
    captions: Literal["toyland", "open_world"] = "open_world"
    pictures: PicturesConfig
    masks: MasksConfig = MasksConfig()

    @property
    def num_shards(self) -> int:
        """The number of shard files."""
        return -(-self.candidates // self.candidates_per_shard)

    def shard_indices(self, shard: int) -> range:
        """Returns the global indices of the candidates in shard number `shard`.

        The sizes of two shards differ by one at most: a last shard of a few candidates might have
        all of them rejected.
        """
        return range(
            shard * self.candidates // self.num_shards,
            (shard + 1) * self.candidates // self.num_shards,
        )


def samples_hash(config: DataGenConfig, model_hash: str) -> str:
    """Hashes all that the samples and their places in the shards depend on.

    Args:
      config: the run's configuration. Where it writes, on which device and in what batches it draws
        does not enter: a run may go on with those changed.
      model_hash: hash of the text-to-image model's files. It stands in for their path.

    Returns:
      32 hexadecimal digits.
    """
    text = config.model_dump_json(exclude=_NOT_IN_SAMPLES) + model_hash
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
