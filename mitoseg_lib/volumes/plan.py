"""What is decided before a volume is segmented, and what is found of an attempt that was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from mitoseg_lib import __version__
from mitoseg_lib.errors import FilePath, StackError
from mitoseg_lib.files import write_whole
from mitoseg_lib.inference import batch_size_on, is_bf16_native
from mitoseg_lib.prediction import Conversion, choose_conversion, choose_device, metadata_for_slices
from mitoseg_lib.readers import SliceReader, open_reader
from mitoseg_lib.stacks import file_sha256
from mitoseg_lib.streams import surroundings
from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.volumes.engine import Step, run_steps
from mitoseg_lib.volumes.job import GROUP, PROGRESS, Job, VolumeError, sha256_of_slices, weights_path
from mitoseg_lib.volumes.layout import Shape, create_group
from mitoseg_lib.volumes.table import finish_group, read_provenance
from mitoseg_lib.volumes.work import perform
from mitoseg_lib.writers import check_target, is_zarr_name, replace_target

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["VolumeOptions", "VolumePlan", "plan_volume", "steps_of"]

UNFINISHED, PLAN, LOCK = ".unfinished", "plan.json", "lock"
VERSIONS = ("torch", "mitoseg_lib")
SHORT = 0.05  # how long the steps after the prediction take for a slice, beside it


@dataclass(frozen=True)
class VolumeOptions:
    """How a volume is segmented.

    Attributes
    ----------
    weights
        File of the model; None is the one that comes with the library.
    voxel_size_nm
        (z, y, x); it counts more than what the input itself says. One of them is needed.
    threshold
        Instead of the model's own.
    tta
        Average over eight orientations; 8 times as slow.
    probabilities
        Keep them, too.
    min_volume_um3
        Leave out smaller objects, in labels and table; the mask keeps them.
    split
        Separate touching objects where they hang together by a neck only; see `mitoseg_lib.shapes.split_touching`.
        Objects whose box has more than 33 million voxels stay as they are.
    device
        "cpu", "cuda" or "auto".
    threads
        Of the processor, for each worker.
    """

    weights: FilePath | None = None
    voxel_size_nm: VoxelSize | None = None
    threshold: float | None = None
    tta: bool = False
    probabilities: bool = False
    min_volume_um3: float = 0.0
    split: bool = False
    device: str = "auto"
    threads: int = 1


DEFAULTS = VolumeOptions()


@dataclass(frozen=True)
class VolumePlan:
    """What `plan_volume` decided; nothing was written yet.

    Attributes
    ----------
    job
        What workers are told.
    target
        Path of the finished OME-Zarr.
    fingerprint
        What the result depends on: input, model, settings, number types, threads, versions. An interrupted volume goes
        on only with the same.
    notes
        What the user should know, one sentence each.
    overwrite
        Whether a finished volume may be replaced.
    """

    job: Job
    target: Path
    fingerprint: dict
    notes: tuple[str, ...]
    overwrite: bool

    @property
    def folder(self) -> Path:
        """Where the volume is until it is finished."""
        return Path(self.job.folder)

    @property
    def is_finished(self) -> bool:
        """Whether the target is the result of the same plan already, and isn't to be made anew."""
        return self.target.exists() and not self.overwrite

    def run(self, client: Client | None, *, progress: bool = False) -> dict:
        """Segment the volume, or go on with it.

        Parameters
        ----------
        client
            A Dask client; `mitoseg_lib.volumes.local_cluster` starts one.
        progress
            Show bars on stderr.

        Returns
        -------
        dict
            What the result says of itself: "objects", how many, and what it depends on.

        Raises
        ------
        StackError
            If the input has changed or is damaged, the disk is full, or another process is at work on it.
        VolumeError
            If some slabs couldn't be done, or the scheduler is gone; what is done stays.
        """
        if self.is_finished:
            self._clear()
            return read_provenance(self.target)
        self.folder.mkdir(exist_ok=True)
        with _locked(self.folder / LOCK, self.target.name):
            self.prepare(progress=progress)
            failed = run_steps(steps_of(self.job), client, is_done=self.job.is_done, progress=progress)
            if failed:
                raise VolumeError(_on_failures(failed))
            about = finish_group(self.job, self.fingerprint)
            replace_target(self.job.group, self.target)
        self._clear()
        return about

    def prepare(self, *, progress: bool = False) -> None:
        """Make the empty arrays in the folder, unless there are those of the same plan and the same input.

        Raises
        ------
        StackError
            If there are those of another plan or input, and they aren't to be overwritten.
        """
        found = _read_plan(self.folder) if self.job.group.exists() else None
        changed = self._changed_slices(progress) if found == self.fingerprint else None
        if found == self.fingerprint and changed is None:
            return
        if found is not None and not self.overwrite:
            if changed is not None:
                raise StackError(_on_changed_input(self.job.reader().name, changed, self.target.name))
            raise StackError(_on_changed_plan(self.target.name, found, self.fingerprint))
        for old in (PLAN, PROGRESS, GROUP):  # the plan first: without it the rest counts as nothing
            _remove(self.folder / old)
        self.job.progress.mkdir()
        create_group(self.job.group, self.job.levels, self.job.voxel_size_nm, probabilities=self.job.probabilities)
        write_whole(self.folder / PLAN, json.dumps(self.fingerprint).encode())

    def _clear(self) -> None:
        """Remove what a finished volume doesn't need any more, also where a kill has prevented that."""
        if self.folder.is_dir() and not self.job.group.exists():
            shutil.rmtree(self.folder)
        for replaced in self.target.parent.glob(f".{self.target.name}.*.old"):
            shutil.rmtree(replaced)

    def _changed_slices(self, progress: bool) -> range | None:
        """First slab of the input that isn't as it was when it was predicted."""
        slabs = {
            slices: str(self.job.load(f"segment-{index}")["input"])
            for index, slices in enumerate(self.job.predicted_slabs)
            if self.job.is_done(f"segment-{index}")
        }
        return _changed(self.job.reader(), slabs, progress)


def plan_volume(
    source: FilePath, target: FilePath, options: VolumeOptions = DEFAULTS, *, overwrite: bool = False,
    progress: bool = False,
) -> VolumePlan:  # fmt: skip
    """Open a volume, decide how it is segmented, and check what is at the target.

    Parameters
    ----------
    source
        See `mitoseg_lib.readers.open_reader`.
    target
        A path that ends in .zarr.
    options
        How.
    overwrite
        Replace a finished volume, and begin an unfinished one anew if its input or settings were others.
    progress
        Show a bar while a finished volume's input is compared.

    Raises
    ------
    StackError
        If the input isn't a grey volume, its voxel size isn't known, or something else is at the target: another
        file, or the result of another input, model or settings.
    WeightsError, ValueError
        See `mitoseg_lib.prediction.metadata_for_slices`.
    """
    _require_possible(target, options)
    reader = open_reader(source)
    model = metadata_for_slices(options.weights, options.threshold)  # the model itself is loaded by the workers
    if options.voxel_size_nm is None and reader.voxel_size_nm is None:
        raise StackError(
            f"{reader.name} doesn't state its voxel size, but volumes in µm³ need it; give it with --voxel-size, in nm"
            " in the order z,y,x."
        )
    found = choose_conversion(reader, model.voxel_size_nm, model.grey_range, voxel_size_nm=options.voxel_size_nm)
    target = check_target(target, reader.shape, overwrite=True, source=source)
    job = _job((Path(source), target), reader.shape, found, model.threshold, options)
    plan = VolumePlan(job, target, _fingerprint(job, reader), found.notes, overwrite)
    _require_own(plan, reader, progress)
    return plan


def steps_of(job: Job) -> list[Step]:
    """Return all steps of a volume, with what each needs, in an order in which they could be done one by one."""
    steps = []

    def add(name: str, needs: list[str], words: str, weight: float, *arguments: int) -> None:
        do = partial(perform, name.split("-")[0], job, *arguments)
        steps.append(Step(name, tuple(needs), do, words, weight))

    slabs, predicted, batches = job.slabs(), job.predicted_slabs, range(job.n_batches)
    for i, slices in enumerate(predicted):
        add(f"segment-{i}", [], f"predicting {_slices(slices)}", len(slices), i)
    for i, slices in enumerate(slabs):
        needs = _overlapping("segment", predicted, surroundings(slices, 1, job.shape[0]))
        add(f"label-{i}", needs, f"numbering objects in {_slices(slices)}", SHORT * len(slices), i)
    add("join", [f"label-{i}" for i in range(len(slabs))], "joining objects", 1)
    for batch in batches if job.split else ():
        add(f"split-{batch}", ["join"], f"splitting objects, part {batch + 1} of {job.n_batches}", 1, batch)
    add("order", ["join", *(step.name for step in steps if step.name.startswith("split-"))], "ordering objects", 1)
    for i, slices in enumerate(slabs):
        add(f"number-{i}", ["order"], f"writing the objects of {_slices(slices)}", SHORT * len(slices), i)
    finer, parts = "number", slabs
    for level in range(1, len(job.levels)):
        step = job.levels[level].factors[0] // job.levels[level - 1].factors[0]
        for i, slices in enumerate(job.slabs(level)):
            needs = _overlapping(finer, parts, range(slices.start * step, slices.stop * step))
            add(f"coarsen-{level}-{i}", needs, f"coarsening to level {level}", SHORT * len(slices), level, i)
        finer, parts = f"coarsen-{level}", job.slabs(level)
    last = [step.name for step in steps if step.name.startswith(("number-", "coarsen-"))]
    for batch in batches:
        add(f"measure-{batch}", last, f"measuring objects, part {batch + 1} of {job.n_batches}", 1, batch)
    return steps


def _require_possible(target: FilePath, options: VolumeOptions) -> None:
    """Raise an error for a name or numbers that can't be meant."""
    if not is_zarr_name(target):
        raise StackError(
            f"{Path(target).name} was given, but a volume becomes an OME-Zarr; give a name ending in .zarr."
        )
    if options.threads < 1 or options.min_volume_um3 < 0:
        raise ValueError(
            f"{options.threads} threads and a smallest volume of {options.min_volume_um3} µm³ were given, but 1 or more"
            " and 0 or more were expected; correct them."
        )


def _job(paths: tuple[Path, Path], shape: Shape, found: Conversion, threshold: float, options: VolumeOptions) -> Job:
    """What workers are told, of the volume from a path to another one."""
    source, target = (path.absolute() for path in paths)
    device = choose_device(options.device)
    return Job(
        source=os.fspath(source),
        folder=os.fspath(target.with_name(target.name + UNFINISHED)),
        shape=shape,
        voxel_size_nm=found.voxel_size_nm,
        grey=found.grey,
        weights=None if options.weights is None else os.fspath(Path(options.weights).absolute()),
        weights_sha256=file_sha256(weights_path(options.weights)),
        threshold=threshold,
        tta=options.tta,
        device=device.type,
        precision="bf16" if is_bf16_native(device) else "fp32",
        threads=options.threads,
        probabilities=options.probabilities,
        min_volume_um3=float(options.min_volume_um3),
        split=options.split,
    )


def _overlapping(kind: str, slabs: list[range], slices: range) -> list[str]:
    """Names of the steps whose slabs hold some of the slices."""
    return [f"{kind}-{i}" for i, slab in enumerate(slabs) if slab.start < slices.stop and slab.stop > slices.start]


# --- what a result depends on -------------------------------------------------------------------------------


def _fingerprint(job: Job, reader: SliceReader) -> dict:
    """Return what the result depends on, beside the grey levels themselves."""
    device = torch.device(job.device)
    return {
        "input": {"shape": list(job.shape), "dtype": str(reader.dtype)},
        "voxel_size_nm": list(job.voxel_size_nm),
        "grey": {"source": _as_list(job.grey.source), "target": _as_list(job.grey.target)},
        "model": {
            "weights_sha256": job.weights_sha256,
            "threshold": job.threshold,
            "tta": job.tta,
        },
        "computed": {
            "device": job.device,
            "precision": job.precision,
            "threads": job.threads,
            "slices_a_batch": batch_size_on(device),
            "slices_a_slab": len(job.predicted_slabs[0]),
            "torch": torch.__version__.split("+")[0],
            "mitoseg_lib": __version__,
        },
        "output": {
            "probabilities": job.probabilities,
            "min_volume_um3": job.min_volume_um3,
            "split": job.split,
        },
    }


def _as_list(levels: tuple[float, float] | None) -> list[float] | None:
    return None if levels is None else list(levels)


def _differences(found: dict, wanted: dict) -> str:
    """Say in a few words in what two fingerprints differ."""
    flat = [
        {f"{group} {key}": value for group, part in one.items() for key, value in _flat(part).items()}
        for one in (found, wanted)
    ]
    names = sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))
    return ", ".join(name.strip().replace("_", " ") for name in names)


def _without(part: object, keys: tuple[str, ...]) -> object:
    return {key: value for key, value in part.items() if key not in keys} if isinstance(part, dict) else part


def _flat(part: object) -> dict:
    return part if isinstance(part, dict) else {"": part}


# --- what is there already ----------------------------------------------------------------------------------


def _require_own(plan: VolumePlan, reader: SliceReader, progress: bool) -> None:
    """Raise StackError if what is at the target is anything but the result of this plan."""
    if not plan.target.exists() or plan.overwrite:
        return
    about = read_provenance(plan.target)
    if about is None:
        raise StackError(
            f"{plan.target.name} exists already, and is left as it is, since it isn't a volume that this command has"
            " made; use --overwrite, or give another name."
        )
    # What was finished by another version is finished, too.
    found, wanted = (
        {group: _without(one[group], ("sha256", *VERSIONS)) for group in plan.fingerprint}
        for one in (about, plan.fingerprint)
    )
    if found != wanted:
        raise StackError(_on_changed_plan(plan.target.name, found, wanted))
    slabs = dict(zip(plan.job.predicted_slabs, about["input"]["sha256"], strict=True))
    changed = _changed(reader, slabs, progress)
    if changed is not None:
        raise StackError(_on_changed_input(reader.name, changed, plan.target.name))


def _changed(reader: SliceReader, slabs: dict[range, str], progress: bool) -> range | None:
    """First of these slabs whose slices aren't those that were predicted, by their sha256."""
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(partial(sha256_of_slices, reader), slabs)
        watched = tqdm(found, "comparing the input", len(slabs), disable=not progress, leave=False)
        changed = [slices for slices, digest in zip(slabs, watched, strict=True) if digest != slabs[slices]]
    return changed[0] if changed else None


def _read_plan(folder: Path) -> dict | None:
    try:
        return json.loads((folder / PLAN).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Keep a second process from working on the same volume; the lock of a process that was killed is free."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StackError(f"Another process is at work on {name}; wait until it has finished, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# --- sentences ----------------------------------------------------------------------------------------------


def _on_changed_plan(name: str, found: dict, wanted: dict) -> str:
    return (
        f"{name} was begun with another input or other settings ({_differences(found, wanted)}); use the same again,"
        " give another name, or --overwrite."
    )


def _on_changed_input(source: str, slices: range, name: str) -> str:
    return (
        f"{source} has changed in {_slices(slices)} since {name} was made from it; give the input that it was, another"
        " name for the output, or --overwrite."
    )


def _on_failures(failed: dict[str, Step]) -> str:
    words = "; ".join(step.words for step in failed.values())
    return (
        f"Workers died twice of {len(failed)} step{'s' if len(failed) > 1 else ''} ({words}), most likely for lack of"
        " memory; everything else that could be done is done and kept. The same command goes on from there: with"
        " fewer workers each has more memory."
    )


def _slices(slices: range) -> str:
    return f"slice {slices.start}" if len(slices) == 1 else f"slices {slices.start} to {slices.stop - 1}"
