"""Angles of rotary embeddings against those of transformers; layers with attention of their own."""

import numpy as np
import pytest
import torch

from megascale.config import ModelConfig, RopeScalingConfig
from megascale.growth.operators import Growth, grown_model
from megascale.model.attention import rotary_table

SCALINGS = {
    "llama3": ({"low_freq_factor": 1.0, "high_freq_factor": 4.0}, {}),
    "yarn": ({}, {}),
    "yarn whole": (
        {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5, "truncate": False},
        {"high_turns": 8.0, "low_turns": 2.0, "attention_factor": 1.5, "whole_pairs": False},
    ),
    "linear": ({}, {}),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("context", [32, 4096])
def test_scaled_angles_are_those_of_transformers(name, context):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, ours = SCALINGS[name]
    kind = name.split()[0]
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 6.0, **theirs}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=6 * context,
        rope_parameters={**rope, "original_max_position_embeddings": context},
    )
    inverse, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    scaling = RopeScalingConfig(kind=kind, factor=6.0, original_tokens=context, **ours)
    positions = torch.tensor([0, 1, 7, context, 5 * context])
    cosines, sines = rotary_table(positions, 32, 1e4, scaling)
    angles = positions.double()[:, None] * inverse.double()
    for found, wanted in ((cosines, angles.cos()), (sines, angles.sin())):
        np.testing.assert_allclose(found[:, 0], amplitude * wanted, rtol=0, atol=5e-3)


def test_layers_take_their_attention_in_turn():
    scaling = RopeScalingConfig(kind="yarn")
    model = ModelConfig(
        num_layers=4,
        sliding_window=8,
        rope_base=5e5,
        rope_scaling=scaling,
        local_rope_base=1e4,
        attention_pattern=("sliding", "full", "full_nope"),
    )
    found = [model.attention_of(layer) for layer in range(1, 5)]
    assert [one.window for one in found] == [8, None, None, 8]
    assert [one.rotary for one in found] == [(1e4, None), (5e5, scaling), None, (1e4, None)]
    for operator, wanted in (
        ("stack", ["sliding", "full", "full_nope", "sliding"] * 2),
        ("interpolate", ["sliding"] * 2 + ["full"] * 2 + ["full_nope"] * 2 + ["sliding"] * 2),
    ):
        grown = grown_model(model, Growth(operator=operator, factor=2))
        assert [grown.attention_kind(layer) for layer in range(1, 9)] == wanted
