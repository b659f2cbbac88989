"""The tools that execute the chapters and build the book."""

import nbformat

import book
import execute


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 1. T"), *cells])


def test_a_chapter_is_executed_under_its_preset_and_says_what_it_was_made_from(tmp_path):
    path = tmp_path / "01_test.ipynb"
    nbformat.write(notebook("from mitoseg_lib import runs\nprint(runs.preset().name)", "1 + 1"), path)
    execute.execute(path, "small")
    done = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in done.cells[1:]] == [1, 2]
    assert done.cells[1].outputs[0].text == "small\n"
    assert done.metadata.mitoseg.preset == "small"
    assert {"mitoseg_lib.runs", "mitoseg_lib.stacks"} <= set(done.metadata.mitoseg.modules)
    assert len(done.cells) == 3 and "execution" not in done.cells[1].metadata


def test_text_that_arrives_in_pieces_is_put_together():
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    picture = nbformat.v4.new_output("display_data", data={"text/plain": "picture"})
    pieces = [stream("stdout", "a\n"), stream("stdout", "b\n"), picture, stream("stdout", "c\n"), stream("stderr", "d")]
    joined = execute.joined_streams(pieces)
    assert [o.get("text") for o in joined] == ["a\nb\n", None, "c\n", "d"]


def test_the_state_of_widgets_is_stored(tmp_path):
    path = tmp_path / "01_test.ipynb"
    nbformat.write(notebook("import ipywidgets\nipywidgets.IntSlider()"), path)
    execute.execute(path, "small")
    state = nbformat.read(path, as_version=4).metadata.widgets["application/vnd.jupyter.widget-state+json"]
    assert any(model["model_name"] == "IntSliderModel" for model in state["state"].values())


def test_the_fingerprint_changes_with_code_library_and_data_and_with_nothing_else(tmp_path, monkeypatch):
    library, data = tmp_path / "mitoseg_lib", tmp_path / "data"
    for folder in (library, data):
        folder.mkdir()
    (library / "__init__.py").write_text("")
    (library / "runs.py").write_text("1")
    (data / "x.tif").write_bytes(b"1")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "LIBRARY", library)
    modules = ["mitoseg_lib", "mitoseg_lib.runs"]
    first = execute.fingerprint(notebook("a"), modules)

    other_prose = notebook("a")
    other_prose.cells[0].source = "# 2. Other"
    assert execute.fingerprint(other_prose, modules) == first
    (library / "viewer.py").write_text("not loaded by the chapter")
    assert execute.fingerprint(notebook("a"), modules) == first

    seen = {first, execute.fingerprint(notebook("b"), modules)}
    (library / "runs.py").write_text("2")
    seen.add(execute.fingerprint(notebook("a"), modules))
    (data / "x.tif").write_bytes(b"2")
    seen.add(execute.fingerprint(notebook("a"), modules))
    assert len(seen) == 4


def test_a_book_older_than_its_sources_is_not_current(tmp_path, monkeypatch):
    import os

    for name in [*book.SOURCES, "mitoseg_lib"]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100, 100))
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "HTML", tmp_path / "html")
    assert not book.is_current()
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").touch()
    assert book.is_current()
    os.utime(tmp_path / "intro.md", (2e9, 2e9))
    assert not book.is_current()
