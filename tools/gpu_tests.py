"""The tests of tests/gpu as rows of the acceptance."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_rows import ROOT, Rows


def tests_on_gpu(rows: Rows) -> None:
    """Tests of tests/gpu."""
    recorder = Recorder(rows)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(ROOT)]
    status = pytest.main([*options, str(ROOT / "tests/gpu")], plugins=[recorder])
    rows.add("tests/gpu: status of pytest", int(status), "", None, 0)
    rows.add("tests/gpu: tests that passed", recorder.num_passed, "", 1, None, True)


class Recorder:
    """A plugin of pytest that makes a row of every test as soon as it is over."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.num_passed = rows, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test is over: its call, or a set-up that failed or skipped it."""
        if report.when != "call" and report.passed:
            return
        self.num_passed += report.passed
        name = report.nodeid.split("/")[-1]
        if report.skipped:
            self.rows.add(name, None, "skipped")
        else:
            self.rows.add(name, int(report.failed), "failures", None, 0)
