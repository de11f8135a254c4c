"""`megascale status`: where a run is, and where its time went."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.errors import UserError
from megascale.monitor.events import at
from megascale.monitor.metric_fields import field_called
from megascale.monitor.quantities import clock, show_count, show_duration
from megascale.monitor.rank_states import read_heartbeats
from megascale.monitor.sessions import Session
from megascale.monitor.story import PARTS, Story, read_story
from megascale.runtime.terminal import escape_controls, unescaped_stdout

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

REFRESH_S = 2.0
MOST_RANKS = 8
"""Of which is shown how they are."""
LIVELY = ("training", "starting", "silent for")
"""How states begin of a run whose ranks are shown."""
OVER = ("done", "given up", "failed", "could not start")
"""How states begin in which a run does not go on by itself."""


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale status`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run")
    add("--watch", action="store_true", help="stay, and show it anew as it goes on; Ctrl-C ends")
    add("--json", action="store_true", help="print it for a program")


def run_status(args: argparse.Namespace) -> int:
    """Print where the run is; returns the exit status. Raises UserError for bad input."""
    run = Path(args.run)
    if args.json and args.watch:
        raise UserError("--json and --watch do not go together; leave one out")
    if args.json:
        heartbeats = read_heartbeats(run, time.time())
        print(json.dumps({**as_json(read_story(run), time.time()), "heartbeats": heartbeats}))
        return 0
    console = _console()
    if args.watch:
        _watch(run, console)
    else:
        _print(run, read_story(run), time.time(), console)
    return 0


def _print(run: Path, story: Story, now: float, console: Console) -> None:
    console.print(shown(run, story, now))
    command = story.resume_command(now)
    if command is not None:  # on a line of its own, so that it can be copied
        console.print(f"\ncontinue it with:\n  {command}", soft_wrap=True)


def _console() -> Console:
    """A console that controls the terminal, and shows control characters of texts as escapes."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Escaping(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield (
                    segment
                    if segment.control
                    else segment._replace(text=escape_controls(segment.text))
                )

    return Escaping(markup=False, highlight=False, file=unescaped_stdout())


def _watch(run: Path, console: Console) -> None:
    """Until Ctrl-C, or until the run is done or given up."""
    from rich.live import Live

    with Live(shown(run, read_story(run), time.time()), console=console) as live:
        while True:
            time.sleep(REFRESH_S)
            story = read_story(run)
            live.update(shown(run, story, time.time()))
            if story.state(time.time()).startswith(OVER):
                return


def as_json(story: Story, now: float) -> dict[str, Any]:
    """Everything that `shown` shows, as plain values."""
    return {
        "state": story.state(now),
        "step": story.step,
        "total_steps": story.total_steps,
        "tokens_seen": story.tokens_seen,
        "loss": story.last.get("loss"),
        "eta_s": story.eta_s if story.state(now).startswith(LIVELY) else None,
        "resume_command": story.resume_command(now),
        "wall_s": story.wall_s,
        "goodput": story.goodput,
        "parts_s": story.parts,
        "starts": [
            {
                "began": one.began,
                "ended": one.ended,
                "ranks": one.world,
                "first_step": one.first_step,
                "last_step": one.last_step,
                "end": one.end,
            }
            for one in story.sessions
        ],
        "failed_starts": [
            {"time": at(event), "error": event.get("error")} for event in story.failed_starts
        ],
    }


def shown(run: Path, story: Story, now: float) -> Group:
    """What a terminal shows of a run."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    part = story.step / max(1, story.total_steps or 0)
    head = Text(f"{run}: {story.state(now)}", style="bold")
    where = Table.grid(padding=(0, 2))
    where.add_row(ProgressBar(total=1.0, completed=part, width=30), *_where(story, part, now))
    went = Table(box=None, pad_edge=False, header_style="dim")
    went.add_column(f"goodput {story.goodput:.1%} of {show_duration(story.wall_s)}")
    went.add_column("time", justify="right")
    went.add_column("part", justify="right")
    went.add_column()
    for name, seconds in story.parts.items():
        if seconds >= 0.5 or name == "training":
            share = seconds / max(story.wall_s, 1e-9)
            went.add_row(name, show_duration(seconds), f"{share:.1%}", Text(PARTS[name], "dim"))
    starts = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("started", "ranks", "steps", "took", "end"):
        starts.add_column(title)
    for cells in start_rows(story, now)[-10:]:
        starts.add_row(*cells)
    ranks = _ranks(read_heartbeats(run, now)) if story.state(now).startswith(LIVELY) else ()
    return Group(head, where, Text(), went, Text(), starts, *ranks)


def _ranks(heartbeats: Mapping[str, Any] | None) -> Iterator[Table | Text]:
    """The ranks that have not moved for longest."""
    from rich.table import Table
    from rich.text import Text

    if heartbeats is None:
        return
    ranks = sorted(heartbeats["ranks"], key=lambda one: (-one["quiet_s"], one["rank"]))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (f"rank of {len(ranks)}", "node", "step", "in", "last over ranks", "quiet"):
        table.add_column(title)
    table.add_column("memory", justify="right")
    for one in ranks[:MOST_RANKS]:
        doing = "waiting for others" if one["waits"] else one["phase"]
        state = doing if one["state"] == "runs" else one["state"]
        last = f"{one['last']} {one['calls']}" if one["last"] else ""
        memory = f"{max(one['memory_mib'], one['device_mib']):,} MiB"
        quiet = show_duration(one["quiet_s"])
        cells = (str(one["rank"]), one["node"], f"{one['step']:,}", state, last, quiet, memory)
        table.add_row(*map(Text, cells))
    yield Text()
    yield table


def _where(story: Story, part: float, now: float) -> Iterator[str]:
    yield f"{part:.1%}"
    yield show_step(story)
    last = story.last
    if not last:
        return
    yield f"{show_count(story.tokens_seen)} tokens"
    shown = (field_called(name).on_console(last[name]) for name in ("loss", "tokens_per_s"))
    yield from filter(None, shown)
    eta = story.eta_s
    if eta and story.state(now).startswith(LIVELY):
        yield f"ETA {show_duration(eta)}"


def show_step(story: Story) -> str:
    """The steps done, of how many where that is known."""
    total_steps = story.total_steps
    return f"step {story.step:,}" + (f" of {total_steps:,}" if total_steps is not None else "")


def start_rows(story: Story, now: float) -> list[tuple[str, ...]]:
    """The starts of a run in five columns, oldest first: when, ranks, steps, how long, its end.

    Failures before which nothing was trained are among them.
    """
    state, sessions = story.state(now), story.sessions
    failed = list(story.failed_starts)
    newest = max([one.started for one in sessions] + [at(event) for event in failed], default=0.0)
    rows = [(one.began, _start_row(one, one.started == newest, state)) for one in sessions]
    for event in failed:
        cells = (clock(at(event)), "", "never began", "", str(event.get("error")))
        rows.append((at(event), cells))
    return [cells for _, cells in sorted(rows)]


def _start_row(one: Session, is_last: bool, state: str) -> tuple[str, ...]:
    end = one.end or (state if is_last else "no word: killed, or its node was lost")
    steps = f"{one.first_step:,} to {one.last_step:,}"
    return (clock(one.began), str(one.world), steps, show_duration(one.ended - one.began), end)
