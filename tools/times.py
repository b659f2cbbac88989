"""Write the minutes and the memory of each chapter into it, and a summary into intro.md: ``python tools/times.py``.

They are what ``make bench`` (part `chapters`) has recorded in results/speed/chapters.json.
"""

import json
import re
from pathlib import Path

import nbformat

import execute

RECORD = execute.ROOT / "results" / "speed" / "chapters.json"
INTRO = execute.ROOT / "intro.md"
SUMMARY = re.compile(r"With the small preset a chapter's code takes .*? CPU cores")
UNKNOWN = "not measured yet"
TABLE = re.compile(r"\| preset \| machine in Colab \|.*?\n(?=\n|$)", re.S)


def table(chapter: Path, record: dict) -> str:
    """The table of a chapter's presets."""
    rows = [("small", "CPU", "small"), ("full", "CPU", "full")]
    if "preset.retrain" in code(chapter):
        rows.append(("full, `retrain=True`", "GPU (T4)", "retrain"))
    lines = [
        f"| preset | machine in Colab | time there | time on {record['cores']} CPU cores | memory |",
        "|---|---|---|---|---|",
    ]
    for name, machine, key in rows:
        seconds, memory = figures(record.get(key, {}).get(chapter.stem))
        lines.append(f"| {name} | {machine} | {UNKNOWN} | {seconds} | {memory} |")
    return "\n".join(lines) + "\n"


def summary(record: dict) -> str:
    """What all chapters take with the small preset."""
    found = sorted(record["small"].values(), key=lambda one: one["seconds"])
    shortest, longest = figures(found[0])[0], figures(found[-1])[0]
    memory = max(one["memory_gb"] for one in found)
    words = f"With the small preset a chapter's code takes {shortest} to {longest}, and up to {memory:.1f} GB of memory"
    return f"{words}, on {record['cores']} CPU cores"


def code(chapter: Path) -> str:
    """All code of a chapter."""
    return "\n".join(cell.source for cell in nbformat.read(chapter, as_version=4).cells if cell.cell_type == "code")


def figures(found: dict[str, float] | None) -> tuple[str, str]:
    """Time and memory in words; seconds to the next ten, since a second run is never the same."""
    if found is None:
        return UNKNOWN, UNKNOWN
    seconds = max(10, round(found["seconds"], -1))
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    return time, f"{found['memory_gb']:.1f} GB"


def main() -> None:
    """Replace the table in every chapter, and the summary."""
    record = json.loads(RECORD.read_text())
    INTRO.write_text(SUMMARY.sub(summary(record), INTRO.read_text()))
    for chapter in execute.chapters():
        notebook = nbformat.read(chapter, as_version=4)
        first = notebook.cells[0]
        if not TABLE.search(first.source):
            raise SystemExit(f"{chapter.name} has no table of presets in its first cell; add its first line.")
        first.source = TABLE.sub(lambda _, chapter=chapter: table(chapter, record), first.source)
        nbformat.write(notebook, chapter)


if __name__ == "__main__":
    main()
