"""Surfaces of objects in 3D, and a figure of them that turns under the mouse with a kernel and without one.

The figure is one piece of HTML with its own small script (``mesh_figure.js``), which draws with the browser's WebGL:
nothing is fetched, and the same output works in JupyterLab, in Colab and in the built book.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import block_reduce, marching_cubes

__all__ = ["Mesh", "MeshFigure", "make_meshes"]

# Okabe and Ito's palette without black and yellow, which a dark and a white page swallow.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
LIGHTNESS = ((0, 0), (255, 0.5), (0, 0.3))  # grey level and its share in the colours of each round of the palette

LARGEST_NUMBER = 10_000_000  # ndimage.find_objects makes a list of this length
SMOOTHING = np.array([1, 4, 6, 4, 1]) / 16  # a Gaussian of sigma 1 in a few bits, so that every CPU rounds it alike
MARGIN = 3  # voxels of background around an object: what the smoothing reaches, and one more
STEPS = 2**14  # positions are rounded to this part of the figure's longest side, finer than a screen's pixel

Voxel = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Mesh:
    """A closed surface made of triangles.

    Attributes
    ----------
    vertices : ndarray
        float32 (n, 3), (z, y, x) in µm from the volume's corner.
    faces : ndarray
        int32 (m, 3): numbers of vertices. ``cross(b - a, c - a)`` of the vertices a, b, c of a face, as the arrays
        are, points out of the object.
    name : str
        What the object is called, such as "mitochondrion 7".
    volume_um3 : float or None
        Volume of the object's voxels (not of the surface, which is smoothed); None where it is unknown.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    name: str
    volume_um3: float | None = None


class MeshFigure:
    """Surfaces in the volume's box, which a reader turns, zooms and clicks; show it as a cell's last expression.

    The output is the same for the same meshes, byte for byte. It takes about 8 bytes a face.

    Parameters
    ----------
    meshes : sequence of Mesh
        Each gets one of six colours; after six they return lighter, then darker.
    extent_um : tuple of float, optional
        Edges of the volume, (z, y, x) in µm, for the box; without it the box fits the surfaces.
    description : str
        What a reader who can't see the figure should know of it; the canvas has it as its label.

    Attributes
    ----------
    html : str
        The whole figure.

    Raises
    ------
    ValueError
        When there are no faces, the extent isn't three positive numbers, or the description is empty.
    """

    def __init__(self, meshes: Sequence[Mesh], *, extent_um: Voxel | None = None, description: str) -> None:
        self._n, self._n_faces = len(meshes), sum(len(mesh.faces) for mesh in meshes)
        if not self._n_faces:
            raise ValueError(
                f"There are {self._n} meshes with 0 faces, but a face or more was expected; make them with make_meshes."
            )
        if extent_um is not None:
            _check_three("extent_um", extent_um, "(1, 5, 5)")
        if not description.strip():
            raise ValueError("The description is empty, but a sentence on what is shown was expected; write one.")
        data = json.dumps(_encode(meshes, extent_um)).replace("<", "\\u003c")
        self.html = _page(data, description)

    def _repr_html_(self) -> str:
        """Return the figure for notebooks."""
        return self.html

    def __repr__(self) -> str:
        """Return a line without memory addresses, since outputs are compared."""
        return f"MeshFigure({self._n} objects, {self._n_faces} faces)"


def make_meshes(
    labels: NDArray[np.integer],
    voxel_size_nm: Voxel,
    *,
    numbers: Sequence[int] | None = None,
    max_faces: int = 150_000,
) -> list[Mesh]:
    """Make a surface for each object of a label image.

    Voxels are joined into blocks, the same for all objects and as nearly cubic as whole numbers allow, until the
    surfaces have few enough faces. Each object's mask is smoothed by a Gaussian of sigma 1 block; its surface is where
    the smoothed mask has that value above which there are as many blocks as the object had (marching cubes), so that
    it doesn't shrink. Parts thinner than a block or two can get lost. The volume's border closes what it cuts.

    Parameters
    ----------
    labels : ndarray
        Whole numbers (z, y, x): 0 for background, as `mitoseg_lib.instances.label_instances` gives them.
    voxel_size_nm : tuple of float
        (z, y, x).
    numbers : sequence of int, optional
        Which objects, in this order; all of them if it isn't given.
    max_faces : int
        The most faces that all surfaces together may have.

    Returns
    -------
    list of Mesh
        Named "mitochondrion" and the object's number.

    Raises
    ------
    ValueError
        When the labels aren't such an image, the voxel size isn't three positive numbers, a number is no object's,
        there is nothing to draw, or `max_faces` is too few for so many objects.
    """
    _check_labels(labels)
    _check_three("voxel_size_nm", voxel_size_nm, "(5, 5, 5)")
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}
    numbers = list(boxes) if numbers is None else list(numbers)
    for number in numbers:
        if number not in boxes:
            raise ValueError(f"There is no object {number} in the labels; choose numbers of np.unique(labels) above 0.")
    if not numbers:
        raise ValueError("There are 0 objects to draw, but one or more were expected; choose other labels or numbers.")
    for factors in _factors(labels, {number: boxes[number] for number in numbers}, voxel_size_nm, max_faces):
        meshes, n_faces = [], 0
        for number in numbers:
            meshes.append(_mesh(labels, number, boxes[number], factors, voxel_size_nm))
            n_faces += len(meshes[-1].faces)
            if n_faces > max_faces:
                break
        else:
            return meshes
    raise ValueError(
        f"The {len(numbers)} objects can't be drawn with {max_faces} faces, however coarse they are; "
        "allow more max_faces, or choose fewer numbers."
    )


def _factors(
    labels: NDArray[np.integer], boxes: dict[int, tuple[slice, ...]], size_nm: Voxel, max_faces: int
) -> Iterator[tuple[int, ...]]:
    """Yield how many voxels a block has along each axis, ever more, from where about `max_faces` faces suffice.

    Marching cubes has a vertex wherever an edge of its grid crosses the surface, thus for each face of a voxel that
    is exposed, and a closed surface has two triangles for each vertex.
    """
    exposed = np.zeros(3)
    for number, box in boxes.items():
        mask = np.pad(labels[box] == number, 1)
        exposed += [np.count_nonzero(np.diff(mask, axis=axis)) for axis in range(3)]
    edges = np.arange(1, math.ceil(max(np.multiply(labels.shape, size_nm)) / min(size_nm)) + 1) * min(size_nm)
    tried = None
    for edge in edges:
        factors = tuple(max(1, math.floor(edge / nm + 1e-9)) for nm in size_nm)
        if factors != tried and 2 * np.sum(exposed * factors) / math.prod(factors) <= max_faces:
            yield factors
        tried = factors


def _mesh(
    labels: NDArray[np.integer], number: int, box: tuple[slice, ...], factors: tuple[int, ...], size_nm: Voxel
) -> Mesh:
    """Return one object's surface, made from means over blocks."""
    mask = labels[box] == number
    start = [along.start for along in box]
    to_grid = [(first % factor, 0) for first, factor in zip(start, factors, strict=True)]
    means = np.pad(block_reduce(np.pad(mask, to_grid), factors, np.mean), MARGIN)
    for axis in range(3):
        means = ndimage.convolve1d(means, SMOOTHING, axis=axis, mode="constant")
    inside = max(1, round(means.sum()))
    around = np.partition(means.ravel(), [-inside - 1, -inside])[[-inside - 1, -inside]]
    # A little below their mean, which may be the value of a block: faces would have no area there.
    vertices, faces, _, _ = marching_cubes(means, 0.999 * around.mean())
    blocks = vertices.astype(np.float64) + 0.5 - MARGIN + np.floor_divide(start, factors)
    volume = np.count_nonzero(mask) * math.prod(size_nm) / 1e9
    return Mesh(
        (blocks * factors * size_nm / 1000).astype(np.float32),
        np.ascontiguousarray(faces[:, ::-1]),  # scikit-image's faces point inwards where axes are (z, y, x)
        f"mitochondrion {number}",
        volume,
    )


def _encode(meshes: Sequence[Mesh], extent_um: Voxel | None) -> dict[str, object]:
    """Return what the script draws, with axes in its order (x, y, z)."""
    points = np.concatenate([mesh.vertices for mesh in meshes]).astype(np.float64)
    corner = points.min(axis=0) if extent_um is None else np.zeros(3)
    edges = points.max(axis=0) - corner if extent_um is None else np.asarray(extent_um, np.float64)
    low = np.minimum(points.min(axis=0), corner)
    step = max(np.maximum(points.max(axis=0), corner + edges) - low) / STEPS
    positions, corners, n = [], [], 0
    for mesh in meshes:
        # Vertices in the order in which faces first use them, so that their numbers are near one another.
        used, first, places = np.unique(mesh.faces[:, ::-1], return_index=True, return_inverse=True)
        order = np.argsort(first)
        positions.append(np.rint((mesh.vertices[used[order]] - low) / step).astype(np.int64)[:, ::-1])
        corners.append(np.argsort(order)[places.ravel()] + n)
        n += len(used)
    moves = np.diff(np.concatenate(positions), axis=0, prepend=0).ravel()
    numbers = np.concatenate(corners)
    seen = np.maximum.accumulate(np.concatenate([[-1], numbers[:-1]])) + 1  # how many vertices came before
    return {
        "names": [
            mesh.name if mesh.volume_um3 is None else f"{mesh.name}, {mesh.volume_um3:.3g} µm³" for mesh in meshes
        ],
        "colours": [_colour(i) for i in range(len(meshes))],
        "faces": [len(mesh.faces) for mesh in meshes],
        "positions": _numbers(np.where(moves < 0, -2 * moves - 1, 2 * moves)),
        "corners": _numbers(seen - numbers),
        "step": float(f"{step:.9g}"),
        "centre": [float(f"{um:.9g}") for um in (corner + edges / 2 - low)[::-1]],
        "edges": [float(f"{um:.9g}") for um in edges[::-1]],
        "lengths": [f"{axis} {um:.3g} µm" for axis, um in zip("xyz", edges[::-1], strict=True)],
    }


def _numbers(values: NDArray[np.int64]) -> str:
    """Return whole numbers from 0 as base64, in as many bytes each as it needs: 7 bits a byte, the lowest first."""
    parts = values[:, None] >> np.arange(0, 35, 7)
    more = parts > 127
    needed = np.pad(more[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return base64.b64encode((parts & 127 | more << 7)[needed].astype(np.uint8).tobytes()).decode()


def _colour(i: int) -> list[int]:
    """Return (red, green, blue), 0 to 255, of the object with this place."""
    grey, share = LIGHTNESS[i // len(COLOURS) % len(LIGHTNESS)]
    colour = bytes.fromhex(COLOURS[i % len(COLOURS)][1:])
    return [round((1 - share) * part + share * grey) for part in colour]


def _page(data: str, description: str) -> str:
    """Return the figure's HTML; without a script or WebGL only one sentence of it is seen."""
    key = hashlib.sha256(f"{data}{description}".encode()).hexdigest()[:12]
    script = resources.files("mitoseg_lib").joinpath("mesh_figure.js").read_text(encoding="utf-8")
    label = html.escape(description)
    return f"""<div class="mesh-figure" data-mesh-figure="{key}">
<style>
.mesh-figure canvas {{ display: block; width: 100%; aspect-ratio: 4 / 3; touch-action: none; cursor: grab }}
.mesh-figure canvas:focus {{ outline: 2px solid #888; outline-offset: -2px }}
.mesh-figure span {{ position: absolute; white-space: nowrap; font-size: 0.85em; pointer-events: none }}
</style>
<p>This figure in 3D is drawn by a script with WebGL, which does not run here. It shows: {label}</p>
<div hidden>
<div style="position: relative; overflow: hidden; width: 640px; max-width: 100%">
<canvas width="640" height="480" tabindex="0" role="img" aria-label="{label}" data-lm-suppress-shortcuts></canvas>
</div>
<div style="max-width: 640px; font-size: 0.85em">Turn: drag, or arrow keys. Zoom: Ctrl and wheel, or + and −.
Name an object: click it, or Enter for the next. Back: double click, or Home.</div>
<div aria-live="polite" style="min-height: 1.6em"></div>
</div>
<script>(() => {{
{script}
startMeshFigures("{key}", {data});
}})();</script>
</div>"""


def _check_labels(labels: NDArray[np.integer]) -> None:
    """Raise a ValueError unless this is an image of objects' numbers."""
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 3 or labels.size == 0:
        found = f"{labels.dtype} of shape {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(
            f"The labels are {found}, but whole numbers (z, y, x) with at least one voxel were expected; "
            "number a mask's objects with label_instances."
        )
    if labels.min() < 0 or labels.max() > LARGEST_NUMBER:
        raise ValueError(
            f"The labels have numbers from {labels.min()} to {labels.max()}, but 0 to {LARGEST_NUMBER} were expected; "
            "number them anew, for example with skimage.segmentation.relabel_sequential."
        )


def _check_three(name: str, values: Sequence[float], example: str) -> None:
    """Raise a ValueError unless these are three positive numbers."""
    if len(values) != 3 or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(
            f"{name} is {values}, but three positive numbers (z, y, x) were expected; pass for example {example}."
        )
