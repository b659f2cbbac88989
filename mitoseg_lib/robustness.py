"""How a model's mask suffers when the image differs from those that it was trained on: one change at a time.

The tissue stays the same, and so does the truth. Only what another microscope, another detector or another day would
do to the grey levels is imitated. Images are uint8 (z, y, x); what leaves 0 to 255 is cut off, as a detector does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

if TYPE_CHECKING:  # torch, which takes long to import
    from mitoseg_lib.metrics import Scores
    from mitoseg_lib.stacks import Stack

__all__ = ["CHANGES", "Change", "blur", "brightness", "contrast", "curve", "drift", "noise", "voxel_size"]

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Predict = Callable[[Image], Mask]


def brightness(image: Image, offset: float) -> Image:
    """Add an offset to all grey levels.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    offset : float
        In grey levels, of any sign; 0 changes nothing.

    Returns
    -------
    ndarray
        uint8, same shape; a new array, as from all changes here.

    Raises
    ------
    ValueError
        When the image isn't uint8 (z, y, x), or the strength isn't finite; the other changes raise it, too.
    """
    _check(image, "The offset", offset, lowest=-math.inf)
    return _changed(image, lambda z, grey: grey + offset)


def contrast(image: Image, factor: float) -> Image:
    """Multiply the distance of all grey levels to the stack's mean.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    factor : float
        0 or more: 0 leaves one grey level, 1 changes nothing.
    """
    _check(image, "The factor", factor)
    mean = float(image.mean())
    return _changed(image, lambda z, grey: (grey - mean) * factor + mean)


def noise(image: Image, sd: float, *, seed: int = 0) -> Image:
    """Add Gaussian noise, independent in each voxel.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    sd : float
        Standard deviation in grey levels; 0 changes nothing.
    seed : int
        Of what is drawn; two strengths of one seed are the same noise, scaled.
    """
    _check(image, "The noise's sd", sd)
    rng = np.random.default_rng(seed)
    return _changed(image, lambda z, grey: grey + sd * rng.standard_normal(grey.shape))


def blur(image: Image, sd: float) -> Image:
    """Blur each slice with a Gaussian, as a beam out of focus does; beyond its edges a slice is reflected.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    sd : float
        Standard deviation in pixels; 0 changes nothing.
    """
    _check(image, "The blur's sd", sd)
    return _changed(image, lambda z, grey: ndimage.gaussian_filter(grey, sd))


def drift(image: Image, sd: float, *, seed: int = 0) -> Image:
    """Add an offset to each slice, drawn for it alone: the beam's and the detector's drift while a stack is recorded.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x), of contiguous slices.
    sd : float
        Standard deviation of the offsets in grey levels; 0 changes nothing.
    seed : int
        Of what is drawn; two strengths of one seed are the same offsets, scaled.
    """
    _check(image, "The drift's sd", sd)
    offsets = sd * np.random.default_rng(seed).standard_normal(len(image))
    return _changed(image, lambda z, grey: grey + offsets[z])


def voxel_size(image: Image, factor: float) -> Image:
    """Resample slices as if their voxels had been recorded larger or smaller, in the plane.

    Cubic interpolation, as `mitoseg predict` has it; larger voxels average over what they cover. The slices' distance
    stays.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    factor : float
        How many times as long an edge becomes, above 0; 1 changes nothing.

    Returns
    -------
    ndarray
        uint8, (z, y / factor, x / factor), rounded, and 1 at least.
    """
    _check(image, "The factor", factor)
    if factor == 0:
        raise ValueError("The factor is 0, but voxels have a size above 0; use for example 2.")
    return _regridded(image, tuple(max(1, round(side / factor)) for side in image.shape[1:]))


@dataclass(frozen=True)
class Change:
    """A way in which an image can differ, and how strongly it is tried.

    Attributes
    ----------
    title : str
        What it is called, in a few words.
    unit : str
        Of the strengths.
    strengths : tuple of float
        Ascending.
    unchanged : float
        The strength that changes nothing.
    function : callable
        From an image and a strength to the changed image, uint8 (z, y, x).
    is_stated : bool
        The changed image's voxel size is known, so it is brought to the size that the model knows before it is
        predicted, as `mitoseg predict --voxel-size` does.
    """

    title: str
    unit: str
    strengths: tuple[float, ...]
    unchanged: float
    function: Callable[[Image, float], Image]
    is_stated: bool = False

    def mask(self, predict: Predict, image: Image, strength: float) -> Mask:
        """Return what is predicted of the changed image, on the grid of the unchanged one, bool (z, y, x).

        Where the change has another grid, the mask is first brought to that, as a user would get it, and then to the
        grid of the truth: interpolated linearly and cut at a half.
        """
        changed = self.function(image, strength)
        seen = _regridded(changed, image.shape[1:]) if self.is_stated else changed
        found = _mask_regridded(predict(seen), changed.shape[1:])
        return _mask_regridded(found, image.shape[1:])


SIZES = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0)

CHANGES: dict[str, Change] = {
    "brightness": Change("brightness", "grey levels added", (-60, -40, -20, 0, 20, 40, 60), 0, brightness),
    "contrast": Change("contrast", "times the contrast", (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0), 1, contrast),
    "noise": Change("noise", "grey levels, sd", (0, 5, 10, 20, 30, 40), 0, noise),
    "blur": Change("blur", "pixels, sd", (0, 0.5, 1.0, 1.5, 2.0, 3.0), 0, blur),
    "drift": Change("drift from slice to slice", "grey levels, sd", (0, 2, 4, 8), 0, drift),
    "voxel_size": Change("voxel size, not stated", "times as long an edge", SIZES, 1, voxel_size),
    "stated_voxel_size": Change("voxel size, stated", "times as long an edge", SIZES, 1, voxel_size, is_stated=True),
}


def curve(predict: Predict, stack: Stack, change: Change) -> list[tuple[float, Scores]]:
    """Return the scores of a model at each strength of a change, counts pooled over the stack.

    Parameters
    ----------
    predict : callable
        From an image, uint8 (z, y, x), to its mask, bool of the same shape: a model with its threshold.
    stack : Stack
        With labels.
    change : Change
        One of `CHANGES`, or your own.

    Returns
    -------
    list of tuple
        Strength and scores, in the order of the strengths.

    Raises
    ------
    StackError
        When the stack has no labels.
    """
    from mitoseg_lib.metrics import scores

    truth = stack.require_labels()
    return [(strength, scores(change.mask(predict, stack.image, strength), truth)) for strength in change.strengths]


def _check(image: Image, what: str, strength: float, *, lowest: float = 0.0) -> None:
    """Raise a ValueError for what isn't a stack's image, or a strength that can't be meant."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.size == 0:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"The image is {found}, but uint8 (z, y, x) was expected; pass stack.image.")
    if not (math.isfinite(strength) and strength >= lowest):
        wanted = "a finite number" if lowest < 0 else "a finite number of 0 or more"
        raise ValueError(f"{what} is {strength}, but {wanted} was expected; correct it.")


def _changed(image: Image, function: Callable[[int, NDArray[np.float64]], NDArray[np.float64]]) -> Image:
    """Return the image with a function applied to each slice, rounded and cut off at 0 and 255."""
    result = np.empty_like(image)
    for z, grey in enumerate(image):  # by slices: no float64 copy of the volume
        result[z] = np.rint(function(z, grey.astype(np.float64))).clip(0, 255)
    return result


def _regridded(image: Image, plane: tuple[int, ...]) -> Image:
    """Return slices on another grid, as `mitoseg predict` brings them to the model's voxel size."""
    from mitoseg_lib.prediction import resample

    if image.shape[1:] == plane:
        return image.copy()
    return np.rint(resample(image, plane, cubic=True)).clip(0, 255).astype(np.uint8)


def _mask_regridded(mask: Mask, plane: tuple[int, ...]) -> Mask:
    """Return a mask on another grid: what is at least half covered is foreground."""
    from mitoseg_lib.prediction import resample

    return mask if mask.shape[1:] == plane else resample(mask, plane) >= 0.5
