"""The model as ONNX and in a browser: parts of ``make bench``, recorded in results/speed/web.json."""

import dataclasses
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from torch import nn

import book
import screenshots
from mitoseg_lib.datasets import load_epfl, load_example
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.memory import reuse_memory
from mitoseg_lib.metrics import iou
from mitoseg_lib.models import for_single_slices
from mitoseg_lib.onnx_export import OnnxNetwork, export_onnx, halve_onnx, quantise_onnx
from mitoseg_lib.prediction import Segmenter
from mitoseg_lib.stacks import Stack
from records import recording

PAGE = "chapters/try_it.html"
SIDE = 512
FIGURE = re.compile(r'class="cell_output[^<]*(<(?!img|/main)[^<]*)*<img')

Row = Callable[[str, str, str], None]


def with_neighbours(stack: Stack, side: int = 384, step: int = 4) -> np.ndarray:
    """Some slices with the ones below and above as channels, (n, 3, y, x), to calibrate with."""
    return np.stack([stack.image[z - 1 : z + 2, :side, :side] for z in range(1, len(stack.image) - 1, step)])


def bench_onnx(row: Row) -> None:
    """Size, time and test IoU of the shipped model's forms, the page's among them; with MITOSEG_DATA on EPFL's, too."""
    reuse_memory()
    stacks = {"phantom": {part: load_example(part) for part in ("train", "test")}}
    if os.environ.get("MITOSEG_DATA"):
        stacks["epfl"] = {part: load_epfl(f"{part}ing") for part in ("train", "test")}
    with tempfile.TemporaryDirectory() as name, recording("web") as record:
        record["onnx_side"], record["forms"] = SIDE, []
        for form, path, model in forms(Path(name), stacks):
            one = {"form": form, "bytes": path and path.stat().st_size, "seconds": round(seconds_of(model), 4)}
            segmenter = dataclasses.replace(Segmenter.load(device="cpu", precision="fp32"), model=model)
            for data, parts in stacks.items():
                one[data] = round(iou_as_shipped(segmenter, parts["test"]), 4)
            row(f"{form}: {SIDE} x {SIDE}, one thread", f"{one['seconds']:.3f} s", "")
            row("    test IoU", ", ".join(f"{data} {one[data]}" for data in stacks), "")
            record["forms"].append(one)
        record["single_slices"] = {
            data: {name: round(score, 4) for name, score in of_single_slices(parts["test"], Path(name)).items()}
            for data, parts in stacks.items()
        }
        row("test IoU of single slices", str(record["single_slices"]), "")


def forms(folder: Path, stacks: dict[str, dict[str, Stack]]) -> Iterator[tuple[str, Path | None, nn.Module]]:
    """The shipped model in PyTorch, and as ONNX with 32, 16 and 8 bits, calibrated with each of the stacks."""
    yield "PyTorch", None, Segmenter.load(device="cpu").model
    whole, half = folder / "whole.onnx", folder / "half.onnx"
    export_onnx(whole)
    yield "32 bits", whole, OnnxNetwork(whole)
    halve_onnx(whole, half)
    yield "16 bits", half, OnnxNetwork(half)
    for data, parts in stacks.items():
        eight = folder / f"{data}.onnx"
        quantise_onnx(whole, eight, with_neighbours(parts["train"]))
        yield f"8 bits, {data}", eight, OnnxNetwork(eight)


def of_single_slices(test: Stack, folder: Path) -> dict[str, float]:
    """Test IoU of slices one by one, each in place of its neighbours, in PyTorch and as in the page; no median."""
    segmenter = Segmenter.load(device="cpu")
    export_onnx(folder / "page.onnx", single_slices=True)
    halve_onnx(folder / "page.onnx", folder / "page16.onnx")
    models = {"PyTorch": for_single_slices(segmenter.model), "page": OnnxNetwork(folder / "page16.onnx")}
    return {
        name: iou(predict_stack(model, test.image, precision="fp32") >= segmenter.threshold, test.labels)
        for name, model in models.items()
    }


def seconds_of(model: nn.Module) -> float:
    """Seconds for one slice, the shortest of five, with one thread."""
    before, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    slices = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(5):
            started = time.perf_counter()
            model.eval()(slices)
            best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return best


def iou_as_shipped(segmenter: Segmenter, test: Stack) -> float:
    """IoU of the whole stack as `mitoseg predict` segments it."""
    found = segmenter.probabilities(test.image, segmenter.voxel_size_nm)
    return iou(found >= segmenter.threshold, test.labels)


def bench_demo(row: Row) -> None:
    """Seconds in headless Chromium: the first picture of a page, loading the model, and one slice of 512 x 512."""
    server = screenshots.serve(book.HTML)
    address = f"http://127.0.0.1:{server.server_port}/"
    with sync_playwright() as play, recording("web") as record:
        browser = play.chromium.launch(executable_path=screenshots.find_chromium(), args=screenshots.CHROMIUM_OPTIONS)
        first = {name: first_picture(browser, address + name) for name in pages_with_pictures()}
        slowest = max(first, key=first.get)
        row(f"first picture, slowest page ({Path(slowest).stem})", f"{first[slowest]:.2f} s", "")
        loaded, segmented = in_the_browser(browser, address + PAGE)
        row("model loaded in the browser", f"{loaded:.2f} s", "")
        row(f"a slice of {SIDE} x {SIDE} in the browser", f"{segmented:.2f} s", "under 3 s")
        record["browser"] = {
            "name": f"Chromium {browser.version.split('.')[0]}",
            "load_seconds": round(loaded, 2),
            "slice_seconds": round(segmented, 2),
            "side": SIDE,
            "first_picture_seconds": {Path(name).stem: round(took, 2) for name, took in first.items()},
        }
        browser.close()
    server.shutdown()


def pages_with_pictures() -> list[str]:
    """Chapters of the built book that show figures."""
    pages = sorted((book.HTML / "chapters").glob("0*.html"))
    return [path.relative_to(book.HTML).as_posix() for path in pages if FIGURE.search(path.read_text())]


def first_picture(browser: Browser, address: str) -> float:
    """Seconds until a page's first figure is drawn."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    started = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_function(
        "[...document.querySelectorAll('main .cell_output img')].some(i => i.complete && i.naturalWidth > 0)"
    )
    took = time.perf_counter() - started
    page.close()
    return took


def in_the_browser(browser: Browser, address: str) -> tuple[float, float]:
    """Seconds until the model is loaded, and the shortest of three for a slice, from the file to the mask."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address, wait_until="networkidle")
    started = time.perf_counter()
    page.click('[data-part="load"]')
    page.wait_for_function("!document.querySelector('[data-part=input]').disabled", timeout=120_000)
    loaded, took = time.perf_counter() - started, []
    tile = np.pad(load_example("test").image[30], 80, mode="reflect")[:SIDE, :SIDE]
    for number in range(3):
        stream = io.BytesIO()
        Image.fromarray(tile).save(stream, "PNG")
        file = {"name": f"{number}.png", "mimeType": "image/png", "buffer": stream.getvalue()}
        started = time.perf_counter()
        page.set_input_files('[data-part="file"]', file)
        words = f"document.querySelector('[data-part=status]').textContent.includes('of {number}.png is called')"
        page.wait_for_function(words, timeout=120_000)
        took.append(time.perf_counter() - started)
    page.close()
    return loaded, min(took)
