"""A part of the fuzzing of readers and verbs, the same cases in every run.

`python tests/fuzz/run.py` runs more of it.
"""

import pytest
from fuzz.run import TARGETS, counts, prepared, run_target

CASES = 1200
SLOW = ("megascale plot_run", "megascale report_run", "megascale report", "megascale infowindow")
"""Targets that draw or compile, with a case each."""


@pytest.fixture(scope="module")
def scene():
    with prepared() as scene:
        yield scene


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_case_is_read_or_refused_in_one_line(scene, name):
    count = 1 if name in SLOW else counts(CASES, list(TARGETS))[name]
    tally = run_target(name, 0, range(count), scene)
    assert tally.cases == count
    assert not tally.failures, "\n".join(f"case {n}: {text}" for n, text in tally.failures)


def test_a_crash_and_a_long_line_are_failures(scene, monkeypatch):
    from megascale.errors import UserError

    def crashes(rng, scene):
        if rng.random() < 0.5:
            raise KeyError("x")
        error = UserError("x")
        error.args = ("two\nlines",)
        raise error

    monkeypatch.setitem(TARGETS, "crashes", (crashes, 1))
    tally = run_target("crashes", 0, range(20), scene)
    assert len(tally.failures) == 20 and 0 < tally.refused < 20
