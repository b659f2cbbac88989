"""Figures of what a measurement found, beyond the slices and curves of `mitoseg_lib.viewer`.

Functions return the figure and leave showing it to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mitoseg_lib.calibration import Reliability
from mitoseg_lib.error_kinds import KINDS, ErrorsByKind
from mitoseg_lib.viewer import CURVE_COLOURS, FIGURE_DPI, Voxel, show_slices

if TYPE_CHECKING:
    from mitoseg_lib.volumes import Step

__all__ = ["KIND_COLOURS", "draw_errors", "draw_reliability", "draw_steps"]

# Those of Okabe and Ito's colours, with white, that differ most from each other and from grey tissue for all kinds of
# colour vision, computed for them laid over grey (its green, say, looks like the tissue to one man in twenty).
KIND_COLOURS = {
    "missed": "#D55E00",  # vermilion
    "invented": "#56B4E9",  # sky blue
    "merged": "#F0E442",  # yellow
    "split": "#000000",
    "boundary": "#FFFFFF",
    "region": "#0072B2",  # blue
}
LINE = "#A0A0A0"
STEP_COLOURS = (*CURVE_COLOURS[5::-1], "#000000", LINE)
OPACITY = 0.8  # so that a little of the tissue shows through
# Blue and vermilion first, which differ most; the marker tells curves apart that lie on each other.
RELIABILITY_LOOKS = tuple(zip(CURVE_COLOURS[5::-1], "osD^vP", strict=True))


def draw_errors(
    image: NDArray[np.uint8], errors: ErrorsByKind, *, z: int, voxel_size_nm: Voxel | None = None
) -> Figure:
    """Show a slice with its wrong voxels coloured by the kind of mistake that they belong to.

    Parameters
    ----------
    image : ndarray
        uint8, (z, y, x).
    errors : ErrorsByKind
        Of the same voxels.
    z : int
        The slice.
    voxel_size_nm : tuple of float, optional
        (z, y, x), for the scale bar; without it the picture says that its scale is unknown.

    Returns
    -------
    Figure
        With a legend of all kinds, and how many wrong voxels of each the slice has.

    Raises
    ------
    ValueError
        When the image isn't a uint8 volume of the errors' shape, there is no such slice, or the voxel size isn't three
        positive numbers.
    """
    if image.dtype != np.uint8 or image.shape != errors.kind.shape:
        raise ValueError(
            f"The image is {image.dtype} of shape {image.shape}, but uint8 of the errors' shape {errors.kind.shape} "
            "was expected; pass the slices that were compared."
        )
    if not 0 <= z < len(image):
        raise ValueError(f"z is {z}, but the volume has slices 0 to {len(image) - 1}; choose one of them.")
    picture, kind = np.repeat(image[z][..., None] / 255, 3, axis=2), errors.kind[z]
    names, handles = [], []
    for code, name in enumerate(KINDS, start=1):
        here, colour = kind == code, np.array(to_rgb(KIND_COLOURS[name]))
        picture[here] = (1 - OPACITY) * picture[here] + OPACITY * colour
        handles.append(Rectangle((0, 0), 1, 1, facecolor=KIND_COLOURS[name], edgecolor="black", linewidth=0.8))
        names.append(f"{name} ({np.count_nonzero(here):,})")
    fig = show_slices([picture], voxel_size_nm=voxel_size_nm)
    height, width = image.shape[1:]
    fig.set_size_inches(8, 8 * height / width)  # rims are a few voxels wide: as large as a page allows
    fig.tight_layout(pad=0.2)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.01), "ncols": 3, "frameon": False}
    fig.legend(handles, names, title=f"wrong voxels of slice {z}, by kind of mistake", **place)
    return fig


def draw_reliability(found: Reliability | Mapping[str, Reliability]) -> Figure:
    """Draw how often voxels are foreground against the probability that they were given.

    A curve on the diagonal means what it says; below it the probabilities are too high, above it too low. The panel
    below says how many voxels each bin holds, in powers of ten, since nearly all lie in the first and the last one.

    Parameters
    ----------
    found : Reliability, or dict of it
        Of one prediction, or of up to six by name.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        When there is nothing to draw, or more curves than colours.
    """
    curves = found if isinstance(found, Mapping) else {"": found}
    if not 1 <= len(curves) <= len(RELIABILITY_LOOKS):
        raise ValueError(
            f"There are {len(curves)} predictions, but 1 to {len(RELIABILITY_LOOKS)} were expected; draw them in "
            "several figures."
        )
    fig, (top, bottom) = plt.subplots(
        2, 1, figsize=(4.8, 6.4), height_ratios=[3, 1], sharex=True, layout="constrained", dpi=FIGURE_DPI
    )
    top.plot([0, 1], [0, 1], ":", color="black", label="means what it says")
    for (name, reliability), (colour, marker) in zip(curves.items(), RELIABILITY_LOOKS, strict=False):
        error = f"expected calibration error {reliability.expected_calibration_error:.4f}"
        label = f"{name}: {error}" if name else error
        top.plot(reliability.predicted, reliability.observed, f"-{marker}", color=colour, label=label)
        bottom.stairs(reliability.voxels, reliability.edges, color=colour, linewidth=1.5)
    top.set(ylabel="share of foreground", xlim=(0, 1), ylim=(-0.02, 1.02))
    bottom.set(xlabel="probability", ylabel="voxels", yscale="log")
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
    fig.legend(*top.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    return fig


def draw_steps(steps: Sequence[Step]) -> Figure:
    """Draw the steps of a volume as a graph: each a dot, with lines from the steps that it needs; time goes right.

    Parameters
    ----------
    steps
        See `mitoseg_lib.volumes.steps_of`.

    Returns
    -------
    Figure
    """
    column: dict[str, int] = {}
    for step in steps:  # each comes after those that it needs
        column[step.name] = 1 + max((column[name] for name in step.needs), default=-1)
    rows = {
        name: place - (len(names) - 1) / 2
        for names in ([n for n, c in column.items() if c == number] for number in range(max(column.values()) + 1))
        for place, name in enumerate(names)
    }
    fig, ax = plt.subplots(figsize=(7.5, 3), layout="constrained")
    for step in steps:
        for name in step.needs:
            ax.plot([column[name], column[step.name]], [rows[name], rows[step.name]], color=LINE, lw=0.6, zorder=1)
    kinds = list(dict.fromkeys(step.name.split("-")[0] for step in steps))
    for kind, colour in zip(kinds, STEP_COLOURS, strict=False):
        names = [name for name in column if name.split("-")[0] == kind]
        ax.scatter([column[n] for n in names], [rows[n] for n in names], s=70, color=colour, label=kind, zorder=2)
    ax.invert_yaxis()
    ax.set_axis_off()
    fig.legend(loc="outside lower center", ncols=len(kinds), frameon=False, columnspacing=1, handletextpad=0.2)
    return fig
