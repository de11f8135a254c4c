"""A whole run on one CUDA device; the twin of tests/multi/test_train.py."""

import pytest
import torch
from crash_drill import compare, curve, finish, start
from tiny_corpus import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_and_resumes(tmp_path, precision):
    config = tiny_config(tmp_path, train=f"{{tokens: 30000, precision: {precision}}}")
    finish(start(config, tmp_path / "calm", 1))
    expected = curve(tmp_path / "calm")
    assert expected[30]["loss"] < 0.7 * expected[1]["loss"]
    finish(start(config, tmp_path / "run", 1, "train.stop_after_steps=10"))
    finish(start(config, tmp_path / "run", 1, "--resume", "latest"))
    assert compare(expected, curve(tmp_path / "run")).worst_relative < 1e-2
