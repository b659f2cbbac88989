"""What single objects are like: their surface, how round, long and branched they are, and where two of them touch.

Masks are bool (z, y, x), voxel sizes are in nm and may be anisotropic; outside the array is background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.optimize import brentq
from scipy.sparse import csgraph
from scipy.spatial import ConvexHull, SphericalVoronoi
from scipy.spatial.distance import cdist

__all__ = [
    "CROFTON_DIRECTIONS",
    "Axis",
    "capsule_diameter",
    "crofton_weights",
    "find_axis",
    "sphericity",
    "split_touching",
    "surface_area",
]

Mask = NDArray[np.bool_]
Lengths = NDArray[np.float64]
Numbers = NDArray[np.integer]

CROFTON_DIRECTIONS = np.array([step for step in np.ndindex(3, 3, 3) if step > (1, 1, 1)]) - 1
CORNERS = np.ones((3, 3, 3), bool)  # what touches by a corner is connected, as in mitoseg_lib.instances

MOST_VOXELS = 30_000  # of a graph, whose shortest paths then take some 20 ms
COVERED = 1.5  # how many radii around it a path stands for
ROUGH = 4  # what sticks out by fewer voxels is roughness
SMOOTH = 0.4  # standard deviation of the filter along a path over its radius: more cuts corners, less leaves steps


@dataclass(frozen=True, eq=False)
class Axis:
    """The line in the middle of an object, from one end to the other.

    Attributes
    ----------
    length_nm
        Length along the axis, from surface to surface.
    branches
        How many side branches there are off the axis; 0 for an unbranched object.
    total_length_nm
        Length of the axis and of all branches, each from the axis to the middle of its last voxel.
    path
        Points of the axis, float64 (point, 3): (z, y, x) in nm from the corner of the array, half a voxel before the
        middle of voxel (0, 0, 0).
    """

    length_nm: float
    branches: int
    total_length_nm: float
    path: Lengths


@dataclass(frozen=True, eq=False)
class _Voxels:
    """Middles of what an object has in each voxel, distances to the boundary, a voxel's edges, steps to neighbours."""

    points: Lengths
    radius: Lengths
    edges: Lengths
    graph: sparse.csr_array


def crofton_weights(voxel_size_nm: Sequence[float]) -> Lengths:
    """Return what each crossing of an object's boundary by a line of voxels adds to the surface area.

    The area is the sum over `CROFTON_DIRECTIONS` of weight times crossings, entries and exits. Crofton's formula: a
    surface is twice the mean over all directions of what it shows to a direction. Lines through the voxels show that
    as crossings, each for the area that one line has to itself, a voxel's volume over the length of a step. A direction
    stands for its Voronoi cell on the sphere (Legland, Kieu, Devaux 2007, Image Anal Stereol 26:83-92).

    A ball's area is right with any voxels. That of a plane depends on its direction: it is 93 to 102 % of the true one
    with cubic voxels, 87 to 109 % with (8, 4, 4) and 81 to 110 % with (30, 8, 8).

    Parameters
    ----------
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x).

    Returns
    -------
    numpy.ndarray
        Weights in nm², float64 (13,).

    Raises
    ------
    ValueError
        If these aren't three lengths above 0.
    """
    size = _require_size(voxel_size_nm)
    share = SphericalVoronoi(_sphere(size)).calculate_areas().reshape(2, 13).sum(axis=0) / (4 * np.pi)
    return 2 * share * size.prod() / np.linalg.norm(CROFTON_DIRECTIONS * size, axis=1)


def surface_area(mask: Mask, voxel_size_nm: Sequence[float]) -> float:
    """Return the surface area of a mask in nm², as `crofton_weights` explains; 0 where it is empty.

    Parameters
    ----------
    mask
        bool (z, y, x). What is thinner than some three voxels gets too small an area, a single voxel half of it.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x).

    Raises
    ------
    ValueError
        If this isn't a mask, or these aren't three lengths above 0.
    """
    _require_mask(mask)
    voxels = np.count_nonzero(mask)
    exits = [voxels - _pairs(mask, step) for step in CROFTON_DIRECTIONS]
    return float(crofton_weights(voxel_size_nm) @ exits * 2)  # a line enters as often as it leaves


def sphericity(volume: float, area: float) -> float:
    """Return the surface of the ball of this volume over this area: π^(1/3) (6 V)^(2/3) / A (Wadell 1935, J Geol 43).

    It is 1 for a ball and less for anything else, but for errors of a measured area.

    Parameters
    ----------
    volume, area
        In nm³ and nm².

    Raises
    ------
    ValueError
        If one isn't above 0.
    """
    _require_above_0(volume, "volume")
    _require_above_0(area, "area")
    return float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area)


def capsule_diameter(volume: float, length: float) -> float:
    """Return the diameter in nm of the capsule, a cylinder with half balls as ends, of this volume and length.

    V = π r² L - 2/3 π r³ with 2 r <= L. More than the ball of diameter L holds is taken as a ball of this volume.

    Parameters
    ----------
    volume, length
        In nm³ and nm; the length is from end to end.

    Raises
    ------
    ValueError
        If one isn't above 0.
    """
    _require_above_0(volume, "volume")
    _require_above_0(length, "length")
    share = volume / (np.pi * length**3)
    if share >= 1 / 6:
        return float(np.cbrt(6 / np.pi * volume))
    return float(2 * length * brentq(lambda r: r**2 - 2 / 3 * r**3 - share, 0, 0.5, xtol=1e-15))


def find_axis(mask: Mask, voxel_size_nm: Sequence[float]) -> Axis:
    """Find the axis of an object, its length and the number of its branches.

    TEASAR (Sato et al. 2000, Pacific Graphics, doi:10.1109/PCCGA.2000.883951) in the graph of neighbouring voxels: a
    path between the two that are farthest apart, where a step costs 1 / radius^4 (of the ball that fits in there) so
    that it runs in the middle; what is within 1.5 radii and a voxel of it is covered; then one from the farthest voxel
    of each part that isn't, to the paths before. A part gets one only if it sticks out of what is covered by four
    voxels and by its own width: that is by some 1.3 diameters of a tube out of its side. The longest chain of paths is
    the axis; it is smoothed, since steps on a grid make a slanted line too long, and drawn on to the surface. A ring is
    cut open, and is unbranched.

    An object of more than 30,000 voxels is made coarser first, so that any takes less than about a second; what is
    thinner than a thirtieth of a round object's diameter is lost then.

    Parameters
    ----------
    mask
        One object, bool (z, y, x), connected by faces, edges or corners.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x).

    Returns
    -------
    Axis
        The same for the same mask, bit for bit.

    Raises
    ------
    ValueError
        If this isn't a mask, it is empty or not connected, or these aren't three lengths above 0.
    """
    _require_mask(mask)
    size = _require_size(voxel_size_nm)
    number = ndimage.label(mask, CORNERS)[1]
    if number != 1:
        raise ValueError(f"The mask has {number} objects, but one was expected; give each object on its own.")
    unit, places = size.min(), np.argwhere(mask)  # lengths are in the smallest edge, so that scale changes nothing
    voxels = _coarsened(places - places.min(axis=0), size / unit)
    tree = _tree(voxels, _paths(voxels))
    ends = np.flatnonzero(np.bincount(np.concatenate(tree.nonzero())) == 1)
    chain, chain_length = _longest(tree, ends)
    path = _smoothed(voxels, chain) + places.min(axis=0) * size / unit
    for _ in range(2):
        path = _to_surface(path, mask, size / unit, voxels.edges.max())[::-1]
    length, branches = _length(path), int(np.count_nonzero(_beyond(voxels, chain)[ends] > 0))
    total = length + tree.sum() - chain_length if branches else length
    return Axis(float(length * unit), branches, float(total * unit), path * unit)


def split_touching(mask: Mask, voxel_size_nm: Sequence[float], *, neck: float = 0.7) -> NDArray[np.int32]:
    """Split what hangs together only by necks.

    Each part has a maximum of the distance to the boundary, the radius, from which any way to a higher one passes a
    radius below `neck` times its own: a maximum of the log with a height of -log(neck) (h-maxima, Soille 2003,
    Morphological Image Analysis, section 6.3). A watershed of the radius shares out all voxels among them.
    It takes some 70 bytes for each voxel of the box around the mask, so give one object at a time.

    Parameters
    ----------
    mask
        bool (z, y, x).
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x).
    neck
        Radius of the widest neck over that of the thinner of its two parts, between 0 and 1.

    Returns
    -------
    numpy.ndarray
        int32 (z, y, x): 0 outside the mask, and 1, 2, ... for the parts in the order of their first voxels.

    Raises
    ------
    ValueError
        If this isn't a mask, these aren't three lengths above 0, or the neck isn't between 0 and 1.
    """
    from skimage.morphology import local_maxima, reconstruction
    from skimage.segmentation import watershed

    _require_mask(mask)
    size = _require_size(voxel_size_nm)
    if not 0 < neck < 1:
        raise ValueError(f"The neck is {neck}, but a share between 0 and 1 was expected; 0.7 is usual.")
    labels = np.zeros(mask.shape, np.int32)
    for box in ndimage.find_objects(mask.view(np.uint8)):  # one box around all, or none
        radius = _to_boundary(mask[box], size / size.min())
        height = np.log(np.where(mask[box], radius, neck / 2))  # outside below all that a maximum is lowered to
        peaks = local_maxima(reconstruction(height + np.log(neck), height, footprint=CORNERS), connectivity=3)
        markers = ndimage.label(peaks & mask[box], CORNERS)[0]
        labels[box] = watershed(-radius, markers, CORNERS, mask=mask[box])
    _, first, part = np.unique(labels[mask], return_index=True, return_inverse=True)
    labels[mask] = np.argsort(np.argsort(first))[part] + 1
    return labels


def _require_size(voxel_size_nm: Sequence[float]) -> Lengths:
    """Return the edges of a voxel as an array; raise ValueError unless they are three lengths."""
    size = np.asarray(voxel_size_nm, np.float64)
    if size.shape != (3,) or not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"The voxel size is {voxel_size_nm}, but three lengths in nm were expected; give (z, y, x).")
    return size


def _require_mask(mask: NDArray) -> None:
    """Raise ValueError unless this is bool (z, y, x)."""
    if mask.dtype != np.bool_ or mask.ndim != 3:
        raise ValueError(
            f"The mask is {mask.dtype} with {mask.ndim} axes, but bool (z, y, x) was expected; make it one first, for"
            " example with labels == 1."
        )


def _require_above_0(value: float, name: str) -> None:
    """Raise ValueError unless an object can have such a volume, area or length."""
    if not 0 < value < np.inf:
        raise ValueError(
            f"The {name} is {value}, but a number above 0 was expected; measure an object that isn't empty."
        )


def _sphere(edges: Lengths) -> Lengths:
    """Points of the unit sphere in the directions of the 26 neighbours."""
    steps = np.concatenate([CROFTON_DIRECTIONS, -CROFTON_DIRECTIONS]) * edges
    return steps / np.linalg.norm(steps, axis=1, keepdims=True)


def _pairs(mask: Mask, step: Numbers) -> int:
    """How many voxels of a mask have another one a step further on."""
    here, there = (
        tuple(slice(max(0, by), size + min(0, by)) for by, size in zip(way, mask.shape, strict=True))
        for way in (-step, step)
    )
    return int(np.count_nonzero(mask[here] & mask[there]))


def _to_boundary(mask: Mask, edges: Lengths) -> Lengths:
    """Distance of each voxel to the nearest outside, which goes on around the array."""
    return ndimage.distance_transform_edt(np.pad(mask, 1), sampling=edges)[1:-1, 1:-1, 1:-1]


def _coarsened(places: Numbers, edges: Lengths) -> _Voxels:
    """Voxels of an object, fused by whole factors until they are few enough, along finer axes first."""
    factors = np.ones(3, np.int64)
    while (mask := _fused(places, factors)) is None:
        factors[np.argmin(factors * edges)] += 1
    block = np.ravel_multi_index((places // factors).T, mask.shape)
    sums = [np.bincount(block, axis, mask.size) for axis in (*(places.T + 0.5), None)]
    points = np.stack([total[mask.ravel()] for total in sums[:3]], axis=1) / sums[3][mask.ravel(), None] * edges
    edges = edges * factors
    return _Voxels(points, _to_boundary(mask, edges)[mask], edges, _graph(mask, edges))


def _fused(places: Numbers, factors: Numbers) -> Mask | None:
    """Blocks of which half is the object's, or less where it would fall apart; None where they are too many."""
    if len(places) > MOST_VOXELS * factors.prod():
        return None
    shape = places.max(axis=0) // factors + 1
    filled = np.bincount(np.ravel_multi_index((places // factors).T, shape), minlength=shape.prod()).reshape(shape)
    for share in (0.5, 0.25, 0.125, 0):
        mask = filled >= max(1, share * factors.prod())
        if ndimage.label(mask, CORNERS)[1] == 1:
            break
    return mask if np.count_nonzero(mask) <= MOST_VOXELS else None


def _graph(mask: Mask, edges: Lengths) -> sparse.csr_array:
    """Length of the step from each voxel to each of its neighbours."""
    number = np.full(np.add(mask.shape, 2), -1)
    places = np.argwhere(mask) + 1
    number[tuple(places.T)] = np.arange(len(places))
    neighbours = np.stack([number[tuple((places + step).T)] for step in CROFTON_DIRECTIONS], axis=1)
    voxel, direction = np.nonzero(neighbours >= 0)
    lengths = np.linalg.norm(CROFTON_DIRECTIONS * edges, axis=1)[direction]
    half = sparse.csr_array((lengths, (voxel, neighbours[voxel, direction])), shape=(len(places),) * 2)
    return (half + half.T).tocsr()


def _paths(voxels: _Voxels) -> list[Numbers]:
    """Paths from the ends of an object to its first end, or to paths before them."""
    root, far = 0, _far(voxels, 0)
    for _ in range(4):  # to the other side and back, until both ends are as far apart as can be
        root = np.argmax(far)
        far = _far(voxels, root)
    before = csgraph.dijkstra(_costs(voxels), indices=root, return_predecessors=True)[1]
    paths, beyond, ends = [np.array([root])], np.full(len(far), np.inf), [np.argmax(far)]
    while ends:
        new = len(paths)
        for end in ends:
            paths.append(_way(voxels, before, end, np.concatenate(paths)))
        beyond = np.minimum(beyond, _beyond(voxels, np.unique(np.concatenate(paths[new:]))))
        ends = [part[np.argmax(far[part])] for part in _branches(voxels, beyond)]
    return paths[1:]


def _costs(voxels: _Voxels) -> sparse.csr_array:
    """Steps that are dearer near the boundary; a power of the radius suits thick and thin parts alike."""
    steps, cost = voxels.graph.tocoo(), (voxels.radius.max() / voxels.radius) ** 4
    return sparse.csr_array((steps.data * (cost[steps.row] + cost[steps.col]), steps.coords), shape=steps.shape)


def _far(voxels: _Voxels, root: int) -> Lengths:
    """How far each voxel is from one, inside the object, at least.

    Paths of steps are up to 13 % longer than a straight line with cubic voxels, 28 % with (30, 8, 8), depending on the
    direction; by them alone a round object's ends would be where steps lead badly.
    """
    detour = -1 / ConvexHull(_sphere(voxels.edges)).equations[:, -1].max()  # worst towards the middle of a facet
    straight = np.linalg.norm(voxels.points - voxels.points[root], axis=1)
    return np.maximum(straight, csgraph.dijkstra(voxels.graph, indices=root) / detour)


def _way(voxels: _Voxels, before: Numbers, end: int, goal: Numbers) -> Numbers:
    """Path from an end towards the root until one of the voxels to reach is within the radius, and straight to it."""
    path = [end]
    while before[path[-1]] >= 0:
        path.append(before[path[-1]])
    apart = cdist(voxels.points[path], voxels.points[goal])
    last = np.argmax(apart.min(axis=1) <= voxels.radius[path])
    joint = goal[np.argmin(apart[last])]
    return np.array(path[: last + 1] + ([joint] if joint != path[last] else []))


def _beyond(voxels: _Voxels, path: Numbers) -> Lengths:
    """How far it is to each voxel, inside the object, from what a path covers; below 0 for what is covered."""
    reach = COVERED * voxels.radius[path] + voxels.edges.max()
    most, number = 2 * reach.max(), len(voxels.points)
    start = sparse.csr_array((most - reach, (np.zeros(len(path), int), path)), shape=(1, number))
    graph = sparse.block_array([[voxels.graph, None], [start, sparse.csr_array((1, 1))]], format="csr")
    return csgraph.dijkstra(graph, indices=number)[:number] - most


def _branches(voxels: _Voxels, beyond: Lengths) -> list[Numbers]:
    """Connected voxels that aren't covered and stick out by as much as they are wide, unlike a flat object's flanks."""
    rest = np.flatnonzero(beyond > 0)
    part = csgraph.connected_components(voxels.graph[rest][:, rest], directed=False)[1]
    parts = np.split(rest[np.argsort(part, kind="stable")], np.cumsum(np.bincount(part)))[:-1]
    smooth = [one for one in parts if beyond[one].max() >= ROUGH * voxels.edges.max()]
    return [one for one in smooth if beyond[one].max() >= _width(voxels, one, beyond[one])]


def _width(voxels: _Voxels, part: Numbers, beyond: Lengths) -> float:
    """Width of a part where it leaves what is covered: 4 standard deviations, which is a disc's diameter."""
    base = part[beyond <= np.linalg.norm(voxels.edges)]
    number, foot = csgraph.connected_components(voxels.graph[base][:, base], directed=False)  # half a ring has two
    feet = [voxels.points[base[foot == one]] for one in range(number)]
    return 4 * max(np.linalg.eigvalsh(np.cov(points.T, bias=True))[-1] for points in feet) ** 0.5


def _tree(voxels: _Voxels, paths: list[Numbers]) -> sparse.csr_array:
    """Graph of the paths, where the steps of each add up to its smoothed length."""
    steps = [np.linalg.norm(np.diff(voxels.points[path], axis=0), axis=1) for path in paths]
    shares = [step / step.sum() * _length(_smoothed(voxels, path)) for step, path in zip(steps, paths, strict=True)]
    starts, stops = (np.concatenate([path[part] for path in paths]) for part in (slice(-1), slice(1, None)))
    return sparse.csr_array((np.concatenate(shares), (starts, stops)), shape=voxels.graph.shape)


def _longest(tree: sparse.csr_array, ends: Numbers) -> tuple[Numbers, float]:
    """Voxels of the longest way between two ends of a tree, and its length."""
    if not len(ends):  # a single voxel
        return np.array([0]), 0.0
    apart, before = csgraph.dijkstra(tree, directed=False, indices=ends, return_predecessors=True)
    first, last = np.unravel_index(np.argmax(apart[:, ends]), (len(ends),) * 2)
    chain = [ends[last]]
    while chain[-1] != ends[first]:
        chain.append(before[first, chain[-1]])
    return np.array(chain), apart[first, ends[last]]


def _smoothed(voxels: _Voxels, path: Numbers) -> Lengths:
    """Points a quarter of a voxel apart along a path, smoothed but for its two ends."""
    points = voxels.points[path]
    if len(points) == 1:  # has no direction, so its longest edge's is taken
        points = points + np.outer([-0.25, 0.25], voxels.edges * (np.arange(3) == np.argmax(voxels.edges)))
    along = np.append(0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1)))
    even = np.linspace(0, along[-1], int(np.ceil(4 * along[-1] / voxels.edges.max())) + 1)
    points = np.stack([np.interp(even, along, axis) for axis in points.T], axis=1)
    bent = points - np.linspace(points[0], points[-1], len(points))
    turned = np.concatenate([bent, -bent[-2:0:-1]])  # goes on as if turned about the ends, which therefore stay
    sigma = max(SMOOTH * np.median(voxels.radius[path]), voxels.edges.max()) / even[1]
    return points - bent + ndimage.gaussian_filter1d(turned, sigma, axis=0, mode="wrap")[: len(points)]


def _length(points: Lengths) -> float:
    """Length of the line through points."""
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def _to_surface(path: Lengths, mask: Mask, edges: Lengths, step: float) -> Lengths:
    """Path whose last three steps lead straight on to where the mask ends, at most two steps further."""
    back = np.linalg.norm(path - path[-1], axis=1)
    kept = np.flatnonzero(back >= min(3 * step, back[0]))[-1]
    ahead = (path[-1] - path[kept]) / back[kept]
    ray = path[-1] + np.linspace(0, 2 * step, 801)[:, None] * ahead
    share = ndimage.map_coordinates(mask.view(np.uint8), (ray / edges - 0.5).T, float, order=1, mode="grid-constant")
    stop = np.argmin(np.append(share[1:] >= 0.5, False))
    return np.concatenate([path[: kept + 1], ray[stop : stop + 1]])
