"""What a resume says of a config that has changed since the checkpoint."""

import pytest

from megascale.config import dump_config, finalize, parse_config
from megascale.config.lr_curves import USED, options_of
from megascale.errors import UserError
from megascale.run.resume import compare_configs

BASE = """
model: {vocab_size: 257, num_layers: 2, hidden_size: 32, num_heads: 2}
data: {sources: {web: {path: a}, code: {path: b}}, context_tokens: 128, global_batch_tokens: 1024}
train: {tokens: 100000}
"""
SEGMENTS = "{shape: linear, tokens: 1000, lr: 4e-3}, {shape: cosine, tokens: 9000, lr: 1e-4}"


def finalized(*overrides):
    return finalize(parse_config(BASE, overrides), {"web": 10_000, "code": 10_000}, 257)


def said(before, after, tokens_seen=50_000):
    return compare_configs(dump_config(finalized(*before)), finalized(*after), tokens_seen)


def test_a_rate_is_named_as_the_user_names_it():
    lines = said(["optim.lr=4e-3"], ["optim.lr=1e-3"])
    assert lines == [
        "optim.lr: 0.004 -> 0.001",
        "optim.min_lr: 0.0004 -> 0.0001",
        "learning rate at 50,000 tokens: 0.002229 -> 0.0005571",
    ]


def test_another_curve_is_named_too():
    lines = said(["optim.lr=4e-3"], ["optim.lr=4e-3", "optim.curve=constant"])
    assert lines[0] == 'optim.curve: "cosine" -> "constant"' and "optim.schedule" not in str(lines)
    assert lines[-1] == "learning rate at 50,000 tokens: 0.002229 -> 0.004"
    lines = said(["train.tokens=100K"], ["train.tokens=200K", "optim.warmup_tokens=1000"])
    assert lines[0] == "train.tokens: 100000 -> 200000" and "warmup" not in str(lines)


def test_what_lies_in_lists_has_a_dotted_name():
    rest = "{lr: 1e-4}"
    before = f"optim.schedule=[{SEGMENTS}, {{shape: linear, tokens: 5, lr: 1e-5}}, {rest}]"
    lines = said([before], [before.replace("4e-3", "2e-3")], tokens_seen=90_000)
    assert lines == ["optim.schedule[0].lr: 0.004 -> 0.002"]  # the rate now is as it was
    stages = "data.stages=[{tokens: 1000, blend: {web: 1.0}}, {blend: {web: 0.5, code: 0.5}}]"
    more = stages.replace("code: 0.5", "code: 0.75")
    assert said([stages], [more]) == ["data.stages[1].blend.code: 0.5 -> 0.75"]
    assert said([], ["train.stop_after_steps=4"]) == ["train.stop_after_steps: null -> 4"]
    assert said([], []) == []


def test_another_run_is_refused_by_name():
    with pytest.raises(UserError, match="model.hidden_size was 32 .* and is 64 now"):
        said([], ["model.hidden_size=64"])


@pytest.mark.parametrize("curve", USED)
def test_the_options_of_a_curve_come_back(curve):
    optim = finalized(f"optim.curve={curve}", "optim.lr=4e-3").optim
    named = options_of(optim.schedule)
    assert named.curve == curve and named.lr == 4e-3 and named.min_lr in (None, 4e-4)
    assert options_of(optim.schedule[:1]) is None
