"""torchrun, as a driver starts it: the cause of a failure is written where the driver finds it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megascale.launch.failures import Cause, cause_of_rank, culprit, killed_by
from megascale.runtime.files import write_file
from megascale.runtime.processes import die_with_parent
from megascale.runtime.terminal import escaped_output


def main(words: list[str]) -> int:
    """Run the agent: `words` are the file for the cause, and the command line of torchrun.

    Returns the exit status: 0 when all ranks ended well, else 1.
    """
    die_with_parent()
    # ranks inherit this until they can save; the driver repeats the signal until they do
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    verdict, *options = words
    with escaped_output():  # torchrun prints what ranks say of their failure
        return _run(verdict, options)


def _run(verdict: str, options: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(options))
        return 0
    except ChildFailedError as error:
        cause = culprit([_cause(rank, failure) for rank, failure in error.failures.items()])
    except SignalException as error:
        how, kind = killed_by(error.sigval)
        cause = Cause(f"torchrun was {how}", time.time(), kind=kind)
    except Exception as error:
        cause = Cause(f"{type(error).__name__}: {error}", time.time())
    write_file(Path(verdict), json.dumps(cause.to_json()))
    return 1


def _cause(rank: int, failure: Any) -> Cause:
    said: Any = failure.error_file_data.get("message")
    if isinstance(said, Mapping):
        said = said["message"]
    return cause_of_rank(rank, failure.exitcode, said, float(failure.timestamp))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
