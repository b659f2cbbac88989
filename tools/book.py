"""Build the book: ``python tools/book.py [--preset small|full]``; warnings are errors.

The small preset builds the committed chapters as they are. The full one copies them into the build folder, executes
them there on the EPFL stacks, and builds there, so that nothing made from the real data comes near the tracked files.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import demo
import execute

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
HTML = BUILD / "html"
SOURCES = ["_config.yml", "_toc.yml", "intro.md", "references.bib", "_static", "_vendor", "chapters"]


def build(source: Path = ROOT) -> Path:
    """Build the book in ``source`` from nothing and return its first page."""
    output = source / "_build"
    for folder in (output / "html", output / ".doctrees"):
        shutil.rmtree(folder, ignore_errors=True)  # a -W build over an old one hides failures
    jupyter_book = Path(sys.executable).with_name("jb")
    finished = subprocess.run([jupyter_book, "build", "-W", "-n", "--keep-going", "-q", source])
    page = output / "html" / "index.html"
    if finished.returncode or not page.exists():
        raise SystemExit("The book was not built: the lines above say why.")
    demo.add_to(output / "html")
    return page


def build_full() -> Path:
    """Execute copies of the chapters under the full preset and build the book from them."""
    source = BUILD / "full"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, source / name)
    for chapter in sorted((source / "chapters").glob("*.ipynb")):
        execute.execute(chapter, "full")
    return build(source)


def is_current() -> bool:
    """Whether the built book is newer than everything that it is made from."""
    page = HTML / "index.html"
    paths = [ROOT / name for name in [*SOURCES, "mitoseg_lib"]]
    files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file()]
    files = [f for f in files if "__pycache__" not in f.parts]
    return page.exists() and page.stat().st_mtime > max(f.stat().st_mtime for f in files)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=["small", "full"], default="small")
    preset = parser.parse_args().preset
    print(f"Building the book ({preset} preset) ...", flush=True)
    page = build() if preset == "small" else build_full()
    print(f"The book is ready: {page}")


if __name__ == "__main__":
    main()
