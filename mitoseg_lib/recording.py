"""How a recorded run is made: train by a recipe, measure, and write ``results/NAME-seedS.json``."""

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from mitoseg_lib.datasets import describe_epfl, describe_example, load_epfl, load_example
from mitoseg_lib.inference import choose_threshold, predict_stack
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import EncoderUNet, calibrate_encoder, count_parameters
from mitoseg_lib.recipes import LOSSES, Recipe, recipe_named, spread_slices
from mitoseg_lib.runs import RESULTS, RecordedRun, read_run, run_path, write_masks
from mitoseg_lib.splits import Split
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training import fit, mean_slice_loss

__all__ = ["record"]

CALIBRATION_BATCHES = 20
TRAIN_SLICES = 13  # of the training part, for its score
MASK_SLICES = (20, 82, 144)  # of the test stack, kept as masks


def record(
    name: str, seed: int, *, data: str = "epfl", folder: Path = RESULTS, progress: bool | None = None
) -> RecordedRun:
    """Make a run, write its file, and return it; a run that is recorded already is read instead.

    An interrupted run goes on from its last checkpoint, in ``folder/unfinished/``, when it is asked for again.

    Parameters
    ----------
    name : str
        One of `RECIPES`.
    seed : int
        Of the first weights, the patches and everything else that is drawn.
    data : {"epfl", "phantom"}
        The EPFL stacks, or the bundled synthetic ones.
    folder : Path
        Where ``NAME-seedS.json`` is written, and beside it the masks of three test slices.
    progress : bool, optional
        Show a progress bar; by default on a terminal.

    Returns
    -------
    RecordedRun

    Raises
    ------
    ValueError
        When there is no such recipe, or the folder holds the run on other data.
    RuntimeError
        When a pretrained encoder's weights can't be had.
    StackError
        When the data can't be had.
    """
    recipe, described = recipe_named(name), _describe(data)
    path = run_path(name, seed, folder)
    if path.exists():
        run = read_run(path)
        if run.data["name"] != described["name"]:
            raise ValueError(
                f"{path.name} is a run on {run.data['name']}, but one on {described['name']} was asked for; name "
                "another folder for it."
            )
        return run
    unfinished = folder / "unfinished" / f"{name}-seed{seed}-{described['name']}"
    with _stopwatch(unfinished / "seconds.txt") as seconds:
        fields, masks = _make(recipe, seed, data, unfinished, progress)
    threads = torch.get_num_threads()
    run = RecordedRun(
        name=name,
        seed=seed,
        command=f"mitoseg run {name} --seed {seed}" + (" --data phantom" if data == "phantom" else ""),
        library_version=metadata.version("mitoseg-lib"),
        date=datetime.now(UTC).date().isoformat(),
        device=_device_name(threads),
        wall_seconds=round(seconds(), 1),
        data=described,
        **fields,
    )
    if masks:
        write_masks(run, masks, folder)
    run.write(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    return run


def _make(
    recipe: Recipe, seed: int, data: str, unfinished: Path, progress: bool | None
) -> tuple[dict[str, Any], dict[int, NDArray[np.bool_]]]:
    """Train and measure; return what a recorded run says of it, and masks of the test stack."""
    stack = _load(data, "train")
    split = recipe.parts(len(stack.image))
    train, validation = stack.slices(split.train), stack.slices(split.validation)
    patches, model = recipe.patches(train, seed), recipe.build(seed)
    if recipe.calibrated:
        calibrate_encoder(model, _image_batches(patches, recipe.batch_size))
    watched = validation.slices(range(0, len(validation.image), recipe.validation_step))
    history = fit(
        model, patches, validation=watched, settings=recipe.settings(seed), checkpoints=unfinished, progress=progress
    )
    model.eval()
    measure = _Measure(model, recipe)
    on_validation = measure.predict(validation)
    if recipe.tested:
        measure.threshold = choose_threshold(on_validation, validation.require_labels())
    some = _some_slices(train, model)
    found = {
        "train": measure.scores(measure.predict(some), some),
        "validation": measure.scores(on_validation, validation),
        "test": None,
    }
    masks = {}
    if recipe.tested:
        test = _load(data, "test")
        on_test = measure.predict(test)
        found["test"] = measure.scores(on_test, test)
        masks = {z: on_test[z] >= measure.threshold for z in MASK_SLICES if z < len(on_test)}
    return _fields(recipe, model, split, measure.threshold) | found | {"history": history.as_rows()}, masks


def _some_slices(train: Stack, model: nn.Module) -> Stack:
    """Return some slices for the training's score: evenly spread, but neighbours for a 3D model, which needs them."""
    middle = (len(train.image) - TRAIN_SLICES) // 2
    if getattr(model, "ndim", 2) == 3 and middle > 0:
        return train.slices(slice(middle, middle + TRAIN_SLICES))
    return train.slices(spread_slices(range(len(train.image)), TRAIN_SLICES))


class _Measure:
    """Predictions and scores of a model, at one threshold."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.loss = model, LOSSES[recipe.loss]()
        self.precision = "fp32" if recipe.precision == "fp32" else "auto"
        self.threshold = 0.5

    def predict(self, stack: Stack) -> NDArray[np.float32]:
        """Return the probabilities of a stack."""
        return predict_stack(self.model, stack.image, precision=self.precision)

    def scores(self, probabilities: NDArray[np.float32], stack: Stack) -> dict[str, float]:
        """Return loss, IoU, Dice, precision and recall, from counts pooled over the stack."""
        labels = stack.require_labels()
        pooled = scores(probabilities >= self.threshold, labels).as_dict()
        pooled.pop("accuracy")
        return {"loss": mean_slice_loss(probabilities, labels, loss=self.loss)} | pooled


def _fields(recipe: Recipe, model: nn.Module, split: Split, threshold: float) -> dict[str, Any]:
    """Return the settings as a recorded run names them."""
    unwrapped = getattr(model, "model", model)
    options = ", ".join(f"{name}={value}" for name, value in recipe.unet.items())
    n_labelled = len(split.train)
    mistake = f"; mistake: {recipe.mistake}" if recipe.mistake else ""
    frozen = ("frozen, calibrated" if recipe.calibrated else "frozen") if recipe.frozen else "trained"
    is_encoder = isinstance(unwrapped, EncoderUNet)
    patches = f"{recipe.fixed} patches, again and again" if recipe.fixed else "fresh patches"
    return {
        "model": (f"U-Net on {recipe.encoder}, encoder {frozen}" if is_encoder else f"UNet({options})") + mistake,
        "encoder": recipe.encoder,
        "encoder_weights": recipe.encoder_weights,
        "parameters": count_parameters(model),
        "split": f"{recipe.split}: {n_labelled} slices of {split.train[0]} to {split.train[-1]} train, "
        f"{len(split.validation)} of {split.validation[0]} to {split.validation[-1]} validate "
        f"(1 of {recipe.validation_step} after each epoch)",
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "patch_size": recipe.patch_size if isinstance(recipe.patch_size, int) else list(recipe.patch_size),
        "optimizer": f"Adam, {recipe.schedule}, {recipe.steps} steps an epoch, {recipe.precision}",
        "learning_rate": recipe.learning_rate,
        "loss": recipe.loss,
        "augmentation": f"{recipe.augmentation}; {patches}",
        "threshold": threshold,
        "threshold_chosen_on": "validation" if recipe.tested else "fixed",
    }


def _image_batches(patches: Dataset, batch_size: int) -> Iterator[Tensor]:
    """Yield some batches of training images, of as many patches as a step takes."""
    images = (patches[i][0] for i in range(min(CALIBRATION_BATCHES * batch_size, len(patches))))
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


def _describe(data: str) -> dict[str, Any]:
    if data not in ("epfl", "phantom"):
        raise ValueError(f"The data is {data!r}, but it must be 'epfl' or 'phantom'; choose one.")
    return describe_epfl() if data == "epfl" else describe_example()


def _load(data: str, part: str) -> Stack:
    return load_example(part) if data == "phantom" else load_epfl({"train": "training", "test": "testing"}[part])


def _device_name(threads: int) -> str:
    """Return what a run was made on, without anything that names a machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{threads} CPU thread{'s' if threads > 1 else ''} ({platform.machine()})"


@contextmanager
def _stopwatch(file: Path) -> Iterator[Callable[[], float]]:
    """Count seconds, and add up those of all sessions of a run in a file; what a kill -9 cut off isn't counted."""
    before = float(file.read_text()) if file.is_file() else 0.0
    started = time.perf_counter()

    def total() -> float:
        return before + time.perf_counter() - started

    try:
        yield total
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{total():.1f}\n")
