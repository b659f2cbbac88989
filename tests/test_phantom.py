import hashlib
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core import _multiarray_umath as cpu
from scipy import ndimage

from mitoseg_lib import stacks
from mitoseg_lib.datasets import load_epfl, load_example
from mitoseg_lib.phantom import BUNDLED, Imaging, drawing, make_phantom
from mitoseg_lib.phantom.bundled import BUNDLED_FOREGROUND, BUNDLED_SHAPE
from mitoseg_lib.phantom.scene import make_scene
from mitoseg_lib.phantom.shapes import SmoothNoise, Stream, Tubes

DATA = Path(__file__).resolve().parents[1] / "data"
SMALL, SEED = (12, 96, 80), 5
SMALL_SHA256 = "9aa00ffd812839f325f36ca74ff24e3094c5c3734b7bfdbec3a866b9717ec544"
STILL = Imaging(drift_sd=0.0, damaged_slice=False)
ANY_DIRECTION = np.ones((3, 3, 3))

# What the real training stack shows, and how far a stack may be from it: about 10 %, correlations 0.04 to 0.06.
LIKE_TISSUE = {
    "mean": (129.5, 5.0),
    "sd": (30.5, 2.5),
    "percentile 1": (68.0, 7.0),
    "percentile 50": (131.0, 6.0),
    "percentile 99": (187.0, 8.0),
    "mean of mitochondria": (100.0, 5.0),
    "sd of mitochondria": (16.0, 1.6),
    "mean of the rest": (131.0, 5.0),
    "sd of the rest": (30.0, 3.0),
    "foreground, %": (5.45, 0.25),
    "next slice": (0.89, 0.04),
    "ten slices on": (0.39, 0.05),
    "1 pixel on": (0.89, 0.04),
    "2 pixels on": (0.83, 0.04),
    "4 pixels on": (0.69, 0.06),
    "8 pixels on": (0.44, 0.06),
    "profiles in a slice": (16.0, 4.0),
}


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def describe(stack):
    """The numbers that make a stack look like the real one."""
    grey, labels = stack.image.astype(np.float32), stack.labels
    lines = grey[::4]
    numbers = {
        "mean": grey.mean(dtype=float),
        "sd": grey.std(dtype=float),
        **{f"percentile {p}": float(np.percentile(stack.image, p)) for p in (1, 50, 99)},
        "mean of mitochondria": grey[labels].mean(dtype=float),
        "sd of mitochondria": grey[labels].std(dtype=float),
        "mean of the rest": grey[~labels].mean(dtype=float),
        "sd of the rest": grey[~labels].std(dtype=float),
        "foreground, %": 100 * labels.mean(),
        "next slice": np.mean([correlation(grey[z], grey[z + 1]) for z in range(0, len(grey) - 1, 4)]),
        "ten slices on": np.mean([correlation(grey[z], grey[z + 10]) for z in range(0, len(grey) - 10, 4)]),
        **{f"{n} pixel{'s' * (n > 1)} on": correlation(lines[:, :, :-n], lines[:, :, n:]) for n in (1, 2, 4, 8)},
        "profiles in a slice": np.mean([ndimage.label(mask, np.ones((3, 3)))[1] for mask in labels]),
    }
    return {name: float(value) for name, value in numbers.items()}


def unlike(numbers):
    """Those of the numbers that are too far from tissue."""
    return {
        name: (round(numbers[name], 3), target)
        for name, (target, tolerance) in LIKE_TISSUE.items()
        if abs(numbers[name] - target) > tolerance
    }


def digest(stack):
    return hashlib.sha256(stack.image.tobytes() + stack.labels.tobytes()).hexdigest()


def same(a, b):
    return np.array_equal(a.image, b.image) and np.array_equal(a.labels, b.labels)


def components(labels):
    """Separate mitochondria, numbered, and the voxels of each."""
    numbered, _ = ndimage.label(labels, ANY_DIRECTION)
    return numbered, np.bincount(numbered.ravel())[1:]


@pytest.fixture(scope="module")
def large():
    return make_phantom((64, 768, 1024), 1, imaging=STILL)


@pytest.fixture(scope="module")
def middling():
    return make_phantom((24, 240, 256), 3, foreground=0.08, imaging=STILL)


@pytest.fixture(scope="module")
def bundled():
    return {part: load_example(part) for part in BUNDLED}


# --- like tissue


def test_a_phantom_has_the_numbers_of_tissue(large):
    assert not unlike(describe(large))


def test_the_targets_are_those_of_the_real_stack(epfl_folder):
    assert not unlike(describe(load_epfl("training")))


def test_numbers_far_from_tissue_are_noticed(middling):
    flat = replace(middling, image=middling.image // 2)
    assert {"mean", "sd", "percentile 50"} <= unlike(describe(flat)).keys()


# --- what comes back


def test_shape_types_and_voxel_size():
    stack = make_phantom(SMALL, SEED, voxel_size_nm=(8, 6, 5))
    assert stack.image.shape == stack.labels.shape == SMALL
    assert (stack.image.dtype, stack.labels.dtype) == (np.uint8, np.bool_)
    assert stack.voxel_size_nm == (8.0, 6.0, 5.0)


@settings(deadline=None, max_examples=8)
@given(
    st.tuples(st.integers(8, 20), st.integers(64, 90), st.integers(64, 90)),
    st.integers(0, 2**40),
    st.floats(0.01, 0.25),
)
def test_any_small_stack_can_be_made(shape, seed, foreground):
    stack = make_phantom(shape, seed, foreground=foreground)
    assert stack.shape == shape
    assert stack.labels.mean() < 1.3 * foreground + 0.02
    assert stack.image.std() > 10


@pytest.mark.parametrize("foreground", [0.03, 0.08, 0.15])
def test_the_share_of_mitochondria_is_as_asked(foreground):
    scene_labels = make_phantom((16, 256, 256), 2, foreground=foreground, imaging=STILL).labels
    assert scene_labels.mean() == pytest.approx(foreground, rel=0.12)


def test_labels_are_exactly_the_voxels_painted(monkeypatch):
    """Mitochondria painted white, everything else black, with no blur and no noise, are the labels."""

    def white(self, grey, number, grain):
        _, own = painted(self, grey, number, grain)
        return np.where(own, 255.0, grey), own

    painted = drawing.Block._with_mitochondrion
    perfect = Imaging(blur_nm=0.0, shot_noise=0.0, readout_noise=0.0, drift_sd=0.0, damaged_slice=False)
    scene = (24, 160, 160), 3
    before = make_phantom(*scene, foreground=0.1, imaging=perfect)
    monkeypatch.setattr(drawing.Block, "_with_mitochondrion", white)
    after = make_phantom(*scene, foreground=0.1, imaging=perfect)
    changed = before.image != after.image
    assert after.labels.any() and np.array_equal(before.labels, after.labels)
    assert np.array_equal(changed & ~after.labels, np.zeros_like(changed))
    assert (after.image[after.labels] > 250).mean() > 0.99  # no vesicle or thread is drawn over them


def test_every_mitochondrion_is_darker_than_its_surroundings(large, middling, bundled):
    for stack in (large, middling, *bundled.values()):
        numbered, sizes = components(stack.labels)
        for number, box in enumerate(ndimage.find_objects(numbered), start=1):
            if sizes[number - 1] < 3000:
                continue  # a corner cut off by the border, with little around it
            wide = tuple(slice(max(s.start - 20, 0), s.stop + 20) for s in box)
            own = numbered[wide] == number
            around = ndimage.binary_dilation(own, iterations=20) & (numbered[wide] == 0)
            assert stack.image[wide][own].mean() < stack.image[wide][around].mean() - 5


def test_what_fools_a_network_is_there():
    scene = make_scene(BUNDLED_SHAPE, np.full(3, 5.0), BUNDLED["train"][0], BUNDLED_FOREGROUND)
    balls = [s for s in scene.small if np.array_equal(s.start, s.end)]
    threads = [s for s in scene.small if not np.array_equal(s.start, s.end)]
    assert (scene.sheath > 0).sum() == 1  # myelin
    assert len(scene.synapses) >= 2
    assert sum(s.radius < 25 for s in balls) > 100 and any(s.radius > 30 for s in balls)  # vesicles, dark bodies
    assert sum(s.radius < 12 for s in threads) > 20 and sum(s.radius > 15 for s in threads) > 20  # microtubules, ER


# --- the microscope


def test_the_damaged_slice_stands_out():
    shape, seed = (20, 96, 96), 4
    still, damaged = (
        make_phantom(shape, seed, imaging=replace(STILL, damaged_slice=d)).image.astype(float) for d in (False, True)
    )
    changed = np.flatnonzero((still != damaged).any(axis=(1, 2)))
    assert len(changed) == 1 and 5 <= changed[0] < 15
    noise = np.diff(damaged, axis=2).std(axis=(1, 2))
    assert noise.argmax() == changed[0] and noise[changed[0]] > 1.4 * np.median(noise)


@pytest.mark.parametrize("sd", [0.0, 3.0, 8.0])
def test_the_drift_of_brightness_is_as_asked(sd):
    still, drifting = (
        make_phantom((30, 64, 64), 9, imaging=replace(STILL, drift_sd=d)).image.astype(float) for d in (0.0, sd)
    )
    added = (drifting - still).mean(axis=(1, 2))
    assert added.std() == pytest.approx(sd, rel=0.03) and abs(added.mean()) < 0.1


def test_each_imaging_parameter_does_what_it_says():
    def grey(**changes):
        return make_phantom((8, 96, 96), 1, imaging=replace(STILL, **changes)).image.astype(float)

    def grain(image):
        return np.diff(image, axis=2).std()

    plain = grey()
    assert grey(brightness=20).mean() == pytest.approx(plain.mean() + 20, abs=0.5)
    assert grey(contrast=0.5).std() < 0.75 * plain.std()
    assert grain(grey(shot_noise=0, readout_noise=0)) < grain(plain) < grain(grey(readout_noise=15))
    assert grain(plain) < grain(grey(shot_noise=15))
    sharp, blurred = (grey(blur_nm=b, shot_noise=0, readout_noise=0) for b in (3, 15))
    assert blurred.std() < 0.8 * sharp.std()


# --- the same everywhere


def test_equal_arguments_give_equal_stacks_and_other_seeds_others():
    first = make_phantom(SMALL, SEED)
    assert same(first, make_phantom(SMALL, np.int64(SEED)))
    other = make_phantom(SMALL, SEED + 1)
    assert not np.array_equal(first.image, other.image) and not np.array_equal(first.labels, other.labels)
    assert abs(correlation(first.image.astype(float), other.image.astype(float))) < 0.3


def test_a_small_phantom_has_the_sha256_recorded():
    assert digest(make_phantom(SMALL, SEED)) == SMALL_SHA256


def test_another_processor_makes_the_same():
    """A processor without the newer instructions, as NumPy sees it, and a single thread."""
    optional = [name for name in cpu.__cpu_dispatch__ if cpu.__cpu_features__.get(name)]
    code = (
        "import hashlib; from numpy._core import _multiarray_umath as cpu;"
        "from mitoseg_lib.phantom import make_phantom;"
        f"s = make_phantom({SMALL}, {SEED});"
        f"print(sum(cpu.__cpu_features__[name] for name in {optional}),"
        "hashlib.sha256(s.image.tobytes() + s.labels.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(optional), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["0", SMALL_SHA256], done.stderr


def test_slices_alone_are_those_of_the_whole():
    whole = make_phantom((20, 80, 72), 6)
    for some in (range(0, 3), range(9, 12), range(17, 20)):
        part = make_phantom((20, 80, 72), 6, slices=some)
        assert same(part, whole.slices(some))


# --- arguments that make no sense


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"shape": (7, 64, 64)}, "shape"),
        ({"shape": (8, 64)}, "shape"),
        ({"shape": (8, 64, 64.5)}, "shape"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"foreground": 0.0}, "foreground"),
        ({"foreground": 0.5}, "foreground"),
        ({"foreground": float("nan")}, "foreground"),
        ({"voxel_size_nm": (5, 5)}, "voxel_size_nm"),
        ({"voxel_size_nm": (5, 5, 0)}, "voxel_size_nm"),
        ({"shape": (100, 1000, 1000), "voxel_size_nm": (9, 9, 9)}, "micrometres"),
        ({"slices": range(5, 9)}, "slices"),
        ({"slices": range(0, 8, 2)}, "slices"),
        ({"slices": range(4, 4)}, "slices"),
    ],
)
def test_arguments_out_of_range_are_one_sentence(arguments, word):
    given = {"shape": (8, 64, 64), "seed": 0} | arguments
    with pytest.raises(ValueError, match=word) as error:
        make_phantom(given.pop("shape"), given.pop("seed"), **given)
    assert str(error.value).endswith(".") and str(error.value).count(". ") == 0


@pytest.mark.parametrize("wrong", [{"contrast": 0.0}, {"blur_nm": -1.0}, {"shot_noise": float("nan")}])
def test_imaging_out_of_range_is_one_sentence(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Imaging(**wrong)


# --- the building blocks


def test_the_streams_numbers_are_spread_as_they_should_be():
    stream = Stream(1, 2)
    uniform, normal = stream.uniform(-1, 3, 100_000), stream.normal(100_000)
    assert -1 <= uniform.min() < -0.99 and 2.99 < uniform.max() < 3
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.01
    assert (np.abs(normal) < 1).mean() == pytest.approx(0.683, abs=0.01)
    assert (np.abs(normal) > 3).mean() == pytest.approx(0.0027, abs=0.0015)
    assert np.array_equal(Stream(1, 2).uniform(-1, 3, 100_000), uniform)
    assert not np.array_equal(Stream(1, 3).uniform(-1, 3, 100_000), uniform)


def test_smooth_noise_is_the_same_on_a_grid_and_at_points():
    noise = SmoothNoise(np.zeros(3), np.full(3, 100.0), 12.0, Stream(3), channels=2)
    axes = [np.linspace(1, 99, n) for n in (5, 7, 9)]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    assert np.allclose(noise.on_axes(axes).reshape(2, -1), noise.at(points), atol=1e-12)
    assert 0.7 < noise.on_axes([np.linspace(0, 100, 30)] * 3).std() < 1.3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_the_two_nearest_tubes_are_found_among_all(seed):
    """Leaving out what is far away changes nothing: checked against every tube at every point."""
    stream = Stream(seed)
    tubes = Tubes.none()
    for _ in range(12):
        path, radii = stream.uniform(0, 900, (4, 3)), stream.uniform(20, 90, 4)
        tubes = tubes.with_tube(path, radii, stream.direction(), float(stream.uniform(1, 2.2)))
    axes = [300.0 + 8 * np.arange(n) for n in (7, 13, 15)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    owner, other, gap = tubes.two_nearest(points, 60.0)
    every = np.stack([tubes.surface(points, number) for number in range(12)] + [np.full(points.shape[1:], 60.0)])
    order = np.argsort(every, axis=0, kind="stable")[:2]
    ranked = np.take_along_axis(every, order, axis=0)
    order[order == 12] = -1
    assert np.array_equal(owner, order[0]) and np.allclose(gap, ranked[1] - ranked[0])
    assert np.array_equal(other[gap > 1e-9], order[1][gap > 1e-9])


def test_distance_from_a_tube_by_hand():
    tube = Tubes.none().with_tube(np.array([[0.0, 0, 0], [0, 0, 100]]), np.array([10.0, 20.0]))
    points = np.array([[0.0, 30, 50], [0, 0, -25], [0, 0, 150], [0, 5, 0]]).T
    assert tube.surface(points, 0) == pytest.approx([15, 15, 30, -5])
    flat = Tubes.none().with_tube(
        np.array([[0.0, 0, 0], [0, 0, 100]]), np.array([20.0, 20.0]), np.array([1.0, 0, 0]), 2.0
    )
    assert flat.surface(np.array([[10.0, 0, 50], [0, 20, 50]]).T, 0) == pytest.approx([0, 0])


# --- the bundled files


def test_the_bundled_stacks_are_what_the_course_needs(bundled):
    assert sum((DATA / name).stat().st_size for name in os.listdir(DATA) if name.endswith(".tif")) <= 20e6
    for part, stack in bundled.items():
        numbered, sizes = components(stack.labels)
        assert stack.shape == BUNDLED_SHAPE and stack.voxel_size_nm == pytest.approx((5.0, 5.0, 5.0))
        assert 0.085 < stack.labels.mean() < 0.115
        assert len(sizes) >= 12 and sizes.min() > 1500, part
        assert len(np.unique(numbered[51:60])) - 1 >= 4
        assert stack.labels.mean(axis=(1, 2)).min() > 0.06


def test_the_test_stack_has_another_contrast_and_more_noise(bundled):
    train, test = bundled["train"], bundled["test"]

    def contrast(stack):
        return stack.image[~stack.labels].mean() - stack.image[stack.labels].mean()

    def noise(stack):
        return np.median(np.abs(np.diff(stack.image.astype(float), n=2, axis=2)))

    assert contrast(test) < 0.92 * contrast(train)
    assert noise(test) > 1.2 * noise(train)


@pytest.mark.parametrize("part", BUNDLED)
def test_the_command_makes_the_bundled_files_again(part, bundled):
    """The same call as the command's, for some slices: `make_phantom` gives the same with and without `slices`."""
    seed, imaging = BUNDLED[part]
    some = range(28, 31)
    again = make_phantom(BUNDLED_SHAPE, seed, foreground=BUNDLED_FOREGROUND, imaging=imaging, slices=some)
    assert same(again, bundled[part].slices(some))


def test_the_command_writes_files_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.phantom.bundled.BUNDLED_SHAPE", (8, 64, 72))
    monkeypatch.setattr(sys, "argv", ["phantom", str(tmp_path / "new")])
    runpy.run_module("mitoseg_lib.phantom", run_name="__main__")
    for part, (seed, imaging) in BUNDLED.items():
        image, labels = tmp_path / "new" / f"phantom_{part}.tif", tmp_path / "new" / f"phantom_{part}_labels.tif"
        stack = stacks.load_stack(image, labels)
        assert same(stack, make_phantom((8, 64, 72), seed, foreground=BUNDLED_FOREGROUND, imaging=imaging))
        assert stack.voxel_size_nm == pytest.approx((5.0, 5.0, 5.0))
        assert set(np.unique(tifffile.imread(labels))) <= {0, 255}
    with tifffile.TiffFile(tmp_path / "new" / "phantom_train.tif") as file:
        assert file.is_imagej and file.imagej_metadata["unit"] == "um" and file.pages[0].compression == 8


def test_the_readme_has_the_sha256_of_each_file():
    text = (DATA / "README.md").read_text()
    for path in DATA.glob("*.tif"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text, path.name
