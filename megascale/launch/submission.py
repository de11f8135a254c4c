"""From what a user asks of Slurm to the batch script of a run, a sweep or a corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megascale.config import load_config
from megascale.corpus.recipe import load_recipes
from megascale.errors import UserError
from megascale.launch.slurm import BatchJob, script_path, time_limit_s
from megascale.launch.sweep import check_sweep, read_sweep
from megascale.run.preflight import fitting_config

EARLY_S = 60  # so much sooner than asked for may Slurm send its signal (man sbatch, --signal)


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    config: str
    """YAML file of the run, or of the corpus."""
    overrides: tuple[str, ...]
    """Overrides of options; more recipes among them where corpora are prepared."""
    nodes: tuple[int, int]
    """The fewest and the most nodes that work."""
    spare_nodes: int
    """More nodes, which stand by."""
    ranks_per_node: int
    save_s: int
    """Seconds before the time limit at which ranks save."""
    options: Mapping[str, str | None]
    """Of sbatch, by long name, as the user gives them; None for one without a value."""
    settings: Mapping[str, str]
    """Environment variables that the user's options stand for."""
    sweep: str | None
    """A file with the overrides of a run on every line."""

    @property
    def in_container(self) -> bool:
        """Whether ranks run in a container."""
        return "MEGASCALE_CONTAINER" in self.settings

    @property
    def all_options(self) -> dict[str, str | None]:
        """What every job asks sbatch for."""
        least, most = (count + self.spare_nodes for count in self.nodes)
        nodes = str(most) if least == most else f"{least}-{most}"
        return {"chdir": os.getcwd(), "nodes": nodes, **self.options}


def corpus_job(request: Request) -> BatchJob:
    """The job that prepares corpora. Raises UserError for a recipe that cannot be."""
    load_recipes(request.config, request.overrides)  # before it waits in a queue
    own = {"ntasks-per-node": str(request.ranks_per_node), "job-name": Path(request.config).stem}
    return BatchJob(
        "prepare",
        own | request.all_options,
        request.settings,
        [request.config, *request.overrides],
    )


def training_job(request: Request) -> BatchJob:
    """The job of a run or a sweep. Raises UserError where a run cannot be, on any number of nodes
    that is asked for."""
    least, most = request.nodes
    worlds = [least * request.ranks_per_node, most * request.ranks_per_node]
    save_s = request.save_s
    settings = {
        **request.settings,
        "MEGASCALE_RANKS_PER_NODE": str(request.ranks_per_node),
        "MEGASCALE_MIN_NODES": str(least),
        "MEGASCALE_SPARE_NODES": str(request.spare_nodes),
        "MEGASCALE_LEAVE_S": str(save_s * 4 // 5),
    }
    options: dict[str, str | None] = {"signal": f"B:USR1@{save_s}"}
    if not request.in_container and (least < most or request.spare_nodes):
        options |= {"no-kill": None}
    given = request.all_options
    _check_time(given.get("time"), save_s)
    words = [request.config, *request.overrides]
    if request.sweep is None:
        options |= _own_names(fitting_config(request.config, request.overrides, worlds).run_dir)
        return BatchJob("train", options | given, settings, words)
    runs = read_sweep(request.sweep)
    options |= {"job-name": Path(request.sweep).stem, "array": f"0-{len(runs) - 1}"} | given
    folder = f"runs/{options['job-name']}"
    check_sweep(request.config, request.overrides, request.sweep, runs, folder, worlds)
    settings["MEGASCALE_TRAIN_SCRIPT"] = str(script_path("train"))
    return BatchJob("sweep", options, settings, [words[0], request.sweep, *words[1:]])


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


def make_logs(request: Request) -> None:
    """Make the folder for what the job of a run says, which Slurm does not make.

    Raises UserError where it cannot be made.
    """
    folder = Path(load_config(request.config, request.overrides).run_dir) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; set run_dir to a folder you own") from None
