"""`planner.capacity_tokens: auto` on ranks that believe to have a GPU: one number, and it stays."""

import json
from unittest.mock import patch

import yaml
from test_train import command
from tiny_corpus import tiny_config

from megascale.config import Layout
from megascale.devices.memory import fullest, with_capacity
from megascale.devices.table import DeviceMemory
from megascale.run.resolve import load_run


def train_with_memory(memory, *words):
    """`command` on a rank whose device has `memory[rank]` bytes."""
    import os

    from megascale.training import capacity

    mine = memory[int(os.environ["RANK"])]
    with patch.object(capacity, "device_memory", lambda device: ("a device", mine)):
        return command("train", *words)


def steps_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


def test_a_resumed_run_keeps_its_number(ranks, tmp_path):
    path = tiny_config(tmp_path / "corpus", planner="{capacity_tokens: auto}")
    words = (path, "data.context_tokens=512", "train.tokens=8000", "eval.every_steps=0")
    config = load_run(path, words[1:]).config

    def bytes_for(tokens, world):
        device = DeviceMemory(memory_bytes=1)
        return fullest(with_capacity(config, tokens), Layout.of(config, world), device)

    small, large = (bytes_for(tokens, 2) for tokens in (256, 512))

    def train(name, world, memory, *more):
        run_dir = tmp_path / name
        answers = ranks(world, train_with_memory, memory, *words, f"run_dir={run_dir}", *more)
        assert {status for status, _ in answers} == {0}, answers[0][1]
        written = yaml.safe_load((run_dir / "config.yaml").read_text())
        return written["planner"]["capacity_tokens"], answers[0][1], run_dir

    number, said, calm = train("calm", 2, (large, small))
    assert number == 256 and "capacity_tokens: auto is 256, what a device holds" in said
    stop = "train.stop_after_steps=4"
    assert train("broken", 2, (small, large), stop)[0] == 256
    number, said, broken = train("broken", 2, (large, large), "--resume", "auto")
    assert number == 256 and "auto is 256, as when the run was started" in said
    assert "capacity_tokens: 256 ->" not in said
    assert steps_of(broken) == steps_of(calm) and len(steps_of(calm)) >= 7
    assert train("moved", 2, (small, small), stop)[0] == 256
    number, said, _ = train("moved", 1, (bytes_for(512, 1),), "--resume", "auto")
    assert number == 512 and "changed since the checkpoint: planner.capacity_tokens: 256" in said
