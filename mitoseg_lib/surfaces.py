"""What two masks differ in at their boundaries: an IoU without the voxels near them, and a distance in nm.

Masks are bool (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mitoseg_lib.metrics import Scores, scores


def boundary_iou(prediction: NDArray[np.bool_], truth: NDArray[np.bool_], width: int) -> float:
    """Return the IoU of the voxels farther than a few voxels from the boundaries of the truth.

    People who outline the same organelle disagree by a voxel or two. The share of errors that lie in such a
    band, on both sides of the truth's boundary, may be label noise; this is the IoU of the rest. It is *not* the
    "Boundary IoU" of Cheng et al. (CVPR 2021), which counts only what lies near boundaries.

    `boundary_band` says which voxels are left out. Counts are pooled over all slices; nothing divided by nothing is
    1, as in `mitoseg_lib.metrics`.

    Parameters
    ----------
    prediction, truth
        Masks, bool (z, y, x), of the same shape.
    width
        Width of the band in voxels to each side of a boundary; with 0 nothing is left out.

    Raises
    ------
    ValueError
        If these aren't masks of the same shape, or the width is below 0.
    """
    _require_masks(prediction, truth)
    _require_width(width)
    pooled = Scores(0, 0, 0, 0)
    for predicted, true in zip(prediction, truth, strict=True):
        kept = ~_band_of_slice(true, width)
        pooled += scores(predicted[kept], true[kept])
    return pooled.iou


def boundary_band(truth: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Return the voxels near a mask's boundaries, on both sides: what `boundary_iou` leaves out.

    Labels are drawn slice by slice, so distances are measured inside each slice: a voxel is in the band if its slice
    has a voxel of the other class at most `width` rows and at most `width` columns away (Chebyshev distance).
    The edge of the image is no boundary.

    Parameters
    ----------
    truth
        Mask, bool (z, y, x).
    width
        Width of the band in voxels to each side of a boundary; with 0 it is empty.

    Returns
    -------
    numpy.ndarray
        bool (z, y, x).

    Raises
    ------
    ValueError
        If this isn't a mask, or the width is below 0.
    """
    _require_mask(truth, "truth")
    _require_width(width)
    band = np.empty_like(truth)
    for target, true in zip(band, truth, strict=True):
        target[...] = _band_of_slice(true, width)
    return band


def surface_distance(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], voxel_size_nm: Sequence[float]
) -> float | None:
    """Return the average symmetric surface distance in nm.

    A mask's surface is its voxels with a face on the background; outside the volume is background. Each voxel of
    either surface is as far from the other surface as their nearest voxels' centres are, and the mean is over
    the voxels of both surfaces together (Heimann et al. 2009, IEEE TMI 28:1251, section III-C; MONAI's
    ``compute_average_surface_distance(symmetric=True)`` is the same). It is exact, and takes memory for the
    surfaces only.

    Parameters
    ----------
    prediction, truth
        Masks, bool (z, y, x), of the same shape.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x).

    Returns
    -------
    float or None
        None where one of the masks is empty, since there is no distance to nothing.

    Raises
    ------
    ValueError
        If these aren't masks of the same shape, or three lengths above 0.
    """
    _require_masks(prediction, truth)
    scale = np.asarray(voxel_size_nm, np.float64)
    if scale.shape != (3,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"The voxel size is {voxel_size_nm}, but three lengths in nm were expected; give (z, y, x).")
    surfaces = _surface(prediction), _surface(truth)
    numbers = [int(np.count_nonzero(surface)) for surface in surfaces]
    if not all(numbers):
        return None
    total = _sum_of_distances(*surfaces, scale) + _sum_of_distances(*surfaces[::-1], scale)
    return total / sum(numbers)


def _require_masks(prediction: NDArray, truth: NDArray) -> None:
    """Raise ValueError unless both are bool (z, y, x) of the same shape."""
    for mask, name in ((prediction, "prediction"), (truth, "truth")):
        _require_mask(mask, name)
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape} and the truth {truth.shape}, but they must be equal; compare"
            " the same slices."
        )


def _require_mask(mask: NDArray, name: str) -> None:
    """Raise ValueError unless this is bool (z, y, x)."""
    if mask.dtype != np.bool_ or mask.ndim != 3:
        raise ValueError(
            f"The {name} is {mask.dtype} with {mask.ndim} axes, but a mask, bool (z, y, x), was expected; make it"
            f" one first, for example with {name} > 0."
        )


def _require_width(width: int) -> None:
    """Raise ValueError unless a band can have this width."""
    if width < 0:
        raise ValueError(f"The width of the band is {width}, but 0 or more voxels were expected; leave out the sign.")


def _band_of_slice(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Pixels of a slice that are near both classes; every pixel is near its own."""
    return _grown(mask, width) & _grown(~mask, width)


def _grown(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Mask of what is at most `width` rows and columns away from a slice's mask."""
    for axis in (0, 1):
        grown = mask.copy()
        source, target = np.moveaxis(mask, axis, 0), np.moveaxis(grown, axis, 0)
        for shift in range(1, min(width, len(source) - 1) + 1):
            target[shift:] |= source[:-shift]
            target[:-shift] |= source[shift:]
        mask = grown
    return mask


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels of a mask that have a face on the background, which goes on outside the volume."""
    inside = np.zeros_like(mask)
    core = tuple(slice(1, -1) for _ in mask.shape)
    inside[core] = mask[core]
    for axis in range(3):
        source, target = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        target[1:] &= source[:-1]
        target[:-1] &= source[1:]
    return np.greater(mask, inside, out=inside)


def _sum_of_distances(surface: NDArray[np.bool_], other: NDArray[np.bool_], scale: NDArray[np.float64]) -> float:
    """Sum over a surface's voxels of the distance to the nearest voxel of another's.

    The nearest voxel of a slice is the one nearest in its plane, so a distance transform of each slice in turn
    gives all that is needed of it, in a time that hardly depends on the masks. A tree of the voxels needs as
    little memory and is faster where the surfaces are close, but several times slower where they are far apart,
    since then thousands of voxels are about equally near.
    """
    apart = [np.flatnonzero(part) for part in surface & ~other]  # what lies on both is at distance 0
    z, place = np.repeat(np.arange(len(apart)), [len(part) for part in apart]), np.concatenate(apart)
    nearest = np.full(len(place), np.inf)
    for number, part in enumerate(other):
        if part.any() and len(place):
            squared = _squared_distances(part, scale[1:]).ravel()[place] + (scale[0] * (z - number)) ** 2
            np.minimum(nearest, squared, out=nearest)
    return float(np.sqrt(nearest).sum())


def _squared_distances(mask: NDArray[np.bool_], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square of the distance of each pixel of a slice to the nearest one of a mask."""
    nearest = ndimage.distance_transform_edt(~mask, sampling=scale, return_distances=False, return_indices=True)
    rows, columns = (nearest - np.indices(mask.shape, sparse=True)[axis] for axis, nearest in enumerate(nearest))
    return (rows * scale[0]) ** 2 + (columns * scale[1]) ** 2
