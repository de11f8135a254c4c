"""Whether a device computes and remembers what it should, and how fast.

Products are of whole numbers so small that every sum is exact, in bf16 and in any order: a result
is right to the bit or wrong. Without torch where there is no CUDA driver, so that a node can be
tested in a fraction of a second: `python -m megascale.runtime.self_test`.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Of CUDA and ROCm; where neither is, torch finds no device."""
MIX = 0x9E3779B97F4A7C15 - 2**64
"""Odd, so that its multiples differ in all their bits (Knuth's multiplicative hash)."""
BLOCK_WORDS = 1 << 18
LOOPBACK_BYTES, LOOPBACK_S = 1 << 24, 10.0
REPEATS = 5
"""Of what is moved; the best counts, since anything may come between."""


@dataclass(frozen=True)
class Device:
    """A device to test; on a CPU its arrays are NumPy's, else torch's."""

    name: str
    size: int
    """Rows of the matrices."""
    memory_bytes: int
    """What is written and read back."""
    place: Callable[[NDArray[Any]], Any]
    """To the device, in the type that it multiplies."""
    fetch: Callable[[Any], NDArray[Any]]
    """To the host, in float64."""
    empty: Callable[[int, int], Any]
    """Room for so many rows of words of 64 bits."""
    copy: Callable[[Any], Any]
    """Words of 64 bits, to the device."""
    wait: Callable[[], None]
    """Until it has done all it was given."""


def cpu(size: int = 512, memory_bytes: int = 1 << 26) -> Device:
    """The processor, and some of its memory."""
    return Device(
        name="cpu",
        size=size,
        memory_bytes=memory_bytes,
        place=lambda array: array.astype(np.float32),
        fetch=lambda array: array.astype(np.float64),
        empty=lambda rows, words: np.empty((rows, words), np.int64),
        copy=lambda array: array,
        wait=lambda: None,
    )


def cuda(index: int, memory_share: float, size: int = 4096) -> Device:
    """A CUDA device, and that share of its memory that is free."""
    import torch

    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(device)
    return Device(
        name=f"cuda:{index}",
        size=size,
        memory_bytes=int(free * memory_share),
        place=lambda array: torch.from_numpy(array).to(device, torch.bfloat16),
        fetch=lambda array: array.double().cpu().numpy(),
        empty=lambda rows, words: torch.empty((rows, words), dtype=torch.int64, device=device),
        copy=lambda array: torch.from_numpy(array).to(device),
        wait=lambda: torch.cuda.synchronize(device),
    )


@dataclass(frozen=True)
class SelfTest:
    """What came of testing one device."""

    faults: tuple[str, ...]
    """What came out wrong; none: it is fit as far as this can tell."""
    figures: dict[str, float]
    """`matmul` in FLOP/s, `memory` and `loopback` in bytes/s."""


def examine_device(device: Device, seconds: float) -> SelfTest:
    """Multiply for so many seconds, fill memory and read it back, and talk to oneself."""
    tests = {
        "matmul": lambda: multiply(device, seconds),
        "memory": lambda: remember(device),
        "loopback": loopback,
    }
    faults, figures = [], {}
    for name, test in tests.items():
        try:
            fault, figures[name] = test()
        except Exception as error:  # a broken device fails in ways of its own
            fault = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        faults += [fault] if fault else []
    return SelfTest(tuple(faults), figures)


def multiply(device: Device, seconds: float) -> tuple[str | None, float]:
    """(what is wrong with products, the median FLOP/s of one).

    Each is compared with the first, and that with exact sums by rows (Freivalds' check).
    """
    draw, n = np.random.default_rng(0), device.size
    left = draw.integers(-1, 2, (n, n), np.int8) * (draw.integers(0, 8, (n, n), np.int8) < 3)
    right = draw.integers(-1, 2, (n, n), np.int8)
    weights = 1.0 + np.arange(n) % 97
    expected = left.astype(np.float64) @ (right.astype(np.float64) @ weights)
    a, b = device.place(left), device.place(right)
    first = a @ b
    wrong = int((device.fetch(first) @ weights != expected).sum())
    fault = f"matmul on {device.name} is wrong in {wrong} of {n} rows" if wrong else None
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        device.wait()
        began = time.perf_counter()
        product = a @ b
        device.wait()
        times.append(time.perf_counter() - began)
        if fault is None and bool((product != first).any()):
            fault = f"matmul on {device.name} gives another result the {len(times) + 1}. time"
    return fault, 2.0 * n**3 / statistics.median(times)


def remember(device: Device) -> tuple[str | None, float]:
    """(what is wrong with the memory, bytes read and written per second by a copy).

    Every word is written and read with a pattern of its own, and with its complement.
    """
    rows = max(2, device.memory_bytes // (8 * BLOCK_WORDS))
    pattern = device.copy(np.arange(BLOCK_WORDS, dtype=np.int64) * MIX)
    memory, wrong = device.empty(rows, BLOCK_WORDS), 0
    for turn in (0, -1):
        for row in range(rows):
            memory[row] = pattern ^ (row ^ turn)
        for row in range(rows):
            wrong += int((memory[row] != pattern ^ (row ^ turn)).sum())
    times, half = [], rows // 2
    for _ in range(REPEATS):
        device.wait()
        began = time.perf_counter()
        memory[:half] = memory[half : 2 * half]
        device.wait()
        times.append(time.perf_counter() - began)
    moved = 2 * half * BLOCK_WORDS * 8
    fault = f"memory of {device.name}: {wrong} words of {rows * BLOCK_WORDS} changed"
    return fault if wrong else None, moved / min(times)


def loopback() -> tuple[str | None, float]:
    """(what is wrong with what this machine sends to itself over TCP, bytes/s)."""
    block = np.random.default_rng(1).bytes(LOOPBACK_BYTES)
    buffer, times = bytearray(len(block)), []
    fault = None
    for _ in range(REPEATS):
        times.append(_receive(block, buffer))
        if buffer != block:
            fault = "what is sent over 127.0.0.1 arrives changed"
    return fault, len(block) / min(times)


def _receive(block: bytes, buffer: bytearray) -> float:
    """Send `block` to oneself, into `buffer`; the seconds that it took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LOOPBACK_S)
        sender = threading.Thread(target=_send, args=(listener.getsockname(), block))
        sender.start()
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(LOOPBACK_S)
            began, done, view = time.perf_counter(), 0, memoryview(buffer)
            while done < len(block) and (got := stream.recv_into(view[done:])):
                done += got
        sender.join()
        return time.perf_counter() - began


def _send(address: tuple[str, int], block: bytes) -> None:
    with socket.create_connection(address, LOOPBACK_S) as stream:
        stream.sendall(block)


def local_devices(ranks: int, memory_share: float) -> list[Device]:
    """The devices that `ranks` ranks of this machine would take.

    Raises RuntimeError where CUDA is there, but has fewer devices.
    """
    if not any(path.exists() for path in DRIVERS):
        return [cpu()]
    import torch

    if not torch.cuda.is_available():
        return [cpu()]
    if torch.cuda.device_count() < ranks:
        raise RuntimeError(f"{torch.cuda.device_count()} CUDA devices for {ranks} ranks")
    return [cuda(index, memory_share) for index in range(ranks)]


def main() -> int:
    """Test this machine in about a second; 1, with what is wrong in one line, where it is unfit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="ranks that this machine is to run")
    ranks = parser.parse_args().ranks
    try:
        found = [examine_device(one, 0.1) for one in local_devices(ranks, memory_share=0.02)]
        faults = [fault for one in found for fault in one.faults]
    except RuntimeError as error:
        faults = [str(error)]
    print("; ".join(faults) or "fit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
