"""What a TPU runs, compiled by its own compiler: `make test-tpu`.

Not collected by itself: `libtpu` lies in a folder of its own, for the reason that the Makefile
states. No TPU is needed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from bootpig_jax.config import MeshConfig
from bootpig_jax.errors import UserError
from bootpig_jax.kernels import SPLASH, kernels_for
from bootpig_jax.models.blocks import References, TransformerBlock
from bootpig_jax.models.shapes import OneKey
from bootpig_jax.training.accelerators import ACCELERATORS, pretend
from bootpig_jax.training.flops import peak_flops
from bootpig_jax.training.plan import compile_to_fit
from bootpig_jax.training.sharding import AXES, BATCH, make_mesh

TPUS = [name for name, accelerator in ACCELERATORS.items() if accelerator.axes]
HALF = jnp.bfloat16


@functools.cache
def devices(name: str, count: int) -> list[jax.Device]:
    there, kernels = pretend(name, count)
    assert kernels is None and kernels_for(there[0]) is SPLASH
    return there


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("name", TPUS)
def test_slices_have_the_chips_that_were_asked_for(name: str, count: int) -> None:
    there = devices(name, count)
    assert len(there) == count
    assert {device.device_kind for device in there} == {ACCELERATORS[name].kind}
    assert peak_flops(there[0].device_kind) == ACCELERATORS[name].peak
    make_mesh(MeshConfig(data=1, fsdp=-1), there)


@pytest.mark.parametrize("name", TPUS)
def test_what_does_not_fit_is_said_with_the_memory_that_there_is(name: str) -> None:
    """The memory in our table is what the compiler gives a program."""
    rows = shapes(name, (100 * 2**18, 1024), dtype=jnp.float32)
    lowered = jax.jit(lambda x: jnp.sort(x, axis=0) + jnp.sort(2 * x, axis=0)).lower(*rows)
    with pytest.raises(UserError, match=f"does not fit.*{ACCELERATORS[name].memory:.2f}G"):
        compile_to_fit(lowered, {})


def shapes(name: str, *sizes: tuple[int, ...], dtype: Any = HALF) -> list[jax.ShapeDtypeStruct]:
    sharding = SingleDeviceSharding(devices(name, 1)[0])
    return [jax.ShapeDtypeStruct(size, dtype, sharding=sharding) for size in sizes]


def kernels_in(program: Any, *arguments: Any) -> int:
    return jax.jit(program).lower(*arguments).compile().as_text().count("tpu_custom_call")


def compile_attention(name: str, queries: int, keys: int, width: int, masked: bool) -> None:
    q, k = shapes(name, (2, queries, 5, width), (2, keys, 5, width))
    lengths = shapes(name, (2,), dtype=jnp.int32) if masked else []

    def gradient(q: Any, k: Any, v: Any, *lengths: Any) -> Any:
        attended = lambda *x: SPLASH.attend(*x, *lengths).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(attended, (0, 1, 2))(q, k, v)

    assert kernels_in(gradient, q, k, k, *lengths) == 3
    assert kernels_in(SPLASH.attend_with_lse, q, k, k) == 1


@pytest.mark.parametrize(("queries", "keys", "width"), [(64, 77, 64), (4096, 8192, 160)])
def test_the_smallest_and_the_largest_attention_compile(
    queries: int, keys: int, width: int
) -> None:
    """With their gradients. The largest with dropped references: its blocks fill VMEM most."""
    compile_attention("v5e", queries, keys, width, masked=keys > queries)


@pytest.mark.long
@pytest.mark.parametrize("width", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("queries", [4096, 1024, 256, 64])
@pytest.mark.parametrize("name", TPUS)
def test_attention_of_every_size_compiles(name: str, queries: int, width: int) -> None:
    """To the references, with and without dropped ones, and to the text: the blocks fit VMEM."""
    compile_attention(name, queries, 2 * queries, width, False)
    compile_attention(name, queries, 2 * queries, width, True)
    compile_attention(name, queries, 77, width, False)


def test_a_transformer_block_compiles_for_four_devices_with_its_gradients() -> None:
    """As in the training step: inside `shard_map`, a reference for each sample, some dropped."""
    mesh = make_mesh(MeshConfig(), devices("v5e", 4))
    tokens, channels, words = 64, 320, (77, 1024)

    def make() -> TransformerBlock:
        how = {"rngs": OneKey(0), "dtype": HALF, "param_dtype": jnp.float32}
        return TransformerBlock(channels, words[1], channels // 64, kernels=SPLASH, **how)

    graph, weights = nnx.split(nnx.eval_shape(make))

    def gradients(weights: Any, x: Any, text: Any, reference: Any, keep: Any) -> Any:
        def loss(weights: Any, x: Any, reference: Any) -> Any:
            references = References((reference,), keep=keep).layer(0)
            out, _ = nnx.merge(graph, weights)(x, text, references)
            return jnp.square(out.astype(jnp.float32)).mean()

        of_weights, *others = jax.grad(loss, (0, 1, 2))(weights, x, reference)
        return jax.lax.pmean(of_weights, AXES), *others

    def shape(spec: P, dtype: Any, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

    program = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P(), BATCH, BATCH, BATCH, BATCH),
        out_specs=(P(), BATCH, BATCH),
        check_vma=False,
    )
    arguments = [
        jax.tree.map(lambda leaf: shape(P(), leaf.dtype, *leaf.shape), weights),
        shape(BATCH, HALF, 4, tokens, channels),
        shape(BATCH, HALF, 4, *words),
        shape(BATCH, HALF, 4, 1, tokens, channels),
        shape(BATCH, jnp.bool_, 4),
    ]
    # Two attentions, each forward and in two parts backward.
    assert kernels_in(program, *arguments) == 6
