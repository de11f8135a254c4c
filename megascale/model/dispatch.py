"""The way of tokens to their experts and back, with places that the device alone knows.

Every token goes to `top_k` experts. So the number of rows is known to the host, and only ranks that
exchange tokens of different experts wait once, for how many come and go. Sums of gradients and of
outputs have a fixed order.

Shape suffixes: T tokens, K experts of each, N rows (a token for each of its experts), E experts,
S ranks that send.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


@dataclass(frozen=True)
class _Choices:
    """Rows in the order of experts, and of tokens within each."""

    tokens_N: torch.Tensor
    """The token of each row."""
    rows_TK: torch.Tensor
    """The rows of each token."""
    counts_E: torch.Tensor


@dataclass(frozen=True)
class _Exchange:
    """Rows that ranks exchange."""

    sent: list[int]
    """To each expert rank."""
    received: list[int]
    """From each expert rank."""
    gathered: list[int]
    """That each tensor rank has after that."""
    sizes_SE: torch.Tensor
    """Rows by sender and by expert of this rank, in the order in which they come."""


class Dispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """In the place of megatron-core's dispatcher of the kind alltoall."""

    def __init__(self, config: Any, num_local_experts: int, replaced: MoETokenDispatcher) -> None:
        """`replaced` is megatron-core's own dispatcher of the layer; its groups are taken."""
        groups = SimpleNamespace(
            ep=replaced.ep_group, expt_tp=replaced.tp_group, tp_ep=replaced.tp_ep_group
        )
        super().__init__(config=config, pg_collection=groups)
        self.num_local_experts = num_local_experts

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (T, 1, hidden) -> rows (N, hidden) and their weights (N)."""
        self._shape = tokens.shape
        chosen_TK = _chosen(routing_map, self.config.moe_router_topk)
        slots_N = chosen_TK.flatten().argsort(stable=True)
        places_N = _inverse(slots_N)
        self._choices = _Choices(
            tokens_N=slots_N // chosen_TK.shape[1],
            rows_TK=places_N.view_as(chosen_TK),
            counts_E=routing_map.sum(dim=0),
        )
        weights_N = _reorder(probs.gather(1, chosen_TK).flatten(), slots_N, places_N)
        return _spread(tokens.flatten(0, -2), self._choices), weights_N

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the experts of this rank, of all ranks with the same tensor rank."""
        if self.ep_size * self.tp_size > 1:
            self._exchange = self._agree(self._choices.counts_E, len(hidden_states))
        if self.ep_size == 1:
            return hidden_states, probs
        splits = (self._exchange.received, self._exchange.sent)
        return (
            all_to_all(self.ep_group, hidden_states, *splits),
            all_to_all(self.ep_group, probs, *splits),
        )

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of all tensor ranks in the order of experts, rows of each expert, and weights."""
        if self.ep_size * self.tp_size == 1:
            return hidden_states, self._choices.counts_E, probs
        sizes_SE = self._exchange.sizes_SE
        if self.tp_size > 1:
            options = {"group": self.tp_group, "output_split_sizes": self._exchange.gathered}
            hidden_states = gather_from_sequence_parallel_region(hidden_states, **options)
            probs = gather_from_sequence_parallel_region(probs, **options)
        if self.num_local_experts > 1:
            self._order = _by_expert(sizes_SE, len(hidden_states))
            hidden_states = _reorder(hidden_states, *self._order)
            probs = _reorder(probs, *self._order)
        return hidden_states, sizes_SE.sum(dim=0), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What `dispatch_postprocess` did, backwards; parts of tensor ranks are summed."""
        if self.num_local_experts > 1 and self.ep_size * self.tp_size > 1:
            hidden_states = _reorder(hidden_states, *reversed(self._order))
        if self.tp_size == 1:
            return hidden_states
        summed: torch.Tensor = reduce_scatter_to_sequence_parallel_region(
            hidden_states, group=self.tp_group, input_split_sizes=self._exchange.gathered
        )
        return summed

    def token_combine(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Rows back on the ranks of their tokens."""
        if self.ep_size == 1:
            return hidden_states
        splits = (self._exchange.sent, self._exchange.received)
        output: torch.Tensor = all_to_all(self.ep_group, hidden_states, *splits)
        return output

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows (N, hidden) -> tokens (T, 1, hidden): the sums of their rows."""
        return _collect(hidden_states, self._choices).view(self._shape)

    def _agree(self, counts_E: torch.Tensor, rows: int) -> _Exchange:
        """Counts of all ranks. The host waits where expert ranks exchange, and nowhere else:
        tensor ranks have equally many tokens."""
        counts = counts_E.new_empty(self.ep_size * self.tp_size * len(counts_E))
        dist.all_gather_into_tensor(counts, counts_E, group=self.tp_ep_group)
        first = self.ep_group.rank() * self.num_local_experts
        ranks = counts.view(self.ep_size, self.tp_size, -1).transpose(0, 1)
        sizes = ranks[:, :, first : first + self.num_local_experts]
        sent, gathered = [rows], [rows] * self.tp_size
        received = sent
        if self.ep_size > 1:
            sent, received, gathered = self._on_host(counts_E, sizes.sum(dim=2))
        return _Exchange(sent, received, gathered, sizes.flatten(0, 1))

    def _on_host(self, counts_E: torch.Tensor, sizes: torch.Tensor) -> list[list[int]]:
        """Rows sent to each expert rank, received from each, and on each tensor rank; `sizes` is
        [tensor rank, expert rank]."""
        sent = counts_E.view(self.ep_size, -1).sum(dim=1)
        numbers = torch.cat([sent, sizes[self.tp_rank], sizes.sum(dim=1)]).tolist()
        size = self.ep_size
        return [numbers[:size], numbers[size : 2 * size], numbers[2 * size :]]


def _chosen(chosen_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T, K): the numbers of each token's experts, in order."""
    experts = chosen_TE.shape[1]
    numbers_E = torch.arange(experts, device=chosen_TE.device)
    return numbers_E.where(chosen_TE, experts).topk(top_k, largest=False).values


def _inverse(order_N: torch.Tensor) -> torch.Tensor:
    """Where each number stands in an order of 0, 1, 2 ..."""
    numbers = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, numbers)


def _by_expert(sizes_SE: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that come by sender and expert: their order by expert and sender, and its inverse."""
    starts_SE = (sizes_SE.flatten().cumsum(0) - sizes_SE.flatten()).view_as(sizes_SE)
    sizes = sizes_SE.T.flatten()
    shifts = starts_SE.T.flatten() - (sizes.cumsum(0) - sizes)
    shifts_N = shifts.repeat_interleave(sizes, output_size=rows)
    order_N = shifts_N + torch.arange(rows, device=sizes.device)
    return order_N, _inverse(order_N)


def _spread(tokens: torch.Tensor, choices: _Choices) -> torch.Tensor:
    """(T, hidden) -> (N, hidden): the token of each row."""
    rows: torch.Tensor = _Spread.apply(tokens, choices.tokens_N, choices.rows_TK)
    return rows


def _collect(rows: torch.Tensor, choices: _Choices) -> torch.Tensor:
    """(N, hidden) -> (T, hidden): the sum of each token's rows."""
    tokens: torch.Tensor = _Collect.apply(rows, choices.tokens_N, choices.rows_TK)
    return tokens


def _reorder(x: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor) -> torch.Tensor:
    """x[order], whose gradient takes the inverse order instead of a sum."""
    output: torch.Tensor = _Reorder.apply(x, order_N, inverse_N)
    return output


def _sum_rows(rows: torch.Tensor, rows_TK: torch.Tensor) -> torch.Tensor:
    if not len(rows_TK):
        return torch.empty_like(rows)
    return torch.nn.functional.embedding_bag(rows_TK, rows.detach(), mode="sum")


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, tokens_N, rows_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows_TK)
        return tokens.index_select(0, tokens_N)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return _sum_rows(gradient.contiguous(), *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, tokens_N, rows_TK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens_N)
        return _sum_rows(rows, rows_TK)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order_N, inverse_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse_N)
        return x.index_select(0, order_N)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient.index_select(0, *ctx.saved_tensors), None, None
