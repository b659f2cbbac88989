"""Pictures of every page of a built book, in pieces that a person can read.

``python tools/screenshots.py OUTPUT_FOLDER [--book _build/html] [--theme dark] [--width 1280] [--page NAME]``
"""

import argparse
import functools
import http.server
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PIECE = 1500  # pixels
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        """Send a file; a page that is closed meanwhile is no error."""
        with suppress(ConnectionError):
            super().copyfile(source, outputfile)


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """A server for a folder on a free port of this machine, running in a thread; call ``shutdown`` at the end."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def find_chromium() -> str | None:
    """The browser's path, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def photograph(page: Page, url: str, output: Path) -> None:
    """Save a page in pieces, each as high as PIECE."""
    page.goto(url, wait_until="networkidle")
    page.wait_for_timeout(500)
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.wait_for_timeout(300)
    for number, top in enumerate(range(0, height, PIECE)):
        area = {"x": 0, "y": top, "width": page.viewport_size["width"], "height": min(PIECE, height - top)}
        page.screenshot(path=f"{output}-{number:02d}.png", clip=area)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--book", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--page", default="", help="only pages whose name contains this")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    server = serve(arguments.book)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_OPTIONS)
        for path in sorted(arguments.book.rglob("*.html")):
            if "_static" in path.parts or arguments.page not in path.stem:
                continue
            page = browser.new_page(viewport={"width": arguments.width, "height": 900})
            page.add_init_script(f"localStorage.setItem('mode', '{arguments.theme}')")
            url = f"http://127.0.0.1:{server.server_port}/{path.relative_to(arguments.book).as_posix()}"
            photograph(page, url, arguments.output / f"{path.stem}-{arguments.theme}")
            page.close()
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main()
