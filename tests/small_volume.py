"""Small volumes, and steps that die, for tests of `mitoseg_lib.volumes`."""

import hashlib
import os
import signal
from pathlib import Path

import numpy as np

from mitoseg_lib.grey import GreyTransform
from mitoseg_lib.volumes.job import Job
from mitoseg_lib.volumes.layout import MASK, create_group, open_level
from mitoseg_lib.volumes.plan import steps_of


def files_of(folder):
    """The sha256 of every file in a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def job_of(source, folder, shape, size=(5.0, 5.0, 5.0), **changes):
    """A job that needs no model, since its mask is there already."""
    settings = {
        "voxel_size_nm": size, "grey": GreyTransform(None), "weights": None, "weights_sha256": "", "threshold": 0.5,
        "tta": False, "device": "cpu", "precision": "fp32", "threads": 1, "probabilities": False,
        "min_volume_um3": 0.0, "split": False,
    }  # fmt: skip
    return Job(str(source), str(folder), shape, **(settings | changes))


def with_mask(job, mask):
    """Do all steps of a job but the prediction, one after the other, and return the labels."""
    job.progress.mkdir(parents=True)
    create_group(job.group, job.levels, job.voxel_size_nm, probabilities=False)
    open_level(job.group, MASK, mode="r+")[:] = mask.astype(np.uint8)
    for step in steps_of(job):
        if not step.name.startswith("segment"):
            step.work()
    return open_level(job.group, "labels/mitochondria")[:]


def touch(folder, name):
    Path(folder, name).touch()


def die(folder, name, times):
    """Kill this process the first times that it is called."""
    with open(Path(folder, f"{name}.deaths"), "a+b") as deaths:
        deaths.write(b"x")
        deaths.flush()
        if deaths.tell() <= times:
            os.kill(os.getpid(), signal.SIGKILL)
    touch(folder, name)


def fail(error):
    raise error
