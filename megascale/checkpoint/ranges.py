"""A range of a flattened tensor as boxes of the tensor. No torch."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def boxes_of_range(shape: Shape, start: int, stop: int) -> list[tuple[Shape, Shape]]:
    """(offset, shape) of the boxes, in order, that cover elements [start, stop) of a C-contiguous
    tensor; each is contiguous, and there are at most 2 * len(shape) - 1 of them."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _within_row(shape, last, start, stop)
    found = _within_row(shape, first - 1, start, first * row)
    if last > first:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + _within_row(shape, last, last * row, stop)


def _within_row(shape: Shape, index: int, start: int, stop: int) -> list[tuple[Shape, Shape]]:
    origin = index * math.prod(shape[1:])
    inner = boxes_of_range(shape[1:], start - origin, stop - origin)
    return [((index, *offset), (1, *size)) for offset, size in inner]
