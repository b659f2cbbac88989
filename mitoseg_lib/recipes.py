"""The settings of every recorded run.

A recipe is data: its settings, most of them those of `Recipe`'s defaults, so that a line below says what a row of a
table differs in, and nothing else. `mitoseg_lib.recording` makes the run.

There are two sizes. Recipes whose name ends in "-gpu", and those of the ladder's last rungs, are meant for a GPU of
14 GB or more. All others were made for two cores: crops of 160, hundreds of steps and not ten thousands, convolutions
in bfloat16. They show which of two settings is better under the same small budget; they don't show how good either can
become.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mitoseg_lib import mistakes
from mitoseg_lib.losses import DiceBCELoss, DiceLoss
from mitoseg_lib.models import UNet, encoder_unet
from mitoseg_lib.patches import (
    MiddleSlices,
    PatchDataset,
    elastic_augmentation,
    in_turn,
    slice_drift,
    train_augmentation,
    turn_block,
)
from mitoseg_lib.splits import Split, block_split, cross_validation_folds, random_split
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training import TrainingSettings
from mitoseg_lib.training.precision import mixed_precision

__all__ = ["RECIPES", "Recipe", "recipe_named", "spread_slices"]

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
    "flips, quarter turns, contrast": lambda: train_augmentation(brightness_contrast=0.2),
    "flips, quarter turns, contrast, scale, blur": lambda: train_augmentation(
        brightness_contrast=0.2, scale=0.25, blur=1.0
    ),
    "flips, quarter turns, elastic": lambda: in_turn(train_augmentation(), elastic_augmentation()),
    "flips, quarter turns, contrast, scale, blur, noise, drift": lambda: in_turn(
        train_augmentation(brightness_contrast=0.2, scale=0.25, blur=1.0, noise=10), slice_drift()
    ),
    "turns of blocks, drift": lambda: in_turn(turn_block, slice_drift(offset=8)),
}
MISTAKES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "input 0 to 255": lambda model: mistakes.ScaledInput(model, training=255, evaluation=255),
    "validation scaled otherwise": lambda model: mistakes.ScaledInput(model, training=1, evaluation=255),
    "sigmoid twice": mistakes.SigmoidTwice,
    "no eval()": mistakes.AlwaysTraining,
    "slow BatchNorm statistics": mistakes.slow_statistics,
}
N_FOLDS = 4
ARTEFACT = range(155, 158)  # slices of EPFL's training stack that are damaged (chapter 1)


def _fold(number: int) -> Callable[[int], Split]:
    """Return what makes the split of one fold, counted from 1; the bundled stacks end before EPFL's artefact."""
    return lambda n_slices: cross_validation_folds(n_slices, N_FOLDS, left_out=ARTEFACT)[number - 1]


def _all_slices(n_slices: int) -> Split:
    """Train on all slices but the damaged ones (or the last, where none is), which are only watched.

    They have near copies among the others: how they are found says nothing about new tissue.
    """
    watched = tuple(z for z in ARTEFACT if z < n_slices) or (n_slices - 1,)
    return Split(tuple(z for z in range(n_slices) if z not in watched), watched)


FOLDS: dict[str, Callable[[int], Split]] = {f"fold {k} of {N_FOLDS}": _fold(k) for k in range(1, N_FOLDS + 1)}
SPLITS: dict[str, Callable[[int], Split]] = {"block": block_split, "random": random_split, "all": _all_slices} | FOLDS


@dataclass(frozen=True)
class Recipe:
    """How a recorded run is made; the defaults are those of the 2D runs on two cores.

    Attributes
    ----------
    shows : str
        What the run is for, in a few words.
    unet : dict
        Arguments of `UNet`, unless there is an encoder.
    encoder, encoder_weights, frozen, neighbours : str, str, bool, bool
        As in `encoder_unet`.
    calibrated : bool
        Estimate the encoder's BatchNorm statistics on training patches first.
    mistake : str
        One of `MISTAKES`.
    epochs, steps, batch_size : int
        Epochs, steps in each, patches in each step.
    patch_size : int or tuple of int
        As in `PatchDataset`.
    learning_rate, schedule, encoder_rate, averaging : float, str, float, float
        As in `TrainingSettings`.
    precision : str
        As in `TrainingSettings`, but ``auto`` is bf16 on a CPU that computes with it itself.
    loss, augmentation, split : str
        Of `LOSSES`, `AUGMENTATIONS`, `SPLITS`.
    labelled : int, optional
        How many of the training slices have labels, evenly spread; all by default.
    fixed : int, optional
        Cut so many patches once, and show them again and again, rather than new ones in each step.
    validation_step : int
        Every so many of the validation slices is looked at after each epoch; at the end all are.
    chosen_on : str
        Of a run that trains on all slices: the run whose folds, NAME-fold-1 and so on, of seed 0, say how probabilities
        become a mask. Runs of one fold write down what they need for that.
    compare_turned : bool
        Of a run of one fold: try the mean over eight turns (`predict_turned`) too, in eight times the time.
    tested : bool
        Choose the threshold on the validation slices and measure the test stack, once. Rows that only compare
        settings leave it alone.
    """

    shows: str
    unet: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    encoder_weights: str | None = None
    frozen: bool = False
    neighbours: bool = False
    calibrated: bool = False
    mistake: str | None = None
    epochs: int = 20
    steps: int = 30
    batch_size: int = 6
    patch_size: int | tuple[int, ...] = 160
    learning_rate: float = 2e-3
    schedule: str = "one-cycle"
    precision: str = "bf16"
    encoder_rate: float = 1.0
    averaging: float = 0.0
    loss: str = "DiceBCE"
    augmentation: str = "flips, quarter turns"
    split: str = "block"
    labelled: int | None = None
    fixed: int | None = None
    validation_step: int = 12
    chosen_on: str | None = None
    compare_turned: bool = False
    tested: bool = True

    def build(self, seed: int) -> nn.Module:
        """Return the untrained model; the same for the same seed."""
        torch.manual_seed(seed)
        if self.encoder is None:
            model: nn.Module = UNet(**self.unet)
        else:
            model = encoder_unet(
                self.encoder, weights=self.encoder_weights, frozen=self.frozen, neighbours=self.neighbours
            )
        return MISTAKES[self.mistake](model) if self.mistake else model

    def patches(self, stack: Stack, seed: int) -> Dataset[Pair]:
        """Return the training patches of a stack."""
        length = self.steps * self.batch_size
        patches = PatchDataset(
            stack,
            patch_size=(3, self.patch_size, self.patch_size) if self.neighbours else self.patch_size,
            patches_per_epoch=self.fixed or length,
            seed=seed,
            augmentation=AUGMENTATIONS[self.augmentation](),
        )
        if self.neighbours:
            return MiddleSlices(patches)
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
            precision=_fastest() if self.precision == "auto" else self.precision,
            encoder_rate=self.encoder_rate,
            averaging=self.averaging,
        )

    def parts(self, n_slices: int) -> Split:
        """Return the slices that train and that validate."""
        split = SPLITS[self.split](n_slices)
        return Split(spread_slices(split.train, self.labelled or len(split.train)), split.validation)


def _fastest() -> str:
    return mixed_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


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
    short = {"epochs": 4, "steps": 78, "batch_size": 1, "tested": False}  # the voxels of "equal voxels"
    slow = {"learning_rate": 5e-4}
    raw = {"mistake": "input 0 to 255", "schedule": "constant", "learning_rate": 1e-3}
    return {
        "unet3d-equal-time": replace(base, shows="3D, as many seconds as the 2D U-Net", steps=95),
        "unet3d-equal-voxels": replace(base, shows="3D, as many voxels as the 2D U-Net", steps=39),
        "unet3d-longer": replace(base, shows="3D, 2.5 times as many seconds", epochs=6, steps=160),
        "unet3d-batch-1-fast": replace(base, shows="3D, batches of 1, the rate of batches of 2", **short),
        "unet3d-batch-1-batchnorm": replace(base, shows="3D, batches of 1, BatchNorm", **short, **slow),
        "unet3d-batch-1-groupnorm": replace(
            base, shows="3D, batches of 1, GroupNorm", unet=narrow | {"normalisation": "group"}, **short, **slow
        ),
        "unet3d-batch-1-none": replace(
            base, shows="3D, batches of 1, no normalisation", unet=narrow | {"normalisation": "none"}, **short, **slow
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


def _ladder() -> dict[str, Recipe]:
    """Chapter 7: rung upon rung, each trained on four folds, and once on all slices, for the test stack."""
    frozen = Recipe("the study's way", encoder="efficientnet_lite0", encoder_weights="imagenet", frozen=True)
    finetuned = replace(frozen, shows="and fine-tuned", frozen=False)
    stronger = {"augmentation": "flips, quarter turns, contrast, scale, blur"}
    rungs = {
        "frozen": frozen,
        "finetuned": finetuned,
        "augmented": replace(finetuned, shows="and contrast, scale, blur", **stronger),
        "careful": replace(finetuned, shows="and a lower rate for the encoder", encoder_rate=0.3),
        "larger": replace(finetuned, shows="and patches of 256, as many pixels", patch_size=256, steps=12),
        "averaged": replace(finetuned, shows="and averaged weights", averaging=0.99),
        "neighbours": replace(finetuned, shows="and neighbouring slices as channels", neighbours=True),
        "elastic": replace(finetuned, shows="and elastic bending", augmentation="flips, quarter turns, elastic"),
        "contrast": replace(finetuned, shows="and contrast", augmentation="flips, quarter turns, contrast"),
    }
    together = replace(
        finetuned, shows="and all that helped", neighbours=True, encoder_rate=0.3, patch_size=256, steps=12
    )
    both = replace(finetuned, shows="and neighbours, and the lower rate", neighbours=True, encoder_rate=0.3)
    longer = replace(
        together, shows="and longer, with averaged weights", epochs=10, steps=200, batch_size=16, averaging=0.998,
        precision="auto", validation_step=4,
    )  # fmt: skip
    everything = "flips, quarter turns, contrast, scale, blur, noise, drift"
    volume = Recipe(
        "a 3D network, as long", {"ndim": 3, "width": 16, "depth": 4, "residual": True}, patch_size=(32, 128, 128),
        batch_size=4, epochs=10, steps=150, averaging=0.998, precision="auto", validation_step=4,
        augmentation="turns of blocks, drift",
    )  # fmt: skip
    rungs |= {
        "both": both,
        "together": together,
        "longer": longer,
        "sturdy": replace(longer, shows="and longer, with strong augmentation", augmentation=everything),
        "volume": volume,
    }
    recipes = {}
    for name, rung in rungs.items():
        for number, split in enumerate(FOLDS, 1):
            shows = f"{rung.shows}, {split}"
            recipes[f"ladder-{name}-fold-{number}"] = replace(rung, shows=shows, split=split, tested=False)
        # Frozen before the test: the long trainings' own folds were run later, so they don't choose any more.
        folds = "together" if name in ("longer", "sturdy") else name
        recipes[f"ladder-{name}"] = replace(rung, split="all", chosen_on=f"ladder-{folds}")
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
    _check()
    | _mistakes()
    | _repairs()
    | _variants()
    | _in_3d()
    | _transfer()
    | _label_efficiency()
    | _ladder()
    | _on_a_gpu()
)


def recipe_named(name: str) -> Recipe:
    """Return a recipe, or raise a ValueError with the names that are near."""
    if name in RECIPES:
        return RECIPES[name]
    near = get_close_matches(name, RECIPES, n=3, cutoff=0.4) or sorted(RECIPES)[:3]
    raise ValueError(f"There is no recipe {name!r}, but for example {', '.join(near)}; `mitoseg run --list` lists all.")


def spread_slices(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Return so many of the indices, evenly spread; the middle one for 1."""
    n, count = len(indices), min(count, len(indices))
    places = [(n - 1) / 2] if count == 1 else np.linspace(0, n - 1, count)
    return tuple(indices[round(float(place))] for place in places)
