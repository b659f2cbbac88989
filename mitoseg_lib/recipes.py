"""The settings of every recorded run, and how a run is made.

A recipe is data: its settings, most of them those of `Recipe`'s defaults, so that a line below says what a row of a
table differs in, and nothing else. `record` makes the run and writes ``results/NAME-seedS.json``.

There are two sizes. Recipes whose name ends in "-gpu" are meant for a GPU of 14 GB or more. All others were made for
two cores: crops of 160, hundreds of steps and not ten thousands, convolutions in bfloat16. They show which of two
settings is better under the same small budget; they don't show how good either can become.
"""

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

from mitoseg_lib import mistakes
from mitoseg_lib.datasets import describe_epfl, describe_example, load_epfl, load_example
from mitoseg_lib.inference import choose_threshold, predict_stack
from mitoseg_lib.losses import DiceBCELoss, DiceLoss
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import EncoderUNet, UNet, calibrate_encoder, count_parameters, encoder_unet
from mitoseg_lib.patches import PatchDataset, train_augmentation, turn_block
from mitoseg_lib.runs import RESULTS, RecordedRun, read_run, run_path, write_masks
from mitoseg_lib.splits import Split, block_split, random_split
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training import TrainingSettings, fit, mean_slice_loss

__all__ = ["RECIPES", "Recipe", "record"]

Pair = tuple[Tensor, Tensor]  # a patch and its mask

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "DiceBCE": DiceBCELoss,
    "DiceBCE, squared": lambda: DiceBCELoss(squared=True),  # the report's equation 2
    "Dice": DiceLoss,
    "BCE": nn.BCEWithLogitsLoss,
    "DiceBCE, masks of 255": mistakes.Masks255,
}
AUGMENTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "flips, quarter turns": train_augmentation,
    "flips, noise": lambda: train_augmentation(quarter_turns=False, noise=15),  # the report's
    "turns of blocks": lambda: turn_block,
}
MISTAKES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "input 0 to 255": lambda model: mistakes.ScaledInput(model, training=255, evaluation=255),
    "validation scaled otherwise": lambda model: mistakes.ScaledInput(model, training=1, evaluation=255),
    "sigmoid twice": mistakes.SigmoidTwice,
    "no eval()": mistakes.AlwaysTraining,
    "slow BatchNorm statistics": mistakes.slow_statistics,
}
SPLITS: dict[str, Callable[[int], Split]] = {"block": block_split, "random": random_split}
CALIBRATION_BATCHES = 20
TRAIN_SLICES = 13  # of the training part, for its score
MASK_SLICES = (20, 82, 144)  # of the test stack, kept as masks


@dataclass(frozen=True)
class Recipe:
    """How a recorded run is made; the defaults are those of the 2D runs on two cores.

    Attributes
    ----------
    shows : str
        What the run is for, in a few words.
    unet : dict
        Arguments of `UNet`, unless there is an encoder.
    encoder, encoder_weights, frozen : str, str and bool
        As in `encoder_unet`.
    calibrated : bool
        Estimate the encoder's BatchNorm statistics on training patches first.
    mistake : str
        One of `MISTAKES`.
    epochs, steps, batch_size : int
        Epochs, steps in each, patches in each step.
    patch_size : int or tuple of int
        As in `PatchDataset`.
    learning_rate, schedule, precision : float, str, str
        As in `TrainingSettings`.
    loss, augmentation, split : str
        Of `LOSSES`, `AUGMENTATIONS`, `SPLITS`.
    labelled : int, optional
        How many of the training slices have labels, evenly spread; all by default.
    fixed : int, optional
        Cut so many patches once, and show them again and again, rather than new ones in each step.
    validation_step : int
        Every so many of the validation slices is looked at after each epoch; at the end all are.
    tested : bool
        Choose the threshold on the validation slices and measure the test stack, once. Rows that only compare
        settings leave it alone.
    """

    shows: str
    unet: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    encoder_weights: str | None = None
    frozen: bool = False
    calibrated: bool = False
    mistake: str | None = None
    epochs: int = 20
    steps: int = 30
    batch_size: int = 6
    patch_size: int | tuple[int, ...] = 160
    learning_rate: float = 2e-3
    schedule: str = "one-cycle"
    precision: str = "bf16"
    loss: str = "DiceBCE"
    augmentation: str = "flips, quarter turns"
    split: str = "block"
    labelled: int | None = None
    fixed: int | None = None
    validation_step: int = 12
    tested: bool = True

    def build(self, seed: int) -> nn.Module:
        """Return the untrained model; the same for the same seed."""
        torch.manual_seed(seed)
        if self.encoder is None:
            model: nn.Module = UNet(**self.unet)
        else:
            model = encoder_unet(self.encoder, weights=self.encoder_weights, frozen=self.frozen)
        return MISTAKES[self.mistake](model) if self.mistake else model

    def patches(self, stack: Stack, seed: int) -> Dataset[Pair]:
        """Return the training patches of a stack."""
        length = self.steps * self.batch_size
        patches = PatchDataset(
            stack,
            patch_size=self.patch_size,
            patches_per_epoch=self.fixed or length,
            seed=seed,
            augmentation=AUGMENTATIONS[self.augmentation](),
        )
        return _FixedPatches(patches, length) if self.fixed else patches

    def settings(self, seed: int) -> TrainingSettings:
        """Return the settings of the training."""
        return TrainingSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            loss=LOSSES[self.loss](),
            seed=seed,
            precision=self.precision,
        )

    def parts(self, n_slices: int) -> Split:
        """Return the slices that train and that validate."""
        split = SPLITS[self.split](n_slices)
        return Split(_spread(split.train, self.labelled or len(split.train)), split.validation)


class _FixedPatches(Dataset[Pair]):
    """The same few patches, again and again, in every epoch: a beginner's mistake."""

    def __init__(self, patches: PatchDataset, length: int) -> None:
        self.patches, self.length = patches, length

    def __len__(self) -> int:
        """Return how many patches make an epoch."""
        return self.length

    def __getitem__(self, index: int) -> Pair:
        """Return one of the few."""
        if not 0 <= index < self.length:
            raise IndexError(f"Patch {index} was asked for, but an epoch has patches 0 to {self.length - 1}.")
        return self.patches[index % len(self.patches)]


def _mistakes() -> dict[str, Recipe]:
    """Chapter 4: one mistake each, beside a training that is right; a constant rate, as the study had it."""
    right = Recipe("no mistake", epochs=15, schedule="constant", learning_rate=1e-3, tested=False)
    plain = {"normalisation": "none"}
    small_batch = {"patch_size": 128, "epochs": 15, "steps": 40}
    changes: dict[str, dict[str, Any]] = {
        "no mistake": {},
        "input 0 to 255, no BatchNorm": {"mistake": "input 0 to 255", "unet": plain},
        "input 0 to 255": {"mistake": "input 0 to 255"},
        "masks of 255": {"loss": "DiceBCE, masks of 255"},
        "sigmoid twice": {"mistake": "sigmoid twice"},
        "validation scaled otherwise": {"mistake": "validation scaled otherwise"},
        "batches of 2": {"batch_size": 2} | small_batch,
        "batches of 1": {"batch_size": 1} | small_batch,
        "slow BatchNorm statistics": {"mistake": "slow BatchNorm statistics"},
        "rate 0.01, no BatchNorm": {"learning_rate": 1e-2, "unet": plain},
        "rate 0.03": {"learning_rate": 3e-2},
        "no eval()": {"mistake": "no eval()"},
        "12 fixed patches, no augmentation": {"fixed": 12, "augmentation": "none"},
    }
    return {_slug(f"mistake {what}"): replace(right, shows=what, **change) for what, change in changes.items()}


def _repairs() -> dict[str, Recipe]:
    """Chapter 4: from the U-Net that never learns to the one that does, a repair at a time."""
    constant = {"schedule": "constant", "learning_rate": 1e-3}
    plain = {"normalisation": "none"}
    return {
        "unet-raw": Recipe("input 0 to 255, no BatchNorm, constant rate", plain, mistake="input 0 to 255", **constant),
        "unet-scaled": Recipe("input scaled to 0 to 1", plain, **constant),
        "unet-batchnorm": Recipe("and BatchNorm", **constant),
        "unet-groupnorm": Recipe("or GroupNorm in its place", {"normalisation": "group"}, **constant),
        "unet": Recipe("and one-cycle: the repaired U-Net"),
    }


def _variants() -> dict[str, Recipe]:
    """Chapter 4: what the study varied, each beside the repaired U-Net."""
    changes: dict[str, dict[str, Any]] = {
        "width 8": {"unet": {"width": 8}},
        "width 32": {"unet": {"width": 32}},
        "depth 3": {"unet": {"depth": 3}},
        "depth 5": {"unet": {"depth": 5}},
        "residual": {"unet": {"residual": True}},
        "loss BCE": {"loss": "BCE"},
        "loss Dice": {"loss": "Dice"},
        "loss squared": {"loss": "DiceBCE, squared"},
        "rate 0.0002": {"learning_rate": 2e-4},
        "rate 0.02": {"learning_rate": 2e-2},
    }
    return {_slug(f"unet {what}"): Recipe(what, tested=False, **change) for what, change in changes.items()}


def _in_3d() -> dict[str, Recipe]:
    """Chapter 5: the same class with three axes."""
    narrow = {"ndim": 3, "width": 8, "depth": 3}
    block = {"patch_size": (32, 96, 96), "augmentation": "turns of blocks", "validation_step": 1}
    base = Recipe("3D", narrow, batch_size=2, epochs=4, **block)
    short = {"epochs": 3, "steps": 50, "batch_size": 1, "tested": False}
    raw = {"mistake": "input 0 to 255", "schedule": "constant", "learning_rate": 1e-3}
    return {
        "unet3d-equal-time": replace(base, shows="3D, as many seconds as the 2D U-Net", steps=95),
        "unet3d-equal-voxels": replace(base, shows="3D, as many voxels as the 2D U-Net", steps=39),
        "unet3d-longer": replace(base, shows="3D, 2.5 times as many seconds", epochs=6, steps=160),
        "unet3d-batch-1-batchnorm": replace(base, shows="3D, batches of 1, BatchNorm", **short),
        "unet3d-batch-1-groupnorm": replace(
            base, shows="3D, batches of 1, GroupNorm", unet=narrow | {"normalisation": "group"}, **short
        ),
        "unet3d-batch-1-none": replace(
            base, shows="3D, batches of 1, no normalisation", unet=narrow | {"normalisation": "none"}, **short
        ),
        "unet3d-raw": replace(
            base, shows="3D, input 0 to 255, no normalisation", unet=narrow | {"normalisation": "none"}, **short, **raw
        ),
    }


def _transfer() -> dict[str, Recipe]:
    """Chapter 6: what an encoder knew before, on EfficientNet-Lite0, whose weights come in a package."""
    lite0, imagenet = {"encoder": "efficientnet_lite0"}, {"encoder_weights": "imagenet"}
    return {
        "lite0-imagenet-frozen": Recipe("ImageNet, frozen", frozen=True, **lite0, **imagenet),
        "lite0-imagenet-finetuned": Recipe("ImageNet, fine-tuned", **lite0, **imagenet),
        "lite0-random-frozen": Recipe("random, frozen", frozen=True, **lite0),
        "lite0-random-frozen-calibrated": Recipe("random, frozen, calibrated", frozen=True, calibrated=True, **lite0),
        "lite0-random-trained": Recipe("random, trained", **lite0),
        "lite0-imagenet-frozen-random-split": Recipe(
            "ImageNet, frozen, validated on random slices", frozen=True, split="random", **lite0, **imagenet
        ),
    }


def _label_efficiency() -> dict[str, Recipe]:
    """Chapter 6: the same network with few labelled slices, with and without ImageNet; half the steps of the others."""
    base = Recipe("", encoder="efficientnet_lite0", epochs=10)
    recipes = {}
    for n in (1, 4, 16, 64, None):
        for start, weights in (("imagenet", "imagenet"), ("random", None)):
            shows = f"{n or 'all'} labelled, {start}"
            recipes[f"labels-{n or 'all'}-{start}"] = replace(base, shows=shows, labelled=n, encoder_weights=weights)
    return recipes


def _on_a_gpu() -> dict[str, Recipe]:
    """The study's own run (its Table 1), and the same questions with a GPU's budget."""
    report = {"epochs": 70, "learning_rate": 1e-3, "schedule": "constant", "loss": "DiceBCE, squared"}
    size = {"patch_size": 512, "batch_size": 8, "steps": 64, "precision": "auto", "validation_step": 6}
    resnet, imagenet = {"encoder": "resnet34"} | size, {"encoder_weights": "imagenet"}
    block = {"ndim": 3, "width": 16, "depth": 3}
    return {
        "resnet34-report-gpu": Recipe(
            "the study's Table 1", frozen=True, augmentation="flips, noise", split="random",
            **resnet, **imagenet, **report,
        ),
        "resnet34-imagenet-frozen-gpu": Recipe("ImageNet, frozen", frozen=True, epochs=70, **resnet, **imagenet),
        "resnet34-imagenet-finetuned-gpu": Recipe("ImageNet, fine-tuned", epochs=70, **resnet, **imagenet),
        "resnet34-random-frozen-gpu": Recipe("random, frozen", frozen=True, epochs=70, **resnet),
        "resnet34-random-frozen-calibrated-gpu": Recipe(
            "random, frozen, calibrated", frozen=True, calibrated=True, epochs=70, **resnet
        ),
        "resnet34-random-trained-gpu": Recipe("random, trained", epochs=70, **resnet),
        "unet-gpu": Recipe("the repaired U-Net", epochs=70, **size),
        "unet3d-gpu": Recipe(
            "3D", block, epochs=35, steps=64, batch_size=4, patch_size=(48, 128, 128), augmentation="turns of blocks",
            precision="auto", validation_step=1,
        ),
    }  # fmt: skip


def _slug(words: str) -> str:
    """Return words as a name for files and the command line."""
    kept = "".join(c if c.isalnum() or c == "." else " " for c in words.lower())
    return "-".join(kept.split())


def _check() -> dict[str, Recipe]:
    """Return a run of seconds, which proves that an installation works."""
    quick = {"epochs": 2, "steps": 4, "batch_size": 2, "patch_size": 64, "precision": "fp32"}
    return {"check": Recipe("that everything works", {"width": 8, "depth": 2}, **quick)}


RECIPES: dict[str, Recipe] = (
    _check() | _mistakes() | _repairs() | _variants() | _in_3d() | _transfer() | _label_efficiency() | _on_a_gpu()
)


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
    recipe, described = _require_recipe(name), _describe(data)
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
    threshold = measure.choose(validation) if recipe.tested else 0.5
    found = {
        "train": measure.scores(_some_slices(train, model)),
        "validation": measure.scores(validation),
        "test": None,
    }
    masks = {}
    if recipe.tested:
        test = _load(data, "test")
        found["test"] = measure.scores(test)
        masks = {z: measure.mask[z] for z in MASK_SLICES if z < len(measure.mask)}
    return _fields(recipe, model, split, threshold) | found | {"history": history.as_rows()}, masks


def _some_slices(train: Stack, model: nn.Module) -> Stack:
    """Return some slices for the training's score: evenly spread, but neighbours for a 3D model, which needs them."""
    middle = (len(train.image) - TRAIN_SLICES) // 2
    if getattr(model, "ndim", 2) == 3 and middle > 0:
        return train.slices(slice(middle, middle + TRAIN_SLICES))
    return train.slices(_spread(range(len(train.image)), TRAIN_SLICES))


class _Measure:
    """Scores of a model at one threshold; the last stack's mask stays at hand."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.loss = model, LOSSES[recipe.loss]()
        self.precision = "fp32" if recipe.precision == "fp32" else "auto"
        self.threshold = 0.5
        self.mask: NDArray[np.bool_] = np.zeros((0, 0, 0), bool)

    def choose(self, validation: Stack) -> float:
        """Choose the threshold on the validation slices, and return it."""
        probabilities = predict_stack(self.model, validation.image, precision=self.precision)
        self.threshold = choose_threshold(probabilities, validation.require_labels())
        return self.threshold

    def scores(self, stack: Stack) -> dict[str, float]:
        """Return loss, IoU, Dice, precision and recall, from counts pooled over the stack."""
        labels = stack.require_labels()
        probabilities = predict_stack(self.model, stack.image, precision=self.precision)
        self.mask = probabilities >= self.threshold
        pooled = scores(self.mask, labels).as_dict()
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


def _image_batches(patches: Dataset[Pair], batch_size: int) -> Iterator[Tensor]:
    """Yield some batches of training images, of as many patches as a step takes."""
    images = (patches[i][0] for i in range(min(CALIBRATION_BATCHES * batch_size, len(patches))))
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


def _spread(indices: range | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return so many of the indices, evenly spread; the middle one for 1."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices)) + 2)[1:-1] if count == 1 else None
    if places is None:
        places = np.linspace(0, len(indices) - 1, min(count, len(indices)))
    return tuple(indices[round(float(place))] for place in places)


def _require_recipe(name: str) -> Recipe:
    """Return a recipe, or raise a ValueError with the names that are near."""
    if name in RECIPES:
        return RECIPES[name]
    from difflib import get_close_matches

    near = get_close_matches(name, RECIPES, n=3, cutoff=0.4) or sorted(RECIPES)[:3]
    raise ValueError(f"There is no recipe {name!r}, but for example {', '.join(near)}; `mitoseg run --list` lists all.")


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
