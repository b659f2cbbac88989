"""What every test shares: no network, the small preset, and nbval taught to compare figures."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

# Kernels and other child processes don't see the blocked sockets below; they inherit these instead.
DEAD_PROXY = "http://127.0.0.1:9"
CHILD_ENVIRONMENT = {
    "HTTP_PROXY": DEAD_PROXY,
    "HTTPS_PROXY": DEAD_PROXY,
    "http_proxy": DEAD_PROXY,
    "https_proxy": DEAD_PROXY,
    "NO_PROXY": "localhost,127.0.0.1",
    "no_proxy": "localhost,127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "MITOSEG_PRESET": "small",
}
NETWORK_ENVIRONMENT = {name: os.environ.get(name) for name in CHILD_ENVIRONMENT}
os.environ.update(CHILD_ENVIRONMENT)
if os.environ.get("MITOSEG_DATA"):  # tests and kernels run in other folders than this one
    os.environ["MITOSEG_DATA"] = os.path.abspath(os.environ["MITOSEG_DATA"])

_connect = socket.socket.connect


def _connect_on_this_machine_only(self, address):
    loopback = self.family == socket.AF_UNIX or str(address[0]) in {"127.0.0.1", "::1", "localhost"}
    if not loopback:
        raise OSError(f"a test tried to reach {address}, but tests run without a network")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Kernels, test servers and browsers speak over loopback; nothing else may be reached."""
    monkeypatch.setattr(socket.socket, "connect", _connect_on_this_machine_only)


@pytest.fixture(scope="session")
def network_environment():
    """The environment as it was before the proxies were cut: only for installing packages."""
    kept = {name: value for name, value in os.environ.items() if name not in CHILD_ENVIRONMENT}
    return kept | {name: value for name, value in NETWORK_ENVIRONMENT.items() if value is not None}


@pytest.fixture(scope="module")
def one_thread():
    """For small networks, which are slower when they are shared out, and for sums of floats that must be the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def epfl_folder():
    """The folder of the real stacks; tests that want them skip where there are none."""
    folder = os.environ.get("MITOSEG_DATA")
    if not folder:
        pytest.skip("MITOSEG_DATA names no folder with the real stacks")
    return Path(folder)


@pytest.fixture(scope="session")
def book_html():
    """The built book: the one that `make book` left, if it is newer than its sources, else a fresh one."""
    import book

    if not book.is_current():
        book.build()
    return book.HTML


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, which draws in 3D without a graphics card."""
    import screenshots

    executable = screenshots.find_chromium()
    if executable is None:
        message = "chromium isn't installed, so nothing can be looked at"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    software_gl = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=executable, args=screenshots.CHROMIUM_OPTIONS + software_gl)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(book_html):
    """Where a server gives out the built book."""
    import screenshots

    server = screenshots.serve(book_html)
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def open_page(browser, address):
    """Opens a page and collects whatever it asks of other hosts, and its errors."""
    opened = []

    def open_(name, theme="light"):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.append(page)
        page.requests_elsewhere, page.errors = [], []

        def gate(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                return route.continue_()
            page.requests_elsewhere.append(route.request.url)
            return route.abort()

        page.route("**/*", gate)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("response", lambda r: page.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.add_init_script(f"localStorage.setItem('mode', '{theme}')")
        page.goto(address + name, wait_until="networkidle")
        return page

    yield open_
    for page in opened:
        page.close()


@pytest.fixture(scope="session")
def local_clone(tmp_path_factory):
    """A repository that holds the work tree as it is now, for the set-up cell to clone."""
    clone = tmp_path_factory.mktemp("clone") / "origin"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    ).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, files)):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    return clone


def pytest_addoption(parser):
    """What takes long and is asked for by name only."""
    parser.addoption("--all-in-colab", action="store_true", help="run every chapter as in Colab, not the first alone")


def pytest_configure(config):
    """Teach nbval to compare figures, and to overlook stderr (warnings differ between machines)."""
    if not config.pluginmanager.hasplugin("nbval"):
        return
    from nbval.plugin import IPyNbCell, IPyNbFile

    from nbval_figures import comparing_figures

    if not hasattr(IPyNbCell.compare_outputs, "compares_figures"):
        IPyNbCell.compare_outputs = comparing_figures(IPyNbCell.compare_outputs)
        initialise = IPyNbFile.__init__

        def with_stderr_skipped(self, *args, **kwargs):
            initialise(self, *args, **kwargs)
            self.skip_compare += ("stderr",)

        IPyNbFile.__init__ = with_stderr_skipped
