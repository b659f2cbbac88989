"""Speed, measured in one run and printed as a table: ``make bench``, or ``python tools/bench.py PART ...``."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from monai.inferers import sliding_window_inference
from torch import nn

import bench_chapters
import bench_volumes
import bench_web
from mitoseg_lib import phantom
from mitoseg_lib.datasets import fetch_epfl, load_epfl, load_example
from mitoseg_lib.inference import is_bf16_native, predict_stack
from mitoseg_lib.interruptions import StopRequest
from mitoseg_lib.metrics import iou
from mitoseg_lib.models import UNet, encoder_unet, resnet34_unet
from mitoseg_lib.patches import PatchDataset, train_augmentation
from mitoseg_lib.stacks import Stack, load_stack
from mitoseg_lib.training import TrainingSettings, fit
from mitoseg_lib.training.loop import Training
from mitoseg_lib.weights import MaskRule, save_weights

ROOT = Path(__file__).resolve().parents[1]


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of several runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def python(code: str) -> Callable[[], object]:
    """A fresh interpreter that runs ``code``."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def row(what: str, measured: str, target: str) -> None:
    """One line of the table."""
    print(f"{what:58s}{measured:>20s}   {target}", flush=True)


def bench_import() -> None:
    """How long `import mitoseg_lib` takes beyond the bare interpreter."""
    beyond = seconds(python("import mitoseg_lib")) - seconds(python(""))
    row("import mitoseg_lib", f"{beyond:.3f} s", "under 0.5 s")


def bench_load_stack(folder: Path) -> None:
    """`load_stack` against `tifffile.imread`, on one volume in two flavours."""
    rng = np.random.default_rng(0)
    volume = rng.normal(130, 30, (165, 768, 1024)).clip(0, 255).astype(np.uint8)
    for flavour, options in {"contiguous": {}, "zlib": {"compression": "zlib"}}.items():
        path = folder / f"{flavour}.tif"
        tifffile.imwrite(path, volume, **options)
        read = seconds(lambda path=path: tifffile.imread(path))
        # Touch every page, so that a memory map can't win by reading nothing.
        load = seconds(lambda path=path: np.add.reduce(load_stack(path).image[:, ::8, ::8], axis=None))
        read_too = seconds(lambda path=path: np.add.reduce(tifffile.imread(path)[:, ::8, ::8], axis=None))
        row(
            f"load_stack, {flavour}, 130 MB", f"{load:.2f} s", f"tifffile.imread {read:.2f} s, touched {read_too:.2f} s"
        )
        row("    ratio load_stack / imread, both touched", f"{load / read_too:.2f}", "at most 1")


def bench_patches() -> None:
    """Patches a second in one process."""
    train = load_example("train")
    wide = Stack(np.tile(train.image, (1, 2, 2)), np.tile(train.labels, (1, 2, 2)), train.voxel_size_nm)
    everything = train_augmentation(noise=15, brightness_contrast=0.2, scale=0.25)
    for name, augmentation in {
        "none": None,
        "flips, quarter turns": train_augmentation(),
        "everything": everything,
    }.items():
        patches = PatchDataset(wide, patch_size=512, patches_per_epoch=100, augmentation=augmentation)
        taken = seconds(lambda patches=patches: [patches[i] for i in range(100)], repeats=3)
        row(f"patches of 512 a second, augmentation: {name}", f"{100 / taken:.0f}", "")


def wide_stacks() -> tuple[Stack, Stack]:
    """A stack to train on, and 8 slices of 768 x 1024 of another: EPFL's where they are, else tiled phantoms."""
    if os.environ.get("MITOSEG_DATA"):
        return load_epfl("training"), load_epfl("testing").slices(range(8))
    test = load_example("test")
    tiled = [np.tile(volume[:8], (1, 2, 3))[:, :768, :1024] for volume in (test.image, test.labels)]
    return load_example("train"), Stack(*tiled, test.voxel_size_nm)


def in_windows(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """MONAI's way: windows of 512 that overlap by a quarter, in float32."""
    model.eval()
    windows = [torch.from_numpy(slice_)[None, None].float() / 255 for slice_ in image]
    with torch.no_grad():
        found = [sliding_window_inference(w, (512, 512), 4, lambda x: model(x).sigmoid(), 0.25) for w in windows]
    return torch.cat(found)[:, 0].numpy()


def bench_predict() -> None:
    """`predict_stack` against MONAI's sliding windows: the speed, and what the masks are worth."""
    train, test = wide_stacks()
    model = resnet34_unet(weights=None, frozen=True)
    image = test.image
    times = dict.fromkeys(("windows", "fp32", "bf16"), float("inf"))
    for _ in range(2):  # in turns, so that a busy moment hits none of them alone
        times["windows"] = min(times["windows"], seconds(lambda: in_windows(model, image), 1))
        for precision in ("fp32", "bf16"):
            took = seconds(lambda precision=precision: predict_stack(model, image, precision=precision), 1)
            times[precision] = min(times[precision], took)
    row("MONAI's windows, ResNet34-UNet, slices a second", f"{len(image) / times['windows']:.2f}", "")
    for precision, target in (("fp32", "at least 1.5"), ("bf16", "at least 3, where the CPU has bf16")):
        row(f"predict_stack, {precision}", f"{len(image) / times[precision]:.2f}", "")
        row("    times as fast as MONAI's windows", f"{times['windows'] / times[precision]:.1f}", target)
    bench_masks(train, test)


def bench_masks(train: Stack, test: Stack) -> None:
    """The IoU of masks: whole slices in both precisions against windows, after a short training."""
    torch.manual_seed(0)
    model = encoder_unet("efficientnet_lite0", frozen=True)
    patches = PatchDataset(train, patch_size=160, patches_per_epoch=360, augmentation=train_augmentation())
    fit(model, patches, validation=test.slices([0]), settings=TrainingSettings(epochs=1), progress=False)
    windows = iou(in_windows(model, test.image) >= 0.5, test.require_labels())
    for precision in ("fp32", "bf16"):
        whole = iou(predict_stack(model, test.image, precision=precision) >= 0.5, test.require_labels())
        row(f"IoU of whole slices, {precision}, less that of windows", f"{whole - windows:+.4f} of {windows:.3f}", "")


def whole_stack(folder: Path) -> Path:
    """A TIFF of 165 slices of 768 x 1024: EPFL's test stack where it is, else tiled phantoms."""
    if os.environ.get("MITOSEG_DATA"):
        return fetch_epfl() / "testing.tif"
    tiled = np.tile(load_example("test").image, (3, 2, 3))[:165, :768, :1024]
    tifffile.imwrite(folder / "tiled.tif", tiled, compression="zlib")
    return folder / "tiled.tif"


def command(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and GB of memory that the command `mitoseg` takes, start and end included."""
    code = (
        "import resource; from mitoseg_lib.cli import app; app(standalone_mode=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, int(done.stdout.split()[-1]) / 1e6


def bench_command(folder: Path) -> None:
    """`mitoseg predict` on a whole stack, end to end, against MONAI's windows in float32."""
    stack = whole_stack(folder)
    image = load_stack(stack).image
    some = image[:: len(image) // 4][:4]
    torch.manual_seed(0)
    models = {
        "ResNet34-UNet": ("resnet34", encoder_unet("resnet34", weights=None, frozen=False)),
        "Lite0-UNet": ("efficientnet_lite0", encoder_unet("efficientnet_lite0", frozen=False)),
    }
    windows = {}
    for name, (encoder, model) in models.items():
        windows[name] = seconds(lambda model=model: in_windows(model, some), 2) / len(some) * len(image)
        weights = folder / f"{encoder}.safetensors"
        save_weights(model, weights, rule=MaskRule(), encoder=encoder)
        took, gigabytes = command("predict", stack, folder / f"{encoder}.tif", "--weights", weights)
        row(f"MONAI's windows, {name}, {len(image)} slices (from {len(some)})", f"{windows[name]:.0f} s", "")
        row(f"mitoseg predict, {name}, the same, end to end", f"{took:.0f} s", "")
        row("    times as fast as MONAI's windows", f"{windows[name] / took:.1f}", "at least 2.5")
        if name != "ResNet34-UNet":
            ratio = windows["ResNet34-UNet"] / took
            row("    times as fast as ResNet34-UNet in MONAI's windows", f"{ratio:.1f}", "at least 10")
        row("    peak memory", f"{gigabytes:.2f} GB", "under 2.5 GB")


def bench_training() -> None:
    """Steps a second, and how much of the time the loop waits for patches."""
    stack = load_example("train")
    precision = "bf16" if is_bf16_native() else "fp32"
    settings = TrainingSettings(epochs=1, precision=precision)
    for name, model in {"U-Net": UNet(), "Lite0-UNet": encoder_unet("efficientnet_lite0", frozen=False)}.items():
        patches = PatchDataset(stack, patch_size=160, patches_per_epoch=6 * 24, augmentation=train_augmentation())
        training = Training(model, patches, stack.slices([0]), settings)
        batches, took, waited = training.remaining_batches(), [], []
        for _ in range(24):
            started = time.perf_counter()
            images, masks = next(batches)
            waited.append(time.perf_counter() - started)
            training.take_step(images, masks, StopRequest())
            took.append(time.perf_counter() - started)
        took, waited = took[4:], waited[4:]  # the first steps find memory and choose algorithms
        row(f"{name}: steps of 6 crops of 160 a second, {precision}", f"{1 / np.median(took):.2f}", "")
        row("    of which waiting for patches", f"{100 * sum(waited) / sum(took):.1f} %", "under 5 % on the CPU")


LONG_STEPS = """
import sys, time
from dataclasses import replace
import numpy as np, torch
from mitoseg_lib.datasets import load_example
from mitoseg_lib.interruptions import StopRequest
from mitoseg_lib.memory import reuse_memory
from mitoseg_lib.recipes import recipe_named
from mitoseg_lib.training.loop import Training
if sys.argv[2] == "kept":
    reuse_memory()
torch.set_num_threads(1)
recipe = replace(recipe_named("ladder-longer"), precision=sys.argv[1])
stack, took = load_example("train"), []
training = Training(recipe.build(0), recipe.patches(stack, 0), stack.slices([0]), recipe.settings(0))
batches = training.remaining_batches()
for _ in range(12):
    started = time.perf_counter()
    training.take_step(*next(batches), StopRequest())
    took.append(time.perf_counter() - started)
print(np.median(took[4:]))
"""


def bench_long_training() -> None:
    """A step of chapter 7's long training on one core, whose memory is handed back after each layer, or kept."""
    for precision in ("fp32", "bf16") if is_bf16_native() else ("fp32",):
        took = {}
        for memory in ("handed back", "kept"):
            arguments = [sys.executable, "-c", LONG_STEPS, precision, memory]
            done = subprocess.run(arguments, check=True, capture_output=True, text=True)
            took[memory] = float(done.stdout)
            row(f"a step of 16 crops of 256, {precision}, memory {memory}", f"{took[memory]:.2f} s", "")
        row("    ratio kept / handed back", f"{took['kept'] / took['handed back']:.2f}", "under 0.8")


def bench_phantoms(folder: Path) -> None:
    """Both bundled stacks from nothing."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", phantom.__name__, str(folder)], check=True, capture_output=True)
    row("both bundled stacks", f"{time.perf_counter() - started:.0f} s", "under 120 s")


def bench_book() -> None:
    """The book from a warm environment."""
    started = time.perf_counter()
    subprocess.run(["make", "book"], cwd=ROOT, check=True, capture_output=True)
    row("make book, warm .venv", f"{time.perf_counter() - started:.0f} s", "under 60 s")


def in_a_folder(bench: Callable[[Path], None]) -> Callable[[], None]:
    """Give a part a folder for its files."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as name:
            bench(Path(name))

    return run


PARTS: dict[str, Callable[[], None]] = {
    "import": bench_import,
    "load": in_a_folder(bench_load_stack),
    "patches": bench_patches,
    "training": bench_training,
    "long-training": bench_long_training,
    "predict": bench_predict,
    "command": in_a_folder(bench_command),
    "volume-workers": lambda: bench_volumes.bench_workers(row),
    "volume-overhead": lambda: bench_volumes.bench_overhead(row),
    "volume-kills": lambda: bench_volumes.bench_kills(row),
    "volume-sizes": lambda: bench_volumes.bench_sizes(row),
    "onnx": lambda: bench_web.bench_onnx(row),
    "demo": lambda: bench_web.bench_demo(row),
    "chapters": lambda: bench_chapters.bench_chapters(row),
    "phantoms": in_a_folder(bench_phantoms),
    "book": bench_book,
}


def main() -> None:
    """All parts, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    wanted = parser.parse_args().parts
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    print(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")
    for name in wanted or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
