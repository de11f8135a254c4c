"""Growth streams: a checkpoint of four times the memory that the process may take is grown."""

import pytest
from memory_limit import on_linux, run_python

MAKE_AND_GROW = """
import sys
from pathlib import Path
from memory_limit import limit_memory
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
limit_memory(size // 4)
grow(*base, "out")
print(size, sum(file.stat().st_size for file in (folder / "out").iterdir()))
"""


@on_linux
@pytest.mark.parametrize("operator, times", [("stack", 2), ("width", 4)])
def test_a_checkpoint_larger_than_memory_grows(tmp_path, operator, times):
    before, after = map(int, run_python(MAKE_AND_GROW, tmp_path, operator).split())
    assert before > 120_000_000 and after == pytest.approx(times * before, rel=0.01)
