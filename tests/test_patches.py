import hashlib
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mitoseg_lib.patches import (
    MiddleSlices,
    PatchDataset,
    elastic_augmentation,
    in_turn,
    rotate,
    slice_drift,
    train_augmentation,
    turn_block,
)
from mitoseg_lib.splits import block_split
from mitoseg_lib.stacks import Stack, StackError

EVERYTHING = {"noise": 8.0, "brightness_contrast": 0.2, "scale": 0.3}


def coded_stack(shape=(5, 6, 7)):
    """A stack in which the grey level of each voxel tells where it is."""
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    return Stack(image, image % 3 == 0)


def noisy_stack(shape=(4, 60, 70), seed=0):
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, bool)
    labels[1:3, 10:30, 20:50] = True
    return Stack(rng.integers(0, 256, shape, dtype=np.uint8), labels)


def grey(image):
    """The grey levels of a dataset's image, uint8 (y, x)."""
    return (image[0] * 255).round().to(torch.uint8).numpy()


def same(items, others):
    pairs = zip(items, others, strict=True)
    return all(torch.equal(a, b) for item, other in pairs for a, b in zip(item, other, strict=True))


# --- what an item is


def test_an_item_is_a_patch_of_the_stack_and_its_mask():
    stack = coded_stack()
    seen = set()
    for image, mask in PatchDataset(stack, patch_size=(3, 2), patches_per_epoch=600):
        assert (image.shape, image.dtype) == ((1, 3, 2), torch.float32)
        assert (mask.shape, mask.dtype) == ((1, 3, 2), torch.float32)
        z, y, x = (int(i) for i in np.unravel_index(int(grey(image)[0, 0]), stack.shape))
        assert np.array_equal(grey(image), stack.image[z, y : y + 3, x : x + 2])
        assert np.array_equal(mask[0].numpy(), stack.labels[z, y : y + 3, x : x + 2])
        seen.add((z, y, x))
    assert len(seen) == 5 * 4 * 6  # every place there is


def test_images_lie_in_0_to_1():
    image = np.zeros((1, 4, 4), np.uint8)
    image[0, 0, 0] = 255
    stack = Stack(image, image > 0)
    patch = PatchDataset(stack, patch_size=4, patches_per_epoch=1)[0][0]
    assert (patch.min(), patch.max()) == (0, 1)


def test_length_and_indices():
    dataset = PatchDataset(coded_stack(), patch_size=4, patches_per_epoch=7)
    assert len(dataset) == len(list(dataset)) == 7
    for index in (-1, 7):
        with pytest.raises(IndexError, match="patches 0 to 6"):
            dataset[index]


def test_a_dataset_of_the_training_slices_never_shows_a_validation_slice():
    stack = coded_stack((12, 4, 4))
    split = block_split(12, gap=2)
    dataset = PatchDataset(stack.slices(split.train), patch_size=2, patches_per_epoch=400)
    slices = {int(grey(image)[0, 0]) // 16 for image, _ in dataset}
    assert slices == set(split.train)


def test_the_stack_stays_as_it_is():
    stack = noisy_stack()
    before = stack.image.copy(), stack.labels.copy()

    def vandal(image, mask, rng):
        image[:], mask[:] = 0, True
        return image, mask

    for augmentation in (None, vandal, train_augmentation(**EVERYTHING)):
        for image, mask in PatchDataset(stack, patch_size=70, patches_per_epoch=8, augmentation=augmentation):
            image[:], mask[:] = 7, 7
    assert np.array_equal(stack.image, before[0])
    assert np.array_equal(stack.labels, before[1])


# --- patches larger than the slices


@given(
    plane=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    patch=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_patches_are_cut_from_the_reflected_slice(plane, patch, seed):
    image = np.arange(plane[0] * plane[1], dtype=np.uint8).reshape(1, *plane)
    stack = Stack(np.concatenate([image, image + 100]), np.concatenate([image >= 0, image < 0]))
    found = PatchDataset(stack, patch_size=patch, patches_per_epoch=1, seed=seed, foreground_share=1.0)[0]
    wide = [(max(0, p - n),) * 2 for n, p in zip(plane, patch, strict=True)]
    padded = np.pad(image[0], wide, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, patch)
    assert (windows == grey(found[0])).all(axis=(2, 3)).any()
    assert found[1].all()


def test_a_slice_smaller_than_the_patch_lies_in_it_whole_at_random_places():
    stack = coded_stack((1, 3, 4))
    places = set()
    for image, _ in PatchDataset(stack, patch_size=5, patches_per_epoch=60):
        assert set(np.unique(grey(image))) == set(range(12))
        places.add(grey(image).tobytes())
    assert len(places) == 3 * 2


# --- blocks


def block_place(image, stack):
    """Where a block of a coded stack was cut, by its first grey level."""
    return tuple(int(i) for i in np.unravel_index(int(grey(image)[0, 0, 0]), stack.shape))


def test_an_item_can_be_a_block_of_the_stack_and_its_mask():
    stack = coded_stack()
    seen = set()
    for image, mask in PatchDataset(stack, patch_size=(2, 3, 4), patches_per_epoch=900):
        assert (image.shape, image.dtype) == ((1, 2, 3, 4), torch.float32)
        assert (mask.shape, mask.dtype) == ((1, 2, 3, 4), torch.float32)
        z, y, x = block_place(image, stack)
        there = np.s_[z : z + 2, y : y + 3, x : x + 4]
        assert np.array_equal(grey(image), stack.image[there])
        assert np.array_equal(mask[0].numpy(), stack.labels[there])
        seen.add((z, y, x))
    assert len(seen) == 4 * 4 * 4  # every place there is


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_blocks_are_cut_from_the_reflected_stack(shape, block, seed):
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    labels = image % 2 == 0 if image.size > 1 else image == 0
    wide = Stack(image, labels) if not labels.all() else None
    if wide is None:  # one class only: no stack to train on
        return
    found = PatchDataset(wide, patch_size=block, patches_per_epoch=1, seed=seed)[0]
    margins = [(max(0, b - n),) * 2 for n, b in zip(shape, block, strict=True)]
    padded = [np.pad(volume, margins, mode="reflect") for volume in (image, labels)]
    windows = [np.lib.stride_tricks.sliding_window_view(volume, block) for volume in padded]
    same_image = (windows[0] == grey(found[0])).all(axis=(3, 4, 5))
    same_mask = (windows[1] == found[1][0].numpy().astype(bool)).all(axis=(3, 4, 5))
    assert (same_image & same_mask).any()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_promised_share_of_blocks_holds_foreground(share):
    dataset = PatchDataset(
        lonely_stack(), patch_size=(3, 8, 8), patches_per_epoch=50, foreground_share=share, augmentation=turn_block
    )
    with_foreground = sum(bool(mask.any()) for _, mask in dataset)
    assert np.ceil(share * 50) <= with_foreground <= np.ceil(share * 50) + 3


def test_the_foreground_voxel_is_anywhere_in_its_block():
    labels = np.zeros((20, 20, 20), bool)
    labels[10, 10, 10] = True
    stack = Stack(np.zeros(labels.shape, np.uint8), labels)
    dataset = PatchDataset(stack, patch_size=(2, 3, 2), patches_per_epoch=200, foreground_share=1.0)
    assert {int(mask.argmax()) for _, mask in dataset} == set(range(12))


def test_blocks_are_a_batch_for_a_3d_network():
    dataset = PatchDataset(noisy_stack(), patch_size=(4, 16, 16), patches_per_epoch=6, seed=2, augmentation=turn_block)
    (images, masks), (again, _) = (next(iter(DataLoader(dataset, batch_size=6, num_workers=n))) for n in (0, 2))
    assert images.shape == masks.shape == (6, 1, 4, 16, 16)
    assert torch.equal(images, again)
    dataset.set_epoch(1)
    assert not torch.equal(images, next(iter(DataLoader(dataset, batch_size=6)))[0])


def test_squares_are_what_they_were_before_there_were_blocks():
    """Recorded runs name a seed: it must go on giving the patches that it gave."""
    z, y, x = np.indices((3, 20, 24))
    stack = Stack(((37 * z + 11 * y + 5 * x) % 256).astype(np.uint8), (y + x + z) % 7 == 0)
    digest = hashlib.sha256()
    for size in (8, (5, 9), (40, 40)):
        augmentation = None if size == (5, 9) else train_augmentation()
        dataset = PatchDataset(
            stack, patch_size=size, patches_per_epoch=12, seed=3, augmentation=augmentation, foreground_share=0.25
        )
        for epoch in (0, 2):
            dataset.set_epoch(epoch)
            for tensor in itertools.chain.from_iterable(dataset):
                digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "47c44222749d5a8d022cdb22e90f95229af066b501e62257e0050cfd85452576"


# --- purity


def test_an_item_depends_on_seed_epoch_and_index_alone():
    def fresh(seed=5, augmentation=None):
        augmentation = augmentation or train_augmentation(**EVERYTHING)
        return PatchDataset(
            noisy_stack(),
            patch_size=32,
            patches_per_epoch=6,
            seed=seed,
            augmentation=augmentation,
            foreground_share=0.5,
        )

    first, second = fresh(), fresh()
    first.set_epoch(3)
    items = [first[i] for i in range(6)]
    second.set_epoch(9)
    for i in (4, 0, 0):
        _ = second[i]
    np.random.seed(1)
    torch.manual_seed(1)
    second.set_epoch(3)
    assert same(items, [second[i] for i in reversed(range(6))][::-1])
    assert len({item[0].numpy().tobytes() for item in items}) == 6
    second.set_epoch(4)
    assert not same(items, list(second))
    other = fresh(seed=6)
    other.set_epoch(3)
    assert not same(items, list(other))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("start", "workers"), [("fork", 4), ("spawn", 2)])
def test_workers_that_live_on_give_the_items_of_each_epoch(start, workers):
    if start == "fork" and sys.platform == "win32":
        pytest.skip("Windows can't fork")
    dataset = PatchDataset(
        noisy_stack(),
        patch_size=48,
        patches_per_epoch=20,
        augmentation=train_augmentation(**EVERYTHING),
        foreground_share=0.25,
    )
    loader = DataLoader(
        dataset, batch_size=3, num_workers=workers, persistent_workers=True, multiprocessing_context=start
    )
    for epoch in (0, 1, 7):
        dataset.set_epoch(epoch)
        batches = list(loader)
        assert same(batches, list(DataLoader(dataset, batch_size=3)))
    assert batches[0][0].shape == (3, 1, 48, 48)


def test_a_dataset_can_be_pickled():
    dataset = PatchDataset(
        noisy_stack(), patch_size=16, patches_per_epoch=3, augmentation=train_augmentation(**EVERYTHING)
    )
    dataset.set_epoch(2)
    assert same(dataset, pickle.loads(pickle.dumps(dataset)))


# --- patches with foreground


def lonely_stack():
    """One foreground voxel, in a corner of a slice: the hardest to keep."""
    labels = np.zeros((6, 40, 50), bool)
    labels[4, 0, 49] = True
    return Stack(np.full(labels.shape, 128, np.uint8), labels)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_at_least_the_promised_share_of_patches_holds_foreground(share):
    augmentation = train_augmentation(scale=4.0)
    dataset = PatchDataset(
        lonely_stack(), patch_size=8, patches_per_epoch=50, augmentation=augmentation, foreground_share=share
    )
    with_foreground = [bool(mask.any()) for _, mask in dataset]
    # By chance alone nearly none of the patches meets the voxel.
    assert np.ceil(share * 50) <= sum(with_foreground) <= np.ceil(share * 50) + 1
    if share == 0.5:  # spread evenly, so that each batch has its share
        assert all(5 <= sum(with_foreground[i : i + 10]) <= 6 for i in range(0, 50, 10))


def test_the_foreground_voxel_is_anywhere_in_its_patch():
    labels = np.zeros((1, 40, 40), bool)
    labels[0, 20, 20] = True
    stack = Stack(np.zeros(labels.shape, np.uint8), labels)
    dataset = PatchDataset(stack, patch_size=3, patches_per_epoch=200, foreground_share=1.0)
    places = [int(mask.argmax()) for _, mask in dataset]
    assert set(places) == set(range(9))


def test_every_foreground_voxel_is_equally_likely():
    labels = np.zeros((3, 5, 9), bool)
    labels[0, 4, 8] = labels[1, 0, 0] = True
    labels[2, 2, 3:5] = True
    image = np.arange(labels.size, dtype=np.uint8).reshape(labels.shape)
    dataset = PatchDataset(Stack(image, labels), patch_size=1, patches_per_epoch=2000, foreground_share=1.0)
    found, counts = np.unique([int(grey(image)[0, 0]) for image, _ in dataset], return_counts=True)
    assert np.array_equal(found, np.flatnonzero(labels))
    assert counts.min() > 400  # 500 expected, sd 19


# --- augmentation


def example(side=64):
    """An image without symmetry, and its bright half as the mask."""
    y, x = np.mgrid[:side, :side]
    image = (3 * y + x).astype(np.float64)
    image = (255 * image / image.max()).astype(np.uint8)
    return image, image > 127


def test_the_same_seed_gives_the_same_and_another_seed_another():
    augmentation = train_augmentation(**EVERYTHING)
    image, mask = example()
    for seed in range(5):
        first, again = augmentation(image, mask, seed), augmentation(image, mask, seed)
        by_generator = augmentation(image, mask, np.random.default_rng(seed))
        for other in (again, by_generator):
            assert np.array_equal(first[0], other[0])
            assert np.array_equal(first[1], other[1])
        assert not np.array_equal(first[0], augmentation(image, mask, seed + 100)[0])


@pytest.mark.parametrize(
    ("switches", "n_expected"),
    [
        ({"flips": True, "quarter_turns": True}, 8),
        ({"flips": True, "quarter_turns": False}, 4),
        ({"flips": False, "quarter_turns": True}, 4),
        ({"flips": False, "quarter_turns": False}, 1),
    ],
)
def test_flips_and_quarter_turns_reach_every_orientation_equally_often(switches, n_expected):
    # Seeded the obvious way, albumentations flips both axes or none (each transform gets the same seed).
    augmentation = train_augmentation(**switches)
    image, mask = example(8)
    rng = np.random.default_rng(0)
    results = [augmentation(image, mask, rng) for _ in range(800)]
    orientations, counts = np.unique([result[0] for result in results], axis=0, return_counts=True)
    assert len(orientations) == n_expected
    assert counts.min() > 0.6 * 800 / n_expected
    for new_image, new_mask in results:
        assert np.array_equal(new_mask, new_image > 127)
        assert sorted(new_image.ravel()) == sorted(image.ravel())


def test_flips_keep_a_patch_that_is_not_square():
    image, mask = (array[:40] for array in example())
    new_image, new_mask = train_augmentation(quarter_turns=False)(image, mask, 0)
    assert new_image.shape == new_mask.shape == (40, 64)


@given(
    side=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    noise=st.floats(0, 255),
    brightness_contrast=st.floats(0, 1),
    scale=st.floats(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_the_result_is_an_image_and_a_mask_of_the_same_shape(side, seed, noise, brightness_contrast, scale):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (side, side), dtype=np.uint8)
    mask = image > 200
    augmentation = train_augmentation(noise=noise, brightness_contrast=brightness_contrast, scale=scale)
    new_image, new_mask = augmentation(image, mask, rng)
    assert (new_image.shape, new_image.dtype) == (image.shape, np.uint8)
    assert (new_mask.shape, new_mask.dtype) == (mask.shape, np.bool_)
    assert set(np.unique(new_mask.view(np.uint8))) <= {0, 1}
    if not mask.any():
        assert not new_mask.any()


def still(**switches):
    return train_augmentation(flips=False, quarter_turns=False, **switches)


def test_noise_has_an_sd_of_up_to_the_given_grey_levels_and_leaves_the_mask():
    image = np.full((200, 200), 128, np.uint8)
    mask = example(200)[1]
    results = [still(noise=10.0)(image, mask, seed) for seed in range(40)]
    sds = [result[0].std() for result in results]
    assert max(sds) < 10.3
    assert max(sds) > 8 > 2 > min(sds)
    assert all(abs(result[0].mean() - 128) < 0.5 for result in results)
    assert all(np.array_equal(result[1], mask) for result in results)


def test_brightness_and_contrast_map_grey_levels_along_a_line_and_leave_the_mask():
    image, mask = example()
    low, high = np.uint8(100), np.uint8(140)
    image = np.where(mask, high, low)
    results = [still(brightness_contrast=0.1)(image, mask, seed) for seed in range(60)]
    assert all(np.array_equal(result[1], mask) for result in results)
    levels = np.array([(result[0][~mask].max(), result[0][mask].max()) for result in results], float)
    slopes = (levels[:, 1] - levels[:, 0]) / 40
    shifts = levels[:, 0] - 100 * slopes
    assert 0.87 < slopes.min() < 0.95 < 1.05 < slopes.max() < 1.13  # grey levels are rounded
    assert -29 < shifts.min() < -15 < 15 < shifts.max() < 29  # 25.5, and the rounding times 100


def test_scale_zooms_in_and_out_around_the_centre_and_the_mask_follows():
    y, x = np.mgrid[:151, :151] - 75  # large enough that no reflection of the mask comes in
    mask = (abs(y) <= 30) & (abs(x) <= 15)
    image = np.where(mask, np.uint8(200), np.uint8(50))
    factors = []
    for seed in range(60):
        new_image, new_mask = still(scale=0.5)(image, mask, seed)
        rows, columns = np.flatnonzero(new_mask.any(1)), np.flatnonzero(new_mask.any(0))
        assert abs(rows.mean() - 75) <= 1
        assert abs(columns.mean() - 75) <= 1
        assert abs(len(rows) / 61 - len(columns) / 31) < 0.06  # one factor for both axes
        assert ((new_image > 125) != new_mask).mean() < 0.01
        factors.append(len(rows) / 61)
    assert 1 / 1.53 < min(factors) < 0.75 < 1.35 < max(factors) < 1.53


def test_a_zoom_out_is_filled_by_reflection():
    image, mask = np.full((50, 50), 77, np.uint8), np.ones((50, 50), bool)
    for seed in range(10):
        new_image, new_mask = still(scale=1.0)(image, mask, seed)
        assert (new_image == 77).all()
        assert new_mask.all()


# --- blocks laid down in another way


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 10_000))
@settings(deadline=None)
def test_a_turned_block_is_the_same_voxels_and_the_mask_goes_where_the_image_goes(shape, seed):
    image = np.random.default_rng(seed).permutation(np.arange(np.prod(shape), dtype=np.uint16) % 256).astype(np.uint8)
    image = image.reshape(shape)
    mask = image % 3 == 0
    before = image.copy(), mask.copy()
    new_image, new_mask = turn_block(image, mask, np.random.default_rng(seed))
    assert (new_image.shape, new_image.dtype) == (shape, np.uint8)
    assert (new_mask.shape, new_mask.dtype) == (shape, np.bool_)
    assert np.array_equal(new_mask, new_image % 3 == 0)
    assert np.array_equal(np.sort(new_image, axis=None), np.sort(image, axis=None))
    again = turn_block(image, mask, np.random.default_rng(seed))
    assert np.array_equal(new_image, again[0]) and np.array_equal(new_mask, again[1])
    new_image[...], new_mask[...] = 0, True
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])


def all_ways(block):
    """Every flip of every swap of axes that keeps the shape."""
    for axes in itertools.permutations(range(block.ndim)):
        moved = block.transpose(axes)
        if moved.shape == block.shape:
            for steps in itertools.product((1, -1), repeat=block.ndim):
                yield moved[tuple(slice(None, None, step) for step in steps)].tobytes()


@pytest.mark.parametrize(("shape", "n_ways"), [((3, 3, 3), 48), ((2, 3, 3), 16), ((2, 3, 4), 8), ((3, 3), 8)])
def test_every_way_to_lay_down_a_block_is_equally_likely(shape, n_ways):
    block = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    rng = np.random.default_rng(0)
    n_drawn = 100 * n_ways
    counts = dict.fromkeys(all_ways(block), 0)
    assert len(counts) == n_ways
    for _ in range(n_drawn):
        counts[turn_block(block, block > 0, rng)[0].tobytes()] += 1  # a KeyError would be a way that isn't one
    assert 55 < min(counts.values()) <= max(counts.values()) < 145  # 100 expected, sd 10


def test_a_block_and_another_blocks_mask():
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and the mask \(2, 3, 4\)"):
        turn_block(np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3, 4), bool), np.random.default_rng(0))


# --- free rotation


@pytest.mark.parametrize("side", [16, 17])
@pytest.mark.parametrize("border", ["reflect", "constant"])
def test_a_rotation_by_quarter_turns_is_exact(side, border):
    image, mask = example(side)
    for turns in range(-2, 3):
        new_image, new_mask = rotate(image, mask, 90 * turns, border=border)
        assert np.array_equal(new_image, np.rot90(image, turns))
        assert np.array_equal(new_mask, np.rot90(mask, turns))


def test_a_constant_border_leaves_black_corners_and_a_reflected_one_none():
    image, mask = np.full((64, 64), 100, np.uint8), np.ones((64, 64), bool)
    black_image, black_mask = rotate(image, mask, 45, border="constant")
    full_image, full_mask = rotate(image, mask, 45)
    assert black_image[0, 0] == black_image[-1, 0] == 0
    assert not black_mask[0, 0]
    assert 0.12 < (black_image == 0).mean() < 0.20  # 1 - 2 (sqrt(2) - 1) = 0.17 lies outside
    assert (full_image == 100).all()
    assert full_mask.all()


def test_the_rotation_of_a_patch_can_be_an_augmentation():
    def turned(image, mask, rng):
        return rotate(image, mask, rng.uniform(-180, 180), border="constant")

    dataset = PatchDataset(noisy_stack(), patch_size=32, patches_per_epoch=3, augmentation=turned)
    assert same(dataset, list(dataset))


# --- the library behind it


def test_importing_and_using_it_prints_nothing_and_asks_no_host():
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **keywords): raise AssertionError('a network call')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import mitoseg_lib.patches as patches\n"
        "assert 'albumentations' not in sys.modules\n"
        "import numpy as np\n"
        "image = np.zeros((8, 8), np.uint8)\n"
        "patches.train_augmentation(noise=1, brightness_contrast=0.1, scale=0.1)(image, image > 0, 0)\n"
        "patches.rotate(image, image > 0, 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- errors


@pytest.mark.parametrize("patch_size", [0, -4, (8, 0), (8,), (1, 8, 0), (1, 1, 8, 8)])
def test_a_bad_patch_size(patch_size):
    with pytest.raises(ValueError, match="it must be a side or"):
        PatchDataset(coded_stack(), patch_size=patch_size, patches_per_epoch=1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"patches_per_epoch": 0}, "patches_per_epoch is 0, but it must be 1 or more"),
        ({"seed": -1}, "seed is -1, but it must be 0 or more"),
        ({"foreground_share": 1.1}, r"foreground_share is 1.1, but it must lie in \[0, 1\]"),
        ({"foreground_share": float("nan")}, "foreground_share is nan"),
    ],
)
def test_bad_numbers(bad, message):
    with pytest.raises(ValueError, match=message):
        PatchDataset(coded_stack(), **{"patch_size": 2, "patches_per_epoch": 1} | bad)


def test_a_bad_epoch():
    with pytest.raises(ValueError, match="epoch is -1"):
        PatchDataset(coded_stack(), patch_size=2, patches_per_epoch=1).set_epoch(-1)


@pytest.mark.parametrize("value", [None, False, True], ids=["no labels", "empty", "all foreground"])
def test_labels_that_cannot_train(value):
    image = np.zeros((2, 4, 4), np.uint8)
    labels = None if value is None else np.full(image.shape, value)
    with pytest.raises(StackError):
        PatchDataset(Stack(image, labels), patch_size=2, patches_per_epoch=1)


@pytest.mark.parametrize(
    "bad",
    [{"noise": -1}, {"noise": 256}, {"brightness_contrast": 1.5}, {"scale": -0.1}, {"scale": float("nan")}],
)
def test_strengths_out_of_range(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .* must lie between 0"):
        train_augmentation(**bad)


@pytest.mark.parametrize("change", ["float image", "uint8 mask", "4D", "shapes"])
def test_augmenting_something_else(change):
    image, mask = example()
    image = {"float image": image / 255, "4D": image[None, None]}.get(change, image)
    mask = {"uint8 mask": mask.astype(np.uint8), "4D": mask[None, None], "shapes": mask[1:]}.get(change, mask)
    for call in (lambda: train_augmentation()(image, mask, 0), lambda: rotate(image, mask, 10)):
        with pytest.raises(ValueError, match="uint8 and bool of one shape"):
            call()


def test_slices_of_a_block_are_changed_in_the_same_way():
    image, mask = example()
    augmentation = in_turn(train_augmentation(**EVERYTHING | {"noise": 0.0}, blur=1.0), elastic_augmentation())
    alone = augmentation(image, mask, np.random.default_rng(3))
    block = augmentation(np.stack([image] * 3), np.stack([mask] * 3), np.random.default_rng(3))
    for flat, parts in zip(alone, block, strict=True):
        assert parts.shape == (3, *flat.shape) and parts.flags.c_contiguous
        assert all(np.array_equal(part, flat) for part in parts)


def test_elastic_bending_moves_pixels_as_far_as_it_says_and_the_mask_goes_along():
    x = np.mgrid[:200, :200][1]
    ramp, halves = x.astype(np.uint8) + np.uint8(20), x > 100
    moved = []
    for seed in range(20):
        bent, mask = elastic_augmentation(displacement=3.0, smoothness=12.0)(ramp, halves, np.random.default_rng(seed))
        inside = np.s_[40:-40, 40:-40]  # reflection and the mask's rounding play no role there
        moved.append((bent.astype(float) - ramp)[inside])
        assert np.abs((bent.astype(float) - 20 > 100) != mask)[inside].mean() < 0.01
    moved = np.stack(moved)
    assert np.std(moved) == pytest.approx(3.0, rel=0.25)
    apart = moved[:, 12:] - moved[:, :-12]
    # Noise smoothed with a Gaussian has the autocorrelation exp(-d^2 / (4 sd^2)).
    assert np.std(apart) == pytest.approx(3.0 * np.sqrt(2 * (1 - np.exp(-1 / 4))), rel=0.25)


@pytest.mark.parametrize("bad", [{"displacement": 0}, {"smoothness": 101}, {"displacement": float("nan")}])
def test_elastic_lengths_out_of_range(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .* must lie in"):
        elastic_augmentation(**bad)


def test_quarter_turns_of_a_patch_that_is_not_square():
    dataset = PatchDataset(coded_stack(), patch_size=(2, 4), patches_per_epoch=1, augmentation=train_augmentation())
    with pytest.raises(ValueError, match="quarter turns need a square one"):
        dataset[0]


def test_an_augmentation_that_changes_the_shape():
    dataset = PatchDataset(
        coded_stack(),
        patch_size=4,
        patches_per_epoch=1,
        augmentation=lambda image, mask, rng: (image[1:], mask),
    )
    with pytest.raises(ValueError, match=r"image of shape \(3, 4\)"):
        dataset[0]


def test_an_unknown_border():
    with pytest.raises(ValueError, match="'mirror', but it must be 'reflect' or 'constant'"):
        rotate(*example(), 10, border="mirror")


# --- neighbouring slices


def test_neighbours_are_channels_and_the_mask_is_the_middle_slices():
    stack = noisy_stack((5, 40, 50))
    blocks = PatchDataset(stack, patch_size=(3, 16, 24), patches_per_epoch=9, augmentation=train_augmentation(
        quarter_turns=False, brightness_contrast=0.2))  # fmt: skip
    middles = MiddleSlices(blocks)
    assert len(middles) == 9
    for epoch in (0, 3):
        middles.set_epoch(epoch)
        for (image, mask), (block, masks) in ((middles[i], blocks[i]) for i in range(9)):
            assert (image.shape, mask.shape) == ((3, 16, 24), (1, 16, 24))
            assert torch.equal(image, block[0]) and torch.equal(mask[0], masks[0, 1])
    with pytest.raises(IndexError):
        middles[9]


@pytest.mark.parametrize("patch_size", [16, (3, 16), (5, 16, 16), (1, 16, 16)])
def test_blocks_of_another_depth_have_no_middle_slice(patch_size):
    with pytest.raises(ValueError, match="but blocks of three slices were expected"):
        MiddleSlices(PatchDataset(noisy_stack(), patch_size=patch_size, patches_per_epoch=1))


# --- drift from slice to slice


@given(st.integers(0, 2**32), st.sampled_from([(6, 7), (1, 6, 7), (5, 6, 7)]))
def test_drift_changes_grey_levels_slice_by_slice_and_no_mask(seed, shape):
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(60, 190, shape, dtype=np.uint8), rng.random(shape) < 0.5
    before = image.copy()
    drifted, same = slice_drift(offset=5, gain=0)(image, mask, rng)
    assert (drifted.dtype, drifted.shape) == (np.uint8, shape) and (same == mask).all() and (image == before).all()
    by_slice = drifted.astype(int).reshape(-1, 42) - image.reshape(-1, 42)
    assert all(len(set(differences)) == 1 for differences in by_slice)  # one number a slice


def test_slices_drift_apart_by_as_much_as_asked():
    image = np.full((4000, 1, 2), 128, np.uint8)
    image[..., 1] = 178
    mask = np.zeros(image.shape, bool)
    drifted = slice_drift(offset=4, gain=0.1)(image, mask, np.random.default_rng(0))[0].astype(float)
    assert drifted[:, 0, 0].std() == pytest.approx(4, rel=0.05)  # at grey level 128 there is only the offset
    assert (drifted[:, 0, 1] - drifted[:, 0, 0]).std() == pytest.approx(5, rel=0.05)  # 0.1 of the distance of 50
    neighbours = np.corrcoef(drifted[:-1, 0, 0], drifted[1:, 0, 0])[0, 1]
    assert abs(neighbours) < 0.05


def test_without_drift_nothing_changes_and_extremes_are_cut_off():
    image = np.array([[[0, 255], [3, 250]]] * 50, np.uint8)
    mask = image > 100
    assert (slice_drift(offset=0, gain=0)(image, mask, np.random.default_rng(0))[0] == image).all()
    strong = slice_drift(offset=200, gain=0)(image, mask, np.random.default_rng(0))[0]
    assert {0, 255} <= set(strong.ravel().tolist())  # and nothing wraps round
    assert (strong[:, 0, 0] <= strong[:, 0, 1]).all()


def test_drift_can_be_sent_to_workers():
    image, mask = np.full((3, 4, 4), 100, np.uint8), np.zeros((3, 4, 4), bool)
    drift = slice_drift()
    first, second = (
        one(image, mask, np.random.default_rng(1))[0] for one in (drift, pickle.loads(pickle.dumps(drift)))
    )
    assert (first == second).all()


@pytest.mark.parametrize("bad", [{"offset": -1}, {"offset": 256}, {"gain": -0.1}, {"gain": 1.1}])
def test_drift_out_of_range(bad):
    with pytest.raises(ValueError, match="must lie between 0"):
        slice_drift(**bad)
