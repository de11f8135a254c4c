"""`megascale submit`: a checked config as a job of Slurm."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from megascale.config import Layout, RunConfig, load_config
from megascale.config.load import whole_number
from megascale.corpus.recipe import load_recipe
from megascale.errors import UserError
from megascale.launch.slurm import (
    MOST_NODES,
    BatchJob,
    node_range,
    script_path,
    submit,
    time_limit_s,
)
from megascale.reading import MOST_TEXT_BYTES, read_whole
from megascale.run.resolve import load_run
from megascale.runtime.files import real_path

MOST_RANKS = 1024
LEAST_SAVE_S, MOST_SAVE_S = 10, 65_535
EARLY_S = 60  # so much sooner than asked for may Slurm send its signal (man sbatch, --signal)
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
    add("overrides", nargs="*", metavar="a.b=c", help="options that replace those of the file")
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
    job = _prepare_job(args) if args.job == "prepare" else _training_job(args)
    script = job.render()
    if args.dry_run:
        print(script, end="")
        return 0
    if args.job == "train" and args.sweep is None:
        _make_logs(args)
    number = submit(script)
    name = job.options["job-name"]
    print(f"job {number} ({name}), nodes {job.options['nodes']}: squeue -j {number} shows it")
    return 0


def _prepare_job(args: argparse.Namespace) -> BatchJob:
    load_recipe(args.config, args.overrides)  # a bad recipe is found before it waits in a queue
    own = {"ntasks-per-node": str(_ranks(args)), "job-name": Path(args.config).stem}
    return BatchJob(
        "prepare", own | _options(args), _settings(args), [args.config, *args.overrides]
    )


def _training_job(args: argparse.Namespace) -> BatchJob:
    least, most = node_range(args.nodes)
    worlds = [least * _ranks(args), most * _ranks(args)]
    save_s = _given(args.save_s, "300", "--save-s", LEAST_SAVE_S, MOST_SAVE_S)
    settings = _settings(args) | {
        "MEGASCALE_RANKS_PER_NODE": str(_ranks(args)),
        "MEGASCALE_MIN_NODES": str(least),
        "MEGASCALE_SPARE_NODES": str(_spares(args)),
        "MEGASCALE_LEAVE_S": str(save_s * 4 // 5),
    }
    options: dict[str, str | None] = {"signal": f"B:USR1@{save_s}"}
    if args.container is None and (least < most or _spares(args)):
        options |= {"no-kill": None}
    given = _options(args)
    _check_time(given.get("time"), save_s)
    if args.sweep is None:
        options |= _own_names(_checked(args.config, args.overrides, worlds).run_dir)
        return BatchJob("train", options | given, settings, [args.config, *args.overrides])
    runs = _read_sweep(args.sweep)
    options |= {"job-name": Path(args.sweep).stem, "array": f"0-{len(runs) - 1}"} | given
    _check_sweep(args, runs, f"runs/{options['job-name']}", worlds)
    settings["MEGASCALE_TRAIN_SCRIPT"] = str(script_path("train"))
    return BatchJob("sweep", options, settings, [args.config, args.sweep, *args.overrides])


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


def _check_time(limit: str | None, save_s: int) -> None:
    """A job that is told to save as soon as it begins would be requeued for ever."""
    limit_s = None if limit is None else time_limit_s(limit)
    if limit_s is not None and limit_s <= save_s + EARLY_S:
        raise UserError(
            f"--time {limit} leaves nothing beside the {save_s} s of --save-s and the {EARLY_S} s "
            f"that Slurm may be early; give more than {save_s + EARLY_S} s, or a smaller --save-s"
        )


def _own_names(run_dir: str) -> dict[str, str]:
    """The names of a job and its log, by the folder of its run. Raises UserError."""
    if "\\" in run_dir or not run_dir.isprintable():
        raise UserError(
            f"run_dir {run_dir!r}: Slurm cannot write a log there; use a name without backslashes "
            "and control characters"
        )
    logs = str(Path(run_dir) / "logs").replace("%", "%%")
    return {"job-name": Path(os.path.abspath(run_dir)).name, "output": f"{logs}/slurm-%j.log"}


def _check_sweep(
    args: argparse.Namespace, runs: Sequence[Sequence[str]], folder: str, worlds: Sequence[int]
) -> None:
    """All runs of a sweep are sound, and none writes where another does. Raises UserError."""
    owners: dict[Path, int] = {}
    for index, run in enumerate(runs):
        words = [f"run_dir={folder}/{index}", *args.overrides, *run]  # as slurm/sweep.sbatch
        for run_dir in _checked(args.config, words, worlds).run_dirs:
            owner = owners.setdefault(real_path(run_dir), index)
            if owner != index:
                raise UserError(
                    f"--sweep {args.sweep}: lines {owner + 1} and {index + 1} have one run_dir, "
                    f"{run_dir}; give each its own, or none anywhere for {folder}/INDEX"
                )


def _options(args: argparse.Namespace) -> dict[str, str | None]:
    """What every job asks sbatch for."""
    least, most = (count + _spares(args) for count in node_range(args.nodes))
    nodes = str(most) if least == most else f"{least}-{most}"
    options: dict[str, str | None] = {"chdir": os.getcwd(), "nodes": nodes}
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


def _settings(args: argparse.Namespace) -> dict[str, str]:
    given = {f"MEGASCALE_{name.upper()}": getattr(args, name) for name in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def _ranks(args: argparse.Namespace) -> int:
    """Ranks on every node."""
    if args.ranks_per_node is None and args.gpus_per_node is not None:
        return whole_number(args.gpus_per_node, "--gpus-per-node", 1, MOST_RANKS)
    return _given(args.ranks_per_node, "1", "--ranks-per-node", 1, MOST_RANKS)


def _spares(args: argparse.Namespace) -> int:
    return _given(args.spare_nodes, "0", "--spare-nodes", 0, MOST_NODES)


def _given(text: str | None, default: str, option: str, least: int, most: int) -> int:
    return whole_number(default if text is None else text, option, least, most)


def _checked(config_path: str, overrides: Sequence[str], worlds: Iterable[int]) -> RunConfig:
    """The config, which must fit worlds of these sizes. Raises UserError."""
    config = load_run(config_path, overrides).config
    for world in worlds:
        Layout.of(config, world)
    return config


def _read_sweep(path: str) -> list[list[str]]:
    """The overrides of every run of a sweep. Raises UserError."""
    try:
        text = read_whole(path, MOST_TEXT_BYTES, or_stream=True).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--sweep {path}: {reason}; give a file of overrides, a line a run"
        ) from None
    lines = text.removesuffix("\n").split("\n")
    return [sweep_words(line, f"--sweep {path}, line {i}") for i, line in enumerate(lines, 1)]


def sweep_words(line: str, where: str) -> list[str]:
    """The words of a line as xargs reads it in slurm/sweep.sbatch. Raises UserError."""
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line):
        raise UserError(
            f"{where} holds a carriage return or another control character; end lines as Unix does"
        )
    reader = shlex.shlex(line, posix=True)
    reader.whitespace, reader.whitespace_split, reader.commenters = " \t", True, ""
    reader.escapedquotes = ""  # to xargs a backslash in quotes is a letter like others
    try:
        words = list(reader)
    except ValueError as error:
        raise UserError(f"{where}: {str(error).lower()}; pair the quotes") from None
    if not words:
        raise UserError(f"{where} is empty; every line must hold overrides")
    return words


def _make_logs(args: argparse.Namespace) -> None:
    """The folder for what the job says, which Slurm does not make."""
    folder = Path(load_config(args.config, args.overrides).run_dir) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set run_dir to a folder you own") from None
