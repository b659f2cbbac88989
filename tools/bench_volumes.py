"""Speed, memory and sturdiness of `mitoseg volume`: parts of ``make bench``, recorded in results/speed/volumes.json."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import tifffile
import torch

from mitoseg_lib.datasets import load_example
from mitoseg_lib.memory import reuse_memory
from mitoseg_lib.prediction import Segmenter, choose_conversion
from mitoseg_lib.readers import open_reader
from mitoseg_lib.volumes import (
    MASK,
    VolumeOptions,
    local_cluster,
    open_level,
    plan_volume,
    read_table,
    steps_of,
)  # fmt: skip
from mitoseg_lib.volumes.engine import run_steps
from mitoseg_lib.volumes.job import slabs_of
from records import recording

SHAPE = (1065, 1536, 2048)  # of EPFL's whole volume
SIZE = (5.0, 5.0, 5.0)
KILLS = 20

Row = Callable[[str, str, str], None]


def mirrored(depth: int, shape: tuple[int, ...] = SHAPE) -> Iterator[np.ndarray]:
    """Slices of a volume of phantom tiles, each the mirror image of its neighbours, so that nothing is cut off."""
    tile = load_example("test").image
    period = 2 * (len(tile) - 1)
    rows, columns = (
        np.pad(np.arange(side), (0, n), mode="reflect")[:n] for side, n in zip(tile.shape[1:], shape[1:], strict=True)
    )
    for z in range(depth):
        yield tile[min(z % period, period - z % period)][np.ix_(rows, columns)]


def write_volume(path: Path, depth: int, shape: tuple[int, ...] = SHAPE) -> Path:
    """Write such a volume as a TIFF without compression."""
    tifffile.imwrite(
        path, mirrored(depth, shape), shape=(depth, *shape[1:]), dtype=np.uint8, photometric="minisblack",
        resolution=(1 / 0.005, 1 / 0.005), metadata={"spacing": 0.005, "unit": "um", "axes": "ZYX"}, imagej=True,
    )  # fmt: skip
    return path


def command(*arguments: object) -> list[str]:
    """Return the command line of `mitoseg volume`."""
    return [sys.executable, "-c", "from mitoseg_lib.cli import app; app()", "volume", *map(str, arguments)]


def measured(*arguments: object) -> tuple[float, float]:
    """Seconds of a run, and the largest sum of the memory (GB) of all its processes, which share what they share."""
    started, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would be full some time
        process = subprocess.Popen(command(*arguments), stdout=said, stderr=said)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, memory_of(tree))
            time.sleep(3)  # each look at the memory takes time, too
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:])
    return time.perf_counter() - started, peak / 1e9


def memory_of(tree: psutil.Process) -> float:
    """Proportional set size of a process and all its children, in bytes."""
    total = 0.0
    for process in [tree, *tree.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has just ended
    return total


def in_a_process(call: str) -> tuple[float, str]:
    """Seconds that a call of a function of this module takes in a process of its own, and what it returns."""
    code = f"import bench_volumes\nif __name__ == '__main__':\n    print(bench_volumes.{call})"
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "call.py"
        script.write_text(code)
        environment = os.environ | {"PYTHONPATH": os.fspath(Path(__file__).parent)}
        started = time.perf_counter()
        done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - started, done.stdout.split()[-1]


def loop(source: str) -> str:
    """Predict slice after slice, and return the sha256 of the mask."""
    reuse_memory()
    torch.set_num_threads(1)
    reader, segmenter, digest = open_reader(source), Segmenter.load(device="cpu"), hashlib.sha256()
    found = choose_conversion(reader, segmenter.voxel_size_nm, segmenter.grey_range)
    depth = reader.shape[0]
    slabs = (found.grey.apply(reader.read(s.start, s.stop)) for s in slabs_of(depth, 8))
    for slab in segmenter.stream(slabs, reader.shape, found.voxel_size_nm):
        digest.update((slab >= np.float32(segmenter.threshold)).tobytes())
    return digest.hexdigest()


def only_predict(source: str, target: str) -> str:
    """Do the steps of a volume that predict, with one worker, and no others; return the sha256 of the mask."""
    plan = plan_volume(source, target, VolumeOptions(device="cpu"))
    plan.folder.mkdir()
    plan.prepare()
    steps = [step for step in steps_of(plan.job) if not step.needs]
    with local_cluster(1, plane=plan.job.shape[1:]) as client:
        run_steps(steps, client, is_done=plan.job.is_done)
    return mask_sha256(plan.job.group)


def mask_sha256(path: Path) -> str:
    """sha256 of a volume's mask, slice by slice."""
    digest, mask = hashlib.sha256(), open_level(path, MASK)
    for s in slabs_of(mask.shape[0], 8):
        digest.update((mask[s.start : s.stop] == 1).tobytes())
    return digest.hexdigest()


def repeats(path: Path) -> bool:
    """Tell whether a mask repeats as its mirrored input does, away from both ends."""
    period, mask = 2 * (len(load_example("test").image) - 1), open_level(path, MASK)
    return all(np.array_equal(mask[z], mask[z + period]) for z in range(8, mask.shape[0] - period - 8))


def bench_sizes(row: Row, depths: tuple[int, ...] = (133, 266, 533, 1065)) -> None:
    """Minutes and memory of whole volumes, 2 workers; the start of processes, which is always the same, apart."""
    with tempfile.TemporaryDirectory() as name, recording("volumes") as record:
        folder, found = Path(name), []
        tiny = write_volume(folder / "tiny.tif", 8, (8, 64, 64))
        start, _ = measured(tiny, folder / "tiny.zarr", "--workers", 2, "--device", "cpu")
        row("a volume of 8 x 64 x 64 voxels: start and end of processes", f"{start:.0f} s", "")
        for depth in depths:
            source, target = write_volume(folder / "volume.tif", depth), folder / f"{depth}.zarr"
            took, memory = measured(source, target, "--workers", 2, "--device", "cpu")
            row(f"{depth} x 1536 x 2048 voxels, 2 workers", f"{took / 60:.1f} min", "")
            row("    peak memory of all processes", f"{memory:.2f} GB", "at most 6 GB")
            found.append({"slices": depth, "seconds": round(took, 1), "peak_gb": round(memory, 2)})
            found[-1] |= {"objects": len(read_table(target)), "bytes": size_of(target), "repeats": repeats(target)}
            rates = [(one["seconds"] - start) / one["slices"] for one in (found[-1], found[0])]
            row("    time a slice after the start, beside the smallest", f"{rates[0] / rates[1]:.2f}", "0.9 to 1.1")
            source.unlink()
        record["sizes"], record["start_seconds"] = found, round(start, 1)
        row("mask repeats like its input, all volumes", str(all(one["repeats"] for one in found)), "True")


def bench_workers(row: Row, shape: tuple[int, ...] = (533, 768, 1024)) -> None:
    """Two workers against one."""
    with tempfile.TemporaryDirectory() as name, recording("volumes") as record:
        folder = Path(name)
        source = write_volume(folder / "volume.tif", shape[0], shape)
        took = {n: measured(source, folder / f"{n}.zarr", "--workers", n, "--device", "cpu")[0] for n in (1, 2)}
        row(f"{shape[0]} slices of 768 x 1024, 1 worker of one thread", f"{took[1]:.0f} s", "")
        row("    2 workers: times as fast", f"{took[1] / took[2]:.2f}", "at least 1.7")
        record["workers"] = {
            "shape": list(shape),
            "seconds": {str(n): round(seconds, 1) for n, seconds in took.items()},
        }


def bench_overhead(row: Row, shape: tuple[int, ...] = (1065, 768, 1024)) -> None:
    """One worker against a bare loop in one process."""
    with tempfile.TemporaryDirectory() as name, recording("volumes") as record:
        folder = Path(name)
        source = write_volume(folder / "volume.tif", shape[0], shape)
        loop_took, loop_sha = in_a_process(f"loop({os.fspath(source)!r})")
        engine_took, engine_sha = in_a_process(f"only_predict({os.fspath(source)!r}, {os.fspath(folder / 'p.zarr')!r})")
        row(f"bare loop over {shape[0]} slices of 768 x 1024, one thread", f"{loop_took:.0f} s", "")
        row("the same by one worker, start included", f"{engine_took:.0f} s", "")
        row("    beside the bare loop", f"{engine_took / loop_took:.2f}", "at most 1.1")
        row("    equal masks", str(engine_sha == loop_sha), "True")
        record["overhead"] = {
            "shape": list(shape),
            "equal": engine_sha == loop_sha,
            "bare_loop_seconds": round(loop_took, 1),
            "one_worker_seconds": round(engine_took, 1),
        }


def bench_kills(row: Row, kills: int = KILLS) -> None:
    """Kill a whole run again and again at random moments, and compare what it ends with."""
    with tempfile.TemporaryDirectory() as name, recording("volumes") as record:
        folder, moments, equal, killed, runs = Path(name), random.Random(0), 0, 0, 0
        source = write_volume(folder / "volume.tif", 72, (72, 640, 768))
        arguments = [source, folder / "whole.zarr", "--workers", 2, "--device", "cpu", "--probabilities"]
        took, _ = measured(*arguments)
        expected = files_sha256(folder / "whole.zarr")
        while killed < kills:  # a run that was faster than expected may end before its moment comes
            runs, target = runs + 1, folder / f"{runs}.zarr"
            own = [source, target, *arguments[2:]]
            process = subprocess.Popen(
                command(*own), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            time.sleep(moments.uniform(took / 3, took))  # before that, processes only start
            if process.poll() is None:
                killed += 1
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            measured(*own)
            equal += files_sha256(target) == expected
        row(f"{killed} kills in {runs} runs of {took:.0f} s: equal results", str(equal), str(runs))
        record["kills"] = {"runs": runs, "killed": killed, "equal": equal, "seconds_uninterrupted": round(took, 1)}


def size_of(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def files_sha256(path: Path) -> str:
    """sha256 of all names and contents in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
