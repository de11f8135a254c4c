"""`megascale launch`: a run is looked at once, then drivers keep its ranks going."""

from __future__ import annotations

import argparse
from functools import partial

from megascale.launch.launch_command import add_launch_arguments, drive_node
from megascale.run.preflight import check_run

__all__ = ["add_launch_arguments", "run_launch"]


def run_launch(args: argparse.Namespace) -> int:
    """Drive this node until the job ends; returns the exit status of `drive_node`.

    Raises UserError for bad input, before anything is started.
    """
    return drive_node(args, partial(check_run, args.config, args.overrides))
