"""Whole volumes: from slices to a mask, numbered objects and a table, whatever happens on the way."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import small_volume
import tifffile
import zarr
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from small_models import grey_unet
from typer.testing import CliRunner

from mitoseg_lib.cli import app
from mitoseg_lib.datasets import load_example
from mitoseg_lib.instances import label_instances
from mitoseg_lib.prediction import Segmenter, plan_prediction
from mitoseg_lib.readers import open_reader
from mitoseg_lib.shapes import find_axis, surface_area
from mitoseg_lib.stacks import StackError
from mitoseg_lib.volumes import (
    LABELS,
    MASK,
    VolumeError,
    VolumeOptions,
    measure_objects,
    open_level,
    plan_volume,
    read_table,
    segment_volume,
    steps_of,
    verify_volume,
)  # fmt: skip
from mitoseg_lib.volumes.engine import run_steps
from mitoseg_lib.weights import MaskRule, save_weights

SIZE = (5.0, 5.0, 5.0)
OPTIONS = VolumeOptions(voxel_size_nm=SIZE, probabilities=True, device="cpu")
IMAGE = load_example("test").image[:44, :96, :120]  # two slabs; the shipped model finds some objects in it


@pytest.fixture(scope="module")
def client():
    """One worker in this process: starting others takes seconds."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "stack.tif"
    tifffile.imwrite(path, IMAGE, photometric="minisblack", compression="zlib")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stack, client, one_thread):
    path = tmp_path_factory.mktemp("output") / "volume.zarr"
    segment_volume(stack, path, OPTIONS, client=client)
    return path


def mitoseg(*arguments, before="", timeout=300):
    """Run the command line in a process of its own, with all workers in its process group."""
    code = "from mitoseg_lib.cli import app; app()"
    return subprocess.Popen(
        ["bash", "-c", f'{before} exec "$@"', "_", sys.executable, "-c", code, "volume", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# --- the result ---------------------------------------------------------------------------------------------


def test_the_mask_is_what_mitoseg_predict_writes(finished, stack, tmp_path, one_thread):
    segmenter = Segmenter.load(device="cpu")
    plan_prediction(stack, tmp_path / "mask.zarr", segmenter, voxel_size_nm=SIZE).run()
    mask = open_level(finished, MASK)[:]
    assert np.array_equal(mask, zarr.open_array(tmp_path / "mask.zarr" / "0")[:]) and 0 < mask.sum() < mask.size


def test_probabilities_are_there_and_agree_with_the_mask(finished):
    probabilities, mask = (open_level(finished, what)[:] for what in ("probabilities", MASK))
    limit = 254 * Segmenter.load(device="cpu").threshold
    differs = (probabilities > limit) != (mask == 1)  # only where rounding has crossed the threshold
    assert (np.abs(probabilities[differs] - limit) <= 0.5).all() and differs.mean() < 0.01


def test_labels_are_those_of_the_whole_mask_in_voxel_order(finished):
    labels, mask = open_level(finished, LABELS)[:], open_level(finished, MASK)[:] == 1
    whole = label_instances(mask)
    pairs = np.unique(np.stack([labels[mask], whole[mask]]), axis=1)
    assert pairs.shape[1] == labels.max() == whole.max() and not labels[~mask].any()
    first = [np.flatnonzero(labels == n)[0] for n in range(1, labels.max() + 1)]
    assert first == sorted(first)


def test_the_table_says_what_the_labels_say(finished):
    labels, rows = open_level(finished, LABELS)[:], read_table(finished)
    assert [row.id for row in rows] == list(range(1, labels.max() + 1))
    for row in rows:
        mask = labels == row.id
        z, y, x = np.nonzero(mask)
        assert row.volume_um3 == pytest.approx(mask.sum() * 125e-9, rel=1e-5)
        assert (row.z_min, row.y_max, row.x_max) == (z.min(), y.max(), x.max())
        assert row.x_um == pytest.approx(x.mean() * 0.005, rel=1e-4, abs=1e-6)
        assert row.mean_grey == pytest.approx(IMAGE[mask].mean(), rel=1e-4)
        assert row.surface_um2 == pytest.approx(surface_area(mask, SIZE) * 1e-6, rel=1e-5)
        assert row.touches_border == any(
            (i == 0).any() or (i == n - 1).any() for i, n in zip((z, y, x), mask.shape, strict=True)
        )
        box = mask[z.min() : z.max() + 1, y.min() : y.max() + 1, x.min() : x.max() + 1]
        axis = find_axis(box, SIZE)
        assert row.length_um == pytest.approx(axis.length_nm / 1000, rel=1e-5) and row.branches == axis.branches


@pytest.mark.parametrize("kind", ["zarr", "folder", "uint16"])
def test_another_kind_of_input_gives_the_same_bytes(kind, finished, tmp_path, client, one_thread):
    source = tmp_path / "input"
    if kind == "zarr":
        source = tmp_path / "input.zarr"
        zarr.create_array(source, data=IMAGE, chunks=(7, 50, 50))
    elif kind == "folder":
        source.mkdir()
        for z, grey in enumerate(IMAGE):
            tifffile.imwrite(source / f"s{z}.tif", grey, photometric="minisblack")
    else:
        tifffile.imwrite(source := tmp_path / "wide.tif", IMAGE.astype(np.uint16), photometric="minisblack")
    segment_volume(source, tmp_path / "volume.zarr", OPTIONS, client=client)
    found, expected = small_volume.files_of(tmp_path / "volume.zarr"), small_volume.files_of(finished)
    if kind == "uint16":  # only what it says of its input differs
        found.pop("zarr.json"), expected.pop("zarr.json")
    assert found == expected


@pytest.mark.parametrize(("shape", "size"), [((1, 33, 40), SIZE), ((11, 50, 61), (8.0, 4.0, 4.0)), ((5, 8, 8), SIZE)])
def test_odd_sizes_and_other_voxels_are_as_mitoseg_predict_has_them(shape, size, tmp_path, client, one_thread):
    image = IMAGE[tuple(slice(n) for n in shape)]
    tifffile.imwrite(tmp_path / "odd.tif", image, photometric="minisblack")
    segment_volume(tmp_path / "odd.tif", tmp_path / "v.zarr", VolumeOptions(voxel_size_nm=size), client=client)
    plan_prediction(tmp_path / "odd.tif", tmp_path / "m.zarr", Segmenter.load(device="cpu"), voxel_size_nm=size).run()
    assert np.array_equal(open_level(tmp_path / "v.zarr", MASK)[:], zarr.open_array(tmp_path / "m.zarr" / "0")[:])


def test_nothing_in_it_tells_of_this_machine(finished, stack):
    secrets = [str(finished.parent), str(stack), stack.name, time.strftime("%Y-%m-%d")]
    secrets += [name for name in [socket.gethostname()] if len(name) > 5]  # a shorter one stands in other words
    for path in finished.rglob("*"):
        text = path.read_text() if path.suffix in (".json", ".csv") else ""
        assert not [secret for secret in secrets if secret in text], path
    assert not list(finished.rglob("*.part*")) and not list(finished.rglob(".*"))


def test_only_the_result_is_left(finished):
    assert [path.name for path in finished.parent.iterdir()] == ["volume.zarr"]


# --- objects, without a model -------------------------------------------------------------------------------


@pytest.fixture
def grey(tmp_path):
    """Writes grey levels, and returns their path."""

    def write(values):
        tifffile.imwrite(tmp_path / "grey.tif", values, photometric="minisblack")
        return tmp_path / "grey.tif"

    return write


def balls(shape, *spheres):
    mask = np.zeros(shape, bool)
    for *centre, radius in spheres:
        mask |= sum((i - c) ** 2 for i, c in zip(np.indices(shape), centre, strict=True)) <= radius**2
    return mask


@given(depth=st.integers(1, 5000))
def test_predicted_slabs_are_even_and_cover_the_volume(depth):
    slabs = small_volume.job_of("grey.tif", "work", (depth, 8, 8)).predicted_slabs
    assert [z for slab in slabs for z in slab] == list(range(depth))
    layers = [-(-len(slab) // 8) for slab in slabs]
    assert max(layers) - min(layers) <= 1 and max(layers) <= 24 and layers == sorted(layers, reverse=True)
    assert all(slab.start % 8 == 0 for slab in slabs) and (len(slabs) == 1 or len(slabs) % 2 == 0)


@pytest.mark.parametrize("slab", [8, 16, 1000])
def test_any_depth_of_slabs_gives_the_same_numbers(slab, tmp_path, grey, monkeypatch):
    mask = ndimage.gaussian_filter(np.random.default_rng(0).random((40, 60, 70)), 2) > 0.52
    monkeypatch.setattr("mitoseg_lib.volumes.job.LARGEST_SLAB", slab * 60 * 70)
    job = small_volume.job_of(grey(mask.astype(np.uint8)), tmp_path / "work", mask.shape)
    assert len(job.slabs()) == -(-40 // slab)
    labels = small_volume.with_mask(job, mask)
    assert labels.max() == label_instances(mask).max() > 20
    assert np.array_equal(labels > 0, mask)


def test_touching_balls_are_separated_across_slabs(tmp_path, grey, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.volumes.job.LARGEST_SLAB", 1)
    spheres = [(14, 20, 20, 11), (33, 20, 20, 10)]
    mask = balls((48, 40, 64), *spheres, (20, 20, 50, 8))
    values = np.where(balls(mask.shape, spheres[0]), 200, 100).astype(np.uint8)
    whole = small_volume.with_mask(small_volume.job_of(grey(values), tmp_path / "whole", mask.shape), mask)
    job = small_volume.job_of(grey(values), tmp_path / "split", mask.shape, split=True)
    labels = small_volume.with_mask(job, mask)
    assert whole.max() == 2 and labels.max() == 3 and np.array_equal(labels > 0, mask)
    for n, sphere in enumerate(spheres):
        ball = balls(mask.shape, sphere)
        found = labels == labels[sphere[:3]]
        assert (found & ball).sum() / (found | ball).sum() > 0.97, n
    assert labels[14, 20, 20] == 1 and labels[20, 20, 50] == 2 and labels[33, 20, 20] == 3
    sums = job.load("order")
    assert sums["voxels"].tolist() == [int((labels == n).sum()) for n in (1, 2, 3)]
    assert sums["grey"].tolist() == [float(values[labels == n].sum()) for n in (1, 2, 3)]
    assert np.array_equal(sums["lower"][2], np.argwhere(labels == 3).min(axis=0))


def test_small_objects_are_in_the_mask_but_not_among_the_labels(tmp_path, grey):
    mask = balls((20, 30, 40), (10, 15, 10, 6))
    mask[3:5, 3:5, 30:32] = True
    smallest = 8 * 125e-9
    source = grey(mask.astype(np.uint8))
    for name, limit, n in (("at", smallest, 2), ("above", smallest * 1.01, 1)):
        job = small_volume.job_of(source, tmp_path / name, mask.shape, min_volume_um3=limit)
        labels = small_volume.with_mask(job, mask)
        assert labels.max() == n and job.load("order")["voxels"].tolist() == [8, int(mask.sum()) - 8][2 - n :]
        assert (open_level(job.group, MASK)[:] == mask).all()


def test_coarser_levels_show_the_same_objects(tmp_path, grey, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.volumes.layout.SMALLEST", 16)
    monkeypatch.setattr("mitoseg_lib.volumes.job.LARGEST_SLAB", 1)
    mask = balls((37, 50, 61), (10, 15, 10, 8), (25, 30, 45, 9))
    job = small_volume.job_of(grey(mask.astype(np.uint8)), tmp_path / "work", mask.shape)
    labels = small_volume.with_mask(job, mask)
    assert len(job.levels) == 3
    for number, level in enumerate(job.levels):
        coarse = open_level(job.group, LABELS, number)[:]
        for n in (1, 2):
            share = (coarse == n).sum() * np.prod(level.factors) / (labels == n).sum()
            assert abs(share - 1) < 0.15
        assert np.array_equal(open_level(job.group, MASK, number)[:] == 1, coarse > 0)


def test_objects_in_memory_are_measured_alike(finished):
    rows = measure_objects(open_level(finished, LABELS)[:].astype(np.int32), IMAGE, SIZE)
    for row, expected in zip(rows, read_table(finished), strict=True):
        for name, value in vars(row).items():
            assert value == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-9), name


def test_labels_that_cannot_be_measured_get_a_sentence():
    with pytest.raises(ValueError, match=r"the same .* and numbers without gaps were expected"):
        measure_objects(np.array([[[1, 0, 3]]]), np.zeros((1, 1, 3), np.uint8), SIZE)


# --- interruptions ------------------------------------------------------------------------------------------


def test_interrupted_after_any_step_it_ends_with_the_same_bytes(finished, stack, tmp_path, client, one_thread):
    options = OPTIONS
    plan = plan_volume(stack, tmp_path / "volume.zarr", options)
    steps = steps_of(plan.job)
    plan.folder.mkdir()
    plan.prepare()
    done = 0
    while done < len(steps):
        done = min(done + 2, len(steps))
        half = steps[done:][:1]
        assert run_steps(steps[:done], client, is_done=plan.job.is_done) == {}
        for step in half:  # and half of the next one: its work, but no marker
            step.work()
            plan.job.marker(step.name).unlink()
            for chunk in list(plan.job.group.rglob("c/*/*/*"))[-1:]:
                chunk.with_suffix(".0123.partial").write_bytes(b"cut")
        again = plan_volume(stack, tmp_path / "volume.zarr", options)
        again.prepare()
    again.run(client)
    assert small_volume.files_of(tmp_path / "volume.zarr") == small_volume.files_of(finished)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(finished, stack, tmp_path):
    target, moments = tmp_path / "volume.zarr", random.Random(4)
    arguments = [stack, target, "--voxel-size", "5,5,5", "--probabilities", "--device", "cpu", "--workers", "2"]
    for _ in range(3):
        process = mitoseg(*arguments)
        time.sleep(moments.uniform(3, 16))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = mitoseg(*arguments, "--verify")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "mitochondria in" in out and "as they were written" in out
    assert small_volume.files_of(target) == small_volume.files_of(finished)


def test_a_full_disk_is_said_in_a_sentence_and_repaired_by_the_same_command(finished, stack, tmp_path, client):
    target = tmp_path / "volume.zarr"
    arguments = [stack, target, "--voxel-size", "5,5,5", "--probabilities", "--device", "cpu", "--workers", "1"]
    process = mitoseg(*arguments, before="ulimit -f 6;")  # no file of more than 6 KB
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "is full" in err and "Traceback" not in err, err
    assert not target.exists()
    segment_volume(stack, target, OPTIONS, client=client)
    assert small_volume.files_of(target) == small_volume.files_of(finished)


def test_killed_after_the_result_has_its_name_it_is_finished(finished, stack, tmp_path, client):
    import shutil

    target = tmp_path / "volume.zarr"
    shutil.copytree(finished, target)
    plan = plan_volume(stack, target, OPTIONS)
    plan.job.progress.mkdir(parents=True)
    (plan.folder / "plan.json").write_text("{}")
    (tmp_path / ".volume.zarr.123.old").mkdir()
    plan.run(client)
    assert [path.name for path in tmp_path.iterdir()] == ["volume.zarr"]


def test_two_at_once_are_refused(stack, tmp_path, client):
    from filelock import FileLock

    plan = plan_volume(stack, tmp_path / "volume.zarr", OPTIONS)
    plan.folder.mkdir()
    with FileLock(plan.folder / "lock"), pytest.raises(StackError, match=r"Another process is at work on volume.zarr"):
        plan.run(client)


# --- what is there already ----------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["volume", *map(str, arguments)])


def test_a_finished_volume_is_left_as_it_is(finished, stack):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    found = invoke(stack, finished, "--voxel-size", "5,5,5", "--probabilities", "--device", "cpu")
    assert found.exit_code == 0 and "finished already" in found.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "0.9"], "model threshold"),
        (["--threads", "2"], "computed threads"),
        (["--min-volume", "1"], "output min volume um3"),
        (["--split"], "output split"),
    ],
)
def test_other_settings_are_refused_by_name(options, words, finished, stack):
    found = invoke(stack, finished, "--voxel-size", "5,5,5", "--probabilities", "--device", "cpu", *options)
    assert found.exit_code == 1 and f"({words})" in found.stderr and "--overwrite" in found.stderr


def test_a_volume_that_another_version_has_finished_is_finished(finished, stack, monkeypatch, client):
    monkeypatch.setattr("mitoseg_lib.volumes.plan.__version__", "99")
    before = small_volume.files_of(finished)
    assert plan_volume(stack, finished, OPTIONS).run(None)["objects"] == len(read_table(finished))
    assert small_volume.files_of(finished) == before


def test_an_unfinished_volume_of_another_version_is_refused(stack, tmp_path, monkeypatch, client):
    plan = plan_volume(stack, tmp_path / "volume.zarr", OPTIONS)
    plan.folder.mkdir()
    plan.prepare()
    monkeypatch.setattr("mitoseg_lib.volumes.plan.__version__", "99")
    with pytest.raises(StackError, match=r"\(computed mitoseg lib\)"):
        plan_volume(stack, tmp_path / "volume.zarr", OPTIONS).run(client)


def test_another_model_is_refused(finished, stack, tmp_path):
    save_weights(grey_unet(100), tmp_path / "other.safetensors", rule=MaskRule(0.35))
    found = invoke(
        stack, finished, "--voxel-size", "5,5,5", "--probabilities", "--device", "cpu",
        "--weights", tmp_path / "other.safetensors",
    )  # fmt: skip
    assert found.exit_code == 1 and "model weights sha256" in found.stderr


def test_a_changed_input_is_refused_with_its_slices(finished, stack, tmp_path, client):
    changed = IMAGE.copy()
    changed[40, 50, 60] += 1
    tifffile.imwrite(tmp_path / "stack.tif", changed, photometric="minisblack")
    with pytest.raises(StackError, match=r"stack.tif has changed in slices 24 to 43 since volume.zarr was made"):
        plan_volume(tmp_path / "stack.tif", finished, OPTIONS)


def test_an_input_that_changes_its_shape_between_two_calls_is_opened_anew(tmp_path, client, one_thread):
    path = tmp_path / "stack.tif"
    for depth in (9, 12):
        tifffile.imwrite(path, IMAGE[:depth], photometric="minisblack")
        segment_volume(path, tmp_path / f"{depth}.zarr", OPTIONS, client=client)
    direct = tmp_path / "other.tif"
    tifffile.imwrite(direct, IMAGE[:12], photometric="minisblack")
    segment_volume(direct, tmp_path / "direct.zarr", OPTIONS, client=client)
    assert small_volume.files_of(tmp_path / "12.zarr") == small_volume.files_of(tmp_path / "direct.zarr")


def test_an_unfinished_volume_of_a_changed_input_is_refused_unless_overwritten(
    finished, stack, tmp_path, client, one_thread
):
    changed = IMAGE.copy()
    changed[3, 50, 60] += 1
    tifffile.imwrite(tmp_path / "changed.tif", changed, photometric="minisblack")
    first = plan_volume(tmp_path / "changed.tif", tmp_path / "volume.zarr", OPTIONS)
    first.folder.mkdir()
    first.prepare()
    run_steps(steps_of(first.job)[:1], client, is_done=first.job.is_done)
    with pytest.raises(StackError, match=r"stack.tif has changed in slices 0 to 23"):
        segment_volume(stack, tmp_path / "volume.zarr", OPTIONS, client=client)
    segment_volume(stack, tmp_path / "volume.zarr", OPTIONS, client=client, overwrite=True)
    assert small_volume.files_of(tmp_path / "volume.zarr") == small_volume.files_of(finished)


def test_overwriting_replaces_a_finished_volume_only_at_the_end(finished, stack, tmp_path, client, one_thread):
    import shutil

    target = tmp_path / "volume.zarr"
    shutil.copytree(finished, target)
    before = small_volume.files_of(target)
    options = VolumeOptions(voxel_size_nm=SIZE, device="cpu", threshold=0.9)
    plan = plan_volume(stack, target, options, overwrite=True)
    plan.folder.mkdir()
    plan.prepare()
    run_steps(steps_of(plan.job)[:3], client, is_done=plan.job.is_done)
    assert small_volume.files_of(target) == before
    plan.run(client)
    assert not (target / "probabilities").exists() and small_volume.files_of(target) != before


def test_what_the_command_did_not_make_is_left_alone(stack, tmp_path):
    zarr.create_array(tmp_path / "other.zarr", data=IMAGE[:2])
    before = small_volume.files_of(tmp_path)
    found = invoke(stack, tmp_path / "other.zarr", "--voxel-size", "5,5,5")
    assert found.exit_code == 1 and "isn't a volume that this command has made" in found.stderr
    assert small_volume.files_of(tmp_path) == before


# --- mistakes -----------------------------------------------------------------------------------------------


def test_planning_needs_no_network():
    code = (
        "import sys; from mitoseg_lib.volumes import plan_volume, VolumeOptions; import numpy, tifffile, tempfile\n"
        "with tempfile.TemporaryDirectory() as name:\n"
        "    tifffile.imwrite(f'{name}/a.tif', numpy.arange(512, dtype='uint8').reshape(8, 8, 8))\n"
        "    plan_volume(f'{name}/a.tif', f'{name}/a.zarr', VolumeOptions(voxel_size_nm=(5, 5, 5), device='cpu'))\n"
        "print('segmentation_models_pytorch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"  # its import takes seconds, and only workers need it


def test_a_missing_voxel_size_is_asked_for(stack, tmp_path):
    found = invoke(stack, tmp_path / "v.zarr")
    assert found.exit_code == 1 and "doesn't state its voxel size" in found.stderr and "--voxel-size" in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["v.tif", "--voxel-size", "5,5,5"], "ending in .zarr"),
        (["v.zarr", "--voxel-size", "5,5"], "three lengths"),
        (
            ["v.zarr", "--voxel-size", "5,5,5", "--workers", "2", "--scheduler", "tcp://127.0.0.1:1"],
            "choose one of them",
        ),
        (["none/v.zarr", "--voxel-size", "5,5,5"], "isn't a folder"),
    ],
)
def test_mistakes_get_a_sentence(arguments, words, stack, tmp_path):
    found = invoke(stack, tmp_path / arguments[0], *arguments[1:])
    assert found.exit_code in (1, 2) and words in " ".join(found.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_no_cluster_at_an_address_is_said(stack, tmp_path, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.volumes.engine.CONNECT_SECONDS", 1)
    found = invoke(stack, tmp_path / "v.zarr", "--voxel-size", "5,5,5", "--scheduler", "tcp://127.0.0.1:9")
    assert found.exit_code == 3 and "No Dask cluster" in found.stderr


def test_a_damaged_input_is_named(tmp_path, client):
    source = tmp_path / "input.zarr"
    zarr.create_array(source, data=IMAGE, chunks=(8, 96, 120))
    plan = plan_volume(source, tmp_path / "volume.zarr", OPTIONS)
    (source / "c" / "4" / "0" / "0").write_bytes(b"damaged")
    with pytest.raises(StackError, match=r"input\.zarr"):
        plan.run(client)


# --- verification -------------------------------------------------------------------------------------------


def test_a_volume_as_it_was_written_has_no_faults(finished):
    found = verify_volume(finished)
    assert found.faults == () and found.n_chunks == 3 * 6


@pytest.mark.parametrize("what", ["0/c/0/0/0", "labels/mitochondria/0/c/3/0/0", "probabilities/0/c/5/0/0"])
def test_damaged_and_missing_chunks_are_found(what, finished, tmp_path):
    import shutil

    copy = tmp_path / "volume.zarr"
    shutil.copytree(finished, copy)
    content = bytearray((copy / what).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / what).write_bytes(content)
    assert [fault.split()[0] for fault in verify_volume(copy).faults] == [what]
    (copy / what).unlink()
    assert verify_volume(copy).faults == (f"{what} is missing",)


def test_chunks_that_were_not_computed_and_another_table_are_found(finished, tmp_path):
    import shutil

    copy = tmp_path / "volume.zarr"
    shutil.copytree(finished, copy)
    open_level(copy, MASK, mode="r+")[9, 1, 1] = 255
    with open(copy / "measurements.csv", "a") as stream:
        stream.write("99,1\n")
    first, second = verify_volume(copy).faults
    assert first == "0/c/1/0/0 holds voxels that weren't computed" and second == "measurements.csv has changed"


def test_only_finished_volumes_can_be_verified(stack, tmp_path):
    with pytest.raises(StackError, match="isn't a finished volume"):
        verify_volume(tmp_path / "none.zarr")


# --- the real stack -----------------------------------------------------------------------------------------


def test_a_part_of_the_real_stack(epfl_folder, tmp_path, client, one_thread):
    reader = open_reader(epfl_folder / "testing.tif")
    tifffile.imwrite(tmp_path / "part.tif", reader.read(0, 16), photometric="minisblack")
    rows = segment_volume(tmp_path / "part.tif", tmp_path / "v.zarr", VolumeOptions(voxel_size_nm=SIZE), client=client)
    assert 5 < len(rows) < 200 and max(row.volume_um3 for row in rows) > 0.001


def test_failed_slabs_are_named(stack, tmp_path, client, monkeypatch):
    from mitoseg_lib.volumes import plan as plans

    plan = plan_volume(stack, tmp_path / "volume.zarr", OPTIONS)
    lost = {step.name: step for step in steps_of(plan.job)[:1]}
    monkeypatch.setattr(plans, "run_steps", lambda *_, **__: lost)
    with pytest.raises(VolumeError, match=r"died twice of 1 step \(predicting slices 0 to 23\)"):
        plan.run(client)
    assert not (tmp_path / "volume.zarr").exists() and plan.folder.exists()
