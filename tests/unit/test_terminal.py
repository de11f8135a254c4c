"""What files hold does not control the terminal, wherever it is printed."""

import html
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from megascale import cli
from megascale.monitor.metrics import MetricsWriter
from megascale.runtime.terminal import EscapedStream, escape_controls

ATTACKS = {
    "clear": "\x1b[2J",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "title": "\x1b]0;root@host\x1b\\",
    "c1": "\x9b2J",
    "bidi": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "back": "fault\b\b\b\b\bgood ",
    "return": "fault\rgood ",
    "line": "\u2028",
    "tag": "\U000e0041",
    "surrogate": "\udc9b",
}
ALL = "".join(ATTACKS.values())
HARMFUL = {c for c in ALL if not c.isprintable()}


def assert_harmless(text):
    assert not HARMFUL & set(text), ascii(text)
    assert "\\x1b" in text


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_controls_become_escapes(attack):
    shown = escape_controls(f"<{attack}>")
    assert not HARMFUL & set(shown) and "\\" in shown
    assert escape_controls(shown) == shown


def test_text_of_any_language_stays_as_it_is():
    text = "a\tb\n\u00a0na\u00efve \u4e2d\u3000\u0634\u0640 \u0915\u094d\u200d "
    text += "\U0001f468\u200d\U0001f469"
    assert escape_controls(text) == text


def test_progress_bars_are_drawn():
    from tqdm import tqdm

    plain, escaped = io.StringIO(), io.StringIO()
    for file in (plain, EscapedStream(escaped, has_bars=True)):
        with tqdm(total=2, file=file, position=1, mininterval=0, bar_format="{n}") as bar:
            bar.update()
    assert plain.getvalue() == escaped.getvalue() and "\x1b[A" in plain.getvalue()
    stream = EscapedStream(escaped, has_bars=True)
    for own in ("\r\x1b[K50%, about 3 s left", "\r\x1b[K"):
        stream.write(own)
        assert escaped.getvalue().endswith(own)
    stream.write("a\x1b[K\r\x1b[2Kb")
    assert escaped.getvalue().endswith("a\\x1b[K\r\\x1b[2Kb")


def run_folder(path):
    """A run whose files hold attacks where text can be."""
    (path / "checkpoints").mkdir(parents=True)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    events = [
        {"time": now, "event": "launch", "step": 0},
        {"time": now, "event": "start", "step": 0, "world": 1, "total_steps": 9},
        {"time": now, "event": "failure", "step": 0, "error": ALL, "node": ALL, "rank": 0},
        {"time": now, "event": "start_failed", "error": ALL},
        {"time": now, "event": "gave_up", "why": ALL},
        {"time": now, "event": ALL},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (path / "events.jsonl").write_text(lines)
    (path / "config.yaml").write_text(json.dumps({"run_dir": "a run"}))
    (path / "plan.txt").write_bytes(ALL.encode(errors="surrogatepass"))
    return path


def main(capsys, *words):
    """(exit status, what was printed)."""
    status = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_status_and_report_of_a_hostile_run(tmp_path, capsys):
    name = ALL.replace("/", "").encode(errors="surrogatepass").decode(errors="replace")
    run = run_folder(tmp_path / name)
    status, said = main(capsys, "status", run)
    assert status == 0
    assert_harmless(said)
    status, said = main(capsys, "report", run, "--out", tmp_path / "page.html")
    assert status == 0, said
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_harmless(html.unescape(page))


def test_rich_still_draws_on_a_terminal(tmp_path, monkeypatch, capsys):
    # rich asks the variables of its first import, which need not be those of this test
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("rich.console.Console.is_dumb_terminal", False)
    run = run_folder(tmp_path / "run")
    status, said = main(capsys, "status", run)
    assert status == 0 and "\x1b[1m" in said
    assert "\x1b[2J" not in said and "\x1b]" not in said and "\\x1b[2J" in said


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_whatever_a_verb_prints(monkeypatch, capsys, stream):
    def verb(words):
        print(ALL, file=getattr(sys, stream))
        getattr(sys, stream).writelines([ALL, "\n"])
        return 0

    monkeypatch.setattr(cli, "_answer", verb)
    before = getattr(sys, stream)
    status, said = main(capsys, "anything")
    assert status == 0 and getattr(sys, stream) is before
    assert_harmless(said.replace("\r", "") if stream == "stderr" else said)


def test_a_traceback_is_escaped_too():
    script = (
        "import sys; from megascale import cli\n"
        f"def verb(words): raise RuntimeError({ALL!r})\n"
        "cli._answer = verb; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    said = done.stderr.decode()
    assert done.returncode == 1 and "RuntimeError: " in said
    assert_harmless(said.replace("\r", ""))


def test_names_of_metrics(tmp_path):
    writer = MetricsWriter(tmp_path, False, (), None, {})
    rows = []
    tracker = type("Rows", (), {"put": lambda self, row, step: rows.append(row)})
    writer._trackers.append(tracker())
    writer.write({"step": 1, "eval": {ALL: {"loss": 1.0}}})
    (name,) = rows[0]
    assert_harmless(name)


def test_the_environment_decides_nothing(tmp_path):
    """A pipe gets escapes too: what reads it may be a terminal in the end."""
    run = run_folder(tmp_path / "run")
    words = [sys.executable, "-m", "megascale", "status", str(run)]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    assert_harmless(done.stdout.decode())
