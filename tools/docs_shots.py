"""Check the built documentation in headless Chromium: screenshots, and complaints about rendering problems.

    python tools/docs_shots.py                        # every page, wide and narrow, light and dark
    python tools/docs_shots.py index guide/start      # these alone

It fails on console errors, pages wider than the window, broken images, unrendered formulas, and external requests.
Screenshots are written to docs/_build/shots. Chromium must be installed; `CHROMIUM` selects another executable.
"""

import argparse
import asyncio
import base64
import functools
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import aiohttp

BUILD = Path(__file__).resolve().parents[1] / "docs" / "_build"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
WINDOWS = {"wide": (1280, 1000), "narrow": (390, 844)}
SHOTS = ("index", "guide/start", "guide/which_form", "methods/von_neumann", "gallery/linear_probe", "api/callbacks")
LOOK = """
(async () => {
  if (window.MathJax && MathJax.startup) { await MathJax.startup.promise; }
  await Promise.all([...document.images].map(image => image.complete ? 0 : image.decode().catch(() => 0)));
  const found = [];
  const over = document.scrollingElement.scrollWidth - innerWidth;
  if (over > 1) {
    const inside = [...document.querySelectorAll("article *")];
    const wide = inside.filter(e => e.getBoundingClientRect().right > innerWidth + 1);
    found.push(`is ${over} pixels wider than the window` + (wide.length ? `: ${wide[0].outerHTML.slice(0, 80)}` : ""));
  }
  for (const image of document.images) { if (!image.naturalWidth) { found.push(`image ${image.src} is broken`); } }
  const formulas = [...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container"));
  if (formulas.length) { found.push(`${formulas.length} formulas were not drawn`); }
  return found;
})()
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging requests."""

    def log_message(self, *args: Any) -> None:
        pass


class Browser:
    """A Chromium tab, controlled through its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number, self.complaints = socket, 0, []
        self.loaded = False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for the answer, recording events in between."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while (message := await self.socket.receive_json(timeout=300)).get("id") != self.number:
            self.note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def note(self, message: dict[str, Any]) -> None:
        """Record errors and external requests."""
        method, found = message.get("method"), message.get("params", {})
        if method == "Inspector.targetCrashed":
            raise SystemExit("a page crashed; the machine may be out of memory")
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {found['exceptionDetails'].get('text')}")
        elif method == "Runtime.consoleAPICalled" and found["type"] == "error":
            self.complaints.append(f"console: {[one.get('value') for one in found['args']]}")
        elif method == "Log.entryAdded" and found["entry"].get("url", "").endswith("/favicon.ico"):
            return  # requested by Chromium itself
        elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.complaints.append(f"console: {found['entry']['text']} {found['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            address = found["request"]["url"]
            if not address.startswith(("http://127.0.0.1:", "data:", "blob:")):
                self.complaints.append(f"asks another machine for {address}")

    async def look(self, address: str, window: str, scheme: str, shot: Path | None) -> list[str]:
        """Open a page in a window, and return the complaints."""
        self.complaints, self.loaded = [], False
        width, height = WINDOWS[window]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": window == "narrow"}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)
        await self.call("Page.navigate", url=address)
        while not self.loaded:
            self.note(await self.socket.receive_json(timeout=300))
        result = await self.call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        if shot is not None:
            shot.parent.mkdir(parents=True, exist_ok=True)
            picture = await self.call("Page.captureScreenshot", format="png")
            shot.write_bytes(base64.b64decode(picture["data"]))
        return [*result["result"]["value"], *self.complaints]


async def open_browser(port_file: Path, session: aiohttp.ClientSession) -> Browser:
    """Wait for the tab of a newly started Chromium."""
    for _ in range(1200):
        if port_file.exists() and port_file.read_text(encoding="utf-8").strip():
            break
        await asyncio.sleep(0.1)
    else:
        raise SystemExit("Chromium did not start")
    port = port_file.read_text(encoding="utf-8").splitlines()[0]
    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
        (page,) = [one for one in await answer.json() if one["type"] == "page"]
    browser = Browser(await session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0))
    for domain in ("Page", "Runtime", "Log", "Network", "Inspector"):
        await browser.call(f"{domain}.enable")
    return browser


async def look_at(pages: list[str], root: str, port_file: Path) -> int:
    """Check all pages in all windows; returns the number of complaints."""
    count = 0
    async with aiohttp.ClientSession() as session:
        browser = await open_browser(port_file, session)
        for page in pages:
            for window in WINDOWS:
                for scheme in ("light", "dark"):
                    wanted = page in SHOTS or len(pages) < 5
                    shot = BUILD / "shots" / f"{page.replace('/', '-')}-{window}-{scheme}.png" if wanted else None
                    for complaint in await browser.look(f"{root}/{page}.html", window, scheme, shot):
                        print(f"{page} ({window}, {scheme}) {complaint}", file=sys.stderr)
                        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*")
    site = BUILD / "html"
    every = sorted(str(path.relative_to(site))[:-5] for path in site.rglob("*.html"))
    every = [page for page in every if not page.startswith(("_", "genindex", "py-modindex", "search"))]
    pages = parser.parse_args().pages or every
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed; install it, or name one in CHROMIUM")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            root = f"http://127.0.0.1:{server.server_port}"
            count = asyncio.run(look_at(pages, root, Path(profile) / "DevToolsActivePort"))
        finally:
            process.terminate()
            process.wait()
    server.shutdown()
    print(f"{len(pages)} pages looked at, {count} complaints; screenshots in {BUILD / 'shots'}")
    return bool(count)


if __name__ == "__main__":
    sys.exit(main())
