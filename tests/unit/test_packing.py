"""A micro-batch holds its sequences, then padding that counts for nothing."""

import numpy as np
import torch

from megascale.mesh.packing import TokenSequence, pack

CPU = torch.device("cpu")


def sequence(first, length):
    ids = np.arange(first, first + length + 1)
    return TokenSequence(ids[:-1], ids[1:])


def test_sequences_are_joined_and_padded():
    batch = pack([sequence(10, 3), sequence(50, 2)], pad_id=7, multiple=4, device=CPU)
    assert batch.tokens_T.tolist() == [10, 11, 12, 50, 51, 7, 7, 7]
    assert batch.targets_T.tolist() == [11, 12, 13, 51, 52, 7, 7, 7]
    assert batch.loss_mask_T.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch.segments.lengths == (3, 2, 3)
    assert batch.segments.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.segments.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.num_tokens == 5


def test_no_padding_where_none_is_needed():
    batch = pack([sequence(0, 4)], pad_id=7, multiple=2, device=CPU)
    assert batch.segments.lengths == (4,)


def test_an_empty_micro_batch_is_all_padding():
    batch = pack([], pad_id=7, multiple=2, device=CPU)
    assert batch.tokens_T.tolist() == [7, 7]
    assert batch.num_tokens == 0 and not batch.loss_mask_T.any()
