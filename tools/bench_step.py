"""Cost of our whole training step against two peers, one rank and one thread on CPU.

1. A bare megatron-core loop: the same model, optimizer and micro-batches, already in memory.
   Ours deals, plans, reads from disk, checks and sums on top.
2. A plain PyTorch GPT of the same shape with scaled_dot_product_attention and AdamW, on sequences
   that all fill the context, so that it needs no packing.

The peers take steps in turn in one process; the ratio is that of the medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from plain_gpt import PlainGpt

from megascale.config import RunConfig, finalize, parse_config
from megascale.corpus.batches import Cursor, GlobalBatches
from megascale.corpus.run_length import is_over
from megascale.corpus.shards import Shard, ShardWriter
from megascale.corpus.sources import describe
from megascale.mesh.packing import MicroBatch
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.model.build import build_model, pack_multiple
from megascale.optim.build import build_optimizer
from megascale.run.step_problem import plan_lengths, step_problem
from megascale.runtime import distributed
from megascale.runtime.distributed import Ranks
from megascale.training.feed import Feed, start_plans
from megascale.training.step import Learner, train_step

CONFIG = """
model: {num_layers: 4, hidden_size: 128, num_heads: 4, num_kv_heads: 2}
data: {context_tokens: 512, global_batch_tokens: 4096, sources: {random: {path: PREFIX}}}
planner: {capacity_tokens: 1024}
train: {tokens: 100M, precision: fp32, threads: 1}
"""
EOD, VOCAB = 256, 257


def bench_step(steps: int = 40) -> None:
    """Print the ratios of `steps` alternating steps each."""
    generator = np.random.default_rng(0)
    mixed = np.clip(generator.lognormal(5.5, 1.2, 4000), 2, 8192).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(CONFIG.replace("PREFIX", f"{folder}/none"))
        config = finalize(config, {"random": 1}, VOCAB)
        ranks = distributed.start(config)
        ours = OurStep(config, ranks, write_corpus(Path(folder) / "mixed", mixed))
        bare = BareStep(config, ranks, ours)
        _report("bare megatron-core loop", *_alternate(ours, bare, steps), goal=1.05)
        ours = OurStep(config, ranks, write_corpus(Path(folder) / "full", np.full(2000, 512)))
        _report("plain PyTorch GPT", *_alternate(ours, PlainStep(config), steps))
        distributed.stop()


def write_corpus(prefix: Path, lengths: np.ndarray) -> Path:
    """Random documents of the given lengths as a bare Megatron prefix."""
    generator, writer = np.random.default_rng(1), ShardWriter(prefix, np.uint16)
    for length in lengths:
        writer.add(np.append(generator.integers(0, EOD, length - 1), EOD))
    writer.close()
    return prefix


class OurStep:
    """Our step, from the cursor to the updated weights."""

    def __init__(self, config: RunConfig, ranks: Ranks, prefix: Path) -> None:
        info = describe(str(prefix), vocab_size=VOCAB, eod_id=EOD)
        shard = Shard.open(info.train)
        model = build_model(config, ranks)
        self.learner = Learner(config, ranks, model, build_optimizer(config, model))
        self.batches = GlobalBatches(config.data, {"random": shard}, config.seed)
        self.plan_lengths = partial(plan_lengths, config, ranks.layout)
        plans = start_plans(config.planner, ranks, None)
        problem_of = partial(step_problem, config, ranks.layout)
        over = partial(is_over, train=config.train)
        ahead = config.planner.ahead_steps
        self.feed = Feed(self.batches, problem_of, ranks, plans, ahead, over)
        source = TokenSource("random", shard, EOD, VOCAB)
        self.reader = MicroBatchReader(
            [source], 0, pack_multiple(config, ranks.device), ranks.device
        )
        self.cursor = Cursor()

    def next_micro_batches(self) -> list[MicroBatch]:
        """The batch that the next call will train on, in memory."""
        batch, _ = self.batches.next(self.cursor)
        return list(self.reader.read(self.plan_lengths(batch.length), batch))

    def __call__(self) -> None:
        planned = self.feed.take(self.cursor)
        train_step(
            self.learner,
            self.reader.read(planned.plan, planned.batch),
            len(planned.plan.rings_of(0)),
            planned.batch.num_tokens,
            planned.after.tokens_seen,
        )
        self.cursor = planned.after


class BareStep:
    """What a loop on megatron-core cannot do without, on the micro-batches of our next step."""

    def __init__(self, config: RunConfig, ranks: Ranks, ours: OurStep) -> None:
        (self.model,), self.ours = build_model(config, ranks).chunks, ours
        options = OptimizerConfig(
            lr=1e-4, clip_grad=1.0, weight_decay=0.1, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(
            options, [self.model], use_gloo_process_groups=False
        )
        self.micro_batches: list[MicroBatch] = []

    def prepare(self) -> None:
        """Outside the clock: take the same batch as our next step."""
        self.micro_batches = self.ours.next_micro_batches()

    def __call__(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_bare_forward,
            data_iterator=iter(self.micro_batches),
            model=[self.model],
            num_microbatches=len(self.micro_batches),
            seq_length=1024,
            micro_batch_size=1,
            forward_only=False,
        )
        tokens = sum(batch.num_tokens for batch in self.micro_batches)
        finalize_model_grads([self.model], torch.tensor(tokens))
        self.optimizer.step()


def _bare_forward(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    loss_T = model(
        batch.tokens_T[None],
        None,
        None,
        labels=batch.targets_T[None],
        packed_seq_params=batch.segments,
    )

    def summed(loss_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        loss = (loss_T.flatten() * batch.loss_mask_T).sum()
        return loss, torch.tensor(batch.num_tokens, dtype=torch.int32), {}

    return loss_T, summed


class PlainStep:
    """The plain model on as many whole contexts as a batch of ours holds."""

    def __init__(self, config: RunConfig) -> None:
        self.model = PlainGpt(config.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        context = config.data.context_tokens
        self.sequences = config.data.global_batch_tokens // context
        self.ids = torch.randint(0, EOD, (self.sequences, context + 1))
        self.rows = config.planner.capacity_tokens // context

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        for ids in self.ids.split(self.rows):
            logits = self.model(ids[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
            (loss / self.ids[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _alternate(
    ours: OurStep, peer: Callable[[], None], steps: int
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(steps + 2):
        if isinstance(peer, BareStep):
            peer.prepare()
        order = [(peer, times[1]), (ours, times[0])]
        for run, kept in order:
            began = time.perf_counter()
            run()
            if step >= 2:  # the first steps allocate
                kept.append(time.perf_counter() - began)
    return times


def _report(peer: str, ours: list[float], theirs: list[float], goal: float | None = None) -> None:
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(
        f"our step {1e3 * mine:.1f} ms, {peer} {1e3 * other:.1f} ms: "
        f"ratio {mine / other:.3f}{f' (goal: at most {goal})' if goal else ''}, "
        f"medians of {len(ours)} alternating steps"
    )
