"""Weights that stay in their file until somebody reads them.

A weight goes from the file to a device once, in the precision that it is kept in there: neither the
whole model nor a whole file is ever in the host's memory.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from bootpig_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
"""What safetensors calls the types that are found in a model's files."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Stands for an array: its shape, its precision, and where its values are.

    Attributes:
        values: as a rule memory-mapped, in the file's precision.
        dtype: the precision that they are wanted in.
    """

    values: np.ndarray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Like an array's."""
        return self.values.shape

    @property
    def size(self) -> int:
        """Like an array's."""
        return self.values.size

    def astype(self, dtype: jnp.dtype) -> Self:
        """The same values, wanted in another precision; nothing is read."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def copy(self) -> Self:
        """The same object: whoever reads it gets an array of their own."""
        return self

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a part, or with `...` everything."""
        return np.array(self.values[index], self.dtype, order="C")


def read_weights(network: nnx.Module) -> Any:
    """Brings a network of `Stored` parameters to the default device, one after the other."""
    graph, state = nnx.split(network)
    return nnx.merge(graph, jax.tree.map(lambda stored: jnp.asarray(stored[...]), state))


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Maps a file's tensors into memory.

    Raises:
        UserError: the file is missing, damaged or cut short.
    """
    try:
        # It checks the table of contents, and that the file is as long as that says.
        with safe_open(path, framework="numpy"):
            pass
        content = np.memmap(path, np.uint8, "r")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}; fetch it again") from None
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    table = json.loads(content[8:start].tobytes())
    tensors = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of the type {entry['dtype']}, which no weight has")
        first, end = entry["data_offsets"]
        values = content[start + first : start + end].view(np.ndarray)
        tensors[name] = values.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors
