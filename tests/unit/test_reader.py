"""Ranks read their own tokens, all of them together, and nothing twice."""

import numpy as np
import pytest
import torch

from megascale.config import finalize, parse_config
from megascale.corpus.batches import Cursor, GlobalBatches
from megascale.corpus.shards import Shard, ShardWriter
from megascale.errors import RankError
from megascale.mesh.reader import MicroBatchReader, TokenSource
from megascale.planner import Placed, Problem, complete, plan_longest_first
from megascale.planner.cost import CostModel
from megascale.runtime.distributed import HdpAxis

EOD, CONTEXT, RANKS = 256, 32, 3
CONFIG = """
data: {sources: {text: {path: none}}, context_tokens: 32, global_batch_tokens: 600}
"""


class RecordingShard(Shard):
    """Remembers what was read."""

    def read(self, document, start=0, count=None):
        self.reads.append((document, start, count))
        return super().read(document, start, count)


@pytest.fixture
def shard(tmp_path):
    generator, writer = np.random.default_rng(0), ShardWriter(tmp_path / "train", np.uint16)
    for length in generator.integers(1, 120, 60):
        writer.add(np.append(generator.integers(0, EOD, length - 1), EOD))
    writer.close()
    shard = Shard.open(tmp_path / "train")
    shard.__class__ = RecordingShard
    shard.reads = []
    return shard


def test_ranks_read_their_own_tokens_alone(shard):
    config = finalize(parse_config(CONFIG), {"text": 1}, EOD + 1)
    batch, _ = GlobalBatches(config.data, {"text": shard}, seed=1).next(Cursor())
    cost = CostModel(a=1e-9, b=1e-6)
    plan = plan_longest_first(Problem.of(batch.length, RANKS, 64, "free", cost))
    source = TokenSource("text", shard, EOD, EOD + 1)
    read_tokens, targets = 0, []
    for rank in range(RANKS):
        reader = MicroBatchReader([source], rank, 1, torch.device("cpu"))
        shard.reads = []
        mine = sum(micro_batch.num_tokens for micro_batch in reader.read(plan, batch))
        asked = sum(count for _, _, count in shard.reads)
        assert mine <= asked <= mine + len(shard.reads)  # one token before each target
        read_tokens += mine
        targets += [(d, t) for d, s, n in shard.reads for t in range(s + (s > 0), s + n)]
    assert read_tokens == batch.num_tokens
    wanted = {
        (d, t)
        for d, s, n in zip(batch.document, batch.start, batch.length)
        for t in range(s, s + n)
    }
    assert len(targets) == len(set(targets)) and set(targets) == wanted


def ring_plan(batch):
    """Every third sequence alone, the others in rings of two and three."""
    kinds = [((1,),), ((2, 0),), ((0, 2, 1),)]
    placed = [Placed(*kinds[i % 3], (i,)) for i in range(batch.num_sequences)]
    problem = Problem.of(batch.length, RANKS, 64, "free", CostModel(a=1e-9, b=1e-6))
    return complete(problem, placed, 0.0)


def test_ranks_of_a_ring_read_their_own_chunks_alone(shard):
    config = finalize(parse_config(CONFIG), {"text": 1}, EOD + 1)
    batch, _ = GlobalBatches(config.data, {"text": shard}, seed=1).next(Cursor())
    plan, source = ring_plan(batch), TokenSource("text", shard, EOD, EOD + 1)
    axis, pairs = HdpAxis((10, 11, 12), None), []
    for rank in range(RANKS):
        reader = MicroBatchReader([source], rank, 4, torch.device("cpu"), axis)
        shard.reads, before = [], len(pairs)
        for ring, micro_batch in zip(plan.rings_of(rank), reader.read(plan, batch)):
            segments, num_tokens = micro_batch.segments, micro_batch.num_tokens
            if len(ring.ranks) > 1:
                assert segments.ring.ranks == tuple(10 + position for position in ring.ranks)
                assert ring.ranks[segments.ring.place] == rank
            begin = int(batch.start[ring.sequences[0]])
            pairs += zip(
                [int(batch.document[ring.sequences[0]])] * num_tokens,
                (segments.positions_T[:num_tokens] + begin).tolist(),
                micro_batch.tokens_T.tolist(),
                micro_batch.targets_T.tolist(),
            )
        read = sum(count for _, _, count in shard.reads)
        mine = len(pairs) - before
        assert mine <= read <= mine + len(shard.reads)  # one token before each chunk
    assert len(pairs) == batch.num_tokens == len({(d, position) for d, position, _, _ in pairs})
    for document, position, token, target in pairs:
        whole = shard.read(document)
        assert target == whole[position]
        assert token == (whole[position - 1] if position else EOD)


def test_a_ring_needs_an_axis(shard):
    config = finalize(parse_config(CONFIG), {"text": 1}, EOD + 1)
    batch, _ = GlobalBatches(config.data, {"text": shard}, seed=1).next(Cursor())
    reader = MicroBatchReader([TokenSource("text", shard, EOD, EOD + 1)], 0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="ring 1 has 2 ranks; give an axis"):
        list(reader.read(ring_plan(batch), batch))


def test_inputs_are_the_tokens_before_the_targets(shard):
    source = TokenSource("text", shard, EOD, EOD + 1)
    document = int(np.argmax(shard.lengths))
    whole = shard.read(document)
    first, second = source.read(document, 0, CONTEXT), source.read(document, CONTEXT, 10)
    assert first.inputs[0] == EOD and np.array_equal(first.inputs[1:], whole[: CONTEXT - 1])
    assert np.array_equal(first.targets, whole[:CONTEXT])
    assert np.array_equal(second.inputs, whole[CONTEXT - 1 : CONTEXT + 9])
    assert np.array_equal(second.targets, whole[CONTEXT : CONTEXT + 10])


def test_an_id_outside_the_vocabulary_names_its_document(shard):
    with pytest.raises(RankError, match="document 0 holds token 256"):
        TokenSource("text", shard, EOD, vocab_size=256).read(0, 0, int(shard.lengths[0]))
