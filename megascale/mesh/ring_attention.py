"""Ring attention: sequences that several ranks share, over point-to-point messages alone.

Keys and values travel round the ring, each rank to the next, while every rank computes with
those at hand; partial results are joined by their log-sum-exp (Liu et al., Ring Attention; the
symmetric chunks are ByteScale's dist-attention). All rings use the one group of the HDP axis, so
any set of ranks can be a ring, and no group is made for it.

Shape suffixes: T tokens of the pack, S tokens of a share, H query heads, G key and value heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megascale.fused.merge import merge
from megascale.mesh.kernels import Call, Kernel, Rows, kernel_for
from megascale.mesh.ring_share import RingShare


def ring_attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    share: RingShare,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the sequences of a ring, of which this rank holds `share`.

    All ranks of the ring must call it, also one that holds no token. Rows after the share are
    padding: their output is 0 and their log-sum-exp minus infinity. Returns what
    `mesh.packed_attention.attend` does. Gradients flow through the output only.
    """
    out, lse = _RingAttention.apply(q_THD, k_TGD, v_TGD, share, window)
    return out, lse


def ring_sum(values: torch.Tensor, share: RingShare) -> torch.Tensor:
    """The sum of `values` over the ranks of a ring, all of which must call it.

    Added in ring order from the first place on, so that it is the same on all of them.
    """
    parts = {share.place: values}
    here = values
    for hop in range(1, share.size):
        exchange = _Exchange(share)
        here = exchange.hand_on(here)
        exchange.begin()
        exchange.finish()
        parts[(share.place - hop) % share.size] = here
    return torch.stack([parts[place] for place in range(share.size)]).sum(dim=0)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, share, window):  # type: ignore[no-untyped-def]
        kernel, exact = kernel_for(q), torch.promote_types(q.dtype, torch.float32)
        calls = _calls(share, window, kernel, q.device)
        held = share.num_tokens(share.place)
        own = torch.stack((k[:held], v[:held]))
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=exact, device=q.device)
        here = own
        for hop in range(share.size):
            exchange = _Exchange(share)
            coming = exchange.keys_and_values(here, hop)
            exchange.begin()
            for call in calls[hop]:
                key, value = here[0, call.keys], here[1, call.keys]
                merge(out, lse, call.queries, *kernel.forward(q[call.queries], key, value, call))
            exchange.finish()
            here = coming
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse)
        ctx.share, ctx.window = share, window
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        """The gradients of keys and values travel one hop behind these: a rank's own part stays,
        the next rank begins the sum of the others' and hands it on, until it is home."""
        q, own, out, lse = ctx.saved_tensors
        share, kernel = ctx.share, kernel_for(q)
        calls = _calls(share, ctx.window, kernel, q.device)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        here, going = own, None
        for hop in range(share.size):
            exchange = _Exchange(share)
            coming = exchange.keys_and_values(here, hop)
            before = exchange.gradients(going, here.shape) if hop > 1 else None
            exchange.begin()
            part = torch.zeros(here.shape, dtype=lse.dtype, device=q.device)
            for call in calls[hop]:
                _add_gradients(kernel, call, (grad, q, here, out, lse), dq, part)
            exchange.finish()
            if hop == 0:
                mine = part
            else:
                going = part if before is None else part.add_(before)
            here = coming
        exchange = _Exchange(share)
        others = exchange.gradients(going, own.shape)
        exchange.begin()
        exchange.finish()
        mine += others
        dkv = torch.zeros((2, len(q), *own.shape[2:]), dtype=own.dtype, device=q.device)
        dkv[:, : own.shape[1]] = mine
        return dq.to(q.dtype), dkv[0], dkv[1], None, None


def _add_gradients(kernel: Kernel, call: Call, given: Any, dq: Any, part: Any) -> None:
    grad, q, here, out, lse = given
    rows, keys = call.queries, call.keys
    dquery, dkey, dvalue = kernel.backward(
        grad[rows], q[rows], here[0, keys], here[1, keys], out[rows], lse[rows], call
    )
    dq[rows] += dquery
    part[0, keys] += dkey
    part[1, keys] += dvalue


class _Exchange:
    """What one rank sends to the next and gets from the one before while it computes.

    The sizes of all shares follow from the chunk bounds, so nothing but the tensors is sent.
    Everything is posted before anything is waited for, and kept until it has arrived: a send
    may end only when the other side receives.
    """

    def __init__(self, share: RingShare) -> None:
        self._share = share
        self._messages: list[dist.P2POp] = []
        self._works: list[dist.Work] = []

    def keys_and_values(self, here: torch.Tensor, hop: int) -> torch.Tensor:
        """Hand on what is at hand, but for the last hop; returns where the next will be."""
        share = self._share
        if hop == share.size - 1:
            return here
        held = share.num_tokens((share.place - hop - 1) % share.size)
        return self._add(here, here.new_empty(2, held, *here.shape[2:]))

    def hand_on(self, going: torch.Tensor) -> torch.Tensor:
        """Hand on numbers of which every rank has equally many; returns where more will be."""
        return self._add(going, torch.empty_like(going))

    def gradients(self, going: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Hand on the gradients of the keys before; returns where those of `shape` will be."""
        return self._add(going, going.new_empty(shape))

    def begin(self) -> None:
        """Start all at once."""
        if self._messages:
            self._works = dist.batch_isend_irecv(self._messages)

    def finish(self) -> None:
        """Wait until all is there."""
        for work in self._works:
            work.wait()
        self._messages.clear()

    def _add(self, going: torch.Tensor, coming: torch.Tensor) -> torch.Tensor:
        share = self._share
        to = share.ranks[(share.place + 1) % share.size]
        origin = share.ranks[share.place - 1]
        if going.numel():
            self._messages.append(dist.P2POp(dist.isend, going, to, share.group))
        if coming.numel():
            self._messages.append(dist.P2POp(dist.irecv, coming, origin, share.group))
        return coming


class _Block(NamedTuple):
    """Contiguous queries of this rank over contiguous keys of a share; see `Call`."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool
    left: int | None
    chunks: tuple[int, int] = (0, 0)
    """Which chunks of their shares: blocks of equal `chunks` have no row in common."""


def _calls(
    share: RingShare, window: int | None, kernel: Kernel, device: torch.device
) -> list[list[Call]]:
    """What to compute at each hop. Made once per micro-batch; all layers do the same."""
    key = (window, kernel.grouped, device)
    if key not in share.calls:
        sources = [(share.place - hop) % share.size for hop in range(share.size)]
        hops = [list(_blocks(share, source, window)) for source in sources]
        if kernel.grouped:
            share.calls[key] = [_grouped(blocks, device) for blocks in hops]
        else:
            share.calls[key] = [[_single(x) for b in blocks for x in _bands(b)] for blocks in hops]
    return share.calls[key]


def _blocks(share: RingShare, source: int, window: int | None) -> Iterator[_Block]:
    """The visible parts of the scores of this rank's queries over the keys of `source`.

    Of an earlier place only the first chunk is in the past, and of both of mine; of a later
    place both chunks are, but only of my second.
    """
    mine, theirs = _pieces(share, share.place), _pieces(share, source)
    longest = share.bounds[:, -1].max(initial=0)
    for queries, keys in zip(mine, theirs, strict=True):
        if window is not None and window < longest:
            yield from _windowed(queries, keys, window)
            continue
        (row, _, front), (_, _, back) = queries
        (column, _, first), (_, _, second) = keys
        rows, columns = (row, row + front + back), (column, column + first + second)
        if source == share.place:
            block = _Block(rows, columns, True, None)
        elif source < share.place:
            block = _Block(rows, (column, column + first), False, None)
        else:
            block = _Block((row + front, row + front + back), columns, False, None)
        if block.queries[0] < block.queries[1] and block.keys[0] < block.keys[1]:
            yield block


Piece = tuple[int, int, int]
"""(row in the pack, position in the sequence, tokens) of a chunk."""


def _pieces(share: RingShare, place: int) -> list[tuple[Piece, Piece]]:
    sizes, starts = share.sizes(place), share.starts(place)
    rows = sizes.cumsum().reshape(sizes.shape) - sizes
    table = np.stack([rows, starts, sizes], axis=-1).tolist()
    return [(tuple(first), tuple(second)) for first, second in table]


def _windowed(queries: Sequence[Piece], keys: Sequence[Piece], window: int) -> Iterator[_Block]:
    """The visible parts, chunk by chunk, less the rows and columns that are hidden throughout."""
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
        yield _Block(rows, columns, True, block.left, block.chunks)


def _single(block: _Block) -> Call:
    longest = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
    return Call(slice(*block.queries), slice(*block.keys), block.causal, block.left, longest)


def _grouped(blocks: list[_Block], device: torch.device) -> list[Call]:
    """All blocks with the same mask in one call; without a window that is one call a hop."""
    groups: dict[Any, list[_Block]] = {}
    for block in blocks:
        groups.setdefault((block.causal, block.left, block.chunks), []).append(block)
    return [
        Call(
            _rows([block.queries for block in group], device),
            _rows([block.keys for block in group], device),
            causal,
            left,
            (
                max(stop - start for start, stop in (block.queries for block in group)),
                max(stop - start for start, stop in (block.keys for block in group)),
            ),
            (
                _cumulative([block.queries for block in group], device),
                _cumulative([block.keys for block in group], device),
            ),
        )
        for (causal, left, _), group in groups.items()
    ]


def _rows(spans: list[tuple[int, int]], device: torch.device) -> Rows:
    if all(before[1] == after[0] for before, after in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    rows = np.concatenate([np.arange(start, stop) for start, stop in spans])
    return torch.from_numpy(rows).to(device)


def _cumulative(spans: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    lengths = [0, *(stop - start for start, stop in spans)]
    return torch.tensor(lengths, device=device).cumsum(0).int()
