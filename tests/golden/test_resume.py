"""A run that is killed and resumed is the run that was not."""

import pytest
from crash_drill import compare, curve, drill, finish, start
from tiny_corpus import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_and_resume_is_bit_equal(config, tmp_path):
    result = drill(config, tmp_path, kills=4)
    assert result.steps == 30
    assert result.bit_equal


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resume_on_other_numbers_of_ranks(config, tmp_path):
    """The order of documents goes on exactly, and the losses to 1e-4 over 20 steps."""
    finish(start(config, tmp_path / "calm", 2))
    expected = curve(tmp_path / "calm")
    for world in (1, 3):
        run_dir = tmp_path / str(world)
        finish(start(config, run_dir, 2, "train.stop_after_steps=10"))
        output = finish(start(config, run_dir, world, "--resume", "latest"))
        assert "resumed at step 10: learning rate" in output
        found = curve(run_dir)
        assert compare(expected, found).worst_relative < 1e-4
        assert all(found[s]["tokens_seen"] == expected[s]["tokens_seen"] for s in expected)
