"""Growth streams: a checkpoint of four times the memory that the process may take is grown."""

import subprocess
import sys

import pytest

MAKE_AND_GROW = """
import resource, sys
from pathlib import Path
from megascale.runtime import distributed
distributed.prepare_device("cpu")
import torch
from megascale.checkpoint.load import find_at
from megascale.checkpoint.manifest import Position
from megascale.checkpoint.tensors import Piece, Tensors, write_checkpoint
from megascale.growth.depth import deepen
from megascale.growth.layer_orders import stacked
from megascale.growth.width import widen

SIZE, folder = 512, Path(sys.argv[1])
key = "decoder.layers.self_attention.linear_proj.weight"


def written(name, layers):
    pieces = (
        Piece(key, (layers, SIZE, SIZE), (i, 0, 0), torch.full((1, SIZE, SIZE), float(i)))
        for i in range(layers)
    )
    write_checkpoint(folder / name, pieces, Position(0, 0, 1, "", {}))
    return Tensors(find_at(folder / name)), layers


def grow(base, layers, out):
    grown = deepen(base, stacked(layers, 2)) if sys.argv[2] == "stack" else widen(base, 2, True)
    write_checkpoint(folder / out, grown, Position(0, 0, 1, "", {}))


grow(*written("small", 1), "warm")  # what is loaded once is no part of the checkpoint's memory
base = written("base", 120)
size = sum(file.stat().st_size for file in (folder / "base").iterdir())
data = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
limit = int(data.split()[1]) * 1024 + size // 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.zeros(size // 4)
    sys.exit("the limit does not bind")
except (RuntimeError, MemoryError):
    pass
grow(*base, "out")
print(size, sum(file.stat().st_size for file in (folder / "out").iterdir()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's RLIMIT_DATA")
@pytest.mark.parametrize("operator, times", [("stack", 2), ("width", 4)])
def test_a_checkpoint_larger_than_memory_grows(tmp_path, operator, times):
    done = subprocess.run(
        [sys.executable, "-c", MAKE_AND_GROW, str(tmp_path), operator],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(int, done.stdout.split())
    assert before > 120_000_000 and after == pytest.approx(times * before, rel=0.01)
