"""Attention on one GPU: a pack of many lengths, and a ring of several ranks in turn."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_rows import Rows
from gpu_scene import device_of, half, seconds
from torch.nn.functional import scaled_dot_product_attention

from megascale.mesh import ring_attention
from megascale.mesh.kernels import DENSE, Call
from megascale.mesh.packed_attention import attend
from megascale.mesh.packing import Segments
from megascale.mesh.ring_share import RingShare
from megascale.model.counts import visible_pairs

RING = 8
HEADS, GROUPS, SIZE = 32, 8, 128
WAIT_S = 60
"""Longest wait of a place of the ring for the place before."""


def tailed_pack(rows: Rows) -> None:
    """Long-tailed pack against padded attention."""
    device = device_of()
    lengths = tailed_lengths(*((512, 128) if rows.small else (65536, 16384)))
    longest, number = max(lengths), len(lengths)
    packed = [x.requires_grad_() for x in tensors(sum(lengths), device)]
    segments = Segments.of(lengths, device)

    def ours() -> None:
        out, _ = attend(*packed, segments)
        torch.autograd.grad(out, packed, out.detach())

    mine = seconds(ours, device)
    padded = [
        torch.randn(number, heads, longest, SIZE, device=device, dtype=half(device))
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    for x in padded:
        x.requires_grad_()

    def theirs() -> None:
        out = scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, padded, out.detach())

    gain = seconds(theirs, device) / mine
    work = visible_pairs([longest] * number) / visible_pairs(lengths)
    rows.add(f"pack of {number} lengths: padded / real work", work, "times")
    rows.add("speed over padded, of padded / real work", gain / work, "", 0.9, None, True)


def tailed_lengths(tokens: int, longest: int) -> list[int]:
    """Lengths of a long-tailed distribution that sum to `tokens`, the longest among them."""
    generator, lengths = np.random.default_rng(0), [longest]
    while sum(lengths) < tokens:
        drawn = int(np.clip(generator.lognormal(7.0, 1.3), 16, longest))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


def tensors(tokens: int, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys and values."""
    return [
        torch.randn(tokens, heads, SIZE, device=device, dtype=half(device))
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def ring_agrees(rows: Rows) -> None:
    """Ring in turn against fp64."""
    device, tokens = device_of(), 512 if rows.small else 4096
    q, k, v = tensors(tokens, device)
    grad = torch.randn_like(q)
    ring = RingInTurn(tokens, device)
    found = ring.run(*(ring.cut(x) for x in (q, k, v, grad)))
    call = Call(slice(None), slice(None), True, None, (tokens, tokens))
    exact = [x.double() for x in (grad, q, k, v)]
    out, lse = DENSE.forward(*exact[1:], call)
    right = (out, *DENSE.backward(*exact, out, lse, call))
    for what, mine, theirs in zip(("output", "dq", "dk", "dv"), found, right, strict=True):
        error = float((ring.join(mine).double() - theirs).norm() / theirs.norm())
        rows.add(f"ring of {RING} in turn, {what}: error against fp64", error, "", None, 0.01)


def ring_hops(rows: Rows) -> None:
    """Ring in turn against one kernel."""
    device, tokens = device_of(), 512 if rows.small else 65536
    q, k, v = tensors(tokens, device)
    grad, ring = torch.randn_like(q), RingInTurn(tokens, device)
    parts = [ring.cut(x) for x in (q, k, v, grad)]
    hops = seconds(lambda: ring.run(*parts), device, repeats=3, warm_ups=1)
    whole, segments = [x.requires_grad_() for x in (q, k, v)], Segments.of([tokens], device)

    def one() -> None:
        out, _ = attend(*whole, segments)
        torch.autograd.grad(out, whole, grad)

    alone = seconds(one, device, repeats=3, warm_ups=1)
    rows.add("one kernel, forward and backward", 1e3 * alone, "ms")
    rows.add(
        f"sum of all hops of a ring of {RING} over one kernel", hops / alone, "", None, 1.08, True
    )


class RingInTurn:
    """All places of a ring on one device: a thread each, and messages through queues.

    One thread runs at a time, until it waits for a message. All queue their kernels on one stream,
    so nothing overlaps and the time is the sum.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._device, self._boxes = device, defaultdict(queue.Queue)  # type: ignore[var-annotated]
        self._turn = threading.Lock()
        bounds = np.linspace(0, tokens, 2 * RING + 1).astype(np.int64)[None]
        self.shares = [
            RingShare(place=place, bounds=bounds, ranks=tuple(range(RING)), group=None)
            for place in range(RING)
        ]
        self._positions = [torch.from_numpy(share.positions()).to(device) for share in self.shares]

    def cut(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each place."""
        return [whole[positions] for positions in self._positions]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The opposite of `cut`."""
        joined = torch.empty_like(torch.cat(parts))
        joined[torch.cat(self._positions)] = torch.cat(parts)
        return joined

    def run(self, *parts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Output, dq, dk and dv of every place, from q, k, v and the gradient of every place."""
        with patch.object(ring_attention, "_Exchange", self._exchange()):
            found = in_turn(
                self._turn, lambda place: self._place(place, *(x[place] for x in parts))
            )
        return [list(of_all) for of_all in zip(*found, strict=True)]

    def _place(self, place: int, q: Any, k: Any, v: Any, grad: Any) -> tuple[torch.Tensor, ...]:
        """The passes of one place. The backward pass is called apart from autograd, which has one
        thread for each device."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = ring_attention.ring_attend(*given, self.shares[place])
        with torch.no_grad():
            dq, dk, dv, *_ = ring_attention._RingAttention.backward(out.grad_fn, grad, None)
        return out.detach(), dq, dk, dv

    def _exchange(self) -> type:
        boxes, turn = self._boxes, self._turn

        class Exchange(ring_attention._Exchange):
            """Messages between threads."""

            def __init__(self, share: RingShare) -> None:
                super().__init__(share)
                self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

            def begin(self) -> None:
                place = self._share.place
                for going, _ in self._pairs:
                    boxes[place, (place + 1) % RING].put(going)

            def finish(self) -> None:
                place = self._share.place
                for _, coming in self._pairs:
                    turn.release()
                    try:
                        sent = boxes[(place - 1) % RING, place].get(timeout=WAIT_S)
                    finally:
                        turn.acquire()
                    coming.copy_(sent)

            def _add(self, going: torch.Tensor, coming: torch.Tensor) -> torch.Tensor:
                self._pairs.append((going, coming))
                return coming

        return Exchange


def in_turn(turn: threading.Lock, function: Callable[[int], Any]) -> list[Any]:
    """What a function returns for each place, each in a thread that holds `turn` while it runs. An
    error of one is raised."""
    results: list[Any] = [None] * RING
    errors: list[BaseException] = []

    def call(place: int) -> None:
        try:
            with turn:
                results[place] = function(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(RING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
