"""What the drivers of a job tell each other, on a board that the driver of node 0 holds.

By any driver:
beat/NODE           a number that grows while the driver of the node is alive
pulse/NODE          how its ranks are, for an attempt
answer/ATTEMPT/NODE whether the node is fit for an attempt
report/ATTEMPT/NODE how the ranks of a member ended
looked/ATTEMPT/NODE that the stacks of its ranks are written
left/NODE           that the driver of the node ends

By the leader alone:
meeting             port of the store on which torchrun's agents meet
order/ATTEMPT       who takes part in an attempt, or that the job ends
look/ATTEMPT        that the ranks hang, and the folder for their stacks
over/ATTEMPT        that the attempt is over, and whether the job is

All values are JSON of the form that `TOPICS` gives. The other drivers reach the board through
`channel.py`, so nobody without the job's token can read or write it. torchrun's rendezvous, and
torch's own, need a TCPStore each; these, like gloo and NCCL, know no authentication, so whoever
reaches their ports can break an attempt (and those of gloo and NCCL, its numbers), and a job
belongs on a network of its own. What drivers do never depends on them.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

from megascale.errors import UserError
from megascale.launch.channel import (
    RETRY_S,
    ChannelLost,
    Client,
    Refused,
    Server,
    listen,
)
from megascale.launch.failures import Cause
from megascale.launch.hangs import PULSES
from megascale.runtime.logs import say

MOST_TEXT = 16_000
"""Characters of a text on the board."""
_TEXT = (str, type(None))
_CAUSE = {"error": str, "time": float, "rank": (int, type(None)), "node": _TEXT, "kind": str}
_ORDER = {"members": [int], "stop": _TEXT, "status": int}
TOPICS: Mapping[str, tuple[int, Any]] = {
    "beat": (1, int),
    "pulse": (1, PULSES),
    "answer": (2, {"name": str, "problem": _TEXT}),
    "report": (2, {"cause": (_CAUSE, type(None))}),
    "looked": (2, bool),
    "left": (1, bool),
    "meeting": (0, int),
    "order": (1, _ORDER),
    "look": (1, str),
    "over": (1, _ORDER),
}
"""Numbers in the keys of a topic, and the form of its values: a type, a tuple of forms, of which
one fits, a list of a form, or the fields of an object."""
OF_DRIVERS = ("beat", "pulse", "answer", "report", "looked", "left")
KEY = re.compile(r"([a-z]+)((?:/[0-9]{1,9}){0,2})")


def fits(value: Any, form: Any) -> bool:
    """Whether a value of JSON has the form; whole numbers are floats too, truth values neither."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        same = isinstance(value, dict) and value.keys() == form.keys()
        return same and all(fits(value[name], form[name]) for name in form)
    if form is str:
        return isinstance(value, str) and len(value) <= MOST_TEXT
    if form in (int, float):
        kinds = (int,) if form is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, form)


@dataclass(frozen=True)
class Answer:
    """What a node says when an attempt is called."""

    name: str
    problem: str | None = None
    """Why it should be left out; None: it is fit."""


@dataclass(frozen=True)
class Order:
    """What the drivers should do next."""

    members: tuple[int, ...] = ()
    """Nodes that start ranks."""
    stop: str | None = None
    """Why all drivers should end; None: they go on."""
    status: int = 0
    """Exit status of the drivers, where they end."""


class BoardLost(Exception):
    """The driver of node 0, which holds the board, is gone."""


class Store(Protocol):
    """Where a board is kept."""

    def put(self, key: str, value: Any) -> None:
        """Set the value of a key."""

    def read(self, keys: Sequence[str]) -> list[Any]:
        """The values of keys; None where there is none."""


class Ledger:
    """The board itself, in the memory of the driver of node 0."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, key: str, value: Any) -> None:
        """Set the value of a key."""
        with self._lock:
            self._values[key] = value

    def read(self, keys: Sequence[str]) -> list[Any]:
        """The values of keys; None where there is none."""
        with self._lock:
            return [self._values.get(key) for key in keys]

    def serve(self, message: Any) -> Any:
        """Do what the driver of another node asks for.

        Raises Refused for anything but `{"read": KEYS}` and `{"put": KEY, "value": VALUE}`, with a
        topic of drivers and a value of its form.
        """
        if fits(message, {"read": [str]}):
            return self.read(message["read"])
        if not (isinstance(message, dict) and message.keys() == {"put", "value"}):
            raise Refused("an unknown request")
        key, value = message["put"], message["value"]
        match = KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None or match[1] not in OF_DRIVERS:
            raise Refused("a key that is not for drivers")
        numbers, form = TOPICS[match[1]]
        if match[2].count("/") != numbers or not fits(value, form):
            raise Refused(f"'{match[1]}' in another form")
        self.put(key, value)
        return True


class RemoteLedger:
    """The board, from another node."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def put(self, key: str, value: Any) -> None:
        """Set the value of a key. Raises ChannelLost."""
        self._client.ask({"put": key, "value": value})

    def read(self, keys: Sequence[str]) -> list[Any]:
        """The values of keys; None where there is none. Raises ChannelLost."""
        values = self._client.ask({"read": list(keys)})
        if not isinstance(values, list) or len(values) != len(keys):
            raise ChannelLost("the driver of node 0 answers nonsense")
        return values


class Board:
    """One driver's view of the board; not for several threads at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._beats = 0

    def beat(self, node: int) -> None:
        """Say that the driver of `node` is alive."""
        self._beats += 1
        self._put(f"beat/{node}", self._beats)

    def beats(self, num_nodes: int) -> dict[int, int]:
        """The latest number of every node that ever gave one."""
        return self._read_nodes("beat", range(num_nodes))

    def pulse(self, node: int, pulses: Mapping[str, Any]) -> None:
        """Say how the ranks of a node are; as `hangs.PULSES`."""
        self._put(f"pulse/{node}", dict(pulses))

    def pulses(self, nodes: Iterable[int]) -> dict[int, Any]:
        """How the ranks of nodes were when these last said so."""
        return self._read_nodes("pulse", nodes)

    def answer(self, attempt: int, node: int, answer: Answer) -> None:
        """Answer the call of an attempt."""
        told = replace(answer, problem=answer.problem and answer.problem[:MOST_TEXT])
        self._put(f"answer/{attempt}/{node}", asdict(told))

    def answers(self, attempt: int, nodes: Iterable[int]) -> dict[int, Answer]:
        """The answers that are there."""
        found = self._read_nodes(f"answer/{attempt}", nodes)
        return {node: Answer(**value) for node, value in found.items()}

    def announce_meeting(self, port: int) -> None:
        """Say where torchrun's agents meet."""
        self._put("meeting", port)

    def meeting(self) -> int:
        """The port on which torchrun's agents meet."""
        return int(self._read("meeting"))

    def give_order(self, attempt: int, order: Order) -> None:
        """Say who takes part in an attempt."""
        self._put(f"order/{attempt}", _told(order))

    def order(self, attempt: int) -> Order | None:
        """Who takes part in an attempt, once that is known."""
        return _order(self._read(f"order/{attempt}"))

    def report(self, attempt: int, node: int, cause: Cause | None) -> None:
        """Say how the ranks of a node ended; None: well."""
        told = cause and replace(cause, error=cause.error[:MOST_TEXT]).to_json()
        self._put(f"report/{attempt}/{node}", {"cause": told})

    def reports(self, attempt: int, nodes: Iterable[int]) -> dict[int, Cause | None]:
        """How the ranks of nodes ended, as far as they have."""
        found = self._read_nodes(f"report/{attempt}", nodes)
        return {n: Cause(**one["cause"]) if one["cause"] else None for n, one in found.items()}

    def ask_to_look(self, attempt: int, folder: str) -> None:
        """Have all members write the stacks of their ranks into a folder of the run."""
        self._put(f"look/{attempt}", folder)

    def look(self, attempt: int) -> str | None:
        """The folder for the stacks of ranks that hang; None while they do not."""
        found = self._read(f"look/{attempt}")
        return None if found is None else str(found)

    def looked(self, attempt: int, node: int) -> None:
        """Say that the stacks of a node's ranks are written."""
        self._put(f"looked/{attempt}/{node}", True)

    def have_looked(self, attempt: int, nodes: Iterable[int]) -> set[int]:
        """The nodes whose stacks are written."""
        return set(self._read_nodes(f"looked/{attempt}", nodes))

    def end(self, attempt: int, order: Order) -> None:
        """Say that an attempt is over."""
        self._put(f"over/{attempt}", _told(order))

    def over(self, attempt: int) -> Order | None:
        """What follows an attempt that is over; None while it is not."""
        return _order(self._read(f"over/{attempt}"))

    def leave(self, node: int) -> None:
        """Say that the driver of `node` ends."""
        self._put(f"left/{node}", True)

    def left(self, nodes: Iterable[int]) -> set[int]:
        """Nodes whose drivers have ended."""
        return set(self._read_nodes("left", nodes))

    def _put(self, key: str, value: Any) -> None:
        with _lost_if_it_fails():
            self._store.put(key, value)

    def _read(self, key: str) -> Any:
        """The value of a key, or None where it is not there."""
        with _lost_if_it_fails():
            return self._store.read([key])[0]

    def _read_nodes(self, topic: str, nodes: Iterable[int]) -> dict[int, Any]:
        nodes = list(nodes)
        with _lost_if_it_fails():
            values = self._store.read([f"{topic}/{node}" for node in nodes])
        return {node: value for node, value in zip(nodes, values, strict=True) if value is not None}


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    try:
        yield
    except ChannelLost as error:
        raise BoardLost(str(error)) from None


def _told(order: Order) -> dict[str, Any]:
    return asdict(replace(order, stop=order.stop and order.stop[:MOST_TEXT]))


def _order(value: Any) -> Order | None:
    return None if value is None else Order(**{**value, "members": tuple(value["members"])})


def serve_board(ledger: Ledger, host: str, port: int, token: str) -> Server:
    """Let the drivers of other nodes use the board, at the address of `host` alone.

    Raises UserError where the port is taken.
    """
    return Server(listen(host, port), token, ledger.serve, _say)


def join_board(
    host: str, port: int, token: Callable[[], str], join_s: float, lost_s: float
) -> Board:
    """The board of the driver of node 0; waits `join_s` for it to be there, and later `lost_s`
    for it to come back.

    `token` is asked before every try. Raises UserError where the board does not come.
    """
    client = Client(host, port, token, lost_s)
    deadline = time.monotonic() + join_s
    while True:
        try:
            client.connect(max(RETRY_S, deadline - time.monotonic()))
            return Board(RemoteLedger(client))
        except (OSError, EOFError, Refused) as error:
            if time.monotonic() > deadline:
                where = f"--rendezvous {host}:{port}"
                if isinstance(error, FileNotFoundError):
                    why = f"no {error.filename} after {join_s:g} s; start node 0 for the same run"
                elif isinstance(error, OSError):
                    why = f"no driver of node 0 answers there within {join_s:g} s"
                else:
                    why = "who answers there has another token; start all nodes for the same run"
                raise UserError(f"{where}: {why}") from None
            time.sleep(min(RETRY_S, join_s))


def hold_meeting(host: str) -> tuple[Any, int]:
    """(the store on which torchrun's agents meet, its port), at the address of `host` alone."""
    listener = listen(host, 0)
    port = listener.getsockname()[1]
    return serve_meeting(listener, host), port


def serve_meeting(listener: socket.socket, host: str) -> Any:
    """A store that answers on a listening socket of `host`, for as long as it is kept."""
    from torch.distributed import TCPStore

    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
        master_listen_fd=listener.detach(),
    )


def _say(text: str) -> None:
    say(f"megascale: {text}")
