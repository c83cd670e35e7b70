"""Counts the floating point operations of a program: 2 for each multiply-add.

Only matrix products and convolutions are counted, as is customary; everything else is a few
percent. The count is of what the program says, before any compiler: the same on every device.
"""

import math
from typing import Any

import jax


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
    return sum(count_flops(inner) for inner in _inner(equation.params))


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
