"""The code of every solution runs, after the chapter's own, as a learner would run it, and passes its checker."""

import re

import nbformat
import pytest

import execute

CHAPTERS = execute.chapters()


def solutions(notebook):
    """The Python blocks inside <details>, in order."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    hidden = re.findall(r"<details>.*?</details>", prose, flags=re.S)
    return [code for part in hidden for code in re.findall(r"```python\n(.*?)```", part, flags=re.S)]


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_solutions_run(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    found = solutions(notebook)
    cells = [nbformat.v4.new_code_cell(code) for code in found]
    notebook.cells += cells
    execute.run(notebook, path.parent, "small")  # an error in a cell raises
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert all(cell.outputs for cell in cells)
    said = [o.data["text/plain"] for o in outputs if o.output_type == "execute_result"]
    right = [words for words in said if words.startswith("Right: ")]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    exercises = re.findall(r"^\*\*\d+\. ", prose.split("## Exercises")[1], flags=re.M)
    assert 3 <= len(exercises) == len(right) and "Not yet" not in str(said)
