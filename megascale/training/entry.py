"""A run from its config to its end: the device is made ready, then the loop is imported."""

from __future__ import annotations

import psutil

from megascale.run.resolve import ResolvedRun
from megascale.runtime.environment import world_from_environment


def train_on_device(
    run: ResolvedRun, resume: str | None, command: str, entered: float | None = None
) -> bool:
    """Make the device ready and train as `loop.train` does; whether a signal stopped it.

    Without `entered` the run began to make itself ready when this process did.
    """
    from megascale.run.preflight import check_emergency
    from megascale.run.step_problem import check_cost

    config = run.config
    check_cost(config)  # a bad cost file is found before there is a run folder
    if world_from_environment()[1] == 1:  # several ranks tell each other, so that one may speak
        check_emergency(config)
    from megascale.runtime import distributed

    distributed.prepare_device(config.device)
    from megascale.training.loop import train

    entered = psutil.Process().create_time() if entered is None else entered
    return train(run, resume, command, entered)
