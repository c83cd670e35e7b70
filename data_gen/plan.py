"""The plan of a run (`--dry-run`): what it would take, from its configuration and what is there.

No model is loaded. The work for a picture is counted on the networks' configurations, with tensors
that have a shape and no content.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.captions import make_caption_source
from data_gen.config import DataGenConfig, PicturesConfig
from data_gen.shards import finished_shards
from data_gen.stages import CaptionSource

# NVIDIA's own figure for Stable Diffusion 2.1 on an H100 (50 steps with guidance, 512 px, batch 32:
# 3.32 pictures a second) is 35 % of the 790 TFLOP/s that its matrix products reach in bfloat16.
H100_TFLOPS = 790
EFFICIENCY = 0.35

# Of a JPEG of quality 95 without chroma subsampling. A drawn picture of 512 px has about 120 kB.
_BYTES_PER_PIXEL = 0.45
_BYTES_PER_RECORD = 2000  # mask, texts, frame


@dataclass(frozen=True)
class Plan:
    """What is left of a run, or of one job's part of it.

    Attributes:
      output_dir: where it writes.
      captions: what they come from.
      calls: calls of the language model that are left; None where none is asked.
      drawing: what the pictures come from.
      shards: how many the run or part has.
      shards_left: those that are not there yet.
      pictures: candidates of all its shards.
      pictures_left: those of the shards that are not there yet.
      tflop: work for a picture in 10^12 floating-point operations; None where it is not known.
      seconds: that a picture took in the finished shards; None where there are none.
      kept: share of the candidates that the finished shards kept; None where there are none.
      bytes_left: that are yet to be written.
      bytes_measured: whether finished shards told how large a record is.
    """

    output_dir: Path
    captions: str
    calls: int | None
    drawing: str
    shards: int
    shards_left: int
    pictures: int
    pictures_left: int
    tflop: float | None
    seconds: float | None
    kept: float | None
    bytes_left: float
    bytes_measured: bool

    def text(self) -> str:
        """Returns the plan, a line for each thing."""
        calls = "no calls" if self.calls is None else f"{self.calls:,} calls left"
        lines = [
            ("captions", f"{self.pictures:,} from {self.captions}: {calls}"),
            ("pictures", f"{self.pictures_left:,} of {self.pictures:,} left: {self.drawing}"),
            ("shards", f"{self.shards_left:,} of {self.shards:,} left"),
            ("time", self._time()),
            ("disk", self._disk()),
            ("output", str(self.output_dir)),
        ]
        return "\n".join(f"{name:10}{text}" for name, text in lines)

    def _time(self) -> str:
        if self.seconds is not None:
            hours = self.pictures_left * self.seconds / 3600
            return f"{hours:,.1f} hours left (measured: {self.seconds:.3g} s a picture so far)"
        if self.tflop is None:
            return "not known: neither are shards there, nor the model's configuration"
        hours = self.pictures_left * self.tflop / (H100_TFLOPS * EFFICIENCY) / 3600
        return (
            f"{hours:,.1f} GPU hours on an H100 in half precision (estimated: {self.tflop:,.3g} "
            f"TFLOP a picture at {EFFICIENCY:.0%} of {H100_TFLOPS} TFLOP/s)"
        )

    def _disk(self) -> str:
        how = "measured" if self.bytes_measured else "estimated"
        kept = "" if self.kept is None else f", {self.kept:.1%} of the candidates kept so far"
        return f"{self.bytes_left / 1e9:,.2f} GB more at most ({how}{kept})"


def make_plan(config: DataGenConfig, shards: Sequence[int]) -> Plan:
    """Plans the making of some shards. Reads files alone: loads no model and asks no server.

    Args:
      config: the run's configuration.
      shards: their numbers.

    Raises:
      UserError: the captions' file or journal cannot be used.
    """
    source = make_caption_source(config)
    finished = [report for n, report in finished_shards(config).items() if n in shards]
    pictures = sum(len(config.shard_indices(shard)) for shard in shards)
    drawn = sum(report.candidates for report in finished)
    samples = sum(report.count for report in finished)
    if samples:
        record = sum(report.num_bytes for report in finished) / samples
        left_share = samples / drawn
    else:
        record = _BYTES_PER_PIXEL * config.pictures.stored_size**2 + _BYTES_PER_RECORD
        left_share = 1.0
    asks = config.captions.source == "llm"
    return Plan(
        output_dir=config.output_dir,
        captions=config.captions.source,
        calls=_calls(config, source) if asks else None,
        drawing=_drawing(config.pictures),
        shards=len(shards),
        shards_left=len(shards) - len(finished),
        pictures=pictures,
        pictures_left=pictures - drawn,
        tflop=_tflop(config.pictures),
        seconds=sum(r.seconds["total"] for r in finished) / drawn if drawn else None,
        kept=samples / drawn if drawn else None,
        bytes_left=(pictures - drawn) * left_share * record,
        bytes_measured=bool(samples),
    )


def _calls(config: DataGenConfig, captions: CaptionSource) -> int:
    """Returns how many calls are left if all captions they bring can be used."""
    assert config.captions.llm is not None  # the configuration was checked
    there, missing = 0, config.candidates + 1
    while missing - there > 1:  # the largest number of captions that are there
        middle = (there + missing) // 2
        there, missing = (middle, missing) if captions.complete(middle) else (there, middle)
    return -(-(config.candidates - there) // config.captions.llm.captions_per_call)


def _drawing(config: PicturesConfig) -> str:
    if config.source == "folder":
        return f"files of {config.folder}"
    refined = "" if config.refiner is None else f" and {config.refiner.model}"
    return (
        f"{config.model}{refined}, {config.steps} steps, {config.image_size} px, "
        f"guidance {config.guidance_scale:g}"
    )


def _tflop(config: PicturesConfig) -> float | None:
    """Returns the work for a picture, or None where the model's configuration is not at hand."""
    if config.source == "folder" or config.model is None:
        return None
    branches = 2 if config.guidance_scale > 1 else 1
    base, vae = _unet_tflop(Path(config.model), config.image_size), None
    start = 1.0
    refining: float | None = 0.0
    if config.refiner is not None:
        start = config.refiner.start
        refining = _unet_tflop(Path(config.refiner.model), config.image_size)
    vae = _decoder_tflop(Path(config.model), config.image_size)
    if base is None or refining is None or vae is None:
        return None
    return config.steps * branches * (start * base + (1 - start) * refining) + vae


def _unet_tflop(folder: Path, image_size: int) -> float | None:
    """Counts one forward pass of a UNet for one picture."""
    settings, vae = _read(folder / "unet"), _read(folder / "vae")
    if settings is None or vae is None:
        return None
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    side = image_size // 2 ** (len(vae["block_out_channels"]) - 1)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings)
        unet.set_attn_processor(AttnProcessor())  # plain matrix products, which can be counted
        inputs: dict[str, Any] = {
            "sample": torch.empty(1, unet.config["in_channels"], side, side),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 77, unet.config["cross_attention_dim"]),
        }
        if unet.config["addition_embed_type"] == "text_time":
            numbers = 6 if unet.config["projection_class_embeddings_input_dim"] == 2816 else 5
            width = unet.config["addition_time_embed_dim"]
            pooled = unet.config["projection_class_embeddings_input_dim"] - numbers * width
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(1, pooled),
                "time_ids": torch.empty(1, numbers),
            }
        return _count(lambda: unet(**inputs))


def _decoder_tflop(folder: Path, image_size: int) -> float | None:
    """Counts the decoding of one picture's latents."""
    settings = _read(folder / "vae")
    if settings is None:
        return None
    import torch
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor

    side = image_size // 2 ** (len(settings["block_out_channels"]) - 1)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(settings)
        vae.set_attn_processor(AttnProcessor())
        return _count(lambda: vae.decode(torch.empty(1, vae.config["latent_channels"], side, side)))


def _count(forward: Any) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 1e12


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
