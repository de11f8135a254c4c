"""Whether a node is fit to train. Deeper tests of a node belong here too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megascale.runtime.files import unfinished_file, write_file

CHECK_TIMEOUT_S = 120.0
POLL_S = 0.1


def check_node(
    run_dir: str,
    command: str | None,
    alive: Callable[[], object],
    name: str,
    ranks_after_failure: int = 0,
) -> str | None:
    """What is wrong with this node, or None.

    It must reach the run's folder and write there, and `command`, if any, must end with status 0
    within two minutes. After a failure so many devices must also compute and remember as they
    should (`runtime.self_test`). `alive` is called now and then meanwhile.
    """
    commands = [["bash", "-c", command]] if command is not None else []
    if ranks_after_failure:
        ranks = f"--ranks={ranks_after_failure}"
        commands.append([sys.executable, "-m", "megascale.runtime.self_test", ranks])
    problem = _check_folder(Path(run_dir), name)
    for words in commands:
        problem = problem or _check_command(words, alive)
    return problem


def _check_folder(run_dir: Path, name: str) -> str | None:
    probe = unfinished_file(run_dir / f"check-{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_file(probe, "fit", synced=True)
        read = probe.read_bytes()
        probe.unlink()
    except OSError as error:
        return f"run_dir {run_dir}: {error.strerror}"
    return None if read == b"fit" else f"run_dir {run_dir} gives back other bytes than were written"


def _check_command(words: Sequence[str], alive: Callable[[], object]) -> str | None:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + CHECK_TIMEOUT_S
        try:
            while process.poll() is None:
                alive()
                if time.monotonic() > deadline:
                    return f"the check did not end in {CHECK_TIMEOUT_S:g} s"
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return None if process.returncode == 0 else f"the check failed: {last}"
