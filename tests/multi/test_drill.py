"""Faults over one run, as `tools/drill.py` does fifty of them."""

import drill
import pytest
from drill_faults import FAULTS, draw

from megascale.monitor.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SHORT = (
    "kill -9 of a worker",
    "lost heartbeat channel",
    "hang (SIGSTOP)",
    "clock jump",
    "bit flip in a checkpoint",
)


def test_a_run_gets_over_faults_and_ends_as_if_they_had_not_been(tmp_path):
    # a hang in an evaluation is given more time
    config = drill.write_config(tmp_path, eval="{every_steps: 0, tokens: 2000}")
    result = drill.drill(config, tmp_path, SHORT)
    assert result.bit_equal and [one.kind for one in result.outcomes] == list(SHORT)
    assert [one.starts for one in result.outcomes] == [1, 0, 1, 0, 1]
    assert 0 < result.goodput < 1 and result.false_alarms == 0
    run = tmp_path / "disk/run"
    [hang] = [event for event in read_events(run) if event["event"] == "hang"]
    [rank] = hang["ranks"]
    assert "stopped by a signal" in hang["why"] and hang["nodes"][0] in ("n0", "n1")
    for number in range(2):
        said = (run / hang["stacks"] / f"rank{number}.txt").read_text()
        assert ("stopped by a signal" in said) == (number == rank) and "in _steps" in said
    assert list((run / hang["stacks"]).glob("*.flight.json"))
    assert f"| {SHORT[0]} | 1 |" in drill.table(result)
    drill.draw_picture(result, tmp_path / "drill.png")


def test_a_whole_drill_is_fifty_faults_of_all_kinds():
    names = draw(drill.COUNTS, 0)
    assert len(names) == 50 and set(names) == set(FAULTS) and names != draw(drill.COUNTS, 1)
