"""What the page "Try it in your browser" needs beside its scripts: the model, facts about it, and slices to try."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from mitoseg_lib.datasets import load_example
from mitoseg_lib.files import write_whole
from mitoseg_lib.onnx_export import export_onnx, halve_onnx
from mitoseg_lib.weights import read_metadata

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "_vendor" / "vendor" / "onnxruntime-web" / "ort-wasm-simd-threaded.wasm"
FOLDER = "book/demo"  # of the built book, where the scripts lie already
EXAMPLES = {"phantom-1.png": 12, "phantom-2.png": 30, "phantom-3.png": 48}  # slices of the test phantom


def add_to(html: Path) -> None:
    """Write the files into a built book."""
    folder = html / FOLDER
    with TemporaryDirectory() as name:
        export_onnx(Path(name) / "whole.onnx", single_slices=True)
        halve_onnx(Path(name) / "whole.onnx", folder / "model.onnx")
    metadata = read_metadata()
    about = {
        "bytes": (folder / "model.onnx").stat().st_size,
        "runtime_bytes": RUNTIME.stat().st_size,
        "threshold": metadata.threshold,
        "grey_range": metadata.grey_range,
        "nanometres": metadata.voxel_size_nm[1],
    }
    write_whole(folder / "model.json", json.dumps(about).encode())
    stack = load_example("test").image
    for name, z in EXAMPLES.items():
        Image.fromarray(stack[z]).save(folder / name, optimize=True)
