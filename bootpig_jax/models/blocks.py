"""The layers that Stable Diffusion's UNet and VAE are made of. Pictures are NHWC.

Attribute names follow diffusers', so that a parameter's path here is its name there
(`checkpoints/diffusers.py` lists the few exceptions).
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from bootpig_jax.attention import (
    Strategy,
    attend_to_references,
    attend_to_shared_references,
    attention,
    reference_share,
)
from bootpig_jax.kernels import Kernels
from bootpig_jax.kernels.precision import product_precision

Padding = tuple[tuple[int, int], tuple[int, int]]


@struct.dataclass
class References:
    """What the Base UNet's self-attention layers attend to besides their own tokens.

    Attributes:
        features: one array for each self-attention layer, in execution order: the features of ``K``
            references, as `UNet` returns them.
        keep: which samples see their references; all when ``None``.
        key_scale: factor on the reference tokens that feed the keys (the release's is 1.1).
        strategy: how several references are pooled (Eq. 5-8 and Fig. 6).
    """

    features: tuple[Float[Array, "b K _n _d"], ...]
    keep: Bool[Array, " b"] | None = None
    key_scale: float = struct.field(pytree_node=False, default=1.0)
    strategy: Strategy = struct.field(pytree_node=False, default="softmax")

    def layer(self, index: int) -> "References":
        """The references as layer `index` sees them."""
        return self.replace(features=(self.features[index],))  # type: ignore[attr-defined]


@struct.dataclass
class SharedReferences:
    """`References` for sampling, where many rows of a batch see the same ones; has no gradient.

    Of the rows that a self-attention layer is given, the first `plain` come out without references
    and after them the last `seeing` with references, as many rows for each set and in the sets'
    order. A row can be both.

    Attributes:
        features: one array for each self-attention layer, of ``s`` sets of ``K`` references.
        key_scale: factor on the reference tokens that feed the keys.
        strategy: how several references are pooled.
        plain: how many rows come out without references.
        seeing: how many come out with them.
    """

    features: tuple[Float[Array, "s K _n _d"], ...]
    key_scale: Float[Array, ""] | float
    strategy: Strategy = struct.field(pytree_node=False)
    plain: int = struct.field(pytree_node=False)
    seeing: int = struct.field(pytree_node=False)

    def layer(self, index: int) -> "SharedReferences":
        """The references as layer `index` sees them."""
        return self.replace(features=(self.features[index],))  # type: ignore[attr-defined]


def linear(channels: int, out_channels: int, *, dtype: jnp.dtype, **kwargs: Any) -> nnx.Linear:
    """A linear layer; in float32 exact on every device."""
    precision = product_precision(dtype)
    return nnx.Linear(channels, out_channels, dtype=dtype, precision=precision, **kwargs)


def layer_norm(channels: int, epsilon: float = 1e-5, **kwargs: Any) -> nnx.LayerNorm:
    """A layer norm whose variance takes two passes, as PyTorch's does."""
    return nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, **kwargs)


def conv1x1(channels: int, out_channels: int, *, dtype: jnp.dtype, **kwargs: Any) -> nnx.Conv:
    """A linear layer on the channels of each position."""
    precision = product_precision(dtype)
    return nnx.Conv(channels, out_channels, (1, 1), dtype=dtype, precision=precision, **kwargs)


def conv3x3(
    channels: int,
    out_channels: int,
    *,
    strides: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
    dtype: jnp.dtype,
    **kwargs: Any,
) -> nnx.Conv:
    """A 3x3 convolution with PyTorch's explicit padding (``SAME`` pads strided ones otherwise)."""
    return nnx.Conv(
        channels,
        out_channels,
        (3, 3),
        strides=(strides, strides),
        padding=padding,
        dtype=dtype,
        precision=product_precision(dtype),
        **kwargs,
    )


class GroupNorm(nnx.Module):
    """Group normalisation over positions and the channels of a group.

    Sums run over the positions first and over a group's channels second, so the channels stay in
    the innermost dimension; `nnx.GroupNorm` splits them.
    The variance is taken in two passes and in float32, as PyTorch does.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        epsilon: float,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        del rngs  # nothing here is random
        self.groups = groups
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises, scales and shifts."""
        x = x.astype(jnp.float32)
        centred = x - self._group_mean(x)
        variance = self._group_mean(jnp.square(centred))
        scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return (centred * scale + self.bias[...]).astype(self.dtype)

    def _group_mean(self, x: Array) -> Array:
        b, _, _, c = x.shape
        means = x.mean((1, 2)).reshape(b, self.groups, -1).mean(-1)
        return jnp.repeat(means, c // self.groups, axis=-1)[:, None, None]


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, with a residual; the time embedding is added in between."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        time_channels: int | None = None,
        **kwargs: Any,
    ):
        self.norm1 = GroupNorm(channels, groups, epsilon, **kwargs)
        self.conv1 = conv3x3(channels, out_channels, **kwargs)
        if time_channels is not None:
            self.time_emb_proj = linear(time_channels, out_channels, **kwargs)
        self.norm2 = GroupNorm(out_channels, groups, epsilon, **kwargs)
        self.conv2 = conv3x3(out_channels, out_channels, **kwargs)
        if channels != out_channels:
            self.conv_shortcut = conv1x1(channels, out_channels, **kwargs)

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w d"]:
        """Applies the block; `time` is the embedded timestep, before its SiLU."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        return shortcut + h


class Downsample(nnx.Module):
    """Halves the resolution with a strided convolution. The UNet pads (1, 1), the VAE (0, 1)."""

    def __init__(self, channels: int, padding: tuple[int, int], **kwargs: Any):
        self.conv = conv3x3(channels, channels, strides=2, padding=(padding, padding), **kwargs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Applies the convolution."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, **kwargs: Any):
        self.conv = conv3x3(channels, channels, **kwargs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Applies both."""
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return self.conv(x.reshape(b, 2 * h, 2 * w, c))


class Attention(nnx.Module):
    """Attention with heads. What it is given decides its role.

    ``attention(x)`` is self-attention (Eq. 2), ``attention(x, context=text)`` cross-attention and
    ``attention(x, references=r)`` Reference Self-Attention (Eq. 3, 5-8).
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        *,
        kernels: Kernels,
        bias: bool = False,
        **kwargs: Any,
    ):
        self.heads = heads
        self.kernels = kernels
        self.to_q = linear(channels, channels, use_bias=bias, **kwargs)
        self.to_k = linear(context_channels, channels, use_bias=bias, **kwargs)
        self.to_v = linear(context_channels, channels, use_bias=bias, **kwargs)
        self.to_out = linear(channels, channels, **kwargs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m e"] | None = None,
        references: References | SharedReferences | None = None,
    ) -> Float[Array, "p n c"]:
        """Attends from `x` to itself, to `context`, or to itself and one layer's `references`.

        The output has the rows of `x`, but with `SharedReferences` those that they ask for.
        """
        source = x if context is None else context
        q, k, v = (
            self._split_heads(y) for y in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        if references is None:
            return self.to_out(attention(q, k, v, kernels=self.kernels))
        (f_ref,) = references.features
        scaled = (references.key_scale * f_ref).astype(f_ref.dtype)
        k_refs, v_refs = self._split_heads(self.to_k(scaled)), self._split_heads(self.to_v(f_ref))
        attended = (q, k, v, k_refs, v_refs, self.to_out, references.strategy)
        if isinstance(references, References):
            return attend_to_references(*attended, references.keep, kernels=self.kernels)
        return attend_to_shared_references(
            *attended, plain=references.plain, seeing=references.seeing, kernels=self.kernels
        )

    def reference_share(
        self, f: Float[Array, "b n c"], f_ref: Float[Array, "b m c"], key_scale: float
    ) -> Float[Array, " b"]:
        """How much of its attention goes to one reference; see `attention.reference_share`."""
        q, k, k_ref = (
            self._split_heads(x) for x in (self.to_q(f), self.to_k(f), self.to_k(key_scale * f_ref))
        )
        return reference_share(q, k, k_ref)

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


class FeedForward(nnx.Module):
    """The gated feed-forward layer (GEGLU) of a transformer block."""

    def __init__(self, channels: int, **kwargs: Any):
        self.gate = linear(channels, 8 * channels, **kwargs)
        self.out = linear(4 * channels, channels, **kwargs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """Applies the layer."""
        value, gate = jnp.split(self.gate(x), 2, axis=-1)
        return self.out(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Self-attention (`attn1`), cross-attention to the text (`attn2`) and a feed-forward layer."""

    def __init__(
        self, channels: int, text_channels: int, heads: int, *, kernels: Kernels, **kwargs: Any
    ):
        self.norm1 = layer_norm(channels, **kwargs)
        self.attn1 = Attention(channels, channels, heads, kernels=kernels, **kwargs)
        self.norm2 = layer_norm(channels, **kwargs)
        self.attn2 = Attention(channels, text_channels, heads, kernels=kernels, **kwargs)
        self.norm3 = layer_norm(channels, **kwargs)
        self.ff = FeedForward(channels, **kwargs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        text: Float[Array, "r l e"],
        references: References | SharedReferences | None = None,
        rows: Int[np.ndarray, " r"] | None = None,
    ) -> tuple[Float[Array, "r n c"], Float[Array, "b n c"]]:
        """Returns the block's output and the feature ``f`` that entered its self-attention.

        With `rows` this is where samples part into rows; see `UNet`.
        """
        f = self.norm1(x)
        attended = self.attn1(f, references=references)
        if rows is not None:
            # Of each sample there is one row, but two outputs where only some rows see references.
            with_references = np.arange(len(rows)) >= len(attended) - len(x)
            x, attended = x[rows], attended[rows + with_references * (len(attended) - len(x))]
        x = x + attended
        x = x + self.attn2(self.norm2(x), context=text)
        return x + self.ff(self.norm3(x)), f


class SpatialTransformer(nnx.Module):
    """A transformer block over the positions of a feature map, with a residual."""

    def __init__(
        self,
        channels: int,
        text_channels: int,
        heads: int,
        *,
        groups: int,
        linear_projection: bool,
        kernels: Kernels,
        **kwargs: Any,
    ):
        def projection() -> nnx.Module:
            if linear_projection:
                return linear(channels, channels, **kwargs)
            return conv1x1(channels, channels, **kwargs)

        self.norm = GroupNorm(channels, groups, 1e-6, **kwargs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, text_channels, heads, kernels=kernels, **kwargs)]
        )
        self.proj_out = projection()

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: Float[Array, "r l e"],
        references: References | SharedReferences | None = None,
        rows: Int[np.ndarray, " r"] | None = None,
    ) -> tuple[Float[Array, "r h w c"], Float[Array, "b n c"]]:
        """Returns the output and the feature ``f`` that entered the self-attention.

        With `rows` this is where samples part into rows; see `UNet`.
        """
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        tokens, f = self.transformer_blocks[0](tokens, text, references, rows)
        x = x if rows is None else x[rows]
        return x + cast(Any, self.proj_out)(tokens.reshape(-1, h, w, c)), f
