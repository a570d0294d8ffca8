"""Pages in headless Chromium: what overflows, which images fail, which text is too faint; skipped without Chromium."""

import contextlib
import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

WIDTHS = (400, 1200)
FAINT = 3.0
"""Contrast below which text counts as illegible (WCAG 2.1 asks for 3 of large text and 4.5 of small text)."""

PROBE = """<!doctype html><meta charset="utf-8"><body><script>
const pages = %s, widths = %s, found = [];
function luminance([r, g, b]) {
  const part = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); };
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
}
function colour(text) {
  const canvas = colour.canvas ||= Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.clearRect(0, 0, 1, 1); context.fillStyle = text; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
}
function ground(element, view) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const c = colour(view.getComputedStyle(e).backgroundColor);
    if (c[3]) layers.push(c);
    if (c[3] === 255) break;
  }
  let under = colour(colour.dark(view) ? "#121212" : "#ffffff");
  for (const c of layers.reverse()) under = under.map((u, i) => c[i] * c[3] / 255 + u * (1 - c[3] / 255));
  return under;
}
colour.dark = (view) => view.matchMedia("(prefers-color-scheme: dark)").matches
  && view.getComputedStyle(view.document.documentElement).colorScheme.includes("dark");
function look(frame, page, width) {
  const view = frame.contentWindow, root = view.document.documentElement, faint = [], seen = new Set();
  for (const e of view.document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const style = view.getComputedStyle(e), box = e.getBoundingClientRect();
    if (!own || style.visibility === "hidden" || style.opacity < 0.5 || !box.width) continue;
    if (e.closest("svg, script, style")) continue;
    const c = colour(style.color); if (c[3] < 128) continue;
    const [a, b] = [luminance(c), luminance(ground(e, view))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), name = e.tagName + "." + e.className;
    if (ratio >= %s || seen.has(name)) continue;
    seen.add(name);
    faint.push(`${name} ${ratio.toFixed(1)}: ${e.textContent.trim().slice(0, 30)}`);
  }
  const dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  found.push({page, width, dark,
    over: root.scrollWidth - view.innerWidth,
    broken: [...view.document.images].filter((i) => !i.naturalWidth).map((i) => i.getAttribute("src").slice(0, 80)),
    faint});
}
async function all() {
  for (const page of pages) for (const width of widths) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    await new Promise((done) => { frame.onload = done; frame.src = page; document.body.append(frame); });
    await Promise.all([...frame.contentDocument.images].map((i) => {
      i.loading = "eager";
      return i.complete || new Promise((done) => { i.onload = i.onerror = done; setTimeout(done, 3000); });
    }));
    look(frame, page, width);
    frame.remove();
  }
  await fetch("/_found", {method: "POST", body: JSON.stringify(found)});
}
all();
</script>"""


class Seen(NamedTuple):
    """What one page shows at one width: pixels that overflow, images that failed, elements that are too faint."""

    page: str
    width: int
    dark: bool
    over: int
    broken: list[str]
    faint: list[str]


def chromium() -> str:
    """Return the command of a Chromium, or skip the test."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here")


@contextlib.contextmanager
def served(folder: Path, posted: "queue.Queue[bytes]") -> Iterator[str]:
    """Serve a folder on the loopback address while the block runs, and give its URL; POST puts into the queue."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def opened(browser: str, url: str, profile: Path, *, dark: bool) -> Iterator[None]:
    """Keep a page open in Chromium, without a window, while the block runs."""
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    switches += [f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    process = subprocess.Popen(
        [browser, *switches, "--window-size=1300,1000", "--remote-debugging-port=0", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def look_at(folder: Path, pages: list[str], tmp_path: Path, *, dark: bool = False, seconds: float = 90) -> list[Seen]:
    """Open pages of a folder at both widths."""
    browser, posted = chromium(), queue.Queue()
    probe = folder / "_probe.html"
    probe.write_text(PROBE % (json.dumps(pages), json.dumps(WIDTHS), FAINT), encoding="utf-8")
    try:
        with served(folder, posted) as url, opened(browser, f"{url}/_probe.html", tmp_path / "profile", dark=dark):
            return [Seen(**row) for row in json.loads(posted.get(timeout=seconds))]
    finally:
        probe.unlink()
