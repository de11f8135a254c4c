"""`megascale report`: a run as one HTML page that needs no other file."""

from __future__ import annotations

import argparse
import base64
import time
from collections.abc import Iterable, Iterator, Mapping
from html import escape as escape_html
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megascale.commands.status import LIVELY, show_step, start_rows
from megascale.errors import UserError
from megascale.monitor.event_texts import event_text, show_field
from megascale.monitor.events import at
from megascale.monitor.quantities import clock, show_duration
from megascale.monitor.run_figures import read_figures
from megascale.monitor.story import PARTS, Story, read_story
from megascale.reading import MOST_TEXT_BYTES, read_whole
from megascale.run.ancestry import earlier_parts
from megascale.run.facts import HELDOUT_TITLES, heldout_row, how_far_it_is, what_it_is
from megascale.runtime.files import real_path, write_output
from megascale.runtime.outputs import Output, begins_with, require_outputs
from megascale.runtime.terminal import escape_controls

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; overflow-wrap: break-word }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0 }
th { color: #777; font-weight: normal }
.wide { overflow-x: auto }
h1, .facts td { overflow-wrap: anywhere } .facts td:first-child { color: #777; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: flex; height: 1.4rem; border-radius: 4px; overflow: hidden; margin: .6rem 0 }
.bar span { display: block } .key { display: inline-block; width: .8rem; height: .8rem;
  border-radius: 2px; margin-right: .4rem }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }
img { width: 100% } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
pre.sample { white-space: pre-wrap; max-height: 16rem; overflow-y: auto }
details { margin: .6rem 0 } summary { cursor: pointer }
"""
COLOURS = {
    "training": "#1b9e77",
    "skipped": "#e7298a",
    "undone": "#e6ab02",
    "repeated": "#d95f02",
    "starting": "#7570b3",
    "planning": "#a6761d",
    "evaluation": "#66a61e",
    "saving": "#2166ac",
    "down": "#c0392b",
    "other": "#bbbbbb",
}
MOST_EVENTS = 500
MOST_SAMPLE_CHARACTERS = 4000
PAGE = begins_with("a page of megascale report", b"<!doctype html>", [b"<h2>Goodput "])


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale report`."""
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="HTML", help="file to write; default: RUN/report.html")


def run_report(args: argparse.Namespace) -> int:
    """Write the page; returns the exit status. Raises UserError for bad input."""
    run = Path(args.run)
    out = Path(args.out) if args.out else run / "report.html"
    require_outputs([Output("--out", out, PAGE, makes_folders=True)])
    story = read_story(run)
    page = "\n".join(render(run, story, _pictures(run), time.time()))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_output(out, page)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a file you may write") from None
    print(f"wrote {out}")
    return 0


def escape(text: str) -> str:
    """Text of a run for a page: without markup, and without characters that turn its order."""
    return escape_html(escape_controls(text))


def _pictures(run: Path) -> dict[str, bytes]:
    """The run's curves as PNG files, by name; none before there are two steps."""
    from megascale.monitor.plots import plot_run

    with TemporaryDirectory() as folder:
        try:
            written = plot_run([run], Path(folder), {run: earlier_parts(run)})
            return {path.stem: path.read_bytes() for path in written}
        except UserError:
            return {}


def render(run: Path, story: Story, pictures: Mapping[str, bytes], now: float) -> Iterator[str]:
    """The page, in pieces."""
    name = escape(real_path(run).name)
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{name}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{name}</h1><p>{escape(story.state(now))}, seen on {clock(now)}</p>"
    figures = read_figures(run)
    facts = (
        *_progress(story, now),
        *how_far_it_is(story, figures.speedup),
        *what_it_is(run, story),
    )
    yield f'<div class="facts">{_rows([], facts)}</div>'
    if figures.heldout:
        yield "<h2>Held-out text</h2>"
        yield _table(HELDOUT_TITLES, map(heldout_row, figures.heldout))
    yield from _sample(story)
    yield f"<h2>Goodput {story.goodput:.1%} of {show_duration(story.wall_s)}</h2>"
    yield from _goodput(story)
    yield "<h2>Starts</h2>"
    yield _table(["started", "ranks", "steps", "took", "end"], start_rows(story, now))
    yield '<h2>Curves</h2><div class="pictures">'
    for stem, content in pictures.items():
        encoded = base64.b64encode(content).decode()
        yield f'<img alt="{escape(stem)}" src="data:image/png;base64,{encoded}">'
    yield "</div>"
    yield "<h2>Events</h2>"
    yield from _events(story)
    for file in ("config.yaml", "plan.txt"):
        if (run / file).exists():
            text = read_whole(run / file, MOST_TEXT_BYTES).decode(errors="replace")
            text = escape(text)
            yield f"<details><summary>{file}</summary><pre>{text}</pre></details>"
    yield "</body></html>"


def _progress(story: Story, now: float) -> Iterator[tuple[str, str]]:
    yield "done", show_step(story)
    if story.eta_s and story.state(now).startswith(LIVELY):
        yield "time left", show_duration(story.eta_s)
    command = story.resume_command(now)
    if command is not None:
        yield "continue it with", command


def _sample(story: Story) -> Iterator[str]:
    """What the model wrote at the end."""
    samples = [event for event in story.events if event["event"] == "sample"]
    if samples:
        prompt, text = (str(samples[-1].get(name, "")) for name in ("prompt", "text"))
        shown = escape(f"{prompt}{text}"[:MOST_SAMPLE_CHARACTERS])
        yield f"<h2>Sample after {escape(repr(prompt[:80]))}</h2>"
        yield f'<pre class="sample">{shown}</pre>'


def _goodput(story: Story) -> Iterator[str]:
    whole = max(story.wall_s, 1e-9)
    parts = {name: seconds for name, seconds in story.parts.items() if seconds > 0}
    yield '<div class="bar">'
    for name, seconds in parts.items():
        style = f"width:{seconds / whole:.4%};background:{COLOURS[name]}"
        yield f'<span style="{style}" title="{name} {show_duration(seconds)}"></span>'
    yield '</div><div class="wide"><table>'
    for name, seconds in parts.items():
        key = f'<span class="key" style="background:{COLOURS[name]}"></span>'
        yield (
            f'<tr><td>{key}{name}</td><td class="n">{show_duration(seconds)}</td>'
            f'<td class="n">{seconds / whole:.1%}</td><td>{PARTS[name]}</td></tr>'
        )
    yield "</table></div>"


def _events(story: Story) -> Iterator[str]:
    events = [event for event in story.events if event["event"] not in ("progress", "sample")]
    if len(events) > MOST_EVENTS:
        yield f"<p>the last {MOST_EVENTS} of {len(events):,}; all are in events.jsonl</p>"
    rows = [
        (clock(at(event)), str(event["event"]).replace("_", " "), _step(event), event_text(event))
        for event in events[-MOST_EVENTS:]
    ]
    yield "<details open><summary>newest last</summary>"
    yield _table(["when", "event", "step", ""], rows)
    yield "</details>"


def _step(event: Mapping[str, Any]) -> str:
    return show_field("step", event["step"]) if event.get("step") is not None else ""


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that can be scrolled where it is wider than the page."""
    return f'<div class="wide">{_rows(titles, rows)}</div>'


def _rows(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    head = f"<tr>{head}</tr>" if head else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{head}{body}</table>"
