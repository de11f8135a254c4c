"""Balance of experts: what pulls the router of a mixture-of-experts layer towards even use.

The balance loss of a set of tokens is E * sum_i f_i * P_i: f_i is the share of their choices that
fell on expert i, P_i the mean probability of expert i, and f carries no gradient (Switch
Transformer; over the global batch: Demons in the Detail, arXiv 2501.11873). Even use gives 1.

With the load l_i = E * f_i, every token t adds weight * sum_i l_i * p_i(t) to a sum, and the one
multiplication at the end of the step divides it by the loss tokens of the global batch, as it does
the language model's. So for given loads the gradient does not depend on how the batch was cut.

Shape suffixes: T tokens of this rank, E experts, G groups of tokens, L layers, S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megascale.config import MoeConfig
from megascale.mesh.packing import Segments
from megascale.mesh.ring_attention import ring_sum
from megascale.mesh.transfer import send


@dataclass(frozen=True)
class ExpertUse:
    """How the experts of all layers were used over one batch; the same on every rank."""

    counts_SLE: torch.Tensor
    """Choices of the tokens of each source, fp64 in host memory."""
    probability_LE: torch.Tensor
    """Mean probability over all tokens, fp64 in host memory."""

    @property
    def load_LE(self) -> torch.Tensor:
        """Choices over those of even use; all 1 where there was no token."""
        return load_of(self.counts_SLE.sum(dim=0))

    @property
    def loss_L(self) -> torch.Tensor:
        """The balance loss over the whole batch; 1 where use is even."""
        return (self.load_LE * self.probability_LE).sum(dim=1)

    @property
    def max_violation_L(self) -> torch.Tensor:
        """How far the busiest expert is above even use: 0 is even, E / k - 1 the most."""
        return self.load_LE.amax(dim=1) - 1

    @property
    def dead_L(self) -> torch.Tensor:
        """Experts that no token chose."""
        return (self.counts_SLE.sum(dim=0) == 0).sum(dim=1)


def load_of(counts: torch.Tensor) -> torch.Tensor:
    """Counts over their mean, along the last dimension; 1 where all are 0."""
    mean = counts.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, counts / mean.clamp(min=1e-300), 1.0)


class BalancedRouter(TopKRouter):  # type: ignore[misc]
    """megatron-core's router with our losses, which only tokens that count add to."""

    def __init__(self, *args: Any, moe: MoeConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moe = moe
        even = torch.ones(moe.num_experts, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("load_E", even)  # over the global batch before this one
        self.register_buffer("earlier_E", even.clone())  # and before that
        if moe.balance == "loss_free":
            self.register_buffer("bias_E", even.clone())  # only differences matter
        self.segments: Segments | None = None
        """Of the micro-batch at hand; the layer sets it before it calls."""
        self.tally: Tally | None = None
        """Where choices are counted; None: nowhere, and there is no loss."""

    @property
    def foreseen_E(self) -> torch.Tensor:
        """The load of the batch at hand as those before let expect it, or where a pass without
        gradients found it.

        A trend makes up in each step for the change of load that the step before did not know:
        over steps the loads that were used sum to those that were.
        """
        if self.moe.estimate == "trend":
            return 2 * self.load_E - self.earlier_E
        return self.load_E

    def keep_exact(self) -> None:
        """Keep state in fp32 where the weights are bf16: it is sums, not activations."""
        for name, buffer in self.named_buffers():
            if buffer.dtype not in (torch.float32, torch.float64):
                setattr(self, name, buffer.float())

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (T, 1, E) -> weights of the chosen experts and which these are, (T, E) each."""
        logits_TE = logits.view(-1, self.moe.num_experts)
        if self.moe.balance == "loss_free":
            probs_TE, chosen_TE = _choose(logits_TE, self.bias_E, self.moe)
        else:
            probs_TE, chosen_TE = super().routing(logits, padding_mask)
        if self.tally is None or not (torch.is_grad_enabled() or self.tally.without_gradients):
            return probs_TE, chosen_TE
        assert self.segments is not None, "the layer sets the segments"
        part = _Part.of(self.segments, len(logits_TE), self.tp_group)
        exact = torch.promote_types(logits.dtype, torch.float32)
        logits_TE, chosen = logits_TE[: part.num_tokens].to(exact), chosen_TE[: part.num_tokens]
        scores_TE = torch.softmax(logits_TE, dim=-1)
        self.tally.add(chosen, scores_TE.detach(), part)
        if torch.is_grad_enabled():
            loss = self._loss(logits_TE, scores_TE, chosen.to(exact), part)
            probs_TE = _Attach.apply(probs_TE, loss)
        return probs_TE, chosen_TE

    def _loss(
        self,
        logits_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        chosen_TE: torch.Tensor,
        part: _Part,
    ) -> torch.Tensor:
        """The loss sum of this rank's tokens of the micro-batch."""
        assert self.tally is not None
        moe, weight = self.moe, self.moe.layer_weight(self.layer_number)
        total = logits_TE.new_zeros(())
        if weight and moe.balance == "global":
            load_E = self.tally.estimate(self.foreseen_E, part).to(scores_TE)
            total = total + weight * (scores_TE.sum(dim=0) @ load_E)
        if weight and moe.balance == "sequence":
            total = total + weight * _grouped(scores_TE, chosen_TE, part.by_sequence_GT, part)
        micro = {"micro": weight, "global": weight * moe.micro_share}.get(moe.balance, 0.0)
        if micro:
            everything = torch.ones_like(scores_TE[:, 0])[None]
            total = total + micro * _grouped(scores_TE, chosen_TE, everything, part)
        if moe.z_loss_coeff:
            total = total + moe.z_loss_coeff * torch.logsumexp(logits_TE, -1).square().sum()
        return total


def _grouped(
    scores_TE: torch.Tensor, chosen_TE: torch.Tensor, groups_GT: torch.Tensor, part: _Part
) -> torch.Tensor:
    """The sum over groups of their balance losses, each as often as it has tokens here.

    Loads are those of the whole group, which other ranks may share.
    """
    groups_GT = groups_GT.to(scores_TE)
    with torch.no_grad():
        load_GE = load_of(part.over_ranks(groups_GT @ chosen_TE))
    return ((groups_GT @ scores_TE) * load_GE).sum()


class _Attach(torch.autograd.Function):
    """The first argument as it is; in the backward pass the loss gets a gradient of 1."""

    @staticmethod
    def forward(ctx, probs, loss):  # type: ignore[no-untyped-def]
        ctx.like = loss.new_ones(())
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, ctx.like


def _choose(
    logits_TE: torch.Tensor, bias_E: torch.Tensor, moe: MoeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choice by probability plus bias, weights by probability alone.

    Loss-free balancing (Wang et al., arXiv 2408.15664), with softmax probabilities.
    """
    exact = torch.promote_types(logits_TE.dtype, torch.float32)
    scores_TE = torch.softmax(logits_TE, dim=-1, dtype=exact)
    best = (scores_TE + bias_E).topk(moe.top_k, dim=-1).indices
    weights = scores_TE.gather(-1, best)
    if moe.top_k > 1 and moe.normalize_top_k:  # the quotient of probabilities, which may be 0 all
        weights = torch.softmax(logits_TE.gather(-1, best), dim=-1, dtype=exact)
    nothing = torch.zeros_like(logits_TE)
    probs_TE = nothing.scatter(-1, best, weights.to(logits_TE.dtype))
    return probs_TE, nothing.bool().scatter(-1, best, True)


@dataclass(frozen=True)
class _Part:
    """The rows of a router that count: the first `num_tokens`; padding follows."""

    num_tokens: int
    sequence_T: torch.Tensor
    """Which sequence of the micro-batch a token is of."""
    source_T: torch.Tensor
    num_sequences: int
    pack_tokens: int
    """Tokens of the micro-batch that count, on all tensor ranks together."""
    over_tensor: Callable[[torch.Tensor], torch.Tensor]
    """Sums over the tensor ranks."""
    over_ranks: Callable[[torch.Tensor], torch.Tensor]
    """Sums over all ranks that share the micro-batch."""

    @staticmethod
    def of(segments: Segments, rows: int, tensor_group: Any) -> _Part:
        """Of `rows` of a pack: tensor ranks hold slices of it, in their order."""
        begin = tensor_group.rank() * rows
        count = min(rows, max(0, segments.num_tokens - begin))
        sequence_T, source_T = segments.owners()

        def over_tensor(values: torch.Tensor) -> torch.Tensor:
            if tensor_group.size() > 1:
                dist.all_reduce(values, group=tensor_group)
            return values

        def over_ranks(values: torch.Tensor) -> torch.Tensor:
            values = over_tensor(values)
            return values if segments.ring is None else ring_sum(values, segments.ring)

        held, number = slice(begin, begin + count), len(segments.sources)
        return _Part(
            num_tokens=count,
            sequence_T=sequence_T[held],
            source_T=source_T[held],
            num_sequences=number,
            pack_tokens=segments.num_tokens,
            over_tensor=over_tensor,
            over_ranks=over_ranks,
        )

    @property
    def by_sequence_GT(self) -> torch.Tensor:
        """1 where a token is of a sequence."""
        numbers = torch.arange(self.num_sequences, device=self.sequence_T.device)
        return (numbers[:, None] == self.sequence_T[None]).float()


class Tally:
    """What the routers of one layer chose in the step at hand."""

    def __init__(self, moe: MoeConfig, num_sources: int, device: torch.device) -> None:
        self._moe = moe
        self.without_gradients = False
        """Count in passes without gradients too; else these are evaluation, or the first of the
        two passes of recomputation."""
        options = {"dtype": torch.float64, "device": device}
        self.counts_SE = torch.zeros(num_sources, moe.num_experts, **options)
        self.scores_E = torch.zeros(moe.num_experts, **options)
        self.begin(0, 0)

    def begin(self, micro_batches: int, loss_tokens: int) -> None:
        """Start a step of so many micro-batches here, and so many tokens on all ranks."""
        self.counts_SE.zero_()
        self.scores_E.zero_()
        self._left, self._loss_tokens = micro_batches, loss_tokens
        self._counted, self._tokens, self._used_E = 0, 0, torch.zeros_like(self.scores_E)

    def add(self, chosen_TE: torch.Tensor, scores_TE: torch.Tensor, part: _Part) -> None:
        """Count the choices of a micro-batch."""
        self.counts_SE.index_add_(0, part.source_T, chosen_TE.double())
        self.scores_E += scores_TE.sum(dim=0)
        self._counted += part.pack_tokens
        self._left -= 1

    def estimate(self, before_E: torch.Tensor, part: _Part) -> torch.Tensor:
        """The load of the global batch, as far as it is known in this micro-batch.

        `before_E` is `BalancedRouter.foreseen_E`. Corrected estimates make up in the last
        micro-batch for what the earlier ones took instead of the load that is known by then; it
        stands for all of this rank.
        """
        how = self._moe.estimate
        if how in ("previous", "trend", "exact"):
            return before_E
        own_E, before_E = part.over_tensor(self.counts_SE.sum(dim=0)), before_E.double()
        tokens = self._counted  # known to the host, which must not wait for the device
        here = tokens - self._tokens
        known_E = load_of(own_E)
        if how == "previous_corrected":
            share = min(1.0, tokens / max(1, self._loss_tokens))
            known_E = before_E + share * (known_E - before_E)
        load_E = before_E if how == "previous_corrected" else known_E
        if how.endswith("corrected") and self._left == 0 and here > 0:
            load_E = known_E + (known_E * self._tokens - self._used_E) / here
        self._tokens, self._used_E = tokens, self._used_E + load_E * here
        return load_E


class Balance:
    """The routers of all layers on this rank, and what their ranks find out together."""

    def __init__(
        self, routers: Mapping[int, BalancedRouter], moe: MoeConfig, layers: int, sources: int
    ) -> None:
        """`routers` by number of their layer, from 1; `layers` and `sources` are all there are."""
        self.moe, self._layers, self._sources = moe, layers, sources
        self._routers = routers
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        for router in routers.values():
            router.keep_exact()
            router.tally = Tally(moe, sources, router.weight.device)

    @property
    def looks_first(self) -> bool:
        """Whether a pass without gradients comes before each step."""
        return self.moe.balance == "global" and self.moe.estimate == "exact"

    def begin(self, micro_batches: int, loss_tokens: int) -> None:
        """Start a step; see `Tally.begin`."""
        for tally in self._tallies():
            tally.begin(micro_batches, loss_tokens)

    @contextmanager
    def looking(self, loss_tokens: int = 0) -> Iterator[None]:
        """Count in passes without gradients."""
        self.begin(0, loss_tokens)
        for tally in self._tallies():
            tally.without_gradients = True
        try:
            yield
        finally:
            for tally in self._tallies():
                tally.without_gradients = False

    def begin_sum(self) -> None:
        """Start to sum the counts over all ranks: one message for all layers."""
        device = next(iter(self._routers.values())).weight.device
        shape = (self._layers, self._sources + 1, self.moe.num_experts)
        packed = torch.zeros(shape, dtype=torch.float64, device=device)
        for number, router in self._routers.items():
            assert router.tally is not None
            packed[number - 1, :-1] = router.tally.counts_SE
            packed[number - 1, -1] = router.tally.scores_E
        self._pending = packed, dist.all_reduce(packed, async_op=True)

    def finish_sum(self) -> ExpertUse:
        """Wait for the sum."""
        assert self._pending is not None, "begin_sum comes first"
        packed, work = self._pending
        work.wait()
        self._pending = None
        packed = packed.cpu()
        counts_SLE, scores_LE = packed[:, :-1].transpose(0, 1), packed[:, -1]
        tokens_L = scores_LE.sum(dim=1, keepdim=True)  # the probabilities of a token sum to 1
        return ExpertUse(counts_SLE, scores_LE / tokens_L.clamp(min=1))

    def adopt(self, use: ExpertUse) -> None:
        """Take the loads of a batch for the one that follows, and move the biases by them."""
        like = next(iter(self._routers.values())).load_E
        load_LE = send(use.load_LE.to(like.dtype), like.device)
        for number, router in self._routers.items():
            load_E = load_LE[number - 1]
            router.earlier_E.copy_(router.load_E)
            router.load_E.copy_(load_E)
            if self.moe.balance == "loss_free":
                router.bias_E += self.moe.bias_rate * torch.sign(1 - load_E)
                router.bias_E -= router.bias_E.mean()  # signs need not sum to 0

    def _tallies(self) -> Iterator[Tally]:
        for router in self._routers.values():
            assert router.tally is not None
            yield router.tally
