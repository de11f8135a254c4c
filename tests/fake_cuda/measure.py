"""Counts of the real model on a CUDA device that computes nothing, before and now.

Usage: bash tools/test_fake_cuda.sh --measure [FILE.json]
Prints a table. A file gets the counts as "now"; what it has as "before" stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_device
from scene import MOE, Scene, scene

TOKENS = 8192
LAYERS = "model.num_layers={}"
EXPERTS = MOE.replace("num_experts: 8, top_k: 2", "num_experts: 64, top_k: 8")
RING = 8
Row = tuple[str, float]


def micro_batch(found: Scene, ranks: int) -> tuple[Any, Any]:
    """(counts of reading a micro-batch of TOKENS here, those of its forward and backward pass)."""
    from megascale.training.step import run_micro_batches

    model = found.learner.model
    with found.device.counting() as reading:
        batches = found.read((range(ranks), [TOKENS * ranks]))
    if model.balance is not None:
        model.balance.begin(1, TOKENS)
    run_micro_batches(found.learner, batches, 1)  # makes what is made once
    if model.balance is not None:
        model.balance.begin(1, TOKENS)
    batches = found.read((range(ranks), [TOKENS * ranks]))
    with found.device.counting() as running:
        run_micro_batches(found.learner, batches, 1)
    return reading, running


def layers_of(name: str, overrides: str, ranks: int = 1) -> Iterator[Row]:
    """Counts of a layer, as the difference of three layers and two, and of the rest."""
    few, many = (_run((overrides.replace("num_layers: 2", f"num_layers: {layers}"),), ranks)
                 for layers in (2, 3))  # fmt: skip
    launches = many[1].num_launches - few[1].num_launches
    moved = many[1].num_bytes - few[1].num_bytes
    syncs = many[1].syncs.total() - few[1].syncs.total()
    yield f"{name}: launches a layer", launches
    yield f"{name}: GB a layer", moved / 1e9
    yield f"{name}: host syncs a layer", syncs
    yield (
        f"{name}: host syncs of a micro-batch beside layers",
        (few[0].syncs.total() + few[1].syncs.total() - 2 * syncs),
    )
    yield (
        f"{name}: copies to the device of a micro-batch",
        sum(one.copies.total() + _blocking_copies(one) for one in few),
    )
    yield f"{name}: GB of embedding, head and loss", (few[1].num_bytes - 2 * moved) / 1e9
    yield (
        f"{name}: GiB at the peak, above the model",
        ((few[1].peak_bytes - few[1].start_bytes) / 2**30),
    )


def _run(overrides: tuple[str, ...], ranks: int) -> tuple[Any, Any]:
    with scene(*overrides, world=ranks, rank=ranks // 2) as found:
        return micro_batch(found, ranks)


def _blocking_copies(counts: Any) -> int:
    return sum(n for what, n in counts.syncs.items() if what.startswith("copy to device"))


def step() -> Iterator[Row]:
    """Counts of a step beside its one micro-batch. Zeroing the gradients is not the optimizer's."""
    with scene() as found:
        weights = list(found.learner.model.parameters())
        _, running = micro_batch(found, 1)
        found.step(found.read(((0,), [TOKENS])))  # makes what is made once
        with found.device.counting() as whole:
            found.step(found.read(((0,), [TOKENS])))
        with found.device.counting() as once:
            found.read(((0,), [TOKENS]))
    parts = (running, once)
    syncs = whole.syncs.total() - sum(part.syncs.total() for part in parts)
    launches = whole.num_launches - sum(part.num_launches for part in parts)
    moved = whole.num_bytes - whole.bytes["zero_"] - sum(part.num_bytes for part in parts)
    yield "step: host syncs beside micro-batches", syncs
    yield f"optimizer of {len(weights)} weights: launches", launches
    yield "optimizer: bytes a parameter", moved / sum(weight.numel() for weight in weights)


DENSE = (
    "model={num_layers: 2, hidden_size: 4096, num_heads: 32, num_kv_heads: 8, "
    "ffn_hidden_size: 14336, vocab_size: 128256}"
)


def rows() -> Iterator[Row]:
    """Every count."""
    yield from layers_of("8B", DENSE)
    yield from layers_of(f"8B in a ring of {RING}", DENSE, RING)
    yield from layers_of("64 experts, 8 a token", EXPERTS)
    yield from step()


def main() -> None:
    """Print the table, and write it where a file is named."""
    fake_device.install()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    before = json.loads(path.read_text())["before"] if path and path.exists() else {}
    import torch

    found = {name: round(value, 2) for name, value in rows()}
    for name, value in found.items():
        print(f"{name:55s} {before.get(name, ''):>9} {value:9}", flush=True)
    if path is not None:
        now = {"torch": torch.__version__, "before": before or found, "now": found}
        path.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
