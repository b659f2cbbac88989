import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage import measure

from mitoseg_lib.shapes import (
    CROFTON_DIRECTIONS,
    capsule_diameter,
    crofton_weights,
    find_axis,
    sphericity,
    split_touching,
    surface_area,
)

CUBIC, FLAT, FLATTER = (1, 1, 1), (8, 4, 4), (30, 8, 8)
SIZES = [CUBIC, FLAT, FLATTER]
UNIT = {CUBIC: 1.0, FLAT: 6.0, FLATTER: 14.0}  # nm, between a voxel's edges: what the tests call a voxel
CORNERS = np.ones((3, 3, 3), bool)
per_size = pytest.mark.parametrize("size", SIZES)


# --- known shapes: depths, in nm below the surface, at the middles of voxels


def positions(low, high, size, random):
    """Middles of the voxels of a box, with a margin, on a grid that starts anywhere."""
    number = np.ceil((high - low) / size).astype(int) + 5
    start = low - np.multiply(size, 2 + random.random(3))
    return np.moveaxis(np.indices(number), 0, -1) * size + start


def tubes(lines, radius, size, random):
    """Around lines, each float (point, 3): the union of their capsules."""
    points = np.concatenate(lines)
    at = positions(points.min(axis=0) - radius, points.max(axis=0) + radius, size, random)
    depth = np.full(at.shape[:3], -np.inf)
    for a, b in itertools.chain.from_iterable(map(itertools.pairwise, lines)):
        share = np.clip((at - a) @ (b - a) / max((b - a) @ (b - a), 1e-9), 0, 1)
        depth = np.maximum(depth, radius - np.linalg.norm(at - a - share[..., None] * (b - a), axis=-1))
    return depth


def turned(random):
    return np.linalg.qr(random.standard_normal((3, 3)))[0]


def capsule(radius, length, size, random, turn=None):
    along = (turned(random) if turn is None else turn)[0] * (length / 2 - radius)
    return tubes([np.array([-along, along])], radius, size, random)


def ball(radius, size, random):
    return tubes([np.zeros((2, 3))], radius, size, random)


def ellipsoid(half_axes, size, random):
    """Depth to first order, so that a rough surface is equally rough everywhere."""
    far = np.full(3, max(half_axes) * 1.2)
    at = positions(-far, far, size, random) @ turned(random)
    level = np.linalg.norm(at / half_axes, axis=-1)
    slope = np.linalg.norm(at / np.square(half_axes), axis=-1) / np.maximum(level, 1e-9)
    return (1 - level) / np.maximum(slope, 1 / max(half_axes))


def star(arms, radius, size, random):
    """Arms, (angle in degrees, length), in a plane."""
    turn = turned(random)
    ends = [(np.cos(angle) * turn[0] + np.sin(angle) * turn[1]) * length for angle, length in arms]
    return tubes([np.array([np.zeros(3), end]) for end in ends], radius, size, random)


def arc(bend, angle, turn):
    angles = np.linspace(0, angle, 40)[:, None]
    return bend * (np.cos(angles) * turn[0] + np.sin(angles) * turn[1])


def roughened(depth, by, random):
    """The largest object of a mask whose surface is moved by noise with this standard deviation in nm."""
    noise = ndimage.gaussian_filter(random.standard_normal(depth.shape), 1)
    labels = ndimage.label(depth + by * noise / noise.std() > 0, CORNERS)[0]
    return labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1


def close(found, expected, size):
    return abs(found - expected) <= max(0.05 * expected, 1.5 * max(size))


# --- surface area


def test_directions_are_one_of_each_pair_of_neighbours():
    both = {tuple(step) for step in np.concatenate([CROFTON_DIRECTIONS, -CROFTON_DIRECTIONS])}
    assert CROFTON_DIRECTIONS.shape == (13, 3) and len(both) == 26 and (0, 0, 0) not in both
    assert all(tuple(step) > (0, 0, 0) for step in CROFTON_DIRECTIONS)


def test_weights_of_cubic_voxels_are_those_of_the_literature():
    """Legland, Kieu, Devaux 2007, table 2: shares of solid angle per direction; each counts as two of theirs."""
    share = np.array([0, 0.04577789120476, 0.03698062787608, 0.03519563978232])[abs(CROFTON_DIRECTIONS).sum(axis=1)]
    expected = 4 * share * 2**2 / np.linalg.norm(CROFTON_DIRECTIONS, axis=1)
    assert crofton_weights((2, 2, 2)) == pytest.approx(expected, rel=1e-9)


@per_size
def test_the_shares_of_directions_are_a_whole(size):
    lengths = np.linalg.norm(CROFTON_DIRECTIONS * size, axis=1)
    assert (crofton_weights(size) * lengths).sum() == pytest.approx(2 * np.prod(size))


def area_by_loop(mask, size):
    """Every voxel looks to both sides in each direction."""
    padded, total = np.pad(mask, 1), 0
    for place in np.argwhere(padded):
        for step, weight in zip(CROFTON_DIRECTIONS, crofton_weights(size), strict=True):
            total += weight * sum(not padded[tuple(place + way)] for way in (step, -step))
    return total


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)), st.sampled_from(SIZES))
@settings(deadline=None, max_examples=30)
def test_the_area_of_any_mask(mask, size):
    found = surface_area(mask, size)
    assert found == pytest.approx(area_by_loop(mask, size), rel=1e-9)
    assert surface_area(np.pad(mask, 2), size) == pytest.approx(found, rel=1e-12)
    assert surface_area(mask, [3 * edge for edge in size]) == pytest.approx(9 * found, rel=1e-12)
    assert surface_area(mask.transpose(2, 0, 1), (size[2], *size[:2])) == pytest.approx(found, rel=1e-9)
    assert (found == 0) == (not mask.any())


@per_size
@pytest.mark.parametrize("radius", [6, 10, 14])
def test_the_area_of_a_ball_and_that_of_its_mesh(size, radius):
    radius *= UNIT[size]
    depth = ball(radius, size, np.random.default_rng(int(radius)))
    found = surface_area(depth > 0, size)
    assert found == pytest.approx(4 * np.pi * radius**2, rel=0.02)
    corners, faces, *_ = measure.marching_cubes(depth, 0, spacing=size)
    assert found == pytest.approx(measure.mesh_surface_area(corners, faces), rel=0.03)
    volume = np.count_nonzero(depth > 0) * np.prod(size)
    assert sphericity(volume, found) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize(("size", "within"), [(CUBIC, 0.03), (FLAT, 0.05), (FLATTER, 0.07)])
def test_the_area_of_capsules_and_ellipsoids(size, within):
    random = np.random.default_rng(2)
    for _ in range(4):
        radius, length = 8 * UNIT[size], 40 * UNIT[size]
        found = surface_area(capsule(radius, length, size, random) > 0, size)
        assert found == pytest.approx(2 * np.pi * radius * length, rel=within)
        long, short = 18 * UNIT[size], 9 * UNIT[size]
        flatness = np.sqrt(1 - short**2 / long**2)
        expected = 2 * np.pi * short**2 * (1 + long / short / flatness * np.arcsin(flatness))  # of a prolate spheroid
        assert surface_area(ellipsoid((long, short, short), size, random) > 0, size) == pytest.approx(
            expected, rel=within
        )


@pytest.mark.parametrize(("size", "within"), [(CUBIC, 0.07), (FLAT, 0.1), (FLATTER, 0.15)])
def test_the_area_of_boxes_whose_planes_few_directions_see(size, within):
    random = np.random.default_rng(3)
    edges = np.array([10, 14, 50]) * UNIT[size]
    for _ in range(6):
        at = positions(np.full(3, -30 * UNIT[size]), np.full(3, 30 * UNIT[size]), size, random) @ turned(random)
        expected = 2 * (edges.prod() / edges).sum()
        assert surface_area((abs(at) <= edges / 2).all(axis=-1), size) == pytest.approx(expected, rel=within)


# --- sphericity and the capsule


def test_sphericity_of_solids():
    assert sphericity(4 / 3 * np.pi * 5**3, 4 * np.pi * 5**2) == pytest.approx(1)
    assert sphericity(8, 24) == pytest.approx((np.pi / 6) ** (1 / 3))  # a cube


@given(st.floats(1e-3, 1e4), st.floats(1, 1e3))
@settings(deadline=None)
def test_a_capsule_has_its_diameter(radius, slenderness):
    length = 2 * radius * slenderness
    volume = np.pi * radius**2 * length - 2 / 3 * np.pi * radius**3
    assert capsule_diameter(volume, length) == pytest.approx(2 * radius, rel=1e-6)


@given(st.floats(1e-3, 1e4), st.floats(1, 1e3))
@settings(deadline=None)
def test_what_holds_more_than_a_capsule_is_a_ball(length, times):
    volume = np.pi / 6 * length**3 * times
    assert capsule_diameter(volume, length) == pytest.approx(length * np.cbrt(times), rel=1e-6)
    assert capsule_diameter(np.pi / 6 * length**3 * (1 - 1e-9), length) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("function", [sphericity, capsule_diameter])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_a_volume_area_or_length_of_nothing_is_refused(function, value):
    with pytest.raises(ValueError, match=f"The volume is {value}, but a number above 0"):
        function(value, 1)
    with pytest.raises(ValueError, match=f"is {value}, but a number above 0"):
        function(1, value)


# --- the axis: edges first


@pytest.mark.parametrize("place", [(0, 0, 0), (2, 3, 4)])
def test_one_voxel_is_as_long_as_its_longest_edge(place):
    mask = np.zeros((3, 4, 5), bool)
    mask[place] = True
    axis = find_axis(mask, (8, 4, 2))
    assert axis.length_nm == pytest.approx(8, abs=0.1) and axis.total_length_nm == axis.length_nm
    assert axis.branches == 0 and axis.path.mean(axis=0) == pytest.approx((np.array(place) + 0.5) * (8, 4, 2), abs=0.1)


@pytest.mark.parametrize("size", [*SIZES, (4, 30, 9)])
def test_lines_of_voxels(size):
    for axis, number in ((0, 2), (1, 3), (2, 17), (0, 40)):
        mask = np.ones(np.where(np.arange(3) == axis, number, 1), bool)
        assert find_axis(mask, size).length_nm == pytest.approx(number * size[axis], abs=0.05 * min(size))
    diagonal = np.eye(9, dtype=bool)[None]  # connected by edges alone
    assert find_axis(diagonal, size).length_nm == pytest.approx(9 * np.hypot(*size[1:]), rel=0.05)


def test_a_plate_has_no_branches():
    """Where all is equally far from the boundary, a path may turn once instead of leading straight on."""
    for shape in ((1, 20, 20), (1, 30, 12), (3, 40, 40), (2, 50, 20)):
        axis = find_axis(np.ones(shape, bool), FLAT)
        assert axis.branches == 0 and axis.length_nm == pytest.approx(np.linalg.norm(np.multiply(shape, FLAT)), rel=0.1)


def test_the_path_is_where_the_object_is():
    mask = np.zeros((30, 20, 60), bool)
    mask[10:17, 4:11, 5:55] = True
    path = find_axis(mask, (2, 2, 2)).path
    middle = path[abs(path[:, 2] - 60) < 30]
    assert middle[:, :2] == pytest.approx(np.tile([27.0, 15.0], (len(middle), 1)), abs=1)
    assert sorted(path[[0, -1], 2]) == pytest.approx([10, 110], abs=1)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((3, 4, 5), bool), "The mask has 0 objects, but one was expected"),
        (np.eye(3, dtype=bool)[[0, 2]][:, None], "The mask has 2 objects"),
        (np.ones((3, 4), bool), "The mask is bool with 2 axes"),
        (np.ones((3, 4, 5), np.uint8), "The mask is uint8"),
    ],
)
def test_what_has_no_axis_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        find_axis(mask, (5, 5, 5))


# --- the axis of known shapes


@per_size
@pytest.mark.parametrize("radius", [4, 8, 12])
def test_the_length_of_capsules(size, radius):
    random = np.random.default_rng(radius)
    for times in (3, 4, 6, 9, 15):
        if radius * times <= 90:
            length = radius * times * UNIT[size]
            axis = find_axis(capsule(radius * UNIT[size], length, size, random) > 0, size)
            assert close(axis.length_nm, length, size), (times, axis.length_nm / length)
            assert axis.branches == 0 and axis.total_length_nm == axis.length_nm


@per_size
def test_the_length_of_bent_tubes_and_rings(size):
    random = np.random.default_rng(4)
    for times in (3, 4):
        radius = 5 * UNIT[size]
        half = find_axis(tubes([arc(times * radius, np.pi, turned(random))], radius, size, random) > 0, size)
        assert half.branches == 0 and close(half.length_nm, np.pi * times * radius + 2 * radius, size)
        ring = find_axis(tubes([arc(times * radius, 2 * np.pi, turned(random))], radius, size, random) > 0, size)
        assert ring.branches == 0 and ring.length_nm == pytest.approx(2 * np.pi * times * radius, rel=0.08)


STARS = {
    "Y": ([(0, 6), (2.09, 6), (4.19, 6)], 1),
    "T": ([(0, 7), (np.pi, 7), (np.pi / 2, 4)], 1),
    "cross": ([(0, 7), (np.pi, 7), (np.pi / 2, 5.5), (-np.pi / 2, 5.5)], 2),
    "stub": ([(0, 7), (np.pi, 7), (np.pi / 2, 1.3)], 0),
}


@per_size
@pytest.mark.parametrize("shape", STARS)
def test_branches(size, shape):
    arms, branches = STARS[shape]
    random, radius = np.random.default_rng(5), 5 * UNIT[size]
    for _ in range(2):
        axis = find_axis(star([(angle, length * radius) for angle, length in arms], radius, size, random) > 0, size)
        straight = (arms[0][1] + arms[1][1] + 2) * radius
        assert axis.branches == branches and close(axis.length_nm, straight, size)
        outside = sum(length + 1 for _, length in arms[2:]) * radius
        assert axis.total_length_nm - axis.length_nm == pytest.approx(outside * (branches > 0), abs=1.5 * radius)


@per_size
@pytest.mark.parametrize("half_axes", [(9, 9, 9), (16, 10, 8), (20, 12, 6), (20, 15, 5), (24, 8, 5)])
def test_ellipsoids_have_no_branches_smooth_or_rough(size, half_axes):
    random = np.random.default_rng(6)
    depth = ellipsoid(np.array(half_axes) * UNIT[size], size, random)
    axis = find_axis(depth > 0, size)
    assert axis.branches == 0 and axis.length_nm == pytest.approx(
        2 * max(half_axes) * UNIT[size], rel=0.05, abs=1.5 * max(size)
    )
    for by in (0.5, 1):
        assert find_axis(roughened(depth, by * min(size), random), size).branches == 0


@per_size
def test_rough_capsules_have_no_branches(size):
    random = np.random.default_rng(7)
    for radius, length in ((4, 16), (4, 40), (8, 48)):
        depth = capsule(radius * UNIT[size], length * UNIT[size], size, random)
        axes = [find_axis(roughened(depth, by * min(size), random), size) for by in (0.5, 1)]
        assert [axis.branches for axis in axes] == [0, 0]
        ends = 4 * max(size)  # the farthest voxels are those that noise has moved out most
        assert axes[0].length_nm == pytest.approx(length * UNIT[size], rel=0.05, abs=ends)


def test_large_objects_are_as_long_as_small_ones():
    random = np.random.default_rng(8)
    for size, radius in ((CUBIC, 18), (FLATTER, 240)):  # some 130,000 and 160,000 voxels, of which 30,000 remain
        axis = find_axis(capsule(radius, 8 * radius, size, random) > 0, size)
        assert axis.branches == 0 and axis.length_nm == pytest.approx(8 * radius, rel=0.02)
    thin = find_axis(np.ones((1, 400, 300), bool), CUBIC)  # of which no block of several slices is half full
    assert thin.length_nm == pytest.approx(500, rel=0.05) and thin.path[:, 0] == pytest.approx(0.5)
    assert find_axis(np.ones((1, 1, 70_001), bool), FLAT).length_nm == pytest.approx(4 * 70_001, abs=2)


# --- the axis of anything


@st.composite
def objects(draw):
    """The largest object of a mask of noise."""
    mask = draw(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)))
    mask.flat[draw(st.integers(0, mask.size - 1))] = True
    labels = ndimage.label(mask, CORNERS)[0]
    return labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1


@given(objects(), st.sampled_from(SIZES))
@settings(deadline=None, max_examples=60)
def test_any_object_has_an_axis(mask, size):
    mask.setflags(write=False)
    axis, again = find_axis(mask, size), find_axis(np.pad(mask, ((0, 0), (2, 0), (1, 3))), size)
    assert min(size) * 0.9 < axis.length_nm <= axis.total_length_nm and axis.branches >= 0
    assert (axis.path >= 0).all() and (axis.path <= np.multiply(mask.shape, size)).all()
    steps = np.linalg.norm(np.diff(axis.path, axis=0), axis=1)
    assert axis.length_nm == pytest.approx(steps.sum())
    assert again.length_nm == pytest.approx(axis.length_nm) and again.branches == axis.branches  # wherever it lies
    assert np.array_equal(find_axis(mask.copy(), size).path, axis.path)


@given(objects(), st.sampled_from(SIZES), st.sampled_from([0.125, 3, 10, 1000]))
@settings(deadline=None, max_examples=30)
def test_the_scale_of_voxels_is_that_of_lengths(mask, size, times):
    axis, scaled = find_axis(mask, size), find_axis(mask, [times * edge for edge in size])
    assert scaled.length_nm == pytest.approx(times * axis.length_nm, rel=1e-12) and scaled.branches == axis.branches
    assert scaled.total_length_nm == pytest.approx(times * axis.total_length_nm, rel=1e-12)
    assert scaled.path == pytest.approx(times * axis.path, rel=1e-9, abs=1e-9)


@given(st.integers(0, 1000), st.sampled_from(SIZES), st.permutations([0, 1, 2]), st.integers(0, 2))
@settings(deadline=None, max_examples=20)
def test_turned_objects_have_about_the_same_axis_and_parts(seed, size, order, flip):
    random = np.random.default_rng(seed)
    radius = 4 * UNIT[size]
    mask = star([(0, 7 * radius), (np.pi, 6 * radius), (1.3, 4.5 * radius)], radius, size, random) > 0
    turned_mask, turned_size = np.flip(mask, flip).transpose(order), [size[axis] for axis in order]
    axis, other = find_axis(mask, size), find_axis(turned_mask, turned_size)
    assert axis.branches == other.branches == 1
    assert other.length_nm == pytest.approx(axis.length_nm, rel=0.05)
    assert other.total_length_nm == pytest.approx(axis.total_length_nm, rel=0.08)
    assert surface_area(turned_mask, turned_size) == pytest.approx(surface_area(mask, size), rel=1e-9)
    assert split_touching(turned_mask, turned_size).max() == split_touching(mask, size).max() == 1


# --- touching objects


def balls(places, radius, size, random):
    return tubes([np.array([place, place]) for place in places], radius, size, random) > 0


def test_parts_of_next_to_nothing():
    assert split_touching(np.zeros((3, 4, 5), bool), FLAT).max() == 0
    assert np.array_equal(split_touching(np.ones((1, 1, 1), bool), FLAT), [[[1]]])
    assert (split_touching(np.ones((5, 6, 7), bool), FLAT) == 1).all()  # touches the border on all sides
    apart = np.eye(3, dtype=bool)[[2, 0]][:, None]
    labels = split_touching(apart, CUBIC)
    assert labels.dtype == np.int32 and labels[0, 0, 2] == 1 and labels[1, 0, 0] == 2


@per_size
@pytest.mark.parametrize("number", [2, 3])
def test_touching_balls_are_split_and_keep_their_volumes(size, number):
    random = np.random.default_rng(9)
    for radius in (5, 8):
        along = turned(random)[0] * 1.8 * radius * UNIT[size]
        mask = balls([along * step for step in range(number)], radius * UNIT[size], size, random)
        volumes = np.bincount(split_touching(mask, size)[mask])[1:]
        assert len(volumes) == number and volumes == pytest.approx(mask.sum() / number, rel=0.08)


@per_size
def test_a_small_ball_on_a_large_one_is_split(size):
    random = np.random.default_rng(10)
    centre = turned(random)[0] * 15 * UNIT[size]
    at = positions(np.full(3, -24 * UNIT[size]), np.full(3, 24 * UNIT[size]), size, random)
    large, small = (
        np.linalg.norm(at, axis=-1) <= 10 * UNIT[size],
        np.linalg.norm(at - centre, axis=-1) <= 6 * UNIT[size],
    )
    volumes = np.bincount(split_touching(large | small, size)[large | small])[1:]
    assert sorted(volumes) == pytest.approx([small.sum(), large.sum()], rel=0.08)


@per_size
@pytest.mark.parametrize("radius", [2, 4, 8])
def test_what_has_no_neck_stays_whole(size, radius):
    random = np.random.default_rng(radius)
    radius *= UNIT[size] if size != FLATTER else 20
    for depth in (
        ball(radius, size, random),
        capsule(radius, 5 * radius, size, random),
        tubes([arc(3 * radius, np.pi, turned(random))], radius, size, random),
        ellipsoid(np.array([2.5, 1.5, 1]) * radius, size, random),
    ):
        assert split_touching(depth > 0, size).max() == 1


def test_the_neck_says_how_thin_a_neck_is_cut():
    random = np.random.default_rng(11)
    mask = balls([np.zeros(3), np.array([3.0, 8, 11])], 10, CUBIC, random)  # 13.9 apart: a neck of 0.72 radii
    assert [split_touching(mask, CUBIC, neck=neck).max() for neck in (0.3, 0.6, 0.85)] == [1, 1, 2]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)), st.sampled_from(SIZES))
@settings(deadline=None, max_examples=60)
def test_parts_of_any_mask(mask, size):
    mask.setflags(write=False)
    labels = split_touching(mask, size)
    assert np.array_equal(labels > 0, mask)
    numbers, first = np.unique(labels[mask], return_index=True)
    assert np.array_equal(numbers, np.arange(1, len(numbers) + 1)) and (np.diff(first) > 0).all()
    assert all(ndimage.label(labels == number, CORNERS)[1] == 1 for number in numbers)
    assert labels.max() >= ndimage.label(mask, CORNERS)[1]
    assert np.array_equal(labels, split_touching(mask, [10 * edge for edge in size]))


@pytest.mark.parametrize("neck", [0, 1, -0.5, 1.5, np.nan])
def test_a_neck_that_is_no_share_is_refused(neck):
    with pytest.raises(ValueError, match=f"The neck is {neck}, but a share between 0 and 1"):
        split_touching(np.ones((3, 3, 3), bool), CUBIC, neck=neck)


# --- all of them


@pytest.mark.parametrize("function", [surface_area, find_axis, split_touching])
@pytest.mark.parametrize("size", [(5, 5), (5, 5, 0), (5, 5, -1), (5, 5, np.nan), (5, 5, np.inf), 5])
def test_a_voxel_size_of_something_else_is_refused(function, size):
    with pytest.raises(ValueError, match="three lengths in nm"):
        function(np.ones((3, 3, 3), bool), size)
    with pytest.raises(ValueError, match="three lengths in nm"):
        crofton_weights(size)


@pytest.mark.parametrize("function", [surface_area, split_touching])
def test_what_is_no_mask_is_refused(function):
    with pytest.raises(ValueError, match=r"The mask is int64 with 3 axes.*labels == 1"):
        function(np.ones((3, 3, 3), np.int64), CUBIC)
    with pytest.raises(ValueError, match="The mask is bool with 2 axes"):
        function(np.ones((3, 3), bool), CUBIC)
