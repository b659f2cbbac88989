"""The repository's public address stands in _config.yml; badges and set-up cells are written from it.

``python tools/repository.py [URL]`` changes it there (if given) and everywhere that derives from it.
"""

import re
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "_config.yml"
BRANCH = "main"
FOLDER = "mitochondria-3d"
PAGES = ("README.md", "intro.md", "chapters/teaching.md", "CITATION.cff")  # that name the address, beside the chapters

SETUP = """# In Colab this fetches the course and what it lacks; anywhere else it does nothing.
import os
import subprocess
import sys
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab"):
    url = "{url}"
    url = os.environ.get("MITOSEG_REPOSITORY", url)
    clone = ["git", "clone", "--quiet", "--depth=1", url, "{folder}"]
    subprocess.run(clone, check=not os.path.exists("{folder}"))
    sys.path.insert(0, os.path.abspath("{folder}"))
    from mitoseg_lib.colab import install_missing

    install_missing({extras})"""
EXTRAS = {"09_in_the_browser.ipynb": "onnx"}  # what a chapter needs beyond the others


def repository_url() -> str:
    """The address as _config.yml has it."""
    return yaml.safe_load(CONFIG.read_text())["repository"]["url"]


def setup_cell(url: str, chapter: str = "") -> str:
    """The set-up cell, the same for all chapters but for the packages that one of them needs beyond the others."""
    extras = f'"{EXTRAS[chapter]}"' if chapter in EXTRAS else ""
    return SETUP.format(url=url, folder=FOLDER, extras=extras)


def colab_url(url: str, chapter: str) -> str:
    """Where Colab opens a chapter."""
    return f"https://colab.research.google.com/github/{url.split('github.com/')[-1]}/blob/{BRANCH}/chapters/{chapter}"


def badge(url: str, chapter: str, static: str = "../_static") -> str:
    """Markdown of a chapter's badge; its picture comes from the book itself."""
    return f"[![Open in Colab]({static}/badges/colab.svg)]({colab_url(url, chapter)})"


def with_badges(text: str, url: str) -> str:
    """``text`` with the address of every Colab link in it derived from ``url``."""
    link = re.compile(r"https://colab\.research\.google\.com/github/[^)\s]*/chapters/([^)\s/]+\.ipynb)")
    return link.sub(lambda found: colab_url(url, found.group(1)), text)


def main(arguments: list[str]) -> None:
    """Rewrite _config.yml, the pages that name the address, and all chapters."""
    old = repository_url()
    url = (arguments[0] if arguments and arguments[0] else old).rstrip("/").removesuffix(".git")
    CONFIG.write_text(CONFIG.read_text().replace(old, url))
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_badges(page.read_text().replace(old, url), url))
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = with_badges(cell.source, url)
            elif cell.source.startswith(SETUP.splitlines()[0]):
                cell.source = setup_cell(url, path.name)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
