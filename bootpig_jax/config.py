"""The configuration of a training run: typed, frozen, every field overridable on the command line.

The defaults are the paper's (§4.1, Algorithm 1). `configs/release.yaml` holds what the authors'
PyTorch release does differently. Which way the model predicts (noise or velocity) and how the noise
schedule runs are no fields: the base checkpoint's own scheduler configuration decides them.
"""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from bootpig_jax.files import LocalName, LocalPath
from bootpig_jax.yaml_config import ConfigModel

Probability = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class ModelConfig(ConfigModel):
    """The checkpoint that both UNets start from."""

    base: LocalName = Field(min_length=1)
    """A folder in diffusers layout, or a hub id."""
    allow_pickle: bool = False
    """Whether PyTorch's pickled weights are opened where there are no safetensors. Only tensors are
    read from them."""


class TrainableConfig(ConfigModel):
    """Which parameters are trained: a row of Table 2. `rsa` are q, k, v, out of every `attn1`."""

    base: Literal["none", "rsa", "all"] = "rsa"
    reference: Literal["none", "all"] = "all"

    @pydantic.model_validator(mode="after")
    def _something_trains(self) -> "TrainableConfig":
        if self.base == "none" and self.reference == "none":
            raise ValueError("base and reference are both none: nothing would be trained")
        return self


class DataConfig(ConfigModel):
    """The training triplets and how a reference is made of a target and its mask."""

    dir: LocalPath
    """A folder of TFRecord shards in TFDS layout."""
    split: str = "train"
    image_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 512
    augmentation: Literal["paper", "release", "none"] = "paper"
    threads: Annotated[int, Field(ge=0, le=256)] = 8
    """Reader threads. The order of the samples does not depend on it."""
    cache: LocalPath | None = None
    """A folder that `python -m bootpig_jax.cache_latents` filled: latents and text features are
    read from it, and a step computes neither."""
    cache_copies: Annotated[int, Field(ge=1, le=1000)] = 4
    """Augmented copies of each reference in the cache."""


class OptimizerConfig(ConfigModel):
    """AdamW with one learning rate for the Reference UNet and one for the Base UNet's layers."""

    lr_reference: LearningRate = 5e-6
    lr_rsa: LearningRate = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which both learning rates rise from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; `cosine` falls to 0 at the run's last update. The paper's is constant."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradients' largest norm, taken over all trained tensors of both UNets together."""


class MeshConfig(ConfigModel):
    """The device mesh. The batch is split over both axes, the weights over `fsdp` only."""

    data: Annotated[int, Field(ge=-1)] = -1
    """-1: all devices that the other axis leaves."""
    fsdp: Annotated[int, Field(ge=-1)] = 1
    fsdp_min_size: Count = 2**16
    """Arrays with fewer elements stay whole on every device."""

    @pydantic.model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        if 0 in (self.data, self.fsdp):
            raise ValueError("an axis of size 0 holds no device: use 1, or -1 for the rest")
        if self.data == self.fsdp == -1:
            raise ValueError("only one of data and fsdp can be -1")
        return self


class CheckpointConfig(ConfigModel):
    """How often the state is saved to `output_dir/checkpoints`, and how a run starts."""

    every: Count = 500
    """Updates between two checkpoints. The last update is always saved."""
    keep: Count = 3
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto` resumes if there is a checkpoint, `must` refuses to start without one, `never` refuses
    to start where one lies."""


class SafetyConfig(ConfigModel):
    """When a run ends by itself."""

    max_skipped: Count = 10
    """Updates in a row that may be skipped because the loss or a gradient is not finite; with that
    many the run ends. A skipped update changes nothing but the step count."""
    hang_seconds: Annotated[int, Field(ge=0)] = 1800
    """Seconds without a new step (compiling it included) after which every thread's stack is
    printed and the process ends; 0: never."""


class ValidationConfig(ConfigModel):
    """The loss on triplets that are not trained on."""

    dir: LocalPath | None = None
    """A folder like `data.dir`, or the same with another split; null: no validation."""
    split: str = "train"
    every: Count = 500
    """Updates between two validations."""
    samples: Count = 64
    """How many: the first of the split, each at a timestep of its own, the same each time."""


class LoggingConfig(ConfigModel):
    """What TensorBoard, `history.jsonl` and the progress bar show."""

    every: Count = 10
    """Updates between two readings of the metrics. Reading them waits for the device."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """A project of Weights & Biases to log to as well, if that is installed."""
    grid_every: Annotated[int, Field(ge=0)] = 500
    """Updates between two grids of samples; 0 for none."""
    grid_references: Annotated[int, Field(ge=1, le=16)] = 4
    """References in a grid: the first of the training data."""
    grid_prompts: tuple[str, ...] = ()
    """Prompts each reference is drawn with; `{object}` stands for its object's words. Empty: its
    own caption."""
    grid_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    image_guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5


class TrainConfig(ConfigModel):
    """Everything that `python -m bootpig_jax.train` can be told."""

    model: ModelConfig
    data: DataConfig
    output_dir: LocalPath
    export_precision: Literal["float32", "float16"] = "float32"
    """Of the weights that are written when the run is complete."""
    steps: Count = 10_000
    batch_size: Count = 64
    """Samples an update, over all devices and accumulation steps together."""
    accumulation: Count = 1
    """Parts that a batch is worked through in; the gradients are summed, then reduced once."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation and of the frozen weights. Trained weights are float32. `auto` is bfloat16
    on accelerators and float32 on CPUs."""
    remat: bool = False
    """Whether the backward pass computes what is inside the UNets' blocks again: less memory, a
    quarter to a third more work. `--plan` says how much less."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a running average of the trained weights, which is then exported in their place."""
    trainable: TrainableConfig = TrainableConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    reference_dropout: Probability = 0.15
    """How often the Base UNet sees no reference (§3.3); Eq. 4's U_SA."""
    reference_dropout_unit: Literal["sample", "batch"] = "sample"
    """The release draws once for the whole batch."""
    caption_dropout: Probability = 0.15
    """How often the Base UNet's caption is empty (Algorithm 1), independent of the reference."""
    reference_timestep: Literal["same", 0] = "same"
    """`same`: references are noised to the target's t, as in the paper. 0: they stay clean."""
    reference_caption: Literal["target", "first_clause", "object"] = "target"
    """What the Reference UNet reads: the target's caption, the caption up to its first comma
    (release), or the object's words alone."""
    reference_key_scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor on the reference tokens that feed the keys, in training and sampling (release:
    1.1)."""
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    safety: SafetyConfig = SafetyConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()

    @pydantic.model_validator(mode="after")
    def _batch_divides(self) -> "TrainConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}"
            )
        return self
