"""Stable Diffusion's autoencoder (diffusers' `AutoencoderKL`): pictures to latents and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bootpig_jax.kernels import PLAIN, Kernels
from bootpig_jax.models.blocks import (
    Attention,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    conv1x1,
    conv3x3,
)
from bootpig_jax.models.config import pick

EPSILON = 1e-6  # of every group norm in it


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of a VAE's `config.json` that its computation depends on."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int = 1
    latent_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed `config.json`.

        Raises:
            UserError: a field is missing, or asks for what this VAE does not implement.
        """
        levels = len(config.get("block_out_channels", ()))
        return pick(
            cls,
            config,
            "vae",
            {
                "act_fn": ("silu",),
                "down_block_types": (["DownEncoderBlock2D"] * levels,),
                "up_block_types": (["UpDecoderBlock2D"] * levels,),
                "latents_mean": (None,),
                "latents_std": (None,),
                "mid_block_add_attention": (True,),
                "shift_factor": (None,),
                "use_post_quant_conv": (True,),
                "use_quant_conv": (True,),
            },
        )

    @property
    def downsampling(self) -> int:
        """How many pixels a latent is wide."""
        return 2 ** (len(self.block_out_channels) - 1)


class VAEAttention(nnx.Module):
    """Self-attention with one head over the positions of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int, *, kernels: Kernels, **kwargs: Any):
        self.group_norm = GroupNorm(channels, groups, EPSILON, **kwargs)
        self.attention = Attention(channels, channels, 1, kernels=kernels, bias=True, **kwargs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the layer."""
        return x + self.attention(self.group_norm(x).reshape(len(x), -1, x.shape[-1])).reshape(
            x.shape
        )


class VAEBlock(nnx.Module):
    """One resolution of the encoder or decoder, or the middle: only a container."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[VAEAttention] | None = None,
        downsamplers: list[Downsample] | None = None,
        upsamplers: list[Upsample] | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions or [])
        self.downsamplers = nnx.List(downsamplers or [])
        self.upsamplers = nnx.List(upsamplers or [])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Resnets, with attention between the first two where there is one, then the resampler."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        for resnet in self.resnets[1:]:
            x = resnet(x)
        for resample in [*self.downsamplers, *self.upsamplers]:
            x = resample(x)
        return x


def _middle(channels: int, groups: int, *, kernels: Kernels, **kwargs: Any) -> VAEBlock:
    resnets = [
        ResnetBlock(channels, channels, groups=groups, epsilon=EPSILON, **kwargs) for _ in range(2)
    ]
    attention = VAEAttention(channels, groups, kernels=kernels, **kwargs)
    return VAEBlock(resnets, attentions=[attention])


def _resnets(
    count: int, channels: int, out_channels: int, groups: int, **kwargs: Any
) -> list[ResnetBlock]:
    return [
        ResnetBlock(
            channels if i == 0 else out_channels,
            out_channels,
            groups=groups,
            epsilon=EPSILON,
            **kwargs,
        )
        for i in range(count)
    ]


class Encoder(nnx.Module):
    """Picture to the moments of its latents."""

    def __init__(self, config: VAEConfig, *, kernels: Kernels, **kwargs: Any):
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv3x3(config.in_channels, channels[0], **kwargs)
        current = channels[0]
        down_blocks: list[VAEBlock] = []
        for c in channels:
            resnets = _resnets(config.layers_per_block, current, c, groups, **kwargs)
            last = len(down_blocks) == len(channels) - 1
            downsamplers = [] if last else [Downsample(c, (0, 1), **kwargs)]
            down_blocks.append(VAEBlock(resnets, downsamplers=downsamplers))
            current = c
        self.down_blocks = nnx.List(down_blocks)
        self.mid_block = _middle(current, groups, kernels=kernels, **kwargs)
        self.conv_norm_out = GroupNorm(current, groups, EPSILON, **kwargs)
        self.conv_out = conv3x3(current, 2 * config.latent_channels, **kwargs)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        """Applies the encoder."""
        x = self.conv_in(x)
        for block in [*self.down_blocks, self.mid_block]:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents to a picture."""

    def __init__(self, config: VAEConfig, *, kernels: Kernels, **kwargs: Any):
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv3x3(config.latent_channels, channels[0], **kwargs)
        self.mid_block = _middle(channels[0], groups, kernels=kernels, **kwargs)
        current = channels[0]
        up_blocks: list[VAEBlock] = []
        for c in channels:
            resnets = _resnets(config.layers_per_block + 1, current, c, groups, **kwargs)
            last = len(up_blocks) == len(channels) - 1
            up_blocks.append(VAEBlock(resnets, upsamplers=[] if last else [Upsample(c, **kwargs)]))
            current = c
        self.up_blocks = nnx.List(up_blocks)
        self.conv_norm_out = GroupNorm(current, groups, EPSILON, **kwargs)
        self.conv_out = conv3x3(current, config.out_channels, **kwargs)

    def __call__(self, z: Float[Array, "b h w l"]) -> Float[Array, "b H W c"]:
        """Applies the decoder."""
        x = self.conv_in(z)
        for block in [self.mid_block, *self.up_blocks]:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """The autoencoder.

    Args:
        config: the sizes.
        rngs: the source of the initial weights.
        dtype: the precision of the computation.
        param_dtype: the precision the parameters are kept in.
        kernels: how the device computes attention.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        kernels: Kernels = PLAIN,
    ):
        self.config = config
        kwargs: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        latents = config.latent_channels
        self.encoder = Encoder(config, kernels=kernels, **kwargs)
        self.decoder = Decoder(config, kernels=kernels, **kwargs)
        self.quant_conv = conv1x1(2 * latents, 2 * latents, **kwargs)
        self.post_quant_conv = conv1x1(latents, latents, **kwargs)

    def encode(
        self, images: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w l"], Float[Array, "b h w l"]]:
        """The mean and log-variance of each picture's latents, not yet scaled.

        Args:
            images: in [-1, 1]; height and width divisible by `config.downsampling`.
        """
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b H W c"]:
        """The pictures of unscaled latents, in [-1, 1] up to the network's error."""
        return self.decoder(self.post_quant_conv(latents))

    def sample_latents(
        self,
        mean: Float[Array, "b h w l"],
        log_variance: Float[Array, "b h w l"],
        noise: Float[Array, "b h w l"],
    ) -> Float[Array, "b h w l"]:
        """Draws latents from their moments and scales them: what the UNet is trained on."""
        return self.config.scaling_factor * (mean + jnp.exp(0.5 * log_variance) * noise)

    def decode_latents(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b H W c"]:
        """The pictures of the UNet's (scaled) latents, clipped to [-1, 1]."""
        return jnp.clip(self.decode(latents / self.config.scaling_factor), -1.0, 1.0)
