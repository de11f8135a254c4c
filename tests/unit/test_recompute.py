"""Outputs that are computed again: the same gradients, less memory, also with other hooks."""

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megascale.fused.recompute import computed_by, recomputing
from megascale.fused.swiglu import swiglu

PARTS = frozenset({"norms", "swiglu", "experts"})
NONE = frozenset()


def given():
    torch.manual_seed(0)
    shapes = ((6, 8), (8, 10), (5, 3), (5, 3))
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def layer(x, first, second, third):
    """A norm, SwiGLU, and two products that save its output."""
    norm = lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:])  # noqa: E731
    hidden = swiglu(computed_by("norms", norm(x), norm, x) @ first)
    return hidden @ second + hidden.view(2, 3, 5).flatten(0, 1) @ third


def kept_bytes(parts):
    """(output, gradients, bytes of what is kept beside inputs)."""
    tensors, kept = given(), {}
    own = {tensor.untyped_storage()._cdata for tensor in tensors}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor), recomputing(parts):
        output = layer(*tensors)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    return output, gradients, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("part, elements", [("norms", 6 * 8), ("swiglu", 6 * 5)])
def test_gradients_are_bit_equal_and_outputs_are_not_kept(part, elements):
    """Hooks outside see all that is kept, so that offload moves it."""
    output, gradients, before = kept_bytes(NONE)
    again, found, after = kept_bytes(frozenset({part}))
    assert before - after == 4 * elements
    assert again.equal(output)
    assert all(a.equal(b) for a, b in zip(found, gradients, strict=True))


def test_an_output_is_computed_once_for_all_who_saved_it():
    calls = []
    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def double(x):
        calls.append(x)
        return 2 * x

    with recomputing(PARTS):
        output = computed_by("norms", double(x), double, x)
        total = (output @ weight).sum() + (output @ weight.T).sum() + output.exp().sum()
    gradients = torch.autograd.grad(total, (x, weight), retain_graph=True)
    assert len(calls) == 2
    again = torch.autograd.grad(total, (x, weight))
    assert all(a.equal(b) for a, b in zip(gradients, again, strict=True))


def test_nothing_is_left_after_the_backward_pass():
    x = torch.randn(4, 4, requires_grad=True)
    with recomputing(PARTS):
        output = computed_by("norms", 2 * x, lambda x: 2 * x, x)
        seen = weakref.ref(output)
        total = output.square().sum()
    del output
    assert seen() is None
    total.backward()
    assert x.grad.equal(8 * x)


def test_weights_of_experts_are_inputs_too():
    tensors = torch.randn(6, 10, requires_grad=True), torch.rand(6, requires_grad=True)

    def gradients(parts):
        with recomputing(parts):
            total = swiglu(*tensors).square().sum()
        return torch.autograd.grad(total, tensors)

    for found, expected in zip(gradients(PARTS), gradients(NONE), strict=True):
        assert found.equal(expected)


@pytest.mark.parametrize(
    "options, problem",
    [
        (["train.recompute_parts=[norms]"], "goes with train.recompute=selective, not none"),
        (["train.recompute=selective", "train.recompute_parts=[]"], "set train.recompute=none"),
        (
            ["train.recompute=selective", "train.recompute_parts=[norms,experts]"],
            "has experts, which the model does not have; it has norms, swiglu",
        ),
        (
            ["train.recompute=selective", "model.implementation=transformer_engine"],
            "needs model.implementation=local",
        ),
    ],
)
def test_parts_that_cannot_be_are_named(options, problem):
    from megascale.config import finalize, parse_config
    from megascale.errors import UserError

    text = "data: {sources: {a: {path: none}}}"
    with pytest.raises(UserError, match=problem):
        finalize(parse_config(text, options), {"a": 1000}, 100)
