"""Products in groups, and the way of tokens to their experts, against loops over experts."""

from types import SimpleNamespace

import pytest
import torch

from megascale.fused import grouped
from megascale.fused.grouped import grouped_linear

SIZES = {
    "all": [3, 5, 4],
    "empty first": [0, 7, 5],
    "empty last": [7, 5, 0],
    "one has all": [0, 12, 0],
    "no rows": [0, 0, 0],
}


def plain(x, weight, sizes):
    """A linear layer for each group."""
    matrices = weight.unflatten(0, (len(sizes), -1))
    return torch.cat([rows @ m.T for rows, m in zip(x.split(sizes), matrices)])


def given(sizes, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(sizes) * 16, 8, dtype=dtype, requires_grad=True)
    return x, weight, torch.tensor(sizes).cumsum(0).int(), torch.randn(sum(sizes), 16, dtype=dtype)


def check(sizes, **options):
    x, weight, ends, factors = given(sizes, **options)
    expected = plain(x, weight, sizes)
    gradients = torch.autograd.grad((expected * factors).sum(), (x, weight))
    output = grouped_linear(x, weight, ends)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad((output * factors).sum(), (x, weight))
    torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_groups_are_linear_layers_of_their_own(sizes):
    check(sizes)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_kernel_is_called_as_torch_wants(monkeypatch, sizes, capability):
    """By torch's own operator for CPU. On some devices empty groups have what the memory had."""
    plain_mm = torch.nn.functional.grouped_mm

    def on_device(left, right, offs):
        assert offs.dtype == torch.int32
        result = plain_mm(left, right, offs=offs)
        if right.dim() == 2 and capability == (10, 0):
            for expert, size in enumerate(sizes):
                if size == 0:
                    result[expert] = float("nan")
        return result

    monkeypatch.setattr(grouped, "has_kernel", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", on_device)
    check(sizes, dtype=torch.float32)


def test_gradients_that_repeat_one_number_are_taken():
    """The gradient of a sum has no strides that a kernel could read."""
    x, weight, ends, _ = given([3, 9])
    grouped_linear(x, weight, ends).sum().backward()
    expected = torch.autograd.grad(plain(x, weight, [3, 9]).sum(), weight)
    torch.testing.assert_close((weight.grad,), expected)


@pytest.mark.parametrize("tokens, experts, top_k", [(9, 4, 2), (1, 4, 3), (7, 3, 1), (0, 4, 2)])
def test_tokens_go_to_their_experts_and_back(tokens, experts, top_k):
    """Each expert multiplies by a number of its own; the oracle adds up token by token."""
    from megascale.model.dispatch import Dispatcher

    torch.manual_seed(tokens)
    options = {"dtype": torch.float64, "requires_grad": True}
    x, probs = torch.randn(tokens, 1, 5, **options), torch.rand(tokens, experts, **options)
    chosen = torch.zeros(tokens, experts).bool()
    for token in range(tokens):
        chosen[token, torch.randperm(experts)[:top_k]] = True
    factors = torch.arange(1, experts + 1, dtype=torch.float64)
    weights = probs.where(chosen, 0) * factors
    expected = x * weights.sum(dim=1)[:, None, None]
    theirs = SimpleNamespace(ep_group=None, tp_group=None, tp_ep_group=None)
    dispatcher = Dispatcher(SimpleNamespace(moe_router_topk=top_k), experts, theirs)

    rows, weights = dispatcher.dispatch_preprocess(x, chosen, probs)
    rows, weights = dispatcher.token_dispatch(rows, weights)
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    assert counts.equal(chosen.sum(dim=0))
    by_token = chosen.T.nonzero()[:, 1]  # the order of experts, then of tokens
    assert rows.equal(x[by_token, 0])
    rows = rows * (weights * factors.repeat_interleave(counts))[:, None]
    output = dispatcher.combine_postprocess(
        dispatcher.token_combine(dispatcher.combine_preprocess(rows))
    )
    torch.testing.assert_close(output, expected)
    factors = torch.randn_like(x)
    found = torch.autograd.grad((output * factors).sum(), (x, probs))
    torch.testing.assert_close(found, torch.autograd.grad((expected * factors).sum(), (x, probs)))


@pytest.mark.parametrize("sizes", [[[2, 0, 1], [0, 0, 3]], [[0, 0, 0], [1, 2, 3]], [[0, 0]]])
def test_rows_that_come_by_sender_are_ordered_by_expert(sizes):
    from megascale.model.dispatch import _by_expert

    came = [(e, s, i) for s, row in enumerate(sizes) for e, n in enumerate(row) for i in range(n)]
    order, inverse = _by_expert(torch.tensor(sizes), len(came))
    assert [came[place] for place in order.tolist()] == sorted(came)
    assert order[inverse].tolist() == list(range(len(came)))
