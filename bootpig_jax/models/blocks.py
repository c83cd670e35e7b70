"""The layers that Stable Diffusion's UNet and VAE are made of. Pictures are NHWC.

Attribute names follow diffusers', so that a parameter's path here is its name there
(`checkpoints/diffusers.py` lists the few exceptions).
"""

import math
from collections.abc import Sequence
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

Padding = tuple[tuple[int, int], tuple[int, int]]

# How many tokens a feed-forward layer takes at once on a CPU.
TOKEN_BLOCK = 1024


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


def conv3x3(
    channels: int,
    out_channels: int,
    *,
    strides: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
    **kwargs: Any,
) -> nnx.Conv:
    """A 3x3 convolution with PyTorch's explicit padding (``SAME`` pads strided ones otherwise)."""
    return nnx.Conv(
        channels,
        out_channels,
        (3, 3),
        strides=(strides, strides),
        padding=padding,
        conv_general_dilated=_convolve,
        **kwargs,
    )


def _convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **kwargs: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, with a cheaper gradient where XLA's CPU code is slow.

    It transposes the kernel for the gradient by `x`, which takes longer than the rest of the
    convolution where there are many channels and few positions.
    """

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    if (
        jax.default_backend() != "cpu"
        or tuple(strides) != (1, 1)
        or tuple(padding) != ((1, 1), (1, 1))
        or 4 * math.prod(x.shape[:-1]) > kernel.shape[-1]
    ):
        return plain(x, kernel)

    convolve = jax.custom_vjp(plain)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(x, kernel), (x, kernel)

    def backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, kernel = saved
        by_kernel = jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)
        # What each output gives back to the nine inputs that it was made of, and where they lie.
        taps = jnp.einsum("ijco,bhwo->ijcbhw", kernel, dy)
        taps = jnp.pad(taps, ((0, 0), (0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
        _, h, w, _ = x.shape
        dx = sum(
            taps[i, j, :, :, 2 - i : 2 - i + h, 2 - j : 2 - j + w]
            for i in range(3)
            for j in range(3)
        )
        return jnp.transpose(dx, (1, 2, 3, 0)), *by_kernel(dy)

    convolve.defvjp(forward, backward)
    return convolve(x, kernel)


class Linear(nnx.Linear):
    """A linear layer on tokens, with one axis of them.

    With two, batch and position, XLA's CPU code for the weights' gradients takes up to 1.8 times
    as long.
    """

    def __call__(self, inputs: Float[Array, "*b c"], out_sharding: Any = None) -> Array:
        """Applies the layer to each token."""
        tokens = inputs.reshape(-1, self.in_features)
        out = super().__call__(tokens, out_sharding=out_sharding)
        return out.reshape(*inputs.shape[:-1], self.out_features)


class GroupNorm(nnx.Module):
    """Group normalisation over positions and the channels of a group.

    Sums run over the positions first and over a group's channels second, so the channels stay in
    the innermost dimension: on a CPU three times as fast as `nnx.GroupNorm`, which splits them.
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
            self.time_emb_proj = nnx.Linear(time_channels, out_channels, **kwargs)
        self.norm2 = GroupNorm(out_channels, groups, epsilon, **kwargs)
        self.conv2 = conv3x3(out_channels, out_channels, **kwargs)
        if channels != out_channels:
            self.conv_shortcut = nnx.Conv(channels, out_channels, (1, 1), **kwargs)

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
        bias: bool = False,
        **kwargs: Any,
    ):
        self.heads = heads
        self.to_q = Linear(channels, channels, use_bias=bias, **kwargs)
        self.to_k = Linear(context_channels, channels, use_bias=bias, **kwargs)
        self.to_v = Linear(context_channels, channels, use_bias=bias, **kwargs)
        self.to_out = Linear(channels, channels, **kwargs)

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
            return self.to_out(attention(q, k, v))
        (f_ref,) = references.features
        scaled = (references.key_scale * f_ref).astype(f_ref.dtype)
        k_refs, v_refs = self._split_heads(self.to_k(scaled)), self._split_heads(self.to_v(f_ref))
        attended = (q, k, v, k_refs, v_refs, self.to_out, references.strategy)
        if isinstance(references, References):
            return attend_to_references(*attended, references.keep)
        return attend_to_shared_references(
            *attended, plain=references.plain, seeing=references.seeing
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
    """The gated feed-forward layer (GEGLU) of a transformer block.

    What is between its two products is eight times as wide as the tokens. On a CPU it goes block by
    block of tokens, so that this stays in the cache: 1.25 to 1.5 times as fast where pictures have
    4096 tokens of 320 channels. Where there is a gradient the layer stays whole, as in blocks the
    gradient takes up to three times as long.
    """

    def __init__(self, channels: int, **kwargs: Any):
        self.gate = Linear(channels, 8 * channels, **kwargs)
        self.out = Linear(4 * channels, channels, **kwargs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Applies the layer."""
        blocks, rest = divmod(x.size // x.shape[-1], TOKEN_BLOCK)
        if jax.default_backend() != "cpu" or blocks < 2 or rest:
            return self._transform(x)
        graph, weights = nnx.split(self)

        def whole(weights: nnx.State, x: Array) -> Array:
            return nnx.merge(graph, weights)._transform(x)

        @jax.custom_vjp
        def blocked(weights: nnx.State, x: Array) -> Array:
            cut = x.reshape(blocks, TOKEN_BLOCK, -1)
            return jax.lax.map(lambda x: whole(weights, x), cut).reshape(x.shape)

        blocked.defvjp(
            lambda weights, x: jax.vjp(whole, weights, x), lambda pull_back, dy: pull_back(dy)
        )
        return blocked(weights, x)

    def _transform(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        value, gate = jnp.split(self.gate(x), 2, axis=-1)
        return self.out(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Self-attention (`attn1`), cross-attention to the text (`attn2`) and a feed-forward layer."""

    def __init__(self, channels: int, text_channels: int, heads: int, **kwargs: Any):
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, **kwargs)
        self.attn1 = Attention(channels, channels, heads, **kwargs)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, **kwargs)
        self.attn2 = Attention(channels, text_channels, heads, **kwargs)
        self.norm3 = nnx.LayerNorm(channels, epsilon=1e-5, **kwargs)
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
        **kwargs: Any,
    ):
        def projection() -> nnx.Module:
            if linear_projection:
                return Linear(channels, channels, **kwargs)
            return nnx.Conv(channels, channels, (1, 1), **kwargs)

        self.norm = GroupNorm(channels, groups, 1e-6, **kwargs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, text_channels, heads, **kwargs)]
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
