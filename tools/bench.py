"""Speed, measured in one run and printed as a table: ``make bench``."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

from mitoseg_lib import phantom
from mitoseg_lib.datasets import load_example
from mitoseg_lib.patches import PatchDataset, train_augmentation
from mitoseg_lib.stacks import Stack, load_stack

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


def main() -> None:
    """Everything, from the quickest to the slowest."""
    print(f"{os.cpu_count()} CPU cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_import()
        bench_load_stack(folder)
        bench_patches()
        bench_phantoms(folder)
        bench_book()


if __name__ == "__main__":
    main()
