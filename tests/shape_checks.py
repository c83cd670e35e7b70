"""The run-time checker that the jaxtyping import hook applies to the package.

It looks at arrays only: shapes and dtypes are what mypy cannot see.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets beartype check the arguments and results that mention an array's shape."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if _mentions_array(hint)
    }
    return beartype(function)


def _mentions_array(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_mentions_array(argument) for argument in get_args(hint))
