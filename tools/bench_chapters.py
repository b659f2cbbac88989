"""Seconds and memory of every chapter: a part of ``make bench``, recorded in results/speed/chapters.json.

``python tools/times.py`` writes what is recorded into the chapters.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import psutil

import execute
from bench_volumes import memory_of
from records import recording

Row = Callable[[str, str, str], None]


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """Append, twice a second, the memory (bytes) of all processes that this one has started."""
    seen, over, own = [0.0], threading.Event(), psutil.Process()

    def watch() -> None:
        while not over.wait(0.5):
            seen.append(sum(memory_of(child) for child in own.children()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def measured(chapter: Path, preset: str) -> dict[str, float]:
    """Run a chapter in an empty folder."""
    notebook = nbformat.read(chapter, as_version=4)
    notebook.metadata.pop("widgets", None)
    with TemporaryDirectory() as name, watched_memory() as memory:
        started = time.perf_counter()
        execute.run(notebook, Path(name), preset)
        return {"seconds": round(time.perf_counter() - started, 1), "memory_gb": round(max(memory) / 1e9, 2)}


def bench_chapters(row: Row) -> None:
    """Every chapter with the small preset, and with the full one where the real stacks are."""
    for preset in ("small", "full"):
        if preset == "full" and not os.environ.get("MITOSEG_DATA"):
            row("chapters with the full preset", "no MITOSEG_DATA", "")
            continue
        for chapter in execute.chapters():
            found = measured(chapter, preset)
            with recording("chapters") as record:
                record.setdefault(preset, {})[chapter.stem] = found
            row(f"{chapter.stem}, {preset}", f"{found['seconds']:.0f} s, {found['memory_gb']:.1f} GB", "")
