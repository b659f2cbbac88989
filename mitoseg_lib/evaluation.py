"""Everything that `mitoseg evaluate` says of a predicted mask: of voxels, of objects, and of surfaces."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mitoseg_lib import instances as objects
from mitoseg_lib.errors import FilePath, StackError, StackWarning
from mitoseg_lib.masks import read_labels
from mitoseg_lib.metrics import scores
from mitoseg_lib.surfaces import boundary_iou, surface_distance
from mitoseg_lib.tiff import VoxelSize


@dataclass(frozen=True)
class Evaluation:
    """Scores of a predicted mask. A ratio of nothing to nothing is 1.

    Attributes
    ----------
    iou, dice, precision, recall
        Of voxels, pooled over the volume; see `mitoseg_lib.metrics.Scores`.
    boundary_iou_1, boundary_iou_2
        IoU of the voxels more than 1 or 2 voxels away from the truth's boundaries; see
        `mitoseg_lib.surfaces.boundary_iou`. Not the "Boundary IoU" of Cheng et al. (2021).
    object_precision, object_recall
        Of objects that match at an IoU above 0.5; see `mitoseg_lib.instances.match_objects`.
    surface_distance_nm
        Average symmetric surface distance, or None where a mask is empty or the voxel size unknown; see
        `mitoseg_lib.surfaces.surface_distance`.
    """

    iou: float
    dice: float
    precision: float
    recall: float
    boundary_iou_1: float
    boundary_iou_2: float
    object_precision: float
    object_recall: float
    surface_distance_nm: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return the scores by name, in this order."""
        return asdict(self)

    def as_table(self) -> str:
        """Return the scores as aligned lines, in words."""
        distance = self.surface_distance_nm
        rows = {
            "IoU": self.iou,
            "Dice": self.dice,
            "Precision": self.precision,
            "Recall": self.recall,
            "IoU more than 1 voxel from the truth's boundaries": self.boundary_iou_1,
            "IoU more than 2 voxels from the truth's boundaries": self.boundary_iou_2,
            "Precision of objects (IoU above 0.5)": self.object_precision,
            "Recall of objects (IoU above 0.5)": self.object_recall,
        }
        lines = [f"{words:52s}{value:7.4f}" for words, value in rows.items()]
        last = "unknown" if distance is None else f"{distance:7.1f} nm"
        return "\n".join([*lines, f"{'Average distance of the surfaces':52s}{last}"])


def evaluate(
    prediction: NDArray,
    truth: NDArray,
    *,
    voxel_size_nm: Sequence[float] | None = None,
    instances: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Score a predicted mask against the true one.

    Parameters
    ----------
    prediction, truth
        Masks, bool (z, y, x), of the same shape; with `instances` whole numbers of objects, 0 for background.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x), if they are known.
    instances
        Whether the arrays number objects. Without it the objects are what is connected in a mask.
    progress
        Whether to show a progress bar on stderr, where that is a terminal.

    Returns
    -------
    Evaluation
        A `StackWarning` says why a distance is missing.

    Raises
    ------
    ValueError
        If the arrays aren't of this kind, or differ in shape.
    """
    numbers = (prediction, truth) if instances else None
    masks = tuple(labels > 0 for labels in numbers) if instances else (prediction, truth)
    steps = tqdm(total=5, desc="Evaluating", leave=False, disable=None if progress else True)
    with steps:
        voxels = scores(*masks)
        steps.update()
        bands = []
        for width in (1, 2):
            bands.append(boundary_iou(*masks, width))
            steps.update()
        matches = objects.match_objects(*(numbers or map(objects.label_instances, masks)))
        steps.update()
        distance = _distance(*masks, voxel_size_nm)
        steps.update()
    ratios = (voxels.iou, voxels.dice, voxels.precision, voxels.recall)
    return Evaluation(*ratios, *bands, matches.precision, matches.recall, distance)


def evaluate_files(
    prediction: FilePath,
    truth: FilePath,
    *,
    voxel_size_nm: Sequence[float] | None = None,
    instances: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Score a predicted mask in a file against the true one in another.

    Parameters
    ----------
    prediction, truth
        Masks, or with `instances` numbers of objects, in a TIFF, a folder of slices or a Zarr; see
        `mitoseg_lib.masks.read_labels`.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x). Without it the truth's file counts, and then the prediction's, if it
        states them.
    instances, progress
        See `evaluate`.

    Returns
    -------
    Evaluation
        Each `StackWarning` says what was decided about the files, or why a distance is missing.

    Raises
    ------
    StackError
        If a file can't be read as a mask, or their shapes differ.
    """
    names = tuple(os.path.basename(os.path.normpath(os.fsdecode(path))) for path in (prediction, truth))
    (predicted, predicted_nm), (true, true_nm) = (
        read_labels(path, instances=instances) for path in (prediction, truth)
    )
    if predicted.shape != true.shape:
        raise StackError(
            f"{names[0]} has shape {predicted.shape}, but {names[1]} has {true.shape} and the same (z, y, x) was"
            " expected; give the prediction and the truth of the same slices."
        )
    if voxel_size_nm is None:
        voxel_size_nm = _stated_size(predicted_nm, true_nm, names)
    return evaluate(predicted, true, voxel_size_nm=voxel_size_nm, instances=instances, progress=progress)


def _stated_size(predicted: VoxelSize | None, true: VoxelSize | None, names: tuple[str, str]) -> VoxelSize | None:
    """Voxel size that the truth's file states, or else the prediction's; a warning if they contradict each other."""
    if predicted and true and not np.allclose(predicted, true, rtol=1e-3):
        sizes = [" x ".join(f"{edge:g}" for edge in size) for size in (predicted, true)]
        warnings.warn(
            f"{names[0]} states voxels of {sizes[0]} nm and {names[1]} of {sizes[1]} nm, of which the latter count;"
            " --voxel-size overrules both.",
            StackWarning,
            stacklevel=3,
        )
    return true or predicted


def _distance(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], voxel_size_nm: Sequence[float] | None
) -> float | None:
    """Surface distance in nm, or None with a warning that says why."""
    if voxel_size_nm is not None:
        distance = surface_distance(prediction, truth, voxel_size_nm)
        if distance is not None:
            return distance
        empty = [name for mask, name in ((prediction, "prediction"), (truth, "truth")) if not mask.any()]
        why = f"the {' and the '.join(empty)} {'has' if len(empty) == 1 else 'have'} no foreground"
    else:
        why = "the voxel size isn't known (give --voxel-size z,y,x in nm)"
    warnings.warn(f"There is no distance of the surfaces, because {why}.", StackWarning, stacklevel=3)
    return None
