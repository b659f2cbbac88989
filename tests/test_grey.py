from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitoseg_lib.grey import GreyTransform, choose_grey_transform, grey_range, to_grey_range
from mitoseg_lib.stacks import StackError, to_uint8


@dataclass
class ArrayReader:
    """A stack in memory that says which slices were looked at."""

    values: np.ndarray

    def __post_init__(self):
        self.name, self.shape, self.dtype = "a.tif", self.values.shape, self.values.dtype
        self.description, self.voxel_size_nm, self.chunk_depth = "an array", None, 1
        self.looked_at = []

    def read(self, start, stop):
        self.looked_at += range(start, stop)
        return self.values[start:stop]


def brought(values, grey_range=None):
    return choose_grey_transform(ArrayReader(values), grey_range).apply(values)


def tissue(dtype=np.uint16, shape=(20, 30, 30), mean=130, sd=30, factor=1):
    grey = np.random.default_rng(0).normal(mean, sd, shape) * factor
    return np.clip(grey, 0, 255 * factor).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("depth", [1, 2, 20, 64])
def test_up_to_64_slices_the_rule_is_that_of_a_stack_in_memory(dtype, depth):
    factor = 1 if np.dtype(dtype) == np.uint8 else 40
    values = tissue(dtype, (depth, 30, 30), factor=factor)
    assert np.array_equal(brought(values), to_uint8(values))


@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["u1", "u2", "f4", "f8"]),
    low=st.integers(0, 300),
    width=st.sampled_from([0, 1, 5, 200, 60000]),
)
@settings(deadline=None, max_examples=60)
def test_also_for_few_values_and_constants(seed, kind, low, width):
    limit = 255 if kind == "u1" else 65535
    values = np.random.default_rng(seed).integers(low, low + width + 1, (3, 4, 5))
    values = np.minimum(values, limit).astype(kind)
    assert np.array_equal(brought(values), to_uint8(values))


@pytest.mark.parametrize("depth", [65, 500])
def test_of_more_slices_64_are_looked_at_from_the_first_to_the_last(depth):
    reader = ArrayReader(tissue(np.uint16, (depth, 3, 3), factor=40))
    choose_grey_transform(reader)
    looked_at = reader.looked_at
    assert len(looked_at) == 64 and (looked_at[0], looked_at[-1]) == (0, depth - 1)
    gaps = np.diff(looked_at)
    assert gaps.max() - gaps.min() <= 1


def test_one_transform_for_all_slices():
    values = np.repeat(np.arange(100, dtype=np.uint16), 9).reshape(100, 3, 3) * 100
    found = brought(values)
    assert (np.diff(found[:, 0, 0].astype(int)) >= 0).all() and found.min() == 0 and found.max() == 255


def test_it_is_said_in_words():
    values = np.linspace(1000, 50000, 27000).reshape(30, 30, 30).astype(np.uint16)
    assert str(choose_grey_transform(ArrayReader(values))) == "grey levels 1049 to 49950 become 0 to 255"
    assert "stay" in str(choose_grey_transform(ArrayReader(values.astype(np.uint8))))


def test_large_slices_are_sampled_and_give_nearly_the_same(monkeypatch):
    values = tissue(np.uint16, (3, 300, 300), factor=40)
    exact = choose_grey_transform(ArrayReader(values)).source
    monkeypatch.setattr("mitoseg_lib.grey.LARGEST_SAMPLE", 200_000)
    sampled = choose_grey_transform(ArrayReader(values)).source
    assert sampled != exact and sampled == pytest.approx(exact, rel=0.1)


# --- to what a model saw


SEEN = (35.0, 225.0)


@pytest.mark.parametrize("factor", [257, 10, 0.01])
def test_other_types_get_the_contrast_that_the_model_saw(factor):
    """The same tissue as uint16 and floats looks to the model as it does as uint8."""
    original = tissue(np.uint8)
    values = (original * np.float64(factor)).astype(np.uint16 if factor > 1 else np.float32)
    seen = tuple(np.percentile(original, [0.1, 99.9]).tolist())
    found = brought(values, seen)
    assert np.abs(found.astype(int) - original).max() <= 1


def test_uint8_that_the_model_knows_stays_as_it_is():
    values = tissue(np.uint8, mean=130, sd=30)
    low, high = grey_range(values)
    for seen in ((low, high), (low - 5, high + 5), (low + 5, high + 5)):
        assert choose_grey_transform(ArrayReader(values), seen) == GreyTransform(None)
        assert brought(values, seen) is values


@given(st.floats(-60, 60), st.floats(-60, 60))
def test_only_what_is_near_the_model_s_levels_stays(low, high):
    levels = (60.0 + low, 200.0 + high)
    found = to_grey_range(levels, (60.0, 200.0))
    is_near = max(abs(low), abs(high)) <= 7  # a twentieth of 140
    assert found == (GreyTransform(None) if is_near else GreyTransform(levels, (60.0, 200.0)))
    assert to_grey_range(levels, None) == to_grey_range((9.0, 9.0), (60.0, 200.0)) == GreyTransform(None)


@pytest.mark.parametrize(("mean", "sd"), [(30, 5), (130, 8), (240, 5), (100, 30), (160, 25)])
def test_uint8_that_is_too_dark_or_flat_or_bright_is_stretched(mean, sd):
    found = brought(tissue(np.uint8, mean=mean, sd=sd), SEEN)
    assert 100 < found.mean() < 160 and 20 < found.std() < 40


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_constant_of_8_bits_stays_as_it_is(dtype):
    assert (brought(np.full((2, 3, 3), 77, dtype), SEEN) == 77).all()


def test_what_lies_beyond_is_cut_off():
    transform = GreyTransform((100.0, 200.0), (10.0, 250.0))
    found = transform.apply(np.array([[[0, 100, 150, 200, 60000]]], np.uint16))
    assert found.dtype == np.uint8 and found.ravel().tolist() == [0, 10, 130, 250, 255]


def test_8_bits_in_a_wider_file_that_turn_out_to_be_more_are_cut_off():
    values = np.full((200, 2, 2), 9, np.uint16)
    values[1] = 300  # not among the 64
    assert brought(values)[1].max() == 255


# --- errors


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, bool, np.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(StackError, match=rf"^a\.tif holds {np.dtype(dtype)}, but .*\.$"):
        choose_grey_transform(ArrayReader(np.zeros((2, 3, 3), dtype)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_wherever_they_are(value):
    values = np.random.default_rng(0).random((200, 3, 3)).astype(np.float32)
    values[0, 1, 1] = value
    with pytest.raises(StackError, match=r"^a\.tif holds NaN"):
        choose_grey_transform(ArrayReader(values))
    values[1], values[0] = values[0], values[1].copy()  # not among the 64
    transform = choose_grey_transform(ArrayReader(values))
    with pytest.raises(StackError, match="holds NaN"):
        transform.apply(values)
