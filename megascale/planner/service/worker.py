"""The planner process: problems in on stdin, plans out on stdout; `PlansAhead` starts it.

A frame is `HEADER` (magic, size of the head, size of the body), the head as JSON, and the body.

request   head {"serial", "problem": fields of the Problem but its lengths}; body: the lengths,
          int64, little-endian
answer    head {"serial", "kind", "sha256": of the body}; kind "plan": the bytes of the plan;
          "user_error": what a UserError says; "failure": the traceback of any other error
ready     head {"kind": "ready"}, no body: sent once, when the process can plan
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import struct
import sys
import threading
import traceback
from dataclasses import asdict, replace
from importlib import import_module
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from megascale.errors import UserError
from megascale.planner.cost import CostModel
from megascale.planner.problem import OffloadModel, Planner, Problem

HEADER = struct.Struct("<4sIQ")
MAGIC = b"plan"
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Those that ask a run to save and stop: it needs plans until it has."""
NICENESS = 5
"""Below the training processes, yet a quarter of a busy core."""
WATCH_PARENT_S = 1.0


class FrameError(ValueError):
    """The bytes of a stream are not a frame."""


def write_frame(stream: IO[bytes], head: dict[str, Any], body: bytes = b"") -> None:
    """Send one frame. Raises OSError where nobody reads any more."""
    text = json.dumps(head).encode()
    stream.write(HEADER.pack(MAGIC, len(text), len(body)) + text + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next (head, body), None at the end of the stream.

    Raises FrameError for anything else, and for a body other than its checksum says.
    """
    header = _read(stream, HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise FrameError(f"not a frame: {header[:16]!r}")
    _, head_size, body_size = HEADER.unpack(header)
    text, body = _read(stream, head_size), _read(stream, body_size)
    if len(text) < head_size or len(body) < body_size:
        raise FrameError("the stream ends inside a frame")
    try:
        head = json.loads(text)
    except ValueError:
        raise FrameError(f"not a head: {text[:16]!r}") from None
    if not isinstance(head, dict) or head.get("sha256", checksum(body)) != checksum(body):
        raise FrameError("a frame is damaged")
    return head, body


def checksum(body: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(body).hexdigest()


def _read(stream: IO[bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end of the stream."""
    parts, left = [], size
    while left and (part := stream.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def pack_problem(problem: Problem) -> tuple[dict[str, Any], bytes]:
    """A problem as plain values and the bytes of its lengths."""
    nothing = np.empty(0, np.int64)
    fields = asdict(replace(problem, lengths=nothing))
    del fields["lengths"]
    return fields, problem.lengths.astype("<i8").tobytes()


def unpack_problem(fields: dict[str, Any], lengths: bytes) -> Problem:
    """Inverse of `pack_problem`, also after a round trip through JSON text."""
    offload = fields["offload"]
    nested: dict[str, Any] = {
        "cost": CostModel(**fields["cost"]),
        "offload": OffloadModel(**offload) if offload is not None else None,
    }
    nested["slowdown"] = tuple(fields["slowdown"])
    return Problem(lengths=np.frombuffer(lengths, "<i8").astype(np.int64), **{**fields, **nested})


def planner_path(planner: Planner) -> str:
    """Where a process of its own finds a planner, as `module:function`.

    Raises ValueError for anything but a function at the top of a module.
    """
    module, name = planner.__module__, getattr(planner, "__qualname__", "")
    if not name.isidentifier() or getattr(import_module(module), name, None) is not planner:
        raise ValueError(f"{planner} is not a function at the top of a module")
    return f"{module}:{name}"


def serve(planner_path: str) -> None:
    """Answer requests, one after the other, until stdin ends or the parent process is gone."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a solver prints must not get between the frames
    requests: SimpleQueue[tuple[dict[str, Any], bytes]] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, os.getppid()), daemon=True).start()
    module, name = planner_path.split(":")
    planner: Planner = getattr(import_module(module), name)
    try:
        write_frame(answers, {"kind": "ready"})
        while True:
            head, lengths = requests.get()
            kind, body = _answer(planner, head, lengths)
            write_frame(
                answers, {"serial": head["serial"], "kind": kind, "sha256": checksum(body)}, body
            )
    except BrokenPipeError:
        os._exit(0)


def _answer(planner: Planner, head: dict[str, Any], lengths: bytes) -> tuple[str, bytes]:
    try:
        return "plan", planner(unpack_problem(head["problem"], lengths)).to_bytes()
    except UserError as error:
        return "user_error", str(error).encode()
    except Exception:
        return "failure", traceback.format_exc().encode()


def _listen(requests: SimpleQueue[tuple[dict[str, Any], bytes]], parent: int) -> None:
    """Take requests off the pipe, so that no sender waits; end the process with the parent.

    The end of stdin tells of it even in the midst of planning. A fork of the parent may hold the
    pipe open for longer than the parent lives, so its id is watched too.
    """
    with open(0, "rb", buffering=0, closefd=False) as stream:
        while True:
            while not select.select([stream], [], [], WATCH_PARENT_S)[0]:
                if os.getppid() != parent:
                    os._exit(0)
            try:
                frame = read_frame(stream)
            except FrameError:
                traceback.print_exc()
                os._exit(1)
            if frame is None:
                os._exit(0)
            requests.put(frame)


if __name__ == "__main__":
    serve(sys.argv[1])
