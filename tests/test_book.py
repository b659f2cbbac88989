"""The built book, looked at by a browser without a network."""

import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "_vendor" / "vendor"
THEMES = ("light", "dark")

# Words whose contrast to what lies behind them is below 4.5 to 1, the least that WCAG 2 asks for.
FAINT_WORDS = """() => {
  const parse = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1]; };
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const background = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    const over = (below, [r, g, b, a]) => below.map((v, i) => v * (1 - a) + [r, g, b][i] * a);
    return layers.reduce(over, [255, 255, 255]);
  };
  const faint = [];
  const words = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  for (let node; (node = words.nextNode()); ) {
    const e = node.parentElement;
    const skipped = "script, style, svg, mjx-container, kbd, .headerlink, .search-button__kbd-shortcut";
    if (!node.textContent.trim() || !e.offsetParent || e.closest(skipped)) continue;
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(background(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(node.textContent.trim().slice(0, 40));
  }
  return faint;
}"""


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


def test_internal_links_and_anchors_lead_somewhere(book_html, pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            if target not in pages:
                assert (book_html / target).exists(), f"{name}: {link}"
            elif parts.fragment:
                assert unquote(parts.fragment) in pages[target].ids, f"{name}: {link}"


def test_no_page_is_large(book_html, pages):
    for name in pages:
        assert (book_html / name).stat().st_size < 3_000_000, name


def test_widget_scripts_are_loaded_only_where_there_are_widgets(book_html, pages):
    for name, page in pages.items():
        has_widgets = "widget-view+json" in (book_html / name).read_text()
        assert sum("html-manager" in script for script in page.scripts) == has_widgets, name


def widget_outputs(book_html, name):
    """How many widgets the page's source asks to draw."""
    return (book_html / name).read_text().count("application/vnd.jupyter.widget-view+json")


@pytest.mark.parametrize("theme", THEMES)
def test_pages_ask_no_other_host_have_no_errors_and_can_be_read(book_html, pages, open_page, theme):
    for name in pages:
        page = open_page(name, theme)
        if widget_outputs(book_html, name):
            page.wait_for_selector('[role="slider"]')
        assert page.requests_elsewhere == [], name
        assert page.errors == [], name
        assert page.evaluate("document.documentElement.dataset.theme") == theme, name
        pictures = page.evaluate(
            "[...document.images].map(i => [i.alt, i.naturalWidth, i.offsetParent !== null, i.src.slice(0, 90)])"
        )
        for alt, width, visible, source in pictures:
            assert alt, f"{name}: {source} has no alt text"
            assert width or not visible, f"{name}: {source} isn't drawn"
        if not name.startswith("index"):  # only sends the reader on
            assert page.evaluate(FAINT_WORDS) == [], name
        page.close()


def shown_slices(page):
    return page.evaluate(
        "[...document.querySelectorAll('.cell_output img[alt^=slice]')].filter(i => i.offsetParent).map(i => i.alt)"
    )


def wait_for_other_slices(page, before):
    """Wait until the page shows others; a picture that never changes runs into the time limit."""
    page.wait_for_function(
        """before => JSON.stringify([...document.querySelectorAll('.cell_output img[alt^=slice]')]
            .filter(i => i.offsetParent).map(i => i.alt)) !== JSON.stringify(before)""",
        arg=before,
        timeout=5000,
    )
    return shown_slices(page)


@pytest.fixture
def pages_with_viewers(book_html, pages, open_page):
    """Opens each page that has a viewer, when the viewers are drawn."""

    def open_all():
        names = [name for name in pages if widget_outputs(book_html, name)]
        assert names, "no page has a viewer"
        for name in names:
            page = open_page(name)
            page.wait_for_selector('[role="slider"]')
            page.wait_for_function("document.querySelectorAll('.cell_output img[alt^=slice]').length > 0")
            yield name, page

    return open_all


def test_each_viewer_is_drawn_once_and_moves_without_a_kernel(book_html, pages_with_viewers):
    for name, page in pages_with_viewers():
        first = shown_slices(page)
        assert len(first) == widget_outputs(book_html, name) == page.locator('[role="slider"]').count(), name
        page.locator('[role="slider"]').first.focus()
        page.keyboard.press("ArrowRight")
        second = wait_for_other_slices(page, first)
        box = page.locator(".noUi-base").first.bounding_box()
        page.mouse.click(box["x"] + 0.98 * box["width"], box["y"] + box["height"] / 2)
        last = wait_for_other_slices(page, second)
        assert len(first) == len(second) == len(last), "a viewer shows one slice at a time"
        z, end = re.match(r"slice (\d+) of 0 to (\d+)", last[0]).groups()
        assert z == end


def test_every_widget_module_looks_for_its_fonts_where_they_lie():
    # Which module asks for the fonts depends on the order of loading: unmapped, 5 loads of 12 asked in a wrong place.
    folder = "@jupyter-widgets/html-manager/dist"
    modules = re.findall(r'define\("(@jupyter-widgets/[^"]+)"', (VENDOR / folder / "embed-amd.js").read_text())
    settings = (VENDOR.parent / "book" / "require-base.js").read_text()
    mapped = dict(re.findall(r'"(@[^"]+)": "([^"]+)"', settings))
    assert len(modules) >= 6
    for module in modules:
        place = module if module.startswith(folder) else mapped[module]
        assert place.rpartition("/")[0] == folder, module


def test_a_screen_reader_learns_what_the_slider_is_and_where_it_stands(pages_with_viewers):
    for name, page in pages_with_viewers():
        handle = page.locator('[role="slider"]').first
        assert handle.get_attribute("aria-label") == "slice z", name
        before = shown_slices(page)
        handle.focus()
        page.keyboard.press("ArrowRight")
        z = re.match(r"slice (\d+) of", wait_for_other_slices(page, before)[0]).group(1)
        assert handle.get_attribute("aria-valuetext") == z


def test_slider_and_picture_fit_into_a_laptops_window_together(pages_with_viewers):
    for name, page in pages_with_viewers():
        picture = page.locator(".cell_output img[alt^=slice]:visible").first.bounding_box()
        slider = page.locator('[role="slider"]').first.bounding_box()
        assert 0 < slider["y"] + slider["height"] - picture["y"] < 600, name


def test_maths_is_drawn_wherever_there_is_some(book_html, pages, open_page):
    with_maths = [name for name in pages if 'class="math' in (book_html / name).read_text()]
    assert with_maths
    for name in with_maths:
        page = open_page(name)
        page.wait_for_selector("mjx-container svg")
        assert page.locator("mjx-container svg").count() == page.locator("span.math, div.math").count(), name
        assert page.locator("[data-mjx-error], mjx-merror").count() == 0, name
        assert not re.search(r"\\(frac|sum|text)\b", page.inner_text("main")), name
        page.close()


def test_search_finds_a_word_offline(open_page):
    page = open_page("search.html?q=cristae")
    page.wait_for_selector("#search-results li")
    assert page.requests_elsewhere == []
    assert "Explore the data" in page.inner_text("#search-results")


def test_vendored_files_are_those_that_their_readme_names():
    table = re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), flags=re.M)
    assert {name for name, _ in table} == {
        p.relative_to(VENDOR).as_posix() for p in VENDOR.rglob("*.*") if p.suffix in (".js", ".mjs", ".wasm", ".woff2")
    }
    for name, expected in table:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == expected, name
