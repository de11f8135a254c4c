"""Results of the papers on small models and real text: `python tools/reproduce.py NAME [...]`.

moe: "Demons in the Detail" (arXiv 2501.11873). The same model with experts trains on several
domains under each kind of balance, with the same data and seeds: held-out loss, how even the
experts are used, and how far the domains differ in the experts they use.

continual: "Simple and Scalable Strategies to Continually Pre-train" (arXiv 2403.08763). A model
of Python goes on with English, or with German: what it learns, and what it forgets, by schedule
and replay, beside one that learns both from scratch.

growth: "Stacking Your Transformers" (arXiv 2405.15319). A quarter of the layers first, then grown,
beside the whole model from scratch, at equal floating-point operations.

infowindow: "Training LLMs over Neurally Compressed Text" (arXiv 2404.03626). One model learns from
bytes, BPE, plain AC and Equal-Info Windows, at equal bytes (--tokens are bytes of text here) and
at equal tokens. About half an hour on 2 idle cores with --seeds 1.

Runs that are finished are not run again, so a reproduction that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reproduce_continual import continual
from reproduce_growth import growth
from reproduce_infowindow import infowindow
from reproduce_moe import moe
from small_runs import RESULTS, ROOT

REPRODUCTIONS = {
    "moe": (moe, "2M"),
    "continual": (continual, "600K"),
    "growth": (growth, "500K"),
    "infowindow": (infowindow, "1400K"),
}


def main() -> int:
    """Run one reproduction."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=REPRODUCTIONS)
    usual = ", ".join(f"{name} {tokens}" for name, (_, tokens) in REPRODUCTIONS.items())
    parser.add_argument("--tokens", help=f"of every run, or stage of one (default: {usual})")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "reproduce", help="of runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="of JSON and pictures")
    options = parser.parse_args()
    run, tokens = REPRODUCTIONS[options.name]
    options.tokens = options.tokens or tokens
    options.out.mkdir(parents=True, exist_ok=True)
    run(options)
    print(f"written: {options.out}/{options.name}.json, {options.out}/{options.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
