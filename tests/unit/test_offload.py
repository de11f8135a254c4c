"""Selective activation offload: what is planned, and that the run is the same with it."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megascale.config import Layout, finalize, parse_config
from megascale.devices.memory import with_capacity
from megascale.errors import UserError
from megascale.mesh import offload
from megascale.mesh.offload import HostBlocks, Offloader, Traffic
from megascale.mesh.packing import TokenSequence
from megascale.mesh.reader import MicroBatchReader
from megascale.model.activations import activation_bytes, layer_activation_bytes
from megascale.planner import Ring, StepPlan
from megascale.run.step_problem import offload_model, plan_lengths

CPU = torch.device("cpu")
PLAN = """
model: {num_layers: 8, hidden_size: 64, num_heads: 4, num_kv_heads: 2}
parallel: {pipeline: 2}
data: {sources: {random: {path: none}}, context_tokens: 64}
train: {precision: bf16}
"""


def planned(*overrides):
    return finalize(parse_config(PLAN, overrides), {"random": 10000}, 257)


def test_no_copy_bandwidth_plans_no_offload():
    config = planned()
    assert offload_model(config, Layout.of(config, 4)) is None


@pytest.mark.parametrize("overrides", [(), ("train.recompute=full",), ("parallel.tensor=2",)])
def test_the_offload_model_follows_the_config(overrides):
    config = planned("planner.host_copy_bytes_per_s=2e9", *overrides)
    layout = Layout.of(config, 4)
    model = offload_model(config, layout)
    assert (model.stage_layers, model.copy_bytes_per_s) == (4, 2e9)
    assert model.bytes_per_token == layer_activation_bytes(config, layout)
    # The first of two stages holds two micro-batches of four layers each, and no logits.
    layers, twice = 2 * 4 * model.bytes_per_token, with_capacity(config, 128)
    more = activation_bytes(twice, layout, 0) - activation_bytes(config, layout, 0)
    assert layers < more / 64 < 1.5 * layers or "train.recompute=full" in overrides


@pytest.mark.parametrize("rate", ["0", "-1", ".inf"])
def test_a_copy_bandwidth_is_a_rate(rate):
    with pytest.raises(UserError, match="planner.host_copy_bytes_per_s .* finite .* such as "):
        planned(f"planner.host_copy_bytes_per_s={rate}")


def test_plans_know_of_the_offload():
    config = planned("planner.host_copy_bytes_per_s=2e9")
    assert plan_lengths(config, Layout.of(config, 4), [64, 3]).stage_layers == 4
    config = planned()
    assert plan_lengths(config, Layout.of(config, 4), [64, 3]).stage_layers == 2


def test_the_ratio_travels_with_the_micro_batch():
    class Source:
        first_id = 0

        def read(self, document, start, length):
            return TokenSequence(np.zeros(length, np.int64), np.zeros(length, np.int64))

    rings = tuple(Ring(i, (0,), (i,), offload, i) for i, offload in enumerate((0.25, 0.0)))
    plan = StepPlan(1, "free", 64, 1.0, 1.0, 0.0, rings)
    zeros = np.zeros(2, np.int64)
    batch = SimpleNamespace(source=zeros, document=zeros, start=zeros, length=zeros + 3)
    reader = MicroBatchReader([Source()], 0, 1, CPU)
    assert [micro_batch.offload for micro_batch in reader.read(plan, batch)] == [0.25, 0.0]


TOKENS, HIDDEN, WIDE = 10, 8, 24
ROW = TOKENS * 4
SAVED = {"input": HIDDEN * ROW, "product": 2 * WIDE * ROW, "tanh": WIDE * ROW, "gated": WIDE * ROW}
"""Bytes of what one toy layer saves; its two halves are views of one product."""


class ToyLayer(torch.nn.Module):
    """A gated feed-forward block that multiplies by a table it shares with the other layers."""

    def __init__(self, index):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.up = torch.nn.Parameter(torch.randn(HIDDEN, 2 * WIDE, generator=generator) / 9)
        self.down = torch.nn.Parameter(torch.randn(WIDE, HIDDEN, generator=generator) / 9)
        self.fails = False

    def forward(self, hidden_states, table):
        product = hidden_states @ self.up
        self.product = StorageWeakRef(product.untyped_storage())
        first, second = product.chunk(2, dim=-1)
        gate = first.tanh()
        self.gate = StorageWeakRef(gate.untyped_storage())
        if self.fails:
            raise RuntimeError("a layer failed")
        return hidden_states + (gate * second) @ self.down * table


class Copied(NamedTuple):
    """One storage on its way."""

    host: int
    flat: int
    num_bytes: int
    storage: StorageWeakRef


class Toy:
    """Five layers, and what their offloader copies."""

    def __init__(self, smallest_bytes=0, block_bytes=1 << 20):
        self.layers = [ToyLayer(index) for index in range(5)]
        self.table = torch.linspace(0.5, 1.0, HIDDEN * TOKENS).reshape(TOKENS, HIDDEN)
        self.offloader = Offloader(self.layers, CPU, smallest_bytes, block_bytes)
        self.left, self.came_back = [], []
        copies = self.offloader.copies
        leave, come_back = copies.leave, copies.come_back
        copies.leave = lambda host, flat: (self._note(self.left, host, flat), leave(host, flat))[1]
        copies.come_back = lambda host, flat, left: (
            self._note(self.came_back, host, flat),
            come_back(host, flat, left),
        )[1]

    def _note(self, log, host, flat):
        storage = StorageWeakRef(flat.untyped_storage())
        log.append(Copied(host[0].data_ptr(), flat.data_ptr(), len(flat), storage))

    def forward(self, ratio, seed=0):
        x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
        x = x.requires_grad_()
        with self.offloader.micro_batch(ratio):
            for layer in self.layers:
                x = layer(hidden_states=x, table=self.table)
        return x.square().sum()

    def gradients(self):
        weights = [weight for layer in self.layers for weight in layer.parameters()]
        grads = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        return grads

    @property
    def num_used(self):
        blocks = self.offloader.blocks
        return blocks.num_blocks - blocks.num_free


def same(grads, expected):
    return all(torch.equal(grad, other) for grad, other in zip(grads, expected, strict=True))


@pytest.fixture
def expected():
    toy = Toy()
    toy.forward(0).backward()
    return toy.gradients()


@pytest.mark.parametrize("block_bytes", [1 << 20, 1000])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.77, 1])
def test_gradients_are_the_same_and_the_account_reaches_the_ratio(expected, ratio, block_bytes):
    toy = Toy(block_bytes=block_bytes)
    toy.forward(ratio).backward()
    assert same(toy.gradients(), expected)
    traffic = toy.offloader.take_traffic()
    assert traffic.saved_bytes == (3 * sum(SAVED.values()) if ratio else 0)
    assert traffic.moved_bytes == sum(copied.num_bytes for copied in toy.left)
    error = abs(traffic.moved_bytes - ratio * traffic.saved_bytes)
    assert error <= max(SAVED.values()) / 2
    assert toy.offloader.take_traffic() == Traffic(0, 0)


def test_the_choice_is_the_same_every_time():
    chosen = []
    for _ in range(2):
        toy = Toy()
        toy.forward(0.4).backward()
        chosen.append([copied.num_bytes for copied in toy.left])
    assert chosen[0] == chosen[1] and chosen[0]


def test_ratio_zero_installs_nothing():
    toy = Toy()
    layer = toy.layers[1]
    with toy.offloader.micro_batch(0):
        assert not any(len(x._forward_pre_hooks) + len(x._forward_hooks) for x in toy.layers)
        x = torch.ones(TOKENS, HIDDEN, requires_grad=True)
        layer(hidden_states=x, table=toy.table)
        y = x.square()
    assert y.grad_fn._saved_self is x
    assert not toy.left


def test_first_and_last_layers_parameters_and_shared_tables_stay(monkeypatch):
    layers, write = [], offload._Tape.write
    monkeypatch.setattr(
        offload._Tape, "write", lambda tape, flat, at: (layers.append(at), write(tape, flat, at))[1]
    )
    toy = Toy()
    toy.forward(1).backward()
    assert layers == [1] * len(SAVED) + [2] * len(SAVED) + [3] * len(SAVED)
    own = {weight.data_ptr() for layer in toy.layers for weight in layer.parameters()}
    assert not {copied.flat for copied in toy.left} & (own | {toy.table.data_ptr()})


def test_a_weight_is_handed_on_itself_and_an_output_without_its_graph():
    """torch calls the hook with the saved tensor; a weight carries `main_grad`."""
    toy = Toy()
    window = offload._Window(toy.offloader, 0.0)
    weight = toy.layers[0].up
    assert window._pack(weight) is weight
    assert window._pack(weight * 2).grad_fn is None


def test_small_storages_stay(expected):
    toy = Toy(smallest_bytes=SAVED["tanh"] + 1)
    toy.forward(1).backward()
    assert [copied.num_bytes for copied in toy.left] == [SAVED["product"]] * 3
    assert same(toy.gradients(), expected)


@pytest.mark.parametrize("ratio, freed", [(0, []), (1, [1, 2, 3])])
def test_what_moves_is_freed_on_the_device(ratio, freed):
    toy = Toy()
    loss = toy.forward(ratio)
    assert [i for i, layer in enumerate(toy.layers) if layer.product.expired()] == freed
    loss.backward()


def test_what_stays_is_freed_with_the_graph():
    toy = Toy()
    gc.disable()
    try:
        loss = toy.forward(0.01)
        assert not toy.left and not any(layer.product.expired() for layer in toy.layers)
        del loss
        assert all(layer.gate.expired() for layer in toy.layers)
    finally:
        gc.enable()


def test_a_new_storage_is_not_taken_for_one_that_is_gone():
    class Deep(torch.nn.Module):
        def forward(self, hidden_states):
            for _ in range(100):
                hidden_states = hidden_states.tanh()
            return hidden_states

    offloader = Offloader([Deep() for _ in range(3)], CPU, smallest_bytes=0)
    grads = []
    for ratio in (0, 1):
        first = x = torch.linspace(-1, 1, 50, requires_grad=True)
        with offloader.micro_batch(ratio):
            for layer in offloader.layers:
                x = layer(hidden_states=x)
        x.sum().backward()
        grads.append(first.grad)
    assert torch.equal(*grads)
    assert offloader.take_traffic().moved_bytes == 100 * 50 * 4


def test_layers_come_back_in_reverse_and_one_ahead(expected):
    toy = Toy()
    loss = toy.forward(1)
    layer_of = {copied.host: 1 + i // len(SAVED) for i, copied in enumerate(toy.left)}
    begun, living = {}, {}

    def note(_, layer):
        begun[layer] = len(toy.came_back)
        living[layer] = sum(not copied.storage.expired() for copied in toy.came_back)

    for index, layer in enumerate(toy.layers):
        layer.down.register_hook(partial(note, layer=index))
    loss.backward()
    hosts = [copied.host for copied in toy.came_back]
    assert hosts == [copied.host for copied in reversed(toy.left)]
    assert [layer_of[host] for host in hosts] == sorted(layer_of.values(), reverse=True)
    # When the backward pass of a layer is on its way, the layer before is on its way back.
    fetched = {layer: count // len(SAVED) for layer, count in begun.items()}
    assert fetched == {4: 1, 3: 2, 2: 3, 1: 3, 0: 3}
    assert living[0] == 0 and max(living.values()) <= 2 * len(SAVED)
    assert same(toy.gradients(), expected)


def test_host_memory_is_used_again():
    toy = Toy(block_bytes=4096)
    used = []
    for seed in range(4):
        loss = toy.forward(0.5, seed)
        used.append(toy.num_used)
        loss.backward()
        assert toy.num_used == 0
    blocks = toy.offloader.blocks
    assert used == [blocks.num_blocks] * 4 and blocks.num_blocks > 1


def test_several_micro_batches_are_in_flight():
    toy, ratios = Toy(block_bytes=4096), (1, 0.3, 0)
    alone = []
    for seed in range(3):
        toy.forward(0, seed).backward()
        alone.append(toy.gradients())
    losses = [toy.forward(ratio, seed) for seed, ratio in enumerate(ratios)]
    used = [toy.num_used]
    for seed, loss in enumerate(losses):
        loss.backward()
        assert same(toy.gradients(), alone[seed])
        used.append(toy.num_used)
    assert used[0] > used[1] > used[2] == 0


def test_an_abandoned_step_frees_its_host_memory(expected):
    toy = Toy()
    loss = toy.forward(1)
    assert toy.num_used == 1
    del loss
    assert toy.num_used == 0
    toy.forward(1).backward()
    assert same(toy.gradients(), expected) and toy.offloader.blocks.num_blocks == 1


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_failing_layer_leaves_nothing_behind(expected, at):
    toy = Toy()
    toy.layers[at].fails = True
    with pytest.raises(RuntimeError, match="a layer failed"):
        toy.forward(1)
    assert toy.num_used == 0
    assert not any(len(x._forward_pre_hooks) + len(x._forward_hooks) for x in toy.layers)
    x = torch.ones(3, requires_grad=True)
    assert x.square().grad_fn._saved_self is x  # no hook for saved tensors is left
    toy.layers[at].fails = False
    toy.forward(1).backward()
    assert same(toy.gradients(), expected)


def test_a_graph_can_be_walked_twice(expected):
    toy = Toy()
    loss = toy.forward(1)
    loss.backward(retain_graph=True)
    assert same(toy.gradients(), expected)
    loss.backward()
    assert same(toy.gradients(), expected)
    assert len(toy.came_back) == len(toy.left)


def test_no_gradient_no_offload():
    toy = Toy()
    with torch.no_grad():
        toy.forward(1)
    assert not toy.left and toy.offloader.blocks.num_blocks == 0


def test_a_stage_of_two_layers_has_nothing_to_move():
    toy = Toy()
    toy.layers = toy.offloader.layers = toy.layers[:2]
    toy.forward(1).backward()
    assert not toy.left


class Late:
    """A copy that happens when somebody waits for it, after those before it on its stream."""

    def __init__(self, stream, copy):
        self.stream, self.copy = stream, copy
        stream.append(self)

    def run(self):
        while self in self.stream:
            self.stream.pop(0).copy()


class LateCopies(offload._Copies):
    """Side streams that are as slow as events allow."""

    def __init__(self):
        super().__init__(CPU)
        self.out, self.back, self.longest = [], [], 0

    def leave(self, host, flat):
        source = weakref.ref(flat)

        def copy():
            assert source() is not None, "freed before it was copied"
            super(LateCopies, self).leave(host, source())

        event = Late(self.out, copy)
        self.longest = max(self.longest, len(self.out))
        return event

    def come_back(self, host, flat, left):
        flat.fill_(255)

        def copy():
            left.run()
            super(LateCopies, self).come_back(host, flat, None)

        return Late(self.back, copy)

    def wait(self, event):
        if event is not None:
            event.run()


@pytest.mark.parametrize("ratio", [0.4, 1])
def test_slow_copies_are_waited_for(expected, ratio):
    toy = Toy()
    copies = toy.offloader.copies = LateCopies()
    toy.offloader.blocks = HostBlocks(1000, pinned=False)
    for _ in range(2):
        loss = toy.forward(ratio)
        # One layer's copies run while the next computes; then its memory is wanted.
        assert 0 < copies.longest <= 2 * len(SAVED)
        assert not copies.out
        assert all(layer.product.expired() for layer in toy.layers[1:4]) or ratio < 1
        loss.backward()
        assert same(toy.gradients(), expected)
        assert toy.num_used == 0


def test_memory_of_an_abandoned_prefetch_is_not_used_before_its_copy_ended():
    toy = Toy()
    copies = toy.offloader.copies = LateCopies()
    toy.offloader.blocks = HostBlocks(1000, pinned=False)

    def fail(_):
        raise RuntimeError("in the middle of the backward pass")

    loss = toy.forward(1)
    handle = toy.layers[2].down.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        loss.backward()
    handle.remove()
    del loss
    torch.ones(1, requires_grad=True).sum().backward()  # autograd forgets a failed pass in the next
    assert toy.num_used == 0
    assert not copies.back
