import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitoseg_lib.splits import Split, block_split, cross_validation_folds, random_split


def test_block_split_of_the_epfl_stack():
    assert block_split(165) == Split(tuple(range(130)), tuple(range(140, 165)))


def test_block_split_of_the_bundled_stack():
    assert block_split(60) == Split(tuple(range(41)), tuple(range(51, 60)))


def test_random_split_is_80_to_20_and_scattered():
    split = random_split(165)
    assert (len(split.train), len(split.validation)) == (132, 33)
    assert split.validation != tuple(range(132, 165))


def test_random_split_depends_on_the_seed_alone():
    assert random_split(165, seed=3) == random_split(165, seed=3)
    assert random_split(165, seed=3) != random_split(165, seed=4)


def test_random_split_stays_the_same_in_later_versions():
    # Recorded runs name only the seed, so the slices behind it must never change.
    assert random_split(20, seed=0).validation == (1, 8, 12, 13)


def test_a_split_cannot_be_changed():
    with pytest.raises(AttributeError):
        block_split(60).train = ()


def test_the_smallest_stack_that_can_be_split():
    assert block_split(2, gap=0) == Split((0,), (1,))
    assert sorted(random_split(2).train + random_split(2).validation) == [0, 1]


def test_a_tiny_share_still_validates_on_one_slice():
    assert block_split(30, validation=0.001, gap=2).validation == (29,)
    assert len(random_split(30, validation=0.001).validation) == 1


shares = st.floats(0.001, 0.999)


@given(n=st.integers(2, 400), share=shares, gap=st.integers(0, 40))
def test_block_split_parts_are_contiguous_and_a_gap_apart(n, share, gap):
    n_validation = max(1, round(n * share))
    if n_validation + gap >= n:
        with pytest.raises(ValueError, match="leave none for training"):
            block_split(n, validation=share, gap=gap)
        return
    split = block_split(n, validation=share, gap=gap)
    assert split.train == tuple(range(n - n_validation - gap))
    assert split.validation == tuple(range(n - n_validation, n))
    assert split.validation[0] - split.train[-1] - 1 == gap


@given(n=st.integers(2, 400), share=shares, seed=st.integers(0, 2**40))
def test_random_split_parts_are_sorted_and_share_nothing(n, share, seed):
    n_validation = max(1, round(n * share))
    if n_validation == n:
        with pytest.raises(ValueError, match="leave none for training"):
            random_split(n, validation=share, seed=seed)
        return
    split = random_split(n, validation=share, seed=seed)
    assert len(split.validation) == n_validation
    assert list(split.train) == sorted(split.train)
    assert list(split.validation) == sorted(split.validation)
    assert sorted(split.train + split.validation) == list(range(n))


@pytest.mark.parametrize("split", [block_split, random_split])
@pytest.mark.parametrize("n", [-1, 0, 1])
def test_fewer_than_two_slices(split, n):
    with pytest.raises(ValueError, match=rf"has {n} slices, but a split needs 2 or more; use"):
        split(n)


@pytest.mark.parametrize("split", [block_split, random_split])
@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_validation_share_that_is_no_share(split, share):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        split(60, validation=share)


def test_a_negative_gap():
    with pytest.raises(ValueError, match="can't be negative"):
        block_split(60, gap=-1)


def test_a_gap_that_eats_the_training_part():
    with pytest.raises(ValueError, match="Of 12 slices, 2 for validation and a gap of 10 leave none"):
        block_split(12)
    assert block_split(13, gap=10).train == (0,)


def test_four_folds_of_the_epfl_stack_without_its_artefact():
    folds = cross_validation_folds(165, left_out=range(155, 158))
    assert [(f.validation[0], f.validation[-1], len(f.validation)) for f in folds] == [
        (0, 40, 41),
        (41, 81, 41),
        (82, 122, 41),
        (123, 164, 39),
    ]
    assert folds[0].train == tuple(z for z in range(51, 165) if not 155 <= z < 158)
    assert folds[3].train == tuple(range(113))


@given(n=st.integers(2, 120), n_folds=st.integers(2, 6), gap=st.integers(0, 12), left_out=st.sets(st.integers(0, 120)))
def test_each_slice_validates_once_and_folds_keep_their_distance(n, n_folds, gap, left_out):
    try:
        folds = cross_validation_folds(n, n_folds, gap=gap, left_out=left_out)
    except ValueError:
        return
    validated = [z for fold in folds for z in fold.validation]
    assert validated == [z for z in range(n) if z not in left_out]
    for k, fold in enumerate(folds):
        block = range(n * k // n_folds, n * (k + 1) // n_folds)
        near = range(block[0] - gap, block[-1] + gap + 1)
        assert fold.train == tuple(z for z in range(n) if z not in near and z not in left_out)


@pytest.mark.parametrize(("n", "n_folds", "gap"), [(10, 1, 0), (3, 4, 0), (10, 2, -1), (10, 2, 5)])
def test_folds_that_cannot_be_are_refused(n, n_folds, gap):
    with pytest.raises(ValueError):
        cross_validation_folds(n, n_folds, gap=gap)


def test_a_fold_whose_slices_are_all_left_out_is_refused():
    with pytest.raises(ValueError, match="no slice to train on or none to validate"):
        cross_validation_folds(40, 4, gap=0, left_out=range(10))
