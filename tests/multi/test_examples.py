"""The examples of tools/examples: megascale's planner in training loops of others."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "tools/examples"
STEPS = 3


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(name, capacity_tokens):
    """(losses, gradients of the last step by name), as the example leaves them on this rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    module = load(name)
    module.CAPACITY_TOKENS = capacity_tokens
    losses, model = module.train(STEPS)
    gradients = {
        key: (weight.grad if weight.grad is not None else weight.main_grad).numpy().copy()
        for key, weight in model.named_parameters()
    }
    return losses, gradients


def padded():
    """The same steps by `transformers` alone: all documents of a step in one padded batch."""
    import torch

    example = load("pytorch_loop")
    model = example.make_model("sdpa")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        documents = example.documents(step)
        longest = max(len(ids) for ids in documents) - 1
        shape = (len(documents), longest)
        inputs, targets = np.zeros(shape, np.int64), np.full(shape, -100)
        for row, ids in enumerate(documents):
            inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask = torch.from_numpy(targets >= 0)
        optimizer.zero_grad()
        logits = model(torch.from_numpy(inputs), attention_mask=mask.long()).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {key: weight.grad.numpy() for key, weight in model.named_parameters()}


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        assert found[1][key] == pytest.approx(gradient, abs=3e-6), key


@pytest.mark.parametrize("world", [2, 3])
def test_a_plain_loop_has_the_gradients_of_padded_batches(ranks, world):
    expected = padded()
    for found in ranks(world, trained, "pytorch_loop", 512):
        assert_equal(found, expected)


def test_a_megatron_core_loop_does_not_depend_on_its_ranks(ranks):
    (alone,) = ranks(1, trained, "megatron_core_loop", 4096)
    assert alone[0][0] > 6 and np.isfinite(alone[0]).all()
    for found in ranks(3, trained, "megatron_core_loop", 512):
        assert found[0] == pytest.approx(alone[0], rel=1e-5)
