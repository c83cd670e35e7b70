"""Stable Diffusion's UNet (diffusers' `UNet2DConditionModel`), for SD 1.5, 2.1-base and 2.1.

It returns its prediction and what entered each self-attention layer, in execution order, and it
takes references' features by the same index. Under `jax.jit` what the caller does not use is never
computed: the Reference UNet's tail after its last feature costs nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from bootpig_jax.errors import UserError
from bootpig_jax.kernels import PLAIN, Kernels
from bootpig_jax.models.blocks import (
    Attention,
    Downsample,
    GroupNorm,
    References,
    ResnetBlock,
    SharedReferences,
    SpatialTransformer,
    Upsample,
    conv3x3,
    linear,
)
from bootpig_jax.models.config import pick


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of a UNet's `config.json` that its computation depends on.

    `attention_head_dim` is, despite its name, the *number* of heads at each resolution.
    """

    block_out_channels: tuple[int, ...]
    cross_attention_dim: int
    attention_head_dim: int | tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    in_channels: int = 4
    out_channels: int = 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    sample_size: int = 64

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed `config.json`.

        Raises:
            UserError: a field is missing, or asks for what this UNet does not implement.
        """
        return pick(
            cls,
            config,
            "unet",
            {
                "act_fn": ("silu",),
                "addition_embed_type": (None,),
                "center_input_sample": (False,),
                "class_embed_type": (None,),
                "conv_in_kernel": (3,),
                "conv_out_kernel": (3,),
                "downsample_padding": (1,),
                "dual_cross_attention": (False,),
                "encoder_hid_dim": (None,),
                "flip_sin_to_cos": (True,),
                "freq_shift": (0,),
                "mid_block_scale_factor": (1,),
                "mid_block_type": ("UNetMidBlock2DCrossAttn",),
                "num_attention_heads": (None,),
                "num_class_embeds": (None,),
                "only_cross_attention": (False,),
                "resnet_time_scale_shift": ("default",),
                "time_embedding_type": ("positional",),
                "timestep_post_act": (None,),
                "transformer_layers_per_block": (1,),
            },
        )

    def heads(self, level: int) -> int:
        """The number of attention heads at resolution `level`, 0 the finest."""
        if isinstance(self.attention_head_dim, int):
            return self.attention_head_dim
        return self.attention_head_dim[level]

    @property
    def downsampling(self) -> int:
        """By what factor the coarsest feature map is smaller than the latents."""
        return 2 ** (len(self.block_out_channels) - 1)


def timestep_embedding(t: Real[Array, " b"], channels: int) -> Float[Array, "b c"]:
    """Sinusoids of the timestep, cosines first: ``cos(t w_i), sin(t w_i)``."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """The two layers that embed a timestep's sinusoids."""

    def __init__(self, channels: int, time_channels: int, **kwargs: Any):
        self.linear_1 = linear(channels, time_channels, **kwargs)
        self.linear_2 = linear(time_channels, time_channels, **kwargs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b t"]:
        """Applies both layers."""
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class UNetBlock(nnx.Module):
    """One resolution, on the way down, in the middle or on the way up: only a container.

    `attentions` is empty where the resolution has none; a resampler list holds one or no layer.
    """

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[SpatialTransformer],
        downsamplers: list[Downsample] | None = None,
        upsamplers: list[Upsample] | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions)
        self.downsamplers = nnx.List(downsamplers or [])
        self.upsamplers = nnx.List(upsamplers or [])


class UNet(nnx.Module):
    """The denoiser ``U(x, t, c)``, which can also attend to references' features.

    Args:
        config: the sizes.
        rngs: the source of the initial weights.
        dtype: the precision of the computation.
        param_dtype: the precision the parameters are kept in.
        kernels: how the device computes attention.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        kernels: Kernels = PLAIN,
    ):
        self.config = config
        # Whether the backward pass computes what is inside each block again, instead of keeping it.
        self.remat = False
        kwargs: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        channels = config.block_out_channels
        levels = len(channels)
        time_channels = 4 * channels[0]

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(
                c_in,
                c_out,
                groups=config.norm_num_groups,
                epsilon=config.norm_eps,
                time_channels=time_channels,
                **kwargs,
            )

        def transformer(level: int) -> SpatialTransformer:
            return SpatialTransformer(
                channels[level],
                config.cross_attention_dim,
                config.heads(level),
                groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                kernels=kernels,
                **kwargs,
            )

        self.conv_in = conv3x3(config.in_channels, channels[0], **kwargs)
        self.time_embedding = TimeEmbedding(channels[0], time_channels, **kwargs)

        skips = [channels[0]]
        down_blocks = []
        for level, kind in enumerate(config.down_block_types):
            _check_kind(kind, "down", ("CrossAttnDownBlock2D", "DownBlock2D"))
            last = level == levels - 1
            resnets = []
            for _ in range(config.layers_per_block):
                resnets.append(resnet(skips[-1], channels[level]))
                skips.append(channels[level])
            attend = kind.startswith("CrossAttn")
            attentions = [transformer(level) for _ in resnets] if attend else []
            downsamplers = [] if last else [Downsample(channels[level], (1, 1), **kwargs)]
            skips += [] if last else [channels[level]]
            down_blocks.append(UNetBlock(resnets, attentions, downsamplers=downsamplers))
        self.down_blocks = nnx.List(down_blocks)

        middle = channels[-1]
        self.mid_block = UNetBlock(
            [resnet(middle, middle), resnet(middle, middle)], [transformer(levels - 1)]
        )

        up_blocks = []
        current = middle
        for position, kind in enumerate(config.up_block_types):
            _check_kind(kind, "up", ("CrossAttnUpBlock2D", "UpBlock2D"))
            level = levels - 1 - position
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(resnet(current + skips.pop(), channels[level]))
                current = channels[level]
            attend = kind.startswith("CrossAttn")
            attentions = [transformer(level) for _ in resnets] if attend else []
            upsamplers = [] if level == 0 else [Upsample(channels[level], **kwargs)]
            up_blocks.append(UNetBlock(resnets, attentions, upsamplers=upsamplers))
        self.up_blocks = nnx.List(up_blocks)

        # In float32: guidance (Eq. 4) weighs predictions by -4, -2.5 and 7.5, and what their last
        # layer rounds with them. For the whole UNet's cost it is nothing.
        kwargs["dtype"] = jnp.dtype(jnp.float32)
        self.conv_norm_out = GroupNorm(
            channels[0], config.norm_num_groups, config.norm_eps, **kwargs
        )
        self.conv_out = conv3x3(channels[0], config.out_channels, **kwargs)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, " b"],
        text: Float[Array, "r l e"],
        references: References | SharedReferences | None = None,
        rows: Int[np.ndarray, " r"] | None = None,
    ) -> tuple[Float[Array, "r h w o"], tuple[Float[Array, "_b _n _d"], ...]]:
        """Predicts the noise (or velocity) in `latents`.

        Args:
            latents: the noised latents ``x_t``; height and width divisible by
                `config.downsampling`.
            timesteps: ``t`` in ``[0, T)``; solvers may ask for fractions.
            text: the caption's token features.
            references: what the self-attention layers attend to besides their own tokens; with
                ``None`` this is plain Stable Diffusion.
            rows: for guidance, which evaluates the same latents with several texts: the sample that
                each row of `text` belongs to. The prediction has one row for each of them too, and
                what the rows of a sample have in common, everything up to the first cross-attention
                but for the references, is computed once. `SharedReferences` must have a plain row
                for each sample or none. ``None``: one text for each sample.

        Returns:
            The prediction, in float32, and the input of each self-attention layer in execution
            order.
        """
        sinusoids = timestep_embedding(timesteps, self.config.block_out_channels[0])
        time = self.time_embedding(sinusoids.astype(latents.dtype))
        x = self.conv_in(latents)
        skips = [x]
        features: list[Array] = []
        rematerialised = jax.checkpoint if self.remat else lambda function: function

        def convolve(resnet: ResnetBlock, x: Array) -> Array:
            return rematerialised(lambda x: resnet(x, time))(x)

        def attend(block: UNetBlock, index: int, x: Array) -> Array:
            nonlocal rows, skips, time
            if not block.attentions:
                return x
            layer = None if references is None else references.layer(len(features))
            if rows is not None and isinstance(layer, SharedReferences):
                layer = layer.replace(seeing=len(x))  # type: ignore[attr-defined]
            x, f = rematerialised(lambda x: block.attentions[index](x, text, layer, rows))(x)
            features.append(f)
            if rows is not None:
                skips, time, rows = [skip[rows] for skip in skips], time[rows], None
            return x

        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = attend(block, i, convolve(resnet, x))
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)

        x = convolve(self.mid_block.resnets[0], x)
        x = attend(self.mid_block, 0, x)
        x = convolve(self.mid_block.resnets[1], x)

        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = attend(block, i, convolve(resnet, x))
            for upsample in block.upsamplers:
                x = upsample(x)

        prediction = self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        return prediction, tuple(features)

    def self_attentions(self) -> list[Attention]:
        """The self-attention layers in execution order: that of the features a call returns."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [
            attention.transformer_blocks[0].attn1
            for block in blocks
            for attention in block.attentions
        ]


def _check_kind(kind: str, side: str, known: tuple[str, ...]) -> None:
    if kind not in known:
        raise UserError(
            f"unet config.json: {side}_block_types has {kind!r}; supported: {', '.join(known)}"
        )
