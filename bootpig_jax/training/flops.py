"""Counts the floating point operations of a program: 2 for each multiply-add.

Only matrix products and convolutions are counted, as is customary; everything else is a few
percent. The count is of what the program says, before any compiler. Attention counts as the two
products of its forward pass and the four of its backward pass, without what that computes again, on
every device. What pads a kernel's operands is counted with them.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from bootpig_jax.kernels.plain import SCORES_AGAIN

# Dense bfloat16 matrix multiplication, FLOP/s, from the makers' data sheets (figures "with
# sparsity" halved). The names are how JAX's `device_kind` begins; a longer one goes first.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the FLOP/s that a device's maker states; None for devices that are not in `PEAKS`."""
    return next((peak for name, peak in PEAKS.items() if device_kind.startswith(name)), None)


def count_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of a (closed) jaxpr, loops multiplied out, over all devices together."""
    return sum(times * _of_equation(equation) for equation, times in equations(jaxpr))


def equations(jaxpr: Any) -> Iterator[tuple[Any, int]]:
    """Walks through a (closed) jaxpr, whatever is called included.

    Yields:
      Each equation, those that call others too, and how often it is executed, over all devices
      together. Kernels' bodies are not walked through, and of a conditional the branch with the
      most FLOPs is. What `kernels.plain` computes again in its backward pass is left out: it is no
      work that was asked for, and fused kernels hide theirs.
    """
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        params, times = equation.params, 1
        match equation.primitive.name:
            case "pallas_call":
                bodies: list[Any] = []
            case "jit" | "pjit" if params["name"] == SCORES_AGAIN:
                continue
            case "scan":
                bodies, times = [params["jaxpr"]], params["length"]
            case "while":
                raise ValueError("a loop without a known length cannot be counted")
            case "cond":
                bodies = [max(params["branches"], key=count_flops)]
            case "shard_map":  # Its body is what one device does.
                bodies, times = [params["jaxpr"]], params["mesh"].size
            case _:
                bodies = _inner(params)
        yield equation, 1
        for body in bodies:
            yield from ((inner, times * count) for inner, count in equations(body))


def _of_equation(equation: Any) -> float:
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            products = math.prod(left[axis] for axis in contracted)
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * products
        case "conv_general_dilated":
            return _of_convolution(equation)
        case "dot_product_attention_fwd_wrapper":
            return 2 * _of_scores(equation)
        case "dot_product_attention_bwd_wrapper":
            return 4 * _of_scores(equation)
        case "pallas_call":
            return _products_of_splash(equation.params["name"]) * _of_scores(equation, axis=2)
    return 0.0


def _of_scores(equation: Any, axis: int = 1) -> float:
    """The product of queries [b, n, h, d] and keys [b, m, h, d]; `axis` is where m stands.

    They are the first two operands of that rank.
    """
    shapes = [operand.aval.shape for operand in equation.invars]
    queries, keys = [shape for shape in shapes if len(shape) == 4][:2]
    return 2.0 * math.prod(queries) * keys[axis]


def _products_of_splash(name: str) -> int:
    """How many products of the size of the scores a kernel of splash attention is asked for.

    Both its backward kernels compute the weights' gradient; it counts in one of them.
    """
    for phase, products in (("_fwd", 2), ("_dkv", 3), ("_dq", 1)):
        if name.startswith(f"splash_mha{phase}"):
            return products
    raise ValueError(f"the FLOPs of the kernel {name} are not known")


def _of_convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    out_axis = numbers.rhs_spec[0]
    per_output = math.prod(size for axis, size in enumerate(kernel) if axis != out_axis)
    # Between a dilated input's values lie zeros, which no implementation multiplies.
    zeros = math.prod(equation.params["lhs_dilation"])
    outputs = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * outputs * per_output / zeros / equation.params["batch_group_count"]


def _inner(parameters: Any) -> list[Any]:
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [leaf for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
