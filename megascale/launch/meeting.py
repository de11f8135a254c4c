"""The store on which ranks of one machine meet, in a process of its own.

It needs torch. To import that may take many seconds on busy cores, in which Python heeds no signal,
and the process that the user has started must.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from megascale.runtime.processes import die_with_parent


def start_meeting(listener: socket.socket, host: str, output: Path) -> subprocess.Popen[bytes]:
    """Serve the store on a listening socket of `host` until it is killed or this process dies.

    What it writes to stderr goes into the file `output`. Raises OSError.
    """
    handle = listener.fileno()
    with output.open("wb") as words:
        return subprocess.Popen(
            (sys.executable, "-m", __name__, str(handle), host),
            stdin=subprocess.DEVNULL,
            stderr=words,
            pass_fds=(handle,),
            start_new_session=True,
        )


def _serve(handle: int, host: str) -> None:
    die_with_parent()
    from megascale.launch.board import serve_meeting

    store = serve_meeting(socket.socket(fileno=handle), host)
    signal.pause()
    del store


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
