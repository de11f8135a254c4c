"""What `megascale.mesh` takes from training loops of others, and what it refuses."""

import numpy as np
import pytest
import torch

import megascale
from megascale.mesh import TokenSequence, micro_batches, use_in_transformers

IDS = np.arange(9)
SEQUENCE = TokenSequence(IDS[:-1], IDS[1:])


def batches(*sequences, rank=0, lengths=None, capacity_tokens=16, **more):
    plan = megascale.plan(
        lengths or [8] * len(sequences), num_ranks=2, capacity_tokens=capacity_tokens
    )
    return micro_batches(plan, rank, sequences, **more)


def test_ids_may_be_lists():
    [batch] = batches(TokenSequence(list(IDS[:-1]), list(IDS[1:])))
    assert batch.tokens_T.tolist() == list(range(8)) and batch.targets_T.tolist()[-1] == 8


@pytest.mark.parametrize(
    "sequences, more, message",
    [
        ((IDS,), {}, "sequence 0 is ndarray; give TokenSequence"),
        ((SEQUENCE, None), {}, "sequence 1 is NoneType"),
        ((TokenSequence(IDS, IDS[1:]),), {}, r"shape \(9,\) and targets of \(8,\)"),
        ((TokenSequence(IDS[None, 1:], IDS[None, 1:]),), {}, "one list of ids"),
        ((TokenSequence(IDS[:-1] * 0.5, IDS[1:]),), {}, "ids of float64; ids are whole numbers"),
        ((SEQUENCE,), {"lengths": [8, 8]}, "the plan is for other sequences"),
        ((SEQUENCE,), {"lengths": [7]}, "the plan is for other sequences"),
        ((SEQUENCE,), {"multiple": 0}, "multiple = 0 must be at least 1"),
        ((SEQUENCE,), {"rank": 2}, "rank 2 must be one of 0 to 1"),
        ((SEQUENCE,), {"rank": 0.5}, "rank 0.5 must be one of 0 to 1"),
        ((SEQUENCE,), {"capacity_tokens": 4}, "has 2 ranks; give an axis"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_call(sequences, more, message):
    with pytest.raises(ValueError, match=message):
        batches(*sequences, **more)


def test_a_mask_that_leaves_tokens_out_is_refused():
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    heads = dict(num_attention_heads=2, attn_implementation=use_in_transformers())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))
    [batch] = batches(SEQUENCE)
    inputs = {
        "input_ids": batch.tokens_T[None],
        "position_ids": batch.segments.positions_T[None],
        "segments": batch.segments,
        "use_cache": False,
    }
    mask = torch.ones_like(inputs["input_ids"])
    whole = model(**inputs, attention_mask=mask).logits
    assert torch.equal(whole, model(**inputs).logits)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="takes no mask and no padding"):
        model(**inputs, attention_mask=mask)
