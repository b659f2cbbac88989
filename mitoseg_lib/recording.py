"""How a recorded run is made: train by a recipe, measure, and write ``results/NAME-seedS.json``."""

import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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

from mitoseg_lib.choices import Choice, Choices, best_choice, pooled, read_choices, scores_of_choices, write_choices
from mitoseg_lib.datasets import describe_epfl, describe_example, load_epfl, load_example
from mitoseg_lib.grey import grey_range
from mitoseg_lib.inference import choose_threshold, median_filter_z, predict_stack, predict_turned
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import EncoderUNet, UNet, calibrate_encoder, count_parameters
from mitoseg_lib.recipes import FOLDS, LOSSES, N_FOLDS, Recipe, recipe_named, spread_slices
from mitoseg_lib.runs import RESULTS, RecordedRun, read_run, run_path, write_masks
from mitoseg_lib.splits import Split
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training import History, fit, mean_slice_loss
from mitoseg_lib.weights import MaskRule, save_weights

__all__ = ["describe_data", "device_name", "first_choice", "record", "weights_path"]

CALIBRATION_BATCHES = 20
TRAIN_SLICES = 13  # of the training part, for its score
MASK_SLICES = (20, 82, 144)  # of the test stack, kept as masks


def record(
    name: str, seed: int, *, data: str = "epfl", folder: Path = RESULTS, progress: bool | None = None
) -> RecordedRun:
    """Make a run, write its file, and return it; a run that is recorded already is read instead.

    An interrupted run goes on from its last checkpoint, in ``folder/unfinished/``, when it is asked for again. The
    trained weights are kept in ``folder/weights/``, as `mitoseg predict --weights` takes them; a run whose masks come
    from means over eight turns needs ``--tta`` there.

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
    recipe, described = recipe_named(name), describe_data(data)
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
    devices = _devices_so_far(unfinished / "devices.txt")
    with _stopwatch(unfinished / "seconds.txt") as seconds:
        made = _make(recipe, first_choice(recipe, folder), seed, _Place(data, unfinished, progress))
    run = RecordedRun(
        name=name,
        seed=seed,
        command=f"mitoseg run {name} --seed {seed}" + (" --data phantom" if data == "phantom" else ""),
        library_version=metadata.version("mitoseg-lib"),
        date=datetime.now(UTC).date().isoformat(),
        device=", then ".join(devices),
        wall_seconds=round(seconds(), 1),
        data=described,
        **made.fields,
    )
    if made.masks:
        write_masks(run, made.masks, folder)
    if made.choices:
        write_choices(name, seed, made.choices, folder)
    if made.model is not None:
        path = weights_path(name, seed, folder)
        path.parent.mkdir(exist_ok=True)
        save_weights(made.model, path, rule=made.rule, encoder=recipe.encoder, grey_range=made.grey_range)
    run.write(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    return run


def weights_path(name: str, seed: int, folder: Path = RESULTS) -> Path:
    """Return where the trained weights of a run are kept; they aren't part of the project."""
    return folder / "weights" / f"{name}-seed{seed}.safetensors"


@dataclass(frozen=True)
class _Place:
    """Where a run is made: on which data, with which folder for checkpoints, and whether somebody watches."""

    data: str
    unfinished: Path
    progress: bool | None


@dataclass
class _Made:
    """What came of a run."""

    fields: dict[str, Any]
    masks: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    choices: Choices = field(default_factory=dict)
    model: nn.Module | None = None  # if it can be handed on
    rule: MaskRule = field(default_factory=MaskRule)
    grey_range: tuple[float, float] | None = None


def _make(recipe: Recipe, choice: Choice, seed: int, place: _Place) -> _Made:
    """Train and measure."""
    stack = _load(place.data, "train")
    split = recipe.parts(len(stack.image))
    train, validation = stack.slices(split.train), stack.slices(split.validation)
    model, history = _train(recipe, seed, train, validation, place)
    measure = _Measure(model, recipe, choice)
    on_validation = measure.predict(validation)
    if recipe.tested and recipe.chosen_on is None:
        measure.choose_threshold(on_validation, validation)
    some = _some_slices(train, _sees_neighbours(model) or choice.median > 1)
    found = {
        "train": measure.scores(measure.predict(some), some),
        "validation": measure.scores(on_validation, validation),
        "test": None,
    }
    made = _Made(found)
    if isinstance(model, EncoderUNet | UNet):
        made.model, made.grey_range = model, grey_range(train.image)
        made.rule = MaskRule(measure.choice.threshold, measure.choice.median)
    if recipe.split in FOLDS:
        made.choices = measure.choices(on_validation, validation)
    if recipe.tested:
        test = _load(place.data, "test")
        on_test = measure.predict(test)
        found["test"] = measure.scores(on_test, test)
        made.masks = {z: on_test[z] >= measure.choice.threshold for z in MASK_SLICES if z < len(on_test)}
    made.fields = _fields(recipe, model, split, measure.choice) | found | {"history": history.as_rows()}
    return made


def _train(recipe: Recipe, seed: int, train: Stack, validation: Stack, place: _Place) -> tuple[nn.Module, History]:
    """Return the trained model, in ``eval()``, and its history."""
    patches, model = recipe.patches(train, seed), recipe.build(seed)
    if recipe.calibrated:
        calibrate_encoder(model, _image_batches(patches, recipe.batch_size))
    watched = _watched(validation, model, recipe.validation_step)
    settings = recipe.settings(seed)
    history = fit(
        model, patches, validation=watched, settings=settings, checkpoints=place.unfinished, progress=place.progress
    )
    return model.eval(), history


def first_choice(recipe: Recipe, folder: Path = RESULTS) -> Choice:
    """Return how probabilities become a mask, as far as that is known before the training.

    That is the best choice over the folds' recorded figures where the recipe names a run that has folds, and else the
    plainest. A ValueError says which fold's figures are missing.
    """
    if recipe.chosen_on is None:
        return Choice()
    folds = (read_choices(f"{recipe.chosen_on}-fold-{k}", 0, folder) for k in range(1, N_FOLDS + 1))
    return best_choice(pooled(folds))


def _sees_neighbours(model: nn.Module) -> bool:
    """Tell whether a model's answer about a slice depends on the slices around it, which must then be there."""
    return getattr(model, "ndim", 2) == 3 or getattr(model, "n_slices", 1) > 1


def _watched(validation: Stack, model: nn.Module, step: int) -> Stack:
    """Return the slices that are looked at after each epoch: every so many, or as many neighbours."""
    n = len(validation.image)
    return validation.slices(range(math.ceil(n / step)) if _sees_neighbours(model) else range(0, n, step))


def _some_slices(train: Stack, are_neighbours: bool) -> Stack:
    """Return some slices for the training's score: evenly spread, or neighbours for a model or median that needs them.

    A median over slices that are far from one another would leave next to nothing of any mask.
    """
    middle = (len(train.image) - TRAIN_SLICES) // 2
    if are_neighbours and middle > 0:
        return train.slices(slice(middle, middle + TRAIN_SLICES))
    return train.slices(spread_slices(range(len(train.image)), TRAIN_SLICES))


class _Measure:
    """Predictions and scores of a model, with one choice of how probabilities become a mask."""

    def __init__(self, model: nn.Module, recipe: Recipe, choice: Choice) -> None:
        self.model, self.loss, self.choice = model, LOSSES[recipe.loss](), choice
        self.precision = "fp32" if recipe.precision == "fp32" else "auto"
        self.compare_turned = recipe.compare_turned

    def predict(self, stack: Stack) -> NDArray[np.float32]:
        """Return the probabilities of a stack."""
        return median_filter_z(self._raw(stack, turned=self.choice.turned), self.choice.median)

    def _raw(self, stack: Stack, *, turned: bool) -> NDArray[np.float32]:
        predict = predict_turned if turned else predict_stack
        return predict(self.model, stack.image, precision=self.precision)

    def choose_threshold(self, probabilities: NDArray[np.float32], stack: Stack) -> None:
        """Take the threshold that is best on a stack."""
        self.choice = replace(self.choice, threshold=choose_threshold(probabilities, stack.require_labels()))

    def choices(self, probabilities: NDArray[np.float32], stack: Stack) -> Choices:
        """Return what each choice scores on a stack, given its plain probabilities."""
        labels = stack.require_labels()
        found = scores_of_choices(probabilities, labels, turned=False)
        if self.compare_turned:
            found |= scores_of_choices(self._raw(stack, turned=True), labels, turned=True)
        return found

    def scores(self, probabilities: NDArray[np.float32], stack: Stack) -> dict[str, float]:
        """Return loss, IoU, Dice, precision and recall, from counts pooled over the stack."""
        labels = stack.require_labels()
        found = scores(probabilities >= self.choice.threshold, labels).as_dict()
        found.pop("accuracy")
        return {"loss": mean_slice_loss(probabilities, labels, loss=self.loss)} | found


def _fields(recipe: Recipe, model: nn.Module, split: Split, choice: Choice) -> dict[str, Any]:
    """Return the settings as a recorded run names them."""
    unwrapped = getattr(model, "model", model)
    options = ", ".join(f"{name}={value}" for name, value in recipe.unet.items())
    n_labelled = len(split.train)
    mistake = f"; mistake: {recipe.mistake}" if recipe.mistake else ""
    frozen = ("frozen, calibrated" if recipe.calibrated else "frozen") if recipe.frozen else "trained"
    is_encoder = isinstance(unwrapped, EncoderUNet)
    patches = f"{recipe.fixed} patches, again and again" if recipe.fixed else "fresh patches"
    return {
        "model": (f"U-Net on {recipe.encoder}, encoder {frozen}" if is_encoder else f"UNet({options})")
        + mistake
        + _described(choice),
        "encoder": recipe.encoder,
        "encoder_weights": recipe.encoder_weights,
        "parameters": count_parameters(model),
        "split": f"{recipe.split}: {n_labelled} slices of {split.train[0]} to {split.train[-1]} train, "
        f"{len(split.validation)} of {split.validation[0]} to {split.validation[-1]} validate "
        f"(1 of {recipe.validation_step} after each epoch)",
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "patch_size": recipe.patch_size if isinstance(recipe.patch_size, int) else list(recipe.patch_size),
        "optimizer": f"Adam, {recipe.schedule}{_extras(recipe)}, {recipe.steps} steps an epoch, "
        f"{recipe.settings(seed=0).precision}",
        "learning_rate": recipe.learning_rate,
        "loss": recipe.loss,
        "augmentation": f"{recipe.augmentation}; {patches}",
        "threshold": choice.threshold,
        "threshold_chosen_on": "validation" if recipe.tested else "fixed",
    }


def _extras(recipe: Recipe) -> str:
    """Return what is peculiar about the steps."""
    slower = f", the encoder at {recipe.encoder_rate:g} of the rate" if recipe.encoder_rate != 1 else ""
    return slower + (f", weights averaged ({recipe.averaging:g})" if recipe.averaging else "")


def _described(choice: Choice) -> str:
    """Return what happens to probabilities before the threshold."""
    turned = "; mean over 8 turns" if choice.turned else ""
    return turned + (f"; median over {choice.median} slices" if choice.median > 1 else "")


def _image_batches(patches: Dataset, batch_size: int) -> Iterator[Tensor]:
    """Yield some batches of training images, of as many patches as a step takes."""
    images = (patches[i][0] for i in range(min(CALIBRATION_BATCHES * batch_size, len(patches))))
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


def describe_data(data: str) -> dict[str, Any]:
    """Return the name and the files' sha256 of ``"epfl"`` or ``"phantom"``, as a recorded run keeps them."""
    if data not in ("epfl", "phantom"):
        raise ValueError(f"The data is {data!r}, but it must be 'epfl' or 'phantom'; choose one.")
    return describe_epfl() if data == "epfl" else describe_example()


def _load(data: str, part: str) -> Stack:
    return load_example(part) if data == "phantom" else load_epfl({"train": "training", "test": "testing"}[part])


def _devices_so_far(file: Path) -> list[str]:
    """Return what all sessions of a run were made on, this one's device last, and remember it in a file."""
    known = file.read_text().splitlines() if file.is_file() else []
    devices = list(dict.fromkeys([*known, device_name()]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(devices) + "\n")
    return devices


def device_name() -> str:
    """Return what a run is made on, without anything that names a machine."""
    threads = torch.get_num_threads()
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
