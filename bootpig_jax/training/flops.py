"""Counts the floating point operations of a program: 2 for each multiply-add.

Only matrix products and convolutions are counted, as is customary; everything else is a few
percent. The count is of what the program says, before any compiler. cuDNN's attention counts as the
two products of its forward pass and the four of its backward pass, without what that computes
again.
"""

import math
from typing import Any

import jax

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
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            products = math.prod(left[axis] for axis in contracted)
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * products
        case "conv_general_dilated":
            return _of_convolution(equation)
        case "scan":
            return equation.params["length"] * count_flops(equation.params["jaxpr"])
        case "while":
            raise ValueError("a loop without a known length cannot be counted")
        case "cond":
            return max(count_flops(branch) for branch in equation.params["branches"])
        case "shard_map":
            # Its body is what one device does.
            return equation.params["mesh"].size * count_flops(equation.params["jaxpr"])
        case "dot_product_attention_fwd_wrapper":
            return 2 * _of_scores(equation)
        case "dot_product_attention_bwd_wrapper":
            return 4 * _of_scores(equation)
    return sum(count_flops(inner) for inner in _inner(equation.params))


def _of_scores(equation: Any) -> float:
    """The product of queries [b, n, h, d] and keys [b, m, h, d]."""
    queries, keys = (operand.aval.shape for operand in equation.invars[:2])
    return 2.0 * math.prod(queries) * keys[1]


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
