"""`megascale experts`: which experts a checkpoint uses for the held-out text of each source."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.model.balance import ExpertUse


def add_experts_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale experts`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run with experts")
    add("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the run")
    add("--step", metavar="N", help="checkpoint of this step; default: the latest")
    add("--out", metavar="DIR", help="folder of experts.json and the picture; default: RUN/plots")


def run_experts(args: argparse.Namespace) -> int:
    """Route held-out text and draw it; returns the exit status. Raises UserError for bad input."""
    run = Path(args.run)
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} holds no config.yaml; give the run_dir of a run")
    if args.step is not None and not args.step.isdigit():
        raise UserError(f"--step {args.step}: give the number of a step")
    from megascale.train.describe import load_run

    whole = "planner.capacity_tokens=null"  # any number of ranks will do
    config, sources = load_run(run / "config.yaml", [whole, *args.overrides])
    if config.model.moe is None:
        raise UserError(f"{run}: its model has no experts (model.moe)")
    from megascale.runtime import distributed

    distributed.prepare_device(config.device)
    from megascale.checkpoint.load import find, restore
    from megascale.model.build import build_model
    from megascale.train.describe import plan_lengths
    from megascale.train.evaluate import heldout_sets
    from megascale.train.step import Learner

    ranks = distributed.start(config)
    try:
        found = find(run, "latest" if args.step is None else int(args.step), ranks)
        assert found is not None, "only auto finds nothing"
        learner = Learner(config, ranks, build_model(config, ranks), None)
        restore(found, learner.model, None, ranks)
        heldout = heldout_sets(learner, sources, partial(plan_lengths, config, ranks.layout))
        if not heldout:
            raise UserError(f"{run}: no source has held-out text; set eval.tokens above 0")
        uses = {name: one.experts(learner) for name, one in heldout.items()}
        if ranks.rank == 0:
            out = Path(args.out) if args.out else run / "plots"
            _tell(uses, config.model.moe.top_k, found.manifest.position.step, out)
    finally:
        distributed.stop()
    return 0


def _tell(uses: dict[str, ExpertUse], top_k: int, step: int, out: Path) -> None:
    """Print a table of the layers; write experts_heldout.json and its picture."""
    from megascale.monitor.experts import divergence_L, plot_shares

    counts = np.array([use.counts_SLE.sum(dim=0).numpy() for use in uses.values()])
    shares = counts / counts.sum(axis=2, keepdims=True)
    pooled = shares.mean(axis=0)
    apart = divergence_L(shares)
    num_experts = shares.shape[2]
    print(f"step {step}, held-out text of {', '.join(uses)}")
    print(
        f"layer  busiest expert (1: even, {num_experts / top_k:g}: all)  unused  divergence, bits"
    )
    for layer, (load, bits) in enumerate(zip(pooled * num_experts, apart, strict=True), start=1):
        divergence = f"{bits:.4f}" if len(uses) > 1 else "n/a, one source"
        print(f"{layer:>5}  {load.max():>14.2f}  {(load == 0).sum():>20}  {divergence}")
    result = {
        "step": step,
        "divergence_bits": [round(float(bits), 5) for bits in apart],
        "share": {name: np.round(one, 5).tolist() for name, one in zip(uses, shares, strict=True)},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "experts_heldout.json"
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
        title = f"Experts that held-out text uses at step {step}"
        plot_shares(list(uses), shares, title, out / "experts_heldout.png")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder you may write") from None
    print(f"wrote {path}\nwrote {out / 'experts_heldout.png'}")
