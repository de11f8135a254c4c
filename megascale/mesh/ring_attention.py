"""Ring attention: sequences that several ranks share, over point-to-point messages alone.

Keys and values travel round the ring, each rank to the next, while every rank computes with
those at hand; partial results are joined by their log-sum-exp (Liu et al., Ring Attention; the
symmetric chunks are ByteScale's dist-attention). All rings use the one group of the HDP axis, so
any set of ranks can be a ring, and no group is made for it.

A chunk of sequences attends to the chunks before it too. Their keys and values stay where they
were computed (`chunk_cache`), and travel round the ring before those of the chunk. A ring of one
rank computes chunks the same way, without messages.

Shape suffixes: T tokens of the pack, S tokens of a share, H query heads, G key and value heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist

from megascale.fused.merge import merge
from megascale.mesh.kernels import Call, Kernel, kernel_for
from megascale.mesh.ring_calls import calls_of, prefix_rows_of
from megascale.mesh.ring_share import RingShare


def ring_attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    share: RingShare,
    window: int | None = None,
    layer: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the sequences of a ring, of which this rank holds `share`.

    All ranks of the ring must call it, also one that holds no token. Rows after the share are
    padding: their output is 0 and their log-sum-exp minus infinity. Chunks keep their keys and
    values for later ones under the name `layer`. Returns what `mesh.packed_attention.attend` does.
    Gradients flow through the output only. Raises ValueError for a chunk without `layer`.
    """
    if share.cache is not None and layer is None:
        raise ValueError("attend: chunks of a sequence need layer=, a name for each attention")
    out, lse = _RingAttention.apply(q_THD, k_TGD, v_TGD, share, window, layer)
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
    def forward(ctx, q, k, v, share, window, layer):  # type: ignore[no-untyped-def]
        kernel, exact = kernel_for(q), torch.promote_types(q.dtype, torch.float32)
        calls = calls_of(share, window, kernel, q.device)
        held = share.num_tokens(share.place)
        own = torch.stack((k[:held], v[:held]))
        keys = _Keys(share, window, layer, q.device)
        out = torch.zeros(q.shape, dtype=exact, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=exact, device=q.device)
        here = keys.begin(own)
        for hop in range(share.size):
            exchange = _Exchange(share)
            coming = exchange.keys_and_values(here, hop, keys)
            exchange.begin()
            for call in calls[hop]:
                key, value = here[0, call.keys], here[1, call.keys]
                merge(out, lse, call.queries, *kernel.forward(q[call.queries], key, value, call))
            exchange.finish()
            here = coming
        out = out.to(q.dtype)
        ctx.save_for_backward(q, keys.saved(own), out, lse)
        ctx.share, ctx.window, ctx.keys = share, window, keys
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        """The gradients of keys and values travel one hop behind these: a rank's own part stays,
        the next rank begins the sum of the others' and hands it on, until it is home."""
        q, saved, out, lse = ctx.saved_tensors
        share, kernel, keys = ctx.share, kernel_for(q), ctx.keys
        calls = calls_of(share, ctx.window, kernel, q.device)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        here, going = keys.again(saved), None
        shape = here.shape
        for hop in range(share.size):
            exchange = _Exchange(share)
            coming = exchange.keys_and_values(here, hop, keys)
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
        if going is not None:
            exchange = _Exchange(share)
            others = exchange.gradients(going, shape)
            exchange.begin()
            exchange.finish()
            mine += others
        mine = keys.settle(mine)
        dkv = torch.zeros((2, len(q), *mine.shape[2:]), dtype=q.dtype, device=q.device)
        dkv[:, : mine.shape[1]] = mine
        return dq.to(q.dtype), dkv[0], dkv[1], None, None, None


class _Keys:
    """The keys and values on this rank that a micro-batch attends to: where sequences are whole
    its own, and of a chunk those of earlier chunks too."""

    def __init__(
        self, share: RingShare, window: int | None, layer: Hashable, device: torch.device
    ) -> None:
        self._share, self._prefix = share, share.prefix(window)
        self._cache = share.cache
        if share.cache is not None:
            self._of, self._device = (layer, len(share.earlier)), device
            self._rows = prefix_rows_of(share, window, device)

    def number_on(self, place: int) -> int:
        """How many there are on a place of the ring."""
        return self._prefix.num_seen(place) + self._share.num_tokens(place)

    def begin(self, own: torch.Tensor) -> torch.Tensor:
        """All of them, in the forward pass."""
        return own if self._cache is None else self._cache.extend(*self._of, own, self._rows)

    def saved(self, own: torch.Tensor) -> torch.Tensor | None:
        """What autograd is to save: nothing that the cache keeps."""
        return own if self._cache is None else None

    def again(self, saved: torch.Tensor | None) -> torch.Tensor:
        """What `begin` returned, in the backward pass."""
        if self._cache is not None:
            return self._cache.seen(*self._of, self._rows, self._device)
        assert saved is not None, "whole sequences save their own"
        return saved

    def settle(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradients of this micro-batch's own, from those of all that it attended to."""
        if self._cache is None:
            return gradient
        return self._cache.settle(*self._of, gradient, self._rows)


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

    The sizes of all shares follow from the bounds of pieces, so nothing but the tensors is sent.
    Everything is posted before anything is waited for, and kept until it has arrived: a send
    may end only when the other side receives.
    """

    def __init__(self, share: RingShare) -> None:
        self._share = share
        self._messages: list[dist.P2POp] = []
        self._works: list[dist.Work] = []

    def keys_and_values(self, here: torch.Tensor, hop: int, keys: _Keys) -> torch.Tensor:
        """Hand on what is at hand, but for the last hop; returns where the next will be."""
        share = self._share
        if hop == share.size - 1:
            return here
        held = keys.number_on((share.place - hop - 1) % share.size)
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
