"""The socket on which the drivers of a job speak to the one that leads; strangers cannot use it.

A TCPStore, which torch offers for this, lets anybody who reaches its port read and write, so what
drivers act upon travels here. Both ends prove that they know the token of the job, without sending
it: the server sends a challenge, the client a nonce and HMAC-SHA256(token, both), and the server
its own HMAC. Every frame that follows carries the HMAC of its direction, number and content under a
key of this connection, so nothing can be inserted, changed or repeated. Nothing is encrypted.

`multiprocessing.connection` with an authkey is not enough: one silent stranger blocks its `accept`
for all, half a frame blocks its `recv_bytes`, its frames carry no proof, and it has no IPv6 client.

Frame: length (4 bytes, big-endian), HMAC (32 bytes), JSON. Before a client has proved itself it can
make the server read 64 bytes and no more; whoever says anything else than is expected is cut off,
counted and logged in one line.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.errors import UserError
from megascale.reading import require_regular

TOKEN_VARIABLE = "MEGASCALE_TOKEN"
TOKEN_LENGTH = 32
"""Characters of a token, at least."""
MAGIC = b"megascale board1"
SECRET_BYTES = 32
MOST_BYTES = 2**20
"""Of the content of a frame."""
HANDSHAKE_S = 5.0
FRAME_S = 30.0
"""From the first byte of a frame to its last."""
IDLE_S = 600.0
"""Without a word of a client, which speaks every second."""
MOST_STRANGERS = 64
"""Connections at a time that have not proved themselves; the oldest makes way for another."""
RETRY_S = 0.3
NOBODY_S = 2.0
"""Where nobody listens any more: how long it may be a moment's matter."""
HEADER = struct.Struct("!I32s")


class Refused(Exception):
    """The other end is none of ours, or says what it may not."""


class ChannelLost(Exception):
    """The other end does not answer any more."""


def new_token() -> str:
    """A token for a job."""
    return secrets.token_hex(SECRET_BYTES)


def check_token(token: str) -> str:
    """The token. Raises UserError where it is too short to be a secret."""
    if len(token) < TOKEN_LENGTH:
        raise UserError(
            f"{TOKEN_VARIABLE} has {len(token)} characters; give {TOKEN_LENGTH} or more random "
            "ones, or leave it unset"
        )
    return token


def write_token(path: Path, token: str) -> None:
    """Keep a token in a file that only its owner can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)


def read_token(path: Path) -> str:
    """The token of a file. Raises OSError where it is missing or not of this user: whoever wrote
    it could lead the drivers of this job."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
        require_regular(path, file.fileno())
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
        return file.read()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound to the address of `host` alone; port 0 takes any that is free.

    Raises UserError where the port is taken.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        where = f"{host}:{port}" if port else host
        raise UserError(
            f"--rendezvous {where}: {error.strerror}; give an address of node 0 with a port "
            "that is free there"
        ) from None
    return listener


def _proof(token: str, who: bytes, challenge: bytes, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), who + challenge + nonce, "sha256")


class _Frames:
    """Numbers, signs and checks the frames of one connection."""

    def __init__(self, token: str, challenge: bytes, nonce: bytes, is_server: bool) -> None:
        self._key = _proof(token, b"frames", challenge, nonce)
        self._sends, self._hears = (b"s", b"c") if is_server else (b"c", b"s")
        self._sent = self._heard = 0

    def pack(self, message: Any) -> bytes:
        content = json.dumps(message).encode()
        if len(content) > MOST_BYTES:
            raise Refused(f"a message of {len(content)} bytes")
        self._sent += 1
        return HEADER.pack(len(content), self._sign(self._sends, self._sent, content)) + content

    def unpack(self, signature: bytes, content: bytes) -> Any:
        self._heard += 1
        if not hmac.compare_digest(self._sign(self._hears, self._heard, content), signature):
            raise Refused("a message without its signature")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Refused("a message that is no JSON") from None

    def _sign(self, direction: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(self._key, direction + struct.pack("!Q", number) + content, "sha256")


class Server:
    """Answers the clients that know the token, in a thread of its own."""

    def __init__(
        self,
        listener: socket.socket,
        token: str,
        answer: Callable[[Any], Any],
        say: Callable[[str], None],
    ) -> None:
        """`answer` takes a message and returns the reply, or raises Refused; `say` takes a line."""
        self._listener, self._token, self._answer, self._say = listener, token, answer, say
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._open: set[asyncio.StreamWriter] = set()
        """Connections that have."""
        self.refused = 0
        """Connections that were cut off."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="board")
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Close all connections and the socket."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        started = asyncio.start_server(self._serve, sock=self._listener)
        server = self._loop.run_until_complete(started)
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._admit(writer)
        try:
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    frames = await self._shake_hands(reader, writer)
            except (EOFError, OSError):  # a TimeoutError is one too
                raise Refused("no proof of the token") from None
            self._strangers.pop(writer, None)
            self._open.add(writer)
            await self._converse(reader, writer, frames)
        except Refused as error:
            self._refuse(writer, str(error))
        except (EOFError, OSError, asyncio.CancelledError):
            pass  # a driver has ended, or comes back on another connection; or the server closes
        finally:
            self._strangers.pop(writer, None)
            self._open.discard(writer)
            writer.close()

    def _admit(self, writer: asyncio.StreamWriter) -> None:
        self._strangers[writer] = None
        if len(self._strangers) > MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            oldest.transport.abort()
            self._strangers.pop(oldest)

    async def _shake_hands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> _Frames:
        challenge = secrets.token_bytes(SECRET_BYTES)
        writer.write(MAGIC + challenge)
        said = await reader.readexactly(2 * SECRET_BYTES)
        nonce, proof = said[:SECRET_BYTES], said[SECRET_BYTES:]
        if not hmac.compare_digest(_proof(self._token, b"client", challenge, nonce), proof):
            raise Refused("a wrong token")
        writer.write(_proof(self._token, b"server", challenge, nonce))
        return _Frames(self._token, challenge, nonce, is_server=True)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, frames: _Frames
    ) -> None:
        while True:
            async with asyncio.timeout(IDLE_S):
                first = await reader.readexactly(1)
            async with asyncio.timeout(FRAME_S):
                length, signature = HEADER.unpack(first + await reader.readexactly(35))
                if length > MOST_BYTES:
                    raise Refused(f"a message of {length} bytes")
                message = frames.unpack(signature, await reader.readexactly(length))
                writer.write(frames.pack(self._answer(message)))
                await writer.drain()

    def _refuse(self, writer: asyncio.StreamWriter, why: str) -> None:
        self.refused += 1
        if self.refused <= 10 or self.refused & (self.refused - 1) == 0:  # a flood: 16, 32, 64 ...
            address = writer.get_extra_info("peername")
            who = address[0] if address else "somebody"
            self._say(f"refused a connection from {who}: {why} ({self.refused} so far)")


class Client:
    """One driver's end. A lost connection is made anew; not for several threads at once."""

    def __init__(self, host: str, port: int, token: Callable[[], str], patience_s: float) -> None:
        """`token` is asked before every connection; `patience_s` is how long one may be lost.

        Does not connect yet.
        """
        self._address, self._token, self._patience_s = (host, port), token, patience_s
        self._socket: socket.socket | None = None
        self._frames: _Frames | None = None

    def connect(self, timeout_s: float = HANDSHAKE_S) -> None:
        """Connect and prove each other the token.

        Raises OSError where that fails, and Refused where the other end has another token.
        """
        token = self._token()
        connection = socket.create_connection(self._address, timeout=timeout_s)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = _receive(connection, len(MAGIC) + SECRET_BYTES)
            challenge, nonce = hello[len(MAGIC) :], secrets.token_bytes(SECRET_BYTES)
            if not hello.startswith(MAGIC):
                raise Refused("it speaks another language")
            connection.sendall(nonce + _proof(token, b"client", challenge, nonce))
            proof = _receive(connection, SECRET_BYTES)
            if not hmac.compare_digest(_proof(token, b"server", challenge, nonce), proof):
                raise Refused("it has another token")
            connection.settimeout(FRAME_S)
        except BaseException:
            connection.close()
            raise
        self._socket, self._frames = connection, _Frames(token, challenge, nonce, is_server=False)

    def ask(self, message: Any) -> Any:
        """The reply to a message. It may be asked twice, where the connection breaks meanwhile.

        Raises ChannelLost where the other end is gone for longer than is bearable.
        """
        lost_at = None
        while True:
            try:
                if self._socket is None:
                    self.connect()
                reply = self._exchange(message)
                if lost_at is not None:
                    away_s = time.monotonic() - lost_at
                    print(f"megascale: node 0 is back after {away_s:.1f} s", flush=True)
                return reply
            except (OSError, EOFError, Refused) as error:
                self.close()
                if lost_at is None:
                    lost_at = time.monotonic()
                    print(f"megascale: node 0 is out of reach: {error}", flush=True)
                nobody = isinstance(error, ConnectionRefusedError)
                limit_s = min(NOBODY_S, self._patience_s) if nobody else self._patience_s
                if time.monotonic() - lost_at > limit_s:
                    raise ChannelLost(str(error)) from None
                time.sleep(RETRY_S)

    def close(self) -> None:
        """Close the connection; `ask` makes another."""
        if self._socket is not None:
            self._socket.close()
        self._socket = self._frames = None

    def _exchange(self, message: Any) -> Any:
        assert self._socket is not None and self._frames is not None
        self._socket.sendall(self._frames.pack(message))
        length, signature = HEADER.unpack(_receive(self._socket, HEADER.size))
        if length > MOST_BYTES:
            raise Refused(f"a message of {length} bytes")
        return self._frames.unpack(signature, _receive(self._socket, length))


def _receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes. Raises EOFError where the other end has closed."""
    received = bytearray()
    while len(received) < count:
        part = connection.recv(count - len(received))
        if not part:
            raise EOFError("closed by the other end")
        received += part
    return bytes(received)
