"""Files that grow by lines while their disk comes and goes."""

import errno
import json

from megascale.monitor import lines
from megascale.monitor.events import EventLog, read_events
from megascale.monitor.lines import LineFile
from megascale.monitor.metrics import read_rows


def test_lines_wait_for_a_folder_that_is_gone(tmp_path, capsys):
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    log = EventLog(folder)
    log.write("start", step=0)
    folder.rename(away)
    for step in (1, 2):
        log.write("save", step=step)
    assert not folder.exists() and not log.settle()
    away.rename(folder)
    assert log.settle() and [event["step"] for event in read_events(folder)] == [0, 1, 2]
    log.write("stop", step=3)
    assert [event["step"] for event in read_events(folder)] == [0, 1, 2, 3]
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "No such file or directory; what goes there" in said


def test_a_torn_line_is_written_again(tmp_path, monkeypatch, capsys):
    path, honest = tmp_path / "metrics.jsonl", lines._write_all
    file = LineFile(path)
    file.write(json.dumps({"step": 1}))

    def full(raw, content):
        honest(raw, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lines, "_write_all", full)
    file.write(json.dumps({"step": 2}))
    file.write(json.dumps({"step": 3}))
    monkeypatch.setattr(lines, "_write_all", honest)
    file.write(json.dumps({"step": 4}))
    file.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert "No space left on device" in capsys.readouterr().out
    file.write(json.dumps({"step": 5}))  # opens it again
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5]


def test_the_oldest_of_too_many_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MOST_WAITING", 3)
    file = LineFile(tmp_path / "gone" / "x")
    for number in range(5):
        file.write(str(number))
    (tmp_path / "gone").mkdir()
    file.write("5")
    assert (tmp_path / "gone" / "x").read_text().split() == ["3", "4", "5"]
