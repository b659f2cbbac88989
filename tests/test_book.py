"""The built book, looked at by a browser without a network."""

import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import screenshots

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "_vendor" / "vendor"
THEMES = ("light", "dark")


class Page(HTMLParser):
    """The links, anchors and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.scripts = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "script" and values.get("src"):
            self.scripts.append(values["src"])


@pytest.fixture(scope="session")
def pages(book_html):
    """Every page of the book but the templates that lie among the static files."""
    found = [p for p in sorted(book_html.rglob("*.html")) if "_static" not in p.parts]
    assert len(found) >= 8
    return {path.relative_to(book_html).as_posix(): Page(path.read_text()) for path in found}


@pytest.fixture(scope="module")
def browser():
    executable = screenshots.find_chromium()
    if executable is None:
        message = "chromium isn't installed, so no page can be looked at"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=executable, args=screenshots.CHROMIUM_OPTIONS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(book_html):
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


def test_internal_links_and_anchors_lead_somewhere(pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            if target not in pages:
                assert (ROOT / "_build" / "html" / target).exists(), f"{name}: {link}"
            elif parts.fragment:
                assert unquote(parts.fragment) in pages[target].ids, f"{name}: {link}"


def test_no_page_is_large(book_html, pages):
    for name in pages:
        assert (book_html / name).stat().st_size < 3_000_000, name


def test_widget_scripts_are_loaded_only_where_there_are_widgets(book_html, pages):
    for name, page in pages.items():
        has_widgets = "widget-view+json" in (book_html / name).read_text()
        assert sum("html-manager" in script for script in page.scripts) == has_widgets, name


@pytest.mark.parametrize("theme", THEMES)
def test_pages_ask_no_other_host_and_have_no_errors(pages, open_page, theme):
    for name in pages:
        page = open_page(name, theme)
        assert page.requests_elsewhere == [], name
        assert page.errors == [], name
        assert page.evaluate("document.documentElement.dataset.theme") == theme, name
        pictures = page.evaluate(
            "[...document.images].map(i => [i.alt, i.naturalWidth, i.offsetParent !== null, i.src.slice(0, 90)])"
        )
        for alt, width, visible, source in pictures:
            assert alt, f"{name}: {source} has no alt text"
            assert width or not visible, f"{name}: {source} isn't drawn"
        page.close()


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_in_both_themes(open_page, theme):
    page = open_page("chapters/01_explore_the_data.html", theme)
    page.wait_for_selector('[role="slider"]')
    colour = "e => getComputedStyle(e).color"
    for selector in ("main p", ".widget-label, .jupyter-widget-label", ".cell_output pre"):
        light = sum(map(int, re.findall(r"\d+", page.eval_on_selector(selector, colour))[:3])) / 3
        assert (light > 150) == (theme == "dark"), f"{selector}: {light}"


def visible_slices(page):
    return page.evaluate(
        "[...document.querySelectorAll('.cell_output img[alt^=slice]')].filter(i => i.offsetParent).map(i => i.alt)"
    )


def test_the_slider_moves_the_picture_without_a_kernel(open_page):
    page = open_page("chapters/01_explore_the_data.html")
    handle = page.wait_for_selector('[role="slider"]')
    page.wait_for_function("document.querySelectorAll('.cell_output img[alt^=slice]').length > 0")
    before = visible_slices(page)
    assert len(before) == 1, "one viewer, drawn once, shows one slice"
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    after = visible_slices(page)
    assert len(after) == 1 and after != before
    box = page.query_selector(".noUi-base").bounding_box()
    page.mouse.click(box["x"] + 0.98 * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_timeout(200)
    assert visible_slices(page) not in (before, after)


def test_a_screen_reader_learns_what_the_slider_is_and_where_it_stands(open_page):
    page = open_page("chapters/01_explore_the_data.html")
    handle = page.wait_for_selector('[role="slider"][aria-label]')
    assert handle.get_attribute("aria-label") == "slice z"
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    z = re.match(r"slice (\d+) of", visible_slices(page)[0]).group(1)
    assert handle.get_attribute("aria-valuetext") == z


def test_maths_is_drawn(open_page):
    page = open_page("chapters/03_metrics_and_losses.html")
    page.wait_for_selector("mjx-container svg")
    assert not re.search(r"\\frac|\\sum", page.inner_text("main"))


def test_search_finds_a_word_offline(open_page):
    page = open_page("search.html?q=cristae")
    page.wait_for_selector("#search-results li")
    assert page.requests_elsewhere == []
    assert "Explore the data" in page.inner_text("#search-results")


def test_vendored_files_are_those_that_their_readme_names():
    table = re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), flags=re.M)
    assert {name for name, _ in table} == {
        p.relative_to(VENDOR).as_posix() for p in VENDOR.rglob("*.*") if p.suffix in (".js", ".woff2")
    }
    for name, expected in table:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == expected, name
