"""What must hold for every tracked file, chapter and module."""

import ast
import itertools
import re
import subprocess
from pathlib import Path

import nbformat
import pytest

import execute

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = execute.chapters()
MODULE_ORDER = [
    "errors",
    "files",
    "memory",
    "tiff.metadata",
    "tiff.directories",
    "tiff.volume",
    "tiff.slabs",
    "tiff",
    "readers",
    "masks",
    "stacks",
    "downloads",
    "lucchi_plus",
    "datasets",
    "phantom.shapes",
    "phantom.scene",
    "phantom.drawing",
    "phantom.bundled",
    "phantom",
    "splits",
    "patches",
    "losses",
    "metrics",
    "pooled",
    "surfaces",
    "models",
    "inference",
    "fusion",
    "streams",
    "calibration",
    "checkpoints",
    "weights",
    "grey",
    "onnx_export",
    "writers",
    "prediction",
    "robustness",
    "labelled",
    "starts",
    "interruptions",
    "training.settings",
    "training.history",
    "training.evaluation",
    "training.batches",
    "training.optimizer",
    "training.precision",
    "training.loop",
    "training",
    "finetuning",
    "instances",
    "error_kinds",
    "evaluation",
    "shapes",
    "volumes.layout",
    "volumes.pyramid",
    "volumes.sums",
    "volumes.joining",
    "volumes.job",
    "volumes.work",
    "volumes.engine",
    "volumes.table",
    "volumes.plan",
    "volumes.verify",
    "volumes",
    "meshes",
    "viewer",
    "figures",
    "runs",
    "choices",
    "mistakes",
    "recipes",
    "ladder",
    "recording",
    "trained",
    "measurements",
    "exercises.feedback",
    "exercises",
    *[f"exercises.chapter{number}" for number in range(1, 11)],
    "cli",
]
IMAGE = ("image/png", "image/jpeg")
# The folder that the project lies in, and the home folder; an index of packages; an address with a password.
LEAK = re.compile(
    "|".join([re.escape(str(p)) + r"(?=[/\"'\s])" for p in (ROOT.parent, Path.home()) if len(str(p)) > 1])
    + r"|--(extra-)?index-url|://[^/\s]+:[^/\s]+@"
)

per_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=[p.stem for p in CHAPTERS])


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def cells(path, kind=None):
    return [c for c in nbformat.read(path, as_version=4).cells if kind in (None, c.cell_type)]


def headings(text):
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return [len(h) for h in re.findall(r"^(#+) ", prose, flags=re.M)]


def test_there_are_chapters():
    assert len(CHAPTERS) >= 3


def test_the_tracked_tree_is_small():
    apart = (".safetensors", ".wasm")  # the model, whose size has a test of its own, and the program that runs it
    assert sum(path.stat().st_size for path in tracked() if path.suffix not in apart) < 45e6
    assert sum(path.stat().st_size for path in tracked() if path.suffix == ".wasm") < 15e6


def test_nothing_tracked_names_this_machine_or_a_package_index():
    this_file = Path(__file__).resolve()
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" in raw[:8000] or path in (this_file, ROOT / "Makefile") or "vendor" in path.parts:
            continue
        found = LEAK.search(raw.decode("utf-8", "replace"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group(0)}"


@per_chapter
def test_outputs_are_there_and_clean(path):
    code = cells(path, "code")
    assert all(cell.execution_count for cell in code), "nbval compares nothing in a cell that was never run"
    outputs = [output for cell in code for output in cell.outputs]
    assert any(outputs)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    for output in outputs:
        text = str({k: v for k, v in output.get("data", {}).items() if k not in IMAGE}) + output.get("text", "")
        assert not re.search(r"0x[0-9a-f]{8,}|Warning\b", text), text[:300]


@per_chapter
def test_outputs_were_made_from_what_is_here_now(path):
    notebook = nbformat.read(path, as_version=4)
    stored = notebook.metadata.mitoseg
    assert stored.preset == "small"
    assert stored.fingerprint == execute.fingerprint(notebook, stored.modules), "run `make execute` and look"


@per_chapter
def test_a_chapter_has_the_skeleton(path):
    source = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert re.match(r"# \d+\. ", source)
    for part in (
        "## You will learn",
        "**Time and hardware.**",
        "## Set-up",
        "## Check yourself",
        "## Exercises",
        "## What we learned",
        "**References.**",
    ):
        assert source.count(part) == 1, part
    assert source.count("<details>") == source.count("</details>") >= 4
    code = cells(path, "code")
    assert code[1].source.splitlines()[:3][-1].startswith("preset = runs.preset()  #")
    assert 'runs.preset("full")' in code[1].source


@per_chapter
def test_headings_never_skip_a_level(path):
    levels = headings("\n".join(cell.source for cell in cells(path, "markdown")))
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@per_chapter
def test_code_cells_are_short(path):
    lines = sorted(len(cell.source.splitlines()) for cell in cells(path, "code"))
    assert lines[-1] <= 25
    assert sum(n <= 15 for n in lines) >= 0.9 * len(lines)
    assert lines[len(lines) // 2] <= 6


@per_chapter
def test_code_in_solutions_fits_the_page(path):
    for cell in cells(path, "markdown"):
        for block in re.findall(r"```python\n(.*?)```", cell.source, flags=re.S):
            assert max(map(len, block.splitlines())) <= 88, block


@per_chapter
def test_every_figure_has_alt_text(path):
    for cell in cells(path, "code"):
        if any(kind in output.get("data", {}) for output in cell.outputs for kind in IMAGE):
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 20, cell.source[:80]


@per_chapter
def test_prose_reads_well_where_directives_show_as_raw_text(path):
    for cell in cells(path, "markdown"):
        assert not re.search(r"^```\{|^:::|\{(cite|term|ref|doc)[:}]", cell.source, flags=re.M), cell.source[:80]


@per_chapter
def test_nothing_is_promised_for_later(path):
    for cell in cells(path, "markdown"):
        found = re.search(r"in preparation|not written yet|coming soon", cell.source)
        assert found is None, "what was announced is there by now, or isn't a promise to make"


@per_chapter
def test_a_chapter_stays_small(path):
    assert path.stat().st_size < 3_000_000


def library_modules():
    return sorted((ROOT / "mitoseg_lib").rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT / "mitoseg_lib").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


per_module = pytest.mark.parametrize("path", library_modules(), ids=map(module_name, library_modules()))


def imported_modules(path):
    """Modules of the library that a file imports, by their names inside it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mitoseg_lib":
            inside = node.module.removeprefix("mitoseg_lib").removeprefix(".")
            yield inside
            yield from (f"{inside}.{alias.name}".removeprefix(".") for alias in node.names)


@per_module
def test_modules_import_only_from_above(path):
    if module_name(path) not in MODULE_ORDER:
        return
    own = MODULE_ORDER.index(module_name(path))
    for name in set(imported_modules(path)) & set(MODULE_ORDER):
        inside_own_package = name == module_name(path).rpartition(".")[0]  # the way to a neighbour in a package
        assert MODULE_ORDER.index(name) < own or inside_own_package, name


def public_functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not is_command(node):
            yield node


def is_command(node):
    """Whether a function is a command of the command line, whose arguments are the options that users give by name."""
    return any(ast.unparse(decorator).startswith("app.command(") for decorator in node.decorator_list)


@per_module
def test_functions_have_at_most_six_arguments_and_pass_no_kwargs_on(path):
    for node in public_functions(path):
        names = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
        assert len(names) <= 6, f"{node.name}({', '.join(names)})"
        assert node.args.kwarg is None, node.name


def test_importing_the_library_loads_nothing_heavy():
    code = "import sys, mitoseg_lib; print(*sys.modules)"
    import sys

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "matplotlib", "scipy", "albumentations", "tifffile"} & set(loaded)
