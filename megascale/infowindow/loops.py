"""The loops of the compiled coder as machine code, by numba, which keeps it between processes.

Only `walk` imports this, where it codes: numba takes a while to load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Loop = TypeVar("Loop", bound=Callable[..., Any])


def _compiled(loop: Loop) -> Loop:
    compiled: Any
    try:
        compiled = njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # neither beside this file nor at home may anything be written
        compiled = njit(nogil=True)(loop)
    return cast(Loop, compiled)


@_compiled
def arrange(families: NDArray[Any], bytes_: NDArray[Any], taken: NDArray[Any]) -> NDArray[Any]:
    """A base for each family, the first that is its own and whose places are free."""
    bases = np.empty(len(families), dtype=np.int64)
    used = np.zeros(len(taken), dtype=np.bool_)
    lowest = 0
    for family in range(len(families)):
        first, count = families[family]
        while taken[lowest]:
            lowest += 1
        base = max(0, lowest - bytes_[first])
        while True:
            fits = not used[base]
            for i in range(first, first + count):
                if not fits or taken[base + bytes_[i]]:
                    fits = False
                    break
            if fits:
                break
            base += 1
        used[base] = True
        bases[family] = base
        for i in range(first, first + count):
            taken[base + bytes_[i]] = True
    return bases


@_compiled
def walk(
    text: NDArray[Any], entries: NDArray[Any], codes: NDArray[Any], out: NDArray[Any], is_end: bool
) -> tuple[int, int]:
    """Windows of a text into `out`; how many, and the bytes they hold. The root's base is 0."""
    count, begin = 0, 0
    place = base = np.int64(0)
    for i in range(len(text)):
        byte = np.int64(text[i])
        entry = entries[base + byte]
        if entry & 511 != byte:
            out[count] = codes[place]
            count += 1
            begin = i
            base = np.int64(0)
            entry = entries[byte]
        place = base + byte
        base = np.int64(entry >> 9)
    if is_end and len(text) > 0:
        out[count] = codes[place]
        count += 1
        begin = len(text)
    return count, begin


def _copy_block(typing: Any, out: Any, end: Any, line: Any, place: Any) -> Any:
    """Sixteen bytes from a place in one array of bytes to any in another, by one load and store."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.VectorType(ir.IntType(8), 16).as_pointer()
        out, end, line, place = values
        begins = [
            builder.bitcast(
                builder.gep(context.make_array(array)(context, builder, value).data, [index]), kind
            )
            for array, value, index in (
                (signature.args[0], out, end),
                (signature.args[2], line, place),
            )
        ]
        builder.store(builder.load(begins[1], align=1), begins[0], align=1)
        return context.get_dummy_value()

    return types.void(out, types.uint64, line, types.uint64), build


copy_block: Any = intrinsic(_copy_block)
"""(out, end, line, place) -> None; the indices are uint64."""


@_compiled
def unfold(
    codes: NDArray[Any], begins: NDArray[Any], lengths: NDArray[Any], line: NDArray[Any]
) -> NDArray[Any]:
    """Strings of codes, each in blocks of 16 bytes; the next one writes over what is too much."""
    size = np.uint64(0)
    for code in codes:
        if 0 <= code < len(begins):
            size += np.uint64(lengths[np.uint64(code)])
    out = np.empty(size + np.uint64(16), np.uint8)
    end = np.uint64(0)
    for code in codes:
        if 0 <= code < len(begins):
            place, begin = np.uint64(begins[np.uint64(code)]), end
            end += np.uint64(lengths[np.uint64(code)])
            while True:
                copy_block(out, begin, line, place)
                begin += np.uint64(16)
                place += np.uint64(16)
                if begin >= end:
                    break
    return out[:size]
