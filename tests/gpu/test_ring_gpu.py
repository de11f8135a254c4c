"""The CUDA kernel of rings; the twin of the kernel test in tests/unit/test_attend.py."""

import pytest
import torch

from megascale.mesh.kernels import DENSE, VARLEN, Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_QUERIES, NUM_KEYS = (100, 1, 37), (120, 5, 37)


@pytest.mark.parametrize("causal, left", [(False, None), (True, None), (True, 16), (False, 50)])
def test_varlen_follows_dense(causal, left):
    """Segments of queries over segments of keys, also of other lengths, as a ring's hop has."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    num_keys = NUM_QUERIES if causal else NUM_KEYS
    q = torch.randn(sum(NUM_QUERIES), 8, 64, device=device)
    k, v = (torch.randn(sum(num_keys), 2, 64, device=device) for _ in range(2))
    grad = torch.randn_like(q)
    exact = []
    parts = zip(q.split(NUM_QUERIES), k.split(num_keys), v.split(num_keys), grad.split(NUM_QUERIES))
    for q_one, k_one, v_one, grad_one in parts:
        call = Call(slice(None), slice(None), causal, left, (len(q_one), len(k_one)))
        out, lse = DENSE.forward(q_one, k_one, v_one, call)
        exact.append((out, lse, *DENSE.backward(grad_one, q_one, k_one, v_one, out, lse, call)))
    exact = [torch.cat(part) for part in zip(*exact)]
    bounds = tuple(
        torch.tensor([0, *lengths], device=device).cumsum(0).int()
        for lengths in (NUM_QUERIES, num_keys)
    )
    longest = max(NUM_QUERIES), max(num_keys)
    call = Call(slice(None), slice(None), causal, left, longest, bounds)
    halves = [x.bfloat16() for x in (q, k, v)]
    out, lse = VARLEN.forward(*halves, call)
    grads = VARLEN.backward(grad.bfloat16(), *halves, out, lse, call)
    for actual, right in zip((out, lse, *grads), exact):
        assert actual.shape == right.shape
        assert (actual.float() - right).abs().max() < 0.05 * right.abs().max()
