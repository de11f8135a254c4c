"""`megascale submit`: a checked config as a job of Slurm."""

from __future__ import annotations

import argparse
import os
import re
import sys

from megascale.config.load import whole_number
from megascale.errors import UserError
from megascale.launch.slurm import MOST_NODES, node_range, submit
from megascale.launch.submission import Request, corpus_job, make_logs, training_job

MOST_RANKS = 1024
LEAST_SAVE_S, MOST_SAVE_S = 10, 65_535
SETTINGS = ("site", "venv", "container", "mounts", "mpi", "check")
PASSED_ON = ("partition", "account", "qos", "time")
ONLY_WITH = {
    "train": ("sweep", "gpus_per_node", "spare_nodes", "save_s", "check"),
    "prepare": ("mpi",),
}


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale submit`."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file of the run; with --job prepare, of a corpus")
    more = "options that replace those of the file; with --job prepare more recipes too"
    add("overrides", nargs="*", metavar="a.b=c", help=more)
    add("--job", choices=("train", "prepare"), default="train", help="default: train")
    add("--sweep", metavar="LIST", help="a run for every line of this file, which holds overrides")
    add("--dry-run", action="store_true", help="print the batch script instead of submitting it")
    group = parser.add_argument_group("what it needs")
    add = group.add_argument
    nodes = "how many nodes; 6-8 begins with 6 to 8 and goes on while 6 are left. Default: 1"
    add("--nodes", metavar="N|MIN-MAX", default="1", help=nodes)
    add("--spare-nodes", metavar="N", help="more nodes that stand by; default: 0")
    add("--gpus-per-node", metavar="N", help="GPUs of every node, a rank on each")
    ranks = "default: one per GPU; 1 without"
    add("--ranks-per-node", metavar="N", help=ranks)
    add("--time", metavar="LIMIT", help="time limit of each job, e.g. 12:00:00")
    save = "seconds before the time limit at which ranks save and the job is requeued"
    add("--save-s", metavar="S", help=f"{save}; default: 300")
    add("--name", help="name of the job; default: the last part of run_dir")
    for option in ("partition", "account", "qos"):
        add(f"--{option}", help="as of sbatch")
    more = "any other option of sbatch, e.g. --sbatch=--constraint=h100; may be given again"
    add("--sbatch", action="append", default=[], metavar="--OPTION=VALUE", help=more)
    group = parser.add_argument_group("where it runs")
    add = group.add_argument
    add("--site", metavar="FILE", help="a shell file to source first: modules, NCCL_... settings")
    add("--venv", metavar="DIR", help="a virtual environment to activate")
    add("--container", metavar="IMAGE", help="a .sif file for Apptainer, or an image for pyxis")
    add("--mounts", metavar="A:A,B:B", help="folders of the container beside this one")
    add("--mpi", metavar="KIND", help="with --job prepare: pmix or pmi2 for srun, or mpiexec")
    add("--check", metavar="COMMAND", help="a shell command that fails where a node is not fit")


def run_submit(args: argparse.Namespace) -> int:
    """Submit the job, or print its script; returns the exit status. Raises UserError."""
    _refuse_unused(args)
    _look_at_files(args)
    request = _request(args)
    job = corpus_job(request) if args.job == "prepare" else training_job(request)
    script = job.render()
    if args.dry_run:
        print(script, end="")
        return 0
    if args.job == "train" and args.sweep is None:
        make_logs(request)
    number = submit(script)
    name = job.options["job-name"]
    print(f"job {number} ({name}), nodes {job.options['nodes']}: squeue -j {number} shows it")
    return 0


def _request(args: argparse.Namespace) -> Request:
    settings = {f"MEGASCALE_{name.upper()}": getattr(args, name) for name in SETTINGS}
    return Request(
        config=args.config,
        overrides=tuple(args.overrides),
        nodes=node_range(args.nodes),
        spare_nodes=_given(args.spare_nodes, "0", "--spare-nodes", 0, MOST_NODES),
        ranks_per_node=_ranks(args),
        save_s=_given(args.save_s, "300", "--save-s", LEAST_SAVE_S, MOST_SAVE_S),
        options=_options(args),
        settings={name: value for name, value in settings.items() if value is not None},
        sweep=args.sweep,
    )


def _refuse_unused(args: argparse.Namespace) -> None:
    """Options that mean nothing to the other kind of job are mistakes."""
    for job, names in ONLY_WITH.items():
        for name in names if args.job != job else ():
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --job {job}; leave it out")


def _look_at_files(args: argparse.Namespace) -> None:
    """Whether --site and --venv are what a job can use; a venv may be on the nodes alone."""
    if args.site is not None and not (os.path.isfile(args.site) and os.access(args.site, os.R_OK)):
        raise UserError(f"--site {args.site}: no file that can be read; give a shell file")
    if args.venv is None or os.path.isfile(f"{args.venv}/bin/activate"):
        return
    if os.path.exists(args.venv):
        raise UserError(
            f"--venv {args.venv}: it has no bin/activate; give the folder that python -m venv made"
        )
    print(f"megascale: --venv {args.venv} is not on this machine; nodes need it", file=sys.stderr)


def _options(args: argparse.Namespace) -> dict[str, str | None]:
    """Options of sbatch that the command line gives, by long name."""
    options: dict[str, str | None] = {}
    if args.gpus_per_node is not None:
        gpus = whole_number(args.gpus_per_node, "--gpus-per-node", 1, MOST_RANKS)
        options["gpus-per-node"] = str(gpus)
    if args.name is not None and not (args.name.strip() and args.name.isprintable()):
        raise UserError(f"--name {args.name!r}: write a name on one line, or leave it out")
    given = {"job-name": args.name} | {name: getattr(args, name) for name in PASSED_ON}
    options |= {name: value for name, value in given.items() if value is not None}
    for text in args.sbatch:
        match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", text, re.DOTALL)
        if match is None:
            raise UserError(f"--sbatch {text}: write --sbatch=--OPTION=VALUE")
        options[match[1]] = match[2]
    return options


def _ranks(args: argparse.Namespace) -> int:
    """Ranks on every node."""
    if args.ranks_per_node is None and args.gpus_per_node is not None:
        return whole_number(args.gpus_per_node, "--gpus-per-node", 1, MOST_RANKS)
    return _given(args.ranks_per_node, "1", "--ranks-per-node", 1, MOST_RANKS)


def _given(text: str | None, default: str, option: str, least: int, most: int) -> int:
    return whole_number(default if text is None else text, option, least, most)
