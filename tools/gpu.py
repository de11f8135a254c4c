"""The acceptance on one GPU, a part at a time: `python tools/gpu.py --part NAME --json FILE`.

`bash tools/gpu.sh` runs all parts, each in a process of its own and with a limit of time. With
`--small` every part runs at tiny sizes on CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from gpu_rows import Rows, measure_all

ROOT = Path(__file__).parents[1]
PARTS = {
    "ceilings": ("gpu_kernels", ("matrix_product", "copy")),
    "kernels": ("gpu_kernels", ("rotary", "swiglu", "merge", "loss")),
    "tests": ("gpu_tests", ("tests_on_gpu",)),
    "waits": ("gpu_training", ("dense_waits", "expert_waits", "step_waits")),
    "mfu": ("gpu_training", ("mfu_1b", "mfu_8b_layers")),
    "experts": ("gpu_experts", ("experts_step", "launches", "grouped_against_single")),
    "pack": ("gpu_attention", ("tailed_pack",)),
    "ring": ("gpu_attention", ("ring_agrees", "ring_hops")),
    "offload": ("gpu_memory", ("offload",)),
    "state": ("gpu_memory", ("peak", "save", "resume")),
}
"""For each part its module, and what it measures."""


def measures(part: str) -> tuple[Callable[[Rows], None], ...]:
    """The functions of a part."""
    module, names = PARTS[part]
    return tuple(getattr(import_module(module), name) for name in names)


def main(words: list[str] | None = None) -> int:
    """Run one part, or write that it did not end."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="default: gpu.json")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on CPU")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--ended", type=int, help="write that the part ended with this status")
    arguments = parser.parse_args(words)
    if arguments.list:
        print(*PARTS)
        return 0
    if arguments.part is None:
        parser.error("--part is missing")
    if arguments.ended is not None:
        Rows(arguments.json, arguments.part, keep=True).ended(arguments.ended)
        return 0
    if not arguments.small and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --small runs the parts at tiny sizes on CPU")
    prepare()
    rows = Rows(arguments.json, arguments.part, arguments.small)
    measure_all(rows, measures(arguments.part))
    return 0


def prepare() -> None:
    """Choose the device before megatron-core is imported; find what tests share."""
    sys.path.append(str(ROOT / "tests"))
    from megascale.runtime.distributed import prepare_device

    prepare_device("auto")


if __name__ == "__main__":
    sys.exit(main())
