"""Types of NumPy arrays, by what they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Seconds = Floats
Tokens = NDArray[Any]
"""Ids of tokens, in the integer type of their shard or tokenizer."""
