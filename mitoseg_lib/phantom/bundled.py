"""The two stacks that come with the course, and how they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from mitoseg_lib.phantom.drawing import Imaging, make_phantom

BUNDLED = {
    "train": (22, Imaging()),
    "test": (18, Imaging(contrast=0.8, brightness=5.0, blur_nm=6.5, shot_noise=10.0, readout_noise=6.0)),
}
BUNDLED_SHAPE, BUNDLED_FOREGROUND = (60, 432, 432), 0.10


def write_bundled(folder: str | Path) -> None:
    """Write the train and test stacks that come with the course, four TIFF files, into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (seed, imaging) in BUNDLED.items():
        stack = make_phantom(BUNDLED_SHAPE, seed, foreground=BUNDLED_FOREGROUND, imaging=imaging)
        write_volume(folder / f"phantom_{name}.tif", stack.image, stack.voxel_size_nm)
        labels = stack.labels.astype(np.uint8) * np.uint8(255)
        write_volume(folder / f"phantom_{name}_labels.tif", labels, stack.voxel_size_nm)


def write_volume(path: Path, volume: np.ndarray, voxel_size_nm: tuple[float, float, float]) -> None:
    """Write a uint8 volume (z, y, x) as an ImageJ TIFF, compressed, with its voxel size in micrometres."""
    z, y, x = (edge / 1000 for edge in voxel_size_nm)
    tifffile.imwrite(
        path,
        volume,
        imagej=True,
        compression="zlib",
        compressionargs={"level": 9},
        resolution=(1 / x, 1 / y),
        metadata={"axes": "ZYX", "spacing": z, "unit": "um"},
    )
