"""What a user must mend in a run, found before any rank is started. Mostly without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from megascale.checkpoint.folder import make_copies_folder
from megascale.config import Layout, RunConfig, finalize, load_config
from megascale.errors import UserError
from megascale.installation import require_training
from megascale.optim import steplaw
from megascale.run.resolve import load_run
from megascale.run.step_problem import check_cost
from megascale.runtime.files import broken_link
from megascale.runtime.placement import node_name

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Of the drivers of GPUs; where none of them is there, torch need not be asked for devices."""


def check_run(config_path: str, overrides: Sequence[str]) -> RunConfig:
    """The config of a run whose options, corpora, start, cost file and folder of emergency copies
    can be used on this node.

    Raises UserError for the first of them that cannot.
    """
    config = load_run(config_path, overrides).config
    refuse_lost_folder(Path(config.run_dir))
    check_cost(config)
    check_emergency(config)
    return config


def check_emergency(config: RunConfig) -> None:
    """Make this node's folder of emergency copies, where the run makes copies.

    Raises UserError where it cannot be had.
    """
    directory = config.checkpoint.emergency_dir
    if directory is not None:
        make_copies_folder(Path(directory), node_name())


def check_ranks(config: RunConfig, count: int) -> None:
    """Raise UserError where `count` ranks of this machine cannot train this config."""
    require_training()
    Layout.of(config, count)
    if config.device == "cuda" or any(Path(name).exists() for name in GPU_FILES):
        _check_devices(config.device, count)


def fitting_config(path: str, overrides: Sequence[str], worlds: Iterable[int]) -> RunConfig:
    """The config of a run, which must fit worlds of these sizes. Raises UserError."""
    config = load_run(path, overrides).config
    for world in worlds:
        Layout.of(config, world)
    return config


def config_for_calibration(path: str, overrides: Sequence[str]) -> RunConfig:
    """The finalized config; its corpora are looked at only where they give the vocabulary.

    Raises UserError where they give none.
    """
    config = steplaw.resolve(load_config(path, overrides))
    if config.model.vocab_size is None:
        try:
            return load_run(path, overrides).config
        except UserError as error:
            raise UserError(f"{error} (or set model.vocab_size, which needs no corpus)") from None
    return finalize(config, dict.fromkeys(config.data.sources, 1), config.model.vocab_size)


def check_resume(resume: str | None) -> None:
    """Raise UserError for a `--resume` that is no word or step."""
    is_step = isinstance(resume, str) and resume.isascii() and resume.isdigit()
    if resume not in (None, "auto", "latest") and not is_step:
        raise UserError(f"resume {resume}: give auto, latest or the number of a step")


def refuse_used_folder(folder: Path, resume: str | None) -> None:
    """Raise UserError where `folder` holds a run that is not to be continued."""
    if resume is None and (folder / "config.yaml").exists():
        raise UserError(
            f"run_dir {folder} already holds a run; continue it with --resume auto, or branch "
            "off into a new folder with run_dir=..."
        )


def refuse_lost_folder(folder: Path) -> None:
    """Raise UserError where no run folder can be made, for what lies there."""
    problem = broken_link(folder)
    if problem is None and os.path.exists(folder) and not os.path.isdir(folder):
        problem = f"{folder} is there, and no folder"
    if problem is not None:
        raise UserError(f"run_dir {folder}: {problem}; mend it or set another run_dir")


def _check_devices(device: str, count: int) -> None:
    import torch

    from megascale.runtime.distributed import choose_device

    kind, _ = choose_device(device)
    devices = torch.cuda.device_count()
    if kind == "cuda" and count > devices:
        raise UserError(
            f"--ranks {count}: this machine has {devices} CUDA device(s), and every rank takes "
            f"one; give --ranks {devices}, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
