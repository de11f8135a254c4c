"""`megascale.train` of the library, on ranks."""

import pytest
from tiny_corpus import tiny_config

from megascale.checkpoint.folder import read_latest

WORDS = ("train.tokens=5000", "eval.every_steps=0")


def trained(config, run_dir):
    """What two calls return, a run and its continuation; of the second run the last row."""
    import megascale

    first = megascale.train(config, [*WORDS, f"run_dir={run_dir}", "train.stop_after_steps=2"])
    again = megascale.train(config, [*WORDS, f"run_dir={run_dir}"], resume="auto")
    return first, again, megascale.read_metrics(run_dir)[-1]["tokens_seen"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_and_its_continuation(ranks, tmp_path, world):
    config = str(tiny_config(tmp_path))
    for first, again, tokens in ranks(world, trained, config, str(tmp_path / "run")):
        assert (first, again) == (False, False) and tokens >= 5000
    assert read_latest(tmp_path / "run/checkpoints") == 5
