"""Runs on documents with fill-in-the-middle: the same on rings and after a resume."""

import pytest
from crash_drill import curve
from test_train import command
from tiny_corpus import tiny_config

FIM = "data.sources.tiny.fim={rate: 0.6, prefix_id: 257, suffix_id: 258, middle_id: 259}"
WORDS = (FIM, "model.vocab_size=260", "train.tokens=6000", "eval.every_steps=100")


def losses(run_dir):
    """The loss of each step."""
    return {step: row["loss"] for step, row in curve(run_dir).items() if "loss" in row}


def test_rings_and_resumes_read_the_same_documents(ranks, tmp_path):
    config = tiny_config(tmp_path / "corpus")

    def train(world, name, *words):
        run = ranks(world, command, "train", config, f"run_dir={tmp_path / name}", *WORDS, *words)
        return run[0]

    assert train(1, "one")[0] == 0
    stop = ("planner.capacity_tokens=64", "train.stop_after_steps=3")
    assert train(2, "two", *stop)[0] == 0
    status, said = train(2, "two", f"{FIM[:-1]}, spm: 0}}", "--resume", "latest")
    assert status == 2 and "fim-0.6-0.5-128" in said and "fim-0.6-0.0-128" in said
    assert train(2, "two", stop[0], "--resume", "latest")[0] == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-4)
    assert train(1, "plain", "data.sources.tiny.fim=null")[0] == 0
    assert losses(tmp_path / "plain")[1] != pytest.approx(one[1], rel=1e-4)
    status, said = train(1, "few", "model.vocab_size=258")
    assert status == 2 and "id 259 of a sentinel is outside model.vocab_size = 258" in said
