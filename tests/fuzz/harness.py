"""Runs a case and judges how it ended: well, refused in one line, or a crash or a hang."""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megascale.errors import UserError

READER_S, VERB_S = 10.0, 60.0
"""Processor time after which a case of a reader, or of a verb, counts as a hang. A verb may work
for long on large numbers that it allows, such as a plan for 100,000 ranks."""
MOST_MESSAGE = 4000
Target = Callable[[random.Random, Any], None]


class Hang(BaseException):
    """A case took too long."""


class Wrong(Exception):
    """A case ended in a way that a user must not see."""


@dataclass
class Tally:
    """How the cases of one target ended."""

    cases: int = 0
    refused: int = 0
    """Cases that ended in a UserError."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Number of the case, and what happened."""


def run_case(name: str, target: Target, seed: int, number: int, scene: Any, tally: Tally) -> None:
    """Run one case, which its seed, target and number decide."""
    rng = random.Random(f"{seed}/{name}/{number}")
    tally.cases += 1
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, VERB_S if " " in name else READER_S)
    try:
        target(rng, scene)
    except UserError as error:
        tally.refused += 1
        if len(str(error).splitlines()) != 1 or len(str(error)) > MOST_MESSAGE:
            tally.failures.append((number, f"not one line: {str(error)[:200]!r}"))
    except Hang:
        tally.failures.append((number, f"hang: {traceback.format_exc()[-1500:]}"))
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of libraries in Rust are no Exception
        tally.failures.append((number, traceback.format_exc()[-1500:]))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _stop(signum: int, frame: Any) -> None:
    raise Hang
