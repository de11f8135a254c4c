"""A page as a real browser shows it: Chromium or Chrome without a window, where there is one.

The page gets two scripts of ours: one notes errors from the start, the other writes what is to be
seen into the page, which the browser prints when everything has loaded. Nothing is installed here.
"""

import html
import json
import os
import re
import shutil
import signal
import subprocess

import pytest

BROWSERS = (
    "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser",
    "google-chrome", "google-chrome-stable",
)  # fmt: skip
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--hide-scrollbars", "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--dump-dom",
)  # fmt: skip
LIMIT_S = 240
NOTE_ERRORS = """<script>
window.seenErrors = [];
addEventListener("error", e => seenErrors.push(e.message || `not loaded: ${e.target.src}`), true);
</script>"""
SEE = """<script>
addEventListener("load", () => {
  const text = one => one.textContent;
  const all = (pattern, take) => [...document.querySelectorAll(pattern)].map(take);
  const right = one => one.getBoundingClientRect().right;
  const seen = {
    errors: seenErrors,
    title: document.title,
    headings: all("h1, h2", text),
    tables: all("table", one => [...one.rows].map(row => [...row.cells].map(text))),
    texts: all("pre", text),
    elements: all("pre *", one => one.tagName),
    images: all("img", one => [one.alt, one.complete, one.naturalWidth, one.clientWidth]),
    bars: all(".bar span", one => [one.title, one.getBoundingClientRect().width]),
    loaded: performance.getEntriesByType("resource").map(one => one.name.slice(0, 60)),
    width: document.documentElement.clientWidth,
    needed: document.documentElement.scrollWidth,
    topRight: Math.max(...all("h1, h1 + p, .facts, .facts td", right)),
  };
  const place = document.createElement("i");
  place.id = "seen";
  place.dataset.seen = JSON.stringify(seen);
  document.body.append(place);
});
</script>"""


def find_browser(folder):
    """The browser's program; the test is skipped where none is installed, or none works."""
    found = filter(None, map(shutil.which, BROWSERS))
    program = next(found, None)
    if program is None:
        pytest.skip(f"NO BROWSER: none of {', '.join(BROWSERS)} is installed")
    page = folder / "empty.html"
    page.write_text("<!doctype html><html><head></head><body><h1>here</h1></body></html>")
    try:
        here = look(program, page, 800)
    except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"NO BROWSER: {program} does not work here: {str(error)[-300:]}")
    assert here["headings"] == ["here"]
    return program


def look(program, page, width):
    """What a browser `width` pixels wide sees of a page; see SEE for its parts."""
    text = page.read_text()
    assert text.count("<head>") == text.count("</body>") == 1
    text = text.replace("<head>", f"<head>{NOTE_ERRORS}").replace("</body>", f"{SEE}</body>")
    looked_at = page.with_suffix(".seen.html")
    looked_at.write_text(text)
    profile = page.with_suffix(".profile")
    words = [program, *OPTIONS, f"--window-size={width},1000", f"--user-data-dir={profile}"]
    done, noise = _run([*words, looked_at.resolve().as_uri()])
    found = re.search(r'id="seen" data-seen="([^"]*)"', done)
    assert found, f"the page has not loaded: {noise[-2000:]}"
    seen = json.loads(html.unescape(found[1]))
    seen["console"] = [line for line in noise.splitlines() if ":CONSOLE" in line]
    return seen


def _run(words):
    """Standard output and error of a program that ends in time, with all that it started."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=LIMIT_S)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
