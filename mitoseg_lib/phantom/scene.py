"""What is in a phantom and where: neurites, mitochondria, synapses, and the small things that fool a network.

Nothing is drawn here. The neurites are tubes in a space that smooth noise bends ('bent' points); each point of the
stack belongs to the tube whose surface is nearest, so they fill it as neurites fill neuropil. Mitochondria are tubes in
bent space too, so they follow their neurite. Lengths are in nm, points (3, ...) in z, y, x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mitoseg_lib.phantom.shapes import SmoothNoise, Stream, Tubes, length_of

__all__ = ["Scene", "Small", "Synapse", "make_scene"]

MARGIN = 350.0  # tissue made around the stack, so that its borders look like its middle
BENDING = ((520.0, 130.0), (190.0, 32.0), (55.0, 6.0))  # smooth over, sd
CLEARANCE = 24.0  # from the middle of a membrane to an organelle
BETWEEN = 85.0  # from the surface of every neurite: there begins what fills the gaps, glia
ATTEMPTS = 12000  # at placing mitochondria, in a cubic micrometre or more
SURVEY = 4  # every how many voxels the tissue is looked at before organelles are placed

# Radius, and how many are tried in a cubic micrometre; thick ones first, the others fill what is left.
NEURITES = ((420.0, 0.4), (270.0, 3.0), (190.0, 20.0), (140.0, 50.0), (100.0, 120.0), (65.0, 150.0), (42.0, 90.0))
SYNAPSES, RETICULUM, MICROTUBULES, DARK_BODIES = 5.5, 90.0, 110.0, 20.0  # tried in a cubic micrometre
PURPOSES = ("bending", "neurites", "looks", "mitochondria", "synapses", "vesicles", "reticulum", "microtubules",
            "bodies", "texture", "specks", "clumps", "shade", "wobble", "drift", "damage", "noise")  # fmt: skip


@dataclass
class Synapse:
    """A place on the membrane between two neurites: centre (3,), radius, numbers of the neurites."""

    centre: np.ndarray
    radius: float
    before: int
    after: int


@dataclass
class Small:
    """A tube or, where both ends are equal, a ball, too small to have a shape of its own.

    Ends (3,), radius, grey level of wall and inside, thickness of the wall, and how opaque it is.
    """

    start: np.ndarray
    end: np.ndarray
    radius: float
    wall: float
    inside: float
    thickness: float
    opacity: float


@dataclass
class Scene:
    """Everything in a stack, before it is drawn.

    Attributes
    ----------
    shape, edges, seed
        Of the stack: voxels (z, y, x), nm (z, y, x), and the seed that all streams start from.
    bending
        Displacement of space.
    neurites, grey, sheath
        The neurites, with the grey level of each one's inside and the thickness of its myelin (0: none); the last
        entries belong to the glia between them, number -1.
    mitochondria, hosts
        The mitochondria, and the number of the neurite that each lies in.
    synapses, small
        Where neurites touch; vesicles, reticulum, microtubules, dark bodies.
    """

    shape: tuple[int, int, int]
    edges: np.ndarray
    seed: int
    bending: SmoothNoise
    neurites: Tubes
    grey: np.ndarray
    sheath: np.ndarray
    mitochondria: Tubes = field(default_factory=Tubes.none)
    hosts: list[int] = field(default_factory=list)
    synapses: list[Synapse] = field(default_factory=list)
    small: list[Small] = field(default_factory=list)

    def stream(self, purpose: str, *more: int) -> Stream:
        """Random numbers for one purpose, independent of all others."""
        return Stream(self.seed, PURPOSES.index(purpose), *more)

    @property
    def extent(self) -> np.ndarray:
        """Edges of the stack, (3,), nm."""
        return np.array(self.shape) * self.edges

    @property
    def volume(self) -> float:
        """Volume of the stack in cubic micrometres."""
        return float(self.extent[0] * self.extent[1] * self.extent[2]) * 1e-9

    def bent_grid(self, axes: list[np.ndarray]) -> np.ndarray:
        """Bent points, (3, z, y, x), of the grid with these coordinates."""
        points = self.bending.on_axes(axes)
        for axis in range(3):
            points[axis] += axes[axis].reshape([-1 if a == axis else 1 for a in range(3)])
        return points

    def bent(self, points: np.ndarray) -> np.ndarray:
        """Bent points of points in the stack, (3, n)."""
        return points + self.bending.at(points)

    def straight(self, bent: np.ndarray) -> np.ndarray:
        """Points in the stack whose bent points are these, (3, n), to within a nm or so."""
        points = bent.copy()
        for _ in range(8):
            points = points + 0.8 * (bent - self.bent(points))
        return points

    def room(self, points: np.ndarray, neurite: int) -> np.ndarray:
        """How far points (3, n) of the stack lie from a neurite's membrane and its mitochondria, at least (n,)."""
        bent = self.bent(points)
        owner, _, gap = self.neurites.two_nearest(bent, BETWEEN)
        room = np.where(owner == neurite, gap / 2, -1.0)
        for number in self.mitochondria.near(bent, 60.0):
            if self.hosts[number] == neurite:
                room = np.minimum(room, self.mitochondria.surface(bent, number))
        return room


@dataclass
class Survey:
    """Every fourth voxel of the tissue: point, bent point (3, n), neurite, next neurite, distance from the membrane.

    `taken` is the distance from the surface of the nearest mitochondrion so far; `deepest` the greatest distance from
    the membrane in each neurite; `volume` what a voxel of the survey stands for, cubic nm.
    """

    points: np.ndarray
    bent: np.ndarray
    owner: np.ndarray
    other: np.ndarray
    depth: np.ndarray
    taken: np.ndarray
    deepest: np.ndarray
    volume: float

    def some(self, stream: Stream, mask: np.ndarray) -> int | None:
        """Number of a random one where `mask` is true, None if there is none."""
        chosen = np.flatnonzero(mask)
        return int(chosen[stream.below(len(chosen))]) if len(chosen) else None


def make_scene(shape: tuple[int, int, int], edges: np.ndarray, seed: int, foreground: float) -> Scene:
    """Everything in a stack of this shape, with this share of mitochondria."""
    extent = np.array(shape) * edges
    bending = make_bending(extent, Stream(seed, PURPOSES.index("bending")))
    neurites = grow_neurites(extent, Stream(seed, PURPOSES.index("neurites")))
    looks = Stream(seed, PURPOSES.index("looks"))
    grey = 159 + 10 * looks.normal(neurites.count + 1)
    grey[-1] = 165
    scene = Scene(shape, edges, seed, bending, neurites, grey, np.zeros(neurites.count + 1))
    survey = make_survey(scene)
    wrap_in_myelin(scene, survey, looks)
    place_mitochondria(scene, survey, foreground)
    place_synapses(scene, survey)
    place_threads(scene, survey)
    place_dark_bodies(scene, survey)
    return scene


def make_bending(extent: np.ndarray, stream: Stream) -> SmoothNoise:
    """Displacement of space: coarse and fine noise on one lattice."""
    low, high = np.full(3, -MARGIN), extent + MARGIN
    step, sd = BENDING[-1]
    bending = SmoothNoise(low, high, step, stream, channels=3)
    nodes = [low[axis] + step * np.arange(-1, size - 1) for axis, size in enumerate(bending.grid.shape[1:])]
    bending.grid *= sd
    for coarse, sd in BENDING[:-1]:
        bending.grid += sd * SmoothNoise(low - step, high + 5 * step, coarse, stream, channels=3).on_axes(nodes)
    return bending


def grow_neurites(extent: np.ndarray, stream: Stream) -> Tubes:
    """Neurites that hardly overlap, until the stack and its margin are crowded."""
    low, size = -MARGIN, extent + 2 * MARGIN
    volume = float(size[0] * size[1] * size[2]) * 1e-9
    neurites = Tubes.none()
    for typical, density in NEURITES:
        for _ in range(2 + int(density * volume)):
            start = low + size * stream.uniform(size=3)
            if len(neurites.owner) and neurites.depths(start[:, None]).min() < 0.45 * typical:
                continue
            path, radii = wandering_tube(start, typical, stream)
            flatness = max(1.0, float(stream.uniform(0.6, 2.2)))
            if fits(neurites, path, radii / flatness):
                neurites = neurites.with_tube(path, radii, stream.direction(), flatness)
    return neurites


def wandering_tube(middle: np.ndarray, typical: float, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Path (k, 3) and radii (k,) of a neurite through a point, with swellings."""
    radius = typical * float(stream.uniform(0.8, 1.25))
    step = 2.2 * radius + 120
    halves = []
    heading = stream.direction()
    for sign in (-1, 1):
        point, direction, half = middle, sign * heading, []
        for _ in range(1 + stream.below(4)):
            point = point + step * direction
            half.append(point)
            direction = direction + 0.45 * stream.direction()
            direction = direction / length_of(direction)
        halves.append(half)
    path = np.array([*halves[0][::-1], middle, *halves[1]])
    return path, radius * stream.uniform(0.7, 1.35, len(path))


def fits(neurites: Tubes, path: np.ndarray, radii: np.ndarray) -> bool:
    """Whether a new tube would hardly overlap those that are there."""
    if not len(neurites.owner):
        return True
    points = np.vstack([path, (path[:-1] + path[1:]) / 2])
    needed = 0.8 * np.concatenate([radii, radii[:-1]])
    return bool((neurites.depths(points.T).min(axis=1) >= needed).all())


def make_survey(scene: Scene) -> Survey:
    """Look at every fourth voxel, or more of a thin stack's."""
    strides = [min(SURVEY, max(1, n // 4)) for n in scene.shape]
    axes = [np.arange(s // 2, n, s) * e for n, s, e in zip(scene.shape, strides, scene.edges, strict=True)]
    parts = []
    for y in range(0, len(axes[1]), 24):
        for x in range(0, len(axes[2]), 24):
            some = [axes[0], axes[1][y : y + 24], axes[2][x : x + 24]]
            bent = scene.bent_grid(some)
            owner, other, gap = scene.neurites.two_nearest(bent, BETWEEN)
            points = np.stack(np.meshgrid(*some, indexing="ij"))
            parts.append((points.reshape(3, -1), bent.reshape(3, -1), owner.ravel(), other.ravel(), gap.ravel() / 2))
    points, bent, owner, other, depth = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    deepest = np.zeros(scene.neurites.count + 1)
    np.maximum.at(deepest, owner, depth)
    return Survey(
        points, bent, owner, other, depth, np.full(len(owner), np.inf), deepest, scene.volume * 1e9 / len(owner)
    )


def wrap_in_myelin(scene: Scene, survey: Survey, looks: Stream) -> None:
    """Give one neurite of middling thickness, of which the stack shows a part, a sheath; tiny stacks have none."""
    sizes = np.bincount(survey.owner + 1, minlength=scene.neurites.count + 1)[1:]
    deepest = survey.deepest[:-1]
    fitting = np.flatnonzero((deepest > 130) & (deepest < 260) & (sizes > 30))
    if len(fitting) and scene.volume > 0.05:
        by_size = fitting[np.argsort(sizes[fitting], kind="stable")]
        scene.sheath[by_size[len(by_size) // 3]] = looks.uniform(75, 100)


def place_mitochondria(scene: Scene, survey: Survey, foreground: float) -> None:
    """Put mitochondria into neurites until their share of the survey is `foreground`, to about a hundredth of it."""
    stream = scene.stream("mitochondria")
    wanted = foreground * len(survey.owner)
    placed, attempts = 0, int(ATTEMPTS * min(1.0, 0.1 + scene.volume))  # in a tiny stack all places are soon tried
    for attempt in range(attempts):
        missing = wanted - placed
        if missing <= 0.01 * wanted:
            break
        # thick and long ones first; the last ones fit into what is left
        radius = float(stream.uniform(130, 225)) * (1 - 0.75 * attempt / attempts)
        longest = float(stream.uniform(250, 700) if stream.uniform() < 0.3 else stream.uniform(700, 2200))
        longest = min(longest, 1.2 * missing * survey.volume / (3 * radius * radius))
        placed += try_mitochondrion(scene, survey, (longest, radius), missing + 0.01 * wanted, stream)


def try_mitochondrion(scene: Scene, survey: Survey, size: tuple[float, float], most: float, stream: Stream) -> int:
    """Put a mitochondrion of at most this length and radius, and so many survey points, somewhere.

    Returns how many points it has, 0 where it didn't fit.
    """
    start = stream.below(len(survey.owner))
    neurite = int(survey.owner[start])
    room = survey.depth[start] - CLEARANCE - scene.sheath[neurite]
    if neurite < 0 or room < 0.9 * size[1] or survey.taken[start] < 100:
        return 0
    path, radii = path_inside(scene, survey.bent[:, start], neurite, size, stream)
    if len(path) < 2:
        return 0
    own = np.flatnonzero(survey.owner == neurite)
    surface = Tubes.none().with_tube(path, radii).surface(survey.bent[:, own], 0)
    inside = (surface < 0) & (survey.depth[own] > CLEARANCE + scene.sheath[neurite])
    count = int(np.count_nonzero(inside))
    clipped = np.count_nonzero(surface < 0) - count
    if not 0 < count <= most or clipped > 0.12 * count or (survey.taken[own][surface < 60] < 60).any():
        return 0
    survey.taken[own] = np.minimum(survey.taken[own], surface)
    scene.mitochondria = scene.mitochondria.with_tube(path, radii)
    scene.hosts.append(neurite)
    return count


def path_inside(
    scene: Scene, point: np.ndarray, neurite: int, size: tuple[float, float], stream: Stream
) -> tuple[np.ndarray, np.ndarray]:
    """Path and radii of a mitochondrion through a bent point along its neurite, at most of this length and radius."""
    longest, radius = size
    line = along_neurite(scene.neurites, neurite, point, longest)
    owner, _, gap = scene.neurites.two_nearest(line.T, BETWEEN)
    room = np.where(owner == neurite, gap / 2 - CLEARANCE - scene.sheath[neurite], 0)
    middle = len(line) // 2
    radius = min(radius, float(room[middle]))
    good = room > 0.7 * radius
    first, last = middle, middle
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(line) - 1 and good[last + 1]:
        last += 1
    from_middle = np.linspace(-1, 1, last + 1 - first)
    tapered = radius * np.sqrt(1 - stream.uniform(0.3, 0.75) * from_middle * from_middle)
    radii = np.minimum(tapered * stream.uniform(0.94, 1.06, len(tapered)), room[first : last + 1])
    return line[first : last + 1], radii


def along_neurite(neurites: Tubes, number: int, point: np.ndarray, length: float) -> np.ndarray:
    """Points (k, 3) about 90 nm apart on a line through a bent point, beside the neurite's path for `length`."""
    path, _ = neurites.path(number)
    steps = length_of((path[1:] - path[:-1]).T)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    samples = np.arange(0, at[-1], 30.0)
    trail = np.stack([np.interp(samples, at, path[:, axis]) for axis in range(3)])
    nearest = int(np.argmin(length_of(trail - point[:, None])))
    half = max(1, int(length / 180))
    wanted = samples[nearest] + 90.0 * np.arange(-half, half + 1)
    trail_there = np.stack([np.interp(wanted, at, path[:, axis]) for axis in range(3)], axis=1)
    # beyond the path's ends it goes straight on
    for end, neighbour, beyond in ((0, 1, np.minimum(wanted, 0)), (-1, -2, np.maximum(wanted - at[-1], 0))):
        outwards = (path[end] - path[neighbour]) / length_of(path[end] - path[neighbour])
        trail_there = trail_there + np.abs(beyond)[:, None] * outwards
    return trail_there + (point - trail[:, nearest])


def place_synapses(scene: Scene, survey: Survey) -> None:
    """Synapses: a density on the membrane and a cluster of vesicles before it."""
    stream, vesicles = scene.stream("synapses"), scene.stream("vesicles")
    width = survey.deepest[survey.owner]
    membrane = (survey.depth < 10) & (survey.owner >= 0) & (survey.other >= 0)
    membrane &= (width > 110) & (width < 270) & (survey.deepest[survey.other] > 70)
    membrane &= (scene.sheath[survey.owner] == 0) & (scene.sheath[survey.other] == 0)
    for _ in range(2 + int(SYNAPSES * scene.volume)):
        at = survey.some(stream, membrane)
        if at is None:
            return
        before, after = int(survey.owner[at]), int(survey.other[at])
        radius = float(stream.uniform(90, 180))
        balls = cluster(scene, survey.points[:, at], before, float(stream.uniform(220, 480)), vesicles)
        if len(balls) < 20:
            continue
        scene.synapses.append(Synapse(survey.points[:, at], radius, before, after))
        scene.small += balls


def cluster(scene: Scene, centre: np.ndarray, neurite: int, reach: float, stream: Stream) -> list[Small]:
    """Vesicles of about 40 nm within reach of a point, in one neurite, none touching another."""
    tried = centre[:, None] + reach * stream.uniform(-1, 1, (3, int(2500 * (reach / 400) ** 2)))
    distance = length_of(tried - centre[:, None])
    tried = tried[:, distance < reach]
    tried = tried[:, scene.room(tried, neurite) > 28]
    kept = np.zeros((3, 0))
    for point in tried.T:
        if not kept.shape[1] or length_of(kept - point[:, None]).min() > 41:
            kept = np.concatenate([kept, point[:, None]], axis=1)
    return [Small(p, p, float(stream.uniform(17, 23)), 76, 122, 10, 0.95) for p in kept.T]


def place_threads(scene: Scene, survey: Survey) -> None:
    """Endoplasmic reticulum, wandering, with a lumen, and microtubules, thin and straight along the neurite."""
    stream = scene.stream("reticulum")
    for _ in range(2 + int(RETICULUM * scene.volume)):
        radius = float(stream.uniform(17, 34))
        look = (radius, 84.0, 140.0, 9.0, 0.9)
        thread(scene, survey, look, (float(stream.uniform(100, 500)), 22.0), stream)
    stream = scene.stream("microtubules")
    for _ in range(2 + int(MICROTUBULES * scene.volume)):
        thread(scene, survey, (11.0, 105.0, 105.0, 5.0, 0.6), (float(stream.uniform(400, 1500)), 4.0), stream)


def thread(scene: Scene, survey: Survey, look: tuple[float, ...], run: tuple[float, float], stream: Stream) -> None:
    """One thread along a neurite: (length, waviness) is its run, as far as there is room."""
    at = stream.below(len(survey.owner))
    radius, (length, wave) = look[0], run
    neurite = int(survey.owner[at])
    if neurite < 0 or survey.depth[at] < radius + 30 + scene.sheath[neurite]:
        return
    line = along_neurite(scene.neurites, neurite, survey.bent[:, at], length)
    line = scene.straight(line.T + wave * stream.normal((3, len(line))))
    good = scene.room(line, neurite) > radius + 18 + scene.sheath[neurite]
    for k in np.flatnonzero(good[:-1] & good[1:]):
        scene.small.append(Small(line[:, k], line[:, k + 1], *look))


def place_dark_bodies(scene: Scene, survey: Survey) -> None:
    """Lysosomes and endosomes: dark balls, which aren't mitochondria."""
    stream = scene.stream("bodies")
    for _ in range(1 + int(DARK_BODIES * scene.volume)):
        at = stream.below(len(survey.owner))
        radius = float(stream.uniform(35, 75))
        point = survey.points[:, at]
        if scene.room(point[:, None], int(survey.owner[at]))[0] > radius + 20 + scene.sheath[survey.owner[at]]:
            inside = float(stream.uniform(78, 125))
            scene.small.append(Small(point, point, radius, 76, inside, 10, 0.9))
