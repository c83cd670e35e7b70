"""CLIP's text encoder (transformers' `CLIPTextModel`), which reads the captions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bootpig_jax.attention import attention
from bootpig_jax.kernels import PLAIN, Kernels
from bootpig_jax.models.blocks import layer_norm, linear
from bootpig_jax.models.config import pick


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation ``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The fields of a text encoder's `config.json` that its computation depends on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed `config.json`.

        Raises:
            UserError: a field is missing, or asks for what this encoder does not implement.
        """
        return pick(cls, config, "text_encoder", {"hidden_act": tuple(ACTIVATIONS)})


class SelfAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: TextEncoderConfig, *, kernels: Kernels, **kwargs: Any):
        self.heads = config.num_attention_heads
        self.kernels = kernels
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(config.hidden_size, config.hidden_size, **kwargs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Applies the layer."""
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, causal=True, kernels=self.kernels))


class MLP(nnx.Module):
    """The feed-forward layer."""

    def __init__(self, config: TextEncoderConfig, **kwargs: Any):
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = linear(config.hidden_size, config.intermediate_size, **kwargs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, **kwargs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Applies the layer."""
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention and feed-forward, each after a norm and with a residual."""

    def __init__(self, config: TextEncoderConfig, *, kernels: Kernels, **kwargs: Any):
        epsilon = config.layer_norm_eps
        self.layer_norm1 = layer_norm(config.hidden_size, epsilon, **kwargs)
        self.self_attn = SelfAttention(config, kernels=kernels, **kwargs)
        self.layer_norm2 = layer_norm(config.hidden_size, epsilon, **kwargs)
        self.mlp = MLP(config, **kwargs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Applies the layer."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nnx.Module):
    """Token ids to the features that the UNet's cross-attention reads.

    Args:
        config: the sizes.
        rngs: the source of the initial weights.
        dtype: the precision of the computation.
        param_dtype: the precision the parameters are kept in.
        kernels: how the device computes attention.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        kernels: Kernels = PLAIN,
    ):
        self.config = config
        kwargs: dict[str, Any] = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **kwargs)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, **kwargs
        )
        self.layers = nnx.List(
            [
                EncoderLayer(config, kernels=kernels, **kwargs)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kwargs)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """The last layer's output after the final norm (Stable Diffusion reads no pooled token)."""
        x = self.token_embedding(input_ids) + self.position_embedding(
            jnp.arange(input_ids.shape[1])
        )
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)
