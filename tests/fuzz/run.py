"""Fuzzing of every reader and verb: `python tests/fuzz/run.py --cases 100000 --seed 1`.

A case is decided by the seed, the name of its target and its number, so `--only config --case 17`
runs one again. Prints for each target how many cases ran, were refused in one line, and failed;
ends with 1 where any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz.harness import Tally, run_case
from fuzz.readers import READERS
from fuzz.scene import Scene
from fuzz.verbs import VERBS

TARGETS = READERS | VERBS
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
MEMORY_BYTES = 4 << 30
"""That cases may take beside what the process has before them."""
SHOWN = 3
"""Failures of a target that are printed."""


def main() -> int:
    """Run the cases that the command line asks for; the exit status."""
    args = _arguments()
    began, failed = time.monotonic(), 0
    with prepared() as scene:
        for name, count in counts(args.cases, args.only).items():
            first = args.case if args.case is not None else args.first
            numbers = range(first, first + (1 if args.case is not None else count))
            tally = run_target(name, args.seed, numbers, scene)
            counted = f"{tally.cases:>7,} cases {tally.refused:>7,} refused"
            seconds = f"{time.monotonic() - began:>6.0f} s"
            print(f"{name:<26} {counted} {len(tally.failures):>4} failed {seconds}", flush=True)
            for number, text in tally.failures[: args.show]:
                print(f"--- {name}, case {number}\n{text}")
            failed += len(tally.failures)
    print(f"{failed} failed")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", type=int, default=1000, help="in all; each target gets a part by its weight")
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="number of the first case of each target")
    add("--only", nargs="*", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET")
    add("--case", type=int, help="run this case alone, with --only")
    add("--show", type=int, default=SHOWN, help="failures of a target to print")
    return parser.parse_args()


def counts(cases: int, names: list[str]) -> dict[str, int]:
    """How many of `cases` each target gets, one at least."""
    whole = sum(TARGETS[name][1] for name in names)
    return {name: max(1, round(cases * TARGETS[name][1] / whole)) for name in names}


@contextlib.contextmanager
def limited_memory():
    """In the block this process gets no more than MEMORY_BYTES: what wants more is a crash."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def prepared():
    """A scene in a folder that is gone afterwards, which is the current folder meanwhile."""
    before, set_before = os.getcwd(), {name: os.environ.get(name) for name in OFFLINE}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("ignore")
        os.environ.update(OFFLINE)
        folder = Path(name, "a", "b", "c")
        folder.mkdir(parents=True)
        os.chdir(folder)
        logging.disable(logging.CRITICAL)
        try:
            yield Scene(folder)
        finally:
            logging.disable(logging.NOTSET)
            os.chdir(before)
            for key, value in set_before.items():
                os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def run_target(name: str, seed: int, numbers: range, scene: Scene) -> Tally:
    """Run cases of one target."""
    tally = Tally()
    for number in numbers:
        run_case(name, TARGETS[name][0], seed, number, scene, tally)
    return tally


if __name__ == "__main__":
    sys.exit(main())
