"""A run with experts: what it records, how it resumes, and what `megascale experts` shows."""

import json

import numpy as np
import pytest
from test_train import command
from tiny_corpus import EOD, VOCAB, tiny_config, write_tiny_corpus

MOE = ("model.moe.num_experts=4", "monitor.log_every_steps=5", "model.moe.balance_weight=0.1")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sources, one of them of no more than a tenth."""
    folder = tmp_path_factory.mktemp("corpus")
    prefix = write_tiny_corpus(folder / "other", files=10)
    source = (
        f"{{path: {prefix}, heldout: {folder}/other/heldout, vocab_size: {VOCAB}, eod_id: {EOD}}}"
    )
    path = tiny_config(folder)
    text = path.read_text().replace("  sources:\n", f"  sources:\n    other: {source}\n")
    path.write_text(text)
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("estimate", ["previous", "exact"])
def test_a_run_records_its_experts_and_resumes_bit_equal(ranks, config, tmp_path, estimate):
    words = ("train", config, *MOE, f"model.moe.estimate={estimate}", "train.tokens=16000")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(2, command, *words, f"run_dir={whole}")[0][0] == 0
    assert ranks(2, command, *words, f"run_dir={parts}", "train.stop_after_steps=6")[0][0] == 0
    status, said = ranks(2, command, *words, f"run_dir={parts}", "--resume", "latest")[0]
    assert status == 0, said
    curves = [
        [
            (row["step"], row["loss"], row["balance_loss"])
            for row in rows(run / "metrics.jsonl")
            if "loss" in row
        ]
        for run in (whole, parts)
    ]
    assert curves[0] == curves[1] and len(curves[0]) > 10
    assert all(0.9 < balance < 4 for _, _, balance in curves[0])
    recorded, joined = rows(whole / "experts.jsonl"), rows(parts / "experts.jsonl")
    assert recorded == [row for row in joined if row["step"] != 6]  # the end of the first part
    shares = np.array(recorded[-1]["share"]["tiny"])
    assert shares.shape == (2, 4) and shares.sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    steps = {row["step"]: row for row in rows(whole / "metrics.jsonl") if "loss" in row}
    for row in recorded:
        assert sum(row["choices"]) == 2 * steps[row["step"]]["num_tokens"]


def test_experts_of_a_checkpoint_are_shown(ranks, config, tmp_path):
    run = tmp_path / "run"
    words = ("train", config, *MOE, "train.tokens=8000", f"run_dir={run}")
    assert ranks(1, command, *words)[0][0] == 0
    pictures = {}
    for world in (1, 2):
        out = tmp_path / str(world)
        status, said = ranks(world, command, "experts", run, "--out", out)[0]
        assert status == 0, said
        assert "held-out text of other, tiny" in said and "layer  busiest" in said
        assert (out / "experts_heldout.png").stat().st_size > 5000
        pictures[world] = json.loads((out / "experts_heldout.json").read_text())
    assert pictures[1] == pictures[2]
    assert set(pictures[1]["share"]) == {"other", "tiny"}
    for bad, problem in (
        (("--step", "x"), "--step x: give the number of a step"),
        (("--step", "99"), "99"),
        (("eval.tokens=0",), "no source has held-out text"),
    ):
        status, said = ranks(1, command, "experts", run, *bad)[0]
        assert status == 2 and problem in said, said


def test_a_model_without_experts_is_refused(ranks, config, tmp_path):
    run = tmp_path / "run"
    words = ("train", config, "train.tokens=2000", f"run_dir={run}")
    assert ranks(1, command, *words)[0][0] == 0
    status, said = ranks(1, command, "experts", run)[0]
    assert status == 2 and "its model has no experts" in said
