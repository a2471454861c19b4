"""One number for each example, as many as come: what a preparation holds of ten million of them."""

from array import array
from typing import Any

import numpy as np
import numpy.typing as npt


class Column:
    """Grows in place: lists of small arrays tear the heap to pieces, and joining them takes their room once more."""

    def __init__(self, kind: type[np.generic]) -> None:
        self._kind = np.dtype(kind)
        self._bytes = array("B")

    def add(self, values: npt.NDArray[Any]) -> None:
        """Append `values` [n]. Raises BufferError while what `values` returned is held."""
        self._bytes.frombytes(np.ascontiguousarray(values, dtype=self._kind).data.cast("B"))

    def values(self) -> npt.NDArray[Any]:
        """[all] What was added, without a copy."""
        return np.frombuffer(self._bytes, dtype=self._kind)
