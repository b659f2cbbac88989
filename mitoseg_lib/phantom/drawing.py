"""A synthetic FIB-SEM stack of neuropil with exact truth: what the small preset and the tests use instead of tissue.

`make_phantom` first decides what lies where (`mitoseg_lib.phantom.scene`), then draws it block by block, then takes the
picture. What a voxel shows depends on its own place only, so any slices can be made alone. Lengths are in nm, arrays
(z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from numbers import Integral

import numpy as np
from scipy import ndimage

from mitoseg_lib.phantom.scene import BETWEEN, CLEARANCE, MARGIN, Scene, Small, make_scene
from mitoseg_lib.phantom.shapes import SmoothNoise
from mitoseg_lib.stacks import Stack

Box = tuple[range, range, range]

BLOCK = (16, 32, 32)  # voxels drawn at a time: its arrays stay in the processor's cache
SMALLEST = (8, 64, 64)
LARGEST = 40  # cubic micrometres: more takes many minutes
MIDDLE_GREY = 130.0
MEMBRANE_GREY, MITOCHONDRION_GREY = 76.0, 111.0
MEMBRANE = 12.0  # from the middle of the cleft to where the inside of a neurite begins


@dataclass(frozen=True)
class Imaging:
    """How the microscope sees the tissue.

    Attributes
    ----------
    contrast
        Factor on the grey levels about the middle one.
    brightness
        Grey levels added to all.
    blur_nm
        Standard deviation of the beam's spread, in every direction.
    shot_noise
        Standard deviation, at the middle grey level, of the noise that grows with the root of the signal.
    readout_noise
        Standard deviation of the detector's own noise, in grey levels.
    drift_sd
        Standard deviation over the slices of a brightness added to each.
    damaged_slice
        Whether one slice in the middle half is spoilt by noise and by stripes.
    """

    contrast: float = 1.0
    brightness: float = 0.0
    blur_nm: float = 6.0
    shot_noise: float = 8.6
    readout_noise: float = 4.0
    drift_sd: float = 2.5
    damaged_slice: bool = True

    def __post_init__(self) -> None:
        """Refuse what no microscope does."""
        for name, value in asdict(self).items():
            if not math.isfinite(value) or (value < 0 and name != "brightness") or (name == "contrast" and value == 0):
                raise ValueError(f"Imaging has {name}={value!r}, but a number above 0 was expected; give one.")


def make_phantom(
    shape: tuple[int, int, int],
    seed: int,
    *,
    foreground: float = 0.0545,
    imaging: Imaging = Imaging(),
    voxel_size_nm: tuple[float, float, float] = (5.0, 5.0, 5.0),
    slices: range | None = None,
) -> Stack:
    """Make a stack that looks like FIB-SEM of neuropil, whose mitochondria are known exactly.

    Parameters
    ----------
    shape
        Size in voxels, (z, y, x), at least (8, 64, 64) and at most 40 cubic micrometres.
    seed
        A whole number of at least 0. Equal arguments give equal arrays, on any machine.
    foreground
        Share of the voxels that are mitochondria, above 0 and at most 0.25. In stacks of a fraction of a cubic
        micrometre, which hold only a few, it is met roughly.
    imaging
        How the microscope sees the tissue.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x), from 2 to 50.
    slices
        Only these z-slices of the stack, equal to the same slices of the whole.

    Returns
    -------
    Stack
        Image, labels (exactly the voxels painted as mitochondria) and voxel size.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    Only the blur and the noise's scale lie between the shapes and the rounded grey levels, so a last bit that differs
    between processors could change a voxel by 1 where its level lies within 1e-12 of a half; shapes and labels can't.
    """
    slices = range(shape[0]) if slices is None else slices
    require_possible(shape, seed, foreground=foreground, voxel_size_nm=voxel_size_nm, slices=slices)
    edges = np.array(voxel_size_nm, float)
    scene = make_scene(tuple(int(n) for n in shape), edges, int(seed), foreground)
    halo = int(4 * imaging.blur_nm / edges[0] + 1.5)  # where gaussian_filter cuts its kernel off
    clean, labels = draw(scene, range(slices.start - halo, slices.stop + halo))
    ndimage.gaussian_filter(clean, imaging.blur_nm / edges, output=clean, mode="nearest")
    image = take_picture(scene, clean[halo : len(clean) - halo], slices, imaging)
    return Stack(image, labels[halo : len(labels) - halo], tuple(voxel_size_nm), f"phantom {seed}")


def require_possible(
    shape: tuple[int, int, int],
    seed: int,
    *,
    foreground: float,
    voxel_size_nm: tuple[float, float, float],
    slices: range,
) -> None:
    """Raise a ValueError, one sentence, for arguments that `make_phantom` can't use."""
    if len(shape) != 3 or not all(
        isinstance(n, Integral) and n >= least for n, least in zip(shape, SMALLEST, strict=True)
    ):
        raise ValueError(f"shape is {shape!r}, but at least {SMALLEST} voxels (z, y, x) are needed; make it larger.")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed is {seed!r}, but a whole number of at least 0 was expected; give one.")
    if not 0 < foreground <= 0.25:
        raise ValueError(f"foreground is {foreground!r}, but a share above 0 and at most 0.25 fits; choose one.")
    if len(voxel_size_nm) != 3 or not all(2 <= edge <= 50 for edge in voxel_size_nm):
        raise ValueError(
            f"voxel_size_nm is {voxel_size_nm!r}, but three edges from 2 to 50 nm were expected; give these."
        )
    volume = math.prod(shape) * math.prod(voxel_size_nm) * 1e-9
    if volume > LARGEST:
        raise ValueError(f"the stack would be {volume:.0f} cubic micrometres, but {LARGEST} at most; make it smaller.")
    if slices.step != 1 or not 0 <= slices.start < slices.stop <= shape[0]:
        raise ValueError(
            f"slices is {slices!r}, but neighbouring ones of 0 to {shape[0] - 1} were expected; give a range."
        )


def draw(scene: Scene, slices: range) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels as an ideal microscope would see them, float64, and the mask of mitochondria, of some slices."""
    clean = np.empty((len(slices), *scene.shape[1:]))
    labels = np.zeros(clean.shape, bool)
    textures = make_textures(scene)
    for box in blocks(clean.shape):
        where = tuple(slice(r.start, r.stop) for r in box)
        moved = (range(box[0].start + slices.start, box[0].stop + slices.start), *box[1:])
        clean[where], labels[where] = Block(scene, textures, moved).drawn()
    for small in scene.small:
        draw_small(clean, small, scene.edges, slices.start)
    return clean, labels


def blocks(shape: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of at most BLOCK voxels that tile a stack."""
    starts = [range(0, n, size) for n, size in zip(shape, BLOCK, strict=True)]
    for corner in ((z, y, x) for z in starts[0] for y in starts[1] for x in starts[2]):
        yield tuple(range(c, min(c + size, n)) for c, size, n in zip(corner, BLOCK, shape, strict=True))


def make_textures(scene: Scene) -> dict[str, SmoothNoise]:
    """Noises that give the cytoplasm its grain, specks and shades, and the mitochondria their bumps."""
    low, high = np.full(3, -MARGIN), scene.extent + MARGIN
    steps = {"texture": 11.0, "specks": 17.0, "clumps": 36.0, "shade": 240.0, "wobble": 70.0}
    finest = 1.6 * float(scene.edges.max())  # nothing finer can be seen
    return {name: SmoothNoise(low, high, max(step, finest), scene.stream(name)) for name, step in steps.items()}


class Block:
    """A box of voxels that is being drawn."""

    def __init__(self, scene: Scene, textures: dict[str, SmoothNoise], box: Box) -> None:
        self.scene, self.textures = scene, textures
        # one voxel more on each side, for the gradient
        wide = [np.arange(r.start - 1, r.stop + 1) * e for r, e in zip(box, scene.edges, strict=True)]
        bent = scene.bent_grid(wide)
        owner, _, gap = scene.neurites.two_nearest(bent, BETWEEN)
        # the gap between the nearest two grows at another rate on each interface; its gradient makes it a distance
        slope = length_of_gradient(gap, scene.edges)
        inner = (slice(1, -1),) * 3
        self.bent = np.ascontiguousarray(bent[:, 1:-1, 1:-1, 1:-1])
        self.owner, self.half_gap = owner[inner], gap[inner] / 2
        self.depth = gap[inner] / np.maximum(slope[inner], 1.2)
        self.axes = [axis[1:-1] for axis in wide]

    def noise(self, name: str) -> np.ndarray:
        """One of the textures here."""
        return self.textures[name].on_axes(self.axes)[0]

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Grey levels and mask of mitochondria."""
        grain, shade, wobble = self.noise("texture"), self.noise("shade"), self.noise("wobble")
        clumps = 30 * np.clip(self.noise("specks") - 0.8, 0, 1.4) + 26 * np.clip(self.noise("clumps") - 0.2, 0, 1.6)
        inside = self.scene.grey[self.owner] + 7 * shade + 4 * wobble + 7 * grain - clumps
        cleft = np.clip(2 + 4 * wobble, 0, 9)  # half the distance between the membranes of neighbours
        dark = smoothstep((MEMBRANE + 9 + cleft - self.depth) / 16) * (1 - 0.4 * smoothstep((cleft - self.depth) / 4))
        grey = inside + dark * (MEMBRANE_GREY + 6 * shade - inside)
        grey = self._with_myelin(grey)
        grey = self._with_densities(grey)
        labels = np.zeros(grey.shape, bool)
        for number in self.scene.mitochondria.near(self.bent, 40.0):
            grey, own = self._with_mitochondrion(grey, int(number), grain)
            labels |= own
        return grey, labels

    def _with_myelin(self, grey: np.ndarray) -> np.ndarray:
        thickness = self.scene.sheath[self.owner]
        if not thickness.any():
            return grey
        layers = 62 + 30 * np.abs((self.depth / 26) % 1 * 2 - 1)
        within = smoothstep((thickness - self.depth) / 8)
        return grey + within * (layers - grey)

    def _with_densities(self, grey: np.ndarray) -> np.ndarray:
        """The dark bands of synapses: thick behind the membrane, thin before it."""
        for synapse in self.scene.synapses:
            z, y, x = (a - c for a, c in zip(self.axes, synapse.centre, strict=True))
            distance = np.sqrt((z * z)[:, None, None] + (y * y)[:, None] + x * x)
            if distance.min() > synapse.radius:
                continue
            reach = np.where(self.owner == synapse.after, 36.0, 16.0)
            reach[(self.owner != synapse.after) & (self.owner != synapse.before)] = 0.0
            dark = smoothstep((reach - self.depth) / 16) * smoothstep((synapse.radius - distance) / 30)
            grey = grey + 0.7 * dark * (60 - grey)
        return grey

    def _with_mitochondrion(self, grey: np.ndarray, number: int, grain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Double membrane, matrix and cristae, and which voxels they are."""
        host = self.scene.hosts[number]
        surface = self.scene.mitochondria.surface(self.bent, number) + 5 * self.noise("wobble")
        surface = np.maximum(surface, CLEARANCE + self.scene.sheath[host] - self.half_gap)
        own = (surface < 0) & (self.owner == host)
        if not own.any():
            return grey, own
        stream = self.scene.stream("looks", number)
        level = MITOCHONDRION_GREY + 6 * stream.normal()
        crista = self._cristae(surface, stream.direction(), float(stream.uniform(40, 58)))
        matrix = level + 8 * grain + 4 * self.noise("clumps") - 28 * crista
        rim = smoothstep((23 + surface) / 12)  # 1 at the surface, 0 from 18 nm inside
        return np.where(own, matrix + rim * (70 - matrix), grey), own

    def _cristae(self, surface: np.ndarray, normal: np.ndarray, period: float) -> np.ndarray:
        """How much a voxel is part of a crista: wavy sheets, fading in and out."""
        wobble = self.noise("wobble")
        across = self.bent[0] * normal[0] + self.bent[1] * normal[1] + self.bent[2] * normal[2]
        phase = across / period + 0.28 * wobble
        sheet = np.abs(phase % 1 * 2 - 1)  # 0 in the middle of a sheet
        return smoothstep(1.3 - 2 * sheet) * smoothstep((-surface - 24) / 14) * smoothstep(0.7 + 0.5 * wobble)


def length_of_gradient(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Length of the gradient of values (z, y, x)."""
    square = np.zeros(values.shape)
    for slope in np.gradient(values, *edges):
        square += slope * slope
    return np.sqrt(square)


def smoothstep(t: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def draw_small(clean: np.ndarray, small: Small, edges: np.ndarray, first_slice: int) -> None:
    """Draw a thread or a ball into slices, of which the first has this number."""
    reach = small.radius + 6
    low = np.ceil((np.minimum(small.start, small.end) - reach) / edges).astype(int)
    high = np.floor((np.maximum(small.start, small.end) + reach) / edges).astype(int) + 1
    low = np.maximum(low, [first_slice, 0, 0])
    high = np.minimum(high, np.add(clean.shape, [first_slice, 0, 0]))
    if (low >= high).any():
        return
    axes = [np.arange(a, b) * e for a, b, e in zip(low, high, edges, strict=True)]
    surface = distance_from_segment(axes, small.start, small.end) - small.radius
    level = small.inside + smoothstep((small.thickness + surface) / 5 + 0.5) * (small.wall - small.inside)
    where = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, (first_slice, 0, 0), strict=True))
    clean[where] += small.opacity * smoothstep(0.5 - surface / 8) * (level - clean[where])


def distance_from_segment(axes: list[np.ndarray], start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of a grid's points from the line between two points."""
    z, y, x = axes[0][:, None, None] - start[0], axes[1][:, None] - start[1], axes[2] - start[2]
    v = end - start
    along = (z * v[0] + y * v[1] + x * v[2]) / max(v[0] * v[0] + v[1] * v[1] + v[2] * v[2], 1e-9)
    along = np.clip(along, 0.0, 1.0)
    z, y, x = z - along * v[0], y - along * v[1], x - along * v[2]
    return np.sqrt(z * z + y * y + x * x)


def take_picture(scene: Scene, clean: np.ndarray, slices: range, imaging: Imaging) -> np.ndarray:
    """The image, uint8, that a microscope takes of the blurred tissue; each slice has noise of its own."""
    drift = brightness_drift(scene, imaging.drift_sd)
    damaged = int(scene.shape[0] * scene.stream("damage").uniform(0.25, 0.75)) if imaging.damaged_slice else -1
    image = np.empty(clean.shape, np.uint8)
    for target, tissue, z in zip(image, clean, slices, strict=True):
        spoilt = z == damaged
        here = replace(imaging, shot_noise=2.6 * imaging.shot_noise) if spoilt else imaging
        signal = MIDDLE_GREY + here.contrast * (tissue - MIDDLE_GREY) + here.brightness
        variance = here.shot_noise**2 * np.clip(signal, 0, None) / MIDDLE_GREY + here.readout_noise**2
        stream = scene.stream("noise", z)
        signal = signal + np.sqrt(variance) * stream.normal(signal.shape) + drift[z]
        if spoilt:
            signal += 9 * stream.normal((len(signal), 1))  # stripes along the scan lines
        target[...] = np.clip(np.rint(signal), 0, 255)
    return image


def brightness_drift(scene: Scene, sd: float) -> np.ndarray:
    """Brightness to add to each slice of the stack: wanders, with mean 0 and exactly this sd."""
    steps = scene.stream("drift").normal(scene.shape[0])
    drift = np.zeros(len(steps))
    for z, step in enumerate(steps):
        drift[z] = 0.7 * drift[z - 1] + step
    drift -= math.fsum(drift) / len(drift)
    return drift * (sd / math.sqrt(math.fsum(drift * drift) / len(drift)))
