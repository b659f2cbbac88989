"""Presets (what a chapter runs on) and recorded runs (numbers from trainings that were really made)."""

import dataclasses
import io
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.datasets import bundled_folder, fetch_epfl, load_epfl, load_example
from mitoseg_lib.files import write_whole
from mitoseg_lib.stacks import Stack

RESULTS = Path(__file__).resolve().parents[1] / "results"
THREADS = 2
WIDTH = 88  # characters of a line, as in the chapters' code
THRESHOLD_CHOICES = ("validation", "fixed", "test")

T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """What a chapter runs on.

    Attributes
    ----------
    name : {"small", "full"}
        ``small``: the bundled phantom stacks, two CPU cores, no network. ``full``: the EPFL stacks.
    retrain : bool
        Whether trainings of the full preset are run again here (on a GPU) rather than read from recorded runs.
    """

    name: str
    retrain: bool = False

    def load(self, part: str) -> Stack:
        """Return the labelled stack ``"train"`` or ``"test"`` of this preset.

        Raises
        ------
        StackError
            If the full preset's data is neither in ``MITOSEG_DATA`` nor downloaded and can't be fetched.
        """
        if self.name == "small":
            return load_example(part)
        return load_epfl({"train": "training", "test": "testing"}.get(part, part))

    def image_path(self, part: str) -> Path:
        """Return the file of the grey levels of ``"train"`` or ``"test"``; errors as `load` has them."""
        if self.name == "small":
            return bundled_folder() / f"phantom_{part}.tif"
        return fetch_epfl() / f"{part}ing.tif"

    def choose(self, *, small: T, full: T) -> T:
        """Return the value that belongs to this preset."""
        return small if self.name == "small" else full


def preset(name: str | None = None, *, retrain: bool | None = None) -> Preset:
    """Return the preset to run on.

    Parameters
    ----------
    name : {"small", "full"}, optional
        By default what the environment variable ``MITOSEG_PRESET`` says, else ``"small"``.
    retrain : bool, optional
        Train again in the full preset; by default whether ``MITOSEG_RETRAIN`` is ``1``.

    Raises
    ------
    ValueError
        If the name is unknown, or if a retraining is asked for on a machine without a GPU.
    """
    name = name or os.environ.get("MITOSEG_PRESET") or "small"
    if name not in ("small", "full"):
        raise ValueError(
            f"The preset is {name!r}, but it can only be 'small' or 'full': correct the name or MITOSEG_PRESET."
        )
    if retrain is None:
        retrain = os.environ.get("MITOSEG_RETRAIN") == "1"
    if name == "small":
        _fix_threads()
        return Preset("small")
    if retrain and not _has_gpu():
        raise ValueError(
            "The full preset was asked to train again, but this machine has no GPU: choose one (in Colab: Runtime, "
            "Change runtime type), or leave out retrain=True and MITOSEG_RETRAIN to read the recorded runs."
        )
    return Preset("full", retrain)


def _fix_threads() -> None:
    # Sums of floats depend on how many threads share them; the small preset's outputs are compared.
    import torch

    torch.set_num_threads(THREADS)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class RecordedRun:
    """A training that was run, with its settings and scores: one file ``results/NAME-seedS.json``.

    Scores (``train``, ``validation``, ``test``) hold ``loss, iou, dice, precision, recall``, from counts pooled over
    the whole part, or are None where that part was not measured. ``history`` has one row an epoch with ``epoch,
    train_loss, validation_loss, train_iou, validation_iou``. ``threshold_chosen_on`` is ``"validation"``, ``"fixed"``
    or, where that mistake is the lesson, ``"test"``.
    """

    name: str
    seed: int
    command: str
    library_version: str
    date: str
    device: str
    wall_seconds: float
    data: dict[str, Any]
    model: str
    encoder: str | None
    encoder_weights: str | None
    parameters: int
    split: str
    epochs: int
    batch_size: int
    patch_size: int | list[int]
    optimizer: str
    learning_rate: float
    loss: str
    augmentation: str
    threshold: float
    threshold_chosen_on: str
    train: dict[str, float] | None
    validation: dict[str, float] | None
    test: dict[str, float] | None
    history: list[dict[str, float]]

    def __post_init__(self) -> None:
        """Check the one field on which honesty hangs."""
        if self.threshold_chosen_on not in THRESHOLD_CHOICES:
            raise ValueError(
                f"The run {self.name!r} says that its threshold was chosen on {self.threshold_chosen_on!r}, "
                f"but it must be one of {', '.join(THRESHOLD_CHOICES)}: run it again."
            )

    def write(self, folder: Path = RESULTS) -> Path:
        """Write the run's file, whole or not at all, and return its path."""
        path = run_path(self.name, self.seed, folder)
        content = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"
        write_whole(path, content.encode())
        return path


def run_path(name: str, seed: int, folder: Path = RESULTS) -> Path:
    """Return where a run is recorded, whether it is there or not."""
    return folder / f"{name}-seed{seed}.json"


def write_masks(run: RecordedRun, masks: dict[int, NDArray[np.bool_]], folder: Path = RESULTS) -> Path:
    """Write predicted masks of some test slices beside a run's file, one bit a pixel, and return the path.

    Parameters
    ----------
    run : RecordedRun
    masks : dict
        Number of the slice, and its mask, bool (y, x); all of one shape.
    folder : Path
        Where the run's file is.
    """
    path = _masks_path(run, folder)
    buffer = io.BytesIO()
    stacked = np.stack(list(masks.values()))
    np.savez_compressed(buffer, bits=np.packbits(stacked), shape=stacked.shape, slices=list(masks))
    write_whole(path, buffer.getvalue())
    return path


def read_masks(run: RecordedRun, folder: Path = RESULTS) -> dict[int, NDArray[np.bool_]]:
    """Return the predicted masks that were recorded with a run, bool (y, x), by slice; none if there are none."""
    path = _masks_path(run, folder)
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as content:
        shape = tuple(content["shape"])
        bits = np.unpackbits(content["bits"], count=int(np.prod(shape)))
        return dict(zip(content["slices"].tolist(), bits.reshape(shape).astype(bool), strict=True))


def _masks_path(run: RecordedRun, folder: Path) -> Path:
    return folder / f"{run.name}-seed{run.seed}-masks.npz"


def read_run(path: Path) -> RecordedRun:
    """Read one recorded run.

    Raises
    ------
    ValueError
        If the file is not JSON, or its keys are not exactly those of `RecordedRun`.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}): make the run again.") from None
    expected = {field.name for field in dataclasses.fields(RecordedRun)}
    found = set(content) if isinstance(content, dict) else set()
    if found != expected:
        odd = ", ".join(sorted(found ^ expected))
        raise ValueError(f"{path.name} lacks, or has beyond its format, the keys {odd}: make the run again.")
    return RecordedRun(**content)


def read_runs(name: str, folder: Path = RESULTS) -> list[RecordedRun]:
    """Return every seed of a run that was recorded, in the order of the seeds; an empty list if none was."""
    runs = [read_run(path) for path in folder.glob(f"{name}-seed*.json")]
    return sorted((run for run in runs if run.name == name), key=lambda run: run.seed)


def results_table(rows: Mapping[str, str], folder: Path = RESULTS) -> str:
    """Return a table of recorded runs as text: IoU on the three parts, the mean over the seeds and their spread.

    Below it stands what the figures were measured on. A row that wasn't run says so, and names its command.

    Parameters
    ----------
    rows : dict
        What the table calls a row, and the name of its recipe.
    folder : Path
        Of the recorded runs.
    """
    width = max(map(len, rows), default=0) + 2
    lines = [f"{'':{width}s}{'train':>14s}{'validation':>14s}{'test':>14s}  seeds"]
    shown: list[RecordedRun] = []
    for label, name in rows.items():
        found = read_runs(name, folder)
        if not found:
            lines.append(f"{label:{width}s}not run yet: mitoseg run {name}")
            continue
        shown += found
        cells = "".join(f"{_mean_iou(found, part):>14s}" for part in ("train", "validation", "test"))
        lines.append(f"{label:{width}s}{cells}  {', '.join(str(run.seed) for run in found)}")
    if shown:
        lines.append(origin(shown))
    return "\n".join(lines)


def origin(shown: Sequence[RecordedRun]) -> str:
    """Return on which data, on which devices and when runs were made, in lines that a page can hold."""
    devices = ", ".join(sorted({run.device for run in shown}))
    dates = sorted({run.date for run in shown})
    data = ", ".join(sorted({run.data["name"] for run in shown}))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return textwrap.fill(f"IoU, recorded on {data}; {devices}; {when}.", WIDTH)


def _mean_iou(found: Sequence[RecordedRun], part: str) -> str:
    """Return the mean IoU over seeds, with the sample standard deviation where there are several."""
    values = [scores["iou"] for run in found if (scores := getattr(run, part))]
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"
