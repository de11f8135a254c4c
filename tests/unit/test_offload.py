"""Selective activation offload: what is planned, and that the run is the same with it."""

import pytest

from megascale.config import Layout, finalize, parse_config
from megascale.errors import UserError
from megascale.model.counts import activation_bytes, layer_activation_bytes
from megascale.train.describe import offload_model, plan_lengths

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
    # The first of two stages holds two micro-batches of four layers each, and no logits.
    whole, layers = activation_bytes(config, layout, 0) / 64, 2 * 4 * model.bytes_per_token
    assert model.bytes_per_token == layer_activation_bytes(config, layout)
    assert whole == layers or "train.recompute=full" in overrides and layers < whole


@pytest.mark.parametrize("rate", ["0", "-1", ".inf"])
def test_a_copy_bandwidth_is_a_rate(rate):
    with pytest.raises(UserError, match="planner.host_copy_bytes_per_s .* such as 25e9"):
        planned(f"planner.host_copy_bytes_per_s={rate}")


def test_plans_know_of_the_offload():
    config = planned("planner.host_copy_bytes_per_s=2e9")
    assert plan_lengths(config, Layout.of(config, 4), [64, 3]).stage_layers == 4
    config = planned()
    assert plan_lengths(config, Layout.of(config, 4), [64, 3]).stage_layers == 2
