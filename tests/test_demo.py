"""The page that runs the model in the reader's browser, looked at by a browser without a network."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mitoseg_lib.datasets import load_example
from mitoseg_lib.grey import grey_range, to_grey_range
from mitoseg_lib.metrics import iou
from mitoseg_lib.prediction import Segmenter
from mitoseg_lib.weights import read_metadata

ROOT = Path(__file__).resolve().parents[1]
PAGE = "chapters/try_it.html"
STATUS = "document.querySelector('[data-part=status]').textContent"


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def give(page, content, name="slice.png", kind="image/png"):
    page.set_input_files('[data-part="file"]', {"name": name, "mimeType": kind, "buffer": content})


def wait_for(page, words):
    page.wait_for_function(f"words => {STATUS}.includes(words)", arg=words, timeout=60_000)
    return page.inner_text('[data-part="status"]')


def saved_mask(page):
    with page.expect_download() as download:
        page.click('[data-part="save"]')
    return np.asarray(Image.open(download.value.path()).convert("L")) == 255


def shown_pixels(page):
    """RGBA of what the canvas shows, (y, x, 4)."""
    width, *values = page.evaluate(
        """() => {
            const canvas = document.querySelector("[data-part=canvas]");
            return [canvas.width, ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )
    return np.array(values, np.uint8).reshape(-1, width, 4)


def set_threshold(page, value):
    page.locator('[data-part="threshold"]').fill(str(value))


def mask_by_torch(image, threshold, nanometres=5.0):
    """What the library makes of one slice."""
    segmenter = Segmenter.load(device="cpu", precision="fp32")
    grey = to_grey_range(grey_range(image), segmenter.grey_range).apply(image[np.newaxis])
    return segmenter.probabilities(grey, (5.0, nanometres, nanometres))[0] >= threshold


@pytest.fixture(scope="module")
def ready(browser, address):
    """The page with the model loaded; other hosts can't be reached."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append((request.method, request.url)))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address + PAGE, wait_until="networkidle")
    assert not [url for _, url in page.asked if url.endswith((".onnx", ".wasm"))], "loaded before the click"
    page.click('[data-part="load"]')
    assert wait_for(page, "ready") == "The model is ready. Give it an image."
    assert all(url.startswith((address, "data:", "blob:")) for _, url in page.asked)
    yield page
    assert page.errors == []
    page.close()


def test_the_page_says_the_iou_that_was_measured():
    measured = json.loads((ROOT / "results" / "speed" / "web.json").read_text())
    text = (ROOT / "chapters" / "try_it.md").read_text()
    assert f"its IoU is {measured['single_slices']['epfl']['page']:.3f}," in text
    assert f"reaches {measured['forms'][0]['epfl']:.3f} " in text


def test_the_model_is_small_enough(book_html):
    assert (book_html / "book" / "demo" / "model.onnx").stat().st_size <= 12e6


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.7])
def test_the_mask_is_the_one_that_torch_makes(ready, threshold):
    image = load_example("test").image[30, :250, :301]  # sides that have to be padded
    give(ready, png(image), f"slice {threshold}.png")
    assert "% of slice" in wait_for(ready, f"slice {threshold}.png is called mitochondrion. It took")
    set_threshold(ready, threshold)
    found, expected = saved_mask(ready), mask_by_torch(image, threshold)
    assert found.shape == image.shape and 0.02 < expected.mean() < 0.5
    assert iou(found, expected) >= 0.99


def test_other_grey_levels_are_brought_to_the_models(ready):
    image = load_example("test").image[30, :256, :256] // 2 + 100
    give(ready, png(image), "pale.png")
    wait_for(ready, "pale.png is called")
    set_threshold(ready, 0.4)
    assert iou(saved_mask(ready), mask_by_torch(image, 0.4)) >= 0.99


def test_pixels_of_another_size_are_resampled_and_the_mask_brought_back(ready):
    image = np.asarray(Image.fromarray(load_example("test").image[30]).resize((216, 216), Image.Resampling.BOX))
    ready.fill('[data-part="nanometres"]', "10")
    give(ready, png(image), "coarse.png")
    wait_for(ready, "coarse.png is called")
    set_threshold(ready, 0.4)
    found = saved_mask(ready)
    ready.fill('[data-part="nanometres"]', "5")
    assert found.shape == image.shape
    assert iou(found, mask_by_torch(image, 0.4, 10.0)) > 0.9  # browsers interpolate a little differently
    assert iou(found, mask_by_torch(image, 0.4)) < 0.8


def test_an_example_is_segmented_and_nothing_is_sent(ready):
    ready.asked.clear()
    ready.click('[data-example="phantom-1.png"]')
    wait_for(ready, "% of phantom, slice 12 is called mitochondrion")
    assert [(method, url.rpartition("/")[2]) for method, url in ready.asked] == [("GET", "phantom-1.png")]
    ready.asked.clear()
    give(ready, png(load_example("test").image[12]), "own.png")
    wait_for(ready, "own.png is called")
    assert [url for _, url in ready.asked if not url.startswith(("blob:", "data:"))] == []


def test_the_picture_shows_the_mask_only_where_it_is(ready):
    image = load_example("test").image[30, :128, :128]
    give(ready, png(image), "shown.png")
    wait_for(ready, "shown.png is called")
    drawn = shown_pixels(ready)
    coloured = drawn[..., 0] != drawn[..., 2]
    mask = saved_mask(ready)
    assert (
        np.array_equal(drawn[~mask][:, 0], image[~mask]) and coloured[mask].mean() > 0.99 and not coloured[~mask].any()
    )
    ready.uncheck('[data-part="show"]')
    assert np.array_equal(shown_pixels(ready)[..., 1], image)
    ready.check('[data-part="show"]')


@pytest.mark.parametrize(
    ("content", "name", "kind", "words"),
    [
        (b"II*\0", "stack.tif", "image/tiff", "stack.tif is a TIFF, which browsers can't show; a PNG, JPEG or WebP"),
        (b"hello", "notes.png", "image/png", "notes.png is not an image that this browser can show; a PNG, JPEG"),
        (png(np.zeros((20, 400), np.uint8)), "thin.png", "image/png", "400 x 20 pixels"),
        (png(np.zeros((1700, 1700), np.uint8)), "huge.png", "image/png", "at most 2.5 million were expected; cut out"),
    ],
    ids=["tiff", "text", "thin", "huge"],
)  # fmt: skip
def test_what_cannot_be_segmented_gets_a_sentence(ready, content, name, kind, words):
    give(ready, content, name, kind)
    said = wait_for(ready, words)
    assert said.endswith(".") and "undefined" not in said
    assert ready.is_enabled('[data-part="file"]')


def test_a_size_of_pixels_that_cannot_be_meant_gets_a_sentence(ready):
    ready.fill('[data-part="nanometres"]', "0")
    give(ready, png(np.zeros((64, 64), np.uint8)))
    wait_for(ready, "must be a number of nanometres")
    ready.fill('[data-part="nanometres"]', "5")


def test_the_page_stays_alive_while_the_model_works(ready):
    ticks = "window.ticks = []; window.timer = setInterval(() => window.ticks.push(performance.now()), 20)"
    noise = np.random.default_rng(0).integers(0, 255, (800, 800), dtype=np.uint8)
    ready.evaluate(ticks)
    give(ready, png(noise), "noise.png")
    wait_for(ready, "Looking for mitochondria in noise.png")
    wait_for(ready, "noise.png is called")
    gaps = ready.evaluate("clearInterval(window.timer); window.ticks.slice(1).map((t, i) => t - window.ticks[i])")
    seconds = float(ready.inner_text('[data-part="status"]').rpartition("took ")[2].split()[0])
    assert len(gaps) > 10 and max(gaps) < 1000 * seconds / 2, "the page stood still while the model worked"


def test_everything_can_be_done_by_keyboard(browser, address):
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.goto(address + PAGE, wait_until="networkidle")
    page.locator('[data-part="load"]').focus()
    page.keyboard.press("Enter")
    wait_for(page, "ready")
    assert page.evaluate("document.activeElement.dataset.part") == "file"  # where the reader goes on
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.example") == "phantom-1.png"
    page.keyboard.press("Enter")
    before = wait_for(page, "is called mitochondrion")
    page.locator('[data-part="threshold"]').focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    after = page.inner_text('[data-part="status"]')
    share = [float(said.split()[0]) for said in (before, after)]
    expected = read_metadata().threshold + 0.10
    assert share[1] < share[0] and page.inner_text('[data-part="shown-threshold"]') == f"{expected:.2f}"
    assert f"{share[1]} %" in page.get_attribute('[data-part="canvas"]', "aria-label")
    page.close()


def test_a_dropped_image_is_segmented(ready):
    data = list(png(load_example("test").image[20, :96, :96]))
    ready.evaluate(
        """data => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"}));
            const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
            document.querySelector("[data-part=drop]").dispatchEvent(event);
        }""",
        data,
    )
    wait_for(ready, "dropped.png is called mitochondrion")


@pytest.mark.parametrize("missing", ["model.onnx", "ort-wasm-simd-threaded.wasm", "worker.js"])
def test_a_download_that_fails_gets_a_sentence_and_can_be_tried_again(browser, address, missing):
    page = browser.new_page()
    page.route(f"**/{missing}", lambda route: route.fulfill(status=503))
    page.goto(address + PAGE, wait_until="networkidle")
    page.click('[data-part="load"]')
    assert wait_for(page, "The model wasn't loaded").endswith("Check the connection, and try again.")
    page.unroute(f"**/{missing}")
    page.click('[data-part="load"]')
    wait_for(page, "ready")
    page.close()


def test_the_pages_model_is_the_librarys_for_single_slices(book_html):
    from mitoseg_lib.onnx_export import OnnxNetwork

    generator = torch.Generator().manual_seed(0)
    slices = torch.rand(1, 1, 96, 64, generator=generator)
    with torch.no_grad():
        expected = Segmenter.load(device="cpu").model.eval()(slices.repeat(1, 3, 1, 1)).sigmoid()
    found = OnnxNetwork(book_html / "book" / "demo" / "model.onnx")(slices).sigmoid()
    assert (found - expected).abs().max() < 0.05
