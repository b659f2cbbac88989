"""What the capstone says of masks that are wrong in the ways in which masks go wrong; its solutions have right ones."""

import numpy as np
import pytest
from scipy import ndimage
from small_answers import JUNK

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter10 import ENOUGH, SHAPE, SMALLEST, Capstone, check_interval, check_levels
from mitoseg_lib.grey import grey_range, to_grey_range
from mitoseg_lib.instances import label_instances
from mitoseg_lib.metrics import iou, scores


@pytest.fixture(scope="module")
def made():
    return Capstone()


@pytest.fixture
def capstone(made, monkeypatch):
    """One without anything handed in; the truth can be read, as learners are asked not to."""
    monkeypatch.setattr(made, "_handed_in", {})
    monkeypatch.setattr(made, "_last", None)
    return made


@pytest.fixture(scope="module")
def levels():
    return grey_range(load_example("train").image)


def shrunk(mask):
    return ndimage.binary_erosion(mask, np.ones((1, 3, 3)))


def test_the_stack_has_no_labels_and_mitochondria_that_lie_whole_in_it(made):
    stack = made.stack
    assert stack.shape == SHAPE and stack.labels is None and stack.voxel_size_nm == (5, 5, 5)
    sizes = np.bincount(label_instances(made._truth).ravel())[1:]
    assert (sizes >= SMALLEST).sum() >= 6


def test_levels_brought_to_the_training_stacks(made, levels):
    image = made.stack.image
    adapted = to_grey_range(grey_range(image), levels).apply(image)
    assert check_levels(adapted, made.stack).right
    train = load_example("train").image
    by_moments = (image - image.mean()) / image.std() * train.std() + train.mean()
    assert check_levels(by_moments.clip(0, 255).round().astype(np.uint8), made.stack).right


WRONG_LEVELS = {
    "as it came": lambda image: image,
    "end at 1": lambda image: image / 255,
    "array of floats": lambda image: image * 1.5 - 100,
    "after 255": lambda image: (image * 1.9 - 50).astype(np.int64).astype(np.uint8),
    "closer together": lambda image: (image * 0.8).astype(np.uint8),
    "further apart": lambda image: np.clip((image - 170.0) * 2 + 125, 0, 255).astype(np.uint8),
    "higher than": lambda image: np.clip((image - 170.0) * 1.4 + 155, 0, 255).astype(np.uint8),
    "lower than": lambda image: np.clip((image - 170.0) * 1.4 + 105, 0, 255).astype(np.uint8),
    "done by slices": lambda image: (
        np.stack([s - s.mean() + 118.0 for s in image]).clip(0, 255).round().astype(np.uint8)
    ),
    "black or white": lambda image: np.where(image > 170, 255, 0).astype(np.uint8),
    "shape": lambda image: image[0],
}


@pytest.mark.parametrize("words", WRONG_LEVELS)
def test_levels_that_are_wrong(words, made):
    found = check_levels(WRONG_LEVELS[words](made.stack.image), made.stack)
    assert not found.right and words in found.words, found.words


def test_a_perfect_mask(capstone):
    found = capstone.hand_in(capstone._truth, 0.95)
    assert found.right and "IoU 1.00" in found.words and "0 missed, 0 invented, 0 merged, 0 split" in found.words
    assert "Most is lost" not in found.words and "your first mask" in found.words


@pytest.mark.parametrize("as_given", [np.asarray, np.uint8, lambda mask: mask.astype(np.uint8) * 255, np.float32])
def test_masks_of_all_kinds_are_masks(as_given, capstone):
    mask = shrunk(capstone._truth)
    assert f"IoU {iou(mask, capstone._truth):.2f}" in capstone.hand_in(as_given(mask), 0.5).words


SLIPS = {
    "background where": lambda truth: ~truth,
    "flipped along y": lambda truth: truth[:, ::-1],
    "flipped along x": lambda truth: truth[:, :, ::-1],
    "flipped along z": lambda truth: truth[::-1],
    "moved by a voxel along z": lambda truth: np.roll(truth, 1, 0),
    "moved by a voxel along x": lambda truth: np.roll(truth, -1, 2),
    "The mask is empty": np.zeros_like,
    "covers the whole": np.ones_like,
    "more than two values": lambda truth: ndimage.gaussian_filter(truth.astype(float), 1),
    "(32, 320, 352) was expected": lambda truth: truth.swapaxes(1, 2),
}


@pytest.mark.parametrize("words", SLIPS)
def test_slips_are_told_and_not_scored(words, capstone):
    found = capstone.hand_in(SLIPS[words](capstone._truth), 0.8)
    assert not found.right and words in found.words and "IoU" not in found.words
    assert capstone.hand_in(capstone._truth, 1.0).words.endswith("this is the score to quote.")


def test_a_poor_mask_is_told_what_it_lacks(capstone):
    truth = capstone._truth
    part = truth & (np.arange(SHAPE[2]) < 176)
    few = capstone.hand_in(part, iou(part, truth))
    assert not few.right and "much is missing" in few.words and f"recall {scores(part, truth).recall:.2f}" in few.words
    wide = ndimage.binary_dilation(truth, np.ones((1, 9, 9)))
    many = capstone.hand_in(wide, iou(wide, truth))
    assert not many.right and "Too much is marked" in many.words and f"{ENOUGH:g} can be reached" in many.words


@pytest.mark.parametrize(("off", "words"), [(0.2, "more than that"), (-0.2, "less than that"), (0.05, None)])
def test_the_expectation_is_judged(off, words, capstone):
    mask = shrunk(shrunk(capstone._truth))
    found = capstone.hand_in(mask, iou(mask, capstone._truth) + off)
    assert found.right == (words is None) and (words or "You expected") in found.words
    assert "80 %" in capstone.hand_in(mask, 80).words


def test_the_first_mask_counts_and_the_same_one_counts_once(capstone):
    truth, mask = capstone._truth, shrunk(capstone._truth)
    for _ in range(2):
        assert "your first mask" in capstone.hand_in(mask, 0.8).words
    assert f"handed in 2 masks; the score to quote is the first one's, {iou(mask, truth):.2f}" in (
        capstone.hand_in(truth, 0.8).words
    )


def test_an_expectation_is_said_beforehand(capstone):
    mask = shrunk(capstone._truth)
    worth = iou(mask, capstone._truth)
    assert not capstone.hand_in(mask, worth - 0.3).right
    again = capstone.hand_in(mask, worth)
    assert not again.right and "that you had first counts" in again.words


def limits(mask, truth, parts, *, pooled=True, percentiles=(2.5, 97.5)):
    found, marked = (np.array([op(mask[p], truth[p]).sum() for p in parts]) for op in (np.logical_and, np.logical_or))
    drawn = np.random.default_rng(7).integers(len(parts), size=(20_000, len(parts)))
    ious = found[drawn].sum(1) / marked[drawn].sum(1) if pooled else (found / marked)[drawn].mean(1)
    return np.percentile(ious, percentiles)


def test_an_interval():
    truth = load_example("test").labels
    mask = ndimage.gaussian_filter(truth.astype(float), 4) + 0.001 * np.arange(truth.shape[2]) > 0.5
    tiles = [np.s_[:, y : y + 144, x : x + 144] for y in (0, 144, 288) for x in (0, 144, 288)]
    right = limits(mask, truth, tiles)
    assert check_interval(right, mask, truth).right and check_interval(list(right.round(2)), mask, truth).right
    each = [iou(mask[tile], truth[tile]) for tile in tiles]
    wrong = {
        "lower limit": right[::-1],
        "80 %": right * 100,
        "same mask": right / 2,
        "Were slices drawn": limits(mask, truth, range(60)),
        "Which percentiles": limits(mask, truth, tiles, percentiles=(5, 95)),
        "nine IoUs": np.percentile(each, (2.5, 97.5)),
        "mean of the tiles": limits(mask, truth, tiles, pooled=False),
        "Draw nine": [0, 1],
        "2 numbers were expected": [0.5],
    }
    for words, answer in wrong.items():
        found = check_interval(answer, mask, truth)
        assert not found.right and words in found.words, (words, found.words, right)
    for junk in JUNK:
        assert not check_interval(junk, mask, truth).right


def count_of(mask, connectivity=3, least=SMALLEST):
    structure = ndimage.generate_binary_structure(3, connectivity)
    sizes = np.bincount(ndimage.label(mask, structure)[0].ravel())[1:]
    return (sizes >= least).sum(), sizes[sizes >= least].sum() * 125e-9


def specked(truth):
    """The truth, with specks, and two parts of it joined at a corner only."""
    mask, free = truth.copy(), ndimage.distance_transform_edt(~truth)
    for _ in range(3):  # of 9 x 15 x 15 voxels, far from everything
        inner = free[:22, :300, :300]
        z, y, x = np.unravel_index(inner.argmax(), inner.shape)
        part = np.s_[z : z + 9, y : y + 15, x : x + 15]
        mask[part] = True
        mask[z + 9, y + 15, x + 15] = True
        free = ndimage.distance_transform_edt(~mask)
    return mask


def test_a_count(capstone):
    assert "Hand in a mask first" in capstone.check_count(3, 0.1).words
    mask = specked(capstone._truth)
    capstone.hand_in(mask, 0.95)
    number, volume = count_of(mask)
    found = capstone.check_count(number, volume)
    assert found.right and f"has {number}, and in truth there are {number}" in found.words and "0%" in found.words
    every, whole = count_of(mask, least=1)
    faces, _ = count_of(mask, connectivity=1, least=1)
    wrong = {
        "number of all objects": (every, volume),
        "one too many": (number + 1, volume),
        "only faces": (faces, volume),
        "isn't the number": (number - 1, volume),
        "a number of voxels": (number, volume / 125e-9),
        "is in nm³": (number, volume * 1e9),
        "power of ten": (number, volume * 1e3),
        "that of all objects": (number, whole),
        "the mean of one": (number, volume / number),
        "the volume isn't": (number, volume * 0.7),
    }
    for words, answer in wrong.items():
        found = capstone.check_count(*answer)
        assert not found.right and words in found.words, found.words


def test_junk_raises_no_error(capstone):
    for junk in JUNK:
        assert not capstone.hand_in(junk, 0.5).right and not check_levels(junk, capstone.stack).right
        assert not capstone.hand_in(capstone._truth, junk).right
        assert not capstone.check_count(junk, 1.0).right and not capstone.check_count(3, junk).right
