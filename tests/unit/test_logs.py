"""The log of a rank, and places where none can be written."""

import logging
import os

import pytest

from megascale.runtime.logs import log_to


@pytest.fixture(autouse=True)
def root_logger():
    """The root logger, as it was before and after."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def test_a_log_is_added_to_and_takes_any_text(tmp_path):
    path = tmp_path / "rank1.log"
    path.write_text("of the run before\n")
    log_to(tmp_path, 1)
    logging.getLogger("library").warning("a name: %s", "\udce4\N{SNOWMAN}")
    first, second = path.read_text().splitlines()
    assert first == "of the run before" and second.endswith("library: a name: \\udce4\N{SNOWMAN}")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/full", path)])
def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys, make):
    make(tmp_path / "rank0.log")
    log_to(tmp_path, 0)
    logging.getLogger("library").warning("nobody reads this")
    said = capsys.readouterr().out
    assert said.startswith("warning: no log of this rank: ") and len(said.splitlines()) == 1
