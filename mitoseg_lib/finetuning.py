"""From a reader's own labels to a model in a file: what ``mitoseg train`` does.

A network that knows mitochondria already, or photographs at least, is trained on one part of the labels and measured
on another. The folder of the training holds its checkpoints while it goes on, and in the end ``model.safetensors``
(for ``mitoseg predict --weights``) and ``history.csv``.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from mitoseg_lib.checkpoints import CheckpointFolder
from mitoseg_lib.errors import FilePath
from mitoseg_lib.files import write_whole
from mitoseg_lib.grey import GreyRange
from mitoseg_lib.inference import choose_threshold, predict_stack
from mitoseg_lib.labelled import Parts, hold_out, read_labelled
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.models import EncoderUNet, UNet
from mitoseg_lib.patches import MiddleSlices, PatchDataset, train_augmentation
from mitoseg_lib.prediction import choose_device
from mitoseg_lib.stacks import Stack
from mitoseg_lib.starts import Start, choose_start
from mitoseg_lib.tiff import VoxelSize
from mitoseg_lib.training import History, TrainingInterrupted, TrainingSettings, fit
from mitoseg_lib.training.precision import mixed_precision
from mitoseg_lib.weights import MaskRule, save_weights

__all__ = [
    "EPOCHS",
    "MODEL_FILE",
    "FineTuned",
    "FineTuningOptions",
    "FineTuningPlan",
    "plan_finetuning",
]

MODEL_FILE, HISTORY_FILE, CHECKPOINTS = "model.safetensors", "history.csv", "checkpoints"
# 600 steps in all, as the recipes on two cores have: some three minutes on one core of 2025 that has bfloat16.
EPOCHS, STEPS, BATCH_SIZE, PATCH_SIZE = 20, 30, 6, 160
SMALLEST_PATCH = 96  # of smaller slices; a network that halves its input five times sees nothing in less
# A decoder at random needs larger steps than a network that only has to get used to another tissue.
RATE_FROM_IMAGENET, RATE_FROM_MODEL = 2e-3, 5e-4
ENCODER_RATE = 0.3  # better than 1 on all four folds of the ladder
CONTRAST = 0.2
AVERAGED = 1 / 12  # of all steps, on which the moving average of the weights looks back
FOREGROUND_SHARE = 1 / BATCH_SIZE  # a patch a step holds some for certain, however sparse labels are
# A part held out may show two mitochondria: a threshold beyond these would be luck, and miss or invent others.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(4, 17))  # 0.2 to 0.8
LARGEST_WATCHED = 2**22  # voxels that are looked at after each epoch


@dataclass(frozen=True)
class FineTuningOptions:
    """What a training starts from, and how it is made.

    Attributes
    ----------
    encoder, weights
        See `mitoseg_lib.starts.choose_start`.
    neighbours
        See `mitoseg_lib.starts.Start.set_neighbours`.
    epochs
        Of 30 steps of 6 patches, whatever the size of the stack.
    seed
        Of everything that is drawn.
    device
        "auto", "cpu" or "cuda".
    instances
        Whether the labels number objects rather than being a mask.
    """

    encoder: str | None = None
    weights: FilePath | None = None
    neighbours: bool | None = None
    epochs: int = EPOCHS
    seed: int = 0
    device: str = "auto"
    instances: bool = False


@dataclass(frozen=True)
class FineTuned:
    """What came of a training.

    Attributes
    ----------
    model_path
        Of the trained model.
    threshold
        From 0.2 to 0.8, with which the model is best on the validation part; it is in the file, too.
    validation
        Scores on the validation part, at that threshold.
    before
        The same of the model that the training started from, at its own threshold; None if it started from ImageNet.
    history
        Of all epochs.
    """

    model_path: Path
    threshold: float
    validation: Scores
    before: Scores | None
    history: History

    def summary(self) -> str:
        """Return in words how good the model is, and where it lies."""
        before = "" if self.before is None else f" (before the training: {self.before.iou:.3f})"
        return (
            f"IoU {self.validation.iou:.3f} on the part held out, at threshold {self.threshold:g}, which was chosen"
            f" there{before}\nmodel written to {self.model_path}; use it with"
        )


@dataclass(frozen=True)
class FineTuningPlan:
    """What `plan_finetuning` decided; nothing was trained or written yet.

    Attributes
    ----------
    parts
        What trains and what validates.
    grey_range
        For the trained model's metadata.
    start
        What it starts from.
    options
        As they were given.
    folder
        Of the training.
    notes
        What the user should know of it, one sentence each.
    """

    parts: Parts
    grey_range: GreyRange | None
    start: Start
    options: FineTuningOptions
    folder: Path
    notes: tuple[str, ...]

    def run(self, *, progress: bool | None = None) -> FineTuned:
        """Train, choose the threshold on the validation part, and write the model and the history.

        Parameters
        ----------
        progress
            Show a progress bar on stderr; by default where that is a terminal.

        Raises
        ------
        TrainingInterrupted
            After Ctrl-C or SIGTERM; what was trained is saved.
        ArithmeticError
            When the loss or the weights become infinite or NaN.
        CheckpointError
            If there are checkpoints of another training in the folder.
        """
        checkpoints = CheckpointFolder(self.folder / CHECKPOINTS)
        try:
            found = self._train(checkpoints, progress)
        except KeyboardInterrupt:
            saved = "nothing was saved, since it hadn't begun"
            if checkpoints.places("last"):
                saved = "the same command with --resume goes on from there"
            raise TrainingInterrupted(f"The training was stopped; {saved}.") from None
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        return found

    def _train(self, checkpoints: CheckpointFolder, progress: bool | None) -> FineTuned:
        model, validation = self.start.model.to(choose_device(self.options.device)), self.parts.validation
        before = None
        if self.start.is_trained:
            before = scores(predict_stack(model, validation.image) >= self.start.threshold, validation.labels)
        history = fit(
            model,
            _patches(self.parts.train, model, self.options.seed),
            validation=_watched(validation),
            settings=_settings(self.options, from_model=self.start.is_trained),
            checkpoints=checkpoints.folder,
            progress=progress,
        )
        probabilities = predict_stack(model, validation.image)
        threshold = choose_threshold(probabilities, validation.labels, candidates=THRESHOLDS)
        write_whole(self.folder / HISTORY_FILE, _as_csv(history))
        save_weights(
            model,
            self.folder / MODEL_FILE,
            rule=MaskRule(threshold),
            encoder=self.start.encoder,
            voxel_size_nm=validation.require_voxel_size(),
            grey_range=self.grey_range,
        )
        found = scores(probabilities >= threshold, validation.labels)
        return FineTuned(self.folder / MODEL_FILE, threshold, found, before, history)


def plan_finetuning(
    image: FilePath,
    labels: FilePath,
    folder: FilePath,
    *,
    options: FineTuningOptions = FineTuningOptions(),
    voxel_size_nm: VoxelSize | None = None,
    resume: bool = False,
) -> FineTuningPlan:
    """Read labels, decide what is held out and what the training starts from, and check that the folder is free.

    Parameters
    ----------
    image, labels
        See `mitoseg_lib.labelled.read_labelled`.
    folder
        Of the training; made if need be. Nothing in it is overwritten.
    options
        How to train.
    voxel_size_nm
        Of the image, (z, y, x); it counts more than what the image itself says.
    resume
        Go on with the training that was interrupted in this folder, if there is one.

    Raises
    ------
    StackError
        If image and labels can't be used together, or nothing can be held out.
    WeightsError
        If the weights can't be used.
    RuntimeError
        If ImageNet weights can't be had.
    ValueError
        If the folder holds a training already, or an option can't be meant.
    """
    folder = Path(folder)
    _require_free(folder, resume)
    choose_device(options.device)
    _settings(options, from_model=False)  # refuses impossible numbers before anything is read
    start = choose_start(options.encoder, options.weights, seed=options.seed)
    labelled = read_labelled(
        image,
        labels,
        voxel_size_nm=voxel_size_nm,
        model_size_nm=start.voxel_size_nm,
        model_grey_range=start.grey_range,
        instances=options.instances,
    )
    parts = hold_out(labelled.stack)
    start.set_neighbours(options.neighbours, depth=labelled.stack.shape[0])
    seen = "sees each slice with its neighbours" if start.n_slices > 1 else "sees single slices"
    notes = [*labelled.notes, parts.note, f"the network {seen} and starts from {start.words}"]
    if resume:
        notes.append(_on_resumption(folder, options.epochs))
    return FineTuningPlan(parts, labelled.grey_range, start, options, folder, tuple(notes))


# --- the training -------------------------------------------------------------------------------------------


def _settings(options: FineTuningOptions, *, from_model: bool) -> TrainingSettings:
    device = choose_device(options.device)
    return TrainingSettings(
        epochs=options.epochs,
        batch_size=BATCH_SIZE,
        learning_rate=RATE_FROM_MODEL if from_model else RATE_FROM_IMAGENET,
        encoder_rate=ENCODER_RATE,
        averaging=max(0.0, 1 - 1 / (AVERAGED * STEPS * max(1, options.epochs))),
        seed=options.seed,
        precision=mixed_precision(device),
        device=device.type,
    )


def _patches(train: Stack, model: EncoderUNet | UNet, seed: int) -> Dataset[tuple[Tensor, Tensor]]:
    """Return training patches as a model takes them."""
    sees_neighbours = getattr(model, "n_slices", 1) > 1
    side = _patch_side(train.shape[1:], model.size_multiple)
    patches = PatchDataset(
        _with_ends(train) if sees_neighbours else train,
        patch_size=(3, side, side) if sees_neighbours else side,
        patches_per_epoch=STEPS * BATCH_SIZE,
        seed=seed,
        augmentation=train_augmentation(brightness_contrast=CONTRAST),
        foreground_share=FOREGROUND_SHARE,
    )
    return MiddleSlices(patches) if sees_neighbours else patches


def _patch_side(plane: tuple[int, ...], multiple: int) -> int:
    """Return the side of patches: smaller ones where slices are small, continued by reflection if need be."""
    side = max(SMALLEST_PATCH, min(PATCH_SIZE, *plane))
    return math.ceil(side / multiple) * multiple


def _with_ends(stack: Stack) -> Stack:
    """Return a stack with a slice more at both ends, as `predict_stack` has them, so that each can be the middle."""
    image, labels = (np.pad(part, ((1, 1), (0, 0), (0, 0)), "reflect") for part in (stack.image, stack.labels))
    return replace(stack, image=image, labels=labels)


def _watched(validation: Stack) -> Stack:
    """Return the slices that are looked at after each epoch: the first ones of a large part."""
    n_slices = max(1, LARGEST_WATCHED // math.prod(validation.shape[1:]))
    some = validation.slices(slice(n_slices))
    return some if some.labels.any() and not some.labels.all() else validation


def _as_csv(history: History) -> bytes:
    rows = history.as_rows()
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


# --- the folder ---------------------------------------------------------------------------------------------


def _on_resumption(folder: Path, epochs: int) -> str:
    """Sentence on where a training goes on."""
    places = CheckpointFolder(folder / CHECKPOINTS).places("last")
    if not places:
        return f"{folder} holds no training to go on with, so a new one begins"
    return f"the training goes on after {places[-1][0]} of {epochs} epochs and {places[-1][1]} steps"


def _require_free(folder: Path, resume: bool) -> None:
    """Raise ValueError where a training, or what else would be in its way, is in the folder already."""
    advice = "give each training a folder of its own"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, but a folder was expected for the training; {advice}.")
    if (folder / MODEL_FILE).exists():
        raise ValueError(
            f"{folder} holds a finished training ({MODEL_FILE}), but a free folder was expected; {advice}."
        )
    has_begun = (folder / CHECKPOINTS).exists()
    if has_begun and not resume:
        raise ValueError(
            f"{folder} holds an interrupted training, but a free folder was expected; go on with it by --resume, or"
            " name another folder."
        )
    if not has_begun and (folder / HISTORY_FILE).exists():
        raise ValueError(f"{folder} holds a {HISTORY_FILE}, but a free folder was expected; {advice}.")
