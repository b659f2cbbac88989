import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitoseg_lib.inference import median_filter_z
from mitoseg_lib.streams import median_of_blocks, median_slices, overlapping_blocks, surroundings


def cut(image, depths):
    """Slabs of these depths, the last of them again and again."""
    start = 0
    while start < len(image):
        depth = depths.pop(0) if len(depths) > 1 else depths[0]
        yield image[start : start + depth]
        start += depth


@given(
    depth=st.integers(1, 23),
    depths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    size=st.integers(1, 9),
    reach=st.integers(0, 5),
    mode=st.sampled_from(["reflect", "symmetric"]),
)
@settings(deadline=None, max_examples=150)
def test_blocks_are_those_of_the_padded_stack(depth, depths, size, reach, mode):
    image = np.arange(depth * 2, dtype=np.uint8).reshape(depth, 1, 2)
    padded = np.pad(image, ((reach, reach), (0, 0), (0, 0)), mode=mode)
    found = list(overlapping_blocks(cut(image, depths), depth, size=size, reach=reach, mode=mode))
    assert len(found) == -(-depth // size)
    for number, block in enumerate(found):
        assert np.array_equal(block, padded[number * size : min((number + 1) * size, depth) + 2 * reach])


@given(
    depth=st.integers(1, 23),
    size=st.integers(1, 9),
    reach=st.integers(0, 5),
    mode=st.sampled_from(["reflect", "symmetric"]),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_blocks_of_a_part_need_only_its_surroundings(depth, size, reach, mode, data):
    start = data.draw(st.integers(0, depth - 1))
    part = range(start, data.draw(st.integers(start + 1, depth)))
    image = np.arange(depth, dtype=np.uint8).reshape(depth, 1, 1)
    padded = np.pad(image, ((reach, reach), (0, 0), (0, 0)), mode=mode)
    needed = surroundings(part, reach, depth)
    slabs = [image[needed.start : needed.stop]]
    found = list(overlapping_blocks(slabs, depth, size=size, reach=reach, mode=mode, part=part))
    for number, block in enumerate(found):
        first = part.start + number * size
        assert np.array_equal(block, padded[first : min(first + size, part.stop) + 2 * reach])
    assert sum(len(block) - 2 * reach for block in found) == len(part)


@given(
    depth=st.integers(1, 20),
    size=st.integers(1, 9),
    n_slices=st.sampled_from([1, 3, 5, 7, 9, 11]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100)
def test_the_median_of_blocks_is_scipys_of_the_whole(depth, size, n_slices, seed):
    values = np.random.default_rng(seed).integers(0, 6, (depth, 3, 4)).astype(np.float32) / 5  # with ties
    blocks = overlapping_blocks([values], depth, size=size, reach=n_slices // 2, mode="symmetric")
    found = np.concatenate(list(median_of_blocks(blocks, n_slices)))
    assert found.dtype == np.float32 and np.array_equal(found, median_filter_z(values, n_slices))


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_no_more_slices_are_taken_than_a_block_needs(reach):
    taken = []

    def slabs():
        for z in range(1000):
            taken.append(z)
            yield np.full((1, 1, 1), z)

    blocks = overlapping_blocks(slabs(), 1000, size=8, reach=reach, mode="symmetric")
    for number in range(1, 100):
        next(blocks)
        assert len(taken) == 8 * number + reach
    assert sum(len(block) - 2 * reach for block in blocks) == 1000 - 99 * 8 and len(taken) == 1000


@pytest.mark.parametrize(
    ("n_slices", "own", "expected"),
    [
        (7, 5, 7), (7, 5.04, 7), (7, 5.8, 7), (7, 5.9, 5), (7, 7, 5), (7, 10, 3), (7, 15, 3), (7, 17.5, 1), (7, 50, 1),
        (3, 5, 3), (3, 7, 3), (3, 7.5, 1), (3, 15, 1), (3, 1e9, 1), (1, 5, 1), (1, 1, 1), (7, 2.5, 7), (7, 1e-9, 7),
    ],
)  # fmt: skip
def test_in_thicker_slices_a_median_reaches_about_as_far(n_slices, own, expected):
    assert median_slices(n_slices, 5, own) == expected


@given(n_slices=st.sampled_from([1, 3, 5, 7, 9]), made_for=st.floats(1, 100), own=st.floats(1, 100))
def test_no_other_odd_number_is_nearer_to_what_the_median_spanned(n_slices, made_for, own):
    found = median_slices(n_slices, made_for, own)
    nearest = min(abs(odd * own - n_slices * made_for) for odd in range(1, n_slices + 1, 2))
    assert found in range(1, n_slices + 1, 2)
    assert abs(found * own - n_slices * made_for) <= nearest + 1e-6
