"""Run chapters and store their outputs: ``python tools/execute.py [--preset small|full] [CHAPTER ...]``.

With each notebook goes a fingerprint of what its outputs were made from, which a test compares with what is there.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
LIBRARY = ROOT / "mitoseg_lib"
LOADED_MODULES = "import sys; print(*sorted(m for m in sys.modules if m.split('.')[0] == 'mitoseg_lib'))"


def chapters() -> list[Path]:
    """All chapters, in order."""
    return sorted(CHAPTERS.glob("*.ipynb"))


def fingerprint(notebook: nbformat.NotebookNode, modules: list[str]) -> str:
    """Sha256 over the chapter's code, the library modules that it loads, and the bundled data."""
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode() + b"\0")
    files = [LIBRARY.joinpath(*module.split(".")[1:]) for module in modules]
    sources = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files]
    for path in sources + sorted((ROOT / "data").rglob("*.tif")):
        content = path.read_bytes() if path.exists() else b"gone"
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def run(notebook: nbformat.NotebookNode, folder: Path, preset: str) -> list[str]:
    """Execute in place, as from ``folder``; return the library modules that the chapter loaded."""
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    environment = os.environ | {"MITOSEG_PRESET": preset}
    if "MITOSEG_DATA" in environment:  # the kernel runs in the chapter's folder, so a relative path would break
        environment["MITOSEG_DATA"] = os.path.abspath(environment["MITOSEG_DATA"])
    with client.setup_kernel(env=environment):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        notebook.cells.append(nbformat.v4.new_code_cell(LOADED_MODULES))
        client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
        client.set_widgets_metadata()
    return notebook.cells.pop().outputs[0].text.split()


def joined_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs with text that arrived in pieces put together, so that it is shown in one block."""
    joined = []
    for output in outputs:
        if joined and output.output_type == "stream" and output.get("name") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def tidy(notebook: nbformat.NotebookNode, preset: str) -> None:
    """Keep what readers and tests need; drop what changes with every run or machine."""
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined_streams(cell.outputs)
        if cell.cell_type == "code" and preset == "full":  # progress bars; in the small preset a test finds them
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def execute(chapter: Path, preset: str) -> None:
    """Run one chapter and write it back."""
    started = time.perf_counter()
    notebook = nbformat.read(chapter, as_version=4)
    notebook.metadata.pop("widgets", None)
    modules = run(notebook, chapter.parent, preset)
    tidy(notebook, preset)
    notebook.metadata.mitoseg = {
        "preset": preset,
        "modules": modules,
        "fingerprint": fingerprint(notebook, modules),
    }
    nbformat.write(notebook, chapter)
    print(f"{chapter.name}: executed in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapters", nargs="*", type=Path, help="notebooks; all in chapters/ if none is named")
    parser.add_argument("--preset", choices=["small", "full"], default="small")
    arguments = parser.parse_args()
    for chapter in arguments.chapters or chapters():
        execute(chapter.resolve(), arguments.preset)


if __name__ == "__main__":
    main()
