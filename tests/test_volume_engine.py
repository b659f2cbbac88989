"""Steps on workers that die."""

from functools import partial

import pytest
import small_volume

from mitoseg_lib.errors import StackError
from mitoseg_lib.volumes.engine import Step, fitting_workers, local_cluster, run_steps


@pytest.fixture(scope="module")
def client():
    with local_cluster(2, plane=(8, 8)) as client:
        yield client


def steps(folder, kinds):
    """Steps a, b, ... of which each may need others, and may die some times."""
    made = []
    for name, (needs, deaths) in kinds.items():
        work = partial(small_volume.die, folder, name, deaths) if deaths else partial(small_volume.touch, folder, name)
        made.append(Step(name, tuple(needs), work, f"doing {name}"))
    return made


def run(folder, client, kinds):
    return run_steps(steps(folder, kinds), client, is_done=lambda name: (folder / name).exists())


def done(folder, kinds):
    return "".join(name for name in kinds if (folder / name).exists())


def test_steps_are_done_after_what_they_need(tmp_path, client):
    kinds = {"a": ("bc", 0), "b": ("d", 0), "c": ("d", 0), "d": ("", 0), "e": ("", 0)}
    assert run(tmp_path, client, kinds) == {} and done(tmp_path, kinds) == "abcde"
    order = sorted("abcd", key=lambda name: (tmp_path / name).stat().st_mtime_ns)
    assert order[0] == "d" and order[-1] == "a"


def test_what_is_done_is_not_done_again(tmp_path, client):
    kinds = {"a": ("", 2), "b": ("a", 0)}
    (tmp_path / "a").touch()
    assert run(tmp_path, client, kinds) == {} and not (tmp_path / "a.deaths").exists()


def test_a_step_whose_worker_dies_once_is_done_again_after_the_others(tmp_path, client):
    kinds = {"a": ("", 1), "b": ("", 0), "c": ("a", 0), "d": ("", 0)}
    assert run(tmp_path, client, kinds) == {} and done(tmp_path, kinds) == "abcd"
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in kinds}
    assert times["a"] > max(times["b"], times["d"]) and times["c"] > times["a"]
    assert (tmp_path / "a.deaths").read_bytes() == b"xx"


def test_a_step_that_kills_twice_has_failed_and_the_rest_goes_on(tmp_path, client):
    kinds = {"a": ("", 9), "b": ("", 0), "c": ("a", 0), "d": ("c", 0), "e": ("b", 0)}
    found = run(tmp_path, client, kinds)
    assert list(found) == ["a"] and found["a"].words == "doing a"
    assert done(tmp_path, kinds) == "be" and (tmp_path / "a.deaths").read_bytes() == b"xx"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), StackError, "The disk is full .* while doing a"),
        (PermissionError(13, "Permission denied"), StackError, "can't be read or written .* while doing a"),
        (StackError("slice 3 is damaged."), StackError, "slice 3 is damaged"),
        (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
    ],
)
def test_other_errors_end_the_run(error, kind, words, tmp_path, client):
    step = Step("a", (), partial(small_volume.fail, error), "doing a")
    with pytest.raises(kind, match=words):
        run_steps([step], client, is_done=lambda name: False)


def test_a_lack_of_memory_that_python_notices_counts_like_a_death(tmp_path, client):
    step = Step("a", (), partial(small_volume.fail, MemoryError()), "doing a")
    assert list(run_steps([step], client, is_done=lambda name: False)) == ["a"]


def test_workers_are_as_many_as_memory_allows():
    assert fitting_workers((8, 8)) >= 1 and fitting_workers((10**6, 10**6)) == 1
