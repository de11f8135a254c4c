"""Every token of a ring is on one rank, and the ranks have the same work."""

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megascale.mesh.packing import TokenSequence, pack
from megascale.mesh.ring_share import RingShare
from megascale.planner.shares import chunk_bounds

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=8)


def shares(lengths, size):
    bounds = chunk_bounds(lengths, size)
    return [RingShare(place, bounds, tuple(range(size)), None) for place in range(size)]


def positions_by_sequence(share):
    """The positions this rank holds of each sequence, from its spans."""
    return [
        [p for start, tokens in share.spans(i) for p in range(start, start + tokens)]
        for i in range(len(share.bounds))
    ]


@given(LENGTHS, st.integers(2, 9))
@example([1, 1, 1, 1], 2)
def test_every_token_is_on_exactly_one_rank(lengths, size):
    held = [positions_by_sequence(share) for share in shares(lengths, size)]
    for i, length in enumerate(lengths):
        assert sorted(p for on_rank in held for p in on_rank[i]) == list(range(length))


@given(LENGTHS, st.integers(2, 9))
@example([1, 1, 1, 1], 2)
def test_no_rank_holds_more_than_its_part_of_the_tokens(lengths, size):
    """So a ring that fits its ranks together fits each one."""
    for share in shares(lengths, size):
        assert share.num_tokens(share.place) == sum(share.lengths()) <= -(-sum(lengths) // size)
        assert all(abs(n - s / size) < 1 for n, s in zip(share.lengths(), lengths))


@given(st.integers(1, 2000), st.integers(2, 9))
def test_the_mask_area_is_shared_equally(length, size):
    """A token at position p sees p + 1 keys. Chunk sizes differ by at most 1, so areas differ
    from the mean by less than 2 * length, and not at all where 2 * size divides the length."""
    areas = [sum(p + 1 for p in positions_by_sequence(s)[0]) for s in shares([length], size)]
    mean = length * (length + 1) / 2 / size
    for area in areas:
        assert abs(area - mean) <= 2 * length
        assert area == mean or length % (2 * size)


def test_a_share_lies_as_its_two_chunks():
    share = shares([12], 3)[1]
    assert share.bounds.tolist() == [[0, 2, 4, 6, 8, 10, 12]]
    assert share.spans(0) == [(2, 2), (8, 2)]
    assert shares([12], 3)[2].spans(0) == [(4, 4)]  # chunks 2 and 3 are neighbours
    assert share.positions().tolist() == [2, 3, 8, 9]


@given(LENGTHS, st.integers(2, 5), st.integers(1, 4))
def test_a_pack_of_a_share(lengths, size, multiple):
    cpu, num_tokens = torch.device("cpu"), 0
    for share in shares(lengths, size):
        held = positions_by_sequence(share)
        parts = [
            TokenSequence(np.array(p, dtype=np.int64) + 1000 * i, np.array(p, dtype=np.int64))
            for i, p in enumerate(held)
        ]
        batch = pack(parts, 7, multiple, cpu, share)
        mine = share.num_tokens(share.place)
        num_tokens += batch.num_tokens
        assert len(batch.tokens_T) % multiple == 0 and len(batch.tokens_T) > 0
        assert batch.segments.ring is share and sum(batch.segments.lengths) == len(batch.tokens_T)
        assert batch.segments.positions_T[:mine].tolist() == sum(held, [])
        assert batch.tokens_T[:mine].tolist() == [
            x + 1000 * i for i, p in enumerate(held) for x in p
        ]
        assert batch.loss_mask_T.tolist() == [1.0] * mine + [0.0] * (len(batch.tokens_T) - mine)
    assert num_tokens == sum(lengths)
