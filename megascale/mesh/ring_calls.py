"""What each rank of a ring computes at each hop: which queries over which keys.

Made in host memory from the bounds of the chunks. The tensors of a micro-batch's calls go to the
device with its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch

from megascale.mesh.kernels import Call, Kernel, Rows
from megascale.mesh.ring_share import PREFIX, Piece, RingShare
from megascale.mesh.transfer import send_arrays

Hops = list[list[Call]]
"""The calls of each hop."""


class _Block(NamedTuple):
    """Contiguous queries of this rank over contiguous keys of a share; see `Call`."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool
    left: int | None
    pieces: tuple[int, int] = (0, 0)
    """Which pieces of their shares: blocks of equal `pieces` have no row in common."""


def key_of(window: int | None, grouped: bool, device: torch.device) -> Any:
    """The key of calls in `RingShare.calls`; `grouped` is that of the kernel."""
    return window, grouped, device


def calls_of(share: RingShare, window: int | None, kernel: Kernel, device: torch.device) -> Hops:
    """What to compute at each hop. Made once per micro-batch; all layers do the same."""
    key = key_of(window, kernel.grouped, device)
    if key in share.calls:
        hops: Hops = share.calls[key]
    elif kernel.grouped:  # the micro-batch was packed without this window
        on_host = host_calls(share, window)
        hops = with_tensors(on_host, iter(send_arrays(arrays_of(on_host), device)))
    else:
        hops = [
            [_single(band) for block in blocks for band in _bands(block)]
            for blocks in _by_hop(share, window)
        ]
    share.calls[key] = hops
    return hops


def prefix_rows_of(share: RingShare, window: int | None, device: torch.device) -> Rows:
    """The rows of earlier chunks here that this one sees. Made once per micro-batch."""
    key = PREFIX, window, device
    if key not in share.calls:
        rows = share.prefix(window).rows(share.place)
        is_array = isinstance(rows, np.ndarray)
        share.calls[key] = send_arrays([rows], device)[0] if is_array else rows
    found: Rows = share.calls[key]
    return found


def host_calls(share: RingShare, window: int | None) -> Hops:
    """The calls of a kernel that takes many segments, with arrays in the place of tensors."""
    return [_grouped(blocks) for blocks in _by_hop(share, window)]


def arrays_of(hops: Hops) -> list[np.ndarray]:
    """The arrays of all calls, in the order of hops, calls and fields."""
    values = (
        value
        for calls in hops
        for call in calls
        for value in (call.queries, call.keys, *(call.cu_seqlens or ()))
    )
    return [value for value in values if isinstance(value, np.ndarray)]


def with_tensors(hops: Hops, tensors: Iterator[torch.Tensor]) -> Hops:
    """The calls with tensors in the place of their arrays, in the order of `arrays_of`."""

    def moved(value: Any) -> Any:
        return next(tensors) if isinstance(value, np.ndarray) else value

    return [
        [
            call._replace(
                queries=moved(call.queries),
                keys=moved(call.keys),
                cu_seqlens=tuple(moved(bounds) for bounds in call.cu_seqlens or ()) or None,
            )
            for call in calls
        ]
        for calls in hops
    ]


def _by_hop(share: RingShare, window: int | None) -> list[list[_Block]]:
    sources = [(share.place - hop) % share.size for hop in range(share.size)]
    return [list(_blocks(share, source, window)) for source in sources]


def _blocks(share: RingShare, source: int, window: int | None) -> Iterator[_Block]:
    """The visible parts of the scores of this rank's queries over the keys of `source`.

    Its keys are those of earlier chunks of the group, sequence after sequence, and then those of
    this micro-batch.
    """
    longest = share.bounds[:, -1].max(initial=0)
    for queries, before, keys in zip(
        share.pieces(share.place), *_keys(share, source, window), strict=True
    ):
        if window is not None and window < longest:
            yield from _windowed(queries, [*before, *keys], window)
        else:
            for block in _whole(queries, before, keys, share.place - source):
                if block.queries[0] < block.queries[1] and block.keys[0] < block.keys[1]:
                    yield block


def _keys(
    share: RingShare, source: int, window: int | None
) -> tuple[list[list[Piece]], list[tuple[Piece, ...]]]:
    """Of each sequence, the pieces of earlier chunks and those of this one, with their rows among
    the keys of `source`."""
    row, before = 0, []
    for pieces in share.prefix(window).pieces[source]:
        rows = accumulate((size for _, _, size in pieces), initial=row)
        before.append([(at, *piece[1:]) for at, piece in zip(rows, pieces, strict=False)])
        row += sum(size for _, _, size in pieces)
    own = [
        tuple((row + at, start, size) for at, start, size in pair) for pair in share.pieces(source)
    ]
    return before, own


def _whole(
    queries: Sequence[Piece], before: Sequence[Piece], keys: Sequence[Piece], ahead: int
) -> Iterator[_Block]:
    """The parts without a window. `ahead` is how many places this rank is after that of the keys.

    Of an earlier place only the first piece is in the past, and of both of mine; of a later
    place both pieces are, but only of my second. Earlier chunks are all in the past.
    """
    (row, _, front), (_, _, back) = queries
    (column, _, first), (_, _, second) = keys
    rows, columns = (row, row + front + back), (column, column + first + second)
    if before:
        past = before[0][0], before[-1][0] + before[-1][2]
        yield _Block(rows, past, False, None, (0, 1))
    if ahead == 0:
        yield _Block(rows, columns, True, None)
    elif ahead > 0:
        yield _Block(rows, (column, column + first), False, None)
    else:
        yield _Block((row + front, row + front + back), columns, False, None)


def _windowed(queries: Sequence[Piece], keys: Sequence[Piece], window: int) -> Iterator[_Block]:
    """The visible parts, piece by piece, less the rows and columns that are hidden throughout."""
    for (i, (row, q_start, q_tokens)), (j, (column, k_start, k_tokens)) in product(
        enumerate(queries), enumerate(keys)
    ):
        if not q_tokens or not k_tokens or k_start > q_start:
            continue
        if k_start == q_start:
            rows, columns = (row, row + q_tokens), (column, column + k_tokens)
            yield _Block(rows, columns, True, window - 1 if window < q_tokens else None, (i, j))
            continue
        k_stop = k_start + k_tokens
        q_stop = min(q_start + q_tokens, k_stop + window - 1)
        k_start = max(k_start, q_start - window + 1)
        if q_start < q_stop:
            left = window - 1 - (q_stop - k_stop) if q_stop - k_start > window else None
            rows, columns = (
                (row, row + q_stop - q_start),
                (column + k_tokens - (k_stop - k_start), column + k_tokens),
            )
            yield _Block(rows, columns, False, left, (i, j))


def _bands(block: _Block) -> Iterator[_Block]:
    """A causal block with a window, cut so that its cost is O(tokens * window)."""
    if not block.causal or block.left is None:
        yield block
        return
    (row, row_stop), (column, _) = block.queries, block.keys
    window = block.left + 1
    for start in range(0, row_stop - row, window):
        stop, first = min(start + window, row_stop - row), max(0, start - window + 1)
        rows, columns = (row + start, row + stop), (column + first, column + stop)
        yield _Block(rows, columns, True, block.left, block.pieces)


def _single(block: _Block) -> Call:
    longest = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
    return Call(slice(*block.queries), slice(*block.keys), block.causal, block.left, longest)


def _grouped(blocks: list[_Block]) -> list[Call]:
    """All blocks with the same mask in one call; without a window that is one call a hop."""
    groups: dict[Any, list[_Block]] = {}
    for block in blocks:
        groups.setdefault((block.causal, block.left, block.pieces), []).append(block)
    calls = []
    for (causal, left, _), group in groups.items():
        queries, keys = [block.queries for block in group], [block.keys for block in group]
        longest = tuple(max(stop - start for start, stop in side) for side in (queries, keys))
        bounds = (_cumulative(queries), _cumulative(keys))
        calls.append(Call(_rows(queries), _rows(keys), causal, left, longest, bounds))
    return calls


def _rows(spans: list[tuple[int, int]]) -> Any:
    """A slice, or an array of row numbers."""
    if all(before[1] == after[0] for before, after in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return np.concatenate([np.arange(start, stop) for start, stop in spans])


def _cumulative(spans: list[tuple[int, int]]) -> np.ndarray:
    return np.cumsum([0, *(stop - start for start, stop in spans)]).astype(np.int32)
