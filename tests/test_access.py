"""The built book for everyone: screen readers, keyboards, narrow screens, paper."""

import hashlib
import re
from pathlib import Path

import pytest

AXE = Path(__file__).parent / "axe-core"
NARROW = 360  # pixels: a small telephone

RUN_AXE = """async () => {
  const found = await axe.run(document, {resultTypes: ["violations"]});
  return found.violations
    .filter(({impact}) => impact === "serious" || impact === "critical")
    .map(({id, nodes}) => `${id}: ${nodes.slice(0, 3).map((n) => n.html.slice(0, 160)).join(" | ")}`);
}"""

# What sticks out of the window, unless something around it can be scrolled sideways.
TOO_WIDE = """() => {
  const scrolls = (e) => e && (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll("main *")]
    .filter((e) => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
    .map((e) => e.outerHTML.slice(0, 120));
}"""  # noqa: E501

CLICKABLE = """() => [...document.querySelectorAll(".bd-sidebar, .bd-header-article, .prev-next-area, .copybtn")]
    .filter((e) => e.offsetParent).map((e) => e.className)"""
HIDDEN_ANSWERS = """() => [...document.querySelectorAll("details")]
    .map((d) => d.lastElementChild)
    .filter((e) => !e.checkVisibility({contentVisibilityAuto: true}) || !e.offsetHeight).length"""


@pytest.fixture(scope="module")
def names(book_html):
    """Every page that a reader can come to."""
    found = [p.relative_to(book_html).as_posix() for p in book_html.rglob("*.html") if "_static" not in p.parts]
    return sorted(name for name in found if not name.startswith("index"))  # which only sends the reader on


def test_the_checker_is_the_one_that_its_readme_names():
    (expected,) = re.findall(r"`([0-9a-f]{64})`", (AXE / "README.md").read_text())
    assert hashlib.sha256((AXE / "axe.min.js").read_bytes()).hexdigest() == expected


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(names, open_page, theme):
    for name in names:
        page = open_page(name, theme)
        page.add_script_tag(path=AXE / "axe.min.js")
        assert page.evaluate(RUN_AXE) == [], name
        page.close()


def test_pages_fit_into_a_narrow_window(names, open_page):
    for name in names:
        page = open_page(name)
        page.set_viewport_size({"width": NARROW, "height": 740})
        page.add_style_tag(content="main * {letter-spacing: 0.04em}")  # other machines have wider fonts
        assert page.evaluate(TOO_WIDE) == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW, name
        page.close()


def test_on_paper_there_is_the_text_and_nothing_to_click(names, open_page):
    for name in [name for name in names if re.match(r"chapters/\d", name)]:
        page = open_page(name, "dark")
        page.emulate_media(media="print")
        assert page.evaluate(CLICKABLE) == [], name
        colours = page.evaluate(
            "['color', 'backgroundColor'].map(k => getComputedStyle(document.querySelector('main p'))[k])"
        )
        assert dark(colours[0]), f"{name}: the dark theme's light text on white paper"
        assert page.evaluate(HIDDEN_ANSWERS) == 0, f"{name}: answers that can't be opened on paper"
        page.close()


def dark(colour):
    return max(map(float, re.findall(r"[\d.]+", colour)[:3])) < 100
