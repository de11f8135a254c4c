"""The drivers' channel: who does not know the token gets nowhere, and harms nobody."""

import re
import socket
import stat
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.errors import UserError
from megascale.launch import channel
from megascale.launch.board import Answer, Board, Ledger, fits, join_board, serve_board
from megascale.launch.channel import HEADER, MAGIC, Client, Server, check_token, listen
from megascale.launch.failures import Cause

TOKEN = "0123456789abcdef" * 4
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
FUZZ = settings(max_examples=60)


@pytest.fixture
def served(monkeypatch):
    """(ledger, server, what it said), with a friend who must be served whatever strangers do."""
    monkeypatch.setattr(channel, "HANDSHAKE_S", 2.0)
    ledger, said = Ledger(), []
    server = Server(listen("127.0.0.1", 0), TOKEN, ledger.serve, said.append)
    friend = Board(channel_to(server, patience_s=120.0))
    friend.leave(1)
    yield ledger, server, said
    friend.leave(2)
    assert Board(ledger).left(range(3)) == {1, 2}
    assert TOKEN not in "".join(said)
    server.close()


class channel_to:  # noqa: N801
    """The store of a driver that knows a token."""

    def __init__(self, server, token=TOKEN, patience_s=0.0):
        self.client = Client("127.0.0.1", server.port, lambda: token, patience_s)

    def put(self, key, value):
        self.client.ask({"put": key, "value": value})

    def read(self, keys):
        return self.client.ask({"read": list(keys)})


def until(done, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stranger(server):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=120)
    hello = connection.recv(100)
    assert hello.startswith(MAGIC) and len(hello) == 48
    return connection


def is_closed(connection):
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


@given(said=st.binary(min_size=1, max_size=4096))
@FUZZ
def test_bytes_of_strangers_are_refused(served, said):
    _, server, lines = served
    before = server.refused
    with stranger(server) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)
    until(lambda: server.refused == before + 1)
    assert len(lines) <= server.refused


def test_a_wrong_token_is_refused_counted_and_logged(served):
    ledger, server, said = served
    for count in range(1, 18):
        with pytest.raises(EOFError):
            channel_to(server, "x" * 64).client.connect()
        until(lambda: server.refused == count)  # noqa: B023
    assert said[0] == "refused a connection from 127.0.0.1: a wrong token (1 so far)"
    assert len(said) == 11 and said[-1].endswith("(16 so far)")  # a flood does not fill the log
    with pytest.raises(UserError, match="has another token"):
        join_board("127.0.0.1", server.port, lambda: "y" * 64, join_s=0.1, lost_s=1)


def test_who_says_nothing_is_cut_off_and_crowds_make_way(served):
    _, server, said = served
    crowd = [stranger(server) for _ in range(2 * channel.MOST_STRANGERS)]
    for each in crowd[-10:]:
        each.sendall(b"s")  # a byte now and then is no proof either
    Board(channel_to(server)).leave(1)
    assert all(map(is_closed, crowd))
    until(lambda: server.refused == len(crowd))
    assert said[0].endswith("no proof of the token (1 so far)")


def test_a_server_that_does_not_know_the_token_is_not_believed():
    """Nor does it learn anything by which it could pass for a driver elsewhere."""
    listener = listen("127.0.0.1", 0)

    def pretend():
        connection, _ = listener.accept()
        connection.sendall(MAGIC + bytes(32))
        connection.recv(64)
        connection.sendall(bytes(32))

    threading.Thread(target=pretend, daemon=True).start()
    client = Client("127.0.0.1", listener.getsockname()[1], lambda: TOKEN, 0.0)
    with pytest.raises(channel.Refused, match="another token"):
        client.connect()
    listener.close()


@given(message=JSON)
@FUZZ
def test_signed_messages_in_another_form_are_refused(served, message):
    ledger, server, _ = served
    before = server.refused
    client = channel_to(server).client
    client.connect()
    with pytest.raises((EOFError, OSError)):
        client._exchange(message)
    until(lambda: server.refused == before + 1)
    assert ledger.read(["order/0", "over/0", "x"]) == [None] * 3


@pytest.mark.parametrize(
    "message",
    [
        {"put": "order/0", "value": {"members": [], "stop": "x", "status": 0}},
        {"put": "over/0", "value": {"members": [], "stop": "x", "status": 0}},
        {"put": "meeting", "value": 1},
        {"put": "look/0", "value": "../x"},
        {"put": "beat/-1", "value": 1},
        {"put": "beat/1/2", "value": 1},
        {"put": "beat/1", "value": True},
        {"put": "beat/1", "value": "1"},
        {"put": "answer/0/1", "value": {"name": "n", "problem": None, "more": 1}},
        {"put": "answer/0/1", "value": {"name": "n" * 20_000, "problem": None}},
        {"put": "pulse/0", "value": {"attempt": 0, "ranks": [{"rank": 0}]}},
        {"read": "beat/1"},
        {"read": [1]},
        {"del": "beat/1"},
    ],
)
def test_drivers_write_what_is_theirs_alone(message):
    ledger = Ledger()
    with pytest.raises(channel.Refused):
        ledger.serve(message)
    assert ledger._values == {}


def raw(served, alter):
    """Send a signed frame that `alter` has changed; whether it was refused."""
    _, server, _ = served
    before = server.refused
    client = channel_to(server).client
    client.connect()
    with suppress(ConnectionError):  # the server may close before it has read all of a long one
        client._socket.sendall(alter(client._frames.pack({"read": ["beat/1"]})))
    closed = is_closed(client._socket)
    until(lambda: server.refused == before + closed)
    return closed


@given(place=st.integers(0, 56), bit=st.integers(0, 7))
@FUZZ
def test_a_bit_that_flips_on_the_way_is_noticed(served, place, bit):
    def flip(frame):
        frame = bytearray(frame)
        frame[place % len(frame)] ^= 1 << bit
        # a longer frame than there is would only be waited for
        return bytes(frame) + bytes(2**21)

    assert raw(served, flip)


def test_repeated_unsigned_oversized_and_nested_frames_are_refused(served):
    assert raw(served, lambda frame: HEADER.pack(2**20 + 1, bytes(32)))
    assert raw(served, lambda frame: HEADER.pack(2, bytes(32)) + b"{}")
    assert not raw(served, lambda frame: frame)
    _, server, said = served
    client = channel_to(server).client
    client.connect()
    frame = client._frames.pack({"read": []})
    client._socket.sendall(frame + frame)
    assert len(client._socket.recv(1000)) == 38 and is_closed(client._socket)
    client.connect()
    content = b"[" * 500_000
    client._frames._sent += 1
    signature = client._frames._sign(b"c", 1, content)
    client._socket.sendall(HEADER.pack(len(content), signature) + content)
    assert is_closed(client._socket)
    until(lambda: "no JSON" in said[-1])


def test_half_a_frame_is_not_waited_for_for_ever(served, monkeypatch):
    monkeypatch.setattr(channel, "FRAME_S", 0.3)
    _, server, _ = served
    client = channel_to(server).client
    client.connect()
    client._socket.settimeout(10)
    client._socket.sendall(client._frames.pack({"read": []})[:20])
    assert is_closed(client._socket)


def test_a_broken_connection_is_made_anew(served, capsys):
    _, server, _ = served
    board = Board(channel_to(server, patience_s=5.0))
    board.beat(7)
    for writer in list(server._open):
        server._loop.call_soon_threadsafe(writer.transport.abort)
    until(lambda: not server._open)
    board.beat(7)
    assert board.beats(9) == {7: 2}
    assert "node 0 is back after" in capsys.readouterr().out


def test_what_goes_over_the_wire_comes_back(served):
    ledger, server, _ = served
    remote, local = Board(channel_to(server)), Board(ledger)
    remote.answer(0, 1, Answer("a 'name'", None))
    assert local.answers(0, range(3)) == {1: Answer("a 'name'", None)}
    cause = Cause("it broke", 1.5, rank=3, node="n")
    remote.report(0, 1, cause)
    assert local.reports(0, [1]) == {1: cause}
    remote.answer(0, 2, Answer("n2", "p" * 20_000))  # as much as may be said
    remote.report(0, 2, Cause("e" * 20_000, 1.5))
    assert local.answers(0, [2])[2].problem == "p" * 16_000
    assert local.reports(0, [2])[2].error == "e" * 16_000
    local.ask_to_look(0, "folder")
    assert remote.look(0) == "folder" and remote.look(1) is None
    remote.looked(0, 1)
    assert local.have_looked(0, range(2)) == {1}


def test_a_token_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "token"
    path.write_text("an old one, readable for all")
    channel.write_token(path, TOKEN)
    assert path.read_text() == TOKEN and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", channel.new_token()) and check_token(TOKEN) == TOKEN
    with pytest.raises(UserError, match="MEGASCALE_TOKEN has 5 characters"):
        check_token("12345")


def test_forms():
    assert fits(1, float) and fits(1.5, float) and not fits(1.5, int) and not fits(True, float)
    assert fits([1, 2], [int]) and not fits([1, "2"], [int]) and not fits({}, [int])


def test_a_port_that_is_taken_is_said(served):
    _, server, _ = served
    with pytest.raises(UserError, match="Address already in use"):
        serve_board(Ledger(), "127.0.0.1", server.port, TOKEN)
