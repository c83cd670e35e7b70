"""The configuration of a data generation run: typed, frozen, every field overridable."""

import hashlib
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import pydantic
from pydantic import Field

from bootpig_jax.files import LocalName, LocalPath
from bootpig_jax.yaml_config import ConfigModel

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

# What changes neither the samples (beyond rounding) nor where they stand in the shards. Models and
# the user's pictures are known by their files, not by their paths; a file of captions by the hash
# of its captions that each shard's report holds.
_NOT_IN_PICTURES: Any = {
    **dict.fromkeys(("batch_size", "device", "attention", "torch_compile"), True),
    **dict.fromkeys(("model", "folder"), True),
    "refiner": {"model"},
}
_NOT_IN_CAPTIONS: Any = {
    "file": True,
    "llm": {
        **dict.fromkeys(("base_url", "api_key_env", "json_schema", "send_seed"), True),
        **dict.fromkeys(("max_tokens", "timeout_s", "attempts", "concurrency", "ahead"), True),
    },
}
_NOT_IN_MASKS: Any = {
    **dict.fromkeys(("batch_size", "device"), True),
    "grounded_sam": {"detector", "sam"},
    "sam3": {"model"},
}
_NOT_IN_SAMPLES: Any = {
    **dict.fromkeys(("output_dir", "max_attempts", "ray"), True),
    "captions": _NOT_IN_CAPTIONS,
    "pictures": _NOT_IN_PICTURES,
    "masks": _NOT_IN_MASKS,
}


class LLMConfig(ConfigModel):
    """A language model that writes captions, behind a server of OpenAI's chat protocol."""

    model: str = Field(min_length=1)
    """The model's name, as the server knows it."""
    base_url: str = "https://api.openai.com/v1"
    """Where the server is, `/v1` included."""
    api_key_env: str | None = None
    """The environment variable that holds the server's key; null: no key is sent."""
    captions_per_call: Annotated[int, Field(ge=1, le=200)] = 1
    """Captions asked for in one call: 1 in the paper, 50 in the authors' release."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """1.2 in the authors' release."""
    max_words: Annotated[int, Field(ge=8, le=60)] | None = None
    """What the prompt asks for at most in a caption: 17 in the release; null: it says nothing."""

    # How the server is asked. A run may go on with these changed.
    json_schema: Literal["auto", "on", "off"] = "auto"
    """Whether answers must follow a JSON schema; `auto`: until the server refuses that."""
    send_seed: bool = True
    """Send a seed with each call, drawn from the run's seed and the call's number."""
    max_tokens: Count | None = None
    """Length of an answer at most; null: the server's own limit."""
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """How often a call is tried before the run ends with an error."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Calls in flight at most."""
    ahead: Count = 2000
    """How many captions, beyond those asked for so far, are made in the background at most."""

    @pydantic.model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        # A configuration is printed and stored. Checked here and not field by field, because the
        # error of a whole section does not show its values.
        if self.api_key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env is the name of an environment variable (capitals, digits, _), "
                "not the key itself"
            )
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            usable = False
        if not usable or not self.base_url.isprintable() or " " in self.base_url:
            raise ValueError("base_url is no URL such as http://localhost:8000/v1")
        if url.username is not None or url.query or url.fragment:
            raise ValueError(
                "base_url must not hold a password or a query: put the key into an environment "
                "variable and name that in api_key_env"
            )
        return self


class CaptionsConfig(ConfigModel):
    """Where the captions come from."""

    source: Literal["open_world", "toyland", "llm", "file"] = "open_world"
    """`open_world` and `toyland` are grammars; `llm` a language model; `file` the user's own."""
    llm: LLMConfig | None = None
    file: LocalPath | None = None
    """Captions, one a line, or, with the suffix `.jsonl`, one JSON object a line."""

    @pydantic.model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if self.source == "llm" and self.llm is None:
            raise ValueError("llm is missing: source is llm, so give at least llm.model")
        if self.source == "file" and self.file is None:
            raise ValueError("file is missing: source is file, so name one")
        return self


class RefinerConfig(ConfigModel):
    """A second model that draws the last steps: SDXL's refiner."""

    model: LocalName
    """A folder in diffusers layout that holds a StableDiffusionXLImg2ImgPipeline, or a hub id."""
    start: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """The share of the noise schedule after which it takes over."""


class PicturesConfig(ConfigModel):
    """Where the pictures come from: a text-to-image model, or a folder of the user's own."""

    source: Literal["model", "folder"] = "model"

    model: LocalName | None = None
    """A folder in diffusers layout that holds a text-to-image pipeline, or the id of one on the
    Hugging Face hub, which is then downloaded."""
    variant: str | None = Field(None, pattern=r"^\w+$")
    """Which of several sets of weights to take, such as `fp16`; null: those without a name."""
    refiner: RefinerConfig | None = None
    scheduler: Literal[
        "default", "unipc", "dpmsolver++", "ddim", "euler", "euler_ancestral", "lcm"
    ] = "default"
    """`default`: the model's own. The noise schedule and the prediction type always are."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    """Up to 1 the pictures are drawn without guidance, in half the time."""
    image_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 512
    """Side of the pictures as they are drawn."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    attention: Literal["sdpa", "sliced"] = "sdpa"
    """`sliced`: attention and the VAE take one picture at a time, for less memory and speed."""
    torch_compile: bool = False
    """Compile the denoiser: minutes at the start, for faster steps."""
    safety_checker: bool = False
    """Reject what the model's own safety checker flags, as `nsfw`."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto`: the GPU if there is one."""
    batch_size: Count = 8
    """Pictures drawn at once. It changes no picture beyond rounding."""

    folder: LocalPath | None = None
    """The user's own pictures: candidate i is the i-th file of this folder, by name."""
    min_side: Count = 256
    """Files whose shorter side has fewer pixels are rejected."""
    max_aspect: Annotated[float, Field(ge=1, le=100)] = 2.0
    """Files whose longer side is more than this many times the shorter one are rejected."""

    output_size: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] | None = None
    """Side of the pictures as they are stored; null: `image_size`."""

    @property
    def stored_size(self) -> int:
        """The side of the pictures as they are stored."""
        return self.output_size or self.image_size

    @pydantic.model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if getattr(self, self.source) is None:
            raise ValueError(f"{self.source} is missing: source is {self.source}, so name one")
        return self

    @pydantic.model_validator(mode="after")
    def _both_models_have_steps(self) -> Self:
        if self.refiner and not 1 <= self.steps * self.refiner.start <= self.steps - 1:
            raise ValueError("steps are too few to share: the model or its refiner would get none")
        return self


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


class GroundedSamConfig(ConfigModel):
    """GroundingDINO finds the object's words, Segment Anything cuts out what its box holds."""

    detector: LocalName | None = None
    """GroundingDINO in transformers' layout: a folder, or a hub id."""
    sam: LocalName | None = None
    """For `grounded_sam` a .pth checkpoint of segment_anything; for `grounded_sam_hf` SAM in
    transformers' layout: a folder, or a hub id."""
    sam_type: Literal["vit_b", "vit_l", "vit_h"] = "vit_h"
    """The size of the .pth checkpoint's network."""
    box_threshold: Share = 0.3
    """Score that a box must have more than. Where none has, the candidate is rejected."""
    box: Literal["best", "first"] = "best"
    """The box that is cut out: that of the highest score, or the first above the threshold, in the
    detector's own order, as in the authors' release."""


class Sam3Config(ConfigModel):
    """SAM 3 finds and cuts out the object's words by itself."""

    model: LocalName | None = None
    """SAM 3 in transformers' layout: a folder, or a hub id."""
    threshold: Share = 0.5
    """Score that a mask must have more than. Where none has, the candidate is rejected."""


class MasksConfig(ConfigModel):
    """How the object is cut out of the picture."""

    segmenter: Literal["grabcut", "keying", "grounded_sam", "grounded_sam_hf", "sam3"] = "grabcut"
    """`grabcut` and `keying` need no weights and do not look at the object's words."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Of the networks. `auto`: the GPU if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks' matrix products; their weights are kept in float32."""
    batch_size: Count = 4
    """Pictures the networks see at once. It changes no mask beyond rounding."""
    grabcut: GrabCutConfig = GrabCutConfig()
    keying: KeyingConfig = KeyingConfig()
    grounded_sam: GroundedSamConfig = GroundedSamConfig()
    sam3: Sam3Config = Sam3Config()
    filters: FiltersConfig = FiltersConfig()

    @pydantic.model_validator(mode="after")
    def _networks_are_named(self) -> Self:
        needed = {
            "grounded_sam": {
                "grounded_sam.detector": self.grounded_sam.detector,
                "grounded_sam.sam": self.grounded_sam.sam,
            },
            "grounded_sam_hf": {
                "grounded_sam.detector": self.grounded_sam.detector,
                "grounded_sam.sam": self.grounded_sam.sam,
            },
            "sam3": {"sam3.model": self.sam3.model},
        }
        for field, value in needed.get(self.segmenter, {}).items():
            if not value:
                raise ValueError(f"segmenter {self.segmenter} needs masks.{field}: name its model")
        return self


class RayConfig(ConfigModel):
    """The actors of `--engine ray`."""

    actors: Count | None = None
    """null: one for each of the cluster's GPUs or, where it has none, for each of its machines."""
    cpus_per_actor: Count = 1
    """CPUs that an actor reserves: where there is no GPU, also the threads that it draws with."""


class DataGenConfig(ConfigModel):
    """Everything that `python -m data_gen.run` can be told."""

    output_dir: LocalPath
    """The TFDS folder that is written. A run that was stopped goes on in it."""
    dataset: str = Field("bootpig", pattern=r"^[a-z][a-z0-9_]{0,63}$")
    split: str = Field("train", pattern=r"^[a-z][a-z0-9_]{0,63}$")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    candidates: Annotated[int, Field(ge=1, le=10**9)] = 200_000
    """Pictures to draw. Those with a bad mask are rejected, so fewer samples come out."""
    candidates_per_shard: Count = 1000
    """Candidates in a shard at most: what a run that is killed has to draw again at most."""
    captions: CaptionsConfig = CaptionsConfig()
    pictures: PicturesConfig
    masks: MasksConfig = MasksConfig()
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """How often a shard is tried that fails, before the run goes on without it."""
    ray: RayConfig = RayConfig()

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
      model_hash: hash of the models' files (`stages.Stages.model_hash`). It stands in for their
        paths.

    Returns:
      32 hexadecimal digits.
    """
    text = config.model_dump_json(exclude=_NOT_IN_SAMPLES) + model_hash
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
