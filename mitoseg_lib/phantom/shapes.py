"""Building blocks of the phantom: a stream of random numbers, smooth noise, and tubes in space.

Everything here gives the same bits on every machine. Random numbers come straight from a bit generator, whose stream
NumPy guarantees (that of its distributions may change), and only + - * / and square roots, which are exact to the last
bit everywhere, lie between them and the shapes. Points are (3, ...) arrays of z, y, x in nm, float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

__all__ = ["SmoothNoise", "Stream", "Tubes", "length_of"]

BYTE_LANES = np.uint64(0x00FF00FF00FF00FF)
ADD_LANES = np.uint64(0x0001000100010001)
BYTES_MEAN, BYTES_SD = 1020.0, 209.0167457  # of the sum of eight random bytes: 8 * 127.5, sqrt(8 * 65535 / 12)
BALL = 6  # voxels of a box, along each axis, that are looked at together
SPLINE_SD = 0.3316  # of cubic B-spline interpolated unit noise, averaged over the cell: 0.4794 ** 1.5


class Stream:
    """Random numbers that depend on nothing but the whole numbers given here.

    Parameters
    ----------
    key
        Whole numbers of at least 0, say a seed and the number of a purpose.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | tuple[int, ...] = ()) -> np.ndarray:
        """Numbers from `low` to below `high`, float64 of shape `size`."""
        raw = self._bits.random_raw(int(np.prod(size, dtype=int)))
        return (low + (high - low) * ((raw >> np.uint64(11)) * 2.0**-53)).reshape(size)

    def normal(self, size: int | tuple[int, ...] = ()) -> np.ndarray:
        """Nearly normal numbers of mean 0 and sd 1 (none beyond 4.9), float64 of shape `size`.

        Each is the sum of eight random bytes: the usual algorithms call `exp` and `log`, whose last bit differs
        between machines.
        """
        raw = self._bits.random_raw(int(np.prod(size, dtype=int)))
        pairs = (raw & BYTE_LANES) + ((raw >> np.uint64(8)) & BYTE_LANES)
        return (((pairs * ADD_LANES) >> np.uint64(48)).astype(float) - BYTES_MEAN).reshape(size) / BYTES_SD

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        return int(self.uniform() * count)

    def direction(self) -> np.ndarray:
        """A unit vector, (3,), all directions alike."""
        vector = np.zeros(3)
        while not 0.1 < length_of(vector) < 1:
            vector = self.uniform(-1, 1, 3)
        return vector / length_of(vector)


def length_of(vectors: np.ndarray) -> np.ndarray:
    """Lengths of vectors (3, ...)."""
    return np.sqrt(vectors[0] * vectors[0] + vectors[1] * vectors[1] + vectors[2] * vectors[2])


class SmoothNoise:
    """Noise of mean 0 that is smooth over a length, known at any point: random values on a lattice, cubic B-splines.

    Parameters
    ----------
    low, high
        Corners of the region, (3,), nm.
    step
        Distance between lattice points, nm: the length over which the noise is smooth.
    stream
        Where its values come from.
    channels
        How many independent noises.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, step: float, stream: Stream, *, channels: int = 1) -> None:
        self.low, self.step = np.asarray(low, float), step
        size = [int(length / step) + 5 for length in np.asarray(high) - self.low]
        self.grid = stream.normal((channels, *size)) / SPLINE_SD

    def on_axes(self, axes: list[np.ndarray]) -> np.ndarray:
        """Values on the grid with these coordinates, (channels, z, y, x)."""
        taps = [self._taps(coordinates, axis) for axis, coordinates in enumerate(axes)]
        part = [slice(first.min(), first.max() + 4) for first, _ in taps]
        values = self.grid[:, part[0], part[1], part[2]]
        for axis, (first, weights) in enumerate(taps, start=1):
            shape = [-1 if a == axis else 1 for a in range(4)]
            first = first - first.min()
            values = sum(np.take(values, first + k, axis) * w.reshape(shape) for k, w in enumerate(weights))
        return values

    def at(self, points: np.ndarray) -> np.ndarray:
        """Values at points (3, n), (channels, n)."""
        (z, wz), (y, wy), (x, wx) = (self._taps(points[axis], axis) for axis in range(3))
        values = np.zeros((len(self.grid), points.shape[1]))
        for k, j, i in np.ndindex(4, 4, 4):
            values += self.grid[:, z + k, y + j, x + i] * (wz[k] * wy[j] * wx[i])
        return values

    def _taps(self, coordinates: np.ndarray, axis: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """First of the four lattice points around each coordinate, and the four weights."""
        position = (coordinates - self.low[axis]) / self.step
        first = np.clip(position.astype(int), 0, self.grid.shape[axis + 1] - 4)
        t = np.clip(position - first, 0.0, 1.0)
        u = 1 - t
        middle = (4 - 6 * t * t + 3 * t * t * t) / 6
        return first, [u * u * u / 6, middle, (4 - 6 * u * u + 3 * u * u * u) / 6, t * t * t / 6]


def weighted(parts: list[np.ndarray], weights: np.ndarray | list[np.ndarray]) -> np.ndarray:
    """Sum of three parts, each times its weight."""
    total = parts[0] * weights[0]
    total += parts[1] * weights[1]
    total += parts[2] * weights[2]
    return total


@dataclass
class Tubes:
    """Polylines with a thickness, some flattened to ribbons: neurites, and the mitochondria in them.

    Attributes
    ----------
    start, vector
        Each segment's first end and the way to its other end, (n, 3), nm.
    radius, widening
        Radius at the first end and what it grows by until the other, (n,), nm.
    normal, flatness
        Direction in which a segment is thinner, (n, 3), and how many times, (n,), at least 1.
    owner
        Number of the tube that a segment belongs to, (n,).
    """

    start: np.ndarray
    vector: np.ndarray
    radius: np.ndarray
    widening: np.ndarray
    normal: np.ndarray
    flatness: np.ndarray
    owner: np.ndarray

    @classmethod
    def none(cls) -> Tubes:
        """No tubes."""
        vectors, numbers = np.zeros((0, 3)), np.zeros(0)
        return cls(vectors, vectors, numbers, numbers, vectors, numbers, np.zeros(0, np.int16))

    @property
    def count(self) -> int:
        """Number of tubes."""
        return int(self.owner[-1]) + 1 if len(self.owner) else 0

    def with_tube(
        self, path: np.ndarray, radii: np.ndarray, normal: np.ndarray | None = None, flatness: float = 1.0
    ) -> Tubes:
        """These and one more, along a path (k, 3) with radii (k,)."""
        n = len(path) - 1
        new = (
            path[:-1],
            path[1:] - path[:-1],
            radii[:-1],
            radii[1:] - radii[:-1],
            np.tile(np.zeros(3) if normal is None else normal, (n, 1)),
            np.full(n, flatness),
            np.full(n, self.count, np.int16),
        )
        old = (self.start, self.vector, self.radius, self.widening, self.normal, self.flatness, self.owner)
        return Tubes(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))

    def segments_of(self, number: int) -> np.ndarray:
        """Indices of a tube's segments."""
        return np.flatnonzero(self.owner == number)

    def path(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Path (k, 3) and radii (k,) of a tube."""
        own = self.segments_of(number)
        last = own[-1]
        path = np.vstack([self.start[own], self.start[last] + self.vector[last]])
        return path, np.append(self.radius[own], self.radius[last] + self.widening[last])

    def depth(self, points: np.ndarray, segment: int) -> np.ndarray:
        """Distance of points (3, ...) from a segment's surface, nm, negative inside."""
        v, n = self.vector[segment], self.normal[segment]
        offset = [points[axis] - self.start[segment, axis] for axis in range(3)]
        along = weighted(offset, v / (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]))
        np.minimum(np.maximum(along, 0.0, out=along), 1.0, out=along)
        for axis in range(3):
            offset[axis] -= along * v[axis]
        across = weighted(offset, n) if self.flatness[segment] > 1 else None
        square = weighted(offset, offset)
        if across is not None:
            across *= across
            across *= self.flatness[segment] * self.flatness[segment] - 1
            square += across
        along *= self.widening[segment]
        along += self.radius[segment]
        return np.sqrt(square, out=square) - along

    def depths(self, points: np.ndarray) -> np.ndarray:
        """Distance of a few points (3, m) from every segment's surface, (m, n), nm."""
        offset = [points[axis][:, None] - self.start[:, axis] for axis in range(3)]
        v, n = self.vector.T, self.normal.T
        along = weighted(offset, v / (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]))
        along = np.clip(along, 0.0, 1.0)
        offset = [o - along * v[axis] for axis, o in enumerate(offset)]
        across = weighted(offset, n)
        square = weighted(offset, offset) + (self.flatness * self.flatness - 1) * across * across
        return np.sqrt(square) - (self.radius + along * self.widening)

    def surface(self, points: np.ndarray, number: int) -> np.ndarray:
        """Distance of points (3, ...) from a tube's surface, nm, negative inside."""
        nearest = None
        for segment in self.segments_of(number):
            depth = self.depth(points, segment)
            nearest = depth if nearest is None else np.minimum(nearest, depth)
        return nearest

    def near(self, points: np.ndarray, reach: float) -> np.ndarray:
        """Numbers of the tubes whose surface may lie within `reach` nm of some of the points (3, ...)."""
        centre, radius = balls_around(points.reshape(3, -1))
        return np.unique(self.owner[self.depths(centre)[0] <= reach + self._steepness() * radius])

    def two_nearest(self, points: np.ndarray, between: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which tube each of the points (3, ...) belongs to, which is the next, and how much farther that is (nm).

        A point belongs to the tube whose surface is nearest: an additively weighted Voronoi diagram. Where every
        surface is farther than `between` nm, it belongs to what lies between the tubes, number -1.
        """
        shape = points.shape[1:]
        first, second = np.full(shape, float(between)), np.full(shape, np.inf)
        owner, other = np.full(shape, -1, np.int16), np.full(shape, -1, np.int16)
        for number, segments in self._candidates(points, between):
            depth = self.depth(points, segments[0])
            for segment in segments[1:]:
                np.minimum(depth, self.depth(points, segment), out=depth)
            closer = depth < first
            np.copyto(other, owner, where=closer)
            np.copyto(other, np.int16(number), where=(depth < second) & ~closer)
            np.copyto(owner, np.int16(number), where=closer)
            np.minimum(second, np.maximum(depth, first), out=second)
            np.minimum(first, depth, out=first)
        return owner, other, second - first

    def _candidates(self, points: np.ndarray, between: float) -> list[tuple[int, np.ndarray]]:
        """Tubes, with their segments, that can be first or second somewhere among the points.

        Leaves out only what can't matter, so that the answer for a point doesn't depend on its company.
        """
        kept = self._can_matter(points.reshape(3, -1), np.arange(len(self.owner)), between)
        if points.ndim == 4:  # a box: look again at its parts, each of which leaves out more
            kept = self._can_matter(points, kept, between)
        return [(int(number), kept[self.owner[kept] == number]) for number in np.unique(self.owner[kept])]

    def _can_matter(self, points: np.ndarray, segments: np.ndarray, between: float) -> np.ndarray:
        """Those of the segments that can be first or second in one of the balls that hold the points."""
        centres, radii = balls_around(points)
        some = self._only(segments)
        depths, slack = some.depths(centres), some._steepness() * radii[:, None] + 1e-6
        numbers, column = np.unique(some.owner, return_inverse=True)
        farthest = np.full((len(radii), len(numbers) + 2), np.inf)  # of each tube from a ball's points, at most
        np.minimum.at(farthest.T, column, (depths + slack).T)
        farthest[:, -1] = between
        limit = np.partition(farthest, 1, axis=1)[:, 1:2]
        return segments[(depths - slack <= limit).any(axis=0)]

    def _only(self, segments: np.ndarray) -> Tubes:
        """Some of the segments, which keep their tube's number."""
        return Tubes(*(getattr(self, each.name)[segments] for each in fields(self)))

    def _steepness(self) -> np.ndarray:
        """The most that the distance from each segment changes over a nm, (n,): more if flattened or widening."""
        return self.flatness + np.abs(self.widening) / length_of(self.vector.T)


def balls_around(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Balls that together hold points: centres (3, m) and radii (m,).

    One ball for points (3, n); one for every few points of a box (3, z, y, x).
    """
    lowest = highest = points
    for axis in range(1, points.ndim):
        starts = np.arange(0, points.shape[axis], BALL if points.ndim == 4 else points.shape[axis])
        lowest = np.minimum.reduceat(lowest, starts, axis)
        highest = np.maximum.reduceat(highest, starts, axis)
    lowest, highest = lowest.reshape(3, -1), highest.reshape(3, -1)
    return (lowest + highest) / 2, length_of(highest - lowest) / 2
