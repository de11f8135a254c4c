"""`megascale experts`: which experts a checkpoint uses for the held-out text of each source."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from megascale.checkpoint.manifest import MANIFEST, Manifest
from megascale.errors import UserError
from megascale.runtime.files import write_file, write_output
from megascale.runtime.outputs import Output, json_of, picture, require_outputs

if TYPE_CHECKING:
    from megascale.model.balance import ExpertUse
    from megascale.run.resolve import ResolvedRun

RESULT = "experts_heldout.json", json_of("a file of megascale experts", "step", "share")
PICTURE = "experts_heldout.png", picture(".png")


def add_experts_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale experts`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run with experts, or of one checkpoint")
    add("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the run")
    add("--step", metavar="N", help="checkpoint of this step; default: the latest")
    add("--out", metavar="DIR", help="folder of the picture and its JSON; default: RUN/plots")


def run_experts(args: argparse.Namespace) -> int:
    """Route held-out text and draw it; returns the exit status. Raises UserError for bad input."""
    run, step = Path(args.run), args.step
    is_one = (run / MANIFEST).exists()
    if step is not None and (is_one or not step.isdigit()):
        why = f"{run} is one checkpoint, leave it out" if is_one else "give the number of a step"
        raise UserError(f"--step {step}: {why}")
    out = Path(args.out) if args.out else run / "plots"
    require_outputs([Output("--out", out / name, kind, True) for name, kind in (RESULT, PICTURE)])
    config, sources, _ = _load(run, args.overrides, is_one)
    if config.model.moe is None:
        raise UserError(f"{run}: its model has no experts (model.moe)")
    from megascale.runtime import distributed

    distributed.prepare_device(config.device)
    from megascale.checkpoint.load import find, find_at, restore
    from megascale.model.build import build_model
    from megascale.run.step_problem import plan_lengths
    from megascale.training.evaluate import heldout_sets
    from megascale.training.step import Learner

    ranks = distributed.start(config)
    try:
        found = find_at(run, ranks) if step is None else find(run, int(step), ranks)
        assert found is not None, "only auto finds nothing"
        learner = Learner(config, ranks, build_model(config, ranks), None)
        restore(found, learner.model, None, ranks)
        heldout = heldout_sets(learner, sources, partial(plan_lengths, config, ranks.layout))
        if not heldout:
            raise UserError(f"{run}: no source has held-out text; set eval.tokens above 0")
        uses = {name: one.experts(learner) for name, one in heldout.items()}
        if ranks.rank == 0:
            _tell(uses, config.model.moe.top_k, found.manifest.position.step, out)
    finally:
        distributed.stop()
    return 0


def _load(run: Path, overrides: Sequence[str], is_one: bool) -> ResolvedRun:
    """A run by its config, or by the one in a checkpoint. Raises UserError."""
    from megascale.run.resolve import load_run

    words = ["planner.capacity_tokens=null", *overrides]  # any number of ranks will do
    if not is_one:
        if not (run / "config.yaml").exists():
            raise UserError(f"{run} holds no config.yaml; give a run_dir or a checkpoint's folder")
        return load_run(run / "config.yaml", words)
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        write_file(path, Manifest.read(run).position.config)
        return load_run(path, words)


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
        path = out / RESULT[0]
        write_output(path, json.dumps(result) + "\n")
        title = f"Experts that held-out text uses at step {step}"
        plot_shares(list(uses), shares, title, out / PICTURE[0])
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder you may write") from None
    print(f"wrote {path}\nwrote {out / 'experts_heldout.png'}")
