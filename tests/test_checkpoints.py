import json
import os
import re
import signal
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mitoseg_lib.checkpoints import CheckpointError, CheckpointFolder, read_state, write_state


def state_of(number):
    return {"model": {"weight": torch.full((3,), float(number))}, "number": number}


def folder_with(path, *places):
    folder = CheckpointFolder(path)
    for number, place in enumerate(places):
        folder.save_last(state_of(number), place)
    return folder


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    """Equal values of equal types, NaN being equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor | np.ndarray):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
    return a == b or a != a and b != b


# --- one file


TENSORS = st.sampled_from(
    [
        torch.tensor(0.1),
        torch.arange(6, dtype=torch.uint8).reshape(2, 3).T,  # not contiguous
        torch.zeros(0, 3),
        torch.tensor([float("nan"), float("inf")], dtype=torch.float64),
        torch.tensor([True, False]),
        torch.tensor([1.5], dtype=torch.bfloat16),
        np.arange(4, dtype=np.uint32),
        np.float32([[1.5]]),
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(deadline=None, max_examples=60)
def test_a_state_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    write_state(path, {"value": value})
    assert same(read_state(path)["value"], value)


def test_names_that_look_alike_stay_apart(tmp_path):
    state = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 0: torch.tensor(3), "0": torch.tensor(4)}
    write_state(tmp_path / "state.safetensors", state)
    assert same(read_state(tmp_path / "state.safetensors"), state)


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(4.0)
    write_state(tmp_path / "s.safetensors", {"all": shared, "some": shared[1:3]})
    assert read_state(tmp_path / "s.safetensors")["some"].tolist() == [1, 2]


def test_what_a_file_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"a\.0 is a set"):
        write_state(tmp_path / "s.safetensors", {"a": [{1, 2}]})
    assert list(tmp_path.iterdir()) == []


def test_the_weights_can_be_read_with_safetensors_alone(tmp_path):
    from safetensors.torch import load_file

    model = nn.Linear(2, 1)
    CheckpointFolder(tmp_path).save_best(model, (3, 0))
    weights = load_file(tmp_path / "best-0003-000000.safetensors")
    assert torch.equal(weights["model.weight"], model.weight)


def test_the_hash_is_one_that_sha256sum_checks(tmp_path):
    folder_with(tmp_path, (1, 0))
    assert re.fullmatch(
        r"[0-9a-f]{64}  last-0001-000000\.safetensors\n", (tmp_path / "last-0001-000000.safetensors.sha256").read_text()
    )


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_flipped_bit_or_cut_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "s.safetensors"
    write_state(path, state_of(7))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"s\.safetensors is damaged"):
        read_state(path)


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"   "])
def test_a_damaged_hash_is_noticed(tmp_path, content):
    write_state(tmp_path / "s.safetensors", state_of(7))
    (tmp_path / "s.safetensors.sha256").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "s.safetensors")


def foreign_file(path, content):
    import hashlib

    path.write_bytes(content)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(content).hexdigest())
    return path


@pytest.mark.parametrize("header", [None, {}, {"__metadata__": {}}, {"__metadata__": {"state": "no JSON"}}, []])
def test_a_file_of_another_kind_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    content = b"abc" if header is None else struct.pack("<Q", len(text)) + text
    with pytest.raises(CheckpointError, match="another kind"):
        read_state(foreign_file(tmp_path / "s.safetensors", content))


def test_a_pickle_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / "s.pt")
    with pytest.raises(CheckpointError):
        read_state(foreign_file(tmp_path / "s.safetensors", (tmp_path / "s.pt").read_bytes()))
    assert not (tmp_path / "exploded").exists()


# --- a folder


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert CheckpointFolder(tmp_path / "new").load_last() is None


def test_the_newest_is_read_and_two_are_kept(tmp_path):
    folder = folder_with(tmp_path, (0, 5), (1, 0), (1, 12), (10, 0))
    assert folder.places("last") == [(1, 12), (10, 0)]
    state, place = folder.load_last()
    assert place == (10, 0)
    assert same(state, state_of(3))


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    (tmp_path / "last-notes.txt").write_text("mine")
    folder = folder_with(tmp_path, (1, 0), (2, 0), (3, 0))
    folder.remove_after((2, 0))
    assert (tmp_path / "last-notes.txt").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path):
    path.unlink()


def delete_hash(path):
    path.with_name(path.name + ".sha256").unlink()


@pytest.mark.parametrize("harm", [flip, cut, delete, delete_hash])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, harm):
    folder = folder_with(tmp_path, (1, 0), (2, 0))
    harm(tmp_path / "last-0002-000000.safetensors")
    with pytest.warns(UserWarning, match=r"last-0002-000000.*Trying the checkpoint before"):
        state, place = folder.load_last()
    assert place == (1, 0)
    assert same(state, state_of(0))


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    folder = folder_with(tmp_path, (1, 0), (2, 0))
    flip(tmp_path / "last-0001-000000.safetensors")
    cut(tmp_path / "last-0002-000000.safetensors")
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole"):
        warnings.simplefilter("ignore")
        folder.load_last()


def test_what_is_newer_than_the_place_is_removed(tmp_path):
    folder = folder_with(tmp_path, (1, 0), (2, 0))
    folder.save_best(nn.Linear(2, 1), (1, 0))
    folder.save_best(nn.Linear(2, 1), (2, 0))
    (tmp_path / "last-0003-000000.safetensors.part").write_bytes(b"unfinished")
    delete(tmp_path / "last-0002-000000.safetensors")
    folder.remove_after((1, 0))
    kept = ["best-0001-000000.safetensors", "last-0001-000000.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors") == kept
    assert len(list(tmp_path.iterdir())) == 4


def test_the_best_weights_are_loaded(tmp_path):
    folder = CheckpointFolder(tmp_path)
    models = [nn.Linear(2, 1) for _ in range(3)]
    folder.save_best(models[0], (1, 0))
    folder.save_best(models[1], (3, 0))
    assert folder.load_best(models[2]) == 3
    assert torch.equal(models[2].weight, models[1].weight)


def test_no_best_weights_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="train first"):
        CheckpointFolder(tmp_path).load_best(nn.Linear(2, 1))


def test_weights_of_another_model_are_refused(tmp_path):
    CheckpointFolder(tmp_path).save_best(nn.Linear(2, 1), (1, 0))
    with pytest.raises(CheckpointError, match="don't fit this Linear"):
        CheckpointFolder(tmp_path).load_best(nn.Linear(3, 1))


def killed_at_system_call(number, work):
    """Do something in a child that kill -9 strikes as it touches its n-th file; return whether it was struck."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    calls = 0

    def strike(event, _):
        nonlocal calls
        if event in ("open", "os.rename", "os.remove"):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(strike)
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_whenever_it_is_killed_a_whole_checkpoint_is_left(tmp_path):
    for number in range(1, 100):
        folder = folder_with(tmp_path / str(number), (1, 0), (2, 0))
        struck = killed_at_system_call(number, lambda folder=folder: folder.save_last(state_of(2), (3, 0)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state, place = folder.load_last()
        assert (place, state["number"]) in [((2, 0), 1), ((3, 0), 2)]
        if not struck:
            break
    assert place == (3, 0)
    assert number > 8  # of the moments there are, it was struck at each
